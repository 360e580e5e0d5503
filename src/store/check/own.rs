//! What the store knows of its own tables: the log and its head, incarnations, cursors.

use std::ops::Bound;

use crate::{
    ids::{Position, RoomNum},
    store::{
        Direction, Fault, LogEntry, Snapshot,
        check::{Doubts, RowCheck},
        head, schema,
        schema::rooms::Place,
    },
};

/// The checks of the store's own tables.
pub fn checks() -> Vec<RowCheck> {
    vec![
        RowCheck::of(&schema::LOG, |read, position, entry, doubts| {
            doubts.position(read, *position);
            log_entry(read, *position, *entry, doubts)
        }),
        RowCheck::of(&schema::HEAD, |read, name, number, doubts| {
            doubts.unless(head::may_be(read, name, *number), format!("it says {number}, which cannot be"));
            let has_first = schema::INCARNATION.contains(read, 0)?;
            doubts.unless(has_first, "the store has no first incarnation");
            Ok(())
        }),
        RowCheck::of(&schema::INCARNATION, incarnation),
        RowCheck::of(&schema::CURSOR, |read, _, position, doubts| {
            doubts.position(read, *position);
            Ok(())
        }),
        RowCheck::of(&schema::LOG_TRIMMED, |read, (), position, doubts| {
            doubts.position(read, *position);
            Ok(())
        }),
        RowCheck::of(&schema::LOG_TIME, |read, _, position, doubts| {
            doubts.position(read, *position);
            Ok(())
        }),
    ]
}

fn incarnation(
    read: &Snapshot,
    incarnation: &u16,
    ended: &Position,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    doubts.position(read, *ended);
    if *incarnation > 0 {
        let first = Position::first_of_incarnation(*incarnation);
        doubts.unless(*ended < first, format!("it goes on from {ended}, which is its own"));
        doubts.unless(first <= read.position, "it never began");
        let below = Bound::Excluded(*incarnation);
        let mut before = schema::INCARNATION.range::<u16>(read, Bound::Unbounded, below, Direction::Down)?;
        doubts.unless(before.next().is_some(), "there was none before it");
    }
    Ok(())
}

/// What an entry points at is there; of a room that was deleted or purged up to it, nothing is.
fn log_entry(read: &Snapshot, position: Position, entry: LogEntry, doubts: &mut Doubts) -> Result<(), Fault> {
    match entry {
        LogEntry::Event { room, event } => match schema::PLACE.get(read, (room, event))? {
            Some(Place::Timeline(order)) => {
                doubts.unless(
                    order.anchor == position,
                    format!("event {event} of room {room} stands elsewhere"),
                );
            }
            Some(Place::Aside) => {
                doubts.unless(false, format!("event {event} of room {room} is not in its timeline"));
            }
            None => {
                let mut rows = schema::TIMELINE.prefix::<(RoomNum,)>(read, (room,), Direction::Up)?;
                let oldest = rows.next().transpose()?.map(|((_, order), _)| order.anchor);
                let is_purged = oldest.is_none_or(|oldest| oldest > position);
                doubts.unless(is_purged, format!("event {event} of room {room} is nowhere"));
            }
        },
        LogEntry::RoomState { room } | LogEntry::Receipts { room } => {
            doubts.unless(schema::ROOM.contains(read, room)?, format!("there is no room {room}"));
        }
        LogEntry::Account { user }
        | LogEntry::AccountData { user }
        | LogEntry::Device { user }
        | LogEntry::ToDevice { user }
        | LogEntry::DeviceList { user } => {
            doubts.unless(schema::USERS.contains(read, user)?, format!("there is no account {user}"));
        }
        LogEntry::Server => {}
    }
    Ok(())
}
