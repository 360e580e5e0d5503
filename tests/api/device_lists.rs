//! Device lists and keys of devices between servers (server-server API, "Device Management" and "End-to-End Encryption").

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use aqueduct::{
    config::Bucket,
    encryption::elsewhere,
    schema,
    store::{Direction, Durability, Engine, Store, engine::Memory},
};
use federation::testing::{Net, Weather, json as answer_json};
use http::{Method, StatusCode};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{
        BEGAN_MS, TestClient, TestServer, encoded,
        federated::Federated,
        network::{Peer, doors},
        remote::Remote,
    },
};

const QUERY: &str = "/_matrix/client/v3/keys/query";
const CLAIM: &str = "/_matrix/client/v3/keys/claim";

/// Identity keys of a device, known by a text in them.
fn keys(user_id: &str, device_id: &str, text: &str) -> Value {
    json!({
        "user_id": user_id, "device_id": device_id, "algorithms": ["m.megolm.v1.aes-sha2"],
        "keys": { format!("ed25519:{device_id}"): text }, "signatures": {},
    })
}

pub(crate) async fn upload(client: &TestClient, text: &str) {
    let keys = keys(&client.user_id, &client.device_id, text);
    client.ok_post("/keys/upload", json!({ "device_keys": keys })).await;
}

/// The answer to a query for all devices of these users.
pub(crate) async fn query(client: &TestClient, users: &[&str]) -> Value {
    let users: BTreeMap<_, _> = users.iter().map(|user| ((*user).to_owned(), json!([]))).collect();
    client.ok_post("/keys/query", json!({ "device_keys": users, "timeout": 3_000 })).await
}

/// The devices of a user in an answer: the texts in their keys, and their names.
pub(crate) fn devices(answer: &Value, user: &str) -> Vec<String> {
    let Some(devices) = answer["device_keys"][user].as_object() else { return Vec::new() };
    let text = |(id, device): (&String, &Value)| {
        let text = device["keys"][format!("ed25519:{id}")].as_str().unwrap();
        match device["unsigned"]["device_display_name"].as_str() {
            Some(name) => format!("{text} ({name})"),
            None => text.to_owned(),
        }
    };
    devices.iter().map(text).collect()
}

/// A client that asks what became of device lists since it last asked.
/// A device that notes in each sync whose devices have changed.
pub(crate) struct Follower<'c> {
    client: &'c TestClient,
    since: String,
}

impl<'c> Follower<'c> {
    pub(crate) async fn new(client: &'c TestClient) -> Self {
        let sync = client.ok_get("/sync?timeout=0").await;
        Self { client, since: sync["next_batch"].as_str().unwrap().to_owned() }
    }

    /// One that goes on from this token.
    pub(crate) fn from(client: &'c TestClient, since: &str) -> Self {
        Self { client, since: since.to_owned() }
    }

    /// The token of its last sync.
    pub(crate) fn since(&self) -> &str {
        &self.since
    }

    /// The users of `changed` and of `left`; `/keys/changes` gives the same.
    pub(crate) async fn next(&mut self) -> (Vec<String>, Vec<String>) {
        let sync = self.client.ok_get(&format!("/sync?timeout=0&since={}", self.since)).await;
        let next = sync["next_batch"].as_str().unwrap().to_owned();
        let between = self.client.ok_get(&format!("/keys/changes?from={}&to={next}", self.since)).await;
        for name in ["changed", "left"] {
            let told = sync["device_lists"].get(name).cloned().unwrap_or_else(|| json!([]));
            assert_eq!(between[name], told, "{name} of /keys/changes");
        }
        self.since = next;
        let list = |name: &str| -> Vec<String> {
            let users = sync["device_lists"][name].as_array().cloned().unwrap_or_default();
            users.iter().map(|user| user.as_str().unwrap().to_owned()).collect()
        };
        (list("changed"), list("left"))
    }
}

pub(crate) async fn pause(server: &TestServer, seconds: u64) {
    server.server().app().env.sleep(Duration::from_secs(seconds)).await;
}

pub(crate) async fn join(client: &TestClient, room: &str, via: &str) {
    client.ok_post(&format!("/join/{}?via={via}", encoded(room)), json!({})).await;
}

/// Alice of one server in a room with Bob of another.
async fn two_servers() -> (Federated, TestClient, TestClient, String) {
    let federated = Federated::new(&["a.example", "b.example"]);
    let alice = federated.server(0).register("alice").await;
    let bob = federated.server(1).register("bob").await;
    upload(&alice, "first").await;
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    join(&bob, &room, "a.example").await;
    pause(federated.server(0), 5).await;
    (federated, alice, bob, room)
}

fn marks(server: &TestServer) -> usize {
    let snapshot = server.server().app().store.snapshot();
    schema::DEVICES_BEHIND.prefix::<()>(&*snapshot, (), Direction::Up).unwrap().count()
}

#[tokio::test(start_paused = true)]
async fn a_list_is_kept_and_follows_each_change_of_devices() {
    let (federated, alice, bob, _) = two_servers().await;
    let mut follower = Follower::new(&bob).await;
    let of = alice.user_id.as_str();
    assert_eq!(devices(&query(&bob, &[of]).await, of), ["first"]);
    assert_eq!(follower.next().await.0, [""; 0]);
    // The server of Alice is asked no more: whatever is answered is what it has told by itself.
    let steps = async |follower: &mut Follower<'_>, expected: &[&str]| {
        pause(federated.server(0), 5).await;
        assert_eq!(follower.next().await, (vec![of.to_owned()], Vec::new()));
        federated.weather(0, Weather::Refuses, Duration::ZERO);
        let answer = query(&bob, &[of]).await;
        federated.weather(0, Weather::Fair, Duration::ZERO);
        assert_eq!(answer["failures"], json!({}));
        let mut found = devices(&answer, of);
        found.sort();
        assert_eq!(found, expected);
    };
    let second = alice.on_device("SECOND").await;
    upload(&second, "second").await;
    steps(&mut follower, &["first", "second (name of SECOND)"]).await;
    alice.ok_put("/devices/SECOND", json!({ "display_name": "Phone" })).await;
    steps(&mut follower, &["first", "second (Phone)"]).await;
    upload(&alice, "renewed").await;
    steps(&mut follower, &["renewed", "second (Phone)"]).await;
    second.ok_post("/logout", json!({})).await;
    steps(&mut follower, &["renewed"]).await;
    // One device that is asked for comes alone.
    let one = json!({ "device_keys": { of: ["NONE"] } });
    assert_eq!(bob.ok_post("/keys/query", one).await["device_keys"], json!({ of: {} }));
    federated.server(0).assert_whole();
    federated.server(1).assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_server_that_was_away_learns_of_the_newest_change_and_asks_for_the_list() {
    for is_killed in [false, true] {
        let (mut federated, alice, bob, room) = two_servers().await;
        let of = alice.user_id.as_str();
        assert_eq!(devices(&query(&bob, &[of]).await, of), ["first"]);
        let mut follower = Follower::new(&bob).await;
        federated.weather(1, Weather::Refuses, Duration::ZERO);
        for number in 0..30 {
            upload(&alice, &format!("renewed {number}")).await;
            pause(federated.server(0), 1).await;
        }
        assert_eq!(marks(federated.server(0)), 1, "one mark for all changes of a user");
        if is_killed {
            let token = alice.token.clone();
            federated.kill(0, 0, |_| {});
            assert!(token.is_some());
        }
        federated.weather(1, Weather::Fair, Duration::ZERO);
        pause(federated.server(0), 200).await;
        assert_eq!(marks(federated.server(0)), 0);
        assert_eq!(follower.next().await, (vec![of.to_owned()], Vec::new()));
        // The list was asked for again by itself.
        federated.weather(0, Weather::Refuses, Duration::ZERO);
        let answer = query(&bob, &[of]).await;
        assert_eq!((devices(&answer, of), &answer["failures"]), (vec!["renewed 29".to_owned()], &json!({})));
        federated.weather(0, Weather::Fair, Duration::ZERO);
        pause(federated.server(0), 5).await;
        assert_eq!(follower.next().await.0, [""; 0], "it is told once");
        let _ = room;
        federated.server(0).assert_whole();
        federated.server(1).assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_kept_counts_only_while_a_room_is_shared() {
    let (federated, alice, bob, room) = two_servers().await;
    let of = alice.user_id.as_str();
    let mut follower = Follower::new(&bob).await;
    assert_eq!(devices(&query(&bob, &[of]).await, of), ["first"]);
    alice.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
    pause(federated.server(0), 5).await;
    assert_eq!(follower.next().await, (Vec::new(), vec![of.to_owned()]));
    upload(&alice, "apart").await;
    pause(federated.server(0), 5).await;
    assert_eq!(follower.next().await, (Vec::new(), Vec::new()), "nobody there is told");
    assert_eq!(devices(&query(&bob, &[of]).await, of), ["apart"], "the server of Alice is asked");
    join(&alice, &room, "b.example").await;
    upload(&alice, "together").await;
    pause(federated.server(0), 5).await;
    assert_eq!(follower.next().await, (vec![of.to_owned()], Vec::new()));
    assert_eq!(devices(&query(&bob, &[of]).await, of), ["together"]);
    // Bob's server leaves and comes back: it cannot know what it missed.
    let answer = query(&bob, &[of]).await;
    assert_eq!(devices(&answer, of), ["together"]);
    bob.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
    pause(federated.server(0), 5).await;
    upload(&alice, "apart again").await;
    pause(federated.server(0), 5).await;
    join(&bob, &room, "a.example").await;
    assert_eq!(devices(&query(&bob, &[of]).await, of), ["apart again"]);
    // Lists that count no more are forgotten after a while.
    bob.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
    pause(federated.server(1), 2 * 60 * 60).await;
    let snapshot = federated.server(1).server().app().store.snapshot();
    assert_eq!(schema::OTHER_LIST.prefix::<()>(&*snapshot, (), Direction::Up).unwrap().count(), 0);
    drop(snapshot);
    federated.server(1).assert_whole();
}

#[tokio::test(start_paused = true)]
async fn one_time_keys_are_claimed_elsewhere_each_once() {
    let (federated, alice, bob, _) = two_servers().await;
    let (of, device) = (alice.user_id.as_str(), alice.device_id.as_str());
    let one_time: BTreeMap<_, _> =
        (0..3).map(|number| (format!("signed_curve25519:{number}"), json!({ "key": number }))).collect();
    let fallback = json!({ "signed_curve25519:F": { "key": "f", "fallback": true } });
    alice.ok_post("/keys/upload", json!({ "one_time_keys": one_time, "fallback_keys": fallback })).await;
    let claim =
        json!({ "one_time_keys": { of: { device: "signed_curve25519", "NONE": "signed_curve25519" } } });
    let mut given = Vec::new();
    for _ in 0..5 {
        let (status, answer) = bob.post(CLAIM, claim.clone()).await;
        assert_eq!((status, &answer["failures"]), (StatusCode::OK, &json!({})));
        let keys = answer["one_time_keys"][of].as_object().unwrap();
        assert_eq!(keys.len(), 1, "{answer}");
        given.extend(keys[device].as_object().unwrap().keys().cloned());
    }
    let names = ["0", "1", "2", "F", "F"].map(|id| format!("signed_curve25519:{id}"));
    assert_eq!(given, names);
    let sync = alice.ok_get("/sync?timeout=0").await;
    assert_eq!(sync["device_unused_fallback_key_types"], json!([]));
    federated.weather(0, Weather::Refuses, Duration::ZERO);
    let (status, answer) = bob.post(CLAIM, claim).await;
    assert_eq!((status, &answer["one_time_keys"]), (StatusCode::OK, &json!({})));
    assert_eq!(answer["failures"]["a.example"]["status"], 503);
}

#[tokio::test(start_paused = true)]
async fn a_slow_server_holds_up_nobody_beyond_the_time_that_the_client_waits() {
    let federated = Federated::new(&["a.example", "b.example", "c.example"]);
    let alice = federated.server(0).register("alice").await;
    let bob = federated.server(1).register("bob").await;
    let carol = federated.server(2).register("carol").await;
    upload(&alice, "alice").await;
    upload(&bob, "bob").await;
    upload(&carol, "carol").await;
    let users = [alice.user_id.as_str(), bob.user_id.as_str(), carol.user_id.as_str(), "@d:none.example"];
    federated.weather(2, Weather::Silent, Duration::ZERO);
    let app = federated.server(0).server().app();
    let began = app.env.uptime();
    let answer = query(&alice, &users).await;
    let took = app.env.uptime() - began;
    assert!(took >= Duration::from_millis(2_500) && took < Duration::from_millis(3_500), "{took:?}");
    assert_eq!(devices(&answer, users[0]), ["alice"]);
    assert_eq!(devices(&answer, users[1]), ["bob"]);
    assert_eq!(devices(&answer, users[2]), [""; 0]);
    let failed: Vec<_> = answer["failures"].as_object().unwrap().keys().collect();
    assert_eq!(failed, ["c.example", "none.example"]);
    // Nobody shares a room, so that nothing is kept of the others.
    let snapshot = app.store.snapshot();
    assert_eq!(schema::OTHER_LIST.prefix::<()>(&*snapshot, (), Direction::Up).unwrap().count(), 0);
    let wanted = json!({ "device_keys": { users[2]: [] }, "timeout": 3_600_000 });
    let began = app.env.uptime();
    assert_eq!(alice.post(QUERY, wanted).await.0, StatusCode::OK);
    assert!(app.env.uptime() - began < Duration::from_secs(31), "nobody waits for an hour");
}

#[tokio::test(start_paused = true)]
async fn whoever_asks_many_silent_servers_waits_behind_their_own_questions() {
    let federated = Federated::new(&["a.example", "z.example"]);
    let alice = federated.server(0).register("alice").await;
    let carol = federated.server(0).register("carol").await;
    let bob = federated.server(1).register("bob").await;
    upload(&bob, "bob").await;
    let mut wanted = serde_json::Map::new();
    for number in 0..500 {
        federated.net.host(&format!("s{number}.example"), &["6.6.6.6"]);
        wanted.insert(format!("@x:s{number}.example"), json!([]));
    }
    federated.net.weather("6.6.6.6", Weather::Silent, Duration::ZERO);
    wanted.insert(bob.user_id.clone(), json!([]));
    let app = federated.server(0).server().app();
    let all = json!({ "device_keys": wanted, "timeout": 10_000 });
    let many = async { tokio::join!(alice.post(QUERY, all.clone()), alice.post(QUERY, all.clone())) };
    let other = async {
        app.env.sleep(Duration::from_secs(1)).await;
        let began = app.env.uptime();
        let answer = query(&carol, &[bob.user_id.as_str()]).await;
        assert_eq!(devices(&answer, &bob.user_id), ["bob"], "{answer}");
        let profile = format!("/_matrix/client/v3/profile/{}", encoded(&bob.user_id));
        assert_eq!(carol.get(&profile).await.0, StatusCode::OK);
        assert!(app.env.uptime() - began < Duration::from_secs(1), "nobody waits for what another asks");
    };
    let ((first, second), ()) = tokio::join!(many, other);
    for (status, answer) in [first, second] {
        assert_eq!(status, StatusCode::OK);
        assert!(answer["failures"].as_object().unwrap().len() >= 500, "silence is a failure");
    }
    // Those that did not answer are asked last from then on, so that the others are heard.
    for _ in 0..8 {
        let (_, answer) = alice.post(QUERY, all.clone()).await;
        if devices(&answer, &bob.user_id) == ["bob"] {
            return;
        }
    }
    panic!("a server that answers is never heard");
}

/// Another server that is a script: it notes what it is told, and answers what a test says about devices.
pub(crate) struct Script {
    net: Net,
    pub(crate) server: TestServer,
    pub(crate) alice: TestClient,
    room: String,
    pub(crate) peer: Peer,
    told: Arc<Mutex<Vec<Value>>>,
    asked: Arc<Mutex<Vec<String>>>,
    /// The answer about devices: a status and a body.
    answer: Arc<Mutex<(u16, Value)>>,
}

pub(crate) const BOB: &str = "@bob:b.example";

impl Script {
    /// A room of Alice's, in which Bob of the other server is.
    pub(crate) async fn new() -> Self {
        let net = Net::new(1);
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let server = TestServer::start(doors(&net), store, |_| {});
        let peer = Peer::new(&net, "b.example", "5.0.0.2", 2);
        let (told, asked) = (Arc::<Mutex<Vec<Value>>>::default(), Arc::<Mutex<Vec<String>>>::default());
        let answer = Arc::new(Mutex::new((200, json!({ "user_id": BOB, "stream_id": 1, "devices": [] }))));
        let (tells, asks, answers) = (Arc::clone(&told), Arc::clone(&asked), Arc::clone(&answer));
        let document = peer.own.document(BEGAN_MS);
        net.serve("5.0.0.2:8448", &["b.example"], move |arrived| {
            let path = arrived.request.uri().path().to_owned();
            let reply = if path.starts_with("/_matrix/federation/v1/send/") {
                let body: Value = serde_json::from_slice(arrived.request.body()).unwrap();
                tells.lock().extend(body["edus"].as_array().cloned().unwrap_or_default());
                answer_json(200, r#"{"pdus":{}}"#)
            } else if path.starts_with("/_matrix/federation/v1/user/") {
                asks.lock().push(path);
                let (status, body) = answers.lock().clone();
                answer_json(status, body.to_string())
            } else if path == "/_matrix/key/v2/server" {
                answer_json(200, document.to_string())
            } else {
                answer_json(404, "{}")
            };
            futures_util::future::ready(reply)
        });
        let alice = server.register("alice").await;
        let room = alice.create(json!({ "preset": "public_chat" })).await;
        Remote::new(server.server().app(), &room).join().await;
        pause(&server, 5).await;
        Self { net, server, alice, room, peer, told, asked, answer }
    }

    /// Has the script say this of devices from now on.
    pub(crate) fn answers(&self, status: u16, body: Value) {
        *self.answer.lock() = (status, body);
    }

    /// A list of devices, by their ids, each with its id in the keys.
    fn has(&self, stream_id: u64, devices: &[&str]) {
        let device = |id: &&str| json!({ "device_id": id, "keys": keys(BOB, id, id) });
        let devices: Vec<_> = devices.iter().map(device).collect();
        self.answers(200, json!({ "user_id": BOB, "stream_id": stream_id, "devices": devices }));
    }

    /// How often something was asked for since this was last asked.
    fn take_asked(&self) -> usize {
        std::mem::take(&mut *self.asked.lock()).len()
    }

    async fn tell(&self, txn: &str, contents: Vec<Value>) {
        let edus: Vec<_> = contents
            .into_iter()
            .map(|content| json!({ "edu_type": "m.device_list_update", "content": content }))
            .collect();
        let (status, answer) = self.peer.transact(&self.server, txn, &[], &edus).await;
        assert_eq!((status, answer), (StatusCode::OK, json!({ "pdus": {} })));
    }

    /// Takes what the server was told of devices and keys since this was last asked. A user who is online is told as well, which no test
    /// asks here.
    pub(crate) fn take_told(&self) -> Vec<Value> {
        let told = std::mem::take(&mut *self.told.lock());
        told.into_iter().filter(|edu| edu["edu_type"] != "m.presence").collect()
    }

    /// The updates of devices among these.
    fn take_updates(&self) -> Vec<Value> {
        let told = self.take_told().into_iter();
        let updates = told.filter(|edu| edu["edu_type"] == "m.device_list_update");
        updates.map(|edu| edu["content"].clone()).collect()
    }
}

fn update(stream_id: u64, prev_id: &[u64], device: &str) -> Value {
    json!({
        "user_id": BOB, "device_id": device, "stream_id": stream_id, "prev_id": prev_id, "keys": keys(BOB, device, device),
    })
}

#[tokio::test(start_paused = true)]
async fn a_gap_in_the_changes_has_the_list_asked_for_again_and_a_server_cannot_keep_us_asking() {
    let script = Script::new().await;
    script.has(5, &["A"]);
    assert_eq!(devices(&query(&script.alice, &[BOB]).await, BOB), ["A"]);
    assert_eq!(devices(&query(&script.alice, &[BOB]).await, BOB), ["A"]);
    assert_eq!(script.take_asked(), 1, "the list is kept");
    script.tell("1", vec![update(6, &[5], "B"), update(7, &[6], "C")]).await;
    script.tell("2", vec![update(7, &[6], "C")]).await;
    assert_eq!(devices(&query(&script.alice, &[BOB]).await, BOB), ["A", "B", "C"]);
    assert_eq!(script.take_asked(), 0);
    let mut follower = Follower::new(&script.alice).await;
    script.tell("3", vec![update(7, &[6], "C")]).await;
    assert_eq!(follower.next().await.0, [""; 0], "a change that comes again is none");
    // The change before this one never came.
    script.has(9, &["D"]);
    script.tell("4", vec![update(9, &[8], "D")]).await;
    assert_eq!(follower.next().await.0, [BOB]);
    pause(&script.server, 5).await;
    assert_eq!(script.take_asked(), 1);
    assert_eq!(devices(&query(&script.alice, &[BOB]).await, BOB), ["D"]);
    assert_eq!(script.take_asked(), 0);
    // A server that has a gap each time.
    for number in 0..600 {
        script
            .tell(&format!("gap{number}"), vec![update(1_000 + number * 2, &[999 + number * 2], "E")])
            .await;
        pause(&script.server, 1).await;
    }
    let asked = script.take_asked();
    assert!((5..=12).contains(&asked), "{asked} questions in ten minutes");
    script.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_list_that_is_asked_for_in_vain_is_asked_for_ever_later_and_told_to_nobody() {
    let script = Script::new().await;
    script.has(5, &["A"]);
    query(&script.alice, &[BOB]).await;
    script.take_asked();
    script.answers(500, json!({}));
    script.tell("1", vec![update(9, &[8], "D")]).await;
    pause(&script.server, 3_600).await;
    let asked = script.take_asked();
    assert!((4..=6).contains(&asked), "{asked}");
    let answer = query(&script.alice, &[BOB]).await;
    assert_eq!(devices(&answer, BOB), [""; 0]);
    assert_eq!(answer["failures"]["b.example"]["status"], 503);
    script.has(9, &["D"]);
    assert_eq!(devices(&query(&script.alice, &[BOB]).await, BOB), ["D"]);
    script.take_asked();
    assert_eq!(devices(&query(&script.alice, &[BOB]).await, BOB), ["D"]);
    assert_eq!(script.take_asked(), 0);
    // After a restart the list is still there.
    let killed = script.server.killed(usize::MAX);
    let snapshot = killed.server().app().store.snapshot();
    assert_eq!(schema::OTHER_DEVICE.prefix::<()>(&*snapshot, (), Direction::Up).unwrap().count(), 1);
}

#[tokio::test(start_paused = true)]
async fn answers_that_are_hostile_are_left_out() {
    let script = Script::new().await;
    let wrong = [
        json!([]),
        json!({ "user_id": "@eve:b.example", "stream_id": 5, "devices": [] }),
        json!({ "user_id": BOB, "stream_id": "5", "devices": [], "device_keys": 7 }),
    ];
    for wrong in wrong {
        script.answers(200, wrong);
        let answer = query(&script.alice, &[BOB]).await;
        assert_eq!(answer["failures"]["b.example"]["status"], 503, "{answer}");
        assert_eq!(answer["device_keys"], json!({}));
    }
    let devices_told = json!([
        { "device_id": "A", "keys": keys(BOB, "A", "A"), "device_display_name": "Phone" },
        { "device_id": "B", "keys": keys(BOB, "A", "B") },
        { "device_id": "C", "keys": keys(&script.alice.user_id, "C", "C") },
        "D",
    ]);
    let master = json!({ "user_id": BOB, "usage": ["master"], "keys": { "ed25519:m": "m" } });
    script.answers(
        200,
        json!({ "user_id": BOB, "stream_id": 5, "devices": devices_told, "master_key": master, "self_signing_key": 1 }),
    );
    for _ in 0..2 {
        let answer = query(&script.alice, &[BOB]).await;
        assert_eq!(devices(&answer, BOB), ["A (Phone)"]);
        assert_eq!(answer["master_keys"], json!({ BOB: master }));
        assert_eq!(answer.get("self_signing_keys"), None);
    }
    let signing = json!({ "user_id": BOB, "usage": ["self_signing"], "keys": { "ed25519:s": "s" } });
    let edu = json!({
        "edu_type": "m.signing_key_update", "content": { "user_id": BOB, "self_signing_key": signing },
    });
    script.peer.transact(&script.server, "1", &[], &[edu]).await;
    let answer = query(&script.alice, &[BOB]).await;
    assert_eq!(answer["self_signing_keys"], json!({ BOB: signing }));
    script.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn servers_that_are_new_to_a_user_are_told_of_the_devices_when_the_user_joins() {
    let script = Script::new().await;
    let carol = script.server.register("carol").await;
    let device = carol.device_id.clone();
    pause(&script.server, 5).await;
    script.take_updates();
    join(&carol, &script.room, "test.example").await;
    pause(&script.server, 5).await;
    let updates = script.take_updates();
    assert_eq!(updates.len(), 1, "{updates:?}");
    assert_eq!(updates[0]["user_id"], json!(carol.user_id));
    assert_eq!(updates[0]["device_id"], json!(device));
    // A server that knows the user already is told nothing of another room, and nothing of a new name.
    let other = script.alice.create(json!({ "preset": "public_chat" })).await;
    Remote::new(script.server.server().app(), &other).join().await;
    join(&carol, &other, "test.example").await;
    carol.ok_put(&format!("/profile/{}/displayname", carol.user_id), json!({ "displayname": "C" })).await;
    pause(&script.server, 5).await;
    assert_eq!(script.take_updates(), [json!(null); 0]);
    // Changes follow each other by their numbers, also where many devices go at once.
    for number in 0..30 {
        carol.on_device(&format!("D{number}")).await;
    }
    pause(&script.server, 5).await;
    let mut updates = script.take_updates();
    assert_eq!(updates.len(), 30);
    carol.ok_post("/logout/all", json!({})).await;
    pause(&script.server, 5).await;
    let gone = script.take_updates();
    assert!(gone.len() <= 20 && gone.iter().all(|update| update["deleted"] == true), "{gone:?}");
    assert_ne!(gone[0]["prev_id"][0], updates[29]["stream_id"], "more went than are told one by one");
    updates.truncate(30);
    for two in updates.windows(2).chain(gone.windows(2)) {
        assert_eq!(two[1]["prev_id"], json!([two[0]["stream_id"]]));
    }
    script.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn another_server_asks_for_devices_and_keys_of_our_users() {
    let script = Script::new().await;
    let alice = &script.alice;
    upload(alice, "alice").await;
    alice.ok_put(&format!("/devices/{}", alice.device_id), json!({ "display_name": "Phone" })).await;
    alice.on_device("NOKEYS").await;
    pause(&script.server, 5).await;
    let newest = script.take_updates().pop().unwrap();
    let ask = async |method, path: &str, body: Option<Value>| {
        script
            .peer
            .ask(&script.server, method, &format!("/_matrix/federation/v1/user/{path}"), body.as_ref())
            .await
    };
    let (status, list) = ask(Method::GET, &format!("devices/{}", encoded(&alice.user_id)), None).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(list["user_id"], json!(alice.user_id));
    assert_eq!(list["stream_id"], newest["stream_id"]);
    let mut shown = keys(&alice.user_id, &alice.device_id, "alice");
    shown["unsigned"] = json!({});
    let device = json!({ "device_id": alice.device_id, "device_display_name": "Phone", "keys": shown });
    assert_eq!(list["devices"], json!([device]));
    let (status, answer) =
        ask(Method::POST, "keys/query", Some(json!({ "device_keys": { &alice.user_id: [] } }))).await;
    assert_eq!(
        (status, devices(&answer, &alice.user_id)),
        (StatusCode::OK, vec!["alice (Phone)".to_owned()])
    );
    assert_eq!(answer.as_object().unwrap().len(), 1, "{answer}");
    let claim = |user: &str| json!({ "one_time_keys": { user: { &alice.device_id: "signed_curve25519" } } });
    let (status, answer) = ask(Method::POST, "keys/claim", Some(claim(&alice.user_id))).await;
    assert_eq!((status, answer), (StatusCode::OK, json!({ "one_time_keys": {} })));
    let one_time = json!({ "signed_curve25519:A": { "key": "a" } });
    alice.ok_post("/keys/upload", json!({ "one_time_keys": one_time })).await;
    let (_, answer) = ask(Method::POST, "keys/claim", Some(claim(&alice.user_id))).await;
    assert_eq!(answer["one_time_keys"][&alice.user_id][&alice.device_id], one_time);
    // Users of other servers are none of ours, and unknown ones have nothing.
    for (path, body) in [("keys/query", json!({ "device_keys": { BOB: [] } })), ("keys/claim", claim(BOB))] {
        let (status, answer) = ask(Method::POST, path, Some(body)).await;
        assert_eq!((status, &answer["errcode"]), (StatusCode::FORBIDDEN, &json!("M_FORBIDDEN")));
    }
    assert_eq!(ask(Method::GET, &format!("devices/{}", encoded(BOB)), None).await.0, StatusCode::FORBIDDEN);
    let none = encoded("@none:test.example");
    assert_eq!(ask(Method::GET, &format!("devices/{none}"), None).await.0, StatusCode::NOT_FOUND);
    let (_, answer) =
        ask(Method::POST, "keys/query", Some(json!({ "device_keys": { "@none:test.example": [] } }))).await;
    assert_eq!(answer, json!({ "device_keys": {} }));
    let many: BTreeMap<_, _> =
        (0..10_001).map(|number| (format!("@u{number}:test.example"), json!([]))).collect();
    let (status, _) = ask(Method::POST, "keys/query", Some(json!({ "device_keys": many }))).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    let _ = &script.net;
}

#[tokio::test(start_paused = true)]
async fn a_list_that_rests_on_a_room_where_its_user_may_not_be_is_asked_for_again_in_another_room() {
    let scene = Script::new().await;
    let carol = scene.server.register("carol").await;
    let other = carol.create(json!({ "preset": "public_chat" })).await;
    Remote::new(scene.server.server().app(), &other).join().await;
    let ask = async |client: &TestClient| devices(&query(client, &[BOB]).await, BOB);
    scene.has(1, &["A"]);
    assert_eq!(ask(&scene.alice).await, ["A"]);
    assert_eq!(scene.take_asked(), 1);
    // The server of Bob tells nothing of a new device, as if Bob had left the room long ago.
    scene.has(2, &["A", "B"]);
    assert_eq!(ask(&scene.alice).await, ["A"]);
    scene.alice.ok_post(&format!("/join/{}", encoded(&other)), json!({})).await;
    assert_eq!(
        ask(&scene.alice).await,
        ["A", "B"],
        "this room is not that of the one who says that Bob is there"
    );
    assert_eq!(scene.take_asked(), 1);
    // From now on the list counts again, also in rooms without Bob.
    scene.alice.create(json!({ "preset": "public_chat" })).await;
    assert_eq!(ask(&scene.alice).await, ["A", "B"]);
    assert_eq!(scene.take_asked(), 0);
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn each_device_of_a_claim_counts_for_the_host_of_the_server_that_claims() {
    let net = Net::new(1);
    let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
    let server = TestServer::start(doors(&net), store, |config| {
        config.limits.rate_limits = true;
        config.limits.inbound_to_device = Bucket { per_second: 0.01, burst: 10 };
    });
    let peer = Peer::new(&net, "b.example", "5.0.0.2", 2);
    let document = peer.own.document(BEGAN_MS);
    net.serve("5.0.0.2:8448", &["b.example"], move |arrived| {
        let is_keys = arrived.request.uri().path() == "/_matrix/key/v2/server";
        let (status, body) = if is_keys { (200, document.to_string()) } else { (404, "{}".to_owned()) };
        futures_util::future::ready(answer_json(status, body))
    });
    let alice = server.register("alice").await;
    let claim = async |count: usize| {
        let devices = (0..count).map(|number| (format!("D{number}"), "signed_curve25519"));
        let wanted = json!({ "one_time_keys": { &alice.user_id: devices.collect::<BTreeMap<_, _>>() } });
        let path = "/_matrix/federation/v1/user/keys/claim";
        peer.ask(&server, Method::POST, path, Some(&wanted)).await
    };
    let (status, answer) = claim(60).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let (status, answer) = claim(60).await;
    assert_eq!((status, &answer["errcode"]), (StatusCode::TOO_MANY_REQUESTS, &json!("M_LIMIT_EXCEEDED")));
}

#[tokio::test(start_paused = true)]
async fn a_list_does_not_count_any_more_into_which_a_change_did_not_come() {
    let script = Script::new().await;
    script.has(5, &["A"]);
    assert_eq!(devices(&query(&script.alice, &[BOB]).await, BOB), ["A"]);
    let is_current = || {
        let snapshot = script.server.server().app().store.snapshot();
        elsewhere::is_current(&snapshot, BOB.try_into().unwrap()).unwrap()
    };
    assert!(is_current());
    script.alice.ok_post(&format!("/rooms/{}/leave", script.room), json!({})).await;
    script.tell("1", vec![update(6, &[5], "B")]).await;
    pause(&script.server, 5).await;
    assert!(!is_current(), "the change is not in it");
}
