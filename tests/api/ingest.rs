//! Events of another server, and what our clients notice of them.

use std::{sync::mpsc, time::Duration};

use aqueduct::{
    env::Long,
    flows::room::ingest,
    rooms::change::{Outcome, Received},
    store::{Durability, Engine, Store, engine::Memory},
};
use http::StatusCode;
use ruma::OwnedEventId;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::{
    rooms::Rooms,
    support::{TestClient, TestServer, remote::Remote},
};

fn accepted(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Accepted(_))
}

/// A public room of Alice's that Bob of another server has joined; `more` stands beside the preset.
pub(crate) async fn shared_room(alice: &TestClient, more: Value) -> (String, Remote) {
    let mut body = json!({ "preset": "public_chat" });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let room = alice.create(body).await;
    let bob = Remote::new(alice.server.server().app(), &room);
    bob.join().await;
    (room, bob)
}

/// Sets this many pieces of state, which nobody asks about.
async fn set_many(alice: &TestClient, room: &str, count: usize) {
    for number in 0..count {
        alice.ok_put(&format!("/rooms/{room}/state/org.example.thing/{number}"), json!({ "n": 1 })).await;
    }
}

/// Bob says something on each of these, which are none of the room's heads.
async fn speak_on_each(bob: &Remote, places: &[OwnedEventId]) -> Vec<Outcome> {
    let events: Vec<Received> =
        places.iter().map(|place| bob.message("fork", std::slice::from_ref(place))).collect();
    ingest::ingest(&bob.app, bob.room, events).await.unwrap()
}

/// Alice sends this many messages; answers their ids.
async fn say_many(alice: &TestClient, room: &str, count: usize) -> Vec<OwnedEventId> {
    let mut places = Vec::new();
    for number in 0..count {
        places.push(alice.say(room, &format!("place{number}"), "here").await.try_into().unwrap());
    }
    places
}

async fn everything(alice: &TestClient, room: &str) -> String {
    let sync = alice.ok_get("/sync").await;
    let messages = alice.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=1000")).await;
    let state = alice.ok_get(&format!("/rooms/{room}/state")).await;
    format!("{sync} {messages} {state}")
}

#[tokio::test(start_paused = true)]
async fn a_message_from_elsewhere_wakes_counts_and_is_shown() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let (room, bob) = shared_room(&alice, json!({})).await;
    let since = alice.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
    let path = format!("/sync?since={since}&timeout=20000");
    // The poll waits before anything comes in.
    let (sync, outcome) = tokio::join!(alice.ok_get(&path), bob.send(bob.message("hello", &bob.heads())));
    assert!(accepted(&outcome));
    let joined = &sync["rooms"]["join"][&room];
    assert_eq!(joined["timeline"]["events"][0]["content"]["body"], "hello");
    assert_eq!(joined["timeline"]["events"][0]["sender"], "@bob:b.example");
    assert_eq!(joined["unread_notifications"]["notification_count"], 1);
}

#[tokio::test(start_paused = true)]
async fn a_list_is_judged_in_its_order_and_what_is_missing_is_named() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let (_, bob) = shared_room(&alice, json!({})).await;
    let mut events = Vec::new();
    let mut prev = bob.heads();
    // Each event stands on the one before, and there are more than one turn takes. All are built before any of them is known.
    for number in 0..25 {
        let event = bob.message(&number.to_string(), &prev);
        prev = vec![event.id().to_owned()];
        events.push(event);
    }
    let last = events[24].clone();
    let outcomes = ingest::ingest(&bob.app, bob.room, vec![last.clone()]).await.unwrap();
    assert!(matches!(&outcomes[0], Outcome::Need { prev, .. } if prev.len() == 1), "{outcomes:?}");
    let outcomes = ingest::ingest(&bob.app, bob.room, events).await.unwrap();
    assert_eq!(outcomes.len(), 25);
    assert!(outcomes.iter().all(accepted), "{outcomes:?}");
    assert_eq!(bob.heads(), [last.id()]);
    let again = ingest::ingest(&bob.app, bob.room, vec![last.clone(); 2]).await.unwrap();
    assert!(again.iter().all(|outcome| matches!(outcome, Outcome::Known(_))), "{again:?}");
    assert!(ingest::ingest(&bob.app, bob.room, vec![last; ingest::EVENTS_MAX + 1]).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn more_than_ten_heads_end_as_one_by_an_event_that_clients_never_see() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let (room, bob) = shared_room(&alice, json!({})).await;
    let places = say_many(&alice, &room, 12).await;
    assert!(speak_on_each(&bob, &places[..9]).await.iter().all(accepted));
    assert_eq!(bob.heads().len(), 10, "nine of Bob's and Alice's last");
    let since = alice.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
    let before = everything(&alice, &room).await;
    assert!(speak_on_each(&bob, &places[9..11]).await.iter().all(accepted));
    let heads = bob.heads();
    assert_eq!(heads.len(), 1);
    let text = everything(&alice, &room).await;
    assert!(before.matches("fork").count() < text.matches("fork").count());
    for shown in [&text, &alice.ok_get(&format!("/sync?since={since}")).await.to_string()] {
        assert!(!shown.contains("dummy_event") && !shown.contains(heads[0].as_str()), "{shown}");
    }
    let merge = &heads[0];
    for path in [format!("/event/{merge}"), format!("/context/{merge}"), format!("/relations/{merge}")] {
        let (status, json) = alice.get(&format!("/_matrix/client/v3/rooms/{room}{path}")).await;
        assert!(status.is_client_error(), "{path}: {status} {json}");
    }
    let sync = alice.ok_get("/sync").await;
    assert_eq!(sync["rooms"]["join"][&room]["unread_notifications"]["notification_count"], 11);
    // It is an event of the room all the same: the next ones stand on it.
    alice.say(&room, "after", "after").await;
    assert_eq!(bob.heads().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_merge_of_another_server_is_not_shown_either() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let (room, bob) = shared_room(&alice, json!({})).await;
    let root = alice.say(&room, "root", "root").await;
    let content = json!({ "m.relates_to": { "rel_type": "m.thread", "event_id": root }, "body": "hidden" });
    let merge = bob.event("org.matrix.dummy_event", None, content, &bob.heads());
    assert!(accepted(&bob.send(merge).await));
    let text = everything(&alice, &room).await;
    assert!(text.contains("root") && !text.contains("hidden") && !text.contains("m.thread"), "{text}");
    let threads = format!("/_matrix/client/v1/rooms/{room}/threads");
    let (status, json) = alice.get(&threads).await;
    assert_eq!((status, json["chunk"].as_array().unwrap().len()), (StatusCode::OK, 0), "{json}");
}

#[tokio::test(start_paused = true)]
async fn a_head_whose_state_is_far_away_is_merged_at_once() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let (room, bob) = shared_room(&alice, json!({})).await;
    let old = bob.heads();
    set_many(&alice, &room, 1_001).await;
    assert!(accepted(&bob.send(bob.message("from long ago", &old)).await));
    assert_eq!(bob.heads().len(), 1);
    let (_, content) = alice.state(&room, "org.example.thing", "1000").await;
    assert_eq!(content["n"], 1);
    let figures = bob.app.metrics.text();
    assert!(!figures.contains("aqueduct_state_resolutions_total 0"), "{figures}");
    assert!(figures.contains(r#"aqueduct_cache_hits_total{cache="resolutions"}"#), "{figures}");
}

#[tokio::test(start_paused = true)]
async fn without_anybody_who_may_send_heads_stay_until_somebody_may() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let levels = json!({ "users": { &alice.user_id: 100, "@bob:b.example": 100 }, "events_default": 50 });
    let (room, bob) =
        shared_room(&alice, json!({ "room_version": "11", "power_level_content_override": levels })).await;
    let places = say_many(&alice, &room, 14).await;
    let set = |level: u64| json!({ "users": { &alice.user_id: level, "@bob:b.example": 100 }, "events_default": 50 });
    alice.ok_put(&format!("/rooms/{room}/state/m.room.power_levels"), set(0)).await;
    assert!(speak_on_each(&bob, &places[..12]).await.iter().all(accepted));
    assert_eq!(bob.heads().len(), 13);
    // Bob gives Alice her level back, on one of the heads: they are as many as before.
    let event = bob.event("m.room.power_levels", Some(""), set(60), &bob.heads()[..1]);
    assert!(accepted(&bob.send(event).await));
    assert_eq!(bob.heads().len(), 1, "the next event asks for it again");
}

/// Bob under another name, on the room's heads.
fn renamed(bob: &Remote, name: &str) -> Received {
    let content = json!({ "membership": "join", "displayname": name });
    bob.event("m.room.member", Some(bob.user.as_str()), content, &bob.heads())
}

#[tokio::test(start_paused = true)]
async fn a_state_is_not_turned_back_by_a_question_of_another_turn() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let (room, bob) = shared_room(&alice, json!({})).await;
    let old = bob.heads();
    set_many(&alice, &room, 300).await;
    for name in ["one", "two"] {
        // A second passes, because the later of two settings of one key wins where nothing else decides.
        bob.app.env.sleep(Duration::from_secs(1)).await;
        // The room's state moves on before each round, in a way that only its newest place knows.
        alice.ok_put(&format!("/rooms/{room}/state/m.room.name"), json!({ "name": name })).await;
        let first = renamed(&bob, name);
        let second = bob.message(name, &[first.id().to_owned(), old[0].clone()]);
        let outcomes = ingest::ingest(&bob.app, bob.room, vec![first, second]).await.unwrap();
        assert!(outcomes.iter().all(accepted), "{outcomes:?}");
        assert_eq!(alice.state(&room, "m.room.member", bob.user.as_str()).await.1["displayname"], name);
        assert_eq!(alice.state(&room, "m.room.name", "").await.1["name"], name);
    }
}

#[tokio::test(start_paused = true)]
async fn a_far_event_gets_in_while_the_state_of_the_room_keeps_changing() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let (room, bob) = shared_room(&alice, json!({})).await;
    let old = bob.heads();
    set_many(&alice, &room, 300).await;
    let far = bob.message("far", &old);
    let busy = async {
        for number in 0..60 {
            let path = format!("/rooms/{room}/state/org.example.thing/x");
            alice.ok_put(&path, json!({ "n": number })).await;
        }
    };
    let (outcome, ()) = tokio::join!(bob.send(far), busy);
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(alice.state(&room, "org.example.thing", "x").await.1["n"], 59);
}

#[tokio::test(start_paused = true)]
async fn what_stands_on_a_rejected_event_replaces_the_head_below_it() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let (_, bob) = shared_room(&alice, json!({})).await;
    let rejected = bob.event("m.room.name", Some(""), json!({ "name": "mine" }), &bob.heads());
    let rejected_id = rejected.id().to_owned();
    assert!(matches!(bob.send(rejected).await, Outcome::Aside(..)));
    let after = bob.message("after", &[rejected_id]);
    let after_id = after.id().to_owned();
    assert!(accepted(&bob.send(after).await));
    assert_eq!(bob.heads(), [after_id]);
}

#[tokio::test(start_paused = true)]
async fn an_event_that_takes_a_thousand_out_of_the_room_is_accepted() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let levels = json!({ "users": { &alice.user_id: 100, "@bob:b.example": 100 } });
    let (room, bob) =
        shared_room(&alice, json!({ "room_version": "11", "power_level_content_override": levels })).await;
    let old = bob.heads();
    let mut prev = bob.heads();
    for part in 0..21 {
        let mut events = Vec::new();
        for number in 0..50 {
            let user = format!("@raider{}:c.example", part * 50 + number);
            let raider =
                Remote { app: bob.app.clone(), room: bob.room, user: user.as_str().try_into().unwrap() };
            let join = json!({ "membership": "join" });
            let event = raider.event("m.room.member", Some(&user), join, &prev);
            prev = vec![event.id().to_owned()];
            events.push(event);
        }
        let outcomes = ingest::ingest(&bob.app, bob.room, events).await.unwrap();
        assert!(outcomes.iter().all(accepted), "{outcomes:?}");
    }
    // Bob closed the door before, on the other side of a partition.
    bob.app.env.sleep(Duration::from_secs(5)).await;
    let close = bob.event("m.room.join_rules", Some(""), json!({ "join_rule": "invite" }), &old);
    let after = bob.message("after", &[close.id().to_owned()]);
    assert!(accepted(&bob.send(close).await));
    assert!(accepted(&bob.send(after).await), "what follows is accepted, too");
    assert_eq!(alice.state(&room, "m.room.join_rules", "").await.1["join_rule"], "invite");
    let members = alice.ok_get(&format!("/rooms/{room}/joined_members")).await;
    assert_eq!(members["joined"].as_object().unwrap().len(), 2);
    alice.say(&room, "end", "it goes on").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_takes_long_to_resolve_holds_nobody_up() {
    let server = TestServer::real(|_| {});
    let alice = server.register("alice").await;
    let (room, bob) = shared_room(&alice, json!({})).await;
    let other_room = alice.create(json!({})).await;
    let old = bob.heads();
    set_many(&alice, &room, 300).await;
    // All threads for resolutions are taken, so no resolution gets through.
    let (threads, _) = Long::Resolution.bounds();
    let app = bob.app.clone();
    let (holding, held) = mpsc::channel();
    let mut releases = Vec::new();
    for _ in 0..threads {
        let (release, released) = mpsc::channel::<()>();
        let (env, holding) = (app.env.clone(), holding.clone());
        app.env.spawn(async move {
            let hold = move || {
                holding.send(()).unwrap();
                let _ = released.recv();
                Ok(())
            };
            env.blocking_long(Long::Resolution, hold).await.unwrap();
        });
        releases.push(release);
    }
    let all_held = move || {
        (0..threads).for_each(|_| held.recv().unwrap());
        Ok(())
    };
    app.env.blocking(all_held).await.unwrap();

    let far = bob.message("from long ago", &old);
    let far_id = far.id().to_owned();
    let (taking, num) = (app.clone(), bob.room);
    let (ended, mut end) = oneshot::channel();
    let free = app.rooms.resolutions_waiting().available_permits();
    app.env.spawn(async move {
        ended.send(ingest::ingest(&taking, num, vec![far]).await.unwrap()).unwrap();
    });
    while app.rooms.resolutions_waiting().available_permits() == free {
        assert!(end.try_recv().is_err(), "nothing had to be worked out beside the room");
        tokio::task::yield_now().await;
    }
    // Meanwhile everybody goes on: in this room, in others, from here and from elsewhere.
    alice.say(&room, "meanwhile", "meanwhile").await;
    alice.ok_put(&format!("/rooms/{room}/state/m.room.name"), json!({ "name": "moved" })).await;
    alice.say(&other_room, "elsewhere", "elsewhere").await;
    assert!(accepted(&bob.send(bob.message("near", &bob.heads())).await));
    assert!(end.try_recv().is_err());
    assert!(!bob.heads().contains(&far_id));

    drop(releases);
    let outcomes = end.await.unwrap();
    assert!(accepted(&outcomes[0]), "the heads moved meanwhile, so it was asked again: {outcomes:?}");
    let (_, name) = alice.state(&room, "m.room.name", "").await;
    assert_eq!(name["name"], "moved");
    let messages = alice.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=3")).await;
    assert!(messages.to_string().contains("from long ago"));
    app.env.kill();
}

/// A room in which everybody may set the state that [`set_many`] sets.
fn all_may_set_things() -> Value {
    json!({ "power_level_content_override": { "events": { "org.example.thing": 0 } } })
}

/// Bob changes the state on a place so far back that his event stands apart; answers the event's id.
async fn branch_off(bob: &Remote, key: &str, place: &OwnedEventId) -> OwnedEventId {
    let event =
        bob.event("org.example.thing", Some(key), json!({ "n": "bob's" }), std::slice::from_ref(place));
    let id = event.id().to_owned();
    assert!(accepted(&bob.send(event).await));
    id
}

#[tokio::test(start_paused = true)]
async fn events_that_cite_states_far_apart_keep_their_distance() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let (room, bob) = shared_room(&alice, all_may_set_things()).await;
    let old = bob.heads().remove(0);
    set_many(&alice, &room, 1_010).await;
    let near = bob.heads().remove(0);
    let first = branch_off(&bob, "first", &old).await;
    let second = branch_off(&bob, "second", &first).await;
    let third = branch_off(&bob, "third", &second).await;
    let citing = |branch: &OwnedEventId| bob.message("both", &[near.clone(), branch.clone()]);
    assert!(accepted(&bob.send(citing(&second)).await), "one is resolved at once");
    let next = citing(&third);
    assert!(matches!(bob.send(next.clone()).await, Outcome::Unknown), "the next one waits");
    alice.say(&room, "meanwhile", "the room goes on").await;
    bob.app.env.sleep(Duration::from_secs(601)).await;
    assert!(accepted(&bob.send(next).await));
}

#[tokio::test(start_paused = true)]
async fn branches_that_stand_apart_are_reunited_after_a_restart() {
    let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
    let server = TestServer::over(store.clone(), |_| {});
    let alice = server.register("alice").await;
    let (room, bob) = shared_room(&alice, all_may_set_things()).await;
    let old = bob.heads().remove(0);
    set_many(&alice, &room, 1_010).await;
    let first = branch_off(&bob, "first", &old).await;
    // The reunion of the second event has to wait, because the first had one just now.
    branch_off(&bob, "second", &first).await;
    let path = "org.example.thing";
    assert_eq!(alice.state(&room, path, "first").await.1["n"], "bob's");
    assert_eq!(alice.state(&room, path, "second").await.0, StatusCode::NOT_FOUND);
    bob.app.env.kill();
    let restarted = TestServer::over(store, |_| {});
    let alice = TestClient { server: restarted.clone(), ..alice };
    assert_eq!(alice.state(&room, path, "second").await.0, StatusCode::NOT_FOUND);
    restarted.server().app().env.sleep(Duration::from_secs(600)).await;
    assert_eq!(alice.state(&room, path, "second").await.1["n"], "bob's");
}
