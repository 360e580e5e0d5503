//! What changed in a room's state, from the main line's own record and never from the timeline alone: resolution may
//! change state with no event, and an event in the timeline need not have become state.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

use crate::{
    ids::{EventNum, Order, RoomNum, StateKeyNum},
    rooms::{event::Stored, state},
    schema,
    schema::{
        rooms::RoomRow,
        state::{Ref, Val},
    },
    store::{Direction, Fault},
    sync::streams::{Window, load_events, timeline::Timeline},
};

const MEMBER: &str = "m.room.member";
/// The lowest string above it.
const ABOVE_MEMBER: &str = "m.room.member\u{0}";
/// The types of the server's own derived keys, which no client may see, begin with this; no other does.
const DERIVED: &str = "\u{1}";
const ABOVE_DERIVED: &str = "\u{2}";

/// A key that changed.
#[derive(Clone, Copy, Debug)]
struct Changed {
    /// What the client knows.
    known: Val,
    /// The value just before the timeline begins, if it changed after that.
    at_start: Option<Val>,
}

/// How a user's membership changed.
#[derive(Clone, Debug)]
pub(crate) struct MemberChange {
    /// Who.
    pub(crate) user_id: String,
    /// The member event that the client knows.
    pub(crate) before: Val,
    /// The one that holds now.
    pub(crate) after: Val,
}

/// What is to be told of a room's state.
#[derive(Debug, Default)]
pub(crate) struct RoomState {
    /// The events.
    pub(crate) events: Vec<Stored>,
    /// All members that changed since the client asked last, shown or not.
    pub(crate) members: Vec<MemberChange>,
}

/// The state that a client needs beside this timeline, if it knows the room as it was at `known`.
pub(crate) fn changed(
    window: &Window<'_>,
    num: RoomNum,
    timeline: &Timeline,
    known: Order,
    upto: Order,
) -> Result<RoomState, Fault> {
    let keys = list_changed(window, num, timeline.start, known, upto)?;
    if keys.is_empty() {
        return Ok(RoomState::default());
    }
    let shown: BTreeSet<EventNum> = timeline.events.iter().map(|(stored, _)| stored.event()).collect();
    let mut wanted = Vec::new();
    let mut found = RoomState::default();
    for (key, changed) in keys {
        let Some((kind, state_key)) = state::key_name(window.read, num, key)? else { continue };
        if kind.starts_with(DERIVED) {
            continue;
        }
        let now = state::at(window.read, num, Ref::Main(upto), key)?;
        let at_start = changed.at_start.unwrap_or(now);
        if window.ask.use_state_after {
            wanted.extend(now.event().filter(|_| now != changed.known));
        } else {
            wanted.extend(at_start.event().filter(|_| at_start != changed.known));
            // It changed within the timeline, but not by an event of the timeline.
            wanted.extend(now.event().filter(|event| now != at_start && !shown.contains(event)));
        }
        if kind == MEMBER && now != changed.known {
            found.members.push(MemberChange { user_id: state_key, before: changed.known, after: now });
        }
    }
    found.events = load_events(window.read, num, &wanted)?;
    Ok(found)
}

fn list_changed(
    window: &Window<'_>,
    num: RoomNum,
    start: Order,
    known: Order,
    upto: Order,
) -> Result<BTreeMap<StateKeyNum, Changed>, Fault> {
    let mut keys = BTreeMap::new();
    for row in state::changes(window.read, num, known, upto)? {
        let (order, changes) = row?;
        for (key, prior) in changes {
            let changed = keys.entry(key).or_insert(Changed { known: prior, at_start: None });
            if order >= start && changed.at_start.is_none() {
                changed.at_start = Some(prior);
            }
        }
    }
    Ok(keys)
}

/// Where the state stands that goes with a timeline: before its first event, or after its last.
pub(crate) fn place(window: &Window<'_>, timeline: &Timeline, upto: Order) -> Ref {
    // A place that is looked into, and not compared, need not be rounded down to the last change.
    Ref::Main(if window.ask.use_state_after { upto } else { timeline.start.before() })
}

/// The whole state at a place; of members only these, if the client loads members lazily.
pub(crate) fn whole(
    window: &Window<'_>,
    num: RoomNum,
    at: Ref,
    members: Option<&BTreeSet<String>>,
) -> Result<Vec<Stored>, Fault> {
    let read = window.read;
    let mut events = Vec::new();
    match members {
        None => {
            let derived = list_keys(window, num, DERIVED, Some(ABOVE_DERIVED))?;
            let derived: BTreeSet<_> = derived.into_iter().collect();
            for row in state::full(read, num, at)? {
                let (key, event) = row?;
                if !derived.contains(&key) {
                    events.push(event);
                }
            }
        }
        Some(members) => {
            let mut keys = list_keys(window, num, "", Some(DERIVED))?;
            keys.extend(list_keys(window, num, ABOVE_DERIVED, Some(MEMBER))?);
            keys.extend(list_keys(window, num, ABOVE_MEMBER, None)?);
            let members = members.iter().map(String::as_str);
            keys.extend(state::find_keys(read, num, MEMBER, members)?.into_iter().flatten());
            events.extend(state::list_at(read, num, at, &keys)?.into_iter().filter_map(Val::event));
        }
    }
    load_events(read, num, &events)
}

/// The numbers of the keys whose types stand in `[low, high)`; none is above all.
fn list_keys(
    window: &Window<'_>,
    num: RoomNum,
    low: &str,
    high: Option<&str>,
) -> Result<Vec<StateKeyNum>, Fault> {
    let high = high.map_or((RoomNum(num.0.saturating_add(1)), ""), |high| (num, high));
    let (low, high) = (Bound::Included((num, low)), Bound::Excluded(high));
    let rows = schema::STATE_KEY_NUM.range::<(RoomNum, String)>(window.read, low, high, Direction::Up)?;
    rows.map(|row| row.map(|(_, key)| key)).collect()
}

/// The events as the client sees them, without those that its filter leaves out.
pub(crate) fn show(
    window: &Window<'_>,
    num: RoomNum,
    row: &RoomRow,
    events: &[Stored],
    whole: bool,
) -> Result<Vec<String>, Fault> {
    let filter = &window.ask.filter.state;
    if !filter.wants_room(&row.id) {
        return Ok(Vec::new());
    }
    let wanted = events.iter().filter(|stored| filter.wants(stored));
    wanted.map(|stored| window.show_state(num, row, stored, whole)).collect()
}
