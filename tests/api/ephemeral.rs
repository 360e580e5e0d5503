//! Typing and presence, as the devices of others are told of them.

use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{TestClient, TestServer},
    sync::{Chain, create_room, env, events, must, room_of_two},
};

async fn types(client: &TestClient, room: &str, body: Value) -> StatusCode {
    let path = format!("/_matrix/client/v3/rooms/{room}/typing/{}", client.user_id);
    client.put(&path, body).await.0
}

fn typists(sync: &Value, room: &str) -> Option<Vec<String>> {
    let event =
        events(sync, "join", room, "ephemeral").into_iter().find(|event| event["type"] == "m.typing")?;
    Some(event["content"]["user_ids"].as_array()?.iter().map(|id| id.as_str().unwrap().to_owned()).collect())
}

#[tokio::test(start_paused = true)]
async fn typing_is_told_and_ends_by_itself() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let mut chain = Chain::of(&alice);
    chain.next().await;
    assert_eq!(types(&bob, &room, json!({ "typing": true, "timeout": 10_000 })).await, StatusCode::OK);
    assert_eq!(typists(&chain.next().await, &room), Some(vec![bob.user_id.clone()]));
    assert_eq!(types(&bob, &room, json!({ "typing": true, "timeout": 20_000 })).await, StatusCode::OK);
    assert!(chain.next().await.get("rooms").is_none());
    // A client that begins is told, too.
    assert_eq!(typists(&Chain::of(&alice).next().await, &room), Some(vec![bob.user_id.clone()]));
    let started = env(&server).instant();
    let ended = chain.next_within(60_000).await;
    assert_eq!(typists(&ended, &room), Some(vec![]));
    assert!((19..22).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
    types(&bob, &room, json!({ "typing": true, "timeout": 30_000 })).await;
    chain.next().await;
    types(&bob, &room, json!({ "typing": false })).await;
    assert_eq!(typists(&chain.next().await, &room), Some(vec![]));
    assert_eq!(typists(&Chain::of(&alice).next().await, &room), None);
}

#[tokio::test(start_paused = true)]
async fn who_leaves_types_no_longer_and_finds_their_account_data_again() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let tag = format!("/_matrix/client/v3/user/{}/rooms/{room}/tags/u.work", bob.user_id);
    assert_eq!(bob.put(&tag, json!({})).await.0, StatusCode::OK);
    let (mut hers, mut his) = (Chain::of(&alice), Chain::of(&bob));
    hers.next().await;
    his.next().await;
    types(&bob, &room, json!({ "typing": true, "timeout": 30_000 })).await;
    assert_eq!(typists(&hers.next().await, &room), Some(vec![bob.user_id.clone()]));
    must(&bob, &room, "leave", json!({})).await;
    assert_eq!(typists(&hers.next().await, &room), Some(vec![]));
    his.next().await;
    must(&bob, &room, "join", json!({})).await;
    let back = his.next().await;
    let data = events(&back, "join", &room, "account_data");
    assert_eq!(data.len(), 1, "a client may have forgotten what it knew of the room: {data:?}");
    assert_eq!(data[0]["type"], "m.tag");
}

#[tokio::test(start_paused = true)]
async fn one_types_for_oneself_in_rooms_one_is_in() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let stranger = server.register("stranger").await;
    assert_eq!(types(&bob, &room, json!({ "typing": true })).await, StatusCode::OK, "no time is asked for");
    assert_eq!(types(&stranger, &room, json!({ "typing": true, "timeout": 1 })).await, StatusCode::FORBIDDEN);
    let path = format!("/_matrix/client/v3/rooms/{room}/typing/{}", bob.user_id);
    assert_eq!(alice.put(&path, json!({ "typing": true, "timeout": 1 })).await.0, StatusCode::FORBIDDEN);
    assert!(alice.put(&path, json!({ "typing": "yes" })).await.0.is_client_error());
}

fn presence_of<'a>(sync: &'a Value, user: &str) -> Option<&'a Value> {
    let mut events = sync["presence"]["events"].as_array()?.iter();
    events.find(|event| event["sender"] == user).map(|event| &event["content"])
}

/// Others are told at most once in a while, but nobody has to wait for what they said themselves.
#[tokio::test(start_paused = true)]
async fn users_find_their_own_presence_as_they_said_it_last() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    // Whatever was told of him before no longer holds back what he says.
    env(&server).sleep(Duration::from_secs(10)).await;
    let path = format!("/presence/{}/status", bob.user_id);
    for message in ["first", "second"] {
        bob.ok_put(&path, json!({ "presence": "online", "status_msg": message })).await;
    }
    for (client, message) in [(&alice, "first"), (&bob, "second")] {
        let sync = client.ok_get("/sync?set_presence=offline").await;
        assert_eq!(presence_of(&sync, &bob.user_id).unwrap()["status_msg"], message, "{}", client.user_id);
        assert_eq!(client.ok_get(&path).await["status_msg"], message, "{}", client.user_id);
    }
}

#[tokio::test(start_paused = true)]
async fn presence_is_told_to_those_who_share_a_room() {
    let server = TestServer::new();
    let (alice, bob, _room) = room_of_two(&server).await;
    let stranger = server.register("stranger").await;
    let (mut alices, mut strangers) = (Chain::of(&alice), Chain::of(&stranger));
    alices.next().await;
    strangers.next().await;
    let path = format!("/_matrix/client/v3/presence/{}/status", bob.user_id);
    let (status, json) = bob.put(&path, json!({ "presence": "unavailable", "status_msg": "busy" })).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    let told = alices.next().await;
    let content = presence_of(&told, &bob.user_id).unwrap();
    assert_eq!((&content["presence"], &content["status_msg"]), (&json!("unavailable"), &json!("busy")));
    assert!(strangers.next().await.get("presence").is_none());
    let (_, asked) = alice.get(&path).await;
    assert_eq!((&asked["presence"], &asked["status_msg"]), (&json!("unavailable"), &json!("busy")));
    assert_eq!(stranger.get(&path).await.0, StatusCode::FORBIDDEN);
    assert_eq!(alice.put(&path, json!({ "presence": "online" })).await.0, StatusCode::FORBIDDEN);
    assert_eq!(bob.put(&path, json!({ "presence": "asleep" })).await.0, StatusCode::BAD_REQUEST);
    let nobody = "/_matrix/client/v3/presence/@nobody:test.example/status";
    assert_eq!(alice.get(nobody).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test(start_paused = true)]
async fn who_was_there_before_joining_is_told_to_clients_that_begin_later() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let path = format!("/_matrix/client/v3/presence/{}/status", bob.user_id);
    bob.ok_put(&path, json!({ "presence": "online", "status_msg": "here" })).await;
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    let before = alice.ok_get("/sync").await;
    assert!(presence_of(&before, &bob.user_id).is_none());
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    let begun = alice.ok_get("/sync").await;
    assert_eq!(presence_of(&begun, &bob.user_id).unwrap()["status_msg"], "here");
}

#[tokio::test(start_paused = true)]
async fn who_polls_is_online_until_the_polls_end() {
    let server = TestServer::new();
    let (alice, bob, _room) = room_of_two(&server).await;
    let mut chain = Chain::of(&alice);
    chain.next().await;
    bob.ok_get("/sync").await;
    assert_eq!(presence_of(&chain.next().await, &bob.user_id).unwrap()["presence"], "online");
    bob.ok_get("/sync?set_presence=online").await;
    assert!(chain.next().await.get("presence").is_none());
    env(&server).sleep(Duration::from_secs(65)).await;
    assert_eq!(presence_of(&chain.next().await, &bob.user_id).unwrap()["presence"], "offline");
}

/// Polls on and on for this long, and says how often there was an answer.
async fn count_polls(client: &TestClient, query: &str, ms: u64) -> u64 {
    let clock = env(&client.server);
    let end_ms = clock.now_ms() + ms;
    let (mut since, mut count) = (String::new(), 0);
    while clock.now_ms() < end_ms {
        let path = format!("/_matrix/client/v3/sync?timeout=10000&{query}{since}");
        let (status, json) = client.get(&path).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        since = format!("&since={}", json["next_batch"].as_str().unwrap());
        count += 1;
        assert!(count < 100, "the polls of {} do not sleep", client.user_id);
    }
    count
}

#[tokio::test(start_paused = true)]
async fn two_devices_of_one_user_do_not_wake_each_other_or_anybody_else() {
    let server = TestServer::new();
    let (alice, bob, _room) = room_of_two(&server).await;
    let body = json!({
        "type": "m.login.password", "identifier": { "type": "m.id.user", "user": alice.user_id },
        "password": "password of alice",
    });
    let (_, json) = server.anonymous().post("/_matrix/client/v3/login", body).await;
    let desk = TestClient { token: json["access_token"].as_str().map(str::to_owned), ..alice.clone() };
    let (phone, desk, bob) = tokio::join!(
        count_polls(&alice, "set_presence=unavailable", 60_000),
        count_polls(&desk, "set_presence=online", 60_000),
        count_polls(&bob, "set_presence=online", 60_000),
    );
    for (who, count) in [("the phone", phone), ("the desk", desk), ("bob", bob)] {
        assert!(count <= 12, "{who} polled {count} times in a minute");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_says_one_thing_after_the_other_is_told_of_seldom() {
    let server = TestServer::new();
    let (alice, bob, _room) = room_of_two(&server).await;
    let path = format!("/_matrix/client/v3/presence/{}/status", bob.user_id);
    let flaps = async {
        for number in 0..400 {
            let state = if number % 2 == 0 { "online" } else { "unavailable" };
            bob.ok_put(&path, json!({ "presence": state, "status_msg": number.to_string() })).await;
            env(&server).sleep(Duration::from_millis(50)).await;
        }
    };
    let (count, ()) = tokio::join!(count_polls(&alice, "set_presence=offline", 30_000), flaps);
    assert!(count <= 12, "{count} polls were answered in half a minute");
    let told = Chain::of(&alice).next().await;
    assert_eq!(presence_of(&told, &bob.user_id).unwrap()["status_msg"], "399", "the last one is told");
}

#[tokio::test(start_paused = true)]
async fn nobody_wakes_himself() {
    let server = TestServer::new();
    let (alice, _bob, _room) = room_of_two(&server).await;
    let mut chain = Chain::of(&alice);
    chain.next().await;
    let path = format!("/_matrix/client/v3/presence/{}/status", alice.user_id);
    let began = env(&server).instant();
    let says = async {
        env(&server).sleep(Duration::from_secs(1)).await;
        alice.ok_put(&path, json!({ "presence": "online", "status_msg": "here" })).await;
    };
    tokio::join!(chain.next_within(8_000), says);
    assert!(began.elapsed() >= Duration::from_secs(8));
    let told = chain.next().await;
    assert_eq!(presence_of(&told, &alice.user_id).unwrap()["status_msg"], "here");
}

#[tokio::test(start_paused = true)]
async fn who_is_idle_is_unavailable_until_they_send_something() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let mut chain = Chain::of(&alice);
    chain.next().await;
    count_polls(&bob, "set_presence=online", 6 * 60_000).await;
    assert_eq!(presence_of(&chain.next().await, &bob.user_id).unwrap()["presence"], "unavailable");
    let path = format!("/_matrix/client/v3/rooms/{room}/send/m.room.message/1");
    assert_eq!(bob.put(&path, json!({ "msgtype": "m.text", "body": "b" })).await.0, StatusCode::OK);
    env(&server).sleep(Duration::from_secs(4)).await;
    let told = chain.next().await;
    let content = presence_of(&told, &bob.user_id).unwrap();
    assert_eq!((&content["presence"], &content["currently_active"]), (&json!("online"), &json!(true)));
}

#[tokio::test(start_paused = true)]
async fn more_than_one_answer_holds_are_told_in_the_next() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
    let mut chain = Chain::of(&alice);
    let mut people = Vec::new();
    for number in 0..503 {
        let person = server.register(&format!("person{number}")).await;
        must(&person, &room, "join", json!({})).await;
        people.push(person);
    }
    chain.next().await;
    for person in &people {
        let path = format!("/_matrix/client/v3/presence/{}/status", person.user_id);
        assert_eq!(person.put(&path, json!({ "presence": "online" })).await.0, StatusCode::OK);
    }
    let (first, second, third) = (chain.next().await, chain.next().await, chain.next().await);
    let told = |sync: &Value| sync["presence"]["events"].as_array().map_or(0, Vec::len);
    assert_eq!((told(&first), told(&second), told(&third)), (500, 3, 0));
    for person in &people {
        let is_told = |sync| presence_of(sync, &person.user_id).is_some();
        assert!(is_told(&first) || is_told(&second), "{} is told", person.user_id);
    }
    // A client that begins, and somebody who comes to the room, learn of all of them too.
    let later = server.register("later").await;
    let mut laters = Chain::of(&later);
    laters.next().await;
    must(&later, &room, "join", json!({})).await;
    for chain in [&mut laters, &mut Chain::of(&alice)] {
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..5 {
            let sync = chain.next().await;
            let events = sync["presence"]["events"].as_array().cloned().unwrap_or_default();
            seen.extend(events.iter().map(|event| event["sender"].as_str().unwrap().to_owned()));
        }
        assert!(people.iter().all(|person| seen.contains(&person.user_id)), "{} are told", seen.len());
    }
}

#[tokio::test(start_paused = true)]
async fn after_a_restart_nobody_is_shown_online_for_ever() {
    let server = TestServer::new();
    let (alice, bob, _room) = room_of_two(&server).await;
    let mut chain = Chain::of(&alice);
    chain.next().await;
    bob.ok_get("/sync").await;
    assert_eq!(presence_of(&chain.next().await, &bob.user_id).unwrap()["presence"], "online");
    server.server().stop().await.unwrap();
    let again = server.killed(usize::MAX);
    chain.client.server = again.clone();
    let mut last = None;
    for _ in 0..4 {
        let sync = chain.next_within(30_000).await;
        last = presence_of(&sync, &bob.user_id).map(|content| content["presence"].clone()).or(last);
    }
    assert_eq!(last, Some(json!("offline")));
}

#[tokio::test(start_paused = true)]
async fn a_restart_changes_nobodys_presence() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let mut people = vec![bob];
    for name in ["hidden", "away", "gone", "left"] {
        let person = server.register(name).await;
        must(&person, &room, "join", json!({})).await;
        people.push(person);
    }
    let says = async |number: usize, state: &str, message: Value| {
        let path = format!("/_matrix/client/v3/presence/{}/status", people[number].user_id);
        let (status, json) =
            people[number].put(&path, json!({ "presence": state, "status_msg": message })).await;
        assert_eq!(status, StatusCode::OK, "{json}");
    };
    for _ in 0..2 {
        // The device is in use, but its user is invisible.
        Chain::of(&people[1]).next().await;
    }
    says(4, "online", Value::Null).await;
    env(&server).sleep(Duration::from_secs(60)).await;
    says(0, "online", json!("at work")).await;
    says(2, "unavailable", Value::Null).await;
    says(3, "offline", json!("on holiday")).await;
    let mut chain = Chain::of(&alice);
    let seen = |sync: &Value| -> Vec<(Value, Value)> {
        let of = |person: &TestClient| presence_of(sync, &person.user_id).cloned().unwrap_or_default();
        people
            .iter()
            .map(of)
            .map(|content| (content["presence"].clone(), content["status_msg"].clone()))
            .collect()
    };
    let before = seen(&chain.next().await);
    assert_eq!(before[0], (json!("online"), json!("at work")), "{before:?}");
    assert_eq!((&before[2].0, &before[3].1), (&json!("unavailable"), &json!("on holiday")), "{before:?}");
    env(&server).sleep(Duration::from_secs(1)).await;
    let again = server.killed(usize::MAX);
    let mut hers = Chain::of(&alice);
    hers.client.server = again.clone();
    env(&again).sleep(Duration::from_secs(1)).await;
    let after = seen(&hers.next().await);
    for (number, (before, after)) in before.iter().zip(&after).enumerate() {
        let is_offline = |told: &(Value, Value)| told.0 == "offline" || told.0.is_null();
        assert_eq!((is_offline(before), &before.1), (is_offline(after), &after.1), "{number}: {after:?}");
        assert!(is_offline(before) || before.0 == after.0, "{number}: {after:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn one_sees_ones_own_presence_at_once() {
    let server = TestServer::new();
    let (alice, ..) = room_of_two(&server).await;
    let path = format!("/_matrix/client/v3/presence/{}/status", alice.user_id);
    for state in ["online", "unavailable", "offline", "online"] {
        assert_eq!(
            alice.put(&path, json!({ "presence": state, "status_msg": state })).await.0,
            StatusCode::OK
        );
        let (_, json) = alice.get(&path).await;
        assert_eq!((&json["presence"], &json["status_msg"]), (&json!(state), &json!(state)));
    }
}

#[tokio::test(start_paused = true)]
async fn after_a_restart_a_client_that_goes_on_is_told_that_nobody_types() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let mut chain = Chain::of(&alice);
    chain.next().await;
    types(&bob, &room, json!({ "typing": true, "timeout": 30_000 })).await;
    assert_eq!(typists(&chain.next().await, &room), Some(vec![bob.user_id.clone()]));
    server.server().stop().await.unwrap();
    let again = server.killed(usize::MAX);
    chain.client.server = again.clone();
    assert_eq!(typists(&chain.next().await, &room), Some(vec![]));
    // That is told once.
    assert_eq!(typists(&chain.next().await, &room), None);
}

/// <https://spec.matrix.org/v1.19/client-server-api/#events-on-change-of-profile-information>
#[tokio::test(start_paused = true)]
async fn a_new_name_or_avatar_is_told_with_the_presence_of_its_user() {
    let server = TestServer::new();
    let (alice, bob, _room) = room_of_two(&server).await;
    let stranger = server.register("stranger").await;
    let (mut alices, mut strangers) = (Chain::of(&alice), Chain::of(&stranger));
    alices.next().await;
    strangers.next().await;
    let set = async |field: &str, value: &str| {
        let path = format!("/_matrix/client/v3/profile/{}/{field}", bob.user_id);
        assert_eq!(bob.put(&path, json!({ field: value })).await.0, StatusCode::OK);
    };
    let avatar = "mxc://test.example/avatar";
    let expected = [
        ("displayname", "Bobby", json!({ "presence": "offline", "displayname": "Bobby" })),
        (
            "avatar_url",
            avatar,
            json!({ "presence": "offline", "displayname": "Bobby", "avatar_url": avatar }),
        ),
        ("displayname", "", json!({ "presence": "offline", "avatar_url": avatar })),
    ];
    for (field, value, content) in expected {
        set(field, value).await;
        let told = alices.next().await;
        assert_eq!(presence_of(&told, &bob.user_id), Some(&content), "{told}");
        env(&server).sleep(Duration::from_secs(5)).await;
    }
    assert!(strangers.next().await.get("presence").is_none());
    // The profile is told when it changed, and not with each change of presence.
    set("m.tz", "Europe/Berlin").await;
    let path = format!("/_matrix/client/v3/presence/{}/status", bob.user_id);
    assert_eq!(bob.put(&path, json!({ "presence": "online" })).await.0, StatusCode::OK);
    let told = alices.next().await;
    let content = presence_of(&told, &bob.user_id).unwrap();
    assert_eq!((&content["presence"], content.get("avatar_url")), (&json!("online"), None));
}

#[tokio::test(start_paused = true)]
async fn presence_can_be_turned_off() {
    let server = TestServer::with(|config| config.presence.enabled = false);
    let (alice, bob, _room) = room_of_two(&server).await;
    let mut chain = Chain::of(&alice);
    chain.next().await;
    let path = format!("/_matrix/client/v3/presence/{}/status", bob.user_id);
    assert_eq!(bob.put(&path, json!({ "presence": "online" })).await, (StatusCode::OK, json!({})));
    assert_eq!(bob.put(&path, json!({ "presence": "asleep" })).await.0, StatusCode::BAD_REQUEST);
    bob.ok_get("/sync").await;
    assert!(chain.next().await.get("presence").is_none());
    assert_eq!(alice.get(&path).await, (StatusCode::OK, json!({ "presence": "offline" })));
}

#[tokio::test(start_paused = true)]
async fn who_comes_to_a_room_is_seen_there_at_once() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
    let path = format!("/_matrix/client/v3/presence/{}/status", bob.user_id);
    bob.ok_put(&path, json!({ "presence": "online", "status_msg": "new here" })).await;
    let (mut alices, mut bobs) = (Chain::of(&alice), Chain::of(&bob));
    alices.next().await;
    bobs.next().await;
    assert_eq!(types(&alice, &room, json!({ "typing": true, "timeout": 30_000 })).await, StatusCode::OK);
    must(&bob, &room, "join", json!({})).await;
    let told = alices.next().await;
    assert_eq!(presence_of(&told, &bob.user_id).unwrap()["status_msg"], "new here");
    assert_eq!(typists(&bobs.next().await, &room), Some(vec![alice.user_id.clone()]));
}

#[tokio::test(start_paused = true)]
async fn who_comes_to_share_a_room_is_told_of_though_never_heard_of() {
    for shows_presence in [true, false] {
        let server = TestServer::with(|config| config.presence.enabled = shows_presence);
        let (alice, bob) = (server.register("alice").await, server.register("bob").await);
        let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
        let (mut alices, mut bobs) = (Chain::of(&alice), Chain::of(&bob));
        alices.next().await;
        bobs.next().await;
        must(&bob, &room, "join", json!({})).await;
        for (chain, other) in [(&mut alices, &bob), (&mut bobs, &alice)] {
            let told = chain.next().await;
            let expected = json!([{ "type": "m.presence", "sender": other.user_id,
                "content": { "presence": "offline" } }]);
            assert_eq!(told["presence"].get("events"), shows_presence.then_some(&expected), "{told}");
            assert!(chain.next().await.get("presence").is_none());
        }
    }
}
