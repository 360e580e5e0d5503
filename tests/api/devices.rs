//! `src/api/client/devices.rs`, and the password in `src/api/client/account.rs`

use aqueduct::{
    accounts::{devices, tokens, users},
    encryption::device_lists::STEPS_MAX,
    ids::{StateKeyNum, UserNum},
    schema,
    store::{Direction, Engine, Guard},
};
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    support::{TestClient, TestServer, room_num},
    sync::{Chain, create_room, env, must},
};

const DEVICES: &str = "/_matrix/client/v3/devices";
const PASSWORD: &str = "/_matrix/client/v3/account/password";

async fn log_in(alice: &TestClient, device: &str, password: &str) -> StatusCode {
    let body = json!({
        "type": "m.login.password", "identifier": { "type": "m.id.user", "user": alice.user_id },
        "password": password, "device_id": device,
    });
    alice.server.anonymous().post("/_matrix/client/v3/login", body).await.0
}

fn auth(user: &str, password: &str, session: &Value) -> Value {
    json!({ "type": "m.login.password", "identifier": { "type": "m.id.user", "user": user },
        "password": password, "session": session })
}

#[tokio::test(start_paused = true)]
async fn devices_are_listed_named_and_not_others() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let second = alice.on_device("SECOND").await;
    let (status, json) = second.get(DEVICES).await;
    assert_eq!(status, StatusCode::OK);
    let mut ids: Vec<_> = json["devices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|device| device["device_id"].as_str().unwrap())
        .collect();
    ids.sort_unstable();
    let mut expected = vec!["SECOND", &alice.device_id];
    expected.sort_unstable();
    assert_eq!(ids, expected);

    let (status, json) = alice.get(&format!("{DEVICES}/SECOND")).await;
    assert_eq!((status, json["display_name"].as_str()), (StatusCode::OK, Some("name of SECOND")));
    assert_eq!(json["last_seen_ip"], "192.0.2.1");
    assert!(json["last_seen_ts"].is_u64());
    let put = |name: Value| alice.put("/_matrix/client/v3/devices/SECOND", json!({ "display_name": name }));
    // A field that is not known is left out.
    assert_eq!(alice.get(&format!("{DEVICES}/{}", alice.device_id)).await.1.get("display_name"), None);
    assert_eq!(put("my ☎".into()).await, (StatusCode::OK, json!({})));
    assert_eq!(alice.get(&format!("{DEVICES}/SECOND")).await.1["display_name"], "my ☎");
    assert_eq!(put("a".repeat(101).into()).await.0, StatusCode::BAD_REQUEST);
    assert_eq!(put(Value::Null).await.0, StatusCode::OK);
    assert_eq!(alice.get(&format!("{DEVICES}/SECOND")).await.1["display_name"], "my ☎");

    for client in [&alice, &bob] {
        let path = format!("{DEVICES}/{}", if client.user_id == alice.user_id { "NONE" } else { "SECOND" });
        assert_eq!(client.get(&path).await.1["errcode"], "M_NOT_FOUND");
        assert_eq!(client.put(&path, json!({ "display_name": "x" })).await.1["errcode"], "M_NOT_FOUND");
    }
}

#[tokio::test(start_paused = true)]
async fn deleting_a_device_asks_for_ones_own_password() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let second = alice.on_device("SECOND").await;
    let path = format!("{DEVICES}/SECOND");
    let (status, json) = alice.delete(&path, json!({})).await;
    assert_eq!(
        (status, &json["flows"]),
        (StatusCode::UNAUTHORIZED, &json!([{ "stages": ["m.login.password"] }]))
    );
    let session = &json["session"];
    let wrong = auth("alice", "wrong", session);
    let (status, json) = alice.delete(&path, json!({ "auth": wrong })).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::UNAUTHORIZED, Some("M_FORBIDDEN")));
    assert_eq!(&json["session"], session);
    let others = auth("bob", "password of bob", session);
    assert_eq!(alice.delete(&path, json!({ "auth": others })).await.0, StatusCode::FORBIDDEN);
    let stolen = auth("bob", "password of bob", session);
    assert_eq!(bob.delete(&path, json!({ "auth": stolen })).await.0, StatusCode::FORBIDDEN);
    assert_eq!(second.get(DEVICES).await.0, StatusCode::OK);
    let right = auth("alice", "password of alice", session);
    assert_eq!(alice.delete(&path, json!({ "auth": right })).await, (StatusCode::OK, json!({})));
    assert_eq!(second.get(DEVICES).await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(alice.get(&path).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test(start_paused = true)]
async fn a_session_confirms_the_operation_that_it_was_begun_for_and_no_other() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    for device in ["FIRST", "SECOND"] {
        log_in(&alice, device, "password of alice").await;
    }
    let (first, second) = (format!("{DEVICES}/FIRST"), format!("{DEVICES}/SECOND"));
    let (_, asked) = alice.delete(&first, json!({})).await;
    for body in [
        json!({ "auth": auth("alice", "password of alice", &asked["session"]) }),
        json!({ "auth": auth("alice", "wrong", &asked["session"]) }),
        json!({ "auth": { "session": asked["session"] } }),
    ] {
        let mut many = body.clone();
        many["devices"] = json!(["FIRST"]);
        let mut password = body.clone();
        password["new_password"] = "another".into();
        for (status, json) in [
            alice.delete(&second, body).await,
            alice.post("/_matrix/client/v3/delete_devices", many).await,
            alice.post(PASSWORD, password).await,
        ] {
            let refused = (StatusCode::FORBIDDEN, Some("M_FORBIDDEN"));
            assert_eq!((status, json["errcode"].as_str()), refused, "{json}");
        }
    }
    for path in [&first, &second] {
        assert_eq!(alice.get(path).await.0, StatusCode::OK);
    }
    let right = json!({ "auth": auth("alice", "password of alice", &asked["session"]) });
    assert_eq!(alice.delete(&first, right).await.0, StatusCode::OK);
    assert_eq!(alice.get(&second).await.0, StatusCode::OK);
}

/// Clients of before identifiers name the user beside the password.
#[tokio::test(start_paused = true)]
async fn the_old_way_to_name_the_user_of_a_password_is_understood() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    server.register("bob").await;
    let old = |user: &str, password: &str| {
        json!({ "auth": {
        "type": "m.login.password", "user": user, "password": password } })
    };
    for (number, (user, password, status)) in [
        ("bob", "password of bob", 403),
        ("alice", "wrong", 401),
        ("@alice:elsewhere", "password of alice", 403),
        ("alice", "password of alice", 200),
        ("Alice", "password of alice", 200),
        ("@alice:test.example", "password of alice", 200),
    ]
    .into_iter()
    .enumerate()
    {
        let device = alice.on_device(&format!("DEVICE{number}")).await;
        let path = format!("{DEVICES}/{}", device.device_id);
        let (found, json) = alice.delete(&path, old(user, password)).await;
        assert_eq!(found.as_u16(), status, "{user}: {json}");
        let gone = device.get(DEVICES).await.0 == StatusCode::UNAUTHORIZED;
        assert_eq!(gone, status == 200, "{user}");
    }
    for auth in [
        json!({ "type": "m.login.password", "medium": "email", "address": "a@b.example", "password": "password of alice" }),
        json!({ "type": "m.login.password", "identifier": { "type": "m.id.phone", "country": "GB", "phone": "1" },
            "password": "password of alice" }),
    ] {
        let (status, json) = alice.delete(&format!("{DEVICES}/X"), json!({ "auth": auth })).await;
        assert_eq!((status.as_u16(), &json["errcode"]), (403, &json!("M_FORBIDDEN")), "{auth}");
    }
    for user in [json!(7), json!({}), Value::Null] {
        let auth = json!({ "type": "m.login.password", "user": user, "password": "x" });
        let (status, json) = alice.delete(&format!("{DEVICES}/X"), json!({ "auth": auth })).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{json}");
    }
}

/// Settings of a device (MSC3890) go with the device, because nobody can ever use them again.
#[tokio::test(start_paused = true)]
async fn what_was_kept_for_a_device_goes_with_it() {
    let alice = TestServer::new().register("alice").await;
    let second = alice.on_device("SECOND").await;
    let path = |device: &str| {
        format!(
            "/_matrix/client/v3/user/{}/account_data/org.matrix.msc3890.local_notification_settings.{device}",
            alice.user_id
        )
    };
    for device in ["SECOND", &alice.device_id] {
        assert_eq!(alice.put(&path(device), json!({ "is_silenced": true })).await.0, StatusCode::OK);
    }
    assert_eq!(second.post("/_matrix/client/v3/logout", json!({})).await.0, StatusCode::OK);
    let (status, json) = alice.get(&path("SECOND")).await;
    assert_eq!((status.as_u16(), &json["errcode"]), (404, &json!("M_NOT_FOUND")));
    assert_eq!(alice.get(&path(&alice.device_id)).await.0, StatusCode::OK);
    let (_, sync) = alice.get("/_matrix/client/v3/sync").await;
    assert!(!sync["account_data"].to_string().contains("SECOND"), "{sync}");
}

/// The specification limits no deleting of devices; but each asks for a password, and somebody else may have the token.
#[tokio::test(start_paused = true)]
async fn a_password_is_not_guessed_by_deleting_devices() {
    let server = TestServer::with(|config| config.limits.rate_limits = true);
    let alice = server.register("alice").await;
    let path = format!("{DEVICES}/NONE");
    let ask = async |password: &str| {
        alice.delete(&path, json!({ "auth": auth("alice", password, &Value::Null) })).await
    };
    for _ in 0..10 {
        assert_eq!(ask("wrong").await.0, StatusCode::UNAUTHORIZED);
    }
    let (status, json) = ask("password of alice").await;
    assert_eq!((status.as_u16(), &json["errcode"]), (429, &json!("M_LIMIT_EXCEEDED")));
    let wait_ms = json["retry_after_ms"].as_u64().unwrap();
    server.server().app().env.sleep(std::time::Duration::from_millis(wait_ms)).await;
    assert_eq!(ask("password of alice").await.0, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn many_devices_are_deleted_at_once() {
    let alice = TestServer::new().register("alice").await;
    let second = alice.on_device("SECOND").await;
    let third = alice.on_device("THIRD").await;
    let body = json!({ "devices": ["SECOND", "THIRD", "NONE"], "auth": auth("alice", "password of alice", &Value::Null) });
    assert_eq!(alice.post("/_matrix/client/v3/delete_devices", body).await.0, StatusCode::OK);
    for gone in [second, third] {
        assert_eq!(gone.get(DEVICES).await.0, StatusCode::UNAUTHORIZED);
    }
    assert_eq!(alice.get(DEVICES).await.0, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn a_new_password_logs_other_devices_out_unless_asked_not_to() {
    let alice = TestServer::new().register("alice").await;
    let second = alice.on_device("SECOND").await;
    let (status, json) = alice.post(PASSWORD, json!({ "new_password": "second" })).await;
    assert_eq!(
        (status, &json["flows"]),
        (StatusCode::UNAUTHORIZED, &json!([{ "stages": ["m.login.password"] }]))
    );
    let body = |new: &str, old: &str, logout: bool| json!({ "new_password": new, "logout_devices": logout, "auth": auth("alice", old, &Value::Null) });
    let (status, _) = alice.post(PASSWORD, body("second", "password of alice", false)).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(second.get(DEVICES).await.0, StatusCode::OK);
    assert_eq!(log_in(&alice, "X", "password of alice").await, StatusCode::FORBIDDEN);
    assert_eq!(log_in(&alice, "X", "second").await, StatusCode::OK);
    let (status, _) = alice.post(PASSWORD, body("third", "second", true)).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(second.get(DEVICES).await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(alice.get(DEVICES).await.0, StatusCode::OK);
    let (status, json) = alice.post(PASSWORD, body("", "third", true)).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some("M_WEAK_PASSWORD")));
}

/// More devices than one batch could end one by one.
const MANY: usize = 1_001;

/// A user with more devices than fit into one batch, and the tokens of all devices but the first.
async fn with_many_devices(server: &TestServer, name: &str) -> (TestClient, Vec<String>) {
    let client = server.register(name).await;
    let app = server.server().app();
    let user_id = ruma::UserId::parse(client.user_id.as_str()).unwrap();
    let user = users::find_num(&*app.store.snapshot(), &user_id).unwrap().unwrap();
    let mut issued = Vec::new();
    while issued.len() + 1 < MANY {
        let mut batch = app.store.batch(&Guard::alone());
        for _ in 0..100 {
            let id = format!("DEVICE{:04}", issued.len());
            let log_in = devices::LogIn { id: Some(id.into()), ..devices::LogIn::default() };
            let (device, _) = devices::log_in(&mut batch, &app.env, user, log_in).unwrap();
            let holder = tokens::Holder { user, device: device.num, device_id: device.id };
            issued.push(tokens::issue(&mut batch, &app.env, &holder, true).access_token);
        }
        app.store.enqueue(batch).unwrap().flushed.await.unwrap();
    }
    (client, issued)
}

/// Checks that none of these tokens works any more.
async fn all_ended(server: &TestServer, tokens: &[String]) {
    for token in tokens {
        let snapshot = server.server().app().store.snapshot();
        let found = tokens::find_caller(&*snapshot, server.server().app().env.now_ms(), token);
        assert!(found.is_err(), "a session goes on");
    }
}

/// Checks that after a while nothing is left of devices that have ended, and that the account says so.
async fn all_swept(server: &TestServer, user_id: &str, left: usize) {
    let app = server.server().app();
    app.env.sleep(std::time::Duration::from_secs(5)).await;
    let snapshot = app.store.snapshot();
    let user_id = ruma::UserId::parse(user_id).unwrap();
    let user = users::find_num(&*snapshot, &user_id).unwrap().unwrap();
    let rows = schema::DEVICES.prefix::<(UserNum,)>(&*snapshot, (user,), Direction::Up).unwrap().count();
    assert_eq!(rows, left);
    let tokens = schema::DEVICE_TOKENS.prefix::<(UserNum,)>(&*snapshot, (user,), Direction::Up).unwrap();
    assert!(tokens.count() <= 2 * left);
    assert_eq!(users::find(&*snapshot, user).unwrap().unwrap().ended.first(), None);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_thousand_devices_are_logged_out_at_once() {
    let server = TestServer::new();
    let (alice, tokens) = with_many_devices(&server, "alice").await;
    let (status, json) = alice.post("/_matrix/client/v3/logout/all", json!({})).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    all_ended(&server, &tokens).await;
    assert_eq!(alice.get(DEVICES).await.0, StatusCode::UNAUTHORIZED);
    // A login under an old device id makes another device, which finds nothing of the old one.
    let again = alice.on_device("DEVICE0007").await;
    let (_, listed) = again.get(DEVICES).await;
    assert_eq!(listed["devices"].as_array().unwrap().len(), 1, "{listed}");
    all_swept(&server, &alice.user_id, 1).await;
    assert_eq!(again.get(DEVICES).await.0, StatusCode::OK, "it is not swept with the others");
}

#[tokio::test(start_paused = true)]
async fn a_new_password_ends_a_thousand_sessions_or_is_none() {
    let server = TestServer::new();
    let (alice, tokens) = with_many_devices(&server, "alice").await;
    let body = json!({ "new_password": "second", "logout_devices": true,
        "auth": auth("alice", "password of alice", &Value::Null) });
    let (status, json) = alice.post(PASSWORD, body).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    all_ended(&server, &tokens).await;
    assert_eq!(log_in(&alice, "X", "password of alice").await, StatusCode::FORBIDDEN);
    let (_, listed) = alice.get(DEVICES).await;
    assert_eq!(listed["devices"][0]["device_id"], alice.device_id.as_str());
    assert_eq!(listed["devices"].as_array().unwrap().len(), 1);
    all_swept(&server, &alice.user_id, 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_thousand_devices_are_deleted_by_name() {
    let server = TestServer::new();
    let (alice, tokens) = with_many_devices(&server, "alice").await;
    // Every second device is deleted, so that their numbers are no range.
    let ids: Vec<_> = (0..MANY - 1).step_by(2).map(|number| format!("DEVICE{number:04}")).collect();
    let body = json!({ "devices": ids, "auth": auth("alice", "password of alice", &Value::Null) });
    let (status, json) = alice.post("/_matrix/client/v3/delete_devices", body).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    let (ended, live): (Vec<_>, Vec<_>) = tokens.iter().cloned().enumerate().partition(|(at, _)| at % 2 == 0);
    all_ended(&server, &ended.into_iter().map(|(_, token)| token).collect::<Vec<_>>()).await;
    let snapshot = server.server().app().store.snapshot();
    let now_ms = server.server().app().env.now_ms();
    assert!(live.iter().all(|(_, token)| tokens::find_caller(&*snapshot, now_ms, token).is_ok()));
    all_swept(&server, &alice.user_id, live.len() + 1).await;
}

#[tokio::test(start_paused = true)]
async fn an_account_of_a_thousand_devices_ends() {
    let server = TestServer::new();
    let (alice, tokens) = with_many_devices(&server, "alice").await;
    let body = json!({ "erase": true, "auth": auth("alice", "password of alice", &Value::Null) });
    let (status, json) = alice.post("/_matrix/client/v3/account/deactivate", body).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    all_ended(&server, &tokens).await;
    all_swept(&server, &alice.user_id, 0).await;
}

/// The process ends right after the answer, so a timer does what the answer promised.
#[tokio::test(start_paused = true)]
async fn what_ended_devices_left_is_swept_after_a_crash_too() {
    let server = TestServer::new();
    let (alice, tokens) = with_many_devices(&server, "alice").await;
    assert_eq!(alice.post("/_matrix/client/v3/logout/all", json!({})).await.0, StatusCode::OK);
    let store = server.server().app().store.clone();
    server.server().stop().await.unwrap();
    let again = TestServer::over(store, |_| ());
    all_ended(&again, &tokens).await;
    again.server().app().env.sleep(std::time::Duration::from_secs(300)).await;
    all_swept(&again, &alice.user_id, 0).await;
}

#[tokio::test(start_paused = true)]
async fn members_are_not_hidden_behind_thousands_who_are_gone() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
    let store = &server.server().app().store;
    let num = room_num(store, &room);
    // Users who were here, as the room's own tables know them; thousands of real ones take minutes.
    for chunk in 0..3_u32 {
        let mut batch = store.batch(&Guard::alone());
        for number in 0..2_000 {
            let user_id = format!("@a{:05}:test.example", chunk * 2_000 + number);
            let key = StateKeyNum(100_000 + chunk * 2_000 + number);
            schema::STATE_KEY_NUM.put(&mut batch, (num, "m.room.member", &*user_id), &key);
        }
        store.enqueue(batch).unwrap().flushed.await.unwrap();
    }
    let mut chain = Chain::of(&bob);
    chain.next().await;
    must(&bob, &room, "join", json!({})).await;
    assert_eq!(chain.next().await["device_lists"], json!({ "changed": [alice.user_id, bob.user_id] }));
    must(&bob, &room, "leave", json!({})).await;
    assert_eq!(chain.next().await["device_lists"], json!({ "left": [alice.user_id] }));
}

#[tokio::test(start_paused = true)]
async fn a_renamed_device_reads_as_much_whoever_shares_rooms_and_wakes_those_who_wait() {
    let server = TestServer::new();
    let Engine::Memory(memory) = server.server().app().store.engine() else { panic!("tests run in memory") };
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let mut rooms = Vec::new();
    for _ in 0..6 {
        let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
        must(&bob, &room, "join", json!({})).await;
        rooms.push(room);
    }
    // As many changes of devices as are remembered, so that each further one reads as many.
    for number in 0..=STEPS_MAX {
        let body = json!({ "display_name": format!("name {number}") });
        assert_eq!(alice.put(&format!("{DEVICES}/{}", alice.device_id), body).await.0, StatusCode::OK);
    }
    let mut chain = Chain::of(&bob);
    chain.next().await;
    let mut costs = Vec::new();
    for others in [0, 10] {
        for number in 0..others {
            let other = server.register(&format!("other{number}")).await;
            for room in &rooms {
                must(&other, room, "join", json!({})).await;
            }
        }
        // The server writes some rows from time to time, and must not do so in the middle of what is counted.
        env(&server).sleep(std::time::Duration::from_secs(90)).await;
        chain.next().await;
        let rename = async {
            env(&server).sleep(std::time::Duration::from_millis(10)).await;
            let before = memory.reads();
            let path = format!("{DEVICES}/{}", alice.device_id);
            let (status, _) = alice.put(&path, json!({ "display_name": format!("beside {others}") })).await;
            assert_eq!(status, StatusCode::OK);
            before
        };
        let (answer, before) = tokio::join!(chain.next_within(30_000), rename);
        assert_eq!(answer["device_lists"]["changed"], json!([alice.user_id]), "{answer}");
        costs.push(memory.reads() - before);
    }
    assert_eq!(costs[0], costs[1], "rows read by the rename and by the sync that tells of it");
}
