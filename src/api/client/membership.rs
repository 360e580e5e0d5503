//! Who is in a room: join, leave, invite, kick, ban, unban, knock, forget, and lists of members.

use ruma::{
    CanonicalJsonObject, OwnedRoomId, OwnedUserId,
    api::client::{
        knock::knock_room,
        membership::{
            ban_user, forget_room, get_member_events, invite_user, join_room_by_id, join_room_by_id_or_alias,
            joined_members, joined_rooms, kick_user, leave_room, unban_user,
        },
    },
    api::error::ErrorKind,
};

use serde::Deserialize;

use crate::{
    api::{Routes, extract::Client, raw::Raw, reply::RawJson},
    error::{Refusal, Result},
    flows::{
        App,
        room::{
            look,
            look::MembersWanted,
            membership::{self, Act},
        },
    },
    rooms::{self, members},
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(join_room_by_id);
    r.client(join_room_by_id_or_alias);
    r.client(leave_room);
    r.client(forget_room);
    r.client(invite_user);
    r.client(kick_user);
    r.client(ban_user);
    r.client(unban_user);
    r.client(knock_room);
    r.client(joined_rooms);
    r.client(joined_members);
    r.client(get_member_events);
}

/// What the specification gives a meaning in the body of a request to join.
const JOIN_FIELDS: [&str; 4] = ["reason", "third_party_signed", "via", "server_name"];

/// What else stands in the body of a request to join: that becomes part of the member event, as clients and Complement
/// know it from Synapse.
fn extra(body: &[u8]) -> Result<CanonicalJsonObject> {
    let mut extra: CanonicalJsonObject = serde_json::from_slice(body).map_err(|error| {
        Refusal::bad_json(format!("The request's body cannot become part of a member event: {error}."))
    })?;
    extra.retain(|key, _| !JOIN_FIELDS.contains(&key.as_str()));
    Ok(extra)
}

/// `POST /_matrix/client/v3/rooms/{roomId}/join`
pub(crate) async fn join_room_by_id(
    app: App,
    client: Client<Raw<join_room_by_id::v3::Request>>,
) -> Result<join_room_by_id::v3::Response> {
    let (request, extra) = (client.request.read()?, extra(&client.request.body)?);
    let room = (&*request.room_id).into();
    let room_id = membership::join(&app, &client.caller, room, request.reason, extra).await?;
    Ok(join_room_by_id::v3::Response::new(room_id))
}

/// `POST /_matrix/client/v3/join/{roomIdOrAlias}`
pub(crate) async fn join_room_by_id_or_alias(
    app: App,
    client: Client<Raw<join_room_by_id_or_alias::v3::Request>>,
) -> Result<join_room_by_id_or_alias::v3::Response> {
    let (request, extra) = (client.request.read()?, extra(&client.request.body)?);
    let room_id =
        membership::join(&app, &client.caller, &request.room_id_or_alias, request.reason, extra).await?;
    Ok(join_room_by_id_or_alias::v3::Response::new(room_id))
}

/// `POST /_matrix/client/v3/rooms/{roomId}/leave`
pub(crate) async fn leave_room(
    app: App,
    client: Client<leave_room::v3::Request>,
) -> Result<leave_room::v3::Response> {
    membership::leave(&app, &client.caller, &client.request.room_id, client.request.reason).await?;
    Ok(leave_room::v3::Response::new())
}

/// `POST /_matrix/client/v3/rooms/{roomId}/forget`
pub(crate) async fn forget_room(
    app: App,
    client: Client<forget_room::v3::Request>,
) -> Result<forget_room::v3::Response> {
    membership::forget(&app, &client.caller, &client.request.room_id).await?;
    Ok(forget_room::v3::Response::new())
}

/// The body of an invitation, by user id or by address: read here, so that what is missing can be named.
#[derive(Deserialize)]
struct Invitation {
    user_id: Option<OwnedUserId>,
    reason: Option<String>,
    address: Option<String>,
}

/// `POST /_matrix/client/v3/rooms/{roomId}/invite`
pub(crate) async fn invite_user(
    app: App,
    client: Client<Raw<invite_user::v3::Request>>,
) -> Result<invite_user::v3::Response> {
    let Client { caller, request, .. } = client;
    let (room, invitation): (OwnedRoomId, Invitation) = (request.id(0)?, request.json()?);
    if invitation.address.is_some() {
        let message = "This server cannot invite by e-mail address or telephone number.";
        return Err(Refusal::new(ErrorKind::ThreepidDenied, message).into());
    }
    let target = invitation.user_id.ok_or_else(|| Refusal::missing_param("`user_id` is missing."))?;
    membership::act(&app, &caller, &room, target, Act::Invite, invitation.reason).await?;
    Ok(invite_user::v3::Response::new())
}

/// `POST /_matrix/client/v3/rooms/{roomId}/kick`
pub(crate) async fn kick_user(
    app: App,
    client: Client<kick_user::v3::Request>,
) -> Result<kick_user::v3::Response> {
    let request = client.request;
    membership::act(&app, &client.caller, &request.room_id, request.user_id, Act::Kick, request.reason)
        .await?;
    Ok(kick_user::v3::Response::new())
}

/// `POST /_matrix/client/v3/rooms/{roomId}/ban`
pub(crate) async fn ban_user(
    app: App,
    client: Client<ban_user::v3::Request>,
) -> Result<ban_user::v3::Response> {
    let request = client.request;
    membership::act(&app, &client.caller, &request.room_id, request.user_id, Act::Ban, request.reason)
        .await?;
    Ok(ban_user::v3::Response::new())
}

/// `POST /_matrix/client/v3/rooms/{roomId}/unban`
pub(crate) async fn unban_user(
    app: App,
    client: Client<unban_user::v3::Request>,
) -> Result<unban_user::v3::Response> {
    let request = client.request;
    membership::act(&app, &client.caller, &request.room_id, request.user_id, Act::Unban, request.reason)
        .await?;
    Ok(unban_user::v3::Response::new())
}

/// `POST /_matrix/client/v3/knock/{roomIdOrAlias}`
pub(crate) async fn knock_room(
    app: App,
    client: Client<knock_room::v3::Request>,
) -> Result<knock_room::v3::Response> {
    let request = client.request;
    let room_id = membership::knock(&app, &client.caller, &request.room_id_or_alias, request.reason).await?;
    Ok(knock_room::v3::Response::new(room_id))
}

/// `GET /_matrix/client/v3/joined_rooms`
pub(crate) async fn joined_rooms(
    app: App,
    client: Client<joined_rooms::v3::Request>,
) -> Result<joined_rooms::v3::Response> {
    let (store, user) = (app.store.clone(), client.caller.user);
    let joined = app.env.blocking(move || {
        let snapshot = store.snapshot();
        let joined = members::list_joined_rooms(&*snapshot, user)?.into_iter();
        Ok(joined
            .map(|room| rooms::require_row(&*snapshot, room).map(|row| row.id))
            .collect::<Result<_, _>>()?)
    });
    Ok(joined_rooms::v3::Response::new(joined.await?))
}

/// `GET /_matrix/client/v3/rooms/{roomId}/joined_members`
pub(crate) async fn joined_members(app: App, client: Client<joined_members::v3::Request>) -> Result<RawJson> {
    let members = look::joined_members(&app, &client.caller, &client.request.room_id).await?;
    let mut joined = serde_json::Map::new();
    for (user, stored) in members {
        let content: serde_json::Value = serde_json::from_str(stored.row.content()).unwrap_or_default();
        let text = |field: &str| content.get(field).filter(|value| value.is_string()).cloned();
        let mut member = serde_json::Map::new();
        for (name, field) in [("display_name", "displayname"), ("avatar_url", "avatar_url")] {
            member.insert(name.to_owned(), text(field).unwrap_or_default());
        }
        joined.insert(user.into(), member.into());
    }
    Ok(RawJson(serde_json::json!({ "joined": joined }).to_string().into()))
}

/// `GET /_matrix/client/v3/rooms/{roomId}/members`
pub(crate) async fn get_member_events(
    app: App,
    client: Client<get_member_events::v3::Request>,
) -> Result<RawJson> {
    let request = client.request;
    let wanted = MembersWanted {
        at: request.at,
        only: request.membership.map(|membership| membership.to_string()),
        not: request.not_membership.map(|membership| membership.to_string()),
    };
    look::members(&app, &client.caller, &request.room_id, wanted).await.map(RawJson)
}
