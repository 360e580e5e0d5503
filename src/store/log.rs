//! The log says what happened at each position. It points at content and never holds it, so that erasure can delete content.

use bytes::Bytes;

use crate::{
    ids::{EventNum, Order, Position, RoomNum, UserNum},
    store::{
        Fault,
        key::{Decoder, Encoder, Key, Value, expect_layout},
    },
};

/// An entry of the log: what happened at a position, in 22 bytes at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogEntry {
    /// A room accepted an event.
    Event {
        /// The room that accepted it.
        room: RoomNum,
        /// The number of the event in that room.
        event: EventNum,
    },
    /// A room's current state changed with no event of its own at this position.
    RoomState {
        /// The room whose state changed.
        room: RoomNum,
    },
    /// Receipts in a room moved.
    Receipts {
        /// The room of the receipts.
        room: RoomNum,
    },
    /// An account came to be or changed: profile, password, admin, deactivation.
    Account {
        /// The user who has the account.
        user: UserNum,
    },
    /// Account data of a user, global or of a room, changed; push rules are account data too.
    AccountData {
        /// The user whose account data changed.
        user: UserNum,
    },
    /// A device came, changed or went.
    Device {
        /// The user who has the device.
        user: UserNum,
    },
    /// A message waits for a device.
    ToDevice {
        /// The user who has the device.
        user: UserNum,
    },
    /// The device list or the keys of a user changed.
    DeviceList {
        /// The user who has the devices.
        user: UserNum,
    },
    /// Something of the server as a whole changed: aliases, the directory, registration tokens.
    Server,
    /// The device list or the keys of a user of another server changed.
    OtherDeviceList,
    /// A part of a hole in a room's past was filled. Nobody is told of what fills it, but whoever wants every event reads it.
    Filled {
        /// The room of the hole.
        room: RoomNum,
        /// The highest of the orders that were filled. The others are just below it.
        top: Order,
    },
    /// The content of an event was deleted, because its lifetime is over. Nobody is told, but whoever keeps its content deletes it.
    Expired {
        /// The room of the event.
        room: RoomNum,
        /// The number of the event in that room.
        event: EventNum,
    },
}

impl LogEntry {
    fn parts(self) -> (u8, u64, u64) {
        match self {
            Self::Event { room, event } => (1, room.0, event.0),
            Self::RoomState { room } => (2, room.0, 0),
            Self::Receipts { room } => (3, room.0, 0),
            Self::Account { user } => (4, user.0, 0),
            Self::AccountData { user } => (5, user.0, 0),
            Self::Device { user } => (6, user.0, 0),
            Self::ToDevice { user } => (7, user.0, 0),
            Self::DeviceList { user } => (8, user.0, 0),
            Self::Server => (9, 0, 0),
            Self::OtherDeviceList => (10, 0, 0),
            Self::Filled { room, top } => (11, room.0, top.anchor.number()),
            Self::Expired { room, event } => (12, room.0, event.0),
        }
    }
}

impl Value for LogEntry {
    fn encode(&self, to: &mut Encoder) {
        let (kind, a, b) = self.parts();
        to.raw(&[1, kind]);
        u64::encode_key(a, to);
        if b != 0 {
            u64::encode_key(b, to);
        }
        if let Self::Filled { top, .. } = self {
            i32::encode_key(top.minor, to);
        }
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let kind = from.byte()?;
        let a: u64 = Key::decode_key(&mut from)?;
        let b: u64 = if from.0.is_empty() { 0 } else { Key::decode_key(&mut from)? };
        let (room, user) = (RoomNum(a), UserNum(a));
        Ok(match kind {
            1 => Self::Event { room, event: EventNum(b) },
            2 => Self::RoomState { room },
            3 => Self::Receipts { room },
            4 => Self::Account { user },
            5 => Self::AccountData { user },
            6 => Self::Device { user },
            7 => Self::ToDevice { user },
            8 => Self::DeviceList { user },
            9 => Self::Server,
            10 => Self::OtherDeviceList,
            11 => {
                let anchor = Position::new(b).ok_or(Fault::Corrupt("a log entry names no position"))?;
                Self::Filled { room, top: Order { anchor, minor: Key::decode_key(&mut from)? } }
            }
            12 => Self::Expired { room, event: EventNum(b) },
            _ => return Err(Fault::Corrupt("a log entry is of an unknown kind")),
        })
    }
}
