//! Invitations of our users by other servers.

use ruma::{OwnedEventId, OwnedRoomId, RoomVersionId, api::federation::membership::create_invite};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    api::{
        Routes,
        extract::Server,
        policy::{Body, MIB},
        raw::Raw,
        reply::RawJson,
    },
    error::Result,
    flows::{
        App,
        limits::Limit,
        remote::invite::{self, Coming},
    },
    json::{JsonRef, JsonText, Object},
};

pub(crate) fn routes(r: &mut Routes) {
    r.server(invite_v1).limit(Limit::Membership).body(Body::Json(MIB));
    r.server(invite).limit(Limit::Membership).body(Body::Json(MIB));
}

/// The body of an invitation. The events in it are kept as they came, because they are signed.
#[derive(Deserialize)]
struct Invitation {
    room_version: RoomVersionId,
    event: Box<RawValue>,
    #[serde(default)]
    invite_room_state: Vec<Box<RawValue>>,
}

/// `PUT /_matrix/federation/v2/invite/{roomId}/{eventId}`
pub(crate) async fn invite(app: App, server: Server<Raw<create_invite::v2::Request>>) -> Result<RawJson> {
    let request = server.request;
    let (room_id, event_id): (OwnedRoomId, OwnedEventId) = (request.id(0)?, request.id(1)?);
    let Invitation { room_version, event, invite_room_state } = request.json()?;
    let coming = Coming { room_id, event_id, version: room_version, event, state: invite_room_state };
    let event = invite::receive(&app, &server.origin, coming).await?;
    let mut answer = Object::with_capacity(event.get().len() + 16);
    answer.json("event", JsonRef::from(&*event));
    Ok(RawJson(answer.finish().into()))
}

/// `PUT /_matrix/federation/v1/invite/{roomId}/{eventId}`
pub(crate) async fn invite_v1(app: App, server: Server<Raw<create_invite::v1::Request>>) -> Result<RawJson> {
    let request = server.request;
    let (room_id, event_id): (OwnedRoomId, OwnedEventId) = (request.id(0)?, request.id(1)?);
    let event: Box<RawValue> = request.json()?;
    let FirstInvitation { unsigned: Telling { invite_room_state } } = request.json()?;
    let version = invite::version_in(&invite_room_state);
    let coming = Coming { room_id, event_id, version, event, state: invite_room_state };
    let event = invite::receive(&app, &server.origin, coming).await?;
    let mut answer = Object::with_capacity(event.get().len() + 16);
    answer.json("event", JsonRef::from(&*event));
    let status = JsonText::stored(b"200");
    Ok(RawJson(JsonText::list(&[status, answer.finish()]).into()))
}

/// The parts of the body beside the event, in the first form of the endpoint, where the body is the event itself.
#[derive(Deserialize)]
struct FirstInvitation {
    #[serde(default)]
    unsigned: Telling,
}

#[derive(Deserialize, Default)]
struct Telling {
    #[serde(default)]
    invite_room_state: Vec<Box<RawValue>>,
}
