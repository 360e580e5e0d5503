//! What a user's rooms must be told after the user's own change: a new name, or that the account is gone. The batch of the
//! change sets a timer; should the process end between two rooms, the timer sees to it that the others are told.

use ruma::OwnedUserId;
use tokio::sync::oneshot;

use crate::{
    accounts::users,
    error::{Error, Result},
    flows::{App, room::membership},
    ids::UserNum,
    store::{
        Batch, NotAccepted, Store,
        timer::{self, Timer, TimerKind},
    },
};

/// The one who made the change has so long to tell the rooms before the timer does it too, in milliseconds. Doing it twice
/// does no harm.
const OWN_WORK_MS: u64 = 2 * 60 * 1000;
/// When a timer's own work did not come to an end, it is done again after so long, in milliseconds.
const AGAIN_MS: u64 = 10 * 60 * 1000;

/// Promises, in the batch of the change, that the rooms will be told.
pub(crate) fn promise(app: &App, batch: &mut Batch, user: UserNum) -> Timer {
    let timer = told_by(app.env.now_ms() + OWN_WORK_MS, user);
    timer::set(batch, &timer);
    timer
}

fn told_by(due_ms: u64, user: UserNum) -> Timer {
    let key = user.0.to_be_bytes().to_vec();
    Timer { due_ms, kind: TimerKind::TellRooms, key, content: bytes::Bytes::new() }
}

/// Keeps the promise: tells the rooms, and waits for it. A task of its own, so that a client that goes away does not stop it
/// between two rooms.
pub(crate) async fn keep(app: &App, user: UserNum, promised: Timer) -> Result<()> {
    let (done, told) = oneshot::channel();
    let house = app.clone();
    app.env.spawn(async move {
        drop(done.send(tell(&house, user, &promised).await));
    });
    told.await.map_err(|_| Error::broken("the server stops"))?
}

async fn tell(app: &App, user: UserNum, promised: &Timer) -> Result<()> {
    let row = users::require(&*app.store.snapshot(), user)?;
    let user_id =
        OwnedUserId::try_from(row.user_id).map_err(|_| Error::broken("an account has no valid user id"))?;
    if row.is_deactivated {
        membership::leave_all(app, user, &user_id).await?;
    } else {
        membership::renew_profile(app, user, &user_id).await?;
    }
    let mut batch = app.store.batch();
    timer::cancel(&mut batch, promised);
    // A note: if it gets lost, the rooms are told again, which changes nothing.
    drop(app.store.enqueue(batch));
    Ok(())
}

/// A promise is due that whoever made it did not keep.
pub(crate) fn resume(app: &App, promised: &Timer) -> Result<()> {
    let Ok(key) = <[u8; 8]>::try_from(promised.key.as_slice()) else {
        return Err(Error::broken("a timer names no user"));
    };
    let user = UserNum(u64::from_be_bytes(key));
    let Some(again) = postpone(&app.store, promised, user, app.env.now_ms())? else { return Ok(()) };
    let house = app.clone();
    app.env.spawn(async move {
        if let Err(error) = tell(&house, user, &again).await {
            tracing::warn!(%error, %user, "a user's rooms could not be told of a change; it is tried again");
        }
    });
    Ok(())
}

/// Moves the promise on; none if somebody else did.
fn postpone(store: &Store, promised: &Timer, user: UserNum, now_ms: u64) -> Result<Option<Timer>> {
    let again = told_by(now_ms + AGAIN_MS, user);
    let mut batch = store.batch();
    timer::fire(&mut batch, promised);
    timer::set(&mut batch, &again);
    match store.enqueue(batch) {
        Ok(_) => Ok(Some(again)),
        Err(NotAccepted::Conflict(_)) => Ok(None),
        Err(other) => Err(other.into()),
    }
}
