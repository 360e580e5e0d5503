//! Delayed events (MSC4140): events that a user schedules, which are sent at a later time unless they are taken back.
//!
//! A delayed event is a row of its user's. Two indexes list those that wait by the time at which they are due or tried again, and those
//! that ended by the time of that. Those that are due are sent in the order in which they were due, and then in that of scheduling,
//! however often one was put off. A user has one timer, for the first of them all, and a row that says when it is due: whatever changes the
//! first one moves the timer. So a user who schedules, restarts and cancels without end has no more timers than anybody else.
//! `src/flows/room/delayed.rs` sends what is due.

use std::{collections::BTreeMap, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ruma::{CanonicalJsonObject, OwnedRoomId, RoomId};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::{
    error::{Refusal, Result},
    ids::{DeviceNum, UserNum},
    rooms::{
        change::{Txn, txn},
        event, find_room,
    },
    schema::{
        self,
        delayed::{DelayedEnd, DelayedOutcome, DelayedRow, NO_DEVICE},
        jobs::Job,
    },
    store::{Batch, Direction, Fault, Read, key::Json, timer},
};

/// A delayed event that has ended can be looked up for this long, in milliseconds.
pub const KEPT_MS: u64 = 7 * 24 * 60 * 60 * 1000;
/// A user keeps at most this many delayed events that have ended: the oldest go first.
const ENDED_MAX: usize = 200;

/// The transaction that sends a delayed event, so that it is sent once.
pub fn txn(user: UserNum, id: &str, now_ms: u64) -> Txn {
    Txn { user, device: NO_DEVICE, endpoint: txn::DELAYED.to_owned(), id: id.to_owned(), now_ms }
}

/// The id of the delayed event that a request with a transaction id schedules. A client that repeats the request gets the same one.
pub fn id_of(user: UserNum, device: DeviceNum, room: &RoomId, event_type: &str, txn: &str) -> String {
    let mut hash = Sha256::new();
    hash.update(user.0.to_be_bytes());
    hash.update(device.0.to_be_bytes());
    for part in [room.as_str(), event_type, txn] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    URL_SAFE_NO_PAD.encode(hash.finalize())
}

/// Finds a delayed event of a user, whether it waits or has ended.
pub fn find(
    read: &(impl Read + ?Sized),
    user: UserNum,
    id: &str,
    now_ms: u64,
) -> Result<Option<DelayedRow>, Fault> {
    let row = schema::DELAYED.get(read, (user, id))?.map(|Json(row)| row);
    Ok(row.filter(|row| row.end.as_ref().is_none_or(|end| end.at_ms.saturating_add(KEPT_MS) > now_ms)))
}

/// Reads the content of a delayed event to show it to its user. That of one which was sent is what its event says now: nothing, where the
/// event was redacted, has come to the end of its lifetime, or is gone with its room.
pub fn content_of(read: &(impl Read + ?Sized), row: &DelayedRow) -> Result<Value, Fault> {
    let Some(DelayedEnd { outcome: DelayedOutcome::Sent(event_id), .. }) = &row.end else {
        return serde_json::to_value(&row.content).map_err(|_| Fault::Corrupt("a content is not JSON"));
    };
    let sent = match find_room(read, &row.room_id)? {
        Some(room) => event::find_by_id(read, room, event_id)?,
        None => None,
    };
    let content = sent.map(|sent| serde_json::from_str(sent.row.content())).transpose();
    let content = content.map_err(|_| Fault::Corrupt("the content of an event is not JSON"))?;
    Ok(content.unwrap_or_else(|| Value::Object(serde_json::Map::new())))
}

/// Lists the first of the delayed events of a user that wait and are listed until this time, in the order in which they are to be sent.
pub fn list_due(
    read: &(impl Read + ?Sized),
    user: UserNum,
    now_ms: u64,
    events_max: usize,
) -> Result<Vec<(String, DelayedRow)>, Fault> {
    let mut due = Vec::new();
    for row in schema::DELAYED_DUE.prefix::<(UserNum,)>(read, (user,), Direction::Up)? {
        let ((_, listed_ms, id), listing) = row?;
        if listed_ms > now_ms {
            break;
        }
        due.push((listing.due_ms.unwrap_or(listed_ms), listing.sequence, id));
    }
    due.sort_unstable();
    due.truncate(events_max);
    let rows = due.into_iter().map(|(.., id)| {
        let Json(row) = schema::DELAYED
            .get(read, (user, id.as_str()))?
            .ok_or(Fault::Corrupt("a delayed event that is listed as due is not there"))?;
        Ok((id, row))
    });
    rows.collect()
}

/// The delayed events of a user that wait, all together.
#[derive(Default)]
struct Waiting {
    count: usize,
    /// When there is something to do for the first of them.
    first_ms: Option<u64>,
    /// The number that stands behind theirs.
    next_sequence: u64,
}

fn count_waiting(read: &(impl Read + ?Sized), user: UserNum) -> Result<Waiting, Fault> {
    let mut waiting = Waiting::default();
    for row in schema::DELAYED_DUE.prefix::<(UserNum,)>(read, (user,), Direction::Up)? {
        let ((_, listed_ms, _), listing) = row?;
        waiting.count += 1;
        waiting.first_ms.get_or_insert(listed_ms);
        waiting.next_sequence = waiting.next_sequence.max(listing.sequence.saturating_add(1));
    }
    Ok(waiting)
}

/// Schedules an event, after those that wait; the caller holds the user's lock and has looked that there is none of this id. Errors: 429
/// `M_LIMIT_EXCEEDED` where as many wait as may, with the time until the next one is sent.
pub fn schedule(
    batch: &mut Batch,
    user: UserNum,
    id: &str,
    row: DelayedRow,
    waiting_max: usize,
) -> Result<()> {
    let Waiting { count, first_ms, next_sequence } = count_waiting(batch, user)?;
    if count >= waiting_max {
        let wait_ms = first_ms.unwrap_or_default().saturating_sub(row.scheduled_ms);
        let mut refusal = Refusal::too_fast(Duration::from_millis(wait_ms));
        refusal.message = format!("You have {count} delayed events, which is as many as you may have.");
        tracing::debug!(%user, count, reason = "too many delayed events", "a delayed event is refused");
        return Err(refusal.into());
    }
    let before_ms = find_next_ms(batch, user)?;
    let row = DelayedRow { sequence: next_sequence, ..row };
    schema::DELAYED_DUE.put(batch, (user, row.listed_ms(), id), &row.listing());
    schema::DELAYED.put(batch, (user, id), &Json(row));
    Ok(follow_first(batch, user, before_ms)?)
}

/// Moves the timer of a user where there is something else to do next than before, or where no timer is known.
fn follow_first(batch: &mut Batch, user: UserNum, before_ms: Option<u64>) -> Result<(), Fault> {
    let next_ms = find_next_ms(batch, user)?;
    if next_ms != before_ms || !schema::DELAYED_TIMER.contains(batch, user)? {
        set_timer(batch, user, next_ms)?;
    }
    Ok(())
}

/// Sets the timer of a user for this time, in place of the one that is set; where there is nothing to do any more, the user has none.
/// The caller holds the user's lock.
pub fn set_timer(batch: &mut Batch, user: UserNum, due_ms: Option<u64>) -> Result<(), Fault> {
    let job = Job::SendDelayed { user };
    let old_ms = schema::DELAYED_TIMER.get(batch, user)?;
    if let Some(old_ms) = old_ms.filter(|_| old_ms != due_ms) {
        timer::cancel(batch, &job.timer(old_ms));
    }
    match due_ms {
        Some(due_ms) => {
            timer::set(batch, &job.timer(due_ms));
            schema::DELAYED_TIMER.put(batch, user, &due_ms);
        }
        None => schema::DELAYED_TIMER.delete(batch, user),
    }
    Ok(())
}

/// Begins the delay of an event anew, whose row this is, as if it were scheduled now; the caller holds the user's lock.
pub fn restart(
    batch: &mut Batch,
    user: UserNum,
    id: &str,
    row: DelayedRow,
    now_ms: u64,
) -> Result<(), Fault> {
    let (listed_ms, sequence) = (row.listed_ms(), count_waiting(batch, user)?.next_sequence);
    let row = DelayedRow { scheduled_ms: now_ms, sequence, again_ms: None, ..row };
    move_to(batch, (user, id), listed_ms, row)
}

/// Puts off an event that is due and could not be sent, whose row this is, so that those of other rooms get their turn; the caller holds
/// the user's lock.
pub fn put_off(
    batch: &mut Batch,
    user: UserNum,
    id: &str,
    row: DelayedRow,
    again_ms: u64,
) -> Result<(), Fault> {
    move_to(batch, (user, id), row.listed_ms(), DelayedRow { again_ms: Some(again_ms), ..row })
}

/// Lists an event that waits at another time than before, with the row that says so.
fn move_to(
    batch: &mut Batch,
    (user, id): (UserNum, &str),
    listed_ms: u64,
    row: DelayedRow,
) -> Result<(), Fault> {
    let before_ms = find_next_ms(batch, user)?;
    schema::DELAYED_DUE.delete(batch, (user, listed_ms, id));
    schema::DELAYED_DUE.put(batch, (user, row.listed_ms(), id), &row.listing());
    schema::DELAYED.put(batch, (user, id), &Json(row));
    follow_first(batch, user, before_ms)
}

/// The rooms in which delayed events of a user are tried again after this time, each with that time: what is due behind them waits.
pub fn list_put_off(
    read: &(impl Read + ?Sized),
    user: UserNum,
    now_ms: u64,
) -> Result<BTreeMap<OwnedRoomId, u64>, Fault> {
    let mut rooms = BTreeMap::new();
    for row in schema::DELAYED_DUE.prefix::<(UserNum,)>(read, (user,), Direction::Up)? {
        let ((_, listed_ms, id), listing) = row?;
        if listed_ms <= now_ms || listing.due_ms == Some(listed_ms) {
            continue;
        }
        let row = schema::DELAYED.get(read, (user, id.as_str()))?;
        if let Some(Json(row)) = row.filter(|Json(row)| row.again_ms.is_some()) {
            rooms.entry(row.room_id).or_insert(listed_ms);
        }
    }
    Ok(rooms)
}

/// Ends a delayed event that waits, whose row this is; the caller holds the user's lock.
pub fn end(
    batch: &mut Batch,
    user: UserNum,
    id: &str,
    row: DelayedRow,
    end: DelayedEnd,
) -> Result<(), Fault> {
    debug_assert!(row.end.is_none(), "a delayed event ends once");
    let before_ms = find_next_ms(batch, user)?;
    schema::DELAYED_DUE.delete(batch, (user, row.listed_ms(), id));
    schema::DELAYED_ENDED.put(batch, (user, end.at_ms, id), &());
    let now_ms = end.at_ms;
    let content = match end.outcome {
        // From here on the event itself holds it, which may be redacted, or come to the end of its lifetime.
        DelayedOutcome::Sent(_) => CanonicalJsonObject::new(),
        DelayedOutcome::Refused(..) | DelayedOutcome::Cancelled => row.content,
    };
    schema::DELAYED.put(batch, (user, id), &Json(DelayedRow { content, end: Some(end), ..row }));
    forget_old(batch, user, now_ms)?;
    follow_first(batch, user, before_ms)
}

/// Deletes the delayed events that ended so long ago, or so many others ago, that nobody looks them up; the caller holds the user's
/// lock.
pub fn forget_old(batch: &mut Batch, user: UserNum, now_ms: u64) -> Result<(), Fault> {
    let mut ended = Vec::new();
    for row in schema::DELAYED_ENDED.prefix::<(UserNum,)>(batch, (user,), Direction::Up)? {
        let ((_, at_ms, id), ()) = row?;
        ended.push((at_ms, id));
    }
    let too_many = ended.len().saturating_sub(ENDED_MAX);
    for (at, (at_ms, id)) in ended.iter().enumerate() {
        if at < too_many || at_ms.saturating_add(KEPT_MS) <= now_ms {
            schema::DELAYED_ENDED.delete(batch, (user, *at_ms, id));
            schema::DELAYED.delete(batch, (user, id.as_str()));
        }
    }
    Ok(())
}

/// Says when there is something to do next for the delayed events of a user: one is due, or one that ended is to be forgotten.
pub fn find_next_ms(read: &(impl Read + ?Sized), user: UserNum) -> Result<Option<u64>, Fault> {
    let mut due = schema::DELAYED_DUE.prefix::<(UserNum,)>(read, (user,), Direction::Up)?;
    let due_ms = due.next().transpose()?.map(|((_, listed_ms, _), _)| listed_ms);
    let mut ended = schema::DELAYED_ENDED.prefix::<(UserNum,)>(read, (user,), Direction::Up)?;
    let forget_ms = ended.next().transpose()?.map(|((_, at_ms, _), ())| at_ms.saturating_add(KEPT_MS));
    Ok(due_ms.into_iter().chain(forget_ms).min())
}

/// Deletes all delayed events of a user, for an account that ends.
pub fn delete_all(batch: &mut Batch, user: UserNum) -> Result<(), Fault> {
    schema::DELAYED.delete_prefix::<(UserNum,)>(batch, (user,));
    schema::DELAYED_DUE.delete_prefix::<(UserNum,)>(batch, (user,));
    schema::DELAYED_ENDED.delete_prefix::<(UserNum,)>(batch, (user,));
    set_timer(batch, user, None)
}
