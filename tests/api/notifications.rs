//! `GET /notifications`, of `src/api/client/push.rs`.

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{TestClient, TestServer, encoded},
};

/// The texts of the notifications of a page, newest first, with a mark on those that were read.
fn texts(page: &Value) -> Vec<String> {
    let text = |it: &Value| {
        let event = &it["event"];
        let text = event["content"]["body"].as_str().unwrap_or_else(|| event["type"].as_str().unwrap());
        if it["read"] == true { format!("({text})") } else { text.to_owned() }
    };
    page["notifications"].as_array().unwrap().iter().map(text).collect()
}

async fn list(client: &TestClient, query: &str) -> Value {
    client.ok_get(&format!("/notifications{query}")).await
}

async fn joined(by: &TestClient, others: &[&TestClient]) -> String {
    let room = by.create(json!({ "preset": "public_chat" })).await;
    for other in others {
        other.ok_post(&format!("/join/{room}"), json!({})).await;
    }
    room
}

#[tokio::test(start_paused = true)]
async fn notifications_of_all_rooms_are_listed_newest_first_and_by_pages() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    assert_eq!(list(&alice, "").await, json!({ "notifications": [] }));
    let rooms = [joined(&bob, &[&alice]).await, joined(&bob, &[&alice]).await, joined(&bob, &[&alice]).await];
    let mut expected = Vec::new();
    for number in 0..30_usize {
        let text = format!("message {number}");
        bob.say(&rooms[number * number % 3], &number.to_string(), &text).await;
        expected.insert(0, text);
    }
    alice.say(&rooms[0], "own", "of my own").await;
    let all = list(&alice, "?limit=100").await;
    let first_of_room_0 = expected.iter().position(|text| text == "message 27").unwrap();
    assert_eq!(all.get("next_token"), None);
    // Sending in a room marks what came before there as read.
    let shown: Vec<_> = texts(&all).iter().map(|text| text.trim_matches(['(', ')']).to_owned()).collect();
    assert_eq!(shown, expected);
    assert!(texts(&all)[first_of_room_0].starts_with('('));
    let mut query = "?limit=7".to_owned();
    let mut paged = Vec::new();
    for _ in 0..10 {
        let page = list(&alice, &query).await;
        paged.extend(texts(&page));
        let Some(next) = page["next_token"].as_str() else { break };
        query = format!("?limit=7&from={next}");
    }
    assert_eq!(paged, texts(&all));
    let it = &all["notifications"][1];
    assert_eq!(it["actions"], json!(["notify", { "set_tweak": "sound", "value": "default" }]));
    assert_eq!(it["profile_tag"], Value::Null);
    assert_eq!(it["ts"], it["event"]["origin_server_ts"]);
    assert!(rooms.contains(&it["room_id"].as_str().unwrap().to_owned()));
    assert_eq!((&it["event"]["sender"], it["event"].get("room_id")), (&json!(bob.user_id), None));
}

#[tokio::test(start_paused = true)]
async fn only_what_notifies_now_and_may_be_seen_is_listed() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let carol = server.register("carol").await;
    let before = joined(&bob, &[]).await;
    bob.say(&before, "1", "before she joined").await;
    alice.ok_post(&format!("/join/{before}"), json!({})).await;
    let room = joined(&bob, &[&alice, &carol]).await;
    let redacted = bob.say(&room, "1", "redacted").await;
    let mention =
        json!({ "msgtype": "m.text", "body": "mention", "m.mentions": { "user_ids": [alice.user_id] } });
    bob.ok_put(&format!("/rooms/{room}/send/m.room.message/2"), mention).await;
    bob.ok_put(&format!("/rooms/{room}/send/m.reaction/3"), json!({ "m.relates_to": {} })).await;
    carol.say(&room, "4", "ignored").await;
    let seen = bob.say(&room, "5", "seen").await;
    bob.say(&room, "6", "unseen").await;
    let left = joined(&bob, &[&alice]).await;
    bob.say(&left, "7", "left").await;
    bob.ok_put(&format!("/rooms/{room}/redact/{}/8", encoded(&redacted)), json!({})).await;
    alice.ok_post(&format!("/rooms/{room}/receipt/m.read/{}", encoded(&seen)), json!({})).await;
    let private = bob.create(json!({ "invite": [alice.user_id] })).await;
    let everything = texts(&list(&alice, "").await);
    assert_eq!(everything, ["m.room.member", "left", "unseen", "(seen)", "(ignored)", "(mention)"]);
    assert_eq!(texts(&list(&alice, "?only=highlight").await), ["(mention)"]);
    alice.ok_post(&format!("/rooms/{left}/leave"), json!({})).await;
    alice.ok_post(&format!("/rooms/{private}/leave"), json!({})).await;
    let ignored = json!({ "ignored_users": { carol.user_id.as_str(): {} } });
    alice.ok_put(&format!("/user/{}/account_data/m.ignored_user_list", alice.user_id), ignored).await;
    assert_eq!(texts(&list(&alice, "").await), ["unseen", "(seen)", "(mention)"]);
    let rule = format!("/pushrules/global/room/{}", encoded(&room));
    alice.ok_put(&rule, json!({ "actions": [] })).await;
    assert_eq!(texts(&list(&alice, "").await), ["(mention)"]);
    assert!(
        texts(&list(&bob, "").await).is_empty() || !texts(&list(&bob, "").await).contains(&"seen".to_owned())
    );
}

#[tokio::test(start_paused = true)]
async fn a_page_costs_a_bounded_number_of_events_and_says_where_the_next_begins() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = joined(&bob, &[&alice]).await;
    bob.say(&room, "first", "first").await;
    for number in 0..1_050 {
        bob.ok_put(&format!("/rooms/{room}/send/m.reaction/{number}"), json!({})).await;
    }
    let page = list(&alice, "").await;
    assert!(texts(&page).is_empty());
    let page = list(&alice, &format!("?from={}", page["next_token"].as_str().unwrap())).await;
    assert_eq!((texts(&page), page.get("next_token")), (vec!["first".to_owned()], None));
}

#[tokio::test(start_paused = true)]
async fn odd_parameters_are_refused_or_bounded() {
    let alice = TestServer::new().register("alice").await;
    for query in ["?from=x", "?from=-1", "?from=99999999999999999999", "?only=lowlight", "?limit=x"] {
        let (status, json) = alice.get(&format!("/_matrix/client/v3/notifications{query}")).await;
        assert_eq!(
            (status, &json["errcode"]),
            (StatusCode::BAD_REQUEST, &json!("M_INVALID_PARAM")),
            "{query}"
        );
    }
    for query in ["?limit=0", "?limit=1000000000", "?only=", "?from=0", "?from=5"] {
        list(&alice, query).await;
    }
}
