//! Taking in events that were not built here: from other servers, whose checks of format, hash and signatures are done.
//!
//! Each is judged and written in a turn of its room, like whatever our own users send. Where states must be resolved
//! that are far apart, the room goes on meanwhile: the answer is worked out on the long pool, one a room at a time, and
//! the event comes back for another turn. If the room's heads moved meanwhile, so that the answer is of no use, the turn
//! resolves them itself, with the events at hand that were read beside it. Nothing that is still pending leaves a turn: where a question names places of the turn's own
//! batch, the turn ends first.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use ruma::{CanonicalJsonObject, api::error::ErrorKind};
use tokio::sync::{OwnedMutexGuard, SemaphorePermit};

use crate::{
    env::Long,
    error::{Error, Refusal, Result},
    flows::{App, commit},
    ids::RoomNum,
    rooms::{
        self,
        build::Draft,
        change::{Change, Outcome, Received, Step, Taken},
        graph, members,
        policy::{self, Author},
        power::Action,
        resolve::{Loaded, NotResolved, Resolving, Settled},
    },
};

/// Events taken in by one call.
pub const EVENTS_MAX: usize = 50;
/// Write at most this many events in one turn: whoever waits for the next turn waits for no more.
const TURN_EVENTS_MAX: usize = 10;
/// Begin no further event in a turn that has taken this long.
const TURN_TAKES_MAX: Duration = Duration::from_millis(10);
/// Try an event later for which this many answers were worked out in vain.
const ANSWERS_MAX: usize = 6;
/// Look at this many of our users in a room for some who may merge its heads.
const MERGERS_LOOKED_AT: usize = 1_000;
/// Try to merge the heads in the name of this many of them.
const MERGERS_TRIED: usize = 10;

/// An event that is to be judged, with the numbers that it took in an earlier turn.
#[derive(Clone)]
struct Coming {
    event: Arc<Received>,
    taken: Option<Taken>,
}

/// What a turn came to.
struct Turn {
    outcomes: Vec<Outcome>,
    /// What has to be answered before the next event can be judged.
    asks: Option<Settled>,
    /// What the next event has taken.
    taken: Option<Taken>,
    /// The heads are too many, or one is too far from the room's state.
    wants_merge: bool,
}

/// Judges these events, each after the ones before it, and writes what becomes of them; answers when that is durable and
/// visible. An event whose outcome is [`Outcome::Unknown`] is to be tried again later.
/// Errors: 413 `M_TOO_LARGE` for more than [`EVENTS_MAX`]; 404 `M_NOT_FOUND` for a room that this server is not in.
pub async fn ingest(app: &App, room: RoomNum, events: Vec<Received>) -> Result<Vec<Outcome>> {
    if events.len() > EVENTS_MAX {
        return Err(Refusal::too_large("These are too many events at once.").into());
    }
    let come = |event| Coming { event: Arc::new(event), taken: None };
    let mut waiting: VecDeque<Coming> = events.into_iter().map(come).collect();
    let mut outcomes = Vec::with_capacity(waiting.len());
    let (mut at_once, mut answers, mut wants_merge) = (TURN_EVENTS_MAX, 0, false);
    let mut worked: Option<Worked<'_>> = None;
    while !waiting.is_empty() {
        let some: Vec<_> = waiting.iter().take(at_once).cloned().collect();
        let count = some.len();
        let loaded = worked.as_ref().map(|worked| Arc::clone(&worked.loaded));
        let turn = take_turn(app, room, some, loaded).await;
        // Others may work something out now: what this one read is of use for one turn.
        worked = None;
        let can_go_on = match turn {
            Ok(turn) => {
                let came_to_something = !turn.outcomes.is_empty();
                drop(waiting.drain(..turn.outcomes.len()));
                answers = if came_to_something { 0 } else { answers };
                outcomes.extend(turn.outcomes);
                wants_merge = turn.wants_merge;
                if let Some(next) = waiting.front_mut() {
                    next.taken = turn.taken;
                }
                match turn.asks {
                    None => came_to_something,
                    Some(question) => {
                        answers += 1;
                        if answers <= ANSWERS_MAX {
                            worked = work_out(app, room, question).await?;
                        }
                        worked.is_some()
                    }
                }
            }
            // More than a batch holds: one by one; and if one alone is too much, not now.
            Err(Error::Refused(refusal)) if refusal.kind == ErrorKind::TooLarge => {
                at_once = 1;
                count > 1
            }
            Err(other) => return Err(other),
        };
        if !can_go_on {
            tracing::debug!(%room, answers, "an event is to be tried again later: it could not be judged now");
            drop(waiting.pop_front());
            outcomes.push(Outcome::Unknown);
            answers = 0;
        }
    }
    if wants_merge && let Err(error) = merge_heads(app, room).await {
        // The next event asks for it again.
        tracing::warn!(%error, %room, "the heads of a room could not be merged");
    }
    Ok(outcomes)
}

/// Takes one turn of the room, for as many of these events as it may take.
///
/// `loaded` are events that were read for the first of them.
async fn take_turn(
    app: &App,
    room: RoomNum,
    events: Vec<Coming>,
    loaded: Option<Arc<Loaded>>,
) -> Result<Turn> {
    let inner = app.clone();
    commit::in_room(app, room, move |change| {
        let (began, now_ms) = (inner.env.instant(), inner.env.now_ms());
        let outcomes = Vec::with_capacity(events.len());
        let mut turn = Turn { outcomes, asks: None, taken: None, wants_merge: false };
        for Coming { event, taken } in events {
            if inner.env.instant().saturating_duration_since(began) > TURN_TAKES_MAX {
                turn.taken = taken;
                break;
            }
            let loaded = loaded.as_deref().filter(|_| turn.outcomes.is_empty());
            let resolving = Resolving { resolver: inner.rooms.resolver(), loaded };
            match change.receive(&event, taken, resolving, now_ms)? {
                Step::Done(outcome) => turn.outcomes.push(outcome),
                Step::Resolve(question, taken) => {
                    (turn.asks, turn.taken) = (Some(question), taken);
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
        Ok(turn)
    })
    .await
}

/// An answer was worked out. What was read for it stays in memory for one turn; the places for such work are kept until
/// then, so that they bound that memory too.
struct Worked<'a> {
    loaded: Arc<Loaded>,
    _of_all: SemaphorePermit<'a>,
    _of_room: OwnedMutexGuard<()>,
}

/// Works out an answer beside the room's turns. Gives `None` if that is too much, now or at all.
async fn work_out(app: &App, room: RoomNum, question: Settled) -> Result<Option<Worked<'_>>> {
    let Ok(_waits) = app.rooms.resolutions_waiting().try_acquire() else {
        tracing::debug!(%room, "an event waits: too many resolutions wait");
        return Ok(None);
    };
    let turns = app.rooms.turns(room);
    let _of_room = Arc::clone(&turns.resolving).lock_owned().await;
    let stopped = |_| Error::broken("the server has stopped");
    let _of_all = app.rooms.long_resolutions().acquire().await.map_err(stopped)?;
    let loaded = Arc::new(Loaded::default());
    let (inner, load) = (app.clone(), Arc::clone(&loaded));
    let work = move || {
        // Everything that the question names was published before it was asked: it is settled, and the turn that asked it
        // has ended.
        let snapshot = inner.store.snapshot();
        let version = rooms::require_row(&*snapshot, room)?.version;
        match inner.rooms.resolver().work_out(&*snapshot, room, version, &question, &load) {
            Ok(()) => Ok(true),
            Err(NotResolved::TooMuch) => {
                tracing::info!(%room, "an event waits: too much of its room is in conflict");
                Ok(false)
            }
            Err(why) => Err(why.into()),
        }
    };
    let is_answered = app.env.blocking_long(Long::Resolution, work).await?;
    Ok(is_answered.then_some(Worked { loaded, _of_all, _of_room }))
}

/// One of our users who may send commits an event that cites all heads and that nobody sees. Nothing happens where
/// there is no such user, or where it is no longer needed.
async fn merge_heads(app: &App, room: RoomNum) -> Result<()> {
    let (signer, sent_ms) = (app.rooms.signer().clone(), app.env.event_ms());
    commit::in_room(app, room, move |change| {
        if !graph::want_merge(&change.batch, room, &change.row)? {
            return Ok(());
        }
        for author in list_mergers(change)? {
            let draft = Draft {
                sender: author.user_id.clone(),
                kind: graph::MERGE.to_owned(),
                state_key: None,
                content: CanonicalJsonObject::new(),
                redacts: None,
                sent_ms,
            };
            let added = policy::approve(change, signer.server(), &author, draft)
                .and_then(|approved| approved.add(change, &signer));
            match added {
                // The levels may ask more for this type than for others.
                Err(Error::Refused(_)) => {}
                other => return other.map(drop),
            }
        }
        Ok(())
    })
    .await
}

/// Some of our users in the room who may send events.
fn list_mergers(change: &mut Change) -> Result<Vec<Author>> {
    let power = change.power()?;
    let mut found = Vec::new();
    let users = members::list_joined_local_users(&change.batch, change.num)?;
    for user in users.into_iter().take(MERGERS_LOOKED_AT) {
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
