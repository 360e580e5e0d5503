//! What each request with an access token leaves behind.

use std::net::IpAddr;

use crate::{
    accounts::{Caller, devices, tokens},
    error::Result,
    flows::{App, write},
};

/// Somebody uses an access token: if it is a refreshed one, the pair that it replaces ends now; and now and then it is noted
/// when and from where the device was last seen.
pub(crate) async fn seen(app: &App, caller: &Caller, peer: IpAddr) -> Result<()> {
    if let Some(unused) = caller.unused.clone() {
        write::for_user(app, caller.user, move |_, batch| Ok(tokens::confirm(batch, &unused)?)).await?;
    }
    let now_ms = app.env.now_ms();
    if app.accounts.seen().is_due(caller.user, caller.device, now_ms) {
        let (user, device) = (caller.user, caller.device);
        let noted = write::note_for_user(app, user, move |_, note| {
            devices::note_seen(note, user, device, now_ms, Some(peer));
            Ok(())
        });
        // Nobody waits until it is there, and a store that is busy may lose it.
        if let Err(error) = noted.await {
            tracing::debug!(%error, %user, "it was not noted when a device was seen");
        }
    }
    Ok(())
}
