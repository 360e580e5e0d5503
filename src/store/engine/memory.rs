//! An engine in memory that models what a crash loses: any suffix of what was not synced.

use std::{
    ops::Bound,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use imbl::OrdMap;
use parking_lot::Mutex;

use crate::store::{
    Fault,
    engine::{Change, Family, PerFamily, Rows},
    range::Direction,
};

pub(crate) type MemoryRows = PerFamily<OrdMap<Bytes, Bytes>>;

/// An engine in memory that models what a crash loses: any suffix of what was not synced, and a write that was under
/// way, which is there or not.
#[derive(Debug, Default)]
pub struct Memory {
    state: Box<Mutex<MemoryState>>,
    /// The time that a synced write takes. Tests of group commit set it.
    sync_takes: Duration,
    /// The number of rows that were looked for or read. Tests of what a request costs compare it.
    reads: Arc<AtomicU64>,
}

/// The rows of one moment.
pub(crate) struct MemorySnapshot {
    rows: MemoryRows,
    reads: Arc<AtomicU64>,
}

#[derive(Debug, Default)]
struct MemoryState {
    rows: MemoryRows,
    /// The rows that survive any crash.
    synced: MemoryRows,
    /// Writes since the last sync, oldest first.
    unsynced: Vec<Vec<Change>>,
    syncs: u64,
    /// The number of writes until one fails, and whether that one leaves its rows all the same.
    fails_in: Option<(u64, bool)>,
}

impl Memory {
    /// An empty engine whose synced writes take this long.
    pub fn with_sync_delay(sync_takes: Duration) -> Self {
        Self { sync_takes, ..Self::default() }
    }

    #[expect(clippy::disallowed_methods, reason = "stands in for a disk that takes its time")]
    pub(crate) fn write<'c>(
        &self,
        changes: impl Iterator<Item = &'c Change> + Clone,
        sync: bool,
    ) -> Result<(), Fault> {
        if sync && !self.sync_takes.is_zero() {
            std::thread::sleep(self.sync_takes);
        }
        let mut state = self.state.lock();
        let failure = match &mut state.fails_in {
            Some((0, leaves_rows)) => Some(*leaves_rows),
            Some((writes, _)) => {
                *writes -= 1;
                None
            }
            None => None,
        };
        if failure != Some(false) {
            apply(&mut state.rows, changes.clone());
            if sync {
                state.unsynced.clear();
                state.synced = state.rows.clone();
                state.syncs += 1;
            } else {
                state.unsynced.push(changes.cloned().collect());
            }
        }
        if failure.is_some() {
            Err(Fault::Io("the disk has failed, as a test asked".to_owned()))
        } else {
            Ok(())
        }
    }

    pub(crate) fn snapshot(&self) -> MemorySnapshot {
        MemorySnapshot { rows: self.state.lock().rows.clone(), reads: Arc::clone(&self.reads) }
    }

    /// The number of rows that were looked for by their keys, and of ranges and their rows that were read, since it began.
    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    /// The number of rows in all families.
    pub(crate) fn count_rows(&self) -> u64 {
        let state = self.state.lock();
        super::Family::ALL.into_iter().map(|family| state.rows.of(family).len() as u64).sum()
    }

    /// The number of writes that a crash could lose.
    pub fn unsynced_writes(&self) -> usize {
        self.state.lock().unsynced.len()
    }

    /// The number of writes that were synced.
    pub fn syncs(&self) -> u64 {
        self.state.lock().syncs
    }

    /// Makes every write fail after this many more. With `leaves_rows` the first that fails leaves its rows, as a crash
    /// between a write and its acknowledgement does.
    pub fn fail_after(&self, writes: u64, leaves_rows: bool) {
        self.state.lock().fails_in = Some((writes, leaves_rows));
    }

    /// An engine as a crash leaves it: with everything synced, and the first `kept` of the writes since then.
    #[must_use]
    pub fn after_crash(&self, kept: usize) -> Self {
        let state = self.state.lock();
        let mut rows = state.synced.clone();
        for changes in state.unsynced.iter().take(kept) {
            apply(&mut rows, changes.iter());
        }
        let state = MemoryState { synced: rows.clone(), rows, ..MemoryState::default() };
        Self { state: Box::new(Mutex::new(state)), sync_takes: self.sync_takes, reads: Arc::default() }
    }
}

fn apply<'c>(rows: &mut MemoryRows, changes: impl Iterator<Item = &'c Change>) {
    for change in changes {
        match change {
            Change::Row(family, key, Some(value)) => {
                rows.of_mut(*family).insert(key.clone(), value.clone());
            }
            Change::Row(family, key, None) => {
                rows.of_mut(*family).remove(key);
            }
            Change::Range(family, low, high) => {
                let rows = rows.of_mut(*family);
                let doomed: Vec<Bytes> = keys(rows, low, high).collect();
                for key in doomed {
                    rows.remove(&key);
                }
            }
        }
    }
}

fn keys(rows: &OrdMap<Bytes, Bytes>, low: &[u8], high: &[u8]) -> impl Iterator<Item = Bytes> {
    rows.range::<_, [u8]>((Bound::Included(low), Bound::Excluded(high))).map(|(key, _)| key.clone())
}

impl MemorySnapshot {
    pub(crate) fn get(&self, family: Family, key: &[u8]) -> Option<Bytes> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.rows.of(family).get(key).cloned()
    }

    /// The rows with `low <= key < high`; `low` must be below `high`.
    pub(crate) fn range(&self, family: Family, low: &[u8], high: &[u8], direction: Direction) -> Rows<'_> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let rows = self
            .rows
            .of(family)
            .range::<_, [u8]>((Bound::Included(low), Bound::Excluded(high)))
            .inspect(|_| {
                self.reads.fetch_add(1, Ordering::Relaxed);
            })
            .map(|(key, value)| Ok((key.clone(), value.clone())));
        match direction {
            Direction::Up => Box::new(rows),
            Direction::Down => Box::new(rows.rev()),
        }
    }
}
