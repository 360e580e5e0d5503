//! Checks the rows of sticky events.

use crate::{ids::Order, rooms::state::check::of_room, schema, store::check::RowCheck};

/// Lists the checks of sticky events and of the index that lists them by sender.
pub(super) fn checks() -> [RowCheck; 3] {
    [
        of_room(&schema::STICKY, |read, (room, position), row, doubts| {
            let event = schema::TIMELINE.get(read, (*room, Order::live(*position)))?;
            let is_it = event.is_some_and(|event| event.header.event == row.event);
            doubts.unless(is_it, "its event does not stand at its position");
            let listed = schema::STICKY_SENDER.contains(read, (*room, row.sender.as_str(), *position))?;
            doubts.unless(listed, "the sticky events of its sender lack it");
            Ok(())
        }),
        of_room(&schema::STICKY_SENDER, |read, (room, _, position), (), doubts| {
            doubts.unless(schema::STICKY.contains(read, (*room, *position))?, "no event there is sticky");
            Ok(())
        }),
        of_room(&schema::STICKY_ASIDE, |read, (room, _, event), _, doubts| {
            let next = schema::ROOM.get(read, *room)?.map_or(0, |row| row.next_event);
            doubts.unless(event.0 < next, "the room has not given out the number of its event");
            Ok(())
        }),
    ]
}
