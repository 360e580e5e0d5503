//! The endpoints by which clients learnt of rooms before `/sync`: `/initialSync`, `/events`, and their forms for one room.

use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    support::{TestClient, TestServer},
    sync::{Chain, create_room, env, must, room_of_two, say},
};

const V3: &str = "/_matrix/client/v3";

/// The events of an answer, each by its type and, where it has one, by its text or its sender.
fn chunk(answer: &Value) -> Vec<Value> {
    answer["chunk"].as_array().unwrap().clone()
}

fn types(events: &[Value]) -> Vec<String> {
    events.iter().map(|event| event["type"].as_str().unwrap().to_owned()).collect()
}

fn texts(events: &[Value]) -> Vec<String> {
    events.iter().filter_map(|event| event["content"]["body"].as_str().map(str::to_owned)).collect()
}

/// A client of the old stream, which goes on from where it stopped.
struct Stream {
    client: TestClient,
    from: Option<String>,
    query: String,
}

impl Stream {
    fn of(client: &TestClient) -> Self {
        Self { client: client.clone(), from: None, query: String::new() }
    }

    async fn next_within(&mut self, timeout_ms: u64) -> Vec<Value> {
        let mut path = format!("{V3}/events?timeout={timeout_ms}{}", self.query);
        if let Some(from) = &self.from {
            path += &format!("&from={from}");
        }
        let answer = self.client.ok_get(&path).await;
        if let Some(from) = &self.from {
            assert_eq!(answer["start"], *from);
        }
        self.from = Some(answer["end"].as_str().unwrap().to_owned());
        chunk(&answer)
    }

    async fn next(&mut self) -> Vec<Value> {
        self.next_within(0).await
    }
}

fn room<'a>(answer: &'a Value, room_id: &str) -> Option<&'a Value> {
    answer["rooms"].as_array().unwrap().iter().find(|room| room["room_id"] == room_id)
}

async fn open_to_all(client: &TestClient, room: &str) {
    let path = format!("{V3}/rooms/{room}/state/m.room.history_visibility/");
    client.ok_put(&path, json!({ "history_visibility": "world_readable" })).await;
}

#[tokio::test(start_paused = true)]
async fn the_first_sync_of_old_tells_every_room_with_its_state_and_newest_messages() {
    let server = TestServer::new();
    let (alice, bob, first) = room_of_two(&server).await;
    let published = create_room(&alice, json!({ "visibility": "public", "name": "Lobby" })).await;
    let invited = create_room(&bob, json!({ "invite": [alice.user_id] })).await;
    for number in 0..4 {
        say(&bob, &first, &format!("m{number}")).await;
    }
    let data = format!("{V3}/user/{}/account_data/org.example", alice.user_id);
    alice.ok_put(&data, json!({ "global": true })).await;
    let data = format!("{V3}/user/{}/rooms/{first}/account_data/org.example", alice.user_id);
    alice.ok_put(&data, json!({ "global": false })).await;

    let answer = alice.ok_get(&format!("{V3}/initialSync?limit=2")).await;
    let told = room(&answer, &first).unwrap();
    assert_eq!(told["membership"], "join");
    assert_eq!(told["visibility"], "private");
    assert_eq!(texts(told["messages"]["chunk"].as_array().unwrap()), ["m2", "m3"]);
    let message = &told["messages"]["chunk"][0];
    assert_eq!((&message["room_id"], &message["user_id"]), (&json!(first), &message["sender"]));
    let state = types(told["state"].as_array().unwrap());
    assert!(state.contains(&"m.room.create".to_owned()) && state.contains(&"m.room.member".to_owned()));
    assert_eq!(told["account_data"][0]["content"], json!({ "global": false }));
    assert_eq!(answer["account_data"], json!([{ "type": "org.example", "content": { "global": true } }]));
    assert_eq!(room(&answer, &published).unwrap()["visibility"], "public");
    let invitation = room(&answer, &invited).unwrap();
    assert_eq!(invitation["membership"], "invite");
    assert_eq!(invitation["invite"]["state_key"], alice.user_id);
    assert_eq!(invitation["invite"]["content"]["membership"], "invite");
    assert!(invitation.get("state").is_none(), "{invitation}");
    let own = answer["presence"].as_array().unwrap();
    assert!(own.iter().any(|event| event["content"]["user_id"] == alice.user_id), "{own:?}");

    // The pages of messages go on from where the answer begins.
    let start = told["messages"]["start"].as_str().unwrap();
    let older = alice.ok_get(&format!("{V3}/rooms/{first}/messages?dir=b&from={start}&limit=2")).await;
    assert_eq!(texts(&chunk(&older)), ["m1", "m0"]);
    // Without messages, everything else is there all the same.
    let answer = alice.ok_get(&format!("{V3}/initialSync?limit=0")).await;
    let told = room(&answer, &first).unwrap();
    assert_eq!(told["messages"]["chunk"], json!([]));
    assert!(types(told["state"].as_array().unwrap()).contains(&"m.room.create".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn rooms_that_were_left_are_told_only_if_asked_for_and_as_they_were() {
    let server = TestServer::new();
    let (alice, bob, left) = room_of_two(&server).await;
    say(&alice, &left, "before").await;
    must(&bob, &left, "leave", json!({})).await;
    say(&alice, &left, "after").await;
    let name = format!("{V3}/rooms/{left}/state/m.room.name/");
    alice.ok_put(&name, json!({ "name": "Later" })).await;
    let answer = bob.ok_get(&format!("{V3}/initialSync")).await;
    assert!(room(&answer, &left).is_none());
    let answer = bob.ok_get(&format!("{V3}/initialSync?archived=true")).await;
    let single = bob.ok_get(&format!("{V3}/rooms/{left}/initialSync")).await;
    for told in [room(&answer, &left).unwrap(), &single] {
        assert_eq!(told["membership"], "leave");
        assert_eq!(texts(told["messages"]["chunk"].as_array().unwrap()), ["before"]);
        assert!(!types(told["state"].as_array().unwrap()).contains(&"m.room.name".to_owned()));
    }
    assert_eq!((&single["presence"], &single["receipts"]), (&json!([]), &json!([])));
}

#[tokio::test(start_paused = true)]
async fn a_room_that_the_user_was_never_in_is_told_without_its_state() {
    let server = TestServer::new();
    let (alice, eve) = (server.register("alice").await, server.register("eve").await);
    for visibility in ["invited", "shared", "joined", "world_readable"] {
        for how in ["declined", "taken back", "banned"] {
            let content = json!({ "history_visibility": visibility });
            let state = json!({ "type": "m.room.history_visibility", "state_key": "", "content": content });
            let room = create_room(&alice, json!({ "initial_state": [state] })).await;
            if how != "banned" {
                must(&alice, &room, "invite", json!({ "user_id": eve.user_id })).await;
            }
            match how {
                "declined" => must(&eve, &room, "leave", json!({})).await,
                "taken back" => must(&alice, &room, "kick", json!({ "user_id": eve.user_id })).await,
                _ => must(&alice, &room, "ban", json!({ "user_id": eve.user_id })).await,
            }
            alice.ok_put(&format!("{V3}/rooms/{room}/state/m.room.topic/"), json!({ "topic": "hush" })).await;
            if visibility == "world_readable" {
                let closed = json!({ "history_visibility": "joined" });
                let path = format!("{V3}/rooms/{room}/state/m.room.history_visibility/");
                alice.ok_put(&path, closed).await;
            }
            let all = eve.ok_get(&format!("{V3}/initialSync?archived=true&limit=50")).await;
            let rooms = all["rooms"].as_array().unwrap();
            let told = rooms.iter().find(|told| told["room_id"] == json!(room)).unwrap();
            assert_eq!((told.get("state"), told.get("messages")), (None, None), "{visibility}, {how}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_stream_tells_each_event_once_and_in_order() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let mut stream = Stream::of(&alice);
    assert_eq!(stream.next().await, Vec::<Value>::new(), "a client that begins waits for what comes");
    for number in 0..250 {
        say(&bob, &room, &format!("m{number}")).await;
    }
    let mut told = Vec::new();
    loop {
        let events = stream.next().await;
        assert!(events.len() <= 100, "{}", events.len());
        if events.is_empty() {
            break;
        }
        told.extend(texts(&events));
    }
    assert_eq!(told, (0..250).map(|number| format!("m{number}")).collect::<Vec<_>>());
    // A short page leaves nothing out, either.
    stream.query = "&limit=1".to_owned();
    say(&bob, &room, "one").await;
    say(&alice, &room, "two").await;
    assert_eq!(texts(&stream.next().await), ["one"]);
    assert_eq!(texts(&stream.next().await), ["two"]);
}

#[tokio::test(start_paused = true)]
async fn the_stream_waits_for_news_of_every_kind() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let mut stream = Stream::of(&alice);
    stream.next().await;
    let started = env(&server).instant();
    assert_eq!(stream.next_within(5_000).await, Vec::<Value>::new());
    assert!(started.elapsed() >= Duration::from_secs(5));

    let wait = |stream: Stream| {
        server.begin(async move {
            let mut stream = stream;
            let events = stream.next_within(60_000).await;
            (stream, events)
        })
    };
    let waiting = wait(stream);
    env(&server).sleep(Duration::from_secs(1)).await;
    let event = say(&bob, &room, "hello").await;
    let (stream, events) = waiting.await.unwrap();
    assert_eq!(texts(&events), ["hello"]);
    assert_eq!((&events[0]["room_id"], &events[0]["event_id"]), (&json!(room), &json!(event)));

    let waiting = wait(stream);
    bob.ok_post(&format!("{V3}/rooms/{room}/receipt/m.read/{event}"), json!({})).await;
    let (stream, events) = waiting.await.unwrap();
    assert_eq!(types(&events), ["m.receipt"]);
    assert!(events[0]["content"][&event]["m.read"].get(&bob.user_id).is_some(), "{events:?}");
    assert_eq!(events[0]["room_id"], room);

    let waiting = wait(stream);
    let typing = format!("{V3}/rooms/{room}/typing/{}", bob.user_id);
    bob.ok_put(&typing, json!({ "typing": true, "timeout": 30_000 })).await;
    let (stream, events) = waiting.await.unwrap();
    assert_eq!(events[0]["content"]["user_ids"], json!([bob.user_id]));

    let waiting = wait(stream);
    let tag = format!("{V3}/user/{}/rooms/{room}/tags/u.work", alice.user_id);
    alice.ok_put(&tag, json!({ "order": 1 })).await;
    let (stream, events) = waiting.await.unwrap();
    assert_eq!(types(&events), ["m.tag"]);
    assert_eq!(events[0]["room_id"], room);

    let waiting = wait(stream);
    let status = format!("{V3}/presence/{}/status", bob.user_id);
    bob.ok_put(&status, json!({ "presence": "online", "status_msg": "here" })).await;
    let (stream, events) = waiting.await.unwrap();
    assert_eq!(
        (&events[0]["type"], &events[0]["content"]["user_id"]),
        (&json!("m.presence"), &json!(bob.user_id))
    );

    let waiting = wait(stream);
    let invited = create_room(&bob, json!({ "invite": [alice.user_id], "name": "Invited" })).await;
    let (mut stream, events) = waiting.await.unwrap();
    assert_eq!(types(&events), ["m.room.member"], "nothing else of a room that one is invited to");
    assert_eq!((&events[0]["room_id"], &events[0]["state_key"]), (&json!(invited), &json!(alice.user_id)));
    must(&alice, &invited, "leave", json!({})).await;
    let events = stream.next().await;
    assert_eq!(events[0]["content"]["membership"], "leave", "{events:?}");
    assert_eq!(stream.next().await, Vec::<Value>::new(), "nothing is told twice");
}

#[tokio::test(start_paused = true)]
async fn a_stay_that_ends_is_told_up_to_its_end() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let mut stream = Stream::of(&bob);
    stream.next().await;
    say(&alice, &room, "before").await;
    must(&alice, &room, "kick", json!({ "user_id": bob.user_id })).await;
    say(&alice, &room, "between").await;
    must(&alice, &room, "ban", json!({ "user_id": bob.user_id })).await;
    say(&alice, &room, "after").await;
    let events = stream.next().await;
    let memberships: Vec<_> =
        events.iter().filter_map(|event| event["content"]["membership"].as_str()).collect();
    assert_eq!(memberships, ["leave", "ban"]);
    assert_eq!(texts(&events), ["before"]);
    assert_eq!(stream.next().await, Vec::<Value>::new());
}

#[tokio::test(start_paused = true)]
async fn messages_to_devices_wait_for_a_client_that_goes_on_with_sync() {
    let server = TestServer::new();
    let (alice, bob, _room) = room_of_two(&server).await;
    let mut stream = Stream::of(&alice);
    stream.next().await;
    let path = format!("{V3}/sendToDevice/org.example/1");
    bob.ok_put(&path, json!({ "messages": { &alice.user_id: { "*": { "n": 1 } } } })).await;
    stream.next().await;
    let mut chain = Chain::of(&alice);
    chain.since = stream.from;
    assert_eq!(chain.next().await["to_device"]["events"][0]["content"], json!({ "n": 1 }));
}

#[tokio::test(start_paused = true)]
async fn a_stranger_looks_into_a_room_that_is_open_to_all() {
    let server = TestServer::with(|config| config.registration.guests = true);
    let (alice, _bob, room) = room_of_two(&server).await;
    let carol = server.register("carol").await;
    say(&alice, &room, "private").await;
    let (initial, events) =
        (format!("{V3}/rooms/{room}/initialSync"), format!("{V3}/events?room_id={room}&timeout=0"));
    for path in [&initial, &events] {
        let (status, body) = carol.get(path).await;
        assert_eq!((status, &body["errcode"]), (StatusCode::FORBIDDEN, &json!("M_FORBIDDEN")), "{path}");
    }
    open_to_all(&alice, &room).await;
    say(&alice, &room, "public").await;
    let answer = carol.ok_get(&initial).await;
    assert_eq!(texts(answer["messages"]["chunk"].as_array().unwrap()), ["public"]);
    assert!(types(answer["state"].as_array().unwrap()).contains(&"m.room.create".to_owned()));
    assert!(answer["presence"].is_array());

    let mut stream = Stream::of(&carol);
    stream.query = format!("&room_id={room}");
    stream.from = Some(answer["messages"]["end"].as_str().unwrap().to_owned());
    assert_eq!(stream.next().await, Vec::<Value>::new());
    let waiting = server.begin(async move {
        let events = stream.next_within(60_000).await;
        (stream, events)
    });
    env(&server).sleep(Duration::from_secs(1)).await;
    say(&alice, &room, "mice").await;
    let (mut stream, told) = waiting.await.unwrap();
    assert_eq!(texts(&told), ["mice"]);
    // Once the room closes, the one who looks in sees that, and then nothing.
    let path = format!("{V3}/rooms/{room}/state/m.room.history_visibility/");
    alice.ok_put(&path, json!({ "history_visibility": "joined" })).await;
    say(&alice, &room, "secret").await;
    let from = stream.from.take().unwrap();
    let (status, body) = carol.get(&format!("{events}&from={from}")).await;
    assert_eq!(status, StatusCode::FORBIDDEN, "{body}");
    let (status, _) = carol.get(&format!("{V3}/events?timeout=0&room_id=nonsense")).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}

#[tokio::test(start_paused = true)]
async fn an_event_is_given_without_its_room_to_those_who_may_see_it() {
    let server = TestServer::new();
    let (alice, bob, room) = room_of_two(&server).await;
    let carol = server.register("carol").await;
    let event = say(&alice, &room, "hello").await;
    for version in ["v3", "r0"] {
        let path = format!("/_matrix/client/{version}/events/{event}");
        let told = bob.ok_get(&path).await;
        assert_eq!((&told["room_id"], &told["content"]["body"]), (&json!(room), &json!("hello")));
        assert_eq!(carol.get(&path).await.0, StatusCode::NOT_FOUND);
    }
    let (status, body) = alice.get(&format!("{V3}/events/{}", crate::support::NOWHERE)).await;
    assert_eq!((status, &body["errcode"]), (StatusCode::NOT_FOUND, &json!("M_NOT_FOUND")));
}

#[tokio::test(start_paused = true)]
async fn what_is_asked_wrongly_is_refused() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    for query in ["limit=hello", "limit=-2", "from=t1", "from=s1_2", "from=x"] {
        let (status, body) = alice.get(&format!("{V3}/events?timeout=0&{query}")).await;
        assert_eq!(
            (status, &body["errcode"]),
            (StatusCode::BAD_REQUEST, &json!("M_INVALID_PARAM")),
            "{query}"
        );
    }
    // Some old clients begin with an empty token, and who does not say how long to wait is answered at once.
    assert_eq!(alice.ok_get(&format!("{V3}/events?from=")).await["chunk"], json!([]));
    for query in ["timeout=hello", "timeout=-1"] {
        let (status, body) = alice.get(&format!("{V3}/events?{query}")).await;
        assert_eq!(
            (status, &body["errcode"]),
            (StatusCode::BAD_REQUEST, &json!("M_INVALID_PARAM")),
            "{query}"
        );
    }
    for query in ["limit=hello", "archived=perhaps"] {
        let (status, body) = alice.get(&format!("{V3}/initialSync?{query}")).await;
        assert_eq!(
            (status, &body["errcode"]),
            (StatusCode::BAD_REQUEST, &json!("M_INVALID_PARAM")),
            "{query}"
        );
    }
    let token = format!("s{}_0_0", 1u64 << 50);
    assert_eq!(alice.get(&format!("{V3}/events?timeout=0&from={token}")).await.0, StatusCode::BAD_REQUEST);
}

#[tokio::test(start_paused = true)]
async fn every_path_of_v3_has_its_older_name() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    for path in ["initialSync", "events?timeout=0", "sync", "capabilities", "joined_rooms", "pushrules/"] {
        let (status, body) = alice.get(&format!("/_matrix/client/r0/{path}")).await;
        assert_eq!(status, StatusCode::OK, "{path}: {body}");
    }
    let (status, body) = alice.post("/_matrix/client/r0/knock/nonsense", json!({})).await;
    assert_ne!(body["errcode"], "M_UNRECOGNIZED", "{status}: {body}");
}
