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
        state::Ref,
    },
};

/// What a header is made of.
pub(super) struct Entering<'a> {
    /// The number that the event gets.
    pub(super) num: EventNum,
    /// What names it.
    pub(super) key: EventKey,
    /// The event.
    pub(super) event: &'a Event,
    /// The same as canonical JSON.
    pub(super) json: &'a Bytes,
    /// Its depth.
    pub(super) depth: u64,
    /// The number of its state key.
    pub(super) state_key: Option<StateKeyNum>,
    /// The event that held its state key before it.
    pub(super) replaces: Option<EventNum>,
    /// The state before it, unless that is the main line just below it.
    pub(super) before: Option<Ref>,
    /// The events it cites.
    pub(super) prev: Vec<EventNum>,
    /// The events that allow it.
    pub(super) auth: &'a [Arc<StateEvent>],
    /// The device and the transaction that one of our users sent it with.
    pub(super) sent_by: Option<SentBy>,
}

impl Entering<'_> {
    /// The header; `None` if the bytes are not those of an event.
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
            unseen: graph::only_merges(&self.event.kind, self.event.state_key.is_some()),
            before: self.before,
            after: None,
            prev: self.prev,
            auth: self.auth.iter().map(|event| event.event).collect(),
            sent_by: self.sent_by,
            spans: event::locate(self.json)?,
        })
    }
}

/// One more than the greatest such number of an event's auth events.
pub(super) fn auth_depth(auth: &[Arc<StateEvent>]) -> u64 {
    auth.iter().map(|event| event.auth_depth + 1).max().unwrap_or(0)
}
