//! `db check` reads every row and has the module that owns its table verify it.

use ruma::ServerName;

use crate::{
    accounts, delivery, encryption,
    flows::remote,
    ids::{Position, RoomNum},
    media, push, rooms,
    schema::{self, jobs::Job, rooms::Place},
    store::{
        self, Direction, Fault, LogEntry, Snapshot, Store,
        backup::Progress,
        check::{self, Doubts, Report, RowCheck},
        timer::Timer,
    },
    sync::connections,
};

/// Reads every row and reports those that are wrong, while the server goes on. Errors: only a failure of the store itself.
pub fn check(store: &Store, progress: &mut dyn FnMut(Progress)) -> Result<Report, Fault> {
    let tables: Vec<_> = schema::all().collect();
    check::check(store, &tables, &checks, progress)
}

/// The checks of all modules that own tables.
fn checks() -> Vec<RowCheck> {
    let mut all = check::checks();
    all.extend(accounts::check::checks());
    all.extend(rooms::check::checks());
    all.extend(encryption::check::checks());
    all.extend(push::check::checks());
    all.extend(media::preview::check::checks());
    all.extend(media::check::checks());
    all.extend(remote::check::checks());
    all.extend(delivery::check::checks());
    all.extend(connections::check::checks());
    all.push(RowCheck::of(&store::tables::LOG, |read, position, entry, doubts| {
        log_entry(read, *position, *entry, doubts)
    }));
    all.push(RowCheck::of(&store::tables::TIMER, |read, (due_ms, kind, key), row, doubts| {
        if Job::is_known(*kind) {
            let timer = Timer { due_ms: *due_ms, kind: *kind, key: key.clone(), row: row.clone() };
            job(read, &Job::read(&timer)?, doubts)?;
        }
        Ok(())
    }));
    all.push(RowCheck::of(&schema::SERVER_FACTS, |_, name, fact, doubts| {
        let is_name = name != "server_name" || <&ServerName>::try_from(fact.as_str()).is_ok();
        doubts.unless(is_name, "this is the name of no server");
        Ok(())
    }));
    all
}

/// Checks that the user and the room of a job are there.
fn job(read: &Snapshot, job: &Job, doubts: &mut Doubts) -> Result<(), Fault> {
    let (user, room) = match job {
        Job::TrimLog | Job::TendMedia { .. } => (None, None),
        Job::TendBlob { digest, generation } => {
            // A copy of a move that broke off may outlive the blob, and is never of the first generation.
            let is_there = *generation > 0 || schema::MEDIA_BLOB.contains(read, &digest.0)?;
            doubts.unless(is_there, "the blob of the job does not exist");
            (None, None)
        }
        Job::EndUnused { user, .. } | Job::EndLink { user, .. } | Job::ForgetMedia { user } => {
            (Some(*user), None)
        }
        // This server may know nothing of the room, or nothing any more.
        Job::LeaveAgain { user, .. } | Job::EndJoin { user, .. } | Job::ForgetEnded { user, .. } => {
            (Some(*user), None)
        }
        Job::TellRooms { user } | Job::SweepDevices { user } | Job::SendDelayed { user } => {
            (Some(*user), None)
        }
        Job::CarryOver { user, room, .. } | Job::AbandonRoom { user, room } => (Some(*user), Some(*room)),
        Job::MoveNames { to, .. } => (None, Some(*to)),
        Job::ForgetOriginal { room, .. }
        | Job::ForgetSent { room, .. }
        | Job::Reunite { room }
        | Job::TakeLeftOut { room }
        | Job::Expire { room }
        | Job::TendSticky { room }
        | Job::Sweep { room }
        | Job::CompleteState { room } => (None, Some(*room)),
    };
    let has_user = user.map(|user| schema::USERS.contains(read, user)).transpose()?;
    doubts.unless(has_user != Some(false), "the user of the job does not exist");
    let has_room = room.map(|room| schema::ROOM.contains(read, room)).transpose()?;
    doubts.unless(has_room != Some(false), "the room of the job does not exist");
    Ok(())
}

/// Checks that the event, room or user that an entry of the log names is there. The events of a room that was deleted, or purged
/// up to this entry, are gone.
fn log_entry(read: &Snapshot, position: Position, entry: LogEntry, doubts: &mut Doubts) -> Result<(), Fault> {
    if !rooms::check::is_staged(read, position, entry)? {
        doubts.position(read, position);
    }
    match entry {
        LogEntry::Event { room, event } => match schema::PLACE.get(read, (room, event))? {
            Some(Place::Timeline(order)) => {
                doubts.unless(
                    order.anchor == position,
                    format!("event {event} of room {room} stands elsewhere"),
                );
            }
            Some(Place::Aside | Place::Outlier) => {
                doubts.unless(false, format!("event {event} of room {room} is not in its timeline"));
            }
            None => {
                let mut rows = schema::TIMELINE.prefix::<(RoomNum,)>(read, (room,), Direction::Up)?;
                let oldest = rows.next().transpose()?.map(|((_, order), _)| order.anchor);
                let is_purged = oldest.is_none_or(|oldest| oldest > position);
                doubts.unless(is_purged, format!("event {event} of room {room} is nowhere"));
            }
        },
        LogEntry::RoomState { room }
        | LogEntry::Receipts { room }
        | LogEntry::Filled { room, .. }
        | LogEntry::Expired { room, .. } => {
            doubts.unless(schema::ROOM.contains(read, room)?, format!("there is no room {room}"));
        }
        LogEntry::Account { user }
        | LogEntry::AccountData { user }
        | LogEntry::Device { user }
        | LogEntry::ToDevice { user }
        | LogEntry::DeviceList { user } => {
            doubts.unless(schema::USERS.contains(read, user)?, format!("there is no account {user}"));
        }
        LogEntry::Server | LogEntry::OtherDeviceList => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests;
