//! Users who asked to be erased (client-server API, `POST /account/deactivate` with `erase`; MSC4025).
//!
//! What they wrote stays as it was signed, for whoever was in the room when it was sent has it anyway. Everybody else
//! is shown its redacted form, worked out when it is read. Of the state of a room only members are treated so: its name or
//! its power levels are the room's, whoever set them.

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
        event::{self, Stored},
        redact, rules, state,
        view::RoomView,
    },
    schema::{rooms::Membership, state::Ref},
    store::{Fault, Read},
};

/// Which senders asked to be erased: looked up once an answer, and not at all where nobody did.
#[derive(Debug, Default)]
pub struct Erased {
    anybody: Cell<Option<bool>>,
    senders: RefCell<HashMap<String, bool>>,
}

impl Erased {
    fn anybody(&self, read: &(impl Read + ?Sized)) -> Result<bool, Fault> {
        let anybody = match self.anybody.get() {
            Some(known) => known,
            None => users::any_erased(read)?,
        };
        self.anybody.set(Some(anybody));
        Ok(anybody)
    }

    fn contains(&self, read: &(impl Read + ?Sized), sender: &str) -> Result<bool, Fault> {
        if let Some(known) = self.senders.borrow().get(sender) {
            return Ok(*known);
        }
        let found = users::is_erased(read, sender)?;
        self.senders.borrow_mut().insert(sender.to_owned(), found);
        Ok(found)
    }

    /// Whether this user is not shown what the event says.
    pub fn hides(
        &self,
        view: RoomView<'_, impl Read + ?Sized>,
        stored: &Stored,
        user: &UserId,
    ) -> Result<bool, Fault> {
        // Mostly nobody is: then the sender need not even be read out of the event.
        Ok(self.anybody(view.read)?
            && self.contains(view.read, &stored.row.sender())?
            && !was_joined(view.read, view.num, stored, user)?)
    }

    /// The event as this user is shown it.
    pub fn seen<'s>(
        &self,
        view: RoomView<'_, impl Read + ?Sized>,
        stored: &'s Stored,
        user: &UserId,
    ) -> Result<Cow<'s, Stored>, Fault> {
        if !self.hides(view, stored, user)? {
            return Ok(Cow::Borrowed(stored));
        }
        let json = redact::redacted(&stored.row.json, rules(view.row)?);
        let json = json.ok_or(Fault::Corrupt("an event is not the JSON of an event"))?;
        redact::with_json(stored, &json).map(Cow::Owned)
    }

    /// The event as this user is shown it in the state of the room.
    pub fn seen_in_state<'s>(
        &self,
        view: RoomView<'_, impl Read + ?Sized>,
        stored: &'s Stored,
        user: &UserId,
    ) -> Result<Cow<'s, Stored>, Fault> {
        if stored.row.header.state_key.is_some() && stored.row.event_type() != "m.room.member" {
            return Ok(Cow::Borrowed(stored));
        }
        self.seen(view, stored, user)
    }
}

/// Whether a user was in the room when an event was sent.
fn was_joined(
    read: &(impl Read + ?Sized),
    num: RoomNum,
    stored: &Stored,
    user: &UserId,
) -> Result<bool, Fault> {
    let Some(key) = state::find_key(read, num, "m.room.member", user.as_str())? else { return Ok(false) };
    let before = stored.row.header.before.unwrap_or_else(|| Ref::Main(stored.order.before()));
    let Some(member) = state::at(read, num, before, key)?.event() else { return Ok(false) };
    let member = event::find_anywhere(read, num, member)?;
    Ok(member.and_then(|member| member.membership()) == Some(Membership::Join))
}
