//! Joins by way of other servers, beside which others tell much of the room, or which come true long after their users have left.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use aqueduct::{
    rooms::{build::Signer, versions},
    store::{Durability, Engine, Store},
};
use federation::testing::{Weather, json as answer, key_pair};
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    remote_joins::{against, api, rooms_of, serve_late, was_asked},
    support::{
        TestServer, encoded,
        network::{Peer, doors},
        scripted::{ALICE, Elsewhere, Made, Tamper, honest},
    },
};

#[tokio::test(start_paused = true)]
async fn what_servers_in_no_room_tell_of_it_keeps_nobody_out() {
    let room = Elsewhere::new(11);
    let (server, bob, _asked, net) = against(&room, honest()).await;
    let app = server.server().app().clone();
    let (asked, _open) = serve_late(&net, &app.env, &room, Duration::from_secs(8));
    let at = api(&format!("/join/{}?via=evil.example", encoded(room.room_id.as_str())));
    let tell = async {
        app.env.sleep(Duration::from_secs(2)).await;
        assert!(was_asked(&asked, "send_join"));
        for number in 0..16_u8 {
            let name = format!("s{number}.example");
            let peer = Peer::new(&net, &name, &format!("5.8.0.{number}"), 100 + number);
            let mut theirs = room.clone();
            theirs.signer =
                Signer::new(name.as_str().try_into().unwrap(), key_pair(100 + number, "k").unwrap().into());
            let says = |bytes: usize| {
                let content = json!({ "body": "x".repeat(bytes) });
                theirs.event(&format!("@m:{name}"), "m.room.message", None, content)
            };
            let event = says(65_500 - says(0).json.to_string().len());
            let (status, told) = peer.transact(&server, "1", std::slice::from_ref(&event.json), &[]).await;
            assert_eq!(status, StatusCode::OK);
            assert_eq!(told["pdus"][event.id.as_str()], json!({}), "{number}: {told}");
        }
    };
    let (joined, ()) = tokio::join!(bob.post(&at, json!({})), tell);
    assert_eq!(joined.0, StatusCode::OK, "{joined:?}");
    app.env.sleep(Duration::from_secs(60)).await;
    assert_eq!(rooms_of(&bob).await, [room.room_id.as_str()]);
    assert!(!was_asked(&asked, "send_leave"), "nobody is told that the user is not in the room");
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn whoever_leaves_during_a_join_is_taken_out_by_whom_it_was_sent_to_also_after_a_restart() {
    for restarts in [false, true] {
        let room = Elsewhere::new(11);
        let (mut server, mut bob, _asked, net) = against(&room, honest()).await;
        let env = server.server().app().env.clone();
        let (asked, _open) = serve_late(&net, &env, &room, Duration::from_secs(3_600));
        let id = encoded(room.room_id.as_str());
        let (joins, at) = (bob.clone(), api(&format!("/join/{id}?via=evil.example")));
        let joining = server.begin(async move { joins.post(&at, json!({})).await });
        env.sleep(Duration::from_secs(2)).await;
        assert!(was_asked(&asked, "send_join"), "the other server has taken the join");
        assert_eq!(bob.post(&api(&format!("/rooms/{id}/leave")), json!({})).await.0, StatusCode::OK);
        assert_eq!(joining.await.unwrap().0, StatusCode::FORBIDDEN);
        assert!(!was_asked(&asked, "send_leave"), "it may not have taken the join yet");
        if restarts {
            let Engine::Memory(memory) = server.server().app().store.engine() else {
                panic!("not in memory")
            };
            let memory = Engine::Memory(memory.after_crash(0));
            env.kill();
            server = TestServer::start(doors(&net), Store::open(memory, Durability::Fsync).unwrap(), |_| {});
            bob.server = server.clone();
        }
        server.server().app().env.sleep(Duration::from_secs(120)).await;
        assert!(was_asked(&asked, "send_leave"), "restarts: {restarts}");
        let count = || asked.lock().unwrap().iter().filter(|(path, _)| path.contains("/send_leave/")).count();
        let told = count();
        server.server().app().env.sleep(Duration::from_secs(3 * 60 * 60)).await;
        // Without a restart the join itself ends in between, and is taken back once more.
        assert!(!restarts || count() == told, "a server that has taken the user out is asked no more");
        assert!(rooms_of(&bob).await.is_empty());
        // A user who wants in again stays.
        assert_eq!(bob.post(&api(&format!("/join/{id}?via=a.example")), json!({})).await.0, StatusCode::OK);
        server.server().app().env.sleep(Duration::from_secs(3 * 60 * 60)).await;
        assert_eq!(rooms_of(&bob).await, [room.room_id.as_str()]);
        server.assert_whole();
    }
}

/// A room whose server lets users in who may not come in by way of others, and which goes on by an event that it keeps to itself.
struct Vouching {
    room: Elsewhere,
    /// The event on which joins stand from when it is there.
    gap: Arc<Mutex<Option<Made>>>,
    /// Whether it says what the room was. Until then joins wait for that event.
    tells: Arc<AtomicBool>,
}

impl Vouching {
    fn new() -> Self {
        let mut room = Elsewhere::new(11);
        room.add("m.room.power_levels", Some(""), json!({ "users": { ALICE: 100 }, "invite": 50 }));
        let allow = json!([{ "type": "m.room_membership", "room_id": "!other:a.example" }]);
        room.add("m.room.join_rules", Some(""), json!({ "join_rule": "restricted", "allow": allow }));
        Self { room, gap: Arc::default(), tells: Arc::default() }
    }

    fn countersigned(room: &Elsewhere, event: &Value) -> Value {
        let rules = versions::find_rules(room.version).unwrap();
        let json = serde_json::to_vec(event).unwrap();
        serde_json::from_slice(&room.signer.countersign(&json, rules).unwrap()).unwrap()
    }

    fn tamper(&self) -> Tamper {
        let (room, gap, tells) = (self.room.clone(), Arc::clone(&self.gap), Arc::clone(&self.tells));
        let alice = room.state[&("m.room.member".to_owned(), ALICE.to_owned())].id.clone();
        Arc::new(move |endpoint, mut honest| {
            match endpoint {
                "make_join" => {
                    let event = &mut honest["event"];
                    event["content"]["join_authorised_via_users_server"] = json!(ALICE);
                    event["auth_events"].as_array_mut().unwrap().push(json!(alice));
                    if let Some(gap) = &*gap.lock().unwrap() {
                        event["prev_events"] = json!([gap.id]);
                    }
                }
                "send_join" => {
                    honest["event"] = Self::countersigned(&room, &honest["event"]);
                    // Events that others took the place of have allowed some of those in the state.
                    honest["auth_chain"] = room.events.iter().map(|made| made.json.clone()).collect();
                }
                "state_ids" | "state" | "event" if !tells.load(Ordering::SeqCst) => {
                    return answer(404, r#"{"errcode":"M_NOT_FOUND","error":"?"}"#);
                }
                _ => {}
            }
            answer(200, honest.to_string())
        })
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_leaves_while_another_server_vouches_stays_out_whenever_the_join_comes_true() {
    for (after_ms, restarts) in [(1, false), (3_000, false), (6_000, true), (30_000, false), (30_000, true)] {
        let vouching = Vouching::new();
        let mut room = vouching.room.clone();
        let (mut server, mut bob, asked, net) = against(&room, vouching.tamper()).await;
        let mut carol = server.register("carol").await;
        let id = encoded(room.room_id.as_str());
        carol.ok_post(&format!("/join/{id}?via=a.example"), json!({})).await;
        let gap = room.add("m.room.message", None, json!({ "msgtype": "m.text", "body": "untold" }));
        *vouching.gap.lock().unwrap() = Some(gap.clone());
        net.weather("5.9.0.1:8448", Weather::Fair, Duration::from_secs(2));
        let env = server.server().app().env.clone();
        let (joins, leaves) = (api(&format!("/join/{id}?via=a.example")), api(&format!("/rooms/{id}/leave")));
        let leave = async {
            env.sleep(Duration::from_millis(after_ms)).await;
            assert_eq!(bob.post(&leaves, json!({})).await, (StatusCode::OK, json!({})), "{after_ms}");
            assert!(rooms_of(&bob).await.is_empty(), "{after_ms}");
        };
        let (joined, ()) = tokio::join!(bob.post(&joins, json!({})), leave);
        assert_ne!(joined.0, StatusCode::OK, "{after_ms}: {joined:?}");
        net.weather("5.9.0.1:8448", Weather::Fair, Duration::ZERO);
        if restarts {
            let Engine::Memory(memory) = server.server().app().store.engine() else {
                panic!("not in memory")
            };
            let memory = Engine::Memory(memory.after_crash(0));
            env.kill();
            let store = Store::open(memory, Durability::Fsync).unwrap();
            server = TestServer::start(doors(&net), store, |_| {});
            (bob.server, carol.server) = (server.clone(), server.clone());
        }
        vouching.tells.store(true, Ordering::SeqCst);
        let env = server.server().app().env.clone();
        let ours = |(path, _): &&(String, Value)| path.contains("/send_join/");
        let sent = asked.lock().unwrap().iter().filter(ours).nth(1).cloned();
        assert!(sent.is_some() || after_ms < 6_000, "{after_ms}: the other server has taken the join");
        let is_sent = sent.is_some();
        let peer = Peer::unheard("a.example", 9);
        let mut told = vec![gap.json.clone()];
        if let Some((path, json)) = sent {
            let id = path.rsplit('/').next().unwrap().replace("%24", "$").as_str().try_into().unwrap();
            let json = Vouching::countersigned(&room, &json);
            told.push(json.clone());
            room.events.push(Made { id, json });
        }
        let (status, results) = peer.transact(&server, "gap", &told, &[]).await;
        assert_eq!(status, StatusCode::OK);
        assert!(results["pdus"].as_object().unwrap().values().all(|it| *it == json!({})), "{results}");
        env.sleep(Duration::from_secs(120)).await;
        assert!(rooms_of(&bob).await.is_empty(), "{after_ms}, restarts: {restarts}");
        if is_sent {
            let member = format!("/rooms/{id}/state/m.room.member/{}", encoded(&bob.user_id));
            let end = carol.ok_get(&member).await["membership"].clone();
            assert_eq!(end, "leave", "{after_ms}, restarts: {restarts}: it has come true, and is over");
        }
        // A user who comes back by another join stays.
        let public = room.add("m.room.join_rules", Some(""), json!({ "join_rule": "public" }));
        let (_, results) = peer.transact(&server, "public", &[public.json], &[]).await;
        assert_eq!(results["pdus"][public.id.as_str()], json!({}), "{results}");
        // The new rule may take a moment to count.
        env.sleep(Duration::from_secs(10)).await;
        let joined = bob.post(&api(&format!("/join/{id}")), json!({})).await;
        assert_eq!(joined.0, StatusCode::OK, "{after_ms}, restarts: {restarts}: {joined:?}");
        env.sleep(Duration::from_secs(3 * 60 * 60)).await;
        assert_eq!(rooms_of(&bob).await, [room.room_id.as_str()], "{after_ms}");
        server.assert_whole();
    }
}
