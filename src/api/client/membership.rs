//! The members of a room: join, leave, invite, kick, ban, unban, forget, and lists of members and of rooms.

use ruma::{
    CanonicalJsonObject, OwnedRoomId, OwnedServerName, OwnedUserId, UserId,
    api::{
        client::membership::{
            ban_user, forget_room, get_member_events, invite_user, join_room_by_id, join_room_by_id_or_alias,
            joined_members, joined_rooms, kick_user, leave_room, unban_user,
        },
        error::ErrorKind,
    },
};

use serde::Deserialize;
use serde_json::json;

use crate::{
    api::{Routes, extract::Client, policy::Guests, raw::Raw, reply::RawJson},
    error::{Refusal, Result},
    flows::{
        App,
        limits::Limit,
        membership,
        room::{
            look,
            look::{MembersWanted, Whole},
            membership as here,
        },
    },
    ids::RoomNum,
    rooms::{self, members, membership::Act},
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(join_room_by_id).limit(Limit::Membership).guests(Guests::Yes).not_suspended();
    r.client(join_room_by_id_or_alias).limit(Limit::Membership).guests(Guests::Yes).not_suspended();
    r.client(leave_room).limit(Limit::Membership).guests(Guests::Yes);
    r.client(forget_room).limit(Limit::Other);
    r.client(invite_user).limit(Limit::Membership).not_suspended();
    r.client(kick_user).limit(Limit::Membership).not_suspended();
    r.client(ban_user).limit(Limit::Membership).not_suspended();
    r.client(unban_user).limit(Limit::Membership).not_suspended();
    r.client(joined_rooms).limit(Limit::Read);
    r.client(joined_members).limit(Limit::Read);
    r.client(get_member_events).limit(Limit::Read).guests(Guests::Yes);
    r.client(mutual_rooms).limit(Limit::Read);
}

/// The specification gives these fields a meaning in the body of a request to join.
const JOIN_FIELDS: [&str; 4] = ["reason", "third_party_signed", "via", "server_name"];

/// Reads the other fields in the body of a request to join. They become part of the member event, because clients and
/// Complement know that from Synapse.
fn extra(body: &[u8]) -> Result<CanonicalJsonObject> {
    let mut extra: CanonicalJsonObject = serde_json::from_slice(body).map_err(|error| {
        Refusal::bad_json(format!("The request's body cannot become part of a member event: {error}."))
    })?;
    extra.retain(|key, _| !JOIN_FIELDS.contains(&key.as_str()));
    Ok(extra)
}

/// The servers that a request names as likely to be in the room. `server_name` is the older name of the parameter.
pub(super) fn via<R>(request: &Raw<R>) -> Result<Vec<OwnedServerName>> {
    let named = ["via", "server_name"].into_iter().flat_map(|name| request.query_all(name));
    let servers = named.map(OwnedServerName::try_from).collect::<Result<_, _>>();
    Ok(servers.map_err(|_| Refusal::invalid_param("`via` must be the name of a server."))?)
}

/// `POST /_matrix/client/v3/rooms/{roomId}/join`
pub(crate) async fn join_room_by_id(
    app: App,
    client: Client<Raw<join_room_by_id::v3::Request>>,
) -> Result<join_room_by_id::v3::Response> {
    let (request, extra) = (client.request.read()?, extra(client.request.body.as_ref())?);
    let named = ((&*request.room_id).into(), via(&client.request)?);
    let room_id = membership::join(&app, &client.caller, named, request.reason, extra).await?;
    Ok(join_room_by_id::v3::Response::new(room_id))
}

/// `POST /_matrix/client/v3/join/{roomIdOrAlias}`
pub(crate) async fn join_room_by_id_or_alias(
    app: App,
    client: Client<Raw<join_room_by_id_or_alias::v3::Request>>,
) -> Result<join_room_by_id_or_alias::v3::Response> {
    let (request, extra) = (client.request.read()?, extra(client.request.body.as_ref())?);
    let named = (&*request.room_id_or_alias, via(&client.request)?);
    let room_id = membership::join(&app, &client.caller, named, request.reason, extra).await?;
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
    here::forget(&app, &client.caller, &client.request.room_id).await?;
    Ok(forget_room::v3::Response::new())
}

/// The body of an invitation, by user id or by address. It is read here and not by ruma, so that a missing field can be
/// named.
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
    membership::invite(&app, &caller, &room, target, invitation.reason).await?;
    Ok(invite_user::v3::Response::new())
}

/// `POST /_matrix/client/v3/rooms/{roomId}/kick`
pub(crate) async fn kick_user(
    app: App,
    client: Client<kick_user::v3::Request>,
) -> Result<kick_user::v3::Response> {
    let request = client.request;
    here::act(&app, &client.caller, &request.room_id, request.user_id, Act::Kick, request.reason).await?;
    Ok(kick_user::v3::Response::new())
}

/// `POST /_matrix/client/v3/rooms/{roomId}/ban`
pub(crate) async fn ban_user(
    app: App,
    client: Client<ban_user::v3::Request>,
) -> Result<ban_user::v3::Response> {
    let request = client.request;
    here::act(&app, &client.caller, &request.room_id, request.user_id, Act::Ban, request.reason).await?;
    Ok(ban_user::v3::Response::new())
}

/// `POST /_matrix/client/v3/rooms/{roomId}/unban`
pub(crate) async fn unban_user(
    app: App,
    client: Client<unban_user::v3::Request>,
) -> Result<unban_user::v3::Response> {
    let request = client.request;
    here::act(&app, &client.caller, &request.room_id, request.user_id, Act::Unban, request.reason).await?;
    Ok(unban_user::v3::Response::new())
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
pub(crate) async fn joined_members(app: App, client: Client<joined_members::v3::Request>) -> Result<Whole> {
    look::joined_members(&app, &client.caller, &client.request.room_id).await
}

/// `GET /_matrix/client/v3/rooms/{roomId}/members`
pub(crate) async fn get_member_events(
    app: App,
    client: Client<get_member_events::v3::Request>,
) -> Result<Whole> {
    let request = client.request;
    let wanted = MembersWanted {
        at: request.at,
        only: request.membership.map(|membership| membership.to_string()),
        not: request.not_membership.map(|membership| membership.to_string()),
    };
    look::members(&app, &client.caller, &request.room_id, wanted).await
}

endpoint!(
    /// The endpoint at its stable path; ruma knows the unstable path only.
    MutualRooms, GET,
    "/_matrix/client/v1/mutual_rooms"
);

/// A page has at most this many rooms; `next_batch` leads to the rest.
const ROOMS_A_PAGE: usize = 500;

/// `GET /_matrix/client/v1/mutual_rooms`
pub(crate) async fn mutual_rooms(app: App, client: Client<Raw<MutualRooms>>) -> Result<RawJson> {
    let (caller, request) = (client.caller, client.request);
    let other = request.query("user_id").ok_or_else(|| Refusal::invalid_param("`user_id` is missing."))?;
    let other = UserId::parse(other).map_err(|_| Refusal::invalid_param("`user_id` is not a user id."))?;
    if other == caller.user_id {
        return Err(Refusal::invalid_param("`user_id` must name another user than yourself.").into());
    }
    let after: u64 = match request.query("from") {
        Some(from) => from.strip_prefix('m').and_then(|room| room.parse().ok()).ok_or_else(|| {
            Refusal::invalid_param("`from` must be the `next_batch` of a page of this list.")
        })?,
        None => 0,
    };
    let store = app.store.clone();
    let json = app.env.blocking(move || {
        let snapshot = store.snapshot();
        let own = members::list_joined_rooms(&*snapshot, caller.user)?;
        let shared = members::list_joined_of(&*snapshot, &own, other.as_str())?;
        let count = shared.len();
        let mut rest = shared.into_iter().filter(|room| *room > RoomNum(after));
        let page: Vec<RoomNum> = rest.by_ref().take(ROOMS_A_PAGE).collect();
        let ids = page.iter().map(|room| rooms::require_row(&*snapshot, *room).map(|row| row.id));
        let ids = ids.collect::<std::result::Result<Vec<_>, _>>()?;
        let mut json = json!({ "joined": ids, "count": count });
        if let (Some(_), Some(last), Some(json)) = (rest.next(), page.last(), json.as_object_mut()) {
            json.insert("next_batch".to_owned(), format!("m{}", last.0).into());
        }
        Ok(json)
    });
    Ok(RawJson(json.await?.to_string().into()))
}
