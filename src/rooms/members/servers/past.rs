//! The servers that had somebody in a room at any state of it, and those that ever had.

use std::{collections::BTreeSet, ops::Bound};

use super::{Moves, was_on_main_line};
use crate::{
    ids::RoomNum,
    rooms::{
        event,
        members::list_keys,
        state::{self, StateRef, StateValue},
    },
    schema,
    schema::event_types::{DERIVED_JOINED as JOINED, DERIVED_SERVER as SERVER},
    store::{Direction, Fault, Read},
};

/// Whether a server has somebody in the room in this state.
pub fn was_server_joined(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    at: StateRef,
    server: &str,
) -> Result<bool, Fault> {
    let moves = Moves::to(read, room, at)?;
    let was_in = was_on_main_line(read, room, moves.base, server)?;
    Ok(moves.leave_in(server, was_in))
}

/// Lists the servers that have somebody in the room in this state, sorted. Costs as much as there are servers that ever
/// had somebody, and for the state of a fork as much as it differs in.
pub fn list_servers_at(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    at: StateRef,
) -> Result<Vec<String>, Fault> {
    let moves = Moves::to(read, room, at)?;
    let bound = Bound::Included((room, SERVER));
    let rows = schema::STATE_KEY_NUM.range::<(RoomNum, String)>(read, bound, bound, Direction::Up)?;
    let mut servers: BTreeSet<String> = moves.came.keys().cloned().collect();
    for row in rows {
        let ((_, _, server), key) = row?;
        let was_in = state::at(read, room, StateRef::Main(moves.base), key)?.is_derived();
        if moves.leave_in(&server, was_in) {
            servers.insert(server);
        }
    }
    Ok(servers.into_iter().collect())
}

/// Lists the servers of all who are or were something to the room, as far as they are known.
pub fn list_servers_ever(read: &(impl Read + ?Sized), room: RoomNum) -> Result<BTreeSet<String>, Fault> {
    let mut servers = BTreeSet::new();
    for row in list_keys(read, room)? {
        let (user_id, _) = row?;
        if let Some(server) = event::server_of(&user_id)
            && !servers.contains(server)
        {
            servers.insert(server.to_owned());
        }
    }
    Ok(servers)
}

/// Counts the members who are joined in this state.
pub fn count_joined_at(read: &(impl Read + ?Sized), room: RoomNum, at: StateRef) -> Result<u64, Fault> {
    let moves = Moves::to(read, room, at)?;
    let joined = match state::find_key(read, room, JOINED, "")? {
        Some(key) => match state::at(read, room, StateRef::Main(moves.base), key)? {
            StateValue::Derived(joined) => u64::from(joined),
            _ => 0,
        },
        None => 0,
    };
    Ok(joined.saturating_add_signed(moves.joined))
}
