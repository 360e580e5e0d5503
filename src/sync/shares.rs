//! Finds who came to share a room with the user since the client asked last, and who ceased to. Device lists and
//! presence follow from it.

use std::collections::BTreeSet;

use ruma::UserId;

use crate::{
    accounts,
    ids::{Order, RoomNum, StateKeyNum},
    rooms::{members, state},
    schema::event_types::MEMBER,
    schema::{rooms::Membership, state::StateRef},
    store::Fault,
    sync::window::Window,
};

/// List at most this many members of a room that the user joins or leaves; of the others the client hears when their
/// keys change.
const MEMBERS_MAX: usize = 5_000;
/// Look at no more than this many users who were ever in such a room, because each costs a few reads.
const LOOKED_AT_MAX: usize = 100_000;

/// The users who came to share a room with the user since the client asked last, and those who ceased to.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    /// Users who share a room with the user that was not shared before.
    pub(crate) came: BTreeSet<String>,
    /// Users who share one room less with the user, and perhaps none any more.
    pub(crate) went: BTreeSet<String>,
}

impl Shares {
    /// Notes everybody in a room that the user joined: the user now shares it with them.
    pub(crate) fn joined_room(&mut self, window: &Window<'_>, num: RoomNum) -> Result<(), Fault> {
        self.came.extend(list_joined(window, num, None)?);
        Ok(())
    }

    /// Notes everybody who was in a room at an order at which the user was in it: the user no longer shares it with them.
    pub(crate) fn left_room(&mut self, window: &Window<'_>, num: RoomNum, at: Order) -> Result<(), Fault> {
        self.went.extend(list_joined(window, num, Some(at))?);
        Ok(())
    }

    /// Whether nobody came and nobody went.
    pub(crate) fn is_empty(&self) -> bool {
        self.came.is_empty() && self.went.is_empty()
    }
}

fn list_joined(window: &Window<'_>, num: RoomNum, at: Option<Order>) -> Result<Vec<String>, Fault> {
    let mut joined = Vec::new();
    for key in members::list_keys(window.read, num)?.take(LOOKED_AT_MAX) {
        let (user_id, key) = key?;
        // Users who are gone do not count, so that nobody hides members behind them.
        if is_joined(window, num, key, at)? {
            joined.push(user_id.to_string());
        }
        if joined.len() == MEMBERS_MAX {
            tracing::debug!(room = num.0, reason = "too many members", "members of a room are left out");
            break;
        }
    }
    Ok(joined)
}

fn is_joined(window: &Window<'_>, num: RoomNum, key: StateKeyNum, at: Option<Order>) -> Result<bool, Fault> {
    let event = match at {
        Some(order) => state::at(window.read, num, StateRef::Main(order), key)?.event(),
        None => state::current(window.read, num, key)?,
    };
    let membership = event.map(|event| members::membership_of_event(window.read, num, event)).transpose()?;
    Ok(membership == Some(Membership::Join))
}

/// Whether a user is joined to any of these rooms.
pub(crate) fn is_in_any(window: &Window<'_>, rooms: &[RoomNum], user_id: &str) -> Result<bool, Fault> {
    let Ok(parsed) = <&UserId>::try_from(user_id) else { return Ok(false) };
    if let Some(user) = accounts::users::find_num(window.read, parsed)? {
        let theirs = members::find_many(window.read, user, rooms.iter().copied())?;
        return Ok(theirs.iter().flatten().any(|row| row.membership == Membership::Join));
    }
    for room in rooms {
        if let Some(key) = state::find_key(window.read, *room, MEMBER, user_id)?
            && is_joined(window, *room, key, None)?
        {
            return Ok(true);
        }
    }
    Ok(false)
}
