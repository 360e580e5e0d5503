//! What refers to an event, as readers find it in the event's `unsigned` ("Aggregations of child events").

use std::ops::Bound;

use super::Viewer;
use crate::{
    ids::{EventNum, Order, RoomNum},
    json::{JsonText, Object},
    rooms::{
        event::{self, Stored},
        relations::{AGAIN_MAX, can_be_edited, list_kind, newest_edit, newest_of, took_part},
        view::RoomView,
    },
    schema,
    schema::relations::{RelatedRow, RelationKind},
    store::{Direction, Fault, Read},
};

/// References that are bundled with an event, at most.
const REFERENCES_MAX: usize = 100;

/// How much is bundled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// Everything.
    Full,
    /// The newest edit only: for an event inside another's bundle, so that chains of threads cost nothing.
    Edit,
}

/// What refers to an event, as it stands in the event's `unsigned`; `None` if nothing does.
pub(super) fn bundle(
    view: RoomView<'_, impl Read + ?Sized>,
    stored: &Stored,
    viewer: &Viewer<'_>,
    depth: Depth,
) -> Result<Option<JsonText>, Fault> {
    let Some(related) = schema::RELATED.get(view.read, (view.num, stored.event()))? else { return Ok(None) };
    bundle_related(view, stored, &related, viewer, depth)
}

/// The same, where the row that says what refers to the event has been read.
pub(super) fn bundle_related(
    view: RoomView<'_, impl Read + ?Sized>,
    stored: &Stored,
    related: &RelatedRow,
    viewer: &Viewer<'_>,
    depth: Depth,
) -> Result<Option<JsonText>, Fault> {
    let (read, num, parent) = (view.read, view.num, stored.event());
    let mut bundled = Object::new();
    if let Some(edit) = find_edit(read, num, stored, related, viewer.until)?
        && !viewer.hides(view, stored)?
        && !viewer.hides(view, &edit)?
    {
        bundled.json("m.replace", &super::show_plain(view, &edit, viewer)?);
    }
    if depth == Depth::Full && related.reference_count > 0 {
        let span = (Bound::Unbounded, Bound::Included(viewer.until));
        let mut chunk = Vec::new();
        for row in
            list_kind(read, num, parent, RelationKind::Reference, span, Direction::Up)?.take(REFERENCES_MAX)
        {
            let mut reference = Object::new();
            reference.text("event_id", event::require(read, num, row?.1.event)?.id(view.row).as_str());
            chunk.push(reference.finish());
        }
        if !chunk.is_empty() {
            let mut references = Object::new();
            references.list("chunk", &chunk);
            bundled.json("m.reference", &references.finish());
        }
    }
    if depth == Depth::Full
        && let Some((latest, count)) = find_thread(read, num, parent, related, viewer.until)?
    {
        let latest = event::require(read, num, latest)?;
        // The newest event of a thread shows its own newest edit, but no more than that.
        let mut thread = Object::new();
        thread.number("count", count);
        thread.flag("current_user_participated", took_part(read, num, stored, viewer.user)?);
        thread.json("latest_event", &super::show_inside(view, &latest, viewer)?);
        bundled.json("m.thread", &thread.finish());
    }
    Ok((!bundled.is_empty()).then(|| bundled.finish()))
}

/// The newest edit that a reader may see.
fn find_edit(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    original: &Stored,
    related: &RelatedRow,
    until: Order,
) -> Result<Option<Stored>, Fault> {
    let Some(edit) = related.edit.filter(|_| can_be_edited(original)) else { return Ok(None) };
    match event::find(read, room, edit)? {
        Some(edit) if edit.order > until => newest_edit(read, room, original, until),
        edit => Ok(edit),
    }
}

/// The newest event of a thread that a reader may see, and how many they may see ([`AGAIN_MAX`] at most, if not all).
fn find_thread(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    root: EventNum,
    related: &RelatedRow,
    until: Order,
) -> Result<Option<(EventNum, u64)>, Fault> {
    let Some((tip, event)) = related.thread_tip else { return Ok(None) };
    if tip <= until {
        return Ok(Some((event, related.thread_count)));
    }
    let Some((_, event)) = newest_of(read, room, root, RelationKind::Thread, until)? else { return Ok(None) };
    let span = (Bound::Unbounded, Bound::Included(until));
    let seen = list_kind(read, room, root, RelationKind::Thread, span, Direction::Down)?;
    Ok(Some((event, seen.take(AGAIN_MAX).count() as u64)))
}
