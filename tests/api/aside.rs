//! Events that clients do not see in the timeline: soft-failed ones may be the room's state, and an operator may ask why.

use aqueduct::{
    flows::operator::{
        explain::Explanation,
        operate::{self, Command, operate},
    },
    rooms::change::Outcome,
};
use serde_json::{Value, json};

use crate::{
    ingest::shared_room,
    rooms::Rooms,
    support::{TestClient, TestServer, encoded, remote::Remote},
};

fn levels(bob: u64) -> Value {
    json!({ "users": { "@alice:test.example": 100, "@bob:b.example": bob } })
}

async fn room_with_bob(alice: &TestClient) -> (String, Remote) {
    let more = json!({ "room_version": "11", "power_level_content_override": levels(50) });
    shared_room(alice, more).await
}

/// Bob sets the topic, and it comes in when he may no longer.
async fn late_topic(alice: &TestClient, room: &str, bob: &Remote) -> String {
    let topic = bob.event("m.room.topic", Some(""), json!({ "topic": "late" }), &bob.heads());
    let id = topic.id().to_string();
    alice.ok_put(&format!("/rooms/{room}/state/m.room.power_levels"), levels(0)).await;
    assert!(matches!(bob.send(topic).await, Outcome::Aside(..)));
    id
}

#[tokio::test(start_paused = true)]
async fn a_soft_failed_event_that_is_current_state_is_told() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let (room, bob) = room_with_bob(&alice).await;
    let since = alice.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
    let topic = late_topic(&alice, &room, &bob).await;
    alice.ok_put(&format!("/rooms/{room}/state/m.room.power_levels"), levels(50)).await;
    let mut prev = bob.heads();
    prev.push(topic.as_str().try_into().unwrap());
    let merge = bob.message("merge", &prev);
    let merge_id = merge.id().to_string();
    assert!(matches!(bob.send(merge).await, Outcome::Accepted(_)));
    assert_eq!(alice.state(&room, "m.room.topic", "").await.1["topic"], "late", "it is the current state");
    for path in [
        format!("/rooms/{room}/state"),
        format!("/sync?since={since}"),
        "/sync".to_owned(),
        "/sync?full_state=true".to_owned(),
        format!("/rooms/{room}/context/{}", encoded(&merge_id)),
    ] {
        let told = alice.ok_get(&path).await.to_string();
        assert!(told.contains(&topic), "{path}: {told}");
    }
    let page = alice.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=100")).await.to_string();
    assert!(!page.contains(&topic), "it is no part of the timeline: {page}");
}

async fn explain(server: &TestServer, event: &str, user: &str) -> Explanation {
    let command = Command::Explain { event: event.to_owned(), user: Some(user.to_owned()) };
    match operate(server.server().app(), command, |_| ()).await.unwrap() {
        operate::Outcome::Explained(found) => *found,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn an_operator_learns_where_an_event_stands_and_why_somebody_does_not_see_it() {
    let server = TestServer::new();
    let (alice, carol) = (server.register("alice").await, server.register("carol").await);
    let (room, bob) = room_with_bob(&alice).await;
    let app = server.server().app();
    let explain = async |event: &str, user: &str| explain(&server, event, user).await;
    let sees = |found: &Explanation| found.reader.as_ref().unwrap().sees;
    let said = alice.say(&room, "1", "hello").await;
    let of_alice = explain(&said, "alice").await;
    assert!(sees(&of_alice), "{of_alice}");
    assert_eq!((of_alice.verdict.as_str(), of_alice.is_head), ("accepted", true));
    assert!(
        of_alice.state_before.starts_with("that of the main line just below position "),
        "{}",
        of_alice.state_before
    );
    assert_eq!(of_alice.reader.unwrap().notified_by, None, "she sent it");
    let of_carol = explain(&said, &carol.user_id).await;
    assert!(
        !sees(&of_carol) && of_carol.to_string().contains("the user was nothing to the room"),
        "{of_carol}"
    );
    carol.ok_post(&format!("/join/{room}"), json!({})).await;
    let of_carol = explain(&alice.say(&room, "2", "hello carol").await, &carol.user_id).await;
    assert!(sees(&of_carol), "{of_carol}");
    assert_eq!(of_carol.reader.unwrap().notified_by.as_deref(), Some(".m.rule.message"));
    let topic = late_topic(&alice, &room, &bob).await;
    let aside = explain(&topic, "alice").await;
    assert!(aside.verdict.starts_with("soft-failed: ") && !aside.is_current_state, "{aside}");
    assert!(!sees(&aside), "{aside}");
    let command = Command::Explain { event: "$nowhere".to_owned(), user: None };
    assert!(operate(app, command, |_| ()).await.is_err());
}

/// The position with which a token of `/sync` begins.
fn position(sync: &Value) -> u64 {
    let token = sync["next_batch"].as_str().unwrap();
    token.trim_start_matches('s').split('_').next().unwrap().parse().unwrap()
}

#[tokio::test(start_paused = true)]
async fn an_operator_learns_that_sync_tells_a_reader_who_left_nothing_of_what_they_may_still_read() {
    let server = TestServer::new();
    let (alice, carol) = (server.register("alice").await, server.register("carol").await);
    let open =
        json!({ "type": "m.room.history_visibility", "content": { "history_visibility": "world_readable" } });
    let room = alice.create(json!({ "preset": "public_chat", "initial_state": [open] })).await;
    carol.ok_post(&format!("/join/{room}"), json!({})).await;
    let begun = carol.ok_get("/sync").await;
    let since = begun["next_batch"].as_str().unwrap();
    let during = alice.say(&room, "1", "during").await;
    carol.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
    let newest = alice.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=1")).await;
    let leave = newest["chunk"][0]["event_id"].as_str().unwrap().to_owned();
    let after = alice.say(&room, "2", "after").await;
    let ended = carol.ok_get(&format!("/sync?since={since}")).await;
    let page = carol.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=100")).await.to_string();
    for (event, is_told) in [(&during, true), (&leave, true), (&after, false)] {
        let found = explain(&server, event, "carol").await;
        let text = found.to_string();
        let reader = found.reader.unwrap();
        assert_eq!(reader.told_by_sync, is_told, "{text}");
        assert_eq!(ended.to_string().contains(event.as_str()), is_told, "{ended}");
        assert!(reader.sees && page.contains(event.as_str()), "{text}");
        assert_eq!(reader.notified_by, None, "who is not in the room is notified of nothing: {text}");
        assert!(text.contains("whose history was world_readable then"), "{text}");
        let at = found.position.unwrap();
        assert!(
            position(&begun) < at && at <= position(&ended) && text.contains(&format!("s{at}_")),
            "{text}"
        );
        assert!(
            text.contains(&format!("room is {} and the event {}", found.room_number, found.event_number))
        );
    }
    let of_alice = explain(&server, &after, "alice").await;
    assert!(of_alice.to_string().contains("is shown it, by /sync too"), "{of_alice}");
}
