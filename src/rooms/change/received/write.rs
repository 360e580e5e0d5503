//! Writes the outcome of an event: it is part of the room from now on, or kept aside.

use std::sync::Arc;

use super::{
    super::{
        Change,
        header::{Entering, auth_depth},
        staged,
    },
    Outcome, Received, Standpoint, Step, Taken,
};
use crate::{
    error::{Refusal, Result},
    ids::EventNum,
    rooms::{
        admit::Why,
        event::{StateEvent, StoredEvent},
        graph, relations,
        resolve::{Header, Newcomer, Question, Resolving},
        state::{self, Sketch},
    },
    schema::{
        rooms::{Apart, EventHeader, EventRow, Head},
        state::{StateRef, StateValue},
    },
};

/// The way in which an accepted event becomes part of the room.
pub(super) struct Entry {
    /// The room's heads, with this event among them; `None` if the event stands apart, so that the heads stay.
    pub(super) heads: Option<Vec<Head>>,
    /// The state after this event.
    pub(super) after: Sketch,
    /// The state that the heads resolve to: the room's state from now on.
    pub(super) current: Sketch,
    /// The room's state before the event came.
    pub(super) tip: Sketch,
    /// The keys in which `tip` and `current` differ.
    pub(super) differing: Vec<state::Difference>,
}

impl Change {
    /// Gives a reference to a state, and writes the state's rows where it has none yet.
    pub(super) fn write_down(&mut self, state: &Sketch) -> Result<StateRef> {
        if state.changes.is_empty() {
            return Ok(state.base);
        }
        let (base, written) = self.write_side_parts(state.base, &state.changes)?;
        let rest = state.changes.get(written..).unwrap_or_default();
        Ok(state::make_side(&mut self.batch, self.num, &mut self.row.next_side, base, rest)?)
    }

    /// Writes down the state before an event. The next event that stands in the same place shares the rows.
    fn write_before(&mut self, standpoint: &Standpoint) -> Result<StateRef> {
        let Standpoint { cited, before, .. } = standpoint;
        let written = self.write_down(before)?;
        if cited.only().is_none() && before.base != written {
            self.answered.push((cited.clone(), written.into()));
        }
        Ok(written)
    }

    /// Takes the numbers of an event. A rejected event is no part of any state and takes no key: otherwise users who
    /// may not even speak in a room could fill it with keys.
    pub(in crate::rooms::change) fn take_numbers(
        &mut self,
        received: &Received,
        rejected: bool,
    ) -> Result<Taken> {
        let event = received.event();
        let key = match &event.state_key {
            Some(key) if !rejected => Some(self.intern_key(&event.event_type.to_string(), key)?),
            _ => None,
        };
        let taken = Taken { event: EventNum(self.row.next_event), key };
        self.row.next_event += 1;
        self.put_room();
        Ok(taken)
    }

    fn header(
        &mut self,
        received: &Received,
        taken: Taken,
        standpoint: &Standpoint,
        before: StateRef,
    ) -> Result<EventHeader> {
        let event = received.event();
        let Taken { event: num, key: state_key } = taken;
        let replaces = match state_key {
            Some(key) => state::at(&self.batch, self.num, before, key)?.event(),
            None => None,
        };
        let entering = Entering {
            num,
            key: received.key(self.num),
            event,
            json: received.json(),
            depth: received.depth(),
            state_key,
            replaces,
            before: Some(before),
            prev: standpoint.prev.clone(),
            auth: &standpoint.auth,
            sent_by: received.sender_device(),
            let_in: received.is_let_in(),
        };
        Ok(entering.header().ok_or_else(|| Refusal::bad_json("The JSON is not that of an event."))?)
    }

    /// Puts a rejected or soft-failed event aside. It is stored because others may cite it, and an operator may ask why
    /// it is not shown.
    pub(super) fn put_aside(
        &mut self,
        received: &Received,
        taken: Option<Taken>,
        standpoint: &Standpoint,
        why: Why,
        rejected: bool,
    ) -> Result<Outcome> {
        if !self.may_be_aside(taken)? {
            let dropped = "the room keeps too many events aside";
            tracing::debug!(room = %self.num, event = %received.event().id, why, dropped, "an event is dropped");
            return Ok(Outcome::Unknown);
        }
        let left = self.leave_outliers(taken)?;
        let before = self.write_before(standpoint)?;
        let taken = taken.map_or_else(|| self.take_numbers(received, rejected), Ok)?;
        let num = taken.event;
        let mut header = self.header(received, taken, standpoint, before)?;
        if let Some(key) = header.state_key
            && !rejected
        {
            let after = Sketch::from(before).with([(key, StateValue::Event(num))]);
            header.after = Some(self.write_down(&after)?);
            graph::put_auth_edges(&mut self.batch, self.num, num, &header.auth);
        }
        let row = EventRow { header, json: received.json().clone() };
        tracing::debug!(room = %self.num, event = %received.event().id, rejected, why, "an event is kept aside");
        self.keep_aside(rejected, &why, row, &left)?;
        Ok(Outcome::Aside(num, why))
    }

    /// Makes the event part of the room: it becomes a head, and the room's state is what the heads resolve to.
    pub(super) fn accept(
        &mut self,
        received: &Received,
        taken: Option<Taken>,
        standpoint: &Standpoint,
        tip: Sketch,
        resolving: Resolving<'_>,
        now_ms: u64,
    ) -> Result<Step> {
        let taken = taken.map_or_else(|| self.take_numbers(received, false), Ok)?;
        let newcomer = newcomer(received, taken, standpoint);
        let after = match &newcomer {
            Some(newcomer) => newcomer.after(&standpoint.before),
            None => standpoint.before.clone(),
        };
        // The reference in `after` is not final: where that state is written down is known once all questions are
        // answered.
        let head = Head {
            event: taken.event,
            key: received.key(self.num),
            depth: received.depth(),
            stored_ms: now_ms,
            is_own: received.is_by_us(),
            after: after.base,
        };
        if let Some(replaces) = self.apart_from(&tip, &after, standpoint)? {
            let apart = Apart { head, replaces };
            let stored = self.accept_apart(received, taken, standpoint, (tip, after), apart)?;
            return Ok(Step::Done(Outcome::Accepted(Box::new(stored))));
        }
        let heads = self.next_heads(head.clone(), &after, standpoint, now_ms);
        let of_head = |head: &Head| if head.event == taken.event { after.clone() } else { head.after.into() };
        let states: Vec<Sketch> = heads.iter().map(of_head).collect();
        let question = Question::new(&self.batch, self.num, states, newcomer)?;
        let Some(current) = self.answer(resolving, &question)? else {
            return Ok(Step::later(question, Some(taken)));
        };
        let differing = tip.diff(&self.batch, self.num, &current)?;
        if staged::is_large(&differing) && !self.may_stage() {
            // A large step can be staged only by the first event of a turn.
            return Ok(Step::EndTurn(Some(taken)));
        }
        if staged::is_large(&differing) && !standpoint.missing.is_empty() {
            // The parts of a large step would stand where the hole below the event opens, so that the step comes later.
            let apart = Apart { head, replaces: self.cited_heads(standpoint) };
            let stored = self.accept_apart(received, taken, standpoint, (tip, after), apart)?;
            return Ok(Step::Done(Outcome::Accepted(Box::new(stored))));
        }
        let entry = Entry { heads: Some(heads), after, current, tip, differing };
        let stored = self.write_accepted(received, taken, standpoint, entry)?;
        Ok(Step::Done(Outcome::Accepted(Box::new(stored))))
    }

    /// Gives the heads with this one, whose state is `after`: at most [`graph::HEADS_MAX`], sorted by their numbers.
    fn next_heads(&self, new: Head, after: &Sketch, standpoint: &Standpoint, now_ms: u64) -> Vec<Head> {
        let mut heads = self.row.heads.clone();
        heads.retain(|head| !standpoint.cites(head.event));
        let unwritten = (!after.changes.is_empty()).then_some(new.event);
        heads.push(new);
        graph::drop_heads(&mut heads, unwritten, now_ms);
        debug_assert!(
            !heads.is_empty() && heads.len() <= graph::HEADS_MAX,
            "a room has some heads, and not many"
        );
        heads
    }

    /// Writes an accepted event with all that follows from it.
    pub(super) fn write_accepted(
        &mut self,
        received: &Received,
        taken: Taken,
        standpoint: &Standpoint,
        entry: Entry,
    ) -> Result<StoredEvent> {
        let is_current = entry.current == entry.after;
        let left = self.leave_outliers(Some(taken))?;
        let before = self.write_before(standpoint)?;
        let num = taken.event;
        let order = self.next_order(num);
        if !standpoint.missing.is_empty() {
            // At the marker the main line is as it was: whatever differs is a step of the event's own.
            let missing = standpoint.missing.clone();
            self.row.state_tip = state::open_hole(&mut self.batch, self.num, order.anchor, false, missing)?;
        }
        let mut header = self.header(received, taken, standpoint, before)?;
        let own = header.state_key.map(|key| (key, StateValue::Event(num)));
        let Entry { after, differing, .. } = entry;
        // A large step changes the main line below the event, too, so that the state before the event must be named.
        if Sketch::from(before) == entry.tip && !staged::is_large(&differing) {
            header.before = None;
        }
        // Where the room's state is the one after this event, the main line from here on is that state.
        let mut own_after = None;
        if !is_current {
            own_after = Some(if own.is_some() { self.write_down(&after)? } else { before });
            header.after = own_after.filter(|_| own.is_some());
        }
        let auth_depth = header.auth_depth;
        let redaction = self.judge_redaction(received.event(), before)?;
        header.unseen |= !redaction.is_shown();
        let stored = StoredEvent { order, row: EventRow { header, json: received.json().clone() } };
        self.put(&stored)?;
        let own_change = differing.iter().find(|(key, _, val)| own == Some((*key, *val)));
        let parsed = || StateEvent { event: num, auth_depth, parsed: received.event().clone() };
        let own_change = own_change.map(|(key, ..)| (*key, Arc::new(parsed())));
        self.take_step(order, &differing, own_change)?;
        let on_main = StateRef::Main(self.row.state_tip);
        if is_current && own.is_none() && standpoint.cited.only().is_none() {
            // The state before the event is the room's from here on, so that the next event which cites the same stands on
            // the main line, and its head is as the others.
            self.answered.push((standpoint.cited.clone(), on_main.into()));
        }
        if let Some(mut heads) = entry.heads {
            for head in heads.iter_mut().filter(|head| head.event == num) {
                head.after = own_after.unwrap_or(on_main);
            }
            self.set_heads(heads)?;
            self.row.apart.retain(|branch| !standpoint.cites(branch.head.event));
        }
        for branch in self.row.apart.iter_mut().filter(|branch| branch.head.event == num) {
            branch.head.after = own_after.unwrap_or(on_main);
        }
        self.finish(&stored);
        self.carry_out(redaction, &stored)?;
        relations::index_waiting(&mut self.batch, self.num, &stored)?;
        self.apply_waiting(&stored)?;
        if let Some(redaction) = left.redacted_by {
            self.redact(num, redaction)?;
        }
        Ok(stored)
    }

    /// Sets the room's heads, to whose resolution the main line has come, and remembers that answer.
    pub(super) fn set_heads(&mut self, heads: Vec<Head>) -> Result<()> {
        if heads.len() > 1 {
            let states = heads.iter().map(|head| Sketch::from(head.after));
            let question = Question::new(&self.batch, self.num, states, None)?;
            self.answered.push((question, StateRef::Main(self.row.state_tip).into()));
        }
        self.row.heads = heads;
        Ok(())
    }
}

/// Gives the event as resolution sees it before it is stored, if it is a state event.
fn newcomer(received: &Received, taken: Taken, standpoint: &Standpoint) -> Option<Arc<Newcomer>> {
    let key = taken.key?;
    let header = Header {
        key,
        depth: received.depth(),
        auth_depth: auth_depth(&standpoint.auth),
        auth: standpoint.auth.iter().map(|event| event.event).collect(),
    };
    Some(Arc::new(Newcomer::new(taken.event, received.event().clone(), header)))
}
