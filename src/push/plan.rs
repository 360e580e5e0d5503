//! Plans what is sent to a pusher next. It is looked at again just before it is sent, because much may have happened since it waits.

use bytes::Bytes;

use crate::{
    accounts::users,
    ids::{Position, RoomNum, UserNum},
    push::{
        Push,
        catch_up::{CatchUp, Step},
        looker::Looker,
        notice::{self, Device, Told},
        pushers,
    },
    schema::push::PusherRow,
    store::{Fault, Read},
};

/// Nothing that is older than this is pushed.
const OLD_MS: u64 = 24 * 60 * 60 * 1000;
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
    /// The search of a pusher that is behind, if it has begun.
    pub search: Option<CatchUp>,
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
    /// The search that goes on once it is sent, if the pusher is behind and the search found more.
    pub search: Option<CatchUp>,
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
    /// The pusher is behind, and the search for its news goes on.
    Search(CatchUp),
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
    let looker = Looker::new(read, push, (wanted.user, &account.user_id), oldest_ms)?;
    let planner = Planner { looker, device };
    let (found, upto, search) = match &wanted.items {
        Some(items) => match planner.first_of(items, wanted)? {
            First::Found(at, told) => (Some(told), at, None),
            First::None => (None, upto, None),
            // The rest is looked at in the next plan.
            First::Spent(at) => return Ok(Plan::Nothing { upto: at }),
        },
        None => {
            let search = wanted.search.clone().unwrap_or_else(|| CatchUp::begin(upto));
            match planner.catch_up(search, wanted)? {
                CaughtUp::Found(at, told, search) => (Some(told), at, Some(search)),
                CaughtUp::Nothing(upto) => (None, upto, None),
                CaughtUp::More(search) => return Ok(Plan::Search(search)),
            }
        }
    };
    let (json, upto, badge) = match found {
        Some(told) => {
            let unread = planner.count()?;
            (notice::of_event(&planner.device, &told, unread), upto, unread.or(wanted.badge))
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
    Ok(Plan::Send(Box::new(Request { url, json, upto, badge, row, search })))
}

fn is_counts(item: &Item) -> bool {
    matches!(item, Item::Counts { .. })
}

/// The outcome of going on with a search.
enum CaughtUp {
    /// The event at this position is to be told, and the search goes on after it.
    Found(Position, Box<Told>, CatchUp),
    /// The search goes on in the next plan.
    More(CatchUp),
    /// Nothing up to this position is left.
    Nothing(Position),
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
    looker: Looker<'a, R>,
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
            if let Some(told) = self.looker.find(room, at)? {
                return Ok(First::Found(at, Box::new(told)));
            }
            if self.looker.reader.is_spent()
                && let Some(before) = looked_at
            {
                return Ok(First::Spent(before));
            }
            looked_at = Some(at);
        }
        Ok(First::None)
    }

    /// Goes on with a search, to the next event that is to be told.
    fn catch_up(&self, mut search: CatchUp, wanted: &Wanted) -> Result<CaughtUp, Fault> {
        loop {
            match search.step(&self.looker, wanted.user, wanted.upto)? {
                Step::More => return Ok(CaughtUp::More(search)),
                Step::Nothing(upto) => return Ok(CaughtUp::Nothing(upto)),
                Step::Found(at, room) if self.looker.reader.is_spent() => {
                    search.put_back((at, room));
                    return Ok(CaughtUp::More(search));
                }
                // Much may have happened since it was found.
                Step::Found(at, room) => match self.looker.find(room, at)? {
                    Some(told) => return Ok(CaughtUp::Found(at, Box::new(told), search)),
                    None => search.look_below((at, room)),
                },
            }
        }
    }

    /// The number of unread messages, for a pusher that wants to know.
    fn count(&self) -> Result<Option<u64>, Fault> {
        if self.device.wants_counts() {
            self.looker.reader.badge(self.looker.read).map(Some)
        } else {
            Ok(None)
        }
    }
}
