//! How much the user has not read.

use ruma::OwnedEventId;

use crate::{
    push::{reader::Place, unread::Unread},
    rooms::event,
    store::Fault,
    sync::window::RoomWindow,
};

/// What the user has not read of a room.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Outside threads.
    pub(crate) main: Unread,
    /// By the id of the thread's root.
    pub(crate) threads: Vec<(OwnedEventId, Unread)>,
    /// In threads and outside.
    pub(crate) total: Unread,
}

/// What the user has not read of a room.
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

/// Whether the counts of a room must be told though it has no other news: the user's rules changed, or whom they ignore,
/// or how far they have read.
pub(crate) fn is_news(room: &RoomWindow<'_, '_>) -> Result<bool, Fault> {
    let window = room.window;
    window.counts()?.is_news(window.read, place(room), window.from, window.upto)
}

fn place<'a>(room: &RoomWindow<'a, '_>) -> Place<'a> {
    Place { num: room.num, row: room.row, joined: room.user_row.since }
}
