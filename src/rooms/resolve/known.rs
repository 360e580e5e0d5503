//! The events that a resolution has read: a bound on how many different ones it may ask for in all, and one on how many
//! are in memory at once. An event that memory has let go is read again, so that a large conflict costs time and not
//! memory.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    hash::Hash,
    sync::Arc,
};

use quick_cache::{OptionsBuilder, Weighter, unsync::Cache};
use ruma::state_res;

use super::{Bounds, Header, NotResolved, Source};
use crate::{ids::EventNum, store::Fault};

/// Read at most this many events from the store together.
const LOADED_AT_ONCE: usize = 500;
/// A run of events that is read together takes at most this part of memory, so that it does not push itself out.
const RUN_PART: usize = 8;
/// Headers are small, so this many times as many headers as events may be in memory at once.
const HEADERS_AN_EVENT: usize = 4;
/// An event with more content than this many bytes counts as several in memory.
const BYTES_AN_EVENT: usize = 2_048;

/// A memory of bounded size. Above the bound it lets go what was not asked for again since it came, or not for long.
pub(super) struct Memo<K, T: Clone>(RefCell<Cache<K, T, Weigh<T>>>);

/// Tells what a value counts against the bound.
#[derive(Clone)]
struct Weigh<T: Clone>(fn(&T) -> u64);

impl<K, T: Clone> Weighter<K, T> for Weigh<T> {
    fn weight(&self, _: &K, value: &T) -> u64 {
        (self.0)(value)
    }
}

impl<K: Eq + Hash, T: Clone> Memo<K, T> {
    /// Holds at most this many values.
    pub(super) fn new(held_max: usize) -> Self {
        Self::weighed(held_max, |_| 1)
    }

    fn weighed(held_max: usize, weigh: fn(&T) -> u64) -> Self {
        let (held_max, weigh) = (held_max.max(1), Weigh(weigh));
        // Half of the space is for what is new: a walk often comes back to what it has just read.
        let options = OptionsBuilder::new()
            .estimated_items_capacity(held_max)
            .weight_capacity(held_max as u64)
            .hot_allocation(0.5)
            .build();
        Self(RefCell::new(match options {
            Ok(options) => Cache::with_options(options, weigh, Default::default(), Default::default()),
            Err(_) => Cache::with_weighter(held_max, held_max as u64, weigh),
        }))
    }

    /// Finds a value that is still held.
    pub(super) fn find(&self, key: &K) -> Option<T> {
        self.0.borrow().get(key).cloned()
    }

    /// Holds a value for a while.
    pub(super) fn keep(&self, key: K, value: T) {
        self.0.borrow_mut().insert(key, value);
    }

    fn has(&self, key: &K) -> bool {
        self.0.borrow().contains_key(key)
    }
}

/// The different events that were asked for. Events that came one after the other share a word.
#[derive(Default)]
struct Seen {
    words: BTreeMap<u64, u64>,
    count: usize,
}

impl Seen {
    fn note(&mut self, EventNum(event): EventNum) {
        let (word, bit) = (self.words.entry(event / 64).or_insert(0), 1 << (event % 64));
        if *word & bit == 0 {
            *word |= bit;
            self.count += 1;
        }
    }
}

/// Tells as how many events this one counts in memory.
pub(super) fn weight(event: Option<&impl state_res::Event>) -> u64 {
    let bytes = event.map_or(0, |event| event.content().get().len());
    1 + (bytes / BYTES_AN_EVENT) as u64
}

/// A source with a bounded memory of what it gave.
pub(super) struct Known<'s, S: Source> {
    source: &'s S,
    headers: Memo<EventNum, Option<Arc<Header>>>,
    events: Memo<EventNum, Option<Arc<S::Event>>>,
    seen: RefCell<Seen>,
    /// The number of reads of events and headers, also of those that memory had let go.
    reads: Cell<usize>,
    bounds: Bounds,
}

impl<'s, S: Source> Known<'s, S> {
    /// Reads and holds as many events as the bounds allow.
    pub(super) fn new(source: &'s S, bounds: Bounds) -> Self {
        Self {
            source,
            headers: Memo::new(bounds.held_max.saturating_mul(HEADERS_AN_EVENT)),
            events: Memo::weighed(bounds.held_max, |event: &Option<Arc<S::Event>>| weight(event.as_deref())),
            seen: RefCell::default(),
            reads: Cell::new(0),
            bounds,
        }
    }

    /// The number of events and headers that were read.
    pub(super) fn count(&self) -> usize {
        self.reads.get()
    }

    /// The number of events that a walk should load at once.
    pub(super) fn run_len(&self) -> usize {
        LOADED_AT_ONCE.min(self.bounds.held_max / RUN_PART).max(1)
    }

    /// Reads those of these events that are not in memory, together. At most [`Self::run_len`] at once stay there.
    pub(super) fn load(&self, events: &[EventNum]) -> Result<(), NotResolved> {
        let unknown: Vec<EventNum> = events.iter().copied().filter(|event| !self.events.has(event)).collect();
        for event in &unknown {
            self.note(*event)?;
        }
        for part in unknown.chunks(self.run_len()) {
            for (event, (header, parsed)) in part.iter().zip(self.source.find_many(part)?) {
                self.reads.set(self.reads.get() + 2);
                self.headers.keep(*event, header.map(Arc::new));
                self.events.keep(*event, parsed.map(Arc::new));
            }
        }
        Ok(())
    }

    /// Whether the header is in memory.
    pub(super) fn has_header(&self, event: EventNum) -> bool {
        self.headers.has(&event)
    }

    /// Notes that an event is needed. Errors: [`NotResolved::TooMuch`] where too many others are needed already.
    fn note(&self, event: EventNum) -> Result<(), NotResolved> {
        let mut seen = self.seen.borrow_mut();
        seen.note(event);
        if seen.count > self.bounds.events_max { Err(NotResolved::TooMuch) } else { Ok(()) }
    }

    /// Finds the header of a state event.
    pub(super) fn find_header(&self, event: EventNum) -> Result<Option<Arc<Header>>, NotResolved> {
        self.remembered(&self.headers, event, |source| source.find_header(event))
    }

    /// Gives the header of an event that another one names, so that it must be there.
    pub(super) fn require_header(&self, event: EventNum) -> Result<Arc<Header>, NotResolved> {
        let missing = NotResolved::Fault(Fault::Corrupt("an event that another one rests on is missing"));
        self.find_header(event)?.ok_or(missing)
    }

    /// Finds a state event, as the authorization rules see it.
    pub(super) fn find_event(&self, event: EventNum) -> Result<Option<Arc<S::Event>>, NotResolved> {
        self.remembered(&self.events, event, |source| source.find_event(event))
    }

    /// Gives an event that another one names, so that it must be there.
    pub(super) fn require_event(&self, event: EventNum) -> Result<Arc<S::Event>, NotResolved> {
        let missing = NotResolved::Fault(Fault::Corrupt("an event that another one rests on is missing"));
        self.find_event(event)?.ok_or(missing)
    }

    fn remembered<T>(
        &self,
        memo: &Memo<EventNum, Option<Arc<T>>>,
        event: EventNum,
        find: impl FnOnce(&S) -> Result<Option<T>, Fault>,
    ) -> Result<Option<Arc<T>>, NotResolved> {
        if let Some(found) = memo.find(&event) {
            return Ok(found);
        }
        self.note(event)?;
        self.reads.set(self.reads.get() + 1);
        let found = find(self.source)?.map(Arc::new);
        memo.keep(event, found.clone());
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rooms::event::Event;

    /// A source that has no event, and counts how often it is asked.
    struct Nothing(Cell<usize>);

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
        let source = Nothing(Cell::new(0));
        let known = Known::new(&source, Bounds { events_max: 1_000, held_max: 100 });
        for number in 0..300 {
            known.find_event(EventNum(number)).unwrap();
            assert!(known.events.0.borrow().len() <= 100);
        }
        assert_eq!(source.0.get(), 300);
        for number in 0..300 {
            known.find_event(EventNum(number)).unwrap();
        }
        assert!((500..=600).contains(&source.0.get()), "{}", source.0.get());
    }

    #[test]
    fn what_is_asked_for_again_and_again_stays_in_memory() {
        let source = Nothing(Cell::new(0));
        let known = Known::new(&source, Bounds { events_max: 10_000, held_max: 100 });
        for number in 0..5_000 {
            known.find_event(EventNum(number)).unwrap();
            for popular in 0..10 {
                known.find_event(EventNum(10_000 + popular)).unwrap();
            }
        }
        assert!(source.0.get() < 5_100, "{}", source.0.get());
    }

    #[test]
    fn no_more_different_events_are_read_than_allowed_however_often_they_are() {
        let source = Nothing(Cell::new(0));
        let known = Known::new(&source, Bounds { events_max: 30, held_max: 3 });
        for number in (0..30).chain(0..30) {
            known.find_event(EventNum(number)).unwrap();
            known.find_header(EventNum(number)).unwrap();
        }
        assert!(source.0.get() > 60, "memory is small, so it read some again");
        let before = source.0.get();
        assert_eq!(known.find_event(EventNum(99)).unwrap_err(), NotResolved::TooMuch);
        assert_eq!(source.0.get(), before);
        let known = Known::new(&source, Bounds::of(3));
        assert_eq!(known.load(&[1, 2, 3, 4].map(EventNum)), Err(NotResolved::TooMuch));
    }
}
