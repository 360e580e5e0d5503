//! Events that a join left out of the state that was brought, because they could not be believed then: the keys of their servers
//! could not be had, or they stand on such events.
//!
//! They are remembered with the join, and taken in once they can be believed. Each is then part of the room's state from the base
//! of the join on (`state/late.rs`), as if it had been brought with the rest. Until then nobody knows what the room's state says
//! under their keys, so that nothing is kept out of the room for good because such a key is not set.

use bytes::Bytes;

use super::{Change, Received, received::list_allowing};
use crate::{
    error::{Error, Result},
    ids::{EventNum, Order, RoomNum, StateKeyNum},
    rooms::{
        admit::{self, Verdict},
        event::{self, Event},
        state,
    },
    schema,
    schema::state::{LeftOutRow, StateRef, StateValue},
    store::{Direction, Fault, LogEntry, Read},
};

/// A room remembers at most this many events that a join left out, because they are written with the join in one batch.
pub const LEFT_OUT_MAX: usize = 500;
/// The events that are remembered have at most this many bytes in all.
pub const LEFT_OUT_BYTES_MAX: usize = 384 << 10;
/// One turn takes in at most this many of them.
pub const TAKEN_AT_ONCE: usize = 50;

/// An event that a join leaves out.
#[derive(Clone, Debug)]
pub struct LeftOut {
    /// The type of the event.
    pub event_type: String,
    /// The event's state key.
    pub state_key: String,
    /// Whether the event is part of the state that the join brings. Others are there because they allow such ones.
    pub is_state: bool,
    /// The event as canonical JSON, signatures included.
    pub json: Bytes,
}

/// An event that a join left out, as it is remembered.
#[derive(Clone, Debug)]
pub struct Remembered {
    /// The name of its row, beside the room: its type, its state key and a number.
    pub name: (String, String, u64),
    /// The event and its place.
    pub row: LeftOutRow,
}

/// Lists the events that the last join of a room left out.
pub fn list(read: &(impl Read + ?Sized), room: RoomNum) -> Result<Vec<Remembered>, Fault> {
    let rows = schema::LEFT_OUT.prefix::<(RoomNum,)>(read, (room,), Direction::Up)?;
    let remembered =
        |((_, event_type, state_key, number), row)| Remembered { name: (event_type, state_key, number), row };
    rows.take(LEFT_OUT_MAX).map(|row| row.map(remembered)).collect()
}

/// Whether the state of a room lacks events that a join left out, so that others are not to rely on it.
fn lacks_any(read: &(impl Read + ?Sized), room: RoomNum) -> Result<bool, Fault> {
    for row in schema::LEFT_OUT.prefix::<(RoomNum,)>(read, (room,), Direction::Up)? {
        if row?.1.is_state {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether nobody knows what the state of a room has under a key, because a join left that out.
pub fn is_open(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    event_type: &str,
    state_key: &str,
) -> Result<bool, Fault> {
    let key = (room, event_type, state_key);
    let mut rows = schema::LEFT_OUT.prefix::<(RoomNum, String, String)>(read, key, Direction::Up)?;
    Ok(rows.next().transpose()?.is_some())
}

impl Change {
    /// Remembers the events that a join leaves out, with which it ends. Those of an earlier join count no longer. Gives how many are
    /// not remembered, because they are too many.
    pub fn leave_out(&mut self, events: &[LeftOut], now_ms: u64) -> Result<usize, Fault> {
        let mut before = schema::LEFT_OUT.prefix::<(RoomNum,)>(&self.batch, (self.num,), Direction::Up)?;
        let is_first = before.next().transpose()?.is_none();
        drop(before);
        if !is_first {
            schema::LEFT_OUT.delete_prefix::<(RoomNum,)>(&mut self.batch, (self.num,));
        }
        // The join's own event stands just above the base.
        let base = Order { anchor: self.row.tip.anchor, minor: -1 };
        let mut lacking = Vec::with_capacity(events.len());
        for event in events {
            // A state has one event for each key. Another one that cannot be believed says nothing against one that can, or whoever
            // gives the state could make it doubtful.
            if !event.is_state || !self.has_at(base, &event.event_type, &event.state_key)? {
                lacking.push(event);
            }
        }
        Ok(self.put_left_out(&lacking, base, &[], now_ms))
    }

    /// Remembers the events that are left out of the rest of a state which a join brought without its members, besides those that the
    /// join left out. Gives how many are not remembered, because they are too many. Nothing happens in a room whose state is whole.
    pub fn leave_out_more(&mut self, events: &[LeftOut], now_ms: u64) -> Result<usize, Fault> {
        let Some(base) = self.row.partial.as_ref().map(|partial| partial.base) else { return Ok(0) };
        let known = list(&self.batch, self.num)?;
        // A member of the room may have been made up for the time being, which says nothing against these events.
        Ok(self.put_left_out(&events.iter().collect::<Vec<_>>(), base, &known, now_ms))
    }

    /// Whether the state at a base has something under a key.
    fn has_at(&self, base: Order, event_type: &str, state_key: &str) -> Result<bool, Fault> {
        let Some(key) = state::find_key(&self.batch, self.num, event_type, state_key)? else {
            return Ok(false);
        };
        let value = state::at(&self.batch, self.num, StateRef::Main(base), key)?;
        Ok(value != StateValue::Absent)
    }

    fn put_left_out(&mut self, events: &[&LeftOut], base: Order, known: &[Remembered], now_ms: u64) -> usize {
        let next = known.iter().map(|it| it.name.2 + 1).max().unwrap_or(0);
        let (mut count, mut bytes) = (known.len(), known.iter().map(|it| it.row.json.len()).sum::<usize>());
        let mut not_remembered = 0;
        for (event, number) in events.iter().zip(next..) {
            if let Some(known) = known.iter().find(|it| it.row.json == event.json) {
                // An event that was there because it allows others may be part of the rest of the state.
                if event.is_state && !known.row.is_state {
                    let (event_type, state_key, number) = &known.name;
                    let key = (self.num, event_type.as_str(), state_key.as_str(), *number);
                    schema::LEFT_OUT.put(
                        &mut self.batch,
                        key,
                        &LeftOutRow { is_state: true, ..known.row.clone() },
                    );
                }
                continue;
            }
            if count == LEFT_OUT_MAX || bytes + event.json.len() > LEFT_OUT_BYTES_MAX {
                not_remembered += 1;
                continue;
            }
            count += 1;
            bytes += event.json.len();
            let row = LeftOutRow { base, is_state: event.is_state, at_ms: now_ms, json: event.json.clone() };
            let key = (self.num, event.event_type.as_str(), event.state_key.as_str(), number);
            schema::LEFT_OUT.put(&mut self.batch, key, &row);
        }
        not_remembered
    }

    /// Whether nobody knows what the room's state says about an event, because a join left out an event of a key that the rules look
    /// at.
    pub(super) fn is_open_whether(&self, event: &Event) -> Result<bool, Fault> {
        let rules = &self.rules().authorization;
        let state_key = event.state_key.as_deref();
        let needed = admit::needed_keys(&event.event_type, &event.sender, state_key, &event.content, rules);
        for (event_type, key) in needed.unwrap_or_default() {
            if is_open(&self.batch, self.num, &event_type.to_string(), &key)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes in events that a join left out, at most [`TAKEN_AT_ONCE`], each after those that allow it. One without a [`Received`] is
    /// forgotten: it was forged, or could not be believed for too long. One that needs others which are missing stays. Gives how
    /// many are remembered no longer.
    pub fn take_left_out(&mut self, events: &[(Remembered, Option<Received>)]) -> Result<usize> {
        debug_assert!(self.may_stage(), "what was left out comes before anything else in a turn");
        let (mut done, mut steps, mut late) = (0, Vec::new(), Vec::new());
        for (Remembered { name: (event_type, state_key, number), row }, received) in events {
            let name = (self.num, event_type.as_str(), state_key.as_str(), *number);
            // Another join may have come between, with a base and events of its own.
            if schema::LEFT_OUT.get(&self.batch, name)?.as_ref() != Some(row) {
                continue;
            }
            let mut taken = None;
            if let Some(received) = received {
                match self.take_late(received)? {
                    Some(key) => taken = key,
                    None => continue,
                }
            }
            schema::LEFT_OUT.delete(&mut self.batch, name);
            done += 1;
            let Some((event, key)) = taken.filter(|_| row.is_state) else { continue };
            let at_base = state::at(&self.batch, self.num, StateRef::Main(row.base), key)?;
            if at_base != StateValue::Absent {
                continue;
            }
            if !state::has_changed_above(&self.batch, self.num, key, row.base)? {
                steps.push((key, StateValue::Absent, StateValue::Event(event)));
            } else if let Some(now) = state::current(&self.batch, self.num, key)?
                && event::require_kept(&self.batch, self.num, event)?.row.header.auth.contains(&now)
            {
                // A fork brought the event on which this one rests, while nothing was known of this one.
                steps.push((key, StateValue::Event(now), StateValue::Event(event)));
            }
            late.push((key, row.base, event));
        }
        let tip = StateRef::Main(self.row.state_tip);
        if !steps.is_empty() {
            // No event causes this step; it tells readers what the state says from now on.
            let order = Order::live(self.batch.position(&LogEntry::RoomState { room: self.num }));
            self.take_step(order, &steps, None)?;
        }
        for (key, base, event) in late {
            state::set_from(&mut self.batch, self.num, key, base, StateValue::Event(event))?;
        }
        // The state after a head that was the room's is so still: it has what was left out, too.
        let after = StateRef::Main(self.row.state_tip);
        let apart = self.row.apart.iter_mut().map(|branch| &mut branch.head);
        for head in self.row.heads.iter_mut().chain(apart).filter(|head| head.after == tip) {
            head.after = after;
        }
        self.put_room();
        Ok(done)
    }

    /// Takes in one event, unless it is here already. Gives its number and its key; `None` within where it is part of no state, and
    /// `None` where an event that allows it is missing or there is no place for it.
    fn take_late(&mut self, received: &Received) -> Result<Option<Option<(EventNum, StateKeyNum)>>> {
        if let Some((known, _)) = self.find_known(&received.key(self.num))? {
            let is_rejected =
                schema::ASIDE.get(&self.batch, (self.num, known))?.is_some_and(|aside| aside.rejected);
            let kept = event::require_kept(&self.batch, self.num, known)?;
            let key = kept.row.header.state_key.filter(|_| !is_rejected);
            return Ok(Some(key.map(|key| (known, key))));
        }
        let allowing = self.known_auth_events(received.event())?;
        match admit::lacking(received.event(), &allowing, &std::collections::BTreeMap::new()) {
            None => {}
            Some(Verdict::Need { .. }) => return Ok(None),
            Some(_) => return Ok(Some(None)),
        }
        let rejected =
            admit::check_at_auth_events(received.event(), &self.rules().authorization, &allowing).err();
        let auth: Vec<_> = list_allowing(&self.row, received.event())?
            .iter()
            .filter(|id| received.event().auth.contains(id))
            .filter_map(|id| match allowing.get(id) {
                Some(admit::Known::Found(event)) => Some(std::sync::Arc::clone(event)),
                _ => None,
            })
            .collect();
        let why = "a join left it out at first";
        let taken = self.put_brought(received, &auth, why, rejected)?;
        Ok(taken.map(|(event, key)| key.map(|key| (event, key))))
    }
}

/// Refuses to let others rely on the state of a room that lacks events, be it that of an earlier stay: [`Error::Busy`].
pub fn require_whole(read: &(impl Read + ?Sized), room: RoomNum) -> Result<()> {
    let is_earlier = schema::ROOM.get(read, room)?.is_some_and(|row| !row.earlier.is_empty());
    if is_earlier || lacks_any(read, room)? {
        tracing::debug!(%room, is_earlier, "a room's state is not told, because a join left out events of it");
        return Err(Error::Busy { retry_after: super::JOINING_TAKES });
    }
    Ok(())
}
