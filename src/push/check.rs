//! Invariants of the rows of push rules and unread counts, which `db check` verifies.

use std::ops::Bound;

use ruma::push::Ruleset;

use crate::{
    accounts::check::Devices,
    ids::{EventNum, Order, RoomNum},
    schema::{
        self,
        push::{Lane, Totals},
    },
    store::{
        Direction, Fault, LogEntry, Snapshot,
        check::{Doubts, RowCheck},
        key::Json,
    },
};

/// The checks of push rules and unread counts.
pub fn checks() -> Vec<RowCheck> {
    let mut devices = Devices::default();
    vec![
        RowCheck::of(&schema::PUSHERS, move |read, (user, app, key), Json(row), doubts| {
            let has_device = row.is_email() || devices.has(read, *user, row.device)?;
            doubts.unless(has_device, "the device that set it is gone");
            let owned = schema::PUSHER_OWNERS.contains(read, (app.as_str(), key.as_str(), *user))?;
            doubts.unless(owned, "`PUSHER_OWNERS` does not name its user");
            let key = (*user, app.as_str(), key.as_str());
            let has_place = !row.has_place || schema::PUSHER_PLACES.contains(read, key)?;
            doubts.unless(has_place, "nothing says how far it has come");
            let has_mailbox = schema::MAILBOXES.contains(read, key)?;
            doubts.unless(has_mailbox == row.is_email(), "its kind does not fit what is kept of mails");
            Ok(())
        }),
        RowCheck::of(&schema::MAILBOXES, |read, (user, app, key), Json(row), doubts| {
            let there = schema::PUSHERS.contains(read, (*user, app.as_str(), key.as_str()))?;
            doubts.unless(there, "the user has no such pusher");
            doubts.unless(!row.secret.is_empty(), "its link has no secret");
            Ok(())
        }),
        RowCheck::of(&schema::EMAIL_PREFERENCES, |read, user, _, doubts| {
            doubts.unless(schema::USERS.contains(read, *user)?, "their account is gone");
            Ok(())
        }),
        RowCheck::of(&schema::PUSHER_OWNERS, |read, (app, key, user), (), doubts| {
            let there = schema::PUSHERS.contains(read, (*user, app.as_str(), key.as_str()))?;
            doubts.unless(there, "the user has no such pusher");
            Ok(())
        }),
        RowCheck::of(&schema::PUSHER_PLACES, |read, (user, app, key), place, doubts| {
            let there = schema::PUSHERS.contains(read, (*user, app.as_str(), key.as_str()))?;
            doubts.unless(there, "the user has no such pusher");
            doubts.position(read, place.upto);
            Ok(())
        }),
        RowCheck::of(&schema::PUSH_RULES, |read, user, row, doubts| {
            doubts.logged(read, row.position, LogEntry::AccountData { user: *user })?;
            doubts.unless(serde_json::from_slice::<Ruleset>(&row.content).is_ok(), "they are not push rules");
            doubts.unless(schema::USERS.contains(read, *user)?, "their account is gone");
            Ok(())
        }),
        RowCheck::of(&schema::UNREAD, |read, (room, lane, order), totals, doubts| {
            let event = schema::TIMELINE.get(read, (*room, *order))?;
            doubts.unless(event.is_some(), "no event stands there");
            if event.is_some_and(|event| event.is_redacted()) {
                let taken_back = schema::UNREAD_REDACTED.contains(read, (*room, *order))?;
                doubts.unless(taken_back, "the event was redacted, and still counts");
            }
            root(read, *room, *lane, doubts)?;
            running(read, (*room, *lane, *order), totals, doubts)
        }),
        RowCheck::of(&schema::UNREAD_THREAD, |read, (room, lane), order, doubts| {
            let named = schema::UNREAD_THREAD_LOG.get(read, (*room, *order))?;
            doubts.unless(named == Some(*lane), "the log of threads does not name it");
            let counted = schema::UNREAD.contains(read, (*room, *lane, *order))?;
            doubts.unless(counted, "nothing is counted at its order");
            Ok(())
        }),
        RowCheck::of(&schema::UNREAD_THREAD_LOG, |read, (room, order), lane, doubts| {
            let newest = schema::UNREAD_THREAD.get(read, (*room, *lane))?;
            doubts.unless(newest == Some(*order), "`UNREAD_THREAD` has another newest event for its thread");
            Ok(())
        }),
        RowCheck::of(&schema::UNREAD_OWN, |read, (room, user, order), row, doubts| {
            doubts.unless(schema::USERS.contains(read, *user)?, "its account is gone");
            root(read, *room, row.lane, doubts)?;
            event_at(read, *room, *order, doubts)
        }),
        RowCheck::of(&schema::UNREAD_SENT, |read, (room, user, lane), order, doubts| {
            root(read, *room, *lane, doubts)?;
            let event = schema::TIMELINE.get(read, (*room, *order))?;
            let account = schema::USERS.get(read, *user)?;
            let is_own =
                event.zip(account).is_some_and(|(event, account)| *event.sender() == *account.user_id);
            doubts.unless(is_own, "the user sent no event that stands there");
            Ok(())
        }),
        RowCheck::of(&schema::UNREAD_REDACTED, |read, (room, order), row, doubts| {
            root(read, *room, row.lane, doubts)?;
            let event = schema::TIMELINE.get(read, (*room, *order))?;
            let is_it = event.is_some_and(|event| event.is_redacted() || event.header.expired);
            doubts.unless(is_it, "no redacted or expired event stands there");
            Ok(())
        }),
    ]
}

fn event_at(read: &Snapshot, room: RoomNum, order: Order, doubts: &mut Doubts) -> Result<(), Fault> {
    doubts.unless(schema::TIMELINE.contains(read, (room, order))?, "no event stands there");
    Ok(())
}

/// Checks that a lane is the main one, or that the root of its thread exists.
fn root(read: &Snapshot, room: RoomNum, lane: Lane, doubts: &mut Doubts) -> Result<(), Fault> {
    if let Some(EventNum(root)) = lane.root() {
        let there = schema::PLACE.contains(read, (room, EventNum(root)))?;
        doubts.unless(there, format!("the root of its thread, event {root}, is missing"));
    }
    Ok(())
}

/// Checks that totals are the sum of the totals before them and what the event itself adds.
fn running(
    read: &Snapshot,
    (room, lane, order): (RoomNum, Lane, Order),
    totals: &Totals,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    let (low, high) = (Bound::Included((room, lane, Order::MIN)), Bound::Excluded((room, lane, order)));
    let mut rows = schema::UNREAD.range::<(RoomNum, Lane, Order)>(read, low, high, Direction::Down)?;
    let before = rows.next().transpose()?.map(|(_, totals)| totals).unwrap_or_default();
    doubts
        .unless(before.plus(totals.last) == *totals, "its totals are not those before it plus what it adds");
    Ok(())
}
