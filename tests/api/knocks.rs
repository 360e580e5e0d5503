//! Knocking, as `/sync` tells the one who knocks.

use serde_json::{Value, json};

use crate::{
    support::{TestClient, TestServer},
    sync::{Chain, create_room, events, must, set_state},
};

/// A room at which one may knock.
async fn closed_room(alice: &TestClient) -> String {
    let rule = json!({ "type": "m.room.join_rules", "content": { "join_rule": "knock" } });
    let body = json!({ "name": "Before", "topic": "Closed", "initial_state": [rule] });
    create_room(alice, body).await
}

async fn knock(who: &TestClient, room: &str, reason: &str) {
    let (status, json) =
        who.post(&format!("/_matrix/client/v3/knock/{room}"), json!({ "reason": reason })).await;
    assert_eq!(status, http::StatusCode::OK, "{json}");
}

/// The state that a sync tells of a room at which its user knocks.
fn knocked(sync: &Value, room: &str) -> Option<Vec<Value>> {
    sync["rooms"]["knock"].get(room).map(|told| told["knock_state"]["events"].as_array().unwrap().clone())
}

#[tokio::test(start_paused = true)]
async fn a_knock_is_told_once_with_the_room_as_it_was_then() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = closed_room(&alice).await;
    let (mut alices, mut bobs) = (Chain::of(&alice), Chain::of(&bob));
    alices.next().await;
    bobs.next().await;
    knock(&bob, &room, "please").await;
    set_state(&alice, &room, "m.room.name", "", json!({ "name": "After" })).await;
    let told = bobs.next().await;
    let state = knocked(&told, &room).unwrap();
    let of = |event_type: &str| state.iter().find(|event| event["type"] == event_type);
    assert_eq!(of("m.room.name").unwrap()["content"]["name"], "Before");
    assert_eq!(of("m.room.join_rules").unwrap()["content"]["join_rule"], "knock");
    assert!(of("m.room.create").is_some() && of("m.room.topic").is_some());
    let own = state.last().unwrap();
    assert_eq!((&own["state_key"], &own["content"]["membership"]), (&json!(bob.user_id), &json!("knock")));
    assert_eq!(own["content"]["reason"], "please");
    // Somebody outside is told nothing of who is in the room.
    assert_eq!(state.iter().filter(|event| event["type"] == "m.room.member").count(), 1);
    assert!(state.iter().all(|event| event.get("event_id").is_none()), "{state:?}");
    for section in ["join", "invite", "leave"] {
        assert!(told["rooms"].get(section).is_none(), "{told}");
    }
    // That is told once, to a client that begins again, and with the whole state where a client asks for it.
    assert!(bobs.next().await.get("rooms").is_none());
    assert_eq!(knocked(&Chain::of(&bob).next().await, &room).unwrap(), state);
    bobs.query = "&full_state=true".to_owned();
    assert_eq!(knocked(&bobs.next().await, &room).unwrap(), state);
    bobs.query.clear();
    assert!(bobs.next().await.get("rooms").is_none());
    // Those in the room see it in its timeline.
    let members =
        events(&alices.next().await, "join", &room, "timeline").into_iter().cloned().collect::<Vec<_>>();
    assert_eq!(members[0]["content"]["membership"], "knock");
}

#[tokio::test(start_paused = true)]
async fn a_knock_ends_with_an_invitation_or_with_a_leave_and_may_come_again() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = closed_room(&alice).await;
    let mut bobs = Chain::of(&bob);
    bobs.next().await;
    let about = json!({ "user_id": bob.user_id });
    for (number, (who, what)) in
        [(&bob, "leave"), (&alice, "kick"), (&alice, "ban"), (&alice, "invite")].into_iter().enumerate()
    {
        knock(&bob, &room, &format!("{number}")).await;
        let told = bobs.next().await;
        let state = knocked(&told, &room).unwrap_or_else(|| panic!("the knock before {what}: {told}"));
        assert_eq!(state.last().unwrap()["content"]["reason"], number.to_string());
        must(who, &room, what, if what == "leave" { json!({}) } else { about.clone() }).await;
        let told = bobs.next().await;
        assert_eq!(knocked(&told, &room), None);
        if what == "invite" {
            assert!(told["rooms"]["invite"].get(&room).is_some(), "{told}");
        } else {
            let timeline = events(&told, "leave", &room, "timeline");
            let expected = if what == "ban" { "ban" } else { "leave" };
            assert_eq!((timeline.len(), &timeline[0]["content"]["membership"]), (1, &json!(expected)));
        }
        assert!(bobs.next().await.get("rooms").is_none(), "after {what}");
        if what == "ban" {
            must(&alice, &room, "unban", about.clone()).await;
            bobs.next().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_knock_at_a_room_that_a_filter_leaves_out_is_not_told() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (room, other) = (closed_room(&alice).await, closed_room(&alice).await);
    let filter = json!({ "room": { "not_rooms": [room] } });
    let mut without = Chain::filtered(&bob, filter);
    without.next().await;
    knock(&bob, &room, "a").await;
    assert!(without.next().await.get("rooms").is_none());
    knock(&bob, &other, "b").await;
    let told = without.next().await;
    assert!(knocked(&told, &room).is_none() && knocked(&told, &other).is_some());
}
