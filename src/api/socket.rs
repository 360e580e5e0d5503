//! The WebSocket, over which a client asks, is answered and is told news without polling. `docs/socket.md` specifies it.
//!
//! A socket makes requests in memory, through the same door as those over HTTP (`inward.rs`). [`methods`] says which, `feed.rs` asks for
//! news, `requests.rs` keeps what is under way, `talk.rs` puts them together; `frames/` reads and writes the protocol.

mod ending;
mod feed;
mod frames;
mod handshake;
mod inward;
mod methods;
mod places;
mod requests;
mod said;
mod talk;

pub(crate) use handshake::prepare;
pub(crate) use inward::Inward;

use hyper_util::rt::TokioIo;

use crate::{
    api::{
        Routes,
        extract::Client,
        policy::Guests,
        reply,
        reply::Switching,
        socket::{
            handshake::{Opening, PROTOCOL},
            inward::Session,
        },
    },
    error::Result,
    flows::{App, limits::Limit},
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(open_socket).limit(Limit::Other).guests(Guests::Yes);
}

/// `GET /_aqueduct/client/v1/socket`
pub(crate) async fn open_socket(app: App, client: Client<Opening>) -> Result<Switching> {
    let Client { caller, request, peer } = client;
    if app.config.limits.sockets_max == 0 {
        return Err(reply::no_such_endpoint().into());
    }
    let Opening { accept, names_protocol, token, on_upgrade, inward } = request;
    let place = inward.sockets.take(&caller, peer)?;
    let session = Session::new(app.clone(), caller, token, peer, inward);
    app.env.spawn(async move {
        match on_upgrade.await {
            Ok(connection) => talk::run(session, place, TokioIo::new(connection)).await,
            Err(error) => tracing::debug!(%error, "a connection broke before it became a socket"),
        }
    });
    Ok(Switching { accept, protocol: names_protocol.then_some(PROTOCOL) })
}
