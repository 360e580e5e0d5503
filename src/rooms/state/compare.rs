//! The difference of two states: what the log of changes names between them, looked up at both; or, where more
//! changed than there is, both states in full side by side.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
};

use super::{
    at, canonical, changes,
    full::{FEW_CHANGES, Values, changes_between, key_count, values},
    side::Chain,
    tip,
};
use crate::{
    ids::{Order, RoomNum, StateKeyNum},
    store::{
        Fault, Read,
        schema::{
            self,
            state::{Ref, SideRow, Val},
        },
    },
};

/// Above this many changes for each key of the room, both states are read in full.
const CHANGES_PER_KEY_MAX: u64 = 2;

/// A key with its values in two states.
pub type Difference = (StateKeyNum, Val, Val);

/// The keys whose values differ in two states, rising, with both values. Costs O(changes between them), at most
/// O(keys of the room).
pub fn diff(read: &(impl Read + ?Sized), room: RoomNum, a: Ref, b: Ref) -> Result<Vec<Difference>, Fault> {
    let (a, b) = (canonical(read, room, a)?, canonical(read, room, b)?);
    if a == b {
        return Ok(Vec::new());
    }
    let (left, right) = (Chain::read(read, room, a)?, Chain::read(read, room, b)?);
    let (Ref::Main(left_order), Ref::Main(right_order)) = (left.base, right.base) else {
        return Err(Fault::Corrupt("a side state does not stand on the main line"));
    };
    let (low, high) = (left_order.min(right_order), left_order.max(right_order));
    let Some(below) = values_below(read, room, low, high)? else {
        return merge(values(read, room, a)?, values(read, room, b)?);
    };
    let mut keys: BTreeSet<StateKeyNum> = below.keys().copied().collect();
    for row in unshared(&left, &right) {
        keys.extend(row.iter().map(|(key, _)| key));
    }
    let at_high = values_at(read, room, high, &keys)?;
    let mut differing = Vec::new();
    for (key, at_high) in keys.into_iter().zip(at_high) {
        // What did not change between the two places is the same at both.
        let on_main = |order: Order| match below.get(&key) {
            Some(at_low) if order == low => *at_low,
            _ => at_high,
        };
        let in_left = left.find(key).unwrap_or_else(|| on_main(left_order));
        let in_right = right.find(key).unwrap_or_else(|| on_main(right_order));
        if in_left != in_right {
            differing.push((key, in_left, in_right));
        }
    }
    Ok(differing)
}

/// The values of keys on the main line at `order`; in one read where that is its tip.
fn values_at(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    order: Order,
    keys: &BTreeSet<StateKeyNum>,
) -> Result<Vec<Val>, Fault> {
    if tip(read, room)? == Ref::Main(order) {
        let rows = schema::STATE_NOW.get_many(read, keys.iter().map(|key| (room, *key)))?;
        return Ok(rows.into_iter().map(|row| row.unwrap_or(Val::Absent)).collect());
    }
    keys.iter().map(|key| at(read, room, Ref::Main(order), *key)).collect()
}

/// How many keys may differ at most, without looking at any: the changes between the two places on the main line and
/// the entries of the side states. A hint: what filled holes is not in it.
pub fn distance(read: &(impl Read + ?Sized), room: RoomNum, a: Ref, b: Ref) -> Result<u64, Fault> {
    let (left, right) = (Chain::read(read, room, a)?, Chain::read(read, room, b)?);
    let entries: usize = unshared(&left, &right).map(SideRow::len).sum();
    let (Ref::Main(x), Ref::Main(y)) = (left.base, right.base) else { return Ok(entries as u64) };
    Ok(changes_between(read, room, x.min(y), x.max(y))?.saturating_add(entries as u64))
}

/// The side states that only one of the two consists of: what both stand on makes no difference by itself.
fn unshared<'c>(left: &'c Chain, right: &'c Chain) -> impl Iterator<Item = &'c SideRow> {
    let is_in = |chain: &Chain, side| chain.rows.iter().any(|(other, _)| *other == side);
    let own_left = left.rows.iter().take_while(move |(side, _)| !is_in(right, *side));
    let own_right = right.rows.iter().take_while(move |(side, _)| !is_in(left, *side));
    own_left.chain(own_right).map(|(_, row)| row)
}

/// The keys that changed on the main line in `(low, high]`, each with its value at `low`; `None` when reading both
/// states in full is cheaper.
fn values_below(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    low: Order,
    high: Order,
) -> Result<Option<BTreeMap<StateKeyNum, Val>>, Fault> {
    let mut below = BTreeMap::new();
    if low == high {
        return Ok(Some(below));
    }
    let changes_max = CHANGES_PER_KEY_MAX.saturating_mul(key_count(read, room)?).max(FEW_CHANGES);
    if changes_between(read, room, low, high)? > changes_max {
        return Ok(None);
    }
    let mut seen = 0_u64;
    for row in changes(read, room, low, high)? {
        for (key, prior) in row?.1 {
            below.entry(key).or_insert(prior);
            seen += 1;
        }
        if seen > changes_max.saturating_mul(2) {
            return Ok(None);
        }
    }
    Ok(Some(below))
}

/// Two full states side by side.
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
        let (x, y) = (x.map_or(Val::Absent, |(_, val)| val), y.map_or(Val::Absent, |(_, val)| val));
        if x != y {
            differing.push((key, x, y));
        }
    }
}
