//! A [`Job`] follows its cause for certain: it is written as a timer in the batch of its cause, and whoever made that batch carries it
//! out right away. Should that fail, or the process end in between, the timer does it again, later each time.
//!
//! A job acts once because the batch of its effect deletes its timer, or because doing it twice changes nothing.

use std::{collections::BTreeSet, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use crate::{
    accounts::users,
    error::{Error, Result},
    flows::{
        App,
        account::{carry_over, log_out},
        commit,
        room::membership,
    },
    ids::{EventNum, RoomNum, UserNum},
    rooms::{change::txn, redact},
    schema::jobs::Job,
    store::{
        Batch, Enqueued, Guard, NotAccepted, tail,
        timer::{self, Timer, TimerRow},
    },
};

/// The one who made the cause has this long to carry the job out before the timer does it, in milliseconds.
const OWN_WORK_MS: u64 = 2 * 60 * 1000;
/// A job that failed is tried again after this long, in milliseconds, and after twice as long each time ..
const AGAIN_MS: u64 = 10_000;
/// .. but after this long at most.
const AGAIN_MS_MAX: u64 = 6 * 60 * 60 * 1000;
/// The log is trimmed again after this long, in milliseconds, when nothing is left to trim.
const TRIM_AGAIN_MS: u64 = 60 * 60 * 1000;
/// Jobs that timers carry out at once: one that takes long holds nobody up.
const RUNNING_MAX: usize = 64;

/// A job that runs is known by the kind and the key of its timer.
type Name = (u8, Vec<u8>);

/// The jobs that are being carried out now. Cheap to clone.
#[derive(Clone, Default)]
pub struct Running(Arc<Jobs>);

#[derive(Default)]
struct Jobs {
    names: Mutex<BTreeSet<Name>>,
    /// Tells that one is over.
    ended: Notify,
}

/// A job that is being carried out; it is over when this is dropped.
struct Run {
    running: Running,
    name: Name,
}

impl Running {
    /// Marks a job as being carried out. None if it is already.
    fn begin(&self, timer: &Timer) -> Option<Run> {
        let name = (timer.kind, timer.key.clone());
        self.0.names.lock().insert(name.clone()).then(|| Run { running: self.clone(), name })
    }

    fn is_full(&self) -> bool {
        self.0.names.lock().len() >= RUNNING_MAX
    }

    /// Resolves when a job is over, or was since this last resolved.
    pub(crate) async fn ended(&self) {
        self.0.ended.notified().await;
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.running.0.names.lock().remove(&self.name);
        self.running.0.ended.notify_one();
    }
}

/// Promises, in the batch of its cause, that a job will be carried out.
pub(crate) fn promise(app: &App, batch: &mut Batch, job: &Job) -> Timer {
    let timer = job.timer(app.env.now_ms() + OWN_WORK_MS);
    timer::set(batch, &timer);
    timer
}

/// Carries out what was promised, and waits for it. It is a task of its own, so that a client that goes away does not stop it
/// half way.
pub(crate) async fn keep(app: &App, promised: Timer) -> Result<()> {
    let (done, kept) = oneshot::channel();
    let worker = app.clone();
    app.env.spawn(async move {
        let _run = worker.running.begin(&promised);
        drop(done.send(carry_out(&worker, &promised).await));
    });
    kept.await.map_err(|_| Error::broken("the server stops"))?
}

/// Carries out what was promised, and nobody waits for it.
pub(crate) fn begin(app: &App, promised: Timer) {
    if let Some(run) = app.running.begin(&promised) {
        carry_out_due(app, promised, run);
    }
}

/// The outcome of a look at the timers.
pub(crate) struct Looked {
    /// How many jobs were begun.
    pub(crate) begun: usize,
    /// Others are due and wait, because as many run as may.
    pub(crate) is_full: bool,
    /// When the next timer is due, in milliseconds since the epoch.
    pub(crate) next_ms: Option<u64>,
}

/// Begins what is due, at most this many jobs.
pub(crate) fn begin_due(app: &App, now_ms: u64, jobs_max: usize) -> Result<Looked> {
    let view = app.store.view();
    let (mut begun, mut is_full) = (0, false);
    // The timers of jobs that run are still there.
    for due in timer::list_due(&view, now_ms, jobs_max + RUNNING_MAX, Job::is_known)? {
        is_full = app.running.is_full();
        if is_full || begun >= jobs_max {
            tracing::debug!(begun, is_full, "jobs that are due wait for others to end");
            break;
        }
        if let Some(run) = app.running.begin(&due) {
            begun += 1;
            carry_out_due(app, due, run);
        }
    }
    Ok(Looked { begun, is_full, next_ms: timer::find_next_due_ms(&view, Job::is_known)? })
}

/// Carries a job out for which nobody waits. One that fails is put off, so that it holds no other up.
fn carry_out_due(app: &App, due: Timer, run: Run) {
    let worker = app.clone();
    app.env.spawn(async move {
        if let Err(error) = carry_out(&worker, &due).await {
            tracing::warn!(%error, kind = due.kind, tries = due.row.tries, "a job failed; it is tried again later");
            let (puts_off, kind) = (worker.clone(), due.kind);
            if let Err(error) = worker.env.blocking(move || put_off(&puts_off, &due)).await {
                tracing::error!(%error, kind, "a job that failed could not be put off");
            }
        }
        drop(run);
    });
}

/// Sets a job's timer anew, later the more often it has failed.
fn put_off(app: &App, failed: &Timer) -> Result<()> {
    let tries = failed.row.tries.saturating_add(1);
    let wait_ms = AGAIN_MS.saturating_mul(1 << failed.row.tries.min(20)).min(AGAIN_MS_MAX);
    let row = TimerRow { tries, content: failed.row.content.clone() };
    let later = Timer { due_ms: app.env.now_ms() + wait_ms, row, ..failed.clone() };
    let mut batch = app.store.batch(&Guard::own_tables());
    if timer::fire(&mut batch, failed)? {
        timer::set(&mut batch, &later);
        unless_fired(app.store.enqueue(batch))?;
    }
    Ok(())
}

/// Somebody else may have fired the timer: then there is nothing left to do.
fn unless_fired(enqueued: Result<Enqueued, NotAccepted>) -> Result<()> {
    match enqueued {
        Ok(_) | Err(NotAccepted::Conflict(_)) => Ok(()),
        Err(other) => Err(other.into()),
    }
}

/// Does what a job asks for.
async fn carry_out(app: &App, timer: &Timer) -> Result<()> {
    match Job::read(timer)? {
        Job::TrimLog => trim_log(app, timer.clone()).await,
        Job::TellRooms { user } => tell_rooms(app, user, timer).await,
        Job::CarryOver { user, moved, .. } => carry_over::carry_over(app, user, moved, timer.clone()).await,
        Job::ForgetOriginal { room, event } => forget_original(app, room, event, timer.clone()).await,
        Job::ForgetSent { room, day } => forget_sent(app, room, day, timer.clone()).await,
        Job::SweepDevices { user } => {
            log_out::sweep(app, user).await?;
            cancel(app, timer)
        }
    }
}

/// Sets the timer that trims the log, unless it is set: it sets itself again for ever.
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
        // More to trim: again at the next look.
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

/// Tells the rooms of a user of a change of the user's own: a new name, or that the account is gone.
async fn tell_rooms(app: &App, user: UserNum, timer: &Timer) -> Result<()> {
    if users::require(&*app.store.snapshot(), user)?.is_deactivated {
        membership::leave_all(app, user).await?;
    } else {
        membership::renew_profile(app, user).await?;
    }
    cancel(app, timer)
}

/// Takes the timer of a job back that changes nothing when it is done again, should this note get lost.
fn cancel(app: &App, timer: &Timer) -> Result<()> {
    let mut note = app.store.note(&Guard::own_tables());
    timer::cancel(&mut note, timer);
    drop(app.store.enqueue_note(note)?);
    Ok(())
}

/// Forgets what an event said before it was redacted, in a turn of its room.
async fn forget_original(app: &App, room: RoomNum, event: EventNum, timer: Timer) -> Result<()> {
    commit::in_room(app, room, move |change| {
        if timer::fire(&mut change.batch, &timer)? {
            redact::forget_original(&mut change.batch, room, event);
        }
        Ok(())
    })
    .await
}

/// Forgets which transactions sent what to a room on a day, in a turn of the room.
async fn forget_sent(app: &App, room: RoomNum, day: u32, timer: Timer) -> Result<()> {
    commit::in_room(app, room, move |change| {
        if timer::fire(&mut change.batch, &timer)? {
            txn::forget(&mut change.batch, room, day);
        }
        Ok(())
    })
    .await
}
