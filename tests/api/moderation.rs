//! Accounts are moderated: locks, suspensions, reports, and who uses an account from where.

use std::time::Duration;

use aqueduct::{
    accounts::reports::{REASON_BYTES_MAX, REPORTS_MAX},
    flows::operator::operate::{Command, Outcome, operate},
};
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{
    sliding_sync::Slide,
    support::{
        NOWHERE, TestClient, TestServer, encoded,
        olm::{Identity, Pair},
    },
    sync::{Chain, create_room, must, room_of_two, say},
};

const V1: &str = "/_matrix/client/v1";
const V3: &str = "/_matrix/client/v3";

async fn command(server: &TestServer, command: Command) -> Outcome {
    operate(server.server().app(), command, |_| ()).await.unwrap()
}

async fn admin(server: &TestServer) -> TestClient {
    let admin = server.register("admin").await;
    command(server, Command::SetAdmin { name: "admin".to_owned(), admin: true }).await;
    admin
}

fn code(answer: &(StatusCode, Value)) -> (u16, &str) {
    (answer.0.as_u16(), answer.1["errcode"].as_str().unwrap_or("-"))
}

async fn set(admin: &TestClient, what: &str, user_id: &str, is: bool) {
    let key = if what == "lock" { "locked" } else { "suspended" };
    let path = format!("{V1}/admin/{what}/{user_id}");
    assert_eq!(admin.ok_put(&path, json!({ key: is })).await, json!({ key: is }));
    assert_eq!(admin.ok_get(&path).await, json!({ key: is }));
}

#[tokio::test(start_paused = true)]
async fn a_locked_account_can_only_log_out_and_goes_on_when_it_is_unlocked() {
    let server = TestServer::new();
    let admin = admin(&server).await;
    let (alice, _bob, room) = room_of_two(&server).await;
    let mut chain = Chain::of(&alice);
    chain.next().await;
    set(&admin, "lock", &alice.user_id, true).await;
    for path in ["/_matrix/client/v3/sync", "/_matrix/client/versions", "/_matrix/client/v3/account/whoami"] {
        let answer = alice.get(path).await;
        assert_eq!(code(&answer), (401, "M_USER_LOCKED"), "{path}");
        assert_eq!(answer.1["soft_logout"], true);
    }
    let answer = alice.post(&format!("{V3}/rooms/{room}/leave"), json!({})).await;
    assert_eq!(code(&answer), (401, "M_USER_LOCKED"));
    set(&admin, "lock", &alice.user_id, false).await;
    chain.next().await;
    set(&admin, "lock", &alice.user_id, true).await;
    assert_eq!(alice.post(&format!("{V3}/logout"), json!({})).await.0, StatusCode::OK);
    assert_eq!(code(&alice.get(&format!("{V3}/sync")).await), (401, "M_UNKNOWN_TOKEN"));
}

#[tokio::test(start_paused = true)]
async fn a_poll_that_waits_ends_when_its_account_is_locked_or_its_device_is_logged_out() {
    let server = TestServer::new();
    let admin = admin(&server).await;
    let (alice, bob, room) = room_of_two(&server).await;
    let env = server.server().app().env.clone();
    let phone = alice.on_device("PHONE").await;
    let poll = async |client: &TestClient, path: &str, name: &str| {
        let since = client.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
        let (client, path) = (client.clone(), format!("{V3}/{path}?timeout=60000&{name}={since}"));
        // A poll under way is handed on in a list, because it is something to be awaited itself.
        [server.begin(async move { client.get(&path).await })]
    };
    let [mut of_phone] = poll(&phone, "sync", "since").await;
    let slide = async |client: &TestClient| {
        let mut slide = Slide::list(client, 0, 9);
        slide.next().await;
        [server.begin(async move { slide.try_within(60_000).await })]
    };
    let [mut slid_of_phone] = slide(&phone).await;
    let [syncs] = poll(&alice, "sync", "since").await;
    let [follows] = poll(&alice, "events", "from").await;
    let [slides] = slide(&alice).await;
    let mut of_alice = [syncs, follows, slides];
    env.sleep(Duration::from_secs(1)).await;
    assert!(of_phone.try_recv().is_err() && slid_of_phone.try_recv().is_err(), "they wait");
    phone.ok_post("/logout", json!({})).await;
    env.sleep(Duration::from_secs(1)).await;
    for mut poll in [of_phone, slid_of_phone] {
        let answer = poll.try_recv().unwrap();
        assert_eq!(code(&answer), (401, "M_UNKNOWN_TOKEN"), "{answer:?}");
    }
    // The other device learns of it, and waits on.
    let answer = of_alice[0].try_recv();
    if let Ok(answer) = answer {
        assert_eq!(answer.0, StatusCode::OK);
        [of_alice[0]] = poll(&alice, "sync", "since").await;
    }
    if let Ok(answer) = of_alice[2].try_recv() {
        assert_eq!(answer.0, StatusCode::OK);
        [of_alice[2]] = slide(&alice).await;
    }
    env.sleep(Duration::from_secs(1)).await;
    assert!(of_alice.iter_mut().all(|poll| poll.try_recv().is_err()), "they wait");
    set(&admin, "lock", &alice.user_id, true).await;
    env.sleep(Duration::from_secs(1)).await;
    for poll in &mut of_alice {
        assert_eq!(code(&poll.try_recv().unwrap()), (401, "M_USER_LOCKED"));
    }
    say(&bob, &room, "behind a closed door").await;
}

#[tokio::test(start_paused = true)]
async fn who_is_locked_gets_no_token() {
    let server = TestServer::new();
    let admin = admin(&server).await;
    let path = format!("{V3}/register");
    let body = json!({ "username": "carol", "password": "a long password", "refresh_token": true,
        "auth": { "type": "m.login.dummy" } });
    let nobody = server.anonymous();
    let (_, session) = nobody.post(&path, body).await;
    let login = json!({ "type": "m.login.password", "password": "a long password", "identifier": {
        "type": "m.id.user", "user": "carol" } });
    assert_eq!(nobody.post(&format!("{V3}/login"), login.clone()).await.0, StatusCode::OK);
    set(&admin, "lock", "@carol:test.example", true).await;
    let refresh = json!({ "refresh_token": session["refresh_token"] });
    for (path, body) in [("login", &login), ("refresh", &refresh)] {
        let answer = nobody.post(&format!("{V3}/{path}"), body.clone()).await;
        assert_eq!(
            (code(&answer), &answer.1["soft_logout"]),
            ((401, "M_USER_LOCKED"), &json!(true)),
            "{path}"
        );
    }
    set(&admin, "lock", "@carol:test.example", false).await;
    for (path, body) in [("login", &login), ("refresh", &refresh)] {
        assert_eq!(nobody.post(&format!("{V3}/{path}"), body.clone()).await.0, StatusCode::OK, "{path}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_suspended_user_reads_and_leaves_and_does_nothing_that_others_see() {
    let server = TestServer::new();
    let admin = admin(&server).await;
    let (alice, bob, room) = room_of_two(&server).await;
    let own = say(&bob, &room, "mine").await;
    let other = say(&alice, &room, "hers").await;
    let invited = create_room(&alice, json!({ "invite": [bob.user_id] })).await;
    let open = create_room(&alice, json!({ "preset": "public_chat" })).await;
    set(&admin, "suspend", &bob.user_id, true).await;
    let me = &bob.user_id;
    let to = |user: &str| json!({ "messages": { user: { "*": { "n": 1 } } } });
    let refused = [
        (Method::PUT, format!("rooms/{room}/send/m.room.message/1"), json!({ "body": "x" })),
        (Method::PUT, format!("rooms/{room}/state/m.room.topic/"), json!({ "topic": "x" })),
        (Method::POST, format!("rooms/{invited}/join"), json!({})),
        (Method::POST, format!("join/{open}"), json!({})),
        (Method::POST, format!("knock/{open}"), json!({})),
        (Method::POST, format!("rooms/{room}/invite"), json!({ "user_id": "@carol:test.example" })),
        (Method::POST, "createRoom".to_owned(), json!({})),
        (Method::PUT, format!("profile/{me}/displayname"), json!({ "displayname": "x" })),
        (Method::PUT, format!("rooms/{room}/redact/{other}/2"), json!({})),
        (Method::PUT, format!("presence/{me}/status"), json!({ "presence": "online", "status_msg": "x" })),
        (Method::PUT, format!("rooms/{room}/typing/{me}"), json!({ "typing": true, "timeout": 9_000 })),
        (Method::POST, format!("rooms/{room}/receipt/m.read/{other}"), json!({})),
        (
            Method::POST,
            format!("rooms/{room}/read_markers"),
            json!({ "m.fully_read": other, "m.\u{72}ead": other }),
        ),
        (Method::PUT, "sendToDevice/m.test/1".to_owned(), to(&alice.user_id)),
        (Method::POST, format!("user/{me}/openid/request_token"), json!({})),
        (Method::POST, "account/3pid/delete".to_owned(), json!({ "medium": "email", "address": "a@b" })),
    ];
    for (method, path, body) in refused {
        let token = bob.token.as_deref();
        let answer = server.raw(method, &format!("{V3}/{path}"), token, body.to_string()).await;
        assert_eq!(code(&answer), (403, "M_USER_SUSPENDED"), "{path}: {answer:?}");
    }
    bob.ok_get(&format!("{V3}/sync")).await;
    bob.ok_get(&format!("{V3}/rooms/{room}/messages?dir=b")).await;
    bob.ok_put(&format!("{V3}/rooms/{room}/redact/{own}/3"), json!({})).await;
    bob.ok_put(&format!("{V3}/sendToDevice/m.key.verification.request/4"), to(&bob.user_id)).await;
    bob.ok_post(&format!("{V3}/rooms/{room}/receipt/m.read.private/{other}"), json!({})).await;
    let marked = json!({ "m.fully_read": other, "m.read.private": other });
    bob.ok_post(&format!("{V3}/rooms/{room}/read_markers"), marked).await;
    // A poll shows nobody that its user is here.
    let seen = alice.ok_get(&format!("{V3}/presence/{me}/status")).await;
    server.server().app().env.sleep(Duration::from_secs(600)).await;
    bob.ok_get(&format!("{V3}/sync?set_presence=online")).await;
    let again = alice.ok_get(&format!("{V3}/presence/{me}/status")).await;
    assert_ne!(again["presence"], "online", "{seen} {again}");
    for left in [&room, &invited] {
        must(&bob, left, "leave", json!({})).await;
    }
    set(&admin, "suspend", &bob.user_id, false).await;
    must(&bob, &open, "join", json!({})).await;
    bob.ok_post(&format!("{V3}/logout"), json!({})).await;
}

#[tokio::test(start_paused = true)]
async fn a_suspended_user_takes_back_each_word_once_and_leaves_in_silence() {
    let server = TestServer::new();
    let admin = admin(&server).await;
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let reason = || json!({ "reason": "BUY PILLS" });
    for version in ["10", "12"] {
        let options = json!({ "preset": "public_chat", "room_version": version });
        let room = create_room(&alice, options).await;
        must(&bob, &room, "join", json!({})).await;
        let (own, kept) = (say(&bob, &room, "mine").await, say(&bob, &room, "mine, too").await);
        let (other, member) = (say(&alice, &room, "hers").await, encoded(&bob.user_id));
        let invited = create_room(&alice, json!({ "room_version": version, "invite": [bob.user_id] })).await;
        set(&admin, "suspend", &bob.user_id, true).await;
        let redact = async |event: &str, txn: &str| {
            let path = format!("{V3}/rooms/{}/redact/{}/{txn}", encoded(&room), encoded(event));
            bob.put(&path, reason()).await
        };
        let (status, sent) = redact(&own, "1").await;
        assert_eq!(status, StatusCode::OK, "{sent}");
        assert_eq!(redact(&own, "1").await, (StatusCode::OK, sent.clone()), "the same request again");
        let redaction = sent["event_id"].as_str().unwrap();
        for event in [own.as_str(), redaction, &other] {
            let answer = redact(event, "2").await;
            assert_eq!(code(&answer), (403, "M_USER_SUSPENDED"), "{event}: {answer:?}");
        }
        assert_eq!(code(&redact("$nothing", "3").await), (404, "M_NOT_FOUND"));
        let event = async |id: &str| {
            alice.ok_get(&format!("{V3}/rooms/{}/event/{}", encoded(&room), encoded(id))).await
        };
        assert_eq!(event(&own).await["content"], json!({}));
        assert_eq!(event(redaction).await["content"], json!({ "redacts": own }), "{version}");
        for left in [&room, &invited] {
            must(&bob, left, "leave", reason()).await;
            let path = format!("{V3}/rooms/{}/state/m.room.member/{member}", encoded(left));
            assert_eq!(alice.ok_get(&path).await, json!({ "membership": "leave" }), "{left}");
        }
        set(&admin, "suspend", &bob.user_id, false).await;
        must(&bob, &room, "join", json!({})).await;
        let (status, sent) = redact(&kept, "4").await;
        assert_eq!(status, StatusCode::OK, "{sent}");
        assert_eq!(event(sent["event_id"].as_str().unwrap()).await["content"]["reason"], "BUY PILLS");
        let (status, sent) = redact(redaction, "5").await;
        assert_eq!(status, StatusCode::OK, "{sent}");
    }
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_suspended_user_uploads_keys_and_no_words_with_them() {
    const TEXT: &str = "BUY PILLS";
    let server = TestServer::new();
    let admin = admin(&server).await;
    let (alice, bob, _) = room_of_two(&server).await;
    let (device, identity) = (Pair::new("bob's phone"), Identity::new(&bob, "bob"));
    let upload = format!("{V3}/keys/upload");
    let identities = format!("{V3}/keys/device_signing/upload");
    let names = ["AAAAHg", "AAAAHQ"];
    let keys = json!({
        "device_keys": device.device_keys(&bob), "one_time_keys": device.one_time(&bob, names),
        "fallback_keys": { "signed_curve25519:AAAAGj": device.signed(
            &bob.user_id, &bob.device_id, json!({ "key": "zKbLg+NrIjpnagy+pIY6uPL4ZwEG2v+8F9lmgsnlZzs", "fallback": true }),
        ) },
    });
    set(&admin, "suspend", &bob.user_id, true).await;
    let refused = async |path: &str, body: &Value, place: &str, name: Option<&str>| {
        let mut body = body.clone();
        let field = body.pointer_mut(place).unwrap();
        match name {
            Some(name) => field[name] = TEXT.into(),
            None => *field = TEXT.into(),
        }
        let answer = bob.post(path, body).await;
        assert_eq!(code(&answer), (403, "M_USER_SUSPENDED"), "{place} {name:?}: {answer:?}");
    };
    for (place, name) in [
        ("/device_keys", Some("org.example")),
        ("/device_keys/device_id", None),
        ("/device_keys/algorithms/0", None),
        ("/device_keys/keys", Some("ed25519:OTHER")),
        ("/device_keys/keys", Some(TEXT)),
        ("/device_keys/signatures/@bob:test.example", Some("ed25519:OTHER")),
        ("/one_time_keys/signed_curve25519:AAAAHg", Some("org.example")),
        ("/one_time_keys/signed_curve25519:AAAAHg/key", None),
        ("/one_time_keys", Some("curve25519:AAAAHg")),
        ("/fallback_keys/signed_curve25519:AAAAGj", Some("org.example")),
        ("/fallback_keys/signed_curve25519:AAAAGj/fallback", None),
    ] {
        refused(&upload, &keys, place, name).await;
    }
    for (place, name) in [
        ("/master_key", Some("org.example")),
        ("/master_key/usage/0", None),
        ("/self_signing_key", Some("org.example")),
        ("/user_signing_key", Some(TEXT)),
    ] {
        refused(&identities, &identity.all(), place, name).await;
    }
    let mut dehydrated = keys.clone();
    dehydrated["device_id"] = "DRY".into();
    dehydrated["device_data"] = json!({ "algorithm": "m.dehydration.v2" });
    dehydrated["device_keys"]["org.example"] = TEXT.into();
    let path = "/_matrix/client/unstable/org.matrix.msc3814.v1/dehydrated_device";
    assert_eq!(code(&bob.put(path, dehydrated).await), (403, "M_USER_SUSPENDED"));
    // The keys themselves are what a new session needs.
    bob.ok_post(&upload, keys.clone()).await;
    bob.ok_post(&identities, identity.all()).await;
    let query = json!({ "device_keys": { &bob.user_id: [] } });
    let shown = alice.ok_post(&format!("{V3}/keys/query"), query).await;
    assert!(shown["device_keys"][&bob.user_id][&bob.device_id]["keys"].is_object(), "{shown}");
    assert!(shown["master_keys"][&bob.user_id].is_object(), "{shown}");
}

#[tokio::test(start_paused = true)]
async fn a_suspended_user_writes_no_text_that_others_are_shown() {
    const TEXT: &str = "BUY PILLS";
    let server = TestServer::new();
    let admin = admin(&server).await;
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    set(&admin, "suspend", &bob.user_id, true).await;
    let session = json!({
        "algorithm": "m.olm.v1.curve25519-aes-sha2", "sender_key": "Kk+/7", "org.matrix.msgid": "a-1",
        "ciphertext": { "7qZcfnBmbEGzxxaWfBjElJuvn7BZx+lSz/SvFrDF/z8": { "type": 0, "body": "AwogGJJzMhf/S3GQ" } },
    });
    let key = json!({
        "action": "request", "requesting_device_id": bob.device_id, "request_id": "1495474790150.19",
        "body": { "algorithm": "m.megolm.v1.aes-sha2", "room_id": "!a:test.example", "sender_key": "Kk+/7",
            "session_id": "X3lUlvLELLYxeTx4yOVu6" },
    });
    let end =
        json!({ "action": "request_cancellation", "requesting_device_id": bob.device_id, "request_id": "1" });
    let needed = [("m.room.encrypted", session), ("m.room_key_request", key), ("m.room_key_request", end)];
    for (number, (kind, needed)) in needed.iter().enumerate() {
        let path = format!("{V3}/sendToDevice/{kind}");
        let to = |user: &str, content: &Value| json!({ "messages": { user: { "*": content } } });
        bob.ok_put(&format!("{path}/needed{number}"), to(&alice.user_id, needed)).await;
        // Anything that is not of the form of these messages is text.
        let mut wrong = vec![json!({ "body": "x" }), json!({})];
        let places =
            ["/algorithm", "/sender_key", "/request_id", "/action", "/body/session_id", "/org.matrix.msgid"];
        for place in places {
            let mut content = needed.clone();
            if let Some(field) = content.pointer_mut(place) {
                *field = TEXT.into();
                wrong.push(content);
            }
        }
        for (holder, name) in [("", "text"), ("/ciphertext", TEXT), ("/body", "text")] {
            let mut content = needed.clone();
            if let Some(holder) = content.pointer_mut(holder) {
                holder[name] = json!({ "type": 0, "body": "x" });
                wrong.push(content);
            }
        }
        for content in wrong {
            let answer = bob.put(&format!("{path}/wrong"), to(&alice.user_id, &content)).await;
            assert_eq!(code(&answer), (403, "M_USER_SUSPENDED"), "{kind}: {content}");
        }
        bob.ok_put(&format!("{path}/own{number}"), to(&bob.user_id, &json!({ "body": TEXT }))).await;
    }
    // Others are shown the names of devices.
    let device = format!("{V3}/devices/{}", bob.device_id);
    let answer = bob.put(&device, json!({ "display_name": TEXT })).await;
    assert_eq!(code(&answer), (403, "M_USER_SUSPENDED"), "{answer:?}");
    let new = bob.on_device("NEW").await;
    assert!(new.ok_get(&format!("{V3}/devices/NEW")).await["display_name"].is_null());
    set(&admin, "suspend", &bob.user_id, false).await;
    bob.ok_put(&device, json!({ "display_name": TEXT })).await;
    bob.on_device("LATER").await;
    assert_eq!(bob.ok_get(&format!("{V3}/devices/LATER")).await["display_name"], "name of LATER");
}

#[tokio::test(start_paused = true)]
async fn a_token_for_services_proves_nothing_once_its_user_could_ask_for_none() {
    let server = TestServer::new();
    let admin = admin(&server).await;
    let alice = server.register("alice").await;
    let (phone, tablet) = (alice.on_device("PHONE").await, alice.on_device("TABLET").await);
    let nobody = server.anonymous();
    let make = async |client: &TestClient| {
        let made =
            client.ok_post(&format!("{V3}/user/{}/openid/request_token", alice.user_id), json!({})).await;
        made["access_token"].as_str().unwrap().to_owned()
    };
    let proves = async |token: &str| {
        let path = format!("/_matrix/federation/v1/openid/userinfo?access_token={}", encoded(token));
        let answer = nobody.get(&path).await;
        if answer.0 != StatusCode::OK {
            assert_eq!(code(&answer), (401, "M_UNKNOWN_TOKEN"), "{answer:?}");
        }
        answer.0 == StatusCode::OK
    };
    let [of_alice, of_phone, of_tablet] = [make(&alice).await, make(&phone).await, make(&tablet).await];
    for what in ["lock", "suspend"] {
        set(&admin, what, &alice.user_id, true).await;
        assert!(!proves(&of_alice).await, "{what}");
        set(&admin, what, &alice.user_id, false).await;
        assert!(proves(&of_alice).await, "{what}");
    }
    phone.ok_post(&format!("{V3}/logout"), json!({})).await;
    assert!(!proves(&of_phone).await, "its device was logged out");
    alice.on_device("PHONE").await;
    assert!(!proves(&of_phone).await, "the device is another one of that id");
    assert!(proves(&of_tablet).await && proves(&of_alice).await);
    tablet.ok_post(&format!("{V3}/logout/all"), json!({})).await;
    assert!(!proves(&of_tablet).await && !proves(&of_alice).await, "all were logged out");
}

#[tokio::test(start_paused = true)]
async fn messages_that_were_scheduled_before_a_suspension_are_not_sent() {
    let server = TestServer::new();
    let admin = admin(&server).await;
    let (alice, bob, room) = room_of_two(&server).await;
    let path =
        |txn: u32| format!("{V3}/rooms/{room}/send/m.room.message/{txn}?org.matrix.msc4140.delay=5000");
    bob.ok_put(&path(1), json!({ "body": "later" })).await;
    set(&admin, "suspend", &bob.user_id, true).await;
    assert_eq!(code(&bob.put(&path(2), json!({ "body": "x" })).await), (403, "M_USER_SUSPENDED"));
    server.server().app().env.sleep(Duration::from_secs(10)).await;
    let page = alice.ok_get(&format!("{V3}/rooms/{room}/messages?dir=b")).await;
    let events = page["chunk"].as_array().unwrap();
    assert!(events.iter().all(|event| event["type"] != "m.room.message"), "{events:?}");
}

#[tokio::test(start_paused = true)]
async fn only_admins_moderate_and_learn_who_is_here() {
    let server = TestServer::new();
    let admin = admin(&server).await;
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    server.register("other").await;
    command(&server, Command::SetAdmin { name: "other".to_owned(), admin: true }).await;
    for what in ["lock", "suspend"] {
        let key = if what == "lock" { "locked" } else { "suspended" };
        for (target, by_admin, to_read) in [
            (bob.user_id.as_str(), (200, "-"), (200, "-")),
            ("@nobody:test.example", (404, "M_NOT_FOUND"), (404, "M_NOT_FOUND")),
            ("@bob:else.where", (400, "M_INVALID_PARAM"), (400, "M_INVALID_PARAM")),
            ("nonsense", (400, "M_INVALID_PARAM"), (400, "M_INVALID_PARAM")),
            ("@other:test.example", (403, "M_FORBIDDEN"), (403, "M_FORBIDDEN")),
            (admin.user_id.as_str(), (403, "M_FORBIDDEN"), (200, "-")),
        ] {
            let path = format!("{V1}/admin/{what}/{target}");
            assert_eq!(code(&admin.put(&path, json!({ key: true })).await), by_admin, "{path}");
            assert_eq!(code(&admin.get(&path).await), to_read, "{path}");
            // Somebody who is no admin learns nothing, whatever they ask about.
            assert_eq!(code(&alice.put(&path, json!({ key: true })).await), (403, "M_FORBIDDEN"), "{path}");
            assert_eq!(code(&alice.get(&path).await), (403, "M_FORBIDDEN"), "{path}");
        }
        let path = format!("{V1}/admin/{what}/{}", bob.user_id);
        for body in [json!({}), json!({ key: "yes" }), json!({ key: null })] {
            assert_eq!(admin.put(&path, body).await.0, StatusCode::BAD_REQUEST);
        }
    }
    let capabilities = |client: TestClient| async move { client.ok_get(&format!("{V3}/capabilities")).await };
    let told = capabilities(admin.clone()).await;
    assert_eq!(told["capabilities"]["m.account_moderation"], json!({ "suspend": true, "lock": true }));
    assert!(capabilities(alice.clone()).await["capabilities"].get("m.account_moderation").is_none());
}

#[tokio::test(start_paused = true)]
async fn an_account_shows_its_owner_and_admins_where_it_is_used() {
    let server = TestServer::new();
    let admin = admin(&server).await;
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    alice.ok_get(&format!("{V3}/joined_rooms")).await;
    let path = format!("{V3}/admin/whois/{}", alice.user_id);
    for client in [&alice, &admin] {
        let told = client.ok_get(&path).await;
        assert_eq!(told["user_id"], alice.user_id);
        let devices = told["devices"].as_object().unwrap();
        assert_eq!(devices.len(), 1);
        let connections = &devices.values().next().unwrap()["sessions"][0]["connections"];
        assert_eq!(connections[0]["ip"], "192.0.2.1", "{told}");
        assert!(connections[0]["last_seen"].is_u64(), "{told}");
    }
    assert_eq!(code(&bob.get(&path).await), (403, "M_FORBIDDEN"));
    assert_eq!(code(&bob.get(&format!("{V3}/admin/whois/@nobody:test.example")).await), (403, "M_FORBIDDEN"));
    assert_eq!(
        code(&admin.get(&format!("{V3}/admin/whois/@nobody:test.example")).await),
        (404, "M_NOT_FOUND")
    );
}

async fn reports(server: &TestServer) -> Vec<Value> {
    let Outcome::Reports(list) = command(server, Command::ListReports).await else { panic!("no list") };
    list.iter().map(|report| serde_json::to_value(report).unwrap()).collect()
}

#[tokio::test(start_paused = true)]
async fn reports_are_kept_for_the_operator_and_told_to_nobody() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let carol = server.register("carol").await;
    let event = say(&alice, &room, "bad").await;
    let mut chain = Chain::of(&alice);
    chain.next().await;
    let path = format!("{V3}/rooms/{room}/report/{event}");
    assert_eq!(bob.ok_post(&path, json!({ "reason": "first", "score": -100 })).await, json!({}));
    bob.ok_post(&path, json!({ "reason": "it is bad" })).await;
    carol.ok_post(&format!("{V3}/rooms/{room}/report"), json!({ "reason": "" })).await;
    carol.ok_post(&format!("{V3}/users/@someone:else.where/report"), json!({ "reason": "spam" })).await;
    // Who reports a room or a user does not learn whether there is such a one.
    carol.ok_post(&format!("{V3}/rooms/!nothing:else.where/report"), json!({ "reason": "?" })).await;
    assert!(chain.next().await.get("rooms").is_none(), "the room is not told");

    let killed = server.killed(usize::MAX);
    for server in [&server, &killed] {
        let kept = reports(server).await;
        assert_eq!(kept.len(), 4, "a second report of the same thing takes the place of the first: {kept:?}");
        let of_bob = kept.iter().find(|report| report["by"] == bob.user_id).unwrap();
        assert_eq!(of_bob["subject"], json!({ "kind": "event", "room_id": room, "event_id": event }));
        assert_eq!((&of_bob["reason"], of_bob.get("score")), (&json!("it is bad"), None));
    }
    let (by, about) = (bob.user_id.clone(), format!("{event} {room}"));
    let dismiss = Command::DismissReport { by, about };
    assert!(matches!(command(&server, dismiss.clone()).await, Outcome::ReportDismissed(_)));
    assert_eq!(reports(&server).await.len(), 3);
    assert!(operate(server.server().app(), dismiss, |_| ()).await.is_err());
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_reported_is_refused() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let carol = server.register("carol").await;
    let event = say(&alice, &room, "bad").await;
    let report = |path: String, body: Value, client: TestClient| async move {
        let answer = client.post(&format!("{V3}/{path}"), body).await;
        let (status, code) = code(&answer);
        (status, code.to_owned())
    };
    let is = |status: u16, code: &str| (status, code.to_owned());
    let why = json!({ "reason": "x" });
    let of_event = format!("rooms/{room}/report/{event}");
    assert_eq!(report(of_event.clone(), why.clone(), carol.clone()).await, is(404, "M_NOT_FOUND"));
    let nowhere = format!("rooms/{room}/report/{NOWHERE}");
    assert_eq!(report(nowhere, why.clone(), bob.clone()).await, is(404, "M_NOT_FOUND"));
    let elsewhere = format!("rooms/!none:else.where/report/{event}");
    assert_eq!(report(elsewhere, why.clone(), bob.clone()).await, is(404, "M_NOT_FOUND"));
    for path in [format!("rooms/{room}/report"), format!("users/{}/report", alice.user_id)] {
        assert_eq!(report(path.clone(), json!({}), bob.clone()).await, is(400, "M_MISSING_PARAM"), "{path}");
        assert_eq!(report(path, json!({ "reason": 7 }), bob.clone()).await.0, 400);
    }
    let long = json!({ "reason": "x".repeat(REASON_BYTES_MAX + 1) });
    assert_eq!(report(of_event.clone(), long, bob.clone()).await, is(413, "M_TOO_LARGE"));
    assert_eq!(report(of_event.clone(), json!({ "score": "bad" }), bob.clone()).await.0, 400);
    assert_eq!(report("users/nonsense/report".to_owned(), why.clone(), bob.clone()).await.0, 400);
    must(&bob, &room, "leave", json!({})).await;
    assert_eq!(
        report(of_event, why, bob.clone()).await,
        is(404, "M_NOT_FOUND"),
        "they are no longer in the room"
    );
    assert_eq!(reports(&server).await, Vec::<Value>::new());
}

#[tokio::test(start_paused = true)]
async fn a_user_reports_only_so_much() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let path = |number: usize| format!("{V3}/users/@spam{number}:else.where/report");
    for number in 0..REPORTS_MAX {
        alice.ok_post(&path(number), json!({ "reason": "spam" })).await;
    }
    assert_eq!(code(&alice.post(&path(REPORTS_MAX), json!({ "reason": "" })).await), (403, "M_FORBIDDEN"));
    alice.ok_post(&path(0), json!({ "reason": "again" })).await;
    bob.ok_post(&path(REPORTS_MAX), json!({ "reason": "" })).await;
}
