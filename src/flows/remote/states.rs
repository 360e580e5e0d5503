//! Fetches the state before an event that stands on events which we do not have (server-server API, "Retrieving events").
//!
//! A server gives the ids of the state; what we do not have of it is fetched and taken in as outliers, each judged by the events that
//! allow it, so that a rejected event is no part of the state, whatever the server says. The state is then written as a difference
//! from a state that is stored.
//!
//! Servers give no state before events that have no place in their graphs, though they may have the event before: what is missing
//! before an event that cites one missing event is then the state before that one, with that one itself.

use std::collections::{BTreeMap, BTreeSet};

use federation::{
    call::{Lane, Options},
    json::Counted,
};
use ruma::{EventId, OwnedEventId, ServerName};
use serde_json::value::RawValue;
use std::time::Duration;

use super::{
    brought,
    fetch::{Fetch, Ids, in_order},
    verify::Ask,
};
use crate::{
    error::{Error, Result},
    flows::{
        places::Place,
        room::ingest::outliers::{For, take_outliers},
    },
    ids::{EventNum, RoomNum, StateKeyNum},
    rooms::{
        change::{Outcome, Received, Signed, order_by_auth},
        event::{self, Event},
        state::{self, Sketch, StateRef},
    },
    schema::{self, event_types::CREATE, rooms::Membership},
    store::{Fault, Snapshot},
};

/// A state has at most this many events, and they are allowed by at most as many.
const STATE_MAX: usize = 100_000;
/// In an answer with the ids of a state, each has at most about this many bytes.
const ID_BYTES: usize = 100;
/// The server has this long to gather the ids of a state.
const IDS_TAKE_MAX: Duration = Duration::from_secs(60);
/// Up to this many events that are missing are asked for one by one.
const SINGLE_MAX: usize = 50;
/// More are asked for one by one where they are less than this part of the state.
const SINGLE_PART: usize = 20;
/// In any case no more than this many.
const SINGLE_AT_MOST: usize = 500;
/// A state may lack this part of its events, and one in any case: those of servers that are gone, and whose keys nobody has.
const LACKING_PART: usize = 10;
/// Events of a whole state are taken in so many at a time.
const TAKEN_AT_ONCE: usize = 200;
/// A server that did not give a state within this time is not asked for another one at once.
const SILENT_AFTER: Duration = Duration::from_secs(30);
/// Ask at most this many servers for a state.
const SERVERS_MAX: usize = 3;
/// A state that came is given up when nobody works on it within this time; it is fetched again later.
const PLACE_WAITS_MAX: Duration = Duration::from_secs(120);

/// Fetches the state before an event, as a difference from a state that is stored. The caller keeps the room from being swept meanwhile.
/// Errors: [`Error::Remote`] if no server gave a state that can be used.
pub(crate) async fn before(fetch: &mut Fetch<'_>, event: &Received, base: StateRef) -> Result<Sketch> {
    if let Some(sketch) = before_second(fetch, event.event(), base).await? {
        return Ok(sketch);
    }
    let missing = fetch.list_without_place(event.event().prev.clone()).await?;
    let mut asked = vec![At::Before(event.id())];
    if let [missing] = &*missing {
        asked.push(At::After(missing));
    }
    let (mut failed, mut silent) = (None, BTreeSet::new());
    for at in asked {
        let mut fullest = Fullest::default();
        for server in fetch.servers.clone().into_iter().take(SERVERS_MAX) {
            if silent.contains(&server) {
                continue;
            }
            let began = fetch.app.env.uptime();
            // The future that fetches a state is large, and lies in the heap, so that whoever waits for it stays small on the stack.
            match Box::pin(from(fetch, &server, at, base, &mut fullest)).await {
                Ok(sketch) => return Ok(sketch),
                Err(error @ Error::Remote { .. }) => {
                    tracing::debug!(room = %fetch.num, %server, %error, "a state could not be fetched from a server");
                    failed = Some(error);
                    if fetch.app.env.uptime().saturating_sub(began) >= SILENT_AFTER {
                        silent.insert(server);
                    }
                }
                Err(other) => return Err(other),
            }
        }
    }
    Err(failed.unwrap_or_else(|| Error::Busy { retry_after: Duration::from_secs(60) }))
}

/// The state before an event that stands on nothing but the create event of its room, which is here: no server need be asked. `None` for
/// any other event.
async fn before_second(fetch: &Fetch<'_>, event: &Event, base: StateRef) -> Result<Option<Sketch>> {
    let [create] = &*event.prev else { return Ok(None) };
    let (app, num, row, create) = (fetch.app.clone(), fetch.num, fetch.row.clone(), create.clone());
    let look = move || {
        let snapshot = app.store.snapshot();
        let Some(key) = state::find_key(&*snapshot, num, CREATE, "")? else { return Ok(None) };
        let Some(known) = state::current(&*snapshot, num, key)? else { return Ok(None) };
        if event::require_kept(&*snapshot, num, known)?.id(&row) != create {
            return Ok(None);
        }
        let base = state::canonical(&*snapshot, num, base)?;
        let brought = BTreeMap::from([(key, known)]);
        let differing = state::differing_from(&*snapshot, num, base, &brought)?;
        let changes = differing.into_iter().map(|(key, _, val)| (key, val));
        Ok(Some(Sketch::from(base).with(changes)))
    };
    fetch.app.env.blocking(look).await
}

/// The number of events that a state has which a server gave, but for some of them that may come at the next try. In the same round another server
/// is only believed that leaves out none of so many: whoever makes up a state mostly leaves something out.
#[derive(Debug, Default)]
pub(super) struct Fullest(usize);

impl Fullest {
    /// Notes a state of so many events, of which some did not come.
    pub(super) fn note(&mut self, count: usize, lacking: usize) {
        self.0 = self.0.max(count.saturating_sub(lacking));
    }

    /// Whether a state of so many events leaves out none of those.
    pub(super) fn is_within(&self, count: usize) -> bool {
        count >= self.0
    }
}

/// A place in a room's graph.
#[derive(Clone, Copy)]
enum At<'a> {
    Before(&'a EventId),
    After(&'a OwnedEventId),
}

/// Asks a server for the ids of the state before an event, at most this many, and as many of events that allow those. Errors:
/// [`Error::Remote`] if it gave none, or more.
pub(super) async fn ids(fetch: &mut Fetch<'_>, server: &ServerName, id: &EventId, max: usize) -> Result<Ids> {
    let mut options = Options {
        begins: IDS_TAKE_MAX,
        overall: IDS_TAKE_MAX * 2,
        lane: Lane::Fetches,
        ..Options::default()
    };
    options.limits.bytes_max = ID_BYTES * 2 * max;
    let ids = fetch.state_ids(server, id, options).await?;
    if ids.state.len() > max || ids.auth_chain.len() > max {
        let cause = format!("it gave a state of more than {max} events");
        return Err(Error::Remote { server: server.to_string(), cause });
    }
    Ok(ids)
}

/// The events of a state that are not here.
pub(super) enum Missing {
    /// They are few, and asked for one by one.
    Few(Vec<OwnedEventId>),
    /// They are many, and came with the whole state, which counts in memory until it is worked on.
    Many(Vec<Box<RawValue>>, BTreeSet<OwnedEventId>, Counted),
}

/// Finds those events of a state that are not here; where they are many, the whole state is fetched.
pub(super) async fn missing(
    fetch: &mut Fetch<'_>,
    server: &ServerName,
    id: &EventId,
    ids: &Ids,
) -> Result<Missing> {
    let missing_state = fetch.list_unknown(ids.state.clone()).await?;
    if missing_state.is_empty() {
        return Ok(Missing::Few(Vec::new()));
    }
    let mut missing: BTreeSet<OwnedEventId> = missing_state.into_iter().collect();
    missing.extend(fetch.list_unknown(ids.auth_chain.clone()).await?);
    let is_few =
        missing.len() <= SINGLE_MAX || missing.len() <= SINGLE_AT_MOST.min(ids.state.len() / SINGLE_PART);
    if is_few {
        return Ok(Missing::Few(missing.into_iter().collect()));
    }
    let (raw, counted) = fetch.state(server, id).await?;
    // Those who work on it wait for no server whose keys are not known yet.
    let raw = brought::learn_keys_of_state(fetch.app, fetch.row.version, raw).await?;
    Ok(Missing::Many(raw, missing, counted))
}

/// Takes in the events of a state that were not here. Those that nobody gives are left out. What is still to be fetched comes before
/// anything is worked on, which is done in one of a bounded number of places where the state has many events: so what came counts
/// no more as an answer then. Gives the place. Errors: [`Error::Busy`] where there is none for long.
pub(super) async fn bring(fetch: &mut Fetch<'_>, missing: Missing, count: usize) -> Result<Option<Place>> {
    match missing {
        Missing::Few(ids) => {
            if !ids.is_empty() {
                bring_single(fetch, ids).await?;
            }
            place(fetch, count).await
        }
        Missing::Many(raw, missing, counted) => {
            let place = place(fetch, count.max(raw.len())).await?;
            drop(counted);
            bring_whole(fetch, raw, &missing).await?;
            Ok(place)
        }
    }
}

/// Waits for a place for working on a state of so many events.
async fn place(fetch: &Fetch<'_>, count: usize) -> Result<Option<Place>> {
    let app = fetch.app;
    tokio::select! {
        biased;
        place = fetch.payers.during(app.completing.place(count)) => Ok(place),
        () = app.env.sleep(PLACE_WAITS_MAX) => Err(Error::Busy { retry_after: PLACE_WAITS_MAX }),
    }
}

/// Fetches these events if they are not here, and takes them in.
pub(super) async fn bring_missing(fetch: &mut Fetch<'_>, ids: Vec<OwnedEventId>) -> Result<()> {
    let missing = fetch.list_unknown(ids).await?;
    if missing.is_empty() { Ok(()) } else { bring_single(fetch, missing).await }
}

/// Whether a state of so many events lacks too many of them to be used.
pub(super) fn lacks_much(lacking: usize, count: usize) -> bool {
    lacking > (count / LACKING_PART).max(1)
}

async fn from(
    fetch: &mut Fetch<'_>,
    server: &ServerName,
    at: At<'_>,
    base: StateRef,
    fullest: &mut Fullest,
) -> Result<Sketch> {
    let fault = |cause: &str| Error::Remote { server: server.to_string(), cause: cause.to_owned() };
    let id = match at {
        At::Before(id) => id,
        At::After(id) => id,
    };
    let ids = ids(fetch, server, id, STATE_MAX).await?;
    let missing = missing(fetch, server, id, &ids).await?;
    let _place = bring(fetch, missing, ids.state.len()).await?;
    let mut ids = ids.state;
    let last = match at {
        At::Before(_) => None,
        At::After(id) => Some(id.clone()),
    };
    if let Some(last) = &last {
        bring_missing(fetch, vec![last.clone()]).await?;
        if !fetch.list_unknown(vec![last.clone()]).await?.is_empty() {
            return Err(fault("it did not give the event whose state it gave"));
        }
        ids.push(last.clone());
    }
    let count = ids.len();
    if !fullest.is_within(count) {
        return Err(fault("it gave a state of fewer events than another server"));
    }
    let (app, num, row) = (fetch.app.clone(), fetch.num, fetch.row.clone());
    let sketch = fetch.app.env.blocking(move || {
        let snapshot = app.store.snapshot();
        let base = state::canonical(&*snapshot, num, base)?;
        let Named { brought, lacking, is_state, .. } =
            Named::read(&snapshot, (num, row.version), &ids, last.as_ref())?;
        let lacking = lacking.len();
        let create = state::find_key(&*snapshot, num, CREATE, "")?;
        let create =
            create.map(|key| Ok::<_, Error>((key, state::current(&*snapshot, num, key)?))).transpose()?;
        let is_of_room = create.is_some_and(|(key, event)| brought.get(&key) == event.as_ref());
        if !is_of_room || !is_state || lacks_much(lacking, ids.len()) {
            return Ok(Came::Wrong);
        }
        if lacking > 0 && !app.gaps.may_lack(num, app.env.uptime()) {
            tracing::debug!(room = %num, lacking, "a state that was fetched lacks events, which may come at the next try");
            return Ok(Came::Lacks(lacking));
        }
        if lacking == 0 {
            app.gaps.lacks_nothing(num);
        } else {
            tracing::debug!(room = %num, lacking, "a state that was fetched lacks events that nobody gave");
        }
        let differing = state::differing_from(&*snapshot, num, base, &brought)?;
        let changes = differing.into_iter().map(|(key, _, val)| (key, val));
        Ok(Came::Whole(Sketch::from(base).with(changes)))
    });
    match sketch.await? {
        Came::Whole(sketch) => Ok(sketch),
        Came::Lacks(lacking) => {
            fullest.note(count, lacking);
            Err(fault("it gave a state of which some events did not come, which may at the next try"))
        }
        Came::Wrong => Err(fault("it gave no state of the room, or one whose events cannot be had")),
    }
}

/// A state that a server gave.
enum Came {
    /// It is used, whether or not it has all events.
    Whole(Sketch),
    /// It lacks this many events, which may come at the next try.
    Lacks(usize),
    /// It is not of the room, or lacks too much.
    Wrong,
}

/// An event of a state, as it is kept here.
pub(super) struct Found {
    /// The number of its key; none for an event that is no state.
    key: Option<StateKeyNum>,
    num: EventNum,
    is_join: bool,
    is_rejected: bool,
}

impl Found {
    /// The number of its key, where it is in force.
    pub(super) fn key(&self) -> Option<StateKeyNum> {
        self.key.filter(|_| !self.is_rejected)
    }
}

/// Finds an event of a state; `None` for an event that is not here.
pub(super) fn find(
    read: &Snapshot,
    (room, version): (RoomNum, u8),
    id: &EventId,
) -> Result<Option<Found>, Fault> {
    let Some(key) = event::parse_event_id(id, room, version) else { return Ok(None) };
    let Some(num) = event::find_key(read, room, &key)? else { return Ok(None) };
    let kept = event::require_kept(read, room, num)?;
    let is_join = kept.membership() == Some(Membership::Join);
    let is_rejected = is_rejected(read, room, num)?;
    Ok(Some(Found { key: kept.row.header.state_key, num, is_join, is_rejected }))
}

/// A state as a server names it, as far as its events are here.
pub(super) struct Named {
    /// The events by their keys. A rejected event is no part of any state.
    pub(super) brought: BTreeMap<StateKeyNum, EventNum>,
    /// The ids of the events that are not here.
    pub(super) lacking: BTreeSet<OwnedEventId>,
    /// The keys of users who are joined.
    pub(super) joined: BTreeSet<StateKeyNum>,
    /// Whether it can be a state: all its events are state, and no two have one key.
    pub(super) is_state: bool,
}

impl Named {
    /// Reads a state. It was followed by the event `last`, if there is one, which takes the place of one that the state has.
    pub(super) fn read(
        read: &Snapshot,
        (room, version): (RoomNum, u8),
        ids: &[OwnedEventId],
        last: Option<&OwnedEventId>,
    ) -> Result<Self, Fault> {
        let (mut brought, mut joined) = (BTreeMap::new(), BTreeSet::new());
        let (mut lacking, mut is_state, mut latest) = (BTreeSet::new(), true, None);
        for id in ids {
            let Some(found) = find(read, (room, version), id)? else {
                lacking.insert(id.clone());
                continue;
            };
            if Some(id) == last {
                latest = Some(found);
                continue;
            }
            let Some(key) = found.key else {
                is_state = false;
                continue;
            };
            if found.is_rejected {
                continue;
            }
            is_state &= brought.insert(key, found.num).is_none_or(|other| other == found.num);
            joined.extend(Some(key).filter(|_| found.is_join));
        }
        if let Some(Found { key: Some(key), num, is_join, is_rejected: false }) = latest {
            brought.insert(key, num);
            joined.remove(&key);
            joined.extend(Some(key).filter(|_| is_join));
        }
        Ok(Self { brought, lacking, joined, is_state })
    }
}

/// Whether an event that is here was rejected.
pub(super) fn is_rejected(read: &Snapshot, room: RoomNum, event: EventNum) -> Result<bool, Fault> {
    Ok(schema::ASIDE.get(read, (room, event))?.is_some_and(|aside| aside.rejected))
}

/// Fetches these events one by one, and takes them in. Those that allow them are among them, or known.
async fn bring_single(fetch: &mut Fetch<'_>, ids: Vec<OwnedEventId>) -> Result<()> {
    let found = in_order(fetch.single(&ids).await?, |event| &event.event().auth);
    for outcome in
        take_outliers(fetch.app, fetch.num, found.clone(), For::State).await?.into_iter().zip(&found)
    {
        // A server need not name the whole chain of those that allow an event.
        if let (Outcome::Need { auth, .. }, event) = outcome {
            fetch.bring_auth(event.id(), auth).await?;
            let taken = take_outliers(fetch.app, fetch.num, vec![event.clone()], For::State).await?;
            note_open(fetch, &taken, std::slice::from_ref(event));
        }
    }
    Ok(())
}

/// Takes in those events of a whole state that are missing. Of a large state only the ids are held, beside the bytes that came.
async fn bring_whole(
    fetch: &mut Fetch<'_>,
    raw: Vec<Box<RawValue>>,
    missing: &BTreeSet<OwnedEventId>,
) -> Result<()> {
    let (num, row, missing) = (fetch.num, fetch.row.clone(), missing.clone());
    let sort = move || {
        let (mut named, mut kept, mut seen) = (Vec::new(), Vec::new(), BTreeSet::new());
        for raw in raw {
            let Ok(signed) = Signed::read(num, &row, raw.get().as_bytes()) else { continue };
            let event = signed.unverified();
            if missing.contains(&event.id) && seen.insert(event.id.clone()) {
                named.push((event.id.clone(), event.auth.clone()));
                kept.push(Some(raw));
            }
        }
        let order = order_by_auth(&named).into_iter();
        Ok(order.filter_map(|place| kept.get_mut(place).and_then(Option::take)).collect::<Vec<_>>())
    };
    let mut waiting = fetch.app.env.blocking(sort).await?.into_iter();
    loop {
        let some: Vec<Box<RawValue>> = waiting.by_ref().take(TAKEN_AT_ONCE).collect();
        if some.is_empty() {
            return Ok(());
        }
        let received = fetch.check_by(some, Ask::Nobody).await?;
        let received = in_order(received, |event| &event.event().auth);
        let taken = take_outliers(fetch.app, fetch.num, received.clone(), For::State).await?;
        note_open(fetch, &taken, &received);
    }
}

/// Notes those of these events that could not be taken in, because events that allow them are missing.
fn note_open(fetch: &mut Fetch<'_>, outcomes: &[Outcome], events: &[Received]) {
    for (outcome, event) in outcomes.iter().zip(events) {
        if matches!(outcome, Outcome::Need { .. }) {
            fetch.unbelieved.note_later(event.id().to_owned(), event.json());
        }
    }
}
