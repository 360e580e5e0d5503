//! Finds the few members that a client names a room after, and counts the members.
//!
//! Specification: client-server API, `summary` of `/sync`.

use std::ops::ControlFlow;

use ruma::UserId;

use crate::{
    accounts::users,
    ids::{EventNum, UserNum},
    rooms::{self, event::StoredEvent, members},
    schema::event_types::{CANONICAL_ALIAS, NAME},
    schema::rooms::Membership,
    store::Fault,
    sync::window::RoomWindow,
};

/// A client names a room without a name after at most this many users.
const HEROES: usize = 5;
/// No more members than this are compared by when they came; in a larger room, any of them may be heroes.
const COMPARED_MAX: usize = 100;
/// Look at no more than this many users who are or were in a room to find heroes: reading that many takes about a second. Users
/// of this server come from a list of their own and do not count.
const LOOKED_AT_MAX: usize = 100_000;
/// The first members are read this many at a time, because a few may be enough.
const FIRST_AT_ONCE: usize = 16;
/// Further members are read at most this many at a time, which costs less than one by one.
const MEMBERS_AT_ONCE: usize = 500;

/// The members that clients name a room after, and how many members there are.
#[derive(Debug)]
pub(crate) struct Summary {
    /// The ids of the members after whom a client names the room. None if the room has a name.
    pub(crate) heroes: Option<Vec<String>>,
    /// How many users are joined, on all servers.
    pub(crate) joined: u32,
    /// How many users are invited, on all servers.
    pub(crate) invited: u32,
}

/// The events that give a room a name, each with the field of its content that does.
const NAMES: [(&str, &str); 2] = [(NAME, "name"), (CANONICAL_ALIAS, "alias")];

/// Counts the members of a room, and lists those after whom a client names it.
pub(crate) fn summary(room: &RoomWindow<'_, '_>) -> Result<Summary, Fault> {
    for (event_type, field) in NAMES {
        let stored = rooms::find_state(room.window.read, room.num, event_type, "")?;
        if stored.is_some_and(|stored| names_room(&stored, field)) {
            return with_name(room, true);
        }
    }
    with_name(room, false)
}

/// Does the same from the events that the client is told, which are the whole state and then those of the timeline.
pub(crate) fn summary_of<'e>(
    room: &RoomWindow<'_, '_>,
    told: impl Iterator<Item = &'e StoredEvent>,
) -> Result<Summary, Fault> {
    let mut named = [false; NAMES.len()];
    for stored in told.filter(|stored| stored.row.state_key().as_deref() == Some("")) {
        for (is_named, (event_type, field)) in named.iter_mut().zip(NAMES) {
            if stored.row.event_type() == event_type {
                *is_named = names_room(stored, field);
            }
        }
    }
    with_name(room, named.contains(&true))
}

fn with_name(room: &RoomWindow<'_, '_>, is_named: bool) -> Result<Summary, Fault> {
    let heroes = if is_named { None } else { Some(list(room)?) };
    Ok(Summary { heroes, joined: room.row.joined, invited: room.row.invited })
}

fn names_room(stored: &StoredEvent, field: &str) -> bool {
    let content: serde_json::Value = serde_json::from_str(stored.row.content()).unwrap_or_default();
    content.get(field).and_then(|text| text.as_str()).is_some_and(|text| !text.is_empty())
}

/// Whether the event that named the room was redacted since the client knew the room. It then still is the room's state,
/// but names nothing any more.
pub(super) fn lost_name(room: &RoomWindow<'_, '_>) -> Result<bool, Fault> {
    let Some(known) = room.place.known() else { return Ok(false) };
    for (event_type, _) in NAMES {
        let stored = rooms::find_state(room.window.read, room.num, event_type, "")?;
        if let Some(redaction) = stored.and_then(|stored| stored.row.header.redacted_by)
            && super::order_of(room.window, room.num, redaction)?.is_some_and(|order| order > known)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Lists the users who are joined or invited, without the caller, by when they came; if there are none, users who were.
fn list(room: &RoomWindow<'_, '_>) -> Result<Vec<String>, Fault> {
    let caller = &room.window.ask.caller;
    let others = (room.row.joined as usize + room.row.invited as usize).saturating_sub(1);
    let wanted = others.min(HEROES);
    let (mut here, mut gone) = (Vec::new(), Vec::new());
    let mut local_count = 0;
    if wanted > 0 {
        // Users of this server are listed first, because that costs the same however many others were banned.
        (here, local_count) = list_local(room)?;
    }
    let is_small = others <= COMPARED_MAX;
    if here.len() < wanted || others == 0 || (is_small && local_count < others) {
        let mut found = local_count;
        for_each_member(room, |user_id, event, membership| {
            if others > 0 && user_id.server_name() == caller.user_id.server_name() {
                return ControlFlow::Continue(());
            }
            match membership {
                Membership::Join | Membership::Invite => {
                    found += 1;
                    here.push((event, user_id.to_string()));
                }
                Membership::Leave | Membership::Ban if gone.len() < COMPARED_MAX => {
                    gone.push((event, user_id.to_string()));
                }
                Membership::Leave | Membership::Ban | Membership::Knock => {}
            }
            let is_enough = if is_small { found >= others } else { here.len() >= wanted };
            if (others > 0 && is_enough) || (others == 0 && gone.len() == COMPARED_MAX) {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        })?;
    }
    let mut heroes = if here.is_empty() { gone } else { here };
    heroes.sort_unstable();
    heroes.truncate(HEROES);
    Ok(heroes.into_iter().map(|(_, user_id)| user_id).collect())
}

/// Visits those who are or were in a room, without the caller, rising by user id, each with their membership and the event that
/// says so. It goes on until `visit` breaks off, or until it has looked at too many.
fn for_each_member(
    room: &RoomWindow<'_, '_>,
    mut visit: impl FnMut(&UserId, EventNum, Membership) -> ControlFlow<()>,
) -> Result<(), Fault> {
    let (read, caller) = (room.window.read, &room.window.ask.caller);
    let mut looked_at = 0;
    members::walk(read, room.num, (FIRST_AT_ONCE, MEMBERS_AT_ONCE), |members| {
        if looked_at >= LOOKED_AT_MAX {
            tracing::debug!(room = room.num.0, reason = "too many members", "heroes of a room are left out");
            return Ok(ControlFlow::Break(()));
        }
        looked_at += members.len();
        let keys = members.iter().map(|(_, key)| *key).collect();
        let memberships = members::list_memberships(read, room.num, keys, None)?;
        for (user_id, key) in members {
            let (Ok(user_id), Some((event, membership))) =
                (<&UserId>::try_from(user_id.as_str()), memberships.get(key))
            else {
                continue;
            };
            if user_id != caller.user_id && visit(user_id, *event, *membership).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    })
}

/// Lists the users of this server who came first and are joined or invited, without the caller, each with the event by
/// which they are. Says also how many there are, of those compared.
fn list_local(room: &RoomWindow<'_, '_>) -> Result<(Vec<(EventNum, String)>, usize), Fault> {
    let (read, caller) = (room.window.read, &room.window.ask.caller);
    let mut users = members::list_present_local_users(read, room.num, COMPARED_MAX + 1)?;
    users.retain(|user| *user != caller.user);
    let rows = members::find_all(read, room.num, &users)?;
    let mut present: Vec<(EventNum, UserNum)> =
        users.into_iter().zip(rows).filter_map(|(user, row)| Some((row?.event, user))).collect();
    present.sort_unstable();
    let mut first = Vec::with_capacity(HEROES);
    for (event, user) in present.iter().take(HEROES) {
        if let Some(account) = users::find(read, *user)? {
            first.push((*event, account.user_id.to_string()));
        }
    }
    Ok((first, present.len()))
}
