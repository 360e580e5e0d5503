//! Reading: what is published ([`Snapshot`]) and what is accepted ([`View`]).

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;

use crate::{
    ids::Position,
    store::{
        Fault, SNAPSHOT_HELD_MAX, Shared,
        engine::{EngineSnapshot, Family, Rows},
        overlay::merge,
        range::{Direction, KeyRange, KeyValue},
    },
};

/// A source of rows: a snapshot, a view of what is accepted, or a batch over that.
pub trait Read {
    /// The row under this key.
    fn get_raw(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault>;

    /// The rows under these keys.
    fn get_many_raw(&self, family: Family, keys: &[Vec<u8>]) -> Result<Vec<Option<Bytes>>, Fault> {
        keys.iter().map(|key| self.get_raw(family, key)).collect()
    }

    /// The rows with `low <= key < high`.
    fn range_raw(
        &self,
        family: Family,
        low: Vec<u8>,
        high: Vec<u8>,
        direction: Direction,
    ) -> Result<Rows<'_>, Fault>;

    /// The first row of each of these ranges.
    fn first_of_many_raw(&self, family: Family, ranges: &[KeyRange]) -> Result<Vec<Option<KeyValue>>, Fault> {
        first_one_by_one(self, family, ranges)
    }

    /// Everything at or before this position is in here; ranges over positions and orders are bounded by it.
    fn upto(&self) -> Position;
}

/// The first row of each range, each looked up by itself.
pub(crate) fn first_one_by_one(
    read: &(impl Read + ?Sized),
    family: Family,
    ranges: &[KeyRange],
) -> Result<Vec<Option<KeyValue>>, Fault> {
    let first = |(low, high): &KeyRange| {
        read.range_raw(family, low.clone(), high.clone(), Direction::Up)?.next().transpose()
    };
    ranges.iter().map(first).collect()
}

/// Everything published at one moment. Reading from it fails with [`Fault::Outdated`] when a newer one has been there for
/// longer than [`SNAPSHOT_HELD_MAX`]: a reader that takes longer takes a new one in between.
pub struct Snapshot {
    pub(crate) engine: EngineSnapshot,
    pub(crate) position: Position,
    pub(crate) batch_number: u64,
    pub(crate) clock_ms: Arc<AtomicU64>,
    /// The store's time at which a newer snapshot was published, in milliseconds; 0 while there is none.
    superseded_ms: AtomicU64,
}

impl Snapshot {
    pub(crate) fn new(
        engine: EngineSnapshot,
        position: Position,
        batch_number: u64,
        clock_ms: Arc<AtomicU64>,
    ) -> Self {
        Self { engine, position, batch_number, clock_ms, superseded_ms: AtomicU64::new(0) }
    }

    /// Notes that a newer one is published: from now on this one ages.
    pub(crate) fn supersede(&self) {
        self.superseded_ms.store(self.clock_ms.load(Ordering::Relaxed).max(1), Ordering::Relaxed);
    }

    fn require_current(&self) -> Result<(), Fault> {
        match self.superseded_ms.load(Ordering::Relaxed) {
            0 => Ok(()),
            since => {
                let held_ms = self.clock_ms.load(Ordering::Relaxed).saturating_sub(since);
                if u128::from(held_ms) > SNAPSHOT_HELD_MAX.as_millis() {
                    tracing::debug!(held_ms, "a reader is refused: it held its snapshot for too long");
                    Err(Fault::Outdated)
                } else {
                    Ok(())
                }
            }
        }
    }

    /// The number of the last batch in it.
    pub fn batch_number(&self) -> u64 {
        self.batch_number
    }
}

impl Read for Snapshot {
    fn get_raw(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        self.require_current()?;
        self.engine.get(family, key)
    }

    fn get_many_raw(&self, family: Family, keys: &[Vec<u8>]) -> Result<Vec<Option<Bytes>>, Fault> {
        self.require_current()?;
        self.engine.get_many(family, keys)
    }

    fn range_raw(
        &self,
        family: Family,
        low: Vec<u8>,
        high: Vec<u8>,
        direction: Direction,
    ) -> Result<Rows<'_>, Fault> {
        self.require_current()?;
        self.engine.range(family, low, high, direction)
    }

    fn upto(&self) -> Position {
        self.position
    }
}

/// Everything accepted: what is published and what waits for the flush. A reader that holds the lock of a domain sees all
/// of that domain; of other domains it may see more from one read to the next.
///
/// Each read looks at what waits first, then at the *newest* snapshot: a row stops waiting only after it is published.
#[derive(Clone)]
pub struct View {
    pub(crate) store: Arc<Shared>,
}

impl Read for View {
    fn get_raw(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        let pending = self.store.queue.lock().pending.find(family, key);
        match pending {
            Some(value) => Ok(value),
            None => self.store.published.load().get_raw(family, key),
        }
    }

    fn get_many_raw(&self, family: Family, keys: &[Vec<u8>]) -> Result<Vec<Option<Bytes>>, Fault> {
        let over: Vec<Option<Option<Bytes>>> = {
            let queue = self.store.queue.lock();
            keys.iter().map(|key| queue.pending.find(family, key)).collect()
        };
        let published = self.store.published.load().get_many_raw(family, keys)?;
        Ok(over.into_iter().zip(published).map(|(over, published)| over.unwrap_or(published)).collect())
    }

    fn range_raw(
        &self,
        family: Family,
        low: Vec<u8>,
        high: Vec<u8>,
        direction: Direction,
    ) -> Result<Rows<'_>, Fault> {
        if low >= high {
            return Ok(Box::new(std::iter::empty()));
        }
        let pending = self.store.queue.lock().pending.find_between(family, &low, &high, direction);
        let snapshot = self.store.published.load_full();
        let base = snapshot_rows(snapshot, family, low, high, direction)?;
        let Some(mut pending) = pending else { return Ok(Box::new(base)) };
        let over = std::mem::take(&mut pending.rows).into_iter();
        let base: Rows<'_> = if pending.has_ranges() {
            Box::new(base.filter(move |row| !matches!(row, Ok((key, _)) if pending.is_deleted(key))))
        } else {
            Box::new(base)
        };
        Ok(merge(base, over, direction))
    }

    fn first_of_many_raw(&self, family: Family, ranges: &[KeyRange]) -> Result<Vec<Option<KeyValue>>, Fault> {
        let waits = {
            let queue = self.store.queue.lock();
            let pending = |(low, high): &KeyRange| {
                queue.pending.find_between(family, low, high, Direction::Up).is_some()
            };
            ranges.iter().any(pending)
        };
        if waits {
            return first_one_by_one(self, family, ranges);
        }
        self.store.published.load().first_of_many_raw(family, ranges)
    }

    /// Everything accepted may be read, so nothing bounds it.
    fn upto(&self) -> Position {
        Position::MAX
    }
}

fn snapshot_rows(
    snapshot: Arc<Snapshot>,
    family: Family,
    low: Vec<u8>,
    high: Vec<u8>,
    direction: Direction,
) -> Result<SnapshotRows, Fault> {
    SnapshotRows::try_new(snapshot, |snapshot| snapshot.range_raw(family, low, high, direction))
}

self_cell::self_cell! {
    /// Rows, with the snapshot from which they are read and which they keep alive.
    struct SnapshotRows {
        owner: Arc<Snapshot>,
        #[not_covariant]
        dependent: Rows,
    }
}

impl Iterator for SnapshotRows {
    type Item = Result<(Bytes, Bytes), Fault>;
    fn next(&mut self) -> Option<Self::Item> {
        self.with_dependent_mut(|_, rows| rows.next())
    }
}
