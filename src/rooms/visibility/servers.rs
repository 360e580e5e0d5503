//! The part of a room that another server may see.
//!
//! A server sees what one of its users sees. What it may not see it gets redacted, because it needs the event to follow the
//! room's graph.

use super::{History, HistoryVisibility};
use crate::{
    ids::RoomNum,
    rooms::{event::StoredEvent, members, state},
    schema::event_types::{HISTORY_VISIBILITY, MEMBER},
    store::{Fault, Read},
};

/// The sight of one server in one room. It is made for one answer, from one snapshot.
pub struct ServerSight {
    room: RoomNum,
    server: String,
    visibility: History,
}

impl ServerSight {
    /// The sight of a server that has somebody in the room now.
    pub fn of_resident(room: RoomNum, server: &str) -> Self {
        Self { room, server: server.to_owned(), visibility: History::of(HISTORY_VISIBILITY, "") }
    }

    /// Whether the server may see the whole of an event.
    pub fn sees(&mut self, read: &(impl Read + ?Sized), stored: &StoredEvent) -> Result<bool, Fault> {
        if self.is_of_server(stored) {
            return Ok(true);
        }
        self.visibility.load(read, self.room)?;
        let visibility = self.visibility.before(read, self.room, stored)?;
        match self.visibility_in(read, visibility)? {
            HistoryVisibility::WorldReadable | HistoryVisibility::Shared => Ok(true),
            // The server of an invited user sees the invitation itself, and the rest once one of its users has joined.
            HistoryVisibility::Invited | HistoryVisibility::Joined => {
                let before = match stored.row.header.before {
                    Some(before) => before,
                    None => state::just_below(read, self.room, stored.order)?,
                };
                members::was_server_joined(read, self.room, before, &self.server)
            }
        }
    }

    /// Whether the event is by a user of the server, or about one.
    fn is_of_server(&self, stored: &StoredEvent) -> bool {
        let is_its = |user: &str| user.split_once(':').is_some_and(|(_, server)| server == self.server);
        let header = &stored.row.header;
        let about = header.state_key.is_some() && stored.row.event_type() == MEMBER;
        is_its(&stored.row.sender()) || about && stored.row.state_key().is_some_and(|user| is_its(&user))
    }

    fn visibility_in(
        &self,
        read: &(impl Read + ?Sized),
        value: crate::schema::state::StateValue,
    ) -> Result<HistoryVisibility, Fault> {
        let Some(event) = value.event() else { return Ok(HistoryVisibility::Shared) };
        let found = crate::rooms::event::find_anywhere(read, self.room, event)?;
        Ok(found
            .map_or(HistoryVisibility::Shared, |found| HistoryVisibility::of_content(found.row.content())))
    }
}
