//! What holds for every endpoint: unknown paths and methods, browsers, tokens.

use axum::body::Body;
use http::{Method, Request, StatusCode};

use crate::support::TestServer;

#[tokio::test(start_paused = true)]
async fn unknown_paths_and_methods_are_unrecognized() {
    let server = TestServer::new();
    for path in ["/", "/_matrix/client/v3/nonsense", "/_matrix/client/%ff", "//"] {
        let (status, json) = server.anonymous().get(path).await;
        assert_eq!(
            (status, json["errcode"].as_str()),
            (StatusCode::NOT_FOUND, Some("M_UNRECOGNIZED")),
            "{path}"
        );
    }
    for method in [Method::POST, Method::PATCH, Method::DELETE] {
        let (status, json) = server.raw(method, "/_matrix/client/versions", None, Body::empty()).await;
        assert_eq!(
            (status, json["errcode"].as_str()),
            (StatusCode::METHOD_NOT_ALLOWED, Some("M_UNRECOGNIZED"))
        );
    }
}

#[tokio::test(start_paused = true)]
async fn browsers_are_allowed_everywhere() {
    let server = TestServer::new();
    for (method, path) in [
        (Method::GET, "/_matrix/client/versions"),
        (Method::GET, "/nonsense"),
        (Method::OPTIONS, "/_matrix/client/v3/sync"),
        (Method::PATCH, "/_matrix/client/versions"),
    ] {
        let request = Request::builder().method(&method).uri(path).body(Body::empty()).unwrap();
        let response = server.send(request).await;
        if method == Method::OPTIONS {
            assert!(response.status().is_success());
        }
        assert_eq!(response.headers()["access-control-allow-origin"], "*", "{method} {path}");
        assert!(
            response.headers()["access-control-allow-headers"].to_str().unwrap().contains("Authorization")
        );
    }
}

#[tokio::test(start_paused = true)]
async fn head_is_answered_like_get_without_a_body() {
    let server = TestServer::new();
    let (status, json) = server.raw(Method::HEAD, "/_matrix/client/versions", None, Body::empty()).await;
    assert_eq!((status, json), (StatusCode::OK, serde_json::Value::Null));
}

#[tokio::test(start_paused = true)]
async fn a_token_that_is_not_known_is_refused() {
    let server = TestServer::new();
    let (status, json) =
        server.raw(Method::GET, "/_matrix/client/versions", Some("wrong"), Body::empty()).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::UNAUTHORIZED, Some("M_UNKNOWN_TOKEN")));
}

#[tokio::test(start_paused = true)]
async fn every_method_is_routed() {
    let client = TestServer::new().anonymous();
    assert!(client.user_id.is_empty() && client.device_id.is_empty());
    let path = "/_matrix/client/nonsense";
    let body = serde_json::json!({});
    for (status, _) in [
        client.put(path, body.clone()).await,
        client.post(path, body.clone()).await,
        client.delete(path, body).await,
    ] {
        assert_eq!(status, StatusCode::NOT_FOUND);
    }
    assert_eq!(client.server.server().app().env.now_ms(), crate::support::BEGAN_MS);
}
