//! Rows of end-to-end encryption: inboxes of devices.

use bytes::Bytes;

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
        Ok(Self { acknowledged: Position::decode_key(&mut from)?, messages: from.varint()?, bytes: from.varint()? })
    }
}
