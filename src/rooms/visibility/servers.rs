//! The part of a room that another server may see.
//!
//! A server sees what one of its users may see. What it may not see it gets redacted, because it needs the event to follow the
//! room's graph.

use super::{History, HistoryVisibility};
use crate::{
    ids::{RoomNum, StateKeyNum},
    rooms::{
        erased::Erased,
        event::{self, StoredEvent},
        members, state,
    },
    schema::{
        event_types::{HISTORY_VISIBILITY, MEMBER},
        rooms::Membership,
        state::{StateRef, StateValue},
    },
    store::{Fault, Read},
};

/// Invitations of at most this many users of a server let it see events. Others have to join first.
const INVITED_MAX: usize = 100;
/// Look for users of a server among at most this many users of a room.
const LOOKED_AT_MAX: usize = 20_000;

/// The sight of one server in one room. It is made for one answer, from one snapshot.
pub struct ServerSight {
    room: RoomNum,
    server: String,
    visibility: History,
    erased: Erased,
    /// The member keys of users of the server, once they were asked for.
    members: Option<Vec<StateKeyNum>>,
}

impl ServerSight {
    /// The sight of a server that has somebody in the room now.
    pub fn of_resident(room: RoomNum, server: &str) -> Self {
        let visibility = History::of(HISTORY_VISIBILITY, "");
        Self { room, server: server.to_owned(), visibility, erased: Erased::default(), members: None }
    }

    /// Whether the server may see the whole of an event, the state before which is known.
    pub fn sees(&mut self, read: &(impl Read + ?Sized), stored: &StoredEvent) -> Result<bool, Fault> {
        Ok(self.may_see(read, stored)?
            && !self.erased.hides_from_server(read, self.room, stored, &self.server)?)
    }

    /// Whether the history visibility lets one of the server's users see an event (client-server API, "Server behaviour" of
    /// room history visibility). Somebody of the server has joined since, as what is `shared` asks for.
    fn may_see(&mut self, read: &(impl Read + ?Sized), stored: &StoredEvent) -> Result<bool, Fault> {
        if self.is_of_server(stored) {
            return Ok(true);
        }
        self.visibility.load(read, self.room)?;
        let visibility = self.visibility.known_before(read, self.room, stored)?;
        let mut visibilities = [self.visibility_in(read, visibility)?; 2];
        let key = stored.row.header.state_key;
        if key.is_some() && self.visibility.key == key {
            // A change of the visibility is seen by those who may see it by the value before or after it.
            visibilities[1] = HistoryVisibility::of_content(stored.row.content());
        }
        let is_open = |it: &HistoryVisibility| {
            matches!(it, HistoryVisibility::WorldReadable | HistoryVisibility::Shared)
        };
        if visibilities.iter().any(is_open) {
            return Ok(true);
        }
        let before = match stored.row.header.before {
            Some(before) => before,
            None => state::just_below(read, self.room, stored.order)?,
        };
        Ok(members::was_server_joined(read, self.room, before, &self.server)?
            || visibilities.contains(&HistoryVisibility::Invited) && self.was_invited(read, before)?)
    }

    /// Whether a user of the server was invited in this state.
    fn was_invited(&mut self, read: &(impl Read + ?Sized), at: StateRef) -> Result<bool, Fault> {
        let members = match self.members.take() {
            Some(members) => members,
            None => self.list_members(read)?,
        };
        let members = self.members.insert(members);
        for value in state::list_at(read, self.room, at, members)? {
            if let Some(event) = value.event()
                && members::membership_of_event(read, self.room, event)? == Membership::Invite
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Lists the member keys of users of the server, rising.
    fn list_members(&self, read: &(impl Read + ?Sized)) -> Result<Vec<StateKeyNum>, Fault> {
        let mut found = Vec::new();
        for member in members::list_keys(read, self.room)?.take(LOOKED_AT_MAX) {
            let (user_id, key) = member?;
            if event::server_of(&user_id) == Some(&*self.server) {
                found.push(key);
            }
            if found.len() >= INVITED_MAX {
                break;
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Whether the event is by a user of the server, or about one.
    fn is_of_server(&self, stored: &StoredEvent) -> bool {
        let is_its = |user: &str| event::server_of(user) == Some(&*self.server);
        let header = &stored.row.header;
        let about = header.state_key.is_some() && stored.row.event_type() == MEMBER;
        is_its(&stored.row.sender()) || about && stored.row.state_key().is_some_and(|user| is_its(&user))
    }

    fn visibility_in(
        &self,
        read: &(impl Read + ?Sized),
        value: StateValue,
    ) -> Result<HistoryVisibility, Fault> {
        let Some(event) = value.event() else { return Ok(HistoryVisibility::Shared) };
        let found = event::find_anywhere(read, self.room, event)?;
        Ok(found
            .map_or(HistoryVisibility::Shared, |found| HistoryVisibility::of_content(found.row.content())))
    }
}
