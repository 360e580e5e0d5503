//! Enqueue: checks a batch against everything accepted, fixes its positions, and lets it wait for the flush.

use std::{collections::VecDeque, sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use parking_lot::MutexGuard;
use tokio::sync::oneshot;

use crate::{
    error::{Error, Refusal},
    ids::Position,
    store::{
        BATCH_BYTES_MAX, BATCH_ROWS_MAX, Batch, Fault, Read, Snapshot, Store,
        batch::{Expectation, OnPublish, Settled},
        engine::Change,
        pending::PendingRows,
    },
};

/// Accepted and not flushed; above this, builders are told to come back.
const QUEUE_BYTES_MAX: usize = 64 << 20;

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

/// A batch that waits for the flush; a barrier is one without changes.
pub(crate) struct Queued {
    pub(crate) number: u64,
    pub(crate) last: Position,
    pub(crate) base: Position,
    pub(crate) changes: Vec<Change>,
    pub(crate) bytes: usize,
    pub(crate) is_commit: bool,
    pub(crate) flushed: oneshot::Sender<()>,
    pub(crate) on_publish: Vec<OnPublish>,
}

/// What is accepted and not published.
pub(crate) struct Queue {
    pub(crate) pending: PendingRows,
    pub(crate) batches: VecDeque<Queued>,
    pub(crate) bytes: usize,
    /// How many batches the flusher waits for; 0 when it does not.
    awaited: usize,
    /// Of the last batch accepted.
    pub(crate) last_position: Position,
    last_batch: u64,
}

impl Queue {
    /// An empty queue whose batches follow those of the snapshot.
    pub(crate) fn after(snapshot: &Snapshot) -> Self {
        Self {
            pending: PendingRows::default(),
            batches: VecDeque::new(),
            bytes: 0,
            awaited: 0,
            last_position: snapshot.position,
            last_batch: snapshot.batch_number,
        }
    }
}

impl Store {
    /// Checks the batch's preconditions, fixes its positions and lets it wait for the flush. All or nothing.
    pub fn enqueue(&self, mut batch: Batch) -> Result<Enqueued, NotAccepted> {
        if batch.byte_count() > BATCH_BYTES_MAX || batch.row_count() > BATCH_ROWS_MAX {
            return Err(NotAccepted::TooLarge);
        }
        let (flushed, receiver) = oneshot::channel();
        let is_commit = batch.is_commit();
        let bytes = batch.byte_count();
        let checked = self.check_published(&batch)?;
        let positions = batch.positions;
        let expectations = std::mem::take(&mut batch.expectations);
        // What needs no positions is made ready before the queue is locked.
        let early = if batch.has_pending() { Err(batch) } else { Ok(batch.settle(Position::ZERO)) };
        let mut queue = self.0.queue.lock();
        if self.0.failed.load(Ordering::Acquire) {
            return Err(NotAccepted::Fault(Fault::failed()));
        }
        if queue.bytes > QUEUE_BYTES_MAX {
            return Err(NotAccepted::Busy);
        }
        self.check(&queue, &expectations, &checked)?;
        let base = queue.last_position.plus(1);
        let last = queue.last_position.plus(u64::from(positions));
        let number = queue.last_batch + 1;
        let Settled { changes, layer, on_publish } = early.unwrap_or_else(|batch| batch.settle(base));
        queue.pending.add(number, &changes, layer);
        queue.last_position = last;
        queue.last_batch = number;
        queue.bytes += bytes;
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

    /// What the preconditions find in the newest snapshot, read outside the queue's lock: it may touch the disk.
    fn check_published(&self, batch: &Batch) -> Result<Checked, NotAccepted> {
        let snapshot = self.snapshot();
        let find = |expected: &Expectation| snapshot.get_raw(expected.family, &expected.key);
        let found =
            batch.expectations.iter().map(find).collect::<Result<_, _>>().map_err(NotAccepted::Fault)?;
        Ok(Checked { batch_number: snapshot.batch_number(), found })
    }

    fn check(
        &self,
        queue: &Queue,
        expectations: &[Expectation],
        checked: &Checked,
    ) -> Result<(), NotAccepted> {
        // What waits cannot be published and forgotten while the queue is locked, so nothing slips between the two.
        let published = self.0.published.load();
        let is_current = published.batch_number == checked.batch_number;
        for (expected, found) in expectations.iter().zip(&checked.found) {
            let found = match queue.pending.find(expected.family, &expected.key) {
                Some(value) => value,
                None if is_current => found.clone(),
                None => published.get_raw(expected.family, &expected.key).map_err(NotAccepted::Fault)?,
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
        if must_wait && !self.0.failed.load(Ordering::Acquire) {
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
        let too_few = |queue: &mut Queue| queue.batches.len() < queue.awaited;
        self.0.gathered.wait_while_for(&mut queue, too_few, at_most);
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
}

/// What the preconditions found in the snapshot after this batch.
struct Checked {
    batch_number: u64,
    found: Vec<Option<Bytes>>,
}
