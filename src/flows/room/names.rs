//! The names of a room on this server: its aliases, and its place in the directory. They go over to the room that replaces it.

use std::collections::BTreeSet;

use crate::{
    error::Result,
    flows::{App, commit},
    ids::RoomNum,
    rooms::{self, aliases, change::Change, directory},
    schema::jobs::Move,
    store::LogEntry,
};

/// Has the names of a room name another one from now on, and gives the aliases among them.
pub(crate) fn move_to(change: &mut Change, to: RoomNum) -> Result<BTreeSet<String>> {
    let mut moved = BTreeSet::new();
    change.batch.position(&LogEntry::Server);
    for alias in aliases::list(&change.batch, change.num)? {
        let Some(row) = aliases::find(&change.batch, &alias)? else { continue };
        aliases::move_to(&mut change.batch, &alias, &row, to);
        moved.insert(alias.to_string());
    }
    if directory::is_published(&change.batch, change.num)? {
        directory::publish(&mut change.batch, change.num, false);
        directory::publish(&mut change.batch, to, true);
    }
    Ok(moved)
}

/// Has the names that a replaced room still has here follow one of our users into the room that replaced it: whoever replaced it on
/// another server could not move them.
pub(crate) async fn follow(app: &App, moved: &Move) -> Result<()> {
    let snapshot = app.store.snapshot();
    let (from, to) = (rooms::find_room(&*snapshot, &moved.from)?, rooms::find_room(&*snapshot, &moved.to)?);
    let (Some(from), Some(to)) = (from, to) else { return Ok(()) };
    // Most rooms have no name here any more, and need no turn.
    if aliases::list(&*snapshot, from)?.is_empty() && !directory::is_published(&*snapshot, from)? {
        return Ok(());
    }
    commit::in_room_and_server(app, from, move |change| move_to(change, to).map(drop)).await
}
