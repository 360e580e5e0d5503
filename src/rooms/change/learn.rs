//! Takes in what a join without members left out of a room's state (`docs/decisions/partial-state-joins.md`).

use ruma::UserId;

use super::{
    Change,
    received::{Over, Overs},
    staged::Moved,
};
use crate::{
    accounts,
    error::Result,
    ids::{EventNum, Order, StateKeyNum},
    rooms::{
        event,
        members::{self, Since},
        state::{self, Learned, StateRef, StateValue},
    },
    schema,
    schema::{
        event_types::{DERIVED_JOINED, MEMBER},
        rooms::Place,
    },
    store::{Fault, LogEntry},
};

impl Change {
    /// Whether an event is taken at its word about members of whom nothing is known.
    pub(super) fn presumes(&self) -> bool {
        self.row.partial.as_ref().is_some_and(|partial| !partial.is_filled)
    }

    /// Learns what keys had in the state before our join, which was brought without its members: any part of it in any order, and
    /// any part again. Members are counted, and their servers are in the room from the join on. All events that the values name
    /// are stored. Where the state of now is whole, it is that of the earlier stay which is completed next, and nothing happens where there
    /// is none.
    pub fn learn(&mut self, values: &[(StateKeyNum, StateValue)]) -> Result<()> {
        let Some(base) = self.row.partial.as_ref().map(|partial| partial.base) else {
            return Ok(self.learn_earlier(values)?);
        };
        let (mut touched, mut is_any, mut overs) = (self.touched(), false, Overs::new());
        for (key, val) in values {
            let val = &match val {
                StateValue::Event(event) => {
                    let known = state::at(&self.batch, self.num, StateRef::Main(base), *key)?;
                    let kept = self.not_over(*key, *event, known)?;
                    if kept != *event {
                        overs.insert(*key, Over { brought: *event, known: kept });
                    }
                    StateValue::Event(kept)
                }
                other => *other,
            };
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
        self.learn_overs(&overs)?;
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

    /// Takes in that the state before our join has memberships of our users that are over by what is here.
    fn learn_overs(&mut self, overs: &Overs) -> Result<()> {
        let Some(partial) = self.row.partial.as_ref().filter(|_| !overs.is_empty()) else { return Ok(()) };
        let (join, base, us) = (partial.join, partial.base, partial.us.clone());
        let Some(mut join) = event::find(&self.batch, self.num, join)? else { return Ok(()) };
        if let Some(after) = self.name_states(&mut join, overs)? {
            let apart = self.row.apart.iter_mut().map(|branch| &mut branch.head);
            for head in self.row.heads.iter_mut().chain(apart).filter(|head| head.event == join.event()) {
                head.after = after;
            }
        }
        self.add_forks(base, (&us, join.row.header.state_key), overs)?;
        self.put_room();
        Ok(())
    }

    /// Gives the event that says what a user of ours is to the room: the one that another server brings, unless we know a later one.
    /// Whatever our users did there went by way of us, so that a server which brings an old membership back does not know the room's
    /// state. `known` is what we have for the key; of other keys it is always the one that is brought.
    pub(super) fn not_over(
        &self,
        key: StateKeyNum,
        brought: EventNum,
        known: StateValue,
    ) -> Result<EventNum, Fault> {
        let StateValue::Event(known) = known else { return Ok(brought) };
        let place = |event| schema::PLACE.get(&self.batch, (self.num, event));
        let (Some(Place::Timeline(then)), Some(Place::Timeline(since))) = (place(brought)?, place(known)?)
        else {
            return Ok(brought);
        };
        if since <= then {
            return Ok(brought);
        }
        let Some((event_type, user)) = state::key_name(&self.batch, self.num, key)? else {
            return Ok(brought);
        };
        let user = <&UserId>::try_from(user.as_str()).ok().filter(|_| event_type == MEMBER);
        let user = user.map(|user| accounts::users::find_num(&self.batch, user)).transpose()?.flatten();
        Ok(if user.is_some() { known } else { brought })
    }

    /// Notes that the state before our join is whole by now: from here on no event is taken at its word.
    pub fn note_filled(&mut self) {
        let earlier = self.row.earlier.last_mut().map(|stay| &mut stay.state);
        if let Some(stay) = self.row.partial.as_mut().or(earlier) {
            stay.is_filled = true;
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
