//! Sends to servers: gives turns to those for which something waits, and goes on with each until nothing does.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use federation::{
    call::{Failure, Lane as CallLane, Options},
    json::{Json, Limits},
    ports::NotSent,
    queue::{Action, Pdu, SUBJECTS_AT_ONCE},
};
use http::{Method, Request, header};
use ruma::OwnedServerName;

use crate::{
    accounts::users,
    delivery::servers::{
        board::{Lane, Step},
        catch_up,
        edus::{self, Edu},
        marks,
        outbox::{self, JsonOfEdu},
        outboxes::Sender,
        shared::Shared,
        subject::Subject,
        transaction::{BYTES_MAX, JsonOfPdu, News, Transaction, part},
    },
    encryption::device_lists,
    error::Result,
    ids::{Order, Position},
    schema::{self, remote::DestinationRow},
    store::{Fault, Guard, Snapshot},
};

/// A server that is quick gets this many transactions in one turn, and any other one; then others come first.
const TRANSACTIONS_A_TURN: usize = 20;
/// A server that takes longer than this over a transaction holds up no others any more.
const SLOW_AFTER: Duration = Duration::from_secs(5);
/// The whole of sending one transaction takes at most this long.
const SENDING_MAX: Duration = Duration::from_secs(60);
/// A transaction is sent again under its id after this time, where the connection broke or somebody is busy.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// A server that asks us to wait for at most this long gets the same transaction again then.
const WAITED_FOR_MAX: Duration = Duration::from_secs(10);
/// A transaction is sent at most this many times under its id.
const SENT_MAX: u32 = 3;
/// A reason is cut to this many characters, because another server may have a part in it.
const WHY_CHARACTERS_MAX: usize = 300;

/// Gives turns until the server ends.
pub(super) async fn give_turns(shared: Arc<Shared>) {
    loop {
        let due_ms = loop {
            let now_ms = shared.env.now_ms();
            let mut board = shared.board.lock();
            let Some((server, lane)) = board.take_turn(now_ms) else { break board.next_due_ms() };
            drop(board);
            let place = Place { shared: Arc::clone(&shared), lane: Some(lane) };
            shared.env.spawn(take_turn(Arc::clone(&shared), server, place));
        };
        let wait = due_ms.map(|due_ms| due_ms.saturating_sub(shared.env.now_ms()).max(1));
        // Nothing is due while no place is free: whoever gives one back tells.
        match wait {
            Some(wait_ms) => tokio::select! {
                biased;
                () = shared.turns.notified() => {}
                () = shared.env.sleep(Duration::from_millis(wait_ms)) => {}
            },
            None => shared.turns.notified().await,
        }
    }
}

/// A place among those that send, given back when it is dropped.
struct Place {
    shared: Arc<Shared>,
    /// None once the place was given back.
    lane: Option<Lane>,
}

impl Place {
    /// Moves a server that turns out to be slow to a place among the slow. Errors: [`NotTaken`] where there is none.
    fn slow_down(&mut self, server: &OwnedServerName) -> Result<(), NotTaken> {
        let Some(lane) = self.lane else { return Ok(()) };
        self.lane = self.shared.board.lock().slow_down(server, lane);
        self.shared.turns.notify_one();
        if self.lane.is_some() {
            return Ok(());
        }
        let why = "it was slow while too many others were".to_owned();
        Err(NotTaken { why, at_least: Duration::ZERO })
    }

    /// Whether the server was quick until now.
    fn is_quick(&self) -> bool {
        matches!(self.lane, Some(Lane::Sending | Lane::Fresh))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(lane) = self.lane {
            self.shared.board.lock().leave(lane);
        }
        self.shared.turns.notify_one();
    }
}

async fn take_turn(shared: Arc<Shared>, server: OwnedServerName, mut place: Place) {
    for _ in 0..TRANSACTIONS_A_TURN {
        let now_ms = shared.env.now_ms();
        let step = shared.board.lock().next(&server, now_ms);
        let done = match step {
            Step::Rest { is_back } => {
                if is_back {
                    is_told_back(&shared, &server);
                }
                return;
            }
            Step::Do(Action::Send { pdus, edus, outbox_max }) => {
                send(&shared, &server, &mut place, (pdus, edus, outbox_max)).await
            }
            Step::Do(Action::CatchUp) => bring_up_to_date(&shared, &server, &mut place).await,
            Step::Do(Action::Nothing | Action::WaitUntil(_)) => return,
        };
        match done {
            Ok(is_back) => {
                if is_back {
                    is_told_back(&shared, &server);
                }
                if !place.is_quick() {
                    break;
                }
            }
            Err(why) => {
                fail(&shared, &server, why).await;
            }
        }
    }
    shared.board.lock().step_back(&server);
    shared.turns.notify_one();
}

fn is_told_back(shared: &Shared, server: &OwnedServerName) {
    tracing::info!(%server, "another server answers again");
    if let Err(error) = shared.note_back(server) {
        tracing::warn!(%error, %server, "it could not be noted that another server answers again");
    }
}

/// Why a server did not take what was sent, and for how long it asks to be left alone.
struct NotTaken {
    why: String,
    at_least: Duration,
}

impl From<crate::error::Error> for NotTaken {
    fn from(error: crate::error::Error) -> Self {
        Self { why: error.to_string(), at_least: Duration::ZERO }
    }
}

/// Marks what a server misses, and notes that it does not answer.
async fn fail(shared: &Arc<Shared>, server: &OwnedServerName, not_taken: NotTaken) {
    let (owned, server) = (Arc::clone(shared), server.clone());
    let noted = shared.env.blocking(move || {
        let now_ms = owned.env.now_ms();
        let jitter = owned.env.random_below(u64::MAX);
        let at_least_ms = u64::try_from(not_taken.at_least.as_millis()).unwrap_or(u64::MAX);
        owned.metrics.server_failed();
        let mut board = owned.board.lock();
        let failing = board.failed(&server, now_ms, (jitter, at_least_ms));
        owned.write_marks(&mut board);
        drop(board);
        let wait_s = failing.next_try_ms.saturating_sub(now_ms) / 1000;
        let why: String = not_taken.why.chars().take(WHY_CHARACTERS_MAX).collect();
        if failing.failures == 1 {
            tracing::info!(%server, why, wait_s, "another server does not take what happens here; it is tried again later");
        } else {
            tracing::debug!(%server, why, wait_s, failures = failing.failures, "another server still does not answer");
        }
        owned.note_failing(&server, DestinationRow { failing, why })?;
        forget_old(&owned, &server, now_ms)
    });
    if let Err(error) = noted.await {
        tracing::warn!(%error, "it could not be noted that another server does not answer");
    }
}

/// Deletes messages that have waited for too long for a server that does not answer.
fn forget_old(shared: &Shared, server: &OwnedServerName, now_ms: u64) -> Result<()> {
    if !shared.outboxes.lock().has(server.as_str()) {
        return Ok(());
    }
    let mut note = shared.store.note(&Guard::own_tables());
    let gone = outbox::forget_old(&mut note, &*shared.store.snapshot(), server.as_str(), now_ms)?;
    if !gone.is_empty() {
        drop(shared.store.enqueue_note(note)?);
        let count = gone.len();
        shared.count_outbox(server.as_str(), gone);
        shared.metrics.to_device_dropped("server_away", count);
        tracing::info!(%server, count, "messages for devices of another server are dropped: it did not answer for 30 days");
    }
    Ok(())
}

/// Sends what waits for a server. Tells whether the server counted as failing until now.
async fn send(
    shared: &Arc<Shared>,
    server: &OwnedServerName,
    place: &mut Place,
    (kept, edus, outbox_max): (Vec<Pdu<Subject, Position>>, Vec<Edu>, usize),
) -> Result<bool, NotTaken> {
    let (owned, to) = (Arc::clone(shared), server.clone());
    let load = move || {
        let snapshot = owned.store.snapshot();
        let keys = kept.iter().filter_map(|kept| match kept.subject {
            Subject::Room(room) => Some((room, Order::live(kept.place))),
            Subject::Devices(_) => None,
        });
        // An event that is not there any more was purged, with all that would need it. One whose lifetime is over is told to nobody.
        let rows = schema::TIMELINE.get_many(&*snapshot, keys)?;
        let rows = rows.into_iter().flatten().filter(|row| !row.header.expired);
        let pdus: Vec<_> = rows.map(|row| JsonOfPdu(row.json)).collect();
        let after = owned.board.lock().outbox_upto(&to);
        let waiting = outbox::list(&*snapshot, to.as_str(), after, outbox_max, BYTES_MAX)?;
        // Devices come before the messages that they send, so that these can be verified.
        let mut news = list_updates(&snapshot, &kept)?;
        news.extend(edus.into_iter().map(|edu| News { json: JsonOfEdu(edu.json.into()), outbox: None }));
        news.extend(waiting.into_iter().map(|it| News { json: it.json, outbox: Some(it.position) }));
        Ok(part(pdus, news))
    };
    let transactions = shared.env.blocking(load).await?;
    send_all(shared, server, place, transactions).await?;
    if !shared.outboxes.lock().has(server.as_str()) {
        return Ok(shared.board.lock().succeeded(server, false));
    }
    let (owned, to) = (Arc::clone(shared), server.clone());
    let look = move || {
        // Messages are offered once they are published: those that come after this look say so themselves.
        let mut board = owned.board.lock();
        let after = board.outbox_upto(&to);
        let waiting = outbox::list(&*owned.store.snapshot(), to.as_str(), after, 1, BYTES_MAX)?;
        Ok(board.succeeded(&to, !waiting.is_empty()))
    };
    Ok(shared.env.blocking(look).await?)
}

/// Lists the changes of devices among what is sent, in their order. Of a user whose changes are not remembered any more, the newest
/// one is sent once.
fn list_updates(snapshot: &Snapshot, kept: &[Pdu<Subject, Position>]) -> Result<Vec<News>, Fault> {
    let (mut updates, mut told) = (Vec::new(), BTreeSet::new());
    for kept in kept {
        let Subject::Devices(user) = kept.subject else { continue };
        let Some(account) = users::find(snapshot, user)? else { continue };
        let Some(update) = device_lists::find_update(snapshot, (user, &account.user_id), kept.place)? else {
            continue;
        };
        if told.insert((user, update.stream_id)) {
            let of_update = edus::of_update(&account.user_id, &update).into_iter();
            updates.extend(of_update.map(|json| News { json: JsonOfEdu(json), outbox: None }));
        }
    }
    Ok(updates)
}

/// Brings a server up to date in some of what is marked. Tells whether the server counted as failing until now.
async fn bring_up_to_date(
    shared: &Arc<Shared>,
    server: &OwnedServerName,
    place: &mut Place,
) -> Result<bool, NotTaken> {
    let (owned, to) = (Arc::clone(shared), server.clone());
    let plan = move || {
        let mut board = owned.board.lock();
        owned.write_marks(&mut board);
        if board.has_unwritten(&to) {
            return Err(crate::error::Error::Busy { retry_after: AGAIN_AFTER });
        }
        // The marks are read over all that is accepted, and every event that they mark is published.
        let marked = catch_up::list_marks(&owned.store.view(), &to, SUBJECTS_AT_ONCE)?;
        drop(board);
        let snapshot = owned.store.snapshot();
        Ok(catch_up::plan(
            &snapshot,
            &owned.client,
            (&owned.us, &to),
            &marked,
            SUBJECTS_AT_ONCE,
            owned.env.now_ms(),
        )?)
    };
    let step = shared.env.blocking(plan).await?;
    tracing::debug!(%server, marks = step.subjects.len(), events = step.events.len(), "another server is brought up to date");
    send_all(shared, server, place, part(step.events, step.updates)).await?;
    let (owned, to) = (Arc::clone(shared), server.clone());
    let note = move || {
        // Nothing is offered meanwhile, so that no new mark is taken away with the old ones.
        let mut board = owned.board.lock();
        let are_gone = marks::forget(&owned.store, to.as_str(), &step.subjects);
        if let Err(why) = &are_gone {
            tracing::warn!(?why, server = %to, "marks of another server could not be taken away; it is told again");
        }
        let is_back = board.caught_up(&to, step.are_left || are_gone.is_err());
        owned.write_marks(&mut board);
        Ok(is_back)
    };
    Ok(shared.env.blocking(note).await?)
}

async fn send_all(
    shared: &Arc<Shared>,
    server: &OwnedServerName,
    place: &mut Place,
    transactions: Vec<Transaction>,
) -> Result<(), NotTaken> {
    for transaction in transactions {
        let sending = send_one(shared, server, &transaction);
        tokio::pin!(sending);
        let sent = tokio::select! {
            biased;
            sent = &mut sending => Some(sent),
            () = shared.env.sleep(SLOW_AFTER) => None,
        };
        match sent {
            Some(sent) => {
                sent?;
                shared.board.lock().was_quick(server);
            }
            None => {
                place.slow_down(server)?;
                sending.await?;
            }
        }
        shared.metrics.told_server(transaction.pdus.len(), transaction.edus.len());
        forget_outbox(shared, server, &transaction).await?;
    }
    Ok(())
}

/// Deletes messages of the outbox that their server has taken.
async fn forget_outbox(
    shared: &Arc<Shared>,
    server: &OwnedServerName,
    transaction: &Transaction,
) -> Result<()> {
    let positions = transaction.outbox();
    let Some(last) = positions.last().copied() else { return Ok(()) };
    shared.board.lock().took_outbox(server, last);
    let gone = transaction.edus.iter().filter(|edu| edu.outbox.is_some());
    let gone: Vec<_> = gone.map(|edu| edu.json.0.clone()).collect();
    let (owned, server) = (Arc::clone(shared), server.clone());
    let delete = move || {
        let gone = gone.iter().map(|json| (Sender::of_message(json), json.len())).collect();
        owned.count_outbox(server.as_str(), gone);
        let mut note = owned.store.note(&Guard::own_tables());
        outbox::delete(&mut note, server.as_str(), &positions);
        // If the note is lost, the messages are sent again, and the other server knows them by their ids.
        drop(owned.store.enqueue_note(note)?);
        Ok(())
    };
    shared.env.blocking(delete).await
}

/// Sends a transaction. What a server refuses for good while it takes the rest is not sent again.
async fn send_one(
    shared: &Shared,
    server: &OwnedServerName,
    transaction: &Transaction,
) -> Result<(), NotTaken> {
    match put(shared, server, transaction).await {
        Err(NotPut { judged: Judged::Refused, failure }) => {
            tracing::debug!(%server, %failure, "a transaction is refused, and is sent in parts");
            send_in_parts(shared, server, transaction).await
        }
        Err(NotPut { judged: Judged::Dropped, failure }) => {
            tracing::warn!(%server, %failure, "another server is told nothing of what happens here");
            Ok(())
        }
        other => other.map_err(NotTaken::from),
    }
}

/// Finds out what of a transaction a server refuses, by halves, and has it take the rest. A server, or a proxy before it, that also
/// refuses a transaction without anything in it, refuses whatever comes: that says nothing of what is in it, and all is sent later.
async fn send_in_parts(
    shared: &Shared,
    server: &OwnedServerName,
    transaction: &Transaction,
) -> Result<(), NotTaken> {
    put(shared, server, &Transaction::default()).await?;
    let mut waiting: Vec<Transaction> = transaction.halves().into_iter().flatten().rev().collect();
    if waiting.is_empty() {
        tracing::warn!(%server, "another server refuses something that happens here; it is not sent again");
    }
    while let Some(part) = waiting.pop() {
        match (put(shared, server, &part).await, part.halves()) {
            (Err(NotPut { judged: Judged::Refused, .. }), Some(halves)) => {
                waiting.extend(halves.into_iter().rev());
            }
            (Err(NotPut { judged: Judged::Refused, failure }), None) => {
                tracing::warn!(%server, %failure, pdus = part.pdus.len(), edus = part.edus.len(), "another server refuses something that happens here; it is not sent again");
            }
            (put, _) => put?,
        }
    }
    Ok(())
}

/// The reason why a transaction was not taken, and how to go on.
struct NotPut {
    judged: Judged,
    failure: Failure,
}

impl From<NotPut> for NotTaken {
    fn from(NotPut { judged, failure }: NotPut) -> Self {
        let at_least = match judged {
            Judged::Again(at_least) | Judged::Failed(at_least) => at_least,
            Judged::Refused | Judged::Dropped => Duration::ZERO,
        };
        Self { why: failure.to_string(), at_least }
    }
}

/// Sends a transaction, again under its id where that may help at once.
async fn put(shared: &Shared, server: &OwnedServerName, transaction: &Transaction) -> Result<(), NotPut> {
    let id = shared.transaction_id();
    let body = transaction.body(&shared.us, shared.env.now_ms());
    let options = Options {
        begins: SENDING_MAX,
        overall: SENDING_MAX,
        limits: Limits::DOCUMENT,
        lane: CallLane::Deliveries,
    };
    let mut sent = 0;
    loop {
        sent += 1;
        let request = Request::builder()
            .method(Method::PUT)
            .uri(format!("/_matrix/federation/v1/send/{id}"))
            .header(header::CONTENT_TYPE, "application/json")
            .body(body.clone());
        let request = request.map_err(|error| Failure::BadRequest(error.to_string()));
        let sending = async { shared.client.send_signed(server, request?, options).await };
        let failure = match sending.await {
            Ok(reply) => match Json::parse(reply.answer.bytes()) {
                Ok(answer @ Json::Object(_)) => {
                    log_refused(server, &answer);
                    return Ok(());
                }
                // Nothing was taken in by what answered this: it is no homeserver, perhaps a proxy before one.
                _ => Failure::Nonsense("the answer to a transaction is no JSON object".to_owned()),
            },
            Err(failure) => failure,
        };
        match judge(&failure) {
            Judged::Again(after) if sent < SENT_MAX => shared.env.sleep(after).await,
            judged => return Err(NotPut { judged, failure }),
        }
    }
}

/// How to go on after a failure.
#[derive(Debug, PartialEq, Eq)]
enum Judged {
    /// Send the same once more after this time.
    Again(Duration),
    /// The server is away, and is left alone for at least this long.
    Failed(Duration),
    /// The server refuses this. Perhaps it takes a part of it, or refuses all for now.
    Refused,
    /// We may not, or cannot, send this.
    Dropped,
}

fn judge(failure: &Failure) -> Judged {
    match failure {
        Failure::Busy | Failure::Unreachable(NotSent::Broken(_)) => Judged::Again(AGAIN_AFTER),
        Failure::Refused { status, retry_after_ms, .. } => {
            let asked = retry_after_ms.map(Duration::from_millis);
            match (status.as_u16(), asked) {
                (429, Some(asked)) if asked <= WAITED_FOR_MAX => Judged::Again(asked.max(AGAIN_AFTER)),
                (502..=504, None) => Judged::Again(AGAIN_AFTER),
                // A signature that is not right may be the doing of one thing in the transaction, which the other server reads in
                // another way; if all is refused, the transaction without anything is, too.
                (401, None) => Judged::Refused,
                (401 | 403 | 404 | 405 | 408 | 429 | 500..=599, asked) => {
                    Judged::Failed(asked.unwrap_or_default())
                }
                (_, Some(asked)) => Judged::Failed(asked),
                (_, None) => Judged::Refused,
            }
        }
        Failure::NotAllowed { .. } | Failure::BadRequest(_) => Judged::Dropped,
        Failure::NotFound(_) | Failure::Unreachable(_) | Failure::TimedOut | Failure::Nonsense(_) => {
            Judged::Failed(Duration::ZERO)
        }
    }
}

/// Logs which events another server did not take. That is its right, and mostly no fault of ours.
fn log_refused(server: &OwnedServerName, answer: &Json) {
    if !tracing::enabled!(tracing::Level::DEBUG) {
        return;
    }
    let outcomes = answer.field("pdus").and_then(Json::as_object);
    for (event, outcome) in outcomes.into_iter().flatten() {
        if let Some(why) = outcome.field("error").and_then(Json::as_text) {
            let why: String = why.chars().filter(|it| !it.is_control()).take(WHY_CHARACTERS_MAX).collect();
            tracing::debug!(%server, event, why, "another server does not take an event");
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn refused(status: u16, retry_after_ms: Option<u64>) -> Failure {
        let status = http::StatusCode::from_u16(status).unwrap();
        let (errcode, message, body) = (None, String::new(), Bytes::new());
        Failure::Refused { status, errcode, message, retry_after_ms, body }
    }

    #[test]
    fn a_server_that_refuses_something_is_not_away() {
        for status in [400, 401, 410, 413, 421] {
            assert_eq!(judge(&refused(status, None)), Judged::Refused, "{status}");
        }
        for status in [403, 404, 500] {
            assert_eq!(judge(&refused(status, None)), Judged::Failed(Duration::ZERO), "{status}");
        }
        assert_eq!(judge(&Failure::TimedOut), Judged::Failed(Duration::ZERO));
    }

    #[test]
    fn a_server_that_is_busy_gets_the_same_again_when_it_wants() {
        assert_eq!(judge(&refused(429, Some(3_000))), Judged::Again(Duration::from_secs(3)));
        assert_eq!(judge(&refused(429, Some(60_000))), Judged::Failed(Duration::from_secs(60)));
        assert_eq!(judge(&refused(503, None)), Judged::Again(AGAIN_AFTER));
        let broken = Failure::Unreachable(NotSent::Broken("reset".to_owned()));
        assert_eq!(judge(&broken), Judged::Again(AGAIN_AFTER));
    }
}
