//! Sweeps: forgetting events that are kept aside, side states and state keys that nothing needs.
//!
//! An event aside is needed by the events that name it among their auth events, and by states that it is part of; a side
//! state by the events before or after which it stands, by heads, and by side states that stand on it; a state key by events
//! and states that it is a key of. The room's timeline,
//! its main line and its heads need others for themselves, and so do the newest events aside: a fair share of each server, so
//! that a server which sends many does not push out those of others.
//!
//! A sweep begins in a turn of the room ([`Change::begin_sweep`]) and finds out beside the turns what is needed
//! ([`Sweep::look`]), in one snapshot. Whatever is new since the beginning can need something old only by citing an event by
//! its id, and a state key by its name; such events and keys are noted, and each later turn makes sure first that what they need is
//! known to be needed ([`Swept::Cited`]). What is left is deleted in parts, each thing before what it needs itself, so that a sweep which is
//! interrupted leaves everything whole. The next one begins anew. The change with which a room comes to want a sweep sets a
//! timer, so that one comes also if the server ends before.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{
    Change,
    aside::{ASIDE_MAX, taken},
};
use crate::{
    error::{Error, Result},
    ids::{EventNum, RoomNum, SideNum, StateKeyNum},
    rooms::{
        event, members,
        resolve::Resolver,
        state::{self, StateRef},
    },
    schema::{
        self,
        jobs::Job,
        rooms::{AsideCount, AsideRow, EventHeader, RoomRow},
        state::StateValue,
    },
    store::{Direction, Fault, Read, timer},
};

/// Sweep a room once it keeps this many events aside that are not known to be needed.
const SWEPT_FROM: u64 = ASIDE_MAX / 4 * 3;
/// A sweep leaves at most this many events aside for being new.
const NEW_MAX: u64 = ASIDE_MAX / 2;
/// Sweep a room once it has given out this many numbers to side states since the last sweep.
const SIDES_MAX: u32 = if cfg!(test) { 60 } else { 10_000 };
/// Sweep a room once it has given out this many numbers to state keys since the last sweep. Most rooms never have as many.
const KEYS_MAX: u32 = if cfg!(test) { 80 } else { 20_000 };
/// A sweep waits for this long while the room's past is changed.
const PAST_CHANGES_FOR: Duration = Duration::from_secs(60);
/// A timer looks after rooms that want a sweep in steps of this many milliseconds.
const TIMER_STEP_MS: u64 = 5 * 60 * 1000;
/// Delete at most this many rows in one turn, so that others wait for their turn no longer than that.
const DELETED_AT_ONCE: usize = if cfg!(test) { 3 } else { 200 };

/// Something that others may need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Thing {
    /// An event that is kept aside.
    Event(EventNum),
    /// A side state of a fork of the room.
    Side(SideNum),
    /// A state key of the room.
    Key(StateKeyNum),
}

/// The numbers that a room had given out when a sweep began: whatever has a greater one is not swept.
#[derive(Clone, Copy, Debug)]
pub struct Began {
    room: RoomNum,
    next_event: u64,
    next_side: u32,
    next_key: u32,
}

/// A sweep that knows what is to be forgotten.
#[derive(Debug)]
pub struct Sweep {
    began: Began,
    /// The servers of the events that are kept aside, by the numbers of the events.
    asides: BTreeMap<EventNum, Box<str>>,
    /// The events aside whose states after them are these side states. Each needs the other, so that they go together.
    states_after: BTreeMap<SideNum, EventNum>,
    needed: BTreeSet<Thing>,
    /// The events aside that are not marked yet as what they are: whether the timeline, the main line or the heads need them.
    marks: Vec<(EventNum, bool)>,
    /// By how many more than are marked the room's count says that events are needed: rows of an older layout have no marks.
    miscounted: i64,
    /// The events, side states and state keys that are to be forgotten; the last one goes first.
    doomed: Vec<Thing>,
}

/// The outcome of a turn of a sweep.
#[derive(Debug)]
pub enum Swept {
    /// These events were cited meanwhile. Nothing was forgotten; what they need must be found first
    /// ([`Sweep::need_cited`]).
    Cited(Vec<EventNum>),
    /// A part was forgotten, and there is more.
    Part,
    /// Everything that nothing needs is forgotten.
    All,
}

/// Whether a room is to be swept that has this row.
pub(crate) fn is_wanted(read: &(impl Read + ?Sized), num: RoomNum, row: &RoomRow) -> Result<bool, Fault> {
    let count = schema::ASIDE_COUNT.get(read, num)?.unwrap_or_default();
    let AsideCount { sides_swept, keys_swept, .. } = count;
    Ok(taken(&count) >= SWEPT_FROM
        || row.next_side.saturating_sub(sides_swept) >= SIDES_MAX
        || row.next_key.saturating_sub(keys_swept) >= KEYS_MAX)
}

/// The time at which a timer looks whether a room still wants a sweep: some minutes from now, and the same for all changes
/// within five minutes, so that a room has few such timers.
pub(crate) fn timer_due_ms(now_ms: u64) -> u64 {
    (now_ms / TIMER_STEP_MS).saturating_add(2).saturating_mul(TIMER_STEP_MS)
}

impl Change {
    /// Whether the room is to be swept.
    pub fn wants_sweep(&self) -> Result<bool, Fault> {
        is_wanted(&self.batch, self.num, &self.row)
    }

    /// Sets the timer that has the room swept, if the room is to be swept because of something that this change has done.
    pub(crate) fn promise_sweep(&mut self, now_ms: u64) -> Result<(), Fault> {
        // Most changes add events to the timeline and do nothing else, so that nothing need be asked.
        let events = self.row.next_event.saturating_sub(self.row_before.next_event);
        let is_simple =
            events == self.added().len() as u64 && self.row.next_side == self.row_before.next_side;
        if !is_simple && self.wants_sweep()? {
            timer::set(&mut self.batch, &Job::Sweep { room: self.num }.timer(timer_due_ms(now_ms)));
        }
        Ok(())
    }

    /// Begins a sweep. Answers that name old side states are forgotten, because nothing else may need those.
    /// Errors: [`Error::Busy`] while somebody changes the room's past, or fetches what is to be written.
    pub fn begin_sweep(&mut self, resolver: &Resolver) -> Result<Began> {
        debug_assert!(self.added().is_empty(), "a sweep begins in a turn of its own");
        if !self.seat.note_cited() {
            return Err(Error::Busy { retry_after: PAST_CHANGES_FOR });
        }
        resolver.recent().forget(self.num);
        let RoomRow { next_event, next_side, next_key, .. } = self.row;
        Ok(Began { room: self.num, next_event, next_side, next_key })
    }

    /// Forgets a part of what a sweep found not to be needed.
    pub fn sweep(&mut self, sweep: &mut Sweep) -> Result<Swept> {
        debug_assert_eq!(sweep.began.room, self.num, "a sweep is of one room");
        let Some(cited) = self.seat.take_cited() else {
            return Err(Fault::Corrupt("a sweep does not know which events were cited meanwhile").into());
        };
        // A key needs nothing itself.
        sweep.needed.extend(cited.keys.into_iter().map(Thing::Key));
        let events = cited.events.into_iter().filter(|event| sweep.is_open(Thing::Event(*event)));
        let events: Vec<_> = events.collect();
        if !events.is_empty() {
            return Ok(Swept::Cited(events));
        }
        let mut count = self.count_aside()?;
        for _ in 0..DELETED_AT_ONCE {
            match sweep.doomed.pop() {
                Some(thing) if sweep.needed.contains(&thing) => {}
                Some(Thing::Key(key)) => state::forget_key(&mut self.batch, self.num, key)?,
                Some(Thing::Side(side)) => state::forget_side(&mut self.batch, self.num, side),
                // An outlier may have got its place in the timeline meanwhile.
                Some(Thing::Event(event)) => {
                    if let Some(aside) = schema::ASIDE.get(&self.batch, (self.num, event))? {
                        tracing::debug!(room = %self.num, %event, "an event aside is forgotten, because nothing needs it");
                        self.forget_aside(&aside, &mut count);
                        if let Some(StateRef::Side(after)) = aside.row.header.after
                            && !sweep.needed.contains(&Thing::Side(after))
                        {
                            state::forget_side(&mut self.batch, self.num, after);
                        }
                    }
                }
                None => match sweep.marks.pop() {
                    Some((event, is_needed)) => self.mark_needed(event, is_needed, &mut count)?,
                    None => {
                        let Began { next_side, next_key, .. } = sweep.began;
                        (count.sides_swept, count.keys_swept) = (next_side, next_key);
                        count.needed = count.needed.saturating_add_signed(sweep.miscounted.saturating_neg());
                        count.looked_at = EventNum(0);
                        schema::ASIDE_COUNT.put(&mut self.batch, self.num, &count);
                        return Ok(Swept::All);
                    }
                },
            }
        }
        schema::ASIDE_COUNT.put(&mut self.batch, self.num, &count);
        Ok(Swept::Part)
    }
}

impl Change {
    /// Marks an event aside, if it still is aside, as one that the room needs or does not need.
    fn mark_needed(&mut self, event: EventNum, is_needed: bool, count: &mut AsideCount) -> Result<(), Fault> {
        let aside = schema::ASIDE.get(&self.batch, (self.num, event))?;
        let Some(aside) = aside.filter(|aside| aside.is_needed != is_needed) else { return Ok(()) };
        count.needed = if is_needed { count.needed + 1 } else { count.needed.saturating_sub(1) };
        schema::ASIDE.put(&mut self.batch, (self.num, event), &AsideRow { is_needed, ..aside });
        Ok(())
    }
}

impl Sweep {
    /// Finds out what is needed. The snapshot has everything that the room had when the sweep began.
    pub fn look(read: &(impl Read + ?Sized), began: Began) -> Result<Self, Fault> {
        let mut sweep = Self {
            began,
            asides: BTreeMap::new(),
            states_after: BTreeMap::new(),
            needed: BTreeSet::new(),
            marks: Vec::new(),
            miscounted: 0,
            doomed: Vec::new(),
        };
        let mut marked = BTreeSet::new();
        for row in schema::ASIDE.prefix::<(RoomNum,)>(read, (began.room,), Direction::Up)? {
            let ((_, event), aside) = row?;
            if aside.is_needed {
                marked.insert(event);
            }
            if event.0 < began.next_event {
                let server = event::server_of(&aside.row.sender()).unwrap_or_default().into();
                sweep.asides.insert(event, server);
                if let Some(StateRef::Side(after)) = aside.row.header.after {
                    sweep.states_after.insert(after, event);
                }
            }
        }
        sweep.need_for_the_room(read)?;
        for event in sweep.asides.keys() {
            let is_needed = sweep.needed.contains(&Thing::Event(*event));
            if marked.contains(event) != is_needed {
                sweep.marks.push((*event, is_needed));
            }
        }
        let counted = schema::ASIDE_COUNT.get(read, began.room)?.unwrap_or_default().needed;
        sweep.miscounted = counted.cast_signed().saturating_sub((marked.len() as u64).cast_signed());
        sweep.need_newest(read)?;
        sweep.doom(read)?;
        Ok(sweep)
    }

    /// Takes what these events need off the list of what is to be forgotten.
    pub fn need_cited(&mut self, read: &(impl Read + ?Sized), cited: &[EventNum]) -> Result<(), Fault> {
        self.need(read, cited.iter().map(|event| Thing::Event(*event)).collect(), u64::MAX)?;
        let needed = &self.needed;
        self.doomed.retain(|thing| !needed.contains(thing));
        Ok(())
    }

    fn need_for_the_room(&mut self, read: &(impl Read + ?Sized)) -> Result<(), Fault> {
        let room = self.began.room;
        for row in schema::TIMELINE.prefix::<(RoomNum,)>(read, (room,), Direction::Up)? {
            let needs = self.list_needs_of_event(&row?.1.header);
            self.need(read, needs, u64::MAX)?;
        }
        if let Some(row) = schema::ROOM.get(read, room)? {
            let heads = row.heads.iter().chain(row.apart.iter().map(|branch| &branch.head));
            let needs = heads.filter_map(|head| side(head.after)).collect();
            self.need(read, needs, u64::MAX)?;
        }
        for row in schema::STATE_NOW.prefix::<(RoomNum,)>(read, (room,), Direction::Up)? {
            let ((_, key), row) = row?;
            self.need(read, needs_of_value(&(key, row.val)).collect(), u64::MAX)?;
        }
        for row in schema::STATE_LOG.prefix::<(RoomNum,)>(read, (room,), Direction::Up)? {
            self.need(read, row?.1.changes.iter().flat_map(needs_of_value).collect(), u64::MAX)?;
        }
        Ok(())
    }

    /// Keeps the newest events aside of each server, up to a fair share, with what they need. Everything that is kept for
    /// a server's events counts as that server's.
    fn need_newest(&mut self, read: &(impl Read + ?Sized)) -> Result<(), Fault> {
        let mut by_server: BTreeMap<Box<str>, Vec<EventNum>> = BTreeMap::new();
        for (event, server) in
            self.asides.iter().rev().filter(|(event, _)| self.is_open(Thing::Event(**event)))
        {
            by_server.entry(server.clone()).or_default().push(*event);
        }
        let share = share(by_server.values().map(|events| events.len() as u64).collect(), NEW_MAX);
        for events in by_server.into_values() {
            let mut left = share.min(events.len() as u64);
            for event in events {
                match self.need(read, vec![Thing::Event(event)], left)? {
                    Some(kept) => left = left.saturating_sub(kept),
                    None => break,
                }
            }
        }
        Ok(())
    }

    /// Notes that these are needed, with all that they need themselves. Gives the number of events that are; `None` if
    /// those were more than `events_max`, so that nothing was noted.
    fn need(
        &mut self,
        read: &(impl Read + ?Sized),
        mut open: Vec<Thing>,
        events_max: u64,
    ) -> Result<Option<u64>, Fault> {
        let (mut found, mut events) = (BTreeSet::new(), 0);
        while let Some(thing) = open.pop() {
            if !self.is_open(thing) || !found.insert(thing) {
                continue;
            }
            events += u64::from(matches!(thing, Thing::Event(_)));
            if events > events_max {
                return Ok(None);
            }
            open.extend(self.list_needs(read, thing)?);
        }
        self.needed.append(&mut found);
        Ok(Some(events))
    }

    /// Lists what is not needed, so that each thing comes after what it needs itself.
    fn doom(&mut self, read: &(impl Read + ?Sized)) -> Result<(), Fault> {
        let mut all: Vec<Thing> = self.asides.keys().copied().map(Thing::Event).collect();
        for side in state::list_sides(read, self.began.room)? {
            all.push(Thing::Side(side?));
        }
        for key in state::list_keys(read, self.began.room)? {
            let (key, event_type) = key?;
            if !members::is_derived(&event_type) {
                all.push(Thing::Key(key));
            }
        }
        let (mut seen, mut doomed) = (BTreeSet::new(), Vec::new());
        for thing in all {
            let mut open = vec![(self.goes_with(thing), false)];
            while let Some((thing, is_after_its_needs)) = open.pop() {
                if is_after_its_needs {
                    doomed.push(thing);
                } else if self.is_open(thing) && seen.insert(thing) {
                    open.push((thing, true));
                    let mut needs = self.list_needs(read, thing)?;
                    let own_states: Vec<_> =
                        needs.iter().copied().filter(|need| self.goes_with(*need) == thing).collect();
                    for own in own_states {
                        needs.extend(self.list_needs(read, own)?);
                    }
                    open.extend(needs.into_iter().map(|need| (self.goes_with(need), false)));
                }
            }
        }
        self.doomed = doomed;
        Ok(())
    }

    /// Gives the event with which a side state is forgotten, if this is the state after an event aside.
    fn goes_with(&self, thing: Thing) -> Thing {
        match thing {
            Thing::Side(side) => self.states_after.get(&side).map_or(thing, |event| Thing::Event(*event)),
            Thing::Event(_) | Thing::Key(_) => thing,
        }
    }

    /// Whether this may be forgotten, as far as is known.
    fn is_open(&self, thing: Thing) -> bool {
        let is_old = match thing {
            Thing::Event(event) => self.asides.contains_key(&event),
            Thing::Side(side) => side.0 < self.began.next_side,
            Thing::Key(key) => key.0 < self.began.next_key,
        };
        is_old && !self.needed.contains(&thing)
    }

    fn list_needs(&self, read: &(impl Read + ?Sized), thing: Thing) -> Result<Vec<Thing>, Fault> {
        let room = self.began.room;
        let needs = match thing {
            Thing::Event(event) => {
                let aside = schema::ASIDE.get(read, (room, event))?;
                aside.map_or_else(Vec::new, |aside| self.list_needs_of_event(&aside.row.header))
            }
            Thing::Side(number) => {
                let Some((base, entries)) = state::side_parts(read, room, number)? else {
                    return Ok(Vec::new());
                };
                let values = entries.iter().flat_map(needs_of_value);
                values.chain(side(base)).filter(|need| self.is_open(*need)).collect()
            }
            Thing::Key(_) => Vec::new(),
        };
        Ok(needs)
    }

    fn list_needs_of_event(&self, header: &EventHeader) -> Vec<Thing> {
        let sides = [header.before, header.after].into_iter().flatten().filter_map(side);
        let auth = header.auth.iter().copied().map(Thing::Event);
        let key = header.state_key.map(Thing::Key);
        auth.chain(sides).chain(key).filter(|need| self.is_open(*need)).collect()
    }
}

/// The things that a state needs because it has this value of a key.
fn needs_of_value((key, val): &(StateKeyNum, StateValue)) -> impl Iterator<Item = Thing> + use<> {
    val.event().map(Thing::Event).into_iter().chain([Thing::Key(*key)])
}

fn side(state: StateRef) -> Option<Thing> {
    match state {
        StateRef::Side(side) => Some(Thing::Side(side)),
        StateRef::Main(_) => None,
    }
}

/// Gives the greatest share that each may have so that all together have no more than `all`: who wants less leaves more to
/// the others.
fn share(mut wanted: Vec<u64>, all: u64) -> u64 {
    wanted.sort_unstable();
    let (mut left, mut others) = (all, wanted.len() as u64);
    for one in wanted {
        let share = left / others.max(1);
        if one > share {
            return share;
        }
        left -= one;
        others -= 1;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_wants_little_gets_it_and_the_others_share_the_rest() {
        assert_eq!(share(vec![1, 100, 3, 100], 24), 10);
        assert_eq!(share(vec![5, 5], 10), 10, "there is enough for all");
        assert_eq!(share(vec![9, 9, 9], 2), 0);
        assert_eq!(share(Vec::new(), 7), 7);
    }
}
