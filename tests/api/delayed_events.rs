//! `src/api/client/delayed_events.rs`, `src/flows/room/delayed.rs`: events that are scheduled.

use std::time::Duration;

use aqueduct::{
    config::{Bucket, Limits},
    store::timer,
};
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{TestClient, TestServer, encoded},
    sync::{env, must, room_of_two, set_state},
};

const DELAYED: &str = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events";

/// The kind of the timers that send delayed events.
const SEND_DELAYED: u8 = 11;

/// Schedules a message as older clients do.
async fn later(client: &TestClient, room: &str, txn: &str, delay_ms: u64) -> String {
    let path = format!("/rooms/{room}/send/m.test/{}?org.matrix.msc4140.delay={delay_ms}", encoded(txn));
    id_of(&client.ok_put(&path, json!({ "body": txn })).await)
}

/// Schedules a state event as older clients do.
async fn state_later(client: &TestClient, room: &str, key: &str, value: &str, delay_ms: u64) -> String {
    let path = format!("/rooms/{room}/state/m.test/{key}?org.matrix.msc4140.delay={delay_ms}");
    id_of(&client.ok_put(&path, json!({ "value": value })).await)
}

fn id_of(answer: &Value) -> String {
    assert_eq!(answer.get("event_id"), None, "{answer}");
    answer["delay_id"].as_str().unwrap().to_owned()
}

async fn waiting(client: &TestClient) -> Vec<Value> {
    client.ok_get(DELAYED).await["delayed_events"].as_array().unwrap().clone()
}

async fn look_up(client: &TestClient, id: &str) -> Value {
    client.ok_get(&format!("{DELAYED}/{id}")).await
}

async fn act(client: &TestClient, id: &str, action: &str) -> (StatusCode, Value) {
    client.post(&format!("{DELAYED}/{id}/{action}"), json!({})).await
}

/// The events of the test's own type, oldest first.
async fn sent(client: &TestClient, room: &str) -> Vec<Value> {
    let page = client.ok_get(&format!("/rooms/{room}/messages?dir=f&limit=100")).await;
    let all = page["chunk"].as_array().unwrap().iter();
    all.filter(|event| event["type"] == "m.test").cloned().collect()
}

async fn bodies(client: &TestClient, room: &str) -> Vec<String> {
    sent(client, room)
        .await
        .iter()
        .map(|event| event["content"]["body"].as_str().unwrap().to_owned())
        .collect()
}

async fn sleep(server: &TestServer, seconds: u64) {
    env(server).sleep(Duration::from_secs(seconds)).await;
}

#[tokio::test(start_paused = true)]
async fn messages_are_sent_once_when_they_are_due_and_in_their_order() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let third = later(&alice, &room, "third", 30_000).await;
    let first = later(&alice, &room, "first", 10_000).await;
    let second = later(&alice, &room, "second", 10_001).await;
    assert_eq!(later(&alice, &room, "second", 10_001).await, second, "a retry schedules nothing");
    assert_eq!(later(&alice, &room, "second", 99_000).await, second);
    assert_ne!(later(&alice.on_device("OTHER").await, &room, "other", 99_000_000).await, second);
    let listed = waiting(&alice).await;
    let ids: Vec<_> = listed.iter().map(|it| it["delay_id"].as_str().unwrap()).collect();
    assert_eq!(ids[..3], [first.as_str(), &second, &third]);
    assert_eq!(listed.len(), 4);
    assert_eq!(listed[0]["room_id"], room);
    assert_eq!(listed[0]["type"], "m.test");
    assert_eq!(listed[0]["content"], json!({ "body": "first" }));
    assert_eq!(listed[0]["delay_ms"], 10_000);
    assert!(listed[0]["scheduled_at"].is_u64() && listed[0].get("state_key").is_none());
    assert_eq!(waiting(&bob).await, Vec::<Value>::new());
    sleep(&server, 9).await;
    assert_eq!(bodies(&bob, &room).await, Vec::<String>::new(), "nothing is sent early");
    sleep(&server, 4).await;
    assert_eq!(bodies(&bob, &room).await, ["first", "second"]);
    sleep(&server, 20).await;
    assert_eq!(bodies(&bob, &room).await, ["first", "second", "third"]);
    assert_eq!(waiting(&alice).await.len(), 1);
    // Its sender learns which one it was, on each device, and nobody else does.
    let own = sent(&alice.on_device("OTHER").await, &room).await;
    assert_eq!(own[0]["unsigned"]["org.matrix.msc4140.delay_id"], first);
    assert_eq!(own[0]["unsigned"].get("transaction_id"), None);
    assert_eq!(sent(&bob, &room).await[0]["unsigned"].get("org.matrix.msc4140.delay_id"), None);
    let ended = look_up(&alice, &first).await;
    assert_eq!(ended["event_id"], own[0]["event_id"]);
    assert!(ended["finalised_ts"].as_u64().unwrap() >= ended["scheduled_at"].as_u64().unwrap() + 10_000);
    // A retry after it was sent sends nothing either.
    assert_eq!(later(&alice, &room, "first", 10_000).await, first);
    sleep(&server, 30).await;
    assert_eq!(bodies(&bob, &room).await.len(), 3);
    server.assert_whole();
    // An event that has ended is forgotten after a week, also where nobody asks for anything.
    sleep(&server, 9 * 24 * 60 * 60).await;
    assert_eq!(alice.get(&format!("{DELAYED}/{first}")).await.1["errcode"], "M_NOT_FOUND");
    let rows = server.assert_whole();
    assert!(rows.iter().all(|(name, count)| !name.starts_with("DELAYED") || *count == 0), "{rows:?}");
}

#[tokio::test(start_paused = true)]
async fn state_is_set_when_it_is_due_whoever_has_set_it_meanwhile() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let levels = json!({ "users": { "@bob:test.example": 50 }, "events": { "m.test": 50 } });
    set_state(&alice, &room, "m.room.power_levels", "", {
        let mut all = alice.state(&room, "m.room.power_levels", "").await.1;
        all["users"]["@bob:test.example"] = levels["users"]["@bob:test.example"].clone();
        all
    })
    .await;
    let id = state_later(&alice, &room, "key", "late", 5_000).await;
    assert_eq!(waiting(&alice).await[0]["state_key"], "key");
    assert_eq!(alice.state(&room, "m.test", "key").await.0, StatusCode::NOT_FOUND);
    set_state(&bob, &room, "m.test", "key", json!({ "value": "between" })).await;
    assert_eq!(waiting(&alice).await.len(), 1, "by the proposal of now this does not take it back");
    sleep(&server, 7).await;
    assert_eq!(alice.state(&room, "m.test", "key").await.1, json!({ "value": "late" }));
    // To set what is set already changes nothing, and counts as sent.
    let same = state_later(&alice, &room, "key", "late", 5_000).await;
    sleep(&server, 7).await;
    assert_eq!(look_up(&alice, &same).await["event_id"], look_up(&alice, &id).await["event_id"]);
    assert_eq!(sent(&alice, &room).await.len(), 2);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_names_no_transaction_schedules_too() {
    let server = TestServer::new();
    let (alice, _, room) = room_of_two(&server).await;
    let path = |query: &str| format!("/_matrix/client/v3/rooms/{}/send/m.test{query}", encoded(&room));
    let post = async |query: &str, body: &str| alice.post(&path(query), json!({ "body": body })).await;
    let (status, answer) = post("?org.matrix.msc4140.delay=5000", "later").await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let id = id_of(&answer);
    // Without a transaction each request schedules an event of its own.
    assert_ne!(id_of(&post("?org.matrix.msc4140.delay=6000", "later still").await.1), id);
    assert_eq!(post("", "now").await.0, StatusCode::OK);
    assert_eq!(bodies(&alice, &room).await, ["now"]);
    assert_eq!(waiting(&alice).await.len(), 2);
    sleep(&server, 8).await;
    assert_eq!(bodies(&alice, &room).await, ["now", "later", "later still"]);
    let most = "?org.matrix.msc4140.delay=99999999999999";
    for (query, code) in [
        ("?org.matrix.msc4140.delay=soon", "M_INVALID_PARAM"),
        ("?org.matrix.msc4140.delay=0", "M_INVALID_PARAM"),
        (most, "M_UNKNOWN"),
        ("?org.matrix.msc4354.sticky_duration_ms=3600001", "M_INVALID_PARAM"),
    ] {
        let (status, json) = post(query, "never").await;
        assert!(status.is_client_error() && json["errcode"] == code, "{query}: {status} {json}");
    }
    assert_eq!(bodies(&alice, &room).await.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn the_newer_endpoint_schedules_messages_and_state() {
    let server = TestServer::new();
    let (alice, _, room) = room_of_two(&server).await;
    let path = |txn: &str| {
        format!("/_matrix/client/unstable/org.matrix.msc4140/rooms/{room}/delayed_event/m.test/{txn}")
    };
    let message = json!({ "delay_ms": 1_000, "content": { "body": "a" } });
    let id = id_of(&alice.ok_put(&path("1"), message.clone()).await);
    assert_eq!(id_of(&alice.ok_put(&path("1"), message).await), id);
    let state = json!({ "delay_ms": 2_000, "state_key": "", "content": { "body": "b" } });
    alice.ok_put(&path("2"), state).await;
    sleep(&server, 5).await;
    assert_eq!(bodies(&alice, &room).await, ["a", "b"]);
    assert_eq!(alice.state(&room, "m.test", "").await.1, json!({ "body": "b" }));
    for (body, code) in [
        (json!({ "content": {} }), "M_MISSING_PARAM"),
        (json!({ "delay_ms": 1 }), "M_MISSING_PARAM"),
        (json!({ "delay_ms": -1, "content": {} }), "M_BAD_JSON"),
        (json!({ "delay_ms": 1.5, "content": {} }), "M_BAD_JSON"),
        (json!({ "delay_ms": "1", "content": {} }), "M_BAD_JSON"),
        (json!({ "delay_ms": 1, "content": [] }), "M_BAD_JSON"),
        (json!({ "delay_ms": 1, "content": { "n": 1.5 } }), "M_BAD_JSON"),
        (json!({ "delay_ms": 1, "state_key": 3, "content": {} }), "M_BAD_JSON"),
        (json!({ "delay_ms": 0, "content": {} }), "M_INVALID_PARAM"),
    ] {
        let (status, json) = alice.put(&path("3"), body.clone()).await;
        assert_eq!(
            (status, json["errcode"].as_str()),
            (StatusCode::BAD_REQUEST, Some(code)),
            "{body}: {json}"
        );
    }
    for delay_ms in [31 * 24 * 60 * 60 * 1000 + 1, u64::MAX] {
        let (status, json) = alice.put(&path("3"), json!({ "delay_ms": delay_ms, "content": {} })).await;
        assert_eq!(
            (status, json["errcode"].as_str()),
            (StatusCode::FORBIDDEN, Some("M_FORBIDDEN")),
            "{json}"
        );
    }
    assert_eq!(waiting(&alice).await.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_is_scheduled_is_cancelled_restarted_and_sent_by_its_user_alone() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let cancelled = later(&alice, &room, "cancelled", 10_000).await;
    let restarted = later(&alice, &room, "restarted", 10_000).await;
    let early = later(&alice, &room, "early", 1_000_000).await;
    for action in ["send", "cancel", "restart"] {
        for id in [&cancelled, "nothing", &encoded("a/b"), &"x".repeat(3_000)] {
            let (status, json) = act(&bob, id, action).await;
            assert_eq!(
                (status, json["errcode"].as_str()),
                (StatusCode::NOT_FOUND, Some("M_NOT_FOUND")),
                "{id}"
            );
        }
        assert_eq!(act(&server.anonymous(), &cancelled, action).await.0, StatusCode::UNAUTHORIZED);
    }
    assert_eq!(bob.get(&format!("{DELAYED}/{cancelled}")).await.0, StatusCode::NOT_FOUND);
    assert_eq!(act(&alice, &cancelled, "explode").await.1["errcode"], "M_UNRECOGNIZED");
    // Any device of the user may do it, with the action in the path or in the body.
    let other = alice.on_device("OTHER").await;
    assert_eq!(act(&other, &cancelled, "cancel").await, (StatusCode::OK, json!({})));
    sleep(&server, 8).await;
    other.ok_post(&format!("{DELAYED}/{restarted}"), json!({ "action": "restart" })).await;
    sleep(&server, 5).await;
    assert_eq!(bodies(&alice, &room).await, Vec::<String>::new(), "one is cancelled, and one begins anew");
    sleep(&server, 8).await;
    assert_eq!(bodies(&alice, &room).await, ["restarted"]);
    assert_eq!(act(&alice, &early, "send").await, (StatusCode::OK, json!({})));
    assert_eq!(bodies(&alice, &room).await, ["restarted", "early"]);
    let ended = look_up(&alice, &early).await;
    assert!(ended["finalised_ts"].as_u64().unwrap() < ended["scheduled_at"].as_u64().unwrap() + 1_000_000);
    for (body, code) in [
        (json!({}), "M_MISSING_PARAM"),
        (json!({ "action": "explode" }), "M_INVALID_PARAM"),
        (json!({ "action": 1 }), "M_BAD_JSON"),
    ] {
        let (status, json) = alice.post(&format!("{DELAYED}/{early}"), body).await;
        assert_eq!((status, json["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some(code)));
    }
    // An act that the event has ended by is done already; any other cannot be done any more.
    for (id, action, expected) in [
        (&early, "send", 200),
        (&early, "cancel", 409),
        (&early, "restart", 409),
        (&cancelled, "cancel", 200),
        (&cancelled, "send", 409),
        (&cancelled, "restart", 409),
    ] {
        let (status, json) = act(&alice, id, action).await;
        assert_eq!(status.as_u16(), expected, "{action}: {json}");
        assert!(expected == 200 || json["errcode"] == "M_UNKNOWN", "{json}");
    }
    assert_eq!(bodies(&alice, &room).await, ["restarted", "early"]);
    let ended = look_up(&alice, &cancelled).await;
    assert!(
        ended["finalised_ts"].is_u64() && ended.get("event_id").is_none() && ended.get("error").is_none()
    );
    sleep(&server, 2_000).await;
    assert_eq!(bodies(&alice, &room).await.len(), 2, "what was sent early is not sent again");
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_event_is_judged_when_it_is_sent() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let powerless = state_later(&bob, &room, "key", "value", 5_000).await;
    let kicked = later(&bob, &room, "kicked", 10_000).await;
    // The event cannot be sent now and stays scheduled, for the cause may go away.
    let (status, json) = act(&bob, &powerless, "send").await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::FORBIDDEN, Some("M_FORBIDDEN")));
    assert_eq!(waiting(&bob).await.len(), 2);
    sleep(&server, 8).await;
    let ended = look_up(&bob, &powerless).await;
    assert_eq!(ended["error"]["errcode"], "M_FORBIDDEN", "{ended}");
    assert!(ended.get("event_id").is_none() && ended["finalised_ts"].is_u64());
    assert_eq!(act(&bob, &powerless, "cancel").await.0, StatusCode::OK, "it has come to nothing as it is");
    assert_eq!(act(&bob, &powerless, "send").await.0, StatusCode::CONFLICT);
    must(&alice, &room, "kick", json!({ "user_id": bob.user_id })).await;
    sleep(&server, 5).await;
    assert_eq!(look_up(&bob, &kicked).await["error"]["errcode"], "M_FORBIDDEN");
    assert_eq!(sent(&alice, &room).await, Vec::<Value>::new());
    // Nobody schedules into rooms that they are not in, whether there are such.
    for room in [room.as_str(), "!nowhere:test.example"] {
        let path = format!("/_matrix/client/v3/rooms/{room}/send/m.test/9?org.matrix.msc4140.delay=5");
        assert_eq!(bob.put(&path, json!({})).await.1["errcode"], "M_FORBIDDEN");
    }
    // Levels that were raised meanwhile count.
    let raised = state_later(&alice, &room, "key", "value", 5_000).await;
    must(&bob, &room, "join", json!({})).await;
    let refused = later(&bob, &room, "muted", 5_000).await;
    let mut levels = alice.state(&room, "m.room.power_levels", "").await.1;
    levels["events_default"] = json!(10);
    set_state(&alice, &room, "m.room.power_levels", "", levels).await;
    sleep(&server, 7).await;
    assert_eq!(look_up(&bob, &refused).await["error"]["errcode"], "M_FORBIDDEN");
    assert!(look_up(&alice, &raised).await["event_id"].is_string());
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_redaction_and_a_ban_can_be_scheduled_and_a_join_cannot() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let said = alice.say(&room, "1", "a secret for a minute").await;
    let path = |kind: &str, key: &str| format!("/rooms/{room}/{kind}/{key}?org.matrix.msc4140.delay=60000");
    alice.ok_put(&path("send/m.room.redaction", "2"), json!({ "redacts": said })).await;
    let user = encoded(&bob.user_id);
    alice.ok_put(&path("state/m.room.member", &user), json!({ "membership": "ban" })).await;
    sleep(&server, 50).await;
    let event = format!("/rooms/{room}/event/{}", encoded(&said));
    assert_eq!(alice.ok_get(&event).await["content"]["body"], "a secret for a minute");
    sleep(&server, 12).await;
    assert_eq!(alice.ok_get(&event).await["content"], json!({}));
    assert_eq!(alice.state(&room, "m.room.member", &user).await.1["membership"], "ban");
    for content in [json!({ "membership": "join" }), json!({ "membership": "invite" }), json!({})] {
        let (status, json) =
            alice.put(&format!("/_matrix/client/v3{}", path("state/m.room.member", &user)), content).await;
        assert_eq!((status, json["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some("M_INVALID_PARAM")));
    }
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn delays_and_numbers_are_bounded() {
    let server = TestServer::with(|config| {
        config.rooms.delayed_events_max = 3;
        config.rooms.delay_max_days = 1;
    });
    let (alice, bob, room) = room_of_two(&server).await;
    let put = async |delay: &str| {
        let path = format!("/_matrix/client/v3/rooms/{room}/state/m.test/k?org.matrix.msc4140.delay={delay}");
        alice.put(&path, json!({})).await
    };
    for delay in ["-1", "1.5", "1e3", "", "%2B1", "0x10", "abc", "%00", "0", "1%20", "NaN"] {
        let (status, json) = put(delay).await;
        assert_eq!(
            (status, json["errcode"].as_str()),
            (StatusCode::BAD_REQUEST, Some("M_INVALID_PARAM")),
            "{delay}: {json}"
        );
    }
    for delay in ["86400001", "18446744073709551615", "18446744073709551616", &"9".repeat(500)] {
        let (status, json) = put(delay).await;
        assert_eq!((status, json["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some("M_UNKNOWN")));
        assert_eq!(json["org.matrix.msc4140.errcode"], "M_MAX_DELAY_EXCEEDED");
        assert_eq!(json["org.matrix.msc4140.max_delay"], 86_400_000);
    }
    assert_eq!(put("86400000").await.0, StatusCode::OK);
    later(&alice, &room, "1", 20_000).await;
    later(&alice, &room, "2", 30_000).await;
    let (status, json) = put("1").await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::TOO_MANY_REQUESTS, Some("M_LIMIT_EXCEEDED")));
    assert!((19_000..=20_000).contains(&json["retry_after_ms"].as_u64().unwrap()), "{json}");
    // A retry is answered though no other has room, and somebody else has a bound of their own.
    later(&alice, &room, "2", 30_000).await;
    later(&bob, &room, "1", 1_000).await;
    sleep(&server, 22).await;
    assert_eq!(put("1000").await.0, StatusCode::OK);
    let large = json!({ "body": "a".repeat(70_000) });
    let path = format!("/_matrix/client/v3/rooms/{room}/send/m.test/9?org.matrix.msc4140.delay=5");
    assert_eq!(bob.put(&path, large).await.1["errcode"], "M_TOO_LARGE");
    let path =
        format!("/_matrix/client/v3/rooms/{room}/send/{}/9?org.matrix.msc4140.delay=5", "t".repeat(300));
    assert_eq!(bob.put(&path, json!({})).await.1["errcode"], "M_TOO_LARGE");
    server.assert_whole();
    let capabilities = alice.ok_get("/capabilities").await;
    let told = &capabilities["capabilities"]["org.matrix.msc4140.delayed_events"];
    assert_eq!(*told, json!({ "max_delay_ms": 86_400_000, "max_scheduled": 3 }));
    let none = TestServer::with(|config| config.rooms.delayed_events_max = 0);
    let (alice, _, room) = room_of_two(&none).await;
    let path = format!("/_matrix/client/v3/rooms/{room}/send/m.test/9?org.matrix.msc4140.delay=5");
    assert_eq!(alice.put(&path, json!({})).await.1["errcode"], "M_FORBIDDEN");
    let features = alice.ok_get("/_matrix/client/versions").await;
    assert_eq!(features["unstable_features"]["org.matrix.msc4140"], false);
}

#[tokio::test(start_paused = true)]
async fn those_that_are_due_count_for_the_limit_for_sending_and_none_is_lost_by_it() {
    let server = TestServer::with(|config| {
        config.limits.rate_limits = true;
        let many = Bucket { per_second: 1_000.0, burst: 1_000 };
        (config.limits.register, config.limits.membership, config.limits.other) = (many, many, many);
        config.limits.read = many;
        config.limits.send = Bucket { per_second: 1.0, burst: 4 };
    });
    let (alice, _, room) = room_of_two(&server).await;
    let mut ids = Vec::new();
    for number in 0..8 {
        ids.push(later(&alice, &room, &number.to_string(), 100_000 - number * 2_000).await);
        sleep(&server, 2).await;
    }
    sleep(&server, 80).await;
    // At the time when they are due, their user has just sent as much as they may.
    let path = |txn: usize| format!("/_matrix/client/v3/rooms/{room}/send/m.other/{txn}");
    let mut txn = 0;
    while alice.put(&path(txn), json!({})).await.0 == StatusCode::OK {
        txn += 1;
    }
    sleep(&server, 5).await;
    let (status, json) = alice.put(&path(txn), json!({})).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "what was sent for the user counts: {json}");
    sleep(&server, 60).await;
    assert_eq!(sent(&alice, &room).await.len(), 8);
    for id in &ids {
        assert_eq!(look_up(&alice, id).await["error"], Value::Null);
    }
    server.assert_whole();
}

/// A server with limits that no test reaches by accident.
fn limited(set: impl FnOnce(&mut Limits)) -> TestServer {
    TestServer::with(|config| {
        let limits = &mut config.limits;
        limits.rate_limits = true;
        let many = Bucket { per_second: 1_000.0, burst: 1_000 };
        (limits.register, limits.membership, limits.other) = (many, many, many);
        (limits.read, limits.send) = (many, many);
        set(limits);
    })
}

#[tokio::test(start_paused = true)]
async fn those_that_were_put_off_keep_their_order() {
    let server = limited(|limits| limits.send = Bucket { per_second: 1.0, burst: 2 });
    let (alice, _, room) = room_of_two(&server).await;
    let expected: Vec<String> = (0..40).map(|number| number.to_string()).collect();
    let mut ids = Vec::new();
    // Two at a time are scheduled at one moment, for one moment.
    for (pair, values) in (0..).zip(expected.chunks(2)) {
        sleep(&server, 2).await;
        for value in values {
            ids.push(state_later(&alice, &room, "key", value, 100_000 - pair * 1_999).await);
        }
    }
    // The first one begins anew, and is due long after all others.
    assert_eq!(act(&alice, &ids[0], "restart").await.0, StatusCode::OK);
    ids.rotate_left(1);
    let listed = waiting(&alice).await;
    let listed: Vec<_> = listed.iter().map(|it| it["delay_id"].as_str().unwrap()).collect();
    assert_eq!(listed, ids);
    // The others are due while their user may send a few of them.
    sleep(&server, 63).await;
    let sent_at_first = sent(&alice, &room).await.len();
    assert!((1..39).contains(&sent_at_first), "{sent_at_first}");
    server.assert_whole();
    sleep(&server, 200).await;
    let page = alice.ok_get(&format!("/rooms/{room}/messages?dir=f&limit=100")).await;
    let all = page["chunk"].as_array().unwrap().iter().filter(|event| event["type"] == "m.test");
    let values: Vec<_> = all.map(|event| event["content"]["value"].as_str().unwrap()).collect();
    assert_eq!(values[..39], expected[1..]);
    assert_eq!(values[39], "0");
    assert_eq!(alice.state(&room, "m.test", "key").await.1, json!({ "value": "0" }));
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_change_of_membership_counts_once_as_one_however_it_is_sent() {
    let server = limited(|limits| limits.membership = Bucket { per_second: 0.1, burst: 4 });
    let (alice, _, room) = room_of_two(&server).await;
    let content = json!({ "membership": "ban" });
    let mut ids = Vec::new();
    for number in 0..10 {
        let user = encoded(&format!("@{number}:test.example"));
        let path = format!("/rooms/{room}/state/m.room.member/{user}?org.matrix.msc4140.delay=1000000");
        ids.push(id_of(&alice.ok_put(&path, content.clone()).await));
    }
    // This one is due when the bucket is full again.
    let user = encoded("@due:test.example");
    let path = format!("/rooms/{room}/state/m.room.member/{user}?org.matrix.msc4140.delay=50000");
    let due = id_of(&alice.ok_put(&path, content).await);
    let assert_limited = |answer: (StatusCode, Value)| {
        let (status, json) = answer;
        assert_eq!(
            (status, json["errcode"].as_str()),
            (StatusCode::TOO_MANY_REQUESTS, Some("M_LIMIT_EXCEEDED")),
            "{json}"
        );
    };
    sleep(&server, 45).await;
    let mut waiting = ids.iter();
    for _ in 0..2 {
        assert_eq!(act(&alice, waiting.next().unwrap(), "send").await, (StatusCode::OK, json!({})));
        let id = waiting.next().unwrap();
        alice.ok_post(&format!("{DELAYED}/{id}"), json!({ "action": "send" })).await;
    }
    let id = waiting.next().unwrap();
    assert_limited(act(&alice, id, "send").await);
    assert_limited(alice.post(&format!("{DELAYED}/{id}"), json!({ "action": "send" })).await);
    assert!(look_up(&alice, id).await.get("finalised_ts").is_none(), "it stays scheduled");
    let ban = format!("/_matrix/client/v3/rooms/{room}/ban");
    assert_limited(alice.post(&ban, json!({ "user_id": "@z:test.example" })).await);
    // An event that is due is sent all the same, and the next change waits for longer by that.
    sleep(&server, 10).await;
    assert!(look_up(&alice, &due).await["event_id"].is_string());
    assert_limited(act(&alice, id, "send").await);
    sleep(&server, 12).await;
    assert_eq!(act(&alice, id, "send").await, (StatusCode::OK, json!({})));
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_logout_leaves_what_is_scheduled_and_the_end_of_the_account_does_not() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let phone = alice.on_device("PHONE").await;
    later(&phone, &room, "last will", 10_000).await;
    phone.ok_post("/logout", json!({})).await;
    assert_eq!(waiting(&alice).await.len(), 1);
    sleep(&server, 13).await;
    assert_eq!(bodies(&bob, &room).await, ["last will"]);
    later(&alice, &room, "never", 10_000).await;
    let password = json!({
        "auth": {
            "type": "m.login.password", "password": "password of alice",
            "identifier": { "type": "m.id.user", "user": alice.user_id },
        },
    });
    alice.ok_post("/account/deactivate", password).await;
    sleep(&server, 13).await;
    assert_eq!(bodies(&bob, &room).await, ["last will"]);
    let rows = server.assert_whole();
    assert!(rows.iter().all(|(name, count)| !name.starts_with("DELAYED") || *count == 0), "{rows:?}");
}

#[tokio::test(start_paused = true)]
async fn what_was_sent_is_shown_as_its_event_is_now() {
    let server = TestServer::new();
    let (alice, _, room) = room_of_two(&server).await;
    let redacted = later(&alice, &room, "said in haste", 1_000).await;
    let expired = later(&alice, &room, "for an hour", 1_000).await;
    let cancelled = later(&alice, &room, "never said", 1_000_000).await;
    assert_eq!(look_up(&alice, &redacted).await["content"], json!({ "body": "said in haste" }));
    sleep(&server, 3).await;
    let ended = look_up(&alice, &redacted).await;
    assert_eq!(ended["content"], json!({ "body": "said in haste" }));
    let path = format!("/rooms/{room}/redact/{}/r", encoded(ended["event_id"].as_str().unwrap()));
    alice.ok_put(&path, json!({})).await;
    let ended = look_up(&alice, &redacted).await;
    assert_eq!(ended["content"], json!({}), "the redaction reaches whatever shows the event");
    assert!(ended["event_id"].is_string());
    assert_eq!(act(&alice, &cancelled, "cancel").await.0, StatusCode::OK);
    assert_eq!(look_up(&alice, &expired).await["content"], json!({ "body": "for an hour" }));
    set_state(&alice, &room, "m.room.retention", "", json!({ "max_lifetime": 3_600_000 })).await;
    sleep(&server, 3_700).await;
    assert_eq!(look_up(&alice, &expired).await["content"], json!({}), "its lifetime is over");
    assert_eq!(look_up(&alice, &cancelled).await["content"], json!({ "body": "never said" }));
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_user_has_one_timer_however_often_they_change_their_mind() {
    let server = TestServer::with(|config| config.rooms.delayed_events_max = 20);
    let (alice, bob, room) = room_of_two(&server).await;
    let timers = || {
        let view = server.server().app().store.view();
        timer::list_due(&view, u64::MAX, 100_000, |kind| kind == SEND_DELAYED).unwrap().len()
    };
    let mut waiting = std::collections::VecDeque::new();
    for number in 0..400_u64 {
        // Each is due before all others.
        waiting.push_back(later(&alice, &room, &number.to_string(), 1_000_000 - number * 10).await);
        if number % 3 == 0 {
            act(&alice, waiting.back().unwrap(), "restart").await;
        }
        if waiting.len() > 10 {
            assert_eq!(act(&alice, &waiting.pop_back().unwrap(), "cancel").await.0, StatusCode::OK);
        }
        assert_eq!(timers(), 1, "after {number}");
    }
    let bobs = later(&bob, &room, "on time", 990_000).await;
    assert_eq!(timers(), 2);
    sleep(&server, 992).await;
    assert!(look_up(&bob, &bobs).await["event_id"].is_string());
    for id in waiting {
        act(&alice, &id, "cancel").await;
    }
    // The timers that are left forget what has ended.
    assert_eq!(timers(), 2);
    sleep(&server, 9 * 24 * 60 * 60).await;
    assert_eq!(timers(), 0);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn guests_may_schedule_events() {
    let server = TestServer::with(|config| config.registration.guests = true);
    let alice = server.register("alice").await;
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    set_state(&alice, &room, "m.room.guest_access", "", json!({ "guest_access": "can_join" })).await;
    let path = "/_matrix/client/v3/register?kind=guest";
    let (_, guest) = server.raw(Method::POST, path, None, "{}").await;
    let token = guest["access_token"].as_str().unwrap().to_owned();
    let guest = TestClient { token: Some(token), ..server.anonymous() };
    guest.ok_post(&format!("/join/{room}"), json!({})).await;
    let id = later(&guest, &room, "of a guest", 1_000).await;
    assert_eq!(waiting(&guest).await[0]["delay_id"], id);
    sleep(&server, 3).await;
    assert_eq!(bodies(&alice, &room).await, ["of a guest"]);
}
