//! Knocking: a user asks to be let into a room.

use ruma::api::client::knock::knock_room;

use crate::{
    api::{Routes, client::membership::via, extract::Client, raw::Raw},
    error::Result,
    flows::{App, limits::Limit, membership},
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(knock_room).limit(Limit::Membership).not_suspended();
}

/// `POST /_matrix/client/v3/knock/{roomIdOrAlias}`
pub(crate) async fn knock_room(
    app: App,
    client: Client<Raw<knock_room::v3::Request>>,
) -> Result<knock_room::v3::Response> {
    let request = client.request.read()?;
    let named = (&*request.room_id_or_alias, via(&client.request)?);
    let room_id = membership::knock(&app, &client.caller, named, request.reason).await?;
    Ok(knock_room::v3::Response::new(room_id))
}
