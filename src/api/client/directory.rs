//! The public directory of rooms: whether a room is in it, and its pages.

use ruma::{
    OwnedRoomId, OwnedServerName, UInt,
    api::{
        client::{
            directory::{
                get_public_rooms, get_public_rooms_filtered, get_room_visibility, set_room_visibility,
            },
            room::Visibility,
        },
        federation::directory::get_public_rooms_filtered as elsewhere,
    },
    directory::{Filter, RoomNetwork},
};

use serde::Deserialize;
use serde_json::json;

use crate::{
    api::{
        Routes,
        extract::{Client, Public},
        raw::Raw,
        reply::RawJson,
    },
    error::{Refusal, Result},
    flows::{
        App,
        limits::Limit,
        remote,
        room::{
            aliases,
            directory::{self, Ask},
        },
    },
};

pub(crate) fn routes(r: &mut Routes) {
    r.public(get_room_visibility).limit(Limit::Read);
    r.client(set_room_visibility).limit(Limit::Other).not_suspended();
    r.public(get_public_rooms).limit(Limit::Read);
    r.client(get_public_rooms_filtered).limit(Limit::Read);
}

/// `GET /_matrix/client/v3/directory/list/room/{roomId}`
pub(crate) async fn get_room_visibility(
    app: App,
    public: Public<get_room_visibility::v3::Request>,
) -> Result<get_room_visibility::v3::Response> {
    let published = aliases::is_published(&app, &public.request.room_id)?;
    let visibility = if published { Visibility::Public } else { Visibility::Private };
    Ok(get_room_visibility::v3::Response::new(visibility))
}

/// `PUT /_matrix/client/v3/directory/list/room/{roomId}`
pub(crate) async fn set_room_visibility(
    app: App,
    client: Client<Raw<set_room_visibility::v3::Request>>,
) -> Result<set_room_visibility::v3::Response> {
    /// The specification takes a body without `visibility` as public; ruma takes it as private.
    #[derive(Deserialize)]
    struct Wish {
        visibility: Option<Visibility>,
    }
    let (room, wish): (OwnedRoomId, Wish) = (client.request.id(0)?, client.request.json()?);
    let published = match wish.visibility.unwrap_or(Visibility::Public) {
        Visibility::Public => true,
        Visibility::Private => false,
        _ => return Err(Refusal::invalid_param("`visibility` must be `public` or `private`.").into()),
    };
    aliases::publish(&app, &client.caller, &room, published).await?;
    Ok(set_room_visibility::v3::Response::new())
}

/// A page of another server has at most this many rooms.
const ELSEWHERE_MAX: u32 = 500;

/// Gives a page of the directory: of this server, or of another one.
async fn page(app: &App, server: Option<OwnedServerName>, ask: Ask) -> Result<RawJson> {
    let Some(server) = server.filter(|server| *server != app.config.server.name) else {
        return Ok(RawJson(directory::page(app, ask).await?));
    };
    let most = UInt::from(ELSEWHERE_MAX);
    let mut elsewhere = elsewhere::v1::Request::new();
    elsewhere.limit = Some(ask.limit.map_or(most, |limit| limit.min(most)));
    elsewhere.since = ask.since;
    elsewhere.filter = ask.filter;
    elsewhere.room_network = ask.network;
    let page = remote::ask::public_rooms(app, &server, elsewhere).await?;
    let mut json = json!({
        "chunk": page.chunk, "next_batch": page.next_batch, "prev_batch": page.prev_batch,
        "total_room_count_estimate": page.total_room_count_estimate,
    });
    if let Some(fields) = json.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
    }
    Ok(RawJson(json.to_string().into()))
}

/// `GET /_matrix/client/v3/publicRooms`
pub(crate) async fn get_public_rooms(
    app: App,
    public: Public<get_public_rooms::v3::Request>,
) -> Result<RawJson> {
    let request = public.request;
    let (limit, since) = (request.limit, request.since);
    let ask = Ask { limit, since, filter: Filter::new(), network: RoomNetwork::Matrix };
    page(&app, request.server, ask).await
}

/// `POST /_matrix/client/v3/publicRooms`
pub(crate) async fn get_public_rooms_filtered(
    app: App,
    client: Client<get_public_rooms_filtered::v3::Request>,
) -> Result<RawJson> {
    let request = client.request;
    let (limit, since, filter) = (request.limit, request.since, request.filter);
    let ask = Ask { limit, since, filter, network: request.room_network };
    page(&app, request.server, ask).await
}
