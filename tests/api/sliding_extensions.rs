//! The extensions of sliding sync: what is told beside the rooms themselves.

use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    sliding_sync::Slide,
    support::{TestClient, TestServer, encoded},
    sync::{act, create_room, env, must, room_of_two, say},
};

fn with(name: &str, extension: Value) -> Value {
    let list = json!({ "ranges": [[0, 9]], "timeline_limit": 1, "required_state": [] });
    json!({ "lists": { "all": list }, "extensions": { name: extension } })
}

async fn type_in(client: &TestClient, room: &str, typing: bool) {
    let path = format!("/rooms/{room}/typing/{}", client.user_id);
    client.ok_put(&path, json!({ "typing": typing, "timeout": 20_000 })).await;
}

async fn read(client: &TestClient, room: &str, event: &str) {
    let (status, json) = act(client, room, &format!("receipt/m.read/{}", encoded(event)), json!({})).await;
    assert_eq!(status, StatusCode::OK, "{json}");
}

async fn send_to_device(from: &TestClient, to: &TestClient, number: usize) {
    let body = json!({ "messages": { &to.user_id: { "*": { "number": number } } } });
    from.ok_put(&format!("/sendToDevice/org.example.test/{number}"), body).await;
}

fn numbers(answer: &Value) -> Vec<u64> {
    let events = answer["extensions"]["to_device"]["events"].as_array().unwrap();
    events.iter().map(|event| event["content"]["number"].as_u64().unwrap()).collect()
}

#[tokio::test(start_paused = true)]
async fn messages_to_the_device_wait_until_it_confirms_them() {
    let server = TestServer::new();
    let (alice, bob, _) = room_of_two(&server).await;
    for number in 0..5 {
        send_to_device(&alice, &bob, number).await;
    }
    let mut slide =
        Slide::of(&bob, json!({ "extensions": { "to_device": { "enabled": true, "limit": 2 } } }));
    let first = slide.next().await;
    assert_eq!(numbers(&first), [0, 1]);
    assert_eq!(numbers(&slide.next().await), [0, 1], "they were not confirmed");
    let mut seen = Vec::new();
    let mut since = first["extensions"]["to_device"]["next_batch"].clone();
    for _ in 0..3 {
        slide.body["extensions"]["to_device"]["since"] = since;
        let next = slide.next().await;
        seen.extend(numbers(&next));
        since = next["extensions"]["to_device"]["next_batch"].clone();
    }
    assert_eq!(seen, [2, 3, 4]);
    slide.body["extensions"]["to_device"]["since"] = since.clone();
    let (woken, ()) = tokio::join!(slide.next_within(30_000), async {
        env(&server).sleep(Duration::from_secs(1)).await;
        send_to_device(&alice, &bob, 5).await;
    });
    assert_eq!(numbers(&woken), [5]);
    // The token of another device confirms nothing.
    let other = bob.on_device("OTHER").await;
    send_to_device(&alice, &other, 6).await;
    let body = json!({ "extensions": { "to_device": { "enabled": true, "since": since } } });
    assert_eq!(numbers(&Slide::of(&other, body).next().await), [6]);
}

#[tokio::test(start_paused = true)]
async fn device_lists_are_told_from_where_they_were_told_last() {
    let server = TestServer::new();
    let (alice, bob, _) = room_of_two(&server).await;
    let on = json!({ "enabled": true });
    let mut slide = Slide::of(&bob, json!({ "extensions": { "e2ee": on } }));
    let first = slide.next().await;
    assert_eq!(first["extensions"]["e2ee"]["device_one_time_keys_count"], json!({ "signed_curve25519": 0 }));
    assert_eq!(first["extensions"]["e2ee"]["device_unused_fallback_key_types"], json!([]));
    assert!(first["extensions"]["e2ee"]["device_lists"].is_null());
    let upload = |client: &TestClient| {
        let (client, keys) = (
            client.clone(),
            json!({ "device_keys": {
                "user_id": client.user_id, "device_id": client.device_id, "algorithms": [], "keys": {}, "signatures": {},
            } }),
        );
        async move { client.ok_post("/keys/upload", keys).await }
    };
    upload(&alice).await;
    let changed = |answer: &Value, part: &str| answer["extensions"]["e2ee"]["device_lists"][part].clone();
    let next = slide.next_within(30_000).await;
    assert_eq!(changed(&next, "changed"), json!([alice.user_id]));
    assert!(changed(&slide.next().await, "changed").is_null());
    // Without the extension, a change waits until it is asked for again.
    slide.body["extensions"] = json!({});
    let carol = server.register("carol").await;
    let room = create_room(&carol, json!({ "preset": "public_chat" })).await;
    must(&bob, &room, "join", json!({})).await;
    slide.next().await;
    slide.next().await;
    slide.body["extensions"] = json!({ "e2ee": on });
    let next = slide.next().await;
    assert!(changed(&next, "changed").as_array().unwrap().contains(&carol.user_id.clone().into()), "{next}");
    must(&bob, &room, "leave", json!({})).await;
    assert_eq!(changed(&slide.next().await, "left"), json!([carol.user_id]));
}

#[tokio::test(start_paused = true)]
async fn account_data_is_told_whole_and_then_as_it_changes() {
    let server = TestServer::new();
    let (alice, _, room) = room_of_two(&server).await;
    let data = format!("/user/{}", alice.user_id);
    alice.ok_put(&format!("{data}/account_data/org.example.a"), json!({ "a": 1 })).await;
    alice.ok_put(&format!("{data}/rooms/{room}/account_data/org.example.r"), json!({ "r": 1 })).await;
    let mut slide = Slide::of(&alice, with("account_data", json!({ "enabled": true })));
    let global = |answer: &Value| -> Vec<String> {
        let list = answer["extensions"]["account_data"]["global"].as_array().cloned().unwrap_or_default();
        list.iter().map(|event| event["type"].as_str().unwrap().to_owned()).collect()
    };
    let of_room = |answer: &Value| answer["extensions"]["account_data"]["rooms"][&room].clone();
    let first = slide.next().await;
    assert_eq!(global(&first), ["org.example.a", "m.push_rules"]);
    assert_eq!(of_room(&first), json!([{ "type": "org.example.r", "content": { "r": 1 } }]));
    assert!(slide.next().await["extensions"]["account_data"].is_null());
    alice.ok_put(&format!("{data}/account_data/org.example.b"), json!({ "b": 1 })).await;
    assert_eq!(global(&slide.next_within(30_000).await), ["org.example.b"]);
    // Changes while the extension is off are told when it is on again.
    slide.body["extensions"] = json!({});
    slide.next().await;
    alice.ok_put(&format!("{data}/rooms/{room}/account_data/org.example.r"), json!({ "r": 2 })).await;
    alice.ok_put(&format!("{data}/account_data/org.example.a"), json!({ "a": 2 })).await;
    slide.next().await;
    slide.body["extensions"] = json!({ "account_data": { "enabled": true, "rooms": [], "lists": [] } });
    let next = slide.next().await;
    assert_eq!((global(&next), of_room(&next)), (vec!["org.example.a".to_owned()], Value::Null));
    slide.body["extensions"] = json!({ "account_data": { "enabled": true, "lists": ["all"] } });
    assert_eq!(of_room(&slide.next().await)[0]["content"], json!({ "r": 2 }));
    // So are those of a room that no list shows for a while.
    slide.body["lists"]["all"]["ranges"] = json!([]);
    slide.next().await;
    alice.ok_put(&format!("{data}/rooms/{room}/account_data/org.example.r"), json!({ "r": 3 })).await;
    slide.next().await;
    slide.next().await;
    slide.body["lists"]["all"]["ranges"] = json!([[0, 9]]);
    assert_eq!(of_room(&slide.next().await)[0]["content"], json!({ "r": 3 }));
}

#[tokio::test(start_paused = true)]
async fn receipts_and_typing_are_told_of_the_rooms_that_are_shown() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let other = create_room(&alice, json!({ "preset": "public_chat" })).await;
    let event = say(&alice, &room, "hello").await;
    read(&bob, &room, &event).await;
    type_in(&bob, &room, true).await;
    let on = json!({ "enabled": true });
    let mut body = with("receipts", on.clone());
    body["extensions"]["typing"] = on;
    body["lists"]["all"]["ranges"] = json!([[0, 0]]);
    let mut slide = Slide::of(&alice, body);
    let receipts = |answer: &Value| answer["extensions"]["receipts"]["rooms"].clone();
    let typing = |answer: &Value| answer["extensions"]["typing"]["rooms"].clone();
    let first = slide.next().await;
    assert!(receipts(&first)[&room]["content"][&event]["m.read"][&bob.user_id]["ts"].is_u64(), "{first:#}");
    assert_eq!(
        typing(&first)[&room],
        json!({ "type": "m.typing", "content": { "user_ids": [bob.user_id] } })
    );
    let idle = slide.next().await;
    assert!(receipts(&idle).is_null() && typing(&idle).is_null(), "{idle:#}");
    type_in(&bob, &room, false).await;
    assert_eq!(typing(&slide.next_within(30_000).await)[&room]["content"]["user_ids"], json!([]));
    // While another room is shown, Bob begins to type and reads on. Both are told when his room is back.
    say(&alice, &other, "elsewhere").await;
    slide.next().await;
    type_in(&bob, &room, true).await;
    let out_of_range = slide.next().await;
    assert!(typing(&out_of_range).is_null(), "{out_of_range:#}");
    let event = say(&alice, &room, "more").await;
    read(&bob, &room, &event).await;
    let next = slide.next().await;
    assert!(receipts(&next)[&room]["content"][&event]["m.read"][&bob.user_id].is_object(), "{next:#}");
    assert_eq!(typing(&next)[&room]["content"]["user_ids"], json!([bob.user_id]));
    // A client may want them of subscribed rooms alone.
    slide.body["extensions"]["receipts"] = json!({ "enabled": true, "lists": [], "rooms": ["*"] });
    let event = say(&alice, &room, "most").await;
    read(&bob, &room, &event).await;
    assert!(receipts(&slide.next().await).is_null());
    slide.body["room_subscriptions"] = json!({ &room: { "timeline_limit": 1, "required_state": [] } });
    let next = slide.next().await;
    assert!(receipts(&next)[&room]["content"][&event]["m.read"][&bob.user_id].is_object(), "{next:#}");
    assert!(receipts(&slide.next().await).is_null());
}

#[tokio::test(start_paused = true)]
async fn extensions_of_unknown_names_are_passed_over() {
    let server = TestServer::new();
    let (alice, _, room) = room_of_two(&server).await;
    let mut body = with("org.example.unknown", json!({ "enabled": true, "deep": [[[[]]]] }));
    body["extensions"]["typing"] = Value::Null;
    let answer = Slide::of(&alice, body).next().await;
    assert!(answer["rooms"][&room].is_object());
    assert_eq!(answer["extensions"], json!({}));
}
