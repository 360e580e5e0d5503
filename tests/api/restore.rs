//! A restore as clients see it: they miss nothing, and no key is given twice.

use aqueduct::{
    encryption::incarnation,
    store::{DataDir, Durability, Read, backup},
};
use http::StatusCode;
use serde_json::{Value, json};

use crate::support::{TestClient, TestServer};

const SYNC: &str = "/_matrix/client/v3/sync";

fn open(dir: &DataDir) -> TestServer {
    TestServer::over(dir.open_store(8 << 20, Durability::Fsync).unwrap(), |_| {})
}

async fn close(server: TestServer) {
    server.server().stop().await.unwrap();
}

async fn sync(client: &TestClient, since: &str) -> Value {
    let (status, json) =
        client.get(&if since.is_empty() { SYNC.to_owned() } else { format!("{SYNC}?since={since}") }).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    json
}

async fn say(client: &TestClient, room: &str, body: &str) {
    let path = format!("/_matrix/client/v3/rooms/{room}/send/m.room.message/{body}");
    let (status, json) = client.put(&path, json!({ "msgtype": "m.text", "body": body })).await;
    assert_eq!(status, StatusCode::OK, "{json}");
}

fn bodies(json: &Value, room: &str) -> Vec<String> {
    let events = json["rooms"]["join"][room]["timeline"]["events"].as_array().cloned().unwrap_or_default();
    events.iter().filter_map(|event| event["content"]["body"].as_str()).map(str::to_owned).collect()
}

#[tokio::test(start_paused = true)]
async fn after_a_restore_a_client_that_was_ahead_misses_nothing_and_no_key_is_given_twice() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = DataDir::hold(&temporary.path().join("data")).unwrap();
    let copy = temporary.path().join("backup");
    let server = open(&dir);
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (_, made) = alice.post("/_matrix/client/v3/createRoom", json!({ "preset": "public_chat" })).await;
    let room = made["room_id"].as_str().unwrap();
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    let keys = json!({ "one_time_keys": { "signed_curve25519:A": { "key": "a" }, "signed_curve25519:B": { "key": "b" } } });
    assert_eq!(alice.post("/_matrix/client/v3/keys/upload", keys.clone()).await.0, StatusCode::OK);
    say(&alice, room, "kept").await;
    let before = sync(&bob, "").await["next_batch"].as_str().unwrap().to_owned();
    let store = &server.server().app().store;
    let manifest = backup::back_up(store, &copy, "test.example", 0, true, &mut |_| ()).unwrap();

    // The restore takes back everything from here on.
    for number in 0..100 {
        for part in ["a", "b", "c", "d", "e"] {
            say(&alice, room, &format!("lost-{number}-{part}")).await;
        }
    }
    let wanted = json!({ "one_time_keys": { &alice.user_id: { &alice.device_id: "signed_curve25519" } } });
    let (_, claimed) = bob.post("/_matrix/client/v3/keys/claim", wanted.clone()).await;
    assert!(claimed["one_time_keys"][&alice.user_id][&alice.device_id]["signed_curve25519:A"].is_object());
    let ahead = sync(&bob, &before).await["next_batch"].as_str().unwrap().to_owned();
    assert!(store.snapshot().upto().number() > manifest.position + 500);
    drop((alice.server, bob.server));
    let (alice, bob) =
        ((alice.token, alice.user_id, alice.device_id), (bob.token, bob.user_id, bob.device_id));
    close(server).await;

    backup::restore(&copy, &dir, &mut incarnation::begin, &mut |_| ()).unwrap();
    let server = open(&dir);
    let person = |(token, user_id, device_id): (Option<String>, String, String)| TestClient {
        server: server.clone(),
        token,
        user_id,
        device_id,
    };
    let (alice, bob) = (person(alice), person(bob));
    say(&alice, room, "after").await;
    for since in [&ahead, &before] {
        let json = sync(&bob, since).await;
        assert_eq!(bodies(&json, room), ["after"], "since {since}");
        assert_eq!(json["rooms"]["join"][room]["timeline"]["limited"], false);
        let changed = json["device_lists"]["changed"].as_array().unwrap();
        assert!(changed.contains(&json!(alice.user_id)), "{json}");
        let next = json["next_batch"].as_str().unwrap();
        assert_eq!(bodies(&sync(&bob, next).await, room), [""; 0]);
    }
    // The key that bob has, and its sister, are never given again.
    let claim =
        async || bob.post("/_matrix/client/v3/keys/claim", wanted.clone()).await.1["one_time_keys"].clone();
    assert_eq!(claim().await, json!({}));
    let left = sync(&alice, "").await["device_one_time_keys_count"].clone();
    assert_eq!(left["signed_curve25519"], 0);
    // Nor are they when a client that heard nothing of its upload repeats it.
    let repeated = alice.ok_post("/keys/upload", keys).await;
    assert_eq!(repeated["one_time_key_counts"], json!({ "signed_curve25519": 0 }));
    assert_eq!(claim().await, json!({}));
    server.assert_whole();
    assert!(server.server().app().store.snapshot().upto().number() < 1 << 53);
}
