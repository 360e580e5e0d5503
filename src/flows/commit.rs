//! THE write path: every event of every room comes through here.
//!
//! Changes to one room are made one after the other: each builds its events, judges them and hands them to the store,
//! and the next one begins before the disk is waited for, so those who write to one room share its flushes.

use std::{borrow::Cow, sync::Arc};

use parking_lot::Mutex;
use ruma::{RoomId, ServerName, UserId};
use tokio::sync::oneshot;

use crate::{
    accounts::users,
    error::{Error, Refusal, Result},
    flows::App,
    ids::RoomNum,
    push::unread,
    rooms::{self, Seat, commit::Change, redact},
    schema::rooms::Membership,
    store::{Enqueued, NotAccepted, Read},
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
        let change = || -> Result<(Change, T)> {
            let mut change = Change::begin(&inner.store, seat, room)?;
            let answer = work(&mut change)?;
            Ok((change, answer))
        };
        match change() {
            Ok((change, answer)) => enqueue_and_tell(&inner, change, answer, tell),
            // Whoever asked may have hung up.
            Err(error) => drop(tell.send(Err(error))),
        }
    };
    let turns = app.rooms.turns(room);
    if turns.add(Box::new(turn))? {
        // Whoever asked may hang up, and others rely on this.
        app.env.spawn_blocking(move || turns.work_off());
    }
    match told.await {
        Ok(Ok(Told::Durable(answer))) => Ok(answer),
        Ok(Ok(Told::Unwritten(answer))) => {
            app.store.barrier().await;
            Ok(answer)
        }
        Ok(Err(error)) => Err(error),
        Err(_) => {
            Err(Error::broken("a change to a room ended early, or the server stopped before it was durable"))
        }
    }
}

/// The answer to a change.
enum Told<T> {
    /// What was changed is durable and visible.
    Durable(T),
    /// Nothing was changed; what the answer rests on may still wait for the flush.
    Unwritten(T),
}

/// Enqueues a change. Its answer is told once, by the flush: whoever waits need not be woken in between.
fn enqueue_and_tell<T: Send + 'static>(
    app: &App,
    mut change: Change,
    answer: T,
    tell: oneshot::Sender<Result<Told<T>>>,
) {
    if change.batch.row_count() == 0 {
        drop(tell.send(Ok(Told::Unwritten(answer))));
        return;
    }
    // Shared, for a batch that is not accepted is dropped with what it was to call.
    let tell = Arc::new(Mutex::new(Some((tell, answer))));
    let waits = Arc::clone(&tell);
    change.batch.on_publish(move |_| {
        if let Some((tell, answer)) = waits.lock().take() {
            drop(tell.send(Ok(Told::Durable(answer))));
        }
    });
    if let Err(refused) = enqueue(app, change)
        && let Some((tell, _)) = tell.lock().take()
    {
        drop(tell.send(Err(refused.into())));
    }
}

/// Everything that follows from the events of a change, then the store. `None` if there is nothing to write.
/// The room's lock is free after this.
pub(crate) fn enqueue(app: &App, mut change: Change) -> Result<Option<Enqueued>, NotAccepted> {
    if change.batch.row_count() == 0 {
        return Ok(None);
    }
    let fault = NotAccepted::Fault;
    let mut gone: Vec<String> = Vec::new();
    for stored in change.added().to_vec() {
        if stored.membership().is_some_and(|membership| membership != Membership::Join) {
            gone.extend(stored.row.state_key().map(Cow::into_owned));
        }
        unread::count(&mut change, &app.push, &stored).map_err(fault)?;
    }
    for original in std::mem::take(&mut change.redacted) {
        unread::uncount(&mut change.batch, change.num, &change.row, &original).map_err(fault)?;
        let kept_ms = app.config.rooms.redacted_events_kept_ms();
        if kept_ms > 0 {
            let until_ms = app.env.now_ms() + kept_ms;
            redact::keep_original(&mut change.batch, change.num, &original, until_ms);
        }
    }
    let concerned = change.list_concerned().map_err(fault)?;
    let (notifier, ephemeral, room) = (app.notifier.clone(), app.ephemeral.clone(), change.num);
    change.batch.on_publish(move |_| {
        for user in gone {
            ephemeral.change(|board, number| (board.typing.set(room, &user, None, number), ()));
        }
        notifier.gather(concerned);
    });
    let answered = std::mem::take(&mut change.answered);
    let enqueued = change.enqueue(&app.store)?;
    app.rooms.resolver().keep(room, answered, enqueued.base);
    Ok(Some(enqueued))
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

/// Refuses to invite users of other servers, to which this server does not speak yet (403), and users of ours that nobody
/// is (404): an account that is made later would not be told.
pub(crate) fn require_reachable(
    read: &(impl Read + ?Sized),
    server: &ServerName,
    user: &UserId,
) -> Result<()> {
    if user.server_name() != server {
        return Err(Refusal::forbidden("This server cannot reach users of other servers.").into());
    }
    users::require_num(read, user).map(drop)
}
