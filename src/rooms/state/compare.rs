//! The difference of two states: the keys that the log of changes names between them, looked up at both; or, where
//! there were more changes than there are keys, both states in full side by side.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
};

use super::{
    changes,
    full::{FEW_CHANGES, Values, changes_between, key_count, values},
    list_current, list_now, many_on_main_line,
    side::Chain,
};
use crate::{
    ids::{EventNum, Order, RoomNum, StateKeyNum},
    schema::state::{SideRow, StateRef, StateValue},
    store::{Fault, Read},
};

/// Above this many changes for each key of the room, reading both states in full is cheaper.
const CHANGES_PER_KEY_MAX: u64 = 2;

/// A key with its values in two states.
pub type Difference = (StateKeyNum, StateValue, StateValue);

/// Whether two values make a difference. Derived values do not: they follow from the others, and are worked out anew
/// where those change.
fn differ(one: StateValue, other: StateValue) -> bool {
    one != other && !one.is_derived() && !other.is_derived()
}

/// Lists the keys whose values differ in two states, rising, with both values; derived keys are left out. Costs as much
/// as there are changes between the states, and at most as much as the room has keys.
pub fn diff(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    a: StateRef,
    b: StateRef,
) -> Result<Vec<Difference>, Fault> {
    if a == b {
        return Ok(Vec::new());
    }
    let (left, right) = (Chain::read(read, room, a)?, Chain::read(read, room, b)?);
    let (low, high) = (left.base.min(right.base), left.base.max(right.base));
    let Some(Between { below, is_high_tip }) = Between::read(read, room, low, high)? else {
        return merge(values(read, room, a)?, values(read, room, b)?);
    };
    let mut keys: BTreeSet<StateKeyNum> = below.keys().copied().collect();
    for row in unshared(&left, &right) {
        keys.extend(row.iter().map(|(key, _)| key));
    }
    let keys: Vec<StateKeyNum> = keys.into_iter().collect();
    let at_high = if is_high_tip {
        list_now(read, room, keys.iter().copied())?
    } else {
        many_on_main_line(read, room, high, &keys)?
    };
    let mut differing = Vec::new();
    for (key, at_high) in keys.into_iter().zip(at_high) {
        // A key that did not change between the two places has the same value at both.
        let on_main = |order: Order| match below.get(&key) {
            Some(at_low) if order == low => *at_low,
            _ => at_high,
        };
        let in_left = left.find(key).unwrap_or_else(|| on_main(left.base));
        let in_right = right.find(key).unwrap_or_else(|| on_main(right.base));
        if differ(in_left, in_right) {
            differing.push((key, in_left, in_right));
        }
    }
    Ok(differing)
}

/// Tells how many keys may differ at most, without looking at any: the changes between the two places on the main line
/// and the entries of the side states. It is a hint, because changes that filled holes are not counted.
pub fn distance(read: &(impl Read + ?Sized), room: RoomNum, a: StateRef, b: StateRef) -> Result<u64, Fault> {
    let (left, right) = (Chain::read(read, room, a)?, Chain::read(read, room, b)?);
    let entries: usize = unshared(&left, &right).map(SideRow::key_count).sum();
    let (low, high) = (left.base.min(right.base), left.base.max(right.base));
    Ok(changes_between(read, room, low, high)?.saturating_add(entries as u64))
}

/// Lists the side states that only one of the two consists of, because a side state below both makes no difference by
/// itself.
fn unshared<'c>(left: &'c Chain, right: &'c Chain) -> impl Iterator<Item = &'c SideRow> {
    let is_in = |chain: &Chain, side| chain.rows.iter().any(|(other, _)| *other == side);
    let own_left = left.rows.iter().take_while(move |(side, _)| !is_in(right, *side));
    let own_right = right.rows.iter().take_while(move |(side, _)| !is_in(left, *side));
    own_left.chain(own_right).map(|(_, row)| row)
}

/// The changes between two places on the main line.
#[derive(Default)]
struct Between {
    /// The keys that changed in `(low, high]`, each with its value at `low`.
    below: BTreeMap<StateKeyNum, StateValue>,
    /// Whether nothing changed above `high`. It may be `false` although `high` is the tip.
    is_high_tip: bool,
}

impl Between {
    /// Reads the changes in one walk over the log; `None` when reading both states in full is cheaper.
    fn read(
        read: &(impl Read + ?Sized),
        room: RoomNum,
        low: Order,
        high: Order,
    ) -> Result<Option<Self>, Fault> {
        let mut between = Self::default();
        if low == high {
            return Ok(Some(between));
        }
        between.is_high_tip = true;
        // A few changes are read in any room; only for more is it asked how many they may be.
        let (mut seen, mut seen_max) = (0_u64, FEW_CHANGES);
        let mut is_asked = false;
        for row in changes(read, room, low, Order::MAX)? {
            let (order, changed) = row?;
            if order > high {
                between.is_high_tip = false;
                break;
            }
            seen += changed.len() as u64;
            for (key, prior) in changed {
                between.below.entry(key).or_insert(prior);
            }
            if seen > seen_max && !is_asked {
                let changes_max = CHANGES_PER_KEY_MAX.saturating_mul(key_count(read, room)?).max(FEW_CHANGES);
                if changes_between(read, room, low, high)? > changes_max {
                    return Ok(None);
                }
                (seen_max, is_asked) = (changes_max.saturating_mul(2), true);
            }
            // Changes that filled holes are not in the running count, so the walk may find more than it said.
            if seen > seen_max && is_asked {
                return Ok(None);
            }
        }
        Ok(Some(between))
    }
}

/// Lists the keys in which a whole state that is brought to the room differs from the current one, rising, with both
/// values; derived keys are left out. Holds the differences in memory, and of the current state nothing else.
pub fn differing_from_current(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    brought: &BTreeMap<StateKeyNum, EventNum>,
) -> Result<Vec<Difference>, Fault> {
    let current =
        list_current(read, room)?.map(|row| row.map(|(key, event)| (key, StateValue::Event(event))));
    let brought = brought.iter().map(|(key, event)| Ok((*key, StateValue::Event(*event))));
    merge(Box::new(current), Box::new(brought))
}

/// Lists the keys in which a whole state that is brought to the room differs from this one, like
/// [`differing_from_current`]. Reads the whole state.
pub fn differing_from(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    state: StateRef,
    brought: &BTreeMap<StateKeyNum, EventNum>,
) -> Result<Vec<Difference>, Fault> {
    let brought = brought.iter().map(|(key, event)| Ok((*key, StateValue::Event(*event))));
    merge(values(read, room, state)?, Box::new(brought))
}

/// Compares two full states, read side by side.
fn merge(left: Values<'_>, right: Values<'_>) -> Result<Vec<Difference>, Fault> {
    let (mut left, mut right) = (left.peekable(), right.peekable());
    let mut differing = Vec::new();
    loop {
        let order = match (left.peek(), right.peek()) {
            (None, None) => return Ok(differing),
            (Some(Err(fault)), _) | (_, Some(Err(fault))) => return Err(fault.clone()),
            (Some(Ok(_)), None) => Ordering::Less,
            (None, Some(Ok(_))) => Ordering::Greater,
            (Some(Ok((x, _))), Some(Ok((y, _)))) => x.cmp(y),
        };
        let x = if order.is_le() { left.next().transpose()? } else { None };
        let y = if order.is_ge() { right.next().transpose()? } else { None };
        let Some(key) = x.or(y).map(|(key, _)| key) else { return Ok(differing) };
        let (x, y) =
            (x.map_or(StateValue::Absent, |(_, val)| val), y.map_or(StateValue::Absent, |(_, val)| val));
        if differ(x, y) {
            differing.push((key, x, y));
        }
    }
}
