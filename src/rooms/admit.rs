//! Decides whether an event may be part of its room, by the checks on receipt (server-server API, "Checks performed on
//! receipt of a PDU"), as a pure function: everything that it needs to know is passed in, and it names the events that
//! are missing.
//!
//! Format, hash and signatures are checked before (`rooms::build` for our own events, which are right by construction).
//! The checks here are the authorization rules at the event's own auth events, at the state before it, and at the
//! current state of the room.

use std::{collections::BTreeMap, sync::Arc};

use ruma::{
    EventId, OwnedEventId, UserId,
    events::{StateEventType, TimelineEventType},
    room_version_rules::AuthorizationRules,
    state_res::{auth_types_for_event, check_state_independent_auth_rules},
};
use serde_json::value::RawValue;

use crate::{
    rooms::{
        authorize,
        event::{Event, StateEvent},
    },
    schema::state::DERIVED,
};

/// The rule because of which an event is not accepted, as ruma words it.
pub type Why = String;

/// The outcome of judging an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is part of the room.
    Accept,
    /// It is part of the graph, but the current state does not allow it: it is kept aside and clients do not see it.
    SoftFail(Why),
    /// The rules forbid it: it is kept aside and changes no state.
    Reject(Why),
    /// Other events must be known before this one can be judged.
    Need {
        /// The ids of its auth events that are missing.
        auth: Vec<OwnedEventId>,
        /// The ids of the events it cites that are missing.
        prev: Vec<OwnedEventId>,
    },
    /// It cannot be judged now, because an event that it needs cannot be had: nothing is stored, and it is tried again
    /// later.
    Unknown,
}

/// Whether an event that the judged one refers to is at hand.
#[derive(Clone, Debug)]
pub enum Known<T> {
    /// We have the event, with this to say of it.
    Found(T),
    /// We do not have it, and have not asked other servers for it yet.
    Missing,
    /// We do not have it, and no server that was asked gave it to us.
    Unavailable,
}

/// The part of a room's state that the authorization rules look at.
#[derive(Clone, Debug, Default)]
pub struct AuthState(BTreeMap<(StateEventType, String), Arc<StateEvent>>);

impl AuthState {
    /// Adds an event under the key that it sets.
    pub fn insert(&mut self, event: Arc<StateEvent>) {
        let key =
            (event.parsed.event_type.to_string().into(), event.parsed.state_key.clone().unwrap_or_default());
        self.0.insert(key, event);
    }

    /// The event of a key.
    pub fn find(&self, event_type: &StateEventType, key: &str) -> Option<&Event> {
        self.0.get(&(event_type.clone(), key.to_owned())).map(|event| &event.parsed)
    }
}

/// Lists the keys of the state that the rules look at for this event, the create event's among them. Errors: the
/// content is not what the event's type demands, so that the event would be rejected.
pub fn needed_keys(
    event_type: &TimelineEventType,
    sender: &UserId,
    state_key: Option<&str>,
    content: &RawValue,
    rules: &AuthorizationRules,
) -> Result<Vec<(StateEventType, String)>, Why> {
    let mut keys = auth_types_for_event(event_type, sender, state_key, content, rules)?;
    let create = (StateEventType::RoomCreate, String::new());
    if !keys.contains(&create) {
        keys.push(create);
    }
    Ok(keys)
}

/// Everything that an event is judged by.
#[derive(Debug)]
pub struct Evidence<'a> {
    /// The rules of the room's version.
    pub rules: &'a AuthorizationRules,
    /// The event's auth events, and in room version 12 the create event.
    pub auth: &'a BTreeMap<OwnedEventId, Known<Arc<StateEvent>>>,
    /// The events that the judged one cites. Those that are known may be left out.
    pub prev: &'a BTreeMap<OwnedEventId, Known<()>>,
    /// The state before the event.
    pub before: &'a AuthState,
    /// The current state of the room; `None` where that is the state before the event.
    pub current: Option<&'a AuthState>,
}

/// Judges an event by the authorization rules, at all three states that the specification names.
pub fn admit(event: &Event, evidence: &Evidence<'_>) -> Verdict {
    if let Some(verdict) = lacking(event, evidence.auth, evidence.prev) {
        return verdict;
    }
    let rules = evidence.rules;
    if let Err(why) = check_at_auth_events(event, rules, evidence.auth) {
        return Verdict::Reject(why);
    }
    let before = evidence.before;
    if let Err(why) = authorize::check(rules, event, |event_type, key| before.find(event_type, key)) {
        return Verdict::Reject(why);
    }
    if let Some(current) = evidence.current
        && let Err(why) = authorize::check(rules, event, |event_type, key| current.find(event_type, key))
    {
        return Verdict::SoftFail(why);
    }
    Verdict::Accept
}

/// Judges an event by its own auth events alone, all of which are known. Errors: the rule that forbids the event.
pub fn check_at_auth_events(
    event: &Event,
    rules: &AuthorizationRules,
    auth: &BTreeMap<OwnedEventId, Known<Arc<StateEvent>>>,
) -> Result<(), Why> {
    let found = |id: &EventId| match auth.get(id) {
        Some(Known::Found(event)) => Some(&event.parsed),
        _ => None,
    };
    check_state_independent_auth_rules(rules, event, found)?;
    let mut state = AuthState::default();
    for known in auth.values() {
        if let Known::Found(event) = known {
            state.insert(Arc::clone(event));
        }
    }
    authorize::check(rules, event, |event_type, key| state.find(event_type, key))
}

/// Judges an event of our own, whose auth events were picked from the current state. One look at that state suffices,
/// since the three states of [`admit`] agree on everything that the rules look at.
pub fn admit_own(event: &Event, rules: &AuthorizationRules, state: &AuthState) -> Verdict {
    if event.event_type == TimelineEventType::RoomCreate
        && let Err(why) = check_state_independent_auth_rules(rules, event, |_: &EventId| None::<&Event>)
    {
        return Verdict::Reject(why);
    }
    match authorize::check(rules, event, |event_type, key| state.find(event_type, key)) {
        Ok(()) => Verdict::Accept,
        Err(why) => Verdict::Reject(why),
    }
}

/// Names the events that must be known before this one can be judged, as [`Verdict::Need`] or [`Verdict::Unknown`];
/// `None` if nothing is missing.
pub fn lacking(
    event: &Event,
    auth_events: &BTreeMap<OwnedEventId, Known<Arc<StateEvent>>>,
    prev_events: &BTreeMap<OwnedEventId, Known<()>>,
) -> Option<Verdict> {
    // Only this server sets keys of derived state. Another server's event of such a type is not even kept aside, where
    // it would take a derived key.
    if event.event_type.to_string().starts_with(DERIVED) {
        return Some(Verdict::Unknown);
    }
    let mut auth = Vec::new();
    for id in &event.auth {
        match auth_events.get(id) {
            Some(Known::Found(_)) => {}
            Some(Known::Unavailable) => return Some(Verdict::Unknown),
            Some(Known::Missing) | None => auth.push(id.clone()),
        }
    }
    let mut prev = Vec::new();
    for id in &event.prev {
        match prev_events.get(id) {
            // A cited event that is known need not be listed.
            Some(Known::Found(())) | None => {}
            Some(Known::Unavailable) => return Some(Verdict::Unknown),
            Some(Known::Missing) => prev.push(id.clone()),
        }
    }
    (!auth.is_empty() || !prev.is_empty()).then_some(Verdict::Need { auth, prev })
}

#[cfg(test)]
mod tests {
    use ruma::RoomVersionId;
    use serde_json::{Value, json};

    use super::*;
    use crate::ids::EventNum;

    const ALICE: &str = "@alice:a.example";
    const BOB: &str = "@bob:b.example";
    const ROOM: &str = "!room:a.example";

    fn id(name: &str) -> OwnedEventId {
        OwnedEventId::try_from(format!("${name}")).unwrap()
    }

    /// An event called `name`, in a room of version 11.
    fn event(
        name: &str,
        sender: &str,
        event_type: &str,
        key: Option<&str>,
        content: Value,
        auth: &[&str],
    ) -> Event {
        let ids = |names: &[&str]| names.iter().map(|name| id(name).to_string()).collect::<Vec<_>>();
        let mut json = json!({
            "room_id": ROOM, "sender": sender, "type": event_type, "content": content, "origin_server_ts": 1,
            "auth_events": ids(auth), "prev_events": if name == "create" { ids(&[]) } else { ids(&["before"]) },
        });
        if let Some(key) = key {
            json["state_key"] = key.into();
        }
        Event::parse(id(name), json.to_string().as_bytes()).unwrap()
    }

    struct Scene {
        auth: BTreeMap<OwnedEventId, Known<Arc<StateEvent>>>,
        state: AuthState,
    }

    impl Scene {
        /// Alice's public room, with Bob in it.
        fn new() -> Self {
            let mut scene = Self { auth: BTreeMap::new(), state: AuthState::default() };
            let joined = json!({ "membership": "join" });
            let levels = json!({ "users": { ALICE: 100 } });
            scene.add(event(
                "create",
                ALICE,
                "m.room.create",
                Some(""),
                json!({ "room_version": "11" }),
                &[],
            ));
            scene.add(event("alice", ALICE, "m.room.member", Some(ALICE), joined.clone(), &["create"]));
            scene.add(event("levels", ALICE, "m.room.power_levels", Some(""), levels, &["create", "alice"]));
            scene.add(event(
                "rules",
                ALICE,
                "m.room.join_rules",
                Some(""),
                json!({ "join_rule": "public" }),
                &[],
            ));
            scene.add(event("bob", BOB, "m.room.member", Some(BOB), joined, &["create", "levels", "rules"]));
            scene
        }

        fn add(&mut self, event: Event) {
            let event = Arc::new(StateEvent {
                event: EventNum(self.auth.len() as u64),
                auth_depth: 0,
                parsed: event,
            });
            self.auth.insert(event.parsed.id.clone(), Known::Found(Arc::clone(&event)));
            self.state.insert(event);
        }

        fn judge(&self, event: &Event, current: Option<&AuthState>) -> Verdict {
            let rules = RoomVersionId::V11.rules().unwrap();
            let prev = BTreeMap::new();
            let auth = self.auth.iter().filter(|(id, _)| event.auth.contains(id));
            let auth = auth.map(|(id, known)| (id.clone(), known.clone())).collect();
            let evidence = Evidence {
                rules: &rules.authorization,
                auth: &auth,
                prev: &prev,
                before: &self.state,
                current,
            };
            admit(event, &evidence)
        }
    }

    fn rejected(verdict: &Verdict) -> bool {
        matches!(verdict, Verdict::Reject(_))
    }

    #[test]
    fn each_rule_has_its_verdict() {
        let scene = Scene::new();
        let bobs = ["create", "levels", "bob"];
        let message = json!({ "body": "hello" });
        let ban = json!({ "membership": "ban" });
        for (what, event, accepts) in [
            ("a member speaks", event("e", BOB, "m.room.message", None, message.clone(), &bobs), true),
            (
                "a stranger speaks",
                event("e", "@x:y", "m.room.message", None, message.clone(), &["create", "levels"]),
                false,
            ),
            (
                "a member without power names the room",
                event("e", BOB, "m.room.name", Some(""), json!({}), &bobs),
                false,
            ),
            (
                "power names it",
                event("e", ALICE, "m.room.name", Some(""), json!({}), &["create", "levels", "alice"]),
                true,
            ),
            (
                "a state key of somebody else",
                event("e", ALICE, "x", Some(BOB), json!({}), &["create", "levels", "alice"]),
                false,
            ),
            (
                "auth events that are not asked for",
                event(
                    "e",
                    BOB,
                    "m.room.message",
                    None,
                    message.clone(),
                    &["create", "levels", "bob", "rules"],
                ),
                false,
            ),
            (
                "no create event among them",
                event("e", BOB, "m.room.message", None, message, &["levels", "bob"]),
                false,
            ),
            (
                "banning upwards",
                event(
                    "e",
                    BOB,
                    "m.room.member",
                    Some(ALICE),
                    ban.clone(),
                    &["create", "levels", "bob", "alice"],
                ),
                false,
            ),
            (
                "banning downwards",
                event("e", ALICE, "m.room.member", Some(BOB), ban, &["create", "levels", "bob", "alice"]),
                true,
            ),
            (
                "a membership that there is not",
                event("e", BOB, "m.room.member", Some(BOB), json!({ "membership": 7 }), &bobs),
                false,
            ),
        ] {
            let verdict = scene.judge(&event, None);
            assert_eq!(verdict == Verdict::Accept, accepts, "{what}: {verdict:?}");
            assert_eq!(rejected(&verdict), !accepts, "{what}: {verdict:?}");
        }
    }

    #[test]
    fn what_only_the_current_state_forbids_is_soft_failed() {
        let scene = Scene::new();
        let mut now = Scene::new();
        now.add(event("ban", ALICE, "m.room.member", Some(BOB), json!({ "membership": "ban" }), &[]));
        let message = event("e", BOB, "m.room.message", None, json!({}), &["create", "levels", "bob"]);
        assert!(matches!(scene.judge(&message, Some(&now.state)), Verdict::SoftFail(_)));
        assert_eq!(scene.judge(&message, Some(&scene.state)), Verdict::Accept);
    }

    #[test]
    fn what_rests_on_a_rejected_event_is_rejected() {
        let mut scene = Scene::new();
        let mut bob = event("bob", BOB, "m.room.member", Some(BOB), json!({ "membership": "join" }), &[]);
        bob.rejected = true;
        scene.add(bob);
        let message = event("e", BOB, "m.room.message", None, json!({}), &["create", "levels", "bob"]);
        assert!(rejected(&scene.judge(&message, None)));
    }

    #[test]
    fn what_is_missing_is_needed_and_what_cannot_be_had_is_not_judged() {
        let scene = Scene::new();
        let message = event("e", BOB, "m.room.message", None, json!({}), &["create", "levels", "nowhere"]);
        assert_eq!(
            scene.judge(&message, None),
            Verdict::Need { auth: vec![id("nowhere")], prev: Vec::new() }
        );
        let none = BTreeMap::new();
        let prev = BTreeMap::from([(id("before"), Known::Missing)]);
        let Some(Verdict::Need { auth, prev }) = lacking(&message, &none, &prev) else {
            panic!("it can be judged")
        };
        assert_eq!((auth.len(), prev), (3, vec![id("before")]));
        let prev = BTreeMap::from([(id("before"), Known::Unavailable)]);
        assert_eq!(lacking(&message, &scene.auth, &prev).map(|_| ()), Some(()));
        let auth = BTreeMap::from([(id("create"), Known::Unavailable)]);
        assert_eq!(lacking(&message, &auth, &BTreeMap::new()), Some(Verdict::Unknown));
        // An event with a type of derived state is never kept, whatever is known.
        let derived =
            Event { event_type: "\u{1}server".into(), state_key: Some("b.example".to_owned()), ..message };
        assert_eq!(lacking(&derived, &scene.auth, &BTreeMap::new()), Some(Verdict::Unknown));
    }
}
