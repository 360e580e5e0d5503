//! The results of recent resolutions: heads that stay as they are are resolved once.

use quick_cache::sync::Cache;

use crate::{ids::RoomNum, rooms::state::Ref};

/// How many results are kept.
const RESULTS_MAX: usize = 10_000;

/// Recent results, by room and the states that were resolved. References never change what they mean, so results stay
/// true until a purge.
#[derive(Debug)]
pub struct Recent {
    results: Cache<(RoomNum, Vec<Ref>), Ref>,
}

impl Default for Recent {
    fn default() -> Self {
        Self { results: Cache::new(RESULTS_MAX) }
    }
}

impl Recent {
    /// What these states resolved to, if it is still known. They are canonical, in any order.
    pub fn find(&self, room: RoomNum, states: &[Ref]) -> Option<Ref> {
        self.results.get(&(room, sorted(states)))
    }

    /// Keeps a result. Only after the store accepted the batch that made it, and with settled references.
    pub fn keep(&self, room: RoomNum, states: &[Ref], result: Ref) {
        self.results.insert((room, sorted(states)), result);
    }

    /// Forgets a room's results: before side states of it go.
    pub fn forget(&self, room: RoomNum) {
        self.results.retain(|(of, _), _| *of != room);
    }
}

fn sorted(states: &[Ref]) -> Vec<Ref> {
    let mut states = states.to_vec();
    states.sort_unstable();
    states.dedup();
    states
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::SideNum;

    #[test]
    fn a_result_is_found_whatever_the_order_of_its_states_until_its_room_is_forgotten() {
        let (recent, room) = (Recent::default(), RoomNum(3));
        let [a, b, c] = [1, 2, 3].map(|side| Ref::Side(SideNum(side)));
        recent.keep(room, &[b, a, b], c);
        assert_eq!(recent.find(room, &[a, b]), Some(c));
        assert_eq!(recent.find(room, &[a]), None);
        assert_eq!(recent.find(RoomNum(4), &[a, b]), None);
        recent.forget(room);
        assert_eq!(recent.find(room, &[a, b]), None);
    }
}
