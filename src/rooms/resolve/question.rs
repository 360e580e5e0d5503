//! Questions: the states that are to be resolved, in a form that means the same until they are answered, however the
//! room goes on meanwhile.

use std::{collections::BTreeSet, sync::Arc};

use super::Header;
use crate::{
    ids::{EventNum, Position, RoomNum},
    rooms::{
        event::Event,
        state::{Sketch, StateValue},
    },
    store::{Fault, Read},
};

/// A state event that is coming in: one of the states holds it, and the store does not yet. Its number and that of its
/// state key were taken for it and are given to no other event.
#[derive(Debug)]
pub struct Newcomer {
    pub(super) num: EventNum,
    pub(super) header: Header,
    pub(super) event: Arc<Event>,
}

impl Newcomer {
    /// An event, with the numbers that resolution looks at.
    pub fn new(num: EventNum, event: Event, header: Header) -> Self {
        Self { num, header, event: Arc::new(event) }
    }

    /// Gives the state after the event, from the state before it.
    pub fn after(&self, before: &Sketch) -> Sketch {
        before.with([(self.header.key, StateValue::Event(self.num))])
    }
}

/// States to be resolved. Inside a turn they may name places of the batch that is being built, which mean something
/// else in every other batch.
#[derive(Debug, Clone)]
pub struct Question {
    /// The states are distinct and rising, so that equal questions are equal values.
    states: Vec<Sketch>,
    newcomer: Option<Arc<Newcomer>>,
    /// Whether these are the states that an event cites, and not those of the room's heads.
    is_of_cited: bool,
}

/// A question that names no place of a batch which is still being built, so that it may leave the turn that asks it.
#[derive(Debug, Clone)]
pub struct Settled(Question);

/// The key under which answers are remembered: two questions with the same key have the same answer.
pub(super) type QuestionKey = (RoomNum, Vec<Sketch>);

impl Question {
    /// Asks for the state that these states resolve to. `newcomer` is the event that some of them hold and the store
    /// does not.
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
        Ok(Self { states: distinct.into_iter().collect(), newcomer, is_of_cited: false })
    }

    /// The same question, asked for the state before an event that cites these states.
    #[must_use]
    pub fn of_cited(self) -> Self {
        Self { is_of_cited: true, ..self }
    }

    /// The distinct states, in rising order.
    pub fn states(&self) -> &[Sketch] {
        &self.states
    }

    /// Gives the answer, where only one state is left and nothing is to be resolved.
    pub fn only(&self) -> Option<&Sketch> {
        match self.states.as_slice() {
            [only] => Some(only),
            _ => None,
        }
    }

    /// The event that is coming in, if a state holds it.
    pub(super) fn newcomer(&self) -> Option<&Newcomer> {
        self.newcomer.as_deref()
    }

    /// Makes a settled question of it; gives the question back where it names a place of a batch that is being built.
    pub fn settled(self) -> Result<Settled, Self> {
        if self.states.iter().any(Sketch::is_pending) { Err(self) } else { Ok(Settled(self)) }
    }

    /// Settles the question, once the batch's first position is known.
    #[must_use]
    pub fn settle(mut self, base: Position) -> Settled {
        self.states = self.states.into_iter().map(|state| state.settle(base)).collect();
        Settled(self)
    }
}

impl Settled {
    /// The states, with the event that is coming in.
    pub fn question(&self) -> &Question {
        &self.0
    }

    /// Whether the states are those that an event cites: its sender chose them.
    pub fn is_of_cited(&self) -> bool {
        self.0.is_of_cited
    }

    pub(super) fn key(&self, room: RoomNum) -> QuestionKey {
        debug_assert!(!self.0.states.iter().any(Sketch::is_pending), "what is remembered is settled");
        (room, self.0.states.clone())
    }
}
