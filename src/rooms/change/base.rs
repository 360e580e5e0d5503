//! The base of a room: the state that a join over federation brings, with the events that allow it.
//!
//! The state of a large room is a hundred thousand events, so a base is laid in many changes, each of which is a turn of the
//! room ([`Base::begin_part`], [`Base::take`]). They take the events in as outliers: we know what they say, and have no place
//! for them in the room's graph. The last change ([`Base::finish`]) makes the brought state the room's state, adds the member
//! event of the user who joins, and opens a hole below it. Nothing counts before that one is accepted.
//!
//! If we had nothing of the room, the parts write the rows as they are going to be, because nobody reads the room. In a room
//! that we were in before, the brought state is a staged step from the state that we had (`staged.rs`); until then its keys are
//! held in memory, a few bytes each.
//!
//! The row of `STAGE` is there from the first part to the last. A join that ends in between, however that comes, is taken back
//! by the next change of the room or when the server starts. Meanwhile a [`JoinClaim`] keeps other changes away.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use ruma::OwnedEventId;
use serde::Deserialize;

use super::{
    Change, Received, Taken,
    header::{Entering, auth_depth},
    received::{Over, Overs, list_allowing},
    staged::{self, Moved},
};
use crate::{
    accounts,
    error::{Error, Result},
    ids::{EventNum, RoomNum, StateKeyNum, UserNum},
    rooms::{
        admit::{self, AuthState, Evidence, Known, Verdict},
        event::{self, Event, StateEvent, StoredEvent},
        members::{self, Touched},
        state::{self, Sketch, stage},
        turns::{JoinClaim, Seat},
    },
    schema,
    schema::event_types::{CREATE, MEMBER},
    schema::{
        rooms::{EventRow, Head, Membership, PartialState, Place, Resident, RoomRow},
        state::{StateRef, StateValue},
    },
    store::{Fault, NotAccepted, Read, Store},
};

/// A part takes in at most this many events, each of which may bring a server whose rows are written at its end.
const PART_EVENTS_MAX: usize = if cfg!(test) { 7 } else { 400 };
/// A part takes in no further event once it has this many rows.
const PART_ROWS: usize = 3_000;
/// A part takes in no further event once it has this many bytes.
const PART_BYTES: usize = 512 << 10;
/// A join comes to nothing that brings more events than this which the rules forbid and for which there is no place aside.
const DROPPED_MAX: usize = if cfg!(test) { 40 } else { 20_000 };
/// Remember at most this many events that allow others, because most events are allowed by the same few.
const ALLOWING_MAX: usize = 1_000;

/// An event that a join brings.
#[derive(Clone, Debug)]
pub struct Brought {
    /// The event, of which the form, the hash and the signatures were checked.
    pub event: Received,
    /// Whether it is part of the state before our member event. Other events are there because they allow such ones.
    pub is_state: bool,
}

/// A join of a room over federation, while the state that it brings is laid down.
#[derive(Debug)]
pub struct Base {
    claim: JoinClaim,
    /// The server that brought the state: it is at fault for what is wrong with that.
    via: String,
    /// The room's row, as it is before the join.
    row: RoomRow,
    is_new: bool,
    is_begun: bool,
    /// The brought state, if the room was there before.
    state: BTreeMap<StateKeyNum, EventNum>,
    /// Our users whom the brought state knows, with their member keys, if the room was not there before.
    users: BTreeMap<UserNum, StateKeyNum>,
    /// Events that allowed others.
    allowing: BTreeMap<EventNum, Arc<StateEvent>>,
    /// The ids of events that the rules forbid, and for which there is no place aside.
    dropped: BTreeSet<OwnedEventId>,
    /// The servers of the room, if the brought state has no members.
    omitted: Option<Omitted>,
    /// Memberships of our users that the brought state has and that are over by what is here.
    overs: Overs,
}

/// A state is brought without the room's members, but for some.
#[derive(Clone, Debug)]
pub struct Omitted {
    /// The name of this server.
    pub us: String,
    /// The servers that are said to have somebody in the room.
    pub servers: Vec<String>,
}

impl Base {
    /// Begins to join the room of this id and version, of which the claim is; writes nothing. `via` is the server that brings
    /// the state. Errors: [`Error::Remote`] if we know the room by another id or version. Of a room in which we never were we only
    /// know what others told of it, so that the join says which version it has.
    pub fn new(
        read: &(impl Read + ?Sized),
        claim: JoinClaim,
        (id, version): (ruma::OwnedRoomId, u8),
        via: String,
    ) -> Result<Self> {
        let known = schema::ROOM.get(read, claim.room())?;
        // The rows of a join that came to nothing are taken back before the first part.
        let known = known.filter(|row| row.resident != Resident::Joining && row.resident != Resident::No);
        let is_new = known.is_none();
        let mut row = known.unwrap_or_else(|| RoomRow::new(id.clone(), version, Resident::Joining));
        if !row.resident.has_history() {
            row.version = version;
        }
        let (state, users, allowing) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let dropped = BTreeSet::new();
        let (is_begun, omitted, overs) = (false, None, Overs::new());
        let base =
            Self { claim, via, row, is_new, is_begun, state, users, allowing, dropped, omitted, overs };
        if base.row.version != version || base.row.id != id {
            return Err(base.fault("it joined us to a room of another id or version than we know"));
        }
        Ok(base)
    }

    /// The same base, of which the brought state has no members, but for some.
    #[must_use]
    pub fn without_members(self, omitted: Omitted) -> Self {
        Self { omitted: Some(omitted), ..self }
    }

    /// The number of the room that is joined.
    pub fn num(&self) -> RoomNum {
        self.claim.room()
    }

    /// The row of the room that is joined, for checking the form of the events that are brought.
    pub fn room(&self) -> &RoomRow {
        &self.row
    }

    /// Lists the ids of the events that allow this one, which must be taken in before it: see [`order_by_auth`].
    pub fn list_allowing(&self, event: &Received) -> Result<Vec<OwnedEventId>, Fault> {
        list_allowing(&self.row, event.event())
    }

    /// Begins the change that takes in the next events.
    pub fn begin_part(&mut self, store: &Store, seat: Seat) -> Result<Change> {
        let mut change = self.begin(store, seat)?;
        change.is_part = true;
        Ok(change)
    }

    fn begin(&mut self, store: &Store, mut seat: Seat) -> Result<Change> {
        let num = self.num();
        debug_assert_eq!(seat.room(), num, "the seat is that of another room");
        seat.tip = None;
        let (guard, written_alone) = (seat.guard(), store.written_alone());
        if !self.is_begun {
            staged::clear(store, &guard, num)?;
        }
        let mut batch = store.batch(&guard);
        let row = match schema::ROOM.get(&batch, num)? {
            // The word of outsiders on a room, its version included, counts for nothing once it is joined.
            Some(row) if !row.resident.has_history() => RoomRow { version: self.row.version, ..row },
            Some(row) => row,
            None if self.is_begun => return Err(Fault::Corrupt("a room that is being joined is gone").into()),
            None => self.row.clone(),
        };
        if !std::mem::replace(&mut self.is_begun, true) {
            let before = (EventNum(row.next_event), StateKeyNum(row.next_key));
            stage::begin_to_bring(&mut batch, num, (!self.is_new).then_some(before));
            if self.is_new {
                schema::ROOM_ID.expect_absent(&mut batch, row.id.as_str());
                schema::ROOM_ID.put(&mut batch, row.id.as_str(), &num);
            }
        }
        Change::over(store, batch, guard, seat, row, written_alone)
    }

    /// Takes in events until the part is full. Gives `false` if there are no more. Each event must come after those that allow
    /// it ([`order_by_auth`]). Errors: [`Error::Remote`] if it does not; the join has come to nothing then.
    pub fn take(&mut self, change: &mut Change, events: &mut dyn Iterator<Item = Brought>) -> Result<bool> {
        if self.take_servers(change)? {
            return Ok(true);
        }
        let (mut touched, mut taken, mut is_more) = (Touched::default(), 0, true);
        if self.is_new {
            // Members are counted as they come, and not all over again when the first is.
            members::joined_value(&mut change.batch, change.num, &mut change.row.next_key, 0)?;
        }
        let is_full =
            |change: &Change| change.batch.row_count() > PART_ROWS || change.batch.byte_count() > PART_BYTES;
        while taken < PART_EVENTS_MAX && !is_full(change) {
            let Some(brought) = events.next() else {
                is_more = false;
                break;
            };
            self.take_one(change, &brought, &mut touched)?;
            taken += 1;
        }
        let joined = change.row.joined;
        for (key, val) in touched.values(&mut change.batch, change.num, &mut change.row.next_key, joined)? {
            stage::put_first(&mut change.batch, change.num, key, val)?;
        }
        change.put_room();
        Ok(is_more)
    }

    /// Takes in some of the servers that are said to have somebody in the room. Gives `false` where there are none left, and where
    /// they are part of a staged step.
    fn take_servers(&mut self, change: &mut Change) -> Result<bool> {
        if !self.is_new {
            return Ok(false);
        }
        let servers = self.omitted.as_mut().map(|omitted| &mut omitted.servers);
        let Some(servers) = servers.filter(|servers| !servers.is_empty()) else { return Ok(false) };
        members::joined_value(&mut change.batch, change.num, &mut change.row.next_key, 0)?;
        let left = servers.len().saturating_sub(PART_EVENTS_MAX);
        for server in servers.split_off(left) {
            let (key, val) =
                members::claim_server(&mut change.batch, change.num, &mut change.row.next_key, &server)?;
            stage::put_first(&mut change.batch, change.num, key, val)?;
        }
        change.put_room();
        Ok(true)
    }

    fn take_one(&mut self, change: &mut Change, brought: &Brought, touched: &mut Touched) -> Result<()> {
        let received = &brought.event;
        let (event, key) = match change.find_received(received)? {
            Some((known, _)) => {
                let kept = event::require_kept(&change.batch, change.num, known)?;
                let key = kept.row.header.state_key;
                if !received.is_in(&kept.row, change.rules()) {
                    // Another event of the same id is here, which is part of the state in its place.
                    let kept = Event::parse(kept.id(&change.row), &kept.row.json);
                    let kept = kept.map_err(|_| Fault::Corrupt("an event is not the JSON of an event"))?;
                    return match key.filter(|_| brought.is_state) {
                        Some(key) => self.set(change, key, known, &kept, touched),
                        None => Ok(()),
                    };
                }
                (known, key)
            }
            None => {
                // An event that only a dropped one could allow is as forbidden as that.
                let mut allowing_ids = list_allowing(&change.row, received.event())?.into_iter();
                if !self.dropped.is_empty() && allowing_ids.any(|id| self.dropped.contains(&id)) {
                    return self.drop_one(received);
                }
                let allowing = self.auth_events(change, received.event())?;
                let rules = &change.rules().authorization;
                let rejected = admit::check_at_auth_events(received.event(), rules, &allowing).err();
                let auth: Vec<_> =
                    received.event().auth.iter().filter_map(|id| found(&allowing, id)).collect();
                match change.put_brought(received, &auth, "a join brought it", rejected)? {
                    Some(numbers) => numbers,
                    None => return self.drop_one(received),
                }
            }
        };
        // A rejected event is no part of any state, and has no key.
        match key.filter(|_| brought.is_state) {
            Some(key) => self.set(change, key, event, received.event(), touched),
            None => Ok(()),
        }
    }

    /// Notes that an event which the rules forbid is not kept.
    fn drop_one(&mut self, received: &Received) -> Result<()> {
        if self.dropped.len() >= DROPPED_MAX {
            return Err(self.fault("it brought too many events that the rules of the room forbid"));
        }
        self.dropped.insert(received.id().to_owned());
        Ok(())
    }

    /// Finds the events that allow an event, all of which came before it.
    fn auth_events(
        &mut self,
        change: &Change,
        event: &Event,
    ) -> Result<BTreeMap<OwnedEventId, Known<Arc<StateEvent>>>> {
        let mut known = BTreeMap::new();
        for id in list_allowing(&change.row, event)? {
            let Some(num) = change.find_num(&id)? else {
                return Err(self.fault(format!("it brought {} without {id}, which allows it", event.id)));
            };
            let found = match self.allowing.get(&num) {
                Some(found) => Arc::clone(found),
                None => {
                    if self.allowing.len() >= ALLOWING_MAX {
                        self.allowing.clear();
                    }
                    let found = change.judged_event(num)?;
                    self.allowing.insert(num, Arc::clone(&found));
                    found
                }
            };
            known.insert(id, Known::Found(found));
        }
        if admit::lacking(event, &known, &BTreeMap::new()).is_some() {
            return Err(self.fault(format!("it brought {}, which no server may send", event.id)));
        }
        Ok(known)
    }

    /// Makes an event part of the state that is brought.
    fn set(
        &mut self,
        change: &mut Change,
        key: StateKeyNum,
        event: EventNum,
        parsed: &Event,
        touched: &mut Touched,
    ) -> Result<()> {
        if !self.is_new {
            let known = state::now(&change.batch, change.num, key)?;
            let kept = change.not_over(key, event, known)?;
            // Where members are left out, it is learnt with the rest of them what the state has of ours.
            if kept != event && self.omitted.is_none() {
                self.overs.insert(key, Over { brought: event, known: kept });
            }
            self.state.insert(key, kept);
            return Ok(());
        }
        let (val, old) = (StateValue::Event(event), state::now(&change.batch, change.num, key)?);
        stage::put_first(&mut change.batch, change.num, key, val)?;
        let user_id = parsed.state_key.as_deref().filter(|_| parsed.event_type.to_string() == MEMBER);
        let Some(user_id) = user_id else { return Ok(()) };
        let is = event::membership_of(parsed.content.get()).unwrap_or(Membership::Leave);
        let was = change.membership_in(old)?;
        change.count_member(user_id, Moved { was, is, by: event }, touched);
        if let Ok(user_id) = <&ruma::UserId>::try_from(user_id)
            && let Some(user) = accounts::users::find_num(&change.batch, user_id)?
        {
            self.users.insert(user, key);
        }
        Ok(())
    }

    /// Makes the brought state the room's, and adds the member event of the user who joins. Gives the room's last change, with
    /// which everything counts; `None` if another large step takes long, so that nothing was done and this may be tried again.
    /// Errors: [`Error::Remote`] if the state does not allow that event.
    pub fn finish(
        &mut self,
        store: &Store,
        seat: Seat,
        join: &Received,
    ) -> Result<Option<(Change, StoredEvent)>> {
        let mut change = self.begin(store, seat)?;
        match change.begin_step() {
            Ok(_) => {}
            Err(NotAccepted::Busy) => return Ok(None),
            Err(why) => return Err(why.into()),
        }
        let mut missing = Vec::new();
        for id in &join.event().prev {
            let known = change.find_num(id)?;
            let place = known.map(|known| schema::PLACE.get(&change.batch, (change.num, known)));
            if !matches!(place.transpose()?.flatten(), Some(Place::Timeline(_))) {
                missing.push(id.to_string());
            }
        }
        if self.is_new {
            change.lay_first_base(&self.users, missing)?;
        } else {
            let omitted = self.omitted.as_mut();
            let claimed = omitted.map(|omitted| std::mem::take(&mut omitted.servers)).unwrap_or_default();
            self.keep_own_members(&change, join.event().state_key.as_deref())?;
            change.lay_base(&self.state, &claimed.into_iter().collect(), missing)?;
            change.keep_earlier_stay(&self.via, join.event().state_key.as_deref().unwrap_or_default())?;
        }
        change.row.resident = Resident::Yes;
        change.row.partial = None;
        if let Some(Omitted { us, .. }) = &self.omitted {
            change.row.resident = Resident::Partial;
            change.row.partial = Some(PartialState {
                base: change.row.state_tip,
                // The number that the join has or gets is put in when it is written.
                join: EventNum(change.row.next_event),
                via: self.via.clone(),
                us: us.clone(),
                is_filled: false,
            });
        }
        let create = change.state(CREATE, "")?;
        let version = create.map(|create| version_of(create.parsed.content.get()));
        if version.as_deref() != Some(&*change.row.version.to_string()) {
            return Err(self.fault("it brought a state without the create event of the room"));
        }
        let stored = self.add_join(&mut change, join)?;
        change.settle_outside()?;
        // Many keys are in use by the state that was brought, and no reason to sweep the room.
        let mut count = schema::ASIDE_COUNT.get(&change.batch, change.num)?.unwrap_or_default();
        count.keys_swept = change.row.next_key;
        schema::ASIDE_COUNT.put(&mut change.batch, change.num, &count);
        Ok(Some((change, stored)))
    }

    /// Keeps our users as they are in the room's state, where it is brought without its members: of ours nothing is unknown. Only the
    /// one who joins may have been invited since, and the events that allow the join say so.
    fn keep_own_members(&mut self, change: &Change, joins: Option<&str>) -> Result<(), Fault> {
        let Some(Omitted { us, .. }) = &self.omitted else { return Ok(()) };
        for row in members::list_keys(&change.batch, change.num)? {
            let (user_id, key) = row?;
            if event::server_of(&user_id) == Some(us)
                && joins != Some(&user_id)
                && let Some(event) = state::current(&change.batch, change.num, key)?
            {
                self.state.entry(key).or_insert(event);
            }
        }
        Ok(())
    }

    fn add_join(&mut self, change: &mut Change, join: &Received) -> Result<StoredEvent> {
        let parsed = join.event();
        let allowing = self.auth_events(change, parsed)?;
        let rules = &change.rules().authorization;
        let mut before = AuthState::default();
        let state_key = parsed.state_key.as_deref();
        let needed =
            admit::needed_keys(&parsed.event_type, &parsed.sender, state_key, &parsed.content, rules);
        for (kind, key) in needed.unwrap_or_default() {
            if let Some(event) = change.state(&kind.to_string(), &key)? {
                before.insert(event);
            }
        }
        let at = Sketch::from(StateRef::Main(change.row.state_tip));
        let presumed = change.presume(parsed, &allowing, &at, &mut before)?;
        let rules = &change.rules().authorization;
        let prev = BTreeMap::new();
        let evidence = Evidence { rules, auth: &allowing, prev: &prev, before: &before, current: None };
        match admit::admit(parsed, &evidence) {
            Verdict::Accept => {}
            Verdict::Reject(why) | Verdict::SoftFail(why) => {
                return Err(
                    self.fault(format!("it let a user of ours join, which the room does not allow: {why}"))
                );
            }
            Verdict::Need { .. } | Verdict::Unknown => {
                return Err(Error::broken("a join names events that are missing"));
            }
        }
        let auth: Vec<_> = parsed.auth.iter().filter_map(|id| found(&allowing, id)).collect();
        let stored = change.write_join(join, &auth, &self.overs)?;
        change.learn_presumed(&presumed)?;
        Ok(stored)
    }

    fn fault(&self, cause: impl Into<String>) -> Error {
        Error::Remote { server: self.via.clone(), cause: cause.into() }
    }
}

impl Change {
    /// Writes our own member event, on which the room goes on: it is the only head, but for events by which memberships are `over` that
    /// were brought. Of the events that it cites, none needs to be known.
    fn write_join(&mut self, join: &Received, auth: &[Arc<StateEvent>], over: &Overs) -> Result<StoredEvent> {
        let (num, key) = match self.find_known(&join.key(self.num))? {
            None => {
                let taken = self.take_numbers(join, false)?;
                (taken.event, taken.key)
            }
            Some((event, Some(outlier))) => (event, outlier.row.header.state_key),
            Some((_, None)) => {
                return Err(Error::broken("a user joined by an event that the room has already"));
            }
        };
        let key = key.ok_or_else(|| Error::broken("a user joined by an event that is no state event"))?;
        if let Some(partial) = &mut self.row.partial {
            partial.join = num;
        }
        let left = self.leave_outliers(Some(Taken { event: num, key: Some(key) }))?;
        let (event_type, state_key) =
            (join.event().event_type.to_string(), join.event().state_key.clone().unwrap_or_default());
        let mut prev = Vec::new();
        for id in &join.event().prev {
            prev.extend(self.find_num(id)?);
        }
        let order = self.next_order(num);
        // While members are left out of the state, the membership from before is among the events that allow the join.
        let is_same = |event: &&Arc<StateEvent>| {
            event.parsed.event_type == join.event().event_type
                && event.parsed.state_key.as_ref() == Some(&state_key)
        };
        let replaced = match self.state(&event_type, &state_key)? {
            Some(known) => Some(known),
            None => auth.iter().find(is_same).cloned(),
        };
        let replaces = replaced.map(|event| event.event);
        let entering = Entering {
            num,
            key: join.key(self.num),
            event: join.event(),
            json: join.json(),
            depth: join.depth(),
            state_key: Some(key),
            replaces,
            before: None,
            prev,
            auth,
            sent_by: None,
            let_in: true,
        };
        let header = entering.header().ok_or_else(|| Error::broken("a join has no fields"))?;
        let base = self.row.state_tip;
        let mut stored = StoredEvent { order, row: EventRow { header, json: join.json().clone() } };
        self.put(&stored)?;
        let event = StateEvent { event: num, auth_depth: auth_depth(auth), parsed: join.event().clone() };
        self.set_state(order, &[(key, StateValue::Event(num))], Some(Arc::new(event)))?;
        let after = self.name_states(&mut stored, over)?.unwrap_or(StateRef::Main(self.row.state_tip));
        let (depth, stored_ms) = (join.depth(), join.event().sent.get().into());
        self.row.heads =
            vec![Head { event: num, key: join.key(self.num), depth, stored_ms, is_own: true, after }];
        self.row.apart.clear();
        let us = event::server_of(join.event().sender.as_str()).unwrap_or_default();
        self.add_forks(base, (us, Some(key)), over)?;
        self.finish(&stored);
        if let Some(redaction) = left.redacted_by {
            self.redact(num, redaction)?;
        }
        Ok(stored)
    }
}

fn found(
    auth: &BTreeMap<OwnedEventId, Known<Arc<StateEvent>>>,
    id: &OwnedEventId,
) -> Option<Arc<StateEvent>> {
    match auth.get(id) {
        Some(Known::Found(event)) => Some(Arc::clone(event)),
        _ => None,
    }
}

/// The room version that a create event states.
fn version_of(content: &str) -> String {
    #[derive(Deserialize)]
    struct Content {
        #[serde(default)]
        room_version: Option<String>,
    }
    let content: Option<Content> = serde_json::from_str(content).ok();
    content.and_then(|content| content.room_version).unwrap_or_else(|| "1".to_owned())
}

/// Gives the order in which a join takes events in: each after those among them that allow it, and else as they are. `events` are
/// the ids of the events, each with the ids of those that allow it. Events that allow one another in a circle are left out.
pub fn order_by_auth(events: &[(OwnedEventId, Vec<OwnedEventId>)]) -> Vec<usize> {
    let places: HashMap<&OwnedEventId, usize> =
        events.iter().enumerate().map(|(place, (id, _))| (id, place)).collect();
    let (mut allowed, mut waits_for) = (vec![Vec::new(); events.len()], vec![0_usize; events.len()]);
    for (place, (_, allowing)) in events.iter().enumerate() {
        let known: BTreeSet<usize> = allowing.iter().filter_map(|id| places.get(id).copied()).collect();
        for before in known {
            if let (Some(allowed), Some(waits)) = (allowed.get_mut(before), waits_for.get_mut(place)) {
                allowed.push(place);
                *waits += 1;
            }
        }
    }
    let mut free: BTreeSet<usize> =
        waits_for.iter().enumerate().filter(|(_, waits)| **waits == 0).map(|(place, _)| place).collect();
    let mut order = Vec::with_capacity(events.len());
    while let Some(place) = free.pop_first() {
        order.push(place);
        for after in allowed.get(place).into_iter().flatten() {
            if let Some(waits) = waits_for.get_mut(*after) {
                *waits -= 1;
                if *waits == 0 {
                    free.insert(*after);
                }
            }
        }
    }
    order
}

#[cfg(test)]
pub(crate) mod elsewhere;
#[cfg(test)]
mod tests;
