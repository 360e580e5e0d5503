//! Keys of devices, kept for others: identity keys, one-time keys (each given once), fallback keys.
//!
//! Specification: client-server API, "End-to-End Encryption", "Key management API".

#[cfg(test)]
mod model;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use ruma::{DeviceId, UserId};
use serde::Deserialize;
use serde_json::{Map, Value, value::RawValue};
use sha2::{Digest, Sha256};

use crate::{
    error::{Refusal, Result},
    ids::{DeviceNum, UserNum},
    schema::{
        self,
        encryption::{FallbackRow, KeyCounts, SignatureRow},
    },
    store::{Batch, Direction, Fault, LogEntry, Read, key::Json},
};

/// The identity keys of a device have at most this many bytes of JSON.
pub const DEVICE_KEYS_BYTES_MAX: usize = 32 << 10;
/// A one-time or fallback key has at most this many bytes of JSON.
pub const KEY_BYTES_MAX: usize = 4 << 10;
/// A device keeps at most this many unclaimed one-time keys here, over all algorithms.
pub const ONE_TIME_KEYS_MAX: u64 = 1_000;
/// At least this many given one-time keys of a device are remembered: the newest ones. A client that did not
/// get the answer to an upload uploads the same keys again, and it uploads no more at once than a device keeps here.
const GIVEN_KEYS_KEPT: usize = ONE_TIME_KEYS_MAX as usize;
/// A device keeps at most this many fallback keys here: one for each algorithm.
const FALLBACK_KEYS_MAX: usize = 10;
/// The algorithm and the id of a key together have at most this many bytes.
const KEY_ID_BYTES_MAX: usize = 255;

/// A device of this server.
pub type Owner = (UserNum, DeviceNum);

/// Keys by algorithm and id (`signed_curve25519:AAAAHg`), each as the JSON that it came as.
pub type Keys = BTreeMap<String, Box<RawValue>>;

/// Refuses JSON that is not the identity keys of this device. Errors: 400 for a missing or wrong field, 413 if it is too large.
pub fn check_device_keys(keys: &RawValue, user_id: &UserId, device_id: &DeviceId) -> Result<()> {
    /// The fields that the specification requires of identity keys.
    #[derive(Deserialize)]
    struct Named {
        user_id: String,
        device_id: String,
        #[serde(rename = "algorithms")]
        _algorithms: Vec<String>,
        #[serde(rename = "keys")]
        _keys: BTreeMap<String, String>,
        #[serde(rename = "signatures")]
        _signatures: BTreeMap<String, BTreeMap<String, String>>,
    }
    if keys.get().len() > DEVICE_KEYS_BYTES_MAX {
        return Err(Refusal::too_large("The keys of a device have at most 32 KiB.").into());
    }
    let named: Named = serde_json::from_str(keys.get())
        .map_err(|why| Refusal::bad_json(format!("These are not the keys of a device: {why}.")))?;
    if named.user_id != user_id.as_str() || named.device_id != device_id.as_str() {
        return Err(Refusal::invalid_param(
            "`user_id` and `device_id` of `device_keys` must name your own device.",
        )
        .into());
    }
    Ok(())
}

/// Stores the identity keys of a device, and answers whether others must ask for them again. The caller holds the user's lock.
///
/// A device that has new keys under its old id cannot use one-time and fallback keys that were made for the old ones. These
/// are deleted, so that nobody begins a session that the device cannot read. Which keys were given is still known.
pub fn put_device_keys(batch: &mut Batch, owner: Owner, keys: &RawValue) -> Result<bool, Fault> {
    if let Some(before) = schema::DEVICE_KEYS.get(batch, owner)? {
        let (mut before, mut now) = (parse(&before), parse(keys.get().as_bytes()));
        keep_own_signature(&mut before);
        keep_own_signature(&mut now);
        if without(&before, &["unsigned"]) == without(&now, &["unsigned"]) {
            return Ok(false);
        }
        if before.get("keys") != now.get("keys") {
            tracing::debug!(user = %owner.0, device = %owner.1, reason = "new identity keys", "one-time and fallback keys are deleted");
            delete_one_time_and_fallback(batch, owner)?;
        }
    }
    schema::DEVICE_KEYS.put(batch, owner, &Bytes::copy_from_slice(keys.get().as_bytes()));
    Ok(true)
}

/// Reads a key as JSON. Other bytes were refused when they came; should there be any, they are equal only to themselves.
fn parse(key: &[u8]) -> Value {
    serde_json::from_slice(key).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(key).into_owned()))
}

/// Takes all signatures out of identity keys but the device's own. A user's other keys sign by requests of their own, which are judged; whatever
/// else stands there is a word that nobody here can vouch for.
fn keep_own_signature(keys: &mut Value) {
    let text = |field: &str| keys.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (user_id, device_id) = (text("user_id"), text("device_id"));
    let Some(signatures) = keys.get_mut("signatures").and_then(Value::as_object_mut) else { return };
    signatures.retain(|by, _| *by == user_id);
    if let Some(own) = signatures.get_mut(&user_id).and_then(Value::as_object_mut) {
        own.retain(|key_id, _| key_id.split_once(':').is_some_and(|(_, of)| of == device_id));
    }
}

/// The key without these fields, for a comparison.
fn without(key: &Value, fields: &[&str]) -> Value {
    let mut key = key.clone();
    if let Some(object) = key.as_object_mut() {
        for field in fields {
            object.remove(*field);
        }
    }
    key
}

/// Whether two one-time or fallback keys are the same key. They are compared as JSON, in which the order of fields does not
/// count, and without signatures, which may be renewed.
fn is_same_key(one: &[u8], other: &[u8]) -> bool {
    one == other || unsigned(one) == unsigned(other)
}

/// The part of a key that makes it this key and no other.
fn unsigned(key: &[u8]) -> Value {
    without(&parse(key), &["signatures", "unsigned"])
}

/// A digest by which a key that was given is known again.
fn digest(key: &[u8]) -> Bytes {
    Bytes::copy_from_slice(&Sha256::digest(unsigned(key).to_string()))
}

/// Deletes the keys of a device that may still be given. What was given stays known, because the device may take its old identity again.
fn delete_one_time_and_fallback(batch: &mut Batch, owner: Owner) -> Result<(), Fault> {
    let Some(Json(counts)) = schema::KEY_COUNTS.get(batch, owner)? else { return Ok(()) };
    schema::ONE_TIME_KEYS.delete_prefix::<Owner>(batch, owner);
    schema::FALLBACK_KEYS.delete_prefix::<Owner>(batch, owner);
    let counts = KeyCounts { given: counts.given, ..KeyCounts::default() };
    schema::KEY_COUNTS.put(batch, owner, &Json(counts));
    batch.position(&LogEntry::Device { user: owner.0 });
    Ok(())
}

/// Deletes the one-time and fallback keys of a device that are not to be kept; `is_kept` sees the algorithm and the JSON of a key. The device
/// learns from the counts that it has to upload others. The caller holds the user's lock.
pub fn retain(batch: &mut Batch, owner: Owner, is_kept: impl Fn(&str, &[u8]) -> bool) -> Result<(), Fault> {
    let mut counts = counts(batch, owner)?;
    let one_time = schema::ONE_TIME_KEYS.prefix::<Owner>(batch, owner, Direction::Up)?;
    let one_time = one_time.collect::<Result<Vec<_>, _>>()?;
    let fallback = schema::FALLBACK_KEYS.prefix::<Owner>(batch, owner, Direction::Up)?;
    let fallback = fallback.collect::<Result<Vec<_>, _>>()?;
    let mut deleted = 0;
    for ((user, device, algorithm, position, id), key) in one_time {
        if !is_kept(&algorithm, &key) {
            schema::ONE_TIME_KEYS.delete(batch, (user, device, algorithm.as_str(), position, id.as_str()));
            count_down(&mut counts, &algorithm);
            deleted += 1;
        }
    }
    for ((user, device, algorithm), Json(row)) in fallback {
        if !is_kept(&algorithm, row.key.as_bytes()) {
            schema::FALLBACK_KEYS.delete(batch, (user, device, algorithm.as_str()));
            counts.unused_fallback.remove(&algorithm);
            deleted += 1;
        }
    }
    if deleted > 0 {
        tracing::debug!(user = %owner.0, device = %owner.1, deleted, "keys that the device should have signed are deleted");
        schema::KEY_COUNTS.put(batch, owner, &Json(counts));
        batch.position(&LogEntry::Device { user: owner.0 });
    }
    Ok(())
}

/// Counts one key of an algorithm less. No algorithm is named of which nothing is left, for a device may think of ever new ones.
fn count_down(counts: &mut KeyCounts, algorithm: &str) {
    if let Some(left) = counts.one_time.get_mut(algorithm) {
        *left = left.saturating_sub(1);
        if *left == 0 {
            counts.one_time.remove(algorithm);
        }
    }
}

/// The identity keys of a device with its own signature, the name that its owner gave it, and the signature of its user's self-signing key as
/// that was judged.
pub fn find_device_keys(
    read: &(impl Read + ?Sized),
    (user_id, owner): (&UserId, Owner),
    display_name: Option<&str>,
) -> Result<Option<Value>, Fault> {
    let Some(keys) = schema::DEVICE_KEYS.get(read, owner)? else { return Ok(None) };
    let mut shown = Value::Object(show(&keys, display_name)?);
    keep_own_signature(&mut shown);
    if let (Some(shown), Some(Json(SignatureRow { key_id, signature }))) =
        (shown.as_object_mut(), schema::DEVICE_SIGNED.get(read, owner)?)
    {
        // Both are objects, as was checked when the keys came.
        let all = shown.entry("signatures").or_insert_with(|| Value::Object(Map::new())).as_object_mut();
        let of_user = all.map(|all| all.entry(user_id.as_str()).or_insert_with(|| Value::Object(Map::new())));
        if let Some(of_user) = of_user.and_then(Value::as_object_mut) {
            of_user.insert(key_id, signature.into());
        }
    }
    Ok(Some(shown))
}

/// The identity keys of a device that stand in a row, with the name that its owner gave it.
pub fn show(keys: &[u8], display_name: Option<&str>) -> Result<Map<String, Value>, Fault> {
    let mut keys: Map<String, Value> =
        serde_json::from_slice(keys).map_err(|_| Fault::Corrupt("the keys of a device are not JSON"))?;
    let mut unsigned = Map::new();
    if let Some(name) = display_name {
        unsigned.insert("device_display_name".to_owned(), name.into());
    }
    // The device may have uploaded anything as `unsigned`, so only the server's own fields are shown.
    keys.insert("unsigned".to_owned(), Value::Object(unsigned));
    Ok(keys)
}

/// The number of a device's one-time keys that are left, and its unused fallback keys.
pub fn counts(read: &(impl Read + ?Sized), owner: Owner) -> Result<KeyCounts, Fault> {
    Ok(schema::KEY_COUNTS.get(read, owner)?.map(|Json(counts)| counts).unwrap_or_default())
}

fn split(id: &str) -> Result<(&str, &str)> {
    let parts = id.split_once(':').filter(|(algorithm, id)| !algorithm.is_empty() && !id.is_empty());
    let is_plain =
        |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    match parts {
        Some(parts) if id.len() <= KEY_ID_BYTES_MAX && is_plain(parts.0) => Ok(parts),
        _ => Err(Refusal::invalid_param("The id of a key is algorithm:id, of at most 255 bytes.").into()),
    }
}

fn check_key(key: &RawValue) -> Result<()> {
    if key.get().len() > KEY_BYTES_MAX {
        return Err(Refusal::too_large("A key has at most 4 KiB.").into());
    }
    if !key.get().starts_with(['{', '"']) {
        return Err(Refusal::bad_json("A key is an object or text.").into());
    }
    Ok(())
}

/// The keys of a device that are known, each by its algorithm and its digest. The id does not count, because a key is the same
/// one under any id.
type KnownKeys = BTreeSet<(String, Bytes)>;

/// Lists the keys of a device that were given, with the number of their rows. Forgets those that were uploaded
/// so long ago that no client uploads them again.
fn list_given(batch: &mut Batch, owner: Owner) -> Result<(KnownKeys, u64), Fault> {
    let rows = schema::GIVEN_KEYS.prefix::<Owner>(batch, owner, Direction::Up)?;
    let mut rows = rows.collect::<Result<Vec<_>, _>>()?;
    rows.sort_by_key(|((_, _, _, position, _), _)| std::cmp::Reverse(*position));
    for ((user, device, algorithm, position, id), _) in rows.iter().skip(GIVEN_KEYS_KEPT) {
        schema::GIVEN_KEYS.delete(batch, (*user, *device, algorithm.as_str(), *position, id.as_str()));
    }
    rows.truncate(GIVEN_KEYS_KEPT);
    let count = rows.len() as u64;
    Ok((rows.into_iter().map(|((_, _, algorithm, ..), digest)| (algorithm, digest)).collect(), count))
}

/// Stores one-time keys. The same key is stored once, under whichever id, and not again after it was given to somebody,
/// because nobody else may get it. The caller holds the user's lock. Errors: 400 for
/// another key under an id that is in use, 413 for too many or too large keys.
pub fn put_one_time_keys(batch: &mut Batch, owner: Owner, keys: &Keys) -> Result<()> {
    if keys.is_empty() {
        return Ok(());
    }
    let (mut by_id, mut stored) = (BTreeMap::new(), KnownKeys::new());
    for row in schema::ONE_TIME_KEYS.prefix::<(UserNum, DeviceNum)>(batch, owner, Direction::Up)? {
        let ((_, _, algorithm, _, id), key) = row?;
        stored.insert((algorithm.clone(), digest(&key)));
        by_id.insert(format!("{algorithm}:{id}"), key);
    }
    let (given, given_count) = list_given(batch, owner)?;
    let mut counts = counts(batch, owner)?;
    counts.given = given_count;
    let mut position = None;
    for (full_id, key) in keys {
        let (algorithm, id) = split(full_id)?;
        check_key(key)?;
        let known = (algorithm.to_owned(), digest(key.get().as_bytes()));
        match by_id.get(full_id) {
            Some(before) if is_same_key(before, key.get().as_bytes()) => {}
            Some(_) => {
                let why = format!("There is another one-time key {full_id} already.");
                return Err(Refusal::invalid_param(why).into());
            }
            None if given.contains(&known) || stored.contains(&known) => {
                let (user, device) = owner;
                let reason = if given.contains(&known) { "given already" } else { "stored under another id" };
                tracing::debug!(%user, %device, reason, "a one-time key is not stored again");
            }
            None => {
                let log = &LogEntry::Device { user: owner.0 };
                let position = *position.get_or_insert_with(|| batch.position(log));
                let value = Bytes::copy_from_slice(key.get().as_bytes());
                schema::ONE_TIME_KEYS.put(batch, (owner.0, owner.1, algorithm, position, id), &value);
                *counts.one_time.entry(algorithm.to_owned()).or_default() += 1;
                stored.insert(known);
            }
        }
    }
    if counts.one_time.values().sum::<u64>() > ONE_TIME_KEYS_MAX {
        return Err(Refusal::too_large("A device keeps at most 1,000 one-time keys here.").into());
    }
    schema::KEY_COUNTS.put(batch, owner, &Json(counts));
    Ok(())
}

/// Stores fallback keys, in place of those of the same algorithms. The caller holds the user's lock.
pub fn put_fallback_keys(batch: &mut Batch, owner: Owner, keys: &Keys) -> Result<()> {
    if keys.is_empty() {
        return Ok(());
    }
    let mut counts = counts(batch, owner)?;
    let mut algorithms = BTreeSet::new();
    for (full_id, key) in keys {
        let (algorithm, id) = split(full_id)?;
        check_key(key)?;
        if !algorithms.insert(algorithm) {
            return Err(Refusal::invalid_param("An algorithm has one fallback key.").into());
        }
        let row = FallbackRow { id: id.to_owned(), key: key.get().to_owned() };
        let at = (owner.0, owner.1, algorithm);
        // A key that is uploaded again may have been given already, so it does not become an unused one.
        let is_same = |before: &FallbackRow| {
            before.id == row.id && is_same_key(before.key.as_bytes(), row.key.as_bytes())
        };
        if schema::FALLBACK_KEYS.get(batch, at)?.is_some_and(|Json(before)| is_same(&before)) {
            continue;
        }
        schema::FALLBACK_KEYS.put(batch, at, &Json(row));
        counts.unused_fallback.insert(algorithm.to_owned());
    }
    let kept = schema::FALLBACK_KEYS.prefix::<(UserNum, DeviceNum)>(batch, owner, Direction::Up)?;
    if kept.take(FALLBACK_KEYS_MAX + 1).count() > FALLBACK_KEYS_MAX {
        return Err(Refusal::too_large("A device keeps at most 10 fallback keys here.").into());
    }
    schema::KEY_COUNTS.put(batch, owner, &Json(counts));
    Ok(())
}

/// Takes the oldest one-time key of this algorithm, which is never given again, or the fallback key if none is left. Answers
/// the key's whole id and its JSON. The caller holds the lock of the owner's user.
pub fn claim(batch: &mut Batch, owner: Owner, algorithm: &str) -> Result<Option<(String, Bytes)>, Fault> {
    let first = {
        let prefix = (owner.0, owner.1, algorithm);
        let mut keys =
            schema::ONE_TIME_KEYS.prefix::<(UserNum, DeviceNum, String)>(batch, prefix, Direction::Up)?;
        keys.next().transpose()?
    };
    if let Some(((.., position, id), key)) = first {
        let at = (owner.0, owner.1, algorithm, position, id.as_str());
        schema::ONE_TIME_KEYS.expect_value(batch, at, &key);
        schema::ONE_TIME_KEYS.delete(batch, at);
        schema::GIVEN_KEYS.put(batch, at, &digest(&key));
        let mut counts = counts(batch, owner)?;
        count_down(&mut counts, algorithm);
        counts.given += 1;
        schema::KEY_COUNTS.put(batch, owner, &Json(counts));
        batch.position(&LogEntry::Device { user: owner.0 });
        return Ok(Some((format!("{algorithm}:{id}"), key)));
    }
    let Some(Json(fallback)) = schema::FALLBACK_KEYS.get(batch, (owner.0, owner.1, algorithm))? else {
        return Ok(None);
    };
    let mut counts = counts(batch, owner)?;
    if counts.unused_fallback.remove(algorithm) {
        schema::KEY_COUNTS.put(batch, owner, &Json(counts));
        batch.position(&LogEntry::Device { user: owner.0 });
    }
    Ok(Some((format!("{algorithm}:{}", fallback.id), fallback.key.into())))
}

/// Deletes all keys of ended devices, from the first to the last number.
pub fn sweep(batch: &mut Batch, user: UserNum, (first, last): (DeviceNum, DeviceNum)) {
    let (low, high) = ((user, first), (user, DeviceNum(last.0.saturating_add(1))));
    schema::DEVICE_KEYS.delete_below::<Owner, Owner>(batch, low, high);
    schema::ONE_TIME_KEYS.delete_below::<Owner, Owner>(batch, low, high);
    schema::GIVEN_KEYS.delete_below::<Owner, Owner>(batch, low, high);
    schema::FALLBACK_KEYS.delete_below::<Owner, Owner>(batch, low, high);
    schema::KEY_COUNTS.delete_below::<Owner, Owner>(batch, low, high);
}

/// All devices that keep keys here, with the number of one-time keys that each has left.
pub fn list_owners(read: &(impl Read + ?Sized)) -> Result<Vec<(Owner, usize)>, Fault> {
    let rows = schema::KEY_COUNTS.prefix::<()>(read, (), Direction::Up)?;
    let rows = rows.map(|row| {
        let (owner, Json(counts)) = row?;
        Ok((owner, counts.one_time.values().sum::<u64>() as usize))
    });
    rows.collect()
}

/// Treats all keys that this device has uploaded as given, because some may have been: its one-time keys are known as those that were, so
/// that none is taken when its upload is repeated, and its fallback keys count as used.
pub fn treat_all_as_given(batch: &mut Batch, owner: Owner) -> Result<(), Fault> {
    let rows = schema::ONE_TIME_KEYS.prefix::<Owner>(batch, owner, Direction::Up)?;
    let rows = rows.collect::<Result<Vec<_>, _>>()?;
    let mut counts = counts(batch, owner)?;
    counts.given += rows.len() as u64;
    for ((user, device, algorithm, position, id), key) in rows {
        let at = (user, device, algorithm.as_str(), position, id.as_str());
        schema::GIVEN_KEYS.put(batch, at, &digest(&key));
    }
    schema::ONE_TIME_KEYS.delete_prefix::<Owner>(batch, owner);
    counts.one_time.clear();
    counts.unused_fallback.clear();
    schema::KEY_COUNTS.put(batch, owner, &Json(counts));
    batch.position(&LogEntry::Device { user: owner.0 });
    Ok(())
}
