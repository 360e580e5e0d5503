//! `/sync` waits, collects what is new, and shapes the answer. A poll subscribes first and then looks over one
//! snapshot; when nothing is new, it sleeps until its user is woken.
//!
//! `changes` finds what changed, `collect` and `streams` turn it into typed news (of each room from a place of its
//! own), and `shape` writes the news as JSON; `look` runs these steps for one answer of `/sync`.

mod ask;
mod changes;
mod collect;
pub mod connections;
mod deprecated;
pub mod ephemeral;
mod filter;
mod key_changes;
mod look;
pub mod notifier;
mod places;
mod pos;
mod sent;
mod shape;
mod shares;
pub mod sliding;
mod streams;
pub mod token;
mod window;

pub use ask::Ask;
pub use deprecated::{MESSAGES_DEFAULT, StreamWanted};
pub use ephemeral::Ephemeral;
pub use filter::Relations;
pub use look::Answered;
pub use notifier::Notifier;
pub use pos::Pos;
pub use sliding::ask::SlidingAsk;
pub(crate) use streams::subscriptions;
pub use token::SyncToken;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use ruma::api::{client::filter::FilterDefinition, error::ErrorKind};
use tokio_util::sync::CancellationToken;

use crate::{
    accounts::{Caller, tokens},
    env::{Env, payer},
    error::{Refusal, Result},
    ids::Position,
    push::Push,
    store::{Read, Snapshot, Store},
    sync::{
        connections::{Connection, Update},
        filter::Filter,
        places::Places,
        sent::SentMembers,
        sliding::{facts::Facts, look::Slid},
        window::{Around, Moment, Window},
    },
};

/// A poll waits at most this long, whatever timeout the client asks for.
pub const POLL_MAX: Duration = Duration::from_secs(120);

/// Refuses a filter that costs too much: 400 `M_INVALID_PARAM`.
pub fn check_filter(definition: &FilterDefinition, relations: Relations) -> Result<(), Refusal> {
    Filter::new(definition)?.relate(relations)
}

/// Everything that polls of `/sync` work with. A clone is cheap.
#[derive(Clone)]
pub struct Polls(Arc<Parts>);

struct Parts {
    env: Env,
    store: Store,
    notifier: Notifier,
    ephemeral: Ephemeral,
    push: Push,
    stopping: CancellationToken,
    sent: SentMembers,
    places: Places,
    facts: Facts,
}

impl Polls {
    /// Makes polls over these parts; all of them end when the server is `stopping`.
    pub fn new(
        env: Env,
        store: Store,
        notifier: Notifier,
        ephemeral: Ephemeral,
        push: Push,
        stopping: CancellationToken,
    ) -> Self {
        let (sent, places) = (SentMembers::default(), Places::default());
        let facts = Facts::default();
        Self(Arc::new(Parts { env, store, notifier, ephemeral, push, stopping, sent, places, facts }))
    }

    /// Makes the token valid for the store as it is now. Refuses a token that lies in the future: 400
    /// `M_INVALID_PARAM`.
    pub fn settle(&self, token: SyncToken) -> Result<SyncToken> {
        let now = self.0.store.snapshot().upto();
        Ok(token.settle(now, self.0.ephemeral.boot(), |position| self.0.store.clamp(position))?)
    }

    /// Finds the users whose keys the caller must ask for again, and those whose keys it may forget, from one token to
    /// another. The answer is the JSON of `/keys/changes`; both tokens must be settled.
    pub async fn key_changes(&self, caller: Caller, from: SyncToken, to: SyncToken) -> Result<Bytes> {
        let parts = Arc::clone(&self.0);
        self.0.env.blocking(move || parts.key_changes(caller, from, to)).await
    }

    /// Answers as soon as something is new, when the time is up, or when too many newer polls of the device wait.
    pub async fn poll(&self, ask: Ask, timeout: Duration) -> Result<Answered> {
        let caller = ask.caller.clone();
        let look = move |parts: &Parts| {
            let found = parts.look(&ask)?;
            let has_news = found.has_news;
            Ok((found, has_news))
        };
        self.wait(caller, timeout, look).await
    }

    /// Answers sliding sync as [`Polls::poll`] answers `/sync`. What the answer changes of its connection must be kept before it is
    /// given ([`connections::keep`]). Refuses a position that is not one of a connection of the device: 400 `M_UNKNOWN_POS`.
    pub async fn slide(&self, ask: SlidingAsk, timeout: Duration) -> Result<(Answered, Option<Update>)> {
        let caller = ask.caller.clone();
        let v3 = ask.as_sync()?;
        let look = move |parts: &Parts| {
            let found = parts.slide(&ask, &v3)?;
            let has_news = found.answered.has_news;
            Ok(((found.answered, found.update), has_news))
        };
        self.wait(caller, timeout, look).await
    }

    /// Looks until something is new, the time is up, or too many newer polls of the device wait. Errors: 401 once the session of the
    /// caller has ended, or the account is locked, also while the poll waits.
    async fn wait<T: Send + 'static>(
        &self,
        caller: Caller,
        timeout: Duration,
        look: impl Fn(&Parts) -> Result<(T, bool)> + Send + Sync + 'static,
    ) -> Result<T> {
        let (user, device) = (caller.user, caller.device);
        let mut subscription = self.0.notifier.subscribe(user);
        let deadline = self.0.env.instant() + timeout.min(POLL_MAX);
        let mut place = None;
        let look = Arc::new(move |parts: &Parts, has_waited: bool| {
            let found = look(parts);
            // Whatever ends the session wakes the poll, so that no answer is given to whom it is not meant for any more. The rows of a
            // device go with its session, so that a look which fails says nothing before the session was looked at.
            if has_waited || found.is_err() {
                tokens::require_still(&*parts.store.snapshot(), &caller)?;
            }
            found
        });
        loop {
            let (parts, looked, has_waited) = (Arc::clone(&self.0), Arc::clone(&look), place.is_some());
            let (answer, has_news) = self.0.env.blocking(move || looked(&parts, has_waited)).await?;
            let left = deadline.saturating_duration_since(self.0.env.instant());
            if has_news || left.is_zero() {
                return Ok(answer);
            }
            payer::rest();
            // Only a poll that waits needs a place.
            let place = place.get_or_insert_with(|| self.0.places.take(user, device));
            tokio::select! {
                biased;
                () = place.lost() => {
                    tracing::debug!(reason = "newer polls of the device wait", "a poll is answered before its time");
                    return Ok(answer);
                }
                () = subscription.woken() => {}
                () = self.0.stopping.cancelled() => return Ok(answer),
                () = self.0.env.sleep(left) => return Ok(answer),
            }
        }
    }
}

/// Refuses a position of sliding sync: the client begins anew.
pub fn unknown_pos() -> Refusal {
    let why = "`pos` is not a position of a connection of this device, or the connection has ended. Begin without it.";
    Refusal::new(ErrorKind::UnknownPos, why)
}

impl Parts {
    fn look(&self, ask: &Ask) -> Result<Answered> {
        // Ephemeral changes are read after the snapshot: a change may then be told twice, but is never missed.
        let snapshot: Arc<Snapshot> = self.store.snapshot();
        let moment = Moment::since(&self.ephemeral, ask.since);
        Ok(look::look(&self.window(&snapshot, ask, snapshot.upto(), moment, &self.sent))?)
    }

    fn slide(&self, ask: &SlidingAsk, v3: &Ask) -> Result<Slid> {
        let snapshot: Arc<Snapshot> = self.store.snapshot();
        let moment = Moment::since(&self.ephemeral, v3.since);
        let connection = match &ask.pos {
            Some(pos) => {
                // A connection is written by notes, which the client's next request may overtake.
                let (read, owner) = (self.store.view(), (ask.caller.user, ask.caller.device));
                let at = (pos.connection, pos.step);
                let found = Connection::find(&read, owner, ask.conn_id(), at, self.env.now_ms())?;
                found.ok_or_else(unknown_pos)?
            }
            None => {
                let mut number = [0; 8];
                self.env.fill_random(&mut number);
                Connection::begin(u64::from_be_bytes(number))
            }
        };
        let window = self.window(&snapshot, v3, snapshot.upto(), moment, &self.sent);
        let found = sliding::look::look(&window, ask, &connection, &self.facts)?;
        if found.is_over { Err(unknown_pos().into()) } else { Ok(found) }
    }

    fn key_changes(&self, caller: Caller, from: SyncToken, to: SyncToken) -> Result<Bytes> {
        let snapshot = self.store.snapshot();
        let ask = Ask::new(caller, Some(from), &FilterDefinition::default())?;
        // An answer of `/keys/changes` tells of no members, so that nothing of it is remembered as told.
        let sent = SentMembers::default();
        let upto = to.position.min(snapshot.upto());
        let window = self.window(&snapshot, &ask, upto, Moment::default(), &sent);
        Ok(key_changes::collect(&window)?.into())
    }

    fn window<'a>(
        &'a self,
        read: &'a Snapshot,
        ask: &'a Ask,
        upto: Position,
        moment: Moment,
        sent: &'a SentMembers,
    ) -> Window<'a> {
        let (ephemeral, push, now_ms) = (&self.ephemeral, &self.push, self.env.now_ms());
        Window::new(read, ask, upto, moment, Around { ephemeral, push, sent, now_ms })
    }
}
