//! Says which users' device lists the client must ask for again, and which it may forget.
//!
//! Specification: client-server API, "Extensions to /sync" of end-to-end encryption.

use std::collections::BTreeSet;

use crate::{
    encryption,
    rooms::members,
    store::Fault,
    sync::{changes::Changes, shares, window::Window},
};

/// The users that `device_lists` of an answer names, by id.
#[derive(Debug, Default)]
pub(crate) struct DeviceLists {
    /// Users whose devices changed, or who came to share a room with the user.
    pub(crate) changed: BTreeSet<String>,
    /// Users with whom the user shares no room any more.
    pub(crate) left: BTreeSet<String>,
}

impl DeviceLists {
    /// Whether there is nothing to say.
    pub(crate) fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.left.is_empty()
    }
}

/// Collects the users whose device lists changed, and those whose no longer matter. A client that begins is told of
/// nobody, because it asks for all lists that it needs.
pub(crate) fn collect(window: &Window<'_>, changes: &Changes) -> Result<DeviceLists, Fault> {
    let mut lists = DeviceLists::default();
    if window.since.is_none() {
        return Ok(lists);
    }
    if changes.own_keys {
        let (user, after) = (window.ask.caller.user, window.from);
        let signed = encryption::cross_signing::list_signed(window.read, user, after, window.upto)?;
        lists.changed.extend(signed);
    }
    if !changes.device_lists && changes.shares.is_empty() {
        return Ok(lists);
    }
    let own = &*window.ask.caller.user_id;
    let rooms = members::list_joined_rooms(window.read, window.ask.caller.user)?;
    if changes.device_lists {
        let span = (window.from, window.upto);
        lists.changed.append(&mut shares::list_changed(window.read, own, &rooms, span)?);
    }
    // A user who joins a room with others shares it with their own other devices, too, which must learn of each other.
    let came = &changes.shares.came;
    if came.iter().any(|user_id| user_id != own.as_str()) {
        lists.changed.extend(came.iter().cloned());
    }
    let mut went = changes.shares.went.clone();
    went.remove(own.as_str());
    let still = shares::list_in_any(window.read, &rooms, went.clone())?;
    for user_id in went.difference(&still) {
        lists.changed.remove(user_id);
        lists.left.insert(user_id.clone());
    }
    Ok(lists)
}
