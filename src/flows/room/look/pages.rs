//! Pages of a room's timeline, and the context of an event.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use ruma::{EventId, RoomId};

use super::{Look, SCANNED_MAX, bounded, looking, place, require_visible};
use crate::{
    accounts::Caller,
    error::Result,
    flows::App,
    ids::Order,
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
}

pub(super) fn read_page(
    look: &Look,
    from: PageToken,
    to: Option<PageToken>,
    direction: Direction,
    limit: usize,
    wanted: &Filter,
    mut steps: Steps,
) -> Result<Page> {
    let snapshot = Arc::clone(&look.snapshot);
    let mut page = Page { events: Vec::new(), next: None };
    let mut last = None;
    for (scanned, stored) in timeline::page(&*snapshot, look.num, from, to, direction)?.enumerate() {
        if page.events.len() >= limit || scanned >= SCANNED_MAX || steps.are_taken() {
            page.next = last;
            break;
        }
        let stored = stored?;
        last = Some(match direction {
            Direction::Up => PageToken::above(stored.order),
            Direction::Down => PageToken::below(stored.order),
        });
        if !wanted.allows(&*snapshot, look.num, &stored, &mut steps)? {
            continue;
        }
        if let (membership, true) = look.reader.look(&*snapshot, &stored)? {
            page.events.push((stored, membership));
        }
    }
    Ok(page)
}

/// Answers a page of a room's timeline.
pub(crate) async fn messages(app: &App, caller: &Caller, room: &RoomId, wanted: PageWanted) -> Result<Bytes> {
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
        let mut page = if wanted.filter.events.allows_room(&look.room.id) {
            let limit = bounded(wanted.limit).max(1);
            read_page(&look, from, to, wanted.direction, limit, &wanted.filter, Steps::of_page())?
        } else {
            Page { events: Vec::new(), next: None }
        };
        if let (Direction::Up, None, None, Order::MAX) = (wanted.direction, page.next, to, end) {
            // A caller who will see more goes on from here once there is more, and so from a page that has the newest event. A
            // page without events has no token, so that a client that reads up to the end comes to an end.
            page.next = page.events.last().map(|(newest, _)| PageToken::above(newest.order));
        }
        let chunk = look.show_all(&page.events)?;
        let mut answer = Object::new();
        // A client recognizes the token that it gave, whatever place that stands for.
        answer.text("start", &wanted.from.unwrap_or_else(|| from.to_string()));
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
        Ok(answer.finish().into())
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
            if !is_left_out && wanted.events.allows(&piece) {
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
