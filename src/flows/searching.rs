//! The index of search follows the log: this reads it page by page, commits what was read, and builds the index anew where that is
//! needed. Searches go on meanwhile with what was committed last.
//!
//! Changes are gathered for a while before they are committed. A search asks for what was written before it began, and then less is
//! gathered: all who search meanwhile wait for one commit, and commits keep a distance whoever asks.
//!
//! The cursor of this reader is in the index itself, so that both always agree. What the store keeps under the reader's name only has the
//! log wait for it. Where the log did not, the index is built anew.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};

use crate::{
    config::Search,
    env::{Env, Long},
    error::{Error, Refusal, Result},
    flows::App,
    ids::Position,
    search::{
        follow::{Followed, read_on},
        index::{Index, Progress, Shelf},
    },
    store::{Engine, Guard, Read, Store, cursor},
};

/// Commit at least after this many changes, so that what is not committed stays small.
const CHANGES_MAX: usize = 50_000;
/// While there is more to read, commit this often, so that searches find what was read.
const COMMIT_EVERY: Duration = Duration::from_secs(5);
/// Commit how far the log was read, though nothing was to be indexed, once this many positions have passed, because the log is kept
/// from there on.
const POSITIONS_MAX: u64 = 20_000;
/// Commit it at least this often, too, while anything is written at all.
const POSITION_EVERY: Duration = Duration::from_secs(3_600);
/// The name under which the store keeps how much of the log is still needed here.
const READER: &str = "search";
/// A failure is tried again after this time, which doubles with each further failure up to `FAILED_AGAIN_AFTER_MAX`.
const FAILED_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// A reader that keeps failing tries again at least this often.
const FAILED_AGAIN_AFTER_MAX: Duration = Duration::from_secs(300);
/// A commit that searches ask for comes no sooner after the one before than this part of the time for which changes are gathered.
const ASKED_PART: u32 = 4;
/// A search waits at most this long for what was written before it began, and then goes on with what the index has.
const SEARCH_WAITS_MAX: Duration = Duration::from_secs(2);
/// An index that fails this many times on end is built anew.
const FAILS_MAX: u32 = 5;

/// The index of search of one server, and how far it has come. A clone is another handle to the same one.
#[derive(Clone)]
pub struct Searching(Option<Arc<Shared>>);

struct Shared {
    index: Index,
    reached: watch::Sender<Reached>,
    /// How far the index had come when it was opened, until the reader takes it.
    began: parking_lot::Mutex<Option<Progress>>,
    is_to_begin_anew: AtomicBool,
    told: Notify,
    /// Notified when a search waits for what is not committed yet.
    asked: Notify,
}

/// How far the index has come. Everything up to here is found by searches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reached {
    position: Position,
    /// Whether the rooms are still being walked through, to fill a new index.
    is_walking: bool,
    /// How often the index was begun anew since the server started.
    begun_anew: u64,
    /// The number of commits since the server started.
    commits: u64,
}

/// The state of the index, as an operator is told it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SearchStatus {
    /// The number of texts that are found.
    pub documents: u64,
    /// The number of positions of the log that are still to be read.
    pub lag: u64,
    /// Whether the index is new, and is still being filled from the rooms.
    pub is_filling: bool,
}

impl Searching {
    /// Opens the index of a store: below the data directory, or in memory if the store is there. Search goes on without an index
    /// where none can be made; the log says why.
    pub fn open(settings: &Search, env: &Env, store: &Store, data_dir: &Path) -> Self {
        if !settings.enabled {
            return Self(None);
        }
        let shelf = match store.engine() {
            Engine::Rocks(_) => Shelf::below(data_dir),
            Engine::Memory(_) => Shelf::Memory(Default::default()),
        };
        Self::on_shelf(settings, env, store, shelf)
    }

    /// Opens the index that is kept here.
    pub fn on_shelf(settings: &Search, env: &Env, store: &Store, shelf: Shelf) -> Self {
        // In a simulation nothing goes on in threads that nobody waits for.
        let merges = !env.is_simulated();
        let bytes_max = settings.writer_bytes_max.in_memory();
        match Index::open(shelf, bytes_max, merges, store.incarnation(), store.snapshot().upto()) {
            Ok((index, progress)) => Self(Some(Arc::new(Shared {
                index,
                reached: watch::Sender::new(Reached {
                    position: progress.position(),
                    is_walking: progress.walk.is_some(),
                    begun_anew: 0,
                    commits: 0,
                }),
                began: parking_lot::Mutex::new(Some(progress)),
                is_to_begin_anew: AtomicBool::new(false),
                told: Notify::new(),
                asked: Notify::new(),
            }))),
            Err(error) => {
                tracing::error!(%error, "there is no search in messages until the next start");
                Self(None)
            }
        }
    }

    /// The index. Refuses where the operator has switched search off: 404 `M_UNRECOGNIZED`.
    pub(crate) fn require(&self) -> Result<SearchIndex> {
        let off = || Error::from(Refusal::unrecognized("This server does not search in messages."));
        Ok(SearchIndex(Arc::clone(self.0.as_ref().ok_or_else(off)?)))
    }

    /// Starts to follow the log, on every node, for each has an index of its own.
    pub(crate) fn start(&self, app: &App, written: watch::Receiver<()>) {
        let Some(shared) = &self.0 else {
            // The log need not wait for an index that nobody wants.
            if let Err(error) = forget_cursor(&app.store) {
                tracing::warn!(%error, "the log may be kept for an index of search that is switched off");
            }
            return;
        };
        if let Some(progress) = shared.began.lock().take() {
            app.env.spawn(run(app.clone(), Arc::clone(shared), progress, written));
        }
    }

    /// Waits until searches find everything that was written up to a position. It waits for ever where there is no index.
    pub async fn read_upto(&self, position: Position) {
        let Some(shared) = &self.0 else { return std::future::pending().await };
        let is_there = |reached: &Reached| reached.position >= position && !reached.is_walking;
        // The sender lives as long as this handle.
        let _ = shared.reached.subscribe().wait_for(is_there).await;
    }

    /// Waits a bounded time until searches find everything that was written up to a position, and has the index commit for that sooner
    /// than it would. It waits neither for an index that is being filled, which takes longer than anybody wants to wait, nor where
    /// there is none.
    pub(crate) async fn settle(&self, env: &Env, position: Position) {
        let Some(shared) = &self.0 else { return };
        let mut reached = shared.reached.subscribe();
        let is_there = |reached: &Reached| reached.position >= position || reached.is_walking;
        if is_there(&reached.borrow()) {
            return;
        }
        shared.asked.notify_one();
        tokio::select! {
            biased;
            _ = reached.wait_for(is_there) => {}
            () = env.sleep(SEARCH_WAITS_MAX) => {
                tracing::debug!(reason = "the index is behind", "a search goes on without what was written last");
            }
        }
    }

    /// Builds the index anew, and answers once that has begun. Errors: 404 where search is switched off.
    pub async fn begin_anew(&self) -> Result<()> {
        let shared = self.require()?.0;
        let before = shared.reached.borrow().begun_anew;
        let mut reached = shared.reached.subscribe();
        shared.is_to_begin_anew.store(true, Ordering::Relaxed);
        shared.told.notify_one();
        let _ = reached.wait_for(|reached| reached.begun_anew > before).await;
        Ok(())
    }

    /// Says how far the index has come, for an operator. Errors: 404 where search is switched off.
    pub fn progress(&self, store: &Store) -> Result<SearchStatus> {
        let shared = self.require()?.0;
        let reached = *shared.reached.borrow();
        Ok(SearchStatus {
            documents: shared.index.document_count(),
            lag: store.snapshot().upto().number().saturating_sub(reached.position.number()),
            is_filling: reached.is_walking,
        })
    }

    /// Lets go of the files, so that another server of this process may take them. Whatever is being written at this moment goes
    /// on, and is as lost as in a crash.
    pub(crate) fn close(&self) {
        if let Some(shared) = &self.0 {
            shared.index.close_writer();
        }
    }
}

fn forget_cursor(store: &Store) -> Result<()> {
    if cursor::find(&*store.snapshot(), READER)?.is_some() {
        let mut note = store.note(&Guard::own_tables());
        cursor::remove(&mut note, READER);
        drop(store.enqueue_note(note)?);
    }
    Ok(())
}

/// A handle to an index that is there.
#[derive(Clone)]
pub(crate) struct SearchIndex(Arc<Shared>);

impl SearchIndex {
    /// The index, for a search.
    pub(crate) fn index(&self) -> &Index {
        &self.0.index
    }

    /// Has the index built anew because it could not be read.
    pub(crate) fn set_damaged(&self) {
        self.0.index.set_damaged();
        self.0.told.notify_one();
    }
}

/// The reader's own view of how far it is.
struct Reading {
    now: Progress,
    committed: Progress,
    /// The uptime at the last commit.
    committed_at: Duration,
    /// The number of commits since the server started.
    commits: u64,
    begun_anew: u64,
}

/// Follows the log until the server ends.
async fn run(app: App, shared: Arc<Shared>, progress: Progress, mut written: watch::Receiver<()>) {
    let committed_at = app.env.uptime();
    let mut reading =
        Reading { now: progress.clone(), committed: progress, committed_at, commits: 0, begun_anew: 0 };
    let mut fails = 0_u32;
    loop {
        written.mark_unchanged();
        let committed_before = reading.commits;
        match turn(&app, &shared, &mut reading, fails).await {
            // In a simulation nothing else ends the turn of this task.
            Ok(Followed::More) => {
                if reading.commits > committed_before {
                    fails = 0;
                }
                tokio::task::yield_now().await;
            }
            Ok(Followed::Missed) => {
                tracing::info!("the log was trimmed before the index of search had read it");
                shared.is_to_begin_anew.store(true, Ordering::Relaxed);
            }
            Ok(Followed::All) => {
                fails = 0;
                gather(&app, &shared).await;
                let due = reading.now.scrub_by_ms.map(|due| due.saturating_sub(app.env.now_ms()));
                let scrub = async {
                    match due {
                        Some(due_ms) => app.env.sleep(Duration::from_millis(due_ms)).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    biased;
                    changed = written.changed() => if changed.is_err() { return },
                    () = shared.told.notified() => {}
                    () = scrub => {}
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the index of search could not be written; it is tried again");
                let wait = FAILED_AGAIN_AFTER.saturating_mul(1 << fails.min(16)).min(FAILED_AGAIN_AFTER_MAX);
                fails += 1;
                // Nothing of what was not committed counts.
                shared.index.close_writer();
                reading.now = reading.committed.clone();
                app.env.sleep(wait).await;
            }
        }
    }
}

/// Waits while changes are gathered: less where a search asks for them, but always long enough that the disk is not busy with
/// commits alone.
async fn gather(app: &App, shared: &Shared) {
    let delay = Duration::from_millis(app.config.search.delay_ms);
    let least = delay / ASKED_PART;
    app.env.sleep(least).await;
    tokio::select! {
        biased;
        () = shared.asked.notified() => {}
        () = app.env.sleep(delay.saturating_sub(least)) => {}
    }
}

/// Reads on once, and commits if it is time to.
async fn turn(app: &App, shared: &Arc<Shared>, reading: &mut Reading, fails: u32) -> Result<Followed> {
    let is_asked_for = shared.is_to_begin_anew.swap(false, Ordering::Relaxed);
    let is_broken = shared.index.is_damaged() || (fails > 0 && fails.is_multiple_of(FAILS_MAX));
    if is_asked_for || is_broken {
        tracing::info!(is_asked_for, "the index of search is built anew");
        begin_anew(app, shared, reading).await?;
        return Ok(Followed::More);
    }
    let (store, owned, mut now) = (app.store.clone(), Arc::clone(shared), reading.now.clone());
    let (now_ms, kept_ms) = (app.env.now_ms(), app.config.rooms.redacted_events_kept_ms());
    let committed = reading.committed.clone();
    let age = app.env.uptime().saturating_sub(reading.committed_at);
    let (is_time, is_late) = (age >= COMMIT_EVERY, age >= POSITION_EVERY);
    let work = move || {
        let snapshot = store.snapshot();
        let mut change = owned.index.write();
        let followed = read_on(&*snapshot, &mut change, &mut now, now_ms, kept_ms)?;
        let is_all = followed == Followed::All;
        let has_changes = change.count() > 0;
        let is_due = change.count() >= CHANGES_MAX
            || has_changes && (is_all || is_time)
            || now.walk.is_none() && committed.walk.is_some()
            || is_all && now.position.saturating_sub(committed.position) >= POSITIONS_MAX
            || is_all && is_late && now.position > committed.position;
        if is_due {
            change.commit(&now)?;
        }
        let is_scrubbed = is_all && change.count() == 0 && now.scrub_by_ms.is_some_and(|due| due <= now_ms);
        if is_scrubbed {
            change.scrub()?;
            now.scrub_by_ms = None;
            change.commit(&now)?;
        }
        if is_due || is_scrubbed {
            let mut note = store.note(&Guard::own_tables());
            cursor::advance(&mut note, READER, now.position());
            drop(store.enqueue_note(note)?);
        }
        Ok((followed, now, is_due || is_scrubbed))
    };
    let (followed, now, is_committed) = app.env.blocking_long(Long::Indexing, work).await?;
    reading.now = now;
    if is_committed {
        reading.committed = reading.now.clone();
        reading.committed_at = app.env.uptime();
        reading.commits += 1;
    }
    if followed == Followed::All {
        tell(shared, reading);
    }
    Ok(followed)
}

async fn begin_anew(app: &App, shared: &Arc<Shared>, reading: &mut Reading) -> Result<()> {
    let (store, owned) = (app.store.clone(), Arc::clone(shared));
    let begin = move || {
        let progress = owned.index.begin_anew(store.incarnation(), store.snapshot().upto())?;
        owned.index.write().commit(&progress)?;
        let mut note = store.note(&Guard::own_tables());
        cursor::advance(&mut note, READER, progress.position());
        drop(store.enqueue_note(note)?);
        Ok(progress)
    };
    let progress = app.env.blocking_long(Long::Indexing, begin).await?;
    (reading.now, reading.committed) = (progress.clone(), progress);
    reading.begun_anew += 1;
    reading.commits += 1;
    tell(shared, reading);
    Ok(())
}

fn tell(shared: &Shared, reading: &Reading) {
    shared.reached.send_replace(Reached {
        position: reading.now.position(),
        is_walking: reading.now.walk.is_some(),
        begun_anew: reading.begun_anew,
        commits: reading.commits,
    });
}

#[cfg(test)]
mod tests;
