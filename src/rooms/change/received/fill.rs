//! Filling holes: events from before that another server gives us, which become part of the room's past.
//!
//! They are judged as any others, by the events that allow them and by the state before them, but not by the room's state of
//! now, and they touch neither that nor the heads. They get orders in the hole, below everything that readers were told, and no
//! positions: no sync tells them and nobody is notified. The log says only that a part of a hole was filled, for readers that want
//! every event of a room, such as the index of search.
//!
//! A fill takes several turns of the room ([`Change::fill`]). First the events are judged, oldest first; state events are kept as
//! outliers meanwhile, so that states can be resolved that hold them. Then the hole is filled from above, one *stretch* after the
//! other, each in parts (`state/hole.rs`). Inside a hole the main line follows the events one by one, wherever they stand
//! in the graph; an event that does not stand on the one before it names the state before it. If the fill ends early, what was
//! filled stays, and the rest is asked for again.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use ruma::OwnedEventId;

use super::{
    super::{Change, header::Entering},
    Outcome, Received, Resolving, Sketch, Taken, found,
};
use crate::{
    error::{Error, Result},
    ids::{EventNum, Order, StateKeyNum},
    rooms::{
        admit::{self, Evidence, Verdict, Why},
        event::{self, StoredEvent},
        graph,
        members::{self, Census},
        relations,
        resolve::{Question, Settled},
        state::{self, Segment, StateRef, StateValue},
        turns::HistoryClaim,
    },
    schema,
    schema::{
        event_types::MEMBER,
        rooms::{EventHeader, EventRow, Membership},
    },
    store::{Fault, LogEntry},
};

/// Judge at most this many events in one turn, so that others wait for their turn no longer than that.
const JUDGED_AT_ONCE: usize = 10;
/// A stretch has at most this many events, which are written in one batch.
const STRETCH_EVENTS_MAX: usize = if cfg!(test) { 3 } else { 50 };
/// An entry of the log about a hole tells of at most this many events, which stand below each other.
pub const FILLED_AT_ONCE_MAX: usize = STRETCH_EVENTS_MAX;
/// A stretch has no further event once it has this many bytes.
const STRETCH_BYTES: usize = 512 << 10;
/// The events of a stretch change at most this many keys in all. A stretch begins anew where one step changes more.
const STRETCH_KEYS_MAX: usize = if cfg!(test) { 8 } else { 500 };
/// The state of an event that is filled in differs in at most this many keys from one that is stored: each event of a fill has one.
const SKETCH_KEYS_MAX: usize = if cfg!(test) { 100 } else { 1_000 };
/// A hole names at most this many missing events, because those who send events choose what they cite.
const MISSING_MAX: usize = 200;

/// An event from before, which is to fill a hole.
#[derive(Clone, Debug)]
pub struct Older {
    /// The event, of which the form, the hash and the signatures were checked.
    pub event: Received,
    /// The state before the event, if some of the events that it cites are missing here and in the fill.
    pub state_before: Option<Before>,
}

/// The state before an event, as it was fetched. All events of it were taken in before.
#[derive(Clone, Debug)]
pub enum Before {
    /// The ids of its events.
    Ids(Vec<OwnedEventId>),
    /// The keys in which it differs from a state that is stored.
    Sketch(Sketch),
}

/// A hole that is being filled.
#[derive(Debug)]
pub struct Backfill {
    _claim: HistoryClaim,
    /// The server that gave the events: it is at fault for what is wrong with them.
    via: String,
    hole: Order,
    /// The state above the hole as it was when the fill began, from which all states are written as differences.
    above: StateRef,
    /// The events that are not judged yet, oldest first.
    waiting: VecDeque<Older>,
    /// The events that were judged and are not written yet, oldest first.
    judged: Vec<Judged>,
    /// The states after the events that were judged.
    after: BTreeMap<OwnedEventId, After>,
    writing: Option<Stretch>,
    has_filled: bool,
}

/// The state after an event of a hole.
#[derive(Clone, Debug)]
struct After {
    state: Arc<Sketch>,
    /// Whether it rests on a state that was fetched: the word of one server, that may be wrong.
    is_fetched: bool,
}

/// An event that was judged.
#[derive(Debug)]
struct Judged {
    event: Received,
    /// The numbers of a state event, which is an outlier until it is written.
    taken: Option<Taken>,
    before: Arc<Sketch>,
    /// The same as `before` where the event changes nothing.
    after: Arc<Sketch>,
    rejected: Option<Why>,
}

/// The events of a hole that are written in one batch, after what differs below them.
#[derive(Debug)]
struct Stretch {
    fill: state::Fill,
    events: Vec<Judged>,
}

/// The progress of a fill after a turn.
#[derive(Debug)]
pub enum Filling {
    /// There is more to do.
    Part,
    /// This question has to be answered first ([`Resolver::work_out`](crate::rooms::resolve::Resolver::work_out)).
    Resolve(Settled),
    /// All events are written.
    All,
}

impl Backfill {
    /// Begins to fill the hole of the room whose lowest event above it has this order, with these events, oldest first.
    pub fn new(claim: HistoryClaim, hole: Order, events: Vec<Older>, via: String) -> Self {
        let above = state::hole_state(hole);
        let (judged, after, waiting) = (Vec::new(), BTreeMap::new(), events.into());
        Self { _claim: claim, via, hole, above, waiting, judged, after, writing: None, has_filled: false }
    }

    /// The order of the lowest event above the hole, as far as that is filled.
    pub fn hole(&self) -> Order {
        self.hole
    }

    /// Whether anything was filled.
    pub fn has_filled(&self) -> bool {
        self.has_filled
    }

    /// Whether the state before an event rests on one that was fetched.
    fn rests_on_fetched(&self, older: &Older) -> bool {
        let cited = &older.event.event().prev;
        let is_fetched = |id| self.after.get(id).is_some_and(|after| after.is_fetched);
        // Nothing is set before the create event, which stands on nothing.
        (older.state_before.is_some() && !cited.is_empty()) || cited.iter().any(is_fetched)
    }

    fn fault(&self, cause: String) -> Error {
        Error::Remote { server: self.via.clone(), cause }
    }
}

impl Change {
    /// Goes on to fill a hole, as far as one turn may. Errors: [`Error::Remote`] if an event comes without what it stands on;
    /// [`Error::Busy`] if too much is kept aside.
    pub fn fill<'r>(
        &mut self,
        backfill: &mut Backfill,
        resolving: impl Into<Resolving<'r>>,
    ) -> Result<Filling> {
        if !schema::HOLE.contains(&self.batch, (self.num, backfill.hole))? {
            // The hole is closed, and events that do not belong into it are left over.
            return if backfill.has_filled {
                Ok(Filling::All)
            } else {
                Err(Error::broken("there is no such hole"))
            };
        }
        let resolving = resolving.into();
        for judged in 0..JUDGED_AT_ONCE {
            let Some(older) = backfill.waiting.pop_front() else {
                if judged > 0 {
                    return Ok(Filling::Part);
                }
                break;
            };
            if let Some(question) = self.judge_older(backfill, &older, resolving)? {
                backfill.waiting.push_front(older);
                return match question.settled() {
                    Ok(settled) => Ok(Filling::Resolve(settled)),
                    Err(_) => Err(Error::broken("a state of a hole names a batch that is being built")),
                };
            }
        }
        if !backfill.waiting.is_empty() {
            return Ok(Filling::Part);
        }
        if backfill.writing.is_none() {
            let events = self.next_stretch(&mut backfill.judged)?;
            // A hole whose events all came another way is closed without any.
            if events.is_empty() && !self.list_missing(backfill.hole, &[])?.is_empty() {
                return Ok(Filling::All);
            }
            backfill.writing = Some(self.plan_stretch(backfill.hole, events)?);
        }
        self.fill_part(backfill)?;
        Ok(Filling::Part)
    }

    /// Judges an event, and keeps it as an outlier meanwhile if it is a state event. Gives the question that has to be answered
    /// before.
    fn judge_older(
        &mut self,
        backfill: &mut Backfill,
        older: &Older,
        resolving: Resolving<'_>,
    ) -> Result<Option<Question>> {
        let event = older.event.event();
        if backfill.after.contains_key(&event.id) {
            // It was listed twice.
            return Ok(None);
        }
        let outlier = match self.find_received(&older.event)? {
            // It has its place already, in the timeline or aside.
            Some((_, None)) => return Ok(None),
            Some((_, outlier)) => outlier,
            None => None,
        };
        let received = &*self.whole(&older.event, outlier.as_ref())?;
        let event = received.event();
        let auth = self.known_auth_events(event)?;
        if let Some(Verdict::Need { auth, .. }) = admit::lacking(event, &auth, &BTreeMap::new()) {
            return Err(backfill.fault(format!("it gave {} without {auth:?}, which allow it", event.id)));
        }
        let before = match self.state_before(backfill, older, resolving)? {
            Ok(before) => self.small(before)?,
            Err(question) => return Ok(Some(question)),
        };
        let taken = match (outlier, &event.state_key) {
            (Some(outlier), _) => {
                Some(Taken { event: outlier.row.header.event, key: outlier.row.header.state_key })
            }
            (None, None) => None,
            (None, Some(_)) => match self.receive_outlier(received)? {
                Outcome::Outlier(num) | Outcome::Known(num) => {
                    let outlier = self.find_outlier(num)?;
                    Some(Taken { event: num, key: outlier.and_then(|outlier| outlier.row.header.state_key) })
                }
                _ => return Err(Error::Busy { retry_after: std::time::Duration::from_secs(60) }),
            },
        };
        let at_before = self.auth_state(event, &before)?;
        let rules = &self.rules().authorization;
        let prev = BTreeMap::new();
        let evidence = Evidence { rules, auth: &auth, prev: &prev, before: &at_before, current: None };
        let is_fetched = backfill.rests_on_fetched(older);
        let is_open = self.is_open_whether(event)?;
        let rejected = match admit::admit(event, &evidence) {
            Verdict::Accept => None,
            Verdict::Reject(why) | Verdict::SoftFail(why)
                if (is_fetched || is_open) && admit::check_at_auth_events(event, rules, &auth).is_ok() =>
            {
                // A server can leave events out of a state, so that nobody is kept out by what one server gave; and what a join left
                // out may allow the event. It stays missing, to be judged by what others give, or later.
                tracing::debug!(room = %self.num, event = %event.id, why, is_open, "an event from before does not fit a state that was fetched, or lacks events");
                backfill.after.insert(event.id.clone(), After { state: before, is_fetched });
                return Ok(None);
            }
            Verdict::Reject(why) | Verdict::SoftFail(why) => Some(why),
            Verdict::Need { .. } | Verdict::Unknown => {
                return Err(backfill.fault(format!("it gave {}, which no server may send", event.id)));
            }
        };
        let after = match taken {
            Some(Taken { event, key: Some(key) }) if rejected.is_none() => {
                Arc::new(before.with([(key, StateValue::Event(event))]))
            }
            _ => Arc::clone(&before),
        };
        backfill.after.insert(event.id.clone(), After { state: Arc::clone(&after), is_fetched });
        backfill.judged.push(Judged { event: received.clone(), taken, before, after, rejected });
        Ok(None)
    }

    /// Gives the same state as a small difference from one that is stored. Each event of a fill has a state, which would
    /// otherwise differ by all members of a large room from the state above the hole.
    fn small(&mut self, state: Arc<Sketch>) -> Result<Arc<Sketch>> {
        if state.changes.len() <= SKETCH_KEYS_MAX {
            return Ok(state);
        }
        let written = self.write_down(&state)?;
        self.put_room();
        Ok(Arc::new(written.into()))
    }

    /// Gives the state before an event from before: the one that was fetched, or what the states after the events that it cites
    /// resolve to.
    fn state_before(
        &mut self,
        backfill: &Backfill,
        older: &Older,
        resolving: Resolving<'_>,
    ) -> Result<Result<Arc<Sketch>, Question>> {
        let event = older.event.event();
        if let (None, [only]) = (&older.state_before, &event.prev[..])
            && let Some(after) = backfill.after.get(only)
        {
            return Ok(Ok(Arc::clone(&after.state)));
        }
        if let Some(Before::Sketch(before)) = &older.state_before {
            return Ok(Ok(Arc::new(before.clone())));
        }
        if let Some(Before::Ids(ids)) = &older.state_before {
            let mut brought = BTreeMap::new();
            for id in ids {
                let Some(num) = self.find_num(id)? else {
                    return Err(backfill.fault(format!("{id} of the state before {} is missing", event.id)));
                };
                // A rejected event has no key, and is no part of any state.
                let stored = event::require_kept(&self.batch, self.num, num)?;
                brought.extend(stored.row.header.state_key.map(|key| (key, num)));
            }
            let differing = state::differing_from(&self.batch, self.num, backfill.above, &brought)?;
            let changes = differing.into_iter().map(|(key, _, val)| (key, val));
            return Ok(Ok(Arc::new(Sketch::from(backfill.above).with(changes))));
        }
        let mut states = Vec::new();
        for id in &event.prev {
            if let Some(after) = backfill.after.get(id) {
                states.push(Sketch::clone(&after.state));
                continue;
            }
            match self.find_num(id)? {
                Some(num) if self.has_place(id)? => states.push(self.state_after(num)?.into()),
                _ => {
                    let why =
                        format!("it gave {} without {id}, on which it stands, and without a state", event.id);
                    return Err(backfill.fault(why));
                }
            }
        }
        if states.is_empty() {
            // Only the create event stands on nothing: nothing is set before it.
            let nothing = state::differing_from(&self.batch, self.num, backfill.above, &BTreeMap::new())?;
            let changes = nothing.into_iter().map(|(key, _, val)| (key, val));
            return Ok(Ok(Arc::new(Sketch::from(backfill.above).with(changes))));
        }
        let cited = Question::new(&self.batch, self.num, states, None)?.of_cited();
        Ok(self.answer(resolving, &cited)?.map(Arc::new).ok_or(cited))
    }

    /// Takes the next stretch off the upper end of the events.
    fn next_stretch(&self, judged: &mut Vec<Judged>) -> Result<Vec<Judged>> {
        let (mut events, mut bytes, mut keys) = (Vec::new(), 0, 0);
        let mut above: Option<Arc<Sketch>> = None;
        while let Some(next) = judged.last() {
            if let (Some(above), None) = (&above, &next.rejected) {
                // The main line turns from the state after this event to that before the one above it.
                keys += next.after.diff(&self.batch, self.num, above)?.len() + 1;
            }
            // Events that came before and refer to this one get their rows with it.
            keys += relations::count_waiting(&self.batch, self.num, &next.event.key(self.num))?;
            bytes += next.event.json().len();
            let is_full =
                events.len() >= STRETCH_EVENTS_MAX || bytes > STRETCH_BYTES || keys > STRETCH_KEYS_MAX;
            if is_full && !events.is_empty() {
                break;
            }
            if next.rejected.is_none() {
                above = Some(Arc::clone(&next.before));
            }
            events.extend(judged.pop());
        }
        events.reverse();
        Ok(events)
    }

    /// Works out what has to be written to fill the hole with these events.
    fn plan_stretch(&mut self, hole: Order, events: Vec<Judged>) -> Result<Stretch> {
        let above = Arc::new(Sketch::from(state::hole_state(hole)));
        let accepted: Vec<&Judged> = events.iter().filter(|judged| judged.rejected.is_none()).collect();
        let bottom = accepted.first().map_or_else(|| Arc::clone(&above), |lowest| Arc::clone(&lowest.before));
        let below = above.diff(&self.batch, self.num, &bottom)?;
        let mut steps = Vec::with_capacity(accepted.len());
        let mut at = bottom;
        for judged in accepted {
            steps.push(at.diff(&self.batch, self.num, &judged.after)?);
            at = Arc::clone(&judged.after);
        }
        let segment = self.with_counts(hole, &below, &steps, self.list_missing(hole, &events)?)?;
        self.put_room();
        let fill = state::Fill::plan(&self.batch, self.num, hole, &segment)?;
        Ok(Stretch { fill, events })
    }

    /// Lists the events that are missing below the hole once these fill it.
    fn list_missing(&self, hole: Order, events: &[Judged]) -> Result<Vec<String>> {
        let row = schema::HOLE.get(&self.batch, (self.num, hole))?;
        let mut wanted = row.unwrap_or_default().missing;
        wanted.extend(events.iter().flat_map(|judged| &judged.event.event().prev).map(ToString::to_string));
        let here: BTreeSet<&str> = events.iter().map(|judged| judged.event.id().as_str()).collect();
        let (mut missing, mut seen) = (Vec::new(), BTreeSet::new());
        for id in wanted {
            if here.contains(id.as_str()) || !seen.insert(id.clone()) {
                continue;
            }
            let Ok(event) = OwnedEventId::try_from(id.as_str()) else { continue };
            let known = self.find_num(&event)?;
            if known
                .map(|known| self.find_outlier(known))
                .transpose()?
                .is_none_or(|outlier| outlier.is_some())
            {
                missing.push(id);
            }
        }
        missing.truncate(MISSING_MAX);
        Ok(missing)
    }

    /// Adds the derived keys to what differs below the events of a hole and to what each of them changes.
    fn with_counts(
        &mut self,
        hole: Order,
        below: &[state::Difference],
        steps: &[Vec<state::Difference>],
        missing: Vec<String>,
    ) -> Result<Segment> {
        let values = |differing: &[state::Difference]| -> Vec<(StateKeyNum, StateValue)> {
            differing.iter().map(|(key, _, val)| (*key, *val)).collect()
        };
        let mut segment = Segment {
            bottom: values(below),
            steps: steps.iter().map(|step| values(step)).collect(),
            missing,
        };
        let mut moves = Vec::with_capacity(steps.len() + 1);
        for differing in [below].into_iter().chain(steps.iter().map(Vec::as_slice)) {
            moves.push(self.member_moves(differing)?);
        }
        let moved = moves.iter().flatten().map(|(user, _)| user.as_str());
        let StateRef::Main(above) = state::hole_state(hole) else { return Ok(segment) };
        let Some(mut census) = Census::at(&self.batch, self.num, above, moved)? else { return Ok(segment) };
        let places = [&mut segment.bottom].into_iter().chain(&mut segment.steps);
        for (place, moves) in places.zip(moves) {
            for (user_id, by) in &moves {
                census.count(user_id, *by);
            }
            let touched = moves.iter().map(|(user, _)| user.as_str());
            place.extend(census.values(&mut self.batch, self.num, &mut self.row.next_key, touched)?);
        }
        Ok(segment)
    }

    /// Lists the users who come (1) or go (-1) where these keys change.
    fn member_moves(&self, differing: &[state::Difference]) -> Result<Vec<(String, i64)>> {
        let names = state::list_key_names(&self.batch, self.num, differing.iter().map(|(key, ..)| *key))?;
        let mut moves = Vec::new();
        for ((_, old, new), name) in differing.iter().zip(names) {
            let Some((event_type, user_id)) = name else { continue };
            if event_type == MEMBER {
                let is_in = |val| self.is_joined_by(val).map(i64::from);
                let by = is_in(*new)? - is_in(*old)?;
                moves.extend((by != 0).then_some((user_id, by)));
            }
        }
        Ok(moves)
    }

    fn is_joined_by(&self, val: StateValue) -> Result<bool, Fault> {
        let Some(event) = val.event() else { return Ok(false) };
        Ok(members::membership_of_event(&self.batch, self.num, event)? == Membership::Join)
    }

    /// Writes the next part of a stretch. The last one makes its events part of the room.
    fn fill_part(&mut self, backfill: &mut Backfill) -> Result<()> {
        let Some(Stretch { fill, events }) = &mut backfill.writing else { return Ok(()) };
        let moved = fill.moved_to()?;
        let Some(orders) = fill.part(&mut self.batch, self.num)? else { return Ok(()) };
        if let Some(top) = orders.iter().max() {
            self.batch.position(&LogEntry::Filled { room: self.num, top: *top });
            // Nobody is told of these events, so nobody is woken.
            self.wakes_only = Some(Vec::new());
        }
        let mut orders = orders.into_iter();
        for mut judged in std::mem::take(events) {
            let order = match judged.rejected {
                Some(_) => None,
                None => Some(orders.next().ok_or(Fault::Corrupt("an event of a hole has no order"))?),
            };
            match self.find_known(&judged.event.key(self.num))? {
                // It came in by another way while the hole was filled, and stands where it did so.
                Some((_, None)) => continue,
                Some((event, Some(_))) if !self.is_here(event, &judged.event)? => {
                    // Another event took its id meanwhile. The hole is filled anew, without it.
                    return Err(Error::Busy { retry_after: std::time::Duration::from_secs(1) });
                }
                Some((event, Some(outlier))) => {
                    judged.taken = Some(Taken { event, key: outlier.row.header.state_key });
                }
                None => {}
            }
            match (&judged.rejected, order) {
                (None, Some(order)) => self.put_older(&judged, order)?,
                (Some(why), _) => self.put_rejected(&judged, why)?,
                (None, None) => {}
            }
        }
        debug_assert!(orders.next().is_none(), "each event has its order");
        self.put_room();
        (backfill.writing, backfill.hole, backfill.has_filled) = (None, moved, true);
        Ok(())
    }

    /// Writes an event at its order in a hole. The states of the hole are written already.
    fn put_older(&mut self, judged: &Judged, order: Order) -> Result<()> {
        let below = state::just_below(&self.batch, self.num, order)?;
        let differing = Sketch::from(below).diff(&self.batch, self.num, &judged.before)?;
        let before = if differing.is_empty() { None } else { Some(self.write_down(&judged.before)?) };
        let left = self.leave_outliers(judged.taken)?;
        let mut header = self.older_header(judged, before)?;
        let redaction = self.judge_redaction(judged.event.event(), before.unwrap_or(below))?;
        header.unseen |= !redaction.is_shown();
        let num = header.event;
        tracing::debug!(room = %self.num, event = %judged.event.id(), "an event from before fills a hole");
        let stored = StoredEvent { order, row: EventRow { header, json: judged.event.json().clone() } };
        self.put(&stored)?;
        self.carry_out(redaction, &stored)?;
        relations::index_waiting(&mut self.batch, self.num, &stored)?;
        self.apply_waiting(&stored)?;
        match left.redacted_by {
            Some(redaction) => self.redact(num, redaction),
            None => Ok(()),
        }
    }

    /// Keeps an event of a hole aside that the rules forbid.
    fn put_rejected(&mut self, judged: &Judged, why: &Why) -> Result<()> {
        if !self.may_be_aside(judged.taken)? {
            let dropped = "the room keeps too many events aside";
            tracing::debug!(room = %self.num, event = %judged.event.id(), why, dropped, "an event is dropped");
            return Ok(());
        }
        let left = self.leave_outliers(judged.taken)?;
        let before = self.write_down(&judged.before)?;
        let mut header = self.older_header(judged, Some(before))?;
        // A state that a join or another server brought may name the event, or an event that it allowed, so that it stays one of its key.
        let mut allowed = graph::list_auth_children(&self.batch, self.num, header.event, EventNum(u64::MAX))?;
        let is_named = left.is_needed || allowed.next().transpose()?.is_some();
        drop(allowed);
        if !is_named && header.state_key.take().is_some() {
            graph::delete_auth_edges(&mut self.batch, self.num, header.event, &header.auth);
        }
        header.replaces = None;
        tracing::debug!(room = %self.num, event = %judged.event.id(), why, "an event from before is kept aside");
        let row = EventRow { header, json: judged.event.json().clone() };
        self.keep_aside(true, why, row, &left)
    }

    fn older_header(&mut self, judged: &Judged, before: Option<StateRef>) -> Result<EventHeader> {
        let event = judged.event.event();
        let mut prev = Vec::new();
        for id in &event.prev {
            prev.extend(self.find_num(id)?);
        }
        let known = self.known_auth_events(event)?;
        let auth: Vec<_> = event.auth.iter().filter_map(|id| found(&known, id)).collect();
        let taken = match judged.taken {
            Some(taken) => taken,
            None => self.take_numbers(&judged.event, judged.rejected.is_some())?,
        };
        let replaces = match taken.key {
            Some(key) => judged.before.at(&self.batch, self.num, key)?.event(),
            None => None,
        };
        let entering = Entering {
            num: taken.event,
            key: judged.event.key(self.num),
            event,
            json: judged.event.json(),
            depth: judged.event.depth(),
            state_key: taken.key,
            replaces,
            before,
            prev,
            auth: &auth,
            sent_by: None,
            let_in: false,
        };
        entering.header().ok_or_else(|| Error::broken("an event that was checked has no fields"))
    }
}
