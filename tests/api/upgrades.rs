//! Rooms that are replaced by others (client-server API, "Room Upgrades").

use std::time::Duration;

use aqueduct::config::Bucket;
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{TestClient, TestServer, encoded, federated::Federated},
    sync::env,
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

#[tokio::test(start_paused = true)]
async fn whoever_replaces_a_room_once_more_is_given_the_first_replacement() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let alias = format!("/directory/room/{}", encoded("#here:test.example"));
    for version in ["10", "12"] {
        let levels = json!({ "users": { &*alice.user_id: 100, &*bob.user_id: 100 } });
        let create = json!({
            "room_version": "9", "preset": "public_chat", "room_alias_name": "here",
            "power_level_content_override": levels,
        });
        let old = alice.create(create).await;
        bob.ok_post(&format!("/join/{}", encoded(&old)), json!({})).await;
        let before = alice.ok_get("/joined_rooms").await["joined_rooms"].as_array().unwrap().len();
        let (first, at_once) = tokio::join!(upgrade(&alice, &old, version), upgrade(&alice, &old, version));
        assert_eq!(first, at_once, "{version}");
        let tombstone = tombstone_id(&alice, &old).await;
        assert_eq!(upgrade(&alice, &old, version).await, first, "{version}");
        assert_eq!(upgrade(&bob, &old, version).await, first, "{version}");
        assert_eq!(tombstone_id(&alice, &old).await, tombstone);
        assert_eq!(alice.ok_get(&alias).await["room_id"], first);
        let rooms = alice.ok_get("/joined_rooms").await["joined_rooms"].as_array().unwrap().len();
        assert_eq!(rooms, before + 1, "no room is left over");
        // Another one is wanted, which would leave the first with the names and without a tombstone.
        for admin in [&alice, &bob] {
            let (status, refused) = try_upgrade(admin, &old, json!({ "new_version": "11" })).await;
            assert_eq!((status, &refused["errcode"]), (StatusCode::BAD_REQUEST, &json!("M_INVALID_PARAM")));
            assert!(refused["error"].as_str().unwrap().contains(&first), "{refused}");
        }
        alice.ok_delete(&alias, json!({})).await;
    }
    // Somebody's word alone puts no room in the place of this one.
    let old = alice.create(json!({ "preset": "public_chat", "room_version": "11" })).await;
    let claims = json!({ "room_version": "11", "creation_content": { "predecessor": { "room_id": old } } });
    let claimed = bob.create(claims).await;
    let content = json!({ "body": "gone", "replacement_room": claimed });
    alice.ok_put(&format!("/rooms/{}/state/m.room.tombstone", encoded(&old)), content).await;
    assert_ne!(upgrade(&alice, &old, "11").await, claimed);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn the_replacement_of_a_moderator_who_was_banned_is_none() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    for ends in [
        json!({ "ban": &*bob.user_id }),
        json!({ "demote": &*bob.user_id }),
        json!({ "ban_there": &*alice.user_id }),
    ] {
        let levels = json!({ "users": { &*alice.user_id: 100, &*bob.user_id: 50 }, "events": { "m.room.tombstone": 50 } });
        let create =
            json!({ "room_version": "11", "preset": "public_chat", "power_level_content_override": levels });
        let old = alice.create(create).await;
        bob.ok_post(&format!("/join/{}", encoded(&old)), json!({})).await;
        let claims = json!({ "room_version": "11", "preset": "public_chat", "creation_content": { "predecessor": { "room_id": old } } });
        let theirs = bob.create(claims).await;
        let content = json!({ "body": "gone", "replacement_room": theirs });
        bob.ok_put(&format!("/rooms/{}/state/m.room.tombstone", encoded(&old)), content).await;
        assert_eq!(upgrade(&alice, &old, "11").await, theirs, "Bob may replace the room");
        if ends["ban"].is_string() {
            alice.ok_post(&format!("/rooms/{}/ban", encoded(&old)), json!({ "user_id": ends["ban"] })).await;
        } else if ends["demote"].is_string() {
            let levels = json!({ "users": { &*alice.user_id: 100 }, "events": { "m.room.tombstone": 50 } });
            alice.ok_put(&format!("/rooms/{}/state/m.room.power_levels", encoded(&old)), levels).await;
        } else {
            bob.ok_post(&format!("/rooms/{}/ban", encoded(&theirs)), json!({ "user_id": ends["ban_there"] }))
                .await;
        }
        assert_ne!(upgrade(&alice, &old, "11").await, theirs, "{ends}");
    }
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn members_cannot_use_up_the_aliases_of_a_room() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    let named = |name: &str| {
        format!("/_matrix/client/v3/directory/room/{}", encoded(&format!("#{name}:test.example")))
    };
    let body = json!({ "room_id": room });
    let add = async |client: &TestClient, name: &str| client.put(&named(name), body.clone()).await;
    // One member gives fifty, and all of them together no more than half of what the room may have.
    for user in 0..10 {
        let member = server.register(&format!("m{user}")).await;
        member.ok_post(&format!("/join/{}", encoded(&room)), json!({})).await;
        for number in 0..50 {
            let (status, json) = add(&member, &format!("m{user}n{number}")).await;
            assert_eq!(status, StatusCode::OK, "{user} {number} {json}");
        }
        let (status, refused) = add(&member, &format!("m{user}n50")).await;
        assert_eq!((status.as_u16(), &refused["errcode"]), (413, &json!("M_TOO_LARGE")), "{refused}");
    }
    let late = server.register("late").await;
    late.ok_post(&format!("/join/{}", encoded(&room)), json!({})).await;
    let (status, refused) = add(&late, "late").await;
    assert_eq!((status.as_u16(), &refused["errcode"]), (413, &json!("M_TOO_LARGE")), "{refused}");
    for number in 0..500 {
        assert_eq!(add(&alice, &format!("a{number}")).await.0, StatusCode::OK, "{number}");
    }
    let (status, refused) = add(&alice, "a500").await;
    assert_eq!(status.as_u16(), 413, "{refused}");
    assert!(refused["error"].as_str().unwrap().contains("1000"), "{refused}");
    // They all move, in more than one batch.
    let canonical = json!({ "alias": "#m9n49:test.example", "alt_aliases": ["#a499:test.example"] });
    alice.ok_put(&format!("/rooms/{}/state/m.room.canonical_alias", encoded(&room)), canonical.clone()).await;
    let new = upgrade(&alice, &room, "12").await;
    let listed = async |room: &str| {
        let json = alice.ok_get(&format!("/rooms/{}/aliases", encoded(room))).await;
        json["aliases"].as_array().unwrap().len()
    };
    assert_eq!((listed(&room).await, listed(&new).await), (0, 1_000));
    assert_eq!(content(&alice, &new, "m.room.canonical_alias").await, canonical);
    server.assert_whole();
}

/// Keys of children that are none any more do not take the place of those that are, and no ban or child is lost.
#[tokio::test(start_paused = true)]
async fn all_children_and_bans_go_over_or_the_room_is_not_replaced() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let via = json!({ "via": ["x.example"] });
    let gone = (0..520).map(|number| (format!("!a{number}:x.example"), json!({})));
    let odd = [("!b:x.example".to_owned(), json!({ "via": [] }))];
    let children = (0..70).map(|number| (format!("!c{number}:x.example"), via.clone()));
    let links = gone.chain(odd).chain(children);
    let links: Vec<Value> = links
        .map(|(key, content)| json!({ "type": "m.space.child", "state_key": key, "content": content }))
        .collect();
    let create = |version: &str, state: Vec<Value>| {
        json!({
            "creation_content": { "type": "m.space" }, "room_version": version, "initial_state": state,
        })
    };
    let count = async |room: &str, kind: &str, membership: Option<&str>| {
        let state = alice.ok_get(&format!("/rooms/{}/state", encoded(room))).await;
        let events = state.as_array().unwrap().iter();
        let is_one = |event: &&Value| {
            event["type"] == kind
                && membership.is_none_or(|membership| event["content"]["membership"] == membership)
        };
        events.filter(is_one).count()
    };
    let space = alice.create(create("11", links)).await;
    let new = upgrade(&alice, &space, "12").await;
    assert_eq!(count(&new, "m.space.child", None).await, 70);
    // More than one request may set.
    let banned = |from: usize| {
        let keys = (from..from + 450).map(|number| format!("@u{number}:x.example"));
        let state = keys.map(
            |user| json!({ "type": "m.room.member", "state_key": user, "content": { "membership": "ban" } }),
        );
        state.collect::<Vec<Value>>()
    };
    let children = (0..550).map(|number| {
        json!({ "type": "m.space.child", "state_key": format!("!c{number}:x.example"), "content": via })
    });
    let space = alice.create(create("10", banned(0).into_iter().chain(children).collect())).await;
    for event in banned(450) {
        let path = format!(
            "/rooms/{}/state/m.room.member/{}",
            encoded(&space),
            encoded(event["state_key"].as_str().unwrap())
        );
        alice.ok_put(&path, event["content"].clone()).await;
    }
    let new = upgrade(&alice, &space, "11").await;
    assert_eq!(count(&new, "m.space.child", None).await, 550);
    assert_eq!(count(&new, "m.room.member", Some("ban")).await, 900);
    // Too much is not carried over in part.
    let space = alice.create(create("11", Vec::new())).await;
    for number in 0..600 {
        let path = format!("/rooms/{}/state/m.space.child/!c{number}:x.example", encoded(&space));
        alice.ok_put(&path, json!({ "via": ["x.example"], "about": "x".repeat(15_000) })).await;
    }
    let (status, refused) = try_upgrade(&alice, &space, json!({ "new_version": "12" })).await;
    assert_eq!((status.as_u16(), &refused["errcode"]), (413, &json!("M_TOO_LARGE")), "{refused}");
    assert_eq!(alice.state(&space, "m.room.tombstone", "").await.0, StatusCode::NOT_FOUND);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_upgrade_counts_for_all_that_it_carries_over() {
    let server = TestServer::with(|config| {
        let limits = &mut config.limits;
        limits.rate_limits = true;
        let many = Bucket { per_second: 1_000.0, burst: 1_000 };
        (limits.register, limits.membership, limits.other, limits.read) = (many, many, many, many);
        limits.send = Bucket { per_second: 1.0, burst: 5 };
    });
    let alice = server.register("alice").await;
    let space =
        alice.create(json!({ "room_version": "10", "creation_content": { "type": "m.space" } })).await;
    for number in 0..100 {
        env(&server).sleep(Duration::from_secs(1)).await;
        let child = encoded(&format!("!child{number}:test.example"));
        let path = format!("/rooms/{}/state/m.space.child/{child}", encoded(&space));
        alice.ok_put(&path, json!({ "via": ["test.example"] })).await;
    }
    env(&server).sleep(Duration::from_secs(5)).await;
    // It is more than may be in debt otherwise, and is not refused for that.
    let new = upgrade(&alice, &space, "11").await;
    let path = format!("/_matrix/client/v3/rooms/{}/send/m.room.message/1", encoded(&new));
    let (status, json) = alice.put(&path, json!({ "msgtype": "m.text", "body": "here" })).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "{json}");
    let wait_ms = json["retry_after_ms"].as_u64().unwrap();
    assert!((99_000..120_000).contains(&wait_ms), "{json}");
    env(&server).sleep(Duration::from_millis(wait_ms)).await;
    alice
        .ok_put(&path.replace("/_matrix/client/v3", ""), json!({ "msgtype": "m.text", "body": "here" }))
        .await;
}
