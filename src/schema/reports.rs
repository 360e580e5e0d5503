//! Rows of reports that users make to those who run this server.

use ruma::{OwnedEventId, OwnedRoomId, OwnedUserId};
use serde::{Deserialize, Serialize};

/// The thing that is reported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Subject {
    /// An event of a room that the user was in.
    Event {
        /// The room of the event.
        room_id: OwnedRoomId,
        /// The event that is reported.
        event_id: OwnedEventId,
    },
    /// A room, whether the user was in it or not.
    Room {
        /// The id of the room.
        room_id: OwnedRoomId,
    },
    /// A user of this server or another.
    User {
        /// The id of the user.
        user_id: OwnedUserId,
    },
}

impl Subject {
    /// The name under which a report of it is kept: a user has one report of each thing.
    pub fn name(&self) -> String {
        match self {
            Self::Event { room_id, event_id } => format!("{event_id} {room_id}"),
            Self::Room { room_id } => room_id.to_string(),
            Self::User { user_id } => user_id.to_string(),
        }
    }
}

/// A report of a user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportRow {
    /// When it was made, in milliseconds since the epoch.
    pub at_ms: u64,
    /// The thing that is reported.
    pub subject: Subject,
    /// The reason that the user gave, in words of their own.
    pub reason: String,
    /// How bad the user says it is, where the client sends that: from -100 (worst) to 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<i64>,
}
