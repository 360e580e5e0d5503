//! Rows about other servers: what came from them and waits, and what is to be told to them.

use federation::ports::StoredKey;
use serde::{Deserialize, Serialize};

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
