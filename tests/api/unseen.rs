//! An event that a user may not see is answered like one that is not there, so that nobody learns whether it is.

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    support::{TestClient, TestServer},
    sync::{act, create_room, encoded, must, say, send, set_state},
};

/// An event id of the right form that no event has.
const NOWHERE: &str = "$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// Bob's answers to everything that names this event, without what he named.
async fn answers(bob: &TestClient, room: &str, event: &str, number: usize) -> Vec<(StatusCode, Value)> {
    let mut answers = Vec::new();
    for kind in ["m.read", "m.read.private", "m.fully_read"] {
        let what = format!("receipt/{kind}/{}", encoded(event));
        answers.push(act(bob, room, &what, json!({})).await);
    }
    for marker in ["m.read", "m.read.private", "m.fully_read"] {
        answers.push(act(bob, room, "read_markers", json!({ marker: event })).await);
    }
    let path = format!("/_matrix/client/v3/rooms/{room}");
    answers.push(bob.put(&format!("{path}/redact/{}/r{number}", encoded(event)), json!({})).await);
    let body = json!({ "redacts": event });
    answers.push(bob.put(&format!("{path}/send/m.room.redaction/s{number}"), body).await);
    for (at, (rel_type, key)) in [
        ("m.annotation", "x"),
        ("m.annotation", "x"),
        ("m.thread", ""),
        ("m.replace", ""),
        ("m.reference", ""),
    ]
    .into_iter()
    .enumerate()
    {
        let relation = json!({ "rel_type": rel_type, "event_id": event, "key": key });
        let content = json!({ "body": "b", "m.new_content": { "body": "c" }, "m.relates_to": relation });
        let answer = bob.put(&format!("{path}/send/org.test/{at}-{number}"), content).await;
        let own = answer.1["event_id"].as_str().map(encoded);
        answers.push(answer);
        // A receipt at an event of his own is for the thread in which that event stands.
        for thread in ["main", event] {
            let Some(own) = &own else { continue };
            let body = json!({ "thread_id": thread });
            answers.push(act(bob, room, &format!("receipt/m.read/{own}"), body).await);
        }
    }
    for (_, json) in &mut answers {
        if let Some(id) = json.get_mut("event_id") {
            *id = Value::Null;
        }
    }
    answers
}

#[tokio::test(start_paused = true)]
async fn an_event_that_a_user_may_not_see_is_answered_like_one_that_is_not_there() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let content = json!({ "history_visibility": "joined" });
    let state = json!([{ "type": "m.room.history_visibility", "content": content }]);
    let room = create_room(&alice, json!({ "preset": "public_chat", "initial_state": state })).await;
    let hidden = say(&alice, &room, "hidden").await;
    let relation = json!({ "rel_type": "m.thread", "event_id": hidden });
    let threaded = send(&alice, &room, "threaded", json!({ "body": "t", "m.relates_to": relation })).await;
    must(&bob, &room, "join", json!({})).await;
    let seen = say(&alice, &room, "seen").await;
    for is_moderator in [false, true] {
        if is_moderator {
            let levels = json!({ "users": { &bob.user_id: 50 } });
            let path = format!("/_matrix/client/v3/rooms/{room}/state/m.room.power_levels");
            let (_, mut old) = alice.get(&path).await;
            old["users"] = levels["users"].clone();
            set_state(&alice, &room, "m.room.power_levels", "", old).await;
        }
        let base = usize::from(is_moderator) * 10;
        let nowhere = answers(&bob, &room, NOWHERE, base).await;
        assert_eq!(nowhere[0].0, StatusCode::NOT_FOUND, "{nowhere:?}");
        for (number, event) in [&hidden, &threaded].into_iter().enumerate() {
            let unseen = answers(&bob, &room, event, base + number + 1).await;
            assert_eq!(unseen, nowhere, "moderator: {is_moderator}");
        }
        let visible = answers(&bob, &room, &seen, base + 5).await;
        assert_eq!(visible[0].0, StatusCode::OK, "{visible:?}");
        assert_ne!(visible, nowhere);
    }
}
