//! The part that the tasks share which send to push gateways.

use std::{sync::Arc, time::Duration};

use federation::web::Web;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::Notify;
use url::Url;

use crate::{
    accounts::users,
    delivery::{
        gateways::board::{Board, Stored},
        mail::Mails,
    },
    env::Env,
    error::{Error, Result},
    ids::UserNum,
    metrics::Metrics,
    push::{Push, places, pushers},
    schema::push::{PusherPlace, PusherRow},
    store::{Enqueued, Fault, Guard, NotAccepted, Read, Store},
};

/// The name of the reader that tells push gateways.
pub(super) const READER: &str = "gateways";
/// Work that the store, or the threads that read it, put off is tried again after this time.
pub(super) const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Those who may write the rows of users.
pub trait Owners: Send + Sync {
    /// Deletes a pusher that its gateway knows no more, unless it was set anew since it was this row.
    fn delete_rejected(
        &self,
        user: UserNum,
        app_id: String,
        pushkey: String,
        row: PusherRow,
    ) -> BoxFuture<'_, Result<()>>;
}

/// The part that all tasks share.
pub(super) struct Shared {
    pub(super) env: Env,
    pub(super) store: Store,
    pub(super) metrics: Metrics,
    pub(super) push: Push,
    pub(super) web: Web,
    /// Those who are mailed: the reader tells them, too.
    pub(super) mails: Mails,
    pub(super) board: Mutex<Board>,
    /// Tells that a pusher has something to do, or that a place is free.
    pub(super) turns: Notify,
}

impl Shared {
    /// Writes the place of a pusher, and waits until it is durable. Answers whether the pusher still had the place that is known.
    pub(super) async fn advance(
        self: &Arc<Self>,
        (user, app_id, pushkey): (UserNum, String, String),
        known: PusherPlace,
        to: PusherPlace,
    ) -> Result<bool> {
        loop {
            let shared = Arc::clone(self);
            let key = (app_id.clone(), pushkey.clone());
            let write = move || shared.enqueue((user, &key.0, &key.1), known, to);
            match self.env.blocking(write).await {
                Ok(None) => return Ok(false),
                Ok(Some(enqueued)) => {
                    let lost = |_| Error::broken("the place of a pusher is lost");
                    enqueued.flushed.await.map_err(lost)?;
                    return Ok(true);
                }
                Err(Error::Busy { .. }) => self.env.sleep(AGAIN_AFTER).await,
                Err(error) => return Err(error),
            }
        }
    }

    fn enqueue(
        &self,
        key: (UserNum, &str, &str),
        known: PusherPlace,
        to: PusherPlace,
    ) -> Result<Option<Enqueued>> {
        let guard = Guard::own_tables();
        let mut batch = self.store.batch(&guard);
        if !places::advance(&mut batch, key, known, to)? {
            return Ok(None);
        }
        match self.store.enqueue(batch) {
            Ok(enqueued) => Ok(Some(enqueued)),
            Err(NotAccepted::Conflict(_)) => Ok(None),
            Err(other) => Err(other.into()),
        }
    }

    /// Takes over the pushers of a user as the store has them now.
    pub(super) async fn reload(self: &Arc<Self>, user: UserNum) -> Result<()> {
        let shared = Arc::clone(self);
        let reload = move || {
            let snapshot = shared.store.snapshot();
            let account = users::find(&*snapshot, user)?;
            let stored = list_stored(&*snapshot, user)?;
            let now_ms = shared.env.now_ms();
            shared.board.lock().reload(user, account.map(|account| account.user_id), stored, now_ms);
            Ok(())
        };
        self.env.blocking(reload).await
    }
}

/// The pushers of a user that are on and have a gateway, as the store has them.
pub(super) fn list_stored(read: &(impl Read + ?Sized), user: UserNum) -> Result<Vec<Stored>, Fault> {
    let pushers = pushers::list(read, user)?;
    let places = if pushers.is_empty() { Vec::new() } else { places::list(read, user)? };
    let stored = |(key, row): pushers::Pusher| {
        let (_, place) = places.iter().find(|(of, _)| *of == key)?;
        let url = row.pusher.get("data")?.get("url")?.as_str()?;
        let host = Url::parse(url).ok()?.host_str()?.to_owned();
        let (app_id, pushkey) = key;
        let is_on = row.is_enabled && !row.is_email();
        is_on.then_some(Stored { app_id, pushkey, host, set_ms: row.set_ms, place: *place })
    };
    Ok(pushers.into_iter().filter_map(stored).collect())
}
