//! A change to a room: events are built, judged and written into one batch, under the room's lock.
//!
//! All rows that follow from an event are in the same batch: the event itself, its id and its place, the state it
//! changes, the room's heads and counts, the memberships, its relations and redactions, and its transaction id.

pub(in crate::rooms) mod aside;
mod base;
pub(crate) mod countersigned;
pub mod expire;
mod forget;
mod header;
pub mod invited;
pub mod left_out;
mod learn;
pub mod outside;
mod own;
pub mod received;
mod redaction;
pub(in crate::rooms) mod staged;
mod stays;
pub(crate) mod sweep;
mod template;
pub mod txn;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use ruma::{EventId, OwnedRoomId, room_version_rules::RoomVersionRules};

pub(crate) use aside::recount_aside;
#[cfg(test)]
pub(crate) use base::elsewhere;
pub use base::{Base, Brought, Omitted, order_by_auth};
pub(crate) use received::list_allowing;
pub use received::{
    Backfill, Before, Completion, FILLED_AT_ONCE_MAX, Filling, Older, Outcome, Received, Reunion, Revision,
    Signed, Step, Taken, completes, list_ids_elsewhere,
};
pub use txn::Txn;

use staged::Moved;

use crate::{
    error::{Error, Refusal, Result},
    ids::{EventNum, Order, RoomNum, StateKeyNum, UserNum},
    rooms::{
        event::{self, StateEvent, StoredEvent},
        graph,
        members::{self, Since},
        power::Power,
        relations, require_in,
        resolve::Question,
        retention::Lifetime,
        rules,
        state::{self, Sketch},
        sticky,
        tip::{self, Tip},
        turns::Seat,
        view::RoomView,
    },
    schema,
    schema::event_types::{CREATE, MEMBER, POWER_LEVELS},
    schema::{
        push::Totals,
        rooms::{Membership, Place, Resident, RoomRow},
        state::StateValue,
    },
    store::{Batch, Enqueued, Fault, Guard, LogEntry, NotAccepted, StagedStep, Store},
};

/// While a room is being joined, others are told to come back after this time.
const JOINING_TAKES: Duration = Duration::from_secs(5);

/// State keys that a change looked up or set, each with its event; `None` where the key has none.
type StateEvents = BTreeMap<(String, String), Option<Arc<StateEvent>>>;

/// A change adds events to one room by one batch. Nothing of it counts until the batch is enqueued.
pub struct Change {
    /// The change's rows; flows may add rows of their own.
    pub batch: Batch,
    /// The number of the room that is changed.
    pub num: RoomNum,
    /// The room's row as this change leaves it.
    pub row: RoomRow,
    /// The number of members before this change.
    pub joined_before: u32,
    /// The room's row as it is without this change. A part of a staged step writes it with the numbers that were given out
    /// since, so that none is given twice.
    row_before: RoomRow,
    rules: &'static RoomVersionRules,
    store: Store,
    /// The guard proves to the store that nobody else writes this room's rows. It is given back before the seat is.
    guard: Guard,
    seat: Seat,
    /// The number of [`Store::written_alone`] when this change began.
    written_alone: u64,
    /// The room whose last part this change is, if it is made in parts.
    stage: Option<staged::Making>,
    /// The right to make a staged step, until the change is accepted or comes to nothing.
    step: Option<StagedStep>,
    /// Whether the change is a part of a step that takes several turns, so that it leaves no tip behind.
    is_part: bool,
    /// The state keys that this change has set, with their new events.
    set: StateEvents,
    /// The state keys that this change looked up in the store after it began to write. The tip remembers them once the
    /// change is accepted.
    looked_up: StateEvents,
    added: Vec<StoredEvent>,
    /// Our users whom member events of this change are about, and whether each is joined, invited or knocking after it.
    concerned: Vec<(UserNum, bool)>,
    /// Our users for whom others end by this change what they were to the room from outside, each with the number of the end.
    ended: Vec<(UserNum, EventNum)>,
    /// Our users who are joined, invited or knocking after this change, once they were asked for.
    users: Option<Arc<[UserNum]>>,
    /// The events that this change redacts, as they were before.
    pub(crate) redacted: Vec<StoredEvent>,
    /// The messages that counted until this change deleted their content, as they were before.
    pub(crate) expired: Vec<StoredEvent>,
    /// Answers of state resolution that may name rows of this batch, so that they hold only once the change is
    /// accepted.
    pub(crate) answered: Vec<(Question, Sketch)>,
    /// The running unread numbers outside threads as this change leaves them, if they are known. Keeping them saves a
    /// look-up in the store for each event.
    pub(crate) unread: Option<Totals>,
    /// The only users whom this change wakes, where it adds no event and others would be shown nothing of it.
    pub(crate) wakes_only: Option<Vec<UserNum>>,
    /// The signatures of the room's policy server that events of ours need.
    signatures: countersigned::Signatures,
    /// The last day for which the timer that forgets transactions is known to be set: it need not be looked for again.
    sent_day: Option<u32>,
    /// The lifetime of the room's messages, once it was asked for.
    lifetime: Option<Lifetime>,
    /// The messages that this change writes, each with the time at which its sender says it was made.
    messages: Vec<(Order, u64)>,
    /// Whether sticky events of the room are soft-failed, once that was looked for.
    has_soft_failed_sticky: Option<bool>,
    /// The newest event that one of our users sent with a transaction id, and that user.
    pub(crate) sent_by: Option<(EventNum, UserNum)>,
}

impl Change {
    /// Begins a change to a room that this server is in. `seat` proves that nobody else changes the room meanwhile. Refuses
    /// any other room: see [`rooms::require_in`](crate::rooms::require_in).
    pub fn begin(store: &Store, seat: Seat, num: RoomNum) -> Result<Self> {
        Self::open(store, seat, num, require_in)
    }

    /// Begins a change to rows of a room that stand beside its events, which may also be a room that this server is no
    /// longer in. Refuses a room that is not there: 404 `M_NOT_FOUND`.
    pub fn begin_beside(store: &Store, seat: Seat, num: RoomNum) -> Result<Self> {
        Self::open(store, seat, num, |resident| if resident.counts() { Ok(()) } else { require_in(resident) })
    }

    fn open(
        store: &Store,
        mut seat: Seat,
        num: RoomNum,
        check: impl FnOnce(Resident) -> Result<()>,
    ) -> Result<Self> {
        debug_assert_eq!(seat.room(), num, "the seat is that of another room");
        if seat.is_being_joined() {
            tracing::debug!(room = %num, "a change of a room is put off until it is joined");
            return Err(Error::Busy { retry_after: JOINING_TAKES });
        }
        let guard = seat.guard();
        let written_alone = store.written_alone();
        seat.tip.take_if(|tip| tip.written_alone != written_alone);
        let row = match &seat.tip {
            Some(tip) => tip.row.clone(),
            None => {
                // Where there is no tip, the last change may have panicked or the server begun anew, so that a staged
                // step may be unfinished.
                staged::clear(store, &guard, num)?;
                let row = schema::ROOM.get(&store.batch(&guard), num)?;
                let row = row.ok_or_else(|| Refusal::not_found("This server knows no such room."))?;
                seat.tip = Some(Tip::of(row.clone(), written_alone));
                row
            }
        };
        check(row.resident)?;
        Self::over(store, store.batch(&guard), guard, seat, row, written_alone)
    }

    /// Begins a room of this version, without any event yet. The batch is refused if a room of this id exists.
    pub fn begin_room(store: &Store, seat: Seat, num: RoomNum, id: OwnedRoomId, version: u8) -> Result<Self> {
        let row = RoomRow::new(id, version, Resident::Yes);
        debug_assert_eq!(seat.room(), num, "the seat is that of another room");
        let (guard, written_alone) = (seat.guard(), store.written_alone());
        let mut batch = store.batch(&guard);
        schema::ROOM_ID.expect_absent(&mut batch, row.id.as_str());
        schema::ROOM_ID.put(&mut batch, row.id.as_str(), &num);
        let mut change = Self::over(store, batch, guard, seat, row, written_alone)?;
        change.signatures.is_new_room = true;
        Ok(change)
    }

    fn over(
        store: &Store,
        batch: Batch,
        guard: Guard,
        seat: Seat,
        row: RoomRow,
        written_alone: u64,
    ) -> Result<Self> {
        let num = seat.room();
        let rules = rules(&row)?;
        let (set, looked_up) = (StateEvents::new(), StateEvents::new());
        let (added, concerned) = (Vec::new(), Vec::new());
        let (redacted, answered) = (Vec::new(), Vec::new());
        let unread = seat.tip.as_ref().and_then(|tip| tip.unread);
        let sent_day = seat.tip.as_ref().and_then(|tip| tip.sent_day);
        let lifetime = seat.tip.as_ref().and_then(|tip| tip.lifetime);
        let (users, stage, step, store) = (None, None, None, store.clone());
        let row_before = row.clone();
        Ok(Self {
            batch,
            num,
            joined_before: row.joined,
            row,
            row_before,
            rules,
            store,
            guard,
            seat,
            written_alone,
            stage,
            step,
            is_part: false,
            set,
            looked_up,
            added,
            concerned,
            ended: Vec::new(),
            users,
            redacted,
            answered,
            unread,
            wakes_only: None,
            signatures: countersigned::Signatures::default(),
            sent_day,
            lifetime,
            messages: Vec::new(),
            expired: Vec::new(),
            has_soft_failed_sticky: None,
            sent_by: None,
        })
    }

    /// The rules of the room's version.
    pub fn rules(&self) -> &'static RoomVersionRules {
        self.rules
    }

    /// Lists the events added so far; their positions are pending.
    pub fn added(&self) -> &[StoredEvent] {
        &self.added
    }

    /// Finds the state event of a key, with the keys that this change has set.
    pub fn state(&mut self, event_type: &str, state_key: &str) -> Result<Option<Arc<StateEvent>>, Fault> {
        let key = (event_type.to_owned(), state_key.to_owned());
        if let Some(known) = self.set.get(&key).or_else(|| self.looked_up.get(&key)) {
            return Ok(known.clone());
        }
        if let Some(known) = self.seat.tip.as_ref().and_then(|tip| tip.find(&key)) {
            return Ok(known.clone());
        }
        let stored = super::find_state(&self.batch, self.num, event_type, state_key)?;
        let found = stored.map(|stored| StateEvent::read(&self.row, &stored)).transpose()?;
        if self.batch.row_count() > 0 {
            // The value was read over rows that may never be accepted, so the tip remembers it only once they are.
            self.looked_up.insert(key, found.clone());
        } else if let Some(tip) = &mut self.seat.tip {
            tip.remember(key, found.clone());
        }
        Ok(found)
    }

    /// Replaces the current event of a key, because it was redacted: the next events are judged by its redacted form.
    fn replace_state(&mut self, event_type: &str, state_key: &str, event: Arc<StateEvent>) {
        self.set.insert((event_type.to_owned(), state_key.to_owned()), Some(event));
    }

    /// Gives the room as this change leaves it.
    pub fn view(&self) -> RoomView<'_, Batch> {
        RoomView { read: &self.batch, num: self.num, row: &self.row }
    }

    /// Finds the number of the event of this id in this room.
    pub fn find_num(&self, id: &EventId) -> Result<Option<EventNum>, Fault> {
        let Some(key) = event::parse_event_id(id, self.num, self.row.version) else { return Ok(None) };
        let found = event::find_key(&self.batch, self.num, &key)?;
        // An event that comes in names older ones by their ids only, so that a sweep learns here which must stay after all.
        if let Some(event) = found {
            self.seat.cite(event);
        }
        Ok(found)
    }

    /// Gives the current power levels, with the keys that this change has set.
    pub fn power(&mut self) -> Result<Power> {
        let create = self.state(CREATE, "")?;
        let levels = self.state(POWER_LEVELS, "")?;
        Power::of(&self.rules.authorization, create, levels)
    }

    /// Gives a user's membership of the room, with the member events that this change has set.
    pub fn membership(&mut self, user: &str) -> Result<Membership, Fault> {
        let event = self.state(MEMBER, user)?;
        let membership = event.and_then(|event| event::membership_of(event.parsed.content.get()));
        Ok(membership.unwrap_or(Membership::Leave))
    }

    /// Writes this row in place of the event that it was made from.
    fn replace_event(&mut self, stored: &StoredEvent) {
        debug_assert!(
            schema::TIMELINE
                .get(&self.batch, (self.num, stored.order))
                .is_ok_and(|old| old.is_some_and(|old| old.header.key == stored.row.header.key)),
            "an event is replaced by another form of itself only"
        );
        schema::TIMELINE.put(&mut self.batch, (self.num, stored.order), &stored.row);
    }

    /// Gives the number and the order of the next event, and claims its position.
    pub(super) fn next_place(&mut self) -> (EventNum, Order) {
        let event = EventNum(self.row.next_event);
        self.row.next_event += 1;
        (event, self.next_order(event))
    }

    /// Gives an order to an event that has its number, and claims its position.
    pub(super) fn next_order(&mut self, event: EventNum) -> Order {
        Order::live(self.batch.position(&LogEntry::Event { room: self.num, event }))
    }

    pub(super) fn intern_key(&mut self, event_type: &str, state_key: &str) -> Result<StateKeyNum, Fault> {
        let key =
            state::intern_key(&mut self.batch, self.num, &mut self.row.next_key, event_type, state_key)?;
        // An event that comes in uses a key, so that a sweep learns here which must stay after all.
        self.seat.use_key(key);
        Ok(key)
    }

    /// Writes the room's row as this change leaves it.
    pub(super) fn put_room(&mut self) {
        schema::ROOM.put(&mut self.batch, self.num, &self.row);
    }

    /// Writes the rows of the event itself.
    pub(super) fn put(&mut self, stored: &StoredEvent) -> Result<(), Fault> {
        let (event, header) = (stored.event(), &stored.row.header);
        schema::TIMELINE.put(&mut self.batch, (self.num, stored.order), &stored.row);
        schema::PLACE.put(&mut self.batch, (self.num, event), &Place::Timeline(stored.order));
        schema::EVENT_ID.put(&mut self.batch, &header.key, &(self.num, event));
        if header.state_key.is_some() {
            graph::put_auth_edges(&mut self.batch, self.num, event, &header.auth);
        }
        // Nothing is noted where messages are known to be kept for ever, as they are in most rooms.
        let is_kept = self.lifetime == Some(Lifetime(None));
        if header.state_key.is_none() && !header.unseen && !is_kept {
            self.messages.push((stored.order, header.sent_ms));
        }
        // An event that clients do not see is not shown with the event that it refers to, either.
        if header.unseen { Ok(()) } else { relations::index(&mut self.batch, self.num, stored) }
    }

    /// Takes one step of the main line: these keys have these values from this order on, and derived keys follow.
    /// `event` is the event that sets the first of them, where it is at hand.
    pub(super) fn set_state(
        &mut self,
        order: Order,
        changes: &[(StateKeyNum, StateValue)],
        mut event: Option<Arc<StateEvent>>,
    ) -> Result<()> {
        debug_assert!(order >= self.row.state_tip, "the main line only grows");
        let (mut values, mut touched) = (Vec::with_capacity(changes.len() + 2), self.touched());
        for (key, val) in changes {
            let unknown = || Fault::Corrupt("a state key has no name");
            let (event_type, state_key) = match event.as_deref().map(|event| &event.parsed) {
                Some(parsed) => (parsed.event_type.to_string(), parsed.state_key.clone().unwrap_or_default()),
                None => state::key_name(&self.batch, self.num, *key)?.ok_or_else(unknown)?,
            };
            if members::is_derived(&event_type) {
                continue;
            }
            let new = match (event.take(), val.event()) {
                (Some(event), _) => Some(event),
                (None, Some(event)) => {
                    let stored = event::require(&self.batch, self.num, event)?;
                    Some(StateEvent::read(&self.row, &stored)?)
                }
                (None, None) => None,
            };
            let old = self.state(&event_type, &state_key)?;
            if event_type == MEMBER {
                self.follow_membership(order, &state_key, old.as_deref(), new.as_deref(), &mut touched)?;
            }
            self.set.insert((event_type, state_key), new);
            values.push((*key, *val));
        }
        let derived = touched.values(&mut self.batch, self.num, &mut self.row.next_key, self.row.joined)?;
        values.extend(derived);
        state::apply(&mut self.batch, self.num, order, &values)?;
        if !values.is_empty() {
            debug_assert!(order >= self.row.state_tip, "the main line is written at its end only");
            self.row.state_tip = order;
        }
        Ok(())
    }

    /// Notes that an event is part of this change, once the room's heads and state are as the event leaves them.
    fn finish(&mut self, stored: &StoredEvent) {
        debug_assert!(self.row.resident.is_in(), "events are added to rooms that this server is in");
        debug_assert!(stored.order > self.row.tip, "a live event stands above all others of its room");
        debug_assert!(self.row.state_tip <= stored.order, "the state does not change above the newest event");
        debug_assert!(
            (1..=graph::HEADS_MAX).contains(&self.row.heads.len()),
            "a room has some heads, and not many"
        );
        self.row.tip = stored.order;
        schema::ROOM.put(&mut self.batch, self.num, &self.row);
        self.added.push(stored.clone());
    }

    /// Follows a user's membership: the room's counts, and the rows of the user.
    fn follow_membership(
        &mut self,
        order: Order,
        user: &str,
        old: Option<&StateEvent>,
        new: Option<&StateEvent>,
        touched: &mut members::Touched,
    ) -> Result<(), Fault> {
        let Some(event) = new.or(old) else { return Ok(()) };
        let membership = |event: Option<&StateEvent>| {
            event
                .and_then(|event| event::membership_of(event.parsed.content.get()))
                .unwrap_or(Membership::Leave)
        };
        let moved = Moved { was: membership(old), is: membership(new), by: event.event };
        self.move_member(order, user, moved, touched)
    }

    /// Whether sticky events are remembered that were soft-failed. Nearly no room has any, so that they are looked for once.
    fn has_soft_failed_sticky(&mut self) -> Result<bool, Fault> {
        let has_any = match self.has_soft_failed_sticky {
            Some(known) => known,
            None => sticky::has_soft_failed(&self.batch, self.num)?,
        };
        self.has_soft_failed_sticky = Some(has_any);
        Ok(has_any)
    }

    fn move_member(
        &mut self,
        order: Order,
        user: &str,
        moved: Moved,
        touched: &mut members::Touched,
    ) -> Result<(), Fault> {
        self.count_member(user, moved, touched);
        if self.has_soft_failed_sticky()? {
            sticky::reconsider_of(&mut self.batch, self.num, user)?;
        }
        let now = Since { membership: moved.is, event: moved.by, order };
        let user = members::track(&mut self.batch, self.num, user, now, None)?;
        self.concern(user, moved.is);
        Ok(())
    }

    /// Begins to count the members who come and go by server.
    pub(super) fn touched(&self) -> members::Touched {
        match self.row.partial.as_ref().filter(|partial| !partial.is_filled) {
            Some(partial) => members::Touched::among_unknown(&partial.us, partial.base),
            None => members::Touched::default(),
        }
    }

    /// Counts a user whose membership changes.
    fn count_member(&mut self, user: &str, moved: Moved, touched: &mut members::Touched) {
        let Moved { was, is, .. } = moved;
        let count = |event_type: Membership, count: u32| {
            debug_assert!(was != event_type || count > 0, "somebody who was there was counted");
            count.saturating_add(u32::from(is == event_type)).saturating_sub(u32::from(was == event_type))
        };
        let by = i64::from(is == Membership::Join) - i64::from(was == Membership::Join);
        if by != 0 {
            touched.count(user, by);
        }
        self.row.joined = count(Membership::Join, self.row.joined);
        self.row.invited = count(Membership::Invite, self.row.invited);
    }

    /// Notes that one of our users hears of this change, because their membership is this after it.
    fn concern(&mut self, user: Option<UserNum>, membership: Membership) {
        self.concerned.extend(user.map(|user| (user, members::is_near(membership))));
    }

    /// Lists our users who must hear of this change, rising: those in the room before and after it, and those whom its
    /// member events are about. The tip remembers who is in the room, so rows are read only where the tip is new.
    pub fn list_concerned(&mut self) -> Result<Arc<[UserNum]>, Fault> {
        let known = self.seat.tip.as_ref().and_then(|tip| tip.users.clone());
        let before = match known {
            Some(users) => users,
            // The rows are read with this change in them; users who leave by it are added below.
            None => members::list_local_users(&self.batch, self.num)?.into(),
        };
        if self.concerned.is_empty() {
            self.users = Some(Arc::clone(&before));
            return Ok(before);
        }
        self.users = Some(tip::with_changes(&before, &self.concerned));
        let told: Vec<_> = self.concerned.iter().map(|(user, _)| (*user, true)).collect();
        Ok(tip::with_changes(&before, &told))
    }

    /// Hands the batch to the store and releases the room. The change is accepted from here on; it is durable and
    /// visible once `flushed` resolves.
    pub fn enqueue(mut self, store: &Store) -> Result<Enqueued, NotAccepted> {
        self.finish_stage();
        let is_part = self.is_part;
        let Self { batch, guard, row, mut seat, set, looked_up, concerned, users, unread, .. } = self;
        let Self { sent_day, lifetime, written_alone, .. } = self;
        let enqueued = store.enqueue(batch)?;
        drop(guard);
        if is_part {
            return Ok(enqueued);
        }
        let tip = seat.tip.get_or_insert_with(|| Tip::of(row.clone(), written_alone));
        tip.row = row.settle(enqueued.base);
        tip.unread = unread;
        tip.sent_day = sent_day;
        tip.lifetime = lifetime;
        for (key, event) in looked_up.into_iter().chain(set) {
            tip.remember(key, event);
        }
        if users.is_some() {
            tip.users = users;
        } else if !concerned.is_empty() {
            tip.users = None;
        }
        Ok(enqueued)
    }
}
