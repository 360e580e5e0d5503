//! Events that were not built here on the room's heads: they stand anywhere in the room's graph, so their state has to
//! be found, and the room's state after them may have to be resolved.
//!
//! The state before an event is that after the events it cites; where those differ, it is resolved. The state of the
//! room is that after its heads. States are references (`rooms/state.rs`): equal ones are equal bytes, so nothing is
//! compared or resolved while a room does not fork.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use ruma::{EventId, OwnedEventId, events::TimelineEventType};

use crate::{
    error::{Error, Refusal, Result},
    ids::{EventNum, Order, StateKeyNum},
    rooms::{
        admit::{self, AuthState, Evidence, Known, Verdict, Why},
        commit::{Change, auth_depth},
        event::{self, Event, StateEvent, Stored},
        graph::{self, HeadFacts, Standing},
        power::{Action, Power},
        resolve::{self, NotResolved, Resolution, StoredEvents},
        state,
    },
    store::{
        Fault, schema,
        schema::{
            rooms::{AsideRow, EventHash, EventHeader, EventRow, Head, Place},
            state::{Ref, Val},
        },
    },
};

/// An event whose format, hash and signatures were checked.
#[derive(Clone, Debug)]
pub struct Received {
    /// Its hash.
    pub hash: EventHash,
    /// Its canonical JSON.
    pub json: Bytes,
    /// The same, parsed.
    pub event: Event,
    /// Its depth, as its sender says.
    pub depth: u64,
}

/// What became of it.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// It is part of the room.
    Accepted(Box<Stored>),
    /// It is kept aside: rejected, soft-failed, or too far from the room's current state.
    Aside(EventNum, Why),
    /// It was here already.
    Known(EventNum),
    /// These events must come first; nothing was stored.
    Need {
        /// Of its auth events.
        auth: Vec<OwnedEventId>,
        /// Of the events it cites.
        prev: Vec<OwnedEventId>,
    },
    /// It cannot be judged now; nothing was stored.
    Unknown,
}

/// Where an event stands in the graph.
struct Standpoint {
    prev: Vec<EventNum>,
    auth: Vec<Arc<StateEvent>>,
    before: Ref,
}

impl From<NotResolved> for Error {
    fn from(why: NotResolved) -> Self {
        match why {
            NotResolved::TooMuch => Self::Busy { retry_after: std::time::Duration::from_secs(60) },
            NotResolved::UnknownVersion => {
                Refusal::forbidden("The room's version is not spoken here.").into()
            }
            NotResolved::Fault(fault) => fault.into(),
        }
    }
}

impl Change {
    /// Judges an event and writes what becomes of it. May take long where the room's history forked far back: it
    /// belongs on the long pool. `now_ms` is the time, in milliseconds since the epoch.
    /// Errors: [`Error::Busy`] when too much would have to be resolved; nothing was stored then.
    pub fn receive(&mut self, received: Received, now_ms: u64) -> Result<Outcome> {
        let event = &received.event;
        if let Some(known) = event::find_num(&self.batch, self.num, &event.id)? {
            return Ok(Outcome::Known(known));
        }
        let auth = self.known_auth_events(event)?;
        let prev = self.known_prev_events(event)?;
        if let Some(verdict) = admit::lacking(event, &auth, &prev) {
            return Ok(match verdict {
                Verdict::Need { auth, prev } => Outcome::Need { auth, prev },
                _ => Outcome::Unknown,
            });
        }
        let standpoint = self.standpoint(event, &auth)?;
        let rules = &self.rules().authorization;
        let tip = state::tip(&self.batch, self.num)?;
        let before = self.auth_state(event, standpoint.before)?;
        let current = if standpoint.before == tip { None } else { Some(self.auth_state(event, tip)?) };
        let evidence =
            Evidence { rules, auth: &auth, prev: &prev, before: &before, current: current.as_ref() };
        match admit::admit(event, &evidence) {
            Verdict::Accept => self.accept(received, standpoint, now_ms),
            Verdict::SoftFail(why) => self.put_aside(&received, &standpoint, why, false),
            Verdict::Reject(why) => self.put_aside(&received, &standpoint, why, true),
            Verdict::Need { auth, prev } => Ok(Outcome::Need { auth, prev }),
            Verdict::Unknown => Ok(Outcome::Unknown),
        }
    }

    fn known_auth_events(&self, event: &Event) -> Result<BTreeMap<OwnedEventId, Known<Arc<StateEvent>>>> {
        let mut ids = event.auth.clone();
        if self.rules().authorization.room_create_event_id_as_room_id
            && let Ok(create) = OwnedEventId::try_from(self.row.id.as_str().replacen('!', "$", 1))
        {
            ids.push(create);
        }
        let mut known = BTreeMap::new();
        for id in ids {
            let found = match event::find_num(&self.batch, self.num, &id)? {
                Some(num) => Known::Found(self.judged_event(num)?),
                None => Known::Missing,
            };
            known.insert(id, found);
        }
        Ok(known)
    }

    /// An event with what was said of it when it came in.
    fn judged_event(&self, num: EventNum) -> Result<Arc<StateEvent>> {
        let stored = event::require(&self.batch, self.num, num)?;
        let mut found = StateEvent::read(&self.row, &stored)?;
        let aside = schema::ASIDE.get(&self.batch, (self.num, num))?;
        if aside.is_some_and(|aside| aside.rejected) {
            Arc::make_mut(&mut found).parsed.rejected = true;
        }
        Ok(found)
    }

    fn known_prev_events(&self, event: &Event) -> Result<BTreeMap<OwnedEventId, Known<()>>> {
        let mut known = BTreeMap::new();
        for id in &event.prev {
            let found = event::find_num(&self.batch, self.num, id)?;
            known.insert(id.clone(), found.map_or(Known::Missing, |_| Known::Found(())));
        }
        Ok(known)
    }

    fn standpoint(
        &mut self,
        event: &Event,
        auth: &BTreeMap<OwnedEventId, Known<Arc<StateEvent>>>,
    ) -> Result<Standpoint> {
        let mut prev = Vec::new();
        let mut after = Vec::new();
        for id in &event.prev {
            let num = require_num(self, id)?;
            after.push(self.state_after(num)?);
            prev.push(num);
        }
        let found = |id: &OwnedEventId| match auth.get(id) {
            Some(Known::Found(event)) => Some(Arc::clone(event)),
            _ => None,
        };
        let resolution = self.resolve(&after)?;
        let before = self.reference(&resolution)?;
        Ok(Standpoint { prev, auth: event.auth.iter().filter_map(found).collect(), before })
    }

    /// The state after an event that is stored.
    fn state_after(&self, num: EventNum) -> Result<Ref> {
        let stored = event::require(&self.batch, self.num, num)?;
        let header = &stored.row.header;
        let is_aside = matches!(schema::PLACE.get(&self.batch, (self.num, num))?, Some(Place::Aside));
        let state = match (header.after, header.before) {
            (Some(after), _) => after,
            (None, _) if header.state_key.is_some() && !is_aside => Ref::Main(stored.order),
            (None, Some(before)) => before,
            (None, None) => return Ok(state::just_below(&self.batch, self.num, stored.order)?),
        };
        Ok(state::canonical(&self.batch, self.num, state)?)
    }

    fn resolve(&self, states: &[Ref]) -> Result<Resolution> {
        let source = StoredEvents::new(&self.batch, self.num, self.row.version);
        Ok(resolve::resolve(&self.batch, self.num, self.rules(), states, &source)?)
    }

    fn reference(&mut self, resolution: &Resolution) -> Result<Ref> {
        self.side(resolution.base, &resolution.changes)
    }

    fn side(&mut self, base: Ref, changes: &[(StateKeyNum, Val)]) -> Result<Ref> {
        Ok(state::make_side(&mut self.batch, self.num, &mut self.row.next_side, base, changes)?)
    }

    /// What the rules look at for this event, in a state.
    fn auth_state(&self, event: &Event, at: Ref) -> Result<AuthState> {
        let mut found = AuthState::default();
        let rules = &self.rules().authorization;
        // An event whose content does not fit its type is rejected whatever the state is.
        let needed =
            admit::needed_keys(&event.kind, &event.sender, event.state_key.as_deref(), &event.content, rules);
        for (kind, key) in needed.unwrap_or_default() {
            let Some(key) = state::find_key(&self.batch, self.num, &kind.to_string(), &key)? else {
                continue;
            };
            if let Some(num) = state::at(&self.batch, self.num, at, key)?.event() {
                found.insert(self.judged_event(num)?);
            }
        }
        Ok(found)
    }

    fn header(&mut self, received: &Received, standpoint: &Standpoint, num: EventNum) -> Result<EventHeader> {
        let event = &received.event;
        let state_key = match &event.state_key {
            Some(key) => Some(self.intern_key(&event.kind.to_string(), key)?),
            None => None,
        };
        let replaces = match state_key {
            Some(key) => state::at(&self.batch, self.num, standpoint.before, key)?.event(),
            None => None,
        };
        let spans = event::locate(&received.json).ok_or_else(|| Refusal::bad_json("This is no event."))?;
        Ok(EventHeader {
            event: num,
            hash: received.hash,
            sent_ms: event.sent.get().into(),
            depth: received.depth,
            auth_depth: auth_depth(&standpoint.auth),
            state_key,
            replaces,
            redacted_by: None,
            unseen: false,
            before: Some(standpoint.before),
            after: None,
            prev: standpoint.prev.clone(),
            auth: standpoint.auth.iter().map(|event| event.event).collect(),
            sent_by: None,
            spans,
        })
    }

    /// Rejected and soft-failed events are data: others may cite them, and an operator may ask why.
    fn put_aside(
        &mut self,
        received: &Received,
        standpoint: &Standpoint,
        why: Why,
        rejected: bool,
    ) -> Result<Outcome> {
        let num = EventNum(self.row.next_event);
        self.row.next_event += 1;
        let mut header = self.header(received, standpoint, num)?;
        if let Some(key) = header.state_key
            && !rejected
        {
            header.after = Some(self.side(standpoint.before, &[(key, Val::Event(num))])?);
            graph::put_auth_edges(&mut self.batch, self.num, num, &header.auth);
        }
        let row = EventRow { header, json: received.json.clone() };
        self.put_row_aside(&AsideRow { rejected, why: why.clone(), row });
        Ok(Outcome::Aside(num, why))
    }

    fn accept(&mut self, received: Received, standpoint: Standpoint, now_ms: u64) -> Result<Outcome> {
        let tip = state::tip(&self.batch, self.num)?;
        let mut others: Vec<Head> = self.row.heads.clone();
        others.retain(|head| !standpoint.prev.contains(&head.event));
        let standing =
            graph::standing(&self.batch, self.num, tip, standpoint.before, others.len().saturating_add(1))?;
        if standing == Standing::TooFar {
            let why = "its state is too far from the room's current one".to_owned();
            return self.put_aside(&received, &standpoint, why, false);
        }
        let (num, order) = self.next_place();
        let mut header = self.header(&received, &standpoint, num)?;
        let own = header.state_key.map(|key| (key, Val::Event(num)));
        if standpoint.before == tip {
            header.before = None;
        }
        let parsed = own.map(|_| {
            let (auth_depth, parsed) = (header.auth_depth, received.event.clone());
            Arc::new(StateEvent { event: num, auth_depth, parsed })
        });
        if others.is_empty() {
            // The room's state is that after this event: the difference to the state before it, and the event itself.
            let mut changes = state::diff(&self.batch, self.num, tip, standpoint.before)?
                .into_iter()
                .map(|(key, _, val)| (key, val))
                .collect::<Vec<_>>();
            changes.retain(|(key, _)| own.is_none_or(|(own, _)| own != *key));
            let stored = self.keep(order, header, &received)?;
            if let Some(own) = own {
                changes.insert(0, own);
            }
            self.set_state(order, &changes, parsed)?;
            let after = Ref::Main(self.row.state_tip);
            self.row.heads = vec![self.head(&stored, after, now_ms)];
            self.finish_received(&stored, &received.event)?;
            return Ok(Outcome::Accepted(Box::new(stored)));
        }
        let after = match own {
            Some(own) => self.side(standpoint.before, &[own])?,
            None => standpoint.before,
        };
        if own.is_some() {
            header.after = Some(after);
        }
        let stored = self.keep(order, header, &received)?;
        others.push(self.head(&stored, after, now_ms));
        self.row.heads = others;
        self.drop_heads(now_ms);
        let after_heads: Vec<Ref> = self.row.heads.iter().map(|head| head.after).collect();
        let resolution = self.resolve(&after_heads)?;
        let current = self.reference(&resolution)?;
        let changes: Vec<_> = state::diff(&self.batch, self.num, tip, current)?
            .into_iter()
            .map(|(key, _, val)| (key, val))
            .collect();
        self.set_state(order, &changes, None)?;
        self.finish_received(&stored, &received.event)?;
        Ok(Outcome::Accepted(Box::new(stored)))
    }

    fn keep(&mut self, order: Order, header: EventHeader, received: &Received) -> Result<Stored> {
        let stored = Stored { order, row: EventRow { header, json: received.json.clone() } };
        self.put(&stored)?;
        Ok(stored)
    }

    fn head(&self, stored: &Stored, after: Ref, stored_ms: u64) -> Head {
        let header = &stored.row.header;
        Head { event: header.event, hash: header.hash, depth: header.depth, stored_ms, is_own: false, after }
    }

    /// Gives up heads above the bound, but never the one whose state is newest on the main line: else whoever speaks from
    /// many old places could turn the room's state back.
    fn drop_heads(&mut self, now_ms: u64) {
        let on_main_line = |head: &&Head| matches!(head.after, Ref::Main(_));
        let newest = self.row.heads.iter().filter(on_main_line).max_by_key(|head| (head.after, head.event));
        let newest = newest.map(|head| head.event);
        let mut facts: Vec<HeadFacts> = self.row.heads.iter().map(facts).collect();
        for head in &mut facts {
            head.is_own |= Some(head.event) == newest;
        }
        let dropped = graph::list_heads_to_drop(&facts, now_ms);
        self.row.heads.retain(|head| !dropped.contains(&head.event));
        self.row.heads.sort_by_key(|head| head.event);
    }

    /// A redaction of somebody else's event needs power over the room, or a sender of the same server.
    fn finish_received(&mut self, stored: &Stored, event: &Event) -> Result<()> {
        let target = match event.kind {
            TimelineEventType::RoomRedaction => {
                event.redacts.clone().or_else(|| event::redacts_in_content(&stored.row))
            }
            _ => None,
        };
        let target = match target {
            Some(id) => event::find_by_id(&self.batch, self.num, &id)?.map(|target| (id, target)),
            None => None,
        };
        let applies = match &target {
            Some((_, target)) => {
                let sender = target.row.sender();
                let same_server = sender.split_once(':').map(|(_, server)| server)
                    == Some(event.sender.server_name().as_str());
                same_server || Power::in_change(self)?.may(&event.sender, Action::Redact)?
            }
            None => false,
        };
        let target: Option<&EventId> = target.as_ref().filter(|_| applies).map(|(id, _)| &**id);
        self.finish(stored, target)
    }
}

fn require_num(change: &Change, id: &EventId) -> Result<EventNum> {
    event::find_num(&change.batch, change.num, id)?
        .ok_or_else(|| Fault::Corrupt("an event is missing").into())
}

fn facts(head: &Head) -> HeadFacts {
    let Head { event, depth, stored_ms, is_own, after, .. } = *head;
    HeadFacts { event, is_own, depth, stored_ms, after }
}

#[cfg(test)]
mod tests;
