//! Rows of receipts: how far users have read.

use bytes::Bytes;
use ruma::{OwnedEventId, OwnedUserId};
use serde::{Deserialize, Serialize};

use crate::{
    ids::{Order, Position},
    schema::event_types::{READ, READ_PRIVATE},
    store::{
        Fault,
        key::{Decoder, Encoder, Key, Value, expect_layout},
    },
};

/// Says who sees a receipt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum ReceiptKind {
    /// Everybody in the room sees it: `m.read`.
    Public = 1,
    /// Only the user sees it: `m.read.private`.
    Private = 2,
}

impl ReceiptKind {
    /// The name that the specification gives this kind.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Public => READ,
            Self::Private => READ_PRIVATE,
        }
    }
}

impl Key for ReceiptKind {
    type Ref<'a> = Self;
    fn encode_key(key: Self, to: &mut Encoder) {
        to.raw(&[key as u8]);
    }
    fn decode_key(from: &mut Decoder<'_>) -> Result<Self, Fault> {
        match from.byte()? {
            1 => Ok(Self::Public),
            2 => Ok(Self::Private),
            _ => Err(Fault::Corrupt("a receipt is of an unknown kind")),
        }
    }
}

/// A receipt: it says up to which event somebody has read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceiptRow {
    /// The position at which it was stored.
    pub position: Position,
    /// The order of the event it names.
    pub order: Order,
    /// When it was sent, in milliseconds since the epoch.
    pub sent_ms: u64,
    /// The id of the event.
    pub event_id: OwnedEventId,
}

impl Value for ReceiptRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        to.position(self.position);
        Order::encode_key(self.order, to);
        to.varint(self.sent_ms);
        to.raw(self.event_id.as_str().as_bytes());
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        Ok(Self {
            position: Key::decode_key(&mut from)?,
            order: Key::decode_key(&mut from)?,
            sent_ms: from.varint()?,
            event_id: std::str::from_utf8(from.rest())
                .ok()
                .and_then(|id| OwnedEventId::try_from(id).ok())
                .ok_or(Fault::Corrupt("an event id is not valid"))?,
        })
    }
}

/// The key of the receipt that was stored at a position.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiptKey {
    /// The id of the user whose receipt it is.
    pub user: OwnedUserId,
    /// Whether others see it.
    pub kind: ReceiptKind,
    /// "" for the whole room, "main" for what is in no thread, else the root of the thread.
    #[serde(default)]
    pub thread: String,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn receipts_come_back(position in 0_u64..1 << 53, minor: i32, sent_ms: u64, id in "[a-z0-9_-]{1,9}") {
            let event_id = OwnedEventId::try_from(format!("${id}")).unwrap();
            let position = Position::new(position).unwrap();
            let row = ReceiptRow { position, order: Order { anchor: position, minor }, sent_ms, event_id };
            let mut to = Encoder::default();
            row.encode(&mut to);
            prop_assert_eq!(ReceiptRow::decode(to.bytes.into()).unwrap(), row);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = ReceiptRow::decode(Bytes::from(bytes));
        }
    }
}
