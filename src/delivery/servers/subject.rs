//! The parts of this server of which others may miss news, so that they are marked for them.

use crate::ids::{RoomNum, UserNum};

/// A part of this server whose changes must reach other servers in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Subject {
    /// The device list of a user of ours.
    Devices(UserNum),
    /// The events of a room.
    Room(RoomNum),
}

impl Subject {
    /// The first of all subjects in their order.
    pub(super) const FIRST: Self = Self::Devices(UserNum(0));
}
