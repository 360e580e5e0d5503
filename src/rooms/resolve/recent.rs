//! The results of recent resolutions: heads that stay the same are resolved once, and a result that was worked out
//! beside a room is at hand when its turn comes.

use quick_cache::{OptionsBuilder, Weighter, sync::Cache};

use super::question::QuestionKey;
use crate::{
    ids::RoomNum,
    ids::StateKeyNum,
    rooms::state::{Sketch, StateRef, StateValue},
};

/// All results together take at most about this many bytes.
pub(crate) const RESULTS_BYTES_MAX: u64 = 16 << 20;
/// At most this many results are kept, however small they are.
const RESULTS_MAX: usize = 10_000;

/// Recent results, by room and the states that were resolved. References never change their meaning, so a result stays true
/// as long as the side states are there that it names: whoever deletes some forgets the room's results before.
pub struct Recent {
    results: Cache<QuestionKey, Sketch, Bytes>,
}

/// Weighs a result: about how many bytes it takes with its key.
#[derive(Clone)]
struct Bytes;

impl Weighter<QuestionKey, Sketch> for Bytes {
    fn weight(&self, (_, states): &QuestionKey, result: &Sketch) -> u64 {
        let entry = size_of::<(StateKeyNum, StateValue)>();
        let bytes = |sketch: &Sketch| size_of::<Sketch>() + sketch.changes.len() * entry;
        let states: usize = states.iter().map(bytes).sum();
        (size_of::<(QuestionKey, StateRef)>() + states + bytes(result)) as u64
    }
}

impl Default for Recent {
    fn default() -> Self {
        Self::of(RESULTS_BYTES_MAX)
    }
}

impl Recent {
    fn of(bytes_max: u64) -> Self {
        // The cache has one part, so that a large result fits, with space for new results beside those that were asked
        // for again.
        let options = OptionsBuilder::new()
            .shards(1)
            .estimated_items_capacity(RESULTS_MAX)
            .weight_capacity(bytes_max)
            .hot_allocation(0.5)
            .build();
        let results = match options {
            Ok(options) => Cache::with_options(options, Bytes, Default::default(), Default::default()),
            Err(_) => Cache::with_weighter(RESULTS_MAX, bytes_max, Bytes),
        };
        Self { results }
    }

    /// Finds the result for a key, if it is still remembered.
    pub(super) fn find(&self, key: &QuestionKey) -> Option<Sketch> {
        self.results.get(key)
    }

    /// Keeps a result, whose references are settled and accepted by the store.
    pub(super) fn keep(&self, key: QuestionKey, result: Sketch) {
        debug_assert!(!result.is_pending(), "what is remembered is settled");
        self.results.insert(key, result);
    }

    /// Forgets a room's results, before a sweep deletes side states that they may name.
    pub fn forget(&self, room: RoomNum) {
        self.results.retain(|(of, _), _| *of != room);
    }

    /// Tells about how many bytes the results take; never more than 16 MiB.
    pub fn byte_count(&self) -> u64 {
        self.results.weight()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{EventNum, SideNum};

    fn side(number: u32) -> Sketch {
        StateRef::Side(SideNum(number)).into()
    }

    #[test]
    fn a_result_is_found_until_its_room_is_forgotten() {
        let (recent, room) = (Recent::default(), RoomNum(3));
        let key = |room, states: &[u32]| (room, states.iter().map(|number| side(*number)).collect());
        recent.keep(key(room, &[1, 2]), side(3));
        recent.keep(key(RoomNum(4), &[1, 2]), side(2));
        assert_eq!(recent.find(&key(room, &[1, 2])), Some(side(3)));
        assert_eq!(recent.find(&key(room, &[1])), None);
        recent.forget(room);
        assert_eq!(recent.find(&key(room, &[1, 2])), None);
        assert_eq!(recent.find(&key(RoomNum(4), &[1, 2])), Some(side(2)));
    }

    #[test]
    fn many_and_large_results_stay_within_the_bound() {
        let bytes_max = 1 << 20;
        let recent = Recent::of(bytes_max);
        for number in 0..2_000_u32 {
            let size = if number % 50 == 0 { 20_000 } else { 100 };
            let changes = (0..size).map(|key| (StateKeyNum(key), StateValue::Event(EventNum(number.into()))));
            let key = (RoomNum(1), vec![side(number)]);
            recent.keep(key.clone(), side(0).with(changes));
            assert!(recent.find(&key).is_some(), "what is new is there for whoever asked for it: {number}");
            assert!(recent.byte_count() <= bytes_max);
        }
    }
}
