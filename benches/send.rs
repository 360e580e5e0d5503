//! The send path in process: router, token, build, admit, commit with fsync, answer. `docs/performance.md` has the figures.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "a benchmark stops where it cannot go on, and reads the clock"
)]
#![allow(dead_code, clippy::allow_attributes, reason = "each benchmark uses a part of the support")]

#[path = "support/house.rs"]
mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use aqueduct::store::Durability;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use support::House;
use tokio::{runtime::Runtime, task::JoinSet};

fn bench(c: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    let mut group = c.benchmark_group("send");
    group.sample_size(10).measurement_time(Duration::from_secs(3)).throughput(Throughput::Elements(1));
    for durability in [Durability::Fsync, Durability::Os] {
        let dir = tempfile::tempdir().unwrap();
        let house = {
            let _context = runtime.enter();
            House::open(dir.path(), durability)
        };
        let txn = Arc::new(AtomicU64::new(0));
        for (writers, room_count) in [(1_usize, 1_usize), (16, 1), (16, 16), (64, 1), (64, 64)] {
            let places: Vec<(String, String)> = runtime.block_on(async {
                let owner = house.register(&format!("owner{writers}of{room_count}")).await;
                let mut rooms = Vec::new();
                for number in 0..room_count {
                    rooms.push(house.make_room(&owner, &format!("room {number}")).await);
                }
                let mut places = Vec::new();
                for writer in 0..writers {
                    let token = house.register(&format!("writer{writer}of{writers}in{room_count}")).await;
                    let room = rooms[writer % room_count].clone();
                    house.join(&token, &room).await;
                    places.push((token, room));
                }
                places
            });
            let name = format!("{durability:?}, {writers} writers");
            group.bench_function(BenchmarkId::new(name, format!("{room_count} rooms")), |b| {
                b.iter_custom(|messages| {
                    let began = Instant::now();
                    runtime.block_on(async {
                        let mut tasks = JoinSet::new();
                        let left = Arc::new(AtomicU64::new(messages));
                        for (token, room) in &places {
                            let (house, token, room) = (house.clone(), token.clone(), room.clone());
                            let (left, txn) = (left.clone(), txn.clone());
                            tasks.spawn(async move {
                                while left
                                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
                                    .is_ok()
                                {
                                    house.send(&token, &room, txn.fetch_add(1, Ordering::SeqCst)).await;
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
        }
        runtime.block_on(house.close());
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
