//! Enqueue: checks a batch or a note against everything accepted, fixes its positions, and lets it wait for the flush.

use std::{collections::VecDeque, sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use parking_lot::MutexGuard;

use crate::{
    ids::Position,
    store::{
        Batch, Conflict, Fault, NotAccepted, Note, Published, Read, Snapshot, Store,
        batch::{Begins, Expectation},
        engine::Change,
        head::RESERVED_AT_ONCE,
        pending::PendingRows,
        published::{Promise, promise},
        wake::Wake,
        writes::{Settled, Writes},
    },
};

/// At most this many bytes wait for the flush; above it, builders are told to come back.
const QUEUE_BYTES_MAX: usize = 64 << 20;

/// A batch that the store accepted.
#[must_use = "what is accepted is not durable yet: wait for `flushed`, or drop it on purpose"]
pub struct Enqueued {
    /// The first position; pending positions settle onto it.
    pub base: Position,
    /// Resolves when the batch is durable and visible; an error means that the server is going down.
    pub flushed: Published,
}

/// A batch or a note that waits for the flush; a barrier is one without changes.
pub(crate) struct Queued {
    pub(crate) number: u64,
    pub(crate) last: Position,
    pub(crate) changes: Vec<Change>,
    pub(crate) bytes: usize,
    /// Whether the flush that carries it must be synced.
    pub(crate) is_commit: bool,
    pub(crate) wakes: Vec<Wake>,
    pub(crate) promise: Promise,
}

/// The batches that are accepted and not published.
pub(crate) struct Queue {
    pub(crate) pending: PendingRows,
    pub(crate) batches: VecDeque<Queued>,
    pub(crate) bytes: usize,
    /// The number of batches that the flusher waits for; 0 when it does not wait.
    awaited: usize,
    /// The position up to which the accepted batches have taken positions.
    pub(crate) last_position: Position,
    last_batch: u64,
    /// The next staged step begins at this position or above. A store that is opened again may give positions to a step that an
    /// unfinished one had: taking that one back deletes only entries of its own.
    next_step: Position,
    /// Whether a staged step is made.
    is_stepping: bool,
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
            next_step: snapshot.position,
            is_stepping: false,
        }
    }

    /// Adds a batch at the end. Positions and numbers of batches never fall, and a batch that claims no position takes none.
    fn push(&mut self, queued: Queued) {
        debug_assert!(queued.last >= self.last_position, "positions fall");
        let is_next = queued.number == self.last_batch + 1;
        let is_barrier = queued.number == self.last_batch && queued.changes.is_empty();
        debug_assert!(is_next || is_barrier, "batch {} follows {}", queued.number, self.last_batch);
        self.last_position = queued.last;
        self.last_batch = queued.number;
        self.bytes += queued.bytes;
        self.batches.push_back(queued);
    }
}

/// The properties of a batch beside its rows.
struct Kind {
    positions: u32,
    wakes: Vec<Wake>,
    jump_to: Option<Position>,
    begins: Begins,
    is_commit: bool,
}

/// A staged step is made while at most this many positions are given out to others. It is twice as many as are reserved at
/// a time, so that a store that is opened again after a crash does not go on within the positions of an unfinished step.
const AHEAD: u64 = 2 * RESERVED_AT_ONCE;
/// A staged step claims at most this many positions. No other step gets any of them, also if this one comes to nothing and its
/// parts wait to be taken back.
pub const STEP_POSITIONS_MAX: u64 = 1 << 18;
/// A step waits for at most this long until another one is done.
const STEP_WAITS_MAX: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// The right to make a staged step, and the positions that are reserved for it. One step is made at a time: the last batch of
/// a step makes all positions below count as given out, so that the parts of another one would lie where readers were already.
pub struct StagedStep {
    store: Store,
    anchor: Position,
}

impl StagedStep {
    /// The first of the step's positions, which its last batch gets.
    pub fn anchor(&self) -> Position {
        self.anchor
    }
}

impl Drop for StagedStep {
    fn drop(&mut self) {
        self.store.0.queue.lock().is_stepping = false;
        self.store.0.step_done.notify_one();
    }
}

impl std::fmt::Debug for StagedStep {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("StagedStep").field("anchor", &self.anchor).finish_non_exhaustive()
    }
}

impl Store {
    /// Begins a staged step at positions far above everything given out. Blocks the thread while another step is made.
    /// Positions are plenty (2^44 an incarnation), and those that are jumped over are given to nobody. Errors:
    /// [`NotAccepted::Busy`] if the other step takes too long.
    pub fn begin_step(&self) -> Result<StagedStep, NotAccepted> {
        let mut queue = self.0.queue.lock();
        let is_stepping = |queue: &mut Queue| queue.is_stepping;
        if self.0.step_done.wait_while_for(&mut queue, is_stepping, STEP_WAITS_MAX).timed_out() {
            tracing::debug!("a staged step is put off: another one takes long");
            return Err(NotAccepted::Busy);
        }
        let anchor = queue.last_position.plus(AHEAD).max(queue.next_step);
        queue.next_step = anchor.plus(STEP_POSITIONS_MAX);
        queue.is_stepping = true;
        Ok(StagedStep { store: self.clone(), anchor })
    }

    /// Checks the batch's guards and preconditions, fixes its positions and lets it wait for the flush, all or nothing of it.
    pub fn enqueue(&self, batch: Batch) -> Result<Enqueued, NotAccepted> {
        let Batch { writes, expectations, positions, wakes, jump_to, begins } = batch;
        let checked = self.check_published(&expectations)?;
        let check = |queue: &Queue| self.check(queue, &expectations, &checked);
        // A part of a staged step means nothing without the last one, which is synced after it.
        let is_commit = !matches!(begins, Begins::Staged(_));
        let enqueued = self.accept(writes, Kind { positions, wakes, jump_to, begins, is_commit }, check)?;
        #[cfg(test)]
        self.tell_watcher();
        Ok(enqueued)
    }

    /// Lets a note wait for the flush. It answers what resolves when the note is visible; it may never be durable.
    pub fn enqueue_note(&self, note: Note) -> Result<Published, NotAccepted> {
        let begins = Begins::Next;
        let kind = Kind { positions: 0, wakes: Vec::new(), jump_to: None, begins, is_commit: false };
        Ok(self.accept(note.writes, kind, |_| Ok(()))?.flushed)
    }

    fn accept(
        &self,
        writes: Writes,
        kind: Kind,
        check: impl FnOnce(&Queue) -> Result<(), NotAccepted>,
    ) -> Result<Enqueued, NotAccepted> {
        writes.check_size()?;
        writes.check_guards()?;
        let Kind { positions, wakes, jump_to, begins, is_commit } = kind;
        let (promise, flushed) = promise();
        let bytes = writes.byte_count();
        let writes_rooms_alone = writes.writes_rooms_alone();
        // A batch that needs no positions is made ready before the queue is locked.
        let early = if writes.has_pending() { Err(writes) } else { Ok(writes.settle(Position::ZERO)) };
        let mut queue = self.0.queue.lock();
        if self.0.failed.load(Ordering::Acquire) {
            return Err(NotAccepted::Fault(Fault::failed()));
        }
        if queue.bytes > QUEUE_BYTES_MAX {
            tracing::debug!(bytes = queue.bytes, "a batch is put off: too much waits for the disk");
            return Err(NotAccepted::Busy);
        }
        check(&queue)?;
        let base = match begins {
            Begins::Next => queue.last_position.plus(1),
            Begins::At(base) | Begins::Staged(base) if base <= queue.last_position => {
                tracing::debug!(%base, "a staged step is refused: its positions are past");
                return Err(NotAccepted::Overtaken);
            }
            Begins::At(base) | Begins::Staged(base) => base,
        };
        let last = match begins {
            Begins::Staged(_) => queue.last_position,
            // The positions of the step's parts are given out with this batch, also if it claims none itself.
            Begins::At(base) => base.plus(positions.into()).before(),
            Begins::Next if positions == 0 => queue.last_position,
            Begins::Next => base.plus(u64::from(positions) - 1),
        };
        let last = jump_to.unwrap_or(last);
        debug_assert!(last >= queue.last_position, "positions rise");
        let number = queue.last_batch + 1;
        let Settled { changes, layer } = early.unwrap_or_else(|writes| writes.settle(base));
        queue.pending.add(number, &changes, layer);
        if writes_rooms_alone {
            // The number rises after the rows can be read: who reads the new number does not read old rows.
            self.0.written_alone.fetch_add(1, Ordering::Release);
        }
        queue.push(Queued { number, last, changes, bytes, is_commit, wakes, promise });
        self.announce(queue);
        Ok(Enqueued { base, flushed })
    }

    /// Reads what the preconditions find in the newest snapshot, outside the queue's lock because it may touch the disk.
    fn check_published(&self, expectations: &[Expectation]) -> Result<Checked, NotAccepted> {
        let snapshot = self.snapshot();
        let find = |expected: &Expectation| snapshot.get_raw(expected.family, &expected.key);
        let found = expectations.iter().map(find).collect::<Result<_, _>>().map_err(NotAccepted::Fault)?;
        Ok(Checked { batch_number: snapshot.batch_number(), found })
    }

    fn check(
        &self,
        queue: &Queue,
        expectations: &[Expectation],
        checked: &Checked,
    ) -> Result<(), NotAccepted> {
        // A batch that waits cannot be published and forgotten while the queue is locked, so nothing slips between the two.
        let published = self.0.published.load();
        let is_current = published.batch_number == checked.batch_number;
        for (expected, found) in expectations.iter().zip(&checked.found) {
            let found = match queue.pending.find(expected.family, &expected.key) {
                Some(value) => value,
                None if is_current => found.clone(),
                None => published.get_raw(expected.family, &expected.key).map_err(NotAccepted::Fault)?,
            };
            if found != expected.value {
                tracing::debug!(table = expected.table, "a batch is refused: a row is not as it expects");
                return Err(NotAccepted::Conflict(Conflict { table: expected.table, found }));
            }
        }
        Ok(())
    }

    /// Resolves when everything accepted until now is durable and visible: at once when nothing waits, never when
    /// the store has failed, for then the process ends and nothing may be answered.
    pub fn barrier(&self) -> impl Future<Output = ()> + Send + 'static {
        let (promise, published) = promise();
        let mut queue = self.0.queue.lock();
        let (number, last) = (queue.last_batch, queue.last_position);
        let must_wait = number != self.0.published.load().batch_number || !queue.batches.is_empty();
        if must_wait && !self.0.failed.load(Ordering::Acquire) {
            let barrier = Queued {
                number,
                last,
                changes: Vec::new(),
                bytes: 0,
                is_commit: false,
                wakes: Vec::new(),
                promise,
            };
            queue.push(barrier);
            self.announce(queue);
        }
        async move {
            if must_wait && published.await.is_err() {
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

    /// Blocks the thread until this many batches wait for the flush, or the time is over. Only the flusher calls this.
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

    /// The number of batches that wait for the flush.
    pub fn queue_depth(&self) -> usize {
        self.0.queue.lock().batches.len()
    }
}

/// The rows that preconditions found in the snapshot after this batch.
struct Checked {
    batch_number: u64,
    found: Vec<Option<Bytes>>,
}
