//! The cost of a sync, in reads of the store: it follows what changed, and not how much there is.

use aqueduct::store::{Engine, Store};
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
