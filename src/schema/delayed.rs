//! Rows of delayed events (MSC4140), which a user has scheduled.

use ruma::{CanonicalJsonObject, OwnedEventId, OwnedRoomId};
use serde::{Deserialize, Serialize};

use crate::ids::DeviceNum;

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

impl DelayedRow {
    /// When it is to be sent, in milliseconds since the epoch.
    pub fn due_ms(&self) -> u64 {
        self.scheduled_ms.saturating_add(self.delay_ms)
    }

    /// When there is something to do for it, in milliseconds since the epoch: it is due, or tried again.
    pub fn listed_ms(&self) -> u64 {
        self.again_ms.unwrap_or_else(|| self.due_ms())
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
