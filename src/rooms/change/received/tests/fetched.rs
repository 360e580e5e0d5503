//! Events that are received by a state which was fetched in place of events that they cite, and the holes below them, against a server that
//! has everything.

use std::collections::BTreeSet;

use super::*;
use crate::{ids::Order, rooms::state::find_hole};

/// The state before an event, by the names of its keys.
type State = BTreeMap<(String, String), OwnedEventId>;

impl Fixture {
    fn num(&self, id: &OwnedEventId) -> Option<EventNum> {
        event::find_num(&*self.store.snapshot(), ROOM, id).unwrap()
    }

    fn has(&self, id: &OwnedEventId) -> bool {
        let place = self.num(id).map(|num| schema::PLACE.get(&*self.store.snapshot(), (ROOM, num)).unwrap());
        matches!(place.flatten(), Some(Place::Timeline(_) | Place::Aside))
    }

    /// Gives an event of the store as another server receives it.
    fn received(&self, id: &OwnedEventId) -> Received {
        let stored = event::require(&*self.store.snapshot(), ROOM, self.num(id).unwrap()).unwrap();
        let hash = crate::rooms::reference::hash(&stored.row.json, versions::find_rules(VERSION).unwrap());
        Received::check(ROOM, &self.row(), hash.unwrap(), stored.row.json.clone()).unwrap()
    }

    fn before(&self, id: &OwnedEventId) -> State {
        let (snapshot, row) = (self.store.snapshot(), self.row());
        let num = self.num(id).unwrap();
        let stored = event::require(&*snapshot, ROOM, num).unwrap();
        let before = match stored.row.header.before {
            Some(before) => before,
            None => state::just_below(&*snapshot, ROOM, stored.order).unwrap(),
        };
        let full = state::full(&*snapshot, ROOM, before).unwrap();
        let named = full.map(|entry| {
            let (key, num) = entry.unwrap();
            let name = state::key_name(&*snapshot, ROOM, key).unwrap().unwrap();
            (name, event::require(&*snapshot, ROOM, num).unwrap().id(&row))
        });
        named.collect()
    }

    /// Takes in the state before an event as another server has it; gives it as a difference from the room's.
    fn fetch(&mut self, there: &Fixture, id: &OwnedEventId) -> Sketch {
        let before = there.before(id);
        let mut needed: BTreeSet<EventNum> = BTreeSet::new();
        let mut open: Vec<OwnedEventId> = before.values().cloned().collect();
        while let Some(id) = open.pop() {
            if needed.insert(there.num(&id).unwrap()) {
                open.extend(there.received(&id).event().auth.iter().cloned());
            }
        }
        for num in needed {
            let row = there.row();
            let id = event::require(&*there.store.snapshot(), ROOM, num).unwrap().id(&row);
            let received = there.received(&id);
            let outcome = self.change(|change| change.receive_fetched(&received).unwrap());
            assert!(matches!(outcome, Outcome::Known(_) | Outcome::Outlier(_)), "{outcome:?}");
        }
        let snapshot = self.store.snapshot();
        let brought = before.values().map(|id| {
            let num = self.num(id).unwrap();
            (event::require(&*snapshot, ROOM, num).unwrap().row.header.state_key.unwrap(), num)
        });
        let tip = StateRef::Main(self.row().state_tip);
        let differing = state::differing_from(&*snapshot, ROOM, tip, &brought.collect()).unwrap();
        Sketch::from(tip).with(differing.into_iter().map(|(key, _, val)| (key, val)))
    }

    fn receive_with(&mut self, received: &Received, fetched: &Sketch) -> Outcome {
        let (now_ms, rooms) = (self.time_ms, self.rooms.clone());
        let mut has_taken = None;
        for _ in 0..4 {
            let step = self.change(|change| {
                change.receive_with(received, Some(fetched), has_taken, rooms.resolver(), now_ms).unwrap()
            });
            match step {
                Step::Done(outcome) => return outcome,
                Step::Resolve(question, taken) => {
                    let (loaded, snapshot) = (resolve::Loaded::default(), self.store.snapshot());
                    let all = resolve::EVENTS_MAX;
                    rooms.resolver().work_out(&*snapshot, ROOM, VERSION, &question, &loaded, all).unwrap();
                    has_taken = taken;
                }
                Step::EndTurn(_) | Step::Unsigned(..) => {
                    panic!("nothing is pending before the first event of a turn")
                }
            }
        }
        panic!("what was worked out is not found")
    }

    /// Fills the highest hole with everything that its missing events lead to.
    fn fill_from(&mut self, there: &Fixture) {
        let found = find_hole(&*self.store.snapshot(), ROOM, Order::MAX).unwrap();
        let Some((hole, row)) = found else { return };
        let mut open: Vec<OwnedEventId> =
            row.missing.iter().map(|id| id.as_str().try_into().unwrap()).collect();
        let mut events = BTreeMap::new();
        while let Some(id) = open.pop() {
            if !self.has(&id) && events.insert(there.num(&id).unwrap(), there.received(&id)).is_none() {
                open.extend(there.received(&id).event().prev.iter().cloned());
            }
        }
        let older = events.into_values().map(|event| Older { event, state_before: None }).collect();
        let claim = self.rooms.turns(ROOM).claim_history().unwrap();
        let mut backfill = Backfill::new(claim, hole, older, "b.example".to_owned());
        let rooms = self.rooms.clone();
        for _ in 0..1_000 {
            match self.change(|change| change.fill(&mut backfill, rooms.resolver()).unwrap()) {
                Filling::All => return,
                Filling::Part => {}
                Filling::Resolve(question) => {
                    let (loaded, snapshot) = (resolve::Loaded::default(), self.store.snapshot());
                    let all = resolve::EVENTS_MAX;
                    rooms.resolver().work_out(&*snapshot, ROOM, VERSION, &question, &loaded, all).unwrap();
                }
            }
        }
        panic!("a fill has no end");
    }

    /// Checks that every event here has the state before it that it has there.
    fn assert_states_of(&self, there: &Fixture, ids: &[OwnedEventId]) {
        for id in ids.iter().filter(|id| self.has(id)) {
            assert_eq!(self.before(id), there.before(id), "{id}");
        }
    }
}

/// One of the things that users do: who does it, what, and after which of the newest events.
fn act(
    fixture: &mut Fixture,
    ids: &[OwnedEventId],
    (who, what, places): (bool, u8, Vec<usize>),
) -> OwnedEventId {
    let user = if who { alice() } else { bob() };
    let mut prev: Vec<OwnedEventId> =
        places.iter().filter_map(|place| ids.get(ids.len().checked_sub(1 + place)?)).cloned().collect();
    prev.sort();
    prev.dedup();
    let prev = if prev.is_empty() { fixture.heads() } else { prev };
    let member = json!({ "membership": "join", "displayname": format!("{what}") });
    let (id, outcome) = match what {
        0..=3 => fixture.state(&user, "x", &(what % 3).to_string(), json!({ "n": ids.len() }), Some(&prev)),
        4 => fixture.state(&user, "m.room.member", user.as_str(), member, Some(&prev)),
        _ => fixture.say(&user, "said", Some(&prev)),
    };
    assert!(accepted(&outcome), "{outcome:?}");
    id
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn states_are_those_of_a_server_that_has_everything(
        acts in prop::collection::vec((any::<bool>(), 0_u8..8, prop::collection::vec(0_usize..4, 0..3)), 4..16),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 2..5),
        fills_at_once: bool,
    ) {
        let (mut there, mut here) = (Fixture::new(), Fixture::new());
        let mut ids = Vec::new();
        for what in acts {
            ids.push(act(&mut there, &ids, what));
        }
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(ids.len())).collect();
        cuts.sort_unstable();
        let mut holes = 0;
        for (place, id) in ids.iter().enumerate() {
            here.time_ms = there.time_ms;
            let is_lost = cuts.chunks(2).any(|cut| matches!(cut, [low, high] if (*low..*high).contains(&place)));
            if is_lost {
                continue;
            }
            let received = there.received(id);
            let outcome = here.receive(received.clone()).1;
            if let Outcome::Need { auth, prev } = &outcome {
                let fetched = here.fetch(&there, id);
                prop_assert!(!prev.is_empty() || !auth.is_empty());
                let outcome = here.receive_with(&received, &fetched);
                prop_assert!(accepted(&outcome), "{outcome:?}");
                holes += 1;
            }
            here.check_state();
            here.check_rows();
            here.assert_states_of(&there, &ids);
            if fills_at_once {
                here.fill_from(&there);
            }
        }
        for _ in 0..holes {
            here.fill_from(&there);
            here.assert_states_of(&there, &ids);
            here.check_state();
        }
        prop_assert_eq!(find_hole(&*here.store.snapshot(), ROOM, Order::MAX).unwrap(), None);
    }
}

#[test]
fn a_state_that_was_fetched_lets_events_in_and_rejects_none() {
    let (mut there, mut here) = (Fixture::new(), Fixture::new());
    there.say(&bob(), "missed", None);
    let (said, _) = there.say(&bob(), "hello", None);
    let received = there.received(&said);
    let nothing = here.fetch(&there, &said).with(
        state::find_key(&*here.store.snapshot(), ROOM, "m.room.member", bob().as_str())
            .unwrap()
            .map(|key| (key, StateValue::Absent)),
    );
    assert!(matches!(here.receive_with(&received, &nothing), Outcome::Unknown));
    assert!(!here.has(&said));
    let fetched = here.fetch(&there, &said);
    assert!(accepted(&here.receive_with(&received, &fetched)));
    // The old head stays, because nothing that we have cites it.
    assert_eq!(here.heads().len(), 2);
    here.fill_from(&there);
    assert!(find_hole(&*here.store.snapshot(), ROOM, Order::MAX).unwrap().is_none());
}

#[test]
fn an_event_whose_fetched_state_is_far_stands_apart_until_it_is_reunited() {
    let (mut there, mut here) = (Fixture::new(), Fixture::new());
    there.set_many(60, 60);
    here.time_ms = there.time_ms;
    let (said, _) = there.say(&bob(), "hello", None);
    let fetched = here.fetch(&there, &said);
    let outcome = here.receive_with(&there.received(&said), &fetched);
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(here.row().apart.len(), 1);
    here.assert_states_of(&there, &[said]);
    let (rooms, now_ms) = (here.rooms.clone(), here.time_ms);
    let mut reunion = here.change(|change| change.reunite(rooms.resolver(), now_ms).unwrap());
    if let Reunion::Resolve(question) = &reunion {
        let (loaded, snapshot) = (resolve::Loaded::default(), here.store.snapshot());
        let all = resolve::EVENTS_MAX;
        rooms.resolver().work_out(&*snapshot, ROOM, VERSION, question, &loaded, all).unwrap();
        reunion = here.change(|change| change.reunite(rooms.resolver(), now_ms).unwrap());
    }
    assert!(matches!(reunion, Reunion::Done), "{reunion:?}");
    here.check_state();
    assert_eq!(here.current(), there.current());
    here.fill_from(&there);
    here.check_state();
    assert_eq!(here.current(), there.current());
}
