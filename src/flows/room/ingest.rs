//! Takes in events that were built by other servers. Their format, hash and signatures were checked before.
//!
//! Each event is judged and written in a turn of its room, like the events of our own users. If states that are far apart must
//! be resolved, the room goes on meanwhile: the answer is worked out on the long pool, one at a time for each room, and the
//! event comes back for another turn. If the room's heads moved meanwhile, so that the answer is of no use, the turn resolves
//! them itself with the events that were read beside it. A question never names rows that are still pending: if it would name
//! places of the turn's own batch, the turn ends first.

pub mod fill;
pub(crate) mod outliers;
pub(crate) mod reunite;
pub(crate) mod revise;
pub(crate) mod sticky;
pub(crate) mod sweep;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use ruma::{CanonicalJsonObject, UserId, api::error::ErrorKind, room_version_rules::RoomVersionRules};
use tokio::sync::{OwnedMutexGuard, SemaphorePermit};

use crate::{
    accounts::users,
    env::Long,
    error::{Error, Refusal, Result},
    flows::{
        App,
        account::carry_over,
        commit, jobs, own_events,
        policy_server::{self, Judged},
    },
    ids::{RoomNum, UserNum},
    rooms::{
        self,
        build::Draft,
        change::{Change, Outcome, Received, Step, Taken},
        event::StoredEvent,
        graph, members,
        policy::{self, Author},
        policy_server::PolicyServer,
        power::Action,
        resolve::{self, EVENTS_AT_ONCE, Loaded, NotResolved, Resolving, Settled},
        state::Sketch,
        turns::Pace,
    },
    schema::{
        event_types::{MERGE, TOMBSTONE},
        jobs::Job,
        rooms::Membership,
    },
    store::timer::Timer,
};

/// One call takes in at most this many events (the specification's bound for a transaction).
pub const EVENTS_MAX: usize = 50;
/// One turn writes at most this many events, so that others wait for their turn no longer than that.
const TURN_EVENTS_MAX: usize = 10;
/// A turn that has taken this long begins no further event.
const TURN_TAKES_MAX: Duration = Duration::from_millis(10);
/// An event for which this many answers were worked out in vain is given up, to be tried again later.
const ANSWERS_MAX: usize = 6;
/// At most this many of our users in a room are checked for whether they may merge its heads.
const MERGERS_LOOKED_AT: usize = 1_000;
/// The merge of the heads is tried in the name of at most this many of our users.
const MERGERS_TRIED: usize = 10;

/// An event that is to be judged, with the numbers that it took in an earlier turn.
#[derive(Clone)]
struct Coming {
    event: Arc<Received>,
    taken: Option<Taken>,
    /// The state before it that was fetched, in place of events that it cites.
    fetched: Option<Arc<Sketch>>,
}

/// The result of one turn.
#[derive(Default)]
struct Turn {
    outcomes: Vec<Outcome>,
    /// The question that must be answered before the next event can be judged.
    asks: Option<Settled>,
    /// The policy server that must be asked about the next event first, and the rules of the room's version.
    unsigned: Option<(PolicyServer, &'static RoomVersionRules)>,
    /// The numbers that the next event has taken already.
    taken: Option<Taken>,
    /// Whether the heads are to be merged: they are too many, or one is too far from the room's state.
    wants_merge: bool,
    /// Whether branches of the room stand apart from its state.
    stands_apart: bool,
    /// Whether the room is to be swept.
    wants_sweep: bool,
    /// The jobs that follow from the joins of users of ours among these events: those that are promised in their batch, and those that leave
    /// the room again for users who gave up their joins.
    promised: Vec<Timer>,
}

/// Judges these events in their order and writes the outcomes; answers when these are durable and visible. An event whose
/// outcome is [`Outcome::Unknown`] or [`Outcome::Held`] is to be tried again later.
/// Errors: 413 `M_TOO_LARGE` for more than [`EVENTS_MAX`]; 404 `M_NOT_FOUND` for a room that this server is not in.
pub async fn ingest(app: &App, room: RoomNum, events: Vec<Received>) -> Result<Vec<Outcome>> {
    if events.len() > EVENTS_MAX {
        return Err(Refusal::too_large("One call takes in at most 50 events.").into());
    }
    let come = |event| Coming { event: Arc::new(event), taken: None, fetched: None };
    take_all(app, room, events.into_iter().map(come).collect()).await
}

/// Judges an event of which events that it cites are missing, by a state that was fetched in their place
/// ([`Change::receive_with`]).
pub(crate) async fn ingest_with(
    app: &App,
    room: RoomNum,
    event: Received,
    fetched: Arc<Sketch>,
) -> Result<Outcome> {
    let coming = Coming { event: Arc::new(event), taken: None, fetched: Some(fetched) };
    Ok(take_all(app, room, VecDeque::from([coming])).await?.pop().unwrap_or(Outcome::Unknown))
}

async fn take_all(app: &App, room: RoomNum, mut waiting: VecDeque<Coming>) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::with_capacity(waiting.len());
    let (mut at_once, mut answers) = (TURN_EVENTS_MAX, 0);
    let (mut wants_merge, mut stands_apart) = (false, false);
    let mut worked: Option<Worked<'_>> = None;
    while !waiting.is_empty() {
        let some: Vec<_> = waiting.iter().take(at_once).cloned().collect();
        let count = some.len();
        let loaded = worked.as_ref().map(|worked| Arc::clone(&worked.loaded));
        let turn = take_turn(app, room, some, loaded).await;
        // The events that were read are of use for one turn only, and dropping them lets others work something out.
        worked = None;
        let mut outcome = Outcome::Unknown;
        let can_go_on = match turn {
            Ok(turn) => {
                let came_to_something = !turn.outcomes.is_empty();
                drop(waiting.drain(..turn.outcomes.len()));
                answers = if came_to_something { 0 } else { answers };
                outcomes.extend(turn.outcomes);
                wants_merge = turn.wants_merge;
                stands_apart = turn.stands_apart;
                if turn.wants_sweep {
                    sweep::when_due(app, room);
                }
                turn.promised.into_iter().for_each(|promised| jobs::begin(app, Some(promised)));
                if let Some(next) = waiting.front_mut() {
                    next.taken = turn.taken;
                }
                match (turn.asks, turn.unsigned, waiting.front_mut()) {
                    (Some(question), ..) => {
                        answers += 1;
                        if answers <= ANSWERS_MAX {
                            worked = work_out_for_event(app, room, question).await?;
                        }
                        worked.is_some()
                    }
                    (None, Some((server, rules)), Some(next)) => {
                        outcome = Outcome::Held;
                        answers += 1;
                        answers <= ANSWERS_MAX && ask_about(app, server, rules, next).await
                    }
                    (None, ..) => came_to_something,
                }
            }
            // The events are more than a batch holds, so they are tried one by one; one that is too large alone is left for later.
            Err(Error::Refused(refusal)) if refusal.kind == ErrorKind::TooLarge => {
                at_once = 1;
                count > 1
            }
            Err(other) => return Err(other),
        };
        if !can_go_on {
            tracing::debug!(%room, answers, "an event could not be judged now, and is to be tried again later");
            drop(waiting.pop_front());
            outcomes.push(outcome);
            answers = 0;
        }
    }
    if stands_apart {
        reunite::when_due(app, room).await;
    } else if wants_merge {
        try_merge(app, room).await;
    }
    Ok(outcomes)
}

/// Asks a policy server about an event, and notes what it says. Gives `false` where it cannot be asked now.
async fn ask_about(app: &App, server: PolicyServer, rules: &RoomVersionRules, coming: &mut Coming) -> bool {
    let event = match policy_server::judge(app, &server, rules, &coming.event).await {
        Judged::Signed(event) => *event,
        Judged::Against(why) => (*coming.event).clone().opposed_by(server, why),
        Judged::Later => return false,
    };
    coming.event = Arc::new(event);
    true
}

/// Takes one turn of the room, for as many of these events as a turn may take.
///
/// `loaded` holds events that were read for the first of these events.
async fn take_turn(
    app: &App,
    room: RoomNum,
    events: Vec<Coming>,
    loaded: Option<Arc<Loaded>>,
) -> Result<Turn> {
    let owned = app.clone();
    commit::in_room(app, room, move |change| {
        let (began, now_ms) = (owned.env.instant(), owned.env.now_ms());
        let mut turn = Turn::default();
        for Coming { event, taken, fetched } in events {
            if owned.env.instant().saturating_duration_since(began) > TURN_TAKES_MAX {
                turn.taken = taken;
                break;
            }
            let loaded = loaded.as_deref().filter(|_| turn.outcomes.is_empty());
            let resolving = Resolving { loaded, ..owned.rooms.resolver().into() };
            match change.receive_with(&event, fetched.as_deref(), taken, resolving, now_ms)? {
                Step::Done(outcome) => {
                    if let Outcome::Accepted(stored) = &outcome
                        && let Some(user) = find_newcomer(&owned, change, stored)?
                    {
                        turn.promised.extend(carry_over::promise(&owned, change, user)?);
                        turn.promised.extend(owned.remote.attempts.find_late(&change.row.id, user));
                        // A join that has waited may come after the job that completes the room found nobody of ours there.
                        if change.row.incomplete().is_some() {
                            let completes = Job::CompleteState { room };
                            turn.promised.push(jobs::promise(&owned, &mut change.batch, &completes));
                        }
                    }
                    if let Outcome::Accepted(stored) = &outcome
                        && stored.row.event_type() == TOMBSTONE
                    {
                        turn.promised.extend(carry_over::promise_to_early(&owned, change)?);
                    }
                    turn.outcomes.push(outcome);
                }
                Step::Resolve(question, taken) => {
                    (turn.asks, turn.taken) = (Some(question), taken);
                    break;
                }
                Step::Unsigned(server, taken) => {
                    (turn.unsigned, turn.taken) = (Some((server, change.rules())), taken);
                    break;
                }
                Step::EndTurn(taken) => {
                    debug_assert!(
                        !turn.outcomes.is_empty(),
                        "nothing is pending before the first event of a turn"
                    );
                    turn.taken = taken;
                    break;
                }
            }
        }
        let is_accepted = |outcome: &Outcome| matches!(outcome, Outcome::Accepted(_));
        turn.wants_merge =
            turn.outcomes.iter().any(is_accepted) && graph::want_merge(&change.batch, room, &change.row)?;
        turn.stands_apart = !change.row.apart.is_empty();
        turn.wants_sweep = change.wants_sweep()?;
        Ok(turn)
    })
    .await
}

/// Finds the user of ours who has joined the room by an event that another server tells, or that it has let in.
fn find_newcomer(app: &App, change: &Change, stored: &StoredEvent) -> Result<Option<UserNum>> {
    if stored.membership() != Some(Membership::Join) {
        return Ok(None);
    }
    let Some(name) = stored.row.state_key() else { return Ok(None) };
    let Ok(user_id) = <&UserId>::try_from(&*name) else { return Ok(None) };
    if *user_id.server_name() != app.config.server.name {
        return Ok(None);
    }
    let Some(user) = users::find_num(&change.batch, user_id)? else { return Ok(None) };
    Ok(members::is_joined(&change.batch, user, change.num)?.then_some(user))
}

/// A large resolution of a room, or a sweep, that is paced. Dropping this notes that it has ended.
struct Running<'a> {
    app: &'a App,
    pace: &'a Pace,
    began: Duration,
}

impl<'a> Running<'a> {
    /// One has begun just now ([`Pace::begin`]).
    fn new(app: &'a App, pace: &'a Pace) -> Self {
        Self { app, pace, began: app.env.uptime() }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let now = self.app.env.uptime();
        self.pace.end(now, now.saturating_sub(self.began));
    }
}

/// The result of working out an answer. The events that were read for it stay in memory for one turn. The permits are held
/// until then, so that they bound that memory, too.
struct Worked<'a> {
    loaded: Arc<Loaded>,
    _of_all: SemaphorePermit<'a>,
    _of_large: Option<SemaphorePermit<'a>>,
    _of_room: OwnedMutexGuard<()>,
}

/// Works out an answer for an event that is coming in. Its sender chooses the states that it cites, and they may be as far apart
/// as the room is large. So such answers keep a distance in each room, as reunions do.
async fn work_out_for_event(app: &App, room: RoomNum, question: Settled) -> Result<Option<Worked<'_>>> {
    if !question.is_of_cited() {
        return work_out(app, room, question).await;
    }
    let (owned, asked) = (app.clone(), question.clone());
    let is_far = move || Ok(owned.rooms.resolver().is_far(&*owned.store.snapshot(), room, &asked)?);
    if !app.env.blocking(is_far).await? {
        return work_out(app, room, question).await;
    }
    let turns = app.rooms.turns(room);
    if let Err(pause) = turns.far_answers.begin(app.env.uptime()) {
        tracing::debug!(%room, ?pause, "an event is to be tried again later: it cites states that are far apart, as another just did");
        return Ok(None);
    }
    let _running = Running::new(app, &turns.far_answers);
    work_out(app, room, question).await
}

/// Works out an answer beside the room's turns. Answers `None` if too many resolutions wait, or if this one is too large.
async fn work_out(app: &App, room: RoomNum, question: Settled) -> Result<Option<Worked<'_>>> {
    let Ok(_waits) = app.rooms.resolutions_waiting().try_acquire() else {
        tracing::debug!(%room, "an event is to be tried again later: too many state resolutions wait");
        return Ok(None);
    };
    let (turns, question) = (app.rooms.turns(room), Arc::new(question));
    let _of_room = Arc::clone(&turns.resolving).lock_owned().await;
    let stopped = |_| app.broke_off("a resolution");
    let loaded = Arc::new(Loaded::default());
    // Most questions need no more events than fit in memory. Those that do are answered one at a time, so that they never have
    // all places for resolutions, however long they take.
    let permit = app.rooms.long_resolutions().acquire().await.map_err(stopped)?;
    if answer(app, room, &question, &loaded, EVENTS_AT_ONCE).await? {
        return Ok(Some(Worked { loaded, _of_all: permit, _of_large: None, _of_room }));
    }
    drop(permit);
    let large = app.rooms.large_resolutions().acquire().await.map_err(stopped)?;
    let permit = app.rooms.long_resolutions().acquire().await.map_err(stopped)?;
    if answer(app, room, &question, &loaded, resolve::EVENTS_MAX).await? {
        return Ok(Some(Worked { loaded, _of_all: permit, _of_large: Some(large), _of_room }));
    }
    tracing::info!(%room, "an event is to be tried again later: too much of its room's state is in conflict");
    Ok(None)
}

/// Answers a question on the long pool. Answers `false` if it needs more events than these.
async fn answer(
    app: &App,
    room: RoomNum,
    question: &Arc<Settled>,
    loaded: &Arc<Loaded>,
    events_max: usize,
) -> Result<bool> {
    let (owned, question, load) = (app.clone(), Arc::clone(question), Arc::clone(loaded));
    let work = move || {
        // Everything that the question names was published before it was asked, and the turn that asked it has ended. So a
        // snapshot has all of it.
        let snapshot = owned.store.snapshot();
        let version = rooms::require_row(&*snapshot, room)?.version;
        match owned.rooms.resolver().work_out(&*snapshot, room, version, &question, &load, events_max) {
            Ok(()) => Ok(true),
            Err(NotResolved::TooMuch) => Ok(false),
            Err(why) => Err(why.into()),
        }
    };
    app.env.blocking_long(Long::Resolution, work).await
}

/// Merges the heads of a room if that is possible. Where it is not, the next event of the room asks for it again.
async fn try_merge(app: &App, room: RoomNum) {
    if let Err(error) = merge_heads(app, room).await {
        tracing::warn!(%error, %room, "the heads of a room could not be merged");
    }
}

/// Merges the heads of a room: an event that cites all of them, and that nobody sees, is sent in the name of one of our users.
/// Nothing happens if none of them may send, or if a merge is no longer needed.
async fn merge_heads(app: &App, room: RoomNum) -> Result<()> {
    let (signer, sent_ms) = (app.rooms.signer().clone(), app.env.event_ms());
    own_events::in_room_unasked(app, room, move |change| {
        if !graph::want_merge(&change.batch, room, &change.row)? {
            return Ok(());
        }
        for author in list_mergers(change)? {
            let draft = Draft {
                sender: author.user_id.clone(),
                event_type: MERGE.to_owned(),
                state_key: None,
                content: CanonicalJsonObject::new(),
                redacts: None,
                sent_ms,
                sticky_ms: None,
            };
            let added = policy::approve(change, signer.server(), &author, draft)
                .and_then(|approved| approved.add(change, &signer));
            match added {
                // The power levels may ask more for this type than for others, so the next user is tried.
                Err(Error::Refused(_)) => {}
                other => return other.map(drop),
            }
        }
        Ok(())
    })
    .await
}

/// Lists at most [`MERGERS_TRIED`] of our users in the room who may send events.
fn list_mergers(change: &mut Change) -> Result<Vec<Author>> {
    let power = change.power()?;
    let mut found = Vec::new();
    let users = members::joined_local_users(&change.batch, change.num)?.take(MERGERS_LOOKED_AT);
    for user in users.collect::<Result<Vec<_>, _>>()? {
        let author = Author::of(&change.batch, user)?;
        if power.may(&author.user_id, Action::EventsDefault)? {
            found.push(author);
            if found.len() >= MERGERS_TRIED {
                break;
            }
        }
    }
    Ok(found)
}
