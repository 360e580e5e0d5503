//! Redactions as clients see them, and what moderators still see for a while.

use std::time::Duration;

use aqueduct::rooms::change::{Outcome, Received};
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    ingest::shared_room,
    rooms::Rooms,
    support::{TestClient, TestServer, encoded, remote::Remote},
    sync::{Chain, create_room, must, say, set_state},
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

async fn unredacted(who: &TestClient, room: &str, event: &str) -> (StatusCode, Value) {
    let query = "fi.mau.msc2815.include_unredacted_content=true";
    who.get(&format!("/_matrix/client/v3/rooms/{room}/event/{}?{query}", encoded(event))).await
}

async fn redact(who: &TestClient, room: &str, event: &str) {
    who.ok_put(
        &format!("/rooms/{room}/redact/{}/{}", encoded(event), encoded(event)),
        json!({ "reason": "spam" }),
    )
    .await;
}

/// Each such request is an event of its own, as there is nothing by which a repeated one could be told.
#[tokio::test(start_paused = true)]
async fn old_clients_send_and_redact_without_a_transaction() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    for version in ["r0", "v3"] {
        let base = format!("/_matrix/client/{version}/rooms/{room}");
        let send =
            async |who: &TestClient, path: &str, body: Value| who.post(&format!("{base}/{path}"), body).await;
        let mut said = Vec::new();
        for _ in 0..2 {
            let (status, sent) =
                send(&alice, "send/m.room.message", json!({ "msgtype": "m.text", "body": "x" })).await;
            assert_eq!(status, StatusCode::OK, "{sent}");
            said.push(sent["event_id"].as_str().unwrap().to_owned());
        }
        assert_ne!(said[0], said[1]);
        let event = alice.ok_get(&format!("/rooms/{room}/event/{}", encoded(&said[0]))).await;
        assert_eq!((&event["content"]["body"], &event["type"]), (&json!("x"), &json!("m.room.message")));
        assert!(event["unsigned"].get("transaction_id").is_none(), "{event}");
        let redact = format!("redact/{}", encoded(&said[0]));
        assert_eq!(send(&bob, "send/m.room.message", json!({ "body": "x" })).await.0, StatusCode::FORBIDDEN);
        assert_eq!(send(&bob, &redact, json!({})).await.0, StatusCode::FORBIDDEN);
        let (status, redaction) = send(&alice, &redact, json!({ "reason": "spam" })).await;
        assert_eq!(status, StatusCode::OK, "{redaction}");
        let event = alice.ok_get(&format!("/rooms/{room}/event/{}", encoded(&said[0]))).await;
        assert_eq!(event["unsigned"]["redacted_because"]["event_id"], redaction["event_id"]);
        assert_eq!(event["unsigned"]["redacted_by"], redaction["event_id"]);
        assert_eq!(event["unsigned"]["redacted_because"]["content"]["reason"], "spam");
        assert_eq!(event["content"], json!({}));
    }
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn moderators_see_what_was_redacted_until_it_is_gone() {
    let server = TestServer::with(|config| config.rooms.redacted_events_kept_days = 2);
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    for version in ["10", "12"] {
        let room = alice.create(json!({ "preset": "public_chat", "room_version": version })).await;
        bob.ok_post(&format!("/join/{room}"), json!({})).await;
        let said = bob.say(&room, "1", "bad words").await;
        let (status, event) = unredacted(&alice, &room, &said).await;
        assert_eq!((status, &event["content"]["body"]), (StatusCode::OK, &json!("bad words")));
        redact(&alice, &room, &said).await;
        let event = alice.ok_get(&format!("/rooms/{room}/event/{}", encoded(&said))).await;
        assert_eq!(event["content"], json!({}));

        let (status, event) = unredacted(&alice, &room, &said).await;
        assert_eq!((status, &event["content"]["body"]), (StatusCode::OK, &json!("bad words")), "{event}");
        assert_eq!(event["unsigned"]["redacted_because"]["content"]["reason"], "spam");
        // Bob wrote it but cannot redact what others write, and Carol is not in the room: neither may see it.
        let (status, json) = unredacted(&bob, &room, &said).await;
        assert_eq!((status, &json["errcode"]), (StatusCode::FORBIDDEN, &json!("M_FORBIDDEN")));
        let carol = server.register(&format!("carol{version}")).await;
        assert_ne!(unredacted(&carol, &room, &said).await.0, StatusCode::OK);

        tokio::time::advance(DAY).await;
        server.server().app().env.sleep(Duration::from_secs(3)).await;
        assert_eq!(unredacted(&alice, &room, &said).await.0, StatusCode::OK);
        tokio::time::advance(DAY).await;
        server.server().app().env.sleep(Duration::from_secs(3)).await;
        let (status, json) = unredacted(&alice, &room, &said).await;
        assert_eq!(status, StatusCode::NOT_FOUND);
        assert_eq!(json["errcode"], "FI.MAU.MSC2815_UNREDACTED_CONTENT_DELETED");
        assert_eq!(json["fi.mau.msc2815.content_keep_ms"], 2 * 24 * 60 * 60 * 1000);
        let app = server.server().app();
        let kept = aqueduct::schema::REDACTED_ORIGINAL
            .prefix::<()>(&*app.store.snapshot(), (), aqueduct::store::Direction::Up)
            .unwrap()
            .count();
        assert_eq!(kept, 0);
    }
    let (_, versions) = alice.get("/_matrix/client/versions").await;
    assert_eq!(versions["unstable_features"]["fi.mau.msc2815"], true);
}

#[tokio::test(start_paused = true)]
async fn what_is_not_kept_is_gone_at_once() {
    let server = TestServer::with(|config| config.rooms.redacted_events_kept_days = 0);
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    let said = alice.say(&room, "1", "bad words").await;
    redact(&alice, &room, &said).await;
    assert_eq!(unredacted(&alice, &room, &said).await.0, StatusCode::NOT_FOUND);
    let (_, versions) = alice.get("/_matrix/client/versions").await;
    assert_eq!(versions["unstable_features"]["fi.mau.msc2815"], false);
}

#[tokio::test(start_paused = true)]
async fn a_thread_ends_with_its_last_event_that_is_not_redacted() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    let (one, two) = (alice.say(&room, "1", "one").await, alice.say(&room, "2", "two").await);
    let reply = async |txn: &str, root: &str| {
        let content = json!({ "body": txn, "m.relates_to": { "rel_type": "m.thread", "event_id": root } });
        let json = alice.ok_put(&format!("/rooms/{room}/send/m.room.message/{txn}"), content).await;
        json["event_id"].as_str().unwrap().to_owned()
    };
    let threads = async || {
        let (_, json) = alice.get(&format!("/_matrix/client/v1/rooms/{room}/threads")).await;
        let roots = json["chunk"].as_array().unwrap().iter();
        roots.map(|root| root["event_id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let first = reply("a", &one).await;
    reply("b", &two).await;
    let last = reply("c", &one).await;
    assert_eq!(threads().await, [one.clone(), two.clone()]);
    redact(&alice, &room, &last).await;
    assert_eq!(threads().await, [two.clone(), one.clone()]);
    let event = alice.ok_get(&format!("/rooms/{room}/event/{}", encoded(&one))).await;
    let thread = &event["unsigned"]["m.relations"]["m.thread"];
    assert_eq!((&thread["count"], &thread["latest_event"]["event_id"]), (&json!(1), &json!(first)));
    redact(&alice, &room, &first).await;
    assert_eq!(threads().await, [two]);
    let event = alice.ok_get(&format!("/rooms/{room}/event/{}", encoded(&one))).await;
    assert!(event["unsigned"].get("m.relations").is_none(), "{event}");
}

/// Bob, of another server, redacts an event in Alice's room: the redaction, not sent yet.
fn redaction_of(bob: &Remote, target: &str, is_in_content: bool) -> Received {
    let content = if is_in_content { json!({ "redacts": target }) } else { json!({}) };
    let mut received = bob.event("m.room.redaction", None, content, &bob.heads());
    if !is_in_content {
        received = bob.rewritten(&received, "redacts", target.into());
    }
    received
}

#[tokio::test(start_paused = true)]
async fn a_redaction_that_may_not_be_is_not_shown_to_clients() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    for version in ["10", "11"] {
        let (room, bob) = shared_room(&alice, json!({ "room_version": version })).await;
        let said = alice.say(&room, "1", "hello").await;
        let since = alice.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
        let redaction = redaction_of(&bob, &said, version == "11");
        let id = redaction.id().to_string();
        assert!(matches!(bob.send(redaction).await, Outcome::Accepted(_)));
        let sync = alice.ok_get(&format!("/sync?since={since}")).await.to_string();
        assert!(!sync.contains("m.room.redaction"), "{sync}");
        let page = alice.ok_get(&format!("/rooms/{room}/messages?dir=b")).await.to_string();
        assert!(!page.contains("m.room.redaction") && page.contains("hello"), "{page}");
        let (status, _) = alice.get(&format!("/_matrix/client/v3/rooms/{room}/event/{}", encoded(&id))).await;
        assert_eq!(status, StatusCode::NOT_FOUND);
    }
}

#[tokio::test(start_paused = true)]
async fn what_clients_see_redacted_is_what_was_judged() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    for version in ["10", "11"] {
        let (room, bob) = shared_room(&alice, json!({ "room_version": version })).await;
        let hers = alice.say(&room, "1", "hello").await;
        let own = bob.message("mine", &bob.heads());
        let own_id = own.id().to_string();
        assert!(matches!(bob.send(own).await, Outcome::Accepted(_)));
        // The place at which this room version looks names Bob's own message, and the other place names Alice's.
        let mut redaction = redaction_of(&bob, &own_id, version == "11");
        if version == "11" {
            redaction = bob.rewritten(&redaction, "redacts", hers.as_str().into());
        } else {
            redaction = bob.rewritten(&redaction, "content", json!({ "redacts": hers, "reason": "x" }));
        }
        let id = redaction.id().to_string();
        assert!(matches!(bob.send(redaction).await, Outcome::Accepted(_)));
        let shown = alice.ok_get(&format!("/rooms/{room}/event/{}", encoded(&id))).await;
        assert_eq!(shown["redacts"], own_id, "{shown}");
        assert_eq!(shown["content"]["redacts"], own_id, "{shown}");
        let told = alice.ok_get(&format!("/rooms/{room}/event/{}", encoded(&hers))).await;
        assert_eq!(told["content"]["body"], "hello");
    }
}

#[tokio::test(start_paused = true)]
async fn a_redaction_says_what_it_redacts_in_both_places_in_every_room_version() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    for version in 1..=12 {
        let room = alice.create(json!({ "room_version": version.to_string() })).await;
        let said = alice.say(&room, "1", "hello").await;
        redact(&alice, &room, &said).await;
        let page = alice.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=1")).await;
        let redaction = &page["chunk"][0];
        assert_eq!(redaction["redacts"], said, "{version}: {redaction}");
        assert_eq!(redaction["content"], json!({ "reason": "spam", "redacts": said }), "{version}");
    }
}

/// The places where a redacted event is shown, as one reader gets them.
async fn shown(who: &TestClient, room: &str, event: &str) -> String {
    let event = encoded(event);
    let mut shown = String::new();
    for door in [format!("event/{event}"), "messages?dir=b&limit=100".to_owned(), format!("context/{event}")]
    {
        let answer = who.ok_get(&format!("/rooms/{room}/{door}")).await;
        assert!(!answer.to_string().contains("bad words"), "{door}: {answer}");
        shown += &answer.to_string();
    }
    shown
}

#[tokio::test(start_paused = true)]
async fn why_an_event_was_redacted_is_told_to_nobody_who_may_not_see_the_redaction() {
    for (visibility, comes_back) in [("shared", false), ("joined", false), ("joined", true)] {
        let server = TestServer::new();
        let (alice, bob) = (server.register("alice").await, server.register("bob").await);
        let content = json!({ "history_visibility": visibility });
        let state = json!([{ "type": "m.room.history_visibility", "content": content }]);
        let room = alice.create(json!({ "preset": "public_chat", "initial_state": state })).await;
        bob.ok_post(&format!("/join/{room}"), json!({})).await;
        let said = alice.say(&room, "1", "bad words").await;
        let kick = json!({ "user_id": bob.user_id });
        alice.ok_post(&format!("/rooms/{room}/kick"), kick).await;
        let path = format!("/rooms/{room}/redact/{}/r", encoded(&said));
        let redaction = alice.ok_put(&path, json!({ "reason": "SECRET" })).await;
        if comes_back {
            bob.ok_post(&format!("/join/{room}"), json!({})).await;
        }
        let redaction = encoded(redaction["event_id"].as_str().unwrap());
        let seen = bob.get(&format!("/_matrix/client/v3/rooms/{room}/event/{redaction}")).await;
        assert_eq!(seen.0, StatusCode::NOT_FOUND, "{visibility}: {}", seen.1);
        let shown_to_bob = shown(&bob, &room, &said).await;
        assert!(!shown_to_bob.contains("SECRET"), "{visibility}, {comes_back}: {shown_to_bob}");
        assert!(!shown_to_bob.contains("redacted_because"), "{visibility}, {comes_back}: {shown_to_bob}");
        assert_eq!(shown(&alice, &room, &said).await.matches("redacted_because").count(), 3);
    }
}

#[tokio::test(start_paused = true)]
async fn why_an_ignored_user_redacted_an_event_is_not_told() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    let said = bob.say(&room, "1", "bad words").await;
    let path = format!("/rooms/{room}/redact/{}/r", encoded(&said));
    alice.ok_put(&path, json!({ "reason": "SECRET" })).await;
    assert!(shown(&bob, &room, &said).await.contains("SECRET"), "bob hears alice so far");
    let path = format!("/user/{}/account_data/m.ignored_user_list", bob.user_id);
    bob.ok_put(&path, json!({ "ignored_users": { &alice.user_id: {} } })).await;
    assert!(!shown(&bob, &room, &said).await.contains("SECRET"), "bob ignores alice");
}

/// Gives the events by which a client with this filter is told of a topic that was redacted since it knew it.
async fn told_of_redacted_topic(filter: Value, query: &str) -> (Value, Value) {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
    must(&bob, &room, "join", json!({})).await;
    let topic = set_state(&alice, &room, "m.room.topic", "", json!({ "topic": "a secret" })).await;
    let old = set_state(&alice, &room, "org.example.thing", "", json!({ "a": "secret" })).await;
    set_state(&alice, &room, "org.example.thing", "", json!({ "no": "secret" })).await;
    let mut chain = Chain::filtered(&bob, filter);
    chain.query = query.to_owned();
    chain.next().await;
    redact(&alice, &room, &topic).await;
    redact(&alice, &room, &old).await;
    say(&alice, &room, "hello").await;
    let news = chain.next().await["rooms"]["join"][&room].clone();
    let again = chain.next().await["rooms"]["join"][&room].clone();
    assert_eq!(again, Value::Null, "it is told once");
    (news["state"]["events"].clone(), news["state_after"]["events"].clone())
}

#[tokio::test(start_paused = true)]
async fn a_redacted_state_event_is_told_where_the_timeline_leaves_its_redaction_out() {
    let is_told = |events: &Value| {
        let events = events.as_array().unwrap();
        assert_eq!(events.len(), 1, "only what still holds: {events:?}");
        assert_eq!((&events[0]["type"], &events[0]["content"]), (&json!("m.room.topic"), &json!({})));
    };
    let only_messages = json!({ "room": { "timeline": { "types": ["m.room.message"] } } });
    is_told(&told_of_redacted_topic(only_messages, "").await.0);
    is_told(&told_of_redacted_topic(json!({ "room": { "timeline": { "limit": 1 } } }), "").await.0);
    is_told(&told_of_redacted_topic(json!({}), "&use_state_after=true").await.1);
    let (state, _) = told_of_redacted_topic(json!({}), "").await;
    assert_eq!(state, json!([]), "a client sees the redaction in its timeline");
}

#[tokio::test(start_paused = true)]
async fn an_event_that_is_not_here_is_redacted_when_it_comes() {
    let scene = crate::inbound::Scene::new().await;
    let carol = scene.server.register("carol").await;
    carol.ok_post(&format!("/join/{}", scene.room), json!({})).await;
    let (id, event) = scene.says("regrettable", &scene.bob.heads());
    let path = format!("/_matrix/client/v3/rooms/{}/redact/{}", scene.room, encoded(id.as_str()));
    // A user who may redact their own events alone has none that is not here.
    let (status, json) = carol.put(&format!("{path}/1"), json!({})).await;
    assert_eq!((status.as_u16(), &json["errcode"]), (404, &json!("M_NOT_FOUND")), "{json}");
    let since = carol.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
    let (status, redaction) = scene.alice.put(&format!("{path}/1"), json!({ "reason": "why" })).await;
    assert_eq!(status.as_u16(), 200, "{redaction}");
    let again = scene.alice.put(&format!("{path}/1"), json!({ "reason": "why" })).await.1;
    assert_eq!(again, redaction);
    let page = scene.alice.ok_get(&format!("/rooms/{}/messages?dir=b&limit=100", scene.room)).await;
    let types = |page: &Value| {
        let events = page["chunk"].as_array().unwrap().iter();
        events.map(|event| event["type"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert!(!types(&page).contains(&"m.room.redaction".to_owned()), "{page}");
    let sync = carol.ok_get(&format!("/sync?since={since}")).await;
    assert!(sync["rooms"]["join"].is_null(), "{sync}");
    scene.server.assert_whole();
    let (_, answer) = scene.send("1", &[event]).await;
    assert_eq!(answer["pdus"][id.as_str()], json!({}), "{answer}");
    let page = scene.alice.ok_get(&format!("/rooms/{}/messages?dir=b&limit=100", scene.room)).await;
    let shown =
        page["chunk"].as_array().unwrap().iter().find(|event| event["event_id"] == id.as_str()).unwrap();
    assert_eq!(
        (&shown["content"], &shown["unsigned"]["redacted_because"]["event_id"]),
        (&json!({}), &redaction["event_id"])
    );
    assert!(types(&page).contains(&"m.room.redaction".to_owned()), "{page}");
    scene.server.assert_whole();
    // Nobody else has an event of a room that is only here.
    let alone = scene.alice.create(json!({})).await;
    let path = format!("/_matrix/client/v3/rooms/{alone}/redact/{}/2", encoded(id.as_str()));
    assert_eq!(scene.alice.put(&path, json!({})).await.0.as_u16(), 404);
}
