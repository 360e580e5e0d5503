//! Events that refer to others: edits, threads, references, annotations.

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    rooms::Rooms as _,
    support::{TestClient, TestServer, encoded},
};

#[tokio::test(start_paused = true)]
async fn what_refers_to_an_event_is_found_and_bundled() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    let root = alice.say(&room, "0", "root").await;
    let relate = async |who: &TestClient, txn: &str, kind: &str, rel_type: &str, to: &str| {
        let content = json!({
            "body": txn, "m.new_content": { "body": txn }, "m.relates_to": { "rel_type": rel_type, "event_id": to },
        });
        let json = who.ok_put(&format!("/rooms/{room}/send/{kind}/{txn}"), content).await;
        json["event_id"].as_str().unwrap().to_owned()
    };
    relate(&alice, "edit1", "m.room.message", "m.replace", &root).await;
    tokio::time::advance(std::time::Duration::from_millis(1)).await;
    let edit = relate(&alice, "edit2", "m.room.message", "m.replace", &root).await;
    relate(&bob, "forged", "m.room.message", "m.replace", &root).await;
    relate(&bob, "thread1", "m.room.message", "m.thread", &root).await;
    let latest = relate(&bob, "thread2", "m.room.message", "m.thread", &root).await;
    let reference = relate(&bob, "ref", "org.test", "m.reference", &root).await;
    relate(&bob, "like", "m.reaction", "m.annotation", &root).await;

    let event = alice.ok_get(&format!("/rooms/{room}/event/{}", encoded(&root))).await;
    let bundle = &event["unsigned"]["m.relations"];
    assert_eq!(bundle["m.replace"]["event_id"], edit, "{event}");
    assert_eq!(bundle["m.thread"]["count"], 2);
    assert_eq!(bundle["m.thread"]["latest_event"]["event_id"], latest);
    assert_eq!(bundle["m.thread"]["latest_event"]["unsigned"]["membership"], "join");
    assert_eq!(bundle["m.thread"]["current_user_participated"], true);
    assert_eq!(bundle["m.reference"]["chunk"], json!([{ "event_id": reference }]));
    let relations =
        |rest: &str| format!("/_matrix/client/v1/rooms/{room}/relations/{}{rest}", encoded(&root));
    let count = async |rest: &str| {
        let (status, json) = alice.get(&relations(rest)).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        json["chunk"].as_array().unwrap().len()
    };
    assert_eq!(count("").await, 7);
    assert_eq!(count("/m.thread").await, 2);
    assert_eq!(count("/m.annotation/m.reaction").await, 1);
    let (_, first) = alice.get(&relations("?limit=4")).await;
    let (_, second) =
        alice.get(&relations(&format!("?limit=4&from={}", first["next_batch"].as_str().unwrap()))).await;
    assert_eq!(second["chunk"].as_array().unwrap().len(), 3);
    assert_eq!(second.get("next_batch"), None);
    let (_, deep) = alice.get(&relations("?recurse=true&dir=f")).await;
    assert_eq!(deep["chunk"].as_array().unwrap().len(), 7);
    let (_, newest) = alice.get(&relations("?limit=1")).await;
    assert_eq!(newest["chunk"][0]["type"], "m.reaction", "the newest come first");
    // A redacted event refers to nothing, so it is not counted.
    alice.ok_put(&format!("/rooms/{room}/redact/{}/r", encoded(&latest)), json!({})).await;
    assert_eq!(count("/m.thread").await, 1);
}

#[tokio::test(start_paused = true)]
async fn threads_are_listed_with_the_newest_first() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    let (one, two) = (alice.say(&room, "1", "one").await, bob.say(&room, "2", "two").await);
    let reply = async |who: &TestClient, txn: &str, to: &str| {
        let content = json!({ "body": txn, "m.relates_to": { "rel_type": "m.thread", "event_id": to } });
        who.ok_put(&format!("/rooms/{room}/send/m.room.message/{txn}"), content).await;
    };
    let threads = async |query: &str| {
        let (status, json) = alice.get(&format!("/_matrix/client/v1/rooms/{room}/threads{query}")).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        let roots = json["chunk"]
            .as_array()
            .unwrap()
            .iter()
            .map(|root| root["event_id"].as_str().unwrap().to_owned());
        (roots.collect::<Vec<_>>(), json["next_batch"].as_str().map(str::to_owned))
    };
    assert_eq!(threads("").await.0, Vec::<String>::new());
    reply(&bob, "r1", &one).await;
    reply(&bob, "r2", &two).await;
    assert_eq!(threads("").await.0, [two.clone(), one.clone()]);
    reply(&bob, "r3", &one).await;
    assert_eq!(threads("").await.0, [one.clone(), two.clone()]);
    assert_eq!(threads("?include=participated").await.0, std::slice::from_ref(&one));
    let (first, next) = threads("?limit=1").await;
    assert_eq!(first, [one]);
    assert_eq!(threads(&format!("?limit=1&from={}", next.unwrap())).await, (vec![two], None));
}

/// The relations that are bundled with an event, as a user sees them.
async fn bundle(who: &TestClient, room: &str, event: &str) -> Value {
    let event = who.ok_get(&format!("/rooms/{room}/event/{}", encoded(event))).await;
    event["unsigned"]["m.relations"].clone()
}

async fn relate(
    who: &TestClient,
    room: &str,
    txn: &str,
    rel_type: &str,
    to: &str,
    key: &str,
) -> (StatusCode, Value) {
    let content = json!({
        "body": txn, "m.new_content": { "body": txn },
        "m.relates_to": { "rel_type": rel_type, "event_id": to, "key": key },
    });
    who.put(&format!("/_matrix/client/v3/rooms/{room}/send/org.test/{txn}"), content).await
}

fn event_id((status, json): (StatusCode, Value)) -> String {
    assert_eq!(status, StatusCode::OK, "{json}");
    json["event_id"].as_str().unwrap().to_owned()
}

#[tokio::test(start_paused = true)]
async fn a_user_annotates_an_event_once_with_a_key() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    let (root, other) = (alice.say(&room, "0", "root").await, alice.say(&room, "1", "other").await);
    let like = async |who: &TestClient, txn: &str, to: &str, key: &str| {
        relate(who, &room, txn, "m.annotation", to, key).await
    };
    let first = event_id(like(&alice, "a", &root, "x").await);
    let again = like(&alice, "b", &root, "x").await;
    assert_eq!((again.0, &again.1["errcode"]), (StatusCode::BAD_REQUEST, &json!("M_DUPLICATE_ANNOTATION")));
    assert_eq!(event_id(like(&alice, "a", &root, "x").await), first, "the same request again");
    for (who, txn, to, key) in
        [(&alice, "c", &root, "y"), (&bob, "d", &root, "x"), (&alice, "e", &other, "x")]
    {
        event_id(like(who, txn, to, key).await);
    }
    alice.ok_put(&format!("/rooms/{room}/redact/{}/r", encoded(&first)), json!({})).await;
    event_id(like(&alice, "f", &root, "x").await);
}

#[tokio::test(start_paused = true)]
async fn no_thread_grows_from_what_relates_to_another_event() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    let root = alice.say(&room, "0", "root").await;
    let reply = event_id(relate(&alice, &room, "1", "m.thread", &root, "").await);
    let nested = relate(&alice, &room, "2", "m.thread", &reply, "").await;
    assert_eq!((nested.0, &nested.1["errcode"]), (StatusCode::BAD_REQUEST, &json!("M_UNKNOWN")));
    let answer = json!({ "body": "re", "m.relates_to": { "m.in_reply_to": { "event_id": root } } });
    let answer = alice.ok_put(&format!("/rooms/{room}/send/m.room.message/3"), answer).await;
    event_id(relate(&alice, &room, "4", "m.thread", answer["event_id"].as_str().unwrap(), "").await);
}

#[tokio::test(start_paused = true)]
async fn what_is_bundled_follows_redactions() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    let said = alice.ok_put(&format!("/rooms/{room}/send/org.test/root"), json!({ "body": "root" })).await;
    let root = said["event_id"].as_str().unwrap().to_owned();
    let mut sent = Vec::new();
    for (number, (who, rel_type)) in [
        (&alice, "m.replace"),
        (&bob, "m.thread"),
        (&alice, "m.replace"),
        (&bob, "m.reference"),
        (&alice, "m.thread"),
        (&bob, "m.thread"),
    ]
    .into_iter()
    .enumerate()
    {
        tokio::time::advance(std::time::Duration::from_millis(1)).await;
        sent.push(event_id(relate(who, &room, &number.to_string(), rel_type, &root, "").await));
    }
    let seen = async || {
        let bundle = bundle(&bob, &room, &root).await;
        let thread = &bundle["m.thread"];
        let place = |value: &Value| sent.iter().position(|id| *value == json!(id));
        (
            place(&bundle["m.replace"]["event_id"]),
            thread["count"].as_u64(),
            place(&thread["latest_event"]["event_id"]),
            thread["current_user_participated"].as_bool(),
            bundle["m.reference"]["chunk"].as_array().map(Vec::len),
        )
    };
    let threads = async || {
        let (_, json) = bob.get(&format!("/_matrix/client/v1/rooms/{room}/threads")).await;
        json["chunk"].as_array().unwrap().len()
    };
    let redact = async |number: usize| {
        let target = encoded(&sent[number]);
        alice.ok_put(&format!("/rooms/{room}/redact/{target}/r{number}"), json!({})).await;
    };
    assert_eq!(seen().await, (Some(2), Some(3), Some(5), Some(true), Some(1)));
    redact(5).await;
    assert_eq!(seen().await, (Some(2), Some(2), Some(4), Some(true), Some(1)));
    redact(2).await;
    redact(3).await;
    assert_eq!(seen().await, (Some(0), Some(2), Some(4), Some(true), None));
    redact(1).await;
    assert_eq!(seen().await, (Some(0), Some(1), Some(4), Some(false), None));
    assert_eq!(threads().await, 1);
    redact(4).await;
    redact(0).await;
    assert_eq!(seen().await, (None, None, None, None, None));
    assert_eq!(threads().await, 0);
}

#[tokio::test(start_paused = true)]
async fn who_left_sees_nothing_bundled_that_came_later() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    let said = alice.ok_put(&format!("/rooms/{room}/send/org.test/root"), json!({ "body": "root" })).await;
    let root = said["event_id"].as_str().unwrap().to_owned();
    let mut sent = Vec::new();
    for time in ["before", "after"] {
        for rel_type in ["m.replace", "m.thread", "m.reference"] {
            tokio::time::advance(std::time::Duration::from_millis(1)).await;
            sent.push(event_id(
                relate(&alice, &room, &format!("{time}{rel_type}"), rel_type, &root, "").await,
            ));
        }
        if time == "before" {
            bob.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
        }
    }
    let (hers, his) = (bundle(&alice, &room, &root).await, bundle(&bob, &room, &root).await);
    for (bundle, from, count) in [(hers, 3, 2), (his, 0, 1)] {
        assert_eq!(bundle["m.replace"]["event_id"], json!(sent[from]));
        assert_eq!(bundle["m.thread"]["latest_event"]["event_id"], json!(sent[from + 1]));
        assert_eq!(bundle["m.thread"]["count"], count);
        assert_eq!(bundle["m.reference"]["chunk"].as_array().unwrap().len(), count);
    }
}

#[tokio::test(start_paused = true)]
async fn an_edit_without_new_content_is_none() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    for (event_type, is_encrypted) in [("org.test", false), ("m.room.encrypted", true)] {
        let send = async |txn: &str, content: Value| {
            tokio::time::advance(std::time::Duration::from_millis(1)).await;
            let path = format!("/rooms/{room}/send/{event_type}/{txn}");
            let sent = alice.ok_put(&path, content).await;
            sent["event_id"].as_str().unwrap().to_owned()
        };
        let root = send("root", json!({ "body": "root" })).await;
        let relation = json!({ "rel_type": "m.replace", "event_id": root });
        let bare = send("bare", json!({ "body": "bare", "m.relates_to": relation })).await;
        let bundled = bundle(&alice, &room, &root).await["m.replace"]["event_id"].clone();
        assert_eq!(bundled, if is_encrypted { json!(bare) } else { Value::Null }, "{event_type}");
        let new = json!({ "m.new_content": { "body": "new" }, "m.relates_to": relation });
        let edit = send("edit", new).await;
        let odd = json!({ "m.new_content": "new", "m.relates_to": relation });
        let odd = send("odd", odd).await;
        let bundled = bundle(&alice, &room, &root).await["m.replace"]["event_id"].clone();
        assert_eq!(bundled, json!(if is_encrypted { odd } else { edit }), "{event_type}");
    }
}

#[tokio::test(start_paused = true)]
async fn others_cannot_hide_the_edits_of_an_author() {
    let server = TestServer::new();
    let (alice, mallory) = (server.register("alice").await, server.register("mallory").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    mallory.ok_post(&format!("/join/{room}"), json!({})).await;
    let said = alice.ok_put(&format!("/rooms/{room}/send/org.test/root"), json!({ "body": "root" })).await;
    let root = said["event_id"].as_str().unwrap().to_owned();
    let mut edits = Vec::new();
    for number in 0..2 {
        tokio::time::advance(std::time::Duration::from_millis(1)).await;
        let edit = relate(&alice, &room, &number.to_string(), "m.replace", &root, "").await;
        edits.push(event_id(edit));
    }
    for number in 0..1_010 {
        relate(&mallory, &room, &number.to_string(), "m.replace", &root, "").await;
    }
    assert_eq!(bundle(&alice, &room, &root).await["m.replace"]["event_id"], json!(edits[1]));
    alice.ok_put(&format!("/rooms/{room}/redact/{}/r", encoded(&edits[1])), json!({})).await;
    assert_eq!(bundle(&alice, &room, &root).await["m.replace"]["event_id"], json!(edits[0]));
}

#[tokio::test(start_paused = true)]
async fn threads_are_in_the_order_of_what_their_reader_sees() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let carol = server.register("carol").await;
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    for person in [&bob, &carol] {
        person.ok_post(&format!("/join/{room}"), json!({})).await;
    }
    let mut roots = Vec::new();
    for number in 0..4 {
        roots.push(alice.say(&room, &format!("root{number}"), "root").await);
    }
    let reply = async |who: &TestClient, number: usize, txn: &str| {
        let content =
            json!({ "body": txn, "m.relates_to": { "rel_type": "m.thread", "event_id": roots[number] } });
        who.ok_put(&format!("/rooms/{room}/send/m.room.message/{txn}"), content).await;
    };
    for number in [0, 1, 2] {
        reply(&alice, number, &format!("seen{number}")).await;
    }
    // Nobody who ignores carol sees these, and the last thread has nothing else.
    for number in [1, 0, 3] {
        reply(&carol, number, &format!("hidden{number}")).await;
    }
    let ignored = json!({ "ignored_users": { &carol.user_id: {} } });
    bob.ok_put(&format!("/user/{}/account_data/m.ignored_user_list", bob.user_id), ignored).await;
    let expected = [(&alice, vec![3, 0, 1, 2]), (&bob, vec![2, 1, 0])];
    for (reader, expected) in expected {
        for limit in 1..=5 {
            let (mut listed, mut from) = (Vec::new(), String::new());
            for _ in 0..6 {
                let path = format!("/_matrix/client/v1/rooms/{room}/threads?limit={limit}{from}");
                let (status, json) = reader.get(&path).await;
                assert_eq!(status, StatusCode::OK, "{json}");
                let chunk = json["chunk"].as_array().unwrap();
                assert!(chunk.len() <= limit);
                listed.extend(chunk.iter().map(|root| root["event_id"].as_str().unwrap().to_owned()));
                let Some(next) = json["next_batch"].as_str() else { break };
                from = format!("&from={next}");
            }
            let expected: Vec<_> = expected.iter().map(|number: &usize| roots[*number].clone()).collect();
            assert_eq!(listed, expected, "{} in pages of {limit}", reader.user_id);
        }
    }
}

/// "If the thread root event was sent by an ignored user, the event is returned redacted to the caller."
#[tokio::test(start_paused = true)]
async fn a_thread_that_an_ignored_user_began_is_listed_with_its_root_redacted() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    let root = alice.say(&room, "root", "said by alice").await;
    event_id(relate(&alice, &room, "edit", "m.replace", &root, "x").await);
    event_id(relate(&bob, &room, "reply", "m.thread", &root, "x").await);
    let threads = async |query: &str| {
        let (status, json) = bob.get(&format!("/_matrix/client/v1/rooms/{room}/threads{query}")).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        json["chunk"].as_array().unwrap().clone()
    };
    assert_eq!(threads("").await[0]["content"]["body"], "said by alice");
    let ignored = json!({ "ignored_users": { &alice.user_id: {} } });
    bob.ok_put(&format!("/user/{}/account_data/m.ignored_user_list", bob.user_id), ignored).await;
    for query in ["", "?include=participated"] {
        let listed = threads(query).await;
        assert_eq!(listed.len(), 1, "{listed:?}");
        assert_eq!((&listed[0]["event_id"], &listed[0]["content"]), (&json!(root), &json!({})));
        let relations = &listed[0]["unsigned"]["m.relations"];
        assert_eq!((&relations["m.thread"]["count"], relations.get("m.replace")), (&json!(1), None));
    }
    // Elsewhere, nothing of the ignored user is told.
    let path = format!("/_matrix/client/v3/rooms/{room}/event/{}", encoded(&root));
    assert_eq!(bob.get(&path).await.0, StatusCode::NOT_FOUND);
}
