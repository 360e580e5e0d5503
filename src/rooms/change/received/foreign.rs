//! Events of other rooms. One of this room that names such an event among those that allow it is rejected for that (room versions,
//! "Authorization rules"), so that it need not wait for an event that never comes into this room.

use std::{borrow::Cow, collections::BTreeSet};

use ruma::OwnedEventId;
use serde::Deserialize;

use super::{Change, Outcome, Received, found, signed};
use crate::{
    error::Result,
    rooms::{event, reference, versions},
    schema::rooms::{EventKey, RoomRow},
};

/// The room versions from which on an event has another id than before: it is written otherwise, or other fields are hashed.
const DIFFERING: [u8; 6] = [3, 4, 6, 8, 9, 11];

/// Lists the ids that an event has which says that it is of another room than this one: one for each way to name an event by its
/// hash, because the version of its room is not known here. What has such an id is of that room, whoever gives it and whether or not
/// anybody signed it. There is none for an event of this room, nor where servers choose ids, which prove nothing.
pub fn list_ids_elsewhere(room: &RoomRow, json: &[u8]) -> BTreeSet<OwnedEventId> {
    #[derive(Deserialize)]
    struct Placed<'a> {
        #[serde(borrow)]
        room_id: Cow<'a, str>,
    }
    let placed: Option<Placed<'_>> = serde_json::from_slice(json).ok();
    let is_elsewhere = placed.is_some_and(|placed| placed.room_id != room.id.as_str());
    if !is_elsewhere || event::are_ids_chosen(room.version) {
        return BTreeSet::new();
    }
    let id = |version: u8| {
        let rules = versions::find_rules(version)?;
        let whole = signed::canonical(json, version).ok()?;
        let key = EventKey::of_hash(reference::hash(whole.as_bytes(), rules)?)?;
        Some(event::event_id(&key, version))
    };
    DIFFERING.into_iter().filter_map(id).collect()
}

impl Change {
    /// Keeps an event as one that is rejected, because an event that it names among those that allow it is of another room.
    pub fn reject_for_other_room(&mut self, received: &Received) -> Result<Outcome> {
        if let Some((known, outlier)) = self.find_received(received)? {
            let is_rejected = outlier.is_some_and(|outlier| outlier.rejected);
            return Ok(if is_rejected { Outcome::Outlier(known) } else { Outcome::Known(known) });
        }
        let known = self.known_auth_events(received.event())?;
        let auth: Vec<_> = received.event().auth.iter().filter_map(|id| found(&known, id)).collect();
        let why = "an event that it names among those that allow it is of another room";
        tracing::debug!(room = %self.num, event = %received.id(), why, "an event is rejected");
        self.put_outlier(received, &auth, Some(why.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::schema::rooms::Resident;

    #[test]
    fn an_event_of_another_room_is_known_by_its_hash_in_each_version() {
        let of = |room: &str, version| RoomRow::new(room.try_into().unwrap(), version, Resident::Yes);
        for kind in ["m.room.member", "m.room.aliases", "m.room.join_rules", "m.room.create", "m.x"] {
            let event = json!({
                "type": kind, "state_key": "@a:x", "sender": "@a:x", "room_id": "!there:x", "depth": 3,
                "prev_events": [], "auth_events": [], "origin_server_ts": 1, "hashes": { "sha256": "x" },
                "content": { "membership": "join", "aliases": [], "allow": [], "creator": "@a:x", "x": 1,
                    "join_authorised_via_users_server": "@b:x" },
                "origin": "x", "membership": "join", "unsigned": { "age": 1 },
            })
            .to_string();
            let ids = list_ids_elsewhere(&of("!here:x", 10), event.as_bytes());
            for version in 3..=versions::HIGHEST {
                let whole = signed::canonical(event.as_bytes(), version).unwrap();
                let rules = versions::find_rules(version).unwrap();
                let hash = reference::hash(whole.as_bytes(), rules).unwrap();
                let id = event::event_id(&EventKey::of_hash(hash).unwrap(), version);
                assert!(ids.contains(&id), "{kind} in version {version}");
            }
            assert!(list_ids_elsewhere(&of("!there:x", 10), event.as_bytes()).is_empty());
            assert!(list_ids_elsewhere(&of("!here:x", 2), event.as_bytes()).is_empty());
        }
        assert!(list_ids_elsewhere(&of("!here:x", 10), b"[]").is_empty());
    }
}
