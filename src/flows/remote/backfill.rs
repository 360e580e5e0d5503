//! Fills the holes in the past of rooms with events that other servers have (server-server API, "Backfilling and retrieving missing
//! events"). A hole is filled from above, some events at a time, when somebody reads that far.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use ruma::{OwnedEventId, OwnedServerName};
use serde_json::value::RawValue;
use tokio::sync::watch;

use super::{
    candidates::server_of,
    fetch::{Budget, Fetch, in_order},
    gaps::{claim_history, keep_unswept},
    states,
};
use crate::{
    env::payer,
    error::{Error, Result},
    flows::{
        App,
        lanes::{NoPlace, Pace},
        room::ingest,
    },
    ids::{Order, RoomNum},
    rooms::{
        self,
        change::{Backfill, Before, Older, Received},
        members, state,
    },
    schema::{self, event_types::CREATE},
    store::{Direction, Fault},
};

/// Ask for this many events at once: what other servers give at most.
const EVENTS_WANTED: u32 = 100;
/// Name at most this many events of a hole in one question.
const NAMED_MAX: usize = 20;
/// The next server is asked, too, when those before it have not answered for this long.
const NEXT_ASKED_AFTER: Duration = Duration::from_secs(3);
/// A server has this long to answer.
const ANSWER_TAKES_MAX: Duration = Duration::from_secs(20);
/// Filling a hole once takes at most this long.
const TAKES_MAX: Duration = Duration::from_secs(180);
/// For one fill at most this many questions are asked.
const REQUESTS_MAX: usize = 600;
/// One fill looks at most this many events that others gave.
const EVENTS_MAX: usize = 3_000;
/// States are fetched for at most this many events of one fill; what needs more is left for later.
const STATES_MAX: usize = 3;
/// The events above a hole whose servers are asked first: so many.
const ABOVE_LOOKED_AT: usize = 5;
/// A room has at most this many holes that are looked at.
const HOLES_MAX: usize = 200;

/// The holes of a room, the highest first: the order of the lowest event above each, and the ids of the events that are missing below it.
type Holes = Vec<(Order, Vec<OwnedEventId>)>;

/// Lists the holes of a room, the highest first.
pub(crate) async fn list_holes(app: &App, room: RoomNum) -> Result<Holes> {
    let owned = app.clone();
    let list = move || {
        let snapshot = owned.store.snapshot();
        let rows = schema::HOLE.prefix::<(RoomNum,)>(&*snapshot, (room,), Direction::Down)?;
        let hole = |row: Result<((RoomNum, Order), schema::state::HoleRow), Fault>| {
            row.map(|((_, order), row)| (order, parsed(row.missing)))
        };
        Ok(rows.take(HOLES_MAX).map(hole).collect::<Result<_, _>>()?)
    };
    app.env.blocking(list).await
}

fn parsed(ids: Vec<String>) -> Vec<OwnedEventId> {
    ids.into_iter().filter_map(|id| OwnedEventId::try_from(id).ok()).collect()
}

/// Fills the upper end of a hole with events of other servers, for somebody who reads there; waits for at most this long, and the fill goes on
/// afterwards. Gives whether the room's past may be another now, so that it is worth while to read again.
pub(crate) async fn fill_for_reader(app: &App, room: RoomNum, hole: Order, waits_max: Duration) -> bool {
    if app.gaps.is_left_alone(room, hole, app.env.uptime()) {
        return false;
    }
    let (tell, told) = tokio::sync::oneshot::channel();
    let owned = app.clone();
    app.env.spawn(async move {
        let stopping = owned.stopping.clone();
        let filled = stopping.run_until_cancelled(fill(&owned, room, hole)).await;
        // Nobody may wait for it any more.
        let _is_told = tell.send(filled.unwrap_or(false)).is_ok();
    });
    tokio::select! {
        biased;
        filled = told => filled.unwrap_or(false),
        () = app.env.sleep(waits_max) => false,
    }
}

async fn fill(app: &App, room: RoomNum, hole: Order) -> bool {
    if let Some(ends) = app.gaps.find_filling(room) {
        wait_for_end(ends).await;
        return true;
    }
    // The future is large, and lies in the heap, so that whoever waits for it stays small on the stack.
    let work = Box::pin(async {
        // The room is taken in a place for that, so that nobody whose other rooms are slow has it wait for a place of theirs.
        let _filling = app.gaps.begin_filling(room)?;
        Ok(fill_from_others(app, room, hole).await)
    });
    let filled = match app.gaps.fills.run(&app.env, (payer::current(), Pace::Unknown), work).await {
        Ok(Ok(filled)) => Ok(filled),
        // Somebody else has begun meanwhile.
        Ok(Err(ends)) => {
            wait_for_end(ends).await;
            return true;
        }
        Err(no_place) => Err(no_place),
    };
    match filled {
        Ok(Ok(true)) => true,
        Err(NoPlace::Full) => false,
        Ok(Ok(false)) | Err(NoPlace::GaveWay) => {
            app.gaps.leave_alone(room, hole, app.env.uptime());
            false
        }
        Ok(Err(error)) => {
            tracing::debug!(%room, %error, "a hole in a room could not be filled");
            app.gaps.leave_alone(room, hole, app.env.uptime());
            false
        }
    }
}

/// Waits until somebody else has filled a hole of the room, perhaps this one. The channel closes at the end.
async fn wait_for_end(mut ends: watch::Receiver<()>) {
    while ends.changed().await.is_ok() {}
}

async fn fill_from_others(app: &App, room: RoomNum, hole: Order) -> Result<bool> {
    let owned = app.clone();
    let (missing, first) = app
        .env
        .blocking(move || {
            let snapshot = owned.store.snapshot();
            let Some(row) = schema::HOLE.get(&*snapshot, (room, hole))? else {
                return Ok((None, Vec::new()));
            };
            // Those who sent what stands above the hole saw what is below it.
            let low = std::ops::Bound::Included((room, hole));
            let high = std::ops::Bound::Included((room, Order::MAX));
            let rows = schema::TIMELINE.range::<(RoomNum, Order)>(&*snapshot, low, high, Direction::Up)?;
            let mut first = Vec::new();
            for row in rows.take(ABOVE_LOOKED_AT) {
                first.extend(server_of(&row?.1.sender()));
            }
            // Most others may have come later than what is missing. The server of who made the room has all of its past.
            let create = rooms::find_state(&*snapshot, room, CREATE, "")?;
            if let Some(maker) = create.and_then(|create| server_of(&create.row.sender()))
                && members::is_server_joined(&*snapshot, room, maker.as_str())?
            {
                first.insert(first.len().min(1), maker);
            }
            Ok((Some(parsed(row.missing)), first))
        })
        .await?;
    // Somebody else has filled it meanwhile.
    let Some(missing) = missing else { return Ok(true) };
    let budget = Budget::new(app, TAKES_MAX, REQUESTS_MAX, EVENTS_MAX);
    let mut fetch = Fetch::begin(app, room, first, budget).await?;
    if fetch.list_without_place(missing.clone()).await?.is_empty() {
        return fill_with(&mut fetch, hole, &missing, Vec::new()).await;
    }
    let named: Vec<OwnedEventId> = missing.iter().take(NAMED_MAX).cloned().collect();
    let servers = fetch.servers.clone();
    let mut asked = 0;
    while asked < servers.len() {
        let rest: Vec<OwnedServerName> = servers.iter().skip(asked).cloned().collect();
        let Some((place, raw)) = first_answer(&fetch, &rest, &named).await else { return Ok(false) };
        asked += place + 1;
        let events = fetch.read(raw).await?;
        if events.is_empty() {
            continue;
        }
        // The server that gave the events has the states before them.
        if let Some(server) = rest.get(place) {
            fetch.servers.retain(|other| other != server);
            fetch.servers.insert(0, server.clone());
        }
        match fill_with(&mut fetch, hole, &missing, events).await {
            Ok(true) => return Ok(true),
            Ok(false) => {}
            Err(error @ Error::Remote { .. }) => {
                tracing::debug!(%room, %error, "a hole is not filled with what a server gave");
            }
            Err(other) => return Err(other),
        }
    }
    Ok(false)
}

/// Asks servers for history, one after the other and, where one is slow, several at once. Gives the first answer with events, and the place of
/// its server in the list.
async fn first_answer(
    fetch: &Fetch<'_>,
    servers: &[OwnedServerName],
    named: &[OwnedEventId],
) -> Option<(usize, Vec<Box<RawValue>>)> {
    let mut waiting = servers.iter().enumerate();
    let mut asked = FuturesUnordered::new();
    let ask = |(place, server): (usize, &OwnedServerName)| {
        let server = server.clone();
        async move { (place, fetch.history(&server, named.to_vec(), EVENTS_WANTED, ANSWER_TAKES_MAX).await) }
            .boxed()
    };
    asked.push(ask(waiting.next()?));
    loop {
        let pause = fetch.app.env.sleep(NEXT_ASKED_AFTER);
        tokio::select! {
            biased;
            answer = asked.next() => match answer {
                Some((place, Some(raw))) if !raw.is_empty() => return Some((place, raw)),
                _ => match waiting.next() {
                    Some(next) => asked.push(ask(next)),
                    None if asked.is_empty() => return None,
                    None => {}
                },
            },
            () = pause => {
                if let Some(next) = waiting.next() {
                    asked.push(ask(next));
                }
            }
        }
    }
}

/// Fills a hole with those of these events that its missing events lead to, and fetches what they need. Gives whether anything was filled,
/// or the hole closed.
pub(crate) async fn fill_with(
    fetch: &mut Fetch<'_>,
    hole: Order,
    missing: &[OwnedEventId],
    events: Vec<Received>,
) -> Result<bool> {
    let mut given: BTreeMap<OwnedEventId, Received> =
        events.into_iter().map(|event| (event.id().to_owned(), event)).collect();
    let mut segment: BTreeMap<OwnedEventId, Received> = BTreeMap::new();
    let mut open: Vec<OwnedEventId> = missing.to_vec();
    while let Some(id) = open.pop() {
        if let Some(event) = given.remove(&id) {
            open.extend(event.event().prev.iter().cloned());
            segment.insert(id, event);
        }
    }
    let is_closed = fetch.list_without_place(missing.to_vec()).await?.is_empty();
    if segment.is_empty() && !is_closed {
        return Ok(false);
    }
    let busy = || Error::Busy { retry_after: Duration::from_secs(60) };
    let _unswept = keep_unswept(fetch.app, fetch.num).await.ok_or_else(busy)?;
    let via = fetch.servers.first().map(ToString::to_string).unwrap_or_default();
    let older = with_states(fetch, hole, segment).await?;
    if older.is_empty() && !is_closed {
        return Ok(false);
    }
    let claim = claim_history(fetch.app, fetch.num).await.ok_or_else(busy)?;
    // Others may have filled it meanwhile, and the states were made for the hole as it was.
    let (owned, room, missing) = (fetch.app.clone(), fetch.num, missing.to_vec());
    let look = move || {
        let row = schema::HOLE.get(&owned.store.view(), (room, hole))?;
        Ok(row.is_some_and(|row| parsed(row.missing) == missing))
    };
    if !fetch.app.env.blocking(look).await? {
        return Ok(true);
    }
    let backfill = Backfill::new(claim, hole, older, via);
    ingest::fill::fill(fetch.app, fetch.num, backfill).await
}

/// Brings the events that allow those of a segment, and the states before those that stand on nothing we have. Leaves out what cannot be had.
async fn with_states(
    fetch: &mut Fetch<'_>,
    hole: Order,
    segment: BTreeMap<OwnedEventId, Received>,
) -> Result<Vec<Older>> {
    let mut segment = segment;
    let ids: BTreeSet<OwnedEventId> = segment.keys().cloned().collect();
    let named = segment.values().flat_map(|event| event.event().auth.iter().cloned());
    let named: BTreeSet<OwnedEventId> = named.filter(|id| !ids.contains(id)).collect();
    let unknown = fetch.list_unknown(named.into_iter().collect()).await?;
    if !unknown.is_empty() {
        let lowest = segment.values().min_by_key(|event| (event.depth(), event.id().to_owned()));
        if let Some(of) = lowest.map(|event| event.id().to_owned()) {
            fetch.bring_auth(&of, unknown.clone()).await?;
        }
        let unknown: BTreeSet<_> = fetch.list_unknown(unknown).await?.into_iter().collect();
        segment.retain(|_, event| !event.event().auth.iter().any(|id| unknown.contains(id)));
    }
    let ordered = in_order(segment.into_values().collect(), |event| &event.event().prev);
    let cited = ordered.iter().flat_map(|event| event.event().prev.iter().cloned());
    let cited: BTreeSet<OwnedEventId> = cited.collect();
    let absent: BTreeSet<OwnedEventId> =
        fetch.list_without_place(cited.into_iter().collect()).await?.into_iter().collect();
    let (mut older, mut here, mut fetched) = (Vec::new(), BTreeSet::new(), 0);
    // From above, the states of the lowest events count: if there are too many of those, only what is above them is filled.
    let stands = |event: &Received, here: &BTreeSet<OwnedEventId>| {
        event.event().prev.iter().all(|id| here.contains(id) || !absent.contains(id))
    };
    for event in ordered {
        let is_allowed = event.event().auth.iter().all(|id| !ids.contains(id) || here.contains(id));
        if !is_allowed {
            continue;
        }
        let mut state_before = None;
        if !stands(&event, &here) {
            if fetched == STATES_MAX {
                continue;
            }
            fetched += 1;
            match states::before(fetch, &event, state::hole_state(hole)).await {
                Ok(sketch) => state_before = Some(Before::Sketch(sketch)),
                Err(Error::Remote { .. }) => continue,
                Err(other) => return Err(other),
            }
        }
        here.insert(event.id().to_owned());
        older.push(Older { event, state_before });
    }
    Ok(older)
}
