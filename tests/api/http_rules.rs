//! Rules that hold for every endpoint: for unknown paths and methods, browsers, tokens.

use axum::body::Body;
use http::{Method, Request, StatusCode};

use crate::support::TestServer;

#[tokio::test(start_paused = true)]
async fn unknown_paths_and_methods_are_unrecognized() {
    let server = TestServer::new();
    for path in ["/_matrix/client/v3/nonsense", "/_matrix/client/%ff", "//"] {
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

/// The paths of every API are known, also of those that come later: a wrong method is told from a wrong path.
#[tokio::test(start_paused = true)]
async fn paths_that_are_not_served_yet_are_known() {
    let server = TestServer::new();
    for (method, path, status) in [
        (Method::PUT, "/_matrix/client/v3/login", 405),
        (Method::GET, "/_matrix/federation/v1/nowhere", 404),
        (Method::GET, "/_matrix/federation/v1/version/more", 404),
        (Method::PUT, "/_matrix/federation/v1/version", 405),
        (Method::GET, "/_matrix/federation/v1/send/x", 405),
        (Method::PUT, "/_matrix/key/v2/query", 405),
        (Method::PUT, "/_matrix/key/v2/query/", 405),
        (Method::GET, "/_matrix/key/v2/nowhere", 404),
        (Method::PATCH, "/_matrix/media/v3/upload", 405),
        (Method::POST, "/_matrix/client/v3/account/3pid", 404),
        (Method::GET, "/_matrix/media/v3/nowhere", 404),
        (Method::GET, "/_matrix/client/v3/voip/turnServer", 404),
        (Method::PATCH, "/_matrix/client/v3/voip/turnServer", 405),
        (Method::DELETE, "/_matrix/client/v3/rooms/!r:x/context/$e", 405),
        (Method::POST, "/.well-known/matrix/client", 405),
    ] {
        let (found, json) = server.raw(method.clone(), path, None, "{}").await;
        let expected = (status, Some("M_UNRECOGNIZED"));
        assert_eq!((found.as_u16(), json["errcode"].as_str()), expected, "{method} {path}");
    }
}

/// The specification asks for these headers on all answers, so that scripts see also why they were refused.
#[tokio::test(start_paused = true)]
async fn browsers_are_allowed_everywhere() {
    let server = TestServer::with(|config| {
        config.limits.rate_limits = true;
        config.limits.login = aqueduct::config::Bucket { per_second: 0.001, burst: 1 };
    });
    let large = "x".repeat(1 << 20);
    for (method, path, body, status) in [
        (Method::GET, "/_matrix/client/versions", "", 200),
        (Method::OPTIONS, "/_matrix/client/v3/sync", "", 200),
        (Method::OPTIONS, "/_matrix/client/v3/login", "", 200),
        (Method::OPTIONS, "/nonsense", "", 200),
        (Method::POST, "/_matrix/client/v3/login", "{", 400),
        (Method::POST, "/_matrix/client/v3/login", "{}", 429),
        (Method::GET, "/_matrix/client/v3/sync", "", 401),
        (Method::GET, "/nonsense", "", 404),
        (Method::GET, "/_matrix/client/v3/voip/turnServer", "", 404),
        (Method::PATCH, "/_matrix/client/versions", "", 405),
        (Method::POST, "/_matrix/client/v3/register", &large, 413),
    ] {
        let request = Request::builder().method(&method).uri(path).body(Body::from(body.to_owned())).unwrap();
        let response = server.send(request).await;
        assert_eq!(response.status().as_u16(), status, "{method} {path}");
        let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
        assert_eq!(header("access-control-allow-origin"), "*", "{method} {path}");
        assert_eq!(header("access-control-allow-methods"), "GET, POST, PUT, DELETE, OPTIONS");
        for name in ["X-Requested-With", "Content-Type", "Authorization", "If-Match", "If-None-Match"] {
            assert!(header("access-control-allow-headers").contains(name), "{method} {path}");
        }
        for name in ["Retry-After", "Content-Disposition", "ETag"] {
            assert!(header("access-control-expose-headers").contains(name), "{method} {path}");
        }
        if status == 429 {
            assert!(header("retry-after").parse::<u64>().unwrap() > 0);
        }
    }
}

/// People who open the address in a browser see a page that names the server.
#[tokio::test(start_paused = true)]
async fn the_page_at_the_address_says_what_this_is() {
    let server = TestServer::new();
    let request = Request::builder().uri("/").body(Body::empty()).unwrap();
    let response = server.send(request).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert!(
        response.headers()["content-security-policy"].to_str().unwrap().starts_with("default-src 'none'")
    );
    let page = axum::body::to_bytes(response.into_body(), 1 << 16).await.unwrap();
    let page = String::from_utf8(page.to_vec()).unwrap();
    assert!(page.contains("test.example") && page.contains("homeserver"), "{page}");
    assert!(!page.contains("<script") && !page.contains("src="), "{page}");
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

/// A login in which everything is right but the password.
const LOGIN: &str =
    r#"{"type":"m.login.password","identifier":{"type":"m.id.user","user":"nobody"},"password":"x"}"#;

#[tokio::test(start_paused = true)]
async fn bodies_that_are_wrong_are_refused_for_what_they_are() {
    let server = TestServer::new();
    let nested = |levels: usize| {
        format!(r#"{{"type":"m.login.password","x":{}{}}}"#, "[".repeat(levels - 1), "]".repeat(levels - 1))
    };
    for (body, status, errcode) in [
        ("{".to_owned(), 400, "M_NOT_JSON"),
        ("nonsense".to_owned(), 400, "M_NOT_JSON"),
        (String::new(), 400, "M_MISSING_PARAM"),
        (format!("{LOGIN}}}"), 400, "M_NOT_JSON"),
        ("[]".to_owned(), 400, "M_BAD_JSON"),
        ("7".to_owned(), 400, "M_BAD_JSON"),
        (r#"{"type":7}"#.to_owned(), 400, "M_BAD_JSON"),
        (r#"{"type":"m.login.token"}"#.to_owned(), 400, "M_MISSING_PARAM"),
        (nested(129), 400, "M_BAD_JSON"),
        (format!("{{\"x\":\"{}\"}}", "x".repeat(16 << 20)), 413, "M_TOO_LARGE"),
    ] {
        let shown: String = body.chars().take(60).collect();
        let (found, json) = server.raw(Method::POST, "/_matrix/client/v3/login", None, body).await;
        assert_eq!((found.as_u16(), json["errcode"].as_str()), (status, Some(errcode)), "{shown}: {json}");
    }
    let (_, json) = server.raw(Method::POST, "/_matrix/client/v3/login", None, nested(100)).await;
    assert_ne!(json["errcode"], "M_NOT_JSON", "a hundred levels are read: {json}");
    assert!(!json["error"].as_str().unwrap().contains("nested"), "{json}");
    let body = vec![b'{', b'"', 0xff, b'"', b':', b'1', b'}'];
    let (_, json) = server.raw(Method::POST, "/_matrix/client/v3/login", None, body).await;
    assert_eq!(json["errcode"], "M_NOT_JSON");
}

#[tokio::test(start_paused = true)]
async fn an_empty_body_says_what_an_empty_object_says() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let path = "/_matrix/client/v3/createRoom";
    let (status, json) = server.raw(Method::POST, path, alice.token.as_deref(), Body::empty()).await;
    assert_eq!(status, StatusCode::OK, "{json}");
}

#[tokio::test(start_paused = true)]
async fn no_content_type_does_harm() {
    let server = TestServer::new();
    for content_type in
        [None, Some("text/plain"), Some("nonsense"), Some("application/x-www-form-urlencoded")]
    {
        let mut request = Request::builder().method(Method::POST).uri("/_matrix/client/v3/login");
        if let Some(content_type) = content_type {
            request = request.header("content-type", content_type);
        }
        let response = server.send(request.body(LOGIN.into()).unwrap()).await;
        assert_eq!(response.status(), StatusCode::FORBIDDEN, "{content_type:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_comes_too_fast_is_told_how_long_to_wait() {
    let server = TestServer::with(|config| {
        config.limits.rate_limits = true;
        config.limits.login = aqueduct::config::Bucket { per_second: 0.5, burst: 2 };
    });
    let log_in = || async {
        let request = Request::builder().method(Method::POST).uri("/_matrix/client/v3/login");
        server.send(request.body(LOGIN.into()).unwrap()).await
    };
    for _ in 0..2 {
        assert_eq!(log_in().await.status(), StatusCode::FORBIDDEN);
    }
    let response = log_in().await;
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(response.headers()["retry-after"], "2");
    let (_, json) = server.raw(Method::POST, "/_matrix/client/v3/login", None, LOGIN).await;
    assert_eq!(json["errcode"], "M_LIMIT_EXCEEDED");
    let wait_ms = json["retry_after_ms"].as_u64().unwrap();
    assert!((1900..=2000).contains(&wait_ms), "{json}");
    server.server().app().env.sleep(std::time::Duration::from_millis(wait_ms)).await;
    assert_eq!(log_in().await.status(), StatusCode::FORBIDDEN);
    assert!(server.server().app().metrics.text().contains("http_rate_limited_total"));
}

#[tokio::test(start_paused = true)]
async fn parameters_in_paths_are_decoded_once() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    for name in [
        "/_matrix/client/v3/profile/@alice:test.example",
        "/_matrix/client/v3/profile/%40alice%3Atest.example",
    ] {
        let (_, json) = alice.get(name).await;
        assert_ne!(json["errcode"], "M_INVALID_PARAM", "{name}: {json}");
    }
}

/// JSON that is kept as it came is given back to every reader. With one number like this in it, clients could not read on.
#[tokio::test(start_paused = true)]
async fn nothing_is_kept_that_readers_of_json_refuse() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let path = "/_matrix/client/v3/user/@alice:test.example/account_data/x";
    for body in [r#"{"a":-1e999}"#, r#"{"a":"\ud800"}"#, r#"{"a":["\udc00\ud800"]}"#] {
        let (status, json) = server.raw(Method::PUT, path, alice.token.as_deref(), body).await;
        assert_eq!((status.as_u16(), json["errcode"].as_str()), (400, Some("M_BAD_JSON")), "{body}");
    }
    let (status, _) = server.raw(Method::PUT, path, alice.token.as_deref(), r#"{"a":"\ud83d\ude00"}"#).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(alice.get(path).await.1["a"], "😀");
}
