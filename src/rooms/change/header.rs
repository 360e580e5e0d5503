//! The header of an event that comes into the room, whoever made it.

use std::sync::Arc;

use bytes::Bytes;

use crate::{
    ids::{EventNum, StateKeyNum},
    rooms::{
        event::{self, Event, StateEvent},
        graph,
    },
    schema::{
        rooms::{EventHeader, EventKey, SentBy},
        state::StateRef,
    },
};

/// The parts from which the header of an event is made.
pub(super) struct Entering<'a> {
    /// The number that the event gets in its room.
    pub(super) num: EventNum,
    /// The key by which the event is found: its hash, or the id that a server chose.
    pub(super) key: EventKey,
    /// The event itself, parsed.
    pub(super) event: &'a Event,
    /// The same event as canonical JSON.
    pub(super) json: &'a Bytes,
    /// The depth that the event states.
    pub(super) depth: u64,
    /// The number of the event's (type, state key), if it is a state event.
    pub(super) state_key: Option<StateKeyNum>,
    /// The event that held the state key before this one.
    pub(super) replaces: Option<EventNum>,
    /// The state before the event; `None` where that is the main line just below the event.
    pub(super) before: Option<StateRef>,
    /// The numbers of the events that the event cites.
    pub(super) prev: Vec<EventNum>,
    /// The events that the event names as allowing it.
    pub(super) auth: &'a [Arc<StateEvent>],
    /// The device and the transaction id, if one of our users sent the event with one.
    pub(super) sent_by: Option<SentBy>,
    /// Whether this server let the sender in, and tells others of the event.
    pub(super) let_in: bool,
}

impl Entering<'_> {
    /// Makes the header; `None` if the bytes are not those of an event.
    pub(super) fn header(self) -> Option<EventHeader> {
        Some(EventHeader {
            event: self.num,
            key: self.key,
            sent_ms: self.event.sent.get().into(),
            depth: self.depth,
            auth_depth: auth_depth(self.auth),
            state_key: self.state_key,
            replaces: self.replaces,
            redacted_by: None,
            unseen: graph::only_merges(&self.event.event_type, self.event.state_key.is_some()),
            before: self.before,
            after: None,
            prev: self.prev,
            auth: self.auth.iter().map(|event| event.event).collect(),
            sent_by: self.sent_by,
            let_in: self.let_in,
            rejected: false,
            expired: false,
            spans: event::locate(self.json)?,
        })
    }
}

/// One more than the greatest auth depth among an event's auth events; 0 without any.
pub(super) fn auth_depth(auth: &[Arc<StateEvent>]) -> u64 {
    auth.iter().map(|event| event.auth_depth + 1).max().unwrap_or(0)
}
