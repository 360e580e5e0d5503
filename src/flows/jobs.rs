//! A [`Job`] is work that must follow its cause. It is written as a timer in the batch of its cause, and the flow that made the
//! batch carries it out right away. If that fails, or the process ends in between, the timer starts it again, later each time, until it
//! has failed for more than a week.
//!
//! A job has its effect once, because the batch of the effect deletes the timer, or because a repetition changes nothing. The
//! work itself is told to [`Running`] when the server starts, because flows that promise jobs are used by that work.
//!
//! Jobs that are due share a bounded number of places. What is to be done here is done in a place; whatever waits for another server
//! gives it up meanwhile ([`rest`]), or has none ([`do_elsewhere`]), so that nobody who is slow holds a place that others need.

mod line;
#[cfg(test)]
mod tests;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::{
    env::payer::{Payer, Payers},
    error::{Error, Result},
    flows::{
        App,
        jobs::line::{Held, Line},
        lanes::{Lanes, NoPlace, Pace},
    },
    schema::jobs::{Job, Owner},
    store::{
        Batch, Enqueued, Guard, NotAccepted,
        timer::{self, Timer, TimerRow},
    },
};

/// The flow that promised a job has this many milliseconds to carry it out before the timer starts it.
const OWN_WORK_MS: u64 = 2 * 60 * 1000;
/// A job that failed is tried again after this many milliseconds, and after twice as many each further time.
const AGAIN_MS: u64 = 10_000;
/// A job that failed is tried again after at most this many milliseconds, however often it failed.
const AGAIN_MS_MAX: u64 = 6 * 60 * 60 * 1000;
/// A job that failed this often is given up: what fails for more than a week will not succeed.
const TRIES_MAX: u32 = 40;
/// A look at the timers goes through at most this many that are due, and chooses among them.
const SEEN_MAX: usize = 10_000;
/// At most this many jobs that are looked up at the start begin at once.
const BEGUN_AT_START_MAX: usize = 64;
/// At most this many jobs that wait for other servers run at once, beside those that stay here, until it is known that they are slow.
const QUICK_ELSEWHERE_MAX: usize = 24;
/// It takes at least this many users, and as many other servers, to have as many run.
const ELSEWHERE_PAYERS_MIN: usize = 8;
/// At most this many that are slow wait for other servers, besides.
const SLOW_ELSEWHERE_MAX: usize = 40;
/// A job that was slow and had to make room is tried again after this time at the earliest.
const GAVE_WAY_AGAIN: Duration = Duration::from_secs(10);
/// A job that finds no place for waiting comes back after this time.
const PLACE_AGAIN: Duration = Duration::from_secs(20);

/// The name of a running job: the kind and the key of its timer.
type Name = (u8, Vec<u8>);

/// The jobs that are being carried out now; clones of this share them.
#[derive(Clone)]
pub struct Running(Arc<Jobs>);

/// Carries out the work of a job, and deletes its timer.
pub type CarryOut = fn(App, Timer) -> BoxFuture<'static, Result<()>>;

struct Jobs {
    /// Knows the work of every kind of job.
    carry_out: CarryOut,
    /// The jobs that run, without those that wait for other servers.
    here: Mutex<Held>,
    /// The jobs that wait for other servers, or are about to.
    elsewhere: Mutex<BTreeSet<Name>>,
    elsewhere_lanes: Lanes,
    /// Notified whenever a job is over, or gives up its place.
    ended: Notify,
}

tokio::task_local! {
    /// The job that the current task carries out because it is due.
    static DUE: Place;
}

/// The place of a job.
struct Place {
    running: Running,
    name: Name,
}

/// A job that has given up its place, which it gets again when this is dropped.
pub(crate) struct Resting {
    running: Running,
    name: Name,
    owner: Owner,
}

/// Gives up the place of the job that the current task carries out, as long as it waits for another server; nothing happens where it
/// holds none.
pub(crate) fn rest() -> Option<Resting> {
    DUE.try_with(Place::rest).ok().flatten()
}

impl Place {
    fn rest(&self) -> Option<Resting> {
        let (running, name) = (self.running.clone(), self.name.clone());
        let owner = running.0.here.lock().rest(&name)?;
        running.0.ended.notify_one();
        Some(Resting { running, name, owner })
    }
}

impl Drop for Resting {
    fn drop(&mut self) {
        self.running.0.here.lock().go_on(&self.name, self.owner);
    }
}

/// A job that is being carried out. Dropping this marks it as over.
struct Run {
    running: Running,
    name: Name,
}

impl Running {
    /// No job runs yet; `carry_out` will carry out those that do.
    pub fn new(carry_out: CarryOut) -> Self {
        Self(Arc::new(Jobs {
            carry_out,
            here: Mutex::default(),
            elsewhere: Mutex::default(),
            elsewhere_lanes: Lanes::new((QUICK_ELSEWHERE_MAX, ELSEWHERE_PAYERS_MIN), SLOW_ELSEWHERE_MAX),
            ended: Notify::default(),
        }))
    }

    /// Marks a job as being carried out for the flow that promised it. Answers none if it is being carried out already.
    fn begin(&self, timer: &Timer) -> Option<Run> {
        let name = name_of(timer);
        let is_new = if Job::waits_for_others(timer.kind) {
            self.0.elsewhere.lock().insert(name.clone())
        } else {
            self.0.here.lock().begin(name.clone())
        };
        is_new.then(|| Run { running: self.clone(), name })
    }

    /// Marks a job as being carried out because it is due, if its kind and its owner have a place. Those that wait for other servers
    /// are put aside later where there is none for them.
    fn begin_in_place(&self, timer: &Timer, owner: Owner) -> Begun {
        if Job::waits_for_others(timer.kind) {
            return self.begin(timer).map_or(Begun::RunsAlready, Begun::Run);
        }
        let name = name_of(timer);
        match self.0.here.lock().begin_in_place(name.clone(), owner) {
            Some(true) => Begun::Run(Run { running: self.clone(), name }),
            Some(false) => Begun::NoPlace,
            None => Begun::RunsAlready,
        }
    }

    fn is_running(&self, timer: &Timer) -> bool {
        let name = name_of(timer);
        if Job::waits_for_others(timer.kind) {
            self.0.elsewhere.lock().contains(&name)
        } else {
            self.0.here.lock().contains(&name)
        }
    }

    fn carry_out(&self, app: &App, timer: &Timer) -> BoxFuture<'static, Result<()>> {
        (self.0.carry_out)(app.clone(), timer.clone())
    }

    /// Resolves when a job is over or gives up its place, or did since this last resolved.
    pub(crate) async fn ended(&self) {
        self.0.ended.notified().await;
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let jobs = &self.running.0;
        if Job::waits_for_others(self.name.0) {
            jobs.elsewhere.lock().remove(&self.name);
        } else {
            jobs.here.lock().end(&self.name);
        }
        jobs.ended.notify_one();
    }
}

/// The outcome of trying to begin a job that is due.
enum Begun {
    /// It runs from now on.
    Run(Run),
    /// It must wait for a place.
    NoPlace,
    /// It is being carried out already.
    RunsAlready,
}

fn name_of(timer: &Timer) -> Name {
    (timer.kind, timer.key.clone())
}

/// Promises, in the batch of its cause, that a job will be carried out.
pub(crate) fn promise(app: &App, batch: &mut Batch, job: &Job) -> Timer {
    let timer = job.timer(app.env.now_ms() + OWN_WORK_MS);
    timer::set(batch, &timer);
    timer
}

/// Carries out a promised job, and waits for it; nothing happens where none was promised. The job is a task of its own, so that a
/// client that hangs up does not stop it half way. One that another server holds up is no error: its timer has it tried again.
pub(crate) async fn keep(app: &App, promised: Option<Timer>) -> Result<()> {
    let Some(promised) = promised else { return Ok(()) };
    let worker = app.clone();
    let work = async move {
        let _run = worker.running.begin(&promised);
        worker.running.carry_out(&worker, &promised).await
    };
    match app.to_the_end("a job", work).await {
        Err(why @ Error::Remote { .. }) => {
            tracing::info!(%why, "a job is tried again later, because another server holds it up");
            Ok(())
        }
        other => other,
    }
}

/// Begins to carry out a promised job without waiting for it; nothing happens where none was promised.
pub(crate) fn begin(app: &App, promised: Option<Timer>) {
    if let Some(promised) = promised
        && let Some(run) = app.running.begin(&promised)
    {
        carry_out_due(app, promised, run);
    }
}

/// Begins the jobs of one kind that are promised, due or not. It is one that waits for other servers, which has places of its own.
pub(crate) fn begin_of_kind(app: &App, kind: u8) -> Result<()> {
    debug_assert!(Job::waits_for_others(kind), "only such jobs are put aside where there is no place");
    for promised in timer::list_due(&app.store.view(), u64::MAX, BEGUN_AT_START_MAX, |of| of == kind)? {
        begin(app, Some(promised));
    }
    Ok(())
}

/// The outcome of a look at the timers.
pub(crate) struct Due {
    /// The jobs that are due and have not begun yet.
    line: Line,
    /// The time at which the first timer is due, in milliseconds since the epoch.
    pub(crate) next_ms: Option<u64>,
}

impl Due {
    /// Whether all of them have begun.
    pub(crate) fn is_empty(&self) -> bool {
        self.line.is_empty()
    }
}

/// Lists jobs whose timers are due, at most `jobs_max`, so that no owner and no kind comes before the others with many of them.
pub(crate) fn list_due(app: &App, now_ms: u64, jobs_max: usize) -> Result<Due> {
    let view = app.store.view();
    // The timers of jobs that run are still listed.
    let due = timer::list_due(&view, now_ms, SEEN_MAX, Job::is_known)?;
    let due = due.into_iter().filter(|due| !app.running.is_running(due));
    let line = Line::of(due, jobs_max);
    Ok(Due { line, next_ms: timer::find_next_due_ms(&view, Job::is_known)? })
}

/// Begins those of the jobs for which there is a place now; the others stay in line.
pub(crate) fn begin_due(app: &App, mut due: Due) -> Result<Due> {
    let view = app.store.view();
    for (owner, timer) in due.line.take() {
        match app.running.begin_in_place(&timer, owner) {
            // It may have been done, or moved, while it waited in line.
            Begun::Run(run) => {
                if timer::is_waiting(&view, &timer)? {
                    payers_of(owner).for_now(|| carry_out_due(app, timer, run));
                }
            }
            Begun::NoPlace => due.line.put_back(owner, timer),
            Begun::RunsAlready => {}
        }
    }
    Ok(due)
}

/// The payers of a job that is due. A user's counts for the user; the work in a room counts for nobody, and is bounded by places.
fn payers_of(owner: Owner) -> Payers {
    match owner {
        Owner::User(user) => Payers::one(Payer::User(user)),
        Owner::Server | Owner::Room(_) => Payers::SERVER,
    }
}

/// Carries out a job for which nobody waits. A job that fails is put off, so that it holds no other up.
fn carry_out_due(app: &App, due: Timer, run: Run) {
    let worker = app.clone();
    let place = Place { running: run.running.clone(), name: run.name.clone() };
    app.env.spawn(async move {
        if let Err(error) = DUE.scope(place, worker.running.carry_out(&worker, &due)).await {
            let (fails, kind) = (worker.clone(), due.kind);
            if let Err(error) = worker.env.blocking(move || fail(&fails, &due, &error)).await {
                tracing::error!(%error, kind, "a job that failed could not be put off");
            }
        }
        drop(run);
    });
}

/// Puts a job off that has failed, or gives it up if it has failed too often.
fn fail(app: &App, failed: &Timer, why: &Error) -> Result<()> {
    let (job, tries) = (Job::read(failed).ok(), failed.row.tries.saturating_add(1));
    let name = job.as_ref().map_or("unreadable", Job::name);
    if tries < TRIES_MAX || job.as_ref().is_some_and(Job::recurs) {
        tracing::warn!(error = %why, job = name, tries, "a job failed; it is tried again later");
        return put_off(app, failed, tries);
    }
    let mut batch = app.store.batch(&Guard::own_tables());
    if timer::fire(&mut batch, failed)? {
        unless_fired(app.store.enqueue(batch))?;
        let undone =
            job.map_or_else(|| format!("a job of kind {} cannot be read", failed.kind), |job| job.undone());
        tracing::error!(error = %why, job = name, tries, undone, "a job is given up, because it failed too often");
        app.metrics.job_given_up(name);
    }
    Ok(())
}

/// Does the work of a job that waits for other servers, in a place for that which these pay for. Where there is none, the job comes
/// back, which is no failure of it. Errors: [`Error::Busy`] where it was slow and had to make room, beside those of the work.
pub(crate) async fn do_elsewhere(
    app: &App,
    job: &Timer,
    payers: Payers,
    work: impl Future<Output = Result<()>>,
) -> Result<()> {
    // A job that failed before was mostly slow, or would be.
    let pace = if job.row.tries == 0 { Pace::Unknown } else { Pace::Slow };
    match app.running.0.elsewhere_lanes.run(&app.env, (payers, pace), payers.during(work)).await {
        Ok(done) => done,
        Err(NoPlace::Full) => put_aside(app, job),
        Err(NoPlace::GaveWay) => Err(Error::Busy { retry_after: GAVE_WAY_AGAIN }),
    }
}

/// Has a job come back that finds no place for waiting. That is no failure of it.
fn put_aside(app: &App, job: &Timer) -> Result<()> {
    let wait_ms = u64::try_from(PLACE_AGAIN.as_millis()).unwrap_or(u64::MAX);
    set_again(app, job, (job.row.tries, wait_ms))
}

/// Sets a job's timer again, the later the more often the job has failed.
fn put_off(app: &App, failed: &Timer, tries: u32) -> Result<()> {
    let wait_ms = AGAIN_MS.saturating_mul(1 << failed.row.tries.min(20)).min(AGAIN_MS_MAX);
    set_again(app, failed, (tries, wait_ms))
}

fn set_again(app: &App, job: &Timer, (tries, wait_ms): (u32, u64)) -> Result<()> {
    let row = TimerRow { tries, content: job.row.content.clone() };
    let later = Timer { due_ms: app.env.now_ms().saturating_add(wait_ms), row, ..job.clone() };
    let mut batch = app.store.batch(&Guard::own_tables());
    if timer::fire(&mut batch, job)? {
        timer::set(&mut batch, &later);
        unless_fired(app.store.enqueue(batch))?;
    }
    Ok(())
}

/// Has a job done once more at this time: milliseconds since the epoch.
pub(crate) fn come_back(app: &App, timer: &Timer, job: &Job, due_ms: u64) -> Result<()> {
    let mut batch = app.store.batch(&Guard::own_tables());
    if timer::fire(&mut batch, timer)? {
        timer::set(&mut batch, &job.timer(due_ms));
        unless_fired(app.store.enqueue(batch))?;
    }
    Ok(())
}

/// Deletes the timer of a job that is done. A note is enough: if it is lost, the job is done again, which changes nothing.
pub(crate) fn cancel(app: &App, timer: &Timer) -> Result<()> {
    let mut note = app.store.note(&Guard::own_tables());
    timer::cancel(&mut note, timer);
    drop(app.store.enqueue_note(note)?);
    Ok(())
}

/// Passes over a conflict, which means that another task has fired the timer and nothing is left to do.
pub(crate) fn unless_fired(enqueued: Result<Enqueued, NotAccepted>) -> Result<()> {
    match enqueued {
        Ok(_) | Err(NotAccepted::Conflict(_)) => Ok(()),
        Err(other) => Err(other.into()),
    }
}
