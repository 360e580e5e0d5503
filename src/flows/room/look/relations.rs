//! Lists the events that refer to an event, and the threads of a room.

use std::{
    collections::BTreeMap,
    ops::{Bound, RangeBounds as _},
    sync::Arc,
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
    rooms::{event, redact, relations, show, timeline::PageToken},
    schema::relations::RelationRow,
    store::{Direction, Fault, Snapshot},
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
    looking(app, caller, room, move |look, _| {
        let (parent, _) = require_visible(&look, &id)?;
        let snapshot = Arc::clone(&look.snapshot);
        let place = |token: &Option<String>| token.as_deref().map(place).transpose();
        let (from, to) = (place(&wanted.from)?, place(&wanted.to)?);
        let span = Span { from: from.map(|from| from.0), to: to.map(|to| to.0), direction: wanted.direction };
        let (mut chunk, mut next, mut last) = (Vec::new(), None, None);
        for (scanned, relation) in list(&snapshot, look.num, parent.event(), span, &wanted)?.enumerate() {
            if chunk.len() >= bounded(wanted.limit).max(1) || scanned >= SCANNED_MAX {
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
            let stored = event::require(&*snapshot, look.num, event)?;
            if let (membership, true) = look.reader.look(&*snapshot, &stored)? {
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
    })
    .await
}

type Relations<'r> = Box<dyn Iterator<Item = Result<(Order, EventNum, bool), Fault>> + 'r>;

/// Lists the events that refer to `parent`, in the direction that is asked for, each with whether it fits the request.
fn list<'r>(
    read: &'r Snapshot,
    room: RoomNum,
    parent: EventNum,
    span: Span,
    wanted: &'r RelationsWanted,
) -> Result<Relations<'r>, Fault> {
    let bounds = span.bounds();
    if wanted.recurse {
        let mut found = descendants(read, room, parent, wanted)?;
        found.retain(|(order, _)| bounds.contains(order));
        if span.direction == Direction::Down {
            found.reverse();
        }
        return Ok(Box::new(found.into_iter().map(|(order, event)| Ok((order, event, true)))));
    }
    let rows = relations::list(read, room, parent, wanted.rel_type.as_deref(), bounds, span.direction)?;
    Ok(Box::new(rows.map(|row| row.map(|(order, row)| (order, row.event, wanted.fits(&row))))))
}

/// Lists the events that refer to an event directly or through others, in rising order. At most [`SCANNED_MAX`] are read.
fn descendants(
    read: &Snapshot,
    room: RoomNum,
    parent: EventNum,
    wanted: &RelationsWanted,
) -> Result<Vec<(Order, EventNum)>, Fault> {
    let (mut found, mut parents, mut left) = (Vec::new(), vec![parent], SCANNED_MAX);
    for _ in 0..RECURSION_MAX {
        let mut children = Vec::new();
        for parent in parents {
            let rows = relations::list(read, room, parent, None, relations::ANYWHERE, Direction::Down)?;
            for row in rows.take(left) {
                let (order, row) = row?;
                left -= 1;
                children.push(row.event);
                if wanted.fits(&row) {
                    found.push((order, row.event));
                }
            }
        }
        parents = children;
    }
    found.sort_unstable();
    Ok(found)
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
