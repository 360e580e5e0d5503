//! Events that one resolution has read, kept in memory for the next one that asks much the same: where a room's state
//! moves on while its heads are resolved beside it, they are resolved again in the room's turn, without reading.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;

use super::{EVENTS_AT_ONCE, HeaderAndEvent, known, question::QuestionKey};
use crate::{
    ids::EventNum,
    rooms::{event::Event, state::Sketch},
};

/// State events of one room, in memory; at most [`EVENTS_AT_ONCE`], and fewer where they are large. The answer that was
/// worked out from them is there, too, because a large one may be more than the memory of recent results takes.
#[derive(Debug, Default)]
pub struct Loaded(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    events: BTreeMap<EventNum, HeaderAndEvent<Arc<Event>>>,
    weight: u64,
    answer: Option<(QuestionKey, Sketch)>,
}

impl Loaded {
    /// Gives the header and the event, if the event is held.
    pub(super) fn find(&self, event: EventNum) -> Option<HeaderAndEvent<Arc<Event>>> {
        self.0.lock().events.get(&event).cloned()
    }

    /// Holds an event, while there is space.
    pub(super) fn keep(&self, event: EventNum, found: HeaderAndEvent<Arc<Event>>) {
        let weight = known::weight(found.1.as_ref());
        let mut held = self.0.lock();
        if held.weight.saturating_add(weight) <= EVENTS_AT_ONCE as u64
            && held.events.insert(event, found).is_none()
        {
            held.weight += weight;
        }
    }

    /// Gives the answer, if it is that to this question.
    pub(super) fn find_answer(&self, key: &QuestionKey) -> Option<Sketch> {
        let held = self.0.lock();
        held.answer.as_ref().filter(|(of, _)| of == key).map(|(_, answer)| answer.clone())
    }

    pub(super) fn keep_answer(&self, key: QuestionKey, answer: Sketch) {
        self.0.lock().answer = Some((key, answer));
    }

    /// The number of events that are held.
    pub fn count(&self) -> usize {
        self.0.lock().events.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::{RoomNum, SideNum},
        rooms::state::StateRef,
    };

    #[test]
    fn events_are_held_up_to_the_bound_and_an_answer_for_its_question_only() {
        let loaded = Loaded::default();
        let numbers = || (1..=2 * EVENTS_AT_ONCE as u64).map(EventNum);
        for event in numbers().chain(numbers()) {
            loaded.keep(event, (None, None));
        }
        assert_eq!(loaded.count(), EVENTS_AT_ONCE);
        assert!(loaded.find(EventNum(1)).is_some(), "what was read first is held");
        assert!(loaded.find(EventNum(2 * EVENTS_AT_ONCE as u64)).is_none(), "the rest is read again");
        let side = |number| Sketch::from(StateRef::Side(SideNum(number)));
        let question = |number| (RoomNum(1), vec![side(number)]);
        for number in [1, 2] {
            loaded.keep_answer(question(number), side(10 + number));
        }
        assert_eq!(loaded.find_answer(&question(2)), Some(side(12)));
        assert_eq!(loaded.find_answer(&question(1)), None, "one answer is held");
    }
}
