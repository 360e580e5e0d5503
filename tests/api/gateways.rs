//! Push gateways are told what users are to be notified of (push gateway API): whom, in which order, and what becomes of it when they do
//! not answer.

use std::{sync::Arc, time::Duration};

use aqueduct::{
    config::Config,
    schema,
    store::{Direction, Durability, Engine, Store, engine::Memory},
};
use bytes::Bytes;
use federation::{
    ports::Body,
    testing::{Arrived, Net, Weather, bytes as answer_bytes, json as answer_json},
};
use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream};
use http::{Method, StatusCode};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{
        TestClient, TestServer, encoded,
        network::{Peer, doors},
        scripted::{ALICE, Elsewhere, honest},
    },
};

const SET: &str = "/_matrix/client/v3/pushers/set";
const NOTIFY: &str = "/_matrix/push/v1/notify";
const ADDRESS: &str = "5.0.0.9:443";

type Answer = http::Response<Body>;

/// A push gateway, which notes what it is told.
struct Gateway {
    address: String,
    got: Arc<Mutex<Vec<Value>>>,
    /// The answer to whatever comes.
    answers: Arc<Mutex<Answers>>,
}

type Answers = Box<dyn Fn() -> BoxFuture<'static, Answer> + Send>;

fn with(status: u16, body: &'static str) -> Answers {
    Box::new(move || futures_util::future::ready(answer_json(status, body)).boxed())
}

impl Gateway {
    fn new(net: &Net, name: &str, address: &str) -> Self {
        net.host(name, &[address.rsplit_once(':').unwrap().0]);
        let got = Arc::<Mutex<Vec<Value>>>::default();
        let answers: Arc<Mutex<Answers>> = Arc::new(Mutex::new(with(200, r#"{"rejected":[]}"#)));
        let (keeps, answering) = (Arc::clone(&got), Arc::clone(&answers));
        net.serve(address, &[name], move |Arrived { request, .. }| {
            assert_eq!((request.method().as_str(), request.uri().path()), ("POST", NOTIFY));
            let body: Value = serde_json::from_slice(request.body()).unwrap();
            keeps.lock().push(body["notification"].clone());
            answering.lock()()
        });
        Self { address: address.to_owned(), got, answers }
    }

    fn answer(&self, answers: Answers) {
        *self.answers.lock() = answers;
    }

    /// The notifications that came since this was last asked.
    fn take(&self) -> Vec<Value> {
        std::mem::take(&mut self.got.lock())
    }

    /// The same as texts: what a message says, or else its type; `counts N` where only the count was told.
    fn texts(&self) -> Vec<String> {
        let text = |it: Value| match (it["content"]["body"].as_str(), it["event_id"].as_str()) {
            (Some(body), _) => body.to_owned(),
            (None, Some(_)) => it["type"].as_str().unwrap_or("an event").to_owned(),
            (None, None) => format!("counts {}", it["counts"]["unread"]),
        };
        self.take().into_iter().map(text).collect()
    }
}

fn memory() -> Store {
    Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap()
}

fn server(net: &Net, set: impl FnOnce(&mut Config)) -> TestServer {
    TestServer::start(doors(net), memory(), set)
}

/// The server after a crash, over what was synced and the first writes that were not.
fn crash(net: &Net, server: &TestServer, kept: usize) -> TestServer {
    let Engine::Memory(memory) = server.server().app().store.engine() else { panic!("not in memory") };
    let memory = Engine::Memory(memory.after_crash(kept));
    server.server().app().env.kill();
    TestServer::start(doors(net), Store::open(memory, Durability::Fsync).unwrap(), |_| {})
}

async fn pause(server: &TestServer, seconds: u64) {
    server.server().app().env.sleep(Duration::from_secs(seconds)).await;
}

fn pusher(key: &str, url: &str) -> Value {
    json!({
        "pushkey": key, "kind": "http", "app_id": "org.example.app", "app_display_name": "App",
        "device_display_name": "Phone", "profile_tag": "x", "lang": "en",
        "data": { "url": format!("{url}{NOTIFY}"), "own": 7 },
    })
}

fn pusher_with(key: &str, field: &str, value: Value) -> Value {
    let mut pusher = pusher(key, "https://push.example");
    pusher["data"][field] = value;
    pusher
}

async fn read(client: &TestClient, room: &str, event: &str, kind: &str) {
    let path = format!("/rooms/{room}/receipt/{kind}/{}", encoded(event));
    client.ok_post(&path, json!({})).await;
}

async fn joined(by: &TestClient, others: &[&TestClient]) -> String {
    let room = by.create(json!({ "preset": "public_chat", "name": "The room" })).await;
    for other in others {
        other.ok_post(&format!("/join/{room}"), json!({})).await;
    }
    room
}

/// A gateway, and a room of Alice and Bob. Alice has a pusher there.
struct House {
    net: Net,
    server: TestServer,
    gateway: Gateway,
    alice: TestClient,
    bob: TestClient,
    room: String,
}

impl House {
    async fn new() -> Self {
        let net = Net::new(1);
        let gateway = Gateway::new(&net, "push.example", ADDRESS);
        let server = server(&net, |_| {});
        let (alice, bob) = (server.register("alice").await, server.register("bob").await);
        let room = joined(&bob, &[&alice]).await;
        bob.say(&room, "before", "from before the pusher").await;
        alice.ok_post(SET, pusher("key", "https://push.example")).await;
        Self { net, server, gateway, alice, bob, room }
    }

    async fn texts(&self) -> Vec<String> {
        pause(&self.server, 3).await;
        self.gateway.texts()
    }

    /// The same people after a crash.
    fn crashed(self, kept: usize) -> Self {
        let server = crash(&self.net, &self.server, kept);
        let of = |client: TestClient| TestClient { server: server.clone(), ..client };
        let (alice, bob) = (of(self.alice), of(self.bob));
        Self { server, alice, bob, ..self }
    }

    fn places(&self) -> Vec<(bool, Option<u64>)> {
        let snapshot = self.server.server().app().store.snapshot();
        let rows = schema::PUSHER_PLACES.prefix::<()>(&*snapshot, (), Direction::Up).unwrap();
        rows.map(|row| row.unwrap().1).map(|place| (place.is_behind, place.badge)).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_is_pushed_as_the_specification_has_it_and_reading_it_clears_the_badge() {
    let house = House::new().await;
    let set_s = aqueduct_now_s(&house.server);
    let first = house.bob.say(&house.room, "1", "hello").await;
    pause(&house.server, 3).await;
    let got = house.gateway.take();
    let expected = json!({
        "event_id": first, "id": first, "room_id": house.room, "type": "m.room.message",
        "sender": "@bob:test.example", "sender_display_name": "bob", "room_name": "The room",
        "prio": "high", "content": { "msgtype": "m.text", "body": "hello" },
        // The message from before the pusher was set is unread, too.
        "counts": { "unread": 2 },
        "devices": [{
            "app_id": "org.example.app", "pushkey": "key", "pushkey_ts": set_s, "data": { "own": 7 },
            "tweaks": { "sound": "default" },
        }],
    });
    assert_eq!(got, [expected]);
    let second = house.bob.say(&house.room, "2", "again").await;
    assert_eq!(house.texts().await, ["again"]);
    read(&house.alice, &house.room, &first, "m.read").await;
    assert_eq!(house.texts().await, ["counts 1"]);
    read(&house.alice, &house.room, &second, "m.read.private").await;
    assert_eq!(house.texts().await, ["counts 0"]);
    read(&house.alice, &house.room, &second, "m.read").await;
    assert!(house.texts().await.is_empty(), "nothing changed");
    // Nobody is told of what they say themselves.
    house.alice.say(&house.room, "own", "of my own").await;
    assert!(house.texts().await.is_empty());
    house.server.assert_whole();
}

fn aqueduct_now_s(server: &TestServer) -> u64 {
    server.server().app().env.now_ms() / 1_000
}

#[tokio::test(start_paused = true)]
async fn a_pusher_may_want_ids_alone_and_no_counts() {
    let house = House::new().await;
    house.alice.ok_post(SET, pusher_with("key", "format", json!("event_id_only"))).await;
    let event = house.bob.say(&house.room, "1", "secret").await;
    pause(&house.server, 3).await;
    let got = house.gateway.take();
    let keys: Vec<_> = got[0].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["counts", "devices", "event_id", "prio", "room_id"]);
    assert_eq!((&got[0]["event_id"], &got[0]["room_id"]), (&json!(event), &json!(house.room)));
    assert_eq!(got[0]["devices"][0]["data"], json!({ "own": 7, "format": "event_id_only" }));
    let without = pusher_with("key", "io.element.msc4076.disable_badge_count", json!(true));
    house.alice.ok_post(SET, without).await;
    let event = house.bob.say(&house.room, "2", "more").await;
    pause(&house.server, 3).await;
    let got = house.gateway.take();
    assert_eq!((got.len(), got[0].get("counts")), (1, None));
    read(&house.alice, &house.room, &event, "m.read").await;
    assert!(house.texts().await.is_empty(), "whoever counts themselves is not told of counts");
}

#[tokio::test(start_paused = true)]
async fn invitations_mentions_and_encrypted_events_are_pushed_with_their_priority() {
    let house = House::new().await;
    let carol = house.server.register("carol").await;
    let other = joined(&house.bob, &[&house.alice, &carol]).await;
    house.texts().await;
    let send = async |kind: &str, content: Value| {
        let path = format!("/rooms/{other}/send/{kind}/{}", content.to_string().len());
        house.bob.ok_put(&path, content).await;
        pause(&house.server, 3).await;
        house.gateway.take()
    };
    let quiet = send("m.room.message", json!({ "msgtype": "m.text", "body": "hi all" })).await;
    assert_eq!((quiet.len(), &quiet[0]["prio"]), (1, &json!("low")), "{quiet:?}");
    assert_eq!(quiet[0]["devices"][0]["tweaks"], json!({}));
    let loud = send(
        "m.room.message",
        json!({ "msgtype": "m.text", "body": "x", "m.mentions": { "user_ids": ["@alice:test.example"] } }),
    )
    .await;
    assert_eq!(loud[0]["prio"], "high");
    assert_eq!(loud[0]["devices"][0]["tweaks"], json!({ "highlight": true, "sound": "default" }));
    let secret = send("m.room.encrypted", json!({ "algorithm": "x", "ciphertext": "abc" })).await;
    assert_eq!((&secret[0]["prio"], &secret[0]["type"]), (&json!("high"), &json!("m.room.encrypted")));
    assert_eq!(secret[0]["content"]["ciphertext"], "abc");
    // A reaction notifies nobody.
    assert!(send("m.reaction", json!({ "m.relates_to": {} })).await.is_empty());
    let private = house.bob.create(json!({ "name": "Private" })).await;
    let before = secret[0]["counts"]["unread"].as_u64().unwrap();
    house.bob.ok_post(&format!("/rooms/{private}/invite"), json!({ "user_id": house.alice.user_id })).await;
    pause(&house.server, 3).await;
    let got = house.gateway.take();
    assert_eq!(got.len(), 1, "{got:?}");
    assert_eq!((&got[0]["type"], &got[0]["membership"]), (&json!("m.room.member"), &json!("invite")));
    assert_eq!((&got[0]["user_is_target"], &got[0]["room_name"]), (&json!(true), &json!("Private")));
    assert_eq!(got[0]["counts"]["unread"], before + 1, "an open invitation counts");
    house.alice.ok_post(&format!("/rooms/{private}/leave"), json!({})).await;
    assert_eq!(house.texts().await, [format!("counts {before}")]);
}

#[tokio::test(start_paused = true)]
async fn whoever_is_invited_is_not_told_what_the_room_became() {
    let house = House::new().await;
    house.gateway.answer(with(502, "{}"));
    let invited = json!({ "name": "Lunch", "invite": [house.alice.user_id] });
    let room = house.bob.ok_post("/createRoom", invited).await["room_id"].as_str().unwrap().to_owned();
    pause(&house.server, 5).await;
    let path = format!("/rooms/{}/state/m.room.name", encoded(&room));
    house.bob.ok_put(&path, json!({ "name": "How we fire Alice" })).await;
    house.gateway.answer(with(200, "{}"));
    pause(&house.server, 3_700).await;
    let told = house.gateway.take();
    let invitation = told.iter().rev().find(|told| told["membership"] == "invite").unwrap();
    assert_eq!(invitation["room_name"], "Lunch");
}

#[tokio::test(start_paused = true)]
async fn what_no_longer_concerns_the_user_is_not_pushed() {
    let house = House::new().await;
    let carol = house.server.register("carol").await;
    let rooms = [
        joined(&house.bob, &[&house.alice]).await,
        joined(&house.bob, &[&house.alice]).await,
        joined(&house.bob, &[&house.alice]).await,
        joined(&carol, &[&house.alice]).await,
        joined(&house.bob, &[&house.alice]).await,
    ];
    house.texts().await;
    house.net.weather(&house.gateway.address, Weather::Refuses, Duration::ZERO);
    let redacted = house.bob.say(&rooms[0], "1", "redacted").await;
    let seen = house.bob.say(&rooms[1], "1", "read").await;
    house.bob.say(&rooms[2], "1", "left").await;
    carol.say(&rooms[3], "1", "ignored").await;
    house.bob.say(&rooms[4], "1", "muted").await;
    house.bob.say(&house.room, "1", "wanted").await;
    pause(&house.server, 1).await;
    house.bob.ok_put(&format!("/rooms/{}/redact/{}/r", rooms[0], encoded(&redacted)), json!({})).await;
    read(&house.alice, &rooms[1], &seen, "m.read").await;
    house.alice.ok_post(&format!("/rooms/{}/leave", rooms[2]), json!({})).await;
    let ignored = json!({ "ignored_users": { carol.user_id.as_str(): {} } });
    let path = format!("/user/{}/account_data/m.ignored_user_list", house.alice.user_id);
    house.alice.ok_put(&path, ignored).await;
    let rule = format!("/pushrules/global/room/{}", encoded(&rooms[4]));
    house.alice.ok_put(&rule, json!({ "actions": [] })).await;
    house.net.weather(&house.gateway.address, Weather::Fair, Duration::ZERO);
    pause(&house.server, 60).await;
    assert_eq!(house.gateway.texts(), ["wanted"]);
    house.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn after_an_outage_the_newest_of_each_room_is_pushed_in_order_and_nothing_twice() {
    let house = House::new().await;
    let other = joined(&house.bob, &[&house.alice]).await;
    assert_eq!(house.texts().await, ["counts 1"], "who comes into a room may have other counts");
    house.bob.say(&house.room, "0", "in time").await;
    assert_eq!(house.texts().await, ["in time"]);
    house.gateway.answer(with(502, "<html>"));
    for number in 0..5 {
        house.bob.say(&other, &number.to_string(), &format!("other {number}")).await;
        house.bob.say(&house.room, &number.to_string(), &format!("room {number}")).await;
    }
    pause(&house.server, 600).await;
    let tried = house.gateway.texts();
    assert!(tried.len() > 5 && tried.len() < 15, "it is tried ever more seldom: {tried:?}");
    assert_eq!(house.places(), [(true, Some(2))]);
    house.gateway.answer(with(200, "{}"));
    // The wait is doubled each time, and is an hour at most.
    pause(&house.server, 3_700).await;
    assert_eq!(house.gateway.texts(), ["other 4", "room 4"]);
    // One of them has the transaction id of the message before.
    assert_eq!(house.places(), [(false, Some(11))]);
    house.bob.say(&house.room, "last", "last").await;
    assert_eq!(house.texts().await, ["last"]);
    house.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn after_an_outage_rooms_that_notify_of_nothing_hide_no_other() {
    let house = House::new().await;
    let other = joined(&house.bob, &[&house.alice]).await;
    house.texts().await;
    house.gateway.answer(with(502, "{}"));
    house.bob.say(&other, "other", "the news").await;
    // More events than one look takes stand in the room that comes first.
    let path = format!("/rooms/{}/send/m.room.message", encoded(&house.room));
    for number in 0..600 {
        let notice = json!({ "msgtype": "m.notice", "body": "nothing" });
        house.bob.ok_put(&format!("{path}/notice{number}"), notice).await;
    }
    pause(&house.server, 10).await;
    house.gateway.answer(with(200, "{}"));
    pause(&house.server, 3_700).await;
    let told = house.gateway.texts();
    assert_eq!(told.last().map(String::as_str), Some("the news"), "{told:?}");
    house.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_crash_repeats_at_most_the_request_that_was_under_way() {
    for kept in [0, usize::MAX] {
        let house = House::new().await;
        for number in 0..5 {
            house.bob.say(&house.room, &number.to_string(), &number.to_string()).await;
        }
        assert_eq!(house.texts().await, ["0", "1", "2", "3", "4"]);
        // The next answer is lost by the crash.
        house.gateway.answer(Box::new(|| futures_util::future::pending().boxed()));
        house.bob.say(&house.room, "5", "5").await;
        house.bob.say(&house.room, "6", "6").await;
        pause(&house.server, 1).await;
        assert_eq!(house.gateway.texts(), ["5"], "one at a time");
        house.gateway.answer(with(200, "{}"));
        let house = house.crashed(kept);
        assert_eq!(house.texts().await, ["5", "6"], "{kept} writes that were not synced are kept");
        let house = house.crashed(kept);
        assert!(house.texts().await.is_empty());
        house.server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn a_pusher_that_is_behind_is_so_after_a_crash() {
    let house = House::new().await;
    house.gateway.answer(with(500, "{}"));
    house.bob.say(&house.room, "1", "one").await;
    house.bob.say(&house.room, "2", "two").await;
    pause(&house.server, 20).await;
    house.gateway.take();
    let house = house.crashed(0);
    house.bob.say(&house.room, "3", "three").await;
    house.gateway.take();
    house.gateway.answer(with(200, "{}"));
    pause(&house.server, 100).await;
    assert_eq!(house.gateway.texts(), ["three"]);
    house.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn what_is_older_than_a_day_is_not_pushed() {
    let house = House::new().await;
    house.net.weather(&house.gateway.address, Weather::Refuses, Duration::ZERO);
    house.bob.say(&house.room, "1", "old").await;
    pause(&house.server, 25 * 60 * 60).await;
    house.net.weather(&house.gateway.address, Weather::Fair, Duration::ZERO);
    pause(&house.server, 2 * 60 * 60).await;
    assert_eq!(house.gateway.texts(), ["counts 2"]);
}

#[tokio::test(start_paused = true)]
async fn a_rejected_key_takes_its_pusher_away_and_no_other() {
    let house = House::new().await;
    let second = house.alice.on_device("SECOND").await;
    second.ok_post(SET, pusher("other", "https://push.example")).await;
    house.bob.say(&house.room, "1", "one").await;
    pause(&house.server, 3).await;
    assert_eq!(house.gateway.take().len(), 2, "each pusher is told");
    house.gateway.answer(with(200, r#"{"rejected":["key","of somebody else"]}"#));
    house.bob.say(&house.room, "2", "two").await;
    pause(&house.server, 3).await;
    house.gateway.take();
    let left = house.alice.ok_get("/pushers").await;
    assert_eq!(left["pushers"].as_array().unwrap().len(), 1);
    assert_eq!(left["pushers"][0]["pushkey"], "other");
    house.bob.say(&house.room, "3", "three").await;
    pause(&house.server, 3).await;
    let told = house.gateway.take();
    assert_eq!((told.len(), &told[0]["devices"][0]["pushkey"]), (1, &json!("other")));
    // A pusher goes with its device.
    second.ok_post("/logout", json!({})).await;
    house.bob.say(&house.room, "4", "four").await;
    assert!(house.texts().await.is_empty());
    house.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_pusher_that_another_user_takes_over_tells_nothing_of_the_first() {
    let house = House::new().await;
    let carol = house.server.register("carol").await;
    let theirs = joined(&house.bob, &[&carol]).await;
    carol.ok_post(SET, pusher("key", "https://push.example")).await;
    house.bob.say(&house.room, "1", "for alice").await;
    house.bob.say(&theirs, "1", "for carol").await;
    assert_eq!(house.texts().await, ["for carol"]);
    house.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_pusher_that_is_off_is_told_nothing_and_begins_where_it_is_put_on() {
    let house = House::new().await;
    let mut off = pusher("key", "https://push.example");
    off["org.matrix.msc3881.enabled"] = json!(false);
    house.alice.ok_post(SET, off.clone()).await;
    let shown = house.alice.ok_get("/pushers").await["pushers"][0].clone();
    assert_eq!(shown["org.matrix.msc3881.enabled"], false);
    assert_eq!(shown["org.matrix.msc3881.device_id"], house.alice.device_id);
    house.bob.say(&house.room, "1", "missed").await;
    assert!(house.texts().await.is_empty());
    off["org.matrix.msc3881.enabled"] = json!(true);
    house.alice.ok_post(SET, off.clone()).await;
    assert!(house.texts().await.is_empty());
    house.bob.say(&house.room, "2", "told").await;
    assert_eq!(house.texts().await, ["told"]);
    off["org.matrix.msc3881.enabled"] = json!("yes");
    let (status, json) = house.alice.post(SET, off).await;
    assert_eq!((status, &json["errcode"]), (StatusCode::BAD_REQUEST, &json!("M_BAD_JSON")));
}

#[tokio::test(start_paused = true)]
async fn whatever_a_gateway_answers_it_is_told_what_comes_next() {
    let house = House::new().await;
    let bodies: [(&str, Answers); 5] = [
        (
            "gigabytes",
            Box::new(|| {
                let endless = stream::repeat_with(|| Ok(Bytes::from(vec![b'x'; 1 << 20])));
                futures_util::future::ready(http::Response::new(Body::new(endless))).boxed()
            }),
        ),
        (
            "10,000 levels",
            Box::new(|| {
                let deep = "[".repeat(10_000) + &"]".repeat(10_000);
                futures_util::future::ready(answer_bytes(200, &[], deep)).boxed()
            }),
        ),
        ("no JSON", with(200, "<html>")),
        (
            "a body that does not end",
            Box::new(|| {
                let body = Body::new(stream::pending().boxed());
                futures_util::future::ready(http::Response::new(body)).boxed()
            }),
        ),
        ("nothing", with(204, "")),
    ];
    for (number, (name, answers)) in bodies.into_iter().enumerate() {
        house.gateway.answer(answers);
        house.bob.say(&house.room, &number.to_string(), &number.to_string()).await;
        pause(&house.server, 20).await;
        assert_eq!(house.gateway.texts(), [number.to_string()], "{name}");
    }
    // A redirect is followed to nowhere.
    let inside = Gateway::new(&house.net, "inside.example", "10.0.0.1:443");
    house.gateway.answer(Box::new(|| {
        let to = [("location", "https://inside.example/_matrix/push/v1/notify")];
        futures_util::future::ready(answer_bytes(307, &to, "")).boxed()
    }));
    house.bob.say(&house.room, "last", "redirected").await;
    pause(&house.server, 5).await;
    assert!(house.gateway.texts().len() > 1, "it is tried again");
    assert!(inside.take().is_empty());
    house.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_private_gateway_is_told_nothing_unless_the_operator_allows_it() {
    for allowed in [false, true] {
        let net = Net::new(1);
        let inside = Gateway::new(&net, "inside.example", "10.0.0.1:443");
        let plain = Gateway::new(&net, "plain.example", "127.0.0.1:8080");
        let server = server(&net, |config| {
            config.outbound.allow_private_addresses = allowed;
            config.federation.networks_allowed = vec!["10.0.0.0/8".to_owned()];
        });
        let (alice, bob) = (server.register("alice").await, server.register("bob").await);
        let room = joined(&bob, &[&alice]).await;
        alice.ok_post(SET, pusher("inside", "https://inside.example")).await;
        let (status, _) = alice.post(SET, pusher("plain", "http://plain.example:8080")).await;
        assert_eq!(status == StatusCode::OK, allowed);
        bob.say(&room, "1", "hello").await;
        pause(&server, 5).await;
        let expected: &[&str] = if allowed { &["hello"] } else { &[] };
        assert_eq!(
            (inside.texts(), plain.texts()),
            (
                expected.iter().map(ToString::to_string).collect(),
                expected.iter().map(ToString::to_string).collect()
            )
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_gateway_that_hangs_holds_up_no_other() {
    let house = House::new().await;
    let hangs = Gateway::new(&house.net, "hangs.example", "5.0.0.10:443");
    house.net.weather(&hangs.address, Weather::Silent, Duration::ZERO);
    let mut many = Vec::new();
    for number in 0..40 {
        let user = house.server.register(&format!("user{number}")).await;
        user.ok_post(&format!("/join/{}", house.room), json!({})).await;
        for key in 0..10 {
            user.ok_post(SET, pusher(&format!("{number} {key}"), "https://hangs.example")).await;
        }
        many.push(user);
    }
    house.gateway.take();
    for number in 0..20 {
        house.bob.say(&house.room, &number.to_string(), &number.to_string()).await;
        pause(&house.server, 1).await;
        assert_eq!(house.gateway.texts(), [number.to_string()], "it is told at once");
    }
    house.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_locked_account_is_told_nothing() {
    let house = House::new().await;
    let store = &house.server.server().app().store;
    let alice = crate::support::user_num(store, &house.alice.user_id);
    let guard = aqueduct::store::Guard::alone();
    let mut batch = store.batch(&guard);
    let mut row = aqueduct::accounts::users::require(&batch, alice).unwrap();
    row.is_locked = true;
    schema::USERS.put(&mut batch, alice, &row);
    store.enqueue(batch).unwrap().flushed.await.unwrap();
    drop(guard);
    house.bob.say(&house.room, "1", "hello").await;
    assert!(house.texts().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_invitation_of_another_server_is_pushed_with_what_is_known_of_the_room() {
    let (net, elsewhere) = (Net::new(1), Elsewhere::new(11));
    elsewhere.serve(&net, honest());
    let gateway = Gateway::new(&net, "push.example", ADDRESS);
    let server = server(&net, |_| {});
    let bob = server.register("bob").await;
    bob.ok_post(SET, pusher("key", "https://push.example")).await;
    let invite = json!({ "membership": "invite" });
    let event = elsewhere.event(ALICE, "m.room.member", Some(&bob.user_id), invite);
    let state: Vec<_> = elsewhere.state.values().map(|event| &event.json).collect();
    let body = json!({ "room_version": "11", "event": event.json, "invite_room_state": state });
    let room = elsewhere.room_id.as_str();
    let uri = format!("/_matrix/federation/v2/invite/{}/{}", encoded(room), encoded(event.id.as_str()));
    let peer = Peer::unheard("a.example", 9);
    let (status, answer) = peer.ask(&server, Method::PUT, &uri, Some(&body)).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    pause(&server, 3).await;
    let got = gateway.take();
    assert_eq!(got.len(), 1, "{got:?}");
    assert_eq!((&got[0]["event_id"], &got[0]["room_id"]), (&json!(event.id), &json!(room)));
    assert_eq!((&got[0]["sender"], &got[0]["room_name"]), (&json!(ALICE), &json!("Elsewhere")));
    assert_eq!((&got[0]["user_is_target"], &got[0]["membership"]), (&json!(true), &json!("invite")));
    assert_eq!((&got[0]["counts"], &got[0]["prio"]), (&json!({ "unread": 1 }), &json!("high")));
    let listed = bob.ok_get("/notifications").await;
    assert_eq!(listed["notifications"][0]["event"]["event_id"], json!(event.id));
    bob.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
    pause(&server, 3).await;
    assert_eq!(gateway.texts(), ["counts 0"]);
    assert_eq!(bob.ok_get("/notifications").await["notifications"], json!([]));
    server.assert_whole();
}
