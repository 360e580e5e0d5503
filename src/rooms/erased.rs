//! Users who asked to be erased (client-server API, `POST /account/deactivate` with `erase`; MSC4025).
//!
//! Their events stay as they were signed, because everybody who was in the room at the time has them anyway. Everybody
//! else is shown the redacted form, worked out when an event is read. Of a room's state only member events are treated
//! so: its name and its power levels are the room's, whoever set them.

use std::{
    borrow::Cow,
    cell::{Cell, RefCell},
    collections::HashMap,
};

use ruma::UserId;

use crate::{
    accounts::users,
    ids::RoomNum,
    rooms::{
        event::{self, StoredEvent},
        members, redact, state,
        view::RoomView,
    },
    schema::event_types::MEMBER,
    schema::{rooms::Membership, state::StateRef},
    store::{Fault, Read},
};

/// Tells which senders asked to be erased. Each is looked up once an answer, and none where nobody on this server
/// asked.
#[derive(Debug, Default)]
pub struct Erased {
    anybody: Cell<Option<bool>>,
    senders: RefCell<HashMap<String, bool>>,
}

impl Erased {
    /// Whether anybody on this server asked to be erased.
    pub(in crate::rooms) fn anybody(&self, read: &(impl Read + ?Sized)) -> Result<bool, Fault> {
        let anybody = match self.anybody.get() {
            Some(known) => known,
            None => users::any_erased(read)?,
        };
        self.anybody.set(Some(anybody));
        Ok(anybody)
    }

    /// Whether this sender asked to be erased.
    pub(in crate::rooms) fn contains(
        &self,
        read: &(impl Read + ?Sized),
        sender: &str,
    ) -> Result<bool, Fault> {
        if let Some(known) = self.senders.borrow().get(sender) {
            return Ok(*known);
        }
        let found = users::is_erased(read, sender)?;
        self.senders.borrow_mut().insert(sender.to_owned(), found);
        Ok(found)
    }

    /// Whether this user is shown only the redacted form of the event.
    pub fn hides(
        &self,
        view: RoomView<'_, impl Read + ?Sized>,
        stored: &StoredEvent,
        user: &UserId,
    ) -> Result<bool, Fault> {
        // On most servers nobody is erased; then the sender need not even be read out of the event.
        Ok(self.anybody(view.read)?
            && !is_of_the_room(stored)
            && self.contains(view.read, &stored.row.sender())?
            && !was_joined(view.read, view.num, stored, user)?)
    }

    /// Whether another server gets only the redacted form of an event, the state before which is known.
    pub fn hides_from_server(
        &self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        stored: &StoredEvent,
        server: &str,
    ) -> Result<bool, Fault> {
        Ok(self.anybody(read)?
            && !is_of_the_room(stored)
            && self.contains(read, &stored.row.sender())?
            && !members::was_server_joined(read, room, state_before(stored), server)?)
    }

    /// Gives the event as this user is shown it, in the timeline as in the state of the room.
    pub fn seen<'s>(
        &self,
        view: RoomView<'_, impl Read + ?Sized>,
        stored: &'s StoredEvent,
        user: &UserId,
    ) -> Result<Cow<'s, StoredEvent>, Fault> {
        if !self.hides(view, stored, user)? {
            return Ok(Cow::Borrowed(stored));
        }
        redact::hidden(view.row, stored).map(Cow::Owned)
    }
}

/// Whether an event is the room's and not its sender's, as all state is beside member events. Clients take state from the
/// timeline as well as from answers that list it, so both must show the same content: a room would otherwise lose its
/// encryption or its successor for whoever reads only one of them.
fn is_of_the_room(stored: &StoredEvent) -> bool {
    stored.row.header.state_key.is_some() && stored.row.event_type() != MEMBER
}

fn state_before(stored: &StoredEvent) -> StateRef {
    stored.row.header.before.unwrap_or_else(|| StateRef::Main(stored.order.before()))
}

/// Whether a user was in the room when an event was sent.
fn was_joined(
    read: &(impl Read + ?Sized),
    num: RoomNum,
    stored: &StoredEvent,
    user: &UserId,
) -> Result<bool, Fault> {
    let Some(key) = state::find_key(read, num, MEMBER, user.as_str())? else { return Ok(false) };
    let Some(member) = state::at(read, num, state_before(stored), key)?.event() else { return Ok(false) };
    let member = event::find_anywhere(read, num, member)?;
    Ok(member.and_then(|member| member.membership()) == Some(Membership::Join))
}
