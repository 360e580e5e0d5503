//! Typing notifications: a client says that its user types in a room.

use std::time::Duration;

use ruma::{OwnedRoomId, api::client::typing::create_typing_event};
use serde::Deserialize;

use crate::{
    api::{Routes, extract::Client, raw::Raw},
    error::{Refusal, Result},
    flows::{App, limits::Limit, room::typing},
};

/// A user whose client gives no `timeout` counts as typing for this long.
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);

pub(crate) fn routes(r: &mut Routes) {
    r.client(create_typing_event).limit(Limit::Other).not_suspended();
}

/// The body of a request. Ruma's type demands a `timeout`, which the specification does not.
#[derive(Deserialize)]
struct Typing {
    typing: bool,
    #[serde(default, with = "ruma::serde::duration::opt_ms")]
    timeout: Option<Duration>,
}

/// `PUT /_matrix/client/v3/rooms/{roomId}/typing/{userId}`
pub(crate) async fn create_typing_event(
    app: App,
    client: Client<Raw<create_typing_event::v3::Request>>,
) -> Result<create_typing_event::v3::Response> {
    let Client { caller, request, .. } = client;
    if request.arg(1) != caller.user_id.as_str() {
        return Err(Refusal::forbidden("You can only type for yourself: `userId` is somebody else.").into());
    }
    let room: OwnedRoomId = request.id(0)?;
    let typing: Typing = request.json()?;
    let timeout = typing.typing.then(|| typing.timeout.unwrap_or(TIMEOUT_DEFAULT));
    typing::set_typing(&app, &caller, &room, timeout).await?;
    Ok(create_typing_event::v3::Response::new())
}
