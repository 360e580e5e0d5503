//! The store: one ordered log, written in batches that are wholly there or wholly absent.
//!
//! *Enqueue decides, flush makes durable, publish makes visible.* A builder that holds the lock of its domain makes a
//! [`Batch`], which reads over everything accepted so far; [`Store::enqueue`] checks its preconditions and fixes its
//! positions; [`Store::flush`] writes all that has gathered in one write (and one fsync), publishes a [`Snapshot`],
//! then acknowledges and wakes.

mod batch;
pub mod engine;
pub mod key;
pub mod log;
mod overlay;
pub mod schema;
pub mod table;

use std::{collections::VecDeque, fmt, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use bytes::Bytes;
use imbl::OrdMap;
use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::{Notify, oneshot};

pub use crate::config::Durability;
pub use batch::Batch;
pub use engine::{Engine, Family};
pub use log::LogEntry;
pub use table::{Direction, Domain, Table};

use crate::{
    error::{Error, Refusal},
    ids::Position,
    store::{
        engine::{Change, EngineSnapshot, Rows},
        overlay::merge,
    },
};

/// No batch is larger: what is, is staged in parts that nobody sees.
pub const BATCH_BYTES_MAX: usize = 1 << 20;
/// No batch has more rows.
pub const BATCH_ROWS_MAX: usize = 5_000;
/// A flush stops gathering batches above this many bytes, so that one long write delays others by milliseconds only.
const FLUSH_BYTES_MAX: usize = 4 << 20;
/// Accepted and not flushed; above this, builders are told to come back.
const QUEUE_BYTES_MAX: usize = 64 << 20;

/// A fault of the store itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The disk or the engine.
    Io(String),
    /// Bytes that are not what they should be.
    Corrupt(&'static str),
    /// The same, in a known table.
    CorruptRow {
        /// The table's name.
        table: &'static str,
        /// What is wrong.
        why: &'static str,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(why) => write!(f, "the store cannot read or write: {why}"),
            Self::Corrupt(why) => write!(f, "the store holds damaged data: {why}"),
            Self::CorruptRow { table, why } => write!(f, "table {table} holds damaged data: {why}"),
        }
    }
}

impl std::error::Error for Fault {}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Self::broken(fault.to_string())
    }
}

/// Reading: a snapshot, a view of what is accepted, or a batch over that.
pub trait Read {
    /// The row under this key.
    fn get_raw(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault>;

    /// The rows under these keys.
    fn get_many_raw(&self, family: Family, keys: &[Vec<u8>]) -> Result<Vec<Option<Bytes>>, Fault> {
        keys.iter().map(|key| self.get_raw(family, key)).collect()
    }

    /// The rows with `low <= key < high`.
    fn range_raw(
        &self,
        family: Family,
        low: Vec<u8>,
        high: Vec<u8>,
        direction: Direction,
    ) -> Result<Rows<'_>, Fault>;

    /// Everything at or before this position is in here; ranges over positions and orders are bounded by it.
    fn upto(&self) -> Position;
}

/// Everything published at one moment. Hold it for at most 60 s: it keeps old rows on disk.
pub struct Snapshot {
    engine: EngineSnapshot,
    position: Position,
    batch_number: u64,
}

impl Snapshot {
    /// The number of the last batch in it.
    pub fn batch_number(&self) -> u64 {
        self.batch_number
    }
}

impl Read for Snapshot {
    fn get_raw(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        self.engine.get(family, key)
    }

    fn get_many_raw(&self, family: Family, keys: &[Vec<u8>]) -> Result<Vec<Option<Bytes>>, Fault> {
        self.engine.get_many(family, keys)
    }

    fn range_raw(
        &self,
        family: Family,
        low: Vec<u8>,
        high: Vec<u8>,
        direction: Direction,
    ) -> Result<Rows<'_>, Fault> {
        self.engine.range(family, low, high, direction)
    }

    fn upto(&self) -> Position {
        self.position
    }
}

/// Rows accepted and not published, each with the number of its batch.
type PendingRows = OrdMap<(Family, Bytes), (u64, Option<Bytes>)>;

/// Everything accepted: what is published and what waits for the flush. Whoever holds the lock of a domain sees all
/// of that domain; of other domains it may see more from one read to the next.
#[derive(Clone)]
pub struct View {
    store: Arc<Shared>,
}

impl Read for View {
    fn get_raw(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        // Pending rows first, then the *newest* snapshot: a row leaves the pending ones only after it is published.
        let pending = self.store.queue.lock().pending.clone();
        if !pending.is_empty()
            && let Some((_, value)) = pending.get(&(family, Bytes::copy_from_slice(key)))
        {
            return Ok(value.clone());
        }
        self.store.published.load().get_raw(family, key)
    }

    fn range_raw(
        &self,
        family: Family,
        low: Vec<u8>,
        high: Vec<u8>,
        direction: Direction,
    ) -> Result<Rows<'_>, Fault> {
        if low >= high {
            return Ok(Box::new(std::iter::empty()));
        }
        let pending = self.store.queue.lock().pending.clone();
        let range = (family, Bytes::copy_from_slice(&low))..(family, Bytes::copy_from_slice(&high));
        let over = pending.range(range).map(|((_, key), (_, value))| (key.clone(), value.clone()));
        let over: Vec<_> = match direction {
            Direction::Up => over.collect(),
            Direction::Down => over.rev().collect(),
        };
        let snapshot = self.store.published.load_full();
        let base =
            SnapshotRows::try_new(snapshot, |snapshot| snapshot.range_raw(family, low, high, direction))?;
        Ok(merge(Box::new(base), over.into_iter(), direction))
    }

    /// Everything accepted may be read, so nothing bounds it.
    fn upto(&self) -> Position {
        Position::MAX
    }
}

self_cell::self_cell! {
    /// Rows with the snapshot they are read from.
    struct SnapshotRows {
        owner: Arc<Snapshot>,
        #[not_covariant]
        dependent: Rows,
    }
}

impl Iterator for SnapshotRows {
    type Item = Result<(Bytes, Bytes), Fault>;
    fn next(&mut self) -> Option<Self::Item> {
        self.with_dependent_mut(|_, rows| rows.next())
    }
}

/// Why a batch was not accepted.
#[derive(Debug)]
pub enum NotAccepted {
    /// A precondition does not hold: somebody else was first.
    Conflict(Conflict),
    /// More than [`BATCH_BYTES_MAX`] or [`BATCH_ROWS_MAX`].
    TooLarge,
    /// Too much waits for the disk.
    Busy,
    /// The store itself.
    Fault(Fault),
}

/// A precondition that does not hold.
#[derive(Debug, Clone)]
pub struct Conflict {
    /// The table.
    pub table: &'static str,
    /// The row that is there instead; [`Table::conflicting`] reads it.
    pub found: Option<Bytes>,
}

impl From<NotAccepted> for Error {
    fn from(why: NotAccepted) -> Self {
        match why {
            NotAccepted::Conflict(conflict) => {
                Self::broken(format!("two writers of table {} were not kept apart", conflict.table))
            }
            NotAccepted::TooLarge => Refusal::too_large("This is too much for one request.").into(),
            NotAccepted::Busy => Self::Busy { retry_after: Duration::from_secs(1) },
            NotAccepted::Fault(fault) => fault.into(),
        }
    }
}

/// A batch that the store accepted.
#[must_use = "what is accepted is not durable yet: wait for `flushed`, or drop it on purpose"]
pub struct Enqueued {
    /// The first position; pending positions settle onto it.
    pub base: Position,
    /// Resolves when the batch is durable and visible; an error means that the server is going down.
    pub flushed: oneshot::Receiver<()>,
}

struct Queued {
    number: u64,
    last: Position,
    base: Position,
    changes: Vec<Change>,
    bytes: usize,
    is_commit: bool,
    flushed: oneshot::Sender<()>,
    on_publish: Vec<Box<dyn FnOnce(Position) + Send>>,
}

struct Queue {
    pending: PendingRows,
    batches: VecDeque<Queued>,
    bytes: usize,
    /// How many batches the flusher waits for; 0 when it does not.
    awaited: usize,
    /// Of the last batch accepted.
    last_position: Position,
    last_batch: u64,
}

struct Shared {
    engine: Engine,
    queue: Mutex<Queue>,
    published: ArcSwap<Snapshot>,
    /// Something waits for the flush.
    wanted: Notify,
    /// As many batches wait as the flusher waits for.
    gathered: Condvar,
    /// One flush at a time.
    flushing: Mutex<()>,
    durability: Durability,
}

/// What one flush wrote.
#[derive(Debug, Clone, Copy, Default)]
pub struct Flushed {
    /// Batches.
    pub batches: usize,
    /// Rows.
    pub rows: usize,
    /// Whether it was synced.
    pub synced: bool,
}

/// The store. Cheap to clone.
#[derive(Clone)]
pub struct Store(Arc<Shared>);

const HEAD_POSITION: &str = "position";
const HEAD_BATCH: &str = "batch";
const HEAD_INCARNATION: &str = "incarnation";
const HEAD_LAYOUT: &str = "layout";
/// The layout this code writes. `docs/architecture.md` says how it changes.
const LAYOUT: u64 = 1;

impl Store {
    /// Opens the store over an engine. Errors: [`Fault::Corrupt`] when a newer version of the server wrote it.
    pub fn open(engine: Engine, durability: Durability) -> Result<Self, Fault> {
        let head = Snapshot { engine: engine.snapshot(), position: Position::ZERO, batch_number: 0 };
        match schema::HEAD.get(&head, HEAD_LAYOUT)? {
            None | Some(LAYOUT) => {}
            Some(_) => {
                return Err(Fault::Corrupt(
                    "it was written by a newer version, and going back is not possible",
                ));
            }
        }
        let incarnation = schema::HEAD.get(&head, HEAD_INCARNATION)?.unwrap_or(0);
        let incarnation =
            u16::try_from(incarnation).map_err(|_| Fault::Corrupt("the incarnation is too large"))?;
        let first = Position::first_of_incarnation(incarnation);
        let last =
            schema::HEAD.get(&head, HEAD_POSITION)?.and_then(Position::new).unwrap_or(first).max(first);
        let last_batch = schema::HEAD.get(&head, HEAD_BATCH)?.unwrap_or(0);
        let snapshot = Snapshot { position: last, batch_number: last_batch, ..head };
        let queue = Queue {
            pending: OrdMap::new(),
            batches: VecDeque::new(),
            bytes: 0,
            awaited: 0,
            last_position: last,
            last_batch,
        };
        Ok(Self(Arc::new(Shared {
            engine,
            queue: Mutex::new(queue),
            published: ArcSwap::from_pointee(snapshot),
            wanted: Notify::new(),
            gathered: Condvar::new(),
            flushing: Mutex::new(()),
            durability,
        })))
    }

    /// Everything published now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.0.published.load_full()
    }

    /// Everything accepted. Decide on it only under the lock of the domain that is read.
    pub fn view(&self) -> View {
        View { store: self.0.clone() }
    }

    /// An empty batch over everything accepted.
    pub fn batch(&self) -> Batch {
        Batch::new(self.view())
    }

    /// The engine, for backups, checks and the simulation's crashes.
    pub fn engine(&self) -> &Engine {
        &self.0.engine
    }

    /// Checks the batch's preconditions, fixes its positions and lets it wait for the flush. All or nothing.
    pub fn enqueue(&self, batch: Batch) -> Result<Enqueued, NotAccepted> {
        if batch.byte_count() > BATCH_BYTES_MAX || batch.row_count() > BATCH_ROWS_MAX {
            return Err(NotAccepted::TooLarge);
        }
        let (flushed, receiver) = oneshot::channel();
        let is_commit = batch.is_commit();
        let mut queue = self.0.queue.lock();
        if queue.bytes > QUEUE_BYTES_MAX {
            return Err(NotAccepted::Busy);
        }
        self.check(&queue, &batch)?;
        let base = queue.last_position.plus(1);
        let last = queue.last_position.plus(u64::from(batch.positions));
        let number = queue.last_batch + 1;
        let bytes = batch.bytes;
        let mut changes = Vec::with_capacity(batch.rows.len());
        for ((family, mut key), row) in batch.rows {
            settle(&mut key, &row.pending_in_key, base);
            let value = match row.value {
                Some(value) if !row.pending_in_value.is_empty() => {
                    let mut value = Vec::from(value);
                    settle(&mut value, &row.pending_in_value, base);
                    Some(Bytes::from(value))
                }
                value => value,
            };
            let key = Bytes::from(key);
            queue.pending.insert((family, key.clone()), (number, value.clone()));
            changes.push((family, key, value));
        }
        queue.last_position = last;
        queue.last_batch = number;
        queue.bytes += bytes;
        let on_publish = batch.on_publish;
        queue.batches.push_back(Queued {
            number,
            last,
            base,
            changes,
            bytes,
            is_commit,
            flushed,
            on_publish,
        });
        self.announce(queue);
        Ok(Enqueued { base, flushed: receiver })
    }

    fn check(&self, queue: &Queue, batch: &Batch) -> Result<(), NotAccepted> {
        for expected in &batch.expectations {
            let key = (expected.family, Bytes::copy_from_slice(&expected.key));
            let found = match queue.pending.get(&key) {
                Some((_, value)) => value.clone(),
                None => {
                    let published = self.0.published.load();
                    published.get_raw(expected.family, &expected.key).map_err(NotAccepted::Fault)?
                }
            };
            if found != expected.value {
                return Err(NotAccepted::Conflict(Conflict { table: expected.table, found }));
            }
        }
        Ok(())
    }

    /// Resolves when everything accepted until now is durable and visible: at once when nothing waits, never when
    /// the store has failed, for then the process ends and nothing may be answered.
    pub fn barrier(&self) -> impl Future<Output = ()> + Send + 'static {
        let (flushed, receiver) = oneshot::channel();
        let mut queue = self.0.queue.lock();
        let (number, last) = (queue.last_batch, queue.last_position);
        let must_wait = number != self.0.published.load().batch_number || !queue.batches.is_empty();
        if must_wait {
            let barrier = Queued {
                number,
                last,
                base: last,
                changes: Vec::new(),
                bytes: 0,
                is_commit: false,
                flushed,
                on_publish: Vec::new(),
            };
            queue.batches.push_back(barrier);
            self.announce(queue);
        }
        async move {
            if must_wait && receiver.await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    fn announce(&self, queue: MutexGuard<'_, Queue>) {
        if queue.awaited > 0 && queue.batches.len() >= queue.awaited {
            self.0.gathered.notify_one();
        }
        drop(queue);
        self.0.wanted.notify_one();
    }

    /// Blocks the thread until this many batches wait for the flush, or the time is over. For the flusher alone.
    pub fn wait_for(&self, batches: usize, at_most: Duration) {
        let mut queue = self.0.queue.lock();
        queue.awaited = batches;
        let enough = |queue: &mut Queue| queue.batches.len() < queue.awaited;
        self.0.gathered.wait_while_for(&mut queue, enough, at_most);
        queue.awaited = 0;
    }

    /// Resolves when something waits for the flush.
    pub fn wanted(&self) -> impl Future<Output = ()> + '_ {
        self.0.wanted.notified()
    }

    /// How many batches wait for the flush.
    pub fn queue_depth(&self) -> usize {
        self.0.queue.lock().batches.len()
    }

    /// Writes what has gathered, publishes it, acknowledges and wakes. One at a time; the caller is the flusher.
    /// After an error nothing more may be written: the process must end, for builders have seen what is now lost.
    pub fn flush(&self) -> Result<Flushed, Fault> {
        let _one = self.0.flushing.lock();
        let gathered = self.gather();
        let Some(newest) = gathered.last() else { return Ok(Flushed::default()) };
        let (last, number) = (newest.last, newest.number);
        let mut changes: Vec<Change> =
            gathered.iter().flat_map(|queued| queued.changes.iter().cloned()).collect();
        let synced = self.0.durability == Durability::Fsync && gathered.iter().any(|queued| queued.is_commit);
        if !changes.is_empty() {
            changes.extend(head_rows(last, number));
            self.0.engine.write(&changes, synced)?;
            let snapshot =
                Snapshot { engine: self.0.engine.snapshot(), position: last, batch_number: number };
            self.0.published.store(Arc::new(snapshot));
        }
        self.forget(&gathered);
        let report = Flushed { batches: gathered.len(), rows: changes.len(), synced };
        for queued in gathered {
            for call in queued.on_publish {
                call(queued.base);
            }
            // Whoever waited may be gone; the batch is durable all the same.
            let _ = queued.flushed.send(());
        }
        Ok(report)
    }

    fn gather(&self) -> Vec<Queued> {
        let mut queue = self.0.queue.lock();
        let mut gathered = Vec::new();
        let mut bytes = 0;
        while bytes < FLUSH_BYTES_MAX
            && let Some(next) = queue.batches.pop_front()
        {
            bytes += next.bytes;
            gathered.push(next);
        }
        if !queue.batches.is_empty() {
            self.0.wanted.notify_one();
        }
        gathered
    }

    /// Published rows need no longer be laid over the snapshot, unless a later batch has written them again.
    fn forget(&self, gathered: &[Queued]) {
        let mut queue = self.0.queue.lock();
        for queued in gathered {
            queue.bytes = queue.bytes.saturating_sub(queued.bytes);
            for (family, key, _) in &queued.changes {
                let key = (*family, key.clone());
                if queue.pending.get(&key).is_some_and(|(number, _)| *number == queued.number) {
                    queue.pending.remove(&key);
                }
            }
        }
    }
}

/// Fills in pending positions at these offsets.
fn settle(bytes: &mut [u8], offsets: &[u32], base: Position) {
    for offset in offsets {
        let at = *offset as usize;
        if let Some(slot) = bytes.get_mut(at..at + 8)
            && let Ok(bits) = <[u8; 8]>::try_from(&*slot)
        {
            let settled = Position::from_bits(u64::from_be_bytes(bits)).settle(base);
            slot.copy_from_slice(&settled.number().to_be_bytes());
        }
    }
}

fn head_rows(position: Position, batch: u64) -> impl Iterator<Item = Change> {
    [(HEAD_POSITION, position.number()), (HEAD_BATCH, batch), (HEAD_LAYOUT, LAYOUT)].into_iter().map(
        |(name, number)| {
            let mut value = key::Encoder::default();
            key::Value::encode(&number, &mut value);
            (
                schema::HEAD.family,
                schema::HEAD.key_bytes::<String>(name).bytes.into(),
                Some(value.bytes.into()),
            )
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::UserNum;

    fn engines() -> Vec<(Engine, Option<tempfile::TempDir>)> {
        let dir = tempfile::tempdir().unwrap();
        let rocks = engine::Rocks::open(dir.path(), 1 << 20).unwrap();
        vec![(Engine::Memory(engine::Memory::default()), None), (Engine::Rocks(rocks), Some(dir))]
    }

    #[test]
    fn a_batch_is_read_by_its_builder_then_accepted_then_published() {
        for (engine, _dir) in engines() {
            let store = Store::open(engine, Durability::Fsync).unwrap();
            let entry = LogEntry::Account { user: UserNum(7) };
            let mut batch = store.batch();
            let first = batch.position(&entry);
            let second = batch.position(&LogEntry::Server);
            assert_eq!(schema::LOG.get(&batch, second).unwrap(), Some(LogEntry::Server));
            let enqueued = store.enqueue(batch).unwrap();
            let (first, second) = (first.settle(enqueued.base), second.settle(enqueued.base));
            assert_eq!(second, first.plus(1));
            assert_eq!(schema::LOG.get(&store.view(), first).unwrap(), Some(entry));
            assert_eq!(schema::LOG.get(&*store.snapshot(), first).unwrap(), None);
            store.flush().unwrap();
            assert_eq!(store.snapshot().upto(), second);
            let rows: Vec<_> = schema::LOG
                .prefix::<()>(&*store.snapshot(), (), Direction::Down)
                .unwrap()
                .map(|row| row.unwrap().0)
                .collect();
            assert_eq!(rows, [second, first]);
        }
    }
}
