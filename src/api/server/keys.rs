//! The keys of our users' devices, for users of other servers who encrypt for them.

use ruma::api::federation::keys::{claim_keys, get_keys};

use crate::{
    api::{
        Routes,
        extract::Server,
        policy::{Body, MIB},
        reply::{InPieces, RawJson},
    },
    error::Result,
    flows::{App, keys, limits::Limit},
};

pub(crate) fn routes(r: &mut Routes) {
    // A server asks for all that its users ask for at once, so that these are as large as the requests of clients.
    r.server(query).limit(Limit::Read).body(Body::Json(MIB));
    r.server(claim).limit(Limit::Other).body(Body::Json(MIB));
}

/// `POST /_matrix/federation/v1/user/keys/query`
pub(crate) async fn query(app: App, server: Server<get_keys::v1::Request>) -> Result<InPieces> {
    let (first, rest) = keys::query_for_server(&app, server.request.device_keys).await?;
    Ok(InPieces::of(first, rest, |rest| rest.next()))
}

/// `POST /_matrix/federation/v1/user/keys/claim`
pub(crate) async fn claim(app: App, server: Server<claim_keys::v1::Request>) -> Result<RawJson> {
    Ok(RawJson(keys::claim_for_server(&app, &server.origin, server.request.one_time_keys).await?))
}
