//! Which events of a room a client wants (client-server API, "Filtering").

use ruma::{
    RoomId,
    api::client::filter::{RoomEventFilter, UrlFilter},
};
use serde::Deserialize;

use crate::rooms::event::Stored;

/// Whether a filter lets an event through. Its limit and its room lists are not looked at.
pub fn allows(filter: &RoomEventFilter, stored: &Stored) -> bool {
    let kind = stored.row.event_type();
    if filter.not_types.iter().any(|pattern| matches(pattern, &kind))
        || filter.types.as_ref().is_some_and(|types| !types.iter().any(|pattern| matches(pattern, &kind)))
    {
        return false;
    }
    if !filter.not_senders.is_empty() || filter.senders.is_some() {
        let sender = stored.row.sender();
        let is_sender = |user: &ruma::OwnedUserId| user.as_str() == sender;
        if filter.not_senders.iter().any(is_sender)
            || filter.senders.as_ref().is_some_and(|senders| !senders.iter().any(is_sender))
        {
            return false;
        }
    }
    match filter.url_filter {
        None => true,
        Some(wanted) => has_url(stored.row.content()) == (wanted == UrlFilter::EventsWithUrl),
    }
}

/// Whether a filter lets a room through.
pub fn allows_room(filter: &RoomEventFilter, room: &RoomId) -> bool {
    !filter.not_rooms.iter().any(|id| id == room)
        && filter.rooms.as_ref().is_none_or(|rooms| rooms.iter().any(|id| id == room))
}

fn has_url(content: &str) -> bool {
    #[derive(Deserialize)]
    struct Content {
        #[serde(default)]
        url: Option<serde_json::Value>,
    }
    serde_json::from_str::<Content>(content)
        .is_ok_and(|content| content.url.is_some_and(|url| url.is_string()))
}

/// Whether a type fits a pattern, in which `*` stands for any characters. Linear in the type's length for each `*`.
pub fn matches(pattern: &str, kind: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(rest) = parts.next().and_then(|head| kind.strip_prefix(head)) else { return false };
    let Some(tail) = parts.next_back() else { return rest.is_empty() };
    let mut rest = rest;
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = rest.get(at + part.len()..).unwrap_or_default(),
            None => return false,
        }
    }
    rest.ends_with(tail)
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, kind, fits) in [
            ("m.room.message", "m.room.message", true),
            ("m.room.message", "m.room.messages", false),
            ("m.room.*", "m.room.name", true),
            ("*", "", true),
            ("*", "anything", true),
            ("m.*.x", "m.a.x", true),
            ("m.*.x", "m.x", false),
            ("*a*b*", "xxaxxbxx", true),
            ("*a*b*", "xxbxxaxx", false),
            ("aa*aa", "aaa", false),
            ("", "", true),
            ("", "a", false),
        ] {
            assert_eq!(matches(pattern, kind), fits, "{pattern} {kind}");
        }
    }
}
