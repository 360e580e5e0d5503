//! `src/api/client/thread_subscriptions.rs`, `src/flows/account/subscriptions.rs`: subscriptions to threads (MSC4306, MSC4308).

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    receipts::room_of,
    rooms::Rooms,
    sliding_sync::Slide,
    support::{NOWHERE, TestClient, TestServer, encoded},
    sync::{Chain, must, room_of_two, say, send},
};

pub(crate) const CHANGES: &str = "/_matrix/client/unstable/io.element.msc4308/thread_subscriptions";

pub(crate) fn path(room: &str, root: &str) -> String {
    let (room, root) = (encoded(room), encoded(root));
    format!("/_matrix/client/unstable/io.element.msc4306/rooms/{room}/thread/{root}/subscription")
}

/// Says something in a thread.
pub(crate) async fn reply(client: &TestClient, room: &str, root: &str, text: &str) -> String {
    let relation = json!({ "rel_type": "m.thread", "event_id": root });
    send(client, room, text, json!({ "msgtype": "m.text", "body": text, "m.relates_to": relation })).await
}

pub(crate) async fn subscribe(client: &TestClient, thread: &str) {
    client.ok_put(thread, json!({})).await;
}

async fn by_itself(client: &TestClient, thread: &str, cause: &str) -> (StatusCode, Value) {
    client.put(thread, json!({ "automatic": cause })).await
}

fn refused(answer: &(StatusCode, Value), status: u16, code: &str) {
    assert_eq!((answer.0.as_u16(), answer.1["errcode"].as_str()), (status, Some(code)), "{}", answer.1);
}

#[tokio::test(start_paused = true)]
async fn a_user_subscribes_and_unsubscribes_and_a_client_does_for_an_event_of_the_thread() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let root = say(&alice, &room, "what do you think?").await;
    let other_root = say(&alice, &room, "another").await;
    let (thread, other) = (path(&room, &root), path(&room, &other_root));
    let first = reply(&bob, &room, &root, "first").await;
    let elsewhere = reply(&bob, &room, &other_root, "elsewhere").await;
    refused(&alice.get(&thread).await, 404, "M_NOT_FOUND");
    assert_eq!(alice.delete(&thread, json!({})).await, (StatusCode::OK, json!({})), "there is none to leave");
    for wrong in [&root, &elsewhere, &other_root, NOWHERE] {
        refused(&by_itself(&alice, &thread, wrong).await, 400, "IO.ELEMENT.MSC4306.M_NOT_IN_THREAD");
    }
    assert_eq!(by_itself(&alice, &thread, &first).await, (StatusCode::OK, json!({})));
    assert_eq!(alice.get(&thread).await, (StatusCode::OK, json!({ "automatic": true })));
    subscribe(&alice, &thread).await;
    assert_eq!(alice.get(&thread).await.1, json!({ "automatic": false }));
    assert_eq!(by_itself(&alice, &thread, &first).await.0, StatusCode::OK);
    assert_eq!(alice.get(&thread).await.1, json!({ "automatic": false }), "what the user meant stays");
    refused(&bob.get(&thread).await, 404, "M_NOT_FOUND");
    subscribe(&bob, &other).await;
    // An event that came before the user left the thread does not bring them back, and one that came after does.
    let second = reply(&bob, &room, &root, "second").await;
    alice.ok_delete(&thread, json!({})).await;
    refused(&alice.get(&thread).await, 404, "M_NOT_FOUND");
    let third = reply(&bob, &room, &root, "third").await;
    for seen in [&first, &second] {
        let code = "IO.ELEMENT.MSC4306.M_CONFLICTING_UNSUBSCRIPTION";
        refused(&by_itself(&alice, &thread, seen).await, 409, code);
    }
    alice.ok_delete(&thread, json!({})).await;
    assert_eq!(by_itself(&alice, &thread, &third).await.0, StatusCode::OK, "to leave twice is to leave once");
    assert_eq!(alice.get(&thread).await.1, json!({ "automatic": true }));
    alice.ok_delete(&thread, json!({})).await;
    subscribe(&alice, &thread).await;
    assert_eq!(alice.get(&thread).await.1, json!({ "automatic": false }), "the user may come back any time");
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn threads_that_are_not_there_or_not_seen_are_alike() {
    let server = TestServer::new();
    let (alice, _, room) = room_of_two(&server).await;
    let root = say(&alice, &room, "root").await;
    let inside = reply(&alice, &room, &root, "inside").await;
    let carol = server.register("carol").await;
    for (client, room, root) in [
        (&alice, room.as_str(), NOWHERE),
        (&alice, room.as_str(), "$notathread:example.org"),
        (&alice, room.as_str(), inside.as_str()),
        (&alice, "!nowhere:test.example", root.as_str()),
        (&carol, room.as_str(), root.as_str()),
    ] {
        let thread = path(room, root);
        refused(&client.put(&thread, json!({})).await, 404, "M_NOT_FOUND");
        refused(&client.get(&thread).await, 404, "M_NOT_FOUND");
        refused(&client.delete(&thread, json!({})).await, 404, "M_NOT_FOUND");
    }
    let thread = path(&room, &root);
    for body in [json!({ "automatic": true }), json!({ "automatic": 1 }), json!({ "automatic": "no id" })] {
        let (status, _) = alice.put(&thread, body.clone()).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
    }
    refused(&server.anonymous().put(&thread, json!({})).await, 401, "M_MISSING_TOKEN");
    assert_eq!(
        alice.ok_get("/_matrix/client/versions").await["unstable_features"]["org.matrix.msc4306"],
        true
    );
}

/// The threads of a part of a page, each with its stamp.
pub(crate) fn threads(page: &Value, part: &str, room: &str) -> Vec<(String, u64)> {
    let threads = page[part][room].as_object().cloned().unwrap_or_default();
    let stamp = |change: &Value| change["bump_stamp"].as_u64().unwrap();
    let mut all: Vec<_> = threads.iter().map(|(root, change)| (root.clone(), stamp(change))).collect();
    all.sort_by_key(|(_, stamp)| *stamp);
    all
}

#[tokio::test(start_paused = true)]
async fn changes_are_listed_backwards_in_pages_and_each_thread_once() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let mut roots = Vec::new();
    for number in 0..7 {
        let root = say(&alice, &room, &number.to_string()).await;
        subscribe(&alice, &path(&room, &root)).await;
        roots.push(root);
    }
    let since = Chain::of(&alice).next().await["next_batch"].as_str().unwrap().to_owned();
    let cause = reply(&bob, &room, &roots[6], "in six").await;
    alice.ok_delete(&path(&room, &roots[2]), json!({})).await;
    alice.ok_delete(&path(&room, &roots[6]), json!({})).await;
    let cause_after = reply(&bob, &room, &roots[6], "again in six").await;
    refused(
        &by_itself(&alice, &path(&room, &roots[6]), &cause).await,
        409,
        "IO.ELEMENT.MSC4306.M_CONFLICTING_UNSUBSCRIPTION",
    );
    assert_eq!(by_itself(&alice, &path(&room, &roots[6]), &cause_after).await.0, StatusCode::OK);
    let (mut from, mut pages, mut subscribed, mut unsubscribed) = (String::new(), 0, Vec::new(), Vec::new());
    loop {
        let page = alice.ok_get(&format!("{CHANGES}?dir=b&limit=3{from}")).await;
        subscribed.extend(threads(&page, "subscribed", &room).into_iter().rev());
        unsubscribed.extend(threads(&page, "unsubscribed", &room));
        pages += 1;
        let Some(end) = page["end"].as_str() else { break };
        from = format!("&from={end}");
    }
    assert_eq!(pages, 3);
    let told: Vec<_> = subscribed.iter().map(|(root, _)| root).collect();
    assert_eq!(told, [&roots[6], &roots[5], &roots[4], &roots[3], &roots[1], &roots[0]]);
    assert!(subscribed.is_sorted_by(|(_, a), (_, b)| a > b), "{subscribed:?}");
    assert_eq!(unsubscribed.iter().map(|(root, _)| root).collect::<Vec<_>>(), [&roots[2]]);
    // From a sync on, only what changed since.
    let page = alice.ok_get(&format!("{CHANGES}?dir=b&to={since}")).await;
    assert_eq!(page["subscribed"][&room][&roots[6]]["automatic"], true);
    assert_eq!(
        (threads(&page, "subscribed", &room).len(), threads(&page, "unsubscribed", &room).len()),
        (1, 1)
    );
    assert_eq!(page.get("end"), None);
    let told = since.trim_start_matches('s').split('_').next().unwrap();
    let page = alice.ok_get(&format!("{CHANGES}?dir=b&to={since}~1.2.3...{told}.")).await;
    assert_eq!(threads(&page, "subscribed", &room).len(), 1, "a position of sliding sync does as well");
    assert_eq!(bob.ok_get(&format!("{CHANGES}?dir=b")).await, json!({}));
    for (query, code) in [
        ("", "M_MISSING_PARAM"),
        ("?dir=f", "M_INVALID_PARAM"),
        ("?dir=b&limit=0", "M_INVALID_PARAM"),
        ("?dir=b&limit=-1", "M_INVALID_PARAM"),
        ("?dir=b&limit=x", "M_INVALID_PARAM"),
        ("?dir=b&from=x", "M_INVALID_PARAM"),
        ("?dir=b&from=ts", "M_INVALID_PARAM"),
        ("?dir=b&from=ts-1", "M_INVALID_PARAM"),
        ("?dir=b&from=ts99999999999999999999", "M_INVALID_PARAM"),
        ("?dir=b&to=~", "M_INVALID_PARAM"),
    ] {
        refused(&alice.get(&format!("{CHANGES}{query}")).await, 400, code);
    }
    server.assert_whole();
    let again = server.killed(0);
    let alice = TestClient { server: again.clone(), ..alice };
    assert_eq!(threads(&alice.ok_get(&format!("{CHANGES}?dir=b")).await, "subscribed", &room).len(), 6);
    // An account that ends leaves none.
    let auth = json!({
        "type": "m.login.password", "password": "password of alice",
        "identifier": { "type": "m.id.user", "user": alice.user_id },
    });
    alice.ok_post("/account/deactivate", json!({ "auth": auth })).await;
    let rows = again.assert_whole();
    assert!(rows.iter().all(|(name, count)| !name.starts_with("SUBSCRIPTION") || *count == 0), "{rows:?}");
}

#[tokio::test(start_paused = true)]
async fn a_user_who_was_kicked_keeps_what_they_could_see() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let root = say(&alice, &room, "root").await;
    subscribe(&bob, &path(&room, &root)).await;
    must(&alice, &room, "kick", json!({ "user_id": bob.user_id })).await;
    let later = say(&alice, &room, "later").await;
    assert_eq!(bob.get(&path(&room, &root)).await.0, StatusCode::OK);
    refused(&bob.put(&path(&room, &later), json!({})).await, 404, "M_NOT_FOUND");
    assert!(alice.state(&room, "m.room.create", "").await.0.is_success());
}

const RULES: &str = "/_matrix/client/v3/pushrules/global";
const SILENT: &str = ".io.element.msc4306.rule.unsubscribed_thread";
const LOUD: &str = ".io.element.msc4306.rule.subscribed_thread";

/// The counts of a room, and those of each of its threads, as a client that begins sees them: notifications and highlights.
async fn counts(client: &TestClient, room: &str) -> (Vec<u64>, Value) {
    let filter = json!({ "room": { "timeline": { "unread_thread_notifications": true } } });
    let sync = Chain::filtered(client, filter).next().await;
    let told = &sync["rooms"]["join"][room];
    let main = &told["unread_notifications"];
    let number = |name: &str| main[name].as_u64().unwrap();
    (
        vec![number("notification_count"), number("highlight_count")],
        told["unread_thread_notifications"].clone(),
    )
}

fn count(notifications: u64, highlights: u64) -> Value {
    json!({ "notification_count": notifications, "highlight_count": highlights })
}

#[tokio::test(start_paused = true)]
async fn a_thread_counts_for_those_who_subscribe_to_it_once_they_subscribed_to_any() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob", "carol"]).await;
    let [alice, bob, carol] = [&people[0], &people[1], &people[2]];
    let (one, two) = (say(alice, &room, "one").await, say(alice, &room, "two").await);
    must(bob, &room, &format!("receipt/m.read/{}", encoded(&two)), json!({})).await;
    reply(alice, &room, &one, "in one").await;
    reply(alice, &room, &two, "in two").await;
    let before = json!({ &one: count(1, 0), &two: count(1, 0) });
    assert_eq!(counts(bob, &room).await, (vec![0, 0], before.clone()), "as without subscriptions");
    let rules = bob.ok_get(&format!("{RULES}/")).await;
    assert!(rules.get("postcontent").is_none(), "{rules}");
    refused(&bob.get(&format!("{RULES}/postcontent/{LOUD}")).await, 404, "M_NOT_FOUND");
    // With the first subscription come the rules, and clients are told of them and of the counts.
    let mut chain = Chain::of(bob);
    chain.next().await;
    let mut slide = Slide::list(bob, 0, 9);
    slide.body["extensions"] = json!({ "account_data": { "enabled": true } });
    slide.next().await;
    subscribe(bob, &path(&room, &one)).await;
    let told = chain.next().await;
    let data = told["account_data"]["events"].as_array().unwrap();
    let rules = &data.iter().find(|event| event["type"] == "m.push_rules").unwrap()["content"]["global"];
    let thread_rule = |id: &str, subscribed: bool, actions: Value| {
        let condition = json!({ "kind": "io.element.msc4306.thread_subscription", "subscribed": subscribed });
        json!({ "rule_id": id, "default": true, "enabled": true, "conditions": [condition], "actions": actions })
    };
    let loud = json!(["notify", { "set_tweak": "sound", "value": "default" }]);
    let expected = [thread_rule(SILENT, false, json!([])), thread_rule(LOUD, true, loud)];
    assert_eq!(rules["postcontent"], json!(expected));
    assert_eq!(told["rooms"]["join"][&room]["unread_notifications"], count(1, 0));
    let slid = slide.next().await;
    assert_eq!(slid["rooms"][&room]["notification_count"], 1);
    assert_eq!(slid["extensions"]["account_data"]["global"][0]["type"], "m.push_rules");
    assert_eq!(counts(bob, &room).await, (vec![0, 0], json!({ &one: count(1, 0) })));
    // Whatever no rule silences counts in a subscribed thread, also where the room only tells of mentions.
    bob.ok_put(&format!("{RULES}/room/{}", encoded(&room)), json!({ "actions": [] })).await;
    let in_thread = |root: &str| json!({ "rel_type": "m.thread", "event_id": root });
    let sticker = json!({ "body": "s", "url": "mxc://a/b", "info": {}, "m.relates_to": in_thread(&one) });
    alice.ok_put(&format!("/rooms/{room}/send/m.sticker/s"), sticker).await;
    let notice = json!({ "msgtype": "m.notice", "body": "n", "m.relates_to": in_thread(&one) });
    send(alice, &room, "notice", notice).await;
    let mention = |root: &str| {
        let mentions = json!({ "user_ids": [bob.user_id] });
        json!({ "msgtype": "m.text", "body": "b", "m.mentions": mentions, "m.relates_to": in_thread(root) })
    };
    send(alice, &room, "mention", mention(&two)).await;
    say(alice, &room, "outside").await;
    let expected = json!({ &one: count(2, 0), &two: count(1, 1) });
    assert_eq!(counts(bob, &room).await, (vec![0, 0], expected.clone()));
    // Rules that the server has to judge by count alike.
    bob.ok_put(&format!("{RULES}/content/word"), json!({ "pattern": "cake", "actions": ["notify"] })).await;
    assert_eq!(counts(bob, &room).await, (vec![0, 0], expected));
    reply(alice, &room, &two, "cake").await;
    assert_eq!(counts(bob, &room).await.1, json!({ &one: count(2, 0), &two: count(2, 1) }));
    // Counts follow subscriptions at once, and a client is told.
    let mut chain = Chain::of(bob);
    chain.next().await;
    slide.next().await;
    subscribe(bob, &path(&room, &two)).await;
    assert_eq!(chain.next().await["rooms"]["join"][&room]["unread_notifications"], count(5, 1));
    assert_eq!(slide.next().await["rooms"][&room]["notification_count"], 5);
    bob.ok_delete(&path(&room, &one), json!({})).await;
    assert_eq!(counts(bob, &room).await.1, json!({ &two: count(3, 1) }));
    // A mute of everything holds for threads, too, and without the rules all is as before.
    bob.ok_put(&format!("{RULES}/override/.m.rule.master/enabled"), json!({ "enabled": true })).await;
    assert_eq!(counts(bob, &room).await.1, Value::Null);
    bob.ok_put(&format!("{RULES}/override/.m.rule.master/enabled"), json!({ "enabled": false })).await;
    bob.ok_delete(&format!("{RULES}/room/{}", encoded(&room)), json!({})).await;
    for rule in [SILENT, LOUD] {
        bob.ok_put(&format!("{RULES}/postcontent/{rule}/enabled"), json!({ "enabled": false })).await;
    }
    assert_eq!(counts(bob, &room).await, (vec![1, 0], json!({ &one: count(1, 0), &two: count(3, 1) })));
    // Nobody else's counts changed.
    assert_eq!(counts(carol, &room).await.1, json!({ &one: count(1, 0), &two: count(3, 0) }));
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn rules_between_content_and_room_are_the_servers_own() {
    let server = TestServer::new();
    let (alice, _, room) = room_of_two(&server).await;
    let root = say(&alice, &room, "root").await;
    subscribe(&alice, &path(&room, &root)).await;
    for body in [json!({ "actions": [] }), json!({ "actions": [], "conditions": [] })] {
        refused(&alice.put(&format!("{RULES}/postcontent/mine"), body).await, 400, "M_INVALID_PARAM");
    }
    let rule = format!("{RULES}/postcontent/{LOUD}");
    let (status, _) = alice.delete(&rule, json!({})).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    alice.ok_put(&format!("{rule}/actions"), json!({ "actions": ["notify"] })).await;
    assert_eq!(alice.ok_get(&rule).await["actions"], json!(["notify"]));
    // They stay as the user made them, whatever else the user changes.
    alice.ok_put(&format!("{RULES}/content/word"), json!({ "pattern": "cake", "actions": ["notify"] })).await;
    subscribe(&alice, &path(&room, &root)).await;
    assert_eq!(alice.ok_get(&rule).await["actions"], json!(["notify"]));
    assert_eq!(alice.ok_get(&format!("{RULES}/")).await["postcontent"].as_array().unwrap().len(), 2);
}
