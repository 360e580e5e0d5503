//! Events that refer to others: edits, threads, references, annotations (client-server API, "Forming relationships").
//!
//! The summary that is bundled with an event is kept in one row (`RELATED`), so that showing an event reads that row
//! and no more, however many others refer to it. The bundled events are read from there or, for a reader who may not
//! see the newest of them, from the part of the index below what that reader may see.

pub(in crate::rooms) mod check;
pub(crate) mod edits;

use std::{borrow::Cow, cmp::Reverse, iter::Peekable, ops::Bound};

use ruma::{EventId, OwnedEventId, OwnedUserId, UserId, api::error::ErrorKind};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::{
    error::{Error, Refusal},
    ids::{EventNum, Order, RoomNum, UserNum},
    rooms::{
        build::Draft,
        event::{self, StoredEvent},
        relations::edits::{is_edit_of, newest_edit, sent},
        view::RoomView,
        visibility::Sight,
    },
    schema,
    schema::{
        push::Lane,
        relations::{InThread, RelatedRow, RelationKind, RelationRow},
        rooms::EventKey,
    },
    store::{Batch, Direction, Fault, Read},
};

/// To work out a bundled summary again, look at no more than this many rows: when the newest edit is redacted, or for a
/// reader who does not see the newest event.
pub(in crate::rooms) const AGAIN_MAX: usize = 1_000;

/// At most this many events wait for one that they refer to.
const WAITING_MAX: usize = if cfg!(test) { 5 } else { 1_000 };

/// The relation in which an event stands to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelatesTo {
    /// The kind of relation, such as `m.thread`.
    pub rel_type: String,
    /// The id of the event that this one refers to.
    pub event_id: OwnedEventId,
}

/// Reads the relation from an event's content; `None` if it has none, or one without a type.
pub fn relates_to(content: &str) -> Option<RelatesTo> {
    #[derive(Deserialize)]
    struct Relation<'a> {
        #[serde(borrow)]
        rel_type: Cow<'a, str>,
        event_id: OwnedEventId,
    }
    #[derive(Deserialize)]
    struct Content<'a> {
        #[serde(borrow, rename = "m.relates_to")]
        relates_to: Relation<'a>,
    }
    // Most events have no relation, and this search is cheaper than parsing them.
    if !content.contains("m.relates_to") {
        return None;
    }
    let relation = serde_json::from_str::<Content<'_>>(content).ok()?.relates_to;
    Some(RelatesTo { rel_type: relation.rel_type.into_owned(), event_id: relation.event_id })
}

/// Follow at most this many relations from an event to the root of the thread in which it stands: an edit of a reaction
/// to a thread's message still stands there.
const HOPS_MAX: u8 = 3;

/// Gives the lane in which an event of the room stands. That is a thread, by the event's own relation or by that of the
/// event it refers to, or else the main timeline, where the roots of threads stand themselves. Receipts, counts and
/// threads go by lanes.
///
/// Specification: client-server API, "Threaded read receipts".
pub(crate) fn lane_of(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    stored: &StoredEvent,
) -> Result<Lane, Fault> {
    // Most events have no relation and need no look-up. A redacted event no longer says that it had one.
    if !stored.row.is_redacted() && !stored.row.content().contains("m.relates_to") {
        return Ok(Lane::MAIN);
    }
    let found = schema::IN_THREAD.get(read, (room, stored.event()))?;
    Ok(found.map_or(Lane::MAIN, |found| Lane::thread(found.root)))
}

/// Gives the id of the root of the thread in which an event stands, as far as a user can tell it who sees the event: by
/// the relations of events that they see. `None` for the main timeline. That is [`lane_of`], but for relations to events
/// that the user may not see, which tell them no more than relations to events that are not there.
pub(crate) fn find_thread_seen(
    view: RoomView<'_, impl Read + ?Sized>,
    sight: &mut Sight,
    stored: &StoredEvent,
) -> Result<Option<OwnedEventId>, Fault> {
    let (read, room) = (view.read, view.num);
    let mut at = Cow::Borrowed(stored);
    for _ in 0..HOPS_MAX {
        let Some(relation) = relates_to(at.row.content()) else {
            if !at.row.is_redacted() {
                return Ok(None);
            }
            // A redacted event no longer says that it had a relation.
            let Some(thread) = schema::IN_THREAD.get(read, (room, at.event()))? else { return Ok(None) };
            let root = event::find(read, room, thread.root)?;
            return Ok(match root {
                Some(root) if sight.can_see(read, &root)? => Some(root.id(view.row)),
                _ => None,
            });
        };
        if RelationKind::of(&relation.rel_type) == RelationKind::Thread {
            return Ok(Some(relation.event_id));
        }
        let Some(parent) = sight.find(read, &relation.event_id)? else { return Ok(None) };
        at = Cow::Owned(parent);
    }
    Ok(None)
}

/// Finds the thread in which an event stands that refers to `parent` in this way. It is found once, when the event is
/// stored, so that it stays the same when one of the two is redacted.
fn find_thread(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    parent: EventNum,
    kind: RelationKind,
) -> Result<Option<InThread>, Fault> {
    if kind == RelationKind::Thread {
        return Ok(Some(InThread { root: parent, hops: 1 }));
    }
    let of_parent = schema::IN_THREAD.get(read, (room, parent))?;
    let near = of_parent.filter(|thread| thread.hops < HOPS_MAX);
    Ok(near.map(|thread| InThread { hops: thread.hops + 1, ..thread }))
}

/// Refuses a relation that a client may not make: a thread from an event that relates to another itself (400
/// `M_UNKNOWN`), and an annotation that its sender made before (400 `M_DUPLICATE_ANNOTATION`). Nothing is refused of an
/// event that the sender may not see, because nothing is refused of one that is not there.
pub(crate) fn check(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    user: UserNum,
    draft: &Draft,
) -> Result<(), Error> {
    let content = draft.raw_content()?;
    let Some(relation) = relates_to(content.get()) else { return Ok(()) };
    let kind = RelationKind::of(&relation.rel_type);
    if !matches!(kind, RelationKind::Thread | RelationKind::Annotation) {
        return Ok(());
    }
    let mut sight = Sight::of(read, room, user, &draft.sender)?;
    let Some(parent) = sight.find(read, &relation.event_id)? else { return Ok(()) };
    match kind {
        RelationKind::Thread => {
            if relates_to(parent.row.content()).is_some() {
                let why = "No thread can begin at an event that relates to another one.";
                return Err(Refusal::new(ErrorKind::Unknown, why).into());
            }
        }
        RelationKind::Annotation => {
            if let Some(mark) = annotation(content.get(), draft.sender.as_str(), &draft.event_type)
                && schema::ANNOTATED.contains(read, (room, parent.event(), &mark))?
            {
                let why = "You have annotated the event like this before.";
                return Err(Refusal::new(ErrorKind::DuplicateAnnotation, why).into());
            }
        }
        RelationKind::Replace | RelationKind::Reference | RelationKind::Other => {}
    }
    Ok(())
}

/// Gives a hash of the sender, type and key of an annotation: two annotations of an event that share it are the same.
/// `None` if the content has no key.
fn annotation(content: &str, sender: &str, event_type: &str) -> Option<[u8; 16]> {
    #[derive(Deserialize)]
    struct Annotation<'a> {
        #[serde(borrow)]
        key: Cow<'a, str>,
    }
    #[derive(Deserialize)]
    struct Content<'a> {
        #[serde(borrow, rename = "m.relates_to")]
        relates_to: Annotation<'a>,
    }
    let key = serde_json::from_str::<Content<'_>>(content).ok()?.relates_to.key;
    let mut hash = Sha256::new();
    for part in [sender, event_type, &key] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().first_chunk().copied()
}

/// Writes the rows of an accepted event that refers to another one of its room. If that is not here, the event waits for it.
pub(crate) fn index(batch: &mut Batch, room: RoomNum, stored: &StoredEvent) -> Result<(), Fault> {
    let Some(relation) = relates_to(stored.row.content()) else { return Ok(()) };
    let Some(parent) = event::find_num(batch, room, &relation.event_id)? else {
        if let Some(key) = find_key_of(batch, room, &relation.event_id)?
            && count_waiting(batch, room, &key)? < WAITING_MAX
        {
            schema::RELATION_WAITING.put(batch, (room, &key, stored.event()), &());
        }
        return Ok(());
    };
    let (kind, event) = (RelationKind::of(&relation.rel_type), stored.event());
    if let Some(thread) = find_thread(batch, room, parent, kind)?
        && !is_kept_out(stored.order, event, parent)
    {
        schema::IN_THREAD.put(batch, (room, event), &thread);
        if stored.order.minor != 0 {
            spread_thread(batch, room, event, thread)?;
        }
    }
    let sender = stored.row.sender().into_owned();
    let mut related = schema::RELATED.get(batch, (room, parent))?.unwrap_or_default();
    match kind {
        RelationKind::Replace => {
            let old = related.edit.map(|edit| event::find(batch, room, edit)).transpose()?.flatten();
            let original = event::find(batch, room, parent)?;
            if original.is_some_and(|original| is_edit_of(&original, stored))
                && old.is_none_or(|old| sent(&old) < sent(stored))
            {
                related.edit = Some(event);
            }
        }
        RelationKind::Thread => {
            related.thread_count += 1;
            count_sender(batch, room, parent, &sender, |count| count + 1)?;
            if related.thread_tip.is_none_or(|(tip, _)| tip < stored.order) {
                move_thread(batch, room, parent, &mut related, Some((stored.order, event)));
            }
        }
        RelationKind::Reference => related.reference_count += 1,
        RelationKind::Annotation => {
            if let Some(mark) = annotation(stored.row.content(), &sender, &stored.row.event_type()) {
                schema::ANNOTATED.put(batch, (room, parent, &mark), &event);
            }
        }
        RelationKind::Other => {}
    }
    let event_type = stored.row.event_type().into_owned();
    let sender =
        OwnedUserId::try_from(sender).map_err(|_| Fault::Corrupt("the sender of an event is not valid"))?;
    let row = RelationRow { event, rel_type: relation.rel_type, event_type, sender };
    schema::RELATION.put(batch, (room, parent, kind, stored.order), &row);
    put_related(batch, room, parent, &related);
    Ok(())
}

/// Writes the rows of the events that referred to this one before it came.
pub(crate) fn index_waiting(batch: &mut Batch, room: RoomNum, stored: &StoredEvent) -> Result<(), Fault> {
    let key = &stored.row.header.key;
    let waiting =
        schema::RELATION_WAITING.prefix::<(RoomNum, EventKey)>(batch, (room, key), Direction::Up)?;
    let waiting = waiting.take(WAITING_MAX).map(|row| row.map(|((.., event), ())| event));
    let waiting: Vec<EventNum> = waiting.collect::<Result<_, _>>()?;
    for event in waiting {
        schema::RELATION_WAITING.delete(batch, (room, key, event));
        let refers = event::find(batch, room, event)?;
        if let Some(refers) = refers.filter(|refers| !refers.row.header.unseen) {
            index(batch, room, &refers)?;
        }
    }
    Ok(())
}

/// Counts the events that wait for one to which they refer.
pub(crate) fn count_waiting(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    key: &EventKey,
) -> Result<usize, Fault> {
    let waiting = schema::RELATION_WAITING.prefix::<(RoomNum, EventKey)>(read, (room, key), Direction::Up)?;
    Ok(waiting.take(WAITING_MAX).count())
}

/// Deletes what waits in a room that was never finished.
pub(in crate::rooms) fn clear(batch: &mut Batch, room: RoomNum) {
    schema::RELATION_WAITING.delete_prefix::<(RoomNum,)>(batch, (room,));
}

fn find_key_of(read: &(impl Read + ?Sized), room: RoomNum, id: &EventId) -> Result<Option<EventKey>, Fault> {
    let row = schema::ROOM.get(read, room)?;
    Ok(row.and_then(|row| event::parse_event_id(id, room, row.version)))
}

/// Whether an event stays out of the thread into which its parent would bring it: one that was told stays in the lane in which
/// it was counted when it came, though its parent came later.
fn is_kept_out(order: Order, event: EventNum, parent: EventNum) -> bool {
    order.minor == 0 && parent > event
}

/// Brings the events that refer to one into the thread in which that has come to stand: a hole is filled from above, so that they
/// are there before it. Those that were told stay where they were counted.
fn spread_thread(batch: &mut Batch, room: RoomNum, event: EventNum, thread: InThread) -> Result<(), Fault> {
    let (mut open, mut looked_at) = (vec![(event, thread)], 0);
    while let Some((parent, thread)) = open.pop() {
        if thread.hops >= HOPS_MAX {
            continue;
        }
        let thread = InThread { hops: thread.hops + 1, ..thread };
        for kind in RelationKind::ALL.into_iter().filter(|kind| *kind != RelationKind::Thread) {
            let rows = list_kind(&*batch, room, parent, kind, ANYWHERE, Direction::Up)?;
            let rows: Vec<_> = rows.take(AGAIN_MAX - looked_at).collect::<Result<_, _>>()?;
            looked_at += rows.len();
            for (_, row) in rows.into_iter().filter(|(order, _)| order.minor != 0) {
                schema::IN_THREAD.put(batch, (room, row.event), &thread);
                open.push((row.event, thread));
            }
        }
    }
    Ok(())
}

/// Deletes the rows of an event that is about to be redacted, because its relation goes with its content.
pub(crate) fn unlink(batch: &mut Batch, room: RoomNum, stored: &StoredEvent) -> Result<(), Fault> {
    let Some(relation) = relates_to(stored.row.content()) else { return Ok(()) };
    let Some(parent) = event::find_num(batch, room, &relation.event_id)? else {
        if let Some(key) = find_key_of(batch, room, &relation.event_id)? {
            schema::RELATION_WAITING.delete(batch, (room, &key, stored.event()));
        }
        return Ok(());
    };
    let kind = RelationKind::of(&relation.rel_type);
    let place = (room, parent, kind, stored.order);
    if !schema::RELATION.contains(batch, place)? {
        return Ok(());
    }
    schema::RELATION.delete(batch, place);
    let (event, sender) = (stored.event(), stored.row.sender());
    let mut related = schema::RELATED.get(batch, (room, parent))?.unwrap_or_default();
    match kind {
        RelationKind::Replace if related.edit == Some(event) => {
            let original = event::find(batch, room, parent)?;
            let edit = original.map(|original| newest_edit(batch, room, &original, Order::MAX, |_| Ok(true)));
            related.edit = edit.transpose()?.flatten().map(|edit| edit.event());
        }
        RelationKind::Thread => {
            related.thread_count = related.thread_count.saturating_sub(1);
            count_sender(batch, room, parent, &sender, |count| count.saturating_sub(1))?;
            if related.thread_tip.is_some_and(|(_, tip)| tip == event) {
                let tip = newest_of(batch, room, parent, RelationKind::Thread, Order::MAX)?;
                move_thread(batch, room, parent, &mut related, tip);
            }
        }
        RelationKind::Reference => related.reference_count = related.reference_count.saturating_sub(1),
        RelationKind::Annotation => {
            if let Some(mark) = annotation(stored.row.content(), &sender, &stored.row.event_type()) {
                schema::ANNOTATED.delete(batch, (room, parent, &mark));
            }
        }
        RelationKind::Replace | RelationKind::Other => {}
    }
    put_related(batch, room, parent, &related);
    Ok(())
}

fn put_related(batch: &mut Batch, room: RoomNum, parent: EventNum, related: &RelatedRow) {
    if *related == RelatedRow::default() {
        schema::RELATED.delete(batch, (room, parent));
    } else {
        schema::RELATED.put(batch, (room, parent), related);
    }
}

fn count_sender(
    batch: &mut Batch,
    room: RoomNum,
    root: EventNum,
    sender: &str,
    change: impl FnOnce(u64) -> u64,
) -> Result<(), Fault> {
    let count = change(schema::THREAD_SENDER.get(batch, (room, root, sender))?.unwrap_or(0));
    if count == 0 {
        schema::THREAD_SENDER.delete(batch, (room, root, sender));
    } else {
        schema::THREAD_SENDER.put(batch, (room, root, sender), &count);
    }
    Ok(())
}

fn move_thread(
    batch: &mut Batch,
    room: RoomNum,
    root: EventNum,
    related: &mut RelatedRow,
    tip: Option<(Order, EventNum)>,
) {
    if let Some((old, _)) = related.thread_tip {
        schema::THREAD.delete(batch, (room, old));
    }
    if let Some((new, _)) = tip {
        schema::THREAD.put(batch, (room, new), &root);
    }
    related.thread_tip = tip;
}

fn newest_of(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    parent: EventNum,
    kind: RelationKind,
    until: Order,
) -> Result<Option<(Order, EventNum)>, Fault> {
    let newest = list_kind(read, room, parent, kind, upto(until), Direction::Down)?.next().transpose()?;
    Ok(newest.map(|(order, row)| (order, row.event)))
}

/// A stretch of a room's timeline.
pub type Span = (Bound<Order>, Bound<Order>);

/// The whole timeline of a room.
pub const ANYWHERE: Span = (Bound::Unbounded, Bound::Unbounded);

/// The timeline up to an order, with the event that stands there.
pub(in crate::rooms) fn upto(until: Order) -> Span {
    (Bound::Unbounded, Bound::Included(until))
}

/// A row of the index of relations, with the order of its event.
type Related = Result<(Order, RelationRow), Fault>;

pub(in crate::rooms) fn list_kind<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
    parent: EventNum,
    kind: RelationKind,
    (low, high): Span,
    direction: Direction,
) -> Result<impl Iterator<Item = Related> + 'r, Fault> {
    let end = Order::upto(read.upto());
    let high = match high {
        Bound::Included(order) => Bound::Included(order.min(end)),
        Bound::Excluded(order) if order <= end => Bound::Excluded(order),
        _ => Bound::Included(end),
    };
    let low = match low {
        Bound::Unbounded => Bound::Included(Order::MIN),
        low => low,
    };
    let key = |order| (room, parent, kind, order);
    let rows = schema::RELATION.range::<(RoomNum, EventNum, RelationKind, Order)>(
        read,
        low.map(key),
        high.map(key),
        direction,
    )?;
    Ok(rows.map(|row| row.map(|((_, _, _, order), row)| (order, row))))
}

/// Lists the events that refer to this one, in this way or in any, by their order, within a stretch of the timeline.
pub fn list<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
    parent: EventNum,
    rel_type: Option<&str>,
    span: Span,
    direction: Direction,
) -> Result<impl Iterator<Item = Related> + 'r, Fault> {
    let kinds = RelationKind::ALL.into_iter();
    let kinds = kinds.filter(|kind| rel_type.is_none_or(|rel_type| RelationKind::of(rel_type) == *kind));
    let lists =
        kinds.map(|kind| list_kind(read, room, parent, kind, span, direction).map(Iterator::peekable));
    Ok(Merged { lists: lists.collect::<Result<_, _>>()?, direction })
}

/// Finds the row by which an event refers to another, with the number of that one. `None` if it refers to none that the room
/// had when it came.
pub fn find_own(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    stored: &StoredEvent,
) -> Result<Option<(EventNum, RelationRow)>, Fault> {
    let Some(relation) = relates_to(stored.row.content()) else { return Ok(None) };
    let Some(parent) = event::find_num(read, room, &relation.event_id)? else { return Ok(None) };
    let kind = RelationKind::of(&relation.rel_type);
    let row = schema::RELATION.get(read, (room, parent, kind, stored.order))?;
    Ok(row.map(|row| (parent, row)))
}

/// Merges several sorted lists into one.
struct Merged<I: Iterator<Item = Related>> {
    lists: Vec<Peekable<I>>,
    direction: Direction,
}

impl<I: Iterator<Item = Related>> Iterator for Merged<I> {
    type Item = Related;

    fn next(&mut self) -> Option<Related> {
        let head = |list: &mut Peekable<I>| match list.peek() {
            None => None,
            // A fault is passed on at once.
            Some(Err(_)) => Some(None),
            Some(Ok((order, _))) => Some(Some(*order)),
        };
        let heads = self.lists.iter_mut().enumerate().filter_map(|(at, list)| Some((head(list)?, at)));
        let (_, at) = match self.direction {
            Direction::Up => heads.min()?,
            Direction::Down => heads.min_by_key(|(order, _)| order.map(Reverse))?,
        };
        self.lists.get_mut(at)?.next()
    }
}

/// Lists the events from which threads of a room grow, with the order of each thread's newest event, newest first; only
/// those below `from`.
pub fn list_threads<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
    from: Order,
) -> Result<impl Iterator<Item = Result<(Order, EventNum), Fault>> + 'r, Fault> {
    let low = Bound::Included((room, Order::MIN));
    let rows = schema::THREAD.range::<(RoomNum, Order)>(
        read,
        low,
        Bound::Included((room, from)),
        Direction::Down,
    )?;
    Ok(rows.map(|row| row.map(|((_, order), root)| (order, root))))
}

/// Whether a user wrote the root of a thread or a later event in it.
pub fn took_part(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    root: &StoredEvent,
    user: &UserId,
) -> Result<bool, Fault> {
    Ok(root.row.sender() == user.as_str()
        || schema::THREAD_SENDER.contains(read, (room, root.event(), user.as_str()))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relation_needs_a_type_and_an_event() {
        let content = r#"{"m.relates_to":{"rel_type":"m.thread","event_id":"$x"}}"#;
        assert_eq!(relates_to(content).unwrap().rel_type, "m.thread");
        for content in [
            r#"{"m.relates_to":{"event_id":"$x"}}"#,
            r#"{"m.relates_to":{"m.in_reply_to":{"event_id":"$x"}}}"#,
            r#"{"m.relates_to":7}"#,
            r#"{"body":"m.relates_to"}"#,
        ] {
            assert_eq!(relates_to(content), None, "{content}");
        }
    }
}
