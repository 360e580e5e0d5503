//! Sends to push gateways: gives turns to pushers for which something may be due. A pusher has one request under way at a time, so that its
//! device hears of things in their order.

use std::{sync::Arc, time::Duration};

use federation::{
    json::Limits,
    web::{Options, Reply},
};

use crate::{
    delivery::gateways::{
        Owners,
        board::Work,
        lines::{Id, Lane},
        shared::{AGAIN_AFTER, Shared},
    },
    env::payer::{Payer, Payers},
    error::{Error, Result},
    ids::UserNum,
    push::{
        notice,
        plan::{self, Plan, Request},
    },
    schema::push::PusherPlace,
};

/// The bounds of a request. Where the head of the answer says that it was taken, the rest of the answer may be late.
const OPTIONS: Options =
    Options { begins: Duration::from_secs(20), body: Duration::from_secs(5), limits: Limits::DOCUMENT };
/// A gateway that takes longer than this over a request holds up no others any more.
const SLOW_AFTER: Duration = Duration::from_secs(3);
/// A pusher sends at most this many requests in one turn; then others come first.
const REQUESTS_A_TURN: usize = 10;
/// A reason is cut to this many characters, because the gateway may have a part in it.
const WHY_CHARACTERS_MAX: usize = 200;

/// Gives turns until the server ends.
pub(super) async fn give_turns(shared: Arc<Shared>, owners: Arc<dyn Owners>) {
    loop {
        let due_ms = loop {
            let mut board = shared.board.lock();
            let Some((id, lane, host)) = board.take_turn(shared.env.now_ms()) else {
                break board.next_due_ms();
            };
            let user = board.user_of(id);
            drop(board);
            let Some(user) = user else { continue };
            let place = Place { shared: Arc::clone(&shared), id, user, host, lane: Some(lane) };
            // The work for a pusher counts for its user, who chooses how many there are and how many rooms are looked at for each.
            let payers = Payers::one(Payer::User(user));
            payers.for_now(|| shared.env.spawn(take_turn(Arc::clone(&owners), place)));
        };
        match due_ms.map(|due_ms| due_ms.saturating_sub(shared.env.now_ms()).max(1)) {
            Some(wait_ms) => tokio::select! {
                biased;
                () = shared.turns.notified() => {}
                () = shared.env.sleep(Duration::from_millis(wait_ms)) => {}
            },
            None => shared.turns.notified().await,
        }
    }
}

/// A turn of a pusher. Its place among those that send is given back when it is dropped.
struct Place {
    shared: Arc<Shared>,
    id: Id,
    user: UserNum,
    host: String,
    /// None once the place was given back.
    lane: Option<Lane>,
}

impl Place {
    /// Moves a gateway that turns out to be slow to a place among the slow. Answers whether there is one.
    fn slow_down(&mut self) -> bool {
        if self.lane == Some(Lane::Quick) {
            self.lane = self.shared.board.lock().slow_down(&self.host);
            self.shared.turns.notify_one();
        }
        self.lane.is_some()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let place = self.lane.map(|lane| (lane, self.host.as_str()));
        let now_ms = self.shared.env.now_ms();
        self.shared.board.lock().rest(self.id, self.user, place, now_ms);
        self.shared.turns.notify_one();
    }
}

/// The end of a step.
enum Done {
    /// There may be more to do.
    More,
    /// The turn ends here.
    Enough,
}

async fn take_turn(owners: Arc<dyn Owners>, mut place: Place) {
    for _ in 0..REQUESTS_A_TURN {
        let now_ms = place.shared.env.now_ms();
        let Some(work) = place.shared.board.lock().begin(place.id, now_ms) else { return };
        match take_step(&*owners, &mut place, work).await {
            Ok(Done::More) => {}
            Ok(Done::Enough) => return,
            Err(error) => {
                tracing::warn!(%error, user = %place.user, "a notification could not be sent; it is tried again");
                note_failed(&place, &error.to_string(), Duration::ZERO);
                return;
            }
        }
        if place.lane != Some(Lane::Quick) {
            return;
        }
    }
}

async fn take_step(owners: &dyn Owners, place: &mut Place, work: Work) -> Result<Done> {
    let shared = Arc::clone(&place.shared);
    let mut known = work.place;
    if work.must_mark {
        let Some(marked) = mark(place).await? else { return Ok(Done::Enough) };
        known = marked;
    }
    let is_behind = work.wanted.items.is_none();
    let planned = loop {
        let (wanted, planner) = (work.wanted.clone(), Arc::clone(&shared));
        let planning = move || {
            let snapshot = planner.store.snapshot();
            Ok(plan::plan(&*snapshot, &planner.push, planner.env.now_ms(), &wanted)?)
        };
        match shared.env.blocking(planning).await {
            // The user's own requests take the user's share of the threads. That is not the gateway's fault.
            Err(Error::Busy { .. }) => shared.env.sleep(AGAIN_AFTER).await,
            planned => break planned?,
        }
    };
    match planned {
        Plan::Gone => {
            shared.board.lock().forget(place.id);
            Ok(Done::Enough)
        }
        Plan::Search(search) => {
            shared.board.lock().search_on(place.id, Some(search));
            Ok(Done::More)
        }
        Plan::Nothing { upto } if !is_behind => {
            shared.board.lock().dealt(place.id, upto, known, shared.env.now_ms());
            Ok(Done::More)
        }
        Plan::Nothing { upto } => {
            let next = {
                let mut board = shared.board.lock();
                board.search_on(place.id, None);
                board.next_place(place.id, upto, known.badge, true)
            };
            let Some(next) = next else { return Ok(Done::Enough) };
            move_on(place, &work, known, next).await
        }
        Plan::Send(request) => send(owners, place, &work, known, *request).await,
    }
}

/// Writes that a pusher is behind, before the reader's cursor goes on without it. `None` where the pusher was set anew or is gone.
async fn mark(place: &Place) -> Result<Option<PusherPlace>> {
    let shared = &place.shared;
    let (unmarked, key) = {
        let board = shared.board.lock();
        (board.unmarked(place.id), board.key_of(place.id))
    };
    let (Some((known, marked)), Some(key)) = (unmarked, key) else { return Ok(None) };
    if !shared.advance(key, known, marked).await? {
        set_anew(place, known).await?;
        return Ok(None);
    }
    shared.board.lock().marked(place.id, marked, shared.env.now_ms());
    Ok(Some(marked))
}

/// Writes that everything up to a place is dealt with.
async fn move_on(place: &Place, work: &Work, known: PusherPlace, next: PusherPlace) -> Result<Done> {
    let wanted = &work.wanted;
    let key = (wanted.user, wanted.app_id.clone(), wanted.pushkey.clone());
    if next != known && !place.shared.advance(key, known, next).await? {
        set_anew(place, known).await?;
        return Ok(Done::Enough);
    }
    place.shared.board.lock().dealt(place.id, next.upto, next, place.shared.env.now_ms());
    Ok(Done::More)
}

/// A pusher does not have the place any more that was known: it was set anew, or is gone.
async fn set_anew(place: &Place, known: PusherPlace) -> Result<()> {
    place.shared.reload(place.user).await?;
    let mut board = place.shared.board.lock();
    if board.has_place(place.id, known) {
        // Nothing is sent for it until its user sets it anew.
        tracing::warn!(user = %place.user, "a pusher has no place in the store");
        board.forget(place.id);
    }
    Ok(())
}

async fn send(
    owners: &dyn Owners,
    place: &mut Place,
    work: &Work,
    known: PusherPlace,
    request: Request,
) -> Result<Done> {
    let shared = Arc::clone(&place.shared);
    let payer = Some(place.user.0);
    let sending = shared.web.post(&request.url, request.json.clone(), OPTIONS, payer);
    tokio::pin!(sending);
    let sent = tokio::select! {
        biased;
        sent = &mut sending => Some(sent),
        () = shared.env.sleep(SLOW_AFTER) => None,
    };
    let sent = match sent {
        Some(sent) => sent,
        None if place.slow_down() => sending.await,
        None => {
            note_failed(place, "it was slow while too many others were", Duration::ZERO);
            finish_failed(place).await?;
            return Ok(Done::Enough);
        }
    };
    let reply = match sent {
        Ok(reply) if reply.status.is_success() => reply,
        Ok(reply) => {
            let wait = Duration::from_secs(reply.retry_after_s.unwrap_or(0));
            note_failed(place, &format!("it answered {}", reply.status.as_u16()), wait);
            finish_failed(place).await?;
            return Ok(Done::Enough);
        }
        Err(error) => {
            note_failed(place, &error.to_string(), Duration::ZERO);
            finish_failed(place).await?;
            return Ok(Done::Enough);
        }
    };
    shared.metrics.pushed(true);
    if shared.board.lock().is_back(place.id) {
        tracing::debug!(user = %place.user, host = place.host, "a push gateway takes notifications again");
    }
    if is_rejected(&reply, &work.wanted.pushkey) {
        tracing::info!(user = %place.user, host = place.host, "a push gateway does not know a pusher any more, which is deleted");
        let (app_id, pushkey) = (work.wanted.app_id.clone(), work.wanted.pushkey.clone());
        owners.delete_rejected(place.user, app_id, pushkey, request.row).await?;
        shared.reload(place.user).await?;
        return Ok(Done::Enough);
    }
    let next = {
        let mut board = shared.board.lock();
        board.search_on(place.id, request.search);
        board.next_place(place.id, request.upto, request.badge, false)
    };
    let Some(next) = next else { return Ok(Done::Enough) };
    // The next request waits until this place is durable, so that a crash repeats no more than one.
    move_on(place, work, known, next).await
}

fn is_rejected(reply: &Reply, pushkey: &str) -> bool {
    let answer = reply.answer.as_ref().map(|answer| notice::read_rejected(answer.bytes()));
    answer.unwrap_or_default().iter().any(|rejected| rejected == pushkey)
}

fn note_failed(place: &Place, why: &str, at_least: Duration) {
    let shared = &place.shared;
    shared.metrics.pushed(false);
    let (now_ms, random) = (shared.env.now_ms(), shared.env.random_below(u64::MAX));
    let at_least_ms = u64::try_from(at_least.as_millis()).unwrap_or(u64::MAX);
    let failing = shared.board.lock().failed(place.id, now_ms, (random, at_least_ms));
    let why: String = why.chars().filter(|it| !it.is_control()).take(WHY_CHARACTERS_MAX).collect();
    let failures = failing.map_or(0, |failing| failing.failures);
    tracing::debug!(user = %place.user, host = place.host, why, failures, "a push gateway does not take a notification; it is tried again later");
}

/// Writes that the pusher is behind, if that is not written yet.
async fn finish_failed(place: &Place) -> Result<()> {
    if place.shared.board.lock().unmarked(place.id).is_some() {
        mark(place).await?;
    }
    Ok(())
}
