//! Room versions: those that this server speaks, and the rules of each.

use ruma::{RoomId, RoomVersionId, api::error::ErrorKind, room_version_rules::RoomVersionRules};

use crate::error::Refusal;

/// The lowest room version that is spoken.
pub const LOWEST: u8 = 1;
/// The highest room version that is spoken.
pub const HIGHEST: u8 = 12;

static RULES: [RoomVersionRules; 12] = [
    RoomVersionRules::V1,
    RoomVersionRules::V2,
    RoomVersionRules::V3,
    RoomVersionRules::V4,
    RoomVersionRules::V5,
    RoomVersionRules::V6,
    RoomVersionRules::V7,
    RoomVersionRules::V8,
    RoomVersionRules::V9,
    RoomVersionRules::V10,
    RoomVersionRules::V11,
    RoomVersionRules::V12,
];

/// Finds the rules of a version; `None` for one whose events this server cannot judge.
pub fn find_rules(version: u8) -> Option<&'static RoomVersionRules> {
    RULES.get(usize::from(version.checked_sub(LOWEST)?))
}

/// The last room version whose numbers are not held to those of canonical JSON.
const LARGE_NUMBERS_UPTO: u8 = 5;

/// Gives the greatest depth that an event of this version may state: where a room has reached it, further events stay there.
///
/// Specification: server-server API, "PDUs", and `depth` in the event formats of the room versions.
pub fn depth_max(version: u8) -> u64 {
    if version <= LARGE_NUMBERS_UPTO { (1 << 63) - 1 } else { (1 << 53) - 1 }
}

/// The last room version whose types and state keys are counted in characters.
const CHARACTERS_UPTO: u8 = 10;

/// Whether the type and the state key of an event from elsewhere are measured in bytes, as the specification says, or in characters: in
/// rooms of the older versions servers have always taken those with more bytes, and whoever refused one would not follow the room.
pub fn are_names_in_bytes(version: u8) -> bool {
    version > CHARACTERS_UPTO
}

/// Whether a room of this version may have this id. Since room version 12 an id is the hash of the room's create event and names no
/// server; before, it names the server that made the room.
pub fn may_have_id(version: u8, id: &RoomId) -> bool {
    let is_hash = |rules: &RoomVersionRules| rules.authorization.room_create_event_id_as_room_id;
    find_rules(version).is_some_and(|rules| is_hash(rules) == id.server_name().is_none())
}

/// Finds the number of a version; `None` for one that this server does not speak.
pub fn number(version: &RoomVersionId) -> Option<u8> {
    let number: u8 = version.as_str().parse().ok()?;
    // The names of versions are opaque: "012" is another version than "12".
    ((LOWEST..=HIGHEST).contains(&number) && number.to_string() == version.as_str()).then_some(number)
}

/// Gives the number and the rules of a version that this server speaks. Errors: 400 `M_UNSUPPORTED_ROOM_VERSION`.
pub fn require(version: &RoomVersionId) -> Result<(u8, &'static RoomVersionRules), Refusal> {
    let spoken = number(version).and_then(|number| Some((number, find_rules(number)?)));
    spoken.ok_or_else(|| unsupported(version.as_str()))
}

/// The refusal of a version that this server does not speak: 400 `M_UNSUPPORTED_ROOM_VERSION`.
pub fn unsupported(version: &str) -> Refusal {
    let message = format!("This server does not speak room version {version:.32}.");
    Refusal::new(ErrorKind::UnsupportedRoomVersion, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_has_the_rules_ruma_has_for_it() {
        for version in LOWEST..=HIGHEST {
            let id = RoomVersionId::try_from(version.to_string().as_str()).unwrap();
            assert_eq!(number(&id), Some(version));
            assert_eq!(format!("{:?}", find_rules(version).unwrap()), format!("{:?}", id.rules().unwrap()));
        }
    }

    #[test]
    fn other_versions_are_unknown() {
        for id in ["0", "13", "012", "01", "org.example.test"] {
            assert_eq!(number(&RoomVersionId::try_from(id).unwrap()), None, "{id}");
        }
        assert!([0, 13].into_iter().all(|version| find_rules(version).is_none()));
    }
}
