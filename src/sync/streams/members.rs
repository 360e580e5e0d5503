//! Members: those that lazy loading shows, and the few that a client names a room after.
//!
//! Specification: client-server API, "Lazy-loading room members", and `summary` of `/sync`.

use std::collections::BTreeSet;

use crate::{
    ids::{Order, RoomNum},
    rooms::{self, event::Stored, members, state},
    schema,
    schema::{
        rooms::{Membership, RoomRow},
        state::Ref,
    },
    store::Fault,
    sync::{
        answer::Object,
        streams::{Window, load_events, timeline::Timeline},
    },
};

/// Users after whom a client names a room that has no name.
const HEROES: usize = 5;
/// Members looked at to find them.
const LOOKED_AT_MAX: usize = 100;

/// Whose member events go with a timeline: its senders.
pub(crate) fn senders(timeline: &Timeline) -> BTreeSet<String> {
    timeline.events.iter().map(|(stored, _)| stored.row.sender().into_owned()).collect()
}

/// Whom the member events of a timeline are about.
pub(crate) fn subjects(timeline: &Timeline) -> impl Iterator<Item = String> {
    let members = timeline.events.iter().filter(|(stored, _)| stored.membership().is_some());
    members.filter_map(|(stored, _)| Some(stored.row.state_key()?.into_owned()))
}

/// The member events of these users at a place that the device has not been told of, nor is by these events.
pub(crate) fn missing(
    window: &Window<'_>,
    num: RoomNum,
    at: Ref,
    users: &BTreeSet<String>,
    told: &[Stored],
) -> Result<Vec<Stored>, Fault> {
    let key = sent_key(window, num);
    let mut events = Vec::new();
    let keys = state::find_keys(window.read, num, "m.room.member", users.iter().map(String::as_str))?;
    let known: Vec<_> = users.iter().zip(keys).filter_map(|(user_id, key)| Some((user_id, key?))).collect();
    let keys: Vec<_> = known.iter().map(|(_, key)| *key).collect();
    let values = state::list_at(window.read, num, at, &keys)?;
    for ((user_id, _), value) in known.into_iter().zip(values) {
        let Some(event) = value.event() else { continue };
        let is_told = told.iter().any(|stored| stored.event() == event);
        let knows =
            !window.ask.filter.redundant_members && window.sent.knows(&key, user_id, event, window.from);
        if !is_told && !knows {
            events.push(event);
        }
    }
    load_events(window.read, num, &events)
}

/// Remembers which members this answer tells the device of.
pub(crate) fn remember<'e>(window: &Window<'_>, num: RoomNum, events: impl Iterator<Item = &'e Stored>) {
    let members: Vec<_> = events
        .filter(|stored| stored.membership().is_some())
        .filter_map(|stored| Some((stored.row.state_key()?.into_owned(), stored.event())))
        .collect();
    let told = members.iter().map(|(user_id, event)| (user_id.as_str(), *event));
    window.sent.tell(&sent_key(window, num), told, window.from, window.upto);
}

/// Forgets what the device was told of in this room: it begins anew.
pub(crate) fn forget(window: &Window<'_>, num: RoomNum) {
    window.sent.forget(&sent_key(window, num));
}

fn sent_key(window: &Window<'_>, num: RoomNum) -> (crate::ids::UserNum, String, RoomNum) {
    (window.ask.caller.user, window.ask.caller.device_id.to_string(), num)
}

/// The members after whom a client names this room, and whether it needs them: a room with a name does not.
pub(crate) fn heroes(window: &Window<'_>, num: RoomNum) -> Result<Option<Vec<String>>, Fault> {
    let has_text = |kind: &str, field: &str| -> Result<bool, Fault> {
        let Some(stored) = rooms::find_state(window.read, num, kind, "")? else { return Ok(false) };
        let content: serde_json::Value = serde_json::from_str(stored.row.content()).unwrap_or_default();
        Ok(content.get(field).and_then(|text| text.as_str()).is_some_and(|text| !text.is_empty()))
    };
    if has_text("m.room.name", "name")? || has_text("m.room.canonical_alias", "alias")? {
        return Ok(None);
    }
    let (mut here, mut gone) = (Vec::new(), Vec::new());
    for key in members::list_keys(window.read, num)?.take(LOOKED_AT_MAX) {
        let (user_id, key) = key?;
        if user_id == window.ask.caller.user_id {
            continue;
        }
        let Some(event) = state::current(window.read, num, key)? else { continue };
        match members::membership_of_event(window.read, num, event)? {
            Membership::Join | Membership::Invite => here.push(user_id.to_string()),
            Membership::Leave | Membership::Ban => gone.push(user_id.to_string()),
            Membership::Knock => {}
        }
        if here.len() == HEROES {
            break;
        }
    }
    if here.is_empty() {
        gone.truncate(HEROES);
        return Ok(Some(gone));
    }
    Ok(Some(here))
}

/// How many members the room has, and who its heroes are.
pub(crate) fn summary(row: &RoomRow, heroes: Option<&[String]>) -> String {
    let mut summary = Object::new();
    if let Some(heroes) = heroes {
        summary.texts("m.heroes", heroes);
    }
    summary.number("m.joined_member_count", row.joined.into());
    summary.number("m.invited_member_count", row.invited.into());
    summary.finish()
}

/// The order of the event that made a user what the user is to a room.
pub(crate) fn since_order(
    read: &crate::store::Snapshot,
    num: RoomNum,
    event: crate::ids::EventNum,
) -> Result<Option<Order>, Fault> {
    Ok(match schema::PLACE.get(read, (num, event))? {
        Some(schema::rooms::Place::Timeline(order)) => Some(order),
        _ => None,
    })
}
