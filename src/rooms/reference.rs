//! Reference hashes: that of an event says which event it is, whatever of it is redacted (server-server API, "Calculating the
//! reference hash for an event"). From room version 3 on it is the event's id. In versions 1 and 2 servers choose ids, so that two
//! events may have the same one, and an event cites others by their ids and their hashes.
//!
//! The hash beside a cited id is written and carried, and nothing is decided by it: the specification has no rule for one that does
//! not fit. An id means the event of that id that came in first.

use std::{borrow::Cow, collections::BTreeMap};

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use ruma::{OwnedEventId, room_version_rules::RoomVersionRules};
use serde::Deserialize;
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

use crate::{
    ids::{EventNum, RoomNum},
    json::{JsonRef, JsonText, Object},
    rooms::{event, redact, rules},
    schema::rooms::{EventHash, RoomRow},
    store::{Fault, Read},
};

/// The hashes with which events are cited, by id, each in base64, or none where another server that cites the event did not know it.
/// Empty where the room's version cites events by their ids alone.
pub type Hashes = BTreeMap<OwnedEventId, Option<String>>;

/// The hashes of no events, for room versions that cite events by their ids alone.
pub const NO_HASHES: &Hashes = &Hashes::new();

/// The hash beside an id that another server states has at most this many bytes: that of a right one with its padding.
const HASH_BYTES_MAX: usize = 44;

/// Copies an object without these fields.
pub(crate) fn without(object: &str, names: &[&str]) -> serde_json::Result<JsonText> {
    let fields: BTreeMap<Cow<'_, str>, &RawValue> = serde_json::from_str(object)?;
    let mut left = Object::with_capacity(object.len());
    for (name, value) in fields.into_iter().filter(|(name, _)| !names.contains(&&**name)) {
        left.json(&name, JsonRef::from(value));
    }
    Ok(left.finish())
}

/// Gives the part of a redacted event that is signed and hashed.
pub(crate) fn signed_part(redacted: &[u8]) -> serde_json::Result<JsonText> {
    without(JsonRef::stored(redacted).as_str(), &["signatures", "unsigned"])
}

/// Gives the reference hash of an event, redacted or not. `None` if the bytes are not those of an event.
pub fn hash(json: &[u8], rules: &RoomVersionRules) -> Option<EventHash> {
    let redacted = redact::redacted(json, rules)?;
    let signed = signed_part(&redacted).ok()?;
    Some(Sha256::digest(signed.as_str()).into())
}

/// Writes a hash as events cite it.
pub fn encode(hash: &EventHash) -> String {
    STANDARD_NO_PAD.encode(hash)
}

/// Gives the hashes with which a new event of the room cites these ones, all of which are stored.
pub fn list(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    row: &RoomRow,
    events: impl IntoIterator<Item = EventNum>,
) -> Result<Hashes, Fault> {
    let mut hashes = Hashes::new();
    if !event::are_ids_chosen(row.version) {
        return Ok(hashes);
    }
    let rules = rules(row)?;
    for event in events {
        let kept = event::require_kept(read, room, event)?;
        let hash =
            hash(&kept.row.json, rules).ok_or(Fault::Corrupt("an event is not the JSON of an event"))?;
        hashes.insert(kept.id(row), Some(encode(&hash)));
    }
    Ok(hashes)
}

/// Reads how another event is cited: by its id, or in room versions 1 and 2 by its id and its hash, which goes to `hashes`. `None` for
/// what is not in the form of the room's version.
pub fn read_cited(cited: &RawValue, version: u8, hashes: &mut Hashes) -> Option<OwnedEventId> {
    #[derive(Deserialize)]
    struct Hash {
        #[serde(default)]
        sha256: Option<String>,
    }
    if !event::are_ids_chosen(version) {
        let id: OwnedEventId = serde_json::from_str(cited.get()).ok()?;
        return event::parse_event_id(&id, RoomNum::default(), version).map(|_| id);
    }
    let (id, hash): (OwnedEventId, Hash) = serde_json::from_str(cited.get()).ok()?;
    event::parse_event_id(&id, RoomNum::default(), version)?;
    if hash.sha256.as_ref().is_some_and(|hash| hash.len() > HASH_BYTES_MAX) {
        return None;
    }
    let known = hashes.entry(id.clone()).or_default();
    *known = known.take().or(hash.sha256);
    Some(id)
}

/// Writes the list of the events that an event cites, as the room's version has it. `None` where the hash of one is needed and not known.
pub fn cited(ids: &[OwnedEventId], version: u8, hashes: &Hashes) -> Option<JsonText> {
    let mut items = Vec::with_capacity(ids.len());
    for id in ids {
        let name = JsonText::string(id.as_str());
        if !event::are_ids_chosen(version) {
            items.push(name);
            continue;
        }
        let mut hash = Object::new();
        if let Some(sha256) = hashes.get(id)? {
            hash.text("sha256", sha256);
        }
        items.push(JsonText::list(&[name, hash.finish()]));
    }
    Some(JsonText::list(&items))
}
