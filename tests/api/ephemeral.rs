//! Typing and presence.

use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    support::{TestClient, TestServer},
    sync::{Chain, create_room, env, events, must},
};

async fn pair(server: &TestServer) -> (TestClient, TestClient, String) {
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
    must(&bob, &room, "join", json!({})).await;
    (alice, bob, room)
}

async fn types(client: &TestClient, room: &str, body: Value) -> StatusCode {
    let path = format!("/_matrix/client/v3/rooms/{room}/typing/{}", client.user_id);
    client.put(&path, body).await.0
}

fn typists(sync: &Value, room: &str) -> Option<Vec<String>> {
    let event =
        events(sync, "join", room, "ephemeral").into_iter().find(|event| event["type"] == "m.typing")?;
    Some(event["content"]["user_ids"].as_array()?.iter().map(|id| id.as_str().unwrap().to_owned()).collect())
}

#[tokio::test(start_paused = true)]
async fn typing_is_told_and_ends_by_itself() {
    let server = TestServer::new();
    let (alice, bob, room) = pair(&server).await;
    let mut chain = Chain::of(&alice);
    chain.next().await;
    assert_eq!(types(&bob, &room, json!({ "typing": true, "timeout": 10_000 })).await, StatusCode::OK);
    assert_eq!(typists(&chain.next().await, &room), Some(vec![bob.user_id.clone()]));
    assert_eq!(types(&bob, &room, json!({ "typing": true, "timeout": 20_000 })).await, StatusCode::OK);
    assert!(chain.next().await.get("rooms").is_none());
    // Who begins is told, too.
    assert_eq!(typists(&Chain::of(&alice).next().await, &room), Some(vec![bob.user_id.clone()]));
    let started = env(&server).instant();
    let ended = chain.next_within(60_000).await;
    assert_eq!(typists(&ended, &room), Some(vec![]));
    assert!((19..22).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
    types(&bob, &room, json!({ "typing": true, "timeout": 30_000 })).await;
    chain.next().await;
    types(&bob, &room, json!({ "typing": false })).await;
    assert_eq!(typists(&chain.next().await, &room), Some(vec![]));
    assert_eq!(typists(&Chain::of(&alice).next().await, &room), None);
}

#[tokio::test(start_paused = true)]
async fn who_leaves_types_no_longer_and_finds_their_account_data_again() {
    let server = TestServer::new();
    let (alice, bob, room) = pair(&server).await;
    let tag = format!("/_matrix/client/v3/user/{}/rooms/{room}/tags/u.work", bob.user_id);
    assert_eq!(bob.put(&tag, json!({})).await.0, StatusCode::OK);
    let (mut hers, mut his) = (Chain::of(&alice), Chain::of(&bob));
    hers.next().await;
    his.next().await;
    types(&bob, &room, json!({ "typing": true, "timeout": 30_000 })).await;
    assert_eq!(typists(&hers.next().await, &room), Some(vec![bob.user_id.clone()]));
    must(&bob, &room, "leave", json!({})).await;
    assert_eq!(typists(&hers.next().await, &room), Some(vec![]));
    his.next().await;
    must(&bob, &room, "join", json!({})).await;
    let back = his.next().await;
    let data = events(&back, "join", &room, "account_data");
    assert_eq!(data.len(), 1, "a client may have forgotten what it knew of the room: {data:?}");
    assert_eq!(data[0]["type"], "m.tag");
}

#[tokio::test(start_paused = true)]
async fn one_types_for_oneself_in_rooms_one_is_in() {
    let server = TestServer::new();
    let (alice, bob, room) = pair(&server).await;
    let stranger = server.register("stranger").await;
    assert_eq!(types(&bob, &room, json!({ "typing": true })).await, StatusCode::OK, "no time is asked for");
    assert_eq!(types(&stranger, &room, json!({ "typing": true, "timeout": 1 })).await, StatusCode::FORBIDDEN);
    let path = format!("/_matrix/client/v3/rooms/{room}/typing/{}", bob.user_id);
    assert_eq!(alice.put(&path, json!({ "typing": true, "timeout": 1 })).await.0, StatusCode::FORBIDDEN);
    assert!(alice.put(&path, json!({ "typing": "yes" })).await.0.is_client_error());
}

fn presence_of<'a>(sync: &'a Value, user: &str) -> Option<&'a Value> {
    let mut events = sync["presence"]["events"].as_array()?.iter();
    events.find(|event| event["sender"] == user).map(|event| &event["content"])
}

#[tokio::test(start_paused = true)]
async fn presence_is_told_to_those_who_share_a_room() {
    let server = TestServer::new();
    let (alice, bob, _room) = pair(&server).await;
    let stranger = server.register("stranger").await;
    let (mut alices, mut strangers) = (Chain::of(&alice), Chain::of(&stranger));
    alices.next().await;
    strangers.next().await;
    let path = format!("/_matrix/client/v3/presence/{}/status", bob.user_id);
    let (status, json) = bob.put(&path, json!({ "presence": "unavailable", "status_msg": "busy" })).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    let told = alices.next().await;
    let content = presence_of(&told, &bob.user_id).unwrap();
    assert_eq!((&content["presence"], &content["status_msg"]), (&json!("unavailable"), &json!("busy")));
    assert!(strangers.next().await.get("presence").is_none());
    let (_, asked) = alice.get(&path).await;
    assert_eq!((&asked["presence"], &asked["status_msg"]), (&json!("unavailable"), &json!("busy")));
    assert_eq!(stranger.get(&path).await.0, StatusCode::FORBIDDEN);
    assert_eq!(alice.put(&path, json!({ "presence": "online" })).await.0, StatusCode::FORBIDDEN);
    assert_eq!(bob.put(&path, json!({ "presence": "asleep" })).await.0, StatusCode::BAD_REQUEST);
    let nobody = "/_matrix/client/v3/presence/@nobody:test.example/status";
    assert_eq!(alice.get(nobody).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test(start_paused = true)]
async fn who_polls_is_online_until_the_polls_end() {
    let server = TestServer::new();
    let (alice, bob, _room) = pair(&server).await;
    let mut chain = Chain::of(&alice);
    chain.next().await;
    bob.get("/_matrix/client/v3/sync").await;
    assert_eq!(presence_of(&chain.next().await, &bob.user_id).unwrap()["presence"], "online");
    bob.get("/_matrix/client/v3/sync?set_presence=online").await;
    assert!(chain.next().await.get("presence").is_none());
    env(&server).sleep(Duration::from_secs(65)).await;
    assert_eq!(presence_of(&chain.next().await, &bob.user_id).unwrap()["presence"], "offline");
}

#[tokio::test(start_paused = true)]
async fn who_comes_to_a_room_is_seen_there_at_once() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
    let path = format!("/_matrix/client/v3/presence/{}/status", bob.user_id);
    bob.put(&path, json!({ "presence": "online", "status_msg": "new here" })).await;
    let (mut alices, mut bobs) = (Chain::of(&alice), Chain::of(&bob));
    alices.next().await;
    bobs.next().await;
    assert_eq!(types(&alice, &room, json!({ "typing": true, "timeout": 30_000 })).await, StatusCode::OK);
    must(&bob, &room, "join", json!({})).await;
    let told = alices.next().await;
    assert_eq!(presence_of(&told, &bob.user_id).unwrap()["status_msg"], "new here");
    assert_eq!(typists(&bobs.next().await, &room), Some(vec![alice.user_id.clone()]));
}
