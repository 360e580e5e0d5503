//! THE write path: every event of every room comes through here.
//!
//! Changes to one room are made one after the other: each builds its events, judges them and hands them to the store,
//! and the next one begins before the disk is waited for, so those who write to one room share its flushes.

use ruma::{RoomId, UserId};
use tokio::sync::oneshot;

use crate::{
    error::{Error, Refusal, Result},
    flows::App,
    ids::RoomNum,
    push::unread,
    rooms::{self, Seat, commit::Change},
    store::{Enqueued, NotAccepted},
};

/// The number of a room that a user means to act in. An unknown room is answered as one that the user is not in
/// (403 `M_FORBIDDEN`), so that nobody learns which rooms there are.
pub(crate) fn require_num(app: &App, room: &RoomId) -> Result<RoomNum> {
    rooms::find_room(&*app.store.snapshot(), room)?.ok_or_else(|| not_in_room().into())
}

/// 403 `M_FORBIDDEN`.
pub(crate) fn not_in_room() -> Refusal {
    Refusal::forbidden("You are not in this room.")
}

/// Changes a room: waits for its turn, lets `work` add events, writes everything that follows from them in one batch, and
/// returns when that is durable and visible. Where `work` adds nothing, nothing is written; but what it saw is
/// durable when this returns.
pub(crate) async fn in_room<T: Send + 'static>(
    app: &App,
    room: RoomNum,
    work: impl FnOnce(&mut Change) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (tell, told) = oneshot::channel();
    let inner = app.clone();
    let turn = move |seat| {
        let change = || {
            let mut change = Change::begin(&inner.store, seat, room)?;
            let answer = work(&mut change)?;
            Ok((answer, enqueue(&inner, change)?))
        };
        // Whoever asked may have hung up; what is accepted is done all the same.
        let _ = tell.send(change());
    };
    let turns = app.rooms.turns(room);
    if turns.add(Box::new(turn))? {
        // A task of its own: whoever asked may hang up, and others rely on this.
        let env = app.env.clone();
        app.env.spawn(async move {
            let _ = env
                .blocking(move || {
                    turns.work_off();
                    Ok(())
                })
                .await;
        });
    }
    let (answer, enqueued) =
        told.await.unwrap_or_else(|_| Err(Error::broken("a change to a room ended early")))?;
    flushed(app, enqueued).await?;
    Ok(answer)
}

/// Everything that follows from the events of a change, then the store. `None` if there is nothing to write.
/// The room's lock is free after this.
pub(crate) fn enqueue(app: &App, mut change: Change) -> Result<Option<Enqueued>, NotAccepted> {
    if change.batch.row_count() == 0 {
        return Ok(None);
    }
    let fault = NotAccepted::Fault;
    for stored in change.added().to_vec() {
        unread::count(&mut change.batch, &app.push, change.num, &change.row, &stored).map_err(fault)?;
    }
    for original in std::mem::take(&mut change.redacted) {
        unread::uncount(&mut change.batch, change.num, &change.row, &original).map_err(fault)?;
    }
    let concerned = change.list_concerned().map_err(fault)?;
    let notifier = app.notifier.clone();
    change.batch.on_publish(move |_| {
        // In a large room hardly anybody waits: look at those who do.
        if concerned.len() > notifier.waiting_count() {
            notifier.wake_waiting(|user| concerned.binary_search(&user).is_ok());
        } else {
            notifier.wake_users(concerned.iter().copied());
        }
    });
    change.enqueue(&app.store).map(Some)
}

/// Waits until the batch is durable and visible, or, without one, everything that was accepted before.
pub(crate) async fn flushed(app: &App, enqueued: Option<Enqueued>) -> Result<()> {
    match enqueued {
        Some(enqueued) => enqueued
            .flushed
            .await
            .map_err(|_| Error::broken("the server stopped before the write was durable")),
        None => {
            app.store.barrier().await;
            Ok(())
        }
    }
}

/// The seat of a room that nobody knows yet: it is free.
pub(crate) async fn new_seat(app: &App, room: RoomNum) -> tokio::sync::OwnedMutexGuard<Seat> {
    app.rooms.seat(room).lock_owned().await
}

/// Refuses users of other servers, whom this server cannot reach: it speaks to no other server yet.
pub(crate) fn require_local(app: &App, user: &UserId) -> Result<(), Refusal> {
    if user.server_name() == app.rooms.signer().server() {
        return Ok(());
    }
    Err(Refusal::forbidden("This server cannot reach users of other servers."))
}
