//! Whole states, streamed by rising key numbers: the current one with the changes since laid over it, or, where there
//! were more changes than there are keys, one scan of the current state and of all earlier values side by side.

use std::{collections::BTreeMap, iter::Peekable, ops::Bound};

use super::{changes, last_change, side::Chain};
use crate::{
    ids::{EventNum, Order, RoomNum, StateKeyNum},
    schema,
    schema::state::{StateRef, StateValue},
    store::{Direction, Fault, Read},
};

/// Read a full state by the scan of everything where more than this many changes lie above it for each key of the room.
const CHANGES_PER_KEY_MAX: u64 = 4;
/// Below this many changes the scan of everything never pays. Tests use a small bound to reach it in small rooms.
pub(crate) const FEW_CHANGES: u64 = if cfg!(test) { 4 } else { 256 };

/// Keys with their values, by rising key numbers.
pub(crate) type Values<'r> = Box<dyn Iterator<Item = Result<(StateKeyNum, StateValue), Fault>> + 'r>;

/// Streams the whole state, by rising key numbers; keys that are unset or unknown are left out. Of the state itself
/// nothing is held in memory, of the changes since then at most four a key.
pub fn full<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
    state: StateRef,
) -> Result<impl Iterator<Item = Result<(StateKeyNum, EventNum), Fault>> + 'r, Fault> {
    let values = values(read, room, state)?;
    Ok(values.filter_map(|row| match row {
        Ok((key, val)) => val.event().map(|event| Ok((key, event))),
        Err(fault) => Some(Err(fault)),
    }))
}

/// Does the same, and gives the keys whose values are unknown, too.
pub(crate) fn values<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
    state: StateRef,
) -> Result<Values<'r>, Fault> {
    let chain = Chain::read(read, room, state)?;
    let (order, mut over) = (chain.base, chain.entries());
    let sides = over.clone();
    // Most places are near the tip, and that is found out sooner than how near.
    if overlay(read, room, order, FEW_CHANGES, &mut over)? {
        return now_under(read, room, over);
    }
    over.clone_from(&sides);
    let changes_max = CHANGES_PER_KEY_MAX.saturating_mul(key_count(read, room)?);
    if changes_between(read, room, order, Order::MAX)? <= changes_max {
        // Changes that filled holes are not in the running count, so the bound leaves some slack.
        if overlay(read, room, order, changes_max.saturating_mul(2), &mut over)? {
            return now_under(read, room, over);
        }
        over = sides;
    }
    Ok(laid(over, scan_all(read, room, order)?))
}

/// Lays the oldest value since `order` of each key that changed under `over`. Gives `false` above `changes_max`
/// changes.
fn overlay(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    order: Order,
    changes_max: u64,
    over: &mut BTreeMap<StateKeyNum, StateValue>,
) -> Result<bool, Fault> {
    let mut seen = 0;
    for row in changes(read, room, order, Order::MAX)? {
        for (key, prior) in row?.1 {
            over.entry(key).or_insert(prior);
            seen += 1;
        }
        if seen > changes_max {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Gives an upper bound of how many keys the current state has, near to the truth; never 0.
pub(crate) fn key_count(read: &(impl Read + ?Sized), room: RoomNum) -> Result<u64, Fault> {
    let mut rows = schema::STATE_NOW.prefix::<(RoomNum,)>(read, (room,), Direction::Down)?;
    let last = rows.next().transpose()?;
    Ok(last.map_or(1, |((_, key), _)| u64::from(key.0) + 1))
}

/// Tells how many changes the main line saw in `(low, high]`, by the running count, which is a hint.
pub(crate) fn changes_between(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    low: Order,
    high: Order,
) -> Result<u64, Fault> {
    let count = |order| -> Result<u64, Fault> {
        Ok(last_change(read, room, Bound::Included(order))?.map_or(0, |(_, row)| row.count))
    };
    Ok(count(high)?.saturating_sub(count(low)?))
}

fn now_under<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
    over: BTreeMap<StateKeyNum, StateValue>,
) -> Result<Values<'r>, Fault> {
    Ok(laid(over, list_written(read, room)?))
}

/// Lists the current values as they are written, those of a staged step among them. The undo rows and the log of such a
/// step, which are laid over this, bring back the values before it.
fn list_written<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
) -> Result<impl Iterator<Item = Result<(StateKeyNum, StateValue), Fault>> + 'r, Fault> {
    let now = schema::STATE_NOW.prefix::<(RoomNum,)>(read, (room,), Direction::Up)?;
    let values = now.map(|row| row.map(|((_, key), row)| (key, row.val)));
    Ok(values.filter(|row| !matches!(row, Ok((_, StateValue::Absent)))))
}

fn laid<'r>(
    over: BTreeMap<StateKeyNum, StateValue>,
    base: impl Iterator<Item = Result<(StateKeyNum, StateValue), Fault>> + 'r,
) -> Values<'r> {
    Box::new(Under { over: over.into_iter().map(Ok).peekable(), base: base.peekable() })
}

/// Reads the main line at `order` by one scan of `state_now` and `state_undo`, whose keys are sorted alike.
fn scan_all<'r>(read: &'r (impl Read + ?Sized), room: RoomNum, order: Order) -> Result<Values<'r>, Fault> {
    let now = list_written(read, room)?;
    let undo = schema::STATE_UNDO.prefix::<(RoomNum,)>(read, (room,), Direction::Up)?;
    // The value of a key is in its first row above the order.
    let mut last = None;
    let over = undo.filter_map(move |row| match row {
        Ok(((_, key, at), _)) if at <= order || last == Some(key) => None,
        Ok(((_, key, _), val)) => {
            last = Some(key);
            Some(Ok((key, val)))
        }
        Err(fault) => Some(Err(fault)),
    });
    Ok(Box::new(Under { over: over.peekable(), base: now.peekable() }))
}

/// Lays `over` on `base`, and leaves out values that are absent.
struct Under<O: Iterator, B: Iterator> {
    over: Peekable<O>,
    base: Peekable<B>,
}

impl<O, B> Iterator for Under<O, B>
where
    O: Iterator<Item = Result<(StateKeyNum, StateValue), Fault>>,
    B: Iterator<Item = Result<(StateKeyNum, StateValue), Fault>>,
{
    type Item = Result<(StateKeyNum, StateValue), Fault>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let below = match (self.over.peek(), self.base.peek()) {
                (None, _) | (_, Some(Err(_))) => return self.base.next(),
                (Some(Err(_)), _) => return self.over.next(),
                (Some(Ok(_)), None) => None,
                (Some(Ok((over, _))), Some(Ok((base, _)))) => Some(base.cmp(over)),
            };
            match below {
                Some(std::cmp::Ordering::Less) => return self.base.next(),
                Some(std::cmp::Ordering::Equal) => drop(self.base.next()),
                Some(std::cmp::Ordering::Greater) | None => {}
            }
            match self.over.next() {
                Some(Ok((_, StateValue::Absent))) => {}
                other => return other,
            }
        }
    }
}
