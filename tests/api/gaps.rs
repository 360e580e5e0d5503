//! Gaps in rooms: events that come without what they stand on, and history that is fetched when somebody reads it.

use std::time::Duration;

use aqueduct::{
    flows::remote::take_in::{Silence, take_in},
    rooms::{
        self as room_rows,
        change::{Outcome, Received},
    },
    schema,
    store::Direction,
};
use federation::testing::{Net, Weather};
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{
        TestClient, TestServer,
        elsewhere::Elsewhere,
        encoded,
        network::{Peer, doors},
        remote::Remote,
    },
};

pub(crate) const BOB: &str = "@bob:b.example";
pub(crate) const CAROL: &str = "@carol:c.example";

/// A room of Alice's in which Bob of another server is, who goes on there while we hear nothing.
pub(crate) struct Scene {
    pub(crate) net: Net,
    pub(crate) server: TestServer,
    pub(crate) alice: TestClient,
    pub(crate) room: String,
    pub(crate) there: Elsewhere,
}

impl Scene {
    pub(crate) async fn new() -> Self {
        Self::in_room(json!({ "preset": "public_chat", "room_version": "11" })).await
    }

    async fn in_room(create: Value) -> Self {
        let net = Net::new(1);
        let store = aqueduct::store::Store::open(
            aqueduct::store::Engine::Memory(Default::default()),
            aqueduct::store::Durability::Fsync,
        );
        let server = TestServer::start(doors(&net), store.unwrap(), |_| {});
        let alice = server.register("alice").await;
        let room = alice.create(create).await;
        Remote::new(server.server().app(), &room).join().await;
        let servers = [("b.example", "5.0.0.2"), ("c.example", "5.0.0.3")];
        let there = Elsewhere::new(&net, server.server().app(), &room, &servers);
        Self { net, server, alice, room, there }
    }

    /// Events come from the server `b.example`.
    pub(crate) async fn come(&self, ids: &[&String]) -> Vec<Outcome> {
        self.come_with(ids, Silence::FetchesState).await
    }

    async fn come_with(&self, ids: &[&String], silence: Silence) -> Vec<Outcome> {
        let events: Vec<Received> = ids.iter().map(|id| self.there.received(id)).collect();
        let (app, room, origin) = (self.there.app(), self.there.room, "b.example".try_into().unwrap());
        take_in(app, room, origin, events, silence).await.unwrap()
    }

    async fn come_one(&self, id: &String) -> Outcome {
        self.come(&[id]).await.remove(0)
    }

    /// The ids of the room's events that Alice reads, page by page, oldest first.
    pub(crate) async fn read_all(&self, limit: usize) -> Vec<String> {
        let (mut read, mut from) = (Vec::new(), String::new());
        for _ in 0..200 {
            let page = self.page(&from, limit).await;
            read.extend(ids(&page["chunk"]));
            let Some(end) = page["end"].as_str() else {
                read.reverse();
                return read;
            };
            from = format!("&from={end}");
        }
        panic!("the pages have no end");
    }

    async fn page(&self, from: &str, limit: usize) -> Value {
        self.alice.ok_get(&format!("/rooms/{}/messages?dir=b&limit={limit}{from}", self.room)).await
    }

    async fn sync(&self, since: &str) -> (Value, String) {
        let since = if since.is_empty() { String::new() } else { format!("?since={since}") };
        let sync = self.alice.ok_get(&format!("/sync{since}")).await;
        let next = sync["next_batch"].as_str().unwrap().to_owned();
        (sync["rooms"]["join"][&self.room].clone(), next)
    }

    /// Bob says so many things elsewhere.
    pub(crate) fn bob_says(&mut self, count: usize, what: &str) -> Vec<String> {
        (0..count).map(|number| self.there.say(BOB, &format!("{what} {number}"))).collect()
    }

    pub(crate) fn hole_count(&self) -> u64 {
        let rows = self.server.assert_whole();
        rows.into_iter().find(|(table, _)| *table == "HOLE").unwrap().1
    }
}

fn ids(events: &Value) -> Vec<String> {
    let events = events.as_array().unwrap_or_else(|| panic!("no list: {events}"));
    events.iter().map(|event| event["event_id"].as_str().unwrap().to_owned()).collect()
}

fn accepted(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Accepted(_))
}

fn unknown(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Unknown)
}

/// Each of these is in the list once, in this order.
fn assert_holds(list: &[String], these: &[String]) {
    let found: Vec<&String> = list.iter().filter(|id| these.contains(id)).collect();
    assert_eq!(found, these.iter().collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn a_short_gap_is_filled_before_the_event_that_shows_it() {
    let mut scene = Scene::new().await;
    let (_, since) = scene.sync("").await;
    let said = scene.bob_says(45, "missed");
    let newest = said.last().unwrap();
    let outcome = scene.come_one(newest).await;
    assert!(accepted(&outcome), "{outcome:?}");
    assert_holds(&scene.read_all(30).await, &said);
    let (room, _) = scene.sync(&since).await;
    assert_eq!(room["timeline"]["events"].as_array().unwrap().last().unwrap()["event_id"], newest.as_str());
    assert_eq!(scene.hole_count(), 0);
    assert!(matches!(scene.come_one(&said[7]).await, Outcome::Known(_)));
}

#[tokio::test(start_paused = true)]
async fn after_a_long_outage_the_room_goes_on_with_a_state_that_is_fetched_and_the_past_comes_when_it_is_read()
 {
    let mut scene = Scene::new().await;
    let (_, since) = scene.sync("").await;
    let mut all = scene.bob_says(60, "first");
    all.push(scene.there.join(CAROL));
    all.push(scene.there.add("@alice:test.example", "m.room.topic", Some(""), json!({ "topic": "news" })));
    all.extend((0..5).map(|number| scene.there.say(CAROL, &format!("hello {number}"))));
    all.extend(scene.bob_says(300, "second"));
    all.push(scene.there.say(CAROL, "newest"));
    let newest = all.last().unwrap().clone();
    let outcome = scene.come_one(&newest).await;
    assert!(accepted(&outcome), "{outcome:?}");
    let (room, next) = scene.sync(&since).await;
    assert_eq!(room["timeline"]["limited"], true, "{room}");
    let told = ids(&room["timeline"]["events"]);
    assert_eq!(told.last(), Some(&newest));
    let state = room["state"]["events"].as_array().unwrap();
    assert!(state.iter().any(|event| event["content"]["topic"] == "news"), "{room}");
    assert_eq!(scene.alice.state(&scene.room, "m.room.topic", "").await.1["topic"], "news");
    assert_eq!(scene.hole_count(), 1);
    // Reading on from what was told, everything that was missed comes, and then what was before.
    let prev_batch = room["timeline"]["prev_batch"].as_str().unwrap();
    let page = scene.page(&format!("&from={prev_batch}"), 20).await;
    assert_eq!(page["chunk"].as_array().unwrap().len(), 20, "{page}");
    let read = scene.read_all(50).await;
    assert_holds(&read, &all);
    assert_eq!(read.first(), scene.read_all(50).await.first());
    assert_eq!(scene.hole_count(), 0);
    let (nothing, _) = scene.sync(&next).await;
    assert!(nothing.is_null(), "{nothing}");
    // The state at what was filled is what it was there.
    let context = scene.alice.ok_get(&format!("/rooms/{}/context/{}?limit=0", scene.room, all[59])).await;
    let state = context["state"].as_array().unwrap();
    assert!(!state.iter().any(|event| event["type"] == "m.room.topic"), "{context}");
    let context = scene.alice.ok_get(&format!("/rooms/{}/context/{}?limit=0", scene.room, all[70])).await;
    let state = context["state"].as_array().unwrap();
    assert!(state.iter().any(|event| event["type"] == "m.room.topic"), "{context}");
    // The room goes on from both sides.
    scene.alice.say(&scene.room, "after", "we are back").await;
    let further = scene.there.say(BOB, "further");
    assert!(accepted(&scene.come_one(&further).await));
}

#[tokio::test(start_paused = true)]
async fn an_event_without_its_auth_events_waits_for_them_and_is_not_rejected() {
    let mut scene = Scene::new().await;
    let join = scene.there.join(CAROL);
    let said = scene.there.say(CAROL, "hello");
    let lost = scene.there.forget(&join);
    for _ in 0..3 {
        let outcome = scene.come_one(&said).await;
        assert!(unknown(&outcome), "{outcome:?}");
    }
    scene.there.put(&join, lost);
    tokio::time::advance(Duration::from_secs(700)).await;
    let outcome = scene.come_one(&said).await;
    assert!(accepted(&outcome), "{outcome:?}");
    assert_holds(&scene.read_all(10).await, &[join, said]);
    assert_eq!(scene.hole_count(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_event_that_one_of_another_room_is_to_allow_is_rejected_at_once_and_so_is_what_stands_on_it() {
    let mut scene = Scene::new().await;
    let other = scene.alice.create(json!({ "preset": "public_chat", "room_version": "10" })).await;
    let app = scene.there.app().clone();
    let (elsewhere, of_other) = {
        let snapshot = app.store.snapshot();
        let num = room_rows::find_room(&*snapshot, &ruma::RoomId::parse(&*other).unwrap()).unwrap().unwrap();
        let alice = &scene.alice.user_id;
        let member = room_rows::find_state(&*snapshot, num, "m.room.member", alice).unwrap().unwrap();
        let row = room_rows::require_row(&*snapshot, num).unwrap();
        (member.id(&row).to_string(), serde_json::from_slice::<Value>(&member.row.json).unwrap())
    };
    let heads = scene.there.heads.clone();
    let text = json!({ "body": "hello" });
    let wrong =
        scene.there.add_naming((BOB, "m.room.message", None), text.clone(), &heads, &[elsewhere.as_str()]);
    // Until somebody gives it, nobody knows of which room it is.
    assert!(unknown(&scene.come_with(&[&wrong], Silence::Waits).await[0]));
    let (id, of_other) = (elsewhere.clone(), of_other.clone());
    scene.there.twist(move |kind, asked, answer| match kind {
        "event" if asked == id => {
            (200, json!({ "origin": "b.example", "origin_server_ts": 1, "pdus": [of_other] }))
        }
        _ => answer,
    });
    for _ in 0..2 {
        let outcome = scene.come_with(&[&wrong], Silence::Waits).await.remove(0);
        assert!(matches!(outcome, Outcome::Outlier(_)), "{outcome:?}");
    }
    // An event that such a one is to allow is rejected with it.
    let joins = json!({ "membership": "join", "displayname": "Bob" });
    let member = (BOB, "m.room.member", Some(BOB));
    let renamed = scene.there.add_naming(member, joins, &heads, &[elsewhere.as_str()]);
    let on_it = scene.there.add_naming((BOB, "m.room.message", None), text, &heads, &[renamed.as_str()]);
    let outcome = scene.come_with(&[&on_it], Silence::Waits).await.remove(0);
    assert!(matches!(outcome, Outcome::Aside(..) | Outcome::Outlier(_)), "{outcome:?}");
    let next = scene.there.say(BOB, "the room goes on");
    assert!(accepted(&scene.come_one(&next).await));
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_server_that_gives_nothing_of_a_gap_is_asked_again_before_a_state_is_fetched() {
    let mut scene = Scene::new().await;
    let missed = scene.bob_says(3, "missed");
    let said = scene.there.say(BOB, "hello");
    let nothing = |kind: &str, _: &str, answer| match kind {
        "get_missing_events" => (200, json!({ "events": [] })),
        _ => answer,
    };
    scene.there.twist(nothing);
    scene.net.take_arrived();
    let outcome = scene.come_with(&[&said], Silence::Waits).await.remove(0);
    assert!(unknown(&outcome), "{outcome:?}");
    assert!(!scene.net.take_arrived().iter().any(|line| line.contains("/state")));
    assert_eq!(scene.hole_count(), 0);
    scene.there.untwist();
    assert!(accepted(&scene.come_with(&[&said], Silence::Waits).await[0]));
    assert_holds(&scene.read_all(10).await, &[missed, vec![said]].concat());
    // A server that gives a part of a gap has no more to give, so that the state is fetched at once.
    let far = scene.bob_says(300, "far").pop().unwrap();
    assert!(accepted(&scene.come_with(&[&far], Silence::Waits).await[0]));
    assert_eq!(scene.hole_count(), 1);
    // One that goes on giving nothing is not waited for.
    scene.there.twist(nothing);
    scene.bob_says(3, "lost");
    let last = scene.there.say(BOB, "last");
    tokio::time::advance(Duration::from_secs(700)).await;
    assert!(unknown(&scene.come_with(&[&last], Silence::Waits).await[0]));
    assert!(accepted(&scene.come_one(&last).await));
    assert_eq!(scene.hole_count(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_a_server_leaves_out_of_a_gap_is_asked_for_by_itself() {
    let mut scene = Scene::new().await;
    scene.there.twist(|kind, _, (status, mut answer)| {
        if let Some(events) = answer["events"].as_array_mut().filter(|_| kind == "get_missing_events") {
            // The last one is just below the event that is known.
            let below = events.pop();
            *events = below.into_iter().collect();
        }
        (status, answer)
    });
    let said = scene.bob_says(3, "missed");
    scene.net.take_arrived();
    let outcome = scene.come_one(said.last().unwrap()).await;
    assert!(accepted(&outcome), "{outcome:?}");
    assert_holds(&scene.read_all(30).await, &said);
    let asked = scene.net.take_arrived();
    let count = |what: &str| asked.iter().filter(|line| line.contains(what)).count();
    assert_eq!((count("get_missing_events"), count("/event/"), count("/state")), (1, 1, 0), "{asked:?}");
    // In a longer gap, the state is fetched before the lowest event that could be had.
    let said = scene.bob_says(6, "more");
    let outcome = scene.come_one(&said[5]).await;
    assert!(accepted(&outcome), "{outcome:?}");
    let asked = scene.net.take_arrived();
    let of_lowest = |line: &&String| line.contains("/state_ids/") && line.contains(&encoded(&said[3]));
    assert_eq!(asked.iter().filter(of_lowest).count(), 1, "{asked:?}");
    assert_eq!(asked.iter().filter(|line| line.contains("/state_ids/")).count(), 1, "{asked:?}");
    scene.there.untwist();
    assert_holds(&scene.read_all(30).await, &said);
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_state_event_from_which_a_server_took_the_content_away_is_asked_for_elsewhere() {
    let levels = json!({ "events": { "m.room.server_acl": 0, "m.room.topic": 0 } });
    let room =
        json!({ "preset": "public_chat", "room_version": "11", "power_level_content_override": levels });
    let mut scene = Scene::in_room(room).await;
    scene.there.join(CAROL);
    let list = json!({ "allow": ["*"], "deny": ["evil.example"] });
    let listed = scene.there.add(CAROL, "m.room.server_acl", Some(""), list.clone());
    let topic = scene.there.add(CAROL, "m.room.topic", Some(""), json!({ "topic": "lost" }));
    let gone = topic.clone();
    scene.there.twist(move |kind, named, (status, mut answer)| {
        for event in answer["events"].as_array_mut().into_iter().flatten() {
            if event["state_key"] == "" {
                event["content"] = json!({});
            }
        }
        for event in answer["pdus"].as_array_mut().into_iter().flatten().filter(|_| named == gone) {
            event["content"] = json!({});
        }
        assert!(kind != "state", "nothing is left out of the gap");
        (status, answer)
    });
    let said = scene.there.say(BOB, "hello");
    scene.net.take_arrived();
    let outcome = scene.come_one(&said).await;
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(scene.alice.state(&scene.room, "m.room.server_acl", "").await.1, list);
    let asked = scene.net.take_arrived();
    let asked_for = |id: &str| asked.iter().filter(|line| line.ends_with(&format!("/event/{id}"))).count();
    assert_eq!(
        (asked_for(&listed), asked_for(&topic)),
        (1, 2),
        "the sender's server, then others: {asked:?}"
    );
    // Nobody has the rest of this one, so that it counts as it came, until it comes whole.
    assert_eq!(scene.alice.state(&scene.room, "m.room.topic", "").await.1, json!({}));
    scene.come_one(&topic).await;
    assert_eq!(scene.alice.state(&scene.room, "m.room.topic", "").await.1, json!({ "topic": "lost" }));
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_event_that_a_rejected_one_allows_is_rejected_and_may_be_cited() {
    let mut scene = Scene::new().await;
    let base = scene.there.heads.clone();
    let bob = ("m.room.member".to_owned(), BOB.to_owned());
    // Bob may not set power levels.
    let levels = scene.there.add_on(BOB, "m.room.power_levels", Some(""), json!({ "users": {} }), &base);
    assert!(matches!(scene.come_one(&levels).await, Outcome::Aside(..)));
    // It names the levels among those that allow it, and comes only because others name it.
    let content = json!({ "membership": "join", "displayname": "Robert" });
    let outlier = scene.there.add_on(BOB, "m.room.member", Some(BOB), content, &[levels]);
    let mut known = scene.there.known(&base[0]);
    let joined = known.after.insert(bob.clone(), outlier.clone()).unwrap();
    scene.there.put(&base[0], known);
    let (first, second) = (scene.there.say(BOB, "first"), scene.there.say(BOB, "second"));
    let mut known = scene.there.known(&second);
    known.after.insert(bob.clone(), joined);
    scene.there.put(&second, known);
    let last = scene.there.say(BOB, "last");
    scene.net.take_arrived();
    let outcomes = scene.come_with(&[&first, &second, &last], Silence::Waits).await;
    assert!(
        matches!(outcomes[..], [Outcome::Aside(..), Outcome::Aside(..), Outcome::Accepted(_)]),
        "{outcomes:?}"
    );
    // All that was lacking is the outlier.
    let asked = scene.net.take_arrived();
    assert!(
        !asked.iter().any(|line| line.contains("get_missing_events") || line.contains("/state")),
        "{asked:?}"
    );
    let read = scene.read_all(20).await;
    assert!(read.contains(&last) && [&outlier, &first, &second].iter().all(|id| !read.contains(id)));
    for id in [&outlier, &first, &second] {
        let path = format!("/_matrix/client/v3/rooms/{}/event/{id}", scene.room);
        assert_eq!(scene.alice.get(&path).await.0, http::StatusCode::NOT_FOUND);
    }
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn events_that_allow_one_another_in_a_long_chain_come_with_the_gap() {
    for (count, holes) in [(30, 0), (250, 1)] {
        for tells_chains in [true, false] {
            let mut scene = Scene::new().await;
            let rename = |number| json!({ "membership": "join", "displayname": format!("Bob {number}") });
            let renamed =
                (0..count).map(|number| scene.there.add(BOB, "m.room.member", Some(BOB), rename(number)));
            let last = renamed.last().unwrap();
            scene.there.twist(move |kind, _, answer| match kind {
                "event_auth" if !tells_chains => (404, json!({})),
                _ => answer,
            });
            scene.net.take_arrived();
            let outcome = scene.come_with(&[&last], Silence::Waits).await.remove(0);
            assert!(accepted(&outcome), "{outcome:?}");
            let asked = scene.net.take_arrived();
            assert!(asked.len() < 80, "{asked:?}");
            let member = scene.alice.state(&scene.room, "m.room.member", BOB).await.1;
            assert_eq!(member, rename(count - 1));
            assert_eq!(scene.hole_count(), holes);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_whose_sender_was_renamed_often_is_taken_by_the_chain_of_what_allows_it() {
    let mut scene = Scene::new().await;
    let base = scene.there.heads.clone();
    for number in 0..40 {
        let content = json!({ "membership": "join", "displayname": format!("Bob {number}") });
        scene.there.add(BOB, "m.room.member", Some(BOB), content);
    }
    // It stands on what is known here, and is allowed by what is not.
    let renamed = scene.there.heads[0].clone();
    let mut known = scene.there.known(&base[0]);
    known.after.insert(("m.room.member".to_owned(), BOB.to_owned()), renamed);
    scene.there.put(&base[0], known);
    let said = scene.there.add_on(BOB, "m.room.message", None, json!({ "body": "hello" }), &base);
    scene.net.take_arrived();
    let outcome = scene.come_one(&said).await;
    assert!(accepted(&outcome), "{outcome:?}");
    assert!(scene.net.take_arrived().len() < 5);
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn what_the_state_of_a_liar_forbids_is_not_rejected_and_the_truth_lets_it_in() {
    let mut scene = Scene::new().await;
    scene.bob_says(300, "missed");
    let said = scene.there.say(BOB, "hello");
    let bob_joined = scene.there.known(&said).before[&("m.room.member".to_owned(), BOB.to_owned())].clone();
    scene.there.twist(move |kind, _, (status, mut answer)| {
        if let Some(ids) = answer["pdu_ids"].as_array_mut().filter(|_| kind == "state_ids") {
            ids.retain(|id| *id != json!(bob_joined));
        }
        (status, answer)
    });
    let outcome = scene.come_one(&said).await;
    assert!(unknown(&outcome), "{outcome:?}");
    assert_eq!(scene.hole_count(), 0);
    scene.there.untwist();
    // Too soon, nothing is fetched.
    scene.net.take_arrived();
    assert!(unknown(&scene.come_one(&said).await));
    assert!(!scene.net.take_arrived().iter().any(|line| line.contains("/state")));
    tokio::time::advance(Duration::from_secs(700)).await;
    let outcome = scene.come_one(&said).await;
    assert!(accepted(&outcome), "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn whoever_was_banned_here_does_not_come_back_by_a_state_that_is_fetched() {
    let mut scene = Scene::new().await;
    scene.bob_says(300, "missed");
    let said = scene.there.say(BOB, "I am still here");
    let ban = json!({ "user_id": BOB });
    scene.alice.ok_post(&format!("/rooms/{}/ban", scene.room), ban).await;
    let outcome = scene.come_one(&said).await;
    assert!(!accepted(&outcome), "{outcome:?}");
    assert_eq!(scene.alice.state(&scene.room, "m.room.member", BOB).await.1["membership"], "ban");
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn answers_without_sense_are_bounded_and_harmless() {
    let mut scene = Scene::new().await;
    scene.bob_says(30, "missed");
    let said = scene.there.say(BOB, "hello");
    let truth = scene.there.known(&said);
    let many: Vec<String> = (0..100_001).map(|number| format!("${number:043}")).collect();
    let nonsense = json!({ "type": "m.room.message", "room_id": "!other:b.example", "content": {} });
    let mut forged = truth.json.clone();
    forged["content"]["body"] = json!("forged");
    let mut elsewhere = truth.json.clone();
    elsewhere["room_id"] = json!("!other:b.example");
    type Answer = Box<dyn Fn(&str) -> (u16, Value) + Send>;
    let answers: Vec<Answer> = vec![
        Box::new(|_| (200, json!({}))),
        Box::new(|_| (200, json!([]))),
        Box::new(|_| (500, json!({}))),
        Box::new(|_| (403, json!({ "errcode": "M_FORBIDDEN", "error": "no" }))),
        Box::new(move |_| {
            let list = json!([nonsense.clone(), forged.clone(), elsewhere.clone(), null, 5, "x"]);
            (
                200,
                json!({ "events": list, "pdus": list, "auth_chain": list, "pdu_ids": [], "auth_chain_ids": [],
                "origin": "b.example", "origin_server_ts": 1 }),
            )
        }),
        Box::new(move |_| (200, json!({ "events": [], "pdu_ids": many, "auth_chain_ids": [] }))),
        Box::new(|_| {
            let few: Vec<String> = (0..4_000).map(|number| format!("$x{number:042}")).collect();
            (
                200,
                json!({ "events": [], "pdu_ids": few, "auth_chain_ids": few, "pdus": [], "auth_chain": [] }),
            )
        }),
    ];
    for answer in answers {
        scene.there.twist(move |kind, _, _| answer(kind));
        tokio::time::advance(Duration::from_secs(700)).await;
        scene.net.take_arrived();
        let outcome = scene.come_one(&said).await;
        assert!(unknown(&outcome), "{outcome:?}");
        let asked = scene.net.take_arrived().len();
        assert!(asked < 2_000, "{asked}");
    }
    assert_eq!(scene.hole_count(), 0);
    scene.there.untwist();
    assert!(accepted(&scene.come_one(&said).await));
}

/// Others give no state before an event that has no place with them. That after the one event before it is the same.
#[tokio::test(start_paused = true)]
async fn the_state_before_an_event_is_also_that_after_the_one_before_it() {
    let mut scene = Scene::new().await;
    scene.bob_says(2, "missed");
    let named = json!({ "membership": "join", "displayname": "Bobby" });
    let named = scene.there.add(BOB, "m.room.member", Some(BOB), named);
    scene.there.say(BOB, "low");
    let (newest, cited) = (scene.there.say(BOB, "newest"), named.clone());
    scene.there.twist(move |kind, id, answer| match kind {
        // One event of the gap comes, and no more.
        "get_missing_events" => {
            let mut answer = answer;
            answer.1["events"].as_array_mut().unwrap().retain(|event| event["content"]["body"] == "low");
            answer
        }
        "state_ids" if id == cited => answer,
        "state" | "state_ids" => (404, json!({ "errcode": "M_NOT_FOUND", "error": "no" })),
        _ => answer,
    });
    let outcome = scene.come_one(&newest).await;
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(scene.alice.state(&scene.room, "m.room.member", BOB).await.1["displayname"], "Bobby");
    assert_eq!(scene.hole_count(), 1);
    scene.there.untwist();
    assert!(scene.read_all(30).await.contains(&named));
    assert_eq!(scene.hole_count(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_its_own_auth_events_forbid_keeps_nothing_waiting_that_stands_on_it() {
    let mut scene = Scene::new().await;
    let missed = scene.bob_says(2, "missed");
    // Bob may not set power levels.
    let levels = scene.there.add(BOB, "m.room.power_levels", Some(""), json!({ "users": {} }));
    let mut known = scene.there.known(&levels);
    known.after = known.before.clone();
    scene.there.put(&levels, known);
    let newest = scene.there.say(BOB, "newest");
    scene.there.twist(move |kind, _, mut answer| {
        // It is the lowest event of the gap that comes.
        if kind == "get_missing_events" {
            let is_it = |event: &Value| event["type"] == "m.room.power_levels";
            answer.1["events"].as_array_mut().unwrap().retain(is_it);
        } else if kind == "event" {
            answer = (404, json!({ "errcode": "M_NOT_FOUND", "error": "no" }));
        }
        answer
    });
    let outcome = scene.come_one(&newest).await;
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(scene.hole_count(), 1);
    scene.there.untwist();
    let read = scene.read_all(30).await;
    assert_holds(&read, &missed);
    assert!(!read.contains(&levels));
    assert_eq!(scene.hole_count(), 0);
    let path = format!("/_matrix/client/v3/rooms/{}/event/{levels}", scene.room);
    assert_eq!(scene.alice.get(&path).await.0, http::StatusCode::NOT_FOUND);
}

#[tokio::test(start_paused = true)]
async fn a_gap_without_end_and_without_a_state_is_given_up() {
    let mut scene = Scene::new().await;
    let all = scene.bob_says(1_000, "missed");
    scene.there.twist(|kind, _, answer| match kind {
        "state_ids" | "state" => (404, json!({ "errcode": "M_NOT_FOUND", "error": "no" })),
        _ => answer,
    });
    scene.net.take_arrived();
    let outcome = scene.come_one(all.last().unwrap()).await;
    assert!(unknown(&outcome), "{outcome:?}");
    assert!(scene.net.take_arrived().len() < 50);
    assert_eq!(scene.hole_count(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_dead_or_never_answers_holds_nobody_up_for_long() {
    for weather in [Weather::Refuses, Weather::Silent] {
        let mut scene = Scene::new().await;
        let missed = scene.bob_says(300, "missed");
        let said = scene.there.say(BOB, "hello");
        let env = scene.there.app().env.clone();
        let began = env.uptime();
        scene.net.weather("5.0.0.2:8448", weather, Duration::ZERO);
        scene.net.weather("5.0.0.3:8448", weather, Duration::ZERO);
        assert!(unknown(&scene.come_one(&said).await));
        assert!(env.uptime() - began < Duration::from_secs(400), "{:?}", env.uptime() - began);
        scene.net.weather("5.0.0.2:8448", Weather::Fair, Duration::ZERO);
        tokio::time::advance(Duration::from_secs(7_200)).await;
        assert!(accepted(&scene.come_one(&said).await));
        scene.net.weather("5.0.0.2:8448", weather, Duration::ZERO);
        // The pages pass over what nobody gives, and have an end.
        let began = env.uptime();
        let read = scene.read_all(50).await;
        assert!(env.uptime() - began < Duration::from_secs(60), "{:?}", env.uptime() - began);
        assert!(read.contains(&said) && !read.contains(&missed[0]));
        assert!(!ids(&scene.page("", 100).await["chunk"]).is_empty());
        scene.net.weather("5.0.0.2:8448", Weather::Fair, Duration::ZERO);
        // Whatever is still asked for ends in vain, and then the hole is left alone for a while.
        scene.there.app().env.sleep(Duration::from_secs(3_600)).await;
        assert_holds(&scene.read_all(50).await, &missed);
    }
}

#[tokio::test(start_paused = true)]
async fn servers_whose_states_come_slowly_hold_up_no_state_of_others() {
    let mut scene = Scene::new().await;
    let missed = scene.bob_says(300, "missed");
    let app = scene.server.server().app();
    let mut slow = Vec::new();
    for user in 0..4 {
        let mallory = scene.server.register(&format!("mallory{user}")).await;
        for number in user * 5..user * 5 + 5 {
            let room = mallory.create(json!({ "preset": "public_chat", "room_version": "11" })).await;
            let (server, address) = (format!("s{number}.example"), format!("5.9.0.{}", number + 1));
            let eve = format!("@eve:{server}");
            let mut remote = Remote::new(app, &room);
            remote.user = eve.as_str().try_into().unwrap();
            remote.join().await;
            let mut there = Elsewhere::new(&scene.net, app, &room, &[(server.as_str(), address.as_str())]);
            there.say(&eve, "missed");
            let said = there.say(&eve, "hello");
            scene.net.weather(&format!("{address}:8448"), Weather::Silent, Duration::ZERO);
            slow.push((there, server, said));
        }
    }
    let come = slow.iter().map(|(there, server, said)| async move {
        let (origin, event) = (server.as_str().try_into().unwrap(), there.received(said));
        take_in(app, there.room, origin, vec![event], Silence::FetchesState).await.unwrap()
    });
    let honest = async {
        app.env.sleep(Duration::from_secs(25)).await;
        let began = app.env.uptime();
        let outcome = scene.come_one(missed.last().unwrap()).await;
        assert!(accepted(&outcome), "{outcome:?}");
        assert!(app.env.uptime() - began < Duration::from_secs(20), "{:?}", app.env.uptime() - began);
    };
    let (outcomes, ()) = tokio::join!(futures_util::future::join_all(come), honest);
    assert!(outcomes.iter().flatten().all(unknown), "{outcomes:?}");
    assert_eq!(scene.hole_count(), 1);
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn two_holes_are_filled_each_once() {
    let mut scene = Scene::new().await;
    let mut all = scene.bob_says(300, "first");
    assert!(accepted(&scene.come_one(all.last().unwrap()).await));
    tokio::time::advance(Duration::from_secs(700)).await;
    all.extend(scene.bob_says(300, "second"));
    assert!(accepted(&scene.come_one(all.last().unwrap()).await));
    assert_eq!(scene.hole_count(), 2);
    assert_holds(&scene.read_all(100).await, &all);
    assert_eq!(scene.hole_count(), 0);
    assert_holds(&scene.read_all(7).await, &all);
}

#[tokio::test(start_paused = true)]
async fn what_is_missing_in_a_hole_and_comes_by_itself_goes_into_the_past() {
    let mut scene = Scene::new().await;
    let all = scene.bob_says(400, "missed");
    assert!(accepted(&scene.come_one(all.last().unwrap()).await));
    let (_, since) = scene.sync("").await;
    // The newest 201 events came, and the hole below them names the next one.
    let outcome = scene.come_one(&all[198]).await;
    assert!(matches!(outcome, Outcome::Known(_)), "{outcome:?}");
    assert_eq!(scene.hole_count(), 0);
    let (nothing, _) = scene.sync(&since).await;
    assert!(nothing.is_null(), "{nothing}");
    assert_holds(&scene.read_all(100).await, &all);
}

#[tokio::test(start_paused = true)]
async fn servers_that_have_nobody_in_the_room_hold_it_up_for_nobody_and_have_nobody_else_asked() {
    let mut scene = Scene::new().await;
    let eve = Peer::new(&scene.net, "evil.example", "5.6.6.6", 66);
    let mut remote = Remote::new(scene.server.server().app(), &scene.room);
    remote.user = "@eve:evil.example".try_into().unwrap();
    let unknown = |number: usize| ruma::OwnedEventId::try_from(format!("${number:0>43}")).unwrap();
    // Their keys are known, and then they never answer.
    let (_, first) = eve.event(&remote, "m.room.message", None, json!({ "body": "x" }), &[unknown(0)]);
    eve.transact(&scene.server, "first", &[first], &[]).await;
    scene.net.weather("5.6.6.6:8448", Weather::Silent, Duration::ZERO);
    scene.net.take_arrived();
    // Nobody knows what allows these events, so that they wait.
    let unallowed = |peer: &Peer, remote: &Remote, number: usize| {
        let content = json!({ "body": number });
        let (_, mut event) = peer.event(remote, "m.room.message", None, content, &[unknown(number)]);
        event["auth_events"].as_array_mut().unwrap().push(json!(unknown(10_000 + number)));
        peer.sign_event(&event, "11").1
    };
    for txn in 0..8 {
        let events: Vec<Value> =
            (0..50).map(|number| unallowed(&eve, &remote, 1 + txn * 50 + number)).collect();
        eve.transact(&scene.server, &format!("t{txn}"), &events, &[]).await;
    }
    let staged = || {
        let snapshot = scene.server.server().app().store.snapshot();
        schema::INBOUND_EVENT.prefix::<()>(&*snapshot, (), Direction::Up).unwrap().count()
    };
    assert_eq!(staged(), 20, "one that nobody knows has a part of what those may have");
    let fay = Peer::new(&scene.net, "fay.example", "5.6.6.7", 67);
    remote.user = "@fay:fay.example".try_into().unwrap();
    fay.transact(&scene.server, "first", &[unallowed(&fay, &remote, 900)], &[]).await;
    assert_eq!(staged(), 21, "and keeps nobody else out");
    // Bob says something after a gap, which his server fills at once.
    let mut said = scene.bob_says(5, "behind a gap");
    let newest = said.pop().unwrap();
    let began = scene.server.server().app().env.uptime();
    let outcome = scene.come_one(&newest).await;
    assert!(accepted(&outcome), "{outcome:?}");
    let took = scene.server.server().app().env.uptime() - began;
    assert!(took < Duration::from_secs(2), "{took:?}");
    // Nobody else was asked for what the strangers' events name.
    scene.server.server().app().env.sleep(Duration::from_secs(3_600)).await;
    let asked = scene.net.take_arrived();
    let named = |line: &&String| {
        let is_own = line.starts_with("evil.example@") || line.starts_with("fay.example@");
        let names = ["/event/%240", "/event/$0", "/state"];
        !is_own && names.iter().any(|name| line.contains(name))
    };
    assert_eq!(asked.iter().filter(named).count(), 0, "{asked:?}");
}
