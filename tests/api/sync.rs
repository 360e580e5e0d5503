//! Syncing: what each client is told, once and in order.

use std::collections::BTreeSet;

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    sliding_sync::Slide,
    support::{TestClient, TestServer, encoded},
};

/// A client that syncs on and on.
pub(crate) struct Chain {
    pub(crate) client: TestClient,
    pub(crate) since: Option<String>,
    filter: Option<Value>,
    pub(crate) query: String,
}

impl Chain {
    pub(crate) fn of(client: &TestClient) -> Self {
        Self { client: client.clone(), since: None, filter: None, query: String::new() }
    }

    pub(crate) fn filtered(client: &TestClient, filter: Value) -> Self {
        Self { filter: Some(filter), ..Self::of(client) }
    }

    pub(crate) async fn next(&mut self) -> Value {
        self.next_within(0).await
    }

    pub(crate) async fn next_within(&mut self, timeout_ms: u64) -> Value {
        let mut path =
            format!("/_matrix/client/v3/sync?timeout={timeout_ms}&set_presence=offline{}", self.query);
        if let Some(since) = &self.since {
            path += &format!("&since={since}");
        }
        if let Some(filter) = &self.filter {
            path += &format!("&filter={}", encoded(&filter.to_string()));
        }
        let (status, json) = self.client.get(&path).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        self.since = Some(json["next_batch"].as_str().unwrap().to_owned());
        json
    }
}

/// The doors of a server, of which tests use the clock.
pub(crate) fn env(server: &TestServer) -> &aqueduct::env::Env {
    &server.server().app().env
}

pub(crate) async fn create_room(client: &TestClient, body: Value) -> String {
    let (status, json) = client.post("/_matrix/client/v3/createRoom", body).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    json["room_id"].as_str().unwrap().to_owned()
}

#[must_use = "what was answered is asserted; must requires 200"]
pub(crate) async fn act(client: &TestClient, room: &str, what: &str, body: Value) -> (StatusCode, Value) {
    client.post(&format!("/_matrix/client/v3/rooms/{room}/{what}"), body).await
}

pub(crate) async fn must(client: &TestClient, room: &str, what: &str, body: Value) {
    let (status, json) = act(client, room, what, body).await;
    assert_eq!(status, StatusCode::OK, "{what}: {json}");
}

pub(crate) async fn send(client: &TestClient, room: &str, txn: &str, content: Value) -> String {
    let path = format!("/_matrix/client/v3/rooms/{room}/send/m.room.message/{}", encoded(txn));
    let (status, json) = client.put(&path, content).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    json["event_id"].as_str().unwrap().to_owned()
}

pub(crate) async fn say(client: &TestClient, room: &str, text: &str) -> String {
    send(client, room, text, json!({ "msgtype": "m.text", "body": text })).await
}

pub(crate) async fn set_state(
    client: &TestClient,
    room: &str,
    kind: &str,
    key: &str,
    content: Value,
) -> String {
    let path = format!("/_matrix/client/v3/rooms/{room}/state/{kind}/{}", encoded(key));
    let (status, json) = client.put(&path, content).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    json["event_id"].as_str().unwrap().to_owned()
}

pub(crate) fn events<'a>(sync: &'a Value, section: &str, room: &str, part: &str) -> Vec<&'a Value> {
    let list = sync["rooms"][section][room][part]["events"].as_array();
    list.map(|list| list.iter().collect()).unwrap_or_default()
}

pub(crate) fn bodies(sync: &Value, room: &str) -> Vec<String> {
    let timeline = events(sync, "join", room, "timeline");
    timeline.iter().filter_map(|event| event["content"]["body"].as_str().map(str::to_owned)).collect()
}

fn ids(events: &[&Value]) -> Vec<String> {
    events.iter().map(|event| event["event_id"].as_str().unwrap().to_owned()).collect()
}

fn keys(events: &[&Value]) -> BTreeSet<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or("(none)").to_owned();
    events.iter().map(|event| (text(&event["type"]), text(&event["state_key"]))).collect()
}

fn has(keys: &BTreeSet<(String, String)>, kind: &str, key: &str) -> bool {
    keys.contains(&(kind.to_owned(), key.to_owned()))
}

/// Alice and Bob in a public room of Alice's.
pub(crate) async fn room_of_two(server: &TestServer) -> (TestClient, TestClient, String) {
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
    must(&bob, &room, "join", json!({})).await;
    (alice, bob, room)
}

#[tokio::test(start_paused = true)]
async fn a_new_client_sees_the_room_and_then_only_what_is_new() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    say(&alice, &room, "hello").await;
    let mut chain = Chain::of(&bob);
    let first = chain.next().await;
    let (state, timeline) =
        (events(&first, "join", &room, "state"), events(&first, "join", &room, "timeline"));
    let both: BTreeSet<_> = keys(&state).union(&keys(&timeline)).cloned().collect();
    for kind in ["m.room.create", "m.room.power_levels", "m.room.join_rules", "m.room.history_visibility"] {
        assert!(has(&both, kind, ""), "{kind}: {both:?}");
    }
    assert!(has(&both, "m.room.member", &alice.user_id) && has(&both, "m.room.member", &bob.user_id));
    assert_eq!(bodies(&first, &room), ["hello"]);
    assert!(timeline.iter().all(|event| event.get("room_id").is_none()));
    let summary = &first["rooms"]["join"][&room]["summary"];
    assert_eq!(summary["m.joined_member_count"], 2);
    assert_eq!(summary["m.heroes"], json!([alice.user_id]));
    assert_eq!(first["device_one_time_keys_count"], json!({ "signed_curve25519": 0 }));

    let empty = chain.next().await;
    assert!(empty.get("rooms").is_none() && empty.get("account_data").is_none(), "{empty}");
    say(&alice, &room, "again").await;
    let next = chain.next().await;
    assert_eq!(bodies(&next, &room), ["again"]);
    assert!(events(&next, "join", &room, "state").is_empty());
    assert_eq!(next["rooms"]["join"][&room]["timeline"]["limited"], false);
}

#[tokio::test(start_paused = true)]
async fn a_gap_is_told_and_bridged_by_state_and_messages() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let mut chain = Chain::filtered(&bob, json!({ "room": { "timeline": { "limit": 3 } } }));
    chain.next().await;
    say(&alice, &room, "before").await;
    set_state(&alice, &room, "m.room.topic", "", json!({ "topic": "in the gap" })).await;
    for number in 0..3 {
        say(&alice, &room, &format!("m{number}")).await;
    }
    let next = chain.next().await;
    let timeline = &next["rooms"]["join"][&room]["timeline"];
    assert_eq!(timeline["limited"], true);
    assert_eq!(bodies(&next, &room), ["m0", "m1", "m2"]);
    let state = events(&next, "join", &room, "state");
    assert_eq!(state.len(), 1);
    assert_eq!(state[0]["content"]["topic"], "in the gap");
    let from = timeline["prev_batch"].as_str().unwrap();
    let (status, page) =
        bob.get(&format!("/_matrix/client/v3/rooms/{room}/messages?dir=b&limit=2&from={from}")).await;
    assert_eq!(status, StatusCode::OK, "{page}");
    assert_eq!(page["chunk"][0]["content"]["topic"], "in the gap");
    assert_eq!(page["chunk"][1]["content"]["body"], "before");
}

#[tokio::test(start_paused = true)]
async fn state_stands_before_the_timeline_or_after_it_as_asked() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let (mut before, mut after) = (Chain::of(&bob), Chain::of(&bob));
    after.query = "&use_state_after=true".to_owned();
    let first = after.next().await;
    assert!(has(&keys(&events(&first, "join", &room, "state_after")), "m.room.create", ""));
    assert!(first["rooms"]["join"][&room].get("state").is_none());
    before.next().await;
    set_state(&alice, &room, "m.room.topic", "", json!({ "topic": "one" })).await;
    set_state(&alice, &room, "m.room.topic", "", json!({ "topic": "two" })).await;
    let old = before.next().await;
    assert!(events(&old, "join", &room, "state").is_empty(), "{old}");
    assert_eq!(events(&old, "join", &room, "timeline").len(), 2);
    let new = after.next().await;
    let state = events(&new, "join", &room, "state_after");
    assert_eq!(state.len(), 1);
    assert_eq!(state[0]["content"]["topic"], "two");
}

#[tokio::test(start_paused = true)]
async fn a_poll_is_woken_by_news_and_ends_without() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let mut chain = Chain::of(&bob);
    chain.next().await;
    let started = env(&server).instant();
    let (woken, _) = tokio::join!(chain.next_within(30_000), async {
        env(&server).sleep(std::time::Duration::from_secs(5)).await;
        say(&alice, &room, "wake up").await
    });
    assert_eq!(bodies(&woken, &room), ["wake up"]);
    assert!(started.elapsed().as_secs() < 10);
    let started = env(&server).instant();
    let empty = chain.next_within(7_000).await;
    assert!(empty.get("rooms").is_none());
    assert_eq!(started.elapsed().as_secs(), 7);
}

#[tokio::test(start_paused = true)]
async fn hostile_tokens_and_filters_are_refused() {
    let alice = TestServer::new().register("alice").await;
    for query in [
        "since=x",
        "since=s9007199254740993_0_0",
        "filter=nope",
        "filter=%7B%22room%22%3A1%7D",
        "set_presence=asleep",
        "timeout=-1",
        "timeout=x",
        "full_state=perhaps",
    ] {
        let (status, json) = alice.get(&format!("/_matrix/client/v3/sync?{query}")).await;
        assert!(status.is_client_error(), "{query}: {status} {json}");
        assert!(json["errcode"].is_string(), "{query}: {json}");
    }
}

#[tokio::test(start_paused = true)]
async fn members_are_loaded_lazily() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let carol = server.register("carol").await;
    must(&carol, &room, "join", json!({})).await;
    for number in 0..12 {
        say(&alice, &room, &format!("m{number}")).await;
    }
    let lazy = json!({ "room": { "state": { "lazy_load_members": true }, "timeline": { "limit": 2 } } });
    let mut chain = Chain::filtered(&bob, lazy);
    let first = chain.next().await;
    let state = keys(&events(&first, "join", &room, "state"));
    assert!(has(&state, "m.room.member", &alice.user_id), "{state:?}");
    assert!(has(&state, "m.room.member", &bob.user_id), "{state:?}");
    // A hero of a room without a name is needed, too.
    assert!(has(&state, "m.room.member", &carol.user_id), "{state:?}");
    set_state(&alice, &room, "m.room.name", "", json!({ "name": "A name" })).await;
    let mut named = Chain::filtered(&bob, chain.filter.clone().unwrap());
    let state = keys(&events(&named.next().await, "join", &room, "state"));
    assert!(!has(&state, "m.room.member", &carol.user_id), "{state:?}");
    // Carol speaks: now she is told of, once.
    say(&carol, &room, "hi").await;
    let next = named.next().await;
    assert!(has(&keys(&events(&next, "join", &room, "state")), "m.room.member", &carol.user_id), "{next}");
    say(&carol, &room, "hi again").await;
    let next = named.next().await;
    assert!(events(&next, "join", &room, "state").is_empty(), "{next}");
}

#[tokio::test(start_paused = true)]
async fn members_alone_are_left_out_of_a_large_state() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    // Types that stand before and after that of the members, in a room with more keys than are all read.
    let types = ["a.thing", "m.room.membership", "z.thing"];
    let state =
        |number: usize| json!({ "type": types[number % 3], "state_key": number.to_string(), "content": {} });
    let initial_state: Vec<_> = (0..60).map(state).collect();
    let room = alice
        .create(json!({ "name": "Large", "preset": "public_chat", "initial_state": initial_state }))
        .await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    alice.say(&room, "1", "one").await;
    let filter = json!({ "room": { "timeline": { "limit": 1 }, "state": { "lazy_load_members": true } } });
    let filter: String = filter.to_string().bytes().map(|byte| format!("%{byte:02X}")).collect();
    let sync = alice.ok_get(&format!("/sync?filter={filter}")).await;
    let told = sync["rooms"]["join"][&room]["state"]["events"].as_array().unwrap();
    let members = told.iter().filter(|event| event["type"] == "m.room.member");
    assert_eq!(members.map(|event| &event["state_key"]).collect::<Vec<_>>(), [&alice.user_id]);
    let all = alice.ok_get(&format!("/rooms/{room}/state")).await;
    let all = all.as_array().unwrap();
    assert_eq!(told.len(), all.len() - 1, "the member event of Bob alone is not among them");
}

#[tokio::test(start_paused = true)]
async fn invites_knocks_and_leaves_have_their_sections() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = create_room(&alice, json!({ "name": "Secret" })).await;
    let (mut alices, mut bobs) = (Chain::of(&alice), Chain::of(&bob));
    alices.next().await;
    bobs.next().await;
    must(&alice, &room, "invite", json!({ "user_id": bob.user_id })).await;
    let invited = bobs.next().await;
    let state = &invited["rooms"]["invite"][&room]["invite_state"]["events"];
    let stripped: Vec<_> = state.as_array().unwrap().iter().collect();
    assert!(has(&keys(&stripped), "m.room.name", "") && has(&keys(&stripped), "m.room.member", &bob.user_id));
    assert!(stripped.iter().all(|event| event.get("event_id").is_none()));
    let create = stripped.iter().find(|event| event["type"] == "m.room.create").unwrap();
    assert!(create["origin_server_ts"].is_number() && create["signatures"].is_object(), "{create}");
    assert!(bobs.next().await.get("rooms").is_none());

    must(&bob, &room, "leave", json!({})).await;
    let left = bobs.next().await;
    let timeline = events(&left, "leave", &room, "timeline");
    assert_eq!(timeline.len(), 1, "{left}");
    assert_eq!(timeline[0]["content"]["membership"], "leave");
    assert!(bobs.next().await.get("rooms").is_none());

    must(&alice, &room, "invite", json!({ "user_id": bob.user_id })).await;
    must(&bob, &room, "join", json!({})).await;
    let joined = bobs.next().await;
    assert!(joined["rooms"].get("invite").is_none());
    let begun = events(&joined, "join", &room, "state");
    let all: BTreeSet<_> =
        keys(&begun).union(&keys(&events(&joined, "join", &room, "timeline"))).cloned().collect();
    assert!(has(&all, "m.room.create", "") && has(&all, "m.room.name", ""));

    say(&alice, &room, "for bob").await;
    must(&alice, &room, "kick", json!({ "user_id": bob.user_id })).await;
    say(&alice, &room, "not for bob").await;
    let kicked = bobs.next().await;
    let timeline = events(&kicked, "leave", &room, "timeline");
    assert_eq!(timeline.len(), 2, "{kicked}");
    assert_eq!(timeline[0]["content"]["body"], "for bob");
    assert_eq!(timeline[1]["content"]["membership"], "leave");
    say(&alice, &room, "nor this").await;
    assert!(bobs.next().await.get("rooms").is_none());

    must(&alice, &room, "ban", json!({ "user_id": bob.user_id })).await;
    let banned = bobs.next().await;
    let timeline = events(&banned, "leave", &room, "timeline");
    assert_eq!(timeline.len(), 1, "{banned}");
    assert_eq!(timeline[0]["content"]["membership"], "ban");
    // Somebody else ended the stay, which the client is told without having asked for rooms that were left.
    let mut anew = Chain::of(&bob);
    assert_eq!(events(&anew.next().await, "leave", &room, "timeline").last().unwrap(), &timeline[0]);
    let mut with_left = Chain::filtered(&bob, json!({ "room": { "include_leave": true } }));
    assert!(with_left.next().await["rooms"]["leave"].get(&room).is_some());
    must(&bob, &room, "forget", json!({})).await;
    let mut forgotten = Chain::filtered(&bob, json!({ "room": { "include_leave": true } }));
    assert!(forgotten.next().await.get("rooms").is_none());
    assert!(Chain::of(&bob).next().await.get("rooms").is_none());
}

#[tokio::test(start_paused = true)]
async fn a_first_answer_tells_who_was_removed_and_not_who_left_or_was_never_in() {
    let server = TestServer::new();
    let (alice, bob, kicked) = room_of_two(&server).await;
    must(&alice, &kicked, "kick", json!({ "user_id": bob.user_id })).await;
    let left = create_room(&alice, json!({ "preset": "public_chat" })).await;
    must(&bob, &left, "join", json!({})).await;
    must(&bob, &left, "leave", json!({})).await;
    for way in ["ban", "kick"] {
        let never = create_room(&alice, json!({ "invite": [bob.user_id] })).await;
        must(&alice, &never, way, json!({ "user_id": bob.user_id })).await;
    }
    // Bob is told nothing of what others did with his membership in rooms that he had left before.
    let mut removed = BTreeSet::from([kicked]);
    for (first, later) in [("bob", "alice"), ("alice", "bob")] {
        for steps in [["invite", "kick"], ["ban", "unban"], ["ban", "-"], ["invite", "leave"]] {
            let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
            must(&bob, &room, "join", json!({})).await;
            match first {
                "bob" => must(&bob, &room, "leave", json!({})).await,
                _ => must(&alice, &room, "kick", json!({ "user_id": bob.user_id })).await,
            }
            for step in steps {
                match step {
                    "-" => {}
                    "leave" => must(&bob, &room, step, json!({})).await,
                    _ => must(&alice, &room, step, json!({ "user_id": bob.user_id })).await,
                }
            }
            if later == "bob" {
                removed.insert(room);
            }
        }
    }
    let rooms = |of: &Value| of.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(rooms(&Chain::of(&bob).next().await["rooms"]["leave"]), removed);
    assert_eq!(rooms(&Slide::list(&bob, 0, 99).next().await["rooms"]), removed);
}

#[tokio::test(start_paused = true)]
async fn filters_leave_out_what_is_not_wanted() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    say(&alice, &room, "hello").await;
    say(&bob, &room, "own").await;
    let mut chain = Chain::filtered(
        &bob,
        json!({
            "room": {
                "timeline": { "types": ["m.room.mess*"], "not_senders": [bob.user_id] },
                "state": { "types": ["m.room.create"] },
                "ephemeral": { "types": [] },
            },
            "account_data": { "not_types": ["*"] },
            "event_fields": ["type", "content.body", "event_id"],
        }),
    );
    let sync = chain.next().await;
    assert_eq!(bodies(&sync, &room), ["hello"]);
    let timeline = events(&sync, "join", &room, "timeline");
    assert_eq!(timeline[0].as_object().unwrap().len(), 3, "{}", timeline[0]);
    assert_eq!(events(&sync, "join", &room, "state").len(), 1);
    assert!(sync.get("account_data").is_none());
    let mut none = Chain::filtered(&bob, json!({ "room": { "not_rooms": [room] } }));
    assert!(none.next().await.get("rooms").is_none());
}

#[tokio::test(start_paused = true)]
async fn what_one_device_sent_carries_its_transaction_id() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let (mut alices, mut bobs) = (Chain::of(&alice), Chain::of(&bob));
    alices.next().await;
    bobs.next().await;
    say(&alice, &room, "mine").await;
    let own = alices.next().await;
    let event = events(&own, "join", &room, "timeline")[0].clone();
    assert_eq!(event["unsigned"]["transaction_id"], "mine");
    assert_eq!(event["unsigned"]["membership"], "join");
    let other = bobs.next().await;
    assert!(events(&other, "join", &room, "timeline")[0]["unsigned"].get("transaction_id").is_none());
}

#[tokio::test(start_paused = true)]
async fn full_state_tells_everything_again() {
    let server = TestServer::new();
    let (_alice, bob, room) = room_of_two(&server).await;
    let mut chain = Chain::of(&bob);
    chain.next().await;
    chain.query = "&full_state=true".to_owned();
    let again = chain.next().await;
    assert!(has(&keys(&events(&again, "join", &room, "state")), "m.room.create", ""), "{again}");
    assert!(events(&again, "join", &room, "timeline").is_empty());
}

/// A small generator of numbers, seeded: this is no secret.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % bound
    }
}

/// The events that a chain has learnt of one room, and whether it was told of a gap.
#[derive(Default)]
struct Learnt {
    timeline: Vec<String>,
    gap: bool,
}

#[tokio::test(start_paused = true)]
async fn chains_of_syncs_miss_nothing_and_repeat_nothing() {
    for seed in 0..4 {
        chain_of_syncs(seed).await;
    }
}

async fn chain_of_syncs(seed: u64) {
    let server = TestServer::new();
    let mut dice = Dice(seed);
    let mut people = Vec::new();
    for name in ["alice", "bob", "carol"] {
        people.push(server.register(name).await);
    }
    let mut rooms = Vec::new();
    for owner in &people {
        rooms.push(create_room(owner, json!({ "preset": "public_chat" })).await);
    }
    let mut chains: Vec<Chain> = people.iter().map(Chain::of).collect();
    let mut learnt: Vec<std::collections::BTreeMap<String, Learnt>> =
        people.iter().map(|_| Default::default()).collect();
    let mut sent: std::collections::BTreeMap<String, Vec<String>> = Default::default();
    for step in 0..150 {
        let (who, room) = (dice.below(people.len()), rooms[dice.below(rooms.len())].clone());
        match dice.below(8) {
            0 => {
                must(&people[who], &room, "join", json!({})).await;
            }
            1 if dice.below(4) == 0 => {
                let (status, json) = act(&people[who], &room, "leave", json!({})).await;
                assert!(status == StatusCode::OK || status == StatusCode::FORBIDDEN, "{status}: {json}");
            }
            2 | 3 => {
                let sync = chains[who].next().await;
                learn(&sync, &mut learnt[who], &format!("seed {seed} step {step}"));
            }
            _ => {
                let path = format!("/_matrix/client/v3/rooms/{room}/send/m.room.message/{step}");
                let body = json!({ "msgtype": "m.text", "body": step.to_string() });
                let (status, json) = people[who].put(&path, body).await;
                if status == StatusCode::OK {
                    sent.entry(room).or_default().push(json["event_id"].as_str().unwrap().to_owned());
                }
            }
        }
    }
    for (who, chain) in chains.iter_mut().enumerate() {
        let sync = chain.next().await;
        learn(&sync, &mut learnt[who], "end");
        let empty = chain.next().await;
        assert!(empty.get("rooms").is_none(), "seed {seed}: {empty}");
        for (room, known) in &learnt[who] {
            // The chain saw everything that was sent after the first event it saw, in order and once, unless it was told of a
            // gap, or was away.
            let told: Vec<&String> = known.timeline.iter().filter(|id| sent[room].contains(id)).collect();
            let mut places: Vec<usize> =
                told.iter().map(|id| sent[room].iter().position(|other| other == *id).unwrap()).collect();
            assert!(places.windows(2).all(|pair| pair[0] < pair[1]), "seed {seed}: {places:?}");
            if !known.gap
                && let (Some(first), Some(last)) = (places.first(), places.last())
            {
                assert_eq!(last - first + 1, places.len(), "seed {seed}, {who}, {room}: {places:?}");
            }
            places.clear();
        }
    }
}

fn learn(sync: &Value, learnt: &mut std::collections::BTreeMap<String, Learnt>, moment: &str) {
    for section in ["join", "leave"] {
        let Some(rooms) = sync["rooms"][section].as_object() else { continue };
        for (room, news) in rooms {
            let known = learnt.entry(room.clone()).or_default();
            let timeline: Vec<&Value> = news["timeline"]["events"].as_array().unwrap().iter().collect();
            if news["timeline"]["limited"] == true || section == "leave" {
                known.gap = true;
            }
            for id in ids(&timeline) {
                // Who comes again is shown the room anew.
                if known.timeline.contains(&id) {
                    assert!(known.gap, "{moment}: {id} again in {room}");
                    continue;
                }
                known.timeline.push(id);
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn messages_to_a_device_come_once_and_all_of_them() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let mut chain = Chain::of(&bob);
    chain.next().await;
    let path = |txn: usize| format!("/_matrix/client/v3/sendToDevice/m.test/{txn}");
    for number in 0..130 {
        let body = json!({ "messages": { &bob.user_id: { &bob.device_id: { "n": number } } } });
        assert_eq!(alice.put(&path(number), body).await.0, StatusCode::OK);
    }
    let numbers = |sync: &Value| -> Vec<u64> {
        let events = sync["to_device"]["events"].as_array().map(Vec::as_slice).unwrap_or_default();
        events.iter().map(|event| event["content"]["n"].as_u64().unwrap()).collect()
    };
    let before = chain.since.clone();
    let mut told = numbers(&chain.next_within(1_000).await);
    assert_eq!(told.len(), 100);
    // The answer was lost, so the client asks again and gets the same.
    chain.since = before;
    assert_eq!(numbers(&chain.next().await), told);
    told.extend(numbers(&chain.next_within(1_000).await));
    assert_eq!(told, (0..130).collect::<Vec<_>>());
    let last = chain.next().await;
    assert!(last.get("to_device").is_none(), "{last}");
    // Messages that were received are gone, also for a client that begins; the answer did not wait for that.
    env(&server).sleep(std::time::Duration::from_secs(1)).await;
    assert!(Chain::of(&bob).next().await.get("to_device").is_none());
}

#[tokio::test(start_paused = true)]
async fn account_data_comes_with_its_room_or_without() {
    let server = TestServer::new();
    let (_alice, bob, room) = room_of_two(&server).await;
    let mut chain = Chain::of(&bob);
    chain.next().await;
    let base = format!("/_matrix/client/v3/user/{}", bob.user_id);
    bob.ok_put(&format!("{base}/account_data/org.example"), json!({ "a": 1 })).await;
    bob.ok_put(&format!("{base}/rooms/{room}/account_data/org.example"), json!({ "b": 2 })).await;
    let sync = chain.next().await;
    assert_eq!(sync["account_data"]["events"], json!([{ "type": "org.example", "content": { "a": 1 } }]));
    let expected = json!({ "type": "org.example", "content": { "b": 2 } });
    assert_eq!(events(&sync, "join", &room, "account_data"), [&expected]);
    assert!(chain.next().await.get("rooms").is_none());
    let anew = Chain::of(&bob).next().await;
    assert_eq!(events(&anew, "join", &room, "account_data"), [&expected]);
    assert!(
        anew["account_data"]["events"].as_array().unwrap().iter().any(|event| event["type"] == "org.example")
    );
}

#[tokio::test(start_paused = true)]
async fn a_stored_filter_is_found_by_its_id() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    say(&alice, &room, "hello").await;
    let filter = json!({ "room": { "timeline": { "types": ["m.none"] } } });
    let (_, json) = bob.post(&format!("/_matrix/client/v3/user/{}/filter", bob.user_id), filter).await;
    let id = json["filter_id"].as_str().unwrap();
    let (status, sync) = bob.get(&format!("/_matrix/client/v3/sync?filter={id}")).await;
    assert_eq!(status, StatusCode::OK);
    assert!(events(&sync, "join", &room, "timeline").is_empty(), "{sync}");
    // A user cannot sync with a filter of another user.
    let (status, json) = alice.get(&format!("/_matrix/client/v3/sync?filter={id}")).await;
    assert_eq!((status.as_u16(), &json["errcode"]), (400, &json!("M_INVALID_PARAM")));
}

#[tokio::test(start_paused = true)]
async fn ignored_users_are_not_heard() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let carol = server.register("carol").await;
    must(&carol, &room, "join", json!({})).await;
    let path = format!("/_matrix/client/v3/user/{}/account_data/m.ignored_user_list", bob.user_id);
    let ignored = json!({ "ignored_users": { &carol.user_id: {} } });
    assert_eq!(bob.put(&path, ignored).await.0, StatusCode::OK);
    let mut chain = Chain::of(&bob);
    chain.next().await;
    say(&carol, &room, "noise").await;
    say(&alice, &room, "news").await;
    set_state(
        &carol,
        &room,
        "m.room.member",
        &carol.user_id,
        json!({ "membership": "join", "displayname": "C" }),
    )
    .await;
    let secret = create_room(&carol, json!({ "invite": [bob.user_id] })).await;
    let sync = chain.next().await;
    assert_eq!(bodies(&sync, &room), ["news"]);
    // State is told all the same: the room would fall apart without it.
    assert_eq!(events(&sync, "join", &room, "timeline").len(), 2);
    assert!(sync["rooms"]["invite"].get(&secret).is_none(), "{sync}");
}

#[tokio::test(start_paused = true)]
async fn device_lists_follow_devices_and_rooms() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let mut chain = Chain::of(&alice);
    let lists = |sync: &Value, name: &str| sync["device_lists"][name].as_array().cloned().unwrap_or_default();
    chain.next().await;
    let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
    chain.next().await;
    must(&bob, &room, "join", json!({})).await;
    assert_eq!(lists(&chain.next().await, "changed"), [json!(bob.user_id)]);
    let body = json!({
        "type": "m.login.password", "identifier": { "type": "m.id.user", "user": "bob" },
        "password": "password of bob",
    });
    let (woken, _) = tokio::join!(chain.next_within(30_000), async {
        env(&server).sleep(std::time::Duration::from_secs(1)).await;
        server.anonymous().post("/_matrix/client/v3/login", body).await
    });
    assert_eq!(lists(&woken, "changed"), [json!(bob.user_id)]);
    must(&bob, &room, "leave", json!({})).await;
    assert_eq!(lists(&chain.next().await, "left"), [json!(bob.user_id)]);
    must(&bob, &room, "join", json!({})).await;
    chain.next().await;
    must(&alice, &room, "leave", json!({})).await;
    assert_eq!(lists(&chain.next().await, "left"), [json!(bob.user_id)]);
}

#[tokio::test(start_paused = true)]
async fn who_leaves_and_forgets_at_once_is_told_of_the_leave() {
    let server = TestServer::new();
    let (_alice, bob, room) = room_of_two(&server).await;
    let mut chain = Chain::of(&bob);
    chain.next().await;
    must(&bob, &room, "leave", json!({})).await;
    must(&bob, &room, "forget", json!({})).await;
    assert!(chain.next().await["rooms"]["leave"].get(&room).is_some());
    assert!(chain.next().await.get("rooms").is_none());
}

#[tokio::test(start_paused = true)]
async fn state_after_has_the_members_that_the_timeline_is_about() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let carol = server.register("carol").await;
    set_state(&alice, &room, "m.room.name", "", json!({ "name": "A name" })).await;
    must(&alice, &room, "invite", json!({ "user_id": carol.user_id })).await;
    let mut chain = Chain::filtered(
        &bob,
        json!({
            "room": { "state": { "lazy_load_members": true }, "timeline": { "limit": 1 } },
        }),
    );
    chain.query = "&use_state_after=true".to_owned();
    let sync = chain.next().await;
    let state = keys(&events(&sync, "join", &room, "state_after"));
    assert!(has(&state, "m.room.member", &carol.user_id), "{state:?}");
    // The newest membership is told in a gap of two events, too.
    must(&carol, &room, "join", json!({})).await;
    must(&alice, &room, "kick", json!({ "user_id": carol.user_id })).await;
    let sync = chain.next().await;
    let state = events(&sync, "join", &room, "state_after");
    let carols: Vec<_> = state.iter().filter(|event| event["state_key"] == carol.user_id.as_str()).collect();
    assert_eq!(carols.len(), 1, "{sync}");
    assert_eq!(carols[0]["content"]["membership"], "leave");
}

#[tokio::test(start_paused = true)]
#[expect(
    clippy::disallowed_methods,
    reason = "the test waits for what its tasks answer, which `Env::spawn` does not give"
)]
async fn of_many_polls_of_one_device_only_the_newest_wait() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = create_room(&alice, json!({})).await;
    let mut chain = Chain::of(&alice);
    chain.next().await;
    let path = format!("/_matrix/client/v3/sync?timeout=30000&since={}", chain.since.as_ref().unwrap());
    let mut polls = Vec::new();
    for _ in 0..140 {
        let (alice, path) = (alice.clone(), path.clone());
        polls.push(tokio::spawn(async move { alice.get(&path).await }));
    }
    env(&server).sleep(std::time::Duration::from_secs(1)).await;
    let waiting: Vec<bool> = polls.iter().map(|poll| !poll.is_finished()).collect();
    assert_eq!(waiting.iter().filter(|waits| **waits).count(), 4);
    assert!(waiting[136..].iter().all(|waits| *waits), "the newest are those that wait");
    say(&alice, &room, "news").await;
    for (number, poll) in polls.into_iter().enumerate() {
        let (status, sync) = poll.await.unwrap();
        assert_eq!(status, StatusCode::OK, "{sync}");
        let news: &[&str] = if number < 136 { &[] } else { &["news"] };
        assert_eq!(bodies(&sync, &room), news, "poll {number}");
    }
}
