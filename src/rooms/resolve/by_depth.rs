//! The first version of state resolution, which room version 1 uses. Specification: "State resolution" of room version 1.
//!
//! Conflicting events are sorted by depth and the SHA-1 of their ids, key by key: first power levels, then join rules, then members.
//! Of these a key takes the last event up to which each one was allowed by the one before it. All other keys take the first event that
//! the state so far allows.
//!
//! Points that the specification leaves open are as other servers have them (tests compare with Synapse's results): a key that some
//! states have and others lack is not in conflict, and where the state allows none of a key's events, it takes the one that is tried
//! last. So each key that some state has is there in the result.
//!
//! Only conflicting events are read, and what the rules look at to judge them. Those of one key are in memory together: at most as many
//! as states are resolved.

use std::sync::Arc;

use ruma::{
    events::{StateEventType, TimelineEventType},
    state_res::Event,
};
use sha1::{Digest as _, Sha1};

use super::{NotResolved, Problem, Resolved, Source};
use crate::{
    ids::{EventNum, StateKeyNum},
    rooms::authorize,
    store::Read,
};

/// The passes, in their order: each resolves keys that the next one's events are judged by.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Pass {
    PowerLevels,
    JoinRules,
    Members,
    Others,
}

impl Pass {
    fn of(event: &impl Event) -> Self {
        match event.event_type() {
            TimelineEventType::RoomPowerLevels if event.state_key() == Some("") => Self::PowerLevels,
            TimelineEventType::RoomJoinRules => Self::JoinRules,
            TimelineEventType::RoomMember => Self::Members,
            _ => Self::Others,
        }
    }
}

impl<R: Read + ?Sized, S: Source> Problem<'_, R, S> {
    /// Runs the algorithm. The result has each key that differs between the states, and that one of them has at all.
    pub(super) fn solve_by_depth(&self) -> Result<Resolved, NotResolved> {
        let mut resolved = Resolved::new();
        let mut conflicting: Vec<(Pass, StateKeyNum, Vec<EventNum>)> = Vec::new();
        let values = |key: StateKeyNum| {
            let of_key = self.conflict.vals.get(&key);
            of_key.into_iter().flatten().filter_map(|(val, _)| val.event()).collect::<Vec<_>>()
        };
        let keys: Vec<StateKeyNum> = self.conflict.vals.keys().copied().collect();
        for run in keys.chunks(self.known.run_len()) {
            // The first event of a key tells its type, and so the pass.
            let firsts: Vec<EventNum> = run.iter().filter_map(|key| values(*key).first().copied()).collect();
            self.known.load(&firsts)?;
            for key in run {
                let events = values(*key);
                match events.as_slice() {
                    [] => {}
                    // The other states have nothing of the key, so that nothing is in conflict.
                    [only] => drop(resolved.insert(*key, *only)),
                    [first, ..] => {
                        let pass = Pass::of(&*self.known.require_event(*first)?);
                        conflicting.push((pass, *key, events));
                    }
                }
            }
        }
        // A pass resolves each of its keys by the state before the pass.
        conflicting.sort_by_key(|(pass, key, _)| (*pass, *key));
        for pass in conflicting.chunk_by(|(one, ..), (other, ..)| one == other) {
            let mut added = Resolved::new();
            for (pass, key, events) in pass {
                let sorted = self.sort_by_depth(events)?;
                let taken = match pass {
                    Pass::PowerLevels | Pass::JoinRules | Pass::Members => {
                        self.last_of_chain(*key, &sorted, &resolved)?
                    }
                    Pass::Others => self.first_allowed(&sorted, &resolved)?,
                };
                added.extend(taken.map(|event| (*key, event)));
            }
            resolved.extend(added);
        }
        Ok(resolved)
    }

    /// Sorts the events of one key by falling depth and rising SHA-1 of their ids.
    fn sort_by_depth(&self, events: &[EventNum]) -> Result<Vec<EventNum>, NotResolved> {
        self.known.load(events)?;
        let mut sorted = Vec::with_capacity(events.len());
        for event in events {
            let depth = self.known.require_header(*event)?.depth;
            let hash = Sha1::digest(self.known.require_event(*event)?.event_id().as_str());
            sorted.push(((std::cmp::Reverse(depth), hash), *event));
        }
        sorted.sort();
        Ok(sorted.into_iter().map(|(_, event)| event).collect())
    }

    /// Takes the deepest event of a key such that it, and each before it from the second on, is allowed by the state with the event
    /// before it. The first one is taken unasked.
    fn last_of_chain(
        &self,
        key: StateKeyNum,
        sorted: &[EventNum],
        resolved: &Resolved,
    ) -> Result<Option<EventNum>, NotResolved> {
        let mut rising = sorted.iter().rev().copied();
        let Some(mut last) = rising.next() else { return Ok(None) };
        for event in rising {
            if !self.is_allowed_by(event, resolved, Some((key, last)))? {
                break;
            }
            last = event;
        }
        Ok(Some(last))
    }

    /// Takes the first event that the state allows, and the last one where it allows none.
    fn first_allowed(
        &self,
        sorted: &[EventNum],
        resolved: &Resolved,
    ) -> Result<Option<EventNum>, NotResolved> {
        for event in sorted {
            if self.is_allowed_by(*event, resolved, None)? {
                return Ok(Some(*event));
            }
        }
        Ok(sorted.last().copied())
    }

    /// Whether the rules allow an event in the state so far, with this event for this key.
    fn is_allowed_by(
        &self,
        event: EventNum,
        resolved: &Resolved,
        with: Option<(StateKeyNum, EventNum)>,
    ) -> Result<bool, NotResolved> {
        let parsed = self.known.require_event(event)?;
        if parsed.rejected() {
            return Ok(false);
        }
        // The rules ask in a closure that cannot fail, so that a failure is kept beside.
        let failed = std::cell::RefCell::new(None);
        let find = |event_type: &StateEventType, state_key: &str| {
            let found = self.find_in(event_type, state_key, resolved, with);
            found.unwrap_or_else(|why| {
                failed.borrow_mut().get_or_insert(why);
                None
            })
        };
        let is_allowed = authorize::check(self.rules, &*parsed, find).is_ok();
        match failed.into_inner() {
            Some(why) => Err(why),
            None => Ok(is_allowed),
        }
    }

    fn find_in(
        &self,
        event_type: &StateEventType,
        state_key: &str,
        resolved: &Resolved,
        with: Option<(StateKeyNum, EventNum)>,
    ) -> Result<Option<Arc<S::Event>>, NotResolved> {
        let Some(key) = self.find_key(event_type.clone(), state_key.to_owned())? else { return Ok(None) };
        let held = match with {
            Some((of, event)) if of == key => Some(event),
            _ => match resolved.get(&key) {
                Some(event) => Some(*event),
                None => self.unconflicted(key)?,
            },
        };
        let Some(held) = held else { return Ok(None) };
        let found = self.known.find_event(held)?;
        Ok(found.filter(|event| !event.rejected()))
    }
}
