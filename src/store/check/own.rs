//! Checks of the tables of the store itself: the log and its head, incarnations, cursors.

use std::ops::Bound;

use crate::{
    ids::Position,
    store::{
        Direction, Fault, Snapshot,
        check::{Doubts, RowCheck},
        head, tables,
    },
};

/// The checks of the store's own tables.
pub fn checks() -> Vec<RowCheck> {
    vec![
        RowCheck::of(&tables::HEAD, |read, name, number, doubts| {
            doubts.unless(
                head::may_be(read, name, *number),
                format!("its number {number} is impossible in this store"),
            );
            let has_first = tables::INCARNATION.contains(read, 0)?;
            doubts.unless(has_first, "the store has no first incarnation");
            Ok(())
        }),
        RowCheck::of(&tables::INCARNATION, incarnation),
        RowCheck::of(&tables::CURSOR, |read, _, position, doubts| {
            doubts.position(read, *position);
            Ok(())
        }),
        RowCheck::of(&tables::LOG_TRIMMED, |read, (), position, doubts| {
            doubts.position(read, *position);
            Ok(())
        }),
        RowCheck::of(&tables::LOG_TIME, |read, _, position, doubts| {
            doubts.position(read, *position);
            Ok(())
        }),
    ]
}

fn incarnation(
    read: &Snapshot,
    incarnation: &u16,
    ended: &Position,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    doubts.position(read, *ended);
    if *incarnation > 0 {
        let first = Position::first_of_incarnation(*incarnation);
        doubts.unless(
            *ended < first,
            format!("it continues a history that ends at {ended}, which is one of its own positions"),
        );
        doubts.unless(first <= read.position, "the store has no position of this incarnation");
        let below = Bound::Excluded(*incarnation);
        let mut before = tables::INCARNATION.range::<u16>(read, Bound::Unbounded, below, Direction::Down)?;
        doubts.unless(before.next().is_some(), "the store has no earlier incarnation");
    }
    Ok(())
}
