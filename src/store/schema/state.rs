//! Rows of the versioned state map (`rooms/state.rs` explains the layout).

use crate::ids::{EventNum, Order, Position, SideNum};

/// The state of a room at some point: equal states have equal references.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ref {
    /// The main line, up to and including this order.
    Main(Order),
    /// A side state of a fork.
    Side(SideNum),
}

impl Ref {
    /// The settled reference, once the batch's first position is known.
    #[must_use]
    pub fn settle(self, base: Position) -> Self {
        match self {
            Self::Main(order) => Self::Main(order.settle(base)),
            Self::Side(side) => Self::Side(side),
        }
    }
}

/// What a state key maps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Val {
    /// This event.
    Event(EventNum),
    /// Nothing.
    Absent,
    /// Not known yet: the room was joined with part of its state.
    Unknown,
}
