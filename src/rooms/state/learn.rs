//! Learning what keys had in the state below everything that we have of a room: the state that a join without members leaves
//! out (`docs/decisions/partial-state-joins.md`).
//!
//! A key that is learned was unknown, and not absent: nothing happened at the moment when it became known. So its value goes into
//! `state_now`, where the key did not change since, or into the first undo row above the base. References into the main line
//! then mean what they always should have, and nothing that is stored beside them has to change.

use std::ops::Bound;

use super::{
    StateValue,
    hole::{keep_below, keep_filled},
    now, put_now,
};
use crate::{
    ids::{Order, RoomNum, StateKeyNum},
    schema,
    store::{Batch, Direction, Fault, Read},
};

/// The effect that learning a key had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Learned {
    /// The key was known to have this value.
    Known,
    /// The key did not change since the base, so that its current value is another one now. This was the value before.
    Now(StateValue),
    /// The key changed since the base, so that only its past is another one.
    Past,
}

/// Lists the changes of a key above an order, rising, with the values before them.
pub(super) fn changes_above(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    base: Order,
    key: StateKeyNum,
    max: usize,
) -> Result<Vec<(Order, StateValue)>, Fault> {
    let low = Bound::Excluded((room, key, base));
    let high = Bound::Included((room, key, Order::MAX));
    let rows = schema::STATE_UNDO.range::<(RoomNum, StateKeyNum, Order)>(read, low, high, Direction::Up)?;
    rows.take(max).map(|row| row.map(|((_, _, order), prior)| (order, prior))).collect()
}

/// Puts a value before a change that is there, in the log as well.
pub(super) fn put_prior(
    batch: &mut Batch,
    room: RoomNum,
    order: Order,
    key: StateKeyNum,
    val: StateValue,
) -> Result<(), Fault> {
    let row = schema::STATE_LOG.get(&*batch, (room, order))?;
    let mut row = row.ok_or(Fault::Corrupt("a change of a room's state is not in its log"))?;
    for (_, prior) in row.changes.iter_mut().filter(|(changed, _)| *changed == key) {
        *prior = val;
    }
    schema::STATE_LOG.put(batch, (room, order), &row);
    schema::STATE_UNDO.put(batch, (room, key, order), &val);
    Ok(())
}

/// Learns the value of a key in the state at `base`. What is below the hole that opened there stays as it is, and what the events that fill
/// it changed.
pub(crate) fn learn(
    batch: &mut Batch,
    room: RoomNum,
    base: Order,
    key: StateKeyNum,
    val: StateValue,
) -> Result<Learned, Fault> {
    match changes_above(&*batch, room, base, key, 1)?.pop() {
        Some((_, prior)) if prior == val => Ok(Learned::Known),
        Some((order, _)) => {
            keep_below(batch, room, base.anchor, key)?;
            keep_filled(batch, room, base, key)?;
            put_prior(batch, room, order, key, val)?;
            Ok(Learned::Past)
        }
        None => {
            let before = now(batch, room, key)?;
            if before == val {
                return Ok(Learned::Known);
            }
            keep_below(batch, room, base.anchor, key)?;
            keep_filled(batch, room, base, key)?;
            put_now(batch, room, key, val);
            Ok(Learned::Now(before))
        }
    }
}

/// Learns the value of a key in the state at the base of an earlier stay, which reaches up to the base of the next one (`end`): what is
/// so from there on stays. Gives whether it was not known.
pub(crate) fn learn_before(
    batch: &mut Batch,
    room: RoomNum,
    (base, end): (Order, Order),
    key: StateKeyNum,
    val: StateValue,
) -> Result<bool, Fault> {
    // The base of the next stay sets the key anew, and says so by a row of its own.
    keep_below(batch, room, end.anchor, key)?;
    let change = changes_above(&*batch, room, base, key, 1)?.pop();
    let (order, prior) = change.ok_or(Fault::Corrupt("a stay that is over has no end"))?;
    if prior == val {
        return Ok(false);
    }
    keep_below(batch, room, base.anchor, key)?;
    keep_filled(batch, room, base, key)?;
    put_prior(batch, room, order, key, val)?;
    Ok(true)
}

/// Sets a derived key to this value from `base` on, up to now.
pub(crate) fn set_since(
    batch: &mut Batch,
    room: RoomNum,
    base: Order,
    key: StateKeyNum,
    val: StateValue,
) -> Result<(), Fault> {
    debug_assert!(val.is_derived(), "only what is derived is set for a stretch of the past");
    for (order, prior) in changes_above(&*batch, room, base, key, usize::MAX)? {
        if prior != val {
            put_prior(batch, room, order, key, val)?;
        }
    }
    put_now(batch, room, key, val);
    Ok(())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        ids::EventNum,
        rooms::state::{
            self, StateRef, at,
            tests::{Bench, event, key},
        },
        schema::events::{EventHeader, EventRow, Spans},
    };

    #[test]
    fn what_is_learned_of_an_earlier_stay_ends_with_it() {
        let bench = Bench::new();
        let below = bench.step(&[(key(4), event(4))]);
        let first = bench.step(&[(key(1), event(1))]);
        let base = Order { anchor: first.anchor, minor: -1 };
        bench.write(|batch| state::mark(batch, bench.room, base).unwrap());
        let changed = bench.step(&[(key(2), event(2))]);
        let next = bench.step(&[(key(3), event(3))]);
        let end = Order { anchor: next.anchor, minor: -1 };
        bench.write(|batch| state::mark(batch, bench.room, end).unwrap());
        let learned = bench.write(|batch| {
            let mut learn =
                |number, val| learn_before(batch, bench.room, (base, end), key(number), val).unwrap();
            [
                learn(2, event(7)),
                learn(4, event(4)),
                learn(9, event(9)),
                learn(9, event(9)),
                learn(3, event(8)),
            ]
        });
        assert_eq!(learned, [true, false, true, false, true]);
        let read = bench.store.snapshot();
        let values =
            |order| [2, 3, 9].map(|it| at(&*read, bench.room, StateRef::Main(order), key(it)).unwrap());
        let none = StateValue::Absent;
        assert_eq!(values(below), [none, none, none]);
        assert_eq!(values(base), [event(7), event(8), event(9)]);
        assert_eq!(values(changed), [event(2), event(8), event(9)]);
        assert_eq!(values(end), [event(2), none, none], "what comes after the stay is as it was");
        assert_eq!(values(next), [event(2), event(3), none]);
        assert_eq!(values(Order::MAX), [event(2), event(3), none]);
    }

    #[test]
    fn what_is_learned_was_so_all_the_time() {
        let bench = Bench::new();
        let base = bench.step(&[(key(1), event(1))]);
        let changed = bench.step(&[(key(2), event(2)), (key(3), event(3))]);
        let again = bench.step(&[(key(2), event(4))]);
        let learned = bench.write(|batch| {
            let mut learn = |number, val| learn(batch, bench.room, base, key(number), val).unwrap();
            [
                learn(1, event(1)),
                learn(2, event(7)),
                learn(3, StateValue::Absent),
                learn(9, event(8)),
                learn(9, event(9)),
            ]
        });
        let expected = [
            Learned::Known,
            Learned::Past,
            Learned::Known,
            Learned::Now(StateValue::Absent),
            Learned::Now(event(8)),
        ];
        assert_eq!(learned, expected);
        let read = bench.store.snapshot();
        let values =
            |order| [1, 2, 3, 9].map(|it| at(&*read, bench.room, StateRef::Main(order), key(it)).unwrap());
        assert_eq!(values(base), [event(1), event(7), StateValue::Absent, event(9)]);
        assert_eq!(values(changed), [event(1), event(2), event(3), event(9)]);
        assert_eq!(values(again), [event(1), event(4), event(3), event(9)]);
    }

    /// Has a place in the timeline filled.
    fn put_event(batch: &mut Batch, room: RoomNum, order: Order) {
        let header = EventHeader {
            event: EventNum(1),
            key: [1; 32].into(),
            sent_ms: 0,
            depth: 1,
            auth_depth: 0,
            state_key: None,
            replaces: None,
            redacted_by: None,
            unseen: false,
            before: None,
            after: None,
            prev: Vec::new(),
            auth: Vec::new(),
            sent_by: None,
            let_in: false,
            rejected: false,
            expired: false,
            spans: Spans::default(),
        };
        schema::TIMELINE.put(batch, (room, order), &EventRow { header, json: Bytes::from_static(b"{}") });
    }

    #[test]
    fn what_fills_the_hole_keeps_what_its_events_changed() {
        for learns_meanwhile in [false, true] {
            let bench = Bench::new();
            let room = bench.room;
            let below = bench.step(&[(key(5), event(50))]);
            // The join comes with two members who are presumed to be as events say, and nothing is known of the third.
            let join = bench.step(&[(key(1), event(10)), (key(2), event(20)), (key(5), StateValue::Absent)]);
            let missing = vec!["$missing".to_owned()];
            let hole = Order::live(bench.step(&[]).anchor);
            let base = bench
                .write(|batch| state::open_hole(batch, room, hole.anchor, false, missing.clone()).unwrap());
            let segment = state::Segment {
                bottom: vec![(key(1), event(9))],
                steps: vec![vec![(key(1), event(10))], vec![], vec![(key(4), event(40))]],
                missing,
            };
            let mut fill = state::Fill::plan(&*bench.store.snapshot(), room, hole, &segment).unwrap();
            let learn_all = || {
                bench.write(|batch| {
                    for (number, val) in [(1, 11), (2, 21), (3, 31), (4, 41)] {
                        learn(batch, room, base, key(number), event(val)).unwrap();
                    }
                });
            };
            if learns_meanwhile {
                learn_all();
            }
            let orders = loop {
                let done = bench.write(|batch| {
                    let orders = fill.part(batch, room).unwrap();
                    orders.iter().flatten().for_each(|order| put_event(batch, room, *order));
                    orders
                });
                if let Some(orders) = done {
                    break orders;
                }
            };
            if !learns_meanwhile {
                learn_all();
            }
            let read = bench.store.snapshot();
            let values =
                |order| [1, 4, 5].map(|it| at(&*read, room, StateRef::Main(order), key(it)).unwrap());
            let none = StateValue::Absent;
            assert_eq!(values(base), [event(11), event(41), none], "{learns_meanwhile}");
            assert_eq!(values(orders[2]), [event(10), event(40), none], "{learns_meanwhile}");
            assert_eq!(values(orders[1])[0], event(10), "what an event of the past set is so after it");
            assert_eq!(values(orders[0])[0], event(10));
            assert_eq!(values(Order { minor: orders[0].minor - 1, ..orders[0] })[0], event(9));
            assert_eq!(values(join), [event(10), none, none], "what is below the hole stays");
            assert_eq!(values(below), [none, none, event(50)]);
        }
    }

    #[test]
    fn a_derived_key_is_set_for_the_whole_stretch() {
        let bench = Bench::new();
        let (there, gone) = (StateValue::Derived(1), StateValue::Absent);
        let base = bench.step(&[(key(1), event(1))]);
        let came = bench.step(&[(key(5), there)]);
        let left = bench.step(&[(key(5), gone)]);
        bench.write(|batch| set_since(batch, bench.room, base, key(5), there).unwrap());
        let read = bench.store.snapshot();
        for order in [base, came, left] {
            assert_eq!(at(&*read, bench.room, StateRef::Main(order), key(5)).unwrap(), there);
        }
    }
}
