//! Files that users upload and download.

use std::{convert::Infallible, path::Path, time::Duration};

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, Method, Request, StatusCode, header};
use http_body_util::BodyExt;
use serde_json::{Value, json};

use crate::support::{TestClient, TestServer};

/// An answer that need not be JSON.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) fields: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn field(&self, name: &str) -> &str {
        self.fields.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// The status and the code of a refusal.
    pub(crate) fn refusal(&self) -> (u16, String) {
        (self.status.as_u16(), self.json()["errcode"].as_str().unwrap_or_default().to_owned())
    }
}

impl TestClient {
    /// Sends any request, with these header fields.
    pub(crate) async fn ask(
        &self,
        method: Method,
        path: &str,
        fields: &[(&str, &str)],
        body: impl Into<Body>,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let response = self.server.send(request.body(body.into()).unwrap()).await;
        let (head, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Answer { status: head.status, fields: head.headers, body }
    }

    /// Uploads a file, and answers its server and media id as they stand in paths.
    pub(crate) async fn upload(&self, content_type: &str, bytes: impl Into<Body>) -> String {
        let path = "/_matrix/media/v3/upload?filename=a%20file.bin";
        let answer = self.ask(Method::POST, path, &[("content-type", content_type)], bytes).await;
        assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
        let uri = answer.json()["content_uri"].as_str().unwrap().to_owned();
        uri.strip_prefix("mxc://").unwrap().to_owned()
    }

    /// Downloads a file with these header fields.
    pub(crate) async fn download(&self, item: &str, fields: &[(&str, &str)]) -> Answer {
        let path = format!("/_matrix/client/v1/media/download/{item}");
        self.ask(Method::GET, &path, fields, Body::empty()).await
    }
}

/// The files below a directory, each with its length.
pub(crate) fn files(below: &Path) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    let mut open = vec![below.to_owned()];
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.is_file() {
            let name = path.strip_prefix(below).unwrap().to_str().unwrap().to_owned();
            found.push((name, path.metadata().unwrap().len()));
        }
    }
    found.sort();
    found
}

#[tokio::test(start_paused = true)]
async fn what_is_uploaded_is_downloaded_as_it_was() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let config = alice.ok_get("/_matrix/client/v1/media/config").await;
    assert_eq!(config, json!({ "m.upload.size": 100 << 20 }));
    assert_eq!(alice.ok_get("/_matrix/media/v3/config").await, config);
    let item = alice.upload("image/png", "not really a picture").await;
    let id = item.strip_prefix("test.example/").unwrap();
    assert!(id.len() >= 22 && id.bytes().all(|it| it.is_ascii_alphanumeric()), "{id} can be guessed");
    let answer = bob.download(&item, &[]).await;
    assert_eq!((answer.status, &answer.body[..]), (StatusCode::OK, &b"not really a picture"[..]));
    for (name, value) in [
        ("content-type", "image/png"),
        ("content-length", "20"),
        ("content-disposition", "inline; filename=\"a file.bin\""),
        ("cross-origin-resource-policy", "cross-origin"),
        ("x-content-type-options", "nosniff"),
        ("accept-ranges", "bytes"),
        (
            "content-security-policy",
            "sandbox; default-src 'none'; script-src 'none'; plugin-types application/pdf; style-src 'unsafe-inline'; object-src 'self';",
        ),
    ] {
        assert_eq!(answer.field(name), value, "{name}");
    }
    assert!(answer.field("cache-control").contains("immutable"));
    let named = bob.download(&format!("{item}/%C3%A9.png"), &[]).await;
    assert_eq!(named.field("content-disposition"), "inline; filename*=utf-8''%C3%A9.png");
    // The head says the same, and nothing follows.
    let path = format!("/_matrix/client/v1/media/download/{item}");
    let head = bob.ask(Method::HEAD, &path, &[], Body::empty()).await;
    assert_eq!((head.status, head.field("content-length"), head.body.len()), (StatusCode::OK, "20", 0));
    assert_eq!(head.field("etag"), answer.field("etag"));
    let anybody = server.anonymous().download(&item, &[]).await;
    assert_eq!(anybody.refusal(), (401, "M_MISSING_TOKEN".to_owned()));
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn whoever_has_a_copy_is_not_sent_another_one() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let item = alice.upload("text/plain", "0123456789").await;
    let tag = alice.download(&item, &[]).await.field("etag").to_owned();
    for same in [tag.clone(), format!("\"other\", W/{tag}"), "*".to_owned()] {
        let answer = alice.download(&item, &[("if-none-match", &same)]).await;
        assert_eq!((answer.status, answer.body.len()), (StatusCode::NOT_MODIFIED, 0), "{same}");
        assert_eq!(answer.field("etag"), tag);
    }
    assert_eq!(alice.download(&item, &[("if-none-match", "\"other\"")]).await.status, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn a_part_of_a_file_is_sent_to_whoever_seeks_in_it() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let item = alice.upload("video/mp4", "0123456789").await;
    let tag = alice.download(&item, &[]).await.field("etag").to_owned();
    for (range, expected, said) in [
        ("bytes=2-4", "234", "bytes 2-4/10"),
        ("bytes=7-", "789", "bytes 7-9/10"),
        ("bytes=-2", "89", "bytes 8-9/10"),
        ("bytes=0-999", "0123456789", "bytes 0-9/10"),
    ] {
        for fields in [&[("range", range)][..], &[("range", range), ("if-range", &tag)]] {
            let answer = alice.download(&item, fields).await;
            assert_eq!(
                (answer.status, &answer.body[..]),
                (StatusCode::PARTIAL_CONTENT, expected.as_bytes()),
                "{range}"
            );
            assert_eq!(answer.field("content-range"), said);
            assert_eq!(answer.field("content-length"), expected.len().to_string());
        }
    }
    let outside = alice.download(&item, &[("range", "bytes=10-")]).await;
    assert_eq!(
        (outside.status, outside.field("content-range")),
        (StatusCode::RANGE_NOT_SATISFIABLE, "bytes */10")
    );
    for fields in [
        &[("range", "bytes=1-2,4-5")][..],
        &[("range", "lines=1-2")],
        &[("range", "bytes=1-2"), ("if-range", "\"another version\"")],
        &[("range", "bytes=1-2"), ("if-range", "Sun, 06 Nov 1994 08:49:37 GMT")],
    ] {
        let answer = alice.download(&item, fields).await;
        assert_eq!((answer.status, answer.body.len()), (StatusCode::OK, 10), "{fields:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_that_could_run_is_shown_in_place() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    for content_type in
        ["text/html", "image/svg+xml", "application/xhtml+xml", "TEXT/HTML; charset=utf-8", "application/pdf"]
    {
        let item = alice.upload(content_type, "<script>alert(1)</script>").await;
        let answer = alice.download(&item, &[]).await;
        assert!(answer.field("content-disposition").starts_with("attachment"), "{content_type}");
        assert_eq!(answer.field("content-type"), content_type);
        assert!(answer.field("content-security-policy").starts_with("sandbox; default-src 'none'"));
        assert_eq!(answer.field("x-content-type-options"), "nosniff");
    }
    // A type that is none stands for bytes of any kind.
    let item = alice.upload("nonsense", "x").await;
    let answer = alice.download(&item, &[]).await;
    assert_eq!(answer.field("content-type"), "application/octet-stream");
    assert!(answer.field("content-disposition").starts_with("attachment"));
}

#[tokio::test(start_paused = true)]
async fn names_and_ids_lead_nowhere() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let item = alice.upload("text/plain", "x").await;
    std::fs::write(server.media().join("secret"), "secret").unwrap();
    for wrong in [
        "test.example/..%2F..%2Fsecret",
        "test.example/%2e%2e",
        "test.example/a.b",
        "test.example/%00",
        "test.example/nobody_made_this",
        "..%2F..%2Fetc/passwd",
        "127.0.0.1%2Fx/y",
        "%20/x",
    ] {
        assert_eq!(alice.download(wrong, &[]).await.refusal(), (404, "M_NOT_FOUND".to_owned()), "{wrong}");
    }
    let named = alice.download(&format!("{item}/..%2F..%2Fx%0D%0ASet-Cookie:%20a"), &[]).await;
    assert_eq!(named.status, StatusCode::OK);
    assert_eq!(named.field("content-disposition"), "inline; filename=\"xSet-Cookie: a\"");
    assert!(named.fields.get("set-cookie").is_none());
    let long = format!("/_matrix/media/v3/upload?filename={}", "a".repeat(1025));
    let answer = alice.ask(Method::POST, &long, &[], "x").await;
    assert_eq!(answer.refusal(), (400, "M_INVALID_PARAM".to_owned()));
    for (query, code) in
        [("timeout_ms=-1", 400), ("timeout_ms=soon", 400), ("timeout_ms=99999999999999", 200)]
    {
        let answer = alice.download(&format!("{item}?{query}"), &[]).await;
        assert_eq!(answer.status.as_u16(), code, "{query}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_upload_within_its_bounds_is_kept_and_none_beyond() {
    let server = TestServer::with(|config| config.media.upload_bytes_max = aqueduct::config::Size::kib(64));
    let alice = server.register("alice").await;
    let path = "/_matrix/media/v3/upload";
    let fits = vec![7_u8; 64 << 10];
    alice.upload("a/b", fits.clone()).await;
    let kept = files(server.media());
    let beyond = [fits, vec![7]].concat();
    let answer = alice.ask(Method::POST, path, &[], beyond.clone()).await;
    assert_eq!(answer.refusal(), (413, "M_TOO_LARGE".to_owned()));
    // Neither does one pass that says nothing of its length, or never ends.
    let endless =
        Body::from_stream(stream::repeat_with(|| Ok::<_, Infallible>(Bytes::from_static(&[1; 1024]))));
    let answer = alice.ask(Method::POST, path, &[], endless).await;
    assert_eq!(answer.refusal(), (413, "M_TOO_LARGE".to_owned()));
    let said = [("content-length", "18446744073709551615")];
    let answer = alice
        .ask(Method::POST, path, &said, Body::from_stream(stream::empty::<Result<Bytes, Infallible>>()))
        .await;
    assert_eq!(answer.refusal(), (413, "M_TOO_LARGE".to_owned()));
    server.server().app().env.sleep(Duration::from_secs(1)).await;
    assert_eq!(files(server.media()), kept, "nothing is left of what was refused");
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_breaks_off_or_lies_about_its_length_leaves_nothing() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let path = "/_matrix/media/v3/upload";
    let pieces = |last: Result<Bytes, std::io::Error>| {
        Body::from_stream(stream::iter([Ok(Bytes::from_static(b"begun")), last]))
    };
    let broken = pieces(Err(std::io::Error::other("gone")));
    assert_eq!(alice.ask(Method::POST, path, &[], broken).await.refusal(), (400, "M_UNKNOWN".to_owned()));
    for length in ["4", "6", "5000000"] {
        let lies = pieces(Ok(Bytes::new()));
        let answer = alice.ask(Method::POST, path, &[("content-length", length)], lies).await;
        assert_eq!(answer.refusal(), (400, "M_UNKNOWN".to_owned()), "{length}");
    }
    // A client that sends nothing any more is given up.
    let stalls = Body::from_stream(stream::pending::<Result<Bytes, Infallible>>());
    assert_eq!(alice.ask(Method::POST, path, &[], stalls).await.refusal(), (408, "M_UNKNOWN".to_owned()));
    server.server().app().env.sleep(Duration::from_secs(1)).await;
    assert_eq!(files(server.media()), []);
    let empty = alice.upload("a/b", Body::empty()).await;
    assert_eq!(alice.download(&empty, &[]).await.body.len(), 0);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_uri_may_be_made_before_its_upload() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let made = alice.ok_post("/_matrix/media/v1/create", json!({})).await;
    let expires_ms = made["unused_expires_at"].as_u64().unwrap();
    assert!(expires_ms > crate::support::BEGAN_MS + 23 * 3_600_000);
    let item = made["content_uri"].as_str().unwrap().strip_prefix("mxc://").unwrap().to_owned();
    let early = bob.download(&format!("{item}?timeout_ms=100"), &[]).await;
    assert_eq!(early.refusal(), (504, "M_NOT_YET_UPLOADED".to_owned()));
    let put = format!("/_matrix/media/v3/upload/{item}");
    assert_eq!(bob.ask(Method::PUT, &put, &[], "his").await.refusal(), (403, "M_FORBIDDEN".to_owned()));
    // A user who waits is given it as soon as it is there.
    let (waiting, awaited) = (bob.clone(), item.clone());
    let waits = server.begin(async move { waiting.download(&awaited, &[]).await });
    server.server().app().env.sleep(Duration::from_secs(3)).await;
    let answer = alice.ask(Method::PUT, &put, &[("content-type", "text/plain")], "hers").await;
    assert_eq!((answer.status, answer.json()), (StatusCode::OK, json!({})));
    let answer = waits.await.unwrap();
    assert_eq!((answer.status, &answer.body[..]), (StatusCode::OK, &b"hers"[..]));
    assert_eq!(answer.field("content-disposition"), "inline");
    let again = alice.ask(Method::PUT, &put, &[], "other").await;
    assert_eq!(again.refusal(), (409, "M_CANNOT_OVERWRITE_MEDIA".to_owned()));
    for unknown in ["test.example/nobody", "other.example/nobody", "test.example/a.b"] {
        let answer = alice.ask(Method::PUT, &format!("/_matrix/media/v3/upload/{unknown}"), &[], "x").await;
        assert_eq!(answer.refusal(), (404, "M_NOT_FOUND".to_owned()), "{unknown}");
    }
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn uris_without_an_upload_are_bounded_and_end() {
    let server = TestServer::with(|config| {
        (config.media.pending_uploads_max, config.media.pending_upload_hours) = (2, 1);
    });
    let alice = server.register("alice").await;
    let mut items = Vec::new();
    for _ in 0..2 {
        let made = alice.ok_post("/_matrix/media/v1/create", json!({})).await;
        items.push(made["content_uri"].as_str().unwrap().strip_prefix("mxc://").unwrap().to_owned());
    }
    let (status, json) = alice.post("/_matrix/media/v1/create", json!({})).await;
    assert_eq!((status.as_u16(), &json["errcode"]), (429, &json!("M_LIMIT_EXCEEDED")));
    // One that was uploaded to makes room for another.
    let put = format!("/_matrix/media/v3/upload/{}", items[0]);
    assert_eq!(alice.ask(Method::PUT, &put, &[], "x").await.status, StatusCode::OK);
    alice.ok_post("/_matrix/media/v1/create", json!({})).await;
    server.server().app().env.sleep(Duration::from_secs(2 * 3600)).await;
    let put = format!("/_matrix/media/v3/upload/{}", items[1]);
    assert_eq!(alice.ask(Method::PUT, &put, &[], "x").await.refusal(), (404, "M_NOT_FOUND".to_owned()));
    assert_eq!(alice.download(&items[1], &[]).await.refusal(), (404, "M_NOT_FOUND".to_owned()));
    assert_eq!(alice.download(&items[0], &[]).await.status, StatusCode::OK);
    for _ in 0..2 {
        alice.ok_post("/_matrix/media/v1/create", json!({})).await;
    }
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn the_old_endpoints_give_only_what_came_while_they_were_open() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let item = alice.upload("text/plain", "closed").await;
    let anybody = server.anonymous();
    let old = |item: &str| format!("/_matrix/media/v3/download/{item}");
    for path in [old(&item), format!("{}/name", old(&item)), old(&item).replace("v3", "r0")] {
        let answer = anybody.ask(Method::GET, &path, &[], Body::empty()).await;
        assert_eq!(answer.refusal(), (404, "M_NOT_FOUND".to_owned()), "{path}");
    }
    let open = TestServer::with(|config| config.media.unauthenticated = true);
    let alice = open.register("alice").await;
    let item = alice.upload("text/plain", "open").await;
    for path in [old(&item), format!("{}/name", old(&item)), old(&item).replace("v3", "r0")] {
        let answer = open.anonymous().ask(Method::GET, &path, &[], Body::empty()).await;
        assert_eq!((answer.status, &answer.body[..]), (StatusCode::OK, &b"open"[..]), "{path}");
    }
    // Once they are closed, it is still given.
    let closed = open.killed(usize::MAX);
    let answer = closed.anonymous().ask(Method::GET, &old(&item), &[], Body::empty()).await;
    assert_eq!(&answer.body[..], b"open");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nobody_gets_beyond_a_quota_by_sending_many_files_at_once() {
    let server = TestServer::real(|config| {
        config.media.user_bytes_max = aqueduct::config::Size::kib(100);
        config.media.server_bytes_max = aqueduct::config::Size::kib(150);
    });
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let send = |client: &TestClient, number: u8| {
        let (client, bytes) = (client.clone(), vec![number; 30 << 10]);
        server.begin(async move {
            client.ask(Method::POST, "/_matrix/media/v3/upload", &[], bytes).await.refusal()
        })
    };
    let all: Vec<_> = (0..12).map(|number| send(&alice, number)).collect();
    let mut kept = 0;
    for one in all {
        match one.await.unwrap() {
            (200, _) => kept += 1,
            (403, code) => assert_eq!(code, "M_FORBIDDEN"),
            // An address holds no more than its share of the places.
            other => assert_eq!(other, (429, "M_LIMIT_EXCEEDED".to_owned())),
        }
    }
    assert!((1..=3).contains(&kept), "{kept} files of 30 KiB are within 100 KiB");
    for number in 20..22 {
        while send(&alice, number).await.unwrap().0 == 429 {}
    }
    let mut of_bob = 0;
    for number in 40..44 {
        of_bob += usize::from(send(&bob, number).await.unwrap().0 == 200);
    }
    assert_eq!(of_bob, 2, "150 KiB have room for five");
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn the_same_bytes_are_stored_once() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let first = alice.upload("text/plain", "the same").await;
    let second = bob.upload("text/html", "the same").await;
    assert_ne!(first, second);
    let kept = files(server.media());
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert_eq!(alice.download(&first, &[]).await.field("content-type"), "text/plain");
    assert_eq!(alice.download(&second, &[]).await.field("content-type"), "text/html");
    server.assert_whole();
}
