//! The events that refer to another, bundled for readers in that event's `unsigned` ("Aggregations of child events").

use super::Viewer;
use crate::{
    ids::{EventNum, Order, RoomNum},
    json::{JsonText, Object},
    rooms::{
        event::{self, StoredEvent},
        relations::{
            AGAIN_MAX, ANYWHERE,
            edits::{can_be_edited, is_edit_of, newest_edit},
            list_kind, took_part, upto,
        },
        view::RoomView,
        visibility::Reader,
    },
    schema,
    schema::event_types::{REFERENCE, REPLACE, THREAD},
    schema::relations::{RelatedRow, RelationKind},
    store::{Direction, Fault, Read},
};

/// At most this many references are bundled with an event, so that a popular one does not make an answer large.
const REFERENCES_MAX: usize = 100;

/// The depth to which relations are bundled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// All kinds of relations are bundled.
    Full,
    /// Only the newest edit is bundled: for an event inside another's bundle, so that chains of threads cost nothing.
    Edit,
}

/// Bundles the events that refer to an event, as they stand in its `unsigned`; `None` if there are none.
pub(super) fn bundle(
    view: RoomView<'_, impl Read + ?Sized>,
    stored: &StoredEvent,
    viewer: &Viewer<'_>,
    depth: Depth,
) -> Result<Option<JsonText>, Fault> {
    let Some(related) = schema::RELATED.get(view.read, (view.num, stored.event()))? else { return Ok(None) };
    bundle_related(view, stored, &related, viewer, depth)
}

/// Does the same from the row that says which events refer to the event.
pub(super) fn bundle_related(
    view: RoomView<'_, impl Read + ?Sized>,
    stored: &StoredEvent,
    related: &RelatedRow,
    viewer: &Viewer<'_>,
    depth: Depth,
) -> Result<Option<JsonText>, Fault> {
    let (read, num, parent) = (view.read, view.num, stored.event());
    let mut bundled = Object::new();
    if let Some(edit) = find_edit(read, num, stored, related, viewer.reader)?
        && !viewer.hides(view, stored)?
        && !viewer.hides(view, &edit)?
    {
        bundled.json(REPLACE, &super::show_bundled(view, &edit, viewer, None)?);
    }
    if depth == Depth::Full && related.reference_count > 0 {
        let seen = list_references(view, parent, viewer)?;
        let mut chunk = Vec::with_capacity(seen.len());
        for stored in seen {
            let mut reference = Object::new();
            reference.text("event_id", stored.id(view.row).as_str());
            chunk.push(reference.finish());
        }
        if !chunk.is_empty() {
            let mut references = Object::new();
            references.list("chunk", &chunk);
            bundled.json(REFERENCE, &references.finish());
        }
    }
    if depth == Depth::Full
        && let Some((latest, count)) = find_thread(view, parent, related, viewer)?
    {
        // The newest event of a thread shows its own newest edit, but no more than that.
        let mut thread = Object::new();
        thread.number("count", count);
        thread.flag("current_user_participated", took_part(read, num, stored, viewer.user)?);
        thread.json("latest_event", &super::show_inside(view, &latest, viewer)?);
        bundled.json(THREAD, &thread.finish());
    }
    Ok((!bundled.is_empty()).then(|| bundled.finish()))
}

/// Finds the newest edit that a reader may see.
fn find_edit(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    original: &StoredEvent,
    related: &RelatedRow,
    reader: &Reader,
) -> Result<Option<StoredEvent>, Fault> {
    let Some(edit) = related.edit.filter(|_| can_be_edited(original)) else { return Ok(None) };
    match event::find(read, room, edit)? {
        // Rows of older versions may name an edit that is none.
        Some(edit) if !is_edit_of(original, &edit) || !reader.sees(read, &edit)? => {
            let Some(until) = reader.end(read)? else { return Ok(None) };
            newest_edit(read, room, original, until, |edit| reader.sees(read, edit))
        }
        edit => Ok(edit),
    }
}

/// Lists the events of which a viewer sees that they refer to one, as many as are bundled.
fn list_references(
    view: RoomView<'_, impl Read + ?Sized>,
    parent: EventNum,
    viewer: &Viewer<'_>,
) -> Result<Vec<StoredEvent>, Fault> {
    let (read, room) = (view.read, view.num);
    let mut seen = Vec::new();
    let rows = list_kind(read, room, parent, RelationKind::Reference, ANYWHERE, Direction::Up)?;
    for row in rows.take(AGAIN_MAX) {
        let reference = event::require(read, room, row?.1.event)?;
        if viewer.sees_relation(view, &reference)? {
            seen.push(reference);
        }
        if seen.len() == REFERENCES_MAX {
            break;
        }
    }
    Ok(seen)
}

/// Finds the newest event of a thread that a viewer sees in it, and counts those they see: if there are some they do not
/// see, among the newest [`AGAIN_MAX`] events up to the end of their sight. `None` if they see none.
fn find_thread(
    view: RoomView<'_, impl Read + ?Sized>,
    root: EventNum,
    related: &RelatedRow,
    viewer: &Viewer<'_>,
) -> Result<Option<(StoredEvent, u64)>, Fault> {
    let (read, room, reader) = (view.read, view.num, viewer.reader);
    let Some((_, tip)) = related.thread_tip else { return Ok(None) };
    if reader.sees_everything(read)? && !may_have_erased(view, root, viewer)? {
        return Ok(Some((event::require(read, room, tip)?, related.thread_count)));
    }
    let Some(until) = reader.end(read)? else { return Ok(None) };
    let (mut latest, mut count) = (None, 0);
    let rows = list_kind(read, room, root, RelationKind::Thread, upto(until), Direction::Down)?;
    for row in rows.take(AGAIN_MAX) {
        let event = event::require(read, room, row?.1.event)?;
        if viewer.sees_relation(view, &event)? {
            latest = latest.or(Some(event));
            count += 1;
        }
    }
    Ok(latest.map(|latest| (latest, count)))
}

/// Whether some event of a thread may be shown redacted to who was not in the room at the time, and then stands in no thread.
/// A thread in which more than [`AGAIN_MAX`] users took part may have one.
fn may_have_erased(
    view: RoomView<'_, impl Read + ?Sized>,
    root: EventNum,
    viewer: &Viewer<'_>,
) -> Result<bool, Fault> {
    if !viewer.erased.anybody(view.read)? {
        return Ok(false);
    }
    let place = (view.num, root);
    let senders = schema::THREAD_SENDER.prefix::<(RoomNum, EventNum)>(view.read, place, Direction::Up)?;
    for (count, row) in senders.enumerate() {
        let ((_, _, sender), _) = row?;
        if count == AGAIN_MAX || viewer.erased.contains(view.read, &sender)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Finds where the newest event stands that a viewer sees in the thread which grows from an event; `None` if they see none.
/// At most [`AGAIN_MAX`] events are looked at, from the end of the viewer's sight (`until`) down: a thread may go on for long
/// after they left.
pub(crate) fn newest_in_thread(
    view: RoomView<'_, impl Read + ?Sized>,
    root: EventNum,
    viewer: &Viewer<'_>,
    until: Order,
) -> Result<Option<Order>, Fault> {
    let (read, room) = (view.read, view.num);
    let rows = list_kind(read, room, root, RelationKind::Thread, upto(until), Direction::Down)?;
    for row in rows.take(AGAIN_MAX) {
        let (order, row) = row?;
        if viewer.sees_relation(view, &event::require(read, room, row.event)?)? {
            return Ok(Some(order));
        }
    }
    Ok(None)
}
