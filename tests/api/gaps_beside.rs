//! Servers that do not answer about the gaps of their own events, and what others have of their rooms meanwhile.

use std::{
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use aqueduct::{
    flows::remote::take_in::{Silence, take_in},
    rooms::change::Outcome,
    schema,
    store::Direction,
};
use federation::testing::{self, Weather};
use futures_util::future::{Either, join_all, ready};
use ruma::OwnedEventId;
use serde_json::{Value, json};

use crate::{
    gaps::{BOB, CAROL, Scene},
    support::{BEGAN_MS, network::Peer, remote::Remote},
};

impl Scene {
    /// A user of another server, who is in the room.
    async fn joined(&self, user: &str) -> Remote {
        let mut remote = Remote::new(self.server.server().app(), &self.room);
        remote.user = user.try_into().unwrap();
        remote.join().await;
        remote
    }

    /// The event as its server sends it.
    fn sent(&self, id: &str) -> Value {
        self.there.known(id).json
    }

    fn staged(&self) -> usize {
        let snapshot = self.server.server().app().store.snapshot();
        schema::INBOUND_EVENT.prefix::<()>(&*snapshot, (), Direction::Up).unwrap().count()
    }

    /// The time until Alice reads an event, at most this long.
    async fn comes_within(&self, id: &str, at_most: Duration) -> Option<Duration> {
        let env = self.server.server().app().env.clone();
        let began = env.uptime();
        while env.uptime() - began < at_most {
            let path = format!("/_matrix/client/v3/rooms/{}/event/{id}", self.room);
            if self.alice.get(&path).await.0 == http::StatusCode::OK {
                return Some(env.uptime() - began);
            }
            env.sleep(Duration::from_secs(1)).await;
        }
        None
    }
}

fn unknown(number: usize) -> OwnedEventId {
    format!("${number:0>43}").try_into().unwrap()
}

/// Messages of a user, each of which stands on an event that nobody has.
fn behind_gaps(peer: &Peer, remote: &Remote, numbers: std::ops::Range<usize>) -> Vec<Value> {
    let content = |number: usize| json!({ "body": number });
    numbers
        .map(|number| peer.event(remote, "m.room.message", None, content(number), &[unknown(number)]).1)
        .collect()
}

/// Messages like those, which events allow besides that nobody has.
fn unallowed(peer: &Peer, remote: &Remote, numbers: std::ops::Range<usize>) -> Vec<Value> {
    let allowing = numbers.clone().map(|number| json!(unknown(10_000 + number)));
    let events = behind_gaps(peer, remote, numbers).into_iter().zip(allowing);
    let add = |(mut event, allowing): (Value, Value)| {
        event["auth_events"].as_array_mut().unwrap().push(allowing);
        peer.sign_event(&event, "11").1
    };
    events.map(add).collect()
}

#[tokio::test(start_paused = true)]
async fn a_server_that_gives_no_state_for_its_own_events_holds_up_nobody_else_of_the_room() {
    let mut scene = Scene::new().await;
    let eve = scene.joined("@eve:e.test").await;
    let peer = Peer::new(&scene.net, "e.test", "5.6.0.1", 61);
    let document = peer.own.document(BEGAN_MS).to_string();
    scene.net.serve("5.6.0.1:8448", &["e.test"], move |arrived| {
        let path = arrived.request.uri().path();
        if path.contains("/state") {
            return Either::Left(pending::<testing::Answered>());
        }
        let is_asked = path.contains("get_missing_events");
        let answer = if is_asked { json!({ "events": [] }).to_string() } else { document.clone() };
        Either::Right(ready(testing::json(200, answer)))
    });
    scene.net.take_arrived();
    let events = behind_gaps(&peer, &eve, 0..50);
    let (_, answer) = peer.transact(&scene.server, "1", &events, &[]).await;
    assert!(answer["pdus"].as_object().unwrap().values().all(|it| *it == json!({})), "{answer}");
    // The events wait, and their worker asks for the state before one of them.
    let env = scene.server.server().app().env.clone();
    env.sleep(Duration::from_secs(20)).await;
    assert!(
        scene.net.take_arrived().iter().any(|line| line.starts_with("e.test@") && line.contains("/state"))
    );
    // Bob was not heard for long. His server gives what it is asked.
    let bob = Peer::unheard("b.example", 2);
    let missed = scene.bob_says(300, "missed");
    let newest = missed.last().unwrap();
    bob.transact(&scene.server, "1", &[scene.sent(newest)], &[]).await;
    let took = scene.comes_within(newest, Duration::from_secs(300)).await;
    assert!(took.is_some_and(|took| took < Duration::from_secs(20)), "{took:?}");
    // Nor does it keep the hole below from being filled.
    let read = scene.read_all(100).await;
    assert!(missed.iter().all(|id| read.contains(id)));
    // It goes on while the server is asked again, which is at a distance.
    for round in 0..5 {
        env.sleep(Duration::from_secs(100)).await;
        let newest = scene.bob_says(30, "more").pop().unwrap();
        bob.transact(&scene.server, &format!("round {round}"), &[scene.sent(&newest)], &[]).await;
        let took = scene.comes_within(&newest, Duration::from_secs(60)).await;
        assert!(took.is_some_and(|took| took < Duration::from_secs(20)), "{took:?}");
    }
    let asked = scene.net.take_arrived();
    let states = asked.iter().filter(|line| line.starts_with("e.test@") && line.contains("/state")).count();
    assert!(states <= 4, "{states}");
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn one_call_asks_for_no_state_after_one_that_was_not_given() {
    let mut scene = Scene::new().await;
    let base = scene.there.heads.clone();
    let mut said = Vec::new();
    for number in 0..6 {
        let missed = scene.there.add_on(BOB, "m.room.message", None, json!({ "body": "missed" }), &base);
        let text = json!({ "body": number });
        said.push(scene.there.add_on(BOB, "m.room.message", None, text, std::slice::from_ref(&missed)));
        scene.there.forget(&missed);
    }
    scene.there.twist(|kind, _, answer| match kind {
        "state_ids" | "state" => (404, json!({ "errcode": "M_NOT_FOUND", "error": "no" })),
        _ => answer,
    });
    scene.net.take_arrived();
    let outcomes = scene.come(&said.iter().collect::<Vec<_>>()).await;
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Outcome::Unknown)), "{outcomes:?}");
    let states = scene.net.take_arrived().iter().filter(|line| line.contains("/state_ids/")).count();
    // That before the first of them, and that after the one that it cites.
    assert_eq!(states, 2);
    scene.there.untwist();
    tokio::time::advance(Duration::from_secs(700)).await;
    let outcomes = scene.come(&said.iter().collect::<Vec<_>>()).await;
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Outcome::Accepted(_))), "{outcomes:?}");
}

#[tokio::test(start_paused = true)]
async fn another_server_is_asked_about_a_gap_of_which_the_own_one_gives_nothing() {
    let mut scene = Scene::new().await;
    let dave = scene.joined("@dave:d.test").await;
    let said = scene.bob_says(5, "missed");
    scene.net.host("d.test", &["5.0.0.9"]);
    // It is as if Dave's server had sent it, which is not there any more.
    let app = scene.there.app();
    let events = vec![scene.there.received(said.last().unwrap())];
    let origin = dave.user.server_name();
    let outcomes = take_in(app, scene.there.room, origin, events, Silence::FetchesState).await.unwrap();
    assert!(matches!(outcomes[..], [Outcome::Accepted(_)]), "{outcomes:?}");
    assert_eq!(scene.hole_count(), 0, "no state was needed");
    let read = scene.read_all(30).await;
    assert!(said.iter().all(|id| read.contains(id)));
}

#[tokio::test(start_paused = true)]
async fn names_of_one_owner_do_not_take_all_places_for_asking_newcomers() {
    let mut scene = Scene::new().await;
    let join = scene.there.join(CAROL);
    let said = scene.there.say(CAROL, "hello");
    let other =
        scene.alice.ok_post("/createRoom", json!({ "preset": "public_chat", "room_version": "11" })).await;
    let mut remote = Remote::new(scene.server.server().app(), other["room_id"].as_str().unwrap());
    let mut evil = Vec::new();
    for number in 0..20_u8 {
        let (name, address) = (format!("n{number}.evil.test"), format!("5.6.1.{number}"));
        let peer = Peer::new(&scene.net, &name, &address, 100 + number);
        remote.user = format!("@eve:{name}").as_str().try_into().unwrap();
        // The keys are known, and then nothing is answered.
        peer.transact(&scene.server, "first", &unallowed(&peer, &remote, 900..901), &[]).await;
        scene.net.weather(&format!("{address}:8448"), Weather::Silent, Duration::ZERO);
        evil.push((peer, remote.clone()));
    }
    let server = scene.server.clone();
    let press = join_all(evil.iter().enumerate().map(|(number, (peer, remote))| {
        let (events, server) = (unallowed(peer, remote, number..number + 1), &server);
        async move { peer.transact(server, "second", &events, &[]).await }
    }));
    let newcomer = async {
        let env = scene.server.server().app().env.clone();
        env.sleep(Duration::from_secs(2)).await;
        let carol = Peer::unheard("c.example", 3);
        carol.transact(&scene.server, "1", &[scene.sent(&said)], &[]).await;
        scene.comes_within(&said, Duration::from_secs(60)).await
    };
    let (_, took) = tokio::join!(press, newcomer);
    assert!(took.is_some_and(|took| took < Duration::from_secs(1)), "{took:?}");
    assert!(scene.read_all(20).await.contains(&join));
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_newcomer_whose_server_gave_nothing_at_first_is_asked_again() {
    let mut scene = Scene::new().await;
    let join = scene.there.join(CAROL);
    let said = scene.there.say(CAROL, "hello");
    scene.there.twist(|_, _, _| (503, json!({})));
    let carol = Peer::unheard("c.example", 3);
    carol.transact(&scene.server, "1", &[scene.sent(&said)], &[]).await;
    assert_eq!(scene.staged(), 1);
    scene.there.untwist();
    // Nobody tells of the join.
    let took = scene.comes_within(&said, Duration::from_secs(3_600)).await;
    assert!(took.is_some(), "it waits for ever");
    assert!(scene.read_all(20).await.contains(&join));
    assert_eq!(scene.staged(), 0);
}

#[tokio::test(start_paused = true)]
async fn servers_of_one_owner_do_not_keep_events_of_others_from_waiting() {
    let mut scene = Scene::new().await;
    for number in 0..2_u8 {
        let name = format!("n{number}.evil.test");
        let peer = Peer::new(&scene.net, &name, &format!("5.6.2.{number}"), 120 + number);
        let remote = scene.joined(&format!("@eve:{name}")).await;
        for txn in 0..10 {
            let from = usize::from(number) * 500 + txn * 50;
            let events = behind_gaps(&peer, &remote, from..from + 50);
            peer.transact(&scene.server, &format!("{txn}"), &events, &[]).await;
        }
    }
    assert_eq!(scene.staged(), 1_000, "the room is full");
    scene.there.twist(|_, _, _| (503, json!({})));
    let missed = scene.bob_says(3, "missed");
    let newest = scene.there.say(BOB, "newest");
    let bob = Peer::unheard("b.example", 2);
    let (_, answer) = bob.transact(&scene.server, "1", &[scene.sent(&newest)], &[]).await;
    assert_eq!(answer["pdus"][&newest], json!({}), "{answer}");
    assert_eq!(scene.staged(), 1_000);
    scene.server.assert_whole();
    scene.there.untwist();
    assert!(scene.comes_within(&newest, Duration::from_secs(3_600)).await.is_some());
    assert!(scene.read_all(30).await.contains(&missed[0]));
}

#[tokio::test(start_paused = true)]
async fn a_neighbour_under_the_same_owner_who_hangs_holds_up_nobody() {
    let scene = Scene::new().await;
    let env = scene.server.server().app().env.clone();
    // These have two labels in common with an honest server, as tenants of a domain of dynamic addresses have.
    for number in 0..4_u8 {
        let (name, address) = (format!("evil{number}.dyn.test"), format!("5.6.3.{number}"));
        let peer = Peer::new(&scene.net, &name, &address, 140 + number);
        let user = scene.joined(&format!("@eve:{name}")).await;
        let events = behind_gaps(&peer, &user, 0..1);
        // Their keys are known, and then nothing is answered.
        peer.transact(&scene.server, "first", &events, &[]).await;
        scene.net.weather(&format!("{address}:8448"), Weather::Silent, Duration::ZERO);
        let from = 100 + 50 * usize::from(number);
        peer.transact(&scene.server, "second", &behind_gaps(&peer, &user, from..from + 20), &[]).await;
    }
    // Their workers wait for answers now.
    env.sleep(Duration::from_secs(20)).await;
    assert!(scene.staged() >= 80, "{}", scene.staged());
    let honest = scene.joined("@hal:honest.dyn.test").await;
    let peer = Peer::new(&scene.net, "honest.dyn.test", "5.6.3.100", 150);
    let missed = peer.event(&honest, "m.room.message", None, json!({ "body": "missed" }), &honest.heads());
    let said = peer.event(
        &honest,
        "m.room.message",
        None,
        json!({ "body": "said" }),
        std::slice::from_ref(&missed.0),
    );
    let (document, gives) = (peer.own.document(BEGAN_MS).to_string(), Arc::new(AtomicBool::new(false)));
    let (missing, given) = (missed.1.clone(), Arc::clone(&gives));
    scene.net.serve("5.6.3.100:8448", &["honest.dyn.test"], move |arrived| {
        let is_asked = arrived.request.uri().path().contains("get_missing_events");
        let answer = match (is_asked, given.load(Ordering::SeqCst)) {
            (true, true) => json!({ "events": [missing] }).to_string(),
            (true, false) => json!({ "events": [] }).to_string(),
            (false, _) => document.clone(),
        };
        ready(testing::json(200, answer))
    });
    // At first it does not give what its event stands on, so that this waits, too.
    let (_, answer) = peer.transact(&scene.server, "1", std::slice::from_ref(&said.1), &[]).await;
    assert_eq!(answer["pdus"][said.0.as_str()], json!({}), "{answer}");
    gives.store(true, Ordering::SeqCst);
    let took = scene.comes_within(said.0.as_str(), Duration::from_secs(600)).await;
    assert!(took.is_some_and(|took| took < Duration::from_secs(40)), "{took:?}");
    assert!(scene.read_all(50).await.contains(&missed.0.to_string()));
    assert!(scene.staged() >= 80, "those who hang wait on");
    scene.server.assert_whole();
}
