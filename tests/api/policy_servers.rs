//! Rooms that use a policy server, which signs the events that it recommends (server-server API, "Policy Servers").

mod crowds;

use std::time::Duration;

use aqueduct::{
    flows::remote::take_in::{Silence, take_in},
    rooms::change::Outcome,
};
use federation::testing::Weather;
use http::{Method, StatusCode};
use ruma::OwnedEventId;
use serde_json::{Value, json};

use crate::{
    inbound::Scene,
    rooms::Rooms,
    support::{
        TestClient,
        elsewhere::Elsewhere,
        encoded,
        guard::{ADDRESS, GUARD, Guard, Says, VERSION, policy, signature},
        network::Peer,
        remote::Remote,
    },
};

const KEY_ID: &str = "ed25519:policy_server";

/// A room of alice's with bob of another server, and a policy server that has somebody in it.
struct Guarded {
    scene: Scene,
    guard: Guard,
    watcher: Remote,
}

impl Guarded {
    /// The room uses the policy server.
    async fn new() -> Self {
        let it = Self::unused().await;
        it.set_policy(policy(1)).await;
        assert_eq!(it.guard.take_asked_types(), Vec::<String>::new(), "the room turns it on by itself");
        it
    }

    /// The policy server is in the room, which does not use it yet.
    async fn unused() -> Self {
        let scene = Scene::with(json!({ "preset": "public_chat", "room_version": VERSION })).await;
        let guard = Guard::new(&scene.net);
        let watcher = Remote {
            app: scene.bob.app.clone(),
            room: scene.bob.room,
            user: format!("@watcher:{GUARD}").as_str().try_into().unwrap(),
        };
        let (id, join) = scene.join(&guard.peer, &watcher);
        let (_, answer) = guard.peer.transact(&scene.server, "join", &[join], &[]).await;
        assert_eq!(answer["pdus"][id.as_str()], json!({}), "{answer}");
        Self { scene, guard, watcher }
    }

    async fn set_policy(&self, content: Value) {
        self.scene.alice.ok_put(&self.path("state/m.room.policy"), content).await;
    }

    fn alice(&self) -> &TestClient {
        &self.scene.alice
    }

    /// A path below the room.
    fn path(&self, rest: &str) -> String {
        format!("/rooms/{}/{rest}", encoded(&self.scene.room))
    }

    fn whole(&self, rest: &str) -> String {
        format!("/_matrix/client/v3{}", self.path(rest))
    }

    async fn try_say(&self, txn: &str, text: &str) -> (StatusCode, Value) {
        let content = json!({ "msgtype": "m.text", "body": text });
        self.alice().put(&self.whole(&format!("send/m.room.message/{txn}")), content).await
    }

    async fn say(&self, text: &str) -> String {
        self.alice().say(&self.scene.room, text, text).await
    }

    /// The event as other servers get it.
    async fn event(&self, id: &str) -> Value {
        let uri = format!("/_matrix/federation/v1/event/{}", encoded(id));
        let (status, answer) = self.scene.peer.ask(&self.scene.server, Method::GET, &uri, None).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer["pdus"][0].clone()
    }

    async fn is_signed(&self, id: &str) -> bool {
        let event = self.event(id).await;
        let is_signed = event["signatures"][GUARD][KEY_ID] == signature(&event, 1);
        assert_eq!(event["signatures"].as_object().unwrap().len(), 1 + usize::from(is_signed), "{event}");
        is_signed
    }

    /// An event of bob's with the signature of the policy server by the key of this number.
    fn signed(&self, (id, mut event): (OwnedEventId, Value), seed: u8) -> (OwnedEventId, Value) {
        event["signatures"][GUARD][KEY_ID] = json!(signature(&event, seed));
        (id, event)
    }

    fn staged(&self) -> usize {
        let snapshot = self.scene.server.server().app().store.snapshot();
        let rows =
            aqueduct::schema::INBOUND_EVENT.prefix::<()>(&*snapshot, (), aqueduct::store::Direction::Up);
        rows.unwrap().count()
    }

    async fn pass(&self, time: Duration) {
        self.scene.pass(time).await;
    }

    /// Nobody can reach the policy server.
    fn silence(&self) {
        self.scene.net.weather(&format!("{ADDRESS}:8448"), Weather::Silent, Duration::ZERO);
    }

    fn end_silence(&self) {
        self.scene.net.weather(&format!("{ADDRESS}:8448"), Weather::Fair, Duration::ZERO);
    }
}

fn refusal(message: &str) -> Says {
    Says::Answers(400, json!({ "errcode": "M_FORBIDDEN", "error": message }))
}

fn is_spam(event: &Value) -> bool {
    event["content"]["body"].as_str().is_some_and(|body| body.contains("spam"))
}

#[tokio::test(start_paused = true)]
async fn events_of_ours_are_signed_before_anybody_hears_of_them() {
    let it = Guarded::new().await;
    let since = it.alice().ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
    let message = it.say("hello").await;
    assert!(it.is_signed(&message).await);
    let own = it.event(&message).await["signatures"]["test.example"].clone();
    assert_eq!(own.as_object().unwrap().len(), 1, "our own signature is there, too");
    assert_eq!(it.say("hello").await, message, "a repeated request makes nothing new");
    let sync = it.alice().ok_get(&format!("/sync?since={since}")).await;
    let events = sync["rooms"]["join"][&it.scene.room]["timeline"]["events"].as_array().unwrap().clone();
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(events[0]["unsigned"]["transaction_id"], "hello");
    let topic = it.alice().ok_put(&it.path("state/m.room.topic"), json!({ "topic": "x" })).await;
    assert!(it.is_signed(topic["event_id"].as_str().unwrap()).await);
    let redact = it.path(&format!("redact/{}/1", encoded(&message)));
    let redaction = it.alice().ok_put(&redact, json!({})).await;
    assert!(it.is_signed(redaction["event_id"].as_str().unwrap()).await);
    assert!(it.is_signed(&message).await, "what is redacted keeps its signatures");
    assert_eq!(it.event(&message).await["content"], json!({}));
    let carol = it.scene.server.register("carol").await;
    carol.ok_post(&format!("/join/{}", encoded(&it.scene.room)), json!({})).await;
    it.alice().ok_post(&it.path("kick"), json!({ "user_id": carol.user_id })).await;
    it.alice().ok_post(&it.path("invite"), json!({ "user_id": carol.user_id })).await;
    carol.ok_post(&it.path("leave"), json!({})).await;
    it.alice().ok_put("/profile/@alice:test.example/displayname", json!({ "displayname": "Al" })).await;
    it.pass(Duration::from_secs(5)).await;
    let (_, member) = it.alice().state(&it.scene.room, "m.room.member", "@alice:test.example").await;
    assert_eq!(member["displayname"], "Al");
    let other = it.path("state/m.room.policy/other");
    it.alice().ok_put(&other, json!({})).await;
    let asked = it.guard.take_asked_types();
    let member = "m.room.member";
    assert_eq!(asked.iter().filter(|kind| *kind == member).count(), 5, "{asked:?}");
    let others: Vec<_> = asked.iter().filter(|kind| *kind != member).collect();
    assert_eq!(others, ["m.room.message", "m.room.topic", "m.room.redaction", "m.room.policy"]);
    it.scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_event_that_the_policy_server_refuses_is_not_sent() {
    let it = Guarded::new().await;
    it.guard.says(|event| if is_spam(event) { refusal("This is spam") } else { Says::Signs(1) });
    let (status, answer) = it.try_say("1", "spam").await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert_eq!(answer, json!({ "errcode": "M_FORBIDDEN", "error": "This is spam" }));
    it.say("fine").await;
    assert_eq!(it.scene.texts().await, ["fine"]);
    // The transaction made nothing, so that it may be tried again.
    it.guard.says(|_| Says::Signs(1));
    assert_eq!(it.try_say("1", "spam").await.0, StatusCode::OK);
    assert_eq!(it.scene.texts().await, ["spam", "fine"]);
    for (says, status) in [
        (Says::Answers(200, json!({})), StatusCode::FORBIDDEN),
        (Says::Answers(200, json!({ GUARD: { KEY_ID: "x" } })), StatusCode::FORBIDDEN),
        (Says::Answers(200, json!([GUARD])), StatusCode::FORBIDDEN),
        (Says::Signs(2), StatusCode::FORBIDDEN),
        (
            Says::Answers(404, json!({ "errcode": "M_UNRECOGNIZED", "error": "no policy server" })),
            StatusCode::FORBIDDEN,
        ),
        (
            Says::Answers(400, json!({ "errcode": "M_UNKNOWN_TOKEN", "error": "log out!" })),
            StatusCode::FORBIDDEN,
        ),
        (Says::Answers(403, json!({ "errcode": "M_FORBIDDEN", "error": "ACL" })), StatusCode::FORBIDDEN),
        (Says::Answers(502, json!({})), StatusCode::BAD_GATEWAY),
        (Says::Nothing, StatusCode::BAD_GATEWAY),
    ] {
        it.guard.says(move |_| says.clone());
        let began = it.alice().server.server().app().env.uptime();
        let (given, answer) = it.try_say("2", "unheard").await;
        assert_eq!(given, status, "{answer}");
        let code = if status == StatusCode::FORBIDDEN { "M_FORBIDDEN" } else { "M_UNKNOWN" };
        assert_eq!(answer["errcode"], code, "{answer}");
        let took = it.alice().server.server().app().env.uptime() - began;
        assert!(took <= Duration::from_secs(20), "{took:?}");
    }
    assert_eq!(it.scene.texts().await, ["spam", "fine"]);
    let (status, _) = it.alice().put(&it.whole("state/m.room.topic"), json!({ "topic": "x" })).await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    // A room always gets rid of its policy server.
    it.set_policy(json!({})).await;
    it.say("free").await;
    assert_eq!(it.scene.texts().await[0], "free");
    it.scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_policy_server_that_is_busy_is_asked_again_when_it_says() {
    let it = Guarded::new().await;
    let busy = |after_ms: u64| {
        Says::Answers(
            429,
            json!({ "errcode": "M_LIMIT_EXCEEDED", "error": "slow", "retry_after_ms": after_ms }),
        )
    };
    let times = std::sync::atomic::AtomicUsize::new(0);
    it.guard.says(move |_| match times.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
        0 | 1 => busy(3_000),
        _ => Says::Signs(1),
    });
    let began = it.alice().server.server().app().env.uptime();
    it.say("late").await;
    let took = it.alice().server.server().app().env.uptime() - began;
    assert!((6..10).contains(&took.as_secs()), "{took:?}");
    assert_eq!(it.guard.take_asked().len(), 3);
    it.guard.says(move |_| busy(60_000));
    for _ in 0..5 {
        let (status, answer) = it.try_say("1", "never").await;
        assert_eq!((status, &answer["errcode"]), (StatusCode::TOO_MANY_REQUESTS, &json!("M_LIMIT_EXCEEDED")));
        assert!(answer["retry_after_ms"].as_u64().unwrap() > 50_000, "{answer}");
    }
    assert_eq!(it.guard.take_asked().len(), 1, "it is left alone for as long as it says");
    it.guard.says(|_| Says::Signs(1));
    it.pass(Duration::from_secs(61)).await;
    it.say("again").await;
    assert_eq!(it.scene.texts().await, ["again", "late"]);
}

#[tokio::test(start_paused = true)]
async fn a_slow_policy_server_holds_up_its_own_rooms_senders_alone() {
    let it = Guarded::new().await;
    let other = it.alice().create(json!({})).await;
    it.guard.says(|_| Says::After(Duration::from_secs(5), Box::new(Says::Signs(1))));
    let uptime = || it.alice().server.server().app().env.uptime();
    let began = uptime();
    let senders =
        (0..20).map(|number| {
            let (alice, path) = (it.alice().clone(), it.path(&format!("send/m.room.message/{number}")));
            async move {
                alice.ok_put(&path, json!({ "msgtype": "m.text", "body": format!("own {number}") })).await
            }
        });
    let sending = futures_util::future::join_all(senders);
    let meanwhile = async {
        it.scene.server.server().app().env.sleep(Duration::from_millis(100)).await;
        let began = uptime();
        it.alice().ok_get(&it.path("messages?dir=b")).await;
        it.alice().say(&other, "1", "elsewhere").await;
        let (mut prev, mut names) = (it.scene.bob.heads(), Vec::new());
        for number in 0..5 {
            let says = it.signed(it.scene.says(&format!("bob {number}"), &prev), 1);
            prev = vec![says.0.clone()];
            names.push(says.0.clone());
            let (_, answer) = it.scene.send(&format!("{number}"), &[says.1]).await;
            assert_eq!(answer["pdus"][names.last().unwrap().as_str()], json!({}), "{answer}");
        }
        assert!(uptime() - began < Duration::from_secs(1), "nobody waits but who sends there");
        assert_eq!(it.scene.texts().await.len(), 5);
    };
    let (sent, ()) = tokio::join!(sending, meanwhile);
    assert!(uptime() - began < Duration::from_secs(20), "{:?}", uptime() - began);
    let texts = it.scene.texts().await;
    assert_eq!(texts.len(), 25, "{texts:?}");
    let asked = it.guard.take_asked();
    assert_eq!(asked.len(), 20, "no event is signed twice because the room went on");
    for sent in sent {
        assert!(it.is_signed(sent["event_id"].as_str().unwrap()).await);
    }
    assert!(it.scene.bob.heads().len() <= 9, "{:?}", it.scene.bob.heads());
    it.guard.says(|_| Says::Signs(1));
    it.say("together").await;
    assert_eq!(it.scene.bob.heads().len(), 1, "the next event joins what stood side by side");
    it.scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_silent_policy_server_holds_up_no_delayed_event_of_another_room() {
    let it = Guarded::new().await;
    let other = it.alice().create(json!({ "preset": "public_chat" })).await;
    let later = |room: &str, txn: &str, delay_ms: u64| {
        let path = format!("/rooms/{}/send/m.test/{txn}?org.matrix.msc4140.delay={delay_ms}", encoded(room));
        let alice = it.alice().clone();
        async move { alice.ok_put(&path, json!({ "body": "later" })).await }
    };
    let count = async |room: &str| {
        let page = it.alice().ok_get(&format!("/rooms/{}/messages?dir=b", encoded(room))).await;
        page["chunk"].as_array().unwrap().iter().filter(|event| event["type"] == "m.test").count()
    };
    it.silence();
    for number in 0..3_u64 {
        later(&it.scene.room, &format!("held-up-{number}"), 1_000 + number).await;
    }
    later(&other, "free", 2_000).await;
    it.pass(Duration::from_secs(20)).await;
    assert_eq!(count(&other).await, 1);
    assert_eq!(count(&it.scene.room).await, 0);
    it.end_silence();
    it.pass(Duration::from_secs(120)).await;
    assert_eq!(count(&it.scene.room).await, 3, "they are tried again");
    it.scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn what_changes_while_the_policy_server_is_asked_counts() {
    let it = Guarded::new().await;
    let slow = || Says::After(Duration::from_secs(4), Box::new(Says::Signs(1)));
    it.guard.says(move |_| slow());
    // The state of the room changes beside an event of ours that changes it, too.
    let (first, second) = (it.whole("state/m.room.topic"), it.whole("state/m.room.name"));
    let (one, two) = tokio::join!(
        it.alice().put(&first, json!({ "topic": "side by side" })),
        it.alice().put(&second, json!({ "name": "side by side" })),
    );
    assert_eq!((one.0, two.0), (StatusCode::OK, StatusCode::OK), "{one:?} {two:?}");
    for (kind, field) in [("m.room.topic", "topic"), ("m.room.name", "name")] {
        assert_eq!(it.alice().state(&it.scene.room, kind, "").await.1[field], "side by side");
    }
    // Somebody who is kicked meanwhile has sent nothing.
    let carol = it.scene.server.register("carol").await;
    carol.ok_post(&format!("/join/{}", encoded(&it.scene.room)), json!({})).await;
    it.guard.says(move |event| match event["type"].as_str() {
        Some("m.room.message") => slow(),
        _ => Says::Signs(1),
    });
    let content = json!({ "msgtype": "m.text", "body": "too late" });
    let send = it.whole("send/m.room.message/1");
    let kick = it.path("kick");
    let ((status, answer), _) = tokio::join!(
        carol.put(&send, content),
        it.alice().ok_post(&kick, json!({ "user_id": carol.user_id })),
    );
    assert_eq!((status, &answer["errcode"]), (StatusCode::FORBIDDEN, &json!("M_FORBIDDEN")), "{answer}");
    // The room gets another key for its policy server: the signature by the old one is worth nothing.
    it.guard.take_asked();
    let seeds = std::sync::atomic::AtomicU8::new(0);
    it.guard.says(move |_| {
        let seed = (1 + seeds.fetch_add(1, std::sync::atomic::Ordering::Relaxed)).min(2);
        Says::After(Duration::from_secs(2), Box::new(Says::Signs(seed)))
    });
    let later = async |content: Value| {
        it.scene.server.server().app().env.sleep(Duration::from_secs(1)).await;
        it.set_policy(content).await;
    };
    let (said, ()) = tokio::join!(it.try_say("2", "under the new key"), later(policy(2)));
    assert_eq!(said.0, StatusCode::OK, "{said:?}");
    let event = it.event(said.1["event_id"].as_str().unwrap()).await;
    assert_eq!(event["signatures"][GUARD][KEY_ID], signature(&event, 2));
    assert_eq!(it.guard.take_asked().len(), 2);
    // And then none at all.
    let (said, ()) = tokio::join!(it.try_say("3", "free"), later(json!({})));
    assert_eq!(said.0, StatusCode::OK, "{said:?}");
    assert_eq!(it.scene.texts().await, ["free", "under the new key"]);
    it.scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_room_that_uses_no_policy_server_asks_nobody() {
    let it = Guarded::unused().await;
    it.say("without").await;
    let key = policy(1)["public_keys"].clone();
    let unused = [
        json!({}),
        json!({ "via": GUARD }),
        json!({ "via": GUARD, "public_keys": { "ed25519": 1 } }),
        json!({ "via": "nobody.example", "public_keys": key }),
        json!({ "via": "not a server", "public_keys": key }),
    ];
    for (number, content) in unused.into_iter().enumerate() {
        it.set_policy(content.clone()).await;
        it.say(&number.to_string()).await;
        let (_, event) = it.scene.says(&format!("bob {content}"), &it.scene.bob.heads());
        it.scene.send(&number.to_string(), &[event]).await;
    }
    it.alice().ok_put(&it.path("state/m.room.policy/other"), policy(1)).await;
    it.say("another-state-key").await;
    assert_eq!(it.scene.texts().await.len(), 12);
    // A policy server that leaves the room is not asked any more, not even about that.
    it.set_policy(policy(1)).await;
    it.guard.says(|_| Says::Nothing);
    let content = json!({ "membership": "leave" });
    let (key, heads) = (it.watcher.user.to_string(), it.scene.bob.heads());
    let leave = it.guard.peer.event(&it.watcher, "m.room.member", Some(&key), content, &heads);
    let (id, leave) = it.signed(leave, 1);
    let (_, answer) = it.guard.peer.transact(&it.scene.server, "leave", &[leave], &[]).await;
    assert_eq!(answer["pdus"][id.as_str()], json!({}), "{answer}");
    it.say("left").await;
    assert_eq!(it.scene.texts().await.len(), 13);
    assert_eq!(it.guard.take_asked(), Vec::<Value>::new());
    it.scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_text_that_is_no_key_lets_no_event_pass_until_it_is_replaced() {
    let it = Guarded::unused().await;
    it.set_policy(json!({ "via": GUARD, "public_keys": { "ed25519": "no key" } })).await;
    let (status, answer) = it.try_say("1", "unheard").await;
    assert_eq!((status, &answer["errcode"]), (StatusCode::FORBIDDEN, &json!("M_FORBIDDEN")));
    let (_, event) = it.scene.says("unheard", &it.scene.bob.heads());
    it.scene.send("1", &[event]).await;
    assert_eq!(it.scene.texts().await, Vec::<String>::new());
    assert_eq!(it.guard.take_asked(), Vec::<Value>::new());
    it.set_policy(policy(1)).await;
    it.say("heard").await;
    it.scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn events_of_others_need_the_signature_of_the_policy_server() {
    let it = Guarded::new().await;
    it.guard.says(|event| if is_spam(event) { refusal("This is spam") } else { Says::Signs(1) });
    let (first, event) = it.signed(it.scene.says("signed", &it.scene.bob.heads()), 1);
    it.scene.send("1", &[event]).await;
    assert_eq!(it.guard.take_asked(), Vec::<Value>::new(), "who has the signature is believed");
    // One without a signature, and one with that of another key.
    let (second, event) = it.scene.says("unsigned", std::slice::from_ref(&first));
    it.scene.send("2", &[event]).await;
    let (third, event) = it.signed(it.scene.says("wrong", std::slice::from_ref(&second)), 2);
    it.scene.send("3", &[event]).await;
    assert_eq!(it.guard.take_asked().len(), 2);
    assert_eq!(it.scene.texts().await, ["wrong", "unsigned", "signed"]);
    for id in [&first, &second, &third] {
        assert!(it.is_signed(id.as_str()).await, "the signature is handed on to others");
        assert_eq!(it.event(id.as_str()).await["signatures"]["b.example"].as_object().unwrap().len(), 1);
    }
    // A refused event is kept aside, and the room goes on upon it.
    let (spam, event) = it.scene.says("spam", std::slice::from_ref(&third));
    let (_, answer) = it.scene.send("4", std::slice::from_ref(&event)).await;
    assert_eq!(answer["pdus"][spam.as_str()], json!({}), "a soft failure is no error of the transaction");
    it.scene.send("5", std::slice::from_ref(&event)).await;
    assert_eq!(it.guard.take_asked().len(), 1);
    let (_, event) = it.signed(it.scene.says("on", std::slice::from_ref(&spam)), 1);
    it.scene.send("6", &[event]).await;
    assert_eq!(it.scene.texts().await, ["on", "wrong", "unsigned", "signed"]);
    let (status, _) = it.alice().get(&it.whole(&format!("event/{}", encoded(spam.as_str())))).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    // State is not set by what is refused, and rules count as before.
    it.guard.says(|_| refusal("No."));
    let key = it.scene.bob.user.to_string();
    let content = json!({ "membership": "join", "displayname": "Spam" });
    let heads = it.scene.bob.heads();
    let (_, member) = it.scene.peer.event(&it.scene.bob, "m.room.member", Some(&key), content, &heads);
    it.scene.send("7", &[member]).await;
    let (_, member) = it.alice().state(&it.scene.room, "m.room.member", &key).await;
    assert_eq!(member.get("displayname"), None);
    it.guard.take_asked();
    let content = json!({ "name": "Bob has no power" });
    let (_, named) =
        it.scene.peer.event(&it.scene.bob, "m.room.name", Some(""), content, &it.scene.bob.heads());
    it.scene.send("8", &[named]).await;
    assert_eq!(it.guard.take_asked(), Vec::<Value>::new(), "what the rules forbid is not asked about");
    assert_eq!(it.staged(), 0);
    it.scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn events_wait_for_a_policy_server_that_does_not_answer() {
    let mut it = Guarded::new().await;
    it.silence();
    let mut prev = it.scene.bob.heads();
    let mut events = Vec::new();
    for number in 0..50 {
        let (id, event) = it.scene.says(&format!("{number}"), &prev);
        prev = vec![id];
        events.push(event);
    }
    it.scene.net.take_arrived();
    let (status, answer) = it.scene.send("1", &events).await;
    assert_eq!(status, StatusCode::OK);
    assert!(answer["pdus"].as_object().unwrap().values().all(|it| *it == json!({})), "{answer}");
    assert_eq!((it.staged(), it.scene.texts().await.len()), (50, 0));
    // They wait through a crash, too.
    it.scene.crash();
    it.pass(Duration::from_secs(60)).await;
    assert_eq!((it.staged(), it.scene.texts().await.len()), (50, 0));
    let arrived = it.scene.net.take_arrived();
    let asked = arrived.iter().filter(|line| line.contains("/_matrix/policy/")).count();
    assert!(asked <= 5, "{asked} questions in a minute to a server that does not answer");
    it.end_silence();
    it.pass(Duration::from_secs(400)).await;
    assert_eq!((it.staged(), it.scene.texts().await.len()), (0, 50));
    assert!(it.is_signed(prev[0].as_str()).await);
    it.scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_room_goes_on_without_what_its_policy_server_cannot_be_asked_about_for_long() {
    let it = Guarded::new().await;
    it.silence();
    let (first, event) = it.scene.says("held", &it.scene.bob.heads());
    it.scene.send("1", &[event]).await;
    // An event that stands on it waits, too, and no hole opens that others may fill without being asked about.
    let (second, event) = it.signed(it.scene.says("signed", std::slice::from_ref(&first)), 1);
    it.scene.send("2", &[event]).await;
    it.pass(Duration::from_secs(120)).await;
    assert_eq!((it.staged(), it.scene.texts().await.len()), (2, 0));
    it.pass(Duration::from_secs(1_800)).await;
    assert_eq!((it.staged(), it.scene.texts().await), (0, vec!["signed".to_owned()]));
    let (_, event) = it.signed(it.scene.says("on", std::slice::from_ref(&second)), 1);
    it.scene.send("3", &[event]).await;
    assert_eq!(it.scene.texts().await, ["on", "signed"]);
    it.scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn who_joins_by_way_of_this_server_is_asked_about() {
    let it = Guarded::new().await;
    let carol = Peer::new(&it.scene.net, "c.example", "5.0.0.3", 3);
    let (id, answer) = carol.join(&it.scene.server, &it.scene.room, "@carol:c.example").await;
    assert_eq!(it.guard.take_asked_types(), ["m.room.member"]);
    let event = &answer["event"];
    assert_eq!(event["signatures"][GUARD][KEY_ID], signature(event, 1), "{answer}");
    assert!(it.is_signed(&id).await);
    it.guard.says(|_| refusal("Nobody of yours."));
    let dave = Peer::new(&it.scene.net, "d.example", "5.0.0.4", 4);
    let (id, event) = dave.made(&it.scene.server, "join", &it.scene.room, "@dave:d.example").await;
    let (status, answer) = dave.send(&it.scene.server, "v2/send_join", &it.scene.room, &id, &event).await;
    assert_eq!((status, &answer["errcode"]), (StatusCode::FORBIDDEN, &json!("M_FORBIDDEN")), "{answer}");
    assert!(answer["error"].as_str().unwrap().contains("Nobody of yours."), "{answer}");
    // While nobody can be asked, whoever wants to join is told to come back.
    it.silence();
    let (id, event) = dave.made(&it.scene.server, "join", &it.scene.room, "@dora:d.example").await;
    let (status, _) = dave.send(&it.scene.server, "v2/send_join", &it.scene.room, &id, &event).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    it.scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn nobody_elsewhere_hears_of_an_invitation_that_is_refused() {
    let it = Guarded::new().await;
    let carol = Peer::new(&it.scene.net, "c.example", "5.0.0.3", 3);
    it.guard.says(|_| refusal("Not them."));
    let invite = it.whole("invite");
    it.scene.net.take_arrived();
    let (status, answer) = it.alice().post(&invite, json!({ "user_id": "@carol:c.example" })).await;
    assert_eq!((status, &answer["error"]), (StatusCode::FORBIDDEN, &json!("Not them.")), "{answer}");
    let arrived = it.scene.net.take_arrived();
    assert!(!arrived.iter().any(|line| line.contains("/invite/")), "{arrived:?}");
    // Their server signs, and loses the other signatures on the way.
    it.guard.says(|_| Says::Signs(1));
    it.guard.take_asked();
    let own = carol.own.clone();
    it.scene.net.serve("5.0.0.3:8448", &["c.example"], move |arrived| {
        let body: Value = serde_json::from_slice(arrived.request.body()).unwrap_or(Value::Null);
        let answer = match arrived.request.uri().path() {
            path if path.contains("/invite/") => {
                let event = &body["event"];
                assert_eq!(event["signatures"][GUARD][KEY_ID], signature(event, 1));
                let mut signed = Peer::unheard("c.example", 3).sign_event(event, VERSION).1;
                signed["signatures"]["test.example"] = event["signatures"]["test.example"].clone();
                json!({ "event": signed }).to_string()
            }
            path if path.starts_with("/_matrix/key/") => own.document(crate::support::BEGAN_MS).to_string(),
            _ => "{}".to_owned(),
        };
        std::future::ready(federation::testing::json(200, answer))
    });
    it.alice().ok_post(&it.path("invite"), json!({ "user_id": "@carol:c.example" })).await;
    assert_eq!(it.guard.take_asked().len(), 1);
    let page = it.alice().ok_get(&it.path("messages?dir=b&limit=1")).await;
    let id = page["chunk"][0]["event_id"].as_str().unwrap().to_owned();
    let event = it.event(&id).await;
    assert_eq!(event["state_key"], "@carol:c.example");
    assert_eq!(event["signatures"].as_object().unwrap().len(), 3, "{event}");
    assert_eq!(event["signatures"][GUARD][KEY_ID], signature(&event, 1));
    it.scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn this_server_is_no_policy_server_and_says_so() {
    let it = Guarded::unused().await;
    let (status, answer) =
        it.scene.peer.ask(&it.scene.server, Method::POST, "/_matrix/policy/v1/sign", Some(&json!({}))).await;
    assert_eq!((status, &answer["errcode"]), (StatusCode::NOT_FOUND, &json!("M_UNRECOGNIZED")));
    let (status, _) = it.alice().get("/_matrix/policy/v1/sign").await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED);
    // A room that names it is refused, and not hung.
    let mut content = policy(1);
    content["via"] = json!("test.example");
    it.set_policy(content.clone()).await;
    let (status, answer) = it.try_say("1", "unheard").await;
    assert!([StatusCode::FORBIDDEN, StatusCode::BAD_GATEWAY].contains(&status), "{status} {answer}");
    it.set_policy(json!({})).await;
    it.say("heard").await;
    // All of a new room becomes visible at once, also where it begins with a policy server.
    let state = json!([{ "type": "m.room.policy", "content": content }]);
    let room = it.alice().create(json!({ "name": "n", "topic": "t", "initial_state": state })).await;
    assert_eq!(it.alice().state(&room, "m.room.topic", "").await.1["topic"], "t");
    it.scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_account_that_ends_leaves_also_rooms_whose_policy_server_is_silent() {
    let it = Guarded::new().await;
    let carol = it.scene.server.register("carol").await;
    carol.ok_post(&format!("/join/{}", encoded(&it.scene.room)), json!({})).await;
    let other = it.alice().create(json!({ "preset": "public_chat" })).await;
    carol.ok_post(&format!("/join/{}", encoded(&other)), json!({})).await;
    it.silence();
    let auth = json!({
        "type": "m.login.password", "identifier": { "type": "m.id.user", "user": carol.user_id }, "password": "password of carol",
    });
    carol.ok_post("/account/deactivate", json!({ "auth": auth })).await;
    let membership = async |room: &str| {
        let (_, member) = it.alice().state(room, "m.room.member", &carol.user_id).await;
        member["membership"].as_str().unwrap().to_owned()
    };
    it.pass(Duration::from_secs(60)).await;
    assert_eq!(membership(&other).await, "leave");
    assert_eq!(membership(&it.scene.room).await, "leave");
    it.scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_upgrade_that_is_refused_leaves_no_room_behind() {
    let it = Guarded::new().await;
    it.guard.says(|event| match event["type"].as_str() {
        Some("m.room.tombstone") => refusal("This room stays"),
        _ => Says::Signs(1),
    });
    let before = it.alice().ok_get("/joined_rooms").await;
    let path = it.whole("upgrade");
    let (status, answer) = it.alice().post(&path, json!({ "new_version": "11" })).await;
    assert_eq!((status, &answer["error"]), (StatusCode::FORBIDDEN, &json!("This room stays")));
    assert_eq!(it.alice().ok_get("/joined_rooms").await, before);
    it.scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_upgrade_whose_client_goes_away_leaves_no_room_behind() {
    let it = Guarded::new().await;
    let before = it.alice().ok_get("/joined_rooms").await;
    // The id of a room of version 12 is known when it is there: the policy server is asked about the tombstone only then.
    it.silence();
    let path = it.whole("upgrade");
    let asked = it.alice().post(&path, json!({ "new_version": "12" }));
    assert!(tokio::time::timeout(Duration::from_secs(3), asked).await.is_err());
    assert_ne!(it.alice().ok_get("/joined_rooms").await, before, "the new room is there");
    it.pass(Duration::from_secs(180)).await;
    assert_eq!(it.alice().ok_get("/joined_rooms").await, before);
    it.scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn nobody_is_kept_in_a_room_by_its_policy_server() {
    for says in [
        refusal("Nobody leaves"),
        Says::Answers(500, json!({})),
        Says::Answers(429, json!({ "errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": 3_600_000 })),
        Says::Signs(2),
        Says::Nothing,
    ] {
        let it = Guarded::new().await;
        let carol = it.scene.server.register("carol").await;
        let dave = it.scene.server.register("dave").await;
        carol.ok_post(&format!("/join/{}", encoded(&it.scene.room)), json!({})).await;
        let invite = format!("/rooms/{}/invite", encoded(&it.scene.room));
        it.alice().ok_post(&invite, json!({ "user_id": dave.user_id })).await;
        it.guard.says(move |_| says.clone());
        for user in [&carol, &dave] {
            user.ok_post(&format!("/rooms/{}/leave", encoded(&it.scene.room)), json!({})).await;
            user.ok_post(&format!("/rooms/{}/forget", encoded(&it.scene.room)), json!({})).await;
            let (_, member) = it.alice().state(&it.scene.room, "m.room.member", &user.user_id).await;
            assert_eq!(member["membership"], "leave");
        }
        // A member who stays may not do what needs the signature.
        let kick = json!({ "user_id": it.scene.bob.user.as_str() });
        let path = format!("/_matrix/client/v3/rooms/{}/kick", encoded(&it.scene.room));
        assert_ne!(it.alice().post(&path, kick).await.0, StatusCode::OK);
        it.scene.server.assert_whole();
    }
    let it = Guarded::unused().await;
    let carol = it.scene.server.register("carol").await;
    carol.ok_post(&format!("/join/{}", encoded(&it.scene.room)), json!({})).await;
    it.set_policy(json!({ "via": GUARD, "public_keys": { "ed25519": "no key" } })).await;
    carol.ok_post(&format!("/rooms/{}/leave", encoded(&it.scene.room)), json!({})).await;
    it.scene.server.assert_whole();
}

/// The room as it goes on at bob's server while we hear nothing, and an event of it that comes then.
async fn come(there: &Elsewhere, id: &str) -> Outcome {
    let origin = "b.example".try_into().unwrap();
    let came =
        take_in(there.app(), there.room, origin, vec![there.received(id)], Silence::FetchesState).await;
    came.unwrap().remove(0)
}

#[tokio::test(start_paused = true)]
async fn what_was_missed_is_asked_about_and_what_is_read_of_the_past_is_not() {
    let it = Guarded::unused().await;
    let app = it.scene.server.server().app();
    let mut there = Elsewhere::new(&it.scene.net, app, &it.scene.room, &[("b.example", "5.0.0.2")]);
    let bob = it.scene.bob.user.to_string();
    // The room has got a policy server by an event that was missed, too.
    there.add("@alice:test.example", "m.room.policy", Some(""), policy(1));
    let some: Vec<String> = (0..3).map(|number| there.say(&bob, &format!("{number}"))).collect();
    let outcome = come(&there, &some[2]).await;
    assert!(matches!(outcome, Outcome::Accepted(_)), "{outcome:?}");
    assert_eq!(it.guard.take_asked().len(), 3);
    assert!(it.is_signed(&some[0]).await);
    assert_eq!(it.scene.texts().await, ["2", "1", "0"]);
    // After a long outage its own state is not what says who is asked.
    there.add("@alice:test.example", "m.room.policy", Some(""), policy(2));
    for number in 3..400 {
        there.say(&bob, &format!("{number}"));
    }
    it.guard.says(|_| refusal("No."));
    let newest = there.say(&bob, "newest");
    let outcome = come(&there, &newest).await;
    assert!(matches!(outcome, Outcome::Unknown), "{outcome:?}");
    assert_eq!(it.guard.take_asked().len(), 1);
    assert_eq!(it.scene.texts().await, ["2", "1", "0"]);
    it.guard.says(|_| Says::Signs(2));
    app.env.sleep(Duration::from_secs(700)).await;
    let newest = there.say(&bob, "newer");
    let outcome = come(&there, &newest).await;
    assert!(matches!(outcome, Outcome::Accepted(_)), "{outcome:?}");
    let event = it.event(&newest).await;
    assert_eq!(event["signatures"][GUARD][KEY_ID], signature(&event, 2), "by the key that is in use now");
    it.guard.take_asked();
    for _ in 0..6 {
        it.scene.texts().await;
        app.env.sleep(Duration::from_secs(10)).await;
    }
    assert!(it.scene.texts().await.len() > 50, "{:?}", it.scene.texts().await);
    assert_eq!(it.guard.take_asked(), Vec::<Value>::new(), "nobody is asked about what is long past");
    it.scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_event_that_is_sent_around_before_we_have_its_signature_is_sent_once() {
    let it = Guarded::new().await;
    it.guard.says(|_| Says::After(Duration::from_secs(3), Box::new(Says::Signs(1))));
    let around = async {
        it.scene.server.server().app().env.sleep(Duration::from_secs(1)).await;
        let mut event = it.guard.take_asked().remove(0);
        event["signatures"][GUARD] = json!({ KEY_ID: signature(&event, 1) });
        it.guard.peer.transact(&it.scene.server, "around", &[event], &[]).await
    };
    let (said, (_, answer)) = tokio::join!(it.try_say("1", "early"), around);
    assert_eq!(said.0, StatusCode::OK, "{said:?}");
    let id = said.1["event_id"].as_str().unwrap();
    assert!(answer["pdus"][id]["error"].is_string(), "events of ours are ours to send: {answer}");
    assert_eq!(it.try_say("1", "early").await.1, said.1);
    assert_eq!(it.scene.texts().await, ["early"]);
    it.scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_change_of_several_events_has_each_of_them_signed() {
    let it = Guarded::new().await;
    it.guard.says(|_| Says::After(Duration::from_secs(2), Box::new(Says::Signs(1))));
    let upgrade = it.whole("upgrade");
    let meanwhile = async {
        it.scene.server.server().app().env.sleep(Duration::from_secs(1)).await;
        let (_, event) = it.signed(it.scene.says("meanwhile", &it.scene.bob.heads()), 1);
        it.scene.send("1", &[event]).await
    };
    let ((status, answer), _) =
        tokio::join!(it.alice().post(&upgrade, json!({ "new_version": VERSION })), meanwhile);
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(it.guard.take_asked_types(), ["m.room.tombstone", "m.room.power_levels"]);
    let (_, tombstone) = it.alice().state(&it.scene.room, "m.room.tombstone", "").await;
    assert_eq!(tombstone["replacement_room"], answer["replacement_room"]);
    let (_, levels) = it.alice().state(&it.scene.room, "m.room.power_levels", "").await;
    assert_eq!(levels["events_default"], 50);
    let page = it.alice().ok_get(&it.path("messages?dir=b&limit=3")).await;
    let types: Vec<_> = page["chunk"].as_array().unwrap().iter().map(|event| &event["type"]).collect();
    assert_eq!(types, ["m.room.power_levels", "m.room.tombstone", "m.room.message"]);
    it.scene.server.assert_whole();
}
