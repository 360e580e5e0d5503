//! For how long the messages of a room are kept (MSC1763).
//!
//! A room's state may say so, an operator sets bounds and a default. A message whose lifetime is over is *expired*: its content is deleted, and what is left
//! of it, its redacted form, holds the room's graph together and is shown to nobody (`docs/decisions/expired-messages.md`). State is kept for ever.
//! `rooms/change/expire.rs` carries it out.

use serde::Deserialize;
use serde_json::{Value, value::RawValue};

use crate::config::Retention;

/// The bounds that an operator sets, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// The lifetime of messages in rooms that say nothing; `None`: they are kept for ever.
    pub default_ms: Option<u64>,
    /// The least lifetime that a room may have.
    pub min_ms: Option<u64>,
    /// The greatest lifetime that a room may have.
    pub max_ms: Option<u64>,
}

/// The lifetime of a room's messages in milliseconds, counted from when their senders say they were made; `None` within: they are
/// kept for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetime(pub Option<u64>);

impl From<&Retention> for Limits {
    fn from(settings: &Retention) -> Self {
        let ms = |days: u32| (days > 0).then(|| u64::from(days) * 24 * 60 * 60 * 1000);
        Self {
            default_ms: ms(settings.default_days),
            min_ms: ms(settings.min_days),
            max_ms: ms(settings.max_days),
        }
    }
}

impl Limits {
    /// Gives the lifetime in a room with this content of its retention event; `None` for a room without one.
    ///
    /// A lifetime that is no integer from 0 to 2^53-1 counts as none, and one below the room's own `min_lifetime` as that.
    pub fn lifetime(&self, content: Option<&RawValue>) -> Lifetime {
        let Some(content) = content else { return Lifetime(self.default_ms) };
        let said: Content = serde_json::from_str(content.get()).unwrap_or_default();
        let said_ms = said.max_lifetime.as_ref().and_then(whole).map(|max_ms| {
            let min_ms = said.min_lifetime.as_ref().and_then(whole).unwrap_or(0);
            max_ms.max(min_ms)
        });
        let Some(said_ms) = said_ms else { return Lifetime(self.min_ms) };
        let least = self.min_ms.unwrap_or(0);
        Lifetime(Some(said_ms.min(self.max_ms.unwrap_or(u64::MAX)).max(least)))
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Content {
    max_lifetime: Option<Value>,
    min_lifetime: Option<Value>,
}

/// The number of milliseconds that a value says, if it is one that the proposal allows.
fn whole(value: &Value) -> Option<u64> {
    value.as_u64().filter(|ms| *ms < 1 << 53)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lifetime(limits: Limits, content: &str) -> Option<u64> {
        let content: Box<RawValue> = serde_json::from_str(content).unwrap();
        limits.lifetime(Some(&content)).0
    }

    #[test]
    fn the_room_decides_within_the_operators_bounds() {
        let free = Limits::default();
        let bound = Limits { default_ms: Some(50), min_ms: Some(10), max_ms: Some(100) };
        assert_eq!(free.lifetime(None), Lifetime(None));
        assert_eq!(bound.lifetime(None), Lifetime(Some(50)));
        for (content, by_free, by_bound) in [
            (r#"{"max_lifetime":20}"#, Some(20), 20),
            (r#"{"max_lifetime":1}"#, Some(1), 10),
            (r#"{"max_lifetime":1000}"#, Some(1000), 100),
            (r#"{"max_lifetime":0}"#, Some(0), 10),
            (r#"{"max_lifetime":20,"min_lifetime":30}"#, Some(30), 30),
            (r#"{"min_lifetime":30}"#, None, 10),
            (r#"{"max_lifetime":null}"#, None, 10),
            (r#"{"max_lifetime":-1}"#, None, 10),
            (r#"{"max_lifetime":1.5}"#, None, 10),
            (r#"{"max_lifetime":"20"}"#, None, 10),
            (r#"{"max_lifetime":9007199254740992}"#, None, 10),
            (r#"{"max_lifetime":{},"min_lifetime":[]}"#, None, 10),
        ] {
            assert_eq!(lifetime(free, content), by_free, "{content}");
            assert_eq!(lifetime(bound, content), Some(by_bound), "{content}");
        }
    }
}
