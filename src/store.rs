//! The store: one ordered log, written in batches that are wholly there or wholly absent.
//!
//! *Enqueue decides, flush makes durable, publish makes visible.* A builder that holds the lock of its domain has a [`Guard`]
//! and makes a [`Batch`] from it, which reads over everything accepted so far; [`Store::enqueue`] checks its preconditions and
//! fixes its positions; [`Store::flush`] writes all that has gathered in one write (and one fsync), publishes a [`Snapshot`],
//! then wakes and acknowledges. A [`Note`] is the second verb, for what may be lost: cursors, last-seen, acknowledgements.

pub mod backup;
mod batch;
pub mod check;
mod claim;
#[cfg(test)]
mod conformance;
#[cfg(test)]
mod counting;
pub mod cursor;
mod data_dir;
mod domain;
pub mod engine;
mod flush;
mod guard;
mod head;
pub mod key;
pub mod log;
pub(crate) mod migrate;
mod not_accepted;
mod overlay;
mod pending;
mod published;
mod queue;
mod range;
pub mod table;
pub mod tables;
pub mod tail;
pub mod timer;
mod timer_row;
mod view;
mod wake;
#[cfg(test)]
mod watch;
mod writes;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;

pub use crate::config::Durability;
pub use batch::{Batch, Note, Write};
#[cfg(test)]
pub(crate) use counting::Counting;
pub use data_dir::{DataDir, NotHeld};
pub use domain::Domain;
pub use engine::{Engine, Family};
pub use flush::Flushed;
pub use guard::Guard;
pub use log::LogEntry;
pub use not_accepted::{Conflict, NotAccepted};
pub use published::{Lost, Published};
pub use queue::{Enqueued, STEP_POSITIONS_MAX, StagedStep};
pub use range::Direction;
pub use table::Table;
pub use view::{Read, Snapshot, View};
pub use wake::Wake;

use crate::{
    error::Error,
    ids::Position,
    store::{
        head::{Incarnations, Reserved},
        queue::Queue,
    },
};

/// A batch has at most this many bytes of keys and values. What is larger is staged in parts that nobody sees.
pub const BATCH_BYTES_MAX: usize = 1 << 20;
/// A batch has at most this many rows.
pub const BATCH_ROWS_MAX: usize = 5_000;

/// A fault of the store itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The disk or the engine failed.
    Io(String),
    /// The store is whole, but this version must not open it as it is.
    Closed(&'static str),
    /// The store holds bytes that are not what they should be.
    Corrupt(&'static str),
    /// A row of a known table holds such bytes.
    CorruptRow {
        /// The name of the table that has the row.
        table: &'static str,
        /// The fault that was found in the row.
        why: &'static str,
    },
    /// The reader held its snapshot for longer than [`SNAPSHOT_HELD_MAX`].
    Outdated,
    /// The request for which is read has more in memory than there is room for now (`env/payer.rs`).
    Crowded,
}

/// A snapshot can be read for this long after a newer one was published, and no longer, because it keeps old rows on disk.
pub const SNAPSHOT_HELD_MAX: Duration = Duration::from_secs(60);

impl Fault {
    fn failed() -> Self {
        Self::Io("an earlier write failed, so nothing is written until the server starts again".to_owned())
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(why) => write!(f, "the store cannot read or write: {why}"),
            Self::Closed(why) => write!(f, "the store cannot be opened: {why}"),
            Self::Corrupt(why) => write!(f, "the store holds damaged data: {why}"),
            Self::CorruptRow { table, why } => write!(f, "table {table} holds damaged data: {why}"),
            Self::Outdated => write!(f, "a reader held its snapshot for too long and has to begin again"),
            Self::Crowded => write!(f, "there is no room now for an answer as large as this one"),
        }
    }
}

impl std::error::Error for Fault {}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match fault {
            // Nobody is at fault: a caller that asks again reads a newer snapshot, or finds room.
            Fault::Outdated | Fault::Crowded => Self::Busy { retry_after: Duration::from_secs(1) },
            fault => Self::broken(fault.to_string()),
        }
    }
}

/// A handle of the store, which is cheap to clone.
#[derive(Clone)]
pub struct Store(Arc<Shared>);

pub(crate) struct Shared {
    engine: Engine,
    queue: Mutex<Queue>,
    published: ArcSwap<Snapshot>,
    /// The time in milliseconds since some moment, as the flusher tells it.
    clock_ms: Arc<AtomicU64>,
    /// Tells the flusher that something waits for it.
    wanted: Notify,
    /// Tells the worker of timers that one was set.
    timer_set: Arc<Notify>,
    /// Tells the flusher that the number of batches it waits for has come.
    gathered: Condvar,
    /// Tells a thread that waits for its turn to make a staged step that the one before is done.
    step_done: Condvar,
    /// Locked by the flush that runs, so that one runs at a time.
    flushing: Mutex<()>,
    /// Counts the batches that wrote rows of rooms under [`Guard::alone`].
    written_alone: AtomicU64,
    /// Whether a write has failed: then nothing more is accepted or written.
    failed: AtomicBool,
    durability: Durability,
    incarnations: ArcSwap<Incarnations>,
    reserved: Reserved,
}

impl Store {
    /// Opens the store over an engine. A store of an older layout stays as it is until [`Self::bring_up`].
    /// Errors: [`Fault::Closed`] when a newer version of the server wrote it.
    pub fn open(engine: Engine, durability: Durability) -> Result<Self, Fault> {
        let (store, layout) = Self::over(engine, durability)?;
        let mut opening = store.batch(&Guard::alone());
        match layout {
            Some(layout) => migrate::require_known(layout)?,
            None => head::put_new_store(&mut opening),
        }
        // This flush reserves numbers, so that no later one has to wait for that.
        migrate::write(&store, opening)?;
        Ok(store)
    }

    /// The layout that the store has.
    pub(crate) fn layout(&self) -> Result<u64, Fault> {
        head::layout(&*self.snapshot())
    }

    /// Brings a store that nobody else uses yet to the newest layout, by these steps.
    pub(crate) fn bring_up(&self, steps: &[migrate::Step]) -> Result<(), Fault> {
        migrate::run(self, self.layout()?, steps, head::LAYOUT_NOW)
    }

    /// Reads the store as it is, and its layout; there is none where nothing was ever written.
    fn over(engine: Engine, durability: Durability) -> Result<(Self, Option<u64>), Fault> {
        let head = head::open(&engine)?;
        let store = Self(Arc::new(Shared {
            queue: Mutex::new(Queue::after(&head.snapshot)),
            clock_ms: Arc::clone(&head.snapshot.clock_ms),
            published: ArcSwap::from_pointee(head.snapshot),
            wanted: Notify::new(),
            timer_set: Arc::default(),
            gathered: Condvar::new(),
            step_done: Condvar::new(),
            flushing: Mutex::new(()),
            written_alone: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            durability,
            incarnations: ArcSwap::from_pointee(head.incarnations),
            reserved: head.reserved,
            engine,
        }));
        Ok((store, head.layout))
    }

    /// Begins an incarnation, after `lived` ones and a history that ended at this position: positions jump above all that were
    /// ever given out. For a store that nobody else uses.
    pub(crate) fn begin_incarnation(&self, lived: u16, ended: Position) -> Result<u16, Fault> {
        let incarnation = head::next_incarnation(lived)?;
        let mut batch = self.batch(&Guard::alone());
        head::put_incarnation(&mut batch, incarnation, ended);
        batch.jump_to = Some(Position::first_of_incarnation(incarnation));
        migrate::write(self, batch)?;
        self.0.incarnations.store(Arc::new(Incarnations::read(&self.snapshot())?));
        Ok(incarnation)
    }

    /// A snapshot of everything that is published now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.0.published.load_full()
    }

    /// Tells the store the time, in milliseconds since any moment: it has no clock of its own. What is published after this
    /// ages the snapshots before it.
    pub fn tell_time(&self, now_ms: u64) {
        self.0.clock_ms.store(now_ms, Ordering::Relaxed);
    }

    /// A view of everything that is accepted. Decide on it only under the lock of the domain that is read.
    pub fn view(&self) -> View {
        View { store: self.0.clone() }
    }

    /// An empty batch over everything accepted, which may write what the guard covers.
    pub fn batch(&self, guard: &Guard) -> Batch {
        Batch::new(self.view(), guard)
    }

    /// An empty note over everything accepted, which may write what the guard covers.
    pub fn note(&self, guard: &Guard) -> Note {
        Note::new(self.view(), guard)
    }

    /// Resolves when a timer was set since this last resolved. Only the worker of timers waits for it.
    pub fn timer_set(&self) -> impl Future<Output = ()> + '_ {
        self.0.timer_set.notified()
    }

    /// Counts the batches that wrote rows of rooms under [`Guard::alone`]. Whoever remembers rows of a room reads this before
    /// it reads the rows, and forgets them when the number is another.
    pub fn written_alone(&self) -> u64 {
        self.0.written_alone.load(Ordering::Acquire)
    }

    /// The engine, for backups, checks and the simulation's crashes.
    pub fn engine(&self) -> &Engine {
        &self.0.engine
    }

    /// The incarnation of the store: 0, and one more after each restore. A token carries it in its position.
    pub fn incarnation(&self) -> u16 {
        self.0.incarnations.load().current()
    }

    /// The place in the log that a position from a client stands for: itself; for one of an earlier incarnation that
    /// lies beyond what was restored, the place at which that incarnation ended; for one that was never given out,
    /// the newest published one. So nothing stored since is missed.
    pub fn clamp(&self, position: Position) -> Position {
        self.0.incarnations.load().clamp(position).min(self.0.published.load().position)
    }
}
