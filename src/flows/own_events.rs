//! Changes to rooms by which our own users add events. In a room that uses a policy server this asks for the signature that each
//! of them needs, outside the room's turn: nobody waits for a slow policy server but those who send to its rooms.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::{
    error::{Error, Result},
    flows::{
        App,
        commit::{self, ServerLock},
        policy_server::{self, Patience},
    },
    ids::{RoomNum, UserNum},
    rooms::{
        change::{
            Change, Received,
            countersigned::{Countersigned, Unsigned},
        },
        turns::Seat,
    },
};

/// A request whose events must be signed waits at most this long for that: clients give up not much later.
const TAKES_MAX: Duration = Duration::from_secs(20);
/// An event that nobody waits for is given up after this time.
const UNASKED_TAKES_MAX: Duration = Duration::from_secs(10);
/// A change is made at most this many times. A room that goes on so far meanwhile that a signed event cannot be placed in a turn
/// has it built and signed anew.
const ROUNDS_MAX: usize = 5;
/// Who could not have an event signed because others wait may try again after this time.
const AGAIN: Duration = Duration::from_secs(2);

/// The patience with the signature of an event that somebody waits for.
fn asked(app: &App) -> Patience {
    Patience { until: app.env.uptime() + TAKES_MAX, minds_silence: false }
}

/// The patience with the signature of an event that nobody waits for.
fn unasked(app: &App) -> Patience {
    Patience { until: app.env.uptime() + UNASKED_TAKES_MAX, minds_silence: true }
}

/// Changes a room as [`commit::in_room`] does. `work` is done anew where an event that it adds had to be signed, so that nothing
/// of it may reach beyond the change.
pub(crate) async fn in_room<T: Send + 'static>(
    app: &App,
    room: RoomNum,
    work: impl FnOnce(&mut Change) -> Result<T> + Clone + Send + 'static,
) -> Result<T> {
    in_room_with(app, room, asked(app), work).await
}

/// Like [`in_room`], for events that nobody waits for. Errors: [`Error::Remote`] wherever the policy server is to be asked later.
pub(crate) async fn in_room_unasked<T: Send + 'static>(
    app: &App,
    room: RoomNum,
    work: impl FnOnce(&mut Change) -> Result<T> + Clone + Send + 'static,
) -> Result<T> {
    in_room_with(app, room, unasked(app), work).await
}

async fn in_room_with<T: Send + 'static>(
    app: &App,
    room: RoomNum,
    patience: Patience,
    work: impl FnOnce(&mut Change) -> Result<T> + Clone + Send + 'static,
) -> Result<T> {
    let begin = move |app: &App, seat: Seat| Change::begin(&app.store, seat, room);
    in_rounds(app, room, patience, Vec::new(), begin, |change, _| work(change)).await
}

/// Changes a room under the lock of a user of ours besides, and otherwise like [`in_room`]: `work` may write rows of that user.
pub(crate) async fn in_room_and_user<T: Send + 'static>(
    app: &App,
    room: RoomNum,
    user: UserNum,
    work: impl FnOnce(&mut Change) -> Result<T> + Clone + Send + 'static,
) -> Result<T> {
    in_room_and_user_with(app, room, user, asked(app), work).await
}

/// Like [`in_room_and_user`], for events that nobody waits for. Errors: [`Error::Remote`] wherever the policy server is to be asked later.
pub(crate) async fn in_room_and_user_unasked<T: Send + 'static>(
    app: &App,
    room: RoomNum,
    user: UserNum,
    work: impl FnOnce(&mut Change) -> Result<T> + Clone + Send + 'static,
) -> Result<T> {
    in_room_and_user_with(app, room, user, unasked(app), work).await
}

async fn in_room_and_user_with<T: Send + 'static>(
    app: &App,
    room: RoomNum,
    user: UserNum,
    patience: Patience,
    work: impl FnOnce(&mut Change) -> Result<T> + Clone + Send + 'static,
) -> Result<T> {
    let begin = move |app: &App, seat: Seat| Change::begin(&app.store, seat, room);
    let work = move |change: &mut Change, server: &mut ServerLock<'_>| {
        server.take_user(change, user);
        work(change)
    };
    in_rounds(app, room, patience, Vec::new(), begin, work).await
}

/// Changes a room as [`commit::in_room_and_server`] does, and otherwise like [`in_room`]. Where `work` adds an event that says the same as
/// one of those that were `built` ahead, that one is added.
pub(crate) async fn in_room_and_server<T: Send + 'static>(
    app: &App,
    room: RoomNum,
    built: Vec<Countersigned>,
    work: impl FnOnce(&mut Change) -> Result<T> + Clone + Send + 'static,
) -> Result<T> {
    let begin = move |app: &App, seat: Seat| Change::begin_beside(&app.store, seat, room);
    let work = |change: &mut Change, server: &mut ServerLock<'_>| {
        server.take(change);
        work(change)
    };
    in_rounds(app, room, asked(app), built, begin, work).await
}

async fn in_rounds<T: Send + 'static>(
    app: &App,
    room: RoomNum,
    patience: Patience,
    mut built: Vec<Countersigned>,
    begin: impl FnOnce(&App, Seat) -> Result<Change> + Clone + Send + 'static,
    work: impl FnOnce(&mut Change, &mut ServerLock<'_>) -> Result<T> + Clone + Send + 'static,
) -> Result<T> {
    let turns = app.rooms.turns(room);
    let mut place = None;
    for _ in 0..ROUNDS_MAX {
        let lacking: Arc<Mutex<Option<Unsigned>>> = Arc::default();
        let (owned, tell, given, work) = (app.clone(), Arc::clone(&lacking), built.clone(), work.clone());
        let turn = move |change: &mut Change, server: &mut ServerLock<'_>| {
            change.bring_signed(given, owned.rooms.shared_resolver());
            let answer = work(change, server);
            *tell.lock() = change.take_unsigned();
            answer
        };
        let answer = commit::in_turn(app, room, begin.clone(), turn, Error::from).await;
        let unsigned = match (answer, lacking.lock().take()) {
            (Err(Error::Busy { .. }), Some(unsigned)) => unsigned,
            (answer, _) => return answer,
        };
        let server = unsigned.server.clone();
        // The futures are large, and lie in the heap, so that whoever waits for them stays small on the stack.
        let signing = Box::pin(sign(app, &turns.signing, &mut place, unsigned, patience));
        let given = match patience.minds_silence {
            true => Box::pin(policy_server::wait_unasked(app, &server, signing)).await?,
            false => signing.await?,
        };
        built.extend(given);
    }
    tracing::debug!(%room, "an event is not sent: its room went on too fast for its policy server");
    Err(Error::Busy { retry_after: AGAIN })
}

/// Has an event signed, in a place of its room. `None` where such a place had to be waited for, so that the event is to be built anew: on the
/// room's heads of before, it would stand beside all that others have signed meanwhile.
async fn sign<'a>(
    app: &App,
    places: &'a Semaphore,
    place: &mut Option<SemaphorePermit<'a>>,
    unsigned: Unsigned,
    patience: Patience,
) -> Result<Option<Countersigned>> {
    if place.is_none() {
        *place = places.try_acquire().ok();
    }
    if place.is_none() {
        *place = Some(wait_for_place(app, places, patience).await?);
        return Ok(None);
    }
    match policy_server::sign_own(app, unsigned.clone(), patience).await {
        Ok(given) => Ok(Some(given)),
        Err(why) => unsigned.without().ok_or(why).map(Some),
    }
}

async fn wait_for_place<'a>(
    app: &App,
    places: &'a Semaphore,
    patience: Patience,
) -> Result<SemaphorePermit<'a>> {
    let left = patience.until.saturating_sub(app.env.uptime());
    tokio::select! {
        biased;
        place = places.acquire() => place.map_err(|_| app.broke_off("an event")),
        () = app.env.sleep(left) => Err(Error::Busy { retry_after: AGAIN }),
    }
}

/// Has an event signed that is not added by the change that built it, because others must sign it, too.
pub(crate) async fn countersign(app: &App, room: RoomNum, unsigned: Unsigned) -> Result<Received> {
    Ok(sign_aside(app, room, unsigned).await?.into_event())
}

/// Builds an event that [`in_room_and_server`] is to add later, so that its id is known before. Nothing is written.
pub(crate) async fn build_ahead(
    app: &App,
    room: RoomNum,
    work: impl FnOnce(&mut Change) -> Result<(Countersigned, Option<Unsigned>)> + Send + 'static,
) -> Result<Countersigned> {
    match commit::in_room(app, room, work).await? {
        (built, None) => Ok(built),
        (_, Some(unsigned)) => sign_aside(app, room, unsigned).await,
    }
}

/// Has an event signed in a place of its room, which is not built anew.
async fn sign_aside(app: &App, room: RoomNum, unsigned: Unsigned) -> Result<Countersigned> {
    let patience = asked(app);
    let turns = app.rooms.turns(room);
    let _place = wait_for_place(app, &turns.signing, patience).await?;
    policy_server::sign_own(app, unsigned, patience).await
}
