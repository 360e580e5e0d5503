//! Invitations between servers, and knocks (server-server API, "Inviting to a room", "Leaving Rooms", "Knocking upon a room").

mod bounds;
mod hang_ups;

use std::{sync::Arc, time::Duration};

use aqueduct::{rooms::build::Signer, schema::rooms::Membership};
use federation::testing::{Net, Weather, json as answer, key_pair};
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{
        TestClient, TestServer, encoded,
        federated::Federated,
        network::{Peer, doors},
        scripted::{ALICE, Elsewhere, Made, Tamper, honest},
    },
};

const BOB: &str = "@bob:test.example";

/// The server under test in a network with the one server of a room, which may sign requests.
struct Against {
    server: TestServer,
    bob: TestClient,
    peer: Peer,
    net: Net,
    asked: Arc<std::sync::Mutex<Vec<(String, Value)>>>,
}

impl Against {
    async fn new(room: &Elsewhere, tamper: Tamper) -> Self {
        Self::with(room, tamper, |_| {}).await
    }

    async fn with(room: &Elsewhere, tamper: Tamper, set: impl FnOnce(&mut aqueduct::config::Config)) -> Self {
        let net = Net::new(1);
        let asked = room.serve(&net, tamper);
        let store = aqueduct::store::Store::open(
            aqueduct::store::Engine::Memory(aqueduct::store::engine::Memory::default()),
            aqueduct::store::Durability::Fsync,
        );
        let server = TestServer::start(doors(&net), store.unwrap(), set);
        let bob = server.register("bob").await;
        Self { server, bob, peer: Peer::unheard("a.example", 9), net, asked }
    }

    async fn invite(&self, room: &Elsewhere, event: &Made) -> (StatusCode, Value) {
        self.put(room, event, &body(room, event)).await
    }

    async fn put(&self, room: &Elsewhere, event: &Made, body: &Value) -> (StatusCode, Value) {
        let (room, event) = (encoded(room.room_id.as_str()), encoded(event.id.as_str()));
        let uri = format!("/_matrix/federation/v2/invite/{room}/{event}");
        self.peer.ask(&self.server, Method::PUT, &uri, Some(body)).await
    }
}

fn invitation(room: &Elsewhere, user: &str) -> Made {
    room.event(ALICE, "m.room.member", Some(user), json!({ "membership": "invite" }))
}

fn body(room: &Elsewhere, event: &Made) -> Value {
    let state: Vec<_> = room.state.values().map(|event| &event.json).collect();
    json!({ "room_version": room.version.to_string(), "event": event.json, "invite_room_state": state })
}

/// The whole path of an endpoint for clients.
fn api(path: &str) -> String {
    format!("/_matrix/client/v3{path}")
}

async fn invited(client: &TestClient, room: &str) -> Value {
    client.ok_get("/sync").await["rooms"]["invite"][room].clone()
}

#[tokio::test(start_paused = true)]
async fn an_invitation_of_another_server_is_signed_and_told() {
    for version in [1, 2, 3, 11, 12] {
        let room = Elsewhere::new(version);
        let it = Against::new(&room, honest()).await;
        let since = it.bob.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
        let event = invitation(&room, BOB);
        let (status, signed) = it.invite(&room, &event).await;
        assert_eq!(status, StatusCode::OK, "{signed}");
        let mut signed = signed["event"].clone();
        let ours = signed["signatures"].as_object_mut().unwrap().remove("test.example");
        assert!(ours.is_some(), "{signed}");
        assert_eq!(signed, event.json, "nothing else is changed");
        let room_id = room.room_id.as_str();
        for path in ["/sync".to_owned(), format!("/sync?since={since}")] {
            let told =
                it.bob.ok_get(&path).await["rooms"]["invite"][room_id]["invite_state"]["events"].clone();
            let told = told.as_array().unwrap().clone();
            // The power levels of the room tell nobody which room it is.
            assert!(told.iter().all(|event| event["type"] != "m.room.power_levels"), "{told:?}");
            assert_eq!(told.len(), room.state.len(), "{told:?}");
            assert_eq!(told.last().unwrap()["state_key"], BOB);
            let name = told.iter().find(|event| event["type"] == "m.room.name").unwrap();
            let stripped = json!({ "type": "m.room.name", "sender": ALICE, "state_key": "", "content": { "name": "Elsewhere" } });
            assert_eq!(*name, stripped);
        }
        for path in ["state", "members", "messages?dir=b", "joined_members", "state/m.room.name"] {
            let (status, told) =
                it.bob.get(&format!("/_matrix/client/v3/rooms/{}/{path}", encoded(room_id))).await;
            assert_eq!(status, StatusCode::FORBIDDEN, "{path}: {told}");
        }
        assert_eq!(it.bob.ok_get("/joined_rooms").await["joined_rooms"], json!([]));
        it.server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_no_invitation_of_a_user_of_ours_by_theirs_is_not_signed() {
    let room = Elsewhere::new(11);
    let it = Against::new(&room, honest()).await;
    let join = json!({ "membership": "join" });
    let invite = json!({ "membership": "invite" });
    let odd = [
        room.event(ALICE, "m.room.member", Some(BOB), join),
        room.event(ALICE, "m.room.message", Some(BOB), invite.clone()),
        room.event(ALICE, "m.room.member", Some("@bob:other.example"), invite.clone()),
        room.event(ALICE, "m.room.member", Some("bob"), invite.clone()),
    ];
    for event in &odd {
        let (status, told) = it.invite(&room, event).await;
        assert_eq!(
            (status, &told["errcode"]),
            (StatusCode::BAD_REQUEST, &json!("M_INVALID_PARAM")),
            "{told}"
        );
    }
    // The server of another user has not signed it.
    let of_other = room.event("@eve:b.example", "m.room.member", Some(BOB), invite.clone());
    let (status, told) = it.invite(&room, &of_other).await;
    assert_eq!((status, &told["errcode"]), (StatusCode::FORBIDDEN, &json!("M_FORBIDDEN")), "{told}");
    let event = invitation(&room, BOB);
    let mut forged = event.clone();
    forged.json["signatures"] = json!({ "a.example": { "ed25519:k": "A".repeat(86) } });
    let mut changed = event.clone();
    changed.json["content"]["displayname"] = json!("Eve");
    let mut unsigned = event.clone();
    unsigned.json["signatures"] = json!({});
    let mut with_float = event.clone();
    with_float.json["content"]["org.example.x"] = json!(1.5);
    let other_room = room.with_id("!other:a.example");
    for (of, event, status, code) in [
        (&room, &forged, StatusCode::FORBIDDEN, "M_FORBIDDEN"),
        (&room, &changed, StatusCode::BAD_REQUEST, "M_INVALID_PARAM"),
        (&room, &unsigned, StatusCode::FORBIDDEN, "M_FORBIDDEN"),
        (&room, &with_float, StatusCode::BAD_REQUEST, "M_BAD_JSON"),
        (&other_room, &event, StatusCode::BAD_REQUEST, "M_BAD_JSON"),
    ] {
        let (told_status, told) = it.invite(of, event).await;
        assert_eq!((told_status, &told["errcode"]), (status, &json!(code)), "{told}");
    }
    let wrong_id = Made { id: odd[0].id.clone(), json: event.json.clone() };
    assert_eq!(it.invite(&room, &wrong_id).await.0, StatusCode::BAD_REQUEST);
    for version in [json!("0"), json!("13"), json!("x")] {
        let mut body = body(&room, &event);
        body["room_version"] = version;
        let (status, told) = it.put(&room, &event, &body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert_eq!(told["errcode"], "M_INCOMPATIBLE_ROOM_VERSION", "{told}");
    }
    let nobody = invitation(&room, "@nobody:test.example");
    assert_eq!(it.invite(&room, &nobody).await.0, StatusCode::NOT_FOUND);
    let mut many = body(&room, &event);
    many["invite_room_state"] = json!(vec![event.json.clone(); 101]);
    assert_eq!(it.put(&room, &event, &many).await.0, StatusCode::BAD_REQUEST);
    assert_eq!(invited(&it.bob, room.room_id.as_str()).await, Value::Null, "nothing was taken in");
    it.server.assert_whole();
    assert_eq!(it.invite(&room, &event).await.0, StatusCode::OK, "all else was right");
}

#[tokio::test(start_paused = true)]
async fn an_invitation_of_version_12_proves_which_room_it_is_to() {
    let room = Elsewhere::new(12);
    let mut other = Elsewhere::new(12);
    other.add("m.room.topic", Some(""), json!({ "topic": "x" }));
    let it = Against::new(&room, honest()).await;
    let event = invitation(&room, BOB);
    let changes: [(&str, Spoil<'_>); 6] = [
        ("none", &|state| state.clear()),
        ("no create event", &|state| state.retain(|event| event["type"] != "m.room.create")),
        ("another's create event", &|state| {
            for event in state.iter_mut().filter(|event| event["type"] == "m.room.create") {
                event["content"]["room_version"] = json!("12");
                event["origin_server_ts"] = json!(7);
            }
        }),
        ("a stripped event", &|state| {
            state.push(json!({ "type": "m.room.topic", "state_key": "", "sender": ALICE, "content": {} }));
        }),
        ("a forged event", &|state| {
            for event in state.iter_mut().filter(|event| event["type"] == "m.room.name") {
                event["depth"] = json!(77);
            }
        }),
        ("an event of another room", &|state| {
            let mut name = state.iter().find(|event| event["type"] == "m.room.name").unwrap().clone();
            name["room_id"] = json!("!AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA");
            state.push(name);
        }),
    ];
    for (what, change) in changes {
        let mut body = body(&room, &event);
        change(body["invite_room_state"].as_array_mut().unwrap());
        let (status, told) = it.put(&room, &event, &body).await;
        assert_eq!(
            (status, &told["errcode"]),
            (StatusCode::BAD_REQUEST, &json!("M_INVALID_PARAM")),
            "{what}: {told}"
        );
    }
    assert_eq!(invited(&it.bob, room.room_id.as_str()).await, Value::Null);
    assert_eq!(it.invite(&room, &event).await.0, StatusCode::OK);
}

/// Whether guests may join says the room, which is unknown here until somebody else is in it.
#[tokio::test(start_paused = true)]
async fn a_guest_is_invited_like_others_and_comes_into_no_room_that_only_others_are_in() {
    let room = Elsewhere::new(11);
    let it = Against::with(&room, honest(), |config| config.registration.guests = true).await;
    let guest = crate::policy::guest(&it.server).await;
    let (status, told) = it.invite(&room, &invitation(&room, &guest.user_id)).await;
    assert_eq!(status, StatusCode::OK, "{told}");
    assert!(invited(&guest, room.room_id.as_str()).await.is_object());
    let path = format!("/_matrix/client/v3/rooms/{}/join", encoded(room.room_id.as_str()));
    let (status, told) = guest.post(&path, json!({})).await;
    assert_eq!(
        (status, &told["errcode"]),
        (StatusCode::FORBIDDEN, &json!("M_GUEST_ACCESS_FORBIDDEN")),
        "{told}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_user_who_takes_no_invitations_gets_none_from_elsewhere() {
    let room = Elsewhere::new(11);
    let it = Against::new(&room, honest()).await;
    let path = format!("/user/{BOB}/account_data/m.invite_permission_config");
    it.bob.ok_put(&path, json!({ "default_action": "block" })).await;
    let (status, told) = it.invite(&room, &invitation(&room, BOB)).await;
    assert_eq!((status, &told["errcode"]), (StatusCode::FORBIDDEN, &json!("M_INVITE_BLOCKED")));
    it.bob.ok_put(&path, json!({})).await;
    assert_eq!(invited(&it.bob, room.room_id.as_str()).await, Value::Null);
}

/// The account data by which users choose their inviters.
const INVITERS: &str = "org.matrix.msc4155.invite_permission_config";

#[tokio::test(start_paused = true)]
async fn invitations_from_elsewhere_are_filtered_by_inviter_and_server() {
    let refused = Some((StatusCode::FORBIDDEN, "M_INVITE_BLOCKED"));
    for (config, refused, shown) in [
        (json!({ "blocked_users": [ALICE] }), refused, false),
        (json!({ "blocked_servers": ["a.example"] }), refused, false),
        (json!({ "blocked_users": ["@*:a.exampl?"] }), refused, false),
        (json!({ "blocked_servers": ["*"] }), refused, false),
        (json!({ "ignored_users": [ALICE] }), None, false),
        (json!({ "ignored_servers": ["?.example"], "blocked_servers": ["*"] }), None, false),
        (json!({ "allowed_users": [ALICE], "ignored_users": ["*"], "blocked_servers": ["*"] }), None, true),
        (json!({ "allowed_servers": ["a.example"], "blocked_servers": ["*"] }), None, true),
        (json!({ "enabled": false, "blocked_servers": ["*"] }), None, true),
        (json!({ "blocked_users": null, "allowed_servers": null, "ignored_servers": "*" }), None, true),
    ] {
        let room = Elsewhere::new(11);
        let it = Against::new(&room, honest()).await;
        it.bob.ok_put(&format!("/user/{BOB}/account_data/{INVITERS}"), config.clone()).await;
        let since = it.bob.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
        let event = invitation(&room, BOB);
        let (status, answer) = it.invite(&room, &event).await;
        match refused {
            Some((expected, code)) => {
                assert_eq!((status, &answer["errcode"]), (expected, &json!(code)), "{config}");
            }
            None => {
                assert_eq!(status, StatusCode::OK, "{config}: {answer}");
                assert!(answer["event"]["signatures"]["test.example"].is_object(), "{answer}");
            }
        }
        for path in ["/sync".to_owned(), format!("/sync?since={since}"), "/sync?full_state=true".to_owned()] {
            let told = it.bob.ok_get(&path).await;
            let told = !told["rooms"]["invite"][room.room_id.as_str()].is_null();
            assert_eq!(told, shown, "{config} {path}");
        }
        it.server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn an_ignored_invitation_is_there_and_is_shown_when_it_is_ignored_no_more() {
    let room = Elsewhere::new(11);
    let it = Against::new(&room, honest()).await;
    let config = format!("/user/{BOB}/account_data/{INVITERS}");
    it.bob.ok_put(&config, json!({ "ignored_servers": ["a.example"] })).await;
    assert_eq!(it.invite(&room, &invitation(&room, BOB)).await.0, StatusCode::OK);
    assert_eq!(invited(&it.bob, room.room_id.as_str()).await, Value::Null);
    it.bob.ok_put(&config, json!({})).await;
    assert!(invited(&it.bob, room.room_id.as_str()).await.is_object());
}

#[tokio::test(start_paused = true)]
async fn who_is_invited_joins_by_way_of_the_inviter_and_others_are_settled() {
    let mut room = Elsewhere::new(11);
    room.add("m.room.join_rules", Some(""), json!({ "join_rule": "invite" }));
    let carol = "@carol:test.example";
    let event = invitation(&room, BOB);
    let mut later = room.clone();
    later.events.push(event.clone());
    later.state.insert(("m.room.member".to_owned(), BOB.to_owned()), event.clone());
    let it = Against::new(&later, honest()).await;
    let other = it.server.register("carol").await;
    assert_eq!(it.invite(&room, &event).await.0, StatusCode::OK);
    // The room says nothing of this invitation any more when it is joined.
    assert_eq!(it.invite(&room, &invitation(&room, carol)).await.0, StatusCode::OK);
    let since = other.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
    let room_id = room.room_id.as_str();
    it.server.assert_whole();
    it.bob.ok_post(&format!("/rooms/{}/join", encoded(room_id)), json!({})).await;
    it.server.assert_whole();
    let sync = it.bob.ok_get("/sync").await;
    assert!(sync["rooms"]["join"][room_id].is_object() && sync["rooms"]["invite"][room_id].is_null());
    let told = other.ok_get(&format!("/sync?since={since}")).await;
    assert!(told["rooms"]["leave"][room_id].is_object(), "{told}");
    assert_eq!(invited(&other, room_id).await, Value::Null);
    let joined = it.bob.ok_get(&format!("/rooms/{}/joined_members", encoded(room_id))).await;
    assert_eq!(joined["joined"].as_object().unwrap().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_join_from_an_invitation_that_fails_leaves_the_invitation() {
    let room = Elsewhere::new(11);
    let tamper: Tamper = Arc::new(|asked, mut honest| {
        if asked == "send_join" {
            honest["state"].as_array_mut().unwrap().retain(|event| event["type"] != "m.room.create");
        }
        answer(200, honest.to_string())
    });
    let it = Against::new(&room, tamper).await;
    assert_eq!(it.invite(&room, &invitation(&room, BOB)).await.0, StatusCode::OK);
    let room_id = room.room_id.as_str();
    let path = format!("/rooms/{}/join", encoded(room_id));
    assert_eq!(it.bob.post(&api(&path), json!({})).await.0, StatusCode::BAD_GATEWAY);
    assert!(invited(&it.bob, room_id).await.is_object());
    it.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_invitation_is_refused_by_way_of_the_inviter_or_alone() {
    for weather in [Weather::Fair, Weather::Silent, Weather::Refuses] {
        let room = Elsewhere::new(11);
        let it = Against::new(&room, honest()).await;
        let room_id = room.room_id.as_str();
        assert_eq!(it.invite(&room, &invitation(&room, BOB)).await.0, StatusCode::OK);
        let since = it.bob.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
        it.net.weather("5.9.0.1:8448", weather, Duration::ZERO);
        let leave = format!("/rooms/{}/leave", encoded(room_id));
        it.bob.ok_post(&leave, json!({ "reason": "no" })).await;
        let sync = it.bob.ok_get(&format!("/sync?since={since}")).await;
        // The end is told by an event, also where nobody else hears of it.
        let told = sync["rooms"]["leave"][room_id]["timeline"]["events"].as_array().unwrap();
        assert_eq!(told.len(), 1, "{sync}");
        assert_eq!((&told[0]["type"], &told[0]["sender"]), (&json!("m.room.member"), &json!(BOB)));
        assert_eq!((&told[0]["state_key"], &told[0]["content"]["reason"]), (&json!(BOB), &json!("no")));
        assert!(told[0]["event_id"].as_str().unwrap().starts_with('$'), "{sync}");
        assert_eq!(invited(&it.bob, room_id).await, Value::Null);
        let sent = it.asked.lock().unwrap().iter().find(|(path, _)| path.contains("/send_leave/")).cloned();
        assert_eq!(sent.is_some(), weather == Weather::Fair);
        if let Some((_, sent)) = sent {
            assert_eq!(sent["content"], json!({ "membership": "leave", "reason": "no" }));
        }
        it.bob.ok_post(&leave, json!({})).await;
        it.bob.ok_post(&format!("/rooms/{}/forget", encoded(room_id)), json!({})).await;
        it.server.assert_whole();
        it.net.weather("5.9.0.1:8448", Weather::Fair, Duration::ZERO);
        assert_eq!(it.invite(&room, &invitation(&room, BOB)).await.0, StatusCode::OK, "again");
        assert!(invited(&it.bob, room_id).await.is_object());
        it.server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn invitations_from_elsewhere_are_bounded_and_go_with_the_account() {
    let room = Elsewhere::new(11);
    let it = Against::new(&room, honest()).await;
    for number in 0..=200 {
        let room = room.with_id(&format!("!room{number}:a.example"));
        let (status, _) = it.invite(&room, &invitation(&room, BOB)).await;
        let expected = if number < 200 { StatusCode::OK } else { StatusCode::TOO_MANY_REQUESTS };
        assert_eq!(status, expected, "{number}");
    }
    let auth = json!({
        "type": "m.login.password", "password": "password of bob",
        "identifier": { "type": "m.id.user", "user": "bob" },
    });
    it.net.weather("5.9.0.1:8448", Weather::Refuses, Duration::ZERO);
    it.bob.ok_post("/account/deactivate", json!({ "auth": auth })).await;
    let app = it.server.server().app();
    let user = crate::support::user_num(&app.store, BOB);
    for _ in 0..100 {
        app.env.sleep(Duration::from_secs(60)).await;
    }
    let snapshot = app.store.snapshot();
    let rooms = aqueduct::rooms::members::list_user_rooms(&*snapshot, user).unwrap();
    let left = rooms.filter(|row| row.as_ref().unwrap().1.membership == Membership::Leave).count();
    assert_eq!(left, 200);
    it.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_user_knocks_at_a_room_of_another_server_and_withdraws_that() {
    let mut room = Elsewhere::new(11);
    room.add("m.room.join_rules", Some(""), json!({ "join_rule": "knock" }));
    let it = Against::new(&room, honest()).await;
    let room_id = room.room_id.as_str();
    let path = format!("/knock/{}?via=a.example", encoded(room_id));
    let told = it.bob.ok_post(&path, json!({ "reason": "please" })).await;
    assert_eq!(told["room_id"], room_id);
    let sent =
        it.asked.lock().unwrap().iter().find(|(path, _)| path.contains("/send_knock/")).unwrap().1.clone();
    assert_eq!(sent["content"], json!({ "membership": "knock", "displayname": "bob", "reason": "please" }));
    let sync = it.bob.ok_get("/sync").await;
    let told = sync["rooms"]["knock"][room_id]["knock_state"]["events"].as_array().unwrap();
    let mut told: Vec<_> = told.iter().map(|event| event["type"].as_str().unwrap()).collect();
    told.sort_unstable();
    assert_eq!(told, ["m.room.create", "m.room.join_rules", "m.room.member", "m.room.name"]);
    it.server.assert_whole();
    // Whether the knock still stands is known to the room alone.
    it.bob.ok_post(&path, json!({ "reason": "again" })).await;
    let knocks = it.asked.lock().unwrap().iter().filter(|(path, _)| path.contains("/send_knock/")).count();
    assert_eq!(knocks, 2);
    assert!(it.bob.ok_get("/sync").await["rooms"]["knock"][room_id].is_object());
    it.server.assert_whole();
    it.bob.ok_post(&format!("/rooms/{}/leave", encoded(room_id)), json!({})).await;
    assert!(it.asked.lock().unwrap().iter().any(|(path, _)| path.contains("/send_leave/")));
    let sync = it.bob.ok_get("/sync").await;
    assert_eq!(sync["rooms"]["knock"][room_id], Value::Null);
    // A knock is accepted by an invitation.
    it.bob.ok_post(&path, json!({})).await;
    assert_eq!(it.invite(&room, &invitation(&room, BOB)).await.0, StatusCode::OK);
    let sync = it.bob.ok_get("/sync").await;
    assert!(
        sync["rooms"]["knock"][room_id].is_null() && sync["rooms"]["invite"][room_id].is_object(),
        "{sync}"
    );
    it.server.assert_whole();
}

/// A change that spoils the state which comes with an invitation.
type Spoil<'a> = &'a dyn Fn(&mut Vec<Value>);

/// Two servers, with `alice` on the first and `bob` on the second, and a room of Alice's.
async fn two(body: Value) -> (Federated, TestClient, TestClient, String) {
    let federated =
        Federated::with(&["a.example", "b.example"], |config| config.federation.public_rooms = true);
    let alice = federated.server(0).register("alice").await;
    let bob = federated.server(1).register("bob").await;
    let room = alice.ok_post("/createRoom", body).await["room_id"].as_str().unwrap().to_owned();
    (federated, alice, bob, room)
}

#[tokio::test(start_paused = true)]
async fn a_user_of_another_server_is_invited_and_joins() {
    for version in ["1", "2", "11", "12"] {
        let body = json!({ "preset": "private_chat", "name": "Hall", "room_version": version });
        let (federated, alice, bob, room) = two(body).await;
        let invite = format!("/rooms/{}/invite", encoded(&room));
        alice.ok_post(&invite, json!({ "user_id": bob.user_id })).await;
        let told = invited(&bob, &room).await["invite_state"]["events"].clone();
        assert!(told.as_array().unwrap().iter().any(|event| event["content"]["name"] == "Hall"), "{told}");
        let member = format!("/rooms/{}/state/m.room.member/{}", encoded(&room), encoded(&bob.user_id));
        assert_eq!(alice.ok_get(&member).await["membership"], "invite");
        bob.ok_post(&format!("/join/{}", encoded(&room)), json!({})).await;
        assert_eq!(alice.ok_get(&member).await["membership"], "join");
        let (status, told) = alice.post(&api(&invite), json!({ "user_id": bob.user_id })).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{told}");
        federated.server(0).assert_whole();
        federated.server(1).assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn an_invitation_that_the_other_server_does_not_sign_is_no_part_of_the_room() {
    let (federated, alice, bob, room) = two(json!({ "preset": "private_chat" })).await;
    let invite = format!("/rooms/{}/invite", encoded(&room));
    let member = format!("/rooms/{}/state/m.room.member/{}", encoded(&room), encoded(&bob.user_id));
    federated.weather(1, Weather::Refuses, Duration::ZERO);
    let (status, _) = alice.post(&api(&invite), json!({ "user_id": bob.user_id })).await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    assert_eq!(alice.get(&api(&member)).await.0, StatusCode::NOT_FOUND);
    federated.weather(1, Weather::Fair, Duration::ZERO);
    let (status, told) = alice.post(&api(&invite), json!({ "user_id": "@nobody:b.example" })).await;
    assert_eq!((status, &told["errcode"]), (StatusCode::NOT_FOUND, &json!("M_NOT_FOUND")));
    alice.ok_put(&member, json!({ "membership": "invite" })).await;
    assert!(invited(&bob, &room).await.is_object(), "whichever endpoint invites, the user is told");
    federated.server(0).assert_whole();
    federated.server(1).assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_room_is_made_with_users_of_other_servers_whether_they_can_be_reached_or_not() {
    let body = json!({
        "preset": "trusted_private_chat", "is_direct": true, "invite": ["@bob:b.example", "@x:nowhere.example", "@nobody:b.example"],
    });
    let (federated, alice, bob, room) = two(body).await;
    let told = invited(&bob, &room).await["invite_state"]["events"].clone();
    let own = told.as_array().unwrap().last().unwrap().clone();
    assert_eq!(own["content"]["is_direct"], true, "{told}");
    let members = alice.ok_get(&format!("/rooms/{}/members", encoded(&room))).await;
    assert_eq!(members["chunk"].as_array().unwrap().len(), 2, "{members}");
    // A user who joins sees in their own event by which invitation they came.
    bob.ok_post(&format!("/join/{}", encoded(&room)), json!({})).await;
    let member = format!("/rooms/{}/state/m.room.member/{}", encoded(&room), encoded(&bob.user_id));
    let unsigned = bob.ok_get(&format!("{member}?format=event")).await["unsigned"].clone();
    assert_eq!(unsigned["prev_content"]["membership"], "invite", "{unsigned}");
    assert_eq!(unsigned["prev_content"]["is_direct"], true);
    assert_eq!(unsigned["prev_sender"], alice.user_id);
    federated.server(0).assert_whole();
    federated.server(1).assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_refused_invitation_is_told_to_the_room() {
    // The id of a room of this version says which server to ask.
    let (federated, alice, bob, room) = two(json!({ "preset": "private_chat", "room_version": "11" })).await;
    alice.ok_post(&format!("/rooms/{}/invite", encoded(&room)), json!({ "user_id": bob.user_id })).await;
    bob.ok_post(&format!("/rooms/{}/leave", encoded(&room)), json!({})).await;
    let member = format!("/rooms/{}/state/m.room.member/{}", encoded(&room), encoded(&bob.user_id));
    assert_eq!(alice.ok_get(&member).await["membership"], "leave");
    let (status, _) = bob.post(&format!("/_matrix/client/v3/join/{}", encoded(&room)), json!({})).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    federated.server(0).assert_whole();
    federated.server(1).assert_whole();
}

#[tokio::test(start_paused = true)]
async fn who_knocks_at_a_room_of_another_server_is_let_in() {
    let (federated, alice, bob, room) = two(json!({ "preset": "private_chat" })).await;
    let rules = format!("/rooms/{}/state/m.room.join_rules", encoded(&room));
    alice.ok_put(&rules, json!({ "join_rule": "knock" })).await;
    bob.ok_post(&format!("/knock/{}?via=a.example", encoded(&room)), json!({})).await;
    let member = format!("/rooms/{}/state/m.room.member/{}", encoded(&room), encoded(&bob.user_id));
    assert_eq!(alice.ok_get(&member).await["membership"], "knock");
    alice.ok_post(&format!("/rooms/{}/invite", encoded(&room)), json!({ "user_id": bob.user_id })).await;
    bob.ok_post(&format!("/join/{}", encoded(&room)), json!({})).await;
    assert_eq!(alice.ok_get(&member).await["membership"], "join");
    federated.server(0).assert_whole();
    federated.server(1).assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_invitation_that_is_withdrawn_and_a_knock_that_is_refused_end_elsewhere_too() {
    for (act, membership) in [("kick", "leave"), ("ban", "ban")] {
        let (federated, alice, bob, room) = two(json!({ "preset": "private_chat" })).await;
        let at = |act: &str| format!("/rooms/{}/{act}", encoded(&room));
        let target = json!({ "user_id": bob.user_id });
        alice.ok_post(&at("invite"), target.clone()).await;
        assert!(invited(&bob, &room).await.is_object());
        alice.ok_post(&at(act), target.clone()).await;
        federated.server(0).server().app().env.sleep(Duration::from_secs(10)).await;
        assert!(invited(&bob, &room).await.is_null(), "after {act} the user is not invited any more");
        if membership == "leave" {
            let rules = at("state/m.room.join_rules");
            alice.ok_put(&rules, json!({ "join_rule": "knock" })).await;
            let knock = format!("/knock/{}?via=a.example", encoded(&room));
            let knocks = async || bob.ok_get("/sync").await["rooms"]["knock"][&room].clone();
            for _ in 0..2 {
                bob.ok_post(&knock, json!({})).await;
                assert!(knocks().await.is_object());
                let member = at(&format!("state/m.room.member/{}", encoded(&bob.user_id)));
                assert_eq!(alice.ok_get(&member).await["membership"], "knock");
                alice.ok_post(&at("kick"), target.clone()).await;
                federated.server(0).server().app().env.sleep(Duration::from_secs(10)).await;
                assert!(knocks().await.is_null(), "a refused knock has ended");
            }
        }
        federated.server(0).assert_whole();
        federated.server(1).assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn an_invitation_is_withdrawn_by_who_made_it_and_clients_are_told_by_the_event() {
    let (federated, alice, bob, room) = two(json!({ "preset": "private_chat" })).await;
    let carol = federated.server(0).register("carol").await;
    let at = |act: &str| format!("/rooms/{}/{act}", encoded(&room));
    let pause = async || federated.server(0).server().app().env.sleep(Duration::from_secs(10)).await;
    alice.ok_post(&at("invite"), json!({ "user_id": carol.user_id })).await;
    carol.ok_post(&at("join"), json!({})).await;
    let target = json!({ "user_id": bob.user_id });
    carol.ok_post(&at("invite"), target.clone()).await;
    assert!(invited(&bob, &room).await.is_object());
    // Whether Alice may cannot be judged where her room is not.
    alice.ok_post(&at("kick"), target.clone()).await;
    pause().await;
    assert!(invited(&bob, &room).await.is_object());
    alice.ok_post(&at("invite"), target.clone()).await;
    let since = bob.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
    alice.ok_post(&at("kick"), json!({ "user_id": bob.user_id, "reason": "wrong room" })).await;
    pause().await;
    assert!(invited(&bob, &room).await.is_null());
    let filter = encoded(r#"{"room":{"include_leave":true}}"#);
    for query in [format!("since={since}"), format!("filter={filter}")] {
        let sync = bob.ok_get(&format!("/sync?{query}")).await;
        let told = sync["rooms"]["leave"][&room]["timeline"]["events"].as_array().unwrap();
        assert_eq!(told.len(), 1, "{sync}");
        assert_eq!(told[0]["content"], json!({ "membership": "leave", "reason": "wrong room" }));
        assert_eq!((&told[0]["sender"], &told[0]["state_key"]), (&json!(alice.user_id), &json!(bob.user_id)));
    }
    let filter = encoded(r#"{"room":{"include_leave":true,"timeline":{"not_types":["m.room.member"]}}}"#);
    let sync = bob.ok_get(&format!("/sync?filter={filter}")).await;
    assert_eq!(sync["rooms"]["leave"][&room]["timeline"]["events"], json!([]), "{sync}");
    federated.server(1).assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_refusal_that_comes_late_does_not_end_the_next_knock() {
    let (federated, alice, bob, room) = two(json!({ "preset": "private_chat" })).await;
    let at = |act: &str| format!("/rooms/{}/{act}", encoded(&room));
    alice.ok_put(&at("state/m.room.join_rules"), json!({ "join_rule": "knock" })).await;
    let knock = format!("/knock/{}?via=a.example", encoded(&room));
    bob.ok_post(&knock, json!({})).await;
    federated.weather(1, Weather::Refuses, Duration::ZERO);
    alice.ok_post(&at("kick"), json!({ "user_id": bob.user_id })).await;
    federated.server(0).server().app().env.sleep(Duration::from_secs(10)).await;
    bob.ok_post(&knock, json!({ "reason": "again" })).await;
    federated.weather(1, Weather::Fair, Duration::ZERO);
    federated.server(0).server().app().env.sleep(Duration::from_secs(3_600)).await;
    let member = at(&format!("state/m.room.member/{}", encoded(&bob.user_id)));
    assert_eq!(alice.ok_get(&member).await["membership"], "knock");
    assert!(bob.ok_get("/sync").await["rooms"]["knock"][&room].is_object());
    federated.server(1).assert_whole();
}

#[tokio::test(start_paused = true)]
async fn another_server_vouches_where_nobody_of_ours_may() {
    for version in ["8", "11", "12"] {
        let (federated, alice, bob, space) = two(json!({ "preset": "public_chat" })).await;
        let carol = federated.server(1).register("carol").await;
        let allow = json!([{ "type": "m.room_membership", "room_id": space }]);
        let rules =
            json!({ "type": "m.room.join_rules", "content": { "join_rule": "restricted", "allow": allow } });
        let levels = json!({ "invite": 50 });
        let body = json!({
            "room_version": version, "initial_state": [rules], "power_level_content_override": levels,
        });
        let room = alice.create(body).await;
        let join = |room: &str, via: &str| format!("/join/{}?via={via}", encoded(room));
        alice.ok_post(&format!("/rooms/{}/invite", encoded(&room)), json!({ "user_id": bob.user_id })).await;
        bob.ok_post(&join(&room, "a.example"), json!({})).await;
        // The other server knows whether Carol is in the space.
        let (status, told) = carol.post(&api(&join(&room, "b.example")), json!({})).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{told}");
        carol.ok_post(&join(&space, "a.example"), json!({})).await;
        carol.ok_post(&join(&room, "b.example"), json!({ "reason": "curious" })).await;
        let member = format!("/rooms/{}/state/m.room.member/{}", encoded(&room), encoded(&carol.user_id));
        for client in [&alice, &carol] {
            let member = client.ok_get(&member).await;
            assert_eq!(member["membership"], "join", "{version}");
            assert_eq!(member["join_authorised_via_users_server"], alice.user_id);
            assert_eq!(member["reason"], "curious");
        }
        bob.say(&room, "1", "welcome").await;
        carol.say(&room, "1", "thank you").await;
        federated.server(0).server().app().env.sleep(Duration::from_secs(10)).await;
        federated.server(0).assert_whole();
        federated.server(1).assert_whole();
        // Nobody lets her in where the other server does not answer.
        carol.ok_post(&format!("/rooms/{}/leave", encoded(&room)), json!({})).await;
        federated.weather(0, Weather::Refuses, Duration::ZERO);
        let (status, told) = carol.post(&api(&join(&room, "b.example")), json!({})).await;
        assert_eq!(status, StatusCode::BAD_GATEWAY, "{told}");
    }
}

#[tokio::test(start_paused = true)]
async fn profiles_aliases_and_public_rooms_of_other_servers_are_asked_for() {
    let (_federated, alice, bob, room) =
        two(json!({ "preset": "public_chat", "room_alias_name": "hall", "visibility": "public" })).await;
    let path = format!("/profile/{}/displayname", encoded(&alice.user_id));
    alice.ok_put(&path, json!({ "displayname": "Alice" })).await;
    assert_eq!(bob.ok_get(&path).await, json!({ "displayname": "Alice" }));
    let profile = bob.ok_get(&format!("/profile/{}", encoded(&alice.user_id))).await;
    assert_eq!(profile["displayname"], "Alice");
    let (status, told) = bob.get("/_matrix/client/v3/profile/%40nobody%3Aa.example").await;
    assert_eq!((status, &told["errcode"]), (StatusCode::NOT_FOUND, &json!("M_NOT_FOUND")));
    assert_eq!(bob.get("/_matrix/client/v3/profile/%40x%3Anowhere.example").await.0, StatusCode::BAD_GATEWAY);
    let alias = bob.ok_get("/directory/room/%23hall%3Aa.example").await;
    assert_eq!(alias["room_id"], room);
    assert_eq!(alias["servers"][0], "a.example");
    let listed = bob.ok_get("/publicRooms?server=a.example").await;
    assert_eq!(listed["chunk"][0]["room_id"], room, "{listed}");
    let search = json!({ "filter": { "generic_search_term": "nothing like it" } });
    let listed = bob.ok_post("/publicRooms?server=a.example", search).await;
    assert_eq!(listed["chunk"], json!([]));
    assert_eq!(bob.ok_get("/publicRooms").await["chunk"], json!([]), "this server lists its own");
    assert_eq!(
        bob.get("/_matrix/client/v3/publicRooms?server=nowhere.example").await.0,
        StatusCode::BAD_GATEWAY
    );
}
