//! Keys of servers: ours, which we publish, and others', which we believe only within bounds
//! ([retrieving server keys](https://spec.matrix.org/v1.19/server-server-api/#retrieving-server-keys)).
//!
//! - [`OwnKeys`] signs and publishes.
//! - [`document`] checks what another server publishes.
//! - [`Ring`] finds another server's key for a purpose: from the cache, from the server, from notaries.
//! - [`notary`] answers others who ask us for a third server's keys.

pub mod document;
mod kept;
pub mod notary;
mod own;
mod ring;
#[cfg(test)]
mod tests;

use ruma::{
    OwnedServerName, OwnedServerSigningKeyId, SigningKeyAlgorithm, serde::Base64,
    signatures::verify_canonical_json_bytes,
};

use crate::{json::Canonical, ports::StoredKey};

pub use own::{BadKey, OldKey, OwnKeys};
pub use ring::{KeyFailure, Ring};

/// A key is valid at most this long after it was looked at, whatever its document says, so that the owner of a server
/// can take back a key that was stolen ([publishing keys](https://spec.matrix.org/v1.19/server-server-api/#publishing-keys)).
const VALID_MAX_MS: u64 = 7 * 24 * 3_600_000;

/// An ed25519 key that signatures are checked with.
pub type PublicKey = [u8; 32];

/// What a key is needed for, which decides when it must be valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Checking a request that was made now: only a key that is in use will do.
    Request,
    /// Checking an event. In rooms of version 5 and later the key must have been valid when the event was sent
    /// ([signing key validity period](https://spec.matrix.org/v1.19/rooms/v5/#signing-key-validity-period)); before, any time
    /// will do.
    Event {
        /// The event's `origin_server_ts`.
        sent_ms: u64,
        /// Whether the room's version asks for validity.
        is_strict: bool,
    },
}

impl Purpose {
    /// Whether the key will do.
    pub const fn accepts(self, key: &StoredKey, now_ms: u64) -> bool {
        // A document that claims more was written before the clock went back, or by another rule.
        let latest_ms = now_ms.saturating_add(VALID_MAX_MS);
        let valid_until_ms = if key.valid_until_ms < latest_ms { key.valid_until_ms } else { latest_ms };
        match (self, key.expired_ms) {
            (Self::Request, Some(_)) => false,
            (Self::Request, None) => now_ms <= valid_until_ms,
            (Self::Event { is_strict: false, .. }, _) => true,
            (Self::Event { sent_ms, is_strict: true }, Some(expired_ms)) => sent_ms <= expired_ms,
            (Self::Event { sent_ms, is_strict: true }, None) => sent_ms <= valid_until_ms,
        }
    }

    /// The time until which a document must be valid to answer the purpose: what a notary is asked for.
    const fn needs_until_ms(self, now_ms: u64) -> u64 {
        match self {
            Self::Request => now_ms,
            Self::Event { is_strict: false, .. } => 0,
            Self::Event { sent_ms, is_strict: true } => sent_ms,
        }
    }
}

/// A key that somebody needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Its server.
    pub server: OwnedServerName,
    /// Its id, such as `ed25519:auto`.
    pub key_id: OwnedServerSigningKeyId,
    /// What it is needed for.
    pub purpose: Purpose,
}

/// Whether this is the signature of this key over this text. The signature is base64, with padding or without.
pub fn is_signed(text: &Canonical, key: &PublicKey, signature: &str) -> bool {
    // 64 bytes have 86 characters, or 88 with padding.
    if signature.len() > 88 {
        return false;
    }
    let Ok(signature) = Base64::<ruma::serde::base64::Standard>::parse(signature) else { return false };
    let text = text.as_str().as_bytes();
    verify_canonical_json_bytes(&SigningKeyAlgorithm::Ed25519, key, signature.as_bytes(), text).is_ok()
}
