//! Receipts, read markers and the unread counts that follow from them.

use std::time::Duration;

use aqueduct::{
    env::payer::{Payer, Payers},
    ids::UserNum,
    schema,
    schema::{
        push::{Outcome, Sound},
        rooms::Membership,
    },
    store::{Direction, Family, Guard, Read},
};
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    support::{TestClient, TestServer, encoded, room_num, user_num},
    sync::{Chain, act, create_room, env, events, must, say, send, set_state},
};

/// A public room of people with these names; the first of them has made it.
pub(crate) async fn room_of(server: &TestServer, names: &[&str]) -> (Vec<TestClient>, String) {
    let mut people = Vec::new();
    for name in names {
        people.push(server.register(name).await);
    }
    let room = create_room(&people[0], json!({ "preset": "public_chat" })).await;
    for client in &people[1..] {
        must(client, &room, "join", json!({})).await;
    }
    (people, room)
}

async fn read(client: &TestClient, room: &str, kind: &str, event: &str, body: Value) -> (StatusCode, Value) {
    let answer = act(client, room, &format!("receipt/{kind}/{}", encoded(event)), body).await;
    // Receipts are gathered for a moment.
    env(&client.server).sleep(Duration::from_millis(500)).await;
    answer
}

async fn must_read(client: &TestClient, room: &str, kind: &str, event: &str, body: Value) {
    let (status, json) = read(client, room, kind, event, body).await;
    assert_eq!(status, StatusCode::OK, "{json}");
}

/// The counts (notifications, highlights) as a client that begins sees them.
async fn unread(client: &TestClient, room: &str) -> (u64, u64) {
    counts(&Chain::of(client).next().await["rooms"]["join"][room]["unread_notifications"])
}

async fn unread_by_thread(client: &TestClient, room: &str) -> ((u64, u64), Value) {
    let filter = json!({ "room": { "timeline": { "unread_thread_notifications": true } } });
    let sync = Chain::filtered(client, filter).next().await;
    let joined = &sync["rooms"]["join"][room];
    (counts(&joined["unread_notifications"]), joined["unread_thread_notifications"].clone())
}

fn counts(json: &Value) -> (u64, u64) {
    let number = |name: &str| json[name].as_u64().unwrap_or_else(|| panic!("no {name} in {json}"));
    (number("notification_count"), number("highlight_count"))
}

fn receipt_contents(sync: &Value, room: &str) -> Vec<Value> {
    let ephemeral = events(sync, "join", room, "ephemeral");
    ephemeral
        .iter()
        .filter(|event| event["type"] == "m.receipt")
        .map(|event| event["content"].clone())
        .collect()
}

#[tokio::test(start_paused = true)]
async fn public_receipts_are_told_to_all_and_private_ones_to_oneself() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let event = say(&people[0], &room, "hello").await;
    let (mut alice, mut bob) = (Chain::of(&people[0]), Chain::of(&people[1]));
    alice.next().await;
    bob.next().await;
    must_read(&people[1], &room, "m.read.private", &event, json!({})).await;
    assert!(alice.next().await.get("rooms").is_none());
    let own = bob.next().await;
    assert!(receipt_contents(&own, &room)[0][&event]["m.read.private"][&people[1].user_id]["ts"].is_u64());
    must_read(&people[1], &room, "m.read", &event, json!({})).await;
    let told = alice.next().await;
    assert!(receipt_contents(&told, &room)[0][&event]["m.read"][&people[1].user_id]["ts"].is_u64());
    assert!(alice.next().await.get("rooms").is_none());
    // A client that begins is told, too.
    let anew = Chain::of(&people[0]).next().await;
    assert_eq!(receipt_contents(&anew, &room).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn many_receipts_at_once_become_one_and_wake_the_room() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let mut ids = Vec::new();
    for number in 0..5 {
        ids.push(say(&people[0], &room, &format!("m{number}")).await);
    }
    let mut alice = Chain::of(&people[0]);
    alice.next().await;
    let (told, ()) = tokio::join!(alice.next_within(10_000), async {
        for id in &ids {
            must(&people[1], &room, &format!("receipt/m.read/{}", encoded(id)), json!({})).await;
        }
    });
    env(&server).sleep(Duration::from_millis(500)).await;
    let later = alice.next().await;
    let all: Vec<Value> = [receipt_contents(&told, &room), receipt_contents(&later, &room)].concat();
    assert!(all.last().unwrap().get(&ids[4]).is_some(), "{all:?}");
    assert!(all.len() <= 2, "{all:?}");
}

#[tokio::test(start_paused = true)]
async fn what_is_no_receipt_is_refused() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let stranger = server.register("stranger").await;
    let event = say(&people[0], &room, "hello").await;
    for (client, room, kind, event, body, status, code) in [
        (&stranger, room.as_str(), "m.read", event.as_str(), json!({}), 403, "M_FORBIDDEN"),
        (&people[1], "!nowhere:test.example", "m.read", event.as_str(), json!({}), 403, "M_FORBIDDEN"),
        (&people[1], room.as_str(), "m.read", "$nothing", json!({}), 404, "M_NOT_FOUND"),
        (&people[1], room.as_str(), "m.seen", event.as_str(), json!({}), 400, "M_INVALID_PARAM"),
        (
            &people[1],
            room.as_str(),
            "m.read",
            event.as_str(),
            json!({ "thread_id": "" }),
            400,
            "M_INVALID_PARAM",
        ),
        (
            &people[1],
            room.as_str(),
            "m.read",
            event.as_str(),
            json!({ "thread_id": "x" }),
            400,
            "M_INVALID_PARAM",
        ),
        (&people[1], room.as_str(), "m.read", event.as_str(), json!({ "thread_id": 3 }), 400, "M_BAD_JSON"),
        (
            &people[1],
            room.as_str(),
            "m.fully_read",
            event.as_str(),
            json!({ "thread_id": "main" }),
            400,
            "M_INVALID_PARAM",
        ),
    ] {
        let (got, json) = read(client, room, kind, event, body.clone()).await;
        assert_eq!(
            (got.as_u16(), json["errcode"].as_str()),
            (status, Some(code)),
            "{room} {kind} {body}: {json}"
        );
    }
    let (status, json) = act(&stranger, &room, "read_markers", json!({ "m.read": event })).await;
    assert_eq!((status, &json["errcode"]), (StatusCode::FORBIDDEN, &json!("M_FORBIDDEN")));
}

#[tokio::test(start_paused = true)]
async fn messages_count_until_they_are_read() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob", "carol"]).await;
    let (alice, bob) = (&people[0], &people[1]);
    assert_eq!(unread(bob, &room).await, (0, 0));
    let first = say(alice, &room, "one").await;
    say(alice, &room, "two").await;
    say(&people[2], &room, "three").await;
    assert_eq!(unread(bob, &room).await, (3, 0));
    assert_eq!(unread(alice, &room).await, (1, 0));
    assert_eq!(unread(&people[2], &room).await, (0, 0));
    must_read(bob, &room, "m.read", &first, json!({})).await;
    assert_eq!(unread(bob, &room).await, (2, 0));
    let mention = json!({ "msgtype": "m.text", "body": "hey", "m.mentions": { "user_ids": [bob.user_id] } });
    let third = send(alice, &room, "mention", mention).await;
    assert_eq!(unread(bob, &room).await, (3, 1));
    assert_eq!(unread(&people[2], &room).await, (1, 0));
    // Notices and changes of state do not notify.
    send(alice, &room, "notice", json!({ "msgtype": "m.notice", "body": "n" })).await;
    set_state(alice, &room, "m.room.topic", "", json!({ "topic": "t" })).await;
    assert_eq!(unread(bob, &room).await, (3, 1));
    must_read(bob, &room, "m.read.private", &third, json!({})).await;
    assert_eq!(unread(bob, &room).await, (0, 0));
    // A receipt for an older event does not make the later ones unread again.
    must_read(bob, &room, "m.read", &first, json!({})).await;
    assert_eq!(unread(bob, &room).await, (0, 0));
}

#[tokio::test(start_paused = true)]
async fn whoever_may_notifies_the_whole_room() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob", "carol"]).await;
    let all = json!({ "msgtype": "m.text", "body": "all", "m.mentions": { "room": true } });
    send(&people[0], &room, "all", all.clone()).await;
    assert_eq!(unread(&people[1], &room).await, (1, 1));
    // Bob does not have the power to notify the whole room, so Carol counts his message as one like any other.
    send(&people[1], &room, "all", all).await;
    assert_eq!(unread(&people[2], &room).await, (2, 1));
}

#[tokio::test(start_paused = true)]
async fn own_rules_count_differently() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob", "carol", "dora"]).await;
    let [alice, bob, carol, dora] = people.as_slice() else { panic!() };
    let rules = "/_matrix/client/v3/pushrules/global";
    let keyword = json!({ "pattern": "cake", "actions": ["notify", { "set_tweak": "highlight" }] });
    assert_eq!(bob.put(&format!("{rules}/content/cake"), keyword).await.0, StatusCode::OK);
    let quiet = json!({ "actions": [] });
    assert_eq!(carol.put(&format!("{rules}/room/{}", encoded(&room)), quiet.clone()).await.0, StatusCode::OK);
    let mute = json!({ "actions": [], "conditions": [{ "kind": "event_match", "key": "room_id", "pattern": room }] });
    assert_eq!(dora.put(&format!("{rules}/override/{}", encoded(&room)), mute).await.0, StatusCode::OK);
    say(alice, &room, "there is cake").await;
    say(alice, &room, "and tea").await;
    assert_eq!(unread(bob, &room).await, (2, 1));
    assert_eq!(unread(carol, &room).await, (0, 0));
    let mention = json!({ "msgtype": "m.text", "body": "x", "m.mentions": { "user_ids": [carol.user_id, dora.user_id] } });
    send(alice, &room, "mention", mention).await;
    assert_eq!(unread(carol, &room).await, (1, 1));
    assert_eq!(unread(dora, &room).await, (0, 0));
}

#[tokio::test(start_paused = true)]
async fn threads_are_read_on_their_own() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let (alice, bob) = (&people[0], &people[1]);
    let root = say(alice, &room, "root").await;
    let relation = json!({ "rel_type": "m.thread", "event_id": root });
    let mut last = String::new();
    for number in 0..3 {
        let content = json!({ "msgtype": "m.text", "body": "in", "m.relates_to": relation });
        last = send(alice, &room, &format!("t{number}"), content).await;
    }
    let like = json!({ "rel_type": "m.annotation", "event_id": last, "key": "x" });
    let like = send(alice, &room, "like", json!({ "body": "", "m.relates_to": like })).await;
    let main = say(alice, &room, "main").await;
    assert_eq!(unread(bob, &room).await, (6, 0));
    let (outside, threads) = unread_by_thread(bob, &room).await;
    assert_eq!((outside, counts(&threads[&root])), ((2, 0), (4, 0)));
    for (event, thread, fits) in [
        (&last, "main", false),
        (&like, "main", false),
        (&main, root.as_str(), false),
        (&last, main.as_str(), false),
        (&like, root.as_str(), true),
        (&root, root.as_str(), true),
        (&root, "main", true),
    ] {
        let body = json!({ "thread_id": thread });
        let (status, json) = read(alice, &room, "m.read", event, body).await;
        let wanted = if fits { (200, Value::Null) } else { (400, json!("M_INVALID_PARAM")) };
        assert_eq!((status.as_u16(), json["errcode"].clone()), wanted, "{event} in {thread}");
    }
    must_read(bob, &room, "m.read", &like, json!({ "thread_id": root })).await;
    assert_eq!(unread_by_thread(bob, &room).await, ((2, 0), Value::Null));
    must_read(bob, &room, "m.read", &main, json!({ "thread_id": "main" })).await;
    assert_eq!(unread(bob, &room).await, (0, 0));
    let content = json!({ "msgtype": "m.text", "body": "more", "m.relates_to": relation });
    let more = send(alice, &room, "more", content).await;
    let (outside, threads) = unread_by_thread(bob, &room).await;
    assert_eq!((outside, counts(&threads[&root])), ((0, 0), (1, 0)));
    must_read(bob, &room, "m.read", &more, json!({})).await;
    assert_eq!(unread_by_thread(bob, &room).await, ((0, 0), Value::Null));
}

#[tokio::test(start_paused = true)]
async fn what_was_redacted_counts_no_longer() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let mention =
        json!({ "msgtype": "m.text", "body": "hey", "m.mentions": { "user_ids": [people[1].user_id] } });
    let event = send(&people[0], &room, "mention", mention).await;
    say(&people[0], &room, "stays").await;
    assert_eq!(unread(&people[1], &room).await, (2, 1));
    let path = format!("/_matrix/client/v3/rooms/{room}/redact/{}/1", encoded(&event));
    assert_eq!(people[0].put(&path, json!({})).await.0, StatusCode::OK);
    assert_eq!(unread(&people[1], &room).await, (1, 0));
}

#[tokio::test(start_paused = true)]
async fn who_comes_later_has_nothing_unread() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice"]).await;
    for number in 0..3 {
        say(&people[0], &room, &format!("m{number}")).await;
    }
    let late = server.register("late").await;
    must(&late, &room, "join", json!({})).await;
    assert_eq!(unread(&late, &room).await, (0, 0));
    say(&people[0], &room, "welcome").await;
    assert_eq!(unread(&late, &room).await, (1, 0));
}

#[tokio::test(start_paused = true)]
async fn read_markers_set_all_three_at_once() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let (alice, bob) = (&people[0], &people[1]);
    let first = say(alice, &room, "one").await;
    let second = say(alice, &room, "two").await;
    let mut chain = Chain::of(bob);
    chain.next().await;
    let body = json!({ "m.fully_read": first, "m.read": first, "m.read.private": second });
    must(bob, &room, "read_markers", body).await;
    env(&server).sleep(Duration::from_millis(500)).await;
    let sync = chain.next().await;
    let marker = json!({ "type": "m.fully_read", "content": { "event_id": first } });
    assert_eq!(events(&sync, "join", &room, "account_data"), [&marker]);
    let receipts = &receipt_contents(&sync, &room)[0];
    assert!(receipts[&first]["m.read"].get(&bob.user_id).is_some(), "{receipts}");
    assert!(receipts[&second]["m.read.private"].get(&bob.user_id).is_some(), "{receipts}");
    assert_eq!(unread(bob, &room).await, (0, 0));
    let (status, json) = act(bob, &room, "read_markers", json!({ "m.fully_read": "$nothing" })).await;
    assert_eq!((status, &json["errcode"]), (StatusCode::NOT_FOUND, &json!("M_NOT_FOUND")));
}

/// The bytes of every row of the store, to compare before and after.
fn all_rows(server: &TestServer) -> std::collections::BTreeMap<(u8, Vec<u8>), Vec<u8>> {
    let snapshot = server.server().app().store.snapshot();
    let mut all = std::collections::BTreeMap::new();
    for family in Family::ALL {
        for row in snapshot.range_raw(family, vec![0], vec![0xff; 64], Direction::Up).unwrap() {
            let (key, value) = row.unwrap();
            all.insert((family as u8, key.to_vec()), value.to_vec());
        }
    }
    all
}

#[tokio::test(start_paused = true)]
async fn a_message_to_ten_thousand_members_writes_less_than_two_kilobytes() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let store = &server.server().app().store;
    let num = room_num(store, &room);
    // Members as the room's own tables know them; registering them all takes minutes.
    for chunk in 0..5 {
        let mut batch = store.batch(&Guard::alone());
        for user in 0..2_000 {
            schema::ROOM_USER.put(
                &mut batch,
                (num, UserNum(1_000 + chunk * 2_000 + user)),
                &Membership::Join.into(),
            );
        }
        store.enqueue(batch).unwrap().flushed.await.unwrap();
    }
    // The first message finds out whose rules differ; it is the later ones that count.
    say(&people[0], &room, "first").await;
    let before = all_rows(&server);
    let text = "a message of usual length, about as long as this sentence is, and not much longer";
    let mention =
        json!({ "msgtype": "m.text", "body": text, "m.mentions": { "user_ids": [people[1].user_id] } });
    send(&people[0], &room, "measured", mention).await;
    let after = all_rows(&server);
    let written: usize = after
        .iter()
        .filter(|(key, value)| before.get(*key) != Some(value))
        .map(|((_, key), value)| key.len() + value.len())
        .sum();
    assert!(written < 2_048, "{written} bytes");
    assert!(written > 500, "{written} bytes: the message itself is missing");
    assert_eq!(unread(&people[1], &room).await, (2, 1));
}

#[tokio::test(start_paused = true)]
async fn what_a_user_sends_leaves_one_row_a_lane() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let (alice, bob) = (&people[0], &people[1]);
    for number in 0..4 {
        say(bob, &room, &format!("own{number}")).await;
    }
    let mention = json!({ "msgtype": "m.text", "body": "hey", "m.mentions": { "user_ids": [bob.user_id] } });
    send(alice, &room, "mention", mention).await;
    let store = &server.server().app().store;
    let (snapshot, user) = (store.snapshot(), user_num(store, &bob.user_id));
    let own = schema::UNREAD_OWN.prefix::<()>(&*snapshot, (), Direction::Up).unwrap().map(Result::unwrap);
    let own: Vec<_> = own.filter(|((_, of, _), _)| *of == user).map(|(_, row)| row.own.highlight).collect();
    assert_eq!(own, [true]);
    let sent = schema::UNREAD_SENT.prefix::<()>(&*snapshot, (), Direction::Up).unwrap().map(Result::unwrap);
    assert_eq!(sent.filter(|((_, of, _), _)| *of == user).count(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_invitation_notifies_the_invited_with_a_sound() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice"]).await;
    let bob = server.register("bob").await;
    must(&people[0], &room, "invite", json!({ "user_id": bob.user_id })).await;
    let own = || {
        let snapshot = server.server().app().store.snapshot();
        let own = schema::UNREAD_OWN.prefix::<()>(&*snapshot, (), Direction::Up).unwrap();
        own.map(|row| row.unwrap().1.own).collect::<Vec<_>>()
    };
    let invited = Outcome { notify: true, highlight: false, sound: Sound::Default };
    assert_eq!(own(), [invited]);
    // An invitation that the user ignores notifies them of nothing.
    let config = format!("/user/{}/account_data/org.matrix.msc4155.invite_permission_config", bob.user_id);
    bob.ok_put(&config, json!({ "ignored_users": [people[0].user_id] })).await;
    let quiet = create_room(&people[0], json!({})).await;
    must(&people[0], &quiet, "invite", json!({ "user_id": bob.user_id })).await;
    assert_eq!(own(), [invited]);
    must(&bob, &room, "join", json!({})).await;
    assert_eq!(unread(&bob, &room).await, (0, 0), "an invitation that was taken is no longer unread");
}

#[tokio::test(start_paused = true)]
async fn a_private_receipt_wakes_nobody_else() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let events = [say(&people[0], &room, "one").await, say(&people[0], &room, "two").await];
    let app = server.server().app();
    let mut woken = Vec::new();
    for (kind, event) in [("m.read.private", &events[0]), ("m.read", &events[1])] {
        let mut polls = [&people[0], &people[1]]
            .map(|client| app.notifier.subscribe(user_num(&app.store, &client.user_id)));
        must(&people[1], &room, &format!("receipt/{kind}/{}", encoded(event)), json!({})).await;
        for poll in &mut polls {
            woken.push(tokio::time::timeout(Duration::from_secs(5), poll.woken()).await.is_ok());
        }
    }
    assert_eq!(
        woken,
        [false, true, true, true],
        "alice and bob, by a private receipt and by a public one of bob"
    );
}

#[tokio::test(start_paused = true)]
async fn a_room_whose_turn_takes_long_holds_up_no_receipt_of_another() {
    let server = TestServer::new();
    let (people, held) = room_of(&server, &["alice", "bob"]).await;
    let (alice, bob) = (&people[0], &people[1]);
    let free = create_room(alice, json!({ "preset": "public_chat" })).await;
    must(bob, &free, "join", json!({})).await;
    let (in_held, in_free) = (say(alice, &held, "held").await, say(alice, &free, "free").await);
    let app = server.server().app();
    let num = room_num(&app.store, &held);
    // As many threads are asked for as may be, and this test works the turns of the room off, so that everybody waits for it.
    let turns = app.rooms.turns(num);
    for number in 0..8 {
        let payers = Payers::one(Payer::User(UserNum(1_000 + number)));
        assert_eq!(payers.during(async { turns.add(Box::new(|_seat| ())) }).await.unwrap(), Some(payers));
    }

    // Her request is answered once the receipt is durable, so that it waits as well.
    let (reader, in_room, path) =
        (alice.clone(), held.clone(), format!("receipt/m.read/{}", encoded(&in_held)));
    env(&server).spawn(async move { must(&reader, &in_room, &path, json!({})).await });
    env(&server).sleep(Duration::from_secs(1)).await;
    let began = env(&server).now_ms();
    must(bob, &free, &format!("receipt/m.read/{}", encoded(&in_free)), json!({})).await;
    let mut chain = Chain::of(bob);
    let sync = chain.next().await;
    assert_eq!(receipt_contents(&sync, &free)[0][&in_free]["m.read"][&bob.user_id]["ts"], began, "{sync}");
    assert_eq!(env(&server).now_ms(), began, "nothing was waited for");

    // Her own receipt is in a sync once the room goes on, and until then the sync does without.
    let mut chain = Chain::of(alice);
    let sync = chain.next().await;
    assert_eq!(receipt_contents(&sync, &held), Vec::<Value>::new());
    assert!(turns.work_off(Payers::SERVER, || false).is_empty());
    let sync = chain.next().await;
    assert!(receipt_contents(&sync, &held)[0][&in_held]["m.read"][&alice.user_id].is_object(), "{sync}");
}
