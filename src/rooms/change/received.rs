//! Events that were not built here on the room's heads: they stand anywhere in the room's graph, so their state has to
//! be found, and the room's state after them may have to be resolved.
//!
//! The state before an event is that after the events it cites; where those differ, it is resolved. The state of the
//! room is that after its heads. States are references (`rooms/state.rs`): equal ones are equal bytes, so nothing is
//! compared or resolved while a room does not fork.
//!
//! An event is judged and written in its room's turn. A resolution that takes longer than a turn may is asked as a
//! [`Question`]: it is answered beside the room, and the event comes back for another turn, which finds the answer. A
//! question leaves its turn only if it names nothing of a batch that is still being built ([`Settled`]).

mod apart;
mod beside;
mod fill;
mod foreign;
mod gate;
mod presume;
mod recommended;
mod revise;
mod signed;
mod whole;
mod write;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

pub use apart::Reunion;
pub(super) use beside::{Over, Overs};
pub use fill::{Backfill, Before, FILLED_AT_ONCE_MAX, Filling, Older};
pub use foreign::list_ids_elsewhere;
pub use gate::Received;
use recommended::Recommendation;
pub use revise::{Completion, Revision};
use ruma::{EventId, OwnedEventId};
pub use signed::Signed;
pub use whole::completes;

use super::Change;
use crate::{
    error::{Error, Refusal, Result},
    ids::{EventNum, StateKeyNum},
    rooms::{
        admit::{self, AuthState, Evidence, Known, Verdict, Why},
        event::{self, Event, StateEvent, StoredEvent},
        graph,
        policy_server::PolicyServer,
        resolve::{Attempt, NotResolved, Question, Resolving, Settled},
        rules,
        state::{self, Sketch},
        sticky,
    },
    schema,
    schema::{
        rooms::{Place, RoomRow},
        state::StateRef,
    },
    store::Fault,
};

/// The outcome of an event that came in.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// It is part of the room.
    Accepted(Box<StoredEvent>),
    /// It is kept aside: rejected or soft-failed, by this rule.
    Aside(EventNum, Why),
    /// It is an outlier: others may name it as an auth event, but none can stand on it.
    Outlier(EventNum),
    /// It was in the store already.
    Known(EventNum),
    /// Other events must come first; nothing was stored.
    Need {
        /// The ids of its auth events that are missing.
        auth: Vec<OwnedEventId>,
        /// The ids of the events it cites that are missing.
        prev: Vec<OwnedEventId>,
    },
    /// It cannot be judged now, because an event that it needs cannot be had; nothing was stored.
    Unknown,
    /// The room's policy server is still to say whether it recommends the event, and cannot be asked now; nothing was stored.
    Held,
}

/// The numbers that an event takes before all questions about it are answered. They stay its own even if the event
/// comes to nothing: gaps between numbers do no harm, and a question that is asked under them always means this event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// The event's number in its room.
    pub(super) event: EventNum,
    /// The number of its (type, state key), if it is a state event.
    pub(super) key: Option<StateKeyNum>,
}

/// How far an event came in one turn.
#[derive(Debug)]
pub enum Step {
    /// It was judged, and what follows is in the batch.
    Done(Outcome),
    /// This question has to be answered first ([`Resolver::work_out`](crate::rooms::resolve::Resolver::work_out)); of
    /// the event, only its numbers are in the batch.
    Resolve(Settled, Option<Taken>),
    /// A question has to be answered first that names places of this turn's batch, which is still being built. The turn
    /// ends before this event, and the next turn begins with it.
    EndTurn(Option<Taken>),
    /// The room uses this policy server, whose signature the event has not ([`Received::signed_by`], [`Received::opposed_by`]).
    Unsigned(PolicyServer, Option<Taken>),
}

impl Step {
    fn later(question: Question, taken: Option<Taken>) -> Self {
        match question.settled() {
            Ok(settled) => Self::Resolve(settled, taken),
            Err(_) => Self::EndTurn(taken),
        }
    }
}

/// The ways to keep an event for which no place in the graph is looked for.
#[derive(Clone, Copy)]
enum Aside {
    /// Others name it as an auth event.
    Outlier,
    /// A state that is fetched needs it.
    OfState,
    /// It is kept only if its auth events forbid it.
    OnlyIfRejected,
}

/// The place of an event in its room's graph.
struct Standpoint {
    /// The numbers of the events it cites.
    prev: Vec<EventNum>,
    /// The events that it cites by way of events that are aside: an aside event is no head, and does not keep the
    /// events that it cites heads.
    prev_through_aside: BTreeSet<EventNum>,
    auth: Vec<Arc<StateEvent>>,
    /// The states after the events it cites, to be resolved.
    cited: Question,
    /// The state before the event: the answer to `cited`.
    before: Sketch,
    /// The ids of the events that it cites and that are missing, in whose place stands a state that was fetched.
    missing: Vec<String>,
}

impl Standpoint {
    /// Whether the event stands on this one: it cites it, be it by way of events that are aside.
    fn cites(&self, event: EventNum) -> bool {
        self.prev.contains(&event) || self.prev_through_aside.contains(&event)
    }
}

impl From<NotResolved> for Error {
    fn from(why: NotResolved) -> Self {
        match why {
            NotResolved::TooMuch => Self::Busy { retry_after: std::time::Duration::from_secs(60) },
            NotResolved::UnknownVersion => {
                Refusal::forbidden("This server does not know the room's version.").into()
            }
            NotResolved::Fault(fault) => fault.into(),
        }
    }
}

impl Change {
    /// Judges an event and writes the outcome. `taken` is the numbers it took when it came before ([`Step::Resolve`]),
    /// `now_ms` the time in milliseconds since the epoch.
    pub fn receive<'r>(
        &mut self,
        received: &Received,
        taken: Option<Taken>,
        resolving: impl Into<Resolving<'r>>,
        now_ms: u64,
    ) -> Result<Step> {
        self.receive_with(received, None, taken, resolving, now_ms)
    }

    /// Judges an event like [`Change::receive`]. Where events that it cites are missing, `fetched` stands in their place: the
    /// state before the event, as another server gave it. All events of that state were taken in before. The event then opens a
    /// hole below itself, for what is missing. A state that was fetched is the word of one server, so that an event can become
    /// part of the room by it, and is never kept aside because of it: the outcome is [`Outcome::Unknown`] then.
    pub fn receive_with<'r>(
        &mut self,
        received: &Received,
        fetched: Option<&Sketch>,
        taken: Option<Taken>,
        resolving: impl Into<Resolving<'r>>,
        now_ms: u64,
    ) -> Result<Step> {
        let resolving = resolving.into();
        let known = self.find_received(received)?;
        let received = &*self.whole(received, known.as_ref().and_then(|(_, outlier)| outlier.as_ref()))?;
        let event = received.event();
        let taken = match known {
            None => taken.map(|taken| self.keep_key(event, taken)).transpose()?,
            // An outlier keeps its numbers, because other events name it by them.
            Some((event, Some(outlier))) => Some(Taken { event, key: outlier.row.header.state_key }),
            Some((known, None)) => return Ok(Step::Done(Outcome::Known(known))),
        };
        if event.prev.is_empty() && !self.row.heads.is_empty() {
            // Nothing was set before the create event. In a room that was joined no reference says that, because what is below the base
            // is not known: the event gets its place where it fills a hole.
            return Ok(Step::Done(Outcome::Unknown));
        }
        let auth = self.known_auth_events(event)?;
        let prev = if fetched.is_some() { BTreeMap::new() } else { self.known_prev_events(event)? };
        if let Some(verdict) = admit::lacking(event, &auth, &prev) {
            return Ok(Step::Done(match verdict {
                Verdict::Need { auth, prev } => Outcome::Need { auth, prev },
                _ => Outcome::Unknown,
            }));
        }
        let standpoint = match self.standpoint(event, fetched, &auth, resolving)? {
            Ok(standpoint) => standpoint,
            Err(question) => return Ok(Step::later(question, taken)),
        };
        let rules = &self.rules().authorization;
        let tip = Sketch::from(StateRef::Main(self.row.state_tip));
        let judged_by = match self.resolve_named(&auth, &standpoint.before, resolving)? {
            Ok(judged_by) => judged_by,
            Err(question) => return Ok(Step::later(question, taken)),
        };
        let mut before = self.auth_state(event, &judged_by)?;
        let presumed = self.presume(event, &auth, &judged_by, &mut before)?;
        let now = if self.row.partial.is_some() {
            // The room's state is too little known for anything to fail by it.
            None
        } else {
            match self.state_to_fit(&standpoint, &tip, resolving)? {
                Ok(now) => Some(now),
                Err(question) => return Ok(Step::later(question, taken)),
            }
        };
        let other = now.as_ref().filter(|now| **now != standpoint.before);
        let current = other.map(|now| self.auth_state(event, now)).transpose()?;
        let evidence =
            Evidence { rules, auth: &auth, prev: &prev, before: &before, current: current.as_ref() };
        let outcome = match admit::admit(event, &evidence) {
            Verdict::Accept => match self.recommendation(received, &standpoint, now.as_ref())? {
                Recommendation::For => {
                    let step = self.accept(received, taken, &standpoint, tip, resolving, now_ms)?;
                    if matches!(step, Step::Done(Outcome::Accepted(_))) {
                        self.learn_presumed(&presumed)?;
                    }
                    return Ok(step);
                }
                Recommendation::Unasked(server) => return Ok(Step::Unsigned(server, taken)),
                Recommendation::Against(why) if !standpoint.missing.is_empty() => {
                    tracing::debug!(room = %self.num, event = %event.id, why, "an event is not taken");
                    Outcome::Unknown
                }
                Recommendation::Against(why) => self.put_aside(received, taken, &standpoint, why, false)?,
            },
            Verdict::SoftFail(why) | Verdict::Reject(why) if !standpoint.missing.is_empty() => {
                tracing::debug!(room = %self.num, event = %event.id, why, "an event does not fit a state that was fetched for it");
                Outcome::Unknown
            }
            Verdict::SoftFail(why) | Verdict::Reject(why) if self.is_open_whether(event)? => {
                tracing::debug!(room = %self.num, event = %event.id, why, "an event waits, because a join left out what the room's state says of it");
                Outcome::Unknown
            }
            Verdict::SoftFail(why) => {
                let outcome = self.put_aside(received, taken, &standpoint, why, false)?;
                if let Outcome::Aside(num, _) = &outcome {
                    let sent_ms = u64::from(event.sent.0);
                    let said = (&**received.json(), sent_ms);
                    sticky::note_soft_failed(
                        &mut self.batch,
                        self.num,
                        (*num, event.sender.as_str()),
                        said,
                        now_ms,
                    )?;
                }
                outcome
            }
            Verdict::Reject(why) => self.put_aside(received, taken, &standpoint, why, true)?,
            Verdict::Need { auth, prev } => Outcome::Need { auth, prev },
            Verdict::Unknown => Outcome::Unknown,
        };
        Ok(Step::Done(outcome))
    }

    /// Gives the state that must allow an event for it not to be soft-failed: that of the room. Where events before it are missing,
    /// the room's state may be of long ago, so it is what that and the state before the event resolve to.
    fn state_to_fit(
        &mut self,
        standpoint: &Standpoint,
        tip: &Sketch,
        resolving: Resolving<'_>,
    ) -> Result<Result<Sketch, Question>> {
        if standpoint.missing.is_empty() {
            return Ok(Ok(tip.clone()));
        }
        let heads = self.row.heads.iter().map(|head| Sketch::from(head.after));
        let states: Vec<_> = heads.chain([standpoint.before.clone()]).collect();
        let question = Question::new(&self.batch, self.num, states, None)?.of_cited();
        Ok(self.answer(resolving, &question)?.ok_or(question))
    }

    /// Gives the numbers that an event took in an earlier turn. Nothing stored names its state key yet, so that a sweep may have
    /// deleted that meanwhile.
    fn keep_key(&mut self, event: &Event, taken: Taken) -> Result<Taken> {
        let (Some(old), Some(state_key)) = (taken.key, &event.state_key) else { return Ok(taken) };
        let key = self.intern_key(&event.event_type.to_string(), state_key)?;
        if key != old {
            self.put_room();
        }
        Ok(Taken { key: Some(key), ..taken })
    }

    /// Takes in an event that others name as an auth event. It is judged by its own auth events alone and gets no place
    /// in the graph, so that no state rests on it until it is received.
    pub fn receive_outlier(&mut self, received: &Received) -> Result<Outcome> {
        self.receive_aside(received, Aside::Outlier)
    }

    /// Takes in an event of a state that is fetched, or one that allows such an event: an outlier, of which a state may have as
    /// many as the room has keys.
    pub fn receive_fetched(&mut self, received: &Received) -> Result<Outcome> {
        self.receive_aside(received, Aside::OfState)
    }

    /// Keeps an event as an outlier if its own auth events forbid it, whatever the state before it is; otherwise the outcome is
    /// [`Outcome::Need`] or [`Outcome::Unknown`], and nothing is stored.
    pub fn reject_by_auth(&mut self, received: &Received) -> Result<Outcome> {
        self.receive_aside(received, Aside::OnlyIfRejected)
    }

    fn receive_aside(&mut self, received: &Received, as_what: Aside) -> Result<Outcome> {
        if let Some((known, outlier)) = self.find_received(received)? {
            let is_rejected = outlier.is_some_and(|outlier| outlier.rejected);
            return Ok(match as_what {
                Aside::OnlyIfRejected if is_rejected => Outcome::Outlier(known),
                _ => Outcome::Known(known),
            });
        }
        let auth = self.known_auth_events(received.event())?;
        match admit::lacking(received.event(), &auth, &BTreeMap::new()) {
            Some(Verdict::Need { auth, prev }) => return Ok(Outcome::Need { auth, prev }),
            Some(_) => return Ok(Outcome::Unknown),
            None => {}
        }
        let rejected =
            admit::check_at_auth_events(received.event(), &self.rules().authorization, &auth).err();
        let auth: Vec<_> = received.event().auth.iter().filter_map(|id| found(&auth, id)).collect();
        match (as_what, &rejected) {
            (Aside::OnlyIfRejected, None) => Ok(Outcome::Unknown),
            (Aside::OfState, None) => Ok(Outcome::Outlier(
                match self.put_brought(received, &auth, "a state that was fetched has it", None)? {
                    Some((event, _)) => event,
                    None => return Ok(Outcome::Unknown),
                },
            )),
            _ => self.put_outlier(received, &auth, rejected),
        }
    }

    pub(super) fn known_auth_events(
        &self,
        event: &Event,
    ) -> Result<BTreeMap<OwnedEventId, Known<Arc<StateEvent>>>> {
        let mut known = BTreeMap::new();
        for id in list_allowing(&self.row, event)? {
            let found = match self.find_num(&id)? {
                Some(num) => Known::Found(self.judged_event(num)?),
                None => Known::Missing,
            };
            known.insert(id, found);
        }
        Ok(known)
    }

    /// Gives an event with the verdict of when it came in: the rules look at whether it was rejected.
    pub(super) fn judged_event(&self, num: EventNum) -> Result<Arc<StateEvent>> {
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
            let found = if self.has_place(id)? { Known::Found(()) } else { Known::Missing };
            known.insert(id.clone(), found);
        }
        Ok(known)
    }

    /// Whether an event has its place in the graph. The state after an outlier is unknown, so no event can stand on it.
    pub(super) fn has_place(&self, id: &EventId) -> Result<bool> {
        Ok(match self.find_num(id)? {
            Some(num) => self.find_outlier(num)?.is_none(),
            None => false,
        })
    }

    /// Finds the event's place in the graph, or the question that has to be answered first. `fetched` is the state in place of
    /// events that are missing.
    fn standpoint(
        &mut self,
        event: &Event,
        fetched: Option<&Sketch>,
        auth: &BTreeMap<OwnedEventId, Known<Arc<StateEvent>>>,
        resolving: Resolving<'_>,
    ) -> Result<Result<Standpoint, Question>> {
        let (mut prev, mut after, mut missing) = (Vec::new(), Vec::new(), Vec::new());
        for id in &event.prev {
            if fetched.is_some() && !self.has_place(id)? {
                missing.push(id.to_string());
                continue;
            }
            let num = require_num(self, id)?;
            after.push(self.state_after(num)?.into());
            prev.push(num);
        }
        after.extend(fetched.filter(|_| !missing.is_empty()).cloned());
        let prev_through_aside = graph::list_cited_through_aside(&self.batch, self.num, &prev)?;
        let auth = event.auth.iter().filter_map(|id| found(auth, id)).collect();
        let cited = Question::new(&self.batch, self.num, after, None)?.of_cited();
        let before = self.answer(resolving, &cited)?;
        Ok(match before {
            Some(before) => Ok(Standpoint { prev, prev_through_aside, auth, cited, before, missing }),
            None => Err(cited),
        })
    }

    /// Gives the state after an event that is stored.
    fn state_after(&self, num: EventNum) -> Result<StateRef> {
        let stored = event::require(&self.batch, self.num, num)?;
        let header = &stored.row.header;
        let is_aside = matches!(schema::PLACE.get(&self.batch, (self.num, num))?, Some(Place::Aside));
        let state = match (header.after, header.before) {
            (Some(after), _) => after,
            (None, _) if header.state_key.is_some() && !is_aside => StateRef::Main(stored.order),
            (None, Some(before)) => before,
            (None, None) => return Ok(state::just_below(&self.batch, self.num, stored.order)?),
        };
        Ok(state::canonical(&self.batch, self.num, state)?)
    }

    /// Resolves a question's states; `None` when that takes longer than a turn may.
    fn answer(&mut self, resolving: Resolving<'_>, question: &Question) -> Result<Option<Sketch>> {
        let Resolving { resolver, loaded } = resolving;
        Ok(match resolver.try_now(&self.batch, self.num, self.row.version, question, loaded)? {
            Attempt::Known(answer) => Some(answer),
            Attempt::New(answer) => {
                self.answered.push((question.clone(), answer.clone()));
                Some(answer)
            }
            Attempt::TakesLong => None,
        })
    }

    /// Collects the part of a state that the rules look at for this event.
    fn auth_state(&self, event: &Event, at: &Sketch) -> Result<AuthState> {
        let mut found = AuthState::default();
        let rules = &self.rules().authorization;
        // An event whose content does not fit its type is rejected, whatever the state is.
        let needed = admit::needed_keys(
            &event.event_type,
            &event.sender,
            event.state_key.as_deref(),
            &event.content,
            rules,
        );
        for (kind, key) in needed.unwrap_or_default() {
            let Some(key) = state::find_key(&self.batch, self.num, &kind.to_string(), &key)? else {
                continue;
            };
            if let Some(num) = at.at(&self.batch, self.num, key)?.event() {
                found.insert(self.judged_event(num)?);
            }
        }
        Ok(found)
    }
}

/// Lists the ids of the events that allow an event: those that it names, and in room version 12 the create event.
pub(crate) fn list_allowing(room: &RoomRow, event: &Event) -> Result<Vec<OwnedEventId>, Fault> {
    let mut ids = event.auth.clone();
    if rules(room)?.authorization.room_create_event_id_as_room_id
        && let Ok(create) = OwnedEventId::try_from(room.id.as_str().replacen('!', "$", 1))
        && create != event.id
    {
        ids.push(create);
    }
    Ok(ids)
}

fn found(
    auth: &BTreeMap<OwnedEventId, Known<Arc<StateEvent>>>,
    id: &OwnedEventId,
) -> Option<Arc<StateEvent>> {
    match auth.get(id) {
        Some(Known::Found(event)) => Some(Arc::clone(event)),
        _ => None,
    }
}

fn require_num(change: &Change, id: &EventId) -> Result<EventNum> {
    change.find_num(id)?.ok_or_else(|| Fault::Corrupt("an event is missing").into())
}

#[cfg(test)]
mod tests;
