//! Wrong requests, and the status and code that the specification gives for each: by method, path and body.

use std::time::Duration;

use aqueduct::config::{Bucket, Limits};
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{TestClient, TestServer};

struct Scene {
    server: TestServer,
    alice: TestClient,
    bob: TestClient,
    /// A room that alice made and bob is not in.
    room: String,
    /// An event that alice sent in that room.
    event: String,
}

async fn scene() -> Scene {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (_, room) = alice.post("/_matrix/client/v3/createRoom", json!({ "room_alias_name": "taken" })).await;
    let room = room["room_id"].as_str().unwrap().to_owned();
    let send = format!("/_matrix/client/v3/rooms/{room}/send/m.room.message/t");
    let (_, sent) = alice.put(&send, json!({ "msgtype": "m.text", "body": "x" })).await;
    let event = sent["event_id"].as_str().unwrap().to_owned();
    Scene { server, alice, bob, room, event }
}

/// Makes all these requests and lists those that were answered otherwise. In paths, `{room}`, `{event}`, `{alice}` and `{bob}`
/// stand for the ids; a path that begins with neither `/_matrix` nor `/.` is one below `/_matrix/client/v3/`.
async fn expect(scene: &Scene, asks: Option<&TestClient>, table: &[(&str, &str, Value, u16, &str)]) {
    let mut wrong = Vec::new();
    for (method, path, body, status, code) in table {
        let fill = |text: &str| {
            text.replace("{room}", &scene.room)
                .replace("{event}", &scene.event)
                .replace("{alice}", &scene.alice.user_id)
                .replace("{bob}", &scene.bob.user_id)
        };
        let path =
            if path.starts_with('/') { fill(path) } else { fill(&format!("/_matrix/client/v3/{path}")) };
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        let body = if body.is_null() { String::new() } else { fill(&body.to_string()) };
        let token = asks.and_then(|client| client.token.as_deref());
        let (found, json) = scene.server.raw(method.clone(), &path, token, body.clone()).await;
        let answered = (found.as_u16(), json["errcode"].as_str().unwrap_or("-"));
        if answered != (*status, *code) {
            wrong.push(format!("{method} {path} {body}: {answered:?}, not {:?}: {json}", (status, code)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test(start_paused = true)]
async fn accounts() {
    let scene = scene().await;
    let id = json!({ "type": "m.id.user", "user": "alice" });
    expect(
        &scene,
        None,
        &[
            ("POST", "login", json!({}), 400, "M_MISSING_PARAM"),
            ("POST", "login", json!({ "type": "m.login.dance" }), 400, "M_UNKNOWN"),
            ("POST", "login", json!({ "type": "m.login.password", "identifier": id }), 400, "M_MISSING_PARAM"),
            ("POST", "login", json!({ "type": "m.login.password", "password": "x" }), 400, "M_MISSING_PARAM"),
            ("POST", "login", json!({ "type": "m.login.password", "identifier": id, "password": "x" }), 403, "M_FORBIDDEN"),
            ("POST", "login", json!({ "type": "m.login.password", "user": "@alice:else.where", "password": "x" }), 403, "M_FORBIDDEN"),
            ("POST", "login", json!({ "type": "m.login.password", "identifier": { "type": "m.id.thirdparty", "medium": "email",
                "address": "a@b.c" }, "password": "x" }), 403, "M_FORBIDDEN"),
            ("POST", "refresh", json!({}), 400, "M_MISSING_PARAM"),
            ("POST", "refresh", json!({ "refresh_token": "x" }), 401, "M_UNKNOWN_TOKEN"),
            ("POST", "register", json!({ "username": "alice", "auth": { "type": "m.login.dummy" } }), 400, "M_USER_IN_USE"),
            ("POST", "register", json!({ "username": "é", "auth": { "type": "m.login.dummy" } }), 400, "M_INVALID_USERNAME"),
            ("POST", "register", json!({ "username": "carol", "password": "" , "auth": { "type": "m.login.dummy" } }), 400, "M_WEAK_PASSWORD"),
            ("POST", "register", json!({ "username": "carol" }), 401, "-"),
            ("POST", "register?kind=guest", json!({}), 403, "M_GUEST_ACCESS_FORBIDDEN"),
            ("POST", "register?kind=cat", json!({}), 400, "M_INVALID_PARAM"),
            ("GET", "register/available?username=alice", Value::Null, 400, "M_USER_IN_USE"),
            ("GET", "register/available?username=%C3%A9", Value::Null, 400, "M_INVALID_USERNAME"),
            ("GET", "register/available", Value::Null, 400, "M_MISSING_PARAM"),
            ("GET", "/_matrix/client/v1/register/m.login.registration_token/validity", Value::Null, 400, "M_MISSING_PARAM"),
            ("GET", "account/whoami", Value::Null, 401, "M_MISSING_TOKEN"),
            ("GET", "profile/@nobody:test.example", Value::Null, 404, "M_NOT_FOUND"),
            ("GET", "profile/nonsense", Value::Null, 400, "M_INVALID_PARAM"),
            ("GET", "profile/{alice}/avatar_url", Value::Null, 404, "M_NOT_FOUND"),
            ("GET", "profile/{alice}/Upper", Value::Null, 400, "M_INVALID_PARAM"),
        ],
    )
    .await;
    let long = "x".repeat(300);
    expect(
        &scene,
        Some(&scene.alice),
        &[
            ("POST", "account/password", json!({}), 400, "M_MISSING_PARAM"),
            ("POST", "account/password", json!({ "new_password": 7 }), 400, "M_BAD_JSON"),
            ("POST", "account/password", json!({ "new_password": "abcdefgh" }), 401, "-"),
            ("POST", "account/deactivate", json!({}), 401, "-"),
            (
                "POST",
                "account/deactivate",
                json!({ "auth": { "type": "m.login.dummy" } }),
                401,
                "M_UNRECOGNIZED",
            ),
            ("POST", "account/3pid/add", json!({}), 403, "M_THREEPID_DENIED"),
            ("GET", "devices/NONE", Value::Null, 404, "M_NOT_FOUND"),
            ("PUT", "devices/NONE", json!({}), 404, "M_NOT_FOUND"),
            ("DELETE", "devices/NONE", json!({}), 401, "-"),
            ("POST", "delete_devices", json!({}), 400, "M_MISSING_PARAM"),
            ("PUT", "profile/{bob}/displayname", json!({ "displayname": "x" }), 403, "M_FORBIDDEN"),
            ("PUT", "profile/{alice}/displayname", json!({}), 400, "M_MISSING_PARAM"),
            ("PUT", "profile/{alice}/displayname", json!({ "displayname": 7 }), 400, "M_INVALID_PARAM"),
            ("PUT", &format!("profile/{{alice}}/{}", "x".repeat(256)), json!({}), 400, "M_KEY_TOO_LARGE"),
            ("PUT", "profile/{alice}/x.y", json!({ "x.y": "x".repeat(70_000) }), 400, "M_PROFILE_TOO_LARGE"),
            ("DELETE", "profile/{bob}/displayname", Value::Null, 403, "M_FORBIDDEN"),
            ("GET", "user/{bob}/account_data/x", Value::Null, 403, "M_FORBIDDEN"),
            ("GET", "user/{alice}/account_data/x", Value::Null, 404, "M_NOT_FOUND"),
            ("PUT", "user/{alice}/account_data/m.push_rules", json!({}), 405, "M_BAD_JSON"),
            ("PUT", "user/{alice}/rooms/{room}/account_data/m.fully_read", json!({}), 405, "M_BAD_JSON"),
            ("PUT", "user/{alice}/rooms/nonsense/account_data/x", json!({}), 400, "M_INVALID_PARAM"),
            ("PUT", "user/{alice}/account_data/x", json!([]), 400, "M_BAD_JSON"),
            ("POST", "user/{bob}/filter", json!({}), 403, "M_FORBIDDEN"),
            ("POST", "user/{alice}/filter", json!({ "room": 7 }), 400, "M_BAD_JSON"),
            ("GET", "user/{alice}/filter/none", Value::Null, 404, "M_NOT_FOUND"),
            ("PUT", "user/{bob}/rooms/{room}/tags/x", json!({}), 403, "M_FORBIDDEN"),
            ("PUT", &format!("user/{{alice}}/rooms/{{room}}/tags/{long}"), json!({}), 400, "M_INVALID_PARAM"),
        ],
    )
    .await;
}

#[tokio::test(start_paused = true)]
async fn rooms_and_their_names() {
    let scene = scene().await;
    expect(
        &scene,
        Some(&scene.bob),
        &[
            ("POST", "createRoom", json!({ "room_version": "99" }), 400, "M_UNSUPPORTED_ROOM_VERSION"),
            ("POST", "createRoom", json!({ "room_alias_name": "taken" }), 400, "M_ROOM_IN_USE"),
            ("POST", "createRoom", json!({ "room_alias_name": "a:b" }), 400, "M_INVALID_PARAM"),
            ("POST", "createRoom", json!({ "visibility": "nonsense" }), 400, "M_INVALID_PARAM"),
            ("POST", "createRoom", json!({ "invite": ["nonsense"] }), 400, "M_BAD_JSON"),
            ("POST", "createRoom", json!({ "preset": "nonsense" }), 400, "M_INVALID_PARAM"),
            ("POST", "createRoom", json!({ "initial_state": [{ "type": "x" }] }), 400, "M_BAD_JSON"),
            (
                "POST",
                "createRoom",
                json!({ "power_level_content_override": { "users": 7 } }),
                400,
                "M_INVALID_ROOM_STATE",
            ),
            ("POST", "join/!none:test.example", json!({}), 404, "M_NOT_FOUND"),
            ("POST", "join/%23none:test.example", json!({}), 404, "M_NOT_FOUND"),
            ("POST", "join/nonsense", json!({}), 400, "M_INVALID_PARAM"),
            ("POST", "join/{room}", json!({}), 403, "M_FORBIDDEN"),
            ("POST", "rooms/{room}/join", json!({}), 403, "M_FORBIDDEN"),
            ("POST", "rooms/{room}/leave", json!({}), 403, "M_FORBIDDEN"),
            ("POST", "rooms/{room}/invite", json!({ "user_id": "{alice}" }), 403, "M_FORBIDDEN"),
            ("POST", "rooms/{room}/invite", json!({}), 400, "M_MISSING_PARAM"),
            ("POST", "rooms/{room}/kick", json!({ "user_id": "{alice}" }), 403, "M_FORBIDDEN"),
            ("POST", "rooms/{room}/ban", json!({ "user_id": "{alice}" }), 403, "M_FORBIDDEN"),
            ("POST", "rooms/{room}/unban", json!({ "user_id": "{alice}" }), 403, "M_FORBIDDEN"),
            ("POST", "knock/{room}", json!({}), 403, "M_FORBIDDEN"),
            ("GET", "rooms/{room}/state", Value::Null, 403, "M_FORBIDDEN"),
            ("GET", "rooms/{room}/members", Value::Null, 403, "M_FORBIDDEN"),
            ("GET", "rooms/{room}/joined_members", Value::Null, 403, "M_FORBIDDEN"),
            ("GET", "rooms/{room}/messages?dir=b", Value::Null, 403, "M_FORBIDDEN"),
            ("GET", "rooms/{room}/aliases", Value::Null, 403, "M_FORBIDDEN"),
            ("PUT", "rooms/{room}/send/m.x/t", json!({}), 403, "M_FORBIDDEN"),
            ("PUT", "rooms/{room}/state/m.x/", json!({}), 403, "M_FORBIDDEN"),
            ("PUT", "rooms/{room}/typing/{bob}", json!({ "typing": true, "timeout": 1 }), 403, "M_FORBIDDEN"),
            ("POST", "rooms/{room}/receipt/m.read/{event}", json!({}), 403, "M_FORBIDDEN"),
            ("POST", "rooms/{room}/read_markers", json!({ "m.read": "{event}" }), 403, "M_FORBIDDEN"),
            ("PUT", "directory/room/%23taken:test.example", json!({ "room_id": "{room}" }), 409, "M_UNKNOWN"),
            ("PUT", "directory/room/%23new:test.example", json!({ "room_id": "{room}" }), 403, "M_FORBIDDEN"),
            (
                "PUT",
                "directory/room/%23new:else.where",
                json!({ "room_id": "{room}" }),
                400,
                "M_INVALID_PARAM",
            ),
            ("PUT", "directory/room/%23new:test.example", json!({}), 400, "M_MISSING_PARAM"),
            ("DELETE", "directory/room/%23taken:test.example", Value::Null, 403, "M_FORBIDDEN"),
            ("DELETE", "directory/room/%23none:test.example", Value::Null, 404, "M_NOT_FOUND"),
            ("GET", "directory/room/%23none:test.example", Value::Null, 404, "M_NOT_FOUND"),
            ("PUT", "directory/list/room/{room}", json!({ "visibility": "public" }), 403, "M_FORBIDDEN"),
            ("PUT", "directory/list/room/{room}", json!({ "visibility": "x" }), 400, "M_INVALID_PARAM"),
            ("GET", "directory/list/room/!none:x", Value::Null, 404, "M_NOT_FOUND"),
            ("POST", "publicRooms", json!({ "since": "nonsense" }), 400, "M_INVALID_PARAM"),
            ("POST", "publicRooms", json!({ "limit": "x" }), 400, "M_BAD_JSON"),
            ("PUT", "presence/{alice}/status", json!({ "presence": "online" }), 403, "M_FORBIDDEN"),
            ("PUT", "presence/{bob}/status", json!({}), 400, "M_MISSING_PARAM"),
            ("PUT", "presence/{bob}/status", json!({ "presence": "asleep" }), 400, "M_INVALID_PARAM"),
            ("GET", "presence/{alice}/status", Value::Null, 403, "M_FORBIDDEN"),
            ("GET", "presence/@nobody:test.example/status", Value::Null, 404, "M_NOT_FOUND"),
            ("PUT", "sendToDevice/m.x/t", json!({}), 400, "M_MISSING_PARAM"),
            ("PUT", "sendToDevice/m.x/t", json!({ "messages": { "nonsense": {} } }), 400, "M_BAD_JSON"),
        ],
    )
    .await;
    expect(
        &scene,
        Some(&scene.alice),
        &[
            ("GET", "rooms/{room}/state/m.none/", Value::Null, 404, "M_NOT_FOUND"),
            ("GET", "rooms/{room}/event/$none", Value::Null, 404, "M_NOT_FOUND"),
            ("GET", "rooms/{room}/context/$none", Value::Null, 404, "M_NOT_FOUND"),
            ("GET", "rooms/{room}/messages?dir=x", Value::Null, 400, "M_INVALID_PARAM"),
            ("GET", "rooms/{room}/messages?dir=b&from=nonsense", Value::Null, 400, "M_INVALID_PARAM"),
            ("GET", "rooms/{room}/messages?dir=b&filter=nonsense", Value::Null, 400, "M_INVALID_PARAM"),
            ("GET", "rooms/{room}/members?at=nonsense", Value::Null, 400, "M_INVALID_PARAM"),
            ("GET", "sync?since=nonsense", Value::Null, 400, "M_INVALID_PARAM"),
            ("GET", "sync?filter=none", Value::Null, 400, "M_INVALID_PARAM"),
            ("GET", "sync?filter=%7B%22room%22:7%7D", Value::Null, 400, "M_INVALID_PARAM"),
            ("POST", "rooms/{room}/forget", json!({}), 400, "M_UNKNOWN"),
            ("POST", "rooms/{room}/kick", json!({ "user_id": "{bob}" }), 403, "M_FORBIDDEN"),
            ("POST", "rooms/{room}/receipt/m.nonsense/{event}", json!({}), 400, "M_INVALID_PARAM"),
            (
                "POST",
                "rooms/{room}/receipt/m.read/{event}",
                json!({ "thread_id": "" }),
                400,
                "M_INVALID_PARAM",
            ),
            (
                "POST",
                "rooms/{room}/receipt/m.fully_read/{event}",
                json!({ "thread_id": "main" }),
                400,
                "M_INVALID_PARAM",
            ),
            ("PUT", "rooms/{room}/typing/{bob}", json!({ "typing": false }), 403, "M_FORBIDDEN"),
            ("PUT", "rooms/{room}/typing/{alice}", json!({}), 400, "M_MISSING_PARAM"),
            ("PUT", "rooms/{room}/redact/$none/t", json!({}), 404, "M_NOT_FOUND"),
            (
                "PUT",
                "rooms/{room}/state/m.room.canonical_alias/",
                json!({ "alias": "#none:test.example" }),
                400,
                "M_BAD_ALIAS",
            ),
            ("POST", "keys/query", json!({}), 400, "M_MISSING_PARAM"),
            ("POST", "keys/claim", json!({}), 400, "M_MISSING_PARAM"),
            ("GET", "keys/changes?from=x&to=y", Value::Null, 400, "M_INVALID_PARAM"),
            ("POST", "keys/device_signing/upload", json!({}), 400, "M_MISSING_PARAM"),
            ("POST", "keys/device_signing/upload", json!({ "master_key": [] }), 400, "M_BAD_JSON"),
            ("POST", "keys/signatures/upload", json!({ "nobody": {} }), 400, "M_BAD_JSON"),
            ("POST", "keys/signatures/upload", json!({ "@alice:test.example": [] }), 400, "M_BAD_JSON"),
        ],
    )
    .await;
}

/// Every route that costs something is limited, whatever the specification marks; and the answer says how long to wait.
#[tokio::test(start_paused = true)]
async fn what_is_rate_limited() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (_, room) = alice.post("/_matrix/client/v3/createRoom", json!({ "preset": "public_chat" })).await;
    let room = room["room_id"].as_str().unwrap();
    drop(bob);
    let store = server.server().app().store.clone();
    let limited = TestServer::over(store, |config| config.limits = one_each());
    let user = &alice.user_id;
    for (method, path, is_limited) in [
        ("POST", "login".to_owned(), true),
        ("POST", "register".to_owned(), true),
        ("GET", "login".to_owned(), true),
        ("POST", "account/password".to_owned(), true),
        ("POST", "account/deactivate".to_owned(), true),
        ("GET", "account/whoami".to_owned(), true),
        ("GET", "capabilities".to_owned(), true),
        ("POST", "createRoom".to_owned(), true),
        ("POST", format!("join/{room}"), true),
        ("POST", format!("rooms/{room}/invite"), true),
        ("POST", format!("rooms/{room}/kick"), true),
        ("PUT", format!("rooms/{room}/send/m.x/t"), true),
        ("PUT", format!("rooms/{room}/state/m.x/t"), true),
        ("PUT", format!("rooms/{room}/redact/$e/t"), true),
        ("PUT", "sendToDevice/m.x/t".to_owned(), true),
        ("PUT", format!("profile/{user}/displayname"), true),
        ("PUT", format!("presence/{user}/status"), true),
        ("POST", format!("rooms/{room}/receipt/m.read/$e"), true),
        ("PUT", format!("rooms/{room}/typing/{user}"), true),
        ("POST", "user_directory/search".to_owned(), true),
        ("POST", "pushers/set".to_owned(), true),
        ("GET", "pushers".to_owned(), true),
        ("GET", "sync".to_owned(), true),
        ("GET", "devices".to_owned(), true),
        ("GET", "joined_rooms".to_owned(), true),
        ("PUT", format!("user/{user}/account_data/x"), true),
        ("GET", "../versions".to_owned(), false),
    ] {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        // The bucket is full again after this time.
        limited.server().app().env.sleep(Duration::from_secs(200)).await;
        let path = match path.strip_prefix("../") {
            Some(path) => format!("/_matrix/client/{path}"),
            None => format!("/_matrix/client/v3/{path}"),
        };
        let ask = || limited.raw(method.clone(), &path, alice.token.as_deref(), "{}");
        assert_ne!(ask().await.0, StatusCode::TOO_MANY_REQUESTS, "{method} {path}");
        let (status, json) = ask().await;
        assert_eq!(status == StatusCode::TOO_MANY_REQUESTS, is_limited, "{method} {path}: {json}");
        if is_limited {
            assert_eq!(json["errcode"], "M_LIMIT_EXCEEDED");
            assert!((1..=100_000).contains(&json["retry_after_ms"].as_u64().unwrap()), "{json}");
        }
    }
}

/// Rate limits that allow one act in a hundred seconds.
fn one_each() -> Limits {
    let one = Bucket { per_second: 0.01, burst: 1 };
    Limits {
        rate_limits: true,
        login: one,
        password: one,
        register: one,
        send: one,
        membership: one,
        to_device: one,
        sync: one,
        read: one,
        other: one,
        ..Limits::default()
    }
}

/// Clients ask for the types of login before each login.
#[tokio::test(start_paused = true)]
async fn asking_how_to_log_in_takes_no_guess_at_a_password_away() {
    let server = TestServer::with(|config| config.limits = one_each());
    let path = "/_matrix/client/v3/login";
    assert_eq!(server.anonymous().get(path).await.0, StatusCode::OK);
    let (status, json) = server.anonymous().post(path, json!({ "type": "m.login.dance" })).await;
    assert_eq!((status.as_u16(), &json["errcode"]), (400, &json!("M_UNKNOWN")));
}

/// A room that begins with many invitations, and a membership that is set as state, count like invitations and joins.
#[tokio::test(start_paused = true)]
async fn memberships_count_by_whatever_endpoint() {
    let server = TestServer::with(|config| {
        config.limits.rate_limits = true;
        config.limits.membership = Bucket { per_second: 0.01, burst: 10 };
    });
    let alice = server.register("alice").await;
    let mut invite = Vec::new();
    for number in 0..20 {
        invite.push(server.register(&format!("guest{number}")).await.user_id);
    }
    let (status, room) = alice.post("/_matrix/client/v3/createRoom", json!({ "invite": invite })).await;
    assert_eq!(status, StatusCode::OK, "{room}");
    let member = |user: &str| {
        let room = room["room_id"].as_str().unwrap();
        format!("/_matrix/client/v3/rooms/{room}/state/m.room.member/{user}")
    };
    let leave = json!({ "membership": "leave" });
    let (status, json) = alice.put(&member(&invite[0]), leave).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "{json}");
    let many: Vec<_> = (0..200).map(|number| format!("@u{number}:test.example")).collect();
    let bob = server.register("bob").await;
    let (status, json) = bob.post("/_matrix/client/v3/createRoom", json!({ "invite": many })).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{json}");
    assert!(json["error"].as_str().unwrap().contains("100"), "{json}");
}

/// Invitations among the initial state count like those of `invite`, and nothing is made where they are too many.
#[tokio::test(start_paused = true)]
async fn invitations_count_wherever_they_stand_in_a_request_for_a_room() {
    let server = TestServer::with(|config| {
        config.limits.rate_limits = true;
        config.limits.membership = Bucket { per_second: 0.01, burst: 10 };
    });
    let alice = server.register("alice").await;
    let mut guests = Vec::new();
    for number in 0..20 {
        guests.push(server.register(&format!("guest{number}")).await.user_id);
    }
    let invitations: Vec<_> = guests.iter().map(|guest| invitation(guest)).collect();
    let create = async |by: &TestClient, body: Value| by.post("/_matrix/client/v3/createRoom", body).await;
    let many: Vec<_> = (0..99).map(|number| invitation(&format!("@u{number}:test.example"))).collect();
    let body = json!({ "initial_state": many, "invite": &guests[..2] });
    let (status, json) = create(&alice, body).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{json}");
    let (status, json) = create(&alice, json!({ "initial_state": invitations })).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    let (status, json) = create(&alice, json!({})).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "{json}");
}

fn invitation(user_id: &str) -> Value {
    json!({ "type": "m.room.member", "state_key": user_id, "content": { "membership": "invite" } })
}

/// A new name is an event in each room of the user, and each counts; a name that is refused is not set.
#[tokio::test(start_paused = true)]
async fn a_new_name_counts_once_for_each_room_that_shows_it() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    for _ in 0..25 {
        alice.ok_post("/createRoom", json!({})).await;
    }
    let store = server.server().app().store.clone();
    let limited = TestServer::over(store, |config| {
        config.limits.rate_limits = true;
        config.limits.membership = Bucket { per_second: 1.0, burst: 10 };
    });
    let alice = TestClient { server: limited.clone(), ..alice };
    let path = |field: &str| format!("/_matrix/client/v3/profile/{}/{field}", alice.user_id);
    let rename = async |name: &str| alice.put(&path("displayname"), json!({ "displayname": name })).await;
    for name in ["a", "b", "c", "d"] {
        assert_eq!(rename(name).await.0, StatusCode::OK, "{name}");
    }
    let (status, json) = rename("e").await;
    assert_eq!((status.as_u16(), &json["errcode"]), (429, &json!("M_LIMIT_EXCEEDED")), "{json}");
    let avatar = json!({ "avatar_url": "mxc://test.example/a" });
    assert_eq!(alice.put(&path("avatar_url"), avatar).await.0, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(alice.delete(&path("displayname"), json!({})).await.0, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(alice.get(&path("")).await.1, json!({ "displayname": "d" }));
    // A name that is set already makes no events, and fields that no room shows do not either.
    assert_eq!(rename("d").await.0, StatusCode::OK);
    assert_eq!(alice.put(&path("m.tz"), json!({ "m.tz": "Europe/Berlin" })).await.0, StatusCode::OK);
    limited
        .server()
        .app()
        .env
        .sleep(Duration::from_secs(json["retry_after_ms"].as_u64().unwrap() / 1000 + 1))
        .await;
    assert_eq!(rename("e").await.0, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn a_thousand_messages_in_a_row_are_too_many_by_default() {
    let server = TestServer::with(|config| config.limits.rate_limits = true);
    let alice = server.register("alice").await;
    let (_, room) = alice.post("/_matrix/client/v3/createRoom", json!({})).await;
    let room = room["room_id"].as_str().unwrap();
    let mut refused = 0;
    for number in 0..1000 {
        let path = format!("/_matrix/client/v3/rooms/{room}/send/m.room.message/{number}");
        let (status, _) = alice.put(&path, json!({ "msgtype": "m.text", "body": "x" })).await;
        refused += usize::from(status == StatusCode::TOO_MANY_REQUESTS);
    }
    assert!(refused > 700, "{refused}");
}

/// A filter in the query is refused for its own fault, and not as one of many parameters.
#[tokio::test(start_paused = true)]
async fn an_inline_filter_is_told_what_is_wrong_with_it() {
    let scene = scene().await;
    let filter = "%7B%22timeline%22:%7B%22limit%22:%22many%22%7D%7D";
    let (_, json) =
        scene.alice.get(&format!("/_matrix/client/v3/sync?filter=%7B%22room%22:{filter}%7D")).await;
    let error = json["error"].as_str().unwrap();
    assert!(error.contains("`filter`") && error.contains("invalid type"), "{json}");
}

#[tokio::test(start_paused = true)]
async fn an_event_has_a_type_a_bounded_transaction_id_and_a_redaction_its_target() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    for version in ["1", "3", "11"] {
        let body = json!({ "room_version": version });
        let (_, made) = alice.post("/_matrix/client/v3/createRoom", body).await;
        let room = format!("/_matrix/client/v3/rooms/{}", made["room_id"].as_str().unwrap());
        for (path, body, code) in [
            (format!("{room}/send/m.x/{}", "t".repeat(256)), json!({}), "M_INVALID_PARAM"),
            (format!("{room}/redact/$x/{}", "t".repeat(256)), json!({}), "M_INVALID_PARAM"),
            (format!("{room}/send/m.room.redaction/1"), json!({}), "M_BAD_JSON"),
            (format!("{room}/send/m.room.redaction/1"), json!({ "reason": "x" }), "M_BAD_JSON"),
        ] {
            let (status, json) = alice.put(&path, body).await;
            assert_eq!((status.as_u16(), &json["errcode"]), (400, &json!(code)), "{path}: {json}");
        }
        let path = format!("{room}/send/m.x/{}", "t".repeat(255));
        assert_eq!(alice.put(&path, json!({})).await.0, StatusCode::OK);
        for path in [format!("{room}/send//1"), format!("{room}/state//key")] {
            assert!(alice.put(&path, json!({})).await.0.is_client_error(), "{path}");
        }
        let state = json!([{ "type": "", "content": {} }]);
        let body = json!({ "room_version": version, "initial_state": state });
        let (status, json) = alice.post("/_matrix/client/v3/createRoom", body).await;
        assert_eq!((status.as_u16(), &json["errcode"]), (400, &json!("M_INVALID_ROOM_STATE")), "{json}");
    }
}
