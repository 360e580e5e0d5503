//! Knocking: a user asks to be let into a room.

use ruma::api::client::knock::knock_room;

use crate::{
    api::{Routes, extract::Client},
    error::Result,
    flows::{App, limits::Limit, room::membership},
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(knock_room).limit(Limit::Membership);
}

/// `POST /_matrix/client/v3/knock/{roomIdOrAlias}`
pub(crate) async fn knock_room(
    app: App,
    client: Client<knock_room::v3::Request>,
) -> Result<knock_room::v3::Response> {
    let request = client.request;
    let room_id = membership::knock(&app, &client.caller, &request.room_id_or_alias, request.reason).await?;
    Ok(knock_room::v3::Response::new(room_id))
}
