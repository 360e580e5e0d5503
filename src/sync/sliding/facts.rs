//! The facts of rooms that lists ask for, remembered: a list is held against all rooms of its user at each poll, and most of them have not
//! changed since the last.

use std::sync::Arc;

use quick_cache::sync::Cache;

use crate::{
    ids::{EventNum, Order, RoomNum, UserNum},
    rooms::{self, event},
    schema::{
        event_types::{CREATE, ENCRYPTION},
        rooms::RoomRow,
    },
    store::{Fault, Read},
    sync::collect::sliding,
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

/// The facts of rooms, by the orders of a room's newest event and of the newest change of its state: with any event they are
/// read anew.
pub(crate) struct Facts {
    rooms: Cache<RoomNum, (Order, Order, Arc<RoomFacts>)>,
    kicks: Cache<(UserNum, RoomNum), (EventNum, bool)>,
}

impl Default for Facts {
    fn default() -> Self {
        Self { rooms: Cache::new(ENTRIES_MAX), kicks: Cache::new(ENTRIES_MAX) }
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

    /// Whether this event, by which a user is no longer in a room, is somebody else's. What an event says never changes.
    pub(crate) fn is_kick(
        &self,
        read: &(impl Read + ?Sized),
        user: UserNum,
        room: RoomNum,
        by: EventNum,
    ) -> Result<bool, Fault> {
        if let Some((event, is_kick)) = self.kicks.get(&(user, room))
            && event == by
        {
            return Ok(is_kick);
        }
        let is_kick = event::find_anywhere(read, room, by)?.is_some_and(|stored| sliding::is_kick(&stored));
        self.kicks.insert((user, room), (by, is_kick));
        Ok(is_kick)
    }
}

/// Reads the type of a room from the content of the event that created it.
pub(crate) fn room_type(content: &str) -> Option<String> {
    let content: serde_json::Value = serde_json::from_str(content).ok()?;
    let text = content.get("type")?.as_str()?;
    (text.len() <= TYPE_BYTES_MAX).then(|| text.to_owned())
}
