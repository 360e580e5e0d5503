//! Sticky events (MSC4354): events that each member of a room is told, and each server in it, as long as they are sticky.
//!
//! A sticky event is indexed by the position at which it became part of the timeline, until some time after it has ceased to be sticky.
//! One that was soft-failed is remembered, too: it is judged again when the membership of its sender changes
//! (`src/flows/room/ingest/sticky.rs`), and becomes part of the timeline then.

use std::{borrow::Cow, collections::BTreeMap, ops::Bound};

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    ids::{EventNum, Position, RoomNum},
    rooms::event::StoredEvent,
    schema::{self, event_types::STICKY, jobs::Job, rooms::StickyRow},
    store::{Batch, Direction, Fault, Read, timer},
};

/// An event is sticky for at most this many milliseconds, whatever it says.
pub const STICKY_MS_MAX: u64 = 60 * 60 * 1000;
/// A user has at most this many sticky events in a room, of which the oldest cease to be so: all members are told each of them.
const OF_SENDER_MAX: usize = 100;
/// At most this many soft-failed sticky events of a user are remembered in a room.
const SOFT_FAILED_MAX: usize = 20;
/// Forget events this many milliseconds after they came, when they have ceased to be sticky.
const FORGOTTEN_AFTER_MS: u64 = STICKY_MS_MAX;
/// Look at most at this many sticky events of a room at a time to forget those that are sticky no more.
const LOOKED_AT_MAX: usize = 1_000;

/// The field that makes an event sticky.
#[derive(Deserialize)]
struct Sticky {
    duration_ms: u64,
}

/// Gives the field that makes an event sticky, if the event has a valid one. An event that was redacted has none.
pub fn field(json: &[u8]) -> Option<Box<RawValue>> {
    // Nearly all events have the name nowhere, which is found out without parsing them.
    if !std::str::from_utf8(json).is_ok_and(|text| text.contains(STICKY)) {
        return None;
    }
    let fields: BTreeMap<Cow<'_, str>, &RawValue> = serde_json::from_slice(json).ok()?;
    let field = fields.get(STICKY)?;
    serde_json::from_str::<Sticky>(field.get()).ok()?;
    Some((*field).to_owned())
}

/// Says until when an event is sticky that came in at this time: milliseconds since the epoch. `None` if it is no sticky event.
fn sticky_until(json: &[u8], sent_ms: u64, received_ms: u64) -> Option<u64> {
    let Sticky { duration_ms } = serde_json::from_str(field(json)?.get()).ok()?;
    Some(sent_ms.min(received_ms).saturating_add(duration_ms.min(STICKY_MS_MAX)))
}

/// Indexes an event that becomes part of the timeline, if it is sticky now.
pub fn note(batch: &mut Batch, room: RoomNum, stored: &StoredEvent, now_ms: u64) -> Result<(), Fault> {
    let Some(until_ms) = sticky_until(&stored.row.json, stored.row.header.sent_ms, now_ms) else {
        return Ok(());
    };
    let (sender, event) = (stored.row.sender().into_owned(), stored.event());
    let soft_failed = (room, sender.as_str(), event);
    // It came in earlier if it was soft-failed until now.
    let known = schema::STICKY_ASIDE.get(batch, soft_failed)?;
    if known.is_some() {
        schema::STICKY_ASIDE.delete(batch, soft_failed);
    }
    let until_ms = until_ms.min(known.unwrap_or(u64::MAX));
    if until_ms <= now_ms || stored.row.header.unseen {
        return Ok(());
    }
    remember(batch, room, now_ms)?;
    let mut of_sender = Vec::new();
    for row in
        schema::STICKY_SENDER.prefix::<(RoomNum, String)>(batch, (room, sender.as_str()), Direction::Up)?
    {
        of_sender.push(row?.0.2);
    }
    let too_many = (of_sender.len() + 1).saturating_sub(OF_SENDER_MAX);
    for position in of_sender.into_iter().take(too_many) {
        schema::STICKY.delete(batch, (room, position));
        schema::STICKY_SENDER.delete(batch, (room, sender.as_str(), position));
    }
    let position = stored.order.anchor;
    schema::STICKY.put(batch, (room, position), &StickyRow { event, until_ms, sender: sender.clone() });
    schema::STICKY_SENDER.put(batch, (room, sender.as_str(), position), &());
    Ok(())
}

/// Sets the timer that forgets what has ceased to be sticky in a room, if it is not set.
fn remember(batch: &mut Batch, room: RoomNum, now_ms: u64) -> Result<(), Fault> {
    let has_rows = schema::STICKY.prefix::<(RoomNum,)>(batch, (room,), Direction::Up)?.next().is_some()
        || has_soft_failed(batch, room)?;
    if !has_rows {
        timer::set(batch, &Job::TendSticky { room }.timer(now_ms.saturating_add(FORGOTTEN_AFTER_MS)));
    }
    Ok(())
}

/// Remembers a sticky event that is soft-failed, so that it is judged again.
pub fn note_soft_failed(
    batch: &mut Batch,
    room: RoomNum,
    (event, sender): (EventNum, &str),
    (json, sent_ms): (&[u8], u64),
    now_ms: u64,
) -> Result<(), Fault> {
    let Some(until_ms) = sticky_until(json, sent_ms, now_ms).filter(|until_ms| *until_ms > now_ms) else {
        return Ok(());
    };
    if schema::STICKY_ASIDE.contains(batch, (room, sender, event))? {
        return Ok(());
    }
    remember(batch, room, now_ms)?;
    let mut known = Vec::new();
    for row in schema::STICKY_ASIDE.prefix::<(RoomNum, String)>(batch, (room, sender), Direction::Up)? {
        known.push(row?.0.2);
    }
    let too_many = (known.len() + 1).saturating_sub(SOFT_FAILED_MAX);
    for oldest in known.into_iter().take(too_many) {
        schema::STICKY_ASIDE.delete(batch, (room, sender, oldest));
    }
    schema::STICKY_ASIDE.put(batch, (room, sender, event), &until_ms);
    Ok(())
}

/// Whether any soft-failed sticky events of a room are remembered.
pub fn has_soft_failed(read: &(impl Read + ?Sized), room: RoomNum) -> Result<bool, Fault> {
    let mut rows = schema::STICKY_ASIDE.prefix::<(RoomNum,)>(read, (room,), Direction::Up)?;
    Ok(rows.next().transpose()?.is_some())
}

/// Has the soft-failed sticky events of a user judged again, if there are any: their membership of the room has changed.
pub fn reconsider_of(batch: &mut Batch, room: RoomNum, user_id: &str) -> Result<(), Fault> {
    let mut rows = schema::STICKY_ASIDE.prefix::<(RoomNum, String)>(batch, (room, user_id), Direction::Up)?;
    let is_any = rows.next().transpose()?.is_some();
    drop(rows);
    if is_any {
        timer::set(batch, &Job::TendSticky { room }.timer(0));
    }
    Ok(())
}

/// Lists some soft-failed sticky events of a room, after this one: each sender with the event and the time until which it is sticky.
pub fn list_soft_failed(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    after: Option<(&str, EventNum)>,
    count: usize,
) -> Result<Vec<(String, EventNum, u64)>, Fault> {
    let low = match after {
        Some((sender, event)) => Bound::Excluded((room, sender, event)),
        None => Bound::Included((room, "", EventNum(0))),
    };
    let high = Bound::Excluded((RoomNum(room.0.saturating_add(1)), "", EventNum(0)));
    let rows = schema::STICKY_ASIDE.range::<(RoomNum, String, EventNum)>(read, low, high, Direction::Up)?;
    rows.take(count).map(|row| row.map(|((_, sender, event), until_ms)| (sender, event, until_ms))).collect()
}

/// Forgets a soft-failed sticky event.
pub fn forget_soft_failed(batch: &mut Batch, room: RoomNum, sender: &str, event: EventNum) {
    schema::STICKY_ASIDE.delete(batch, (room, sender, event));
}

/// Lists the events of a room that became sticky in (after, upto] and still are, the oldest first, at most so many.
pub fn list(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    (after, upto): (Position, Position),
    now_ms: u64,
    count: usize,
) -> Result<Vec<(Position, StickyRow)>, Fault> {
    let mut found = Vec::new();
    if after >= upto {
        return Ok(found);
    }
    let (low, high) = (Bound::Excluded((room, after)), Bound::Included((room, upto)));
    for row in schema::STICKY.range::<(RoomNum, Position)>(read, low, high, Direction::Up)? {
        let ((_, position), row) = row?;
        if row.until_ms > now_ms {
            found.push((position, row));
            if found.len() >= count {
                break;
            }
        }
    }
    Ok(found)
}

/// For how many milliseconds more the event at this position is sticky; `None` if it is not.
pub fn left_ms(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    position: Position,
    now_ms: u64,
) -> Result<Option<u64>, Fault> {
    let row = schema::STICKY.get(read, (room, position))?;
    Ok(row.and_then(|row| row.until_ms.checked_sub(now_ms)).filter(|left_ms| *left_ms > 0))
}

/// Forgets some of what has ceased to be sticky in a room. Gives when to look again, if anything is left. The oldest events are looked at:
/// those that are sticky still came within the last hour.
pub fn forget_old(batch: &mut Batch, room: RoomNum, now_ms: u64) -> Result<Option<u64>, Fault> {
    let rows = schema::STICKY.prefix::<(RoomNum,)>(batch, (room,), Direction::Up)?;
    let oldest: Vec<_> = rows.take(LOOKED_AT_MAX).collect::<Result<_, _>>()?;
    let rows = schema::STICKY_ASIDE.prefix::<(RoomNum,)>(batch, (room,), Direction::Up)?;
    let aside: Vec<_> = rows.take(LOOKED_AT_MAX).collect::<Result<_, _>>()?;
    let looked_at = oldest.len().max(aside.len());
    let (mut forgotten, all) = (0, oldest.len() + aside.len());
    for ((_, position), row) in oldest {
        if row.until_ms <= now_ms {
            forgotten += 1;
            schema::STICKY.delete(batch, (room, position));
            schema::STICKY_SENDER.delete(batch, (room, row.sender.as_str(), position));
        }
    }
    for ((_, sender, event), until_ms) in aside {
        if until_ms <= now_ms {
            forgotten += 1;
            schema::STICKY_ASIDE.delete(batch, (room, sender.as_str(), event));
        }
    }
    Ok(match forgotten {
        _ if looked_at == LOOKED_AT_MAX && forgotten > 0 => Some(now_ms.saturating_add(1)),
        _ if forgotten == all => None,
        _ => Some(now_ms.saturating_add(FORGOTTEN_AFTER_MS)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_field_counts_beside_the_content_and_with_a_number_alone() {
        let until = |json: &str| sticky_until(json.as_bytes(), 1_000, 5_000);
        assert_eq!(until(r#"{"content":{},"msc4354_sticky":{"duration_ms":500}}"#), Some(1_500));
        assert_eq!(until(r#"{"msc4354_sticky":{"duration_ms":0}}"#), Some(1_000));
        let hour = 1_000 + STICKY_MS_MAX;
        assert_eq!(until(r#"{"msc4354_sticky":{"duration_ms":9007199254740991}}"#), Some(hour));
        for json in [
            r#"{"content":{"msc4354_sticky":{"duration_ms":500}}}"#,
            r#"{"msc4354_sticky":{"duration_ms":-1}}"#,
            r#"{"msc4354_sticky":{"duration_ms":"500"}}"#,
            r#"{"msc4354_sticky":{}}"#,
            r#"{"msc4354_sticky":500}"#,
            r#"{"msc4354_sticky":null}"#,
            r#"{"msc4354_sticky":{"duration_ms":500}"#,
            r#"{"body":"sticky"}"#,
        ] {
            assert_eq!(until(json), None, "{json}");
        }
        // A clock that is ahead makes nothing sticky for longer.
        let ahead = br#"{"msc4354_sticky":{"duration_ms":500}}"#;
        assert_eq!(sticky_until(ahead, u64::MAX, 5_000), Some(5_500));
    }
}
