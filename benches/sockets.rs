//! Sockets in number: what ten thousand idle ones cost the server, and how fast a message reaches a thousand of a room.
//! `cargo bench --bench sockets`, or `cargo test --bench sockets` for a debug build; `-- --sockets N --room N` for other numbers.
//!
//! Starts the program in an empty directory with fsync on. The load shares the machine's cores with the server; memory is the
//! server's alone, from /proc. Both processes need a descriptor for each socket (`ulimit -n`). Figures: `docs/performance.md`.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a benchmark measures real time and stops at the first fault"
)]

#[path = "support/server.rs"]
mod server;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{SinkExt, StreamExt, stream};
use hmac::{Hmac, KeyInit, Mac};
use http::{HeaderValue, Request, header};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use server::Server;
use sha1::Sha1;
use tokio::{net::TcpStream, sync::mpsc};
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{Message, client::IntoClientRequest, protocol::WebSocketConfig},
};

const SECRET: &str = "benchmark";
/// The idle sockets of the default numbers may cost the server this much, with all that it has besides.
const RESIDENT_MB_MAX: f64 = 250.0;
/// A message must have reached all sockets of its room within this time in a release build.
const REACHES_WITHIN: Duration = Duration::from_millis(50);

/// The server that the benchmark has started.
struct Target {
    server: Server,
    _dir: tempfile::TempDir,
}

impl Target {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let settings = format!(
            "[registration]\nmode = \"open\"\nshared_secret = \"{SECRET}\"\n\
             [limits]\nrate_limits = false\nconnections_max = 100000\nsockets_max = 80000\n"
        );
        Self { server: Server::start(dir.path(), &settings), _dir: dir }
    }

    fn resident_mb(&self) -> f64 {
        self.server.memory_mb("VmRSS")
    }

    async fn http(&self, method: &str, path: &str, token: &str, body: &Value) -> Value {
        let stream = TcpStream::connect(&self.server.address).await.unwrap();
        let stream = hyper_util::rt::TokioIo::new(stream);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
        let connection = tokio::spawn(connection);
        let mut request =
            Request::builder().method(method).uri(path).header(header::HOST, &self.server.address);
        if !token.is_empty() {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(body.to_string()).unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        connection.abort();
        assert!(status.is_success(), "{method} {path}: {status} {}", String::from_utf8_lossy(&bytes));
        serde_json::from_slice(&bytes).unwrap()
    }

    /// Registers a user with the shared secret, and answers the access token.
    async fn user(&self, number: usize) -> String {
        let path = "/_synapse/admin/v1/register";
        let nonce = self.http("GET", path, "", &Value::Null).await["nonce"].clone();
        let (name, nonce) = (format!("u{number}"), nonce.as_str().unwrap());
        let mut mac = Hmac::<Sha1>::new_from_slice(SECRET.as_bytes()).unwrap();
        mac.update(format!("{nonce}\0{name}\0password\0notadmin").as_bytes());
        let mac: String = mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let body =
            json!({ "nonce": nonce, "username": name, "password": "password", "admin": false, "mac": mac });
        self.http("POST", path, "", &body).await["access_token"].as_str().unwrap().to_owned()
    }
}

/// Follows the news over a socket, and tells when each message of a room came.
async fn follow(
    target: Arc<Target>,
    token: String,
    came: mpsc::UnboundedSender<Instant>,
    ready: Arc<AtomicUsize>,
) {
    let mut request =
        format!("ws://{}/_aqueduct/client/v1/socket", target.server.address).into_client_request().unwrap();
    let bearer = HeaderValue::try_from(format!("Bearer {token}")).unwrap();
    request.headers_mut().insert(header::AUTHORIZATION, bearer);
    let stream = TcpStream::connect(&target.server.address).await.unwrap();
    let config = WebSocketConfig::default().read_buffer_size(4 << 10).write_buffer_size(0);
    let (mut socket, _): (WebSocketStream<TcpStream>, _) =
        client_async_with_config(request, stream, Some(config)).await.unwrap();
    let sync = json!({ "id": 1, "method": "sync", "params": { "set_presence": "offline" } });
    socket.send(Message::text(sync.to_string())).await.unwrap();
    let mut is_ready = false;
    while let Some(message) = socket.next().await {
        let Message::Text(text) = message.expect("the socket stays open") else { continue };
        let at = Instant::now();
        let message: Value = serde_json::from_str(&text).unwrap();
        if message["method"] != "sync" {
            assert!(message["error"].is_null(), "{message}");
            continue;
        }
        let ack = json!({ "method": "ack", "params": { "pos": message["params"]["next_batch"] } });
        socket.send(Message::text(ack.to_string())).await.unwrap();
        if !is_ready {
            is_ready = true;
            ready.fetch_add(1, Ordering::Relaxed);
        } else if !message["params"]["rooms"]["join"].is_null() {
            came.send(at).unwrap();
        }
    }
    panic!("the server has ended a socket");
}

fn number_of(name: &str, default: usize) -> usize {
    let mut args = std::env::args().skip_while(|arg| arg != name);
    args.nth(1).map_or(default, |number| number.parse().expect("a number"))
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(run(number_of("--sockets", 10_000), number_of("--room", 1_000)));
}

async fn run(sockets: usize, in_room: usize) {
    let target = Arc::new(Target::start());
    let began = Instant::now();
    let tokens: Vec<String> = stream::iter(0..sockets)
        .map(|number| {
            let target = target.clone();
            async move { target.user(number).await }
        })
        .buffered(16)
        .collect()
        .await;
    let preset = json!({ "preset": "public_chat" });
    let made = target.http("POST", "/_matrix/client/v3/createRoom", &tokens[0], &preset).await;
    let room = made["room_id"].as_str().unwrap().to_owned();
    let join = format!("/_matrix/client/v3/join/{room}");
    stream::iter(&tokens[1..in_room.min(sockets)])
        .for_each_concurrent(16, |token| async {
            target.http("POST", &join, token, &json!({})).await;
        })
        .await;
    println!("{sockets} users, {in_room} of them in a room: {:.1} s", began.elapsed().as_secs_f64());
    let before_mb = target.resident_mb();
    let (came, mut coming) = mpsc::unbounded_channel();
    let ready = Arc::new(AtomicUsize::new(0));
    let began = Instant::now();
    for (number, token) in tokens.iter().enumerate() {
        tokio::spawn(follow(target.clone(), token.clone(), came.clone(), ready.clone()));
        // At most so many are being opened at once.
        while number + 1 - ready.load(Ordering::Relaxed).min(number + 1) > 64 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    while ready.load(Ordering::Relaxed) < sockets {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    println!("opened and told everything: {:.1} s", began.elapsed().as_secs_f64());
    tokio::time::sleep(Duration::from_secs(15)).await;
    let idle_mb = target.resident_mb();
    let each_kib = (idle_mb - before_mb) * 1024.0 / sockets as f64;
    println!("idle: {idle_mb:.0} MB, {before_mb:.0} MB before; {each_kib:.1} KiB each");
    let mut took = Vec::new();
    for txn in 0..20 {
        let path = format!("/_matrix/client/v3/rooms/{room}/send/m.room.message/{txn}");
        let sent = Instant::now();
        target.http("PUT", &path, &tokens[0], &json!({ "msgtype": "m.text", "body": "Hello" })).await;
        let mut last = sent;
        for _ in 0..in_room.min(sockets) {
            last = last.max(coming.recv().await.unwrap());
        }
        took.push(last - sent);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    took.sort_unstable();
    let (middle, worst) = (took[took.len() / 2], took[took.len() - 1]);
    println!("a message reaches {in_room} sockets: p50 {middle:.1?}, at most {worst:.1?}");
    let is_release = !cfg!(debug_assertions);
    assert!(sockets > 10_000 || idle_mb < RESIDENT_MB_MAX, "{idle_mb} MB");
    assert!(in_room > 1_000 || !is_release || middle < REACHES_WITHIN, "{middle:?}");
    assert!(sockets < 1_000 || each_kib < 20.0, "{each_kib} KiB each");
}
