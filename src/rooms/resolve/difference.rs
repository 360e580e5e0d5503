//! The auth difference and the conflicted subgraph, without reading whole auth chains.
//!
//! The auth difference consists of the events in the auth chains of some states but not of all. The auth events of an
//! unconflicted event are in all chains, so only conflicted events can lead to the difference. The walk goes down from
//! them in falling `auth_depth` (every event that cites another is seen before it) with the mask of the states that
//! reach each event. Below an event that all states reach, all states reach everything; the walk ends when nothing else
//! is left. An event is reached by all states also when it is in the unconflicted state, or in the chain of an event
//! that is: a walk up the auth edges finds that out, newest first, for the newest is the likeliest to be in the state.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{Header, NotResolved, Problem, Source};
use crate::{
    ids::EventNum,
    rooms::graph,
    store::{Fault, Read},
};

/// Look at this many auth children of an event before going up from one of them.
const CHILDREN_AT_ONCE: usize = 16;

impl<R: Read + ?Sized, S: Source> Problem<'_, R, S> {
    /// Lists the events in the auth chains of some states but not of all. Conflicted events may be among them.
    pub(super) fn auth_difference(&self) -> Result<BTreeSet<EventNum>, NotResolved> {
        let all = self.conflict.all;
        // The events still to visit, by (auth depth, number), with the states that reach them.
        let mut open: BTreeMap<(u64, EventNum), u64> = BTreeMap::new();
        // The number of open events that not all states reach.
        let mut partly = 0_usize;
        let reach = |open: &mut BTreeMap<_, u64>, partly: &mut usize, at, mask: u64| {
            let held = open.entry(at).or_insert(0);
            let was_partly = *held != 0 && *held != all;
            *held |= mask;
            match (was_partly, *held != all) {
                (false, true) => *partly += 1,
                (true, false) => *partly -= 1,
                _ => {}
            }
        };
        let conflicted: Vec<(EventNum, u64)> = self.conflict.events().into_iter().collect();
        for run in conflicted.chunks(self.known.run_len()) {
            self.known.load(&run.iter().map(|(event, _)| *event).collect::<Vec<_>>())?;
            for (event, mask) in run {
                if let Some(header) = self.known.find_header(*event)? {
                    reach(&mut open, &mut partly, (header.auth_depth, *event), *mask);
                }
            }
        }
        let (mut difference, mut chains) = (BTreeSet::new(), Chains::default());
        while partly > 0
            && let Some(((depth, event), mut mask)) = open.pop_last()
        {
            self.load_run(event, open.keys().rev().map(|(_, event)| *event))?;
            if mask != all {
                partly -= 1;
                if self.is_in_all_chains(event, &mut chains)? {
                    mask = all;
                } else {
                    difference.insert(event);
                }
            }
            for below in &self.known.require_header(event)?.auth {
                let header = self.require_below(*below, depth)?;
                reach(&mut open, &mut partly, (header.auth_depth, *below), mask);
            }
        }
        Ok(difference)
    }

    /// Whether an event is in the unconflicted state, or in the auth chain of an event that is.
    fn is_in_all_chains(&self, event: EventNum, chains: &mut Chains) -> Result<bool, NotResolved> {
        if let Some(found) = chains.known.get(&event) {
            return Ok(*found);
        }
        if self.is_unconflicted(event)? {
            chains.known.insert(event, true);
            return Ok(true);
        }
        // The walk goes depth first: these are the events on the way up, each with the number below which its children
        // are still to be seen.
        let mut way = vec![(event, EventNum(u64::MAX >> 24))];
        let mut waiting: Vec<Vec<EventNum>> = vec![Vec::new()];
        while let (Some((at, before)), Some(children)) = (way.last_mut(), waiting.last_mut()) {
            if let Some(child) = children.pop() {
                match chains.known.get(&child) {
                    Some(true) => return Ok(chains.all_true(&way)),
                    Some(false) => {}
                    None => {
                        way.push((child, EventNum(u64::MAX >> 24)));
                        waiting.push(Vec::new());
                    }
                }
                continue;
            }
            let part: Vec<EventNum> = graph::list_auth_children(self.read, self.room, *at, *before)?
                .take(CHILDREN_AT_ONCE)
                .collect::<Result<_, _>>()?;
            let Some(last) = part.last() else {
                chains.known.insert(*at, false);
                way.pop();
                waiting.pop();
                continue;
            };
            *before = *last;
            for child in &part {
                if chains.known.get(child).copied().unwrap_or(false) || self.is_unconflicted(*child)? {
                    return Ok(chains.all_true(&way));
                }
            }
            // Children are popped from the end, so that the newest comes first.
            children.extend(part.into_iter().rev());
            if chains.known.len() + way.len() > self.events_max {
                return Err(NotResolved::TooMuch);
            }
        }
        Ok(false)
    }

    /// Whether an event is in all states.
    fn is_unconflicted(&self, event: EventNum) -> Result<bool, NotResolved> {
        let Some(header) = self.known.find_header(event)? else { return Ok(false) };
        Ok(self.unconflicted(header.key)? == Some(event))
    }

    /// Makes sure that the header of an event is in memory. Where it is not, those that come next on a walk are read
    /// with it.
    pub(super) fn load_run(
        &self,
        event: EventNum,
        next: impl Iterator<Item = EventNum>,
    ) -> Result<(), NotResolved> {
        if self.known.has_header(event) {
            return Ok(());
        }
        let run: Vec<EventNum> = std::iter::once(event).chain(next).take(self.known.run_len()).collect();
        self.known.load(&run)
    }

    /// Gives the header of an auth event of an event with this auth depth. It must lie lower, or walks would not end.
    fn require_below(&self, event: EventNum, depth: u64) -> Result<Arc<Header>, NotResolved> {
        let header = self.known.require_header(event)?;
        let is_below = header.auth_depth < depth;
        is_below.then_some(header).ok_or(NotResolved::Fault(Fault::Corrupt("auth events are not in order")))
    }

    /// Lists the conflicted events and all events on a path of auth edges from one of them to another.
    pub(super) fn conflicted_subgraph(&self) -> Result<BTreeSet<EventNum>, NotResolved> {
        let conflicted = self.conflict.events();
        let mut open = BTreeSet::new();
        for event in conflicted.keys() {
            if let Some(header) = self.known.find_header(*event)? {
                open.insert((header.auth_depth, *event));
            }
        }
        // An event below the lowest conflicted one leads to none, so the walk ends there.
        let Some((lowest, _)) = open.first().copied() else { return Ok(BTreeSet::new()) };
        // All events that are reached, highest first.
        let mut reached = Vec::new();
        while let Some((depth, event)) = open.pop_last() {
            reached.push(event);
            self.load_run(event, open.iter().rev().map(|(_, event)| *event))?;
            for below in &self.known.require_header(event)?.auth {
                let header = self.require_below(*below, depth)?;
                if header.auth_depth >= lowest {
                    open.insert((header.auth_depth, *below));
                }
            }
        }
        let mut subgraph = BTreeSet::new();
        for event in reached.into_iter().rev() {
            let header = self.known.require_header(event)?;
            if conflicted.contains_key(&event) || header.auth.iter().any(|below| subgraph.contains(below)) {
                subgraph.insert(event);
            }
        }
        Ok(subgraph)
    }
}

/// Events of which it is known whether the chain of the unconflicted state has them.
#[derive(Default)]
struct Chains {
    known: BTreeMap<EventNum, bool>,
}

impl Chains {
    /// Notes that every event on the way to one that is in the chain is in it too.
    fn all_true(&mut self, way: &[(EventNum, EventNum)]) -> bool {
        self.known.extend(way.iter().map(|(event, _)| (*event, true)));
        true
    }
}
