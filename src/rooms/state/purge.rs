//! Forgets the states below an order, in parts; states at or above it are never touched.

use std::{collections::BTreeSet, ops::Bound};

use super::{canonical, compare::diff, side::Chain};
use crate::{
    ids::{Order, RoomNum, SideNum},
    schema::{
        self,
        state::{LogRow, PurgeRow, SideRow, StateRef},
    },
    store::{Batch, Direction, Fault, Read},
};

/// End a part once it has this many bytes: a side state that is expressed anew may take a quarter of a batch.
const PART_BYTES: usize = 512 << 10;

/// The progress of a purge. A row of its room says from the first part to the last that it is under way, so that one which was
/// interrupted is found again ([`Purge::find`]). It begins anew then, because the part that is done costs little the second time.
#[derive(Debug, Clone)]
pub struct Purge {
    below: Order,
    stage: Stage,
    /// The side states that a kept one stands on, so that they stay.
    needed: BTreeSet<SideNum>,
}

#[derive(Debug, Clone)]
enum Stage {
    Sides(SideNum),
    Holes,
    Steps,
    Done,
}

impl Purge {
    /// Begins to forget the states of a room below `below`; the state at `below` stays known.
    pub fn new(below: Order) -> Self {
        Self { below, stage: Stage::Sides(SideNum(u32::MAX)), needed: BTreeSet::new() }
    }

    /// Finds the purge of a room that was begun and is not done.
    pub fn find(read: &(impl Read + ?Sized), room: RoomNum) -> Result<Option<Self>, Fault> {
        Ok(schema::PURGE.get(read, room)?.map(|row| Self::new(row.below)))
    }

    /// Whether there is nothing left to do.
    pub fn is_done(&self) -> bool {
        matches!(self.stage, Stage::Done)
    }

    /// Does the next part, of about `rows_max` rows. `is_kept` tells which side states are named by an event that is
    /// kept; those that differ from a place below are made to differ from the place at `below`.
    pub fn step(
        &mut self,
        batch: &mut Batch,
        room: RoomNum,
        is_kept: impl Fn(SideNum) -> bool,
        rows_max: usize,
    ) -> Result<(), Fault> {
        let StateRef::Main(order) = canonical(batch, room, StateRef::Main(self.below))? else {
            return Ok(());
        };
        if order == Order::MIN {
            self.stage = Stage::Done;
        }
        self.stage = match self.stage {
            Stage::Sides(from) => self.sides(batch, room, order, from, is_kept, rows_max)?,
            Stage::Holes => holes(batch, room, self.below, rows_max)?,
            Stage::Steps => steps(batch, room, order, rows_max)?,
            Stage::Done => Stage::Done,
        };
        if self.is_done() {
            schema::PURGE.delete(batch, room);
        } else {
            schema::PURGE.put(batch, room, &PurgeRow { below: self.below });
        }
        Ok(())
    }

    /// Purges side states from the newest down, so that those which stand on another are seen before it.
    fn sides(
        &mut self,
        batch: &mut Batch,
        room: RoomNum,
        order: Order,
        from: SideNum,
        is_kept: impl Fn(SideNum) -> bool,
        rows_max: usize,
    ) -> Result<Stage, Fault> {
        let part: Vec<(SideNum, SideRow)> = {
            let (low, high) = (Bound::Included((room, SideNum(0))), Bound::Included((room, from)));
            let rows = schema::SIDE.range::<(RoomNum, SideNum)>(&*batch, low, high, Direction::Down)?;
            // A side state may take many bytes, so that only a few are read at a time.
            rows.take(rows_max.min(64))
                .map(|row| row.map(|((_, side), row)| (side, row)))
                .collect::<Result<_, _>>()?
        };
        for (side, row) in &part {
            if batch.byte_count() > PART_BYTES {
                return Ok(Stage::Sides(*side));
            }
            if !is_kept(*side) && !self.needed.contains(side) {
                schema::SIDE.delete(batch, (room, *side));
                continue;
            }
            let chain = Chain::read(&*batch, room, row.base)?;
            if chain.base < order {
                let differing = diff(&*batch, room, StateRef::Main(order), StateRef::Side(*side))?;
                let entries = differing.into_iter().map(|(key, _, val)| (key, val));
                schema::SIDE.put(batch, (room, *side), &SideRow::new(StateRef::Main(order), 1, entries));
            } else if let StateRef::Side(base) = row.base {
                self.needed.insert(base);
            }
        }
        Ok(match part.last() {
            Some((SideNum(last), _)) if *last > 0 => Stage::Sides(SideNum(last - 1)),
            _ => Stage::Holes,
        })
    }
}

/// Forgets the holes whose missing events lie below `below`, because nothing is filled in there any more. Their markers go
/// next. The event above a hole may change no state, so the order that was asked for counts, and not the change to which it
/// is rounded down.
fn holes(batch: &mut Batch, room: RoomNum, below: Order, rows_max: usize) -> Result<Stage, Fault> {
    let holes: Vec<Order> = {
        let (low, high) = (Bound::Included((room, Order::MIN)), Bound::Included((room, below)));
        let rows = schema::HOLE.range::<(RoomNum, Order)>(&*batch, low, high, Direction::Up)?;
        rows.take(rows_max).map(|row| row.map(|((_, at), _)| at)).collect::<Result<_, _>>()?
    };
    for at in &holes {
        schema::HOLE.delete(batch, (room, *at));
    }
    Ok(if holes.len() < rows_max { Stage::Steps } else { Stage::Holes })
}

/// Forgets the oldest steps, each with the values before it, so that whatever is left is whole: a state that can still be
/// read is right. The row at the order itself stays as a marker, because references are rounded down to it.
fn steps(batch: &mut Batch, room: RoomNum, order: Order, rows_max: usize) -> Result<Stage, Fault> {
    let mut left = rows_max.max(1);
    while left > 0 {
        let oldest = {
            let (low, high) = (Bound::Included((room, Order::MIN)), Bound::Included((room, order)));
            let mut rows = schema::STATE_LOG.range::<(RoomNum, Order)>(&*batch, low, high, Direction::Up)?;
            rows.next().transpose()?
        };
        let Some(((_, at), LogRow { count, mut changes })) = oldest else { return Ok(Stage::Done) };
        let kept = changes.split_off(changes.len().min(left));
        left = left.saturating_sub(changes.len() + 1);
        for (key, _) in changes {
            schema::STATE_UNDO.delete(batch, (room, key, at));
        }
        let is_last = kept.is_empty() && at == order;
        if kept.is_empty() && !is_last {
            schema::STATE_LOG.delete(batch, (room, at));
        } else {
            schema::STATE_LOG.put(batch, (room, at), &LogRow { count, changes: kept });
        }
        if is_last {
            return Ok(Stage::Done);
        }
    }
    Ok(Stage::Steps)
}
