//! A chain of syncs misses nothing, however much happens between two of them and whatever the client's filter leaves out.

use std::{collections::BTreeSet, time::Duration};

use aqueduct::rooms::change::Outcome;
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    ingest::shared_room,
    receipts::room_of,
    support::{TestClient, TestServer, encoded},
    sync::{Chain, act, create_room, env, events, must, say, set_state},
};

fn names(sync: &Value, list: &str) -> BTreeSet<String> {
    let names = sync["device_lists"][list].as_array().cloned().unwrap_or_default();
    names.iter().map(|name| name.as_str().unwrap().to_owned()).collect()
}

fn ephemeral<'a>(sync: &'a Value, room: &str, kind: &str) -> Vec<&'a Value> {
    let all = events(sync, "join", room, "ephemeral");
    all.into_iter().filter(|event| event["type"] == kind).map(|event| &event["content"]).collect()
}

#[tokio::test(start_paused = true)]
async fn more_receipts_than_one_answer_holds_are_told_in_the_next() {
    const RECEIPTS: usize = 520;
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob", "carol"]).await;
    let mut roots = BTreeSet::new();
    for number in 0..RECEIPTS {
        roots.insert(say(&people[0], &room, &format!("m{number}")).await);
    }
    let mut chain = Chain::of(&people[2]);
    chain.next().await;
    for root in &roots {
        let path = format!("receipt/m.read/{}", encoded(root));
        let (status, json) = act(&people[1], &room, &path, json!({ "thread_id": root })).await;
        assert_eq!(status, StatusCode::OK, "{json}");
    }
    env(&server).sleep(Duration::from_secs(1)).await;
    let (mut told, mut first) = (BTreeSet::new(), None);
    for _ in 0..3 {
        let sync = chain.next().await;
        for content in ephemeral(&sync, &room, "m.receipt") {
            told.extend(content.as_object().unwrap().keys().cloned());
        }
        first.get_or_insert(told.len());
    }
    assert!(first < Some(RECEIPTS), "one answer is bounded");
    assert_eq!(told, roots);
    assert!(ephemeral(&chain.next().await, &room, "m.receipt").is_empty(), "nothing is told again");
}

#[tokio::test(start_paused = true)]
async fn who_left_before_one_left_oneself_is_forgotten_too() {
    for (number, acts) in [
        ["b leave", "a leave"].as_slice(),
        &["b kick", "a leave"],
        &["b leave", "a leave", "b join"],
        &["a leave", "b leave", "a join", "a leave"],
        &["b leave", "a leave", "a invite"],
        &["b leave", "a leave", "a forget"],
        &["b leave", "a leave", "a join"],
    ]
    .into_iter()
    .enumerate()
    {
        let server = TestServer::new();
        let (people, room) = room_of(&server, &["maker", "a", "b", "c"]).await;
        let (a, b) = (&people[1], &people[2]);
        let mut chain = Chain::of(a);
        let before = chain.next().await["next_batch"].as_str().unwrap().to_owned();
        for act in acts {
            let (who, what) = act.split_once(' ').unwrap();
            let who = if who == "a" { a } else { b };
            match what {
                "kick" | "invite" => {
                    must(&people[0], &room, what, json!({ "user_id": who.user_id })).await;
                }
                _ => must(who, &room, what, json!({})).await,
            }
        }
        let sync = chain.next().await;
        let left = names(&sync, "left");
        assert!(left.contains(&b.user_id), "{number}: {left:?}");
        assert_eq!(left.contains(&people[3].user_id), acts.last() != Some(&"a join"), "{number}: {left:?}");
        let after = sync["next_batch"].as_str().unwrap();
        let path = format!("/_matrix/client/v3/keys/changes?from={before}&to={after}");
        let (_, changes) = a.get(&path).await;
        let also: BTreeSet<_> = changes["left"]
            .as_array()
            .unwrap()
            .iter()
            .map(|user| user.as_str().unwrap().to_owned())
            .collect();
        assert_eq!(also, left, "{number}: both ways to ask agree");
    }
}

#[tokio::test(start_paused = true)]
async fn whose_keys_matter_does_not_depend_on_the_rooms_in_a_filter() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let mut chain = Chain::filtered(&people[0], json!({ "room": { "rooms": [] } }));
    chain.next().await;
    must(&people[1], &room, "leave", json!({})).await;
    assert!(names(&chain.next().await, "left").contains(&people[1].user_id));
    must(&people[1], &room, "join", json!({})).await;
    assert!(names(&chain.next().await, "changed").contains(&people[1].user_id));
}

#[tokio::test(start_paused = true)]
async fn a_count_falls_when_what_counted_is_redacted_though_the_redaction_is_not_shown() {
    for (number, filter) in [
        json!({ "room": { "timeline": { "types": ["m.room.message"] } } }),
        json!({ "room": { "timeline": { "not_senders": ["@alice:test.example"] } } }),
        Value::Null,
    ]
    .into_iter()
    .enumerate()
    {
        let server = TestServer::new();
        let (people, room) = room_of(&server, &["alice", "bob", "carol"]).await;
        let event = say(&people[2], &room, "counts").await;
        let mut chain = if filter.is_null() {
            let path =
                format!("/_matrix/client/v3/user/{}/account_data/m.ignored_user_list", people[1].user_id);
            let ignored = json!({ "ignored_users": { &people[0].user_id: {} } });
            assert_eq!(people[1].put(&path, ignored).await.0, StatusCode::OK);
            Chain::of(&people[1])
        } else {
            Chain::filtered(&people[1], filter)
        };
        let count = |sync: &Value| {
            sync["rooms"]["join"][&room]["unread_notifications"]["notification_count"].as_u64()
        };
        assert_eq!(count(&chain.next().await), Some(1), "{number}");
        let path = format!("/_matrix/client/v3/rooms/{room}/redact/{}/1", encoded(&event));
        assert_eq!(people[0].put(&path, json!({})).await.0, StatusCode::OK);
        assert_eq!(count(&chain.next().await), Some(0), "{number}");
        assert_eq!(count(&chain.next().await), None, "{number}: that is told once");
    }
}

#[tokio::test(start_paused = true)]
async fn an_invitation_that_one_may_not_see_stands_in_no_timeline() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    set_state(&people[0], &room, "m.room.history_visibility", "", json!({ "history_visibility": "joined" }))
        .await;
    let mut chain = Chain::of(&people[1]);
    chain.next().await;
    must(&people[1], &room, "leave", json!({})).await;
    must(&people[0], &room, "invite", json!({ "user_id": people[1].user_id })).await;
    must(&people[1], &room, "join", json!({})).await;
    let sync = chain.next().await;
    let timeline = events(&sync, "join", &room, "timeline");
    assert!(timeline.iter().any(|event| event["content"]["membership"] == "join"), "{sync}");
    for event in timeline {
        let id = event["event_id"].as_str().unwrap();
        let (status, _) =
            people[1].get(&format!("/_matrix/client/v3/rooms/{room}/event/{}", encoded(id))).await;
        assert_eq!(status, StatusCode::OK, "`/event` knows what `/sync` shows: {event}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_comes_back_hears_that_nobody_types_any_more() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob", "carol"]).await;
    let types = async |typing: bool| {
        let path = format!("/_matrix/client/v3/rooms/{room}/typing/{}", people[2].user_id);
        let (status, json) = people[2].put(&path, json!({ "typing": typing, "timeout": 30_000 })).await;
        assert_eq!(status, StatusCode::OK, "{json}");
    };
    let mut chain = Chain::of(&people[1]);
    types(true).await;
    let told = chain.next().await;
    assert_eq!(ephemeral(&told, &room, "m.typing"), [&json!({ "user_ids": [people[2].user_id] })]);
    must(&people[1], &room, "leave", json!({})).await;
    types(false).await;
    must(&people[1], &room, "join", json!({})).await;
    let told = chain.next().await;
    assert_eq!(ephemeral(&told, &room, "m.typing"), [&json!({ "user_ids": [] })]);
    // Nobody is left to say that they stopped, once the device is gone.
    types(true).await;
    assert_eq!(ephemeral(&chain.next().await, &room, "m.typing").len(), 1);
    assert_eq!(people[2].post("/_matrix/client/v3/logout", json!({})).await.0, StatusCode::OK);
    let told = chain.next_within(5_000).await;
    assert_eq!(ephemeral(&told, &room, "m.typing"), [&json!({ "user_ids": [] })]);
}

#[tokio::test(start_paused = true)]
async fn heroes_are_told_when_the_name_is_redacted_though_that_is_not_shown() {
    for filter in [json!({}), json!({ "room": { "timeline": { "types": ["m.room.message"] } } })] {
        let server = TestServer::new();
        let (people, room) = room_of(&server, &["alice", "bob"]).await;
        let path = format!("/_matrix/client/v3/rooms/{room}/state/m.room.name");
        let (_, named) = people[0].put(&path, json!({ "name": "A name" })).await;
        let mut chain = Chain::filtered(&people[1], filter);
        chain.next().await;
        let event = encoded(named["event_id"].as_str().unwrap());
        let path = format!("/_matrix/client/v3/rooms/{room}/redact/{event}/1");
        assert_eq!(people[0].put(&path, json!({})).await.0, StatusCode::OK);
        let sync = chain.next().await;
        assert_eq!(sync["rooms"]["join"][&room]["summary"]["m.heroes"], json!([people[0].user_id]), "{sync}");
        assert!(chain.next().await["rooms"].is_null(), "that is told once");
    }
}

#[tokio::test(start_paused = true)]
async fn heroes_are_those_who_came_first_by_when_they_came() {
    let server = TestServer::new();
    let maker = server.register("maker").await;
    let mut people = Vec::new();
    for name in ["f", "e", "d", "c", "b", "a", "z"] {
        people.push(server.register(name).await);
    }
    let room = create_room(&maker, json!({ "preset": "public_chat" })).await;
    // Neither the order of names nor that of accounts is the order in which they came.
    let order = [6, 3, 0, 5, 1, 4, 2];
    for number in order {
        must(&people[number], &room, "join", json!({})).await;
    }
    let first: Vec<_> = order[..5].iter().map(|number| people[*number].user_id.clone()).collect();
    let sync = Chain::of(&maker).next().await;
    assert_eq!(sync["rooms"]["join"][&room]["summary"]["m.heroes"], json!(first));
}

#[tokio::test(start_paused = true)]
async fn account_data_of_a_room_one_has_left_reaches_devices_that_want_to_hear_of_it() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let bob = &people[1];
    let mut with_left = Chain::filtered(bob, json!({ "room": { "include_leave": true } }));
    let mut without = Chain::of(bob);
    for chain in [&mut with_left, &mut without] {
        chain.next().await;
    }
    must(bob, &room, "leave", json!({})).await;
    for chain in [&mut with_left, &mut without] {
        chain.next().await;
    }
    let path = format!("/_matrix/client/v3/user/{}/rooms/{room}/account_data/org.test", bob.user_id);
    assert_eq!(bob.put(&path, json!({ "a": 1 })).await.0, StatusCode::OK);
    let sync = with_left.next().await;
    let data = events(&sync, "leave", &room, "account_data");
    assert_eq!(data.len(), 1, "{sync}");
    assert_eq!(data[0]["content"], json!({ "a": 1 }));
    assert!(events(&sync, "leave", &room, "timeline").is_empty(), "{sync}");
    assert!(with_left.next().await["rooms"].is_null(), "that is told once");
    assert!(without.next().await["rooms"].is_null(), "who does not want to hear of such rooms does not");
}

#[tokio::test(start_paused = true)]
async fn members_that_a_filter_left_out_are_not_taken_for_told() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let mut chain = Chain::of(&people[0]);
    chain.next().await;
    let lazy = |not_types: Value| {
        json!({ "room": { "state": { "lazy_load_members": true, "not_types": not_types } } }).to_string()
    };
    let mut since = chain.next().await["next_batch"].as_str().unwrap().to_owned();
    for (number, (filter, is_told)) in
        [(lazy(json!(["m.room.member"])), false), (lazy(json!([])), true)].into_iter().enumerate()
    {
        say(&people[1], &room, &format!("m{number}")).await;
        let path = format!("/_matrix/client/v3/sync?since={since}&filter={}", encoded(&filter));
        let (_, sync) = people[0].get(&path).await;
        let members = events(&sync, "join", &room, "state");
        let told = members.iter().any(|event| event["state_key"] == json!(people[1].user_id));
        assert_eq!(told, is_told, "{sync}");
        since = sync["next_batch"].as_str().unwrap().to_owned();
    }
}

#[tokio::test(start_paused = true)]
async fn a_receipt_that_was_answered_survives_a_crash() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let mut ids = Vec::new();
    for number in 0..4 {
        ids.push(say(&people[0], &room, &format!("m{number}")).await);
    }
    for (number, id) in ids.iter().enumerate() {
        for kind in ["m.read", "m.read.private"] {
            if number == 3 {
                must(&people[1], &room, "read_markers", json!({ kind: id })).await;
            } else {
                must(&people[1], &room, &format!("receipt/{kind}/{}", encoded(id)), json!({})).await;
            }
            let bob = TestClient { server: server.killed(0), ..people[1].clone() };
            let sync = Chain::of(&bob).next().await;
            let told = ephemeral(&sync, &room, "m.receipt");
            assert!(
                told.iter().any(|content| content[id][kind][&bob.user_id].is_object()),
                "{kind} {number}: {told:?}"
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn who_is_not_in_the_state_any_more_to_which_forks_resolve_is_told_so() {
    for is_after in [false, true] {
        let server = TestServer::new();
        let (alice, carol) = (server.register("alice").await, server.register("carol").await);
        let levels = json!({ "users": { &alice.user_id: 100, "@bob:b.example": 100 } });
        let more = json!({ "room_version": "11", "power_level_content_override": levels });
        let (room, bob) = shared_room(&alice, more).await;
        let before = bob.heads();
        must(&carol, &room, "join", json!({})).await;
        let mut chain = Chain::of(&carol);
        if is_after {
            chain.query = "&use_state_after=true".to_owned();
        }
        assert!(chain.next().await["rooms"]["join"].get(&room).is_some());
        // Bob closed the door before she came, on the other side of a partition.
        bob.app.env.sleep(Duration::from_secs(5)).await;
        let close = bob.event("m.room.join_rules", Some(""), json!({ "join_rule": "invite" }), &before);
        assert!(matches!(bob.send(close).await, Outcome::Accepted(_)));
        assert_eq!(carol.ok_get("/joined_rooms").await["joined_rooms"], json!([]));
        let answer = chain.next().await;
        assert!(answer["rooms"]["leave"].get(&room).is_some(), "{answer}");
        assert!(answer["rooms"]["join"].get(&room).is_none(), "{answer}");
        say(&alice, &room, "unseen").await;
        assert!(chain.next().await["rooms"].get("leave").is_none_or(|left| left.get(&room).is_none()));
    }
}
