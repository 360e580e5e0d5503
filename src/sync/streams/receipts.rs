//! The receipts of a room: how far others have read, and how far the user has on other devices.

use crate::{
    ids::Order,
    rooms::receipts,
    schema::event_types::RECEIPT,
    schema::receipts::{ReceiptKey, ReceiptRow},
    store::Fault,
    sync::window::{RoomWindow, Standing},
};

/// One answer tells at most this many receipts of one room, because an answer is held in memory.
const RECEIPTS_MAX: usize = 500;

/// Collects the receipts that were stored in a room since the client asked last. If there are too many, the oldest are
/// told, and the next answer goes on after them. A client to which the room is new is told the newest ones instead: what
/// people read long ago tells it little, and it would take many answers in a large room.
pub(crate) fn collect(room: &RoomWindow<'_, '_>) -> Result<Vec<(ReceiptKey, ReceiptRow)>, Fault> {
    let window = room.window;
    let filter = &window.ask.filter.ephemeral;
    if !filter.wants_type(RECEIPT) || !filter.wants_room(&room.row.id) {
        return Ok(Vec::new());
    }
    let user_id = window.ask.caller.user_id.as_str();
    let mut new = match room.place.standing {
        Standing::New | Standing::Returns(_) => {
            receipts::list_newest(window.read, room.num, window.upto, user_id, RECEIPTS_MAX)?
        }
        Standing::Knows(known) => {
            let after = window.receipts_from().min(known.anchor);
            let page =
                receipts::list_new(window.read, room.num, (after, window.upto), user_id, RECEIPTS_MAX)?;
            if let Some(told_upto) = page.told_upto {
                window.leave_receipts_after(told_upto);
            }
            page.receipts
        }
    };
    leave_out_ignored(room, &mut new)?;
    Ok(new)
}

/// Collects the receipts for events from an order on, and all of the user's own: those that a client is told with a timeline that
/// begins there. How far others had read before that tells it nothing, and in a large room would be most of the answer.
pub(crate) fn collect_for_events(
    room: &RoomWindow<'_, '_>,
    start: Order,
) -> Result<Vec<(ReceiptKey, ReceiptRow)>, Fault> {
    let window = room.window;
    let (span, user_id) = ((start, window.upto), window.ask.caller.user_id.as_str());
    let mut found = receipts::list_for_events(window.read, room.num, span, user_id, RECEIPTS_MAX)?;
    leave_out_ignored(room, &mut found)?;
    Ok(found)
}

fn leave_out_ignored(
    room: &RoomWindow<'_, '_>,
    receipts: &mut Vec<(ReceiptKey, ReceiptRow)>,
) -> Result<(), Fault> {
    if !receipts.is_empty() {
        let ignored = room.window.ignored()?;
        receipts.retain(|(key, _)| !ignored.contains(key.user.as_str()));
    }
    Ok(())
}
