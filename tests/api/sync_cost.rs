//! The cost of a sync, in reads of the store: it follows what changed, and not how much there is.

use aqueduct::{
    ids::UserNum,
    rooms, schema,
    schema::rooms::Membership,
    store::{Engine, Guard, Store},
};
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    support::{TestClient, TestServer},
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
    let room_id = ruma::RoomId::parse(room).unwrap();
    let num = rooms::find_room(&*store.snapshot(), &room_id).unwrap().unwrap();
    let mut batch = store.batch(&Guard::alone());
    for user in 0..count {
        schema::ROOM_USER.put(&mut batch, (num, UserNum(1_000_000 + user)), &Membership::Join);
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
    assert!(costs.iter().all(|(_, rows)| *rows <= 15), "rows read by a message after: {costs:?}");
}
