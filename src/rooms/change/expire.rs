//! Deletes the content of messages whose lifetime is over (`rooms/retention.rs`).
//!
//! A row of the room says below which order everything is done, and for when the room's timer is set. Each change that writes messages sees to
//! it that the timer is not later than the first of them is over. So a room in which messages are kept for ever costs nothing.

use std::ops::Bound;

use super::Change;
use crate::{
    ids::{Order, RoomNum},
    rooms::{
        event::StoredEvent,
        find_state, redact, relations,
        retention::{Lifetime, Limits},
    },
    schema,
    schema::{event_types::RETENTION, jobs::Job, rooms::RetentionRow},
    store::{Direction, Fault, LogEntry, Read, tail, timer},
};

/// A turn goes through at most this many events, so that others get turns in between.
const EVENTS_AT_ONCE: usize = 500;
/// A walk ends once it has come by this many messages that are not over yet: what stands above them comes later, as it does wherever
/// senders tell the right time.
const KEPT_SEEN_MAX: usize = 200;
/// The timer is set no sooner than this many milliseconds ahead, so that messages which end one after the other share a turn.
const TOGETHER_MS: u64 = 1_000;
/// The time at which events were received is known by the hour, and by the day where that is long ago. So messages whose sender tells a
/// time that is yet to come are looked at as often.
const RECEIVED_WITHIN_MS: u64 = 60 * 60 * 1_000;

/// A walk through a room's messages from the oldest that may still be over, in parts.
#[derive(Debug, Clone, Default)]
pub struct Walk {
    /// The order up to which it came.
    at: Option<Order>,
    /// The order up to which no message is left that will be over one day.
    below: Order,
    kept_seen: usize,
    due_ms: Option<u64>,
}

impl Change {
    /// Gives the lifetime of the room's messages, with the state that this change leaves.
    fn lifetime(&mut self, limits: &Limits) -> Result<Lifetime, Fault> {
        if let Some(known) = self.lifetime.filter(|_| !self.sets_lifetime()) {
            return Ok(known);
        }
        let said = first_set(|name| self.state(name, ""))?;
        let lifetime = limits.lifetime(said.as_ref().map(|event| &*event.parsed.content));
        self.lifetime = Some(lifetime);
        Ok(lifetime)
    }

    fn sets_lifetime(&self) -> bool {
        self.set.keys().any(|(event_type, key)| key.is_empty() && RETENTION.contains(&event_type.as_str()))
    }

    /// Follows what this change does to lifetimes: expires those of its messages that are over already, and sets the room's timer.
    pub(crate) fn keep_to_lifetimes(&mut self, limits: &Limits, now_ms: u64) -> Result<(), Fault> {
        let messages = std::mem::take(&mut self.messages);
        if messages.is_empty() && !self.sets_lifetime() {
            return Ok(());
        }
        let Lifetime(Some(lifetime_ms)) = self.lifetime(limits)? else { return Ok(()) };
        let (mut due_ms, mut lowest) = (u64::MAX, Order::MAX);
        for (order, sent_ms) in messages {
            if is_over(sent_ms, lifetime_ms, now_ms) {
                let row = schema::TIMELINE.get(&self.batch, (self.num, order))?;
                let row = row.ok_or(Fault::Corrupt("a message that was just written is not there"))?;
                self.expire(&StoredEvent { order, row })?;
            } else {
                due_ms = due_ms.min(end_of(sent_ms, lifetime_ms, now_ms));
                lowest = lowest.min(order.before());
            }
        }
        self.expire_by(due_ms, lowest, lifetime_ms, now_ms)
    }

    /// Has the room's messages looked at anew if their lifetime is not the one by which it was last done, as when an operator has set
    /// other bounds.
    pub fn review_lifetimes(&mut self, limits: &Limits, now_ms: u64) -> Result<(), Fault> {
        self.lifetime = None;
        match self.lifetime(limits)? {
            Lifetime(Some(lifetime_ms)) => self.expire_by(u64::MAX, Order::MAX, lifetime_ms, now_ms),
            Lifetime(None) => Ok(()),
        }
    }

    /// Sees to it that the room's timer is not later than this, and due at once where the lifetime has become another one, and that the
    /// next walk comes by the messages above `lowest`: those that fill a hole may stand below what is done.
    fn expire_by(&mut self, due_ms: u64, lowest: Order, lifetime_ms: u64, now_ms: u64) -> Result<(), Fault> {
        let row = schema::RETENTION.get(&self.batch, self.num)?.unwrap_or_default();
        let due_ms = if row.lifetime_ms == lifetime_ms { due_ms } else { now_ms };
        if due_ms < row.due_ms.unwrap_or(u64::MAX) || lowest < row.below {
            let due_ms = row.due_ms.unwrap_or(u64::MAX).min(due_ms);
            let below = row.below.min(lowest);
            self.set_retention(row, RetentionRow { below, due_ms: Some(due_ms), lifetime_ms });
        }
        Ok(())
    }

    /// Writes the room's row, and sets its timer.
    fn set_retention(&mut self, old: RetentionRow, new: RetentionRow) {
        let job = Job::Expire { room: self.num };
        if old.due_ms != new.due_ms {
            if let Some(old_ms) = old.due_ms {
                timer::cancel(&mut self.batch, &job.timer(old_ms));
            }
            if let Some(due_ms) = new.due_ms {
                timer::set(&mut self.batch, &job.timer(due_ms));
            }
        }
        schema::RETENTION.put(&mut self.batch, self.num, &new);
    }

    /// Expires the next part of the room's messages that are over. Answers whether there may be more; once there is not, the room's timer
    /// is set for the next message that will be over.
    pub fn expire_part(&mut self, limits: &Limits, now_ms: u64, walk: &mut Walk) -> Result<bool, Fault> {
        let old = schema::RETENTION.get(&self.batch, self.num)?.unwrap_or_default();
        let Lifetime(Some(lifetime_ms)) = self.lifetime(limits)? else {
            self.set_retention(old, RetentionRow::default());
            schema::RETENTION.delete(&mut self.batch, self.num);
            return Ok(false);
        };
        // A sender who tells a time that is yet to come keeps nothing longer: a message ends once it has been here for so long.
        let received_upto = tail::position_at(&self.batch, now_ms.saturating_sub(lifetime_ms))?;
        let start = *walk.at.get_or_insert_with(|| {
            walk.below = old.below;
            old.below
        });
        let part: Vec<StoredEvent> = {
            let (low, high) = (Bound::Excluded((self.num, start)), Bound::Included((self.num, Order::MAX)));
            let rows = schema::TIMELINE.range::<(RoomNum, Order)>(&self.batch, low, high, Direction::Up)?;
            let rows = rows.take(EVENTS_AT_ONCE);
            rows.map(|row| row.map(|((_, order), row)| StoredEvent { order, row }))
                .collect::<Result<_, _>>()?
        };
        for stored in &part {
            if walk.kept_seen >= KEPT_SEEN_MAX {
                break;
            }
            let header = &stored.row.header;
            let is_done = header.state_key.is_some() || header.expired;
            if !is_done
                && (stored.order.anchor <= received_upto || is_over(header.sent_ms, lifetime_ms, now_ms))
            {
                self.expire(stored)?;
                self.expired.push(stored.clone());
                let (room, event) = (self.num, stored.event());
                self.batch.position(&LogEntry::Expired { room, event });
                // No client is told that a message is gone.
                self.wakes_only = Some(Vec::new());
            } else if !is_done {
                let end_ms = if header.sent_ms <= now_ms {
                    end_of(header.sent_ms, lifetime_ms, now_ms)
                } else {
                    now_ms.saturating_add(RECEIVED_WITHIN_MS)
                };
                walk.due_ms = Some(walk.due_ms.map_or(end_ms, |due_ms| due_ms.min(end_ms)));
                walk.kept_seen += 1;
            }
            walk.at = Some(stored.order);
            if walk.kept_seen == 0 {
                walk.below = stored.order;
            }
        }
        if part.len() == EVENTS_AT_ONCE && walk.kept_seen < KEPT_SEEN_MAX {
            return Ok(true);
        }
        let due_ms = walk.due_ms.map(|due_ms| due_ms.max(now_ms.saturating_add(TOGETHER_MS)));
        self.set_retention(old, RetentionRow { below: walk.below, due_ms, lifetime_ms });
        Ok(false)
    }

    /// Deletes the content of a message of the timeline.
    fn expire(&mut self, stored: &StoredEvent) -> Result<(), Fault> {
        debug_assert!(stored.row.header.state_key.is_none(), "state is kept");
        let left = redact::redacted(&stored.row.json, self.rules());
        let left = left.ok_or(Fault::Corrupt("an event is not the JSON of an event"))?;
        let mut expired = redact::with_json(stored, &left)?;
        expired.row.header.expired = true;
        expired.row.header.unseen = true;
        if !stored.row.header.unseen {
            relations::unlink(&mut self.batch, self.num, stored)?;
        }
        redact::forget_original(&mut self.batch, self.num, stored.event());
        tracing::debug!(room = %self.num, event = %stored.event(), "the content of a message is deleted: its lifetime is over");
        self.replace_event(&expired);
        if let Some(added) = self.added.iter_mut().find(|added| added.order == expired.order) {
            *added = expired;
        }
        Ok(())
    }
}

/// Whether a message is over that was made at this time. All times are milliseconds since the epoch.
fn is_over(sent_ms: u64, lifetime_ms: u64, now_ms: u64) -> bool {
    sent_ms.saturating_add(lifetime_ms) <= now_ms
}

/// The time at which a message is over. One whose sender tells a time that is yet to come is over once it was here for so long.
fn end_of(sent_ms: u64, lifetime_ms: u64, now_ms: u64) -> u64 {
    if sent_ms <= now_ms {
        sent_ms.saturating_add(lifetime_ms)
    } else {
        now_ms.saturating_add(lifetime_ms).saturating_add(RECEIVED_WITHIN_MS)
    }
}

/// Finds the event by which a room says for how long its messages are kept.
fn first_set<E>(mut find: impl FnMut(&str) -> Result<Option<E>, Fault>) -> Result<Option<E>, Fault> {
    RETENTION.into_iter().find_map(|name| find(name).transpose()).transpose()
}

/// Whether the messages of a room are to be looked at anew, because their lifetime is not the one by which it was last done.
pub fn is_review_due(read: &(impl Read + ?Sized), room: RoomNum, limits: &Limits) -> Result<bool, Fault> {
    let said = first_set(|name| find_state(read, room, name, ""))?;
    let content = said.as_ref().and_then(|stored| serde_json::from_str(stored.row.content()).ok());
    let Lifetime(lifetime_ms) = limits.lifetime(content);
    let row = schema::RETENTION.get(read, room)?;
    Ok(lifetime_ms.is_some() && lifetime_ms != row.map(|row| row.lifetime_ms))
}
