//! Takes in what a join without members left out of a room's state (`docs/decisions/partial-state-joins.md`).

use super::{Change, staged::Moved};
use crate::{
    error::Result,
    ids::{Order, StateKeyNum},
    rooms::{
        members::{self, Since},
        state::{self, Learned, StateRef, StateValue},
    },
    schema::event_types::{DERIVED_JOINED, MEMBER},
    store::{Fault, LogEntry},
};

impl Change {
    /// Whether an event is taken at its word about members of whom nothing is known.
    pub(super) fn presumes(&self) -> bool {
        self.row.partial.as_ref().is_some_and(|partial| !partial.is_filled)
    }

    /// Learns what keys had in the state before our join, which was brought without its members: any part of it in any order, and
    /// any part again. Members are counted, and their servers are in the room from the join on. All events that the values name
    /// are stored. Nothing happens in a room whose state is whole.
    pub fn learn(&mut self, values: &[(StateKeyNum, StateValue)]) -> Result<()> {
        let Some(base) = self.row.partial.as_ref().map(|partial| partial.base) else { return Ok(()) };
        let (mut touched, mut is_any) = (self.touched(), false);
        for (key, val) in values {
            let learned = state::learn(&mut self.batch, self.num, base, *key, *val)?;
            is_any |= learned != Learned::Known;
            let Learned::Now(old) = learned else { continue };
            let name = state::key_name(&self.batch, self.num, *key)?;
            let (event_type, state_key) = name.ok_or(Fault::Corrupt("a state key has no name"))?;
            let is_member = event_type == MEMBER;
            self.looked_up.remove(&(event_type, state_key.clone()));
            let Some(by) = val.event().or(old.event()).filter(|_| is_member) else { continue };
            let moved = Moved { was: self.membership_in(old)?, is: self.membership_in(*val)?, by };
            self.count_member(&state_key, moved, &mut touched);
            let since = Since { membership: moved.is, event: by, order: Order::live(base.anchor) };
            let user = members::track(&mut self.batch, self.num, &state_key, since, None)?;
            self.concern(user, moved.is);
        }
        if !is_any {
            return Ok(());
        }
        // The tip remembers that such keys had no event.
        self.seat.tip = None;
        let joined = self.row.joined;
        let derived = touched.values(&mut self.batch, self.num, &mut self.row.next_key, joined)?;
        let joined_key = state::find_key(&self.batch, self.num, DERIVED_JOINED, "")?;
        for (key, val) in derived {
            if Some(key) != joined_key && val.is_derived() {
                state::set_since(&mut self.batch, self.num, base, key, val)?;
            } else {
                state::put_current(&mut self.batch, self.num, key, val);
            }
        }
        self.put_room();
        Ok(())
    }

    /// Notes that the state before our join is whole by now: from here on no event is taken at its word.
    pub fn note_filled(&mut self) {
        if let Some(partial) = &mut self.row.partial {
            partial.is_filled = true;
            self.put_room();
        }
    }

    /// Ends to believe of some servers that they have somebody in the room, because the whole state has nobody of them: at most
    /// `max` of them. Gives `false` where there are none left.
    pub fn release_servers(&mut self, max: usize) -> Result<bool> {
        let next_key = &mut self.row.next_key;
        let values = members::release_servers(&mut self.batch, self.num, next_key, max)?;
        if values.is_empty() {
            return Ok(false);
        }
        let order = Order::live(self.batch.position(&LogEntry::RoomState { room: self.num }));
        state::apply(&mut self.batch, self.num, order, &values)?;
        if state::tip(&self.batch, self.num)? == StateRef::Main(order) {
            self.row.state_tip = order;
        }
        self.wakes_only = Some(Vec::new());
        self.put_room();
        Ok(true)
    }
}
