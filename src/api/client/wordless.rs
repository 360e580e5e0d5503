//! The forms of what a suspended user may upload though others are shown it: keys and their signatures, without which the user could not
//! read what others say. Whatever is not of these forms may be text for people.
//!
//! Devices sign the keys that they upload, so that nothing can be taken out of them: they are taken as they are, or refused.

use std::collections::BTreeMap;

use serde::{Deserialize, de::IgnoredAny};

use crate::api::policy::Wish;

/// An identifier has at most this many bytes, as ids of Matrix have.
const ID_BYTES_MAX: usize = 255;
/// A key or a signature of the algorithms that the specification knows has at most this many characters of base64.
const KEY_CHARS_MAX: usize = 88;
/// The algorithms that the specification knows.
const ALGORITHMS: [&str; 2] = ["m.olm.v1.curve25519-aes-sha2", "m.megolm.v1.aes-sha2"];
/// The kinds of keys by which a user signs.
const USAGES: [&str; 3] = ["master", "self_signing", "user_signing"];

/// Whether a text is one that people do not write: base64, with or without padding.
pub(super) fn is_base64(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/=-_".contains(&byte))
}

/// Whether a text may be an identifier: short, and without the spaces that stand between words.
pub(super) fn is_id(text: &str) -> bool {
    text.len() <= ID_BYTES_MAX && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Whether a text may be a public key or a signature.
fn is_key(text: &str) -> bool {
    text.len() <= KEY_CHARS_MAX && is_base64(text)
}

/// Keys or signatures by their ids.
type Texts = BTreeMap<String, String>;
/// Signatures by their users and by the ids of the keys that made them.
type Signatures = BTreeMap<String, Texts>;

fn are_keys(keys: &Texts) -> bool {
    keys.iter().all(|(id, key)| is_id(id) && is_key(key))
}

fn are_signatures(signatures: &Signatures) -> bool {
    signatures.iter().all(|(user, of_user)| is_id(user) && are_keys(of_user))
}

/// The identity keys of a device (client-server API, "DeviceKeys"). Nobody is shown what stands in `unsigned`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DeviceKeys {
    user_id: String,
    device_id: String,
    algorithms: Vec<String>,
    keys: Texts,
    signatures: Signatures,
    #[serde(rename = "unsigned")]
    _unsigned: Option<IgnoredAny>,
    #[serde(rename = "dehydrated")]
    _dehydrated: Option<bool>,
}

impl DeviceKeys {
    fn is_well_formed(&self) -> bool {
        is_id(&self.user_id)
            && is_id(&self.device_id)
            && self.algorithms.iter().all(|algorithm| ALGORITHMS.contains(&&**algorithm))
            && are_keys(&self.keys)
            && are_signatures(&self.signatures)
    }
}

/// A one-time or fallback key (client-server API, "One-time and fallback keys").
#[derive(Deserialize)]
#[serde(untagged)]
enum OneTimeKey {
    Plain(String),
    Signed(SignedKey),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SignedKey {
    key: String,
    #[serde(rename = "fallback")]
    _fallback: Option<bool>,
    #[serde(default)]
    signatures: Signatures,
}

impl OneTimeKey {
    fn is_well_formed(&self) -> bool {
        match self {
            Self::Plain(key) => is_key(key),
            Self::Signed(SignedKey { key, _fallback, signatures }) => {
                is_key(key) && are_signatures(signatures)
            }
        }
    }
}

/// A key by which a user signs (client-server API, "CrossSigningKey").
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SigningKey {
    user_id: String,
    usage: Vec<String>,
    keys: Texts,
    #[serde(default)]
    signatures: Signatures,
}

impl SigningKey {
    fn is_well_formed(&self) -> bool {
        is_id(&self.user_id)
            && self.usage.iter().all(|usage| USAGES.contains(&&**usage))
            && are_keys(&self.keys)
            && are_signatures(&self.signatures)
    }
}

/// Whether a device uploads its keys, and nothing besides.
pub(super) fn are_keys_of_device(wish: &Wish<'_>) -> bool {
    #[derive(Deserialize)]
    struct Uploaded {
        device_keys: Option<DeviceKeys>,
        one_time_keys: Option<BTreeMap<String, OneTimeKey>>,
        fallback_keys: Option<BTreeMap<String, OneTimeKey>>,
    }
    let is_well_formed = |uploaded: Uploaded| {
        let (once, last) = (uploaded.one_time_keys, uploaded.fallback_keys);
        let mut keys = once.into_iter().chain(last).flatten();
        uploaded.device_keys.is_none_or(|keys| keys.is_well_formed())
            && keys.all(|(id, key)| is_id(&id) && key.is_well_formed())
    };
    serde_json::from_slice(wish.body).is_ok_and(is_well_formed)
}

/// Whether a user uploads the keys by which they sign, and nothing besides.
pub(super) fn are_signing_keys(wish: &Wish<'_>) -> bool {
    #[derive(Deserialize)]
    struct Uploaded {
        master_key: Option<SigningKey>,
        self_signing_key: Option<SigningKey>,
        user_signing_key: Option<SigningKey>,
    }
    let is_well_formed = |uploaded: Uploaded| {
        let keys = [uploaded.master_key, uploaded.self_signing_key, uploaded.user_signing_key];
        keys.into_iter().flatten().all(|key| key.is_well_formed())
    };
    serde_json::from_slice(wish.body).is_ok_and(is_well_formed)
}
