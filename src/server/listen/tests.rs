//! Tests with clients that say nothing, stop half-way, or do not read, over streams in memory.

use axum::routing::get;
use bytes::Bytes;
use futures_util::FutureExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    net::TcpStream,
};

use super::*;

/// More bytes than all buffers on the way hold, so that the server must wait for its client.
const LARGE: usize = 4 << 20;

async fn listening() -> Listening {
    let env = Env::simulated(1, 0);
    let router = Router::new()
        .route("/small", get(|| async { "small" }))
        .route("/large", get(|| async { Bytes::from(vec![b'x'; LARGE]) }))
        .route("/page", get(|| async { Bytes::from(vec![b'x'; 10_000]) }))
        .route("/nothing", get(|| async {}))
        .route("/slow", get(|| async { std::future::pending::<String>().await }));
    Listening::new(env, Metrics::new(), router, CancellationToken::new(), &Limits::default())
}

/// Listens with so many places, for requests that are answered after 20 seconds, with a body of so many bytes.
fn listening_with(places: u32, bytes: usize) -> Listening {
    let env = Env::simulated(1, 0);
    let waits = env.clone();
    let late = move || {
        let env = waits.clone();
        async move {
            env.sleep(Duration::from_secs(20)).await;
            Bytes::from(vec![b'x'; bytes])
        }
    };
    let router = Router::new().route("/small", get(|| async { "small" })).route("/late", get(late));
    let limits = Limits { connections_max: places, ..Limits::default() };
    Listening::new(env, Metrics::new(), router, CancellationToken::new(), &limits)
}

async fn connect(all: &Listening) -> DuplexStream {
    let (client, server) = tokio::io::duplex(64 << 10);
    let place = all.connections.admit(None).await.unwrap();
    let it = all.clone();
    all.spawn(place, |place| async move {
        it.serve(server, place, IpAddr::V4(Ipv4Addr::LOCALHOST), false).await;
    });
    client
}

/// Reads until the server ends the connection, and says after how many seconds it did.
async fn ends_after(all: &Listening, client: &mut DuplexStream) -> u64 {
    let began = all.env.instant();
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).await.unwrap();
    all.env.instant().saturating_duration_since(began).as_secs()
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_finish_its_request_is_left() {
    let all = listening().await;
    for said in ["", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "PRI * HT", "GET /small HTTP/1.1\r\nHost: x\r\n"] {
        let mut client = connect(&all).await;
        client.write_all(said.as_bytes()).await.unwrap();
        let seconds = ends_after(&all, &mut client).await;
        assert!(seconds <= HEAD_TIMEOUT.as_secs() + 1, "{said:?}: {seconds}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_comes_while_its_connection_is_to_make_room_is_answered() {
    for (path, bytes) in [("/small", 5), ("/late", 5), ("/late", LARGE)] {
        let all = listening_with(1, bytes);
        let mut client = connect(&all).await;
        client.write_all(b"GET /small HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"small") {
            client.read_buf(&mut answer).await.unwrap();
        }
        all.env.sleep(Duration::from_secs(1)).await;
        // The request is there before the connection, which was idle until now, looks for it and at who needs its place.
        client.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut newcomer = Box::pin(all.connections.admit(None));
        assert!((&mut newcomer).now_or_never().is_none(), "there is one place");
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{path}: {} bytes", answer.len());
        assert!(answer.len() > bytes, "{path}: {} bytes", answer.len());
        assert!(newcomer.await.is_some());
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_makes_room_at_once_and_another_does_where_it_has_become_busy() {
    let all = listening_with(2, 5);
    let (mut first, mut second) = (connect(&all).await, connect(&all).await);
    first.write_all(b"GET /small HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    all.env.sleep(Duration::from_secs(1)).await;
    second.write_all(b"GET /late HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    first.write_all(b"GET /late HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let (began, mut newcomer) = (all.env.instant(), Box::pin(all.connections.admit(None)));
    assert!((&mut newcomer).now_or_never().is_none());
    assert!(newcomer.await.is_some());
    let waited = all.env.instant().saturating_duration_since(began).as_secs();
    assert!((20..=21).contains(&waited), "both have a request under way: {waited}");
    let mut third = connect(&all).await;
    third.write_all(b"GET /small HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    all.env.sleep(Duration::from_secs(30)).await;
    let (began, newcomer) = (all.env.instant(), all.connections.admit(None).await);
    assert!(newcomer.is_some());
    assert_eq!(all.env.instant(), began, "an idle one makes room at once");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_waits_for_its_answer_is_not_left() {
    let all = listening().await;
    let mut client = connect(&all).await;
    client.write_all(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut byte = [0];
    let read = tokio::time::timeout(Duration::from_secs(3600), client.read(&mut byte)).await;
    assert!(read.is_err(), "{read:?}");
}

#[tokio::test(start_paused = true)]
async fn a_connection_without_requests_is_left_in_the_end() {
    let all = listening().await;
    let mut client = connect(&all).await;
    client.write_all(b"GET /small HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let seconds = ends_after(&all, &mut client).await;
    assert!((1..=301).contains(&seconds), "{seconds}");
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_nobody_reads_ends_its_connection() {
    let all = listening().await;
    let mut client = connect(&all).await;
    client.write_all(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut some = vec![0; 100];
    client.read_exact(&mut some).await.unwrap();
    all.env.sleep(Duration::from_secs(120)).await;
    let mut rest = Vec::new();
    let _ = client.read_to_end(&mut rest).await;
    assert!(rest.len() < LARGE, "the whole answer came: {}", rest.len());
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_only_trickled_away_ends_its_connection() {
    let all = listening().await;
    let mut client = connect(&all).await;
    client.write_all(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut read = 0;
    for _ in 0..20 {
        let mut some = vec![0; 100];
        read += client.read(&mut some).await.unwrap_or_default();
        all.env.sleep(Duration::from_secs(10)).await;
    }
    let mut rest = Vec::new();
    let _ = client.read_to_end(&mut rest).await;
    assert!(read + rest.len() < LARGE, "the whole answer came");
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_read_slowly_comes_whole() {
    let all = listening().await;
    let mut client = connect(&all).await;
    client.write_all(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let (mut read, mut some) = (0, vec![0; 32 << 10]);
    loop {
        match client.read(&mut some).await.unwrap() {
            0 => break,
            bytes => read += bytes,
        }
        all.env.sleep(Duration::from_secs(5)).await;
    }
    assert!(read > LARGE, "{read}");
}

/// Listens on a free port of this machine, and answers the address.
async fn open_socket(all: &Listening) -> String {
    let listener = Listener { address: Some(([127, 0, 0, 1], 0).into()), ..Listener::default() };
    let place = all.open(&listener).await.unwrap();
    place.strip_prefix("http://").unwrap().to_owned()
}

async fn connect_to(address: &str) -> TcpStream {
    #[expect(clippy::disallowed_methods, reason = "a client of the server that is tested")]
    TcpStream::connect(address).await.unwrap()
}

/// The test uses sockets, because the listener itself must ask for a place; nothing in it depends on a clock.
#[tokio::test]
async fn silent_sockets_keep_nobody_out() {
    let mut all = listening().await;
    all.connections = Connections::new(all.env.clone(), all.metrics.clone(), 20, 20);
    let address = open_socket(&all).await;
    let mut silent = Vec::new();
    for number in 0..40 {
        let mut stream = connect_to(&address).await;
        if number % 2 == 0 {
            stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        }
        silent.push(stream);
    }
    let mut client = connect_to(&address).await;
    client.write_all(b"GET /small HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("small"), "{answer}");
    all.stopping.cancel();
}

/// The body of the answer to a request for this path over HTTP/2.
async fn body_by_http2(address: &str, path: &str) -> String {
    let mut stream = connect_to(address).await;
    // A preface, settings that change nothing, then GET and http from the static table, and the path as it is.
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut head = vec![0x82, 0x86, 0x04, 0x7f];
    let mut rest = path.len() - 127;
    while rest > 127 {
        head.push((rest % 128) as u8 | 0x80);
        rest /= 128;
    }
    head.push(rest as u8);
    head.extend(path.as_bytes());
    head.extend([0x41, 1, b'x']);
    // The request ends with its head, which goes on in frames of another kind; the last of them ends the head.
    let parts: Vec<_> = head.chunks(16_000).collect();
    for (at, part) in parts.iter().enumerate() {
        let (kind, ends_request) = if at == 0 { (1, 0x1) } else { (9, 0) };
        let ends_head = if at + 1 == parts.len() { 0x4 } else { 0 };
        let length = (part.len() as u32).to_be_bytes();
        let frame = [&length[1..], &[kind, ends_request | ends_head, 0, 0, 0, 1], *part].concat();
        stream.write_all(&frame).await.unwrap();
    }
    let mut body = Vec::new();
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.unwrap();
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        stream.read_exact(&mut payload).await.unwrap();
        let (kind, flags) = (head[3], head[4]);
        if kind == 0 {
            body.extend(payload);
        }
        if kind <= 1 && flags & 0x1 != 0 {
            return String::from_utf8(body).unwrap();
        }
    }
}

/// The test uses sockets, because the HTTP library refuses such a head by itself when it is larger still.
#[tokio::test]
async fn a_head_that_is_too_large_is_refused_in_json_that_a_browser_shows() {
    let server = crate::server::Server::in_memory(Env::real().unwrap());
    let (app, limits) = (server.app(), Limits::default());
    let all =
        Listening::new(app.env.clone(), Metrics::new(), server.router(), CancellationToken::new(), &limits);
    let address = open_socket(&all).await;
    let path = format!("/_matrix/client/v3/sync?filter={}", "a".repeat(40_000));
    let many: String = (0..150).map(|number| format!("X-{number}: a\r\n")).collect();
    let large = format!("X-Large: {}\r\n", "a".repeat(100_000));
    let small = "/_matrix/client/versions";
    for (path, fields, status) in [(path.as_str(), "", 414), (small, &*many, 431), (small, &*large, 431)] {
        let mut client = connect_to(&address).await;
        let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{fields}\r\n");
        client.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        for part in ["access-control-allow-origin: *", "application/json", "M_TOO_LARGE"] {
            assert!(answer.contains(part), "{part} is not in {answer}");
        }
    }
    let body = body_by_http2(&address, &path).await;
    assert!(body.contains("M_TOO_LARGE"), "{body}");
    all.stopping.cancel();
    server.stop().await.unwrap();
}

/// The test uses sockets, because what has no connection needs no host.
#[tokio::test]
async fn a_request_without_a_host_or_with_a_coding_is_refused_in_json() {
    let server = crate::server::Server::in_memory(Env::real().unwrap());
    let (app, limits) = (server.app(), Limits::default());
    let all =
        Listening::new(app.env.clone(), Metrics::new(), server.router(), CancellationToken::new(), &limits);
    let address = open_socket(&all).await;
    let (get, post) = ("GET /_matrix/client/versions", "POST /_matrix/client/v3/login");
    let cases = [
        (get, "1.1", "", "", 400),
        (get, "1.1", "Host: x\r\nHost: y\r\n", "", 400),
        (get, "1.1", "Host: x\r\n", "", 200),
        (get, "1.1", "Host:\r\n", "", 200),
        (get, "1.0", "", "", 200),
        (post, "1.1", "Host: x\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n", "{}", 415),
        (post, "1.1", "Host: x\r\nContent-Encoding: identity, BR\r\nContent-Length: 2\r\n", "{}", 415),
        (post, "1.1", "Host: x\r\nContent-Encoding: Identity\r\nContent-Length: 2\r\n", "{}", 400),
        (post, "1.1", "Host: x\r\nTransfer-Encoding: gzip, chunked\r\n", "2\r\n{}\r\n0\r\n\r\n", 501),
        (post, "1.1", "Host: x\r\nTransfer-Encoding: Chunked\r\n", "2\r\n{}\r\n0\r\n\r\n", 400),
    ];
    for (line, version, fields, body, status) in cases {
        let mut client = connect_to(&address).await;
        let request = format!("{line} HTTP/{version}\r\nConnection: close\r\n{fields}\r\n{body}");
        client.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.contains(&format!(" {status} ")), "{request}: {answer}");
        assert!(status == 200 || answer.contains("errcode"), "{request}: {answer}");
    }
    all.stopping.cancel();
    server.stop().await.unwrap();
}

/// A client that speaks HTTP/2 frame by frame, with a window of one byte for each answer.
struct NarrowClient {
    env: Env,
    stream: DuplexStream,
    last_id: u32,
    data: usize,
}

impl NarrowClient {
    async fn connect(all: &Listening) -> Self {
        let mut it = Self { env: all.env.clone(), stream: connect(all).await, last_id: 0, data: 0 };
        it.stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        // The setting 4 is the window with which an answer begins.
        it.frame(4, 0, 0, &[0, 4, 0, 0, 0, 1]).await;
        it
    }

    /// Sends a frame; that the connection is gone is seen when nothing more can be read.
    async fn frame(&mut self, kind: u8, flags: u8, id: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let head = [&length[1..], &[kind, flags], &id.to_be_bytes()].concat();
        let _ = self.stream.write_all(&[&head, payload].concat()).await;
    }

    async fn get(&mut self, path: &str) -> u32 {
        self.last_id = if self.last_id == 0 { 1 } else { self.last_id + 2 };
        // GET and http from the static table, then path and authority as they are.
        let mut head = vec![0x82, 0x86, 0x04, u8::try_from(path.len()).unwrap()];
        head.extend(path.as_bytes());
        head.extend([0x41, 1, b'x']);
        // The head and the request end with this frame.
        self.frame(1, 0x5, self.last_id, &head).await;
        self.last_id
    }

    /// Reads for this long, and answers pings and settings as a client must. False when the server has ended the connection.
    async fn read_for(&mut self, seconds: u64) -> bool {
        let until = self.env.instant() + Duration::from_secs(seconds);
        loop {
            let mut head = [0; 9];
            match tokio::time::timeout_at(until, self.stream.read_exact(&mut head)).await {
                Err(_) => return true,
                Ok(Err(_)) => return false,
                Ok(Ok(_)) => {}
            }
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length as usize];
            if self.stream.read_exact(&mut payload).await.is_err() {
                return false;
            }
            match (head[3], head[4]) {
                (0, _) => self.data += payload.len(),
                (4, 0) => self.frame(4, 1, 0, &[]).await,
                (6, 0) => self.frame(6, 1, 0, &payload).await,
                _ => {}
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_http2_windows_pin_ends_its_connection() {
    // A small answer is taken whole and waits for the window; of a large one, pieces wait to be taken.
    for (path, ends) in [("/page", 100..=160), ("/large", 25..=160)] {
        for drips in [false, true] {
            let all = listening().await;
            let mut client = NarrowClient::connect(&all).await;
            let page = client.get(path).await;
            let mut seconds = 0;
            while client.read_for(1).await && seconds < 1_000 {
                seconds += 1;
                if drips {
                    // The window of the answer grows by one byte a second.
                    client.frame(8, 0, page, &[0, 0, 0, 1]).await;
                }
                // Other requests keep the connection from being idle.
                if seconds % 20 == 0 {
                    client.get("/nothing").await;
                }
            }
            assert!(client.data > 0, "the answer has begun");
            assert!(ends.contains(&seconds), "{path}, drips: {drips}, seconds: {seconds}");
        }
    }
}

#[test]
fn a_client_cannot_hide_the_address_that_its_proxy_adds() {
    let from = |values: &[&[u8]]| {
        let mut request = Request::new(());
        for value in values {
            let value = header::HeaderValue::from_bytes(value).unwrap();
            request.headers_mut().append("x-forwarded-for", value);
        }
        forwarded(&request).map(|address| address.to_string())
    };
    let cases: [(&[&[u8]], Option<&str>); 9] = [
        (&[b"9.9.9.9"], Some("9.9.9.9")),
        (&[b"1.1.1.1, 9.9.9.9"], Some("9.9.9.9")),
        (&[b"\xe9, 9.9.9.9"], Some("9.9.9.9")),
        (&[b"\xff\xfe", b"9.9.9.9"], Some("9.9.9.9")),
        (&[b"1.1.1.1,9.9.9.9:5678"], Some("9.9.9.9")),
        (&[b"[2001:db8::1]:5678"], Some("2001:db8::1")),
        (&[b"\xe9,[2001:db8::1]"], Some("2001:db8::1")),
        (&[b"2001:db8::1"], Some("2001:db8::1")),
        (&[b"9.9.9.9, unknown"], None),
    ];
    for (values, address) in cases {
        assert_eq!(from(values).as_deref(), address, "{values:?}");
    }
}
