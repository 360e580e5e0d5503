//! Other servers read a room's history here: single events, the events that they miss, the state before an event, and the
//! events that allowed one (server-server API, "Backfilling and retrieving missing events", "Retrieving events").
//!
//! Only servers that have somebody in the room now are answered, and that its list of servers admits. Who has nobody there any more is
//! still told what was there before, and what stands below an event that removed its users, because it cannot follow otherwise that they
//! were: the ids of a state, and each event of it. Events that servers may not see come redacted, but for those of the room's state of now.

use std::{
    collections::{BTreeSet, BinaryHeap, HashSet, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use ruma::{EventId, OwnedEventId, OwnedServerName, RoomId, ServerName};

use super::whole_state::{Form, Walk, Wanted};
use crate::{
    env::Long,
    error::{Error, Refusal, Result},
    flows::{App, room::look},
    ids::{EventNum, Order, RoomNum},
    json::JsonText,
    rooms::{
        self, acl,
        around::Around,
        change::left_out,
        event::{self, StoredEvent},
        graph, members, redact, state,
        visibility::ServerSight,
    },
    schema::{
        self,
        rooms::{Place, RoomRow},
        state::StateRef,
    },
    store::{Direction, Fault, Read, Snapshot},
};

/// An answer has at most this many events of history.
const EVENTS_MAX: usize = 100;
/// Look at most at this many events for an answer, because those that have expired are not given.
const LOOKED_AT_MAX: usize = 2_000;
/// An answer about missing events has at most this many.
const MISSING_MAX: usize = 20;
/// A question names at most this many events.
const NAMED_MAX: usize = 100;
/// A chain of events that allow one another has at most this many in an answer.
const CHAIN_MAX: usize = 100_000;
/// A chain whose events are given whole has at most this many bytes.
const CHAIN_BYTES_MAX: usize = 32 << 20;
/// Look at most at this many events that an event allowed, to say whether a server may have it.
const ALLOWED_MAX: usize = 100;
/// Read this many events of a state at once.
const READ_AT_ONCE: usize = 500;
/// An answer has at most this many bytes of events, but for the last one.
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// A room, as a server that is in it reads it.
struct Reading {
    snapshot: Arc<Snapshot>,
    num: RoomNum,
    row: RoomRow,
    sight: ServerSight,
    origin: OwnedServerName,
    /// Whether the server has somebody in the room now.
    is_resident: bool,
}

/// An event of a room's graph, with the place where it is kept.
struct Found {
    stored: StoredEvent,
    place: Place,
}

impl Reading {
    /// Opens a room for a server. Errors: 403 `M_FORBIDDEN` for a server that is not in the room, or that the room does not
    /// admit, and for a room that this server is not in, so that nobody learns which rooms there are.
    fn open(app: &App, origin: &ServerName, room: &RoomId) -> Result<Self> {
        let reading = Self::open_past(app, origin, room)?;
        if reading.is_resident { Ok(reading) } else { Err(not_in_room()) }
    }

    /// Opens a room for a server that asks for what stands below some events, which [`Reading::keep_readable`] looks at: it may have nobody
    /// in the room now. Errors: 403 `M_FORBIDDEN` for a server that the room does not admit, and for a room that this server is not in.
    fn open_past(app: &App, origin: &ServerName, room: &RoomId) -> Result<Self> {
        let snapshot = app.store.snapshot();
        let (num, row) = rooms::require_room(&*snapshot, room).map_err(|_| not_in_room())?;
        if !acl::admits(&*snapshot, num, origin)? {
            return Err(not_in_room());
        }
        let is_resident = members::is_server_joined(&*snapshot, num, origin.as_str())?;
        let sight = ServerSight::of_resident(num, origin.as_str());
        Ok(Self { snapshot, num, row, sight, origin: origin.to_owned(), is_resident })
    }

    /// Keeps those of these events below which the server may read: it has somebody in the room now, had at the
    /// time of the event, or had later.
    /// Errors: 403 `M_FORBIDDEN` where it may read below none of them.
    fn keep_readable(&self, found: Vec<Found>) -> Result<Vec<Found>> {
        if self.is_resident {
            return Ok(found);
        }
        let server = self.origin.as_str();
        let left = members::server_left_at(&*self.snapshot, self.num, server)?;
        let mut readable = Vec::new();
        for found in found {
            let Place::Timeline(order) = found.place else { continue };
            let around = || Around::of(&*self.snapshot, self.num, &found.stored);
            if left.is_some_and(|left| order < left)
                || around()?.has_server(&*self.snapshot, self.num, server)?
            {
                readable.push(found);
            }
        }
        if readable.is_empty() { Err(not_in_room()) } else { Ok(readable) }
    }

    /// The event of this id, if the server may read below it. Errors: of [`Reading::keep_readable`]; 404 `M_NOT_FOUND`, for who has
    /// somebody in the room.
    fn require_readable(&self, id: &EventId) -> Result<Found> {
        let found = match self.require(id) {
            Err(_) if !self.is_resident => return Err(not_in_room()),
            found => found?,
        };
        self.keep_readable(vec![found])?.pop().ok_or_else(not_in_room)
    }

    /// Whether the server may have an event by itself: where it has nobody in the room any more, one that it may read below, one of the
    /// state of when it left, and one that allowed such an event. It is told the ids of these, and follows nothing by ids alone.
    fn may_have(&self, found: &Found) -> Result<bool, Fault> {
        if self.is_resident {
            return Ok(true);
        }
        let (read, server) = (&*self.snapshot, self.origin.as_str());
        let left = members::server_left_at(read, self.num, server)?;
        let was_there = |stored: &StoredEvent, place: Place| -> Result<bool, Fault> {
            if let Place::Timeline(order) = place
                && (left.is_some_and(|left| order < left)
                    || Around::of(read, self.num, stored)?.has_server(read, self.num, server)?)
            {
                return Ok(true);
            }
            let (Some(left), Some(key)) = (left, stored.row.header.state_key) else { return Ok(false) };
            let then = state::just_below(read, self.num, left)?;
            Ok(state::at(read, self.num, then, key)?.event() == Some(stored.event()))
        };
        if was_there(&found.stored, found.place)? {
            return Ok(true);
        }
        let last = EventNum(self.row.next_event);
        for allowed in
            graph::list_auth_children(read, self.num, found.stored.event(), last)?.take(ALLOWED_MAX)
        {
            if let Some(allowed) = self.find(allowed?)?
                && was_there(&allowed.stored, allowed.place)?
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn find_num(&self, id: &EventId) -> Result<Option<EventNum>, Fault> {
        let Some(key) = event::parse_event_id(id, self.num, self.row.version) else { return Ok(None) };
        event::find_key(&*self.snapshot, self.num, &key)
    }

    /// The event of this id, if it is part of the room's graph. Errors: 404 `M_NOT_FOUND`.
    fn require(&self, id: &EventId) -> Result<Found> {
        let num = self.find_num(id)?;
        let found = num.map(|num| self.find(num)).transpose()?.flatten();
        found.ok_or_else(|| unknown_event().into())
    }

    /// The event of this number, unless it was rejected: a rejected event is nothing that others need.
    fn find(&self, num: EventNum) -> Result<Option<Found>, Fault> {
        let Some(place) = schema::PLACE.get(&*self.snapshot, (self.num, num))? else { return Ok(None) };
        let stored = match place {
            Place::Timeline(order) => schema::TIMELINE
                .get(&*self.snapshot, (self.num, order))?
                .filter(|row| !row.header.rejected)
                .map(|row| StoredEvent { order, row }),
            Place::Aside | Place::Outlier => schema::ASIDE
                .get(&*self.snapshot, (self.num, num))?
                .filter(|aside| !aside.rejected)
                .map(|aside| StoredEvent { order: Order::MIN, row: aside.row }),
        };
        Ok(stored.map(|stored| Found { stored, place }))
    }

    /// Lists the events that an event cites as those before it, as far as this server has them by now.
    fn list_prev(&self, stored: &StoredEvent) -> Result<Vec<EventNum>, Fault> {
        let cited = event::list_cited(&stored.row);
        if cited.len() <= stored.row.header.prev.len() {
            return Ok(stored.row.header.prev.clone());
        }
        // Some came later than the event, when a hole below it was filled.
        cited.iter().filter_map(|id| self.find_num(id).transpose()).collect()
    }

    fn id(&self, stored: &StoredEvent) -> OwnedEventId {
        event::event_id(&stored.row.header.key, self.row.version)
    }

    /// Whether an event is in the state of the room as it is now, which whoever has somebody there knows whole, whichever event they joined
    /// on. The rest of a state event, as it would be after a redaction, would be taken for it: a list of servers then admits nobody.
    fn is_in_force(&self, stored: &StoredEvent) -> Result<bool, Fault> {
        let Some(key) = stored.row.header.state_key.filter(|_| self.is_resident) else { return Ok(false) };
        Ok(state::current(&*self.snapshot, self.num, key)? == Some(stored.event()))
    }

    /// The event as the server may see it.
    fn shown(&mut self, found: &Found) -> Result<JsonText> {
        let stored = &found.stored;
        let is_whole = match found.place {
            // The state before an outlier is not known, so that nobody can say who may see it. But whoever must judge an event
            // needs the whole of the state events that allow it.
            Place::Outlier => stored.row.header.state_key.is_some(),
            Place::Timeline(_) | Place::Aside => {
                self.is_in_force(stored)? || self.sight.sees(&*self.snapshot, stored)?
            }
        };
        if is_whole {
            return Ok(JsonText::stored(&stored.row.json));
        }
        let redacted = redact::redacted(&stored.row.json, rooms::rules(&self.row)?);
        let redacted = redacted.ok_or(Fault::Corrupt("an event has no fields"))?;
        Ok(JsonText::stored(&redacted))
    }

    /// Goes through these events, those that allow them, and so on down to the create event, each once, and keeps of each what
    /// `keep` makes of it.
    fn chain<T>(
        &self,
        of: impl IntoIterator<Item = EventNum>,
        mut keep: impl FnMut(&StoredEvent) -> Result<T>,
    ) -> Result<Vec<T>> {
        let mut waiting: Vec<EventNum> = of.into_iter().collect();
        let (mut seen, mut chain) = (HashSet::new(), Vec::new());
        while let Some(num) = waiting.pop() {
            if !seen.insert(num) {
                continue;
            }
            if chain.len() >= CHAIN_MAX {
                return Err(
                    Refusal::too_large("The chain of events that allow the event is too long.").into()
                );
            }
            let stored = event::find_anywhere(&*self.snapshot, self.num, num)?;
            let stored = stored.ok_or(Fault::Corrupt("an event is missing"))?;
            waiting.extend(&stored.row.header.auth);
            chain.push(keep(&stored)?);
        }
        Ok(chain)
    }

    /// The state before an event. Errors: 404 `M_NOT_FOUND` for an event without a place in the room's graph; 403 `M_FORBIDDEN`
    /// while only a part of the room's state is known, so that another server is asked.
    fn state_before(&self, found: &Found) -> Result<StateRef> {
        if !self.row.resident.has_whole_state() {
            return Err(
                Refusal::forbidden("This server does not know the whole state of the room yet.").into()
            );
        }
        state_before(&self.snapshot, self.num, &found.stored)?.ok_or_else(|| unknown_event().into())
    }
}

/// The state before an event; `None` for an event without a place in the room's graph.
pub(super) fn state_before(
    snapshot: &Snapshot,
    room: RoomNum,
    stored: &StoredEvent,
) -> Result<Option<StateRef>, Fault> {
    match (stored.row.header.before, schema::PLACE.get(snapshot, (room, stored.event()))?) {
        (_, None | Some(Place::Outlier)) | (None, Some(Place::Aside)) => Ok(None),
        (Some(before), Some(_)) => Ok(Some(before)),
        (None, Some(Place::Timeline(order))) => state::just_below(snapshot, room, order).map(Some),
    }
}

fn not_in_room() -> Error {
    Refusal::forbidden("Your server is not in this room.").into()
}

fn unknown_event() -> Refusal {
    Refusal::not_found("This server has no such event in the room.")
}

/// Gives one event, whichever room it is in. Errors: 404 `M_NOT_FOUND`, also for an event that the server may not ask for.
pub(crate) async fn one(app: &App, origin: &ServerName, id: OwnedEventId) -> Result<JsonText> {
    let (app, origin) = (app.clone(), origin.to_owned());
    let env = app.env.clone();
    env.blocking(move || {
        let unknown = || Error::from(Refusal::not_found("This server has no such event."));
        let snapshot = app.store.snapshot();
        // An id says nothing of its room. Where servers choose ids, several rooms may have an event of it.
        for (num, _) in event::list_anywhere_by_id(&*snapshot, &id)? {
            let room = rooms::require_row(&*snapshot, num)?;
            let Ok(mut reading) = Reading::open_past(&app, &origin, &room.id) else { continue };
            let Ok(found) = reading.require(&id) else { continue };
            if found.stored.row.header.expired || !reading.may_have(&found)? {
                continue;
            }
            return reading.shown(&found);
        }
        Err(unknown())
    })
    .await
}

/// Gives the history before some events, them included: the newest first, at most `limit` events.
pub(crate) async fn before(
    app: &App,
    origin: &ServerName,
    room: &RoomId,
    from: Vec<OwnedEventId>,
    limit: u64,
) -> Result<Vec<JsonText>> {
    if from.is_empty() || from.len() > NAMED_MAX {
        return Err(Refusal::invalid_param("`v` must name 1 to 100 events.").into());
    }
    let limit = usize::try_from(limit).unwrap_or(EVENTS_MAX).min(EVENTS_MAX);
    let (app, origin, room) = (app.clone(), origin.to_owned(), room.to_owned());
    let env = app.env.clone();
    env.blocking(move || {
        let mut reading = Reading::open_past(&app, &origin, &room)?;
        let mut named = Vec::new();
        for id in &from {
            if let Some(num) = reading.find_num(id)? {
                named.extend(reading.find(num)?);
            }
        }
        let named = reading.keep_readable(named)?.into_iter();
        let mut waiting: BinaryHeap<_> =
            named.map(|Found { stored, .. }| (stored.row.header.depth, stored.event())).collect();
        let (mut seen, mut shown, mut bytes) = (HashSet::new(), Vec::new(), 0);
        while let Some((_, num)) = waiting.pop() {
            if shown.len() >= limit || seen.len() >= LOOKED_AT_MAX || bytes > ANSWER_BYTES_MAX {
                break;
            }
            if !seen.insert(num) {
                continue;
            }
            let Some(found) = reading.find(num)? else { continue };
            for prev in reading.list_prev(&found.stored)? {
                if let Some(prev_found) = reading.find(prev)? {
                    waiting.push((prev_found.stored.row.header.depth, prev));
                }
            }
            // Other servers may still have the content of what is over here.
            if found.stored.row.header.expired {
                continue;
            }
            let json = reading.shown(&found)?;
            bytes += json.as_str().len();
            shown.push(json);
        }
        Ok(shown)
    })
    .await
}

/// A question for the events between those that a server has and those that it got.
pub(crate) struct Missing {
    pub(crate) earliest: Vec<OwnedEventId>,
    pub(crate) latest: Vec<OwnedEventId>,
    pub(crate) min_depth: u64,
    pub(crate) limit: u64,
}

/// Gives events that lie between some that the server has and some that it got: the oldest first.
pub(crate) async fn missing(
    app: &App,
    origin: &ServerName,
    room: &RoomId,
    wanted: Missing,
) -> Result<Vec<JsonText>> {
    if wanted.earliest.len() > NAMED_MAX || wanted.latest.len() > NAMED_MAX {
        return Err(Refusal::invalid_param(
            "`earliest_events` and `latest_events` name at most 100 events each.",
        )
        .into());
    }
    let limit = usize::try_from(wanted.limit).unwrap_or(MISSING_MAX).min(MISSING_MAX);
    let (app, origin, room) = (app.clone(), origin.to_owned(), room.to_owned());
    let env = app.env.clone();
    env.blocking(move || {
        let mut reading = Reading::open_past(&app, &origin, &room)?;
        let list = |ids: &[OwnedEventId]| -> Result<BTreeSet<EventNum>, Fault> {
            ids.iter().filter_map(|id| reading.find_num(id).transpose()).collect()
        };
        let mut known = list(&wanted.earliest)?;
        let latest = list(&wanted.latest)?;
        known.extend(&latest);
        let mut named = Vec::new();
        for num in latest {
            named.extend(reading.find(num)?);
        }
        let mut waiting: VecDeque<Vec<EventNum>> = VecDeque::new();
        for found in reading.keep_readable(named)? {
            waiting.push_back(reading.list_prev(&found.stored)?);
        }
        let mut found = Vec::new();
        // Level by level, so that what is nearest to the events that the server got comes along.
        while let Some(cited) = waiting.pop_front() {
            for num in cited {
                if found.len() >= limit || !known.insert(num) {
                    continue;
                }
                let Some(prev) = reading.find(num)? else { continue };
                if prev.stored.row.header.depth >= wanted.min_depth {
                    waiting.push_back(reading.list_prev(&prev.stored)?);
                    found.push(prev);
                }
            }
        }
        found.sort_by_key(|found| (found.stored.row.header.depth, found.stored.event()));
        let given = found.iter().filter(|found| !found.stored.row.header.expired);
        given.map(|found| reading.shown(found)).collect()
    })
    .await
}

/// Finds the event nearest to a time that the server may see, and when it was sent. Errors: 404 `M_NOT_FOUND` if there is none.
pub(crate) async fn at_time(
    app: &App,
    origin: &ServerName,
    room: &RoomId,
    time_ms: u64,
    direction: Direction,
) -> Result<(OwnedEventId, u64)> {
    let (app, origin, room) = (app.clone(), origin.to_owned(), room.to_owned());
    let env = app.env.clone();
    env.blocking(move || {
        let Reading { snapshot, num, row, mut sight, .. } = Reading::open(&app, &origin, &room)?;
        let newest = row.tip.min(Order::upto(snapshot.upto()));
        let sees = |stored: &StoredEvent| sight.sees(&*snapshot, stored);
        let found = look::nearest(&snapshot, num, newest, time_ms, direction, sees)?;
        let found = found.ok_or_else(look::nothing_near)?;
        Ok((found.id(&row), found.row.header.sent_ms))
    })
    .await
}

/// The ids of a state, and of the events that allowed it.
pub(crate) struct StateIds {
    pub(crate) state: Vec<OwnedEventId>,
    pub(crate) auth_chain: Vec<OwnedEventId>,
}

/// Gives the ids of the state before an event.
pub(crate) async fn state_ids(
    app: &App,
    origin: &ServerName,
    room: &RoomId,
    id: OwnedEventId,
) -> Result<StateIds> {
    let (app, origin, room) = (app.clone(), origin.to_owned(), room.to_owned());
    let env = app.env.clone();
    env.blocking_long(Long::History, move || {
        let reading = Reading::open_past(&app, &origin, &room)?;
        let found = reading.require_readable(&id)?;
        left_out::require_whole(&*reading.snapshot, reading.num)?;
        let before = reading.state_before(&found)?;
        let events = state::full(&*reading.snapshot, reading.num, before)?;
        let events: Vec<EventNum> =
            events.map(|row| row.map(|(_, event)| event)).collect::<Result<_, _>>()?;
        let (mut state, mut auth) = (Vec::with_capacity(events.len()), BTreeSet::new());
        // Only the ids of the events are kept, so that a large state is not held in memory.
        for some in events.chunks(READ_AT_ONCE) {
            for stored in event::list_anywhere(&*reading.snapshot, reading.num, some.to_vec())? {
                auth.extend(stored.row.header.auth.iter().copied());
                state.push(reading.id(&stored));
            }
        }
        let auth_chain = reading.chain(auth, |stored| Ok(reading.id(stored)))?;
        Ok(StateIds { state, auth_chain })
    })
    .await
}

/// Gives the state before an event and the events that allowed it, in pieces.
pub(crate) async fn state(
    app: &App,
    origin: &ServerName,
    room: &RoomId,
    id: OwnedEventId,
) -> Result<(Bytes, Option<Walk>)> {
    let (app, origin, room) = (app.clone(), origin.to_owned(), room.to_owned());
    let env = app.env.clone();
    env.blocking(move || {
        let reading = Reading::open_past(&app, &origin, &room)?;
        let found = reading.require_readable(&id)?;
        left_out::require_whole(&*reading.snapshot, reading.num)?;
        let at = reading.state_before(&found)?;
        let wanted = Wanted {
            to: &origin,
            at,
            name: "pdus",
            with: &[],
            without_members_for: None,
            event: None,
            form: Form::Object,
        };
        let Reading { snapshot, num, row, .. } = &reading;
        Walk::begin(&app, snapshot, *num, row, &wanted)?.piece(snapshot)
    })
    .await
}

/// Gives the events that allow an event, and those that allow them.
pub(crate) async fn auth_chain(
    app: &App,
    origin: &ServerName,
    room: &RoomId,
    id: OwnedEventId,
) -> Result<Vec<JsonText>> {
    let (app, origin, room) = (app.clone(), origin.to_owned(), room.to_owned());
    let env = app.env.clone();
    env.blocking_long(Long::History, move || {
        let reading = Reading::open_past(&app, &origin, &room)?;
        let found = reading.require_readable(&id)?;
        let mut bytes = 0;
        // State is never redacted here: whoever must judge an event needs the whole of what allows it.
        reading.chain(found.stored.row.header.auth.iter().copied(), |stored| {
            bytes += stored.row.json.len();
            if bytes > CHAIN_BYTES_MAX {
                return Err(
                    Refusal::too_large("The chain of events that allow the event is too long.").into()
                );
            }
            Ok(JsonText::stored(&stored.row.json))
        })
    })
    .await
}
