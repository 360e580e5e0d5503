//! Staged steps: a change of a room's state that is larger than a batch.
//!
//! A position is reserved far above everything given out ([`Store::ahead`](crate::store::Store::ahead)), and the parts
//! are written at orders of that anchor, each a batch of its own: the new values into `state_now`, marked as staged,
//! with undo and log rows beside them, and marked rows of users and counts ([`Marked`]). While `stage` names the step,
//! its rows do not count: a staged value stands for the one in its undo row, a marked row for the one before, and every
//! place on the main line lies below the parts. The last batch is small: it deletes the row of `stage` and gets the
//! reserved position, so that everything counts at once, for readers of rows and of the log alike.
//!
//! A step stands below the event that causes it ([`step_order`]). The state that a join brings is a step, too, from the
//! state that we had of the room, if any: its parts stand at the floor of the hole that opens there ([`base_order`]).
//!
//! A step that is not finished, because the server ended or the last batch was refused, is taken back before the room
//! changes again. Nobody else changes the room meanwhile, because the one who stages holds the room's seat.

use std::{collections::BTreeMap, ops::Bound};

use super::{last_change, log_changes, now};
use crate::{
    ids::{EventNum, Order, Position, RoomNum, StateKeyNum},
    schema::{
        self,
        marked::{Marked, Staged},
        state::{NowRow, StageRow, StateValue},
    },
    store::{
        Batch, Direction, Fault, Read, Table,
        key::{Key, Value},
    },
};

/// Write at most this many keys in one part, each with two rows of state and at most two of a user of ours. Tests use a
/// small bound to get several parts in small rooms.
pub const PART_KEYS_MAX: usize = if cfg!(test) { 8 } else { 1_000 };
/// A step has at most this many parts, because each takes a minor of the reserved position.
const PARTS_MAX: u32 = 1 << 20;
/// A base has at most this many parts, because each takes a minor of the floor of its hole.
const BASE_PARTS_MAX: u32 = 1 << 16;

/// Gives the order of a part of a step: below the event that causes the step, above everything that was there before
/// it.
pub fn step_order(anchor: Position, part: u32) -> Result<Order, Fault> {
    let from_end =
        PARTS_MAX.checked_sub(part).and_then(|left| i32::try_from(left).ok()).filter(|left| *left > 0);
    from_end.map(|left| Order { anchor, minor: -left }).ok_or(Fault::Corrupt("a step has too many parts"))
}

/// Gives the order of a part of a base: the state above a hole, as a step from the state below the hole.
pub fn base_order(anchor: Position, part: u32) -> Result<Order, Fault> {
    let above = i32::try_from(part).ok().filter(|_| part < BASE_PARTS_MAX);
    let order = above.map(|above| Order { anchor, minor: i32::MIN.saturating_add(above) });
    order.ok_or(Fault::Corrupt("a base has too many parts"))
}

/// Finds the step of a room that is not finished.
pub fn find(read: &(impl Read + ?Sized), room: RoomNum) -> Result<Option<StageRow>, Fault> {
    schema::STAGE.get(read, room)
}

/// Lists the rooms that have a step which is not finished.
pub fn list_rooms(read: &(impl Read + ?Sized)) -> Result<Vec<RoomNum>, Fault> {
    schema::STAGE.prefix::<()>(read, (), Direction::Up)?.map(|row| row.map(|(room, _)| room)).collect()
}

/// Begins a step, or the parts at a reserved position of a step that has begun; the first of them is in the same batch.
pub fn begin(batch: &mut Batch, room: RoomNum, anchor: Position, makes_room: bool) -> Result<(), Fault> {
    debug_assert!(!anchor.is_pending(), "a step is staged at a reserved position");
    let brings_from = find(batch, room)?.and_then(|stage| stage.brings_from);
    schema::STAGE.put(batch, room, &StageRow { anchor: Some(anchor), makes_room, brings_from });
    Ok(())
}

/// Begins a step that takes events into the room before it changes the state: into a room that it makes, or, with the numbers
/// of the first event and of the first state key, into one that was there.
pub fn begin_to_bring(batch: &mut Batch, room: RoomNum, brings_from: Option<(EventNum, StateKeyNum)>) {
    schema::STAGE.put(
        batch,
        room,
        &StageRow { anchor: None, makes_room: brings_from.is_none(), brings_from },
    );
}

/// Writes a key of the first state of a room that a step makes. Nobody reads the room before the step is finished, so that
/// nothing needs to be kept of the value before.
pub fn put_first(batch: &mut Batch, room: RoomNum, key: StateKeyNum, val: StateValue) -> Result<(), Fault> {
    debug_assert!(find(batch, room)?.is_some_and(|stage| stage.makes_room), "the room is being made");
    super::put_now(batch, room, key, val);
    Ok(())
}

/// Writes a part of a step at its order: keys with their new values, at most [`PART_KEYS_MAX`], each key once in the
/// whole step. Gives `false` when none of them changes, so that nothing is written.
pub fn put_part(
    batch: &mut Batch,
    room: RoomNum,
    order: Order,
    changes: &[(StateKeyNum, StateValue)],
) -> Result<bool, Fault> {
    debug_assert!(changes.len() <= PART_KEYS_MAX, "a part fits a batch");
    debug_assert!(
        find(batch, room)?.is_some_and(|stage| stage.anchor == Some(order.anchor)),
        "a part is of the step that began"
    );
    let (mut priors, mut counted) = (BTreeMap::new(), 0);
    for (key, val) in changes {
        let prior = now(batch, room, *key)?;
        if prior == *val {
            continue;
        }
        schema::STATE_UNDO.put(batch, (room, *key, order), &prior);
        schema::STATE_NOW.put(batch, (room, *key), &NowRow { val: *val, staged_at: Some(order) });
        priors.insert(*key, prior);
        counted += u64::from(!prior.is_derived() && !val.is_derived());
    }
    let is_any = !priors.is_empty();
    log_changes(batch, room, order, priors, counted)?;
    Ok(is_any)
}

/// Makes the rows of the step count, from this batch on; or ends a step of which everything was taken back.
pub fn finish(batch: &mut Batch, room: RoomNum) {
    schema::STAGE.delete(batch, room);
}

/// Takes back the newest part of the state that an unfinished step at this position has written, and gives its keys;
/// `None` when no part is left.
pub fn clear_part(
    batch: &mut Batch,
    room: RoomNum,
    anchor: Position,
) -> Result<Option<Vec<StateKeyNum>>, Fault> {
    let newest = last_change(&*batch, room, Bound::Included(Order::upto(anchor)))?;
    let Some((order, step)) = newest.filter(|(order, _)| order.anchor == anchor) else { return Ok(None) };
    for (key, prior) in &step.changes {
        super::put_now(batch, room, *key, *prior);
        schema::STATE_UNDO.delete(batch, (room, *key, order));
    }
    schema::STATE_LOG.delete(batch, (room, order));
    Ok(Some(step.changes.into_iter().map(|(key, _)| key).collect()))
}

/// Deletes some state keys of which an unfinished step brought the first with this number: nothing names them. Gives `true`
/// when none are left.
pub fn clear_keys(
    batch: &mut Batch,
    room: RoomNum,
    first: StateKeyNum,
    keys_max: usize,
) -> Result<bool, Fault> {
    let keys: Vec<StateKeyNum> = {
        let (low, high) = (Bound::Included((room, first)), Bound::Included((room, StateKeyNum(u32::MAX))));
        let rows = schema::STATE_KEY.range::<(RoomNum, StateKeyNum)>(&*batch, low, high, Direction::Down)?;
        rows.take(keys_max).map(|row| row.map(|((_, key), _)| key)).collect::<Result<_, _>>()?
    };
    for key in &keys {
        super::forget_key(batch, room, *key)?;
    }
    Ok(keys.is_empty())
}

/// Deletes the whole state of a room that was never finished, and the step with it.
pub fn clear_all(batch: &mut Batch, room: RoomNum) {
    schema::STATE_KEY.delete_prefix::<(RoomNum,)>(batch, (room,));
    schema::STATE_KEY_NUM.delete_prefix::<(RoomNum,)>(batch, (room,));
    schema::STATE_NOW.delete_prefix::<(RoomNum,)>(batch, (room,));
    schema::STATE_UNDO.delete_prefix::<(RoomNum,)>(batch, (room,));
    schema::STATE_LOG.delete_prefix::<(RoomNum,)>(batch, (room,));
    schema::STAGE.delete(batch, room);
    schema::PURGE.delete(batch, room);
}

/// Gives the value that counts from a row of `state_now`.
pub(super) fn counted(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    key: StateKeyNum,
    row: NowRow,
) -> Result<StateValue, Fault> {
    let Some(order) = row.staged_at else { return Ok(row.val) };
    match find(read, room)? {
        Some(stage) if stage.anchor == Some(order.anchor) => {
            Ok(schema::STATE_UNDO.get(read, (room, key, order))?.unwrap_or(StateValue::Absent))
        }
        _ => Ok(row.val),
    }
}

/// Gives the row that counts of one that a staged step of this room may have written: the row before the step while that
/// is not finished.
pub fn row_that_counts<V>(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    row: Option<Marked<V>>,
) -> Result<Option<V>, Fault> {
    let Some(Marked { now, staged }) = row else { return Ok(None) };
    let Some(staged) = staged else { return Ok(now) };
    let is_open = find(read, room)?.is_some_and(|stage| stage.anchor == Some(staged.anchor));
    Ok(if is_open { staged.before } else { now })
}

/// Takes back what the unfinished step at this position made of a row: it is again as it was before the step.
pub fn restore<K: Key, V: Value>(
    batch: &mut Batch,
    table: &Table<K, Marked<V>>,
    key: K::Ref<'_>,
    anchor: Position,
) -> Result<(), Fault> {
    let staged = table.get(&*batch, key)?.and_then(|row| row.staged);
    match staged.filter(|staged| staged.anchor == anchor) {
        None => {}
        Some(Staged { before: Some(before), .. }) => table.put(batch, key, &before.into()),
        Some(Staged { before: None, .. }) => table.delete(batch, key),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        rooms::state::{self, StateRef, tests::Bench},
        store::{Guard, LogEntry},
    };

    type Map = BTreeMap<StateKeyNum, StateValue>;

    const KEYS: u32 = 40;

    /// Checks the current state by every way of asking for it.
    fn assert_current(read: &impl Read, room: RoomNum, expected: &Map) {
        let keys: Vec<StateKeyNum> = (0..KEYS).map(StateKeyNum).collect();
        let one_by_one = keys.iter().map(|key| (*key, now(read, room, *key).unwrap()));
        let set: Map = one_by_one.filter(|(_, val)| *val != StateValue::Absent).collect();
        assert_eq!(&set, expected);
        let tip = state::tip(read, room).unwrap();
        let listed: Map = state::list_current(read, room)
            .unwrap()
            .map(|row| row.map(|(key, event)| (key, StateValue::Event(event))).unwrap())
            .collect();
        assert_eq!(&listed, expected, "listed");
        let full: Map = state::full(read, room, tip)
            .unwrap()
            .map(|row| row.map(|(key, event)| (key, StateValue::Event(event))).unwrap())
            .collect();
        assert_eq!(&full, expected, "in full");
        for many in [state::at_many(read, room, tip, &keys), state::list_at(read, room, tip, &keys)] {
            let many: Map = keys
                .iter()
                .copied()
                .zip(many.unwrap())
                .filter(|(_, val)| *val != StateValue::Absent)
                .collect();
            assert_eq!(&many, expected, "many at once");
        }
    }

    fn set(map: &mut Map, changes: &[(StateKeyNum, StateValue)]) {
        for (key, val) in changes {
            if *val == StateValue::Absent {
                map.remove(key);
            } else {
                map.insert(*key, *val);
            }
        }
    }

    fn write(bench: &Bench, staged_at: Position, build: impl FnOnce(&mut Batch)) {
        let mut batch = bench.store.batch(&Guard::alone());
        build(&mut batch);
        batch.stage_at(staged_at);
        drop(bench.store.enqueue(batch).unwrap());
        bench.store.flush().unwrap();
    }

    /// Stages a step but for its last batch, and checks that nothing of it counts yet.
    fn stage(bench: &Bench, changes: &[(StateKeyNum, StateValue)], old: &Map) -> Position {
        let (room, anchor) = (bench.room, bench.store.begin_step().unwrap().anchor());
        for (number, part) in changes.chunks(PART_KEYS_MAX).enumerate() {
            write(bench, anchor, |batch| {
                begin(batch, room, anchor, false).unwrap();
                put_part(batch, room, step_order(anchor, number as u32).unwrap(), part).unwrap();
            });
            assert_current(&*bench.store.snapshot(), room, old);
            assert_current(&bench.store.batch(&Guard::alone()), room, old);
        }
        anchor
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_staged_step_counts_at_once_or_not_at_all(
            steps in prop::collection::vec(
                (prop::collection::btree_map(0..KEYS, prop::bool::weighted(0.8), 0..30), 0_u8..3), 1..8),
        ) {
            let bench = Bench::new();
            let (room, mut event) = (bench.room, 0);
            let mut told: Vec<(Order, Map)> = vec![(Order::MIN, Map::new())];
            for (sets, how) in steps {
                let changes: Vec<_> = sets
                    .into_iter()
                    .map(|(key, is_set)| {
                        event += 1;
                        (StateKeyNum(key), if is_set { StateValue::Event(EventNum(event)) } else { StateValue::Absent })
                    })
                    .collect();
                let old = told.last().unwrap().1.clone();
                let mut new = old.clone();
                set(&mut new, &changes);
                let order = if how == 0 {
                    bench.step(&changes)
                } else {
                    let anchor = stage(&bench, &changes, &old);
                    if how == 1 {
                        // The step is taken back, part by part.
                        while bench.write(|batch| clear_part(batch, room, anchor).unwrap()).is_some() {
                            assert_current(&*bench.store.snapshot(), room, &old);
                        }
                        bench.write(|batch| finish(batch, room));
                        assert_current(&*bench.store.snapshot(), room, &old);
                        new = old;
                        bench.step(&[])
                    } else {
                        let before = bench.store.snapshot();
                        let mut batch = bench.store.batch(&Guard::alone());
                        batch.position(&LogEntry::RoomState { room });
                        finish(&mut batch, room);
                        batch.begin_at(anchor);
                        let enqueued = bench.store.enqueue(batch).unwrap();
                        prop_assert_eq!(enqueued.base, anchor);
                        bench.store.flush().unwrap();
                        assert_current(&*before, room, &told.last().unwrap().1);
                        Order::live(anchor)
                    }
                };
                assert_current(&*bench.store.snapshot(), room, &new);
                told.push((order, new));
                for (order, map) in &told {
                    let snapshot = bench.store.snapshot();
                    let full: Map = state::full(&*snapshot, room, StateRef::Main(*order))
                        .unwrap()
                        .map(|row| row.map(|(key, event)| (key, StateValue::Event(event))).unwrap())
                        .collect();
                    prop_assert_eq!(&full, map);
                    for key in (0..KEYS).map(StateKeyNum) {
                        let found = state::at(&*snapshot, room, StateRef::Main(*order), key).unwrap();
                        prop_assert_eq!(found, map.get(&key).copied().unwrap_or(StateValue::Absent));
                    }
                }
            }
        }
    }

    #[test]
    fn the_last_batch_gives_out_the_positions_of_the_parts_though_it_claims_none() {
        let bench = Bench::new();
        let anchor = bench.store.begin_step().unwrap().anchor();
        bench.stage(anchor, |batch| {
            batch.position(&LogEntry::RoomState { room: bench.room });
            begin(batch, bench.room, anchor, false).unwrap();
        });
        let mut batch = bench.store.batch(&Guard::alone());
        finish(&mut batch, bench.room);
        batch.begin_at(anchor.plus(1));
        drop(bench.store.enqueue(batch).unwrap());
        bench.store.flush().unwrap();
        assert_eq!(bench.store.snapshot().upto(), anchor, "readers of the log meet the part");
        assert_eq!(
            bench.step(&[]).anchor,
            anchor.plus(1),
            "the position of the part is given to nothing else"
        );
    }

    #[test]
    fn the_last_batch_of_a_step_is_refused_once_its_position_is_past() {
        let bench = Bench::new();
        let next = bench.step(&[]).anchor.plus(1);
        let mut batch = bench.store.batch(&Guard::alone());
        batch.position(&LogEntry::Server);
        batch.begin_at(next);
        bench.step(&[]);
        assert!(bench.store.enqueue(batch).is_err());
    }
}
