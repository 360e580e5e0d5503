//! Earlier stays of ours in a room that ended before their states were whole (`docs/decisions/partial-state-joins.md`).
//!
//! A join brings a state of its own, but others go on with events that they made on those of the time before, and on our leave
//! itself. So the state of that time is completed, too, once that of the new stay is: what is learnt of it reaches up to the base of
//! the next stay, and what came since is judged again.

use super::{Change, left_out};
use crate::{
    error::Result,
    ids::{EventNum, Order, StateKeyNum},
    rooms::{
        event,
        state::{self, StateRef, StateValue},
    },
    schema,
    schema::rooms::{EarlierStay, PartialState},
    store::Fault,
};

/// A room keeps at most this many earlier stays, the latest ones, because its row is written with each of its events.
const EARLIER_MAX: usize = 4;

impl Change {
    /// Keeps the stay that a join ends, whose base is laid, where the state of that stay was never whole: its members were not
    /// learnt, or events are left out of it. `via` is the server by which we join now, and `user` is who joins.
    pub(super) fn keep_earlier_stay(&mut self, via: &str, user: &str) -> Result<(), Fault> {
        let end = self.row.state_tip;
        let lacking = left_out::list(&self.batch, self.num)?.into_iter().find(|it| it.row.is_state);
        let state = match (self.row.partial.take(), lacking) {
            (Some(partial), lacking) => {
                PartialState { is_filled: partial.is_filled && lacking.is_none(), ..partial }
            }
            (None, Some(lacking)) => {
                let base = lacking.row.base;
                let join = schema::TIMELINE.get(&self.batch, (self.num, Order::live(base.anchor)))?;
                let Some(join) = join.map(|row| row.header.event) else { return Ok(()) };
                let us = event::server_of(user).unwrap_or_default().to_owned();
                PartialState { base, join, via: via.to_owned(), us, is_filled: false }
            }
            (None, None) => return Ok(()),
        };
        self.row.earlier.push(EarlierStay { state, end });
        if self.row.earlier.len() > EARLIER_MAX {
            self.row.earlier.remove(0);
        }
        Ok(())
    }

    /// Learns what keys had in the state before the latest of the earlier stays. What the room is now stays.
    pub(super) fn learn_earlier(&mut self, values: &[(StateKeyNum, StateValue)]) -> Result<(), Fault> {
        let Some(stay) = self.row.earlier.last() else { return Ok(()) };
        let span = (stay.state.base, stay.end);
        for (key, val) in values {
            let val = match val {
                StateValue::Event(event) => {
                    let known = state::at(&self.batch, self.num, StateRef::Main(span.0), *key)?;
                    StateValue::Event(self.not_over(*key, *event, known)?)
                }
                other => *other,
            };
            state::learn_before(&mut self.batch, self.num, span, *key, val)?;
        }
        Ok(())
    }

    /// Gives up to complete the state of the earlier stay that began with this join, because nobody gives it, and those before it.
    /// Nothing happens where the state of another stay is to be completed first.
    pub fn give_up_stays(&mut self, join: EventNum) -> Result<()> {
        if self.row.partial.is_none() && self.row.incomplete().is_some_and(|stay| stay.join == join) {
            self.row.earlier.clear();
            self.put_room();
        }
        Ok(())
    }
}
