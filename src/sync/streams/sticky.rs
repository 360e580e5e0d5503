//! The sticky events of a room (MSC4354) that the timeline does not show: each member is told them as long as they are sticky, whatever
//! filter, timeline limit and history visibility say. A client is told each of them once.

use crate::{
    ids::Position,
    rooms::{
        event::{self, StoredEvent},
        sticky,
    },
    store::Fault,
    sync::{
        streams::timeline::Timeline,
        window::{RoomWindow, Standing},
    },
};

/// One answer tells at most this many sticky events of one room, because an answer is held in memory.
const EVENTS_MAX: usize = 200;
/// The sticky events of one room that an answer tells have at most this many bytes; the first may go beyond.
const BYTES_MAX: usize = 1 << 20;

/// Collects the events of a room that became sticky since the client asked last, and that its timeline does not show. If there are too
/// many, the oldest are told, and the next answer goes on after them. A client to which the room is new is told all that are sticky.
pub(crate) fn collect(room: &RoomWindow<'_, '_>, timeline: &Timeline) -> Result<Vec<StoredEvent>, Fault> {
    let window = room.window;
    let after = match room.place.standing {
        Standing::New | Standing::Returns(_) => Position::ZERO,
        Standing::Knows(known) => window.sticky_from().min(known.anchor),
    };
    let rows = sticky::list(window.read, room.num, (after, window.upto), window.now_ms, EVENTS_MAX + 1)?;
    let (mut told, mut bytes, mut last) = (Vec::new(), 0, after);
    for (position, row) in rows {
        if told.len() >= EVENTS_MAX || bytes > BYTES_MAX {
            window.leave_sticky_after(last);
            break;
        }
        last = position;
        let Some(stored) = event::find(window.read, room.num, row.event)? else { continue };
        // An event that was redacted, or whose lifetime is over, is sticky no more.
        let is_gone = stored.row.is_redacted() || stored.row.header.expired;
        if timeline.shows(stored.order) || room.reader.ignores(&stored) || is_gone {
            continue;
        }
        bytes += stored.row.json.len();
        told.push(stored);
    }
    Ok(told)
}
