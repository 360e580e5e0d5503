//! The graphs of a room's events: who allows whom (auth edges), and the *heads*: the events that no accepted event
//! cites yet (the specification's forward extremities).

use crate::{
    ids::{EventNum, RoomNum},
    store::{Batch, Direction, Fault, Read, schema},
};

/// Notes that a state event names these events among its auth events. State events only: nothing is allowed by a
/// message. Not for rejected events: no state can rest on them.
pub fn put_auth_edges(batch: &mut Batch, room: RoomNum, event: EventNum, auth: &[EventNum]) {
    for allowing in auth {
        schema::AUTH_CHILD.put(batch, (room, *allowing, event), &());
    }
}

/// State events that name `event` among their auth events, newest first; those stored before `before` only.
pub fn list_auth_children<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
    event: EventNum,
    before: EventNum,
) -> Result<impl Iterator<Item = Result<EventNum, Fault>> + 'r, Fault> {
    let low = std::ops::Bound::Included((room, event, EventNum(0)));
    let high = std::ops::Bound::Excluded((room, event, before));
    let rows = schema::AUTH_CHILD.range::<(RoomNum, EventNum, EventNum)>(read, low, high, Direction::Down)?;
    Ok(rows.map(|row| row.map(|((_, _, child), ())| child)))
}
