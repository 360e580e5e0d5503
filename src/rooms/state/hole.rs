//! Holes: stretches of a room's history that we do not have, below an *anchor* (a position), and filling them.
//!
//! A marker stands just below the lowest event above a hole, at the next lower minor, so that no reference is rounded
//! down into the hole or across it. Each key that differs from the state below the hole (none before our first join)
//! has an undo row at the *floor*, the lowest minors under the anchor. A hole is filled downward, a segment at a time: the
//! old marker's row, and as many rows just below it as it takes, hold the keys in which the segment's last state differs
//! from the state above, so nothing at or above the marker changes its meaning. The segment's events get the minors below
//! those, and a new marker stands below them unless the hole is closed. The floor keeps the state below the hole as it was.
//!
//! The state below a segment may differ from that above in any number of keys, so a hole is filled in parts ([`Fill`]). They
//! are written where nobody refers to: first the floor, whose rows say what is true already, then the keys in which the
//! segment's last state differs, at the marker and just below it. The hole's row says how many such parts there are until
//! the last batch, which adds the segment itself and moves the hole. So a fill that was not finished is known by the
//! hole's row, changes no state that anybody asks for, and is taken back by the next fill.

use std::{collections::BTreeMap, ops::Bound};

use super::{at, just_below, last_change, log_changes, mark, stage::PART_KEYS_MAX};
use crate::{
    ids::{Order, Position, RoomNum, StateKeyNum},
    schema::{
        self,
        state::{HoleRow, LogRow, StateRef, StateValue},
    },
    store::{Batch, Direction, Fault, Read},
};

/// Minors below this belong to the floor, one for each part in which a large hole was staged.
const FLOOR_MINORS: i32 = i32::MIN + (1 << 16);

/// A stretch of events that fills a hole from above, oldest first.
#[derive(Debug, Clone, Default)]
pub struct Segment {
    /// The keys in which the state below the segment's first event differs from the state above the hole (the one of
    /// [`hole_state`]). Entries that do not differ do no harm.
    pub bottom: Vec<(StateKeyNum, StateValue)>,
    /// The changes that each event makes to the main line: keys with their new values. A message has none.
    pub steps: Vec<Vec<(StateKeyNum, StateValue)>>,
    /// The ids of the events that are missing below the segment; an empty list closes the hole.
    pub missing: Vec<String>,
}

/// Opens a hole below the event at `anchor`, after the state above it was staged ([`stage`](super::stage)). Gives the order
/// of the marker at which that state is read. `is_bottomless` says that there is nothing of the room below the hole. Where no
/// events are missing there is no hole, and the marker alone is written.
pub fn open_hole(
    batch: &mut Batch,
    room: RoomNum,
    anchor: Position,
    is_bottomless: bool,
    missing: Vec<String>,
) -> Result<Order, Fault> {
    let marker = Order { anchor, minor: -1 };
    mark(batch, room, marker)?;
    if !missing.is_empty() {
        schema::HOLE.put(batch, (room, Order::live(anchor)), &HoleRow { is_bottomless, missing, parts: 0 });
    }
    Ok(marker)
}

/// Finds the highest hole at or below an order: the order of the lowest event above it, and the events missing below
/// that.
pub fn find_hole(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    upto: Order,
) -> Result<Option<(Order, HoleRow)>, Fault> {
    let (low, high) = (Bound::Included((room, Order::MIN)), Bound::Included((room, upto)));
    let mut rows = schema::HOLE.range::<(RoomNum, Order)>(read, low, high, Direction::Down)?;
    Ok(rows.next().transpose()?.map(|((_, order), row)| (order, row)))
}

/// Finds the lowest hole above an order that has something of the room below it: the order of the lowest event above it.
pub fn find_hole_above(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    order: Order,
) -> Result<Option<Order>, Fault> {
    let (low, high) = (Bound::Excluded((room, order)), Bound::Included((room, Order::MAX)));
    for hole in schema::HOLE.range::<(RoomNum, Order)>(read, low, high, Direction::Up)? {
        let ((_, order), row) = hole?;
        if !row.is_bottomless {
            return Ok(Some(order));
        }
    }
    Ok(None)
}

/// Gives the state just above a hole, before the lowest event above it.
pub fn hole_state(hole: Order) -> StateRef {
    StateRef::Main(marker(hole))
}

fn marker(hole: Order) -> Order {
    Order { anchor: hole.anchor, minor: hole.minor.saturating_sub(1) }
}

/// A hole that is being filled at its upper end with a segment, in parts. Other changes to the room may come between the
/// parts, but for another fill of the same hole.
#[derive(Debug)]
pub struct Fill {
    hole: Order,
    row: HoleRow,
    /// The parts of an earlier fill that was not finished; they are taken back first, the lowest first.
    taken_back: u32,
    /// Keys that get a row at the floor, with their values below the hole.
    floor: Vec<(StateKeyNum, StateValue)>,
    /// The keys in which the segment's last state differs from the state above the hole, with their values in it.
    top: Vec<(StateKeyNum, StateValue)>,
    /// Keys that the segment changes to what they are above the hole, with their values. That may become known to be another one until the
    /// segment is written.
    same: Vec<(StateKeyNum, StateValue)>,
    /// The number of parts of `top` that are written.
    top_written: u32,
    /// The segment's events, oldest first: the keys that each changes, with the values before.
    steps: Vec<(Order, BTreeMap<StateKeyNum, StateValue>)>,
    missing: Vec<String>,
}

/// The keys of one order, with their values before it.
type Priors = BTreeMap<StateKeyNum, StateValue>;

fn no_orders_left() -> Fault {
    Fault::Corrupt("a hole in a room's history has no orders left")
}

impl Fill {
    /// Works out what has to be written to fill the hole with a segment. The changes of the segment's events must fit a
    /// batch; the state below them may differ in any number of keys.
    pub fn plan(
        read: &(impl Read + ?Sized),
        room: RoomNum,
        hole: Order,
        segment: &Segment,
    ) -> Result<Self, Fault> {
        let row = schema::HOLE.get(read, (room, hole))?;
        let row = row.ok_or(Fault::Corrupt("a hole in a room's history has no row"))?;
        let above = hole_state(hole);
        let bottom: Priors = segment.bottom.iter().copied().collect();
        let (mut top, mut priors_of_steps) = (bottom.clone(), Vec::with_capacity(segment.steps.len()));
        for step in &segment.steps {
            let mut priors = BTreeMap::new();
            for (key, new) in step {
                let prior = match top.get(key) {
                    Some(val) => *val,
                    None => at(read, room, above, *key)?,
                };
                if prior != *new {
                    top.insert(*key, *new);
                    priors.entry(*key).or_insert(prior);
                }
            }
            priors_of_steps.push(priors);
        }
        let (mut differing, mut same, mut floor) = (Vec::new(), Vec::new(), BTreeMap::new());
        for (key, val) in top {
            let val_above = at(read, room, above, key)?;
            if val_above != val {
                differing.push((key, val));
            } else if priors_of_steps.iter().any(|priors| priors.contains_key(&key)) {
                same.push((key, val));
            }
            if val_above != val || bottom.get(&key).is_some_and(|val| *val != val_above) {
                floor.insert(key, val_above);
            }
        }
        let top_parts = parts_of(differing.len())?;
        let top = marker(hole).minor.checked_sub_unsigned(top_parts.saturating_sub(1));
        let count = u32::try_from(segment.steps.len()).map_err(|_| no_orders_left())?;
        let lowest = top.and_then(|top| top.checked_sub_unsigned(count)).filter(|it| *it > FLOOR_MINORS);
        let lowest = lowest.ok_or_else(no_orders_left)?;
        let orders = (lowest..).map(|minor| Order { anchor: hole.anchor, minor });
        Ok(Self {
            hole,
            taken_back: row.parts,
            floor: without_floor_rows(read, room, hole.anchor, floor)?.into_iter().collect(),
            top: differing,
            same,
            top_written: 0,
            steps: orders.zip(priors_of_steps).collect(),
            missing: segment.missing.clone(),
            row,
        })
    }

    /// Writes the next part. The last one makes the segment part of the room; it gives the orders of the segment's events,
    /// oldest first.
    pub fn part(&mut self, batch: &mut Batch, room: RoomNum) -> Result<Option<Vec<Order>>, Fault> {
        if self.is_last() {
            return self.finish(batch, room).map(Some);
        }
        if let Some(part) = self.taken_back.checked_sub(1) {
            self.take_back(batch, room, part)?;
            self.taken_back = part;
        } else if !self.floor.is_empty() {
            self.put_floor(batch, room)?;
        } else {
            self.put_top(batch, room)?;
        }
        Ok(None)
    }

    /// Whether the next part is the last one.
    pub fn is_last(&self) -> bool {
        let is_top_written = parts_of(self.top.len()).is_ok_and(|parts| self.top_written >= parts);
        self.taken_back == 0 && self.floor.is_empty() && is_top_written
    }

    /// Gives the order of a part of the keys at the top: the first one at the marker, the others below it.
    fn top_order(&self, part: u32) -> Result<Order, Fault> {
        let top = marker(self.hole);
        let minor = top.minor.checked_sub_unsigned(part).ok_or_else(no_orders_left)?;
        Ok(Order { anchor: top.anchor, minor })
    }

    /// Notes in the hole's row how many parts at the top may have rows.
    fn put_row(&self, batch: &mut Batch, room: RoomNum, parts: u32) {
        schema::HOLE.put(batch, (room, self.hole), &HoleRow { parts, ..self.row.clone() });
    }

    fn take_back(&self, batch: &mut Batch, room: RoomNum, part: u32) -> Result<(), Fault> {
        let order = self.top_order(part)?;
        if let Some(step) = schema::STATE_LOG.get(&*batch, (room, order))? {
            for (key, _) in step.changes {
                schema::STATE_UNDO.delete(batch, (room, key, order));
            }
            if part == 0 {
                schema::STATE_LOG.put(
                    batch,
                    (room, order),
                    &LogRow { count: step.count, changes: Vec::new() },
                );
            } else {
                schema::STATE_LOG.delete(batch, (room, order));
            }
        }
        self.put_row(batch, room, part);
        Ok(())
    }

    fn put_floor(&mut self, batch: &mut Batch, room: RoomNum) -> Result<(), Fault> {
        let rest = self.floor.split_off(self.floor.len().min(PART_KEYS_MAX));
        let part = std::mem::replace(&mut self.floor, rest);
        if self.row.is_bottomless {
            return Ok(());
        }
        let order = next_on_floor(batch, room, self.hole.anchor, part.len())?;
        put(batch, room, order, part.into_iter().collect())
    }

    fn put_top(&mut self, batch: &mut Batch, room: RoomNum) -> Result<(), Fault> {
        let order = self.top_order(self.top_written)?;
        let mut parts = self.top.chunks(PART_KEYS_MAX);
        let part = parts.nth(usize::try_from(self.top_written).unwrap_or(usize::MAX));
        let part: Priors = part.unwrap_or_default().iter().copied().collect();
        self.top_written += 1;
        self.put_row(batch, room, self.top_written);
        put(batch, room, order, part)
    }

    /// Gives the order to which the last part moves the hole, unless it closes it.
    pub fn moved_to(&self) -> Result<Order, Fault> {
        match self.steps.first() {
            Some((order, _)) => Ok(*order),
            None => self.top_order(parts_of(self.top.len())?.saturating_sub(1)),
        }
    }

    fn finish(&mut self, batch: &mut Batch, room: RoomNum) -> Result<Vec<Order>, Fault> {
        let moved = self.moved_to()?;
        let steps = std::mem::take(&mut self.steps);
        let orders: Vec<Order> = steps.iter().map(|(order, _)| *order).collect();
        let above = hole_state(self.hole);
        let mut changed = Priors::new();
        for (key, val) in std::mem::take(&mut self.same) {
            changed.extend((at(&*batch, room, above, key)? != val).then_some((key, val)));
        }
        put(batch, room, marker(self.hole), changed)?;
        for (order, priors) in steps {
            put(batch, room, order, priors)?;
        }
        schema::HOLE.delete(batch, (room, self.hole));
        if !self.missing.is_empty() {
            mark(batch, room, marker(moved))?;
            let row = HoleRow { missing: self.missing.clone(), parts: 0, ..self.row.clone() };
            schema::HOLE.put(batch, (room, moved), &row);
        }
        Ok(orders)
    }
}

fn parts_of(keys: usize) -> Result<u32, Fault> {
    u32::try_from(keys.div_ceil(PART_KEYS_MAX)).map_err(|_| no_orders_left())
}

fn put(batch: &mut Batch, room: RoomNum, order: Order, priors: Priors) -> Result<(), Fault> {
    for (key, prior) in &priors {
        schema::STATE_UNDO.put(batch, (room, *key, order), prior);
    }
    let counted = priors.values().filter(|prior| !prior.is_derived()).count() as u64;
    log_changes(batch, room, order, priors, counted)
}

/// Keeps the value that a key has below a hole, which is about to get another one above it: a row at the floor says so, where none
/// does. Nothing happens where nothing is below the hole.
pub(super) fn keep_below(
    batch: &mut Batch,
    room: RoomNum,
    anchor: Position,
    key: StateKeyNum,
) -> Result<(), Fault> {
    let (low, _) = floor(anchor);
    let below = just_below(&*batch, room, low)?;
    if below == StateRef::EMPTY {
        return Ok(());
    }
    let val = at(&*batch, room, below, key)?;
    let kept = without_floor_rows(&*batch, room, anchor, Priors::from([(key, val)]))?;
    if kept.is_empty() {
        return Ok(());
    }
    let order = next_on_floor(batch, room, anchor, kept.len())?;
    put(batch, room, order, kept)
}

/// Keeps the value that a key has in what fills the hole below a base, which is about to get another one above it: where an event that
/// fills it changed the key, a row at the marker says what that left, unless one does.
pub(super) fn keep_filled(
    batch: &mut Batch,
    room: RoomNum,
    base: Order,
    key: StateKeyNum,
) -> Result<(), Fault> {
    let (_, floor) = floor(base.anchor);
    let (low, high) = (Bound::Excluded((room, key, floor)), Bound::Included((room, key, base)));
    let mut rows =
        schema::STATE_UNDO.range::<(RoomNum, StateKeyNum, Order)>(&*batch, low, high, Direction::Down)?;
    let Some(((_, _, newest), _)) = rows.next().transpose()? else { return Ok(()) };
    drop(rows);
    // Where many keys differ from the state above, the rest of them stands below the marker and above the events.
    let (low, high) = (Bound::Included((room, newest)), Bound::Excluded((room, base)));
    let mut events = schema::TIMELINE.range::<(RoomNum, Order)>(&*batch, low, high, Direction::Up)?;
    if events.next().transpose()?.is_none() {
        return Ok(());
    }
    drop(events);
    let val = at(&*batch, room, StateRef::Main(base), key)?;
    put(batch, room, base, Priors::from([(key, val)]))
}

/// Gives the order at the floor where so many more keys have space: the newest one that is used, or the next above it.
fn next_on_floor(batch: &Batch, room: RoomNum, anchor: Position, keys: usize) -> Result<Order, Fault> {
    let (low, high) = floor(anchor);
    let newest = last_change(batch, room, Bound::Included(high))?;
    match newest.filter(|(order, _)| *order >= low) {
        None => Ok(low),
        Some((order, row)) if row.changes.len() + keys <= PART_KEYS_MAX => Ok(order),
        Some((order, _)) => {
            let next = order.next();
            if next <= high { Ok(next) } else { Err(no_orders_left()) }
        }
    }
}

/// The orders of the floor under an anchor, the first and the last.
fn floor(anchor: Position) -> (Order, Order) {
    (Order { anchor, minor: i32::MIN }, Order { anchor, minor: FLOOR_MINORS - 1 })
}

/// Gives those keys that have no row at the floor yet; the others keep the value they have below the hole.
fn without_floor_rows(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    anchor: Position,
    mut values: Priors,
) -> Result<Priors, Fault> {
    let (low, high) = floor(anchor);
    let mut held = Vec::new();
    for key in values.keys() {
        let (low, high) = (Bound::Included((room, *key, low)), Bound::Included((room, *key, high)));
        let mut rows =
            schema::STATE_UNDO.range::<(RoomNum, StateKeyNum, Order)>(read, low, high, Direction::Up)?;
        if rows.next().transpose()?.is_some() {
            held.push(*key);
        }
    }
    for key in held {
        values.remove(&key);
    }
    Ok(values)
}
