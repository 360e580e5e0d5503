//! Typing notifications.

use ruma::api::client::typing::create_typing_event::{self, v3::Typing};

use crate::{
    api::{Routes, extract::Client},
    error::{Refusal, Result},
    flows::{App, ephemeral},
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(create_typing_event);
}

/// `PUT /_matrix/client/v3/rooms/{roomId}/typing/{userId}`
pub(crate) async fn create_typing_event(
    app: App,
    client: Client<create_typing_event::v3::Request>,
) -> Result<create_typing_event::v3::Response> {
    let Client { caller, request, .. } = client;
    if request.user_id != caller.user_id {
        return Err(Refusal::forbidden("Others type for themselves.").into());
    }
    let timeout = match request.state {
        Typing::Yes(info) => Some(info.timeout),
        Typing::No => None,
    };
    ephemeral::set_typing(&app, &caller, &request.room_id, timeout).await?;
    Ok(create_typing_event::v3::Response::new())
}
