//! Checking the document in which another server publishes its keys
//! ([publishing keys](https://spec.matrix.org/v1.19/server-server-api/#publishing-keys)).
//!
//! A key is believed if the document is signed with it: so nobody can claim a key that is not theirs. Numbers and
//! names in it may be anything; what makes no sense is left out, or the document is refused.

use std::collections::BTreeMap;

use ruma::{
    OwnedServerSigningKeyId, ServerName, SigningKeyAlgorithm,
    serde::{Base64, base64::Standard},
};

use crate::{
    json::{Canonical, Json, NotJson},
    keys::{PublicKey, VALID_MAX_MS, is_signed},
    ports::{StoredDocument, StoredKey},
};

/// A document with more keys than this, of either kind, is refused: each takes a row of the cache.
pub const KEYS_MAX: usize = 100;

/// A document that is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    /// It is no JSON.
    #[error(transparent)]
    Json(#[from] NotJson),
    /// It is another server's.
    #[error("server_name is not the server that was asked")]
    Server,
    /// A field is missing, or not what it should be.
    #[error("{0} is missing or makes no sense")]
    Field(&'static str),
    /// It has too many keys.
    #[error("it has more than {KEYS_MAX} keys")]
    TooMany,
    /// None of its keys signed it.
    #[error("it is not signed with any of its keys")]
    Unsigned,
}

/// A document whose keys are believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// Its keys, as they are stored.
    pub keys: Vec<(OwnedServerSigningKeyId, StoredKey)>,
    /// The document, as it is stored.
    pub document: StoredDocument,
}

/// Checks a document that was fetched now. Errors: [`Wrong`].
pub fn check(server: &ServerName, json: &Json, now_ms: u64) -> Result<Checked, Wrong> {
    if json.field("server_name").and_then(Json::as_text) != Some(server.as_str()) {
        return Err(Wrong::Server);
    }
    let valid_until_ms = json.field("valid_until_ts").and_then(Json::as_ms);
    let valid_until_ms = valid_until_ms.ok_or(Wrong::Field("valid_until_ts"))?;
    let valid_until_ms = valid_until_ms.min(now_ms.saturating_add(VALID_MAX_MS));
    let none = BTreeMap::new();
    let current = json.field("verify_keys").and_then(Json::as_object).ok_or(Wrong::Field("verify_keys"))?;
    let old = match json.field("old_verify_keys") {
        Some(old) => old.as_object().ok_or(Wrong::Field("old_verify_keys"))?,
        None => &none,
    };
    if current.len() > KEYS_MAX || old.len() > KEYS_MAX {
        return Err(Wrong::TooMany);
    }
    let text = json.signed_part();
    let stored =
        |public_key, expired_ms| StoredKey { public_key, valid_until_ms, expired_ms, fetched_ms: now_ms };
    let mut keys: BTreeMap<_, _> = BTreeMap::new();
    for (key_id, public_key) in current.iter().filter_map(|(key_id, key)| parse_key(key_id, key)) {
        if is_signed_with(json, &text, server, key_id.as_str(), &public_key) {
            keys.insert(key_id, stored(public_key, None));
        }
    }
    if keys.is_empty() {
        return Err(Wrong::Unsigned);
    }
    for (name, key) in old {
        let expired_ms = key.field("expired_ts").and_then(Json::as_ms);
        if let (Some((key_id, public_key)), Some(expired_ms)) = (parse_key(name, key), expired_ms) {
            // A key that is in use, too, is in use. Nobody stops using a key in the future.
            keys.entry(key_id).or_insert_with(|| stored(public_key, Some(expired_ms.min(now_ms))));
        }
    }
    let json = String::from(json.canonical());
    let document = StoredDocument { json, valid_until_ms, fetched_ms: now_ms };
    Ok(Checked { keys: keys.into_iter().collect(), document })
}

/// The signatures of this server, by the ids of the keys.
pub(super) fn signatures_of<'j>(
    json: &'j Json,
    server: &ServerName,
) -> impl Iterator<Item = (&'j str, &'j str)> {
    let signatures =
        json.field("signatures").and_then(|it| it.field(server.as_str())).and_then(Json::as_object);
    let signatures = signatures.into_iter().flatten();
    signatures.filter_map(|(key_id, signature)| Some((key_id.as_str(), signature.as_text()?)))
}

fn is_signed_with(json: &Json, text: &Canonical, server: &ServerName, key_id: &str, key: &PublicKey) -> bool {
    signatures_of(json, server).any(|(id, signature)| id == key_id && is_signed(text, key, signature))
}

/// A key of a kind that we know, with an id that follows the grammar.
fn parse_key(key_id: &str, key: &Json) -> Option<(OwnedServerSigningKeyId, PublicKey)> {
    // The id is part of a row's key.
    if key_id.len() > 255 || !key_id.is_ascii() {
        return None;
    }
    let key_id = OwnedServerSigningKeyId::try_from(key_id).ok()?;
    if key_id.algorithm() != SigningKeyAlgorithm::Ed25519 {
        return None;
    }
    let text = key.field("key")?.as_text().filter(|it| it.len() <= 64)?;
    let bytes = Base64::<Standard>::parse(text).ok()?;
    Some((key_id, bytes.as_bytes().try_into().ok()?))
}
