//! The events that a resolution has read, each once, and how many they may be.

use std::{cell::RefCell, collections::BTreeMap, sync::Arc};

use super::{EVENTS_MAX, Header, NotResolved, Source};
use crate::{ids::EventNum, store::Fault};

/// Events by number.
type Memo<T> = RefCell<BTreeMap<EventNum, Option<Arc<T>>>>;

/// A source with a memory, bounded by [`EVENTS_MAX`].
pub(super) struct Known<'s, S: Source> {
    source: &'s S,
    headers: Memo<Header>,
    events: Memo<S::Event>,
}

impl<'s, S: Source> Known<'s, S> {
    pub(super) fn new(source: &'s S) -> Self {
        Self { source, headers: RefCell::default(), events: RefCell::default() }
    }

    /// The header of a state event.
    pub(super) fn find_header(&self, event: EventNum) -> Result<Option<Arc<Header>>, NotResolved> {
        remembered(&self.headers, event, || self.source.find_header(event))
    }

    /// The header of an event that something refers to.
    pub(super) fn require_header(&self, event: EventNum) -> Result<Arc<Header>, NotResolved> {
        let missing = NotResolved::Fault(Fault::Corrupt("an event that another one rests on is missing"));
        self.find_header(event)?.ok_or(missing)
    }

    /// A state event.
    pub(super) fn find_event(&self, event: EventNum) -> Result<Option<Arc<S::Event>>, NotResolved> {
        remembered(&self.events, event, || self.source.find_event(event))
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
    find: impl FnOnce() -> Result<Option<T>, Fault>,
) -> Result<Option<Arc<T>>, NotResolved> {
    if let Some(found) = memo.borrow().get(&event) {
        return Ok(found.clone());
    }
    if memo.borrow().len() >= EVENTS_MAX {
        return Err(NotResolved::TooMuch);
    }
    let found = find()?.map(Arc::new);
    memo.borrow_mut().insert(event, found.clone());
    Ok(found)
}
