//! Users of other servers enter rooms of ours (server-server API, "Joining Rooms", "Restricted rooms").

use std::collections::BTreeSet;

use aqueduct::rooms::event;
use federation::testing::Net;
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{
        TestClient, TestServer, encoded,
        network::{Peer, doors},
        room_num,
    },
};

const BOB: &str = "@bob:b.example";

/// A server of ours with alice on it, and another server.
pub(crate) struct Scene {
    pub(crate) server: TestServer,
    pub(crate) peer: Peer,
    pub(crate) net: Net,
    pub(crate) alice: TestClient,
}

impl Scene {
    pub(crate) async fn new() -> Self {
        let net = Net::new(1);
        let store = aqueduct::store::Store::open(
            aqueduct::store::Engine::Memory(Default::default()),
            aqueduct::store::Durability::Fsync,
        );
        let server = TestServer::start(doors(&net), store.unwrap(), |_| {});
        let peer = Peer::new(&net, "b.example", "5.0.0.2", 2);
        let alice = server.register("alice").await;
        Self { server, peer, net, alice }
    }

    /// A public room of this version.
    pub(crate) async fn room(&self, version: &str) -> String {
        self.alice.create(json!({ "preset": "public_chat", "room_version": version })).await
    }

    pub(crate) async fn set(&self, room: &str, event_type: &str, content: Value) {
        let path = format!("/rooms/{}/state/{event_type}/", encoded(room));
        self.alice.ok_put(&path, content).await;
    }

    pub(crate) async fn member(&self, room: &str, user: &str) -> Value {
        let path = format!("/_matrix/client/v3/rooms/{}/state/m.room.member/{user}", encoded(room));
        self.alice.get(&path).await.1
    }

    async fn make_join(&self, room: &str, user: &str, query: &str) -> (StatusCode, Value) {
        self.peer.make(&self.server, "join", room, user, query).await
    }

    async fn send_join(&self, room: &str, id: &str, event: &Value) -> (StatusCode, Value) {
        self.peer.send(&self.server, "v2/send_join", room, id, event).await
    }

    /// Restricts a room to members of these rooms.
    async fn restrict(&self, room: &str, rule: &str, rooms: &[&str]) {
        let allow: Vec<_> =
            rooms.iter().map(|room| json!({ "type": "m.room_membership", "room_id": room })).collect();
        self.set(room, "m.room.join_rules", json!({ "join_rule": rule, "allow": allow })).await;
    }
}

pub(crate) fn refused((status, json): (StatusCode, Value)) -> (u16, String) {
    (status.as_u16(), json["errcode"].as_str().unwrap_or_default().to_owned())
}

/// The id of an event as another one cites it.
fn cited(event: &Value) -> &str {
    event.as_str().or_else(|| event[0].as_str()).unwrap()
}

fn ids(list: &Value, version: &str) -> BTreeSet<String> {
    let rules = ruma::RoomVersionId::try_from(version).unwrap().rules().unwrap();
    let id = |event: &Value| {
        if let Some(id) = event["event_id"].as_str() {
            return id.to_owned();
        }
        let event = serde_json::from_value(event.clone()).unwrap();
        format!("${}", ruma::signatures::reference_hash(&event, &rules).unwrap())
    };
    list.as_array().unwrap().iter().map(id).collect()
}

fn types(list: &Value) -> Vec<&str> {
    let mut types: Vec<_> = list.as_array().unwrap().iter().map(|it| it["type"].as_str().unwrap()).collect();
    types.sort_unstable();
    types
}

#[tokio::test(start_paused = true)]
async fn a_user_of_another_server_joins_a_room_of_each_version() {
    let scene = Scene::new().await;
    for version in ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12"] {
        let room = scene.room(version).await;
        let (status, made) = scene.make_join(&room, BOB, &format!("?ver=1&ver={version}")).await;
        assert_eq!((status, &made["room_version"]), (StatusCode::OK, &json!(version)), "{made}");
        let event = &made["event"];
        assert_eq!((&event["room_id"], &event["type"]), (&json!(room), &json!("m.room.member")));
        assert_eq!((&event["sender"], &event["state_key"]), (&json!(BOB), &json!(BOB)));
        assert_eq!(event["content"], json!({ "membership": "join" }));
        assert_eq!(event["origin"], json!("test.example"));
        let state_path = format!("/rooms/{}/state", encoded(&room));
        let before = scene.alice.ok_get(&state_path).await;
        let (id, mut signed) = scene.peer.sign_event(event, version);
        signed["unsigned"] = json!({ "age": 7 });
        let (status, answer) = scene.send_join(&room, &id, &signed).await;
        assert_eq!(status, StatusCode::OK, "{version}: {answer}");
        let state = ids(&answer["state"], version);
        let expected: BTreeSet<String> =
            before.as_array().unwrap().iter().map(|it| it["event_id"].as_str().unwrap().to_owned()).collect();
        assert_eq!(state, expected, "the state before the join");
        let chain = ids(&answer["auth_chain"], version);
        let known: BTreeSet<_> = state.union(&chain).cloned().collect();
        for it in answer["state"].as_array().unwrap().iter().chain([&answer["event"]]) {
            for auth in it["auth_events"].as_array().unwrap() {
                assert!(chain.contains(cited(auth)), "the chain lacks {auth}");
            }
            for prev in answer["event"]["prev_events"].as_array().unwrap() {
                assert!(known.contains(cited(prev)) || version != "11", "{prev}");
            }
        }
        assert_eq!(ids(&json!([answer["event"]]), version), BTreeSet::from([id.clone()]));
        assert_eq!((&answer["members_omitted"], &answer["servers_in_room"]), (&Value::Null, &Value::Null));
        assert_eq!(scene.member(&room, BOB).await["membership"], "join");

        let again = scene.send_join(&room, &id, &signed).await;
        assert_eq!(again, (StatusCode::OK, answer), "a join that is sent again is answered as before");
        let v1 = scene.peer.send(&scene.server, "v1/send_join", &room, &id, &signed).await.1;
        assert_eq!((&v1[0], &v1[1]["state"]), (&json!(200), &again.1["state"]));
    }
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_join_by_way_of_this_server_is_its_to_tell() {
    let scene = Scene::new().await;
    let room = scene.room("11").await;
    scene.peer.join(&scene.server, &room, BOB).await;
    let app = scene.server.server().app();
    let (snapshot, num) = (app.store.snapshot(), room_num(&app.store, &room));
    let us = "test.example".try_into().unwrap();
    let tell = |user: &str| {
        let stored = aqueduct::rooms::find_state(&*snapshot, num, "m.room.member", user).unwrap().unwrap();
        (stored.row.header.let_in, event::is_ours_to_tell(&stored.row, us))
    };
    assert_eq!((tell(BOB), tell("@alice:test.example")), ((true, true), (false, true)));
    drop(snapshot);
    let remote = crate::support::remote::Remote::new(app, &room);
    let event = remote.message("by itself", &remote.heads());
    let aqueduct::rooms::change::Outcome::Accepted(stored) = remote.send(event).await else { panic!() };
    assert!(!event::is_ours_to_tell(&stored.row, us), "other servers tell of what comes in otherwise");
}

#[tokio::test(start_paused = true)]
async fn templates_are_made_only_for_those_who_may_join() {
    let scene = Scene::new().await;
    let room = scene.room("10").await;
    for (room, user, query, expected) in [
        (&*room, "@carol:c.example", "?ver=10", (403, "M_FORBIDDEN")),
        (&room, "@alice:test.example", "?ver=10", (403, "M_FORBIDDEN")),
        (&room, "bob", "?ver=10", (400, "M_INVALID_PARAM")),
        (&room, BOB, "", (400, "M_INCOMPATIBLE_ROOM_VERSION")),
        (&room, BOB, "?ver=1&ver=010", (400, "M_INCOMPATIBLE_ROOM_VERSION")),
        ("!nowhere:test.example", BOB, "?ver=10", (404, "M_NOT_FOUND")),
    ] {
        let (status, code) = refused(scene.make_join(room, user, query).await);
        assert_eq!((status, &*code), expected, "{room} {user} {query}");
    }
    let (_, json) = scene.make_join(&room, BOB, "?ver=11").await;
    assert_eq!(json["room_version"], "10");

    let private = scene.alice.create(json!({ "preset": "private_chat", "room_version": "10" })).await;
    assert_eq!(refused(scene.make_join(&private, BOB, "?ver=10").await), (403, "M_FORBIDDEN".into()));
    scene.alice.ok_post(&format!("/rooms/{room}/ban"), json!({ "user_id": BOB })).await;
    assert_eq!(refused(scene.make_join(&room, BOB, "?ver=10").await), (403, "M_FORBIDDEN".into()));
    let away =
        json!({ "preset": "public_chat", "room_version": "10", "creation_content": { "m.federate": false } });
    let away = scene.alice.create(away).await;
    assert_eq!(refused(scene.make_join(&away, BOB, "?ver=10").await), (403, "M_FORBIDDEN".into()));
    // Nobody of ours is left in it, so that this server does not follow it any more.
    let left = scene.room("10").await;
    scene.alice.ok_post(&format!("/rooms/{left}/leave"), json!({})).await;
    assert_eq!(refused(scene.make_join(&left, BOB, "?ver=10").await), (404, "M_NOT_FOUND".into()));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_the_room_does_not_admit_gets_nobody_in() {
    let scene = Scene::new().await;
    let room = scene.room("11").await;
    let (id, event) = scene.peer.made(&scene.server, "join", &room, BOB).await;
    scene.set(&room, "m.room.server_acl", json!({ "allow": ["*"], "deny": ["b.*"] })).await;
    assert_eq!(refused(scene.make_join(&room, BOB, "?ver=11").await), (403, "M_FORBIDDEN".into()));
    assert_eq!(refused(scene.send_join(&room, &id, &event).await), (403, "M_FORBIDDEN".into()));
    let leave = scene.peer.make(&scene.server, "leave", &room, BOB, "").await;
    assert_eq!(refused(leave), (403, "M_FORBIDDEN".into()));
    // Who is here is not told, either.
    for user in ["@alice:test.example", "@nobody:test.example"] {
        let mut invite = event.clone();
        (invite["state_key"], invite["content"]) = (json!(user), json!({ "membership": "invite" }));
        let (id, invite) = scene.peer.sign_event(&invite, "11");
        let uri = format!("/_matrix/federation/v2/invite/{}/{}", encoded(&room), encoded(&id));
        let body = json!({ "event": invite, "room_version": "11", "invite_room_state": [] });
        let invited = scene.peer.ask(&scene.server, Method::PUT, &uri, Some(&body)).await;
        assert_eq!(refused(invited), (403, "M_FORBIDDEN".into()), "{user}");
    }
    assert_eq!(scene.member(&room, BOB).await["membership"], Value::Null);
}

#[tokio::test(start_paused = true)]
async fn a_join_that_is_not_what_it_must_be_is_refused() {
    let scene = Scene::new().await;
    let (room, other) = (scene.room("11").await, scene.room("11").await);
    let (id, event) = scene.peer.made(&scene.server, "join", &room, BOB).await;
    let invalid = (400, "M_INVALID_PARAM".to_owned());
    let (no_event, forbidden) = ((400, "M_BAD_JSON".to_owned()), (403, "M_FORBIDDEN".to_owned()));
    for (what, field, value, expected) in [
        ("type", "type", json!("m.room.message"), &invalid),
        ("membership", "content", json!({ "membership": "leave" }), &invalid),
        ("no membership", "content", json!({}), &invalid),
        ("sender", "sender", json!("@carol:c.example"), &forbidden),
        ("state key", "state_key", json!("@bobby:b.example"), &invalid),
        ("no state key", "state_key", Value::Null, &invalid),
        ("room", "room_id", json!(other), &no_event),
        ("prev", "prev_events", json!([crate::support::NOWHERE]), &invalid),
        ("depth", "depth", json!(-1), &no_event),
    ] {
        let mut changed = event.clone();
        changed[field] = value;
        if changed[field].is_null() {
            changed.as_object_mut().unwrap().remove(field);
        }
        let (id, signed) = scene.peer.sign_event(&changed, "11");
        assert_eq!(refused(scene.send_join(&room, &id, &signed).await), *expected, "{what}");
    }
    for odd in [crate::support::NOWHERE, "odd"] {
        assert_eq!(refused(scene.send_join(&room, odd, &event).await), invalid);
    }
    let mut unhashed = event.clone();
    unhashed.as_object_mut().unwrap().remove("hashes");
    assert_eq!(refused(scene.send_join(&room, &id, &unhashed).await), forbidden);
    assert_eq!(refused(scene.send_join(&other, &id, &event).await), no_event);
    // An event that was changed after it was signed has a hash that does not fit, or a signature that does not.
    let mut forged = event.clone();
    forged["content"]["displayname"] = json!("forged");
    assert_eq!(refused(scene.send_join(&room, &id, &forged).await), invalid);
    let mut forged = event.clone();
    forged["signatures"]["b.example"]["ed25519:k"] = json!("A".repeat(86));
    assert_eq!(refused(scene.send_join(&room, &id, &forged).await), forbidden);
    forged["signatures"] = json!({});
    assert_eq!(refused(scene.send_join(&room, &id, &forged).await), forbidden);
    forged.as_object_mut().unwrap().remove("signatures");
    assert_eq!(refused(scene.send_join(&room, &id, &forged).await), forbidden);
    forged.as_object_mut().unwrap().remove("hashes");
    assert_eq!(refused(scene.send_join(&room, &id, &forged).await), forbidden, "a template as it was");
    // Another server cannot bring the event of this one.
    let thief = Peer::new(&scene.net, "c.example", "5.0.0.3", 3);
    assert_eq!(refused(thief.send(&scene.server, "v2/send_join", &room, &id, &event).await), forbidden);
    let mut with_float = event.clone();
    with_float["content"]["org.example.x"] = json!(1.5);
    for body in
        [json!({}), json!({ "signatures": 1 }), json!({ "content": { "membership": [] } }), with_float]
    {
        assert_eq!(refused(scene.send_join(&room, &id, &body).await), no_event, "{body}");
    }
    let unknown = scene.send_join("!nowhere:test.example", &id, &event).await;
    assert_eq!(refused(unknown), (404, "M_NOT_FOUND".into()));
    assert_eq!(scene.member(&room, BOB).await["membership"], Value::Null, "nobody came in by any of these");
    assert_eq!(scene.send_join(&room, &id, &event).await.0, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn a_join_that_the_room_came_to_forbid_is_refused() {
    let scene = Scene::new().await;
    let room = scene.room("11").await;
    let (id, event) = scene.peer.made(&scene.server, "join", &room, BOB).await;
    scene.alice.ok_post(&format!("/rooms/{room}/ban"), json!({ "user_id": BOB })).await;
    for _ in 0..2 {
        assert_eq!(refused(scene.send_join(&room, &id, &event).await), (403, "M_FORBIDDEN".into()));
    }
    assert_eq!(scene.member(&room, BOB).await["membership"], "ban");
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn this_server_vouches_for_members_of_the_rooms_that_a_restricted_room_names() {
    let scene = Scene::new().await;
    for (version, rule) in
        [("8", "restricted"), ("9", "restricted"), ("10", "knock_restricted"), ("12", "restricted")]
    {
        let (named, room) = (scene.room(version).await, scene.room(version).await);
        scene.restrict(&room, rule, &[&named]).await;
        let query = format!("?ver={version}");
        assert_eq!(
            refused(scene.make_join(&room, BOB, &query).await),
            (403, "M_FORBIDDEN".into()),
            "{version}"
        );
        scene.peer.join(&scene.server, &named, BOB).await;
        let (id, event) = scene.peer.made(&scene.server, "join", &room, BOB).await;
        assert_eq!(event["content"]["join_authorised_via_users_server"], "@alice:test.example");
        let (status, answer) = scene.send_join(&room, &id, &event).await;
        assert_eq!(status, StatusCode::OK, "{version}: {answer}");
        let signatures = answer["event"]["signatures"].as_object().unwrap();
        assert_eq!(signatures.keys().collect::<Vec<_>>(), ["b.example", "test.example"]);
        assert_eq!(scene.send_join(&room, &id, &event).await, (StatusCode::OK, answer), "{version}");
    }
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_condition_must_still_hold_when_the_join_is_sent() {
    let scene = Scene::new().await;
    let (named, room) = (scene.room("10").await, scene.room("10").await);
    scene.restrict(&room, "restricted", &[&named]).await;
    scene.peer.join(&scene.server, &named, BOB).await;
    let (id, event) = scene.peer.made(&scene.server, "join", &room, BOB).await;
    scene.alice.ok_post(&format!("/rooms/{named}/kick"), json!({ "user_id": BOB })).await;
    assert_eq!(refused(scene.send_join(&room, &id, &event).await), (403, "M_FORBIDDEN".into()));
    // Nobody gets our word by writing it themselves.
    let mut event = event;
    event["content"] = json!({ "membership": "join" });
    let (id, without) = scene.peer.sign_event(&event, "10");
    assert_eq!(refused(scene.send_join(&room, &id, &without).await), (403, "M_FORBIDDEN".into()));
    event["content"]["join_authorised_via_users_server"] = json!("@nobody:test.example");
    let (id, with) = scene.peer.sign_event(&event, "10");
    assert_eq!(refused(scene.send_join(&room, &id, &with).await), (403, "M_FORBIDDEN".into()));
    assert_eq!(scene.member(&room, BOB).await["membership"], Value::Null);
}

#[tokio::test(start_paused = true)]
async fn a_condition_that_cannot_be_checked_or_granted_has_its_own_code() {
    let scene = Scene::new().await;
    let (named, room) = (scene.room("10").await, scene.room("10").await);
    let unable = |code: &str| (400, format!("M_UNABLE_TO_{code}_JOIN"));
    scene.restrict(&room, "restricted", &["!elsewhere:c.example", &named]).await;
    assert_eq!(refused(scene.make_join(&room, BOB, "?ver=10").await), unable("AUTHORISE"));
    scene.peer.join(&scene.server, &named, BOB).await;
    scene.peer.made(&scene.server, "join", &room, BOB).await;
    // A room that nobody of ours is in any more tells nothing of who is there now.
    scene.alice.ok_post(&format!("/rooms/{named}/leave"), json!({})).await;
    assert_eq!(refused(scene.make_join(&room, BOB, "?ver=10").await), unable("AUTHORISE"));
    let named = scene.room("10").await;
    scene.restrict(&room, "restricted", &[&named]).await;
    scene.peer.join(&scene.server, &named, BOB).await;
    scene
        .set(&room, "m.room.power_levels", json!({ "users": { "@alice:test.example": 60 }, "invite": 100 }))
        .await;
    assert_eq!(refused(scene.make_join(&room, BOB, "?ver=10").await), unable("GRANT"));
    let odd = json!({ "join_rule": "restricted", "allow": [7, { "type": "x" }] });
    scene.set(&room, "m.room.join_rules", odd).await;
    assert_eq!(refused(scene.make_join(&room, BOB, "?ver=10").await), unable("AUTHORISE"));
    scene.set(&room, "m.room.join_rules", json!({ "join_rule": "restricted", "allow": "odd" })).await;
    assert_eq!(refused(scene.make_join(&room, BOB, "?ver=10").await), (403, "M_FORBIDDEN".into()));
}

#[tokio::test(start_paused = true)]
async fn members_are_left_out_for_a_server_that_wants_fewer() {
    let scene = Scene::new().await;
    let room = scene.room("11").await;
    for user in ["@carol:b.example", "@dan:b.example"] {
        scene.peer.join(&scene.server, &room, user).await;
    }
    let join = async |user: &str| {
        let (id, event) = scene.peer.made(&scene.server, "join", &room, user).await;
        let query = format!("{}?omit_members=true", encoded(&id));
        let uri = format!("/_matrix/federation/v2/send_join/{}/{query}", encoded(&room));
        scene.peer.ask(&scene.server, Method::PUT, &uri, Some(&event)).await.1
    };
    let answer = join(BOB).await;
    assert_eq!(answer["members_omitted"], json!(true));
    assert_eq!(answer["servers_in_room"], json!(["b.example", "test.example"]));
    let members =
        |answer: &Value| types(&answer["state"]).iter().filter(|it| **it == "m.room.member").count();
    assert_eq!(members(&answer), 3, "those after whom the room is named");
    scene.set(&room, "m.room.name", json!({ "name": "Named" })).await;
    let answer = join("@erin:b.example").await;
    assert_eq!(members(&answer), 0);
    let (state, chain) = (ids(&answer["state"], "11"), ids(&answer["auth_chain"], "11"));
    assert!(!chain.is_empty() && state.is_disjoint(&chain), "no event is told twice: {answer}");
    for auth in answer["event"]["auth_events"].as_array().unwrap() {
        let auth = auth.as_str().unwrap();
        assert!(chain.contains(auth) || state.contains(auth), "the answer lacks {auth}");
    }
    assert!(types(&answer["state"]).contains(&"m.room.power_levels"));
}

#[tokio::test(start_paused = true)]
async fn a_large_state_comes_whole_though_it_is_sent_in_pieces() {
    let scene = Scene::new().await;
    let room = scene.room("11").await;
    let padding = "x".repeat(6_000);
    for number in 0..150 {
        let path = format!("/rooms/{room}/state/org.example.padding/{number}");
        scene.alice.ok_put(&path, json!({ "padding": padding })).await;
    }
    let (_, answer) = scene.peer.join(&scene.server, &room, BOB).await;
    let padded = types(&answer["state"]).iter().filter(|it| **it == "org.example.padding").count();
    assert_eq!(padded, 150);
    let (last, _) = scene.peer.join(&scene.server, &room, "@carol:b.example").await;
    let uri = format!("/_matrix/federation/v1/state/{room}?event_id={last}");
    let (status, state) = scene.peer.ask(&scene.server, Method::GET, &uri, None).await;
    assert_eq!(status, StatusCode::OK);
    let uri = format!("/_matrix/federation/v1/state_ids/{room}?event_id={last}");
    let (_, named) = scene.peer.ask(&scene.server, Method::GET, &uri, None).await;
    let list = |name: &str| -> BTreeSet<String> {
        named[name].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(ids(&state["pdus"], "11"), list("pdu_ids"));
    assert_eq!(ids(&state["auth_chain"], "11"), list("auth_chain_ids"));
    assert!(!types(&state["pdus"]).is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_state_is_told_only_to_servers_that_are_in_the_room() {
    let scene = Scene::new().await;
    let room = scene.room("11").await;
    let (id, _) = scene.peer.join(&scene.server, &room, BOB).await;
    let stranger = Peer::new(&scene.net, "c.example", "5.0.0.3", 3);
    let uri = format!("/_matrix/federation/v1/state/{room}?event_id={id}");
    let (status, json) = stranger.ask(&scene.server, Method::GET, &uri, None).await;
    assert_eq!((status, &json["errcode"]), (StatusCode::FORBIDDEN, &json!("M_FORBIDDEN")));
    let uri = format!("/_matrix/federation/v1/state/{room}?event_id={}", crate::support::NOWHERE);
    assert_eq!(scene.peer.ask(&scene.server, Method::GET, &uri, None).await.0, StatusCode::NOT_FOUND);
}
