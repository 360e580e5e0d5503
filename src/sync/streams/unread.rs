//! How much the user has not read of each room.

use ruma::OwnedEventId;

use crate::{
    push::{reader::Place, unread::Unread},
    rooms::event,
    store::Fault,
    sync::window::RoomWindow,
};

/// The counts of unread events of one room, for one user.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// The unread events that belong to no thread.
    pub(crate) main: Unread,
    /// The unread events of each thread, by the id of the thread's root. Empty unless the client wants counts by
    /// thread.
    pub(crate) threads: Vec<(OwnedEventId, Unread)>,
    /// The unread events of the whole room, in threads and outside.
    pub(crate) total: Unread,
}

/// Counts how much the user has not read of a room.
pub(crate) fn collect(room: &RoomWindow<'_, '_>) -> Result<Counts, Fault> {
    let window = room.window;
    let tally = window.counts()?.tally(window.read, place(room), window.upto)?;
    let mut threads = Vec::new();
    if window.ask.filter.thread_counts {
        for (root, unread) in &tally.threads {
            if let Some(root) = event::find(window.read, room.num, *root)? {
                threads.push((root.id(room.row), *unread));
            }
        }
    }
    Ok(Counts { main: tally.main, threads, total: tally.total() })
}

/// Whether the counts of a room must be told though it has no other news: the user's push rules changed, or the users
/// whom they ignore, or how far they have read.
pub(crate) fn is_news(room: &RoomWindow<'_, '_>) -> Result<bool, Fault> {
    let window = room.window;
    window.counts()?.is_news(window.read, place(room), room.from(), window.upto)
}

fn place<'a>(room: &RoomWindow<'a, '_>) -> Place<'a> {
    Place { num: room.num, row: room.row, joined: room.user_row.since }
}
