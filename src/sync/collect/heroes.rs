//! Finds the few members that a client names a room after, and counts the members.
//!
//! Specification: client-server API, `summary` of `/sync`.

use crate::{
    accounts::users,
    ids::StateKeyNum,
    rooms::{self, event::StoredEvent, members, state},
    schema::event_types::{CANONICAL_ALIAS, NAME},
    schema::rooms::Membership,
    store::Fault,
    sync::window::RoomWindow,
};

/// A client names a room without a name after at most this many users.
const HEROES: usize = 5;
/// Look at no more than this many members to find heroes. Users of this server come from a list of their own and do not
/// count.
const LOOKED_AT_MAX: usize = 1_000;

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
    let mut is_named = false;
    for (event_type, field) in NAMES {
        let stored = rooms::find_state(room.window.read, room.num, event_type, "")?;
        is_named |= stored.is_some_and(|stored| names_room(&stored, field));
    }
    with_name(room, is_named)
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

/// Lists users who are joined or invited, without the caller; if there are none, users who were.
fn list(room: &RoomWindow<'_, '_>) -> Result<Vec<String>, Fault> {
    let (read, caller) = (room.window.read, &room.window.ask.caller);
    let others = (room.row.joined as usize + room.row.invited as usize).saturating_sub(1);
    let wanted = others.min(HEROES);
    let mut here = Vec::new();
    if wanted > 0 {
        // Users of this server are listed first, because that costs the same however many others were banned.
        for user in members::list_present_local_users(read, room.num, HEROES + 1)? {
            if user != caller.user
                && let Some(account) = users::find(read, user)?
            {
                here.push(account.user_id.to_string());
            }
        }
        here.truncate(HEROES);
    }
    let mut gone = Vec::new();
    if here.len() < wanted || others == 0 {
        for key in members::list_keys(read, room.num)?.take(LOOKED_AT_MAX) {
            let (user_id, key) = key?;
            if user_id == caller.user_id || here.iter().any(|known| *known == user_id) {
                continue;
            }
            match membership(room, key)? {
                Some(Membership::Join | Membership::Invite) => here.push(user_id.to_string()),
                Some(Membership::Leave | Membership::Ban) if gone.len() < HEROES => {
                    gone.push(user_id.to_string());
                }
                _ => {}
            }
            if here.len() >= wanted.max(1) || (others == 0 && gone.len() == HEROES) {
                break;
            }
        }
    }
    here.sort_unstable();
    Ok(if here.is_empty() { gone } else { here })
}

fn membership(room: &RoomWindow<'_, '_>, key: StateKeyNum) -> Result<Option<Membership>, Fault> {
    let event = state::current(room.window.read, room.num, key)?;
    event.map(|event| members::membership_of_event(room.window.read, room.num, event)).transpose()
}
