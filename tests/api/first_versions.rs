//! Rooms of versions 1 and 2, whose servers choose the ids of events, and name with each event that they cite its hash.

use std::{sync::Arc, time::Duration};

use aqueduct::{schema, store::Direction};
use federation::testing::{Net, Weather, json as answer};
use http::{Method, StatusCode};
use ruma::OwnedEventId;
use serde_json::{Value, json};

use crate::{
    inbound::Scene,
    remote_joins::against,
    rooms::Rooms,
    support::{
        TestServer, encoded,
        federated::Federated,
        network::{Peer, doors},
        remote::Remote,
        scripted::{ALICE, Elsewhere, Made, Tamper, honest},
    },
};

const BOB: &str = "@bob:test.example";

async fn scene(version: &str) -> Scene {
    Scene::with(json!({ "preset": "public_chat", "room_version": version })).await
}

/// An event as `/event` gives it to a server; the status where it gives none.
async fn event(server: &TestServer, asking: &Peer, id: &str) -> Result<Value, StatusCode> {
    let uri = format!("/_matrix/federation/v1/event/{}", encoded(id));
    let (status, told) = asking.ask(server, Method::GET, &uri, None).await;
    if status == StatusCode::OK { Ok(told["pdus"][0].clone()) } else { Err(status) }
}

/// An event of bob's on the room's heads, under an id that his server has chosen.
fn under(scene: &Scene, of: &Remote, id: &str, text: &str, prev: &[OwnedEventId]) -> Value {
    let content = json!({ "msgtype": "m.text", "body": text });
    let (_, mut event) = scene.peer.event(of, "m.room.message", None, content, prev);
    event["event_id"] = json!(id);
    scene.peer.sign_event(&event, "1").1
}

#[tokio::test(start_paused = true)]
async fn events_of_ours_say_their_ids_and_cite_others_with_their_hashes() {
    for version in ["1", "2"] {
        let scene = scene(version).await;
        let (said, _) = scene.says("hello", &scene.bob.heads());
        let (_, bobs) = scene.says("hello", &scene.bob.heads());
        assert_eq!(scene.send("1", &[bobs]).await.1["pdus"][said.as_str()], json!({}));
        let id = scene.alice.say(&scene.room, "1", "hi").await;
        assert!(id.ends_with(":test.example"), "{id}");
        let own = event(&scene.server, &scene.peer, &id).await.unwrap();
        assert_eq!(own["event_id"], id);
        let rules = ruma::RoomVersionId::try_from(version).unwrap().rules().unwrap();
        let cited: Vec<_> = own["prev_events"].as_array().unwrap().iter().collect();
        assert_eq!(cited.len(), 1);
        for pair in cited.into_iter().chain(own["auth_events"].as_array().unwrap()) {
            let cited = event(&scene.server, &scene.peer, pair[0].as_str().unwrap()).await.unwrap();
            let cited = serde_json::from_value(cited).unwrap();
            let hash = ruma::signatures::reference_hash(&cited, &rules).unwrap();
            assert_eq!(pair[1], json!({ "sha256": hash }), "{pair}");
        }
        assert_eq!(own["prev_events"][0][0], said.as_str());
        // Clients are shown the id, and nothing twice.
        let shown = scene.alice.ok_get(&format!("/rooms/{}/event/{}", scene.room, encoded(&id))).await;
        assert_eq!((&shown["event_id"], &shown["content"]["body"]), (&json!(id), &json!("hi")));
        assert_eq!(shown.get("prev_events"), None);
        let since = scene.alice.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
        let redact = format!("/rooms/{}/redact/{}/r", scene.room, encoded(&id));
        scene.alice.ok_put(&redact, json!({})).await;
        assert_eq!(event(&scene.server, &scene.peer, &id).await.unwrap()["content"], json!({}));
        assert!(scene.alice.ok_get(&format!("/sync?since={since}")).await.to_string().contains(&id));
        scene.server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn of_two_events_of_one_id_the_first_counts_and_the_other_is_given_to_nobody() {
    for version in ["1", "2"] {
        let scene = scene(version).await;
        let heads = scene.bob.heads();
        let first = under(&scene, &scene.bob, "$same:b.example", "first", &heads);
        let second = under(&scene, &scene.bob, "$same:b.example", "second", &heads);
        for (txn, events) in [("1", vec![first.clone(), second.clone()]), ("2", vec![second.clone()])] {
            let (_, told) = scene.send(txn, &events).await;
            assert_eq!(told, json!({ "pdus": { "$same:b.example": {} } }));
        }
        assert_eq!(scene.texts().await, ["first"]);
        assert_eq!(event(&scene.server, &scene.peer, "$same:b.example").await.unwrap(), first);
        // Whatever stands on the id stands on the first one, also where the hash beside it is that of the second.
        let after =
            under(&scene, &scene.bob, "$after:b.example", "after", &["$same:b.example".try_into().unwrap()]);
        assert_eq!(scene.send("3", &[after]).await.1, json!({ "pdus": { "$after:b.example": {} } }));
        assert_eq!(scene.texts().await, ["after", "first"]);
        scene.server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn an_event_is_signed_by_the_server_in_its_id() {
    let scene = scene("2").await;
    let other = Peer::new(&scene.net, "c.example", "5.0.0.3", 3);
    let id = "$theirs:c.example";
    let event = under(&scene, &scene.bob, id, "in another's name", &scene.bob.heads());
    let (_, told) = scene.send("1", std::slice::from_ref(&event)).await;
    assert!(told["pdus"][id]["error"].as_str().unwrap().contains("c.example"), "{told}");
    let mut forged = event.clone();
    forged["signatures"]["c.example"] = event["signatures"]["b.example"].clone();
    let (_, told) = scene.send("2", &[forged]).await;
    assert!(told["pdus"][id]["error"].is_string(), "{told}");
    assert!(scene.texts().await.is_empty());
    let mut both = event.clone();
    both["signatures"]["c.example"] = other.sign_event(&event, "2").1["signatures"]["c.example"].clone();
    assert_eq!(scene.send("3", &[both]).await.1, json!({ "pdus": { id: {} } }));
    assert_eq!(scene.texts().await, ["in another's name"]);
}

#[tokio::test(start_paused = true)]
async fn odd_ids_come_in_and_go_out_as_they_are_and_long_ones_do_not() {
    let scene = scene("1").await;
    let odd = ["$ /%2F?#&é\u{7f}\u{0}\n\"\\:b.example", "$:b.example", "$$:b.example"];
    let mut prev = scene.bob.heads();
    for (number, id) in odd.into_iter().enumerate() {
        let said = under(&scene, &scene.bob, id, id, &prev);
        let (_, told) = scene.send(id, std::slice::from_ref(&said)).await;
        assert_eq!(told, json!({ "pdus": { id: {} } }), "{id:?}");
        assert_eq!(scene.texts().await.len(), number + 1);
        assert_eq!(event(&scene.server, &scene.peer, id).await.unwrap(), said);
        let shown = scene.alice.ok_get(&format!("/rooms/{}/event/{}", scene.room, encoded(id))).await;
        assert_eq!((&shown["event_id"], &shown["content"]["body"]), (&json!(id), &json!(id)));
        prev = vec![id.try_into().unwrap()];
    }
    for wrong in [&*format!("${}:b.example", "x".repeat(250)), "$x", "x:b.example", "", "$x:b example"] {
        let said = under(&scene, &scene.bob, wrong, "wrong", &prev);
        scene.send(&format!("wrong {}", wrong.len()), &[said]).await;
        assert_eq!(scene.texts().await.len(), odd.len(), "{wrong}");
    }
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn rooms_with_events_of_one_id_keep_them_apart() {
    let scene = scene("1").await;
    let room = scene.alice.create(json!({ "preset": "public_chat", "room_version": "2" })).await;
    let carol = Peer::new(&scene.net, "c.example", "5.0.0.3", 3);
    let bob = Remote::new(scene.server.server().app(), &room);
    for (peer, of) in [
        (&scene.peer, &bob),
        (&carol, &Remote { user: "@carol:c.example".try_into().unwrap(), ..bob.clone() }),
    ] {
        let content = json!({ "membership": "join" });
        let (id, join) = peer.event(of, "m.room.member", Some(of.user.as_str()), content, &of.heads());
        let (_, told) = peer.transact(&scene.server, &format!("join {}", of.user), &[join], &[]).await;
        assert_eq!(told["pdus"][id.as_str()], json!({}), "{told}");
    }
    let id = "$same:b.example";
    let here = under(&scene, &scene.bob, id, "here", &scene.bob.heads());
    let there = under(&scene, &bob, id, "there", &bob.heads());
    for (txn, event) in [("1", &here), ("2", &there)] {
        assert_eq!(scene.send(txn, std::slice::from_ref(event)).await.1, json!({ "pdus": { id: {} } }));
    }
    for (room, text) in [(&scene.room, "here"), (&room, "there")] {
        let shown = scene.alice.ok_get(&format!("/rooms/{room}/event/{}", encoded(id))).await;
        assert_eq!(shown["content"]["body"], text);
    }
    // A server gets the event of the room that it is in.
    assert_eq!(event(&scene.server, &carol, id).await, Ok(there.clone()));
    let told = event(&scene.server, &scene.peer, id).await.unwrap();
    assert!(told == here || told == there, "{told}");
    let stranger = Peer::new(&scene.net, "d.example", "5.0.0.4", 4);
    assert_eq!(event(&scene.server, &stranger, id).await, Err(StatusCode::NOT_FOUND));
    // They are kept apart in one transaction, too.
    let id = "$both:b.example";
    let here = under(&scene, &scene.bob, id, "here", &scene.bob.heads());
    let there = under(&scene, &bob, id, "there", &bob.heads());
    assert_eq!(scene.send("3", &[here, there]).await.1, json!({ "pdus": { id: {} } }));
    for (room, text) in [(&scene.room, "here"), (&room, "there")] {
        let shown = scene.alice.ok_get(&format!("/rooms/{room}/event/{}", encoded(id))).await;
        assert_eq!(shown["content"]["body"], text);
    }
    let id = "$same:b.example";
    // Redacting one leaves the other.
    scene.alice.ok_put(&format!("/rooms/{room}/redact/{}/r", encoded(id)), json!({})).await;
    let shown = scene.alice.ok_get(&format!("/rooms/{}/event/{}", scene.room, encoded(id))).await;
    assert_eq!(shown["content"]["body"], "here");
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_forged_event_that_waits_keeps_nothing_from_the_event_of_its_id() {
    let scene = scene("2").await;
    let staged = || {
        let snapshot = scene.server.server().app().store.snapshot();
        schema::INBOUND_EVENT.prefix::<()>(&*snapshot, (), Direction::Up).unwrap().count()
    };
    let id = "$late:b.example";
    let heads = scene.bob.heads();
    let (first, one) = scene.says("one", &heads);
    let real = under(&scene, &scene.bob, id, "real", std::slice::from_ref(&first));
    // The key of the forger cannot be had, so that nobody can say yet that its event is forged.
    let gone = Peer::new(&scene.net, "d.example", "5.0.0.4", 4);
    let dan = Remote { user: "@dan:d.example".try_into().unwrap(), ..scene.bob.clone() };
    let content = json!({ "membership": "join" });
    let (_, mut forged) = gone.event(&dan, "m.room.member", Some("@dan:d.example"), content, &heads);
    forged["event_id"] = json!(id);
    let mut forged = gone.sign_event(&forged, "2").1;
    let signature = forged["signatures"]["d.example"]["ed25519:k"].clone();
    forged["signatures"] =
        json!({ "d.example": { "ed25519:new": signature }, "b.example": { "ed25519:k": signature } });
    assert_eq!(gone.transact(&scene.server, "0", &[], &[]).await.0, StatusCode::OK);
    scene.net.weather("5.0.0.4:8448", Weather::Silent, Duration::ZERO);
    let app = scene.server.server().app();
    let (_, told) = gone.transact(&scene.server, "1", &[forged], &[]).await;
    assert_eq!((told, staged()), (json!({ "pdus": { id: {} } }), 1));
    let (_, told) = scene.send("1", &[real]).await;
    assert_eq!((told, staged()), (json!({ "pdus": { id: {} } }), 2), "both wait");
    scene.send("2", &[one]).await;
    app.env.sleep(Duration::from_secs(30)).await;
    assert_eq!(scene.texts().await, ["real", "one"]);
}

#[tokio::test(start_paused = true)]
async fn servers_share_rooms_of_the_first_versions_in_both_directions() {
    for version in ["1", "2"] {
        let federated = Federated::new(&["a.example", "b.example", "c.example"]);
        let alice = federated.server(0).register("alice").await;
        let bob = federated.server(1).register("bob").await;
        let carol = federated.server(2).register("carol").await;
        let body = json!({ "preset": "public_chat", "room_version": version, "name": "Old" });
        let room = alice.ok_post("/createRoom", body).await["room_id"].as_str().unwrap().to_owned();
        let path = encoded(&room);
        let say = async |who: &crate::support::TestClient, text: &str| {
            let content = json!({ "msgtype": "m.text", "body": text });
            let path = format!("/rooms/{path}/send/m.room.message/{text}");
            who.ok_put(&path, content).await["event_id"].as_str().unwrap().to_owned()
        };
        let pause = async || federated.server(0).server().app().env.sleep(Duration::from_secs(5)).await;
        for number in 0..30 {
            say(&alice, &format!("old{number}")).await;
        }
        bob.ok_post(&format!("/join/{path}?via=a.example"), json!({})).await;
        carol.ok_post(&format!("/join/{path}?via=b.example"), json!({})).await;
        pause().await;
        // All speak at once, so that the room forks, and somebody is banned on one branch.
        let levels = format!("/rooms/{path}/state/m.room.power_levels");
        let mut content = alice.ok_get(&levels).await;
        content["users"][&bob.user_id] = json!(50);
        alice.ok_put(&levels, content).await;
        pause().await;
        federated.weather(2, Weather::Silent, Duration::ZERO);
        say(&carol, "apart").await;
        let ban = json!({ "user_id": carol.user_id });
        bob.ok_post(&format!("/rooms/{path}/ban"), ban).await;
        let topic = format!("/rooms/{path}/state/m.room.topic");
        alice.ok_put(&topic, json!({ "topic": "by alice" })).await;
        let theirs = say(&bob, "together").await;
        pause().await;
        federated.weather(2, Weather::Fair, Duration::ZERO);
        federated.server(0).server().app().env.sleep(Duration::from_secs(3600)).await;
        say(&alice, "after").await;
        pause().await;
        let mut states = Vec::new();
        for (who, place) in [(&alice, 0), (&bob, 1)] {
            let state = who.ok_get(&format!("/rooms/{path}/state")).await;
            let ids =
                state.as_array().unwrap().iter().map(|event| event["event_id"].as_str().unwrap().to_owned());
            states.push(ids.collect::<std::collections::BTreeSet<_>>());
            let page = who.ok_get(&format!("/rooms/{path}/messages?dir=b&limit=100")).await;
            for text in ["after", "together", "old0", "old29"] {
                assert!(
                    page.to_string().contains(&format!("\"{text}\"")),
                    "{version} {place}: {text} of {page}"
                );
            }
            assert_eq!(who.ok_get(&topic).await["topic"], "by alice");
            federated.server(place).assert_whole();
        }
        assert_eq!(states[0], states[1]);
        // A redaction by power goes over.
        alice.ok_put(&format!("/rooms/{path}/redact/{}/r", encoded(&theirs)), json!({})).await;
        pause().await;
        let shown = bob.ok_get(&format!("/rooms/{path}/event/{}", encoded(&theirs))).await;
        assert_eq!(shown["content"], json!({}));
        federated.server(2).assert_whole();
    }
}

/// The server under test in a network with the one server of a room.
async fn invited_by(room: &Elsewhere) -> (TestServer, crate::support::TestClient, Peer) {
    let net = Net::new(1);
    room.serve(&net, honest());
    let store = aqueduct::store::Store::open(
        aqueduct::store::Engine::Memory(aqueduct::store::engine::Memory::default()),
        aqueduct::store::Durability::Fsync,
    );
    let server = TestServer::start(doors(&net), store.unwrap(), |_| {});
    let bob = server.register("bob").await;
    (server, bob, Peer::unheard("a.example", 9))
}

#[tokio::test(start_paused = true)]
async fn an_invitation_comes_in_the_first_form_of_the_endpoint_too() {
    for version in [1, 2] {
        let mut room = Elsewhere::new(version);
        room.add("m.room.join_rules", Some(""), json!({ "join_rule": "invite" }));
        let event: Made = room.event(ALICE, "m.room.member", Some(BOB), json!({ "membership": "invite" }));
        let mut after = room.clone();
        after.events.push(event.clone());
        after.state.insert(("m.room.member".to_owned(), BOB.to_owned()), event.clone());
        let (server, bob, peer) = invited_by(&after).await;
        let state: Vec<_> = room.state.values().map(|event| &event.json).collect();
        let mut body = event.json.clone();
        body["unsigned"] = json!({ "invite_room_state": state });
        let (room_id, id) = (room.room_id.as_str(), event.id.as_str());
        let uri = format!("/_matrix/federation/v1/invite/{}/{}", encoded(room_id), encoded(id));
        let (status, told) = peer.ask(&server, Method::PUT, &uri, Some(&body)).await;
        assert_eq!((status, &told[0]), (StatusCode::OK, &json!(200)), "{told}");
        let mut signed = told[1]["event"].clone();
        assert!(signed["signatures"].as_object_mut().unwrap().remove("test.example").is_some());
        assert_eq!(signed, event.json);
        let shown = bob.ok_get("/sync").await["rooms"]["invite"][room_id]["invite_state"]["events"].clone();
        assert_eq!(shown.as_array().unwrap().len(), room.state.len(), "{shown}");
        bob.ok_post(&format!("/join/{}", encoded(room_id)), json!({})).await;
        assert_eq!(bob.ok_get("/joined_rooms").await["joined_rooms"], json!([room_id]));
        server.assert_whole();
        // The endpoint refuses what is no event, and one of a later version.
        for odd in [json!({}), json!([]), Elsewhere::new(11).events[0].json.clone()] {
            let (status, told) = peer.ask(&server, Method::PUT, &uri, Some(&odd)).await;
            assert_eq!(status, StatusCode::BAD_REQUEST, "{told}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_signed_under_an_id_of_this_server() {
    let room = Elsewhere::new(1);
    let (server, _, peer) = invited_by(&room).await;
    for (id, may) in [("$x:test.example", false), ("$x:c.example", false), ("$x:a.example", true)] {
        let made = room.event(ALICE, "m.room.member", Some(BOB), json!({ "membership": "invite" }));
        let mut event = made.json.clone();
        event["event_id"] = json!(id);
        let mut event = peer.sign_event(&event, "1").1;
        let server_of_id = id.split_once(':').unwrap().1;
        event["signatures"][server_of_id] = event["signatures"]["a.example"].clone();
        let uri = format!("/_matrix/federation/v2/invite/{}/{}", encoded(room.room_id.as_str()), encoded(id));
        let body = json!({ "room_version": "1", "event": event, "invite_room_state": [] });
        let (status, told) = peer.ask(&server, Method::PUT, &uri, Some(&body)).await;
        assert_eq!(status == StatusCode::OK, may, "{id}: {told}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_knows_only_the_first_form_of_invitations_is_asked_in_it() {
    for version in ["1", "2", "11"] {
        let net = Net::new(1);
        let old = Arc::new(Peer::unheard("b.example", 5));
        net.host("b.example", &["5.0.0.5"]);
        let (signing, of) = (Arc::clone(&old), version.to_owned());
        net.serve("5.0.0.5:8448", &["b.example"], move |arrived| {
            let path = arrived.request.uri().path().to_owned();
            let body: Value = serde_json::from_slice(arrived.request.body()).unwrap_or_default();
            let told = if path.starts_with("/_matrix/key/") {
                answer(200, signing.own.document(crate::support::BEGAN_MS).to_string())
            } else if path.starts_with("/_matrix/federation/v1/invite/") {
                assert!(body["unsigned"]["invite_room_state"].is_array());
                let mut both = body.clone();
                both.as_object_mut().unwrap().remove("unsigned");
                let (_, own) = signing.sign_event(&both, &of);
                both["signatures"]["b.example"] = own["signatures"]["b.example"].clone();
                answer(200, json!([200, { "event": both }]).to_string())
            } else {
                answer(404, r#"{"errcode":"M_UNRECOGNIZED","error":"?"}"#)
            };
            std::future::ready(told)
        });
        let store = aqueduct::store::Store::open(
            aqueduct::store::Engine::Memory(aqueduct::store::engine::Memory::default()),
            aqueduct::store::Durability::Fsync,
        );
        let server = TestServer::start(doors(&net), store.unwrap(), |_| {});
        let alice = server.register("alice").await;
        let room = alice.create(json!({ "preset": "private_chat", "room_version": version })).await;
        let path = format!("/_matrix/client/v3/rooms/{room}/invite");
        let (status, told) = alice.post(&path, json!({ "user_id": "@carol:b.example" })).await;
        assert_eq!(status == StatusCode::OK, version != "11", "{version}: {told}");
        let (_, member) = alice.state(&room, "m.room.member", "@carol:b.example").await;
        assert_eq!(member["membership"] == "invite", version != "11");
        server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn a_join_under_the_id_of_another_event_is_no_join() {
    let scene = scene("1").await;
    let taken = under(&scene, &scene.bob, "$taken:b.example", "hello", &scene.bob.heads());
    assert_eq!(scene.send("1", &[taken]).await.0, StatusCode::OK);
    let (_, mut join) = scene.peer.made(&scene.server, "join", &scene.room, "@eve:b.example").await;
    join["event_id"] = json!("$taken:b.example");
    let (id, join) = scene.peer.sign_event(&join, "1");
    let (status, told) = scene.peer.send(&scene.server, "v2/send_join", &scene.room, &id, &join).await;
    assert_eq!((status, &told["errcode"]), (StatusCode::BAD_REQUEST, &json!("M_INVALID_PARAM")), "{told}");
    assert_eq!(
        scene.alice.state(&scene.room, "m.room.member", "@eve:b.example").await.0,
        StatusCode::NOT_FOUND
    );
}

#[tokio::test(start_paused = true)]
async fn a_template_carries_hashes_and_one_in_another_form_is_not_signed() {
    type Spoil = fn(&mut Value);
    let spoils: [(&str, Spoil); 6] = [
        ("as it is", |_| ()),
        // Synapse gives templates so, when it was asked for the hash of an event before it had that.
        ("as it is, but for a hash that is not known", |it| it["event"]["auth_events"][0][1] = json!({})),
        ("plain ids", |it| it["event"]["prev_events"] = json!(["$a:a.example"])),
        ("no object", |it| it["event"]["auth_events"] = json!([["$a:a.example"]])),
        ("a number", |it| it["event"]["auth_events"] = json!([["$a:a.example", { "sha256": 1 }]])),
        ("a long hash", |it| it["event"]["prev_events"][0][1]["sha256"] = json!("x".repeat(45))),
    ];
    for (name, spoil) in spoils {
        let room = Elsewhere::new(1);
        let tamper: Tamper = Arc::new(move |asked, mut honest| {
            if asked == "make_join" {
                spoil(&mut honest);
            }
            answer(200, honest.to_string())
        });
        let (_server, bob, asked, _net) = against(&room, tamper).await;
        let path = format!("/_matrix/client/v3/join/{}?via=a.example", encoded(room.room_id.as_str()));
        let (status, told) = bob.post(&path, json!({})).await;
        assert_eq!(status == StatusCode::OK, name.starts_with("as it is"), "{name}: {told}");
        let asked = asked.lock().unwrap();
        let sent = asked.iter().find(|(path, _)| path.contains("/v2/send_join/")).map(|(_, body)| body);
        match sent {
            Some(sent) => {
                let last = &room.events.last().unwrap().id;
                assert_eq!(sent["prev_events"], json!([[last, { "sha256": "x" }]]), "{name}");
                let known =
                    sent["auth_events"].as_array().unwrap().iter().filter(|it| it[1]["sha256"] == "x");
                assert_eq!(known.count(), if name == "as it is" { 3 } else { 2 }, "{sent}");
            }
            None => assert!(!name.starts_with("as it is")),
        }
    }
}
