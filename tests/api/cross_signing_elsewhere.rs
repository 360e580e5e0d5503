//! Keys with which users sign keys, between servers (server-server API, "Device Management" and "End-to-End Encryption").

use std::time::Duration;

use federation::testing::Weather;
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{
    device_lists::{BOB, Script, pause},
    rooms::Rooms,
    support::{
        TestClient, encoded,
        federated::Federated,
        olm::{Identity, Pair, confirmed},
    },
};

const SIGNING: &str = "/keys/device_signing/upload";

async fn query(client: &TestClient, of: &str) -> Value {
    client.ok_post("/keys/query", json!({ "device_keys": { of: [] } })).await
}

/// The users whose devices changed since a token, and the next token.
async fn changed(client: &TestClient, since: &mut String) -> Vec<Value> {
    let sync = client.ok_get(&format!("/sync?timeout=0&since={since}")).await;
    *since = sync["next_batch"].as_str().unwrap().to_owned();
    sync["device_lists"]["changed"].as_array().cloned().unwrap_or_default()
}

async fn begin(client: &TestClient) -> String {
    client.ok_get("/sync?timeout=0").await["next_batch"].as_str().unwrap().to_owned()
}

#[tokio::test(start_paused = true)]
async fn keys_and_signatures_reach_the_other_server_and_are_kept_there() {
    let federated = Federated::new(&["a.example", "b.example"]);
    let alice = federated.server(0).register("alice").await;
    let bob = federated.server(1).register("bob").await;
    let phone = Pair::new("phone");
    alice.ok_post("/keys/upload", json!({ "device_keys": phone.device_keys(&alice) })).await;
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{}?via=a.example", encoded(&room)), json!({})).await;
    pause(federated.server(0), 5).await;
    let of = alice.user_id.as_str();
    assert_eq!(query(&bob, of).await.get("master_keys"), None);
    let mut since = begin(&bob).await;
    let keys = Identity::new(&alice, "first");
    // The other server sees this by itself: whatever is asked for is refused.
    let seen = async |since: &mut String| {
        pause(federated.server(0), 5).await;
        assert_eq!(changed(&bob, since).await, [of]);
        federated.weather(0, Weather::Refuses, Duration::ZERO);
        let answer = query(&bob, of).await;
        federated.weather(0, Weather::Fair, Duration::ZERO);
        assert_eq!(answer["failures"], json!({}));
        answer
    };
    let master = phone.signed(of, &alice.device_id, keys.master_key());
    let mut all = keys.all();
    all["master_key"] = master.clone();
    alice.ok_post(SIGNING, all).await;
    let answer = seen(&mut since).await;
    assert_eq!(answer["master_keys"], json!({ of: master }));
    assert_eq!(answer["self_signing_keys"], json!({ of: keys.self_signing_key() }));
    assert_eq!(answer.get("user_signing_keys"), None);
    let device = keys.signed(&keys.self_signing, phone.device_keys(&alice));
    alice.ok_post("/keys/signatures/upload", json!({ of: { &alice.device_id: device } })).await;
    let answer = seen(&mut since).await;
    assert_eq!(answer["device_keys"][of][&alice.device_id]["signatures"], device["signatures"]);
    // A second device signs the master key, which is told as well.
    let second = alice.on_device("SECOND").await;
    let tablet = Pair::new("tablet");
    second.ok_post("/keys/upload", json!({ "device_keys": tablet.device_keys(&second) })).await;
    let by_second = tablet.signed(of, "SECOND", keys.master_key());
    alice.ok_post("/keys/signatures/upload", json!({ of: { keys.master.public(): by_second } })).await;
    let signatures = |answer: &Value| answer["master_keys"][of]["signatures"][of].as_object().unwrap().len();
    assert_eq!(signatures(&seen(&mut since).await), 2);
    second.ok_post("/logout", json!({})).await;
    assert_eq!(signatures(&seen(&mut since).await), 1);
    // A new user-signing key is nobody else's business.
    let other = Identity { user_signing: Pair::new("another"), ..Identity::new(&alice, "first") };
    alice.ok_post(SIGNING, confirmed(&alice, json!({ "user_signing_key": other.user_signing_key() }))).await;
    pause(federated.server(0), 5).await;
    assert_eq!(changed(&bob, &mut since).await, [Value::Null; 0]);
    // Bob signs the key of Alice, and her server is told nothing of it.
    let bobs = Identity::new(&bob, "bob");
    bob.ok_post(SIGNING, bobs.all()).await;
    let signed = bobs.signed(&bobs.user_signing, keys.master_key());
    let body = json!({ of: { keys.master.public(): signed } });
    assert_eq!(bob.ok_post("/keys/signatures/upload", body).await, json!({ "failures": {} }));
    changed(&bob, &mut since).await;
    let seen_by_bob = query(&bob, of).await["master_keys"][of]["signatures"].clone();
    assert_eq!(seen_by_bob[&bob.user_id], signed["signatures"][&bob.user_id]);
    assert_eq!(query(&alice, of).await["master_keys"][of]["signatures"].get(&bob.user_id), None);
    // A server that was away learns of a reset when it is back, by the gap.
    federated.weather(1, Weather::Refuses, Duration::ZERO);
    let reset = Identity::new(&alice, "reset");
    alice.ok_post(SIGNING, confirmed(&alice, reset.all())).await;
    pause(federated.server(0), 30).await;
    federated.weather(1, Weather::Fair, Duration::ZERO);
    pause(federated.server(0), 200).await;
    let answer = seen(&mut since).await;
    assert_eq!(answer["master_keys"], json!({ of: reset.master_key() }));
    assert_eq!(answer["self_signing_keys"], json!({ of: reset.self_signing_key() }));
    federated.server(0).assert_whole();
    federated.server(1).assert_whole();
}

#[tokio::test(start_paused = true)]
async fn the_keys_of_somebody_without_a_common_room_are_asked_for() {
    let federated = Federated::new(&["a.example", "b.example"]);
    let alice = federated.server(0).register("alice").await;
    let bob = federated.server(1).register("bob").await;
    let (keys, bobs) = (Identity::new(&alice, "a"), Identity::new(&bob, "b"));
    alice.ok_post(SIGNING, keys.all()).await;
    bob.ok_post(SIGNING, bobs.all()).await;
    let of = alice.user_id.as_str();
    assert_eq!(query(&bob, of).await["self_signing_keys"], json!({ of: keys.self_signing_key() }));
    let signed = bobs.signed(&bobs.user_signing, keys.master_key());
    let body = json!({ of: { keys.master.public(): signed } });
    assert_eq!(bob.ok_post("/keys/signatures/upload", body).await, json!({ "failures": {} }));
    assert_eq!(query(&bob, of).await["master_keys"], json!({ of: signed }));
    federated.server(1).assert_whole();
}

impl Script {
    async fn ask(&self, method: Method, path: &str, body: Option<Value>) -> Value {
        let path = format!("/_matrix/federation/v1/user/{path}");
        let (status, answer) = self.peer.ask(&self.server, method, &path, body.as_ref()).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    }

    async fn tell_keys(&self, txn: &str, content: Value) {
        let edu = json!({ "edu_type": "m.signing_key_update", "content": content });
        let (status, answer) = self.peer.transact(&self.server, txn, &[], &[edu]).await;
        assert_eq!((status, answer), (StatusCode::OK, json!({ "pdus": {} })));
    }
}

#[tokio::test(start_paused = true)]
async fn another_server_is_told_and_asks_for_the_keys_of_our_users() {
    let script = Script::new().await;
    let (alice, phone) = (&script.alice, Pair::new("phone"));
    let of = alice.user_id.as_str();
    alice.ok_post("/keys/upload", json!({ "device_keys": phone.device_keys(alice) })).await;
    pause(&script.server, 5).await;
    let before = script.take_told().pop().unwrap();
    let keys = Identity::new(alice, "a");
    alice.ok_post(SIGNING, keys.all()).await;
    pause(&script.server, 5).await;
    let told = script.take_told();
    let content = json!({
        "user_id": of, "master_key": keys.master_key(), "self_signing_key": keys.self_signing_key(),
    });
    assert_eq!(told[0], json!({ "edu_type": "m.signing_key_update", "content": content }));
    // The change has a number, so that whoever misses it notices the gap.
    assert_eq!(told[1]["edu_type"], "m.device_list_update");
    assert_eq!(told[1]["content"]["prev_id"], json!([before["content"]["stream_id"]]));
    assert_eq!(told.len(), 2);
    let list = script.ask(Method::GET, &format!("devices/{}", encoded(of)), None).await;
    assert_eq!(list["stream_id"], told[1]["content"]["stream_id"]);
    assert_eq!(list["master_key"], keys.master_key());
    assert_eq!(list["self_signing_key"], keys.self_signing_key());
    assert_eq!(list.get("user_signing_key"), None);
    let answer = script.ask(Method::POST, "keys/query", Some(json!({ "device_keys": { of: [] } }))).await;
    assert_eq!(answer["master_keys"], json!({ of: keys.master_key() }));
    assert_eq!(answer["self_signing_keys"], json!({ of: keys.self_signing_key() }));
    assert_eq!(answer.get("user_signing_keys"), None);
    // A signature of a device is a change of the device alone.
    let device = keys.signed(&keys.self_signing, phone.device_keys(alice));
    alice.ok_post("/keys/signatures/upload", json!({ of: { &alice.device_id: device } })).await;
    pause(&script.server, 5).await;
    let told = script.take_told();
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(told[0]["content"]["keys"]["signatures"], device["signatures"]);
    script.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn keys_that_another_server_tells_are_its_users_own_and_bounded() {
    let script = Script::new().await;
    let (alice, bob) = (&script.alice, TestClient { user_id: BOB.to_owned(), ..script.alice.clone() });
    let keys = Identity::new(&bob, "b");
    let answer = json!({
        "user_id": BOB, "stream_id": 5, "devices": [],
        "master_key": keys.master_key(), "self_signing_key": keys.self_signing_key(),
    });
    script.answers(200, answer);
    let shown = async || {
        let answer = query(alice, BOB).await;
        (answer["master_keys"][BOB].clone(), answer["self_signing_keys"][BOB].clone())
    };
    assert_eq!(shown().await, (keys.master_key(), keys.self_signing_key()));
    let mut since = begin(alice).await;
    // The same again is nothing new.
    script.tell_keys("1", json!({ "user_id": BOB, "master_key": keys.master_key() })).await;
    assert_eq!(changed(alice, &mut since).await, [Value::Null; 0]);
    // Signatures of others over the key are left out: nobody here may know of them.
    let mut of_others = Pair::new("phone").signed(BOB, "PHONE", keys.master_key());
    let expected = of_others.clone();
    of_others["signatures"]["@eve:b.example"] = json!({ "ed25519:eve": "sig" });
    script.tell_keys("2", json!({ "user_id": BOB, "master_key": of_others })).await;
    assert_eq!(changed(alice, &mut since).await, [BOB]);
    assert_eq!(shown().await, (expected.clone(), keys.self_signing_key()));
    // Others have no say, and no room for more than a key.
    let eve = TestClient { user_id: "@eve:c.example".to_owned(), ..alice.clone() };
    script
        .tell_keys(
            "3",
            json!({ "user_id": "@eve:c.example", "master_key": Identity::new(&eve, "e").master_key() }),
        )
        .await;
    assert_eq!(changed(alice, &mut since).await, [Value::Null; 0]);
    assert_eq!(shown().await, (expected, keys.self_signing_key()));
    // A key that cannot be is a change that nobody here can read, so that the list is asked for again.
    let reset = Identity::new(&bob, "reset");
    let answer = json!({ "user_id": BOB, "stream_id": 6, "devices": [], "master_key": reset.master_key() });
    script.answers(200, answer);
    let mut big = reset.master_key();
    big["more"] = "x".repeat(40_000).into();
    script.tell_keys("4", json!({ "user_id": BOB, "master_key": big })).await;
    pause(&script.server, 10).await;
    assert_eq!(changed(alice, &mut since).await, [BOB]);
    assert_eq!(
        shown().await,
        (reset.master_key(), Value::Null),
        "the resync forgets what is not there any more"
    );
    // A new master key has not signed the self-signing key of the old one.
    script.tell_keys("5", json!({ "user_id": BOB, "self_signing_key": reset.self_signing_key() })).await;
    assert_eq!(shown().await, (reset.master_key(), reset.self_signing_key()));
    script.tell_keys("6", json!({ "user_id": BOB, "master_key": keys.master_key() })).await;
    assert_eq!(shown().await, (keys.master_key(), Value::Null));
    script.server.assert_whole();
}
