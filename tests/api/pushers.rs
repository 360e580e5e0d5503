//! `src/api/client/pushers.rs`

use http::StatusCode;
use serde_json::{Value, json};

use crate::support::{TestClient, TestServer};

const PUSHERS: &str = "/_matrix/client/v3/pushers";
const SET: &str = "/_matrix/client/v3/pushers/set";

fn pusher(key: &str) -> Value {
    json!({
        "pushkey": key, "kind": "http", "app_id": "org.example.app", "app_display_name": "App",
        "device_display_name": "Phone", "profile_tag": "x", "lang": "en",
        "data": { "url": "https://gateway.example/_matrix/push/v1/notify", "format": "event_id_only", "own": [1] },
    })
}

/// A pusher as the client is shown it that set it.
fn shown(client: &TestClient, mut pusher: Value) -> Value {
    pusher["org.matrix.msc3881.enabled"] = json!(true);
    pusher["org.matrix.msc3881.device_id"] = json!(client.device_id);
    json!({ "pushers": [pusher] })
}

async fn keys(client: &TestClient) -> Vec<String> {
    let (status, json) = client.get(PUSHERS).await;
    assert_eq!(status, StatusCode::OK);
    let pushers = json["pushers"].as_array().unwrap().iter();
    pushers.map(|pusher| pusher["pushkey"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(start_paused = true)]
async fn pushers_are_set_replaced_listed_and_deleted() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    assert_eq!(alice.get(PUSHERS).await.1, json!({ "pushers": [] }));
    assert_eq!(alice.post(SET, pusher("k")).await, (StatusCode::OK, json!({})));
    assert_eq!(alice.get(PUSHERS).await.1, shown(&alice, pusher("k")));
    let mut newer = pusher("k");
    newer["lang"] = json!("de");
    alice.ok_post(SET, newer.clone()).await;
    assert_eq!(alice.get(PUSHERS).await.1, shown(&alice, newer));

    let mut appended = pusher("k");
    appended["append"] = json!(true);
    assert_eq!(bob.post(SET, appended).await.0, StatusCode::OK);
    assert_eq!((keys(&alice).await, keys(&bob).await), (vec!["k".to_owned()], vec!["k".to_owned()]));
    alice.ok_post(SET, pusher("other")).await;
    // The app belongs to another user now.
    bob.ok_post(SET, pusher("k")).await;
    assert_eq!((keys(&alice).await, keys(&bob).await), (vec!["other".to_owned()], vec!["k".to_owned()]));

    let gone = json!({ "kind": null, "app_id": "org.example.app", "pushkey": "k" });
    alice.ok_post(SET, gone.clone()).await;
    assert_eq!(keys(&bob).await, ["k"], "only one's own pushers are deleted");
    for _ in 0..2 {
        assert_eq!(bob.post(SET, gone.clone()).await, (StatusCode::OK, json!({})));
        assert!(keys(&bob).await.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn pushers_go_with_the_device_that_set_them() {
    let alice = TestServer::new().register("alice").await;
    let second = alice.on_device("SECOND").await;
    alice.ok_post(SET, pusher("first")).await;
    second.ok_post(SET, pusher("second")).await;
    let change = |old: &str, new: &str| {
        json!({ "new_password": new, "auth": { "type": "m.login.password", "password": old,
            "identifier": { "type": "m.id.user", "user": alice.user_id } } })
    };
    let (status, _) =
        alice.post("/_matrix/client/v3/account/password", change("password of alice", "new")).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(keys(&alice).await, ["first"], "those of other sessions go with the old password");
    let mut auth = change("new", "");
    auth.as_object_mut().unwrap().remove("new_password");
    assert_eq!(alice.post("/_matrix/client/v3/account/deactivate", auth).await.0, StatusCode::OK);
    // Others may use her app id and pushkey again, because no row of hers is left that would take their pusher away.
    let bob = alice.server.register("bob").await;
    bob.ok_post(SET, pusher("first")).await;
    assert_eq!(keys(&bob).await, ["first"]);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_a_pusher_is_refused() {
    let alice = TestServer::new().register("alice").await;
    let with = |pointer: &str, value: Value| {
        let mut body = pusher("k");
        *body.pointer_mut(pointer).unwrap() = value;
        body
    };
    let without = |key: &str| {
        let mut body = pusher("k");
        body.as_object_mut().unwrap().remove(key);
        body
    };
    for (body, code) in [
        (without("lang"), "M_MISSING_PARAM"),
        (without("data"), "M_MISSING_PARAM"),
        (without("kind"), "M_MISSING_PARAM"),
        (without("pushkey"), "M_MISSING_PARAM"),
        (with("/pushkey", json!("k".repeat(513))), "M_INVALID_PARAM"),
        (with("/pushkey", json!("")), "M_INVALID_PARAM"),
        (with("/app_id", json!("a".repeat(65))), "M_INVALID_PARAM"),
        (with("/kind", json!("email")), "M_INVALID_PARAM"),
        (with("/kind", json!("pigeon")), "M_INVALID_PARAM"),
        (with("/kind", json!(7)), "M_BAD_JSON"),
        (with("/data", json!({})), "M_MISSING_PARAM"),
        (with("/data/url", json!("http://gateway.example/_matrix/push/v1/notify")), "M_INVALID_PARAM"),
        (with("/data/url", json!("https://gateway.example/notify")), "M_INVALID_PARAM"),
        (with("/data/url", json!("https://gateway.example:0/_matrix/push/v1/notify")), "M_INVALID_PARAM"),
        (with("/data/url", json!("https://gateway.example:99999/_matrix/push/v1/notify")), "M_INVALID_PARAM"),
        (with("/data/url", json!("https://gateway..example/_matrix/push/v1/notify")), "M_INVALID_PARAM"),
        (with("/data/url", json!("https://u:p@gateway.example/_matrix/push/v1/notify")), "M_INVALID_PARAM"),
        (with("/data/url", json!("/_matrix/push/v1/notify")), "M_INVALID_PARAM"),
        (with("/data/url", json!("nonsense")), "M_INVALID_PARAM"),
        (with("/device_display_name", json!("x".repeat(20_000))), "M_INVALID_PARAM"),
    ] {
        let (status, json) = alice.post(SET, body.clone()).await;
        assert_eq!((status.as_u16(), &json["errcode"]), (400, &json!(code)), "{body}: {json}");
    }
    assert!(keys(&alice).await.is_empty());
}
