//! Events of another server as they come in by transactions, and a large room that is joined by way of another server: the work
//! of this process alone, over RocksDB and a network in memory. `docs/performance.md` has the figures.
//!
//! `cargo bench --bench federation` measures all; `-- ingest`, `-- join` and `-- partial` one of them: the last joins the large room
//! without its members first. The clock stands still while there is work, so the times are those of the processor.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a benchmark stops where it cannot go on"
)]
#![allow(dead_code, clippy::allow_attributes, reason = "each benchmark uses a part of the support")]

#[path = "support/processor.rs"]
mod processor;
#[path = "../tests/support/mod.rs"]
mod support;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use aqueduct::store::{Durability, Engine, Store, engine::Rocks};
use federation::testing::{Net, json as reply};
use http::StatusCode;
use processor::cpu_ms;
use ruma::OwnedEventId;
use serde_json::{Value, json};
use support::{
    TestServer, encoded,
    network::{Peer, doors},
    remote::Remote,
    scripted::{Elsewhere, honest},
};

const TRANSACTIONS: usize = 100;
const EVENTS_EACH: usize = 50;
const MEMBERS: usize = 50_000;

/// A value of `/proc/self/status` in MiB.
fn memory_mib(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

fn server(net: &Net, dir: &tempfile::TempDir) -> TestServer {
    let engine = Engine::Rocks(Rocks::open(dir.path(), 256 << 20).unwrap());
    TestServer::start(doors(net), Store::open(engine, Durability::Fsync).unwrap(), |_| {})
}

/// Messages of another server's user, each on the one before it, in transactions of fifty.
async fn ingest() {
    let (net, dir) = (Net::new(1), tempfile::tempdir().unwrap());
    let server = server(&net, &dir);
    let peer = Peer::new(&net, "b.example", "5.0.0.2", 2);
    let alice = server.register("alice").await;
    let body = json!({ "preset": "public_chat" });
    let room = alice.ok_post("/createRoom", body).await["room_id"].as_str().unwrap().to_owned();
    let bob = Remote::new(server.server().app(), &room);
    let joins = json!({ "membership": "join" });
    let (id, join) = peer.event(&bob, "m.room.member", Some(bob.user.as_str()), joins, &bob.heads());
    let (status, answer) = peer.transact(&server, "join", &[join], &[]).await;
    assert_eq!((status, &answer["pdus"][id.as_str()]), (StatusCode::OK, &json!({})), "{answer}");
    let mut heads: Vec<OwnedEventId> = bob.heads();
    let mut transactions: Vec<Vec<Value>> = Vec::new();
    for number in 0..TRANSACTIONS {
        let mut events = Vec::new();
        for place in 0..EVENTS_EACH {
            let content = json!({ "msgtype": "m.text", "body": format!("message {number} {place}") });
            let (id, event) = peer.event(&bob, "m.room.message", None, content, &heads);
            heads = vec![id];
            events.push(event);
        }
        transactions.push(events);
    }
    let before = cpu_ms();
    for (number, events) in transactions.iter().enumerate() {
        let (status, answer) = peer.transact(&server, &format!("t{number}"), events, &[]).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
    }
    let took = cpu_ms() - before;
    assert_eq!(bob.heads(), heads, "all were taken in");
    let count = (TRANSACTIONS * EVENTS_EACH) as f64;
    println!(
        "events of another server: {:.3} ms of CPU each, {:.0} a second and core",
        took / count,
        count / took * 1e3
    );
}

/// A room of another server with many members.
fn large_room() -> Elsewhere {
    let mut room = Elsewhere::new(11);
    for number in 0..MEMBERS {
        let user = format!("@member{number}:a.example");
        let event = room.event(&user, "m.room.member", Some(&user), json!({ "membership": "join" }));
        room.events.push(event.clone());
        room.state.insert(("m.room.member".to_owned(), user), event);
    }
    room
}

/// A user comes into a room of another server with many members.
async fn join() {
    let (net, dir) = (Net::new(1), tempfile::tempdir().unwrap());
    let room = large_room();
    let answer = room.answer(&Value::Null).to_string().len();
    let _asked = room.serve(&net, honest());
    let server = server(&net, &dir);
    let bob = server.register("bob").await;
    let (before, memory) = (cpu_ms(), memory_mib("VmRSS"));
    let path = format!("/join/{}?server_name=a.example", encoded(room.room_id.as_str()));
    bob.ok_post(&path, json!({})).await;
    let took = cpu_ms() - before;
    let members = bob.ok_get(&format!("/rooms/{}/joined_members", encoded(room.room_id.as_str()))).await;
    assert_eq!(members["joined"].as_object().unwrap().len(), MEMBERS + 2);
    println!(
        "a room of {MEMBERS} members, an answer of {} MiB: joined in {:.1} s of CPU, making the answer included; memory {memory} MiB before, {} at most",
        answer >> 20,
        took / 1e3,
        memory_mib("VmHWM"),
    );
}

/// The same by way of a server that leaves out the members, and gives them later.
async fn partial() {
    let (net, dir) = (Net::new(1), tempfile::tempdir().unwrap());
    let mut room = large_room();
    room.omits = true;
    let gives_state = Arc::new(AtomicBool::new(false));
    let gives = Arc::clone(&gives_state);
    let _asked = room.serve(
        &net,
        Arc::new(move |endpoint, answer| match endpoint {
            "state" | "state_ids" if !gives.load(Ordering::Relaxed) => reply(503, "{}"),
            _ => reply(200, answer.to_string()),
        }),
    );
    let server = server(&net, &dir);
    let bob = server.register("bob").await;
    let (before, memory) = (cpu_ms(), memory_mib("VmRSS"));
    let path = format!("/join/{}?server_name=a.example", encoded(room.room_id.as_str()));
    bob.ok_post(&path, json!({})).await;
    let path = format!("/rooms/{}/send/m.room.message/1", encoded(room.room_id.as_str()));
    bob.ok_put(&path, json!({ "msgtype": "m.text", "body": "hello" })).await;
    let usable = cpu_ms() - before;
    gives_state.store(true, Ordering::Relaxed);
    let before = cpu_ms();
    let app = server.server().app();
    loop {
        app.env.sleep(std::time::Duration::from_secs(10)).await;
        let path = format!("/_matrix/client/v3/rooms/{}/joined_members", encoded(room.room_id.as_str()));
        let (status, members) = bob.get(&path).await;
        if status == StatusCode::OK {
            assert_eq!(members["joined"].as_object().unwrap().len(), MEMBERS + 2);
            break;
        }
    }
    println!(
        "the same without its members first: joined and written to in {:.0} ms of CPU, whole after {:.1} s more, giving the state included; memory {memory} MiB before, {} at most",
        usable,
        (cpu_ms() - before) / 1e3,
        memory_mib("VmHWM"),
    );
}

fn main() {
    let named: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |name: &str| named.is_empty() || named.iter().any(|given| given == name);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    if wanted("ingest") {
        runtime.block_on(ingest());
    }
    if wanted("join") {
        runtime.block_on(join());
    }
    if wanted("partial") {
        runtime.block_on(partial());
    }
}
