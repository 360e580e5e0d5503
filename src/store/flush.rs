//! Flush: one write, one fsync, one snapshot for all that has gathered; then wake and acknowledge.

use std::sync::{Arc, atomic::Ordering};

use parking_lot::MutexGuard;

use crate::store::{Durability, Fault, Snapshot, Store, Wake, engine::Change, head, queue::Queued};

/// A flush carries at most this many bytes, or one batch, so that a long write delays others by milliseconds only.
const FLUSH_BYTES_MAX: usize = 2 << 20;
/// A flush carries at most this many rows, or one batch: what rows cost is mostly their number.
const FLUSH_ROWS_MAX: usize = 4_000;

/// A report of one flush.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flushed {
    /// The number of batches that it carried, barriers included.
    pub batches: usize,
    /// The number of rows that it wrote and of ranges that it deleted.
    pub rows: usize,
    /// The number of bytes of their keys and values.
    pub bytes: usize,
    /// Whether the write was synced.
    pub synced: bool,
}

impl Store {
    /// Flushes where nobody is to be woken: before the server runs, after it has stopped, and in tests.
    pub fn flush(&self) -> Result<Flushed, Fault> {
        self.flush_and_wake(&mut |_| ())
    }

    /// Writes what has gathered, publishes it, wakes and acknowledges. One at a time; the caller is the flusher.
    /// After an error nothing more is accepted or written: the process must end, because builders have seen what is now
    /// lost.
    pub fn flush_and_wake(&self, wake: &mut dyn FnMut(Wake)) -> Result<Flushed, Fault> {
        let _one = self.0.flushing.lock();
        if self.0.failed.load(Ordering::Acquire) {
            return Err(Fault::failed());
        }
        let gathered = self.gather();
        let report = self.write(&gathered);
        if report.is_err() {
            self.0.failed.store(true, Ordering::Release);
        }
        let report = report?;
        let mut published = Vec::with_capacity(gathered.len());
        for queued in gathered {
            for news in queued.wakes {
                match news {
                    Wake::Timers => self.0.timer_set.notify_one(),
                    Wake::Users(_)
                    | Wake::Sharing { .. }
                    | Wake::InRooms { .. }
                    | Wake::Joined { .. }
                    | Wake::Left { .. }
                    | Wake::Listed { .. }
                    | Wake::Ended { .. }
                    | Wake::Locked { .. } => wake(news),
                }
            }
            queued.promise.keep();
            published.push((queued.number, queued.bytes, queued.changes));
        }
        self.forget(&published);
        Ok(report)
    }

    fn write(&self, gathered: &[Queued]) -> Result<Flushed, Fault> {
        let rows: usize = gathered.iter().map(|queued| queued.changes.len()).sum();
        let mut report = Flushed { batches: gathered.len(), rows, ..Flushed::default() };
        let Some(newest) = gathered.last() else { return Ok(report) };
        if rows == 0 && newest.number == self.0.published.load().batch_number {
            // There are barriers only, behind what is published already.
            return Ok(report);
        }
        report.bytes = gathered.iter().map(|queued| queued.bytes).sum();
        let (position, batch_number) = (newest.last, newest.number);
        let mut head = head::rows(position, batch_number);
        let reserves = self.0.reserved.reserve(self.0.durability, position, batch_number, &mut head);
        let has_commit = gathered.iter().any(|queued| queued.is_commit);
        report.synced = reserves || (has_commit && self.0.durability == Durability::Fsync);
        debug_assert!(position >= self.0.published.load().position, "positions fall");
        debug_assert!(batch_number >= self.0.published.load().batch_number, "batch numbers fall");
        let changes = gathered.iter().flat_map(|queued| &queued.changes).chain(&head);
        self.0.engine.write(changes, report.synced)?;
        let clock_ms = Arc::clone(&self.0.clock_ms);
        let snapshot = Snapshot::new(self.0.engine.snapshot(), position, batch_number, clock_ms);
        self.0.published.swap(Arc::new(snapshot)).supersede();
        Ok(report)
    }

    fn gather(&self) -> Vec<Queued> {
        let mut queue = self.0.queue.lock();
        let mut gathered = Vec::with_capacity(queue.batches.len());
        let (mut bytes, mut rows) = (0, 0);
        while let Some(next) = queue.batches.pop_front() {
            bytes += next.bytes;
            rows += next.changes.len();
            if !gathered.is_empty() && (bytes > FLUSH_BYTES_MAX || rows > FLUSH_ROWS_MAX) {
                queue.batches.push_front(next);
                break;
            }
            gathered.push(next);
        }
        if !queue.batches.is_empty() {
            self.0.wanted.notify_one();
        }
        gathered
    }

    /// Published rows need no longer be laid over the snapshot. They are dropped in parts, so that nobody waits long for the queue.
    fn forget(&self, published: &[(u64, usize, Vec<Change>)]) {
        let mut layers = Vec::new();
        let mut queue = self.0.queue.lock();
        for (number, bytes, changes) in published {
            layers.extend(queue.pending.forget(*number, changes));
            queue.bytes = queue.bytes.saturating_sub(*bytes);
            MutexGuard::bump(&mut queue);
        }
    }
}
