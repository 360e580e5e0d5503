//! `/sync`: wait, then collect. A poll subscribes first, then looks over one snapshot; when nothing is new, it sleeps
//! until its user is woken.

mod answer;
pub mod ephemeral;
pub mod filter;
mod key_changes;
mod news;
pub mod notifier;
mod room;
mod sent;
mod streams;
pub mod token;
pub mod v3;

pub use ephemeral::Ephemeral;
pub use notifier::Notifier;
pub use token::SyncToken;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use crate::{
    accounts::Caller,
    env::Env,
    error::Result,
    push::Push,
    store::{Read, Snapshot, Store},
    sync::{sent::SentMembers, v3::Ask},
};

/// No poll waits longer, whatever it asks for.
pub const POLL_MAX: Duration = Duration::from_secs(120);

/// What polls work with. Cheap to clone.
#[derive(Clone)]
pub struct Polls(Arc<Inner>);

pub(crate) struct Inner {
    env: Env,
    store: Store,
    notifier: Notifier,
    ephemeral: Ephemeral,
    push: Push,
    stopping: CancellationToken,
    sent: SentMembers,
}

/// What a look found.
pub(crate) struct Found {
    /// The whole answer.
    pub(crate) answer: Bytes,
    /// Whether it says anything.
    pub(crate) has_news: bool,
}

impl Polls {
    /// Over these parts. Polls end when the server is `stopping`.
    pub fn new(
        env: Env,
        store: Store,
        notifier: Notifier,
        ephemeral: Ephemeral,
        push: Push,
        stopping: CancellationToken,
    ) -> Self {
        let sent = SentMembers::default();
        Self(Arc::new(Inner { env, store, notifier, ephemeral, push, stopping, sent }))
    }

    /// The token as it holds now. Refuses (400 `M_INVALID_PARAM`) what lies in the future.
    pub fn settle(&self, token: SyncToken) -> Result<SyncToken> {
        let now = self.0.store.snapshot().upto();
        Ok(token.settle(now, self.0.ephemeral.boot(), |position| self.0.store.clamp(position))?)
    }

    /// Whose keys the caller must ask for again, and whose it may forget, from one token to another: the JSON of
    /// `/keys/changes`. Both tokens are settled.
    pub async fn key_changes(&self, caller: Caller, from: SyncToken, to: SyncToken) -> Result<Bytes> {
        let inner = Arc::clone(&self.0);
        self.0
            .env
            .blocking(move || {
                let snapshot = inner.store.snapshot();
                Ok(key_changes::collect(&inner, &snapshot, caller, from, to)?.into())
            })
            .await
    }

    /// Answers as soon as something is new, or when the time is up. The answer is the JSON of `/sync`.
    pub async fn poll(&self, ask: Ask, timeout: Duration) -> Result<Bytes> {
        let mut subscription = self.0.notifier.subscribe(ask.caller.user);
        let deadline = self.0.env.instant() + timeout.min(POLL_MAX);
        let ask = Arc::new(ask);
        loop {
            let (inner, asked) = (Arc::clone(&self.0), Arc::clone(&ask));
            let found = self.0.env.blocking(move || inner.look(&asked)).await?;
            let left = deadline.saturating_duration_since(self.0.env.instant());
            if found.has_news || left.is_zero() {
                return Ok(found.answer);
            }
            tokio::select! {
                biased;
                () = subscription.woken() => {}
                () = self.0.stopping.cancelled() => return Ok(found.answer),
                () = self.0.env.sleep(left) => return Ok(found.answer),
            }
        }
    }
}

impl Inner {
    fn look(&self, ask: &Ask) -> Result<Found> {
        let snapshot: Arc<Snapshot> = self.store.snapshot();
        v3::look(self, &snapshot, ask)
    }
}
