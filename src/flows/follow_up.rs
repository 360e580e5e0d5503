//! The work of each kind of job. `flows/jobs.rs` begins it: at once for the flow that promised the job, or when its timer is due.

use std::time::Duration;

use futures_util::future::BoxFuture;

use crate::{
    accounts::users,
    error::{Error, Result},
    flows::{
        App,
        account::{carry_over, log_out},
        commit,
        jobs::{self, cancel, come_back, unless_fired},
        media, membership,
        remote::{cut_off, late, left_out, payers, rest_of_state},
        room::{
            delayed, expire,
            ingest::{reunite, sticky, sweep},
            membership as here, names, presence, upgrade,
        },
    },
    ids::{EventNum, RoomNum, UserNum},
    rooms::{change::txn, graph, redact},
    schema::jobs::{Job, Left},
    store::{
        Guard, tail,
        timer::{self, Timer},
    },
};

/// The log is trimmed again after this many milliseconds when nothing is left to trim.
const TRIM_AGAIN_MS: u64 = 60 * 60 * 1000;
/// The end of an invitation that the log still names is forgotten after this many milliseconds more.
const FORGET_AGAIN_MS: u64 = 24 * 60 * 60 * 1000;

/// Carries out the work of a job, and deletes its timer.
pub fn carry_out(app: App, timer: Timer) -> BoxFuture<'static, Result<()>> {
    Box::pin(async move { carry_out_of_kind(&app, &timer).await })
}

async fn carry_out_of_kind(app: &App, timer: &Timer) -> Result<()> {
    match Job::read(timer)? {
        Job::TrimLog => trim_log(app, timer.clone()).await,
        Job::TellRooms { user } => tell_rooms(app, user, timer).await,
        Job::CarryOver { user, moved, .. } => {
            names::follow(app, &moved).await?;
            carry_over::carry_over(app, user, moved, timer.clone()).await
        }
        Job::ForgetOriginal { room, event } => forget_original(app, room, event, timer.clone()).await,
        Job::ForgetSent { room, day } => forget_sent(app, room, day, timer.clone()).await,
        Job::Reunite { room } => reunite_branches(app, room, timer).await,
        Job::Sweep { room } => sweep_room(app, room, timer).await,
        Job::TendSticky { room } => sticky::tend(app, room, timer.clone()).await,
        Job::SendDelayed { user } => delayed::attend(app, user, timer.clone()).await,
        Job::Expire { room } => expire_messages(app, room, timer).await,
        Job::MoveNames { from, to } => move_names(app, from, to, timer).await,
        Job::CompleteState { room } => {
            elsewhere(app, room, timer, Box::pin(complete_state(app, room, timer))).await
        }
        Job::TakeLeftOut { room } => {
            elsewhere(app, room, timer, Box::pin(take_left_out(app, room, timer))).await
        }
        Job::TendBlob { digest, generation } => {
            media::tend::tend_blob(app, (digest, generation), timer).await
        }
        Job::EndUnused { user, id } => media::tend::end_unused(app, user, id, timer).await,
        Job::EndLink { user, id } => media::link::end(app, user, id, timer).await,
        Job::ForgetMedia { user } => media::tend::forget_all(app, user, timer).await,
        Job::TendMedia { after } => media::tend::tend_media(app, after, timer).await,
        Job::LeaveAgain { user, left } => leave_again(app, user, left, timer).await,
        Job::EndJoin { user, left } => cut_off::attend(app, user, left, timer).await,
        Job::ForgetEnded { room, user, number } => forget_ended(app, room, (user, number), timer).await,
        Job::AbandonRoom { user, room } => abandon_room(app, user, room, timer.clone()).await,
        Job::SweepDevices { user } => {
            log_out::sweep(app, user).await?;
            cancel(app, timer)
        }
    }
}

/// Sets the timer that trims the log, unless it is set already. From then on it sets itself again each time.
pub(crate) fn begin_trimming(app: &App) -> Result<()> {
    if timer::is_set(&app.store.view(), Job::TrimLog.kind())? {
        return Ok(());
    }
    let mut batch = app.store.batch(&Guard::own_tables());
    timer::set(&mut batch, &Job::TrimLog.timer(app.env.now_ms()));
    drop(app.store.enqueue(batch)?);
    Ok(())
}

async fn trim_log(app: &App, timer: Timer) -> Result<()> {
    let worker = app.clone();
    let trim = move || {
        let now_ms = worker.env.now_ms();
        // If there may be more to trim, the timer is due again at the next look.
        let (mut batch, again_ms) = match tail::trim(&worker.store, now_ms)? {
            Some(batch) => (batch, now_ms + 1),
            None => (worker.store.batch(&Guard::own_tables()), now_ms + TRIM_AGAIN_MS),
        };
        if timer::fire(&mut batch, &timer)? {
            timer::set(&mut batch, &Job::TrimLog.timer(again_ms));
            unless_fired(worker.store.enqueue(batch))?;
        }
        Ok(())
    };
    app.env.blocking(trim).await
}

/// Writes a change of a user into all their rooms: a new profile, or that the account has ended. A new profile is told with the
/// user's presence besides.
async fn tell_rooms(app: &App, user: UserNum, timer: &Timer) -> Result<()> {
    if users::require(&*app.store.snapshot(), user)?.is_deactivated {
        membership::leave_all(app, user).await?;
    } else {
        here::renew_profile(app, user).await?;
        presence::tell_profile(app, user).await?;
    }
    cancel(app, timer)
}

/// Leaves a room again if a join has come true that its user gave up, and looks again later as long as one may.
async fn leave_again(app: &App, user: UserNum, left: Left, timer: &Timer) -> Result<()> {
    match late::attend(app, user, left).await? {
        Some((job, due_ms)) => come_back(app, timer, &job, due_ms),
        None => cancel(app, timer),
    }
}

/// Has a user leave a room that was to replace another one. The timer goes first: whoever takes it away decides what becomes of the room.
async fn abandon_room(app: &App, user: UserNum, room: RoomNum, timer: Timer) -> Result<()> {
    let owned = app.clone();
    let claim = move || {
        let mut batch = owned.store.batch(&Guard::own_tables());
        let is_ours = timer::fire(&mut batch, &timer)?;
        unless_fired(owned.store.enqueue(batch))?;
        Ok(is_ours)
    };
    if app.env.blocking(claim).await? {
        upgrade::abandon(app, user, room).await?;
    }
    Ok(())
}

/// Reunites the branches of a room that stand apart, as after a restart nobody else does. As long as some still do, it looks again
/// later.
async fn reunite_branches(app: &App, room: RoomNum, timer: &Timer) -> Result<()> {
    if reunite::stands_apart(app, room)? {
        reunite::when_due(app, room).await;
    }
    if !reunite::stands_apart(app, room)? {
        return cancel(app, timer);
    }
    come_back(app, timer, &Job::Reunite { room }, graph::reunion_due_ms(app.env.now_ms()))
}

/// Does a job that waits for other servers, in a place for that. Those who share in the bounds of such work are the user of ours who came into the
/// room first, and the server that let them in.
async fn elsewhere(
    app: &App,
    room: RoomNum,
    timer: &Timer,
    work: impl Future<Output = Result<()>>,
) -> Result<()> {
    let owned = app.clone();
    let payers = app.env.blocking(move || Ok(payers::of_room(&owned.store.snapshot(), room)?)).await?;
    jobs::do_elsewhere(app, timer, payers, work).await
}

/// Fetches the rest of a room's state and makes it whole. A room that nobody of ours is in any more stays as it is.
async fn complete_state(app: &App, room: RoomNum, timer: &Timer) -> Result<()> {
    let completing = rest_of_state::complete(app, room, timer);
    match app.stopping.run_until_cancelled(completing).await {
        None | Some(Ok(true)) => Ok(()),
        Some(Ok(false)) => cancel(app, timer),
        Some(Err(why)) => Err(why),
    }
}

/// Tries the events again that a join left out, and later once more as long as some are left.
async fn take_left_out(app: &App, room: RoomNum, timer: &Timer) -> Result<()> {
    let Some(pause) = left_out::try_again(app, room).await? else { return cancel(app, timer) };
    come_back(app, timer, &Job::TakeLeftOut { room }, after(app, pause))
}

/// Sweeps a room, or looks again later if it was just swept or is being swept.
async fn sweep_room(app: &App, room: RoomNum, timer: &Timer) -> Result<()> {
    let Some(pause) = sweep::now_or_later(app, room).await? else { return cancel(app, timer) };
    come_back(app, timer, &Job::Sweep { room }, after(app, pause))
}

/// Deletes the content of a room's messages whose lifetime is over. The last turn sets the timer for the next ones.
async fn expire_messages(app: &App, room: RoomNum, timer: &Timer) -> Result<()> {
    if expire::expire(app, room, timer).await? { Ok(()) } else { cancel(app, timer) }
}

/// Moves aliases of a room that was replaced, and goes on right away where they are very many, after others who wait.
async fn move_names(app: &App, from: RoomNum, to: RoomNum, timer: &Timer) -> Result<()> {
    if names::move_rest(app, from, to, timer).await? {
        return Ok(());
    }
    come_back(app, timer, &Job::MoveNames { from, to }, app.env.now_ms())
}

/// The time after a pause: milliseconds since the epoch.
fn after(app: &App, pause: Duration) -> u64 {
    let pause_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
    app.env.now_ms().saturating_add(pause_ms)
}

/// Deletes the original content of a redacted event, in a turn of its room.
async fn forget_original(app: &App, room: RoomNum, event: EventNum, timer: Timer) -> Result<()> {
    commit::beside_room(app, room, move |change| {
        if timer::fire(&mut change.batch, &timer)? {
            redact::forget_original(&mut change.batch, room, event);
        }
        Ok(())
    })
    .await
}

/// Forgets that others ended an invitation or a knock, in a turn of its room, or later where the log still names that.
async fn forget_ended(
    app: &App,
    room: RoomNum,
    (user, number): (UserNum, EventNum),
    timer: &Timer,
) -> Result<()> {
    let owned = timer.clone();
    let forgotten = commit::beside_room(app, room, move |change| {
        let is_forgotten = change.forget_ended(user, number)?;
        if is_forgotten {
            timer::cancel(&mut change.batch, &owned);
        }
        Ok(is_forgotten)
    });
    match forgotten.await {
        Ok(true) => Ok(()),
        Ok(false) => {
            let due_ms = app.env.now_ms().saturating_add(FORGET_AGAIN_MS);
            come_back(app, timer, &Job::ForgetEnded { room, user, number }, due_ms)
        }
        // The room is gone.
        Err(Error::Refused(_)) => cancel(app, timer),
        Err(why) => Err(why),
    }
}

/// Deletes the transaction ids of one day with which events were sent to a room, in a turn of the room.
async fn forget_sent(app: &App, room: RoomNum, day: u32, timer: Timer) -> Result<()> {
    commit::beside_room(app, room, move |change| {
        if timer::fire(&mut change.batch, &timer)? {
            txn::forget(change, day);
        }
        Ok(())
    })
    .await
}
