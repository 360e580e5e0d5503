//! Rows of delayed events (MSC4140), which a user has scheduled.

use bytes::Bytes;
use ruma::{CanonicalJsonObject, OwnedEventId, OwnedRoomId};
use serde::{Deserialize, Serialize};

use crate::{
    ids::DeviceNum,
    store::{
        Fault,
        key::{Decoder, Encoder, Value, expect_layout},
    },
};

/// Stands for the device in the transactions that send delayed events, which outlive the device that scheduled them. No device has this
/// number.
pub const NO_DEVICE: DeviceNum = DeviceNum(u32::MAX);

/// An event that a user has scheduled, until some time after it was sent or came to nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DelayedRow {
    /// The room that it is sent to.
    pub room_id: OwnedRoomId,
    /// The type of the event.
    pub event_type: String,
    /// The state key, if it is a state event.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_key: Option<String>,
    /// The content as the client wrote it; it is empty once the event was sent, because then the event holds it.
    pub content: CanonicalJsonObject,
    /// It is sent this many milliseconds after it was scheduled or restarted.
    pub delay_ms: u64,
    /// When it was scheduled or last restarted, in milliseconds since the epoch.
    pub scheduled_ms: u64,
    /// It was scheduled or last restarted after those of its user that waited then and have lower numbers.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub sequence: u64,
    /// For how many milliseconds the event stays sticky once it is sent, if it is a sticky event (MSC4354).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sticky_ms: Option<u64>,
    /// When it is tried next, in milliseconds since the epoch, where it was due and could not be sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub again_ms: Option<u64>,
    /// The end of it, once it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<DelayedEnd>,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl DelayedRow {
    /// When it is to be sent, in milliseconds since the epoch.
    pub fn due_ms(&self) -> u64 {
        self.scheduled_ms.saturating_add(self.delay_ms)
    }

    /// When there is something to do for it, in milliseconds since the epoch: it is due, or tried again.
    pub fn listed_ms(&self) -> u64 {
        self.again_ms.unwrap_or_else(|| self.due_ms())
    }

    /// The row that lists it while it waits.
    pub fn listing(&self) -> DueRow {
        DueRow { due_ms: Some(self.due_ms()), sequence: self.sequence }
    }
}

/// The row that lists a delayed event while it waits. What was put off is listed at another time than the one at which it is due, and
/// keeps its turn by this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DueRow {
    /// When the event is due, in milliseconds since the epoch. Rows had no value once, and those say nothing.
    pub due_ms: Option<u64>,
    /// The number of [`DelayedRow::sequence`].
    pub sequence: u64,
}

impl Value for DueRow {
    fn encode(&self, to: &mut Encoder) {
        let Some(due_ms) = self.due_ms else { return };
        to.raw(&[1]);
        to.varint(due_ms);
        to.varint(self.sequence);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        if bytes.is_empty() {
            return Ok(Self { due_ms: None, sequence: 0 });
        }
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        Ok(Self { due_ms: Some(from.varint()?), sequence: from.varint()? })
    }
}

/// The end of a delayed event: when it came, and what it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DelayedEnd {
    /// When it ended, in milliseconds since the epoch.
    pub at_ms: u64,
    /// The way in which it ended.
    pub outcome: DelayedOutcome,
}

/// How a delayed event ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DelayedOutcome {
    /// It was sent, as the event of this id.
    Sent(OwnedEventId),
    /// It was not sent, because the room or the server refused it: the code and the sentence of the refusal.
    Refused(String, String),
    /// Its user took it back.
    Cancelled,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::schema::round_trip;

    proptest! {
        #[test]
        fn rows_that_list_come_back(due_ms: u64, sequence: u64) {
            let row = DueRow { due_ms: Some(due_ms), sequence };
            prop_assert_eq!(round_trip(&row), row);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = DueRow::decode(Bytes::from(bytes));
        }
    }

    #[test]
    fn rows_of_before_are_read() {
        let old = DueRow::decode(Bytes::new()).unwrap();
        assert_eq!(old, DueRow { due_ms: None, sequence: 0 });
        assert_eq!(round_trip(&old), old);
        let json = r#"{"room_id":"!a:b","event_type":"m.test","content":{},"delay_ms":2,"scheduled_ms":3}"#;
        let row: DelayedRow = serde_json::from_str(json).unwrap();
        assert_eq!((row.sequence, row.listed_ms()), (0, 5));
        assert_eq!(serde_json::to_string(&row).unwrap(), json);
    }
}
