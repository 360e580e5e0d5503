//! `src/api/client/login.rs`, `src/api/client/logout.rs`

use std::time::Duration;

use futures_util::future::join_all;
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{TestClient, TestServer};

const LOGIN: &str = "/_matrix/client/v3/login";
const REFRESH: &str = "/_matrix/client/v3/refresh";
const WHOAMI: &str = "/_matrix/client/v3/account/whoami";

fn password(user: &str, password: &str) -> Value {
    json!({ "type": "m.login.password", "identifier": { "type": "m.id.user", "user": user }, "password": password })
}

fn with_token(server: &TestServer, answer: &Value) -> TestClient {
    let mut client = server.anonymous();
    client.token = Some(answer["access_token"].as_str().unwrap().to_owned());
    client
}

#[tokio::test(start_paused = true)]
async fn a_name_a_user_id_and_the_old_field_log_in() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let client = server.anonymous();
    assert_eq!(
        client.get(LOGIN).await,
        (StatusCode::OK, json!({ "flows": [{ "type": "m.login.password" }] }))
    );
    let mut old = password("", "password of alice");
    old["identifier"] = Value::Null;
    old["user"] = "@alice:test.example".into();
    let ways = [
        password("alice", "password of alice"),
        password("ALICE", "password of alice"),
        password("@alice:test.example", "password of alice"),
        old,
    ];
    for way in ways {
        let (status, json) = client.post(LOGIN, way).await;
        assert_eq!(
            (status, json["user_id"].as_str()),
            (StatusCode::OK, Some(alice.user_id.as_str())),
            "{json}"
        );
        assert_ne!(json["device_id"], alice.device_id);
        assert_eq!(with_token(&server, &json).get(WHOAMI).await.1["device_id"], json["device_id"]);
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_is_not_known_by_name_and_password_is_refused_alike() {
    let server = TestServer::new();
    server.register("alice").await;
    let client = server.anonymous();
    let mut phone = password("alice", "password of alice");
    phone["identifier"] = json!({ "type": "m.id.phone", "country": "GB", "phone": "1" });
    let wrong = [
        password("alice", "wrong"),
        password("nobody", "wrong"),
        password("@alice:other.example", "password of alice"),
        password("@alice", "password of alice"),
        password("", "password of alice"),
        password("alice", ""),
        password("alice", &"p".repeat(60_000)),
        phone,
    ];
    for body in wrong {
        let (status, json) = client.post(LOGIN, body).await;
        assert_eq!(
            (status, json["errcode"].as_str()),
            (StatusCode::FORBIDDEN, Some("M_FORBIDDEN")),
            "{json}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn bodies_that_are_no_login_are_refused() {
    let client = TestServer::new().anonymous();
    let cases = [
        (json!({}), "M_MISSING_PARAM"),
        (json!({ "type": 1 }), "M_BAD_JSON"),
        (json!({ "type": "m.login.password" }), "M_MISSING_PARAM"),
        (json!({ "type": "m.login.password", "password": "a" }), "M_MISSING_PARAM"),
        (json!({ "type": "m.login.magic" }), "M_UNKNOWN"),
        (json!({ "type": "m.login.token", "token": "a" }), "M_UNKNOWN"),
    ];
    for (body, code) in cases {
        let (status, json) = client.post(LOGIN, body.clone()).await;
        assert_eq!(
            (status, json["errcode"].as_str()),
            (StatusCode::BAD_REQUEST, Some(code)),
            "{body} {json}"
        );
    }
    let (status, json) = client.server.raw(Method::POST, LOGIN, None, "{").await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some("M_NOT_JSON")));
}

#[tokio::test(start_paused = true)]
async fn logging_in_with_a_known_device_ends_its_earlier_token_only() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let other = server.anonymous().post(LOGIN, password("alice", "password of alice")).await.1;
    let other = with_token(&server, &other);
    let mut body = password("alice", "password of alice");
    body["device_id"] = alice.device_id.as_str().into();
    let (status, json) = server.anonymous().post(LOGIN, body).await;
    assert_eq!((status, json["device_id"].as_str()), (StatusCode::OK, Some(alice.device_id.as_str())));
    let (status, json) = alice.get(WHOAMI).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::UNAUTHORIZED, Some("M_UNKNOWN_TOKEN")));
    assert_eq!(other.get(WHOAMI).await.0, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn logout_ends_one_device_and_logout_all_every_one() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let mut others = Vec::new();
    for _ in 0..2 {
        let answer = server.anonymous().post(LOGIN, password("alice", "password of alice")).await.1;
        others.push(with_token(&server, &answer));
    }
    assert_eq!(alice.post("/_matrix/client/v3/logout", json!({})).await, (StatusCode::OK, json!({})));
    assert_eq!(alice.get(WHOAMI).await.0, StatusCode::UNAUTHORIZED);
    let (_, devices) = others[0].get("/_matrix/client/v3/devices").await;
    assert_eq!(devices["devices"].as_array().unwrap().len(), 2);
    assert_eq!(others[0].post("/_matrix/client/v3/logout/all", json!({})).await.0, StatusCode::OK);
    for other in &others {
        assert_eq!(other.get(WHOAMI).await.0, StatusCode::UNAUTHORIZED);
    }
}

async fn refreshable(server: &TestServer) -> (TestClient, String) {
    server.register("alice").await;
    let mut body = password("alice", "password of alice");
    body["refresh_token"] = true.into();
    let (_, json) = server.anonymous().post(LOGIN, body).await;
    assert_eq!(json["expires_in_ms"], 3_600_000);
    (with_token(server, &json), json["refresh_token"].as_str().unwrap().to_owned())
}

#[tokio::test(start_paused = true)]
async fn the_old_pair_lives_until_the_new_access_token_is_first_used() {
    let server = TestServer::new();
    let (old, refresh) = refreshable(&server).await;
    let client = server.anonymous();
    let (status, first) = client.post(REFRESH, json!({ "refresh_token": refresh })).await;
    assert_eq!(status, StatusCode::OK, "{first}");
    // When the answer got lost, asking again gives the same pair, and the old token still works.
    let (_, again) = client.post(REFRESH, json!({ "refresh_token": refresh })).await;
    assert_eq!(first, again);
    let (status, who) = old.get(WHOAMI).await;
    assert_eq!(status, StatusCode::OK);

    let new = with_token(&server, &first);
    assert_eq!(new.get(WHOAMI).await, (StatusCode::OK, who));
    let (status, json) = old.get(WHOAMI).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::UNAUTHORIZED, Some("M_UNKNOWN_TOKEN")));
    let (status, json) = client.post(REFRESH, json!({ "refresh_token": refresh })).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::UNAUTHORIZED, Some("M_UNKNOWN_TOKEN")));
    let (status, _) = client.post(REFRESH, json!({ "refresh_token": first["refresh_token"] })).await;
    assert_eq!(status, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn using_the_new_refresh_token_ends_the_old_pair_too() {
    let server = TestServer::new();
    let (old, refresh) = refreshable(&server).await;
    let client = server.anonymous();
    let (_, first) = client.post(REFRESH, json!({ "refresh_token": refresh })).await;
    let (_, second) = client.post(REFRESH, json!({ "refresh_token": first["refresh_token"] })).await;
    assert_eq!(client.post(REFRESH, json!({ "refresh_token": refresh })).await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(old.get(WHOAMI).await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(with_token(&server, &first).get(WHOAMI).await.0, StatusCode::OK);
    assert_eq!(with_token(&server, &second).get(WHOAMI).await.0, StatusCode::OK);
    assert_eq!(with_token(&server, &first).get(WHOAMI).await.0, StatusCode::UNAUTHORIZED);
}

#[tokio::test(start_paused = true)]
async fn an_access_token_that_can_be_refreshed_ends_with_a_soft_logout() {
    let server = TestServer::new();
    let (client, refresh) = refreshable(&server).await;
    server.server().app().env.sleep(Duration::from_secs(3600)).await;
    let (status, json) = client.get(WHOAMI).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::UNAUTHORIZED, Some("M_UNKNOWN_TOKEN")));
    assert_eq!(json["soft_logout"], true);
    let (status, json) = server.anonymous().post(REFRESH, json!({ "refresh_token": refresh })).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(with_token(&server, &json).get(WHOAMI).await.0, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn a_thousand_refreshes_of_one_token_at_once_get_one_answer() {
    let server = TestServer::new();
    let (_, refresh) = refreshable(&server).await;
    let client = server.anonymous();
    let answers =
        join_all((0..1000).map(|_| client.post(REFRESH, json!({ "refresh_token": refresh })))).await;
    assert_eq!(answers[0].0, StatusCode::OK);
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    assert_eq!(with_token(&server, &answers[0].1).get(WHOAMI).await.0, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn tokens_that_are_not_ours_are_refused() {
    let server = TestServer::new();
    let long = "a".repeat(10_000);
    for token in ["", "a", "aqa_", long.as_str()] {
        let mut client = server.anonymous();
        client.token = Some(token.to_owned());
        assert_eq!(client.get(WHOAMI).await.0, StatusCode::UNAUTHORIZED, "{token}");
        let (status, json) = client.post(REFRESH, json!({ "refresh_token": token })).await;
        assert_eq!((status, json["errcode"].as_str()), (StatusCode::UNAUTHORIZED, Some("M_UNKNOWN_TOKEN")));
    }
}
