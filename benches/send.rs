//! The send path in process: router, token, build, admit, commit with fsync, answer. `docs/performance.md` has the figures.

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
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use aqueduct::{
    ids::UserNum,
    push::rules,
    schema,
    schema::rooms::Membership,
    store::{Durability, Guard},
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ruma::push::{Action, NewPatternedPushRule, NewPushRule};
use support::Fixture;
use tokio::{runtime::Runtime, task::JoinSet};

/// Everybody sends to their room until so many messages are sent.
async fn send_all(fixture: &Fixture, places: &[(String, String)], messages: u64, txn: &Arc<AtomicU64>) {
    let mut tasks = JoinSet::new();
    let left = Arc::new(AtomicU64::new(messages));
    for (token, room) in places {
        let (fixture, token, room) = (fixture.clone(), token.clone(), room.clone());
        let (left, txn) = (left.clone(), txn.clone());
        tasks.spawn(async move {
            while left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok() {
                fixture.send(&token, &room, txn.fetch_add(1, Ordering::SeqCst)).await;
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
}

const MEMBERS: u64 = 10_000;
const WITH_RULES: u64 = 1_000;
/// Far above the numbers of accounts that the benchmark registers.
const FIRST_MEMBER: u64 = 1_000_000;

/// Fills a room with members of whom the room's tables and the accounts know, and gives some of them rules of their own, the
/// most hostile there are.
async fn fill(fixture: &Fixture, room: &str, with_rules: u64) {
    let store = &fixture.app().store;
    let room_id = ruma::RoomId::parse(room).unwrap();
    let num = aqueduct::rooms::find_room(&*store.snapshot(), &room_id).unwrap().unwrap();
    let users: Vec<UserNum> = (0..MEMBERS).map(|number| UserNum(FIRST_MEMBER + number)).collect();
    for users in users.chunks(1_000) {
        let mut batch = store.batch(&Guard::alone());
        for user in users {
            schema::ROOM_USER.put(&mut batch, (num, *user), &Membership::Join.into());
        }
        drop(store.enqueue(batch).unwrap());
        store.barrier().await;
    }
    for user in users.into_iter().take(usize::try_from(with_rules).unwrap()) {
        let mut batch = store.batch(&Guard::alone());
        let user_id = ruma::UserId::parse(format!("@member{}:bench.example", user.0)).unwrap();
        rules::change(&mut batch, user, &user_id, |rules| {
            for id in 0..15 {
                let pattern = format!("*{}{id}", "a".repeat(900));
                let rule = NewPatternedPushRule::new(format!("rule{id}"), pattern, vec![Action::Notify]);
                rules::insert(rules, NewPushRule::Content(rule), None, None)?;
            }
            Ok(())
        })
        .unwrap();
        drop(store.enqueue(batch).unwrap());
    }
    store.barrier().await;
}

/// A message costs the same whether or not members have push rules of their own.
fn bench_rules(c: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    let mut group = c.benchmark_group("send to 10,000 members");
    group.sample_size(10).measurement_time(Duration::from_secs(3)).throughput(Throughput::Elements(1));
    let dir = tempfile::tempdir().unwrap();
    let fixture = {
        let _context = runtime.enter();
        Fixture::open(dir.path(), Durability::Os)
    };
    let txn = Arc::new(AtomicU64::new(0));
    for with_rules in [0, WITH_RULES] {
        let places: Vec<(String, String)> = runtime.block_on(async {
            let owner = fixture.register(&format!("owner{with_rules}")).await;
            let room = fixture.make_room(&owner, "large").await;
            fill(&fixture, &room, with_rules).await;
            let mut places = Vec::new();
            for writer in 0..16 {
                let token = fixture.register(&format!("writer{writer}of{with_rules}")).await;
                fixture.join(&token, &room).await;
                places.push((token, room.clone()));
            }
            places
        });
        group.bench_function(BenchmarkId::new("members with rules of their own", with_rules), |b| {
            b.iter_custom(|messages| {
                let began = Instant::now();
                runtime.block_on(send_all(&fixture, &places, messages, &txn));
                began.elapsed()
            });
        });
    }
    runtime.block_on(fixture.close());
    group.finish();
}

fn bench(c: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    let mut group = c.benchmark_group("send");
    group.sample_size(10).measurement_time(Duration::from_secs(3)).throughput(Throughput::Elements(1));
    for durability in [Durability::Fsync, Durability::Os] {
        let dir = tempfile::tempdir().unwrap();
        let fixture = {
            let _context = runtime.enter();
            Fixture::open(dir.path(), durability)
        };
        let txn = Arc::new(AtomicU64::new(0));
        for (writers, room_count) in [(1_usize, 1_usize), (16, 1), (16, 16), (64, 1), (64, 64)] {
            let places: Vec<(String, String)> = runtime.block_on(async {
                let owner = fixture.register(&format!("owner{writers}of{room_count}")).await;
                let mut rooms = Vec::new();
                for number in 0..room_count {
                    rooms.push(fixture.make_room(&owner, &format!("room {number}")).await);
                }
                let mut places = Vec::new();
                for writer in 0..writers {
                    let token = fixture.register(&format!("writer{writer}of{writers}in{room_count}")).await;
                    let room = rooms[writer % room_count].clone();
                    fixture.join(&token, &room).await;
                    places.push((token, room));
                }
                places
            });
            let name = format!("{durability:?}, {writers} writers");
            group.bench_function(BenchmarkId::new(name, format!("{room_count} rooms")), |b| {
                b.iter_custom(|messages| {
                    let began = Instant::now();
                    runtime.block_on(send_all(&fixture, &places, messages, &txn));
                    began.elapsed()
                });
            });
        }
        runtime.block_on(fixture.close());
    }
    group.finish();
}

criterion_group!(benches, bench, bench_rules);
criterion_main!(benches);
