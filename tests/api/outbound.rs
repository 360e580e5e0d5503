//! Other servers are told what happens here (server-server API, "Transactions"): whom, in which order, and what becomes of it when
//! they do not answer.

use std::{sync::Arc, time::Duration};

use aqueduct::{
    schema,
    store::{Direction, Durability, Engine, Store, engine::Memory},
};
use federation::{
    ports::NotResolved,
    testing::{BEGAN_MS as KEYS_BEGAN_MS, Net, Weather, json as answer_json},
};
use http::Method;
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::{
    ingest::shared_room,
    rooms::Rooms,
    support::{
        BEGAN_MS, TestClient, TestServer,
        network::{Peer, doors},
        remote::Remote,
    },
};

/// A transaction as a server got it: its id and its body.
type Transaction = (String, Value);

/// Another server, which notes what it is told.
struct Told {
    peer: Peer,
    address: String,
    got: Arc<Mutex<Vec<Transaction>>>,
    status: Arc<Mutex<u16>>,
    /// It refuses each transaction in which this text stands.
    refuses: Arc<Mutex<Option<String>>>,
}

impl Told {
    fn new(net: &Net, name: &str, address: &str, seed: u8) -> Self {
        let peer = Peer::new(net, name, address, seed);
        let address = format!("{address}:8448");
        let (got, status) = (Arc::<Mutex<Vec<Transaction>>>::default(), Arc::new(Mutex::new(200)));
        let (keeps, answers) = (Arc::clone(&got), Arc::clone(&status));
        let refuses = Arc::<Mutex<Option<String>>>::default();
        let refused = Arc::clone(&refuses);
        let keys = peer.own.document(KEYS_BEGAN_MS.max(BEGAN_MS));
        net.serve(&address, &[name], move |arrived| {
            let path = arrived.request.uri().path().to_owned();
            let answer = match path.strip_prefix("/_matrix/federation/v1/send/") {
                Some(id) => {
                    let body: Value = serde_json::from_slice(arrived.request.body()).unwrap();
                    if refused.lock().as_ref().is_some_and(|text| body.to_string().contains(text)) {
                        return futures_util::future::ready(answer_json(400, "{}"));
                    }
                    keeps.lock().push((id.to_owned(), body));
                    let status = *answers.lock();
                    answer_json(status, if status == 204 { "" } else { r#"{"pdus":{}}"# })
                }
                None if path == "/_matrix/key/v2/server" => answer_json(200, keys.to_string()),
                None => answer_json(404, "{}"),
            };
            futures_util::future::ready(answer)
        });
        Self { peer, address, got, status, refuses }
    }

    fn take(&self) -> Vec<Transaction> {
        std::mem::take(&mut self.got.lock())
    }

    /// The events that came since this was last asked, as what they say.
    fn take_events(&self) -> Vec<String> {
        events(&self.take())
    }

    /// The ephemeral news that came since this was last asked, of one kind.
    fn take_news(&self, kind: &str) -> Vec<Value> {
        let got = self.take();
        let news = got.iter().flat_map(|(_, body)| body["edus"].as_array().cloned().unwrap_or_default());
        news.filter(|edu| edu["edu_type"] == kind).map(|edu| edu["content"].clone()).collect()
    }

    fn weather(&self, net: &Net, weather: Weather) {
        net.weather(&self.address, weather, Duration::ZERO);
    }

    /// The server asks something of ours.
    async fn speak(&self, server: &TestServer) {
        let path = "/_matrix/federation/v1/query/profile?user_id=%40alice%3Atest.example";
        let _ = self.peer.ask(server, Method::GET, path, None).await;
    }
}

/// The content of events of transactions: the text of a message, else type and membership.
fn events(got: &[Transaction]) -> Vec<String> {
    let text = |event: &Value| match event["content"]["body"].as_str() {
        Some(body) => body.to_owned(),
        None => {
            let membership = event["content"]["membership"].as_str().unwrap_or_default();
            format!("{} {membership}", event["type"].as_str().unwrap()).trim().to_owned()
        }
    };
    got.iter().flat_map(|(_, body)| body["pdus"].as_array().unwrap()).map(text).collect()
}

fn memory() -> Store {
    Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap()
}

fn server(net: &Net) -> TestServer {
    TestServer::start(doors(net), memory(), |_| {})
}

/// The server after a crash, over what was synced.
fn crash(net: &Net, server: &TestServer, kept: usize) -> TestServer {
    let Engine::Memory(memory) = server.server().app().store.engine() else { panic!("not in memory") };
    let memory = Engine::Memory(memory.after_crash(kept));
    server.server().app().env.kill();
    TestServer::start(doors(net), Store::open(memory, Durability::Fsync).unwrap(), |_| {})
}

async fn pause(server: &TestServer, seconds: u64) {
    server.server().app().env.sleep(Duration::from_secs(seconds)).await;
}

/// The rooms in which servers are behind.
fn marks(server: &TestServer) -> Vec<(String, u64)> {
    let snapshot = server.server().app().store.snapshot();
    let rows = schema::BEHIND.prefix::<()>(&*snapshot, (), Direction::Up).unwrap();
    rows.map(|row| row.unwrap().0).map(|(server, room)| (server, room.0)).collect()
}

fn failures(server: &TestServer, name: &str) -> u32 {
    let status = server.server().app().delivery.state_of(name.try_into().unwrap()).unwrap();
    status.failing.map_or(0, |failing| failing.failures)
}

/// A user of another server joins.
async fn joins(alice: &TestClient, room: &str, user: &str) -> Remote {
    let mut remote = Remote::new(alice.server.server().app(), room);
    remote.user = user.try_into().unwrap();
    remote.join().await;
    remote
}

/// A server with a room of Alice's in which Bob of another server is.
async fn house(net: &Net) -> (TestServer, TestClient, Told, String) {
    let (server, told) = (server(net), Told::new(net, "b.example", "5.0.0.2", 2));
    let alice = server.register("alice").await;
    let (room, _) = shared_room(&alice, json!({})).await;
    pause(&server, 3).await;
    told.take();
    (server, alice, told, room)
}

#[tokio::test(start_paused = true)]
async fn messages_go_in_order_and_in_transactions_of_fifty() {
    let net = Net::new(1);
    let (server, alice, told, room) = house(&net).await;
    net.weather(&told.address, Weather::Fair, Duration::from_secs(2));
    for number in 0..120 {
        alice.say(&room, &number.to_string(), &number.to_string()).await;
    }
    pause(&server, 20).await;
    let got = told.take();
    assert_eq!(events(&got), (0..120).map(|it| it.to_string()).collect::<Vec<_>>());
    let counts: Vec<_> = got.iter().map(|(_, body)| body["pdus"].as_array().unwrap().len()).collect();
    assert!(counts.iter().all(|count| *count <= 50) && counts.len() <= 5, "{counts:?}");
    let mut ids: Vec<_> = got.iter().map(|(id, _)| id.clone()).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), got.len(), "each transaction has an id of its own");
    assert_eq!(got[0].1["origin"], "test.example");
    assert_eq!(marks(&server), []);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn what_others_said_is_theirs_to_tell() {
    let net = Net::new(1);
    let (server, alice, told, room) = house(&net).await;
    let carol = Told::new(&net, "c.example", "5.0.0.3", 3);
    joins(&alice, &room, "@carol:c.example").await;
    alice.say(&room, "1", "mine").await;
    pause(&server, 3).await;
    assert_eq!(told.take_events(), ["mine"]);
    assert_eq!(carol.take_events(), ["mine"]);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_removed_is_told_so_and_nothing_after() {
    let net = Net::new(1);
    let (server, alice, told, room) = house(&net).await;
    let body = json!({ "user_id": "@bob:b.example" });
    alice.ok_post(&format!("/rooms/{room}/kick"), body).await;
    alice.say(&room, "1", "unheard").await;
    pause(&server, 3).await;
    assert_eq!(told.take_events(), ["m.room.member leave"]);
    let other = alice.create(json!({ "preset": "public_chat" })).await;
    joins(&alice, &other, "@bob:b.example").await;
    let body = json!({ "user_id": "@bob:b.example" });
    alice.ok_post(&format!("/rooms/{other}/ban"), body).await;
    alice.say(&other, "2", "unheard").await;
    pause(&server, 3).await;
    assert_eq!(told.take_events(), ["m.room.member ban"]);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_the_room_denies_is_told_as_long_as_its_users_are_there() {
    let net = Net::new(1);
    let (server, alice, told, room) = house(&net).await;
    let other = Told::new(&net, "c.example", "5.0.0.3", 3);
    joins(&alice, &room, "@carol:c.example").await;
    let list = json!({ "allow": ["*"], "deny": ["b.example"], "allow_ip_literals": true });
    alice.ok_put(&format!("/rooms/{room}/state/m.room.server_acl"), list).await;
    alice.say(&room, "1", "still told").await;
    pause(&server, 3).await;
    for told in [&told, &other] {
        assert_eq!(told.take_events(), ["m.room.server_acl", "still told"]);
    }
    alice.ok_post(&format!("/rooms/{room}/kick"), json!({ "user_id": "@bob:b.example" })).await;
    alice.say(&room, "2", "secret").await;
    pause(&server, 3).await;
    assert_eq!(told.take_events(), ["m.room.member leave"]);
    assert_eq!(other.take_events(), ["m.room.member leave", "secret"]);
}

#[tokio::test(start_paused = true)]
async fn a_redaction_of_an_event_that_is_not_here_is_told() {
    let net = Net::new(1);
    let (server, alice, told, room) = house(&net).await;
    for (number, id) in [crate::support::NOWHERE, "$older:b.example"].into_iter().enumerate() {
        let path = format!("/rooms/{room}/redact/{}/{number}", crate::support::encoded(id));
        alice.ok_put(&path, json!({})).await;
        pause(&server, 3).await;
        assert_eq!(told.take_events(), ["m.room.redaction"]);
    }
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_server_that_the_settings_forbid_is_not_told() {
    let net = Net::new(1);
    let told = Told::new(&net, "b.example", "5.0.0.2", 2);
    let server =
        TestServer::start(doors(&net), memory(), |config| config.federation.deny = vec!["b.*".to_owned()]);
    let alice = server.register("alice").await;
    let (room, _) = shared_room(&alice, json!({})).await;
    alice.say(&room, "1", "secret").await;
    pause(&server, 3).await;
    assert!(told.take().is_empty() && marks(&server).is_empty());
}

#[tokio::test(start_paused = true)]
async fn nothing_is_told_where_rooms_are_not_shared() {
    let net = Net::new(1);
    let told = Told::new(&net, "b.example", "5.0.0.2", 2);
    let server = TestServer::start(doors(&net), memory(), |config| config.federation.enabled = false);
    let alice = server.register("alice").await;
    let (room, _) = shared_room(&alice, json!({})).await;
    alice.say(&room, "1", "secret").await;
    alice.ok_put("/sendToDevice/m.test/1", to_bob(1)).await;
    pause(&server, 60).await;
    assert!(told.take().is_empty() && marks(&server).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_server_that_had_no_address_is_told_as_soon_as_it_speaks() {
    let net = Net::new(1);
    let (server, told) = (server(&net), Told::new(&net, "b.example", "5.0.0.2", 2));
    // Its keys are known, as those of a server that has only just gone.
    told.speak(&server).await;
    net.resolve("b.example", Err(NotResolved::Absent { ttl_s: 60 }));
    pause(&server, 3_000).await;
    let alice = server.register("alice").await;
    let (room, _) = shared_room(&alice, json!({})).await;
    alice.say(&room, "1", "missed").await;
    pause(&server, 3).await;
    assert_eq!(failures(&server, "b.example"), 1);
    net.host("b.example", &["5.0.0.2"]);
    told.speak(&server).await;
    pause(&server, 2).await;
    assert!(told.take_events().contains(&"missed".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_away_has_one_mark_a_room_and_is_told_all_when_it_speaks() {
    let net = Net::new(1);
    let (server, alice, told, room) = house(&net).await;
    let (other, _) = shared_room(&alice, json!({})).await;
    told.weather(&net, Weather::Refuses);
    for number in 0..60 {
        let into = if number % 2 == 0 { &room } else { &other };
        alice.say(into, &number.to_string(), &number.to_string()).await;
    }
    pause(&server, 5).await;
    assert_eq!(marks(&server).len(), 2, "{:?}", marks(&server));
    assert_eq!(failures(&server, "b.example"), 1);
    // It is back, and speaks before it is tried again.
    told.weather(&net, Weather::Fair);
    assert!(told.take().is_empty());
    told.speak(&server).await;
    pause(&server, 2).await;
    let mut got: Vec<u32> = told.take_events().iter().filter_map(|text| text.parse().ok()).collect();
    got.sort_unstable();
    assert_eq!(got, (0..60).collect::<Vec<_>>());
    assert!(marks(&server).is_empty());
    assert_eq!(failures(&server, "b.example"), 0);
    alice.say(&room, "more", "more").await;
    pause(&server, 2).await;
    assert_eq!(told.take_events(), ["more"]);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_server_that_was_away_is_told_of_users_whom_we_let_in_meanwhile() {
    let net = Net::new(1);
    let (server, alice, told, room) = house(&net).await;
    let _carol = Told::new(&net, "c.example", "5.0.0.3", 3);
    told.weather(&net, Weather::Refuses);
    let mut carol = Remote::new(alice.server.server().app(), &room);
    carol.user = "@carol:c.example".try_into().unwrap();
    let content = json!({ "membership": "join" });
    let join = carol.event("m.room.member", Some("@carol:c.example"), content, &carol.heads()).let_in();
    carol.send(join).await;
    pause(&server, 3).await;
    assert_eq!(marks(&server).len(), 1);
    told.weather(&net, Weather::Fair);
    told.speak(&server).await;
    pause(&server, 2).await;
    assert_eq!(told.take_events(), ["m.room.member join"]);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_was_away_for_long_is_told_the_newest_events_alone() {
    let net = Net::new(1);
    let (server, alice, told, room) = house(&net).await;
    told.weather(&net, Weather::Refuses);
    for number in 0..300 {
        alice.say(&room, &number.to_string(), &number.to_string()).await;
    }
    pause(&server, 3).await;
    assert_eq!(marks(&server).len(), 1);
    told.weather(&net, Weather::Fair);
    told.speak(&server).await;
    pause(&server, 2).await;
    assert_eq!(told.take_events(), ["299"]);
    assert!(marks(&server).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_server_that_was_removed_while_it_was_away_is_told_that_alone() {
    let net = Net::new(1);
    let (server, alice, told, room) = house(&net).await;
    told.weather(&net, Weather::Refuses);
    alice.say(&room, "1", "before").await;
    alice.ok_post(&format!("/rooms/{room}/kick"), json!({ "user_id": "@bob:b.example" })).await;
    alice.say(&room, "2", "after").await;
    pause(&server, 3).await;
    told.weather(&net, Weather::Fair);
    told.speak(&server).await;
    pause(&server, 2).await;
    assert_eq!(told.take_events(), ["before", "m.room.member leave"]);
    assert!(marks(&server).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_away_is_tried_ever_later_also_after_a_restart() {
    let net = Net::new(1);
    let (server, alice, told, room) = house(&net).await;
    told.weather(&net, Weather::Refuses);
    alice.say(&room, "1", "one").await;
    pause(&server, 300).await;
    let failed = failures(&server, "b.example");
    assert!((3..=6).contains(&failed), "{failed}");
    let server = crash(&net, &server, usize::MAX);
    pause(&server, 2).await;
    assert_eq!(failures(&server, "b.example"), failed, "it is known, and not tried at once");
    told.weather(&net, Weather::Fair);
    assert!(told.take().is_empty());
    pause(&server, 600).await;
    assert_eq!(told.take_events(), ["one"]);
    assert_eq!(failures(&server, "b.example"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_crash_loses_none_of_what_was_not_taken() {
    for kept in [0, 1, usize::MAX] {
        let net = Net::new(1);
        let (server, alice, told, room) = house(&net).await;
        // An event that was accepted is under way when the server dies.
        told.weather(&net, Weather::Silent);
        for number in 0..80 {
            alice.say(&room, &number.to_string(), &number.to_string()).await;
        }
        pause(&server, 4).await;
        assert!(told.take().is_empty());
        let server = crash(&net, &server, kept);
        told.weather(&net, Weather::Fair);
        pause(&server, 120).await;
        let mut got: Vec<u32> = told.take_events().iter().filter_map(|text| text.parse().ok()).collect();
        got.sort_unstable();
        got.dedup();
        assert_eq!(got, (0..80).collect::<Vec<_>>(), "{kept} kept");
        server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_is_asked_for_again_under_the_same_id() {
    let net = Net::new(1);
    let (server, alice, told, room) = house(&net).await;
    told.weather(&net, Weather::LosesAnswers);
    alice.say(&room, "1", "one").await;
    pause(&server, 1).await;
    told.weather(&net, Weather::Fair);
    pause(&server, 5).await;
    let got = told.take();
    assert!(got.len() >= 2 && got.iter().all(|one| *one == got[0]), "{got:?}");
    assert!(marks(&server).is_empty());
}

#[tokio::test(start_paused = true)]
async fn servers_that_are_silent_hold_up_no_others() {
    let net = Net::new(1);
    let (server, alice, told, room) = house(&net).await;
    for number in 0..150 {
        let name = format!("silent{number}.example");
        let address = format!("5.0.1.{number}");
        net.host(&name, &[&address]);
        net.serve_json(&format!("{address}:8448"), &[&name], "{}");
        net.weather(&format!("{address}:8448"), Weather::Silent, Duration::ZERO);
        joins(&alice, &room, &format!("@user:{name}")).await;
    }
    alice.say(&room, "1", "one").await;
    pause(&server, 15).await;
    assert_eq!(told.take_events(), ["one"]);
    alice.say(&room, "2", "two").await;
    pause(&server, 2).await;
    assert_eq!(told.take_events(), ["two"]);
}

#[tokio::test(start_paused = true)]
async fn five_hundred_dead_servers_leave_a_row_each_and_no_more() {
    let net = Net::new(1);
    let (server, alice, told, room) = house(&net).await;
    for number in 0..500 {
        joins(&alice, &room, &format!("@user:dead{number}.example")).await;
    }
    pause(&server, 60).await;
    told.take();
    for number in 0..40 {
        alice.say(&room, &number.to_string(), &number.to_string()).await;
    }
    pause(&server, 400).await;
    assert_eq!(told.take_events().len(), 40);
    assert_eq!(marks(&server).len(), 500);
    let rows = server.assert_whole();
    let count = |name: &str| rows.iter().find(|(of, _)| *of == name).map(|(_, count)| *count);
    assert_eq!(count("DESTINATION"), Some(500));
    let server = crash(&net, &server, usize::MAX);
    let alice = TestClient { server: server.clone(), ..alice };
    pause(&server, 5).await;
    alice.say(&room, "more", "more").await;
    pause(&server, 5).await;
    assert!(told.take_events().contains(&"more".to_owned()));
    assert_eq!(marks(&server).len(), 500);
}

fn to_bob(number: u64) -> Value {
    json!({ "messages": { "@bob:b.example": { "PHONE": { "n": number } } } })
}

#[tokio::test(start_paused = true)]
async fn messages_to_devices_wait_for_their_server_and_arrive_once_in_order() {
    let net = Net::new(1);
    let (server, alice, told, _) = house(&net).await;
    told.weather(&net, Weather::Refuses);
    for number in 0..150 {
        alice.ok_put(&format!("/sendToDevice/m.test/{number}"), to_bob(number)).await;
        alice.ok_put(&format!("/sendToDevice/m.test/{number}"), to_bob(number)).await;
    }
    pause(&server, 5).await;
    server.assert_whole();
    let server = crash(&net, &server, 0);
    told.weather(&net, Weather::Fair);
    told.speak(&server).await;
    pause(&server, 5).await;
    let news = told.take_news("m.direct_to_device");
    let numbers: Vec<_> =
        news.iter().map(|it| it["messages"]["@bob:b.example"]["PHONE"]["n"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..150).collect::<Vec<_>>());
    assert_eq!((&news[0]["sender"], &news[0]["type"]), (&json!(alice.user_id), &json!("m.test")));
    let mut ids: Vec<_> = news.iter().map(|it| it["message_id"].to_string()).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 150);
    pause(&server, 60).await;
    let server = crash(&net, &server, usize::MAX);
    pause(&server, 60).await;
    assert!(told.take_news("m.direct_to_device").is_empty(), "what was taken is not sent again");
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_message_whose_answer_was_lost_comes_again_under_its_id() {
    let net = Net::new(1);
    let (server, alice, told, _) = house(&net).await;
    told.weather(&net, Weather::LosesAnswers);
    alice.ok_put("/sendToDevice/m.test/1", to_bob(1)).await;
    pause(&server, 20).await;
    let server = crash(&net, &server, 0);
    told.weather(&net, Weather::Fair);
    told.speak(&server).await;
    pause(&server, 60).await;
    let mut ids: Vec<_> =
        told.take_news("m.direct_to_device").iter().map(|it| it["message_id"].to_string()).collect();
    assert!(ids.len() >= 2, "{ids:?}");
    ids.dedup();
    assert_eq!(ids.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn messages_for_many_devices_go_together_and_each_arrives_once_over_a_crash() {
    let net = Net::new(1);
    let (server, alice, told, _) = house(&net).await;
    told.weather(&net, Weather::LosesAnswers);
    let device = |user: usize, number: usize| (format!("D{number}"), json!({ "n": user * 100 + number }));
    let user = |user: usize| {
        let devices: serde_json::Map<_, _> = (0..100).map(|number| device(user, number)).collect();
        (format!("@u{user}:b.example"), Value::Object(devices))
    };
    let mut messages: serde_json::Map<_, _> = (0..50).map(user).collect();
    messages.insert("@all:b.example".to_owned(), json!({ "*": { "n": 5_000 } }));
    alice.ok_put("/sendToDevice/m.test/1", json!({ "messages": messages })).await;
    let snapshot = server.server().app().store.snapshot();
    let rows = schema::OUTBOX.prefix::<()>(&*snapshot, (), Direction::Up).unwrap().count();
    assert!(rows <= 60, "{rows} rows for 5,000 messages");
    drop(snapshot);
    pause(&server, 20).await;
    let server = crash(&net, &server, 0);
    told.weather(&net, Weather::Fair);
    told.speak(&server).await;
    pause(&server, 60).await;
    let (mut ids, mut got) = (Vec::new(), Vec::new());
    for news in told.take_news("m.direct_to_device") {
        // The other server passes over what comes again under its id.
        if ids.contains(&news["message_id"]) {
            continue;
        }
        ids.push(news["message_id"].clone());
        for devices in news["messages"].as_object().unwrap().values() {
            got.extend(devices.as_object().unwrap().values().map(|it| it["n"].as_u64().unwrap()));
        }
    }
    got.sort_unstable();
    assert_eq!(got, (0..=5_000).collect::<Vec<_>>());
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn who_types_is_told_and_that_they_stopped() {
    let net = Net::new(1);
    let (server, alice, told, room) = house(&net).await;
    let path = format!("/rooms/{room}/typing/{}", alice.user_id);
    alice.ok_put(&path, json!({ "typing": true, "timeout": 5_000 })).await;
    pause(&server, 2).await;
    let said = |typing: bool| json!({ "room_id": room, "user_id": alice.user_id, "typing": typing });
    assert_eq!(told.take_news("m.typing"), [said(true)]);
    pause(&server, 10).await;
    assert_eq!(told.take_news("m.typing"), [said(false)], "it ended by itself");
    // Going on is told now and then.
    for _ in 0..12 {
        alice.ok_put(&path, json!({ "typing": true, "timeout": 10_000 })).await;
        pause(&server, 5).await;
    }
    assert_eq!(told.take_news("m.typing").len(), 3);
}

#[tokio::test(start_paused = true)]
async fn public_receipts_are_told_with_their_thread_and_private_ones_are_not() {
    let net = Net::new(1);
    let (server, alice, told, room) = house(&net).await;
    let event = alice.say(&room, "1", "one").await;
    pause(&server, 3).await;
    told.take();
    alice.ok_post(&format!("/rooms/{room}/receipt/m.read.private/{event}"), json!({})).await;
    pause(&server, 3).await;
    assert!(told.take_news("m.receipt").is_empty());
    let body = json!({ "thread_id": "main" });
    alice.ok_post(&format!("/rooms/{room}/receipt/m.read/{event}"), body).await;
    pause(&server, 3).await;
    let news = told.take_news("m.receipt");
    assert_eq!(news.len(), 1);
    let receipt = &news[0][&room]["m.read"][&alice.user_id];
    assert_eq!(receipt["event_ids"], json!([event]));
    assert_eq!(receipt["data"]["thread_id"], "main");
    assert!(receipt["data"]["ts"].as_u64().is_some());
}

#[tokio::test(start_paused = true)]
async fn presence_is_told_where_the_settings_let_it() {
    for presence in [true, false] {
        let net = Net::new(1);
        let told = Told::new(&net, "b.example", "5.0.0.2", 2);
        let server = TestServer::start(doors(&net), memory(), |config| config.federation.presence = presence);
        let alice = server.register("alice").await;
        shared_room(&alice, json!({})).await;
        pause(&server, 30).await;
        told.take();
        let body = json!({ "presence": "unavailable", "status_msg": "asleep" });
        alice.ok_put(&format!("/presence/{}/status", alice.user_id), body).await;
        pause(&server, 30).await;
        let news = told.take_news("m.presence");
        let is_told = news
            .iter()
            .any(|it| it["push"][0]["user_id"] == alice.user_id && it["push"][0]["status_msg"] == "asleep");
        assert_eq!(is_told, presence, "{news:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn news_of_the_moment_is_dropped_for_a_server_that_is_away() {
    let net = Net::new(1);
    let (server, alice, told, room) = house(&net).await;
    told.weather(&net, Weather::Refuses);
    let path = format!("/rooms/{room}/typing/{}", alice.user_id);
    alice.ok_put(&path, json!({ "typing": true, "timeout": 5_000 })).await;
    alice.say(&room, "1", "one").await;
    pause(&server, 10).await;
    told.weather(&net, Weather::Fair);
    told.speak(&server).await;
    pause(&server, 5).await;
    let got = told.take();
    assert_eq!(events(&got), ["one"]);
    assert!(got.iter().all(|(_, body)| body.get("edus").is_none()), "{got:?}");
}

#[tokio::test(start_paused = true)]
async fn what_a_server_refuses_together_with_all_else_comes_when_it_takes_things_again() {
    for status in [204, 301, 400, 410, 413, 421] {
        let net = Net::new(1);
        let (server, alice, told, room) = house(&net).await;
        *told.status.lock() = status;
        alice.say(&room, "1", "one").await;
        alice.ok_put("/sendToDevice/m.test/1", to_bob(1)).await;
        pause(&server, 30).await;
        assert!(failures(&server, "b.example") > 0, "{status}");
        *told.status.lock() = 200;
        told.take();
        told.speak(&server).await;
        pause(&server, 30).await;
        let got = told.take();
        assert_eq!(events(&got), ["one"], "{status}");
        let edus = got.iter().flat_map(|(_, body)| body["edus"].as_array().cloned().unwrap_or_default());
        let to_device: Vec<_> = edus.filter(|edu| edu["edu_type"] == "m.direct_to_device").collect();
        assert_eq!(to_device.len(), 1, "{status}: {got:?}");
        assert_eq!(failures(&server, "b.example"), 0, "{status}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_server_refuses_alone_keeps_nothing_else_from_it() {
    let net = Net::new(1);
    let (server, alice, told, room) = house(&net).await;
    told.weather(&net, Weather::Refuses);
    for number in 0..10 {
        let text = if number % 4 == 1 { format!("poison {number}") } else { number.to_string() };
        alice.say(&room, &number.to_string(), &text).await;
    }
    pause(&server, 5).await;
    *told.refuses.lock() = Some("poison".to_owned());
    told.weather(&net, Weather::Fair);
    told.speak(&server).await;
    pause(&server, 30).await;
    let mut seen = told.take_events();
    seen.dedup();
    assert_eq!(seen, ["0", "2", "3", "4", "6", "7", "8"], "in order, but for what it refuses");
    alice.say(&room, "last", "poison last").await;
    alice.say(&room, "more", "more").await;
    pause(&server, 30).await;
    assert_eq!(told.take_events(), ["more"]);
    assert_eq!(failures(&server, "b.example"), 0);
}

#[tokio::test(start_paused = true)]
async fn servers_that_are_slow_hold_up_no_others() {
    let net = Net::new(1);
    let (server, alice, told, room) = house(&net).await;
    alice.say(&room, "0", "zero").await;
    pause(&server, 5).await;
    assert_eq!(told.take_events(), ["zero"]);
    let other = alice.create(json!({ "preset": "public_chat" })).await;
    for number in 0..300 {
        let name = format!("slow{number}.example");
        let address = format!("5.0.{}.{}", 1 + number / 200, number % 200);
        net.host(&name, &[&address]);
        net.serve_json(&format!("{address}:8448"), &[&name], "{}");
        net.weather(&format!("{address}:8448"), Weather::Fair, Duration::from_secs(55));
        joins(&alice, &other, &format!("@user:{name}")).await;
    }
    for number in 1..100 {
        alice.say(&other, &format!("o{number}"), "chatter").await;
        alice.say(&room, &number.to_string(), &number.to_string()).await;
        pause(&server, 1).await;
        assert_eq!(told.take_events(), [number.to_string()]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_redacted_event_is_told_as_it_is_stored_then() {
    let net = Net::new(1);
    let (server, alice, told, room) = house(&net).await;
    told.weather(&net, Weather::Refuses);
    let event = alice.say(&room, "1", "secret").await;
    pause(&server, 3).await;
    alice.ok_put(&format!("/rooms/{room}/redact/{event}/2"), json!({})).await;
    told.weather(&net, Weather::Fair);
    told.speak(&server).await;
    pause(&server, 3).await;
    let got = told.take();
    let text = json!(got).to_string();
    assert!(!text.contains("secret") && text.contains("m.room.redaction"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_server_whose_user_is_refused_is_told_so() {
    let net = Net::new(1);
    let (server, told) = (server(&net), Told::new(&net, "b.example", "5.0.0.2", 2));
    let alice = server.register("alice").await;
    let rule = json!({ "type": "m.room.join_rules", "state_key": "", "content": { "join_rule": "knock" } });
    let room = alice.create(json!({ "initial_state": [rule] })).await;
    let bob = Remote::new(server.server().app(), &room);
    let knock = json!({ "membership": "knock" });
    let knock = bob.event("m.room.member", Some("@bob:b.example"), knock, &bob.heads());
    bob.send(knock).await;
    alice.say(&room, "1", "unheard").await;
    pause(&server, 3).await;
    assert_eq!(told.take_events(), [""; 0], "nobody of it is in the room");
    alice.ok_post(&format!("/rooms/{room}/kick"), json!({ "user_id": "@bob:b.example" })).await;
    alice.say(&room, "2", "unheard").await;
    pause(&server, 3).await;
    assert_eq!(told.take_events(), ["m.room.member leave"]);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_forks_resolve_out_of_a_room_is_told_what_merges_them() {
    for is_away in [false, true] {
        let net = Net::new(1);
        let server = server(&net);
        let alice = server.register("alice").await;
        let (bob_told, carol_told) =
            (Told::new(&net, "b.example", "5.0.0.2", 2), Told::new(&net, "c.example", "5.0.0.3", 3));
        let levels = json!({ "users": { &alice.user_id: 100, "@bob:b.example": 100 } });
        let more = json!({ "room_version": "11", "power_level_content_override": levels });
        let (room, bob) = shared_room(&alice, more).await;
        let before = bob.heads();
        joins(&alice, &room, "@carol:c.example").await;
        pause(&server, 5).await;
        if is_away {
            carol_told.weather(&net, Weather::Refuses);
        }
        // Bob closed the door before she came, on the other side of a partition: she never was in the room.
        let close = bob.event("m.room.join_rules", Some(""), json!({ "join_rule": "invite" }), &before);
        bob.send(close).await;
        assert_eq!(bob.heads().len(), 2);
        let members = alice.ok_get(&format!("/rooms/{room}/joined_members")).await;
        assert_eq!(members["joined"].get("@carol:c.example"), None);
        alice.say(&room, "1", "after both").await;
        alice.say(&room, "2", "later").await;
        pause(&server, 5).await;
        if is_away {
            carol_told.weather(&net, Weather::Fair);
            carol_told.speak(&server).await;
            pause(&server, 5).await;
        }
        assert_eq!(bob_told.take_events(), ["after both", "later"]);
        // Her server believes that she is in the room, and learns by this that she is not.
        assert_eq!(carol_told.take_events(), ["after both"]);
        server.assert_whole();
    }
}
