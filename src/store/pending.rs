//! Rows that are accepted and not published. Laid over the newest snapshot, they are what builders decide on.
//!
//! Small batches share one map. A large one stays a layer of its own, which comes and goes without touching each row:
//! a builder that waits for the queue meanwhile waits for microseconds. Where several have the row, the newest batch counts.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    ops::Bound,
    sync::Arc,
};

use bytes::Bytes;

use crate::store::{
    engine::{Change, Family, PerFamily},
    range::Direction,
};

/// A batch with more changes than this is a layer of its own, because merging it into the map takes long under the lock.
const SHARED_CHANGES_MAX: usize = 200;

/// A row that waits, with the number of its batch.
#[derive(Debug, Clone)]
struct PendingRow {
    batch: u64,
    value: Option<Bytes>,
}

/// A range whose deletion waits: rows of the same batch and of later ones stand above it.
#[derive(Debug, Clone)]
struct DeletedRange {
    batch: u64,
    low: Bytes,
    high: Bytes,
}

impl DeletedRange {
    fn covers(&self, key: &[u8]) -> bool {
        &*self.low <= key && key < &*self.high
    }
}

/// The rows of one large batch, in order.
#[derive(Debug, Default)]
pub(crate) struct Layer(PerFamily<Vec<(Bytes, Option<Bytes>)>>);

impl Layer {
    /// The rows of a large batch; none for a small one.
    pub(crate) fn of(changes: &[Change]) -> Option<Self> {
        if changes.len() <= SHARED_CHANGES_MAX {
            return None;
        }
        let mut rows = PerFamily::<Vec<_>>::default();
        for change in changes {
            if let Change::Row(family, key, value) = change {
                rows.of_mut(*family).push((key.clone(), value.clone()));
            }
        }
        // A stable sort costs little here, because they mostly are in order already.
        for family in Family::ALL {
            rows.of_mut(family).sort_by(|(a, _), (b, _)| a.cmp(b));
        }
        Some(Self(rows))
    }

    fn find(&self, family: Family, key: &[u8]) -> Option<&Option<Bytes>> {
        let rows = self.0.of(family);
        let index = rows.binary_search_by(|(found, _)| (**found).cmp(key)).ok()?;
        rows.get(index).map(|(_, value)| value)
    }

    fn between(&self, family: Family, low: &[u8], high: &[u8]) -> &[(Bytes, Option<Bytes>)] {
        let rows = self.0.of(family);
        let at = |key: &[u8]| rows.partition_point(|(found, _)| **found < *key);
        rows.get(at(low)..at(high)).unwrap_or_default()
    }
}

/// The rows that wait in one family, outside layers.
#[derive(Debug, Default)]
struct Shared {
    rows: BTreeMap<Bytes, PendingRow>,
    /// Ranges are deleted seldom, so this is nearly always empty.
    ranges: Vec<DeletedRange>,
}

/// Everything accepted and not published.
#[derive(Debug, Default)]
pub(crate) struct PendingRows {
    shared: PerFamily<Shared>,
    /// The layers, the oldest first.
    layers: Vec<(u64, Arc<Layer>)>,
}

/// The rows that wait between two keys, at one moment.
#[derive(Debug)]
pub(crate) struct PendingBetween {
    pub(crate) rows: Vec<(Bytes, Option<Bytes>)>,
    ranges: Vec<DeletedRange>,
}

impl PendingBetween {
    /// Whether the deletion of any range waits.
    pub(crate) fn has_ranges(&self) -> bool {
        !self.ranges.is_empty()
    }

    /// Whether the deletion of a range with this key waits.
    pub(crate) fn is_deleted(&self, key: &[u8]) -> bool {
        self.ranges.iter().any(|range| range.covers(key))
    }
}

impl PendingRows {
    /// The row as it will be, or that it will be deleted; `None` when nothing that waits touches it.
    pub(crate) fn find(&self, family: Family, key: &[u8]) -> Option<Option<Bytes>> {
        let shared = self.shared.of(family);
        let mut newest = shared.rows.get(key).map(|row| (row.batch, &row.value));
        for (batch, layer) in &self.layers {
            if newest.is_none_or(|(of, _)| of < *batch)
                && let Some(value) = layer.find(family, key)
            {
                newest = Some((*batch, value));
            }
        }
        let deleted = shared.ranges.iter().filter(|range| range.covers(key)).map(|range| range.batch).max();
        match (newest, deleted) {
            (Some((batch, _)), Some(deleted)) if batch < deleted => Some(None),
            (Some((_, value)), _) => Some(value.clone()),
            (None, Some(_)) => Some(None),
            (None, None) => None,
        }
    }

    /// The changes that touch `low <= key < high`; `None` when none does.
    pub(crate) fn find_between(
        &self,
        family: Family,
        low: &[u8],
        high: &[u8],
        direction: Direction,
    ) -> Option<PendingBetween> {
        let shared = self.shared.of(family);
        let layers: Vec<_> = self
            .layers
            .iter()
            .map(|(batch, layer)| (*batch, layer.between(family, low, high)))
            .filter(|(_, rows)| !rows.is_empty())
            .collect();
        let own = shared.between(low, high);
        let mut rows: Vec<_> = if layers.is_empty() && shared.ranges.is_empty() {
            own.map(|(key, row)| (key.clone(), row.value.clone())).collect()
        } else {
            let mut newest: BTreeMap<&Bytes, (u64, &Option<Bytes>)> =
                own.map(|(key, row)| (key, (row.batch, &row.value))).collect();
            for (batch, rows) in layers {
                for (key, value) in rows {
                    let row = newest.entry(key).or_insert((batch, value));
                    if row.0 <= batch {
                        *row = (batch, value);
                    }
                }
            }
            // The rows below a deleted range are filtered out of what is published, and here.
            let is_deleted = |key: &[u8], batch: u64| {
                shared.ranges.iter().any(|range| batch < range.batch && range.covers(key))
            };
            newest.retain(|key, (batch, _)| !is_deleted(key, *batch));
            newest.into_iter().map(|(key, (_, value))| (key.clone(), value.clone())).collect()
        };
        if rows.is_empty() && shared.ranges.is_empty() {
            return None;
        }
        if direction == Direction::Down {
            rows.reverse();
        }
        Some(PendingBetween { rows, ranges: shared.ranges.clone() })
    }

    /// Adds a batch that was accepted; `layer` has its rows if it is a large one.
    pub(crate) fn add(&mut self, batch: u64, changes: &[Change], layer: Option<Layer>) {
        let is_layer = layer.is_some();
        self.layers.extend(layer.map(|layer| (batch, Arc::new(layer))));
        for change in changes {
            match change {
                Change::Row(..) if is_layer => {}
                Change::Row(family, key, value) => {
                    let row = PendingRow { batch, value: value.clone() };
                    self.shared.of_mut(*family).rows.insert(key.clone(), row);
                }
                Change::Range(family, low, high) => {
                    let range = DeletedRange { batch, low: low.clone(), high: high.clone() };
                    self.shared.of_mut(*family).ranges.push(range);
                }
            }
        }
    }

    /// Removes a batch that is published and need no longer be laid over the snapshot, except rows that a later batch has
    /// written again. Answers what is to be dropped outside the lock.
    pub(crate) fn forget(&mut self, batch: u64, changes: &[Change]) -> Option<Arc<Layer>> {
        let layer = self.layers.iter().position(|(of, _)| *of == batch).map(|at| self.layers.remove(at).1);
        for change in changes {
            match change {
                Change::Row(..) if layer.is_some() => {}
                Change::Row(family, key, _) => self.shared.of_mut(*family).forget_row(batch, key),
                Change::Range(family, ..) => {
                    self.shared.of_mut(*family).ranges.retain(|range| range.batch != batch);
                }
            }
        }
        layer
    }
}

impl Shared {
    fn between(&self, low: &[u8], high: &[u8]) -> impl Iterator<Item = (&Bytes, &PendingRow)> {
        self.rows.range::<[u8], _>((Bound::Included(low), Bound::Excluded(high)))
    }

    fn forget_row(&mut self, batch: u64, key: &Bytes) {
        if let Entry::Occupied(row) = self.rows.entry(key.clone())
            && row.get().batch == batch
        {
            row.remove();
        }
    }
}
