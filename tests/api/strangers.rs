//! Servers that are not in a room, and what they may do to those who are invited to it or knock at it: nothing.

use std::sync::{Arc, Mutex};

use aqueduct::{
    rooms::{
        self,
        build::Signer,
        change::{Outcome, Received},
        event,
    },
    schema::rooms::EventKey,
    store::{Durability, Engine, Store},
};
use federation::testing::{Net, json as answer, key_pair};
use http::{Method, StatusCode};
use ruma::OwnedEventId;
use serde_json::{Value, json};

use crate::{
    inbound::Scene,
    support::{
        TestClient, TestServer, encoded,
        network::{Peer, doors},
        remote::Remote,
        scripted::{ALICE, Elsewhere, Made, Tamper, honest},
    },
};

const BOB: &str = "@bob:test.example";
const EVE: &str = "@eve:h.example";

/// The server under test, the server of a room, and one that has nothing to do with the room.
struct Between {
    server: TestServer,
    bob: TestClient,
    resident: Peer,
    stranger: Peer,
    asked: Arc<Mutex<Vec<(String, Value)>>>,
    net: Net,
}

impl Between {
    async fn new(room: &Elsewhere) -> Self {
        Self::with(room, honest()).await
    }

    async fn with(room: &Elsewhere, tamper: Tamper) -> Self {
        let net = Net::new(1);
        let asked = room.serve(&net, tamper);
        let store = Store::open(Engine::Memory(Default::default()), Durability::Fsync).unwrap();
        let server = TestServer::start(doors(&net), store, |_| {});
        let bob = server.register("bob").await;
        let stranger = Peer::new(&net, "h.example", "5.9.0.7", 7);
        Self { server, bob, resident: Peer::unheard("a.example", 9), stranger, asked, net }
    }

    async fn invite(&self, by: &Peer, room: &Elsewhere, event: &Made) -> StatusCode {
        let state: Vec<_> = room.state.values().map(|event| &event.json).collect();
        let version = room.version.to_string();
        let body = json!({ "room_version": version, "event": event.json, "invite_room_state": state });
        let (room, event) = (encoded(room.room_id.as_str()), encoded(event.id.as_str()));
        let uri = format!("/_matrix/federation/v2/invite/{room}/{event}");
        by.ask(&self.server, Method::PUT, &uri, Some(&body)).await.0
    }

    /// Sends one event in a transaction of its own.
    async fn tell(&self, by: &Peer, event: &Made) {
        let (status, _) =
            by.transact(&self.server, event.id.as_str(), std::slice::from_ref(&event.json), &[]).await;
        assert_eq!(status, StatusCode::OK);
    }

    /// The name of the room as Bob is invited to it, or has knocked at it.
    async fn shown(&self, room: &Elsewhere) -> (Option<String>, Option<String>) {
        let rooms = self.bob.ok_get("/sync").await["rooms"].clone();
        let name = |way: &str| {
            let room = &rooms[way][room.room_id.as_str()];
            let events = room[format!("{way}_state")]["events"].as_array()?.clone();
            let name = events.iter().find(|event| event["type"] == "m.room.name")?;
            Some(name["content"]["name"].as_str().unwrap().to_owned())
        };
        (name("invite"), name("knock"))
    }
}

/// The room as a stranger makes it up.
fn made_up(room: &Elsewhere, version: u8) -> Elsewhere {
    let signer = Signer::new("h.example".try_into().unwrap(), key_pair(7, "k").unwrap().into());
    let mut fake = Elsewhere { version, signer, ..room.clone() };
    fake.state.retain(|(kind, _), _| kind == "m.room.create");
    let name = fake.event(EVE, "m.room.name", Some(""), json!({ "name": "Fake" }));
    fake.state.insert(("m.room.name".to_owned(), String::new()), name);
    fake
}

fn member(room: &Elsewhere, by: &str, user: &str, membership: &str) -> Made {
    room.event(by, "m.room.member", Some(user), json!({ "membership": membership }))
}

/// The same room, in which this is what the user is to it.
fn since(room: &Elsewhere, user: &str, event: &Made) -> Elsewhere {
    let mut later = room.clone();
    later.state.insert(("m.room.member".to_owned(), user.to_owned()), event.clone());
    later
}

fn invites(name: &str) -> (Option<String>, Option<String>) {
    (Some(name.to_owned()), None)
}

#[tokio::test(start_paused = true)]
async fn nobody_is_locked_out_by_another_version_that_a_stranger_tells() {
    for (version, wrong) in [(11, 10), (10, 11), (3, 9), (1, 2), (2, 1), (1, 11)] {
        let room = Elsewhere::new(version);
        let it = Between::new(&room).await;
        let carol = it.server.register("carol").await;
        let dora = it.server.register("dora").await;
        let fake = made_up(&room, wrong);
        assert_eq!(
            it.invite(&it.stranger, &fake, &member(&fake, EVE, &carol.user_id, "invite")).await,
            StatusCode::OK
        );
        // A user who is invited truly is told so, and may come in.
        assert_eq!(
            it.invite(&it.resident, &room, &member(&room, ALICE, BOB, "invite")).await,
            StatusCode::OK
        );
        assert_eq!(it.shown(&room).await, invites("Elsewhere"));
        let at = encoded(room.room_id.as_str());
        if version >= 7 {
            dora.ok_post(&format!("/knock/{at}?via=a.example"), json!({})).await;
        }
        carol.ok_post(&format!("/join/{at}?via=a.example"), json!({})).await;
        it.bob.ok_post(&format!("/join/{at}?via=a.example"), json!({})).await;
        let created = it.bob.ok_get(&format!("/rooms/{at}/state/m.room.create")).await;
        assert_eq!(created["room_version"], version.to_string());
        it.server.assert_whole();
        // From here on the version is known. A stranger who says another one hears nothing of that, and nobody is invited.
        let more = member(&fake, EVE, &dora.user_id, "invite");
        assert_eq!(it.invite(&it.stranger, &fake, &more).await, StatusCode::OK);
        assert_eq!(dora.ok_get("/sync").await["rooms"]["invite"], Value::Null);
        it.server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn a_version_that_gives_no_such_ids_to_rooms_is_refused() {
    let room = Elsewhere::new(11);
    let hashed = Elsewhere::new(12);
    let it = Between::new(&room).await;
    for (room, version) in [(&room, 12), (&hashed, 11)] {
        let fake = Elsewhere { version, ..made_up(room, room.version) };
        let event = member(&fake, EVE, BOB, "invite");
        assert_eq!(it.invite(&it.stranger, &fake, &event).await, StatusCode::BAD_REQUEST);
    }
    let tamper: Tamper = Arc::new(|asked, mut honest| {
        if asked == "make_join" {
            honest["room_version"] = json!("12");
        }
        answer(200, honest.to_string())
    });
    let it = Between::with(&room, tamper).await;
    let path = format!("/_matrix/client/v3/join/{}?via=a.example", encoded(room.room_id.as_str()));
    assert_eq!(it.bob.post(&path, json!({})).await.0, StatusCode::BAD_GATEWAY);
    assert!(
        it.asked.lock().unwrap().iter().all(|(path, _)| !path.contains("send_join")),
        "nothing was signed"
    );
}

#[tokio::test(start_paused = true)]
async fn another_version_than_is_known_is_refused_before_the_room_has_the_join() {
    let room = Elsewhere::new(11);
    let other = Arc::new(Mutex::new(false));
    let is_other = Arc::clone(&other);
    let tamper: Tamper = Arc::new(move |asked, mut honest| {
        if asked == "make_join" && *is_other.lock().unwrap() {
            honest["room_version"] = json!("10");
        }
        answer(200, honest.to_string())
    });
    let it = Between::with(&room, tamper).await;
    let at = encoded(room.room_id.as_str());
    it.bob.ok_post(&format!("/join/{at}?via=a.example"), json!({})).await;
    it.bob.ok_post(&format!("/rooms/{at}/leave"), json!({})).await;
    let sent = || it.asked.lock().unwrap().iter().filter(|(path, _)| path.contains("send_join")).count();
    let before = sent();
    *other.lock().unwrap() = true;
    let path = format!("/_matrix/client/v3/join/{at}?via=a.example");
    assert_eq!(it.bob.post(&path, json!({})).await.0, StatusCode::BAD_GATEWAY);
    assert_eq!(sent(), before, "nobody is in the room by an event that comes to nothing here");
    *other.lock().unwrap() = false;
    // The server there does not go on, so that only the time makes another event of this join.
    it.server.server().app().env.sleep(std::time::Duration::from_secs(1)).await;
    it.bob.ok_post(&format!("/join/{at}?via=a.example"), json!({})).await;
    it.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_stranger_neither_replaces_an_invitation_nor_ends_it() {
    for version in [1, 2, 3, 11, 12] {
        let room = Elsewhere::new(version);
        let it = Between::new(&room).await;
        let (fake, invite) = (made_up(&room, version), member(&room, ALICE, BOB, "invite"));
        let other = member(&fake, EVE, BOB, "invite");
        assert_eq!(it.invite(&it.resident, &room, &invite).await, StatusCode::OK);
        let since_token = it.bob.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
        if version < 12 {
            assert_eq!(it.invite(&it.stranger, &fake, &other).await, StatusCode::OK);
            assert_eq!(it.shown(&room).await, invites("Elsewhere"), "{version}");
        }
        it.server.assert_whole();
        // It ends its own alone, whichever it names.
        for named in [&other, &invite] {
            it.tell(&it.stranger, &member(&since(&fake, BOB, named), EVE, BOB, "leave")).await;
            assert_eq!(it.shown(&room).await, invites("Elsewhere"), "{version}");
        }
        let news = it.bob.ok_get(&format!("/sync?since={since_token}")).await;
        assert_eq!(news["rooms"]["leave"][room.room_id.as_str()], Value::Null, "{news}");
        it.tell(&it.resident, &member(&since(&room, BOB, &invite), ALICE, BOB, "leave")).await;
        assert_eq!(it.shown(&room).await, (None, None), "whoever invites may take it back");
        it.server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn of_several_invitations_those_that_stand_are_left() {
    let room = Elsewhere::new(11);
    let it = Between::new(&room).await;
    let (fake, invite) = (made_up(&room, 11), member(&room, ALICE, BOB, "invite"));
    let other = member(&fake, EVE, BOB, "invite");
    assert_eq!(it.invite(&it.stranger, &fake, &other).await, StatusCode::OK);
    assert_eq!(it.invite(&it.resident, &room, &invite).await, StatusCode::OK);
    assert_eq!(it.shown(&room).await, invites("Fake"), "the first stays until it is answered");
    let began = it.bob.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
    it.tell(&it.stranger, &member(&since(&fake, BOB, &other), EVE, BOB, "leave")).await;
    assert_eq!(it.shown(&room).await, invites("Elsewhere"));
    let news = it.bob.ok_get(&format!("/sync?since={began}")).await;
    assert!(news["rooms"]["invite"][room.room_id.as_str()].is_object(), "{news}");
    it.server.assert_whole();
    // A second one of the same server takes the place of the first.
    let mut renamed = room.clone();
    renamed.add("m.room.name", Some(""), json!({ "name": "Renamed" }));
    assert_eq!(
        it.invite(&it.resident, &renamed, &member(&renamed, ALICE, BOB, "invite")).await,
        StatusCode::OK
    );
    assert_eq!(it.shown(&room).await, invites("Renamed"));
    // Each inviter's server hears that it is refused.
    assert_eq!(it.invite(&it.stranger, &fake, &other).await, StatusCode::OK);
    it.bob.ok_post(&format!("/rooms/{}/leave", encoded(room.room_id.as_str())), json!({})).await;
    assert_eq!(it.shown(&room).await, (None, None), "a refusal ends all of them");
    assert!(it.asked.lock().unwrap().iter().any(|(path, _)| path.contains("/send_leave/")));
    it.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_invitation_that_is_withheld_hides_no_other() {
    let room = Elsewhere::new(11);
    let it = Between::new(&room).await;
    let path = format!("/user/{BOB}/account_data/org.matrix.msc4155.invite_permission_config");
    it.bob.ok_put(&path, json!({ "ignored_servers": ["h.example"] })).await;
    let fake = made_up(&room, 11);
    assert_eq!(it.invite(&it.stranger, &fake, &member(&fake, EVE, BOB, "invite")).await, StatusCode::OK);
    assert_eq!(it.shown(&room).await, (None, None));
    let invite = member(&room, ALICE, BOB, "invite");
    assert_eq!(it.invite(&it.resident, &room, &invite).await, StatusCode::OK);
    assert_eq!(it.shown(&room).await, invites("Elsewhere"));
}

#[tokio::test(start_paused = true)]
async fn the_invitations_that_are_kept_of_one_room_are_few() {
    let room = Elsewhere::new(11);
    let it = Between::new(&room).await;
    assert_eq!(it.invite(&it.resident, &room, &member(&room, ALICE, BOB, "invite")).await, StatusCode::OK);
    for number in 0..12 {
        let name = format!("h{number}.example");
        let eve = format!("@eve:{name}");
        let peer = Peer::new(&it.net, &name, &format!("5.9.1.{number}"), 7);
        let signer = Signer::new(name.as_str().try_into().unwrap(), key_pair(7, "k").unwrap().into());
        let mut fake = Elsewhere { signer, ..made_up(&room, 11) };
        for kind in ["m.room.topic", "m.room.avatar", "m.room.encryption"] {
            let long = fake.event(&eve, kind, Some(""), json!({ "x": "\"".repeat(25_000) }));
            fake.state.insert((kind.to_owned(), String::new()), long);
        }
        assert_eq!(it.invite(&peer, &fake, &member(&fake, &eve, BOB, "invite")).await, StatusCode::OK);
        it.server.assert_whole();
    }
    assert_eq!(it.shown(&room).await, invites("Elsewhere"));
    let (rows, snapshot) = (&aqueduct::schema::OUTSIDE, it.server.server().app().store.snapshot());
    for row in rows.prefix::<()>(&*snapshot, (), aqueduct::store::Direction::Up).unwrap() {
        let (_, aqueduct::store::key::Json(row)) = row.unwrap();
        assert_eq!(row.others.len(), 4, "the newest are kept");
        let bytes: usize = row.others.iter().flat_map(|other| &other.state).map(String::len).sum();
        assert!(bytes < 120_000, "{bytes}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stranger_does_not_end_a_knock() {
    let mut room = Elsewhere::new(11);
    room.add("m.room.join_rules", Some(""), json!({ "join_rule": "knock" }));
    let it = Between::new(&room).await;
    it.bob.ok_post(&format!("/knock/{}?via=a.example", encoded(room.room_id.as_str())), json!({})).await;
    let knocks = (None, Some("Elsewhere".to_owned()));
    assert_eq!(it.shown(&room).await, knocks);
    let sent =
        it.asked.lock().unwrap().iter().find(|(path, _)| path.contains("/send_knock/")).unwrap().clone();
    let id = sent.0.rsplit('/').next().unwrap().replace("%24", "$");
    let knock = Made { id: id.as_str().try_into().unwrap(), json: sent.1 };
    let fake = made_up(&room, 11);
    it.tell(&it.stranger, &member(&since(&fake, BOB, &knock), EVE, BOB, "leave")).await;
    assert_eq!(it.shown(&room).await, knocks, "who is not in the room refuses no knock");
    // An invitation that does not answer the knock is shown, and the knock is there after it.
    let other = member(&fake, EVE, BOB, "invite");
    assert_eq!(it.invite(&it.stranger, &fake, &other).await, StatusCode::OK);
    assert_eq!(it.shown(&room).await, invites("Fake"));
    it.tell(&it.stranger, &member(&since(&fake, BOB, &other), EVE, BOB, "leave")).await;
    assert_eq!(it.shown(&room).await, knocks);
    it.server.assert_whole();
    it.tell(&it.resident, &member(&since(&room, BOB, &knock), ALICE, BOB, "leave")).await;
    assert_eq!(it.shown(&room).await, (None, None));
    it.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_user_of_ours_vouches_for_nobody_in_a_room_that_we_are_not_in() {
    let room = Elsewhere::new(11);
    let tamper: Tamper = Arc::new(|asked, mut honest| {
        if asked == "make_join" {
            honest["event"]["content"]["join_authorised_via_users_server"] = json!("@carol:test.example");
        }
        answer(200, honest.to_string())
    });
    let it = Between::with(&room, tamper).await;
    let path = format!("/_matrix/client/v3/join/{}?via=a.example", encoded(room.room_id.as_str()));
    assert_eq!(it.bob.post(&path, json!({})).await.0, StatusCode::BAD_GATEWAY);
    assert!(it.asked.lock().unwrap().iter().all(|(path, _)| !path.contains("send_join")));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_brings_an_old_membership_brings_nobody_of_ours_back() {
    for version in [11, 12] {
        let room = Elsewhere::new(version);
        let joined = Arc::new(Mutex::new(Vec::<Value>::new()));
        let known = Arc::clone(&joined);
        let tamper: Tamper = Arc::new(move |asked, mut honest| {
            if asked == "send_join" {
                let mut known = known.lock().unwrap();
                honest["state"].as_array_mut().unwrap().extend(known.iter().cloned());
                known.push(honest["event"].clone());
            }
            answer(200, honest.to_string())
        });
        let it = Between::with(&room, tamper).await;
        let alice = it.server.register("alice").await;
        let at = encoded(room.room_id.as_str());
        it.bob.ok_post(&format!("/join/{at}?via=a.example"), json!({})).await;
        it.bob.ok_post(&format!("/rooms/{at}/leave"), json!({})).await;
        alice.ok_post(&format!("/join/{at}?via=a.example"), json!({})).await;
        assert_eq!(it.bob.ok_get("/joined_rooms").await["joined_rooms"], json!([]));
        let members = alice.ok_get(&format!("/rooms/{at}/joined_members")).await["joined"].clone();
        assert_eq!(members.as_object().unwrap().len(), 2, "{members}");
        it.server.assert_whole();
        // A user who comes back by themselves is in again.
        joined.lock().unwrap().clear();
        it.bob.ok_post(&format!("/join/{at}?via=a.example"), json!({})).await;
        let members = alice.ok_get(&format!("/rooms/{at}/joined_members")).await["joined"].clone();
        assert_eq!(members.as_object().unwrap().len(), 3, "{members}");
        it.server.assert_whole();
    }
}

/// The event as it is when its content is taken away.
fn stripped(event: &Value) -> Value {
    let mut left = event.clone();
    left["content"] = json!({});
    left
}

/// The event without one field of its content.
fn without(event: &Value, field: &str) -> Value {
    let mut left = event.clone();
    left["content"].as_object_mut().unwrap().remove(field);
    left
}

#[tokio::test(start_paused = true)]
async fn events_come_from_the_servers_of_their_senders() {
    let scene = Scene::new().await;
    let stranger = Peer::new(&scene.net, "h.example", "5.9.0.7", 7);
    let (id, event) = scene.says("true", &scene.bob.heads());
    for (txn, given) in [("whole", event.clone()), ("stripped", stripped(&event))] {
        let (_, answer) = stranger.transact(&scene.server, txn, &[given], &[]).await;
        assert!(answer["pdus"][id.as_str()]["error"].is_string(), "{answer}");
    }
    assert!(scene.texts().await.is_empty());
    let (_, answer) = scene.send("own", &[event]).await;
    assert_eq!(answer, json!({ "pdus": { id.as_str(): {} } }));
    assert_eq!(scene.texts().await, ["true"]);
    // A resident server tells of those who come and go by way of it, and not of what is left of that.
    let dave =
        Remote { user: "@dave:b.example".try_into().unwrap(), ..Remote::new(&scene.bob.app, &scene.room) };
    for membership in ["join", "leave"] {
        let content = json!({ "membership": membership, "reason": "why" });
        let (id, event) =
            scene.peer.event(&dave, "m.room.member", Some("@dave:b.example"), content, &dave.heads());
        let left = without(&event, "reason");
        let (_, answer) = stranger.transact(&scene.server, &format!("left {membership}"), &[left], &[]).await;
        assert!(answer["pdus"][id.as_str()]["error"].is_string(), "{answer}");
        let (_, answer) = stranger.transact(&scene.server, membership, &[event], &[]).await;
        assert_eq!(answer, json!({ "pdus": { id.as_str(): {} } }));
        let path = format!("/rooms/{}/event/{}", encoded(&scene.room), encoded(id.as_str()));
        assert_eq!(scene.alice.ok_get(&path).await["content"]["reason"], "why");
    }
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_event_that_comes_whole_takes_the_place_of_what_was_left_of_it() {
    for version in ["6", "10", "11", "12"] {
        let mut users = json!({ "@alice:test.example": 100, "@bob:b.example": 100 });
        if version == "12" {
            // The creator stands above all levels there.
            users.as_object_mut().unwrap().remove("@alice:test.example");
        }
        let scene = Scene::with_levels(version, json!({ "users": users })).await;
        let levels = json!({ "users": users, "invite": 70 });
        let state = [
            ("m.room.topic", json!({ "topic": "true topic" })),
            ("m.room.encryption", json!({ "algorithm": "m.megolm.v1.aes-sha2" })),
            ("m.room.power_levels", levels),
            ("m.room.server_acl", json!({ "allow": ["*"], "deny": ["other.example"] })),
        ];
        for (kind, content) in state {
            if kind == "m.room.power_levels" && ["11", "12"].contains(&version) {
                // All of these levels are left there, so that nothing can be taken away.
                continue;
            }
            let (id, event) =
                scene.peer.event(&scene.bob, kind, Some(""), content.clone(), &scene.bob.heads());
            let mut left = event.clone();
            left["content"] = match &content["users"] {
                Value::Null => json!({}),
                users => json!({ "users": users }),
            };
            let (_, answer) = scene.send(&format!("left {kind}"), &[left]).await;
            assert_eq!(answer["pdus"][id.as_str()], json!({}), "{version} {kind}");
            let path = format!("/rooms/{}/state/{kind}", encoded(&scene.room));
            assert_ne!(scene.alice.ok_get(&path).await, content);
            if kind == "m.room.server_acl" {
                // The list that is left admits nobody, so that its sender's server cannot say more itself. Whoever is asked can.
                assert!(scene.is_refused("before").await, "{version}");
                let outcome = scene.bob.send(received(&scene, &id, &event)).await;
                assert!(matches!(outcome, Outcome::Known(_)), "{outcome:?}");
                assert!(!scene.is_refused("after").await, "{version}: the list is the true one now");
            } else {
                let (_, answer) = scene.send(&format!("whole {kind}"), &[event]).await;
                assert_eq!(answer["pdus"][id.as_str()], json!({}), "{version} {kind}");
            }
            assert_eq!(scene.alice.ok_get(&path).await, content, "{version}");
            let page =
                scene.alice.ok_get(&format!("/rooms/{}/messages?dir=b&limit=2", encoded(&scene.room))).await;
            let said = page["chunk"].as_array().unwrap().iter().find(|said| said["type"] == kind).unwrap();
            assert_eq!(said["content"], content, "{version}");
            scene.server.assert_whole();
        }
    }
}

impl Scene {
    /// A public room of Alice's of this version and with these power levels, in which Bob is.
    async fn with_levels(version: &str, levels: Value) -> Self {
        Self::with(json!({
            "preset": "public_chat", "room_version": version, "power_level_content_override": levels,
        }))
        .await
    }

    /// Bob sets power levels. Gives the id of the event, and first the event without its level for invitations, then the whole.
    fn sets_levels(&self, content: Value) -> (OwnedEventId, [(&'static str, Value); 2]) {
        let (id, event) =
            self.peer.event(&self.bob, "m.room.power_levels", Some(""), content, &self.bob.heads());
        (id, [("left", without(&event, "invite")), ("whole", event)])
    }

    /// Whether an event of the other server is refused.
    async fn is_refused(&self, txn: &str) -> bool {
        let (id, event) = self.says(txn, &self.bob.heads());
        let (_, answer) = self.send(txn, &[event]).await;
        answer["pdus"][id.as_str()]["error"].is_string()
    }
}

/// An event as it comes some other way than in a transaction; its signatures are not checked here.
fn received(scene: &Scene, id: &OwnedEventId, event: &Value) -> Received {
    let row = rooms::require_row(&*scene.bob.app.store.snapshot(), scene.bob.room).unwrap();
    let Some(EventKey::Hash(hash)) = event::parse_event_id(id, scene.bob.room, row.version) else {
        panic!("an id that is no hash")
    };
    Received::check(scene.bob.room, &row, hash, event.to_string().into()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn the_rules_go_by_an_event_as_soon_as_it_is_whole() {
    // Up to version 10 what is left of power levels does not say who may invite.
    let levels = json!({ "users": { "@alice:test.example": 100, "@bob:b.example": 100 } });
    let scene = Scene::with_levels("10", levels).await;
    let content = json!({ "users": { "@alice:test.example": 100, "@bob:b.example": 50 }, "invite": 100 });
    for (txn, event) in scene.sets_levels(content).1 {
        scene.send(txn, &[event]).await;
    }
    let invite = json!({ "membership": "invite" });
    let (id, event) =
        scene.peer.event(&scene.bob, "m.room.member", Some("@eve:b.example"), invite, &scene.bob.heads());
    scene.send("invite", &[event]).await;
    let path = format!("/_matrix/client/v3/rooms/{}/event/{}", encoded(&scene.room), encoded(id.as_str()));
    assert_eq!(scene.alice.get(&path).await.0, StatusCode::NOT_FOUND, "the levels forbid it");
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_event_is_not_completed_by_what_the_rules_forbid() {
    // The rest of these levels is allowed; to have more power asked of inviters than one has oneself is not.
    let users = json!({ "@alice:test.example": 100, "@bob:b.example": 90 });
    let levels = json!({ "users": users, "events": { "m.room.power_levels": 90 } });
    let scene = Scene::with_levels("10", levels).await;
    let content = json!({ "users": users, "events": { "m.room.power_levels": 90 }, "invite": 95 });
    let (id, parts) = scene.sets_levels(content);
    for (txn, event) in parts {
        scene.send(txn, &[event]).await;
        let path = format!("/rooms/{}/event/{}", encoded(&scene.room), encoded(id.as_str()));
        assert_eq!(scene.alice.ok_get(&path).await["content"]["invite"], Value::Null, "{txn}");
        let levels = format!("/rooms/{}/state/m.room.power_levels", encoded(&scene.room));
        let levels = scene.alice.ok_get(&levels).await;
        assert_eq!((&levels["invite"], &levels["users"]), (&Value::Null, &users), "{txn}");
    }
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn what_a_known_redaction_left_stays_so() {
    let scene = Scene::new().await;
    let (id, event) = scene.says("said", &scene.bob.heads());
    scene.send("said", std::slice::from_ref(&event)).await;
    scene.alice.ok_put(&format!("/rooms/{}/redact/{}/1", scene.room, encoded(id.as_str())), json!({})).await;
    scene.send("again", &[event]).await;
    assert!(scene.texts().await.is_empty());
    // A redaction that comes between what is left of an event and the whole counts as well.
    let (id, event) = scene.says("said", &scene.bob.heads());
    scene.send("left", &[stripped(&event)]).await;
    scene.alice.ok_put(&format!("/rooms/{}/redact/{}/2", scene.room, encoded(id.as_str())), json!({})).await;
    scene.send("whole", &[event]).await;
    assert!(scene.texts().await.is_empty());
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_redaction_that_comes_whole_redacts() {
    // In this version what is left of a redaction does not name the event.
    let scene = Scene::with(json!({ "preset": "public_chat", "room_version": "10" })).await;
    let (said, event) = scene.says("said", &scene.bob.heads());
    scene.send("said", &[event]).await;
    let (_, mut event) =
        scene.peer.event(&scene.bob, "m.room.redaction", None, json!({}), &scene.bob.heads());
    event["redacts"] = json!(said);
    let (_, event) = scene.peer.sign_event(&event, "10");
    let mut left = event.clone();
    left.as_object_mut().unwrap().remove("redacts");
    scene.send("left", &[left]).await;
    assert_eq!(scene.texts().await, ["said"]);
    scene.send("whole", &[event]).await;
    assert!(scene.texts().await.is_empty());
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_join_that_was_rejected_without_its_voucher_is_judged_anew_with_it() {
    // In this version what is left of a join does not say who vouched for it.
    let scene = Scene::with(json!({ "preset": "public_chat", "room_version": "8" })).await;
    let rules = format!("/rooms/{}/state/m.room.join_rules", encoded(&scene.room));
    scene.alice.ok_put(&rules, json!({ "join_rule": "restricted", "allow": [] })).await;
    let dave =
        Remote { user: "@dave:b.example".try_into().unwrap(), ..Remote::new(&scene.bob.app, &scene.room) };
    let content = json!({ "membership": "join", "join_authorised_via_users_server": "@alice:test.example" });
    let (id, mut event) =
        scene.peer.event(&dave, "m.room.member", Some("@dave:b.example"), content, &dave.heads());
    let ours = {
        let signed = dave.app.rooms.signer();
        let content = event["content"].clone();
        let built = dave.build(signed, "m.room.member", Some("@dave:b.example"), content, &dave.heads());
        let built: Value = serde_json::from_slice(&built.json).unwrap();
        built["signatures"]["test.example"].clone()
    };
    event["signatures"]["test.example"] = ours;
    let left = without(&event, "join_authorised_via_users_server");
    let member =
        format!("/_matrix/client/v3/rooms/{}/state/m.room.member/%40dave%3Ab.example", encoded(&scene.room));
    scene.send("left", &[left]).await;
    assert_eq!(scene.alice.get(&member).await.0, StatusCode::NOT_FOUND);
    scene.server.assert_whole();
    let (_, answer) = scene.send("whole", &[event]).await;
    assert_eq!(answer, json!({ "pdus": { id.as_str(): {} } }));
    let (status, told) = scene.alice.get(&member).await;
    assert_eq!((status, &told["membership"]), (StatusCode::OK, &json!("join")), "{told}");
    scene.server.assert_whole();
}
