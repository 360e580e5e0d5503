//! `src/api/client/keys.rs`

use std::collections::BTreeSet;

use aqueduct::config::Bucket;
use futures_util::future::join_all;
use http::StatusCode;
use serde_json::{Value, json};

use crate::support::{TestClient, TestServer, olm::Pair};

const UPLOAD: &str = "/_matrix/client/v3/keys/upload";
const QUERY: &str = "/_matrix/client/v3/keys/query";
const CLAIM: &str = "/_matrix/client/v3/keys/claim";

/// Identity keys that are made from a text and signed, with something that the client has no say in.
fn device_keys(client: &TestClient, key: &str) -> Value {
    let mut keys = Pair::new(key).device_keys(client);
    keys["unsigned"] = json!({ "device_display_name": "forged" });
    keys
}

/// The names of one-time keys.
fn names(count: usize) -> impl Iterator<Item = String> {
    (0..count).map(|number| format!("K{number:04}"))
}

/// One-time keys that nobody has signed, as devices without identity keys upload them.
fn one_time(count: usize) -> Value {
    let key = |name: String| {
        let key = json!({ "key": name, "signatures": {} });
        (format!("signed_curve25519:{name}"), key)
    };
    Value::Object(names(count).map(key).collect())
}

/// One-time keys that a device has signed whose identity keys are made from this text.
fn signed(client: &TestClient, key: &str, count: usize) -> Value {
    let names: Vec<_> = names(count).collect();
    Pair::new(key).one_time(client, names.iter().map(String::as_str))
}

async fn left(client: &TestClient) -> (Value, Value) {
    let (status, mut json) = client.get("/_matrix/client/v3/sync").await;
    assert_eq!(status, StatusCode::OK);
    (json["device_one_time_keys_count"].take(), json["device_unused_fallback_key_types"].take())
}

#[tokio::test(start_paused = true)]
async fn identity_keys_are_shown_as_they_were_uploaded() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let keys = device_keys(&alice, "key");
    let (status, json) = alice.post(UPLOAD, json!({ "device_keys": keys })).await;
    assert_eq!(
        (status, json),
        (StatusCode::OK, json!({ "one_time_key_counts": { "signed_curve25519": 0 } }))
    );
    alice.ok_put(&format!("/devices/{}", alice.device_id), json!({ "display_name": "phone" })).await;
    for ids in [json!([]), json!([alice.device_id]), json!([alice.device_id, "NONE"])] {
        let wanted =
            json!({ "device_keys": { &alice.user_id: ids, "@none:test.example": [], &bob.user_id: [] } });
        let (status, json) = bob.post(QUERY, wanted).await;
        assert_eq!(status, StatusCode::OK);
        let mut expected = keys.clone();
        expected["unsigned"] = json!({ "device_display_name": "phone" });
        assert_eq!(json["device_keys"][&alice.user_id][&alice.device_id], expected);
        assert!(json["device_keys"].get("@none:test.example").is_none());
        assert_eq!(json["device_keys"][&bob.user_id], json!({}));
        assert_eq!(json["failures"], json!({}));
    }
    let (_, json) = bob.post(QUERY, json!({ "device_keys": { "@a:far.example": [] } })).await;
    assert!(json["failures"]["far.example"].is_object());
}

#[tokio::test(start_paused = true)]
async fn new_keys_are_told_to_those_who_share_a_room() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (_, made) = alice.post("/_matrix/client/v3/createRoom", json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{}", made["room_id"].as_str().unwrap()), json!({})).await;
    let (_, json) = bob.get("/_matrix/client/v3/sync").await;
    let since = json["next_batch"].as_str().unwrap();
    let body = json!({ "device_keys": device_keys(&alice, "key") });
    alice.ok_post(UPLOAD, body.clone()).await;
    let (_, json) = bob.get(&format!("/_matrix/client/v3/sync?since={since}")).await;
    assert_eq!(json["device_lists"]["changed"], json!([alice.user_id]));
    let since = json["next_batch"].as_str().unwrap();
    alice.ok_post(UPLOAD, body).await;
    let (_, json) = bob.get(&format!("/_matrix/client/v3/sync?since={since}")).await;
    assert!(json["device_lists"]["changed"].is_null(), "the same keys are nothing new: {json}");
}

#[tokio::test(start_paused = true)]
async fn changes_are_listed_from_one_token_to_another() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let token =
        || async { alice.get("/_matrix/client/v3/sync").await.1["next_batch"].as_str().unwrap().to_owned() };
    let (_, made) = alice.post("/_matrix/client/v3/createRoom", json!({ "preset": "public_chat" })).await;
    let room = made["room_id"].as_str().unwrap().to_owned();
    let mut tokens = vec![token().await];
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    tokens.push(token().await);
    bob.ok_post(UPLOAD, json!({ "device_keys": device_keys(&bob, "key") })).await;
    tokens.push(token().await);
    bob.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
    tokens.push(token().await);
    let changes = |from: usize, to: usize| {
        let path = format!("/_matrix/client/v3/keys/changes?from={}&to={}", tokens[from], tokens[to]);
        let alice = alice.clone();
        async move { alice.get(&path).await }
    };
    let lists = |changed: Value, left: Value| (StatusCode::OK, json!({ "changed": changed, "left": left }));
    let bobs = || json!([bob.user_id]);
    assert_eq!(changes(2, 3).await, lists(json!([]), bobs()));
    assert_eq!(changes(0, 0).await, lists(json!([]), json!([])));
    assert_eq!(changes(3, 0).await, lists(json!([]), json!([])));
    let (status, _) = alice.get("/_matrix/client/v3/keys/changes?from=x&to=y").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    assert_eq!(changes(0, 1).await, lists(bobs(), json!([])));
    assert_eq!(changes(1, 2).await, lists(bobs(), json!([])));
}

#[tokio::test(start_paused = true)]
async fn keys_are_given_in_the_order_in_which_they_were_uploaded() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    for id in ["b", "c", "a"] {
        alice.ok_post(UPLOAD, json!({ "one_time_keys": { format!("x:{id}"): { "key": id } } })).await;
    }
    let wanted = json!({ "one_time_keys": { &alice.user_id: { &alice.device_id: "x" } } });
    for id in ["b", "c", "a"] {
        let (_, json) = bob.post(CLAIM, wanted.clone()).await;
        let expected = json!({ format!("x:{id}"): { "key": id } });
        assert_eq!(json["one_time_keys"][&alice.user_id][&alice.device_id], expected);
    }
}

#[tokio::test(start_paused = true)]
async fn a_one_time_key_is_given_to_one_and_then_the_fallback_key_to_all() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let fallback = json!({ "signed_curve25519:F": { "key": "f", "fallback": true } });
    let body = json!({ "one_time_keys": one_time(100), "fallback_keys": fallback });
    let (status, json) = alice.post(UPLOAD, body.clone()).await;
    assert_eq!((status, &json["one_time_key_counts"]["signed_curve25519"]), (StatusCode::OK, &json!(100)));
    assert_eq!(left(&alice).await, (json!({ "signed_curve25519": 100 }), json!(["signed_curve25519"])));
    // Uploading the same keys again does not make them more.
    assert_eq!(alice.post(UPLOAD, body).await.1, json);

    let wanted = json!({ "one_time_keys": { &alice.user_id: { &alice.device_id: "signed_curve25519", "NONE": "signed_curve25519" } } });
    let answers = join_all((0..1000).map(|_| bob.post(CLAIM, wanted.clone()))).await;
    let mut given = Vec::new();
    for (status, json) in answers {
        assert_eq!(status, StatusCode::OK);
        let keys = json["one_time_keys"][&alice.user_id][&alice.device_id].as_object().unwrap();
        assert_eq!(keys.len(), 1);
        given.extend(keys.keys().cloned());
    }
    let ids: BTreeSet<_> = given.iter().filter(|id| *id != "signed_curve25519:F").collect();
    assert_eq!(ids.len(), 100, "each was given");
    assert_eq!(given.iter().filter(|id| *id == "signed_curve25519:F").count(), 900);
    assert_eq!(left(&alice).await, (json!({ "signed_curve25519": 0 }), json!([])));
    let other = json!({ "one_time_keys": { &alice.user_id: { &alice.device_id: "other" } } });
    assert_eq!(bob.post(CLAIM, other).await.1, json!({ "one_time_keys": {}, "failures": {} }));
}

#[tokio::test(start_paused = true)]
async fn keys_that_cannot_be_are_refused_and_nothing_of_them_kept() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    alice.ok_post(UPLOAD, json!({ "one_time_keys": one_time(1) })).await;
    let big = "b".repeat(40_000);
    let mut large = device_keys(&alice, "key");
    large["more"] = big.clone().into();
    let wrong = [
        json!({ "device_keys": device_keys(&bob, "key") }),
        json!({ "device_keys": large }),
        json!({ "device_keys": 1 }),
        json!({ "device_keys": {} }),
        json!({ "one_time_keys": { "signed_curve25519:K0000": { "key": "other" } } }),
        json!({ "one_time_keys": { "a:1": {}, "nocolon": {} } }),
        json!({ "one_time_keys": { "a:1": {}, "a\"b:1": {} } }),
        json!({ "one_time_keys": { "a:1": {}, "a:2": 1 } }),
        json!({ "one_time_keys": { "a:1": { "b": big } } }),
        json!({ "one_time_keys": one_time(1_001) }),
        json!({ "fallback_keys": { "a:1": {}, "a:2": {} } }),
        json!({ "one_time_keys": [] }),
    ];
    for body in wrong {
        let (status, json) = alice.post(UPLOAD, body).await;
        assert!(status.is_client_error() && json["errcode"].is_string(), "{status} {json}");
    }
    assert_eq!(left(&alice).await, (json!({ "signed_curve25519": 1 }), json!([])));
}

#[tokio::test(start_paused = true)]
async fn keys_go_with_their_device() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    alice
        .ok_post(
            UPLOAD,
            json!({ "device_keys": device_keys(&alice, "key"), "one_time_keys": signed(&alice, "key", 3) }),
        )
        .await;
    alice.ok_post("/logout", json!({})).await;
    let (_, json) = bob.post(QUERY, json!({ "device_keys": { &alice.user_id: [] } })).await;
    assert_eq!(json["device_keys"][&alice.user_id], json!({}));
    let wanted = json!({ "one_time_keys": { &alice.user_id: { &alice.device_id: "signed_curve25519" } } });
    assert_eq!(bob.post(CLAIM, wanted).await.1["one_time_keys"], json!({}));
}

#[tokio::test(start_paused = true)]
async fn keys_are_compared_as_json_and_not_as_bytes() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (_, made) = alice.post("/_matrix/client/v3/createRoom", json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{}", made["room_id"].as_str().unwrap()), json!({})).await;
    let device_keys = device_keys(&alice, "key").to_string();
    let upload = async |one_time: &str, fallback: &str, device_keys: &str| {
        let body = format!(
            r#"{{"device_keys":{device_keys},"one_time_keys":{{"a:1":{one_time}}},"fallback_keys":{{"a:F":{fallback}}}}}"#
        );
        server.raw(http::Method::POST, UPLOAD, alice.token.as_deref(), body).await
    };
    let (one_time, fallback) = (
        r#"{"key":"k","signatures":{"@alice:test.example":{"ed25519:D":"one"}}}"#,
        r#"{"key":"f","fallback":true}"#,
    );
    assert_eq!(upload(one_time, fallback, &device_keys).await.0, StatusCode::OK);
    let wanted = json!({ "one_time_keys": { &alice.user_id: { &alice.device_id: "a" } } });
    let claimed = async || bob.post(CLAIM, wanted.clone()).await.1["one_time_keys"][&alice.user_id].clone();
    let since =
        async || bob.get("/_matrix/client/v3/sync").await.1["next_batch"].as_str().unwrap().to_owned();

    // The keys are the same when they come with other spaces, in another order, or signed anew.
    let began = since().await;
    let spaced = device_keys.replace("\":", "\" : ");
    let same =
        upload(r#"{"signatures":{}, "key": "k"}"#, r#"{ "fallback": true, "key": "f" }"#, &spaced).await;
    assert_eq!(same, (StatusCode::OK, json!({ "one_time_key_counts": { "a": 1, "signed_curve25519": 0 } })));
    let (_, sync) = bob.get(&format!("/_matrix/client/v3/sync?since={began}")).await;
    assert!(sync["device_lists"]["changed"].is_null(), "device keys alike are no news: {sync}");
    assert!(claimed().await[&alice.device_id].get("a:1").is_some());
    assert!(claimed().await[&alice.device_id].get("a:F").is_some());
    assert_eq!(left(&alice).await.1, json!([]));
    assert_eq!(upload(one_time, r#"{ "fallback": true, "key": "f" }"#, &spaced).await.0, StatusCode::OK);
    assert_eq!(left(&alice).await.1, json!([]), "a fallback key that was given stays a used one");
    // The key `a:1` was given, so that its id is free for another key, and for one only.
    for (other, status) in [("other", StatusCode::OK), ("third", StatusCode::BAD_REQUEST)] {
        let other = format!(r#"{{"key":"{other}","signatures":{{}}}}"#);
        assert_eq!(upload(&other, fallback, &device_keys).await.0, status);
    }
}

#[tokio::test(start_paused = true)]
async fn new_identity_keys_end_what_was_made_for_the_old_ones() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let fallback = Pair::new("first").one_time(&alice, ["F"]);
    let first = json!({
        "device_keys": device_keys(&alice, "first"), "one_time_keys": signed(&alice, "first", 3),
        "fallback_keys": fallback,
    });
    assert_eq!(alice.post(UPLOAD, first).await.0, StatusCode::OK);
    let of_second = signed(&alice, "second", 1);
    let second = json!({ "device_keys": device_keys(&alice, "second"), "one_time_keys": of_second });
    let (status, json) = alice.post(UPLOAD, second).await;
    assert_eq!((status, &json["one_time_key_counts"]["signed_curve25519"]), (StatusCode::OK, &json!(1)));
    assert_eq!(left(&alice).await, (json!({ "signed_curve25519": 1 }), json!([])));
    let wanted = json!({ "one_time_keys": { &alice.user_id: { &alice.device_id: "signed_curve25519" } } });
    let (_, json) = bob.post(CLAIM, wanted.clone()).await;
    assert_eq!(json["one_time_keys"][&alice.user_id][&alice.device_id], of_second);
    assert_eq!(bob.post(CLAIM, wanted).await.1["one_time_keys"], json!({}));
}

#[tokio::test(start_paused = true)]
async fn what_a_device_has_not_signed_is_refused_and_what_claims_nothing_is_taken() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let upload = async |body: Value| {
        let (status, json) = alice.post(UPLOAD, body).await;
        (status.as_u16(), json["errcode"].as_str().unwrap_or_default().to_owned())
    };
    let (taken, refused) = ((200, String::new()), (400, "M_INVALID_SIGNATURE".to_owned()));
    let mut forged = device_keys(&alice, "key");
    forged["keys"] = device_keys(&alice, "other")["keys"].clone();
    assert_eq!(upload(json!({ "device_keys": forged })).await, refused);
    // Other suites of tests upload keys like these, which nobody who checks them trusts.
    let mut unsigned = device_keys(&alice, "key");
    unsigned["signatures"] = json!({});
    assert_eq!(upload(json!({ "device_keys": unsigned })).await, taken);
    let mut of_no_known_kind = forged.clone();
    of_no_known_kind["algorithms"] = json!(["m.olm.curve25519-aes-sha256", "m.megolm.v1.aes-sha"]);
    assert_eq!(upload(json!({ "device_keys": of_no_known_kind })).await, taken);
    assert_eq!(upload(json!({ "one_time_keys": one_time(1) })).await, taken);
    // A device that has shown that it signs is held to it.
    assert_eq!(upload(json!({ "device_keys": device_keys(&alice, "key") })).await, taken);
    let wrong = [one_time(1), signed(&alice, "other", 1), json!({ "signed_curve25519:A": "text" })];
    for keys in wrong {
        assert_eq!(upload(json!({ "one_time_keys": keys })).await, refused);
        assert_eq!(upload(json!({ "fallback_keys": keys })).await, refused);
    }
    assert_eq!(upload(json!({ "one_time_keys": { "curve25519:A": "not signed" } })).await, taken);
    let both =
        json!({ "one_time_keys": signed(&alice, "key", 100), "fallback_keys": signed(&alice, "key", 1) });
    assert_eq!(upload(both).await, taken);
    let (counts, unused) = left(&alice).await;
    assert_eq!(counts, json!({ "curve25519": 1, "signed_curve25519": 100 }));
    assert_eq!(unused, json!(["signed_curve25519"]));
    server.assert_whole();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_claims_beside_uploads_give_no_key_twice() {
    let server = TestServer::real(|_| {});
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    alice.ok_post(UPLOAD, json!({ "device_keys": device_keys(&alice, "key") })).await;
    let wanted = json!({ "one_time_keys": { &alice.user_id: { &alice.device_id: "signed_curve25519" } } });
    let all = signed(&alice, "key", 900);
    let upload = |number: usize| {
        // Each upload has some keys that another one has, too, as after an answer that was lost.
        let some = all.as_object().unwrap().iter().skip(number * 8).take(12);
        let some: serde_json::Map<_, _> = some.map(|(id, key)| (id.clone(), key.clone())).collect();
        let alice = alice.clone();
        async move { alice.post(UPLOAD, json!({ "one_time_keys": some })).await }
    };
    let claim = || bob.post(CLAIM, wanted.clone());
    let claims = join_all((0..1_000).map(|_| claim()));
    let uploads = join_all((0..112).map(upload));
    let (uploaded, claimed) = tokio::join!(uploads, claims);
    assert!(uploaded.iter().all(|(status, _)| *status == StatusCode::OK), "{uploaded:?}");
    let mut given = BTreeSet::new();
    let mut note = |(status, json): (StatusCode, Value)| {
        assert_eq!(status, StatusCode::OK);
        let Some(keys) = json["one_time_keys"][&alice.user_id][&alice.device_id].as_object() else {
            return false;
        };
        for id in keys.keys() {
            assert!(given.insert(id.clone()), "{id} is given twice");
        }
        true
    };
    for answer in claimed {
        note(answer);
    }
    // Whatever is left is given once, too, also when all of it is uploaded again.
    assert!(join_all((0..112).map(upload)).await.iter().all(|(status, _)| *status == StatusCode::OK));
    while note(claim().await) {}
    assert_eq!(given.len(), 900);
    assert_eq!(left(&alice).await.0, json!({ "signed_curve25519": 0 }));
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_large_answer_to_a_query_comes_in_pieces_and_is_whole() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let filling = "x".repeat(30_000);
    let mut ids = BTreeSet::new();
    for _ in 0..120 {
        let body = json!({ "type": "m.login.password", "password": "password of alice",
            "identifier": { "type": "m.id.user", "user": "alice" } });
        let (_, json) = server.anonymous().post("/_matrix/client/v3/login", body).await;
        let text = |key: &str| json[key].as_str().unwrap().to_owned();
        let device = TestClient {
            token: Some(text("access_token")),
            device_id: text("device_id"),
            user_id: alice.user_id.clone(),
            server: server.clone(),
        };
        let mut keys = device_keys(&device, "key");
        keys["filling"] = filling.clone().into();
        let keys = Pair::new("key").signed(&device.user_id, &device.device_id, keys);
        let (status, json) = device.post(UPLOAD, json!({ "device_keys": keys })).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        ids.insert(device.device_id);
    }
    bob.ok_post(UPLOAD, json!({ "device_keys": device_keys(&bob, "key") })).await;
    let wanted = json!({ "device_keys": { &alice.user_id: [], &bob.user_id: [], "@x:other.example": [] } });
    let ask = async || {
        let request = http::Request::post(QUERY)
            .header("Authorization", format!("Bearer {}", bob.token.as_ref().unwrap()))
            .body(axum::body::Body::from(wanted.to_string()))
            .unwrap();
        server.send(request).await
    };
    let response = ask().await;
    assert_eq!(response.status(), StatusCode::OK);
    let mut body = response.into_body();
    assert_eq!(axum::body::HttpBody::size_hint(&body).exact(), None, "the whole answer is in memory");
    let mut whole = Vec::new();
    while let Some(frame) = http_body_util::BodyExt::frame(&mut body).await {
        whole.extend(frame.unwrap().into_data().unwrap());
    }
    let json: Value = serde_json::from_slice(&whole).unwrap();
    let of_alice = json["device_keys"][&alice.user_id].as_object().unwrap();
    assert_eq!(of_alice.keys().cloned().collect::<BTreeSet<_>>(), ids);
    assert!(of_alice.values().all(|keys| keys["filling"] == filling));
    assert_eq!(json["device_keys"][&bob.user_id].as_object().unwrap().len(), 1);
    assert_eq!(json["failures"]["other.example"]["status"], 503);
    // An answer ends where the device that asked is logged out.
    let mut body = ask().await.into_body();
    drop(http_body_util::BodyExt::frame(&mut body).await.unwrap().unwrap());
    assert_eq!(bob.post("/_matrix/client/v3/logout", json!({})).await.0, StatusCode::OK);
    assert!(http_body_util::BodyExt::collect(body).await.is_err(), "the rest is told to nobody");
}

#[tokio::test(start_paused = true)]
async fn a_claim_names_a_bounded_number_of_devices() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let claim = |count: usize| {
        let devices = (0..count).map(|number| (format!("D{number}"), "signed_curve25519".into()));
        let devices: serde_json::Map<String, Value> = devices.collect();
        json!({ "one_time_keys": { &alice.user_id: devices } })
    };
    let (status, json) = alice.post(CLAIM, claim(10_000)).await;
    assert_eq!((status, &json["one_time_keys"]), (StatusCode::OK, &json!({})));
    let (status, json) = alice.post(CLAIM, claim(10_001)).await;
    assert_eq!((status, &json["errcode"]), (StatusCode::PAYLOAD_TOO_LARGE, &json!("M_TOO_LARGE")));
    assert!(json["error"].as_str().unwrap().contains("10000 devices"), "{json}");
}

#[tokio::test(start_paused = true)]
async fn each_device_of_a_claim_counts_for_who_claims() {
    let server = TestServer::with(|config| {
        config.limits.rate_limits = true;
        config.limits.to_device = Bucket { per_second: 0.01, burst: 10 };
    });
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let claim = |count: usize| {
        let devices = (0..count).map(|number| (format!("D{number}"), "signed_curve25519".into()));
        let devices: serde_json::Map<String, Value> = devices.collect();
        json!({ "one_time_keys": { &alice.user_id: devices } })
    };
    // Ten bursts are one debt at most, in however many requests.
    alice.ok_post(CLAIM, claim(60)).await;
    let refused = alice.post(CLAIM, claim(60)).await;
    assert_eq!(
        (refused.0, &refused.1["errcode"]),
        (StatusCode::TOO_MANY_REQUESTS, &json!("M_LIMIT_EXCEEDED"))
    );
    alice.ok_post(CLAIM, claim(40)).await;
    assert_eq!(alice.post(CLAIM, claim(1)).await.0, StatusCode::TOO_MANY_REQUESTS);
    let to = json!({ "messages": { &alice.user_id: { "*": {} } } });
    let sent = alice.put("/_matrix/client/v3/sendToDevice/m.test/1", to).await;
    assert_eq!(sent.0, StatusCode::TOO_MANY_REQUESTS, "they are messages to devices: {}", sent.1);
    bob.ok_post(CLAIM, claim(60)).await;
    let refused = bob.post(CLAIM, claim(101)).await;
    assert_eq!((refused.0, &refused.1["errcode"]), (StatusCode::PAYLOAD_TOO_LARGE, &json!("M_TOO_LARGE")));
}

/// A one-time key of another's device, by its id; null if none is left.
async fn claim_one(by: &TestClient, of: &TestClient) -> Value {
    let wanted = json!({ &of.user_id: { &of.device_id: "signed_curve25519" } });
    let json = by.ok_post(CLAIM, json!({ "one_time_keys": wanted })).await;
    json["one_time_keys"][&of.user_id][&of.device_id].clone()
}

/// A client that did not get the answer to its upload uploads the same keys again, when some were given already.
#[tokio::test(start_paused = true)]
async fn a_key_that_was_given_is_not_given_again_when_it_is_uploaded_again() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let claim = async || claim_one(&bob, &alice).await;
    let upload = async |keys: Value| {
        let json = alice.ok_post(UPLOAD, json!({ "one_time_keys": keys })).await;
        json["one_time_key_counts"]["signed_curve25519"].clone()
    };
    upload(one_time(3)).await;
    let mut given = BTreeSet::from([claim().await.to_string(), claim().await.to_string()]);
    for _ in 0..2 {
        assert_eq!(upload(one_time(3)).await, 1, "what was given is not counted as left");
    }
    // Signed anew, it is the same key; another key under the same id is another key.
    let mut renewed = one_time(1);
    renewed["signed_curve25519:K0000"]["signatures"] = json!({ &alice.user_id: { "ed25519:X": "new" } });
    assert_eq!(upload(renewed).await, 1);
    let mut other = one_time(2);
    other["signed_curve25519:K0001"]["key"] = "another".into();
    assert_eq!(upload(other).await, 2);
    for _ in 0..2 {
        assert!(given.insert(claim().await.to_string()), "each key is given once: {given:?}");
    }
    assert_eq!(claim().await, Value::Null);
    server.assert_whole();
}

/// Clients begin their numbering of keys anew after a reset, so an id may name several keys one after the other.
#[tokio::test(start_paused = true)]
async fn a_key_is_known_again_whatever_its_id_named_besides() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let claim = async || claim_one(&bob, &alice).await;
    let upload = async |id: &str, key: &str| {
        let keys = json!({ format!("signed_curve25519:{id}"): { "key": key, "signatures": {} } });
        let json = alice.ok_post(UPLOAD, json!({ "one_time_keys": keys })).await;
        json["one_time_key_counts"]["signed_curve25519"].clone()
    };
    for key in ["k1", "k9"] {
        assert_eq!(upload("AA", key).await, 1);
        assert_eq!(claim().await["signed_curve25519:AA"]["key"], key);
    }
    for (id, key) in [("AA", "k1"), ("AA", "k9"), ("BB", "k1"), ("BB", "k9")] {
        assert_eq!(upload(id, key).await, 0, "{key} was given already, and comes again as {id}");
    }
    assert_eq!(claim().await, Value::Null);
    assert_eq!(upload("CC", "new").await, 1);
    assert_eq!(upload("DD", "new").await, 1, "a key is stored once, under whichever id");
    assert_eq!(claim().await["signed_curve25519:CC"]["key"], "new");
    assert_eq!(claim().await, Value::Null);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn what_a_device_that_signs_has_not_signed_is_given_to_nobody_whenever_it_came() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let mut keys = one_time(2);
    keys["signed_curve25519:S"] = Pair::new("key").one_time(&alice, ["S"])["signed_curve25519:S"].clone();
    keys["curve25519:A"] = "not signed".into();
    let fallback = json!({ "signed_curve25519:F": { "key": "f" }, "curve25519:F": "not signed" });
    let upload = async |body: Value| alice.ok_post(UPLOAD, body).await["one_time_key_counts"].clone();
    let mut unsigned = device_keys(&alice, "key");
    unsigned["signatures"] = json!({});
    let all = json!({ "signed_curve25519": 3, "curve25519": 1 });
    // They come before the identity keys, and stay while these are not signed.
    assert_eq!(upload(json!({ "one_time_keys": keys, "fallback_keys": fallback })).await, all);
    assert_eq!(upload(json!({ "device_keys": unsigned })).await, all);
    for _ in 0..2 {
        let left_over = json!({ "signed_curve25519": 1, "curve25519": 1 });
        assert_eq!(upload(json!({ "device_keys": device_keys(&alice, "key") })).await, left_over);
        assert_eq!(left(&alice).await, (left_over, json!(["curve25519"])));
        // Signatures that are taken back and shown again free no key of them.
        assert_eq!(upload(json!({ "device_keys": unsigned })).await["signed_curve25519"], 1);
        let again = json!({ "one_time_keys": one_time(2), "fallback_keys": { "signed_curve25519:F": "f" } });
        assert_eq!(upload(again).await["signed_curve25519"], 3);
    }
    upload(json!({ "device_keys": device_keys(&alice, "key") })).await;
    assert!(claim_one(&bob, &alice).await["signed_curve25519:S"].is_object());
    assert_eq!(claim_one(&bob, &alice).await, Value::Null);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_key_that_was_given_stays_given_when_identity_keys_change_forth_and_back() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let upload = async |key: &str, count: usize| {
        let body =
            json!({ "device_keys": device_keys(&alice, key), "one_time_keys": signed(&alice, key, count) });
        alice.ok_post(UPLOAD, body).await["one_time_key_counts"]["signed_curve25519"].clone()
    };
    assert_eq!(upload("first", 2).await, 2);
    assert!(claim_one(&bob, &alice).await["signed_curve25519:K0000"].is_object());
    let other = alice.ok_post(UPLOAD, json!({ "device_keys": device_keys(&alice, "second") })).await;
    assert_eq!(other["one_time_key_counts"], json!({ "signed_curve25519": 0 }));
    assert_eq!(upload("first", 2).await, 1, "one was given");
    assert!(claim_one(&bob, &alice).await["signed_curve25519:K0001"].is_object());
    assert_eq!(claim_one(&bob, &alice).await, Value::Null);
    server.assert_whole();
}
