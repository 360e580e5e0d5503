//! Changes that are larger than a batch: they are written in parts that count from the change's last batch on
//! (`state/stage.rs`). A change that turns thousands of keys of a room's state, the state that a join brings, and a room
//! that begins with hundreds of invitations, are such.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    sync::Arc,
};

use super::{Change, forget};
use crate::{
    error::Result,
    ids::{EventNum, Order, Position, RoomNum, StateKeyNum, UserNum},
    rooms::{
        event::StateEvent,
        graph,
        members::{self, Since, Touched},
        relations,
        state::{self, Difference, stage},
    },
    schema,
    schema::event_types::MEMBER,
    schema::{
        rooms::{EventRow, Membership, Resident, RoomRow},
        state::{StageRow, StateRef, StateValue},
    },
    store::{Batch, Direction, Fault, Guard, LogEntry, NotAccepted, STEP_POSITIONS_MAX, Store},
};

/// A step of the main line that changes more keys than this is staged: each may be of a user of ours, and of a server that
/// nobody was in before, which takes nine rows. Tests use a small bound to reach it.
pub(super) const KEYS_MAX: usize = if cfg!(test) { 25 } else { 500 };
/// Write the counts of at most this many servers in one part, with five rows each.
const SERVERS_MAX: usize = if cfg!(test) { 4 } else { 800 };
/// A side state of more entries than this is written in parts of this many.
const SIDE_PART: usize = state::SIDE_ENTRIES_MAX;
/// Write out the rows of a new room once its batch has this many, so that the rows of one more event still fit. Tests use
/// a small bound, so that every room which they make is staged.
const CUT_ROWS: usize = if cfg!(test) { 50 } else { 2_000 };
/// Write them out, too, once they have this many bytes.
const CUT_BYTES: usize = 512 << 10;

/// Clear a room that was never finished by this many events at a time, so that each batch stays small.
const CLEARED_AT_ONCE: usize = if cfg!(test) { 3 } else { 500 };

/// A user's membership before and after the change, and the event that changed it.
#[derive(Clone, Copy)]
pub(super) struct Moved {
    pub(super) was: Membership,
    pub(super) is: Membership,
    pub(super) by: EventNum,
}

/// A room that is being made in parts, of which this change is the last batch.
#[derive(Debug)]
pub(super) struct Making {
    /// The position that is reserved for the whole step.
    anchor: Position,
    /// The number of positions that the step's parts have claimed.
    claimed: u64,
}

/// Whether a step of the main line that changes these keys is larger than a batch, so that it is staged.
pub(super) fn is_large(differing: &[Difference]) -> bool {
    differing.len() > KEYS_MAX
}

/// A step of the main line while its parts are written.
struct Parts {
    anchor: Position,
    order_of: fn(Position, u32) -> Result<Order, Fault>,
    number: u32,
    /// The order of the event that causes the step, since which users have their memberships.
    since: Order,
    touched: Touched,
}

impl Change {
    /// Whether nothing that this change has done so far touches the room's state, so that a step may be staged.
    pub(super) fn may_stage(&self) -> bool {
        self.added().is_empty() && self.stage.is_none()
    }

    /// Takes one step of the main line, in parts if it is large. `own` is the event at `order`, with its key, if the step
    /// sets that.
    pub(super) fn take_step(
        &mut self,
        order: Order,
        differing: &[Difference],
        own: Option<(StateKeyNum, Arc<StateEvent>)>,
    ) -> Result<()> {
        let own_change = own.as_ref().map(|(key, event)| (*key, StateValue::Event(event.event)));
        if is_large(differing) {
            return self.stage_step(order, differing, own_change);
        }
        let mut changes: Vec<_> = differing.iter().map(|(key, _, val)| (*key, *val)).collect();
        if let Some(index) = changes.iter().position(|change| own_change == Some(*change)) {
            changes.swap(0, index);
        }
        self.set_state(order, &changes, own.map(|(_, event)| event))
    }

    /// Takes one step of the main line that is larger than a batch, for the event at `order`. The event's own key, which
    /// no state holds before, is set in the last batch.
    fn stage_step(
        &mut self,
        order: Order,
        differing: &[Difference],
        own: Option<(StateKeyNum, StateValue)>,
    ) -> Result<()> {
        let is_own = |key: StateKeyNum| own.is_some_and(|(own, _)| own == key);
        let others: Vec<_> = differing.iter().filter(|(key, ..)| !is_own(*key)).copied().collect();
        let mut parts = self.begin_parts(stage::step_order)?;
        debug_assert_eq!(
            order.settle(parts.anchor),
            parts.since,
            "the event of the step is the first of its change"
        );
        self.stage_keys(&mut parts, &others)?;
        for (key, old, new) in differing.iter().filter(|(key, ..)| is_own(*key)) {
            if let Some((user, moved)) = self.moves(&[(*key, *old, *new)])?.pop() {
                self.move_member(order, &user, moved, &mut parts.touched)?;
            }
        }
        let joined = self.stage_counts(&mut parts, &BTreeSet::new())?;
        let last: Vec<_> = joined.into_iter().chain(own).collect();
        state::apply(&mut self.batch, self.num, order, &last)?;
        if !last.is_empty() {
            self.row.state_tip = order;
        }
        stage::finish(&mut self.batch, self.num);
        Ok(())
    }

    /// Lays down the state that a join over federation brings to a room that we had something of, just below the next event of
    /// this change: our own member event. It becomes the room's state, whatever that was before, and a hole opens below it:
    /// `missing` are the ids of the events there. The members of the state are followed as in any other step, and the claimed
    /// servers are in the room whether members of them are known or not.
    pub(super) fn lay_base(
        &mut self,
        brought: &BTreeMap<StateKeyNum, EventNum>,
        claimed: &BTreeSet<String>,
        missing: Vec<String>,
    ) -> Result<()> {
        let is_bottomless = self.row.state_tip == Order::MIN;
        let differing = state::differing_from_current(&self.batch, self.num, brought)?;
        debug_assert!(!self.batch.has_position(), "the event that a base stands below comes next");
        let mut parts = self.begin_parts(stage::base_order)?;
        self.stage_keys(&mut parts, &differing)?;
        if let Some(joined) = self.stage_counts(&mut parts, claimed)? {
            let mut batch = self.batch.another();
            self.put_part(&mut parts, &mut batch, &[joined])?;
            self.enqueue_part(&parts, batch)?;
        }
        stage::finish(&mut self.batch, self.num);
        self.row.state_tip =
            state::open_hole(&mut self.batch, self.num, parts.anchor, is_bottomless, missing)?;
        Ok(())
    }

    /// The position at which the step of this change begins. Errors: [`NotAccepted::Busy`] if another step takes long.
    pub(super) fn begin_step(&mut self) -> Result<Position, NotAccepted> {
        let step = match self.step.take() {
            Some(step) => step,
            None => self.store.begin_step()?,
        };
        Ok(self.step.insert(step).anchor())
    }

    /// Lays down the first state of a room, which a join over federation brought in earlier changes, just below the next event
    /// of this change: our own member event. `users` are the users of ours whom the state knows, with their member keys.
    pub(super) fn lay_first_base(
        &mut self,
        users: &BTreeMap<UserNum, StateKeyNum>,
        missing: Vec<String>,
    ) -> Result<()> {
        debug_assert!(!self.batch.has_position(), "the event that a base stands below comes next");
        let anchor = self.begin_step()?;
        self.batch.begin_at(anchor);
        let users: Vec<_> = users.iter().collect();
        for part in users.chunks(stage::PART_KEYS_MAX) {
            let mut batch = self.batch.another();
            stage::begin(&mut batch, self.num, anchor, true)?;
            for (_, key) in part {
                let Some(by) = state::current(&batch, self.num, **key)? else { continue };
                let name = state::key_name(&batch, self.num, **key)?;
                let (_, user_id) = name.ok_or(Fault::Corrupt("a state key has no name"))?;
                let membership = members::membership_of_event(&batch, self.num, by)?;
                let since = Since { membership, event: by, order: Order::live(anchor) };
                let user = members::track(&mut batch, self.num, &user_id, since, Some(anchor))?;
                self.concern(user, membership);
            }
            batch.stage_at(anchor);
            self.enqueue_numbered(batch)?;
        }
        stage::finish(&mut self.batch, self.num);
        self.row.state_tip = state::open_hole(&mut self.batch, self.num, anchor, true, missing)?;
        Ok(())
    }

    fn begin_parts(
        &mut self,
        order_of: fn(Position, u32) -> Result<Order, Fault>,
    ) -> Result<Parts, NotAccepted> {
        debug_assert!(self.may_stage(), "a step is staged before anything else changes the state");
        let anchor = self.begin_step()?;
        // The tip remembers the state before the step. Without a tip, the next change looks for a step that was not
        // finished.
        self.seat.tip = None;
        self.batch.begin_at(anchor);
        Ok(Parts { anchor, order_of, number: 0, since: Order::live(anchor), touched: Touched::default() })
    }

    /// Writes the parts of a step that hold these keys, each key once and none of them derived, with our users whose
    /// memberships change by them.
    fn stage_keys(&mut self, parts: &mut Parts, differing: &[Difference]) -> Result<()> {
        for part in differing.chunks(stage::PART_KEYS_MAX) {
            let mut batch = self.batch.another();
            for (user_id, moved) in self.moves(part)? {
                self.count_member(&user_id, moved, &mut parts.touched);
                let now = Since { membership: moved.is, event: moved.by, order: parts.since };
                let user = members::track(&mut batch, self.num, &user_id, now, Some(parts.anchor))?;
                self.concern(user, moved.is);
            }
            let changes: Vec<_> = part.iter().map(|(key, _, val)| (*key, *val)).collect();
            self.put_part(parts, &mut batch, &changes)?;
            self.enqueue_part(parts, batch)?;
        }
        tracing::debug!(room = %self.num, keys = differing.len(), "a large change of a room's state is staged");
        Ok(())
    }

    /// Writes the parts of a step that count its members by server. Gives the derived key of how many are joined, which
    /// is not written yet.
    fn stage_counts(
        &mut self,
        parts: &mut Parts,
        claimed: &BTreeSet<String>,
    ) -> Result<Option<(StateKeyNum, StateValue)>> {
        let counts = parts.touched.counts_with(&self.batch, self.num, claimed)?;
        for part in counts.chunks(SERVERS_MAX) {
            let mut batch = self.batch.another();
            let mut values = Vec::with_capacity(part.len());
            for count in part {
                let next_key = &mut self.row.next_key;
                values.push(members::stage_count(&mut batch, self.num, next_key, parts.anchor, count)?);
            }
            self.put_part(parts, &mut batch, &values)?;
            self.enqueue_part(parts, batch)?;
        }
        if counts.is_empty() {
            return Ok(None);
        }
        let joined = self.row.joined;
        Ok(Some(members::joined_value(&mut self.batch, self.num, &mut self.row.next_key, joined)?))
    }

    fn put_part(
        &mut self,
        parts: &mut Parts,
        batch: &mut Batch,
        changes: &[(StateKeyNum, StateValue)],
    ) -> Result<(), Fault> {
        stage::begin(batch, self.num, parts.anchor, false)?;
        let order = (parts.order_of)(parts.anchor, parts.number)?;
        parts.number += 1;
        if stage::put_part(batch, self.num, order, changes)? {
            self.row.state_tip = order;
        }
        Ok(())
    }

    fn enqueue_part(&mut self, parts: &Parts, mut batch: Batch) -> Result<()> {
        batch.stage_at(parts.anchor);
        self.enqueue_numbered(batch)
    }

    /// Enqueues a batch ahead of the change, with the numbers that the change has given out so far, so that no number in
    /// the batch is given to anything else if the change comes to nothing.
    fn enqueue_numbered(&mut self, mut batch: Batch) -> Result<()> {
        let RoomRow { next_event, next_key, next_side, .. } = self.row;
        let given = |row: &mut RoomRow| {
            (row.next_event, row.next_key, row.next_side) = (next_event, next_key, next_side);
        };
        given(&mut self.row_before);
        schema::ROOM.put(&mut batch, self.num, &self.row_before);
        drop(self.store.enqueue(batch)?);
        if let Some(tip) = &mut self.seat.tip {
            given(&mut tip.row);
        }
        Ok(())
    }

    /// Lists the users whose memberships change by these keys.
    fn moves(&self, differing: &[Difference]) -> Result<Vec<(String, Moved)>> {
        let names = state::list_key_names(&self.batch, self.num, differing.iter().map(|(key, ..)| *key))?;
        let mut moves = Vec::new();
        for ((_, old, new), name) in differing.iter().zip(names) {
            let Some((event_type, user_id)) = name else { continue };
            let Some(by) = new.event().or(old.event()).filter(|_| event_type == MEMBER) else { continue };
            moves
                .push((user_id, Moved { was: self.membership_in(*old)?, is: self.membership_in(*new)?, by }));
        }
        Ok(moves)
    }

    pub(super) fn membership_in(&self, val: StateValue) -> Result<Membership, Fault> {
        match val.event() {
            Some(event) => members::membership_of_event(&self.batch, self.num, event),
            None => Ok(Membership::Leave),
        }
    }

    /// Writes down all but the last part of a side state that is too large for one row, in batches of its own. Nothing
    /// names these rows until this change is accepted; if it never is, they are swept.
    pub(super) fn write_side_parts(
        &mut self,
        mut base: StateRef,
        changes: &[(StateKeyNum, StateValue)],
    ) -> Result<(StateRef, usize)> {
        let mut written = 0;
        while changes.len() - written > SIDE_PART {
            let part = changes.get(written..written + SIDE_PART).unwrap_or_default();
            let mut batch = self.batch.another();
            base = state::make_side(&mut batch, self.num, &mut self.row.next_side, base, part)?;
            self.enqueue_numbered(batch)?;
            written += SIDE_PART;
        }
        Ok((base, written))
    }

    /// Writes out the rows of a new room so far, if they are many, as a part of a staged step. Nobody sees the room
    /// before this change is accepted.
    pub(crate) fn cut_if_large(&mut self) -> Result<(), NotAccepted> {
        if self.batch.row_count() <= CUT_ROWS && self.batch.byte_count() <= CUT_BYTES {
            return Ok(());
        }
        debug_assert!(self.row.resident == Resident::Yes, "only what is going to be a room is staged");
        let anchor = self.begin_step()?;
        let mut stage = self.stage.take().unwrap_or(Making { anchor, claimed: 0 });
        let base = stage.anchor.plus(stage.claimed);
        let next = self.batch.another();
        let mut part = mem::replace(&mut self.batch, next);
        for (user, _) in &self.concerned {
            members::hold_back(&mut part, *user, self.num, stage.anchor, base).map_err(NotAccepted::Fault)?;
        }
        stage::begin(&mut part, self.num, stage.anchor, true).map_err(NotAccepted::Fault)?;
        let unseen = RoomRow { resident: Resident::No, ..self.row.clone() };
        schema::ROOM.put(&mut part, self.num, &unseen);
        stage.claimed += u64::from(part.position_count());
        if stage.claimed > STEP_POSITIONS_MAX / 2 {
            return Err(NotAccepted::TooLarge);
        }
        part.stage_at(base);
        drop(self.store.enqueue(part)?);
        self.row = self.row.clone().settle(base);
        for stored in &mut self.added {
            stored.order = stored.order.settle(base);
        }
        self.batch.begin_at(stage.anchor.plus(stage.claimed));
        self.stage = Some(stage);
        Ok(())
    }

    /// Lets this last batch make the parts of a room count.
    pub(super) fn finish_stage(&mut self) {
        if self.stage.take().is_some() {
            stage::finish(&mut self.batch, self.num);
            self.put_room();
        }
    }
}

/// Takes back a room's step that was not finished.
pub(super) fn clear(store: &Store, guard: &Guard, room: RoomNum) -> Result<()> {
    let Some(StageRow { anchor, makes_room, brings_from }) = stage::find(&store.view(), room)? else {
        return Ok(());
    };
    tracing::debug!(%room, makes_room, "a staged step that was not finished is taken back");
    let in_parts = |take_back: &dyn Fn(&mut Batch) -> Result<bool, Fault>| -> Result<()> {
        loop {
            let mut batch = store.batch(guard);
            let is_done = take_back(&mut batch)?;
            drop(store.enqueue(batch)?);
            if is_done {
                return Ok(());
            }
        }
    };
    if makes_room {
        return in_parts(&|batch| clear_new_room(batch, room));
    }
    if let Some(anchor) = anchor {
        in_parts(&|batch| take_back_keys(batch, room, anchor))?;
        for servers in members::list_staged(&store.view(), room, anchor)?.chunks(SERVERS_MAX) {
            let mut batch = store.batch(guard);
            for server in servers {
                members::take_back_count(&mut batch, room, server, anchor)?;
            }
            drop(store.enqueue(batch)?);
        }
    }
    if let Some((event, key)) = brings_from {
        in_parts(&|batch| forget::take_back(batch, room, event, CLEARED_AT_ONCE))?;
        in_parts(&|batch| stage::clear_keys(batch, room, key, CLEARED_AT_ONCE))?;
    }
    let mut batch = store.batch(guard);
    stage::finish(&mut batch, room);
    drop(store.enqueue(batch)?);
    Ok(())
}

/// Takes back a part of a step: its keys, and the rows of our users whom they concern. Gives `true` when none is left.
fn take_back_keys(batch: &mut Batch, room: RoomNum, anchor: Position) -> Result<bool, Fault> {
    let Some(keys) = stage::clear_part(batch, room, anchor)? else { return Ok(true) };
    for (event_type, state_key) in state::list_key_names(&*batch, room, keys)?.into_iter().flatten() {
        if event_type == MEMBER {
            members::take_back(batch, room, &state_key, anchor)?;
        }
    }
    Ok(false)
}

/// Takes back a part of a room that was never finished: its events, then its users, then the rest. Gives `true` when
/// nothing is left of it.
fn clear_new_room(batch: &mut Batch, room: RoomNum) -> Result<bool, Fault> {
    if !clear_events(batch, room)?
        || !forget::take_back(batch, room, EventNum(0), CLEARED_AT_ONCE)?
        || !members::clear_users(batch, room, CLEARED_AT_ONCE)?
    {
        return Ok(false);
    }
    if let Some(row) = schema::ROOM.get(&*batch, room)? {
        schema::ROOM_ID.delete(batch, row.id.as_str());
        schema::ROOM.delete(batch, room);
    }
    graph::clear(batch, room);
    relations::clear(batch, room);
    members::clear_counts(batch, room);
    stage::clear_all(batch, room);
    Ok(true)
}

/// Takes back some events of a room that was never finished, with their entries in the log. Gives `true` when none are
/// left.
fn clear_events(batch: &mut Batch, room: RoomNum) -> Result<bool, Fault> {
    let rows: Vec<(Order, EventRow)> = schema::TIMELINE
        .prefix::<(RoomNum,)>(&*batch, (room,), Direction::Down)?
        .take(CLEARED_AT_ONCE)
        .map(|row| row.map(|((_, order), row)| (order, row)))
        .collect::<Result<_, _>>()?;
    for (order, row) in &rows {
        let event = row.header.event;
        schema::EVENT_ID.delete(batch, &row.header.key);
        schema::PLACE.delete(batch, (room, event));
        schema::TIMELINE.delete(batch, (room, *order));
        batch.forget_staged(order.anchor, &LogEntry::Event { room, event })?;
    }
    Ok(rows.is_empty())
}
