//! The filter of a client, compiled: it says which news the client wants.
//!
//! Specification: client-server API, "Filtering".

use std::collections::HashSet;

use ruma::{
    OwnedRoomId, OwnedUserId, RoomId, UserId,
    api::client::filter::{EventFormat, Filter as GlobalFilter, FilterDefinition},
};

use serde::Deserialize;

use crate::{
    error::Refusal,
    rooms::{
        event::StoredEvent,
        filter::{EventFilter, Related, RelationFilter, Types},
        show::Viewer,
        view::RoomView,
    },
    store::{Fault, Read},
};

/// A timeline has this many events at most, unless the client gives a limit.
const TIMELINE_DEFAULT: usize = 10;
/// A timeline has at most this many events, whatever limit the client gives, because an answer is held in memory.
const TIMELINE_MAX: usize = 1_000;
/// A filter names at most this many fields, because each is looked for in each event.
const FIELDS_MAX: usize = 100;

/// The parts of a filter that speak of relations, which ruma does not read.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Relations {
    room: RelationsOfRooms,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct RelationsOfRooms {
    timeline: RelationFilter,
    state: RelationFilter,
}

impl Relations {
    /// Reads them from the JSON of a filter. Refuses a list that is none: 400 `M_BAD_JSON`.
    pub fn read(json: &[u8]) -> Result<Self, Refusal> {
        serde_json::from_slice(json).map_err(|why| Refusal::bad_json(format!("This is not a filter: {why}.")))
    }
}

/// The filter of a client, ready to be asked about each event.
#[derive(Clone, Debug)]
pub(crate) struct Filter {
    pub(crate) presence: Global,
    pub(crate) account_data: Global,
    pub(crate) room_account_data: OfRooms,
    pub(crate) ephemeral: OfRooms,
    pub(crate) state: OfRooms,
    pub(crate) timeline: OfRooms,
    /// How events of the timeline must relate to others, and those of the state.
    pub(crate) timeline_related: Related,
    pub(crate) state_related: Related,
    pub(crate) timeline_limit: usize,
    pub(crate) include_leave: bool,
    rooms: Option<HashSet<OwnedRoomId>>,
    not_rooms: HashSet<OwnedRoomId>,
    /// Lazy loading: only those members are told whose events are shown.
    pub(crate) lazy_members: bool,
    /// Members are told again in each answer, though the device knows them.
    pub(crate) redundant_members: bool,
    /// Unread counts are told for each thread, and not for the room alone.
    pub(crate) thread_counts: bool,
    /// The fields of events that are told. None means all of them.
    pub(crate) fields: Option<Vec<String>>,
    /// Events are told as servers see them, and not as clients do.
    pub(crate) federation_format: bool,
}

impl Filter {
    /// Compiles a filter. Refuses one that costs too much: 400 `M_INVALID_PARAM`.
    pub(crate) fn new(definition: &FilterDefinition) -> Result<Self, Refusal> {
        let room = &definition.room;
        let limit = room
            .timeline
            .limit
            .map_or(TIMELINE_DEFAULT, |limit| usize::try_from(u64::from(limit)).unwrap_or(TIMELINE_MAX));
        if definition.event_fields.as_ref().is_some_and(|fields| fields.len() > FIELDS_MAX) {
            let why = format!("The filter's `event_fields` has more than {FIELDS_MAX} entries.");
            return Err(Refusal::invalid_param(why));
        }
        let (state, timeline) = (EventFilter::new(&room.state)?, EventFilter::new(&room.timeline)?);
        Ok(Self {
            presence: Global::new(&definition.presence)?,
            account_data: Global::new(&definition.account_data)?,
            room_account_data: OfRooms(EventFilter::new(&room.account_data)?),
            ephemeral: OfRooms(EventFilter::new(&room.ephemeral)?),
            lazy_members: state.lazy_members || timeline.lazy_members,
            redundant_members: state.redundant_members || timeline.redundant_members,
            state: OfRooms(state),
            timeline: OfRooms(timeline),
            timeline_related: Related::default(),
            state_related: Related::default(),
            timeline_limit: limit.min(TIMELINE_MAX),
            include_leave: room.include_leave,
            rooms: room.rooms.as_ref().map(|rooms| rooms.iter().cloned().collect()),
            not_rooms: room.not_rooms.iter().cloned().collect(),
            thread_counts: room.timeline.unread_thread_notifications,
            fields: definition.event_fields.clone(),
            federation_format: definition.event_format == EventFormat::Federation,
        })
    }

    /// Takes what a filter says of relations. Refuses what costs too much: 400 `M_INVALID_PARAM`.
    pub(crate) fn relate(&mut self, relations: Relations) -> Result<(), Refusal> {
        self.timeline_related = Related::new(relations.room.timeline)?;
        self.state_related = Related::new(relations.room.state)?;
        Ok(())
    }

    /// Whether the client wants anything of this room.
    pub(crate) fn wants_room(&self, room_id: &RoomId) -> bool {
        self.rooms.as_ref().is_none_or(|rooms| rooms.contains(room_id)) && !self.not_rooms.contains(room_id)
    }
}

/// The part of a filter for events that belong to no room: presence and global account data.
#[derive(Clone, Debug)]
pub(crate) struct Global {
    types: Option<Types>,
    not_types: Types,
    senders: Option<HashSet<OwnedUserId>>,
    not_senders: HashSet<OwnedUserId>,
}

impl Global {
    fn new(filter: &GlobalFilter) -> Result<Self, Refusal> {
        Ok(Self {
            types: filter.types.as_deref().map(|types| Types::new("types", types)).transpose()?,
            not_types: Types::new("not_types", &filter.not_types)?,
            senders: filter.senders.as_ref().map(|senders| senders.iter().cloned().collect()),
            not_senders: filter.not_senders.iter().cloned().collect(),
        })
    }

    pub(crate) fn wants_type(&self, event_type: &str) -> bool {
        self.types.as_ref().is_none_or(|types| types.contains(event_type))
            && !self.not_types.contains(event_type)
    }

    pub(crate) fn wants_sender(&self, sender: &str) -> bool {
        let Ok(sender) = <&UserId>::try_from(sender) else { return false };
        self.senders.as_ref().is_none_or(|senders| senders.contains(sender))
            && !self.not_senders.contains(sender)
    }
}

/// The part of a filter for one section of a room, such as its timeline.
#[derive(Clone, Debug)]
pub(crate) struct OfRooms(EventFilter);

impl OfRooms {
    pub(crate) fn wants_room(&self, room_id: &RoomId) -> bool {
        self.0.allows_room(room_id)
    }

    pub(crate) fn wants_type(&self, event_type: &str) -> bool {
        self.0.allows_type(event_type)
    }

    pub(crate) fn wants(
        &self,
        view: RoomView<'_, impl Read + ?Sized>,
        stored: &StoredEvent,
        viewer: &Viewer<'_>,
    ) -> Result<bool, Fault> {
        self.0.allows(view, stored, viewer)
    }
}
