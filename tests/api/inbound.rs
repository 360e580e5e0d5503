//! Events that other servers send in transactions (server-server API, "Transactions").

use std::time::Duration;

use aqueduct::{
    schema,
    store::{Direction, Durability, Engine, Store},
};
use axum::body::Body;
use federation::testing::{Net, Weather};
use http::{Method, StatusCode, header};
use ruma::OwnedEventId;
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{
        TestClient, TestServer,
        network::{Peer, answer, doors},
        remote::Remote,
    },
};

/// A room of alice's, and a server whose bob is in it.
pub(crate) struct Scene {
    pub(crate) net: Net,
    pub(crate) server: TestServer,
    pub(crate) peer: Peer,
    pub(crate) alice: TestClient,
    pub(crate) room: String,
    pub(crate) bob: Remote,
}

impl Scene {
    pub(crate) async fn new() -> Self {
        Self::with(json!({ "preset": "public_chat" })).await
    }

    pub(crate) async fn with(create: Value) -> Self {
        let net = Net::new(1);
        let store = Store::open(Engine::Memory(Default::default()), Durability::Fsync).unwrap();
        let server = TestServer::start(doors(&net), store, |_| {});
        let peer = Peer::new(&net, "b.example", "5.0.0.2", 2);
        let alice = server.register("alice").await;
        let room = alice.create(create).await;
        let bob = Remote::new(server.server().app(), &room);
        let scene = Self { net, server, peer, alice, room, bob };
        let (id, join) = scene.join(&scene.peer, &scene.bob);
        let (status, answer) = scene.send("join", &[join]).await;
        assert_eq!((status, &answer["pdus"][id.as_str()]), (StatusCode::OK, &json!({})), "{answer}");
        scene
    }

    pub(crate) fn join(&self, peer: &Peer, user: &Remote) -> (OwnedEventId, Value) {
        let content = json!({ "membership": "join" });
        peer.event(user, "m.room.member", Some(user.user.as_str()), content, &self.bob.heads())
    }

    pub(crate) fn says(&self, text: &str, prev: &[OwnedEventId]) -> (OwnedEventId, Value) {
        self.peer.event(&self.bob, "m.room.message", None, json!({ "msgtype": "m.text", "body": text }), prev)
    }

    pub(crate) async fn send(&self, txn: &str, pdus: &[Value]) -> (StatusCode, Value) {
        self.peer.transact(&self.server, txn, pdus, &[]).await
    }

    /// The texts of the room's last messages, the newest first.
    pub(crate) async fn texts(&self) -> Vec<String> {
        let page = self.alice.ok_get(&format!("/rooms/{}/messages?dir=b&limit=100", self.room)).await;
        let events = page["chunk"].as_array().unwrap().iter();
        events.filter_map(|event| event["content"]["body"].as_str()).map(str::to_owned).collect()
    }

    /// The server is killed and starts again over what is on its disk.
    pub(crate) fn crash(&mut self) {
        let app = self.server.server().app();
        let Engine::Memory(memory) = app.store.engine() else { panic!("not in memory") };
        let memory = Engine::Memory(memory.after_crash(0));
        app.env.kill();
        let store = Store::open(memory, Durability::Fsync).unwrap();
        self.server = TestServer::start(doors(&self.net), store, |_| {});
        self.alice.server = self.server.clone();
        self.bob = Remote::new(self.server.server().app(), &self.room);
    }

    /// Lets this time pass. The other server publishes its keys anew after it, because its document ends after a day.
    pub(crate) async fn pass(&self, time: Duration) {
        let env = &self.server.server().app().env;
        env.sleep(time).await;
        let document = self.peer.own.document(env.now_ms());
        self.net.serve_json("5.0.0.2:8448", &["b.example"], &document);
    }

    fn staged(&self) -> usize {
        let snapshot = self.server.server().app().store.snapshot();
        schema::INBOUND_EVENT.prefix::<()>(&*snapshot, (), Direction::Up).unwrap().count()
    }
}

/// The error that an answer names for an event.
fn error<'a>(answer: &'a Value, id: &OwnedEventId) -> &'a str {
    answer["pdus"][id.as_str()]["error"].as_str().unwrap_or_else(|| panic!("no error for {id} in {answer}"))
}

#[tokio::test(start_paused = true)]
async fn events_of_another_server_come_in_and_clients_are_told() {
    let scene = Scene::new().await;
    let since = scene.alice.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
    let (first, one) = scene.says("one", &scene.bob.heads());
    let (second, two) = scene.says("two", std::slice::from_ref(&first));
    let (status, answer) = scene.send("1", &[one, two]).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(answer, json!({ "pdus": { first.as_str(): {}, second.as_str(): {} } }));
    assert_eq!(scene.texts().await, ["two", "one"]);
    let sync = scene.alice.ok_get(&format!("/sync?since={since}")).await;
    let timeline = &sync["rooms"]["join"][&scene.room]["timeline"]["events"];
    let bodies: Vec<_> =
        timeline.as_array().unwrap().iter().map(|event| event["content"]["body"].as_str().unwrap()).collect();
    assert_eq!(bodies, ["one", "two"]);
    assert_eq!(scene.staged(), 0, "what is judged at once is not stored twice");
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_room_of_each_version_takes_events() {
    for version in 1..=12 {
        let scene =
            Scene::with(json!({ "preset": "public_chat", "room_version": version.to_string() })).await;
        let (id, event) = scene.says("hello", &scene.bob.heads());
        let (_, answer) = scene.send("1", &[event]).await;
        assert_eq!(answer, json!({ "pdus": { id.as_str(): {} } }), "{version}");
        assert_eq!(scene.texts().await, ["hello"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_transaction_that_comes_again_is_answered_alike_and_counts_once() {
    let mut scene = Scene::new().await;
    let (first, one) = scene.says("one", &scene.bob.heads());
    let answer = scene.send("1", &[one, json!(3)]).await;
    assert_eq!(answer, (StatusCode::OK, json!({ "pdus": { first.as_str(): {} } })));
    let (_, other) = scene.says("other", std::slice::from_ref(&first));
    assert_eq!(scene.send("1", std::slice::from_ref(&other)).await, answer, "the first content counts");
    scene.crash();
    assert_eq!(scene.send("1", std::slice::from_ref(&other)).await, answer, "also after a crash");
    assert_eq!(scene.texts().await, ["one"]);
    // The id of another server's transaction is another one.
    let other_peer = Peer::new(&scene.net, "c.example", "5.0.0.3", 3);
    let carol =
        Remote { user: "@carol:c.example".try_into().unwrap(), ..Remote::new(&scene.bob.app, &scene.room) };
    let (joined, join) = scene.join(&other_peer, &carol);
    let answer = other_peer.transact(&scene.server, "1", &[join], &[]).await;
    assert_eq!(answer, (StatusCode::OK, json!({ "pdus": { joined.as_str(): {} } })));
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn answers_to_the_last_transactions_are_remembered_for_a_week() {
    let scene = Scene::new().await;
    let mut prev = scene.bob.heads();
    let mut answers = Vec::new();
    for number in 0..20 {
        let (id, event) = scene.says(&format!("{number}"), &prev);
        prev = vec![id];
        answers.push(scene.send(&format!("{number}"), &[event]).await);
    }
    assert_eq!(scene.send("19", &[]).await, answers[19]);
    assert_eq!(scene.send("5", &[]).await, answers[5]);
    assert_eq!(scene.send("0", &[]).await, (StatusCode::OK, json!({ "pdus": {} })), "it is forgotten");
    let rows = |scene: &Scene| {
        let snapshot = scene.server.server().app().store.snapshot();
        schema::INBOUND_TRANSACTION.prefix::<()>(&*snapshot, (), Direction::Up).unwrap().count()
    };
    assert_eq!(rows(&scene), 16);
    scene.pass(Duration::from_secs(8 * 24 * 3600)).await;
    assert_eq!(rows(&scene), 0);
    assert_eq!(scene.send("19", &[]).await, (StatusCode::OK, json!({ "pdus": {} })));
}

#[tokio::test(start_paused = true)]
async fn a_transaction_that_comes_twice_at_the_same_time_is_taken_once() {
    let scene = Scene::new().await;
    let (first, one) = scene.says("one", &scene.bob.heads());
    let (_, two) = scene.says("two", &scene.bob.heads());
    let (one, two) = ([one], [two]);
    let (a, b) = tokio::join!(scene.send("1", &one), scene.send("1", &two));
    assert_eq!(a, (StatusCode::OK, json!({ "pdus": { first.as_str(): {} } })));
    assert_eq!(a, b);
    assert_eq!(scene.texts().await, ["one"]);
}

#[tokio::test(start_paused = true)]
async fn a_server_sends_few_transactions_at_a_time_and_keeps_nobody_else_from_it() {
    let scene = Scene::new().await;
    let other = Peer::new(&scene.net, "c.example", "5.0.0.3", 3);
    // The keys of this server cannot be had, so that each of these transactions takes its time.
    let gone = Peer::new(&scene.net, "d.example", "5.0.0.4", 4);
    scene.net.weather("5.0.0.4:8448", Weather::Silent, Duration::ZERO);
    let carol = Remote {
        app: scene.bob.app.clone(),
        room: scene.bob.room,
        user: "@carol:d.example".try_into().unwrap(),
    };
    let (_, join) = scene.join(&gone, &carol);
    let join = [join];
    let slow = |txn: &'static str| scene.send(txn, &join);
    let began = scene.server.server().app().env.uptime();
    let quick = async {
        tokio::task::yield_now().await;
        let answer = other.transact(&scene.server, "1", &[], &[]).await;
        (answer, scene.server.server().app().env.uptime() - began)
    };
    let (a, b, c, d, e, (quick, took)) =
        tokio::join!(slow("1"), slow("2"), slow("3"), slow("4"), slow("5"), quick);
    let answers = [a.0, b.0, c.0, d.0, e.0];
    let count = |status| answers.iter().filter(|it| **it == status).count();
    assert!(count(StatusCode::OK) >= 3 && count(StatusCode::TOO_MANY_REQUESTS) >= 1, "{answers:?}");
    assert_eq!(quick.0, StatusCode::OK);
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn what_is_no_transaction_is_refused_whole() {
    let scene = Scene::new().await;
    let (_, one) = scene.says("one", &scene.bob.heads());
    let body = |pdus: Value, edus: Value| json!({ "origin": "b.example", "pdus": pdus, "edus": edus });
    let many = |count: usize| Value::Array(vec![one.clone(); count]);
    for (number, (body, code)) in [
        (body(many(51), json!([])), "M_BAD_JSON"),
        (body(many(1), Value::Array(vec![json!({}); 101])), "M_BAD_JSON"),
        (body(json!({}), json!([])), "M_BAD_JSON"),
        (body(Value::Null, json!([])), "M_BAD_JSON"),
        (body(many(1), json!("x")), "M_BAD_JSON"),
        (json!([]), "M_BAD_JSON"),
    ]
    .into_iter()
    .enumerate()
    {
        let uri = format!("/_matrix/federation/v1/send/{number}");
        let (status, answer) = scene.peer.ask(&scene.server, Method::PUT, &uri, Some(&body)).await;
        assert_eq!((status, answer["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some(code)), "{answer}");
    }
    assert_eq!(scene.texts().await, [""; 0]);
    let long = "x".repeat(256);
    assert_eq!(scene.send(&long, &[]).await.0, StatusCode::BAD_REQUEST);
    for wrong in ["{", "{\"pdus\":[1e400]}", "{\"pdus\":[\"\\ud800\"]}"] {
        let mut request =
            scene.peer.signed("test.example", Method::PUT, "/_matrix/federation/v1/send/x", None);
        *request.body_mut() = Body::from(wrong);
        let (status, refusal) = answer(&scene.server, request).await;
        assert_eq!(
            (status, refusal["errcode"].as_str()),
            (StatusCode::BAD_REQUEST, Some("M_NOT_JSON")),
            "{wrong}"
        );
    }
    let mut unsigned = scene.peer.signed("test.example", Method::PUT, "/_matrix/federation/v1/send/x", None);
    unsigned.headers_mut().remove(header::AUTHORIZATION);
    assert_eq!(answer(&scene.server, unsigned).await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(scene.send("1", &[one]).await.0, StatusCode::OK);
    assert_eq!(scene.texts().await, ["one"]);
}

#[tokio::test(start_paused = true)]
async fn events_that_are_wrong_harm_none_beside_them() {
    let scene = Scene::new().await;
    let heads = scene.bob.heads();
    let (good, one) = scene.says("one", &heads);
    let change = |field: &str, value: Value| {
        let (_, mut event) = scene.says(field, &heads);
        event[field] = value;
        event
    };
    let (forged_id, mut forged) = scene.says("forged", &heads);
    let signature = forged["signatures"]["b.example"]["ed25519:k"].as_str().unwrap();
    let other: String = signature.chars().rev().collect();
    forged["signatures"]["b.example"]["ed25519:k"] = json!(other);
    let (unsigned_id, mut unsigned) = scene.says("nobody signs", &heads);
    unsigned["signatures"] = json!({});
    let (elsewhere_id, elsewhere) = {
        let (_, mut event) = scene.says("elsewhere", &heads);
        event["room_id"] = json!("!unknown:b.example");
        // Nobody knows the version of such a room, so that the id is what most versions would give it.
        (aqueduct::rooms::change::Signed::find_id(11, event.to_string().as_bytes()).unwrap(), event)
    };
    let mut deep = json!(1);
    (0..100).for_each(|_| deep = json!([deep]));
    let wrong = vec![
        json!(1),
        json!("x"),
        json!(null),
        json!([]),
        json!({}),
        json!({ "room_id": 7 }),
        json!({ "room_id": "no id" }),
        json!({ "room_id": scene.room }),
        json!({ "type": "m.room.create" }),
        change("depth", json!(-1)),
        change("depth", json!(1e300)),
        change("prev_events", json!("x")),
        change("auth_events", json!(vec!["$x"; 11])),
        change("sender", json!(3)),
        change("content", json!("x")),
        change("origin_server_ts", json!(1e308)),
        change("state_key", json!("x".repeat(300))),
        change("odd", deep),
        change("unsigned", json!({ "long": "x".repeat(140_000) })),
        forged,
        unsigned,
        elsewhere,
    ];
    let mut pdus = wrong.clone();
    pdus.insert(9, one.clone());
    pdus.push(one);
    let (status, answer) = scene.send("1", &pdus).await;
    assert_eq!((status, &answer["pdus"][good.as_str()]), (StatusCode::OK, &json!({})), "{answer}");
    assert!(error(&answer, &forged_id).contains("signatures"), "{answer}");
    assert!(error(&answer, &unsigned_id).contains("signatures"), "{answer}");
    assert!(error(&answer, &elsewhere_id).contains("not in the room"), "{answer}");
    assert_eq!(scene.texts().await, ["one"]);
    assert_eq!(scene.staged(), 0);
    // An event whose content does not fit its hash counts redacted.
    let (id, mut changed) = scene.says("two", std::slice::from_ref(&good));
    changed["content"]["body"] = json!("changed on the way");
    let (_, answer) = scene.send("2", &[changed]).await;
    assert_eq!(answer["pdus"][id.as_str()], json!({}));
    assert_eq!(scene.texts().await, ["one"]);
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_odd_invitation_by_way_of_a_third_party_is_stored_as_whole_as_any_event() {
    for version in ["10", "11", "12"] {
        let scene = Scene::with(json!({ "preset": "public_chat", "room_version": version })).await;
        for (number, odd) in [json!("x"), json!(5), json!([]), Value::Null].into_iter().enumerate() {
            let content = json!({ "membership": "join", "third_party_invite": odd });
            let user = scene.bob.user.clone();
            let heads = scene.bob.heads();
            let (id, event) =
                scene.peer.event(&scene.bob, "m.room.member", Some(user.as_str()), content, &heads);
            let (status, answer) = scene.send(&number.to_string(), &[event]).await;
            assert_eq!((status, &answer["pdus"][id.as_str()]), (StatusCode::OK, &json!({})), "{answer}");
        }
        scene.server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_the_room_does_not_admit_sends_it_nothing() {
    let scene = Scene::new().await;
    let acl = json!({ "allow": ["*"], "deny": ["b.example"] });
    scene.alice.ok_put(&format!("/rooms/{}/state/m.room.server_acl", scene.room), acl).await;
    let other_room = scene.alice.create(json!({ "preset": "public_chat" })).await;
    let there = Remote::new(scene.server.server().app(), &other_room);
    let join = json!({ "membership": "join" });
    let (joined, join) =
        scene.peer.event(&there, "m.room.member", Some(there.user.as_str()), join, &there.heads());
    let (denied, event) = scene.says("denied", &scene.bob.heads());
    let (status, answer) = scene.send("1", &[event.clone(), join]).await;
    assert_eq!(status, StatusCode::OK);
    assert!(error(&answer, &denied).contains("admit"), "{answer}");
    assert_eq!(answer["pdus"][joined.as_str()], json!({}), "the list of a room is for that room alone");
    assert_eq!(scene.texts().await, [""; 0]);
    // Nobody else brings the event in for it.
    let other = Peer::new(&scene.net, "c.example", "5.0.0.3", 3);
    let (_, answer) = other.transact(&scene.server, "1", &[event], &[]).await;
    assert!(error(&answer, &denied).contains("theirs to send"), "{answer}");
    assert_eq!(scene.texts().await, [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn an_event_waits_until_those_come_that_it_stands_on() {
    let scene = Scene::new().await;
    let (first, one) = scene.says("one", &scene.bob.heads());
    let (second, two) = scene.says("two", std::slice::from_ref(&first));
    let (third, three) = scene.says("three", std::slice::from_ref(&second));
    for (txn, event, id) in [("3", &three, &third), ("2", &two, &second), ("2b", &two, &second)] {
        let (_, answer) = scene.send(txn, std::slice::from_ref(event)).await;
        assert_eq!(answer["pdus"][id.as_str()], json!({}));
    }
    assert_eq!((scene.staged(), scene.texts().await), (2, Vec::new()), "each waits once");
    scene.send("1", &[one]).await;
    scene.pass(Duration::from_secs(5)).await;
    assert_eq!(scene.texts().await, ["three", "two", "one"]);
    assert_eq!(scene.staged(), 0);
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_event_that_waits_is_there_after_a_crash() {
    let mut scene = Scene::new().await;
    let (first, one) = scene.says("one", &scene.bob.heads());
    let (second, two) = scene.says("two", std::slice::from_ref(&first));
    let (_, answer) = scene.send("2", &[two]).await;
    assert_eq!(answer["pdus"][second.as_str()], json!({}), "its server was told that it is here");
    scene.crash();
    assert_eq!(scene.staged(), 1);
    scene.server.assert_whole();
    scene.pass(Duration::from_secs(60)).await;
    scene.send("1", &[one]).await;
    scene.pass(Duration::from_secs(60)).await;
    assert_eq!(scene.texts().await, ["two", "one"]);
    scene.crash();
    scene.pass(Duration::from_secs(60)).await;
    assert_eq!((scene.staged(), scene.texts().await.len()), (0, 2));
}

#[tokio::test(start_paused = true)]
async fn an_event_whose_keys_cannot_be_had_waits_for_them() {
    let scene = Scene::new().await;
    let other = Peer::new(&scene.net, "c.example", "5.0.0.3", 3);
    scene.net.weather("5.0.0.3:8448", Weather::Refuses, Duration::ZERO);
    let carol = Remote {
        app: scene.bob.app.clone(),
        room: scene.bob.room,
        user: "@carol:c.example".try_into().unwrap(),
    };
    let (joined, join) = scene.join(&other, &carol);
    let (_, mut forged) = scene.join(&other, &carol);
    forged["signatures"]["c.example"]["ed25519:k"] = json!("A".repeat(86));
    let (said, one) = scene.says("one", &scene.bob.heads());
    let (_, answer) = scene.send("1", &[join, one]).await;
    assert_eq!(answer["pdus"], json!({ joined.as_str(): {}, said.as_str(): {} }));
    assert_eq!(scene.texts().await, ["one"], "the event beside it does not wait");
    let path = format!("/rooms/{}/joined_members", scene.room);
    let members = scene.alice.ok_get(&path).await;
    assert!(members["joined"].get("@carol:c.example").is_none());
    scene.net.weather("5.0.0.3:8448", Weather::Fair, Duration::ZERO);
    scene.pass(Duration::from_secs(3600)).await;
    let members = scene.alice.ok_get(&path).await;
    assert!(members["joined"].get("@carol:c.example").is_some(), "{members}");
    assert_eq!(scene.staged(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_does_not_answer_delays_a_transaction_by_seconds() {
    let scene = Scene::new().await;
    let silent = Peer::new(&scene.net, "c.example", "5.0.0.3", 3);
    scene.net.weather("5.0.0.3:8448", Weather::Silent, Duration::ZERO);
    let carol = Remote {
        app: scene.bob.app.clone(),
        room: scene.bob.room,
        user: "@carol:c.example".try_into().unwrap(),
    };
    let (joined, join) = scene.join(&silent, &carol);
    let (_, one) = scene.says("one", &scene.bob.heads());
    let env = &scene.server.server().app().env;
    let began = env.uptime();
    let (status, answer) = scene.send("1", &[join, one]).await;
    assert_eq!((status, &answer["pdus"][joined.as_str()]), (StatusCode::OK, &json!({})));
    assert!(env.uptime() - began <= Duration::from_secs(6), "{:?}", env.uptime() - began);
    assert_eq!((scene.texts().await, scene.staged()), (vec!["one".to_owned()], 1));
}

#[tokio::test(start_paused = true)]
async fn an_event_whose_past_never_comes_is_given_up_after_a_day() {
    let scene = Scene::new().await;
    let (first, _) = scene.says("one", &scene.bob.heads());
    let (_, two) = scene.says("two", std::slice::from_ref(&first));
    scene.send("1", &[two]).await;
    scene.pass(Duration::from_secs(23 * 3600)).await;
    assert_eq!(scene.staged(), 1);
    scene.pass(Duration::from_secs(2 * 3600)).await;
    assert_eq!(scene.staged(), 0);
    let figures = scene.server.server().app().metrics.text();
    assert!(figures.contains(r#"aqueduct_inbound_events_total{outcome="given_up"} 1"#), "{figures}");
}

#[tokio::test(start_paused = true)]
async fn a_server_can_have_only_some_events_of_a_room_wait() {
    let scene = Scene::new().await;
    let (missing, _) = scene.says("missing", &scene.bob.heads());
    let mut last = json!({});
    for txn in 0..11 {
        let events: Vec<_> =
            (0..50).map(|n| scene.says(&format!("{txn} {n}"), std::slice::from_ref(&missing)).1).collect();
        let (status, answer) = scene.send(&format!("{txn}"), &events).await;
        assert_eq!(status, StatusCode::OK);
        last = answer;
    }
    let refused = last["pdus"].as_object().unwrap().values().filter(|it| it.get("error").is_some()).count();
    assert_eq!((refused, scene.staged()), (50, 500));
    // Others go on in the room, and so does this server with events that can be judged.
    let (id, event) = scene.says("goes on", &scene.bob.heads());
    let (_, answer) = scene.send("next", &[event]).await;
    assert_eq!(answer["pdus"][id.as_str()], json!({}));
    assert_eq!(scene.texts().await, ["goes on"]);
}

#[tokio::test(start_paused = true)]
async fn a_large_transaction_is_taken_and_one_that_is_too_large_is_not() {
    let scene = Scene::new().await;
    let mut prev = scene.bob.heads();
    let mut events = Vec::new();
    for _ in 0..8 {
        let (id, mut event) = scene.says(&"x".repeat(60_000), &prev);
        event["unsigned"] = json!({ "note": "y".repeat(40_000) });
        prev = vec![id];
        events.push(event);
    }
    let (status, answer) = scene.send("1", &events).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let results = answer["pdus"].as_object().unwrap();
    assert!(results.len() == 8 && results.values().all(|result| *result == json!({})), "{answer}");
    let mut large = scene.peer.signed("test.example", Method::PUT, "/_matrix/federation/v1/send/2", None);
    *large.body_mut() = Body::from(vec![b' '; (13 << 20) + 1]);
    let (status, refusal) = crate::support::network::answer(&scene.server, large).await;
    assert_eq!((status, refusal["errcode"].as_str()), (StatusCode::PAYLOAD_TOO_LARGE, Some("M_TOO_LARGE")));
}
