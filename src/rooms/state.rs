//! The state of a room, at any point of its history.
//!
//! The *main line* is the history of the current state as we told it to readers. `state_now` holds the current value
//! of each key, `state_undo` the value before each change at its order, `state_log` the keys that changed at an
//! order. The state at `v` for one key is the value before the first change above `v`, or the current one: nothing is
//! ever copied. The state of a fork is a *side state*: a difference to a place on the main line (`side.rs`).
//!
//! A step that is larger than a batch is *staged* (`stage.rs`): its parts are written at an order that is reserved above
//! everything given out, and count from its last batch on.
//!
//! Invariants:
//! 1. The main line at `v` is all changes with an order of at most `v`; `state_now` is the main line at the tip.
//! 2. References are canonical: a place on the main line is rounded down to the last row of `state_log`
//!    ([`canonical`]), an empty side state is its base. Markers (empty rows) keep rounding from crossing a hole.
//! 3. `state_undo(key, order)` exists exactly where `state_log(order)` names `key`.
//! 4. Only the holder of the room's lock writes here.

pub(in crate::rooms) mod check;
mod compare;
mod full;
mod hole;
mod late;
mod learn;
#[cfg(test)]
mod model;
mod purge;
mod side;
mod sketch;
pub mod stage;
#[cfg(test)]
pub(crate) mod tests;

use std::{collections::BTreeMap, ops::Bound};

pub use crate::schema::state::{StateRef, StateValue};
pub use compare::{Difference, diff, differing_from, differing_from_current, distance};
pub use full::full;
pub use hole::{Fill, Segment, find_hole, find_hole_above, hole_state, open_hole};
pub use late::{has_changed_above, set_from};
pub(crate) use learn::{Learned, learn, learn_before, set_since};
pub use purge::Purge;
pub(crate) use side::Chain;
pub use side::{ENTRIES_MAX as SIDE_ENTRIES_MAX, SideParts, forget_side, list_sides, make_side, side_parts};
pub use sketch::Sketch;

use crate::{
    ids::{EventNum, Order, RoomNum, StateKeyNum},
    schema::{
        self,
        state::{LogRow, NowRow, StateKeyRow},
    },
    store::{Batch, Direction, Fault, Read},
};

/// To look at several keys, walk back at most this many steps, or as many as there are keys; beyond that, seek each
/// key. Tests use a small bound to reach it in small rooms.
const STEPS_WALKED: usize = if cfg!(test) { 2 } else { 16 };

/// Finds the number of a state key, if the room ever used it.
pub fn find_key(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    event_type: &str,
    state_key: &str,
) -> Result<Option<StateKeyNum>, Fault> {
    schema::STATE_KEY_NUM.get(read, (room, event_type, state_key))
}

/// Finds the numbers of several state keys of one event type; `None` for those that the room never used.
pub fn find_keys<'k>(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    event_type: &'k str,
    state_keys: impl IntoIterator<Item = &'k str>,
) -> Result<Vec<Option<StateKeyNum>>, Fault> {
    schema::STATE_KEY_NUM.get_many(read, state_keys.into_iter().map(|key| (room, event_type, key)))
}

/// Finds the event type and state key behind a number.
pub fn key_name(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    key: StateKeyNum,
) -> Result<Option<(String, String)>, Fault> {
    let row = schema::STATE_KEY.get(read, (room, key))?;
    Ok(row.map(|row| (row.event_type, row.state_key)))
}

/// Lists the event types and state keys behind numbers, in their order.
pub fn list_key_names(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    keys: impl IntoIterator<Item = StateKeyNum>,
) -> Result<Vec<Option<(String, String)>>, Fault> {
    let rows = schema::STATE_KEY.get_many(read, keys.into_iter().map(|key| (room, key)))?;
    Ok(rows.into_iter().map(|row| row.map(|row| (row.event_type, row.state_key))).collect())
}

/// Gives the number of a state key, which gets one if it is new. `next_key` is the room's counter, which the caller
/// keeps in the room's row.
pub fn intern_key(
    batch: &mut Batch,
    room: RoomNum,
    next_key: &mut u32,
    event_type: &str,
    state_key: &str,
) -> Result<StateKeyNum, Fault> {
    if let Some(key) = find_key(batch, room, event_type, state_key)? {
        return Ok(key);
    }
    let key = StateKeyNum(*next_key);
    *next_key = next_key.checked_add(1).ok_or(Fault::Corrupt("a room has too many state keys"))?;
    schema::STATE_KEY_NUM.put(batch, (room, event_type, state_key), &key);
    let row = StateKeyRow { event_type: event_type.to_owned(), state_key: state_key.to_owned() };
    schema::STATE_KEY.put(batch, (room, key), &row);
    Ok(key)
}

/// Lists the numbers of a room's state keys with their types, rising.
pub fn list_keys<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
) -> Result<impl Iterator<Item = Result<(StateKeyNum, String), Fault>> + 'r, Fault> {
    let rows = schema::STATE_KEY.prefix::<(RoomNum,)>(read, (room,), Direction::Up)?;
    Ok(rows.map(|row| row.map(|((_, key), row)| (key, row.event_type))))
}

/// Lists the numbers of a room's state keys of one event type, by rising state key; at most `max`.
pub fn list_keys_of(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    event_type: &str,
    max: usize,
) -> Result<Vec<StateKeyNum>, Fault> {
    let bound = Bound::Included((room, event_type));
    let rows = schema::STATE_KEY_NUM.range::<(RoomNum, String)>(read, bound, bound, Direction::Up)?;
    rows.take(max).map(|row| row.map(|(_, key)| key)).collect()
}

/// Deletes a state key, which nothing names any more. Its number is not given again.
pub fn forget_key(batch: &mut Batch, room: RoomNum, key: StateKeyNum) -> Result<(), Fault> {
    debug_assert!(schema::STATE_NOW.get(batch, (room, key))?.is_none(), "a key that is set is named");
    if let Some(row) = schema::STATE_KEY.get(batch, (room, key))? {
        schema::STATE_KEY.delete(batch, (room, key));
        schema::STATE_KEY_NUM.delete(batch, (room, &row.event_type, &row.state_key));
    }
    Ok(())
}

/// Finds the current event of a key; `None` where the key is unset or unknown.
pub fn current(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    key: StateKeyNum,
) -> Result<Option<EventNum>, Fault> {
    Ok(now(read, room, key)?.event())
}

/// Gives the current value of a key.
pub fn now(read: &(impl Read + ?Sized), room: RoomNum, key: StateKeyNum) -> Result<StateValue, Fault> {
    let row = schema::STATE_NOW.get(read, (room, key))?;
    row.map_or(Ok(StateValue::Absent), |row| stage::counted(read, room, key, row))
}

/// The order at which a key was changed last on the main line, and what it was before; `None` where that never changed or is not known.
pub fn last_change_of(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    key: StateKeyNum,
) -> Result<Option<(Order, StateValue)>, Fault> {
    let mut rows = schema::STATE_UNDO.prefix::<(RoomNum, StateKeyNum)>(read, (room, key), Direction::Down)?;
    Ok(rows.next().transpose()?.map(|((.., order), prior)| (order, prior)))
}

/// Lists the current state, by rising key numbers, in one dense scan.
pub fn list_current<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
) -> Result<impl Iterator<Item = Result<(StateKeyNum, EventNum), Fault>> + 'r, Fault> {
    let rows = schema::STATE_NOW.prefix::<(RoomNum,)>(read, (room,), Direction::Up)?;
    let counted = move |row: Result<((RoomNum, StateKeyNum), NowRow), Fault>| {
        let ((_, key), row) = row?;
        Ok((key, stage::counted(read, room, key, row)?.event()))
    };
    Ok(rows.map(counted).filter_map(|row| match row {
        Ok((key, event)) => event.map(|event| Ok((key, event))),
        Err(fault) => Some(Err(fault)),
    }))
}

/// Gives the value of a key in a state.
pub fn at(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    state: StateRef,
    key: StateKeyNum,
) -> Result<StateValue, Fault> {
    let mut state = state;
    loop {
        match state {
            StateRef::Main(order) => return on_main_line(read, room, order, key),
            StateRef::Side(side) => {
                let row = side::require_side(read, room, side)?;
                if let Some(val) = row.find(key) {
                    return Ok(val);
                }
                state = row.base;
            }
        }
    }
}

/// Gives the values of several keys in a state, in the order of the keys, by one read of the current values and of the
/// changes since then, where those are few.
pub fn list_at(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    state: StateRef,
    keys: &[StateKeyNum],
) -> Result<Vec<StateValue>, Fault> {
    let one_by_one = || keys.iter().map(|key| at(read, room, state, *key)).collect();
    let StateRef::Main(order) = state else { return one_by_one() };
    let mut since = BTreeMap::new();
    for (seen, step) in changes(read, room, order, Order::MAX)?.enumerate() {
        if seen >= keys.len().max(STEPS_WALKED) {
            return one_by_one();
        }
        for (key, prior) in step?.1 {
            since.entry(key).or_insert(prior);
        }
    }
    let values = keys.iter().zip(list_now(read, room, keys.iter().copied())?);
    Ok(values.map(|(key, now)| since.get(key).copied().unwrap_or(now)).collect())
}

fn on_main_line(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    order: Order,
    key: StateKeyNum,
) -> Result<StateValue, Fault> {
    let low = Bound::Excluded((room, key, order));
    let high = Bound::Included((room, key, Order::MAX));
    let mut undo =
        schema::STATE_UNDO.range::<(RoomNum, StateKeyNum, Order)>(read, low, high, Direction::Up)?;
    match undo.next() {
        Some(row) => Ok(row?.1),
        None => now(read, room, key),
    }
}

/// Gives the values of rising keys in a state, for less than one [`at`] after the other would cost.
pub fn at_many(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    state: StateRef,
    keys: &[StateKeyNum],
) -> Result<Vec<StateValue>, Fault> {
    let chain = side::Chain::read(read, room, state)?;
    let set: Vec<Option<StateValue>> = keys.iter().map(|key| chain.find(*key)).collect();
    let open: Vec<StateKeyNum> =
        keys.iter().zip(&set).filter(|(_, set)| set.is_none()).map(|(key, _)| *key).collect();
    let mut below = many_on_main_line(read, room, chain.base, &open)?.into_iter();
    Ok(set.into_iter().map(|set| set.or_else(|| below.next()).unwrap_or(StateValue::Absent)).collect())
}

fn many_on_main_line(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    order: Order,
    keys: &[StateKeyNum],
) -> Result<Vec<StateValue>, Fault> {
    let ranges = keys
        .iter()
        .map(|key| (Bound::Excluded((room, *key, order)), Bound::Included((room, *key, Order::MAX))));
    let undo = schema::STATE_UNDO.first_of_many::<(RoomNum, StateKeyNum, Order)>(read, ranges)?;
    // A key without a later change has its current value.
    let unchanged = keys.iter().zip(&undo).filter(|(_, row)| row.is_none()).map(|(key, _)| *key);
    let mut now = list_now(read, room, unchanged)?.into_iter();
    let value = |row: Option<(_, StateValue)>| row.map(|(_, val)| val).or_else(|| now.next());
    Ok(undo.into_iter().map(value).map(|val| val.unwrap_or(StateValue::Absent)).collect())
}

/// Lists the current values of several keys, in their order.
pub fn list_now(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    keys: impl IntoIterator<Item = StateKeyNum>,
) -> Result<Vec<StateValue>, Fault> {
    let keys: Vec<StateKeyNum> = keys.into_iter().collect();
    let rows = schema::STATE_NOW.get_many(read, keys.iter().map(|key| (room, *key)))?;
    let counted = |(key, row): (&StateKeyNum, Option<NowRow>)| {
        row.map_or(Ok(StateValue::Absent), |row| stage::counted(read, room, *key, row))
    };
    keys.iter().zip(rows).map(counted).collect()
}

/// The changes at one order: each key that changed, with its value before.
pub type Step = (Order, Vec<(StateKeyNum, StateValue)>);

/// Lists the changes of the main line in `(after, upto]`, by rising order: each key with its value before. Holes that
/// were filled, and markers without changes, are among them.
pub fn changes<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
    after: Order,
    upto: Order,
) -> Result<impl Iterator<Item = Result<Step, Fault>> + 'r, Fault> {
    // Where `after` is not below `upto`, the range is empty.
    let low = Bound::Excluded((room, after));
    let high = Bound::Included((room, upto));
    let rows = schema::STATE_LOG.range::<(RoomNum, Order)>(read, low, high, Direction::Up)?;
    Ok(rows.map(|row| row.map(|((_, order), row)| (order, row.changes))))
}

/// Finds the last row of `state_log` at or below an order.
pub(crate) fn last_change(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    upto: Bound<Order>,
) -> Result<Option<(Order, LogRow)>, Fault> {
    let low = Bound::Included((room, Order::MIN));
    let high = match upto {
        Bound::Included(order) => Bound::Included((room, order)),
        Bound::Excluded(order) => Bound::Excluded((room, order)),
        Bound::Unbounded => Bound::Included((room, Order::MAX)),
    };
    let mut rows = schema::STATE_LOG.range::<(RoomNum, Order)>(read, low, high, Direction::Down)?;
    Ok(rows.next().transpose()?.map(|((_, order), row)| (order, row)))
}

/// Gives the reference that all references to this state share: a place on the main line is rounded down to the last
/// change at or below it, so that equal places are equal bytes.
pub fn canonical(read: &(impl Read + ?Sized), room: RoomNum, state: StateRef) -> Result<StateRef, Fault> {
    match state {
        StateRef::Main(order) => rounded(read, room, Bound::Included(order)),
        StateRef::Side(_) => Ok(state),
    }
}

/// Gives the main line just below an order, which is the state before the event that stands there.
pub fn just_below(read: &(impl Read + ?Sized), room: RoomNum, order: Order) -> Result<StateRef, Fault> {
    rounded(read, room, Bound::Excluded(order))
}

/// Gives the main line at its tip: the current state, also while a batch adds to it. The rows of a staged step do not
/// count before it is finished.
pub fn tip(read: &(impl Read + ?Sized), room: RoomNum) -> Result<StateRef, Fault> {
    match stage::find(read, room)?.and_then(|stage| stage.anchor) {
        Some(anchor) => just_below(read, room, Order { anchor, minor: i32::MIN }),
        None => rounded(read, room, Bound::Unbounded),
    }
}

fn rounded(read: &(impl Read + ?Sized), room: RoomNum, upto: Bound<Order>) -> Result<StateRef, Fault> {
    Ok(last_change(read, room, upto)?.map_or(StateRef::EMPTY, |(order, _)| StateRef::Main(order)))
}

/// Changes the current state at `order`, which is at or above everything the room has: one step of the main line. Takes
/// each key with its new value. Values that stay the same are left out, and a step without changes leaves no trace.
/// Several steps at one order add up.
pub fn apply(
    batch: &mut Batch,
    room: RoomNum,
    order: Order,
    changes: &[(StateKeyNum, StateValue)],
) -> Result<(), Fault> {
    let (mut priors, mut counted) = (BTreeMap::new(), 0);
    for (key, new) in changes {
        let prior = now(batch, room, *key)?;
        if prior == *new {
            continue;
        }
        if schema::STATE_UNDO.get(batch, (room, *key, order))?.is_none() {
            schema::STATE_UNDO.put(batch, (room, *key, order), &prior);
            priors.insert(*key, prior);
            counted += u64::from(!prior.is_derived() && !new.is_derived());
        }
        put_now(batch, room, *key, *new);
    }
    log_changes(batch, room, order, priors, counted)
}

/// Sets the current value of a derived key whose past does not follow it.
pub(crate) fn put_current(batch: &mut Batch, room: RoomNum, key: StateKeyNum, val: StateValue) {
    put_now(batch, room, key, val);
}

fn put_now(batch: &mut Batch, room: RoomNum, key: StateKeyNum, val: StateValue) {
    if val == StateValue::Absent {
        schema::STATE_NOW.delete(batch, (room, key));
    } else {
        schema::STATE_NOW.put(batch, (room, key), &val.into());
    }
}

/// Adds to the row of `state_log` at an order; nothing happens without changes. `counted` of the changes are not
/// derived from others: only those tell how far apart two states are.
fn log_changes(
    batch: &mut Batch,
    room: RoomNum,
    order: Order,
    mut priors: BTreeMap<StateKeyNum, StateValue>,
    counted: u64,
) -> Result<(), Fault> {
    if priors.is_empty() {
        return Ok(());
    }
    let last = last_change(batch, room, Bound::Included(order))?;
    let mut count = counted;
    if let Some((at, row)) = last {
        debug_assert!(at <= order, "the last change at or below an order is not above it");
        count += row.count;
        if at == order {
            priors.extend(row.changes);
        }
    }
    debug_assert!(
        are_undone(batch, room, order, &priors)?,
        "the log names a key at {order:?} exactly where the value before is kept"
    );
    schema::STATE_LOG.put(batch, (room, order), &LogRow { count, changes: priors.into_iter().collect() });
    Ok(())
}

/// Whether the values before the changes of an order are kept, each as the log names it.
fn are_undone(
    batch: &Batch,
    room: RoomNum,
    order: Order,
    priors: &BTreeMap<StateKeyNum, StateValue>,
) -> Result<bool, Fault> {
    let kept = schema::STATE_UNDO.get_many(batch, priors.keys().map(|key| (room, *key, order)))?;
    Ok(priors.values().zip(kept).all(|(prior, kept)| kept == Some(*prior)))
}

/// Writes an empty row of `state_log`, so that references at or above `order` are never rounded down past it.
pub fn mark(batch: &mut Batch, room: RoomNum, order: Order) -> Result<(), Fault> {
    let count = match last_change(batch, room, Bound::Included(order))? {
        Some((at, _)) if at == order => return Ok(()),
        Some((_, row)) => row.count,
        None => 0,
    };
    schema::STATE_LOG.put(batch, (room, order), &LogRow { count, changes: Vec::new() });
    Ok(())
}
