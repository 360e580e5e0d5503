//! Positions are claimed here, and nowhere else: each with its entry in the log.

use crate::{
    ids::Position,
    store::{Batch, LogEntry, tables},
};

impl Batch {
    /// Claims the next position for this entry and writes it to the log.
    pub fn position(&mut self, entry: &LogEntry) -> Position {
        debug_assert!(self.jump_to.is_none(), "a batch that begins an incarnation claims no position");
        let position = Position::pending(self.positions);
        self.positions += 1;
        tables::LOG.put(self, position, entry);
        position
    }

    /// Deletes the log's entries of a staged step that comes to nothing.
    pub fn forget_staged(&mut self, from: Position, below: Position) {
        let bytes = |position| tables::LOG.key_bytes::<Position>(position).bytes;
        self.writes.delete_between(tables::LOG.family, bytes(from), bytes(below));
    }
}
