//! `src/api/client/url_preview.rs`: pages of the web in a simulated network, friendly and hostile ones.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use aqueduct::{
    config::Config,
    flows::operator::{
        media::{MediaCommand, MediaOutcome},
        operate::{Command, Outcome, operate},
    },
    store::{Durability, Engine, Store, engine::Memory},
};
use axum::body::Body as Sent;
use bytes::Bytes;
use federation::{
    ports::Body,
    testing::{Answered, Arrived, Net, Weather, addresses, bytes},
};
use futures_util::{StreamExt, stream};
use http::{Request, StatusCode, header};
use http_body_util::BodyExt;
use serde_json::{Value, json};

use crate::support::{TestClient, TestServer, encoded, network::doors};

mod hostile;

const ENDPOINT: &str = "/_matrix/client/v1/media/preview_url";
const HTML: &[(&str, &str)] = &[("content-type", "text/html; charset=utf-8")];

/// A server that makes previews, in a network of web servers.
struct Scene {
    net: Net,
    server: TestServer,
    alice: TestClient,
}

impl Scene {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let net = Net::new(1);
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let server = TestServer::start(doors(&net), store, |config| {
            config.media.previews.enabled = true;
            change(config);
        });
        let alice = server.register("alice").await;
        Self { net, server, alice }
    }

    /// Puts a host there that answers by its path, with and without TLS, and counts what it is asked.
    fn host(
        &self,
        name: &str,
        address: &str,
        answer: impl Fn(&str) -> Answered + Send + Sync + 'static,
    ) -> Arc<AtomicUsize> {
        let (count, answer) = (Arc::new(AtomicUsize::new(0)), Arc::new(answer));
        self.net.host(name, &[address]);
        for port in [80, 443, 8080] {
            let (count, answer) = (Arc::clone(&count), Arc::clone(&answer));
            self.net.serve(&format!("{address}:{port}"), &[name], move |arrived: Arrived| {
                count.fetch_add(1, Ordering::Relaxed);
                std::future::ready(answer(&arrived.request.uri().to_string()))
            });
        }
        count
    }

    async fn preview(&self, url: &str) -> (StatusCode, Value) {
        self.alice.get(&path(url)).await
    }

    /// The preview, which there must be.
    async fn ok(&self, url: &str) -> Value {
        let (status, json) = self.preview(url).await;
        assert_eq!(status, StatusCode::OK, "{url}: {json}");
        json
    }

    /// Requires that there is no preview.
    async fn none(&self, url: &str) {
        let (status, json) = self.preview(url).await;
        let code = json["errcode"].as_str().unwrap_or_default();
        assert_eq!((status.as_u16(), code), (404, "M_NOT_FOUND"), "{url}: {json}");
    }

    /// The bytes and the content type of an item.
    async fn download(&self, uri: &str) -> (StatusCode, String, Bytes) {
        let path = format!("/_matrix/client/v1/media/download/{}", uri.strip_prefix("mxc://").unwrap());
        let token = format!("Bearer {}", self.alice.token.as_ref().unwrap());
        let request = Request::get(path).header(header::AUTHORIZATION, token).body(Sent::empty()).unwrap();
        let response = self.server.send(request).await;
        let (status, kind) =
            (response.status(), response.headers()[header::CONTENT_TYPE].to_str().unwrap().to_owned());
        (status, kind, response.into_body().collect().await.unwrap().to_bytes())
    }

    /// How much there is of other servers, and of previews.
    async fn status(&self) -> ((u64, u64), (u64, u64)) {
        let command = Command::Media(MediaCommand::Status);
        match operate(self.server.server().app(), command, |_| ()).await.unwrap() {
            Outcome::Media(MediaOutcome::Status(status)) => (status.others, status.previews),
            other => panic!("{other:?}"),
        }
    }

    async fn wait(&self, seconds: u64) {
        self.server.server().app().env.sleep(Duration::from_secs(seconds)).await;
    }
}

fn path(url: &str) -> String {
    format!("{ENDPOINT}?url={}", encoded(url))
}

fn page(html: impl Into<Bytes>) -> Answered {
    bytes(200, HTML, html)
}

fn redirect(to: &str) -> Answered {
    bytes(302, &[("location", to)], "")
}

/// A PNG of these sides, with as many bytes of nothing behind it.
fn png(width: u32, height: u32, more: usize) -> Bytes {
    let head =
        [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".as_slice(), &width.to_be_bytes(), &height.to_be_bytes()].concat();
    [head, vec![7; more]].concat().into()
}

fn image(width: u32, height: u32) -> Answered {
    bytes(200, &[("content-type", "image/png")], png(width, height, 100))
}

#[tokio::test(start_paused = true)]
async fn a_page_is_told_by_what_it_says_and_its_image_is_media_of_this_server() {
    let scene = Scene::new().await;
    let count = scene.host("a.example", "5.0.0.1", |path| match path {
        "/page?x=1" => page(
            "<meta property=og:title content='A &amp; B'><meta property=og:description content='About it'>
             <meta property=og:image content='i.png'><meta property=og:image:alt content=Sign>
             <meta property=og:image:width content=9999><meta property=og:video content=https://a.example/v>",
        ),
        "/i.png" => image(200, 100),
        _ => bytes(404, &[], ""),
    });
    let json = scene.ok("https://a.example/page?x=1#part").await;
    let uri = json["og:image"].as_str().unwrap().to_owned();
    let expected = json!({
        "og:title": "A & B", "og:description": "About it", "og:image": uri, "og:image:alt": "Sign",
        "og:image:type": "image/png", "og:image:width": 200, "og:image:height": 100, "matrix:image:size": 124,
    });
    assert_eq!(json, expected);
    assert!(uri.starts_with("mxc://test.example/"), "{uri}");
    assert_eq!(scene.download(&uri).await, (StatusCode::OK, "image/png".to_owned(), png(200, 100, 100)));
    // The deprecated endpoints tell the same, and nothing is asked for again.
    for version in ["v3", "r0"] {
        let old =
            format!("/_matrix/media/{version}/preview_url?url={}", encoded("https://a.example/page?x=1"));
        assert_eq!(scene.alice.ok_get(&old).await, json);
    }
    assert_eq!(count.load(Ordering::Relaxed), 2);
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn nothing_of_the_user_goes_along() {
    let scene = Scene::with(|config| config.media.previews.accept_language = "de, en;q=0.5".to_owned()).await;
    let seen = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let sees = Arc::clone(&seen);
    scene.net.host("a.example", &["5.0.0.1"]);
    scene.net.serve("5.0.0.1:443", &["a.example"], move |arrived: Arrived| {
        sees.lock().push(arrived.request);
        std::future::ready(bytes(
            200,
            &[("content-type", "text/html"), ("set-cookie", "a=b")],
            "<title>T</title>",
        ))
    });
    let token = format!("Bearer {}", scene.alice.token.as_ref().unwrap());
    for url in ["https://user:secret@a.example/", "https://a.example/x"] {
        let request = Request::get(path(url))
            .header(header::AUTHORIZATION, &token)
            .header(header::ACCEPT_LANGUAGE, "fr")
            .header(header::REFERER, "https://app.example/")
            .header(header::USER_AGENT, "Phone of Alice")
            .header(header::COOKIE, "c=d");
        assert_eq!(scene.server.send(request.body(Sent::empty()).unwrap()).await.status(), StatusCode::OK);
    }
    let seen = seen.lock();
    assert_eq!(seen.len(), 2);
    for request in seen.iter() {
        let mut names: Vec<_> = request.headers().keys().map(|name| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["accept", "accept-encoding", "accept-language", "user-agent"]);
        assert_eq!(request.headers()["accept-language"], "de, en;q=0.5");
        assert_eq!(request.headers()["accept-encoding"], "identity");
        let agent = request.headers()["user-agent"].to_str().unwrap();
        assert!(agent.starts_with("Aqueduct/") && agent.contains("bot"), "{agent}");
        assert!(!request.uri().to_string().contains("secret"));
    }
}

#[tokio::test(start_paused = true)]
async fn pages_in_other_words_are_told_too() {
    let scene = Scene::new().await;
    scene.host("a.example", "5.0.0.1", |path| match path {
        "/twitter" => page("<meta name=twitter:title content=T><meta name=twitter:description content=D><meta name=twitter:image content=/i.png>"),
        "/plain" => page(format!("<title>Plain</title><p>{}</p><img src=/tiny.png><img src=/i.png>", "Some words. ".repeat(10))),
        "/latin" => bytes(200, &[("content-type", "text/html; charset=ISO-8859-1")], &b"<title>caf\xe9</title>"[..]),
        "/oembed" => page("<title>O</title><link rel=alternate type=application/json+oembed href='/o?f=json'>"),
        "/o?f=json" => bytes(200, &[("content-type", "application/json")], json!({
            "type": "video", "title": "Film", "author_name": "Somebody", "provider_name": "Films", "thumbnail_url": "https://a.example/i.png",
        }).to_string()),
        "/i.png" => image(64, 64),
        "/tiny.png" => image(1, 1),
        "/image" => bytes(200, &[("content-type", "image/jpeg")], png(3, 2, 0)),
        "/svg" => bytes(200, &[("content-type", "image/svg+xml")], "<svg onload=x>"),
        "/html-as-image" => bytes(200, &[("content-type", "image/png")], "<html>"),
        "/file" => bytes(200, &[("content-type", "application/pdf")], "%PDF"),
        "/nothing" => bytes(200, &[], "<title>x</title>"),
        _ => bytes(404, HTML, "<title>Not found</title>"),
    });
    let ok = async |path: &str| scene.ok(&format!("https://a.example/{path}")).await;
    let told = ok("twitter").await;
    assert_eq!(
        (&told["og:title"], &told["og:description"], &told["og:image:width"]),
        (&json!("T"), &json!("D"), &json!(64))
    );
    let told = ok("plain").await;
    assert_eq!(told["og:title"], "Plain");
    assert!(told["og:description"].as_str().unwrap().starts_with("Some words. Some words."), "{told}");
    assert_eq!(told["og:image:width"], 64, "a pixel that counts visitors does not stand for the page");
    assert_eq!(ok("latin").await, json!({ "og:title": "café" }));
    let told = ok("oembed").await;
    assert_eq!(
        (&told["og:title"], &told["og:site_name"], &told["og:image:type"]),
        (&json!("Film"), &json!("Films"), &json!("image/png"))
    );
    let told = ok("image").await;
    let uri = told["og:image"].as_str().unwrap();
    let expected = json!({
        "og:image": uri, "og:image:type": "image/png", "og:image:width": 3, "og:image:height": 2, "matrix:image:size": 24,
    });
    assert_eq!(told, expected, "the bytes say what the image is");
    for empty in ["svg", "html-as-image", "file", "nothing"] {
        assert_eq!(ok(empty).await, json!({}), "{empty}");
    }
    scene.none("https://a.example/missing").await;
}

#[tokio::test(start_paused = true)]
async fn a_preview_and_a_failure_are_kept_for_their_time() {
    let scene = Scene::new().await;
    let version = Arc::new(AtomicUsize::new(0));
    let of_page = Arc::clone(&version);
    let count = scene.host("a.example", "5.0.0.1", move |_| match of_page.fetch_add(1, Ordering::Relaxed) {
        2 => bytes(500, &[], ""),
        number => page(format!("<title>{number}</title>")),
    });
    let url = "https://a.example/";
    let title = async |ts: Option<u64>| {
        let ts = ts.map(|ts| format!("&ts={ts}")).unwrap_or_default();
        let (status, json) = scene.alice.get(&format!("{}{ts}", path(url))).await;
        (status == StatusCode::OK).then(|| json["og:title"].as_str().unwrap().to_owned())
    };
    let now_ms = || scene.server.server().app().env.now_ms();
    let first_ms = now_ms();
    assert_eq!(title(None).await.as_deref(), Some("0"));
    scene.wait(3_590).await;
    assert_eq!(title(None).await.as_deref(), Some("0"));
    scene.wait(20).await;
    assert_eq!(title(None).await.as_deref(), Some("1"), "an hour is over");
    // A request for the page of then gets it, though a newer one is known.
    assert_eq!(title(Some(first_ms)).await.as_deref(), Some("0"));
    assert_eq!(title(Some(first_ms + 1_000_000)).await.as_deref(), Some("0"));
    scene.wait(3_700).await;
    assert_eq!(title(None).await, None);
    scene.wait(200).await;
    assert_eq!(title(None).await, None);
    assert_eq!(count.load(Ordering::Relaxed), 3, "that there is none is kept, too");
    assert_eq!(title(Some(first_ms)).await.as_deref(), Some("0"));
    scene.wait(200).await;
    assert_eq!(title(None).await.as_deref(), Some("3"), "five minutes are over");
    scene.wait(8 * 24 * 3_600).await;
    assert_eq!(
        title(Some(first_ms)).await.as_deref(),
        Some("4"),
        "after a week the page of then is forgotten"
    );
    assert_eq!(count.load(Ordering::Relaxed), 5);
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn the_image_goes_with_its_preview() {
    let scene = Scene::with(|config| config.media.remote_kept_days = 1).await;
    scene.host("a.example", "5.0.0.1", |path| match path {
        "/i.png" => image(100, 100),
        _ => page("<title>T</title><meta property=og:image content=/i.png>"),
    });
    let uri = scene.ok("https://a.example/").await["og:image"].as_str().unwrap().to_owned();
    assert_eq!(scene.download(&uri).await.0, StatusCode::OK);
    // It is no file of another server, for which there are other rules.
    assert_eq!(scene.status().await, ((0, 0), (1, 124)));
    scene.wait(6 * 24 * 3_600).await;
    assert_eq!(scene.download(&uri).await.0, StatusCode::OK, "clients still show it");
    scene.wait(3 * 24 * 3_600).await;
    assert_eq!(scene.download(&uri).await.0, StatusCode::NOT_FOUND);
    let rows = scene.server.assert_whole();
    let left = rows.iter().filter(|(table, count)| {
        *count > 0 && ["URL_PREVIEW", "MEDIA_ITEM", "MEDIA_BLOB", "MEDIA_REF"].contains(table)
    });
    assert_eq!(left.count(), 0, "{rows:?}");
}

#[tokio::test(start_paused = true)]
async fn a_restart_knows_the_previews_of_before_and_forgets_them_in_time() {
    let scene = Scene::new().await;
    let count = scene.host("a.example", "5.0.0.1", |_| page("<title>T</title>"));
    scene.ok("https://a.example/").await;
    let Engine::Memory(memory) = scene.server.server().app().store.engine() else { panic!("not in memory") };
    let store = Store::open(Engine::Memory(memory.after_crash(0)), Durability::Fsync).unwrap();
    let server = TestServer::start(doors(&scene.net), store, |config| config.media.previews.enabled = true);
    let alice = TestClient { server: server.clone(), ..scene.alice.clone() };
    assert_eq!(alice.ok_get(&path("https://a.example/")).await, json!({ "og:title": "T" }));
    assert_eq!(count.load(Ordering::Relaxed), 1);
    server.server().app().env.sleep(Duration::from_secs(9 * 24 * 3_600)).await;
    let rows = server.assert_whole();
    assert!(rows.iter().all(|(table, count)| *table != "URL_PREVIEW" || *count == 0), "{rows:?}");
}

#[tokio::test(start_paused = true)]
async fn many_who_ask_at_once_have_one_page_fetched() {
    let scene = Scene::new().await;
    let count = scene.host("a.example", "5.0.0.1", |path| match path {
        "/i.png" => image(100, 100),
        _ => page("<title>T</title><meta property=og:image content=/i.png>"),
    });
    scene.net.weather("5.0.0.1:443", Weather::Fair, Duration::from_secs(3));
    let bob = scene.server.register("bob").await;
    let asking = (0..100).map(|number| {
        let client = if number % 2 == 0 { scene.alice.clone() } else { bob.clone() };
        async move { client.ok_get(&path("https://a.example/")).await }
    });
    let told = futures_util::future::join_all(asking).await;
    assert!(told.iter().all(|json| *json == told[0] && json["og:title"] == "T"), "{told:?}");
    assert_eq!(count.load(Ordering::Relaxed), 2, "the page and its image");
    // Nothing of it is left in memory: a look that ended is not joined.
    scene.wait(3_601).await;
    scene.ok("https://a.example/").await;
    assert_eq!(count.load(Ordering::Relaxed), 4);
}

#[tokio::test(start_paused = true)]
async fn a_look_goes_on_for_others_when_whoever_began_it_hangs_up() {
    let scene = Scene::new().await;
    let count = scene.host("a.example", "5.0.0.1", |_| page("<title>T</title>"));
    scene.net.weather("5.0.0.1:443", Weather::Fair, Duration::from_secs(5));
    let first = tokio::time::timeout(Duration::from_secs(2), scene.preview("https://a.example/"));
    let bob = scene.server.register("bob").await;
    let url = path("https://a.example/");
    let second = async {
        scene.wait(1).await;
        bob.ok_get(&url).await
    };
    let (first, second) = tokio::join!(first, second);
    assert!(first.is_err());
    assert_eq!((second, count.load(Ordering::Relaxed)), (json!({ "og:title": "T" }), 1));
}

#[tokio::test(start_paused = true)]
async fn only_hosts_that_the_operator_allows_are_asked() {
    let scene = Scene::with(|config| {
        config.media.previews.allow = vec!["*.example".to_owned(), "5.0.0.9".to_owned()];
        config.media.previews.deny = vec!["bad.example".to_owned(), "*.bad.example".to_owned()];
    })
    .await;
    let good = scene.host("good.example", "5.0.0.1", |path| match path {
        "/away" => redirect("https://bad.example/"),
        "/image" => page("<title>T</title><meta property=og:image content=https://bad.example/i.png>"),
        "/beside" => page(
            "<title>T</title><link rel=alternate type=application/json+oembed href=https://x.bad.example/o>",
        ),
        _ => page("<title>T</title>"),
    });
    let bad = scene.host("bad.example", "5.0.0.2", |_| image(100, 100));
    scene.net.host("x.bad.example", &["5.0.0.2"]);
    for url in [
        "https://bad.example/",
        "https://BAD.example./",
        "https://x.bad.example/",
        "https://elsewhere.test/",
        "https://5.0.0.2/",
        "https://user@bad.example:8080/",
    ] {
        let (status, json) = scene.preview(url).await;
        assert_eq!((status.as_u16(), &json["errcode"]), (403, &json!("M_FORBIDDEN")), "{url}");
    }
    assert_eq!(scene.ok("https://good.example/").await, json!({ "og:title": "T" }));
    scene.none("https://good.example/away").await;
    for path in ["image", "beside"] {
        assert_eq!(scene.ok(&format!("https://good.example/{path}")).await, json!({ "og:title": "T" }));
    }
    assert_eq!((good.load(Ordering::Relaxed), bad.load(Ordering::Relaxed)), (4, 0));
}

#[tokio::test(start_paused = true)]
async fn previews_are_off_unless_the_operator_turns_them_on() {
    let scene = Scene::with(|config| config.media.previews = Config::default().media.previews).await;
    let count = scene.host("a.example", "5.0.0.1", |_| page("<title>T</title>"));
    let (status, json) = scene.preview("https://a.example/").await;
    assert_eq!((status.as_u16(), &json["errcode"]), (403, &json!("M_FORBIDDEN")));
    assert_eq!(count.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn wrong_requests_are_refused() {
    let scene = Scene::new().await;
    let anonymous = scene.server.anonymous();
    for endpoint in [ENDPOINT, "/_matrix/media/v3/preview_url"] {
        let ask = |query: &str| format!("{endpoint}{query}");
        let (status, json) = anonymous.get(&ask("?url=https%3A%2F%2Fa.example")).await;
        assert_eq!((status.as_u16(), &json["errcode"]), (401, &json!("M_MISSING_TOKEN")));
        for (query, code) in [
            ("", "M_MISSING_PARAM"),
            ("?ts=1", "M_MISSING_PARAM"),
            ("?url=", "M_INVALID_PARAM"),
            ("?url=a.example", "M_INVALID_PARAM"),
            ("?url=ftp%3A%2F%2Fa.example", "M_INVALID_PARAM"),
            ("?url=file%3A%2F%2F%2Fetc%2Fpasswd", "M_INVALID_PARAM"),
            ("?url=javascript%3Aalert(1)", "M_INVALID_PARAM"),
            ("?url=https%3A%2F%2Fa.example%3A22%2F", "M_INVALID_PARAM"),
            ("?url=https%3A%2F%2Fa.example&ts=-1", "M_INVALID_PARAM"),
            ("?url=https%3A%2F%2Fa.example&ts=soon", "M_INVALID_PARAM"),
        ] {
            let (status, json) = scene.alice.get(&ask(query)).await;
            assert_eq!((status.as_u16(), &json["errcode"]), (400, &json!(code)), "{query}: {json}");
        }
    }
}
