//! `db check`: every row is read, and every owner asked what must hold of its own.

use ruma::ServerName;

use crate::{
    accounts, encryption,
    ids::{Position, RoomNum, UserNum},
    push, rooms,
    schema::{self, rooms::Place},
    store::{
        self, Direction, Fault, LogEntry, Snapshot, Store,
        backup::Progress,
        check::{self, Doubts, Report, RowCheck},
        timer::TimerKind,
    },
};

/// Reads everything and says what is wrong, while a server goes on beside it. Errors: only what stops it from reading on.
pub fn check(store: &Store, progress: &mut dyn FnMut(Progress)) -> Result<Report, Fault> {
    let tables: Vec<_> = schema::all().collect();
    check::check(store, &tables, &checks, progress)
}

/// What all owners know of their tables.
fn checks() -> Vec<RowCheck> {
    let mut all = check::checks();
    all.extend(accounts::check::checks());
    all.extend(rooms::check::checks());
    all.extend(encryption::check::checks());
    all.extend(push::check::checks());
    all.push(RowCheck::of(&store::tables::LOG, |read, position, entry, doubts| {
        log_entry(read, *position, *entry, doubts)
    }));
    all.push(RowCheck::of(&store::tables::TIMER, |read, (_, kind, key), _, doubts| {
        if *kind == TimerKind::TellRooms as u8 {
            let user = <[u8; 8]>::try_from(key.as_slice()).map(|bytes| UserNum(u64::from_be_bytes(bytes)));
            let there = user.ok().map(|user| schema::USERS.contains(read, user)).transpose()?;
            doubts.unless(there == Some(true), "the user it is about is not there");
        }
        let names_two = [TimerKind::CarryOver, TimerKind::ForgetOriginal].map(|kind| kind as u8);
        doubts.unless(!names_two.contains(kind) || key.len() == 16, "it does not say what it is about");
        Ok(())
    }));
    all.push(RowCheck::of(&schema::SERVER_FACTS, |_, name, fact, doubts| {
        let is_name = name != "server_name" || <&ServerName>::try_from(fact.as_str()).is_ok();
        doubts.unless(is_name, "this is the name of no server");
        Ok(())
    }));
    all
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

#[cfg(test)]
mod tests;
