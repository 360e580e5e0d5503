//! Lazy loading: remembers which members a device has been told of, and finds those that it must be told of.
//!
//! Specification: client-server API, "Lazy-loading room members".

use std::collections::BTreeSet;

use crate::{
    ids::{RoomNum, UserNum},
    rooms::{
        event::{self, StoredEvent},
        redact, state,
    },
    schema::event_types::MEMBER,
    store::Fault,
    sync::window::{RoomWindow, Standing},
};

/// Look at no more than this many changes of a room for a user who comes back; beyond that, the client is told of every
/// member.
const CHANGES_MAX: usize = 5_000;

/// Whether the device has been told of this member event, and has confirmed it by a later token.
pub(super) fn knows(room: &RoomWindow<'_, '_>, user_id: &str, stored: &StoredEvent) -> bool {
    let window = room.window;
    !window.ask.filter.redundant_members
        && window.sent.knows(&sent_key(room), user_id, stored.event(), window.from)
}

/// Remembers which members an answer tells the device of.
pub(super) fn remember<'e>(room: &RoomWindow<'_, '_>, events: impl Iterator<Item = &'e StoredEvent>) {
    let members: Vec<_> = events
        .filter(|stored| stored.membership().is_some())
        .filter_map(|stored| Some((stored.row.state_key()?.into_owned(), stored.event())))
        .collect();
    let told = members.iter().map(|(user_id, event)| (user_id.as_str(), *event));
    room.window.sent.tell(&sent_key(room), told, room.window.from, room.window.upto);
}

/// Forgets what the device was told of in this room, because it begins anew or has left.
pub(super) fn forget(room: &RoomWindow<'_, '_>) {
    room.window.sent.forget(&sent_key(room));
}

fn sent_key(room: &RoomWindow<'_, '_>) -> (UserNum, String, RoomNum) {
    let caller = &room.window.ask.caller;
    (caller.user, caller.device_id.to_string(), room.num)
}

/// The users whose membership changed, or whose member event was redacted, since the client last knew the room. A client that is told of a room anew may
/// still believe what it knew of them. `None` if the changes are too many to look at, and everybody must be told of.
pub(super) fn changed_members(room: &RoomWindow<'_, '_>) -> Result<Option<BTreeSet<String>>, Fault> {
    let known = match room.place.standing {
        Standing::New | Standing::Returns(None) => return Ok(Some(BTreeSet::new())),
        Standing::Returns(Some(known)) | Standing::Knows(known) => known,
    };
    let mut keys = BTreeSet::new();
    let mut seen = 0;
    for row in state::changes(room.window.read, room.num, known, room.place.end)? {
        for (key, _) in row?.1 {
            keys.insert(key);
            seen += 1;
        }
        if seen > CHANGES_MAX {
            return Ok(None);
        }
    }
    // A member event that was redacted meanwhile looks different, though nothing else took its place.
    for row in redact::list_redacted_state(room.window.read, room.num, known, room.place.end)? {
        if let Some(redacted) = event::find_anywhere(room.window.read, room.num, row?.1)? {
            keys.extend(redacted.row.header.state_key);
        }
        seen += 1;
        if seen > CHANGES_MAX {
            return Ok(None);
        }
    }
    let names = state::list_key_names(room.window.read, room.num, keys)?;
    let members = names.into_iter().flatten().filter(|(event_type, _)| event_type == MEMBER);
    Ok(Some(members.map(|(_, user_id)| user_id).collect()))
}
