//! Filters: the events of a room that a client wants (client-server API, "Filtering").
//!
//! A filter judges what its reader sees and nothing else: an event as it is shown to them, and of the events that refer to it only
//! those that they see. Otherwise it would tell them of what is kept from them, such as what was said after they were banned.

use std::collections::HashSet;

use ruma::{
    OwnedRoomId, OwnedUserId, RoomId, UserId,
    api::client::filter::{LazyLoadOptions, RoomEventFilter, UrlFilter},
};
use serde::Deserialize;

use crate::{
    error::Refusal,
    rooms::{
        event::{self, StoredEvent},
        relations::{self, relates_to},
        show::Viewer,
        view::RoomView,
    },
    schema::relations::{RelationKind, RelationRow},
    store::{Direction, Fault, Read},
};

/// Look at no more than this many events that refer to one; those beyond it count as if they were not there.
const RELATED_LOOKED_AT_MAX: usize = 1_000;
/// Look at no more than this many where the page has taken its steps already, and goes on all the same.
const RELATED_LATE_MAX: usize = 10;
/// One page takes at most about this many steps through the index of relations, because each event of a page may have many
/// relations, none of which fits. The last event of a page may go beyond by what [`RELATED_LOOKED_AT_MAX`] events take.
const STEPS_MAX: usize = 20_000;
/// It takes this many steps to find out whether the reader sees an event that refers to another, which is read for that.
const STEPS_OF_SIGHT: usize = 5;

/// One list of types has at most this many characters `*`, because each costs a search through the type of every event
/// looked at.
const STARS_MAX: usize = 100;
/// One list of relations has at most this many different entries, because a filter is held in memory for its request.
const RELATIONS_MAX: usize = 100;

/// A filter for the events of one room.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// The part that the specification defines.
    pub events: EventFilter,
    /// The part about how events relate to others.
    pub related: Related,
}

/// The part of a filter about how events relate to others, ready for use. By default it lets every event through.
#[derive(Clone, Debug, Default)]
pub struct Related {
    relations: RelationFilter,
    /// The kinds of relations of which an event needs one.
    kinds: Vec<RelationKind>,
}

/// Counts the steps that a page takes through the index of relations: each list of an event's relations, each row of it, and each
/// event that is read.
#[derive(Debug)]
pub struct Steps {
    left: usize,
}

impl Steps {
    /// The steps that a page may take.
    pub fn of_page() -> Self {
        Self { left: STEPS_MAX }
    }

    /// Fewer steps, for tests.
    #[cfg(test)]
    pub(crate) fn of(left: usize) -> Self {
        Self { left }
    }

    /// Whether the page has taken all its steps, so that it must end.
    pub fn are_taken(&self) -> bool {
        self.left == 0
    }

    fn take(&mut self, count: usize) {
        self.left = self.left.saturating_sub(count);
    }
}

impl Filter {
    /// Makes a filter ready for use. Refuses one that costs too much: 400 `M_INVALID_PARAM`.
    pub fn new(events: &RoomEventFilter, relations: RelationFilter) -> Result<Self, Refusal> {
        Ok(Self { events: EventFilter::new(events)?, related: Related::new(relations)? })
    }

    /// Whether the filter lets an event through, as this viewer sees it. Its limit and its lists of rooms are not looked at.
    pub fn allows(
        &self,
        view: RoomView<'_, impl Read + ?Sized>,
        stored: &StoredEvent,
        viewer: &Viewer<'_>,
        steps: &mut Steps,
    ) -> Result<bool, Fault> {
        Ok(self.events.allows(view, stored, viewer)? && self.related.allows(view, stored, viewer, steps)?)
    }
}

impl Related {
    /// Makes the part ready for use. Refuses one that costs too much: 400 `M_INVALID_PARAM`.
    pub fn new(relations: RelationFilter) -> Result<Self, Refusal> {
        relations.check()?;
        let kinds = relations.kinds();
        Ok(Self { relations, kinds })
    }

    /// Whether the filter lets an event through by its relations to others, as far as this viewer sees them.
    pub fn allows(
        &self,
        view: RoomView<'_, impl Read + ?Sized>,
        stored: &StoredEvent,
        viewer: &Viewer<'_>,
        steps: &mut Steps,
    ) -> Result<bool, Fault> {
        Ok(self.relations.allows_own(view, stored, viewer)?
            && (self.relations.is_for_all() || self.is_related(view, stored, viewer, steps)?))
    }

    /// Whether another event that the viewer sees refers to this one as the filter wants it. Each relation is read once, however
    /// many the filter names.
    fn is_related(
        &self,
        view: RoomView<'_, impl Read + ?Sized>,
        stored: &StoredEvent,
        viewer: &Viewer<'_>,
        steps: &mut Steps,
    ) -> Result<bool, Fault> {
        let (read, room) = (view.read, view.num);
        let Some(end) = viewer.reader.end(read)? else { return Ok(false) };
        let sees_all = viewer.sees_all_relations(read)?;
        let mut left = if steps.are_taken() { RELATED_LATE_MAX } else { RELATED_LOOKED_AT_MAX };
        for kind in &self.kinds {
            steps.take(1);
            let (event, upto) = (stored.event(), relations::upto(end));
            for row in relations::list_kind(read, room, event, *kind, upto, Direction::Up)?.take(left) {
                let (_, row) = row?;
                left -= 1;
                steps.take(1);
                if !self.relations.fits(&row) {
                    continue;
                }
                if sees_all {
                    return Ok(true);
                }
                steps.take(STEPS_OF_SIGHT);
                if let Some(refers) = event::find(read, room, row.event)?
                    && viewer.sees_relation(view, &refers)?
                {
                    return Ok(true);
                }
            }
            if left == 0 {
                break;
            }
        }
        Ok(false)
    }
}

/// Types of events, some of them with `*` for any number of characters.
#[derive(Clone, Debug, Default)]
pub struct Types {
    exact: HashSet<String>,
    patterns: Vec<String>,
}

impl Types {
    /// Takes the list that a filter has in this field. Refuses more than [`STARS_MAX`] stars.
    pub fn new(field: &str, list: &[String]) -> Result<Self, Refusal> {
        let stars: usize = list.iter().map(|pattern| pattern.matches('*').count()).sum();
        if stars > STARS_MAX {
            tracing::debug!(field, stars, reason = "too many patterns", "a filter is refused");
            let why = format!("The filter's `{field}` has {stars} characters `*`; {STARS_MAX} are allowed.");
            return Err(Refusal::invalid_param(why));
        }
        let is_pattern = |entry: &&String| entry.contains('*');
        Ok(Self {
            exact: list.iter().filter(|entry| !is_pattern(entry)).cloned().collect(),
            patterns: list.iter().filter(is_pattern).cloned().collect(),
        })
    }

    /// Whether the list is empty.
    fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.patterns.is_empty()
    }

    /// Whether a type is in the list.
    pub fn contains(&self, event_type: &str) -> bool {
        self.exact.contains(event_type) || self.patterns.iter().any(|pattern| matches(pattern, event_type))
    }
}

/// The events of rooms that a client wants, by type, sender, room and content.
#[derive(Clone, Debug, Default)]
pub struct EventFilter {
    types: Option<Types>,
    not_types: Types,
    senders: Option<HashSet<OwnedUserId>>,
    not_senders: HashSet<OwnedUserId>,
    rooms: Option<HashSet<OwnedRoomId>>,
    not_rooms: HashSet<OwnedRoomId>,
    url: Option<UrlFilter>,
    /// Whether member events are given only of users whose events are shown.
    pub lazy_members: bool,
    /// Whether such member events are given again with each answer.
    pub redundant_members: bool,
}

impl EventFilter {
    /// Makes a filter ready for use. Refuses one that costs too much: 400 `M_INVALID_PARAM`.
    pub fn new(filter: &RoomEventFilter) -> Result<Self, Refusal> {
        let (lazy_members, redundant_members) = match filter.lazy_load_options {
            LazyLoadOptions::Enabled { include_redundant_members } => (true, include_redundant_members),
            LazyLoadOptions::Disabled => (false, false),
        };
        Ok(Self {
            types: filter.types.as_deref().map(|types| Types::new("types", types)).transpose()?,
            not_types: Types::new("not_types", &filter.not_types)?,
            senders: filter.senders.as_ref().map(|senders| senders.iter().cloned().collect()),
            not_senders: filter.not_senders.iter().cloned().collect(),
            rooms: filter.rooms.as_ref().map(|rooms| rooms.iter().cloned().collect()),
            not_rooms: filter.not_rooms.iter().cloned().collect(),
            url: filter.url_filter,
            lazy_members,
            redundant_members,
        })
    }

    /// Whether the client wants events of this type.
    pub fn allows_type(&self, event_type: &str) -> bool {
        self.types.as_ref().is_none_or(|types| types.contains(event_type))
            && !self.not_types.contains(event_type)
    }

    /// Whether the client wants events of this room.
    pub fn allows_room(&self, room_id: &RoomId) -> bool {
        !self.not_rooms.contains(room_id) && self.rooms.as_ref().is_none_or(|rooms| rooms.contains(room_id))
    }

    /// Whether the client wants this event, as this viewer sees it, in a room that it wants.
    pub fn allows(
        &self,
        view: RoomView<'_, impl Read + ?Sized>,
        stored: &StoredEvent,
        viewer: &Viewer<'_>,
    ) -> Result<bool, Fault> {
        let is_of_type =
            self.types.is_none() && self.not_types.is_empty() || self.allows_type(&stored.row.event_type());
        if !is_of_type || !self.allows_sender(stored) {
            return Ok(false);
        }
        let Some(wanted) = self.url else { return Ok(true) };
        let seen = viewer.seen(view, stored)?;
        Ok(has_url(seen.row.content()) == (wanted == UrlFilter::EventsWithUrl))
    }

    fn allows_sender(&self, stored: &StoredEvent) -> bool {
        if self.senders.is_none() && self.not_senders.is_empty() {
            return true;
        }
        let sender = stored.row.sender();
        let Ok(sender) = <&UserId>::try_from(&*sender) else { return false };
        !self.not_senders.contains(sender)
            && self.senders.as_ref().is_none_or(|senders| senders.contains(sender))
    }
}

/// The part of a filter that speaks of relations (the first form of MSC3440, and MSC3874).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct RelationFilter {
    /// Events to which another one refers in one of these ways. Together with `related_by_senders`, one event must fit
    /// both.
    related_by_rel_types: Option<HashSet<String>>,
    /// Events to which one of these users refers.
    related_by_senders: Option<HashSet<String>>,
    /// Events that refer to another in one of these ways.
    #[serde(alias = "org.matrix.msc3874.rel_types")]
    rel_types: Option<HashSet<String>>,
    /// Events that do not refer to another in any of these ways.
    #[serde(alias = "org.matrix.msc3874.not_rel_types")]
    not_rel_types: HashSet<String>,
}

impl RelationFilter {
    /// Refuses lists that are too long: 400 `M_INVALID_PARAM`.
    fn check(&self) -> Result<(), Refusal> {
        let lists = [
            ("related_by_rel_types", self.related_by_rel_types.as_ref()),
            ("related_by_senders", self.related_by_senders.as_ref()),
            ("rel_types", self.rel_types.as_ref()),
            ("not_rel_types", Some(&self.not_rel_types)),
        ];
        for (field, list) in lists {
            let entries = list.map_or(0, HashSet::len);
            if entries > RELATIONS_MAX {
                let why =
                    format!("The filter's `{field}` has {entries} entries; {RELATIONS_MAX} are allowed.");
                return Err(Refusal::invalid_param(why));
            }
        }
        Ok(())
    }

    /// The kinds of relations by which another event may refer to one that fits.
    fn kinds(&self) -> Vec<RelationKind> {
        let is_wanted = |kind: &RelationKind| {
            self.related_by_rel_types
                .as_ref()
                .is_none_or(|types| types.iter().any(|rel_type| RelationKind::of(rel_type) == *kind))
        };
        RelationKind::ALL.into_iter().filter(is_wanted).collect()
    }

    /// Whether the filter lets an event through by the relation in which it stands itself, as this viewer sees it.
    fn allows_own(
        &self,
        view: RoomView<'_, impl Read + ?Sized>,
        stored: &StoredEvent,
        viewer: &Viewer<'_>,
    ) -> Result<bool, Fault> {
        if self.rel_types.is_none() && self.not_rel_types.is_empty() {
            return Ok(true);
        }
        let seen = viewer.seen(view, stored)?;
        let own = relates_to(seen.row.content()).map(|relation| relation.rel_type);
        let is_in = |types: &HashSet<String>| own.as_ref().is_some_and(|own| types.contains(own));
        Ok(!is_in(&self.not_rel_types) && self.rel_types.as_ref().is_none_or(is_in))
    }

    /// Whether the filter asks nothing of the events that refer to another.
    fn is_for_all(&self) -> bool {
        self.related_by_rel_types.is_none() && self.related_by_senders.is_none()
    }

    /// Whether this relation to an event is one that the filter asks for.
    fn fits(&self, row: &RelationRow) -> bool {
        self.related_by_rel_types.as_ref().is_none_or(|types| types.contains(&row.rel_type))
            && self.related_by_senders.as_ref().is_none_or(|senders| senders.contains(row.sender.as_str()))
    }
}

/// Whether the content of an event has a `url` that is text.
pub(crate) fn has_url(content: &str) -> bool {
    #[derive(Deserialize)]
    struct Content {
        #[serde(default)]
        url: Option<serde_json::Value>,
    }
    serde_json::from_str::<Content>(content)
        .is_ok_and(|content| content.url.is_some_and(|url| url.is_string()))
}

/// Whether a type fits a pattern, in which `*` stands for any number of characters. Linear in the type's length for
/// each `*`.
fn matches(pattern: &str, event_type: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(rest) = parts.next().and_then(|head| event_type.strip_prefix(head)) else { return false };
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
    fn a_filter_has_as_many_exact_types_as_it_likes_and_few_stars() {
        let exact: Vec<String> = (0..4_500).map(|number| format!("t{number}")).collect();
        let types = Types::new("types", &exact).unwrap();
        assert!(types.contains("t4499") && !types.contains("t4500"));
        let stars: Vec<String> = (0..=STARS_MAX).map(|number| format!("t{number}*")).collect();
        let refused = Types::new("types", &stars).unwrap_err();
        assert!(refused.message.contains("`types`"), "{}", refused.message);
        assert!(Types::new("types", &["*".repeat(STARS_MAX + 1)]).is_err());
        assert!(Types::new("types", stars.get(1..).unwrap()).is_ok());
        let relations = RelationFilter {
            not_rel_types: (0..101).map(|number| number.to_string()).collect(),
            ..RelationFilter::default()
        };
        assert!(Filter::new(&RoomEventFilter::default(), relations).is_err());
    }

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, event_type, fits) in [
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
            assert_eq!(matches(pattern, event_type), fits, "{pattern} {event_type}");
        }
    }
}
