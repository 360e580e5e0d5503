//! `src/api/client/to_device.rs`

use aqueduct::{accounts, encryption::inbox, ids::Position, store::Read};
use futures_util::future::join_all;
use http::StatusCode;
use serde_json::{Value, json};

use crate::support::{TestClient, TestServer, user_num};

fn inbox_of(server: &TestServer, user_id: &str, device_id: &str) -> Vec<Value> {
    let store = &server.server().app().store;
    let (snapshot, user) = (store.snapshot(), user_num(store, user_id));
    let Some(device) = accounts::devices::find(&*snapshot, user, device_id.into()).unwrap() else {
        return Vec::new();
    };
    let all = inbox::list(&*snapshot, (user, device.num), Position::ZERO, snapshot.upto(), 10_000).unwrap();
    all.into_iter().map(|(_, message)| serde_json::from_slice(&message).unwrap()).collect()
}

fn path(txn: &str) -> String {
    format!("/_matrix/client/v3/sendToDevice/m.test/{txn}")
}

#[tokio::test(start_paused = true)]
async fn messages_reach_one_device_or_all_and_pass_over_who_is_not_here() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    alice.on_device("SECOND").await;
    let body = json!({ "messages": {
        &alice.user_id: { "*": { "to": "all" } },
        &bob.user_id: { &bob.device_id: { "to": "bob" }, "NONE": {} },
        "@nobody:test.example": { "*": {} },
        "@alice:other.example": { "*": {} },
    } });
    assert_eq!(bob.put(&path("1"), body).await, (StatusCode::OK, json!({})));
    let told = json!([{ "sender": bob.user_id, "type": "m.test", "content": { "to": "all" } }]);
    for device in [alice.device_id.as_str(), "SECOND"] {
        assert_eq!(json!(inbox_of(&server, &alice.user_id, device)), told);
    }
    assert_eq!(inbox_of(&server, &bob.user_id, &bob.device_id).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_transaction_id_counts_once_for_its_device_and_type() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let second = alice.on_device("SECOND").await;
    let body = json!({ "messages": { &alice.user_id: { "SECOND": { "n": 1 } } } });
    let same = path("same");
    let answers = join_all((0..1000).map(|_| alice.put(&same, body.clone()))).await;
    assert!(answers.iter().all(|(status, _)| *status == StatusCode::OK));
    assert_eq!(inbox_of(&server, &alice.user_id, "SECOND").len(), 1);
    assert_eq!(second.put(&path("same"), body.clone()).await.0, StatusCode::OK);
    let other = "/_matrix/client/v3/sendToDevice/m.other/same";
    assert_eq!(alice.put(other, body).await.0, StatusCode::OK);
    assert_eq!(inbox_of(&server, &alice.user_id, "SECOND").len(), 3);
}

#[tokio::test(start_paused = true)]
async fn more_than_one_batch_holds_is_sent_in_several() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    alice.on_device("SECOND").await;
    let big = "b".repeat(60_000);
    let mut messages = serde_json::Map::new();
    for number in 0..20 {
        let name = format!("user{number}");
        let user = server.register(&name).await;
        messages.insert(user.user_id, json!({ "*": { "b": big } }));
    }
    let body = json!({ "messages": messages });
    assert_eq!(alice.put(&path("1"), body.clone()).await.0, StatusCode::OK);
    assert_eq!(alice.put(&path("1"), body).await.0, StatusCode::OK);
    for user_id in messages.keys() {
        let store = &server.server().app().store;
        let device = accounts::devices::list(&*store.snapshot(), user_num(store, user_id)).unwrap().remove(0);
        assert_eq!(inbox_of(&server, user_id, device.id.as_str()).len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn an_inbox_goes_with_its_device() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let second = alice.on_device("SECOND").await;
    let body = json!({ "messages": { &alice.user_id: { "SECOND": { "n": 1 } } } });
    alice.ok_put(&path("1"), body).await;
    assert_eq!(inbox_of(&server, &alice.user_id, "SECOND").len(), 1);
    second.ok_post("/logout", json!({})).await;
    alice.on_device("SECOND").await;
    assert!(inbox_of(&server, &alice.user_id, "SECOND").is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_is_too_large_or_no_object_is_refused() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let send = |content: Value| {
        alice.put(
            "/_matrix/client/v3/sendToDevice/a/1",
            json!({ "messages": { &alice.user_id: { "*": content } } }),
        )
    };
    let (status, json) = send(json!({ "a": "a".repeat(70_000) })).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::PAYLOAD_TOO_LARGE, Some("M_TOO_LARGE")));
    assert_eq!(send(json!([])).await.0, StatusCode::BAD_REQUEST);
    let (status, json) = alice.put(&path("1"), json!({})).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some("M_MISSING_PARAM")));
    let (status, _) = alice.put(&path("1"), json!({ "messages": { "nobody": {} } })).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(
        alice.put(&path(&"t".repeat(300)), json!({ "messages": {} })).await.0,
        StatusCode::BAD_REQUEST
    );
    assert!(inbox_of(&server, &alice.user_id, &alice.device_id).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_sender_who_fills_an_inbox_shuts_nobody_else_out() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let big = json!({ "b": "b".repeat(65_000) });
    // Each of them sends as much as the server takes, which is less and less.
    for sender in 0..5 {
        let sender = server.register(&format!("sender{sender}")).await;
        for txn in 0..140 {
            let body = json!({ "messages": { &bob.user_id: { &bob.device_id: big } } });
            let (status, json) = sender.put(&path(&txn.to_string()), body).await;
            assert_eq!(status, StatusCode::OK, "{json}");
        }
    }
    let waiting = inbox_of(&server, &bob.user_id, &bob.device_id);
    let of_first = waiting.iter().filter(|message| message["sender"] == "@sender0:test.example").count();
    let of_last = waiting.iter().filter(|message| message["sender"] == "@sender4:test.example").count();
    assert!((125..130).contains(&of_first), "one sender fills an eighth at most: {of_first}");
    assert!((60..of_first).contains(&of_last), "the fifth fills an eighth of what is left: {of_last}");
    let both = json!({ "messages": {
        &alice.user_id: { &alice.device_id: { "key": 1 } }, &bob.user_id: { "*": { "key": 2 } },
    } });
    assert_eq!(alice.put(&path("1"), both).await, (StatusCode::OK, json!({})));
    assert_eq!(inbox_of(&server, &alice.user_id, &alice.device_id).len(), 1);
    let now = inbox_of(&server, &bob.user_id, &bob.device_id);
    assert_eq!(now.len(), waiting.len() + 1, "a key of somebody else is kept");
    // The sender whose part is used up is passed over, and the others whom the request names are served.
    let mallory = server.register("mallory").await;
    for txn in 0..130 {
        let both = json!({ "messages": {
            &alice.user_id: { &alice.device_id: { "n": txn } }, &bob.user_id: { "*": big },
        } });
        assert_eq!(mallory.put(&path(&txn.to_string()), both).await, (StatusCode::OK, json!({})));
    }
    assert_eq!(inbox_of(&server, &alice.user_id, &alice.device_id).len(), 131);
    let metrics = server.server().app().metrics.text();
    let line = "aqueduct_to_device_dropped_total{reason=\"sender_quota\"}";
    assert!(metrics.contains(line), "{line} is not in {metrics}");
}

#[tokio::test(start_paused = true)]
async fn a_message_to_all_devices_reaches_hundreds_of_them_once() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    for number in 1..461 {
        alice.on_device(&format!("D{number}")).await;
    }
    let body = json!({ "messages": { &alice.user_id: { "*": { "b": "b".repeat(10_000) } } } });
    assert_eq!(bob.put(&path("1"), body.clone()).await, (StatusCode::OK, json!({})));
    alice.on_device("LATER").await;
    assert_eq!(bob.put(&path("1"), body).await, (StatusCode::OK, json!({})));
    for number in 1..461 {
        assert_eq!(inbox_of(&server, &alice.user_id, &format!("D{number}")).len(), 1, "D{number}");
    }
    assert!(inbox_of(&server, &alice.user_id, "LATER").is_empty(), "the same request is not sent again");
}

#[tokio::test(start_paused = true)]
async fn the_token_of_another_device_deletes_and_skips_nothing() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let second = alice.on_device("SECOND").await;
    let send = async |txn: &str| {
        let body = json!({ "messages": { &alice.user_id: { "SECOND": { "n": txn } } } });
        assert_eq!(alice.put(&path(txn), body).await.0, StatusCode::OK);
    };
    let sync = async |client: &TestClient, since: &str| {
        let (status, json) = client.get(&format!("/_matrix/client/v3/sync{since}")).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        let events = json["to_device"]["events"].as_array().cloned().unwrap_or_default();
        let told: Vec<_> = events.iter().map(|event| event["content"]["n"].clone()).collect();
        (told, format!("?since={}", json["next_batch"].as_str().unwrap()))
    };
    send("1").await;
    let (_, firsts) = sync(&alice, "").await;
    // This device asks with a token of the other one, and is told what waits for itself.
    let (told, seconds) = sync(&second, &firsts).await;
    assert_eq!(told, [json!("1")]);
    assert_eq!(inbox_of(&server, &alice.user_id, "SECOND").len(), 1);
    send("2").await;
    assert_eq!(sync(&second, &seconds).await.0, [json!("2")]);
    // Confirmed messages are gone when the answer is there, also for a client that begins anew.
    assert_eq!(sync(&second, "").await.0, [json!("2")]);
    let (_, firsts) = sync(&alice, &firsts).await;
    sync(&second, &firsts).await;
    assert_eq!(inbox_of(&server, &alice.user_id, "SECOND").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_bytes_of_messages_are_paid_by_their_sender() {
    let server = TestServer::with(|config| {
        let many = aqueduct::config::Bucket { per_second: 1e6, burst: 1_000_000 };
        config.limits.rate_limits = true;
        config.limits.to_device = aqueduct::config::Bucket { per_second: 1.0, burst: 100 };
        for bucket in [&mut config.limits.login, &mut config.limits.register, &mut config.limits.other] {
            *bucket = many;
        }
    });
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    for number in 0..30 {
        alice.on_device(&format!("D{number}")).await;
    }
    let body = |bytes: usize| {
        let content = json!({ "text": "x".repeat(bytes) });
        json!({ "messages": { &alice.user_id: { "*": content } } })
    };
    // Small messages cost one act for each of the 31 devices.
    assert_eq!(bob.put(&path("small"), body(100)).await.0, StatusCode::OK);
    assert_eq!(bob.put(&path("small-again"), body(100)).await.0, StatusCode::OK);
    // Sixty thousand bytes are fifteen acts for each device: they are sent, and the sender waits for them afterwards.
    assert_eq!(bob.put(&path("large"), body(60_000)).await.0, StatusCode::OK);
    assert_eq!(bob.put(&path("small-3"), body(100)).await.0, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(inbox_of(&server, &alice.user_id, "D7").len(), 3);
    // A retry is paid for already.
    server.server().app().env.sleep(std::time::Duration::from_secs(500)).await;
    assert_eq!(bob.put(&path("large"), body(60_000)).await.0, StatusCode::OK);
    assert_eq!(inbox_of(&server, &alice.user_id, "D7").len(), 3);
}
