//! Events of our own users: built on the room's heads, judged, and written.

use std::sync::Arc;

use ruma::{
    OwnedEventId,
    events::{StateEventType, TimelineEventType},
};
use serde_json::value::RawValue;

use super::{
    Change, JOINING_TAKES, Txn,
    header::{Entering, auth_depth},
};
use crate::{
    error::{Error, Refusal, Result},
    rooms::{
        admit::{self, AuthState, Verdict},
        build::{self, Built, Draft, Setting, Signer},
        event::{self, StateEvent, StoredEvent},
        reference, require_in, versions,
    },
    schema::{
        event_types::{CREATE, MEMBER},
        rooms::{EventRow, Head, SentBy},
        state::{StateRef, StateValue},
    },
};

impl Change {
    /// Builds an event of one of our users on the room's heads, judges it, and writes it into the batch. Refuses an
    /// event that the rules forbid (403 `M_FORBIDDEN`) or that is too large (413 `M_TOO_LARGE`). Flows come here
    /// through the gate, `rooms::policy`. In a room that uses a policy server the change comes to nothing
    /// ([`Error::Busy`]) until the event has that server's signature, for which `flows::own_events` asks.
    pub(in crate::rooms) fn add(
        &mut self,
        signer: &Signer,
        draft: &Draft,
        sent_by: Option<SentBy>,
    ) -> Result<StoredEvent> {
        if let Some(server) = self.signing_server(draft)? {
            return self.add_signed(server, signer, draft, sent_by);
        }
        if let Some(given) = self.take_given(draft)
            && let Some(stored) = self.add_given(signer, given, sent_by.clone(), draft.sent_ms)?
        {
            return Ok(stored);
        }
        let (built, auth) = self.build(signer, draft)?;
        self.write(draft, built, &auth, sent_by)
    }

    /// Like [`Change::add`], for an event that a client sends with a transaction id. The batch is refused if the
    /// transaction has made an event already.
    pub(in crate::rooms) fn add_once(
        &mut self,
        signer: &Signer,
        draft: &Draft,
        txn: &Txn,
    ) -> Result<StoredEvent> {
        let stored = self.add(signer, draft, Some(txn.sent_by()))?;
        txn.put(self, stored.event())?;
        self.sent_by = Some((stored.event(), txn.user));
        Ok(stored)
    }

    /// Builds an event like [`Change::add`], and writes nothing.
    pub(in crate::rooms) fn build_only(&mut self, signer: &Signer, draft: &Draft) -> Result<Built> {
        self.build(signer, draft).map(|(built, _)| built)
    }

    pub(super) fn build(&mut self, signer: &Signer, draft: &Draft) -> Result<(Built, Vec<Arc<StateEvent>>)> {
        // A change to rows beside the events may be of a room that this server has left.
        require_in(self.row.resident)?;
        let is_create = draft.event_type == CREATE;
        let (before, auth) = if is_create { Default::default() } else { self.list_allowing(draft)? };
        let prev = self.list_heads();
        let auth_ids: Vec<OwnedEventId> = auth.iter().map(|event| event.parsed.id.clone()).collect();
        let cited = self.row.heads.iter().map(|head| head.event).chain(auth.iter().map(|event| event.event));
        let hashes = reference::list(&self.batch, self.num, &self.row, cited)?;
        let hashed_room_id = self.rules.authorization.room_create_event_id_as_room_id;
        let room_id = self.row.id.clone();
        let setting = Setting {
            room_id: (!(is_create && hashed_room_id)).then_some(&room_id),
            rules: self.rules,
            prev: &prev,
            auth: &auth_ids,
            hashes: &hashes,
            depth: self.next_depth(),
        };
        let built = build::build(signer, draft, &setting, self.row.version)?;
        let verdict = admit::admit_own(&built.event, &self.rules.authorization, &before);
        // An event about another user rests on what they are in the room, which may not be known yet.
        let is_about_other =
            draft.event_type == MEMBER && draft.state_key.as_deref() != Some(draft.sender.as_str());
        if is_about_other && self.is_open_whether(&built.event)? {
            return Err(Error::Busy { retry_after: JOINING_TAKES });
        }
        match verdict {
            Verdict::Accept => Ok((built, auth)),
            Verdict::Reject(why) | Verdict::SoftFail(why) => {
                Err(Refusal::forbidden(format!("The room does not allow this: {why}.")).into())
            }
            Verdict::Need { .. } | Verdict::Unknown => {
                Err(Error::broken("an event of our own names events that are missing"))
            }
        }
    }

    /// Collects the part of the current state that the rules look at for an event that is yet to be built, and those of its
    /// events that the new one has to name.
    pub(super) fn list_allowing(&mut self, draft: &Draft) -> Result<(AuthState, Vec<Arc<StateEvent>>)> {
        let kind = TimelineEventType::from(draft.event_type.as_str());
        // The rules look into the content of member events only, so that others need not be written out for them.
        let of_member = match kind {
            TimelineEventType::RoomMember => Some(draft.raw_content()?),
            _ => None,
        };
        let content = of_member.as_deref().unwrap_or(RawValue::NULL);
        let (sender, state_key) = (&draft.sender, draft.state_key.as_deref());
        let needed = admit::needed_keys(&kind, sender, state_key, content, &self.rules.authorization)
            .map_err(|why| Refusal::bad_json(format!("The event's content does not fit its type: {why}.")))?;
        let (mut before, mut auth) = (AuthState::default(), Vec::new());
        for (event_type, key) in needed {
            let Some(event) = self.state(&event_type.to_string(), &key)? else { continue };
            let implied = event_type == StateEventType::RoomCreate
                && self.rules.authorization.room_create_event_id_as_room_id;
            if !implied {
                auth.push(Arc::clone(&event));
            }
            before.insert(event);
        }
        Ok((before, auth))
    }

    /// Lists the ids of the room's heads, which the next event cites.
    pub(super) fn list_heads(&self) -> Vec<OwnedEventId> {
        self.row.heads.iter().map(|head| event::event_id(&head.key, self.row.version)).collect()
    }

    pub(super) fn next_depth(&self) -> u64 {
        let deepest = self.row.heads.iter().map(|head| head.depth).max();
        deepest.map_or(1, |depth| depth.saturating_add(1).min(versions::depth_max(self.row.version)))
    }

    /// Writes an event of our own. It cites all heads, so the state before it is the current state, the room has one
    /// head after it, and no states need to be resolved.
    pub(super) fn write(
        &mut self,
        draft: &Draft,
        built: Built,
        auth: &[Arc<StateEvent>],
        sent_by: Option<SentBy>,
    ) -> Result<StoredEvent> {
        let (event, order) = self.next_place();
        let depth = self.next_depth();
        let mut state_key = None;
        let mut replaces = None;
        if let Some(key) = &draft.state_key {
            replaces = self.state(&draft.event_type, key)?;
            state_key = Some(self.intern_key(&draft.event_type, key)?);
        }
        let key = built.key(self.num, self.row.version);
        let entering = Entering {
            num: event,
            key: key.clone(),
            event: &built.event,
            json: &built.json,
            depth,
            state_key,
            replaces: replaces.map(|event| event.event),
            before: None,
            prev: self.row.heads.iter().map(|head| head.event).collect(),
            auth,
            sent_by,
            let_in: false,
        };
        let mut header = entering.header().ok_or_else(|| Error::broken("a built event has no fields"))?;
        let redaction = self.own_redaction(draft.redacts.as_deref())?;
        header.unseen |= !redaction.is_shown();
        let stored = StoredEvent { order, row: EventRow { header, json: built.json } };
        self.put(&stored)?;
        if let Some(key) = state_key {
            let state_event = StateEvent { event, auth_depth: auth_depth(auth), parsed: built.event };
            self.set_state(order, &[(key, StateValue::Event(event))], Some(Arc::new(state_event)))?;
        }
        let after = StateRef::Main(self.row.state_tip);
        let stored_ms = draft.sent_ms;
        self.row.heads = vec![Head { event, key, depth, stored_ms, is_own: true, after }];
        self.finish(&stored);
        self.carry_out(redaction, &stored)?;
        Ok(stored)
    }
}
