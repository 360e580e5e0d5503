//! Judges again what came since a join without members, once the state before the join is whole
//! (`docs/decisions/partial-state-joins.md`).
//!
//! Learning what the join left out changed the states that references name, so that mostly nothing is to be done. An event whose
//! state is another one by now gets explicit references. One that was accepted and that the rules forbid stays where clients were
//! told of it, unseen from now on and part of no state; one that was rejected and that they allow comes in anew. The current state
//! follows at the end, in one step.

use std::{collections::BTreeMap, ops::Bound};

use super::{Outcome, Question, Received, Resolving, Settled, Sketch, StateRef, Step};
use crate::{
    error::{Error, Result},
    ids::{EventNum, Order, RoomNum},
    rooms::{
        admit::{self, Evidence, Verdict, Why},
        change::Change,
        event::{self, Event, StateEvent, StoredEvent},
        graph, reference, state,
        state::{Chain, StateValue},
    },
    schema,
    schema::rooms::{AsideRow, EventKey, Place, Resident},
    store::{Direction, Fault, LogEntry},
};

/// Judge at most this many events in one turn.
const AT_ONCE: usize = if cfg!(test) { 3 } else { 40 };
/// Look at no more than this many events in one turn, most of which may be outliers that the whole state brought.
const LOOKED_AT: usize = if cfg!(test) { 5 } else { 2_000 };

/// How far a revision came in one turn.
#[derive(Debug)]
pub struct Revision {
    /// The next turn goes on with this event.
    pub next: EventNum,
    /// This question has to be answered before the next turn.
    pub asks: Option<Settled>,
    /// Whether there were no more events when the turn took place.
    pub is_end: bool,
    /// Whether anything was written, so that events which stand on those may have to be judged once more.
    pub is_changed: bool,
}

/// The outcome of the last turn of a revision.
#[derive(Debug)]
pub enum Completion {
    /// The room's state is whole, once this change is accepted.
    Whole,
    /// Events came since the revision ended, and are to be judged again first.
    More,
    /// This question has to be answered first.
    Resolve(Settled),
}

/// The state before an event and the verdict on it, as they are by now.
struct Revised {
    before: Sketch,
    why: Option<Why>,
}

impl Change {
    /// Judges some events again, from this one on.
    pub fn revise<'r>(
        &mut self,
        from: EventNum,
        resolving: impl Into<Resolving<'r>>,
        now_ms: u64,
    ) -> Result<Revision> {
        let resolving = resolving.into();
        let end = EventNum(self.row.next_event);
        let mut revision = Revision { next: end, asks: None, is_end: true, is_changed: false };
        let Some(join) = self.row.incomplete().map(|stay| stay.join) else { return Ok(revision) };
        let low = Bound::Included((self.num, from.max(EventNum(join.0 + 1))));
        let high = Bound::Excluded((RoomNum(self.num.0.saturating_add(1)), EventNum(0)));
        let places: Vec<_> = schema::PLACE
            .range::<(RoomNum, EventNum)>(&self.batch, low, high, Direction::Up)?
            .take(LOOKED_AT)
            .collect::<Result<_, Fault>>()?;
        let mut judged = 0;
        for ((_, event), place) in &places {
            if judged >= AT_ONCE {
                (revision.next, revision.is_end) = (*event, false);
                break;
            }
            judged += usize::from(*place != Place::Outlier);
            if let Some(first) = self.revise_one(*event, *place, resolving, now_ms)? {
                (revision.next, revision.is_end) = (*event, false);
                if let Step::Resolve(question, _) = first {
                    revision.asks = Some(question);
                }
                break;
            }
        }
        if let Some(((_, last), _)) = places.last()
            && revision.is_end
            && places.len() >= LOOKED_AT
        {
            (revision.next, revision.is_end) = (EventNum(last.0 + 1), false);
        }
        revision.is_changed = self.batch.row_count() > 0;
        Ok(revision)
    }

    /// Judges an event again. Gives what must come first, if anything must.
    fn revise_one(
        &mut self,
        event: EventNum,
        place: Place,
        resolving: Resolving<'_>,
        now_ms: u64,
    ) -> Result<Option<Step>> {
        let (stored, aside) = match place {
            Place::Outlier => return Ok(None),
            Place::Timeline(order) => {
                let row = schema::TIMELINE.get(&self.batch, (self.num, order))?;
                (StoredEvent { order, row: row.ok_or(Fault::Corrupt("an event is missing"))? }, None)
            }
            Place::Aside => {
                let aside = schema::ASIDE.get(&self.batch, (self.num, event))?;
                let aside = aside.ok_or(Fault::Corrupt("an event is missing"))?;
                (StoredEvent { order: Order::MIN, row: aside.row.clone() }, Some(aside))
            }
        };
        if self.row.earlier.iter().any(|stay| stored.order == Order::live(stay.end.anchor)) {
            // A join of ours goes by the state that was brought with it, and not by what an earlier stay knew.
            return Ok(None);
        }
        let parsed = StateEvent::read(&self.row, &stored)?;
        let Some(was_before) = self.stored_before(&stored, aside.is_some())? else { return Ok(None) };
        let revised = match self.judge_again(&parsed.parsed, &stored, was_before, resolving)? {
            Ok(Some(revised)) => revised,
            Ok(None) => return Ok(None),
            Err(question) => return Ok(Some(Step::later(question, None))),
        };
        match aside {
            None => self.revise_accepted(stored, was_before, revised).map(|()| None),
            Some(aside) if revised.why.is_none() && aside.rejected => {
                self.accept_after_all(aside, &parsed.parsed, resolving, now_ms)
            }
            Some(mut aside) => {
                if self.differs(&revised.before, was_before)? {
                    aside.row.header.before = Some(self.write_down(&revised.before)?);
                    schema::ASIDE.put(&mut self.batch, (self.num, event), &aside);
                }
                Ok(None)
            }
        }
    }

    /// The state before an event, as it is written down; `None` where it is not known.
    fn stored_before(&self, stored: &StoredEvent, is_aside: bool) -> Result<Option<StateRef>, Fault> {
        match stored.row.header.before {
            Some(before) => Ok(Some(before)),
            None if is_aside => Ok(None),
            None => state::just_below(&self.batch, self.num, stored.order).map(Some),
        }
    }

    fn differs(&self, one: &Sketch, other: StateRef) -> Result<bool, Fault> {
        Ok(!one.diff(&self.batch, self.num, &other.into())?.is_empty())
    }

    /// Finds the state before an event anew, and judges the event by it; `None` where that cannot be done, so that the event stays
    /// as it is.
    fn judge_again(
        &mut self,
        event: &Event,
        stored: &StoredEvent,
        was_before: StateRef,
        resolving: Resolving<'_>,
    ) -> Result<Result<Option<Revised>, Question>> {
        let base = self.row.incomplete().map_or(Order::MIN, |stay| stay.base);
        let is_earlier =
            |change: &Self, at| Ok::<_, Fault>(Chain::read(&change.batch, change.num, at)?.base < base);
        let prev = &stored.row.header.prev;
        let is_whole = prev.len() >= event.prev.len() && !self.is_any_without_state(prev)?;
        let (mut after, mut is_all_earlier) = (Vec::with_capacity(prev.len()), true);
        for prev in prev.iter().filter(|_| is_whole) {
            let state = self.state_after(*prev)?;
            is_all_earlier &= is_earlier(self, state)?;
            after.push(state.into());
        }
        if is_all_earlier && is_earlier(self, was_before)? {
            // It stands on an earlier stay, of whose state nothing was learnt now.
            return Ok(Ok(None));
        }
        let before = if is_whole {
            let cited = Question::new(&self.batch, self.num, after, None)?.of_cited();
            match self.answer(resolving, &cited)? {
                Some(before) => before,
                None => return Ok(Err(cited)),
            }
        } else {
            // Events that it cites were missing, and a state that was fetched or brought stands in their place.
            Sketch::from(was_before)
        };
        let auth = self.known_auth_events(event)?;
        let state = self.auth_state(event, &before)?;
        let is_open = self.is_open_whether(event)?;
        let (rules, prev) = (&self.rules().authorization, BTreeMap::new());
        let evidence = Evidence { rules, auth: &auth, prev: &prev, before: &state, current: None };
        Ok(Ok(match admit::admit(event, &evidence) {
            Verdict::Accept => Some(Revised { before, why: None }),
            // The member whom the state lacks may allow the event, as the presumed one did.
            Verdict::Reject(_) | Verdict::SoftFail(_) if is_open => None,
            Verdict::Reject(why) | Verdict::SoftFail(why) => Some(Revised { before, why: Some(why) }),
            Verdict::Need { .. } | Verdict::Unknown => None,
        }))
    }

    /// Whether any of these events has no place in the room's graph, so that nobody knows the state after it: it is here because a
    /// state has it, or allows others.
    fn is_any_without_state(&self, events: &[EventNum]) -> Result<bool, Fault> {
        for event in events {
            if schema::PLACE.get(&self.batch, (self.num, *event))? == Some(Place::Outlier)
                && event::require_kept(&self.batch, self.num, *event)?.row.header.after.is_none()
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Writes what a new verdict on an event of the timeline changes, if anything.
    fn revise_accepted(
        &mut self,
        mut stored: StoredEvent,
        was_before: StateRef,
        Revised { before, why }: Revised,
    ) -> Result<()> {
        let was_after = self.state_after(stored.event())?;
        let key = stored.row.header.state_key;
        let own = key.filter(|_| why.is_none()).map(|key| (key, StateValue::Event(stored.event())));
        let after = before.with(own);
        let mut is_changed = false;
        if self.differs(&before, was_before)? {
            stored.row.header.before = Some(self.write_down(&before)?);
            is_changed = true;
        }
        if why.is_some() != stored.row.header.rejected {
            let header = &mut stored.row.header;
            header.rejected = why.is_some();
            let event_type = stored.row.event_type().as_ref().into();
            let merges = graph::only_merges(&event_type, stored.row.header.state_key.is_some());
            stored.row.header.unseen = why.is_some() || merges || stored.row.header.expired;
            tracing::debug!(room = %self.num, event = %stored.event(), ?why, "the verdict on an event is another one by the whole state");
            is_changed = true;
        }
        if (key.is_some() || stored.row.header.after.is_some())
            && (is_changed || self.differs(&after, was_after)?)
        {
            stored.row.header.after = Some(self.write_down(&after)?);
            is_changed = true;
        }
        if is_changed {
            self.replace_event(&stored);
        }
        Ok(())
    }

    /// Judges an event again that was soft-failed by the state of then: where the state of now allows it, it becomes part of the room.
    /// Gives what must come first, if anything must; an event that is not soft-failed stays as it is.
    pub fn reconsider<'r>(
        &mut self,
        event: EventNum,
        resolving: impl Into<Resolving<'r>>,
        now_ms: u64,
    ) -> Result<Option<Step>> {
        if schema::PLACE.get(&self.batch, (self.num, event))? != Some(Place::Aside) {
            return Ok(None);
        }
        let aside = schema::ASIDE.get(&self.batch, (self.num, event))?;
        let Some(aside) = aside.filter(|aside| !aside.rejected) else { return Ok(None) };
        let stored = StoredEvent { order: Order::MIN, row: aside.row.clone() };
        let parsed = StateEvent::read(&self.row, &stored)?;
        self.accept_after_all(aside, &parsed.parsed, resolving.into(), now_ms)
    }

    /// Takes in an event that was rejected by a part of the state, and that the whole state allows.
    fn accept_after_all(
        &mut self,
        rejected: AsideRow,
        event: &Event,
        resolving: Resolving<'_>,
        now_ms: u64,
    ) -> Result<Option<Step>> {
        let (num, mut aside) = (rejected.row.header.event, rejected.clone());
        let hash = match &aside.row.header.key {
            EventKey::Hash(hash) => *hash,
            EventKey::Chosen(..) => reference::hash(&aside.row.json, self.rules())
                .ok_or(Fault::Corrupt("an event is not the JSON of an event"))?,
        };
        let received = Received::check(self.num, &self.row, hash, aside.row.json.clone())?;
        if let Some(state_key) = &event.state_key {
            aside.row.header.state_key = Some(self.intern_key(&event.event_type.to_string(), state_key)?);
            graph::put_auth_edges(&mut self.batch, self.num, num, &aside.row.header.auth);
        }
        // As an outlier it keeps its number, by which others cite it.
        (aside.rejected, aside.row.header.before, aside.row.header.after) = (false, None, None);
        schema::PLACE.put(&mut self.batch, (self.num, num), &Place::Outlier);
        schema::ASIDE.put(&mut self.batch, (self.num, num), &aside);
        self.put_room();
        match self.receive_with(&received, None, None, resolving, now_ms)? {
            Step::Done(outcome) => {
                let is_accepted = matches!(outcome, Outcome::Accepted(_));
                tracing::debug!(room = %self.num, event = %num, is_accepted, "an event that was rejected is judged by the whole state");
                Ok(None)
            }
            later => {
                // The next turn finds it as it was.
                schema::PLACE.put(&mut self.batch, (self.num, num), &Place::Aside);
                schema::ASIDE.put(&mut self.batch, (self.num, num), &rejected);
                graph::delete_auth_edges(&mut self.batch, self.num, num, &rejected.row.header.auth);
                Ok(Some(later))
            }
        }
    }

    /// Brings the current state to what the heads resolve to by now, and ends that the room's state is partial, or that of an earlier
    /// stay: events up to this one were judged again. It comes before anything else in its turn.
    pub fn make_whole<'r>(
        &mut self,
        revised: EventNum,
        resolving: impl Into<Resolving<'r>>,
    ) -> Result<Completion> {
        debug_assert!(self.may_stage(), "a state is made whole before anything else in a turn");
        if self.row.incomplete().is_none() {
            return Ok(Completion::Whole);
        }
        if self.row.next_event != revised.0 {
            return Ok(Completion::More);
        }
        let resolving = resolving.into();
        let (mut heads, mut apart) = (self.row.heads.clone(), self.row.apart.clone());
        for head in heads.iter_mut().chain(apart.iter_mut().map(|branch| &mut branch.head)) {
            head.after = self.state_after(head.event)?;
        }
        let states = heads.iter().map(|head| Sketch::from(head.after));
        let question = Question::new(&self.batch, self.num, states, None)?;
        let Some(current) = self.answer(resolving, &question)? else {
            return match question.settled() {
                Ok(settled) => Ok(Completion::Resolve(settled)),
                Err(_) => Err(Error::broken("a head names a batch that is being built")),
            };
        };
        let tip = Sketch::from(StateRef::Main(self.row.state_tip));
        let differing = tip.diff(&self.batch, self.num, &current)?;
        // No event causes this step.
        let order = Order::live(self.batch.position(&LogEntry::RoomState { room: self.num }));
        if !differing.is_empty() {
            self.take_step(order, &differing, None)?;
        }
        self.row.apart = apart;
        self.set_heads(heads)?;
        if self.row.partial.take().is_some() {
            self.row.resident = Resident::Yes;
            self.row.filled_at = Some(order.anchor);
        } else {
            self.row.earlier.pop();
        }
        self.put_room();
        tracing::info!(room = %self.num, joined = self.row.joined, corrected = differing.len(), "the state of a room is whole");
        Ok(Completion::Whole)
    }
}
