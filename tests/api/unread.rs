//! Unread counts: which events count for whom, and when clients are told.

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    receipts::room_of,
    support::{NOWHERE, TestClient, TestServer, encoded},
    sync::{Chain, act, create_room, must, say, send},
};

const RULES: &str = "/_matrix/client/v3/pushrules/global";

async fn put(client: &TestClient, path: &str, body: Value) {
    let (status, json) = client.put(path, body).await;
    assert_eq!(status, StatusCode::OK, "{path}: {json}");
}

async fn read(client: &TestClient, room: &str, event: &str, body: Value) {
    must(client, room, &format!("receipt/m.read/{}", encoded(event)), body).await;
}

async fn mute(client: &TestClient, room: &str) {
    let is_room = json!({ "kind": "event_match", "key": "room_id", "pattern": room });
    let path = format!("{RULES}/override/{}", encoded(room));
    put(client, &path, json!({ "actions": [], "conditions": [is_room] })).await;
}

async fn unmute(client: &TestClient, room: &str) {
    let (status, _) = client.delete(&format!("{RULES}/override/{}", encoded(room)), json!({})).await;
    assert_eq!(status, StatusCode::OK);
}

fn mention(of: &TestClient) -> Value {
    json!({ "msgtype": "m.text", "body": "hey", "m.mentions": { "user_ids": [of.user_id] } })
}

fn counts(sync: &Value, room: &str) -> Option<(u64, u64)> {
    let counts = &sync["rooms"]["join"][room]["unread_notifications"];
    Some((counts["notification_count"].as_u64()?, counts["highlight_count"].as_u64()?))
}

/// The counts (notifications, highlights) as a client that begins sees them.
async fn unread(client: &TestClient, room: &str) -> (u64, u64) {
    let sync = Chain::of(client).next().await;
    counts(&sync, room).unwrap_or_else(|| panic!("no counts in {sync}"))
}

#[tokio::test(start_paused = true)]
async fn sending_marks_what_came_before_as_read() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let (alice, bob) = (&people[0], &people[1]);
    send(alice, &room, "mention", mention(bob)).await;
    let root = say(alice, &room, "one").await;
    let relation = json!({ "rel_type": "m.thread", "event_id": root });
    let in_thread = json!({ "msgtype": "m.text", "body": "in", "m.relates_to": relation });
    send(alice, &room, "thread", in_thread.clone()).await;
    assert_eq!(unread(bob, &room).await, (3, 1));
    say(bob, &room, "an answer").await;
    assert_eq!(unread(bob, &room).await, (1, 0), "the thread is not read by what is said outside of it");
    send(bob, &room, "answer in thread", in_thread).await;
    assert_eq!(unread(bob, &room).await, (0, 0));
    say(alice, &room, "two").await;
    assert_eq!(unread(bob, &room).await, (1, 0));
    // A new name goes to all rooms and does not show that somebody looked at one.
    let path = format!("/_matrix/client/v3/profile/{}/displayname", bob.user_id);
    put(bob, &path, json!({ "displayname": "Bob" })).await;
    assert_eq!(unread(bob, &room).await, (1, 0));
}

#[tokio::test(start_paused = true)]
async fn ones_own_messages_never_count_whatever_was_muted_when() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let (alice, bob) = (&people[0], &people[1]);
    mute(bob, &room).await;
    for number in 0..3 {
        say(bob, &room, &format!("muted {number}")).await;
    }
    unmute(bob, &room).await;
    assert_eq!(unread(bob, &room).await, (0, 0));
    say(bob, &room, "unmuted").await;
    say(alice, &room, "hello").await;
    mute(bob, &room).await;
    assert_eq!(unread(bob, &room).await, (0, 0));
    let word = json!({ "pattern": "muted", "actions": ["notify"] });
    put(bob, &format!("{RULES}/content/word"), word).await;
    unmute(bob, &room).await;
    assert_eq!(unread(bob, &room).await, (1, 0));
}

#[tokio::test(start_paused = true)]
async fn senders_who_are_ignored_count_nowhere() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob", "carol"]).await;
    let (alice, bob, carol) = (&people[0], &people[1], &people[2]);
    send(alice, &room, "mention", mention(bob)).await;
    say(carol, &room, "hello").await;
    assert_eq!(unread(bob, &room).await, (2, 1));
    let mut chain = Chain::of(bob);
    chain.next().await;
    let path = format!("/_matrix/client/v3/user/{}/account_data/m.ignored_user_list", bob.user_id);
    put(bob, &path, json!({ "ignored_users": { &alice.user_id: {} } })).await;
    assert_eq!(counts(&chain.next().await, &room), Some((1, 0)), "told at once");
    send(alice, &room, "again", mention(bob)).await;
    assert_eq!(unread(bob, &room).await, (1, 0));
    put(bob, &path, json!({ "ignored_users": {} })).await;
    assert_eq!(unread(bob, &room).await, (3, 2));
}

#[tokio::test(start_paused = true)]
async fn what_changes_counts_without_an_event_is_told_in_the_next_sync() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let (alice, bob) = (&people[0], &people[1]);
    let event = say(alice, &room, "there is cake").await;
    let mut chain = Chain::of(bob);
    let mut blind = Chain::filtered(
        bob,
        json!({ "room": { "ephemeral": { "types": [] }, "timeline": { "types": [] } } }),
    );
    chain.next().await;
    blind.next().await;
    mute(bob, &room).await;
    assert_eq!(counts(&chain.next().await, &room), Some((0, 0)), "a muted room shows its count at once");
    unmute(bob, &room).await;
    assert_eq!(counts(&chain.next().await, &room), Some((1, 0)));
    let word = json!({ "pattern": "cake", "actions": ["notify", { "set_tweak": "highlight" }] });
    put(bob, &format!("{RULES}/content/word"), word).await;
    assert_eq!(counts(&chain.next().await, &room), Some((1, 1)));
    assert_eq!(counts(&blind.next().await, &room), Some((1, 1)));
    must(bob, &room, &format!("receipt/m.read.private/{}", encoded(&event)), json!({})).await;
    assert_eq!(counts(&chain.next().await, &room), Some((0, 0)));
    assert_eq!(counts(&blind.next().await, &room), Some((0, 0)), "though the filter hides receipts");
    say(alice, &room, "more cake").await;
    assert_eq!(counts(&blind.next().await, &room), Some((1, 1)), "though the filter hides messages");
    assert_eq!(counts(&blind.next().await, &room), None, "nothing is new");
}

#[tokio::test(start_paused = true)]
async fn a_receipt_that_was_answered_is_in_the_next_sync() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let (alice, bob) = (&people[0], &people[1]);
    let mut chain = Chain::of(bob);
    for number in 0..4 {
        let event = say(alice, &room, &format!("m{number}")).await;
        chain.next().await;
        read(bob, &room, &event, json!({})).await;
        let sync = chain.next().await;
        assert_eq!(counts(&sync, &room), Some((0, 0)), "{sync}");
        assert!(sync["rooms"]["join"][&room]["ephemeral"].to_string().contains(&event), "{sync}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_counts_in_a_thread_is_read_in_that_thread() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let (alice, bob) = (&people[0], &people[1]);
    let root = say(alice, &room, "root").await;
    read(bob, &room, &root, json!({})).await;
    let thread = json!({ "rel_type": "m.thread", "event_id": root });
    let inside =
        send(alice, &room, "in", json!({ "msgtype": "m.text", "body": "in", "m.relates_to": thread })).await;
    // A relation that the rules say nothing of notifies, and stands where its parent stands.
    let relation = json!({ "rel_type": "org.example.about", "event_id": inside });
    let about =
        send(alice, &room, "about", json!({ "msgtype": "m.text", "body": "x", "m.relates_to": relation }))
            .await;
    let edit = json!({ "rel_type": "m.replace", "event_id": inside });
    let new = json!({ "msgtype": "m.text", "body": "new" });
    let edit = json!({ "msgtype": "m.text", "body": "* new", "m.new_content": new, "m.relates_to": edit });
    let edit = send(alice, &room, "edit", edit).await;
    let filter = json!({ "room": { "timeline": { "unread_thread_notifications": true } } });
    let by_thread = || async {
        let sync = Chain::filtered(bob, filter.clone()).next().await;
        let threads = &sync["rooms"]["join"][&room]["unread_thread_notifications"];
        (counts(&sync, &room), threads[&root]["notification_count"].as_u64())
    };
    assert_eq!(by_thread().await, (Some((0, 0)), Some(2)));
    // The thread of an event is known when its parent, or it itself, is redacted.
    let path = format!("/_matrix/client/v3/rooms/{room}/redact/{}/1", encoded(&inside));
    put(alice, &path, json!({})).await;
    assert_eq!(by_thread().await, (Some((0, 0)), Some(1)));
    let path = format!("receipt/m.read/{}", encoded(&inside));
    assert_eq!(act(bob, &room, &path, json!({ "thread_id": root })).await.0, StatusCode::OK);
    let path = format!("receipt/m.read/{}", encoded(&edit));
    assert_eq!(act(bob, &room, &path, json!({ "thread_id": "main" })).await.0, StatusCode::BAD_REQUEST);
    assert_eq!(act(bob, &room, &path, json!({ "thread_id": root })).await.0, StatusCode::OK);
    assert_eq!(by_thread().await, (Some((0, 0)), None));
    let path = format!("/_matrix/client/v3/rooms/{room}/redact/{}/2", encoded(&about));
    put(alice, &path, json!({})).await;
    assert_eq!(by_thread().await, (Some((0, 0)), None));
}

#[tokio::test(start_paused = true)]
async fn rules_of_ones_own_are_judged_by_ones_own_sync() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let (alice, bob) = (&people[0], &people[1]);
    let from_alice = json!({ "actions": [] });
    put(bob, &format!("{RULES}/sender/{}", encoded(&alice.user_id)), from_alice).await;
    say(alice, &room, "hush").await;
    assert_eq!(unread(bob, &room).await, (0, 0));
    // A rule that is younger than a message counts for it too.
    let word = json!({ "pattern": "hu*", "actions": ["notify", { "set_tweak": "highlight" }] });
    put(bob, &format!("{RULES}/content/word"), word).await;
    assert_eq!(unread(bob, &room).await, (1, 1));
    send(alice, &room, "mention", mention(bob)).await;
    assert_eq!(unread(bob, &room).await, (2, 2));
}

/// All that bob's counts say of a thread which begins at an event that was sent before he came, or at none.
async fn counts_of_a_thread(is_there: bool) -> Vec<Value> {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let content = json!({ "history_visibility": "joined" });
    let state = json!([{ "type": "m.room.history_visibility", "content": content }]);
    let room = create_room(&alice, json!({ "preset": "public_chat", "initial_state": state })).await;
    let hidden = say(&alice, &room, "hidden").await;
    must(&bob, &room, "join", json!({})).await;
    let root = if is_there { hidden.as_str() } else { NOWHERE };
    let relation = json!({ "rel_type": "m.thread", "event_id": root });
    let in_thread = json!({ "msgtype": "m.text", "body": "in", "m.relates_to": relation });
    let mut mentioned = in_thread.clone();
    mentioned["m.mentions"] = json!({ "user_ids": [bob.user_id] });
    let filter = json!({ "room": { "timeline": { "unread_thread_notifications": true } } });
    let mut seen = Vec::new();
    for (own_rules, number) in [(false, 0), (true, 1)] {
        if own_rules {
            let pattern = json!({ "actions": ["notify"], "pattern": "in" });
            put(&bob, &format!("{RULES}/content/mine"), pattern).await;
        }
        for (at, content) in [&in_thread, &mentioned, &in_thread].into_iter().enumerate() {
            let sent = send(&alice, &room, &format!("t{number}-{at}"), content.clone()).await;
            let told = Chain::filtered(&bob, filter.clone()).next().await;
            seen.push(told["rooms"]["join"][&room].clone());
            if at == 1 {
                for body in [json!({ "thread_id": "main" }), json!({ "thread_id": root }), json!({})] {
                    let path = format!("receipt/m.read/{}", encoded(&sent));
                    let (status, refusal) = act(&bob, &room, &path, body).await;
                    seen.push(json!({ "unread_notifications": [status.as_u16(), refusal] }));
                    let told = Chain::filtered(&bob, filter.clone()).next().await;
                    seen.push(told["rooms"]["join"][&room].clone());
                }
            }
        }
        say(&alice, &room, "outside").await;
        send(&bob, &room, &format!("own-{number}"), in_thread.clone()).await;
        seen.push(Chain::filtered(&bob, filter.clone()).next().await["rooms"]["join"][&room].clone());
    }
    let counts = ["unread_notifications", "unread_thread_notifications"];
    seen.iter().map(|room| counts.iter().map(|part| room[*part].clone()).collect()).collect()
}

#[tokio::test(start_paused = true)]
async fn counts_do_not_say_whether_the_root_of_a_thread_is_there() {
    let hidden = counts_of_a_thread(true).await;
    assert_eq!(hidden[1][0], json!({ "notification_count": 2, "highlight_count": 1 }), "{hidden:?}");
    assert_eq!(hidden, counts_of_a_thread(false).await);
}
