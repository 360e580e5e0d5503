//! Brings a server up to date that missed events: for each room behind the events of ours that it missed where they are few, and
//! else the newest events of the room, from which the server finds what it lacks; for each user whose devices changed the newest
//! change, from which the server sees whether it missed more, so that it asks for the list.
//!
//! Only rooms are told of that the server is still in; where it was removed meanwhile, it is told that. Nothing is told of the devices of
//! a user with whom it shares no room any more.

use std::ops::Bound;

use federation::{client::Client, queue::Mark};
use ruma::{OwnedServerName, ServerName};

use crate::{
    accounts::users,
    delivery::servers::{
        edus,
        fan_out::is_told,
        marks,
        outbox::JsonOfEdu,
        subject::Subject,
        transaction::{JsonOfPdu, News},
    },
    encryption::device_lists,
    ids::{Order, Position, RoomNum, UserNum},
    rooms::{
        self,
        event::{self, StoredEvent},
        members, sticky,
    },
    schema,
    schema::rooms::RoomRow,
    store::{Direction, Fault, Snapshot},
};

/// A server that missed at most this many events of ours in a room is told all of them.
const TOLD_WHOLE_MAX: usize = 200;
/// Look at most at this many events of a room for those that are ours.
const LOOKED_AT_MAX: usize = 1_000;
/// Bring at most this many events in one step.
const EVENTS_MAX: usize = 1_000;
/// Bring at most this many sticky events of a room where more was missed than is told whole.
const STICKY_MAX: usize = 1_000;
/// Bring events of at most about this many bytes in one step.
const BYTES_MAX: usize = 4 << 20;

/// The rooms and users that one step brings up to date, and what does so.
pub(super) struct Step {
    pub(super) subjects: Vec<Subject>,
    pub(super) events: Vec<JsonOfPdu>,
    pub(super) updates: Vec<News>,
    /// Whether other marks of the server are left.
    pub(super) are_left: bool,
}

/// Works out the next step for a server, over the marks that were read before the snapshot was taken.
pub(super) fn plan(
    read: &Snapshot,
    client: &Client,
    (us, server): (&OwnedServerName, &ServerName),
    marked: &[Mark<Subject, Position>],
    count: usize,
    now_ms: u64,
) -> Result<Step, Fault> {
    let are_left = marked.len() > count;
    let mut step = Step { subjects: Vec::new(), events: Vec::new(), updates: Vec::new(), are_left };
    let mut bytes = 0;
    for mark in marked.iter().take(count) {
        if step.events.len() >= EVENTS_MAX || bytes >= BYTES_MAX {
            step.are_left = true;
            break;
        }
        step.subjects.push(mark.subject);
        if !client.caller().servers().allows(server) {
            continue;
        }
        match mark.subject {
            Subject::Room(room) => {
                for stored in of_room(read, (us, server), room, mark.place, now_ms)? {
                    bytes += stored.row.json.len();
                    step.events.push(JsonOfPdu(stored.row.json));
                }
            }
            Subject::Devices(user) => {
                let updates = of_user(read, server, user)?;
                bytes += updates.iter().map(|update| update.json.0.len()).sum::<usize>();
                step.updates.extend(updates);
            }
        }
    }
    Ok(step)
}

/// The newest change of the devices of a user of ours, with the keys with which the user signs, if the server still shares a room with the
/// user.
fn of_user(read: &Snapshot, server: &ServerName, user: UserNum) -> Result<Vec<News>, Fault> {
    let Some(account) = users::find(read, user)? else { return Ok(Vec::new()) };
    let mut is_shared = false;
    for room in members::list_joined_rooms(read, user)? {
        if members::is_server_joined(read, room, server.as_str())? {
            is_shared = true;
            break;
        }
    }
    if !is_shared {
        return Ok(Vec::new());
    }
    let update = device_lists::find_update(read, (user, &account.user_id), Position::MAX)?;
    let told = update.map(|update| edus::of_update(&account.user_id, &update)).unwrap_or_default();
    Ok(told.into_iter().map(|json| News { json: JsonOfEdu(json), outbox: None }).collect())
}

/// Reads the marks of a server: one more than a step takes, so that it is known whether some are left.
pub(super) fn list_marks(
    read: &(impl crate::store::Read + ?Sized),
    server: &ServerName,
    count: usize,
) -> Result<Vec<Mark<Subject, Position>>, Fault> {
    marks::list(read, server.as_str(), count + 1)
}

/// Lists the events of one room that bring a server up to date.
fn of_room(
    read: &Snapshot,
    (us, server): (&OwnedServerName, &ServerName),
    room: RoomNum,
    missed_from: Position,
    now_ms: u64,
) -> Result<Vec<StoredEvent>, Fault> {
    // The room may have gone since.
    let Some(row) = rooms::find_row(read, room)? else { return Ok(Vec::new()) };
    if !row.resident.has_history() {
        return Ok(Vec::new());
    }
    if was_only_named(read, room, &row, server)? {
        return Ok(Vec::new());
    }
    let low = Bound::Included((room, Order::live(missed_from)));
    let high = Bound::Included((room, Order::MAX));
    let (mut ours, mut looked_at) = (Vec::new(), 0);
    let mut are_few = true;
    for event in schema::TIMELINE.range::<(RoomNum, Order)>(read, low, high, Direction::Up)? {
        looked_at += 1;
        if looked_at > LOOKED_AT_MAX || ours.len() >= TOLD_WHOLE_MAX {
            are_few = false;
            break;
        }
        let ((_, order), row) = event?;
        let stored = StoredEvent { order, row };
        let is_told = event::is_ours_to_tell(&stored.row, us)
            && (is_told(read, room, &stored, server)?
                || is_told_sticky(read, room, (us, server), &stored, now_ms)?);
        if is_told {
            ours.push(stored);
        }
    }
    if are_few {
        return Ok(ours);
    }
    if !members::is_server_joined(read, room, server.as_str())? {
        let removes = |stored: &StoredEvent| {
            stored.membership().is_some()
                && stored.row.state_key().is_some_and(|user| event::is_of(&user, server.as_str()))
        };
        return Ok(find_last(read, room, (us, server), removes)?.into_iter().collect());
    }
    // Other servers take events from us that are ours to tell, and fetch what stands below those.
    let mut heads = Vec::new();
    for head in &row.heads {
        let Some(stored) = event::find(read, room, head.event)? else { continue };
        if event::is_ours_to_tell(&stored.row, us) && is_told(read, room, &stored, server)? {
            heads.push(stored);
        }
    }
    if heads.is_empty() {
        let last = find_last(read, room, (us, server), |_| true)?;
        heads.extend(last.or_else(|| ours.pop()));
    }
    // However much was missed, sticky events are told as long as they are sticky.
    let span = (missed_from.before(), Position::MAX);
    for (_, row) in sticky::list(read, room, span, now_ms, STICKY_MAX)? {
        if event::is_of(&row.sender, us.as_str())
            && let Some(stored) = event::find(read, room, row.event)?
            && !heads.iter().any(|head| head.order == stored.order)
        {
            heads.push(stored);
        }
    }
    heads.sort_by_key(|stored| stored.order);
    Ok(heads)
}

/// Whether a server was said to be in a room that was joined without its members, and turned out not to be: no event removed it. It would
/// be tried for ever, where it was made up.
fn was_only_named(read: &Snapshot, room: RoomNum, row: &RoomRow, server: &ServerName) -> Result<bool, Fault> {
    let Some(left) = members::server_left_at(read, room, server.as_str())? else { return Ok(false) };
    let is_by_filling = row.filled_at.is_some_and(|filled_at| left.anchor <= filled_at);
    Ok(is_by_filling && schema::TIMELINE.get(read, (room, left))?.is_none())
}

/// Whether a server that came into the room after an event is told it, because one of our users sent it and it is still sticky.
fn is_told_sticky(
    read: &Snapshot,
    room: RoomNum,
    (us, server): (&OwnedServerName, &ServerName),
    stored: &StoredEvent,
    now_ms: u64,
) -> Result<bool, Fault> {
    Ok(event::is_of(&stored.row.sender(), us.as_str())
        && sticky::left_ms(read, room, stored.order.anchor, now_ms)?.is_some()
        && members::is_server_joined(read, room, server.as_str())?)
}

/// Finds the last event of ours that a server is to be told and that is such a one. A server that is not in the room any more is told
/// what removed it.
fn find_last(
    read: &Snapshot,
    room: RoomNum,
    (us, server): (&OwnedServerName, &ServerName),
    is_such: impl Fn(&StoredEvent) -> bool,
) -> Result<Option<StoredEvent>, Fault> {
    let rows = schema::TIMELINE.prefix::<(RoomNum,)>(read, (room,), Direction::Down)?;
    for event in rows.take(LOOKED_AT_MAX) {
        let ((_, order), row) = event?;
        let stored = StoredEvent { order, row };
        if is_such(&stored)
            && event::is_ours_to_tell(&stored.row, us)
            && is_told(read, room, &stored, server)?
        {
            return Ok(Some(stored));
        }
    }
    Ok(None)
}
