//! `src/sync/streams/sticky.rs`, `src/rooms/sticky.rs`: sticky events (MSC4354).

use std::time::Duration;

use aqueduct::rooms::change::Outcome;
use federation::testing::Weather;
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    ingest::shared_room,
    rooms::Rooms,
    support::{TestClient, TestServer, encoded, federated::Federated},
    sync::{Chain, env, events, must, room_of_two, say, set_state},
};

pub(crate) const MINUTE_MS: u64 = 60_000;

/// Sends an event that is sticky for some time.
pub(crate) async fn stick(client: &TestClient, room: &str, name: &str, for_ms: u64) -> String {
    let path =
        format!("/rooms/{room}/send/m.test/{}?org.matrix.msc4354.sticky_duration_ms={for_ms}", encoded(name));
    client.ok_put(&path, json!({ "body": name })).await["event_id"].as_str().unwrap().to_owned()
}

fn names(events: &[&Value]) -> Vec<String> {
    events.iter().filter_map(|event| event["content"]["body"].as_str().map(str::to_owned)).collect()
}

/// The sticky events beside the timeline.
fn sticky(sync: &Value, room: &str) -> Vec<String> {
    names(&events(sync, "join", room, "msc4354_sticky"))
}

fn shown(sync: &Value, room: &str) -> Vec<String> {
    names(&events(sync, "join", room, "timeline"))
}

async fn sleep(server: &TestServer, seconds: u64) {
    env(server).sleep(Duration::from_secs(seconds)).await;
}

/// A sync whose timelines have one event.
fn short(client: &TestClient) -> Chain {
    Chain::filtered(client, json!({ "room": { "timeline": { "limit": 1 } } }))
}

#[tokio::test(start_paused = true)]
async fn a_sticky_event_is_told_once_wherever_the_timeline_ends() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let mut chain = short(&bob);
    chain.next().await;
    let one = stick(&alice, &room, "one", 10 * MINUTE_MS).await;
    stick(&alice, &room, "two", 10 * MINUTE_MS).await;
    say(&alice, &room, "not sticky").await;
    sleep(&server, 60).await;
    let told = chain.next().await;
    assert_eq!(shown(&told, &room), ["not sticky"]);
    assert_eq!(sticky(&told, &room), ["one", "two"]);
    let event = events(&told, "join", &room, "msc4354_sticky")[0].clone();
    assert_eq!(event["event_id"], one);
    assert_eq!(event["msc4354_sticky"], json!({ "duration_ms": 10 * MINUTE_MS }));
    let left = event["unsigned"]["msc4354_sticky_duration_ttl_ms"].as_u64().unwrap();
    assert!((530_000..=541_000).contains(&left), "{left}");
    // It is told once, and what the timeline shows is not told beside it.
    stick(&alice, &room, "three", MINUTE_MS).await;
    let told = chain.next().await;
    assert_eq!((shown(&told, &room), sticky(&told, &room)), (vec!["three".to_owned()], vec![]));
    say(&alice, &room, "on").await;
    assert_eq!(sticky(&chain.next().await, &room), Vec::<String>::new());
    // A client that begins, and a user who joins, are told all that are sticky then.
    let begins = short(&bob).next().await;
    assert_eq!(sticky(&begins, &room), ["one", "two", "three"]);
    let carol = server.register("carol").await;
    let mut of_carol = short(&carol);
    of_carol.next().await;
    must(&carol, &room, "join", json!({})).await;
    assert_eq!(sticky(&of_carol.next().await, &room), ["one", "two", "three"]);
    assert_eq!(sticky(&of_carol.next().await, &room), Vec::<String>::new());
    sleep(&server, 61).await;
    assert_eq!(sticky(&short(&bob).next().await, &room), ["one", "two"], "the third has expired");
    // By other ways they are as sticky.
    let event = bob.ok_get(&format!("/rooms/{room}/event/{}", encoded(&one))).await;
    assert_eq!(event["msc4354_sticky"]["duration_ms"], 10 * MINUTE_MS);
    server.assert_whole();
    sleep(&server, 3 * 60 * 60).await;
    assert_eq!(sticky(&short(&bob).next().await, &room), Vec::<String>::new());
    let rows = server.assert_whole();
    assert!(rows.iter().all(|(name, count)| !name.starts_with("STICKY") || *count == 0), "{rows:?}");
}

#[tokio::test(start_paused = true)]
async fn filters_and_visibility_withhold_none_and_redactions_and_ignoring_do() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    set_state(&alice, &room, "m.room.history_visibility", "", json!({ "history_visibility": "joined" }))
        .await;
    stick(&alice, &room, "kept", 10 * MINUTE_MS).await;
    let redacted = stick(&alice, &room, "redacted", 10 * MINUTE_MS).await;
    let carol = server.register("carol").await;
    must(&carol, &room, "join", json!({})).await;
    let nothing = json!({ "room": { "timeline": { "types": ["m.none"] }, "state": { "types": [] } } });
    let told = Chain::filtered(&carol, nothing.clone()).next().await;
    assert_eq!(sticky(&told, &room), ["kept", "redacted"], "from before she came");
    let mut chain = Chain::filtered(&carol, nothing);
    chain.next().await;
    stick(&bob, &room, "of bob", MINUTE_MS).await;
    assert_eq!(sticky(&chain.next().await, &room), ["of bob"], "the filter left it out of the timeline");
    alice.ok_put(&format!("/rooms/{room}/redact/{}/1", encoded(&redacted)), json!({})).await;
    let ignored = json!({ "ignored_users": { "@bob:test.example": {} } });
    let path = format!("/user/{}/account_data/m.ignored_user_list", carol.user_id);
    carol.ok_put(&path, ignored).await;
    say(&alice, &room, "on").await;
    assert_eq!(sticky(&short(&carol).next().await, &room), ["kept"]);
    let shown = alice.ok_get(&format!("/rooms/{room}/event/{}", encoded(&redacted))).await;
    assert_eq!(shown.get("msc4354_sticky"), None, "{shown}");
    must(&carol, &room, "leave", json!({})).await;
    stick(&alice, &room, "after her", MINUTE_MS).await;
    let told = short(&carol).next().await.to_string();
    assert!(!told.contains("after her"), "{told}");
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn state_can_be_sticky_and_durations_are_bounded() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let path = |ms: &str| format!("/rooms/{room}/state/m.test/k?org.matrix.msc4354.sticky_duration_ms={ms}");
    let first = alice.ok_put(&path("60000"), json!({ "body": "same" })).await;
    let second = alice.ok_put(&path("60000"), json!({ "body": "same" })).await;
    assert_ne!(first["event_id"], second["event_id"], "to say the same again makes it stick for longer");
    say(&alice, &room, "on").await;
    assert_eq!(sticky(&short(&bob).next().await, &room), ["same", "same"]);
    for ms in ["3600001", "18446744073709551616", "-1", "1.5", "", "an%20hour"] {
        let (status, json) = alice.put(&format!("/_matrix/client/v3{}", path(ms)), json!({})).await;
        assert_eq!(
            (status, json["errcode"].as_str()),
            (StatusCode::BAD_REQUEST, Some("M_INVALID_PARAM")),
            "{ms}"
        );
    }
    stick(&alice, &room, "for no time", 0).await;
    stick(&alice, &room, "the longest", 3_600_000).await;
    say(&alice, &room, "on and on").await;
    assert_eq!(sticky(&short(&bob).next().await, &room), ["same", "same", "the longest"]);
    // Clients cannot say it beside the content in another way.
    let sent = alice
        .ok_put(&format!("/rooms/{room}/send/m.test/9"), json!({ "msc4354_sticky": { "duration_ms": 5 } }))
        .await;
    let id = encoded(sent["event_id"].as_str().unwrap());
    assert_eq!(alice.ok_get(&format!("/rooms/{room}/event/{id}")).await.get("msc4354_sticky"), None);
    let features = alice.ok_get("/_matrix/client/versions").await;
    assert_eq!(features["unstable_features"]["org.matrix.msc4354"], true);
}

#[tokio::test(start_paused = true)]
async fn a_delayed_event_is_sticky_from_when_it_is_sent() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let path = format!(
        "/rooms/{room}/send/m.test/1?org.matrix.msc4354.sticky_duration_ms=60000&org.matrix.msc4140.delay=120000"
    );
    alice.ok_put(&path, json!({ "body": "later" })).await;
    sleep(&server, 125).await;
    say(&alice, &room, "on").await;
    assert_eq!(sticky(&short(&bob).next().await, &room), ["later"]);
}

#[tokio::test(start_paused = true)]
async fn many_are_told_over_several_answers_and_one_sender_has_a_bounded_number() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let carol = server.register("carol").await;
    must(&carol, &room, "join", json!({})).await;
    let mut expected = Vec::new();
    let mut chain = short(&bob);
    chain.next().await;
    for number in 0..110 {
        for (client, name) in [(&alice, "a"), (&bob, "b"), (&carol, "c")] {
            let name = format!("{name}{number}");
            stick(client, &room, &name, 60 * MINUTE_MS).await;
            if number >= 10 {
                expected.push(name);
            }
        }
    }
    say(&alice, &room, "on").await;
    for mut chain in [chain, short(&bob)] {
        let mut told = Vec::new();
        let first = chain.next().await;
        told.extend(sticky(&first, &room));
        assert_eq!(told.len(), 200);
        // The poll is answered at once, because some are left.
        let second = chain.next_within(100_000).await;
        told.extend(sticky(&second, &room));
        assert_eq!(told, expected);
        assert!(!chain.since.as_ref().unwrap().contains("_k"));
        assert_eq!(sticky(&chain.next().await, &room), Vec::<String>::new());
    }
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn what_was_soft_failed_is_let_in_when_its_sender_comes_back() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let (room, bob) = shared_room(&alice, json!({ "room_version": "11", "preset": "public_chat" })).await;
    let mut chain = short(&alice);
    chain.next().await;
    let prev = bob.heads();
    let lasting = bob.sticky("lasting", 30 * MINUTE_MS, &prev);
    let brief = bob.sticky("brief", MINUTE_MS, &prev);
    let plain = bob.event("m.test", None, json!({ "body": "plain" }), &prev);
    must(&alice, &room, "kick", json!({ "user_id": "@bob:b.example" })).await;
    for event in [lasting, brief, plain] {
        assert!(matches!(bob.send(event).await, Outcome::Aside(..)));
    }
    sleep(&server, 120).await;
    let told = chain.next().await.to_string();
    assert!(!told.contains("lasting"), "{told}");
    bob.join().await;
    sleep(&server, 3).await;
    say(&alice, &room, "on").await;
    let told = chain.next().await;
    assert_eq!(sticky(&told, &room), ["lasting"], "the others are not sticky, or not any more");
    let event = events(&told, "join", &room, "msc4354_sticky")[0].clone();
    let left = event["unsigned"]["msc4354_sticky_duration_ttl_ms"].as_u64().unwrap();
    assert!(left <= 28 * MINUTE_MS, "it is sticky since it came first: {left}");
    let page = alice.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=50")).await.to_string();
    assert!(page.contains("lasting") && !page.contains("brief") && !page.contains("plain"), "{page}");
    server.assert_whole();
    sleep(&server, 3 * 60 * 60).await;
    let rows = server.assert_whole();
    assert!(rows.iter().all(|(name, count)| !name.starts_with("STICKY") || *count == 0), "{rows:?}");
}

#[tokio::test(start_paused = true)]
async fn another_server_is_told_what_is_sticky_when_it_comes_in_and_after_it_was_away() {
    let federated = Federated::new(&["a.example", "b.example"]);
    let (here, there) = (federated.server(0), federated.server(1));
    let (alice, bob) = (here.register("alice").await, there.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    stick(&alice, &room, "before", 30 * MINUTE_MS).await;
    stick(&alice, &room, "expired", 1_000).await;
    sleep(here, 5).await;
    for number in 0..30 {
        say(&alice, &room, &number.to_string()).await;
    }
    bob.ok_post(&format!("/join/{room}?via=a.example"), json!({})).await;
    sleep(here, 30).await;
    say(&alice, &room, "after").await;
    sleep(here, 5).await;
    let told = short(&bob).next().await;
    assert_eq!(sticky(&told, &room), ["before"]);
    // While the other server is away so much happens that it is not told all of it.
    federated.weather(1, Weather::Refuses, Duration::ZERO);
    stick(&alice, &room, "missed", 30 * MINUTE_MS).await;
    for number in 0..250 {
        say(&alice, &room, &format!("more {number}")).await;
    }
    sleep(here, 10).await;
    federated.weather(1, Weather::Fair, Duration::ZERO);
    sleep(here, 5 * 60).await;
    let told = short(&bob).next().await;
    assert_eq!(sticky(&told, &room), ["before", "missed"]);
    here.assert_whole();
    there.assert_whole();
}
