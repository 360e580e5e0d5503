//! The state that a client of sliding sync wants, as its lists and subscriptions name it.
//!
//! A client lays what it is told over what it knows and then has the state at the end of the window; it takes none from the
//! timeline. So a key that it wants is told whenever its value is another than the client knows, whatever the reason: an event of
//! the timeline, one that the timeline leaves out, a resolution without any event, or a redaction.

use std::collections::{BTreeMap, BTreeSet};

use super::state::{
    self as current, ABOVE_DERIVED, ABOVE_MEMBER, DERIVED, RoomState, load, named_keys, values_at_end,
};
use crate::{
    ids::{EventNum, StateKeyNum},
    rooms::{event::StoredEvent, state},
    schema::{
        event_types::MEMBER,
        state::StateValue,
        sync::{StatePattern, StateWish},
    },
    store::Fault,
    sync::{streams::timeline::Timeline, window::RoomWindow},
};

/// Remember at most this many members that were told lazily in one room; beyond that, begin anew with those told last.
const MEMBERS_MAX: usize = 300;

/// The wishes for a room's state, and what the client holds of it already.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    /// The wishes of the lists and subscriptions that the room is in.
    pub(crate) wishes: &'a [StateWish],
    /// The wishes with which the client was told the room before. It then holds the state that they name, as it was when it
    /// was told. None if it holds nothing.
    pub(crate) known: Option<&'a [StateWish]>,
    /// The members that it was told lazily, rising.
    pub(crate) members: &'a [StateKeyNum],
}

/// The state of a room that is news to a client.
#[derive(Debug, Default)]
pub(crate) struct StateNews {
    /// The events that are the state now.
    pub(crate) events: Vec<StoredEvent>,
    /// The keys that are no longer set, each by type and state key.
    pub(crate) gone: Vec<(String, String)>,
    /// The members that the client was told lazily, rising, with those told now.
    pub(crate) members: Vec<StateKeyNum>,
    /// The client knows something of the room that it does not want any more and that is otherwise now.
    pub(crate) has_stale: bool,
}

fn matches(pattern: &StatePattern, event_type: &str, state_key: &str) -> bool {
    pattern.event_type.as_deref().is_none_or(|it| it == event_type)
        && pattern.state_key.as_deref().is_none_or(|it| it == state_key)
}

/// Whether a wish leaves the members that this pattern matches to lazy loading.
fn is_left_to_lazy(wish: &StateWish, pattern: &StatePattern, event_type: &str) -> bool {
    wish.lazy_members && event_type == MEMBER && pattern.state_key.is_none()
}

/// Whether any of these wishes names the state of this type and key.
pub(crate) fn wants(wishes: &[StateWish], event_type: &str, state_key: &str) -> bool {
    wishes.iter().any(|wish| {
        let mut included = wish.include.iter();
        included.any(|it| matches(it, event_type, state_key) && !is_left_to_lazy(wish, it, event_type))
            && !wish.exclude.iter().any(|it| matches(it, event_type, state_key))
    })
}

/// Whether members are told lazily: a wish says so, and no other wants all of them.
pub(crate) fn is_lazy(wishes: &[StateWish]) -> bool {
    let wants_all = |wish: &StateWish| {
        let is_all = |it: &StatePattern| {
            it.state_key.is_none() && it.event_type.as_deref().is_none_or(|it| it == MEMBER)
        };
        !wish.lazy_members && wish.include.iter().any(is_all) && !wish.exclude.iter().any(is_all)
    };
    wishes.iter().any(|wish| wish.lazy_members) && !wishes.iter().any(wants_all)
}

/// Collects the state that is news to the client.
pub(super) fn collect(
    room: &RoomWindow<'_, '_>,
    timeline: &Timeline,
    changes: &RoomState,
    wanted: Wanted<'_>,
) -> Result<StateNews, Fault> {
    let known = wanted.known.unwrap_or_default();
    let is_lazy = is_lazy(wanted.wishes);
    // After a gap, a client looks for members anew, so that it is told of those alone that it was told of before.
    let is_gap = timeline.limited && room.place.known().is_none_or(|known| timeline.start > known.next());
    let mut news = StateNews::default();
    let mut members: BTreeSet<StateKeyNum> = wanted.members.iter().copied().collect();
    let mut events: BTreeSet<EventNum> = BTreeSet::new();
    for changed in &changes.changed {
        let (event_type, state_key) = (changed.event_type.as_str(), changed.state_key.as_str());
        // A key that resolution took away is told whatever the client wishes now: it may have been told of it under earlier wishes, and
        // what is not there cannot be told later.
        if changed.now == StateValue::Absent && changed.was_set {
            news.gone.push((event_type.to_owned(), state_key.to_owned()));
        }
        let is_lazy_member = is_lazy
            && event_type == MEMBER
            && wanted.known.is_some()
            && (!is_gap || members.contains(&changed.key));
        if wants(wanted.wishes, event_type, state_key) || is_lazy_member {
            events.extend(changed.now.event());
            if is_lazy_member {
                members.insert(changed.key);
            }
        } else if wants(known, event_type, state_key) || members.contains(&changed.key) {
            news.has_stale = true;
            members.remove(&changed.key);
        }
    }
    for stored in load(room, changes.redacted.clone())? {
        let (event_type, state_key) = (stored.row.event_type(), stored.row.state_key().unwrap_or_default());
        let is_told = stored.row.header.state_key.is_some_and(|key| members.contains(&key));
        if wants(wanted.wishes, &event_type, &state_key) || is_told {
            events.insert(stored.event());
        } else {
            news.has_stale |= wants(known, &event_type, &state_key);
        }
    }
    let mut keys = BTreeSet::new();
    if wanted.known != Some(wanted.wishes) {
        keys.extend(list_named(room, wanted.wishes, known)?);
    }
    if is_lazy {
        let users: BTreeSet<String> = timeline.senders().chain(timeline.subjects()).collect();
        // A member whom the client knows by an older wish, and who changed meanwhile, is told as one whom it does not know.
        let changed: BTreeSet<&str> = changes
            .changed
            .iter()
            .filter(|changed| changed.event_type == MEMBER)
            .map(|changed| changed.state_key.as_str())
            .collect();
        let is_unknown = |user: &&str| !wants(known, MEMBER, user) || changed.contains(user);
        let users = users.iter().map(String::as_str).filter(is_unknown);
        let spoken_of = state::find_keys(room.window.read, room.num, MEMBER, users)?;
        let new: Vec<_> = spoken_of.into_iter().flatten().filter(|key| !members.contains(key)).collect();
        keys.extend(&new);
        if members.len() + new.len() > MEMBERS_MAX {
            members.clear();
        }
        members.extend(new.into_iter().take(MEMBERS_MAX));
    }
    let keys: Vec<StateKeyNum> = keys.into_iter().collect();
    if !keys.is_empty() {
        events.extend(values_at_end(room, &keys)?.into_iter().filter_map(StateValue::event));
    }
    news.events = load(room, events.into_iter().collect())?;
    news.members = members.into_iter().collect();
    Ok(news)
}

/// Lists the keys of a room that these wishes name and those others do not.
fn list_named(
    room: &RoomWindow<'_, '_>,
    wishes: &[StateWish],
    others: &[StateWish],
) -> Result<BTreeSet<StateKeyNum>, Fault> {
    let mut exact: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    let mut types = BTreeSet::new();
    let (mut is_all, mut are_members_left) = (false, true);
    for wish in wishes {
        for pattern in &wish.include {
            match (pattern.event_type.as_deref(), pattern.state_key.as_deref()) {
                (Some(event_type), Some(state_key)) => {
                    exact.entry(event_type).or_default().insert(state_key);
                }
                (Some(event_type), None) => _ = types.insert(event_type),
                (None, state_key) => {
                    is_all = true;
                    are_members_left &= wish.lazy_members && state_key.is_none();
                }
            }
        }
    }
    let mut found = BTreeSet::new();
    let mut take = |event_type: &str, state_key: &str, key| {
        let is_derived = event_type.starts_with(DERIVED);
        if !is_derived && wants(wishes, event_type, state_key) && !wants(others, event_type, state_key) {
            found.insert(key);
        }
    };
    let mut ranges: Vec<(String, Option<String>)> = Vec::new();
    if is_all {
        let text = |text: &str| Some(text.to_owned());
        ranges.push((String::new(), text(DERIVED)));
        if are_members_left {
            ranges.extend([(ABOVE_DERIVED.to_owned(), text(MEMBER)), (ABOVE_MEMBER.to_owned(), None)]);
        } else {
            ranges.push((ABOVE_DERIVED.to_owned(), None));
        }
    } else {
        ranges.extend(types.iter().map(|it| ((*it).to_owned(), Some(format!("{it}\0")))));
    }
    for (low, high) in ranges {
        for row in named_keys(room, &low, high.as_deref())? {
            let ((_, event_type, state_key), key) = row?;
            take(&event_type, &state_key, key);
        }
    }
    for (event_type, state_keys) in exact {
        let keys = state::find_keys(room.window.read, room.num, event_type, state_keys.iter().copied())?;
        for (state_key, key) in state_keys.into_iter().zip(keys) {
            if let Some(key) = key {
                take(event_type, state_key, key);
            }
        }
    }
    Ok(found)
}

/// Puts an event in the place of whatever is told of its key.
pub(super) fn replace(news: &mut StateNews, event: StoredEvent) {
    news.events.retain(|stored| stored.row.header.state_key != event.row.header.state_key);
    let (event_type, state_key) = (event.row.event_type(), event.row.state_key());
    news.gone.retain(|(a, b)| *a != *event_type || Some(b.as_str()) != state_key.as_deref());
    drop((event_type, state_key));
    news.events.push(event);
}

/// Reads the value of one key at the end of the window, as the event that set it.
pub(super) fn find(
    room: &RoomWindow<'_, '_>,
    event_type: &str,
    state_key: &str,
) -> Result<Option<StoredEvent>, Fault> {
    let Some(key) = state::find_key(room.window.read, room.num, event_type, state_key)? else {
        return Ok(None);
    };
    let value = values_at_end(room, &[key])?.into_iter().filter_map(StateValue::event).collect();
    Ok(current::load(room, value)?.into_iter().next())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(event_type: &str, state_key: &str) -> StatePattern {
        let part = |text: &str| (text != "*").then(|| text.to_owned());
        StatePattern { event_type: part(event_type), state_key: part(state_key) }
    }

    fn wish(include: &[(&str, &str)], exclude: &[(&str, &str)], lazy_members: bool) -> StateWish {
        let all = |list: &[(&str, &str)]| list.iter().map(|(a, b)| pattern(a, b)).collect();
        StateWish { include: all(include), exclude: all(exclude), lazy_members }
    }

    #[test]
    fn wishes_name_state_by_type_and_key_and_leave_out_what_they_exclude() {
        let wishes = [
            wish(&[("m.room.name", ""), ("org.x", "*")], &[("org.x", "no")], false),
            wish(&[("*", "k")], &[], false),
        ];
        for (event_type, state_key, expected) in [
            ("m.room.name", "", true),
            ("m.room.name", "a", false),
            ("org.x", "", true),
            ("org.x", "no", false),
            ("org.y", "k", true),
            ("org.y", "", false),
        ] {
            assert_eq!(wants(&wishes, event_type, state_key), expected, "{event_type} {state_key}");
        }
        assert!(!wants(&[], "m.room.name", ""));
    }

    #[test]
    fn lazy_members_are_left_out_of_wildcards_and_of_nothing_else() {
        let lazy = wish(&[("*", "*"), (MEMBER, "@me:x")], &[], true);
        let wishes = [lazy.clone()];
        assert!(is_lazy(&wishes));
        assert!(wants(&wishes, MEMBER, "@me:x"));
        assert!(!wants(&wishes, MEMBER, "@other:x"));
        assert!(wants(&wishes, "m.room.name", ""));
        let everybody = wish(&[(MEMBER, "*")], &[], false);
        let both = [lazy, everybody];
        assert!(!is_lazy(&both), "somebody else wants all members");
        assert!(wants(&both, MEMBER, "@other:x"));
    }
}
