//! Stays in a room: who left, was kicked or banned is told nothing of after that, whatever was done with their membership
//! since; who comes back is told what they missed.

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    support::{TestClient, TestServer, encoded},
    sync::{Chain, act, bodies, create_room, events, must, say, send, set_state},
};

/// Every message that is sent while bob is out has this word in it.
const SECRET: &str = "unseen";

/// A room in which bob was for a while.
struct Stay {
    alice: TestClient,
    bob: TestClient,
    carol: TestClient,
    room: String,
    /// A message of alice's that bob saw, and one that grew a thread.
    seen: String,
    root: String,
}

impl Stay {
    async fn in_room(server: &TestServer, visibility: &str) -> Self {
        let (alice, bob) = (server.register("alice").await, server.register("bob").await);
        let carol = server.register("carol").await;
        let state = json!([{
            "type": "m.room.history_visibility", "content": { "history_visibility": visibility },
        }]);
        let room = create_room(&alice, json!({ "preset": "public_chat", "initial_state": state })).await;
        must(&bob, &room, "join", json!({})).await;
        let seen = say(&alice, &room, "for bob").await;
        let root = say(&alice, &room, "root").await;
        send(&alice, &room, "in thread", threaded(&root, "in thread")).await;
        Self { alice, bob, carol, room, seen, root }
    }

    /// Everything that bob may not learn of. Returns the events.
    async fn go_on(&self, number: usize) -> Vec<String> {
        let Self { alice, carol, room, seen, root, .. } = self;
        let text = format!("{SECRET} {number}");
        let mut sent = Vec::new();
        sent.push(set_state(alice, room, "m.room.topic", "", json!({ "topic": text })).await);
        must(carol, room, "join", json!({})).await;
        let content = json!({ "membership": "join", "displayname": text });
        sent.push(set_state(carol, room, "m.room.member", &carol.user_id, content).await);
        sent.push(say(alice, room, &text).await);
        let edit = json!({
            "msgtype": "m.text", "body": text, "m.new_content": { "msgtype": "m.text", "body": text },
            "m.relates_to": { "rel_type": "m.replace", "event_id": seen },
        });
        sent.push(send(alice, room, &format!("edit {number}"), edit).await);
        sent.push(send(alice, room, &format!("thread {number}"), threaded(root, &text)).await);
        let reference = json!({
            "msgtype": "m.text", "body": text,
            "m.relates_to": { "rel_type": "m.reference", "event_id": seen },
        });
        sent.push(send(alice, room, &format!("reference {number}"), reference).await);
        must(carol, room, "leave", json!({})).await;
        sent
    }

    /// The answers about the room by every endpoint but `/sync`, as bob gets them.
    async fn doors(&self, unseen: &[String]) -> Vec<String> {
        let room = format!("/_matrix/client/v1/rooms/{}", self.room);
        let old = format!("/_matrix/client/v3/rooms/{}", self.room);
        let mut paths = vec![
            format!("{old}/messages?dir=b&limit=100"),
            format!("{old}/messages?dir=f&limit=100"),
            format!("{old}/state"),
            format!("{old}/state/m.room.topic"),
            format!("{old}/members"),
            format!("{room}/threads"),
        ];
        for event in [&self.seen, &self.root].into_iter().chain(unseen) {
            let event = encoded(event);
            paths.push(format!("{old}/event/{event}"));
            paths.push(format!("{old}/context/{event}"));
            paths.push(format!("{room}/relations/{event}"));
        }
        let mut answers = Vec::new();
        for path in paths {
            let (status, json) = self.bob.get(&path).await;
            answers.push(format!("{status} {path} {json}"));
        }
        answers
    }
}

fn threaded(root: &str, text: &str) -> Value {
    json!({
        "msgtype": "m.text", "body": text,
        "m.relates_to": { "rel_type": "m.thread", "event_id": root },
    })
}

fn assert_unseen(answer: &str, moment: &str) {
    assert!(!answer.contains(SECRET), "{moment}: {answer}");
}

/// The ways in which bob goes, and what is done with his membership afterwards.
const WAYS_OUT: [&[(&str, &str)]; 7] = [
    &[("alice", "kick")],
    &[("alice", "kick"), ("alice", "ban")],
    &[("alice", "ban"), ("alice", "unban")],
    &[("alice", "kick"), ("alice", "invite"), ("bob", "leave")],
    &[("bob", "leave"), ("bob", "knock"), ("bob", "leave")],
    &[("alice", "ban"), ("alice", "unban"), ("alice", "invite")],
    &[("alice", "kick"), ("alice", "ban"), ("alice", "unban"), ("alice", "invite"), ("bob", "leave")],
];

async fn change(stay: &Stay, who: &str, what: &str) {
    let room = &stay.room;
    match (who, what) {
        ("bob", "knock") => {
            let rule = json!({ "join_rule": "knock" });
            set_state(&stay.alice, room, "m.room.join_rules", "", rule).await;
            let (status, json) = stay.bob.post(&format!("/_matrix/client/v3/knock/{room}"), json!({})).await;
            assert_eq!(status, StatusCode::OK, "{json}");
            let rule = json!({ "join_rule": "public" });
            set_state(&stay.alice, room, "m.room.join_rules", "", rule).await;
        }
        ("bob", what) => must(&stay.bob, room, what, json!({})).await,
        (_, what) => must(&stay.alice, room, what, json!({ "user_id": stay.bob.user_id })).await,
    }
}

#[tokio::test(start_paused = true)]
async fn who_is_out_of_a_room_is_told_nothing_of_after_that_by_any_door() {
    for visibility in ["shared", "joined"] {
        for way in WAYS_OUT {
            let server = TestServer::new();
            let stay = Stay::in_room(&server, visibility).await;
            let moment = format!("{visibility}, {way:?}");
            let (mut at_once, mut at_the_end) = (Chain::of(&stay.bob), Chain::of(&stay.bob));
            let mut after = Chain::of(&stay.bob);
            after.query = "&use_state_after=true".to_owned();
            for chain in [&mut at_once, &mut at_the_end, &mut after] {
                chain.next().await;
            }
            let mut unseen = Vec::new();
            for (number, (who, what)) in way.iter().enumerate() {
                change(&stay, who, what).await;
                unseen.extend(stay.go_on(number).await);
                let answer = at_once.next().await.to_string();
                // An invitation shows the room as it is: it is meant to.
                if *what != "invite" && *what != "knock" {
                    assert_unseen(&answer, &moment);
                }
            }
            let is_invited = way.last() == Some(&("alice", "invite"));
            let leave = json!({ "room": { "include_leave": true } });
            for mut chain in [at_the_end, after, Chain::filtered(&stay.bob, leave)] {
                let answer = chain.next().await;
                if is_invited {
                    assert!(answer["rooms"]["leave"].get(&stay.room).is_none(), "{moment}: {answer}");
                } else {
                    let timeline = events(&answer, "leave", &stay.room, "timeline");
                    assert!(!timeline.is_empty(), "{moment}: {answer}");
                    assert_unseen(&answer.to_string(), &moment);
                }
            }
            for answer in stay.doors(&unseen).await {
                assert_unseen(&answer, &moment);
            }
            // Bob still sees the event that he saw, without what was done to it since.
            let path = format!("/_matrix/client/v3/rooms/{}/event/{}", stay.room, encoded(&stay.seen));
            let (status, json) = stay.bob.get(&path).await;
            assert_eq!((status, &json["content"]["body"]), (StatusCode::OK, &json!("for bob")), "{moment}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_forgotten_room_answers_at_no_door_even_when_its_user_is_invited_again() {
    for visibility in ["shared", "joined", "invited"] {
        let server = TestServer::new();
        let stay = Stay::in_room(&server, visibility).await;
        must(&stay.bob, &stay.room, "leave", json!({})).await;
        let unseen = stay.go_on(0).await;
        must(&stay.bob, &stay.room, "forget", json!({})).await;
        for answer in stay.doors(&unseen).await {
            assert!(answer.starts_with("403") || answer.starts_with("404"), "{visibility}: {answer}");
        }
        must(&stay.alice, &stay.room, "invite", json!({ "user_id": stay.bob.user_id })).await;
        for answer in stay.doors(&unseen).await {
            let is_refused = answer.starts_with("403") || answer.starts_with("404");
            let is_bare = !answer.contains("for bob") && !answer.contains(SECRET) && !answer.contains("root");
            assert!(is_refused || is_bare, "{visibility}, invited: {answer}");
        }
        let path = format!("/_matrix/client/v3/rooms/{}/event/{}", stay.room, encoded(&stay.seen));
        assert_eq!(stay.bob.get(&path).await.0, StatusCode::NOT_FOUND, "{visibility}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_sent_while_a_reader_was_out_is_in_no_bundle_when_they_are_back() {
    let server = TestServer::new();
    let stay = Stay::in_room(&server, "joined").await;
    must(&stay.bob, &stay.room, "leave", json!({})).await;
    let unseen = stay.go_on(0).await;
    must(&stay.bob, &stay.room, "join", json!({})).await;
    for event in [&stay.seen, &stay.root] {
        for door in
            ["v3/rooms/ROOM/event/EVENT", "v3/rooms/ROOM/context/EVENT", "v1/rooms/ROOM/relations/EVENT"]
        {
            let path = door.replace("ROOM", &stay.room).replace("EVENT", &encoded(event));
            let (status, json) = stay.bob.get(&format!("/_matrix/client/{path}")).await;
            assert_eq!(status, StatusCode::OK, "{path} {json}");
            let text = json.to_string();
            // The state that stands around an event is the room's, and bob is in it again.
            let text = if door.contains("context") { json["event"].to_string() } else { text };
            assert_unseen(&text, door);
            assert!(unseen.iter().all(|id| !text.contains(id.as_str())), "{door}: {text}");
        }
    }
    let (_, threads) = stay.bob.get(&format!("/_matrix/client/v1/rooms/{}/threads", stay.room)).await;
    let bundle = &threads["chunk"][0]["unsigned"]["m.relations"]["m.thread"];
    assert_eq!(
        (&bundle["count"], &bundle["latest_event"]["content"]["body"]),
        (&json!(1), &json!("in thread"))
    );
    let filter = json!({ "room": { "timeline": { "types": ["m.room.message"], "limit": 50 } } });
    let answer = Chain::filtered(&stay.bob, filter).next().await;
    let timeline = json!(events(&answer, "join", &stay.room, "timeline")).to_string();
    assert!(timeline.contains("for bob"), "{timeline}");
    assert_unseen(&timeline, "sync");
}

#[tokio::test(start_paused = true)]
async fn who_joins_and_leaves_in_one_gap_is_told_of_the_whole_stay() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
    let mut chain = Chain::of(&bob);
    chain.next().await;
    must(&bob, &room, "join", json!({})).await;
    for number in 0..12 {
        say(&alice, &room, &format!("m{number}")).await;
    }
    must(&bob, &room, "leave", json!({})).await;
    let answer = chain.next().await;
    let left = &answer["rooms"]["leave"][&room];
    assert_eq!(left["timeline"]["limited"], true, "{answer}");
    let told = left["state"]["events"].as_array().unwrap();
    assert!(told.iter().any(|event| event["type"] == "m.room.create"), "{answer}");
    assert_eq!(answer["device_lists"]["left"], json!([alice.user_id]));
}

#[tokio::test(start_paused = true)]
async fn who_leaves_and_is_invited_in_one_gap_is_told_whose_keys_to_forget() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
    must(&bob, &room, "join", json!({})).await;
    let mut chain = Chain::of(&bob);
    chain.next().await;
    must(&bob, &room, "leave", json!({})).await;
    must(&alice, &room, "invite", json!({ "user_id": bob.user_id })).await;
    let answer = chain.next().await;
    assert!(answer["rooms"]["invite"].get(&room).is_some(), "{answer}");
    assert_eq!(answer["device_lists"]["left"], json!([alice.user_id]));
}

#[tokio::test(start_paused = true)]
async fn who_comes_back_learns_who_came_back_before_though_members_are_loaded_lazily() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let carol = server.register("carol").await;
    let room = create_room(&alice, json!({ "preset": "public_chat", "name": "A name" })).await;
    for user in [&bob, &carol] {
        must(user, &room, "join", json!({})).await;
    }
    let lazy = json!({ "room": { "state": { "lazy_load_members": true }, "timeline": { "limit": 1 } } });
    let mut chain = Chain::filtered(&carol, lazy);
    chain.next().await;
    must(&bob, &room, "leave", json!({})).await;
    chain.next().await;
    must(&carol, &room, "leave", json!({})).await;
    chain.next().await;
    must(&bob, &room, "join", json!({})).await;
    for number in 0..3 {
        say(&alice, &room, &format!("m{number}")).await;
    }
    must(&carol, &room, "join", json!({})).await;
    let answer = chain.next().await;
    let state = events(&answer, "join", &room, "state");
    let bobs = state.iter().find(|event| event["state_key"] == bob.user_id.as_str());
    assert_eq!(bobs.unwrap()["content"]["membership"], "join", "{answer}");
}

#[tokio::test(start_paused = true)]
async fn what_changed_while_a_reader_was_out_stands_in_state_when_they_are_back() {
    let server = TestServer::new();
    let stay = Stay::in_room(&server, "joined").await;
    let mut chain = Chain::of(&stay.bob);
    chain.next().await;
    must(&stay.bob, &stay.room, "leave", json!({})).await;
    set_state(&stay.alice, &stay.room, "m.room.topic", "", json!({ "topic": "new" })).await;
    must(&stay.carol, &stay.room, "join", json!({})).await;
    must(&stay.bob, &stay.room, "join", json!({})).await;
    let answer = chain.next().await;
    let state = events(&answer, "join", &stay.room, "state");
    let topic = state.iter().find(|event| event["type"] == "m.room.topic");
    assert_eq!(topic.unwrap()["content"]["topic"], "new", "{answer}");
    assert!(state.iter().any(|event| event["state_key"] == stay.carol.user_id.as_str()), "{answer}");
    assert_eq!(answer["rooms"]["join"][&stay.room]["timeline"]["limited"], true);
}

#[tokio::test(start_paused = true)]
async fn a_second_invitation_with_another_reason_is_told() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = create_room(&alice, json!({})).await;
    let mut chain = Chain::of(&bob);
    chain.next().await;
    for reason in ["first", "second"] {
        must(&alice, &room, "invite", json!({ "user_id": bob.user_id, "reason": reason })).await;
        let answer = chain.next().await;
        let state = answer["rooms"]["invite"][&room]["invite_state"]["events"].as_array().cloned();
        let own =
            state.unwrap_or_default().into_iter().find(|event| event["state_key"] == bob.user_id.as_str());
        assert_eq!(own.unwrap()["content"]["reason"], reason, "{answer}");
        assert!(chain.next().await.get("rooms").is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn pages_of_a_room_that_was_open_for_a_time_agree_with_its_events_in_both_directions() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let carol = server.register("carol").await;
    let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
    must(&bob, &room, "join", json!({})).await;
    let visibility = async |word: &str| {
        let content = json!({ "history_visibility": word });
        set_state(&alice, &room, "m.room.history_visibility", "", content).await;
    };
    must(&bob, &room, "leave", json!({})).await;
    let mut sent = Vec::new();
    for (text, word) in [("closed", "world_readable"), ("open", "joined"), ("closed again", "shared")] {
        sent.push((text, say(&alice, &room, text).await));
        visibility(word).await;
    }
    for reader in [&bob, &carol] {
        let mut pages = Vec::new();
        for direction in ["b", "f"] {
            let path = format!("/_matrix/client/v3/rooms/{room}/messages?dir={direction}&limit=100");
            let (status, page) = reader.get(&path).await;
            assert_eq!(status, StatusCode::OK, "{} {page}", reader.user_id);
            pages.push(page["chunk"].to_string());
        }
        for (text, id) in &sent {
            let path = format!("/_matrix/client/v3/rooms/{room}/event/{}", encoded(id));
            let sees = reader.get(&path).await.0 == StatusCode::OK;
            assert_eq!(sees, *text == "open", "{} {text}", reader.user_id);
            assert!(pages.iter().all(|page| page.contains(id.as_str()) == sees), "{} {text}", reader.user_id);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn ignored_users_are_heard_at_no_door() {
    let server = TestServer::new();
    let stay = Stay::in_room(&server, "shared").await;
    let Stay { alice, bob, carol, room, root, seen } = &stay;
    must(carol, room, "join", json!({})).await;
    let noise = send(carol, room, "noise", threaded(root, "noise")).await;
    let path = format!("/_matrix/client/v3/user/{}/account_data/m.ignored_user_list", bob.user_id);
    bob.ok_put(&path, json!({ "ignored_users": { &carol.user_id: {} } })).await;
    for door in [
        "v3/rooms/ROOM/messages?dir=b",
        "v3/rooms/ROOM/context/SEEN",
        "v1/rooms/ROOM/relations/ROOT",
        "v1/rooms/ROOM/threads",
    ] {
        let path = door.replace("ROOM", room).replace("SEEN", &encoded(seen)).replace("ROOT", &encoded(root));
        let (status, json) = bob.get(&format!("/_matrix/client/{path}")).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        assert!(!json.to_string().contains(&noise), "{door}: {json}");
        if door.ends_with("threads") {
            let bundle = &json["chunk"][0]["unsigned"]["m.relations"]["m.thread"];
            assert_eq!(bundle["count"], 1, "{json}");
        }
    }
    // A thread in which only carol spoke, whom bob ignores, is not listed as one.
    let own = say(alice, room, "another root").await;
    send(carol, room, "more noise", threaded(&own, "more noise")).await;
    let (_, json) = bob.get(&format!("/_matrix/client/v1/rooms/{room}/threads")).await;
    assert_eq!(json["chunk"].as_array().unwrap().len(), 1, "{json}");
}

#[tokio::test(start_paused = true)]
async fn context_with_lazy_members_has_the_rest_of_the_state() {
    let server = TestServer::new();
    let stay = Stay::in_room(&server, "shared").await;
    let filter = encoded(&json!({ "lazy_load_members": true }).to_string());
    let path =
        format!("/_matrix/client/v3/rooms/{}/context/{}?filter={filter}", stay.room, encoded(&stay.seen));
    let (status, json) = stay.bob.get(&path).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    let state = json["state"].as_array().unwrap();
    let has = |event_type: &str, key: &str| {
        state.iter().any(|event| event["type"] == event_type && event["state_key"] == key)
    };
    assert!(has("m.room.create", "") && has("m.room.power_levels", ""), "{json}");
    assert!(has("m.room.member", &stay.alice.user_id), "{json}");
}

#[tokio::test(start_paused = true)]
async fn heroes_are_told_when_a_name_goes_and_found_behind_many_who_are_banned() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("zoe").await);
    let room = create_room(&alice, json!({ "preset": "public_chat", "name": "A name" })).await;
    must(&bob, &room, "join", json!({})).await;
    for number in 0..110 {
        let user_id = format!("@a{number:03}:elsewhere.example");
        let (status, json) = act(&alice, &room, "ban", json!({ "user_id": user_id })).await;
        assert_eq!(status, StatusCode::OK, "{json}");
    }
    for query in ["", "&use_state_after=true"] {
        let lazy = json!({ "room": { "state": { "lazy_load_members": true } } });
        let mut chain = Chain::filtered(&alice, lazy);
        chain.query = query.to_owned();
        chain.next().await;
        set_state(&alice, &room, "m.room.name", "", json!({ "name": "" })).await;
        let answer = chain.next().await;
        let summary = &answer["rooms"]["join"][&room]["summary"];
        assert_eq!(summary["m.heroes"], json!([bob.user_id]), "{answer}");
        set_state(&alice, &room, "m.room.name", "", json!({ "name": "Again" })).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_timeline_is_bounded_in_bytes_and_says_that_it_is_limited() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
    must(&bob, &room, "join", json!({})).await;
    let filter = json!({ "room": { "timeline": { "limit": 1000 } } });
    let mut chain = Chain::filtered(&bob, filter);
    chain.next().await;
    for number in 0..40 {
        let body = format!("{number} {}", "x".repeat(50_000));
        send(&alice, &room, &number.to_string(), json!({ "msgtype": "m.text", "body": body })).await;
    }
    let answer = chain.next().await;
    assert_eq!(answer["rooms"]["join"][&room]["timeline"]["limited"], true);
    let bodies = bodies(&answer, &room);
    assert!((10..25).contains(&bodies.len()), "{}", bodies.len());
    assert!(bodies.last().unwrap().starts_with("39 "), "the newest are told");
}

/// Gives all that a leave tells of the room, as text: the events beside the timeline and those in it.
fn told_of(answer: &Value, room: &str, is_after: bool) -> String {
    let part = if is_after { "state_after" } else { "state" };
    let told = [events(answer, "leave", room, part), events(answer, "leave", room, "timeline")].concat();
    json!(told).to_string()
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_stay_that_an_invitation_or_a_knock_hid_is_told_when_that_ends() {
    for (comes, goes) in [
        (("alice", "invite"), ("bob", "leave")),
        (("alice", "invite"), ("alice", "kick")),
        (("alice", "invite"), ("alice", "ban")),
        (("bob", "knock"), ("bob", "leave")),
    ] {
        for is_after in [false, true] {
            let server = TestServer::new();
            let stay = Stay::in_room(&server, "shared").await;
            let moment = format!("{comes:?}, {goes:?}, {is_after}");
            let mut chain = Chain::of(&stay.bob);
            if is_after {
                chain.query = "&use_state_after=true".to_owned();
            }
            chain.next().await;
            let room = &stay.room;
            let last = say(&stay.alice, room, "the last message").await;
            let topic = json!({ "topic": "the last topic" });
            let topic = set_state(&stay.alice, room, "m.room.topic", "", topic).await;
            change(&stay, "alice", "kick").await;
            change(&stay, comes.0, comes.1).await;
            stay.go_on(0).await;
            let answer = chain.next().await;
            assert!(answer["rooms"]["leave"].get(room).is_none(), "{moment}: {answer}");
            change(&stay, goes.0, goes.1).await;
            stay.go_on(1).await;
            let answer = chain.next().await;
            let left = &answer["rooms"]["leave"][room];
            assert_eq!(left["timeline"]["limited"], true, "{moment}: {answer}");
            let told = told_of(&answer, room, is_after);
            assert!(told.contains(&last) && told.contains(&topic), "{moment}: {answer}");
            let own = |event: &Value| {
                (event["state_key"] == stay.bob.user_id.as_str())
                    .then(|| (event["sender"].clone(), event["content"]["membership"].clone()))
            };
            let timeline = events(&answer, "leave", room, "timeline");
            let ends: Vec<_> = timeline.iter().filter_map(|event| own(event)).collect();
            let kick = (json!(stay.alice.user_id), json!("leave"));
            assert!(ends.contains(&kick), "{moment}: {answer}");
            let is_own = goes.0 == "bob";
            let by = if is_own { &stay.bob.user_id } else { &stay.alice.user_id };
            let word = if goes.1 == "ban" { "ban" } else { "leave" };
            assert_eq!(ends.last(), Some(&(json!(by), json!(word))), "{moment}: {answer}");
            assert_unseen(&answer["rooms"]["leave"].to_string(), &moment);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_invitation_that_is_withheld_does_not_hide_the_end_of_a_stay() {
    for is_after in [false, true] {
        let server = TestServer::new();
        let stay = Stay::in_room(&server, "shared").await;
        let path = format!("/_matrix/client/v3/user/{}/account_data/m.ignored_user_list", stay.bob.user_id);
        stay.bob.ok_put(&path, json!({ "ignored_users": { &stay.alice.user_id: {} } })).await;
        let mut chain = Chain::of(&stay.bob);
        if is_after {
            chain.query = "&use_state_after=true".to_owned();
        }
        chain.next().await;
        let topic = json!({ "topic": "the last topic" });
        set_state(&stay.alice, &stay.room, "m.room.topic", "", topic).await;
        change(&stay, "alice", "kick").await;
        change(&stay, "alice", "invite").await;
        stay.go_on(0).await;
        let answer = chain.next().await;
        assert!(answer["rooms"]["invite"].get(&stay.room).is_none(), "{answer}");
        assert!(told_of(&answer, &stay.room, is_after).contains("the last topic"), "{answer}");
        let timeline = events(&answer, "leave", &stay.room, "timeline");
        assert_eq!(timeline.last().unwrap()["content"]["membership"], "leave", "{answer}");
        assert!(!answer["rooms"]["leave"].to_string().contains("\"invite\""), "{answer}");
        assert_unseen(&answer.to_string(), "withheld");
        say(&stay.alice, &stay.room, SECRET).await;
        assert!(chain.next().await["rooms"]["leave"].get(&stay.room).is_none(), "it is told once");
    }
}

#[tokio::test(start_paused = true)]
async fn who_left_sees_the_state_of_then_where_everybody_may_look_in() {
    let server = TestServer::new();
    let stay = Stay::in_room(&server, "world_readable").await;
    set_state(&stay.alice, &stay.room, "m.room.topic", "", json!({ "topic": "then" })).await;
    must(&stay.bob, &stay.room, "leave", json!({})).await;
    stay.go_on(0).await;
    must(&stay.carol, &stay.room, "join", json!({})).await;
    let path = format!("/_matrix/client/v3/rooms/{}", stay.room);
    for door in ["state", "state/m.room.topic", "members"] {
        let (status, json) = stay.bob.get(&format!("{path}/{door}")).await;
        assert_eq!(status, StatusCode::OK, "{door}: {json}");
        let is_of_then = !json.to_string().contains(SECRET) && !json.to_string().contains("@carol");
        assert!(is_of_then, "{door}: {json}");
    }
    // Somebody who has forgotten the room looks in like any stranger.
    must(&stay.bob, &stay.room, "forget", json!({})).await;
    let dave = server.register("dave").await;
    for reader in [&stay.bob, &dave] {
        let (status, json) = reader.get(&format!("{path}/state/m.room.topic")).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        assert_unseen(&json.to_string().replace(SECRET, ""), "a stranger");
        assert!(json.to_string().contains(SECRET), "{json}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_invitation_that_ended_shows_the_same_at_each_door() {
    for has_earlier in [false, true] {
        let server = TestServer::new();
        let (alice, bob) = (server.register("alice").await, server.register("bob").await);
        let room = create_room(&alice, json!({ "preset": "private_chat" })).await;
        let visibility = async |word: &str| {
            let content = json!({ "history_visibility": word });
            set_state(&alice, &room, "m.room.history_visibility", "", content).await;
        };
        visibility("invited").await;
        let invite = json!({ "user_id": bob.user_id });
        if has_earlier {
            must(&alice, &room, "invite", invite.clone()).await;
            must(&bob, &room, "leave", json!({})).await;
        }
        must(&alice, &room, "invite", invite).await;
        let seen = say(&alice, &room, "while invited").await;
        visibility("joined").await;
        let unseen = say(&alice, &room, "closed").await;
        must(&bob, &room, "leave", json!({})).await;
        let path = format!("/_matrix/client/v3/rooms/{room}");
        for (id, sees) in [(&seen, true), (&unseen, false)] {
            let (status, _) = bob.get(&format!("{path}/event/{}", encoded(id))).await;
            assert_eq!(status == StatusCode::OK, sees);
        }
        let mut pages = Vec::new();
        for direction in ["b", "f"] {
            let (status, page) = bob.get(&format!("{path}/messages?dir={direction}&limit=100")).await;
            assert_eq!(status, StatusCode::OK, "{has_earlier} {direction} {page}");
            let mut ids: Vec<String> = page["chunk"]
                .as_array()
                .unwrap()
                .iter()
                .map(|event| event["event_id"].as_str().unwrap().to_owned())
                .collect();
            ids.sort_unstable();
            assert!(ids.contains(&seen) && !ids.contains(&unseen), "{has_earlier} {direction} {ids:?}");
            pages.push(ids);
        }
        assert_eq!(pages[0], pages[1], "{has_earlier}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_page_begins_with_the_token_that_was_given() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = create_room(&alice, json!({})).await;
    let (_, sync) = alice.get("/_matrix/client/v3/sync").await;
    say(&alice, &room, "later").await;
    let prev_batch = sync["rooms"]["join"][&room]["timeline"]["prev_batch"].as_str().unwrap();
    for token in [sync["next_batch"].as_str().unwrap(), prev_batch] {
        for direction in ["b", "f"] {
            let path = format!("/_matrix/client/v3/rooms/{room}/messages?dir={direction}&from={token}");
            assert_eq!(alice.get(&path).await.1["start"], token);
        }
    }
}

/// The ways in which bob's membership changes after he forgot the room, until he joins again.
const AFTER_FORGETTING: [&[(&str, &str)]; 8] = [
    &[("alice", "invite"), ("bob", "leave")],
    &[("alice", "invite"), ("alice", "kick")],
    &[("alice", "ban")],
    &[("alice", "ban"), ("alice", "unban")],
    &[("alice", "invite"), ("alice", "ban"), ("alice", "unban")],
    &[("bob", "knock"), ("bob", "leave"), ("alice", "ban"), ("alice", "unban")],
    &[("alice", "invite"), ("bob", "leave"), ("bob", "forget"), ("alice", "ban"), ("alice", "unban")],
    &[("alice", "invite")],
];

#[tokio::test(start_paused = true)]
async fn a_forgotten_room_stays_forgotten_until_its_user_joins_again() {
    for visibility in ["invited", "shared", "joined"] {
        for steps in AFTER_FORGETTING {
            let server = TestServer::new();
            let (alice, bob) = (server.register("alice").await, server.register("bob").await);
            let carol = server.register("carol").await;
            let state = json!([{
                "type": "m.room.history_visibility", "content": { "history_visibility": visibility },
            }]);
            let room = create_room(&alice, json!({ "preset": "public_chat", "initial_state": state })).await;
            must(&alice, &room, "invite", json!({ "user_id": bob.user_id })).await;
            let seen = say(&alice, &room, "while bob was invited").await;
            must(&bob, &room, "join", json!({})).await;
            let root = say(&alice, &room, "while bob was in").await;
            must(&bob, &room, "leave", json!({})).await;
            must(&bob, &room, "forget", json!({})).await;
            let stay = Stay { alice, bob, carol, room, seen, root };
            let mut chain = Chain::of(&stay.bob);
            let mut moment = format!("{visibility}, forgotten");
            chain.next().await;
            for step in std::iter::once(None).chain(steps.iter().map(Some)) {
                if let Some((who, what)) = step {
                    moment += &format!(", {who} {what}");
                    change(&stay, who, what).await;
                }
                let answer = chain.next().await;
                for answer in stay.doors(&[]).await.into_iter().chain([answer.to_string()]) {
                    assert!(!answer.contains("while bob was"), "{moment}: {answer}");
                }
            }
            // A new invitation shows what the history visibility says, and nothing of before.
            if steps.last() == Some(&("alice", "invite")) {
                let path = |event| format!("/_matrix/client/v3/rooms/{}/event/{}", stay.room, encoded(event));
                let new = say(&stay.alice, &stay.room, "anew").await;
                let status = if visibility == "invited" { StatusCode::OK } else { StatusCode::NOT_FOUND };
                assert_eq!(stay.bob.get(&path(&new)).await.0, status, "{moment}");
                must(&stay.bob, &stay.room, "leave", json!({})).await;
                assert_eq!(stay.bob.get(&path(&new)).await.0, status, "{moment}");
                assert_eq!(stay.bob.get(&path(&stay.seen)).await.0, StatusCode::NOT_FOUND, "{moment}");
            }
            // A user who was not banned need not be let in again.
            let (unbanned, _) =
                act(&stay.alice, &stay.room, "unban", json!({ "user_id": stay.bob.user_id })).await;
            assert!(unbanned == StatusCode::OK || unbanned == StatusCode::FORBIDDEN, "{moment}: {unbanned}");
            must(&stay.bob, &stay.room, "join", json!({})).await;
            let page = format!("/_matrix/client/v3/rooms/{}/messages?dir=b&limit=100", stay.room);
            let (_, page) = stay.bob.get(&page).await;
            let sees = |text: &str| page.to_string().contains(text);
            assert!(sees("while bob was in\""), "{moment}, back: {page}");
            assert_eq!(sees("while bob was invited"), visibility != "joined", "{moment}, back: {page}");
        }
    }
}

/// The ids of the events of a page, the oldest first.
async fn page_back(client: &TestClient, room: &str, query: &str) -> Vec<String> {
    let path = format!("/_matrix/client/v3/rooms/{room}/messages?dir=b&limit=100{query}");
    let (status, page) = client.get(&path).await;
    assert_eq!(status, StatusCode::OK, "{page}");
    let mut ids = ids(&page["chunk"]);
    ids.reverse();
    ids
}

fn ids(events: &Value) -> Vec<String> {
    events.as_array().unwrap().iter().map(|event| event["event_id"].as_str().unwrap().to_owned()).collect()
}

/// The steps of a stay: who does what.
type Steps = &'static [(&'static str, &'static str)];

#[tokio::test(start_paused = true)]
async fn a_timeline_that_ends_a_stay_has_no_hole() {
    // The visibility, whether bob was in the room before, what happens, and whether he sees anything of it.
    let ways: [(&str, bool, Steps, bool); 7] = [
        ("world_readable", true, &[("bob", "leave"), ("alice", "say"), ("alice", "ban")], true),
        (
            "world_readable",
            true,
            &[("bob", "leave"), ("alice", "ban"), ("alice", "say"), ("alice", "unban")],
            true,
        ),
        ("invited", true, &[("bob", "leave"), ("alice", "invite"), ("alice", "say"), ("bob", "leave")], true),
        ("invited", false, &[("alice", "invite"), ("alice", "say"), ("bob", "leave")], true),
        ("shared", true, &[("bob", "leave"), ("alice", "say"), ("alice", "ban")], false),
        ("shared", false, &[("alice", "invite"), ("alice", "say"), ("bob", "leave")], false),
        ("joined", true, &[("bob", "leave"), ("alice", "invite"), ("alice", "say"), ("bob", "leave")], false),
    ];
    for (visibility, was_in, steps, sees) in ways {
        for query in ["", "&use_state_after=true"] {
            let moment = format!("{visibility}, {steps:?}{query}");
            let server = TestServer::new();
            let (alice, bob) = (server.register("alice").await, server.register("bob").await);
            let state = json!([{
                "type": "m.room.history_visibility", "content": { "history_visibility": visibility },
            }]);
            let room = create_room(&alice, json!({ "preset": "public_chat", "initial_state": state })).await;
            if was_in {
                must(&bob, &room, "join", json!({})).await;
            }
            let lazy = json!({ "lazy_load_members": true, "include_redundant_members": true });
            let mut chain = Chain::filtered(&bob, json!({ "room": { "state": lazy } }));
            chain.query = query.to_owned();
            chain.next().await;
            for (who, what) in steps {
                match (*who, *what) {
                    ("alice", "say") => {
                        for text in ["one", "two"] {
                            say(&alice, &room, text).await;
                        }
                    }
                    ("bob", what) => must(&bob, &room, what, json!({})).await,
                    (_, what) => must(&alice, &room, what, json!({ "user_id": bob.user_id })).await,
                }
            }
            let answer = chain.next().await;
            let left = &answer["rooms"]["leave"][&room];
            let told = ids(&left["timeline"]["events"]);
            assert_eq!(left["timeline"]["limited"], sees, "{moment}: {answer}");
            let last =
                events(&answer, "leave", &room, "timeline").last().unwrap()["content"]["membership"].clone();
            let expected = if steps.last() == Some(&("alice", "ban")) { "ban" } else { "leave" };
            assert_eq!(last, expected, "{moment}: {answer}");
            if !sees {
                let expected = usize::from(was_in) + 1;
                assert_eq!(told.len(), expected, "{moment}: nothing is left out: {answer}");
                continue;
            }
            // The timeline and the page before it have everything that bob may see, once and in order.
            let prev_batch = left["timeline"]["prev_batch"].as_str().unwrap();
            let mut put_together = page_back(&bob, &room, &format!("&from={prev_batch}")).await;
            put_together.extend(told);
            assert_eq!(put_together, page_back(&bob, &room, "").await, "{moment}: {answer}");
            let state = if query.is_empty() { "state" } else { "state_after" };
            let state = events(&answer, "leave", &room, state);
            let own = state.iter().find(|event| event["state_key"] == bob.user_id.as_str());
            // The end of his stay is told beside the timeline that does not show it.
            let expected = if query.is_empty() { "leave" } else { last.as_str().unwrap() };
            let own = own.map(|own| own["content"]["membership"].as_str().unwrap());
            assert_eq!(
                own,
                was_in.then_some(expected).or((!query.is_empty()).then_some(expected)),
                "{moment}: {answer}"
            );
            if last == "ban" {
                assert!(state.iter().any(|event| event["state_key"] == alice.user_id.as_str()), "{answer}");
            }
        }
    }
}
