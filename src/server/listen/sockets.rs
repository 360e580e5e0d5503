//! Tests of sockets in which time passes, over streams in memory: pings, slow clients, tokens that expire. The client is a
//! library that is not ours.

use futures_util::{SinkExt, StreamExt};
use http::HeaderValue;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, client::IntoClientRequest, protocol::CloseFrame},
};

use super::*;
use crate::{
    flows::account::register::{self, Wish},
    server::Server,
};

type Client = WebSocketStream<DuplexStream>;

/// A server that listens, and people who have accounts there.
struct Scene {
    server: Server,
    all: Listening,
}

impl Scene {
    fn new() -> Self {
        Self::over(Env::simulated(1, 0))
    }

    fn over(env: Env) -> Self {
        let server = Server::in_memory(env);
        let all = server.listening();
        Self { server, all }
    }

    /// Makes an account, and gives its access token, which expires if it can be refreshed.
    async fn register(&self, name: &str, refreshable: bool) -> String {
        let log_in = Some(crate::accounts::devices::LogIn::default());
        let wish = Wish { username: Some(name.to_owned()), password: None, log_in, refreshable };
        let made = register::register_by_operator(self.server.app(), wish, None).await.unwrap();
        made.session.unwrap().tokens.access_token
    }

    /// A stream in memory that the server serves, with so much room for bytes that the client has not read.
    async fn connect(&self, room_bytes: usize) -> DuplexStream {
        let (client, server) = tokio::io::duplex(room_bytes);
        let place = self.all.connections.admit(None).await.unwrap();
        let it = self.all.clone();
        self.all.spawn(place, |place| async move {
            it.serve(server, place, IpAddr::from([192, 0, 2, 1]), false).await;
        });
        client
    }

    async fn open(&self, token: &str) -> Client {
        self.open_with(token, 64 << 10).await
    }

    async fn open_with(&self, token: &str, room_bytes: usize) -> Client {
        let mut request = "ws://x/_aqueduct/client/v1/socket".into_client_request().unwrap();
        let bearer = HeaderValue::try_from(format!("Bearer {token}")).unwrap();
        request.headers_mut().insert(header::AUTHORIZATION, bearer);
        let stream = self.connect(room_bytes).await;
        tokio_tungstenite::client_async(request, stream).await.unwrap().0
    }

    /// Asks over HTTP, in memory.
    async fn http(&self, method: &str, path: &str, token: &str, body: Value) -> Value {
        let request = Request::builder().method(method).uri(format!("/_matrix/client/v3{path}"));
        let request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        let request = request.body(Body::from(body.to_string())).unwrap();
        let answer = self.server.router().oneshot(request).await.unwrap();
        let body = http_body_util::BodyExt::collect(answer.into_body()).await.unwrap().to_bytes();
        serde_json::from_slice(&body).unwrap()
    }

    async fn room(&self, token: &str) -> String {
        let made = self.http("POST", "/createRoom", token, json!({ "preset": "public_chat" })).await;
        made["room_id"].as_str().unwrap().to_owned()
    }

    async fn send(&self, token: &str, room: &str, txn: &str, body: &str) {
        let room = room.replace('!', "%21").replace(':', "%3A");
        let path = format!("/rooms/{room}/send/m.room.message/{txn}");
        let sent = self.http("PUT", &path, token, json!({ "msgtype": "m.text", "body": body })).await;
        assert!(sent["event_id"].is_string(), "{sent}");
    }

    fn sockets(&self) -> String {
        let text = self.server.app().metrics.text();
        let line = text.lines().find(|line| line.starts_with("aqueduct_sockets "));
        line.unwrap().split(' ').nth(1).unwrap().to_owned()
    }
}

async fn say(client: &mut Client, message: Value) {
    client.send(Message::text(message.to_string())).await.unwrap();
}

/// The next message that is text. Pings are answered meanwhile.
async fn hear(client: &mut Client) -> Value {
    loop {
        match client.next().await.unwrap().unwrap() {
            Message::Text(text) => return serde_json::from_str(&text).unwrap(),
            Message::Ping(_) | Message::Pong(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Reads until the server ends the socket, and gives the code.
async fn code(client: &mut Client) -> Option<u16> {
    loop {
        match client.next().await {
            Some(Ok(Message::Close(frame))) => return frame.map(|CloseFrame { code, .. }| code.into()),
            Some(Ok(_)) => {}
            Some(Err(_)) | None => return None,
        }
    }
}

/// Follows the news from this position, and gives the first of them.
async fn follow(client: &mut Client, since: Option<&str>) -> Value {
    say(client, json!({ "id": "sync", "method": "sync", "params": { "since": since } })).await;
    assert_eq!(hear(client).await, json!({ "id": "sync", "result": {} }));
    hear(client).await
}

fn pos(news: &Value) -> String {
    news["params"]["next_batch"].as_str().unwrap_or_else(|| panic!("{news}")).to_owned()
}

#[tokio::test(start_paused = true)]
async fn a_socket_on_which_nothing_happens_stays_open_and_is_no_idle_connection() {
    let scene = Scene::new();
    let token = scene.register("alice", false).await;
    let mut client = scene.open(&token).await;
    let began = scene.all.env.instant();
    let mut pings = Vec::new();
    while pings.len() < 100 {
        if let Message::Ping(_) = client.next().await.unwrap().unwrap() {
            pings.push(scene.all.env.instant().saturating_duration_since(began).as_secs());
        }
    }
    assert_eq!(pings, (1..=100).map(|number| 30 * number).collect::<Vec<_>>());
    assert_eq!(scene.sockets(), "1");
    // The connection is the only one, and makes no room for another.
    let full = Connections::new(scene.all.env.clone(), scene.all.metrics.clone(), 1, 1);
    let mut other = Scene { server: scene.server.clone(), all: scene.all.clone() };
    other.all.connections = full;
    let mut second = other.open(&token).await;
    let newcomer = tokio::time::timeout(Duration::from_secs(20), other.all.connections.admit(None)).await;
    assert!(newcomer.is_err());
    second.close(None).await.unwrap();
    assert_eq!(code(&mut second).await, Some(1000));
    drop(second);
    other.all.connections.admit(None).await.unwrap();
    say(&mut client, json!({ "id": 1, "method": "nothing" })).await;
    assert_eq!(hear(&mut client).await["error"]["errcode"], "M_UNRECOGNIZED");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_gone_without_a_word_is_noticed() {
    let scene = Scene::new();
    let token = scene.register("alice", false).await;
    let mut client = scene.open(&token).await;
    // The library answers pings only while it reads.
    scene.all.env.sleep(Duration::from_secs(59)).await;
    assert_eq!(scene.sockets(), "1");
    scene.all.env.sleep(Duration::from_secs(2)).await;
    assert_eq!(code(&mut client).await, Some(4009));
    let mut client = scene.open(&token).await;
    scene.all.env.sleep(Duration::from_secs(66)).await;
    assert_eq!(scene.sockets(), "0", "the reason is not waited for without end");
    assert_eq!(code(&mut client).await, None);
}

#[tokio::test(start_paused = true)]
async fn a_message_that_does_not_end_ends_its_socket() {
    let scene = Scene::new();
    let token = scene.register("alice", false).await;
    let mut client = scene.open(&token).await;
    // The head of a frame, of which a byte comes now and then.
    client.get_mut().write_all(&[0x81, 0xfe, 0x10, 0, 1, 2, 3, 4]).await.unwrap();
    for _ in 0..5 {
        client.get_mut().write_all(b"a").await.unwrap();
        scene.all.env.sleep(Duration::from_secs(10)).await;
    }
    assert_eq!(scene.sockets(), "1");
    scene.all.env.sleep(Duration::from_secs(11)).await;
    assert_eq!(code(&mut client).await, Some(4008));
}

#[tokio::test(start_paused = true)]
async fn a_slow_client_is_left_with_a_code_and_loses_nothing() {
    let scene = Scene::new();
    let token = scene.register("alice", false).await;
    let room = scene.room(&token).await;
    for txn in 0..10 {
        scene.send(&token, &room, &txn.to_string(), &"x".repeat(20_000)).await;
    }
    let mut client = scene.open_with(&token, 4 << 10).await;
    say(&mut client, json!({ "id": 1, "method": "sync" })).await;
    assert_eq!(hear(&mut client).await, json!({ "id": 1, "result": {} }));
    // The client reads nothing more, while some 200 KiB wait for it.
    scene.all.env.sleep(Duration::from_secs(32)).await;
    assert_eq!(scene.sockets(), "1", "it has some seconds to take the reason");
    let mut bytes = Vec::new();
    client.get_mut().read_to_end(&mut bytes).await.unwrap();
    // The frame that was begun ends, and the end of the socket follows.
    let reason = "The client is too slow; go on from the last position.".as_bytes();
    assert!(bytes.ends_with(&[&4008_u16.to_be_bytes(), reason].concat()), "{}", bytes.len());
    assert!(bytes.len() < 100_000, "{}", bytes.len());
    assert_eq!(scene.sockets(), "0");
    let mut again = scene.open(&token).await;
    let news = follow(&mut again, None).await;
    let events = news["params"]["rooms"]["join"][&room]["timeline"]["events"].as_array().unwrap();
    assert_eq!(events.len(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_trickles_its_news_away_is_left_and_one_that_reads_slowly_is_not() {
    let scene = Scene::new();
    let token = scene.register("alice", false).await;
    let room = scene.room(&token).await;
    for txn in 0..10 {
        scene.send(&token, &room, &txn.to_string(), &"x".repeat(20_000)).await;
    }
    for (bytes_at_once, comes_whole) in [(100, false), (20 << 10, true)] {
        let mut client = scene.open_with(&token, 4 << 10).await;
        say(&mut client, json!({ "id": 1, "method": "sync" })).await;
        assert_eq!(hear(&mut client).await, json!({ "id": 1, "result": {} }));
        let mut read = 0;
        for second in 0..200 {
            let mut some = vec![0; bytes_at_once];
            // The server pings, and takes this for a pong.
            let _ = client.get_mut().write_all(&[0x8a, 0x80, 0, 0, 0, 0]).await;
            let took = tokio::time::timeout(Duration::from_secs(5), async {
                let mut took = 0;
                while took < bytes_at_once {
                    match client.get_mut().read(&mut some[took..]).await {
                        Ok(0) | Err(_) => break,
                        Ok(bytes) => took += bytes,
                    }
                }
                took
            });
            read += took.await.unwrap_or_default();
            scene.all.env.sleep(Duration::from_secs(5)).await;
            if second > 100 && read == 0 {
                break;
            }
        }
        assert_eq!(read > 200_000, comes_whole, "{bytes_at_once}: {read}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_ends_its_socket_at_the_moment_it_expires() {
    let scene = Scene::new();
    let token = scene.register("alice", true).await;
    let began = scene.all.env.instant();
    let mut client = scene.open(&token).await;
    assert_eq!(code(&mut client).await, Some(4002));
    let took = scene.all.env.instant().saturating_duration_since(began);
    assert_eq!(took.as_millis() / 1_000, 60 * 60);
}

#[tokio::test(start_paused = true)]
async fn a_position_that_moves_without_news_is_told_now_and_then() {
    let scene = Scene::new();
    let (alice, bob) = (scene.register("alice", false).await, scene.register("bob", false).await);
    let room = scene.room(&bob).await;
    let mut client = scene.open(&alice).await;
    let first = pos(&follow(&mut client, None).await);
    say(&mut client, json!({ "method": "ack", "params": { "pos": first } })).await;
    scene.all.env.sleep(Duration::from_millis(1)).await;
    let began = scene.all.env.instant();
    scene.send(&bob, &room, "1", "alice is not there").await;
    let moved = hear(&mut client).await;
    let took = scene.all.env.instant().saturating_duration_since(began).as_secs();
    assert!((119..=121).contains(&took), "{took}");
    assert_ne!(pos(&moved), first);
    assert!(moved["params"]["rooms"].is_null(), "{moved}");
    // Where nothing happens at all, nothing is told. It does once or twice more: that bob is gone, after a while, is noted.
    let mut last = pos(&moved);
    for told in 0.. {
        say(&mut client, json!({ "method": "ack", "params": { "pos": last } })).await;
        match tokio::time::timeout(Duration::from_secs(1_000), hear(&mut client)).await {
            Ok(more) => {
                assert!(told < 4 && more["params"]["rooms"].is_null(), "{more}");
                assert_ne!(pos(&more), last);
                last = pos(&more);
            }
            Err(_) => return,
        }
    }
}

#[tokio::test(start_paused = true)]
async fn sockets_and_polls_of_a_device_do_not_send_each_other_away() {
    let scene = Scene::new();
    let token = scene.register("alice", false).await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        let mut client = scene.open(&token).await;
        let pos = pos(&follow(&mut client, None).await);
        say(&mut client, json!({ "method": "ack", "params": { "pos": pos } })).await;
        clients.push((client, pos));
    }
    scene.all.env.sleep(Duration::from_secs(1)).await;
    // A device has four places for polls over HTTP, and sockets take none of them.
    let path = format!("/sync?timeout=60000&since={}", clients[0].1);
    let polls = (0..3).map(|_| scene.http("GET", &path, &token, Value::Null));
    let before = scene.server.app().metrics.text();
    let (_, ()) = tokio::join!(
        tokio::time::timeout(Duration::from_secs(10), futures_util::future::join_all(polls)),
        async {
            for (client, _) in &mut clients {
                assert!(tokio::time::timeout(Duration::from_secs(9), hear(client)).await.is_err());
            }
        }
    );
    let count = |text: &str| {
        let line = text.lines().find(|line| line.contains("http_requests_total") && line.contains("/sync"));
        line.and_then(|line| line.rsplit(' ').next()).map_or(0, |count| count.parse::<u64>().unwrap())
    };
    let asked = count(&scene.server.app().metrics.text()) - count(&before);
    assert_eq!(asked, 0, "what waits is not asked again and again");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_stops_answers_what_is_under_way_and_says_so() {
    // The disk is slow, so that what is sent is under way for a while.
    let scene = Scene::over(Env::simulated_with_disk(1, 0, Duration::from_millis(500)));
    let token = scene.register("alice", false).await;
    let room = scene.room(&token).await;
    let mut client = scene.open(&token).await;
    let first = pos(&follow(&mut client, None).await);
    for id in 0..3 {
        let params = json!({ "room_id": room, "type": "m.x", "txn_id": id.to_string(), "content": {} });
        say(&mut client, json!({ "id": id, "method": "send", "params": params })).await;
    }
    scene.all.env.sleep(Duration::from_millis(1)).await;
    scene.server.app().stopping.cancel();
    let began = scene.all.env.instant();
    let client = async {
        let mut answered = Vec::new();
        loop {
            match client.next().await {
                Some(Ok(Message::Text(text))) => answered.push(serde_json::from_str::<Value>(&text).unwrap()),
                Some(Ok(Message::Close(frame))) => {
                    return (answered, frame.map(|frame| u16::from(frame.code)));
                }
                Some(Ok(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    };
    let (ended, (answered, code)) =
        tokio::join!(tokio::time::timeout(Duration::from_secs(3), scene.all.drained()), client);
    ended.unwrap();
    assert_eq!(code, Some(1012));
    assert!(scene.all.env.instant() > began, "nothing was under way");
    for (id, answer) in answered.iter().enumerate() {
        assert!(answer["id"] == id && answer["result"]["event_id"].is_string(), "{answer}");
    }
    assert_eq!(answered.len(), 3);
    assert_eq!(scene.sockets(), "0");
    // A client that comes back goes on from its position.
    let again = Scene { server: scene.server.clone(), all: scene.all.clone() };
    let told = again.http("GET", &format!("/sync?since={first}"), &token, Value::Null).await;
    assert_eq!(told["rooms"]["join"][&room]["timeline"]["events"].as_array().unwrap().len(), 3);
}
