//! `src/api/client/register.rs`, `src/api/client/shared_secret.rs`

use aqueduct::config::RegistrationMode;
use futures_util::future::join_all;
use hmac::{Hmac, KeyInit, Mac};
use http::{Method, Request, StatusCode};
use serde_json::{Value, json};

use crate::support::TestServer;

const REGISTER: &str = "/_matrix/client/v3/register";

fn dummy(name: &str) -> Value {
    json!({ "username": name, "password": "p4ssw0rd of test", "auth": { "type": "m.login.dummy" } })
}

#[tokio::test(start_paused = true)]
async fn without_auth_the_flows_and_a_session_are_told_and_the_session_leads_on() {
    let client = TestServer::new().anonymous();
    let (status, json) = client.post(REGISTER, json!({ "username": "alice", "password": "secret" })).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    assert_eq!(json["flows"][0]["stages"], json!(["m.login.dummy"]));
    assert_eq!(json["completed"], json!([]));
    assert!(json["params"].is_object());
    let auth = json!({ "type": "m.login.dummy", "session": json["session"] });
    let body = json!({ "username": "alice", "password": "secret", "auth": auth });
    let (status, json) = client.post(REGISTER, body).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    assert_eq!(json["user_id"], "@alice:test.example");
    assert!(json["refresh_token"].is_null() && json["expires_in_ms"].is_null());
}

#[tokio::test(start_paused = true)]
async fn a_fresh_token_tells_who_one_is() {
    let alice = TestServer::new().register("alice").await;
    let (status, json) = alice.get("/_matrix/client/v3/account/whoami").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(json, json!({ "user_id": alice.user_id, "device_id": alice.device_id }));
}

#[tokio::test(start_paused = true)]
async fn names_must_be_valid_and_free() {
    let client = TestServer::new().anonymous();
    for bad in ["", "a b", "ä", "a:b", "@a:test.example", "_a", &"a".repeat(250)] {
        let (status, json) = client.post(REGISTER, dummy(bad)).await;
        assert_eq!((status, json["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some("M_INVALID_USERNAME")));
    }
    assert_eq!(client.post(REGISTER, dummy("Alice")).await.0, StatusCode::OK);
    for taken in ["alice", "ALICE"] {
        let (status, json) = client.post(REGISTER, dummy(taken)).await;
        assert_eq!((status, json["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some("M_USER_IN_USE")));
    }
    let available = "/_matrix/client/v3/register/available?username=";
    assert_eq!(client.get(&format!("{available}bob")).await, (StatusCode::OK, json!({ "available": true })));
    let (status, json) = client.get(&format!("{available}alice")).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some("M_USER_IN_USE")));
    let (status, json) = client.get(&format!("{available}a%20b")).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some("M_INVALID_USERNAME")));
    let (status, json) = client.get("/_matrix/client/v3/register/available").await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some("M_MISSING_PARAM")));
}

#[tokio::test(start_paused = true)]
async fn a_name_is_made_where_none_is_given_and_a_device_is_taken_as_given() {
    let client = TestServer::new().anonymous();
    let body = json!({ "auth": { "type": "m.login.dummy" }, "password": "secret", "device_id": "MINE",
        "initial_device_display_name": "phone", "refresh_token": true });
    let (status, json) = client.post(REGISTER, body).await;
    assert_eq!((status, json["device_id"].as_str()), (StatusCode::OK, Some("MINE")), "{json}");
    assert!(json["refresh_token"].is_string() && json["expires_in_ms"].is_u64());
    let mut one = client.clone();
    one.token = json["access_token"].as_str().map(str::to_owned);
    let (_, device) = one.get("/_matrix/client/v3/devices/MINE").await;
    assert_eq!(device["display_name"], "phone");
}

#[tokio::test(start_paused = true)]
async fn inhibit_login_makes_an_account_and_no_device() {
    let client = TestServer::new().anonymous();
    let mut body = dummy("alice");
    body["inhibit_login"] = true.into();
    let (status, json) = client.post(REGISTER, body).await;
    assert_eq!((status, json), (StatusCode::OK, json!({ "user_id": "@alice:test.example" })));
}

#[tokio::test(start_paused = true)]
async fn an_empty_password_is_weak() {
    let client = TestServer::new().anonymous();
    let body = json!({ "username": "a", "password": "", "auth": { "type": "m.login.dummy" } });
    let (status, json) = client.post(REGISTER, body).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some("M_WEAK_PASSWORD")));
}

#[tokio::test(start_paused = true)]
async fn in_token_mode_the_first_token_is_good_for_one_account_which_is_the_admin() {
    let server = TestServer::with(|config| config.registration.mode = RegistrationMode::Token);
    let client = server.anonymous();
    let (status, json) = client.post(REGISTER, dummy("alice")).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    assert_eq!(json["flows"], json!([{ "stages": ["m.login.registration_token"] }]));
    assert_eq!(json["errcode"], "M_UNRECOGNIZED");

    let with = |name: &str, token: &str| {
        let auth = json!({ "type": "m.login.registration_token", "token": token });
        json!({ "username": name, "password": "secret", "auth": auth })
    };
    let (status, json) = client.post(REGISTER, with("alice", "wrong")).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::UNAUTHORIZED, Some("M_UNAUTHORIZED")));
    let token = server.server().app().accounts.first_token().unwrap().to_owned();
    let validity = format!("/_matrix/client/v1/register/m.login.registration_token/validity?token={token}");
    assert_eq!(client.get(&validity).await, (StatusCode::OK, json!({ "valid": true })));

    let names: Vec<_> = (0..20).map(|number| format!("user{number}")).collect();
    let answers = join_all(names.iter().map(|name| client.post(REGISTER, with(name, &token)))).await;
    let made: Vec<_> = answers.iter().filter(|(status, _)| *status == StatusCode::OK).collect();
    assert_eq!(made.len(), 1, "{answers:?}");
    assert_eq!(client.get(&validity).await, (StatusCode::OK, json!({ "valid": false })));
    // Every flow goes on asking for a token.
    let (_, json) = client.post(REGISTER, with("late", &token)).await;
    assert_eq!(json["flows"], json!([{ "stages": ["m.login.registration_token"] }]));
    let snapshot = server.server().app().store.snapshot();
    let users: Vec<_> = aqueduct::accounts::users::list(&*snapshot).unwrap().map(Result::unwrap).collect();
    assert!(users.len() == 1 && users[0].1.is_admin);
}

#[tokio::test(start_paused = true)]
async fn closed_registration_is_closed_once_there_is_an_account() {
    let server = TestServer::with(|config| config.registration.mode = RegistrationMode::Closed);
    let token = server.server().app().accounts.first_token().unwrap().to_owned();
    let auth = json!({ "type": "m.login.registration_token", "token": token });
    let body = json!({ "username": "root", "password": "secret", "auth": auth });
    assert_eq!(server.anonymous().post(REGISTER, body).await.0, StatusCode::OK);
    let (status, json) = server.anonymous().post(REGISTER, dummy("alice")).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::FORBIDDEN, Some("M_FORBIDDEN")));
}

#[tokio::test(start_paused = true)]
async fn guests_come_in_only_where_they_may() {
    let (status, json) =
        TestServer::new().anonymous().post(&format!("{REGISTER}?kind=guest"), json!({})).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::FORBIDDEN, Some("M_GUEST_ACCESS_FORBIDDEN")));
    let server = TestServer::with(|config| config.registration.guests = true);
    let (status, json) = server.anonymous().post(&format!("{REGISTER}?kind=guest"), json!({})).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    let mut guest = server.anonymous();
    guest.token = json["access_token"].as_str().map(str::to_owned);
    assert_eq!(guest.get("/_matrix/client/v3/account/whoami").await.1["is_guest"], true);
    let (status, _) = server.anonymous().post(&format!("{REGISTER}?kind=robot"), json!({})).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}

#[tokio::test(start_paused = true)]
async fn guests_may_do_little_until_they_become_users() {
    let server = TestServer::with(|config| config.registration.guests = true);
    let (_, json) = server.anonymous().post(&format!("{REGISTER}?kind=guest"), json!({})).await;
    let user_id = json["user_id"].as_str().unwrap();
    let name = user_id.strip_prefix('@').unwrap().split(':').next().unwrap();
    let mut guest = server.anonymous();
    guest.token = json["access_token"].as_str().map(str::to_owned);
    let profile = |field: &str| format!("/_matrix/client/v3/profile/{user_id}/{field}");
    let create = "/_matrix/client/v3/createRoom";
    let refused = [
        guest.post(create, json!({})).await,
        guest.post("/_matrix/client/v3/account/deactivate", json!({})).await,
        guest.put(&profile("avatar_url"), json!({ "avatar_url": "mxc://a/b" })).await,
    ];
    for (status, json) in refused {
        assert_eq!(
            (status, json["errcode"].as_str()),
            (StatusCode::FORBIDDEN, Some("M_GUEST_ACCESS_FORBIDDEN"))
        );
    }
    assert_eq!(guest.put(&profile("displayname"), json!({ "displayname": "G" })).await.0, StatusCode::OK);
    assert_eq!(guest.get("/_matrix/client/v3/sync").await.0, StatusCode::OK);

    let wish = |name: &str, token: &str| {
        let mut body = dummy(name);
        body["guest_access_token"] = token.into();
        body
    };
    let token = guest.token.clone().unwrap();
    let post = |body: Value| async { server.anonymous().post(REGISTER, body).await };
    assert_eq!(post(wish("other", &token)).await.0, StatusCode::BAD_REQUEST);
    assert_eq!(post(wish(name, "wrong")).await.0, StatusCode::UNAUTHORIZED);
    let (status, json) = post(wish(name, &token)).await;
    assert_eq!((status, json["user_id"].as_str()), (StatusCode::OK, Some(user_id)), "{json}");
    assert_eq!(guest.post(create, json!({})).await.0, StatusCode::OK, "the guest's device is a user's now");
    assert_eq!(post(wish(name, &token)).await.0, StatusCode::FORBIDDEN);
}

#[tokio::test(start_paused = true)]
async fn a_thousand_at_once_for_one_name_have_one_winner() {
    let client = TestServer::new().anonymous();
    let answers = join_all((0..1000).map(|_| client.post(REGISTER, dummy("alice")))).await;
    let (made, refused): (Vec<_>, Vec<_>) =
        answers.into_iter().partition(|(status, _)| *status == StatusCode::OK);
    assert_eq!((made.len(), refused.len()), (1, 999));
    for (status, json) in refused {
        assert_eq!((status, json["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some("M_USER_IN_USE")));
    }
}

fn admins(server: &TestServer) -> Vec<String> {
    let snapshot = server.server().app().store.snapshot();
    let users = aqueduct::accounts::users::list(&*snapshot).unwrap().map(Result::unwrap);
    users.filter(|(_, row)| row.is_admin).map(|(_, row)| row.user_id.to_string()).collect()
}

/// The first user of a server with open registration may be anybody, so being first makes nobody an admin.
#[tokio::test(start_paused = true)]
async fn open_registration_makes_nobody_an_admin_but_who_has_the_printed_token() {
    let server = TestServer::new();
    server.register("stranger").await;
    assert_eq!(admins(&server), [] as [&str; 0]);
    let server = TestServer::with(|config| config.registration.guests = true);
    // A guest is no account yet.
    let (status, _) = server.anonymous().post(&format!("{REGISTER}?kind=guest"), json!({})).await;
    assert_eq!(status, StatusCode::OK);
    let token = server.server().app().accounts.first_token().unwrap().to_owned();
    let auth = json!({ "type": "m.login.registration_token", "token": token });
    let body = json!({ "username": "root", "password": "secret", "auth": auth });
    assert_eq!(server.anonymous().post(REGISTER, body).await.0, StatusCode::OK);
    assert_eq!(admins(&server), ["@root:test.example"]);
}

#[tokio::test(start_paused = true)]
async fn of_guests_that_become_users_at_once_with_one_token_one_is_heard() {
    let server = TestServer::with(|config| config.registration.guests = true);
    let guest = crate::policy::guest(&server).await;
    let name = guest.user_id.strip_prefix('@').unwrap().split(':').next().unwrap();
    let wish = |password: &str| {
        json!({ "username": name, "password": password, "auth": { "type": "m.login.dummy" },
            "guest_access_token": guest.token })
    };
    let anonymous = server.anonymous();
    let passwords: Vec<_> = (0..20).map(|number| format!("password {number}")).collect();
    let answers = join_all(passwords.iter().map(|password| anonymous.post(REGISTER, wish(password)))).await;
    let heard: Vec<_> =
        answers.iter().zip(&passwords).filter(|((status, _), _)| *status == StatusCode::OK).collect();
    assert_eq!(heard.len(), 1, "{answers:?}");
    assert!(
        answers.iter().filter(|(status, _)| *status == StatusCode::FORBIDDEN).count() == 19,
        "{answers:?}"
    );
    // The account has the password of the registration that won.
    for password in &passwords {
        let body = json!({ "type": "m.login.password", "password": password,
            "identifier": { "type": "m.id.user", "user": name } });
        let (status, _) = server.anonymous().post("/_matrix/client/v3/login", body).await;
        assert_eq!(status == StatusCode::OK, password == heard[0].1, "{password}");
    }
    assert_eq!(admins(&server), [] as [&str; 0]);
}

fn mac(nonce: &str, name: &str, admin: bool) -> String {
    let mut mac = Hmac::<sha1::Sha1>::new_from_slice(b"shared").unwrap();
    let admin = if admin { "admin" } else { "notadmin" };
    mac.update(format!("{nonce}\0{name}\0secret\0{admin}").as_bytes());
    mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(start_paused = true)]
async fn the_first_account_is_no_admin_where_the_shared_secret_says_so() {
    const PATH: &str = "/_synapse/admin/v1/register";
    let server = TestServer::with(|config| config.registration.shared_secret = "shared".to_owned());
    let client = server.anonymous();
    let nonce = client.get(PATH).await.1["nonce"].as_str().unwrap().to_owned();
    let mac = mac(&nonce, "bot", false);
    let body = json!({ "nonce": nonce, "username": "bot", "password": "secret", "admin": false, "mac": mac });
    assert_eq!(client.post(PATH, body).await.0, StatusCode::OK);
    assert_eq!(admins(&server), [] as [&str; 0]);
}

#[tokio::test(start_paused = true)]
async fn who_knows_the_shared_secret_may_register_and_nobody_else() {
    const PATH: &str = "/_synapse/admin/v1/register";
    let (status, json) = TestServer::new().anonymous().get(PATH).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::NOT_FOUND, Some("M_UNRECOGNIZED")));

    let server = TestServer::with(|config| {
        config.registration.mode = RegistrationMode::Closed;
        config.registration.shared_secret = "shared".to_owned();
    });
    let client = server.anonymous();
    let nonce = client.get(PATH).await.1["nonce"].as_str().unwrap().to_owned();
    let wish = |nonce: &str, mac: String| json!({ "nonce": nonce, "username": "root", "password": "secret", "admin": true, "mac": mac });
    let (status, json) = client.post(PATH, wish(&nonce, mac(&nonce, "root", false))).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::FORBIDDEN, Some("M_FORBIDDEN")));
    let (status, _) = client.post(PATH, wish(&nonce, mac(&nonce, "root", true))).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "a nonce is good once");
    let nonce = client.get(PATH).await.1["nonce"].as_str().unwrap().to_owned();
    let (status, json) = client.post(PATH, wish(&nonce, mac(&nonce, "root", true))).await;
    assert_eq!((status, json["user_id"].as_str()), (StatusCode::OK, Some("@root:test.example")));
    assert_eq!(json["home_server"], "test.example");
    assert!(json["access_token"].is_string() && json["device_id"].is_string());
    assert_eq!(admins(&server), ["@root:test.example"]);
}

/// A client that cannot ask for a registration token sends its user to a page of ours.
#[tokio::test(start_paused = true)]
async fn a_registration_token_may_be_shown_on_a_page() {
    const PAGE: &str = "/_matrix/client/v3/auth/m.login.registration_token/fallback/web";
    let server = TestServer::with(|config| {
        config.registration.mode = aqueduct::config::RegistrationMode::Token;
    });
    let token = server.server().app().accounts.first_token().unwrap().to_owned();
    let body = json!({ "username": "alice", "password": "password of alice" });
    let (status, asked) = server.anonymous().post("/_matrix/client/v3/register", body.clone()).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    let session = asked["session"].as_str().unwrap();
    let page = |method: Method, path: String, body: String| async {
        let request = Request::builder().method(method).uri(path).body(body.into()).unwrap();
        let response = server.send(request).await;
        assert_eq!(response.status(), StatusCode::OK);
        let page = axum::body::to_bytes(response.into_body(), 1 << 16).await.unwrap();
        String::from_utf8(page.to_vec()).unwrap()
    };
    let form = page(Method::GET, format!("{PAGE}?session={session}"), String::new()).await;
    assert!(form.contains(session) && !form.contains("<script"), "{form}");
    let hostile = page(Method::GET, format!("{PAGE}?session=%22%3E%3Cscript%3E"), String::new()).await;
    assert!(!hostile.contains("<script"), "{hostile}");
    for (token, done) in [("wrong", false), (&*token, true)] {
        let form = format!("session={session}&token={token}");
        let answer = page(Method::POST, PAGE.to_owned(), form).await;
        assert_eq!(answer.contains("authDone"), done, "{answer}");
    }
    // A form that could not be sent on is not shown.
    let ended = page(Method::POST, PAGE.to_owned(), format!("session=none&token={token}")).await;
    for lost in [ended, page(Method::GET, PAGE.to_owned(), String::new()).await] {
        assert!(lost.contains("Begin again in your app") && !lost.contains("<form"), "{lost}");
    }
    let mut again = body;
    again["auth"] = json!({ "session": session });
    let (status, json) = server.anonymous().post("/_matrix/client/v3/register", again).await;
    assert_eq!(status, StatusCode::OK, "{json}");
}

/// "all parameters in the request body with the exception of `initial_device_display_name` MUST BE ignored".
#[tokio::test(start_paused = true)]
async fn of_what_a_guest_sends_one_field_counts() {
    let server = TestServer::with(|config| config.registration.guests = true);
    let body = json!({
        "device_id": 5, "username": {}, "password": [], "auth": 7, "inhibit_login": "x", "refresh_token": 1,
        "initial_device_display_name": "visitor",
    });
    let (status, json) = server.anonymous().post("/_matrix/client/v3/register?kind=guest", body).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    let mut guest = server.anonymous();
    guest.token = json["access_token"].as_str().map(str::to_owned);
    let (_, json) = guest.get("/_matrix/client/v3/capabilities").await;
    let fields = &json["capabilities"]["m.profile_fields"];
    assert_eq!(fields, &json!({ "enabled": true, "allowed": ["displayname"] }));
}

#[tokio::test(start_paused = true)]
async fn an_empty_confirmation_is_answered_like_none() {
    let server = TestServer::new();
    let mut answers = Vec::new();
    for body in [json!({}), json!({ "auth": {} }), json!({ "auth": null })] {
        let (status, mut json) = server.anonymous().post("/_matrix/client/v3/register", body).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{json}");
        json["session"].take();
        answers.push(json);
    }
    assert_eq!(answers[0], answers[1]);
    assert_eq!(answers[0], answers[2]);
}

/// Every stage that this server asks for has a page that carries it out.
#[tokio::test(start_paused = true)]
async fn every_stage_that_is_asked_for_has_a_page() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let page = |method: Method, stage: &str, form: String| {
        let uri = format!("/_matrix/client/v3/auth/{stage}/fallback/web");
        let uri = if method == Method::GET { format!("{uri}?{form}") } else { uri };
        let request = Request::builder().method(method).uri(uri).body(form.into()).unwrap();
        let server = server.clone();
        async move {
            let response = server.send(request).await;
            let status = response.status();
            let page = axum::body::to_bytes(response.into_body(), 1 << 16).await.unwrap();
            (status, String::from_utf8(page.to_vec()).unwrap())
        }
    };
    let registration = json!({ "username": "bob", "password": "password of bob" });
    let removal = json!({ "devices": [alice.device_id] });
    for (client, path, body, stage, secrets) in [
        (server.anonymous(), "register", registration, "m.login.dummy", vec![("", true)]),
        (
            alice.clone(),
            "delete_devices",
            removal,
            "m.login.password",
            vec![("&password=wrong", false), ("", false), ("&password=password+of+alice", true)],
        ),
    ] {
        let path = format!("/_matrix/client/v3/{path}");
        let (status, asked) = client.post(&path, body.clone()).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{asked}");
        assert_eq!(asked["flows"][0]["stages"], json!([stage]));
        let session = asked["session"].as_str().unwrap();
        let (status, form) = page(Method::GET, stage, format!("session={session}")).await;
        assert_eq!(status, StatusCode::OK);
        assert!(form.contains(session) && form.contains("<form") && !form.contains("<script"), "{form}");
        let mut again = body;
        again["auth"] = json!({ "session": session });
        for (secret, done) in secrets {
            let (status, answer) = page(Method::POST, stage, format!("session={session}{secret}")).await;
            assert_eq!(status, StatusCode::OK, "{answer}");
            assert_eq!(answer.contains("authDone"), done, "{answer}");
            let (status, json) = client.post(&path, again.clone()).await;
            assert_eq!(status == StatusCode::OK, done, "{json}");
        }
        // A session that is over is no session.
        let (_, answer) =
            page(Method::POST, stage, format!("session={session}&password=password+of+alice")).await;
        assert!(!answer.contains("authDone"), "{answer}");
    }
    assert_eq!(page(Method::GET, "m.login.other", String::new()).await.0, StatusCode::NOT_FOUND);
}

async fn logs_in(server: &TestServer, name: &str, password: &str) -> bool {
    let body = json!({ "type": "m.login.password", "password": password,
        "identifier": { "type": "m.id.user", "user": name } });
    server.anonymous().post("/_matrix/client/v3/login", body).await.0 == StatusCode::OK
}

/// Element Android, for one, asks for the flows, then sends the fields, and then only `auth`.
#[tokio::test(start_paused = true)]
async fn a_client_may_send_the_fields_of_a_registration_once() {
    let server = TestServer::new();
    let client = server.anonymous();
    let (_, asked) = client.post(REGISTER, json!({})).await;
    let fields = json!({ "username": "alice", "password": "p4ssw0rd of test", "device_id": "MINE",
        "initial_device_display_name": "phone", "refresh_token": true });
    for session in [None, Some(&asked["session"])] {
        let name = if session.is_some() { "alice" } else { "bob" };
        let mut fields = fields.clone();
        fields["username"] = name.into();
        if let Some(session) = session {
            fields["auth"] = json!({ "session": session });
        }
        let (status, asked) = client.post(REGISTER, fields).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{asked}");
        let auth = json!({ "type": "m.login.dummy", "session": asked["session"] });
        let (status, json) = client.post(REGISTER, json!({ "auth": auth })).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        assert_eq!(
            (&json["user_id"], &json["device_id"]),
            (&format!("@{name}:test.example").into(), &"MINE".into())
        );
        assert!(json["refresh_token"].is_string());
        let mut one = client.clone();
        one.token = json["access_token"].as_str().map(str::to_owned);
        assert_eq!(one.get("/_matrix/client/v3/devices/MINE").await.1["display_name"], "phone");
        assert!(logs_in(&server, name, "p4ssw0rd of test").await);
    }
    let (_, asked) = client.post(REGISTER, json!({ "username": "carol", "inhibit_login": true })).await;
    let auth = json!({ "type": "m.login.dummy", "session": asked["session"] });
    let (status, json) = client.post(REGISTER, json!({ "auth": auth })).await;
    assert_eq!((status, json), (StatusCode::OK, json!({ "user_id": "@carol:test.example" })));
    // Who wishes for nothing, or for what was not remembered, is asked again and gets no account that nobody wished for.
    let auth = json!({ "type": "m.login.dummy", "session": "from before a restart" });
    assert_eq!(client.post(REGISTER, json!({ "auth": auth })).await.0, StatusCode::UNAUTHORIZED);
    let large = json!({ "username": "dave", "password": "\u{1}".repeat(1_000) });
    let (_, asked) = client.post(REGISTER, large).await;
    let auth = json!({ "type": "m.login.dummy", "session": asked["session"] });
    assert_eq!(client.post(REGISTER, json!({ "auth": auth })).await.0, StatusCode::UNAUTHORIZED);
    let (_, asked) = client.post(REGISTER, json!({})).await;
    let auth = json!({ "type": "m.login.dummy", "session": asked["session"] });
    assert_eq!(client.post(REGISTER, json!({ "auth": auth })).await.0, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn a_registration_that_is_sent_again_logs_in_to_the_account_that_it_made() {
    let server = TestServer::new();
    let client = server.anonymous();
    for named in [true, false] {
        let mut body = json!({ "password": "p4ssw0rd of test", "device_id": "MINE" });
        if named {
            body["username"] = "alice".into();
        }
        let (_, asked) = client.post(REGISTER, body.clone()).await;
        body["auth"] = json!({ "type": "m.login.dummy", "session": asked["session"] });
        let (status, first) = client.post(REGISTER, body.clone()).await;
        assert_eq!(status, StatusCode::OK, "{first}");
        let (status, again) = client.post(REGISTER, body.clone()).await;
        assert_eq!(status, StatusCode::OK, "{again}");
        assert_eq!((&again["user_id"], &again["device_id"]), (&first["user_id"], &first["device_id"]));
        let mut one = client.clone();
        one.token = again["access_token"].as_str().map(str::to_owned);
        assert_eq!(one.get("/_matrix/client/v3/account/whoami").await.1["user_id"], first["user_id"]);
        // Somebody who does not know the password gets nothing.
        let mut wrong = body.clone();
        wrong["password"] = "another".into();
        assert_eq!(client.post(REGISTER, wrong).await.0, StatusCode::FORBIDDEN);
        for (field, value) in [("device_id", "OTHER"), ("session", "")] {
            let mut other = body.clone();
            match field {
                "session" => other["auth"] = json!({ "type": "m.login.dummy" }),
                field => other[field] = value.into(),
            }
            let (status, json) = client.post(REGISTER, other).await;
            let expected = if named { StatusCode::BAD_REQUEST } else { StatusCode::OK };
            assert_eq!(status, expected, "{json}");
            assert_ne!(json["user_id"], first["user_id"]);
        }
    }
}
