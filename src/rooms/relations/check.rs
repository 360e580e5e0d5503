//! Checks the rows of relations against the events that they are made from, for `db check`.

use super::{annotation, find_thread};
use crate::{
    ids::{EventNum, RoomNum},
    rooms::event,
    schema::{
        self,
        relations::{RelatedRow, RelationKind},
    },
    store::{
        Direction, Fault, Snapshot,
        check::{Doubts, RowCheck},
    },
};

/// Lists the checks of relations and threads.
pub(in crate::rooms) fn checks() -> Vec<RowCheck> {
    vec![
        RowCheck::of(&schema::RELATION, |read, (room, parent, kind, order), row, doubts| {
            doubts.unless(
                *kind == RelationKind::of(&row.rel_type),
                "its type of relation is of another kind than its key says",
            );
            doubts.unless(
                schema::PLACE.contains(read, (*room, *parent))?,
                "the event that it refers to is gone",
            );
            let Some(stored) = schema::TIMELINE.get(read, (*room, *order))? else {
                doubts.unless(false, "no event stands there");
                return Ok(());
            };
            let is_it = stored.header.event == row.event && stored.sender() == row.sender.as_str();
            doubts.unless(is_it, format!("event {} is not at that order", row.event));
            let thread = schema::IN_THREAD.get(read, (*room, row.event))?;
            let expected = find_thread(read, *room, *parent, *kind)?;
            // An event that was told stays in the lane in which it was counted, though others came later that say where it stands.
            let came_later = |other: EventNum| other > row.event;
            let is_kept_out = thread.is_none()
                && order.minor == 0
                && expected.is_some_and(|thread| came_later(*parent) || came_later(thread.root));
            let is_there = thread == expected || is_kept_out;
            doubts.unless(is_there, "`in_thread` puts its event into another thread");
            let mark = annotation(stored.content(), &stored.sender(), &stored.event_type());
            if let (RelationKind::Annotation, Some(mark)) = (kind, mark) {
                let known = schema::ANNOTATED.contains(read, (*room, *parent, &mark))?;
                doubts.unless(
                    known,
                    "the annotation is not remembered, so that its sender could make it again",
                );
            }
            if matches!(kind, RelationKind::Thread | RelationKind::Reference) {
                let counted = schema::RELATED.contains(read, (*room, *parent))?;
                doubts.unless(counted, "the summary of the event that it refers to is missing");
            }
            Ok(())
        }),
        RowCheck::of(&schema::RELATION_WAITING, |read, (room, _, event), (), doubts| {
            let refers = schema::PLACE.contains(read, (*room, *event))?;
            doubts.unless(refers, "the event that refers to another is not there");
            Ok(())
        }),
        RowCheck::of(&schema::RELATED, |read, (room, parent), row, doubts| {
            related(read, *room, *parent, row, doubts)
        }),
        RowCheck::of(&schema::THREAD, |read, (room, order), root, doubts| {
            let tip = schema::RELATED.get(read, (*room, *root))?.and_then(|row| row.thread_tip);
            doubts.unless(
                tip.is_some_and(|(tip, _)| tip == *order),
                "the thread has its newest event elsewhere",
            );
            Ok(())
        }),
        RowCheck::of(&schema::IN_THREAD, |read, (room, event), thread, doubts| {
            let has = |event: EventNum| schema::PLACE.contains(read, (*room, event));
            doubts.unless(has(*event)? && has(thread.root)?, "the event or its thread's root is not there");
            Ok(())
        }),
        RowCheck::of(&schema::THREAD_SENDER, |read, (room, root, _), count, doubts| {
            let all = schema::RELATED.get(read, (*room, *root))?.map_or(0, |row| row.thread_count);
            doubts.unless(
                (1..=all).contains(count),
                format!("it counts {count} events of a thread that has {all}"),
            );
            Ok(())
        }),
        RowCheck::of(&schema::ANNOTATED, |read, (room, parent, mark), event, doubts| {
            let stored = event::find(read, *room, *event)?;
            let made = stored
                .as_ref()
                .map(|it| annotation(it.row.content(), &it.row.sender(), &it.row.event_type()));
            doubts
                .unless(made == Some(Some(*mark)), format!("event {event} is gone or is another annotation"));
            if let Some(stored) = stored {
                let place = (*room, *parent, RelationKind::Annotation, stored.order);
                doubts.unless(
                    schema::RELATION.contains(read, place)?,
                    "it is not found from the event that it refers to",
                );
            }
            Ok(())
        }),
    ]
}

/// Checks that the summary bundled with an event agrees with the events that refer to it.
fn related(
    read: &Snapshot,
    room: RoomNum,
    parent: EventNum,
    row: &RelatedRow,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    let (mut threaded, mut references, mut tip, mut has_edit) = (0, 0, None, row.edit.is_none());
    for found in schema::RELATION.prefix::<(RoomNum, EventNum)>(read, (room, parent), Direction::Up)? {
        let ((_, _, kind, order), found) = found?;
        match kind {
            RelationKind::Thread => {
                threaded += 1;
                tip = Some((order, found.event));
            }
            RelationKind::Reference => references += 1,
            RelationKind::Replace => has_edit |= row.edit == Some(found.event),
            RelationKind::Annotation | RelationKind::Other => {}
        }
    }
    let is_right = (row.thread_count, row.reference_count, row.thread_tip) == (threaded, references, tip);
    doubts.unless(
        is_right,
        format!("it should count {threaded} events in its thread and {references} references"),
    );
    doubts.unless(has_edit, "its newest edit does not refer to it");
    if let Some((order, _)) = row.thread_tip {
        let listed = schema::THREAD.get(read, (room, order))?;
        doubts.unless(listed == Some(parent), "the list of threads does not name its thread");
    }
    let mut sent = 0;
    for count in schema::THREAD_SENDER.prefix::<(RoomNum, EventNum)>(read, (room, parent), Direction::Up)? {
        sent += count?.1;
    }
    doubts.unless(
        sent == row.thread_count,
        format!("the senders of its thread sent {sent} events together, which is not the thread's count"),
    );
    Ok(())
}
