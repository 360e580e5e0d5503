//! Rows of end-to-end encryption: inboxes and keys of devices.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    ids::Position,
    store::{
        Fault,
        key::{Decoder, Encoder, Key, Value, expect_layout},
    },
};

/// How far a device has read its inbox, and what waits in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InboxState {
    /// Everything at or before this position was received.
    pub acknowledged: Position,
    /// Messages that wait.
    pub messages: u64,
    /// Their bytes.
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

/// What is left of a device's keys: told in every answer of `/sync`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KeyCounts {
    /// One-time keys, by algorithm.
    pub one_time: BTreeMap<String, u64>,
    /// Algorithms whose fallback key was not given to anybody yet.
    pub unused_fallback: BTreeSet<String>,
}

/// A fallback key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FallbackRow {
    /// Its id, without the algorithm.
    pub id: String,
    /// The key, as JSON.
    pub key: String,
}
