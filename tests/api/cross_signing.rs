//! Keys with which users sign keys, and their signatures (`src/api/client/keys.rs`).

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    device_lists::Follower,
    rooms::Rooms,
    support::{
        TestClient, TestServer,
        olm::{Identity, Pair, confirmed},
    },
};

const SIGNING: &str = "/_matrix/client/v3/keys/device_signing/upload";

async fn query(client: &TestClient, of: &TestClient) -> Value {
    client.ok_post("/keys/query", json!({ "device_keys": { &of.user_id: [] } })).await
}

/// Uploads signatures, and answers what was not taken.
async fn sign(client: &TestClient, signed: Value) -> Value {
    client.ok_post("/keys/signatures/upload", signed).await["failures"].clone()
}

/// Two users in a room, each with a device that has keys.
async fn two(server: &TestServer) -> [(TestClient, Pair); 2] {
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    let (alices, bobs) = (Pair::new("alice's phone"), Pair::new("bob's phone"));
    alice.ok_post("/keys/upload", json!({ "device_keys": alices.device_keys(&alice) })).await;
    bob.ok_post("/keys/upload", json!({ "device_keys": bobs.device_keys(&bob) })).await;
    [(alice, alices), (bob, bobs)]
}

#[tokio::test(start_paused = true)]
async fn the_first_keys_are_free_and_others_are_confirmed() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let (first, second) = (Identity::new(&alice, "first"), Identity::new(&alice, "second"));
    let refused = async |body: Value, code: &str| {
        let (status, json) = alice.post(SIGNING, body).await;
        assert_eq!((status, json["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some(code)), "{json}");
    };
    refused(json!({ "self_signing_key": first.self_signing_key() }), "M_MISSING_PARAM").await;
    refused(json!({}), "M_MISSING_PARAM").await;
    alice.ok_post(SIGNING, json!({ "master_key": first.master_key() })).await;
    alice.ok_post(SIGNING, json!({ "master_key": first.master_key() })).await;
    // A key more, or another one, is confirmed.
    for body in [
        json!({ "self_signing_key": first.self_signing_key() }),
        first.all(),
        json!({ "master_key": second.master_key() }),
    ] {
        let (status, json) = alice.post(SIGNING, body.clone()).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{json}");
        assert_eq!(json["flows"], json!([{ "stages": ["m.login.password"] }]));
        assert!(json["session"].is_string());
    }
    let mut wrong = confirmed(&alice, first.all());
    wrong["auth"]["password"] = "wrong".into();
    assert_eq!(alice.post(SIGNING, wrong).await.0, StatusCode::UNAUTHORIZED);
    alice.ok_post(SIGNING, confirmed(&alice, first.all())).await;
    alice.ok_post(SIGNING, confirmed(&alice, first.all())).await;
    alice.ok_post(SIGNING, first.all()).await;
    let shown = query(&alice, &alice).await;
    assert_eq!(shown["master_keys"], json!({ &alice.user_id: first.master_key() }));
    assert_eq!(shown["self_signing_keys"], json!({ &alice.user_id: first.self_signing_key() }));
    assert_eq!(shown["user_signing_keys"], json!({ &alice.user_id: first.user_signing_key() }));
    // Another master key takes the keys along that it has not signed.
    let body = json!({ "master_key": second.master_key(), "self_signing_key": second.self_signing_key() });
    alice.ok_post(SIGNING, confirmed(&alice, body)).await;
    let shown = query(&alice, &alice).await;
    assert_eq!(shown["master_keys"], json!({ &alice.user_id: second.master_key() }));
    assert_eq!(shown["self_signing_keys"], json!({ &alice.user_id: second.self_signing_key() }));
    assert_eq!(shown.get("user_signing_keys"), None);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn keys_that_cannot_be_are_refused() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let keys = Identity::new(&alice, "keys");
    let other = Identity::new(&alice, "other");
    let with = |field: &str, key: Value| {
        let mut body = keys.all();
        body[field] = key;
        body
    };
    let mut two = keys.master_key();
    two["keys"]["ed25519:other"] = "other".into();
    let named =
        |id: &str, key: &str| json!({ "user_id": alice.user_id, "usage": ["master"], "keys": { id: key } });
    let big =
        json!({ "user_id": alice.user_id, "usage": ["master"], "keys": {}, "more": "x".repeat(10_000) });
    let unsigned = keys.self_signing.signing_key(&alice.user_id, "self_signing");
    let by_other = other.signed(&other.master, unsigned.clone());
    let mut forged = keys.self_signing_key();
    forged["signatures"] = other.self_signing_key()["signatures"].clone();
    let mut of_device = keys.master_key();
    of_device["signatures"] = json!({ &alice.user_id: { format!("ed25519:{}", alice.device_id): "sig" } });
    alice.ok_post("/keys/upload", json!({ "device_keys": Pair::new("phone").device_keys(&alice) })).await;
    let cases = [
        (with("master_key", json!(1)), 400, "M_BAD_JSON"),
        (with("master_key", json!([])), 400, "M_BAD_JSON"),
        (with("master_key", json!({})), 400, "M_INVALID_PARAM"),
        (with("master_key", Identity::new(&bob, "keys").master_key()), 400, "M_INVALID_PARAM"),
        (with("master_key", keys.self_signing_key()), 400, "M_INVALID_PARAM"),
        (with("master_key", two), 400, "M_INVALID_PARAM"),
        (with("master_key", named("ed25519:short", "short")), 400, "M_INVALID_PARAM"),
        (with("master_key", named("ed25519:x", &keys.master.public())), 400, "M_INVALID_PARAM"),
        (with("master_key", big), 413, "M_TOO_LARGE"),
        (with("master_key", of_device), 400, "M_INVALID_SIGNATURE"),
        (with("self_signing_key", unsigned), 400, "M_INVALID_SIGNATURE"),
        (with("self_signing_key", by_other), 400, "M_INVALID_SIGNATURE"),
        (with("self_signing_key", forged), 400, "M_INVALID_SIGNATURE"),
        (with("user_signing_key", other.user_signing_key()), 400, "M_INVALID_SIGNATURE"),
    ];
    for (body, status, code) in cases {
        let (found, json) = alice.post(SIGNING, body).await;
        assert_eq!((found.as_u16(), json["errcode"].as_str()), (status, Some(code)), "{json}");
    }
    assert_eq!(query(&alice, &alice).await.get("master_keys"), None, "nothing of them was kept");
    // No device is named as a key, and no key as a device.
    alice.on_device(&keys.master.public()).await;
    let (status, json) = alice.post(SIGNING, keys.all()).await;
    assert_eq!((status, &json["errcode"]), (StatusCode::FORBIDDEN, &json!("M_FORBIDDEN")));
    alice.ok_post(SIGNING, other.all()).await;
    let login = json!({
        "type": "m.login.password", "identifier": { "type": "m.id.user", "user": "alice" },
        "password": "password of alice", "device_id": other.user_signing.public(),
    });
    let (status, _) = server.anonymous().post("/_matrix/client/v3/login", login).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn each_sees_the_signatures_that_they_may_see() {
    let server = TestServer::new();
    let [(alice, phone), (bob, _)] = two(&server).await;
    let (alices, bobs) = (Identity::new(&alice, "a"), Identity::new(&bob, "b"));
    let (mut of_alice, mut of_bob) = (Follower::new(&alice).await, Follower::new(&bob).await);
    // The master key comes with the signature of a device, as some clients send it.
    let by_device = |key: Value| phone.signed(&alice.user_id, &alice.device_id, key);
    let mut all = alices.all();
    all["master_key"] = by_device(alices.master_key());
    // Somebody else's signature says nothing that others may know.
    all["master_key"]["signatures"]["@eve:test.example"] = json!({ "ed25519:eve": "sig" });
    alice.ok_post(SIGNING, all).await;
    bob.ok_post(SIGNING, bobs.all()).await;
    for follower in [&mut of_alice, &mut of_bob] {
        assert_eq!(follower.next().await.0, [alice.user_id.clone(), bob.user_id.clone()]);
    }
    for client in [&alice, &bob] {
        let shown = query(client, &alice).await;
        assert_eq!(shown["master_keys"][&alice.user_id], by_device(alices.master_key()));
        assert_eq!(shown["self_signing_keys"][&alice.user_id], alices.self_signing_key());
        let is_own = client.user_id == alice.user_id;
        assert_eq!(shown.get("user_signing_keys").is_some(), is_own);
    }
    // Alice signs her device, which everybody sees.
    let device = alices.signed(&alices.self_signing, phone.device_keys(&alice));
    assert_eq!(sign(&alice, json!({ &alice.user_id: { &alice.device_id: device } })).await, json!({}));
    for follower in [&mut of_alice, &mut of_bob] {
        assert_eq!(follower.next().await.0, std::slice::from_ref(&alice.user_id));
    }
    for client in [&alice, &bob] {
        let shown = query(client, &alice).await;
        let mut expected = device.clone();
        expected["unsigned"] = json!({});
        assert_eq!(shown["device_keys"][&alice.user_id][&alice.device_id], expected);
    }
    // She signs Bob's master key, which she alone sees.
    let signed = alices.signed(&alices.user_signing, bobs.master_key());
    let body = json!({ &bob.user_id: { bobs.master.public(): signed } });
    assert_eq!(sign(&alice, body.clone()).await, json!({}));
    assert_eq!(of_alice.next().await.0, std::slice::from_ref(&bob.user_id));
    assert_eq!(of_bob.next().await.0, [""; 0]);
    assert_eq!(query(&alice, &bob).await["master_keys"][&bob.user_id], signed);
    assert_eq!(query(&bob, &bob).await["master_keys"][&bob.user_id], bobs.master_key());
    assert_eq!(sign(&alice, body).await, json!({}));
    assert_eq!(of_alice.next().await.0, [""; 0], "the same signature is nothing new");
    // A new user-signing key is told to Alice alone, and ends what the old one signed.
    let other = Identity { user_signing: Pair::new("another"), ..Identity::new(&alice, "a") };
    let body = confirmed(&alice, json!({ "user_signing_key": other.user_signing_key() }));
    alice.ok_post(SIGNING, body).await;
    assert_eq!((of_alice.next().await.0, of_bob.next().await.0), (vec![alice.user_id.clone()], Vec::new()));
    assert_eq!(query(&alice, &bob).await["master_keys"][&bob.user_id], bobs.master_key());
    // The master key of Bob is another one, so that the signature over the old one is not shown.
    let signed = other.signed(&other.user_signing, bobs.master_key());
    assert_eq!(sign(&alice, json!({ &bob.user_id: { bobs.master.public(): signed } })).await, json!({}));
    let reset = Identity::new(&bob, "reset");
    bob.ok_post(SIGNING, confirmed(&bob, reset.all())).await;
    assert_eq!(query(&alice, &bob).await["master_keys"][&bob.user_id], reset.master_key());
    server.assert_whole();
    let killed = server.killed(usize::MAX);
    let again = TestClient { server: killed.clone(), ..alice.clone() };
    let shown = query(&again, &alice).await;
    assert_eq!(shown["user_signing_keys"], json!({ &alice.user_id: other.user_signing_key() }));
    killed.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn each_signature_is_judged_by_itself() {
    let server = TestServer::new();
    let [(alice, phone), (bob, bobs_phone)] = two(&server).await;
    let (alices, bobs) = (Identity::new(&alice, "a"), Identity::new(&bob, "b"));
    let second = alice.on_device("SECOND").await;
    let tablet = Pair::new("tablet");
    second.ok_post("/keys/upload", json!({ "device_keys": tablet.device_keys(&second) })).await;
    alice.on_device("NOKEYS").await;
    let unsigned =
        sign(&alice, json!({ &alice.user_id: { &alice.device_id: phone.device_keys(&alice) } })).await;
    assert_eq!(unsigned[&alice.user_id][&alice.device_id]["errcode"], "M_INVALID_SIGNATURE");
    alice.ok_post(SIGNING, alices.all()).await;
    bob.ok_post(SIGNING, bobs.all()).await;
    let device = |pair: &Pair, of: &TestClient| alices.signed(&alices.self_signing, pair.device_keys(of));
    let mut altered = device(&tablet, &second);
    altered["algorithms"] = json!([]);
    let altered = alices.signed(&alices.self_signing, altered);
    let mut forged = device(&tablet, &second);
    forged["signatures"][&alice.user_id] = device(&phone, &alice)["signatures"][&alice.user_id].clone();
    let by_second = tablet.signed(&alice.user_id, "SECOND", alices.master_key());
    let mut half = phone.signed(&alice.user_id, &alice.device_id, by_second.clone());
    half["signatures"][&alice.user_id]["ed25519:SECOND"] = "wrong".into();
    let (master, bobs_master) = (alices.master.public(), bobs.master.public());
    let (master, bobs_master, bobs_id) = (&*master, &*bobs_master, &*bob.user_id);
    let self_signing = alices.self_signing.public();
    let of_bob = |by: &Pair| alices.signed(by, bobs.master_key());
    let codes = async |of: &str, id: &str, object: Value| {
        let failures = sign(&alice, json!({ of: { id: object } })).await;
        let failure = &failures[of][id];
        assert!(failure.is_null() || failure["error"].is_string());
        failure["errcode"].as_str().unwrap_or_default().to_owned()
    };
    let own = alice.user_id.as_str();
    for (of, id, object, expected) in [
        (own, "SECOND", altered, "M_INVALID_PARAM"),
        (own, "SECOND", forged, "M_INVALID_SIGNATURE"),
        (own, "SECOND", json!(1), "M_BAD_JSON"),
        (own, "SECOND", alices.signed(&alices.master, tablet.device_keys(&second)), "M_INVALID_SIGNATURE"),
        (own, "SECOND", device(&tablet, &second), ""),
        (own, "NOKEYS", device(&tablet, &second), "M_NOT_FOUND"),
        (own, "NONE", device(&tablet, &second), "M_NOT_FOUND"),
        (own, master, alices.master_key(), "M_INVALID_SIGNATURE"),
        (own, master, bobs.master_key(), "M_INVALID_PARAM"),
        // One is right and is taken, the other one is named.
        (own, master, half, "M_INVALID_SIGNATURE"),
        (own, master, by_second, ""),
        (own, &*self_signing, alices.self_signing_key(), "M_NOT_FOUND"),
        (bobs_id, bobs_master, of_bob(&alices.self_signing), "M_INVALID_SIGNATURE"),
        (bobs_id, bobs_master, alices.master_key(), "M_INVALID_PARAM"),
        (bobs_id, "other", of_bob(&alices.user_signing), "M_NOT_FOUND"),
        (bobs_id, &*bob.device_id, bobs_phone.device_keys(&bob), "M_NOT_FOUND"),
        ("@none:test.example", "other", of_bob(&alices.user_signing), "M_NOT_FOUND"),
        ("@none:far.example", "other", of_bob(&alices.user_signing), "M_NOT_FOUND"),
        (bobs_id, bobs_master, of_bob(&alices.user_signing), ""),
    ] {
        assert_eq!(codes(of, id, object.clone()).await, expected, "{of} {id} {object}");
    }
    let shown = query(&bob, &alice).await;
    let by_devices = shown["master_keys"][own]["signatures"][own].as_object().unwrap();
    assert_eq!(by_devices.len(), 2, "{by_devices:?}");
    let of_second = &shown["device_keys"][own]["SECOND"]["signatures"][own];
    assert_eq!(of_second.as_object().unwrap().len(), 2, "{of_second}");
    let many: serde_json::Map<_, _> = (0..501).map(|number| (number.to_string(), json!({}))).collect();
    let (status, _) = alice.post("/_matrix/client/v3/keys/signatures/upload", json!({ own: many })).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn signatures_go_with_their_device_and_with_their_keys() {
    let server = TestServer::new();
    let [(alice, phone), (bob, _)] = two(&server).await;
    let alices = Identity::new(&alice, "a");
    let second = alice.on_device("SECOND").await;
    let tablet = Pair::new("tablet");
    second.ok_post("/keys/upload", json!({ "device_keys": tablet.device_keys(&second) })).await;
    alice.ok_post(SIGNING, alices.all()).await;
    let own = alice.user_id.as_str();
    let sign_both = async |tablet: &Pair| {
        let mut master = phone.signed(own, &alice.device_id, alices.master_key());
        master = tablet.signed(own, "SECOND", master);
        let device = |pair: &Pair, of: &TestClient| alices.signed(&alices.self_signing, pair.device_keys(of));
        let signed = json!({ own: {
            &alice.device_id: device(&phone, &alice), "SECOND": device(tablet, &second),
            alices.master.public(): master,
        } });
        assert_eq!(sign(&alice, signed).await, json!({}));
    };
    // The names of the devices that have signed the master key, and of those that the self-signing key has signed.
    let seen = async || {
        let shown = query(&bob, &alice).await;
        let ids = |object: &Value| object.as_object().map_or(0, serde_json::Map::len);
        let devices = shown["device_keys"][own].as_object().unwrap();
        let signed = devices.values().filter(|device| ids(&device["signatures"][own]) == 2).count();
        (devices.len(), signed, ids(&shown["master_keys"][own]["signatures"][own]))
    };
    sign_both(&tablet).await;
    assert_eq!(seen().await, (2, 2, 2));
    // Other keys of the same device were signed by nobody.
    let renewed = Pair::new("renewed");
    second.ok_post("/keys/upload", json!({ "device_keys": renewed.device_keys(&second) })).await;
    assert_eq!(seen().await, (2, 1, 1));
    sign_both(&renewed).await;
    assert_eq!(seen().await, (2, 2, 2));
    let mut follower = Follower::new(&bob).await;
    second.ok_post("/logout", json!({})).await;
    assert_eq!(follower.next().await.0, [own]);
    assert_eq!(seen().await, (1, 1, 1));
    // A device that comes back under the same id has none of it.
    let again = alice.on_device("SECOND").await;
    again.ok_post("/keys/upload", json!({ "device_keys": renewed.device_keys(&again) })).await;
    assert_eq!(seen().await, (2, 1, 1));
    // Another self-signing key has signed nothing yet.
    let other = Identity { self_signing: Pair::new("another"), ..Identity::new(&alice, "a") };
    let body = confirmed(&alice, json!({ "self_signing_key": other.self_signing_key() }));
    alice.ok_post(SIGNING, body).await;
    assert_eq!(seen().await, (2, 0, 1));
    assert_eq!(follower.next().await.0, [own]);
    // A key that the new master key has signed as well keeps what it has signed.
    let device = other.signed(&other.self_signing, phone.device_keys(&alice));
    assert_eq!(sign(&alice, json!({ own: { &alice.device_id: device } })).await, json!({}));
    assert_eq!(seen().await, (2, 1, 1));
    let same = Identity { self_signing: Pair::new("another"), ..Identity::new(&alice, "reset") };
    alice.ok_post(SIGNING, confirmed(&alice, same.all())).await;
    assert_eq!(seen().await, (2, 1, 0));
    alice.ok_post(SIGNING, confirmed(&alice, Identity::new(&alice, "reset again").all())).await;
    assert_eq!(seen().await, (2, 0, 0));
    follower.next().await;
    // An account that ends has no keys any more.
    alice.ok_post("/account/deactivate", confirmed(&alice, json!({}))).await;
    let shown = query(&bob, &alice).await;
    assert_eq!((shown.get("master_keys"), &shown["device_keys"][own]), (None, &json!({})));
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn signatures_that_come_with_the_keys_of_a_device_are_shown_if_they_are_right() {
    let server = TestServer::new();
    let [(alice, phone), (bob, _)] = two(&server).await;
    let alices = Identity::new(&alice, "a");
    alice.ok_post(SIGNING, alices.all()).await;
    let own = alice.user_id.as_str();
    let upload = async |keys: &Value| alice.ok_post("/keys/upload", json!({ "device_keys": keys })).await;
    let shown = async || {
        let mut keys = query(&bob, &alice).await["device_keys"][own][&*alice.device_id].take();
        keys.as_object_mut().unwrap().remove("unsigned");
        keys
    };
    let mut follower = Follower::new(&bob).await;
    let plain = phone.device_keys(&alice);
    // A wrong signature of the self-signing key, and those of keys that nobody here can judge, are left out, and so nothing has changed.
    let mut wrong = plain.clone();
    let forged = Pair::new("forger").signed(own, &alices.self_signing.public(), plain.clone());
    wrong["signatures"] = forged["signatures"].clone();
    wrong["signatures"][own]["ed25519:OTHER"] = "of another device".into();
    wrong["signatures"][&*bob.user_id] = json!({ "ed25519:BOB": "of somebody else" });
    upload(&wrong).await;
    assert_eq!(shown().await, plain);
    assert_eq!(follower.next().await.0, [""; 0]);
    // A right one is taken as if it had come by itself.
    let signed = alices.signed(&alices.self_signing, plain.clone());
    upload(&signed).await;
    assert_eq!(shown().await, signed);
    assert_eq!(follower.next().await.0, [own]);
    upload(&signed).await;
    assert_eq!(follower.next().await.0, [""; 0], "the same again is nothing new");
    // So it goes with the key that made it, whatever is uploaded again.
    let reset = Identity::new(&alice, "reset");
    alice.ok_post(SIGNING, confirmed(&alice, reset.all())).await;
    assert_eq!(shown().await, plain);
    upload(&signed).await;
    assert_eq!(shown().await, plain);
    let signed = reset.signed(&reset.self_signing, plain.clone());
    upload(&signed).await;
    assert_eq!(shown().await, signed);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_signature_over_a_master_key_is_shown_over_what_was_signed_alone() {
    let server = TestServer::new();
    let [(alice, _), (bob, _)] = two(&server).await;
    let (alices, bobs) = (Identity::new(&alice, "a"), Identity::new(&bob, "b"));
    alice.ok_post(SIGNING, alices.all()).await;
    bob.ok_post(SIGNING, bobs.all()).await;
    let shown = async || query(&alice, &bob).await["master_keys"][&*bob.user_id].clone();
    let signed = alices.signed(&alices.user_signing, bobs.master_key());
    let body = json!({ &*bob.user_id: { bobs.master.public(): signed } });
    assert_eq!(sign(&alice, body.clone()).await, json!({}));
    assert_eq!(shown().await, signed);
    // The same public half with another field is another object, which nobody has signed.
    let mut other = bobs.master_key();
    other["extra"] = "x".into();
    bob.ok_post(SIGNING, confirmed(&bob, json!({ "master_key": other }))).await;
    assert_eq!(shown().await, other);
    let refused = sign(&alice, body).await;
    assert_eq!(refused[&*bob.user_id][bobs.master.public()]["errcode"], "M_INVALID_PARAM", "{refused}");
    let signed = alices.signed(&alices.user_signing, other);
    assert_eq!(sign(&alice, json!({ &*bob.user_id: { bobs.master.public(): signed } })).await, json!({}));
    assert_eq!(shown().await, signed);
    server.assert_whole();
}
