//! Users of ours come into rooms of other servers (client-server API, "Joining rooms"; server-server API, "Joining Rooms").

use std::{sync::Arc, time::Duration};

use federation::testing::{Answered, Net, Weather, json as answer};
use futures_util::FutureExt;
use http::StatusCode;
use serde_json::{Value, json};

use crate::support::{
    TestClient, TestServer, encoded,
    federated::Federated,
    network::{Peer, doors},
    scripted::{ALICE, Elsewhere, Made, Tamper, honest},
};

/// The server under test in a network with the one server of a room.
pub(crate) async fn against(
    room: &Elsewhere,
    tamper: Tamper,
) -> (TestServer, TestClient, Arc<std::sync::Mutex<Vec<(String, Value)>>>, Net) {
    let net = Net::new(1);
    let asked = room.serve(&net, tamper);
    let store = aqueduct::store::Store::open(
        aqueduct::store::Engine::Memory(aqueduct::store::engine::Memory::default()),
        aqueduct::store::Durability::Fsync,
    );
    let server = TestServer::start(doors(&net), store.unwrap(), |_| {});
    let bob = server.register("bob").await;
    (server, bob, asked, net)
}

pub(crate) async fn try_join(client: &TestClient, room: &str) -> (StatusCode, Value) {
    client.post(&format!("/_matrix/client/v3/join/{}?via=a.example", encoded(room)), json!({})).await
}

/// The whole path of an endpoint for clients.
pub(crate) fn api(path: &str) -> String {
    format!("/_matrix/client/v3{path}")
}

/// Changes the answer of one endpoint.
fn at(endpoint: &'static str, change: impl Fn(&mut Value) + Send + Sync + 'static) -> Tamper {
    Arc::new(move |asked, mut honest| {
        if asked == endpoint {
            change(&mut honest);
        }
        answer(200, honest.to_string())
    })
}

/// Whether the user has the room in their first sync, and how many rooms they have.
pub(crate) async fn rooms_of(client: &TestClient) -> Vec<Value> {
    client.ok_get("/joined_rooms").await["joined_rooms"].as_array().unwrap().clone()
}

/// A change that spoils an answer.
type Spoil = fn(&mut Value);

#[tokio::test(start_paused = true)]
async fn a_user_joins_a_public_room_of_another_server_and_sees_it() {
    for version in [1, 2, 3, 6, 10, 11, 12] {
        let room = Elsewhere::new(version);
        let (server, bob, asked, _) = against(&room, honest()).await;
        bob.ok_put(&format!("/profile/{}/displayname", bob.user_id), json!({ "displayname": "Bob" })).await;
        let since = bob.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
        let path = format!("/join/{}?server_name=a.example", encoded(room.room_id.as_str()));
        let joined = bob.ok_post(&path, json!({ "reason": "why not" })).await;
        assert_eq!(joined["room_id"], room.room_id.as_str());
        let sent =
            asked.lock().unwrap().iter().find(|(path, _)| path.contains("/v2/send_join/")).unwrap().1.clone();
        assert_eq!(
            sent["content"],
            json!({ "membership": "join", "displayname": "Bob", "reason": "why not" })
        );
        let id = sent.get("event_id").and_then(Value::as_str);
        assert!(id.map_or(version >= 3, |id| version < 3 && id.ends_with(":test.example")), "{sent}");
        assert!(sent["signatures"].get("test.example").is_some(), "{sent}");
        for path in ["/sync".to_owned(), format!("/sync?since={since}")] {
            let sync = bob.ok_get(&path).await;
            let told = &sync["rooms"]["join"][room.room_id.as_str()];
            let timeline = told["timeline"]["events"].as_array().unwrap();
            assert_eq!(timeline.len(), 1, "{told}");
            assert_eq!(timeline[0]["state_key"], bob.user_id);
            assert_eq!(told["state"]["events"].as_array().unwrap().len(), room.state.len());
            assert_eq!(told["summary"]["m.joined_member_count"], 2);
        }
        server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_comes_back_at_once_is_in_the_room_again() {
    let room = Elsewhere::new(11);
    let (server, bob, asked, _net) = against(&room, honest()).await;
    let room_id = encoded(room.room_id.as_str());
    for _ in 0..3 {
        bob.ok_post(&format!("/join/{room_id}?via=a.example"), json!({})).await;
        assert_eq!(rooms_of(&bob).await, [room.room_id.as_str()]);
        bob.ok_post(&format!("/rooms/{room_id}/leave"), json!({})).await;
    }
    let asked = asked.lock().unwrap();
    let sent: Vec<_> = asked.iter().filter(|(path, _)| path.contains("/send_join/")).collect();
    assert!(sent.len() == 3 && sent[0].0 != sent[1].0 && sent[1].0 != sent[2].0, "{sent:?}");
    drop(asked);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn joins_that_wait_for_the_keys_of_silent_servers_hold_up_no_other() {
    let mut rooms = vec![Elsewhere::of_id(10, "!honest:a.example")];
    for number in 0..8 {
        let mut room = Elsewhere::of_id(10, &format!("!trap{number}:a.example"));
        for member in 0..20 {
            let user = format!("@x:s{member}n{number}.example");
            room.add_by(&user, "m.room.member", Some(&user), json!({ "membership": "join" }));
        }
        rooms.push(room);
    }
    // Each member is said to have signed by a key of their own server, which never answers.
    let tamper = at("send_join", |it| {
        for event in it["state"].as_array_mut().unwrap() {
            let server = event["sender"].as_str().unwrap().split_once(':').unwrap().1.to_owned();
            let signed = event["signatures"]["a.example"].clone();
            event["signatures"] = json!({ server: signed });
        }
    });
    let net = Net::new(1);
    let _asked = Elsewhere::serve_all(&rooms, &net, tamper);
    for (number, member) in (0..8).flat_map(|number| (0..20).map(move |member| (number, member))) {
        net.host(&format!("s{member}n{number}.example"), &["6.6.6.6"]);
    }
    net.weather("6.6.6.6", Weather::Silent, Duration::ZERO);
    let store = aqueduct::store::Store::open(
        aqueduct::store::Engine::Memory(aqueduct::store::engine::Memory::default()),
        aqueduct::store::Durability::Fsync,
    );
    let server = TestServer::start(doors(&net), store.unwrap(), |_| {});
    let (mallory, bob) = (server.register("mallory").await, server.register("bob").await);
    let traps = futures_util::future::join_all(
        rooms.iter().skip(1).map(|room| try_join(&mallory, room.room_id.as_str())),
    );
    let app = server.server().app();
    let honest = async {
        app.env.sleep(Duration::from_secs(1)).await;
        let began = app.env.uptime();
        assert_eq!(try_join(&bob, "!honest:a.example").await.0, StatusCode::OK);
        assert!(app.env.uptime() - began < Duration::from_secs(3), "nobody waits for the joins of another");
    };
    let (trapped, ()) = tokio::join!(traps, honest);
    assert!(
        trapped.iter().all(|(status, _)| *status == StatusCode::OK),
        "what cannot be checked is left out"
    );
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_server_that_takes_a_join_and_says_nothing_holds_nobody_up() {
    let room = Elsewhere::new(11);
    let (server, bob, _asked, net) = against(&room, honest()).await;
    let carol = server.register("carol").await;
    net.host("evil.example", &["6.6.6.6"]);
    let template = room.clone();
    net.serve("6.6.6.6:8448", &["evil.example"], move |arrived| {
        let path = arrived.request.uri().path().to_owned();
        let user = path.rsplit('/').next().unwrap().replace("%40", "@").replace("%3A", ":");
        let made = path.contains("/make_join/").then(|| template.template(&user, "join"));
        async move {
            match made {
                Some(made) => answer(200, made.to_string()),
                None => std::future::pending().await,
            }
        }
        .boxed()
    });
    let app = server.server().app();
    let path = |via: &str| api(&format!("/join/{}?{via}", encoded(room.room_id.as_str())));
    let began = app.env.uptime();
    let slow = async {
        assert_eq!(bob.post(&path("via=evil.example&via=a.example"), json!({})).await.0, StatusCode::OK);
        assert!(app.env.uptime() - began < Duration::from_secs(30), "the next server is asked");
    };
    let other = async {
        app.env.sleep(Duration::from_secs(1)).await;
        assert_eq!(carol.post(&path("via=a.example"), json!({})).await.0, StatusCode::OK);
        assert!(app.env.uptime() - began < Duration::from_secs(15), "nobody waits for another's join");
    };
    tokio::join!(slow, other);
    for user in [&bob, &carol] {
        assert_eq!(rooms_of(user).await, [room.room_id.as_str()]);
    }
    let members = carol.ok_get(&format!("/rooms/{}/joined_members", encoded(room.room_id.as_str()))).await;
    assert_eq!(members["joined"].as_object().unwrap().len(), 3, "{members}");
    server.assert_whole();
}

/// The paths that a server was asked for, with the bodies.
type Notes = Arc<std::sync::Mutex<Vec<(String, Value)>>>;

/// Whether a server was asked for something of this name.
pub(crate) fn was_asked(notes: &Notes, endpoint: &str) -> bool {
    notes.lock().unwrap().iter().any(|(path, _)| path.split('/').nth(4) == Some(endpoint))
}

/// Puts a server into the network that gives templates for a room, takes joins, and answers those after this time. Gives what it was asked,
/// and how many joins it has not answered that somebody still waits for.
pub(crate) fn serve_late(
    net: &Net,
    env: &aqueduct::env::Env,
    room: &Elsewhere,
    after: Duration,
) -> (Notes, Arc<()>) {
    let (asked, open) = (Arc::new(std::sync::Mutex::new(Vec::new())), Arc::new(()));
    let (notes, waits, env, room) = (Arc::clone(&asked), Arc::clone(&open), env.clone(), room.clone());
    net.host("evil.example", &["6.6.6.6"]);
    net.serve("6.6.6.6:8448", &["evil.example"], move |arrived| {
        let path = arrived.request.uri().path().to_owned();
        let body: Value = serde_json::from_slice(arrived.request.body()).unwrap_or(Value::Null);
        let user = path.rsplit('/').next().unwrap().replace("%40", "@").replace("%3A", ":");
        let endpoint = path.split('/').nth(4).unwrap_or_default().to_owned();
        notes.lock().unwrap().push((path.clone(), body.clone()));
        let told = match &*endpoint {
            "make_join" => room.template(&user, "join"),
            "make_leave" => room.template(&user, "leave"),
            "send_join" => room.answer(&body),
            _ => json!({}),
        };
        let (env, open) = (env.clone(), (endpoint == "send_join").then(|| Arc::clone(&waits)));
        async move {
            if open.is_some() {
                env.sleep(after).await;
            }
            answer(200, told.to_string())
        }
        .boxed()
    });
    (asked, open)
}

#[tokio::test(start_paused = true)]
async fn the_first_server_that_lets_a_user_in_ends_what_is_asked_of_others() {
    let room = Elsewhere::new(11);
    let (server, bob, _asked, net) = against(&room, honest()).await;
    let env = server.server().app().env.clone();
    let (asked, open) = serve_late(&net, &env, &room, Duration::from_secs(200));
    let idle = Arc::strong_count(&open);
    let path = format!("/join/{}?via=evil.example&via=a.example", encoded(room.room_id.as_str()));
    bob.ok_post(&path, json!({})).await;
    env.sleep(Duration::from_secs(1)).await;
    assert!(was_asked(&asked, "send_join"));
    assert_eq!(Arc::strong_count(&open), idle, "nobody waits for the other any more");
    bob.ok_post(&format!("/rooms/{}/leave", encoded(room.room_id.as_str())), json!({})).await;
    env.sleep(Duration::from_secs(300)).await;
    assert!(rooms_of(&bob).await.is_empty());
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_late_answer_brings_nobody_back_who_has_left_or_whose_account_has_ended() {
    for is_account in [false, true] {
        let room = Elsewhere::new(11);
        let (server, bob, _asked, net) = against(&room, honest()).await;
        let app = server.server().app().clone();
        let (asked, _open) = serve_late(&net, &app.env, &room, Duration::from_secs(120));
        let path = |via: &str| api(&format!("/join/{}?via={via}", encoded(room.room_id.as_str())));
        let (late, quick) = (path("evil.example"), path("a.example"));
        let late = bob.post(&late, json!({}));
        let rest = async {
            app.env.sleep(Duration::from_secs(1)).await;
            assert_eq!(bob.post(&quick, json!({})).await.0, StatusCode::OK);
            if is_account {
                let auth = json!({
                    "type": "m.login.password", "password": "password of bob",
                    "identifier": { "type": "m.id.user", "user": "bob" },
                });
                bob.ok_post("/account/deactivate", json!({ "auth": auth })).await;
            } else {
                bob.ok_post(&format!("/rooms/{}/leave", encoded(room.room_id.as_str())), json!({})).await;
            }
        };
        let (late, ()) = tokio::join!(late, rest);
        assert_eq!((late.0, &late.1["errcode"]), (StatusCode::FORBIDDEN, &json!("M_FORBIDDEN")), "{late:?}");
        app.env.sleep(Duration::from_secs(130)).await;
        let snapshot = app.store.snapshot();
        let num = aqueduct::rooms::find_room(&*snapshot, &room.room_id).unwrap().unwrap();
        let us = aqueduct::rooms::members::is_server_joined(&*snapshot, num, "test.example").unwrap();
        assert!(!us, "nobody of ours is in the room");
        assert!(was_asked(&asked, "send_leave"), "the other server is told");
        server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_leaves_ends_what_hangs_of_their_own_however_often() {
    for act in ["join", "knock"] {
        let room = Elsewhere::new(11);
        let (server, bob, _, net) = against(&room, honest()).await;
        net.weather("5.9.0.1:8448", Weather::Silent, Duration::ZERO);
        let app = server.server().app();
        let id = encoded(room.room_id.as_str());
        let hangs = api(&format!("/{act}/{id}?via=a.example"));
        let leaves = api(&format!("/rooms/{id}/leave"));
        assert_eq!(bob.post(&leaves, json!({})).await.0, StatusCode::FORBIDDEN, "nothing is under way yet");
        let began = app.env.uptime();
        let leave = async {
            app.env.sleep(Duration::from_secs(1)).await;
            for _ in 0..3 {
                assert_eq!(bob.post(&leaves, json!({})).await, (StatusCode::OK, json!({})), "{act}");
            }
        };
        let (hung, ()) = tokio::join!(bob.post(&hangs, json!({})), leave);
        assert_eq!((hung.0, &hung.1["errcode"]), (StatusCode::FORBIDDEN, &json!("M_FORBIDDEN")), "{hung:?}");
        assert!(app.env.uptime() - began < Duration::from_secs(3), "nobody waits for the other server");
        app.env.sleep(Duration::from_secs(7_200)).await;
        net.weather("5.9.0.1:8448", Weather::Fair, Duration::ZERO);
        assert!(rooms_of(&bob).await.is_empty());
        // A user who wants in again comes in.
        assert_eq!(try_join(&bob, room.room_id.as_str()).await.0, StatusCode::OK);
        assert_eq!(rooms_of(&bob).await, [room.room_id.as_str()]);
        server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_leaves_is_out_of_the_room_in_whatever_order_that_and_the_join_come() {
    for after_ms in [1, 4_000, 4_999, 5_000, 5_001, 5_010, 5_500] {
        let room = Elsewhere::new(11);
        let (server, bob, _, net) = against(&room, honest()).await;
        let app = server.server().app().clone();
        let (asked, _open) = serve_late(&net, &app.env, &room, Duration::from_secs(5));
        let id = encoded(room.room_id.as_str());
        let (joins, leaves) =
            (api(&format!("/join/{id}?via=evil.example")), api(&format!("/rooms/{id}/leave")));
        let leave = async {
            app.env.sleep(Duration::from_millis(after_ms)).await;
            assert_eq!(bob.post(&leaves, json!({})).await, (StatusCode::OK, json!({})), "{after_ms}");
            assert!(rooms_of(&bob).await.is_empty(), "{after_ms}");
        };
        let (joined, ()) = tokio::join!(bob.post(&joins, json!({})), leave);
        assert!(after_ms > 5_000 || joined.0 == StatusCode::FORBIDDEN, "{after_ms}: {joined:?}");
        app.env.sleep(Duration::from_secs(60)).await;
        assert!(rooms_of(&bob).await.is_empty(), "{after_ms}");
        let has_left = was_asked(&asked, "send_leave");
        assert!(has_left || joined.0 == StatusCode::OK, "{after_ms}: the other server is told");
        server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn what_others_tell_of_a_room_before_the_answer_to_a_join_is_taken_in_with_it() {
    for (comes_back, is_kicked) in [(false, false), (false, true), (true, true)] {
        let mut room = Elsewhere::new(11);
        let (server, bob, _asked, net) = against(&room, honest()).await;
        let (app, path) = (server.server().app().clone(), encoded(room.room_id.as_str()));
        if comes_back {
            assert_eq!(try_join(&bob, room.room_id.as_str()).await.0, StatusCode::OK);
            bob.ok_post(&format!("/rooms/{path}/leave"), json!({})).await;
        }
        let (asked, _open) = serve_late(&net, &app.env, &room, Duration::from_secs(8));
        let at = api(&format!("/join/{path}?via=evil.example"));
        let peer = Peer::unheard("a.example", 9);
        let other = Peer::new(&net, "b.example", "7.7.7.7", 7);
        let tell = async {
            app.env.sleep(Duration::from_secs(2)).await;
            let sent = asked.lock().unwrap().iter().find(|(path, _)| path.contains("/send_join/")).cloned();
            let (at, json) = sent.unwrap();
            let id = at.rsplit('/').next().unwrap().replace("%24", "$").as_str().try_into().unwrap();
            let member = Made { id, json };
            room.events.push(member.clone());
            room.state.insert(("m.room.member".to_owned(), bob.user_id.clone()), member);
            let mut told =
                vec![room.add("m.room.message", None, json!({ "msgtype": "m.text", "body": "early" }))];
            if is_kicked {
                let kick = json!({ "membership": "leave", "reason": "no" });
                told.push(room.add("m.room.member", Some(&bob.user_id), kick));
            }
            let mut pdus: Vec<_> = told.iter().map(|made| made.json.clone()).collect();
            let (status, results) = peer.transact(&server, "1", &pdus, &[]).await;
            assert_eq!(status, StatusCode::OK);
            let all_taken = told.iter().all(|made| results["pdus"][made.id.as_str()] == json!({}));
            assert!(all_taken, "{results}");
            // Another server has no say in events that are not its users'.
            pdus[0] = room.event(ALICE, "m.room.message", None, json!({ "body": "not theirs" })).json;
            let (status, _) = other.transact(&server, "1", &pdus[..1], &[]).await;
            assert_eq!(status, StatusCode::OK);
        };
        let (joined, ()) = tokio::join!(bob.post(&at, json!({})), tell);
        assert_eq!(joined.0, StatusCode::OK, "{joined:?}");
        app.env.sleep(Duration::from_secs(10)).await;
        let is_in = !rooms_of(&bob).await.is_empty();
        assert_eq!(is_in, !is_kicked, "coming back: {comes_back}");
        let page = bob.ok_get(&format!("/rooms/{path}/messages?dir=b&limit=50")).await.to_string();
        assert!(page.contains("early") && !page.contains("not theirs"), "{page}");
        server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn a_join_that_comes_to_nothing_is_taken_back_where_it_was_taken() {
    let of = |asked: &std::sync::Mutex<Vec<(String, Value)>>, name: &str| {
        asked.lock().unwrap().iter().filter(|(path, _)| path.contains(name)).count()
    };
    let room = Elsewhere::new(11);
    let (server, bob, asked, _) = against(&room, at("send_join", |it| it["state"] = json!([]))).await;
    assert_eq!(try_join(&bob, room.room_id.as_str()).await.0, StatusCode::BAD_GATEWAY);
    assert_eq!((of(&asked, "/send_join/"), of(&asked, "/send_leave/")), (1, 1));
    assert!(rooms_of(&bob).await.is_empty());
    server.assert_whole();
    // A server that refused the join has nothing to take back.
    let refuses: Tamper = Arc::new(|asked, honest| match asked {
        "send_join" => answer(403, r#"{"errcode":"M_FORBIDDEN","error":"no"}"#),
        _ => answer(200, honest.to_string()),
    });
    let (_, bob, asked, _) = against(&room, refuses).await;
    assert_eq!(try_join(&bob, room.room_id.as_str()).await.0, StatusCode::FORBIDDEN);
    assert_eq!((of(&asked, "/send_join/"), of(&asked, "/make_leave/")), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_join_by_way_of_another_server_is_for_that_one_to_tell() {
    let room = Elsewhere::new(11);
    let (server, bob, asked, _net) = against(&room, honest()).await;
    let room_id = encoded(room.room_id.as_str());
    bob.ok_post(&format!("/join/{room_id}?via=a.example"), json!({})).await;
    let pause = async |seconds| server.server().app().env.sleep(Duration::from_secs(seconds)).await;
    let told = || {
        let asked = asked.lock().unwrap();
        let sent = asked.iter().filter(|(path, _)| path.contains("/v1/send/"));
        let events = sent.flat_map(|(_, body)| body["pdus"].as_array().cloned().unwrap_or_default());
        events.map(|event| event["type"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    pause(5).await;
    assert_eq!(told(), [""; 0]);
    let message = json!({ "msgtype": "m.text", "body": "hello" });
    bob.ok_put(&format!("/rooms/{room_id}/send/m.room.message/1"), message).await;
    pause(5).await;
    assert_eq!(told().first().map(String::as_str), Some("m.room.message"));
    // A later change of the membership is ours to tell.
    bob.ok_post(&format!("/rooms/{room_id}/leave"), json!({})).await;
    pause(3_600).await;
    assert_eq!(told().last().map(String::as_str), Some("m.room.member"));
}

#[tokio::test(start_paused = true)]
async fn a_template_of_anything_else_is_never_signed() {
    let changes: [(&str, Spoil); 15] = [
        ("type", |it| it["event"]["type"] = json!("m.room.message")),
        ("sender", |it| it["event"]["sender"] = json!("@carol:test.example")),
        ("state_key", |it| it["event"]["state_key"] = json!("@carol:test.example")),
        ("no state_key", |it| drop(it["event"].as_object_mut().unwrap().remove("state_key"))),
        ("room_id", |it| it["event"]["room_id"] = json!("!other:a.example")),
        ("membership", |it| it["event"]["content"]["membership"] = json!("ban")),
        ("content", |it| it["event"]["content"] = json!([])),
        ("no event", |it| drop(it.as_object_mut().unwrap().remove("event"))),
        ("prev_events", |it| it["event"]["prev_events"] = json!([["$a:a.example", { "sha256": "x" }]])),
        ("odd prev_events", |it| it["event"]["prev_events"] = json!(["$a:a.example"])),
        ("no prev_events", |it| it["event"]["prev_events"] = json!([])),
        ("many prev_events", |it| it["event"]["prev_events"] = json!(vec![crate::support::NOWHERE; 500])),
        ("many auth_events", |it| it["event"]["auth_events"] = json!(vec![crate::support::NOWHERE; 11])),
        ("depth", |it| it["event"]["depth"] = json!(-1)),
        ("large", |it| it["event"]["content"]["x"] = json!("x".repeat(100_000))),
    ];
    for (what, change) in changes {
        let room = Elsewhere::new(11);
        let (server, bob, asked, _) = against(&room, at("make_join", change)).await;
        let (status, told) = try_join(&bob, room.room_id.as_str()).await;
        assert_eq!(status, StatusCode::BAD_GATEWAY, "{what}: {told}");
        assert!(asked.lock().unwrap().iter().all(|(path, _)| !path.contains("send_join")), "{what}");
        assert!(rooms_of(&bob).await.is_empty());
        server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn what_the_template_says_beside_the_event_is_not_signed() {
    let room = Elsewhere::new(11);
    let tamper = at("make_join", |it| {
        it["event"]["content"]["displayname"] = json!("Mallory");
        it["event"]["content"]["join_authorised_via_users_server"] = json!(7);
        it["event"]["redacts"] = json!(crate::support::NOWHERE);
        it["event"]["origin_server_ts"] = json!(5);
    });
    let (_, bob, asked, _) = against(&room, tamper).await;
    assert_eq!(
        try_join(&bob, room.room_id.as_str()).await.0,
        StatusCode::BAD_GATEWAY,
        "the voucher is no user"
    );
    let tamper = at("make_join", |it| {
        it["event"]["content"]["displayname"] = json!("Mallory");
        it["event"]["redacts"] = json!(crate::support::NOWHERE);
        it["event"]["origin_server_ts"] = json!(5);
    });
    drop(asked);
    let (_, bob, asked, _) = against(&room, tamper).await;
    assert_eq!(try_join(&bob, room.room_id.as_str()).await.0, StatusCode::OK);
    let asked = asked.lock().unwrap();
    let sent = &asked.iter().find(|(path, _)| path.contains("send_join")).unwrap().1;
    assert_eq!(sent["content"], json!({ "membership": "join", "displayname": "bob" }));
    assert!(sent.get("redacts").is_none() && sent["origin_server_ts"] != 5, "{sent}");
}

#[tokio::test(start_paused = true)]
async fn a_state_that_is_wrong_joins_nobody_and_leaves_nothing() {
    let changes: [(&str, Spoil); 8] = [
        ("no state", |it| it["state"] = json!([])),
        ("no create event", |it| {
            for list in ["state", "auth_chain"] {
                it[list].as_array_mut().unwrap().retain(|event| event["type"] != "m.room.create");
            }
        }),
        ("members omitted", |it| it["members_omitted"] = json!(true)),
        ("no object", |it| it["state"] = json!({})),
        ("no list", |it| drop(it.as_object_mut().unwrap().remove("auth_chain"))),
        ("forged rules", |it| {
            for list in ["state", "auth_chain"] {
                for event in it[list].as_array_mut().unwrap() {
                    if event["type"] == "m.room.join_rules" {
                        event["content"]["join_rule"] = json!("private");
                        event["signatures"] = json!({ "a.example": { "ed25519:k": "AAAA" } });
                    }
                }
            }
        }),
        ("an answer that never ends", |it| it["x"] = json!(vec![0; 11_000_000])),
        ("many events", |it| it["state"] = json!(vec![json!({}); 500_000])),
    ];
    for (what, change) in changes {
        let room = Elsewhere::new(11);
        let (server, bob, _, _) = against(&room, at("send_join", change)).await;
        let (status, told) = try_join(&bob, room.room_id.as_str()).await;
        assert_eq!(status, StatusCode::BAD_GATEWAY, "{what}: {told}");
        assert!(rooms_of(&bob).await.is_empty());
        server.assert_whole();
        let (status, _) =
            bob.get(&format!("/_matrix/client/v3/rooms/{}/state", encoded(room.room_id.as_str()))).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_forged_event_that_nothing_needs_is_left_out() {
    let room = Elsewhere::new(11);
    let tamper = at("send_join", |it| {
        for list in ["state", "auth_chain"] {
            for event in it[list].as_array_mut().unwrap() {
                if event["type"] == "m.room.name" {
                    event["state_key"] = json!("");
                    event["depth"] = json!(99);
                }
            }
        }
    });
    let (server, bob, _, _) = against(&room, tamper).await;
    assert_eq!(try_join(&bob, room.room_id.as_str()).await.0, StatusCode::OK);
    let path = format!("/rooms/{}/state/m.room.name", encoded(room.room_id.as_str()));
    assert_eq!(bob.get(&api(&path)).await.0, StatusCode::NOT_FOUND);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_version_that_the_create_event_contradicts_or_nobody_knows_joins_nobody() {
    let room = Elsewhere::new(11);
    for (version, status, code) in [
        (json!("10"), StatusCode::BAD_GATEWAY, "M_UNKNOWN"),
        (json!("org.example.odd"), StatusCode::BAD_REQUEST, "M_INCOMPATIBLE_ROOM_VERSION"),
        // A server that names no version means the first one, whose templates cite events in another form.
        (Value::Null, StatusCode::BAD_GATEWAY, "M_UNKNOWN"),
        (json!("1"), StatusCode::BAD_GATEWAY, "M_UNKNOWN"),
        (json!("0"), StatusCode::BAD_REQUEST, "M_INCOMPATIBLE_ROOM_VERSION"),
    ] {
        let named = version.clone();
        let tamper: Tamper = Arc::new(move |asked, mut honest| {
            if asked == "make_join" {
                honest["room_version"] = named.clone();
                if named.is_null() {
                    honest.as_object_mut().unwrap().remove("room_version");
                }
            }
            answer(200, honest.to_string())
        });
        let (server, bob, _, _) = against(&room, tamper).await;
        let (told_status, told) = try_join(&bob, room.room_id.as_str()).await;
        assert_eq!((told_status, &told["errcode"]), (status, &json!(code)), "{version}: {told}");
        assert!(rooms_of(&bob).await.is_empty());
        server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn the_reason_of_another_server_is_told() {
    for (status, code, expected) in [
        (403, "M_FORBIDDEN", StatusCode::FORBIDDEN),
        (404, "M_NOT_FOUND", StatusCode::NOT_FOUND),
        (400, "M_UNABLE_TO_AUTHORISE_JOIN", StatusCode::BAD_REQUEST),
        (400, "M_UNABLE_TO_GRANT_JOIN", StatusCode::BAD_REQUEST),
        (400, "ORG.EXAMPLE.OTHER_REASON", StatusCode::BAD_REQUEST),
    ] {
        for endpoint in ["make_join", "send_join"] {
            let refusal = json!({ "errcode": code, "error": "not you" }).to_string();
            let tamper: Tamper = Arc::new(move |asked, honest| {
                if asked == endpoint {
                    answer(status, refusal.clone())
                } else {
                    answer(200, honest.to_string())
                }
            });
            let room = Elsewhere::new(11);
            let (server, bob, _, _) = against(&room, tamper).await;
            let (told_status, told) = try_join(&bob, room.room_id.as_str()).await;
            assert_eq!((told_status, &told["errcode"]), (expected, &json!(code)), "{told}");
            assert!(told["error"].as_str().unwrap().contains("not you"), "{told}");
            server.assert_whole();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_older_form_of_the_endpoint_is_enough() {
    let room = Elsewhere::new(11);
    let is_first = std::sync::atomic::AtomicBool::new(true);
    let tamper: Tamper = Arc::new(move |asked, honest| -> Answered {
        match asked {
            "send_join" if is_first.swap(false, std::sync::atomic::Ordering::Relaxed) => {
                answer(404, r#"{"errcode":"M_UNRECOGNIZED","error":"?"}"#)
            }
            "send_join" => answer(200, json!([200, honest]).to_string()),
            _ => answer(200, honest.to_string()),
        }
    });
    let (_, bob, asked, _) = against(&room, tamper).await;
    assert_eq!(try_join(&bob, room.room_id.as_str()).await.0, StatusCode::OK);
    assert!(asked.lock().unwrap().iter().any(|(path, _)| path.contains("/v1/send_join/")));
}

#[tokio::test(start_paused = true)]
async fn nobody_to_ask_and_nobody_who_answers_are_told_apart() {
    let room = Elsewhere::new(11);
    let (server, bob, _, net) = against(&room, honest()).await;
    let env = server.server().app().env.clone();
    let (status, told) = bob.post("/_matrix/client/v3/join/!nobody%3Atest.example", json!({})).await;
    assert_eq!((status, &told["errcode"]), (StatusCode::NOT_FOUND, &json!("M_NOT_FOUND")));
    net.weather("5.9.0.1:8448", Weather::Silent, Duration::ZERO);
    let began = env.instant();
    assert_eq!(try_join(&bob, room.room_id.as_str()).await.0, StatusCode::BAD_GATEWAY);
    assert!(began.elapsed() < Duration::from_secs(100), "{:?}", began.elapsed());
    let (status, told) = bob.post("/_matrix/client/v3/join/!x%3Aa.example?via=%C3%A4", json!({})).await;
    assert_eq!((status, &told["errcode"]), (StatusCode::BAD_REQUEST, &json!("M_INVALID_PARAM")));
}

#[tokio::test(start_paused = true)]
async fn a_slow_server_is_not_waited_for_alone() {
    let room = Elsewhere::new(11);
    let (server, bob, _, net) = against(&room, honest()).await;
    let env = server.server().app().env.clone();
    net.host("slow.example", &["5.9.0.2"]);
    net.serve("5.9.0.2:8448", &["slow.example"], |_| std::future::pending());
    let began = env.instant();
    let path = format!("/join/{}?via=slow.example&via=a.example", encoded(room.room_id.as_str()));
    bob.ok_post(&path, json!({})).await;
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn two_users_who_join_at_once_join_by_one_request_to_the_other_server() {
    let room = Elsewhere::new(11);
    let (server, bob, asked, _) = against(&room, honest()).await;
    let carol = server.register("carol").await;
    let (one, other) =
        tokio::join!(try_join(&bob, room.room_id.as_str()), try_join(&carol, room.room_id.as_str()));
    assert_eq!((one.0, other.0), (StatusCode::OK, StatusCode::OK), "{one:?} {other:?}");
    let sent = asked.lock().unwrap().iter().filter(|(path, _)| path.contains("send_join")).count();
    assert_eq!(sent, 1);
    let members = carol.ok_get(&format!("/rooms/{}/joined_members", encoded(room.room_id.as_str()))).await;
    assert_eq!(members["joined"].as_object().unwrap().len(), 3);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn guests_do_not_go_to_rooms_of_other_servers() {
    let room = Elsewhere::new(11);
    let net = Net::new(1);
    let asked = room.serve(&net, honest());
    let store = aqueduct::store::Store::open(
        aqueduct::store::Engine::Memory(aqueduct::store::engine::Memory::default()),
        aqueduct::store::Durability::Fsync,
    );
    let server = TestServer::start(doors(&net), store.unwrap(), |config| config.registration.guests = true);
    let guest = crate::policy::guest(&server).await;
    let (status, told) = try_join(&guest, room.room_id.as_str()).await;
    assert_eq!((status, &told["errcode"]), (StatusCode::FORBIDDEN, &json!("M_GUEST_ACCESS_FORBIDDEN")));
    assert!(asked.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn whoever_joins_by_an_alias_of_another_server_comes_into_its_room() {
    let federated = Federated::new(&["a.example", "b.example"]);
    let alice = federated.server(0).register("alice").await;
    let room = json!({ "preset": "public_chat", "room_alias_name": "hall", "name": "Hall" });
    let room_id = alice.ok_post("/createRoom", room).await["room_id"].as_str().unwrap().to_owned();
    let bob = federated.server(1).register("bob").await;
    let joined = bob.ok_post("/join/%23hall%3Aa.example", json!({})).await;
    assert_eq!(joined["room_id"], room_id);
    let members = alice.ok_get(&format!("/rooms/{}/joined_members", encoded(&room_id))).await;
    assert!(members["joined"].get(&bob.user_id).is_some(), "{members}");
    let (status, told) = bob.post("/_matrix/client/v3/join/%23none%3Aa.example", json!({})).await;
    assert_eq!((status, &told["errcode"]), (StatusCode::NOT_FOUND, &json!("M_NOT_FOUND")));
    // Who left comes back, though the room has moved on without this server.
    bob.ok_post(&format!("/rooms/{}/leave", encoded(&room_id)), json!({})).await;
    alice
        .ok_put(&format!("/rooms/{}/state/m.room.topic", encoded(&room_id)), json!({ "topic": "new" }))
        .await;
    bob.ok_post("/join/%23hall%3Aa.example", json!({})).await;
    let topic = bob.ok_get(&format!("/rooms/{}/state/m.room.topic", encoded(&room_id))).await;
    assert_eq!(topic["topic"], "new");
    federated.server(0).assert_whole();
    federated.server(1).assert_whole();
}

#[tokio::test(start_paused = true)]
async fn what_a_join_left_out_comes_when_its_server_answers_again() {
    let mut federated = Federated::new(&["a.example", "b.example", "c.example"]);
    let alice = federated.server(0).register("alice").await;
    let bob = federated.server(1).register("bob").await;
    let carol = federated.server(2).register("carol").await;
    let room = alice.ok_post("/createRoom", json!({ "preset": "public_chat" })).await;
    let room = room["room_id"].as_str().unwrap().to_owned();
    let join = format!("/join/{}?via=a.example", encoded(&room));
    carol.ok_post(&join, json!({})).await;
    federated.weather(2, Weather::Refuses, Duration::from_millis(1));
    bob.ok_post(&join, json!({})).await;
    let sync = bob.ok_get("/sync").await;
    let since = sync["next_batch"].as_str().unwrap();
    let member = format!("/rooms/{}/state/m.room.member/{}", encoded(&room), encoded(&carol.user_id));
    assert_eq!(bob.get(&api(&member)).await.0, StatusCode::TOO_MANY_REQUESTS, "it may be known later");
    // Nobody knows what she is in the room, so that nothing is done to her.
    let invite = format!("/rooms/{}/invite", encoded(&room));
    let (status, _) = bob.post(&api(&invite), json!({ "user_id": carol.user_id })).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    // The events that are remembered outlive the server.
    federated.kill(1, usize::MAX, |_| {});
    federated.weather(2, Weather::Fair, Duration::from_millis(1));
    let env = federated.server(0).server().app().env.clone();
    env.sleep(Duration::from_secs(2 * 60 * 60)).await;
    let said = format!("/rooms/{}/send/m.room.message/1", encoded(&room));
    let said = carol.ok_put(&said, json!({ "msgtype": "m.text", "body": "hello" })).await;
    env.sleep(Duration::from_secs(60)).await;
    let bob = TestClient { server: federated.server(1).clone(), ..bob.clone() };
    assert_eq!(bob.ok_get(&member).await["membership"], "join");
    let news = bob.ok_get(&format!("/sync?use_state_after=true&since={since}")).await;
    let news = &news["rooms"]["join"][&room];
    let told = news["state_after"]["events"].as_array().unwrap();
    assert!(told.iter().any(|event| event["state_key"] == carol.user_id.as_str()), "{news}");
    let timeline = news["timeline"]["events"].as_array().unwrap();
    assert!(timeline.iter().any(|event| event["event_id"] == said["event_id"]), "{news}");
    assert_eq!(news["summary"]["m.joined_member_count"], 3);
    federated.server(1).assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_join_that_hangs_when_the_server_stops_is_nobodys_fault() {
    let room = Elsewhere::new(11);
    let (server, bob, _, net) = against(&room, honest()).await;
    net.weather("5.9.0.1:8448", Weather::Silent, Duration::ZERO);
    let (id, asks) = (room.room_id.to_string(), bob.clone());
    let mut joins = server.begin(async move { try_join(&asks, &id).await });
    server.server().app().env.sleep(Duration::from_secs(5)).await;
    assert!(joins.try_recv().is_err());
    server.server().stop().await.unwrap();
    let (status, told) = joins.await.unwrap();
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "{told}");
    assert_eq!(told["errcode"], "M_LIMIT_EXCEEDED", "{told}");
}
