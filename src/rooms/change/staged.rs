//! Changes that are larger than a batch: they are written in parts that count from the change's last batch on
//! (`state/stage.rs`). A change that turns thousands of keys of a room's state, and a room that begins with hundreds of
//! invitations, are such.

use std::mem;

use super::Change;
use crate::{
    error::{Error, Result},
    ids::{EventNum, Order, Position, RoomNum, StateKeyNum, UserNum},
    rooms::{
        graph, members,
        state::{self, stage},
    },
    schema,
    schema::{
        rooms::{EventRow, Membership, Resident, RoomRow, UserRoomRow},
        state::{StageRow, StateRef, StateValue},
    },
    store::{Batch, Direction, Fault, Guard, NotAccepted, Store},
};

/// A step of the main line that changes more keys than this is staged. Tests use a small bound to reach it.
pub(super) const KEYS_MAX: usize = if cfg!(test) { 25 } else { 1_000 };
/// A side state of more entries than this is written in parts of this many.
const SIDE_PART: usize = state::SIDE_ENTRIES_MAX;
/// Write out the rows of a new room once its batch has this many, so that the rows of one more event still fit.
const CUT_ROWS: usize = 2_000;
/// Write them out, too, once they have this many bytes.
const CUT_BYTES: usize = 512 << 10;

/// Clear a room that was never finished by this many events at a time, so that each batch stays small.
const CLEARED_AT_ONCE: usize = 500;

/// A user's membership before and after the change, and the event that changed it.
pub(super) struct Moved {
    pub(super) was: Membership,
    pub(super) is: Membership,
    pub(super) by: EventNum,
}

/// A staged step, of which this change is the last batch.
#[derive(Debug)]
pub(super) struct Staged {
    /// The position that is reserved for the whole step.
    anchor: Position,
    /// The number of positions that the step's parts have claimed.
    claimed: u64,
    /// Rows that users look at first: they are written with the last batch, so that nobody finds the room before.
    users: Vec<(UserNum, UserRoomRow)>,
}

impl Change {
    /// Whether nothing that this change has done so far touches the room's state, so that a step may be staged.
    pub(super) fn may_stage(&self) -> bool {
        self.added().is_empty() && self.stage.is_none()
    }

    /// Stages a step of the main line: these keys (each once, and no derived ones) get these values. Gives the place
    /// that the main line has then; it counts when this change is accepted.
    pub(super) fn stage_state(&mut self, changes: &[(StateKeyNum, StateValue)]) -> Result<StateRef> {
        debug_assert!(self.may_stage(), "a step is staged before anything else changes the state");
        let anchor = self.store.ahead();
        // The tip remembers the state before the step. Without a tip, the next change looks for a step that was not
        // finished.
        self.seat.tip = None;
        let mut last = self.row.state_tip;
        for (number, part) in changes.chunks(stage::PART_KEYS_MAX).enumerate() {
            let mut batch = self.batch.another();
            stage::begin(&mut batch, self.num, anchor, false);
            let number = u32::try_from(number).map_err(|_| Error::broken("a step has too many parts"))?;
            last = stage::put_part(&mut batch, self.num, anchor, number, part)?;
            batch.stage_at(anchor);
            drop(self.store.enqueue(batch)?);
        }
        tracing::debug!(room = %self.num, keys = changes.len(), "a large change of a room's state is staged");
        self.row.state_tip = last;
        self.batch.begin_at(anchor);
        self.stage = Some(Staged { anchor, claimed: 0, users: Vec::new() });
        Ok(StateRef::Main(last))
    }

    /// Follows a staged step for members: rows and derived keys, from keys with their values before and after the step.
    pub(super) fn follow_members(
        &mut self,
        order: Order,
        differing: &[state::Difference],
    ) -> Result<Vec<(StateKeyNum, StateValue)>> {
        let mut touched = members::Touched::default();
        let names = state::list_key_names(&self.batch, self.num, differing.iter().map(|(key, ..)| *key))?;
        for ((_, old, new), name) in differing.iter().zip(names) {
            let Some((event_type, user)) = name else { continue };
            let Some(by) = new.event().or(old.event()).filter(|_| event_type == "m.room.member") else {
                continue;
            };
            let moved = Moved { was: self.membership_in(*old)?, is: self.membership_in(*new)?, by };
            self.move_member(order, &user, moved, &mut touched)?;
        }
        let values = touched.values(&mut self.batch, self.num, &mut self.row.next_key, self.row.joined)?;
        Ok(values)
    }

    fn membership_in(&self, val: StateValue) -> Result<Membership, Fault> {
        match val.event() {
            Some(event) => members::membership_of_event(&self.batch, self.num, event),
            None => Ok(Membership::Leave),
        }
    }

    /// Writes down all but the last part of a side state that is too large for one row, in batches of its own. Nothing
    /// names these rows until this change is accepted.
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
            drop(self.store.enqueue(batch)?);
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
        let first = self.stage.is_none();
        let mut stage = self.stage.take().unwrap_or_else(|| Staged {
            anchor: self.store.ahead(),
            claimed: 0,
            users: Vec::new(),
        });
        let base = stage.anchor.plus(stage.claimed);
        let next = self.batch.another();
        let mut part = mem::replace(&mut self.batch, next);
        let read = |fault| NotAccepted::Fault(fault);
        for (user, _) in &self.concerned {
            if let Some(row) = members::take_back(&mut part, *user, self.num).map_err(read)? {
                stage.users.retain(|(held, _)| held != user);
                let left = row.left.map(|left| left.settle(base));
                stage.users.push((*user, UserRoomRow { since: row.since.settle(base), left, ..row }));
            }
        }
        if first {
            stage::begin(&mut part, self.num, stage.anchor, true);
        }
        let unseen = RoomRow { resident: Resident::No, ..self.row.clone() };
        schema::ROOM.put(&mut part, self.num, &unseen);
        stage.claimed += u64::from(part.position_count());
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

    /// Makes the parts of a staged step count: in this batch from here on, and for everybody else once this change is
    /// accepted.
    pub(super) fn finish_state_stage(&mut self) {
        stage::finish(&mut self.batch, self.num);
    }

    /// Lets this last batch make the parts of a staged step count.
    pub(super) fn finish_stage(&mut self) {
        let Some(Staged { users, .. }) = self.stage.take() else { return };
        stage::finish(&mut self.batch, self.num);
        for (user, row) in users {
            members::put_back(&mut self.batch, user, self.num, &row);
        }
        self.put_room();
    }
}

/// Clears the rows of a room's step that was not finished.
pub(super) fn clear(store: &Store, guard: &Guard, room: RoomNum) -> Result<()> {
    let Some(StageRow { anchor, makes_room }) = stage::find(&store.view(), room)? else { return Ok(()) };
    tracing::debug!(%room, makes_room, "a staged step that was not finished is cleared");
    loop {
        let mut batch = store.batch(guard);
        let is_done = if makes_room {
            clear_new_room(&mut batch, room, anchor)?
        } else {
            stage::clear_part(&mut batch, room)?
        };
        drop(store.enqueue(batch)?);
        if is_done {
            return Ok(());
        }
    }
}

/// Takes back a part of a room that was never finished. Gives `true` when nothing is left of it.
fn clear_new_room(batch: &mut Batch, room: RoomNum, anchor: Position) -> Result<bool, Fault> {
    if !clear_events(batch, room, anchor)? {
        return Ok(false);
    }
    graph::clear(batch, room);
    members::clear(batch, room);
    stage::clear_all(batch, room);
    Ok(true)
}

/// Takes back some events of a room that was never finished, whose positions begin at `anchor`; when none are left, the
/// room itself. Gives `true` then.
fn clear_events(batch: &mut Batch, room: RoomNum, anchor: Position) -> Result<bool, Fault> {
    let rows: Vec<(Order, EventRow)> = schema::TIMELINE
        .prefix::<(RoomNum,)>(&*batch, (room,), Direction::Down)?
        .take(CLEARED_AT_ONCE)
        .map(|row| row.map(|((_, order), row)| (order, row)))
        .collect::<Result<_, _>>()?;
    for (order, row) in &rows {
        schema::EVENT_ID.delete(batch, &row.header.key);
        schema::PLACE.delete(batch, (room, row.header.event));
        schema::TIMELINE.delete(batch, (room, *order));
    }
    if !rows.is_empty() {
        return Ok(false);
    }
    if let Some(row) = schema::ROOM.get(&*batch, room)? {
        batch.forget_staged(anchor, anchor.plus(row.next_event));
        schema::ROOM_ID.delete(batch, row.id.as_str());
        schema::ROOM.delete(batch, room);
    }
    Ok(true)
}
