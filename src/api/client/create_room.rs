//! Creating rooms.

use ruma::api::client::room::create_room;

use crate::{
    api::{Routes, extract::Client},
    error::Result,
    flows::{App, room::create},
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(create_room);
}

/// `POST /_matrix/client/v3/createRoom`
pub(crate) async fn create_room(
    app: App,
    client: Client<create_room::v3::Request>,
) -> Result<create_room::v3::Response> {
    let room_id = create::create(&app, &client.caller, client.request).await?;
    Ok(create_room::v3::Response::new(room_id))
}
