//! The state that a client needs beside a timeline. It is read from the main line's own record and never derived from
//! the timeline: resolution may change state without an event, an event in the timeline need not have become state, and
//! events that the timeline leaves out (by visibility, by a filter, because their sender is ignored) may have changed
//! state.
//!
//! The rule: a client that lays `state` over what it knows, and then each state event of the timeline over that, has
//! the state at the end of the window. So a key that the timeline does not show is told as it is at the end, and a key
//! that the timeline shows is told as it was before the timeline. A timeline whose last event of a key held once, and is
//! not what holds at the end, is cut below that event, and is `limited`. An event that never held (resolution chose another
//! one) cuts nothing, or messages beside it would be missed: after it such a client is wrong until the key changes again,
//! on this server as on others. With `state_after`, the client takes no state from the timeline.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

use super::lazy;
use crate::{
    ids::{EventNum, Order, RoomNum, StateKeyNum},
    rooms::{
        event::{self, StoredEvent},
        redact, state,
    },
    schema,
    schema::event_types::{CANONICAL_ALIAS, MEMBER, NAME},
    schema::state::{StateRef, StateValue},
    store::{Direction, Fault},
    sync::{streams::timeline::Timeline, window::RoomWindow},
};

/// The lowest string above `MEMBER`, where listing the other types goes on.
pub(super) const ABOVE_MEMBER: &str = "m.room.member\u{0}";
/// In a room of at most this many state keys, the whole state is read even for a client that loads members lazily: to list the
/// keys of other types would cost more.
const SMALL_ROOM_KEYS: u32 = 24;
/// The types of the server's own derived keys begin with this, and no other type does. No client may see them.
pub(super) const DERIVED: &str = "\u{1}";
pub(super) const ABOVE_DERIVED: &str = "\u{2}";

/// A change of one user's membership within the window.
#[derive(Clone, Debug)]
pub(crate) struct MemberChange {
    /// The id of the user whose membership changed.
    pub(crate) user_id: String,
    /// The member event that the client knows.
    pub(crate) before: StateValue,
    /// The member event that holds at the end of the window.
    pub(crate) after: StateValue,
}

/// A key of a room's state that is another than the client knows.
#[derive(Clone, Debug)]
pub(super) struct ChangedKey {
    pub(super) key: StateKeyNum,
    pub(super) event_type: String,
    pub(super) state_key: String,
    /// The client knew the key with a value.
    pub(super) was_set: bool,
    /// The value that holds at the end of the window.
    pub(super) now: StateValue,
}

/// The changes of a room's state since the client knew it.
#[derive(Debug, Default)]
pub(crate) struct RoomState {
    /// The events of keys that changed, as they are to be told beside the timeline.
    told: Vec<EventNum>,
    /// The keys that are others than the client knows.
    pub(super) changed: Vec<ChangedKey>,
    /// State events that hold and that the client knows as they were before they were redacted.
    pub(super) redacted: Vec<EventNum>,
    /// The keys of which the timeline shows an event.
    shown: BTreeSet<StateKeyNum>,
    /// All members that changed, whether the timeline shows them or not.
    pub(crate) members: Vec<MemberChange>,
    /// The room's name or canonical alias changed.
    pub(crate) is_renamed: bool,
}

/// A key that changed since the client knew the room, or of which the timeline shows an event.
#[derive(Debug, Default)]
struct Key {
    /// Each change with the value before it, rising.
    changes: Vec<(Order, StateValue)>,
    /// The last event of the key in the timeline.
    shown: Option<(Order, EventNum)>,
}

/// Finds the changes of state since the client knew the room. Cuts the timeline where it would leave the client with
/// state that does not hold.
pub(super) fn changes(room: &RoomWindow<'_, '_>, timeline: &mut Timeline) -> Result<RoomState, Fault> {
    let mut keys: BTreeMap<StateKeyNum, Key> = BTreeMap::new();
    if let Some(known) = room.place.known()
        && room.row.state_tip > known
    {
        for row in state::changes(room.window.read, room.num, known, room.place.end)? {
            let (order, changes) = row?;
            for (key, prior) in changes {
                keys.entry(key).or_default().changes.push((order, prior));
            }
        }
    }
    for (key, shown) in timeline.shown_state() {
        keys.entry(key).or_default().shown = Some(shown);
    }
    let mut found = RoomState::default();
    if keys.is_empty() {
        found.redacted = redacted(room, timeline)?;
        found.told = found.redacted.clone();
        return Ok(found);
    }
    let numbers: Vec<_> = keys.keys().copied().collect();
    let now = values_at_end(room, &numbers)?;
    if !room.window.ask.use_state_after {
        cut(room, timeline, &mut keys, &now)?;
    }
    let names = state::list_key_names(room.window.read, room.num, numbers)?;
    for (((number, key), now), name) in keys.into_iter().zip(now).zip(names) {
        let Some((event_type, state_key)) = name else { continue };
        if event_type.starts_with(DERIVED) {
            continue;
        }
        if key.shown.is_some() {
            found.shown.insert(number);
        }
        let Some(known) = heard_before(&key.changes, now) else { continue };
        let at_start = key.changes.iter().find(|(order, _)| *order >= timeline.start);
        let is_before = key.shown.is_some() && !room.window.ask.use_state_after;
        let told = if is_before { at_start.map_or(now, |(_, prior)| *prior) } else { now };
        found.told.extend(told.event().filter(|_| told != known));
        if now == known {
            continue;
        }
        let (name, was_set) = ((event_type.clone(), state_key.clone()), known.event().is_some());
        found.changed.push(ChangedKey { key: number, event_type: name.0, state_key: name.1, was_set, now });
        match event_type.as_str() {
            MEMBER => {
                found.members.push(MemberChange { user_id: state_key, before: known, after: now });
            }
            NAME | CANONICAL_ALIAS => found.is_renamed = true,
            _ => {}
        }
    }
    let told: BTreeSet<EventNum> = found.told.iter().copied().collect();
    found.redacted = redacted(room, timeline)?;
    found.told.extend(found.redacted.iter().copied().filter(|event| !told.contains(event)));
    Ok(found)
}

/// The value of a key that the client knows, by the changes since then and the value after them; `None` where nothing changed. A value
/// that a join left out at first is part of the past once it is known (`rooms/state/late.rs`), so that the step which tells it
/// changes nothing, and no client has heard of it. What fills a hole may stand below that step and change the key, too: then the past
/// below the hole has the value, and the step brings it where there was none. It may also have taken the place of what a fork had brought
/// under the key meanwhile: then the first step turns from a value that nobody had heard of, and a later one comes back to it.
fn heard_before(changes: &[(Order, StateValue)], now: StateValue) -> Option<StateValue> {
    let (_, known) = changes.first().copied()?;
    let after = changes.iter().skip(1).map(|(_, prior)| *prior).chain([now]);
    let mut steps = changes.iter().zip(after).filter(|((order, _), _)| order.minor == 0);
    let is_late = steps.any(|((_, prior), after)| {
        // A client that has heard of the value all the same is told once more.
        *prior == after || after == known
    });
    Some(if is_late { StateValue::Absent } else { known })
}

/// Lists the state events of now that the client knows as they were before they were redacted, because the timeline does not
/// show it their redactions. A client that is told the state after the timeline need not look for redactions in the timeline.
fn redacted(room: &RoomWindow<'_, '_>, timeline: &Timeline) -> Result<Vec<EventNum>, Fault> {
    let Some(known) = room.place.known() else { return Ok(Vec::new()) };
    let is_after = room.window.ask.use_state_after;
    if !timeline.may_redact || !(timeline.leaves_out || is_after) {
        return Ok(Vec::new());
    }
    let (read, num) = (room.window.read, room.num);
    let mut events = BTreeMap::new();
    for row in redact::list_redacted_state(read, num, known, room.place.end)? {
        let (order, event) = row?;
        if (is_after || !timeline.shows(order))
            && let Some(stored) = event::find_anywhere(read, num, event)?
            && let Some(key) = stored.row.header.state_key
        {
            events.entry(key).or_insert_with(Vec::new).push(event);
        }
    }
    let keys: Vec<StateKeyNum> = events.keys().copied().collect();
    let now = if keys.is_empty() { Vec::new() } else { values_at_end(room, &keys)? };
    let is_now = now.into_iter().zip(events.into_values());
    Ok(is_now.filter_map(|(now, events)| now.event().filter(|event| events.contains(event))).collect())
}

/// Leaves out the part of a timeline after which some key would not be what it is at the end.
fn cut(
    room: &RoomWindow<'_, '_>,
    timeline: &mut Timeline,
    keys: &mut BTreeMap<StateKeyNum, Key>,
    now: &[StateValue],
) -> Result<(), Fault> {
    let mut wrong = None;
    for ((number, key), now) in keys.iter().zip(now) {
        let Some((order, event)) = key.shown else { continue };
        if *now == StateValue::Unknown || now.event() == Some(event) || wrong >= Some(order) {
            continue;
        }
        let then = state::list_at(room.window.read, room.num, StateRef::Main(order), &[*number])?;
        if then.first().is_some_and(|then| then.event() == Some(event)) {
            wrong = Some(order);
        }
    }
    let Some(wrong) = wrong else { return Ok(()) };
    tracing::debug!(
        room = room.num.0, through = ?wrong,
        reason = "state changed by what the timeline does not show", "a timeline is cut"
    );
    timeline.cut_through(wrong);
    for key in keys.values_mut() {
        key.shown = key.shown.filter(|(order, _)| *order > wrong);
    }
    Ok(())
}

/// The values of keys at the end of the window.
pub(super) fn values_at_end(
    room: &RoomWindow<'_, '_>,
    keys: &[StateKeyNum],
) -> Result<Vec<StateValue>, Fault> {
    let read = room.window.read;
    if room.place.end >= room.row.state_tip {
        state::list_now(read, room.num, keys.iter().copied())
    } else {
        state::list_at(read, room.num, StateRef::Main(room.place.end), keys)
    }
}

/// Collects the state that goes with a timeline, lazily loaded members included.
pub(super) fn collect(
    room: &RoomWindow<'_, '_>,
    timeline: &Timeline,
    changes: &RoomState,
    heroes: Option<&[String]>,
) -> Result<Vec<StoredEvent>, Fault> {
    let (ask, is_whole) = (&room.window.ask, room.place.is_whole());
    if !ask.filter.lazy_members {
        return if is_whole {
            whole(room, timeline, changes, None)
        } else {
            load(room, changes.told.clone())
        };
    }
    let mut wanted: BTreeSet<String> = timeline.senders().collect();
    wanted.extend(heroes.unwrap_or_default().iter().cloned());
    if ask.use_state_after {
        // Such a client takes no state from the timeline, so that it needs these member events beside it.
        wanted.extend(timeline.subjects());
    }
    let events = if is_whole {
        wanted.insert(ask.caller.user_id.to_string());
        let wanted = lazy::changed_members(room)?.map(|changed| &changed | &wanted);
        whole(room, timeline, changes, wanted.as_ref())?
    } else {
        let mut events = load(room, changes.told.clone())?;
        let told: BTreeSet<EventNum> = events.iter().map(StoredEvent::event).collect();
        events.extend(missing(room, timeline, changes, &wanted, &told)?);
        events
    };
    // A member that the filter leaves out is not told, so that it is not remembered either.
    let filter = &ask.filter.state;
    let mut told = Vec::new();
    if filter.wants_room(&room.row.id) {
        for stored in &events {
            if room.wants(filter, stored)? {
                told.push(stored);
            }
        }
    }
    let of_timeline = timeline.events.iter().map(|(stored, _)| stored);
    lazy::remember(room, told.into_iter().chain(of_timeline));
    Ok(events)
}

/// Loads the member events of these users that the device does not know and that this answer does not tell otherwise.
fn missing(
    room: &RoomWindow<'_, '_>,
    timeline: &Timeline,
    changes: &RoomState,
    users: &BTreeSet<String>,
    told: &BTreeSet<EventNum>,
) -> Result<Vec<StoredEvent>, Fault> {
    let keys = state::find_keys(room.window.read, room.num, MEMBER, users.iter().map(String::as_str))?;
    let known: Vec<_> = users.iter().zip(keys).filter_map(|(user_id, key)| Some((user_id, key?))).collect();
    let keys: Vec<_> = known.iter().map(|(_, key)| *key).collect();
    let values = values_beside(room, timeline, changes, &keys)?;
    let events: Vec<EventNum> = values.into_iter().filter_map(StateValue::event).collect();
    let mut missing = load(room, events)?;
    missing.retain(|stored| {
        let user_id = stored.row.state_key().unwrap_or_default();
        !told.contains(&stored.event()) && !lazy::knows(room, &user_id, stored)
    });
    Ok(missing)
}

/// The values of keys as they are told beside a timeline: as before it for keys that it shows, as at the end for
/// others.
fn values_beside(
    room: &RoomWindow<'_, '_>,
    timeline: &Timeline,
    changes: &RoomState,
    keys: &[StateKeyNum],
) -> Result<Vec<StateValue>, Fault> {
    let mut values = values_at_end(room, keys)?;
    if room.window.ask.use_state_after || changes.shown.is_empty() {
        return Ok(values);
    }
    let before = StateRef::Main(timeline.start.before());
    for (key, value) in keys.iter().zip(&mut values).filter(|(key, _)| changes.shown.contains(key)) {
        *value = state::at(room.window.read, room.num, before, *key)?;
    }
    Ok(values)
}

/// Loads the whole state that goes with a timeline. Of the members it has only these, if the client loads them lazily.
fn whole(
    room: &RoomWindow<'_, '_>,
    timeline: &Timeline,
    changes: &RoomState,
    members: Option<&BTreeSet<String>>,
) -> Result<Vec<StoredEvent>, Fault> {
    let (read, num) = (room.window.read, room.num);
    let Some(members) = members else { return load(room, everything(room, timeline, changes)?) };
    if room.row.next_key <= SMALL_ROOM_KEYS {
        let mut events = load(room, everything(room, timeline, changes)?)?;
        events.retain(|stored| {
            let is_other_member =
                || stored.row.state_key().is_none_or(|user_id| !members.contains(&*user_id));
            !(stored.row.event_type() == MEMBER && is_other_member())
        });
        return Ok(events);
    }
    let mut keys = list_keys(room, "", Some(DERIVED))?;
    keys.extend(list_keys(room, ABOVE_DERIVED, Some(MEMBER))?);
    keys.extend(list_keys(room, ABOVE_MEMBER, None)?);
    let members = members.iter().map(String::as_str);
    keys.extend(state::find_keys(read, num, MEMBER, members)?.into_iter().flatten());
    keys.sort_unstable();
    let values = values_beside(room, timeline, changes, &keys)?;
    load(room, values.into_iter().filter_map(StateValue::event).collect())
}

/// Lists the events of the whole state that goes with a timeline.
fn everything(
    room: &RoomWindow<'_, '_>,
    timeline: &Timeline,
    changes: &RoomState,
) -> Result<Vec<EventNum>, Fault> {
    let (read, num) = (room.window.read, room.num);
    let mut values: Vec<(StateKeyNum, StateValue)> = Vec::new();
    let event = |(key, event)| (key, StateValue::Event(event));
    if room.place.end >= room.row.state_tip {
        for row in state::list_current(read, num)? {
            values.push(event(row?));
        }
    } else {
        for row in state::full(read, num, StateRef::Main(room.place.end))? {
            values.push(event(row?));
        }
    }
    values.sort_unstable_by_key(|(key, _)| *key);
    let shown: Vec<_> = changes.shown.iter().copied().collect();
    for (key, value) in shown.iter().copied().zip(values_beside(room, timeline, changes, &shown)?) {
        match values.binary_search_by_key(&key, |(key, _)| *key) {
            Ok(at) => values.get_mut(at).into_iter().for_each(|(_, old)| *old = value),
            Err(at) => values.insert(at, (key, value)),
        }
    }
    Ok(values.into_iter().filter_map(|(_, value)| value.event()).collect())
}

/// Lists the numbers of the keys whose types are in `[low, high)`. Without `high`, the range has no upper end.
fn list_keys(room: &RoomWindow<'_, '_>, low: &str, high: Option<&str>) -> Result<Vec<StateKeyNum>, Fault> {
    named_keys(room, low, high)?.map(|row| row.map(|(_, key)| key)).collect()
}

/// A row of the keys of a room: its type and state key, and its number.
type NamedKey = ((RoomNum, String, String), StateKeyNum);

/// The keys whose types are in `[low, high)`, by type and state key. Without `high`, the range has no upper end.
pub(super) fn named_keys<'r>(
    room: &RoomWindow<'r, '_>,
    low: &str,
    high: Option<&str>,
) -> Result<impl Iterator<Item = Result<NamedKey, Fault>> + 'r, Fault> {
    let num = room.num;
    let high = high.map_or((RoomNum(num.0.saturating_add(1)), ""), |high| (num, high));
    let (low, high) = (Bound::Included((num, low)), Bound::Excluded(high));
    schema::STATE_KEY_NUM.range::<(RoomNum, String)>(room.window.read, low, high, Direction::Up)
}

pub(super) fn load(room: &RoomWindow<'_, '_>, events: Vec<EventNum>) -> Result<Vec<StoredEvent>, Fault> {
    event::list_shown(room.window.read, room.num, events)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Position;

    #[test]
    fn nobody_has_heard_of_a_value_that_came_into_the_past_whatever_fills_a_hole_below_it() {
        let event = |number| StateValue::Event(EventNum(number));
        let at = |position, minor| Order { anchor: Position::new(position).unwrap(), minor };
        let filled = [(at(7, i32::MIN), event(1)), (at(7, -1), StateValue::Absent)];
        let late = (at(8, 0), event(1));
        let heard = |changes: &[_], now| heard_before(changes, now);
        assert_eq!(heard(&[], event(1)), None);
        assert_eq!(heard(&[late], event(1)), Some(StateValue::Absent));
        assert_eq!(heard(&[filled[0], filled[1], late], event(1)), Some(StateValue::Absent));
        assert_eq!(
            heard(&[filled[0], filled[1], late, (at(9, 0), event(1))], event(2)),
            Some(StateValue::Absent)
        );
        // An event of its own that fills the hole, or a later one, tells clients what they had not known.
        assert_eq!(heard(&filled, event(1)), Some(event(1)));
        assert_eq!(heard(&[(at(8, 0), event(1))], event(2)), Some(event(1)));
        // It came into the past below a hole that was filled, above which an event had brought it.
        let brought = [(at(8, i32::MIN), event(1)), (at(8, -1), event(1)), (at(8, 0), StateValue::Absent)];
        assert_eq!(heard(&brought, event(1)), Some(StateValue::Absent));
        assert_eq!(heard(&brought, event(2)), Some(event(1)));
        // It took the place of what a fork had brought while it was not known.
        let replaced = [(at(8, 0), event(1)), (at(9, 0), event(2))];
        assert_eq!(heard(&replaced, event(1)), Some(StateValue::Absent));
        assert_eq!(heard(&replaced, event(3)), Some(event(1)));
        // A row at the floor that only says what was so is no step.
        assert_eq!(heard(&[filled[0], (at(9, 0), event(1))], event(2)), Some(event(1)));
    }
}
