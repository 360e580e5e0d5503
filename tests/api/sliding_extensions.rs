//! The extensions of sliding sync: what is told beside the rooms themselves.

use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    sliding_sync::Slide,
    sticky_events::{MINUTE_MS, stick},
    support::{TestClient, TestServer, encoded},
    sync::{act, create_room, env, must, room_of_two, say},
    thread_subscriptions::{CHANGES, path as thread, subscribe, threads},
};

fn with(name: &str, extension: Value) -> Value {
    let list = json!({ "ranges": [[0, 9]], "timeline_limit": 1, "required_state": [] });
    json!({ "lists": { "all": list }, "extensions": { name: extension } })
}

async fn type_in(client: &TestClient, room: &str, typing: bool) {
    let path = format!("/rooms/{room}/typing/{}", client.user_id);
    client.ok_put(&path, json!({ "typing": typing, "timeout": 20_000 })).await;
}

async fn read(client: &TestClient, room: &str, event: &str) {
    let (status, json) = act(client, room, &format!("receipt/m.read/{}", encoded(event)), json!({})).await;
    assert_eq!(status, StatusCode::OK, "{json}");
}

async fn send_to_device(from: &TestClient, to: &TestClient, number: usize) {
    let body = json!({ "messages": { &to.user_id: { "*": { "number": number } } } });
    from.ok_put(&format!("/sendToDevice/org.example.test/{number}"), body).await;
}

fn numbers(answer: &Value) -> Vec<u64> {
    let events = answer["extensions"]["to_device"]["events"].as_array().unwrap();
    events.iter().map(|event| event["content"]["number"].as_u64().unwrap()).collect()
}

#[tokio::test(start_paused = true)]
async fn messages_to_the_device_wait_until_it_confirms_them() {
    let server = TestServer::new();
    let (alice, bob, _) = room_of_two(&server).await;
    for number in 0..5 {
        send_to_device(&alice, &bob, number).await;
    }
    let mut slide =
        Slide::of(&bob, json!({ "extensions": { "to_device": { "enabled": true, "limit": 2 } } }));
    let first = slide.next().await;
    assert_eq!(numbers(&first), [0, 1]);
    assert_eq!(numbers(&slide.next().await), [0, 1], "they were not confirmed");
    let mut seen = Vec::new();
    let mut since = first["extensions"]["to_device"]["next_batch"].clone();
    for _ in 0..3 {
        slide.body["extensions"]["to_device"]["since"] = since;
        let next = slide.next().await;
        seen.extend(numbers(&next));
        since = next["extensions"]["to_device"]["next_batch"].clone();
    }
    assert_eq!(seen, [2, 3, 4]);
    slide.body["extensions"]["to_device"]["since"] = since.clone();
    let (woken, ()) = tokio::join!(slide.next_within(30_000), async {
        env(&server).sleep(Duration::from_secs(1)).await;
        send_to_device(&alice, &bob, 5).await;
    });
    assert_eq!(numbers(&woken), [5]);
    // The token of another device confirms nothing.
    let other = bob.on_device("OTHER").await;
    send_to_device(&alice, &other, 6).await;
    let body = json!({ "extensions": { "to_device": { "enabled": true, "since": since } } });
    assert_eq!(numbers(&Slide::of(&other, body).next().await), [6]);
}

#[tokio::test(start_paused = true)]
async fn device_lists_are_told_from_where_they_were_told_last() {
    let server = TestServer::new();
    let (alice, bob, _) = room_of_two(&server).await;
    let on = json!({ "enabled": true });
    let mut slide = Slide::of(&bob, json!({ "extensions": { "e2ee": on } }));
    let first = slide.next().await;
    assert_eq!(first["extensions"]["e2ee"]["device_one_time_keys_count"], json!({ "signed_curve25519": 0 }));
    assert_eq!(first["extensions"]["e2ee"]["device_unused_fallback_key_types"], json!([]));
    assert!(first["extensions"]["e2ee"]["device_lists"].is_null());
    let upload = |client: &TestClient| {
        let (client, keys) = (
            client.clone(),
            json!({ "device_keys": {
                "user_id": client.user_id, "device_id": client.device_id, "algorithms": [], "keys": {}, "signatures": {},
            } }),
        );
        async move { client.ok_post("/keys/upload", keys).await }
    };
    upload(&alice).await;
    let changed = |answer: &Value, part: &str| answer["extensions"]["e2ee"]["device_lists"][part].clone();
    let next = slide.next_within(30_000).await;
    assert_eq!(changed(&next, "changed"), json!([alice.user_id]));
    assert!(changed(&slide.next().await, "changed").is_null());
    // Without the extension, a change waits until it is asked for again.
    slide.body["extensions"] = json!({});
    let carol = server.register("carol").await;
    let room = create_room(&carol, json!({ "preset": "public_chat" })).await;
    must(&bob, &room, "join", json!({})).await;
    slide.next().await;
    slide.next().await;
    slide.body["extensions"] = json!({ "e2ee": on });
    let next = slide.next().await;
    assert!(changed(&next, "changed").as_array().unwrap().contains(&carol.user_id.clone().into()), "{next}");
    must(&bob, &room, "leave", json!({})).await;
    assert_eq!(changed(&slide.next().await, "left"), json!([carol.user_id]));
}

#[tokio::test(start_paused = true)]
async fn account_data_is_told_whole_and_then_as_it_changes() {
    let server = TestServer::new();
    let (alice, _, room) = room_of_two(&server).await;
    let data = format!("/user/{}", alice.user_id);
    alice.ok_put(&format!("{data}/account_data/org.example.a"), json!({ "a": 1 })).await;
    alice.ok_put(&format!("{data}/rooms/{room}/account_data/org.example.r"), json!({ "r": 1 })).await;
    let mut slide = Slide::of(&alice, with("account_data", json!({ "enabled": true })));
    let global = |answer: &Value| -> Vec<String> {
        let list = answer["extensions"]["account_data"]["global"].as_array().cloned().unwrap_or_default();
        list.iter().map(|event| event["type"].as_str().unwrap().to_owned()).collect()
    };
    let of_room = |answer: &Value| answer["extensions"]["account_data"]["rooms"][&room].clone();
    let first = slide.next().await;
    assert_eq!(global(&first), ["org.example.a", "m.push_rules"]);
    assert_eq!(of_room(&first), json!([{ "type": "org.example.r", "content": { "r": 1 } }]));
    assert!(slide.next().await["extensions"]["account_data"].is_null());
    alice.ok_put(&format!("{data}/account_data/org.example.b"), json!({ "b": 1 })).await;
    assert_eq!(global(&slide.next_within(30_000).await), ["org.example.b"]);
    // Changes while the extension is off are told when it is on again.
    slide.body["extensions"] = json!({});
    slide.next().await;
    alice.ok_put(&format!("{data}/rooms/{room}/account_data/org.example.r"), json!({ "r": 2 })).await;
    alice.ok_put(&format!("{data}/account_data/org.example.a"), json!({ "a": 2 })).await;
    slide.next().await;
    slide.body["extensions"] = json!({ "account_data": { "enabled": true, "rooms": [], "lists": [] } });
    let next = slide.next().await;
    assert_eq!((global(&next), of_room(&next)), (vec!["org.example.a".to_owned()], Value::Null));
    slide.body["extensions"] = json!({ "account_data": { "enabled": true, "lists": ["all"] } });
    assert_eq!(of_room(&slide.next().await)[0]["content"], json!({ "r": 2 }));
    // So are those of a room that no list shows for a while.
    slide.body["lists"]["all"]["ranges"] = json!([]);
    slide.next().await;
    alice.ok_put(&format!("{data}/rooms/{room}/account_data/org.example.r"), json!({ "r": 3 })).await;
    slide.next().await;
    slide.next().await;
    slide.body["lists"]["all"]["ranges"] = json!([[0, 9]]);
    assert_eq!(of_room(&slide.next().await)[0]["content"], json!({ "r": 3 }));
}

#[tokio::test(start_paused = true)]
async fn receipts_and_typing_are_told_of_the_rooms_that_are_shown() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let other = create_room(&alice, json!({ "preset": "public_chat" })).await;
    let event = say(&alice, &room, "hello").await;
    read(&bob, &room, &event).await;
    type_in(&bob, &room, true).await;
    let on = json!({ "enabled": true });
    let mut body = with("receipts", on.clone());
    body["extensions"]["typing"] = on;
    body["lists"]["all"]["ranges"] = json!([[0, 0]]);
    let mut slide = Slide::of(&alice, body);
    let receipts = |answer: &Value| answer["extensions"]["receipts"]["rooms"].clone();
    let typing = |answer: &Value| answer["extensions"]["typing"]["rooms"].clone();
    let first = slide.next().await;
    assert!(receipts(&first)[&room]["content"][&event]["m.read"][&bob.user_id]["ts"].is_u64(), "{first:#}");
    assert_eq!(
        typing(&first)[&room],
        json!({ "type": "m.typing", "content": { "user_ids": [bob.user_id] } })
    );
    let idle = slide.next().await;
    assert!(receipts(&idle).is_null() && typing(&idle).is_null(), "{idle:#}");
    type_in(&bob, &room, false).await;
    assert_eq!(typing(&slide.next_within(30_000).await)[&room]["content"]["user_ids"], json!([]));
    // While another room is shown, Bob begins to type and reads on. Both are told when his room is back.
    say(&alice, &other, "elsewhere").await;
    slide.next().await;
    type_in(&bob, &room, true).await;
    let out_of_range = slide.next().await;
    assert!(typing(&out_of_range).is_null(), "{out_of_range:#}");
    let event = say(&alice, &room, "more").await;
    read(&bob, &room, &event).await;
    let next = slide.next().await;
    assert!(receipts(&next)[&room]["content"][&event]["m.read"][&bob.user_id].is_object(), "{next:#}");
    assert_eq!(typing(&next)[&room]["content"]["user_ids"], json!([bob.user_id]));
    // A client may want them of subscribed rooms alone.
    slide.body["extensions"]["receipts"] = json!({ "enabled": true, "lists": [], "rooms": ["*"] });
    let event = say(&alice, &room, "most").await;
    read(&bob, &room, &event).await;
    assert!(receipts(&slide.next().await).is_null());
    slide.body["room_subscriptions"] = json!({ &room: { "timeline_limit": 1, "required_state": [] } });
    let next = slide.next().await;
    assert!(receipts(&next)[&room]["content"][&event]["m.read"][&bob.user_id].is_object(), "{next:#}");
    assert!(receipts(&slide.next().await).is_null());
}

#[tokio::test(start_paused = true)]
async fn a_room_begins_with_the_receipts_for_its_timeline_and_with_ones_own() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let carol = server.register("carol").await;
    must(&carol, &room, "join", json!({})).await;
    let mut events = Vec::new();
    for number in 0..4 {
        events.push(say(&bob, &room, &number.to_string()).await);
    }
    read(&alice, &room, &events[0]).await;
    read(&bob, &room, &events[1]).await;
    read(&carol, &room, &events[3]).await;
    let mut slide = Slide::of(&alice, with("receipts", json!({ "enabled": true })));
    let readers = |answer: &Value| -> Vec<(String, String)> {
        let content = answer["extensions"]["receipts"]["rooms"][&room]["content"].as_object().cloned();
        let mut found = Vec::new();
        for (event, kinds) in content.unwrap_or_default() {
            let users = kinds["m.read"].as_object().cloned().unwrap_or_default();
            found.extend(users.keys().map(|user| (event.clone(), user.clone())));
        }
        found.sort();
        found
    };
    let sorted = |mut pairs: Vec<(String, String)>| {
        pairs.sort();
        pairs
    };
    let own = (events[0].clone(), alice.user_id.clone());
    let of_bob = (events[1].clone(), bob.user_id.clone());
    let of_carol = (events[3].clone(), carol.user_id.clone());
    assert_eq!(readers(&slide.next().await), sorted(vec![own.clone(), of_carol.clone()]));
    // With more of the timeline come the receipts for it.
    slide.body["lists"]["all"]["timeline_limit"] = json!(3);
    let wider = slide.next().await;
    assert_eq!(wider["rooms"][&room]["timeline"].as_array().unwrap().len(), 3);
    assert_eq!(readers(&wider), sorted(vec![own, of_bob, of_carol]));
    // From then on each is told, for whatever event.
    read(&carol, &room, &events[2]).await;
    read(&bob, &room, &events[2]).await;
    assert_eq!(readers(&slide.next().await), [(events[2].clone(), bob.user_id.clone())]);
}

#[tokio::test(start_paused = true)]
async fn extensions_of_unknown_names_are_passed_over() {
    let server = TestServer::new();
    let (alice, _, room) = room_of_two(&server).await;
    let mut body = with("org.example.unknown", json!({ "enabled": true, "deep": [[[[]]]] }));
    body["extensions"]["typing"] = Value::Null;
    let answer = Slide::of(&alice, body).next().await;
    assert!(answer["rooms"][&room].is_object());
    assert_eq!(answer["extensions"], json!({}));
}

const STICKY: &str = "org.matrix.msc4354.sticky_events";
const THREADS: &str = "io.element.msc4308.thread_subscriptions";

/// The names of the sticky events that an answer tells of a room beside its timeline.
fn stuck(answer: &Value, room: &str) -> Vec<String> {
    let events =
        answer["extensions"][STICKY]["rooms"][room]["events"].as_array().cloned().unwrap_or_default();
    events.iter().map(|event| event["content"]["body"].as_str().unwrap().to_owned()).collect()
}

/// Confirms the sticky events of an answer, if it says how.
fn confirm(slide: &mut Slide, answer: &Value) {
    if let Some(next) = answer["extensions"][STICKY].get("next_batch") {
        slide.body["extensions"][STICKY]["since"] = next.clone();
    }
}

#[tokio::test(start_paused = true)]
async fn sticky_events_are_told_of_every_room_that_a_list_matches_until_they_are_confirmed() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let other = create_room(&bob, json!({ "preset": "public_chat" })).await;
    let mut body = with(STICKY, json!({ "enabled": true }));
    body["lists"]["all"]["ranges"] = json!([[0, 0]]);
    let mut slide = Slide::of(&bob, body);
    let empty = slide.next().await;
    assert!(empty["extensions"].get(STICKY).is_none(), "there is nothing to confirm: {empty}");
    let one = stick(&alice, &room, "one", 10 * MINUTE_MS).await;
    say(&alice, &room, "not sticky").await;
    say(&bob, &other, "in range").await;
    let first = slide.next_within(30_000).await;
    assert!(first["rooms"].get(&room).is_none(), "{first:#}");
    assert_eq!(stuck(&first, &room), ["one"]);
    let event = &first["extensions"][STICKY]["rooms"][&room]["events"][0];
    assert_eq!(
        (&event["event_id"], &event["msc4354_sticky"]),
        (&one.into(), &json!({ "duration_ms": 600_000 }))
    );
    assert!(event["unsigned"]["msc4354_sticky_duration_ttl_ms"].as_u64().is_some_and(|left| left <= 600_000));
    assert_eq!(stuck(&slide.next().await, &room), ["one"], "it was not confirmed");
    confirm(&mut slide, &first);
    let idle = slide.next().await;
    assert!(idle["extensions"].get(STICKY).is_none(), "{idle}");
    // The timeline tells the next one, so that nothing else does, not even later.
    stick(&alice, &room, "two", MINUTE_MS).await;
    let shown = slide.next().await;
    assert_eq!(
        (shown["rooms"][&room]["timeline"][0]["content"]["body"].as_str(), stuck(&shown, &room)),
        (Some("two"), vec![])
    );
    confirm(&mut slide, &shown);
    assert_eq!(stuck(&slide.next().await, &room), Vec::<String>::new());
    // The token is not one of the connection: another goes on with it.
    stick(&alice, &room, "three", MINUTE_MS).await;
    let mut anew = Slide::of(&bob, slide.body.clone());
    anew.body["lists"]["all"]["timeline_limit"] = json!(0);
    assert_eq!(stuck(&anew.next().await, &room), ["three"]);
    // Without a token everything that is sticky still is told, without the extension nothing.
    env(&server).sleep(Duration::from_secs(61)).await;
    anew.body["extensions"][STICKY] = json!({ "enabled": true });
    assert_eq!(stuck(&anew.next().await, &room), ["one"]);
    anew.body["extensions"][STICKY] = json!({ "enabled": false });
    stick(&alice, &room, "while it is off", 10 * MINUTE_MS).await;
    assert!(anew.next().await["extensions"].get(STICKY).is_none());
    anew.body["extensions"][STICKY] = slide.body["extensions"][STICKY].clone();
    assert_eq!(stuck(&anew.next().await, &room), ["while it is off"], "the third one has expired");
    let (status, json) =
        Slide::of(&bob, with(STICKY, json!({ "enabled": true, "since": "x" }))).try_within(0).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some("M_INVALID_PARAM")));
}

#[tokio::test(start_paused = true)]
async fn who_joins_is_told_what_is_sticky_and_many_are_told_in_pieces_that_are_confirmed() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let carol = server.register("carol").await;
    let own = create_room(&carol, json!({ "preset": "public_chat" })).await;
    for number in 0..3 {
        stick(&alice, &room, &format!("before {number}"), 60 * MINUTE_MS).await;
    }
    stick(&carol, &own, "own", 60 * MINUTE_MS).await;
    let mut slide = Slide::of(&carol, with(STICKY, json!({ "enabled": true, "limit": 2 })));
    slide.body["lists"]["all"]["timeline_limit"] = json!(0);
    let first = slide.next().await;
    assert_eq!((stuck(&first, &own), stuck(&first, &room)), (vec!["own".to_owned()], vec![]));
    confirm(&mut slide, &first);
    must(&carol, &room, "join", json!({})).await;
    stick(&bob, &room, "after", 60 * MINUTE_MS).await;
    stick(&carol, &own, "own again", 60 * MINUTE_MS).await;
    let mut told = Vec::new();
    for round in 0..3 {
        let answer = slide.next_within(30_000).await;
        assert_eq!(stuck(&slide.clone().next().await, &room), stuck(&answer, &room), "until it is confirmed");
        told.push((stuck(&answer, &room), stuck(&answer, &own)));
        confirm(&mut slide, &answer);
        assert!(
            round == 2
                || slide.body["extensions"][STICKY]["since"].as_str().unwrap().contains("_k") == (round == 0)
        );
    }
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let expected = [
        (names(&["before 0", "before 1"]), vec![]),
        (names(&["before 2", "after"]), vec![]),
        (vec![], names(&["own again"])),
    ];
    assert_eq!(told, expected);
    assert!(slide.next().await["extensions"].get(STICKY).is_none());
    // A room that no list matches is not told, and one that is subscribed to is.
    slide.body["lists"]["all"]["filters"] = json!({ "is_dm": true });
    stick(&alice, &room, "unwanted", 60 * MINUTE_MS).await;
    assert_eq!(stuck(&slide.next().await, &room), Vec::<String>::new());
    slide.body["room_subscriptions"] = json!({ &room: { "timeline_limit": 0, "required_state": [] } });
    stick(&alice, &room, "wanted", 60 * MINUTE_MS).await;
    assert_eq!(stuck(&slide.next().await, &room), ["unwanted", "wanted"]);
    // Who is ignored, what is redacted, and rooms that the user left are not told.
    let redacted = stick(&alice, &room, "redacted", 60 * MINUTE_MS).await;
    alice.ok_put(&format!("/rooms/{room}/redact/{}/1", encoded(&redacted)), json!({})).await;
    let ignored = json!({ "ignored_users": { &bob.user_id: {} } });
    carol.ok_put(&format!("/user/{}/account_data/m.ignored_user_list", carol.user_id), ignored).await;
    slide.body["extensions"][STICKY] = json!({ "enabled": true });
    let answer = slide.next().await;
    assert_eq!(stuck(&answer, &room), ["before 0", "before 1", "before 2", "unwanted", "wanted"]);
    must(&carol, &room, "leave", json!({})).await;
    stick(&alice, &room, "behind her", 60 * MINUTE_MS).await;
    assert_eq!(stuck(&slide.next().await, &room), Vec::<String>::new());
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn changes_of_thread_subscriptions_are_told_with_a_token_that_leads_to_the_others() {
    let server = TestServer::new();
    let (alice, _, room) = room_of_two(&server).await;
    let mut roots = Vec::new();
    for number in 0..5 {
        let root = say(&alice, &room, &number.to_string()).await;
        subscribe(&alice, &thread(&room, &root)).await;
        roots.push(root);
    }
    let part = |answer: &Value, part: &str| -> Vec<String> {
        let told = threads(&answer["extensions"][THREADS], part, &room);
        told.into_iter().map(|(root, _)| root).collect()
    };
    let mut slide = Slide::of(&alice, json!({ "extensions": { THREADS: { "enabled": true, "limit": 2 } } }));
    let first = slide.next().await;
    assert_eq!(part(&first, "subscribed"), roots[3..]);
    let newest = &first["extensions"][THREADS]["subscribed"][&room][&roots[4]];
    assert_eq!(newest["automatic"], false);
    // The token leads to the others, however many there are.
    let from = first["extensions"][THREADS]["prev_batch"].as_str().unwrap();
    let page = alice.ok_get(&format!("{CHANGES}?dir=b&from={from}")).await;
    let others: Vec<_> = threads(&page, "subscribed", &room).into_iter().map(|(root, _)| root).collect();
    assert_eq!((others, page.get("end")), (roots[..3].to_vec(), None));
    assert!(slide.next().await["extensions"].get(THREADS).is_none());
    // A change is told to a poll that waits, and once, as it is at last.
    let (woken, ()) = tokio::join!(slide.next_within(30_000), async {
        env(&server).sleep(Duration::from_secs(1)).await;
        alice.ok_delete(&thread(&room, &roots[0]), json!({})).await;
    });
    assert_eq!((part(&woken, "unsubscribed"), part(&woken, "subscribed")), (vec![roots[0].clone()], vec![]));
    assert!(woken["extensions"][THREADS].get("prev_batch").is_none(), "{woken}");
    assert!(
        woken["extensions"][THREADS]["unsubscribed"][&room][&roots[0]]["bump_stamp"].as_u64()
            > newest["bump_stamp"].as_u64()
    );
    // Changes from while the extension was off are told when it is on again, and the token leads back to where it was told last.
    slide.body["extensions"][THREADS]["enabled"] = json!(false);
    for root in &roots[1..4] {
        alice.ok_delete(&thread(&room, root), json!({})).await;
        assert!(slide.next().await["extensions"].get(THREADS).is_none());
    }
    subscribe(&alice, &thread(&room, &roots[3])).await;
    slide.next().await;
    slide.body["extensions"][THREADS]["enabled"] = json!(true);
    let before = slide.pos.clone().unwrap();
    let again = slide.next().await;
    assert_eq!(
        (part(&again, "unsubscribed"), part(&again, "subscribed")),
        (vec![roots[2].clone()], vec![roots[3].clone()])
    );
    let from = again["extensions"][THREADS]["prev_batch"].as_str().unwrap();
    let page = alice.ok_get(&format!("{CHANGES}?dir=b&from={from}&to={}", encoded(&before))).await;
    let others: Vec<_> = threads(&page, "unsubscribed", &room).into_iter().map(|(root, _)| root).collect();
    assert_eq!((others, page.get("subscribed")), (vec![roots[1].clone()], None));
    // A client that never asked for them is told all, and so the position that it has leads back to the beginning.
    let mut late = Slide::list(&alice, 0, 9);
    late.next().await;
    let before = late.pos.clone().unwrap();
    late.body["extensions"] = json!({ THREADS: { "enabled": true, "limit": 1 } });
    let told = late.next().await;
    assert_eq!(part(&told, "subscribed"), [roots[3].clone()]);
    let from = told["extensions"][THREADS]["prev_batch"].as_str().unwrap();
    let page = alice.ok_get(&format!("{CHANGES}?dir=b&from={from}&to={}", encoded(&before))).await;
    let count = |part: &str| threads(&page, part, &room).len();
    assert_eq!((count("subscribed"), count("unsubscribed")), (1, 3));
}
