//! Drives the store's flush: waits until something is accepted, lets what is about to come join it, writes, and begins
//! again.

use std::time::Duration;

use crate::{
    env::Env,
    error::Result,
    store::{Fault, Flushed, Store, Wake},
};

/// The flusher waits at most this long for more batches to share an fsync, because every writer waits with it.
const GATHER_MAX: Duration = Duration::from_millis(2);
/// Waiting for less than this costs more than sharing an fsync saves.
const GATHER_MIN: Duration = Duration::from_micros(20);

/// Starts the flusher on a thread of its own (a task, in a simulation). `wake` does what published batches ask for;
/// `report` learns of each flush and how long it took. Both must be short, because every writer waits for them. Fails
/// if no thread can be started.
pub fn start(
    store: &Store,
    env: &Env,
    wake: impl FnMut(Wake) + Send + 'static,
    report: impl FnMut(&Flushed, Duration) + Send + 'static,
) -> Result<()> {
    env.spawn_thread("flusher", run(store.clone(), env.clone(), wake, report))
}

/// Flushes until the process ends. A failed write ends the process, because later batches may rest on what is now lost.
///
/// Writers that were acknowledged together mostly come back together. So after a slow flush the next one waits a moment
/// (an eighth of the time that the last one took) until as many batches have gathered as the last one carried. A single
/// writer never waits.
pub(crate) async fn run(
    store: Store,
    env: Env,
    mut wake: impl FnMut(Wake) + Send,
    mut report: impl FnMut(&Flushed, Duration) + Send,
) {
    let mut took = Duration::ZERO;
    let mut carried = 0;
    let started = env.instant();
    loop {
        store.wanted().await;
        let patience = (took / 8).min(GATHER_MAX);
        if carried > 1 && patience >= GATHER_MIN && !env.is_simulated() {
            store.wait_for(carried, patience);
        }
        env.disk().await;
        let began = env.instant();
        let running_ms = began.saturating_duration_since(started).as_millis();
        store.tell_time(u64::try_from(running_ms).unwrap_or(u64::MAX));
        // A panic in here, in code that wakes or answers somebody, would leave every writer waiting for ever.
        let flush = std::panic::AssertUnwindSafe(|| store.flush_and_wake(&mut wake));
        let flushed = std::panic::catch_unwind(flush)
            .unwrap_or_else(|_| Err(Fault::Io("the flusher panicked".to_owned())));
        match flushed {
            Ok(flushed) => {
                took = env.instant().saturating_duration_since(began);
                carried = flushed.batches;
                report(&flushed, took);
            }
            Err(fault) => {
                tracing::error!(%fault, "a write to the store failed; the server stops, because later changes may rest on what is lost");
                if env.is_simulated() {
                    env.kill();
                    return;
                }
                // The process aborts, because `exit` would run the engine's destructors beside its threads.
                std::process::abort();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use parking_lot::Mutex;
    use tokio::task::JoinSet;

    use super::*;
    use crate::store::{
        BATCH_ROWS_MAX, Domain, Durability, Engine, Family, Guard, LogEntry, Table,
        engine::{Memory, Rocks},
    };

    static ROWS: Table<(u64, u64), String> = Table::new(254, Family::State, "ROWS", Domain::Room, "tests");

    fn begin(engine: Engine, report: impl FnMut(&Flushed, Duration) + Send + 'static) -> (Store, Env) {
        let store = Store::open(engine, Durability::Fsync).unwrap();
        let env = Env::real().unwrap();
        start(&store, &env, |_| (), report).unwrap();
        (store, env)
    }

    /// Closes the engine before the process ends, because a thread that still closes it would crash the process.
    async fn end(store: Store, env: &Env) {
        drop(store);
        env.kill();
        env.ended().await;
    }

    /// Commits one entry under a lock and waits until it is durable.
    async fn commit(store: &Store, room: &Mutex<u64>, rows: u64) {
        let enqueued = {
            let mut next = room.lock();
            let mut batch = store.batch(&Guard::alone());
            batch.position(&LogEntry::Server);
            for _ in 0..rows {
                *next += 1;
                ROWS.put(&mut batch, (0, *next), &"small".to_owned());
            }
            store.enqueue(batch).unwrap()
        };
        enqueued.flushed.await.unwrap();
    }

    /// Measures how many batches of writers in one room share a flush, on average, when an fsync takes 10 ms.
    async fn batches_a_flush(writers: usize) -> usize {
        let flushes = Arc::new(AtomicUsize::new(0));
        let counted = flushes.clone();
        let memory = Memory::with_sync_delay(Duration::from_millis(10));
        let (store, env) = begin(Engine::Memory(memory), move |flushed, _| {
            counted.fetch_add(usize::from(flushed.batches > 0), Ordering::SeqCst);
        });
        let room = Arc::new(Mutex::new(0));
        let mut tasks = JoinSet::new();
        for _ in 0..writers {
            let (store, room) = (store.clone(), room.clone());
            tasks.spawn(async move {
                for _ in 0..20 {
                    commit(&store, &room, 3).await;
                }
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
        end(store, &env).await;
        writers * 20 / flushes.load(Ordering::SeqCst)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn writers_in_one_room_share_an_fsync() {
        let few = batches_a_flush(16).await;
        assert!(few >= 8, "{few} a flush");
        let many = batches_a_flush(64).await;
        assert!(many >= 30, "{many} a flush");
    }

    /// Writes 100,000 rows in parts, each awaited before the next, as a join of a large room does.
    async fn stage(store: &Store) {
        for part in 0..20 {
            let mut note = store.note(&Guard::alone());
            for row in 0..BATCH_ROWS_MAX as u64 {
                let member = format!(
                    "@somebody{row}:a.server.somewhere.example.org joined, says a row of some length"
                );
                ROWS.put(&mut note, (1, part * BATCH_ROWS_MAX as u64 + row), &member);
            }
            store.enqueue_note(note).unwrap().await.unwrap();
        }
    }

    /// The worst that commits met beside a staged write.
    #[derive(Default)]
    struct Beside {
        /// The most rows in one flush.
        rows: usize,
        /// The most flushes that one commit waited for, and the most among them that carried a part of the staged
        /// write.
        flushes: usize,
        parts: usize,
        /// The time that the store needs for a part: the shortest of all, when nothing else keeps the machine busy.
        part_takes: Duration,
    }

    async fn commit_beside_a_staged_write() -> Beside {
        let dir = tempfile::tempdir().unwrap();
        let rocks = Rocks::open(dir.path(), 8 << 20).unwrap();
        // The number of flushes so far, and of those that carried a part.
        let done = Arc::new(Mutex::new((0, 0)));
        let beside = Arc::new(Mutex::new(Beside { part_takes: Duration::MAX, ..Beside::default() }));
        let (counted, met) = (done.clone(), beside.clone());
        let (store, env) = begin(Engine::Rocks(rocks), move |flushed, took| {
            let is_part = flushed.rows >= BATCH_ROWS_MAX;
            let mut done = counted.lock();
            *done = (done.0 + 1, done.1 + usize::from(is_part));
            let mut met = met.lock();
            met.rows = met.rows.max(flushed.rows);
            if is_part {
                met.part_takes = met.part_takes.min(took);
            }
        });
        let staging = store.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { stage(&staging).await });
        let mut next = 0;
        while tasks.try_join_next().map(Result::unwrap).is_none() {
            let before = *done.lock();
            let mut batch = store.batch(&Guard::alone());
            batch.position(&LogEntry::Server);
            for _ in 0..8 {
                next += 1;
                ROWS.put(&mut batch, (0, next), &"small".to_owned());
            }
            let (beside, done) = (beside.clone(), done.clone());
            let (published, waits) = tokio::sync::oneshot::channel();
            // This is called in the flush that carries the batch, which is not counted yet.
            store.enqueue(batch).unwrap().flushed.then(move |_| {
                let (now, mut beside) = (*done.lock(), beside.lock());
                beside.flushes = beside.flushes.max(now.0 - before.0 + 1);
                beside.parts = beside.parts.max(now.1 - before.1);
                let _ = published.send(());
            });
            waits.await.unwrap();
        }
        end(store, &env).await;
        std::mem::take(&mut *beside.lock())
    }

    /// A commit waits for the flush under way and for its own, and one of these may carry a part. The test counts
    /// flushes, because a clock would also measure what else the machine does; the time of a part is the shortest of
    /// twenty.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn nobody_waits_long_beside_a_staged_write_of_a_hundred_thousand_rows() {
        let mut part_takes = Duration::MAX;
        for _ in 0..5 {
            let beside = commit_beside_a_staged_write().await;
            assert!(beside.rows <= BATCH_ROWS_MAX + 50, "{} rows in one flush", beside.rows);
            assert!(beside.flushes <= 3, "waited for {} flushes", beside.flushes);
            assert!(beside.parts <= 2, "waited for {} parts", beside.parts);
            part_takes = part_takes.min(beside.part_takes);
            // The commit's own flush, with its fsync, takes at most about as long as a part.
            if part_takes * 2 <= Duration::from_millis(50) {
                return;
            }
        }
        panic!(
            "a part takes {part_takes:?}: who waits for one and for the own flush waits longer than 50 ms"
        );
    }
}
