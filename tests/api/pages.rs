//! Pages of a room's timeline, and the context of an event: where they end, and for whom.

use http::StatusCode;
use serde_json::json;

use crate::{rooms::Rooms, support::TestServer};

#[tokio::test(start_paused = true)]
async fn a_page_that_has_the_newest_event_says_where_to_go_on() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    let since = alice.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
    let first = alice.say(&room, "1", "first").await;
    let page = |client: &crate::support::TestClient, from: &str, more: &str| {
        let (client, path) = (client.clone(), format!("/rooms/{room}/messages?dir=f&from={from}{more}"));
        async move { client.ok_get(&path).await }
    };
    let answer = page(&alice, &since, "").await;
    assert_eq!(answer["chunk"][0]["event_id"], first);
    let end = answer["end"].as_str().unwrap().to_owned();
    // A client that reads until there is no token comes to an end, and may go on later.
    let answer = page(&alice, &end, "").await;
    assert_eq!((&answer["chunk"], answer.get("end")), (&json!([]), None));
    assert!(page(&alice, &since, &format!("&to={end}")).await.get("end").is_none());
    let second = alice.say(&room, "2", "second").await;
    let answer = page(&alice, &end, "").await;
    assert_eq!(
        (answer["chunk"].as_array().unwrap().len(), &answer["chunk"][0]["event_id"]),
        (1, &second.into())
    );
    // Somebody who left sees nothing more, so that nothing is left to go on to.
    bob.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
    let answer = page(&bob, &since, "").await;
    assert_eq!((answer["chunk"].as_array().unwrap().len(), answer.get("end")), (3, None));
    let answer = alice.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=100")).await;
    assert!(answer.get("end").is_none(), "the room has a beginning");
}

#[tokio::test(start_paused = true)]
async fn who_may_see_nothing_of_a_room_is_told_so_and_not_which_events_it_has() {
    let server = TestServer::new();
    let (alice, eve) = (server.register("alice").await, server.register("eve").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    let event = alice.say(&room, "1", "text").await;
    let context = async |event: &str| {
        let path = format!("/_matrix/client/v3/rooms/{room}/context/{event}");
        let (status, json) = eve.get(&path).await;
        (status, json["errcode"].as_str().unwrap_or_default().to_owned())
    };
    for event in [event.as_str(), "$none"] {
        assert_eq!(context(event).await, (StatusCode::FORBIDDEN, "M_FORBIDDEN".to_owned()));
    }
    let visible = json!({ "history_visibility": "world_readable" });
    alice.ok_put(&format!("/rooms/{room}/state/m.room.history_visibility/"), visible).await;
    assert_eq!(context("$none").await, (StatusCode::NOT_FOUND, "M_NOT_FOUND".to_owned()));
    let seen = alice.say(&room, "2", "text").await;
    assert_eq!(context(&seen).await, (StatusCode::OK, String::new()));
    assert_eq!(context(&event).await, (StatusCode::NOT_FOUND, "M_NOT_FOUND".to_owned()));
}
