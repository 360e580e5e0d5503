//! For how long messages are kept (MSC1763).

use std::time::Duration;

use aqueduct::{ids::RoomNum, schema, store::Direction};
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    ingest::shared_room,
    rooms::Rooms,
    support::{TestClient, TestServer, encoded, room_num},
};

const DAY_MS: u64 = 24 * 60 * 60 * 1000;

async fn later(server: &TestServer, ms: u64) {
    tokio::time::advance(Duration::from_millis(ms)).await;
    server.server().app().env.sleep(Duration::from_secs(3)).await;
}

async fn keep_for(who: &TestClient, room: &str, ms: impl Into<Value>) {
    let content = json!({ "max_lifetime": ms.into() });
    who.ok_put(&format!("/rooms/{room}/state/m.room.retention/"), content).await;
}

async fn status(who: &TestClient, room: &str, event: &str) -> StatusCode {
    who.get(&format!("/_matrix/client/v3/rooms/{room}/event/{}", encoded(event))).await.0
}

/// The texts that a client reads in a room, oldest first.
async fn texts(who: &TestClient, room: &str) -> Vec<String> {
    let page = who.ok_get(&format!("/rooms/{room}/messages?dir=f&limit=1000")).await;
    let events = page["chunk"].as_array().unwrap().iter();
    events.filter_map(|event| event["content"]["body"].as_str().map(str::to_owned)).collect()
}

/// Whether any row of the room's timeline holds this text.
fn is_stored(server: &TestServer, room: RoomNum, text: &str) -> bool {
    let snapshot = server.server().app().store.snapshot();
    let rows = schema::TIMELINE.prefix::<(RoomNum,)>(&*snapshot, (room,), Direction::Up).unwrap();
    let originals =
        schema::REDACTED_ORIGINAL.prefix::<(RoomNum,)>(&*snapshot, (room,), Direction::Up).unwrap();
    let timeline = rows.map(|row| row.unwrap().1.json);
    timeline
        .chain(originals.map(|row| row.unwrap().1))
        .any(|json| std::str::from_utf8(&json).unwrap().contains(text))
}

#[tokio::test(start_paused = true)]
async fn messages_are_gone_when_their_lifetime_is_over_and_state_stays() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    for version in ["1", "10", "12"] {
        let room = alice.create(json!({ "preset": "public_chat", "room_version": version })).await;
        bob.ok_post(&format!("/join/{room}"), json!({})).await;
        let num = room_num(&server.server().app().store, &room);
        let early = alice.say(&room, "1", "early words").await;
        later(&server, DAY_MS / 2).await;
        keep_for(&alice, &room, DAY_MS).await;
        let topic = json!({ "topic": "a topic" });
        alice.ok_put(&format!("/rooms/{room}/state/m.room.topic/"), topic).await;
        let late = alice.say(&room, "2", "late words").await;
        let edit = json!({
            "body": "* later words", "msgtype": "m.text",
            "m.new_content": { "body": "later words", "msgtype": "m.text" },
            "m.relates_to": { "rel_type": "m.replace", "event_id": late },
        });
        alice.ok_put(&format!("/rooms/{room}/send/m.room.message/3"), edit).await;
        later(&server, DAY_MS / 2 - 10_000).await;
        assert_eq!(status(&bob, &room, &early).await, StatusCode::OK);
        later(&server, 10_000).await;
        assert_eq!(status(&bob, &room, &early).await, StatusCode::NOT_FOUND, "version {version}");
        assert_eq!(texts(&bob, &room).await, ["late words", "* later words"]);
        assert!(!is_stored(&server, num, "early words"));
        assert!(is_stored(&server, num, "late words"));
        later(&server, DAY_MS / 2).await;
        assert_eq!(texts(&bob, &room).await, [""; 0]);
        assert!(!is_stored(&server, num, "late words") && !is_stored(&server, num, "later words"));
        assert_eq!(alice.ok_get(&format!("/rooms/{room}/state/m.room.topic/")).await["topic"], "a topic");

        // Nothing unread is left of what nobody can read any more, and the room goes on.
        let sync = bob.ok_get("/sync").await;
        let joined = &sync["rooms"]["join"][&room];
        assert_eq!(joined["unread_notifications"]["notification_count"], 0, "version {version}: {joined}");
        alice.say(&room, "4", "new words").await;
        assert_eq!(texts(&bob, &room).await, ["new words"]);
        keep_for(&alice, &room, Value::Null).await;
        later(&server, 3 * DAY_MS).await;
        assert_eq!(texts(&bob, &room).await, ["new words"]);
    }
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_shorter_lifetime_counts_for_what_was_said_before() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    keep_for(&alice, &room, 10 * DAY_MS).await;
    // More than one turn goes through.
    for number in 0..700 {
        alice.say(&room, &number.to_string(), "words").await;
    }
    later(&server, 2 * DAY_MS).await;
    alice.say(&room, "last", "last words").await;
    assert_eq!(texts(&alice, &room).await.len(), 701);
    keep_for(&alice, &room, DAY_MS).await;
    later(&server, 10_000).await;
    assert_eq!(texts(&alice, &room).await, ["last words"]);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn the_operator_sets_a_default_and_bounds() {
    let server = TestServer::with(|config| {
        config.retention.default_days = 3;
        config.retention.min_days = 2;
        config.retention.max_days = 4;
    });
    let alice = server.register("alice").await;
    let path = "/_matrix/client/unstable/org.matrix.msc1763/retention/configuration";
    let (_, configuration) = alice.get(path).await;
    let limits = json!({ "max_lifetime": { "min": 2 * DAY_MS, "max": 4 * DAY_MS } });
    let expected = json!({ "policies": { "*": { "max_lifetime": 3 * DAY_MS } }, "limits": limits });
    assert_eq!(configuration, expected);
    let mut rooms = Vec::new();
    for said in [None, Some(json!(1)), Some(json!(100 * DAY_MS)), Some(json!("nonsense"))] {
        let room = alice.create(json!({})).await;
        if let Some(said) = said {
            keep_for(&alice, &room, said).await;
        }
        alice.say(&room, "1", "words").await;
        rooms.push(room);
    }
    let kept = async || {
        let mut kept = Vec::new();
        for room in &rooms {
            kept.push(texts(&alice, room).await.len());
        }
        kept
    };
    later(&server, 2 * DAY_MS - 10_000).await;
    assert_eq!(kept().await, [1, 1, 1, 1]);
    later(&server, 10_000).await;
    assert_eq!(kept().await, [1, 0, 1, 0]);
    later(&server, DAY_MS).await;
    assert_eq!(kept().await, [0, 0, 1, 0]);
    later(&server, DAY_MS).await;
    assert_eq!(kept().await, [0, 0, 0, 0]);
}

#[tokio::test(start_paused = true)]
async fn other_bounds_count_from_the_next_start_on() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    alice.say(&room, "1", "words").await;
    later(&server, 5 * DAY_MS).await;
    assert_eq!(texts(&alice, &room).await, ["words"]);
    let store = server.server().app().store.clone();
    server.server().stop().await.unwrap();
    let again = TestServer::over(store, |config| config.retention.default_days = 4);
    let num = room_num(&again.server().app().store, &room);
    later(&again, DAY_MS).await;
    assert!(is_stored(&again, num, "words"));
    later(&again, 4 * DAY_MS).await;
    assert!(!is_stored(&again, num, "words"));
}

#[tokio::test(start_paused = true)]
async fn a_message_of_another_server_that_is_over_when_it_comes_is_shown_to_nobody() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let (room, remote) = shared_room(&alice, json!({ "preset": "public_chat" })).await;
    let app = server.server().app();
    keep_for(&alice, &room, DAY_MS).await;
    let since = alice.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
    let message = |text: &str, ms: u64| {
        let received = remote.message(text, &remote.heads());
        remote.rewritten(&received, "origin_server_ts", json!(ms))
    };
    let now_ms = app.env.now_ms();
    remote.send(message("long ago", now_ms - 2 * DAY_MS)).await;
    remote.send(message("just now", now_ms - 1_000)).await;
    remote.send(message("one day", now_ms + 1_000 * DAY_MS)).await;
    let sync = alice.ok_get(&format!("/sync?since={since}")).await;
    assert!(!sync.to_string().contains("long ago"));
    assert_eq!(texts(&alice, &room).await, ["just now", "one day"]);
    let num = room_num(&app.store, &room);
    assert!(!is_stored(&server, num, "long ago"));
    // A time that is yet to come keeps nothing for longer than a day and what the clock of the log is coarse by.
    later(&server, 20_000).await;
    for _ in 0..24 {
        later(&server, DAY_MS / 24).await;
    }
    assert_eq!(texts(&alice, &room).await, ["one day"]);
    for _ in 0..4 {
        later(&server, DAY_MS / 24).await;
    }
    assert_eq!(texts(&alice, &room).await, [""; 0]);
}
