//! How much the user has not read.

use crate::{
    ids::{Order, Position, RoomNum},
    push::{
        evaluate::Class,
        unread::{self, Reader, Tally, Unread},
    },
    rooms::{event, receipts},
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
    let caller = &window.ask.caller;
    let read = receipts::read_up_to(window.read, num, caller.user_id.as_str())?;
    let class = window.own_rules()?.map_or(Class::Default, |rules| Class::of(rules, row.id.as_str()));
    let reader = Reader { user: caller.user, class, joined: Order::live(joined), read: &read };
    let tally: Tally = unread::tally(window.read, num, &reader, Order::upto(window.upto))?;
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

fn counts(unread: Unread) -> String {
    let mut counts = Object::new();
    counts.number("notification_count", unread.notifications);
    counts.number("highlight_count", unread.highlights);
    counts.finish()
}
