//! Taking in events that were not built here: from other servers, whose checks of format, hash and signatures are done.
//!
//! Each is judged and written in a turn of its room, like whatever our own users send. Where states must be resolved
//! that are far apart, the room goes on meanwhile: the answer is worked out on the long pool, one a room at a time, and
//! the event comes back for another turn. If the room's heads moved so that the answer is of no use, it is asked again, a
//! bounded number of times.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use ruma::{CanonicalJsonObject, OwnedUserId, api::error::ErrorKind};

use crate::{
    accounts::users,
    error::{Error, Refusal, Result},
    flows::{App, commit},
    ids::RoomNum,
    rooms::{
        self,
        build::Draft,
        commit::Change,
        graph, members,
        power::{Action, Power},
        receive::{Outcome, Received, Step},
        resolve::{NotResolved, Question},
    },
};

/// Events taken in by one call.
pub const EVENTS_MAX: usize = 50;
/// Events written by one batch: those who wait for the room's next turn wait for no more ..
const TURN_EVENTS_MAX: usize = 10;
/// .. and for no longer than this and one event.
const TURN_TAKES_MAX: Duration = Duration::from_millis(10);
/// An event for which so many answers were worked out is tried again later.
const ANSWERS_MAX: usize = 6;
/// Of our users in a room, so many are looked at for one who may merge its heads ..
const MERGERS_LOOKED_AT: usize = 1_000;
/// .. and so many of those are tried.
const MERGERS_TRIED: usize = 10;

/// What a turn came to.
struct Turn {
    outcomes: Vec<Outcome>,
    /// What has to be answered before the next event can be judged.
    asks: Option<Question>,
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
    let mut waiting: VecDeque<Arc<Received>> = events.into_iter().map(Arc::new).collect();
    let mut outcomes = Vec::with_capacity(waiting.len());
    let (mut at_once, mut answers, mut wants_merge) = (TURN_EVENTS_MAX, 0, false);
    while !waiting.is_empty() {
        let some: Vec<_> = waiting.iter().take(at_once).cloned().collect();
        let count = some.len();
        let can_go_on = match take_turn(app, room, some).await {
            Ok(turn) => {
                drop(waiting.drain(..turn.outcomes.len()));
                answers = if turn.outcomes.is_empty() { answers } else { 0 };
                outcomes.extend(turn.outcomes);
                wants_merge = turn.wants_merge;
                match turn.asks {
                    None => true,
                    Some(question) => {
                        answers += 1;
                        answers <= ANSWERS_MAX && work_out(app, room, question).await?
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

/// One turn of the room: as many of these events as it may take.
async fn take_turn(app: &App, room: RoomNum, events: Vec<Arc<Received>>) -> Result<Turn> {
    let inner = app.clone();
    commit::in_room(app, room, move |change| {
        let (began, now_ms) = (inner.env.instant(), inner.env.now_ms());
        let mut turn = Turn { outcomes: Vec::with_capacity(events.len()), asks: None, wants_merge: false };
        for event in events {
            if inner.env.instant().saturating_duration_since(began) > TURN_TAKES_MAX {
                break;
            }
            match change.receive(&event, inner.rooms.resolver(), now_ms)? {
                Step::Done(outcome) => turn.outcomes.push(outcome),
                Step::Resolve(question) => {
                    turn.asks = Some(question);
                    break;
                }
            }
        }
        let is_accepted = |outcome: &Outcome| matches!(outcome, Outcome::Accepted(_));
        turn.wants_merge = turn.outcomes.iter().any(is_accepted)
            && graph::want_merge(&change.batch, room, &change.row.heads)?;
        Ok(turn)
    })
    .await
}

/// Works out an answer beside the room's turns. `false` if that is too much, now or at all.
async fn work_out(app: &App, room: RoomNum, question: Question) -> Result<bool> {
    let Ok(_waits) = app.rooms.resolutions_waiting().try_acquire() else { return Ok(false) };
    let turns = app.rooms.turns(room);
    let _of_room = turns.resolving.lock().await;
    let stopped = |_| Error::broken("the server has stopped");
    let _of_all = app.rooms.long_resolutions().acquire().await.map_err(stopped)?;
    let inner = app.clone();
    let work = move || {
        // Whatever the question names was published before it was asked.
        let snapshot = inner.store.snapshot();
        let version = rooms::require_row(&*snapshot, room)?.version;
        match inner.rooms.resolver().work_out(&*snapshot, room, version, &question) {
            Ok(()) => Ok(true),
            Err(NotResolved::TooMuch) => {
                tracing::info!(%room, "an event waits: too much of its room is in conflict");
                Ok(false)
            }
            Err(why) => Err(why.into()),
        }
    };
    app.env.blocking_long(work).await
}

/// One of our users who may send commits an event that cites all heads and that nobody sees. Nothing happens where
/// there is no such user, or where it is no longer needed.
async fn merge_heads(app: &App, room: RoomNum) -> Result<()> {
    let (signer, sent_ms) = (app.rooms.signer().clone(), app.env.event_ms());
    commit::in_room(app, room, move |change| {
        if !graph::want_merge(&change.batch, room, &change.row.heads)? {
            return Ok(());
        }
        for sender in list_mergers(change)? {
            let draft = Draft {
                sender,
                kind: graph::MERGE.to_owned(),
                state_key: None,
                content: CanonicalJsonObject::new(),
                redacts: None,
                sent_ms,
            };
            match change.add(&signer, &draft, None) {
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
fn list_mergers(change: &mut Change) -> Result<Vec<OwnedUserId>> {
    let power = Power::in_change(change)?;
    let mut found = Vec::new();
    let users = members::list_joined_local_users(&change.batch, change.num)?;
    for user in users.into_iter().take(MERGERS_LOOKED_AT) {
        let user_id =
            users::find(&change.batch, user)?.and_then(|row| OwnedUserId::try_from(row.user_id).ok());
        if let Some(user_id) = user_id
            && power.may(&user_id, Action::EventsDefault)?
        {
            found.push(user_id);
            if found.len() >= MERGERS_TRIED {
                break;
            }
        }
    }
    Ok(found)
}
