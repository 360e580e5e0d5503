//! Who is there, of those who share a room with the user.

use std::collections::BTreeSet;

use ruma::UserId;

use crate::{
    accounts::{self, presence::Presence},
    ids::{RoomNum, UserNum},
    rooms::members,
    store::Fault,
    sync::{answer::Object, streams::Window},
};

/// Users in one answer: those whose presence changed last.
const USERS_MAX: usize = 500;

/// `m.presence` events: of those whose presence changed, and of those who `came` to share a room with the user.
pub(crate) fn collect(window: &Window<'_>, came: &BTreeSet<String>) -> Result<Vec<String>, Fault> {
    let filter = &window.ask.filter.presence;
    if (window.moment.presence.is_empty() && came.is_empty()) || !filter.wants_type("m.presence") {
        return Ok(Vec::new());
    }
    let caller = &window.ask.caller;
    let own: BTreeSet<RoomNum> = members::list_joined_rooms(window.read, caller.user)?.into_iter().collect();
    let mut events = Vec::new();
    let mut present = list_present(window, came)?;
    let known: BTreeSet<UserNum> = present.iter().map(|(user, _)| *user).collect();
    present.extend(window.moment.presence.iter().rev().filter(|(user, _)| !known.contains(user)).cloned());
    for (user, presence) in &present {
        let shares = *user == caller.user
            || members::list_joined_rooms(window.read, *user)?.iter().any(|room| own.contains(room));
        if !shares {
            continue;
        }
        let Some(account) = accounts::users::find(window.read, *user)? else { continue };
        if !filter.wants_sender(&account.user_id) || window.ignores(&account.user_id) {
            continue;
        }
        let mut event = Object::new();
        event.text("type", "m.presence");
        event.text("sender", &account.user_id);
        event.raw("content", &presence.content(window.now_ms).to_string());
        events.push(event.finish());
        if events.len() == USERS_MAX {
            break;
        }
    }
    Ok(events)
}

fn list_present(window: &Window<'_>, came: &BTreeSet<String>) -> Result<Vec<(UserNum, Presence)>, Fault> {
    let mut present = Vec::new();
    for user_id in came.iter().take(USERS_MAX) {
        let Ok(user_id) = <&UserId>::try_from(user_id.as_str()) else { continue };
        if let Some(user) = accounts::users::find_num(window.read, user_id)?
            && let Some(presence) = window.ephemeral.read(|board| board.presence.find(user))
        {
            present.push((user, presence));
        }
    }
    Ok(present)
}
