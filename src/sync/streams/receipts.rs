//! The receipts of a room: how far others have read, and how far the user has on other devices.

use crate::{
    rooms::receipts,
    schema::event_types::RECEIPT,
    schema::receipts::{ReceiptKey, ReceiptRow},
    store::Fault,
    sync::window::RoomWindow,
};

/// One answer tells at most this many receipts of one room, namely the newest.
const RECEIPTS_MAX: usize = 500;

/// Collects the receipts that were stored in a room since the client asked last.
pub(crate) fn collect(room: &RoomWindow<'_, '_>) -> Result<Vec<(ReceiptKey, ReceiptRow)>, Fault> {
    let window = room.window;
    let filter = &window.ask.filter.ephemeral;
    if !filter.wants_type(RECEIPT) || !filter.wants_room(&room.row.id) {
        return Ok(Vec::new());
    }
    let (span, user_id) = ((room.place.known_position(), window.upto), window.ask.caller.user_id.as_str());
    let mut new = receipts::list_new(window.read, room.num, span, user_id, RECEIPTS_MAX)?;
    if !new.is_empty() {
        let ignored = window.ignored()?;
        new.retain(|(key, _)| !ignored.contains(key.user.as_str()));
    }
    Ok(new)
}
