//! Deciding what a document that came in changes in the cache of keys.
//!
//! The server itself says which of its keys are in use: what it serves over TLS always counts. A document from a notary may be one
//! that somebody kept, to bring a key back that the server has given up: it changes only what it is not older than.
//!
//! Every key that the cache holds as one in use is named in the stored document. So that document is enough to find those that
//! its successor does not name any more.

use std::collections::BTreeSet;

use ruma::{OwnedServerSigningKeyId, ServerName};

use crate::{
    json::Json,
    keys::{Purpose, document::Checked},
    ports::{KeyStore, StoreFailed, StoredDocument, StoredKey},
};

type Keys = Vec<(OwnedServerSigningKeyId, StoredKey)>;

/// Stores a document that the server itself has just served, and ends the use of all keys that it does not use any more.
pub(super) async fn keep_direct(
    store: &dyn KeyStore,
    server: &ServerName,
    checked: Checked,
) -> Result<(), StoreFailed> {
    let before = store.find_document(server).await?;
    replace(store, server, before.as_ref(), checked).await
}

/// Stores what a notary sent. A document is an old one if it ends earlier than the stored one, or uses a key that has been given
/// up, or another key in place of one that is valid. The keys of an old one are good for events of its time alone.
pub(super) async fn keep_from_notary(
    store: &dyn KeyStore,
    server: &ServerName,
    checked: Checked,
) -> Result<(), StoreFailed> {
    let Checked { keys, document } = checked;
    let now_ms = document.fetched_ms;
    let before = store.find_document(server).await?;
    let mut is_old = before.as_ref().is_some_and(|it| it.valid_until_ms > document.valid_until_ms);
    let mut unknown = Vec::new();
    for (key_id, key) in &keys {
        let Some(known) = store.find_key(server, key_id).await? else {
            unknown.push((key_id.clone(), ended(key.clone(), now_ms)));
            continue;
        };
        let is_given_up = known.expired_ms.is_some() && key.expired_ms.is_none();
        let is_other = known.public_key != key.public_key && Purpose::Request.accepts(&known, now_ms);
        is_old |= is_given_up || is_other;
    }
    if is_old {
        return store.put_keys(server, unknown).await;
    }
    replace(store, server, before.as_ref(), Checked { keys, document }).await
}

async fn replace(
    store: &dyn KeyStore,
    server: &ServerName,
    before: Option<&StoredDocument>,
    checked: Checked,
) -> Result<(), StoreFailed> {
    let Checked { mut keys, document } = checked;
    let named: BTreeSet<_> = keys.iter().map(|(key_id, _)| key_id.clone()).collect();
    let mut left: Keys = Vec::new();
    for key_id in before.map(in_use).unwrap_or_default() {
        if !named.contains(&key_id)
            && let Some(key) = store.find_key(server, &key_id).await?
        {
            left.push((key_id, ended(key, document.fetched_ms)));
        }
    }
    keys.extend(left);
    store.put_keys(server, keys).await?;
    store.put_document(server, document).await
}

/// The key as one that is not used any more. It is good for no events that it was not good for before.
fn ended(mut key: StoredKey, now_ms: u64) -> StoredKey {
    key.expired_ms.get_or_insert(now_ms.min(key.valid_until_ms));
    key
}

/// The ids of the keys that a stored document uses.
fn in_use(document: &StoredDocument) -> Vec<OwnedServerSigningKeyId> {
    let json = Json::parse(document.json.as_bytes()).ok();
    let keys = json.as_ref().and_then(|it| it.field("verify_keys")).and_then(Json::as_object);
    keys.into_iter()
        .flatten()
        .filter_map(|(id, _)| OwnedServerSigningKeyId::try_from(id.as_str()).ok())
        .collect()
}
