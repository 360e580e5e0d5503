//! State resolution: finds the state that a room has where its history forked. Specification: "State resolution" of room versions 1, 2
//! and 12. What follows is about versions 2 and 2.1 of the algorithm; the first one (`by_depth.rs`) is another one, which looks at
//! the conflicted events alone.
//!
//! The specification speaks of whole states and whole auth chains; this code reads only what is in conflict. The
//! conflicted state set is the union of differences between the states ([`state::diff`]); unconflicted values are
//! looked up where a rule asks for them; the auth difference is found by walking down from the conflicted events as far
//! as the states disagree (`difference.rs`). So resolving costs as much as the conflict does, however large the room
//! is. Tests compare the result with ruma's own resolution on random rooms (`tests.rs`).
//!
//! As in other servers, the auth chain of a state includes the state's own events.

mod by_depth;
mod difference;
mod iterate;
mod known;
mod loaded;
mod question;
mod recent;
mod resolver;
mod sort;
mod stored;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use ruma::{
    OwnedEventId,
    events::StateEventType,
    room_version_rules::{AuthorizationRules, RoomVersionRules, StateResolutionV2Rules},
    state_res::{self, Event as _},
};

pub use loaded::Loaded;
pub use question::{Newcomer, Question, Settled};
#[cfg(test)]
pub(crate) use recent::RESULTS_BYTES_MAX;
pub use recent::Recent;
pub use resolver::{Attempt, Resolver, Resolving};
pub use stored::StoredEvents;

use crate::{
    ids::{EventNum, RoomNum, StateKeyNum},
    rooms::state::{self, Sketch, StateRef, StateValue},
    schema::event_types::CREATE,
    store::{Fault, Read},
};
use known::{Known, Memo};

/// A resolution that would need more different events than this is refused. It is the only bound on what can be
/// resolved, however large the events are and however often memory lets one go: for each event that is in conflict some
/// hundred bytes are kept (its number, its place in the graph, the values that sort it), and a thread reads it about ten
/// times. A branch above the bound stays apart from its room: its events are in the timeline, and the room's state goes
/// on without them. Tests use a small bound to reach it.
pub const EVENTS_MAX: usize = if cfg!(test) { 5_000 } else { 1_000_000 };
/// A resolution holds at most this many events in memory at once (fewer where they are large); of a larger conflict it
/// reads some again.
pub const EVENTS_AT_ONCE: usize = if cfg!(test) { 400 } else { 50_000 };
/// At most this many states are resolved at once. A room has at most 20 heads, and an event cites at most as many
/// events.
pub const STATES_MAX: usize = 64;

/// The names of at most this many keys are read at once.
const KEYS_AT_ONCE: usize = 1_000;

/// The bounds of one resolution.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// It may need at most this many different events.
    pub events_max: usize,
    /// It holds at most this many of them in memory at once.
    pub held_max: usize,
}

impl Bounds {
    /// A resolution that may need this many events holds all of them, if they are no more than [`EVENTS_AT_ONCE`].
    pub fn of(events_max: usize) -> Self {
        Self { events_max, held_max: EVENTS_AT_ONCE.min(events_max.max(1)) }
    }
}

/// The types of derived keys begin with this byte, so that no client can set them.
const DERIVED: char = '\u{1}';

/// The part of a state event, beside its content, that resolution looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The number of the event's (type, state key).
    pub key: StateKeyNum,
    /// The depth that the event states, by which room version 1 sorts events.
    pub depth: u64,
    /// One more than the greatest auth depth among the event's auth events; 0 without any.
    pub auth_depth: u64,
    /// The numbers of the event's auth events.
    pub auth: Vec<EventNum>,
}

/// A source gives the state events of one room.
pub trait Source {
    /// An event in the form in which the authorization rules look at it.
    type Event: state_res::Event<Id = OwnedEventId>;

    /// Finds the header of a state event; `None` if there is no such event, or it is not one of state.
    fn find_header(&self, event: EventNum) -> Result<Option<Header>, Fault>;

    /// Finds the event itself; `None` as for [`Self::find_header`].
    fn find_event(&self, event: EventNum) -> Result<Option<Self::Event>, Fault>;

    /// Finds the headers and events of several numbers, in their order. A source may have a cheaper way than one after
    /// the other.
    fn find_many(&self, events: &[EventNum]) -> Result<Vec<HeaderAndEvent<Self::Event>>, Fault> {
        events.iter().map(|event| Ok((self.find_header(*event)?, self.find_event(*event)?))).collect()
    }
}

/// The header and the event of one number, as far as a source has them.
pub type HeaderAndEvent<E> = (Option<Header>, Option<E>);

/// The reason why states were not resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotResolved {
    /// There are more events than allowed, or more than [`STATES_MAX`] states: the event waits in staging.
    TooMuch,
    /// The room version resolves its states in a way that this server does not know.
    UnknownVersion,
    /// The store failed, or an event in it is not what it must be.
    Fault(Fault),
}

impl From<Fault> for NotResolved {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl fmt::Display for NotResolved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMuch => write!(f, "too much of the room's history is in conflict to resolve it now"),
            Self::UnknownVersion => write!(f, "the states of this room version cannot be resolved"),
            Self::Fault(fault) => fault.fmt(f),
        }
    }
}

impl std::error::Error for NotResolved {}

/// The state that others resolve to, and the work that this took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolution {
    /// The state, as a difference from the nearest of those that were resolved.
    ///
    /// Derived keys (their types begin with byte 0x01) are left as they are in that nearest state; the caller adds
    /// their changes before [`state::make_side`] makes a reference of it.
    pub state: Sketch,
    /// The number of events and headers that were read.
    pub events_loaded: usize,
}

impl Resolution {
    /// A state that needs no resolution, because all states are the same.
    fn of(state: Sketch) -> Self {
        Self { state, events_loaded: 0 }
    }
}

/// Resolves the states of a fork. It blocks, possibly for long: with more than a few events it belongs on the long pool,
/// one a room at a time. Errors: [`NotResolved::TooMuch`] where it would need more events than the bounds allow.
pub fn resolve(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    rules: &RoomVersionRules,
    states: &[Sketch],
    source: &impl Source,
    bounds: Bounds,
) -> Result<Resolution, NotResolved> {
    let mut distinct = BTreeSet::new();
    for given in states {
        distinct.insert(given.clone().canonical(read, room)?);
    }
    let states: Vec<Sketch> = distinct.into_iter().collect();
    let Some((first, rest)) = states.split_first() else {
        return Ok(Resolution::of(StateRef::EMPTY.into()));
    };
    if rest.is_empty() {
        return Ok(Resolution::of(first.clone()));
    }
    if states.len() > STATES_MAX {
        return Err(NotResolved::TooMuch);
    }
    let conflict = Conflict::find(read, room, first, rest, bounds.events_max)?;
    if conflict.vals.is_empty() {
        return Ok(Resolution::of(first.clone()));
    }
    let problem = Problem {
        read,
        room,
        rules: &rules.authorization,
        first,
        conflict: &conflict,
        known: Known::new(source, bounds),
        lookups: Lookups::new(bounds.held_max),
        events_max: bounds.events_max,
    };
    let resolved = match rules.state_res.v2_rules() {
        Some(state_res) => problem.solve(state_res)?,
        None => problem.solve_by_depth()?,
    };
    let state = nearest(&problem, &states, &resolved)?;
    Ok(Resolution { state, events_loaded: problem.known.count() })
}

/// The keys that are not the same in all states: the conflicted state set.
#[derive(Debug)]
struct Conflict {
    /// Each conflicted key has its different values here, each with the mask of the states that have it. A key has few
    /// values, however many states there are.
    vals: BTreeMap<StateKeyNum, Vec<(StateValue, u64)>>,
    /// The mask of all states that are resolved.
    all: u64,
}

impl Conflict {
    fn find(
        read: &(impl Read + ?Sized),
        room: RoomNum,
        first: &Sketch,
        rest: &[Sketch],
        events_max: usize,
    ) -> Result<Self, NotResolved> {
        let all = u64::MAX >> 63_usize.saturating_sub(rest.len());
        let mut vals: BTreeMap<StateKeyNum, Vec<(StateValue, u64)>> = BTreeMap::new();
        // The number of values beside those of the first state: each is an event of its own, or none.
        let mut other_count = 0;
        for (number, other) in rest.iter().enumerate() {
            let state = 2 << number;
            for (key, here, there) in first.diff(read, room, other)? {
                let of_key = vals.entry(key).or_insert_with(|| {
                    let mut of_key = Vec::with_capacity(2);
                    of_key.push((here, all));
                    of_key
                });
                if let Some((_, states)) = of_key.first_mut() {
                    *states &= !state;
                }
                match of_key.iter_mut().find(|(val, _)| *val == there) {
                    Some((_, states)) => *states |= state,
                    None => {
                        of_key.push((there, state));
                        other_count += 1;
                    }
                }
            }
            if vals.len().max(other_count) > events_max {
                return Err(NotResolved::TooMuch);
            }
        }
        let keys: Vec<StateKeyNum> = vals.keys().copied().collect();
        for page in keys.chunks(KEYS_AT_ONCE) {
            for (key, name) in page.iter().zip(state::list_key_names(read, room, page.iter().copied())?) {
                if name.is_some_and(|(event_type, _)| event_type.starts_with(DERIVED)) {
                    vals.remove(key);
                }
            }
        }
        Ok(Self { vals, all })
    }

    fn contains(&self, key: StateKeyNum) -> bool {
        self.vals.contains_key(&key)
    }

    /// Lists the conflicted events, each with the mask of the states that have it.
    fn events(&self) -> BTreeMap<EventNum, u64> {
        let mut events = BTreeMap::new();
        for (val, states) in self.vals.values().flatten() {
            if let Some(event) = val.event() {
                *events.entry(event).or_insert(0) |= states;
            }
        }
        events
    }
}

/// Everything that one resolution works with.
struct Problem<'p, R: Read + ?Sized, S: Source> {
    read: &'p R,
    room: RoomNum,
    rules: &'p AuthorizationRules,
    /// The first state. Unconflicted values are the same in all states, so they are looked up in this one.
    first: &'p Sketch,
    conflict: &'p Conflict,
    known: Known<'p, S>,
    lookups: Lookups,
    events_max: usize,
}

/// Look-ups in the state that were made already, because the events of a fork ask for the same few keys.
struct Lookups {
    keys: Memo<(StateEventType, String), Option<StateKeyNum>>,
    unconflicted: Memo<StateKeyNum, Option<EventNum>>,
}

impl Lookups {
    fn new(held_max: usize) -> Self {
        Self { keys: Memo::new(held_max), unconflicted: Memo::new(held_max) }
    }
}

/// The events that are to be checked.
struct FullSet {
    /// All events of the full conflicted set.
    events: BTreeSet<EventNum>,
    /// Those that may take away somebody's power.
    power: BTreeSet<EventNum>,
}

/// The keys that the iterative auth checks have set so far, with their events.
type Resolved = BTreeMap<StateKeyNum, EventNum>;

impl<R: Read + ?Sized, S: Source> Problem<'_, R, S> {
    /// Runs the algorithm, step by step as the specification numbers it.
    fn solve(&self, state_res: &StateResolutionV2Rules) -> Result<Resolved, NotResolved> {
        let FullSet { events: full_set, power } = self.full_conflicted_set(state_res)?;
        // 1. The power events, with those of their auth chains, in reverse topological power order.
        let power_events = self.sort_power_events(&full_set, power)?;
        // 2. Iterative auth checks over them: on the unconflicted state, or from nothing since version 12.
        let starts_empty = state_res.begin_iterative_auth_checks_with_empty_state_map;
        let mut resolved = Resolved::new();
        self.take_over(&power_events, !starts_empty, &mut resolved)?;
        // 3. What remains, in mainline order of the power levels that this gave.
        let sorted: BTreeSet<EventNum> = power_events.into_iter().collect();
        let remaining: Vec<EventNum> = full_set.into_iter().filter(|event| !sorted.contains(event)).collect();
        let power_levels =
            self.partial_value(!starts_empty, &resolved, StateEventType::RoomPowerLevels, "")?;
        let remaining = self.sort_by_mainline(&remaining, power_levels)?;
        // 4. Iterative auth checks over the remaining events.
        self.take_over(&remaining, !starts_empty, &mut resolved)?;
        Ok(resolved)
    }

    /// Collects the conflicted events, the auth difference, and since version 12 the conflicted subgraph.
    fn full_conflicted_set(&self, state_res: &StateResolutionV2Rules) -> Result<FullSet, NotResolved> {
        let mut events = self.auth_difference()?;
        events.extend(self.conflict.events().into_keys());
        if state_res.consider_conflicted_state_subgraph {
            events.extend(self.conflicted_subgraph()?);
        }
        let mut found = FullSet { events: BTreeSet::new(), power: BTreeSet::new() };
        let events: Vec<EventNum> = events.into_iter().collect();
        for run in events.chunks(self.known.run_len()) {
            self.known.load(run)?;
            for event in run {
                let Some(parsed) = self.known.find_event(*event)? else { continue };
                self.remember_key(*event, &parsed)?;
                found.events.insert(*event);
                if sort::is_power_event(&*parsed) {
                    found.power.insert(*event);
                }
            }
        }
        Ok(found)
    }

    /// Finds the value of a key that all states agree on, if they do.
    fn unconflicted(&self, key: StateKeyNum) -> Result<Option<EventNum>, Fault> {
        if self.conflict.contains(key) {
            return Ok(None);
        }
        if let Some(known) = self.lookups.unconflicted.find(&key) {
            return Ok(known);
        }
        let found = self.first.at(self.read, self.room, key)?.event();
        self.lookups.unconflicted.keep(key, found);
        Ok(found)
    }

    /// Finds the number of a key, from memory where it was looked up before.
    fn find_key(&self, event_type: StateEventType, state_key: String) -> Result<Option<StateKeyNum>, Fault> {
        let name = (event_type, state_key);
        if let Some(known) = self.lookups.keys.find(&name) {
            return Ok(known);
        }
        let found = state::find_key(self.read, self.room, &name.0.to_string(), &name.1)?;
        self.lookups.keys.keep(name, found);
        Ok(found)
    }

    /// Remembers the key of an event, so that it need not be looked up.
    fn remember_key(&self, event: EventNum, parsed: &S::Event) -> Result<(), NotResolved> {
        if let Some(state_key) = parsed.state_key() {
            let event_type = StateEventType::from(parsed.event_type().to_string());
            let key = self.known.require_header(event)?.key;
            self.lookups.keys.keep((event_type, state_key.to_owned()), Some(key));
        }
        Ok(())
    }

    /// Finds the event of a key in a partly resolved state.
    fn partial_value(
        &self,
        with_unconflicted: bool,
        resolved: &Resolved,
        event_type: StateEventType,
        state_key: &str,
    ) -> Result<Option<EventNum>, Fault> {
        let Some(key) = self.find_key(event_type, state_key.to_owned())? else { return Ok(None) };
        match resolved.get(&key) {
            Some(event) => Ok(Some(*event)),
            None if with_unconflicted => self.unconflicted(key),
            None => Ok(None),
        }
    }

    /// Finds the room's create event, which is in the unconflicted state of every room.
    fn create_event(&self) -> Result<Option<Arc<S::Event>>, NotResolved> {
        let Some(key) = state::find_key(self.read, self.room, CREATE, "")? else { return Ok(None) };
        match self.first.at(self.read, self.room, key)?.event() {
            Some(event) => self.known.find_event(event),
            None => Ok(None),
        }
    }
}

/// Gives the result as a difference from the state that is nearest to it. An event of the result whose key is not in
/// conflict counts only where the states have no value, because unconflicted values replace it (step 5).
fn nearest<R: Read + ?Sized, S: Source>(
    problem: &Problem<'_, R, S>,
    states: &[Sketch],
    resolved: &Resolved,
) -> Result<Sketch, NotResolved> {
    let mut added = Vec::new();
    for (key, event) in resolved {
        if !problem.conflict.contains(*key) && problem.unconflicted(*key)?.is_none() {
            added.push((*key, StateValue::Event(*event)));
        }
    }
    let value =
        |key: &StateKeyNum| resolved.get(key).map_or(StateValue::Absent, |event| StateValue::Event(*event));
    // The mask of the states in which a key has its resolved value.
    let having = |key: &StateKeyNum, vals: &[(StateValue, u64)]| {
        let resolved = value(key);
        vals.iter().find(|(val, _)| *val == resolved).map_or(0, |(_, states)| *states)
    };
    let mut differing = vec![0_usize; states.len()];
    for (key, vals) in &problem.conflict.vals {
        let having = having(key, vals);
        for (number, count) in differing.iter_mut().enumerate() {
            *count += usize::from(having >> number & 1 == 0);
        }
    }
    let nearest = states.iter().zip(differing).enumerate().min_by_key(|(_, (_, count))| *count);
    let Some((number, (base, _))) = nearest else { return Ok(StateRef::EMPTY.into()) };
    let conflicted = problem.conflict.vals.iter();
    let changed = conflicted.filter(|(key, vals)| having(key, vals) >> number & 1 == 0);
    Ok(base.with(changed.map(|(key, _)| (*key, value(key))).chain(added)))
}
