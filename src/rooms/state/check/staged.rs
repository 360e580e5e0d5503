//! Staged steps that are not finished, as `db check` sees them: they may be under way while the check reads, or the server
//! ended in the middle of one and takes it back when it starts. Neither is a fault.

use std::fmt::Debug;

use crate::{
    ids::{Order, Position, RoomNum},
    rooms::state::stage,
    store::{
        Fault, LogEntry, Read, Snapshot, Table,
        check::{Doubts, RowCheck},
        key::{Key, Value},
    },
};

/// A key that begins with the number of the room that the row is of.
pub(in crate::rooms) trait OfRoom {
    /// Gives the room of the row.
    fn room(&self) -> RoomNum;
}

impl OfRoom for RoomNum {
    fn room(&self) -> RoomNum {
        *self
    }
}

impl<A> OfRoom for (RoomNum, A) {
    fn room(&self) -> RoomNum {
        self.0
    }
}

impl<A, B> OfRoom for (RoomNum, A, B) {
    fn room(&self) -> RoomNum {
        self.0
    }
}

impl<A, B, C> OfRoom for (RoomNum, A, B, C) {
    fn room(&self) -> RoomNum {
        self.0
    }
}

/// Checks the rows of rooms, but for those of a room that is being made. Nothing of such a room counts yet: some of its
/// rows name what is written with the last part only, or what was taken back already.
pub(in crate::rooms) fn of_room<K: Key + Debug + OfRoom, V: Value>(
    table: &'static Table<K, V>,
    mut judge: impl FnMut(&Snapshot, &K, &V, &mut Doubts) -> Result<(), Fault> + 'static,
) -> RowCheck {
    // Rows come room by room, so the answer for the last room is kept.
    let mut here: Option<(RoomNum, bool)> = None;
    RowCheck::of(table, move |read, key, value, doubts| {
        let room = key.room();
        let is_made = match here {
            Some((of, is_made)) if of == room => is_made,
            _ => is_being_made(read, room)?,
        };
        here = Some((room, is_made));
        if is_made { Ok(()) } else { judge(read, key, value, doubts) }
    })
}

fn is_being_made(read: &Snapshot, room: RoomNum) -> Result<bool, Fault> {
    Ok(stage::find(read, room)?.is_some_and(|stage| stage.makes_room))
}

/// Checks that an order of a room's state was given out, or is reserved for a step that is not finished.
pub(in crate::rooms) fn order(
    read: &Snapshot,
    room: RoomNum,
    order: Order,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    let is_reserved = order.anchor > read.upto()
        && stage::find(read, room)?.is_some_and(|stage| stage.anchor == Some(order.anchor));
    if !is_reserved {
        doubts.position(read, order.anchor);
    }
    Ok(())
}

/// Whether an entry of the log is part of a room that is being made, so that its position is not given out yet.
pub fn is_staged(read: &Snapshot, position: Position, entry: LogEntry) -> Result<bool, Fault> {
    let LogEntry::Event { room, .. } = entry else { return Ok(false) };
    let stage = stage::find(read, room)?;
    Ok(stage.is_some_and(|stage| stage.makes_room && stage.anchor.is_some_and(|anchor| anchor <= position)))
}
