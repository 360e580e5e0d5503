//! Ephemeral messages that other servers send in transactions (server-server API, "EDUs").

use std::time::Duration;

use aqueduct::{
    config::Bucket,
    schema,
    store::{Direction, Durability, Engine, Store},
};
use federation::testing::{Net, Weather};
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    inbound::Scene,
    rooms::Rooms,
    support::{
        TestClient, TestServer,
        network::{Peer, doors},
        remote::Remote,
    },
};

impl Scene {
    /// Sends messages of these kinds, which are answered with 200.
    async fn tell(&self, txn: &str, edus: &[(&str, Value)]) {
        let edus: Vec<_> =
            edus.iter().map(|(kind, content)| json!({ "edu_type": kind, "content": content })).collect();
        let (status, answer) = self.peer.transact(&self.server, txn, &[], &edus).await;
        assert_eq!((status, answer), (StatusCode::OK, json!({ "pdus": {} })));
    }

    /// Alice's next sync, and where it ends.
    async fn sync(&self, since: &str) -> (Value, String) {
        let since = if since.is_empty() { String::new() } else { format!("&since={since}") };
        let sync = self.alice.ok_get(&format!("/sync?timeout=0{since}")).await;
        let next = sync["next_batch"].as_str().unwrap().to_owned();
        (sync, next)
    }

    fn ephemeral(&self, sync: &Value, kind: &str) -> Option<Value> {
        let events = sync["rooms"]["join"][&self.room]["ephemeral"]["events"].as_array()?;
        events.iter().find(|event| event["type"] == kind).map(|event| event["content"].clone())
    }
}

fn typing(room: &str, user: &str, typing: bool) -> (&'static str, Value) {
    ("m.typing", json!({ "room_id": room, "user_id": user, "typing": typing }))
}

#[tokio::test(start_paused = true)]
async fn users_of_another_server_type_in_rooms_that_they_are_in() {
    let scene = Scene::new().await;
    let room = &scene.room;
    let other_room = scene.alice.create(json!({})).await;
    let (_, since) = scene.sync("").await;
    scene
        .tell(
            "1",
            &[
                typing(room, "@stranger:b.example", true),
                typing(room, "@carol:c.example", true),
                typing(room, &scene.alice.user_id, true),
                typing(&other_room, "@bob:b.example", true),
                typing("!none:b.example", "@bob:b.example", true),
                ("m.typing", json!({ "room_id": room, "user_id": "@bob:b.example", "typing": "yes" })),
                ("m.typing", json!([])),
            ],
        )
        .await;
    let (sync, since) = scene.sync(&since).await;
    assert_eq!(sync.get("rooms"), None, "{sync}");
    scene.tell("2", &[typing(room, "@bob:b.example", true)]).await;
    let (sync, since) = scene.sync(&since).await;
    assert_eq!(scene.ephemeral(&sync, "m.typing"), Some(json!({ "user_ids": ["@bob:b.example"] })));
    scene.tell("3", &[typing(room, "@bob:b.example", false)]).await;
    let (sync, since) = scene.sync(&since).await;
    assert_eq!(scene.ephemeral(&sync, "m.typing"), Some(json!({ "user_ids": [] })));
    // Who is not heard of again has stopped.
    scene.tell("4", &[typing(room, "@bob:b.example", true)]).await;
    let (_, since) = scene.sync(&since).await;
    scene.pass(Duration::from_secs(61)).await;
    let (sync, since) = scene.sync(&since).await;
    assert_eq!(scene.ephemeral(&sync, "m.typing"), Some(json!({ "user_ids": [] })));
    let acl = json!({ "allow": ["*"], "deny": ["b.example"] });
    scene.alice.ok_put(&format!("/rooms/{room}/state/m.room.server_acl"), acl).await;
    let (_, since) = scene.sync(&since).await;
    scene.tell("5", &[typing(room, "@bob:b.example", true)]).await;
    let (sync, _) = scene.sync(&since).await;
    assert_eq!(scene.ephemeral(&sync, "m.typing"), None);
}

fn receipt(room: &str, user: &str, event: &str, data: Value) -> (&'static str, Value) {
    let of_user = json!({ "event_ids": [event], "data": data });
    ("m.receipt", json!({ room: { "m.read": { user: of_user } } }))
}

#[tokio::test(start_paused = true)]
async fn users_of_another_server_have_read_up_to_an_event() {
    let scene = Scene::new().await;
    let room = &scene.room;
    let (_, since) = scene.sync("").await;
    let first = scene.alice.say(room, "1", "one").await;
    let root = scene.alice.say(room, "2", "two").await;
    let reply = json!({ "body": "in thread", "m.relates_to": { "rel_type": "m.thread", "event_id": root } });
    let reply = scene.alice.ok_put(&format!("/rooms/{room}/send/m.room.message/3"), reply).await;
    let reply = reply["event_id"].as_str().unwrap();
    scene
        .tell(
            "1",
            &[
                receipt(room, "@bob:b.example", &first, json!({ "ts": 5 })),
                receipt(room, "@stranger:b.example", &first, json!({ "ts": 5 })),
                receipt(room, &scene.alice.user_id, &root, json!({ "ts": 5 })),
                receipt(room, "@bob:b.example", "$nowhere", json!({ "ts": 5 })),
                receipt(room, "@bob:b.example", "no id", json!({ "ts": 5 })),
                receipt("!none:b.example", "@bob:b.example", &first, json!({ "ts": 5 })),
                receipt(room, "@bob:b.example", reply, json!({ "ts": 5, "thread_id": "$other" })),
                receipt(room, "@bob:b.example", reply, json!({ "ts": 1e300, "thread_id": root })),
                receipt(room, "@bob:b.example", &root, json!({ "ts": -1, "thread_id": "main" })),
                (
                    "m.receipt",
                    json!({ room: { "m.read": { "@bob:b.example": { "event_ids": 7 } }, "x": 1 } }),
                ),
                ("m.receipt", json!("x")),
            ],
        )
        .await;
    let (sync, since) = scene.sync(&since).await;
    let told = scene.ephemeral(&sync, "m.receipt").unwrap();
    assert_eq!(told[&first]["m.read"], json!({ "@bob:b.example": { "ts": 5 } }));
    assert_eq!(told[reply]["m.read"]["@bob:b.example"]["thread_id"], json!(root));
    assert_eq!(told[&root]["m.read"]["@bob:b.example"]["thread_id"], "main");
    assert_eq!(told.as_object().unwrap().len(), 3, "{told}");
    // A receipt does not go back, and none counts where the server is not admitted.
    let acl = json!({ "allow": ["*"], "deny": ["b.example"] });
    scene.tell("2", &[receipt(room, "@bob:b.example", &first, json!({ "ts": 9 }))]).await;
    scene.alice.ok_put(&format!("/rooms/{room}/state/m.room.server_acl"), acl).await;
    scene.tell("3", &[receipt(room, "@bob:b.example", &root, json!({ "ts": 9 }))]).await;
    let (sync, _) = scene.sync(&since).await;
    assert_eq!(scene.ephemeral(&sync, "m.receipt"), None);
    scene.server.assert_whole();
}

fn presence(updates: Value) -> (&'static str, Value) {
    ("m.presence", json!({ "push": updates }))
}

fn present(sync: &Value) -> Vec<(String, String)> {
    let events = sync["presence"]["events"].as_array().cloned().unwrap_or_default();
    let of = |event: &Value| {
        let text = |json: &Value| json.as_str().unwrap().to_owned();
        (text(&event["sender"]), text(&event["content"]["presence"]))
    };
    let mut told: Vec<_> = events.iter().map(of).filter(|(user, _)| !user.contains("test.example")).collect();
    told.sort();
    told
}

#[tokio::test(start_paused = true)]
async fn users_of_another_server_are_present() {
    let scene = Scene::new().await;
    let dave = scene.server.register("dave").await;
    let (_, since) = scene.sync("").await;
    let online = |user: &str| json!({ "user_id": user, "presence": "online", "last_active_ago": 5000 });
    scene
        .tell("1", &[
            presence(json!([
                online("@bob:b.example"), online("@stranger:b.example"), online("@carol:c.example"),
                online(&scene.alice.user_id), { "user_id": "@bob:b.example", "presence": "here" }, 7, null,
                { "user_id": 7, "presence": "online" }, { "presence": "online" },
            ])),
            ("m.presence", json!({})),
        ])
        .await;
    let (sync, since) = scene.sync(&since).await;
    assert_eq!(present(&sync), [("@bob:b.example".to_owned(), "online".to_owned())], "{sync}");
    let status = |client: TestClient| async move {
        client.get("/_matrix/client/v3/presence/@bob:b.example/status").await
    };
    let (found, told) = status(scene.alice.clone()).await;
    assert_eq!((found, told["presence"].as_str()), (StatusCode::OK, Some("online")), "{told}");
    assert_eq!(status(dave.clone()).await.0, StatusCode::FORBIDDEN, "who shares no room learns nothing");
    assert_eq!(present(&dave.ok_get("/sync").await), []);
    // Changes that come fast are told a little later, the last one alone.
    for (txn, state) in [("2", "unavailable"), ("3", "online"), ("4", "unavailable")] {
        let update = json!([{ "user_id": "@bob:b.example", "presence": state, "last_active_ago": -3 }]);
        scene.tell(txn, &[presence(update)]).await;
    }
    let (sync, since) = scene.sync(&since).await;
    assert_eq!(present(&sync), []);
    scene.pass(Duration::from_secs(4)).await;
    let (sync, since) = scene.sync(&since).await;
    assert_eq!(present(&sync), [("@bob:b.example".to_owned(), "unavailable".to_owned())]);
    // A server that is not heard of any more takes its users with it.
    scene.pass(Duration::from_secs(3600)).await;
    let (sync, _) = scene.sync(&since).await;
    assert_eq!(present(&sync), [("@bob:b.example".to_owned(), "offline".to_owned())]);
}

#[tokio::test(start_paused = true)]
async fn a_poll_wakes_for_the_presence_of_another_servers_user() {
    let scene = Scene::new().await;
    let (_, since) = scene.sync("").await;
    let path = format!("/sync?timeout=30000&since={since}");
    let poll = scene.alice.ok_get(&path);
    let speak = async {
        scene.pass(Duration::from_secs(3)).await;
        let update = json!([{ "user_id": "@bob:b.example", "presence": "online", "last_active_ago": 0 }]);
        scene.tell("1", &[presence(update)]).await;
    };
    let began = scene.server.server().app().env.uptime();
    let (sync, ()) = tokio::join!(poll, speak);
    assert_eq!(present(&sync).len(), 1, "{sync}");
    let took = scene.server.server().app().env.uptime() - began;
    assert!(took < Duration::from_secs(5), "{took:?}");
}

fn message(id: &str, sender: &str, messages: Value) -> (&'static str, Value) {
    let content = json!({ "message_id": id, "sender": sender, "type": "m.test", "messages": messages });
    ("m.direct_to_device", content)
}

fn inbox(sync: &Value) -> Vec<Value> {
    sync["to_device"]["events"].as_array().cloned().unwrap_or_default()
}

#[tokio::test(start_paused = true)]
async fn a_message_between_devices_is_delivered_once() {
    let mut scene = Scene::new().await;
    let alice = scene.alice.user_id.clone();
    let tablet = scene.alice.on_device("TABLET").await;
    let (one, all) = (json!({ "n": 1 }), json!({ "n": "all" }));
    let to_phone = json!({ &alice: { &scene.alice.device_id: &one, "NONE": &one } });
    let (phones, everywhere) = (to_phone.clone(), json!({ &alice: { "*": &all } }));
    scene
        .tell(
            "1",
            &[
                message("a", "@bob:b.example", phones),
                message("b", "@bob:b.example", everywhere),
                message("c", "@carol:c.example", to_phone.clone()),
                message("d", &alice, to_phone.clone()),
                message("e", "@bob:b.example", json!({ "@nobody:test.example": { "*": {} } })),
                message("f", "@bob:b.example", json!({ &alice: { "*": "no object" }, "no id": 7 })),
                message(&"x".repeat(300), "@bob:b.example", to_phone.clone()),
                message("g", "@bob:b.example", json!({ &alice: { "*": { "long": "x".repeat(70_000) } } })),
                ("m.direct_to_device", json!({ "sender": "@bob:b.example" })),
            ],
        )
        .await;
    // The same message comes again in another transaction, and once more after a crash.
    scene.tell("2", &[message("a", "@bob:b.example", to_phone.clone())]).await;
    scene.crash();
    scene.tell("3", &[message("a", "@bob:b.example", to_phone.clone())]).await;
    let event = |content: &Value| json!({ "sender": "@bob:b.example", "type": "m.test", "content": content });
    let (sync, since) = scene.sync("").await;
    assert_eq!(inbox(&sync), [event(&one), event(&all)]);
    let tablet = TestClient { server: scene.server.clone(), ..tablet };
    assert_eq!(inbox(&tablet.ok_get("/sync").await), [event(&all)]);
    // An id counts for its server, and for a week.
    let other = Peer::new(&scene.net, "c.example", "5.0.0.3", 3);
    let (kind, content) = message("a", "@carol:c.example", to_phone.clone());
    let edu = json!({ "edu_type": kind, "content": content });
    other.transact(&scene.server, "1", &[], &[edu]).await;
    let (sync, since) = scene.sync(&since).await;
    assert_eq!(inbox(&sync).len(), 1);
    scene.server.assert_whole();
    scene.pass(Duration::from_secs(8 * 24 * 3600)).await;
    let snapshot = scene.server.server().app().store.snapshot();
    assert_eq!(schema::INBOUND_MESSAGE.prefix::<()>(&*snapshot, (), Direction::Up).unwrap().count(), 0);
    drop(snapshot);
    scene.tell("9", &[message("a", "@bob:b.example", to_phone)]).await;
    assert_eq!(inbox(&scene.sync(&since).await.0).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn clients_are_told_that_devices_of_another_servers_user_changed() {
    let scene = Scene::new().await;
    let (_, since) = scene.sync("").await;
    let update = |user: &str| json!({ "user_id": user, "device_id": "D", "stream_id": 1, "prev_id": [] });
    scene
        .tell(
            "1",
            &[
                ("m.device_list_update", update("@stranger:b.example")),
                ("m.device_list_update", update("@carol:c.example")),
                ("m.device_list_update", update(&scene.alice.user_id)),
                ("m.device_list_update", json!({ "user_id": 3 })),
                ("m.signing_key_update", json!([])),
            ],
        )
        .await;
    let (sync, since) = scene.sync(&since).await;
    assert_eq!(sync.get("device_lists"), None, "{sync}");
    let path = format!("/sync?timeout=30000&since={since}");
    let began = scene.server.server().app().env.uptime();
    let poll = scene.alice.ok_get(&path);
    let speak = async {
        scene.pass(Duration::from_secs(3)).await;
        scene.tell("2", &[("m.device_list_update", update("@bob:b.example"))]).await;
    };
    let (sync, ()) = tokio::join!(poll, speak);
    assert_eq!(sync["device_lists"]["changed"], json!(["@bob:b.example"]));
    assert!(scene.server.server().app().env.uptime() - began < Duration::from_secs(5));
    let since = sync["next_batch"].as_str().unwrap();
    scene.tell("3", &[("m.signing_key_update", json!({ "user_id": "@bob:b.example" }))]).await;
    let (sync, since) = scene.sync(since).await;
    assert_eq!(sync["device_lists"]["changed"], json!(["@bob:b.example"]));
    assert_eq!(scene.sync(&since).await.0.get("device_lists"), None);
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn odd_messages_harm_none_beside_them() {
    let scene = Scene::new().await;
    let (_, since) = scene.sync("").await;
    let (kind, content) = typing(&scene.room, "@bob:b.example", true);
    let mut edus = vec![
        json!(1),
        json!(null),
        json!("x"),
        json!([]),
        json!({}),
        json!({ "edu_type": "m.typing" }),
        json!({ "edu_type": 7, "content": {} }),
        json!({ "edu_type": "org.example.unknown", "content": {} }),
        json!({ "edu_type": "m.presence", "content": { "push": { "a": 1 } } }),
        json!({ "edu_type": "m.receipt", "content": { "!x": null } }),
    ];
    edus.push(json!({ "edu_type": kind, "content": content }));
    let (status, answer) = scene.peer.transact(&scene.server, "1", &[], &edus).await;
    assert_eq!((status, answer), (StatusCode::OK, json!({ "pdus": {} })));
    let (sync, _) = scene.sync(&since).await;
    assert!(scene.ephemeral(&sync, "m.typing").is_some(), "{sync}");
}

#[tokio::test(start_paused = true)]
async fn few_users_of_one_server_are_shown_typing_in_a_room() {
    let scene = Scene::new().await;
    let mut prev = scene.bob.heads();
    let mut joins = Vec::new();
    let names: Vec<_> = (0..30).map(|number| format!("@u{number:02}:b.example")).collect();
    for name in &names {
        let user = Remote {
            app: scene.bob.app.clone(),
            room: scene.bob.room,
            user: name.as_str().try_into().unwrap(),
        };
        let join = json!({ "membership": "join" });
        let (id, event) = scene.peer.event(&user, "m.room.member", Some(name), join, &prev);
        prev = vec![id];
        joins.push(event);
    }
    scene.send("joins", &joins).await;
    let (_, since) = scene.sync("").await;
    let edus: Vec<_> = names.iter().map(|name| typing(&scene.room, name, true)).collect();
    scene.tell("1", &edus).await;
    let (sync, _) = scene.sync(&since).await;
    let typists = scene.ephemeral(&sync, "m.typing").unwrap();
    assert_eq!(typists["user_ids"].as_array().unwrap().len(), 25);
    scene.net.weather("5.0.0.2:8448", Weather::Fair, Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_invents_senders_makes_no_message_of_others_vanish() {
    let scene = Scene::new().await;
    let alice = scene.alice.user_id.clone();
    let to_phone = |content: &Value| json!({ &alice: { &scene.alice.device_id: content } });
    let evil = Peer::new(&scene.net, "evil.example", "5.0.0.6", 6);
    let good = Peer::new(&scene.net, "good.example", "5.0.0.7", 7);
    let send = async |peer: &Peer, txn: &str, messages: Vec<(&'static str, Value)>| {
        let edus: Vec<_> = messages
            .into_iter()
            .map(|(kind, content)| json!({ "edu_type": kind, "content": content }))
            .collect();
        let (status, answer) = peer.transact(&scene.server, txn, &[], &edus).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
    };
    let large = json!({ "who": "evil", "b": "x".repeat(30_000) });
    for txn in 0..12 {
        let flood = (0..100).map(|number| {
            let sender = format!("@m{txn}x{number}:evil.example");
            message(&format!("{txn}x{number}"), &sender, to_phone(&large))
        });
        send(&evil, &txn.to_string(), flood.collect()).await;
    }
    let key = |who: &str| to_phone(&json!({ "who": who, "b": "x".repeat(900) }));
    let keys = (0..20).map(|number| message(&format!("k{number}"), "@g:good.example", key("stranger")));
    send(&good, "1", keys.collect()).await;
    let keys = (0..20).map(|number| message(&format!("k{number}"), "@bob:b.example", key("neighbour")));
    send(&scene.peer, "keys", keys.collect()).await;
    let (mut since, mut counts) = (String::new(), std::collections::BTreeMap::<String, usize>::new());
    loop {
        let (sync, next) = scene.sync(&since).await;
        since = next;
        let messages = inbox(&sync);
        if messages.is_empty() {
            break;
        }
        for message in messages {
            *counts.entry(message["content"]["who"].as_str().unwrap().to_owned()).or_default() += 1;
        }
    }
    assert_eq!((counts["stranger"], counts["neighbour"]), (20, 20));
    // A quarter of the half of 64 MiB that strangers may fill.
    assert!((250..300).contains(&counts["evil"]), "{}", counts["evil"]);
    scene.server.assert_whole();
}

/// A server that takes twenty acts for inboxes at once from others and then so many a second, and two others.
fn with_bounded_inboxes(per_second: f64) -> (TestServer, [Peer; 2]) {
    let net = Net::new(1);
    let store = Store::open(Engine::Memory(Default::default()), Durability::Fsync).unwrap();
    let server = TestServer::start(doors(&net), store, |config| {
        config.limits.rate_limits = true;
        config.limits.register = Bucket { per_second: 1_000.0, burst: 1_000 };
        config.limits.inbound_to_device = Bucket { per_second, burst: 20 };
    });
    let peers = [("b.example", "5.0.0.2", 2), ("c.example", "5.0.0.3", 3)];
    (server, peers.map(|it| Peer::new(&net, it.0, it.1, it.2)))
}

/// Tells all devices of a user so many messages of 9,000 bytes, and answers the status.
async fn tell_devices(
    server: &TestServer,
    to: &TestClient,
    peer: &Peer,
    txn: &str,
    count: usize,
) -> StatusCode {
    let to_all = json!({ &to.user_id: { "*": { "b": "x".repeat(9_000) } } });
    let sender = format!("@m:{}", peer.own.server());
    let edus = (0..count).map(|number| message(&format!("{number}"), &sender, to_all.clone()));
    let edus =
        edus.map(|(kind, content)| json!({ "edu_type": kind, "content": content })).collect::<Vec<_>>();
    peer.transact(server, txn, &[], &edus).await.0
}

#[tokio::test(start_paused = true)]
async fn a_server_that_fills_inboxes_too_fast_waits_and_loses_nothing() {
    let (server, [flood, good]) = with_bounded_inboxes(10.0);
    let alice = server.register("alice").await;
    let tell = async |peer, txn, count| tell_devices(&server, &alice, peer, txn, count).await;
    // Three acts each: one device, and three parts of 4 KiB.
    assert_eq!(tell(&good, "1", 5).await, StatusCode::OK);
    assert_eq!(tell(&flood, "1", 100).await, StatusCode::TOO_MANY_REQUESTS);
    for _ in 0..20 {
        if tell(&flood, "1", 100).await == StatusCode::OK {
            break;
        }
        server.server().app().env.sleep(Duration::from_secs(5)).await;
    }
    let (mut since, mut count) = (String::new(), 0);
    loop {
        let sync = alice.ok_get(&format!("/sync?timeout=0{since}")).await;
        let messages = inbox(&sync);
        count += messages.len();
        since = format!("&since={}", sync["next_batch"].as_str().unwrap());
        if messages.is_empty() {
            break;
        }
    }
    assert_eq!(count, 105, "each comes, and once");
}

#[tokio::test(start_paused = true)]
async fn a_stranger_at_the_same_address_keeps_nobody_from_writing_who_shares_a_room() {
    let (server, [near, flood]) = with_bounded_inboxes(0.1);
    let alice = server.register("alice").await;
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    let bob = Remote::new(server.server().app(), &room);
    let joins = json!({ "membership": "join" });
    let (id, join) = near.event(&bob, "m.room.member", Some(bob.user.as_str()), joins, &bob.heads());
    let (_, answer) = near.transact(&server, "join", &[join], &[]).await;
    assert_eq!(answer["pdus"][id.as_str()], json!({}));
    let tell = async |peer, txn, count| tell_devices(&server, &alice, peer, txn, count).await;
    assert_eq!(tell(&flood, "1", 100).await, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(tell(&near, "1", 5).await, StatusCode::OK);
    assert_eq!(tell(&near, "2", 100).await, StatusCode::TOO_MANY_REQUESTS, "its own part is bounded, too");
}
