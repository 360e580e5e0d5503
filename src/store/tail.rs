//! Reads the log from a cursor, and trims what no reader needs.
//!
//! Entries of events stay while their room does. The others go once the slowest reader has passed them, or after 30
//! days, whichever is first; a reader that was away for longer is told to look at everything again.

use std::ops::Bound;

use crate::{
    ids::Position,
    store::{Batch, Direction, Fault, Guard, LogEntry, Read, Store, cursor, tables},
};

/// The log waits this long for a reader, so that one that is gone does not keep it for ever.
pub const LOG_MS_MAX: u64 = 30 * 24 * HOUR_MS;
const HOUR_MS: u64 = 60 * 60 * 1000;
/// One call of [`trim`] reads at most this many entries, and deletes at most as many.
const TRIMMED_AT_ONCE: usize = 4_000;

/// The log as a reader finds it after its cursor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tail {
    /// The entries after the cursor, oldest first.
    Entries(Vec<(Position, LogEntry)>),
    /// Entries after the cursor are gone: the reader has to look at everything again, and to go on from here.
    Resync {
        /// The position from which the reader goes on.
        from: Position,
    },
}

/// Reads at most `entries_max` entries after a position.
pub fn read_after(
    read: &(impl Read + ?Sized),
    position: Position,
    entries_max: usize,
) -> Result<Tail, Fault> {
    if position < trimmed(read)? {
        tracing::debug!(%position, "a reader of the log looks at everything again: the log is trimmed");
        return Ok(Tail::Resync { from: read.upto() });
    }
    let (low, high) = (Bound::Excluded(position), Bound::Included(read.upto()));
    let entries = tables::LOG.range::<Position>(read, low, high, Direction::Up)?;
    let entries: Vec<_> = entries.take(entries_max).collect::<Result<_, _>>()?;
    debug_assert!(entries.is_sorted_by(|(one, _), (next, _)| one < next), "the log is read out of order");
    debug_assert!(entries.first().is_none_or(|(first, _)| *first > position), "the log is read again");
    Ok(Tail::Entries(entries))
}

/// Reads at most `entries_max` of the entries after a position that are still there: those of events are, as long as their
/// room is. This is for a reader that may miss all others.
pub fn read_kept_after(
    read: &(impl Read + ?Sized),
    position: Position,
    entries_max: usize,
) -> Result<Vec<(Position, LogEntry)>, Fault> {
    let (low, high) = (Bound::Excluded(position), Bound::Included(read.upto()));
    tables::LOG.range::<Position>(read, low, high, Direction::Up)?.take(entries_max).collect()
}

/// Entries at or before this position may be gone.
pub fn trimmed(read: &(impl Read + ?Sized)) -> Result<Position, Fault> {
    Ok(tables::LOG_TRIMMED.get(read, ())?.unwrap_or(Position::ZERO))
}

/// Gives the last position of which it is known that it was taken before this time; by the hour, and by the day for times that are longer
/// ago than [`LOG_MS_MAX`].
pub fn position_at(read: &(impl Read + ?Sized), time_ms: u64) -> Result<Position, Fault> {
    // The row of an hour was written at some time within it.
    let Some(hour) = (time_ms / HOUR_MS).checked_sub(1) else { return Ok(Position::ZERO) };
    let (low, high) = (Bound::Unbounded, Bound::Included(hour));
    let newest = tables::LOG_TIME.range::<u64>(read, low, high, Direction::Down)?.next().transpose()?;
    Ok(newest.map_or(Position::ZERO, |(_, position)| position))
}

/// Makes the batch that trims the log a little, and writes what time it is; none when there is nothing to do. Call it
/// again until there is none, and hourly.
pub fn trim(store: &Store, now_ms: u64) -> Result<Option<Batch>, Fault> {
    let snapshot = store.snapshot();
    let read = &*snapshot;
    let mut batch = store.batch(&Guard::own_tables());
    let hour = now_ms / HOUR_MS;
    if tables::LOG_TIME.get(&batch, hour)?.is_none() {
        tables::LOG_TIME.put(&mut batch, hour, &read.upto());
    }
    let trimmed = trimmed(&batch)?;
    let upto = trim_upto(read, now_ms, &mut batch)?;
    if upto > trimmed {
        let (low, high) = (Bound::Excluded(trimmed), Bound::Included(upto));
        let mut last = upto;
        let mut entries = tables::LOG.range::<Position>(read, low, high, Direction::Up)?;
        for entry in entries.by_ref().take(TRIMMED_AT_ONCE) {
            let (position, entry) = entry?;
            last = position;
            if !matches!(entry, LogEntry::Event { .. }) {
                tables::LOG.delete(&mut batch, position);
            }
        }
        if entries.next().is_none() {
            last = upto;
        }
        tables::LOG_TRIMMED.put(&mut batch, (), &last);
    }
    Ok((batch.row_count() > 0).then_some(batch))
}

/// The position up to which no reader needs the log any more, or has had 30 days to read it.
fn trim_upto(read: &impl Read, now_ms: u64, batch: &mut Batch) -> Result<Position, Fault> {
    let oldest_hour = now_ms.saturating_sub(LOG_MS_MAX) / HOUR_MS;
    let (low, high) = (Bound::Unbounded, Bound::Included(oldest_hour));
    let mut horizon = Position::ZERO;
    let hours = tables::LOG_TIME.range::<u64>(read, low, high, Direction::Down)?;
    for hour in hours.take(TRIMMED_AT_ONCE / 4) {
        let (hour, position) = hour?;
        horizon = horizon.max(position);
        // One row a day stays, by which it is known when something came in.
        if hour < oldest_hour && !hour.is_multiple_of(24) {
            tables::LOG_TIME.delete(batch, hour);
        }
    }
    Ok(cursor::slowest(read)?.unwrap_or(Position::ZERO).max(horizon))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::{EventNum, RoomNum, UserNum},
        store::{Durability, Engine, engine::Memory},
    };

    const DAY_MS: u64 = 24 * HOUR_MS;

    fn store() -> Store {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        for number in 1..=10 {
            let mut batch = store.batch(&Guard::alone());
            batch.position(&if number % 2 == 0 {
                LogEntry::Event { room: RoomNum(1), event: EventNum(number) }
            } else {
                LogEntry::Account { user: UserNum(number) }
            });
            drop(store.enqueue(batch).unwrap());
        }
        store.flush().unwrap();
        store
    }

    fn trim_all(store: &Store, now_ms: u64) {
        while let Some(batch) = trim(store, now_ms).unwrap() {
            drop(store.enqueue(batch).unwrap());
            store.flush().unwrap();
        }
    }

    fn positions(tail: Tail) -> Vec<u64> {
        let Tail::Entries(entries) = tail else { panic!("{tail:?}") };
        entries.into_iter().map(|(position, _)| position.number()).collect()
    }

    fn at(number: u64) -> Position {
        Position::new(number).unwrap()
    }

    #[test]
    fn a_reader_goes_on_from_its_cursor() {
        let store = store();
        assert_eq!(cursor::find(&*store.snapshot(), "push").unwrap(), None);
        let read = |after| positions(read_after(&*store.snapshot(), at(after), 3).unwrap());
        assert_eq!(read(0), [1, 2, 3]);
        assert_eq!(read(9), [10]);
        let mut note = store.note(&Guard::own_tables());
        cursor::advance(&mut note, "push", at(3));
        drop(store.enqueue_note(note).unwrap());
        store.flush().unwrap();
        assert_eq!(cursor::find(&*store.snapshot(), "push").unwrap(), Some(at(3)));
    }

    #[test]
    fn what_all_readers_have_passed_goes_except_events() {
        let store = store();
        let mut batch = store.batch(&Guard::alone());
        cursor::advance(&mut batch, "fast", at(9));
        cursor::advance(&mut batch, "slow", at(4));
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
        trim_all(&store, DAY_MS);
        let read = &*store.snapshot();
        assert_eq!(positions(read_after(read, at(4), 99).unwrap()), [5, 6, 7, 8, 9, 10]);
        assert_eq!(read_after(read, at(3), 99).unwrap(), Tail::Resync { from: at(10) });
        let kept = read_kept_after(read, at(1), 4).unwrap();
        assert_eq!(kept.iter().map(|(position, _)| position.number()).collect::<Vec<_>>(), [2, 4, 5, 6]);
        let left = tables::LOG.prefix::<()>(read, (), Direction::Up).unwrap();
        assert_eq!(left.map(|row| row.unwrap().0.number()).collect::<Vec<_>>(), [2, 4, 5, 6, 7, 8, 9, 10]);
        // With nothing new there is nothing to do.
        assert!(trim(&store, DAY_MS).unwrap().is_none());
    }

    #[test]
    fn after_thirty_days_the_log_waits_for_nobody() {
        let store = store();
        let mut batch = store.batch(&Guard::alone());
        cursor::advance(&mut batch, "asleep", at(1));
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
        trim_all(&store, DAY_MS);
        assert_eq!(trimmed(&*store.snapshot()).unwrap(), at(1));
        trim_all(&store, 29 * DAY_MS);
        assert_eq!(trimmed(&*store.snapshot()).unwrap(), at(1));
        trim_all(&store, 32 * DAY_MS);
        let read = &*store.snapshot();
        assert_eq!(trimmed(read).unwrap(), at(10));
        assert!(matches!(read_after(read, at(1), 9).unwrap(), Tail::Resync { .. }));
        // A clock that goes back harms nothing.
        trim_all(&store, DAY_MS);
    }

    #[test]
    fn without_readers_nothing_goes_early() {
        let store = store();
        trim_all(&store, DAY_MS);
        assert_eq!(trimmed(&*store.snapshot()).unwrap(), Position::ZERO);
    }
}
