//! Everything that belongs to a device goes with it, however it ends.

use std::collections::BTreeMap;

use http::StatusCode;
use serde_json::{Value, json};

use crate::support::{
    TestClient, TestServer, encoded,
    olm::{Identity, Pair, confirmed},
};

/// The tables that keep something for single devices.
const TABLES: [&str; 11] = [
    "DEVICES",
    "DEVICE_KEYS",
    "DEVICE_SIGNED",
    "FALLBACK_KEYS",
    "GIVEN_KEYS",
    "INBOX",
    "INBOX_SHARE",
    "INBOX_STATE",
    "KEY_COUNTS",
    "MASTER_SIGNED",
    "ONE_TIME_KEYS",
];

/// The number of rows in each of these tables that has some.
fn rows(server: &TestServer) -> BTreeMap<&'static str, u64> {
    let rows = server.assert_whole().into_iter();
    rows.filter(|(table, count)| TABLES.contains(table) && *count > 0).collect()
}

/// A device that has everything that a device can have here.
async fn device(alice: &TestClient, bob: &TestClient, name: &str) -> TestClient {
    let (device, pair) = (alice.on_device(name).await, Pair::new(name));
    let upload = json!({
        "device_keys": pair.device_keys(&device), "one_time_keys": pair.one_time(&device, ["A", "B"]),
        "fallback_keys": pair.one_time(&device, ["F"]),
    });
    device.ok_post("/keys/upload", upload).await;
    let claim = json!({ "one_time_keys": { &alice.user_id: { name: "signed_curve25519" } } });
    bob.ok_post("/keys/claim", claim).await;
    let message = json!({ "messages": { &alice.user_id: { name: { "text": "hello" } } } });
    bob.ok_put(&format!("/sendToDevice/m.test/{}", encoded(name)), message).await;
    let keys = Identity::new(alice, "keys");
    let signed = json!({ &alice.user_id: {
        name: keys.signed(&keys.self_signing, pair.device_keys(&device)),
        keys.master.public(): pair.signed(&alice.user_id, name, keys.master_key()),
    } });
    assert_eq!(device.ok_post("/keys/signatures/upload", signed).await, json!({ "failures": {} }));
    device
}

#[tokio::test(start_paused = true)]
async fn nothing_of_a_device_is_left_when_it_ends() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    alice.ok_post("/keys/device_signing/upload", Identity::new(&alice, "keys").all()).await;
    let before = rows(&server);
    for way in ["logout", "delete", "delete several", "password", "log in anew"] {
        let first = device(&alice, &bob, &format!("{way} 1")).await;
        let second = device(&alice, &bob, &format!("{way} 2")).await;
        let full = rows(&server);
        assert!(full.len() == TABLES.len() && full.values().all(|count| *count >= 2), "{full:?}");
        let ids = [first.device_id.clone(), second.device_id.clone()];
        match way {
            "logout" => {
                first.ok_post("/logout", json!({})).await;
                second.ok_post("/logout", json!({})).await;
            }
            "delete" => {
                for id in ids {
                    let path = format!("/devices/{}", encoded(&id));
                    alice.ok_delete(&path, confirmed(&alice, json!({}))).await;
                }
            }
            "password" => {
                let body = json!({ "new_password": "password of alice", "logout_devices": true });
                alice.ok_post("/account/password", confirmed(&alice, body)).await;
            }
            _ => {
                let body = json!({ "devices": ids });
                let (status, json) = alice.post("/_matrix/client/v3/delete_devices", body.clone()).await;
                assert_eq!(status, StatusCode::UNAUTHORIZED, "{json}");
                alice.ok_post("/delete_devices", confirmed(&alice, body)).await;
            }
        }
        assert_eq!(rows(&server), before, "{way}");
        if way == "log in anew" {
            // Another device of the same id has nothing of the first one.
            let again = alice.on_device(&first.device_id).await;
            let sync = again.ok_get("/sync?timeout=0").await;
            assert_eq!(sync["device_one_time_keys_count"], json!({ "signed_curve25519": 0 }));
            assert_eq!(sync["device_unused_fallback_key_types"], json!([]));
            assert_eq!(sync["to_device"]["events"].as_array().map_or(0, Vec::len), 0, "{sync}");
            let shown = bob.ok_post("/keys/query", json!({ "device_keys": { &alice.user_id: [] } })).await;
            assert_eq!(shown["device_keys"][&alice.user_id], json!({}));
            assert_eq!(shown["master_keys"][&alice.user_id].get("signatures"), None::<&Value>);
        }
    }
}
