//! Side states: the state of a fork, as a small difference to the main line or to another side state.
//!
//! Up to [`FLAT_ENTRIES_MAX`] entries a side state stands on the main line; above, it stands on the side state it was
//! made from, and is merged with it once it outgrows half of it. So a fork of n changes costs O(n log n) entries, and a
//! lookup needs few searches. Very large ones are not merged, because a row has a bound ([`ENTRIES_MAX`]): they stand
//! on one another.

use std::collections::BTreeMap;

use super::{at_many, canonical};
use crate::{
    ids::{Order, RoomNum, SideNum, StateKeyNum},
    schema::{
        self,
        state::{SideRow, StateRef, StateValue},
    },
    store::{Batch, Direction, Fault, Read},
};

/// Up to this many entries a side state is a difference from the main line. Tests use a small bound to get layers in
/// small rooms.
pub(crate) const FLAT_ENTRIES_MAX: usize = if cfg!(test) { 4 } else { 32 };
/// Merge side states rather than let more than this many stand on one another.
const DEPTH_WANTED: u8 = 6;
/// A side state has at most this many entries, so that a batch has space for several. A state that differs in more keys
/// stands on others of this size.
pub const ENTRIES_MAX: usize = 25_000;
/// At most this many side states stand on one another, so a fork differs in at most this many times [`ENTRIES_MAX`]
/// keys.
pub(crate) const DEPTH_MAX: u8 = 96;

/// Gives the row of a side state that something refers to, so that it must be there.
pub(crate) fn require_side(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    side: SideNum,
) -> Result<SideRow, Fault> {
    schema::SIDE.get(read, (room, side))?.ok_or(Fault::Corrupt("a side state is missing"))
}

/// The state on which a side state stands, and the keys that it sets.
pub type SideParts = (StateRef, Vec<(StateKeyNum, StateValue)>);

/// Gives the parts of a side state; `None` if it is not there.
pub fn side_parts(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    side: SideNum,
) -> Result<Option<SideParts>, Fault> {
    let row = schema::SIDE.get(read, (room, side))?;
    Ok(row.map(|row| (row.base, row.iter().collect())))
}

/// Lists the numbers of a room's side states, rising.
pub fn list_sides<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
) -> Result<impl Iterator<Item = Result<SideNum, Fault>> + 'r, Fault> {
    let rows = schema::SIDE.prefix::<(RoomNum,)>(read, (room,), Direction::Up)?;
    Ok(rows.map(|row| row.map(|((_, side), _)| side)))
}

/// Deletes a side state, which nothing names any more.
pub fn forget_side(batch: &mut Batch, room: RoomNum, side: SideNum) {
    schema::SIDE.delete(batch, (room, side));
}

/// A side state, with those that it stands on.
pub(crate) struct Chain {
    /// The place on the main line on which the lowest side state stands.
    pub(crate) base: Order,
    /// The rows from the given state down to the one on the main line; empty when the state is on the main line itself.
    pub(crate) rows: Vec<(SideNum, SideRow)>,
}

impl Chain {
    /// Reads the side states that a state consists of.
    pub(crate) fn read(read: &(impl Read + ?Sized), room: RoomNum, state: StateRef) -> Result<Self, Fault> {
        let (mut below, mut rows) = (state, Vec::new());
        loop {
            let side = match below {
                StateRef::Main(base) => return Ok(Self { base, rows }),
                StateRef::Side(side) => side,
            };
            let row = require_side(read, room, side)?;
            below = row.base;
            rows.push((side, row));
            if rows.len() > usize::from(DEPTH_MAX) {
                return Err(Fault::Corrupt("a side state is too deep"));
            }
        }
    }

    /// Finds the value that the side states set the key to; `None` where the main line decides.
    pub(crate) fn find(&self, key: StateKeyNum) -> Option<StateValue> {
        self.rows.iter().find_map(|(_, row)| row.find(key))
    }

    /// Collects all entries of the side states, which lie over the main line.
    pub(crate) fn entries(&self) -> BTreeMap<StateKeyNum, StateValue> {
        self.rows.iter().rev().flat_map(|(_, row)| row.iter()).collect()
    }
}

/// Makes the state that differs from `base` in these keys (the last one counts where a key comes twice). The result is
/// `base` itself where nothing differs, and the base's place on the main line where it differs from that no longer;
/// otherwise it is a side state. `next_side` is the room's counter, which the caller keeps in the room's row.
pub fn make_side(
    batch: &mut Batch,
    room: RoomNum,
    next_side: &mut u32,
    base: StateRef,
    changes: &[(StateKeyNum, StateValue)],
) -> Result<StateRef, Fault> {
    let base = canonical(batch, room, base)?;
    let mut changed = BTreeMap::new();
    for (key, val) in changes {
        changed.insert(*key, *val);
    }
    let differing = without_equal(batch, room, base, changed)?;
    if differing.is_empty() {
        return Ok(base);
    }
    let chain = Chain::read(batch, room, base)?;
    let Some((main, depth, entries)) = layer(batch, room, &chain, base, differing)? else {
        return Ok(StateRef::Main(chain.base));
    };
    let side = SideNum(*next_side);
    *next_side = next_side.checked_add(1).ok_or(Fault::Corrupt("a room has too many side states"))?;
    schema::SIDE.put(batch, (room, side), &SideRow::new(main, depth, entries));
    Ok(StateRef::Side(side))
}

/// A side state before it is written: its base, its depth, and its entries.
type Layer = (StateRef, u8, BTreeMap<StateKeyNum, StateValue>);

/// Gives the side state that is to be written; `None` when it is the same as its place on the main line.
fn layer(
    batch: &Batch,
    room: RoomNum,
    chain: &Chain,
    base: StateRef,
    entries: BTreeMap<StateKeyNum, StateValue>,
) -> Result<Option<Layer>, Fault> {
    let held: usize = chain.rows.iter().map(|(_, row)| row.key_count()).sum();
    let is_flat = held + entries.len() <= FLAT_ENTRIES_MAX;
    let (mut entries, mut stands_on) = (entries, base);
    let mut depth = u8::try_from(chain.rows.len()).unwrap_or(DEPTH_MAX);
    for (_, row) in &chain.rows {
        let is_small = depth < DEPTH_WANTED && entries.len() <= row.key_count() / 2;
        let is_too_large = depth < DEPTH_MAX && entries.len() + row.key_count() > ENTRIES_MAX;
        if !is_flat && (is_small || is_too_large) {
            break;
        }
        for (key, val) in row.iter() {
            entries.entry(key).or_insert(val);
        }
        stands_on = row.base;
        depth -= 1;
    }
    if matches!(stands_on, StateRef::Main(_)) {
        entries = without_equal(batch, room, stands_on, entries)?;
        if entries.is_empty() {
            return Ok(None);
        }
    }
    Ok(Some((stands_on, depth + 1, entries)))
}

/// Gives those entries whose value is another one in this state.
fn without_equal(
    batch: &Batch,
    room: RoomNum,
    state: StateRef,
    mut entries: BTreeMap<StateKeyNum, StateValue>,
) -> Result<BTreeMap<StateKeyNum, StateValue>, Fault> {
    let keys: Vec<StateKeyNum> = entries.keys().copied().collect();
    for (key, held) in keys.iter().zip(at_many(batch, room, state, &keys)?) {
        if entries.get(key) == Some(&held) {
            entries.remove(key);
        }
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ids::EventNum, rooms::state::tests::Bench, store::Guard};

    #[test]
    fn a_fork_of_n_changes_costs_n_log_n_entries_and_stays_shallow() {
        let bench = Bench::new();
        let mut batch = bench.store.batch(&Guard::alone());
        let (mut next, mut state, mut model) = (0, StateRef::EMPTY, BTreeMap::new());
        let (mut written, n) = (0, 3_000_u32);
        for number in 0..n {
            let (key, val) = (StateKeyNum(number % 2_000), StateValue::Event(EventNum(number.into())));
            state = make_side(&mut batch, bench.room, &mut next, state, &[(key, val)]).unwrap();
            model.insert(key, val);
            let StateRef::Side(side) = state else { panic!("{state:?}") };
            written += require_side(&batch, bench.room, side).unwrap().key_count();
        }
        let chain = Chain::read(&batch, bench.room, state).unwrap();
        assert!(chain.rows.len() <= usize::from(DEPTH_WANTED));
        assert_eq!(chain.entries(), model);
        // Flat copies would take n²/2 = 4,500,000 entries.
        assert!(written < 60 * n as usize, "{written}");
        assert_eq!(chain.base, Order::MIN);
    }

    #[test]
    fn a_state_larger_than_a_row_stands_on_rows_of_bounded_size() {
        let bench = Bench::new();
        let (mut next, mut state) = (0, StateRef::EMPTY);
        let changes: Vec<_> = (0..2 * ENTRIES_MAX as u32 + 7)
            .map(|key| (StateKeyNum(key), StateValue::Event(EventNum(key.into()))))
            .collect();
        for part in changes.chunks(ENTRIES_MAX) {
            state = bench.write(|batch| make_side(batch, bench.room, &mut next, state, part).unwrap());
        }
        // A small change can still stand on such a state.
        for number in 0..40 {
            let change = [(StateKeyNum(number), StateValue::Event(EventNum(1)))];
            state = bench.write(|batch| make_side(batch, bench.room, &mut next, state, &change).unwrap());
        }
        let snapshot = bench.store.snapshot();
        let chain = Chain::read(&*snapshot, bench.room, state).unwrap();
        assert!(chain.rows.iter().all(|(_, row)| row.key_count() <= ENTRIES_MAX));
        assert_eq!(chain.entries().len(), changes.len());
        assert_eq!(chain.find(StateKeyNum(3)), Some(StateValue::Event(EventNum(1))));
        let last = 2 * ENTRIES_MAX as u32 + 3;
        assert_eq!(chain.find(StateKeyNum(last)), Some(StateValue::Event(EventNum(last.into()))));
    }

    #[test]
    fn a_side_state_that_returns_to_its_base_is_its_base() {
        let bench = Bench::new();
        let mut batch = bench.store.batch(&Guard::alone());
        let (key, mut next) = (StateKeyNum(1), 0);
        let set = [(key, StateValue::Event(EventNum(5)))];
        let side = make_side(&mut batch, bench.room, &mut next, StateRef::EMPTY, &set).unwrap();
        assert_eq!(side, StateRef::Side(SideNum(0)));
        assert_eq!(make_side(&mut batch, bench.room, &mut next, side, &set).unwrap(), side);
        assert_eq!(
            make_side(&mut batch, bench.room, &mut next, side, &[(key, StateValue::Absent)]).unwrap(),
            StateRef::EMPTY
        );
        assert_eq!(next, 1);
    }
}
