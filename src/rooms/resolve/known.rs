//! The events that a resolution has read, each once, and how many they may be.

use std::{cell::RefCell, collections::BTreeMap, sync::Arc};

use super::{Header, NotResolved, Source};
use crate::{ids::EventNum, store::Fault};

/// Events that are read at once.
const LOADED_AT_ONCE: usize = 500;

/// Events by number.
type Memo<T> = RefCell<BTreeMap<EventNum, Option<Arc<T>>>>;

/// A source with a bounded memory.
pub(super) struct Known<'s, S: Source> {
    source: &'s S,
    headers: Memo<Header>,
    events: Memo<S::Event>,
    events_max: usize,
}

impl<'s, S: Source> Known<'s, S> {
    /// Headers and events, at most `events_max` of each.
    pub(super) fn new(source: &'s S, events_max: usize) -> Self {
        Self { source, headers: RefCell::default(), events: RefCell::default(), events_max }
    }

    /// How many were read.
    pub(super) fn count(&self) -> usize {
        self.headers.borrow().len() + self.events.borrow().len()
    }

    /// Reads these events at once, those that are not known yet.
    pub(super) fn load(&self, events: &[EventNum]) -> Result<(), NotResolved> {
        let (mut headers, mut found) = (self.headers.borrow_mut(), self.events.borrow_mut());
        let unknown: Vec<EventNum> =
            events.iter().copied().filter(|event| !found.contains_key(event)).collect();
        if found.len() + unknown.len() > self.events_max {
            return Err(NotResolved::TooMuch);
        }
        for part in unknown.chunks(LOADED_AT_ONCE) {
            for (event, (header, parsed)) in part.iter().zip(self.source.find_many(part)?) {
                headers.insert(*event, header.map(Arc::new));
                found.insert(*event, parsed.map(Arc::new));
            }
        }
        Ok(())
    }

    /// The header of a state event.
    pub(super) fn find_header(&self, event: EventNum) -> Result<Option<Arc<Header>>, NotResolved> {
        remembered(&self.headers, event, self.events_max, || self.source.find_header(event))
    }

    /// The header of an event that something refers to.
    pub(super) fn require_header(&self, event: EventNum) -> Result<Arc<Header>, NotResolved> {
        let missing = NotResolved::Fault(Fault::Corrupt("an event that another one rests on is missing"));
        self.find_header(event)?.ok_or(missing)
    }

    /// A state event.
    pub(super) fn find_event(&self, event: EventNum) -> Result<Option<Arc<S::Event>>, NotResolved> {
        remembered(&self.events, event, self.events_max, || self.source.find_event(event))
    }

    /// An event that something refers to.
    pub(super) fn require_event(&self, event: EventNum) -> Result<Arc<S::Event>, NotResolved> {
        let missing = NotResolved::Fault(Fault::Corrupt("an event that another one rests on is missing"));
        self.find_event(event)?.ok_or(missing)
    }
}

fn remembered<T>(
    memo: &Memo<T>,
    event: EventNum,
    events_max: usize,
    find: impl FnOnce() -> Result<Option<T>, Fault>,
) -> Result<Option<Arc<T>>, NotResolved> {
    if let Some(found) = memo.borrow().get(&event) {
        return Ok(found.clone());
    }
    if memo.borrow().len() >= events_max {
        return Err(NotResolved::TooMuch);
    }
    let found = find()?.map(Arc::new);
    memo.borrow_mut().insert(event, found.clone());
    Ok(found)
}
