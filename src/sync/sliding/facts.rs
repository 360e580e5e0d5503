//! The facts of rooms that lists ask for, remembered: a list is held against all rooms of its user at each poll, and most of them have not
//! changed since the last.

use std::sync::Arc;

use quick_cache::sync::Cache;

use crate::{
    ids::{EventNum, Order, RoomNum, UserNum},
    rooms,
    schema::{
        event_types::{CREATE, ENCRYPTION},
        rooms::{RoomRow, UserRoomRow},
    },
    store::{Fault, Read},
    sync::{look, window::Window},
};

/// Remember at most this many rooms, and as many endings of stays, because each takes memory.
const ENTRIES_MAX: usize = 50_000;
/// A longer type is not remembered as it is: no client asks for one.
const TYPE_BYTES_MAX: usize = 255;

/// The facts that a list asks of the state of a room.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RoomFacts {
    /// The type that the room was created with.
    pub(crate) room_type: Option<String>,
    /// Whether the room is encrypted.
    pub(crate) is_encrypted: bool,
}

/// The order at which a stay ended, and the newest member event of its user.
type StayEnd = (Order, EventNum);

/// The facts of rooms, by the orders of a room's newest event and of the newest change of its state: with any event they are
/// read anew.
pub(crate) struct Facts {
    rooms: Cache<RoomNum, (Order, Order, Arc<RoomFacts>)>,
    /// Whether somebody else ended a stay, by its end and the member event that is the newest now.
    removals: Cache<(UserNum, RoomNum), (StayEnd, bool)>,
}

impl Default for Facts {
    fn default() -> Self {
        Self { rooms: Cache::new(ENTRIES_MAX), removals: Cache::new(ENTRIES_MAX) }
    }
}

impl Facts {
    /// Reads the facts of a room.
    pub(crate) fn of(
        &self,
        read: &(impl Read + ?Sized),
        num: RoomNum,
        row: &RoomRow,
    ) -> Result<Arc<RoomFacts>, Fault> {
        if let Some((tip, state_tip, facts)) = self.rooms.get(&num)
            && (tip, state_tip) == (row.tip, row.state_tip)
        {
            return Ok(facts);
        }
        let create = rooms::find_state(read, num, CREATE, "")?;
        let is_encrypted = rooms::find_state(read, num, ENCRYPTION, "")?.is_some();
        let room_type = create.and_then(|create| room_type(create.row.content()));
        let facts = Arc::new(RoomFacts { room_type, is_encrypted });
        self.rooms.insert(num, (row.tip, row.state_tip, Arc::clone(&facts)));
        Ok(facts)
    }

    /// Whether somebody else ended the user's last stay in a room ([`look::was_removed`]).
    pub(crate) fn was_removed(
        &self,
        window: &Window<'_>,
        room: RoomNum,
        user_row: &UserRoomRow,
    ) -> Result<bool, Fault> {
        let Some(left) = user_row.left else { return Ok(false) };
        let (key, end) = ((window.caller().user, room), (left, user_row.event));
        if let Some((known, was_removed)) = self.removals.get(&key)
            && known == end
        {
            return Ok(was_removed);
        }
        let was_removed = look::was_removed(window, room, user_row)?;
        self.removals.insert(key, (end, was_removed));
        Ok(was_removed)
    }
}

/// Reads the type of a room from the content of the event that created it.
pub(crate) fn room_type(content: &str) -> Option<String> {
    let content: serde_json::Value = serde_json::from_str(content).ok()?;
    let text = content.get("type")?.as_str()?;
    (text.len() <= TYPE_BYTES_MAX).then(|| text.to_owned())
}
