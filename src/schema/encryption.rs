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
