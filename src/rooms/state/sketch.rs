//! A state that is not written down: a stored one, and the keys in which it differs. The result of a resolution is one,
//! and so is the state after an event that is not stored yet.

use std::collections::BTreeMap;

use super::{Difference, StateRef, StateValue, at, at_many, canonical, diff, distance};
use crate::{
    ids::{Position, RoomNum, StateKeyNum},
    store::{Fault, Read},
};

/// A state as a difference from one that is stored. [`make_side`](super::make_side) writes it down.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sketch {
    /// The stored state from which this one differs.
    pub base: StateRef,
    /// The keys with another value than in `base`, rising, each once.
    pub changes: Vec<(StateKeyNum, StateValue)>,
}

impl From<StateRef> for Sketch {
    fn from(base: StateRef) -> Self {
        Self { base, changes: Vec::new() }
    }
}

impl Sketch {
    /// Gives the same state with these keys set.
    #[must_use]
    pub fn with(&self, changes: impl IntoIterator<Item = (StateKeyNum, StateValue)>) -> Self {
        let mut changed: BTreeMap<_, _> = self.changes.iter().copied().collect();
        changed.extend(changes);
        Self { base: self.base, changes: changed.into_iter().collect() }
    }

    /// Gives the same state, over the reference that all references to its base share.
    pub fn canonical(self, read: &(impl Read + ?Sized), room: RoomNum) -> Result<Self, Fault> {
        Ok(Self { base: canonical(read, room, self.base)?, changes: self.changes })
    }

    /// Settles the state, once the batch's first position is known.
    #[must_use]
    pub fn settle(self, base: Position) -> Self {
        Self { base: self.base.settle(base), changes: self.changes }
    }

    /// Whether the state stands on a place of a batch that is being built.
    pub fn is_pending(&self) -> bool {
        matches!(self.base, StateRef::Main(order) if order.anchor.is_pending())
    }

    /// Finds the value that the sketch itself sets this key to; `None` where its base decides.
    fn find(&self, key: StateKeyNum) -> Option<StateValue> {
        let index = self.changes.binary_search_by_key(&key, |(key, _)| *key).ok()?;
        self.changes.get(index).map(|(_, val)| *val)
    }

    /// Gives the value of a key in this state.
    pub fn at(
        &self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        key: StateKeyNum,
    ) -> Result<StateValue, Fault> {
        match self.find(key) {
            Some(val) => Ok(val),
            None => at(read, room, self.base, key),
        }
    }

    /// Lists the keys whose values differ, rising, with both values: see [`diff`].
    pub fn diff(
        &self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        other: &Self,
    ) -> Result<Vec<Difference>, Fault> {
        let mut differing: BTreeMap<StateKeyNum, (StateValue, StateValue)> =
            diff(read, room, self.base, other.base)?
                .into_iter()
                .map(|(key, here, there)| (key, (here, there)))
                .collect();
        let set: BTreeMap<StateKeyNum, ()> =
            self.changes.iter().chain(&other.changes).map(|(key, _)| (*key, ())).collect();
        let shared: Vec<_> = set.keys().copied().filter(|key| !differing.contains_key(key)).collect();
        let below = at_many(read, room, self.base, &shared)?;
        differing.extend(shared.into_iter().zip(below).map(|(key, val)| (key, (val, val))));
        for key in set.into_keys() {
            if let Some((here, there)) = differing.get_mut(&key) {
                *here = self.find(key).unwrap_or(*here);
                *there = other.find(key).unwrap_or(*there);
            }
        }
        differing.retain(|_, (here, there)| here != there);
        Ok(differing.into_iter().map(|(key, (here, there))| (key, here, there)).collect())
    }

    /// Tells how many keys may differ at most: see [`distance`](super::distance).
    pub fn distance(&self, read: &(impl Read + ?Sized), room: RoomNum, other: &Self) -> Result<u64, Fault> {
        let changes = self.changes.len().saturating_add(other.changes.len()) as u64;
        if self.base == other.base {
            return Ok(changes);
        }
        Ok(distance(read, room, self.base, other.base)?.saturating_add(changes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        rooms::state::{
            make_side,
            tests::{Bench, event, key},
        },
        store::Guard,
    };

    #[test]
    fn sketches_differ_as_the_states_do_that_are_made_of_them() {
        let bench = Bench::new();
        let first = StateRef::Main(bench.step(&[(key(1), event(1)), (key(2), event(2)), (key(3), event(3))]));
        let second = StateRef::Main(bench.step(&[(key(1), event(4)), (key(5), event(5))]));
        let mut next = 0;
        let side = bench.write(|batch| {
            make_side(
                batch,
                bench.room,
                &mut next,
                first,
                &[(key(2), StateValue::Absent), (key(9), event(9))],
            )
            .unwrap()
        });
        let all = [
            Sketch::from(first),
            Sketch::from(second),
            Sketch::from(side),
            Sketch::from(first).with([(key(1), event(4)), (key(5), event(5))]),
            Sketch::from(second).with([(key(2), StateValue::Absent), (key(3), event(3))]),
            Sketch::from(side)
                .with([(key(9), event(2)), (key(2), event(2))])
                .with([(key(9), StateValue::Absent)]),
        ];
        let mut batch = bench.store.batch(&Guard::alone());
        for left in &all {
            for right in &all {
                let mut made = |sketch: &Sketch| {
                    make_side(&mut batch, bench.room, &mut next, sketch.base, &sketch.changes).unwrap()
                };
                let (a, b) = (made(left), made(right));
                let expected = diff(&batch, bench.room, a, b).unwrap();
                assert_eq!(left.diff(&batch, bench.room, right).unwrap(), expected, "{left:?} {right:?}");
                assert!(left.distance(&batch, bench.room, right).unwrap() >= expected.len() as u64);
                for number in 0..10 {
                    let value = left.at(&batch, bench.room, key(number)).unwrap();
                    assert_eq!(value, at(&batch, bench.room, a, key(number)).unwrap());
                }
            }
        }
        // These are two ways to express one state.
        assert_eq!(all[1].diff(&batch, bench.room, &all[3]).unwrap(), []);
    }
}
