//! The names of a room on this server: its aliases, and its place in the directory. They go over to the room that replaces it.
//!
//! A room may have more aliases than fit into a batch. Those that it calls itself by move with the tombstone, as many as may be, and a job
//! that is promised there moves the rest in parts.

use std::{collections::BTreeSet, iter};

use ruma::{CanonicalJsonObject, OwnedRoomAliasId};

use crate::{
    error::Result,
    flows::{App, account::carry_over, commit, jobs},
    ids::RoomNum,
    rooms::{self, aliases, change::Change, directory},
    schema::{
        event_types::TOMBSTONE,
        jobs::{Job, Move},
    },
    store::{
        LogEntry,
        timer::{self, Timer},
    },
};

/// At most this many aliases move in one batch, which has three rows for each: others who name rooms wait meanwhile.
const MOVED_AT_ONCE: usize = 200;
/// A run of the job moves at most this many parts, and comes back for more.
const PARTS_MAX: usize = 25;

/// Has the names of a room name another one from now on, first those in the `canonical` alias. What does not fit into the batch is
/// promised as a job.
pub(crate) fn move_to(
    app: &App,
    change: &mut Change,
    to: RoomNum,
    canonical: Option<&CanonicalJsonObject>,
) -> Result<Option<Timer>> {
    let named = canonical.map(aliases::named).transpose()?.unwrap_or_default();
    let first = named.into_iter().filter_map(|alias| OwnedRoomAliasId::try_from(alias).ok());
    if directory::is_published(&change.batch, change.num)? {
        directory::publish(&mut change.batch, change.num, false);
        directory::publish(&mut change.batch, to, true);
    }
    if move_some(change, to, first)? {
        return Ok(None);
    }
    let job = Job::MoveNames { from: change.num, to };
    Ok(Some(jobs::promise(app, &mut change.batch, &job)))
}

/// Moves as many aliases as one batch takes, these first. Answers whether that are all.
fn move_some(
    change: &mut Change,
    to: RoomNum,
    first: impl Iterator<Item = OwnedRoomAliasId>,
) -> Result<bool> {
    let mut some: BTreeSet<OwnedRoomAliasId> = first.take(MOVED_AT_ONCE).collect();
    let mut is_whole = true;
    for alias in aliases::list(&change.batch, change.num, MOVED_AT_ONCE + 1)? {
        if some.len() < MOVED_AT_ONCE {
            some.insert(alias);
        } else {
            is_whole &= some.contains(&alias);
        }
    }
    change.batch.position(&LogEntry::Server);
    for alias in some {
        let row = aliases::find(&change.batch, &alias)?.filter(|row| row.room == change.num);
        if let Some(row) = row {
            aliases::move_to(&mut change.batch, &alias, &row, to);
        }
    }
    Ok(is_whole)
}

/// Moves the aliases that are left of a room that was replaced, and deletes the timer of the job with the last of them. Answers whether
/// it is done; otherwise it goes on later.
pub(crate) async fn move_rest(app: &App, from: RoomNum, to: RoomNum, timer: &Timer) -> Result<bool> {
    for _ in 0..PARTS_MAX {
        let timer = timer.clone();
        let is_over = commit::in_room_and_server(app, from, move |change| {
            if !timer::is_waiting(&change.batch, &timer)? {
                return Ok(true);
            }
            // Where the old room was replaced by yet another one, its names have gone there.
            let is_over = !is_replaced_by(change, to)? || move_some(change, to, iter::empty())?;
            Ok(is_over && timer::fire(&mut change.batch, &timer)?)
        });
        if is_over.await? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether the tombstone of a room names this room.
fn is_replaced_by(change: &mut Change, to: RoomNum) -> Result<bool> {
    let tombstone = change.state(TOMBSTONE, "")?;
    let named = tombstone.and_then(|event| carry_over::replacement(event.parsed.content.get()));
    let named = named.map(|named| rooms::find_room(&change.batch, &named)).transpose()?.flatten();
    Ok(named == Some(to))
}

/// Has the names that a replaced room still has here follow one of our users into the room that replaced it: whoever replaced it on
/// another server could not move them.
pub(crate) async fn follow(app: &App, moved: &Move) -> Result<()> {
    let snapshot = app.store.snapshot();
    let (from, to) = (rooms::find_room(&*snapshot, &moved.from)?, rooms::find_room(&*snapshot, &moved.to)?);
    let (Some(from), Some(to)) = (from, to) else { return Ok(()) };
    // Most rooms have no name here any more, and need no turn.
    if aliases::list(&*snapshot, from, 1)?.is_empty() && !directory::is_published(&*snapshot, from)? {
        return Ok(());
    }
    let owned = app.clone();
    let promised =
        commit::in_room_and_server(app, from, move |change| move_to(&owned, change, to, None)).await?;
    jobs::keep(app, promised).await
}

#[cfg(test)]
mod tests;
