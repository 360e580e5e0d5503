//! `src/api/client/dehydrated_device.rs`

use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};

use crate::support::{
    TestClient, TestServer, encoded,
    olm::{Identity, Pair},
};

const DEVICE: &str = "/_matrix/client/unstable/org.matrix.msc3814.v1/dehydrated_device";

fn body(client: &TestClient, id: &str) -> Value {
    let pair = Pair::new(id);
    let mut device_keys = pair.device_keys_of(&client.user_id, id);
    device_keys["dehydrated"] = true.into();
    let signed = |key: Value| pair.signed(&client.user_id, id, key);
    json!({
        "device_id": id,
        "device_data": { "algorithm": "org.matrix.msc3814.v2", "device_pickle": "p", "nonce": id },
        "initial_device_display_name": "Dehydrated",
        "device_keys": signed(device_keys),
        "one_time_keys": { "signed_curve25519:A": signed(json!({ "key": "a" })) },
        "fallback_keys": { "signed_curve25519:F": signed(json!({ "key": "f", "fallback": true })) },
    })
}

async fn put(client: &TestClient, id: &str) {
    assert_eq!(client.ok_put(DEVICE, body(client, id)).await, json!({ "device_id": id }));
}

async fn device_keys(of: &TestClient) -> Value {
    let wanted = json!({ "device_keys": { &of.user_id: [] } });
    of.ok_post("/keys/query", wanted).await["device_keys"][&of.user_id].clone()
}

fn refused((status, json): (StatusCode, Value)) -> (u16, String) {
    (status.as_u16(), json["errcode"].as_str().unwrap_or_default().to_owned())
}

async fn send(from: &TestClient, to: &TestClient, device: &str, txn: &str, body: &str) {
    let content = json!({ "messages": { &to.user_id: { device: { "body": body } } } });
    from.ok_put(&format!("/sendToDevice/m.test/{txn}"), content).await;
}

#[tokio::test(start_paused = true)]
async fn a_dehydrated_device_is_made_with_its_keys_and_shown_to_its_owner() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    assert_eq!(refused(alice.get(DEVICE).await), (404, "M_NOT_FOUND".into()));
    assert_eq!(refused(alice.delete(DEVICE, json!({})).await), (404, "M_NOT_FOUND".into()));
    // The id is an identity key in base64.
    let id = "s/+1key";
    put(&alice, id).await;
    let shown = alice.ok_get(DEVICE).await;
    assert_eq!(shown, json!({ "device_id": id, "device_data": body(&alice, id)["device_data"] }));
    assert_eq!(refused(bob.get(DEVICE).await), (404, "M_NOT_FOUND".into()));
    let mut expected = body(&alice, id)["device_keys"].clone();
    expected["unsigned"] = json!({ "device_display_name": "Dehydrated" });
    assert_eq!(device_keys(&alice).await, json!({ id: expected }));
    let claim = json!({ "one_time_keys": { &alice.user_id: { id: "signed_curve25519" } } });
    for key in ["signed_curve25519:A", "signed_curve25519:F", "signed_curve25519:F"] {
        let claimed = bob.ok_post("/keys/claim", claim.clone()).await;
        assert!(claimed["one_time_keys"][&alice.user_id][id][key].is_object(), "{claimed}");
    }
    let listed = alice.ok_get("/devices").await;
    assert_eq!(listed["devices"].as_array().unwrap().len(), 2);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn another_dehydrated_device_takes_the_place_of_the_one_before_at_once() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (_, made) = alice.post("/_matrix/client/v3/createRoom", json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{}", made["room_id"].as_str().unwrap()), json!({})).await;
    let since = bob.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
    put(&alice, "ONE").await;
    let news = bob.ok_get(&format!("/sync?since={since}")).await;
    assert_eq!(news["device_lists"]["changed"], json!([alice.user_id]));
    let since = news["next_batch"].as_str().unwrap().to_owned();
    send(&bob, &alice, "ONE", "1", "for the first").await;
    put(&alice, "TWO").await;
    assert_eq!(
        bob.ok_get(&format!("/sync?since={since}")).await["device_lists"]["changed"],
        json!([alice.user_id])
    );
    assert_eq!(alice.ok_get(DEVICE).await["device_id"], "TWO");
    let keys = device_keys(&alice).await;
    assert_eq!(keys.as_object().unwrap().keys().collect::<Vec<_>>(), ["TWO"]);
    assert_eq!(refused(alice.get("/_matrix/client/v3/devices/ONE").await), (404, "M_NOT_FOUND".into()));
    assert_eq!(refused(alice.get(&format!("{DEVICE}/ONE/events")).await), (403, "M_FORBIDDEN".into()));
    // The same id again is another device, without the keys and messages of the one before.
    send(&bob, &alice, "TWO", "2", "for the second").await;
    let mut again = body(&alice, "TWO");
    again["one_time_keys"] = json!({});
    alice.ok_put(DEVICE, again).await;
    assert_eq!(alice.ok_get(&format!("{DEVICE}/TWO/events")).await, json!({ "events": [] }));
    let claim = json!({ "one_time_keys": { &alice.user_id: { "TWO": "signed_curve25519" } } });
    let claimed = bob.ok_post("/keys/claim", claim).await;
    assert!(claimed["one_time_keys"][&alice.user_id]["TWO"]["signed_curve25519:F"].is_object(), "{claimed}");
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn its_messages_are_read_page_by_page_as_often_as_anybody_begins_anew() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    put(&alice, "DRY").await;
    let path = format!("{DEVICE}/DRY/events");
    assert_eq!(alice.ok_get(&path).await, json!({ "events": [] }));
    let nothing = alice.ok_post(&path, json!({})).await;
    assert_eq!(nothing["events"], json!([]));
    let begun = json!({ "next_batch": nothing["next_batch"].as_str().unwrap() });
    assert_eq!(alice.ok_post(&path, begun.clone()).await, nothing);
    let expected: Vec<_> = (0..450).map(|number| format!("message {number}")).collect();
    for (number, body) in expected.iter().enumerate() {
        let device = if number % 2 == 0 { "DRY" } else { "*" };
        send(&bob, &alice, device, &format!("t{number}"), body).await;
    }
    let first = alice.ok_post(&path, begun).await;
    assert_eq!(first["events"].as_array().unwrap().len(), 100, "what came meanwhile is told");
    for by_post in [false, true, false] {
        let (mut told, mut from, mut pages) = (Vec::new(), None::<String>, 0);
        // A client that finds no end would ask for ever.
        while pages < 10 {
            let path = format!("{DEVICE}/DRY/events");
            let page = match (&from, by_post) {
                (None, false) => alice.ok_get(&path).await,
                (Some(from), false) => alice.ok_get(&format!("{path}?from={from}")).await,
                (from, true) => alice.ok_post(&path, json!({ "next_batch": from })).await,
            };
            for event in page["events"].as_array().unwrap() {
                assert_eq!((&event["sender"], &event["type"]), (&json!(bob.user_id), &json!("m.test")));
                told.push(event["content"]["body"].as_str().unwrap().to_owned());
            }
            from = page["next_batch"].as_str().map(str::to_owned);
            // The older form ends by a page without messages, and each of its pages has a token.
            if by_post && page["events"] == json!([]) {
                assert!(from.is_some(), "{page}");
                break;
            }
            pages += 1;
            if from.is_none() {
                break;
            }
        }
        assert_eq!(told, expected);
        assert_eq!(pages, 5, "by POST: {by_post}");
    }
    // The owner's own device has its messages, and what it confirms is not confirmed for the dehydrated one.
    let synced = alice.ok_get("/sync").await;
    let since = synced["next_batch"].as_str().unwrap();
    assert!(!synced["to_device"]["events"].as_array().unwrap().is_empty());
    alice.ok_get(&format!("/sync?since={since}")).await;
    assert_eq!(alice.ok_get(&format!("{DEVICE}/DRY/events")).await["events"].as_array().unwrap().len(), 100);
    for (path, status, code) in [
        ("DRY/events?from=x", 400, "M_INVALID_PARAM"),
        ("DRY/events?from=-1", 400, "M_INVALID_PARAM"),
        ("DRY/events?from=99999999999999999999", 400, "M_INVALID_PARAM"),
        ("NONE/events", 403, "M_FORBIDDEN"),
        (&format!("{}/events", alice.device_id), 403, "M_FORBIDDEN"),
    ] {
        assert_eq!(refused(alice.get(&format!("{DEVICE}/{path}")).await), (status, code.into()), "{path}");
    }
    assert_eq!(refused(bob.get(&format!("{DEVICE}/DRY/events")).await), (403, "M_FORBIDDEN".into()));
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_page_is_bounded_in_bytes_and_tells_a_large_message_all_the_same() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    put(&alice, "DRY").await;
    for number in 0..20 {
        send(&bob, &alice, "DRY", &format!("t{number}"), &"x".repeat(65_000)).await;
    }
    let first = alice.ok_get(&format!("{DEVICE}/DRY/events")).await;
    let count = first["events"].as_array().unwrap().len();
    assert!((10..20).contains(&count), "{count}");
    let from = first["next_batch"].as_str().unwrap();
    let rest = alice.ok_get(&format!("{DEVICE}/DRY/events?from={from}")).await;
    assert_eq!(rest["events"].as_array().unwrap().len(), 20 - count);
    assert!(rest.get("next_batch").is_none());
}

#[tokio::test(start_paused = true)]
async fn nobody_logs_in_to_it_and_it_takes_no_place_of_a_device_that_is_logged_in() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    assert_eq!(refused(alice.put(DEVICE, body(&alice, &alice.device_id)).await), (403, "M_FORBIDDEN".into()));
    put(&alice, "DRY").await;
    let log_in = |device: &str| {
        json!({
            "type": "m.login.password", "identifier": { "type": "m.id.user", "user": "alice" },
            "password": "password of alice", "device_id": device,
        })
    };
    let answer = server.anonymous().post("/_matrix/client/v3/login", log_in("DRY")).await;
    assert_eq!(refused(answer), (403, "M_FORBIDDEN".into()));
    assert_eq!(alice.ok_get(DEVICE).await["device_id"], "DRY", "it is still there");
    alice.ok_delete(DEVICE, json!({})).await;
    server.anonymous().ok_post("/login", log_in("DRY")).await;
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn it_has_no_id_that_is_the_name_of_a_key_with_which_its_user_signs() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let identity = Identity::new(&alice, "first");
    alice.ok_post("/keys/device_signing/upload", identity.all()).await;
    for key in [&identity.master, &identity.self_signing, &identity.user_signing] {
        let answer = alice.put(DEVICE, body(&alice, &key.public())).await;
        assert_eq!(refused(answer), (403, "M_FORBIDDEN".into()));
    }
    assert_eq!(device_keys(&alice).await, json!({}));
    // Nor is a key named as the device is that is there.
    put(&alice, &Pair::new("m second").public()).await;
    let second = Identity::new(&alice, "second").all();
    let (status, json) = alice.post("/_matrix/client/v3/keys/device_signing/upload", second).await;
    assert_eq!((status.as_u16(), &json["errcode"]), (403, &json!("M_FORBIDDEN")), "{json}");
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn wrong_requests_are_refused_and_change_nothing() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    put(&alice, "DRY").await;
    let with = |name: &str, value: Value| {
        let mut body = body(&alice, "NEW");
        if value.is_null() {
            body.as_object_mut().unwrap().remove(name);
        } else {
            body[name] = value;
        }
        body
    };
    let mut of_other = body(&alice, "NEW");
    of_other["device_keys"]["device_id"] = "OTHER".into();
    let mut of_other_name = body(&alice, "NEW");
    of_other_name["device_keys"] = Pair::new("NEW").device_keys_of(&alice.user_id, "NEW");
    of_other_name["device_keys"]["keys"]["ed25519:OTHER"] = Pair::new("OTHER").public().into();
    // It is judged like a device whose keys are uploaded, whose signatures must be right where it signs.
    let mut forged = body(&alice, "NEW");
    forged["device_keys"]["keys"]["ed25519:NEW"] = Pair::new("OTHER").public().into();
    let of_other_key = Pair::new("OTHER").signed(&alice.user_id, "NEW", json!({ "key": "a" }));
    let many: serde_json::Map<_, _> = (0..1_001)
        .map(|number| (format!("signed_curve25519:K{number}"), json!({ "key": number.to_string() })))
        .collect();
    for (body, status, code) in [
        (with("device_id", Value::Null), 400, "M_MISSING_PARAM"),
        (with("device_id", json!({})), 400, "M_BAD_JSON"),
        (with("device_id", json!("x".repeat(256))), 400, "M_INVALID_PARAM"),
        (with("device_data", Value::Null), 400, "M_MISSING_PARAM"),
        (with("device_data", json!("text")), 400, "M_BAD_JSON"),
        (with("device_data", json!({ "x": "x".repeat(64 << 10) })), 413, "M_TOO_LARGE"),
        (with("device_keys", Value::Null), 400, "M_MISSING_PARAM"),
        (with("device_keys", json!({})), 400, "M_BAD_JSON"),
        (with("one_time_keys", json!([])), 400, "M_BAD_JSON"),
        (with("one_time_keys", Value::Object(many)), 413, "M_TOO_LARGE"),
        (of_other, 400, "M_INVALID_PARAM"),
        (of_other_name, 400, "M_INVALID_PARAM"),
        (forged, 400, "M_INVALID_SIGNATURE"),
        (with("one_time_keys", json!({ "signed_curve25519:A": of_other_key })), 400, "M_INVALID_SIGNATURE"),
        (with("fallback_keys", json!({ "signed_curve25519:F": of_other_key })), 400, "M_INVALID_SIGNATURE"),
        (with("one_time_keys", json!({ "signed_curve25519:A": { "key": "a" } })), 400, "M_INVALID_SIGNATURE"),
    ] {
        let answer = alice.put(DEVICE, body).await;
        assert_eq!(
            (answer.0.as_u16(), answer.1["errcode"].as_str().unwrap()),
            (status, code),
            "{}",
            answer.1
        );
    }
    assert_eq!(alice.ok_get(DEVICE).await["device_id"], "DRY");
    assert_eq!(device_keys(&alice).await.as_object().unwrap().len(), 1);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn it_goes_with_the_devices_and_the_account_of_its_owner() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    put(&alice, "s/+1").await;
    let gone = alice.ok_delete(DEVICE, json!({})).await;
    assert_eq!(gone, json!({ "device_id": "s/+1" }));
    assert_eq!(device_keys(&alice).await, json!({}));
    let confirmed = async |path: &str, method: &str| {
        let ask = async |body: Value| match method {
            "DELETE" => alice.delete(path, body).await,
            _ => alice.post(path, body).await,
        };
        let (_, json) = ask(json!({})).await;
        let auth = json!({
            "type": "m.login.password", "identifier": { "type": "m.id.user", "user": "alice" },
            "password": "password of alice", "session": json["session"],
        });
        let (status, json) = ask(json!({ "auth": auth })).await;
        assert_eq!(status, StatusCode::OK, "{json}");
    };
    put(&alice, "s/+2").await;
    confirmed(&format!("/_matrix/client/v3/devices/{}", encoded("s/+2")), "DELETE").await;
    assert_eq!(refused(alice.get(DEVICE).await), (404, "M_NOT_FOUND".into()));
    put(&alice, "DRY").await;
    confirmed("/_matrix/client/v3/account/deactivate", "POST").await;
    server.server().app().env.sleep(Duration::from_secs(1)).await;
    let rows = server.assert_whole();
    for table in ["DEHYDRATED", "DEVICES", "DEVICE_KEYS", "INBOX"] {
        let left = rows.iter().find(|(name, _)| *name == table).map_or(0, |(_, count)| *count);
        assert_eq!(left, 0, "{table}");
    }
}
