//! The values that a state key had, as visibility asks for them.

use std::ops::Bound;

use serde::Deserialize;

use crate::{
    ids::{Order, RoomNum, StateKeyNum},
    rooms::{
        event::{self, StoredEvent},
        state,
    },
    schema::{self, state::StateValue},
    store::{Direction, Fault, Read},
};

/// Read this many changes of a key at once. A page of a hundred events needs a few such parts where each event is a
/// change of this very key, and one in any other room.
pub(super) const CHANGES_READ: usize = 32;

/// Look through at most this many changes of a room's visibility for a time when it was open to everybody.
pub(super) const ALL_CHANGES_MAX: usize = 1_000;

/// The values that a state key had on the main line, as far as they were asked for: however often a key changed, a page
/// reads little more of its changes than it has events.
pub(super) struct History {
    event_type: &'static str,
    state_key: String,
    /// Whether anything was read, which happens only when the history is asked for.
    is_read: bool,
    pub(super) key: Option<StateKeyNum>,
    pub(super) now: StateValue,
    /// All changes in `low..=high`, rising: the order of each, and the value before it.
    pub(super) changes: Vec<(Order, StateValue)>,
    low: Order,
    high: Order,
}

impl History {
    /// The history of this key, of which nothing is read yet.
    pub(super) fn of(event_type: &'static str, state_key: &str) -> Self {
        Self {
            event_type,
            state_key: state_key.to_owned(),
            is_read: false,
            key: None,
            now: StateValue::Absent,
            changes: Vec::new(),
            low: Order::MIN,
            high: Order::MAX,
        }
    }

    /// Reads the newest changes, if nothing was read yet: most pages are of the newest events, and most keys changed
    /// once.
    pub(super) fn load(&mut self, read: &(impl Read + ?Sized), room: RoomNum) -> Result<(), Fault> {
        if self.is_read {
            return Ok(());
        }
        self.key = state::find_key(read, room, self.event_type, &self.state_key)?;
        if let Some(key) = self.key {
            self.now = state::now(read, room, key)?;
            self.read_around(read, room, key, Order::MAX, 0, CHANGES_READ)?;
        }
        self.is_read = true;
        Ok(())
    }

    /// Reads up to `above` changes at or above an order, and up to `below` changes below it.
    fn read_around(
        &mut self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        key: StateKeyNum,
        order: Order,
        above: usize,
        below: usize,
    ) -> Result<(), Fault> {
        let list = |low, high, direction, count| -> Result<Vec<(Order, StateValue)>, Fault> {
            if count == 0 {
                return Ok(Vec::new());
            }
            let rows =
                schema::STATE_UNDO.range::<(RoomNum, StateKeyNum, Order)>(read, low, high, direction)?;
            rows.take(count).map(|row| row.map(|((_, _, order), val)| (order, val))).collect()
        };
        let at = |order| (room, key, order);
        let (lowest, middle, highest) = (at(Order::MIN), at(order), at(Order::MAX));
        let mut changes = list(Bound::Included(lowest), Bound::Excluded(middle), Direction::Down, below)?;
        self.low = match changes.last() {
            Some((lowest, _)) if changes.len() == below => *lowest,
            _ if below == 0 => order,
            _ => Order::MIN,
        };
        changes.reverse();
        let rest = list(Bound::Included(middle), Bound::Included(highest), Direction::Up, above)?;
        self.high = match rest.last() {
            Some((highest, _)) if rest.len() == above => *highest,
            _ => Order::MAX,
        };
        changes.extend(rest);
        self.changes = changes;
        Ok(())
    }

    /// Whether all changes there ever were are at hand. Which are depends on the events that were asked for.
    pub(super) fn is_whole(&self) -> bool {
        (self.low, self.high) == (Order::MIN, Order::MAX)
    }

    /// Lists all changes there ever were, rising, as far as a bound that no room reaches by accident.
    pub(super) fn all_changes(
        &self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
    ) -> Result<Vec<(Order, StateValue)>, Fault> {
        let Some(key) = self.key else { return Ok(Vec::new()) };
        if self.is_whole() {
            return Ok(self.changes.clone());
        }
        let rows = schema::STATE_UNDO.prefix::<(RoomNum, StateKeyNum)>(read, (room, key), Direction::Down)?;
        let changes = rows.take(ALL_CHANGES_MAX).map(|row| row.map(|((_, _, order), val)| (order, val)));
        let mut changes: Vec<_> = changes.collect::<Result<_, _>>()?;
        changes.reverse();
        Ok(changes)
    }

    /// Gives the value just below an order.
    pub(super) fn below(
        &mut self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        order: Order,
    ) -> Result<StateValue, Fault> {
        let Some(key) = self.key else { return Ok(StateValue::Absent) };
        if order < self.low {
            self.read_around(read, room, key, order, 1, CHANGES_READ)?;
        } else if order > self.high {
            self.read_around(read, room, key, order, CHANGES_READ, 0)?;
        }
        let at = self.changes.partition_point(|(change, _)| *change < order);
        Ok(self.changes.get(at).map_or(self.now, |(_, before)| *before))
    }

    /// Gives the value just before an event.
    pub(super) fn before(
        &mut self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        stored: &StoredEvent,
    ) -> Result<StateValue, Fault> {
        match (stored.row.header.before, self.key) {
            (Some(before), Some(key)) => state::at(read, room, before, key),
            _ => self.below(read, room, stored.order),
        }
    }

    /// Gives the value just before an event of a key that nobody removes. A state that another server gave may leave the key out,
    /// so that an event which is deeper in the graph than one that set the key has the value of that.
    pub(super) fn known_before(
        &mut self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        stored: &StoredEvent,
    ) -> Result<StateValue, Fault> {
        let before = self.before(read, room, stored)?;
        if before != StateValue::Absent {
            return Ok(before);
        }
        let values = self.all_changes(read, room)?.into_iter().map(|(_, before)| before).chain([self.now]);
        let (mut deepest, mut found) = (0, before);
        let own = depth_of(stored);
        for value in values {
            let Some(event) = value.event().filter(|event| *event != stored.event()) else { continue };
            let depth = event::find_anywhere(read, room, event)?.as_ref().map_or(0, depth_of);
            if depth < own && depth >= deepest {
                (deepest, found) = (depth, value);
            }
        }
        Ok(found)
    }
}

/// The depth of an event, as its sender says.
fn depth_of(stored: &StoredEvent) -> u64 {
    #[derive(Deserialize)]
    struct Depth {
        depth: u64,
    }
    serde_json::from_slice(&stored.row.json).map_or(0, |Depth { depth }| depth)
}
