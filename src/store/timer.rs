//! Durable timers: what must happen later, whatever happens to the process meanwhile.
//!
//! A timer is a row. The batch that carries its effect deletes it, and is accepted only if it is still there: so it
//! fires once, however often the worker tries. A clock that goes back fires late, one that jumps forward at once, but
//! never more than [`FIRED_A_SECOND_MAX`] a second.

use bytes::Bytes;

use crate::store::{Batch, Direction, Fault, Read, tables};

/// However many are due.
pub const FIRED_A_SECOND_MAX: usize = 500;

/// What a timer is for: which worker knows what its key means. Numbers are for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum TimerKind {
    /// The log is trimmed. No key.
    TrimLog = 1,
    /// The rooms of a user are told of a change of the user's. The key is the user's number.
    TellRooms = 2,
    /// A user's settings for a room are carried over to the one that replaces it. The key is the user and the new room.
    CarryOver = 3,
    /// What an event said before it was redacted is forgotten. The key is the room's number and the event's.
    ForgetOriginal = 4,
}

impl TimerKind {
    fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::TrimLog),
            2 => Some(Self::TellRooms),
            3 => Some(Self::CarryOver),
            4 => Some(Self::ForgetOriginal),
            _ => None,
        }
    }
}

/// A timer that is set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timer {
    /// When it is due, in milliseconds since the epoch.
    pub due_ms: u64,
    /// What it is for.
    pub kind: TimerKind,
    /// What it is about; (due, kind, key) names the timer.
    pub key: Vec<u8>,
    /// What the worker needs to know.
    pub content: Bytes,
}

/// Sets a timer. Setting the same one again replaces its content. When it is published, whoever waits for
/// [`Store::timer_set`](crate::store::Store::timer_set) looks anew.
pub fn set(batch: &mut Batch, timer: &Timer) {
    batch.tell_timers();
    tables::TIMER.put(batch, (timer.due_ms, timer.kind as u8, &timer.key), &timer.content);
}

/// Takes a timer back; nothing happens when it has fired.
pub fn cancel(batch: &mut Batch, timer: &Timer) {
    tables::TIMER.delete(batch, (timer.due_ms, timer.kind as u8, &timer.key));
}

/// Whether this timer is still set.
pub fn is_waiting(read: &(impl Read + ?Sized), timer: &Timer) -> Result<bool, Fault> {
    tables::TIMER.contains(read, (timer.due_ms, timer.kind as u8, &timer.key))
}

/// The batch is the effect of this timer: it deletes the timer, and is not accepted if somebody else was first.
pub fn fire(batch: &mut Batch, timer: &Timer) {
    let key = (timer.due_ms, timer.kind as u8, &*timer.key);
    tables::TIMER.expect_value(batch, key, &timer.content);
    tables::TIMER.delete(batch, key);
}

/// The timers that are due, oldest first, at most `timers_max`. Those of a kind that this version does not know wait
/// for one that does.
pub fn list_due(read: &(impl Read + ?Sized), now_ms: u64, timers_max: usize) -> Result<Vec<Timer>, Fault> {
    let mut due = Vec::new();
    for row in tables::TIMER.prefix::<()>(read, (), Direction::Up)? {
        let ((due_ms, kind, key), content) = row?;
        if due_ms > now_ms || due.len() >= timers_max {
            break;
        }
        if let Some(kind) = TimerKind::from_number(kind) {
            due.push(Timer { due_ms, kind, key, content });
        }
    }
    Ok(due)
}

/// When the next timer is due, of those of a known kind; none when none is set.
pub fn find_next_due_ms(read: &(impl Read + ?Sized)) -> Result<Option<u64>, Fault> {
    for row in tables::TIMER.prefix::<()>(read, (), Direction::Up)? {
        let ((due_ms, kind, _), _) = row?;
        if TimerKind::from_number(kind).is_some() {
            return Ok(Some(due_ms));
        }
    }
    Ok(None)
}

/// Whether a timer of this kind is set.
pub fn is_set(read: &(impl Read + ?Sized), kind: TimerKind) -> Result<bool, Fault> {
    for row in tables::TIMER.prefix::<()>(read, (), Direction::Up)? {
        if row?.0.1 == kind as u8 {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Durability, Engine, NotAccepted, Store, engine::Memory};

    fn timer(due_ms: u64, key: &str) -> Timer {
        Timer { due_ms, kind: TimerKind::TrimLog, key: key.into(), content: Bytes::from_static(b"content") }
    }

    fn commit(store: &Store, change: impl Fn(&mut Batch)) -> Result<(), NotAccepted> {
        let mut batch = store.batch();
        change(&mut batch);
        drop(store.enqueue(batch)?);
        store.flush().unwrap();
        Ok(())
    }

    #[test]
    fn a_timer_fires_when_it_is_due_and_once() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        commit(&store, |batch| {
            set(batch, &timer(20, "late"));
            set(batch, &timer(10, "early"));
            set(batch, &timer(10, "cancelled"));
            // Of a kind that is not known yet.
            tables::TIMER.put(batch, (1, 255, b"future"), &Bytes::new());
        })
        .unwrap();
        commit(&store, |batch| cancel(batch, &timer(10, "cancelled"))).unwrap();
        assert_eq!(find_next_due_ms(&*store.snapshot()).unwrap(), Some(10));
        assert_eq!(list_due(&*store.snapshot(), 9, 9).unwrap(), []);
        assert_eq!(list_due(&*store.snapshot(), 10, 9).unwrap(), [timer(10, "early")]);
        // The clock jumps: all at once, within the bound.
        assert_eq!(list_due(&*store.snapshot(), 99, 1).unwrap(), [timer(10, "early")]);
        assert_eq!(list_due(&*store.snapshot(), 99, 9).unwrap(), [timer(10, "early"), timer(20, "late")]);
        commit(&store, |batch| fire(batch, &timer(10, "early"))).unwrap();
        let again = commit(&store, |batch| fire(batch, &timer(10, "early")));
        assert!(matches!(again, Err(NotAccepted::Conflict(_))));
        assert_eq!(list_due(&*store.snapshot(), 99, 9).unwrap(), [timer(20, "late")]);
        assert!(is_set(&*store.snapshot(), TimerKind::TrimLog).unwrap());
    }
}
