//! Answers that hold a whole room: its state and its members, in pages.

use std::{collections::BTreeSet, time::Duration};

use aqueduct::{
    ids::{EventNum, Order, Position, RoomNum, StateKeyNum},
    rooms, schema,
    schema::{
        rooms::Place,
        state::{StateKeyRow, StateValue},
    },
    store::{Engine, Guard},
};
use axum::body::Body;
use http::{Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use serde_json::{Value, json};

use crate::{
    support::{TestClient, TestServer, room_num},
    sync::{Chain, create_room, env, must},
};

const MEMBERS: u32 = 5_000;
const FIRST_KEY: u32 = 100_000;

/// A room with thousands of members of this server.
async fn large_room(server: &TestServer) -> (TestClient, String) {
    large_room_of(server, &[]).await
}

/// Such a room in which these are, too.
async fn large_room_of(server: &TestServer, others: &[&TestClient]) -> (TestClient, String) {
    let alice = server.register("alice").await;
    let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
    for other in others {
        must(other, &room, "join", json!({})).await;
    }
    let members: Vec<_> = (0..MEMBERS).map(|number| (format!("@{number:05}:test.example"), "join")).collect();
    add_members(server, &room, &members).await;
    (alice, room)
}

/// Adds users to a room, with these memberships, as far as the room's own tables know them. Their rows are copies of those of
/// its maker; real ones take minutes.
pub(crate) async fn add_members(server: &TestServer, room: &str, members: &[(String, &str)]) {
    let store = &server.server().app().store;
    let num = room_num(store, room);
    let snapshot = store.snapshot();
    let Some(Place::Timeline(order)) = schema::PLACE.get(&*snapshot, (num, EventNum(1))).unwrap() else {
        panic!("the maker's membership has a place")
    };
    let template = schema::TIMELINE.get(&*snapshot, (num, order)).unwrap().unwrap();
    let maker = template.sender().into_owned();
    for (page, some) in members.chunks(500).enumerate() {
        let mut batch = store.batch(&Guard::alone());
        for (number, (user_id, membership)) in (page as u32 * 500..).zip(some) {
            let (event, key) = (EventNum(u64::from(FIRST_KEY + number)), StateKeyNum(FIRST_KEY + number));
            let mut json: Value = serde_json::from_slice(&template.json).unwrap();
            for field in ["sender", "state_key"] {
                assert_eq!(json[field], *maker);
                json[field] = json!(user_id);
            }
            json["content"]["membership"] = json!(membership);
            let mut row = template.clone();
            row.json = json.to_string().into();
            row.header.spans = rooms::event::locate(&row.json).unwrap();
            row.header.event = event;
            row.header.state_key = Some(key);
            let place = Order { anchor: Position::ZERO, minor: i32::try_from(number).unwrap() };
            schema::TIMELINE.put(&mut batch, (num, place), &row);
            schema::PLACE.put(&mut batch, (num, event), &Place::Timeline(place));
            put_key(&mut batch, num, key, event, user_id.clone());
        }
        if page == 0 {
            let mut row = schema::ROOM.get(&*snapshot, num).unwrap().unwrap();
            row.next_key = FIRST_KEY + u32::try_from(members.len()).unwrap();
            row.joined += u32::try_from(members.iter().filter(|(_, is)| *is == "join").count()).unwrap();
            schema::ROOM.put(&mut batch, num, &row);
        }
        store.enqueue(batch).unwrap().flushed.await.unwrap();
    }
}

fn put_key(
    batch: &mut aqueduct::store::Batch,
    room: RoomNum,
    key: StateKeyNum,
    event: EventNum,
    user_id: String,
) {
    schema::STATE_KEY_NUM.put(batch, (room, "m.room.member", &*user_id), &key);
    let name = StateKeyRow { event_type: "m.room.member".to_owned(), state_key: user_id };
    schema::STATE_KEY.put(batch, (room, key), &name);
    schema::STATE_NOW.put(batch, (room, key), &StateValue::Event(event).into());
}

async fn ask(client: &TestClient, room: &str, what: &str) -> Response<Body> {
    let path = format!("/_matrix/client/v3/rooms/{room}/{what}");
    let token = client.token.as_ref().unwrap();
    let request = Request::builder().uri(path).header(header::AUTHORIZATION, format!("Bearer {token}"));
    let response = client.server.send(request.body(Body::empty()).unwrap()).await;
    assert_eq!(response.status(), StatusCode::OK);
    response
}

/// The bytes of answers that are in memory, as the budget counts them.
fn held(server: &TestServer) -> u64 {
    let text = server.server().app().metrics.text();
    let line = text.lines().find_map(|line| line.strip_prefix("aqueduct_http_in_flight_bytes "));
    line.unwrap_or_else(|| panic!("no such gauge in {text}")).parse().unwrap()
}

/// Reads an answer to its end, and does something after its first piece. Gives the JSON, the number of its bytes, and the
/// greatest number of bytes that were in memory at once.
async fn read_slowly(
    server: &TestServer,
    response: Response<Body>,
    after_first: impl AsyncFnOnce(),
) -> (Value, usize, u64) {
    let (mut body, mut bytes, mut held_max) = (response.into_body(), Vec::new(), 0);
    let mut after_first = Some(after_first);
    while let Some(frame) = body.frame().await {
        let data = frame.unwrap().into_data().unwrap();
        held_max = held_max.max(held(server));
        bytes.extend_from_slice(&data);
        if let Some(after_first) = after_first.take() {
            after_first().await;
        }
    }
    (serde_json::from_slice(&bytes).unwrap(), bytes.len(), held_max)
}

#[tokio::test(start_paused = true)]
async fn the_members_of_a_large_room_are_answered_in_pages_that_tell_of_one_moment() {
    let server = TestServer::new();
    let (alice, room) = large_room(&server).await;
    let rename = async |name: &str| {
        let path = format!("/_matrix/client/v3/profile/{}/displayname", alice.user_id);
        assert_eq!(alice.put(&path, json!({ "displayname": name })).await.0, StatusCode::OK);
    };
    rename("before").await;
    for what in ["members", "members?membership=join", "joined_members"] {
        let response = ask(&alice, &room, what).await;
        let (json, bytes, held) = read_slowly(&server, response, async || rename("after").await).await;
        let (users, name): (BTreeSet<&str>, &Value) = if what == "joined_members" {
            let joined = json["joined"].as_object().unwrap();
            (joined.keys().map(String::as_str).collect(), &joined[&alice.user_id]["display_name"])
        } else {
            let chunk = json["chunk"].as_array().unwrap();
            assert_eq!(chunk.len(), MEMBERS as usize + 1, "{what}");
            let users = chunk.iter().map(|event| event["state_key"].as_str().unwrap()).collect();
            // The maker comes last by user id, and so after the change.
            (users, &chunk.last().unwrap()["content"]["displayname"])
        };
        assert_eq!(users.len(), MEMBERS as usize + 1, "{what}");
        assert_eq!(name, "before", "{what} tells of the moment at which it was asked for");
        assert!(bytes > 300_000 && held < 200_000, "{what}: {held} of {bytes} bytes were in memory at once");
        rename("before").await;
    }
    let (json, ..) =
        read_slowly(&server, ask(&alice, &room, "members?membership=leave").await, async || ()).await;
    assert_eq!(json, json!({ "chunk": [] }), "pages in which nothing is wanted are passed over");
}

#[tokio::test(start_paused = true)]
async fn the_state_of_a_large_room_is_answered_in_pages() {
    let server = TestServer::new();
    let (alice, room) = large_room(&server).await;
    let (json, bytes, held) = read_slowly(&server, ask(&alice, &room, "state").await, async || ()).await;
    let state = json.as_array().unwrap();
    let keys: BTreeSet<_> = state
        .iter()
        .map(|event| (event["type"].as_str().unwrap(), event["state_key"].as_str().unwrap()))
        .collect();
    assert_eq!(keys.len(), state.len(), "each key comes once");
    assert_eq!(keys.iter().filter(|(event_type, _)| *event_type == "m.room.member").count(), 5_001);
    assert!(keys.contains(&("m.room.create", "")) && keys.contains(&("m.room.power_levels", "")));
    assert!(bytes > 1_000_000 && held < 200_000, "{held} of {bytes} bytes were in memory at once");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_hangs_up_ends_the_reading_of_a_large_room() {
    let server = TestServer::new();
    let (alice, room) = large_room(&server).await;
    let Engine::Memory(memory) = server.server().app().store.engine() else { panic!("tests run in memory") };
    for what in ["members", "state", "joined_members"] {
        let before = memory.reads();
        let mut body = ask(&alice, &room, what).await.into_body();
        drop(body.frame().await.unwrap().unwrap());
        let begun = memory.reads() - before;
        drop(body);
        env(&server).sleep(Duration::from_secs(10)).await;
        let after = memory.reads() - before;
        assert!(after < begun + 500 && after < 15_000, "{what}: {begun} rows, and {after} after hanging up");
        assert_eq!(held(&server), 0);
    }
}

/// The rest of each answer that holds a whole room, of which the first piece was read.
async fn begin_all(client: &TestClient, room: &str) -> Vec<(&'static str, Body)> {
    let mut bodies = Vec::new();
    for what in ["state", "members", "joined_members"] {
        let mut body = ask(client, room, what).await.into_body();
        drop(body.frame().await.unwrap().unwrap());
        bodies.push((what, body));
    }
    bodies
}

#[tokio::test(start_paused = true)]
async fn an_answer_ends_where_its_reader_forgets_the_room_or_is_banned() {
    let server = TestServer::new();
    let (bob, carol) = (server.register("bob").await, server.register("carol").await);
    let (alice, room) = large_room_of(&server, &[&bob, &carol]).await;
    let (of_bob, of_carol) = (begin_all(&bob, &room).await, begin_all(&carol, &room).await);
    let whole = ask(&alice, &room, "members").await;
    must(&bob, &room, "leave", json!({})).await;
    must(&bob, &room, "forget", json!({})).await;
    must(&alice, &room, "ban", json!({ "user_id": carol.user_id })).await;
    for (what, body) in of_bob.into_iter().chain(of_carol) {
        assert!(body.collect().await.is_err(), "{what} is told to one who has left or is banned");
    }
    let (json, ..) = read_slowly(&server, whole, async || ()).await;
    assert_eq!(json["chunk"].as_array().unwrap().len(), MEMBERS as usize + 3, "others read on");
    // Who is banned may read the state up to the ban, in as many pieces as it has.
    let (json, ..) = read_slowly(&server, ask(&carol, &room, "members").await, async || ()).await;
    assert_eq!(json["chunk"].as_array().unwrap().len(), MEMBERS as usize + 3);
    assert_eq!(held(&server), 0);
}

#[tokio::test(start_paused = true)]
async fn an_answer_ends_where_its_device_is_logged_out() {
    let server = TestServer::new();
    let (alice, room) = large_room(&server).await;
    let bodies = begin_all(&alice, &room).await;
    assert_eq!(alice.post("/_matrix/client/v3/logout", json!({})).await.0, StatusCode::OK);
    for (what, body) in bodies {
        assert!(body.collect().await.is_err(), "{what} is told to a device that was logged out");
    }
    assert_eq!(held(&server), 0);
}

/// The users whom `device_lists` of an answer names.
fn named(answer: &Value, list: &str) -> BTreeSet<String> {
    answer[list].as_array().unwrap().iter().map(|user| user.as_str().unwrap().to_owned()).collect()
}

#[tokio::test(start_paused = true)]
async fn whoever_joins_or_leaves_a_large_room_is_told_of_everybody_in_it() {
    let server = TestServer::new();
    let (alice, room) = large_room(&server).await;
    let (bob, carol) = (server.register("bob").await, server.register("carol").await);
    let small = create_room(&carol, json!({ "preset": "public_chat" })).await;
    must(&bob, &small, "join", json!({})).await;
    let everybody: BTreeSet<String> = (0..MEMBERS)
        .map(|number| format!("@{number:05}:test.example"))
        .chain([alice.user_id.clone(), carol.user_id.clone()])
        .collect();
    must(&carol, &room, "join", json!({})).await;
    let mut chain = Chain::of(&bob);
    let begun = chain.next().await["next_batch"].clone();
    must(&bob, &room, "join", json!({})).await;
    let joined = chain.next().await;
    // Bob's other devices may have to learn of the one that joined.
    let with_bob: BTreeSet<String> = everybody.iter().chain([&bob.user_id]).cloned().collect();
    assert_eq!(named(&joined["device_lists"], "changed"), with_bob);
    let path = |from: &Value, to: &Value| {
        let text = |token: &Value| token.as_str().unwrap().to_owned();
        format!("/_matrix/client/v3/keys/changes?from={}&to={}", text(from), text(to))
    };
    let (_, changes) = bob.get(&path(&begun, &joined["next_batch"])).await;
    assert_eq!(named(&changes, "changed"), with_bob);
    must(&bob, &room, "leave", json!({})).await;
    let left = chain.next().await;
    // Carol is in another room with Bob.
    let gone: BTreeSet<String> = everybody.into_iter().filter(|user| *user != carol.user_id).collect();
    assert_eq!(named(&left["device_lists"], "left"), gone);
    let (_, changes) = bob.get(&path(&joined["next_batch"], &left["next_batch"])).await;
    assert_eq!(named(&changes, "left"), gone);
}

#[tokio::test(start_paused = true)]
async fn a_room_is_named_after_who_is_there_however_many_others_were_banned() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let there = ["@zed:elsewhere.example".to_owned(), "@zoe:elsewhere.example".to_owned()];
    for (banned, is_large) in [(1_300, false), (1_300, true)] {
        let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
        let mut members: Vec<_> =
            (0..banned).map(|number| (format!("@{number:05}:elsewhere.example"), "ban")).collect();
        members.extend(there.clone().map(|user_id| (user_id, "join")));
        // More than a hundred members of elsewhere make a large room, of which any five are told.
        members.extend(
            (0..if is_large { 150 } else { 0 }).map(|n| (format!("@zz{n}:elsewhere.example"), "join")),
        );
        add_members(&server, &room, &members).await;
        let sync = Chain::of(&alice).next().await;
        let heroes = sync["rooms"]["join"][&room]["summary"]["m.heroes"].as_array().unwrap().clone();
        if is_large {
            assert!(heroes.len() == 5 && heroes.iter().all(|hero| hero.as_str().unwrap().starts_with("@z")));
        } else {
            assert_eq!(heroes, [json!(there[0]), json!(there[1])]);
        }
    }
}
