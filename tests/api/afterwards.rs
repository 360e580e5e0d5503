//! Who was kicked or banned, or was away for a time, learns nothing of what happened then: neither by filters, which judge how
//! events relate to others, nor by tokens, which say that there is more.

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    support::{TestClient, TestServer, encoded},
    sync::{Chain, create_room, events, must, say, send, set_state},
};

async fn relate(who: &TestClient, room: &str, kind: &str, to: &str) -> String {
    let content = json!({ "body": kind, "m.relates_to": { "rel_type": kind, "event_id": to, "key": "k" } });
    send(who, room, &format!("{kind} of {to}"), content).await
}

async fn ignore(who: &TestClient, ignored: Value) {
    let path = format!("/user/{}/account_data/m.ignored_user_list", who.user_id);
    who.ok_put(&path, json!({ "ignored_users": ignored })).await;
}

fn ids<'a>(list: impl IntoIterator<Item = &'a Value>) -> Vec<String> {
    list.into_iter().map(|event| event["event_id"].as_str().unwrap().to_owned()).collect()
}

/// The messages of a room that a filter lets through, by each way in which it is asked for. All of them say the same, and the events
/// around `near` are the same but for that one.
async fn filtered(who: &TestClient, room: &str, section: &str, near: &str, filter: Value) -> Vec<String> {
    let mut filter = filter;
    filter["types"] = json!(["m.room.message"]);
    let query = encoded(&filter.to_string());
    let page = who.ok_get(&format!("/rooms/{room}/messages?dir=f&limit=100&filter={query}")).await;
    let found = ids(page["chunk"].as_array().unwrap());
    let page = who.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=100&filter={query}")).await;
    assert_eq!(ids(page["chunk"].as_array().unwrap().iter().rev()), found, "{filter}");
    let around = format!("/rooms/{room}/context/{}?limit=100&filter={query}", encoded(near));
    let around = who.ok_get(&around).await;
    let list = |name: &str| around[name].as_array().unwrap().clone();
    let (before, after) = (list("events_before"), list("events_after"));
    let others: Vec<_> = found.iter().filter(|event| *event != near).cloned().collect();
    assert_eq!(ids(before.iter().rev().chain(&after)), others, "{filter}");
    let mut timeline = filter.clone();
    timeline["limit"] = json!(100);
    let filter = json!({ "room": { "timeline": timeline, "include_leave": true } });
    let sync = Chain::filtered(who, filter.clone()).next().await;
    assert_eq!(ids(events(&sync, section, room, "timeline")), found, "{filter}");
    found
}

#[tokio::test(start_paused = true)]
async fn a_filter_of_relations_tells_who_was_kicked_nothing_of_what_came_later() {
    let server = TestServer::new();
    let (alice, bob, carol) =
        (server.register("alice").await, server.register("bob").await, server.register("carol").await);
    let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
    for who in [&bob, &carol] {
        must(who, &room, "join", json!({})).await;
    }
    let first = say(&alice, &room, "first").await;
    let second = say(&alice, &room, "second").await;
    let third = say(&alice, &room, "third").await;
    relate(&carol, &room, "m.reference", &first).await;
    must(&alice, &room, "kick", json!({ "user_id": bob.user_id })).await;
    relate(&carol, &room, "m.annotation", &second).await;
    relate(&carol, &room, "m.thread", &third).await;
    let annotated = json!({ "related_by_rel_types": ["m.annotation"] });
    let threaded =
        json!({ "related_by_senders": [carol.user_id], "related_by_rel_types": ["m.thread", "org.test"] });
    let of_carol = json!({ "related_by_senders": [carol.user_id] });
    for (filter, seen_by_bob, seen_by_alice) in [
        (annotated, vec![], vec![&second]),
        (threaded, vec![], vec![&third]),
        (of_carol, vec![&first], vec![&first, &second, &third]),
    ] {
        assert_eq!(
            filtered(&bob, &room, "leave", &first, filter.clone()).await.iter().collect::<Vec<_>>(),
            seen_by_bob
        );
        assert_eq!(
            filtered(&alice, &room, "join", &first, filter).await.iter().collect::<Vec<_>>(),
            seen_by_alice
        );
    }
}

/// A room whose members see what was sent while they were there, and a message of Bob's. While he was away, Alice answered it.
async fn with_an_absence(
    alice: &TestClient,
    bob: &TestClient,
    carol: &TestClient,
) -> (String, String, String) {
    let content = json!({ "history_visibility": "joined" });
    let state = json!([{ "type": "m.room.history_visibility", "content": content }]);
    let room = create_room(alice, json!({ "preset": "public_chat", "initial_state": state })).await;
    must(carol, &room, "join", json!({})).await;
    must(bob, &room, "join", json!({})).await;
    let said = say(bob, &room, "said").await;
    must(bob, &room, "leave", json!({})).await;
    let hidden = relate(alice, &room, "m.thread", &said).await;
    must(bob, &room, "join", json!({})).await;
    (room, said, hidden)
}

#[tokio::test(start_paused = true)]
async fn what_happened_while_somebody_was_away_is_shown_by_no_relation() {
    let server = TestServer::new();
    let (alice, bob, carol) =
        (server.register("alice").await, server.register("bob").await, server.register("carol").await);
    let (room, said, hidden) = with_an_absence(&alice, &bob, &carol).await;
    for filter in
        [json!({ "related_by_rel_types": ["m.thread"] }), json!({ "related_by_senders": [alice.user_id] })]
    {
        assert!(filtered(&bob, &room, "join", &said, filter.clone()).await.is_empty(), "{filter}");
        assert_eq!(filtered(&carol, &room, "join", &said, filter).await, [&*said]);
    }
    // An event leads to another only by way of one that its reader sees.
    let further = relate(&alice, &room, "m.reference", &hidden).await;
    let path = format!("/_matrix/client/v1/rooms/{room}/relations/{}?recurse=true", encoded(&said));
    let listed = async |who: &TestClient| ids(who.get(&path).await.1["chunk"].as_array().unwrap());
    assert_eq!(listed(&bob).await, Vec::<String>::new());
    assert_eq!(listed(&carol).await, [further, hidden]);
    // Messages of somebody who is ignored are not there either, as long as that lasts.
    let answered = say(&bob, &room, "answered").await;
    relate(&carol, &room, "m.reference", &answered).await;
    let of_carol = json!({ "related_by_senders": [carol.user_id] });
    assert_eq!(filtered(&bob, &room, "join", &said, of_carol.clone()).await, [&*answered]);
    ignore(&bob, json!({ &carol.user_id: {} })).await;
    assert!(filtered(&bob, &room, "join", &said, of_carol).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_token_says_that_there_is_more_only_where_its_reader_sees_more() {
    let server = TestServer::new();
    let (alice, bob, carol) =
        (server.register("alice").await, server.register("bob").await, server.register("carol").await);
    let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
    must(&bob, &room, "join", json!({})).await;
    must(&carol, &room, "join", json!({})).await;
    let said = say(&alice, &room, "said").await;
    relate(&alice, &room, "m.annotation", &said).await;
    must(&alice, &room, "ban", json!({ "user_id": bob.user_id })).await;
    let pages = async |limit: usize| {
        let list = format!("/_matrix/client/v1/rooms/{room}/relations/{}", encoded(&said));
        let mut tokens = Vec::new();
        for path in [
            format!("/_matrix/client/v3/rooms/{room}/messages?dir=f&limit={limit}"),
            format!("{list}?dir=f&limit=1"),
            format!("{list}?dir=b&limit=1"),
            format!("{list}?dir=f&limit=1&recurse=true"),
            format!("{list}/m.annotation?dir=f&limit=1"),
            format!("{list}/m.thread?dir=f&limit=1"),
        ] {
            let (status, json) = bob.get(&path).await;
            assert_eq!(status, StatusCode::OK, "{path}: {json}");
            let token = json.get("end").or_else(|| json.get("next_batch")).cloned();
            tokens.push((path, json["chunk"].as_array().unwrap().len(), token));
        }
        tokens
    };
    let visible = pages(100).await[0].1;
    let before = pages(visible).await;
    assert_eq!(before.iter().map(|(_, count, _)| *count).collect::<Vec<_>>(), [visible, 1, 1, 1, 1, 0]);
    assert!(before.iter().all(|(.., token)| token.is_none()), "{before:?}");
    say(&carol, &room, "hidden").await;
    relate(&carol, &room, "m.annotation", &said).await;
    relate(&carol, &room, "m.thread", &said).await;
    assert_eq!(pages(visible).await, before);
    // Where there is more, there is a token.
    assert!(pages(visible - 1).await[0].2.is_some());
    let path = format!("/_matrix/client/v1/rooms/{room}/relations/{}?dir=f&limit=1", encoded(&said));
    let next = alice.get(&path).await.1["next_batch"].as_str().unwrap().to_owned();
    assert!(alice.get(&format!("{path}&from={next}")).await.1["next_batch"].is_string());
}

#[tokio::test(start_paused = true)]
async fn a_token_does_not_tell_of_what_happened_while_its_reader_was_away() {
    let server = TestServer::new();
    let (alice, bob, carol) =
        (server.register("alice").await, server.register("bob").await, server.register("carol").await);
    let (room, said, hidden) = with_an_absence(&alice, &bob, &carol).await;
    let after = say(&alice, &room, "after").await;
    relate(&alice, &room, "m.thread", &after).await;
    let threads = format!("/_matrix/client/v1/rooms/{room}/threads?limit=1");
    let listed = async |who: &TestClient, path: &str| {
        let (status, json) = who.get(path).await;
        assert_eq!(status, StatusCode::OK, "{path}: {json}");
        let next = json.get("next_batch").or_else(|| json.get("end"));
        (ids(json["chunk"].as_array().unwrap()), next.map(|next| next.as_str().unwrap().to_owned()))
    };
    assert_eq!(listed(&bob, &threads).await, (vec![after.clone()], None));
    let (first, next) = listed(&carol, &threads).await;
    assert_eq!(first, std::slice::from_ref(&after));
    let rest = format!("{threads}&from={}", next.unwrap());
    assert_eq!(listed(&carol, &rest).await, (vec![said.clone()], None));
    // A thread that he sees a part of comes next.
    relate(&carol, &room, "m.thread", &said).await;
    let (first, next) = listed(&bob, &threads).await;
    assert_eq!(first, std::slice::from_ref(&said));
    let rest = format!("{threads}&from={}", next.unwrap());
    assert_eq!(listed(&bob, &rest).await, (vec![after.clone()], None));
    let relations = format!("/_matrix/client/v1/rooms/{room}/relations/{}?dir=b&limit=1", encoded(&said));
    assert_eq!(listed(&bob, &relations).await.1, None);
    let (_, next) = listed(&carol, &relations).await;
    let rest = format!("{relations}&from={}", next.unwrap());
    assert_eq!(listed(&carol, &rest).await, (vec![hidden], None));
    // Events from before he came do not make a token either, and a further one that he sees does.
    let page = |limit: usize| format!("/_matrix/client/v3/rooms/{room}/messages?dir=b&limit={limit}");
    let visible = listed(&bob, &page(100)).await.0.len();
    assert_eq!(listed(&bob, &page(visible)).await.1, None);
    assert!(listed(&bob, &page(visible - 1)).await.1.is_some());
    set_state(&alice, &room, "m.room.topic", "", json!({ "topic": "news" })).await;
    assert!(listed(&bob, &page(visible)).await.1.is_some());
}
