//! Files that go from one server to another.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use aqueduct::{
    config::Size,
    store::{Durability, Engine, Store},
};
use axum::body::Body;
use bytes::Bytes;
use federation::{
    ports,
    testing::{Answered, Arrived, Net, Weather, bytes, json},
};
use futures_util::{StreamExt, stream};
use http::{Method, StatusCode};
use http_body_util::BodyExt;

use crate::{
    media::files,
    support::{
        BEGAN_MS, TestClient, TestServer,
        federated::Federated,
        network::{Peer, doors},
    },
};

#[tokio::test(start_paused = true)]
async fn a_file_of_another_server_is_fetched_once_and_kept() {
    let servers = Federated::new(&["a.example", "b.example"]);
    let (alice, bob) = (servers.server(0).register("alice").await, servers.server(1).register("bob").await);
    let item = alice.upload("text/plain", "from afar").await;
    for _ in 0..2 {
        let answer = bob.download(&item, &[]).await;
        assert_eq!((answer.status, &answer.body[..]), (StatusCode::OK, &b"from afar"[..]));
        assert_eq!(answer.field("content-type"), "text/plain");
        assert_eq!(answer.field("content-disposition"), "inline; filename=\"a file.bin\"");
    }
    let asked = servers.net.take_arrived().into_iter().filter(|it| it.contains("media/download")).count();
    assert_eq!(asked, 1);
    // It is still there when its server is not.
    servers.weather(0, Weather::Refuses, Duration::ZERO);
    assert_eq!(bob.download(&item, &[]).await.status, StatusCode::OK);
    let unknown = bob.download("a.example/nobody", &[]).await;
    assert_eq!(unknown.refusal(), (502, "M_UNKNOWN".to_owned()));
    servers.server(1).assert_whole();
}

#[tokio::test(start_paused = true)]
async fn many_who_ask_at_once_share_one_fetch() {
    let servers = Federated::new(&["a.example", "b.example"]);
    let (alice, bob) = (servers.server(0).register("alice").await, servers.server(1).register("bob").await);
    let item = alice.upload("text/plain", "from afar").await;
    servers.weather(0, Weather::Fair, Duration::from_secs(2));
    let asking: Vec<_> = (0..6)
        .map(|_| {
            let (bob, item) = (bob.clone(), item.clone());
            servers.server(1).begin(async move { bob.download(&item, &[]).await.status })
        })
        .collect();
    for asked in asking {
        assert_eq!(asked.await.unwrap(), StatusCode::OK);
    }
    let asked = servers.net.take_arrived().into_iter().filter(|it| it.contains("media/download")).count();
    assert_eq!(asked, 1);
}

#[tokio::test(start_paused = true)]
async fn what_its_server_does_not_give_is_told_as_it_is() {
    let servers = Federated::new(&["a.example", "b.example"]);
    let (alice, bob) = (servers.server(0).register("alice").await, servers.server(1).register("bob").await);
    assert_eq!(bob.download("a.example/nobody", &[]).await.refusal(), (404, "M_NOT_FOUND".to_owned()));
    let made = alice.ok_post("/_matrix/media/v1/create", serde_json::json!({})).await;
    let item = made["content_uri"].as_str().unwrap().strip_prefix("mxc://").unwrap().to_owned();
    let early = bob.download(&format!("{item}?timeout_ms=50"), &[]).await;
    assert_eq!(early.refusal(), (504, "M_NOT_YET_UPLOADED".to_owned()));
    let put = format!("/_matrix/media/v3/upload/{item}");
    assert_eq!(alice.ask(Method::PUT, &put, &[], "late").await.status, StatusCode::OK);
    assert_eq!(&bob.download(&item, &[]).await.body[..], b"late");
    // A request that must not have it fetched is not given it, and neither is anybody over the closed endpoints.
    let other = alice.upload("text/plain", "other").await;
    let old = format!("/_matrix/media/v3/download/{other}");
    assert_eq!(bob.ask(Method::GET, &old, &[], Body::empty()).await.refusal().0, 404);
    let open = Federated::with(&["c.example", "d.example"], |config| config.media.unauthenticated = true);
    let carol = open.server(0).register("carol").await;
    let item = carol.upload("text/plain", "open").await;
    let old = format!("/_matrix/media/v3/download/{item}");
    let anybody = open.server(1).anonymous();
    let kept_back = anybody.ask(Method::GET, &format!("{old}?allow_remote=false"), &[], Body::empty()).await;
    assert_eq!(kept_back.refusal(), (404, "M_NOT_FOUND".to_owned()));
    assert_eq!(&anybody.ask(Method::GET, &old, &[], Body::empty()).await.body[..], b"open");
}

#[tokio::test(start_paused = true)]
async fn thumbnails_of_files_of_other_servers_are_made_here() {
    let servers = Federated::new(&["a.example", "b.example"]);
    let (alice, bob) = (servers.server(0).register("alice").await, servers.server(1).register("bob").await);
    let mut picture = std::io::Cursor::new(Vec::new());
    let image = image::DynamicImage::from(image::RgbImage::new(300, 300));
    image.write_to(&mut picture, image::ImageFormat::Png).unwrap();
    let item = alice.upload("image/png", picture.into_inner()).await;
    let path = format!("/_matrix/client/v1/media/thumbnail/{item}?width=32&height=32");
    let answer = bob.ask(Method::GET, &path, &[], Body::empty()).await;
    let small = image::load_from_memory(&answer.body).unwrap();
    assert_eq!((small.width(), small.height()), (32, 32));
    servers.server(1).assert_whole();
}

#[tokio::test(start_paused = true)]
async fn other_servers_are_given_files_of_this_one_alone() {
    let net = Net::new(1);
    let store = Store::open(Engine::Memory(Default::default()), Durability::Fsync).unwrap();
    let server = TestServer::start(doors(&net), store, |_| {});
    let peer = Peer::new(&net, "b.example", "5.0.0.2", 2);
    let alice = server.register("alice").await;
    let item = alice.upload("text/plain", "\r\n--boundary\r\n").await;
    let id = item.strip_prefix("test.example/").unwrap();
    let uri = format!("/_matrix/federation/v1/media/download/{id}");
    let response = server.send(peer.signed("test.example", Method::GET, &uri, None)).await;
    assert_eq!(response.status(), StatusCode::OK);
    let length: usize = response.headers()["content-length"].to_str().unwrap().parse().unwrap();
    let kind = response.headers()["content-type"].to_str().unwrap().to_owned();
    let boundary = kind.strip_prefix("multipart/mixed; boundary=").unwrap();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body.len(), length);
    let expected = format!(
        "\r\n--{boundary}\r\nContent-Type: application/json\r\n\r\n{{}}\r\n--{boundary}\r\nContent-Type: text/plain\r\n\
         Content-Disposition: inline; filename=\"a file.bin\"\r\n\r\n\r\n--boundary\r\n\r\n--{boundary}--\r\n"
    );
    assert_eq!(body, expected.as_bytes());
    for (path, code) in [("download/nobody", 404), ("download/..%2Fx", 404), ("thumbnail/x?width=1", 400)] {
        let uri = format!("/_matrix/federation/v1/media/{path}");
        let response = server.send(peer.signed("test.example", Method::GET, &uri, None)).await;
        assert_eq!(response.status().as_u16(), code, "{path}");
    }
    let unsigned = http::Request::get(uri).body(Body::empty()).unwrap();
    assert_eq!(server.send(unsigned).await.status(), StatusCode::UNAUTHORIZED);
}

/// A server of ours, a user of it, and another server that answers what a test wants.
pub(crate) struct Scene {
    pub(crate) net: Net,
    pub(crate) server: TestServer,
    pub(crate) alice: TestClient,
}

impl Scene {
    pub(crate) async fn new(answer: impl Fn(&Arrived) -> Answered + Send + Sync + 'static) -> Self {
        Self::with(Size::kib(64), answer).await
    }

    /// A scene in which files of other servers have at most this many bytes.
    pub(crate) async fn with(
        bytes_max: Size,
        answer: impl Fn(&Arrived) -> Answered + Send + Sync + 'static,
    ) -> Self {
        let net = Net::new(1);
        let store = Store::open(Engine::Memory(Default::default()), Durability::Fsync).unwrap();
        let server =
            TestServer::start(doors(&net), store, |config| config.media.remote_bytes_max = bytes_max);
        let own = Peer::unheard("b.example", 2).own.document(BEGAN_MS).to_string();
        net.host("b.example", &["5.0.0.2"]);
        net.serve("5.0.0.2:8448", &["b.example"], move |arrived| {
            let path = arrived.request.uri().path();
            let answered = if path.contains("/media/") { answer(&arrived) } else { json(200, own.clone()) };
            std::future::ready(answered)
        });
        let alice = server.register("alice").await;
        Self { net, server, alice }
    }

    pub(crate) async fn asked(&self) -> (u16, String) {
        let answer = self.alice.download("b.example/x", &[]).await;
        let is_json = answer.status != StatusCode::OK;
        (
            answer.status.as_u16(),
            if is_json { answer.refusal().1 } else { String::from_utf8_lossy(&answer.body).into() },
        )
    }
}

const MIXED: &[(&str, &str)] = &[("content-type", "multipart/mixed; boundary=x")];

fn mixed(rest: &str) -> Answered {
    bytes(200, MIXED, format!("--x\r\nContent-Type: application/json\r\n\r\n{{}}\r\n--x\r\n{rest}"))
}

fn endless(head: &'static str) -> Answered {
    let pieces = stream::once(async move { Bytes::from(head) })
        .chain(stream::repeat_with(|| Bytes::from_static(&[b'a'; 4096])));
    let mut answer = http::Response::new(ports::Body::new(pieces.map(Ok)));
    answer.headers_mut().insert("content-type", MIXED[0].1.parse().unwrap());
    answer
}

#[tokio::test(start_paused = true)]
async fn hostile_answers_are_given_up_and_leave_nothing() {
    const HEAD: &str = "--x\r\n\r\n{}\r\n--x\r\nContent-Type: text/plain\r\n\r\n";
    type Case = (&'static str, fn() -> Answered, (u16, &'static str));
    let cases: [Case; 10] = [
        ("no parts", || bytes(200, &[("content-type", "text/plain")], "x"), (502, "M_UNKNOWN")),
        ("no boundary", || bytes(200, &[("content-type", "multipart/mixed")], "x"), (502, "M_UNKNOWN")),
        ("one part", || bytes(200, MIXED, "--x\r\n\r\n{}\r\n--x--\r\n"), (502, "M_UNKNOWN")),
        ("cut off", || mixed("Content-Type: text/plain\r\n\r\nhalf of"), (502, "M_UNKNOWN")),
        ("endless file", || endless(HEAD), (502, "M_TOO_LARGE")),
        ("endless nothing", || endless(""), (502, "M_UNKNOWN")),
        ("too large", || json(502, r#"{"errcode":"M_TOO_LARGE","error":"large"}"#), (502, "M_TOO_LARGE")),
        (
            "private place",
            || mixed("Location: https://127.0.0.1/secret\r\n\r\n\r\n--x--"),
            (502, "M_UNKNOWN"),
        ),
        (
            "place without TLS",
            || mixed("Location: http://cdn.example/a\r\n\r\n\r\n--x--"),
            (502, "M_UNKNOWN"),
        ),
        ("refused", || json(403, r#"{"errcode":"M_FORBIDDEN","error":"no"}"#), (502, "M_UNKNOWN")),
    ];
    for (what, answer, (status, code)) in cases {
        let scene = Scene::new(move |_| answer()).await;
        assert_eq!(scene.asked().await, (status, code.to_owned()), "{what}");
        scene.server.server().app().env.sleep(Duration::from_secs(1)).await;
        assert_eq!(files(scene.server.media()), [], "{what}");
        scene.server.assert_whole();
    }
    // One that sends nothing any more holds nobody for ever.
    let scene = Scene::new(|_| {
        let head = stream::once(async { Ok(Bytes::from_static(HEAD.as_bytes())) });
        let mut answer = http::Response::new(ports::Body::new(head.chain(stream::pending())));
        answer.headers_mut().insert("content-type", MIXED[0].1.parse().unwrap());
        answer
    });
    assert_eq!(scene.await.asked().await, (502, "M_UNKNOWN".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_file_is_fetched_from_where_its_server_says_but_not_from_inside() {
    let scene = Scene::new(|_| mixed("Location: https://cdn.example/a?b=c\r\n\r\n\r\n--x--")).await;
    scene.net.host("cdn.example", &["5.0.0.3"]);
    scene.net.serve("5.0.0.3:443", &["cdn.example"], |arrived| {
        assert!(arrived.request.headers().get("authorization").is_none());
        let answer = match arrived.request.uri().to_string().as_str() {
            "/a?b=c" => bytes(307, &[("location", "/moved")], ""),
            "/moved" => bytes(200, &[("content-type", "image/png")], "from the cdn"),
            other => panic!("{other}"),
        };
        std::future::ready(answer)
    });
    assert_eq!(scene.asked().await, (200, "from the cdn".to_owned()));
    let inside = Scene::new(|_| mixed("Location: https://cdn.example/a\r\n\r\n\r\n--x--")).await;
    inside.net.host("cdn.example", &["5.0.0.3"]);
    inside.net.serve("5.0.0.3:443", &["cdn.example"], |_| {
        std::future::ready(bytes(302, &[("location", "https://10.0.0.1/secret")], ""))
    });
    inside.net.serve("10.0.0.1:443", &["10.0.0.1"], |_| std::future::ready(bytes(200, &[], "secret")));
    assert_eq!(inside.asked().await, (502, "M_UNKNOWN".to_owned()));
    let round = Scene::new(|_| mixed("Location: https://cdn.example/a\r\n\r\n\r\n--x--")).await;
    round.net.host("cdn.example", &["5.0.0.3"]);
    round.net.serve("5.0.0.3:443", &["cdn.example"], |_| {
        std::future::ready(bytes(302, &[("location", "/a")], ""))
    });
    assert_eq!(round.asked().await, (502, "M_UNKNOWN".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn servers_of_before_are_asked_in_the_way_that_they_know() {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let scene = Scene::new(move |arrived| {
        counted.fetch_add(1, Ordering::SeqCst);
        let uri = arrived.request.uri().to_string();
        if uri.starts_with("/_matrix/federation/") {
            return json(404, r#"{"errcode":"M_UNRECOGNIZED","error":"no such endpoint"}"#);
        }
        assert_eq!(uri, "/_matrix/media/v3/download/b.example/x?allow_remote=false&timeout_ms=10000");
        assert!(arrived.request.headers().get("authorization").is_none());
        let fields = [("content-type", "text/plain"), ("content-disposition", "inline; filename=a.txt")];
        bytes(200, &fields, "of before")
    })
    .await;
    assert_eq!(scene.asked().await, (200, "of before".to_owned()));
    assert_eq!(count.load(Ordering::SeqCst), 2);
    let answer = scene.alice.download("b.example/x", &[]).await;
    assert_eq!(answer.field("content-disposition"), "inline; filename=a.txt");
    // A file that is not there is not asked for twice.
    let scene = Scene::new(|arrived| {
        assert!(arrived.request.uri().path().starts_with("/_matrix/federation/"));
        json(404, r#"{"errcode":"M_NOT_FOUND","error":"no such file"}"#)
    });
    assert_eq!(scene.await.asked().await, (404, "M_NOT_FOUND".to_owned()));
}
