//! Durable cursors: how far each reader of the log has come. Moving one is a note, so it wakes nobody and waits for no
//! fsync; a crash may lose the last moves, and what was read since is read again.

use crate::{
    ids::Position,
    store::{Direction, Fault, Read, Write, tables},
};

/// The position up to which the reader of this name has come; none before its first note.
pub fn find(read: &(impl Read + ?Sized), reader: &str) -> Result<Option<Position>, Fault> {
    // A crash may lose batches and keep the note, so a cursor is never taken to lie ahead of what is there.
    Ok(tables::CURSOR.get(read, reader)?.map(|position| position.min(read.upto())))
}

/// Notes that the reader has dealt with everything at or before this position.
pub fn advance(to: &mut impl Write, reader: &str, position: Position) {
    debug_assert!(!position.is_pending(), "a reader cannot have read what is not accepted");
    tables::CURSOR.put(to, reader, &position);
}

/// Deletes the cursor of a reader that is no more, so that it holds the log back no longer.
pub fn remove(to: &mut impl Write, reader: &str) {
    tables::CURSOR.delete(to, reader);
}

/// Lists all readers by name, with their positions.
pub fn list(read: &(impl Read + ?Sized)) -> Result<Vec<(String, Position)>, Fault> {
    tables::CURSOR.prefix::<()>(read, (), Direction::Up)?.collect()
}

/// The position of the slowest reader; none when there is no reader.
pub fn slowest(read: &(impl Read + ?Sized)) -> Result<Option<Position>, Fault> {
    Ok(list(read)?.into_iter().map(|(_, position)| position).min())
}
