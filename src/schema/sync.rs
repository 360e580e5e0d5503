//! Rows of sliding sync: what each connection of a device has been told.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    ids::{EventNum, Position, RoomNum, StateKeyNum},
    schema::{encoding::decode_u32, rooms::Membership},
    store::{
        Fault,
        key::{Decoder, Encoder, Value, expect_layout},
    },
};

/// A connection of sliding sync, without its rooms.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConnectionRow {
    /// The random number of the connection, so that no position of an earlier one is taken for one of this.
    pub number: u64,
    /// The step that the client is known to have received.
    pub base: u64,
    /// The step after it, of which the client may or may not have heard.
    pub next: Option<u64>,
    /// When it was last written, in milliseconds since the epoch.
    pub used_ms: u64,
    /// The state that rooms were told with, each by the number that rows of rooms name.
    pub configs: Vec<(u32, Vec<StateWish>)>,
}

/// The state of a room that a client wants, as one of its lists or subscriptions says it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct StateWish {
    /// The state that is told, unless it is excluded.
    pub include: Vec<StatePattern>,
    /// The state that is not told.
    pub exclude: Vec<StatePattern>,
    /// Members are told only where something else of the answer speaks of them.
    pub lazy_members: bool,
}

/// Names the state of a type and a state key. What is not given may be anything.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct StatePattern {
    /// The type of the event.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub event_type: Option<String>,
    /// The state key of the event.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_key: Option<String>,
}

/// How much a connection was told of one room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoomSent {
    /// The room is told up to here. None if it is told up to wherever the connection stands.
    pub upto: Option<Position>,
    /// The membership of the user, as it was told.
    pub membership: Membership,
    /// The event that said so.
    pub own: EventNum,
    /// The state that it was told with: a number of [`ConnectionRow::configs`].
    pub config: u32,
    /// The client has at least this many of the newest events, without a gap. [`u32::MAX`] if it has all of them.
    pub events: u32,
    /// The room was told to be a direct chat.
    pub is_dm: bool,
    /// The client was told who types.
    pub has_typing: bool,
    /// The client was told of receipts.
    pub has_receipts: bool,
    /// The client was told the account data of the room.
    pub has_data: bool,
    /// The members that were told lazily, rising.
    pub members: Vec<StateKeyNum>,
}

const IS_BEHIND: u8 = 1;
const IS_DM: u8 = 2;
const HAS_TYPING: u8 = 4;
const HAS_RECEIPTS: u8 = 8;
const HAS_DATA: u8 = 16;

impl RoomSent {
    fn encode(&self, to: &mut Encoder) {
        let flags = [
            (self.upto.is_some(), IS_BEHIND),
            (self.is_dm, IS_DM),
            (self.has_typing, HAS_TYPING),
            (self.has_receipts, HAS_RECEIPTS),
            (self.has_data, HAS_DATA),
        ];
        let flags = flags.iter().filter(|(is_set, _)| *is_set).fold(0, |flags, (_, flag)| flags | flag);
        to.raw(&[self.membership as u8, flags]);
        if let Some(upto) = self.upto {
            to.varint(upto.number());
        }
        to.varint(self.own.0);
        to.varint(self.config.into());
        to.varint(self.events.into());
        to.varint(self.members.len() as u64);
        let mut last = 0;
        for member in &self.members {
            to.varint(member.0.wrapping_sub(last).into());
            last = member.0;
        }
    }

    fn decode(from: &mut Decoder<'_>) -> Result<Self, Fault> {
        let membership = Membership::from_byte(from.byte()?)?;
        let flags = from.byte()?;
        let upto = match flags & IS_BEHIND {
            0 => None,
            _ => Some(Position::new(from.varint()?).ok_or(Fault::Corrupt("a position is too large"))?),
        };
        let (own, config, events) = (EventNum(from.varint()?), decode_u32(from)?, decode_u32(from)?);
        let count = from.varint()?;
        let (mut members, mut last) = (Vec::new(), 0_u32);
        for _ in 0..count {
            last = last.wrapping_add(decode_u32(from)?);
            members.push(StateKeyNum(last));
        }
        Ok(Self {
            upto,
            membership,
            own,
            config,
            events,
            is_dm: flags & IS_DM != 0,
            has_typing: flags & HAS_TYPING != 0,
            has_receipts: flags & HAS_RECEIPTS != 0,
            has_data: flags & HAS_DATA != 0,
            members,
        })
    }
}

/// The steps at which a room was told, rising, each with what was told by then; none where the client no longer hears of the
/// room. Only the newest steps that the client may stand at are kept.
pub type RoomSteps = Vec<(u64, Option<RoomSent>)>;

/// A share of the rooms of a connection. Rooms are kept together in a few rows, so that a connection of thousands of rooms is
/// read and deleted quickly, and a step writes the shares alone that it touches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectionRooms {
    /// The rooms of the connection, rising.
    pub rooms: Vec<(RoomNum, RoomSteps)>,
}

impl Value for ConnectionRooms {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        to.varint(self.rooms.len() as u64);
        for (room, steps) in &self.rooms {
            to.varint(room.0);
            to.varint(steps.len() as u64);
            for (step, sent) in steps {
                to.varint(*step);
                to.raw(&[u8::from(sent.is_some())]);
                if let Some(sent) = sent {
                    sent.encode(to);
                }
            }
        }
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let count = from.varint()?;
        let mut rooms = Vec::new();
        for _ in 0..count {
            let room = RoomNum(from.varint()?);
            let count = from.varint()?;
            let mut steps = RoomSteps::new();
            for _ in 0..count {
                let step = from.varint()?;
                let sent = match from.byte()? {
                    0 => None,
                    1 => Some(RoomSent::decode(&mut from)?),
                    _ => return Err(Fault::Corrupt("a room of a connection is neither told nor untold")),
                };
                steps.push((step, sent));
            }
            rooms.push((room, steps));
        }
        Ok(Self { rooms })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::round_trip;

    #[test]
    fn rooms_of_a_connection_come_back() {
        let sent = RoomSent {
            upto: None,
            membership: Membership::Join,
            own: EventNum(7),
            config: 3,
            events: u32::MAX,
            is_dm: true,
            has_typing: false,
            has_receipts: true,
            has_data: false,
            members: vec![StateKeyNum(0), StateKeyNum(5), StateKeyNum(u32::MAX)],
        };
        let behind = RoomSent {
            upto: Position::new(1 << 50),
            is_dm: false,
            has_typing: true,
            has_data: true,
            has_receipts: false,
            members: Vec::new(),
            ..sent.clone()
        };
        let rooms = vec![
            (RoomNum(1), vec![(1, Some(sent)), (2, None)]),
            (RoomNum(u64::MAX), vec![(u64::MAX, Some(behind))]),
            (RoomNum(9), Vec::new()),
        ];
        let row = ConnectionRooms { rooms };
        assert_eq!(round_trip(&row), row);
    }

    #[test]
    fn odd_bytes_are_refused() {
        for bytes in [&[][..], &[2], &[1, 1], &[1, 1, 0, 1, 0, 2], &[1, 1, 0, 1, 0, 1, 99]] {
            assert!(ConnectionRooms::decode(Bytes::copy_from_slice(bytes)).is_err(), "{bytes:?}");
        }
    }
}
