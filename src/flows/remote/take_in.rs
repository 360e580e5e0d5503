//! Takes in events of other servers, and fetches what they lack: the events between those that we have and the new ones, the
//! events that allow them, and where the gap is too long for that, the state before it (server-server API, "Checks performed on receipt
//! of a PDU", "Backfilling and retrieving missing events").
//!
//! Everything is bounded: a gap is followed for some rounds, events and seconds, and what events of one owner's servers lack in a room is
//! fetched in turn (`gaps/neighbours.rs`). What cannot be had does not reject an event: its outcome is [`Outcome::Unknown`], to be tried again later.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use ruma::{EventId, OwnedEventId, OwnedServerName, ServerName};

use super::{
    backfill,
    fetch::{Budget, Fetch, in_order},
    gaps, payers, states,
};
use crate::{
    error::{Error, Result},
    flows::{App, room::ingest},
    ids::RoomNum,
    rooms::{
        change::{Outcome, Received},
        event, require_row,
        state::{Sketch, StateRef},
    },
};

/// A gap is followed for at most this many rounds of questions.
const ROUNDS_MAX: usize = 10;
/// Ask for this many events in one round: what other servers give at most.
const ROUND_EVENTS: u32 = 20;
/// A gap is followed for at most this many events.
const GAP_EVENTS_MAX: usize = 200;
/// One call fetches for this long; a state whose fetch has begun by then is waited for.
const TAKES_MAX: Duration = Duration::from_secs(60);
/// One call asks at most this many questions.
const REQUESTS_MAX: usize = 150;
/// One call looks at most this many events that others gave.
const EVENTS_MAX: usize = 2_000;
/// The states before the lowest events of a gap are fetched if there are at most this many; otherwise the one before its newest event.
const BOTTOMS_MAX: usize = 4;
/// Fetching states takes at most this long.
const STATES_TAKE_MAX: Duration = Duration::from_secs(300);
/// To fetch states, this many more questions may be asked,
const STATE_REQUESTS_MAX: usize = 2_500;
/// and this many more events may come that are asked for one by one.
const STATE_EVENTS_MAX: usize = 5_000;
/// A server that has nobody in the room has us fetch for at most this long,
const STRANGERS_TAKE_MAX: Duration = Duration::from_secs(10);
/// and at most this many questions, which go to that server alone.
const STRANGERS_REQUESTS_MAX: usize = 10;
/// Ask at most this many other servers about a gap of which its event's own server gives nothing.
const OTHERS_MAX: usize = 1;
/// Ask for up to this many events below a gap one by one.
const BELOW_MAX: usize = 5;
/// An event whose auth events come late is judged this many times.
const PASSES_MAX: usize = 3;

/// The answer to a server that gives none of the events of a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    /// The event waits. The server may well give them a little later, and a state that is fetched leaves a hole in the room.
    Waits,
    /// The state after the gap is fetched.
    FetchesState,
}

/// Judges events of a room that a server gave, at most 50, fetches what they lack from it and from other servers of the room, and writes the
/// outcomes, one for each event, in their order. An event whose outcome is [`Outcome::Unknown`] is to be tried again later.
/// Errors: as of [`ingest::ingest`].
pub async fn take_in(
    app: &App,
    room: RoomNum,
    origin: &ServerName,
    events: Vec<Received>,
    silence: Silence,
) -> Result<Vec<Outcome>> {
    let mut outcomes = ingest::ingest(app, room, events.clone()).await?;
    let needs = |outcome: &Outcome| matches!(outcome, Outcome::Need { .. });
    for (event, outcome) in events.iter().zip(&mut outcomes) {
        if needs(outcome) && waits_for_held(app, event) {
            *outcome = Outcome::Held;
        }
    }
    if !outcomes.iter().any(needs) {
        return Ok(outcomes);
    }
    // The fetching future is large, and lies in the heap, so that whatever waits for it stays small on the stack.
    let fetching = Box::pin(fetch_for(app, (room, origin), &events, &mut outcomes, silence));
    match app.stopping.run_until_cancelled(fetching).await {
        None => tracing::debug!(%room, "what events lack is not fetched, because the server stops"),
        Some(Ok(())) => {}
        Some(Err(error @ (Error::Remote { .. } | Error::Busy { .. }))) => {
            tracing::debug!(%room, %origin, %error, "what events lack could not be fetched");
        }
        Some(Err(error)) => return Err(error),
    }
    for outcome in outcomes.iter_mut().filter(|outcome| needs(outcome)) {
        *outcome = Outcome::Unknown;
    }
    Ok(outcomes)
}

/// Fetches what those of the events lack that need others, one after the other.
async fn fetch_for(
    app: &App,
    (room, origin): (RoomNum, &ServerName),
    events: &[Received],
    outcomes: &mut [Outcome],
    silence: Silence,
) -> Result<()> {
    if gaps::is_stranger(app, room, origin).await? {
        // A server that has nobody in the room, as far as is known, may have come in by an event that is missing here. So it is asked, but
        // nobody else for its sake, no turn is held meanwhile, and a state is not fetched because it is silent.
        let work = async {
            let budget = Budget::new(app, STRANGERS_TAKE_MAX, STRANGERS_REQUESTS_MAX, EVENTS_MAX);
            let mut fetch = Fetch::begin(app, room, vec![origin.to_owned()], budget).await?;
            fetch.servers.retain(|server| server == origin);
            Gap::new(fetch, origin, Silence::Waits).close_all(events, outcomes).await
        };
        let fetched = app.gaps.fetch_for_stranger(&app.env, origin, Box::pin(work)).await;
        return fetched.unwrap_or(Ok(()));
    }
    let work = async {
        // The time counts from when it is their turn.
        let budget = Budget::new(app, TAKES_MAX, REQUESTS_MAX, EVENTS_MAX);
        let fetch = Fetch::begin(app, room, vec![origin.to_owned()], budget).await?;
        Gap::new(fetch, origin, silence).close_all(events, outcomes).await
    };
    let fetched = app.gaps.fetch_in_turn(&app.env, (room, origin), Box::pin(work)).await;
    if fetched.is_none() {
        tracing::debug!(%room, %origin, "what events lack came slowly, and makes room for that of a neighbour");
    }
    fetched.unwrap_or(Ok(()))
}

/// Whether an event cites one that waits for the room's policy server. No hole may open in that one's place, because nobody asks
/// about what fills a hole.
fn waits_for_held(app: &App, event: &Received) -> bool {
    let now = app.env.uptime();
    let waits = event.event().prev.iter().any(|id| app.policy_servers.is_held(id, now));
    if waits {
        // Events that stand on this one wait with it, and nothing is fetched for them meanwhile.
        app.policy_servers.note_behind(event, now);
    }
    waits
}

async fn one(app: &App, room: RoomNum, event: Received) -> Result<Outcome> {
    Ok(ingest::ingest(app, room, vec![event]).await?.pop().unwrap_or(Outcome::Unknown))
}

/// A gap between the events that we have of a room and those that came.
struct Gap<'a> {
    fetch: Fetch<'a>,
    origin: OwnedServerName,
    states: States,
    silence: Silence,
}

/// The states that were fetched in a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum States {
    NoneYet,
    /// Some came, so that the call may fetch more without a pause.
    Came,
    /// One did not come, so that the call asks for no other.
    InVain,
}

impl<'a> Gap<'a> {
    fn new(fetch: Fetch<'a>, origin: &ServerName, silence: Silence) -> Self {
        Self { fetch, origin: origin.to_owned(), states: States::NoneYet, silence }
    }

    fn app(&self) -> &App {
        self.fetch.app
    }

    /// Fetches what those of the events lack that need others, one after the other, as long as there is time.
    async fn close_all(&mut self, events: &[Received], outcomes: &mut [Outcome]) -> Result<()> {
        let (app, room) = (self.app().clone(), self.fetch.num);
        for (event, outcome) in events.iter().zip(outcomes) {
            if !matches!(outcome, Outcome::Need { .. }) {
                continue;
            }
            // Another event of the list, or somebody else, may have brought what it needs.
            *outcome = one(&app, room, event.clone()).await?;
            if matches!(outcome, Outcome::Need { .. }) && !self.fetch.budget.is_over(&app) {
                *outcome = self.close(event, outcome.clone()).await?;
            }
        }
        Ok(())
    }

    /// Fetches what an event lacks, and gives its outcome then.
    async fn close(&mut self, event: &Received, mut outcome: Outcome) -> Result<Outcome> {
        let (app, room) = (self.app().clone(), self.fetch.num);
        if let Outcome::Need { auth, prev } = &outcome {
            // Events that it stands on come with the gap.
            let lacking: Vec<OwnedEventId> = auth.iter().filter(|id| !prev.contains(id)).cloned().collect();
            if !lacking.is_empty() {
                self.fetch.bring_auth(event.id(), lacking).await?;
                if self.fetch.names_elsewhere(event) {
                    return ingest::outliers::reject_for_other_room(&app, room, event.clone()).await;
                }
                // An event that lacks nothing more is judged, and gets its place even if it is rejected: others may cite it.
                outcome = one(&app, room, event.clone()).await?;
            }
        }
        let Outcome::Need { auth, prev } = outcome else { return Ok(outcome) };
        // Nothing is fetched for an event that its own auth events forbid.
        match ingest::outliers::reject_by_auth(&app, room, event.clone()).await? {
            Outcome::Unknown | Outcome::Held => {}
            Outcome::Known(_) | Outcome::Need { .. } | Outcome::Accepted(_) => {}
            rejected @ (Outcome::Outlier(_) | Outcome::Aside(..)) => return Ok(rejected),
        }
        if prev.is_empty() {
            debug_assert!(!auth.is_empty(), "an event needs nothing");
            return Ok(Outcome::Unknown);
        }
        let found = self.follow(event, prev).await?;
        if found.len() == 1 && self.silence == Silence::Waits {
            // Somebody else may have brought them meanwhile.
            let outcome = one(&app, room, event.clone()).await?;
            return Ok(if matches!(outcome, Outcome::Need { .. }) { Outcome::Unknown } else { outcome });
        }
        self.take_in(event, found).await
    }

    /// Asks for the events between those that we have and this one, round after round. Gives what came, with the event itself.
    async fn follow(
        &mut self,
        event: &Received,
        missing: Vec<OwnedEventId>,
    ) -> Result<BTreeMap<OwnedEventId, Received>> {
        let heads = self.list_heads().await?;
        let mut found = BTreeMap::from([(event.id().to_owned(), event.clone())]);
        let mut open: BTreeSet<OwnedEventId> = missing.into_iter().collect();
        let mut others = self.list_others_to_ask();
        let mut asked = self.origin.clone();
        for _ in 0..ROUNDS_MAX {
            if open.is_empty() || found.len() > GAP_EVENTS_MAX {
                break;
            }
            let latest = list_bottoms(&found, &open).into_iter().take(ROUND_EVENTS as usize).collect();
            let answer = self.fetch.missing_events(&asked, heads.clone(), latest, ROUND_EVENTS).await?;
            if answer.is_none() {
                // For what else is lacking, others are asked before it.
                self.fetch.servers.sort_by_key(|server| *server == asked);
            }
            let (got, has_more) = answer.unwrap_or_default();
            if got.is_empty()
                && let Some(other) = others.pop()
            {
                asked = other;
                continue;
            }
            // The create event is the end of the past, and comes in with that alone: the state before an event which stands on it is
            // fetched, or the hole below the join leads there.
            let got = got.into_iter().filter(|event| !event.event().prev.is_empty());
            let got: BTreeMap<OwnedEventId, Received> =
                got.map(|event| (event.id().to_owned(), event)).collect();
            // Only what the gap leads to is of use, whatever else comes.
            let before = found.len();
            loop {
                let reached: Vec<&Received> = open.iter().filter_map(|id| got.get(id)).collect();
                if reached.is_empty() {
                    break;
                }
                let mut cited = Vec::new();
                for event in reached {
                    cited.extend(event.event().prev.iter().cloned());
                    found.insert(event.id().to_owned(), event.clone());
                }
                cited.retain(|id| !found.contains_key(id));
                open.retain(|id| !found.contains_key(id));
                open.extend(self.fetch.list_without_place(cited).await?);
            }
            if found.len() == before {
                break;
            }
            if !has_more {
                self.take_below(&mut found, &open).await?;
                break;
            }
        }
        tracing::debug!(room = %self.fetch.num, found = found.len(), open = open.len(), "a gap in a room was followed");
        Ok(found)
    }

    /// Lists the servers, the likeliest last, that are asked about a gap of which the event's own server gives nothing: none where the event
    /// may wait for it.
    fn list_others_to_ask(&self) -> Vec<OwnedServerName> {
        match self.silence {
            Silence::Waits => Vec::new(),
            Silence::FetchesState => {
                let others = self.fetch.servers.iter().filter(|server| **server != self.origin);
                others.take(OTHERS_MAX).cloned().collect()
            }
        }
    }

    /// Asks for the events below a gap where a server came to the end of what it tells of the gap. Mostly these stand on what we have, so
    /// that no state need be fetched; of those that do not, the state before them is fetched, which is that of fewer events.
    async fn take_below(
        &mut self,
        found: &mut BTreeMap<OwnedEventId, Received>,
        open: &BTreeSet<OwnedEventId>,
    ) -> Result<()> {
        if open.is_empty() || open.len() > BELOW_MAX {
            return Ok(());
        }
        let open: Vec<OwnedEventId> = open.iter().cloned().collect();
        let got = self.fetch.single(&open).await?.into_iter();
        let got = got.filter(|event| !event.event().prev.is_empty());
        found.extend(got.map(|event| (event.id().to_owned(), event)));
        Ok(())
    }

    /// The ids of the room's heads, from which on others are to tell us events.
    async fn list_heads(&self) -> Result<Vec<OwnedEventId>> {
        let (app, num) = (self.app().clone(), self.fetch.num);
        let list = move || {
            let row = require_row(&app.store.view(), num)?;
            Ok(row.heads.iter().map(|head| event::event_id(&head.key, row.version)).collect())
        };
        self.app().env.blocking(list).await
    }

    /// Takes in the events of a gap, oldest first, and gives the outcome of the newest. The states before those that still cite missing
    /// events are fetched.
    async fn take_in(
        &mut self,
        event: &Received,
        mut found: BTreeMap<OwnedEventId, Received>,
    ) -> Result<Outcome> {
        let (app, room) = (self.app().clone(), self.fetch.num);
        let mut open: BTreeSet<OwnedEventId> = self.list_open(&found).await?;
        if self.fill_holes(&found, &open).await? {
            open = self.list_open(&found).await?;
        }
        if list_bottoms(&found, &open).len() > BOTTOMS_MAX {
            // A state for each of them would be too much, so the hole begins below the newest event.
            found.retain(|id, _| id == event.id());
        }
        let mut waiting = in_order(found.into_values().collect(), |event| &event.event().prev);
        let mut last = Outcome::Unknown;
        for _ in 0..PASSES_MAX {
            let mut left = Vec::new();
            for some in waiting.chunks(ingest::EVENTS_MAX) {
                let outcomes = ingest::ingest(&app, room, some.to_vec()).await?;
                for (waits, outcome) in some.iter().zip(outcomes) {
                    match outcome {
                        Outcome::Need { auth, prev } => left.push((waits.clone(), auth, prev)),
                        // No hole may open in its place, because nobody asks about what fills a hole.
                        Outcome::Held => return Ok(Outcome::Held),
                        done if waits.id() == event.id() => last = done,
                        _ => {}
                    }
                }
            }
            if left.is_empty() {
                break;
            }
            waiting = left.iter().map(|(event, ..)| event.clone()).collect();
            let ids: BTreeSet<&EventId> = left.iter().map(|(event, ..)| event.id()).collect();
            let (mut is_any, mut done) = (false, BTreeSet::new());
            for (waits, auth, prev) in &left {
                let stands_on_waiting = prev.iter().any(|id| ids.contains(&**id));
                if !prev.is_empty() && !stands_on_waiting {
                    if waits_for_held(&app, waits) {
                        return Ok(Outcome::Held);
                    }
                    // An event that its own auth events forbid is rejected whatever the state before it is. Those that stand on it get a
                    // state that is fetched, as if it were missing.
                    let mut outcome = ingest::outliers::reject_by_auth(&app, room, waits.clone()).await?;
                    if !matches!(outcome, Outcome::Outlier(_)) {
                        // With the state before it come the events that allow it.
                        let Some(by_state) = self.take_in_with_state(waits).await? else { continue };
                        outcome = match by_state {
                            Outcome::Unknown | Outcome::Need { .. } if self.fetch.names_elsewhere(waits) => {
                                ingest::outliers::reject_for_other_room(&app, room, waits.clone()).await?
                            }
                            Outcome::Unknown if !auth.is_empty() => {
                                ingest::outliers::reject_by_auth(&app, room, waits.clone()).await?
                            }
                            other => other,
                        };
                    }
                    if waits.id() != event.id() && matches!(outcome, Outcome::Outlier(_)) {
                        is_any = true;
                        done.insert(waits.id().to_owned());
                        continue;
                    }
                    if !matches!(outcome, Outcome::Accepted(_) | Outcome::Known(_)) {
                        // Nothing that stands on it can be judged, either.
                        return Ok(Outcome::Unknown);
                    }
                    is_any = true;
                    done.insert(waits.id().to_owned());
                    if waits.id() == event.id() {
                        last = outcome;
                    }
                    continue;
                }
                // Those that wait, too, are judged before it.
                let lacking: Vec<OwnedEventId> =
                    auth.iter().filter(|id| !ids.contains(&***id)).cloned().collect();
                if !lacking.is_empty() {
                    self.fetch.bring_auth(waits.id(), lacking).await?;
                    is_any = true;
                    if self.fetch.names_elsewhere(waits) {
                        let outcome =
                            ingest::outliers::reject_for_other_room(&app, room, waits.clone()).await?;
                        if waits.id() == event.id() {
                            last = outcome;
                        }
                        done.insert(waits.id().to_owned());
                    }
                }
            }
            waiting.retain(|other| !done.contains(other.id()));
            if !is_any || waiting.is_empty() {
                break;
            }
        }
        Ok(last)
    }

    /// Lists the events that those of a gap cite and that are missing, also among them.
    async fn list_open(&self, found: &BTreeMap<OwnedEventId, Received>) -> Result<BTreeSet<OwnedEventId>> {
        let cited = found.values().flat_map(|event| event.event().prev.iter().cloned());
        let cited: BTreeSet<OwnedEventId> = cited.filter(|id| !found.contains_key(id)).collect();
        Ok(self.fetch.list_without_place(cited.into_iter().collect()).await?.into_iter().collect())
    }

    /// Fills holes of the room with those events of a gap that are missing there: they are of the past. Gives whether anything was filled.
    async fn fill_holes(
        &mut self,
        found: &BTreeMap<OwnedEventId, Received>,
        open: &BTreeSet<OwnedEventId>,
    ) -> Result<bool> {
        let holes = backfill::list_holes(self.app(), self.fetch.num).await?;
        let mut has_filled = false;
        for (hole, missing) in holes {
            if !missing.iter().any(|id| found.contains_key(id) || open.contains(id)) {
                continue;
            }
            let events = found.values().cloned().collect();
            has_filled |= backfill::fill_with(&mut self.fetch, hole, &missing, events).await?;
        }
        Ok(has_filled)
    }

    /// Takes in an event by the state before it, which is fetched; `None` where that cannot be had now.
    async fn take_in_with_state(&mut self, event: &Received) -> Result<Option<Outcome>> {
        let (app, room, origin) = (self.app().clone(), self.fetch.num, self.origin.clone());
        let row = require_row(&*app.store.snapshot(), room)?;
        if row.partial.is_some_and(|partial| !partial.is_filled) {
            // A state is written as what differs from one that is stored. Somebody who is in neither is no difference, and would be in
            // both once it is learnt that they were in the room when we joined it.
            tracing::debug!(%room, event = %event.id(), "an event waits until the members of the room are known: a state would have to be fetched for it");
            return Ok(None);
        }
        let may_fetch = match self.states {
            States::Came => !self.fetch.budget.is_over(&app),
            States::NoneYet => app.gaps.may_fetch_state(room, &origin, app.env.uptime()),
            States::InVain => false,
        };
        if !may_fetch {
            tracing::debug!(%room, %origin, "no state is fetched, because one was a short while ago, or did not come");
            return Ok(None);
        }
        let owned = app.clone();
        let payers = app.env.blocking(move || Ok(payers::of_room(&owned.store.snapshot(), room)?)).await?;
        let none = Budget::new(&app, Duration::ZERO, 0, 0);
        let (left, mut began) = (std::mem::replace(&mut self.fetch.budget, none), None);
        self.fetch.payers = payers;
        // The future that fetches a state is large, and lies in the heap, so that whoever waits for it stays small on the stack.
        let fetching = Box::pin(async {
            // Until the event is judged, nothing that was fetched may be swept.
            let Some(unswept) = gaps::keep_unswept(&app, room).await else { return Ok(None) };
            began = Some(app.env.uptime());
            // The time counts from when there is a place.
            self.fetch.budget = Budget::new(&app, STATES_TAKE_MAX, STATE_REQUESTS_MAX, STATE_EVENTS_MAX);
            let fetched = self.fetch_state(event).await;
            fetched.map(|sketch| Some((sketch, unswept)))
        });
        let fetched = app.gaps.fetch_state(&app, (payers, &origin), fetching).await;
        self.fetch.budget = left;
        self.states = if matches!(fetched, Some(Ok(Some(_)))) { States::Came } else { States::InVain };
        if let Some(began) = began {
            let now = app.env.uptime();
            app.gaps.fetched_state(room, origin, now, now.saturating_sub(began));
        }
        let (sketch, _unswept) = match fetched {
            None | Some(Ok(None)) => return Ok(None),
            Some(Ok(Some((sketch, unswept)))) => (Arc::new(sketch), unswept),
            Some(Err(error @ (Error::Remote { .. } | Error::Busy { .. }))) => {
                tracing::debug!(%room, event = %event.id(), %error, "the state before an event could not be fetched");
                return Ok(None);
            }
            Some(Err(other)) => return Err(other),
        };
        let Some(_claim) = gaps::claim_history(&app, room).await else { return Ok(None) };
        let outcome = ingest::ingest_with(&app, room, event.clone(), sketch).await?;
        tracing::debug!(%room, event = %event.id(), ?outcome, "an event was judged by a state that was fetched");
        Ok(Some(outcome))
    }

    /// Fetches the state before an event, and the events that allow it.
    async fn fetch_state(&mut self, event: &Received) -> Result<Sketch> {
        let tip = StateRef::Main(require_row(&*self.app().store.snapshot(), self.fetch.num)?.state_tip);
        let sketch = states::before(&mut self.fetch, event, tip).await?;
        let lacking = self.fetch.list_unknown(event.event().auth.clone()).await?;
        if !lacking.is_empty() {
            self.fetch.bring_auth(event.id(), lacking).await?;
        }
        Ok(sketch)
    }
}

/// Lists those of the events that cite missing ones, the lowest first.
fn list_bottoms(
    found: &BTreeMap<OwnedEventId, Received>,
    open: &BTreeSet<OwnedEventId>,
) -> Vec<OwnedEventId> {
    let mut bottoms: Vec<&Received> =
        found.values().filter(|event| event.event().prev.iter().any(|id| open.contains(id))).collect();
    bottoms.sort_by_key(|event| (event.depth(), event.id().to_owned()));
    bottoms.into_iter().map(|event| event.id().to_owned()).collect()
}
