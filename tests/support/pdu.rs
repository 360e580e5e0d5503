//! An event as the authorization rules see it, with what resolution knows of it. The tests of state resolution and its
//! benchmark share it; a file that includes it has `Header` in scope.

use ruma::{
    MilliSecondsSinceUnixEpoch, OwnedEventId, OwnedRoomId, OwnedUserId, RoomId, UserId,
    events::TimelineEventType, state_res,
};
use serde_json::value::RawValue;

use super::Header;

/// A state event with the parts that the authorization rules and resolution ask for.
#[derive(Debug, Clone)]
pub(crate) struct Pdu {
    pub(crate) id: OwnedEventId,
    pub(crate) room_id: Option<OwnedRoomId>,
    pub(crate) sender: OwnedUserId,
    pub(crate) ts: MilliSecondsSinceUnixEpoch,
    pub(crate) kind: TimelineEventType,
    pub(crate) state_key: String,
    pub(crate) content: Box<RawValue>,
    pub(crate) prev: Vec<OwnedEventId>,
    pub(crate) auth: Vec<OwnedEventId>,
    pub(crate) header: Header,
}

impl state_res::Event for Pdu {
    type Id = OwnedEventId;
    fn event_id(&self) -> &OwnedEventId {
        &self.id
    }
    fn room_id(&self) -> Option<&RoomId> {
        self.room_id.as_deref()
    }
    fn sender(&self) -> &UserId {
        &self.sender
    }
    fn origin_server_ts(&self) -> MilliSecondsSinceUnixEpoch {
        self.ts
    }
    fn event_type(&self) -> &TimelineEventType {
        &self.kind
    }
    fn content(&self) -> &RawValue {
        &self.content
    }
    fn state_key(&self) -> Option<&str> {
        Some(&self.state_key)
    }
    fn prev_events(&self) -> Box<dyn DoubleEndedIterator<Item = &OwnedEventId> + '_> {
        Box::new(self.prev.iter())
    }
    fn auth_events(&self) -> Box<dyn DoubleEndedIterator<Item = &OwnedEventId> + '_> {
        Box::new(self.auth.iter())
    }
    fn redacts(&self) -> Option<&OwnedEventId> {
        None
    }
    fn rejected(&self) -> bool {
        false
    }
}
