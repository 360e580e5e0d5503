//! Commit throughput: writers in one room (one lock) and in as many rooms, with and without fsync.
//!
//! A commit is what a message writes: eight rows, one log entry, one position. `docs/performance.md` has the figures.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "a benchmark stops where it cannot go on, and reads the clock"
)]

use std::{collections::BTreeSet, hint::black_box, sync::Arc, time::Duration};

use aqueduct::{
    env::Env,
    ids::RoomNum,
    server::flusher,
    store::{Domain, Durability, Engine, Family, Guard, LogEntry, Read, Store, Table, engine::Rocks},
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use parking_lot::Mutex;
use tokio::{runtime::Runtime, task::JoinSet};

static EVENTS: Table<(u64, u64), String> = table(240, Family::Events);
static IDS: Table<[u8; 32], u64> = table(241, Family::Index);
static NUMBERS: Table<(u64, u64), u64> = table(242, Family::Index);
static ROOMS: Table<u64, String> = table(243, Family::State);

const fn table<K, V>(id: u8, family: Family) -> Table<K, V> {
    Table::new(id, family, "BENCH", Domain::Room, "benches")
}

/// What a room's builder keeps under its lock.
#[derive(Default)]
struct Room {
    number: u64,
    next_event: u64,
}

async fn send(store: &Store, room: &Mutex<Room>, body: &str) {
    let enqueued = {
        let mut room = room.lock();
        room.next_event += 1;
        let (number, event) = (room.number, room.next_event);
        let mut batch = store.batch(&Guard::alone());
        batch.position(&LogEntry::Event { room: RoomNum(number), event: aqueduct::ids::EventNum(event) });
        let mut id = [0; 32];
        id[..8].copy_from_slice(&number.to_be_bytes());
        id[8..16].copy_from_slice(&event.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
        // Two reads of what waits, as a builder makes.
        black_box(ROOMS.get(&batch, number).unwrap());
        IDS.expect_absent(&mut batch, &id);
        EVENTS.put(&mut batch, (number, event), &body.to_owned());
        IDS.put(&mut batch, &id, &event);
        ROOMS.put(&mut batch, number, &"heads, counters and what else a room keeps in one row".to_owned());
        for index in 0..4 {
            NUMBERS.put(&mut batch, (number, event * 4 + index), &event);
        }
        store.enqueue(batch).unwrap()
    };
    enqueued.flushed.await.unwrap();
}

fn bench(c: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    let _context = runtime.enter();
    let body = "x".repeat(700);
    let mut group = c.benchmark_group("commit");
    group.sample_size(10).measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_secs(1));
    for durability in [Durability::Fsync, Durability::Os] {
        for writers in [1_usize, 16, 64] {
            for rooms in BTreeSet::from([1, writers]) {
                let dir = tempfile::tempdir().unwrap();
                let store =
                    Store::open(Engine::Rocks(Rocks::open(dir.path(), 64 << 20).unwrap()), durability)
                        .unwrap();
                let env = Env::real().unwrap();
                flusher::start(&store, &env, |_| (), |_, _| ()).unwrap();
                let rooms: Vec<_> = (0..rooms as u64)
                    .map(|number| Arc::new(Mutex::new(Room { number, next_event: 0 })))
                    .collect();
                let name = format!("{durability:?}, {writers} writers");
                group.throughput(Throughput::Elements(1));
                group.bench_function(BenchmarkId::new(name, format!("{} rooms", rooms.len())), |b| {
                    b.iter_custom(|commits| {
                        let began = std::time::Instant::now();
                        runtime.block_on(async {
                            let mut tasks = JoinSet::new();
                            for writer in 0..writers {
                                let share = commits / writers as u64
                                    + u64::from((writer as u64) < commits % writers as u64);
                                let (store, body) = (store.clone(), body.clone());
                                let room = rooms[writer % rooms.len()].clone();
                                tasks.spawn(async move {
                                    for _ in 0..share {
                                        send(&store, &room, &body).await;
                                    }
                                });
                            }
                            while let Some(done) = tasks.join_next().await {
                                done.unwrap();
                            }
                        });
                        began.elapsed()
                    });
                });
                black_box(store.snapshot().upto());
                drop(store);
                env.kill();
                runtime.block_on(env.ended());
            }
        }
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
