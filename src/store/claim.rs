//! Positions are claimed here, and nowhere else: each with its entry in the log.

use crate::{
    ids::Position,
    store::{Batch, Fault, LogEntry, tables},
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

    /// Deletes the log's entry of a staged step that comes to nothing, unless the position was given out to another entry
    /// meanwhile.
    pub fn forget_staged(&mut self, position: Position, entry: &LogEntry) -> Result<(), Fault> {
        if tables::LOG.get(&*self, position)? == Some(*entry) {
            tables::LOG.delete(self, position);
        }
        Ok(())
    }
}
