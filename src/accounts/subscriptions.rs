//! The threads that a user subscribes to (MSC4306), and those from which the user has unsubscribed.
//!
//! A row keeps the position of its last change, by which clients tell what is newest (`bump_stamp`), and by which a thread to which a
//! client subscribes by itself is told from one that its user left after that.

use std::ops::Bound;

use bytes::Bytes;

use crate::{
    error::{Refusal, Result},
    ids::{EventNum, Position, RoomNum, UserNum},
    schema::{self, accounts::WrittenRow},
    store::{Batch, Direction, Fault, LogEntry, Read},
};

/// A user has subscribed to, or unsubscribed from, at most this many threads.
const THREADS_MAX: u64 = 20_000;

/// The standing of a user towards a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// The user subscribes to it, and meant to.
    Manual,
    /// A client has subscribed to it by itself.
    Automatic,
    /// The user has unsubscribed from it.
    Unsubscribed,
}

impl Standing {
    const ALL: [Self; 3] = [Self::Manual, Self::Automatic, Self::Unsubscribed];

    fn word(self) -> &'static str {
        match self {
            Self::Manual => "manual",
            Self::Automatic => "automatic",
            Self::Unsubscribed => "unsubscribed",
        }
    }

    /// Whether the user subscribes to the thread.
    pub fn is_subscribed(self) -> bool {
        match self {
            Self::Manual | Self::Automatic => true,
            Self::Unsubscribed => false,
        }
    }
}

/// A thread that a user subscribes to or has unsubscribed from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subscription {
    /// The room of the thread.
    pub room: RoomNum,
    /// The event from which the thread grows.
    pub root: EventNum,
    /// The standing of the user towards the thread.
    pub standing: Standing,
    /// The position at which that last changed.
    pub position: Position,
}

fn decode(room: RoomNum, root: EventNum, row: &WrittenRow) -> Result<Subscription, Fault> {
    let standing = Standing::ALL.into_iter().find(|it| it.word().as_bytes() == &*row.content);
    let standing = standing.ok_or(Fault::CorruptRow {
        table: "SUBSCRIPTION",
        why: "it is none of manual, automatic and unsubscribed",
    })?;
    Ok(Subscription { room, root, standing, position: row.position })
}

/// Finds the standing of a user towards a thread; `None` where the user never subscribed to it.
pub fn find(
    read: &(impl Read + ?Sized),
    user: UserNum,
    room: RoomNum,
    root: EventNum,
) -> Result<Option<Subscription>, Fault> {
    let row = schema::SUBSCRIPTION.get(read, (user, room, root))?;
    row.map(|row| decode(room, root, &row)).transpose()
}

/// Sets what a user is to a thread; the caller holds the user's lock. Nothing is written where it is that already. Errors: 413
/// `M_TOO_LARGE` for more threads than a user may have.
pub fn set(
    batch: &mut Batch,
    user: UserNum,
    room: RoomNum,
    root: EventNum,
    standing: Standing,
) -> Result<()> {
    let before = find(batch, user, room, root)?;
    match before {
        Some(before) if before.standing == standing => return Ok(()),
        Some(before) => schema::SUBSCRIPTION_LOG.delete(batch, (user, before.position)),
        None => {
            let count = schema::SUBSCRIPTION_COUNT.get(batch, user)?.unwrap_or_default();
            if count >= THREADS_MAX {
                tracing::debug!(%user, count, reason = "too many threads", "a subscription is refused");
                let why = format!("A user can subscribe to at most {THREADS_MAX} threads in all.");
                return Err(Refusal::too_large(why).into());
            }
            schema::SUBSCRIPTION_COUNT.put(batch, user, &(count + 1));
        }
    }
    let position = batch.position(&LogEntry::AccountData { user });
    let content = Bytes::from_static(standing.word().as_bytes());
    schema::SUBSCRIPTION.put(batch, (user, room, root), &WrittenRow { position, content });
    schema::SUBSCRIPTION_LOG.put(batch, (user, position), &(room, root));
    Ok(())
}

/// A part of the changes of a user's subscriptions.
#[derive(Debug, Default)]
pub struct Page {
    /// The changes, the newest first; of a thread that changed twice only the newest one.
    pub changes: Vec<Subscription>,
    /// Whether there are older changes.
    pub has_more: bool,
}

/// Lists the last changes of subscriptions in (after, upto], at most so many.
pub fn list_changes(
    read: &(impl Read + ?Sized),
    user: UserNum,
    (after, upto): (Position, Position),
    count: usize,
) -> Result<Page, Fault> {
    let mut page = Page::default();
    if after >= upto {
        return Ok(page);
    }
    let (low, high) = (Bound::Excluded((user, after)), Bound::Included((user, upto)));
    for entry in schema::SUBSCRIPTION_LOG.range::<(UserNum, Position)>(read, low, high, Direction::Down)? {
        let ((_, position), (room, root)) = entry?;
        // An entry counts only while the row still has its position.
        let Some(change) = find(read, user, room, root)?.filter(|it| it.position == position) else {
            continue;
        };
        if page.changes.len() == count {
            page.has_more = true;
            break;
        }
        page.changes.push(change);
    }
    Ok(page)
}

/// Deletes all subscriptions of a user, for an account that ends.
pub fn delete_all(batch: &mut Batch, user: UserNum) {
    schema::SUBSCRIPTION.delete_prefix::<(UserNum,)>(batch, (user,));
    schema::SUBSCRIPTION_LOG.delete_prefix::<(UserNum,)>(batch, (user,));
    schema::SUBSCRIPTION_COUNT.delete(batch, user);
}
