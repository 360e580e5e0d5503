//! What a client wants to hear of.
//!
//! Specification: client-server API, "Filtering".

use ruma::{
    OwnedRoomId, RoomId,
    api::client::filter::{
        EventFormat, Filter as GlobalFilter, FilterDefinition, LazyLoadOptions, RoomEventFilter,
    },
};

use crate::rooms::{event::Stored, filter};

/// Events of a timeline, unless the client says how many.
const TIMELINE_DEFAULT: usize = 10;
/// Events of a timeline at most.
const TIMELINE_MAX: usize = 1_000;

/// What a client wants to hear of.
#[derive(Clone, Debug)]
pub(crate) struct Filter {
    pub(crate) presence: Global,
    pub(crate) account_data: Global,
    pub(crate) room_account_data: OfRooms,
    pub(crate) ephemeral: OfRooms,
    pub(crate) state: OfRooms,
    pub(crate) timeline: OfRooms,
    pub(crate) timeline_limit: usize,
    pub(crate) include_leave: bool,
    rooms: Option<Vec<OwnedRoomId>>,
    not_rooms: Vec<OwnedRoomId>,
    /// Members are told only of those whose events are shown.
    pub(crate) lazy_members: bool,
    /// And again each time.
    pub(crate) redundant_members: bool,
    /// Unread counts are told by thread.
    pub(crate) thread_counts: bool,
    /// Fields of events; none is all.
    pub(crate) fields: Option<Vec<String>>,
    /// Events as servers see them.
    pub(crate) federation_format: bool,
}

impl Filter {
    pub(crate) fn new(definition: &FilterDefinition) -> Self {
        let room = &definition.room;
        let lazy = |filter: &RoomEventFilter| match filter.lazy_load_options {
            LazyLoadOptions::Enabled { include_redundant_members } => (true, include_redundant_members),
            LazyLoadOptions::Disabled => (false, false),
        };
        let (state_lazy, state_redundant) = lazy(&room.state);
        let (timeline_lazy, timeline_redundant) = lazy(&room.timeline);
        let limit = room
            .timeline
            .limit
            .map_or(TIMELINE_DEFAULT, |limit| usize::try_from(u64::from(limit)).unwrap_or(TIMELINE_MAX));
        Self {
            presence: Global(definition.presence.clone()),
            account_data: Global(definition.account_data.clone()),
            room_account_data: OfRooms(room.account_data.clone()),
            ephemeral: OfRooms(room.ephemeral.clone()),
            state: OfRooms(room.state.clone()),
            timeline: OfRooms(room.timeline.clone()),
            timeline_limit: limit.min(TIMELINE_MAX),
            include_leave: room.include_leave,
            rooms: room.rooms.clone(),
            not_rooms: room.not_rooms.clone(),
            lazy_members: state_lazy || timeline_lazy,
            redundant_members: state_redundant || timeline_redundant,
            thread_counts: room.timeline.unread_thread_notifications,
            fields: definition.event_fields.clone(),
            federation_format: definition.event_format == EventFormat::Federation,
        }
    }

    /// Whether anything of this room is wanted.
    pub(crate) fn wants_room(&self, room: &RoomId) -> bool {
        self.rooms.as_ref().is_none_or(|rooms| rooms.iter().any(|id| id == room))
            && !self.not_rooms.iter().any(|id| id == room)
    }
}

/// Which events without a room are wanted.
#[derive(Clone, Debug)]
pub(crate) struct Global(GlobalFilter);

impl Global {
    pub(crate) fn wants_type(&self, kind: &str) -> bool {
        let any = |patterns: &[String]| patterns.iter().any(|pattern| filter::matches(pattern, kind));
        self.0.types.as_deref().is_none_or(any) && !any(&self.0.not_types)
    }

    pub(crate) fn wants_sender(&self, sender: &str) -> bool {
        self.0.senders.as_ref().is_none_or(|senders| senders.iter().any(|user| user == sender))
            && !self.0.not_senders.iter().any(|user| user == sender)
    }
}

/// Which events of one section of rooms are wanted.
#[derive(Clone, Debug)]
pub(crate) struct OfRooms(RoomEventFilter);

impl OfRooms {
    pub(crate) fn wants_room(&self, room: &RoomId) -> bool {
        filter::allows_room(&self.0, room)
    }

    pub(crate) fn wants_type(&self, kind: &str) -> bool {
        let any = |patterns: &[String]| patterns.iter().any(|pattern| filter::matches(pattern, kind));
        self.0.types.as_deref().is_none_or(any) && !any(&self.0.not_types)
    }

    pub(crate) fn wants(&self, stored: &Stored) -> bool {
        filter::allows(&self.0, stored)
    }
}

/// The event with only these fields (paths with dots; a dot in a name is written `\.`).
pub(crate) fn only_fields(event: &str, fields: &[String]) -> String {
    let Ok(serde_json::Value::Object(whole)) = serde_json::from_str(event) else { return event.to_owned() };
    let mut some = serde_json::Map::new();
    for field in fields {
        copy(&whole, &mut some, &path(field));
    }
    serde_json::Value::Object(some).to_string()
}

fn path(field: &str) -> Vec<String> {
    let mut path = vec![String::new()];
    let mut characters = field.chars();
    while let Some(character) = characters.next() {
        let character = match character {
            '.' => {
                path.push(String::new());
                continue;
            }
            '\\' => characters.next().unwrap_or('\\'),
            other => other,
        };
        if let Some(name) = path.last_mut() {
            name.push(character);
        }
    }
    path
}

type Map = serde_json::Map<String, serde_json::Value>;

fn copy(from: &Map, to: &mut Map, path: &[String]) {
    let Some((name, below)) = path.split_first() else { return };
    let Some(value) = from.get(name) else { return };
    if below.is_empty() {
        to.insert(name.clone(), value.clone());
    } else if let Some(inner) = value.as_object() {
        let slot = to.entry(name.clone()).or_insert_with(|| Map::new().into());
        if let Some(slot) = slot.as_object_mut() {
            copy(inner, slot, below);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_fields_asked_for_are_left() {
        let event = r#"{"type":"t","content":{"body":"b","a.b":1,"c":{"d":2,"e":3}},"sender":"s"}"#;
        let fields: Vec<String> =
            ["type", "content.a\\.b", "content.c.d", "nothing.here"].map(String::from).into();
        let expected = serde_json::json!({ "type": "t", "content": { "a.b": 1, "c": { "d": 2 } } });
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&only_fields(event, &fields)).unwrap(),
            expected
        );
    }
}
