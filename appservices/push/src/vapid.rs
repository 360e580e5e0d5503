//! Says to a push service who sends (VAPID, [RFC 8292](https://www.rfc-editor.org/rfc/rfc8292.html)).

use std::{num::NonZeroUsize, path::Path};

use http::HeaderValue;
use lru::LruCache;
use parking_lot::Mutex;
use serde_json::json;

use crate::keys::{BadKey, Es256};

/// A token is valid for this long; push services take 24 hours at most.
const VALID_S: u64 = 12 * 3600;
/// A token is used again for this long, so that not each message costs a signature.
const USED_S: u64 = 3600;
/// Tokens that are kept, one for each push service; users may name any number of them.
const KEPT_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(999);

/// The key of this gateway, and the tokens that it signed lately.
pub(crate) struct Vapid {
    key: Es256,
    contact: String,
    public: String,
    kept: Mutex<LruCache<String, (u64, HeaderValue)>>,
}

impl Vapid {
    /// Reads the key. Errors: [`BadKey`].
    pub(crate) fn load(file: &Path, contact: &str) -> Result<Self, BadKey> {
        let key = Es256::load(file)?;
        let public = key.public_text();
        Ok(Self { key, contact: contact.to_owned(), public, kept: Mutex::new(LruCache::new(KEPT_MAX)) })
    }

    /// The public key, which apps subscribe with (`applicationServerKey`).
    pub(crate) fn public_text(&self) -> &str {
        &self.public
    }

    /// The `Authorization` header for a push service at this origin (section 3).
    pub(crate) fn authorization(&self, origin: &str, now_ms: u64) -> Option<HeaderValue> {
        let now_s = now_ms / 1000;
        if let Some((signed_s, value)) = self.kept.lock().get(origin)
            && (*signed_s..signed_s.saturating_add(USED_S)).contains(&now_s)
        {
            return Some(value.clone());
        }
        let claims = json!({ "aud": origin, "exp": now_s + VALID_S, "sub": self.contact });
        let token = self.key.sign(None, &claims)?;
        let mut value = HeaderValue::from_str(&format!("vapid t={token}, k={}", self.public)).ok()?;
        value.set_sensitive(true);
        self.kept.lock().put(origin.to_owned(), (now_s, value.clone()));
        Some(value)
    }
}
