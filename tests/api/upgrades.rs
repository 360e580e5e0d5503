//! Rooms that are replaced by others (client-server API, "Room Upgrades").

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{TestClient, TestServer, encoded, federated::Federated},
};

async fn try_upgrade(client: &TestClient, room: &str, body: Value) -> (StatusCode, Value) {
    client.post(&format!("/_matrix/client/v3/rooms/{}/upgrade", encoded(room)), body).await
}

async fn upgrade(client: &TestClient, room: &str, version: &str) -> String {
    let (status, answer) = try_upgrade(client, room, json!({ "new_version": version })).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    answer["replacement_room"].as_str().unwrap().to_owned()
}

/// The id of the event that ended a room.
async fn tombstone_id(client: &TestClient, room: &str) -> Value {
    let path = format!("/rooms/{}/state/m.room.tombstone/?format=event", encoded(room));
    client.ok_get(&path).await["event_id"].clone()
}

async fn content(client: &TestClient, room: &str, kind: &str) -> Value {
    let (status, content) = client.state(room, kind, "").await;
    assert_eq!(status, StatusCode::OK, "{kind}: {content}");
    content
}

#[tokio::test(start_paused = true)]
async fn what_makes_a_room_goes_over_to_the_one_that_replaces_it() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let create = json!({
        "name": "Old", "topic": "Things", "preset": "public_chat", "visibility": "public", "room_version": "9",
        "room_alias_name": "things", "creation_content": { "type": "m.space", "m.federate": false },
        "power_level_content_override": { "kick": "51", "users": { &*alice.user_id: 100, "@carol:test.example": 60 } },
        "initial_state": [
            { "type": "m.room.encryption", "content": { "algorithm": "m.megolm.v1.aes-sha2" } },
            { "type": "m.room.server_acl", "content": { "allow": ["*"], "deny": ["evil.example"] } },
            { "type": "m.room.history_visibility", "content": { "history_visibility": "invited" } },
            { "type": "m.room.guest_access", "content": { "guest_access": "can_join" } },
            { "type": "org.example.own", "content": { "a": 1 } },
            { "type": "m.space.child", "state_key": "!child:test.example", "content": { "via": ["test.example"] } },
            { "type": "m.space.child", "state_key": "!gone:test.example", "content": {} },
        ],
    });
    let old = alice.create(create).await;
    bob.ok_post(&format!("/join/{}", encoded(&old)), json!({})).await;
    for (banned, content) in [
        ("@mallory:else.example", json!({ "membership": "ban", "reason": "spam" })),
        ("@carol:test.example", json!({ "membership": "ban" })),
    ] {
        alice.ok_put(&format!("/rooms/{}/state/m.room.member/{banned}", encoded(&old)), content).await;
    }
    let new = upgrade(&alice, &old, "11").await;
    let created = content(&alice, &new, "m.room.create").await;
    assert_eq!(created["predecessor"]["room_id"], old);
    assert_eq!(created["predecessor"]["event_id"], tombstone_id(&alice, &old).await);
    assert_eq!((&created["type"], &created["m.federate"]), (&json!("m.space"), &json!(false)));
    assert_eq!(created["room_version"], "11");
    assert_eq!(content(&alice, &old, "m.room.tombstone").await["replacement_room"], new);
    for kind in
        ["name", "topic", "encryption", "server_acl", "history_visibility", "join_rules", "guest_access"]
    {
        let kind = format!("m.room.{kind}");
        assert_eq!(content(&alice, &new, &kind).await, content(&alice, &old, &kind).await, "{kind}");
    }
    let levels = content(&alice, &new, "m.room.power_levels").await;
    assert_eq!((&levels["kick"], &levels["users"]["@carol:test.example"]), (&json!(51), &json!(60)));
    let (_, child) = alice.state(&new, "m.space.child", "!child:test.example").await;
    assert_eq!(child["via"], json!(["test.example"]));
    for (banned, content) in [
        ("@mallory:else.example", json!({ "membership": "ban", "reason": "spam" })),
        ("@carol:test.example", json!({ "membership": "ban" })),
    ] {
        assert_eq!(alice.state(&new, "m.room.member", banned).await, (StatusCode::OK, content));
    }
    for (kind, key) in
        [("m.space.child", "!gone:test.example"), ("org.example.own", ""), ("m.room.member", &bob.user_id)]
    {
        assert_eq!(alice.state(&new, kind, key).await.0, StatusCode::NOT_FOUND, "{kind} stays behind");
    }
    // The names of the room name the new one.
    let named = alice.ok_get(&format!("/directory/room/{}", encoded("#things:test.example"))).await;
    assert_eq!(named["room_id"], new);
    assert_eq!(
        content(&alice, &new, "m.room.canonical_alias").await,
        json!({ "alias": "#things:test.example" })
    );
    assert_eq!(content(&alice, &old, "m.room.canonical_alias").await, json!({}));
    let public = alice.ok_get("/publicRooms").await;
    let public: Vec<&Value> =
        public["chunk"].as_array().unwrap().iter().map(|room| &room["room_id"]).collect();
    assert_eq!(public, [&json!(new)]);
    // Members of the old room read there, and write no more.
    let levels = content(&alice, &old, "m.room.power_levels").await;
    assert_eq!((&levels["events_default"], &levels["invite"]), (&json!(50), &json!(50)));
    let say = format!("/_matrix/client/v3/rooms/{}/send/m.room.message/t1", encoded(&old));
    let (status, refused) = bob.put(&say, json!({ "msgtype": "m.text", "body": "still here" })).await;
    assert_eq!(status, StatusCode::FORBIDDEN, "{refused}");
    server.assert_whole();
}

/// The tombstone is built before the new room is there, so that others write to the old one meanwhile.
#[tokio::test(start_paused = true)]
async fn a_room_names_the_tombstone_of_one_that_went_on_while_it_was_replaced() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    for version in ["2", "10", "11"] {
        let old = alice.create(json!({ "room_version": version })).await;
        let talk = async {
            for number in 0..20 {
                alice.say(&old, &format!("t{number}"), "I go on").await;
            }
        };
        let (new, ()) = tokio::join!(upgrade(&alice, &old, "10"), talk);
        let created = content(&alice, &new, "m.room.create").await;
        assert_eq!(created["predecessor"]["event_id"], tombstone_id(&alice, &old).await, "{version}");
        assert_eq!(content(&alice, &old, "m.room.tombstone").await["replacement_room"], new);
        // It does not stand on the event that the room got before it, which is newer than it.
        let page = alice.ok_get(&format!("/rooms/{}/messages?dir=b&limit=100", encoded(&old))).await;
        let ids: Vec<&Value> = page["chunk"].as_array().unwrap().iter().map(|it| &it["event_id"]).collect();
        let at = ids.iter().position(|id| **id == created["predecessor"]["event_id"]).unwrap();
        let filter = json!({ "event_format": "federation", "room": { "timeline": { "limit": 100 } } });
        let sync = alice.ok_get(&format!("/sync?filter={}", encoded(&filter.to_string()))).await;
        let events = sync["rooms"]["join"][&old]["timeline"]["events"].as_array().unwrap();
        let tombstone = events.iter().find(|event| event["type"] == "m.room.tombstone").unwrap();
        let before = ids[at + 1].as_str().unwrap();
        assert!(!tombstone["prev_events"].to_string().contains(before), "{version}: {tombstone}");
    }
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn levels_fit_the_version_of_the_new_room() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    // Creators stand above all levels from version 12 on, and are named before.
    let old = alice.create(json!({ "room_version": "11", "preset": "public_chat" })).await;
    let twelve = upgrade(&alice, &old, "12").await;
    let users = |levels: &Value| levels["users"].clone();
    assert_eq!(users(&content(&alice, &twelve, "m.room.power_levels").await), json!({}));
    let predecessor = content(&alice, &twelve, "m.room.create").await["predecessor"].clone();
    assert_eq!(predecessor, json!({ "room_id": old }));
    let eleven = upgrade(&alice, &twelve, "11").await;
    let levels = content(&alice, &eleven, "m.room.power_levels").await;
    assert!(levels["users"][&alice.user_id].as_i64().unwrap() >= 100, "{levels}");
    let body = json!({ "new_version": "12", "additional_creators": [bob.user_id] });
    let (_, answer) = try_upgrade(&alice, &eleven, body).await;
    let again = answer["replacement_room"].as_str().unwrap();
    let create = content(&alice, again, "m.room.create").await;
    assert_eq!(create["additional_creators"], json!([bob.user_id]));
    // Members who may replace the room, but not do all that is carried over, have no more power in the new one than before.
    let levels = json!({ "users": { &*alice.user_id: 100, &*bob.user_id: 50 }, "events": { "m.room.tombstone": 50, "m.room.join_rules": 90 } });
    let body =
        json!({ "room_version": "10", "preset": "public_chat", "power_level_content_override": levels });
    let old = alice.create(body).await;
    bob.ok_post(&format!("/join/{}", encoded(&old)), json!({})).await;
    let new = upgrade(&bob, &old, "10").await;
    let levels = content(&bob, &new, "m.room.power_levels").await;
    assert_eq!(levels["users"], json!({ &*alice.user_id: 100, &*bob.user_id: 50 }));
    assert_eq!(levels["events"], json!({ "m.room.tombstone": 50, "m.room.join_rules": 90 }));
    assert_eq!(content(&bob, &new, "m.room.join_rules").await["join_rule"], "public");
    // The level for sending stays what it was where bob may not change levels.
    assert_eq!(content(&alice, &old, "m.room.tombstone").await["replacement_room"], new);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn nobody_replaces_a_room_who_may_not() {
    let server = TestServer::new();
    let (alice, bob, carol) =
        (server.register("alice").await, server.register("bob").await, server.register("carol").await);
    let room = alice.create(json!({ "preset": "public_chat", "room_alias_name": "here" })).await;
    bob.ok_post(&format!("/join/{}", encoded(&room)), json!({})).await;
    for (client, room, version, status, code) in [
        (&bob, &*room, "11", StatusCode::FORBIDDEN, "M_FORBIDDEN"),
        (&carol, &*room, "11", StatusCode::FORBIDDEN, "M_FORBIDDEN"),
        (&alice, "!nowhere:test.example", "11", StatusCode::FORBIDDEN, "M_FORBIDDEN"),
        (&alice, &*room, "99", StatusCode::BAD_REQUEST, "M_UNSUPPORTED_ROOM_VERSION"),
        (&alice, &*room, "no_version", StatusCode::BAD_REQUEST, "M_UNSUPPORTED_ROOM_VERSION"),
    ] {
        let (found, refused) = try_upgrade(client, room, json!({ "new_version": version })).await;
        assert_eq!((found, refused["errcode"].as_str()), (status, Some(code)), "{refused}");
    }
    let body = json!({ "new_version": "12", "additional_creators": ["not a user"] });
    assert_eq!(try_upgrade(&alice, &room, body).await.0, StatusCode::BAD_REQUEST);
    let tombstone = format!("/_matrix/client/v3/rooms/{}/state/m.room.tombstone", encoded(&room));
    let (status, refused) = alice.put(&tombstone, json!({ "body": "x", "replacement_room": room })).await;
    assert_eq!((status, &refused["errcode"]), (StatusCode::BAD_REQUEST, &json!("M_BAD_JSON")), "{refused}");
    let rooms = alice.ok_get("/joined_rooms").await;
    assert_eq!(rooms["joined_rooms"], json!([room]), "no room is left over");
    let named = alice.ok_get(&format!("/directory/room/{}", encoded("#here:test.example"))).await;
    assert_eq!(named["room_id"], room);
    assert_eq!(alice.state(&room, "m.room.tombstone", "").await.0, StatusCode::NOT_FOUND);
}

#[tokio::test(start_paused = true)]
async fn members_of_other_servers_go_over_with_their_settings() {
    let federated = Federated::new(&["a.example", "b.example"]);
    let (alice, bob) =
        (federated.server(0).register("alice").await, federated.server(1).register("bob").await);
    let levels = json!({ "users": { &*alice.user_id: 100, &*bob.user_id: 100 } });
    let create =
        json!({ "preset": "public_chat", "room_version": "11", "power_level_content_override": levels });
    let old = alice.create(create).await;
    bob.ok_post(&format!("/join/{}?server_name=a.example", encoded(&old)), json!({})).await;
    // Names that another server than that of the upgrade gave the room follow the first of its users.
    let alias = format!("/directory/room/{}", encoded("#here:b.example"));
    bob.ok_put(&alias, json!({ "room_id": old })).await;
    let listed = |room: &str| format!("/directory/list/room/{}", encoded(room));
    bob.ok_put(&listed(&old), json!({ "visibility": "public" })).await;
    let tag =
        |room: &str| format!("/user/{}/rooms/{}/tags/m.favourite", encoded(&bob.user_id), encoded(room));
    bob.ok_put(&tag(&old), json!({ "order": 0.5 })).await;
    let new = upgrade(&alice, &old, "12").await;
    bob.server.server().app().env.sleep(std::time::Duration::from_secs(10)).await;
    assert_eq!(content(&bob, &old, "m.room.tombstone").await["replacement_room"], new);
    assert_eq!(bob.ok_get(&alias).await["room_id"], old);
    bob.ok_post(&format!("/join/{}?server_name=a.example", encoded(&new)), json!({})).await;
    bob.server.server().app().env.sleep(std::time::Duration::from_secs(10)).await;
    let tags = bob.ok_get(&format!("/user/{}/rooms/{}/tags", encoded(&bob.user_id), encoded(&new))).await;
    assert!(tags["tags"]["m.favourite"].is_object(), "{tags}");
    assert_eq!(bob.ok_get(&alias).await["room_id"], new);
    for (room, visibility) in [(&old, "private"), (&new, "public")] {
        assert_eq!(bob.ok_get(&listed(room)).await["visibility"], visibility, "{room}");
    }
}
