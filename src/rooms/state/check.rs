//! Checks the rows of room state against one another, for `db check`.

mod staged;

pub use staged::is_staged;
pub(in crate::rooms) use staged::of_room;

use staged::order;

use crate::{
    ids::{EventNum, Order, RoomNum, SideNum, StateKeyNum},
    rooms::{event, state::side::DEPTH_MAX},
    schema::{
        self,
        state::{DERIVED, LogRow, NowRow, SideRow, StateRef, StateValue},
    },
    store::{
        Fault, Snapshot,
        check::{Doubts, RowCheck},
    },
};

/// Lists the checks of room state.
pub(in crate::rooms) fn checks() -> Vec<RowCheck> {
    vec![
        of_room(&schema::STATE_KEY, |read, (room, key), row, doubts| {
            let num = super::find_key(read, *room, &row.event_type, &row.state_key)?;
            doubts.unless(num == Some(*key), "its type and state key have another number");
            let next = schema::ROOM.get(read, *room)?.map_or(0, |row| row.next_key);
            doubts.unless(key.0 < next, "its number was never given");
            Ok(())
        }),
        of_room(&schema::STATE_KEY_NUM, |read, (room, event_type, state_key), key, doubts| {
            let name = super::key_name(read, *room, *key)?;
            let is_it = name.is_some_and(|name| (&name.0, &name.1) == (event_type, state_key));
            doubts.unless(is_it, format!("number {key} belongs to another type and state key"));
            Ok(())
        }),
        of_room(&schema::STATE_NOW, |read, (room, key), row, doubts| {
            let NowRow { val, staged_at } = *row;
            doubts.unless(
                val != StateValue::Absent || staged_at.is_some(),
                "its value is absent, for which there is no row",
            );
            if let Some(order) = staged_at {
                let is_kept = schema::STATE_UNDO.contains(read, (*room, *key, order))?;
                doubts.unless(is_kept, "the value before the step that wrote it is not kept");
            }
            value(read, *room, *key, val, doubts)
        }),
        RowCheck::of(&schema::STAGE, |read, room, _, doubts| {
            // An unfinished step is no fault by itself: the worker that clears such steps begins when the server does.
            let is_room = schema::ROOM.contains(read, *room)?;
            doubts.unless(is_room, "its room is gone");
            Ok(())
        }),
        of_room(&schema::STATE_UNDO, |read, (room, key, at), val, doubts| {
            order(read, *room, *at, doubts)?;
            let step = schema::STATE_LOG.get(read, (*room, *at))?.unwrap_or_default();
            let logged = step.changes.iter().find(|(changed, _)| changed == key).map(|(_, prior)| *prior);
            doubts.unless(
                logged == Some(*val),
                "the log of the room's state has another earlier value, or none",
            );
            value(read, *room, *key, *val, doubts)
        }),
        of_room(&schema::STATE_LOG, step),
        of_room(&schema::SIDE, side_state),
        of_room(&schema::HOLE, |read, (room, order), _, doubts| {
            doubts.position(read, order.anchor);
            let StateRef::Main(marker) = super::hole_state(*order) else { return Ok(()) };
            let marked = schema::STATE_LOG.contains(read, (*room, marker))?;
            doubts.unless(marked, "there is no marker that keeps references from crossing the hole");
            Ok(())
        }),
        of_room(&schema::PURGE, |read, room, row, doubts| {
            doubts.position(read, row.below.anchor);
            doubts.unless(schema::ROOM.contains(read, *room)?, "its room is gone");
            Ok(())
        }),
    ]
}

/// Checks that a reference to a state is to a state that can be read.
pub(in crate::rooms) fn reference(
    read: &Snapshot,
    room: RoomNum,
    at: StateRef,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    match at {
        StateRef::Main(order) => doubts.position(read, order.anchor),
        StateRef::Side(side) => {
            let there = schema::SIDE.contains(read, (room, side))?;
            doubts.unless(there, format!("the side state {side} that it names is not there"));
        }
    }
    Ok(())
}

/// Checks that an event which a key has, or had, is there and is of that key.
fn value(
    read: &Snapshot,
    room: RoomNum,
    key: StateKeyNum,
    val: StateValue,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    if let StateValue::Event(EventNum(number)) = val {
        let stored = event::find_anywhere(read, room, EventNum(number))?;
        let is_of_key = stored.is_some_and(|stored| stored.row.header.state_key == Some(key));
        doubts.unless(is_of_key, format!("event {number} is gone or of another state key"));
    }
    if val.is_derived() {
        let name = super::key_name(read, room, key)?;
        let is_derived = name.is_some_and(|(event_type, _)| event_type.starts_with(DERIVED));
        doubts.unless(is_derived, "its value is derived, but its key is not");
    }
    Ok(())
}

fn step(
    read: &Snapshot,
    (room, at): &(RoomNum, Order),
    row: &LogRow,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    order(read, *room, *at, doubts)?;
    let keys = row.changes.iter().map(|(key, _)| (*room, *key, *at));
    let undo = schema::STATE_UNDO.get_many(read, keys)?;
    for ((key, prior), undo) in row.changes.iter().zip(undo) {
        doubts.unless(undo == Some(*prior), format!("the earlier value of key {key} is not kept"));
    }
    let before = super::last_change(read, *room, std::ops::Bound::Excluded(*at))?;
    // The changes that fill a hole are not added to the counts above it.
    let is_above_hole = before.as_ref().is_some_and(|(order, _)| order.minor < 0);
    let before = before.map_or(0, |(_, row)| row.count);
    let most = before.saturating_add(row.changes.len() as u64);
    doubts.unless(
        at.minor < 0 || is_above_hole || (before..=most).contains(&row.count),
        "its running count does not fit its changes",
    );
    Ok(())
}

fn side_state(
    read: &Snapshot,
    (room, side): &(RoomNum, SideNum),
    row: &SideRow,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    let next = schema::ROOM.get(read, *room)?.map_or(0, |row| row.next_side);
    doubts.unless(side.0 < next, "its number was never given");
    doubts.unless(row.depth <= DEPTH_MAX, "it stands on too many other side states");
    reference(read, *room, row.base, doubts)?;
    if let StateRef::Side(base) = row.base {
        doubts.unless(base < *side, "it stands on a newer side state");
        let depth = schema::SIDE.get(read, (*room, base))?.map(|base| base.depth);
        doubts.unless(
            depth.is_none_or(|depth| depth < row.depth),
            "its depth is not above that of the side state below it",
        );
    } else {
        let canonical = super::canonical(read, *room, row.base)?;
        doubts.unless(canonical == row.base, "its base on the main line is not a place of a change");
    }
    doubts.unless(row.iter().is_sorted_by(|(one, _), (other, _)| one < other), "its keys are out of order");
    for (key, val) in row.iter() {
        value(read, *room, key, val, doubts)?;
    }
    Ok(())
}
