//! The two orders in which conflicted events are checked: the reverse topological power ordering for power events, and
//! the mainline ordering for the others.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, HashSet},
    sync::Arc,
};

use ruma::{
    MilliSecondsSinceUnixEpoch, OwnedEventId, OwnedUserId,
    events::{
        TimelineEventType,
        room::{member::MembershipState, power_levels::UserPowerLevel},
    },
    state_res::{
        Event,
        events::{RoomCreateEvent, RoomMemberEvent, RoomPowerLevelsEvent, RoomPowerLevelsIntField},
    },
};

use super::{NotResolved, Problem, Source, known::Memo};
use crate::{ids::EventNum, store::Read};

/// The power level of the creator in a room where nobody set levels.
const CREATOR_LEVEL: i32 = 100;

/// The rank decides between two events of which neither rests on the other: first comes the greater level, then the
/// earlier time, then the lesser id.
type Rank = (Reverse<UserPowerLevel>, MilliSecondsSinceUnixEpoch, OwnedEventId);

/// Keep this many power level events parsed at most: events that came one after the other rest on the same few.
const LEVELS_AT_ONCE: usize = 256;

/// Power level events that were parsed lately.
type Levels<E> = Memo<EventNum, Arc<RoomPowerLevelsEvent<Arc<E>>>>;

/// For each event that is to be sorted, those of the others that it rests on.
type Graph = BTreeMap<EventNum, Vec<EventNum>>;

impl<R: Read + ?Sized, S: Source> Problem<'_, R, S> {
    /// Lists the power events of the full conflicted set, with those of its events that they rest on, from the earliest
    /// on.
    pub(super) fn sort_power_events(
        &self,
        full_set: &BTreeSet<EventNum>,
        power: BTreeSet<EventNum>,
    ) -> Result<Vec<EventNum>, NotResolved> {
        let (mut graph, mut open) = (Graph::new(), power);
        while let Some(event) = open.pop_last() {
            self.load_run(event, open.iter().rev().copied())?;
            let header = self.known.require_header(event)?;
            let mut below: Vec<EventNum> =
                header.auth.iter().copied().filter(|auth| full_set.contains(auth)).collect();
            below.sort_unstable();
            below.dedup();
            open.extend(below.iter().filter(|event| !graph.contains_key(event)));
            graph.insert(event, below);
        }
        let creators = self.creators()?;
        let (mut ranks, levels) = (BTreeMap::new(), Levels::new(LEVELS_AT_ONCE));
        let events: Vec<EventNum> = graph.keys().copied().collect();
        for run in events.chunks(self.known.run_len()) {
            self.known.load(run)?;
            for event in run {
                ranks.insert(*event, self.rank(*event, creators.as_ref(), &levels)?);
            }
        }
        Ok(topological(&graph, &ranks))
    }

    fn rank(
        &self,
        event: EventNum,
        creators: Option<&HashSet<OwnedUserId>>,
        levels: &Levels<S::Event>,
    ) -> Result<Rank, NotResolved> {
        let parsed = self.known.require_event(event)?;
        let level = self.sender_level(event, &parsed, creators, levels)?;
        Ok((Reverse(level), parsed.origin_server_ts(), parsed.event_id().clone()))
    }

    /// Gives the power level of an event's sender, by the event's own auth events.
    fn sender_level(
        &self,
        event: EventNum,
        parsed: &S::Event,
        creators: Option<&HashSet<OwnedUserId>>,
        levels: &Levels<S::Event>,
    ) -> Result<UserPowerLevel, NotResolved> {
        let is_creator = creators.is_some_and(|creators| creators.contains(parsed.sender()));
        if is_creator && self.rules.explicitly_privilege_room_creators {
            return Ok(UserPowerLevel::Infinite);
        }
        let default = RoomPowerLevelsIntField::UsersDefault;
        let Some(held) = self.power_levels_of(event)? else {
            let level = if is_creator { CREATOR_LEVEL.into() } else { default.default_value() };
            return Ok(level.into());
        };
        let held = match levels.find(&held) {
            Some(parsed) => parsed,
            None => {
                let parsed = Arc::new(RoomPowerLevelsEvent::new(self.known.require_event(held)?));
                levels.keep(held, Arc::clone(&parsed));
                parsed
            }
        };
        // Levels that cannot be read give nobody any power; the rules let no such event in.
        let level = held.user_power_level(parsed.sender(), self.rules).ok();
        Ok(level.unwrap_or_else(|| default.default_value()).into())
    }

    /// Finds the power levels event among an event's auth events.
    fn power_levels_of(&self, event: EventNum) -> Result<Option<EventNum>, NotResolved> {
        for auth in &self.known.require_header(event)?.auth {
            let parsed = self.known.require_event(*auth)?;
            if *parsed.event_type() == TimelineEventType::RoomPowerLevels && parsed.state_key() == Some("") {
                return Ok(Some(*auth));
            }
        }
        Ok(None)
    }

    fn creators(&self) -> Result<Option<HashSet<OwnedUserId>>, NotResolved> {
        let create = self.create_event()?;
        Ok(create.and_then(|create| RoomCreateEvent::new(create).creators(self.rules).ok()))
    }

    /// Sorts the events by their place on the mainline of these power levels: those that rest on older levels come
    /// first.
    pub(super) fn sort_by_mainline(
        &self,
        events: &[EventNum],
        power_levels: Option<EventNum>,
    ) -> Result<Vec<EventNum>, NotResolved> {
        let mut mainline = Mainline::of(power_levels);
        let mut sorted = Vec::with_capacity(events.len());
        for run in events.chunks(self.known.run_len()) {
            self.known.load(run)?;
            for event in run {
                let parsed = self.known.require_event(*event)?;
                let place = self.mainline_place(*event, &mut mainline)?;
                // Events that are on no mainline come first, then those with the deepest place.
                let place = Reverse(place.unwrap_or(usize::MAX));
                sorted.push(((place, parsed.origin_server_ts(), parsed.event_id().clone()), *event));
            }
        }
        sorted.sort();
        Ok(sorted.into_iter().map(|(_, event)| event).collect())
    }

    /// Counts how many steps down the mainline the first power levels stand that the event rests on (or is).
    fn mainline_place(&self, event: EventNum, mainline: &mut Mainline) -> Result<Option<usize>, NotResolved> {
        let (mut at, mut way, mut found) = (Some(event), Vec::new(), None);
        while let Some(event) = at {
            let depth = self.known.require_header(event)?.auth_depth;
            self.extend_mainline(mainline, depth)?;
            if let Some(place) = mainline.places.get(&event) {
                found = Some(*place);
                break;
            }
            if let Some(place) = mainline.beside.get(&event) {
                found = *place;
                break;
            }
            way.push(event);
            at = self.power_levels_of(event)?;
        }
        // A branch of many power levels is walked once, and not once for each event that rests on its top.
        mainline.beside.extend(way.into_iter().map(|event| (event, found)));
        Ok(found)
    }

    /// Reads the mainline down to an auth depth, and no further than somebody asks.
    fn extend_mainline(&self, mainline: &mut Mainline, depth: u64) -> Result<(), NotResolved> {
        while mainline.lowest > depth
            && let Some(next) = mainline.next
        {
            mainline.places.insert(next, mainline.places.len());
            mainline.lowest = self.known.require_header(next)?.auth_depth;
            mainline.next = self.power_levels_of(next)?;
        }
        Ok(())
    }
}

/// The mainline of some power levels, as far down as it was needed so far.
struct Mainline {
    /// Power level events on the mainline, each with its distance from the top.
    places: BTreeMap<EventNum, usize>,
    /// Events beside the mainline that were looked at, each with the place of the first power levels on the mainline that
    /// it rests on; `None` where it rests on none.
    beside: BTreeMap<EventNum, Option<usize>>,
    /// The next power levels event down the mainline, not yet in `places`.
    next: Option<EventNum>,
    /// The auth depth of the lowest power levels event in `places`.
    lowest: u64,
}

impl Mainline {
    fn of(power_levels: Option<EventNum>) -> Self {
        Self { places: BTreeMap::new(), beside: BTreeMap::new(), next: power_levels, lowest: u64::MAX }
    }
}

/// Kahn's algorithm: takes the event of the least rank among those that rest on no unsorted event, again and again.
fn topological(graph: &Graph, ranks: &BTreeMap<EventNum, Rank>) -> Vec<EventNum> {
    let mut above: BTreeMap<EventNum, Vec<EventNum>> = BTreeMap::new();
    let mut waits_for = BTreeMap::new();
    let mut free = BinaryHeap::new();
    for (event, below) in graph {
        for auth in below {
            above.entry(*auth).or_default().push(*event);
        }
        waits_for.insert(*event, below.len());
        if below.is_empty() {
            free.push(Reverse((ranks.get(event), *event)));
        }
    }
    let mut sorted = Vec::with_capacity(graph.len());
    while let Some(Reverse((_, event))) = free.pop() {
        sorted.push(event);
        for next in above.remove(&event).unwrap_or_default() {
            if let Some(count) = waits_for.get_mut(&next) {
                *count -= 1;
                if *count == 0 {
                    free.push(Reverse((ranks.get(&next), next)));
                }
            }
        }
    }
    sorted
}

/// Whether an event may take away somebody's power: create, power levels, join rules, kicks and bans.
pub(super) fn is_power_event<E: Event>(event: &E) -> bool {
    match event.event_type() {
        TimelineEventType::RoomPowerLevels
        | TimelineEventType::RoomJoinRules
        | TimelineEventType::RoomCreate => event.state_key() == Some(""),
        TimelineEventType::RoomMember => {
            let membership = RoomMemberEvent::new(event).membership();
            let is_out =
                membership.is_ok_and(|it| matches!(it, MembershipState::Leave | MembershipState::Ban));
            is_out && event.state_key() != Some(event.sender().as_str())
        }
        _ => false,
    }
}
