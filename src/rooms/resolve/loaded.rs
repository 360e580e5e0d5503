//! Events that one resolution has read, kept in memory for the next one that asks much the same: where a room's state
//! moves on while its heads are resolved beside it, they are resolved again in the room's turn, without reading.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;

use super::{EVENTS_AT_ONCE, HeaderAndEvent};
use crate::{ids::EventNum, rooms::event::Event};

/// State events of one room, in memory; at most [`EVENTS_AT_ONCE`].
#[derive(Debug, Default)]
pub struct Loaded(Mutex<BTreeMap<EventNum, HeaderAndEvent<Arc<Event>>>>);

impl Loaded {
    /// Gives the header and the event, if the event is held.
    pub(super) fn find(&self, event: EventNum) -> Option<HeaderAndEvent<Arc<Event>>> {
        self.0.lock().get(&event).cloned()
    }

    /// Holds an event, while there is space.
    pub(super) fn keep(&self, event: EventNum, found: HeaderAndEvent<Arc<Event>>) {
        let mut held = self.0.lock();
        if held.len() < EVENTS_AT_ONCE {
            held.insert(event, found);
        }
    }

    /// The number of events that are held.
    pub fn count(&self) -> usize {
        self.0.lock().len()
    }
}
