//! Rooms as clients use them: create, come and go, talk, look.

use http::StatusCode;
use serde_json::{Value, json};

use crate::support::{TestClient, TestServer, encoded};

/// Requests about rooms that many tests make.
pub(crate) trait Rooms {
    async fn create(&self, body: Value) -> String;
    async fn say(&self, room: &str, txn: &str, text: &str) -> String;
    async fn state(&self, room: &str, kind: &str, key: &str) -> (StatusCode, Value);
}

fn path(rest: &str) -> String {
    format!("/_matrix/client/v3{rest}")
}

impl Rooms for TestClient {
    async fn create(&self, body: Value) -> String {
        let json = self.ok_post("/createRoom", body).await;
        json["room_id"].as_str().unwrap().to_owned()
    }

    async fn say(&self, room: &str, txn: &str, text: &str) -> String {
        let body = json!({ "msgtype": "m.text", "body": text });
        let json = self.ok_put(&format!("/rooms/{room}/send/m.room.message/{txn}"), body).await;
        json["event_id"].as_str().unwrap().to_owned()
    }

    async fn state(&self, room: &str, kind: &str, key: &str) -> (StatusCode, Value) {
        self.get(&path(&format!("/rooms/{room}/state/{kind}/{key}"))).await
    }
}

fn refused(answer: (StatusCode, Value), status: StatusCode, errcode: &str) {
    assert_eq!(answer.0, status, "{}", answer.1);
    assert_eq!(answer.1["errcode"], errcode, "{}", answer.1);
    assert!(!answer.1["error"].as_str().unwrap().is_empty());
}

fn bodies(page: &Value) -> Vec<&str> {
    page["chunk"].as_array().unwrap().iter().filter_map(|event| event["content"]["body"].as_str()).collect()
}

#[tokio::test(start_paused = true)]
async fn two_people_talk_in_a_room_of_every_version() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    for version in 1..=12 {
        let room = alice
            .create(json!({ "room_version": version.to_string(), "preset": "public_chat", "name": "Pub" }))
            .await;
        bob.ok_post(&format!("/join/{room}"), json!({})).await;
        let first = alice.say(&room, "1", "hello").await;
        let second = bob.say(&room, "1", "hi").await;
        assert_ne!(first, second);
        assert_eq!(alice.say(&room, "1", "again").await, first, "a transaction id is used once");
        let page = bob.ok_get(&format!("/rooms/{room}/messages?dir=b")).await;
        assert_eq!(bodies(&page), ["hi", "hello"]);
        let (_, event) = bob.get(&path(&format!("/rooms/{room}/event/{}", encoded(&first)))).await;
        assert_eq!(event["sender"], "@alice:test.example");
        assert_eq!(event["room_id"], room);
        assert_eq!(event["unsigned"].get("transaction_id"), None, "another's transaction id");
        assert_eq!(event["unsigned"]["membership"], "join");
        let event = alice.ok_get(&format!("/rooms/{room}/event/{}", encoded(&first))).await;
        assert_eq!(event["unsigned"]["transaction_id"], "1");
        let (status, create) = alice.state(&room, "m.room.create", "").await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(create["room_version"], version.to_string());
        assert_eq!(create.get("creator").is_some(), version < 11);
        assert_eq!(room.contains(':'), version < 12);
    }
    let joined = bob.ok_get("/joined_rooms").await;
    assert_eq!(joined["joined_rooms"].as_array().unwrap().len(), 12);
}

#[tokio::test(start_paused = true)]
async fn invited_people_come_and_go() {
    let server = TestServer::new();
    let (alice, bob, carol) =
        (server.register("alice").await, server.register("bob").await, server.register("carol").await);
    let room = alice.create(json!({ "preset": "private_chat", "invite": [bob.user_id] })).await;
    let rooms = |rest: &str| path(&format!("/rooms/{room}{rest}"));
    let who = |user: &TestClient| json!({ "user_id": user.user_id });

    refused(carol.post(&rooms("/join"), json!({})).await, StatusCode::FORBIDDEN, "M_FORBIDDEN");
    refused(carol.get(&rooms("/state")).await, StatusCode::FORBIDDEN, "M_FORBIDDEN");
    refused(carol.get(&rooms("/messages?dir=b")).await, StatusCode::FORBIDDEN, "M_FORBIDDEN");
    bob.ok_post(&format!("/rooms/{room}/join"), json!({})).await;
    bob.ok_post(&format!("/rooms/{room}/join"), json!({})).await;
    let aside = server.register("aside").await;
    alice.ok_post(&format!("/rooms/{room}/invite"), who(&aside)).await;
    let extra = json!({ "foo": "bar", "membership": "ban", "join_authorised_via_users_server": "@a:b", "reason": "hi" });
    aside.ok_post(&format!("/join/{room}"), extra).await;
    let (_, member) = alice.state(&room, "m.room.member", &aside.user_id).await;
    assert_eq!(member, json!({ "displayname": "aside", "foo": "bar", "membership": "join", "reason": "hi" }));
    aside.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
    let members = alice.ok_get(&format!("/rooms/{room}/joined_members")).await;
    assert_eq!(members["joined"].as_object().unwrap().len(), 2);

    // Bob has no power to kick; Alice has.
    refused(bob.post(&rooms("/kick"), who(&alice)).await, StatusCode::FORBIDDEN, "M_FORBIDDEN");
    alice.ok_post(&format!("/rooms/{room}/kick"), json!({ "user_id": bob.user_id, "reason": "tired" })).await;
    let (_, member) = alice.state(&room, "m.room.member", &bob.user_id).await;
    assert_eq!((&member["membership"], &member["reason"]), (&json!("leave"), &json!("tired")));
    refused(alice.post(&rooms("/kick"), who(&bob)).await, StatusCode::FORBIDDEN, "M_FORBIDDEN");
    refused(
        bob.put(&rooms("/send/m.room.message/9"), json!({ "body": "x" })).await,
        StatusCode::FORBIDDEN,
        "M_FORBIDDEN",
    );

    alice.ok_post(&format!("/rooms/{room}/ban"), who(&bob)).await;
    refused(alice.post(&rooms("/invite"), who(&bob)).await, StatusCode::FORBIDDEN, "M_FORBIDDEN");
    refused(bob.post(&rooms("/join"), json!({})).await, StatusCode::FORBIDDEN, "M_FORBIDDEN");
    alice.ok_post(&format!("/rooms/{room}/unban"), who(&bob)).await;
    refused(alice.post(&rooms("/unban"), who(&bob)).await, StatusCode::FORBIDDEN, "M_BAD_STATE");
    alice.ok_post(&format!("/rooms/{room}/invite"), who(&bob)).await;
    refused(alice.post(&rooms("/invite"), who(&alice)).await, StatusCode::FORBIDDEN, "M_FORBIDDEN");
    // Bob refuses the invitation, and forgets the room.
    refused(alice.post(&rooms("/forget"), json!({})).await, StatusCode::BAD_REQUEST, "M_UNKNOWN");
    bob.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
    bob.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
    bob.ok_get(&format!("/rooms/{room}/messages?dir=b")).await;
    bob.ok_post(&format!("/rooms/{room}/forget"), json!({})).await;
    refused(bob.get(&rooms("/messages")).await, StatusCode::FORBIDDEN, "M_FORBIDDEN");
    refused(bob.get(&rooms("/messages?dir=b")).await, StatusCode::FORBIDDEN, "M_FORBIDDEN");
    refused(carol.post(&rooms("/leave"), json!({})).await, StatusCode::FORBIDDEN, "M_FORBIDDEN");
    refused(carol.post(&rooms("/forget"), json!({})).await, StatusCode::FORBIDDEN, "M_FORBIDDEN");
    refused(
        alice.post(&path("/rooms/!no:test.example/join"), json!({})).await,
        StatusCode::NOT_FOUND,
        "M_NOT_FOUND",
    );
}

#[tokio::test(start_paused = true)]
async fn who_has_left_sees_the_room_as_it_was_then() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat", "name": "Before" })).await;
    alice.say(&room, "1", "early").await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    alice.say(&room, "2", "together").await;
    bob.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
    alice.say(&room, "3", "alone").await;
    alice.ok_put(&format!("/rooms/{room}/state/m.room.name"), json!({ "name": "After" })).await;

    let (_, name) = bob.state(&room, "m.room.name", "").await;
    assert_eq!(name["name"], "Before");
    let page = bob.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=50")).await;
    assert_eq!(bodies(&page), ["together", "early"]);
    assert_eq!(page["chunk"][0]["content"]["membership"], "leave");
    let state = bob.ok_get(&format!("/rooms/{room}/state")).await;
    let names: Vec<_> =
        state.as_array().unwrap().iter().filter(|event| event["type"] == "m.room.name").collect();
    assert_eq!(names[0]["content"]["name"], "Before");
    // Those who only joined later see what is shared with them, or not.
    alice
        .ok_put(
            &format!("/rooms/{room}/state/m.room.history_visibility"),
            json!({ "history_visibility": "joined" }),
        )
        .await;
    alice.say(&room, "4", "hidden").await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    alice.say(&room, "5", "welcome back").await;
    let page = bob.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=50")).await;
    assert_eq!(bodies(&page), ["welcome back", "alone", "together", "early"]);
    let last = alice.say(&room, "6", "last").await;
    let context = bob.ok_get(&format!("/rooms/{room}/context/{}?limit=4", encoded(&last))).await;
    let before: Vec<_> =
        context["events_before"].as_array().unwrap().iter().map(|event| &event["content"]["body"]).collect();
    assert_eq!(before[0], "welcome back");
    assert_eq!(context["event"]["event_id"], last);
}

#[tokio::test(start_paused = true)]
async fn pages_of_messages_join_without_gap_or_repetition() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    for number in 0..25 {
        alice.say(&room, &number.to_string(), &number.to_string()).await;
    }
    let mut seen = Vec::new();
    let mut from = String::new();
    loop {
        let page = alice.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=7{from}")).await;
        seen.extend(page["chunk"].as_array().unwrap().clone());
        match page["end"].as_str() {
            Some(end) => from = format!("&from={end}"),
            None => break,
        }
    }
    let mut forward = Vec::new();
    let mut from = String::new();
    loop {
        let page = alice.ok_get(&format!("/rooms/{room}/messages?dir=f&limit=4{from}")).await;
        forward.extend(page["chunk"].as_array().unwrap().clone());
        match page["end"].as_str() {
            Some(end) => from = format!("&from={end}"),
            None => break,
        }
    }
    seen.reverse();
    let ids = |events: &[Value]| events.iter().map(|event| event["event_id"].clone()).collect::<Vec<_>>();
    assert_eq!(ids(&seen), ids(&forward));
    assert_eq!(seen[0]["type"], "m.room.create");
    assert_eq!(seen.iter().filter(|event| event["type"] == "m.room.message").count(), 25);

    let filter = encoded(
        &json!({ "types": ["m.room.mess*"], "senders": [alice.user_id], "lazy_load_members": true })
            .to_string(),
    );
    let filter = filter.replace('{', "%7B").replace('}', "%7D").replace('"', "%22");
    let page = alice.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=3&filter={filter}")).await;
    assert_eq!(bodies(&page), ["24", "23", "22"]);
    assert_eq!(page["state"][0]["state_key"], alice.user_id);
    let lazy = "%7B%22lazy_load_members%22:true%7D";
    let page = alice.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=100&filter={lazy}")).await;
    assert_eq!(page["state"].as_array().unwrap().len(), 1, "also where the page holds the whole room");
    for query in ["dir=x", "dir=b&from=nonsense", "dir=b&limit=-1", "dir=b&filter=7"] {
        let (status, json) = alice.get(&path(&format!("/rooms/{room}/messages?{query}"))).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{query}: {json}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_redacted_event_keeps_its_place_and_loses_its_content() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    for version in ["1", "2", "3", "10", "11", "12"] {
        let room = alice.create(json!({ "room_version": version, "preset": "public_chat" })).await;
        bob.ok_post(&format!("/join/{room}"), json!({})).await;
        let (hers, his) = (alice.say(&room, "a", "hers").await, bob.say(&room, "b", "his").await);
        let redact = |id: &str, txn: &str| path(&format!("/rooms/{room}/redact/{}/{txn}", encoded(id)));
        refused(bob.put(&redact(&hers, "1"), json!({})).await, StatusCode::FORBIDDEN, "M_FORBIDDEN");
        let (status, json) = alice.put(&redact(&his, "1"), json!({ "reason": "rude" })).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        let (_, again) = alice.put(&redact(&his, "1"), json!({ "reason": "rude" })).await;
        assert_eq!(again, json);
        assert_eq!(bob.put(&redact(&his, "2"), json!({})).await.0, StatusCode::OK);
        refused(bob.put(&redact("$nothing", "3"), json!({})).await, StatusCode::NOT_FOUND, "M_NOT_FOUND");
        let event = bob.ok_get(&format!("/rooms/{room}/event/{}", encoded(&his))).await;
        assert_eq!(event["content"], json!({}));
        let because = &event["unsigned"]["redacted_because"];
        assert_eq!(because["event_id"], json["event_id"]);
        assert_eq!((&because["content"]["reason"], &because["redacts"]), (&json!("rude"), &json!(his)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_room_is_made_as_the_request_says() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice
        .create(json!({
            "room_version": "11",
            "preset": "trusted_private_chat",
            "visibility": "public",
            "name": "Name", "topic": "Topic",
            "room_alias_name": "alias",
            "invite": [bob.user_id],
            "is_direct": true,
            "creation_content": { "m.federate": false, "type": "m.space", "creator": "@x:y", "room_version": "1" },
            "power_level_content_override": { "events_default": 7 },
            "initial_state": [
                { "type": "m.room.name", "content": { "name": "Other" } },
                { "type": "m.room.join_rules", "content": { "join_rule": "public" } },
                { "type": "org.test", "state_key": "k", "content": { "a": 1 } },
            ],
        }))
        .await;
    let state = async |kind: &str, key: &str| alice.state(&room, kind, key).await.1;
    assert_eq!(state("m.room.name", "").await["name"], "Name");
    assert_eq!(state("m.room.topic", "").await["topic"], "Topic");
    assert_eq!(state("m.room.join_rules", "").await["join_rule"], "public");
    assert_eq!(state("m.room.guest_access", "").await["guest_access"], "can_join");
    assert_eq!(state("m.room.canonical_alias", "").await["alias"], "#alias:test.example");
    assert_eq!(state("org.test", "k").await["a"], 1);
    let create = state("m.room.create", "").await;
    assert_eq!(create, json!({ "m.federate": false, "type": "m.space", "room_version": "11" }));
    let levels = state("m.room.power_levels", "").await;
    assert_eq!((&levels["events_default"], &levels["users"][&bob.user_id]), (&json!(7), &json!(100)));
    let invite = state("m.room.member", &bob.user_id).await;
    assert_eq!((&invite["membership"], &invite["is_direct"]), (&json!("invite"), &json!(true)));
    assert_eq!(alice.ok_get("/directory/room/%23alias:test.example").await["room_id"], room);
    let listed = alice.ok_get("/publicRooms").await;
    assert_eq!(listed["chunk"][0]["room_id"], room);
    assert_eq!(listed["chunk"][0]["num_joined_members"], 1);
    let page = alice.ok_get(&format!("/rooms/{room}/messages?dir=f&limit=50")).await;
    let order: Vec<_> =
        page["chunk"].as_array().unwrap().iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(
        order,
        [
            "m.room.create",
            "m.room.member",
            "m.room.power_levels",
            "m.room.canonical_alias",
            "m.room.history_visibility",
            "m.room.guest_access",
            "m.room.join_rules",
            "org.test",
            "m.room.name",
            "m.room.topic",
            "m.room.member",
        ]
    );
    // In version 12 a user who is trusted is a creator too.
    let room = alice
        .create(json!({ "preset": "trusted_private_chat", "invite": [bob.user_id], "room_version": "12" }))
        .await;
    let (_, create) = alice.state(&room, "m.room.create", "").await;
    assert_eq!(create["additional_creators"], json!([bob.user_id]));
    let (_, levels) = alice.state(&room, "m.room.power_levels", "").await;
    assert_eq!((&levels["users"], &levels["events"]["m.room.tombstone"]), (&json!({}), &json!(150)));
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_a_room_is_refused_and_leaves_nothing() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let many: Vec<_> = (0..40)
        .map(|key| json!({ "type": "org.test", "state_key": key.to_string(), "content": { "x": "y".repeat(40_000) } }))
        .collect();
    for (body, status, errcode) in [
        (json!({ "room_version": "99" }), 400, "M_UNSUPPORTED_ROOM_VERSION"),
        (json!({ "room_version": 7 }), 400, "M_BAD_JSON"),
        (json!({ "preset": "odd" }), 400, "M_INVALID_PARAM"),
        (json!({ "initial_state": [{ "content": {} }] }), 400, "M_BAD_JSON"),
        (json!({ "initial_state": [{ "type": "x", "content": { "a": 1.5 } }] }), 400, "M_BAD_JSON"),
        (
            json!({ "initial_state": [{ "type": "m.room.create", "content": {} }] }),
            400,
            "M_INVALID_ROOM_STATE",
        ),
        (
            json!({ "power_level_content_override": { "users": { "@x:y": "high" } } }),
            400,
            "M_INVALID_ROOM_STATE",
        ),
        (
            json!({ "power_level_content_override": { "state_default": 1000 }, "room_version": "11" }),
            400,
            "M_INVALID_ROOM_STATE",
        ),
        (json!({ "invite": ["nobody"] }), 400, "M_BAD_JSON"),
        (json!({ "room_alias_name": "a:b" }), 400, "M_INVALID_PARAM"),
        (
            json!({ "initial_state": [{ "type": "x", "content": { "a": "b".repeat(70_000) } }] }),
            413,
            "M_TOO_LARGE",
        ),
        (json!({ "initial_state": many, "room_alias_name": "big" }), 413, "M_TOO_LARGE"),
    ] {
        refused(alice.post(&path("/createRoom"), body).await, StatusCode::from_u16(status).unwrap(), errcode);
    }
    assert_eq!(alice.ok_get("/joined_rooms").await["joined_rooms"], json!([]));
    refused(
        alice.get(&path("/directory/room/%23big:test.example")).await,
        StatusCode::NOT_FOUND,
        "M_NOT_FOUND",
    );
    alice.create(json!({ "room_alias_name": "taken" })).await;
    refused(
        alice.post(&path("/createRoom"), json!({ "room_alias_name": "taken" })).await,
        StatusCode::BAD_REQUEST,
        "M_ROOM_IN_USE",
    );
}

#[tokio::test(start_paused = true)]
async fn two_rooms_made_in_one_millisecond_are_two() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let rooms: std::collections::BTreeSet<_> =
        [alice.create(json!({})).await, alice.create(json!({})).await, alice.create(json!({})).await].into();
    assert_eq!(rooms.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_an_event_is_refused() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    let send = path(&format!("/rooms/{room}/send/m.room.message/t"));
    let token = alice.token.as_deref();
    for (body, status, errcode) in [
        (r#"{"a":1.5}"#.to_owned(), 400, "M_BAD_JSON"),
        (r#"{"a":9007199254740992}"#.to_owned(), 400, "M_BAD_JSON"),
        (r#"{"a":"\ud800"}"#.to_owned(), 400, ""),
        ("[]".to_owned(), 400, "M_BAD_JSON"),
        ("{".to_owned(), 400, "M_NOT_JSON"),
        (format!(r#"{{"a":"{}"}}"#, "x".repeat(65_000)), 413, "M_TOO_LARGE"),
        (format!(r#"{{"a":{}{}}}"#, "[".repeat(120), "]".repeat(120)), 400, ""),
    ] {
        let (found, json) = server.raw(http::Method::PUT, &send, token, body.clone()).await;
        assert_eq!(found.as_u16(), status, "{body:.60}: {json}");
        assert!(errcode.is_empty() || json["errcode"] == errcode, "{body:.60}: {json}");
    }
    let deep = format!(r#"{{"a":{}{}}}"#, "[".repeat(95), "]".repeat(95));
    assert_eq!(server.raw(http::Method::PUT, &send, token, deep).await.0, StatusCode::OK);
    for (kind, key, content) in [
        ("m.room.member", "nobody", json!({ "membership": "join" })),
        ("m.room.member", alice.user_id.as_str(), json!({ "membership": "happy" })),
        ("m.room.member", alice.user_id.as_str(), json!({})),
    ] {
        let (status, json) = alice.put(&path(&format!("/rooms/{room}/state/{kind}/{key}")), content).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{json}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_alias_names_one_room_until_it_is_removed() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (room, other) = (alice.create(json!({})).await, bob.create(json!({})).await);
    let alias = path("/directory/room/%23name:test.example");
    let to = |room: &str| json!({ "room_id": room });
    refused(bob.put(&alias, to(&room)).await, StatusCode::FORBIDDEN, "M_FORBIDDEN");
    assert_eq!(alice.put(&alias, to(&room)).await.0, StatusCode::OK);
    assert_eq!(alice.put(&alias, to(&room)).await.0, StatusCode::CONFLICT);
    assert_eq!(bob.put(&alias, to(&other)).await.0, StatusCode::CONFLICT);
    let listed = alice.ok_get(&format!("/rooms/{room}/aliases")).await;
    assert_eq!(listed["aliases"], json!(["#name:test.example"]));
    refused(bob.get(&path(&format!("/rooms/{room}/aliases"))).await, StatusCode::FORBIDDEN, "M_FORBIDDEN");
    let canonical = path(&format!("/rooms/{room}/state/m.room.canonical_alias"));
    let set = async |content: Value| alice.put(&canonical, content).await;
    refused(set(json!({ "alias": "#none:test.example" })).await, StatusCode::BAD_REQUEST, "M_BAD_ALIAS");
    refused(set(json!({ "alias": "none" })).await, StatusCode::BAD_REQUEST, "M_INVALID_PARAM");
    assert_eq!(set(json!({ "alias": "#name:test.example" })).await.0, StatusCode::OK);
    refused(bob.delete(&alias, json!({})).await, StatusCode::FORBIDDEN, "M_FORBIDDEN");
    assert_eq!(alice.delete(&alias, json!({})).await.0, StatusCode::OK);
    assert_eq!(alice.state(&room, "m.room.canonical_alias", "").await.1, json!({}));
    refused(alice.delete(&alias, json!({})).await, StatusCode::NOT_FOUND, "M_NOT_FOUND");
    assert_eq!(bob.put(&alias, to(&other)).await.0, StatusCode::OK);
    bob.ok_post("/join/%23name:test.example", json!({})).await;
}

#[tokio::test(start_paused = true)]
async fn of_a_thousand_who_want_one_thing_one_gets_it() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let (room, other) = (alice.create(json!({})).await, alice.create(json!({})).await);
    let send = (0..1000).map(|_| alice.say(&room, "same", "once"));
    let ids: std::collections::BTreeSet<_> = futures_util::future::join_all(send).await.into_iter().collect();
    assert_eq!(ids.len(), 1);
    let page = alice.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=100")).await;
    assert_eq!(bodies(&page), ["once"]);

    let claims = (0..1000).map(|number| {
        let room = if number % 2 == 0 { &room } else { &other };
        let (alice, body) = (&alice, json!({ "room_id": room }));
        async move { alice.put(&path("/directory/room/%23one:test.example"), body).await.0 }
    });
    let answers = futures_util::future::join_all(claims).await;
    assert_eq!(answers.iter().filter(|status| **status == StatusCode::OK).count(), 1);
    assert_eq!(answers.iter().filter(|status| **status == StatusCode::CONFLICT).count(), 999);

    let creations =
        (0..100).map(async |_| alice.post(&path("/createRoom"), json!({ "room_alias_name": "two" })).await);
    let answers = futures_util::future::join_all(creations).await;
    assert_eq!(answers.iter().filter(|(status, _)| *status == StatusCode::OK).count(), 1);
    assert_eq!(answers.iter().filter(|(_, json)| json["errcode"] == "M_ROOM_IN_USE").count(), 99);
}

#[tokio::test(start_paused = true)]
async fn creators_have_no_level_and_rooms_are_created_once() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    for (version, allowed) in [("11", StatusCode::OK), ("12", StatusCode::BAD_REQUEST)] {
        let room = alice.create(json!({ "room_version": version })).await;
        let levels = json!({ "users": { alice.user_id.as_str(): 100 } });
        let (status, json) =
            alice.put(&path(&format!("/rooms/{room}/state/m.room.power_levels/")), levels).await;
        assert_eq!(status, allowed, "version {version}: {json}");
        let again = json!({ "room_version": version, "entropy": 100 });
        let (status, json) = alice.put(&path(&format!("/rooms/{room}/state/m.room.create/")), again).await;
        assert_eq!((status, &json["errcode"]), (StatusCode::BAD_REQUEST, &json!("M_BAD_JSON")));
    }
}

#[tokio::test(start_paused = true)]
async fn the_directory_says_what_is_true_now() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "visibility": "public", "name": "one" })).await;
    let listed = async || {
        let listed = bob.ok_get("/publicRooms").await["chunk"].clone();
        let field = |name: &str| listed[0].get(name).cloned().unwrap_or_default();
        (listed.as_array().unwrap().len(), field("name"), field("num_joined_members"))
    };
    assert_eq!(listed().await, (1, json!("one"), json!(1)));
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    let named = alice.ok_put(&format!("/rooms/{room}/state/m.room.name/"), json!({ "name": "two" })).await;
    assert_eq!(listed().await, (1, json!("two"), json!(2)));
    let name = encoded(named["event_id"].as_str().unwrap());
    alice.ok_put(&format!("/rooms/{room}/redact/{name}/r"), json!({})).await;
    assert_eq!(listed().await, (1, Value::Null, json!(2)), "a redacted name is none");
    alice.ok_put(&format!("/directory/list/room/{room}"), json!({ "visibility": "private" })).await;
    assert_eq!(listed().await.0, 0);
}

#[tokio::test(start_paused = true)]
async fn what_says_nothing_is_refused_by_name() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    let rooms = |rest: &str| path(&format!("/rooms/{room}{rest}"));
    for rest in ["/send/m.room.message/1", "/state/m.room.topic/"] {
        let answer = server.raw(http::Method::PUT, &rooms(rest), alice.token.as_deref(), "").await;
        refused(answer, StatusCode::BAD_REQUEST, "M_NOT_JSON");
    }
    let nobody = "@nobody:test.example";
    for answer in [
        alice.post(&path("/createRoom"), json!({ "invite": [nobody] })).await,
        alice.post(&rooms("/invite"), json!({ "user_id": nobody })).await,
        alice.put(&rooms(&format!("/state/m.room.member/{nobody}")), json!({ "membership": "invite" })).await,
    ] {
        refused(answer, StatusCode::NOT_FOUND, "M_NOT_FOUND");
    }
    for (body, errcode) in [(json!({}), "M_MISSING_PARAM"), (json!({ "user_id": "bob" }), "M_BAD_JSON")] {
        refused(alice.post(&rooms("/invite"), body).await, StatusCode::BAD_REQUEST, errcode);
    }
    let by_address =
        json!({ "id_server": "a.b", "id_access_token": "x", "medium": "email", "address": "a@b" });
    let answer = alice.post(&rooms("/invite"), by_address).await;
    refused(answer, StatusCode::FORBIDDEN, "M_THREEPID_DENIED");
    for levels in [
        json!({ "ban": "50" }),
        json!({ "ban": 1.5 }),
        json!({ "users": { "bob": 1 } }),
        json!({ "users": { "@bob:test.example": null } }),
        json!({ "events": [] }),
    ] {
        let answer = alice.put(&rooms("/state/m.room.power_levels/"), levels).await;
        refused(answer, StatusCode::BAD_REQUEST, "M_BAD_JSON");
    }
    let levels = json!({ "ban": 60, "events": { "x": 1 } });
    alice.ok_put(&format!("/rooms/{room}/state/m.room.power_levels/"), levels).await;
}

#[tokio::test(start_paused = true)]
async fn setting_what_is_set_changes_nothing() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    let set = async |name: &str| {
        alice.ok_put(&format!("/rooms/{room}/state/m.room.name"), json!({ "name": name })).await["event_id"]
            .clone()
    };
    let first = set("a").await;
    assert_eq!(set("a").await, first);
    assert_ne!(set("b").await, first);
    let event = alice.ok_get(&format!("/rooms/{room}/state/m.room.name?format=event")).await;
    assert_eq!(event["unsigned"]["prev_content"], json!({ "name": "a" }));
    assert_eq!(event["unsigned"]["prev_sender"], event["sender"]);
    assert_eq!(event["unsigned"]["replaces_state"], first);
    refused(alice.state(&room, "m.room.nothing", "").await, StatusCode::NOT_FOUND, "M_NOT_FOUND");
    let members = alice.ok_get(&format!("/rooms/{room}/members?membership=join")).await;
    assert_eq!(members["chunk"][0]["state_key"], alice.user_id);
    let members = alice.ok_get(&format!("/rooms/{room}/members?not_membership=join")).await;
    assert_eq!(members["chunk"], json!([]));
}

#[tokio::test(start_paused = true)]
async fn a_restricted_room_lets_in_who_is_in_the_other_room() {
    let server = TestServer::new();
    let (alice, bob, carol) =
        (server.register("alice").await, server.register("bob").await, server.register("carol").await);
    let space = alice.create(json!({ "preset": "public_chat" })).await;
    let rule =
        json!({ "join_rule": "restricted", "allow": [{ "type": "m.room_membership", "room_id": space }] });
    for version in ["8", "12"] {
        let room = alice
            .create(json!({
                "room_version": version, "initial_state": [{ "type": "m.room.join_rules", "content": rule }],
            }))
            .await;
        bob.ok_post(&format!("/join/{space}"), json!({})).await;
        refused(
            carol.post(&path(&format!("/join/{room}")), json!({})).await,
            StatusCode::FORBIDDEN,
            "M_FORBIDDEN",
        );
        bob.ok_post(&format!("/join/{room}"), json!({})).await;
        let (_, member) = bob.state(&room, "m.room.member", &bob.user_id).await;
        assert_eq!(member["join_authorised_via_users_server"], alice.user_id);
        // Who is in needs nobody to vouch for them.
        let renamed = json!({
            "membership": "join", "displayname": "Bobby", "join_authorised_via_users_server": "unused",
        });
        bob.ok_put(&format!("/rooms/{room}/state/m.room.member/{}", bob.user_id), renamed).await;
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_knocks_can_be_let_in() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice
        .create(json!({ "initial_state": [{ "type": "m.room.join_rules", "content": { "join_rule": "knock" } }] }))
        .await;
    refused(bob.post(&path(&format!("/join/{room}")), json!({})).await, StatusCode::FORBIDDEN, "M_FORBIDDEN");
    bob.ok_post(&format!("/knock/{room}"), json!({ "reason": "please" })).await;
    let (_, member) = alice.state(&room, "m.room.member", &bob.user_id).await;
    assert_eq!((&member["membership"], &member["reason"]), (&json!("knock"), &json!("please")));
    alice.ok_post(&format!("/rooms/{room}/invite"), json!({ "user_id": bob.user_id })).await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    let closed = alice.create(json!({})).await;
    refused(
        bob.post(&path(&format!("/knock/{closed}")), json!({})).await,
        StatusCode::FORBIDDEN,
        "M_FORBIDDEN",
    );
}

#[tokio::test(start_paused = true)]
async fn the_event_nearest_to_a_time_is_found() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    let began = crate::support::BEGAN_MS;
    let mut ids = Vec::new();
    for number in 0..10 {
        tokio::time::advance(std::time::Duration::from_millis(100)).await;
        ids.push(alice.say(&room, &number.to_string(), "x").await);
    }
    let at = async |time: u64, dir: &str| {
        alice.get(&format!("/_matrix/client/v1/rooms/{room}/timestamp_to_event?ts={time}&dir={dir}")).await
    };
    for (time, dir, expected) in [(301, "b", 2), (301, "f", 3), (500, "f", 4), (500, "b", 4), (5000, "b", 9)]
    {
        let (status, json) = at(began + time, dir).await;
        assert_eq!(
            (status, &json["event_id"]),
            (StatusCode::OK, &json!(ids[expected])),
            "{time} {dir}: {json}"
        );
    }
    refused(at(began + 5000, "f").await, StatusCode::NOT_FOUND, "M_NOT_FOUND");
    refused(at(began - 1, "b").await, StatusCode::NOT_FOUND, "M_NOT_FOUND");
    let (_, first) = at(0, "f").await;
    assert_eq!(first["origin_server_ts"], began);
}

#[tokio::test(start_paused = true)]
async fn members_are_told_as_of_a_token() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    let page = alice.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=1")).await;
    let before_bob = page["start"].as_str().unwrap();
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    let members = async |query: &str| {
        let json = alice.ok_get(&format!("/rooms/{room}/members{query}")).await;
        let users = json["chunk"].as_array().unwrap().iter().map(|event| event["state_key"].clone());
        users.collect::<Vec<_>>()
    };
    assert_eq!(members("").await, [json!(alice.user_id), json!(bob.user_id)]);
    assert_eq!(members(&format!("?at={before_bob}")).await, [json!(alice.user_id)]);
    assert_eq!(members("?at=t0").await, [json!(alice.user_id)]);
    bob.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
    assert_eq!(members("?membership=leave").await, [json!(bob.user_id)]);
}

#[tokio::test(start_paused = true)]
async fn a_room_that_everybody_may_read_is_read_from_outside() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let visibility = json!({ "history_visibility": "world_readable" });
    let room = alice
        .create(json!({ "initial_state": [{ "type": "m.room.history_visibility", "content": visibility }] }))
        .await;
    let said = alice.say(&room, "1", "for all").await;
    bob.ok_get(&format!("/rooms/{room}/state")).await;
    bob.ok_get(&format!("/rooms/{room}/event/{}", encoded(&said))).await;
    let page = bob.ok_get(&format!("/rooms/{room}/messages?dir=b")).await;
    assert_eq!(bodies(&page), ["for all"]);
    assert_eq!(page["chunk"][0]["unsigned"]["membership"], "leave");
    refused(
        bob.get(&path(&format!("/rooms/{room}/joined_members"))).await,
        StatusCode::FORBIDDEN,
        "M_FORBIDDEN",
    );
}

/// Rooms that have a step which is not finished.
fn unfinished(server: &TestServer) -> usize {
    aqueduct::rooms::state::stage::list_rooms(&*server.server().app().store.snapshot()).unwrap().len()
}

#[tokio::test(start_paused = true)]
async fn a_room_with_six_hundred_invitations_is_made_at_once() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let mut guests = Vec::new();
    for number in 0..600 {
        guests.push(server.register(&format!("guest{number}")).await);
    }
    let since = guests[599].ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
    let invite: Vec<_> = guests.iter().map(|guest| guest.user_id.clone()).collect();
    let made = alice.ok_post("/createRoom", json!({ "invite": invite, "name": "Large" })).await;
    let room = made["room_id"].as_str().unwrap();
    assert_eq!(unfinished(&server), 0);
    for (guest, path) in [(&guests[0], "/sync".to_owned()), (&guests[599], format!("/sync?since={since}"))] {
        let sync = guest.ok_get(&path).await;
        assert!(sync["rooms"]["invite"][room].is_object(), "{sync}");
    }
    guests[300].ok_post(&format!("/join/{room}"), json!({})).await;
    guests[300].say(room, "1", "here").await;
    let sync = alice.ok_get("/sync").await;
    let summary = &sync["rooms"]["join"][room]["summary"];
    assert_eq!(
        (summary["m.joined_member_count"].as_u64(), summary["m.invited_member_count"].as_u64()),
        (Some(2), Some(599))
    );
    let members = alice.ok_get(&format!("/rooms/{room}/members")).await;
    assert_eq!(members["chunk"].as_array().unwrap().len(), 601);
    assert_eq!(alice.state(room, "m.room.name", "").await.1["name"], "Large");
}

#[tokio::test(start_paused = true)]
async fn a_large_room_that_is_refused_leaves_nothing() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let store = &server.server().app().store;
    let (before, batch) = (server.assert_whole(), store.snapshot().batch_number());
    let mut initial_state: Vec<_> = (0..600)
        .map(|number| json!({ "type": "org.example.thing", "state_key": number.to_string(), "content": {} }))
        .collect();
    // The rules of the room refuse it only when its turn comes: nobody sets a key that is another user's id.
    initial_state
        .push(json!({ "type": "org.example.thing", "state_key": "@bob:test.example", "content": {} }));
    let body = json!({ "initial_state": initial_state, "preset": "public_chat", "room_alias_name": "large" });
    let (status, json) = alice.post("/_matrix/client/v3/createRoom", body).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some("M_INVALID_ROOM_STATE")));
    assert!(store.snapshot().batch_number() >= batch + 3, "two parts were written, and taken back");
    assert_eq!(unfinished(&server), 0);
    assert_eq!(server.assert_whole(), before, "no table has a row more");
    // Its alias is free, and the next room has all to itself.
    let made = alice.ok_post("/createRoom", json!({ "room_alias_name": "large" })).await;
    assert!(
        alice.ok_get("/joined_rooms").await["joined_rooms"].as_array().unwrap().contains(&made["room_id"])
    );
}

/// "If the room's version is 12 or higher, the power level for sending `m.room.tombstone` events MUST explicitly be higher than
/// `state_default`."
#[tokio::test(start_paused = true)]
async fn whatever_levels_a_request_brings_a_tombstone_needs_more_than_other_state() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    for (levels, expected) in [
        (json!({}), 150),
        (json!({ "events": {} }), 150),
        (json!({ "events": { "m.room.name": 0 } }), 150),
        (json!({ "state_default": 150 }), 200),
        (json!({ "state_default": 0 }), 150),
        // A level that is asked for is given.
        (json!({ "events": { "m.room.tombstone": 60 } }), 60),
    ] {
        let body = json!({ "room_version": "12", "power_level_content_override": levels });
        let room = alice.create(body).await;
        let (_, content) = alice.state(&room, "m.room.power_levels", "").await;
        assert_eq!(content["events"]["m.room.tombstone"], expected, "{levels}");
    }
}
