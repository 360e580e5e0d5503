//! Whose device list the client must ask for again, and whose it may forget.
//!
//! Specification: client-server API, "Extensions to /sync" of end-to-end encryption.

use std::{collections::BTreeSet, ops::Bound};

use ruma::UserId;

use crate::{
    accounts,
    ids::{Order, Position, RoomNum, StateKeyNum},
    rooms::{members, state},
    schema,
    schema::{rooms::Membership, state::Ref},
    store::{Direction, Fault},
    sync::{answer::Object, streams::Window},
};

/// Members of one room that come or go with the user; of larger rooms, the rest is told when their keys change.
const MEMBERS_MAX: usize = 5_000;

/// Who came to share a room with the user since the client asked last, and who ceased to share one.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    /// Shares a room that was not shared before.
    pub(crate) came: BTreeSet<String>,
    /// Shares one room less; perhaps none.
    pub(crate) went: BTreeSet<String>,
}

impl Shares {
    /// The user came to a room: so did everybody in it.
    pub(crate) fn joined_room(&mut self, window: &Window<'_>, num: RoomNum) -> Result<(), Fault> {
        self.came.extend(list_joined(window, num, None)?);
        Ok(())
    }

    /// The user left a room: so did, for the user, everybody in it.
    pub(crate) fn left_room(&mut self, window: &Window<'_>, num: RoomNum, at: Order) -> Result<(), Fault> {
        self.went.extend(list_joined(window, num, Some(at))?);
        Ok(())
    }
}

fn list_joined(window: &Window<'_>, num: RoomNum, at: Option<Order>) -> Result<Vec<String>, Fault> {
    let mut joined = Vec::new();
    for key in members::list_keys(window.read, num)?.take(MEMBERS_MAX) {
        let (user_id, key) = key?;
        if is_joined(window, num, key, at)? {
            joined.push(user_id.to_string());
        }
    }
    Ok(joined)
}

fn is_joined(window: &Window<'_>, num: RoomNum, key: StateKeyNum, at: Option<Order>) -> Result<bool, Fault> {
    let event = match at {
        Some(order) => state::at(window.read, num, Ref::Main(order), key)?.event(),
        None => state::current(window.read, num, key)?,
    };
    let membership = event.map(|event| members::membership_of_event(window.read, num, event)).transpose()?;
    Ok(membership == Some(Membership::Join))
}

/// `device_lists`, if anything is to be said. A client that begins is told nothing: it asks for all it needs.
pub(crate) fn collect(
    window: &Window<'_>,
    any_changed: bool,
    shares: Shares,
) -> Result<Option<String>, Fault> {
    if window.since.is_none() {
        return Ok(None);
    }
    let own = window.ask.caller.user_id.as_str();
    let rooms = members::list_joined_rooms(window.read, window.ask.caller.user)?;
    let mut changed = BTreeSet::new();
    if any_changed {
        for user_id in list_changed(window)? {
            if user_id == own || shares_a_room(window, &rooms, &user_id)? {
                changed.insert(user_id);
            }
        }
    }
    changed.extend(shares.came.into_iter().filter(|user_id| user_id != own));
    let mut left = BTreeSet::new();
    for user_id in shares.went {
        if user_id != own && !shares_a_room(window, &rooms, &user_id)? {
            changed.remove(&user_id);
            left.insert(user_id);
        }
    }
    if changed.is_empty() && left.is_empty() {
        return Ok(None);
    }
    let mut lists = Object::new();
    lists.texts("changed", changed);
    lists.texts("left", left);
    Ok(Some(lists.finish()))
}

/// Whose device list changed since the client asked last.
fn list_changed(window: &Window<'_>) -> Result<BTreeSet<String>, Fault> {
    let mut changed = BTreeSet::new();
    if window.from >= window.upto {
        return Ok(changed);
    }
    let (low, high) = (Bound::Excluded(window.from), Bound::Included(window.upto));
    for row in schema::DEVICE_LOG.range::<Position>(window.read, low, high, Direction::Up)? {
        let (position, user_id) = row?;
        if schema::DEVICE_CHANGED.get(window.read, &user_id)? == Some(position) {
            changed.insert(user_id);
        }
    }
    Ok(changed)
}

fn shares_a_room(window: &Window<'_>, rooms: &[RoomNum], user_id: &str) -> Result<bool, Fault> {
    let Ok(parsed) = <&UserId>::try_from(user_id) else { return Ok(false) };
    if let Some(user) = accounts::users::find_num(window.read, parsed)? {
        let theirs = schema::USER_ROOM.get_many(window.read, rooms.iter().map(|room| (user, *room)))?;
        return Ok(theirs.iter().flatten().any(|row| row.membership == Membership::Join));
    }
    for room in rooms {
        if let Some(key) = state::find_key(window.read, *room, "m.room.member", user_id)?
            && is_joined(window, *room, key, None)?
        {
            return Ok(true);
        }
    }
    Ok(false)
}
