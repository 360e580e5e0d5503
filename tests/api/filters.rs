//! Filters of pages by how events relate to others.

use aqueduct::store::Engine;
use http::StatusCode;
use serde_json::json;

use crate::{
    rooms::Rooms,
    support::{TestServer, encoded},
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
