//! The users who are typing in a room.

use crate::{
    schema::event_types::TYPING,
    store::Fault,
    sync::window::{RoomWindow, Standing},
};

/// Collects the users who type in a room, if that changed. A client that does not know the room is told only if
/// somebody types. A client that knew the room in an earlier stay of its user, or comes from another run of the server,
/// is told in any case, because it may believe that somebody types who stopped.
pub(crate) fn collect(room: &RoomWindow<'_, '_>) -> Result<Option<Vec<String>>, Fault> {
    let window = room.window;
    let filter = &window.ask.filter.ephemeral;
    if !filter.wants_type(TYPING) || !filter.wants_room(&room.row.id) {
        return Ok(None);
    }
    let knows_room = matches!(room.place.standing, Standing::Knows(_));
    let changed = window.moment.typing.iter().find(|(num, _)| *num == room.num).map(|(_, typists)| typists);
    let mut typists = match changed {
        Some(typists) => typists.clone(),
        None if knows_room && !window.is_other_run() => return Ok(None),
        None => window.ephemeral.read(|board| board.typing.list(room.num)),
    };
    if typists.is_empty() && matches!(room.place.standing, Standing::New | Standing::Returns(None)) {
        return Ok(None);
    }
    let ignored = window.ignored()?;
    typists.retain(|user_id| !ignored.contains(user_id));
    Ok(Some(typists))
}
