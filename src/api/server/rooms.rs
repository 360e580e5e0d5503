//! Other servers look for rooms: the public directory, and the rooms of a space.

use ruma::{
    api::federation::{
        directory::{get_public_rooms, get_public_rooms_filtered},
        space::get_hierarchy,
    },
    directory::Filter,
};

use crate::{
    api::{Routes, extract::Server, reply::RawJson},
    error::Result,
    flows::{
        App,
        limits::Limit,
        room::{
            directory::{self, Ask},
            hierarchy,
        },
    },
};

pub(crate) fn routes(r: &mut Routes) {
    r.server(public_rooms).limit(Limit::Read);
    r.server(public_rooms_filtered).limit(Limit::Read);
    r.server(hierarchy).limit(Limit::Read);
}

/// `GET /_matrix/federation/v1/publicRooms`
pub(crate) async fn public_rooms(app: App, server: Server<get_public_rooms::v1::Request>) -> Result<RawJson> {
    let get_public_rooms::v1::Request { limit, since, room_network: network, .. } = server.request;
    let ask = Ask { limit, since, filter: Filter::new(), network };
    Ok(RawJson(directory::page_for_server(&app, server.origin, ask).await?))
}

/// `POST /_matrix/federation/v1/publicRooms`
pub(crate) async fn public_rooms_filtered(
    app: App,
    server: Server<get_public_rooms_filtered::v1::Request>,
) -> Result<RawJson> {
    let request = server.request;
    let (limit, since, filter, network) =
        (request.limit, request.since, request.filter, request.room_network);
    Ok(RawJson(directory::page_for_server(&app, server.origin, Ask { limit, since, filter, network }).await?))
}

/// `GET /_matrix/federation/v1/hierarchy/{roomId}`
pub(crate) async fn hierarchy(app: App, server: Server<get_hierarchy::v1::Request>) -> Result<RawJson> {
    let get_hierarchy::v1::Request { room_id, suggested_only, .. } = server.request;
    Ok(RawJson(hierarchy::for_server(&app, &server.origin, &room_id, suggested_only).await?))
}
