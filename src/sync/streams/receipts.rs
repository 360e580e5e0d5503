//! How far others have read, and the user on other devices.

use crate::{
    ids::{Position, RoomNum},
    rooms::receipts,
    schema::rooms::RoomRow,
    store::Fault,
    sync::{answer::plain_event, streams::Window},
};

/// Receipts of one room in one answer: the newest.
const RECEIPTS_MAX: usize = 500;

/// `m.receipt` events of what was stored after `known`.
pub(crate) fn collect(
    window: &Window<'_>,
    num: RoomNum,
    row: &RoomRow,
    known: Position,
) -> Result<Vec<String>, Fault> {
    let filter = &window.ask.filter.ephemeral;
    if !filter.wants_type("m.receipt") || !filter.wants_room(&row.id) {
        return Ok(Vec::new());
    }
    let user_id = window.ask.caller.user_id.as_str();
    let mut new = receipts::list_new(window.read, num, (known, window.upto), user_id, RECEIPTS_MAX)?;
    new.retain(|(key, _)| !window.ignores(&key.user));
    let contents = receipts::contents(&new);
    Ok(contents.iter().map(|content| plain_event("m.receipt", &content.to_string())).collect())
}
