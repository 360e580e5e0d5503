//! Sets and deletes a user's pushers, which say where they are told of notifications.

use std::{sync::Arc, time::Duration};

use ruma::api::client::push::{PusherIds, set_pusher::v3::PusherPostData};

use crate::{
    accounts::Caller,
    error::{Error, Result},
    flows::{App, write},
    push::pushers,
    store::Batch,
};

/// The locks of a pusher's owners are taken at most this often, because another user may have set the same pusher meanwhile.
const TRIES_MAX: usize = 5;

/// Sets a pusher of the caller's device. If other users lose theirs by it, their locks are held, too.
pub(crate) async fn set(app: &App, caller: &Caller, data: PusherPostData) -> Result<()> {
    let holder = (caller.user, caller.device);
    let data = Arc::new(data);
    let ids = &data.pusher.ids;
    let mut owners = pushers::list_owners(&app.store.view(), &ids.app_id, &ids.pushkey)?;
    for _ in 0..TRIES_MAX {
        let (tried, mut known) = (Arc::clone(&data), owners.clone());
        known.push(caller.user);
        let set = move |app: &App, batch: &mut Batch| {
            let ids = &tried.pusher.ids;
            let now = pushers::list_owners(batch, &ids.app_id, &ids.pushkey)?;
            if !now.iter().all(|owner| known.contains(owner)) {
                return Ok(Some(now));
            }
            let allow_http = app.config.outbound.allow_private_addresses;
            pushers::set(batch, holder, &tried.pusher, tried.append, allow_http)?;
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
