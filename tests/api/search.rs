//! Searches in messages (client-server API, "Server Side Search").

use aqueduct::{config::Config, store::Read};
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{TestClient, TestServer, encoded, federated::Federated},
};

const SEARCH: &str = "/_matrix/client/v3/search";

pub(crate) fn on(config: &mut Config) {
    config.search.enabled = true;
}

pub(crate) fn server() -> TestServer {
    TestServer::with(on)
}

/// Waits until searches find everything that was written.
pub(crate) async fn indexed(server: &TestServer) {
    let app = server.server().app();
    app.searching.read_upto(app.store.snapshot().upto()).await;
}

fn body(term: &str, more: Value) -> Value {
    let mut asked = json!({ "search_term": term });
    for (key, value) in more.as_object().unwrap() {
        asked[key] = value.clone();
    }
    json!({ "search_categories": { "room_events": asked } })
}

/// The results of a search in everything that was written.
pub(crate) async fn search(who: &TestClient, term: &str, more: Value) -> Value {
    indexed(&who.server).await;
    who.ok_post("/search", body(term, more)).await["search_categories"]["room_events"].clone()
}

async fn search_on(who: &TestClient, term: &str, more: Value, token: &Value) -> Value {
    let path = format!("/search?next_batch={}", encoded(token.as_str().unwrap()));
    who.ok_post(&path, body(term, more)).await["search_categories"]["room_events"].clone()
}

pub(crate) fn ids(found: &Value) -> Vec<String> {
    let results = found["results"].as_array().unwrap_or_else(|| panic!("no results in {found}"));
    results.iter().map(|result| result["result"]["event_id"].as_str().unwrap().to_owned()).collect()
}

pub(crate) async fn found(who: &TestClient, term: &str) -> Vec<String> {
    ids(&search(who, term, json!({})).await)
}

pub(crate) async fn join(who: &TestClient, room: &str) {
    who.ok_post(&format!("/join/{}", encoded(room)), json!({})).await;
}

async fn leave(who: &TestClient, room: &str) {
    who.ok_post(&format!("/rooms/{}/leave", encoded(room)), json!({})).await;
}

async fn set(who: &TestClient, room: &str, kind: &str, content: Value) -> String {
    let json = who.ok_put(&format!("/rooms/{}/state/{kind}/", encoded(room)), content).await;
    json["event_id"].as_str().unwrap().to_owned()
}

async fn send(who: &TestClient, room: &str, txn: &str, content: Value) -> String {
    let json = who.ok_put(&format!("/rooms/{room}/send/m.room.message/{txn}"), content).await;
    json["event_id"].as_str().unwrap().to_owned()
}

pub(crate) async fn edit(who: &TestClient, room: &str, txn: &str, event: &str, text: &str) -> String {
    let content = json!({
        "msgtype": "m.text", "body": format!("* {text}"), "m.new_content": { "msgtype": "m.text", "body": text },
        "m.relates_to": { "rel_type": "m.replace", "event_id": event },
    });
    send(who, room, txn, content).await
}

pub(crate) async fn redact(who: &TestClient, room: &str, event: &str, txn: &str) {
    who.ok_put(&format!("/rooms/{room}/redact/{}/{txn}", encoded(event)), json!({})).await;
}

#[tokio::test(start_paused = true)]
async fn texts_are_found_by_their_words_in_the_fields_that_are_asked_for() {
    let server = server();
    let alice = server.register("alice").await;
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    let message = alice.say(&room, "1", "Of martians and men").await;
    let name = set(&alice, &room, "m.room.name", json!({ "name": "Martians" })).await;
    let topic = set(&alice, &room, "m.room.topic", json!({ "topic": "About martians" })).await;
    let newer = json!({ "m.topic": { "m.text": [
        { "mimetype": "text/html", "body": "<b>hyper</b>" }, { "body": "plain martians" }] }, "topic": "old martians" });
    let newer = set(&alice, &room, "m.room.topic", newer).await;
    alice.say(&room, "2", "nothing of that kind").await;

    let all = search(&alice, "MARTIANS", json!({})).await;
    let mut found_ids = ids(&all);
    found_ids.sort();
    let mut expected = vec![message.clone(), name.clone(), topic.clone(), newer.clone()];
    expected.sort();
    assert_eq!(found_ids, expected);
    assert_eq!(all["count"], 4);
    assert_eq!(all.get("next_batch"), None, "{all}");
    assert_eq!(all["highlights"], json!(["Martians", "martians"]));
    let first = &all["results"][0];
    assert!(first["rank"].as_f64().unwrap() > 0.0, "{first}");
    assert_eq!(first["result"]["room_id"], room);
    assert_eq!(first.get("context"), None);
    for (key, expected) in [
        ("content.body", vec![message.clone()]),
        ("content.name", vec![name]),
        ("content.topic", vec![newer.clone(), topic]),
    ] {
        let more = json!({ "keys": [key], "order_by": "recent" });
        assert_eq!(ids(&search(&alice, "martians", more).await), expected, "{key}");
    }
    assert_eq!(
        found(&alice, "men martians").await,
        std::slice::from_ref(&message),
        "all words must be there"
    );
    assert_eq!(found(&alice, "martians women").await, Vec::<String>::new());
    assert_eq!(found(&alice, "mart").await.len(), 4, "a word stands for those that begin with it");
    assert_eq!(found(&alice, "me").await, Vec::<String>::new(), "a short one for itself alone");
    assert_eq!(found(&alice, "hyper").await, Vec::<String>::new(), "only plain text is searched");
    assert_eq!(found(&alice, "plain").await, [newer]);
    assert_eq!(found(&alice, "?!").await, Vec::<String>::new());
    let none = alice.ok_post("/search", json!({ "search_categories": {} })).await;
    assert_eq!(none, json!({ "search_categories": {} }));
}

#[tokio::test(start_paused = true)]
async fn who_searches_at_once_finds_what_they_have_just_sent() {
    let server = server();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    join(&bob, &room).await;
    let at_once = async |who: &TestClient, term: &str| {
        ids(&who.ok_post("/search", body(term, json!({}))).await["search_categories"]["room_events"])
    };
    for number in 0..10 {
        let term = format!("needle{number}");
        let event = alice.say(&room, &term, &term).await;
        assert_eq!(at_once(&alice, &term).await, [event.as_str()]);
        assert_eq!(at_once(&bob, &term).await, [event.as_str()]);
        redact(&alice, &room, &event, &format!("r{number}")).await;
        assert_eq!(at_once(&bob, &term).await, [""; 0], "what was taken back is not found");
    }
}

#[tokio::test(start_paused = true)]
async fn text_of_many_languages_is_found() {
    let server = server();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    let texts = [
        ("Привет, Ёлки в лесу", vec!["привет", "елки", "ЛЕСУ", "ёлк"]),
        ("今天天气很好，我们去东京塔", vec!["天气", "东京", "东京塔", "塔", "我们去"]),
        ("明日は東京タワーに行きます", vec!["東京", "タワー", "ﾀﾜｰ", "行きます"]),
        ("내일 한국어를 배워요", vec!["한국어", "한국", "배워요", "어"]),
        ("السَّلامُ عليكم يا أحمد", vec!["السلام", "احمد", "عليكم"]),
        ("Ein Café in der Straße", vec!["cafe", "CAFÉ", "strasse", "straße", "straß"]),
        ("สวัสดีครับ", vec!["สวัสดี", "ครับ"]),
        ("नमस्ते दुनिया", vec!["नमस्ते", "दुनिया"]),
        ("Γειά σου Κόσμε", vec!["γεια", "ΚΟΣΜΕ"]),
        ("ＦＵＬＬＷＩＤＴＨ 👍", vec!["fullwidth", "👍"]),
    ];
    let mut sent = Vec::new();
    for (number, (text, _)) in texts.iter().enumerate() {
        sent.push(alice.say(&room, &number.to_string(), text).await);
    }
    for ((text, terms), id) in texts.iter().zip(&sent) {
        for term in terms {
            assert!(found(&alice, term).await.contains(id), "{term} in {text}");
        }
    }
    assert_eq!(found(&alice, "京東").await, Vec::<String>::new(), "characters are found in their order");
    let highlighted = search(&alice, "東京タワー", json!({})).await;
    assert_eq!(highlighted["highlights"], json!(["東京タワー"]));
    assert_eq!(search(&alice, "cafe", json!({})).await["highlights"], json!(["Café"]));
}

#[tokio::test(start_paused = true)]
async fn pages_follow_each_other_without_a_gap_or_a_repetition() {
    let server = server();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    let mut sent = Vec::new();
    for number in 0..25 {
        let text = format!("needle {}", "hay ".repeat(number % 5));
        sent.push(alice.say(&room, &number.to_string(), &text).await);
        if number % 2 == 0 {
            server.server().app().env.sleep(std::time::Duration::from_millis(5)).await;
        }
    }
    for order_by in ["rank", "recent"] {
        let more = json!({ "order_by": order_by, "filter": { "limit": 10 } });
        let mut page = search(&alice, "needle", more.clone()).await;
        let mut all = ids(&page);
        let mut sizes = vec![all.len()];
        let mut ranks: Vec<f64> = Vec::new();
        loop {
            ranks.extend(page["results"].as_array().unwrap().iter().map(|it| it["rank"].as_f64().unwrap()));
            assert_eq!(page["count"], 25);
            let Some(token) = page.get("next_batch").cloned() else { break };
            // Messages that come meanwhile do not shift the pages.
            alice.say(&room, &format!("late-{order_by}-{}", all.len()), "hay alone").await;
            indexed(&server).await;
            page = search_on(&alice, "needle", more.clone(), &token).await;
            sizes.push(ids(&page).len());
            all.extend(ids(&page));
        }
        assert_eq!(sizes, [10, 10, 5], "{order_by}");
        if order_by == "recent" {
            let newest: Vec<_> = sent.iter().rev().cloned().collect();
            assert_eq!(all, newest);
        } else {
            assert!(ranks.is_sorted_by(|one, next| one >= next), "{ranks:?}");
            assert_ne!(ranks.first(), ranks.last());
        }
        all.sort();
        let mut expected = sent.clone();
        expected.sort();
        assert_eq!(all, expected);
    }
    let default = search(&alice, "needle", json!({})).await;
    assert_eq!(ids(&default).len(), 10);
    let most = search(&alice, "needle", json!({ "filter": { "limit": 100_000 } })).await;
    assert_eq!(ids(&most).len(), 25);
    let least = search(&alice, "needle", json!({ "filter": { "limit": 0 } })).await;
    assert_eq!(ids(&least).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn results_are_grouped_by_room_and_by_sender_and_a_group_has_pages_of_its_own() {
    let server = server();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (one, two) = (
        alice.create(json!({ "preset": "public_chat" })).await,
        alice.create(json!({ "preset": "public_chat" })).await,
    );
    join(&bob, &one).await;
    let mut expected = Vec::new();
    for number in 0..6 {
        expected.push(alice.say(&one, &format!("a{number}"), "needle").await);
        bob.say(&one, &format!("b{number}"), "needle").await;
    }
    let lonely = alice.say(&two, "c", "needle").await;
    let more = json!({
        "order_by": "recent", "filter": { "limit": 5 },
        "groupings": { "group_by": [{ "key": "room_id" }, { "key": "sender" }] },
    });
    let page = search(&alice, "needle", more.clone()).await;
    let rooms = page["groups"]["room_id"].as_object().unwrap();
    assert_eq!(rooms.len(), 2, "{page}");
    assert_eq!(rooms[&two]["results"], json!([lonely]));
    assert_eq!(rooms[&two].get("next_batch"), None, "the room has no more");
    assert_eq!(rooms[&two]["order"], 1);
    assert_eq!(rooms[&one]["order"], 2);
    assert_eq!(rooms[&one]["results"].as_array().unwrap().len(), 4);
    let senders = page["groups"]["sender"].as_object().unwrap();
    let mut of_alice: Vec<String> = senders[&alice.user_id]["results"]
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_str().unwrap().to_owned())
        .collect();
    let mut token = senders[&alice.user_id]["next_batch"].clone();
    for _ in 0..5 {
        let further = search_on(&alice, "needle", more.clone(), &token).await;
        for result in further["results"].as_array().unwrap() {
            assert_eq!(result["result"]["sender"], alice.user_id);
        }
        of_alice.extend(ids(&further));
        let Some(next) = further.get("next_batch") else { break };
        token = next.clone();
    }
    expected.reverse();
    expected.insert(0, lonely);
    assert_eq!(of_alice, expected);
    // A token of a group shows nothing of a room that its bearer may not see.
    let carol = server.register("carol").await;
    let token = rooms[&one]["next_batch"].clone();
    assert_eq!(search_on(&carol, "needle", more.clone(), &token).await["results"], json!([]));
    let of_room = search_on(&alice, "needle", more, &token).await;
    assert!(
        of_room["results"].as_array().unwrap().iter().all(|it| it["result"]["room_id"] == one),
        "{of_room}"
    );
    assert!(!ids(&of_room).is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_stands_around_a_result_comes_with_it_if_it_is_asked_for() {
    let server = server();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat", "name": "Place" })).await;
    let rename = |name: &'static str| {
        let alice = alice.clone();
        async move {
            alice
                .ok_put(&format!("/profile/{}/displayname", alice.user_id), json!({ "displayname": name }))
                .await;
        }
    };
    rename("Old Name").await;
    join(&bob, &room).await;
    for number in 0..4 {
        alice.say(&room, &format!("before{number}"), &format!("before {number}")).await;
    }
    bob.say(&room, "needle", "needle").await;
    for number in 0..4 {
        alice.say(&room, &format!("after{number}"), &format!("after {number}")).await;
    }
    rename("New Name").await;
    let more = json!({
        "event_context": { "before_limit": 2, "after_limit": 3, "include_profile": true }, "include_state": true,
    });
    let page = search(&bob, "needle", more).await;
    let context = &page["results"][0]["context"];
    let bodies = |list: &Value| -> Vec<String> {
        list.as_array()
            .unwrap()
            .iter()
            .map(|event| event["content"]["body"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(bodies(&context["events_before"]), ["before 3", "before 2"]);
    assert_eq!(bodies(&context["events_after"]), ["after 0", "after 1", "after 2"]);
    assert_eq!(context["profile_info"][&alice.user_id]["displayname"], "Old Name");
    assert_eq!(context["profile_info"][&bob.user_id]["displayname"], "bob");
    for (token, dir, first) in [("start", "b", "before 1"), ("end", "f", "after 3")] {
        let token = context[token].as_str().unwrap();
        let page = bob.ok_get(&format!("/rooms/{room}/messages?dir={dir}&from={}", encoded(token))).await;
        assert_eq!(page["chunk"][0]["content"]["body"], first);
    }
    let state = page["state"][&room].as_array().unwrap();
    let names: Vec<_> = state.iter().filter(|event| event["type"] == "m.room.name").collect();
    assert_eq!(names.len(), 1, "{state:?}");
    assert_eq!(state.iter().filter(|event| event["type"] == "m.room.member").count(), 2);
    let default = search(&bob, "needle", json!({ "event_context": {} })).await;
    assert_eq!(default["results"][0]["context"]["events_after"].as_array().unwrap().len(), 5, "{default}");
    assert_eq!(default["results"][0]["context"].get("profile_info"), None);
    assert_eq!(default.get("state"), None);
}

#[tokio::test(start_paused = true)]
async fn nobody_finds_what_they_may_not_see_nor_learns_that_it_is_there() {
    let server = server();
    let (alice, bob, carol) =
        (server.register("alice").await, server.register("bob").await, server.register("carol").await);
    let visible = |visibility: &str| {
        json!({ "preset": "public_chat", "initial_state": [
            { "type": "m.room.history_visibility", "content": { "history_visibility": visibility } } ] })
    };
    for visibility in ["world_readable", "shared", "invited", "joined"] {
        let room = alice.create(visible(visibility)).await;
        let word = format!("x{}", visibility.replace('_', ""));
        let before = alice.say(&room, "1", &format!("{word} before")).await;
        join(&bob, &room).await;
        let during = alice.say(&room, "2", &format!("{word} during")).await;
        leave(&bob, &room).await;
        let after = alice.say(&room, "3", &format!("{word} after")).await;
        let found_by_bob = search(&bob, &word, json!({ "order_by": "recent" })).await;
        let expected = match visibility {
            "world_readable" | "shared" => vec![during.clone(), before.clone()],
            _ => vec![during.clone()],
        };
        assert_eq!(ids(&found_by_bob), expected, "{visibility}");
        assert_eq!(found_by_bob["count"], expected.len(), "{visibility}");
        assert_eq!(found_by_bob.get("next_batch"), None);
        let nothing = search(&bob, &format!("{word} after"), json!({})).await;
        assert_eq!((&nothing["results"], &nothing["count"]), (&json!([]), &json!(0)), "{visibility}");
        // A full page always has a token, which leads to nothing where the rest may not be seen.
        let more = json!({ "order_by": "recent", "filter": { "limit": expected.len() } });
        let page = search(&bob, &word, more.clone()).await;
        let rest = search_on(&bob, &word, more, &page["next_batch"]).await;
        assert_eq!((&rest["results"], rest.get("next_batch")), (&json!([]), None), "{visibility}");
        // Carol never was in the room and finds nothing, though everybody may read it.
        let nothing = search(&carol, &word, json!({})).await;
        assert_eq!((&nothing["results"], &nothing["count"]), (&json!([]), &json!(0)), "{visibility}");
        let mut all = found(&alice, &word).await;
        all.sort();
        let mut expected = vec![before, during, after];
        expected.sort();
        assert_eq!(all, expected);
        bob.ok_post(&format!("/rooms/{room}/forget"), json!({})).await;
        let forgotten = search(&bob, &word, json!({})).await;
        assert_eq!((&forgotten["results"], &forgotten["count"]), (&json!([]), &json!(0)), "{visibility}");
    }
}

#[tokio::test(start_paused = true)]
async fn ignored_users_are_not_found() {
    let server = server();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    join(&bob, &room).await;
    let of_alice = alice.say(&room, "1", "needle").await;
    bob.say(&room, "1", "needle").await;
    assert_eq!(found(&alice, "needle").await.len(), 2);
    let list = json!({ "ignored_users": { &bob.user_id: {} } });
    alice.ok_put(&format!("/user/{}/account_data/m.ignored_user_list", alice.user_id), list).await;
    assert_eq!(found(&alice, "needle").await, [of_alice]);
    assert_eq!(found(&bob, "needle").await.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn redacted_text_is_not_found_and_an_edited_message_is_found_by_its_newest_text() {
    let server = server();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    join(&bob, &room).await;
    let message = alice.say(&room, "1", "first words").await;
    let other = alice.say(&room, "2", "first other").await;
    redact(&alice, &room, &other, "r1").await;
    assert_eq!(found(&alice, "first").await, std::slice::from_ref(&message));
    assert_eq!(found(&alice, "other").await, Vec::<String>::new());
    let one = edit(&alice, &room, "3", &message, "second words").await;
    assert_eq!(found(&alice, "first").await, Vec::<String>::new());
    assert_eq!(found(&alice, "second").await, std::slice::from_ref(&message));
    let edited = search(&alice, "second", json!({})).await;
    let bundled = &edited["results"][0]["result"]["unsigned"]["m.relations"]["m.replace"];
    assert_eq!(bundled["content"]["m.new_content"]["body"], "second words", "{edited}");
    assert_eq!(edited["highlights"], json!(["second"]));
    // Somebody who left before an edit finds the message by its own text, and not by what the edit says.
    let later = alice.say(&room, "l1", "third untouched").await;
    let early = alice.say(&room, "l2", "early draft").await;
    leave(&bob, &room).await;
    edit(&alice, &room, "l3", &early, "late version").await;
    assert_eq!(found(&alice, "draft").await, Vec::<String>::new());
    assert_eq!(found(&alice, "version").await, std::slice::from_ref(&early));
    let old = search(&bob, "draft", json!({})).await;
    assert_eq!(
        (&old["count"], &old["results"][0]["result"]["content"]["body"]),
        (&json!(1), &json!("early draft"))
    );
    assert_eq!(old["results"][0]["result"]["unsigned"].get("m.relations"), None, "{old}");
    assert_eq!(old["highlights"], json!(["draft"]));
    assert_eq!(search(&bob, "version", json!({})).await["count"], 0);
    redact(&alice, &room, &early, "l4").await;
    assert_eq!(found(&bob, "draft").await, Vec::<String>::new());
    assert_eq!(found(&bob, "untouched").await, std::slice::from_ref(&later));
    redact(&alice, &room, &later, "l5").await;
    // An edit that says no word that is searched for, and its redaction.
    let wordless = alice.say(&room, "w1", "said in full").await;
    let none = edit(&alice, &room, "w2", &wordless, "...").await;
    assert_eq!(found(&alice, "full").await, Vec::<String>::new());
    redact(&alice, &room, &none, "w3").await;
    assert_eq!(found(&alice, "full").await, [wordless]);
    let two = edit(&alice, &room, "4", &message, "third words").await;
    assert_eq!(found(&alice, "third").await, std::slice::from_ref(&message));
    assert_eq!(found(&bob, "third").await, Vec::<String>::new());
    assert_eq!(search(&bob, "third", json!({})).await["count"], 0);
    // Where an edit is redacted, the one before it counts again; and then the message itself.
    redact(&alice, &room, &two, "r2").await;
    assert_eq!(found(&alice, "third").await, Vec::<String>::new());
    assert_eq!(found(&alice, "second").await, std::slice::from_ref(&message));
    redact(&alice, &room, &one, "r3").await;
    assert_eq!(found(&alice, "second").await, Vec::<String>::new());
    assert_eq!(found(&alice, "first").await, std::slice::from_ref(&message));
    // An edit and its redaction that are read together.
    let three = edit(&alice, &room, "5", &message, "fourth words").await;
    redact(&alice, &room, &three, "r4").await;
    assert_eq!(found(&alice, "fourth").await, Vec::<String>::new());
    assert_eq!(found(&alice, "first").await, std::slice::from_ref(&message));
    redact(&alice, &room, &message, "r5").await;
    assert_eq!(found(&alice, "words").await, Vec::<String>::new());
    // Nobody edits the messages of others.
    let of_alice = alice.say(&room, "6", "untouched").await;
    join(&bob, &room).await;
    edit(&bob, &room, "7", &of_alice, "touched").await;
    assert_eq!(found(&alice, "untouched").await, [of_alice]);
    assert_eq!(found(&alice, "touched").await, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn whoever_left_between_two_edits_finds_the_text_that_they_saw_last_and_learns_of_no_other() {
    let server = server();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    join(&bob, &room).await;
    let message = alice.say(&room, "1", "needle first").await;
    edit(&alice, &room, "2", &message, "needle second").await;
    leave(&bob, &room).await;
    let asked = ["needle", "first", "second", "third", "fourth"];
    let tell = async || {
        let mut told = Vec::new();
        for term in asked {
            let found = search(&bob, term, json!({})).await;
            told.push((ids(&found), found["count"].clone(), found["highlights"].clone()));
        }
        told
    };
    let before = tell().await;
    assert_eq!(before.iter().map(|(ids, ..)| ids.len()).collect::<Vec<_>>(), [1, 0, 1, 0, 0]);
    let third = edit(&alice, &room, "3", &message, "needle third").await;
    assert_eq!(tell().await, before, "a later edit changes nothing for who has left");
    let fourth = edit(&alice, &room, "4", &message, "...").await;
    assert_eq!(tell().await, before);
    assert_eq!(found(&alice, "needle").await, Vec::<String>::new());
    for (txn, edit) in [("5", &fourth), ("6", &third)] {
        redact(&alice, &room, edit, txn).await;
        assert_eq!(tell().await, before, "nor does the redaction of one");
    }
    assert_eq!(found(&alice, "second").await, std::slice::from_ref(&message));
    // The index that is made of the store has the same texts.
    server.server().app().searching.begin_anew().await.unwrap();
    assert_eq!(tell().await, before);
}

#[tokio::test(start_paused = true)]
async fn a_text_that_was_edited_while_one_was_away_is_found_as_one_has_seen_it() {
    let server = server();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let visibility = json!({ "history_visibility": "joined" });
    let state = json!([{ "type": "m.room.history_visibility", "state_key": "", "content": visibility }]);
    let room = alice.create(json!({ "preset": "public_chat", "initial_state": state })).await;
    join(&bob, &room).await;
    let message = alice.say(&room, "1", "needle first").await;
    leave(&bob, &room).await;
    edit(&alice, &room, "2", &message, "needle second").await;
    join(&bob, &room).await;
    assert_eq!(found(&bob, "first").await, std::slice::from_ref(&message));
    assert_eq!(found(&bob, "second").await, Vec::<String>::new());
    let third = edit(&alice, &room, "3", &message, "needle third").await;
    assert_eq!(found(&bob, "third").await, std::slice::from_ref(&message));
    assert_eq!(found(&bob, "first").await, Vec::<String>::new());
    leave(&bob, &room).await;
    edit(&alice, &room, "4", &message, "needle fourth").await;
    join(&bob, &room).await;
    assert_eq!(found(&bob, "third").await, std::slice::from_ref(&message));
    assert_eq!(found(&bob, "needle").await, std::slice::from_ref(&message));
    assert_eq!(found(&bob, "fourth").await, Vec::<String>::new());
    assert_eq!(found(&alice, "fourth").await, std::slice::from_ref(&message));
    redact(&alice, &room, &third, "r").await;
    assert_eq!(found(&bob, "first").await, std::slice::from_ref(&message));
    assert_eq!(found(&bob, "third").await, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_message_of_many_edits_is_found_by_its_newest() {
    let server = server();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    let message = alice.say(&room, "m", "needle").await;
    for number in 0..40 {
        // If some were sent at the same time, the one whose id comes last would count.
        server.server().app().env.sleep(std::time::Duration::from_millis(5)).await;
        edit(&alice, &room, &number.to_string(), &message, &format!("needle word{number}")).await;
    }
    assert_eq!(found(&alice, "needle").await, std::slice::from_ref(&message));
    assert_eq!(found(&alice, "word39").await, std::slice::from_ref(&message));
    assert_eq!(found(&alice, "word38").await, Vec::<String>::new());
    let status = server.server().app().searching.progress(&server.server().app().store).unwrap();
    assert_eq!(status.documents, 33, "the texts that are kept are bounded");
}

#[tokio::test(start_paused = true)]
async fn encrypted_rooms_are_left_out() {
    let server = server();
    let alice = server.register("alice").await;
    let room = alice.create(json!({ "name": "needle room" })).await;
    alice.say(&room, "1", "needle before").await;
    assert_eq!(found(&alice, "needle").await.len(), 2);
    set(&alice, &room, "m.room.encryption", json!({ "algorithm": "m.megolm.v1.aes-sha2" })).await;
    alice.say(&room, "2", "needle in the clear").await;
    let none = search(&alice, "needle", json!({})).await;
    assert_eq!((&none["results"], &none["count"]), (&json!([]), &json!(0)));
    let status = server.server().app().searching.progress(&server.server().app().store).unwrap();
    assert_eq!((status.documents, status.lag), (0, 0), "nothing of the room is kept");
}

#[tokio::test(start_paused = true)]
async fn what_an_erased_user_wrote_is_not_found() {
    let server = server();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    join(&bob, &room).await;
    alice.say(&room, "1", "needle of alice").await;
    let of_bob = bob.say(&room, "1", "needle of bob").await;
    assert_eq!(found(&bob, "needle").await.len(), 2);
    let auth = json!({
        "type": "m.login.password", "identifier": { "type": "m.id.user", "user": "alice" }, "password": "password of alice",
    });
    alice.ok_post("/account/deactivate", json!({ "auth": auth, "erase": true })).await;
    assert_eq!(found(&bob, "needle").await, [of_bob]);
    let status = server.server().app().searching.progress(&server.server().app().store).unwrap();
    assert_eq!(status.documents, 1, "nothing that she wrote is kept");
}

#[tokio::test(start_paused = true)]
async fn filters_choose_rooms_senders_types_and_content() {
    let server = server();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (one, two) = (
        alice.create(json!({ "preset": "public_chat" })).await,
        alice.create(json!({ "preset": "public_chat" })).await,
    );
    join(&bob, &one).await;
    let a1 = alice.say(&one, "1", "needle").await;
    let b1 = bob.say(&one, "1", "needle").await;
    let a2 = alice.say(&two, "2", "needle").await;
    let picture = json!({ "msgtype": "m.image", "body": "needle.png", "url": "mxc://test.example/abc" });
    let picture = send(&alice, &two, "3", picture).await;
    let name = set(&alice, &two, "m.room.name", json!({ "name": "needle" })).await;
    for (filter, expected) in [
        (json!({}), vec![&name, &picture, &a2, &b1, &a1]),
        (json!({ "rooms": [one] }), vec![&b1, &a1]),
        (json!({ "rooms": [] }), vec![]),
        (json!({ "rooms": ["!elsewhere:test.example"] }), vec![]),
        (json!({ "not_rooms": [one] }), vec![&name, &picture, &a2]),
        (json!({ "rooms": [one, two], "not_rooms": [two] }), vec![&b1, &a1]),
        (json!({ "senders": [bob.user_id] }), vec![&b1]),
        (json!({ "senders": [] }), vec![]),
        (json!({ "not_senders": [bob.user_id] }), vec![&name, &picture, &a2, &a1]),
        (json!({ "senders": [bob.user_id], "not_senders": [bob.user_id] }), vec![]),
        (json!({ "types": ["m.room.name"] }), vec![&name]),
        (json!({ "types": ["m.room.*"], "not_types": ["m.room.name"] }), vec![&picture, &a2, &b1, &a1]),
        (json!({ "types": ["m.sticker"] }), vec![]),
        (json!({ "contains_url": true }), vec![&picture]),
        (json!({ "contains_url": false }), vec![&name, &a2, &b1, &a1]),
        (json!({ "limit": 2 }), vec![&name, &picture]),
    ] {
        let found = search(&alice, "needle", json!({ "filter": filter, "order_by": "recent" })).await;
        assert_eq!(ids(&found).iter().collect::<Vec<_>>(), expected, "{filter}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_room_that_is_named_stands_for_those_that_it_replaced() {
    let server = server();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let old = alice.create(json!({ "preset": "public_chat" })).await;
    let before = alice.say(&old, "1", "needle").await;
    let upgraded =
        alice.ok_post(&format!("/rooms/{}/upgrade", encoded(&old)), json!({ "new_version": "11" })).await;
    let new = upgraded["replacement_room"].as_str().unwrap().to_owned();
    join(&bob, &new).await;
    let after = alice.say(&new, "2", "needle").await;
    let in_new = json!({ "filter": { "rooms": [new] }, "order_by": "recent" });
    assert_eq!(ids(&search(&alice, "needle", in_new.clone()).await), [after.clone(), before.clone()]);
    assert_eq!(
        ids(&search(&bob, "needle", in_new).await),
        std::slice::from_ref(&after),
        "bob was never in the old room"
    );
    let only_old = json!({ "filter": { "rooms": [old] } });
    assert_eq!(ids(&search(&alice, "needle", only_old).await), [before]);
    let without = json!({ "filter": { "rooms": [new], "not_rooms": [old] } });
    assert_eq!(ids(&search(&alice, "needle", without).await), [after]);
}

#[tokio::test(start_paused = true)]
async fn hostile_searches_are_refused_or_harmless() {
    let server = server();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    let sent =
        alice.say(&room, "1", r#"body:secret AND (a OR b) "quoted" wild* /re.*x/ [1 TO 2] ~2 ^3"#).await;
    for term in [
        "body:secret",
        "\"quoted\"",
        "wild*",
        "a OR b",
        "a AND",
        "(a",
        "/re.*x/",
        "[1 TO 2]",
        "re.*",
        "*",
        "~",
        "^3",
        "\\",
        "{",
        "+secret",
        "secret^1000000",
        "sender:alice",
        "\u{0}secret\u{202e}",
    ] {
        let found = search(&alice, term, json!({})).await;
        for id in ids(&found) {
            assert_eq!(id, sent, "{term}");
        }
    }
    assert_eq!(found(&alice, "body:secret").await, std::slice::from_ref(&sent), "signs are no syntax");
    assert_eq!(found(&alice, "NOT secret").await, Vec::<String>::new(), "words are words");
    let (long, many) = ("x".repeat(2_001), (0..41).map(|number| format!("w{number} ")).collect::<String>());
    for (term, more, needs) in [
        (long.as_str(), json!({}), "2001 bytes"),
        (many.as_str(), json!({}), "41 different words"),
        ("x", json!({ "keys": ["content.secret"] }), "content.secret"),
        ("x", json!({ "order_by": "worst" }), "worst"),
        ("x", json!({ "groupings": { "group_by": [{ "key": "type" }] } }), "type"),
        ("x", json!({ "filter": { "types": ["*".repeat(101)] } }), "types"),
    ] {
        let (status, refused) = alice.post(SEARCH, body(term, more)).await;
        assert_eq!(
            (status, &refused["errcode"]),
            (StatusCode::BAD_REQUEST, &json!("M_INVALID_PARAM")),
            "{refused}"
        );
        assert!(refused["error"].as_str().unwrap().contains(needs), "{refused}");
    }
    assert_eq!(search(&alice, "secret", json!({ "keys": [] })).await["results"], json!([]));
    for token in ["", "x", "r1_2_3", "n1_2_3_4", "r1_2_3_4_nobody", "r99999999999_1_1_1", "r1_2_3_4_!a_b"] {
        let path = format!("{SEARCH}?next_batch={}", encoded(token));
        let (status, refused) = alice.post(&path, body("secret", json!({}))).await;
        let expected = if token.ends_with("!a_b") { StatusCode::OK } else { StatusCode::BAD_REQUEST };
        assert_eq!(status, expected, "{token}: {refused}");
    }
    // Everything that a filter may name, at once.
    let many: Vec<String> = (0..1_000).map(|number| format!("@user{number}:test.example")).collect();
    let found = search(&alice, "secret", json!({ "filter": { "senders": many } })).await;
    assert_eq!(found["results"], json!([]));
    assert_eq!(alice.post(SEARCH, json!({})).await.0, StatusCode::BAD_REQUEST);
    assert_eq!(server.anonymous().post(SEARCH, body("x", json!({}))).await.0, StatusCode::UNAUTHORIZED);
}

#[tokio::test(start_paused = true)]
async fn guests_do_not_search_and_nobody_does_where_search_is_off() {
    let server = TestServer::with(|config| {
        on(config);
        config.registration.guests = true;
    });
    let (_, guest) = server.anonymous().post("/_matrix/client/v3/register?kind=guest", json!({})).await;
    let guest = guest["access_token"].as_str().unwrap().to_owned();
    let asked = body("x", json!({})).to_string();
    let (status, refused) = server.raw(http::Method::POST, SEARCH, Some(&guest), asked).await;
    assert_eq!((status, &refused["errcode"]), (StatusCode::FORBIDDEN, &json!("M_GUEST_ACCESS_FORBIDDEN")));
    let off = TestServer::new();
    let alice = off.register("alice").await;
    let (status, refused) = alice.post(SEARCH, body("x", json!({}))).await;
    assert_eq!((status, &refused["errcode"]), (StatusCode::NOT_FOUND, &json!("M_UNRECOGNIZED")));
}

#[tokio::test(start_paused = true)]
async fn what_fills_a_hole_in_the_past_of_a_room_is_found() {
    let federated = Federated::with(&["a.example", "b.example"], on);
    let alice = federated.server(0).register("alice").await;
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    let mut sent = Vec::new();
    for number in 0..8 {
        sent.push(alice.say(&room, &number.to_string(), "needle").await);
    }
    let bob = federated.server(1).register("bob").await;
    bob.ok_post(&format!("/join/{}?server_name=a.example", encoded(&room)), json!({})).await;
    assert_eq!(found(&bob, "needle").await, Vec::<String>::new(), "the past is not here yet");
    let page = bob.ok_get(&format!("/rooms/{}/messages?dir=b&limit=50", encoded(&room))).await;
    let read =
        page["chunk"].as_array().unwrap().iter().filter(|event| event["type"] == "m.room.message").count();
    assert_eq!(read, sent.len());
    let mut all = found(&bob, "needle").await;
    all.sort();
    sent.sort();
    assert_eq!(all, sent);
    // It is found as well where the index is built anew.
    federated.server(1).server().app().searching.begin_anew().await.unwrap();
    assert_eq!(found(&bob, "needle").await.len(), sent.len());
}

#[tokio::test(start_paused = true)]
async fn messages_whose_lifetime_is_over_leave_the_index() {
    let server = server();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    let lifetime = json!({ "max_lifetime": 24 * 60 * 60 * 1000 });
    set(&alice, &room, "m.room.retention", lifetime).await;
    alice.say(&room, "1", "needle early").await;
    let app = server.server().app();
    app.env.sleep(std::time::Duration::from_secs(12 * 60 * 60)).await;
    let late = alice.say(&room, "2", "needle late").await;
    assert_eq!(search(&alice, "needle", json!({})).await["count"], 2);
    app.env.sleep(std::time::Duration::from_secs(13 * 60 * 60)).await;
    assert_eq!(found(&alice, "needle").await, [late]);
    assert_eq!(app.searching.progress(&app.store).unwrap().documents, 1);
}
