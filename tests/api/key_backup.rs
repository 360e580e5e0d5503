//! `src/api/client/key_backup.rs`

use std::time::Duration;

use axum::body::Body;
use http::{Request, StatusCode, header};
use http_body_util::BodyExt;
use serde_json::{Value, json};

use crate::support::{TestClient, TestServer, encoded};

const VERSION: &str = "/_matrix/client/v3/room_keys/version";
const KEYS: &str = "/_matrix/client/v3/room_keys/keys";

fn version_body(secret: &str) -> Value {
    json!({ "algorithm": "m.megolm_backup.v1.curve25519-aes-sha2", "auth_data": { "public_key": secret } })
}

async fn create(client: &TestClient) -> String {
    let json = client.ok_post(VERSION, version_body("abc")).await;
    json["version"].as_str().unwrap().to_owned()
}

fn key(is_verified: bool, index: u64, count: u64) -> Value {
    json!({
        "first_message_index": index, "forwarded_count": count, "is_verified": is_verified,
        "session_data": { "ephemeral": "e", "ciphertext": "c", "mac": "m" },
    })
}

/// A body with this many keys, a hundred in each room, each of about as many bytes as clients send.
fn many(count: usize) -> Value {
    let mut rooms = json!({});
    for number in 0..count {
        let mut key = key(false, 1, 0);
        key["session_data"]["ciphertext"] = format!("{number:0>700}").into();
        rooms[format!("!room{:04}:test.example", number / 100)]["sessions"][format!("session/+{number}")] =
            key;
    }
    json!({ "rooms": rooms })
}

#[tokio::test(start_paused = true)]
async fn versions_are_made_shown_changed_and_deleted() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let none = alice.get(VERSION).await;
    assert_eq!((none.0, &none.1["errcode"]), (StatusCode::NOT_FOUND, &json!("M_NOT_FOUND")));
    assert_eq!(create(&alice).await, "1");
    let mut expected = version_body("abc");
    expected["count"] = 0.into();
    expected["etag"] = "0".into();
    expected["version"] = "1".into();
    assert_eq!(alice.ok_get(VERSION).await, expected);
    assert_eq!(create(&alice).await, "2");
    assert_eq!(alice.ok_get(&format!("{VERSION}/1")).await, expected);
    assert_eq!(alice.ok_get(VERSION).await["version"], "2");
    assert_eq!(bob.get(&format!("{VERSION}/1")).await.0, StatusCode::NOT_FOUND, "bob has no backup");

    let mut changed = version_body("def");
    assert_eq!(alice.ok_put(&format!("{VERSION}/1"), changed.clone()).await, json!({}));
    assert_eq!(alice.ok_get(&format!("{VERSION}/1")).await["auth_data"], json!({ "public_key": "def" }));
    changed["version"] = "1".into();
    alice.ok_put(&format!("{VERSION}/1"), changed.clone()).await;
    changed["version"] = "2".into();
    let (status, json) = alice.put(&format!("{VERSION}/1"), changed.clone()).await;
    assert_eq!((status, &json["errcode"]), (StatusCode::BAD_REQUEST, &json!("M_INVALID_PARAM")));
    changed["algorithm"] = "other".into();
    let (status, json) = alice.put(&format!("{VERSION}/2"), changed.clone()).await;
    assert_eq!((status, &json["errcode"]), (StatusCode::BAD_REQUEST, &json!("M_INVALID_PARAM")));
    let (status, _) = alice.put(&format!("{VERSION}/7"), version_body("x")).await;
    assert_eq!(status, StatusCode::NOT_FOUND);

    assert_eq!(alice.ok_delete(&format!("{VERSION}/2"), json!({})).await, json!({}));
    alice.ok_delete(&format!("{VERSION}/2"), json!({})).await;
    assert_eq!(alice.ok_get(VERSION).await["version"], "1", "the one before is the newest again");
    assert_eq!(alice.get(&format!("{VERSION}/2")).await.0, StatusCode::NOT_FOUND);
    assert_eq!(alice.put(&format!("{VERSION}/2"), version_body("x")).await.0, StatusCode::NOT_FOUND);
    for never in ["3", "x", "01"] {
        let (status, _) = alice.delete(&format!("{VERSION}/{never}"), json!({})).await;
        assert_eq!(status, StatusCode::NOT_FOUND, "there never was a version {never}");
    }
    assert_eq!(create(&alice).await, "3", "a number is not given again");
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn keys_are_stored_shown_and_deleted_at_three_levels() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let version = create(&alice).await;
    let at = |path: &str| format!("{KEYS}{path}?version={version}");
    assert_eq!(alice.ok_get(&at("")).await, json!({ "rooms": {} }));
    assert_eq!(alice.ok_get(&at("/!a:x")).await, json!({ "sessions": {} }));
    let missing = alice.get(&at("/!a:x/1")).await;
    assert_eq!((missing.0, &missing.1["errcode"]), (StatusCode::NOT_FOUND, &json!("M_NOT_FOUND")));

    let changed = |count: u64, etag: &str| json!({ "count": count, "etag": etag });
    // The id of a session is base64, with characters that a path must escape.
    let session = format!("/!a:x/{}", encoded("s/+1"));
    assert_eq!(alice.ok_put(&at(&session), key(false, 1, 0)).await, changed(1, "1"));
    let room = json!({ "sessions": { "2": key(true, 0, 0), "s/+1": key(false, 9, 0) } });
    assert_eq!(alice.ok_put(&at("/!a:x"), room).await, changed(2, "2"));
    let rooms =
        json!({ "rooms": { "!b:x": { "sessions": { "3": key(false, 0, 0) } }, "!c:x": { "sessions": {} } } });
    assert_eq!(alice.ok_put(&at(""), rooms.clone()).await, changed(3, "3"));
    assert_eq!(alice.ok_put(&at(""), rooms).await, changed(3, "3"), "the same again is no change");
    assert_eq!(alice.ok_put(&at(""), json!({ "rooms": {} })).await, changed(3, "3"));

    let of_a = json!({ "sessions": { "s/+1": key(false, 1, 0), "2": key(true, 0, 0) } });
    let all = json!({ "rooms": { "!a:x": of_a, "!b:x": { "sessions": { "3": key(false, 0, 0) } } } });
    assert_eq!(alice.ok_get(&at("")).await, all);
    assert_eq!(alice.ok_get(&at("/!a:x")).await, of_a);
    assert_eq!(alice.ok_get(&at(&session)).await, key(false, 1, 0));
    let info = alice.ok_get(VERSION).await;
    assert_eq!((&info["count"], &info["etag"]), (&json!(3), &json!("3")));
    server.assert_whole();

    assert_eq!(alice.ok_delete(&at("/!a:x/none"), json!({})).await, changed(3, "3"));
    assert_eq!(alice.ok_delete(&at(&session), json!({})).await, changed(2, "4"));
    assert_eq!(alice.ok_delete(&at("/!b:x"), json!({})).await, changed(1, "5"));
    assert_eq!(
        alice.ok_get(&at("")).await["rooms"],
        json!({ "!a:x": { "sessions": { "2": key(true, 0, 0) } } })
    );
    assert_eq!(alice.ok_delete(&at(""), json!({})).await, changed(0, "6"));
    assert_eq!(alice.ok_get(&at("")).await, json!({ "rooms": {} }));
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn the_better_of_two_keys_stays() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let version = create(&alice).await;
    // The rows of Complement's test of the rules, and those that must replace what is there.
    let cases = [
        ((false, 10, 5), vec![(false, 11, 5), (false, 10, 6), (false, 11, 6), (false, 10, 5)], (false, 9, 9)),
        ((false, 10, 5), vec![(false, 11, 0)], (false, 10, 4)),
        ((false, 10, 5), vec![], (true, 99, 99)),
        (
            (true, 10, 5),
            vec![(false, 11, 5), (false, 0, 0), (true, 11, 5), (true, 10, 6), (true, 11, 6)],
            (true, 9, 6),
        ),
    ];
    let as_key = |(is_verified, index, count)| key(is_verified, index, count);
    for (number, (first, worse, better)) in cases.into_iter().enumerate() {
        let path = format!("{KEYS}/!foo:hs1/{number}?version={version}");
        alice.ok_put(&path, as_key(first)).await;
        let etag = alice.ok_get(VERSION).await["etag"].clone();
        for worse in worse {
            let json = alice.ok_put(&path, as_key(worse)).await;
            assert_eq!(json["etag"], etag, "{worse:?}");
            assert_eq!(alice.ok_get(&path).await, as_key(first), "{worse:?}");
        }
        let json = alice.ok_put(&path, as_key(better)).await;
        assert_ne!(json["etag"], etag);
        assert_eq!(alice.ok_get(&path).await, as_key(better));
    }
}

#[tokio::test(start_paused = true)]
async fn keys_go_to_the_newest_version_and_are_read_from_any() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let old = create(&alice).await;
    let path = |version: &str| format!("{KEYS}/!a:x/1?version={version}");
    alice.ok_put(&path(&old), key(false, 1, 0)).await;
    let new = create(&alice).await;
    for (at, body) in [
        (path(&old), key(false, 0, 0)),
        (format!("{KEYS}/!a:x?version={old}"), json!({ "sessions": {} })),
        (format!("{KEYS}?version={old}"), json!({ "rooms": {} })),
    ] {
        let (status, json) = alice.put(&at, body).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{json}");
        assert_eq!(json["errcode"], "M_WRONG_ROOM_KEYS_VERSION");
        assert_eq!(json["current_version"], new);
    }
    for unknown in ["7", "x", ""] {
        for (method, at) in [("PUT", path(unknown)), ("GET", path(unknown)), ("DELETE", path(unknown))] {
            let (status, json) = match method {
                "PUT" => alice.put(&at, key(false, 0, 0)).await,
                "GET" => alice.get(&at).await,
                _ => alice.delete(&at, json!({})).await,
            };
            assert_eq!(
                (status, &json["errcode"]),
                (StatusCode::NOT_FOUND, &json!("M_NOT_FOUND")),
                "{method} {at}"
            );
        }
        for at in [format!("{KEYS}?version={unknown}"), format!("{KEYS}/!a:x?version={unknown}")] {
            assert_eq!(alice.get(&at).await.0, StatusCode::NOT_FOUND, "{at}");
        }
    }
    assert_eq!(alice.ok_get(&path(&old)).await, key(false, 1, 0));
    assert_eq!(alice.ok_delete(&path(&old), json!({})).await["count"], 0);
    let bob = server.register("bob").await;
    create(&bob).await;
    create(&bob).await;
    assert_eq!(bob.get(&path(&new)).await.0, StatusCode::NOT_FOUND, "somebody else's key");
}

#[tokio::test(start_paused = true)]
async fn wrong_and_absurd_uploads_are_refused_and_leave_nothing() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let version = create(&alice).await;
    let session = format!("{KEYS}/!a:x/1?version={version}");
    let all = format!("{KEYS}?version={version}");
    let without = |name: &str| {
        let mut key = key(false, 0, 0);
        key.as_object_mut().unwrap().remove(name);
        key
    };
    let with = |name: &str, value: Value| {
        let mut key = key(false, 0, 0);
        key[name] = value;
        key
    };
    let large = json!({ "ciphertext": "x".repeat(64 << 10) });
    let long = "x".repeat(256);
    let of = |room: &str, session: &str| json!({ "rooms": { room: { "sessions": { session: key(false, 0, 0) } } } });
    for (at, body, status, code) in [
        (&session, without("first_message_index"), 400, "M_MISSING_PARAM"),
        (&session, without("forwarded_count"), 400, "M_MISSING_PARAM"),
        (&session, without("is_verified"), 400, "M_MISSING_PARAM"),
        (&session, without("session_data"), 400, "M_MISSING_PARAM"),
        (&session, with("first_message_index", json!(-1)), 400, "M_BAD_JSON"),
        (&session, with("first_message_index", json!(1.5)), 400, "M_BAD_JSON"),
        (&session, with("forwarded_count", json!("1")), 400, "M_BAD_JSON"),
        (&session, with("forwarded_count", json!(1_u64 << 60)), 400, "M_BAD_JSON"),
        (&session, with("is_verified", json!(1)), 400, "M_BAD_JSON"),
        (&session, with("session_data", json!(null)), 400, "M_BAD_JSON"),
        (&session, with("session_data", json!([])), 400, "M_BAD_JSON"),
        (&session, with("session_data", large.clone()), 413, "M_TOO_LARGE"),
        (&format!("{KEYS}/!a:x/{long}?version={version}"), key(false, 0, 0), 400, "M_INVALID_PARAM"),
        (&format!("{KEYS}/!{long}/1?version={version}"), key(false, 0, 0), 400, "M_INVALID_PARAM"),
        (&format!("{KEYS}/a:x/1?version={version}"), key(false, 0, 0), 400, "M_INVALID_PARAM"),
        (&format!("{KEYS}/!a:x/1"), key(false, 0, 0), 400, "M_MISSING_PARAM"),
        (&all, json!({}), 400, "M_MISSING_PARAM"),
        (&all, json!({ "rooms": [] }), 400, "M_BAD_JSON"),
        (&all, json!({ "rooms": { "!a:x": {} } }), 400, "M_MISSING_PARAM"),
        (&all, of("a:x", "1"), 400, "M_INVALID_PARAM"),
        (&all, of(&format!("!{long}"), "1"), 400, "M_INVALID_PARAM"),
        (&all, of("!a:x", ""), 400, "M_INVALID_PARAM"),
        (&all, of("!a:x", &long), 400, "M_INVALID_PARAM"),
        (
            &all,
            json!({ "rooms": { "!a:x": { "sessions": { "1": key(false, 0, 0), "2": with("session_data", large) } } } }),
            413,
            "M_TOO_LARGE",
        ),
    ] {
        let (found, json) = alice.put(at, body.clone()).await;
        assert_eq!((found.as_u16(), json["errcode"].as_str().unwrap()), (status, code), "{at}: {json}");
    }
    let data = "x".repeat(64 << 10);
    for (body, status, code) in [
        (json!({ "algorithm": "a" }), 400, "M_MISSING_PARAM"),
        (json!({ "auth_data": {} }), 400, "M_MISSING_PARAM"),
        (json!({ "algorithm": "", "auth_data": {} }), 400, "M_INVALID_PARAM"),
        (json!({ "algorithm": long, "auth_data": {} }), 400, "M_INVALID_PARAM"),
        (json!({ "algorithm": "a", "auth_data": 7 }), 400, "M_BAD_JSON"),
        (json!({ "algorithm": "a", "auth_data": null }), 400, "M_BAD_JSON"),
        (json!({ "algorithm": "a", "auth_data": { "x": data } }), 413, "M_TOO_LARGE"),
    ] {
        let (found, json) = alice.post(VERSION, body).await;
        assert_eq!((found.as_u16(), json["errcode"].as_str().unwrap()), (status, code), "{json}");
    }
    assert_eq!(alice.ok_get(&all).await, json!({ "rooms": {} }));
    // Text in place of objects is taken, as older clients send it.
    let old = json!({ "algorithm": "m.megolm_backup.v1", "auth_data": "anopaquestring" });
    let version = alice.ok_post(VERSION, old).await["version"].as_str().unwrap().to_owned();
    let at = format!("{KEYS}/!abcd/1234?version={version}");
    alice.ok_put(&at, with("session_data", json!("opaque"))).await;
    assert_eq!(alice.ok_get(&at).await["session_data"], "opaque");
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_keys_in_one_upload_are_stored_and_told_in_pieces() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let at = format!("{KEYS}?version={}", create(&alice).await);
    let keys = many(10_000);
    let json = alice.ok_put(&at, keys.clone()).await;
    assert_eq!(json["count"], 10_000);
    assert_eq!(alice.ok_get(&at).await, keys);
    let room = "!room0042:test.example";
    let of_room = alice.ok_get(&at.replace("keys?", &format!("keys/{room}?"))).await;
    assert_eq!(of_room, keys["rooms"][room]);
    assert_eq!(alice.ok_put(&at, keys).await, json, "the same upload again changes nothing");
    server.assert_whole();
    assert_eq!(alice.ok_delete(&at, json!({})).await["count"], 0);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_account_that_ends_takes_its_backups_along() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let at = format!("{KEYS}?version={}", create(&alice).await);
    alice.ok_put(&at, many(200)).await;
    create(&alice).await;
    let mut auth = json!({
        "type": "m.login.password", "identifier": { "type": "m.id.user", "user": "alice" },
        "password": "password of alice",
    });
    let (_, json) = alice.post("/_matrix/client/v3/account/deactivate", json!({})).await;
    auth["session"] = json["session"].clone();
    alice.ok_post("/account/deactivate", json!({ "auth": auth })).await;
    server.server().app().env.sleep(Duration::from_secs(1)).await;
    let rows = server.assert_whole();
    let left = |name: &str| rows.iter().find(|(table, _)| *table == name).map_or(0, |(_, count)| *count);
    for table in ["BACKUP", "BACKUP_STATE", "BACKUP_ROOM", "BACKUP_KEY", "BACKUP_LAST"] {
        assert_eq!(left(table), 0, "{table}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_listing_breaks_off_when_its_version_is_deleted_or_its_device_logged_out() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let version = create(&alice).await;
    let at = format!("{KEYS}?version={version}");
    alice.ok_put(&at, many(2_000)).await;
    let second = alice.on_device("SECOND").await;
    let begin = async |client: &TestClient| {
        let token = format!("Bearer {}", client.token.as_deref().unwrap());
        let request = Request::builder().uri(&at).header(header::AUTHORIZATION, token);
        let mut body = server.send(request.body(Body::empty()).unwrap()).await.into_body();
        assert!(body.frame().await.unwrap().unwrap().is_data());
        body
    };
    assert!(begin(&second).await.collect().await.is_ok());
    let listing = begin(&second).await;
    second.ok_post("/logout", json!({})).await;
    assert!(listing.collect().await.is_err(), "the device has ended");
    let listing = begin(&alice).await;
    alice.ok_delete(&format!("{VERSION}/{version}"), json!({})).await;
    assert!(listing.collect().await.is_err(), "a part must not be taken for the whole");
}
