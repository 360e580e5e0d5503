//! Lists the events that refer to an event, and the threads of a room.

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
    ids::{EventNum, Order, RoomNum},
    json::{JsonText, Object},
    rooms::{
        event::{self, StoredEvent},
        redact, relations, show,
        timeline::{self, PageToken},
    },
    schema::relations::RelationRow,
    store::{Direction, Fault, Read as _, Snapshot},
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

/// The part of the timeline that is asked for.
#[derive(Clone, Copy)]
struct Span {
    from: Option<Order>,
    to: Option<Order>,
    direction: Direction,
}

impl Span {
    /// The bounds of the span: above its lower end, up to and including the higher one.
    fn bounds(&self) -> relations::Span {
        let (low, high) = match self.direction {
            Direction::Up => (self.from, self.to),
            Direction::Down => (self.to, self.from),
        };
        (low.map_or(Bound::Unbounded, Bound::Excluded), high.map_or(Bound::Unbounded, Bound::Included))
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
    let span = Span { from: from.map(|from| from.0), to: to.map(|to| to.0), direction: wanted.direction };
    let search = Search { read, room: look.num, parent: parent.event(), span, wanted, scanned_max };
    let (mut chunk, mut next, mut last) = (Vec::new(), None, None);
    for (scanned, relation) in search.list()?.enumerate() {
        if chunk.len() >= bounded(wanted.limit).max(1) || scanned >= scanned_max {
            next = last;
            break;
        }
        let (order, event, fits) = relation?;
        last = Some(match wanted.direction {
            Direction::Up => PageToken::above(order),
            Direction::Down => PageToken::below(order),
        });
        if !fits {
            continue;
        }
        let stored = event::require(read, look.num, event)?;
        if let (membership, true) = look.reader.look(read, &stored)? {
            chunk.push(look.show(&stored, membership)?);
        }
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
    read: &'r Snapshot,
    room: RoomNum,
    parent: EventNum,
    span: Span,
    wanted: &'r RelationsWanted,
    scanned_max: usize,
}

impl<'r> Search<'r> {
    /// Lists the events that refer to the parent, in the direction that is asked for, each with whether it fits the request.
    fn list(self) -> Result<Relations<'r>, Fault> {
        let Self { read, room, parent, span, wanted, .. } = self;
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

    /// Lists the events that refer to the parent directly or through others, in rising order. `None` if there are too many to read
    /// them all for one page.
    fn descendants(&self) -> Result<Option<Vec<(Order, EventNum)>>, Fault> {
        let (mut found, mut parents, mut left) = (Vec::new(), vec![self.parent], self.scanned_max);
        for _ in 0..RECURSION_MAX {
            let mut children = Vec::new();
            for parent in parents {
                let (anywhere, down) = (relations::ANYWHERE, Direction::Down);
                for row in relations::list(self.read, self.room, parent, None, anywhere, down)? {
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
    /// others and fits the request. The index has relations by the event to which they refer, so it cannot tell which of
    /// very many events that refer to others comes next.
    fn descendants_by_timeline(self) -> Result<Relations<'r>, Fault> {
        let Self { read, room, span, .. } = self;
        let from = span.from.unwrap_or(match span.direction {
            Direction::Up => Order::MIN,
            Direction::Down => Order::upto(read.upto()),
        });
        let rows = timeline::page(read, room, PageToken(from), span.to.map(PageToken), span.direction)?;
        Ok(Box::new(rows.map(move |stored| {
            let stored = stored?;
            Ok((stored.order, stored.event(), self.is_wanted_descendant(&stored)?))
        })))
    }

    fn is_wanted_descendant(&self, stored: &StoredEvent) -> Result<bool, Fault> {
        let (read, room) = (self.read, self.room);
        let Some((mut parent, row)) = relations::find_own(read, room, stored)? else { return Ok(false) };
        if !self.wanted.fits(&row) {
            return Ok(false);
        }
        for _ in 1..RECURSION_MAX {
            if parent == self.parent {
                return Ok(true);
            }
            let Some(above) = event::find(read, room, parent)? else { return Ok(false) };
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
        let mut page = ThreadPage { look: &look, wanted: &wanted, end, limit, chunk: Vec::new() };
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
}

impl ThreadPage<'_> {
    /// Fills the page with threads from an order on, and answers where the list goes on; `None` if it ends.
    ///
    /// The index has threads by their newest event, whoever sees it. A thread whose newest events the caller does not see waits
    /// until those above the newest one that they do see are listed. So a later page also looks at the threads that the
    /// index has above its beginning, as far as a bound.
    fn fill(&mut self, from: Order) -> Result<Option<PageToken>> {
        let (look, read) = (self.look, &*self.look.snapshot);
        let sees_all = look.reader.sees_everything(read)?;
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
                if self.is_full() {
                    return Ok(Some(PageToken::above(newest)));
                }
                self.add(waits)?;
            }
            if order <= from {
                if self.is_full() || scanned == SCANNED_MAX {
                    return Ok(Some(PageToken::above(order)));
                }
                scanned += 1;
            }
            let newest = if sees_all {
                Some(order)
            } else {
                show::newest_in_thread(read, look.num, root, &look.reader, self.end)?
            };
            waiting.extend(newest.filter(|newest| *newest <= from).map(|newest| (newest, root)));
        }
        while let Some((newest, waits)) = waiting.pop_last() {
            if self.is_full() {
                return Ok(Some(PageToken::above(newest)));
            }
            self.add(waits)?;
        }
        Ok(None)
    }

    fn is_full(&self) -> bool {
        self.chunk.len() >= self.limit
    }

    /// Adds a thread, if the caller may see its root and wants it. A root whose sender the caller ignores is shown redacted, as the
    /// specification has it ([`GET /threads`](https://spec.matrix.org/v1.19/client-server-api/#get_matrixclientv1roomsroomidthreads)).
    fn add(&mut self, root: EventNum) -> Result<()> {
        let (look, read) = (self.look, &*self.look.snapshot);
        let root = event::require(read, look.num, root)?;
        if self.wanted.only_own && !relations::took_part(read, look.num, &root, &look.user)? {
            return Ok(());
        }
        let (membership, sees) = look.reader.look(read, &root)?;
        if sees {
            self.chunk.push(look.show(&root, membership)?);
        } else if look.reader.ignores(&root) && look.reader.may_see(read, &root)? {
            self.chunk.push(look.show(&redact::hidden(&look.room, &root)?, membership)?);
        }
        Ok(())
    }
}
