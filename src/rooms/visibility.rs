//! Who may see which event (client-server API, "Server behaviour" of room history visibility).

use std::{collections::HashMap, ops::Bound};

use ruma::UserId;
use serde::Deserialize;

use crate::{
    ids::{EventNum, Order, RoomNum, StateKeyNum},
    rooms::event::{self, Stored},
    rooms::state,
    store::{
        Direction, Fault, Read, schema,
        schema::{
            rooms::Membership,
            state::{Ref, Val},
        },
    },
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

/// All values that a state key had on the main line.
struct History {
    key: Option<StateKeyNum>,
    /// (order of a change, value before it), rising.
    changes: Vec<(Order, Val)>,
    now: Val,
}

impl History {
    fn load(
        read: &(impl Read + ?Sized),
        room: RoomNum,
        event_type: &str,
        state_key: &str,
    ) -> Result<Self, Fault> {
        let Some(key) = state::find_key(read, room, event_type, state_key)? else {
            return Ok(Self { key: None, changes: Vec::new(), now: Val::Absent });
        };
        let bound = Bound::Included((room, key));
        let rows = schema::STATE_UNDO.range::<(RoomNum, StateKeyNum)>(read, bound, bound, Direction::Up)?;
        let changes =
            rows.map(|row| row.map(|((_, _, order), val)| (order, val))).collect::<Result<_, _>>()?;
        Ok(Self { key: Some(key), changes, now: state::now(read, room, key)? })
    }

    /// The value just below an order.
    fn below(&self, order: Order) -> Val {
        let at = self.changes.partition_point(|(change, _)| *change < order);
        self.changes.get(at).map_or(self.now, |(_, before)| *before)
    }
}

/// What one user may see of one room. Made for one answer, from one snapshot.
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
    /// The sight of this user.
    pub fn of(read: &(impl Read + ?Sized), room: RoomNum, user: &UserId) -> Result<Self, Fault> {
        let mut sight = Self {
            room,
            user: user.to_string(),
            visibility: History::load(read, room, KIND, "")?,
            member: History::load(read, room, "m.room.member", user.as_str())?,
            joined_until: None,
            memberships: HashMap::new(),
            visibilities: HashMap::new(),
        };
        let now = sight.member.now;
        let mut values = vec![(Order::MAX, now)];
        values.extend(sight.member.changes.iter().rev());
        for (until, value) in values {
            if sight.membership_in(read, value)? == Membership::Join {
                sight.joined_until = Some(until);
                break;
            }
        }
        Ok(sight)
    }

    /// What the user is to the room now.
    pub fn membership_now(&mut self, read: &(impl Read + ?Sized)) -> Result<Membership, Fault> {
        self.membership_in(read, self.member.now)
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

    fn value_before(
        &self,
        read: &(impl Read + ?Sized),
        history: &History,
        stored: &Stored,
    ) -> Result<Val, Fault> {
        match (stored.row.header.before, history.key) {
            (Some(before @ (Ref::Main(_) | Ref::Side(_))), Some(key)) => {
                state::at(read, self.room, before, key)
            }
            _ => Ok(history.below(stored.order)),
        }
    }

    /// What the user was to the room at this event (with what the event itself says), and whether they may see it.
    pub fn look(
        &mut self,
        read: &(impl Read + ?Sized),
        stored: &Stored,
    ) -> Result<(Membership, bool), Fault> {
        let visibility = self.value_before(read, &self.visibility, stored)?;
        let member = self.value_before(read, &self.member, stored)?;
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

/// Whether a user may see an event. For many events of a room, make one [`Sight`].
pub fn can_see(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    user: &UserId,
    stored: &Stored,
) -> Result<bool, Fault> {
    Sight::of(read, room, user)?.can_see(read, stored)
}
