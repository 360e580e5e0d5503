//! Rows about other servers: what came from them and waits, and what is to be told to them.

use bytes::Bytes;
use federation::{backoff::Failing, ports::StoredKey};
use ruma::OwnedEventId;
use serde::{Deserialize, Serialize};

use crate::{
    schema::{
        encoding::{decode_string, encode_bytes},
        encryption::SendProgress,
    },
    store::{
        Fault,
        key::{Decoder, Encoder, Value, expect_layout},
    },
};

/// A key of another server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerKeyRow {
    /// The key itself, and what is known of it.
    #[serde(flatten)]
    pub key: StoredKey,
    /// About when the key was needed last: it is forgotten a while after that. Older rows say nothing.
    #[serde(default)]
    pub asked_ms: u64,
}

/// A transaction that another server sent, as it was answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InboundTransactionRow {
    /// How many transactions of this server came before; the rows of a server are used in turn.
    pub number: u64,
    /// The id that the other server gave it.
    pub id: String,
    /// When it was answered, in milliseconds since the epoch.
    pub at_ms: u64,
    /// The answer, as JSON.
    pub answer: String,
}

/// An event of another server that could not be judged yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboundEventRow {
    /// The server that sent it.
    pub origin: String,
    /// The id of the event.
    pub id: OwnedEventId,
    /// When it came, in milliseconds since the epoch.
    pub received_ms: u64,
    /// The event as canonical JSON, signatures included.
    pub json: Bytes,
}

impl Value for InboundEventRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        encode_bytes(self.origin.as_bytes(), to);
        encode_bytes(self.id.as_bytes(), to);
        to.varint(self.received_ms);
        to.raw(&self.json);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let origin = decode_string(&mut from)?;
        let id = OwnedEventId::try_from(decode_string(&mut from)?);
        let received_ms = from.varint()?;
        let id = id.map_err(|_| Fault::Corrupt("an event that waits has no id"))?;
        Ok(Self { origin, id, received_ms, json: bytes.slice_ref(from.rest()) })
    }
}

/// A place in a line of what is remembered: whatever is new pushes out what came first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InboundLineRow {
    /// The server that sent it.
    pub origin: String,
    /// The id of the message; empty where the place stands for all transactions of the server.
    pub id: String,
}

/// A message between devices that another server sent: how far it was delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InboundMessageRow {
    /// When it came first, in milliseconds since the epoch.
    pub at_ms: u64,
    /// The devices that have it already.
    pub progress: SendProgress,
}

impl Value for InboundMessageRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        to.raw(&self.at_ms.to_be_bytes());
        self.progress.encode(to);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let at_ms = from.take(8)?.try_into().map(u64::from_be_bytes);
        let at_ms = at_ms.map_err(|_| Fault::Corrupt("a row ends early"))?;
        Ok(Self { at_ms, progress: SendProgress::decode(bytes.slice_ref(from.rest()))? })
    }
}

/// The state of a server that does not answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DestinationRow {
    /// How often it failed, since when, and when it is tried again.
    pub failing: Failing,
    /// The last failure, as a sentence for the operator.
    pub why: String,
}

/// A signing key of this server that waits to be used, or that has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SigningKeyRow {
    /// The private half in base64, of a key that waits.
    pub seed: Option<String>,
    /// The public half in base64, of a key that has ended.
    pub public_key: Option<String>,
    /// When it ended: milliseconds since the epoch.
    pub expired_ms: Option<u64>,
}

/// A message to devices of another server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutboxRow {
    /// When it was sent here: milliseconds since the epoch.
    pub sent_ms: u64,
    /// The whole piece of ephemeral news as JSON, with the id by which the other server knows it again.
    pub json: Bytes,
}

impl Value for OutboxRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        to.varint(self.sent_ms);
        to.raw(&self.json);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let sent_ms = from.varint()?;
        let json = bytes.slice_ref(from.rest());
        Ok(Self { sent_ms, json })
    }
}

/// A room that this server is not in, as it was told to one of our users, with the event that made them what they are to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutsideRow {
    /// The number by which the user's row in `USER_ROOM` names this one. No event of the room has it.
    pub number: u64,
    /// The part that the user is shown.
    #[serde(flatten)]
    pub shown: Standing,
    /// All else that stands and is not shown, the oldest first: invitations by users of further servers, and a knock.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<Standing>,
}

/// The word of somebody outside a room on what a user of ours is to it: an invitation or a knock, or the end of either.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// The user id of the sender of the member event: whoever knocked themselves, or their inviter.
    pub sender: String,
    /// The member event as JSON; empty where no other server was told of it.
    pub event: String,
    /// The events that tell which room this is, as clients see them; the member event is the last of them.
    pub state: Vec<String>,
    /// The version that the room has by the word of whoever told of it; 0 in rows from before each had a word of its own, which
    /// go by the row of the room.
    #[serde(default)]
    pub version: u8,
    /// The server that told of it: that of the inviter, or the one that passed a knock on. Empty in older rows.
    #[serde(default)]
    pub via: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ids::DeviceNum, schema::round_trip};

    #[test]
    fn what_is_shown_from_outside_a_room_stands_among_the_fields_of_its_row() {
        let shown = Standing {
            sender: "@a:b".to_owned(),
            event: "{}".to_owned(),
            state: vec!["1".to_owned()],
            version: 11,
            via: "b".to_owned(),
        };
        let row = OutsideRow { number: 7, shown: shown.clone(), others: vec![shown] };
        let text = serde_json::to_string(&row).unwrap();
        let one = r#""sender":"@a:b","event":"{}","state":["1"],"version":11,"via":"b""#;
        assert_eq!(text, format!(r#"{{"number":7,{one},"others":[{{{one}}}]}}"#));
        assert_eq!(serde_json::from_str::<OutsideRow>(&text).unwrap(), row);
        // A row that was written before there were versions.
        let old: OutsideRow =
            serde_json::from_str(r#"{"number":7,"sender":"@a:b","event":"{}","state":["1"]}"#).unwrap();
        let shown = Standing { version: 0, via: String::new(), ..row.shown };
        assert_eq!(old, OutsideRow { number: 7, shown, others: Vec::new() });
    }

    #[test]
    fn rows_are_read_as_they_were_written() {
        let event = InboundEventRow {
            origin: "b.example".to_owned(),
            id: "$it:b.example".try_into().unwrap(),
            received_ms: 1_767_225_600_000,
            json: Bytes::from_static(b"{}"),
        };
        assert_eq!(round_trip(&event), event);
        let progress = SendProgress { targets: 3, device: DeviceNum(7), is_done: false };
        let message = InboundMessageRow { at_ms: 1_767_225_600_000, progress };
        assert_eq!(round_trip(&message), message);
        assert!(InboundEventRow::decode(Bytes::from_static(&[1, 1, b'x', 1, b'y'])).is_err());
        assert!(InboundMessageRow::decode(Bytes::from_static(&[1, 0])).is_err());
    }

    #[test]
    fn messages_of_the_outbox_come_back() {
        for sent_ms in [0, 127, 1_767_225_600_000, u64::MAX] {
            let row = OutboxRow { sent_ms, json: Bytes::from_static(b"{}") };
            assert_eq!(round_trip(&row), row);
        }
        assert!(OutboxRow::decode(Bytes::from_static(&[1])).is_err());
        assert!(OutboxRow::decode(Bytes::from_static(&[9, 0])).is_err());
    }
}
