//! What is accepted and not published: laid over the newest snapshot it is what builders decide on.

use std::ops::Bound;

use bytes::Bytes;
use imbl::OrdMap;

use crate::store::{
    engine::{Change, Family, PerFamily},
    overlay::OverRows,
    table::Direction,
};

/// A row that waits, with the number of its batch.
#[derive(Debug, Clone)]
struct PendingRow {
    batch: u64,
    value: Option<Bytes>,
}

type FamilyRows = OrdMap<Bytes, PendingRow>;

/// The rows of one family that wait, and the ranges whose deletion waits.
#[derive(Debug, Clone, Default)]
pub(crate) struct PendingFamily {
    rows: FamilyRows,
    /// Nearly always empty.
    ranges: Vec<DeletedRange>,
}

/// A range whose deletion waits: rows accepted later stand above it.
#[derive(Debug, Clone)]
struct DeletedRange {
    batch: u64,
    low: Bytes,
    high: Bytes,
}

/// Everything accepted and not published.
#[derive(Debug, Default)]
pub(crate) struct PendingRows(PerFamily<PendingFamily>);

impl PendingFamily {
    /// What the row will be; `None` when nothing that waits touches it.
    pub(crate) fn find(&self, key: &[u8]) -> Option<Option<Bytes>> {
        match self.rows.get(key) {
            Some(row) => Some(row.value.clone()),
            None => self.is_deleted(key).then_some(None),
        }
    }

    /// Whether the deletion of a range with this key waits.
    pub(crate) fn is_deleted(&self, key: &[u8]) -> bool {
        self.ranges.iter().any(|range| &*range.low <= key && key < &*range.high)
    }

    /// Whether nothing that waits touches `low <= key < high`.
    pub(crate) fn is_clear(&self, low: &[u8], high: &[u8]) -> bool {
        self.ranges.is_empty() && self.between(low, high).next().is_none()
    }

    pub(crate) fn has_ranges(&self) -> bool {
        !self.ranges.is_empty()
    }

    fn between(
        &self,
        low: &[u8],
        high: &[u8],
    ) -> imbl::ordmap::RangedIter<'_, Bytes, PendingRow, imbl::shared_ptr::DefaultSharedPtr> {
        self.rows.range::<_, [u8]>((Bound::Included(low), Bound::Excluded(high)))
    }

    /// What waits between two keys, owned by the iterator.
    pub(crate) fn into_rows(self, low: &[u8], high: &[u8], direction: Direction) -> PendingIter {
        PendingIter::new(self, |family| {
            let rows = family.between(low, high).map(|(key, row)| (key.clone(), row.value.clone()));
            match direction {
                Direction::Up => Box::new(rows),
                Direction::Down => Box::new(rows.rev()),
            }
        })
    }
}

self_cell::self_cell! {
    /// The rows that wait in a range, over a copy (which shares all with the original) of what waited then.
    pub(crate) struct PendingIter {
        owner: PendingFamily,
        #[not_covariant]
        dependent: OverRows,
    }
}

impl Iterator for PendingIter {
    type Item = (Bytes, Option<Bytes>);
    fn next(&mut self) -> Option<Self::Item> {
        self.with_dependent_mut(|_, rows| rows.next())
    }
}

impl PendingRows {
    pub(crate) fn family(&self, family: Family) -> &PendingFamily {
        self.0.of(family)
    }

    /// A batch was accepted.
    pub(crate) fn add(&mut self, batch: u64, change: &Change) {
        match change {
            Change::Row(family, key, value) => {
                let row = PendingRow { batch, value: value.clone() };
                self.0.of_mut(*family).rows.insert(key.clone(), row);
            }
            Change::Range(family, low, high) => {
                let family = self.0.of_mut(*family);
                let doomed: Vec<Bytes> = family.between(low, high).map(|(key, _)| key.clone()).collect();
                for key in doomed {
                    family.rows.insert(key, PendingRow { batch, value: None });
                }
                family.ranges.push(DeletedRange { batch, low: low.clone(), high: high.clone() });
            }
        }
    }

    /// A batch is published: its rows need no longer be laid over the snapshot, unless a later batch has written
    /// them again.
    pub(crate) fn forget(&mut self, batch: u64, change: &Change) {
        match change {
            Change::Row(family, key, _) => self.0.of_mut(*family).forget_row(batch, key),
            Change::Range(family, low, high) => {
                let family = self.0.of_mut(*family);
                let doomed: Vec<Bytes> = family.between(low, high).map(|(key, _)| key.clone()).collect();
                for key in doomed {
                    family.forget_row(batch, &key);
                }
                family.ranges.retain(|range| range.batch != batch);
            }
        }
    }
}

impl PendingFamily {
    fn forget_row(&mut self, batch: u64, key: &[u8]) {
        if self.rows.get(key).is_some_and(|row| row.batch == batch) {
            self.rows.remove(key);
        }
    }
}
