//! Looks whether an event is to be told to a user who is away, be it by a push gateway or by a mail: just before it is, because much may
//! have happened since it came.

use std::cell::RefCell;

use ruma::UserId;

use crate::{
    ids::{Order, Position, RoomNum, UserNum},
    push::{Push, Reader, notice::Told, reader::Explained},
    rooms::{
        self,
        event::{self, StoredEvent},
        relations::edits,
        visibility::Sight,
    },
    schema::{self, rooms::RoomRow},
    store::{Fault, Read, tail},
};

/// The part of what is to be told that is known before it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hint {
    pub(super) highlights: bool,
    pub(super) is_invitation: bool,
    /// When the sender says that it was sent, in milliseconds since the epoch.
    pub(super) sent_ms: u64,
}

/// One look at the events of a user's rooms.
pub(super) struct Looker<'a, R: ?Sized> {
    pub(super) read: &'a R,
    pub(super) reader: Reader<'a>,
    user: UserNum,
    user_id: &'a UserId,
    /// Everything at or before this position is too old.
    pub(super) oldest: Position,
    oldest_ms: u64,
}

impl<'a, R: Read + ?Sized> Looker<'a, R> {
    /// A look for news that came after `oldest_ms` (milliseconds since the epoch).
    pub(super) fn new(
        read: &'a R,
        push: &'a Push,
        (user, user_id): (UserNum, &'a UserId),
        oldest_ms: u64,
    ) -> Result<Self, Fault> {
        let (reader, oldest) = (push.reader(read, user, user_id)?, tail::position_at(read, oldest_ms)?);
        Ok(Self { read, reader, user, user_id, oldest, oldest_ms })
    }

    /// Finds what is to be told of the event, or the invitation from outside, at this position.
    pub(super) fn find(&self, room: RoomNum, at: Position) -> Result<Option<Told>, Fault> {
        let Some(row) = rooms::find_row(self.read, room)? else { return Ok(None) };
        let order = Order::live(at);
        match schema::TIMELINE.get(self.read, (room, order))? {
            Some(event) => self.look(room, &row, &StoredEvent { order, row: event }),
            None => self.find_outside(room, &row, at),
        }
    }

    /// Finds what is to be told of the event at this position, with the newest text of it that the user may see.
    pub(super) fn find_newest(&self, room: RoomNum, at: Position) -> Result<Option<Told>, Fault> {
        let Some(mut told) = self.find(room, at)? else { return Ok(None) };
        let order = Order::live(at);
        let Some(row) = schema::TIMELINE.get(self.read, (room, order))? else { return Ok(Some(told)) };
        let original = StoredEvent { order, row };
        let sight = RefCell::new(Sight::of(self.read, room, self.user, self.user_id)?);
        let sees = |edit: &StoredEvent| sight.borrow_mut().can_see(self.read, edit);
        let edit = edits::newest_edit_seen(self.read, room, &original, Order::MAX, sees)?;
        if let Some(content) = edit.as_ref().and_then(edits::new_content) {
            told.content = content;
        }
        Ok(Some(told))
    }

    /// Finds what is to be told of an event of a room.
    fn look(&self, room: RoomNum, row: &RoomRow, stored: &StoredEvent) -> Result<Option<Told>, Fault> {
        let Some(rule) = self.judge(room, row, stored)? else { return Ok(None) };
        Told::of_event(self.read, (room, row), stored, self.user_id, rule).map(Some)
    }

    /// Looks whether an event of a room that the user is in is to be told. That reads nothing of the room beside the event.
    pub(super) fn hint(
        &self,
        room: RoomNum,
        row: &RoomRow,
        stored: &StoredEvent,
    ) -> Result<Option<Hint>, Fault> {
        let rule = self.judge(room, row, stored)?;
        let (sent_ms, is_invitation) = (stored.row.header.sent_ms, false);
        Ok(rule.map(|rule| Hint { highlights: rule.outcome.highlight, is_invitation, sent_ms }))
    }

    /// The rule by which an event of a room is to be told.
    fn judge(&self, room: RoomNum, row: &RoomRow, stored: &StoredEvent) -> Result<Option<Explained>, Fault> {
        // Where the event was made here its own time is right; another server may have any.
        let is_ours = event::is_of(&stored.row.sender(), self.user_id.server_name().as_str());
        if stored.order.anchor <= self.oldest || (is_ours && stored.row.header.sent_ms < self.oldest_ms) {
            tracing::debug!(%room, order = ?stored.order, reason = "too old", "an event is not pushed");
            return Ok(None);
        }
        let notifies = self.reader.look_again(self.read, (room, row), stored)?;
        Ok(notifies.filter(|notifies| !notifies.is_read).map(|notifies| notifies.rule))
    }

    fn find_outside(&self, room: RoomNum, row: &RoomRow, at: Position) -> Result<Option<Told>, Fault> {
        if at <= self.oldest {
            return Ok(None);
        }
        let found = self.reader.look_outside(self.read, (room, row), at)?;
        Ok(found.and_then(|(invitation, rule)| Told::of_invitation(row, &invitation, rule)))
    }

    /// Whether an event notified the user and was read since.
    pub(super) fn was_read(&self, room: RoomNum, row: &RoomRow, at: Position) -> Result<bool, Fault> {
        let order = Order::live(at);
        let Some(event) = schema::TIMELINE.get(self.read, (room, order))? else { return Ok(false) };
        let stored = StoredEvent { order, row: event };
        let notifies = self.reader.look_again(self.read, (room, row), &stored)?;
        Ok(notifies.is_some_and(|notifies| notifies.is_read))
    }
}
