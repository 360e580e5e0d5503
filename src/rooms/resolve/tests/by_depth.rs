//! Compares the first version of state resolution with what Synapse 1.163.2 makes of the same states
//! (`tests/interop/first_versions.py`).

use std::collections::BTreeSet;

use ruma::EventId;
use serde::Deserialize;

use super::*;
use crate::{
    rooms::{event::Event, state::tests::Bench},
    store::Batch,
};

/// One room: its events in their order, and cases of states that are resolved.
#[derive(Deserialize)]
struct Room<'a> {
    #[serde(borrow)]
    events: Vec<&'a serde_json::value::RawValue>,
    cases: Vec<Case>,
}

/// The states, each as the ids of its events, and those of the events of the result.
#[derive(Deserialize)]
struct Case {
    states: Vec<BTreeSet<OwnedEventId>>,
    resolved: BTreeSet<OwnedEventId>,
}

/// The events of a room, by number, and the number of the next side state.
struct Events(Vec<(Header, Arc<Event>)>, std::cell::Cell<u32>);

impl Source for Events {
    type Event = Arc<Event>;
    fn find_header(&self, event: EventNum) -> Result<Option<Header>, Fault> {
        Ok(self.0.get(event.0 as usize).map(|(header, _)| header.clone()))
    }
    fn find_event(&self, event: EventNum) -> Result<Option<Arc<Event>>, Fault> {
        Ok(self.0.get(event.0 as usize).map(|(_, event)| Arc::clone(event)))
    }
}

impl Events {
    /// Makes a side state of its own, so that others stay what they are.
    fn side(
        &self,
        batch: &mut Batch,
        room: RoomNum,
        base: StateRef,
        changes: &[(StateKeyNum, StateValue)],
    ) -> StateRef {
        let mut next_side = self.1.get();
        let side = state::make_side(batch, room, &mut next_side, base, changes).unwrap();
        self.1.set(next_side);
        side
    }

    fn number(&self, id: &EventId) -> usize {
        self.0.iter().position(|(_, event)| event.id == *id).unwrap()
    }
}

fn read(batch: &mut Batch, room: RoomNum, listed: &[&serde_json::value::RawValue]) -> Events {
    #[derive(Deserialize)]
    struct Named {
        event_id: OwnedEventId,
        depth: u64,
    }
    let (mut events, mut next_key) = (Events(Vec::new(), std::cell::Cell::new(0)), 0);
    for json in listed {
        let Named { event_id, depth } = serde_json::from_str(json.get()).unwrap();
        let event = Event::parse(event_id, json.get().as_bytes()).unwrap();
        let (event_type, state_key) = (event.event_type.to_string(), event.state_key.clone().unwrap());
        let key = state::intern_key(batch, room, &mut next_key, &event_type, &state_key).unwrap();
        let auth: Vec<_> = event.auth.iter().map(|id| EventNum(events.number(id) as u64)).collect();
        events.0.push((Header { key, depth, auth_depth: 0, auth }, Arc::new(event)));
    }
    events
}

/// Resolves the states of a case, each of which is a side state of its own, with this much memory.
fn resolved(batch: &mut Batch, room: RoomNum, events: &Events, case: &Case, bounds: Bounds) -> Resolution {
    let rules = RoomVersionId::V1.rules().unwrap();
    let mut sides = Vec::new();
    for state in &case.states {
        let mut changes = Vec::new();
        for id in state {
            let number = events.number(id);
            changes.push((events.0[number].0.key, StateValue::Event(EventNum(number as u64))));
        }
        changes.sort();
        sides.push(Sketch::from(events.side(batch, room, StateRef::EMPTY, &changes)));
    }
    resolve(batch, room, &rules, &sides, events, bounds).unwrap()
}

/// Calls `check` with each case of each room, of the given number of conflicting keys.
fn for_each(mut check: impl FnMut(&mut Batch, RoomNum, &Events, &Case)) {
    for line in include_str!("by_another_server.jsonl").lines() {
        let listed: Room<'_> = serde_json::from_str(line).unwrap();
        let bench = Bench::new();
        let mut batch = bench.store.batch(&Guard::alone());
        let events = read(&mut batch, bench.room, &listed.events);
        listed.cases.iter().for_each(|case| check(&mut batch, bench.room, &events, case));
    }
}

#[test]
fn version_1_resolves_as_another_server_does() {
    let (mut cases, mut differing) = (0, Vec::new());
    for_each(|batch, room, events, case| {
        let state = resolved(batch, room, events, case, Bounds::of(EVENTS_MAX)).state;
        let made = events.side(batch, room, state.base, &state.changes);
        let ours = state::full(batch, room, made).unwrap();
        let ours: BTreeSet<_> = ours.map(|row| events.0[row.unwrap().1.0 as usize].1.id.clone()).collect();
        cases += 1;
        if ours != case.resolved {
            let only =
                |one: &BTreeSet<OwnedEventId>, other| one.difference(other).cloned().collect::<Vec<_>>();
            differing.push((only(&ours, &case.resolved), only(&case.resolved, &ours)));
        }
    });
    assert!(cases > 80, "{cases}");
    assert!(differing.is_empty(), "{} of {cases} differ: {differing:?}", differing.len());
}

#[test]
fn version_1_resolves_alike_with_little_memory_and_however_the_states_are_ordered() {
    for_each(|batch, room, events, case| {
        let mut full = |case: &Case, bounds: Bounds| {
            let state = resolved(batch, room, events, case, bounds).state;
            let made = events.side(batch, room, state.base, &state.changes);
            state::full(batch, room, made).unwrap().map(Result::unwrap).collect::<Vec<_>>()
        };
        let plenty = full(case, Bounds::of(EVENTS_MAX));
        assert_eq!(full(case, Bounds { events_max: EVENTS_MAX, held_max: 1 }), plenty);
        let states = case.states.iter().rev().cloned().collect();
        let turned = Case { states, resolved: case.resolved.clone() };
        assert_eq!(full(&turned, Bounds::of(EVENTS_MAX)), plenty);
    });
}

#[test]
fn version_1_reads_no_more_than_the_conflict_and_what_judges_it() {
    for_each(|batch, room, events, case| {
        let needed = resolved(batch, room, events, case, Bounds::of(EVENTS_MAX)).events_loaded;
        assert!(needed <= 400, "{needed}");
        let rules = RoomVersionId::V1.rules().unwrap();
        let mut sides = Vec::new();
        for state in 0..2_u64 {
            let changes: Vec<_> =
                (0..40).map(|key| (StateKeyNum(100 + key), StateValue::Event(EventNum(state)))).collect();
            sides.push(Sketch::from(events.side(batch, room, StateRef::EMPTY, &changes)));
        }
        let bounds = Bounds::of(20);
        assert_eq!(resolve(batch, room, &rules, &sides, events, bounds), Err(NotResolved::TooMuch));
    });
}
