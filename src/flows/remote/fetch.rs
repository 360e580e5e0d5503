//! Asks other servers for events of a room (server-server API, "Backfilling and retrieving missing events", "Retrieving events").
//!
//! Whatever comes is somebody's word: its form, hash and signatures are checked here, and events that we have already, or that
//! are of another room, are left out. All who fetch share bounds: a number of requests, a number of events, and a time.

mod unbelieved;
mod whole;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use federation::{
    call::{Failure, Lane, Options},
    json::Counted,
};
use futures_util::{StreamExt, stream};
use ruma::{
    EventId, OwnedEventId, OwnedServerName, ServerName,
    api::federation::{
        authorization::get_event_authorization,
        backfill::get_backfill,
        event::{get_event, get_missing_events, get_room_state, get_room_state_ids},
    },
};
use serde::Deserialize;
use serde_json::value::RawValue;

use self::unbelieved::Unbelieved;
use super::verify::{self, Ask, Verified};
use crate::{
    env::payer::{self, Payers},
    error::{Error, Result},
    flows::{
        App,
        room::ingest::{self, outliers},
    },
    ids::RoomNum,
    rooms::{
        self,
        change::{Outcome, Received, Signed, completes, list_ids_elsewhere, order_by_auth},
        event, members,
    },
    schema::{
        self,
        rooms::{Place, RoomRow},
    },
    store::{Fault, Snapshot, View},
};

/// An answer with some events begins within this time.
const BEGINS: Duration = Duration::from_secs(10);
/// A request for some events takes at most this long.
const OVERALL: Duration = Duration::from_secs(20);
/// Ask at most this many servers for the same thing.
const SERVERS_MAX: usize = 4;
/// Choose among at most this many servers of a room.
const SERVERS_LOOKED_AT: usize = 500;
/// Ask for at most this many single events at once.
const AT_ONCE: usize = 5;
/// Look at most this many events of one answer: more than anybody is asked for.
const ANSWER_EVENTS_MAX: usize = 1_000;
/// Events that are missing are fetched with those that allow them up to this many levels.
const AUTH_LEVELS_MAX: usize = 20;
/// Look at most at this many events of other rooms that come.
const ELSEWHERE_MAX: usize = 20;
/// The form and the hash of at most this many events are checked in one call of the pool.
const READ_AT_ONCE: usize = 100;

/// The bounds of everything that one need makes us ask.
#[derive(Debug)]
pub(crate) struct Budget {
    /// The uptime of the server at which nothing more is asked.
    until: Duration,
    requests: usize,
    events: usize,
}

impl Budget {
    pub(crate) fn new(app: &App, takes_max: Duration, requests: usize, events: usize) -> Self {
        Self { until: app.env.uptime().saturating_add(takes_max), requests, events }
    }

    /// Takes one request; gives the time that it may take. `None` where nothing more may be asked.
    fn take(&mut self, app: &App) -> Option<Duration> {
        let left = self.until.saturating_sub(app.env.uptime());
        if left.is_zero() || self.requests == 0 || self.events == 0 {
            return None;
        }
        self.requests -= 1;
        Some(left)
    }

    /// Whether its time is over.
    pub(crate) fn is_over(&self, app: &App) -> bool {
        self.until <= app.env.uptime()
    }

    fn spend_events(&mut self, events: usize) {
        self.events = self.events.saturating_sub(events);
    }
}

/// A room whose events are asked for, and the servers that are asked.
pub(crate) struct Fetch<'a> {
    pub(crate) app: &'a App,
    pub(crate) num: RoomNum,
    pub(crate) row: RoomRow,
    /// The servers to ask, the likeliest first.
    pub(crate) servers: Vec<OwnedServerName>,
    pub(crate) budget: Budget,
    /// Those who pay for working on what comes.
    pub(super) payers: Payers,
    /// The events that came and could not be believed.
    pub(super) unbelieved: Unbelieved,
    /// The ids of events that came and are of other rooms, for each event several of which one is its own.
    elsewhere: Vec<BTreeSet<OwnedEventId>>,
    /// How many events of which only the redacted form came were asked for elsewhere.
    asked_whole: usize,
}

/// Lists servers that have somebody in a room, at most [`SERVERS_LOOKED_AT`] of either kind: those of which members are known, and
/// those that are only said to be there, which come after them, because one server may name any number of them.
fn list_others(read: &Snapshot, room: RoomNum, row: &RoomRow) -> Result<[Vec<OwnedServerName>; 2], Fault> {
    let claimed = match &row.partial {
        Some(_) => members::list_claimed(read, room, usize::MAX)?.into_iter().collect(),
        None => BTreeSet::new(),
    };
    let (mut known, mut said) = (Vec::new(), Vec::new());
    for server in members::list_servers(read, room)? {
        let server = server?;
        let others = if claimed.contains(&server) { &mut said } else { &mut known };
        if others.len() < SERVERS_LOOKED_AT {
            others.extend(OwnedServerName::try_from(server));
        } else if claimed.is_empty() {
            break;
        }
    }
    Ok([known, said])
}

/// The ids of a state, and of the events that allow it, as a server gave them.
pub(crate) struct Ids {
    pub(crate) state: Vec<OwnedEventId>,
    pub(crate) auth_chain: Vec<OwnedEventId>,
}

impl<'a> Fetch<'a> {
    /// Begins to ask for events of a room: these servers first, and then others that have somebody in it. Errors: 404
    /// `M_NOT_FOUND` for a room that is not there.
    pub(crate) async fn begin(
        app: &'a App,
        num: RoomNum,
        first: Vec<OwnedServerName>,
        budget: Budget,
    ) -> Result<Self> {
        let owned = app.clone();
        let (row, others) = app
            .env
            .blocking(move || {
                let snapshot = owned.store.snapshot();
                let row = rooms::require_row(&*snapshot, num)?;
                let others = list_others(&snapshot, num, &row)?;
                Ok((row, others))
            })
            .await?;
        let us = &app.config.server.name;
        let mut servers: Vec<OwnedServerName> = Vec::new();
        for server in first {
            if &server != us && !servers.contains(&server) {
                servers.push(server);
            }
        }
        for mut others in others {
            others.retain(|server| server != us && !servers.contains(server));
            while servers.len() < SERVERS_MAX && !others.is_empty() {
                let chosen = usize::try_from(app.env.random_below(others.len() as u64)).unwrap_or(0);
                servers.push(others.swap_remove(chosen));
            }
        }
        servers.truncate(SERVERS_MAX);
        let payers = payer::current();
        let (unbelieved, elsewhere) = (Unbelieved::default(), Vec::new());
        Ok(Self { app, num, row, servers, budget, payers, unbelieved, elsewhere, asked_whole: 0 })
    }

    fn options(left: Duration) -> Options {
        Options {
            begins: BEGINS.min(left),
            overall: OVERALL.min(left),
            lane: Lane::Fetches,
            ..Options::default()
        }
    }

    /// Notes that a server did not give something. Only what it does to us is told: others learn nothing of it.
    fn note(&self, server: &ServerName, what: &str, failure: &Failure) {
        tracing::debug!(room = %self.num, %server, what, %failure, "another server did not give what a room lacks");
    }

    /// Asks a server for events between some that we have and some that we got. Tells whether it has more of them to give, which nobody
    /// says: one that gives far fewer than it was asked for has come to the end of what it gives that way. `None` if it did not answer.
    pub(crate) async fn missing_events(
        &mut self,
        server: &ServerName,
        earliest: Vec<OwnedEventId>,
        latest: Vec<OwnedEventId>,
        limit: u32,
    ) -> Result<Option<(Vec<Received>, bool)>> {
        let Some(left) = self.budget.take(self.app) else { return Ok(Some((Vec::new(), false))) };
        let mut request = get_missing_events::v1::Request::new(self.row.id.clone(), earliest, latest);
        request.limit = limit.into();
        match self.app.remote.client.send(server, request, Self::options(left)).await {
            Ok(answer) => {
                let has_more = answer.events.len() >= limit.div_ceil(2) as usize;
                Ok(Some((self.read(answer.events).await?, has_more)))
            }
            Err(failure) => {
                self.note(server, "missing events", &failure);
                Ok((!failure.is_temporary()).then(|| (Vec::new(), false)))
            }
        }
    }

    /// Asks a server for the history before some events, them included. Gives `None` if it did not answer.
    pub(crate) async fn history(
        &self,
        server: &ServerName,
        from: Vec<OwnedEventId>,
        limit: u32,
        takes_max: Duration,
    ) -> Option<Vec<Box<RawValue>>> {
        let request = get_backfill::v1::Request::new(self.row.id.clone(), from, limit.into());
        match self.app.remote.client.send(server, request, Self::options(takes_max)).await {
            Ok(answer) => Some(answer.pdus),
            Err(failure) => {
                self.note(server, "history", &failure);
                None
            }
        }
    }

    /// Asks a server for the ids of the state before an event. Errors: [`Error::Remote`] if it did not give them, or too many.
    pub(crate) async fn state_ids(
        &mut self,
        server: &ServerName,
        id: &EventId,
        options: Options,
    ) -> Result<Ids> {
        let fault = |cause: String| Error::Remote { server: server.to_string(), cause };
        let left = self.budget.take(self.app).ok_or_else(|| fault("it was asked too much".to_owned()))?;
        let options = Options { overall: options.overall.min(left), ..options };
        let request = get_room_state_ids::v1::Request::new(id.to_owned(), self.row.id.clone());
        let answer = self.app.remote.client.send(server, request, options).await;
        let answer = answer.map_err(|failure| fault(failure.to_string()))?;
        Ok(Ids { state: answer.pdu_ids, auth_chain: answer.auth_chain_ids })
    }

    /// Asks a server for the state before an event, with the events that allow it, all of them whole. Gives what they count for in
    /// memory, too.
    pub(crate) async fn state(
        &mut self,
        server: &ServerName,
        id: &EventId,
    ) -> Result<(Vec<Box<RawValue>>, Counted)> {
        #[derive(Deserialize)]
        struct Answered {
            pdus: Vec<Box<RawValue>>,
            auth_chain: Vec<Box<RawValue>>,
        }
        let fault = |cause: String| Error::Remote { server: server.to_string(), cause };
        let left = self.budget.take(self.app).ok_or_else(|| fault("it was asked too much".to_owned()))?;
        let options = Options::whole_state();
        let options = Options { overall: options.overall.min(left), lane: Lane::Fetches, ..options };
        let request = get_room_state::v1::Request::new(id.to_owned(), self.row.id.clone());
        let reply = self.app.remote.client.ask(server, request, options).await;
        let reply = reply.map_err(|failure| fault(failure.to_string()))?;
        let mut answer: Answered = serde_json::from_slice(reply.answer.bytes())
            .map_err(|error| fault(format!("its answer makes no sense: {error}")))?;
        answer.pdus.append(&mut answer.auth_chain);
        Ok((answer.pdus, reply.answer.into_counted()))
    }

    /// Asks a server for the chain of events that allow an event, all of which it gives whole.
    async fn auth_chain(&mut self, server: &ServerName, id: &EventId) -> Result<Vec<Received>> {
        let Some(left) = self.budget.take(self.app) else { return Ok(Vec::new()) };
        let request = get_event_authorization::v1::Request::new(self.row.id.clone(), id.to_owned());
        match self.app.remote.client.send(server, request, Self::options(left)).await {
            Ok(answer) => self.read(answer.auth_chain).await,
            Err(failure) => {
                self.note(server, "auth chain", &failure);
                Ok(Vec::new())
            }
        }
    }

    /// Asks for single events, each at one server after the other until one has it. What nobody gave is left out.
    pub(crate) async fn single(&mut self, ids: &[OwnedEventId]) -> Result<Vec<Received>> {
        let mut open: Vec<OwnedEventId> = ids.to_vec();
        let mut found = Vec::new();
        for server in self.servers.clone() {
            let mut asked = Vec::new();
            for id in &open {
                let Some(left) = self.budget.take(self.app) else { break };
                asked.push((id.clone(), left));
            }
            let client = &self.app.remote.client;
            let ask = |(id, left): (OwnedEventId, Duration)| {
                let server = server.clone();
                async move { client.send(&server, get_event::v1::Request::new(id), Self::options(left)).await }
            };
            let mut raw = Vec::new();
            let mut answers = stream::iter(asked.into_iter().map(ask)).buffered(AT_ONCE);
            let mut in_vain = 0;
            while let Some(answer) = answers.next().await {
                match answer {
                    Ok(answer) => {
                        in_vain = 0;
                        raw.push(answer.pdu);
                    }
                    Err(failure) => {
                        in_vain += usize::from(failure.is_temporary());
                        self.note(&server, "event", &failure);
                    }
                }
                // A server that does not answer is asked no further.
                if in_vain >= AT_ONCE {
                    break;
                }
            }
            drop(answers);
            for received in self.read(raw).await? {
                // A server may give another event than it was asked for.
                if let Some(place) = open.iter().position(|id| **id == *received.id()) {
                    open.swap_remove(place);
                    found.push(received);
                }
            }
            if open.is_empty() {
                break;
            }
        }
        Ok(found)
    }

    /// Whether an event names one among those that allow it that came and is of another room.
    pub(super) fn names_elsewhere(&self, event: &Received) -> bool {
        event.event().auth.iter().any(|id| self.elsewhere.iter().any(|ids| ids.contains(id)))
    }

    /// Checks events as they came, and leaves out those that we have, that are of other rooms, or that nobody can have sent.
    pub(crate) async fn read(&mut self, mut raw: Vec<Box<RawValue>>) -> Result<Vec<Received>> {
        raw.truncate(ANSWER_EVENTS_MAX.min(self.budget.events));
        self.budget.spend_events(raw.len());
        self.check(raw).await
    }

    /// Checks events as they came, however many the caller asked for. Events that have their place here are left out; those of which
    /// only the redacted form is here are completed.
    pub(crate) async fn check(&mut self, raw: Vec<Box<RawValue>>) -> Result<Vec<Received>> {
        let mut received = self.check_by(raw, Ask::Servers).await?;
        self.bring_contents(&mut received).await?;
        Ok(received)
    }

    /// Like [`Self::check`], by keys that are asked for or only by those that are known.
    pub(super) async fn check_by(&mut self, raw: Vec<Box<RawValue>>, ask: Ask) -> Result<Vec<Received>> {
        let (mut received, mut raw) = (Vec::with_capacity(raw.len().min(READ_AT_ONCE)), raw.into_iter());
        loop {
            let some: Vec<Box<RawValue>> = raw.by_ref().take(READ_AT_ONCE).collect();
            if some.is_empty() {
                return Ok(received);
            }
            let (app, num, row) = (self.app.clone(), self.num, self.row.clone());
            let looked_at = self.elsewhere.len();
            let read = move || {
                let view = app.store.view();
                let (mut signed, mut whole, mut elsewhere) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
                for raw in some {
                    let json = raw.get().as_bytes();
                    let Ok(event) = Signed::read(num, &row, json) else {
                        if looked_at + elsewhere.len() < ELSEWHERE_MAX {
                            elsewhere
                                .extend(Some(list_ids_elsewhere(&row, json)).filter(|ids| !ids.is_empty()));
                        }
                        continue;
                    };
                    let id = event.unverified().id.clone();
                    if lacks(&view, num, &row, &id)? {
                        signed.insert(id, event);
                    } else if completes(&view, &row, num, &event)? {
                        whole.insert(id, event);
                    }
                }
                Ok((signed, whole, elsewhere))
            };
            let (signed, whole, elsewhere) = self.app.env.blocking(read).await?;
            self.elsewhere.extend(elsewhere);
            self.complete(whole.into_values().collect(), ask).await?;
            let jsons: Vec<_> = signed.iter().map(|(id, event)| (id.clone(), event.json().clone())).collect();
            let signed = signed.into_values().collect();
            let verified = verify::verify_by(self.app, self.row.version, signed, ask).await?;
            for ((id, json), verified) in jsons.into_iter().zip(verified) {
                match verified {
                    Verified::Received(event) => received.push(*event),
                    Verified::Forged(why) => {
                        self.unbelieved.note(id);
                        tracing::debug!(room = %self.num, why = %why.message, "a forged event is left out");
                    }
                    Verified::Later(server) => {
                        self.unbelieved.note_later(id, &json);
                        tracing::debug!(room = %self.num, %server, "an event is left out, because the keys of its server cannot be had");
                    }
                }
            }
        }
    }

    /// Takes in events that came whole, of which the redacted form has its place here. Where that cannot be done now, they come
    /// again some time.
    async fn complete(&self, whole: Vec<Signed>, ask: Ask) -> Result<()> {
        let mut received = Vec::new();
        for verified in verify::verify_by(self.app, self.row.version, whole, ask).await? {
            if let Verified::Received(event) = verified {
                received.push(*event);
            }
        }
        for some in received.chunks(ingest::EVENTS_MAX) {
            match ingest::ingest(self.app, self.num, some.to_vec()).await {
                Err(Error::Broken(why)) => return Err(Error::Broken(why)),
                Err(why) => tracing::debug!(room = %self.num, %why, "events are not completed now"),
                Ok(_) => {}
            }
        }
        Ok(())
    }

    /// Lists those of these events that have no place in the room's graph here.
    pub(crate) async fn list_without_place(&self, ids: Vec<OwnedEventId>) -> Result<Vec<OwnedEventId>> {
        self.list(ids, lacks).await
    }

    /// Lists those of these events that are not even kept aside here.
    pub(crate) async fn list_unknown(&self, ids: Vec<OwnedEventId>) -> Result<Vec<OwnedEventId>> {
        let is_unknown = |read: &View, num, row: &RoomRow, id: &EventId| {
            let key = event::parse_event_id(id, num, row.version);
            Ok(match key {
                Some(key) => event::find_key(read, num, &key)?.is_none(),
                None => true,
            })
        };
        self.list(ids, is_unknown).await
    }

    async fn list(
        &self,
        mut ids: Vec<OwnedEventId>,
        is_it: impl Fn(&View, RoomNum, &RoomRow, &EventId) -> Result<bool> + Send + 'static,
    ) -> Result<Vec<OwnedEventId>> {
        let (app, num, row) = (self.app.clone(), self.num, self.row.clone());
        self.app
            .env
            .blocking(move || {
                let view = app.store.view();
                let mut failed = Ok(());
                ids.retain(|id| match is_it(&view, num, &row, id) {
                    Ok(is_it) => is_it,
                    Err(error) => {
                        failed = Err(error);
                        false
                    }
                });
                failed.map(|()| ids)
            })
            .await
    }

    /// Fetches events that allow others, with those that allow them, and takes them in. `of` is an event that they allow: the
    /// first server is asked for the whole chain of it where several are missing, or one and then one that allows it.
    pub(crate) async fn bring_auth(&mut self, of: &EventId, missing: Vec<OwnedEventId>) -> Result<()> {
        let mut found: BTreeMap<OwnedEventId, Received> = BTreeMap::new();
        let mut open = missing;
        let (mut tried, mut asked_for_chain) = (BTreeSet::new(), false);
        for level in 0..AUTH_LEVELS_MAX {
            open.extend(found.values().flat_map(|event| event.event().auth.iter().cloned()));
            // An event that nobody gave in one round is not asked for in the next.
            open.retain(|id| !found.contains_key(id) && !tried.contains(id));
            open.sort_unstable();
            open.dedup();
            open = self.list_unknown(open).await?;
            if open.is_empty() {
                break;
            }
            let server = self.servers.first().filter(|_| !asked_for_chain && (open.len() > 1 || level > 0));
            if let Some(server) = server.cloned() {
                asked_for_chain = true;
                let chain = self.auth_chain(&server, of).await?;
                take_named(&mut found, &open, chain);
                continue;
            }
            let got = self.single(&open).await?;
            if got.is_empty() {
                break;
            }
            tried.extend(std::mem::take(&mut open));
            found.extend(got.into_iter().map(|it| (it.id().to_owned(), it)));
        }
        let (wrong, found): (Vec<_>, Vec<_>) =
            found.into_values().partition(|event| self.names_elsewhere(event));
        for event in wrong {
            outliers::reject_for_other_room(self.app, self.num, event).await?;
        }
        let found = in_order(found, |event| &event.event().auth);
        let taken = outliers::take_outliers(self.app, self.num, found, outliers::For::Auth).await?;
        let lacking = taken.iter().filter(|outcome| matches!(outcome, Outcome::Need { .. })).count();
        tracing::debug!(room = %self.num, event = %of, taken = taken.len(), lacking, "events that allow others were fetched");
        Ok(())
    }
}

/// Takes those events of a chain that are needed, and those that allow them, however much came.
fn take_named(found: &mut BTreeMap<OwnedEventId, Received>, needed: &[OwnedEventId], chain: Vec<Received>) {
    let mut chain: BTreeMap<OwnedEventId, Received> =
        chain.into_iter().map(|it| (it.id().to_owned(), it)).collect();
    let mut next = needed.to_vec();
    while let Some(id) = next.pop() {
        if let Some(event) = chain.remove(&id) {
            next.extend(event.event().auth.iter().cloned());
            found.insert(id, event);
        }
    }
}

/// Sorts events so that each comes after those among them that it names here and by its auth events. Events that name one
/// another in a circle are left out.
pub(crate) fn in_order(
    mut events: Vec<Received>,
    names: impl Fn(&Received) -> &Vec<OwnedEventId>,
) -> Vec<Received> {
    events.sort_by(|one, other| (one.depth(), one.id()).cmp(&(other.depth(), other.id())));
    let named: Vec<(OwnedEventId, Vec<OwnedEventId>)> = events
        .iter()
        .map(|event| {
            let named = names(event).iter().chain(&event.event().auth);
            (event.id().to_owned(), named.cloned().collect())
        })
        .collect();
    let mut events: Vec<Option<Received>> = events.into_iter().map(Some).collect();
    let order = order_by_auth(&named).into_iter();
    order.filter_map(|place| events.get_mut(place).and_then(Option::take)).collect()
}

/// Whether an event has no place in the graph of a room here: it is not known, or only as one that others name.
fn lacks(read: &View, num: RoomNum, row: &RoomRow, id: &EventId) -> Result<bool> {
    let Some(key) = event::parse_event_id(id, num, row.version) else { return Ok(true) };
    let Some(known) = event::find_key(read, num, &key)? else { return Ok(true) };
    Ok(matches!(schema::PLACE.get(read, (num, known))?, None | Some(Place::Outlier)))
}
