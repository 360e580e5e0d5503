//! Compares our resolution with ruma's, which reads whole states and whole auth chains, on random rooms.

mod by_depth;
mod forks;

use proptest::prelude::*;
use ruma::RoomVersionId;
use serde_json::json;

use super::*;
use crate::{ids::Order, store::Guard};
use forks::{Forks, Pdu, Try, solved, tries, user};

fn run(version: RoomVersionId, tries: &[Try], compared: &[(Vec<(prop::sample::Index, u16)>, u16)]) {
    let mut forks = Forks::new(&version);
    for attempt in tries {
        forks.attempt(attempt);
    }
    for (which, gone_everywhere) in compared {
        forks.compare(which, *gone_everywhere);
    }
}

fn comparisons() -> impl Strategy<Value = Vec<(Vec<(prop::sample::Index, u16)>, u16)>> {
    let state = (any::<prop::sample::Index>(), prop_oneof![2 => Just(0_u16), 1 => any::<u16>()]);
    let gone = prop_oneof![2 => Just(0_u16), 1 => (0..16_u16).prop_map(|bit| 1 << bit)];
    prop::collection::vec((prop::collection::vec(state, 2..5), gone), 1..8)
}

/// Runs the property for a room version, over random rooms that fork.
fn check_version(version: RoomVersionId) {
    let config = ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let checked = runner.run(&(tries(60), comparisons()), |(tries, compared)| {
        run(version.clone(), &tries, &compared);
        Ok(())
    });
    checked.unwrap_or_else(|error| panic!("room version {version}: {error}"));
}

/// Each room version from 2 on has a test of its own, because each takes seconds and tests run side by side.
macro_rules! resolves_as_ruma_does {
    ($($name:ident: $version:ident),* $(,)?) => {$(
        #[test]
        fn $name() {
            check_version(RoomVersionId::$version);
        }
    )*};
}

resolves_as_ruma_does! {
    version_2_resolves_as_ruma_does: V2,
    version_3_resolves_as_ruma_does: V3,
    version_4_resolves_as_ruma_does: V4,
    version_5_resolves_as_ruma_does: V5,
    version_6_resolves_as_ruma_does: V6,
    version_7_resolves_as_ruma_does: V7,
    version_8_resolves_as_ruma_does: V8,
    version_9_resolves_as_ruma_does: V9,
    version_10_resolves_as_ruma_does: V10,
    version_11_resolves_as_ruma_does: V11,
    version_12_resolves_as_ruma_does: V12,
}

/// A source that counts how often it is asked.
struct Counted<'s>(&'s Forks, std::cell::Cell<usize>);

impl Source for Counted<'_> {
    type Event = Arc<Pdu>;
    fn find_header(&self, event: EventNum) -> Result<Option<Header>, Fault> {
        self.1.set(self.1.get() + 1);
        self.0.find_header(event)
    }
    fn find_event(&self, event: EventNum) -> Result<Option<Arc<Pdu>>, Fault> {
        self.1.set(self.1.get() + 1);
        self.0.find_event(event)
    }
}

/// Counts the events and headers that are read to resolve a fork of ten keys in a room with this many members.
fn reads(version: &RoomVersionId, members: u8) -> usize {
    let mut forks = Forks::new(version);
    for number in 3..members {
        let last = forks.events.len() - 1;
        forks.add(number, "m.room.member", user(number).as_str(), json!({"membership": "join"}), 5, &[last]);
    }
    let tip = forks.events.len() - 1;
    let mut branches = Vec::new();
    for branch in [6, 7] {
        let mut last = tip;
        for number in 0..5 {
            let profile = json!({"membership": "join", "displayname": branch});
            forks.add(number, "m.room.member", user(number).as_str(), profile, branch, &[last]);
            last = forks.events.len() - 1;
        }
        for number in 0..5 {
            let thing = number.to_string();
            forks.add(0, "org.example.thing", &thing, json!({"is": branch}), branch, &[last]);
            last = forks.events.len() - 1;
        }
        branches.push(forks.after[last].1);
    }
    let snapshot = forks.bench.store.snapshot();
    let counted = Counted(&forks, std::cell::Cell::new(0));
    let resolution = solved(&*snapshot, forks.room(), &forks.rules, &branches, &counted).unwrap();
    assert!(resolution.changes.len() <= 10);
    counted.1.get()
}

#[test]
fn a_larger_room_needs_no_more_events_for_the_same_conflict() {
    for version in [RoomVersionId::V11, RoomVersionId::V12] {
        let (small, large) = (reads(&version, 8), reads(&version, 250));
        assert!(small > 20 && large <= small, "{version}: {small} and {large}");
    }
}

#[test]
fn more_than_can_be_resolved_waits() {
    let mut forks = Forks::new(&RoomVersionId::V11);
    let (rules, room) = (forks.rules.clone(), forks.room());
    let mut batch = forks.bench.store.batch(&Guard::alone());
    // The events of the fork need not exist, because they are too many to be looked at.
    let sides: Vec<StateRef> = [0, 1]
        .map(|side| {
            let changes: Vec<_> = (0..EVENTS_MAX as u32)
                .map(|key| {
                    (
                        StateKeyNum(100 + key),
                        StateValue::Event(EventNum(1_000_000 * (side + 1) + u64::from(key))),
                    )
                })
                .collect();
            state::make_side(&mut batch, room, &mut forks.next_side, StateRef::EMPTY, &changes).unwrap()
        })
        .to_vec();
    assert_eq!(solved(&batch, room, &rules, &sides, &forks), Err(NotResolved::TooMuch));
    let many: Vec<StateRef> = (0..=STATES_MAX as u64)
        .map(|event| {
            let change = [(StateKeyNum(0), StateValue::Event(EventNum(event)))];
            state::make_side(&mut batch, room, &mut forks.next_side, StateRef::EMPTY, &change).unwrap()
        })
        .collect();
    assert_eq!(solved(&batch, room, &rules, &many, &forks), Err(NotResolved::TooMuch));
}

#[test]
fn equal_states_need_no_resolution() {
    let forks = Forks::new(&RoomVersionId::V12);
    let snapshot = forks.bench.store.snapshot();
    let tip = state::tip(&*snapshot, forks.room()).unwrap();
    let counted = Counted(&forks, std::cell::Cell::new(0));
    // These are two places of the main line with nothing between them.
    let states = [tip, StateRef::Main(Order::MAX)];
    let resolution = solved(&*snapshot, forks.room(), &forks.rules, &states, &counted).unwrap();
    assert_eq!((resolution, counted.1.get()), (tip.into(), 0));
}

/// Resolves a fork with this little memory, and compares the result with that of plenty of it. Answers the number of
/// reads of events and headers.
fn resolved_within(forks: &Forks, branches: [usize; 2], held_max: usize) -> usize {
    let snapshot = forks.bench.store.snapshot();
    let states = branches.map(|last| Sketch::from(forks.after[last].1));
    let of = |held_max| {
        let bounds = Bounds { events_max: EVENTS_MAX, held_max };
        resolve(&*snapshot, forks.room(), &forks.rules, &states, forks, bounds).unwrap()
    };
    let (little, plenty) = (of(held_max), of(EVENTS_MAX));
    assert_eq!(little.state, plenty.state);
    little.events_loaded
}

#[test]
fn a_conflict_that_does_not_fit_in_memory_is_read_a_few_times() {
    for version in [RoomVersionId::V11, RoomVersionId::V12] {
        let mut forks = Forks::new(&version);
        let tip = forks.events.len() - 1;
        let branches = [6, 7].map(|branch| {
            let mut last = tip;
            for number in 0..300 {
                let thing = json!({ "is": branch });
                forks.add(0, "org.example.thing", &number.to_string(), thing, branch, &[last]);
                last = forks.events.len() - 1;
            }
            last
        });
        assert_eq!(forks.events.len(), tip + 1 + 600, "everything was allowed");
        let reads = resolved_within(&forks, branches, 100);
        assert!(reads < 12 * 600, "{version}: {reads}");
    }
}

#[test]
fn a_chain_of_power_levels_that_does_not_fit_in_memory_is_walked_a_few_times() {
    for version in [RoomVersionId::V11, RoomVersionId::V12] {
        let mut forks = Forks::new(&version);
        let tip = forks.events.len() - 1;
        let is_12 = forks.rules.authorization.explicitly_privilege_room_creators;
        let mut last = tip;
        for number in 0..600_u32 {
            let mut users = json!({ user(1).as_str(): number % 50 });
            if !is_12 {
                users[user(0).as_str()] = json!(100);
            }
            let levels = json!({ "users": users, "events": { "m.room.topic": 0 }, "state_default": 50 });
            forks.add(0, "m.room.power_levels", "", levels, 6, &[last]);
            last = forks.events.len() - 1;
        }
        assert_eq!(last, tip + 600, "everything was allowed");
        forks.add(0, "m.room.topic", "", json!({ "topic": "old" }), 7, &[tip]);
        let other = forks.events.len() - 1;
        let reads = resolved_within(&forks, [last, other], 100);
        assert!(reads < 20 * 600, "{version}: {reads}");
    }
}

#[test]
fn many_states_that_differ_in_the_same_keys_take_the_memory_of_their_values() {
    let mut forks = Forks::new(&RoomVersionId::V11);
    let room = forks.room();
    let mut batch = forks.bench.store.batch(&Guard::alone());
    let mut sides = Vec::new();
    for state in 0..STATES_MAX as u64 {
        let keys = (0..1_000_u32).map(|key| {
            let val =
                if state == 0 || (key == 0 && state == 5) { u64::from(key) } else { 5_000 + u64::from(key) };
            (StateKeyNum(100 + key), StateValue::Event(EventNum(val)))
        });
        // A key of its own tells the states apart.
        let own = (StateKeyNum(5_000 + state as u32), StateValue::Event(EventNum(20_000 + state)));
        let changes: Vec<_> = keys.chain([own]).collect();
        let side =
            state::make_side(&mut batch, room, &mut forks.next_side, StateRef::EMPTY, &changes).unwrap();
        sides.push(Sketch::from(side));
    }
    let conflict = Conflict::find(&batch, room, &sides[0], &sides[1..], EVENTS_MAX).unwrap();
    let values: usize = conflict.vals.values().map(Vec::len).sum();
    assert_eq!((conflict.vals.len(), values), (1_000 + STATES_MAX, 2 * (1_000 + STATES_MAX)));
    assert_eq!(conflict.all, u64::MAX);
    assert_eq!(conflict.events()[&EventNum(0)], 0b10_0001);
    assert_eq!(conflict.events()[&EventNum(5_001)], u64::MAX - 1);
    assert_eq!(conflict.events()[&EventNum(20_063)], 1 << 63);
    // More values than events are allowed are refused while they are collected.
    assert!(Conflict::find(&batch, room, &sides[0], &sides[1..], 1_000).is_err());
}
