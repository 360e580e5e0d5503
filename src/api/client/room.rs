//! Creates rooms, and reads single things of a room: its aliases, an event, the event at a moment.

use ruma::{
    MilliSecondsSinceUnixEpoch, RoomVersionId, UInt,
    api::client::room::{
        aliases as list_aliases, create_room, get_event_by_timestamp, get_room_event, upgrade_room,
    },
};

use crate::{
    api::{
        Routes,
        client::relations::direction,
        extract::Client,
        policy::{Body, Guests, MIB},
        raw::Raw,
        reply::RawJson,
    },
    error::Result,
    flows::{
        App,
        limits::Limit,
        membership,
        remote::read_back,
        room::{aliases, look, upgrade},
    },
    rooms::versions,
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(create_room).limit(Limit::Membership).body(Body::Json(MIB)).not_suspended();
    r.client(upgrade_room).limit(Limit::Membership).not_suspended();
    r.client(list_aliases).limit(Limit::Read);
    r.client(get_room_event).limit(Limit::Read).guests(Guests::Yes);
    r.client(get_event_by_timestamp).limit(Limit::Read);
}

/// Refuses a version whose name is none that a version can have, as any other that this server does not speak: 400
/// `M_UNSUPPORTED_ROOM_VERSION`. Ruma would call it a wrong parameter.
fn require_version<R>(request: &Raw<R>, field: &str) -> Result<()> {
    let named = request.body.field(field).and_then(|text| serde_json::from_str::<String>(text).ok());
    match named.filter(|name| RoomVersionId::try_from(name.as_str()).is_err()) {
        Some(name) => Err(versions::unsupported(&name).into()),
        None => Ok(()),
    }
}

/// `POST /_matrix/client/v3/createRoom`
pub(crate) async fn create_room(
    app: App,
    client: Client<Raw<create_room::v3::Request>>,
) -> Result<create_room::v3::Response> {
    require_version(&client.request, "room_version")?;
    let room_id = membership::create(&app, &client.caller, client.request.read()?).await?;
    Ok(create_room::v3::Response::new(room_id))
}

/// `POST /_matrix/client/v3/rooms/{roomId}/upgrade`
pub(crate) async fn upgrade_room(
    app: App,
    client: Client<Raw<upgrade_room::v3::Request>>,
) -> Result<upgrade_room::v3::Response> {
    require_version(&client.request, "new_version")?;
    let request = client.request.read()?;
    let upgrade_room::v3::Request { room_id, new_version, additional_creators, .. } = request;
    let replaced = upgrade::upgrade(&app, &client.caller, &room_id, new_version, additional_creators).await?;
    Ok(upgrade_room::v3::Response::new(replaced))
}

/// `GET /_matrix/client/v3/rooms/{roomId}/aliases`
pub(crate) async fn list_aliases(
    app: App,
    client: Client<list_aliases::v3::Request>,
) -> Result<list_aliases::v3::Response> {
    Ok(list_aliases::v3::Response::new(aliases::list(&app, &client.caller, &client.request.room_id)?))
}

/// `GET /_matrix/client/v3/rooms/{roomId}/event/{eventId}`
pub(crate) async fn get_room_event(
    app: App,
    client: Client<Raw<get_room_event::v3::Request>>,
) -> Result<RawJson> {
    let request = client.request.read()?;
    let unredacted = client.request.query(INCLUDE_UNREDACTED).is_some_and(|value| value == "true");
    look::event(&app, &client.caller, &request.room_id, &request.event_id, unredacted).await.map(RawJson)
}

/// The parameter by which a moderator asks for the content that a redaction removed (MSC2815).
const INCLUDE_UNREDACTED: &str = "fi.mau.msc2815.include_unredacted_content";

/// `GET /_matrix/client/v1/rooms/{roomId}/timestamp_to_event`
pub(crate) async fn get_event_by_timestamp(
    app: App,
    client: Client<get_event_by_timestamp::v1::Request>,
) -> Result<get_event_by_timestamp::v1::Response> {
    let request = client.request;
    let (time_ms, direction) = (request.ts.get().into(), direction(request.dir));
    let (event_id, sent_ms) =
        read_back::event_at_time(&app, &client.caller, &request.room_id, time_ms, direction).await?;
    let sent = MilliSecondsSinceUnixEpoch(UInt::new_saturating(sent_ms));
    Ok(get_event_by_timestamp::v1::Response::new(event_id, sent))
}
