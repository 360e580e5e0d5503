//! The extension for sticky events (MSC4480): those of all rooms that the client's lists match, whatever their ranges, and of the rooms that
//! it subscribes to.
//!
//! A client that joins a room is told what was sticky there before. So each event is told as of the position at which it came to matter to
//! the user: its own, or that at which they joined. The client's token says up to where it has received events in that order, and
//! is its own beside the position of the connection: it confirms with it, and keeps it when a connection ends.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    ids::{EventNum, Order, Position, RoomNum},
    rooms::{
        event::{self, StoredEvent},
        members, sticky,
        visibility::Reader,
    },
    schema::{self, rooms::Membership},
    store::Fault,
    sync::{
        SyncToken,
        shape::sliding::Answer,
        sliding::ask::SlidingAsk,
        window::{RoomPlace, RoomWindow, Standing, Window},
    },
};

/// One answer tells at most this many sticky events, whatever a client asks for, because an answer is held in memory.
const EVENTS_MAX: usize = 200;
/// A client that asks for no number of sticky events is told at most this many.
const EVENTS_DEFAULT: usize = 100;
/// The sticky events of one answer have at most this many bytes; the last may go beyond.
const BYTES_MAX: usize = 1 << 20;

/// The rooms of an answer, as far as sticky events ask for them.
pub(crate) struct Rooms<'a> {
    /// The rooms that the user is in and wants to hear of, with the position at which they joined each.
    pub(crate) matched: &'a [(RoomNum, Position)],
    /// The rooms in which something changed since the client's position.
    pub(crate) changed: &'a BTreeSet<RoomNum>,
    /// The events that the timelines of this answer show, rising.
    pub(crate) shown: &'a BTreeMap<RoomNum, Vec<Order>>,
}

/// The outcome of telling sticky events.
pub(crate) struct Told {
    /// Some are told, or left for the next answer.
    pub(crate) has_news: bool,
    /// The position that the client's token must reach for the client to have all of them; none where some are left.
    pub(crate) complete: Option<Position>,
}

/// The place of a sticky event: the position at which it came to matter to the user, and its own.
type Place = (Position, Position);

/// Tells the oldest of the sticky events that the client has not confirmed.
pub(crate) fn tell(
    window: &Window<'_>,
    ask: &SlidingAsk,
    rooms: &Rooms<'_>,
    answer: &mut Answer<'_, '_>,
) -> Result<Told, Fault> {
    let confirmed: Place = ask.sticky.map_or_else(Default::default, |at| (at.position, at.sticky_position()));
    let limit = ask.extensions.sticky.limit.map_or(Some(EVENTS_DEFAULT), |limit| usize::try_from(limit).ok());
    let limit = limit.unwrap_or(EVENTS_MAX).clamp(1, EVENTS_MAX);
    // A client that has everything up to its position can miss only what changed since.
    let has_all = ask
        .pos
        .and_then(|pos| pos.sticky)
        .is_some_and(|needed| confirmed.0 >= needed && confirmed.0 == confirmed.1 && window.since.is_some());
    let places = find_oldest(window, rooms, has_all, confirmed, limit + 1)?;
    let is_more = places.len() > limit;
    let (mut by_room, mut bytes, mut passed) = (BTreeMap::<RoomNum, Vec<StoredEvent>>::new(), 0, confirmed);
    let mut is_cut = is_more;
    for (place, (num, event)) in places.into_iter().take(limit) {
        if bytes > BYTES_MAX {
            is_cut = true;
            break;
        }
        passed = place;
        let Some(stored) = event::find(window.read, num, event)? else { continue };
        let is_shown = rooms.shown.get(&num).is_some_and(|shown| shown.binary_search(&stored.order).is_ok());
        // An event that was redacted, or whose lifetime is over, is sticky no more.
        if !is_shown && !stored.row.is_redacted() && !stored.row.header.expired {
            bytes += stored.row.json.len();
            by_room.entry(num).or_default().push(stored);
        }
    }
    let mut is_any = false;
    for (num, events) in by_room {
        is_any |= write(window, num, events, answer)?;
    }
    let is_partly_confirmed = confirmed.0 != confirmed.1;
    let is_moved = passed != confirmed || is_partly_confirmed;
    if !is_cut && is_moved {
        passed = (window.upto, window.upto);
    }
    if is_moved {
        let token = SyncToken {
            position: passed.0,
            boot: window.ephemeral.boot(),
            ephemeral: 0,
            inbox: None,
            receipts: None,
            invites: None,
            sticky: (passed.1 < passed.0).then_some(passed.1),
            device: None,
        };
        answer.sticky_next(token.to_string());
    }
    Ok(Told { has_news: is_any || is_cut, complete: (!is_cut).then_some(passed.0) })
}

/// Finds the oldest of the sticky events above a place, at most so many. `has_all` says that the client can miss only events of rooms that
/// changed.
fn find_oldest(
    window: &Window<'_>,
    rooms: &Rooms<'_>,
    has_all: bool,
    confirmed: Place,
    count: usize,
) -> Result<BTreeMap<Place, (RoomNum, EventNum)>, Fault> {
    let mut found: BTreeMap<Place, (RoomNum, EventNum)> = BTreeMap::new();
    for (num, joined) in rooms.matched {
        if has_all && !rooms.changed.contains(num) {
            continue;
        }
        let after = match joined.cmp(&confirmed.0) {
            std::cmp::Ordering::Less => confirmed.0,
            std::cmp::Ordering::Equal => confirmed.1,
            std::cmp::Ordering::Greater => Position::ZERO,
        };
        for (position, row) in sticky::list(window.read, *num, (after, window.upto), window.now_ms, count)? {
            let place = (position.max(*joined), position);
            if found.len() >= count && found.last_key_value().is_some_and(|(last, _)| place > *last) {
                break;
            }
            found.insert(place, (*num, row.event));
            if found.len() > count {
                found.pop_last();
            }
        }
    }
    Ok(found)
}

/// Writes the sticky events of a room, and says whether there are any that the user wants to see.
fn write(
    window: &Window<'_>,
    num: RoomNum,
    mut events: Vec<StoredEvent>,
    answer: &mut Answer<'_, '_>,
) -> Result<bool, Fault> {
    let caller = window.caller();
    let Some(row) = schema::ROOM.get(window.read, num)? else { return Ok(false) };
    let user_row = members::find(window.read, caller.user, num)?;
    let Some(user_row) = user_row.filter(|row| row.membership == Membership::Join) else { return Ok(false) };
    let reader = Reader::with_row(num, &caller.user_id, &user_row, window.ignored()?.clone());
    events.retain(|stored| !reader.ignores(stored));
    if events.is_empty() {
        return Ok(false);
    }
    let end = Order::upto(window.upto);
    let place = RoomPlace { standing: Standing::New, whole_state: false, timeline_limit: 0, end };
    let room = RoomWindow { window, num, row: &row, user_row: &user_row, place, reader: &reader };
    answer.sticky(&room, &events)?;
    Ok(true)
}
