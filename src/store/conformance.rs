//! Every engine, and the store over it, must do this: each test runs on RocksDB and in memory.

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::atomic::{AtomicUsize, Ordering},
};

use proptest::prelude::*;

use super::*;
use crate::{
    ids::{Order, RoomNum, UserNum},
    store::engine::{Memory, Rocks},
};

static NAMES: Table<(u64, String), u64> = table(250, Family::Index, "NAMES");
/// These two tables are in the family with the filter of prefixes; keys are longer than the prefix here, and shorter below.
static STATES: Table<(u64, u32, Order), u64> = table(251, Family::State, "STATES");
static SHORT: Table<u64, Position> = table(252, Family::State, "SHORT");
static INBOX: Table<(u64, Position), u64> = table(253, Family::Queues, "INBOX");

const fn table<K, V>(id: u8, family: Family, name: &'static str) -> Table<K, V> {
    Table::new(id, family, name, Domain::Server, "tests")
}

/// A store that can be closed and opened again.
struct Kit {
    store: Store,
    dir: Option<tempfile::TempDir>,
    durability: Durability,
}

impl Kit {
    fn both(durability: Durability) -> [Self; 2] {
        let dir = tempfile::tempdir().unwrap();
        let rocks = Engine::Rocks(Rocks::open(dir.path(), 1 << 20).unwrap());
        let memory = Engine::Memory(Memory::default());
        [(rocks, Some(dir)), (memory, None)].map(|(engine, dir)| Self {
            store: Store::open(engine, durability).unwrap(),
            dir,
            durability,
        })
    }

    /// Ends the process and starts it again: writes that were flushed are there, and others are lost.
    fn restart(self) -> Self {
        let Self { store, dir, durability } = self;
        let engine = match (store.engine(), &dir) {
            (Engine::Memory(memory), _) => Engine::Memory(memory.after_crash(usize::MAX)),
            (_, Some(dir)) => {
                let path = dir.path().to_owned();
                drop(store);
                Engine::Rocks(Rocks::open(&path, 1 << 20).unwrap())
            }
            _ => unreachable!(),
        };
        Self { store: Store::open(engine, durability).unwrap(), dir, durability }
    }
}

fn on_both(test: impl Fn(Kit)) {
    Kit::both(Durability::Fsync).into_iter().for_each(test);
}

fn accepted_then_published(store: &Store, check: impl Fn(&dyn Read)) {
    check(&store.view());
    store.flush().unwrap();
    check(&*store.snapshot());
}

fn put(store: &Store, rows: &[(u64, &str, u64)]) -> Enqueued {
    let mut batch = store.batch(&Guard::alone());
    for (number, name, value) in rows {
        NAMES.put(&mut batch, (*number, name), value);
    }
    store.enqueue(batch).unwrap()
}

fn list(read: &dyn Read, direction: Direction) -> Vec<(u64, String, u64)> {
    let rows = NAMES.prefix::<()>(read, (), direction).unwrap();
    rows.map(|row| row.unwrap()).map(|((number, name), value)| (number, name, value)).collect()
}

fn names(read: &dyn Read) -> Vec<String> {
    list(read, Direction::Up).into_iter().map(|(_, name, _)| name).collect()
}

fn note(store: &Store, number: u64, name: &str) -> Published {
    let mut note = store.note(&Guard::alone());
    NAMES.put(&mut note, (number, name), &number);
    store.enqueue_note(note).unwrap()
}

#[test]
fn rows_are_read_back_by_key_and_in_both_directions() {
    on_both(|kit| {
        let store = &kit.store;
        drop(put(store, &[(1, "b", 12), (1, "a", 11), (2, "a", 21), (1, "a\0", 13)]));
        store.flush().unwrap();
        let read = &*store.snapshot();
        assert_eq!(NAMES.get(read, (1, "b")).unwrap(), Some(12));
        assert_eq!(NAMES.get(read, (1, "c")).unwrap(), None);
        assert_eq!(NAMES.get_many(read, [(2, "a"), (9, "x"), (1, "a")]).unwrap(), [Some(21), None, Some(11)]);
        let up = list(read, Direction::Up);
        let names: Vec<_> = up.iter().map(|(number, name, _)| (*number, name.as_str())).collect();
        assert_eq!(names, [(1, "a"), (1, "a\0"), (1, "b"), (2, "a")]);
        let mut down = list(read, Direction::Down);
        down.reverse();
        assert_eq!(up, down);
        let of_two: Vec<_> = NAMES.prefix::<(u64,)>(read, (2,), Direction::Up).unwrap().collect();
        assert_eq!(of_two.len(), 1);
    });
}

#[test]
fn a_snapshot_can_be_read_for_a_minute_after_a_newer_one() {
    on_both(|kit| {
        let store = &kit.store;
        store.tell_time(5_000);
        let old = store.snapshot();
        store.tell_time(3_600_000);
        drop(put(store, &[(1, "a", 1)]));
        // The snapshot is an hour old, but nothing newer was published, so it is still read.
        assert_eq!(NAMES.get(&*old, (1, "a")).unwrap(), None);
        store.flush().unwrap();
        let held_max_ms = u64::try_from(SNAPSHOT_HELD_MAX.as_millis()).unwrap();
        store.tell_time(3_600_000 + held_max_ms);
        assert_eq!(NAMES.get(&*old, (1, "a")).unwrap(), None);
        store.tell_time(3_600_001 + held_max_ms);
        assert_eq!(NAMES.get(&*old, (1, "a")), Err(Fault::Outdated));
        assert_eq!(NAMES.get_many(&*old, [(1, "a")]), Err(Fault::Outdated));
        assert!(NAMES.prefix::<()>(&*old, (), Direction::Up).is_err());
        assert_eq!(NAMES.get(&*store.snapshot(), (1, "a")).unwrap(), Some(1));
        assert_eq!(NAMES.get(&store.view(), (1, "a")).unwrap(), Some(1));
    });
}

#[test]
fn the_first_rows_of_many_ranges_are_those_of_each() {
    on_both(|kit| {
        let store = &kit.store;
        let order = |number: u64| Order::live(Position::new(number).unwrap());
        let write = |batch: &mut Batch, seed: u64| {
            for number in 0..40_u64 {
                let mixed = (number + seed).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
                STATES.put(batch, (mixed % 3, (mixed % 7) as u32, order(mixed % 50)), &number);
            }
        };
        let check = |read: &dyn Read| {
            let bounds = (0..150_u64).map(|at| {
                let (number, key) = (at % 3, (at % 8) as u32);
                let low = Bound::Excluded((number, key, order(at % 50)));
                // Most ranges lie inside one prefix; some reach over several.
                (low, Bound::Included((number + u64::from(at % 40 == 39), key, Order::MAX)))
            });
            for some in [bounds.clone().take(30).collect::<Vec<_>>(), bounds.collect()] {
                let each: Vec<_> = some
                    .iter()
                    .map(|(low, high)| {
                        let mut rows =
                            STATES.range::<(u64, u32, Order)>(read, *low, *high, Direction::Up).unwrap();
                        rows.next().transpose().unwrap()
                    })
                    .collect();
                assert!(each.iter().any(Option::is_some) && each.iter().any(Option::is_none));
                assert_eq!(STATES.first_of_many::<(u64, u32, Order)>(read, some).unwrap(), each);
            }
        };
        let mut batch = store.batch(&Guard::alone());
        write(&mut batch, 1);
        check(&batch);
        drop(store.enqueue(batch).unwrap());
        accepted_then_published(store, check);
        let mut batch = store.batch(&Guard::alone());
        STATES.delete_prefix::<(u64, u32)>(&mut batch, (1, 3));
        write(&mut batch, 100);
        check(&batch);
        drop(store.enqueue(batch).unwrap());
        accepted_then_published(store, check);
    });
}

#[test]
fn bounds_of_ranges_are_exact() {
    on_both(|kit| {
        let store = &kit.store;
        let order = |anchor: u64, minor| Order { anchor: Position::new(anchor).unwrap(), minor };
        let mut batch = store.batch(&Guard::alone());
        for key in [7, 8] {
            for anchor in [10, 20, 30] {
                for minor in [-1, 0] {
                    STATES.put(&mut batch, (1, key, order(anchor, minor)), &anchor);
                }
            }
        }
        SHORT.put(&mut batch, 3, &Position::ZERO);
        drop(store.enqueue(batch).unwrap());
        accepted_then_published(store, |read| {
            let range = |low, high, direction| -> Vec<_> {
                let rows = STATES.range::<(u64, u32, Order)>(read, low, high, direction).unwrap();
                rows.map(|row| row.unwrap().0)
                    .map(|(_, key, order)| (key, order.anchor.number(), order.minor))
                    .collect()
            };
            use Bound::{Excluded, Included, Unbounded};
            let (low, high) = ((1, 7, order(10, 0)), (1, 7, order(30, -1)));
            assert_eq!(
                range(Included(low), Included(high), Direction::Up),
                [(7, 10, 0), (7, 20, -1), (7, 20, 0), (7, 30, -1)]
            );
            assert_eq!(range(Excluded(low), Excluded(high), Direction::Up), [(7, 20, -1), (7, 20, 0)]);
            assert_eq!(range(Excluded(low), Excluded(high), Direction::Down), [(7, 20, 0), (7, 20, -1)]);
            assert_eq!(range(Included(high), Included(low), Direction::Up), []);
            // These ranges reach over the border of two prefixes, and to the ends of the table.
            let over = range(Excluded((1, 7, order(30, -1))), Excluded((1, 8, order(10, 0))), Direction::Up);
            assert_eq!(over, [(7, 30, 0), (8, 10, -1)]);
            assert_eq!(range(Unbounded, Unbounded, Direction::Up).len(), 12);
            assert_eq!(range(Unbounded, Excluded(low), Direction::Down), [(7, 10, -1)]);
            assert_eq!(range(Included((1, 9, order(0, 0))), Unbounded, Direction::Up), []);
            let by_prefix: Vec<_> = STATES
                .range::<(u64, u32)>(read, Excluded((1, 7)), Included((1, 8)), Direction::Up)
                .unwrap()
                .collect();
            assert_eq!(by_prefix.len(), 6);
            // A lookup of a state at a version seeks the first change above an order like this.
            let above = range(Excluded((1, 7, order(20, 0))), Included((1, 7, Order::MAX)), Direction::Up);
            assert_eq!(above.first(), Some(&(7, 30, -1)));
            assert_eq!(SHORT.get(read, 3).unwrap(), Some(Position::ZERO));
        });
    });
}

#[test]
fn a_batch_reads_its_own_rows_over_accepted_ones_over_published_ones() {
    on_both(|kit| {
        let store = &kit.store;
        drop(put(store, &[(1, "published", 1), (1, "replaced", 1), (1, "gone", 1), (1, "gone later", 1)]));
        store.flush().unwrap();
        let mut batch = store.batch(&Guard::alone());
        NAMES.put(&mut batch, (1, "accepted"), &2);
        NAMES.put(&mut batch, (1, "replaced"), &2);
        NAMES.delete(&mut batch, (1, "gone"));
        drop(store.enqueue(batch).unwrap());
        let mut batch = store.batch(&Guard::alone());
        NAMES.put(&mut batch, (1, "own"), &3);
        NAMES.put(&mut batch, (1, "replaced"), &3);
        NAMES.delete(&mut batch, (1, "gone later"));
        let expected = [("accepted", 2), ("own", 3), ("published", 1), ("replaced", 3)];
        let found = list(&batch, Direction::Up);
        assert!(found.iter().map(|(_, name, value)| (name.as_str(), *value)).eq(expected));
        let mut down = list(&batch, Direction::Down);
        down.reverse();
        assert_eq!(found, down);
        assert_eq!(NAMES.get(&batch, (1, "gone")).unwrap(), None);
        assert_eq!(
            NAMES
                .get_many(&batch, [(1, "replaced"), (1, "gone"), (1, "accepted"), (1, "published")])
                .unwrap(),
            [Some(3), None, Some(2), Some(1)]
        );
        // Others see none of what is not enqueued, and snapshots none of what is not published.
        assert_eq!(names(&store.view()), ["accepted", "gone later", "published", "replaced"]);
        assert_eq!(names(&*store.snapshot()), ["gone", "gone later", "published", "replaced"]);
    });
}

#[test]
fn positions_that_are_still_pending_sort_last_and_settle_in_keys_and_values() {
    on_both(|kit| {
        let store = &kit.store;
        let mut batch = store.batch(&Guard::alone());
        let first = batch.position(&LogEntry::Server);
        INBOX.put(&mut batch, (5, first), &1);
        let base = store.enqueue(batch).unwrap().base;
        let mut batch = store.batch(&Guard::alone());
        let (second, third) = (batch.position(&LogEntry::Server), batch.position(&LogEntry::Server));
        INBOX.put(&mut batch, (5, third), &3);
        INBOX.put(&mut batch, (5, second), &2);
        SHORT.put(&mut batch, 9, &third);
        let values = |read: &dyn Read| -> Vec<u64> {
            INBOX.prefix::<(u64,)>(read, (5,), Direction::Up).unwrap().map(|row| row.unwrap().1).collect()
        };
        assert_eq!(values(&batch), [1, 2, 3]);
        assert_eq!(SHORT.get(&batch, 9).unwrap(), Some(third));
        let last = INBOX.range::<(u64, Position)>(
            &batch,
            Bound::Excluded((5, second)),
            Bound::Unbounded,
            Direction::Up,
        );
        assert_eq!(last.unwrap().count(), 1);
        let enqueued = store.enqueue(batch).unwrap();
        assert_eq!(enqueued.base, base.plus(1));
        let settled = third.settle(enqueued.base);
        accepted_then_published(store, |read| {
            assert_eq!(values(read), [1, 2, 3]);
            assert_eq!(SHORT.get(read, 9).unwrap(), Some(settled));
            assert_eq!(INBOX.get(read, (5, settled)).unwrap(), Some(3));
            assert_eq!(tables::LOG.prefix::<()>(read, (), Direction::Up).unwrap().count(), 3);
        });
    });
}

#[test]
fn a_failed_precondition_leaves_nothing_and_names_the_row_in_the_way() {
    on_both(|kit| {
        let store = &kit.store;
        drop(put(store, &[(1, "published", 1)]));
        store.flush().unwrap();
        drop(put(store, &[(1, "accepted", 2)]));
        for (name, found) in [("published", 1), ("accepted", 2)] {
            let mut batch = store.batch(&Guard::alone());
            batch.position(&LogEntry::Server);
            NAMES.expect_absent(&mut batch, (1, name));
            NAMES.put(&mut batch, (1, "half"), &9);
            let Err(NotAccepted::Conflict(conflict)) = store.enqueue(batch) else { panic!("accepted") };
            assert_eq!(NAMES.conflicting(&conflict), Some(found));
            assert_eq!(SHORT.conflicting(&conflict), None);
            let mut batch = store.batch(&Guard::alone());
            NAMES.expect_value(&mut batch, (1, name), &7);
            assert!(matches!(store.enqueue(batch), Err(NotAccepted::Conflict(_))));
            let mut batch = store.batch(&Guard::alone());
            NAMES.expect_value(&mut batch, (1, name), &found);
            drop(store.enqueue(batch).unwrap());
        }
        assert_eq!(NAMES.get(&store.view(), (1, "half")).unwrap(), None);
        // The refused commits took no position.
        let mut batch = store.batch(&Guard::alone());
        batch.position(&LogEntry::Server);
        assert_eq!(store.enqueue(batch).unwrap().base.number(), 1);
        // A deleted row is absent, whether its deletion is published or still waits.
        let mut batch = store.batch(&Guard::alone());
        NAMES.delete(&mut batch, (1, "published"));
        drop(store.enqueue(batch).unwrap());
        let mut batch = store.batch(&Guard::alone());
        NAMES.expect_absent(&mut batch, (1, "published"));
        drop(store.enqueue(batch).unwrap());
    });
}

#[test]
fn a_batch_above_its_bounds_is_refused_whole() {
    on_both(|kit| {
        let store = &kit.store;
        let mut batch = store.batch(&Guard::alone());
        for number in 0..=BATCH_ROWS_MAX as u64 {
            NAMES.put(&mut batch, (number, ""), &0);
        }
        assert!(matches!(store.enqueue(batch), Err(NotAccepted::TooLarge)));
        let mut batch = store.batch(&Guard::alone());
        let long = "x".repeat(BATCH_BYTES_MAX);
        NAMES.put(&mut batch, (1, &long), &0);
        assert!(matches!(store.enqueue(batch), Err(NotAccepted::TooLarge)));
        assert_eq!(names(&store.view()), Vec::<String>::new());
        // A row that is written again counts once.
        let mut batch = store.batch(&Guard::alone());
        for round in 0..3 {
            NAMES.put(&mut batch, (1, &long[..BATCH_BYTES_MAX / 2]), &round);
        }
        assert_eq!(batch.row_count(), 1);
        drop(store.enqueue(batch).unwrap());
    });
}

#[test]
fn positions_are_consecutive_and_readers_never_stand_inside_a_batch() {
    on_both(|kit| {
        let store = &kit.store;
        let mut upto = 0;
        for size in [1_u64, 3, 2] {
            let mut batch = store.batch(&Guard::alone());
            for _ in 0..size {
                batch.position(&LogEntry::Account { user: UserNum(size) });
            }
            let enqueued = store.enqueue(batch).unwrap();
            assert_eq!(enqueued.base.number(), upto + 1);
            assert_eq!(store.snapshot().upto().number(), upto);
            store.flush().unwrap();
            upto += size;
            assert_eq!(store.snapshot().upto().number(), upto);
            let log = tables::LOG.prefix::<()>(&*store.snapshot(), (), Direction::Up).unwrap().count();
            assert_eq!(log as u64, upto);
        }
        // The first batch was written when the store was opened.
        assert_eq!(store.snapshot().batch_number(), 4);
    });
}

#[test]
fn every_write_has_the_next_batch_number() {
    on_both(|kit| {
        let store = &kit.store;
        let number = || store.snapshot().batch_number();
        // Opening a new store wrote its first rows.
        assert_eq!(number(), 1);
        drop(note(store, 1, "note"));
        store.flush().unwrap();
        assert_eq!(number(), 2);
        let ended = store.snapshot().upto();
        assert_eq!(store.begin_incarnation(0, ended).unwrap(), 1);
        assert_eq!((number(), store.incarnation()), (3, 1));
        let first = Position::first_of_incarnation(1);
        assert_eq!(store.snapshot().upto(), first);
        let mut batch = store.batch(&Guard::alone());
        batch.position(&LogEntry::Server);
        assert_eq!(store.enqueue(batch).unwrap().base, first.plus(1));
        store.flush().unwrap();
        assert_eq!(number(), 4);
        assert_eq!(store.clamp(Position::new(5).unwrap()), ended, "what was seen of the old life is cut off");
    });
}

#[test]
fn notes_take_no_position_and_wait_for_no_sync() {
    on_both(|kit| {
        let store = &kit.store;
        let noted = note(store, 1, "note");
        assert!(!noted.is_known());
        let flushed = store.flush().unwrap();
        assert!(noted.is_known() && !flushed.synced);
        assert_eq!(names(&*store.snapshot()), ["note"]);
        assert_eq!(store.snapshot().upto(), Position::ZERO);
        let mut batch = store.batch(&Guard::alone());
        batch.position(&LogEntry::Server);
        drop(store.enqueue(batch).unwrap());
        assert!(store.flush().unwrap().synced);
        assert_eq!(store.snapshot().upto().number(), 1);
        // A commit is synced, also where it has nothing for the log.
        drop(put(store, &[(1, "commit", 1)]));
        assert!(store.flush().unwrap().synced);
    });
}

#[test]
fn acknowledging_and_waking_come_after_publishing() {
    on_both(|kit| {
        let store = &kit.store;
        let mut batch = store.batch(&Guard::alone());
        batch.position(&LogEntry::Server);
        batch.position(&LogEntry::Server);
        let wakes = [
            Wake::users(vec![UserNum(2), UserNum(1), UserNum(2)]),
            Wake::Left { room: RoomNum(1), user_id: "@a:x".to_owned() },
        ];
        wakes.iter().for_each(|wake| batch.wake(wake.clone()));
        let enqueued = store.enqueue(batch).unwrap();
        assert!(!enqueued.flushed.is_known());
        let mut woken = Vec::new();
        let mut wake = |wake| {
            assert_eq!(store.snapshot().upto().number(), 2, "it is published");
            assert!(!enqueued.flushed.is_known(), "whoever is answered finds others woken");
            woken.push(wake);
        };
        store.flush_and_wake(&mut wake).unwrap();
        assert_eq!(woken, wakes);
        assert_eq!(woken[0], Wake::Users([UserNum(1), UserNum(2)].into()));
        assert!(enqueued.flushed.is_known());
    });
}

#[tokio::test]
async fn a_barrier_resolves_when_all_before_it_is_published() {
    for kit in Kit::both(Durability::Fsync) {
        let store = &kit.store;
        store.barrier().await;
        drop(put(store, &[(1, "a", 1)]));
        let barrier = store.barrier();
        tokio::pin!(barrier);
        assert!(futures_util::poll!(&mut barrier).is_pending());
        store.flush().unwrap();
        assert!(futures_util::poll!(&mut barrier).is_ready());
        store.barrier().await;
    }
}

#[test]
fn a_range_deleted_is_gone_for_the_batch_for_the_next_ones_and_on_disk() {
    for is_large in [false, true] {
        on_both(|kit| delete_a_range(kit, is_large));
    }
}

fn delete_a_range(kit: Kit, is_large: bool) {
    let store = &kit.store;
    drop(put(store, &[(1, "published", 1), (2, "kept", 1)]));
    store.flush().unwrap();
    drop(put(store, &[(1, "accepted", 1), (0, "kept", 1)]));
    let mut batch = store.batch(&Guard::alone());
    NAMES.put(&mut batch, (1, "own, before"), &1);
    if is_large {
        let low = NAMES.key_bytes::<(u64,)>((1,)).bytes;
        let high = NAMES.key_bytes::<(u64,)>((2,)).bytes;
        batch.writes.delete_range_raw(NAMES.family, low, high);
    } else {
        NAMES.delete_prefix::<(u64,)>(&mut batch, (1,));
    }
    NAMES.put(&mut batch, (1, "own, after"), &1);
    let after = ["kept", "own, after", "kept"];
    assert_eq!(names(&batch), after);
    assert_eq!(NAMES.get(&batch, (1, "published")).unwrap(), None);
    assert_eq!(NAMES.get(&batch, (1, "own, before")).unwrap(), None);
    drop(store.enqueue(batch).unwrap());
    assert_eq!(names(&store.view()), after);
    assert_eq!(NAMES.get(&store.view(), (1, "accepted")).unwrap(), None);
    assert_eq!(NAMES.get_many(&store.view(), [(1, "published"), (2, "kept")]).unwrap(), [None, Some(1)]);
    let mut batch = store.batch(&Guard::alone());
    NAMES.expect_absent(&mut batch, (1, "published"));
    NAMES.put(&mut batch, (1, "published"), &2);
    drop(store.enqueue(batch).unwrap());
    let after = ["kept", "own, after", "published", "kept"];
    assert_eq!(names(&store.view()), after);
    store.flush().unwrap();
    assert_eq!(names(&store.view()), after);
    assert_eq!(names(&*store.snapshot()), after);
    let kit = kit.restart();
    assert_eq!(names(&*kit.store.snapshot()), after);
    let mut batch = kit.store.batch(&Guard::alone());
    NAMES.delete_below::<(), (u64,)>(&mut batch, (), (2,));
    drop(kit.store.enqueue(batch).unwrap());
    kit.store.flush().unwrap();
    assert_eq!(names(&*kit.store.snapshot()), ["kept"]);
}

#[test]
fn a_snapshot_never_changes() {
    on_both(|kit| {
        let store = &kit.store;
        drop(put(store, &[(1, "a", 1)]));
        store.flush().unwrap();
        let (old, rows) = (store.snapshot(), list(&*store.snapshot(), Direction::Up));
        let mut batch = store.batch(&Guard::alone());
        NAMES.delete_prefix::<()>(&mut batch, ());
        NAMES.put(&mut batch, (1, "b"), &1);
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
        assert_eq!(list(&*old, Direction::Up), rows);
    });
}

#[test]
fn what_was_flushed_is_there_after_a_restart_and_numbers_go_on() {
    on_both(|kit| {
        let store = &kit.store;
        let mut batch = store.batch(&Guard::alone());
        batch.position(&LogEntry::Server);
        NAMES.put(&mut batch, (1, "flushed"), &1);
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
        drop(put(store, &[(1, "not flushed", 1)]));
        let kit = kit.restart();
        assert_eq!(names(&kit.store.view()), ["flushed"]);
        assert_eq!(kit.store.snapshot().upto().number(), 1);
        // The batch numbers that were reserved are skipped.
        assert!(kit.store.snapshot().batch_number() > 1 << 20);
        let mut batch = kit.store.batch(&Guard::alone());
        batch.position(&LogEntry::Server);
        assert_eq!(kit.store.enqueue(batch).unwrap().base.number(), 2);
    });
}

#[test]
fn a_crash_in_memory_loses_any_suffix_of_what_was_not_synced() {
    let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
    let mut batch = store.batch(&Guard::alone());
    batch.position(&LogEntry::Server);
    NAMES.put(&mut batch, (0, "commit"), &0);
    drop(store.enqueue(batch).unwrap());
    store.flush().unwrap();
    for number in 1..=3 {
        drop(note(&store, number, "note"));
        store.flush().unwrap();
    }
    let Engine::Memory(memory) = store.engine() else { unreachable!() };
    assert_eq!((memory.unsynced_writes(), memory.syncs()), (3, 2));
    for kept in 0..=3 {
        let crashed = Store::open(Engine::Memory(memory.after_crash(kept)), Durability::Fsync).unwrap();
        assert_eq!(names(&crashed.view()).len(), 1 + kept);
        // Another node may have seen the notes that are lost: no later batch has a number of theirs.
        assert!(crashed.snapshot().batch_number() > store.snapshot().batch_number());
    }
}

#[tokio::test]
async fn after_a_failed_write_nothing_more_is_accepted_or_acknowledged() {
    for leaves_rows in [false, true] {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let Engine::Memory(memory) = store.engine() else { unreachable!() };
        memory.fail_after(0, leaves_rows);
        let mut batch = store.batch(&Guard::alone());
        batch.position(&LogEntry::Server);
        NAMES.put(&mut batch, (1, "a"), &1);
        let enqueued = store.enqueue(batch).unwrap();
        let barrier = store.barrier();
        assert!(store.flush().is_err());
        assert!(store.flush().is_err());
        assert!(enqueued.flushed.await.is_err());
        tokio::pin!(barrier);
        assert!(futures_util::poll!(&mut barrier).is_pending());
        assert!(matches!(store.enqueue(store.batch(&Guard::alone())), Err(NotAccepted::Fault(_))));
        assert_eq!(names(&*store.snapshot()), Vec::<String>::new());
        let after = Store::open(Engine::Memory(memory.after_crash(0)), Durability::Fsync).unwrap();
        assert_eq!(names(&after.view()).len(), usize::from(leaves_rows));
    }
}

#[test]
fn without_syncs_a_position_that_a_power_cut_took_is_never_given_out_again() {
    let store = Store::open(Engine::Memory(Memory::default()), Durability::Os).unwrap();
    for number in 1..=3 {
        let mut batch = store.batch(&Guard::alone());
        batch.position(&LogEntry::Server);
        assert_eq!(store.enqueue(batch).unwrap().base.number(), number);
        // No flush has to be synced, because opening the store has reserved more positions than these.
        assert!(!store.flush().unwrap().synced);
    }
    let Engine::Memory(memory) = store.engine() else { unreachable!() };
    let after = Store::open(Engine::Memory(memory.after_crash(0)), Durability::Os).unwrap();
    assert_eq!(tables::LOG.prefix::<()>(&*after.snapshot(), (), Direction::Up).unwrap().count(), 0);
    let mut batch = after.batch(&Guard::alone());
    batch.position(&LogEntry::Server);
    assert!(after.enqueue(batch).unwrap().base.number() > 3);
}

#[test]
fn of_a_thousand_equal_claims_one_wins_and_every_loser_sees_it() {
    on_both(|kit| {
        let store = &kit.store;
        let (winners, flushes) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let running = AtomicUsize::new(8);
        std::thread::scope(|threads| {
            for writer in 0..8_u64 {
                let (winners, running) = (&winners, &running);
                threads.spawn(move || {
                    for claim in 0..125_u64 {
                        let mut batch = store.batch(&Guard::alone());
                        batch.position(&LogEntry::Server);
                        NAMES.expect_absent(&mut batch, (1, "txn"));
                        NAMES.put(&mut batch, (1, "txn"), &(writer * 1000 + claim));
                        match store.enqueue(batch) {
                            Ok(_) => drop(winners.fetch_add(1, Ordering::SeqCst)),
                            Err(NotAccepted::Conflict(conflict)) => {
                                let won = NAMES.conflicting(&conflict).unwrap();
                                assert_eq!(NAMES.get(&store.view(), (1, "txn")).unwrap(), Some(won));
                            }
                            Err(other) => panic!("{other:?}"),
                        }
                    }
                    running.fetch_sub(1, Ordering::SeqCst);
                });
            }
            while running.load(Ordering::SeqCst) > 0 {
                store.flush().unwrap();
                flushes.fetch_add(1, Ordering::SeqCst);
            }
        });
        store.flush().unwrap();
        assert_eq!(winners.load(Ordering::SeqCst), 1);
        assert_eq!(store.snapshot().upto().number(), 1);
    });
}

#[test]
fn a_lock_holder_reads_all_of_its_domain_while_flushes_run_beside_it() {
    on_both(|kit| {
        let store = &kit.store;
        let running = AtomicUsize::new(4);
        std::thread::scope(|threads| {
            for domain in 0..4_u64 {
                let running = &running;
                threads.spawn(move || {
                    // A queue of at most ten rows: each batch adds one, drops the oldest, and checks all of them.
                    for round in 0..300_u64 {
                        let mut batch = store.batch(&Guard::alone());
                        let rows = INBOX.prefix::<(u64,)>(&batch, (domain,), Direction::Up).unwrap();
                        let rows: Vec<_> = rows.map(|row| row.unwrap()).collect();
                        let expected: Vec<u64> = (round.saturating_sub(10)..round).collect();
                        assert_eq!(rows.iter().map(|(_, value)| *value).collect::<Vec<_>>(), expected);
                        if let Some(((_, oldest), value)) = rows.first().filter(|_| rows.len() == 10) {
                            INBOX.delete(&mut batch, (domain, *oldest));
                            assert_eq!(*value, round - 10);
                        }
                        let position = batch.position(&LogEntry::Server);
                        INBOX.put(&mut batch, (domain, position), &round);
                        drop(store.enqueue(batch).unwrap());
                    }
                    running.fetch_sub(1, Ordering::SeqCst);
                });
            }
            while running.load(Ordering::SeqCst) > 0 {
                store.flush().unwrap();
            }
        });
        store.flush().unwrap();
        assert_eq!(store.snapshot().upto().number(), 1200);
        assert_eq!(INBOX.prefix::<()>(&*store.snapshot(), (), Direction::Up).unwrap().count(), 40);
    });
}

#[derive(Debug, Clone)]
enum Step {
    Put(u8, u8),
    Delete(u8),
    DeleteRange(u8, u8),
    /// Enqueues the batch with enough more rows, below all others, to make it a large one.
    EnqueueLarge,
    Enqueue,
    Flush,
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..12_u8, any::<u8>()).prop_map(|(key, value)| Step::Put(key, value)),
        2 => (0..12_u8).prop_map(Step::Delete),
        1 => (0..12_u8, 0..12_u8).prop_map(|(low, high)| Step::DeleteRange(low, high)),
        3 => Just(Step::Enqueue),
        2 => Just(Step::EnqueueLarge),
        2 => Just(Step::Flush),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 0..40)
}

type Model = BTreeMap<u64, u64>;

fn assert_is(read: &dyn Read, model: &Model) {
    for direction in [Direction::Up, Direction::Down] {
        let rows = STATES.prefix::<()>(read, (), direction).unwrap();
        let mut rows: Vec<_> =
            rows.map(|row| row.unwrap()).map(|((room, ..), value)| (room, value)).collect();
        if direction == Direction::Down {
            rows.reverse();
        }
        assert!(rows.into_iter().eq(model.iter().map(|(key, value)| (*key, *value))));
    }
    for key in 0..12 {
        assert_eq!(STATES.get(read, (key, 0, Order::MIN)).unwrap(), model.get(&key).copied());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Compares the store with three maps: of what is published, of what is accepted, and of what the batch has.
    #[test]
    fn the_store_is_three_maps_laid_over_each_other(steps in steps()) {
        on_both(|kit| {
            let mut kit = kit;
            let mut batch = kit.store.batch(&Guard::alone());
            let (mut published, mut accepted, mut own) = (Model::new(), Model::new(), Model::new());
            for step in &steps {
                match *step {
                    Step::Put(key, value) => {
                        STATES.put(&mut batch, (key.into(), 0, Order::MIN), &value.into());
                        own.insert(key.into(), value.into());
                    }
                    Step::Delete(key) => {
                        STATES.delete(&mut batch, (key.into(), 0, Order::MIN));
                        own.remove(&key.into());
                    }
                    Step::DeleteRange(low, high) => {
                        let (low, high) = (u64::from(low), u64::from(high));
                        let low_key = STATES.key_bytes::<(u64,)>((low,)).bytes;
                        let high_key = STATES.key_bytes::<(u64,)>((high,)).bytes;
                        batch.writes.delete_range_raw(STATES.family, low_key, high_key);
                        own.retain(|key, _| !(low..high.max(low)).contains(key));
                    }
                    Step::Enqueue | Step::EnqueueLarge => {
                        if matches!(step, Step::EnqueueLarge) {
                            for number in 0..300 {
                                NAMES.put(&mut batch, (number, "filler"), &number);
                            }
                        }
                        drop(kit.store.enqueue(batch).unwrap());
                        batch = kit.store.batch(&Guard::alone());
                        accepted = own.clone();
                    }
                    Step::Flush => {
                        kit.store.flush().unwrap();
                        published = accepted.clone();
                    }
                    Step::Restart => {
                        drop(batch);
                        kit = kit.restart();
                        batch = kit.store.batch(&Guard::alone());
                        (accepted, own) = (published.clone(), published.clone());
                    }
                }
                assert_is(&batch, &own);
                assert_is(&kit.store.view(), &accepted);
                assert_is(&*kit.store.snapshot(), &published);
            }
        });
    }
}
