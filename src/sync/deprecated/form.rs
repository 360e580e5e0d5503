//! The form of events at the deprecated endpoints: each names its room and, as clients of that time expect, its sender once more as
//! `user_id`.

use std::{borrow::Cow, collections::BTreeMap};

use ruma::RoomId;
use serde_json::value::RawValue;

use crate::{
    json::{JsonRef, JsonText, Object},
    rooms::{
        event::StoredEvent,
        receipts,
        show::{self, Viewer},
    },
    schema::{
        accounts::WrittenRow,
        event_types::{PRESENCE, RECEIPT, TYPING},
        receipts::{ReceiptKey, ReceiptRow},
        rooms::Membership,
    },
    store::Fault,
    sync::{
        collect::Outside,
        streams::presence::Told,
        window::{RoomWindow, Window},
    },
};

/// Shows events of a timeline.
pub(super) fn timeline(
    room: &RoomWindow<'_, '_>,
    events: &[(StoredEvent, Membership)],
) -> Result<Vec<JsonText>, Fault> {
    let viewer = Viewer { with_room_id: true, ..room.viewer() };
    let shown = show::show_all(room.view(), events, &viewer)?;
    Ok(shown.iter().map(|event| with_names(event, None)).collect())
}

/// Shows an event of a room's state.
pub(super) fn state(room: &RoomWindow<'_, '_>, stored: &StoredEvent) -> Result<JsonText, Fault> {
    let viewer = Viewer { with_room_id: true, ..room.viewer() };
    Ok(with_names(&show::show_plain(room.view(), stored, &viewer)?, None))
}

/// Shows the invitation among the events that tell somebody outside which room it is.
pub(super) fn invitation(room: &RoomWindow<'_, '_>, told: &Outside) -> Result<Option<JsonText>, Fault> {
    match told {
        Outside::Ours(events) => events.last().map(|event| state(room, event)).transpose(),
        Outside::Told(events) => Ok(events.last().map(|event| with_names(event, Some(&room.row.id)))),
    }
}

/// Gives an event with its sender as `user_id` too, and with the room's id if it is not there yet.
pub(super) fn with_names(event: &JsonText, room: Option<&RoomId>) -> JsonText {
    let Ok(fields) = serde_json::from_str::<BTreeMap<Cow<'_, str>, &RawValue>>(event.as_str()) else {
        return event.clone();
    };
    let mut named = Object::with_capacity(event.as_str().len() + 128);
    for (name, value) in &fields {
        named.json(name, *value);
    }
    if let Some(room) = room.filter(|_| !fields.contains_key("room_id")) {
        named.text("room_id", room.as_str());
    }
    if let Some(sender) = fields.get("sender").filter(|_| !fields.contains_key("user_id")) {
        named.json("user_id", *sender);
    }
    named.finish()
}

/// Shows account data: of a room, if one is named.
pub(super) fn account_data(event_type: &str, row: &WrittenRow, room: Option<&RoomId>) -> JsonText {
    let mut event = Object::new();
    event.text("type", event_type);
    event.json("content", JsonRef::stored(&row.content));
    if let Some(room) = room {
        event.text("room_id", room.as_str());
    }
    event.finish()
}

/// Shows the presence of users.
pub(super) fn presence(window: &Window<'_>, told: &[Told]) -> Vec<JsonText> {
    let shown = told.iter().map(|told| {
        let mut content = told.presence.content(window.now_ms, told.profile.as_ref());
        if let Some(fields) = content.as_object_mut() {
            fields.insert("user_id".to_owned(), told.user_id.as_str().into());
        }
        let mut event = Object::new();
        event.text("type", PRESENCE);
        event.text("sender", told.user_id.as_str());
        event.json("content", &JsonText::from(&content));
        event.finish()
    });
    shown.collect()
}

/// Shows the receipts of a room.
pub(super) fn receipts(room: &RoomId, told: &[(ReceiptKey, ReceiptRow)]) -> Vec<JsonText> {
    let contents = receipts::contents(told);
    contents.iter().map(|content| ephemeral(RECEIPT, room, &JsonText::from(content))).collect()
}

/// Shows who types in a room.
pub(super) fn typing(room: &RoomId, typists: &[String]) -> JsonText {
    let mut content = Object::new();
    content.texts("user_ids", typists);
    ephemeral(TYPING, room, &content.finish())
}

fn ephemeral(event_type: &str, room: &RoomId, content: &JsonText) -> JsonText {
    let mut event = Object::new();
    event.text("type", event_type);
    event.text("room_id", room.as_str());
    event.json("content", content);
    event.finish()
}
