//! Filters that clients keep here, so that each `/sync` names one instead of bringing it.
//!
//! Specification: client-server API, "Filtering".

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use ruma::api::client::filter::FilterDefinition;
use sha2::{Digest, Sha256};

use crate::{
    error::{Refusal, Result},
    ids::UserNum,
    schema,
    store::{Batch, Direction, Fault, Read},
};

/// A filter is no larger, in bytes.
pub const FILTER_BYTES_MAX: usize = 64 << 10;
/// A user has no more filters.
pub const FILTERS_MAX: usize = 1_000;

/// The filter with this id, as its JSON.
pub fn find(read: &(impl Read + ?Sized), user: UserNum, id: &str) -> Result<Option<Bytes>, Fault> {
    schema::FILTERS.get(read, (user, id))
}

/// The filter with this id. Errors: 404 `M_NOT_FOUND`.
pub fn require(read: &(impl Read + ?Sized), user: UserNum, id: &str) -> Result<Bytes> {
    find(read, user, id)?.ok_or_else(|| Refusal::not_found("You have no such filter.").into())
}

/// What a filter says. Errors: 400 `M_BAD_JSON`.
pub fn read(json: &[u8]) -> Result<FilterDefinition> {
    serde_json::from_slice(json)
        .map_err(|why| Refusal::bad_json(format!("This is not a filter: {why}.")).into())
}

/// Keeps a filter and gives its id, which follows from the user's filter, so that the same filter is kept once. Under the
/// user's lock. Errors: 400 for what is not a filter, 413 for too large or too many.
pub fn put(batch: &mut Batch, user: UserNum, json: Bytes) -> Result<String> {
    if json.len() > FILTER_BYTES_MAX {
        return Err(Refusal::too_large("This filter is too large.").into());
    }
    read(&json)?;
    let digest = Sha256::digest(&json);
    let id: String = URL_SAFE_NO_PAD.encode(digest).chars().take(16).collect();
    if find(batch, user, &id)?.is_none() {
        let kept = schema::FILTERS.prefix::<(UserNum,)>(batch, (user,), Direction::Up)?;
        if kept.take(FILTERS_MAX).count() == FILTERS_MAX {
            return Err(Refusal::too_large("You have too many filters.").into());
        }
        schema::FILTERS.put(batch, (user, id.as_str()), &json);
    }
    Ok(id)
}

/// Deletes all filters of a user, for an account that ends.
pub fn delete_all(batch: &mut Batch, user: UserNum) {
    schema::FILTERS.delete_prefix::<(UserNum,)>(batch, (user,));
}
