//! The device lists of our users, which other servers keep.

use ruma::api::federation::device::get_devices;

use crate::{
    api::{Routes, extract::Server, reply::InPieces},
    error::Result,
    flows::{App, keys, limits::Limit},
};

pub(crate) fn routes(r: &mut Routes) {
    r.server(devices).limit(Limit::Read);
}

/// `GET /_matrix/federation/v1/user/devices/{userId}`
pub(crate) async fn devices(app: App, server: Server<get_devices::v1::Request>) -> Result<InPieces> {
    let (first, rest) = keys::list_for_server(&app, server.request.user_id).await?;
    Ok(InPieces::of(first, rest, |rest| rest.next()))
}
