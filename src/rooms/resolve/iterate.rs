//! The iterative auth checks: each event, in order, is taken over if the state so far allows it.

use std::{collections::BTreeMap, sync::Arc};

use ruma::{
    events::{StateEventType, TimelineEventType},
    state_res::{Event, auth_types_for_event},
};

use super::{NotResolved, Problem, Resolved, Source};
use crate::{ids::EventNum, rooms::authorize, store::Read};

/// The state events by which one event is judged.
type Allowing<E> = BTreeMap<(StateEventType, String), Arc<E>>;

impl<R: Read + ?Sized, S: Source> Problem<'_, R, S> {
    /// Checks events in order on the state so far: `resolved` over the unconflicted state, or `resolved` alone. Events
    /// that are allowed go into `resolved`.
    pub(super) fn take_over(
        &self,
        events: &[EventNum],
        with_unconflicted: bool,
        resolved: &mut Resolved,
    ) -> Result<(), NotResolved> {
        let create = self.create_event()?;
        for run in events.chunks(self.known.run_len()) {
            self.known.load(run)?;
            for event in run {
                if self.is_allowed(*event, create.as_ref(), with_unconflicted, resolved)? {
                    resolved.insert(self.known.require_header(*event)?.key, *event);
                }
            }
        }
        Ok(())
    }

    /// Whether the state so far allows an event. An event whose content cannot be read is not taken over.
    fn is_allowed(
        &self,
        event: EventNum,
        create: Option<&Arc<S::Event>>,
        with_unconflicted: bool,
        resolved: &Resolved,
    ) -> Result<bool, NotResolved> {
        let parsed = self.known.require_event(event)?;
        let Some(state_key) = parsed.state_key() else { return Ok(false) };
        let auth_types = auth_types_for_event(
            parsed.event_type(),
            parsed.sender(),
            Some(state_key),
            parsed.content(),
            self.rules,
        );
        let Ok(auth_types) = auth_types else { return Ok(false) };
        let mut allowing = self.own_auth_events(event, &parsed, create)?;
        for (event_type, state_key) in auth_types {
            let held = self.partial_value(with_unconflicted, resolved, event_type.clone(), &state_key)?;
            if let Some(held) = held
                && let Some(parsed) = self.known.find_event(held)?
                && !parsed.rejected()
            {
                allowing.insert((event_type, state_key), parsed);
            }
        }
        let verdict = authorize::check(self.rules, &*parsed, |event_type, state_key| {
            allowing.get(&(event_type.clone(), state_key.to_owned())).map(Arc::clone)
        });
        Ok(verdict.is_ok())
    }

    /// Lists the auth events that the event itself names, for keys that the state does not have.
    fn own_auth_events(
        &self,
        event: EventNum,
        parsed: &S::Event,
        create: Option<&Arc<S::Event>>,
    ) -> Result<Allowing<S::Event>, NotResolved> {
        let mut allowing = Allowing::new();
        for auth in &self.known.require_header(event)?.auth {
            let Some(auth) = self.known.find_event(*auth)? else { continue };
            if let Some(state_key) = auth.state_key()
                && !auth.rejected()
            {
                let event_type = StateEventType::from(auth.event_type().to_string());
                let state_key = state_key.to_owned();
                allowing.insert((event_type, state_key), auth);
            }
        }
        // Where the create event's hash is the room's id, no event names it among its auth events.
        if self.rules.room_create_event_id_as_room_id
            && *parsed.event_type() != TimelineEventType::RoomCreate
            && let Some(create) = create
        {
            allowing.insert((StateEventType::RoomCreate, String::new()), Arc::clone(create));
        }
        Ok(allowing)
    }
}
