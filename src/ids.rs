//! Numbers that name things inside this server. Each is a type of its own, so they cannot be mixed up.
//!
//! A [`Position`] says when we stored something, an [`Order`] where an event stands in its room.
//! Matrix's own identifiers (`@user:server`, `$event`) come from ruma.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The bit that marks a position of a batch that is not enqueued yet; the rest is the entry's index in its batch.
const PENDING: u64 = 1 << 63;

/// Bits of a position below the incarnation of the store.
const INCARNATION_SHIFT: u32 = 44;

/// When we stored something: a place in the server's one log. Below 2^53, so that JSON can carry it.
///
/// While a batch is being built its positions are *pending*: they sort above every settled position, in the
/// order in which they were claimed, and become settled when the store accepts the batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position(u64);

impl Position {
    /// Lies before every position that is given out.
    pub const ZERO: Self = Self(0);
    /// Lies above everything that can be stored, pending positions included.
    pub const MAX: Self = Self(u64::MAX);

    /// The position with this number. Numbers of 2^53 and above are not positions: `None`.
    pub fn new(number: u64) -> Option<Self> {
        (number < (1 << 53)).then_some(Self(number))
    }

    /// The first position of an incarnation (a store begins a new one at each restore). At most 511.
    pub(crate) fn first_of_incarnation(incarnation: u16) -> Self {
        Self(u64::from(incarnation) << INCARNATION_SHIFT)
    }

    /// The incarnation that a settled position belongs to.
    pub fn incarnation(self) -> u64 {
        self.0 >> INCARNATION_SHIFT
    }

    pub(crate) fn pending(index: u32) -> Self {
        Self(PENDING | u64::from(index))
    }

    pub(crate) fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub(crate) fn is_pending(self) -> bool {
        self.0 & PENDING != 0 && self != Self::MAX
    }

    /// The settled position, once the batch's first position is known. Settled positions stay as they are.
    #[must_use]
    pub fn settle(self, base: Position) -> Self {
        if !self.is_pending() {
            return self;
        }
        let settled = Self(base.0 + (self.0 & !PENDING));
        debug_assert!(!settled.is_pending() && Self::new(settled.0).is_some(), "a position is above 2^53");
        settled
    }

    /// The number, as tokens and rows carry it.
    pub fn number(self) -> u64 {
        self.0
    }

    /// The position that lies `count` after this one.
    #[must_use]
    pub fn plus(self, count: u64) -> Self {
        Self(self.0.saturating_add(count))
    }

    /// The position just before, or zero.
    #[must_use]
    pub fn before(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Where an event stands in its room. Live events have (own position, 0); what fills a hole later has
/// (the position reserved for the hole, falling minors). Timelines, state versions, receipts and pagination
/// speak of orders; tokens of `/sync` speak of positions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Order {
    /// The position of the live event, or the position reserved for a hole.
    pub anchor: Position,
    /// 0 for live events, below 0 for what fills the hole under the anchor.
    pub minor: i32,
}

impl Order {
    /// Lies below everything in a room.
    pub const MIN: Self = Self { anchor: Position::ZERO, minor: i32::MIN };
    /// Lies above everything in a room.
    pub const MAX: Self = Self { anchor: Position::MAX, minor: i32::MAX };

    /// The order of a live event.
    pub fn live(position: Position) -> Self {
        Self { anchor: position, minor: 0 }
    }

    /// The last order that a reader at `position` may see: everything stored live at or before it.
    pub fn upto(position: Position) -> Self {
        Self { anchor: position, minor: i32::MAX }
    }

    /// The next higher order; [`Order::MAX`] is its own successor.
    #[must_use]
    pub fn next(self) -> Self {
        match self.minor.checked_add(1) {
            Some(minor) => Self { anchor: self.anchor, minor },
            None if self.anchor == Position::MAX => self,
            None => Self { anchor: self.anchor.plus(1), minor: i32::MIN },
        }
    }

    /// The next lower order; [`Order::MIN`] is its own predecessor.
    #[must_use]
    pub fn before(self) -> Self {
        match self.minor.checked_sub(1) {
            Some(minor) => Self { anchor: self.anchor, minor },
            None if self.anchor == Position::ZERO => self,
            None => Self { anchor: self.anchor.before(), minor: i32::MAX },
        }
    }

    /// The settled order, once the batch's first position is known.
    #[must_use]
    pub fn settle(self, base: Position) -> Self {
        Self { anchor: self.anchor.settle(base), minor: self.minor }
    }
}

macro_rules! numbers {
    ($($(#[$doc:meta])* $name:ident($inner:ty);)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    )*};
}

numbers! {
    /// A room on this server. The high 8 bits name the shard that owns it (0 on a single machine).
    RoomNum(u64);
    /// An account of this server. The high 8 bits name the shard that owns it (0 on a single machine).
    UserNum(u64);
    /// A device of an account, counted from 1 for each account and never given twice: a device that was logged out and
    /// comes back under its old id is another one, so nothing of the old one (transaction ids, inbox) clings to it.
    /// 0 stands for no device.
    DeviceNum(u32);
    /// An event inside its room, in the order in which the room stored them. Below 2^40.
    EventNum(u64);
    /// A (type, state key) pair inside its room.
    StateKeyNum(u32);
    /// A side state inside its room: the state of a fork that differs from the main line.
    SideNum(u32);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pending_positions_sort_above_settled_ones_and_settle_in_order() {
        let settled = Position::new((1 << 53) - 1).unwrap();
        let (a, b) = (Position::pending(0), Position::pending(1));
        assert!(settled < a && a < b && b < Position::MAX);
        let base = Position::new(1000).unwrap();
        assert_eq!(a.settle(base).number(), 1000);
        assert_eq!(b.settle(base).number(), 1001);
        assert_eq!(settled.settle(base), settled);
        assert_eq!(Position::MAX.settle(base), Position::MAX);
    }

    #[test]
    fn positions_stay_below_two_to_the_53() {
        assert!(Position::new(1 << 53).is_none());
        assert!(Position::first_of_incarnation(511).number() < 1 << 53);
    }

    #[test]
    fn the_next_order_is_the_smallest_above() {
        let o = Order::live(Position::new(7).unwrap());
        assert_eq!(o.next(), Order { anchor: o.anchor, minor: 1 });
        assert_eq!(Order::upto(o.anchor).next().anchor.number(), 8);
        assert_eq!(Order::MAX.next(), Order::MAX);
    }
}
