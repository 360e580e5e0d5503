//! Who comes first of the jobs that are due, and how many run at once. Neither a user or a room nor a kind of job that has many of
//! them, or slow ones, holds the others up.

use std::collections::{BTreeMap, btree_map::Entry};

use super::Name;
use crate::{schema::jobs::Owner, store::timer::Timer};

/// At most this many jobs of one kind run at once because they are due. Each kind has places of its own, so that none waits for
/// another.
pub(super) const OF_KIND_MAX: usize = 32;
/// At most this many jobs of one user or of one room run at once because they are due, over all kinds.
pub(super) const OF_OWNER_MAX: usize = 4;

/// The jobs that run, and the places that they hold. What a flow carries out itself holds none: it is bounded by the requests of
/// its users.
#[derive(Debug, Default)]
pub(super) struct Held {
    running: BTreeMap<Name, Option<Owner>>,
    of_kind: BTreeMap<u8, usize>,
    of_owner: BTreeMap<Owner, usize>,
}

impl Held {
    pub(super) fn contains(&self, name: &Name) -> bool {
        self.running.contains_key(name)
    }

    /// Notes a job that a flow carries out itself. Answers `false` if it runs already.
    pub(super) fn begin(&mut self, name: Name) -> bool {
        match self.running.entry(name) {
            Entry::Vacant(entry) => {
                entry.insert(None);
                true
            }
            Entry::Occupied(_) => false,
        }
    }

    /// Takes a place for a job of this owner. Answers whether there was one; none if the job runs already.
    pub(super) fn begin_in_place(&mut self, name: Name, owner: Owner) -> Option<bool> {
        if self.contains(&name) {
            return None;
        }
        let of_kind = self.of_kind.entry(name.0).or_default();
        let of_owner = self.of_owner.entry(owner).or_default();
        let has_place = *of_kind < OF_KIND_MAX && (owner == Owner::Server || *of_owner < OF_OWNER_MAX);
        if has_place {
            *of_kind += 1;
            *of_owner += 1;
            self.running.insert(name, Some(owner));
        } else if *of_owner == 0 {
            self.of_owner.remove(&owner);
        }
        Some(has_place)
    }

    /// Gives back the place of a job that goes on without one for a while. Answers whose it was, if it had one.
    pub(super) fn rest(&mut self, name: &Name) -> Option<Owner> {
        let owner = self.running.get_mut(name)?.take()?;
        give_back(&mut self.of_kind, name.0);
        give_back(&mut self.of_owner, owner);
        Some(owner)
    }

    /// Gives a job its place again, also where none is free, so that those that are at work are counted.
    pub(super) fn go_on(&mut self, name: &Name, owner: Owner) {
        let Some(held @ None) = self.running.get_mut(name) else { return };
        *held = Some(owner);
        *self.of_kind.entry(name.0).or_default() += 1;
        *self.of_owner.entry(owner).or_default() += 1;
    }

    /// Notes that a job is over, and gives its place back.
    pub(super) fn end(&mut self, name: &Name) {
        let Some(Some(owner)) = self.running.remove(name) else { return };
        give_back(&mut self.of_kind, name.0);
        give_back(&mut self.of_owner, owner);
    }
}

fn give_back<K: Ord>(held: &mut BTreeMap<K, usize>, key: K) {
    if let Entry::Occupied(mut entry) = held.entry(key) {
        *entry.get_mut() = entry.get().saturating_sub(1);
        if *entry.get() == 0 {
            entry.remove();
        }
    }
}

/// Jobs that are due, in the order in which they begin.
#[derive(Debug, Default)]
pub(super) struct Line(Vec<(Owner, Timer)>);

impl Line {
    /// Makes a line of these timers, of which the oldest come first, and leaves out those beyond `jobs_max`. Each owner has a first
    /// job in line before any has a second one, and of those each kind has one before any has two.
    pub(super) fn of(due: impl Iterator<Item = Timer>, jobs_max: usize) -> Self {
        let (mut of_owner, mut of_kind) = (BTreeMap::<Owner, usize>::new(), BTreeMap::<_, usize>::new());
        let mut ranked: Vec<_> = due
            .map(|timer| {
                let owner = Owner::of(&timer);
                let nth_of_owner = if owner == Owner::Server { 0 } else { next(of_owner.entry(owner)) };
                let nth_of_kind = next(of_kind.entry((nth_of_owner, timer.kind)));
                (nth_of_owner, nth_of_kind, owner, timer)
            })
            .collect();
        // The sort is stable, so that those of one rank stay in the order in which they are due.
        ranked.sort_by_key(|(nth_of_owner, nth_of_kind, ..)| (*nth_of_owner, *nth_of_kind));
        ranked.truncate(jobs_max);
        Self(ranked.into_iter().map(|(_, _, owner, timer)| (owner, timer)).collect())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes all out of the line, in their order.
    pub(super) fn take(&mut self) -> Vec<(Owner, Timer)> {
        std::mem::take(&mut self.0)
    }

    /// Puts a job that found no place behind those that were put back before it.
    pub(super) fn put_back(&mut self, owner: Owner, timer: Timer) {
        self.0.push((owner, timer));
    }
}

/// Counts one more, and answers how many there were before.
fn next<K: Ord>(entry: Entry<'_, K, usize>) -> usize {
    let count = entry.or_default();
    *count += 1;
    *count - 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::{EventNum, RoomNum, UserNum},
        schema::jobs::Job,
    };

    #[test]
    fn each_owner_and_each_kind_has_its_turn_before_anybody_has_two() {
        let forget = |room, event| Job::ForgetOriginal { room: RoomNum(room), event: EventNum(event) };
        let send = |user| Job::SendDelayed { user: UserNum(user) };
        let jobs = [
            forget(1, 1),
            forget(1, 2),
            forget(1, 3),
            forget(2, 1),
            forget(3, 1),
            send(1),
            send(2),
            Job::TrimLog,
            forget(2, 2),
        ];
        let due = |jobs_max| {
            let timers = jobs.iter().zip(1..).map(|(job, due_ms)| job.timer(due_ms));
            Line::of(timers, jobs_max).take().into_iter().map(|(_, timer)| Job::read(&timer).unwrap())
        };
        let expected = [
            forget(1, 1),
            send(1),
            Job::TrimLog,
            forget(2, 1),
            send(2),
            forget(3, 1),
            forget(1, 2),
            forget(2, 2),
            forget(1, 3),
        ];
        assert_eq!(due(99).collect::<Vec<_>>(), expected);
        assert_eq!(due(4).collect::<Vec<_>>(), expected[..4]);
    }

    #[test]
    fn an_owner_and_a_kind_hold_no_more_than_their_places() {
        let mut held = Held::default();
        let name = |kind, number: u8| (kind, vec![number]);
        let room = |number| Owner::Room(RoomNum(number));
        for number in 0..9 {
            let has_place = usize::from(number) < OF_OWNER_MAX;
            assert_eq!(held.begin_in_place(name(1, number), room(1)), Some(has_place));
        }
        assert_eq!(held.begin_in_place(name(1, 0), room(1)), None, "it runs already");
        // A job that a flow carries out itself takes no place.
        assert!(held.begin(name(1, 100)) && !held.begin(name(1, 100)));
        let mut begun = OF_OWNER_MAX;
        for number in 101..200 {
            begun += usize::from(held.begin_in_place(name(1, number), room(number.into())) == Some(true));
        }
        assert_eq!(begun, OF_KIND_MAX);
        assert_eq!(held.begin_in_place(name(2, 0), room(201)), Some(true), "another kind has its own places");
        // A job that rests leaves room for one more, and comes back into a place of its own.
        let rests = name(1, 0);
        assert_eq!(held.rest(&rests), Some(room(1)));
        assert_eq!(held.rest(&rests), None, "it holds no place");
        assert_eq!(held.begin_in_place(name(1, 201), room(201)), Some(true));
        held.go_on(&rests, room(1));
        held.go_on(&rests, room(1));
        assert_eq!(held.of_kind[&1], OF_KIND_MAX + 1);
        held.end(&name(1, 201));
        assert_eq!(held.begin_in_place(name(1, 202), room(202)), Some(false));
        let all: Vec<_> = held.running.keys().cloned().collect();
        all.iter().for_each(|name| held.end(name));
        assert!(held.running.is_empty() && held.of_kind.is_empty() && held.of_owner.is_empty(), "{held:?}");
    }
}
