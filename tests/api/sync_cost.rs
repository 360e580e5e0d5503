//! The cost of a sync, in reads of the store: it follows what changed, and not how much there is.

use aqueduct::{
    ids::{Order, Position, UserNum},
    rooms,
    rooms::receipts::Receipt,
    schema,
    schema::{
        receipts::{ReceiptKey, ReceiptKind},
        rooms::Membership,
    },
    store::{Durability, Engine, Guard, Store, engine::Rocks},
};
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    support::{TestClient, TestServer, room_num},
    sync::{Chain, bodies, create_room, env, must, say},
};

/// The number of rows that the chain's next sync reads in the store, and its answer.
async fn cost_of_next(store: &Store, chain: &mut Chain) -> (u64, Value) {
    let Engine::Memory(memory) = store.engine() else { panic!("tests run in memory") };
    let before = memory.reads();
    let answer = chain.next().await;
    (memory.reads() - before, answer)
}

async fn join_rooms(reader: &TestClient, writer: &TestClient, count: usize) -> String {
    let mut last = String::new();
    for _ in 0..count {
        last = create_room(writer, json!({ "preset": "public_chat" })).await;
        must(reader, &last, "join", json!({})).await;
    }
    last
}

#[tokio::test(start_paused = true)]
async fn a_sync_of_one_changed_room_reads_as_much_with_a_thousand_rooms_as_with_ten() {
    let server = TestServer::new();
    let (reader, writer) = (server.register("reader").await, server.register("writer").await);
    let store = server.server().app().store.clone();
    let mut costs = Vec::new();
    for (already, count) in [(0, 10), (10, 1_000)] {
        let room = join_rooms(&reader, &writer, count - already).await;
        let mut chain = Chain::of(&reader);
        chain.next().await;
        // The server notes once a minute when a device was last seen, and must not do so in the middle of what is counted.
        env(&server).sleep(std::time::Duration::from_secs(90)).await;
        chain.next().await;
        let (empty, answer) = cost_of_next(&store, &mut chain).await;
        assert!(answer.get("rooms").is_none(), "{answer}");
        say(&writer, &room, "news").await;
        let (changed, answer) = cost_of_next(&store, &mut chain).await;
        assert_eq!(bodies(&answer, &room), ["news"]);
        costs.push((empty, changed));
    }
    // The state of a room is found by rows that are there in both cases.
    assert_eq!(
        costs[0], costs[1],
        "reads of a sync without news, and of one with a message, by rooms joined"
    );
    assert!(costs[1].1 < 100, "{costs:?}");
}

/// Puts users of ours into a room, as far as the room's own tables know them; thousands of real ones take minutes.
async fn add_members(store: &Store, room: &str, count: u64) {
    let num = room_num(store, room);
    let mut batch = store.batch(&Guard::alone());
    for user in 0..count {
        schema::ROOM_USER.put(&mut batch, (num, UserNum(1_000_000 + user)), &Membership::Join.into());
    }
    store.enqueue(batch).unwrap().flushed.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_message_after_a_join_a_leave_a_new_name_or_a_new_rule_reads_as_few_rows_as_any() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let store = server.server().app().store.clone();
    let Engine::Memory(memory) = store.engine() else { panic!("tests run in memory") };
    let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
    add_members(&store, &room, 300).await;
    must(&bob, &room, "join", json!({})).await;
    for client in [&alice, &bob] {
        say(client, &room, &format!("first of {}", client.user_id)).await;
    }
    let profile = format!("/_matrix/client/v3/profile/{}/displayname", bob.user_id);
    let mut costs = Vec::new();
    for cause in ["nothing", "a leave", "a join", "a new name", "a push rule"] {
        match cause {
            "a leave" => must(&bob, &room, "leave", json!({})).await,
            "a join" => must(&bob, &room, "join", json!({})).await,
            "a new name" => {
                let (status, json) = bob.put(&profile, json!({ "displayname": "Robert" })).await;
                assert_eq!(status, StatusCode::OK, "{json}");
            }
            "a push rule" => {
                let rule = json!({ "pattern": "cake", "actions": ["notify"] });
                let (status, json) = bob.put("/_matrix/client/v3/pushrules/global/content/cake", rule).await;
                assert_eq!(status, StatusCode::OK, "{json}");
            }
            _ => {}
        }
        let before = memory.reads();
        say(&alice, &room, &format!("after {cause}")).await;
        costs.push((cause, memory.reads() - before));
    }
    // Each reader of the log, of which there are several, reads three.
    assert!(costs.iter().all(|(_, rows)| *rows <= 19), "rows read by a message after: {costs:?}");
}

/// The number of iterators that RocksDB made so far.
fn iterators(store: &Store) -> u64 {
    let Engine::Rocks(rocks) = store.engine() else { panic!("this test runs on disk") };
    rocks.iterators_made()
}

/// An initial sync, with all members or with those who are needed.
async fn sync_from_nothing(client: &TestClient, is_lazy: bool) -> Value {
    let filter = json!({ "room": { "state": { "lazy_load_members": is_lazy } } }).to_string();
    let filter: String = filter.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let (status, json) = client.get(&format!("/_matrix/client/v3/sync?timeout=0&filter={filter}")).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    json
}

#[tokio::test]
async fn an_initial_sync_makes_no_more_iterators_however_many_rooms_there_are() {
    let dir = tempfile::tempdir().unwrap();
    let rocks = Rocks::open(dir.path(), 8 << 20).unwrap();
    let server = TestServer::over(Store::open(Engine::Rocks(rocks), Durability::Os).unwrap(), |_| {});
    let store = server.server().app().store.clone();
    let (reader, writer) = (server.register("reader").await, server.register("writer").await);
    let mut made = Vec::new();
    for (already, count) in [(0, 5), (5, 60)] {
        for _ in already..count {
            let room = join_rooms(&reader, &writer, 1).await;
            for text in 0..3 {
                say(&writer, &room, &text.to_string()).await;
            }
        }
        for is_lazy in [false, true] {
            let before = iterators(&store);
            let answer = sync_from_nothing(&reader, is_lazy).await;
            assert_eq!(answer["rooms"]["join"].as_object().unwrap().len(), count);
            made.push(iterators(&store) - before);
        }
    }
    // Some families are read inside a range of themselves. Requests that end meanwhile may publish a new snapshot, of which the
    // next reader makes iterators anew.
    assert!(made.iter().all(|made| *made <= 40), "iterators of syncs of 5 and of 60 rooms: {made:?}");
}

#[tokio::test(start_paused = true)]
async fn what_a_room_adds_to_an_initial_sync_is_its_rows_and_a_few_questions() {
    let server = TestServer::new();
    let (reader, writer) = (server.register("reader").await, server.register("writer").await);
    let store = server.server().app().store.clone();
    let Engine::Memory(memory) = store.engine() else { panic!("tests run in memory") };
    let mut reads = Vec::new();
    for (already, count) in [(0, 20), (20, 60)] {
        for _ in already..count {
            let room = join_rooms(&reader, &writer, 1).await;
            for text in 0..20 {
                say(&writer, &room, &text.to_string()).await;
            }
        }
        for is_lazy in [false, true] {
            let before = memory.reads();
            sync_from_nothing(&reader, is_lazy).await;
            reads.push(memory.reads() - before);
        }
    }
    let (whole, lazy) = ((reads[2] - reads[0]) / 40, (reads[3] - reads[1]) / 40);
    // A room of two members has eight events of state, of which each is found by three rows, and ten messages in its timeline.
    assert!(whole <= ROOM_READS_MAX, "{whole} reads a room");
    assert!(lazy <= ROOM_READS_MAX + 8, "{lazy} reads a room");
}

/// The reads of one room of 8 state events and 20 messages in an initial sync.
const ROOM_READS_MAX: u64 = 85;

#[tokio::test(start_paused = true)]
async fn to_type_and_to_join_a_restricted_room_reads_as_much_however_many_members_there_are() {
    let server = TestServer::new();
    let store = server.server().app().store.clone();
    let Engine::Memory(memory) = store.engine() else { panic!("tests run in memory") };
    let alice = server.register("alice").await;
    let club = create_room(&alice, json!({ "preset": "public_chat" })).await;
    let allow = json!([{ "type": "m.room_membership", "room_id": club }]);
    let rules = json!({ "type": "m.room.join_rules", "state_key": "",
        "content": { "join_rule": "restricted", "allow": allow } });
    let room = create_room(&alice, json!({ "initial_state": [rules] })).await;
    let typing = format!("/_matrix/client/v3/rooms/{room}/typing/{}", alice.user_id);
    let mut costs = Vec::new();
    for (members, names) in [(3, ["bob", "carol"]), (300, ["dan", "eve"])] {
        add_members(&store, &room, members).await;
        let mut joined = 0;
        // The first of them makes the room's tip know who is in it.
        for name in names {
            let client = server.register(name).await;
            must(&client, &club, "join", json!({})).await;
            let before = memory.reads();
            must(&client, &room, "join", json!({})).await;
            joined = memory.reads() - before;
        }
        let before = memory.reads();
        let (status, json) = alice.put(&typing, json!({ "typing": true, "timeout": 1_000 })).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        costs.push((joined, memory.reads() - before));
        env(&server).sleep(std::time::Duration::from_secs(5)).await;
    }
    assert_eq!(costs[0], costs[1], "rows read by a join and by typing");
}

/// Writes receipts of users who are not here, at the beginning of the room.
async fn add_receipts(store: &Store, room: &str, users: std::ops::Range<usize>) {
    let num = room_num(store, room);
    let mut batch = store.batch(&Guard::alone());
    for number in users {
        let user = ruma::UserId::parse(format!("@reader{number}:test.example")).unwrap();
        let receipt = Receipt {
            room: num,
            key: ReceiptKey { user, kind: ReceiptKind::Public, thread: String::new() },
            event_id: ruma::EventId::parse("$event").unwrap(),
            order: Order { anchor: Position::ZERO, minor: 1 },
            sent_ms: 1,
        };
        assert!(rooms::receipts::keep(&mut batch, &receipt).unwrap());
    }
    store.enqueue(batch).unwrap().flushed.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_sync_reads_the_receipts_that_are_new_and_not_those_of_the_room() {
    let server = TestServer::new();
    let store = server.server().app().store.clone();
    let alice = server.register("alice").await;
    let room = create_room(&alice, json!({ "preset": "public_chat" })).await;
    let mut chain = Chain::of(&alice);
    let mut costs = Vec::new();
    for (already, more) in [(0, 10), (11, 400)] {
        add_receipts(&store, &room, already..already + more).await;
        chain.next().await;
        env(&server).sleep(std::time::Duration::from_secs(90)).await;
        chain.next().await;
        add_receipts(&store, &room, already + more..already + more + 1).await;
        let (rows, answer) = cost_of_next(&store, &mut chain).await;
        let told =
            answer["rooms"]["join"][&room]["ephemeral"]["events"][0]["content"]["$event"]["m.read"].clone();
        assert_eq!(told.as_object().map(serde_json::Map::len), Some(1), "{answer}");
        costs.push(rows);
    }
    assert_eq!(costs[0], costs[1], "rows read by a sync that tells of one receipt");
}
