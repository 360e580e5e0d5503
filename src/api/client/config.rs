//! Account data, global and of rooms: reading it, and setting it.

use ruma::{
    OwnedRoomId, OwnedUserId, UserId,
    api::{
        client::config::{
            get_global_account_data, get_room_account_data, set_global_account_data, set_room_account_data,
        },
        error::ErrorKind,
    },
};

use crate::{
    accounts::{Caller, account_data},
    api::{
        Routes,
        extract::Client,
        policy::{Body, KIB},
        raw::Raw,
        reply::RawJson,
    },
    error::{Exception, Refusal, Result},
    flows::{App, account::keep, limits::Limit},
    push,
    schema::event_types::{FULLY_READ, PUSH_RULES},
};

/// The lists of direct chats and of ignored users grow with their owner, so that account data may be larger than other
/// bodies.
const BODY: Body = Body::Json(512 * KIB);

pub(crate) fn routes(r: &mut Routes) {
    r.client(get_global_account_data).limit(Limit::Read);
    r.client(set_global_account_data).limit(Limit::Other).body(BODY);
    r.client(get_room_account_data).limit(Limit::Read);
    r.client(set_room_account_data).limit(Limit::Other).body(BODY);
    r.client(delete_global_account_data).limit(Limit::Other).body(Body::Json(KIB));
    r.client(delete_room_account_data).limit(Limit::Other).body(Body::Json(KIB));
}

/// Refuses what belongs to another user: 403 `M_FORBIDDEN`.
pub(crate) fn require_self(caller: &Caller, user_id: &UserId) -> Result<()> {
    if caller.user_id == user_id {
        Ok(())
    } else {
        Err(Refusal::forbidden("You can only use your own account data, tags and filters.").into())
    }
}

/// Refuses types that have an endpoint of their own and cannot be set here: 405 `M_BAD_JSON`.
fn require_free_type(event_type: &str) -> Result<()> {
    if matches!(event_type, FULLY_READ | PUSH_RULES) {
        let refusal = Refusal::new(
            ErrorKind::BadJson,
            format!("`{event_type}` has an endpoint of its own and cannot be set as account data."),
        );
        return Err(refusal.exception(Exception::WrongMethod).into());
    }
    Ok(())
}

fn find(app: &App, caller: &Caller, room: Option<&OwnedRoomId>, event_type: &str) -> Result<RawJson> {
    let snapshot = app.store.snapshot();
    if room.is_none() && event_type == PUSH_RULES {
        let rules = push::rules::rules_of(&*snapshot, caller.user, &caller.user_id)?;
        let rules = push::rules::as_json(&rules)?;
        return Ok(RawJson(serde_json::json!({ "global": rules }).to_string().into()));
    }
    let row = account_data::find(&*snapshot, caller.user, room.map(|room| &**room), event_type)?;
    match row {
        Some(row) => Ok(RawJson(row.content)),
        None => Err(Refusal::not_found("There is no account data of this type.").into()),
    }
}

/// `GET /_matrix/client/v3/user/{userId}/account_data/{type}`
pub(crate) async fn get_global_account_data(
    app: App,
    client: Client<get_global_account_data::v3::Request>,
) -> Result<RawJson> {
    require_self(&client.caller, &client.request.user_id)?;
    find(&app, &client.caller, None, &client.request.event_type.to_string())
}

/// `GET /_matrix/client/v3/user/{userId}/rooms/{roomId}/account_data/{type}`
pub(crate) async fn get_room_account_data(
    app: App,
    client: Client<get_room_account_data::v3::Request>,
) -> Result<RawJson> {
    let request = client.request;
    require_self(&client.caller, &request.user_id)?;
    find(&app, &client.caller, Some(&request.room_id), &request.event_type.to_string())
}

/// `PUT /_matrix/client/v3/user/{userId}/account_data/{type}`
pub(crate) async fn set_global_account_data(
    app: App,
    client: Client<Raw<set_global_account_data::v3::Request>>,
) -> Result<set_global_account_data::v3::Response> {
    let request = client.request;
    require_self(&client.caller, &request.id::<OwnedUserId>(0)?)?;
    let event_type = request.arg(1).to_owned();
    require_free_type(&event_type)?;
    keep::keep_account_data(&app, &client.caller, None, event_type, request.body.bytes()).await?;
    Ok(set_global_account_data::v3::Response::new())
}

/// `PUT /_matrix/client/v3/user/{userId}/rooms/{roomId}/account_data/{type}`
pub(crate) async fn set_room_account_data(
    app: App,
    client: Client<Raw<set_room_account_data::v3::Request>>,
) -> Result<set_room_account_data::v3::Response> {
    let request = client.request;
    require_self(&client.caller, &request.id::<OwnedUserId>(0)?)?;
    let room: OwnedRoomId = request.id(1)?;
    let event_type = request.arg(2).to_owned();
    require_free_type(&event_type)?;
    keep::keep_account_data(&app, &client.caller, Some(room), event_type, request.body.bytes()).await?;
    Ok(set_room_account_data::v3::Response::new())
}

endpoint!(
    /// The endpoint that deletes global account data (MSC3391).
    DeleteGlobal,
    DELETE,
    "/_matrix/client/unstable/org.matrix.msc3391/user/{user_id}/account_data/{type}"
);
endpoint!(
    /// The endpoint that deletes account data of a room (MSC3391).
    DeleteOfRoom,
    DELETE,
    "/_matrix/client/unstable/org.matrix.msc3391/user/{user_id}/rooms/{room_id}/account_data/{type}"
);

/// `DELETE /_matrix/client/unstable/org.matrix.msc3391/user/{userId}/account_data/{type}`
pub(crate) async fn delete_global_account_data(
    app: App,
    client: Client<Raw<DeleteGlobal>>,
) -> Result<RawJson> {
    let request = client.request;
    require_self(&client.caller, &request.id::<OwnedUserId>(0)?)?;
    let event_type = request.arg(1).to_owned();
    require_free_type(&event_type)?;
    keep::delete_account_data(&app, &client.caller, None, event_type).await?;
    Ok(RawJson(serde_json::json!({}).to_string().into()))
}

/// `DELETE /_matrix/client/unstable/org.matrix.msc3391/user/{userId}/rooms/{roomId}/account_data/{type}`
pub(crate) async fn delete_room_account_data(app: App, client: Client<Raw<DeleteOfRoom>>) -> Result<RawJson> {
    let request = client.request;
    require_self(&client.caller, &request.id::<OwnedUserId>(0)?)?;
    let room: OwnedRoomId = request.id(1)?;
    let event_type = request.arg(2).to_owned();
    require_free_type(&event_type)?;
    keep::delete_account_data(&app, &client.caller, Some(room), event_type).await?;
    Ok(RawJson(serde_json::json!({}).to_string().into()))
}
