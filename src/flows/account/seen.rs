//! The traces of each request with an access token: when its device was seen, and that a refreshed token is in use.

use std::net::IpAddr;

use crate::{
    accounts::{
        Caller,
        devices::{self, SeenFrom},
        tokens,
    },
    error::Result,
    flows::{App, write},
};

/// The name of a program is kept up to this many characters, because a client can send any.
const AGENT_CHARS_MAX: usize = 255;

/// Follows up the use of an access token. If it is a refreshed one, the pair that it replaces ends now. Once in a while it is
/// noted when and from where the device was last seen.
pub(crate) async fn seen(app: &App, caller: &Caller, peer: IpAddr, agent: Option<&str>) -> Result<()> {
    if let Some(unused) = caller.unused.clone() {
        write::for_caller(app, caller, move |_, batch| Ok(tokens::confirm(batch, &unused)?)).await?;
    }
    let now_ms = app.env.now_ms();
    if app.accounts.seen().is_due(caller.user, caller.device, now_ms) {
        let (user, device) = (caller.user, caller.device);
        let agent = agent.map(|agent| agent.chars().take(AGENT_CHARS_MAX).collect());
        let noted = write::note_for_caller(app, caller, move |_, note| {
            devices::note_seen(note, user, device, now_ms, SeenFrom { ip: Some(peer), agent });
            Ok(())
        });
        // Nobody waits until the note is visible, and a busy store may refuse it: a request a minute later notes it again.
        if let Err(error) = noted.await {
            tracing::debug!(%error, %user, "the time at which a device was seen could not be noted");
        }
    }
    Ok(())
}
