//! The rows that a batch or a note will write, over everything accepted.

use std::{collections::BTreeMap, ops::Bound, sync::Arc};

use bytes::Bytes;

use crate::{
    ids::Position,
    store::{
        BATCH_BYTES_MAX, BATCH_ROWS_MAX, Domain, Fault, NotAccepted, Read, View,
        engine::{Change, Family, PerFamily, Rows},
        guard::{Guard, Held, Owner},
        key::Encoder,
        overlay::{OverRows, merge},
        pending::Layer,
        range::{Direction, KeyRange, KeyValue},
        view::first_one_by_one,
    },
};

/// A row as it will be; without a value it is deleted.
#[derive(Debug)]
struct Row {
    value: Option<Bytes>,
    pending_in_key: Vec<u32>,
    pending_in_value: Vec<u32>,
}

/// The rows of one family.
#[derive(Debug, Default)]
struct FamilyRows {
    rows: BTreeMap<Bytes, Row>,
    /// These ranges are deleted before the rows are written.
    ranges: Vec<(Bytes, Bytes)>,
}

impl FamilyRows {
    fn find(&self, key: &[u8]) -> Option<Option<Bytes>> {
        if self.rows.is_empty() && self.ranges.is_empty() {
            return None;
        }
        match self.rows.get(key) {
            Some(row) => Some(row.value.clone()),
            None => self.is_deleted(key).then_some(None),
        }
    }

    fn is_deleted(&self, key: &[u8]) -> bool {
        self.ranges.iter().any(|(low, high)| &**low <= key && key < &**high)
    }
}

/// A range with at most this many rows is deleted row by row, because ranges that are deleted as such slow reading down.
const DELETED_SINGLY_MAX: usize = 64;

/// The rows to be written. It reads its own rows over the batches that are accepted but not published over the newest
/// snapshot, so a builder that holds the lock of its domain sees everything that precedes it.
pub struct Writes {
    view: View,
    /// The guards of what it may write; a builder that takes more locks adds them.
    guards: Vec<Arc<Held>>,
    families: PerFamily<FamilyRows>,
    row_count: usize,
    byte_count: usize,
    has_pending: bool,
    /// A table that it was told to write without a guard.
    unguarded: Option<&'static str>,
    /// It writes rows of rooms under a guard that covers everything, so that the rooms' turns do not learn of it.
    writes_rooms_alone: bool,
}

/// Changes with settled positions, in an order in which they may be written.
pub(crate) struct Settled {
    pub(crate) changes: Vec<Change>,
    pub(crate) layer: Option<Layer>,
}

impl Writes {
    pub(crate) fn new(view: View, guard: &Guard) -> Self {
        Self {
            view,
            guards: vec![Arc::clone(guard.held())],
            families: PerFamily::default(),
            row_count: 0,
            byte_count: 0,
            has_pending: false,
            unguarded: None,
            writes_rooms_alone: false,
        }
    }

    /// Writes without any row yet, under the same guards.
    pub(crate) fn another(&self) -> Self {
        Self {
            view: View { store: Arc::clone(&self.view.store) },
            guards: self.guards.clone(),
            families: PerFamily::default(),
            row_count: 0,
            byte_count: 0,
            has_pending: false,
            unguarded: None,
            writes_rooms_alone: false,
        }
    }

    pub(crate) fn cover(&mut self, guard: &Guard) {
        self.guards.push(Arc::clone(guard.held()));
    }

    pub(crate) fn row_count(&self) -> usize {
        self.row_count
    }

    pub(crate) fn byte_count(&self) -> usize {
        self.byte_count
    }

    /// Refuses what is above the bounds of a batch.
    pub(crate) fn check_size(&self) -> Result<(), NotAccepted> {
        if self.byte_count > BATCH_BYTES_MAX || self.row_count > BATCH_ROWS_MAX {
            tracing::debug!(
                bytes = self.byte_count,
                rows = self.row_count,
                "a batch is refused: it is too large"
            );
            return Err(NotAccepted::TooLarge);
        }
        Ok(())
    }

    /// Notes a write, or an expectation, on a table. One that no guard covers fails a test at once; outside of tests, the
    /// whole batch is refused.
    pub(crate) fn require_guard(&mut self, table: &'static str, domain: Domain, owner: Owner) {
        self.writes_rooms_alone |= domain == Domain::Room && self.guards.iter().any(|held| held.is_alone());
        if !self.guards.iter().any(|held| held.covers(domain, owner)) {
            debug_assert!(
                false,
                "table {table} is written without the lock of its domain ({domain:?}, {owner:?})"
            );
            self.unguarded = Some(table);
        }
    }

    /// Refuses what is written without a lock, or after a lock was given back.
    pub(crate) fn check_guards(&self) -> Result<(), NotAccepted> {
        let is_over = self.guards.iter().any(|held| held.is_over());
        match self.unguarded {
            Some(table) => Err(NotAccepted::Unguarded(table)),
            None if is_over => Err(NotAccepted::Unguarded("a lock that was given back before")),
            None => Ok(()),
        }
    }

    pub(crate) fn put_raw(&mut self, family: Family, key: Encoder, value: Encoder) {
        let row = Row {
            value: Some(value.bytes.into()),
            pending_in_key: key.pending,
            pending_in_value: value.pending,
        };
        self.insert(family, key.bytes, row);
    }

    pub(crate) fn delete_raw(&mut self, family: Family, key: Encoder) {
        let row = Row { value: None, pending_in_key: key.pending, pending_in_value: Vec::new() };
        self.insert(family, key.bytes, row);
    }

    fn insert(&mut self, family: Family, key: Vec<u8>, row: Row) {
        let value_bytes = |row: &Row| row.value.as_ref().map_or(0, Bytes::len);
        let key_bytes = key.len();
        self.has_pending |= !row.pending_in_key.is_empty() || !row.pending_in_value.is_empty();
        self.byte_count += value_bytes(&row);
        match self.families.of_mut(family).rows.insert(key.into(), row) {
            Some(replaced) => self.byte_count -= value_bytes(&replaced),
            None => {
                self.row_count += 1;
                self.byte_count += key_bytes;
            }
        }
    }

    /// Deletes all rows with `low <= key < high`, those put before included: one by one where there are few, because each
    /// range that is deleted as such slows reading down until the engine has compacted it away.
    pub(crate) fn delete_between(&mut self, family: Family, low: Vec<u8>, high: Vec<u8>) {
        let few: Result<Vec<Bytes>, Fault> = self
            .range_raw(family, low.clone(), high.clone(), Direction::Up)
            .and_then(|rows| rows.take(DELETED_SINGLY_MAX + 1).map(|row| row.map(|(key, _)| key)).collect());
        match few {
            Ok(few) if few.len() <= DELETED_SINGLY_MAX => {
                for key in few {
                    let key = Encoder { bytes: key.into(), pending: Vec::new() };
                    self.delete_raw(family, key);
                }
            }
            _ => self.delete_range_raw(family, low, high),
        }
    }

    /// Deletes all rows with `low <= key < high` as one range.
    pub(crate) fn delete_range_raw(&mut self, family: Family, low: Vec<u8>, high: Vec<u8>) {
        if low >= high {
            return;
        }
        let (low, high) = (Bytes::from(low), Bytes::from(high));
        let own = self.families.of_mut(family);
        let doomed: Vec<Bytes> =
            own.rows.range(low.clone()..high.clone()).map(|(key, _)| key.clone()).collect();
        for key in doomed {
            if let Some(row) = own.rows.remove(&key) {
                self.row_count -= 1;
                self.byte_count -= key.len() + row.value.map_or(0, |value| value.len());
            }
        }
        self.row_count += 1;
        self.byte_count += low.len() + high.len();
        own.ranges.push((low, high));
    }

    /// Whether it writes rows of rooms under a guard that covers everything.
    pub(crate) fn writes_rooms_alone(&self) -> bool {
        self.writes_rooms_alone
    }

    /// Whether any row holds a pending position.
    pub(crate) fn has_pending(&self) -> bool {
        self.has_pending
    }

    pub(crate) fn settle(self, base: Position) -> Settled {
        let mut changes = Vec::with_capacity(self.row_count);
        for (family, rows) in self.families.into_iter() {
            changes.extend(rows.ranges.into_iter().map(|(low, high)| Change::Range(family, low, high)));
            changes.extend(rows.rows.into_iter().map(|(key, row)| {
                let key = settled(key, &row.pending_in_key, base);
                Change::Row(family, key, row.value.map(|value| settled(value, &row.pending_in_value, base)))
            }));
        }
        Settled { layer: Layer::of(&changes), changes }
    }
}

/// The bytes with the pending positions at these offsets filled in.
fn settled(bytes: Bytes, offsets: &[u32], base: Position) -> Bytes {
    if offsets.is_empty() {
        return bytes;
    }
    let mut bytes = Vec::from(bytes);
    for offset in offsets {
        let at = *offset as usize;
        if let Some(slot) = bytes.get_mut(at..at + 8)
            && let Ok(bits) = <[u8; 8]>::try_from(&*slot)
        {
            let settled = Position::from_bits(u64::from_be_bytes(bits)).settle(base);
            slot.copy_from_slice(&settled.number().to_be_bytes());
        }
    }
    bytes.into()
}

impl Read for Writes {
    fn get_raw(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        match self.families.of(family).find(key) {
            Some(value) => Ok(value),
            None => self.view.get_raw(family, key),
        }
    }

    fn get_many_raw(&self, family: Family, keys: &[Vec<u8>]) -> Result<Vec<Option<Bytes>>, Fault> {
        let own = self.families.of(family);
        let below = self.view.get_many_raw(family, keys)?;
        Ok(keys.iter().zip(below).map(|(key, below)| own.find(key).unwrap_or(below)).collect())
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
        let own = self.families.of(family);
        let mut over =
            own.rows.range::<[u8], _>((Bound::Included(&*low), Bound::Excluded(&*high))).peekable();
        if over.peek().is_none() && own.ranges.is_empty() {
            return self.view.range_raw(family, low, high, direction);
        }
        let over = own.rows.range::<[u8], _>((Bound::Included(&*low), Bound::Excluded(&*high)));
        let over = over.map(|(key, row)| (key.clone(), row.value.clone()));
        let over: OverRows<'_> = match direction {
            Direction::Up => Box::new(over),
            Direction::Down => Box::new(over.rev()),
        };
        let below = self.view.range_raw(family, low, high, direction)?;
        let below: Rows<'_> = if own.ranges.is_empty() {
            below
        } else {
            Box::new(below.filter(|row| !matches!(row, Ok((key, _)) if own.is_deleted(key))))
        };
        Ok(merge(below, over, direction))
    }

    fn first_of_many_raw(&self, family: Family, ranges: &[KeyRange]) -> Result<Vec<Option<KeyValue>>, Fault> {
        let own = self.families.of(family);
        let is_own = |(low, high): &KeyRange| {
            let bounds = (Bound::Included(&**low), Bound::Excluded(&**high));
            low < high && own.rows.range::<[u8], _>(bounds).next().is_some()
        };
        if !own.ranges.is_empty() || ranges.iter().any(is_own) {
            return first_one_by_one(self, family, ranges);
        }
        self.view.first_of_many_raw(family, ranges)
    }

    /// Nothing bounds reading here, because a batch reads all that is accepted and all that it claims itself.
    fn upto(&self) -> Position {
        Position::MAX
    }
}
