//! Filters of pages by how events relate to others.

use aqueduct::store::Engine;
use http::StatusCode;
use serde_json::json;

use crate::{
    rooms::Rooms,
    support::{TestServer, encoded},
    sync::{Chain, events},
};

#[tokio::test(start_paused = true)]
async fn pages_are_filtered_by_relations() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    let root = alice.say(&room, "1", "root").await;
    let plain = alice.say(&room, "2", "plain").await;
    let relate = async |who: &crate::support::TestClient, kind: &str, to: &str| {
        let content = json!({ "body": kind, "m.relates_to": { "rel_type": kind, "event_id": to } });
        let json = who.ok_put(&format!("/rooms/{room}/send/m.room.message/{kind}"), content).await;
        json["event_id"].as_str().unwrap().to_owned()
    };
    let thread = relate(&alice, "m.thread", &root).await;
    let reference = relate(&bob, "m.reference", &plain).await;
    let found = async |filter: serde_json::Value| {
        let mut filter = filter;
        filter["types"] = json!(["m.room.message"]);
        let page = alice
            .ok_get(&format!("/rooms/{room}/messages?dir=f&filter={}", encoded(&filter.to_string())))
            .await;
        let ids = page["chunk"].as_array().unwrap().iter().map(|event| event["event_id"].as_str().unwrap());
        ids.map(str::to_owned).collect::<Vec<_>>()
    };
    for prefix in ["", "org.matrix.msc3874."] {
        let own = |name: &str, types: serde_json::Value| json!({ (format!("{prefix}{name}")): types });
        assert_eq!(found(own("rel_types", json!(["m.thread"]))).await, [&*thread]);
        assert_eq!(
            found(own("rel_types", json!(["m.thread", "m.reference"]))).await,
            [&*thread, &*reference]
        );
        assert_eq!(found(own("not_rel_types", json!(["m.thread"]))).await, [&*root, &*plain, &*reference]);
        assert_eq!(found(own("rel_types", json!([]))).await, Vec::<String>::new());
    }
    assert_eq!(found(json!({ "related_by_rel_types": ["m.thread"] })).await, [&*root]);
    assert_eq!(found(json!({ "related_by_senders": [bob.user_id] })).await, [&*plain]);
    let both = json!({ "related_by_senders": [bob.user_id], "related_by_rel_types": ["m.thread"] });
    assert_eq!(found(both).await, Vec::<String>::new());
    // The filter works around an event, too.
    let filter = encoded(&json!({ "related_by_senders": [bob.user_id] }).to_string());
    let page = alice.ok_get(&format!("/rooms/{room}/context/{thread}?filter={filter}")).await;
    assert_eq!(page["events_before"].as_array().unwrap().len(), 1);
    for bad in [r#"{"rel_types":7}"#, r#"{"related_by_senders":"x"}"#, "[", "7"] {
        let path = format!("/_matrix/client/v3/rooms/{room}/messages?dir=f&filter={}", encoded(bad));
        let (status, json) = alice.get(&path).await;
        assert_eq!(
            (status, &json["errcode"]),
            (StatusCode::BAD_REQUEST, &json!("M_INVALID_PARAM")),
            "{json}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn syncs_are_filtered_by_relations() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    let root = alice.say(&room, "1", "root").await;
    alice.say(&room, "2", "plain").await;
    let content = json!({ "body": "t", "m.relates_to": { "rel_type": "m.thread", "event_id": root } });
    let sent = bob.ok_put(&format!("/rooms/{room}/send/m.room.message/3"), content).await;
    let reply = sent["event_id"].as_str().unwrap();
    let told = async |timeline: serde_json::Value| {
        let mut timeline = timeline;
        timeline["types"] = json!(["m.room.message"]);
        let filter = json!({ "room": { "timeline": timeline } });
        // A filter that is named does what one that is brought does.
        let path = format!("/user/{}/filter", alice.user_id);
        let stored = alice.ok_post(&path, filter.clone()).await["filter_id"].as_str().unwrap().to_owned();
        let of = |sync: &serde_json::Value| {
            let events = events(sync, "join", &room, "timeline").into_iter();
            events.map(|event| event["event_id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        let brought = of(&Chain::filtered(&alice, filter).next().await);
        let named = of(&alice.ok_get(&format!("/sync?filter={stored}")).await);
        assert_eq!(brought, named);
        brought
    };
    assert_eq!(told(json!({ "related_by_rel_types": ["m.thread"] })).await, [&*root]);
    assert_eq!(told(json!({ "related_by_senders": [bob.user_id] })).await, [&*root]);
    assert_eq!(told(json!({ "related_by_senders": [alice.user_id] })).await, Vec::<String>::new());
    assert_eq!(told(json!({ "org.matrix.msc3874.rel_types": ["m.thread"] })).await, [reply]);
    assert_eq!(told(json!({ "not_rel_types": ["m.thread"] })).await.len(), 2);
    for bad in [json!({ "related_by_senders": 7 }), json!({ "rel_types": [1] })] {
        let filter = json!({ "room": { "timeline": bad } });
        let path = format!("/_matrix/client/v3/user/{}/filter", alice.user_id);
        assert_eq!(alice.post(&path, filter.clone()).await.0, StatusCode::BAD_REQUEST);
        let path = format!("/_matrix/client/v3/sync?filter={}", encoded(&filter.to_string()));
        let (status, json) = alice.get(&path).await;
        let found = (status, json["errcode"].as_str().unwrap());
        assert_eq!(found, (StatusCode::BAD_REQUEST, "M_INVALID_PARAM"), "{filter}");
    }
    let many: Vec<String> = (0..101).map(|number| number.to_string()).collect();
    let filter = json!({ "room": { "timeline": { "rel_types": many } } }).to_string();
    let path = format!("/_matrix/client/v3/sync?filter={}", encoded(&filter));
    assert_eq!(alice.get(&path).await.0, StatusCode::BAD_REQUEST);
}

#[tokio::test(start_paused = true)]
async fn a_filter_of_a_hundred_relations_reads_as_much_as_one_of_a_single_one() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    for number in 0..30 {
        let root = alice.say(&room, &format!("root{number}"), "root").await;
        let content = json!({ "body": "more", "m.relates_to": { "rel_type": "org.test", "event_id": root } });
        alice.ok_put(&format!("/rooms/{room}/send/m.room.message/of{number}"), content).await;
    }
    // Reads are counted while nothing else reads: the device was just seen.
    let Engine::Memory(memory) = server.server().app().store.engine() else { panic!("not in memory") };
    let cost = async |field: &str, count: usize, is_one: bool| {
        let name = |number: usize| format!("@t{}:test.example", if is_one { 0 } else { number });
        let names: Vec<_> = (0..count).map(name).collect();
        let filter = encoded(&json!({ (field): names }).to_string());
        let before = memory.reads();
        let page = alice.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=100&filter={filter}")).await;
        assert_eq!(page["chunk"], json!([]));
        memory.reads() - before
    };
    for field in ["related_by_rel_types", "related_by_senders"] {
        let one = cost(field, 1, false).await;
        assert!(one > 60, "each event is asked for its relations: {one}");
        assert_eq!(cost(field, 100, false).await, one, "{field}");
        assert_eq!(cost(field, 150, true).await, one, "{field}, one entry many times");
    }
}

#[tokio::test(start_paused = true)]
async fn a_room_of_which_everything_new_is_filtered_out_is_not_told() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    for lazy in [false, true] {
        let filter = json!({ "room": {
            "timeline": { "types": [] }, "ephemeral": { "types": [] }, "account_data": { "types": ["u.wanted"] },
            "state": { "types": ["a.wanted"], "lazy_load_members": lazy },
        }, "presence": { "types": [] } });
        let mut chain = Chain::filtered(&alice, filter);
        chain.next().await;
        let state = |kind: &str| format!("/rooms/{room}/state/{kind}/");
        let data = |kind: &str| format!("/user/{}/rooms/{room}/account_data/{kind}", alice.user_id);
        for (who, number) in [(&alice, "1"), (&bob, "2")] {
            let path = format!("/rooms/{room}/state/m.room.member/{}", who.user_id);
            let name = format!("{number} {lazy}");
            who.ok_put(&path, json!({ "membership": "join", "displayname": name })).await;
            let profile = format!("/profile/{}/displayname", who.user_id);
            who.ok_put(&profile, json!({ "displayname": format!("other {name}") })).await;
        }
        alice.say(&room, &format!("{lazy}"), "of one's own").await;
        alice.ok_put(&state("m.room.name"), json!({ "name": format!("name {lazy}") })).await;
        alice.ok_put(&data("u.other"), json!({ "lazy": lazy })).await;
        let answer = chain.next().await;
        assert!(answer.get("rooms").is_none(), "{answer}");
        alice.ok_put(&state("a.wanted"), json!({ "lazy": lazy })).await;
        assert_eq!(events(&chain.next().await, "join", &room, "state").len(), 1);
        alice.ok_put(&data("u.wanted"), json!({ "lazy": lazy })).await;
        assert_eq!(events(&chain.next().await, "join", &room, "account_data").len(), 1);
        // The summary changes with who is in the room, and with its name where it has none.
        bob.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
        let summary = |answer: &serde_json::Value| answer["rooms"]["join"][&room]["summary"].clone();
        assert_eq!(summary(&chain.next().await)["m.joined_member_count"], 1);
        bob.ok_post(&format!("/join/{room}"), json!({})).await;
        assert_eq!(summary(&chain.next().await)["m.joined_member_count"], 2);
        alice.ok_put(&state("m.room.name"), json!({})).await;
        assert_eq!(summary(&chain.next().await)["m.heroes"], json!([bob.user_id]));
        // Counts are told though the events that count are not, and so is that one's own message has read the others.
        for (who, count) in [(&bob, 1), (&alice, 0)] {
            who.say(&room, &format!("{count}-{lazy}"), "text").await;
            let answer = chain.next().await;
            let counts = &answer["rooms"]["join"][&room]["unread_notifications"];
            assert_eq!(counts["notification_count"], count, "{answer}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_state_after_the_timeline_is_told_under_the_name_by_which_it_is_asked_for() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    for (query, name) in [
        ("", "state"),
        ("&use_state_after=true", "state_after"),
        ("&org.matrix.msc4222.use_state_after=true", "org.matrix.msc4222.state_after"),
        ("&org.matrix.msc4222.use_state_after=true&use_state_after=true", "state_after"),
        ("&org.matrix.msc4222.use_state_after=false", "state"),
    ] {
        let sync = alice.ok_get(&format!("/sync?timeout=0{query}")).await;
        let told = sync["rooms"]["join"][&room].as_object().unwrap();
        for other in ["state", "state_after", "org.matrix.msc4222.state_after"] {
            assert_eq!(told.contains_key(other), other == name, "{query}: {other}");
        }
    }
}
