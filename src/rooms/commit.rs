//! A change to a room: events that are built, judged and written into one batch, under the room's lock.
//!
//! Everything that follows from an event stands in the same batch: the event itself, its id, its place, the state it
//! changes, the room's heads and counts, who is in the room, what it relates to, what it redacts, the transaction id.

use std::{collections::BTreeMap, sync::Arc};

use ruma::{
    EventId, OwnedEventId, OwnedRoomId,
    events::{StateEventType, TimelineEventType},
    room_version_rules::RoomVersionRules,
};

use crate::{
    error::{Error, Refusal, Result},
    ids::{EventNum, Order, RoomNum, StateKeyNum, UserNum},
    rooms::{
        admit::{self, AuthState, Verdict},
        build::{self, Built, Draft, Setting, Signer},
        event::{self, StateEvent, Stored},
        graph, members, redact, relations,
        resolve::Question,
        rules,
        state::{self, Sketch},
        tip::{self, Tip},
        turns::Seat,
    },
    schema,
    schema::{
        push::Totals,
        rooms::{AsideRow, EventHeader, EventRow, Head, Membership, Place, Resident, RoomRow, SentBy},
        state::{Ref, Val},
    },
    store::{Batch, Enqueued, Fault, Guard, LogEntry, NotAccepted, Store},
};

const MEMBER: &str = "m.room.member";
/// Depths are integers of canonical JSON.
const DEPTH_MAX: u64 = (1 << 53) - 1;

/// The state keys that a change looked up or set.
type StateEvents = BTreeMap<(String, String), Option<Arc<StateEvent>>>;

/// Events being added to one room by one batch. Nothing has happened until it is enqueued.
pub struct Change {
    /// The batch; flows may add rows of their own.
    pub batch: Batch,
    /// The room's number.
    pub num: RoomNum,
    /// The room as it will be.
    pub row: RoomRow,
    rules: &'static RoomVersionRules,
    /// What the seat proves to the store. It is given back before the seat is.
    guard: Guard,
    seat: Seat,
    set: StateEvents,
    added: Vec<Stored>,
    /// Our users whom member events of this change are about, and whether they are joined, invited or knock after it.
    concerned: Vec<(UserNum, bool)>,
    /// Our users who are so after this change, if that was asked.
    users: Option<Arc<[UserNum]>>,
    /// Events that were redacted, as they were before.
    pub(crate) redacted: Vec<Stored>,
    /// What states resolve to: true once this change is accepted.
    pub(crate) answered: Vec<(Question, Sketch)>,
    /// The running unread numbers outside threads, as they stand with this change, if they are known: finding them in the
    /// store for each event costs more than adding to them.
    pub(crate) unread: Option<Totals>,
}

/// The transaction that an event is sent with.
#[derive(Clone, Debug)]
pub struct Txn {
    /// Who sends it.
    pub user: UserNum,
    /// From which device.
    pub device: String,
    /// To which endpoint: transaction ids of different endpoints are different transactions.
    pub endpoint: String,
    /// The transaction id.
    pub id: String,
}

impl Txn {
    /// The event that this transaction made already.
    pub fn find(
        &self,
        read: &(impl crate::store::Read + ?Sized),
        room: RoomNum,
    ) -> Result<Option<EventNum>, Fault> {
        schema::TXN.get(read, (room, self.user, &self.device, &self.endpoint, &self.id))
    }
}

impl Change {
    /// Begins a change to a room that exists. `seat` is the proof that nobody else changes it meanwhile.
    /// Refuses a room that this server is not in: 404 `M_NOT_FOUND`.
    pub fn begin(store: &Store, mut seat: Seat, num: RoomNum) -> Result<Self> {
        let guard = Guard::of_room(num);
        let batch = store.batch(&guard);
        let row = match &seat.tip {
            Some(tip) => tip.row.clone(),
            None => {
                let row = schema::ROOM.get(&batch, num)?.filter(|row| row.resident == Resident::Yes);
                let row = row.ok_or_else(|| Refusal::not_found("This server knows no such room."))?;
                seat.tip = Some(Tip::of(row.clone()));
                row
            }
        };
        Self::over(batch, guard, seat, num, row)
    }

    /// Begins a room of this version, without any event yet. The batch is refused if there is a room of this id.
    pub fn begin_room(store: &Store, seat: Seat, num: RoomNum, id: OwnedRoomId, version: u8) -> Result<Self> {
        let row = RoomRow {
            id,
            version,
            resident: Resident::Yes,
            tip: Order::MIN,
            state_tip: Order::MIN,
            next_event: 0,
            next_key: 0,
            next_side: 0,
            heads: Vec::new(),
            joined: 0,
            invited: 0,
        };
        let guard = Guard::of_room(num);
        let mut batch = store.batch(&guard);
        schema::ROOM_ID.expect_absent(&mut batch, row.id.as_str());
        schema::ROOM_ID.put(&mut batch, row.id.as_str(), &num);
        Self::over(batch, guard, seat, num, row)
    }

    fn over(batch: Batch, guard: Guard, seat: Seat, num: RoomNum, row: RoomRow) -> Result<Self> {
        let rules = rules(&row)?;
        let (set, added, concerned) = (StateEvents::new(), Vec::new(), Vec::new());
        let (redacted, answered) = (Vec::new(), Vec::new());
        let unread = seat.tip.as_ref().and_then(|tip| tip.unread);
        let users = None;
        Ok(Self {
            batch,
            guard,
            num,
            row,
            rules,
            seat,
            set,
            added,
            concerned,
            users,
            redacted,
            answered,
            unread,
        })
    }

    /// The rules of the room's version.
    pub fn rules(&self) -> &'static RoomVersionRules {
        self.rules
    }

    /// The events added so far; their positions are pending.
    pub fn added(&self) -> &[Stored] {
        &self.added
    }

    /// The state event of a key, with what this change has set.
    pub fn state(&mut self, event_type: &str, state_key: &str) -> Result<Option<Arc<StateEvent>>, Fault> {
        let key = (event_type.to_owned(), state_key.to_owned());
        if let Some(known) = self.set.get(&key) {
            return Ok(known.clone());
        }
        if let Some(known) = self.seat.tip.as_ref().and_then(|tip| tip.find(&key)) {
            return Ok(known.clone());
        }
        let stored = super::find_state(&self.batch, self.num, event_type, state_key)?;
        let found = stored.map(|stored| StateEvent::read(&self.row, &stored)).transpose()?;
        if let Some(tip) = &mut self.seat.tip {
            tip.remember(key, found.clone());
        }
        Ok(found)
    }

    /// The current event of a key was redacted: what the next events are judged by is what is left of it.
    pub(crate) fn replace_state(&mut self, event_type: &str, state_key: &str, event: Arc<StateEvent>) {
        self.set.insert((event_type.to_owned(), state_key.to_owned()), Some(event));
    }

    /// What a user is to the room, with what this change has set.
    pub fn membership(&mut self, user: &str) -> Result<Membership, Fault> {
        let event = self.state("m.room.member", user)?;
        let membership = event.and_then(|event| event::membership_of(event.parsed.content.get()));
        Ok(membership.unwrap_or(Membership::Leave))
    }

    /// Builds an event of one of our users on the room's heads, judges it, and writes it into the batch.
    /// Refuses what the rules forbid: 403 `M_FORBIDDEN`; what is too large: 413 `M_TOO_LARGE`.
    pub fn add(&mut self, signer: &Signer, draft: &Draft, sent_by: Option<SentBy>) -> Result<Stored> {
        let (built, auth) = self.build(signer, draft)?;
        self.write(draft, built, &auth, sent_by)
    }

    /// Like [`Change::add`], for what a client sends with a transaction id. The batch is refused if the transaction
    /// has made an event already.
    pub fn add_once(&mut self, signer: &Signer, draft: &Draft, txn: &Txn) -> Result<Stored> {
        let sent_by = SentBy { device: txn.device.clone(), txn: txn.id.clone() };
        let stored = self.add(signer, draft, Some(sent_by))?;
        let key = (self.num, txn.user, txn.device.as_str(), txn.endpoint.as_str(), txn.id.as_str());
        schema::TXN.expect_absent(&mut self.batch, key);
        schema::TXN.put(&mut self.batch, key, &stored.event());
        Ok(stored)
    }

    fn build(&mut self, signer: &Signer, draft: &Draft) -> Result<(Built, Vec<Arc<StateEvent>>)> {
        let kind = TimelineEventType::from(draft.kind.as_str());
        let is_create = kind == TimelineEventType::RoomCreate;
        let mut before = AuthState::default();
        let mut auth = Vec::new();
        if !is_create {
            let content = draft.raw_content()?;
            let (sender, state_key) = (&draft.sender, draft.state_key.as_deref());
            let needed = admit::needed_keys(&kind, sender, state_key, &content, &self.rules.authorization)
                .map_err(|why| {
                    Refusal::bad_json(format!("The content is not what its type demands: {why}."))
                })?;
            for (event_type, key) in needed {
                let Some(event) = self.state(&event_type.to_string(), &key)? else { continue };
                let implied = event_type == StateEventType::RoomCreate
                    && self.rules.authorization.room_create_event_id_as_room_id;
                if !implied {
                    auth.push(Arc::clone(&event));
                }
                before.insert(event);
            }
        }
        let prev: Vec<_> =
            self.row.heads.iter().map(|head| event::event_id(&head.hash, self.row.version)).collect();
        let auth_ids: Vec<OwnedEventId> = auth.iter().map(|event| event.parsed.id.clone()).collect();
        let hashed_room_id = self.rules.authorization.room_create_event_id_as_room_id;
        let room_id = self.row.id.clone();
        let setting = Setting {
            room_id: (!(is_create && hashed_room_id)).then_some(&room_id),
            rules: self.rules,
            prev: &prev,
            auth: &auth_ids,
            depth: self.next_depth(),
        };
        let built = build::build(signer, draft, &setting, self.row.version)?;
        match admit::admit_own(&built.event, &self.rules.authorization, &before) {
            Verdict::Accept => Ok((built, auth)),
            Verdict::Reject(why) | Verdict::SoftFail(why) => {
                Err(Refusal::forbidden(format!("The room does not allow this: {why}.")).into())
            }
            Verdict::Need { .. } | Verdict::Unknown => Err(Error::broken("an event of our own needs others")),
        }
    }

    fn next_depth(&self) -> u64 {
        let deepest = self.row.heads.iter().map(|head| head.depth).max();
        deepest.map_or(1, |depth| (depth + 1).min(DEPTH_MAX))
    }

    /// Writes an event of our own. It cites all heads, so the state before it is the current state, the room has one
    /// head after it, and no states need to be resolved.
    fn write(
        &mut self,
        draft: &Draft,
        built: Built,
        auth: &[Arc<StateEvent>],
        sent_by: Option<SentBy>,
    ) -> Result<Stored> {
        let (event, order) = self.next_place();
        let depth = self.next_depth();
        let mut state_key = None;
        let mut replaces = None;
        if let Some(key) = &draft.state_key {
            replaces = self.state(&draft.kind, key)?;
            state_key = Some(self.intern_key(&draft.kind, key)?);
        }
        let header = EventHeader {
            event,
            hash: built.hash,
            sent_ms: draft.sent_ms,
            depth,
            auth_depth: auth_depth(auth),
            state_key,
            replaces: replaces.map(|event| event.event),
            redacted_by: None,
            unseen: graph::only_merges(&built.event.kind, draft.state_key.is_some()),
            before: None,
            after: None,
            prev: self.row.heads.iter().map(|head| head.event).collect(),
            auth: auth.iter().map(|event| event.event).collect(),
            sent_by,
            spans: event::locate(&built.json).ok_or_else(|| Error::broken("a built event has no fields"))?,
        };
        let stored = Stored { order, row: EventRow { header, json: built.json } };
        self.put(&stored)?;
        if let Some(key) = state_key {
            let state_event = StateEvent { event, auth_depth: auth_depth(auth), parsed: built.event };
            self.set_state(order, &[(key, Val::Event(event))], Some(Arc::new(state_event)))?;
        }
        let after = Ref::Main(self.row.state_tip);
        let stored_ms = draft.sent_ms;
        self.row.heads = vec![Head { event, hash: built.hash, depth, stored_ms, is_own: true, after }];
        self.finish(&stored, draft.redacts.as_deref())?;
        Ok(stored)
    }

    /// Puts this row in the place of the event that it was made from.
    pub(crate) fn replace_event(&mut self, stored: &Stored) {
        schema::TIMELINE.put(&mut self.batch, (self.num, stored.order), &stored.row);
    }

    /// The same of an event that clients do not see.
    pub(crate) fn replace_aside(&mut self, stored: &Stored) -> Result<(), Fault> {
        let key = (self.num, stored.event());
        let aside = schema::ASIDE.get(&self.batch, key)?.ok_or(Fault::Corrupt("an event is missing"))?;
        schema::ASIDE.put(&mut self.batch, key, &AsideRow { row: stored.row.clone(), ..aside });
        Ok(())
    }

    /// The number and the order of the next event; its position is claimed with them.
    pub(super) fn next_place(&mut self) -> (EventNum, Order) {
        let event = EventNum(self.row.next_event);
        self.row.next_event += 1;
        (event, self.next_order(event))
    }

    /// The order of an event that has its number; its position is claimed with it.
    pub(super) fn next_order(&mut self, event: EventNum) -> Order {
        Order::live(self.batch.position(&LogEntry::Event { room: self.num, event }))
    }

    pub(super) fn intern_key(&mut self, kind: &str, state_key: &str) -> Result<StateKeyNum, Fault> {
        state::intern_key(&mut self.batch, self.num, &mut self.row.next_key, kind, state_key)
    }

    /// The room's row, as it is to be.
    pub(super) fn put_room(&mut self) {
        schema::ROOM.put(&mut self.batch, self.num, &self.row);
    }

    /// The rows of the event itself.
    pub(super) fn put(&mut self, stored: &Stored) -> Result<(), Fault> {
        let (event, header) = (stored.event(), &stored.row.header);
        schema::TIMELINE.put(&mut self.batch, (self.num, stored.order), &stored.row);
        schema::PLACE.put(&mut self.batch, (self.num, event), &Place::Timeline(stored.order));
        schema::EVENT_ID.put(&mut self.batch, &header.hash, &(self.num, event));
        if header.state_key.is_some() {
            graph::put_auth_edges(&mut self.batch, self.num, event, &header.auth);
        }
        // What clients do not see is no part of what they see either.
        if header.unseen { Ok(()) } else { relations::index(&mut self.batch, self.num, stored) }
    }

    /// The rows of an event that clients do not see.
    pub(super) fn put_row_aside(&mut self, aside: &AsideRow) {
        let header = &aside.row.header;
        schema::EVENT_ID.put(&mut self.batch, &header.hash, &(self.num, header.event));
        schema::PLACE.put(&mut self.batch, (self.num, header.event), &Place::Aside);
        schema::ASIDE.put(&mut self.batch, (self.num, header.event), aside);
        schema::ROOM.put(&mut self.batch, self.num, &self.row);
    }

    /// One step of the main line: these keys have these values from this order on; what is derived of them follows.
    /// `event` is the one that sets the first of them, where it is at hand.
    pub(super) fn set_state(
        &mut self,
        order: Order,
        changes: &[(StateKeyNum, Val)],
        mut event: Option<Arc<StateEvent>>,
    ) -> Result<()> {
        let (mut values, mut touched) = (Vec::with_capacity(changes.len() + 2), members::Touched::default());
        for (key, val) in changes {
            let unknown = || Fault::Corrupt("a state key has no name");
            let (kind, state_key) = match event.as_deref().map(|event| &event.parsed) {
                Some(parsed) => (parsed.kind.to_string(), parsed.state_key.clone().unwrap_or_default()),
                None => state::key_name(&self.batch, self.num, *key)?.ok_or_else(unknown)?,
            };
            if members::is_derived(&kind) {
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
            let old = self.state(&kind, &state_key)?;
            if kind == MEMBER {
                self.follow_membership(order, &state_key, old.as_deref(), new.as_deref(), &mut touched)?;
            }
            self.set.insert((kind, state_key), new);
            values.push((*key, *val));
        }
        let derived = touched.values(&mut self.batch, self.num, &mut self.row.next_key, self.row.joined)?;
        values.extend(derived);
        state::apply(&mut self.batch, self.num, order, &values)?;
        if !values.is_empty() {
            self.row.state_tip = order;
        }
        Ok(())
    }

    /// What follows from an event once the room's heads and state are as it leaves them.
    pub(super) fn finish(&mut self, stored: &Stored, redacts: Option<&EventId>) -> Result<()> {
        self.row.tip = stored.order;
        schema::ROOM.put(&mut self.batch, self.num, &self.row);
        if let Some(target) = redacts
            && let Some(target) = event::find_num(&self.batch, self.num, target)?
        {
            let target = event::require(&self.batch, self.num, target)?;
            redact::apply(self, &target, stored.event())?;
        }
        self.added.push(stored.clone());
        Ok(())
    }

    /// Counts, and the rows of the user whose membership changes.
    fn follow_membership(
        &mut self,
        order: Order,
        user: &str,
        old: Option<&StateEvent>,
        new: Option<&StateEvent>,
        touched: &mut members::Touched,
    ) -> Result<(), Fault> {
        let membership = |event: Option<&StateEvent>| {
            event
                .and_then(|event| event::membership_of(event.parsed.content.get()))
                .unwrap_or(Membership::Leave)
        };
        let Some(event) = new.or(old) else { return Ok(()) };
        let (was, now) = (membership(old), membership(new));
        let count = |kind: Membership, count: u32| {
            count.saturating_add(u32::from(now == kind)).saturating_sub(u32::from(was == kind))
        };
        let by = i64::from(now == Membership::Join) - i64::from(was == Membership::Join);
        if by != 0 {
            touched.count(&mut self.batch, self.num, user, by)?;
        }
        self.row.joined = count(Membership::Join, self.row.joined);
        self.row.invited = count(Membership::Invite, self.row.invited);
        let user = members::track(&mut self.batch, self.num, user, now, event.event, order)?;
        let is_near = matches!(now, Membership::Join | Membership::Invite | Membership::Knock);
        self.concerned.extend(user.map(|user| (user, is_near)));
        Ok(())
    }

    /// Gives our users who must hear of this change, rising: those in the room before and after it, and those it is
    /// about. The tip remembers who is in the room, so this reads rows only where the tip is new.
    pub fn list_concerned(&mut self) -> Result<Arc<[UserNum]>, Fault> {
        let known = self.seat.tip.as_ref().and_then(|tip| tip.users.clone());
        let before = match known {
            Some(users) => users,
            // They are read with what this change does to them; who leaves by it is added below.
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
    pub fn enqueue(self, store: &Store) -> Result<Enqueued, NotAccepted> {
        let Self { batch, guard, row, mut seat, set, concerned, users, unread, .. } = self;
        let enqueued = store.enqueue(batch)?;
        drop(guard);
        let tip = seat.tip.get_or_insert_with(|| Tip::of(row.clone()));
        tip.row = row.settle(enqueued.base);
        tip.unread = unread;
        for (key, event) in set {
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

/// One more than the greatest such number of an event's auth events.
pub(super) fn auth_depth(auth: &[Arc<StateEvent>]) -> u64 {
    auth.iter().map(|event| event.auth_depth + 1).max().unwrap_or(0)
}
