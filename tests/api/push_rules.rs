//! Push rules: the default ones, and those that users change, order and delete.

use http::StatusCode;
use serde_json::{Value, json};

use crate::support::{TestClient, TestServer, encoded};

const RULES: &str = "/_matrix/client/v3/pushrules";

async fn ids(client: &TestClient, kind: &str) -> Vec<String> {
    let (status, rules) = client.get(&format!("{RULES}/global/")).await;
    assert_eq!(status, StatusCode::OK, "{rules}");
    let list = rules[kind].as_array().unwrap().iter();
    list.map(|rule| rule["rule_id"].as_str().unwrap().to_owned()).collect()
}

fn keyword(pattern: &str) -> Value {
    json!({ "pattern": pattern, "actions": ["notify", { "set_tweak": "highlight" }] })
}

#[tokio::test(start_paused = true)]
async fn a_new_user_has_the_default_rules() {
    let alice = TestServer::new().register("alice").await;
    let (status, all) = alice.get(&format!("{RULES}/")).await;
    assert_eq!(status, StatusCode::OK);
    let overrides = all["global"]["override"].as_array().unwrap();
    assert_eq!(overrides[0]["rule_id"], ".m.rule.master");
    assert_eq!(overrides[0]["enabled"], false);
    let (status, rule) = alice.get(&format!("{RULES}/global/underride/.m.rule.message")).await;
    assert_eq!((status, &rule["default"]), (StatusCode::OK, &json!(true)));
    let poll = ".org.matrix.msc3930.rule.poll_";
    let (_, rule) = alice.get(&format!("{RULES}/global/override/{poll}response")).await;
    let is_response =
        json!({ "kind": "event_match", "key": "type", "pattern": "org.matrix.msc3381.poll.response" });
    assert_eq!((&rule["actions"], &rule["conditions"]), (&json!([]), &json!([is_response])));
    let underride = ids(&alice, "underride").await;
    let place = |id: &str| underride.iter().position(|rule| *rule == format!("{poll}{id}")).unwrap();
    for kind in ["start", "end"] {
        assert!(place(&format!("{kind}_one_to_one")) < place(kind), "{underride:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_poll_notifies_and_its_votes_do_not() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (_, room) = alice.post("/_matrix/client/v3/createRoom", json!({ "preset": "public_chat" })).await;
    let room = room["room_id"].as_str().unwrap();
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    for (kind, unread) in [("start", 1), ("response", 1), ("end", 2)] {
        let path = format!("/_matrix/client/v3/rooms/{room}/send/org.matrix.msc3381.poll.{kind}/t{kind}");
        assert_eq!(alice.put(&path, json!({ "body": "x" })).await.0, StatusCode::OK);
        let (_, sync) = bob.get("/_matrix/client/v3/sync").await;
        let counts = &sync["rooms"]["join"][room]["unread_notifications"];
        assert_eq!(counts["notification_count"], unread, "{kind}: {counts}");
    }
}

#[tokio::test(start_paused = true)]
async fn rules_are_put_moved_changed_and_deleted() {
    let alice = TestServer::new().register("alice").await;
    let path = |id: &str| format!("{RULES}/global/content/{id}");
    for id in ["one", "two", "three"] {
        assert_eq!(alice.put(&path(id), keyword(id)).await, (StatusCode::OK, json!({})));
    }
    assert_eq!(ids(&alice, "content").await, ["three", "two", "one"]);
    let (status, _) = alice.put(&format!("{}?after=one", path("three")), keyword("3")).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(ids(&alice, "content").await, ["two", "one", "three"]);
    let (status, _) = alice.put(&format!("{}?before=one", path("three")), keyword("3")).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(ids(&alice, "content").await, ["two", "three", "one"]);

    let (status, _) = alice.put(&format!("{}/enabled", path("two")), json!({ "enabled": false })).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(alice.get(&format!("{}/enabled", path("two"))).await.1, json!({ "enabled": false }));
    let (status, _) = alice.put(&format!("{}/actions", path("two")), json!({ "actions": [] })).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(alice.get(&format!("{}/actions", path("two"))).await.1, json!({ "actions": [] }));
    let (_, rule) = alice.get(&path("two")).await;
    assert_eq!((&rule["pattern"], &rule["default"]), (&json!("two"), &json!(false)));

    assert_eq!(alice.delete(&path("two"), json!({})).await.0, StatusCode::OK);
    assert_eq!(alice.get(&path("two")).await.0, StatusCode::NOT_FOUND);
    assert_eq!(ids(&alice, "content").await, ["three", "one"]);
}

#[tokio::test(start_paused = true)]
async fn a_rule_is_not_placed_where_it_cannot_stand_and_its_conditions_are_bounded() {
    let alice = TestServer::new().register("alice").await;
    let refused = async |path: &str, body: Value, why: &str| {
        let (status, json) = alice.put(&format!("{RULES}/global/{path}"), body).await;
        let said = json["error"].as_str().unwrap_or_default();
        assert_eq!(
            (status, &json["errcode"]),
            (StatusCode::BAD_REQUEST, &json!("M_INVALID_PARAM")),
            "{json}"
        );
        assert!(said.contains(why), "{said}");
    };
    for id in ["low", "high"] {
        assert_eq!(alice.put(&format!("{RULES}/global/content/{id}"), keyword(id)).await.0, StatusCode::OK);
    }
    refused("content/between?after=low&before=high", keyword("x"), "comes earlier").await;
    assert_eq!(ids(&alice, "content").await, ["high", "low"]);
    let condition = |length: usize| {
        let condition =
            json!({ "kind": "event_match", "key": "content.body", "pattern": "x".repeat(length) });
        json!({ "actions": [], "conditions": [condition] })
    };
    let fits = 1_024 - "content.body".len();
    let path = format!("{RULES}/global/override/long");
    assert_eq!(alice.put(&path, condition(fits)).await.0, StatusCode::OK);
    refused("override/longer", condition(fits + 1), "at most 1,024 bytes").await;
}

#[tokio::test(start_paused = true)]
async fn what_is_no_rule_is_refused() {
    let alice = TestServer::new().register("alice").await;
    let body = keyword("x");
    for (path, status, code) in [
        ("global/content/.m.mine", 400, "M_INVALID_PARAM"),
        ("global/content/a?after=nothing", 400, "M_INVALID_PARAM"),
        ("global/content/a?before=.m.rule.contains_user_name", 400, "M_INVALID_PARAM"),
        ("global/sideways/a", 400, "M_INVALID_PARAM"),
        ("global/sender/nobody", 400, "M_INVALID_PARAM"),
        ("global/content/none/enabled", 404, "M_NOT_FOUND"),
        ("global/sideways/none/enabled", 400, "M_INVALID_PARAM"),
        ("global/room/.mine", 400, "M_INVALID_PARAM"),
        ("global/room/a%5Cb", 400, "M_INVALID_PARAM"),
        ("device/content/a", 400, "M_INVALID_PARAM"),
        ("global/override/.m.rule.master/colour", 400, "M_INVALID_PARAM"),
        ("global/content/none/actions", 404, "M_NOT_FOUND"),
    ] {
        let mut body = body.clone();
        body["enabled"] = json!(true);
        let (got, json) = alice.put(&format!("{RULES}/{path}"), body).await;
        assert_eq!((got.as_u16(), json["errcode"].as_str()), (status, Some(code)), "{path}: {json}");
    }
    let (status, json) = alice.put(&format!("{RULES}/global/content/a"), json!({ "pattern": "x" })).await;
    assert_eq!((status.as_u16(), &json["errcode"]), (400, &json!("M_MISSING_PARAM")), "{json}");
    for (path, status) in [
        ("global/sideways/a", 400),
        ("global/sideways/", 400),
        ("global/override/.m.rule.master/colour", 400),
        ("device/", 400),
        ("device/content/", 400),
        ("device/content/a/enabled", 400),
        ("global/content/none", 404),
    ] {
        assert_eq!(alice.get(&format!("{RULES}/{path}")).await.0.as_u16(), status, "{path}");
    }
    for (path, status) in [("global/content/none", 404), ("global/underride/.m.rule.message", 400)] {
        assert_eq!(alice.delete(&format!("{RULES}/{path}"), json!({})).await.0.as_u16(), status, "{path}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_rules_of_one_kind_are_listed() {
    let alice = TestServer::new().register("alice").await;
    alice.ok_put("/pushrules/global/content/word", keyword("word")).await;
    for base in ["/_matrix/client/r0/pushrules", RULES] {
        let (status, all) = alice.get(&format!("{base}/global/")).await;
        assert_eq!(status, StatusCode::OK, "{all}");
        for kind in ["override", "content", "room", "sender", "underride"] {
            let (status, rules) = alice.get(&format!("{base}/global/{kind}/")).await;
            assert_eq!((status, &rules), (StatusCode::OK, &all[kind]), "{kind}");
        }
        assert_eq!(all["content"][0]["rule_id"], "word");
    }
}

/// The specification's own example of a rule about a room has an alias for its id.
#[tokio::test(start_paused = true)]
async fn a_rule_in_the_list_of_rooms_may_have_any_id() {
    let alice = TestServer::new().register("alice").await;
    let path = |id: &str| format!("/pushrules/global/room/{}", encoded(id));
    let odd = ["#b:example.com", "!\u{1}#b:example.com", "plain", "!room:example.com"];
    for id in odd {
        alice.ok_put(&path(id), json!({ "actions": ["notify"] })).await;
        let rule = alice.ok_get(&path(id)).await;
        assert_eq!((&rule["rule_id"], &rule["enabled"]), (&json!(id), &json!(true)));
    }
    alice.ok_put(&format!("{}/enabled", path("plain")), json!({ "enabled": false })).await;
    alice.ok_put(&format!("{}/actions", path("plain")), json!({ "actions": [] })).await;
    let after = format!("{}?after={}", path("plain"), encoded("#b:example.com"));
    alice.ok_put(&after, json!({ "actions": [] })).await;
    let order = ["!room:example.com", "!\u{1}#b:example.com", "#b:example.com", "plain"];
    assert_eq!(ids(&alice, "room").await, order);
    assert_eq!(alice.ok_get(&path("plain")).await["enabled"], false);
    assert_eq!(alice.ok_get(&format!("{}/actions", path("plain"))).await["actions"], json!([]));
    let sync = alice.ok_get("/sync").await;
    assert!(sync["account_data"].to_string().contains(r##""rule_id":"#b:example.com""##), "{sync}");
    for id in odd {
        alice.ok_delete(&path(id), json!({})).await;
    }
    assert!(ids(&alice, "room").await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn changed_rules_come_down_sync_and_belong_to_their_user() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (_, first) = alice.get("/_matrix/client/v3/sync").await;
    let initial = first["account_data"]["events"].as_array().unwrap();
    assert!(initial.iter().any(|event| event["type"] == "m.push_rules"), "{first}");
    alice.ok_put(&format!("{RULES}/global/content/word"), keyword("word")).await;
    let since = first["next_batch"].as_str().unwrap();
    let (_, next) = alice.get(&format!("/_matrix/client/v3/sync?since={since}")).await;
    let event = &next["account_data"]["events"][0];
    assert_eq!(event["type"], "m.push_rules");
    assert_eq!(event["content"]["global"]["content"][0]["rule_id"], "word");
    let since = next["next_batch"].as_str().unwrap();
    let (_, empty) = alice.get(&format!("/_matrix/client/v3/sync?since={since}")).await;
    assert!(empty.get("account_data").is_none(), "{empty}");
    assert!(ids(&bob, "content").await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_rule_without_conditions_always_matches() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (_, room) = alice.post("/_matrix/client/v3/createRoom", json!({ "preset": "public_chat" })).await;
    let room = room["room_id"].as_str().unwrap();
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    for (kind, txn) in [("underride", "1"), ("override", "2")] {
        let path = format!("{RULES}/global/{kind}/mine");
        let (status, json) = bob.put(&path, json!({ "actions": ["notify"] })).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        let (_, rule) = bob.get(&path).await;
        assert_eq!(rule["conditions"], json!([]), "{rule}");
        let path = format!("/_matrix/client/v3/rooms/{room}/send/org.test/{txn}");
        assert_eq!(alice.put(&path, json!({})).await.0, StatusCode::OK);
    }
    let (_, sync) = bob.get("/_matrix/client/v3/sync").await;
    assert_eq!(sync["rooms"]["join"][room]["unread_notifications"]["notification_count"], 2, "{sync}");
    let (status, json) = bob.put(&format!("{RULES}/global/content/mine"), json!({ "actions": [] })).await;
    assert_eq!((status, &json["errcode"]), (StatusCode::BAD_REQUEST, &json!("M_MISSING_PARAM")));
}

#[tokio::test(start_paused = true)]
async fn a_backslash_that_escapes_nothing_stands_for_itself() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (_, room) = alice.post("/_matrix/client/v3/createRoom", json!({ "preset": "public_chat" })).await;
    let room = room["room_id"].as_str().unwrap();
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    for (number, key) in [r"content.\x", r"content.\\y", r"content.a\.b"].into_iter().enumerate() {
        let condition = json!({ "kind": "event_property_is", "key": key, "value": number });
        let rule = json!({ "actions": ["notify"], "conditions": [condition] });
        let (status, json) = bob.put(&format!("{RULES}/global/override/mine{number}"), rule).await;
        assert_eq!(status, StatusCode::OK, "{json}");
    }
    for (txn, content, count) in [
        ("a", json!({ "x": 0, "y": 1 }), 0),
        ("b", json!({ r"\x": 0 }), 1),
        ("c", json!({ r"\y": 1 }), 2),
        ("d", json!({ "a.b": 2 }), 3),
    ] {
        let path = format!("/_matrix/client/v3/rooms/{room}/send/org.test/{txn}");
        assert_eq!(alice.put(&path, content).await.0, StatusCode::OK);
        let (_, sync) = bob.get("/_matrix/client/v3/sync").await;
        assert_eq!(sync["rooms"]["join"][room]["unread_notifications"]["notification_count"], count, "{txn}");
    }
}
