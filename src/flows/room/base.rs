//! Lays down the state that a join over federation brings (`rooms/change/base.rs`): in turns of the room, so that others are served
//! between them, and with a bounded number of events in memory.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::{
    error::{Error, Result},
    flows::{App, commit},
    rooms::change::{Base, Brought, Change, Received},
    store::NotAccepted,
};

/// Hold at most this many events in memory for the next turn, each of at most 64 KiB.
const READ_AT_ONCE: usize = 400;
/// Read no further event ahead of a turn once those at hand have this many bytes.
const READ_BYTES: usize = 1 << 20;

/// The last turn of a join is tried at most this often while other large steps take long.
const END_TRIES: u32 = 12;
/// The last turn of a join is tried again after this time.
const END_AGAIN: Duration = Duration::from_secs(5);

/// The events that a join brings, each after those that allow it. Reading them may wait for the disk, but not for the network.
pub type Events = Box<dyn Iterator<Item = Result<Brought>> + Send>;

/// A join between two turns.
struct Laying {
    base: Base,
    waiting: VecDeque<Brought>,
}

/// Joins a room by a base, the events that are brought and our own member event. It goes on when the requester hangs up,
/// because other servers believe by now that the user is in the room. A join that fails leaves nothing behind. `after` adds what
/// follows from the join to the batch with which it counts.
/// Errors: [`Error::Remote`] if what is brought is wrong; [`Error::Busy`] if the room is being made or joined by others.
pub async fn join<T: Send + 'static>(
    app: &App,
    base: Base,
    events: Events,
    join: Received,
    after: impl FnOnce(&mut Change) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (tell, told) = oneshot::channel();
    let owned = app.clone();
    app.env.spawn(async move {
        let room = base.num();
        let joined = lay(&owned, base, events, join, after).await;
        if let Err(error) = &joined {
            tracing::debug!(%error, %room, "a room could not be joined");
            commit::clear_unfinished_in(&owned, room).await;
        }
        drop(tell.send(joined));
    });
    told.await.map_err(|_| app.broke_off("a join"))?
}

async fn lay<T: Send + 'static>(
    app: &App,
    base: Base,
    mut events: Events,
    join: Received,
    after: impl FnOnce(&mut Change) -> Result<T> + Send + 'static,
) -> Result<T> {
    let mut laying = Laying { base, waiting: VecDeque::new() };
    loop {
        let read = move || read_ahead(laying, events);
        let (read, left, is_last) = app.env.blocking(read).await?;
        events = left;
        laying = take_turn(app, read).await?;
        if is_last && laying.waiting.is_empty() {
            break;
        }
    }
    finish(app, laying.base, join, after).await
}

/// The last turn of a join.
struct Ending {
    /// The join; `None` once it counts.
    base: Option<Base>,
    /// Whether the last turn has not begun, so that it may be tried again.
    is_open: bool,
}

/// Makes everything count that was laid down. Large steps are made one at a time, by whichever room, so that this one may have
/// to wait: it would be a waste to take all of it back for that.
async fn finish<T: Send + 'static>(
    app: &App,
    base: Base,
    join: Received,
    after: impl FnOnce(&mut Change) -> Result<T> + Send + 'static,
) -> Result<T> {
    let room = base.num();
    let join = Arc::new(join);
    let shared = Arc::new(Mutex::new(Ending { base: Some(base), is_open: true }));
    let after = Arc::new(Mutex::new(Some(after)));
    let mut tries = 1;
    loop {
        let (in_turn, join) = (Arc::clone(&shared), Arc::clone(&join));
        let last = move |app: &App, seat| {
            let mut ending = in_turn.lock();
            ending.is_open = false;
            let base = ending.base.as_mut().ok_or_else(|| Error::broken("a join has ended already"))?;
            if let Some((change, _)) = base.finish(&app.store, seat, &join)? {
                // From here on others may change the room, once this turn is over.
                ending.base = None;
                return Ok(change);
            }
            ending.is_open = true;
            Err(Error::Busy { retry_after: END_AGAIN })
        };
        let after = Arc::clone(&after);
        let work = move |change: &mut Change, _: &mut commit::ServerLock<'_>| {
            let after = after.lock().take().ok_or_else(|| Error::broken("a join has ended already"))?;
            after(change)
        };
        match commit::in_turn(app, room, last, work, or_busy).await {
            Err(Error::Busy { .. }) if shared.lock().is_open && tries < END_TRIES => {
                tries += 1;
                tracing::debug!(%room, tries, "the end of a join is put off, because another large step takes long");
                app.env.sleep(END_AGAIN).await;
            }
            ended => return ended,
        }
    }
}

/// Reads the events of the next turn. Gives `true` if there are no more after them.
fn read_ahead(mut laying: Laying, mut events: Events) -> Result<(Laying, Events, bool)> {
    let mut bytes: usize = laying.waiting.iter().map(|brought| brought.event.json().len()).sum();
    while laying.waiting.len() < READ_AT_ONCE && bytes < READ_BYTES {
        let Some(brought) = events.next().transpose()? else { return Ok((laying, events, true)) };
        bytes += brought.event.json().len();
        laying.waiting.push_back(brought);
    }
    Ok((laying, events, false))
}

/// Takes in as many of the events at hand as one turn may.
async fn take_turn(app: &App, laying: Laying) -> Result<Laying> {
    let room = laying.base.num();
    let shared = Arc::new(Mutex::new(laying));
    let in_turn = Arc::clone(&shared);
    let begin = move |app: &App, seat| in_turn.lock().base.begin_part(&app.store, seat);
    let in_turn = Arc::clone(&shared);
    let take = move |change: &mut Change, _: &mut commit::ServerLock<'_>| {
        let Laying { base, waiting } = &mut *in_turn.lock();
        base.take(change, &mut std::iter::from_fn(|| waiting.pop_front()))
    };
    commit::in_turn(app, room, begin, take, or_busy).await?;
    // The turn is over, so that nobody else holds what it worked on.
    let laying =
        Arc::into_inner(shared).ok_or_else(|| Error::broken("a turn of a join goes on after its end"))?;
    Ok(laying.into_inner())
}

/// A room that came to be under another number meanwhile is being made or joined by others.
fn or_busy(why: NotAccepted) -> Error {
    match why {
        NotAccepted::Conflict(_) => Error::Busy { retry_after: Duration::from_secs(1) },
        other => other.into(),
    }
}

#[cfg(test)]
pub(crate) mod tests;
