//! Presence: clients say how present their users are, and ask for that of others.

use std::time::Duration;

use ruma::{
    api::client::presence::{get_presence, set_presence},
    presence::PresenceState,
};

use crate::{
    api::{Routes, extract::Client},
    error::{Refusal, Result},
    flows::{App, limits::Limit, room::presence},
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(get_presence).limit(Limit::Read);
    r.client(set_presence).limit(Limit::Other).not_suspended();
}

/// `GET /_matrix/client/v3/presence/{userId}/status`
pub(crate) async fn get_presence(
    app: App,
    client: Client<get_presence::v3::Request>,
) -> Result<get_presence::v3::Response> {
    let presence = presence::find_presence(&app, &client.caller, &client.request.user_id).await?;
    let was_here = presence.last_active_ms > 0;
    let age = Duration::from_millis(app.env.now_ms().saturating_sub(presence.last_active_ms));
    let mut response = get_presence::v3::Response::new(presence.state.clone());
    response.currently_active =
        (presence.state == PresenceState::Online).then(|| presence.is_active(app.env.now_ms()));
    response.last_active_ago = was_here.then_some(age);
    response.status_msg = presence.status_msg;
    Ok(response)
}

/// `PUT /_matrix/client/v3/presence/{userId}/status`
pub(crate) async fn set_presence(
    app: App,
    client: Client<set_presence::v3::Request>,
) -> Result<set_presence::v3::Response> {
    let Client { caller, request, .. } = client;
    if request.user_id != caller.user_id {
        return Err(Refusal::forbidden("You can only set your own presence.").into());
    }
    presence::set_presence(&app, &caller, request.presence, request.status_msg).await?;
    Ok(set_presence::v3::Response::new())
}
