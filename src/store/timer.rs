//! Durable timers: what must happen later, whatever happens to the process meanwhile.
//!
//! A timer is a row. The batch that carries its effect deletes it, and is accepted only if it is still there: so it
//! fires once, however often somebody tries. A clock that goes back fires late, one that jumps forward at once, but
//! never more than [`FIRED_A_SECOND_MAX`] a second.
//!
//! The store knows a timer's kind by its number only: `src/schema/jobs.rs` says what each is for.

pub use crate::store::timer_row::TimerRow;

use crate::store::{Batch, Direction, Fault, Read, Wake, Write, tables};

/// At most this many timers fire in a second, however many are due.
pub const FIRED_A_SECOND_MAX: usize = 500;

/// A timer as it is set and found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timer {
    /// When it is due, in milliseconds since the epoch.
    pub due_ms: u64,
    /// The number of its kind, for ever.
    pub kind: u8,
    /// The thing it is about; (due, kind, key) names the timer.
    pub key: Vec<u8>,
    /// The rest of its row: how often it has failed, and what the worker needs to know.
    pub row: TimerRow,
}

/// Sets a timer. Setting the same one again replaces its row. When it is published, whoever waits for
/// [`Store::timer_set`](crate::store::Store::timer_set) looks anew.
pub fn set(batch: &mut Batch, timer: &Timer) {
    batch.wake(Wake::Timers);
    tables::TIMER.put(batch, (timer.due_ms, timer.kind, &timer.key), &timer.row);
}

/// Takes a timer back; nothing happens when it has fired.
pub fn cancel(to: &mut impl Write, timer: &Timer) {
    tables::TIMER.delete(to, (timer.due_ms, timer.kind, &timer.key));
}

/// Whether this timer is still set.
pub fn is_waiting(read: &(impl Read + ?Sized), timer: &Timer) -> Result<bool, Fault> {
    let row = tables::TIMER.get(read, (timer.due_ms, timer.kind, &timer.key))?;
    Ok(row.as_ref() == Some(&timer.row))
}

/// Makes the batch the effect of this timer: it deletes the timer, and is not accepted if somebody else is first. The answer
/// is no if somebody else was first already: then there is nothing left to do.
pub fn fire(batch: &mut Batch, timer: &Timer) -> Result<bool, Fault> {
    let key = (timer.due_ms, timer.kind, &*timer.key);
    if tables::TIMER.expect_as_read(batch, key)?.as_ref() != Some(&timer.row) {
        return Ok(false);
    }
    tables::TIMER.delete(batch, key);
    Ok(true)
}

/// The timers that are due, oldest first, at most `timers_max`. Those of kinds that this version does not know wait for one
/// that does.
pub fn list_due(
    read: &(impl Read + ?Sized),
    now_ms: u64,
    timers_max: usize,
    is_known: impl Fn(u8) -> bool,
) -> Result<Vec<Timer>, Fault> {
    let mut due = Vec::new();
    for row in tables::TIMER.prefix::<()>(read, (), Direction::Up)? {
        let ((due_ms, kind, key), row) = row?;
        if due_ms > now_ms || due.len() >= timers_max {
            break;
        }
        if is_known(kind) {
            due.push(Timer { due_ms, kind, key, row });
        }
    }
    Ok(due)
}

/// When the next timer is due, of those of a known kind; none when none is set.
pub fn find_next_due_ms(
    read: &(impl Read + ?Sized),
    is_known: impl Fn(u8) -> bool,
) -> Result<Option<u64>, Fault> {
    for row in tables::TIMER.prefix::<()>(read, (), Direction::Up)? {
        let ((due_ms, kind, _), _) = row?;
        if is_known(kind) {
            return Ok(Some(due_ms));
        }
    }
    Ok(None)
}

/// Whether a timer of this kind is set. It looks at all timers: for the start of a server.
pub fn is_set(read: &(impl Read + ?Sized), kind: u8) -> Result<bool, Fault> {
    for row in tables::TIMER.prefix::<()>(read, (), Direction::Up)? {
        if row?.0.1 == kind {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::store::{
        Durability, Engine, Guard, NotAccepted, Store,
        engine::{Change, Memory},
        key::{Encoder, Value},
    };

    const KIND: u8 = 1;

    fn timer(due_ms: u64, key: &str) -> Timer {
        let row = TimerRow { tries: 0, content: Bytes::from_static(b"content") };
        Timer { due_ms, kind: KIND, key: key.into(), row }
    }

    fn store() -> Store {
        Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap()
    }

    fn commit(store: &Store, change: impl Fn(&mut Batch)) -> Result<(), NotAccepted> {
        let mut batch = store.batch(&Guard::own_tables());
        change(&mut batch);
        drop(store.enqueue(batch)?);
        store.flush().unwrap();
        Ok(())
    }

    #[test]
    fn a_timer_fires_when_it_is_due_and_once() {
        let store = store();
        let is_known = |kind| kind == KIND;
        commit(&store, |batch| {
            set(batch, &timer(20, "late"));
            set(batch, &timer(10, "early"));
            set(batch, &timer(10, "cancelled"));
            // A later version set this timer, whose kind is not known yet.
            tables::TIMER.put(batch, (1, 255, b"future"), &TimerRow::default());
        })
        .unwrap();
        commit(&store, |batch| cancel(batch, &timer(10, "cancelled"))).unwrap();
        let due = |now_ms, max| list_due(&*store.snapshot(), now_ms, max, is_known).unwrap();
        assert_eq!(find_next_due_ms(&*store.snapshot(), is_known).unwrap(), Some(10));
        assert_eq!(due(9, 9), []);
        assert_eq!(due(10, 9), [timer(10, "early")]);
        // The clock jumps, and all timers are due at once, within the bound.
        assert_eq!(due(99, 1), [timer(10, "early")]);
        assert_eq!(due(99, 9), [timer(10, "early"), timer(20, "late")]);
        // Two try at once, of whom one is accepted; a third who comes later learns at once that the timer has fired.
        let (mut first, mut second) = (store.batch(&Guard::own_tables()), store.batch(&Guard::own_tables()));
        for batch in [&mut first, &mut second] {
            assert!(fire(batch, &timer(10, "early")).unwrap());
        }
        drop(store.enqueue(first).unwrap());
        assert!(matches!(store.enqueue(second), Err(NotAccepted::Conflict(_))));
        store.flush().unwrap();
        assert!(!fire(&mut store.batch(&Guard::own_tables()), &timer(10, "early")).unwrap());
        assert_eq!(due(99, 9), [timer(20, "late")]);
        assert!(is_set(&*store.snapshot(), KIND).unwrap());
    }

    #[test]
    fn a_timer_of_the_first_layout_is_read_and_fires() {
        let store = store();
        let key = tables::TIMER.key_bytes::<(u64, u8, Vec<u8>)>((10, KIND, b"early")).bytes;
        let old = Change::Row(tables::TIMER.family, key.into(), Some(Bytes::from_static(b"\x01content")));
        store.engine().write([old].iter(), true).unwrap();
        // An empty batch publishes the row, so that it is seen.
        commit(&store, |_| ()).unwrap();
        let due = list_due(&*store.snapshot(), 10, 9, |_| true).unwrap();
        assert_eq!(due, [timer(10, "early")]);
        commit(&store, |batch| assert!(fire(batch, &due[0]).unwrap())).unwrap();
        assert_eq!(list_due(&*store.snapshot(), 10, 9, |_| true).unwrap(), []);
        let new = TimerRow { tries: 300, content: Bytes::from_static(b"content") };
        let mut bytes = Encoder::default();
        new.encode(&mut bytes);
        assert_eq!(TimerRow::decode(bytes.bytes.into()).unwrap(), new);
        assert!(TimerRow::decode(Bytes::from_static(b"\x03")).is_err());
    }
}
