//! `src/rooms/policy.rs`: an event that one endpoint refuses comes in by no other.

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{TestClient, TestServer, encoded},
};

/// A client of a guest, who has no password.
pub(crate) async fn guest(server: &TestServer) -> TestClient {
    let (status, json) = server.anonymous().post("/_matrix/client/v3/register?kind=guest", json!({})).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    let mut guest = server.anonymous();
    guest.token = json["access_token"].as_str().map(str::to_owned);
    guest.user_id = json["user_id"].as_str().unwrap().to_owned();
    guest
}

/// Sets a member event through the endpoint for all state.
pub(crate) async fn set_member(
    by: &TestClient,
    room: &str,
    user_id: &str,
    content: Value,
) -> (StatusCode, Value) {
    by.put(&format!("/_matrix/client/v3/rooms/{room}/state/m.room.member/{user_id}"), content).await
}

async fn create(by: &TestClient, body: Value) -> (StatusCode, Value) {
    by.post("/_matrix/client/v3/createRoom", body).await
}

#[track_caller]
fn refused(answer: (StatusCode, Value), status: u16, errcode: &str) {
    assert_eq!((answer.0.as_u16(), &answer.1["errcode"]), (status, &json!(errcode)), "{}", answer.1);
}

#[tokio::test(start_paused = true)]
async fn nobody_vouches_for_themselves_to_enter_a_restricted_room() {
    let server = TestServer::new();
    let (alice, bob, carol) =
        (server.register("alice").await, server.register("bob").await, server.register("carol").await);
    let space = alice.create(json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{space}"), json!({})).await;
    let allow = json!([{ "type": "m.room_membership", "room_id": space }]);
    for (version, rule) in [("8", "restricted"), ("10", "knock_restricted"), ("12", "restricted")] {
        let rules = json!({ "type": "m.room.join_rules", "content": { "join_rule": rule, "allow": allow } });
        let room = alice.create(json!({ "room_version": version, "initial_state": [rules] })).await;
        let forged = json!({ "membership": "join", "join_authorised_via_users_server": alice.user_id });
        refused(set_member(&carol, &room, &carol.user_id, forged.clone()).await, 403, "M_FORBIDDEN");
        refused(carol.post(&format!("/_matrix/client/v3/join/{room}"), forged).await, 403, "M_FORBIDDEN");
        // A user who may enter enters by this endpoint too, and the server says who authorised it.
        let join = json!({ "membership": "join", "join_authorised_via_users_server": bob.user_id });
        let (status, json) = set_member(&bob, &room, &bob.user_id, join).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        let (_, member) = bob.state(&room, "m.room.member", &bob.user_id).await;
        assert_eq!(member["join_authorised_via_users_server"], alice.user_id);
        // An inviter cannot name an authorising user either.
        let invite = json!({ "membership": "invite", "join_authorised_via_users_server": alice.user_id });
        assert_eq!(set_member(&alice, &room, &carol.user_id, invite).await.0, StatusCode::OK);
        let (_, member) = alice.state(&room, "m.room.member", &carol.user_id).await;
        assert_eq!(member, json!({ "membership": "invite" }));
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_may_invite_vouches_also_where_few_may() {
    let server = TestServer::new();
    let (alice, bob, carol) =
        (server.register("alice").await, server.register("bob").await, server.register("carol").await);
    let space = bob.create(json!({ "preset": "public_chat" })).await;
    carol.ok_post(&format!("/join/{space}"), json!({})).await;
    let allow = json!([{ "type": "m.room_membership", "room_id": space }]);
    let rules = json!({ "join_rule": "restricted", "allow": allow });
    let room = alice.create(json!({ "room_version": "10", "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    let levels = json!({ "users": { alice.user_id.clone(): 100, bob.user_id.clone(): 50 }, "invite": 50 });
    alice.ok_put(&format!("/rooms/{room}/state/m.room.power_levels"), levels).await;
    alice.ok_put(&format!("/rooms/{room}/state/m.room.join_rules"), rules).await;
    alice.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
    carol.ok_post(&format!("/join/{room}"), json!({})).await;
    let (_, member) = bob.state(&room, "m.room.member", &carol.user_id).await;
    assert_eq!(member["join_authorised_via_users_server"], bob.user_id, "Alice has left");
    // Where nobody is left who may invite, nobody is let in.
    carol.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
    bob.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
    refused(carol.post(&format!("/_matrix/client/v3/join/{room}"), json!({})).await, 403, "M_FORBIDDEN");
}

#[tokio::test(start_paused = true)]
async fn an_invitation_is_judged_alike_by_whichever_endpoint_it_comes() {
    let server = TestServer::new();
    let (alice, bob, gone) =
        (server.register("alice").await, server.register("bob").await, server.register("gone").await);
    let config = format!("/user/{}/account_data/m.invite_permission_config", bob.user_id);
    bob.ok_put(&config, json!({ "default_action": "block" })).await;
    let auth = json!({ "type": "m.login.password", "password": "password of gone",
        "identifier": { "type": "m.id.user", "user": "gone" } });
    gone.ok_post("/account/deactivate", json!({ "auth": auth })).await;
    let room = alice.create(json!({})).await;
    for (user, status, errcode) in [
        (bob.user_id.as_str(), 403, "M_INVITE_BLOCKED"),
        ("@nobody:test.example", 404, "M_NOT_FOUND"),
        (gone.user_id.as_str(), 403, "M_FORBIDDEN"),
    ] {
        let invite = json!({ "membership": "invite" });
        refused(set_member(&alice, &room, user, invite.clone()).await, status, errcode);
        let path = format!("/_matrix/client/v3/rooms/{room}/invite");
        refused(alice.post(&path, json!({ "user_id": user })).await, status, errcode);
        refused(create(&alice, json!({ "invite": [user] })).await, status, errcode);
        let state = json!({ "type": "m.room.member", "state_key": user, "content": invite });
        refused(create(&alice, json!({ "initial_state": [state] })).await, status, errcode);
        assert_eq!(alice.state(&room, "m.room.member", user).await.0, StatusCode::NOT_FOUND);
    }
    // The server of a user must agree first, and here is no other.
    let far = "@far:other.example";
    let invite = json!({ "membership": "invite" });
    refused(set_member(&alice, &room, far, invite).await, 502, "M_UNKNOWN");
    let path = format!("/_matrix/client/v3/rooms/{room}/invite");
    refused(alice.post(&path, json!({ "user_id": far })).await, 502, "M_UNKNOWN");
    assert_eq!(alice.state(&room, "m.room.member", far).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test(start_paused = true)]
async fn a_room_calls_no_alias_its_own_that_names_another() {
    let server = TestServer::new();
    let (alice, mallory) = (server.register("alice").await, server.register("mallory").await);
    let good = alice.create(json!({ "preset": "public_chat", "room_alias_name": "good" })).await;
    let room = mallory.create(json!({ "preset": "public_chat" })).await;
    for content in [
        json!({ "alias": "#good:test.example" }),
        json!({ "alt_aliases": ["#good:test.example"] }),
        json!({ "alias": "#none:test.example" }),
        json!({ "alias": "#far:other.example" }),
    ] {
        let path = format!("/_matrix/client/v3/rooms/{room}/state/m.room.canonical_alias");
        refused(mallory.put(&path, content.clone()).await, 400, "M_BAD_ALIAS");
        let state = json!({ "type": "m.room.canonical_alias", "content": content });
        refused(create(&mallory, json!({ "initial_state": [state] })).await, 400, "M_BAD_ALIAS");
    }
    // The alias that the request itself makes is the room's own.
    let state = json!({ "type": "m.room.canonical_alias",
        "content": { "alias": "#mine:test.example", "alt_aliases": ["#mine:test.example"] } });
    let body = json!({ "room_alias_name": "mine", "initial_state": [state], "visibility": "public" });
    let mine = mallory.create(body).await;
    let chunk = mallory.ok_get("/publicRooms").await["chunk"].clone();
    assert_eq!(
        (&chunk[0]["room_id"], &chunk[0]["canonical_alias"]),
        (&json!(mine), &json!("#mine:test.example"))
    );
    assert_eq!(alice.ok_get("/directory/room/%23good:test.example").await["room_id"], good);
}

#[tokio::test(start_paused = true)]
async fn guests_enter_no_room_that_is_closed_to_them_by_any_endpoint() {
    let server = TestServer::with(|config| config.registration.guests = true);
    let alice = server.register("alice").await;
    let visitor = guest(&server).await;
    let closed = alice.create(json!({ "preset": "public_chat" })).await;
    let join = json!({ "membership": "join" });
    refused(
        set_member(&visitor, &closed, &visitor.user_id, join.clone()).await,
        403,
        "M_GUEST_ACCESS_FORBIDDEN",
    );
    let path = format!("/_matrix/client/v3/join/{closed}");
    refused(visitor.post(&path, json!({})).await, 403, "M_GUEST_ACCESS_FORBIDDEN");
    // An invitation does not open the door either.
    alice.ok_post(&format!("/rooms/{closed}/invite"), json!({ "user_id": visitor.user_id })).await;
    refused(
        set_member(&visitor, &closed, &visitor.user_id, join.clone()).await,
        403,
        "M_GUEST_ACCESS_FORBIDDEN",
    );

    let open = json!({ "type": "m.room.guest_access", "content": { "guest_access": "can_join" } });
    let room = alice.create(json!({ "preset": "public_chat", "initial_state": [open] })).await;
    let (status, json) = set_member(&visitor, &room, &visitor.user_id, join).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    let levels = json!({ "users": { visitor.user_id.clone(): 100 }, "invite": 0 });
    alice.ok_put(&format!("/rooms/{room}/state/m.room.power_levels"), levels).await;
    let bob = server.register("bob").await;
    // Guests do not do by this endpoint what they have no endpoint of its own for.
    for (user, membership) in [(&bob, "invite"), (&bob, "ban"), (&visitor, "knock")] {
        let content = json!({ "membership": membership });
        refused(set_member(&visitor, &room, &user.user_id, content).await, 403, "M_GUEST_ACCESS_FORBIDDEN");
    }
    assert_eq!(
        set_member(&visitor, &room, &visitor.user_id, json!({ "membership": "leave" })).await.0,
        StatusCode::OK
    );
}

#[tokio::test(start_paused = true)]
async fn nobody_but_an_application_service_says_when_an_event_was_sent() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    let sent =
        alice.ok_put(&format!("/rooms/{room}/send/m.room.message/1?ts=1000"), json!({ "body": "x" })).await;
    let set =
        alice.ok_put(&format!("/rooms/{room}/state/m.room.name/?ts=1000"), json!({ "name": "x" })).await;
    for answer in [sent, set] {
        let id = encoded(answer["event_id"].as_str().unwrap());
        let event = alice.ok_get(&format!("/rooms/{room}/event/{id}")).await;
        assert!(event["origin_server_ts"].as_u64().unwrap() >= crate::support::BEGAN_MS, "{event}");
    }
}

/// Somebody who is not in a room can be put out of it by no endpoint.
#[tokio::test(start_paused = true)]
async fn nobody_is_kicked_who_is_not_in_the_room() {
    let server = TestServer::new();
    let (alice, bob, carol) =
        (server.register("alice").await, server.register("bob").await, server.register("carol").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    let leave = || json!({ "membership": "leave" });
    for gone in [&bob, &carol] {
        if gone.user_id == carol.user_id {
            carol.ok_post(&format!("/join/{room}"), json!({})).await;
            carol.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
        }
        let before = alice.state(&room, "m.room.member", &gone.user_id).await;
        let kick = format!("/_matrix/client/v3/rooms/{room}/kick");
        refused(alice.post(&kick, json!({ "user_id": gone.user_id })).await, 403, "M_FORBIDDEN");
        let with_reason = json!({ "membership": "leave", "reason": "spam" });
        for content in [leave(), with_reason] {
            refused(set_member(&alice, &room, &gone.user_id, content).await, 403, "M_FORBIDDEN");
        }
        assert_eq!(alice.state(&room, "m.room.member", &gone.user_id).await, before);
    }
    // A stranger to the room learns nothing of who is in it.
    let mut answers = Vec::new();
    for other in [&alice, &carol, &bob] {
        let stranger = server.register(&format!("stranger{}", answers.len())).await;
        answers.push(set_member(&stranger, &room, &other.user_id, leave()).await);
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    let state = json!({ "type": "m.room.member", "state_key": bob.user_id, "content": leave() });
    refused(create(&alice, json!({ "initial_state": [state] })).await, 403, "M_FORBIDDEN");
    // An invitation and a ban are taken back, and a member is kicked, by this endpoint too.
    for before in ["invite", "ban", "join"] {
        let by = if before == "join" { &bob } else { &alice };
        let (status, json) = set_member(by, &room, &bob.user_id, json!({ "membership": before })).await;
        assert_eq!(status, StatusCode::OK, "{before}: {json}");
        let (status, json) = set_member(&alice, &room, &bob.user_id, leave()).await;
        assert_eq!(status, StatusCode::OK, "{before}: {json}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_condition_that_is_unknown_closes_no_restricted_room() {
    let server = TestServer::new();
    let (alice, bob, carol) =
        (server.register("alice").await, server.register("bob").await, server.register("carol").await);
    let space = alice.create(json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{space}"), json!({})).await;
    let good = json!({ "type": "m.room_membership", "room_id": space });
    for odd in [
        json!({ "type": "m.room_membership", "room_id": "nonsense" }),
        json!({ "type": "m.room_membership", "room_id": 7 }),
        json!({ "type": "org.example.paid", "room_id": 7 }),
        json!({ "room_id": space }),
        json!("odd"),
        Value::Null,
    ] {
        let rules = json!({ "join_rule": "restricted", "allow": [odd, good, odd] });
        let rules = json!({ "type": "m.room.join_rules", "content": rules });
        let room = alice.create(json!({ "initial_state": [rules] })).await;
        let join = format!("/_matrix/client/v3/join/{room}");
        let (status, json) = bob.post(&join, json!({})).await;
        assert_eq!(status, StatusCode::OK, "{odd}: {json}");
        refused(carol.post(&join, json!({})).await, 403, "M_FORBIDDEN");
    }
    let rules =
        json!({ "type": "m.room.join_rules", "content": { "join_rule": "restricted", "allow": good } });
    let room = alice.create(json!({ "initial_state": [rules] })).await;
    refused(bob.post(&format!("/_matrix/client/v3/join/{room}"), json!({})).await, 403, "M_FORBIDDEN");
}

#[tokio::test(start_paused = true)]
async fn guests_redact_by_no_endpoint() {
    let server = TestServer::with(|config| config.registration.guests = true);
    let alice = server.register("alice").await;
    let visitor = guest(&server).await;
    let open = json!({ "type": "m.room.guest_access", "content": { "guest_access": "can_join" } });
    for version in ["10", "12"] {
        let body = json!({ "preset": "public_chat", "initial_state": [open], "room_version": version });
        let room = alice.create(body).await;
        visitor.ok_post(&format!("/join/{room}"), json!({})).await;
        let said = visitor.say(&room, "1", "hello").await;
        let base = format!("/_matrix/client/v3/rooms/{room}");
        let send = visitor.put(&format!("{base}/send/m.room.redaction/2"), json!({ "redacts": said })).await;
        refused(send, 403, "M_GUEST_ACCESS_FORBIDDEN");
        let redact = visitor.put(&format!("{base}/redact/{}/3", encoded(&said)), json!({})).await;
        refused(redact, 403, "M_GUEST_ACCESS_FORBIDDEN");
        let event = alice.ok_get(&format!("/rooms/{room}/event/{}", encoded(&said))).await;
        assert_eq!(event["content"]["body"], "hello");
    }
}

/// The specification allows any characters in an alias but a colon and NUL, and 255 bytes in all.
#[tokio::test(start_paused = true)]
async fn an_alias_is_judged_alike_by_whichever_endpoint_it_comes() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    let longest = "a".repeat(255 - "#:test.example".len());
    let too_long = format!("{longest}a");
    let names = ["a b", "\u{3000}", "\t", "#", "!x", "ü☎", &longest, "", "a:b", "a\0b", &too_long];
    for (number, name) in names.into_iter().enumerate() {
        let path: String =
            format!("#{name}:test.example").bytes().map(|byte| format!("%{byte:02X}")).collect();
        let path = format!("/_matrix/client/v3/directory/room/{path}");
        let expected = if number < 7 { 200 } else { 400 };
        let (status, json) = alice.put(&path, json!({ "room_id": room })).await;
        assert_eq!(status.as_u16(), expected, "{name:?}: {json}");
        if expected == 200 {
            assert_eq!(alice.delete(&path, json!({})).await.0, StatusCode::OK, "{name:?}");
        }
        let (status, json) = create(&alice, json!({ "room_alias_name": name })).await;
        assert_eq!(status.as_u16(), expected, "{name:?}: {json}");
        if expected == 400 {
            assert_eq!(json["errcode"], "M_INVALID_PARAM", "{name:?}: {json}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_room_is_made_only_with_a_visibility_that_there_is() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    for odd in ["bogus", "", "Public"] {
        for preset in [Value::Null, json!("private_chat")] {
            let (status, json) = create(&alice, json!({ "visibility": odd, "preset": preset })).await;
            assert!(json["error"].as_str().is_some_and(|why| why.contains("`visibility`")), "{json}");
            refused((status, json), 400, "M_INVALID_PARAM");
        }
    }
    assert_eq!(alice.ok_get("/joined_rooms").await["joined_rooms"], json!([]));
}

#[tokio::test(start_paused = true)]
async fn a_redaction_is_no_piece_of_state() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    for version in ["10", "11", "12"] {
        let room = alice.create(json!({ "room_version": version })).await;
        let said = alice.say(&room, "1", "hello").await;
        let path = format!("/_matrix/client/v3/rooms/{room}/state/m.room.redaction/");
        refused(alice.put(&path, json!({ "redacts": said })).await, 400, "M_BAD_JSON");
        let state = json!({ "type": "m.room.redaction", "content": { "redacts": said } });
        refused(create(&alice, json!({ "initial_state": [state] })).await, 400, "M_INVALID_ROOM_STATE");
    }
}

/// A user who joins by setting their own member event has joined like anybody else, so their settings come along.
#[tokio::test(start_paused = true)]
async fn a_join_by_the_endpoint_for_state_is_followed_up_like_any() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let old = alice.create(json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{old}"), json!({})).await;
    let tags = |room: &str| format!("/user/{}/rooms/{room}/tags", bob.user_id);
    bob.ok_put(&format!("{}/m.favourite", tags(&old)), json!({ "order": 0.5 })).await;
    let new = alice
        .create(json!({ "preset": "public_chat", "creation_content": { "predecessor": { "room_id": old } } }))
        .await;
    let tombstone = format!("/rooms/{old}/state/m.room.tombstone");
    alice.ok_put(&tombstone, json!({ "body": "moved", "replacement_room": new })).await;
    let (status, json) = set_member(&bob, &new, &bob.user_id, json!({ "membership": "join" })).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    assert_eq!(bob.ok_get(&tags(&new)).await["tags"]["m.favourite"]["order"], 0.5);
    // A new name in the room is no second join.
    let renamed = json!({ "membership": "join", "displayname": "Bobby" });
    let first = set_member(&bob, &new, &bob.user_id, renamed.clone()).await.1;
    assert_eq!(
        set_member(&bob, &new, &bob.user_id, renamed).await.1,
        first,
        "set again, it is the same event"
    );
}

async fn membership(by: &TestClient, room: &str, of: &TestClient) -> Value {
    by.state(room, "m.room.member", &of.user_id).await.1["membership"].clone()
}

/// The number of member events of somebody in a room.
async fn member_events(by: &TestClient, room: &str, of: &TestClient) -> usize {
    let page = by.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=100")).await;
    page["chunk"].as_array().unwrap().iter().filter(|event| event["state_key"] == of.user_id.as_str()).count()
}

#[tokio::test(start_paused = true)]
async fn guests_are_taken_out_of_a_room_that_closes_to_them_and_once() {
    let server = TestServer::with(|config| config.registration.guests = true);
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let visitor = guest(&server).await;
    let app = server.server().app();
    let wait = async || app.env.sleep(std::time::Duration::from_secs(5)).await;
    let open = json!({ "type": "m.room.guest_access", "content": { "guest_access": "can_join" } });
    let body = json!({ "preset": "public_chat", "initial_state": [open] });
    let (room, other) = (alice.create(body.clone()).await, alice.create(body).await);
    for client in [&bob, &visitor] {
        client.ok_post(&format!("/join/{room}"), json!({})).await;
        client.ok_post(&format!("/join/{other}"), json!({})).await;
    }
    let access = format!("/rooms/{room}/state/m.room.guest_access/");
    // An event that allows guests again closes nothing.
    alice.ok_put(&access, json!({ "guest_access": "can_join", "again": true })).await;
    wait().await;
    assert_eq!(membership(&alice, &room, &visitor).await, "join");

    for closed in [Some(json!({ "guest_access": "forbidden" })), Some(json!({})), None] {
        let opened = alice.ok_put(&access, json!({ "guest_access": "can_join" })).await;
        visitor.ok_post(&format!("/join/{room}"), json!({})).await;
        wait().await;
        let before = member_events(&alice, &room, &visitor).await;
        match closed {
            Some(content) => alice.ok_put(&access, content).await,
            // The event that opened the room stays in its state, and allows nothing any more.
            None => {
                let opened = opened["event_id"].as_str().unwrap();
                alice.ok_put(&format!("/rooms/{room}/redact/{opened}/r"), json!({})).await
            }
        };
        wait().await;
        assert_eq!(membership(&alice, &room, &visitor).await, "leave");
        assert_eq!(membership(&alice, &room, &bob).await, "join", "Bob is no guest");
        assert_eq!(membership(&alice, &other, &visitor).await, "join", "the other room is open");
        assert_eq!(member_events(&alice, &room, &visitor).await, before + 1);
    }

    // A reader that lost its place reads everything again, and does nothing a second time.
    let before = member_events(&alice, &room, &visitor).await;
    let store = app.store.clone();
    let mut batch = store.batch(&aqueduct::store::Guard::alone());
    aqueduct::store::cursor::remove(&mut batch, "guests");
    store.enqueue(batch).unwrap().flushed.await.unwrap();
    server.server().stop().await.unwrap();
    let again = TestServer::over(store, |config| config.registration.guests = true);
    again.server().app().env.sleep(std::time::Duration::from_secs(5)).await;
    let position = aqueduct::store::cursor::find(&*again.server().app().store.snapshot(), "guests").unwrap();
    assert!(position.is_some_and(|position| position.number() > 0), "it has read on");
    let alice = TestClient { server: again.clone(), ..alice };
    assert_eq!(member_events(&alice, &room, &visitor).await, before);
}

/// The process ends between the closing of a room and the leaving of its guests.
#[tokio::test(start_paused = true)]
async fn guests_are_taken_out_after_a_crash_too() {
    let server = TestServer::with(|config| config.registration.guests = true);
    let alice = server.register("alice").await;
    let visitor = guest(&server).await;
    let open = json!({ "type": "m.room.guest_access", "content": { "guest_access": "can_join" } });
    let room = alice.create(json!({ "preset": "public_chat", "initial_state": [open] })).await;
    visitor.ok_post(&format!("/join/{room}"), json!({})).await;
    alice.ok_put(&format!("/rooms/{room}/state/m.room.guest_access/"), json!({ "guest_access": "x" })).await;
    let store = server.server().app().store.clone();
    server.server().stop().await.unwrap();
    assert_eq!(membership(&alice, &room, &visitor).await, "join", "nobody had the time");
    let again = TestServer::over(store, |config| config.registration.guests = true);
    again.server().app().env.sleep(std::time::Duration::from_secs(5)).await;
    let alice = TestClient { server: again.clone(), ..alice };
    assert_eq!(membership(&alice, &room, &visitor).await, "leave");
    // A check knows the transaction by which the server itself took the guest out.
    again.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_room_begins_with_a_bounded_number_of_state_events() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let states = |count: usize| -> Vec<_> {
        (0..count).map(|key| json!({ "type": "a", "state_key": key.to_string(), "content": {} })).collect()
    };
    for count in [20_000, 1_001] {
        refused(create(&alice, json!({ "initial_state": states(count) })).await, 413, "M_TOO_LARGE");
    }
    let room = alice.create(json!({ "initial_state": states(1_000) })).await;
    let state = alice.ok_get(&format!("/rooms/{room}/state")).await;
    assert!(state.as_array().unwrap().len() > 1_000);
}

#[tokio::test(start_paused = true)]
async fn a_room_is_listed_where_nothing_is_said_of_its_visibility() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    let path = format!("/directory/list/room/{room}");
    for (body, visibility) in
        [(json!({}), "public"), (json!({ "visibility": "private" }), "private"), (json!({}), "public")]
    {
        alice.ok_put(&path, body).await;
        assert_eq!(alice.ok_get(&path).await["visibility"], visibility);
    }
    let odd = alice.put(&format!("/_matrix/client/v3{path}"), json!({ "visibility": "odd" })).await;
    refused(odd, 400, "M_INVALID_PARAM");
}

#[tokio::test(start_paused = true)]
async fn nobody_who_is_not_in_a_room_adds_an_event_to_it() {
    let server = TestServer::with(|config| config.registration.guests = true);
    let (alice, bob, carol) =
        (server.register("alice").await, server.register("bob").await, server.register("carol").await);
    let visitor = guest(&server).await;
    for version in ["1", "2", "3", "4", "5", "6", "11", "12"] {
        let room = alice.create(json!({ "room_version": version, "preset": "public_chat" })).await;
        alice.ok_post(&format!("/rooms/{room}/ban"), json!({ "user_id": bob.user_id })).await;
        let before = alice.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=1")).await;
        let path = format!("/_matrix/client/v3/rooms/{room}");
        for outsider in [&bob, &carol, &visitor] {
            let content =
                json!({ "aliases": [], "body": "buy", "m.mentions": { "user_ids": [alice.user_id] } });
            for state in ["m.room.aliases/test.example", "m.room.aliases", "m.room.topic", "org.test/x"] {
                let answer = outsider.put(&format!("{path}/state/{state}"), content.clone()).await;
                assert_eq!(answer.0, StatusCode::FORBIDDEN, "{version} {state}: {}", answer.1);
            }
            for event_type in ["m.room.aliases", "m.room.message", "m.reaction"] {
                let answer = outsider.put(&format!("{path}/send/{event_type}/1"), content.clone()).await;
                assert_eq!(answer.0, StatusCode::FORBIDDEN, "{version} {event_type}: {}", answer.1);
            }
            for (user_id, membership) in
                [(&alice.user_id, "invite"), (&outsider.user_id, "invite"), (&outsider.user_id, "ban")]
            {
                let content = json!({ "membership": membership, "third_party_invite": { "signed": {} } });
                let answer = set_member(outsider, &room, user_id, content).await;
                assert_eq!(answer.0, StatusCode::FORBIDDEN, "{version} {membership}: {}", answer.1);
            }
        }
        let after = alice.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=1")).await;
        assert_eq!(after["chunk"][0]["event_id"], before["chunk"][0]["event_id"]);
        // A member sets it as before.
        let aliases = json!({ "aliases": [] });
        alice.ok_put(&format!("/rooms/{room}/state/m.room.aliases/test.example"), aliases).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_room_that_nobody_is_in_is_not_listed() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let listed = async || alice.ok_get("/publicRooms").await["chunk"].as_array().unwrap().len();
    let body = json!({ "preset": "public_chat", "visibility": "public" });
    let room = alice.create(body.clone()).await;
    assert_eq!(listed().await, 1);
    alice.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
    assert_eq!(listed().await, 0, "everybody has left");
    let leave =
        json!({ "type": "m.room.member", "state_key": alice.user_id, "content": { "membership": "leave" } });
    let mut left_at_once = body;
    left_at_once["initial_state"] = json!([leave]);
    let (status, json) = create(&alice, left_at_once).await;
    assert!(status == StatusCode::OK || status == StatusCode::BAD_REQUEST, "{json}");
    assert_eq!(listed().await, 0, "its creator has left");
    alice.ok_post(&format!("/join/{room}"), json!({})).await;
    assert_eq!(listed().await, 1, "somebody came back");
}
