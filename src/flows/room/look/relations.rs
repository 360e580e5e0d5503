//! Lists the events that refer to an event, and the threads of a room.
//!
//! The index of relations knows no readers. So nothing above the end of what the caller sees is read from it, an event that they do
//! not see leads to no other, and only a further event that they see makes a token.

use std::{
    collections::BTreeMap,
    ops::{Bound, RangeBounds as _},
};

use bytes::Bytes;
use ruma::{EventId, RoomId};

use super::{Look, SCANNED_MAX, bounded, looking, place, require_visible};
use crate::{
    accounts::Caller,
    error::Result,
    flows::App,
    ids::{EventNum, Order},
    json::{JsonText, Object},
    rooms::{
        event::{self, StoredEvent},
        redact, relations, show,
        timeline::{self, PageToken},
    },
    schema::relations::RelationRow,
    store::{Direction, Fault},
};

/// The choice among the events that refer to an event.
#[derive(Debug)]
pub(crate) struct RelationsWanted {
    /// The only kind of relation to list, if one is named.
    pub(crate) rel_type: Option<String>,
    /// The only type of events to list, if one is named.
    pub(crate) event_type: Option<String>,
    /// The token at which the list begins.
    pub(crate) from: Option<String>,
    /// The token at which the list ends.
    pub(crate) to: Option<String>,
    /// The direction in which events are listed.
    pub(crate) direction: Direction,
    /// The answer has at most this many events.
    pub(crate) limit: u64,
    /// Whether to list also the events that refer to those, up to [`RECURSION_MAX`] steps.
    pub(crate) recurse: bool,
}

/// Relations of relations are followed for at most this many steps.
const RECURSION_MAX: u32 = 3;

impl RelationsWanted {
    fn fits(&self, row: &RelationRow) -> bool {
        self.rel_type.as_ref().is_none_or(|rel_type| *rel_type == row.rel_type)
            && self.event_type.as_ref().is_none_or(|event_type| *event_type == row.event_type)
    }
}

/// The part of the timeline that is asked for: above its lower end, up to and including the higher one.
#[derive(Clone, Copy)]
struct Span {
    low: Option<Order>,
    high: Order,
    direction: Direction,
}

impl Span {
    fn bounds(&self) -> relations::Span {
        (self.low.map_or(Bound::Unbounded, Bound::Excluded), Bound::Included(self.high))
    }
}

/// Answers the events that refer to an event, as far as the caller sees them.
pub(crate) async fn relations(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    id: &EventId,
    wanted: RelationsWanted,
) -> Result<Bytes> {
    let id = id.to_owned();
    looking(app, caller, room, move |look, _| page(&look, &id, &wanted, SCANNED_MAX)).await
}

/// Answers one page of them, for which at most `scanned_max` relations and as many events are read.
pub(super) fn page(look: &Look, id: &EventId, wanted: &RelationsWanted, scanned_max: usize) -> Result<Bytes> {
    let (parent, _) = require_visible(look, id)?;
    let read = &*look.snapshot;
    let place = |token: &Option<String>| token.as_deref().map(place).transpose();
    let (from, to) = (place(&wanted.from)?, place(&wanted.to)?);
    let (end, viewer) = (look.end()?, look.viewer());
    let upto_end = |place: Option<PageToken>| place.map_or(end, |place| place.0.min(end));
    let (low, high) = match wanted.direction {
        Direction::Up => (from.map(|from| from.0), upto_end(to)),
        Direction::Down => (to.map(|to| to.0), upto_end(from)),
    };
    let span = Span { low, high, direction: wanted.direction };
    let search = Search { look, end, parent: parent.event(), span, wanted, scanned_max };
    let limit = bounded(wanted.limit).max(1);
    let (mut chunk, mut next, mut last) = (Vec::new(), None, None);
    for (scanned, relation) in search.list()?.enumerate() {
        if scanned >= scanned_max {
            next = last;
            break;
        }
        let (order, event, fits) = relation?;
        let is_full = chunk.len() >= limit;
        if !is_full {
            last = Some(match wanted.direction {
                Direction::Up => PageToken::above(order),
                Direction::Down => PageToken::below(order),
            });
        }
        if !fits {
            continue;
        }
        let stored = event::require(read, look.num, event)?;
        if !viewer.sees_relation(look.view(), &stored)? {
            continue;
        }
        if is_full {
            next = last;
            break;
        }
        let (membership, _) = look.reader.look(read, &stored)?;
        chunk.push(look.show(&stored, membership)?);
    }
    let mut answer = Object::new();
    answer.list("chunk", &chunk);
    for (name, token) in [("next_batch", next), ("prev_batch", from)] {
        if let Some(token) = token {
            answer.text(name, &token.to_string());
        }
    }
    if wanted.recurse {
        answer.number("recursion_depth", RECURSION_MAX.into());
    }
    Ok(answer.finish().into())
}

type Relations<'r> = Box<dyn Iterator<Item = Result<(Order, EventNum, bool), Fault>> + 'r>;

/// A search for the events that refer to one.
#[derive(Clone, Copy)]
struct Search<'r> {
    look: &'r Look,
    /// The last place up to which the caller sees events.
    end: Order,
    parent: EventNum,
    span: Span,
    wanted: &'r RelationsWanted,
    scanned_max: usize,
}

impl<'r> Search<'r> {
    /// Lists the events that refer to the parent, in the direction that is asked for, each with whether it fits the request.
    fn list(self) -> Result<Relations<'r>, Fault> {
        let Self { look, parent, span, wanted, .. } = self;
        let (read, room) = (&*look.snapshot, look.num);
        let bounds = span.bounds();
        if !wanted.recurse {
            let rel_type = wanted.rel_type.as_deref();
            let rows = relations::list(read, room, parent, rel_type, bounds, span.direction)?;
            return Ok(Box::new(
                rows.map(move |row| row.map(|(order, row)| (order, row.event, wanted.fits(&row)))),
            ));
        }
        let Some(mut found) = self.descendants()? else { return self.descendants_by_timeline() };
        found.retain(|(order, _)| bounds.contains(order));
        if span.direction == Direction::Down {
            found.reverse();
        }
        Ok(Box::new(found.into_iter().map(|(order, event)| Ok((order, event, true)))))
    }

    /// Lists the events that refer to the parent directly or through others that the caller sees, in rising order. `None` if there are
    /// too many to read them all for one page.
    fn descendants(&self) -> Result<Option<Vec<(Order, EventNum)>>, Fault> {
        let (read, room) = (&*self.look.snapshot, self.look.num);
        let (viewer, upto) = (self.look.viewer(), (Bound::Unbounded, Bound::Included(self.end)));
        let sees_all = viewer.sees_all_relations(read)?;
        let (mut found, mut parents, mut left) = (Vec::new(), vec![self.parent], self.scanned_max);
        for _ in 0..RECURSION_MAX {
            let mut children = Vec::new();
            for parent in parents {
                let is_seen = sees_all
                    || parent == self.parent
                    || viewer.sees_relation(self.look.view(), &event::require(read, room, parent)?)?;
                if !is_seen {
                    continue;
                }
                for row in relations::list(read, room, parent, None, upto, Direction::Down)? {
                    let (order, row) = row?;
                    let Some(still) = left.checked_sub(1) else { return Ok(None) };
                    left = still;
                    children.push(row.event);
                    if self.wanted.fits(&row) {
                        found.push((order, row.event));
                    }
                }
            }
            parents = children;
        }
        found.sort_unstable();
        Ok(Some(found))
    }

    /// Lists the events of the timeline from where the page begins, each with whether it refers to the parent directly or through
    /// others that the caller sees and fits the request. The index has relations by the event to which they refer, so it cannot
    /// tell which of very many events that refer to others comes next.
    fn descendants_by_timeline(self) -> Result<Relations<'r>, Fault> {
        let Self { look, span, .. } = self;
        let (low, high) = (span.low.map(PageToken), PageToken(span.high));
        let (from, to) = match span.direction {
            Direction::Up => (low.unwrap_or(PageToken(Order::MIN)), Some(high)),
            Direction::Down => (high, low),
        };
        let rows = timeline::page(&*look.snapshot, look.num, from, to, span.direction)?;
        Ok(Box::new(rows.map(move |stored| {
            let stored = stored?;
            Ok((stored.order, stored.event(), self.is_wanted_descendant(&stored)?))
        })))
    }

    fn is_wanted_descendant(&self, stored: &StoredEvent) -> Result<bool, Fault> {
        let (read, room) = (&*self.look.snapshot, self.look.num);
        let Some((mut parent, row)) = relations::find_own(read, room, stored)? else { return Ok(false) };
        if !self.wanted.fits(&row) {
            return Ok(false);
        }
        for _ in 1..RECURSION_MAX {
            if parent == self.parent {
                return Ok(true);
            }
            let Some(above) = event::find(read, room, parent)? else { return Ok(false) };
            if !self.look.viewer().sees_relation(self.look.view(), &above)? {
                return Ok(false);
            }
            let Some((next, _)) = relations::find_own(read, room, &above)? else { return Ok(false) };
            parent = next;
        }
        Ok(parent == self.parent)
    }
}

/// The threads that a request asks for.
#[derive(Debug)]
pub(crate) struct ThreadsWanted {
    /// The token at which the list begins.
    pub(crate) from: Option<String>,
    /// The answer has at most this many threads.
    pub(crate) limit: u64,
    /// Whether to list only the threads in which the caller wrote.
    pub(crate) only_own: bool,
}

/// The threads of a room, the one first whose newest event that the caller sees is the newest.
pub(crate) async fn threads(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    wanted: ThreadsWanted,
) -> Result<Bytes> {
    looking(app, caller, room, move |look, _| {
        // This refuses a caller who sees nothing of the room. A thread that goes on after they left is listed all the same, with
        // the part that they see.
        let end = look.end()?;
        let from = wanted.from.as_deref().map(place).transpose()?.map_or(Order::MAX, |from| from.0);
        let limit = bounded(wanted.limit).max(1);
        let mut page = ThreadPage { look: &look, wanted: &wanted, end, limit, chunk: Vec::new(), last: None };
        let next = page.fill(from)?;
        let mut answer = Object::new();
        answer.list("chunk", &page.chunk);
        if let Some(next) = next {
            answer.text("next_batch", &next.to_string());
        }
        Ok(answer.finish().into())
    })
    .await
}

/// A page of the threads of a room while it is being filled.
struct ThreadPage<'l> {
    look: &'l Look,
    wanted: &'l ThreadsWanted,
    /// The last place up to which the caller sees events.
    end: Order,
    limit: usize,
    chunk: Vec<JsonText>,
    /// Where the newest event of the last thread stands.
    last: Option<Order>,
}

impl ThreadPage<'_> {
    /// Fills the page with threads from an order on, and answers where the list goes on; `None` if the caller sees no more of it.
    ///
    /// The index has threads by their newest event, whoever sees it. A thread whose newest events the caller does not see waits
    /// until those above the newest one that they do see are listed. So a later page also looks at the threads that the
    /// index has above its beginning, as far as a bound.
    fn fill(&mut self, from: Order) -> Result<Option<PageToken>> {
        let (look, read, viewer) = (self.look, &*self.look.snapshot, self.look.viewer());
        let sees_all = viewer.sees_all_relations(read)?;
        let above = relations::list_threads(read, look.num, Order::MAX)?
            .take(if sees_all { 0 } else { SCANNED_MAX })
            .take_while(|row| row.as_ref().map_or(true, |(order, _)| *order > from));
        let below = relations::list_threads(read, look.num, from)?;
        // The threads that wait, by where the newest event stands that the caller sees.
        let mut waiting: BTreeMap<Order, EventNum> = BTreeMap::new();
        let mut scanned = 0;
        for row in above.chain(below) {
            let (order, root) = row?;
            while let Some((newest, waits)) = waiting.pop_last() {
                if newest < order {
                    waiting.insert(newest, waits);
                    break;
                }
                if self.add(newest, waits)? {
                    return Ok(self.after_last());
                }
            }
            if order <= from {
                if scanned == SCANNED_MAX {
                    return Ok(if self.is_full() {
                        self.after_last()
                    } else {
                        Some(PageToken::above(order))
                    });
                }
                scanned += 1;
            }
            let newest = if sees_all {
                Some(order)
            } else {
                show::newest_in_thread(look.view(), root, &viewer, self.end)?
            };
            waiting.extend(newest.filter(|newest| *newest <= from).map(|newest| (newest, root)));
        }
        while let Some((newest, waits)) = waiting.pop_last() {
            if self.add(newest, waits)? {
                return Ok(self.after_last());
            }
        }
        Ok(None)
    }

    /// The place below the last thread of the page.
    fn after_last(&self) -> Option<PageToken> {
        self.last.map(PageToken::below)
    }

    fn is_full(&self) -> bool {
        self.chunk.len() >= self.limit
    }

    /// Adds a thread, if the caller may see its root and wants it. Gives true, and adds nothing, where the page is full already and the
    /// thread would be one more. A root whose sender the caller ignores is shown redacted, as the
    /// specification has it ([`GET /threads`](https://spec.matrix.org/v1.19/client-server-api/#get_matrixclientv1roomsroomidthreads)).
    fn add(&mut self, newest: Order, root: EventNum) -> Result<bool> {
        let (look, read) = (self.look, &*self.look.snapshot);
        let root = event::require(read, look.num, root)?;
        if self.wanted.only_own && !relations::took_part(read, look.num, &root, &look.user)? {
            return Ok(false);
        }
        let (membership, sees) = look.reader.look(read, &root)?;
        let is_shown = sees || look.reader.ignores(&root) && look.reader.may_see(read, &root)?;
        if !is_shown {
            return Ok(false);
        }
        if self.is_full() {
            return Ok(true);
        }
        let root = if sees { root } else { redact::hidden(&look.room, &root)? };
        self.chunk.push(look.show(&root, membership)?);
        self.last = Some(newest);
        Ok(false)
    }
}
