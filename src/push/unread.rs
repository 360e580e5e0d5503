//! Unread counts whose cost does not grow with the members of a room.
//!
//! Each event is judged once for each *class* of rules, and the running numbers of the classes are stored at the event's
//! place. The unread count is the number now less the number at the place up to which a user has read. In addition, a row is
//! written for each user whom an event concerns in person (it mentions or invites them), and for its sender, because sending
//! marks all earlier events as read.
//!
//! The batch does nothing for users with rules of their own; their own syncs judge events for them
//! ([`Reader`](crate::push::Reader)).

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::Arc,
};

use ruma::UserId;

use crate::{
    accounts::{
        self,
        ignored::Ignored,
        invites::{Permissions, Verdict},
    },
    ids::{EventNum, Order, Position, RoomNum, UserNum},
    push::{
        classes::{self, Class},
        floors::{self, Floors},
        lanes::Lanes,
        scene::Scene,
    },
    rooms::{change::Change, event::StoredEvent, members, relations, visibility::Sight},
    schema,
    schema::event_types::MEMBER,
    schema::{
        push::{Lane, Outcome, Outcomes, OwnOutcome, RedactedOutcome, Totals},
        rooms::Membership,
    },
    store::{Batch, Direction, Fault, Read},
};

/// At most this many mentions of one event notify, because each may write a row; further ones notify nobody.
const MENTIONS_MAX: usize = 200;
/// At most this many threads with news are counted; those with older news are left out.
const THREADS_COUNTED: usize = 500;
/// At most this many unread mentions, and as many redactions, are counted; people cannot tell such numbers apart.
const ROWS_COUNTED: usize = 5_000;

/// Writes the effect of an event on counts, as part of the event's batch and after its member rows. The caller holds the
/// room's lock.
pub fn count(change: &mut Change, stored: &StoredEvent) -> Result<(), Fault> {
    if stored.row.header.unseen || stored.order.minor != 0 {
        return Ok(());
    }
    let Change { batch, num, row, unread, sent_by, .. } = change;
    let (room, order) = (*num, stored.order);
    let Some(scene) = Scene::of_new(batch, room, row, stored) else { return Ok(()) };
    let lane = relations::lane_of(batch, room, stored)?;
    let classes = classes::judge(&scene, lane)?;
    let concerned = list_concerned(batch, room, (&scene, lane), classes)?;
    let sender = match sent_by {
        Some((event, user)) if *event == stored.event() && stored.membership().is_none() => Some(*user),
        _ => find_sender(batch, stored)?,
    };
    drop(scene);
    if classes != Outcomes::default() {
        let before = match *unread {
            Some(known) if lane == Lane::MAIN => known,
            _ => totals(batch, room, lane, Order::MAX)?,
        };
        let after = before.plus(classes);
        put_totals(batch, room, lane, order, after)?;
        if lane == Lane::MAIN {
            *unread = Some(after);
        }
    }
    for (user, own) in concerned {
        schema::UNREAD_OWN.put(batch, (room, user, order), &OwnOutcome { lane, own, classes });
    }
    if let Some(user) = sender {
        schema::UNREAD_SENT.put(batch, (room, user, lane), &order);
        if lane != Lane::MAIN && is_thread_hidden(batch, room, user, stored, lane)? {
            schema::UNREAD_SENT.put(batch, (room, user, Lane::MAIN), &order);
        }
    }
    Ok(())
}

/// Whether the sender of an event in a thread may not see the thread's root. To them it is then an event outside threads.
fn is_thread_hidden(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    user: UserNum,
    stored: &StoredEvent,
    lane: Lane,
) -> Result<bool, Fault> {
    let sender = stored.row.sender();
    let Ok(sender) = <&UserId>::try_from(&*sender) else { return Ok(false) };
    let mut sight = Sight::of(read, room, user, sender)?;
    Ok(floors::shown_lane(read, room, &mut sight, lane)? == Lane::MAIN)
}

/// The user of ours who sent this event, and thereby has read all earlier ones. None for a change of membership, which does not
/// show that somebody looked at the room: a new display name goes to all rooms of a user at once.
fn find_sender(read: &(impl Read + ?Sized), stored: &StoredEvent) -> Result<Option<UserNum>, Fault> {
    let is_member = stored.row.header.state_key.is_some() && stored.row.event_type() == MEMBER;
    match <&UserId>::try_from(&*stored.row.sender()) {
        Ok(sender) if !is_member => accounts::users::find_num(read, sender),
        _ => Ok(None),
    }
}

/// The users of this server whom the event concerns in person, with its outcome for them, where that differs from the outcome
/// for others.
fn list_concerned(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    (scene, lane): (&Scene<'_, impl Read + ?Sized>, Lane),
    classes: Outcomes,
) -> Result<Vec<(UserNum, Outcome)>, Fault> {
    let mentioned = scene.mentioned().take(MENTIONS_MAX).map(|user| (user, Membership::Join));
    let invited = scene.invited().map(|user| (user, Membership::Invite));
    let concerned: BTreeMap<&str, Membership> = mentioned.chain(invited).collect();
    let mut outcomes = Vec::new();
    for (user_id, membership) in concerned {
        let Ok(user_id) = <&UserId>::try_from(user_id) else { continue };
        let Some(user) = accounts::users::find_num(read, user_id)? else { continue };
        if members::find_near(read, room, user)? != Some(membership) {
            continue;
        }
        if membership == Membership::Invite
            && !is_wanted(read, user, user_id, scene.sender().unwrap_or_default())?
        {
            continue;
        }
        let own = classes::judge_for(scene, lane, user_id)?;
        if own != classes {
            outcomes.push((user, own.default));
        }
    }
    Ok(outcomes)
}

/// Whether a user is told of an invitation by this sender. One that they ignore, or that came past their refusal, notifies them of
/// nothing.
fn is_wanted(
    read: &(impl Read + ?Sized),
    user: UserNum,
    user_id: &UserId,
    sender: &str,
) -> Result<bool, Fault> {
    let ignored = Arc::new(Ignored::of(read, user, user_id)?);
    Ok(Permissions::of(read, user, ignored)?.judge(sender) == Verdict::Allow)
}

fn put_totals(
    batch: &mut Batch,
    room: RoomNum,
    lane: Lane,
    order: Order,
    totals: Totals,
) -> Result<(), Fault> {
    debug_assert!(
        [totals.default, totals.mentions, totals.subscribed].iter().all(|(notify, loud)| notify >= loud),
        "each highlight is a notification: {totals:?}"
    );
    schema::UNREAD.put(batch, (room, lane, order), &totals);
    if lane != Lane::MAIN {
        if let Some(last) = schema::UNREAD_THREAD.get(batch, (room, lane))? {
            schema::UNREAD_THREAD_LOG.delete(batch, (room, last));
        }
        schema::UNREAD_THREAD.put(batch, (room, lane), &order);
        schema::UNREAD_THREAD_LOG.put(batch, (room, order), &lane);
    }
    Ok(())
}

/// The running numbers of a lane up to and including an order.
fn totals(read: &(impl Read + ?Sized), room: RoomNum, lane: Lane, upto: Order) -> Result<Totals, Fault> {
    let (low, high) = (Bound::Included((room, lane, Order::MIN)), Bound::Included((room, lane, upto)));
    let mut rows = schema::UNREAD.range::<(RoomNum, Lane, Order)>(read, low, high, Direction::Down)?;
    Ok(rows.next().transpose()?.map(|(_, totals)| totals).unwrap_or_default())
}

/// The lane in which an event stands, and what it did to each class of rules when it came.
pub fn find_outcomes(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    stored: &StoredEvent,
) -> Result<(Lane, Outcomes), Fault> {
    let lane = relations::lane_of(read, room, stored)?;
    let counted = schema::UNREAD.get(read, (room, lane, stored.order))?;
    Ok((lane, counted.map(|totals| totals.last).unwrap_or_default()))
}

/// Notes, as part of the redaction's batch, that a redacted event no longer counts. `original` is the event as it was before
/// the redaction, and `redacted_at` the position of the redaction. The caller holds the room's lock.
pub fn uncount(
    batch: &mut Batch,
    room: RoomNum,
    original: &StoredEvent,
    redacted_at: Position,
) -> Result<(), Fault> {
    // An event that came to fill a hole never counted.
    if original.order.minor != 0 {
        return Ok(());
    }
    let lane = relations::lane_of(batch, room, original)?;
    let counted = schema::UNREAD.get(batch, (room, lane, original.order))?;
    let classes = counted.map(|totals| totals.last).unwrap_or_default();
    schema::UNREAD_REDACTED.put(
        batch,
        (room, original.order),
        &RedactedOutcome { lane, classes, redacted_at },
    );
    Ok(())
}

/// The number of unread events that notify a user, and how many of them highlight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unread {
    /// The number of events that notify.
    pub notifications: u64,
    /// The number of those events that highlight.
    pub highlights: u64,
}

/// The numbers of events in a room that a user has not read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// The numbers outside threads.
    pub main: Unread,
    /// The numbers of each thread in which something is unread, by its root.
    pub threads: BTreeMap<EventNum, Unread>,
}

impl Tally {
    /// The sum of the numbers outside threads and in all threads.
    pub fn total(&self) -> Unread {
        self.threads.values().fold(self.main, |sum, thread| Unread {
            notifications: sum.notifications + thread.notifications,
            highlights: sum.highlights + thread.highlights,
        })
    }
}

/// Notifications and highlights by lane. The numbers are signed, because a subtraction may come before its addition.
#[derive(Debug, Default)]
pub(crate) struct Sums(BTreeMap<Lane, (i64, i64)>);

impl Sums {
    /// Adds the effect of one event.
    pub(crate) fn add(&mut self, lane: Lane, outcome: Outcome) {
        self.add_numbers(lane, i64::from(outcome.notify), i64::from(outcome.highlight));
    }

    fn add_numbers(&mut self, lane: Lane, notifications: i64, highlights: i64) {
        let sum = self.0.entry(lane).or_default();
        sum.0 = sum.0.saturating_add(notifications);
        sum.1 = sum.1.saturating_add(highlights);
    }

    /// The final numbers, after everything is added.
    pub(crate) fn tally(self) -> Tally {
        let mut tally = Tally::default();
        for (lane, (notifications, highlights)) in self.0 {
            debug_assert!(
                notifications >= highlights && highlights >= 0,
                "what is taken away was counted before: {notifications} and {highlights} in {lane:?}"
            );
            let unread = Unread {
                notifications: u64::try_from(notifications).unwrap_or(0),
                highlights: u64::try_from(highlights).unwrap_or(0),
            };
            match lane.root() {
                None => tally.main = unread,
                Some(root) if unread != Unread::default() => {
                    tally.threads.insert(root, unread);
                }
                Some(_) => {}
            }
        }
        tally
    }
}

/// Adds the unread events of a member of a class, up to and including an order.
pub(crate) fn add_of_class(
    sums: &mut Sums,
    read: &(impl Read + ?Sized),
    lanes: &mut Lanes,
    floors: &mut Floors<'_>,
    upto: Order,
) -> Result<(), Fault> {
    let (room, user, base) = (floors.room(), floors.user(), floors.base());
    if lanes.are_muted() || base >= upto {
        return Ok(());
    }
    for lane in lanes_with_news(read, room, base)? {
        let shown = floors.shown(read, lane)?;
        let floor = floors.of_lane(read, shown)?;
        if floor < upto {
            let class = lanes.class(read, (user, room), lane)?;
            let (was, is) = (totals(read, room, lane, floor)?, totals(read, room, lane, upto)?);
            let (notifications, highlights) = difference(class, was, is);
            sums.add_numbers(shown, notifications, highlights);
        }
    }
    let redacted = list_redacted(read, room, base, upto)?;
    for (order, row) in &redacted {
        let lane = floors.shown(read, row.lane)?;
        if *order > floors.of_lane(read, lane)? {
            let counted = lanes.class(read, (user, room), row.lane)?.outcome(row.classes);
            sums.add_numbers(lane, -i64::from(counted.notify), -i64::from(counted.highlight));
        }
    }
    let (low, high) = (Bound::Excluded((room, user, base)), Bound::Included((room, user, upto)));
    let own = schema::UNREAD_OWN.range_mostly_empty::<(RoomNum, UserNum, Order)>(read, low, high)?;
    for row in own.take(ROWS_COUNTED) {
        let ((.., order), row) = row?;
        let lane = floors.shown(read, row.lane)?;
        if order > floors.of_lane(read, lane)? && !redacted.contains_key(&order) {
            let class = lanes.class(read, (user, room), row.lane)?.outcome(row.classes);
            let more = |own: bool, class: bool| i64::from(own) - i64::from(class);
            let (notify, highlight) =
                (more(row.own.notify, class.notify), more(row.own.highlight, class.highlight));
            sums.add_numbers(lane, notify, highlight);
        }
    }
    Ok(())
}

/// The lanes in which something notified a class after `base`.
fn lanes_with_news(read: &(impl Read + ?Sized), room: RoomNum, base: Order) -> Result<BTreeSet<Lane>, Fault> {
    // A thread is logged only at its newest event that counts, which may be above the part that is counted here.
    let (low, high) = (Bound::Excluded((room, base)), Bound::Included((room, Order::MAX)));
    let threads = schema::UNREAD_THREAD_LOG.range_mostly_empty::<(RoomNum, Order)>(read, low, high)?;
    let threads = threads.take(THREADS_COUNTED).map(|row| row.map(|(_, lane)| lane));
    std::iter::once(Ok(Lane::MAIN)).chain(threads).collect()
}

fn difference(class: Class, was: Totals, is: Totals) -> (i64, i64) {
    let ((was_notify, was_highlight), (notify, highlight)) = match class {
        Class::Default => (was.default, is.default),
        Class::Mentions => (was.mentions, is.mentions),
        Class::Subscribed => (was.subscribed, is.subscribed),
        Class::Muted => return (0, 0),
    };
    debug_assert!(was_notify <= notify && was_highlight <= highlight, "running numbers never fall");
    let less = |is: u64, was: u64| i64::try_from(is.saturating_sub(was)).unwrap_or(i64::MAX);
    (less(notify, was_notify), less(highlight, was_highlight))
}

/// The events in a part of the timeline that were redacted after they had counted.
pub(crate) fn list_redacted(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    base: Order,
    upto: Order,
) -> Result<BTreeMap<Order, RedactedOutcome>, Fault> {
    let (low, high) = (Bound::Excluded((room, base)), Bound::Included((room, upto)));
    let rows = schema::UNREAD_REDACTED.range_mostly_empty::<(RoomNum, Order)>(read, low, high)?;
    rows.take(ROWS_COUNTED).map(|row| row.map(|((_, order), row)| (order, row))).collect()
}

#[cfg(test)]
pub(in crate::push) mod tests;
