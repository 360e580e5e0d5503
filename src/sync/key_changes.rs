//! `/keys/changes` tells what `device_lists` of `/sync` would have told from one token to another.

use std::collections::BTreeSet;

use crate::{
    json::JsonText,
    schema,
    store::Fault,
    sync::{
        changes::Changes,
        look,
        shape::v3,
        streams::device_lists::{self, DeviceLists},
        window::Window,
    },
};

/// Collects the answer, as the JSON of the response body.
pub(super) fn collect(window: &Window<'_>) -> Result<JsonText, Fault> {
    Ok(v3::show_device_lists(&list(window)?))
}

/// Lists the users whose devices changed in the window, and those whose devices no longer matter.
pub(super) fn list(window: &Window<'_>) -> Result<DeviceLists, Fault> {
    let (read, caller) = (window.read, &window.ask.caller);
    let mut changes = Changes::default();
    if window.from < window.upto {
        changes = Changes::find(
            read,
            (caller.user, caller.user_id.as_str()),
            window.from,
            window.upto,
            &BTreeSet::new(),
        )?;
        let rows = schema::ROOM.get_many(read, changes.rooms.iter().map(|(room, _)| *room))?;
        for ((num, user_row), row) in changes.rooms.iter().zip(rows) {
            let Some(row) = row else { continue };
            look::note_shares(window, (*num, &row, user_row), &mut changes.shares)?;
        }
    }
    device_lists::collect(window, &changes)
}
