//! The store's own facts: layout, newest position, incarnations.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::{
    ids::Position,
    store::{
        Direction, Engine, Fault, Snapshot,
        engine::Change,
        key::{Encoder, Value},
        migrate, tables,
    },
};

const POSITION: &str = "position";
const BATCH: &str = "batch";
const LAYOUT: &str = "layout";
/// Positions up to this one may have been given out without being synced.
const RESERVED: &str = "reserved";

/// The layout this code writes. `docs/architecture.md` says how it changes.
pub(crate) const LAYOUT_NOW: u64 = 1;

/// With `durability = "os"`, so many positions are reserved at a time.
const RESERVED_AT_ONCE: u64 = 1 << 20;

/// What is read when the store is opened.
pub(crate) struct Head {
    pub(crate) snapshot: Snapshot,
    pub(crate) incarnations: Incarnations,
    pub(crate) reserved: Reserved,
}

/// Reads the head; writes it where the store is new, brings it to the newest layout where that is an older one.
pub(crate) fn open(engine: &Engine) -> Result<Head, Fault> {
    migrate::run_all(engine)?;
    let mut snapshot = read(engine)?;
    let incarnations = Incarnations::read(&snapshot)?;
    let reserved = tables::HEAD.get(&snapshot, RESERVED)?.unwrap_or(0);
    snapshot.position = snapshot
        .position
        .max(Position::first_of_incarnation(incarnations.current()))
        // What lies below may have been seen by clients before a power cut took it.
        .max(Position::new(reserved).unwrap_or_default());
    Ok(Head { snapshot, incarnations, reserved: Reserved(AtomicU64::new(reserved)) })
}

/// What is written now, before anything of it is known.
pub(crate) fn bare(engine: &Engine) -> Snapshot {
    Snapshot::new(engine.snapshot(), Position::ZERO, 0, Arc::default())
}

/// The layout of a store; none when nothing was ever written.
pub(crate) fn find_layout(read: &Snapshot) -> Result<Option<u64>, Fault> {
    tables::HEAD.get(read, LAYOUT)
}

/// The row that says of which layout the store is.
pub(crate) fn layout_row(layout: u64) -> Change {
    row(LAYOUT, layout)
}

/// The first rows of a store.
pub(crate) fn rows_of_new_store(layout: u64) -> [Change; 2] {
    [row(LAYOUT, layout), incarnation_row(0, Position::ZERO)]
}

/// What is written now, with its position.
pub(crate) fn read(engine: &Engine) -> Result<Snapshot, Fault> {
    let mut bare = bare(engine);
    let position = tables::HEAD.get(&bare, POSITION)?.unwrap_or(0);
    let position = Position::new(position).ok_or(Fault::Corrupt("its position is too high"))?;
    let batch_number = tables::HEAD.get(&bare, BATCH)?.unwrap_or(0);
    bare.position = position;
    bare.batch_number = batch_number;
    Ok(bare)
}

/// Whether a fact of this name may be this number, in a store that is open and has this snapshot.
pub(crate) fn may_be(snapshot: &Snapshot, name: &str, number: u64) -> bool {
    match name {
        // Positions are skipped when a store is opened, and its row follows with the next flush.
        POSITION => number <= snapshot.position.number(),
        BATCH => number == snapshot.batch_number,
        LAYOUT => number == LAYOUT_NOW,
        _ => true,
    }
}

/// The rows that every flush writes.
pub(crate) fn rows(position: Position, batch: u64) -> Vec<Change> {
    vec![row(POSITION, position.number()), row(BATCH, batch)]
}

fn row(name: &str, number: u64) -> Change {
    let mut value = Encoder::default();
    Value::encode(&number, &mut value);
    let key = tables::HEAD.key_bytes::<String>(name).bytes;
    Change::Row(tables::HEAD.family, key.into(), Some(value.bytes.into()))
}

fn incarnation_row(incarnation: u16, ended: Position) -> Change {
    let mut value = Encoder::default();
    Value::encode(&ended, &mut value);
    let key = tables::INCARNATION.key_bytes::<u16>(incarnation).bytes;
    Change::Row(tables::INCARNATION.family, key.into(), Some(value.bytes.into()))
}

/// Without a sync, a power cut may take positions that clients have seen, and they must not be given out twice:
/// all up to a reserved one are skipped when the store is opened again. Nothing is reserved while every commit is synced.
pub(crate) struct Reserved(AtomicU64);

impl Reserved {
    /// Whether the write that brings this position must be synced, for it reserves more.
    pub(crate) fn reserve(&self, position: Position, rows: &mut Vec<Change>) -> bool {
        if position.number() < self.0.load(Ordering::Acquire) {
            return false;
        }
        let upto = position.plus(RESERVED_AT_ONCE).number();
        rows.push(row(RESERVED, upto));
        self.0.store(upto, Ordering::Release);
        true
    }
}

/// The lives of the store: a restore begins a new one, whose positions lie above all of the earlier ones.
pub(crate) struct Incarnations {
    /// (the incarnation, where the one that was restored ended), oldest first.
    begun: Vec<(u16, Position)>,
}

impl Incarnations {
    pub(crate) fn read(snapshot: &Snapshot) -> Result<Self, Fault> {
        let begun =
            tables::INCARNATION.prefix::<()>(snapshot, (), Direction::Up)?.collect::<Result<_, _>>()?;
        Ok(Self { begun })
    }

    pub(crate) fn current(&self) -> u16 {
        self.begun.last().map_or(0, |(incarnation, _)| *incarnation)
    }

    /// Where a reader at `position` stands: at most where the history it has seen was left for another.
    pub(crate) fn clamp(&self, position: Position) -> Position {
        let later = |(incarnation, _): &&(u16, Position)| u64::from(*incarnation) > position.incarnation();
        // Each restore may have gone back further than the one before.
        let ends = self.begun.iter().filter(later).map(|(_, ended)| *ended);
        ends.fold(position, Position::min)
    }
}

/// The rows that begin a new incarnation, above `lived` ones, over what `snapshot` holds.
pub(crate) fn rows_of_new_incarnation(snapshot: &Snapshot, lived: u16) -> Result<Vec<Change>, Fault> {
    let incarnation = lived.checked_add(1).filter(|incarnation| *incarnation < INCARNATIONS_MAX);
    let incarnation =
        incarnation.ok_or(Fault::Closed("it was restored too often: no incarnation is left"))?;
    let first = Position::first_of_incarnation(incarnation);
    Ok(vec![incarnation_row(incarnation, snapshot.position), row(POSITION, first.number())])
}

/// Positions have nine bits for the incarnation.
const INCARNATIONS_MAX: u16 = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_clamped_to_where_its_history_was_left() {
        let at = |incarnation: u16, offset: u64| Position::first_of_incarnation(incarnation).plus(offset);
        // The first life ended at 100; the second was left at its 50th position; then the backup of 80 was restored.
        let lives = Incarnations {
            begun: vec![(0, Position::ZERO), (1, at(0, 100)), (2, at(1, 50)), (4, at(0, 80))],
        };
        assert_eq!(lives.clamp(at(0, 70)), at(0, 70));
        assert_eq!(lives.clamp(at(0, 90)), at(0, 80));
        assert_eq!(lives.clamp(at(1, 90)), at(0, 80));
        assert_eq!(lives.clamp(at(3, 1)), at(0, 80));
        assert_eq!(lives.clamp(at(4, 7)), at(4, 7));
        assert_eq!(lives.current(), 4);
    }
}
