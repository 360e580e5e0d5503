//! The store's own facts: its layout, its newest position and batch number, its incarnations.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::{
    config::Durability,
    ids::Position,
    store::{
        Batch, Direction, Engine, Fault, Read, Snapshot,
        engine::Change,
        key::{Encoder, Value},
        tables,
    },
};

const POSITION: &str = "position";
const BATCH: &str = "batch";
const LAYOUT: &str = "layout";
/// Positions up to this one may have been given out without being synced.
const RESERVED: &str = "reserved";
/// Batch numbers up to this one may have been given out without being synced.
const RESERVED_BATCHES: &str = "reserved_batches";

/// The layout this code writes. `docs/architecture.md` says how it changes.
pub(crate) const LAYOUT_NOW: u64 = 5;

/// This many positions, or batch numbers, are reserved at a time.
pub(crate) const RESERVED_AT_ONCE: u64 = 1 << 20;

/// The facts that are read when the store is opened.
pub(crate) struct Head {
    /// The layout of the store; none where nothing was ever written.
    pub(crate) layout: Option<u64>,
    pub(crate) snapshot: Snapshot,
    pub(crate) incarnations: Incarnations,
    pub(crate) reserved: Reserved,
}

/// Reads the head. Positions and batch numbers go on above all that may have been given out before a power cut.
pub(crate) fn open(engine: &Engine) -> Result<Head, Fault> {
    let mut snapshot = read(engine)?;
    let layout = tables::HEAD.get(&snapshot, LAYOUT)?;
    let incarnations = Incarnations::read(&snapshot)?;
    let reserved = |name: &str| Ok::<_, Fault>(tables::HEAD.get(&snapshot, name)?.unwrap_or(0));
    let (positions, batches) = (reserved(RESERVED)?, reserved(RESERVED_BATCHES)?);
    snapshot.position = snapshot
        .position
        .max(Position::first_of_incarnation(incarnations.current()))
        .max(Position::new(positions).unwrap_or_default());
    snapshot.batch_number = snapshot.batch_number.max(batches);
    Ok(Head { layout, snapshot, incarnations, reserved: Reserved::upto(positions, batches) })
}

/// The layout that the store has.
pub(crate) fn layout(read: &(impl Read + ?Sized)) -> Result<u64, Fault> {
    Ok(tables::HEAD.get(read, LAYOUT)?.unwrap_or(LAYOUT_NOW))
}

/// Writes this as the layout of the store.
pub(crate) fn put_layout(batch: &mut Batch, layout: u64) {
    tables::HEAD.put(batch, LAYOUT, &layout);
}

/// Writes what a new store begins with.
pub(crate) fn put_new_store(batch: &mut Batch) {
    put_layout(batch, LAYOUT_NOW);
    tables::INCARNATION.put(batch, 0, &Position::ZERO);
}

/// A snapshot of what is written now, with its position and the number of its last batch.
pub(crate) fn read(engine: &Engine) -> Result<Snapshot, Fault> {
    let mut snapshot = Snapshot::new(engine.snapshot(), Position::ZERO, 0, Arc::default());
    let position = tables::HEAD.get(&snapshot, POSITION)?.unwrap_or(0);
    let position = Position::new(position).ok_or(Fault::Corrupt("the newest position is not below 2^53"))?;
    let batch_number = tables::HEAD.get(&snapshot, BATCH)?.unwrap_or(0);
    snapshot.position = position;
    snapshot.batch_number = batch_number;
    Ok(snapshot)
}

/// Whether a fact of this name may be this number, in a store that is open and has this snapshot.
pub(crate) fn may_be(snapshot: &Snapshot, name: &str, number: u64) -> bool {
    match name {
        // Positions are skipped when a store is opened, and its row follows with the next flush.
        POSITION => number <= snapshot.position.number(),
        BATCH => number <= snapshot.batch_number,
        LAYOUT => number == LAYOUT_NOW,
        _ => true,
    }
}

/// The rows that every flush writes: they say which batch it ends with.
pub(crate) fn rows(position: Position, batch: u64) -> Vec<Change> {
    vec![row(POSITION, position.number()), row(BATCH, batch)]
}

fn row(name: &str, number: u64) -> Change {
    let mut value = Encoder::default();
    Value::encode(&number, &mut value);
    let key = tables::HEAD.key_bytes::<String>(name).bytes;
    Change::Row(tables::HEAD.family, key.into(), Some(value.bytes.into()))
}

/// A power cut may take what was not synced, and with it numbers that somebody has seen: positions in tokens of clients, batch
/// numbers in another node. They must not be given out twice with another meaning, so they are reserved ahead, and a store that
/// is opened again skips all that are reserved. Positions are reserved only where commits are not synced; batch numbers always,
/// because notes never are.
pub(crate) struct Reserved {
    positions: AtomicU64,
    batches: AtomicU64,
}

impl Reserved {
    fn upto(positions: u64, batches: u64) -> Self {
        Self { positions: AtomicU64::new(positions), batches: AtomicU64::new(batches) }
    }

    /// Whether the write that brings this position and this batch must be synced, because it reserves more.
    pub(crate) fn reserve(
        &self,
        durability: Durability,
        position: Position,
        batch: u64,
        rows: &mut Vec<Change>,
    ) -> bool {
        let mut reserves = more(&self.batches, RESERVED_BATCHES, batch, rows);
        if durability == Durability::Os {
            reserves |= more(&self.positions, RESERVED, position.number(), rows);
        }
        reserves
    }
}

/// Reserves more numbers where this one is not below those that are.
fn more(reserved: &AtomicU64, name: &str, number: u64, rows: &mut Vec<Change>) -> bool {
    if number < reserved.load(Ordering::Acquire) {
        return false;
    }
    let upto = number.saturating_add(RESERVED_AT_ONCE);
    rows.push(row(name, upto));
    reserved.store(upto, Ordering::Release);
    true
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

/// The incarnation after these lives.
pub(crate) fn next_incarnation(lived: u16) -> Result<u16, Fault> {
    let next = lived.checked_add(1).filter(|incarnation| *incarnation < INCARNATIONS_MAX);
    next.ok_or(Fault::Closed("it was restored too often: no incarnation is left"))
}

/// Writes that an incarnation begins, and where the history that it continues ended.
pub(crate) fn put_incarnation(batch: &mut Batch, incarnation: u16, ended: Position) {
    tables::INCARNATION.put(batch, incarnation, &ended);
}

/// Positions have nine bits for the incarnation.
const INCARNATIONS_MAX: u16 = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_clamped_to_where_its_history_was_left() {
        let at = |incarnation: u16, offset: u64| Position::first_of_incarnation(incarnation).plus(offset);
        // The first life ended at 100, and the second was left at its 50th position; then the backup that ends at 80 was restored.
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
