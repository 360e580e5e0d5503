//! Writing what became of an event: it is part of the room from now on, or kept aside.

use std::sync::Arc;

use super::{Outcome, Received, Standpoint, Step};
use crate::{
    error::{Refusal, Result},
    ids::{EventNum, Order, SideNum},
    rooms::{
        admit::Why,
        commit::{Change, auth_depth},
        event::{self, Event, StateEvent, Stored},
        graph::{self, Standing},
        redact,
        resolve::{Newcomer, Question, Resolver},
        state::{self, Sketch},
    },
    schema::{
        rooms::{AsideRow, EventHeader, EventRow, Head},
        state::{Ref, Val},
    },
};

/// Stands for the state after an event that is coming in, until that is written down.
const AFTER_NEWCOMER: Ref = Ref::Side(SideNum(u32::MAX));

/// Where an event stands, with the state before it written down.
struct Placed {
    prev: Vec<EventNum>,
    auth: Vec<Arc<StateEvent>>,
    before: Ref,
}

/// How an accepted event becomes part of the room.
struct Entry {
    /// The heads with it.
    heads: Vec<Head>,
    /// The event, if it is one of state.
    newcomer: Option<Arc<Newcomer>>,
    /// The state after it.
    after: Sketch,
    /// What the heads resolve to.
    current: Sketch,
    /// The room's state before it came.
    tip: Sketch,
}

impl Change {
    /// A reference to a state.
    fn write_down(&mut self, state: &Sketch) -> Result<Ref> {
        if state.changes.is_empty() {
            return Ok(state.base);
        }
        Ok(state::make_side(&mut self.batch, self.num, &mut self.row.next_side, state.base, &state.changes)?)
    }

    /// Gives a place whose state is written down. The next event that stands there shares it.
    fn place(&mut self, standpoint: Standpoint) -> Result<Placed> {
        let Standpoint { prev, auth, cited, before } = standpoint;
        let written = self.write_down(&before)?;
        if cited.only().is_none() && before.base != written {
            self.answered.push((cited, written.into()));
        }
        Ok(Placed { prev, auth, before: written })
    }

    fn header(&mut self, received: &Received, placed: &Placed, num: EventNum) -> Result<EventHeader> {
        let event = &received.event;
        let state_key = match &event.state_key {
            Some(key) => Some(self.intern_key(&event.kind.to_string(), key)?),
            None => None,
        };
        let replaces = match state_key {
            Some(key) => state::at(&self.batch, self.num, placed.before, key)?.event(),
            None => None,
        };
        let spans = event::locate(&received.json).ok_or_else(|| Refusal::bad_json("This is no event."))?;
        Ok(EventHeader {
            event: num,
            hash: received.hash,
            sent_ms: event.sent.get().into(),
            depth: received.depth,
            auth_depth: auth_depth(&placed.auth),
            state_key,
            replaces,
            redacted_by: None,
            unseen: graph::only_merges(&event.kind, event.state_key.is_some()),
            before: Some(placed.before),
            after: None,
            prev: placed.prev.clone(),
            auth: placed.auth.iter().map(|event| event.event).collect(),
            sent_by: None,
            spans,
        })
    }

    /// Rejected and soft-failed events are data: others may cite them, and an operator may ask why.
    pub(super) fn put_aside(
        &mut self,
        received: &Received,
        standpoint: Standpoint,
        why: Why,
        rejected: bool,
    ) -> Result<Outcome> {
        let placed = self.place(standpoint)?;
        let num = EventNum(self.row.next_event);
        self.row.next_event += 1;
        let mut header = self.header(received, &placed, num)?;
        if let Some(key) = header.state_key
            && !rejected
        {
            let after = Sketch::from(placed.before).with([(key, Val::Event(num))]);
            header.after = Some(self.write_down(&after)?);
            graph::put_auth_edges(&mut self.batch, self.num, num, &header.auth);
        }
        let row = EventRow { header, json: received.json.clone() };
        self.put_row_aside(&AsideRow { rejected, why: why.clone(), row: row.clone() });
        redact::apply_waiting(self, &Stored { order: Order::MIN, row })?;
        Ok(Outcome::Aside(num, why))
    }

    /// The event is part of the room: it becomes a head, and the room's state is what the heads resolve to.
    pub(super) fn accept(
        &mut self,
        received: &Received,
        standpoint: Standpoint,
        tip: Sketch,
        resolver: &Resolver,
        now_ms: u64,
    ) -> Result<Step> {
        let distance = tip.distance(&self.batch, self.num, &standpoint.before)?;
        if graph::standing(distance, 1) == Standing::TooFar {
            let why = "its state is too far from the room's current one".to_owned();
            return self.put_aside(received, standpoint, why, false).map(Step::Done);
        }
        let newcomer = self.newcomer(received, &standpoint)?;
        let after = match &newcomer {
            Some(newcomer) => newcomer.after(&standpoint.before),
            None => standpoint.before.clone(),
        };
        let num = EventNum(self.row.next_event);
        let heads = self.next_heads(num, received, &standpoint.prev, &after, now_ms);
        let of_head = |head: &Head| if head.event == num { after.clone() } else { head.after.into() };
        let states: Vec<Sketch> = heads.iter().map(of_head).collect();
        let question = Question::new(&self.batch, self.num, states, newcomer.clone())?;
        let Some(current) = self.answer(resolver, &question)? else { return Ok(Step::Resolve(question)) };
        let entry = Entry { heads, newcomer, after, current, tip };
        let stored = self.write_accepted(received, standpoint, entry)?;
        Ok(Step::Done(Outcome::Accepted(Box::new(stored))))
    }

    /// A state event, as resolution sees it before it has a number.
    fn newcomer(&self, received: &Received, standpoint: &Standpoint) -> Result<Option<Arc<Newcomer>>> {
        let event = &received.event;
        let Some(state_key) = &event.state_key else { return Ok(None) };
        let key = state::find_key(&self.batch, self.num, &event.kind.to_string(), state_key)?;
        let auth = standpoint.auth.iter().map(|event| event.event).collect();
        let depth = auth_depth(&standpoint.auth);
        Ok(Some(Arc::new(Newcomer::new(received.hash, event.clone(), key, depth, auth))))
    }

    /// The heads with this event, which is `num`: at most [`graph::HEADS_MAX`], by their numbers.
    fn next_heads(
        &self,
        num: EventNum,
        received: &Received,
        prev: &[EventNum],
        after: &Sketch,
        now_ms: u64,
    ) -> Vec<Head> {
        let mut heads = self.row.heads.clone();
        heads.retain(|head| !prev.contains(&head.event));
        heads.push(Head {
            event: num,
            hash: received.hash,
            depth: received.depth,
            stored_ms: now_ms,
            is_own: false,
            after: if after.changes.is_empty() { after.base } else { AFTER_NEWCOMER },
        });
        graph::drop_heads(&mut heads, now_ms);
        heads
    }

    /// Writes an accepted event with all that follows from it.
    fn write_accepted(
        &mut self,
        received: &Received,
        standpoint: Standpoint,
        entry: Entry,
    ) -> Result<Stored> {
        let is_current = entry.current == entry.after;
        let placed = self.place(standpoint)?;
        let (num, order) = self.next_place();
        let mut header = self.header(received, &placed, num)?;
        let own = header.state_key.map(|key| (key, Val::Event(num)));
        let settled = |state: Sketch| match (&entry.newcomer, own) {
            (Some(newcomer), Some((key, _))) => newcomer.settle(&state, key, num),
            _ => state,
        };
        let (current, after) = (settled(entry.current), settled(entry.after));
        if Sketch::from(placed.before) == entry.tip {
            header.before = None;
        }
        // Where the room's state is the one after this event, that is the main line from here on.
        let mut own_after = None;
        if !is_current {
            own_after = Some(if own.is_some() { self.write_down(&after)? } else { placed.before });
            header.after = own_after.filter(|_| own.is_some());
        }
        let auth_depth = header.auth_depth;
        let stored = Stored { order, row: EventRow { header, json: received.json.clone() } };
        self.put(&stored)?;
        let differing = entry.tip.diff(&self.batch, self.num, &current)?;
        let mut changes: Vec<_> = differing.into_iter().map(|(key, _, val)| (key, val)).collect();
        let own_change = changes.iter().position(|change| own == Some(*change));
        let parsed = own_change.map(|index| {
            changes.swap(0, index);
            Arc::new(StateEvent { event: num, auth_depth, parsed: received.event.clone() })
        });
        self.set_state(order, &changes, parsed)?;
        let on_main = Ref::Main(self.row.state_tip);
        let mut heads = entry.heads;
        for head in heads.iter_mut().filter(|head| head.event == num) {
            head.after = own_after.unwrap_or(on_main);
        }
        if heads.len() > 1 {
            let states = heads.iter().map(|head| Sketch::from(head.after));
            let question = Question::new(&self.batch, self.num, states, None)?;
            self.answered.push((question, on_main.into()));
        }
        self.row.heads = heads;
        self.finish_received(&stored, &received.event)?;
        Ok(stored)
    }

    fn finish_received(&mut self, stored: &Stored, event: &Event) -> Result<()> {
        let target = redact::judge(self, stored, event)?;
        self.finish(stored, target.as_deref())?;
        redact::apply_waiting(self, stored)
    }
}
