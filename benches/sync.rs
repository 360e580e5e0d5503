//! Reading in process: incremental and initial syncs, a page of messages. `docs/performance.md` has the figures.
//!
//! The large world (300 rooms of 300 members) takes a minute to make; it is kept in the target directory.
//!
//! `cargo bench --bench sync -- cpu` measures no time but the processor's time of this process, for each initial sync and each
//! message sent, so that it can run on a machine that is busy. Without a disk in the way: `TMPDIR=/dev/shm`.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "a benchmark stops where it cannot go on, and reads the clock"
)]
#![allow(dead_code, clippy::allow_attributes, reason = "each benchmark uses a part of the support")]

#[path = "support/processor.rs"]
mod processor;
#[path = "support/fixture.rs"]
mod support;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use aqueduct::store::Durability;
use criterion::{BenchmarkId, Criterion, criterion_group};
use http::Method;
use processor::cpu_ms;
use serde_json::Value;
use support::Fixture;
use tokio::{runtime::Runtime, task::JoinSet};

fn open(runtime: &Runtime, path: &Path, durability: Durability) -> Fixture {
    let _context = runtime.enter();
    Fixture::open(path, durability)
}

/// A reader in so many rooms of a writer, of which one changes before each sync.
fn incremental(c: &mut Criterion, runtime: &Runtime) {
    let mut group = c.benchmark_group("incremental sync");
    group.sample_size(20).measurement_time(Duration::from_secs(3));
    let dir = tempfile::tempdir().unwrap();
    let fixture = open(runtime, dir.path(), Durability::Os);
    for room_count in [1_u64, 60, 100, 1_000] {
        let (reader, writer, room) = runtime.block_on(async {
            let reader = fixture.register(&format!("reader{room_count}")).await;
            let writer = fixture.register(&format!("writer{room_count}")).await;
            let mut last = String::new();
            for number in 0..room_count {
                last = fixture.make_room(&writer, &format!("room {number}")).await;
                fixture.join(&reader, &last).await;
                fixture.send(&writer, &last, number).await;
            }
            (reader, writer, last)
        });
        let path = "/_matrix/client/v3/sync";
        let json = runtime.block_on(fixture.json(Method::GET, path, Some(&reader), Value::Null));
        let mut since = json["next_batch"].as_str().unwrap().to_owned();
        let mut txn = room_count;
        for changed in [0_u64, 1] {
            group.bench_function(
                BenchmarkId::new(format!("{changed} changed"), format!("of {room_count}")),
                |b| {
                    b.iter_custom(|syncs| {
                        let mut took = Duration::ZERO;
                        runtime.block_on(async {
                            for _ in 0..syncs {
                                if changed > 0 {
                                    txn += 1;
                                    fixture.send(&writer, &room, txn).await;
                                }
                                let began = Instant::now();
                                let path = format!("/_matrix/client/v3/sync?timeout=0&since={since}");
                                let answer =
                                    fixture.ask(Method::GET, &path, Some(&reader), Value::Null).await;
                                took += began.elapsed();
                                let json: Value = serde_json::from_slice(&answer).unwrap();
                                since = json["next_batch"].as_str().unwrap().to_owned();
                            }
                        });
                        took
                    });
                },
            );
        }
    }
    group.finish();
    runtime.block_on(fixture.close());
}

/// So many rooms with so many members each: everybody is in every room.
async fn people(fixture: &Fixture, rooms: usize, members: usize) {
    let owner = fixture.register("member0").await;
    let mut ids = Vec::new();
    for number in 0..rooms {
        let room = fixture.make_room(&owner, &format!("room {number}")).await;
        ids.push(room);
    }
    let mut tasks = JoinSet::new();
    for member in 1..members {
        let (fixture, ids) = (fixture.clone(), ids.clone());
        tasks.spawn(async move {
            let token = fixture.register(&format!("member{member}")).await;
            for room in &ids {
                fixture.join(&token, room).await;
            }
            // The last ones talk, so that timelines are not all joins.
            if member + 20 > 300 {
                for (txn, room) in ids.iter().enumerate() {
                    fixture.send(&token, room, txn as u64).await;
                }
            }
        });
        if tasks.len() >= 32 {
            tasks.join_next().await.unwrap().unwrap();
        }
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
}

/// The rooms of everybody: made once, then kept.
fn open_large(runtime: &Runtime) -> Fixture {
    let (rooms, members) = (300, 300);
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("bench-300-rooms-of-300");
    let done = path.join("made");
    if !done.exists() {
        drop(std::fs::remove_dir_all(&path));
        std::fs::create_dir_all(&path).unwrap();
        let fixture = open(runtime, &path.join("db"), Durability::Os);
        runtime.block_on(people(&fixture, rooms, members));
        runtime.block_on(fixture.close());
        std::fs::write(&done, "").unwrap();
    }
    open(runtime, &path.join("db"), Durability::Fsync)
}

const LAZY: &str = "%7B%22room%22:%7B%22state%22:%7B%22lazy_load_members%22:true%7D%7D%7D";
const EVERYBODY: &str = "%7B%7D";

fn large(c: &mut Criterion, runtime: &Runtime) {
    let fixture = open_large(runtime);
    let token = runtime.block_on(fixture.log_in("member7"));
    let mut group = c.benchmark_group("300 rooms of 300 members");
    group.sample_size(10).measurement_time(Duration::from_secs(5));
    for (name, filter) in [("initial sync, lazy", LAZY), ("initial sync, everybody", EVERYBODY)] {
        let path = format!("/_matrix/client/v3/sync?filter={filter}");
        group.bench_function(name, |b| {
            b.iter(|| runtime.block_on(fixture.ask(Method::GET, &path, Some(&token), Value::Null)));
        });
    }
    let path = "/_matrix/client/v3/joined_rooms";
    let joined = runtime.block_on(fixture.json(Method::GET, path, Some(&token), Value::Null));
    let room = joined["joined_rooms"].as_array().unwrap().first().unwrap().as_str().unwrap().to_owned();
    let page = format!("/_matrix/client/v3/rooms/{room}/messages?dir=b&limit=100");
    group.bench_function("a page of 100 messages", |b| {
        b.iter(|| runtime.block_on(fixture.ask(Method::GET, &page, Some(&token), Value::Null)));
    });
    group.finish();
    runtime.block_on(fixture.close());
}

fn bench(c: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    incremental(c, &runtime);
    large(c, &runtime);
}

criterion_group!(benches, bench);

/// Waits until the server has nothing of its own to do: after a start it tells for each user who was online before.
fn settle() {
    loop {
        let before = cpu_ms();
        std::thread::sleep(Duration::from_secs(1));
        if cpu_ms() - before <= 20.0 {
            return;
        }
    }
}

/// Prints what one of so many costs the processor, beside what went before.
fn print_each(name: &str, count: usize, before_ms: f64) {
    println!("{name:<48} {:>9.3} ms of CPU each", (cpu_ms() - before_ms) / count as f64);
}

fn cpu_of_syncs(runtime: &Runtime, fixture: &Fixture, token: &str, name: &str, count: usize) {
    for (which, filter) in [("lazy", LAZY), ("everybody", EVERYBODY)] {
        let path = format!("/_matrix/client/v3/sync?filter={filter}");
        let sync = || runtime.block_on(fixture.ask(Method::GET, &path, Some(token), Value::Null));
        sync();
        let before = cpu_ms();
        let bytes: usize = (0..count).map(|_| sync().len()).sum();
        print_each(&format!("{name}, {which}, {} KB", bytes / count / 1_000), count, before);
    }
}

fn cpu_of_small_rooms(runtime: &Runtime) {
    let dir = tempfile::tempdir().unwrap();
    let fixture = open(runtime, dir.path(), Durability::Fsync);
    let token = runtime.block_on(async {
        let token = fixture.register("reader").await;
        for number in 0..60 {
            let room = fixture.make_room(&token, &format!("room {number}")).await;
            for txn in 0..20 {
                fixture.send(&token, &room, txn).await;
            }
        }
        token
    });
    cpu_of_syncs(runtime, &fixture, &token, "initial sync, 60 rooms of 20 messages", 300);
    runtime.block_on(fixture.close());
}

/// Sliding sync of a user in a thousand rooms: the first window, the list of all rooms, polls without news and with some.
fn cpu_of_slides(runtime: &Runtime) {
    const ROOMS: u64 = 1_000;
    let dir = tempfile::tempdir().unwrap();
    let fixture = open(runtime, dir.path(), Durability::Os);
    let (token, writer, rooms) = runtime.block_on(async {
        let (token, writer) = (fixture.register("reader").await, fixture.register("writer").await);
        let mut rooms = Vec::new();
        for number in 0..ROOMS {
            let room = fixture.make_room(&writer, &format!("room {number}")).await;
            fixture.join(&token, &room).await;
            fixture.send(&writer, &room, number).await;
            rooms.push(room);
        }
        (token, writer, rooms)
    });
    let state = serde_json::json!([
        ["m.room.name", ""],
        ["m.room.encryption", ""],
        ["m.room.member", "$LAZY"],
        ["m.room.member", "$ME"],
        ["m.room.topic", ""],
        ["m.room.avatar", ""],
        ["m.room.canonical_alias", ""],
        ["m.room.power_levels", ""],
        ["m.room.create", ""],
        ["m.space.child", "*"],
    ]);
    let list = |last: u64| {
        let filters = serde_json::json!({ "not_room_types": ["m.space"] });
        let list = serde_json::json!({
            "ranges": [[0, last]], "timeline_limit": 1, "required_state": state, "filters": filters,
        });
        serde_json::json!({ "lists": { "all": list } })
    };
    let path = "/_matrix/client/unstable/org.matrix.simplified_msc3575/sync?timeout=0";
    let slide = |pos: Option<&str>, last: u64| {
        let path = pos.map_or(path.to_owned(), |pos| format!("{path}&pos={pos}"));
        let json = runtime.block_on(fixture.json(Method::POST, &path, Some(&token), list(last)));
        json["pos"].as_str().unwrap().to_owned()
    };
    let before = cpu_ms();
    slide(None, 19);
    print_each("sliding sync, first window of 1,000 rooms, cold", 1, before);
    let before = cpu_ms();
    (0..50).for_each(|_| drop(slide(None, 19)));
    print_each("sliding sync, first window of 1,000 rooms", 50, before);
    let mut pos = slide(None, 19);
    let before = cpu_ms();
    pos = slide(Some(&pos), ROOMS);
    print_each("sliding sync, all the other rooms at once", 1, before);
    pos = slide(Some(&pos), ROOMS);
    let before = cpu_ms();
    (0..100).for_each(|_| pos = slide(Some(&pos), ROOMS));
    print_each("sliding sync, no news, a list of 1,000 rooms", 100, before);
    let mut took = 0.0;
    for (txn, room) in (ROOMS..).zip(rooms.iter().take(100)) {
        runtime.block_on(fixture.send(&writer, room, txn));
        let before = cpu_ms();
        pos = slide(Some(&pos), ROOMS);
        took += cpu_ms() - before;
    }
    print_each("sliding sync, a message in one of 1,000 rooms", 100, cpu_ms() - took);
    runtime.block_on(fixture.close());
}

/// The tree of a space of 500 rooms (page by page, as clients ask for it), and the first page of 500 threads.
fn cpu_of_lists(runtime: &Runtime) {
    const ROOMS: usize = 500;
    const THREADS: u64 = 500;
    let dir = tempfile::tempdir().unwrap();
    let fixture = open(runtime, dir.path(), Durability::Os);
    let put = |path: String, token: &str, body: Value| {
        let json = runtime.block_on(fixture.json(Method::PUT, &path, Some(token), body));
        json["event_id"].as_str().unwrap().to_owned()
    };
    let token = runtime.block_on(fixture.register("owner"));
    let space = serde_json::json!({ "preset": "public_chat", "creation_content": { "type": "m.space" } });
    let path = "/_matrix/client/v3/createRoom";
    let space = runtime.block_on(fixture.json(Method::POST, path, Some(&token), space));
    let space = space["room_id"].as_str().unwrap().to_owned();
    let mut last = String::new();
    for number in 1..ROOMS {
        last = runtime.block_on(fixture.make_room(&token, &format!("room {number}")));
        let path = format!("/_matrix/client/v3/rooms/{space}/state/m.space.child/{last}");
        put(path, &token, serde_json::json!({ "via": ["bench.example"] }));
    }
    let reader = runtime.block_on(fixture.register("reader"));
    runtime.block_on(fixture.join(&reader, &space));
    let list = || {
        let (mut found, mut from) = (0, String::new());
        loop {
            let path = format!("/_matrix/client/v1/rooms/{space}/hierarchy?limit=50{from}");
            let page = runtime.block_on(fixture.json(Method::GET, &path, Some(&reader), Value::Null));
            found += page["rooms"].as_array().unwrap().len();
            match page["next_batch"].as_str() {
                Some(next) => from = format!("&from={next}"),
                None => return found,
            }
        }
    };
    assert_eq!(list(), ROOMS);
    let before = cpu_ms();
    (0..20).for_each(|_| _ = list());
    print_each("the whole tree of a space of 500 rooms", 20, before);
    let send = |txn: String, body: Value| {
        put(format!("/_matrix/client/v3/rooms/{last}/send/m.room.message/{txn}"), &token, body)
    };
    for number in 0..THREADS {
        let root =
            send(format!("root{number}"), serde_json::json!({ "msgtype": "m.text", "body": "a root" }));
        for reply in 0..3 {
            let relates = serde_json::json!({ "rel_type": "m.thread", "event_id": root });
            let body = serde_json::json!({ "msgtype": "m.text", "body": "a reply", "m.relates_to": relates });
            send(format!("{number}-{reply}"), body);
        }
    }
    runtime.block_on(fixture.join(&reader, &last));
    let path = format!("/_matrix/client/v1/rooms/{last}/threads?limit=50");
    let page = || runtime.block_on(fixture.json(Method::GET, &path, Some(&reader), Value::Null));
    assert_eq!(page()["chunk"].as_array().unwrap().len(), 50);
    let before = cpu_ms();
    (0..100).for_each(|_| drop(page()));
    print_each("a page of 50 of 500 threads", 100, before);
    runtime.block_on(fixture.close());
}

fn cpu_of_sends(runtime: &Runtime) {
    const EACH: u64 = 400;
    let dir = tempfile::tempdir().unwrap();
    let fixture = open(runtime, dir.path(), Durability::Fsync);
    for (writers, is_one_room) in [(16, false), (16, true), (64, false), (64, true)] {
        let contexts: Vec<_> = runtime.block_on(async {
            let owner = fixture.register(&format!("owner{writers}{is_one_room}")).await;
            let shared = fixture.make_room(&owner, "shared").await;
            let mut contexts = Vec::new();
            for writer in 0..writers {
                let token = fixture.register(&format!("w{writers}{is_one_room}{writer}")).await;
                let room = if is_one_room { shared.clone() } else { fixture.make_room(&token, "own").await };
                if is_one_room {
                    fixture.join(&token, &room).await;
                }
                contexts.push((token, room));
            }
            contexts
        });
        let (before, began) = (cpu_ms(), Instant::now());
        runtime.block_on(async {
            let mut tasks = JoinSet::new();
            for (token, room) in contexts {
                let fixture = fixture.clone();
                tasks.spawn(async move {
                    for txn in 0..EACH {
                        fixture.send(&token, &room, txn).await;
                    }
                });
            }
            while let Some(done) = tasks.join_next().await {
                done.unwrap();
            }
        });
        let (sent, took) = (writers as u64 * EACH, began.elapsed().as_secs_f64());
        let rooms = if is_one_room { "one room" } else { "many rooms" };
        let name = format!("send x{writers}, {rooms}, {:.0} a second", sent as f64 / took);
        print_each(&name, sent as usize, before);
    }
    runtime.block_on(fixture.close());
}

/// Measures only what the processor does; names of parts (`rooms`, `large`, `slides`, `lists`, `sends`) run only those.
fn cpu(parts: &[String]) {
    let runtime = Runtime::new().unwrap();
    let is_wanted = |part: &str| parts.is_empty() || parts.iter().any(|named| named == part);
    if is_wanted("rooms") {
        cpu_of_small_rooms(&runtime);
    }
    if is_wanted("large") {
        let fixture = open_large(&runtime);
        let token = runtime.block_on(fixture.log_in("member7"));
        settle();
        cpu_of_syncs(&runtime, &fixture, &token, "initial sync, 300 rooms of 300 members", 10);
        runtime.block_on(fixture.close());
    }
    if is_wanted("slides") {
        cpu_of_slides(&runtime);
    }
    if is_wanted("lists") {
        cpu_of_lists(&runtime);
    }
    if is_wanted("sends") {
        cpu_of_sends(&runtime);
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match arguments.split_first() {
        Some((first, parts)) if first == "cpu" => cpu(parts),
        _ => {
            benches();
            Criterion::default().configure_from_args().final_summary();
        }
    }
}
