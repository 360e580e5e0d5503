//! Brings a server up to date that missed events: for each room behind the events of ours that it missed where they are few, and
//! else the newest events of the room, from which the server finds what it lacks.
//!
//! Only rooms are told of that the server is still in; where it was removed meanwhile, it is told that.

use std::ops::Bound;

use federation::{client::Client, queue::Mark};
use ruma::{OwnedServerName, ServerName};

use crate::{
    delivery::servers::{
        fan_out::{is_of, is_told},
        marks,
        transaction::JsonOfPdu,
    },
    ids::{Order, Position, RoomNum},
    rooms::{
        self,
        event::{self, StoredEvent},
        members,
    },
    schema,
    store::{Direction, Fault, Snapshot},
};

/// A server that missed at most this many events of ours in a room is told all of them.
const TOLD_WHOLE_MAX: usize = 200;
/// Look at most at this many events of a room for those that are ours.
const LOOKED_AT_MAX: usize = 1_000;
/// Bring at most this many events in one step.
const EVENTS_MAX: usize = 1_000;
/// Bring events of at most about this many bytes in one step.
const BYTES_MAX: usize = 4 << 20;

/// The rooms that one step brings up to date, and the events that do so.
pub(super) struct Step {
    pub(super) rooms: Vec<RoomNum>,
    pub(super) events: Vec<JsonOfPdu>,
    /// Whether other rooms of the server are still marked.
    pub(super) are_left: bool,
}

/// Works out the next step for a server, over the marks that were read before the snapshot was taken.
pub(super) fn plan(
    read: &Snapshot,
    client: &Client,
    (us, server): (&OwnedServerName, &ServerName),
    marked: &[Mark<RoomNum, Position>],
    rooms_max: usize,
) -> Result<Step, Fault> {
    let mut step = Step { rooms: Vec::new(), events: Vec::new(), are_left: marked.len() > rooms_max };
    let mut bytes = 0;
    for mark in marked.iter().take(rooms_max) {
        if step.events.len() >= EVENTS_MAX || bytes >= BYTES_MAX {
            step.are_left = true;
            break;
        }
        step.rooms.push(mark.room);
        if !client.caller().servers().allows(server) {
            continue;
        }
        for stored in of_room(read, (us, server), mark)? {
            bytes += stored.row.json.len();
            step.events.push(JsonOfPdu(stored.row.json));
        }
    }
    Ok(step)
}

/// Reads the marks of a server: one more than a step takes, so that it is known whether rooms are left.
pub(super) fn list_marks(
    read: &(impl crate::store::Read + ?Sized),
    server: &ServerName,
    rooms_max: usize,
) -> Result<Vec<Mark<RoomNum, Position>>, Fault> {
    marks::list(read, server.as_str(), rooms_max + 1)
}

/// Lists the events of one room that bring a server up to date.
fn of_room(
    read: &Snapshot,
    (us, server): (&OwnedServerName, &ServerName),
    mark: &Mark<RoomNum, Position>,
) -> Result<Vec<StoredEvent>, Fault> {
    let room = mark.room;
    // The room may have gone since.
    let Some(row) = rooms::find_row(read, room)? else { return Ok(Vec::new()) };
    if !row.resident.has_history() {
        return Ok(Vec::new());
    }
    let low = Bound::Included((room, Order::live(mark.place)));
    let high = Bound::Included((room, Order::MAX));
    let (mut ours, mut looked_at) = (Vec::new(), 0);
    let mut are_few = true;
    for event in schema::TIMELINE.range::<(RoomNum, Order)>(read, low, high, Direction::Up)? {
        looked_at += 1;
        if looked_at > LOOKED_AT_MAX || ours.len() >= TOLD_WHOLE_MAX {
            are_few = false;
            break;
        }
        let ((_, order), row) = event?;
        let stored = StoredEvent { order, row };
        if event::is_ours_to_tell(&stored.row, us) && is_told(read, room, &stored, server)? {
            ours.push(stored);
        }
    }
    if are_few {
        return Ok(ours);
    }
    if !members::is_server_joined(read, room, server.as_str())? {
        return Ok(find_removal(read, room, (us, server))?.into_iter().collect());
    }
    let mut heads = Vec::new();
    for head in &row.heads {
        let Some(stored) = event::find(read, room, head.event)? else { continue };
        if is_told(read, room, &stored, server)? {
            heads.push(stored);
        }
    }
    Ok(heads)
}

/// Finds the last event of ours that a server that is not in the room any more is to be told: it removed the server.
fn find_removal(
    read: &Snapshot,
    room: RoomNum,
    (us, server): (&OwnedServerName, &ServerName),
) -> Result<Option<StoredEvent>, Fault> {
    let rows = schema::TIMELINE.prefix::<(RoomNum,)>(read, (room,), Direction::Down)?;
    for event in rows.take(LOOKED_AT_MAX) {
        let ((_, order), row) = event?;
        let stored = StoredEvent { order, row };
        let is_about =
            stored.membership().is_some() && stored.row.state_key().is_some_and(|user| is_of(&user, server));
        if is_about && event::is_ours_to_tell(&stored.row, us) && is_told(read, room, &stored, server)? {
            return Ok(Some(stored));
        }
    }
    Ok(None)
}
