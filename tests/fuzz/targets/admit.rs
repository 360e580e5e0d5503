//! The rules by which a room takes events: whatever the events, they give a verdict, and nobody speaks who is not in the room.
//!
//! The input is the version of the room, and then a line for each event: first the one that is judged, then those that allow it,
//! which are also the state of the room.

#![no_main]

use std::{collections::BTreeMap, sync::Arc};

use aqueduct::{
    ids::EventNum,
    rooms::{
        admit::{self, AuthState, Evidence, Known, Verdict},
        event::{Event, StateEvent},
        versions,
    },
};
use libfuzzer_sys::fuzz_target;
use ruma::{OwnedEventId, events::StateEventType};

/// Looks at no more events than this; an event names at most ten that allow it.
const EVENTS_MAX: usize = 11;

fn id(place: usize) -> OwnedEventId {
    let letter = char::from(b'A' + u8::try_from(place).unwrap_or_default());
    let text = format!("${letter}{}", "A".repeat(42));
    text.try_into().unwrap_or_else(|_| panic!("the id of an event is none"))
}

fn membership(event: &Event) -> Option<String> {
    let content: serde_json::Value = serde_json::from_str(event.content.get()).ok()?;
    Some(content.get("membership")?.as_str()?.to_owned())
}

fuzz_target!(|input: (u8, &[u8])| {
    let (choice, lines) = input;
    let version = versions::LOWEST + choice % (versions::HIGHEST - versions::LOWEST + 1);
    let Some(rules) = versions::find_rules(version) else { return };
    let lines = lines.split(|byte| *byte == b'\n').take(EVENTS_MAX).enumerate();
    let mut events = lines.filter_map(|(place, json)| Event::parse(id(place), json).ok());
    let Some(mut event) = events.next() else { return };
    let (mut auth, mut before) = (BTreeMap::new(), AuthState::default());
    for (place, parsed) in events.enumerate().filter(|(_, parsed)| parsed.state_key.is_some()) {
        let id = parsed.id.clone();
        let state = Arc::new(StateEvent { event: EventNum(place as u64), auth_depth: 0, parsed });
        before.insert(Arc::clone(&state));
        auth.insert(id, Known::Found(state));
    }
    event.auth = auth.keys().cloned().collect();
    let prev = BTreeMap::new();
    let evidence =
        Evidence { rules: &rules.authorization, auth: &auth, prev: &prev, before: &before, current: None };
    let verdict = admit::admit(&event, &evidence);
    assert_eq!(verdict, admit::admit(&event, &evidence), "the same evidence gives two verdicts");
    let kind = event.event_type.to_string();
    if verdict != Verdict::Accept || kind == "m.room.member" || kind == "m.room.create" {
        return;
    }
    // Until version 6, aliases could be set by any user of their server.
    if kind == "m.room.aliases" && rules.authorization.special_case_room_aliases {
        return;
    }
    let sender = before.find(&StateEventType::RoomMember, event.sender.as_str());
    assert_eq!(sender.and_then(membership).as_deref(), Some("join"), "somebody speaks who is not in the room");
    assert!(before.find(&StateEventType::RoomCreate, "").is_some(), "a room that nobody made has events");
});
