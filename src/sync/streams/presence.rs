//! Who is there, of those who share a room with the user.

use std::collections::BTreeSet;

use crate::{
    accounts,
    ids::RoomNum,
    rooms::members,
    store::Fault,
    sync::{answer::Object, streams::Window},
};

/// Users in one answer: those whose presence changed last.
const USERS_MAX: usize = 500;

/// `m.presence` events.
pub(crate) fn collect(window: &Window<'_>) -> Result<Vec<String>, Fault> {
    let filter = &window.ask.filter.presence;
    if window.moment.presence.is_empty() || !filter.wants_type("m.presence") {
        return Ok(Vec::new());
    }
    let caller = &window.ask.caller;
    let own: BTreeSet<RoomNum> = members::list_joined_rooms(window.read, caller.user)?.into_iter().collect();
    let mut events = Vec::new();
    for (user, presence) in window.moment.presence.iter().rev() {
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
