//! Plans what is sent to a pusher next. It is looked at again just before it is sent, because much may have happened since it waits.

use std::ops::Bound;

use bytes::Bytes;
use ruma::OwnedUserId;

use crate::{
    accounts::users,
    ids::{Order, Position, RoomNum, UserNum},
    push::{
        Push, Reader,
        notice::{self, Device, Told},
        pushers,
    },
    rooms::{
        self,
        event::{self, StoredEvent},
        members,
    },
    schema::{
        self,
        push::PusherRow,
        rooms::{Membership, RoomRow},
    },
    store::{Direction, Fault, Read, tail},
};

/// Nothing that is older than this is pushed.
const OLD_MS: u64 = 24 * 60 * 60 * 1000;
/// Look at no more than this many events of a room for the newest that notifies, for a pusher that is behind.
const LOOKED_AT_MAX: usize = 100;
/// Look at no more than this many events of all rooms in one plan, for a pusher that is behind.
const LOOKED_AT_IN_ALL_MAX: usize = 2_000;
/// Look at no more than this many rooms, for a pusher that is behind.
const ROOMS_MAX: usize = 10_000;

/// Something that may be news for a pusher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    /// The event of a room at this position, or an invitation from outside it.
    Event {
        /// The room of the event.
        room: RoomNum,
        /// The position at which it was accepted.
        at: Position,
    },
    /// The number of unread messages may have changed at this position without an event that notifies.
    Counts {
        /// The position of what changed it.
        at: Position,
    },
}

impl Item {
    /// The position of what happened.
    pub fn at(self) -> Position {
        match self {
            Self::Event { at, .. } | Self::Counts { at } => at,
        }
    }
}

/// A pusher for which something may be due.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The user who has the pusher.
    pub user: UserNum,
    /// The app id of the pusher.
    pub app_id: String,
    /// The pushkey of the pusher.
    pub pushkey: String,
    /// The position up to which everything is dealt with.
    pub upto: Position,
    /// The number of unread messages that the gateway was told last.
    pub badge: Option<u64>,
    /// The news in their order; `None` for a pusher that is behind, whose news are looked for in the user's rooms.
    pub items: Option<Vec<Item>>,
}

/// A request to a gateway.
#[derive(Clone, Debug)]
pub struct Request {
    /// The URL of the gateway.
    pub url: String,
    /// The body of the request.
    pub json: Bytes,
    /// The position up to which everything is dealt with once it is sent.
    pub upto: Position,
    /// The number of unread messages that the gateway was told last, once it is sent.
    pub badge: Option<u64>,
    /// The pusher as it was when the request was made.
    pub row: PusherRow,
}

/// The next step of a pusher.
#[derive(Clone, Debug)]
pub enum Plan {
    /// There is no such pusher any more, or none that anything is sent to.
    Gone,
    /// Nothing of what waited is to be sent.
    Nothing {
        /// The position up to which everything is dealt with.
        upto: Position,
    },
    /// This is to be sent.
    Send(Box<Request>),
}

/// Plans the next request of a pusher.
pub fn plan(read: &(impl Read + ?Sized), push: &Push, now_ms: u64, wanted: &Wanted) -> Result<Plan, Fault> {
    let key = (wanted.user, wanted.app_id.as_str(), wanted.pushkey.as_str());
    let Some(row) = pushers::find(read, key)?.filter(|row| row.is_enabled) else { return Ok(Plan::Gone) };
    let Some(account) = users::find(read, wanted.user)? else { return Ok(Plan::Gone) };
    let Some(device) = Device::of(&wanted.app_id, &wanted.pushkey, &row) else { return Ok(Plan::Gone) };
    let upto = match &wanted.items {
        Some(items) => items.last().map_or(wanted.upto, |item| item.at().max(wanted.upto)),
        None => read.upto(),
    };
    if account.is_deactivated || account.is_locked {
        return Ok(Plan::Nothing { upto });
    }
    let oldest_ms = now_ms.saturating_sub(OLD_MS);
    let planner = Planner {
        read,
        reader: push.reader(read, wanted.user, &account.user_id)?,
        user_id: account.user_id.clone(),
        oldest: tail::position_at(read, oldest_ms)?,
        oldest_ms,
        device,
    };
    let (found, upto) = match &wanted.items {
        Some(items) => match planner.first_of(items, wanted)? {
            First::Found(at, told) => (Some((at, *told)), at),
            First::None => (None, upto),
            // The rest is looked at in the next plan.
            First::Spent(at) => return Ok(Plan::Nothing { upto: at }),
        },
        None => (planner.oldest_of_newest(wanted)?, upto),
    };
    let (json, upto, badge) = match found {
        Some((at, told)) => {
            let unread = planner.count()?;
            (notice::of_event(&planner.device, &told, unread), at, unread.or(wanted.badge))
        }
        None => {
            // A gateway that was told nothing yet shows nothing, which is as good as zero.
            let asks = wanted.items.as_ref().is_none_or(|items| items.iter().any(is_counts));
            let unread = if asks { planner.count()? } else { None };
            match unread.filter(|unread| *unread != wanted.badge.unwrap_or(0)) {
                Some(unread) => (notice::of_counts(&planner.device, unread), upto, Some(unread)),
                None => return Ok(Plan::Nothing { upto }),
            }
        }
    };
    let url = planner.device.url().to_owned();
    Ok(Plan::Send(Box::new(Request { url, json, upto, badge, row })))
}

fn is_counts(item: &Item) -> bool {
    matches!(item, Item::Counts { .. })
}

/// The outcome of a look at the news that wait.
enum First {
    /// The event at this position is to be told.
    Found(Position, Box<Told>),
    /// None of them is.
    None,
    /// None up to this position is, and the look may not go on.
    Spent(Position),
}

struct Planner<'a, R: ?Sized> {
    read: &'a R,
    reader: Reader<'a>,
    user_id: OwnedUserId,
    /// Everything at or before this position is too old.
    oldest: Position,
    oldest_ms: u64,
    device: Device<'a>,
}

impl<R: Read + ?Sized> Planner<'_, R> {
    /// The first of the events that is to be told. What changes counts before it is told with it.
    fn first_of(&self, items: &[Item], wanted: &Wanted) -> Result<First, Fault> {
        let mut looked_at = None;
        for item in items {
            let Item::Event { room, at } = *item else { continue };
            if at <= wanted.upto {
                continue;
            }
            if let Some(told) = self.find(room, at)? {
                return Ok(First::Found(at, Box::new(told)));
            }
            if self.reader.is_spent()
                && let Some(before) = looked_at
            {
                return Ok(First::Spent(before));
            }
            looked_at = Some(at);
        }
        Ok(First::None)
    }

    /// Finds what is to be told of the event, or the invitation from outside, at this position.
    fn find(&self, room: RoomNum, at: Position) -> Result<Option<Told>, Fault> {
        let Some(row) = rooms::find_row(self.read, room)? else { return Ok(None) };
        let order = Order::live(at);
        match schema::TIMELINE.get(self.read, (room, order))? {
            Some(event) => self.look(room, &row, &StoredEvent { order, row: event }),
            None => self.find_outside(room, &row, at),
        }
    }

    fn look(&self, room: RoomNum, row: &RoomRow, stored: &StoredEvent) -> Result<Option<Told>, Fault> {
        // Where the event was made here its own time is right; another server may have any.
        let is_ours = event::is_of(&stored.row.sender(), self.user_id.server_name().as_str());
        if stored.order.anchor <= self.oldest || (is_ours && stored.row.header.sent_ms < self.oldest_ms) {
            tracing::debug!(%room, order = ?stored.order, reason = "too old", "an event is not pushed");
            return Ok(None);
        }
        let notifies = self.reader.look_again(self.read, (room, row), stored)?;
        let Some(notifies) = notifies.filter(|notifies| !notifies.is_read) else { return Ok(None) };
        Told::of_event(self.read, (room, row), stored, &self.user_id, notifies.rule).map(Some)
    }

    fn find_outside(&self, room: RoomNum, row: &RoomRow, at: Position) -> Result<Option<Told>, Fault> {
        if at <= self.oldest {
            return Ok(None);
        }
        let found = self.reader.look_outside(self.read, (room, row), at)?;
        Ok(found.and_then(|(invitation, rule)| Told::of_invitation(row, &invitation, rule)))
    }

    /// The newest event of each room that is to be told, and of these the oldest: the others are found again after it.
    fn oldest_of_newest(&self, wanted: &Wanted) -> Result<Option<(Position, Told)>, Fault> {
        let after = wanted.upto.max(self.oldest);
        let mut looks = LOOKED_AT_IN_ALL_MAX;
        let mut first: Option<(Position, Told)> = None;
        let user = wanted.user;
        for room in members::list_user_rooms(self.read, user)?.take(ROOMS_MAX) {
            let (room, own) = room?;
            let Some(row) = rooms::find_row(self.read, room)? else { continue };
            let found = match own.membership {
                Membership::Join if row.tip > Order::upto(after) => {
                    self.newest_of(room, &row, after, &mut looks)?
                }
                Membership::Invite if own.since > after => {
                    self.find(room, own.since)?.map(|told| (own.since, told))
                }
                Membership::Join
                | Membership::Invite
                | Membership::Knock
                | Membership::Leave
                | Membership::Ban => None,
            };
            if let Some((at, told)) = found
                && first.as_ref().is_none_or(|(before, _)| at < *before)
            {
                first = Some((at, told));
            }
        }
        Ok(first)
    }

    fn newest_of(
        &self,
        room: RoomNum,
        row: &RoomRow,
        after: Position,
        looks: &mut usize,
    ) -> Result<Option<(Position, Told)>, Fault> {
        let (low, high) = (Bound::Excluded((room, Order::upto(after))), Bound::Included((room, Order::MAX)));
        let rows = schema::TIMELINE.range::<(RoomNum, Order)>(self.read, low, high, Direction::Down)?;
        for event in rows.take(LOOKED_AT_MAX.min(*looks)) {
            *looks = looks.saturating_sub(1);
            let ((_, order), event) = event?;
            if let Some(told) = self.look(room, row, &StoredEvent { order, row: event })? {
                return Ok(Some((order.anchor, told)));
            }
        }
        Ok(None)
    }

    /// The number of unread messages, for a pusher that wants to know.
    fn count(&self) -> Result<Option<u64>, Fault> {
        if self.device.wants_counts() { self.reader.badge(self.read).map(Some) } else { Ok(None) }
    }
}
