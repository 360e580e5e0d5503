//! Who may see which event (client-server API, "Server behaviour" of room history visibility).

use std::{collections::HashMap, ops::Bound};

use ruma::UserId;
use serde::Deserialize;

use crate::{
    ids::{EventNum, Order, RoomNum, StateKeyNum, UserNum},
    rooms::{
        event::{self, Stored},
        members, state,
    },
    schema,
    schema::{rooms::Membership, state::Val},
    store::{Direction, Fault, Read},
};

/// How much of a room's past others may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HistoryVisibility {
    /// Everybody sees everything.
    WorldReadable,
    /// Members see everything, also from before they joined.
    Shared,
    /// Members see what was sent since they were invited.
    Invited,
    /// Members see what was sent while they were joined.
    Joined,
}

impl HistoryVisibility {
    /// From the content of `m.room.history_visibility`; what is unset or unknown is shared.
    pub fn of_content(content: &str) -> Self {
        #[derive(Deserialize)]
        struct Content {
            history_visibility: String,
        }
        let content: Option<Content> = serde_json::from_str(content).ok();
        match content.as_ref().map(|content| content.history_visibility.as_str()) {
            Some("world_readable") => Self::WorldReadable,
            Some("invited") => Self::Invited,
            Some("joined") => Self::Joined,
            _ => Self::Shared,
        }
    }
}

/// The current history visibility of a room.
pub fn current(read: &(impl Read + ?Sized), room: RoomNum) -> Result<HistoryVisibility, Fault> {
    let event = super::find_state(read, room, KIND, "")?;
    Ok(event.map_or(HistoryVisibility::Shared, |event| HistoryVisibility::of_content(event.row.content())))
}

const KIND: &str = "m.room.history_visibility";

/// Changes of a key that are read at once: a page of a hundred events needs a few such parts where each of them is a change
/// of this very key, and one in any other room.
const CHANGES_READ: usize = 32;

/// The values that a state key had on the main line, as far as they were asked for: however often a key changed, a page
/// reads little more of its changes than it has events.
struct History {
    key: Option<StateKeyNum>,
    now: Val,
    /// (order of a change, value before it), rising: all that there are in `low..=high`.
    changes: Vec<(Order, Val)>,
    low: Order,
    high: Order,
}

impl History {
    /// With the newest changes: most pages are of the newest events, and most keys changed once.
    fn newest(
        read: &(impl Read + ?Sized),
        room: RoomNum,
        event_type: &str,
        state_key: &str,
    ) -> Result<Self, Fault> {
        let key = state::find_key(read, room, event_type, state_key)?;
        let mut history =
            Self { key, now: Val::Absent, changes: Vec::new(), low: Order::MIN, high: Order::MAX };
        if let Some(key) = key {
            history.now = state::now(read, room, key)?;
            history.read_around(read, room, key, Order::MAX, 0, CHANGES_READ)?;
        }
        Ok(history)
    }

    /// Reads so many changes at or above an order, and so many below it.
    fn read_around(
        &mut self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        key: StateKeyNum,
        order: Order,
        above: usize,
        below: usize,
    ) -> Result<(), Fault> {
        let list = |low, high, direction, count| -> Result<Vec<(Order, Val)>, Fault> {
            if count == 0 {
                return Ok(Vec::new());
            }
            let rows =
                schema::STATE_UNDO.range::<(RoomNum, StateKeyNum, Order)>(read, low, high, direction)?;
            rows.take(count).map(|row| row.map(|((_, _, order), val)| (order, val))).collect()
        };
        let at = |order| (room, key, order);
        let (lowest, middle, highest) = (at(Order::MIN), at(order), at(Order::MAX));
        let mut changes = list(Bound::Included(lowest), Bound::Excluded(middle), Direction::Down, below)?;
        self.low = match changes.last() {
            Some((lowest, _)) if changes.len() == below => *lowest,
            _ if below == 0 => order,
            _ => Order::MIN,
        };
        changes.reverse();
        let rest = list(Bound::Included(middle), Bound::Included(highest), Direction::Up, above)?;
        self.high = match rest.last() {
            Some((highest, _)) if rest.len() == above => *highest,
            _ => Order::MAX,
        };
        changes.extend(rest);
        self.changes = changes;
        Ok(())
    }

    /// The value just below an order.
    fn below(&mut self, read: &(impl Read + ?Sized), room: RoomNum, order: Order) -> Result<Val, Fault> {
        let Some(key) = self.key else { return Ok(Val::Absent) };
        if order < self.low {
            self.read_around(read, room, key, order, 1, CHANGES_READ)?;
        } else if order > self.high {
            self.read_around(read, room, key, order, CHANGES_READ, 0)?;
        }
        let at = self.changes.partition_point(|(change, _)| *change < order);
        Ok(self.changes.get(at).map_or(self.now, |(_, before)| *before))
    }

    /// The value just before an event.
    fn before(&mut self, read: &(impl Read + ?Sized), room: RoomNum, stored: &Stored) -> Result<Val, Fault> {
        match (stored.row.header.before, self.key) {
            (Some(before), Some(key)) => state::at(read, room, before, key),
            _ => self.below(read, room, stored.order),
        }
    }
}

/// What one user may see of one room. Made for one answer, from one snapshot; best asked for events in their order.
pub struct Sight {
    room: RoomNum,
    user: String,
    visibility: History,
    member: History,
    /// The user was joined up to here, perhaps with breaks.
    joined_until: Option<Order>,
    memberships: HashMap<EventNum, Membership>,
    visibilities: HashMap<EventNum, HistoryVisibility>,
}

impl Sight {
    /// The sight of this user of ours, with the number of the account.
    pub fn of(
        read: &(impl Read + ?Sized),
        room: RoomNum,
        user: UserNum,
        user_id: &UserId,
    ) -> Result<Self, Fault> {
        Ok(Self {
            room,
            user: user_id.to_string(),
            visibility: History::newest(read, room, KIND, "")?,
            member: History::newest(read, room, "m.room.member", user_id.as_str())?,
            joined_until: members::joined_until(read, user, room)?,
            memberships: HashMap::new(),
            visibilities: HashMap::new(),
        })
    }

    /// Up to where the user has been joined, perhaps with breaks: [`Order::MAX`] for a member, `None` for somebody
    /// who never was one.
    pub fn joined_until(&self) -> Option<Order> {
        self.joined_until
    }

    fn membership_in(&mut self, read: &(impl Read + ?Sized), value: Val) -> Result<Membership, Fault> {
        let Some(event) = value.event() else { return Ok(Membership::Leave) };
        if let Some(known) = self.memberships.get(&event) {
            return Ok(*known);
        }
        let found = event::find_anywhere(read, self.room, event)?.and_then(|stored| stored.membership());
        let membership = found.unwrap_or(Membership::Leave);
        self.memberships.insert(event, membership);
        Ok(membership)
    }

    fn visibility_in(&mut self, read: &(impl Read + ?Sized), value: Val) -> Result<HistoryVisibility, Fault> {
        let Some(event) = value.event() else { return Ok(HistoryVisibility::Shared) };
        if let Some(known) = self.visibilities.get(&event) {
            return Ok(*known);
        }
        let found = event::find_anywhere(read, self.room, event)?;
        let visibility = found
            .map_or(HistoryVisibility::Shared, |stored| HistoryVisibility::of_content(stored.row.content()));
        self.visibilities.insert(event, visibility);
        Ok(visibility)
    }

    /// What the user was to the room at this event (with what the event itself says), and whether they may see it.
    pub fn look(
        &mut self,
        read: &(impl Read + ?Sized),
        stored: &Stored,
    ) -> Result<(Membership, bool), Fault> {
        let visibility = self.visibility.before(read, self.room, stored)?;
        let member = self.member.before(read, self.room, stored)?;
        let mut visibilities = [self.visibility_in(read, visibility)?; 2];
        let mut memberships = [self.membership_in(read, member)?; 2];
        if let Some(key) = stored.row.header.state_key {
            // An event that changes one of the two is seen by those who may see it before or after the change.
            if self.visibility.key == Some(key) {
                visibilities[1] = HistoryVisibility::of_content(stored.row.content());
            } else if self.member.key == Some(key) {
                memberships[1] = stored.membership().unwrap_or(Membership::Leave);
            }
        }
        let joined_later = self.joined_until.is_some_and(|until| stored.order < until);
        let sees = visibilities.iter().any(|visibility| match visibility {
            HistoryVisibility::WorldReadable => true,
            _ if memberships.contains(&Membership::Join) => true,
            HistoryVisibility::Shared => joined_later,
            HistoryVisibility::Invited => memberships.contains(&Membership::Invite),
            HistoryVisibility::Joined => false,
        });
        let [_, after] = memberships;
        Ok((after, sees))
    }

    /// Whether the user may see this event.
    pub fn can_see(&mut self, read: &(impl Read + ?Sized), stored: &Stored) -> Result<bool, Fault> {
        Ok(self.look(read, stored)?.1)
    }

    /// Whose sight this is.
    pub fn user(&self) -> &str {
        &self.user
    }
}

#[cfg(test)]
mod tests;
