//! Events that are kept aside, where clients do not see them: rejected and soft-failed ones, and outliers, which are known
//! only because others need them.
//!
//! Others may cite them, and an operator may ask why they are not shown, so they are stored. But anybody in a room can make
//! as many of them as they like, so a room keeps a bounded number: where there are too many, the oldest that no state rests on
//! are forgotten. State events among them are forgotten by sweeps (`sweep.rs`), which find out whether a state rests on them.
//! One that is cited afterwards is asked for again, and judged again.

use std::{collections::BTreeMap, ops::Bound, sync::Arc};

use bytes::Bytes;

use super::{Change, Outcome, Received, Taken, forget, header::Entering};
use crate::{
    error::{Refusal, Result},
    ids::{EventNum, Order, RoomNum, StateKeyNum},
    rooms::{
        admit::Why,
        event::{self, StateEvent, StoredEvent},
        graph,
    },
    schema,
    schema::rooms::{AsideCount, AsideRow, EventKey, EventRow, Place},
    store::{Batch, Direction, Fault, Read, migrate},
};

/// A room keeps at most this many events aside, because anybody in it can make as many as they like.
pub(in crate::rooms) const ASIDE_MAX: u64 = if cfg!(test) { 30 } else { 10_000 };
/// To make space aside, look at this many of the oldest events: some of them a state may rest on.
const LOOKED_AT: usize = 64;
/// Forget at most this many events for each one that comes in, so that space is made faster than it is needed.
const FORGOTTEN_AT_ONCE: u64 = 8;

/// The number of events that take the places aside.
pub(super) fn taken(count: &AsideCount) -> u64 {
    count.count.saturating_sub(count.needed)
}

/// The standing of an event as an outlier, before it got its place in the graph.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LeftOutliers {
    /// The event that redacted it, if one has.
    pub(super) redacted_by: Option<EventNum>,
    /// Whether it was counted among the events aside that are needed.
    pub(super) is_needed: bool,
}

impl Change {
    /// Whether one more event may be put aside; the oldest are forgotten where there are too many. `false` if none can
    /// be forgotten.
    pub(super) fn has_room_aside(&mut self) -> Result<bool, Fault> {
        let mut count = self.count_aside()?;
        if taken(&count) < ASIDE_MAX {
            return Ok(true);
        }
        self.forget_oldest(&mut count)?;
        schema::ASIDE_COUNT.put(&mut self.batch, self.num, &count);
        Ok(taken(&count) < ASIDE_MAX)
    }

    /// Gives the number of events that the room keeps aside.
    pub(super) fn count_aside(&self) -> Result<AsideCount, Fault> {
        Ok(schema::ASIDE_COUNT.get(&self.batch, self.num)?.unwrap_or_default())
    }

    /// Whether a rejected or soft-failed event may be put aside, which may be an outlier until now: that has its place already.
    pub(super) fn may_be_aside(&mut self, taken: Option<Taken>) -> Result<bool, Fault> {
        let is_outlier = match taken {
            Some(Taken { event, .. }) => self.find_outlier(event)?.is_some(),
            None => false,
        };
        Ok(is_outlier || self.has_room_aside()?)
    }

    /// Keeps an event aside that the rules or the room's state forbid, once [`Self::may_be_aside`] said that there is space for
    /// it. `left` is what the event was as an outlier until now.
    pub(super) fn keep_aside(
        &mut self,
        rejected: bool,
        why: &Why,
        row: EventRow,
        left: &LeftOutliers,
    ) -> Result<()> {
        let event = row.header.event;
        let aside = AsideRow { rejected, is_needed: left.is_needed, why: why.clone(), row: row.clone() };
        self.write_aside_row(&aside, Place::Aside)?;
        self.apply_waiting(&StoredEvent { order: Order::MIN, row })?;
        match left.redacted_by {
            Some(redaction) => self.redact(event, redaction),
            None => Ok(()),
        }
    }

    fn write_aside_row(&mut self, aside: &AsideRow, place: Place) -> Result<(), Fault> {
        let mut count = self.count_aside()?;
        count.count += 1;
        count.needed += u64::from(aside.is_needed);
        schema::ASIDE_COUNT.put(&mut self.batch, self.num, &count);
        let header = &aside.row.header;
        schema::EVENT_ID.put(&mut self.batch, &header.key, &(self.num, header.event));
        schema::PLACE.put(&mut self.batch, (self.num, header.event), &place);
        schema::ASIDE.put(&mut self.batch, (self.num, header.event), aside);
        schema::ROOM.put(&mut self.batch, self.num, &self.row);
        Ok(())
    }

    /// Writes an event that has no place in the room's graph. `rejected` is the rule that forbids the event, if one
    /// does.
    pub(super) fn put_outlier(
        &mut self,
        received: &Received,
        auth: &[Arc<StateEvent>],
        rejected: Option<Why>,
    ) -> Result<Outcome> {
        if !self.has_room_aside()? {
            let why = "the room keeps too many events aside";
            tracing::debug!(room = %self.num, event = %received.event().id, why, "an event is dropped");
            return Ok(Outcome::Unknown);
        }
        let why = "other events name it among their auth events";
        self.write_outlier(received, auth, rejected, why, false).map(|(event, _)| Outcome::Outlier(event))
    }

    /// Writes an event that a join or a fetched state brings, with its place in no graph. The room needs the state events among them that are
    /// allowed, so that these take no place from others; one of the others is dropped where there is no place. Gives its numbers.
    pub(super) fn put_brought(
        &mut self,
        received: &Received,
        auth: &[Arc<StateEvent>],
        why: &str,
        rejected: Option<Why>,
    ) -> Result<Option<(EventNum, Option<StateKeyNum>)>> {
        let is_needed = rejected.is_none() && received.event().state_key.is_some();
        // None is forgotten for it, because events that come later in the join may name those that came before.
        if !is_needed && taken(&self.count_aside()?) >= ASIDE_MAX {
            let why = "the room keeps too many events aside";
            tracing::debug!(room = %self.num, event = %received.event().id, why, "an event that a join brought is dropped");
            return Ok(None);
        }
        self.write_outlier(received, auth, rejected, why, is_needed).map(Some)
    }

    fn write_outlier(
        &mut self,
        received: &Received,
        auth: &[Arc<StateEvent>],
        rejected: Option<Why>,
        why: &str,
        is_needed: bool,
    ) -> Result<(EventNum, Option<StateKeyNum>)> {
        let taken = self.take_numbers(received, rejected.is_some())?;
        let entering = Entering {
            num: taken.event,
            key: received.key(self.num),
            event: received.event(),
            json: received.json(),
            depth: received.depth(),
            state_key: taken.key,
            replaces: None,
            before: None,
            prev: Vec::new(),
            auth,
            sent_by: None,
            let_in: received.is_let_in(),
        };
        let header =
            entering.header().ok_or_else(|| Refusal::bad_json("The JSON is not that of an event."))?;
        if rejected.is_none() && header.state_key.is_some() {
            graph::put_auth_edges(&mut self.batch, self.num, taken.event, &header.auth);
        }
        let row = EventRow { header, json: received.json().clone() };
        let (is_rejected, why) = (rejected.is_some(), rejected.unwrap_or_else(|| why.to_owned()));
        tracing::debug!(room = %self.num, event = %received.event().id, rejected = is_rejected, why, "an event is kept as an outlier");
        let aside = AsideRow { rejected: is_rejected, is_needed, why, row: row.clone() };
        self.write_aside_row(&aside, Place::Outlier)?;
        self.apply_waiting(&StoredEvent { order: Order::MIN, row })?;
        Ok((taken.event, taken.key))
    }

    /// Finds an event that came in before by its key: its number, and its row if it is an outlier. A sweep learns here that the
    /// event, and the key of the outlier, must stay after all.
    pub(super) fn find_known(&self, key: &EventKey) -> Result<Option<(EventNum, Option<AsideRow>)>, Fault> {
        let Some(event) = event::find_key(&self.batch, self.num, key)? else { return Ok(None) };
        self.seat.cite(event);
        let outlier = self.find_outlier(event)?;
        if let Some(key) = outlier.as_ref().and_then(|outlier| outlier.row.header.state_key) {
            self.seat.use_key(key);
        }
        Ok(Some((event, outlier)))
    }

    /// Finds the row of an event, if the event is an outlier.
    pub(super) fn find_outlier(&self, event: EventNum) -> Result<Option<AsideRow>, Fault> {
        if schema::PLACE.get(&self.batch, (self.num, event))? != Some(Place::Outlier) {
            return Ok(None);
        }
        self.require_aside(event).map(Some)
    }

    fn require_aside(&self, event: EventNum) -> Result<AsideRow, Fault> {
        let aside = schema::ASIDE.get(&self.batch, (self.num, event))?;
        aside.ok_or(Fault::Corrupt("an event is missing"))
    }

    /// Notes that an event gets its place in the graph, and so is no outlier any more. Gives what it was as an outlier.
    pub(super) fn leave_outliers(&mut self, taken: Option<Taken>) -> Result<LeftOutliers, Fault> {
        let Some(Taken { event, .. }) = taken else { return Ok(LeftOutliers::default()) };
        let Some(outlier) = self.find_outlier(event)? else { return Ok(LeftOutliers::default()) };
        schema::ASIDE.delete(&mut self.batch, (self.num, event));
        let mut count = self.count_aside()?;
        forget::count_less(&mut count, &outlier);
        schema::ASIDE_COUNT.put(&mut self.batch, self.num, &count);
        Ok(LeftOutliers { redacted_by: outlier.row.header.redacted_by, is_needed: outlier.is_needed })
    }

    fn forget_oldest(&mut self, count: &mut AsideCount) -> Result<(), Fault> {
        let low = Bound::Excluded((self.num, count.looked_at));
        let high = Bound::Excluded((RoomNum(self.num.0.saturating_add(1)), EventNum(0)));
        let rows = schema::ASIDE.range::<(RoomNum, EventNum)>(&self.batch, low, high, Direction::Up)?;
        let rows: Vec<_> = rows.take(LOOKED_AT).collect::<Result<_, _>>()?;
        let mut forgotten = 0;
        for ((room, event), aside) in rows {
            if forgotten >= FORGOTTEN_AT_ONCE {
                break;
            }
            count.looked_at = event;
            // A state may rest on an accepted or soft-failed state event, to which auth edges then lead.
            if aside.row.header.state_key.is_some() {
                continue;
            }
            debug_assert_eq!(room, self.num, "the range is of one room");
            self.forget_aside(&aside, count);
            forgotten += 1;
        }
        Ok(())
    }

    /// Deletes the rows of an event that is kept aside. If it comes once more, the redaction that redacted it does so again.
    pub(super) fn forget_aside(&mut self, aside: &AsideRow, count: &mut AsideCount) {
        forget::delete(&mut self.batch, self.num, aside);
        if let Some(redaction) = aside.row.header.redacted_by {
            forget::let_wait(&mut self.batch, self.num, aside, redaction);
        }
        forget::count_less(count, aside);
        count.forgotten = count.forgotten.max(aside.row.header.event);
    }

    /// Writes this row in place of an event that is kept aside.
    pub(super) fn replace_aside(&mut self, stored: &StoredEvent) -> Result<(), Fault> {
        let aside = self.require_aside(stored.event())?;
        let replaced = AsideRow { row: stored.row.clone(), ..aside };
        schema::ASIDE.put(&mut self.batch, (self.num, stored.event()), &replaced);
        Ok(())
    }
}

/// At most this many events are counted in one part of [`recount_aside`].
const COUNTED_AT_ONCE: usize = if cfg!(test) { 1 } else { 2_000 };

/// A step from an older layout: counts the events that each room keeps aside. Rooms that kept some before there was a count
/// have none.
pub(crate) fn recount_aside(
    read: &dyn Read,
    after: Option<Bytes>,
    batch: &mut Batch,
) -> Result<Option<Bytes>, Fault> {
    type At = (RoomNum, EventNum);
    let low = migrate::after_place::<At>(after)?;
    let mut counts = BTreeMap::<RoomNum, u64>::new();
    let mut last = None;
    for row in schema::ASIDE.range::<At>(read, low, Bound::Unbounded, Direction::Up)?.take(COUNTED_AT_ONCE) {
        let (at, _) = row?;
        *counts.entry(at.0).or_default() += 1;
        last = Some(migrate::place_of::<At>(at));
    }
    for (room, new) in counts {
        let row = schema::ASIDE_COUNT.get(batch, room)?.unwrap_or_default();
        let is_begun = matches!(low, Bound::Excluded((begun, _)) if begun == room);
        let count = if is_begun { row.count.saturating_add(new) } else { new };
        schema::ASIDE_COUNT.put(batch, room, &AsideCount { count, ..row });
    }
    Ok(last)
}
