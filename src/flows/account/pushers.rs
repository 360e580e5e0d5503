//! Sets and deletes a user's pushers, which say where they are told of notifications.

use std::{sync::Arc, time::Duration};

use futures_util::{FutureExt, future::BoxFuture};
use ruma::api::client::push::PusherIds;

use crate::{
    accounts::Caller,
    delivery::gateways::Owners,
    error::{Error, Result},
    flows::{App, write},
    ids::UserNum,
    push::pushers::{self, NewPusher},
    schema::push::PusherRow,
    store::Batch,
};

/// The locks of a pusher's owners are taken at most this often, because another user may have set the same pusher meanwhile.
const TRIES_MAX: usize = 5;

/// Sets a pusher of the caller's device. If other users lose theirs by it, their locks are held, too.
pub(crate) async fn set(app: &App, caller: &Caller, new: NewPusher) -> Result<()> {
    let holder = (caller.user, caller.device);
    let new = Arc::new(new);
    let ids = &new.pusher.ids;
    let mut owners = pushers::list_owners(&app.store.view(), &ids.app_id, &ids.pushkey)?;
    for _ in 0..TRIES_MAX {
        let (tried, mut known) = (Arc::clone(&new), owners.clone());
        known.push(caller.user);
        let set = move |app: &App, batch: &mut Batch| {
            let ids = &tried.pusher.ids;
            let now = pushers::list_owners(batch, &ids.app_id, &ids.pushkey)?;
            if !now.iter().all(|owner| known.contains(owner)) {
                return Ok(Some(now));
            }
            let allow_http = app.config.outbound.allow_private_addresses;
            pushers::set(batch, holder, &tried, allow_http)?;
            Ok(None)
        };
        match write::for_caller_and_users_and_server(app, caller, owners, set).await? {
            None => return Ok(()),
            Some(now) => owners = now,
        }
    }
    Err(Error::Busy { retry_after: Duration::from_secs(1) })
}

/// Deletes one of the caller's pushers; nothing happens if there is no such pusher.
pub(crate) async fn delete(app: &App, caller: &Caller, ids: PusherIds) -> Result<()> {
    let user = caller.user;
    write::for_caller(app, caller, move |_, batch| {
        Ok(pushers::delete(batch, user, &ids.app_id, &ids.pushkey)?)
    })
    .await
}

/// The rows of pushers, for those who send to push gateways.
pub(crate) struct Rows(App);

impl Rows {
    /// The rows of this server.
    pub(crate) fn of(app: &App) -> Self {
        Self(app.clone())
    }
}

impl Owners for Rows {
    fn delete_rejected(
        &self,
        user: UserNum,
        app_id: String,
        pushkey: String,
        row: PusherRow,
    ) -> BoxFuture<'_, Result<()>> {
        async move {
            let delete = move |_: &App, batch: &mut Batch| {
                pushers::delete_rejected(batch, (user, &app_id, &pushkey), &row)?;
                Ok(())
            };
            write::for_user(&self.0, user, delete).await
        }
        .boxed()
    }
}
