//! `src/api/client/account_data.rs`, `src/api/client/tags.rs`, `src/api/client/filter.rs`

use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{
    support::{TestServer, encoded},
    sync::{Chain, bodies, create_room, must, say},
};

const USER: &str = "/_matrix/client/v3/user/@alice:test.example";

#[tokio::test(start_paused = true)]
async fn what_is_kept_comes_back_as_it_was_global_and_for_a_room() {
    let alice = TestServer::new().register("alice").await;
    let global = format!("{USER}/account_data/org.example.settings");
    let room = create_room(&alice, json!({})).await;
    let room = format!("{USER}/rooms/{room}/account_data/org.example.settings");
    assert_eq!(alice.get(&global).await.1["errcode"], "M_NOT_FOUND");
    assert_eq!(
        alice.put(&global, json!({ "a": [1, 2.5, { "b": null }] })).await,
        (StatusCode::OK, json!({}))
    );
    assert_eq!(alice.put(&room, json!({ "here": true })).await.0, StatusCode::OK);
    assert_eq!(alice.get(&global).await, (StatusCode::OK, json!({ "a": [1, 2.5, { "b": null }] })));
    assert_eq!(alice.get(&room).await, (StatusCode::OK, json!({ "here": true })));
    assert_eq!(alice.put(&global, json!({})).await.0, StatusCode::OK);
    assert_eq!(alice.get(&global).await.1["errcode"], "M_NOT_FOUND", "an empty object is none");
}

#[tokio::test(start_paused = true)]
async fn account_data_of_others_and_of_the_server_is_not_written() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    for path in [
        format!("{USER}/account_data/a"),
        format!("{USER}/rooms/!r:s/account_data/a"),
        format!("{USER}/filter"),
    ] {
        let (status, json) = if path.ends_with("filter") {
            bob.post(&path, json!({})).await
        } else {
            bob.put(&path, json!({})).await
        };
        assert_eq!(
            (status, json["errcode"].as_str()),
            (StatusCode::FORBIDDEN, Some("M_FORBIDDEN")),
            "{path}"
        );
        assert!(!bob.get(&path).await.0.is_success());
    }
    for kind in ["m.fully_read", "m.push_rules"] {
        for place in [USER.to_owned(), format!("{USER}/rooms/!r:s")] {
            let (status, json) = alice.put(&format!("{place}/account_data/{kind}"), json!({})).await;
            assert_eq!(
                (status, json["errcode"].as_str()),
                (StatusCode::METHOD_NOT_ALLOWED, Some("M_BAD_JSON"))
            );
        }
    }
    assert!(alice.get(&format!("{USER}/account_data/m.push_rules")).await.1["global"]["override"].is_array());
}

#[tokio::test(start_paused = true)]
async fn bodies_that_are_no_objects_are_refused() {
    let alice = TestServer::new().register("alice").await;
    let path = format!("{USER}/account_data/a");
    for (body, code) in
        [("[]", "M_BAD_JSON"), ("1", "M_BAD_JSON"), ("{", "M_NOT_JSON"), ("{} x", "M_NOT_JSON")]
    {
        let (status, json) =
            alice.server.raw(Method::PUT, &path, alice.token.as_deref(), body.to_owned()).await;
        assert_eq!((status, json["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some(code)), "{body}");
    }
    let (status, json) = alice.put(&path, json!({ "a": "a".repeat(600_000) })).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::PAYLOAD_TOO_LARGE, Some("M_TOO_LARGE")));
    let (status, _) = alice.put(&format!("{USER}/rooms/nothing/account_data/a"), json!({})).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}

#[tokio::test(start_paused = true)]
async fn tags_are_put_listed_and_taken_off() {
    let alice = TestServer::new().register("alice").await;
    let room = create_room(&alice, json!({})).await;
    let tags = format!("{USER}/rooms/{room}/tags");
    assert_eq!(alice.get(&tags).await, (StatusCode::OK, json!({ "tags": {} })));
    assert_eq!(
        alice.put(&format!("{tags}/m.favourite"), json!({ "order": 0.25 })).await,
        (StatusCode::OK, json!({}))
    );
    assert_eq!(alice.put(&format!("{tags}/u.work"), json!({})).await.0, StatusCode::OK);
    let expected = json!({ "tags": { "m.favourite": { "order": 0.25 }, "u.work": {} } });
    assert_eq!(alice.get(&tags).await, (StatusCode::OK, expected.clone()));
    let as_data = format!("{USER}/rooms/{room}/account_data/m.tag");
    assert_eq!(alice.get(&as_data).await, (StatusCode::OK, expected));
    assert_eq!(alice.delete(&format!("{tags}/u.work"), json!({})).await, (StatusCode::OK, json!({})));
    assert_eq!(alice.delete(&format!("{tags}/u.none"), json!({})).await.0, StatusCode::OK);
    assert_eq!(alice.get(&tags).await.1, json!({ "tags": { "m.favourite": { "order": 0.25 } } }));
    assert_eq!(alice.put(&as_data, json!({ "tags": 3 })).await.0, StatusCode::OK);
    assert_eq!(alice.put(&format!("{tags}/u.new"), json!({})).await.0, StatusCode::OK);
    assert_eq!(alice.get(&tags).await.1, json!({ "tags": { "u.new": {} } }));
    let (status, _) = alice.put(&format!("{tags}/u.new"), json!({ "order": "high" })).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(alice.put(&format!("{tags}/{}", "a".repeat(256)), json!({})).await.0, StatusCode::BAD_REQUEST);
}

#[tokio::test(start_paused = true)]
async fn filters_are_kept_and_wrong_ones_refused() {
    let alice = TestServer::new().register("alice").await;
    let path = format!("{USER}/filter");
    let filter = json!({ "room": { "timeline": { "limit": 10, "org.example.new": 1 } } });
    let (status, json) = alice.post(&path, filter.clone()).await;
    assert_eq!(status, StatusCode::OK);
    let id = json["filter_id"].as_str().unwrap().to_owned();
    assert!(!id.starts_with('{'));
    assert_eq!(alice.get(&format!("{path}/{id}")).await, (StatusCode::OK, filter.clone()));
    assert_eq!(alice.post(&path, filter).await.1["filter_id"], id, "the same filter is kept once");
    assert_eq!(alice.get(&format!("{path}/none")).await.1["errcode"], "M_NOT_FOUND");
    let wrong: [Value; 3] = [
        json!({ "room": { "timeline": { "limit": -1 } } }),
        json!({ "room": { "rooms": ["not a room"] } }),
        json!({ "presence": { "senders": [1] } }),
    ];
    for filter in wrong {
        let (status, json) = alice.post(&path, filter.clone()).await;
        assert_eq!(
            (status, json["errcode"].as_str()),
            (StatusCode::BAD_REQUEST, Some("M_BAD_JSON")),
            "{filter}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_kept_for_rooms_that_one_has_nothing_to_do_with() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = create_room(&bob, json!({ "preset": "public_chat" })).await;
    let put = async |room: &str, what: &str| {
        let (status, json) = alice.put(&format!("{USER}/rooms/{room}/{what}"), json!({})).await;
        (status, json["errcode"].as_str().unwrap_or_default().to_owned())
    };
    let refused = (StatusCode::FORBIDDEN, "M_FORBIDDEN".to_owned());
    let kept = (StatusCode::OK, String::new());
    for place in [room.as_str(), "!nowhere:test.example", "!r:elsewhere.example"] {
        assert_eq!(put(place, "account_data/org.example").await, refused, "{place}");
        assert_eq!(put(place, "tags/u.work").await, refused, "{place}");
    }
    must(&bob, &room, "invite", json!({ "user_id": alice.user_id })).await;
    assert_eq!(put(&room, "account_data/org.example").await, kept, "an invitation is enough");
    must(&alice, &room, "join", json!({})).await;
    assert_eq!(put(&room, "tags/u.work").await, kept);
    must(&alice, &room, "leave", json!({})).await;
    assert_eq!(put(&room, "tags/u.left").await, kept);
    must(&alice, &room, "forget", json!({})).await;
    assert_eq!(put(&room, "tags/u.forgotten").await, refused);
    assert_eq!(alice.delete(&format!("{USER}/rooms/{room}/tags/u.work"), json!({})).await.0, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn filters_that_cost_too_much_are_refused_kept_or_inline() {
    let alice = TestServer::new().register("alice").await;
    let patterns: Vec<_> = (0..4_500).map(|number| format!("*{number}*")).collect();
    let filter = json!({ "room": { "timeline": { "types": patterns } } });
    let (status, json) = alice.post(&format!("{USER}/filter"), filter).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::PAYLOAD_TOO_LARGE, Some("M_TOO_LARGE")));
    let few: Vec<_> = (0..150).map(|number| format!("*{number}*")).collect();
    let filter = json!({ "room": { "timeline": { "types": few } } });
    let inline = encoded(&filter.to_string());
    let (status, json) = alice.get(&format!("/_matrix/client/v3/sync?filter={inline}")).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::PAYLOAD_TOO_LARGE, Some("M_TOO_LARGE")));
    let room = create_room(&alice, json!({})).await;
    let events = encoded(&filter["room"]["timeline"].to_string());
    for path in ["messages?dir=b&", "context/$none?"] {
        let (status, json) =
            alice.get(&format!("/_matrix/client/v3/rooms/{room}/{path}filter={events}")).await;
        assert_eq!((status, json["errcode"].as_str()), (StatusCode::PAYLOAD_TOO_LARGE, Some("M_TOO_LARGE")));
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_ignores_themselves() {
    let server = TestServer::new();
    let (bob, carol) = (server.register("bob").await, server.register("carol").await);
    let room = create_room(&bob, json!({ "preset": "public_chat" })).await;
    must(&carol, &room, "join", json!({})).await;
    let path = format!("/_matrix/client/v3/user/{}/account_data/m.ignored_user_list", bob.user_id);
    let list = json!({ "ignored_users": { &bob.user_id: {}, &carol.user_id: {} } });
    assert_eq!(bob.put(&path, list).await.0, StatusCode::OK);
    let mut chain = Chain::of(&bob);
    chain.next().await;
    say(&carol, &room, "noise").await;
    let own = say(&bob, &room, "my own").await;
    assert_eq!(bodies(&chain.next().await, &room), ["my own"]);
    let path = format!("/_matrix/client/v3/rooms/{room}/event/{}", encoded(&own));
    assert_eq!(bob.get(&path).await.0, StatusCode::OK);
}

/// The account data of this type that a sync tells, global or of the room.
fn told(sync: &Value, room: Option<&str>) -> Vec<Value> {
    let data = match room {
        Some(room) => &sync["rooms"]["join"][room]["account_data"]["events"],
        None => &sync["account_data"]["events"],
    };
    let data = data.as_array().cloned().unwrap_or_default().into_iter();
    data.filter(|event| event["type"] == "org.example.gone").map(|event| event["content"].clone()).collect()
}

#[tokio::test(start_paused = true)]
async fn what_is_deleted_is_told_as_an_empty_object_to_clients_that_knew_it() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = create_room(&alice, json!({})).await;
    let unstable = "/_matrix/client/unstable/org.matrix.msc3391/user/@alice:test.example";
    for (place, of) in [(String::new(), None), (format!("/rooms/{room}"), Some(room.as_str()))] {
        let path = format!("{USER}{place}/account_data/org.example.gone");
        let delete = format!("{unstable}{place}/account_data/org.example.gone");
        let mut chain = Chain::of(&alice);
        chain.next().await;
        assert_eq!(alice.delete(&delete, json!({})).await, (StatusCode::OK, json!({})), "there was none");
        assert_eq!(told(&chain.next().await, of), Vec::<Value>::new());
        for empty in [None, Some("{}"), Some(" { } ")] {
            alice.ok_put(&path, json!({ "a": 1 })).await;
            assert_eq!(told(&chain.next().await, of), [json!({ "a": 1 })]);
            assert_eq!(told(&Chain::of(&alice).next().await, of), [json!({ "a": 1 })]);
            let (status, _) = match empty {
                None => alice.delete(&delete, json!({})).await,
                Some(body) => {
                    alice.server.raw(Method::PUT, &path, alice.token.as_deref(), body.to_owned()).await
                }
            };
            assert_eq!(status, StatusCode::OK);
            assert_eq!(alice.get(&path).await.1["errcode"], "M_NOT_FOUND");
            assert_eq!(told(&chain.next().await, of), [json!({})]);
            assert_eq!(told(&chain.next().await, of), Vec::<Value>::new());
            assert_eq!(told(&Chain::of(&alice).next().await, of), Vec::<Value>::new());
            assert_eq!(alice.delete(&delete, json!({})).await.0, StatusCode::OK);
            assert_eq!(told(&chain.next().await, of), Vec::<Value>::new(), "it is gone once");
        }
        assert_eq!(bob.delete(&delete, json!({})).await.1["errcode"], "M_FORBIDDEN");
        for kind in ["m.fully_read", "m.push_rules"] {
            let (status, json) =
                alice.delete(&format!("{unstable}{place}/account_data/{kind}"), json!({})).await;
            assert_eq!(
                (status, json["errcode"].as_str()),
                (StatusCode::METHOD_NOT_ALLOWED, Some("M_BAD_JSON"))
            );
        }
    }
    // Somebody who comes back to a room is not told what was deleted while they were away.
    alice.ok_put(&format!("{USER}/rooms/{room}/account_data/org.example.gone"), json!({ "a": 1 })).await;
    let mut chain = Chain::of(&alice);
    chain.next().await;
    must(&alice, &room, "leave", json!({})).await;
    alice.ok_delete(&format!("{unstable}/rooms/{room}/account_data/org.example.gone"), json!({})).await;
    chain.next().await;
    server.assert_whole();
}
