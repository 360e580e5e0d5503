//! `/sync` waits, collects what is new, and shapes the answer. A poll subscribes first and then looks over one
//! snapshot; when nothing is new, it sleeps until its user is woken.
//!
//! `changes` finds what changed, `collect` and `streams` turn it into typed news (of each room from a place of its
//! own), and `shape` writes the news as JSON; `look` runs these steps for one answer of `/sync`.

mod ask;
mod changes;
mod collect;
pub mod ephemeral;
mod filter;
mod key_changes;
mod look;
pub mod notifier;
mod places;
mod sent;
mod shape;
mod shares;
mod streams;
pub mod token;
mod window;

pub use ask::Ask;
pub use ephemeral::Ephemeral;
pub use notifier::Notifier;
pub use token::SyncToken;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use ruma::api::client::filter::FilterDefinition;
use tokio_util::sync::CancellationToken;

use crate::{
    accounts::Caller,
    env::{Env, payer},
    error::{Refusal, Result},
    ids::Position,
    push::Push,
    store::{Read, Snapshot, Store},
    sync::{
        filter::Filter,
        look::Look,
        places::Places,
        sent::SentMembers,
        window::{Around, Moment, Window},
    },
};

/// A poll waits at most this long, whatever timeout the client asks for.
pub const POLL_MAX: Duration = Duration::from_secs(120);

/// Refuses a filter that costs too much: 400 `M_INVALID_PARAM`.
pub fn check_filter(definition: &FilterDefinition) -> Result<(), Refusal> {
    Filter::new(definition).map(|_| ())
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
        Self(Arc::new(Parts { env, store, notifier, ephemeral, push, stopping, sent, places }))
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

    /// Answers as soon as something is new, when the time is up, or when too many newer polls of the device wait. The answer
    /// is the JSON of `/sync`.
    pub async fn poll(&self, ask: Ask, timeout: Duration) -> Result<Bytes> {
        let mut subscription = self.0.notifier.subscribe(ask.caller.user);
        let deadline = self.0.env.instant() + timeout.min(POLL_MAX);
        let mut place = None;
        let ask = Arc::new(ask);
        loop {
            let (parts, asked) = (Arc::clone(&self.0), Arc::clone(&ask));
            let found = self.0.env.blocking(move || parts.look(&asked)).await?;
            let left = deadline.saturating_duration_since(self.0.env.instant());
            if found.has_news || left.is_zero() {
                return Ok(found.answer);
            }
            payer::rest();
            // Only a poll that waits needs a place.
            let place = place.get_or_insert_with(|| self.0.places.take(ask.caller.user, ask.caller.device));
            tokio::select! {
                biased;
                () = place.lost() => {
                    tracing::debug!(reason = "newer polls of the device wait", "a poll is answered before its time");
                    return Ok(found.answer);
                }
                () = subscription.woken() => {}
                () = self.0.stopping.cancelled() => return Ok(found.answer),
                () = self.0.env.sleep(left) => return Ok(found.answer),
            }
        }
    }
}

impl Parts {
    fn look(&self, ask: &Ask) -> Result<Look> {
        // Ephemeral changes are read after the snapshot: a change may then be told twice, but is never missed.
        let snapshot: Arc<Snapshot> = self.store.snapshot();
        let moment = Moment::since(&self.ephemeral, ask.since);
        Ok(look::look(&self.window(&snapshot, ask, snapshot.upto(), moment, &self.sent))?)
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
