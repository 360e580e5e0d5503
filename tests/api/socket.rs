//! The WebSocket of `docs/socket.md`, over a real listener and with a client that is not ours. Tests in which time passes are
//! beside the listener (`src/server/listen/sockets.rs`).

use std::{collections::VecDeque, net::SocketAddr, time::Duration};

use aqueduct::{
    config::Listener,
    flows::operator::operate::{Command, operate},
    server::Listening,
};
use futures_util::{SinkExt, StreamExt};
use http::{HeaderValue, StatusCode, header};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message,
        client::IntoClientRequest,
        handshake::client::{Request, Response},
        protocol::{
            CloseFrame,
            frame::{
                Frame,
                coding::{Data, OpCode},
            },
        },
    },
};

use crate::support::{TestClient, TestServer, encoded};

/// A server that listens on a free port of this machine.
struct Listens {
    server: TestServer,
    listening: Listening,
    address: SocketAddr,
}

impl Listens {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut aqueduct::config::Config)) -> Self {
        let server = TestServer::real(change);
        let listening = server.server().listening();
        let listener = Listener { address: Some(([127, 0, 0, 1], 0).into()), ..Listener::default() };
        let place = listening.open(&listener).await.unwrap();
        let address = place.strip_prefix("http://").unwrap().parse().unwrap();
        Self { server, listening, address }
    }

    fn env(&self) -> &aqueduct::env::Env {
        &self.server.server().app().env
    }

    async fn open(&self, client: &TestClient) -> Socket {
        let mut request = self.request();
        let bearer = format!("Bearer {}", client.token.as_deref().unwrap());
        request.headers_mut().insert(header::AUTHORIZATION, HeaderValue::try_from(bearer).unwrap());
        self.shake_hands(request).await.unwrap().0
    }

    fn request(&self) -> Request {
        format!("ws://{}/_aqueduct/client/v1/socket", self.address).into_client_request().unwrap()
    }

    async fn shake_hands(&self, request: Request) -> Result<(Socket, Response), tungstenite::Error> {
        #[expect(clippy::disallowed_methods, reason = "a client of the server that is tested")]
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (stream, response) = tokio_tungstenite::client_async(request, stream).await?;
        Ok((Socket { stream, last_id: 0, news: VecDeque::new() }, response))
    }

    /// The status and the code with which this handshake is refused.
    async fn refused(&self, request: Request) -> (StatusCode, Value) {
        match self.shake_hands(request).await {
            Err(tungstenite::Error::Http(response)) => {
                let body = response.body().as_deref().map(serde_json::from_slice::<Value>);
                (response.status(), body.and_then(Result::ok).unwrap_or_default()["errcode"].take())
            }
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("it is opened"),
        }
    }
}

/// The client's end of a socket.
struct Socket {
    stream: WebSocketStream<TcpStream>,
    last_id: u64,
    /// The news that came while answers were waited for.
    news: VecDeque<Value>,
}

impl Socket {
    async fn say(&mut self, message: Value) {
        self.stream.send(Message::text(message.to_string())).await.unwrap();
    }

    /// The next message that is text.
    async fn hear(&mut self) -> Value {
        let heard = tokio::time::timeout(Duration::from_secs(60), async {
            loop {
                match self.stream.next().await.unwrap().unwrap() {
                    Message::Text(text) => return serde_json::from_str(&text).unwrap(),
                    Message::Ping(_) | Message::Pong(_) => {}
                    other => panic!("{other:?}"),
                }
            }
        });
        heard.await.unwrap()
    }

    async fn ask(&mut self, method: &str, params: Value) -> Value {
        self.last_id += 1;
        let id = self.last_id;
        self.say(json!({ "id": id, "method": method, "params": params })).await;
        loop {
            let mut message = self.hear().await;
            if message["method"] == "sync" {
                self.news.push_back(message);
                continue;
            }
            assert_eq!(message["id"], id, "{message}");
            message.as_object_mut().unwrap().remove("id");
            return message;
        }
    }

    async fn ok(&mut self, method: &str, params: Value) -> Value {
        let mut answer = self.ask(method, params).await;
        assert!(answer["result"].is_object(), "{method}: {answer}");
        answer["result"].take()
    }

    async fn errcode(&mut self, method: &str, params: Value) -> String {
        let answer = self.ask(method, params).await;
        answer["error"]["errcode"].as_str().unwrap_or_else(|| panic!("{method}: {answer}")).to_owned()
    }

    async fn news(&mut self) -> Value {
        let mut news = match self.news.pop_front() {
            Some(news) => news,
            None => self.hear().await,
        };
        assert_eq!(news["method"], "sync", "{news}");
        assert!(news["params"].is_object(), "{news}");
        news["params"].take()
    }

    async fn ack(&mut self, news: &Value) {
        self.say(json!({ "method": "ack", "params": { "pos": news["next_batch"] } })).await;
    }

    /// Whether nothing is said for a while.
    async fn is_silent(&mut self) -> bool {
        let heard = tokio::time::timeout(Duration::from_millis(300), self.hear()).await;
        self.news.is_empty() && heard.is_err()
    }

    /// The code with which the server ends the socket.
    async fn code(&mut self) -> Option<u16> {
        let ended = tokio::time::timeout(Duration::from_secs(20), async {
            loop {
                match self.stream.next().await {
                    Some(Ok(Message::Close(frame))) => {
                        return frame.map(|CloseFrame { code, .. }| code.into());
                    }
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => return None,
                }
            }
        });
        ended.await.unwrap()
    }
}

/// The events in the timeline of a room that the news tell.
fn timeline(news: &Value, room: &str) -> Vec<Value> {
    news["rooms"]["join"][room]["timeline"]["events"].as_array().cloned().unwrap_or_default()
}

/// A room of this client, in which the others are.
async fn room(client: &TestClient, others: &[&TestClient]) -> String {
    let made = client.ok_post("/createRoom", json!({ "preset": "public_chat" })).await;
    let room = made["room_id"].as_str().unwrap().to_owned();
    for other in others {
        other.ok_post(&format!("/join/{}", encoded(&room)), json!({})).await;
    }
    room
}

/// The messages of a room, the oldest first.
async fn messages(client: &TestClient, room: &str) -> Vec<Value> {
    let path = format!("/rooms/{}/messages?dir=b&limit=100", encoded(room));
    let mut events = client.ok_get(&path).await["chunk"].as_array().unwrap().clone();
    events.retain(|event| event["type"] == "m.room.message");
    events.reverse();
    events
}

fn text(body: &str) -> Value {
    json!({ "msgtype": "m.text", "body": body })
}

#[tokio::test(flavor = "multi_thread")]
async fn each_method_does_the_same_as_its_endpoint() {
    let listens = Listens::new().await;
    let alice = listens.server.register("alice").await;
    let bob = listens.server.register("bob").await;
    let room = room(&alice, &[&bob]).await;
    let mut socket = listens.open(&alice).await;
    let sent = socket
        .ok(
            "send",
            json!({ "room_id": room, "type": "m.room.message", "txn_id": "a/b c", "content": text("x") }),
        )
        .await;
    let event = sent["event_id"].as_str().unwrap().to_owned();
    assert_eq!(messages(&bob, &room).await[0]["content"], text("x"));
    let params = json!({ "room_id": room, "type": "m.room.topic", "content": { "topic": "t" } });
    socket.ok("state", params).await;
    let topic = format!("/rooms/{}/state/m.room.topic", encoded(&room));
    assert_eq!(bob.ok_get(&topic).await["topic"], "t");
    let params = json!({ "room_id": room, "type": "m.x", "state_key": "a/\u{e4}", "content": { "k": 1 } });
    socket.ok("state", params).await;
    let path = format!("/rooms/{}/state/m.x/{}", encoded(&room), encoded("a/\u{e4}"));
    assert_eq!(bob.ok_get(&path).await["k"], 1);
    let told = bob.ok_get("/sync").await;
    let since = told["next_batch"].as_str().unwrap().to_owned();
    assert_eq!(
        socket.ok("typing", json!({ "room_id": room, "typing": true, "timeout": 20_000 })).await,
        json!({})
    );
    socket.ok("receipt", json!({ "room_id": room, "receipt_type": "m.read", "event_id": event })).await;
    socket.ok("read_markers", json!({ "room_id": room, "m.fully_read": event })).await;
    let news = bob.ok_get(&format!("/sync?since={since}")).await;
    let ephemeral = news["rooms"]["join"][&room]["ephemeral"]["events"].as_array().unwrap();
    assert!(ephemeral.iter().any(|it| it["content"]["user_ids"] == json!([alice.user_id])), "{ephemeral:?}");
    assert!(ephemeral.iter().any(|it| it["content"][&event]["m.read"][&alice.user_id].is_object()));
    let path =
        format!("/user/{}/rooms/{}/account_data/m.fully_read", encoded(&alice.user_id), encoded(&room));
    assert_eq!(alice.ok_get(&path).await["event_id"], event);
    let messages_to = json!({ &bob.user_id: { &bob.device_id: { "k": 1 } } });
    socket.ok("to_device", json!({ "type": "m.x", "txn_id": "1", "messages": messages_to })).await;
    let news = bob.ok_get(&format!("/sync?since={since}")).await;
    assert_eq!(news["to_device"]["events"][0]["content"], json!({ "k": 1 }));
    let params = json!({ "room_id": room, "event_id": event, "txn_id": "2", "reason": "r" });
    let redaction = socket.ok("redact", params).await["event_id"].as_str().unwrap().to_owned();
    let path = format!("/rooms/{}/event/{}", encoded(&room), encoded(&redaction));
    assert_eq!(bob.ok_get(&path).await["content"]["reason"], "r");
    listens.server.assert_whole();
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_are_those_of_the_endpoints() {
    let listens = Listens::new().await;
    let alice = listens.server.register("alice").await;
    let bob = listens.server.register("bob").await;
    let room = room(&alice, &[]).await;
    let mut socket = listens.open(&bob).await;
    let content = text("x");
    let send =
        |room: &str| json!({ "room_id": room, "type": "m.room.message", "txn_id": "1", "content": content });
    let over_http = format!("/_matrix/client/v3/rooms/{}/send/m.room.message/1", encoded(&room));
    let (_, refused) = bob.put(&over_http, text("x")).await;
    assert_eq!(socket.ask("send", send(&room)).await, json!({ "error": refused }));
    let cases = [
        ("send", send("no room"), "M_INVALID_PARAM"),
        ("send", json!({ "room_id": room, "type": "m.x", "txn_id": "1", "content": [] }), "M_BAD_JSON"),
        ("send", json!({ "room_id": room, "type": "m.x", "txn_id": "1" }), "M_MISSING_PARAM"),
        ("typing", json!({ "room_id": room, "typing": 5 }), "M_BAD_JSON"),
        ("receipt", json!({ "room_id": room, "receipt_type": "m.odd", "event_id": "$x" }), "M_INVALID_PARAM"),
        ("to_device", json!({ "type": "m.x", "txn_id": "1" }), "M_MISSING_PARAM"),
        ("nothing", json!({}), "M_UNRECOGNIZED"),
        ("sync", json!({ "since": "nonsense" }), "M_INVALID_PARAM"),
        ("sync", json!({ "filter": "nonsense" }), "M_INVALID_PARAM"),
        ("sync", json!({ "filter": { "room": 5 } }), "M_INVALID_PARAM"),
        ("sync", json!({ "filter": { "room": { "rooms": ["x".repeat(20_000)] } } }), "M_TOO_LARGE"),
        ("sync", json!({ "since": "x".repeat(60_000) }), "M_TOO_LARGE"),
        ("ack", json!({ "pos": "s1_2_3" }), "M_INVALID_PARAM"),
    ];
    for (method, params, code) in cases {
        assert_eq!(socket.errcode(method, params.clone()).await, code, "{method} {params}");
    }
    for odd in ["", "5", "[]", "{", "{\"id\": 1}", "{\"id\": {}, \"method\": \"sync\"}", "\"\\ud800\""] {
        socket.stream.send(Message::text(odd)).await.unwrap();
        let answer = socket.hear().await;
        assert!(answer["error"]["errcode"].is_string(), "{odd}: {answer}");
        assert_eq!(answer["id"], if odd == "{\"id\": 1}" { json!(1) } else { Value::Null }, "{odd}");
    }
    // An ack without an id is answered only where it is refused.
    socket.say(json!({ "method": "ack", "params": { "pos": "s1_2_3" } })).await;
    assert_eq!(socket.hear().await["id"], Value::Null);
    assert!(socket.is_silent().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_over_http_and_over_any_socket_is_one_event() {
    let listens = Listens::new().await;
    let alice = listens.server.register("alice").await;
    let room = room(&alice, &[]).await;
    let (mut first, mut second) = (listens.open(&alice).await, listens.open(&alice).await);
    let params = json!({ "room_id": room, "type": "m.room.message", "txn_id": "t", "content": text("once") });
    let by_socket = first.ok("send", params.clone()).await;
    let path = format!("/rooms/{}/send/m.room.message/t", encoded(&room));
    assert_eq!(alice.ok_put(&path, text("once")).await, by_socket);
    assert_eq!(second.ok("send", params).await, by_socket);
    let path = format!("/rooms/{}/send/m.room.message/u", encoded(&room));
    let by_http = alice.ok_put(&path, text("twice")).await;
    let params =
        json!({ "room_id": room, "type": "m.room.message", "txn_id": "u", "content": text("twice") });
    assert_eq!(second.ok("send", params.clone()).await, by_http);
    // All at once, by all ways.
    let params =
        |txn: &str| json!({ "room_id": room, "type": "m.room.message", "txn_id": txn, "content": text(txn) });
    let path = format!("/rooms/{}/send/m.room.message/v", encoded(&room));
    let (a, b, c) = tokio::join!(
        first.ok("send", params("v")),
        second.ok("send", params("v")),
        alice.ok_put(&path, text("v"))
    );
    assert!(a == b && b == c, "{a} {b} {c}");
    let said: Vec<_> = messages(&alice, &room).await;
    let said: Vec<_> = said.iter().map(|event| event["content"]["body"].as_str().unwrap()).collect();
    assert_eq!(said, ["once", "twice", "v"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn news_come_by_themselves_one_after_the_other() {
    let listens = Listens::new().await;
    let alice = listens.server.register("alice").await;
    let bob = listens.server.register("bob").await;
    let room = room(&alice, &[&bob]).await;
    let mut socket = listens.open(&alice).await;
    assert_eq!(socket.ok("sync", json!({})).await, json!({}));
    let first = socket.news().await;
    assert!(!timeline(&first, &room).is_empty(), "{first}");
    let send = |txn: &'static str| {
        let path = format!("/rooms/{}/send/m.room.message/{txn}", encoded(&room));
        let bob = bob.clone();
        async move { bob.ok_put(&path, text(txn)).await }
    };
    // Nothing more comes before the first is acknowledged.
    send("1").await;
    assert!(socket.is_silent().await);
    socket.ack(&first).await;
    let second = socket.news().await;
    assert_eq!(timeline(&second, &room).len(), 1);
    assert_eq!(socket.errcode("ack", json!({ "pos": first["next_batch"] })).await, "M_INVALID_PARAM");
    assert!(socket.is_silent().await, "a wrong ack changes nothing");
    assert_eq!(socket.ok("ack", json!({ "pos": second["next_batch"] })).await, json!({}));
    assert_eq!(socket.errcode("ack", json!({ "pos": second["next_batch"] })).await, "M_INVALID_PARAM");
    // News that comes while the client waits is told at once.
    assert!(socket.is_silent().await);
    let began = listens.env().instant();
    send("2").await;
    let third = socket.news().await;
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!(timeline(&third, &room)[0]["content"], text("2"));
    // The client that lost its socket goes on from what it has acknowledged, over a socket or HTTP.
    drop(socket);
    let mut socket = listens.open(&alice).await;
    socket.ok("sync", json!({ "since": second["next_batch"] })).await;
    let ids =
        |news: &Value| timeline(news, &room).iter().map(|it| it["event_id"].clone()).collect::<Vec<_>>();
    assert_eq!(ids(&socket.news().await), ids(&third));
    let path = format!("/sync?since={}", second["next_batch"].as_str().unwrap());
    assert_eq!(ids(&alice.ok_get(&path).await), ids(&third));
}

#[tokio::test(flavor = "multi_thread")]
async fn sliding_sync_is_told_the_same_way() {
    let listens = Listens::new().await;
    let alice = listens.server.register("alice").await;
    let bob = listens.server.register("bob").await;
    let room = room(&alice, &[&bob]).await;
    let mut socket = listens.open(&alice).await;
    let body = |timeline_limit: u32, since: &Value| {
        json!({
            "conn_id": "here",
            "lists": { "all": { "ranges": [[0, 10]], "timeline_limit": timeline_limit, "required_state": [] } },
            "extensions": { "to_device": { "enabled": true, "since": since } },
        })
    };
    socket.ok("sync", json!({ "sliding": body(1, &Value::Null) })).await;
    let first = socket.news().await;
    assert_eq!(first["rooms"][&room]["timeline"].as_array().unwrap().len(), 1, "{first}");
    assert_eq!(first["lists"]["all"]["count"], 1);
    let inbox = first["extensions"]["to_device"]["next_batch"].clone();
    socket
        .say(json!({ "method": "ack", "params": { "pos": first["pos"], "sliding": body(1, &inbox) } }))
        .await;
    assert!(socket.is_silent().await);
    let path = format!("/rooms/{}/send/m.room.message/1", encoded(&room));
    bob.ok_put(&path, text("x")).await;
    let second = socket.news().await;
    assert_eq!(second["rooms"][&room]["timeline"][0]["content"], text("x"), "{second}");
    // The body goes on until an ack brings another one: here, with the messages to the device that were kept.
    let messages = json!({ &alice.user_id: { &alice.device_id: { "k": 1 } } });
    bob.ok_put("/sendToDevice/m.x/1", json!({ "messages": messages })).await;
    socket.say(json!({ "method": "ack", "params": { "pos": second["pos"] } })).await;
    let third = socket.news().await;
    assert_eq!(third["extensions"]["to_device"]["events"][0]["content"], json!({ "k": 1 }), "{third}");
    let inbox = third["extensions"]["to_device"]["next_batch"].clone();
    socket
        .say(json!({ "method": "ack", "params": { "pos": third["pos"], "sliding": body(1, &inbox) } }))
        .await;
    assert!(socket.is_silent().await);
    // A client that comes back goes on from its position; one that this server does not know begins anew.
    drop(socket);
    let mut socket = listens.open(&alice).await;
    bob.ok_put(&format!("{path}2"), text("y")).await;
    socket.ok("sync", json!({ "sliding": body(1, &inbox), "since": third["pos"] })).await;
    assert_eq!(socket.news().await["rooms"][&room]["timeline"][0]["content"], text("y"));
    let unknown = json!({ "sliding": body(1, &inbox), "since": "nonsense" });
    assert_eq!(socket.errcode("sync", unknown).await, "M_UNKNOWN_POS");
    assert_eq!(socket.errcode("sync", json!({ "sliding": { "lists": 5 } })).await, "M_BAD_JSON");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_sync_takes_the_place_of_the_first() {
    let listens = Listens::new().await;
    let alice = listens.server.register("alice").await;
    let room = room(&alice, &[]).await;
    let mut socket = listens.open(&alice).await;
    socket.ok("sync", json!({})).await;
    let first = socket.news().await;
    let filter = json!({ "room": { "timeline": { "limit": 1 } } });
    socket.ok("sync", json!({ "filter": filter })).await;
    let second = socket.news().await;
    assert_eq!(timeline(&second, &room).len(), 1);
    assert!(timeline(&first, &room).len() > 1);
    let path = format!("/rooms/{}/send/m.room.message/1", encoded(&room));
    alice.ok_put(&path, text("x")).await;
    // The position of the first is the same if nothing happened between them; so another one stands for it here.
    assert_eq!(socket.errcode("ack", json!({ "pos": "s1_2_3" })).await, "M_INVALID_PARAM");
    socket.ack(&second).await;
    let third = socket.news().await;
    assert_eq!(timeline(&third, &room).len(), 1);
    // Two polls that are asked at once are both answered and one tells.
    let since = third["next_batch"].clone();
    alice.ok_put(&format!("{path}0"), text("y")).await;
    for id in ["a", "b"] {
        socket.say(json!({ "id": id, "method": "sync", "params": { "since": since } })).await;
    }
    let mut ids = Vec::new();
    let mut last = Value::Null;
    while ids.len() < 2 || last["method"] != "sync" {
        last = socket.hear().await;
        ids.extend(last["id"].as_str().map(str::to_owned));
    }
    assert_eq!(ids, ["a", "b"]);
    assert_eq!(timeline(&last["params"], &room)[0]["content"], text("y"), "{last}");
    assert!(socket.is_silent().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ack_confirms_messages_to_the_device() {
    let listens = Listens::new().await;
    let alice = listens.server.register("alice").await;
    let mut socket = listens.open(&alice).await;
    socket.ok("sync", json!({})).await;
    let begin = socket.news().await;
    socket.ack(&begin).await;
    let messages = json!({ &alice.user_id: { &alice.device_id: { "k": 1 } } });
    socket.say(json!({ "id": 9, "method": "to_device", "params": { "type": "m.x", "txn_id": "1", "messages": messages } })).await;
    let (one, two) = (socket.hear().await, socket.hear().await);
    let news = if one["method"] == "sync" { one } else { two }["params"].take();
    assert_eq!(news["to_device"]["events"][0]["content"], json!({ "k": 1 }), "{news}");
    // It is told again as long as it is not acknowledged.
    let path = format!("/sync?since={}", begin["next_batch"].as_str().unwrap());
    assert_eq!(alice.ok_get(&path).await["to_device"]["events"].as_array().unwrap().len(), 1);
    socket.ok("ack", json!({ "pos": news["next_batch"] })).await;
    for _ in 0..100 {
        if alice.ok_get("/sync").await["to_device"].is_null() {
            return;
        }
        listens.env().sleep(Duration::from_millis(20)).await;
    }
    panic!("it is still there");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_to_one_room_keep_their_order() {
    let listens = Listens::new().await;
    let alice = listens.server.register("alice").await;
    let rooms = [room(&alice, &[]).await, room(&alice, &[]).await];
    let mut socket = listens.open(&alice).await;
    for number in 0..100_usize {
        let params = json!({
            "room_id": rooms[number % 2], "type": "m.room.message", "txn_id": number.to_string(),
            "content": text(&number.to_string()),
        });
        socket.say(json!({ "id": number, "method": "send", "params": params })).await;
    }
    for _ in 0..100 {
        assert!(socket.hear().await["result"]["event_id"].is_string());
    }
    for (parity, room) in rooms.iter().enumerate() {
        let said: Vec<usize> = messages(&alice, room)
            .await
            .iter()
            .map(|event| event["content"]["body"].as_str().unwrap().parse().unwrap())
            .collect();
        assert_eq!(said, (0..50).map(|number| 2 * number + parity).collect::<Vec<_>>());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_ends_ends_its_sockets_with_the_reason() {
    let listens = Listens::new().await;
    let alice = listens.server.register("alice").await;
    let other = alice.on_device("OTHER").await;
    let (mut socket, mut stays) = (listens.open(&other).await, listens.open(&alice).await);
    socket.ok("sync", json!({})).await;
    other.ok_post("/logout", json!({})).await;
    assert_eq!(socket.code().await, Some(4001));
    stays.ok("sync", json!({})).await;
    // A token that was refreshed away is no longer good, though its device is.
    let login = json!({
        "type": "m.login.password", "identifier": { "type": "m.id.user", "user": "alice" },
        "password": "password of alice", "refresh_token": true,
    });
    let session = listens.server.anonymous().ok_post("/login", login).await;
    let token = session["access_token"].as_str().unwrap().to_owned();
    let old = TestClient { token: Some(token), ..alice.clone() };
    let mut socket = listens.open(&old).await;
    let refresh = json!({ "refresh_token": session["refresh_token"] });
    let fresh = listens.server.anonymous().ok_post("/refresh", refresh).await;
    socket.errcode("ack", json!({ "pos": "s1" })).await;
    let token = fresh["access_token"].as_str().unwrap().to_owned();
    TestClient { token: Some(token), ..alice.clone() }.ok_get("/account/whoami").await;
    socket
        .say(json!({ "id": 1, "method": "typing", "params": { "room_id": "!x:y", "typing": false } }))
        .await;
    assert_eq!(socket.code().await, Some(4002));
    // A lock ends them, and what is asked again after it is told to wait.
    let admin = listens.server.register("admin").await;
    let promote = Command::SetAdmin { name: "admin".to_owned(), admin: true };
    operate(listens.server.server().app(), promote, |_| ()).await.unwrap();
    let mut socket = listens.open(&alice).await;
    socket.ok("sync", json!({})).await;
    let path = format!("/_matrix/client/v1/admin/lock/{}", encoded(&alice.user_id));
    admin.ok_put(&path, json!({ "locked": true })).await;
    assert_eq!(socket.code().await, Some(4004));
    assert_eq!(stays.code().await, Some(4004));
    let mut request = listens.request();
    let bearer = format!("Bearer {}", alice.token.as_deref().unwrap());
    request.headers_mut().insert(header::AUTHORIZATION, HeaderValue::try_from(bearer).unwrap());
    assert_eq!(listens.refused(request).await, (StatusCode::UNAUTHORIZED, json!("M_USER_LOCKED")));
    admin.ok_put(&path, json!({ "locked": false })).await;
    let mut stays = listens.open(&alice).await;
    // Deactivating the account ends all that is left.
    let auth = json!({
        "type": "m.login.password", "identifier": { "type": "m.id.user", "user": "alice" },
        "password": "password of alice",
    });
    alice.ok_post("/account/deactivate", json!({ "auth": auth })).await;
    assert_eq!(stays.code().await, Some(4003));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_brings_its_token_as_a_protocol() {
    let listens = Listens::new().await;
    let alice = listens.server.register("alice").await;
    let token = alice.token.clone().unwrap();
    let with = |protocols: &str| {
        let mut request = listens.request();
        let name = header::SEC_WEBSOCKET_PROTOCOL;
        request.headers_mut().insert(name, HeaderValue::try_from(protocols).unwrap());
        request.headers_mut().insert(header::ORIGIN, HeaderValue::from_static("https://anywhere.example"));
        request
    };
    let (mut socket, response) =
        listens.shake_hands(with(&format!("aqueduct.v1, bearer.{token}"))).await.unwrap();
    assert_eq!(response.headers()[header::SEC_WEBSOCKET_PROTOCOL], "aqueduct.v1");
    assert!(!format!("{response:?}").contains(&token));
    socket.ok("sync", json!({})).await;
    let cases = [
        ("aqueduct.v1", StatusCode::UNAUTHORIZED, "M_MISSING_TOKEN"),
        ("aqueduct.v1, bearer.wrong", StatusCode::UNAUTHORIZED, "M_UNKNOWN_TOKEN"),
        (&format!("bearer.{token}"), StatusCode::BAD_REQUEST, "M_INVALID_PARAM"),
        (&format!("chat, bearer.{token}"), StatusCode::BAD_REQUEST, "M_INVALID_PARAM"),
    ];
    for (protocols, status, code) in cases {
        assert_eq!(listens.refused(with(protocols)).await, (status, json!(code)), "{protocols}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_no_handshake_is_refused() {
    let listens = Listens::new().await;
    let alice = listens.server.register("alice").await;
    let path = "/_aqueduct/client/v1/socket";
    let (status, refused) = alice.get(path).await;
    assert_eq!((status, &refused["errcode"]), (StatusCode::UPGRADE_REQUIRED, &json!("M_UNKNOWN")));
    assert_eq!(listens.server.anonymous().get(path).await.0, StatusCode::UNAUTHORIZED);
    let bearer = format!("Bearer {}", alice.token.as_deref().unwrap());
    let cases = [
        (header::SEC_WEBSOCKET_VERSION, "8"),
        (header::SEC_WEBSOCKET_KEY, "dGhlIHNhbXBsZSBub25jZQ"),
        (header::UPGRADE, "h2c"),
        (header::CONNECTION, "keep-alive"),
    ];
    for (name, value) in cases {
        let client = answer_to(&listens, &bearer, &name, value).await;
        assert!(client.starts_with("HTTP/1.1 426 "), "{name}: {client}");
        assert!(client.to_lowercase().contains("\r\nsec-websocket-version: 13\r\n"), "{client}");
    }
    let versions = alice.ok_get("/_matrix/client/versions").await;
    assert_eq!(versions["unstable_features"]["aqueduct.socket.v1"], true);
    let off = Listens::with(|config| config.limits.sockets_max = 0).await;
    let carol = off.server.register("carol").await;
    let mut request = off.request();
    let bearer = format!("Bearer {}", carol.token.as_deref().unwrap());
    request.headers_mut().insert(header::AUTHORIZATION, HeaderValue::try_from(bearer).unwrap());
    assert_eq!(off.refused(request).await, (StatusCode::NOT_FOUND, json!("M_UNRECOGNIZED")));
    let versions = carol.ok_get("/_matrix/client/versions").await;
    assert_eq!(versions["unstable_features"]["aqueduct.socket.v1"], false);
}

/// The answer to a handshake in which one field has another value.
async fn answer_to(listens: &Listens, bearer: &str, name: &header::HeaderName, value: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let fields = [
        (header::HOST, "x"),
        (header::CONNECTION, "Upgrade"),
        (header::UPGRADE, "websocket"),
        (header::SEC_WEBSOCKET_VERSION, "13"),
        (header::SEC_WEBSOCKET_KEY, "dGhlIHNhbXBsZSBub25jZQ=="),
        (header::AUTHORIZATION, bearer),
    ];
    let fields: String = fields
        .iter()
        .map(|(field, good)| format!("{field}: {}\r\n", if field == name { value } else { good }))
        .collect();
    #[expect(clippy::disallowed_methods, reason = "a client of the server that is tested")]
    let mut stream = TcpStream::connect(listens.address).await.unwrap();
    let head = format!("GET /_aqueduct/client/v1/socket HTTP/1.1\r\n{fields}\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = vec![0; 4096];
    let bytes = stream.read(&mut answer).await.unwrap();
    String::from_utf8_lossy(&answer[..bytes]).into_owned()
}

fn piece(bytes: &[u8], opcode: Data, is_last: bool) -> Message {
    Message::Frame(Frame::message(bytes.to_vec(), OpCode::Data(opcode), is_last))
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_frames_end_their_socket_and_no_other() {
    let listens = Listens::new().await;
    let alice = listens.server.register("alice").await;
    let mallory = listens.server.register("mallory").await;
    let mut bystander = listens.open(&alice).await;
    let large =
        format!("{{\"id\":1,\"method\":\"nothing\",\"params\":{{\"k\":\"{}\"}}}}", "x".repeat(65_000));
    let mut socket = listens.open(&mallory).await;
    // A message in a thousand pieces, with pings between them, is one message.
    for (number, chunk) in large.as_bytes().chunks(65).enumerate() {
        let opcode = if number == 0 { Data::Text } else { Data::Continue };
        socket.stream.feed(piece(chunk, opcode, false)).await.unwrap();
        if number % 100 == 0 {
            socket.stream.feed(Message::Ping(vec![number as u8].into())).await.unwrap();
        }
    }
    socket.stream.send(piece(b"", Data::Continue, true)).await.unwrap();
    assert_eq!(socket.hear().await["error"]["errcode"], "M_UNRECOGNIZED");
    let cases: [(u16, Vec<Message>); 7] = [
        (1003, vec![Message::binary(b"{}".to_vec())]),
        (1002, vec![piece(b"{}", Data::Continue, true)]),
        (1002, vec![piece(b"{", Data::Text, false), piece(b"}", Data::Text, true)]),
        (1007, vec![piece(b"\xff\xfe", Data::Text, true)]),
        (1009, vec![Message::text("x".repeat(65_537))]),
        (1008, vec![Message::Ping(vec![1].into()); 1_001]),
        (
            1008,
            [piece(b"", Data::Text, false)]
                .into_iter()
                .chain(vec![piece(b"a", Data::Continue, false); 1_100])
                .collect(),
        ),
    ];
    for (code, frames) in cases {
        let mut socket = listens.open(&mallory).await;
        for frame in frames {
            // The server may have ended the socket already.
            let _ = socket.stream.feed(frame).await;
        }
        let _ = socket.stream.flush().await;
        assert_eq!(socket.code().await, Some(code));
    }
    bystander.ok("sync", json!({})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_are_bounded_by_device_and_by_user() {
    let listens = Listens::with(|config| {
        config.limits.sockets_by_device_max = 2;
        config.limits.sockets_by_user_max = 3;
    })
    .await;
    let alice = listens.server.register("alice").await;
    let (mut first, mut second) = (listens.open(&alice).await, listens.open(&alice).await);
    let mut third = listens.open(&alice).await;
    assert_eq!(first.code().await, Some(4000));
    second.ok("sync", json!({})).await;
    let other = alice.on_device("OTHER").await;
    let _fourth = listens.open(&other).await;
    let refused = |client: TestClient| {
        let mut request = listens.request();
        let bearer = format!("Bearer {}", client.token.as_deref().unwrap());
        request.headers_mut().insert(header::AUTHORIZATION, HeaderValue::try_from(bearer).unwrap());
        listens.refused(request)
    };
    let expected = (StatusCode::TOO_MANY_REQUESTS, json!("M_LIMIT_EXCEEDED"));
    assert_eq!(refused(other.clone()).await, expected);
    third.ok("sync", json!({})).await;
    // A place is free again when its socket has ended.
    third.stream.close(None).await.unwrap();
    assert_eq!(third.code().await, Some(1000));
    drop(third);
    for _ in 0..100 {
        let mut request = listens.request();
        let bearer = format!("Bearer {}", other.token.as_deref().unwrap());
        request.headers_mut().insert(header::AUTHORIZATION, HeaderValue::try_from(bearer).unwrap());
        if listens.shake_hands(request).await.is_ok() {
            return;
        }
        listens.env().sleep(Duration::from_millis(20)).await;
    }
    panic!("the place is not free");
}

#[tokio::test(flavor = "multi_thread")]
async fn rate_limits_count_sockets_and_http_together() {
    let listens = Listens::with(|config| {
        config.limits.rate_limits = true;
        config.limits.send = aqueduct::config::Bucket { per_second: 0.01, burst: 4 };
        config.limits.other = aqueduct::config::Bucket { per_second: 0.01, burst: 12 };
    })
    .await;
    let alice = listens.server.register("alice").await;
    let room = room(&alice, &[]).await;
    let mut socket = listens.open(&alice).await;
    let send = |txn: usize| json!({ "room_id": room, "type": "m.room.message", "txn_id": txn.to_string(), "content": text("x") });
    for txn in 0..2 {
        socket.ok("send", send(txn)).await;
        let path = format!("/rooms/{}/send/m.room.message/h{txn}", encoded(&room));
        alice.ok_put(&path, text("x")).await;
    }
    let refused = socket.ask("send", send(3)).await;
    assert_eq!(refused["error"]["errcode"], "M_LIMIT_EXCEEDED");
    assert!(refused["error"]["retry_after_ms"].as_u64().unwrap() > 1_000, "{refused}");
    let path = format!("/_matrix/client/v3/rooms/{}/send/m.room.message/h9", encoded(&room));
    assert_eq!(alice.put(&path, text("x")).await.0, StatusCode::TOO_MANY_REQUESTS);
    // Messages that reach no endpoint count, too.
    let mut codes = Vec::new();
    for _ in 0..14 {
        codes.push(socket.errcode("nothing", json!({})).await);
    }
    assert_eq!(codes[0], "M_UNRECOGNIZED");
    assert_eq!(codes[13], "M_LIMIT_EXCEEDED");
    assert_eq!(socket.errcode("sync", json!({})).await, "M_LIMIT_EXCEEDED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_closes_its_sockets_in_time() {
    let listens = Listens::new().await;
    let alice = listens.server.register("alice").await;
    let mut sockets = Vec::new();
    for _ in 0..3 {
        let mut socket = listens.open(&alice).await;
        socket.ok("sync", json!({})).await;
        sockets.push(socket);
    }
    let began = listens.env().instant();
    listens.server.server().app().stopping.cancel();
    for socket in &mut sockets {
        assert_eq!(socket.code().await, Some(1012));
    }
    tokio::time::timeout(Duration::from_secs(3), listens.listening.drained()).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(3));
    listens.server.server().stop().await.unwrap();
}
