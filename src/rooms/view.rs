//! A room as one answer reads it.

use crate::{ids::RoomNum, schema::rooms::RoomRow};

/// From where a room is read, which one, and its row: what functions that show events hand to one another unchanged.
#[derive(Debug)]
pub struct RoomView<'a, R: ?Sized> {
    /// The snapshot, or the batch that is being built.
    pub read: &'a R,
    /// The room's number.
    pub num: RoomNum,
    /// The room's row.
    pub row: &'a RoomRow,
}

// Not derived: what is read from need not be copied with it.
impl<R: ?Sized> Clone for RoomView<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R: ?Sized> Copy for RoomView<'_, R> {}
