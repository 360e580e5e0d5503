//! `/keys/changes` tells what `device_lists` of `/sync` would have told from one token to another.

use std::collections::BTreeSet;

use crate::{
    json::JsonText,
    rooms::visibility::Reader,
    schema,
    schema::rooms::Membership,
    store::Fault,
    sync::{
        changes::Changes,
        collect, look,
        shape::v3,
        streams::device_lists,
        window::{RoomWindow, Window},
    },
};

/// Collects the answer, as the JSON of the response body.
pub(super) fn collect(window: &Window<'_>) -> Result<JsonText, Fault> {
    let (read, caller) = (window.read, &window.ask.caller);
    let mut changes = Changes::default();
    if window.from < window.upto {
        changes = Changes::find(read, caller.user, window.from, window.upto, &BTreeSet::new())?;
        let rows = schema::ROOM.get_many(read, changes.rooms.iter().map(|(room, _)| *room))?;
        for ((num, user_row), row) in changes.rooms.iter().zip(rows) {
            let Some(row) = row else { continue };
            look::note_left(window, *num, user_row, &mut changes.shares)?;
            if user_row.membership == Membership::Join {
                let reader = Reader::with_row(*num, &caller.user_id, user_row, window.ignored()?.clone());
                let place = look::place(window, *num, user_row, &reader)?;
                let room = RoomWindow { window, num: *num, row: &row, user_row, place, reader: &reader };
                collect::shares(&room, &mut changes.shares)?;
            }
        }
    }
    Ok(v3::show_device_lists(&device_lists::collect(window, &changes)?))
}
