//! Which events of a room a client wants (client-server API, "Filtering").

use ruma::{
    RoomId,
    api::client::filter::{RoomEventFilter, UrlFilter},
};
use serde::Deserialize;

use crate::{
    ids::RoomNum,
    rooms::{
        event::Stored,
        relations::{self, relates_to},
    },
    store::{Direction, Fault, Read},
};

/// Events that refer to one, looked at for a filter at most: those beyond it count as if they were not there.
const RELATED_LOOKED_AT_MAX: usize = 1_000;

/// What a filter can say of the events of one room.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// What the specification has.
    pub events: RoomEventFilter,
    /// How events relate to others.
    pub relations: RelationFilter,
}

impl Filter {
    /// A filter that says nothing of relations.
    pub fn of(events: RoomEventFilter) -> Self {
        Self { events, relations: RelationFilter::default() }
    }

    /// Whether the filter lets an event through; its limit and its room lists are not looked at.
    pub fn allows(&self, read: &(impl Read + ?Sized), room: RoomNum, stored: &Stored) -> Result<bool, Fault> {
        Ok(allows(&self.events, stored) && self.relations.allows(read, room, stored)?)
    }
}

/// The part of a filter that speaks of relations (MSC3440 as it was first, MSC3874).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct RelationFilter {
    /// Events to which another one refers in one of these ways. Together with `related_by_senders` one event must fit
    /// both.
    related_by_rel_types: Option<Vec<String>>,
    /// Events to which one of these users refers.
    related_by_senders: Option<Vec<String>>,
    /// Events that refer to another in one of these ways.
    #[serde(alias = "org.matrix.msc3874.rel_types")]
    rel_types: Option<Vec<String>>,
    /// Events that do not refer to another in any of these ways.
    #[serde(alias = "org.matrix.msc3874.not_rel_types")]
    not_rel_types: Vec<String>,
}

impl RelationFilter {
    fn allows(&self, read: &(impl Read + ?Sized), room: RoomNum, stored: &Stored) -> Result<bool, Fault> {
        if self.rel_types.is_some() || !self.not_rel_types.is_empty() {
            let own = relates_to(stored.row.content()).map(|relation| relation.rel_type);
            let fits = |types: &[String]| own.as_ref().is_some_and(|own| types.contains(own));
            if fits(&self.not_rel_types) || self.rel_types.as_deref().is_some_and(|types| !fits(types)) {
                return Ok(false);
            }
        }
        if self.related_by_rel_types.is_none() && self.related_by_senders.is_none() {
            return Ok(true);
        }
        let rel_types: Vec<Option<&str>> = match &self.related_by_rel_types {
            Some(types) => types.iter().map(|rel_type| Some(rel_type.as_str())).collect(),
            None => vec![None],
        };
        let mut left = RELATED_LOOKED_AT_MAX;
        for rel_type in rel_types {
            let rows =
                relations::list(read, room, stored.event(), rel_type, relations::ANYWHERE, Direction::Up)?;
            for row in rows.take(left) {
                let (_, row) = row?;
                left -= 1;
                if rel_type.is_none_or(|rel_type| row.rel_type == rel_type)
                    && self.related_by_senders.as_ref().is_none_or(|senders| senders.contains(&row.sender))
                {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

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
    use super::*;

    #[test]
    fn relations_are_filtered_by_their_stable_and_unstable_names() {
        let stable: RelationFilter =
            serde_json::from_str(r#"{"rel_types":["a"],"not_rel_types":["b"],"limit":5}"#).unwrap();
        let unstable: RelationFilter = serde_json::from_str(
            r#"{"org.matrix.msc3874.rel_types":["a"],"org.matrix.msc3874.not_rel_types":["b"]}"#,
        )
        .unwrap();
        assert_eq!(stable, unstable);
        assert_ne!(stable, RelationFilter::default());
    }

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
