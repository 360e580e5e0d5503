//! A room as one answer reads it.

use crate::{ids::RoomNum, schema::rooms::RoomRow};

/// The source from which a room is read, its number and its row, which functions that show events hand to one another
/// unchanged.
#[derive(Debug)]
pub struct RoomView<'a, R: ?Sized> {
    /// The snapshot, or the batch that is being built.
    pub read: &'a R,
    /// The number of the room that is read.
    pub num: RoomNum,
    /// The room's row, as `read` has it.
    pub row: &'a RoomRow,
}

// Deriving would demand that `R` is copied, too.
impl<R: ?Sized> Clone for RoomView<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R: ?Sized> Copy for RoomView<'_, R> {}
