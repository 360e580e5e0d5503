//! Rows of end-to-end encryption: inboxes and keys of devices.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    ids::{DeviceNum, Position},
    schema::encoding::decode_u32,
    store::{
        Fault,
        key::{Decoder, Encoder, Key, Value, expect_layout, layout_upto},
    },
};

/// How far a device has read its inbox, and what waits in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InboxState {
    /// Everything at or before this position was received.
    pub acknowledged: Position,
    /// The number of messages that wait.
    pub messages: u64,
    /// The number of bytes that these messages take together.
    pub bytes: u64,
}

impl Value for InboxState {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        to.position(self.acknowledged);
        to.varint(self.messages);
        to.varint(self.bytes);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        Ok(Self {
            acknowledged: Position::decode_key(&mut from)?,
            messages: from.varint()?,
            bytes: from.varint()?,
        })
    }
}

/// The part of a device's inbox that one sender fills.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InboxShare {
    /// The number of messages that wait.
    pub messages: u64,
    /// The number of bytes that these messages take together.
    pub bytes: u64,
}

impl Value for InboxShare {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        to.varint(self.messages);
        to.varint(self.bytes);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        Ok(Self { messages: from.varint()?, bytes: from.varint()? })
    }
}

/// How far a request to send messages to devices has got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SendProgress {
    /// The number of targets that are served; a target is a device, or all devices of a user.
    pub targets: u64,
    /// The devices of the next target up to this number are served. Numbers of devices rise, so one that comes or goes
    /// between two tries changes nothing for the others.
    pub device: DeviceNum,
    /// Whether every target is served: what comes under the same transaction id then is the same request again.
    pub is_done: bool,
}

impl Value for SendProgress {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[2]);
        to.varint(self.targets);
        to.varint(u64::from(self.device.0));
        to.raw(&[u8::from(self.is_done)]);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        if layout_upto(&mut from, 2)? == 1 {
            // Layout 1 has the number of targets alone.
            return Ok(Self { targets: u64::decode_key(&mut from)?, ..Self::default() });
        }
        Ok(Self {
            targets: from.varint()?,
            device: DeviceNum(decode_u32(&mut from)?),
            is_done: from.byte()? != 0,
        })
    }
}

/// The keys that a device has left. Every answer of `/sync` tells them, so that the device uploads more in time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KeyCounts {
    /// The number of one-time keys left, by algorithm.
    pub one_time: BTreeMap<String, u64>,
    /// The algorithms whose fallback key was not given to anybody yet.
    pub unused_fallback: BTreeSet<String>,
    /// The number of one-time keys that were given and are remembered, over all algorithms.
    pub given: u64,
}

/// A fallback key, given where no one-time key is left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FallbackRow {
    /// The id of the key, without the algorithm.
    pub id: String,
    /// The JSON of the key, as the device uploaded it.
    pub key: String,
}

/// A signature of one key over another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignatureRow {
    /// The id of the key that signed, such as `ed25519:DEVICE`.
    pub key_id: String,
    /// The signature, in base64.
    pub signature: String,
}

/// A signature of a user over the master key of another user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedUserRow {
    /// A digest of what the signature covers. Rows of earlier builds have none.
    #[serde(default)]
    pub digest: Option<String>,
    /// The id of the key that signed, such as `ed25519:KEY`.
    pub key_id: String,
    /// The signature, in base64.
    pub signature: String,
}

/// A change of the device list of a user of ours, as other servers are told it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceStepRow {
    /// The position of the change before, if there was one.
    pub prev: Option<Position>,
    /// The id of the device that came, changed or went.
    pub device_id: String,
    /// Whether the keys changed with which the user signs.
    pub has_signing_keys: bool,
}

impl Value for DeviceStepRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[2, u8::from(self.has_signing_keys)]);
        to.position(self.prev.unwrap_or(Position::ZERO));
        to.raw(self.device_id.as_bytes());
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        // Layout 1 is from before users had keys with which they sign.
        let has_signing_keys = layout_upto(&mut from, 2)? == 2 && from.byte()? != 0;
        let prev = Position::decode_key(&mut from)?;
        let device_id = std::str::from_utf8(from.rest());
        let device_id = device_id.map_err(|_| Fault::Corrupt("the id of a device is no text"))?.to_owned();
        Ok(Self { prev: (prev != Position::ZERO).then_some(prev), device_id, has_signing_keys })
    }
}

/// The device list of a user of another server, without the devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OtherListRow {
    /// The last changes that are in the list, by the numbers that the user's server gave them; the newest one last.
    pub streams: Vec<u64>,
    /// Whether a change was missed, so that the list must be asked for again before anybody is told of it.
    pub is_stale: bool,
    /// The number of devices.
    pub devices: u64,
    /// The bytes of the devices and keys.
    pub bytes: u64,
    /// The JSON of the key with which the user signs the other two.
    pub master_key: Option<String>,
    /// The JSON of the key with which the user signs the devices.
    pub self_signing_key: Option<String>,
    /// A room by which the user's server knows that it must tell ours of changes.
    pub room: u64,
    /// The number of the event by which the user is in that room.
    pub member: u64,
    /// A user of ours in that room.
    pub own: u64,
    /// The position since which our user has been in it.
    pub own_since: u64,
    /// The position up to which this server had come when the list was asked for.
    pub asked_upto: u64,
}

/// A device of a user of another server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OtherDeviceRow {
    /// The JSON of the device's identity keys, as the user's server told it.
    pub keys: String,
    /// The name that its owner gave it.
    #[serde(default)]
    pub display_name: Option<String>,
}

/// How much is kept of the device lists of one server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OtherCount {
    /// The number of users.
    pub users: u64,
    /// The bytes of their devices and keys.
    pub bytes: u64,
}

impl Value for OtherCount {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        to.varint(self.users);
        to.varint(self.bytes);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        Ok(Self { users: from.varint()?, bytes: from.varint()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::round_trip;

    #[test]
    fn changes_and_counts_come_back() {
        for prev in [None, Position::new(7)] {
            for has_signing_keys in [false, true] {
                let step = DeviceStepRow { prev, device_id: "DÉV".to_owned(), has_signing_keys };
                assert_eq!(round_trip(&step), step);
            }
        }
        let before = DeviceStepRow::decode(Bytes::from_static(&[1, 0, 0, 0, 0, 0, 0, 0, 7, b'D'])).unwrap();
        let device_id = "D".to_owned();
        assert_eq!(before, DeviceStepRow { prev: Position::new(7), device_id, has_signing_keys: false });
        let count = OtherCount { users: 300, bytes: u64::MAX };
        assert_eq!(round_trip(&count), count);
        assert!(DeviceStepRow::decode(Bytes::from_static(&[1, 0])).is_err());
        assert!(DeviceStepRow::decode(Bytes::from_static(&[1, 0, 0, 0, 0, 0, 0, 0, 1, 0xff])).is_err());
        assert!(OtherCount::decode(Bytes::from_static(&[2, 0, 0])).is_err());
    }
}
