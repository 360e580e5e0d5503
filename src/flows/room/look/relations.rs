//! What refers to an event, and the threads of a room.

use std::{
    ops::{Bound, RangeBounds as _},
    sync::Arc,
};

use bytes::Bytes;
use ruma::{EventId, RoomId};

use super::{SCANNED_MAX, bounded, looking, place, require_visible};
use crate::{
    accounts::Caller,
    error::Result,
    flows::App,
    ids::{EventNum, Order, RoomNum},
    json::Object,
    rooms::{event, relations, show, timeline::PageToken},
    schema::relations::RelationRow,
    store::{Direction, Fault, Snapshot},
};

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
    /// The orders in it: above the lower end, up to the higher one.
    fn bounds(&self) -> relations::Span {
        let (low, high) = match self.direction {
            Direction::Up => (self.from, self.to),
            Direction::Down => (self.to, self.from),
        };
        (low.map_or(Bound::Unbounded, Bound::Excluded), high.map_or(Bound::Unbounded, Bound::Included))
    }
}

/// The events that refer to one.
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

/// The events that refer to `parent`, in the direction that is asked for, and whether they are what is asked for.
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

/// What refers to an event, and what refers to that, and so on, by rising order; at most [`SCANNED_MAX`] are looked at.
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

/// The threads of a room, the one with the newest event first.
pub(crate) async fn threads(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    from: Option<String>,
    limit: u64,
    only_own: bool,
) -> Result<Bytes> {
    looking(app, caller, room, move |look, caller| {
        // Refuses whoever sees nothing of the room. A thread goes on after a reader has left: it is listed all the same, with
        // what they see of it.
        look.end()?;
        let from = from.as_deref().map(place).transpose()?.map_or(Order::MAX, |from| from.0);
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
            if let (membership, true) = look.reader.look(&*snapshot, &root)?
                && show::sees_thread(&*snapshot, look.num, root.event(), &look.reader)?
            {
                chunk.push(look.show(&root, membership)?);
            }
        }
        let mut answer = Object::new();
        answer.list("chunk", &chunk);
        if let Some(next) = next {
            answer.text("next_batch", &next.to_string());
        }
        Ok(answer.finish().into())
    })
    .await
}
