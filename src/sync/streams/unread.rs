//! How much the user has not read.

use crate::{
    ids::{Position, RoomNum},
    push::{
        reader::Place,
        unread::{Tally, Unread},
    },
    rooms::event,
    schema::rooms::RoomRow,
    store::Fault,
    sync::{answer::Object, streams::Window},
};

/// Adds `unread_notifications`, and `unread_thread_notifications` if the client wants them by thread.
pub(crate) fn collect(
    window: &Window<'_>,
    num: RoomNum,
    row: &RoomRow,
    joined: Position,
    answer: &mut Object,
) -> Result<(), Fault> {
    let place = Place { num, row, joined };
    let tally: Tally = window.reader()?.tally(window.read, place, window.upto)?;
    if window.ask.filter.thread_counts {
        answer.raw("unread_notifications", &counts(tally.main));
        let mut threads = Object::new();
        for (root, unread) in &tally.threads {
            if let Some(root) = event::find(window.read, num, *root)? {
                threads.raw(root.id(row).as_str(), &counts(*unread));
            }
        }
        if !threads.is_empty() {
            answer.raw("unread_thread_notifications", &threads.finish());
        }
    } else {
        answer.raw("unread_notifications", &counts(tally.total()));
    }
    Ok(())
}

/// Whether the counts must be told though the room has no other news for the client.
pub(crate) fn is_news(
    window: &Window<'_>,
    num: RoomNum,
    row: &RoomRow,
    joined: Position,
) -> Result<bool, Fault> {
    let place = Place { num, row, joined };
    window.reader()?.is_news(window.read, place, window.from, window.upto)
}

fn counts(unread: Unread) -> String {
    let mut counts = Object::new();
    counts.number("notification_count", unread.notifications);
    counts.number("highlight_count", unread.highlights);
    counts.finish()
}
