//! Holes: stretches of a room's history that we do not have, below an *anchor* (a position), and filling them.
//!
//! A marker stands just below the lowest event above a hole, at the next lower minor, so that no reference is rounded
//! down into the hole or across it. Each key that differs from the state below the hole (none before our first join)
//! has an undo row at the *floor*, the lowest minors under the anchor. A hole is filled downward, a segment at a time:
//! its events get the minors below the marker, and a new marker stands below them unless the hole is closed. The old
//! marker's row then holds the keys in which the segment's last state differs from the state above, so nothing at or
//! above it changes its meaning; the floor keeps the state below the hole as it was.

use std::{collections::BTreeMap, ops::Bound};

use super::{apply, at, log_changes, mark, put_now};
use crate::{
    ids::{EventNum, Order, Position, RoomNum, StateKeyNum},
    schema::{
        self,
        state::{HoleRow, StateRef, StateValue},
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

/// Stages the current state of a room that we join for the first time, in parts of any size, before [`open_hole`].
pub fn stage_base(batch: &mut Batch, room: RoomNum, part: &[(StateKeyNum, EventNum)]) {
    for (key, event) in part {
        put_now(batch, room, *key, StateValue::Event(*event));
    }
}

/// Stages part number `part` of the difference between the state above a new hole and the state below it. Readers at or
/// below the last resident order see the same throughout.
pub fn stage_hole(
    batch: &mut Batch,
    room: RoomNum,
    anchor: Position,
    part: u16,
    changes: &[(StateKeyNum, StateValue)],
) -> Result<(), Fault> {
    apply(batch, room, Order { anchor, minor: i32::MIN + i32::from(part) }, changes)
}

/// Opens a hole below the event at `anchor`, after its state was staged. `is_bottomless` says that there is nothing of
/// the room below it.
pub fn open_hole(
    batch: &mut Batch,
    room: RoomNum,
    anchor: Position,
    is_bottomless: bool,
    missing: Vec<String>,
) -> Result<(), Fault> {
    mark(batch, room, Order { anchor, minor: -1 })?;
    schema::HOLE.put(batch, (room, Order::live(anchor)), &HoleRow { is_bottomless, missing });
    Ok(())
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

/// Gives the state just above a hole, before the lowest event above it.
pub fn hole_state(hole: Order) -> StateRef {
    StateRef::Main(marker(hole))
}

fn marker(hole: Order) -> Order {
    Order { anchor: hole.anchor, minor: hole.minor.saturating_sub(1) }
}

/// Fills the upper end of a hole with a segment. Gives the orders of its events, oldest first.
pub fn fill_hole(
    batch: &mut Batch,
    room: RoomNum,
    hole: Order,
    segment: &Segment,
) -> Result<Vec<Order>, Fault> {
    let row = schema::HOLE
        .get(batch, (room, hole))?
        .ok_or(Fault::Corrupt("a hole in a room's history has no row"))?;
    let no_room = Fault::Corrupt("a hole in a room's history has no orders left");
    let count = i32::try_from(segment.steps.len()).map_err(|_| no_room.clone())?;
    let top = marker(hole);
    let lowest = top.minor.saturating_sub(count);
    if lowest <= FLOOR_MINORS {
        return Err(no_room);
    }
    let orders: Vec<Order> = (lowest..top.minor).map(|minor| Order { anchor: hole.anchor, minor }).collect();
    let mut filling = Filling { above: hole_state(hole), top: BTreeMap::new() };
    let mut floor = BTreeMap::new();
    for (key, val) in &segment.bottom {
        if let Some(above) = filling.set(batch, room, *key, *val)? {
            floor.insert(*key, above);
        }
    }
    let mut rows = Vec::with_capacity(orders.len() + 2);
    if !row.is_bottomless {
        let floor_order = Order { anchor: hole.anchor, minor: i32::MIN };
        floor = without_floor_rows(batch, room, floor_order, floor)?;
        rows.push((floor_order, floor));
    }
    for (order, step) in orders.iter().zip(&segment.steps) {
        let mut priors = BTreeMap::new();
        for (key, new) in step {
            let prior = filling.value(batch, room, *key)?;
            if prior != *new {
                filling.set(batch, room, *key, *new)?;
                priors.entry(*key).or_insert(prior);
            }
        }
        rows.push((*order, priors));
    }
    let above = filling.differing(batch, room)?;
    for (order, priors) in rows.into_iter().chain([(top, above)]) {
        for (key, prior) in &priors {
            schema::STATE_UNDO.put(batch, (room, *key, order), prior);
        }
        let counted = priors.values().filter(|prior| !prior.is_derived()).count() as u64;
        log_changes(batch, room, order, priors, counted)?;
    }
    schema::HOLE.delete(batch, (room, hole));
    if !segment.missing.is_empty() {
        let moved = Order { anchor: hole.anchor, minor: lowest };
        mark(batch, room, marker(moved))?;
        let row = HoleRow { missing: segment.missing.clone(), ..row };
        schema::HOLE.put(batch, (room, moved), &row);
    }
    Ok(orders)
}

/// Gives those keys that have no row at the floor yet; the others keep the value they have below the hole.
fn without_floor_rows(
    batch: &Batch,
    room: RoomNum,
    floor: Order,
    mut values: BTreeMap<StateKeyNum, StateValue>,
) -> Result<BTreeMap<StateKeyNum, StateValue>, Fault> {
    let ceiling = Order { anchor: floor.anchor, minor: FLOOR_MINORS };
    let mut held = Vec::new();
    for key in values.keys() {
        let (low, high) = (Bound::Included((room, *key, floor)), Bound::Included((room, *key, ceiling)));
        let mut rows =
            schema::STATE_UNDO.range::<(RoomNum, StateKeyNum, Order)>(batch, low, high, Direction::Up)?;
        if rows.next().transpose()?.is_some() {
            held.push(*key);
        }
    }
    for key in held {
        values.remove(&key);
    }
    Ok(values)
}

/// The state inside a segment, as a difference from the state above it.
struct Filling {
    above: StateRef,
    top: BTreeMap<StateKeyNum, StateValue>,
}

impl Filling {
    fn value(&self, batch: &Batch, room: RoomNum, key: StateKeyNum) -> Result<StateValue, Fault> {
        match self.top.get(&key) {
            Some(val) => Ok(*val),
            None => at(batch, room, self.above, key),
        }
    }

    /// Sets a key, and gives the value above where that is another one.
    fn set(
        &mut self,
        batch: &Batch,
        room: RoomNum,
        key: StateKeyNum,
        val: StateValue,
    ) -> Result<Option<StateValue>, Fault> {
        self.top.insert(key, val);
        let above = at(batch, room, self.above, key)?;
        Ok((above != val).then_some(above))
    }

    /// Lists the keys whose values differ from those above.
    fn differing(&self, batch: &Batch, room: RoomNum) -> Result<BTreeMap<StateKeyNum, StateValue>, Fault> {
        let mut differing = BTreeMap::new();
        for (key, val) in &self.top {
            if at(batch, room, self.above, *key)? != *val {
                differing.insert(*key, *val);
            }
        }
        Ok(differing)
    }
}
