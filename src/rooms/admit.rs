//! May this event be part of the room? All checks on receipt (server-server API, "Checks performed on receipt of a
//! PDU"), as a pure function: what it needs to know is given to it, and what is missing it names.
//!
//! Format, hash and signatures are checked before (`rooms::build` for our own events, which are right by
//! construction). Here: the authorization rules at the event's own auth events, at the state before it, and at the
//! current state of the room.

use std::{collections::BTreeMap, sync::Arc};

use ruma::{
    EventId, OwnedEventId, UserId,
    events::{StateEventType, TimelineEventType},
    room_version_rules::AuthorizationRules,
    state_res::{auth_types_for_event, check_state_dependent_auth_rules, check_state_independent_auth_rules},
};
use serde_json::value::RawValue;

use crate::rooms::event::{Event, StateEvent};

/// Why an event is not accepted: the rule, as ruma words it.
pub type Why = String;

/// What becomes of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is part of the room.
    Accept,
    /// It is part of the graph, but the current state does not allow it: kept aside, unseen.
    SoftFail(Why),
    /// The rules forbid it: kept aside, and whatever it would have changed is not changed.
    Reject(Why),
    /// These events must be known first.
    Need {
        /// Of its auth events.
        auth: Vec<OwnedEventId>,
        /// Of the events it cites.
        prev: Vec<OwnedEventId>,
    },
    /// It cannot be judged now, since what it needs cannot be had: nothing is stored, and it is tried again later.
    Unknown,
}

/// What is known of an event that the one to be judged refers to.
#[derive(Clone, Debug)]
pub enum Known<T> {
    /// This.
    Found(T),
    /// We do not have it, and have not asked for it yet.
    Missing,
    /// We do not have it, and nobody would give it to us.
    Unavailable,
}

/// A part of a room's state: what the authorization rules look at.
#[derive(Clone, Debug, Default)]
pub struct AuthState(BTreeMap<(StateEventType, String), Arc<StateEvent>>);

impl AuthState {
    /// Adds an event under the key that it sets.
    pub fn insert(&mut self, event: Arc<StateEvent>) {
        let key = (event.parsed.kind.to_string().into(), event.parsed.state_key.clone().unwrap_or_default());
        self.0.insert(key, event);
    }

    /// The event of a key.
    pub fn find(&self, kind: &StateEventType, key: &str) -> Option<&Event> {
        self.0.get(&(kind.clone(), key.to_owned())).map(|event| &event.parsed)
    }
}

/// The keys of the state that the rules look at for this event, the create event among them.
/// Errors: its content is not what its type demands, so that it would be rejected.
pub fn needed_keys(
    kind: &TimelineEventType,
    sender: &UserId,
    state_key: Option<&str>,
    content: &RawValue,
    rules: &AuthorizationRules,
) -> Result<Vec<(StateEventType, String)>, Why> {
    let mut keys = auth_types_for_event(kind, sender, state_key, content, rules)?;
    let create = (StateEventType::RoomCreate, String::new());
    if !keys.contains(&create) {
        keys.push(create);
    }
    Ok(keys)
}

/// What an event is judged by.
#[derive(Debug)]
pub struct Evidence<'a> {
    /// The rules of the room's version.
    pub rules: &'a AuthorizationRules,
    /// Its auth events, and in room version 12 the create event.
    pub auth: &'a BTreeMap<OwnedEventId, Known<Arc<StateEvent>>>,
    /// Those of the events it cites that are not known.
    pub prev: &'a BTreeMap<OwnedEventId, Known<()>>,
    /// The state before it.
    pub before: &'a AuthState,
    /// The current state, unless that is the state before it.
    pub current: Option<&'a AuthState>,
}

/// Judges an event.
pub fn admit(event: &Event, evidence: &Evidence<'_>) -> Verdict {
    if let Some(verdict) = lacking(event, evidence) {
        return verdict;
    }
    let rules = evidence.rules;
    let found = |id: &EventId| match evidence.auth.get(id) {
        Some(Known::Found(event)) => Some(&event.parsed),
        _ => None,
    };
    if let Err(why) = check_state_independent_auth_rules(rules, event, found) {
        return Verdict::Reject(why);
    }
    let mut at_auth_events = AuthState::default();
    for known in evidence.auth.values() {
        if let Known::Found(event) = known {
            at_auth_events.insert(Arc::clone(event));
        }
    }
    for state in [&at_auth_events, evidence.before] {
        if let Err(why) = check_state_dependent_auth_rules(rules, event, |kind, key| state.find(kind, key)) {
            return Verdict::Reject(why);
        }
    }
    if let Some(current) = evidence.current
        && let Err(why) = check_state_dependent_auth_rules(rules, event, |kind, key| current.find(kind, key))
    {
        return Verdict::SoftFail(why);
    }
    Verdict::Accept
}

/// Judges an event of our own, whose auth events were picked from the current state: one look at that state says it
/// all, since the three states of [`admit`] agree on everything that the rules look at.
pub fn admit_own(event: &Event, rules: &AuthorizationRules, state: &AuthState) -> Verdict {
    if event.kind == TimelineEventType::RoomCreate
        && let Err(why) = check_state_independent_auth_rules(rules, event, |_: &EventId| None::<&Event>)
    {
        return Verdict::Reject(why);
    }
    match check_state_dependent_auth_rules(rules, event, |kind, key| state.find(kind, key)) {
        Ok(()) => Verdict::Accept,
        Err(why) => Verdict::Reject(why),
    }
}

fn lacking(event: &Event, evidence: &Evidence<'_>) -> Option<Verdict> {
    let mut auth = Vec::new();
    for id in &event.auth {
        match evidence.auth.get(id) {
            Some(Known::Found(_)) => {}
            Some(Known::Unavailable) => return Some(Verdict::Unknown),
            Some(Known::Missing) | None => auth.push(id.clone()),
        }
    }
    let mut prev = Vec::new();
    for id in &event.prev {
        match evidence.prev.get(id) {
            // Events that are cited and known need not be listed.
            Some(Known::Found(())) | None => {}
            Some(Known::Unavailable) => return Some(Verdict::Unknown),
            Some(Known::Missing) => prev.push(id.clone()),
        }
    }
    (!auth.is_empty() || !prev.is_empty()).then_some(Verdict::Need { auth, prev })
}
