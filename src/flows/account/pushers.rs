//! Sets and deletes a user's pushers, which say where they are told of notifications.

use std::{sync::Arc, time::Duration};

use futures_util::{FutureExt, TryFutureExt, future::BoxFuture};
use ruma::api::client::push::PusherIds;

use crate::{
    accounts::Caller,
    delivery::{gateways::Owners, mail::Accounts},
    error::{Error, Result},
    flows::{App, write},
    ids::UserNum,
    push::pushers::{self, NewPusher, Takes},
    schema::{email::PreferencesRow, push::PusherRow},
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
            let http_gateways = app.config.outbound.allow_private_addresses;
            let takes = Takes { http_gateways, email: app.mails.is_on() };
            pushers::set(batch, holder, &tried, takes)?;
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

/// Deletes the pusher of kind `email` that the token of its link names. Answers whether there was one.
pub(crate) async fn unsubscribe(app: &App, token: String) -> Result<bool> {
    let (store, asked) = (app.store.clone(), token.clone());
    let find = move || Ok(pushers::find_by_link(&*store.snapshot(), &asked)?);
    let Some((user, ..)) = app.env.blocking(find).await? else { return Ok(false) };
    write::for_user(app, user, move |_, batch| {
        // It is looked for again under the lock of its user.
        let Some((_, app_id, pushkey)) = pushers::find_by_link(batch, &token)? else { return Ok(false) };
        pushers::delete(batch, user, &app_id, &pushkey)?;
        Ok(true)
    })
    .await
}

/// Keeps what the caller wishes of digests by e-mail.
pub(crate) async fn set_preferences(app: &App, caller: &Caller, wishes: PreferencesRow) -> Result<()> {
    let user = caller.user;
    write::for_caller(app, caller, move |_, batch| Ok(pushers::set_preferences(batch, user, wishes)?)).await
}

/// The rows of pushers, for those who send to push gateways and those who mail.
pub(crate) struct Rows(App);

impl Rows {
    /// The rows of this server.
    pub(crate) fn of(app: &App) -> Self {
        Self(app.clone())
    }
}

impl Rows {
    async fn delete(
        &self,
        user: UserNum,
        (app_id, pushkey): (String, String),
        row: PusherRow,
    ) -> Result<bool> {
        let delete = move |_: &App, batch: &mut Batch| {
            Ok(pushers::delete_rejected(batch, (user, &app_id, &pushkey), &row)?)
        };
        write::for_user(&self.0, user, delete).await
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
        self.delete(user, (app_id, pushkey), row).map_ok(|_| ()).boxed()
    }
}

impl Accounts for Rows {
    fn delete_refused(
        &self,
        user: UserNum,
        app_id: String,
        pushkey: String,
        row: PusherRow,
    ) -> BoxFuture<'_, Result<bool>> {
        self.delete(user, (app_id, pushkey), row).boxed()
    }
}
