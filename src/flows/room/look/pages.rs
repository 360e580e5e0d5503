//! Pages of a room's timeline, and the context of an event.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use ruma::{EventId, RoomId};

use super::{Look, SCANNED_MAX, bounded, looking, place, require_visible};
use crate::{
    accounts::Caller,
    error::Result,
    flows::App,
    ids::{Order, RoomNum},
    json::Object,
    rooms::{
        event::{self, StoredEvent},
        filter::{Filter, Steps},
        state,
        timeline::{self, PageToken},
    },
    schema::{rooms::Membership, state::StateRef},
    store::{Direction, Read},
};

/// A page of a room's timeline that is asked for.
#[derive(Debug)]
pub(crate) struct PageWanted {
    /// The token at which the page begins; the newest or the oldest event, if none.
    pub(crate) from: Option<String>,
    /// The token at which the page ends, if it reaches so far.
    pub(crate) to: Option<String>,
    /// The direction in which events are read.
    pub(crate) direction: Direction,
    /// The page has at most this many events.
    pub(crate) limit: u64,
    /// The filter for the events of the page.
    pub(crate) filter: Filter,
}

/// Events with the caller's membership at each, and the token to go on from: `None` at the end.
pub(super) struct Page {
    pub(super) events: Vec<(StoredEvent, Membership)>,
    pub(super) next: Option<PageToken>,
    /// The hole in the room's past at which the page ends before it is full.
    pub(super) hole: Option<Order>,
}

pub(super) fn read_page(
    look: &Look,
    from: PageToken,
    to: Option<PageToken>,
    direction: Direction,
    limit: usize,
    wanted: &Filter,
    steps: Steps,
) -> Result<Page> {
    let hole = match direction {
        // An event stands above the token of a page that ended at a hole, so that the hole is still found.
        Direction::Down => state::find_hole(&*look.snapshot, look.num, from.0.next())?.map(|(hole, _)| hole),
        Direction::Up => state::find_hole_above(&*look.snapshot, look.num, from.0)?,
    };
    read_page_to(look, from, to, direction, limit, (wanted, steps, SCANNED_MAX), hole)
}

/// Lists the events next to a place that the caller sees, the nearest first, of at most this many that are looked at. A hole
/// between them is passed over.
pub(super) fn list_near(
    look: &Look,
    from: PageToken,
    direction: Direction,
    limit: usize,
    looked_at_max: usize,
) -> Result<Vec<(StoredEvent, Membership)>> {
    if limit == 0 {
        return Ok(Vec::new());
    }
    let all = Filter::default();
    let page =
        read_page_to(look, from, None, direction, limit, (&all, Steps::of_page(), looked_at_max), None)?;
    Ok(page.events)
}

/// Reads a page that ends at this hole, if it reaches so far.
fn read_page_to(
    look: &Look,
    from: PageToken,
    to: Option<PageToken>,
    direction: Direction,
    limit: usize,
    (wanted, mut steps, scanned_max): (&Filter, Steps, usize),
    hole: Option<Order>,
) -> Result<Page> {
    let (snapshot, viewer) = (Arc::clone(&look.snapshot), look.viewer());
    // Nothing above the end of what the caller sees is read, neither an event nor a hole.
    let to = match direction {
        Direction::Up => {
            let end = PageToken(look.end()?);
            Some(to.map_or(end, |to| to.min(end)))
        }
        Direction::Down => to,
    };
    let is_before = |hole: Order, to: PageToken| match direction {
        Direction::Down => PageToken::below(hole) > to,
        Direction::Up => PageToken::below(hole) < to,
    };
    let hole = hole.filter(|hole| to.is_none_or(|to| is_before(*hole, to)));
    let to = hole.map(PageToken::below).or(to);
    let mut page = Page { events: Vec::new(), next: None, hole: None };
    let mut last = None;
    for (scanned, stored) in timeline::page(&*snapshot, look.num, from, to, direction)?.enumerate() {
        if page.events.len() >= limit || scanned >= scanned_max || steps.are_taken() {
            page.next = last;
            break;
        }
        let stored = stored?;
        last = Some(match direction {
            Direction::Up => PageToken::above(stored.order),
            Direction::Down => PageToken::below(stored.order),
        });
        if !wanted.allows(look.view(), &stored, &viewer, &mut steps)? {
            continue;
        }
        if let (membership, true) = look.reader.look(&*snapshot, &stored)? {
            page.events.push((stored, membership));
        }
    }
    if page.next.is_none() {
        page.hole = hole;
        page.next = hole.map(PageToken::below);
    }
    Ok(page)
}

/// Whether the caller sees anything beyond a page that is full: what they do not see is no reason for a token, which would tell them
/// of it. Where too many events are looked at to know, and where the page would come to a hole, there may be more.
fn may_go_on(look: &Look, next: PageToken, to: Option<PageToken>, direction: Direction) -> Result<bool> {
    let further = read_page(look, next, to, direction, 1, &Filter::default(), Steps::of_page())?;
    Ok(!further.events.is_empty() || further.next.is_some())
}

/// A page as it is answered, if nothing more is to be had of other servers.
pub(crate) struct Answered {
    /// The page as JSON.
    pub(crate) json: Bytes,
    /// The number of the room.
    pub(crate) num: RoomNum,
    /// The hole at which the page ends before it is full.
    pub(crate) hole: Option<Order>,
    /// Whether the page has no events.
    pub(crate) is_empty: bool,
}

/// Reads a page of a room's timeline as it is answered. A hole that is `passed` ends no page.
pub(crate) async fn read_messages(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    wanted: &Arc<PageWanted>,
    passed: Option<Order>,
) -> Result<Answered> {
    let wanted = Arc::clone(wanted);
    looking(app, caller, room, move |look, _| {
        // The caller sees nothing above this place, so nothing there is read.
        let end = look.end()?;
        let newest = PageToken(end.min(Order::upto(look.snapshot.upto())));
        let from = wanted.from.as_deref().map(place).transpose()?;
        let to = wanted.to.as_deref().map(place).transpose()?;
        let from = match wanted.direction {
            Direction::Up => from.unwrap_or(PageToken(Order::MIN)),
            Direction::Down => from.unwrap_or(newest).min(newest),
        };
        let limit = bounded(wanted.limit).max(1);
        let mut page = if wanted.filter.events.allows_room(&look.room.id) {
            let (filter, steps) = (&wanted.filter, Steps::of_page());
            match passed {
                None => read_page(&look, from, to, wanted.direction, limit, filter, steps)?,
                Some(passed) => {
                    let next = match wanted.direction {
                        Direction::Down => {
                            let next = state::find_hole(&*look.snapshot, look.num, passed.before())?;
                            next.map(|(hole, _)| hole)
                        }
                        Direction::Up => state::find_hole_above(&*look.snapshot, look.num, passed)?,
                    };
                    read_page_to(
                        &look,
                        from,
                        to,
                        wanted.direction,
                        limit,
                        (filter, steps, SCANNED_MAX),
                        next,
                    )?
                }
            }
        } else {
            Page { events: Vec::new(), next: None, hole: None }
        };
        if let Some(next) = page.next
            && page.events.len() >= limit
            && page.hole.is_none()
            && !may_go_on(&look, next, to, wanted.direction)?
        {
            page.next = None;
        }
        if let (Direction::Up, None, None, Order::MAX) = (wanted.direction, page.next, to, end) {
            // A caller who will see more goes on from here once there is more, and so from a page that has the newest event. A
            // page without events has no token, so that a client that reads up to the end comes to an end.
            page.next = page.events.last().map(|(newest, _)| PageToken::above(newest.order));
        }
        let chunk = look.show_all(&page.events)?;
        let mut answer = Object::new();
        // A client recognizes the token that it gave, whatever place that stands for.
        answer.text("start", &wanted.from.clone().unwrap_or_else(|| from.to_string()));
        answer.list("chunk", &chunk);
        if let Some(next) = page.next {
            answer.text("end", &next.to_string());
        }
        let events: Vec<_> = page.events.iter().map(|(stored, _)| stored).collect();
        let lazy = wanted.filter.events.lazy_members;
        // The members are those at the event that the page begins with.
        let state = match events.first().filter(|_| lazy) {
            Some(first) => look.members_of(&events, first.order)?,
            None => Vec::new(),
        };
        answer.list("state", &state);
        let is_empty = page.events.is_empty();
        Ok(Answered { json: answer.finish().into(), num: look.num, hole: page.hole, is_empty })
    })
    .await
}

/// Answers an event with those around it, and the state after the last of them. Errors: 403 `M_FORBIDDEN` for a caller who
/// may see nothing of the room, 404 `M_NOT_FOUND` for an event that does not exist or that the caller may not see.
pub(crate) async fn context(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    id: &EventId,
    limit: u64,
    wanted: Filter,
) -> Result<Bytes> {
    let id = id.to_owned();
    looking(app, caller, room, move |look, _| {
        look.end()?;
        let (stored, membership) = require_visible(&look, &id)?;
        let limit = bounded(limit);
        let (below, above) = (PageToken::below(stored.order), PageToken::above(stored.order));
        let before = read_page(&look, below, None, Direction::Down, limit / 2, &wanted, Steps::of_page())?;
        let after =
            read_page(&look, above, None, Direction::Up, limit - limit / 2, &wanted, Steps::of_page())?;
        let start = before.events.last().map_or(below, |(oldest, _)| PageToken::below(oldest.order));
        let end = after.events.last().map_or(above, |(newest, _)| PageToken::above(newest.order));
        let around = before.events.iter().chain(&after.events).map(|(stored, _)| stored).chain([&stored]);
        let senders: BTreeSet<String> = around.map(|stored| stored.row.sender().into_owned()).collect();
        let lazy = wanted.events.lazy_members;
        let mut state = Vec::new();
        for row in state::full(&*look.snapshot, look.num, StateRef::Main(end.0))? {
            let (_, event) = row?;
            let Some(piece) = event::find_anywhere(&*look.snapshot, look.num, event)? else { continue };
            // Lazy loading shows only the members who sent one of the events.
            let is_left_out = lazy
                && piece.membership().is_some()
                && piece.row.state_key().is_none_or(|user| !senders.contains(&*user));
            if !is_left_out && wanted.events.allows(look.view(), &piece, &look.viewer())? {
                event::count_shown(piece.row.json.len())?;
                state.push(look.show_state(&piece)?);
            }
        }
        let mut answer = Object::new();
        answer.text("start", &start.to_string());
        answer.text("end", &end.to_string());
        answer.json("event", &look.show(&stored, membership)?);
        answer.list("events_before", &look.show_all(&before.events)?);
        answer.list("events_after", &look.show_all(&after.events)?);
        answer.list("state", &state);
        Ok(answer.finish().into())
    })
    .await
}
