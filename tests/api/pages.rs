//! Pages of a room's timeline, and the context of an event: where they end, and for whom.

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
