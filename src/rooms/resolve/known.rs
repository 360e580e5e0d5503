//! The events that a resolution has read: a bound on how many it may read in all, and one on how many are in memory at
//! once.

use std::{cell::RefCell, collections::BTreeMap, sync::Arc};

use super::{EVENTS_AT_ONCE, Header, NotResolved, Source};
use crate::{ids::EventNum, store::Fault};

/// Read at most this many events from the store together.
const LOADED_AT_ONCE: usize = 500;
/// Headers are small, so this many times as many headers as events may be in memory at once.
const HEADERS_AN_EVENT: usize = 4;

/// The headers or the events that were read, by number; `None` where there is none.
struct Memo<T> {
    found: BTreeMap<EventNum, Option<Arc<T>>>,
    /// The number of reads in all, also of what memory has dropped since.
    read: usize,
    at_once_max: usize,
    read_max: usize,
}

impl<T> Memo<T> {
    fn new(at_once_max: usize, read_max: usize) -> Self {
        Self { found: BTreeMap::new(), read: 0, at_once_max, read_max }
    }

    /// Keeps an event that was read. Where memory is full, everything is dropped, and read again if it is asked for
    /// again: a large conflict costs time, and never more memory.
    fn keep(&mut self, event: EventNum, found: Option<Arc<T>>) -> Result<(), NotResolved> {
        if self.read >= self.read_max {
            return Err(NotResolved::TooMuch);
        }
        if self.found.len() >= self.at_once_max {
            self.found.clear();
        }
        self.read += 1;
        self.found.insert(event, found);
        debug_assert!(self.found.len() <= self.at_once_max, "the memory of a resolution is bounded");
        Ok(())
    }
}

/// A source with a bounded memory of what it gave.
pub(super) struct Known<'s, S: Source> {
    source: &'s S,
    headers: RefCell<Memo<Header>>,
    events: RefCell<Memo<S::Event>>,
}

impl<'s, S: Source> Known<'s, S> {
    /// Reads at most `events_max` events in all and as many headers, and holds at most [`EVENTS_AT_ONCE`] events.
    pub(super) fn new(source: &'s S, events_max: usize) -> Self {
        let at_once = EVENTS_AT_ONCE.min(events_max.max(1));
        let headers = Memo::new(at_once.saturating_mul(HEADERS_AN_EVENT), events_max);
        Self { source, headers: RefCell::new(headers), events: RefCell::new(Memo::new(at_once, events_max)) }
    }

    /// The number of events and headers that were read.
    pub(super) fn count(&self) -> usize {
        self.headers.borrow().read + self.events.borrow().read
    }

    /// Reads those of these events that are not known yet, many at a time, but no more than memory holds.
    pub(super) fn load(&self, events: &[EventNum]) -> Result<(), NotResolved> {
        let (mut headers, mut found) = (self.headers.borrow_mut(), self.events.borrow_mut());
        let mut unknown: Vec<EventNum> =
            events.iter().copied().filter(|event| !found.found.contains_key(event)).collect();
        if found.read + unknown.len() > found.read_max {
            return Err(NotResolved::TooMuch);
        }
        unknown.truncate(found.at_once_max.saturating_sub(found.found.len()));
        for part in unknown.chunks(LOADED_AT_ONCE) {
            for (event, (header, parsed)) in part.iter().zip(self.source.find_many(part)?) {
                headers.keep(*event, header.map(Arc::new))?;
                found.keep(*event, parsed.map(Arc::new))?;
            }
        }
        Ok(())
    }

    /// Finds the header of a state event.
    pub(super) fn find_header(&self, event: EventNum) -> Result<Option<Arc<Header>>, NotResolved> {
        remembered(&self.headers, event, || self.source.find_header(event))
    }

    /// Gives the header of an event that another one names, so that it must be there.
    pub(super) fn require_header(&self, event: EventNum) -> Result<Arc<Header>, NotResolved> {
        let missing = NotResolved::Fault(Fault::Corrupt("an event that another one rests on is missing"));
        self.find_header(event)?.ok_or(missing)
    }

    /// Finds a state event, as the authorization rules see it.
    pub(super) fn find_event(&self, event: EventNum) -> Result<Option<Arc<S::Event>>, NotResolved> {
        remembered(&self.events, event, || self.source.find_event(event))
    }

    /// Gives an event that another one names, so that it must be there.
    pub(super) fn require_event(&self, event: EventNum) -> Result<Arc<S::Event>, NotResolved> {
        let missing = NotResolved::Fault(Fault::Corrupt("an event that another one rests on is missing"));
        self.find_event(event)?.ok_or(missing)
    }
}

fn remembered<T>(
    memo: &RefCell<Memo<T>>,
    event: EventNum,
    find: impl FnOnce() -> Result<Option<T>, Fault>,
) -> Result<Option<Arc<T>>, NotResolved> {
    if let Some(found) = memo.borrow().found.get(&event) {
        return Ok(found.clone());
    }
    // A read beyond the bound could not be kept, so it is not even made.
    if memo.borrow().read >= memo.borrow().read_max {
        return Err(NotResolved::TooMuch);
    }
    let found = find()?.map(Arc::new);
    memo.borrow_mut().keep(event, found.clone())?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rooms::event::Event;

    /// A source that has no event, and counts how often it is asked.
    struct Nothing(std::cell::Cell<usize>);

    impl Source for Nothing {
        type Event = Event;

        fn find_header(&self, _: EventNum) -> Result<Option<Header>, Fault> {
            self.0.set(self.0.get() + 1);
            Ok(None)
        }

        fn find_event(&self, _: EventNum) -> Result<Option<Event>, Fault> {
            self.0.set(self.0.get() + 1);
            Ok(None)
        }
    }

    #[test]
    fn what_is_in_memory_is_bounded_and_what_went_is_read_again() {
        let source = Nothing(std::cell::Cell::new(0));
        let known = Known::new(&source, 10 * EVENTS_AT_ONCE);
        for number in 0..3 * EVENTS_AT_ONCE as u64 {
            known.find_event(EventNum(number)).unwrap();
            assert!(known.events.borrow().found.len() <= EVENTS_AT_ONCE);
        }
        assert_eq!(source.0.get(), 3 * EVENTS_AT_ONCE);
        known.find_event(EventNum(0)).unwrap();
        assert_eq!(source.0.get(), 3 * EVENTS_AT_ONCE + 1);
    }

    #[test]
    fn no_more_is_read_than_allowed() {
        let source = Nothing(std::cell::Cell::new(0));
        let known = Known::new(&source, 3);
        for number in 0..3 {
            known.find_event(EventNum(number)).unwrap();
        }
        assert_eq!(known.find_event(EventNum(9)).unwrap_err(), NotResolved::TooMuch);
        assert_eq!((source.0.get(), known.count()), (3, 3));
        assert_eq!(Known::new(&source, 3).load(&[1, 2, 3, 4].map(EventNum)), Err(NotResolved::TooMuch));
    }
}
