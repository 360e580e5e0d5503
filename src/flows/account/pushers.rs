//! A user says where they want to be told of notifications.

use ruma::api::client::push::{PusherIds, set_pusher::v3::PusherPostData};

use crate::{
    accounts::Caller,
    error::Result,
    flows::{App, write},
    push::pushers,
};

/// Sets a pusher of the caller's device.
pub(crate) async fn set(app: &App, caller: &Caller, data: PusherPostData) -> Result<()> {
    let holder = (caller.user, caller.device);
    write::for_user_and_server(app, caller.user, move |app, batch| {
        let allow_http = app.config.outbound.allow_private_addresses;
        pushers::set(batch, holder, &data.pusher, data.append, allow_http)
    })
    .await
}

/// Takes one of the caller's pushers away; one that is not there is gone already.
pub(crate) async fn delete(app: &App, caller: &Caller, ids: PusherIds) -> Result<()> {
    let user = caller.user;
    write::for_user(app, user, move |_, batch| Ok(pushers::delete(batch, user, &ids.app_id, &ids.pushkey)?))
        .await
}
