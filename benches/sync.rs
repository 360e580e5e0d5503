//! Reading in process: incremental and initial syncs, a page of messages. `docs/performance.md` has the figures.
//!
//! The large world (300 rooms of 300 members) takes a minute to make; it is kept in the target directory.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "a benchmark stops where it cannot go on, and reads the clock"
)]
#![allow(dead_code, clippy::allow_attributes, reason = "each benchmark uses a part of the support")]

#[path = "support/fixture.rs"]
mod support;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use aqueduct::store::Durability;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use http::Method;
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

fn large(c: &mut Criterion, runtime: &Runtime) {
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
    let fixture = open(runtime, &path.join("db"), Durability::Fsync);
    let token = runtime.block_on(fixture.log_in("member7"));
    let mut group = c.benchmark_group("300 rooms of 300 members");
    group.sample_size(10).measurement_time(Duration::from_secs(5));
    let lazy = "%7B%22room%22:%7B%22state%22:%7B%22lazy_load_members%22:true%7D%7D%7D";
    for (name, filter) in [("initial sync, lazy", lazy), ("initial sync, everybody", "%7B%7D")] {
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
criterion_main!(benches);
