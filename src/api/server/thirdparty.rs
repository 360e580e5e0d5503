//! Invitations by an address: another server says who the invited person is.

use ruma::{OwnedRoomId, api::federation::thirdparty::exchange_invite};

use crate::{
    api::{Routes, extract::Server, raw::Raw},
    error::Result,
    flows::{App, limits::Limit, remote::third_party},
};

pub(crate) fn routes(r: &mut Routes) {
    r.server(exchange_invite).limit(Limit::Membership);
}

/// `PUT /_matrix/federation/v1/exchange_third_party_invite/{roomId}`
pub(crate) async fn exchange_invite(
    app: App,
    server: Server<Raw<exchange_invite::v1::Request>>,
) -> Result<exchange_invite::v1::Response> {
    let room: OwnedRoomId = server.request.id(0)?;
    let partial: third_party::Partial = server.request.json()?;
    third_party::exchange(&app, &server.origin, &room, partial).await?;
    Ok(exchange_invite::v1::Response::new())
}
