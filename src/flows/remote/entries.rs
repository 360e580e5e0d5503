//! Lists in the answers of other servers.

use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

/// Reads the entries of a list. One that cannot be read is left out, so that it spoils nothing for the others.
pub(super) fn readable<'j, T: DeserializeOwned>(list: impl IntoIterator<Item = &'j Box<RawValue>>) -> Vec<T> {
    list.into_iter().filter_map(|entry| serde_json::from_str(entry.get()).ok()).collect()
}
