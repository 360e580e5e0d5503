//! Who may see which event (client-server API, "Server behaviour" of room history visibility).

mod history;
mod servers;

use std::{
    cell::RefCell,
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use history::{ALL_CHANGES_MAX, History};
pub use servers::ServerSight;

use ruma::{EventId, UserId};
use serde::Deserialize;

use crate::{
    accounts::ignored::Ignored,
    ids::{EventNum, Order, Position, RoomNum, UserNum},
    rooms::{
        event::{self, StoredEvent},
        members,
    },
    schema::event_types::{HISTORY_VISIBILITY, MEMBER},
    schema::{
        rooms::{Membership, UserRoomRow},
        state::StateValue,
    },
    store::{Fault, Read},
};

/// The part of a room's past that others may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HistoryVisibility {
    /// Everybody sees everything, members or not.
    WorldReadable,
    /// Members see everything, also from before they joined.
    Shared,
    /// Members see the events sent since they were invited.
    Invited,
    /// Members see the events sent while they were joined.
    Joined,
}

impl HistoryVisibility {
    /// Reads the content of `m.room.history_visibility`; a value that is unset or unknown means shared.
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

    /// The word that stands for it in the content of an event.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::WorldReadable => "world_readable",
            Self::Shared => "shared",
            Self::Invited => "invited",
            Self::Joined => "joined",
        }
    }
}

/// Gives the current history visibility of a room.
pub fn current(read: &(impl Read + ?Sized), room: RoomNum) -> Result<HistoryVisibility, Fault> {
    let event = super::find_state(read, room, HISTORY_VISIBILITY, "")?;
    Ok(event.map_or(HistoryVisibility::Shared, |event| HistoryVisibility::of_content(event.row.content())))
}

/// The part of one room that one user may see: the one definition of "visible", and of "visible until". It is made for
/// one answer, from one snapshot, and works best if asked for events in their order.
///
/// A user who left, or was kicked or banned, sees nothing after that, whatever was done with their membership since:
/// the first event that ended their stay is the last one that counts. A user who has forgotten the room is a stranger
/// to it until they join again: an invitation, a ban or whatever else is done with their membership meanwhile shows
/// them nothing of what came before it.
pub struct Sight {
    room: RoomNum,
    user: String,
    visibility: History,
    member: History,
    /// The order up to which the user was joined, perhaps with breaks.
    joined_until: Option<Order>,
    /// The order since which the user has been joined without a break, so that mostly nothing need be asked of their
    /// history.
    joined_since: Option<Order>,
    /// Invitations below this order are forgotten and do not count.
    invited_from: Order,
    memberships: HashMap<EventNum, Membership>,
    visibilities: HashMap<EventNum, HistoryVisibility>,
    /// Whether the room was never less than shared, once that was asked for.
    is_open: Option<bool>,
    /// The order above which the user sees nothing, once that was asked for.
    end: Option<Option<Order>>,
}

impl Sight {
    /// The sight of this user of ours, with the number of the account.
    pub fn of(
        read: &(impl Read + ?Sized),
        room: RoomNum,
        user: UserNum,
        user_id: &UserId,
    ) -> Result<Self, Fault> {
        let row = members::find(read, user, room)?;
        Ok(Self::with_row(room, user_id, row.as_ref()))
    }

    /// The sight of a user with this membership of the room.
    fn with_row(room: RoomNum, user_id: &UserId, row: Option<&UserRoomRow>) -> Self {
        let joined_until = row.and_then(joined_until);
        let joined_since = row.filter(|row| row.membership == Membership::Join);
        let invited_from = match row {
            Some(row) if row.forgotten => Order::MAX,
            Some(row) => row.forgotten_below.unwrap_or(Order::MIN),
            None => Order::MIN,
        };
        Self {
            room,
            user: user_id.to_string(),
            visibility: History::of(HISTORY_VISIBILITY, ""),
            member: History::of(MEMBER, user_id.as_str()),
            joined_until,
            joined_since: joined_since.map(|row| Order::live(row.since)),
            invited_from,
            memberships: HashMap::new(),
            visibilities: HashMap::new(),
            is_open: None,
            end: None,
        }
    }

    /// Tells up to where the user has been joined, perhaps with breaks: [`Order::MAX`] for a member, `None` for a user
    /// who never was one, or has forgotten the room.
    pub fn joined_until(&self) -> Option<Order> {
        self.joined_until
    }

    fn membership_in(&mut self, read: &(impl Read + ?Sized), value: StateValue) -> Result<Membership, Fault> {
        let Some(event) = value.event() else { return Ok(Membership::Leave) };
        if let Some(known) = self.memberships.get(&event) {
            return Ok(*known);
        }
        let found = event::find_anywhere(read, self.room, event)?.and_then(|stored| stored.membership());
        let membership = found.unwrap_or(Membership::Leave);
        self.memberships.insert(event, membership);
        Ok(membership)
    }

    fn visibility_in(
        &mut self,
        read: &(impl Read + ?Sized),
        value: StateValue,
    ) -> Result<HistoryVisibility, Fault> {
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

    /// Gives the user's membership of the room at this event (with the change that the event itself makes), and whether
    /// they may see it.
    pub fn look(
        &mut self,
        read: &(impl Read + ?Sized),
        stored: &StoredEvent,
    ) -> Result<(Membership, bool), Fault> {
        // The state before an event of a fork is not the main line, and inside a hole that was filled the main line is that of the
        // missing events, which may be older than the stay that goes on around the hole. So the shortcut holds for neither.
        let is_live = stored.order.minor == 0 && stored.row.header.before.is_none();
        if is_live && self.joined_since.is_some_and(|since| stored.order > since) {
            return Ok((Membership::Join, true));
        }
        self.member.load(read, self.room)?;
        let member = self.member.before(read, self.room, stored)?;
        let mut memberships = [self.membership_in(read, member)?; 2];
        let key = stored.row.header.state_key;
        if key.is_some() && self.member.key == key {
            // An event that changes membership or visibility is seen by users who may see it by the state before or
            // after the change.
            memberships[1] = stored.membership().unwrap_or(Membership::Leave);
        }
        let [_, after] = memberships;
        let is_of_stay = self.joined_until.is_some_and(|until| stored.order <= until);
        if is_of_stay && memberships.contains(&Membership::Join) {
            return Ok((after, true));
        }
        self.visibility.load(read, self.room)?;
        let visibility = self.visibility.known_before(read, self.room, stored)?;
        let mut visibilities = [self.visibility_in(read, visibility)?; 2];
        if key.is_some() && self.visibility.key == key {
            visibilities[1] = HistoryVisibility::of_content(stored.row.content());
        }
        let was_invited =
            memberships.contains(&Membership::Invite) && (is_of_stay || stored.order >= self.invited_from);
        let sees = visibilities.iter().any(|visibility| match visibility {
            HistoryVisibility::WorldReadable => true,
            HistoryVisibility::Shared => is_of_stay,
            HistoryVisibility::Invited => was_invited,
            HistoryVisibility::Joined => false,
        });
        Ok((after, sees))
    }

    /// Whether the user may see this event.
    pub fn can_see(&mut self, read: &(impl Read + ?Sized), stored: &StoredEvent) -> Result<bool, Fault> {
        Ok(self.look(read, stored)?.1)
    }

    /// Finds an event of the room by its id. It is `None` alike if there is no such event, if no client is shown it, and if
    /// the user may not see it, so that no answer that is made from this says whether an event is there.
    pub fn find(&mut self, read: &(impl Read + ?Sized), id: &EventId) -> Result<Option<StoredEvent>, Fault> {
        let Some(stored) = event::find_by_id(read, self.room, id)? else { return Ok(None) };
        if stored.row.header.unseen || !self.can_see(read, &stored)? {
            let (room, event) = (self.room, stored.event());
            tracing::debug!(%room, event = event.0, user_id = self.user, reason = "not visible", "an event is treated as unknown");
            return Ok(None);
        }
        Ok(Some(stored))
    }

    /// Gives the order above which the user sees nothing; `None` for a user who sees nothing at all.
    pub fn end(&mut self, read: &(impl Read + ?Sized)) -> Result<Option<Order>, Fault> {
        if let Some(known) = self.end {
            return Ok(known);
        }
        let end = self.find_end(read)?;
        self.end = Some(end);
        Ok(end)
    }

    fn find_end(&mut self, read: &(impl Read + ?Sized)) -> Result<Option<Order>, Fault> {
        self.visibility.load(read, self.room)?;
        if self.joined_until == Some(Order::MAX)
            || self.visibility_in(read, self.visibility.now)? == HistoryVisibility::WorldReadable
        {
            return Ok(Some(Order::MAX));
        }
        self.member.load(read, self.room)?;
        let is_invited = self.membership_in(read, self.member.now)? == Membership::Invite;
        if is_invited && self.visibility_in(read, self.visibility.now)? == HistoryVisibility::Invited {
            return Ok(Some(Order::MAX));
        }
        // Between two changes of either key nothing is seen above the lower one that is not seen at the higher one.
        let visibilities = self.visibility.all_changes(read, self.room)?;
        let memberships = self.member.all_changes(read, self.room)?;
        let changes: BTreeSet<Order> =
            visibilities.iter().chain(&memberships).map(|(order, _)| *order).collect();
        let joined_until = self.joined_until;
        for order in changes.into_iter().rev().take_while(|order| joined_until.is_none_or(|end| *order > end))
        {
            let member = around(&memberships, self.member.now, order);
            let visibility = around(&visibilities, self.visibility.now, order);
            let mut was_invited = false;
            for value in member {
                was_invited |=
                    order >= self.invited_from && self.membership_in(read, value)? == Membership::Invite;
            }
            for value in visibility {
                match self.visibility_in(read, value)? {
                    HistoryVisibility::WorldReadable => return Ok(Some(order)),
                    HistoryVisibility::Invited if was_invited => return Ok(Some(order)),
                    HistoryVisibility::Invited | HistoryVisibility::Shared | HistoryVisibility::Joined => {}
                }
            }
        }
        Ok(self.joined_until)
    }

    /// Whether the user is joined, and the room's history was never less than shared: then nothing need be asked for
    /// each event. A room whose visibility changed often is not looked through; the answer is `false`.
    pub fn sees_everything(&mut self, read: &(impl Read + ?Sized)) -> Result<bool, Fault> {
        if self.joined_until != Some(Order::MAX) {
            return Ok(false);
        }
        if let Some(known) = self.is_open {
            return Ok(known);
        }
        self.visibility.load(read, self.room)?;
        if !self.visibility.is_whole() {
            return Ok(false);
        }
        let values: Vec<StateValue> = self.visibility.changes.iter().map(|(_, before)| *before).collect();
        let mut is_open = true;
        for value in values.into_iter().chain([self.visibility.now]) {
            let visibility = self.visibility_in(read, value)?;
            is_open &= matches!(visibility, HistoryVisibility::Shared | HistoryVisibility::WorldReadable);
        }
        self.is_open = Some(is_open);
        Ok(is_open)
    }

    /// Lists the anchors between which the user sees every event of the main line: the first and the last of each range, rising. What
    /// is missing from it may be seen all the same: events within a hole in which visibility or membership changed, and what came
    /// before the oldest changes that are looked at.
    pub fn seen(&mut self, read: &(impl Read + ?Sized)) -> Result<Vec<(Position, Position)>, Fault> {
        if self.sees_everything(read)? {
            return Ok(vec![(Position::ZERO, Position::MAX)]);
        }
        self.visibility.load(read, self.room)?;
        self.member.load(read, self.room)?;
        let visibilities = self.visibility.all_changes(read, self.room)?;
        let memberships = self.member.all_changes(read, self.room)?;
        let is_cut = [&visibilities, &memberships].iter().any(|changes| changes.len() >= ALL_CHANGES_MAX);
        let changes: BTreeSet<Order> =
            visibilities.iter().chain(&memberships).map(|(order, _)| *order).collect();
        let (mut seen, mut below) = (Vec::new(), None::<Order>);
        // The first anchor of the range that goes on, while the user sees what stands here.
        let mut since: Option<Position> = None;
        for above in changes.into_iter().map(Some).chain([None]) {
            let at = above.unwrap_or(Order::MAX);
            let [member, _] = around(&memberships, self.member.now, at);
            let [visibility, _] = around(&visibilities, self.visibility.now, at);
            let membership = self.membership_in(read, member)?;
            let is_of_stay = self.joined_until.is_some_and(|until| at <= until);
            let was_invited =
                membership == Membership::Invite && (is_of_stay || below >= Some(self.invited_from));
            let sees = is_of_stay && membership == Membership::Join
                || match self.visibility_in(read, visibility)? {
                    HistoryVisibility::WorldReadable => true,
                    HistoryVisibility::Shared => is_of_stay,
                    HistoryVisibility::Invited => was_invited,
                    HistoryVisibility::Joined => false,
                };
            let first = below.map_or(Position::ZERO, |below| below.anchor.plus(1));
            let last_below = below.map_or(Position::ZERO, |below| below.anchor.before());
            if sees && !(is_cut && below.is_none()) {
                since = since.or(Some(first));
            } else if let Some(since) = since.take().filter(|since| *since <= last_below) {
                seen.push((since, last_below));
            }
            below = above;
        }
        seen.extend(since.map(|since| (since, Position::MAX)));
        Ok(seen)
    }

    /// Finds where the user joined for the first time, if a stay of theirs ended below an order; `None` if none did.
    /// Beyond a bound, the oldest changes of membership are not looked at.
    fn first_stay(&mut self, read: &(impl Read + ?Sized), end: Order) -> Result<Option<Order>, Fault> {
        self.member.load(read, self.room)?;
        let changes = self.member.all_changes(read, self.room)?;
        let afters: Vec<StateValue> =
            changes.iter().skip(1).map(|(_, before)| *before).chain([self.member.now]).collect();
        let mut joined = None;
        for ((order, before), after) in changes.into_iter().zip(afters) {
            let was_in = self.membership_in(read, before)? == Membership::Join;
            let is_in = self.membership_in(read, after)? == Membership::Join;
            if is_in || was_in {
                joined = joined.or(Some(order));
            }
            if was_in && !is_in {
                return Ok(joined.filter(|_| order < end));
            }
        }
        Ok(None)
    }

    /// The id of the user whose sight this is.
    pub fn user(&self) -> &str {
        &self.user
    }
}

/// Gives the values of a key just before and just after an order, from all its changes and from its value now.
fn around(changes: &[(Order, StateValue)], now: StateValue, order: Order) -> [StateValue; 2] {
    let at = changes.partition_point(|(change, _)| *change < order);
    let value = |at: usize| changes.get(at).map_or(now, |(_, before)| *before);
    let is_change = changes.get(at).is_some_and(|(change, _)| *change == order);
    [value(at), value(at + usize::from(is_change))]
}

/// Tells up to where a user with this row has been joined, perhaps with breaks; `None` for a user who never was, or has
/// forgotten the room.
fn joined_until(row: &UserRoomRow) -> Option<Order> {
    match row.membership {
        Membership::Join => Some(Order::MAX),
        _ if row.forgotten => None,
        _ => row.left,
    }
}

/// The reader of a room: the events that they may see, and the users of whom they do not want to hear. All code that
/// shows events to a user, or events inside others, asks this.
pub struct Reader {
    sight: RefCell<Sight>,
    ignored: Arc<Ignored>,
}

impl Reader {
    /// The reader who is this user of ours, with the number of the account and the users they ignore.
    pub fn of(
        read: &(impl Read + ?Sized),
        room: RoomNum,
        user: UserNum,
        user_id: &UserId,
        ignored: Arc<Ignored>,
    ) -> Result<Self, Fault> {
        Ok(Self { sight: RefCell::new(Sight::of(read, room, user, user_id)?), ignored })
    }

    /// The reader who is this user, with this membership of the room.
    pub fn with_row(room: RoomNum, user_id: &UserId, row: &UserRoomRow, ignored: Arc<Ignored>) -> Self {
        Self { sight: RefCell::new(Sight::with_row(room, user_id, Some(row))), ignored }
    }

    /// Gives the user's membership of the room at this event, and whether they may see the event and want to.
    pub fn look(
        &self,
        read: &(impl Read + ?Sized),
        stored: &StoredEvent,
    ) -> Result<(Membership, bool), Fault> {
        let mut sight = self.sight.borrow_mut();
        let (membership, sees) = sight.look(read, stored)?;
        if !sees {
            tracing::debug!(
                room = sight.room.0,
                event = stored.event().0,
                user_id = sight.user,
                reason = "history visibility",
                "an event is withheld"
            );
        }
        Ok((membership, sees && !self.ignores(stored)))
    }

    /// Whether the user may see this event and wants to.
    pub fn sees(&self, read: &(impl Read + ?Sized), stored: &StoredEvent) -> Result<bool, Fault> {
        Ok(self.look(read, stored)?.1)
    }

    /// Whether the user may see this event, be its sender ignored or not.
    pub fn may_see(&self, read: &(impl Read + ?Sized), stored: &StoredEvent) -> Result<bool, Fault> {
        let mut sight = self.sight.borrow_mut();
        Ok(sight.sees_everything(read)? || sight.can_see(read, stored)?)
    }

    /// Whether the user does not want this event, because it is a message of somebody ignored. State is never ignored,
    /// because it is the room's, whoever set it.
    pub fn ignores(&self, stored: &StoredEvent) -> bool {
        !self.ignored.is_empty()
            && stored.row.header.state_key.is_none()
            && self.ignored.contains(&stored.row.sender())
    }

    /// Whether the user sees and wants every event of the room, so that nothing need be asked for each.
    pub fn sees_everything(&self, read: &(impl Read + ?Sized)) -> Result<bool, Fault> {
        Ok(self.ignored.is_empty() && self.sight.borrow_mut().sees_everything(read)?)
    }

    /// Whether the user may see every event of the room, be its sender ignored or not.
    pub fn may_see_everything(&self, read: &(impl Read + ?Sized)) -> Result<bool, Fault> {
        self.sight.borrow_mut().sees_everything(read)
    }

    /// Tells up to where the user has been joined: see [`Sight::joined_until`].
    pub fn joined_until(&self) -> Option<Order> {
        self.sight.borrow().joined_until
    }

    /// Whether the user is joined to the room now.
    pub fn is_joined(&self) -> bool {
        self.joined_until() == Some(Order::MAX)
    }

    /// Gives the order above which the user sees nothing: see [`Sight::end`].
    pub fn end(&self, read: &(impl Read + ?Sized)) -> Result<Option<Order>, Fault> {
        self.sight.borrow_mut().end(read)
    }

    /// Finds where the user joined for the first time, if a stay of theirs ended below an order; `None` if none did.
    pub fn first_stay(&self, read: &(impl Read + ?Sized), end: Order) -> Result<Option<Order>, Fault> {
        self.sight.borrow_mut().first_stay(read, end)
    }
}

#[cfg(test)]
mod tests;
