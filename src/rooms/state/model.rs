//! Compares the versioned map with a naive model that keeps a full map for every event: forks, merges, soft-failed,
//! rejected and late events, holes filled in any order, re-joins, purges.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::{tests::Bench, *};
use crate::{
    ids::{Position, SideNum},
    store::{Durability, Engine, Guard, LogEntry, Store},
};

const KEYS: u32 = 40;

type Map = BTreeMap<StateKeyNum, StateValue>;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Accepted,
    Rejected,
    SoftFailed,
}

#[derive(Debug, Clone)]
enum Op {
    /// An event with up to three prevs: heads, or any events if it is late.
    Event {
        kind: Kind,
        late: bool,
        prevs: Vec<prop::sample::Index>,
        sets: Vec<(u32, bool)>,
    },
    /// We left the room, much happened in it, and we are back.
    Rejoin {
        sets: Vec<(u32, bool)>,
        part_size: usize,
        ends_after: Option<usize>,
    },
    /// An event on all heads after which many keys differ, so that the step is staged.
    Step {
        sets: Vec<(u32, bool)>,
        ends_after: Option<usize>,
    },
    /// A hole gets a segment at its upper end.
    Fill {
        hole: prop::sample::Index,
        bottom: Vec<(u32, bool)>,
        steps: Vec<Vec<(u32, bool)>>,
        closes: bool,
        ends_after: Option<usize>,
    },
    Purge {
        below: prop::sample::Index,
    },
}

fn sets(most: usize) -> impl Strategy<Value = Vec<(u32, bool)>> {
    prop::collection::vec((0..KEYS, prop::bool::weighted(0.8)), 0..=most)
}

/// The number of parts after which the server ends, if it does.
fn ends_after() -> impl Strategy<Value = Option<usize>> {
    prop::option::weighted(0.4, 0_usize..8)
}

fn op() -> impl Strategy<Value = Op> {
    let kind = prop_oneof![8 => Just(Kind::Accepted), 1 => Just(Kind::Rejected), 1 => Just(Kind::SoftFailed)];
    let prevs = prop::collection::vec(any::<prop::sample::Index>(), 1..4);
    prop_oneof![
        40 => (kind, prop::bool::weighted(0.3), prevs, sets(3))
            .prop_map(|(kind, late, prevs, sets)| Op::Event { kind, late, prevs, sets }),
        1 => (sets(KEYS as usize), 1_usize..9, ends_after())
            .prop_map(|(sets, part_size, ends_after)| Op::Rejoin { sets, part_size, ends_after }),
        2 => (sets(KEYS as usize), ends_after()).prop_map(|(sets, ends_after)| Op::Step { sets, ends_after }),
        4 => (any::<prop::sample::Index>(), sets(30), prop::collection::vec(sets(2), 0..6), prop::bool::weighted(0.2), ends_after())
            .prop_map(|(hole, bottom, steps, closes, ends_after)| Op::Fill { hole, bottom, steps, closes, ends_after }),
        1 => any::<prop::sample::Index>().prop_map(|below| Op::Purge { below }),
    ]
}

struct Event {
    order: Order,
    kind: Kind,
    before: (StateRef, Map),
    after: (StateRef, Map),
}

struct World {
    bench: Bench,
    next_event: u64,
    next_side: u32,
    events: Vec<Event>,
    /// The heads, as indexes into `events`.
    heads: BTreeSet<usize>,
    /// The main line after each order that readers were told.
    told: BTreeMap<Order, Map>,
    current: Map,
}

fn set(map: &mut Map, key: StateKeyNum, val: StateValue) {
    if val == StateValue::Absent {
        map.remove(&key);
    } else {
        map.insert(key, val);
    }
}

/// Stands in for state resolution, and depends on the conflicted values only. It may drop a key, choose any value, and
/// set a key that is not in conflict.
fn judge(conflicted: &BTreeMap<StateKeyNum, BTreeSet<StateValue>>) -> Map {
    let mut chosen = Map::new();
    for (key, vals) in conflicted {
        let pick = vals.iter().filter_map(|val| val.event()).map(|event| event.0).sum::<u64>() as usize;
        let val = vals.iter().copied().nth(pick % vals.len()).unwrap();
        if pick.is_multiple_of(11) {
            chosen.insert(StateKeyNum(pick as u32 % KEYS), val);
        }
        chosen.entry(*key).or_insert(if pick.is_multiple_of(7) { StateValue::Absent } else { val });
    }
    chosen
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            bench: Bench::new(),
            next_event: 0,
            next_side: 0,
            events: Vec::new(),
            heads: BTreeSet::new(),
            told: BTreeMap::new(),
            current: Map::new(),
        };
        world.event(Kind::Accepted, &[], &[(0, true), (1, true)]);
        world
    }

    fn room(&self) -> RoomNum {
        self.bench.room
    }

    fn vals(&mut self, sets: &[(u32, bool)]) -> Vec<(StateKeyNum, StateValue)> {
        let mut vals = Map::new();
        for (key, is_set) in sets {
            self.next_event += 1;
            let val = if *is_set { StateValue::Event(EventNum(self.next_event)) } else { StateValue::Absent };
            vals.insert(StateKeyNum(*key), val);
        }
        vals.into_iter().collect()
    }

    /// Resolves states: gives our result and the model's.
    fn resolve(&mut self, batch: &mut Batch, states: &[(StateRef, Map)]) -> (StateRef, Map) {
        let room = self.room();
        let (first, rest) = states.split_first().unwrap();
        let mut keys = BTreeSet::new();
        for (state, _) in rest {
            keys.extend(diff(batch, room, first.0, *state).unwrap().into_iter().map(|(key, ..)| key));
        }
        let mut conflicted: BTreeMap<StateKeyNum, BTreeSet<StateValue>> = BTreeMap::new();
        for key in keys {
            let vals = states.iter().map(|(state, _)| at(batch, room, *state, key).unwrap()).collect();
            conflicted.insert(key, vals);
        }
        let naive = {
            let all: BTreeSet<_> = states.iter().flat_map(|(_, map)| map.keys().copied()).collect();
            let vals = |key: &StateKeyNum| -> BTreeSet<StateValue> {
                states.iter().map(|(_, map)| map.get(key).copied().unwrap_or(StateValue::Absent)).collect()
            };
            all.into_iter().map(|key| (key, vals(&key))).filter(|(_, vals)| vals.len() > 1).collect()
        };
        assert_eq!(conflicted, naive, "conflicted sets");
        let chosen = judge(&conflicted);
        let mut map = first.1.clone();
        for (key, val) in &chosen {
            set(&mut map, *key, *val);
        }
        let changes: Vec<_> = chosen.into_iter().collect();
        let made = make_side(batch, room, &mut self.next_side, first.0, &changes).unwrap();
        for (state, _) in states {
            if diff(batch, room, made, *state).unwrap().is_empty() {
                return (*state, map);
            }
        }
        (made, map)
    }

    fn event(&mut self, kind: Kind, prevs: &[usize], sets: &[(u32, bool)]) {
        let (room, changes) = (self.room(), self.vals(sets));
        let mut batch = self.bench.store.batch(&Guard::alone());
        let order = Order::live(batch.position(&LogEntry::RoomState { room }));
        let mut states: Vec<(StateRef, Map)> = Vec::new();
        for prev in prevs {
            let after = self.events[*prev].after.clone();
            if states.iter().all(|(state, _)| *state != after.0) {
                states.push(after);
            }
        }
        let before = match states.len() {
            0 => (StateRef::EMPTY, Map::new()),
            1 => states.remove(0),
            _ => self.resolve(&mut batch, &states),
        };
        let mut after = before.clone();
        for (key, val) in &changes {
            set(&mut after.1, *key, *val);
        }
        let tip = tip(&batch, room).unwrap();
        if kind == Kind::Accepted {
            let mut heads: BTreeSet<usize> =
                self.heads.iter().copied().filter(|head| !prevs.contains(head)).collect();
            if heads.is_empty() {
                // The event alone decides, so the main line moves to its state.
                let mut step: Vec<_> = diff(&batch, room, tip, before.0)
                    .unwrap()
                    .into_iter()
                    .map(|(key, _, val)| (key, val))
                    .collect();
                step.extend(&changes);
                apply(&mut batch, room, order, &step).unwrap();
                after.0 = super::tip(&batch, room).unwrap();
                self.current = after.1.clone();
            } else {
                after.0 = make_side(&mut batch, room, &mut self.next_side, before.0, &changes).unwrap();
                let mut states = vec![after.clone()];
                for head in &heads {
                    let state = self.events[*head].after.clone();
                    if states.iter().all(|(other, _)| *other != state.0) {
                        states.push(state);
                    }
                }
                let now = if states.len() == 1 { after.clone() } else { self.resolve(&mut batch, &states) };
                let step: Vec<_> = diff(&batch, room, tip, now.0)
                    .unwrap()
                    .into_iter()
                    .map(|(key, _, val)| (key, val))
                    .collect();
                apply(&mut batch, room, order, &step).unwrap();
                if now.0 == after.0 {
                    after.0 = super::tip(&batch, room).unwrap();
                }
                self.current = now.1;
            }
            heads.insert(self.events.len());
            self.heads = heads;
        } else if kind == Kind::SoftFailed {
            after.0 = make_side(&mut batch, room, &mut self.next_side, before.0, &changes).unwrap();
        } else {
            after = before.clone();
        }
        let base = self.bench.store.enqueue(batch).unwrap().base;
        self.bench.store.flush().unwrap();
        let settle = |(state, map): (StateRef, Map)| (state.settle(base), map);
        let (before, after, order) = (settle(before), settle(after), order.settle(base));
        self.told.insert(order, self.current.clone());
        self.events.push(Event { order, kind, before, after });
    }

    /// Opens the store as the server finds it after it ended: everything that was written is there, and no more.
    fn end_and_begin(&mut self) {
        let Engine::Memory(memory) = self.bench.store.engine() else { return };
        let engine = Engine::Memory(memory.after_crash(usize::MAX));
        self.bench.store = Store::open(engine, Durability::Os).unwrap();
    }

    /// Stages these changes in parts, at the orders of a step or a base, and gives the position that is reserved for them.
    /// Between the parts nothing is seen. If the server ends after some of them, those are taken back, part by part, and all
    /// are staged anew, at the position that is reserved then.
    fn stage(
        &mut self,
        parts: &[&[(StateKeyNum, StateValue)]],
        order_of: fn(Position, u32) -> Result<Order, Fault>,
        ends_after: Option<usize>,
    ) -> Position {
        let room = self.room();
        let anchor = self.bench.store.begin_step().unwrap().anchor();
        for (number, part) in parts.iter().enumerate() {
            if ends_after == Some(number) {
                self.end_and_begin();
                self.check_invariants();
                while self.bench.write(|batch| stage::clear_part(batch, room, anchor).unwrap()).is_some() {
                    self.check_invariants();
                }
                self.bench.write(|batch| stage::finish(batch, room));
                return self.stage(parts, order_of, None);
            }
            self.bench.stage(anchor, |batch| {
                stage::begin(batch, room, anchor, false).unwrap();
                stage::put_part(batch, room, order_of(anchor, number as u32).unwrap(), part).unwrap();
            });
            self.check_invariants();
        }
        anchor
    }

    /// An event on all heads after which the whole room is another.
    fn step(&mut self, sets: &[(u32, bool)], ends_after: Option<usize>) {
        let (room, changes) = (self.room(), self.vals(sets));
        let before = (tip(&*self.bench.store.snapshot(), room).unwrap(), self.current.clone());
        let mut after = before.1.clone();
        for (key, val) in &changes {
            set(&mut after, *key, *val);
        }
        let parts: Vec<_> = changes.chunks(stage::PART_KEYS_MAX).collect();
        let anchor = self.stage(&parts, stage::step_order, ends_after);
        let order = Order::live(anchor);
        self.bench.finish(anchor, |batch| stage::finish(batch, room));
        let state = canonical(&*self.bench.store.snapshot(), room, StateRef::Main(order)).unwrap();
        self.told.insert(order, after.clone());
        self.current = after.clone();
        self.heads = BTreeSet::from([self.events.len()]);
        self.events.push(Event { order, kind: Kind::Accepted, before, after: (state, after) });
    }

    fn rejoin(&mut self, sets: &[(u32, bool)], part_size: usize, ends_after: Option<usize>) {
        let (room, changes) = (self.room(), self.vals(sets));
        let mut above = self.current.clone();
        for (key, val) in &changes {
            set(&mut above, *key, *val);
        }
        let brought: BTreeMap<StateKeyNum, EventNum> =
            above.iter().filter_map(|(key, val)| Some((*key, val.event()?))).collect();
        let changes: Vec<_> = differing_from_current(&*self.bench.store.snapshot(), room, &brought)
            .unwrap()
            .into_iter()
            .map(|(key, _, val)| (key, val))
            .collect();
        let parts: Vec<_> = changes.chunks(part_size.min(stage::PART_KEYS_MAX)).collect();
        let anchor = self.stage(&parts, stage::base_order, ends_after);
        let order = Order::live(anchor);
        let own = self.vals(&[(2, true)]);
        let before = (StateRef::Main(Order { anchor, minor: -1 }), above.clone());
        self.bench.finish(anchor, |batch| {
            stage::finish(batch, room);
            open_hole(batch, room, anchor, false, vec!["$missing".to_owned()]).unwrap();
            apply(batch, room, order, &own).unwrap();
        });
        set(&mut above, own[0].0, own[0].1);
        self.told.insert(before_order(order), before.1.clone());
        self.told.insert(order, above.clone());
        self.current = above.clone();
        let after = (StateRef::Main(order), above);
        self.heads = BTreeSet::from([self.events.len()]);
        self.events.push(Event { order, kind: Kind::Accepted, before, after });
    }

    /// Lists the current state as readers find it.
    fn listed(&self) -> Map {
        list_current(&*self.bench.store.snapshot(), self.room())
            .unwrap()
            .map(|row| row.map(|(key, event)| (key, StateValue::Event(event))).unwrap())
            .collect()
    }

    fn holes(&self) -> Vec<Order> {
        let snapshot = self.bench.store.snapshot();
        let (mut holes, mut upto) = (Vec::new(), Order::MAX);
        while let Some((hole, _)) = find_hole(&*snapshot, self.room(), upto).unwrap() {
            holes.push(hole);
            upto = Order { anchor: hole.anchor, minor: i32::MIN };
        }
        holes
    }

    fn fill(&mut self, hole: Order, segment: Segment, ends_after: Option<usize>) {
        let room = self.room();
        let mut map = self.told[&before_order(hole)].clone();
        for (key, val) in &segment.bottom {
            set(&mut map, *key, *val);
        }
        let plan = |world: &Self| Fill::plan(&*world.bench.store.snapshot(), room, hole, &segment).unwrap();
        let (mut fill, mut written) = (plan(self), 0);
        let orders = loop {
            if ends_after == Some(written) {
                self.end_and_begin();
                self.check_invariants();
                self.check(false);
                fill = plan(self);
            }
            written += 1;
            if let Some(orders) = self.bench.write(|batch| fill.part(batch, room).unwrap()) {
                break orders;
            }
            self.check_invariants();
        };
        let snapshot = self.bench.store.snapshot();
        if !segment.missing.is_empty() {
            let (lowest, row) = find_hole(&*snapshot, room, hole).unwrap().unwrap();
            assert_eq!((row.parts, lowest), (0, orders.first().copied().unwrap_or(lowest)));
            self.told.insert(before_order(lowest), map.clone());
        }
        for (order, step) in orders.iter().zip(&segment.steps) {
            let before = (just_below(&*snapshot, room, *order).unwrap(), map.clone());
            for (key, val) in step {
                set(&mut map, *key, *val);
            }
            let after = (canonical(&*snapshot, room, StateRef::Main(*order)).unwrap(), map.clone());
            self.told.insert(*order, map.clone());
            self.events.push(Event { order: *order, kind: Kind::Accepted, before, after });
        }
    }

    /// Begins to fill a hole with another segment, which the server never finishes.
    fn begin_fill(&mut self, hole: Order, segment: &Segment) {
        let room = self.room();
        let mut fill = Fill::plan(&*self.bench.store.snapshot(), room, hole, segment).unwrap();
        for _ in 0..2 {
            if find_hole(&*self.bench.store.snapshot(), room, hole).unwrap().is_some_and(|(at, _)| at == hole)
                && !fill.is_last()
            {
                self.bench.write(|batch| fill.part(batch, room).unwrap());
            }
        }
        self.end_and_begin();
        self.check_invariants();
    }

    /// Checks what must hold between any two batches: the log names a key exactly where the value before is kept, and
    /// nobody sees a part of a step.
    fn check_invariants(&self) {
        let (snapshot, room) = (self.bench.store.snapshot(), self.room());
        let undo: BTreeSet<_> = schema::STATE_UNDO
            .prefix::<(RoomNum,)>(&*snapshot, (room,), Direction::Up)
            .unwrap()
            .map(|row| row.map(|((_, key, order), val)| (order, key, val)).unwrap())
            .collect();
        let logged: BTreeSet<_> = changes(&*snapshot, room, Order::MIN, Order::MAX)
            .unwrap()
            .flat_map(|step| {
                let (order, changes) = step.unwrap();
                changes.into_iter().map(move |(key, val)| (order, key, val))
            })
            .collect();
        assert_eq!(undo, logged, "undo rows and the log");
        assert_eq!(self.listed(), self.current, "the current state between two parts");
        let tip = tip(&*snapshot, room).unwrap();
        assert_eq!(canonical(&*snapshot, room, tip).unwrap(), tip);
        let whole: Map = full(&*snapshot, room, tip)
            .unwrap()
            .map(|row| row.map(|(key, event)| (key, StateValue::Event(event))).unwrap())
            .collect();
        assert_eq!(whole, self.current, "the main line at its tip is the current state");
    }

    fn purge(&mut self, below: Order) {
        let room = self.room();
        let StateRef::Main(order) =
            canonical(&*self.bench.store.snapshot(), room, StateRef::Main(below)).unwrap()
        else {
            return;
        };
        // Heads are kept, wherever they are: the references that they hold to states below are expressed anew.
        let mut batch = self.bench.store.batch(&Guard::alone());
        for head in self.heads.clone() {
            for is_before in [true, false] {
                let event = &self.events[head];
                let state = if is_before { event.before.0 } else { event.after.0 };
                if matches!(state, StateRef::Main(at) if at < order) {
                    let differing = diff(&batch, room, StateRef::Main(order), state).unwrap();
                    let changes: Vec<_> = differing.into_iter().map(|(key, _, val)| (key, val)).collect();
                    let anew =
                        make_side(&mut batch, room, &mut self.next_side, StateRef::Main(order), &changes)
                            .unwrap();
                    let event = &mut self.events[head];
                    *(if is_before { &mut event.before.0 } else { &mut event.after.0 }) = anew;
                }
            }
        }
        drop(self.bench.store.enqueue(batch).unwrap());
        let is_kept = |(number, event): (usize, &Event)| event.order >= below || self.heads.contains(&number);
        let mut kept_sides = BTreeSet::new();
        let mut renamed = BTreeMap::new();
        let mut kept = Vec::new();
        for (number, event) in std::mem::take(&mut self.events).into_iter().enumerate() {
            let lost = |state: StateRef| matches!(state, StateRef::Main(at) if at < order);
            if is_kept((number, &event)) && !lost(event.before.0) && !lost(event.after.0) {
                renamed.insert(number, kept.len());
                for state in [event.before.0, event.after.0] {
                    if let StateRef::Side(side) = state {
                        kept_sides.insert(side);
                    }
                }
                kept.push(event);
            }
        }
        self.events = kept;
        self.heads = self.heads.iter().map(|head| renamed[head]).collect();
        self.told.retain(|at, _| *at >= below);
        let mut purge = Purge::new(below);
        let mut parts = 0;
        while !purge.is_done() {
            self.bench.write(|batch| {
                purge.step(batch, room, |side: SideNum| kept_sides.contains(&side), 7).unwrap();
            });
            self.check_invariants();
            parts += 1;
            let found = Purge::find(&*self.bench.store.snapshot(), room).unwrap();
            assert_eq!(found.is_none(), purge.is_done(), "a purge is found again until it is done");
            if let Some(found) = found.filter(|_| parts == 2) {
                // The server ended, and goes on from what is stored.
                purge = found;
            }
        }
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::Event { kind, late, prevs, sets } => {
                let heads: Vec<usize> = self.heads.iter().copied().collect();
                let all: Vec<usize> = (0..self.events.len()).collect();
                let from = if *late { &all } else { &heads };
                let mut prevs: Vec<usize> = prevs.iter().map(|index| *index.get(from)).collect();
                prevs.sort_unstable();
                prevs.dedup();
                self.event(*kind, &prevs, sets);
            }
            Op::Rejoin { sets, part_size, ends_after } => self.rejoin(sets, *part_size, *ends_after),
            Op::Step { sets, ends_after } => self.step(sets, *ends_after),
            Op::Fill { hole, bottom, steps, closes, ends_after } => {
                let holes = self.holes();
                if !holes.is_empty() {
                    let hole = *hole.get(&holes);
                    let mut segment = |bottom: &[(u32, bool)]| Segment {
                        bottom: self.vals(bottom),
                        steps: steps.iter().map(|step| self.vals(step)).collect(),
                        missing: if *closes { Vec::new() } else { vec!["$more".to_owned()] },
                    };
                    let (other, segment) = (segment(&[(1, true), (4, false), (7, true)]), segment(bottom));
                    if ends_after.is_some() {
                        self.begin_fill(hole, &other);
                    }
                    self.fill(hole, segment, *ends_after);
                }
            }
            Op::Purge { below } => {
                let orders: Vec<Order> = self.events.iter().map(|event| event.order).collect();
                self.purge(*below.get(&orders));
            }
        }
    }

    fn check(&self, is_thorough: bool) {
        let (snapshot, room) = (self.bench.store.snapshot(), self.room());
        for event in &self.events {
            for state in [event.before.0, event.after.0] {
                assert_eq!(canonical(&*snapshot, room, state).unwrap(), state, "references are canonical");
            }
        }
        let refs: Vec<(StateRef, &Map)> = self
            .events
            .iter()
            .flat_map(|event| [(event.before.0, &event.before.1), (event.after.0, &event.after.1)])
            .chain(self.told.iter().map(|(order, map)| (StateRef::Main(*order), map)))
            .collect();
        let refs = if is_thorough { refs } else { refs.into_iter().rev().step_by(17).collect() };
        // Most events share their states with others, so each state is looked into once.
        let mut seen: BTreeMap<StateRef, &Map> = BTreeMap::new();
        for (state, map) in &refs {
            if let Some(same) = seen.insert(*state, map) {
                assert_eq!(same, *map, "one reference for two states");
                continue;
            }
            for number in 0..KEYS {
                let key = StateKeyNum(number);
                let expected = map.get(&key).copied().unwrap_or(StateValue::Absent);
                assert_eq!(at(&*snapshot, room, *state, key).unwrap(), expected, "{key} at {state:?}");
            }
            let keys: Vec<_> = (0..KEYS).map(StateKeyNum).collect();
            let expected: Vec<_> =
                keys.iter().map(|key| map.get(key).copied().unwrap_or(StateValue::Absent)).collect();
            assert_eq!(list_at(&*snapshot, room, *state, &keys).unwrap(), expected, "keys at {state:?}");
            let whole: Map = full(&*snapshot, room, *state)
                .unwrap()
                .map(|row| row.map(|(key, event)| (key, StateValue::Event(event))).unwrap())
                .collect();
            assert_eq!(&whole, *map, "all of {state:?}");
        }
        for (number, (state, map)) in refs.iter().enumerate() {
            let (other, other_map) = refs[number * 7 % refs.len()];
            let differing: Vec<_> = (0..KEYS)
                .map(StateKeyNum)
                .map(|key| {
                    let val = |map: &Map| map.get(&key).copied().unwrap_or(StateValue::Absent);
                    (key, val(map), val(other_map))
                })
                .filter(|(_, a, b)| a != b)
                .collect();
            assert_eq!(diff(&*snapshot, room, *state, other).unwrap(), differing, "{state:?} and {other:?}");
        }
        assert_eq!(self.listed(), self.current);
        assert!(
            self.events.iter().all(|event| event.kind != Kind::Rejected || event.before.0 == event.after.0)
        );
    }
}

fn before_order(order: Order) -> Order {
    Order { anchor: order.anchor, minor: order.minor - 1 }
}

fn run(ops: &[Op]) {
    let mut world = World::new();
    for (number, op) in ops.iter().enumerate() {
        world.run(op);
        if number % 50 == 0 {
            world.check(false);
        }
    }
    world.check(true);
    assert!(world.bench.store.snapshot().upto() > Position::ZERO);
}

#[test]
fn a_purge_at_an_event_that_changes_nothing_forgets_the_hole_below_it() {
    let mut world = World::new();
    world.rejoin(&[], 1, None);
    // The segment's only event is a message, so that the last change at or below it is the marker of the hole below it.
    let message =
        Segment { steps: vec![Vec::new()], missing: vec!["$more".to_owned()], ..Segment::default() };
    world.fill(world.holes()[0], message.clone(), None);
    world.purge(world.holes()[0]);
    for hole in world.holes() {
        world.fill(hole, message.clone(), None);
    }
    assert_eq!(world.holes(), [], "nothing fills a hole whose end was forgotten");
    world.check(true);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_state_of_a_random_room_is_what_a_full_map_for_every_event_says(
        ops in prop::collection::vec(op(), 1..500),
    ) {
        run(&ops);
    }

    #[test]
    fn every_state_of_a_short_random_room_is_right(ops in prop::collection::vec(op(), 1..12)) {
        run(&ops);
    }
}
