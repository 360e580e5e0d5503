//! Delayed events (MSC4140): schedules them, sends them when they are due, and does with them what their users ask for meanwhile.
//!
//! An event is sent in the batch that ends its delay, so that it is sent once, whenever the server is killed. It is judged when it is
//! sent, as if its user sent it then.

use std::{collections::BTreeMap, time::Duration};

use ruma::{CanonicalJsonObject, OwnedRoomId, api::error::ErrorKind};

use crate::{
    accounts::{Caller, users},
    error::{Error, Exception, Refusal, Result},
    flows::{
        App, commit, jobs,
        limits::{Limit, Source},
        own_events,
        room::{presence, require_joined, send},
        write,
    },
    ids::UserNum,
    rooms::{
        build::{Draft, EVENT_BYTES_MAX, NAME_BYTES_MAX},
        change::Change,
        delayed, event,
        policy::{self, Author},
    },
    schema::{
        delayed::{DelayedEnd, DelayedOutcome, DelayedRow},
        event_types::{MEMBER, REDACTION},
        rooms::Membership,
    },
    store::{
        Batch, Fault,
        timer::{self, Timer},
    },
};

/// At most this many events of a user are sent at a time; others who have events that are due get their turn in between.
const SENT_AT_ONCE: usize = 50;
/// A turn of a user sends no further event after this time, as where a policy server is slow: whoever waits for a place comes next.
const TURN: Duration = Duration::from_secs(1);
/// An event that cannot be sent for now, because of the server or of another one, is tried again after this many milliseconds.
const AGAIN_MS: u64 = 10_000;
/// An event that could not be sent for this many milliseconds is given up: it was meant for another time.
const GIVEN_UP_MS: u64 = 10 * 60 * 1000;

/// An event that a user wants to have sent later.
pub(crate) struct Wanted {
    /// The room that it is sent to.
    pub(crate) room: OwnedRoomId,
    /// The type of the event.
    pub(crate) event_type: String,
    /// The state key, if it is a state event.
    pub(crate) state_key: Option<String>,
    /// The transaction id of the request, if it has one.
    pub(crate) txn: Option<String>,
    /// The content as the client wrote it.
    pub(crate) content: CanonicalJsonObject,
    /// The delay in milliseconds. The caller has held it against its bounds.
    pub(crate) delay_ms: u64,
    /// For how many milliseconds the event is to be sticky, if it is to be so.
    pub(crate) sticky_ms: Option<u64>,
}

/// Schedules an event, and answers the id of the delayed event. A request with a transaction id that is repeated schedules nothing
/// new. Errors: 403 `M_FORBIDDEN` outside a room; 400, 413 for what can be no event; 429 `M_LIMIT_EXCEEDED` where as many events wait
/// as may.
pub(crate) async fn schedule(app: &App, caller: &Caller, wanted: Wanted) -> Result<String> {
    require_event(&wanted)?;
    require_joined(&app.store.snapshot(), caller.user, &wanted.room)?;
    let user = caller.user;
    let id = match &wanted.txn {
        Some(txn) => {
            send::require_txn(txn)?;
            delayed::id_of(user, caller.device, &wanted.room, &wanted.event_type, txn)
        }
        None => app.env.random_string(43),
    };
    presence::note_active(app, caller);
    write::for_caller(app, caller, move |app, batch| {
        let now_ms = app.env.now_ms();
        delayed::forget_old(batch, user, now_ms)?;
        if delayed::find(batch, user, &id, now_ms)?.is_none() {
            let row = DelayedRow {
                again_ms: None,
                room_id: wanted.room,
                event_type: wanted.event_type,
                state_key: wanted.state_key,
                content: wanted.content,
                delay_ms: wanted.delay_ms,
                scheduled_ms: now_ms,
                sequence: 0,
                sticky_ms: wanted.sticky_ms,
                end: None,
            };
            let waiting_max = app.config.rooms.delayed_events_max;
            delayed::schedule(batch, user, &id, row, usize::try_from(waiting_max).unwrap_or(usize::MAX))?;
        }
        Ok(id)
    })
    .await
}

/// Refuses what could never be sent, as far as that is known without the room.
fn require_event(wanted: &Wanted) -> Result<()> {
    if wanted.event_type.is_empty() {
        return Err(Refusal::bad_json("The type of the event is empty; name one.").into());
    }
    let names = [Some(&wanted.event_type), wanted.state_key.as_ref()];
    if names.into_iter().flatten().any(|name| name.len() > NAME_BYTES_MAX) {
        return Err(Refusal::too_large("An event's type and state key have at most 255 bytes.").into());
    }
    let content = serde_json::to_string(&wanted.content)
        .map_err(|_| Refusal::bad_json("The event's content cannot be written as JSON."))?;
    if content.len() > EVENT_BYTES_MAX {
        return Err(Refusal::too_large("An event has at most 65,536 bytes.").into());
    }
    if wanted.event_type == REDACTION && wanted.state_key.is_none() {
        send::redacts_of(&wanted.content)?;
    }
    if wanted.event_type == MEMBER && wanted.state_key.is_some() {
        // Other servers have a say in who comes in, and are asked by other ways.
        let membership = event::membership_of(&content);
        if !matches!(membership, Some(Membership::Leave | Membership::Ban)) {
            let why = "Of member events only `leave` and `ban` can be delayed.";
            return Err(Refusal::invalid_param(why).into());
        }
    }
    Ok(())
}

/// An act of a user on a delayed event that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Sends the event now, whatever its delay.
    Send,
    /// Takes the event back, so that it is never sent.
    Cancel,
    /// Begins the delay of the event anew.
    Restart,
}

/// Does with a delayed event of the caller's what they ask for. Nothing happens where the event has ended that way already. Errors: 404
/// `M_NOT_FOUND`; 409 `M_UNKNOWN` where it has ended in another way; where it cannot be sent now, that of sending it, and then it
/// stays scheduled.
pub(crate) async fn act(app: &App, caller: &Caller, id: String, action: Action) -> Result<()> {
    match action {
        Action::Send => send_now(app, caller, &id).await,
        Action::Cancel | Action::Restart => {
            let user = caller.user;
            write::for_caller(app, caller, move |app, batch| {
                let now_ms = app.env.now_ms();
                let row = delayed::find(batch, user, &id, now_ms)?.ok_or_else(unknown)?;
                match (&row.end, action) {
                    (Some(end), _) => require_outcome(&end.outcome, action),
                    (None, Action::Restart) => Ok(delayed::restart(batch, user, &id, row, now_ms)?),
                    (None, Action::Cancel | Action::Send) => {
                        let end = DelayedEnd { at_ms: now_ms, outcome: DelayedOutcome::Cancelled };
                        Ok(delayed::end(batch, user, &id, row, end)?)
                    }
                }
            })
            .await
        }
    }
}

/// The refusal where there is no such delayed event: 404 `M_NOT_FOUND`.
pub(crate) fn unknown() -> Refusal {
    Refusal::not_found("You have no delayed event of this id.")
}

/// Refuses what a delayed event cannot do any more, because it has ended otherwise: 409 `M_UNKNOWN`.
fn require_outcome(outcome: &DelayedOutcome, action: Action) -> Result<()> {
    let (agrees, how) = match outcome {
        DelayedOutcome::Sent(_) => (action == Action::Send, "was sent"),
        DelayedOutcome::Refused(..) => (action == Action::Cancel, "could not be sent"),
        DelayedOutcome::Cancelled => (action == Action::Cancel, "was cancelled"),
    };
    if agrees {
        return Ok(());
    }
    let refusal =
        Refusal::new(ruma::api::error::ErrorKind::Unknown, format!("The delayed event {how} already."));
    Err(refusal.exception(Exception::Taken).into())
}

async fn send_now(app: &App, caller: &Caller, id: &str) -> Result<()> {
    let is_sent = send_one(app, caller.user, id, false).await?;
    if is_sent {
        return Ok(());
    }
    // It has ended before, or just now.
    let row = delayed::find(&app.store.view(), caller.user, id, app.env.now_ms())?.ok_or_else(unknown)?;
    match &row.end {
        Some(end) => require_outcome(&end.outcome, Action::Send),
        None => Err(Error::Busy { retry_after: Duration::from_secs(1) }),
    }
}

/// Sends a delayed event, and ends it, in one batch. Answers `false`, and does nothing, where it does not wait, or is not due yet
/// though `only_due`.
async fn send_one(app: &App, user: UserNum, id: &str, only_due: bool) -> Result<bool> {
    let (room_id, author) = {
        let view = app.store.view();
        let now_ms = app.env.now_ms();
        let row = delayed::find(&view, user, id, now_ms)?.filter(|row| row.end.is_none());
        let Some(row) = row.filter(|row| !only_due || row.due_ms() <= now_ms) else { return Ok(false) };
        // An event that was scheduled before its user was locked or suspended comes to nothing, too.
        users::require_active(&view, user)?;
        count(app, user, &row, only_due)?;
        (row.room_id, Author::of(&view, user)?)
    };
    let room = commit::require_num(app, &room_id)?;
    let (owned, id) = (app.clone(), id.to_owned());
    let work = move |change: &mut Change| {
        let now_ms = owned.env.now_ms();
        let row = delayed::find(&change.batch, user, &id, now_ms)?.filter(|row| row.end.is_none());
        let Some(row) = row.filter(|row| !only_due || row.due_ms() <= now_ms) else { return Ok(None) };
        let (event_id, promised) = add(&owned, change, &author, &id, &row)?;
        let end = DelayedEnd { at_ms: now_ms, outcome: DelayedOutcome::Sent(event_id) };
        delayed::end(&mut change.batch, user, &id, row, end)?;
        Ok(Some(promised))
    };
    let sent = match only_due {
        true => own_events::in_room_and_user_unasked(app, room, user, work).await?,
        false => own_events::in_room_and_user(app, room, user, work).await?,
    };
    let Some(promised) = sent else { return Ok(false) };
    jobs::begin(app, promised);
    Ok(true)
}

/// Counts a delayed event like one that its user sends now. Where it is due, nobody is there to try it again, so that it may put the user
/// into debt, which what they send next has to wait for.
fn count(app: &App, user: UserNum, row: &DelayedRow, is_due: bool) -> Result<()> {
    let source = Source::User(user);
    let is_membership = row.event_type == MEMBER && row.state_key.is_some();
    if !is_due {
        // The request for it was counted as one that sends an event, and is tried again by its client.
        return if is_membership { app.limits.take(Limit::Membership, source) } else { Ok(()) };
    }
    app.limits.take_more(Limit::Send, source, 1)?;
    if is_membership && let Err(why) = app.limits.take_more(Limit::Membership, source, 1) {
        app.limits.give_back(Limit::Send, source);
        return Err(why);
    }
    Ok(())
}

/// Adds the event of a delayed one to its room, with what follows from it.
fn add(
    app: &App,
    change: &mut Change,
    author: &Author,
    id: &str,
    row: &DelayedRow,
) -> Result<(ruma::OwnedEventId, Option<Timer>)> {
    let is_redaction = row.event_type == REDACTION && row.state_key.is_none();
    let draft = Draft {
        sender: author.user_id.clone(),
        event_type: row.event_type.clone(),
        state_key: row.state_key.clone(),
        content: row.content.clone(),
        redacts: if is_redaction { send::redacts_of(&row.content)? } else { None },
        sent_ms: app.env.event_ms(),
        sticky_ms: row.sticky_ms,
    };
    let txn = delayed::txn(author.user, id, app.env.now_ms());
    if row.state_key.is_some() {
        return send::add_state(app, change, author, draft, Some(&txn));
    }
    let signer = app.rooms.signer();
    let approved = policy::approve(change, signer.server(), author, draft)?;
    Ok((approved.add_once(change, signer, &txn)?.id(&change.row), None))
}

/// Sends the events of a user that are due, in the order in which they are, forgets those that ended long ago, and sets the timer for
/// what is to be done next. An event that cannot be sent now is put off with those behind it in its room, and holds up no other room.
pub(crate) async fn attend(app: &App, user: UserNum, fired: Timer) -> Result<()> {
    let now_ms = app.env.now_ms();
    let store = app.store.clone();
    let list = move || {
        let view = store.view();
        let due = delayed::list_due(&view, user, now_ms, SENT_AT_ONCE)?;
        let held_up =
            if due.is_empty() { BTreeMap::new() } else { delayed::list_put_off(&view, user, now_ms)? };
        Ok((due, held_up))
    };
    let (due, mut held_up) = app.env.blocking(list).await?;
    let until = app.env.instant() + TURN;
    for (id, row) in due {
        if app.env.instant() > until {
            break;
        }
        if let Some(again_ms) = held_up.get(&row.room_id) {
            put_off(app, user, id, *again_ms).await?;
            continue;
        }
        if let Some(again_ms) = send_due(app, user, id, &row).await? {
            held_up.insert(row.room_id, again_ms);
        }
    }
    write::for_user(app, user, move |app, batch| {
        let now_ms = app.env.now_ms();
        delayed::forget_old(batch, user, now_ms)?;
        // Where the timer was moved meanwhile, by what was sent or by the user, the one that it has now is moved on.
        timer::fire(batch, &fired)?;
        // An event that is due already is one more than is sent at once.
        let next_ms = delayed::find_next_ms(batch, user)?.map(|next_ms| next_ms.max(now_ms + 1));
        Ok(delayed::set_timer(batch, user, next_ms)?)
    })
    .await
}

/// Sends an event that is due, or ends it where it is refused. Where the fault is not its user's, or they have done too much just now, it is
/// put off, until the time that is answered.
async fn send_due(app: &App, user: UserNum, id: String, row: &DelayedRow) -> Result<Option<u64>> {
    let why = match send_one(app, user, &id, true).await {
        Ok(_) => return Ok(None),
        Err(Error::Refused(why)) if !matches!(why.kind, ErrorKind::LimitExceeded(_)) => {
            tracing::debug!(%user, room = %row.room_id, reason = why.message, "a delayed event is refused");
            (why.kind.errcode().to_string(), why.message)
        }
        Err(why) => {
            let now_ms = app.env.now_ms();
            if now_ms < row.due_ms().saturating_add(GIVEN_UP_MS) {
                tracing::info!(%why, %user, room = %row.room_id, "a delayed event is tried again later");
                let again_ms = now_ms + AGAIN_MS;
                put_off(app, user, id, again_ms).await?;
                return Ok(Some(again_ms));
            }
            tracing::warn!(%why, %user, room = %row.room_id, "a delayed event is given up, because it could not be sent for long");
            ("M_UNKNOWN".to_owned(), "The event could not be sent for ten minutes.".to_owned())
        }
    };
    for_waiting(app, user, id, move |batch, id, row, now_ms| {
        let end = DelayedEnd { at_ms: now_ms, outcome: DelayedOutcome::Refused(why.0, why.1) };
        delayed::end(batch, user, id, row, end)
    })
    .await?;
    Ok(None)
}

async fn put_off(app: &App, user: UserNum, id: String, again_ms: u64) -> Result<()> {
    for_waiting(app, user, id, move |batch, id, row, _| delayed::put_off(batch, user, id, row, again_ms))
        .await
}

/// Changes an event that waits and is due, unless its user was faster.
async fn for_waiting(
    app: &App,
    user: UserNum,
    id: String,
    work: impl FnOnce(&mut Batch, &str, DelayedRow, u64) -> Result<(), Fault> + Send + 'static,
) -> Result<()> {
    write::for_user(app, user, move |app, batch| {
        let now_ms = app.env.now_ms();
        let row = delayed::find(batch, user, &id, now_ms)?;
        if let Some(row) = row.filter(|row| row.end.is_none() && row.due_ms() <= now_ms) {
            work(batch, &id, row, now_ms)?;
        }
        Ok(())
    })
    .await
}

#[cfg(test)]
mod tests;
