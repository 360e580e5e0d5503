//! Sliding sync: which rooms an answer tells, from where, and how much of them.

use std::{collections::BTreeMap, time::Duration};

use aqueduct::rooms::change::Outcome;
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    ingest::shared_room,
    support::{TestClient, TestServer, encoded},
    sync::{act, create_room, env, must, room_of_two, say, set_state},
};

/// The path at which clients of today ask.
pub(crate) const PATH: &str = "/_matrix/client/unstable/org.matrix.simplified_msc3575/sync";

/// A client that polls a connection of sliding sync on and on.
#[derive(Clone)]
pub(crate) struct Slide {
    pub(crate) client: TestClient,
    pub(crate) pos: Option<String>,
    pub(crate) body: Value,
}

impl Slide {
    pub(crate) fn of(client: &TestClient, body: Value) -> Self {
        Self { client: client.clone(), pos: None, body }
    }

    /// A client with one list of all rooms, in a range, with some state and few events.
    pub(crate) fn list(client: &TestClient, first: u64, last: u64) -> Self {
        Self::of(client, json!({ "lists": { "all": a_list(first, last) } }))
    }

    pub(crate) async fn try_within(&self, timeout_ms: u64) -> (StatusCode, Value) {
        let mut path = format!("{PATH}?timeout={timeout_ms}&set_presence=offline");
        if let Some(pos) = &self.pos {
            path += &format!("&pos={}", encoded(pos));
        }
        self.client.post(&path, self.body.clone()).await
    }

    pub(crate) async fn next_within(&mut self, timeout_ms: u64) -> Value {
        let (status, json) = self.try_within(timeout_ms).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        self.pos = Some(json["pos"].as_str().unwrap().to_owned());
        json
    }

    pub(crate) async fn next(&mut self) -> Value {
        self.next_within(0).await
    }

    async fn is_unknown(&self) -> bool {
        let (status, json) = self.try_within(0).await;
        (status, json["errcode"].as_str()) == (StatusCode::BAD_REQUEST, Some("M_UNKNOWN_POS"))
    }
}

fn a_list(first: u64, last: u64) -> Value {
    json!({
        "ranges": [[first, last]], "timeline_limit": 3,
        "required_state": [["m.room.name", ""], ["m.room.member", "$ME"], ["m.room.member", "$LAZY"]],
    })
}

pub(crate) fn told(answer: &Value) -> Vec<String> {
    answer["rooms"].as_object().unwrap().keys().cloned().collect()
}

fn list<'a>(answer: &'a Value, room: &str, part: &str) -> Vec<&'a Value> {
    answer["rooms"][room][part].as_array().map(|list| list.iter().collect()).unwrap_or_default()
}

fn bodies(answer: &Value, room: &str) -> Vec<String> {
    let text = |event: &&Value| event["content"]["body"].as_str().map(str::to_owned);
    list(answer, room, "timeline").iter().filter_map(text).collect()
}

/// The state that an answer tells of a room: type and state key, with the content; `null` for what is gone.
fn state(answer: &Value, room: &str) -> BTreeMap<(String, String), Value> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let pair = |event: &Value| ((text(&event["type"]), text(&event["state_key"])), event["content"].clone());
    list(answer, room, "required_state").into_iter().map(pair).collect()
}

fn has(answer: &Value, room: &str, event_type: &str, key: &str) -> bool {
    state(answer, room).contains_key(&(event_type.to_owned(), key.to_owned()))
}

async fn rooms_of(client: &TestClient, count: usize) -> Vec<String> {
    let mut rooms = Vec::new();
    for number in 0..count {
        rooms.push(create_room(client, json!({ "name": format!("room {number}") })).await);
    }
    rooms
}

#[tokio::test(start_paused = true)]
async fn a_list_tells_the_newest_rooms_and_then_only_what_is_new() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let rooms = rooms_of(&alice, 5).await;
    let mut slide = Slide::list(&alice, 0, 1);
    slide.body["txn_id"] = "my word".into();
    let first = slide.next().await;
    assert_eq!((first["lists"]["all"]["count"].as_u64(), &first["txn_id"]), (Some(5), &"my word".into()));
    let mut newest = rooms[3..].to_vec();
    newest.sort();
    assert_eq!(told(&first), newest);
    let room = &first["rooms"][&rooms[4]];
    assert_eq!(
        (&room["initial"], &room["name"], &room["limited"]),
        (&true.into(), &"room 4".into(), &true.into())
    );
    assert_eq!((&room["membership"], &room["lists"]), (&"join".into(), &json!(["all"])));
    assert_eq!((&room["joined_count"], &room["invited_count"]), (&1.into(), &0.into()));
    assert_eq!((&room["num_live"], room["timeline"].as_array().unwrap().len()), (&0.into(), 3));
    assert!(room["prev_batch"].is_string() && room["bump_stamp"].is_u64() && room["is_dm"].is_null());
    assert_eq!((&room["notification_count"], &room["highlight_count"]), (&0.into(), &0.into()));
    assert!(
        has(&first, &rooms[4], "m.room.name", "") && has(&first, &rooms[4], "m.room.member", &alice.user_id)
    );
    assert!(!has(&first, &rooms[4], "m.room.create", ""), "nobody asked for it");
    assert_eq!(told(&slide.next().await), Vec::<String>::new());
    // A room below the range comes into it by what happens in it, and the one that it pushes out is not told.
    say(&alice, &rooms[0], "hello").await;
    let next = slide.next().await;
    assert_eq!(told(&next), [rooms[0].clone()]);
    assert_eq!(
        (&next["rooms"][&rooms[0]]["initial"], &next["rooms"][&rooms[0]]["num_live"]),
        (&true.into(), &1.into())
    );
    say(&alice, &rooms[0], "again").await;
    let next = slide.next().await;
    assert_eq!(bodies(&next, &rooms[0]), ["again"]);
    let room = &next["rooms"][&rooms[0]];
    assert!(room["initial"].is_null() && room["name"].is_null() && room["limited"] == false, "{room}");
    // A wider range tells the others.
    slide.body["lists"]["all"]["ranges"] = json!([[0, 9]]);
    let wider = slide.next().await;
    let mut others = vec![rooms[1].clone(), rooms[2].clone()];
    others.sort();
    assert_eq!(told(&wider), others);
}

#[tokio::test(start_paused = true)]
async fn a_poll_waits_for_news_and_is_answered_empty_when_the_time_is_up() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let mut slide = Slide::list(&bob, 0, 9);
    slide.next_within(30_000).await;
    let (woken, ()) = tokio::join!(slide.next_within(30_000), async {
        env(&server).sleep(Duration::from_secs(1)).await;
        say(&alice, &room, "wake up").await;
    });
    assert_eq!(bodies(&woken, &room), ["wake up"]);
    let began = env(&server).instant();
    let idle = slide.next_within(5_000).await;
    assert!(env(&server).instant().duration_since(began) >= Duration::from_secs(5));
    assert_eq!(told(&idle), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_room_that_left_the_range_is_told_from_where_it_was_told_last() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let rooms = rooms_of(&alice, 2).await;
    let mut slide = Slide::list(&alice, 0, 9);
    slide.next().await;
    slide.body["lists"]["all"]["ranges"] = json!([[0, 0]]);
    say(&alice, &rooms[0], "one").await;
    say(&alice, &rooms[1], "two").await;
    set_state(&alice, &rooms[0], "m.room.name", "", json!({ "name": "other" })).await;
    say(&alice, &rooms[1], "three").await;
    let next = slide.next().await;
    assert_eq!(told(&next), [rooms[1].clone()]);
    assert_eq!(bodies(&next, &rooms[1]), ["two", "three"]);
    // Many answers later the room is chosen again, and told from where the client knew it.
    slide.next().await;
    slide.next().await;
    slide.body["room_subscriptions"] = json!({ &rooms[0]: { "timeline_limit": 3, "required_state": [] } });
    let next = slide.next().await;
    let room = &next["rooms"][&rooms[0]];
    assert!(room["initial"].is_null() && room["limited"] == false, "{room}");
    assert_eq!((bodies(&next, &rooms[0]), &room["name"]), (vec!["one".to_owned()], &"other".into()));
    assert_eq!(slide.next().await["rooms"], json!({}));
}

#[tokio::test(start_paused = true)]
async fn a_position_may_be_used_again_until_the_next_one_is() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let mut slide = Slide::list(&bob, 0, 9);
    slide.next().await;
    let lost = slide.clone();
    say(&alice, &room, "hello").await;
    let first = slide.next().await;
    let mut again = lost.clone();
    let second = again.next().await;
    assert_eq!(first["rooms"], second["rooms"], "an answer that was lost is given again");
    // A wider wish writes a step, which the client may lose as well.
    again.body["lists"]["all"]["required_state"] = json!([["*", "*"]]);
    let before = again.clone();
    let wide = again.next().await;
    assert!(has(&wide, &room, "m.room.create", ""));
    let mut retried = before.clone();
    let wide_again = retried.next().await;
    assert_eq!(state(&wide, &room), state(&wide_again, &room));
    assert_eq!(retried.next().await["rooms"], json!({}));
    // The answer that was given up is no place to go on from, nor is one from before the last that was written.
    assert!(again.is_unknown().await, "the answer that was given up");
    retried.body["lists"]["all"]["required_state"] = json!([["m.room.name", ""], ["m.room.topic", ""]]);
    retried.body["lists"]["all"]["timeline_limit"] = 9.into();
    retried.next().await;
    assert!(lost.is_unknown().await, "one before the last that was written");
}

#[tokio::test(start_paused = true)]
async fn a_position_belongs_to_one_device_and_one_connection() {
    let server = TestServer::new();
    let (alice, bob, _) = room_of_two(&server).await;
    let mut slide = Slide::list(&bob, 0, 9);
    slide.next().await;
    for other in [alice, bob.on_device("OTHER").await] {
        let stolen = Slide { client: other, ..slide.clone() };
        assert!(stolen.is_unknown().await);
    }
    let mut elsewhere = slide.clone();
    elsewhere.body["conn_id"] = "another".into();
    assert!(elsewhere.is_unknown().await);
    for text in ["", "x", "s1_2_3", "s1_2_3~1.1.1.-.-", "s99999999999_0_0~1.1.1.-.-"] {
        let odd = Slide { pos: Some(text.to_owned()), ..slide.clone() };
        assert!(odd.is_unknown().await, "{text}");
    }
    // A connection that begins anew ends the one of the same name.
    let mut anew = Slide { pos: None, ..slide.clone() };
    anew.next().await;
    assert!(slide.is_unknown().await);
    assert_eq!(anew.next().await["rooms"], json!({}));
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_device_has_twenty_connections_of_which_the_oldest_ends() {
    let server = TestServer::new();
    let (_, bob, _) = room_of_two(&server).await;
    let mut slides = Vec::new();
    for number in 0..21 {
        let mut slide = Slide::list(&bob, 0, 9);
        slide.body["conn_id"] = format!("connection {number}").into();
        slide.next().await;
        env(&server).sleep(Duration::from_secs(1)).await;
        slides.push(slide);
    }
    assert!(slides[0].is_unknown().await);
    for slide in &mut slides[1..] {
        assert_eq!(slide.next().await["rooms"], json!({}));
    }
    let rows: BTreeMap<_, _> = server.assert_whole().into_iter().collect();
    assert_eq!(rows.get("SYNC_CONNECTION"), Some(&20));
    env(&server).sleep(Duration::from_secs(31 * 24 * 3_600)).await;
    assert!(slides[5].is_unknown().await, "a connection that nobody uses ends after a month");
    bob.ok_post("/logout", json!({})).await;
    let rows: BTreeMap<_, _> = server.assert_whole().into_iter().collect();
    assert_eq!((rows.get("SYNC_CONNECTION"), rows.get("SYNC_CONNECTION_ROOMS")), (Some(&0), Some(&0)));
}

#[tokio::test(start_paused = true)]
async fn connections_go_on_after_a_clean_restart() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let mut slide = Slide::list(&bob, 0, 9);
    slide.next().await;
    say(&alice, &room, "before").await;
    let server = crate::sync_model::restarted(&server).await;
    slide.client.server = server.clone();
    let next = slide.next().await;
    assert_eq!(bodies(&next, &room), ["before"]);
    assert!(next["rooms"][&room]["initial"].is_null());
    // After a crash that lost the last notes, a client goes on or is told to begin anew, and misses nothing.
    let alice = TestClient { server: server.clone(), ..alice };
    say(&alice, &room, "more").await;
    slide.body["lists"]["all"]["required_state"] = json!([["*", "*"]]);
    slide.next().await;
    for kept in [0, usize::MAX] {
        let server = server.killed(kept);
        let mut slide = slide.clone();
        slide.client.server = server.clone();
        if slide.is_unknown().await {
            slide.pos = None;
        }
        slide.next().await;
        say(&TestClient { server, ..alice.clone() }, &room, "last").await;
        assert_eq!(bodies(&slide.next().await, &room), ["last"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_larger_timeline_is_told_at_once() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    for number in 0..6 {
        say(&alice, &room, &number.to_string()).await;
    }
    let mut slide = Slide::list(&bob, 0, 9);
    slide.body["lists"]["all"]["timeline_limit"] = 1.into();
    assert_eq!(bodies(&slide.next().await, &room), ["5"]);
    slide.body["lists"]["all"]["timeline_limit"] = 4.into();
    let wider = slide.next_within(30_000).await;
    let told = &wider["rooms"][&room];
    assert_eq!(bodies(&wider, &room), ["2", "3", "4", "5"]);
    assert_eq!(
        (&told["expanded_timeline"], &told["unstable_expanded_timeline"]),
        (&true.into(), &true.into())
    );
    assert_eq!(
        (&told["num_live"], &told["limited"], &told["initial"]),
        (&0.into(), &true.into(), &Value::Null)
    );
    assert_eq!(slide.next().await["rooms"], json!({}));
    // Fewer events are no reason to tell any, and neither are as many as before.
    for limit in [1, 4] {
        slide.body["lists"]["all"]["timeline_limit"] = limit.into();
        assert_eq!(slide.next().await["rooms"], json!({}), "{limit}");
    }
    // Where some were left out meanwhile, more are told again.
    slide.body["lists"]["all"]["timeline_limit"] = 1.into();
    say(&alice, &room, "6").await;
    say(&alice, &room, "7").await;
    assert_eq!(bodies(&slide.next().await, &room), ["7"]);
    slide.body["lists"]["all"]["timeline_limit"] = 3.into();
    assert_eq!(bodies(&slide.next().await, &room), ["5", "6", "7"]);
}

#[tokio::test(start_paused = true)]
async fn state_that_is_wanted_later_is_told_as_it_is_now() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    set_state(&alice, &room, "m.room.topic", "", json!({ "topic": "first" })).await;
    let mut slide = Slide::list(&bob, 0, 9);
    let topic = ("m.room.topic".to_owned(), String::new());
    slide.body["lists"]["all"]["required_state"] = json!([["m.room.name", ""]]);
    assert!(state(&slide.next().await, &room).is_empty());
    let subscription = json!({ "timeline_limit": 3, "required_state": [["m.room.topic", ""]] });
    slide.body["room_subscriptions"] = json!({ &room: subscription });
    assert_eq!(state(&slide.next().await, &room)[&topic]["topic"], "first");
    assert_eq!(slide.next().await["rooms"], json!({}));
    // State that the client ceases to want may change without its knowledge, and is told when it wants it again.
    slide.body["room_subscriptions"] = json!({});
    assert_eq!(slide.next().await["rooms"], json!({}));
    set_state(&alice, &room, "m.room.topic", "", json!({ "topic": "second" })).await;
    assert!(state(&slide.next().await, &room).is_empty());
    slide.body["room_subscriptions"] = json!({ &room: subscription });
    assert_eq!(state(&slide.next().await, &room)[&topic]["topic"], "second");
    // State that did not change meanwhile is not told again.
    slide.body["room_subscriptions"] = json!({});
    slide.next().await;
    slide.body["room_subscriptions"] = json!({ &room: subscription });
    assert_eq!(slide.next().await["rooms"], json!({}));
}

#[tokio::test(start_paused = true)]
async fn state_is_wanted_by_type_by_key_and_by_either_form() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    for key in ["a", "b"] {
        set_state(&alice, &room, "org.example.thing", key, json!({ "key": key })).await;
    }
    let types = |answer: &Value| -> Vec<String> {
        state(answer, &room).into_keys().map(|(event_type, key)| format!("{event_type}|{key}")).collect()
    };
    let me = format!("m.room.member|{}", bob.user_id);
    let she = format!("m.room.member|{}", alice.user_id);
    let cases = [
        (json!([["org.example.thing", "*"]]), vec!["org.example.thing|a", "org.example.thing|b"]),
        (json!([["*", "b"]]), vec!["org.example.thing|b"]),
        (json!([["m.room.member", "$ME"]]), vec![&*me]),
        (json!([["m.room.member", "*"]]), vec![&*she, &*me]),
        (
            json!({ "include": [{ "type": "org.example.thing" }], "exclude": [{ "state_key": "a" }] }),
            vec!["org.example.thing|b"],
        ),
        (json!({ "include": [{ "state_key": "a" }] }), vec!["org.example.thing|a"]),
        (json!({}), vec![]),
    ];
    for (wish, expected) in cases {
        let mut slide = Slide::list(&bob, 0, 9);
        slide.body["lists"]["all"]["required_state"] = wish.clone();
        slide.body["lists"]["all"]["timeline_limit"] = 0.into();
        assert_eq!(types(&slide.next().await), expected, "{wish}");
    }
    let wishes =
        [json!([["*", "*"], ["m.room.member", "$LAZY"]]), json!({ "include": [{}], "lazy_members": true })];
    for (round, wish) in wishes.into_iter().enumerate() {
        say(&alice, &room, &format!("hello {round}")).await;
        let mut slide = Slide::list(&bob, 0, 9);
        slide.body["lists"]["all"] =
            json!({ "ranges": [[0, 9]], "timeline_limit": 1, "required_state": wish });
        let first = slide.next().await;
        assert!(has(&first, &room, "m.room.create", ""), "{wish}: {first}");
        assert!(has(&first, &room, "m.room.member", &alice.user_id), "{wish}: {first}");
        assert!(!has(&first, &room, "m.room.member", &bob.user_id), "nothing of Bob's is shown");
        say(&bob, &room, &format!("I {round}")).await;
        assert!(has(&slide.next().await, &room, "m.room.member", &bob.user_id));
        say(&bob, &room, &format!("I again {round}")).await;
        assert!(!has(&slide.next().await, &room, "m.room.member", &bob.user_id), "it was told before");
    }
}

#[tokio::test(start_paused = true)]
async fn a_member_who_was_told_lazily_is_told_when_they_change_even_across_a_gap() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    say(&alice, &room, "hello").await;
    let mut slide = Slide::list(&bob, 0, 9);
    slide.body["lists"]["all"]["timeline_limit"] = 1.into();
    assert!(has(&slide.next().await, &room, "m.room.member", &alice.user_id));
    let own = json!({ "membership": "join", "displayname": "Alice II" });
    set_state(&alice, &room, "m.room.member", &alice.user_id, own).await;
    say(&bob, &room, "a").await;
    say(&bob, &room, "b").await;
    let next = slide.next().await;
    assert_eq!(
        (bodies(&next, &room), &next["rooms"][&room]["limited"]),
        (vec!["b".to_owned()], &true.into())
    );
    let key = ("m.room.member".to_owned(), alice.user_id.clone());
    assert_eq!(state(&next, &room)[&key]["displayname"], "Alice II");
}

#[tokio::test(start_paused = true)]
async fn filters_choose_the_rooms_of_a_list() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let plain = create_room(&alice, json!({ "name": "plain" })).await;
    let space = create_room(&alice, json!({ "creation_content": { "type": "m.space" } })).await;
    let encryption =
        json!({ "type": "m.room.encryption", "content": { "algorithm": "m.megolm.v1.aes-sha2" } });
    let secret = create_room(&alice, json!({ "initial_state": [encryption] })).await;
    let invited = create_room(&bob, json!({ "invite": [&alice.user_id] })).await;
    set_state(&alice, &space, "m.space.child", &plain, json!({ "via": ["test.example"] })).await;
    set_state(&alice, &space, "m.space.child", &secret, json!({})).await;
    let data = format!("/user/{}", alice.user_id);
    alice.ok_put(&format!("{data}/account_data/m.direct"), json!({ &bob.user_id: [&secret] })).await;
    alice.ok_put(&format!("{data}/rooms/{plain}/tags/m.favourite"), json!({ "order": 0.5 })).await;
    let cases = [
        (json!({}), vec![&plain, &space, &secret, &invited]),
        (json!({ "is_dm": true }), vec![&secret]),
        (json!({ "is_dm": false }), vec![&plain, &space, &invited]),
        (json!({ "is_encrypted": true }), vec![&secret]),
        (json!({ "is_encrypted": false, "is_invite": false }), vec![&plain, &space]),
        (json!({ "is_invited": true }), vec![&invited]),
        (json!({ "room_types": ["m.space"] }), vec![&space]),
        (
            json!({ "room_types": [null, "m.space"], "not_room_types": ["m.space"] }),
            vec![&plain, &secret, &invited],
        ),
        (json!({ "not_room_types": [null] }), vec![&space]),
        (json!({ "spaces": [&space] }), vec![&plain]),
        (json!({ "spaces": ["!nowhere:x"] }), vec![]),
        (json!({ "tags": ["m.favourite", "x"] }), vec![&plain]),
        (json!({ "tags": ["m.favourite"], "not_tags": ["m.favourite"] }), vec![]),
        (json!({ "not_tags": ["m.favourite"], "is_invite": false }), vec![&space, &secret]),
    ];
    for (filters, expected) in cases {
        let mut slide = Slide::list(&alice, 0, 9);
        slide.body["lists"]["all"]["filters"] = filters.clone();
        let answer = slide.next().await;
        let mut expected: Vec<String> = expected.into_iter().cloned().collect();
        expected.sort();
        assert_eq!(told(&answer), expected, "{filters}");
        assert_eq!(answer["lists"]["all"]["count"], expected.len(), "{filters}");
    }
}

#[tokio::test(start_paused = true)]
async fn direct_chats_are_told_and_so_is_that_a_room_becomes_one() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let mut slide = Slide::list(&alice, 0, 9);
    assert!(slide.next().await["rooms"][&room]["is_dm"].is_null());
    let direct = format!("/user/{}/account_data/m.direct", alice.user_id);
    alice.ok_put(&direct, json!({ &bob.user_id: [&room] })).await;
    let next = slide.next_within(30_000).await;
    assert_eq!(next["rooms"][&room]["is_dm"], true);
    assert_eq!(slide.next().await["rooms"], json!({}));
    alice.ok_put(&direct, json!({})).await;
    assert_eq!(slide.next().await["rooms"][&room]["is_dm"], false);
}

#[tokio::test(start_paused = true)]
async fn names_pictures_and_heroes_are_told_when_they_change() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let mut slide = Slide::list(&bob, 0, 9);
    let first = slide.next().await;
    let heroes = |answer: &Value| answer["rooms"][&room]["heroes"].clone();
    assert_eq!(heroes(&first), json!([{ "user_id": alice.user_id, "displayname": "alice" }]));
    assert!(first["rooms"][&room]["name"].is_null());
    set_state(&alice, &room, "m.room.name", "", json!({ "name": "one" })).await;
    set_state(&alice, &room, "m.room.avatar", "", json!({ "url": "mxc://test.example/a" })).await;
    let named = slide.next().await;
    assert_eq!((&named["rooms"][&room]["name"], heroes(&named)), (&"one".into(), Value::Null));
    assert_eq!(named["rooms"][&room]["avatar"], "mxc://test.example/a");
    say(&alice, &room, "hello").await;
    let next = slide.next().await;
    assert!(next["rooms"][&room].get("name").is_none() && next["rooms"][&room].get("avatar").is_none());
    // A redaction takes the name away, though no state event takes the place of the one that said it.
    let name = slide.client.ok_get(&format!("/rooms/{room}/state")).await;
    let events = name.as_array().unwrap().clone();
    let event = events.iter().find(|event| event["type"] == "m.room.name").unwrap()["event_id"].clone();
    let path = format!("/rooms/{room}/redact/{}/1", encoded(event.as_str().unwrap()));
    alice.ok_put(&path, json!({})).await;
    set_state(&alice, &room, "m.room.avatar", "", json!({})).await;
    let bare = slide.next().await;
    let told = bare["rooms"][&room].as_object().unwrap();
    assert!(told.get("name").is_some_and(Value::is_null) && told.get("avatar").is_some_and(Value::is_null));
    assert_eq!(state(&bare, &room)[&("m.room.name".to_owned(), String::new())], json!({}));
    assert!(heroes(&bare).is_array(), "{bare:#}");
    let carol = server.register("carol").await;
    must(&carol, &room, "join", json!({})).await;
    let joined = slide.next().await;
    assert_eq!(
        (&joined["rooms"][&room]["joined_count"], heroes(&joined).as_array().unwrap().len()),
        (&3.into(), 2)
    );
}

#[tokio::test(start_paused = true)]
async fn invitations_knocks_and_ends_of_stays_are_told() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let body = json!({ "name": "den", "preset": "private_chat", "room_version": "11" });
    let room = create_room(&alice, body).await;
    let mut slide = Slide::list(&bob, 0, 9);
    slide.next().await;
    must(&alice, &room, "invite", json!({ "user_id": bob.user_id })).await;
    let invited = slide.next_within(30_000).await;
    let told = &invited["rooms"][&room];
    assert_eq!((&told["membership"], &told["initial"]), (&"invite".into(), &true.into()));
    assert_eq!(told["stripped_state"], told["invite_state"]);
    let stripped = told["stripped_state"].as_array().unwrap();
    assert!(stripped.iter().any(|event| event["type"] == "m.room.name" && event["content"]["name"] == "den"));
    assert!(told["required_state"].is_null() && told["timeline"].is_null() && told["joined_count"].is_null());
    assert_eq!(slide.next().await["rooms"], json!({}));
    // An invitation that is refused.
    must(&bob, &room, "leave", json!({})).await;
    let refused = slide.next().await;
    assert_eq!(refused["rooms"][&room]["membership"], "leave");
    let own = ("m.room.member".to_owned(), bob.user_id.clone());
    assert_eq!(state(&refused, &room)[&own]["membership"], "leave");
    assert_eq!(slide.next().await["rooms"], json!({}));
    // One that is taken: the room is told whole.
    must(&alice, &room, "invite", json!({ "user_id": bob.user_id })).await;
    assert_eq!(slide.next().await["rooms"][&room]["membership"], "invite");
    must(&bob, &room, "join", json!({})).await;
    let joined = slide.next().await;
    assert_eq!(
        (&joined["rooms"][&room]["initial"], &joined["rooms"][&room]["membership"]),
        (&true.into(), &"join".into())
    );
    assert_eq!(joined["rooms"][&room]["name"], "den");
    // A kick is told with what came before it.
    say(&alice, &room, "last words").await;
    must(&alice, &room, "kick", json!({ "user_id": bob.user_id })).await;
    say(&alice, &room, "not for Bob").await;
    let kicked = slide.next().await;
    assert_eq!(
        (&kicked["rooms"][&room]["membership"], bodies(&kicked, &room)),
        (&"leave".into(), vec!["last words".to_owned()])
    );
    assert_eq!(state(&kicked, &room)[&own]["membership"], "leave");
    assert!(kicked["rooms"][&room]["joined_count"].is_null(), "who is there now is none of Bob's business");
    assert_eq!(slide.next().await["rooms"], json!({}));
    must(&alice, &room, "ban", json!({ "user_id": bob.user_id })).await;
    let banned = slide.next().await;
    assert_eq!(
        (&banned["rooms"][&room]["membership"], &state(&banned, &room)[&own]["membership"]),
        (&"ban".into(), &"ban".into())
    );
    // A client that begins is told of rooms that its user was made to leave.
    let mut other = Slide::list(&bob, 0, 9);
    other.body["conn_id"] = "other".into();
    let first = other.next().await;
    assert_eq!(
        (&first["rooms"][&room]["membership"], &first["lists"]["all"]["count"]),
        (&"ban".into(), &1.into())
    );
    must(&bob, &room, "forget", json!({})).await;
    assert_eq!(slide.next().await["lists"]["all"]["count"], 0);
}

#[tokio::test(start_paused = true)]
async fn a_room_that_the_user_left_is_told_to_the_connection_that_knew_it() {
    let server = TestServer::new();
    let (_, bob, room) = room_of_two(&server).await;
    let mut slide = Slide::list(&bob, 0, 9);
    slide.next().await;
    must(&bob, &room, "leave", json!({})).await;
    must(&bob, &room, "forget", json!({})).await;
    let left = slide.next().await;
    assert_eq!(left["rooms"][&room]["membership"], "leave");
    let next = slide.next().await;
    assert_eq!((&next["rooms"], &next["lists"]["all"]["count"]), (&json!({}), &0.into()));
    let mut anew = Slide::list(&bob, 0, 9);
    anew.body["conn_id"] = "anew".into();
    assert_eq!(anew.next().await["lists"]["all"]["count"], 0);
    must(&bob, &room, "join", json!({})).await;
    for slide in [&mut slide, &mut anew] {
        assert_eq!(slide.next().await["rooms"][&room]["initial"], true);
    }
}

#[tokio::test(start_paused = true)]
async fn invitations_of_ignored_users_are_left_out() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let ignored = format!("/user/{}/account_data/m.ignored_user_list", bob.user_id);
    bob.ok_put(&ignored, json!({ "ignored_users": { &alice.user_id: {} } })).await;
    let mut slide = Slide::list(&bob, 0, 9);
    slide.next().await;
    create_room(&alice, json!({ "invite": [&bob.user_id] })).await;
    say(&alice, &room, "unheard").await;
    let next = slide.next().await;
    assert_eq!((&next["lists"]["all"]["count"], bodies(&next, &room)), (&1.into(), vec![]));
    // The end of a stay is told, though the invitation that follows it is not.
    must(&alice, &room, "kick", json!({ "user_id": bob.user_id })).await;
    must(&alice, &room, "invite", json!({ "user_id": bob.user_id })).await;
    let told = slide.next().await;
    assert!(told["rooms"][&room]["stripped_state"].is_null() && told["rooms"][&room].is_object(), "{told:#}");
    assert_eq!(slide.next().await["rooms"], json!({}));
}

#[tokio::test(start_paused = true)]
async fn a_subscription_shows_nobody_a_room_that_they_may_not_see() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = create_room(&alice, json!({ "preset": "private_chat" })).await;
    let wish = json!({ "timeline_limit": 10, "required_state": [["*", "*"]] });
    let body = json!({ "room_subscriptions": { &room: wish, "!nowhere:x": wish, "no room": wish } });
    let mut slide = Slide::of(&bob, body);
    assert_eq!(slide.next().await["rooms"], json!({}));
    must(&alice, &room, "ban", json!({ "user_id": bob.user_id })).await;
    say(&alice, &room, "secret").await;
    assert_eq!(slide.next().await["rooms"], json!({}));
}

#[tokio::test(start_paused = true)]
async fn unread_counts_are_told_when_they_change() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let mut slide = Slide::list(&bob, 0, 9);
    slide.next().await;
    let event = say(&alice, &room, "hello").await;
    let counted = slide.next().await;
    assert_eq!(counted["rooms"][&room]["notification_count"], 1);
    let (status, _) = act(&bob, &room, &format!("receipt/m.read/{}", encoded(&event)), json!({})).await;
    assert_eq!(status, StatusCode::OK);
    let read = slide.next().await;
    assert_eq!(
        (&read["rooms"][&room]["notification_count"], &read["rooms"][&room]["timeline"]),
        (&0.into(), &Value::Null)
    );
    assert_eq!(slide.next().await["rooms"], json!({}));
}

#[tokio::test(start_paused = true)]
async fn requests_that_cost_too_much_are_refused() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let many = |count: usize, entry: Value| -> Value {
        Value::Object((0..count).map(|number| (number.to_string(), entry.clone())).collect())
    };
    let wish = json!({ "timeline_limit": 1, "required_state": [] });
    let patterns: Vec<[String; 2]> = (0..1_001).map(|number| [number.to_string(), String::new()]).collect();
    let wide = json!({ "timeline_limit": 1, "required_state": patterns });
    let with = |field: &str, value: Value| {
        let mut list = a_list(0, 9);
        list[field] = value;
        json!({ "lists": { "all": list } })
    };
    let long = "x".repeat(300);
    for (body, expected) in [
        (json!({ "lists": many(101, a_list(0, 1)) }), "M_INVALID_PARAM"),
        (json!({ "room_subscriptions": many(1_001, wish.clone()) }), "M_INVALID_PARAM"),
        (json!({ "lists": { "all": wide } }), "M_INVALID_PARAM"),
        (with("ranges", json!([[5, 1]])), "M_INVALID_PARAM"),
        (with("ranges", json!(vec![[0, 1]; 21])), "M_INVALID_PARAM"),
        (with("ranges", json!([[-1, 1]])), "M_BAD_JSON"),
        (with("ranges", json!([[0.5, 1]])), "M_BAD_JSON"),
        (with("ranges", json!([[1]])), "M_BAD_JSON"),
        (with("range", json!("0")), "M_BAD_JSON"),
        (with("timeline_limit", json!(-1)), "M_BAD_JSON"),
        (with("filters", json!({ "spaces": vec!["!a:x"; 101] })), "M_INVALID_PARAM"),
        (with("required_state", json!([["m.room.name", long]])), "M_INVALID_PARAM"),
        (with("required_state", json!(7)), "M_BAD_JSON"),
        (json!({ "conn_id": long }), "M_INVALID_PARAM"),
        (json!({ "txn_id": long }), "M_INVALID_PARAM"),
        (json!({ "lists": [] }), "M_BAD_JSON"),
        (json!({ "set_presence": "sleepy" }), "M_INVALID_PARAM"),
        (json!({ "extensions": { "to_device": { "enabled": true, "since": "x" } } }), "M_INVALID_PARAM"),
    ] {
        let path =
            PATH.to_owned() + if body["set_presence"].is_null() { "?set_presence=offline" } else { "" };
        let (status, json) = alice.post(&path, body.clone()).await;
        assert_eq!(
            (status, json["errcode"].as_str()),
            (StatusCode::BAD_REQUEST, Some(expected)),
            "{body}: {json}"
        );
    }
    let over = json!({ "room_subscriptions": many(101, wish) });
    let (status, _) = alice.post("/_matrix/client/v4/sync", over.clone()).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "the settled path has the bound of the proposal");
    let (status, _) = alice.post(PATH, over).await;
    assert_eq!(status, StatusCode::OK);
    for ranges in
        [json!([[0, u64::MAX]]), json!([[u64::MAX, u64::MAX]]), json!([]), json!([[0, 0], [0, 5], [3, 9]])]
    {
        let (status, json) = alice.post(PATH, with("ranges", ranges.clone())).await;
        assert_eq!(status, StatusCode::OK, "{ranges}: {json}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_settled_path_takes_everything_in_the_body() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let list = json!({ "range": [0, 9], "timeline_limit": 2, "required_state": { "include": [{}], "lazy_members": true } });
    let path = "/_matrix/client/v4/sync";
    let first = bob.ok_post(path, json!({ "lists": { "all": &list } })).await;
    assert_eq!(first["rooms"][&room]["initial"], true);
    say(&alice, &room, "hello").await;
    let body =
        json!({ "lists": { "all": &list }, "pos": first["pos"], "timeout": 0, "set_presence": "offline" });
    let next = bob.ok_post(path, body).await;
    assert_eq!(bodies(&next, &room), ["hello"]);
    // A position is a place for `/messages`, too.
    let pos = encoded(first["pos"].as_str().unwrap());
    let page = bob.ok_get(&format!("/rooms/{room}/messages?dir=f&from={pos}")).await;
    assert_eq!(page["chunk"][0]["content"]["body"], "hello");
    let (_, versions) = server.anonymous().get("/_matrix/client/versions").await;
    assert_eq!(versions["unstable_features"]["org.matrix.simplified_msc3575"], true);
}

#[tokio::test(start_paused = true)]
async fn state_that_a_resolution_takes_away_is_told_to_be_gone() {
    let server = TestServer::new();
    let (alice, carol) = (server.register("alice").await, server.register("carol").await);
    let levels = json!({ "users": { &alice.user_id: 100, "@bob:b.example": 100 } });
    let more = json!({ "room_version": "11", "power_level_content_override": levels });
    let (room, bob) = shared_room(&alice, more).await;
    let before = bob.heads();
    must(&carol, &room, "join", json!({})).await;
    let slide = |client: &TestClient| {
        let mut slide = Slide::list(client, 0, 9);
        slide.body["lists"]["all"]["required_state"] = json!([["*", "*"]]);
        slide
    };
    let (mut hers, mut theirs) = (slide(&carol), slide(&alice));
    assert_eq!(hers.next().await["rooms"][&room]["membership"], "join");
    theirs.next().await;
    // Bob closed the door before she came, on the other side of a partition.
    bob.app.env.sleep(Duration::from_secs(5)).await;
    let close = bob.event("m.room.join_rules", Some(""), json!({ "join_rule": "invite" }), &before);
    assert!(matches!(bob.send(close).await, Outcome::Accepted(_)));
    let member = ("m.room.member".to_owned(), carol.user_id.clone());
    let told = theirs.next().await;
    assert_eq!(state(&told, &room).get(&member), Some(&Value::Null), "{told:#}");
    assert_eq!(state(&told, &room)[&("m.room.join_rules".to_owned(), String::new())]["join_rule"], "invite");
    assert_eq!(told["rooms"][&room]["joined_count"], 2);
    let told = hers.next().await;
    assert_eq!(told["rooms"][&room]["membership"], "leave");
    assert_eq!(state(&told, &room).get(&member), Some(&Value::Null), "{told:#}");
    say(&alice, &room, "unseen").await;
    assert_eq!(hers.next().await["rooms"], json!({}));
}
