//! An event that a user may not see is answered like one that is not there, so that nobody learns whether it is.

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    support::{NOWHERE, TestClient, TestServer, encoded},
    sync::{act, create_room, must, say, send, set_state},
};

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

/// A room whose members see what was sent while they were there. Before Dave enters it, its topic, its rules for servers and
/// Bob's name were changed, and Bob was banned for a time. Gives the room, an event that Dave sees, and a place before
/// he came.
async fn with_a_past(alice: &TestClient, bob: &TestClient, dave: &TestClient) -> (String, String, String) {
    let content = json!({ "history_visibility": "joined" });
    let state = json!([{ "type": "m.room.history_visibility", "content": content }]);
    let body = json!({ "preset": "public_chat", "topic": "OLD TOPIC", "initial_state": state });
    let room = create_room(alice, body).await;
    must(bob, &room, "join", json!({})).await;
    let named = |name: &str| json!({ "membership": "join", "displayname": name });
    set_state(bob, &room, "m.room.member", &bob.user_id, named("OLD NAME")).await;
    must(alice, &room, "ban", json!({ "user_id": bob.user_id, "reason": "OLD REASON" })).await;
    let (_, page) = alice.get(&format!("/_matrix/client/v3/rooms/{room}/messages?dir=b&limit=1")).await;
    let place = page["start"].as_str().unwrap().to_owned();
    must(alice, &room, "unban", json!({ "user_id": bob.user_id })).await;
    must(bob, &room, "join", json!({})).await;
    set_state(bob, &room, "m.room.member", &bob.user_id, named("OTHER OLD NAME")).await;
    set_state(bob, &room, "m.room.member", &bob.user_id, named("Bob")).await;
    set_state(alice, &room, "m.room.topic", "", json!({ "topic": "new" })).await;
    let acl = json!({ "allow": ["*"], "deny": ["OLD.example"] });
    set_state(alice, &room, "m.room.server_acl", "", acl).await;
    set_state(alice, &room, "m.room.server_acl", "", json!({ "allow": ["*"] })).await;
    must(dave, &room, "join", json!({})).await;
    let seen = say(bob, &room, "seen").await;
    (room, seen, place)
}

#[tokio::test(start_paused = true)]
async fn the_state_from_before_somebody_came_is_shown_by_no_detour() {
    let server = TestServer::new();
    let (alice, bob, dave) =
        (server.register("alice").await, server.register("bob").await, server.register("dave").await);
    let (room, seen, place) = with_a_past(&alice, &bob, &dave).await;
    let lazy = "%7B%22lazy_load_members%22:true%7D";
    let (b, seen) = (encoded(&bob.user_id), encoded(&seen));
    let mut paths: Vec<String> = [
        "state".to_owned(),
        "members".to_owned(),
        "state/m.room.topic?format=event".to_owned(),
        "state/m.room.server_acl?format=event".to_owned(),
        format!("state/m.room.member/{b}?format=event"),
        format!("context/{seen}"),
        format!("context/{seen}?filter={lazy}"),
        "messages?dir=b&limit=100".to_owned(),
        format!("messages?dir=b&limit=100&filter={lazy}"),
        format!("messages?dir=f&limit=100&from={place}&filter={lazy}"),
        format!("members?at={place}"),
        format!("members?at={}", place.split('_').next().unwrap()),
        "members?at=t1".to_owned(),
    ]
    .into_iter()
    .map(|rest| format!("rooms/{room}/{rest}"))
    .collect();
    paths.extend(
        ["", "&full_state=true", "&use_state_after=true"].map(|rest| format!("sync?timeout=0{rest}")),
    );
    for path in paths {
        let (status, json) = dave.get(&format!("/_matrix/client/v3/{path}")).await;
        assert_eq!(status, StatusCode::OK, "{path}: {json}");
        assert!(!json.to_string().contains("OLD"), "{path}: {json}");
    }
    // Somebody who was there still reads it: by the same answers, and by the same place.
    let (_, json) = alice.get(&format!("/_matrix/client/v3/rooms/{room}/members?at={place}")).await;
    assert!(json.to_string().contains("OLD REASON"), "{json}");
    let (_, json) = alice.get(&format!("/_matrix/client/v3/rooms/{room}/state")).await;
    assert!(json.to_string().contains("OLD TOPIC"), "{json}");
    // A change that Dave sees tells him what it changed, which he knew.
    set_state(&alice, &room, "m.room.topic", "", json!({ "topic": "newer" })).await;
    let (_, json) =
        dave.get(&format!("/_matrix/client/v3/rooms/{room}/state/m.room.topic?format=event")).await;
    assert_eq!(json["unsigned"]["prev_content"]["topic"], "new", "{json}");
    // Once the room is shared with all its members, the place is a place to him, too.
    let shared = json!({ "history_visibility": "shared" });
    set_state(&alice, &room, "m.room.history_visibility", "", shared).await;
    let (_, json) = dave.get(&format!("/_matrix/client/v3/rooms/{room}/members?at={place}")).await;
    assert!(!json.to_string().contains("OLD"), "what was hidden stays hidden: {json}");
}

#[tokio::test(start_paused = true)]
async fn two_conditions_on_members_are_joined_by_or() {
    let server = TestServer::new();
    let (alice, bob, carol) =
        (server.register("alice").await, server.register("bob").await, server.register("carol").await);
    let room = create_room(&alice, json!({ "preset": "public_chat", "invite": [carol.user_id] })).await;
    must(&bob, &room, "join", json!({})).await;
    must(&bob, &room, "leave", json!({})).await;
    let (a, b, c) = (&alice.user_id, &bob.user_id, &carol.user_id);
    for (query, expected) in [
        ("", vec![a, b, c]),
        ("?membership=join", vec![a]),
        ("?not_membership=leave", vec![a, c]),
        ("?membership=join&not_membership=join", vec![a, b, c]),
        ("?membership=join&not_membership=leave", vec![a, c]),
        ("?membership=leave&not_membership=leave", vec![a, b, c]),
    ] {
        let (status, json) = alice.get(&format!("/_matrix/client/v3/rooms/{room}/members{query}")).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        let chunk = json["chunk"].as_array().unwrap();
        let mut listed: Vec<_> = chunk.iter().map(|event| event["state_key"].as_str().unwrap()).collect();
        listed.sort_unstable();
        assert_eq!(listed, expected, "{query}");
    }
}
