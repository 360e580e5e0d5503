//! A room's state in memory, for tests.

use super::*;
use crate::{
    ids::Position,
    store::{Counting, Durability, Engine, Guard, LogEntry, Store, engine::Memory},
};

/// A store with one room.
pub(crate) struct Bench {
    pub(crate) store: Store,
    pub(crate) room: RoomNum,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Os).unwrap();
        Self { store, room: RoomNum(7) }
    }

    /// Writes the rows that `build` adds, and gives its result.
    pub(crate) fn write<T>(&self, build: impl FnOnce(&mut Batch) -> T) -> T {
        let mut batch = self.store.batch(&Guard::alone());
        let built = build(&mut batch);
        drop(self.store.enqueue(batch).unwrap());
        self.store.flush().unwrap();
        built
    }

    /// Writes a part of a staged step at this position.
    pub(crate) fn stage(&self, anchor: Position, build: impl FnOnce(&mut Batch)) {
        let mut batch = self.store.batch(&Guard::alone());
        build(&mut batch);
        batch.stage_at(anchor);
        drop(self.store.enqueue(batch).unwrap());
        self.store.flush().unwrap();
    }

    /// Writes the last batch of a staged step at this position.
    pub(crate) fn finish(&self, anchor: Position, build: impl FnOnce(&mut Batch)) {
        let mut batch = self.store.batch(&Guard::alone());
        batch.position(&LogEntry::RoomState { room: self.room });
        build(&mut batch);
        batch.begin_at(anchor);
        assert_eq!(self.store.enqueue(batch).unwrap().base, anchor);
        self.store.flush().unwrap();
    }

    /// Takes one step of the main line, at a new position.
    pub(crate) fn step(&self, changes: &[(StateKeyNum, StateValue)]) -> Order {
        let mut batch = self.store.batch(&Guard::alone());
        let position = batch.position(&LogEntry::RoomState { room: self.room });
        apply(&mut batch, self.room, Order::live(position), changes).unwrap();
        let enqueued = self.store.enqueue(batch).unwrap();
        self.store.flush().unwrap();
        Order::live(position.settle(enqueued.base))
    }
}

pub(crate) fn key(number: u32) -> StateKeyNum {
    StateKeyNum(number)
}

pub(crate) fn event(number: u64) -> StateValue {
    StateValue::Event(EventNum(number))
}

#[test]
fn every_key_is_known_at_every_order() {
    let bench = Bench::new();
    let first = bench.step(&[(key(1), event(10)), (key(2), event(11))]);
    let second = bench.step(&[(key(1), event(12)), (key(2), event(11))]);
    let third = bench.step(&[(key(2), StateValue::Absent)]);
    let snapshot = bench.store.snapshot();
    let look = |order, number| at(&*snapshot, bench.room, StateRef::Main(order), key(number)).unwrap();
    assert_eq!([look(first, 1), look(second, 1), look(third, 1)], [event(10), event(12), event(12)]);
    assert_eq!([look(first, 2), look(second, 2), look(third, 2)], [event(11), event(11), StateValue::Absent]);
    assert_eq!(look(Order::MIN, 1), StateValue::Absent);
    assert_eq!(current(&*snapshot, bench.room, key(1)).unwrap(), Some(EventNum(12)));
    assert_eq!(current(&*snapshot, bench.room, key(2)).unwrap(), None);
    let told: Vec<_> = changes(&*snapshot, bench.room, first, third).unwrap().map(Result::unwrap).collect();
    assert_eq!(told, [(second, vec![(key(1), event(10))]), (third, vec![(key(2), event(11))])]);
    let listed: Vec<_> = list_current(&*snapshot, bench.room).unwrap().map(Result::unwrap).collect();
    assert_eq!(listed, [(key(1), EventNum(12))]);
    let whole: Vec<_> =
        full(&*snapshot, bench.room, StateRef::Main(first)).unwrap().map(Result::unwrap).collect();
    assert_eq!(whole, [(key(1), EventNum(10)), (key(2), EventNum(11))]);
    let differing = diff(&*snapshot, bench.room, StateRef::Main(first), StateRef::Main(third)).unwrap();
    assert_eq!(differing, [(key(1), event(10), event(12)), (key(2), event(11), StateValue::Absent)]);
}

#[test]
fn places_between_two_changes_are_one_reference() {
    let bench = Bench::new();
    let first = bench.step(&[(key(1), event(10))]);
    let nothing = bench.step(&[(key(1), event(10))]);
    let second = bench.step(&[(key(1), event(11))]);
    let snapshot = bench.store.snapshot();
    let round = |order| canonical(&*snapshot, bench.room, StateRef::Main(order)).unwrap();
    assert_eq!(round(nothing), StateRef::Main(first));
    assert_eq!(round(Order::upto(nothing.anchor)), StateRef::Main(first));
    assert_eq!(round(Order::MAX), StateRef::Main(second));
    assert_eq!(just_below(&*snapshot, bench.room, second).unwrap(), StateRef::Main(first));
    assert_eq!(just_below(&*snapshot, bench.room, first).unwrap(), StateRef::EMPTY);
    assert_eq!(tip(&*snapshot, bench.room).unwrap(), StateRef::Main(second));
}

#[test]
fn the_steps_of_one_batch_see_one_another() {
    let bench = Bench::new();
    let mut batch = bench.store.batch(&Guard::alone());
    let orders: Vec<Order> = (0..3)
        .map(|number| {
            let order = Order::live(batch.position(&LogEntry::RoomState { room: bench.room }));
            apply(&mut batch, bench.room, order, &[(key(1), event(number))]).unwrap();
            order
        })
        .collect();
    assert_eq!(at(&batch, bench.room, StateRef::Main(orders[0]), key(1)).unwrap(), event(0));
    assert_eq!(just_below(&batch, bench.room, orders[2]).unwrap(), StateRef::Main(orders[1]));
    let base = bench.store.enqueue(batch).unwrap().base;
    bench.store.flush().unwrap();
    let snapshot = bench.store.snapshot();
    for (number, order) in orders.iter().enumerate() {
        let state = StateRef::Main(order.settle(base));
        assert_eq!(at(&*snapshot, bench.room, state, key(1)).unwrap(), event(number as u64));
    }
    assert_eq!(base, Position::ZERO.plus(1));
}

#[test]
fn two_steps_at_one_order_add_up() {
    let bench = Bench::new();
    let mut batch = bench.store.batch(&Guard::alone());
    let order = Order::live(batch.position(&LogEntry::RoomState { room: bench.room }));
    apply(&mut batch, bench.room, order, &[(key(1), event(1))]).unwrap();
    apply(&mut batch, bench.room, order, &[(key(1), event(2)), (key(2), event(3))]).unwrap();
    let rows: Vec<_> = changes(&batch, bench.room, Order::MIN, order).unwrap().map(Result::unwrap).collect();
    assert_eq!(rows, [(order, vec![(key(1), StateValue::Absent), (key(2), StateValue::Absent)])]);
    let below = just_below(&batch, bench.room, order).unwrap();
    assert_eq!(
        diff(&batch, bench.room, below, tip(&batch, bench.room).unwrap()).unwrap(),
        [(key(1), StateValue::Absent, event(2)), (key(2), StateValue::Absent, event(3)),]
    );
}

#[test]
fn a_key_keeps_its_number() {
    let bench = Bench::new();
    let mut next = 0;
    let topic = bench.write(|batch| intern_key(batch, bench.room, &mut next, "m.room.topic", "").unwrap());
    let (again, member) = bench.write(|batch| {
        let again = intern_key(batch, bench.room, &mut next, "m.room.topic", "").unwrap();
        (again, intern_key(batch, bench.room, &mut next, "m.room.member", "@a:b").unwrap())
    });
    assert_eq!((again, next), (topic, 2));
    let snapshot = bench.store.snapshot();
    assert_eq!(find_key(&*snapshot, bench.room, "m.room.member", "@a:b").unwrap(), Some(member));
    assert_eq!(find_key(&*snapshot, RoomNum(8), "m.room.member", "@a:b").unwrap(), None);
    let name = key_name(&*snapshot, bench.room, member).unwrap();
    assert_eq!(name, Some(("m.room.member".to_owned(), "@a:b".to_owned())));
}

#[test]
fn what_two_side_states_share_is_still_looked_up() {
    let bench = Bench::new();
    let mut batch = bench.store.batch(&Guard::alone());
    let mut next = 0;
    let many: Vec<_> = (0..9).map(|number| (key(number), event(number.into()))).collect();
    let below = make_side(&mut batch, bench.room, &mut next, StateRef::EMPTY, &many).unwrap();
    let above = make_side(&mut batch, bench.room, &mut next, below, &[(key(3), StateValue::Absent)]).unwrap();
    assert_eq!(diff(&batch, bench.room, above, below).unwrap(), [(key(3), StateValue::Absent, event(3))]);
    assert_eq!(distance(&batch, bench.room, above, below).unwrap(), 1);
}

#[test]
fn a_near_difference_asks_the_store_three_times_whatever_the_room() {
    let bench = Bench::new();
    // The keys are few enough for one walk: tests come to a full comparison sooner than servers do.
    let orders: Vec<Order> =
        (0..200).map(|number| bench.step(&[(key(number % 90), event(number.into()))])).collect();
    let snapshot = bench.store.snapshot();
    for at in [0, 50, 100, 190] {
        let asked = Counting::new(&snapshot);
        let (low, high) = (StateRef::Main(orders[at]), StateRef::Main(orders[at + 4]));
        let differing = diff(&asked, bench.room, low, high).unwrap();
        assert_eq!(differing.len(), 4);
        // The store is asked for the log between the places, the earlier values above, and the current values of keys
        // without those.
        assert!(asked.questions() <= 3, "at {at}: {}", asked.questions());
    }
}
