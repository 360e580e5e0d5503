//! Looks for what `/events` tells. A look goes over a part of the log that holds few enough events for one answer, so that nothing
//! of it is left out: the old stream knows no `limited`.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

use ruma::RoomId;

use super::{Open, ask, form, list_watched, token};
use crate::{
    accounts::Caller,
    error::Result,
    ids::{Order, Position, RoomNum, UserNum},
    json::JsonText,
    rooms::{
        change::outside,
        event::{self, StoredEvent},
        members,
        visibility::Reader,
    },
    schema::{
        self,
        rooms::{Membership, RoomRow, UserRoomRow},
    },
    store::{Direction, Fault, LogEntry, Read, Snapshot, tables, tail},
    sync::{
        Parts, SyncToken,
        changes::Changes,
        collect,
        sent::SentMembers,
        streams::{account_data, presence, receipts, typing},
        window::{Moment, RoomPlace, RoomWindow, Standing, Window},
    },
};

/// One look goes over events of at most this many bytes; the first may go beyond.
const EVENT_BYTES_MAX: usize = 512 << 10;
/// One look goes over at most this many entries of the log.
const ENTRIES_MAX: usize = 2_000;

/// The outcome of a look.
pub(super) struct Streamed {
    /// The news: first the events of rooms in their order, then what is ephemeral.
    pub(super) events: Vec<JsonText>,
    /// The token that goes on from here.
    pub(super) end: SyncToken,
    /// The log goes on after what was looked at.
    pub(super) is_behind: bool,
    /// Those with whom the caller is woken, if they look into a room that they are not in.
    pub(super) watched: Vec<UserNum>,
}

/// The events of one look, each with its place in the log.
#[derive(Default)]
struct Found {
    events: Vec<(Order, JsonText)>,
    beside: Vec<JsonText>,
}

impl Parts {
    pub(super) fn look_at_stream(
        &self,
        caller: Caller,
        since: SyncToken,
        room: Option<&RoomId>,
        limit: usize,
    ) -> Result<Streamed> {
        let snapshot = self.store.snapshot();
        let (read, now, user): (&Snapshot, Position, UserNum) = (&snapshot, snapshot.upto(), caller.user);
        let moment = Moment::since(&self.ephemeral, Some(since));
        let sent = SentMembers::default();
        let ask = ask(caller, Some(since), limit)?;
        let only = room.map(|room| {
            let window = self.window(read, &ask, now, Moment::default(), &sent);
            Open::of(&window, room)
        });
        let only = only.transpose()?;
        let upto = part(read, user, only.as_ref().map(|open| open.num), (since.position, now), limit)?;
        let window = self.window(read, &ask, upto, moment, &sent);
        let mut found = Found::default();
        let told_upto = match &only {
            Some(open) => of_room(&window, open, &mut found)?,
            None => of_all(&window, &mut found)?,
        };
        let watched = only.as_ref().map(|open| list_watched(read, user, open)).transpose()?;
        found.events.sort_by_key(|(order, _)| *order);
        let mut events: Vec<JsonText> = found.events.into_iter().map(|(_, event)| event).collect();
        events.append(&mut found.beside);
        let number = told_upto.unwrap_or(window.moment.number);
        let mut end = token(upto, self.ephemeral.boot(), number);
        end.receipts = window.receipts_told_upto();
        let is_behind = upto < now || end.receipts.is_some();
        Ok(Streamed { events, end, is_behind, watched: watched.unwrap_or_default() })
    }
}

/// Finds up to where the log can be told at once: as far as it has few enough events of the user's rooms. It also ends before an
/// event below which others are missing, because a timeline ends there.
fn part(
    read: &Snapshot,
    user: UserNum,
    only: Option<RoomNum>,
    (from, now): (Position, Position),
    limit: usize,
) -> Result<Position, Fault> {
    let trimmed = tail::trimmed(read)?;
    if from < trimmed {
        // The log of that time is gone; what is told of it is the newest of each room.
        return Ok(trimmed.min(now));
    }
    let mut is_told: BTreeMap<RoomNum, bool> = BTreeMap::new();
    let (mut bytes, mut count, mut upto) = (0, 0, from);
    let range = (Bound::Excluded(from), Bound::Included(now));
    if from >= now {
        return Ok(now);
    }
    for (entries, row) in tables::LOG.range::<Position>(read, range.0, range.1, Direction::Up)?.enumerate() {
        let (position, entry) = row?;
        if entries == ENTRIES_MAX {
            return Ok(upto);
        }
        if let LogEntry::Event { room, event } = entry {
            let concerns = match (is_told.get(&room), only) {
                (_, Some(only)) => only == room,
                (Some(known), None) => *known,
                (None, None) => members::find(read, user, room)?.is_some(),
            };
            is_told.insert(room, concerns);
            if concerns && let Some(stored) = event::find(read, room, event)? {
                let length = stored.row.json.len();
                let is_full = count == limit.max(1) || bytes + length > EVENT_BYTES_MAX;
                if count > 0 && (is_full || event::lacks_cited(&stored.row)) {
                    return Ok(upto);
                }
                (count, bytes) = (count + 1, bytes + length);
            }
        }
        upto = position;
    }
    Ok(now)
}

/// Collects the news of one room, and answers the number of the last change of presence that was told, if more are left.
fn of_room(window: &Window<'_>, open: &Open, found: &mut Found) -> Result<Option<u64>, Fault> {
    let (num, row, user_row) = (open.num, &open.row, &open.user_row);
    add_timeline(window, (num, row, user_row), &open.reader, open.end, found)?;
    if !open.is_present() {
        return Ok(None);
    }
    add_ephemeral(window, (num, row, user_row), &open.reader, found)?;
    if user_row.membership != Membership::Join {
        return Ok(None);
    }
    let news = presence::of_room(window, num)?;
    found.beside.extend(form::presence(window, &news.told));
    Ok(news.told_upto)
}

/// Collects the news of all rooms of the user, and the user's own.
fn of_all(window: &Window<'_>, found: &mut Found) -> Result<Option<u64>, Fault> {
    let (read, caller) = (window.read, &window.ask.caller);
    let typing: BTreeSet<RoomNum> = window.moment.typing.iter().map(|(room, _)| *room).collect();
    let from = window.from.min(window.receipts_from());
    let whose = (caller.user, caller.user_id.as_str());
    let changes = Changes::find(read, whose, from, window.upto, &typing)?;
    let rows = schema::ROOM.get_many(read, changes.rooms.iter().map(|(room, _)| *room))?;
    for ((num, user_row), row) in changes.rooms.iter().zip(rows) {
        let Some(row) = row else { continue };
        if user_row.forgotten && user_row.since <= window.from {
            continue;
        }
        let ignored = window.ignored()?.clone();
        let reader = Reader::with_row(*num, &caller.user_id, user_row, ignored);
        let of = (*num, &row, user_row);
        if let Some(left) = reader.joined_until().filter(|_| row.resident.has_history()) {
            add_timeline(window, of, &reader, left, found)?;
        }
        if user_row.membership == Membership::Join {
            add_ephemeral(window, of, &reader, found)?;
        } else {
            add_own(window, of, &reader, found)?;
        }
    }
    for (room, data) in &account_data::collect(window, &changes)?.by_room {
        let room = <&RoomId>::try_from(room.as_str()).ok();
        found.beside.extend(data.iter().map(|(kind, row)| form::account_data(kind, row, room)));
    }
    let news = presence::collect(window, &changes)?;
    found.beside.extend(form::presence(window, &news.told));
    Ok(news.told_upto)
}

fn place(window: &Window<'_>, end: Order) -> RoomPlace {
    let timeline_limit = window.ask.filter.timeline_limit;
    let end = end.min(Order::upto(window.upto));
    RoomPlace { standing: Standing::Knows(window.known_order()), whole_state: false, timeline_limit, end }
}

/// Adds the events of a room up to `end`, and state that changed without one of them.
fn add_timeline(
    window: &Window<'_>,
    (num, row, user_row): (RoomNum, &RoomRow, &UserRoomRow),
    reader: &Reader,
    end: Order,
    found: &mut Found,
) -> Result<(), Fault> {
    let place = place(window, end);
    if place.end <= window.known_order() {
        return Ok(());
    }
    let room = RoomWindow { window, num, row, user_row, place, reader };
    let (timeline, state) = collect::plain(&room)?;
    let shown = form::timeline(&room, &timeline.events)?;
    let orders = timeline.events.iter().map(|(stored, _)| stored.order);
    found.events.extend(orders.zip(shown));
    if user_row.membership == Membership::Join && user_row.since > window.from {
        // A client that came to a room asks for its state.
        return Ok(());
    }
    let last = timeline.shown_state();
    let is_told = |stored: &&StoredEvent| {
        let key = stored.row.header.state_key;
        key.and_then(|key| last.get(&key)).is_none_or(|(_, event)| *event != stored.event())
    };
    for stored in state.iter().filter(is_told) {
        found.events.push((place.end, form::state(&room, stored)?));
    }
    Ok(())
}

/// Adds the receipts of a room, and who types there.
fn add_ephemeral(
    window: &Window<'_>,
    (num, row, user_row): (RoomNum, &RoomRow, &UserRoomRow),
    reader: &Reader,
    found: &mut Found,
) -> Result<(), Fault> {
    let place = place(window, Order::MAX);
    let room = RoomWindow { window, num, row, user_row, place, reader };
    let receipts = receipts::collect(&room)?;
    found.beside.extend(form::receipts(&row.id, &receipts));
    if let Some(typists) = typing::collect(&room)? {
        found.beside.push(form::typing(&row.id, &typists));
    }
    Ok(())
}

/// Adds the event that made the user what they are to a room that they are not in, if the room's timeline does not tell it.
fn add_own(
    window: &Window<'_>,
    (num, row, user_row): (RoomNum, &RoomRow, &UserRoomRow),
    reader: &Reader,
    found: &mut Found,
) -> Result<(), Fault> {
    let order = match collect::order_of(window, num, user_row.event)? {
        Some(order) => order,
        // An event from outside the room came at the position since which it counts.
        None => Order::live(user_row.since),
    };
    let is_news = order > window.known_order() && order <= Order::upto(window.upto);
    if !is_news || reader.joined_until().is_some_and(|left| order <= left) {
        return Ok(());
    }
    let room = RoomWindow { window, num, row, user_row, place: place(window, Order::MAX), reader };
    let told = match user_row.membership {
        Membership::Invite | Membership::Knock => match collect::outside(&room)? {
            Some(told) => form::invitation(&room, &told)?,
            None => None,
        },
        Membership::Leave | Membership::Ban | Membership::Join => {
            match outside::find(window.read, num, window.ask.caller.user, user_row)? {
                Some(told) => {
                    outside::shown(&told, row.version).map(|event| form::with_names(&event, Some(&row.id)))
                }
                None => {
                    let own = event::find(window.read, num, user_row.event)?;
                    own.map(|own| form::state(&room, &own)).transpose()?
                }
            }
        }
    };
    found.events.extend(told.map(|event| (order, event)));
    Ok(())
}
