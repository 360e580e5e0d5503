//! Joins of rooms of which the members are left out, and learnt afterwards (server-server API, "PUT /send_join"; MSC3706, MSC3902).

mod after_a_gap;
mod claims;
mod coming_back;
mod traps;
mod waiting;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use aqueduct::{
    rooms::build::Signer,
    store::{Durability, Engine, Store, engine::Memory},
};
use federation::testing::{Net, Weather, json as answer, key_pair, own_keys};
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{
    BEGAN_MS, TestClient, TestServer, encoded,
    network::{Peer, doors},
    scripted::{ALICE, Elsewhere, Made, Tamper},
};

const CHARLIE: &str = "@charlie:a.example";
const DEREK: &str = "@derek:a.example";
const LAZY: &str = r#"{"room":{"timeline":{"lazy_load_members":true},"state":{"lazy_load_members":true}}}"#;

/// Our server and a room of `a.example` that it joined without its members.
struct Scene {
    room: Elsewhere,
    server: TestServer,
    bob: TestClient,
    net: Net,
    /// The server of the room, as it sends transactions.
    peer: Peer,
    /// Whether the server of the room gives the state that it is asked for.
    is_open: Arc<AtomicBool>,
    /// The paths that the server of the room was asked.
    asked: Arc<std::sync::Mutex<Vec<(String, Value)>>>,
    sent: u32,
}

/// A room with Charlie and Derek in it.
fn a_room(version: u8) -> Elsewhere {
    let mut room = Elsewhere::new(version);
    room.omits = true;
    for user in [CHARLIE, DEREK] {
        room.add_by(user, "m.room.member", Some(user), json!({ "membership": "join" }));
    }
    room
}

impl Scene {
    /// Bob has joined this room, of whose state the rest is not to be had for now.
    async fn of(room: Elsewhere) -> Self {
        Self::with(room, |_, answer| answer).await
    }

    /// Like [`Scene::of`], with changed answers.
    async fn with(room: Elsewhere, change: impl Fn(&str, Value) -> Value + Send + Sync + 'static) -> Self {
        let (net, is_open) = (Net::new(1), Arc::new(AtomicBool::new(false)));
        let open = Arc::clone(&is_open);
        let tamper: Tamper = Arc::new(move |asked, honest| {
            if asked.starts_with("state") && !open.load(Ordering::Relaxed) {
                return answer(404, r#"{"errcode":"M_NOT_FOUND","error":"not now"}"#);
            }
            answer(200, change(asked, honest).to_string())
        });
        let asked = room.serve(&net, tamper);
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let server = TestServer::start(doors(&net), store, |config| {
            // Nobody else is there to be told anything.
            let allowed = ["a.example", "b.example", "c.example", "a-*.example"];
            config.federation.allow = allowed.map(str::to_owned).to_vec();
        });
        let bob = server.register("bob").await;
        let peer = Peer::unheard("a.example", 9);
        let mut scene = Self { room, server, bob, net, peer, is_open, asked, sent: 0 };
        scene.bob.ok_post(&format!("/join/{}?via=a.example", scene.id()), json!({})).await;
        scene.note_join().await;
        scene
    }

    /// The room goes on with Bob's join.
    async fn note_join(&mut self) {
        self.note_join_of(&self.bob.clone()).await;
    }

    /// The room goes on with the join of this user of our server.
    async fn note_join_of(&mut self, user: &TestClient) {
        let path =
            format!("/rooms/{}/state/m.room.member/{}?format=event", self.id(), encoded(&user.user_id));
        let join = user.ok_get(&path).await;
        let is_join = |(path, event): &&(String, Value)| {
            path.contains("/v2/send_join/") && event["state_key"] == user.user_id
        };
        let json = self.asked.lock().unwrap().iter().rfind(is_join).unwrap().1.clone();
        let join = Made { id: join["event_id"].as_str().unwrap().try_into().unwrap(), json };
        self.room.events.push(join.clone());
        self.room.state.insert(("m.room.member".to_owned(), user.user_id.clone()), join);
    }

    fn id(&self) -> String {
        encoded(self.room.room_id.as_str())
    }

    /// The room's events go on after our join, and each is sent to us.
    async fn send(&mut self, events: &[&Made]) {
        self.sent += 1;
        let pdus: Vec<_> = events.iter().map(|event| event.json.clone()).collect();
        let (status, told) = self.peer.transact(&self.server, &self.sent.to_string(), &pdus, &[]).await;
        assert_eq!(status, StatusCode::OK, "{told}");
        for event in events {
            assert_eq!(told["pdus"][event.id.as_str()], json!({}), "{told}");
        }
    }

    /// A sync of the room by a client that loads members lazily; from the beginning, or since a token.
    async fn lazy(&self, since: Option<&str>) -> Value {
        let since = since.map(|since| format!("&since={since}")).unwrap_or_default();
        self.bob.ok_get(&format!("/sync?filter={}{since}", encoded(LAZY))).await
    }

    /// The room in a sync.
    fn told<'s>(&self, sync: &'s Value) -> &'s Value {
        &sync["rooms"]["join"][self.room.room_id.as_str()]
    }

    /// Lets the state be had, and waits until it must have been asked for.
    async fn open(&self) {
        self.is_open.store(true, Ordering::Relaxed);
        self.server.server().app().env.sleep(Duration::from_secs(200)).await;
    }

    /// Bob leaves, and the room goes on with that.
    async fn leave(&mut self) {
        self.bob.ok_post(&format!("/rooms/{}/leave", self.id()), json!({})).await;
        self.pause(5).await;
        let is_leave =
            |pdu: &Value| pdu["content"]["membership"] == "leave" && pdu["sender"] == self.bob.user_id;
        let json = sent(&self.asked, "pdus").into_iter().rfind(is_leave).unwrap();
        let id = aqueduct::rooms::change::Signed::find_id(self.room.version, json.to_string().as_bytes());
        self.go_on_with(Made { id: id.unwrap(), json });
    }

    /// The room goes on with a member event of Bob, also for those who ask its server.
    fn go_on_with(&mut self, event: Made) {
        self.room.events.push(event.clone());
        self.room.state.insert(("m.room.member".to_owned(), self.bob.user_id.clone()), event);
        self.serve_again();
    }

    /// The room's server answers by the room as it is now.
    fn serve_again(&mut self) {
        let open = Arc::clone(&self.is_open);
        let tamper: Tamper = Arc::new(move |asked, honest| {
            if asked.starts_with("state") && !open.load(Ordering::Relaxed) {
                return answer(404, r#"{"errcode":"M_NOT_FOUND","error":"not now"}"#);
            }
            answer(200, honest.to_string())
        });
        self.asked = self.room.serve(&self.net, tamper);
    }

    async fn pause(&self, seconds: u64) {
        self.server.server().app().env.sleep(Duration::from_secs(seconds)).await;
    }

    /// Bob wants to join the room once more.
    async fn join(&self) -> (StatusCode, Value) {
        self.join_as(&self.bob).await
    }

    async fn join_as(&self, user: &TestClient) -> (StatusCode, Value) {
        user.post(&format!("/_matrix/client/v3/join/{}?via=a.example", self.id()), json!({})).await
    }

    /// The events of the room's state here, sorted: type, state key, id.
    async fn state(&self) -> Vec<(String, String, String)> {
        let state = self.bob.ok_get(&format!("/rooms/{}/state", self.id())).await;
        let text = |event: &Value, field: &str| event[field].as_str().unwrap().to_owned();
        let state = state.as_array().unwrap().iter();
        let mut state: Vec<_> =
            state.map(|it| (text(it, "type"), text(it, "state_key"), text(it, "event_id"))).collect();
        state.sort();
        state
    }

    /// The events of the room's state elsewhere.
    fn expected(&self) -> Vec<(String, String, String)> {
        let state = self.room.state.iter();
        let mut state: Vec<_> =
            state.map(|((kind, key), event)| (kind.clone(), key.clone(), event.id.to_string())).collect();
        state.sort();
        state
    }
}

/// The events or the ephemeral messages that a server was sent, oldest first.
fn sent(asked: &std::sync::Mutex<Vec<(String, Value)>>, field: &str) -> Vec<Value> {
    let asked = asked.lock().unwrap();
    let sent = asked.iter().filter(|(path, _)| path.contains("/send/"));
    sent.flat_map(|(_, body)| body[field].as_array().cloned().unwrap_or_default()).collect()
}

/// The changes of devices that a server was told, oldest first.
fn updates(asked: &std::sync::Mutex<Vec<(String, Value)>>) -> Vec<Value> {
    let edus = sent(asked, "edus").into_iter().filter(|edu| edu["edu_type"] == "m.device_list_update");
    edus.map(|edu| edu["content"].clone()).collect()
}

/// Puts the server `b.example` into the network. Gives what it was asked: path and body.
fn serve_b(net: &Net) -> Arc<std::sync::Mutex<Vec<(String, Value)>>> {
    let keys = own_keys("b.example", 8, "k").unwrap().document(BEGAN_MS);
    let asked = Arc::new(std::sync::Mutex::new(Vec::new()));
    let notes = Arc::clone(&asked);
    net.host("b.example", &["5.9.0.2"]);
    net.serve("5.9.0.2:8448", &["b.example"], move |arrived| {
        let path = arrived.request.uri().path().to_owned();
        let body = serde_json::from_slice(arrived.request.body()).unwrap_or(Value::Null);
        notes.lock().unwrap().push((path.clone(), body));
        std::future::ready(match path.as_str() {
            "/_matrix/key/v2/server" => answer(200, keys.to_string()),
            path if path.contains("/send/") => answer(200, r#"{"pdus":{}}"#),
            _ => answer(404, r#"{"errcode":"M_NOT_FOUND","error":"?"}"#),
        })
    });
    asked
}

fn ids(events: &Value) -> Vec<&str> {
    events["events"]
        .as_array()
        .map(|it| it.iter().map(|event| event["event_id"].as_str().unwrap()).collect())
        .unwrap_or_default()
}

fn members(events: &Value) -> Vec<&str> {
    let events = events["events"].as_array().unwrap().iter();
    let mut members: Vec<_> = events
        .filter(|it| it["type"] == "m.room.member")
        .map(|it| it["state_key"].as_str().unwrap())
        .collect();
    members.sort();
    members
}

#[tokio::test(start_paused = true)]
async fn a_room_is_of_use_before_its_members_are_known() {
    for version in [6, 11, 12] {
        let mut scene = Scene::of(a_room(version)).await;
        let room = scene.id();
        let path = |it: &str| format!("/rooms/{room}/{it}");
        let eager = scene.bob.ok_get("/sync").await;
        assert_eq!(scene.told(&eager), &Value::Null, "members are wanted that nobody knows yet");
        let first = scene.lazy(None).await;
        assert_eq!(scene.told(&first)["timeline"]["events"].as_array().unwrap().len(), 1, "{first}");
        let since = first["next_batch"].as_str().unwrap().to_owned();
        let sent = scene.bob.ok_put(&path("send/m.room.message/1"), json!({ "body": "hello" })).await;
        assert_eq!(
            ids(&scene.told(&scene.lazy(Some(&since)).await)["timeline"]),
            [sent["event_id"].as_str().unwrap()]
        );
        scene.server.server().app().env.sleep(Duration::from_secs(5)).await;
        let heard = scene.asked.lock().unwrap().iter().any(|(path, body)| {
            path.contains("/send/")
                && body["pdus"].as_array().unwrap().iter().any(|pdu| pdu["content"]["body"] == "hello")
        });
        assert!(heard, "the servers that are said to be in the room are told");
        // Derek is not known, and says something.
        let said = scene.room.add_by(DEREK, "m.room.message", None, json!({ "body": "who are you?" }));
        scene.send(&[&said]).await;
        let sync = scene.lazy(Some(&since)).await;
        let told = scene.told(&sync);
        assert!(ids(&told["timeline"]).contains(&said.id.as_str()), "{told}");
        assert_eq!(members(&told["state"]), [DEREK], "the sender is told with what they say");
        let asks = scene.bob.clone();
        let members_path = path("members");
        let mut waits = Box::pin(async move { asks.ok_get(&members_path).await });
        let asks = scene.bob.clone();
        let charlie = path(&format!("state/m.room.member/{}", encoded(CHARLIE)));
        let mut waits_too = Box::pin(async move { asks.ok_get(&charlie).await });
        let env = scene.server.server().app().env.clone();
        tokio::select! {
            answer = &mut waits => panic!("not all members are known: {answer}"),
            answer = &mut waits_too => panic!("nothing is known of Charlie: {answer}"),
            () = env.sleep(Duration::from_secs(5)) => {}
        }
        scene.server.assert_whole();
        scene.open().await;
        let chunk = waits.await["chunk"].as_array().unwrap().clone();
        assert_eq!(chunk.len(), 4, "{chunk:?}");
        assert_eq!(waits_too.await["membership"], "join");
        assert_eq!(scene.state().await, scene.expected());
        let sync = scene.bob.ok_get(&format!("/sync?since={}", eager["next_batch"].as_str().unwrap())).await;
        let told = scene.told(&sync);
        assert_eq!(told["summary"]["m.joined_member_count"], 4, "{sync}");
        let mut all = members(&told["state"]);
        all.extend(members(&told["timeline"]));
        all.sort();
        assert_eq!(all, [ALICE, &*scene.bob.user_id, CHARLIE, DEREK], "{sync}");
        let sync = scene.lazy(Some(&since)).await;
        assert_eq!(scene.told(&sync)["summary"]["m.joined_member_count"], 4, "{sync}");
        let changed = sync["device_lists"]["changed"].as_array().unwrap();
        assert!(changed.contains(&json!(CHARLIE)) && changed.contains(&json!(DEREK)), "{sync}");
        scene.server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_accepted_by_a_part_of_the_state_is_judged_again() {
    let mut room = Elsewhere::new(11);
    room.omits = true;
    let elsie = "@elsie:a.example";
    room.add("m.room.power_levels", Some(""), json!({ "users": { ALICE: 100, DEREK: 100, elsie: 50 } }));
    let joined = room.add_by(DEREK, "m.room.member", Some(DEREK), json!({ "membership": "join" }));
    let left = room.add_by(DEREK, "m.room.member", Some(DEREK), json!({ "membership": "leave" }));
    room.add_by(elsie, "m.room.member", Some(elsie), json!({ "membership": "join" }));
    let mut scene = Scene::of(room).await;
    // Derek names the event by which he was in the room, and not the one by which he left.
    let key = ("m.room.member".to_owned(), DEREK.to_owned());
    scene.room.state.insert(key.clone(), joined);
    let bad = scene.room.event(DEREK, "org.example.bad", Some(""), json!({}));
    scene.room.events.push(bad.clone());
    let kick = scene.room.event(DEREK, "m.room.member", Some(elsie), json!({ "membership": "leave" }));
    scene.room.events.push(kick.clone());
    scene.room.state.insert(key, left);
    let good = scene.room.add_by(elsie, "org.example.good", Some(""), json!({}));
    let said = scene.room.add_by(elsie, "m.room.message", None, json!({ "body": "I am here" }));
    let last = scene.room.add("m.room.message", None, json!({ "body": "all are judged" }));
    scene.send(&[&bad, &kick, &good, &said, &last]).await;
    let first = scene.lazy(None).await;
    let told = ids(&scene.told(&first)["timeline"]);
    for (event, is_told) in [(&bad, true), (&kick, true), (&good, false), (&said, false), (&last, true)] {
        assert_eq!(told.contains(&event.id.as_str()), is_told, "{}", event.json["type"]);
    }
    scene.server.assert_whole();
    scene.open().await;
    assert_eq!(scene.state().await, scene.expected());
    for (event, status) in [
        (&bad, StatusCode::NOT_FOUND),
        (&kick, StatusCode::NOT_FOUND),
        (&good, StatusCode::OK),
        (&said, StatusCode::OK),
        (&last, StatusCode::OK),
    ] {
        let path = format!("/_matrix/client/v3/rooms/{}/event/{}", scene.id(), encoded(event.id.as_str()));
        assert_eq!(scene.bob.get(&path).await.0, status, "{}", event.json["type"]);
    }
    let since = first["next_batch"].as_str().unwrap();
    let sync = scene.lazy(Some(since)).await;
    let told = scene.told(&sync);
    assert_eq!(ids(&told["timeline"]), [good.id.as_str(), said.id.as_str()], "{told}");
    // The state before the newest event is told to others as it is by now.
    let uri =
        format!("/_matrix/federation/v1/state_ids/{}?event_id={}", scene.id(), encoded(last.id.as_str()));
    let (status, told) = scene.peer.ask(&scene.server, Method::GET, &uri, None).await;
    assert_eq!(status, StatusCode::OK, "{told}");
    let mut told: Vec<_> =
        told["pdu_ids"].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()).collect();
    told.sort();
    let mut expected: Vec<_> = scene.expected().into_iter().map(|(.., id)| id).collect();
    expected.sort();
    assert_eq!(told, expected);
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn what_rests_on_the_word_of_an_event_gives_way_to_what_the_next_one_names() {
    let mut room = Elsewhere::new(11);
    room.omits = true;
    let elsie = "@elsie:a.example";
    room.add("m.room.power_levels", Some(""), json!({ "users": { ALICE: 100, DEREK: 100 } }));
    let joined = room.add_by(DEREK, "m.room.member", Some(DEREK), json!({ "membership": "join" }));
    let left = room.add_by(DEREK, "m.room.member", Some(DEREK), json!({ "membership": "leave" }));
    let mut scene = Scene::of(room).await;
    let join = scene.room.add_by(elsie, "m.room.member", Some(elsie), json!({ "membership": "join" }));
    // Derek, who is not in the room, removes Elsie, and names neither that he left nor that she came.
    let key = |user: &str| ("m.room.member".to_owned(), user.to_owned());
    scene.room.state.insert(key(DEREK), joined);
    scene.room.state.remove(&key(elsie));
    let kick = scene.room.event(DEREK, "m.room.member", Some(elsie), json!({ "membership": "leave" }));
    scene.room.events.push(kick.clone());
    scene.room.state.insert(key(DEREK), left);
    scene.room.state.insert(key(elsie), join.clone());
    let said = scene.room.add_by(elsie, "m.room.message", None, json!({ "body": "I am here" }));
    scene.send(&[&join, &kick, &said]).await;
    let sync = scene.lazy(None).await;
    let told = ids(&scene.told(&sync)["timeline"]);
    assert!(told.contains(&kick.id.as_str()) && told.contains(&said.id.as_str()), "{sync}");
    scene.server.assert_whole();
    scene.open().await;
    assert_eq!(scene.state().await, scene.expected());
    for (event, status) in [(&kick, StatusCode::NOT_FOUND), (&said, StatusCode::OK)] {
        let path = format!("/_matrix/client/v3/rooms/{}/event/{}", scene.id(), encoded(event.id.as_str()));
        assert_eq!(scene.bob.get(&path).await.0, status, "{}", event.json["type"]);
    }
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn other_servers_ask_another_while_the_state_is_partial() {
    let scene = Scene::of(a_room(11)).await;
    let room = scene.id();
    let last = encoded(scene.room.events.last().unwrap().id.as_str());
    let erin = encoded("@erin:a.example");
    let asks = [
        (format!("make_join/{room}/{erin}?ver=11"), StatusCode::NOT_FOUND),
        (format!("make_knock/{room}/{erin}?ver=11"), StatusCode::NOT_FOUND),
        (format!("state_ids/{room}?event_id={last}"), StatusCode::FORBIDDEN),
        (format!("state/{room}?event_id={last}"), StatusCode::FORBIDDEN),
    ];
    for is_open in [false, true] {
        for (path, refused) in &asks {
            let uri = format!("/_matrix/federation/v1/{path}");
            let status = scene.peer.ask(&scene.server, Method::GET, &uri, None).await.0;
            assert_eq!(status == *refused, !is_open, "{path}: {status}");
        }
        scene.open().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_names_no_servers_or_too_many_joins_as_far_as_it_can() {
    let many: Vec<String> = (0..100_000).map(|number| format!("s{number}.example")).collect();
    let odd = json!(["", "no name", "x".repeat(300), "b.example", "test.example", "b.example"]);
    for (servers, listed) in [(json!(many), 10_002), (odd, 3), (json!([]), 2)] {
        let change = move |asked: &str, mut answer: Value| {
            if asked == "send_join" {
                answer["servers_in_room"] = servers.clone();
            }
            answer
        };
        let scene = Scene::with(a_room(11), change).await;
        let app = scene.server.server().app();
        let num = crate::support::room_num(&app.store, scene.room.room_id.as_str());
        let count = |app: &aqueduct::flows::App| {
            aqueduct::rooms::members::list_servers(&*app.store.snapshot(), num).unwrap().count()
        };
        assert_eq!(count(app), listed);
        scene.server.assert_whole();
        scene.open().await;
        assert_eq!(count(app), 2, "nobody else is in the room");
        assert_eq!(scene.state().await, scene.expected());
        scene.server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn the_rest_of_the_state_is_asked_for_again_after_a_restart() {
    let mut scene = Scene::of(a_room(11)).await;
    let said = scene.room.add_by(DEREK, "m.room.message", None, json!({ "body": "before" }));
    scene.send(&[&said]).await;
    let Engine::Memory(memory) = scene.server.server().app().store.engine() else { panic!("not in memory") };
    let store = Store::open(Engine::Memory(memory.after_crash(usize::MAX)), Durability::Fsync).unwrap();
    scene.server.server().app().env.kill();
    scene.server = TestServer::start(doors(&scene.net), store, |_| {});
    scene.bob = TestClient { server: scene.server.clone(), ..scene.bob.clone() };
    assert_eq!(scene.told(&scene.bob.ok_get("/sync").await), &Value::Null);
    scene.open().await;
    assert_eq!(scene.state().await, scene.expected());
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_state_that_is_wrong_or_never_comes_leaves_the_room_as_it_is() {
    let without = |kind: &'static str| {
        move |asked: &str, mut answer: Value| {
            if asked == "state_ids" {
                answer["pdu_ids"] = json!([]);
            } else if asked == "state" {
                answer["pdus"].as_array_mut().unwrap().retain(|event| event["type"] != kind);
            }
            answer
        }
    };
    let scene = Scene::with(a_room(11), without("m.room.create")).await;
    scene.open().await;
    let sync = scene.lazy(None).await;
    assert_ne!(scene.told(&sync), &Value::Null);
    let path = format!("/_matrix/client/v3/rooms/{}/members", scene.id());
    let (status, _) = scene.bob.get(&path).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "nobody waits for ever");
    scene
        .bob
        .ok_put(&format!("/rooms/{}/send/m.room.message/1", scene.id()), json!({ "body": "hello" }))
        .await;
    scene.server.assert_whole();
}

/// A member of a third server, whose keys nobody gives at first.
const FRANK: &str = "@frank:c.example";

#[tokio::test(start_paused = true)]
async fn a_member_whose_keys_cannot_be_had_yet_comes_into_the_state_later() {
    let mut room = a_room(11);
    let mut of_frank = room.clone();
    of_frank.signer = Signer::new("c.example".try_into().unwrap(), key_pair(11, "k").unwrap().into());
    let joined = of_frank.add_by(FRANK, "m.room.member", Some(FRANK), json!({ "membership": "join" }));
    room.events.push(joined.clone());
    room.state.insert(("m.room.member".to_owned(), FRANK.to_owned()), joined);
    let scene = Scene::of(room).await;
    let first = scene.lazy(None).await;
    // A part of the state is learnt all the same.
    scene.open().await;
    let without_frank = |state: Vec<(String, String, String)>| -> Vec<_> {
        state.into_iter().filter(|(_, key, _)| key != FRANK).collect()
    };
    assert_eq!(scene.state().await, without_frank(scene.expected()));
    let path =
        format!("/_matrix/federation/v1/make_join/{}/{}?ver=11", scene.id(), encoded("@erin:a.example"));
    let (status, _) = scene.peer.ask(&scene.server, Method::GET, &path, None).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "others may not rely on that");
    Peer::new(&scene.net, "c.example", "5.9.0.3", 11);
    scene.server.server().app().env.sleep(Duration::from_secs(2_000)).await;
    assert_eq!(scene.state().await, scene.expected());
    let sync = scene.lazy(first["next_batch"].as_str()).await;
    let told = scene.told(&sync);
    assert_eq!(told["summary"]["m.joined_member_count"], 5, "{told}");
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn what_the_event_replaced_that_a_join_cites_does_not_come_back() {
    let mut room = a_room(11);
    let of_frank = Signer::new("c.example".try_into().unwrap(), key_pair(11, "k").unwrap().into());
    let own = std::mem::replace(&mut room.signer, of_frank);
    let mut comes = |content: Value| room.add_by(FRANK, "m.room.member", Some(FRANK), content);
    let first = comes(json!({ "membership": "join" }));
    let last = comes(json!({ "membership": "join", "displayname": "Frank" }));
    room.signer = own;
    // The state is that before the event which our join cites, and nobody gives the keys for either.
    let change = move |asked: &str, mut answer: Value| {
        let ids = answer["pdu_ids"].as_array_mut().filter(|_| asked == "state_ids");
        for id in ids.into_iter().flatten().filter(|id| **id == last.id.as_str()) {
            *id = json!(first.id);
        }
        answer
    };
    let scene = Scene::with(room, change).await;
    scene.open().await;
    Peer::new(&scene.net, "c.example", "5.9.0.3", 11);
    scene.pause(2_000).await;
    assert_eq!(scene.state().await, scene.expected());
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_state_of_which_an_event_gets_lost_on_the_way_is_asked_for_again() {
    let (lost, count) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
    let (loses, counts) = (Arc::clone(&lost), Arc::clone(&count));
    let change = move |asked: &str, honest: Value| {
        let is_derek = asked == "event" && honest["pdus"][0]["state_key"] == DEREK;
        counts.fetch_add(usize::from(is_derek), Ordering::Relaxed);
        if is_derek && loses.load(Ordering::Relaxed) { json!({ "pdus": [] }) } else { honest }
    };
    let scene = Scene::with(a_room(11), change).await;
    scene.open().await;
    assert!(count.load(Ordering::Relaxed) > 0, "single events are asked for");
    let path = format!("/_matrix/client/v3/rooms/{}/members", scene.id());
    assert_eq!(scene.bob.get(&path).await.0, StatusCode::TOO_MANY_REQUESTS, "the state is not whole yet");
    lost.store(false, Ordering::Relaxed);
    scene.open().await;
    assert_eq!(scene.state().await, scene.expected());
    scene.server.assert_whole();
    // A server that never gives it is not waited for without end.
    lost.store(true, Ordering::Relaxed);
    let never = Arc::clone(&lost);
    let change = move |asked: &str, honest: Value| {
        let is_derek = asked == "event" && honest["pdus"][0]["state_key"] == DEREK;
        if is_derek && never.load(Ordering::Relaxed) { json!({ "pdus": [] }) } else { honest }
    };
    let scene = Scene::with(a_room(11), change).await;
    for _ in 0..5 {
        scene.open().await;
    }
    let expected: Vec<_> = scene.expected().into_iter().filter(|(_, key, _)| key != DEREK).collect();
    assert_eq!(scene.state().await, expected);
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn who_is_not_in_a_room_is_told_so_while_its_members_are_unknown() {
    let scene = Scene::of(a_room(11)).await;
    scene.open().await;
    let (carol, dave) = (scene.server.register("carol").await, scene.server.register("dave").await);
    let begins = dave.ok_get("/sync").await;
    let knows = scene.bob.ok_get("/sync").await;
    assert_ne!(scene.told(&knows), &Value::Null);
    scene.bob.ok_post(&format!("/rooms/{}/leave", scene.id()), json!({})).await;
    // Carol comes into the room, and its members are to be learnt anew.
    scene.is_open.store(false, Ordering::Relaxed);
    carol.ok_post(&format!("/join/{}?via=a.example", scene.id()), json!({})).await;
    assert_eq!(scene.told(&carol.ok_get("/sync").await), &Value::Null, "the room is withheld");
    carol.ok_post(&format!("/rooms/{}/invite", scene.id()), json!({ "user_id": dave.user_id })).await;
    let room = scene.room.room_id.as_str();
    let since = |sync: &Value| format!("/sync?since={}", sync["next_batch"].as_str().unwrap());
    let sync = scene.bob.ok_get(&since(&knows)).await;
    assert_ne!(sync["rooms"]["leave"][room], Value::Null, "Bob left: {sync}");
    let sync = dave.ok_get(&since(&begins)).await;
    assert_ne!(sync["rooms"]["invite"][room], Value::Null, "Dave is invited: {sync}");
    scene.open().await;
}

#[tokio::test(start_paused = true)]
async fn devices_are_announced_once_it_is_known_who_is_in_the_room() {
    let names_b = |asked: &str, mut answer: Value| {
        if asked == "send_join" {
            answer["servers_in_room"] = json!(["a.example", "b.example"]);
        }
        answer
    };
    let scene = Scene::with(a_room_with_elsie(), names_b).await;
    let told_b = serve_b(&scene.net);
    scene.pause(60).await;
    for asked in [&scene.asked, &told_b] {
        assert_eq!(updates(asked), [json!(null); 0], "only one server says who is in the room");
    }
    scene.is_open.store(true, Ordering::Relaxed);
    scene.bob.ok_get(&format!("/rooms/{}/members", scene.id())).await;
    scene.pause(1).await;
    assert_eq!(updates(&told_b), [json!(null); 0], "Bob may be gone soon");
    scene.pause(30).await;
    let told = updates(&told_b);
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!((&told[0]["user_id"], &told[0]["prev_id"]), (&json!(scene.bob.user_id), &json!([])));
    assert_eq!(updates(&scene.asked), told);
    scene.pause(60).await;
    assert_eq!(updates(&told_b), told, "nobody is told twice");
    // A user who has left again by then is announced to nobody else.
    let mut scene = Scene::with(a_room_with_elsie(), names_b).await;
    let told_b = serve_b(&scene.net);
    scene.is_open.store(true, Ordering::Relaxed);
    scene.bob.ok_get(&format!("/rooms/{}/members", scene.id())).await;
    scene.leave().await;
    scene.pause(60).await;
    assert_eq!(updates(&told_b), [json!(null); 0]);
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_server_that_turns_out_to_be_in_the_room_is_told_of_the_devices_that_changed_meanwhile() {
    let scene = Scene::of(a_room_with_elsie()).await;
    let told_b = serve_b(&scene.net);
    let device = format!("/devices/{}", scene.bob.device_id);
    scene.bob.ok_put(&device, json!({ "display_name": "new" })).await;
    scene.pause(10).await;
    let told = updates(&scene.asked);
    assert_eq!(told.len(), 1, "a server that is said to be in the room is told of changes: {told:?}");
    assert_eq!(updates(&told_b), [json!(null); 0], "nobody knows of Elsie");
    scene.is_open.store(true, Ordering::Relaxed);
    scene.bob.ok_get(&format!("/rooms/{}/members", scene.id())).await;
    scene.pause(2).await;
    assert_eq!(updates(&told_b), told, "what was missed is told at once");
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_alias_and_the_directory_tell_what_is_known_of_the_room() {
    let mut room = a_room(11);
    let levels = json!({ "users": { ALICE: 100, "@bob:test.example": 100 } });
    room.add("m.room.power_levels", Some(""), levels);
    let scene = Scene::of(room).await;
    let alias = encoded("#ours:test.example");
    scene.bob.ok_put(&format!("/directory/room/{alias}"), json!({ "room_id": scene.room.room_id })).await;
    let named = scene.bob.ok_get(&format!("/directory/room/{alias}")).await;
    assert_eq!(named["servers"], json!(["test.example", "a.example"]));
    let listed = format!("/directory/list/room/{}", scene.id());
    scene.bob.ok_put(&listed, json!({ "visibility": "public" })).await;
    let count = async || scene.bob.ok_get("/publicRooms").await["chunk"][0]["num_joined_members"].clone();
    let before = count().await;
    assert!(before.as_u64().unwrap() < 4, "{before}");
    let search = async || {
        let body = json!({ "search_term": "derek" });
        scene.bob.post("/_matrix/client/v3/user_directory/search", body).await.1["results"].clone()
    };
    assert_eq!(search().await, json!([]));
    scene.open().await;
    assert_eq!(count().await, 4);
    assert_eq!(search().await, json!([{ "user_id": DEREK }]));
}

/// A room in which Elsie of `b.example` is, too.
fn a_room_with_elsie() -> Elsewhere {
    let mut room = a_room(11);
    let elsie = "@elsie:b.example";
    let of_b = Signer::new("b.example".try_into().unwrap(), key_pair(8, "k").unwrap().into());
    let own = std::mem::replace(&mut room.signer, of_b);
    room.add_by(elsie, "m.room.member", Some(elsie), json!({ "membership": "join" }));
    room.signer = own;
    room
}

/// The texts of the messages that a server was sent.
fn texts(asked: &std::sync::Mutex<Vec<(String, Value)>>) -> Vec<String> {
    let bodies =
        sent(asked, "pdus").into_iter().filter_map(|pdu| pdu["content"]["body"].as_str().map(str::to_owned));
    bodies.collect()
}

#[tokio::test(start_paused = true)]
async fn a_server_that_names_thousands_of_others_has_us_tell_a_bounded_number_of_them() {
    let change = |asked: &str, mut answer: Value| {
        if asked == "send_join" {
            let named = (0..3_000).map(|number| format!("a-{number:04}.example"));
            answer["servers_in_room"] =
                json!(named.chain(["a.example".to_owned(), "b.example".to_owned()]).collect::<Vec<_>>());
        }
        answer
    };
    let scene = Scene::with(a_room_with_elsie(), change).await;
    let told_b = serve_b(&scene.net);
    let say = async |text: &str| {
        let path = format!("/rooms/{}/send/m.room.message/{text}", scene.id());
        scene.bob.ok_put(&path, json!({ "body": text })).await;
    };
    scene.net.take_looked_up();
    say("one").await;
    say("two").await;
    scene.bob.ok_put(&format!("/devices/{}", scene.bob.device_id), json!({ "display_name": "new" })).await;
    scene.pause(60).await;
    let tried: std::collections::BTreeSet<_> =
        scene.net.take_looked_up().into_iter().filter_map(invented).collect();
    assert!((400..=500).contains(&tried.len()), "{}", tried.len());
    assert_eq!(texts(&scene.asked), ["one", "two"], "the server that let us in is told");
    assert_eq!(texts(&told_b), [""; 0], "b.example stands behind all that were made up");
    scene.open().await;
    scene.pause(200).await;
    assert_eq!(texts(&told_b), ["one", "two"], "the state shows that it is in the room");
    assert_eq!(updates(&told_b).len(), 1);
    assert_eq!(texts(&scene.asked), ["one", "two"], "what was told is not told again");
    // A server that turned out not to be there is tried no more, though events of ours wait for it.
    scene.pause(4_000).await;
    scene.net.take_looked_up();
    say("three").await;
    scene.pause(100_000).await;
    assert_eq!(scene.net.take_looked_up().into_iter().filter_map(invented).count(), 0);
    assert_eq!(texts(&told_b), ["one", "two", "three"]);
    scene.server.assert_whole();
}

/// The made-up server whose address was looked up.
fn invented(looked_up: String) -> Option<String> {
    let at = looked_up.find("a-")?;
    looked_up.get(at..at + 6).map(str::to_owned)
}

#[tokio::test(start_paused = true)]
async fn a_server_that_nobody_named_is_told_what_it_missed_once_the_members_are_known() {
    for restarts in [false, true] {
        let mut scene = Scene::of(a_room_with_elsie()).await;
        let told_b = serve_b(&scene.net);
        scene
            .bob
            .ok_put(&format!("/rooms/{}/send/m.room.message/1", scene.id()), json!({ "body": "one" }))
            .await;
        scene.pause(5).await;
        if restarts {
            let Engine::Memory(memory) = scene.server.server().app().store.engine() else {
                panic!("not in memory")
            };
            let store =
                Store::open(Engine::Memory(memory.after_crash(usize::MAX)), Durability::Fsync).unwrap();
            scene.server.server().app().env.kill();
            scene.server = TestServer::start(doors(&scene.net), store, |_| {});
            scene.bob = TestClient { server: scene.server.clone(), ..scene.bob.clone() };
        }
        scene
            .bob
            .ok_put(&format!("/rooms/{}/send/m.room.message/2", scene.id()), json!({ "body": "two" }))
            .await;
        scene.pause(5).await;
        assert_eq!(texts(&told_b), [""; 0]);
        scene.open().await;
        assert_eq!(texts(&told_b), ["one", "two"]);
        scene.server.assert_whole();
    }
}
