//! The worker that mails digests, one after the other. A mail server that has a mail and does not say whether it takes it is waited for beside the
//! next ones.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};

use crate::{
    delivery::mail::{
        Accounts,
        board::{Board, Due, Key},
        compose::{self, Letterhead},
        smtp::{NotTaken, Smtp},
    },
    env::Env,
    error::{Error, Result},
    metrics::Metrics,
    push::{
        Push,
        digest::{self, Ask, Digest, Plan},
        mailboxes::{self, Standing},
    },
    schema::email::MailboxRow,
    store::{Enqueued, Guard, NotAccepted, Store},
};

/// A write that the store puts off is tried again after this time.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// An address that was refused is tried again after this time, and after more each time.
const REFUSED_AGAIN_MS: u64 = 60 * 60 * 1_000;
/// It is tried again at least this often.
const REFUSED_AGAIN_MOST_MS: u64 = 24 * 60 * 60 * 1_000;
/// After this many refusals in a row, which take two days, the pusher ends.
const REFUSALS_MAX: u32 = 6;
/// A reason is cut to this many characters, because the mail server may have a part in it.
const WHY_CHARACTERS_MAX: usize = 200;
/// At most this many mails are under way, all but one of them waiting for the mail server to say whether it takes them.
const UNDER_WAY_MAX: usize = 16;

/// The part that all who mail share.
pub(super) struct Shared {
    pub(super) env: Env,
    pub(super) store: Store,
    pub(super) metrics: Metrics,
    pub(super) push: Push,
    pub(super) smtp: Smtp,
    pub(super) letterhead: Letterhead,
    /// For how long a notification waits to be read, where its user has not said otherwise, in milliseconds.
    pub(super) delay_ms: u64,
    pub(super) board: Mutex<Board>,
    /// Tells that a pusher is to be looked at sooner than before.
    pub(super) turns: Notify,
}

/// Mails what is due until the server ends.
pub(super) async fn work(shared: Arc<Shared>, accounts: Arc<dyn Accounts>) {
    let places = Arc::new(Semaphore::new(UNDER_WAY_MAX));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let now_ms = shared.env.now_ms();
        let (taken, due_ms) = {
            let mut board = shared.board.lock();
            (board.take(now_ms), board.next_due_ms())
        };
        if let Some(due) = taken {
            let key = due.key.clone();
            if let Err(error) = take_step(&shared, &accounts, due, place).await {
                failed(&shared, &key, &error);
            }
            continue;
        }
        match due_ms {
            Some(due_ms) => tokio::select! {
                biased;
                () = shared.turns.notified() => {}
                () = shared.env.sleep(Duration::from_millis(due_ms.saturating_sub(now_ms).max(1))) => {}
            },
            None => shared.turns.notified().await,
        }
    }
}

fn failed(shared: &Shared, key: &Key, error: &Error) {
    tracing::warn!(%error, user = %key.0, "a digest could not be mailed; it is tried again");
    put_off(shared, key);
}

fn put_off(shared: &Shared, key: &Key) {
    let (now_ms, random) = (shared.env.now_ms(), shared.env.random_below(u64::MAX));
    shared.board.lock().put_off(key, now_ms, random);
}

async fn take_step(
    shared: &Arc<Shared>,
    accounts: &Arc<dyn Accounts>,
    Due { key, seen, search }: Due,
    place: OwnedSemaphorePermit,
) -> Result<()> {
    let (user, app_id, pushkey) = key.clone();
    let (delay_ms, now_ms) = (shared.delay_ms, shared.env.now_ms());
    let ask = Ask { user, app_id, pushkey, delay_ms, seen, now_ms, search };
    let planner = Arc::clone(shared);
    let planning = move || Ok(digest::plan(&*planner.store.snapshot(), &planner.push, &ask)?);
    match shared.env.blocking(planning).await? {
        Plan::Gone => shared.board.lock().gone(&key),
        Plan::Nothing { seen } => {
            let mut board = shared.board.lock();
            board.saw(&key, seen);
            board.looked_at(&key, now_ms);
        }
        Plan::Later { due_ms } => {
            let mut board = shared.board.lock();
            board.look_later(&key, due_ms);
            board.looked_at(&key, now_ms);
        }
        Plan::Search(search) => shared.board.lock().search_on(&key, search, now_ms),
        Plan::Send(digest) => {
            {
                let mut board = shared.board.lock();
                board.depart(&key);
                board.looked_at(&key, now_ms);
            }
            let (mut turn, passed) = {
                let (turn, passed) = oneshot::channel();
                (Some(turn), passed)
            };
            let (sender, accounts) = (Arc::clone(shared), Arc::clone(accounts));
            shared.env.spawn(async move {
                if let Err(error) = send(&sender, &*accounts, (&key, &digest), &mut turn).await {
                    failed(&sender, &key, &error);
                }
                sender.board.lock().landed(&key);
                sender.turns.notify_one();
                drop((turn, place));
            });
            // The next mail waits until this one was taken or refused, or the mail server takes its time. It is no matter how that ends.
            let _ended = passed.await;
        }
    }
    Ok(())
}

/// Sends a digest. Drops the turn where the next one need not wait.
async fn send(
    shared: &Arc<Shared>,
    accounts: &dyn Accounts,
    (key, digest): (&Key, &Digest),
    turn: &mut Option<oneshot::Sender<()>>,
) -> Result<()> {
    let written = compose::write(&shared.letterhead, digest, shared.env.now_ms());
    let (address, mail) =
        written.map_err(|error| Error::broken(format!("a mail cannot be written: {}", error.0)))?;
    let taken = shared.smtp.send(&address, &mail, || drop(turn.take())).await;
    shared.metrics.mailed(taken.is_ok());
    match taken {
        Ok(()) => {
            works(shared);
            if shared.board.lock().taken() {
                tracing::info!("the mail server takes mails again");
            }
            // The next mail waits until this place is durable, so that a crash repeats no more than one.
            advance(shared, key, &digest.known, &digest.next).await?;
            shared.board.lock().sent(key);
        }
        Err(NotTaken::Server(why)) => {
            let (now_ms, random) = (shared.env.now_ms(), shared.env.random_below(u64::MAX));
            let failing = shared.board.lock().server_failed(key, now_ms, random);
            let (why, failures) = (short(&why), failing.failures);
            // Nobody is mailed meanwhile, so that the operator is told; but once, and not each time.
            if failures == 1 {
                tracing::warn!(
                    why,
                    "the mail server does not take mails; it is tried again, ever more seldom"
                );
            } else {
                tracing::debug!(why, failures, "the mail server still does not take mails");
            }
        }
        Err(NotTaken::Later(why)) => {
            works(shared);
            tracing::debug!(user = %key.0, why = short(&why), "a digest was put off by the mail server");
            put_off(shared, key);
        }
        Err(NotTaken::Unsure(why)) => {
            works(shared);
            let is_again = shared.board.lock().is_unsure_again(key);
            let why = short(&why);
            tracing::debug!(user = %key.0, why, is_again, "the mail server has a digest and does not say whether it takes it");
            if is_again {
                // It may have been taken both times: once more would be worse than none.
                advance(shared, key, &digest.known, &digest.next).await?;
                shared.board.lock().sent(key);
            } else {
                put_off(shared, key);
            }
        }
        Err(NotTaken::Refused(why)) => {
            works(shared);
            refused(shared, accounts, key, digest, &short(&why)).await?;
        }
    }
    Ok(())
}

fn works(shared: &Shared) {
    if shared.board.lock().server_works() {
        tracing::info!("the mail server takes mails again");
    }
}

fn short(why: &str) -> String {
    why.chars().filter(|it| !it.is_control()).take(WHY_CHARACTERS_MAX).collect()
}

/// The mail server says that it will never take a mail for an address. It may be mistaken, so that it is asked a few times more; and a server that
/// takes no mail for anybody says nothing of this address.
async fn refused(
    shared: &Arc<Shared>,
    accounts: &dyn Accounts,
    key: &Key,
    digest: &Digest,
    why: &str,
) -> Result<()> {
    let refusal = shared.board.lock().refused(key);
    if refusal.is_news {
        tracing::warn!(
            "the mail server refuses one address after the other, and takes none; reasons are told at debug"
        );
    }
    if !refusal.counts {
        tracing::debug!(user = %key.0, why, "the mail server refuses an address, and has taken no other mail since it did so before");
        put_off(shared, key);
        return Ok(());
    }
    let refusals = digest.known.row.refusals.saturating_add(1);
    if refusals >= REFUSALS_MAX {
        // The words of the mail server are not told here, because the address stands in them.
        tracing::info!(user = %key.0, refusals, "an address takes no mail, and its pusher is deleted");
        let (user, app_id, pushkey) = key.clone();
        if accounts.delete_refused(user, app_id, pushkey, digest.pusher.clone()).await? {
            shared.board.lock().gone(key);
        } else {
            // It was set anew meanwhile, and the log may have said so already.
            shared.board.lock().look_later(key, shared.env.now_ms());
        }
        return Ok(());
    }
    let wait_ms = REFUSED_AGAIN_MS.saturating_mul(1 << refusals.min(16)).min(REFUSED_AGAIN_MOST_MS);
    let not_before_ms = shared.env.now_ms().saturating_add(wait_ms);
    tracing::debug!(user = %key.0, why, refusals, "the mail server refuses an address; it is tried again later");
    let row = MailboxRow { refusals, not_before_ms, ..digest.known.row.clone() };
    advance(shared, key, &digest.known, &Standing { row, ..digest.known.clone() }).await?;
    shared.board.lock().look_later(key, not_before_ms);
    Ok(())
}

/// Writes where a pusher stands, and waits until that is durable. Nothing is written where it was set anew or deleted meanwhile.
async fn advance(shared: &Arc<Shared>, key: &Key, known: &Standing, to: &Standing) -> Result<()> {
    loop {
        let writer = Arc::clone(shared);
        let (key, known, to) = (key.clone(), known.clone(), to.clone());
        match shared.env.blocking(move || enqueue(&writer, &key, &known, &to)).await {
            Ok(None) => return Ok(()),
            Ok(Some(enqueued)) => {
                return enqueued.flushed.await.map_err(|_| Error::broken("where a pusher stands is lost"));
            }
            Err(Error::Busy { .. }) => shared.env.sleep(AGAIN_AFTER).await,
            Err(error) => return Err(error),
        }
    }
}

fn enqueue(shared: &Shared, key: &Key, known: &Standing, to: &Standing) -> Result<Option<Enqueued>> {
    let (user, app_id, pushkey) = key;
    let guard = Guard::own_tables();
    let mut batch = shared.store.batch(&guard);
    if !mailboxes::advance(&mut batch, (*user, app_id, pushkey), known, to)? {
        return Ok(None);
    }
    match shared.store.enqueue(batch) {
        Ok(enqueued) => Ok(Some(enqueued)),
        Err(NotAccepted::Conflict(_)) => Ok(None),
        Err(other) => Err(other.into()),
    }
}
