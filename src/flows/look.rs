//! Looking at a room: its state, its members, its events, as far as the caller may see them.
//!
//! Each of these reads one snapshot, off the async threads, and splices its answer from stored bytes.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use ruma::{EventId, OwnedEventId, OwnedUserId, RoomId, api::client::filter::RoomEventFilter};

use crate::{
    accounts::Caller,
    error::{Error, Refusal, Result},
    flows::{App, commit},
    ids::{EventNum, Order, Position, RoomNum},
    rooms::{
        self,
        event::{self, Stored, Viewer},
        filter, members, relations, state,
        timeline::{self, PageToken},
        visibility::{self, HistoryVisibility, Sight},
    },
    store::{
        Direction, Read, Snapshot,
        schema::{
            rooms::{Membership, RoomRow},
            state::Ref,
        },
    },
    sync::SyncToken,
};

/// Events looked at for one page, at most: a filter or visibility that lets hardly anything through makes several
/// short pages, not one long one.
const SCANNED_MAX: usize = 5_000;
/// Events in one page, at most.
const PAGE_MAX: usize = 1_000;

/// A room as one caller looks at it: one snapshot for the whole answer.
pub(crate) struct Look {
    snapshot: Arc<Snapshot>,
    num: RoomNum,
    room: RoomRow,
    user: OwnedUserId,
    device: String,
    now_ms: u64,
    sight: Sight,
}

/// From where the caller sees the room's state.
#[derive(Clone, Copy, Debug)]
enum Standpoint {
    /// As it is.
    Now,
    /// As it was when they left.
    Left(Order),
}

impl Look {
    fn at(app: &App, caller: &Caller, room: &RoomId) -> Result<Self> {
        let snapshot = app.store.snapshot();
        let num = rooms::find_room(&*snapshot, room)?.ok_or_else(commit::not_in_room)?;
        let row = rooms::require_row(&*snapshot, num)?;
        let sight = Sight::of(&*snapshot, num, &caller.user_id)?;
        let (user, device) = (caller.user_id.clone(), caller.device_id.to_string());
        Ok(Self { snapshot, num, room: row, user, device, now_ms: app.env.now_ms(), sight })
    }

    fn viewer(&self) -> Viewer<'_> {
        Viewer { user: &self.user, device: Some(&self.device), now_ms: self.now_ms, with_room_id: true }
    }

    /// Refuses who never was in the room, has forgotten it, and may not look in from outside: 403 `M_FORBIDDEN`.
    fn standpoint(&mut self, caller: &Caller) -> Result<Standpoint> {
        if self.sight.joined_until() == Some(Order::MAX)
            || visibility::current(&*self.snapshot, self.num)? == HistoryVisibility::WorldReadable
        {
            return Ok(Standpoint::Now);
        }
        let forgotten =
            members::find(&*self.snapshot, caller.user, self.num)?.is_some_and(|row| row.forgotten);
        match self.sight.joined_until() {
            Some(left) if !forgotten => Ok(Standpoint::Left(left)),
            _ => Err(commit::not_in_room().into()),
        }
    }

    fn show(&self, stored: &Stored, membership: Membership) -> Result<String> {
        Ok(event::show(&*self.snapshot, self.num, &self.room, stored, &self.viewer(), Some(membership))?)
    }

    fn show_state(&self, stored: &Stored) -> Result<String> {
        Ok(event::show_plain(&*self.snapshot, self.num, &self.room, stored, &self.viewer())?)
    }

    /// The state event of a key, as the caller sees the room.
    fn find_state(&self, at: Standpoint, kind: &str, state_key: &str) -> Result<Option<Stored>> {
        let read = &*self.snapshot;
        let Some(key) = state::find_key(read, self.num, kind, state_key)? else { return Ok(None) };
        let event = match at {
            Standpoint::Now => state::current(read, self.num, key)?,
            Standpoint::Left(order) => state::at(read, self.num, Ref::Main(order), key)?.event(),
        };
        Ok(event.map(|event| event::require(read, self.num, event)).transpose()?)
    }

    /// A place before a room began (the start of a timeline that holds all of it) stands for the moment when its
    /// maker was in it: nobody can be in a room before that.
    fn not_before_the_maker(&self, at: PageToken) -> Result<PageToken> {
        let joined = event::find(&*self.snapshot, self.num, EventNum(1))?;
        let joined = joined.filter(|stored| stored.membership() == Some(Membership::Join));
        Ok(joined.map_or(at, |joined| at.max(PageToken::above(joined.order))))
    }

    /// The member events of the senders of these events, as of an order.
    fn members_of(&self, events: &[&Stored], at: Order) -> Result<Vec<String>> {
        let senders: BTreeSet<_> = events.iter().map(|stored| stored.row.sender().into_owned()).collect();
        let mut shown = Vec::with_capacity(senders.len());
        for sender in senders {
            if let Some(member) = self.find_state(Standpoint::Left(at), "m.room.member", &sender)? {
                shown.push(self.show_state(&member)?);
            }
        }
        Ok(shown)
    }
}

async fn looking<T: Send + 'static>(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    work: impl FnOnce(Look, &Caller) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (inner, caller, room) = (app.clone(), caller.clone(), room.to_owned());
    app.env.blocking(move || work(Look::at(&inner, &caller, &room)?, &caller)).await
}

fn list_json(events: &[String]) -> String {
    format!("[{}]", events.join(","))
}

/// The whole state of a room: current, or as it was when the caller left.
pub(crate) async fn state(app: &App, caller: &Caller, room: &RoomId) -> Result<Bytes> {
    looking(app, caller, room, |mut look, caller| {
        let at = match look.standpoint(caller)? {
            Standpoint::Now => Ref::Main(Order::MAX),
            Standpoint::Left(order) => Ref::Main(order),
        };
        let mut shown = Vec::new();
        for row in state::full(&*look.snapshot, look.num, at)? {
            let (_, event) = row?;
            // Keys that we derive ourselves have no event.
            if let Some(stored) = event::find(&*look.snapshot, look.num, event)? {
                shown.push(look.show_state(&stored)?);
            }
        }
        Ok(list_json(&shown).into())
    })
    .await
}

/// One piece of a room's state: its content, or the event. Refuses what is not set: 404 `M_NOT_FOUND`.
pub(crate) async fn state_event(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    kind: String,
    state_key: String,
    whole_event: bool,
) -> Result<Bytes> {
    looking(app, caller, room, move |mut look, caller| {
        let at = look.standpoint(caller)?;
        let stored = look.find_state(at, &kind, &state_key)?;
        let stored = stored.ok_or_else(|| Refusal::not_found("The room has no such state."))?;
        let json = if whole_event { look.show_state(&stored)? } else { stored.row.content().to_owned() };
        Ok(json.into())
    })
    .await
}

/// Which member events are asked for.
#[derive(Debug)]
pub(crate) struct MembersWanted {
    /// As of this token of `/sync` or `/messages`.
    pub(crate) at: Option<String>,
    /// Of these memberships only.
    pub(crate) only: Option<String>,
    /// Of other memberships than this.
    pub(crate) not: Option<String>,
}

/// The member events of a room.
pub(crate) async fn members(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    wanted: MembersWanted,
) -> Result<Bytes> {
    looking(app, caller, room, move |mut look, caller| {
        let standpoint = look.standpoint(caller)?;
        let at = wanted.at.as_deref().map(place).transpose()?;
        let at = at.map(|at| look.not_before_the_maker(at)).transpose()?;
        let at = match (standpoint, at) {
            (Standpoint::Now, None) => None,
            (Standpoint::Now, Some(at)) => Some(at.0),
            (Standpoint::Left(left), None) => Some(left),
            (Standpoint::Left(left), Some(at)) => Some(at.0.min(left)),
        };
        let read = &*look.snapshot;
        let mut shown = Vec::new();
        for key in members::list_keys(read, look.num)? {
            let (_, key) = key?;
            let event = match at {
                None => state::current(read, look.num, key)?,
                Some(at) => state::at(read, look.num, Ref::Main(at), key)?.event(),
            };
            let Some(event) = event else { continue };
            let stored = event::require(read, look.num, event)?;
            let membership = stored.membership().map(Membership::as_str);
            let wants = wanted.only.as_deref().is_none_or(|only| membership == Some(only))
                && wanted.not.as_deref().is_none_or(|not| membership != Some(not));
            if wants {
                shown.push(look.show_state(&stored)?);
            }
        }
        Ok(format!(r#"{{"chunk":{}}}"#, list_json(&shown)).into())
    })
    .await
}

/// The users who are in a room, with their names and pictures. Only for those in it: 403 `M_FORBIDDEN`.
pub(crate) async fn joined_members(
    app: &App,
    caller: &Caller,
    room: &RoomId,
) -> Result<Vec<(OwnedUserId, Stored)>> {
    looking(app, caller, room, |look, _| {
        if look.sight.joined_until() != Some(Order::MAX) {
            return Err(commit::not_in_room().into());
        }
        let mut members = members::list_current(&*look.snapshot, look.num)?;
        members.retain(|(_, stored)| stored.membership() == Some(Membership::Join));
        Ok(members)
    })
    .await
}

/// One event. Refuses one that is not there or that the caller may not see: 404 `M_NOT_FOUND`.
pub(crate) async fn event(app: &App, caller: &Caller, room: &RoomId, id: &EventId) -> Result<Bytes> {
    let id = id.to_owned();
    looking(app, caller, room, move |mut look, _| {
        let (stored, membership) = require_visible(&mut look, &id)?;
        Ok(look.show(&stored, membership)?.into())
    })
    .await
}

fn require_visible(look: &mut Look, id: &EventId) -> Result<(Stored, Membership)> {
    let snapshot = Arc::clone(&look.snapshot);
    let unknown = || Error::from(Refusal::not_found("There is no such event, or you may not see it."));
    let stored = event::find_by_id(&*snapshot, look.num, id)?.filter(|stored| !stored.row.header.unseen);
    let stored = stored.ok_or_else(unknown)?;
    match look.sight.look(&*snapshot, &stored)? {
        (membership, true) => Ok((stored, membership)),
        _ => Err(unknown()),
    }
}

/// Reads a token of `/messages` or of `/sync`: both name a place in the room.
pub(crate) fn place(token: &str) -> Result<PageToken, Refusal> {
    if token.starts_with('s') {
        return SyncToken::parse(token).map(|token| PageToken(token.order()));
    }
    PageToken::parse(token)
}

/// A page of a room's timeline that is asked for.
#[derive(Debug)]
pub(crate) struct PageWanted {
    /// From here; from the newest or the oldest event, if none.
    pub(crate) from: Option<String>,
    /// To here, if the page reaches so far.
    pub(crate) to: Option<String>,
    /// Which way.
    pub(crate) direction: Direction,
    /// How many events at most.
    pub(crate) limit: u64,
    /// Which events.
    pub(crate) filter: RoomEventFilter,
}

/// Events with what the caller was to the room at each, and where to go on: `None` at the end.
struct Page {
    events: Vec<(Stored, Membership)>,
    next: Option<PageToken>,
}

fn read_page(
    look: &mut Look,
    from: PageToken,
    to: Option<PageToken>,
    direction: Direction,
    limit: usize,
    wanted: &RoomEventFilter,
) -> Result<Page> {
    let snapshot = Arc::clone(&look.snapshot);
    let mut page = Page { events: Vec::new(), next: None };
    let mut last = None;
    for (scanned, stored) in timeline::page(&*snapshot, look.num, from, to, direction)?.enumerate() {
        if page.events.len() >= limit || scanned >= SCANNED_MAX {
            page.next = last;
            break;
        }
        let stored = stored?;
        last = Some(match direction {
            Direction::Up => PageToken::above(stored.order),
            Direction::Down => PageToken::below(stored.order),
        });
        if !filter::allows(wanted, &stored) {
            continue;
        }
        if let (membership, true) = look.sight.look(&*snapshot, &stored)? {
            page.events.push((stored, membership));
        }
    }
    Ok(page)
}

fn bounded(limit: u64) -> usize {
    usize::try_from(limit).unwrap_or(PAGE_MAX).min(PAGE_MAX)
}

/// A page of a room's timeline.
pub(crate) async fn messages(app: &App, caller: &Caller, room: &RoomId, wanted: PageWanted) -> Result<Bytes> {
    looking(app, caller, room, move |mut look, caller| {
        let newest = match look.standpoint(caller)? {
            Standpoint::Now => PageToken(Order::upto(look.snapshot.upto())),
            Standpoint::Left(order) => PageToken(order),
        };
        let from = wanted.from.as_deref().map(place).transpose()?;
        let to = wanted.to.as_deref().map(place).transpose()?;
        let from = match wanted.direction {
            Direction::Up => from.unwrap_or(PageToken(Order::MIN)),
            Direction::Down => from.unwrap_or(newest).min(newest),
        };
        let page = if filter::allows_room(&wanted.filter, &look.room.id) {
            read_page(&mut look, from, to, wanted.direction, bounded(wanted.limit).max(1), &wanted.filter)?
        } else {
            Page { events: Vec::new(), next: None }
        };
        let mut chunk = Vec::with_capacity(page.events.len());
        for (stored, membership) in &page.events {
            chunk.push(look.show(stored, *membership)?);
        }
        let mut json = format!(r#"{{"start":"{from}","chunk":{}"#, list_json(&chunk));
        if let Some(next) = page.next {
            json.push_str(&format!(r#","end":"{next}""#));
        }
        let events: Vec<_> = page.events.iter().map(|(stored, _)| stored).collect();
        let lazy = !wanted.filter.lazy_load_options.is_disabled();
        // As of the event that the page begins with.
        let state = match events.first().filter(|_| lazy) {
            Some(first) => look.members_of(&events, first.order)?,
            None => Vec::new(),
        };
        json.push_str(&format!(r#","state":{}}}"#, list_json(&state)));
        Ok(json.into())
    })
    .await
}

/// An event with those around it.
pub(crate) async fn context(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    id: &EventId,
    limit: u64,
    wanted: RoomEventFilter,
) -> Result<Bytes> {
    let id = id.to_owned();
    looking(app, caller, room, move |mut look, _| {
        let (stored, membership) = require_visible(&mut look, &id)?;
        let limit = bounded(limit);
        let (below, above) = (PageToken::below(stored.order), PageToken::above(stored.order));
        let before = read_page(&mut look, below, None, Direction::Down, limit / 2, &wanted)?;
        let after = read_page(&mut look, above, None, Direction::Up, limit - limit / 2, &wanted)?;
        let show = |page: &Page| -> Result<String> {
            let shown: Result<Vec<_>> = page.events.iter().map(|(stored, was)| look.show(stored, *was)).collect();
            Ok(list_json(&shown?))
        };
        let start = before.events.last().map_or(below, |(oldest, _)| PageToken::below(oldest.order));
        let end = after.events.last().map_or(above, |(newest, _)| PageToken::above(newest.order));
        let state = if !wanted.lazy_load_options.is_disabled() {
            let around = before.events.iter().chain(&after.events).map(|(stored, _)| stored);
            look.members_of(&around.chain([&stored]).collect::<Vec<_>>(), end.0)?
        } else {
            let mut shown = Vec::new();
            for row in state::full(&*look.snapshot, look.num, Ref::Main(end.0))? {
                let (_, event) = row?;
                if let Some(stored) = event::find(&*look.snapshot, look.num, event)?
                    && filter::allows(&wanted, &stored)
                {
                    shown.push(look.show_state(&stored)?);
                }
            }
            shown
        };
        let json = format!(
            r#"{{"start":"{start}","end":"{end}","event":{},"events_before":{},"events_after":{},"state":{}}}"#,
            look.show(&stored, membership)?,
            show(&before)?,
            show(&after)?,
            list_json(&state)
        );
        Ok(json.into())
    })
    .await
}

/// Which of the events that refer to one are asked for.
#[derive(Debug)]
pub(crate) struct RelationsWanted {
    /// Refer in this way only.
    pub(crate) rel_type: Option<String>,
    /// Of this type only.
    pub(crate) event_type: Option<String>,
    /// From here.
    pub(crate) from: Option<String>,
    /// To here.
    pub(crate) to: Option<String>,
    /// Which way.
    pub(crate) direction: Direction,
    /// How many at most.
    pub(crate) limit: u64,
    /// Also what refers to those, and to those again.
    pub(crate) recurse: bool,
}

/// How deep relations of relations are followed.
const RECURSION_MAX: u32 = 3;

/// The events that refer to one.
pub(crate) async fn relations(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    id: &EventId,
    wanted: RelationsWanted,
) -> Result<Bytes> {
    let id = id.to_owned();
    looking(app, caller, room, move |mut look, _| {
        let (parent, _) = require_visible(&mut look, &id)?;
        let snapshot = Arc::clone(&look.snapshot);
        let mut found = Vec::new();
        let mut parents = vec![parent.event()];
        let depth = if wanted.recurse { RECURSION_MAX } else { 1 };
        for _ in 0..depth {
            let mut children = Vec::new();
            for parent in parents {
                for row in relations::list(&*snapshot, look.num, parent, Direction::Up)? {
                    let (order, row) = row?;
                    children.push(row.event);
                    let fits = wanted.rel_type.as_ref().is_none_or(|rel_type| *rel_type == row.rel_type)
                        && wanted.event_type.as_ref().is_none_or(|event_type| *event_type == row.event_type);
                    if fits {
                        found.push((order, row.event));
                    }
                    if children.len() > SCANNED_MAX {
                        break;
                    }
                }
            }
            parents = children;
        }
        found.sort_unstable();
        let from = wanted.from.as_deref().map(place).transpose()?.map(|token| token.0);
        let to = wanted.to.as_deref().map(place).transpose()?.map(|token| token.0);
        match wanted.direction {
            Direction::Up => found.retain(|(order, _)| {
                from.is_none_or(|from| *order > from) && to.is_none_or(|to| *order <= to)
            }),
            Direction::Down => {
                found.retain(|(order, _)| {
                    from.is_none_or(|from| *order <= from) && to.is_none_or(|to| *order > to)
                });
                found.reverse();
            }
        }
        let (mut chunk, mut next) = (Vec::new(), None);
        let mut last = None;
        for (order, event) in found {
            if chunk.len() >= bounded(wanted.limit).max(1) {
                next = last;
                break;
            }
            last = Some(match wanted.direction {
                Direction::Up => PageToken::above(order),
                Direction::Down => PageToken::below(order),
            });
            let stored = event::require(&*snapshot, look.num, event)?;
            if let (membership, true) = look.sight.look(&*snapshot, &stored)? {
                chunk.push(look.show(&stored, membership)?);
            }
        }
        let mut json = format!(r#"{{"chunk":{}"#, list_json(&chunk));
        if let Some(next) = next {
            json.push_str(&format!(r#","next_batch":"{next}""#));
        }
        if let Some(from) = &from {
            json.push_str(&format!(r#","prev_batch":"{}""#, PageToken(*from)));
        }
        if wanted.recurse {
            json.push_str(&format!(r#","recursion_depth":{RECURSION_MAX}"#));
        }
        json.push('}');
        Ok(json.into())
    })
    .await
}

/// The threads of a room, the one with the newest event first.
pub(crate) async fn threads(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    from: Option<String>,
    limit: u64,
    only_own: bool,
) -> Result<Bytes> {
    looking(app, caller, room, move |mut look, caller| {
        let newest = match look.standpoint(caller)? {
            Standpoint::Now => Order::MAX,
            Standpoint::Left(order) => order,
        };
        let from = from.as_deref().map(place).transpose()?.map_or(newest, |from| from.0.min(newest));
        let snapshot = Arc::clone(&look.snapshot);
        let (mut chunk, mut next, mut last) = (Vec::new(), None, None);
        for (scanned, thread) in relations::list_threads(&*snapshot, look.num, from)?.enumerate() {
            if chunk.len() >= bounded(limit).max(1) || scanned >= SCANNED_MAX {
                next = last;
                break;
            }
            let (order, root) = thread?;
            last = Some(PageToken::below(order));
            let root = event::require(&*snapshot, look.num, root)?;
            if only_own && !relations::took_part(&*snapshot, look.num, &root, &caller.user_id)? {
                continue;
            }
            if let (membership, true) = look.sight.look(&*snapshot, &root)? {
                chunk.push(look.show(&root, membership)?);
            }
        }
        let next = next.map(|next| format!(r#","next_batch":"{next}""#)).unwrap_or_default();
        Ok(format!(r#"{{"chunk":{}{next}}}"#, list_json(&chunk)).into())
    })
    .await
}

/// Steps of the search for a time, and events looked at once it is near.
const TIME_STEPS_MAX: usize = 64;
const TIME_SCANNED_MAX: usize = 1_000;

/// The event nearest to a time: the first at or after it, or the last at or before it. Refuses if there is none:
/// 404 `M_NOT_FOUND`.
///
/// Events stand in the order in which they came, which is nearly that of their times: the place is found by halving,
/// then the events around it are compared.
pub(crate) async fn event_at_time(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    time_ms: u64,
    direction: Direction,
) -> Result<(OwnedEventId, u64)> {
    looking(app, caller, room, move |mut look, caller| {
        let newest = match look.standpoint(caller)? {
            Standpoint::Now => Order::upto(look.snapshot.upto()),
            Standpoint::Left(order) => order,
        };
        let snapshot = Arc::clone(&look.snapshot);
        let (mut low, mut high) = (0, newest.anchor.number());
        for _ in 0..TIME_STEPS_MAX {
            let middle = low + (high - low) / 2;
            if middle == low {
                break;
            }
            let below = PageToken(Order::upto(Position::new(middle).unwrap_or(newest.anchor)));
            let first =
                timeline::page(&*snapshot, look.num, below, None, Direction::Up)?.next().transpose()?;
            match first {
                Some(stored) if stored.row.header.sent_ms < time_ms => low = middle,
                _ => high = middle,
            }
        }
        // Times are those of other clocks: look at some events on the near side too.
        let near = PageToken(Order::upto(Position::new(low).unwrap_or(newest.anchor)));
        let start = match direction {
            Direction::Up => Direction::Down,
            Direction::Down => Direction::Up,
        };
        let start =
            timeline::page(&*snapshot, look.num, near, None, start)?.take(TIME_SCANNED_MAX / 10).last();
        let start = match start.transpose()? {
            Some(stored) if direction == Direction::Up => PageToken::below(stored.order),
            Some(stored) => PageToken::above(stored.order),
            None => near,
        };
        let mut best: Option<Stored> = None;
        for stored in timeline::page(&*snapshot, look.num, start, None, direction)?.take(TIME_SCANNED_MAX) {
            let stored = stored?;
            let time = stored.row.header.sent_ms;
            let fits = if direction == Direction::Up { time >= time_ms } else { time <= time_ms };
            let nearer = best
                .as_ref()
                .is_none_or(|best| time.abs_diff(time_ms) < best.row.header.sent_ms.abs_diff(time_ms));
            if fits && nearer && stored.order <= newest && look.sight.can_see(&*snapshot, &stored)? {
                best = Some(stored);
            }
        }
        let best =
            best.ok_or_else(|| Error::from(Refusal::not_found("There is no event near that time.")))?;
        Ok((best.id(&look.room), best.row.header.sent_ms))
    })
    .await
}
