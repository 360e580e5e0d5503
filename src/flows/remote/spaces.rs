//! Rooms of spaces as other servers tell of them (server-server API, "Spaces"), and how they are read.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use ruma::{
    OwnedRoomId, OwnedServerName, api::federation::space::SpaceHierarchyParentSummary, room::RoomSummary,
};
use serde::Deserialize;
use serde_json::{Map, Value, value::RawValue};

use super::entries::readable;
use crate::rooms::spaces::{Child, read_children};

/// Answers of other servers about spaces have at most this many bytes together, as they came.
pub(super) const KEPT_BYTES_MAX: usize = 16 << 20;

/// A question for a room of a space. The servers are part of it: what one server says of a room says nothing to those who ask
/// others.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Question {
    pub(super) room_id: OwnedRoomId,
    pub(super) suggested_only: bool,
    pub(super) via: Vec<OwnedServerName>,
}

impl Question {
    /// The bytes that it takes to keep this.
    pub(super) fn byte_count(&self) -> usize {
        let names = self.via.iter().map(|name| name.as_str().len()).sum::<usize>();
        size_of::<Self>() + self.room_id.as_str().len() + names
    }
}

/// A room that this server is not in, as another server tells of it.
#[derive(Debug)]
pub(super) struct Room {
    pub(super) summary: RoomSummary,
    /// The fields that clients are told of it.
    pub(super) told: Map<String, Value>,
}

impl Room {
    fn read(summary: RoomSummary) -> Option<Arc<Self>> {
        let Ok(Value::Object(told)) = serde_json::to_value(&summary) else { return None };
        Some(Arc::new(Self { summary, told }))
    }
}

/// An answer of another server about a room, as it came.
#[derive(Deserialize)]
pub(super) struct Answer {
    room: SpaceHierarchyParentSummary,
    #[serde(default)]
    children: Vec<Box<RawValue>>,
    #[serde(default)]
    inaccessible_children: Vec<Box<RawValue>>,
}

/// An answer of another server about a room and the rooms that it names.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) room: Arc<Room>,
    pub(super) children: Vec<Child>,
    /// Its descriptions of the children that we may come into or read.
    pub(super) rooms: BTreeMap<OwnedRoomId, Arc<Room>>,
    /// The children that nobody here can come into, or read.
    pub(super) inaccessible: BTreeSet<OwnedRoomId>,
    pub(super) byte_count: usize,
}

impl Told {
    /// Reads an answer; `None` where it is about another room than the one that was asked for. What it tells of rooms that are no
    /// children is left out.
    pub(super) fn read(question: &Question, answer: Answer) -> Option<Self> {
        let summary = answer.room.summary;
        if summary.room_id != question.room_id {
            return None;
        }
        let children = answer.room.children_state.iter().map(|event| event.json());
        let children = read_children(children, question.suggested_only);
        let named: BTreeSet<&OwnedRoomId> = children.iter().map(|child| &child.room_id).collect();
        let rooms = readable::<RoomSummary>(&answer.children);
        let rooms = rooms.into_iter().filter(|room| named.contains(&room.room_id));
        let rooms: BTreeMap<_, _> =
            rooms.filter_map(|room| Some((room.room_id.clone(), Room::read(room)?))).collect();
        let inaccessible = readable(&answer.inaccessible_children);
        let inaccessible = inaccessible.into_iter().filter(|id| named.contains(id)).collect();
        let room = Room::read(summary)?;
        let size = |room: &Arc<Room>| {
            room.told.iter().map(|(name, value)| name.len() + value.to_string().len()).sum::<usize>()
        };
        let described = std::iter::once(&room).chain(rooms.values()).map(size).sum::<usize>();
        let events =
            children.iter().map(|child| size_of::<Child>() + child.event.as_str().len()).sum::<usize>();
        Some(Self { room, children, rooms, inaccessible, byte_count: 2 * described + events })
    }
}
