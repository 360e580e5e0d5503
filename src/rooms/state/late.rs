//! Values that a room's state lacked from a base on, because the events could not be believed when a join brought them.
//!
//! The layout lets them in late: the value of a key between a base and its first change above is the prior value of that change,
//! which is one row. So all references to places between keep their meaning but for the key, which is there now.

use std::collections::BTreeMap;

use super::{
    hole,
    learn::{changes_above, put_prior},
    log_changes,
};
use crate::{
    ids::{Order, RoomNum, StateKeyNum},
    schema::{self, state::StateValue},
    store::{Batch, Fault, Read},
};

/// Whether a key has changed above a place of the main line.
pub fn has_changed_above(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    key: StateKeyNum,
    base: Order,
) -> Result<bool, Fault> {
    Ok(!changes_above(read, room, base, key, 1)?.is_empty())
}

/// Sets a key that a base lacks, from the base up to the first change of the key above it. `base` is the marker of the base.
/// Nothing happens where the key has a value there already. Errors: [`Fault::Corrupt`] where the key has not changed since, so that
/// it must be changed by a step first.
pub fn set_from(
    batch: &mut Batch,
    room: RoomNum,
    key: StateKeyNum,
    base: Order,
    val: StateValue,
) -> Result<(), Fault> {
    let first = changes_above(&*batch, room, base, key, 1)?.pop();
    let (order, prior) = first.ok_or(Fault::Corrupt("a key that is set late has never changed"))?;
    if prior != StateValue::Absent {
        return Ok(());
    }
    keep_below(batch, room, key, base)?;
    put_prior(batch, room, order, key, val)
}

/// Keeps what is below a base as it is: the key is absent there. As long as nothing fills the hole below the base, a row at its floor
/// says so, because events that fill it may set the key; from then on what fills it is as it was.
fn keep_below(batch: &mut Batch, room: RoomNum, key: StateKeyNum, base: Order) -> Result<(), Fault> {
    if schema::HOLE.contains(batch, (room, Order::live(base.anchor)))? {
        return hole::keep_below(batch, room, base.anchor, key);
    }
    if schema::STATE_UNDO.get(batch, (room, key, base))?.is_some() {
        return Ok(());
    }
    schema::STATE_UNDO.put(batch, (room, key, base), &StateValue::Absent);
    log_changes(batch, room, base, BTreeMap::from([(key, StateValue::Absent)]), 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::Position,
        rooms::state::{
            self, StateRef,
            tests::{Bench, event, key},
        },
    };

    #[test]
    fn a_key_that_a_base_lacked_is_there_from_the_base_on_and_not_below() {
        let bench = Bench::new();
        let below = bench.step(&[(key(1), event(1))]);
        let lowest = bench.step(&[(key(2), event(2))]);
        let base = Order { anchor: lowest.anchor, minor: -1 };
        bench.write(|batch| state::mark(batch, bench.room, base).unwrap());
        let changed = bench.step(&[(key(3), event(3))]);
        let late = bench.step(&[(key(4), event(4))]);
        bench.write(|batch| {
            assert!(!has_changed_above(batch, bench.room, key(9), base).unwrap());
            set_from(batch, bench.room, key(3), base, event(30)).unwrap();
            set_from(batch, bench.room, key(4), base, event(40)).unwrap();
            // A key that is set from the base on stays as it is.
            set_from(batch, bench.room, key(4), base, event(41)).unwrap();
            assert!(set_from(batch, bench.room, key(9), base, event(9)).is_err());
        });
        let snapshot = bench.store.snapshot();
        let at =
            |order: Order, of| state::at(&*snapshot, bench.room, StateRef::Main(order), key(of)).unwrap();
        for (order, three, four) in [
            (below, StateValue::Absent, StateValue::Absent),
            (base, event(30), event(40)),
            (lowest, event(30), event(40)),
            (changed, event(3), event(40)),
            (late, event(3), event(4)),
        ] {
            assert_eq!((at(order, 3), at(order, 4)), (three, four), "{order:?}");
        }
        assert_eq!(at(Order::live(Position::MAX), 3), event(3));
    }

    #[test]
    fn an_event_that_is_set_late_and_fills_the_hole_is_in_the_state_after_it() {
        for fills_first in [false, true] {
            let bench = Bench::new();
            let room = bench.room;
            let below = bench.step(&[(key(1), event(1))]);
            let join = Order::live(bench.step(&[]).anchor);
            let missing = vec!["$missing".to_owned()];
            let base = bench
                .write(|batch| state::open_hole(batch, room, join.anchor, false, missing.clone()).unwrap());
            bench.step(&[(key(3), event(3)), (key(4), event(4))]);
            let set_late = || {
                bench.write(|batch| {
                    set_from(batch, room, key(3), base, event(30)).unwrap();
                    set_from(batch, room, key(4), base, event(40)).unwrap();
                });
            };
            let fill = |steps: Vec<Vec<(StateKeyNum, StateValue)>>, hole: Order| {
                let segment = state::Segment { bottom: Vec::new(), steps, missing: missing.clone() };
                let mut fill = state::Fill::plan(&*bench.store.snapshot(), room, hole, &segment).unwrap();
                loop {
                    if let Some(orders) = bench.write(|batch| fill.part(batch, room).unwrap()) {
                        return orders;
                    }
                }
            };
            if !fills_first {
                set_late();
            }
            let orders = fill(vec![vec![(key(3), event(30))], Vec::new()], join);
            if fills_first {
                set_late();
            }
            let snapshot = bench.store.snapshot();
            let at = |order: Order, of| state::at(&*snapshot, room, StateRef::Main(order), key(of)).unwrap();
            assert_eq!((at(base, 3), at(base, 4)), (event(30), event(40)), "{fills_first}");
            assert_eq!((at(orders[0], 3), at(orders[1], 3)), (event(30), event(30)), "{fills_first}");
            assert_eq!(
                (at(below, 1), at(below, 3), at(below, 4)),
                (event(1), StateValue::Absent, StateValue::Absent)
            );
        }
    }
}
