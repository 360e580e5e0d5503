//! Memberships of users of ours of which the server that joins us does not know that they are over: it brings the ones before, as the
//! room's graph has them below our join. Our later events stand on a fork that nobody has cited since.
//!
//! The main line goes on with our events, so that nobody of ours is brought back. But the states around the join are those that the graph
//! has there, as at all other servers: what a fork resolves to would be something else here otherwise, for good, because what one of our
//! users did before they left is undone where nobody knows of a state with them. And our event is a head besides the join: the room's state is
//! what both resolve to, and the next event of ours tells others of it.

use std::{collections::BTreeMap, ops::Bound};

use super::{super::Change, Sketch};
use crate::{
    error::Result,
    ids::{EventNum, Order, RoomNum, StateKeyNum},
    rooms::{
        event::{self, StoredEvent},
        graph, state,
    },
    schema::{
        self,
        rooms::Head,
        state::{StateRef, StateValue},
    },
    store::{Direction, Fault},
};

/// Look at most at this many of the newest events for one that cites an event of ours. Beyond that it is taken for cited by none, which
/// costs a merge.
const LOOKED_AT_MAX: usize = 1_000;

/// The part that a user of ours has in a room by the state that was brought, and the later event of it that is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::rooms::change) struct Over {
    /// The event that was brought.
    pub(in crate::rooms::change) brought: EventNum,
    /// The event that stays.
    pub(in crate::rooms::change) known: EventNum,
}

/// Memberships that were brought and are over, by their keys.
pub(in crate::rooms::change) type Overs = BTreeMap<StateKeyNum, Over>;

impl Change {
    /// Names the states around a join of ours, where they have memberships that are over on the main line. Gives the state after the join,
    /// if it is another one than was known. That of the joining user is none of these.
    pub(in crate::rooms::change) fn name_states(
        &mut self,
        join: &mut StoredEvent,
        overs: &Overs,
    ) -> Result<Option<StateRef>> {
        let own = join.row.header.state_key;
        let brought = overs.iter().filter(|(key, _)| Some(**key) != own);
        let brought: Vec<_> = brought.map(|(key, over)| (*key, StateValue::Event(over.brought))).collect();
        let was_after = self.state_after(join.event())?;
        let mut is_known = true;
        for (key, val) in &brought {
            is_known &= state::at(&self.batch, self.num, was_after, *key)? == *val;
        }
        if is_known {
            return Ok(None);
        }
        let was_before = match join.row.header.before {
            Some(before) => before,
            None => state::just_below(&self.batch, self.num, join.order)?,
        };
        let [before, after] = [was_before, was_after].map(|at| Sketch::from(at).with(brought.clone()));
        let after = self.write_down(&after)?;
        join.row.header.before = Some(self.write_down(&before)?);
        join.row.header.after = Some(after);
        self.replace_event(join);
        Ok(Some(after))
    }

    /// Makes those events heads of the room by which memberships that were brought are over, unless an event since the base of the join cites
    /// them. `us` is the name of this server, and `own` the key of the user who joined.
    pub(in crate::rooms::change) fn add_forks(
        &mut self,
        base: Order,
        (us, own): (&str, Option<StateKeyNum>),
        overs: &Overs,
    ) -> Result<()> {
        for (key, Over { known, .. }) in overs {
            let heads = &self.row.heads;
            let is_head = heads.iter().any(|head| head.event == *known);
            if is_head || heads.len() >= graph::HEADS_MAX || Some(*key) == own {
                continue;
            }
            let Some(stored) = event::find(&self.batch, self.num, *known)? else { continue };
            let header = &stored.row.header;
            if header.rejected || self.is_cited_since(base, *known)? {
                continue;
            }
            let head = Head {
                event: *known,
                key: header.key.clone(),
                depth: header.depth,
                stored_ms: header.sent_ms,
                is_own: event::server_of(&stored.row.sender()) == Some(us),
                after: self.state_after(*known)?,
            };
            tracing::debug!(room = %self.num, event = %known, "an event of a user of ours is a head again, of which the server that joined us does not know");
            self.row.heads.push(head);
            self.row.heads.sort_by_key(|head| head.event);
        }
        Ok(())
    }

    /// Whether an event above a base cites this one.
    fn is_cited_since(&self, base: Order, event: EventNum) -> Result<bool, Fault> {
        let (low, high) = (Bound::Excluded((self.num, base)), Bound::Included((self.num, Order::MAX)));
        let rows = schema::TIMELINE.range::<(RoomNum, Order)>(&self.batch, low, high, Direction::Down)?;
        for row in rows.take(LOOKED_AT_MAX) {
            if row?.1.header.prev.contains(&event) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
