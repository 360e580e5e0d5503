//! A snapshot of the database, and reading from it by iterators that are used again.
//!
//! Making an iterator costs as much as several seeks, and an answer of `/sync` reads several ranges in each of its rooms. So a
//! snapshot keeps the iterators that nobody uses now, and the next range of the same column family seeks with one of them.
//!
//! An iterator that serves many ranges has no bounds of its own, so it could step over any number of deleted rows beyond a
//! range before it learns that the range has ended. It gives up after [`SKIPPED_MAX`] of them, and then an iterator with
//! bounds reads the rest.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use parking_lot::Mutex;
use rocksdb::{ColumnFamily, DB, DBPinnableSlice, DBRawIterator, ErrorKind as Trouble, ReadOptions};

use crate::store::{
    Fault,
    engine::{Family, PerFamily, Rows, STATE_PREFIX_BYTES},
    range::{Direction, KeyRange, after_prefix},
};

/// An iterator without bounds gives up a range after stepping over this many deleted rows.
const SKIPPED_MAX: u64 = 500;
/// A snapshot keeps at most this many unused iterators of one kind, because each keeps blocks and files in use.
const KEPT_MAX: usize = 4;
/// The number of rows that are stepped over before seeking: a step costs a small part of a seek.
const STEPS_MAX: usize = 4;

pub(super) fn family_handle(db: &DB, family: Family) -> Result<&ColumnFamily, Fault> {
    db.cf_handle(family.name()).ok_or(Fault::Corrupt("a column family is missing"))
}

/// A snapshot, with the options of point reads in it: making those anew costs as much as a read from memory.
struct Moment<'a> {
    options: ReadOptions,
    snapshot: rocksdb::Snapshot<'a>,
}

impl<'a> Moment<'a> {
    fn of(snapshot: rocksdb::Snapshot<'a>) -> Self {
        let mut options = ReadOptions::default();
        options.set_snapshot(&snapshot);
        Self { options, snapshot }
    }
}

self_cell::self_cell! {
    /// A snapshot with the database it belongs to.
    struct OwnedMoment {
        owner: Arc<DB>,
        #[covariant]
        dependent: Moment,
    }
}

/// A snapshot, with the iterators that were made in it and can be used again.
pub(crate) struct RocksSnapshot {
    /// These go first, because they read the snapshot.
    cursors: Cursors,
    moment: OwnedMoment,
}

/// The ranges that an iterator serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// It serves every range of its family.
    Any,
    /// It serves ranges of the state family within one prefix, about which it asks the filter.
    InPrefix,
}

/// From this many rising keys on, rows are looked for by an iterator, if they turn out to be near to each other.
const MANY: usize = 4;
/// Keys are near to each other if at most one in this many needs a seek.
const SEEKS_IN: usize = 4;

fn own(slice: &DBPinnableSlice<'_>) -> Bytes {
    Bytes::copy_from_slice(slice)
}

impl RocksSnapshot {
    /// A snapshot of what the database holds now. `made` counts the iterators.
    pub(super) fn of(db: &Arc<DB>, made: &Arc<AtomicU64>) -> Self {
        Self {
            cursors: Cursors::new(Arc::clone(made)),
            moment: OwnedMoment::new(Arc::clone(db), |db| Moment::of(db.snapshot())),
        }
    }

    pub(crate) fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        let (db, moment) = (self.moment.borrow_owner(), self.moment.borrow_dependent());
        let row = db.get_pinned_cf_opt(family_handle(db, family)?, key, &moment.options)?;
        Ok(row.map(|slice| own(&slice)))
    }

    pub(crate) fn get_many(&self, family: Family, keys: &[Vec<u8>]) -> Result<Vec<Option<Bytes>>, Fault> {
        let is_rising = keys.is_sorted();
        let mut found =
            if is_rising && keys.len() >= MANY { self.get_near(family, keys)? } else { Vec::new() };
        let rest = keys.get(found.len()..).unwrap_or_default();
        if !rest.is_empty() {
            let (db, moment) = (self.moment.borrow_owner(), self.moment.borrow_dependent());
            let family = family_handle(db, family)?;
            for row in db.batched_multi_get_cf_opt(family, rest, is_rising, &moment.options) {
                found.push(row?.map(|slice| own(&slice)));
            }
        }
        Ok(found)
    }

    /// The rows under rising keys, for as long as most stand beside each other: stepping from one to the next costs a small
    /// part of what looking up each one does.
    fn get_near(&self, family: Family, keys: &[Vec<u8>]) -> Result<Vec<Option<Bytes>>, Fault> {
        let mut cursor = Cursor::open(self, family, Kind::Any)?;
        let (mut found, mut seeks) = (Vec::with_capacity(keys.len()), 0);
        for (at, key) in keys.iter().enumerate() {
            if at == 0 {
                cursor.seek(key);
            } else if cursor.go_up_to(key) {
                seeks += 1;
            }
            match cursor.row() {
                Some((here, value)) => found.push((here == key).then(|| Bytes::copy_from_slice(value))),
                None if cursor.why_ended()? == Ended::GaveUp => break,
                None => found.push(None),
            }
            if seeks > 2 + at / SEEKS_IN {
                break;
            }
        }
        Ok(found)
    }

    pub(crate) fn range(
        &self,
        family: Family,
        low: Vec<u8>,
        high: Vec<u8>,
        direction: Direction,
    ) -> Result<Rows<'_>, Fault> {
        // A scan that leaves its prefix must not ask the filter of prefixes.
        let is_in_prefix =
            family == Family::State && direction == Direction::Up && stays_in_prefix(&low, &high);
        let kind = if is_in_prefix { Kind::InPrefix } else { Kind::Any };
        let cursor = Cursor::open(self, family, kind)?;
        Ok(Box::new(Walk::new(cursor, (low, high), direction)))
    }
}

/// Whether all keys with `low <= key < high` have the prefix of `low` that the filter of the state family is about.
fn stays_in_prefix(low: &[u8], high: &[u8]) -> bool {
    low.get(..STATE_PREFIX_BYTES).is_some_and(|prefix| high <= after_prefix(prefix).as_slice())
}

self_cell::self_cell! {
    /// An iterator with the database that it reads.
    struct Iter {
        owner: Arc<DB>,
        #[covariant]
        dependent: DBRawIterator,
    }
}

/// The unused iterators of one snapshot, and the count of all that were ever made in the database.
struct Cursors {
    any: Mutex<PerFamily<Vec<Iter>>>,
    /// Iterators of the state family that stay within the prefix to which they were sent, and ask its filter.
    in_prefix: Mutex<Vec<Iter>>,
    made: Arc<AtomicU64>,
}

impl Cursors {
    fn new(made: Arc<AtomicU64>) -> Self {
        Self { any: Mutex::default(), in_prefix: Mutex::default(), made }
    }

    fn take(&self, family: Family, kind: Kind) -> Option<Iter> {
        match kind {
            Kind::Any => self.any.lock().of_mut(family).pop(),
            Kind::InPrefix => self.in_prefix.lock().pop(),
        }
    }

    fn keep(&self, family: Family, kind: Kind, iter: Iter) {
        let keep = |kept: &mut Vec<Iter>| {
            if kept.len() < KEPT_MAX {
                kept.push(iter);
            }
        };
        match kind {
            Kind::Any => keep(self.any.lock().of_mut(family)),
            Kind::InPrefix => keep(&mut self.in_prefix.lock()),
        }
    }
}

/// An iterator in use. It goes back to its snapshot when it is dropped, unless it is bounded to one range.
struct Cursor<'s> {
    snapshot: &'s RocksSnapshot,
    family: Family,
    kind: Kind,
    is_bounded: bool,
    iter: Option<Iter>,
}

impl<'s> Cursor<'s> {
    /// Takes an iterator that is not used, or makes one. It serves any range of its kind.
    fn open(snapshot: &'s RocksSnapshot, family: Family, kind: Kind) -> Result<Self, Fault> {
        let iter = match snapshot.cursors.take(family, kind) {
            Some(iter) => iter,
            None => make(snapshot, family, kind, None)?,
        };
        Ok(Self { snapshot, family, kind, is_bounded: false, iter: Some(iter) })
    }

    /// Makes an iterator for one range alone, which stands at its first row in this direction.
    fn bounded(&self, range: KeyRange, direction: Direction) -> Result<Self, Fault> {
        let Self { snapshot, family, kind, .. } = *self;
        let iter = make(snapshot, family, kind, Some(range))?;
        let mut cursor = Self { snapshot, family, kind, is_bounded: true, iter: Some(iter) };
        cursor.with(|rows| match direction {
            Direction::Up => rows.seek_to_first(),
            Direction::Down => rows.seek_to_last(),
        });
        Ok(cursor)
    }

    fn with(&mut self, work: impl FnOnce(&mut DBRawIterator<'_>)) {
        if let Some(iter) = &mut self.iter {
            iter.with_dependent_mut(|_, rows| work(rows));
        }
    }

    /// Goes to the first row at or above a key.
    fn seek(&mut self, key: &[u8]) {
        self.with(|rows| rows.seek(key));
    }

    /// Goes to the last row below a key.
    fn seek_below(&mut self, key: &[u8]) {
        self.with(|rows| {
            rows.seek_for_prev(key);
            if rows.key().is_some_and(|found| found >= key) {
                rows.prev();
            }
        });
    }

    fn step(&mut self, direction: Direction) {
        self.with(|rows| match direction {
            Direction::Up => rows.next(),
            Direction::Down => rows.prev(),
        });
    }

    /// The row at which it stands.
    fn row(&self) -> Option<(&[u8], &[u8])> {
        self.iter.as_ref().and_then(|iter| iter.borrow_dependent().item())
    }

    /// Tells why it stands at no row. Errors: the disk.
    fn why_ended(&self) -> Result<Ended, Fault> {
        let status = self.iter.as_ref().map_or(Ok(()), |iter| iter.borrow_dependent().status());
        match status {
            Ok(()) => Ok(Ended::AfterLast),
            Err(error) if error.kind() == Trouble::Incomplete => Ok(Ended::GaveUp),
            Err(error) => Err(error.into()),
        }
    }

    /// Goes to the first row at or above a key that is not below where it stands. It takes a few steps where that is near,
    /// and says whether it had to seek.
    fn go_up_to(&mut self, key: &[u8]) -> bool {
        for _ in 0..STEPS_MAX {
            match self.row() {
                Some((found, _)) if found < key => self.step(Direction::Up),
                Some(_) => return false,
                None => break,
            }
        }
        if self.row().is_none_or(|(found, _)| found < key) {
            self.seek(key);
            return true;
        }
        false
    }
}

impl Drop for Cursor<'_> {
    fn drop(&mut self) {
        if let Some(iter) = self.iter.take().filter(|_| !self.is_bounded) {
            self.snapshot.cursors.keep(self.family, self.kind, iter);
        }
    }
}

/// Why an iterator stands at no row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// There are no more rows.
    AfterLast,
    /// It stepped over too many deleted rows.
    GaveUp,
}

fn make(
    snapshot: &RocksSnapshot,
    family: Family,
    kind: Kind,
    bounds: Option<KeyRange>,
) -> Result<Iter, Fault> {
    snapshot.cursors.made.fetch_add(1, Ordering::Relaxed);
    let mut options = ReadOptions::default();
    options.set_snapshot(&snapshot.moment.borrow_dependent().snapshot);
    if family == Family::State {
        match kind {
            Kind::Any => options.set_total_order_seek(true),
            Kind::InPrefix => options.set_prefix_same_as_start(true),
        }
    }
    match bounds {
        Some((low, high)) => {
            options.set_iterate_lower_bound(low);
            options.set_iterate_upper_bound(high);
        }
        None => options.set_max_skippable_internal_keys(SKIPPED_MAX),
    }
    Iter::try_new(Arc::clone(snapshot.moment.borrow_owner()), |db| {
        Ok(db.raw_iterator_cf_opt(family_handle(db, family)?, options))
    })
}

/// The rows of one range.
struct Walk<'s> {
    cursor: Cursor<'s>,
    /// The keys that are left: the bound at which the walk began moves along with it.
    left: KeyRange,
    direction: Direction,
    has_begun: bool,
    has_ended: bool,
}

impl<'s> Walk<'s> {
    fn new(cursor: Cursor<'s>, range: KeyRange, direction: Direction) -> Self {
        Self { cursor, left: range, direction, has_begun: false, has_ended: false }
    }

    fn go_on(&mut self) {
        match (self.has_begun, self.direction) {
            (true, direction) => self.cursor.step(direction),
            (false, Direction::Up) => self.cursor.seek(&self.left.0),
            (false, Direction::Down) => self.cursor.seek_below(&self.left.1),
        }
        self.has_begun = true;
    }

    /// Where the iterator gave up, one with bounds goes on in its place.
    fn go_on_if_given_up(&mut self) -> Result<(), Fault> {
        if self.cursor.row().is_none() && self.cursor.why_ended()? == Ended::GaveUp {
            self.cursor = self.cursor.bounded(self.left.clone(), self.direction)?;
            if self.cursor.row().is_none() {
                self.cursor.why_ended()?;
            }
        }
        Ok(())
    }

    fn row(&mut self) -> Option<(Bytes, Bytes)> {
        let (key, value) = self.cursor.row()?;
        let (low, high) = &mut self.left;
        let moved = match self.direction {
            Direction::Up if key >= high.as_slice() => return None,
            Direction::Down if key < low.as_slice() => return None,
            Direction::Up => low,
            Direction::Down => high,
        };
        moved.clear();
        moved.extend_from_slice(key);
        if self.direction == Direction::Up {
            moved.push(0);
        }
        Some((Bytes::copy_from_slice(key), Bytes::copy_from_slice(value)))
    }
}

impl Iterator for Walk<'_> {
    type Item = Result<(Bytes, Bytes), Fault>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.has_ended {
            return None;
        }
        self.go_on();
        if let Err(fault) = self.go_on_if_given_up() {
            self.has_ended = true;
            return Some(Err(fault));
        }
        let row = self.row();
        self.has_ended = row.is_none();
        row.map(Ok)
    }
}

#[cfg(test)]
mod tests {
    use crate::store::engine::{Change, Rocks};

    use super::*;

    fn key(number: u64) -> Vec<u8> {
        [&b"t"[..], &number.to_be_bytes()].concat()
    }

    fn put(number: u64) -> Change {
        Change::Row(Family::Index, key(number).into(), Some(Bytes::from(number.to_string())))
    }

    fn delete(number: u64) -> Change {
        Change::Row(Family::Index, key(number).into(), None)
    }

    fn values(rows: impl Iterator<Item = Result<(Bytes, Bytes), Fault>>) -> Vec<u64> {
        rows.map(|row| std::str::from_utf8(&row.unwrap().1).unwrap().parse().unwrap()).collect()
    }

    fn range(snapshot: &RocksSnapshot, low: u64, high: u64, direction: Direction) -> Vec<u64> {
        values(snapshot.range(Family::Index, key(low), key(high), direction).unwrap())
    }

    #[test]
    fn one_iterator_serves_all_ranges_that_are_read_one_after_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let rocks = Rocks::open(dir.path(), 1 << 20).unwrap();
        rocks.write((0..100).map(put).collect::<Vec<_>>().iter(), false).unwrap();
        let snapshot = rocks.snapshot();
        for low in 0..90 {
            let (up, down): (Vec<u64>, Vec<u64>) = ((low..low + 3).collect(), (low..low + 3).rev().collect());
            assert_eq!(range(&snapshot, low, low + 3, Direction::Up), up);
            assert_eq!(range(&snapshot, low, low + 3, Direction::Down), down);
        }
        assert_eq!(rocks.iterators_made(), 1);
        // A range that is read inside another needs an iterator of its own.
        let outer = snapshot.range(Family::Index, key(0), key(50), Direction::Up).unwrap();
        assert_eq!(outer.map(|_| range(&snapshot, 7, 9, Direction::Up).len()).sum::<usize>(), 100);
        assert_eq!(rocks.iterators_made(), 2);
        // A row that is written later is not in this snapshot, and is in the next.
        rocks.write([put(1_000)].iter(), false).unwrap();
        assert_eq!(range(&snapshot, 99, 2_000, Direction::Up), [99]);
        assert_eq!(range(&rocks.snapshot(), 99, 2_000, Direction::Up), [99, 1_000]);
    }

    #[test]
    fn a_range_between_many_deleted_rows_ends_where_it_should_and_costs_no_walk_over_them() {
        let dir = tempfile::tempdir().unwrap();
        let rocks = Rocks::open(dir.path(), 1 << 20).unwrap();
        let many = 20 * SKIPPED_MAX;
        let all = 0..3 * many;
        rocks.write(all.clone().map(put).collect::<Vec<_>>().iter(), false).unwrap();
        let kept = [many, many + 1, 2 * many];
        let gone: Vec<Change> = all.filter(|number| !kept.contains(number)).map(delete).collect();
        rocks.write(gone.iter(), false).unwrap();
        let snapshot = rocks.snapshot();
        for (low, high, found) in [
            (many, many + 2, &kept[..2]),
            (many, 2 * many + 1, &kept[..]),
            (0, 3 * many, &kept[..]),
            (many + 2, 2 * many, &[]),
            (2 * many, 2 * many + 1, &kept[2..]),
        ] {
            assert_eq!(range(&snapshot, low, high, Direction::Up), found, "{low}..{high}");
            let down: Vec<u64> = found.iter().rev().copied().collect();
            assert_eq!(range(&snapshot, low, high, Direction::Down), down, "{low}..{high}, down");
        }
        let keys: Vec<Vec<u8>> =
            kept.into_iter().chain([3 * many]).flat_map(|at| [at, at + 1, at + 2].map(key)).collect();
        let found = snapshot.get_many(Family::Index, &keys).unwrap();
        assert_eq!(
            found,
            keys.iter().map(|key| snapshot.get(Family::Index, key).unwrap()).collect::<Vec<_>>()
        );
    }

    #[test]
    fn many_keys_are_found_alike_whether_they_are_near_or_far() {
        let dir = tempfile::tempdir().unwrap();
        let rocks = Rocks::open(dir.path(), 1 << 20).unwrap();
        rocks
            .write((0..2_000).filter(|number| number % 3 > 0).map(put).collect::<Vec<_>>().iter(), false)
            .unwrap();
        let snapshot = rocks.snapshot();
        for step in [1, 2, 5, 30, 400] {
            for begin in [0, 1, 1_990, 5_000] {
                let keys: Vec<Vec<u8>> = (0..40).map(|at| key(begin + at * step)).collect();
                let one_by_one: Vec<_> =
                    keys.iter().map(|key| snapshot.get(Family::Index, key).unwrap()).collect();
                assert_eq!(snapshot.get_many(Family::Index, &keys).unwrap(), one_by_one, "{begin} by {step}");
                let twice: Vec<Vec<u8>> = keys.iter().flat_map(|key| [key.clone(), key.clone()]).collect();
                assert_eq!(snapshot.get_many(Family::Index, &twice).unwrap().len(), 80);
            }
        }
    }

    #[test]
    fn only_a_range_inside_one_prefix_uses_the_filter() {
        let prefix = [7_u8; STATE_PREFIX_BYTES];
        let longer = [&prefix[..], &[3]].concat();
        assert!(stays_in_prefix(&longer, &after_prefix(&prefix)));
        assert!(stays_in_prefix(&prefix, &longer));
        assert!(!stays_in_prefix(&prefix[..12], &longer));
        assert!(!stays_in_prefix(&longer, &[&after_prefix(&prefix)[..], &[0]].concat()));
    }
}
