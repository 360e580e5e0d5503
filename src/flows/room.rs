//! Use cases of rooms: people make, enter, read and leave them, and events are written to them.

pub(crate) mod aliases;
pub mod base;
pub mod completing;
pub(crate) mod create;
pub(crate) mod delayed;
pub(crate) mod directory;
pub(crate) mod expire;
pub(crate) mod guests;
pub(crate) mod hierarchy;
pub mod ingest;
pub(crate) mod look;
pub(crate) mod membership;
pub(crate) mod names;
pub mod presence;
pub mod receipts;
pub(crate) mod search;
pub(crate) mod send;
pub mod typing;
pub(crate) mod upgrade;

use ruma::RoomId;

use crate::{
    accounts::Caller,
    error::{Error, Refusal, Result},
    flows::App,
    ids::{RoomNum, UserNum},
    rooms::{self, members},
    store::Snapshot,
};

/// The number of a room that the caller is in. Errors: 403 `M_FORBIDDEN` for any other room.
pub(crate) fn require_joined(read: &Snapshot, user: UserNum, room: &RoomId) -> Result<RoomNum> {
    let not_in_room = || Error::from(Refusal::forbidden("You are not in this room."));
    let num = rooms::find_room(read, room)?.ok_or_else(not_in_room)?;
    if members::is_joined(read, user, num)? { Ok(num) } else { Err(not_in_room()) }
}

/// Refuses a room that the caller is not in with 403 `M_FORBIDDEN`.
pub fn require_in_room(app: &App, caller: &Caller, room: &RoomId) -> Result<()> {
    require_joined(&app.store.snapshot(), caller.user, room).map(|_| ())
}
