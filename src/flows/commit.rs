//! The write path of rooms, through which every event of every room goes.
//!
//! Changes to one room are made one after the other: each builds its events, judges them and hands them to the store. The next
//! one begins before the disk has finished, so that those who write to one room share its flushes.

use std::{sync::Arc, time::Duration};

use ruma::{RoomId, UserId};
use tokio::sync::oneshot;

use crate::{
    accounts::users,
    env::{
        payer::Payers,
        spent::{self, Place},
    },
    error::{Error, Refusal, Result},
    flows::{
        App,
        write::{self, Locked},
    },
    ids::{RoomNum, UserNum},
    push::unread,
    rooms::{
        self,
        change::Change,
        directory, redact,
        retention::Limits,
        state, sticky,
        turns::{Seat, Turns},
    },
    schema::rooms::Membership,
    store::{Enqueued, Fault, NotAccepted, Wake},
};

/// A worker takes the turns of one room for at most this long before other rooms get its thread.
const WORKED_AT_ONCE: Duration = Duration::from_millis(10);

/// The number of a room that a user means to act in. An unknown room is answered as one that the user is not in
/// (403 `M_FORBIDDEN`), so that nobody learns which rooms there are.
pub(crate) fn require_num(app: &App, room: &RoomId) -> Result<RoomNum> {
    rooms::find_room(&*app.store.snapshot(), room)?.ok_or_else(|| not_in_room().into())
}

/// The refusal for a user who is not in the room: 403 `M_FORBIDDEN`.
pub(crate) fn not_in_room() -> Refusal {
    Refusal::forbidden("You are not in this room.")
}

/// Changes a room: waits for its turn, lets `work` add events, writes everything that follows from them in one batch, and
/// returns when that is durable and visible. If `work` adds nothing, nothing is written, but the state that it saw is durable
/// when this returns.
pub(crate) async fn in_room<T: Send + 'static>(
    app: &App,
    room: RoomNum,
    work: impl FnOnce(&mut Change) -> Result<T> + Send + 'static,
) -> Result<T> {
    let begin = move |app: &App, seat: Seat| Change::begin(&app.store, seat, room);
    in_turn(app, room, begin, |change, _| work(change), Error::from).await
}

/// Like [`in_room`], for rows that stand beside the room's events: `work` adds none. It may also be a room that this server is no
/// longer in.
pub(crate) async fn beside_room<T: Send + 'static>(
    app: &App,
    room: RoomNum,
    work: impl FnOnce(&mut Change) -> Result<T> + Send + 'static,
) -> Result<T> {
    let begin = move |app: &App, seat: Seat| Change::begin_beside(&app.store, seat, room);
    in_turn(app, room, begin, |change, _| work(change), Error::from).await
}

/// Like [`in_room`], but also under the server's lock, which changes of aliases and of the directory need. `work` must be short,
/// because everybody who registers or names a room waits for it. It may also be a room that this server is no longer in, to
/// which `work` can add no events.
pub(crate) async fn in_room_and_server<T: Send + 'static>(
    app: &App,
    room: RoomNum,
    work: impl FnOnce(&mut Change) -> Result<T> + Send + 'static,
) -> Result<T> {
    let begin = move |app: &App, seat: Seat| Change::begin_beside(&app.store, seat, room);
    let work = |change: &mut Change, server: &mut ServerLock<'_>| {
        server.take(change);
        work(change)
    };
    in_turn(app, room, begin, work, Error::from).await
}

/// The server's lock, which a change to a room takes when it comes to rows of the server, and holds until its batch is enqueued.
pub(crate) struct ServerLock<'a> {
    app: &'a App,
    locked: Option<Locked<'a>>,
}

impl<'a> ServerLock<'a> {
    /// Takes the lock. The change may write rows of the server from now on, and should have done everything else before.
    pub(crate) fn take(&mut self, change: &mut Change) {
        self.hold(change, write::lock_server(self.app));
    }

    /// Takes a user's lock instead, for a change that decides by what the user has in other rooms.
    pub(crate) fn take_user(&mut self, change: &mut Change, user: UserNum) {
        self.hold(change, write::lock_user(self.app, user));
    }

    fn hold(&mut self, change: &mut Change, locked: Locked<'a>) {
        debug_assert!(self.locked.is_none(), "a change takes one lock beside the room's turn, and once");
        change.batch.cover(&locked.guard);
        self.locked = Some(locked);
    }
}

/// Like [`in_room`], for a change that begins in another way, as that of a new room does, or that comes to need the server's
/// lock. `refused` turns the reason why a batch was not accepted into an error.
pub(crate) async fn in_turn<T: Send + 'static>(
    app: &App,
    room: RoomNum,
    begin: impl FnOnce(&App, Seat) -> Result<Change> + Send + 'static,
    work: impl FnOnce(&mut Change, &mut ServerLock<'_>) -> Result<T> + Send + 'static,
    refused: fn(NotAccepted) -> Error,
) -> Result<T> {
    let (tell, told) = oneshot::channel();
    let (owned, asked, spent) = (app.clone(), app.env.instant(), spent::current());
    let (of_turn, turns) = (spent.clone(), app.rooms.turns(room));
    let of_room = Arc::clone(&turns);
    // A worker takes the turns of several requests, and this turn logs on behalf of this one.
    let span = tracing::Span::current();
    let turn = move |seat| {
        let _within = span.enter();
        let began = owned.env.instant();
        let make = || -> Result<(Change, T, ServerLock<'_>)> {
            let mut change = begin(&owned, seat)?;
            let mut server = ServerLock { app: &owned, locked: None };
            let still = of_room.still_for(owned.env.uptime()).map(|_| change.row.states());
            let answer = work(&mut change, &mut server)?;
            if let Some(states) = still
                && let Some(retry_after) = of_room.still_for(owned.env.uptime())
                && !change.row.states().is_subset(&states)
            {
                let why = "far branches are being reunited with the room";
                tracing::debug!(%room, why, "a change of a room's state is refused for now");
                return Err(Error::Busy { retry_after });
            }
            Ok((change, answer, server))
        };
        let made = make();
        if let Some(spent) = of_turn {
            spent.add(Place::Queued, began.saturating_duration_since(asked));
            spent.add(Place::Working, owned.env.instant().saturating_duration_since(began));
        }
        match made {
            Ok((change, answer, _server)) => enqueue_and_tell(&owned, change, answer, tell, refused),
            // The requester may have hung up, and then nobody receives the error.
            Err(error) => drop(tell.send(Err(error))),
        }
    };
    if let Some(payers) = turns.add(Box::new(turn))? {
        // The turns run as a task of their own: the requester may hang up, and others wait for the same turns.
        begin_work_off(app, turns, payers);
    }
    let in_turn_us = || spent.as_ref().map_or(0, |it| it.us(Place::Queued) + it.us(Place::Working));
    let before_us = in_turn_us();
    let told = told.await;
    if let Some(spent) = &spent {
        let turn = Duration::from_micros(in_turn_us().saturating_sub(before_us));
        let waited = app.env.instant().saturating_duration_since(asked);
        spent.add(Place::Flushing, waited.saturating_sub(turn));
    }
    match told {
        Ok(Ok(Outcome::Durable(answer))) => Ok(answer),
        Ok(Ok(Outcome::Unwritten(answer))) => {
            write::durable(app, None).await?;
            Ok(answer)
        }
        Ok(Err(error)) => Err(error),
        Err(_) => Err(app.broke_off("a change to a room")),
    }
}

/// Has a room's turns worked off when one of the places for writing is free for these payers.
fn begin_work_off(app: &App, turns: Arc<Turns>, payers: Payers) {
    let owned = app.clone();
    app.env.spawn_writing(payers, move || work_off(&owned, &turns, payers));
}

/// Takes a room's turns for as long as a worker may. Turns that are left wait behind the other work of the pool.
fn work_off(app: &App, turns: &Arc<Turns>, payers: Payers) {
    let began = app.env.instant();
    let is_over = || app.env.instant().saturating_duration_since(began) > WORKED_AT_ONCE;
    for payers in turns.work_off(payers, is_over) {
        begin_work_off(app, Arc::clone(turns), payers);
    }
}

/// The answer to a change.
enum Outcome<T> {
    /// The change is durable and visible.
    Durable(T),
    /// Nothing was changed; earlier changes that the answer depends on may still wait for the flush.
    Unwritten(T),
}

/// Enqueues a change. Its answer is told by the flush, so that the requester is woken only once.
fn enqueue_and_tell<T: Send + 'static>(
    app: &App,
    change: Change,
    answer: T,
    tell: oneshot::Sender<Result<Outcome<T>>>,
    refused: fn(NotAccepted) -> Error,
) {
    match enqueue(app, change) {
        Ok(Some(enqueued)) => enqueued.flushed.then(move |flushed| {
            // If the write is lost, the requester learns it from the channel, which closes.
            if flushed.is_ok() {
                drop(tell.send(Ok(Outcome::Durable(answer))));
            }
        }),
        Ok(None) => drop(tell.send(Ok(Outcome::Unwritten(answer)))),
        Err(why) => drop(tell.send(Err(refused(why)))),
    }
}

/// Deletes the staged parts of changes that never ended, for instance because the server was killed. Nobody ever saw any of it,
/// and a room that changes before this runs deletes its own.
pub(crate) async fn clear_unfinished(app: &App) -> Result<()> {
    let rooms = state::stage::list_rooms(&*app.store.snapshot())?;
    for room in rooms {
        clear_unfinished_in(app, room).await;
    }
    Ok(())
}

/// Deletes the staged parts of an unfinished change to one room. An empty change does so, because each change begins with it;
/// it is refused for a room that was never made.
pub(crate) async fn clear_unfinished_in(app: &App, room: RoomNum) {
    match in_room(app, room, |_| Ok(())).await {
        Ok(()) | Err(Error::Refused(_)) => {}
        Err(error) => tracing::warn!(%error, %room, "an unfinished change to a room could not be cleared"),
    }
}

/// Tells what is kept in memory of a user that the user came into the room or is out of it.
fn wake_of(change: &mut Change, membership: Membership, user_id: String) -> Result<(), Fault> {
    if membership != Membership::Join {
        change.batch.wake(Wake::Left { room: change.num, user_id });
    } else if let Ok(user_id) = <&UserId>::try_from(user_id.as_str())
        && let Some(user) = users::find_num(&change.batch, user_id)?
    {
        change.batch.wake(Wake::Joined { room: change.num, user });
    }
    Ok(())
}

/// Adds everything that follows from the events of a change, and hands it to the store. The room's seat is free after this.
/// Answers `None` if there is nothing to write.
fn enqueue(app: &App, mut change: Change) -> Result<Option<Enqueued>, NotAccepted> {
    if change.batch.row_count() == 0 {
        return Ok(None);
    }
    let fault = NotAccepted::Fault;
    change.keep_to_lifetimes(&Limits::from(&app.config.retention), app.env.now_ms()).map_err(fault)?;
    for stored in change.added().to_vec() {
        if let (Some(membership), Some(user_id)) = (stored.membership(), stored.row.state_key()) {
            wake_of(&mut change, membership, user_id.into_owned()).map_err(fault)?;
        }
        unread::count(&mut change, &stored).map_err(fault)?;
        sticky::note(&mut change.batch, change.num, &stored, app.env.now_ms()).map_err(fault)?;
    }
    let redacted_at = change.added().iter().map(|stored| stored.order.anchor).max().unwrap_or_default();
    for original in std::mem::take(&mut change.redacted) {
        unread::uncount(&mut change.batch, change.num, &original, redacted_at).map_err(fault)?;
        let kept_ms = app.config.rooms.redacted_events_kept_ms();
        if kept_ms > 0 {
            let until_ms = app.env.now_ms() + kept_ms;
            redact::keep_original(&mut change.batch, change.num, &original, until_ms);
        }
    }
    for original in std::mem::take(&mut change.expired) {
        let at = original.order.anchor;
        unread::uncount(&mut change.batch, change.num, &original, at).map_err(fault)?;
    }
    if change.row.joined != change.joined_before
        && directory::is_published(&change.batch, change.num).map_err(fault)?
    {
        change.batch.wake(Wake::Listed { room: change.num });
    }
    change.promise_sweep(app.env.now_ms()).map_err(fault)?;
    change.promise_forgetting(app.env.now_ms());
    // The last batch of a room that is made in parts may hold no event itself.
    if change.batch.has_position() || !change.added().is_empty() {
        let wake = match change.wakes_only.take().filter(|_| change.added().is_empty()) {
            Some(users) => Wake::users(users),
            None => Wake::Users(change.list_concerned().map_err(fault)?),
        };
        change.batch.wake(wake);
    }
    let (room, answered) = (change.num, std::mem::take(&mut change.answered));
    let enqueued = change.enqueue(&app.store)?;
    app.rooms.resolver().keep(room, answered, enqueued.base);
    Ok(Some(enqueued))
}
