//! Who is typing.

use crate::{
    ids::RoomNum,
    schema::rooms::RoomRow,
    sync::{
        answer::{Object, plain_event},
        streams::Window,
    },
};

/// An `m.typing` event, if the typists of this room changed. A client that does not know the room is told only if
/// somebody types.
pub(crate) fn collect(window: &Window<'_>, num: RoomNum, row: &RoomRow, knows_room: bool) -> Option<String> {
    let filter = &window.ask.filter.ephemeral;
    if !filter.wants_type("m.typing") || !filter.wants_room(&row.id) {
        return None;
    }
    let typists = if knows_room {
        window.moment.typing.iter().find(|(room, _)| *room == num)?.1.clone()
    } else {
        window.ephemeral.read(|board| board.typing.list(num))
    };
    if typists.is_empty() && !knows_room {
        return None;
    }
    let mut content = Object::new();
    content.texts("user_ids", typists.iter().filter(|user_id| !window.ignores(user_id)));
    Some(plain_event("m.typing", &content.finish()))
}
