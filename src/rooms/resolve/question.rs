//! What is to be resolved, in a form that means the same until it is answered, however the room goes on meanwhile.

use std::{collections::BTreeSet, sync::Arc};

use super::Header;
use crate::{
    ids::{EventNum, Position, RoomNum, StateKeyNum},
    rooms::{
        event::Event,
        state::{Sketch, Val},
    },
    schema::rooms::EventHash,
    store::{Fault, Read},
};

/// Stands for an event that has no number yet. (Numbers are below 2^40.)
pub const NEWCOMER: EventNum = EventNum((1 << 40) - 1);
/// Stands for its state key, where the room never used that.
const NEW_KEY: StateKeyNum = StateKeyNum(u32::MAX);

/// A state event that is coming in: it is part of one of the states, and not stored.
#[derive(Debug)]
pub struct Newcomer {
    pub(super) hash: EventHash,
    pub(super) header: Header,
    pub(super) event: Event,
}

impl Newcomer {
    /// An event with what resolution has to know of it. `key` is the number of its state key, if that has one.
    pub fn new(
        hash: EventHash,
        event: Event,
        key: Option<StateKeyNum>,
        auth_depth: u64,
        auth: Vec<EventNum>,
    ) -> Self {
        Self { hash, header: Header { key: key.unwrap_or(NEW_KEY), auth_depth, auth }, event }
    }

    /// The state after it, if this is the state before it.
    pub fn after(&self, before: &Sketch) -> Sketch {
        before.with([(self.header.key, Val::Event(NEWCOMER))])
    }

    /// The state that this one means now that the event is `num` and its key `key`.
    pub fn settle(&self, state: &Sketch, key: StateKeyNum, num: EventNum) -> Sketch {
        let named = |(of, val): &(StateKeyNum, Val)| {
            let of = if *of == self.header.key { key } else { *of };
            (of, if *val == Val::Event(NEWCOMER) { Val::Event(num) } else { *val })
        };
        Sketch::from(state.base).with(state.changes.iter().map(named))
    }
}

/// States to be resolved.
#[derive(Debug, Clone)]
pub struct Question {
    /// Distinct and rising.
    states: Vec<Sketch>,
    newcomer: Option<Arc<Newcomer>>,
}

/// What makes questions of a room the same.
pub(super) type QuestionKey = (RoomNum, Vec<Sketch>, Option<EventHash>);

impl Question {
    /// What these states resolve to. `newcomer` is the event that some of them hold as [`NEWCOMER`].
    pub fn new(
        read: &(impl Read + ?Sized),
        room: RoomNum,
        states: impl IntoIterator<Item = Sketch>,
        newcomer: Option<Arc<Newcomer>>,
    ) -> Result<Self, Fault> {
        let mut distinct = BTreeSet::new();
        for state in states {
            distinct.insert(state.canonical(read, room)?);
        }
        Ok(Self { states: distinct.into_iter().collect(), newcomer })
    }

    /// The states, distinct.
    pub fn states(&self) -> &[Sketch] {
        &self.states
    }

    /// The answer, where there is nothing to resolve.
    pub fn only(&self) -> Option<&Sketch> {
        match self.states.as_slice() {
            [only] => Some(only),
            _ => None,
        }
    }

    /// The event that is coming in, if a state holds it.
    pub fn newcomer(&self) -> Option<&Newcomer> {
        self.newcomer.as_deref()
    }

    /// With settled positions, once the batch's first position is known.
    #[must_use]
    pub fn settle(mut self, base: Position) -> Self {
        self.states = self.states.into_iter().map(|state| state.settle(base)).collect();
        self
    }

    pub(super) fn key(&self, room: RoomNum) -> QuestionKey {
        (room, self.states.clone(), self.newcomer.as_ref().map(|newcomer| newcomer.hash))
    }
}
