//! Branches that stand apart: their state is so far from the room's that resolving the two reads a whole state. Their
//! events are part of the room at once, each with the state of its branch, which is a small difference from the place
//! where the branch began. The room's state follows when the branch is *reunited* with the heads, once for all of its
//! events: so a branch of n events costs as much as n events and one resolution do.

use super::{super::Change, Received, Resolving, Sketch, Standpoint, StateRef, Taken, write::Entry};
use crate::{
    error::Result,
    ids::{EventNum, Order},
    rooms::{
        event::StoredEvent,
        graph,
        resolve::{Question, Settled},
    },
    schema::{
        jobs::Job,
        rooms::{Apart, Head},
    },
    store::{LogEntry, timer},
};

/// How far the branches of a room that stand apart came in one turn.
#[derive(Debug)]
pub enum Reunion {
    /// None stands apart any more: the room's state is what all heads resolve to.
    Done,
    /// This question has to be answered first ([`Resolver::work_out`](crate::rooms::resolve::Resolver::work_out)).
    Resolve(Settled),
}

impl Change {
    /// Lists the heads that an event replaces by standing apart; `None` if it does not stand apart, because its state
    /// (`after`) is near to the room's, or because no other head would be left.
    pub(super) fn apart_from(
        &self,
        tip: &Sketch,
        after: &Sketch,
        standpoint: &Standpoint,
    ) -> Result<Option<Vec<EventNum>>> {
        if self.row.heads.iter().all(|head| standpoint.cites(head.event))
            || after.distance(&self.batch, self.num, tip)? <= graph::APART_DISTANCE
        {
            return Ok(None);
        }
        Ok(Some(self.cited_heads(standpoint)))
    }

    /// Lists the heads that an event replaces: those that it cites, be it by way of branches that stand apart.
    pub(super) fn cited_heads(&self, standpoint: &Standpoint) -> Vec<EventNum> {
        let cited_heads = self.row.heads.iter().map(|head| head.event);
        let cited_heads = cited_heads.filter(|event| standpoint.cites(*event));
        let branches = self.row.apart.iter().filter(|branch| standpoint.cites(branch.head.event));
        let mut replaces: Vec<EventNum> = branches.flat_map(|branch| branch.replaces.clone()).collect();
        replaces.extend(cited_heads);
        replaces.retain(|event| self.row.heads.iter().any(|head| head.event == *event));
        replaces.sort_unstable();
        replaces.dedup();
        replaces
    }

    /// Makes an event part of the room that stands apart. The room's heads stay, and so does its state (`tip`).
    pub(super) fn accept_apart(
        &mut self,
        received: &Received,
        taken: Taken,
        standpoint: &Standpoint,
        (tip, after): (Sketch, Sketch),
        apart: Apart,
    ) -> Result<StoredEvent> {
        let why = "its branch is far from the room's state";
        tracing::debug!(room = %self.num, event = %received.event().id, why, "an event stands apart");
        self.row.apart.retain(|branch| !standpoint.cites(branch.head.event));
        let now_ms = apart.head.stored_ms;
        // The flow that took the event in reunites the branch, and if the server ends before that, the timer does.
        let job = Job::Reunite { room: self.num };
        timer::set(&mut self.batch, &job.timer(graph::reunion_due_ms(now_ms)));
        self.row.apart.push(apart);
        let current = tip.clone();
        let entry = Entry { heads: None, after, current, tip, differing: Vec::new() };
        let stored = self.write_accepted(received, taken, standpoint, entry)?;
        graph::drop_apart(&mut self.row.apart, now_ms);
        self.put_room();
        Ok(stored)
    }

    /// Brings the branches that stand apart back among the heads, and the room's state to what all of them resolve to.
    /// It comes before anything else in its turn.
    pub fn reunite<'r>(&mut self, resolving: impl Into<Resolving<'r>>, now_ms: u64) -> Result<Reunion> {
        debug_assert!(self.may_stage(), "branches are reunited before anything else in a turn");
        if self.row.apart.is_empty() {
            return Ok(Reunion::Done);
        }
        let heads = self.reunited_heads(now_ms);
        let states = heads.iter().map(|head| Sketch::from(head.after));
        let question = Question::new(&self.batch, self.num, states, None)?;
        let Some(current) = self.answer(resolving.into(), &question)? else {
            return match question.settled() {
                Ok(settled) => Ok(Reunion::Resolve(settled)),
                Err(_) => Err(crate::error::Error::broken("a head names a batch that is being built")),
            };
        };
        let tip = Sketch::from(StateRef::Main(self.row.state_tip));
        let differing = tip.diff(&self.batch, self.num, &current)?;
        tracing::debug!(room = %self.num, heads = heads.len(), keys = differing.len(), "branches are reunited");
        self.row.apart.clear();
        if !differing.is_empty() {
            // No event causes this step.
            let order = Order::live(self.batch.position(&LogEntry::RoomState { room: self.num }));
            self.take_step(order, &differing, None)?;
        }
        self.set_heads(heads)?;
        self.put_room();
        Ok(Reunion::Done)
    }

    /// Gives the heads with the branches among them: at most [`graph::HEADS_MAX`].
    fn reunited_heads(&self, now_ms: u64) -> Vec<Head> {
        let is_replaced = |head: &Head| self.row.apart.iter().any(|it| it.replaces.contains(&head.event));
        let mut heads: Vec<Head> = self.row.heads.iter().filter(|head| !is_replaced(head)).cloned().collect();
        heads.extend(self.row.apart.iter().map(|branch| branch.head.clone()));
        graph::drop_heads(&mut heads, None, now_ms);
        heads
    }
}
