//! `src/api/client/rendezvous.rs`

use std::time::Duration;

use aqueduct::config::RendezvousMode;
use axum::body::Body;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};

use crate::support::{TestClient, TestServer};

const OF_4108: &str = "/_matrix/client/unstable/org.matrix.msc4108/rendezvous";
const OF_4388: &str = "/_matrix/client/unstable/io.element.msc4388/rendezvous";

fn server(mode: RendezvousMode) -> TestServer {
    TestServer::with(|config| {
        config.rendezvous.mode = mode;
        config.server.public_base_url = "https://matrix.test.example/".to_owned();
    })
}

/// An answer with its header fields.
struct Answer {
    code: u16,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no {name} in {:?}", self.headers)).to_str().unwrap()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// A request without a token, with these header fields.
async fn ask(
    server: &TestServer,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Answer {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = server.send(request.body(Body::from(body.to_owned())).unwrap()).await;
    let (code, headers) = (response.status().as_u16(), response.headers().clone());
    let body = response.into_body().collect().await.unwrap().to_bytes().to_vec();
    Answer { code, headers, body }
}

const PLAIN: (&str, &str) = ("content-type", "text/plain");

#[tokio::test(start_paused = true)]
async fn two_devices_meet_as_clients_of_2024_do() {
    let server = server(RendezvousMode::Everybody);
    let opened = ask(&server, Method::POST, OF_4108, &[PLAIN], "").await;
    assert_eq!(opened.code, 201);
    let url = opened.json()["url"].as_str().unwrap().to_owned();
    let path = url.strip_prefix("https://matrix.test.example").unwrap();
    assert!(path.starts_with(OF_4108), "{url}");
    assert_eq!(opened.header("expires"), "Thu, 01 Jan 2026 00:05:00 GMT");
    assert_eq!(opened.header("last-modified"), "Thu, 01 Jan 2026 00:00:00 GMT");
    for (name, value) in [("cache-control", "no-store"), ("pragma", "no-cache")] {
        assert_eq!(opened.header(name), value);
    }
    let first = opened.header("etag").to_owned();
    assert!(first.starts_with('"') && first.ends_with('"') && first.len() > 10, "a strong tag: {first}");

    let looked = ask(&server, Method::GET, path, &[], "").await;
    assert_eq!(
        (looked.code, looked.header("etag"), looked.header("content-type")),
        (200, &*first, "text/plain")
    );
    assert_eq!(looked.header("x-content-type-options"), "nosniff");
    assert!(looked.body.is_empty());
    let again = ask(&server, Method::GET, path, &[("if-none-match", &first)], "").await;
    assert_eq!((again.code, again.header("etag"), again.body.len()), (304, &*first, 0));

    server.server().app().env.sleep(Duration::from_secs(2)).await;
    let written = ask(&server, Method::PUT, path, &[PLAIN, ("if-match", &first)], "héllo").await;
    assert_eq!(written.code, 202);
    let second = written.header("etag").to_owned();
    assert_ne!(second, first);
    assert_eq!(written.header("last-modified"), "Thu, 01 Jan 2026 00:00:02 GMT");
    assert_eq!(written.header("expires"), "Thu, 01 Jan 2026 00:05:00 GMT", "writing does not prolong it");
    let looked = ask(&server, Method::GET, path, &[("if-none-match", &first)], "").await;
    assert_eq!((looked.code, looked.header("etag"), &*looked.body), (200, &*second, "héllo".as_bytes()));

    let late = ask(&server, Method::PUT, path, &[PLAIN, ("if-match", &first)], "late").await;
    assert_eq!((late.code, late.header("etag")), (412, &*second));
    let said = late.json();
    assert_eq!(
        (&said["errcode"], &said["org.matrix.msc4108.errcode"]),
        (&json!("M_UNKNOWN"), &json!("M_CONCURRENT_WRITE"))
    );
    let looked = ask(&server, Method::GET, path, &[], "").await;
    assert_eq!(&*looked.body, "héllo".as_bytes());

    assert_eq!(ask(&server, Method::DELETE, path, &[], "").await.code, 204);
    for method in [Method::GET, Method::DELETE] {
        let gone = ask(&server, method, path, &[], "").await;
        assert_eq!((gone.code, &gone.json()["errcode"]), (404, &json!("M_NOT_FOUND")));
    }
    let gone = ask(&server, Method::PUT, path, &[PLAIN, ("if-match", &second)], "").await;
    assert_eq!((gone.code, &gone.json()["errcode"]), (404, &json!("M_NOT_FOUND")));
}

#[tokio::test(start_paused = true)]
async fn wrong_requests_of_2024_are_refused() {
    let server = server(RendezvousMode::Everybody);
    let opened =
        ask(&server, Method::POST, OF_4108, &[("content-type", "text/plain; charset=utf-8")], "x").await;
    assert_eq!(opened.code, 201);
    let url = opened.json()["url"].as_str().unwrap().to_owned();
    let path = url.strip_prefix("https://matrix.test.example").unwrap();
    let tag = opened.header("etag");
    let (large, json) = ("x".repeat(4_097), ("content-type", "application/json"));
    let nowhere = format!("{OF_4108}/nowhere");
    for (method, path, headers, body, code, errcode) in [
        (Method::POST, OF_4108, vec![], "x", 400, "M_MISSING_PARAM"),
        (Method::POST, OF_4108, vec![json], "x", 400, "M_INVALID_PARAM"),
        (Method::POST, OF_4108, vec![PLAIN], &*large, 413, "M_TOO_LARGE"),
        (Method::PUT, path, vec![PLAIN], "x", 400, "M_MISSING_PARAM"),
        (Method::PUT, path, vec![("if-match", tag)], "x", 400, "M_MISSING_PARAM"),
        (Method::PUT, path, vec![json, ("if-match", tag)], "x", 400, "M_INVALID_PARAM"),
        (Method::PUT, path, vec![PLAIN, ("if-match", "*")], "x", 400, "M_INVALID_PARAM"),
        (Method::PUT, path, vec![PLAIN, ("if-match", "W/\"x\"")], "x", 400, "M_INVALID_PARAM"),
        (Method::PUT, path, vec![PLAIN, ("if-match", "\"x\", \"y\"")], "x", 412, "M_UNKNOWN"),
        (Method::PUT, path, vec![PLAIN, ("if-match", tag)], &*large, 413, "M_TOO_LARGE"),
        (Method::PUT, &*nowhere, vec![PLAIN, ("if-match", tag)], "x", 404, "M_NOT_FOUND"),
        (Method::GET, path, vec![("sec-fetch-mode", "navigate")], "", 403, "M_FORBIDDEN"),
        (Method::GET, path, vec![("sec-fetch-dest", "iframe")], "", 403, "M_FORBIDDEN"),
    ] {
        let answer = ask(&server, method.clone(), path, &headers, body).await;
        assert_eq!(
            (answer.code, &answer.json()["errcode"]),
            (code, &json!(errcode)),
            "{method} {path} {headers:?}"
        );
    }
    let looked =
        ask(&server, Method::GET, path, &[("sec-fetch-mode", "cors"), ("sec-fetch-dest", "empty")], "").await;
    assert_eq!((looked.code, &*looked.body), (200, &b"x"[..]), "a script may, and nothing was written");
}

fn code((status, json): (StatusCode, Value)) -> (u16, String) {
    (status.as_u16(), json["errcode"].as_str().unwrap_or_default().to_owned())
}

async fn open(client: &TestClient, data: &str) -> (String, String) {
    let json = client.ok_post(OF_4388, json!({ "data": data })).await;
    assert_eq!(json["expires_in_ms"], 300_000);
    let text = |name: &str| json[name].as_str().unwrap().to_owned();
    (format!("{OF_4388}/{}", text("id")), text("sequence_token"))
}

#[tokio::test(start_paused = true)]
async fn two_devices_meet_as_the_newest_proposal_has_it() {
    let server = server(RendezvousMode::Users);
    let (alice, new) = (server.register("alice").await, server.anonymous());
    let (path, first) = open(&alice, "Hello from A").await;
    server.server().app().env.sleep(Duration::from_secs(1)).await;
    let looked = new.ok_get(&path).await;
    let expected = json!({ "data": "Hello from A", "sequence_token": first, "expires_in_ms": 299_000 });
    assert_eq!(looked, expected);
    let write = |token: &str, data: &str| json!({ "sequence_token": token, "data": data });
    let written = new.ok_put(&path, write(&first, "Hello \"from\" B")).await;
    let second = written["sequence_token"].as_str().unwrap();
    assert_ne!(second, first);
    // An answer that was lost is asked for again.
    assert_eq!(new.ok_put(&path, write(&first, "Hello \"from\" B")).await["sequence_token"], second);
    assert_eq!(alice.ok_get(&path).await["data"], "Hello \"from\" B");
    let late = alice.put(&path, write(&first, "late")).await;
    assert_eq!(code(late), (409, "IO_ELEMENT_MSC4388_CONCURRENT_WRITE".into()));
    let third = alice.ok_put(&path, write(second, "Hello \"from\" B")).await["sequence_token"].clone();
    assert_ne!(third, second, "the same data, sent anew, has another token");
    assert_eq!(new.ok_delete(&path, json!({})).await, json!({}));
    assert_eq!(code(new.delete(&path, json!({})).await), (404, "M_NOT_FOUND".into()));
    assert_eq!(code(alice.get(&path).await), (404, "M_NOT_FOUND".into()));
    assert_eq!(code(alice.put(&path, write(second, "x")).await), (404, "M_NOT_FOUND".into()));

    let (path, token) = open(&alice, "").await;
    let large = "x".repeat(4_097);
    for (body, expected) in [
        (json!({ "data": "x" }), (400, "M_MISSING_PARAM")),
        (json!({ "sequence_token": token }), (400, "M_MISSING_PARAM")),
        (json!({ "sequence_token": token, "data": {} }), (400, "M_BAD_JSON")),
        (write(&token, &large), (413, "M_TOO_LARGE")),
    ] {
        assert_eq!(code(new.put(&path, body).await), (expected.0, expected.1.to_owned()));
    }
    // 4,096 bytes that must all be escaped are no larger than that.
    new.ok_put(&path, write(&token, &"\u{1}".repeat(4_096))).await;
    assert_eq!(code(alice.post(OF_4388, json!({ "data": large })).await), (413, "M_TOO_LARGE".into()));
    let browsed = ask(&server, Method::GET, &path, &[("sec-fetch-dest", "document")], "").await;
    assert_eq!(browsed.code, 403);
    server.server().app().env.sleep(Duration::from_secs(300)).await;
    assert_eq!(code(new.get(&path).await), (404, "M_NOT_FOUND".into()), "it has ended by itself");
}

#[tokio::test(start_paused = true)]
async fn the_setting_says_who_may_begin() {
    let told = |answer: (StatusCode, Value)| (answer.0.as_u16(), answer.1["create_available"].clone());
    for (mode, of_user, of_nobody, is_2024) in [
        (RendezvousMode::Off, (404, Value::Null), (404, Value::Null), false),
        (RendezvousMode::Users, (200, json!(true)), (200, json!(false)), false),
        (RendezvousMode::Everybody, (200, json!(true)), (200, json!(true)), true),
    ] {
        let server = server(mode);
        let (alice, nobody) = (server.register("alice").await, server.anonymous());
        assert_eq!(told(alice.get(OF_4388).await), of_user, "{mode:?}");
        assert_eq!(told(nobody.get(OF_4388).await), of_nobody, "{mode:?}");
        let versions = nobody.ok_get("/_matrix/client/versions").await;
        assert_eq!(versions["unstable_features"]["org.matrix.msc4108"], is_2024);
        let opened = ask(&server, Method::POST, OF_4108, &[PLAIN], "x").await;
        assert_eq!(opened.code, if is_2024 { 201 } else { 404 });
        let may = |(_, may): &(u16, Value)| if *may == true { 200 } else { 403 };
        let expected =
            if mode == RendezvousMode::Off { [404, 404] } else { [may(&of_user), may(&of_nobody)] };
        let data = json!({ "data": "x" });
        let begun = [alice.post(OF_4388, data.clone()).await, nobody.post(OF_4388, data).await];
        assert_eq!(begun.map(|(status, _)| status.as_u16()), expected, "{mode:?}");
    }
    let off = server(RendezvousMode::Off);
    for path in [format!("{OF_4108}/x"), format!("{OF_4388}/x")] {
        assert_eq!(code(off.anonymous().get(&path).await), (404, "M_UNRECOGNIZED".into()), "{path}");
        assert_eq!(code(off.anonymous().delete(&path, json!({})).await), (404, "M_UNRECOGNIZED".into()));
    }
}

#[tokio::test(start_paused = true)]
async fn sessions_are_bounded_for_each_user_and_address() {
    let server = server(RendezvousMode::Everybody);
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    for _ in 0..10 {
        open(&alice, "x").await;
        assert_eq!(ask(&server, Method::POST, OF_4108, &[PLAIN], "x").await.code, 201);
    }
    let (status, json) = alice.post(OF_4388, json!({ "data": "x" })).await;
    assert_eq!((status.as_u16(), &json["errcode"]), (429, &json!("M_LIMIT_EXCEEDED")));
    assert_eq!(json["retry_after_ms"], 300_000);
    let one_more = ask(&server, Method::POST, OF_4108, &[PLAIN], "x").await;
    assert_eq!((one_more.code, one_more.header("retry-after")), (429, "300"));
    open(&bob, "x").await;
    let request = Request::builder().method(Method::POST).uri(OF_4108).header(PLAIN.0, PLAIN.1);
    let elsewhere = server.send_from([198, 51, 100, 7], request.body(Body::from("x")).unwrap()).await;
    assert_eq!(elsewhere.status().as_u16(), 201);
    server.server().app().env.sleep(Duration::from_secs(300)).await;
    open(&alice, "x").await;
}
