//! A restore as clients see it: they miss nothing, and no key is given twice.

use std::time::Duration;

use aqueduct::{
    encryption::incarnation,
    store::{DataDir, Durability, Read, backup},
};
use federation::testing::Weather;
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    device_lists::{Follower, devices, join, pause, query, upload},
    rooms::Rooms,
    support::{TestClient, TestServer, federated::Federated},
};

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

/// The server of Bob is restored. Alice and Dora of another server have other devices by then, and Bob has had one more meanwhile.
#[tokio::test(start_paused = true)]
async fn after_a_restore_servers_ask_each_other_for_the_device_lists_that_they_may_have_missed() {
    let temporary = tempfile::tempdir().unwrap();
    let place = |name: &str| DataDir::hold(&temporary.path().join(name)).unwrap();
    let (dir, copy) = (place("data"), temporary.path().join("backup"));
    let mut federated = Federated::new(&["a.example", "b.example"]);
    federated.replace(1, dir.open_store(8 << 20, Durability::Os).unwrap());
    let (alice, dora) =
        (federated.server(0).register("alice").await, federated.server(0).register("dora").await);
    let bob = federated.server(1).register("bob").await;
    upload(&alice, "first").await;
    upload(&dora, "of dora").await;
    upload(&bob, "of bob").await;
    let encrypted =
        json!({ "type": "m.room.encryption", "content": { "algorithm": "m.megolm.v1.aes-sha2" } });
    let room = alice.create(json!({ "preset": "public_chat", "initial_state": [encrypted] })).await;
    join(&dora, &room, "a.example").await;
    join(&bob, &room, "a.example").await;
    pause(federated.server(0), 5).await;
    let (of_alice, of_dora) = (alice.user_id.as_str(), dora.user_id.as_str());
    assert_eq!(devices(&query(&bob, &[of_alice]).await, of_alice), ["first"]);
    let store = federated.server(1).server().app().store.clone();
    backup::back_up(&store, &copy, "b.example", 0, true, &mut |_| ()).unwrap();

    // The restore takes back that Bob's server was told of this, and that Bob logged in here.
    let second = alice.on_device("SECOND").await;
    upload(&second, "second").await;
    upload(&bob.on_device("LOST").await, "lost").await;
    pause(federated.server(0), 5).await;
    assert_eq!(devices(&query(&bob, &[of_alice]).await, of_alice).len(), 2);
    assert_eq!(devices(&query(&alice, &[&bob.user_id]).await, &bob.user_id).len(), 2);
    let mut follower = Follower::new(&bob).await;
    assert_eq!(follower.next().await.0, [""; 0]);
    let since = follower.since().to_owned();

    let restored = place("restored");
    backup::restore(&copy, &restored, &mut incarnation::begin, &mut |_| ()).unwrap();
    drop(store);
    federated.replace(1, restored.open_store(8 << 20, Durability::Os).unwrap());
    let bob = TestClient { server: federated.server(1).clone(), ..bob.clone() };
    pause(federated.server(0), 60).await;
    let mut follower = Follower::from(&bob, &since);
    let (changed, left) = follower.next().await;
    assert!(changed.iter().any(|user| user == of_alice), "her list has become another: {changed:?}");
    assert!(changed.iter().any(|user| user == of_dora), "nothing is known of her list: {changed:?}");
    assert_eq!(left, [""; 0]);
    // Each server has asked the other one by itself.
    federated.weather(0, Weather::Refuses, Duration::ZERO);
    let answer = query(&bob, &[of_alice]).await;
    let mut found = devices(&answer, of_alice);
    found.sort();
    assert_eq!((found.len(), &answer["failures"]), (2, &json!({})), "{answer}");
    federated.weather(0, Weather::Fair, Duration::ZERO);
    federated.weather(1, Weather::Refuses, Duration::ZERO);
    let answer = query(&alice, &[&bob.user_id]).await;
    assert_eq!((devices(&answer, &bob.user_id).len(), &answer["failures"]), (1, &json!({})), "{answer}");
    federated.weather(1, Weather::Fair, Duration::ZERO);
    pause(federated.server(0), 2 * 60 * 60).await;
    assert_eq!(follower.next().await.0, [""; 0], "it is told once");
    federated.server(0).assert_whole();
    federated.server(1).assert_whole();
}
