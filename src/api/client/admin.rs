//! Admins of this server look at accounts and moderate them: who uses one from where, and whether it is locked or suspended.
//!
//! Specification: client-server API, "Server Administration" and "Account moderation".

use ruma::{
    OwnedUserId, UserId,
    api::client::admin::{get_user_info, is_user_locked, is_user_suspended, lock_user, suspend_user},
};
use serde_json::{Map, Value, json};

use crate::{
    accounts::{Caller, devices, users},
    api::{
        Routes,
        extract::{Admin, Client},
        reply::RawJson,
    },
    error::{Refusal, Result},
    flows::{App, account::standing, limits::Limit},
    ids::UserNum,
    schema::accounts::{SeenRow, UserRow},
};

pub(crate) fn routes(r: &mut Routes) {
    // A suspended admin looks at nobody else.
    r.client(get_user_info)
        .limit(Limit::Read)
        .suspended_if(|wish| wish.path.first().is_some_and(|user| *user == wish.user_id.as_str()));
    r.admin(is_user_locked).limit(Limit::Read);
    r.admin(lock_user).limit(Limit::Other);
    r.admin(is_user_suspended).limit(Limit::Read);
    r.admin(suspend_user).limit(Limit::Other);
}

/// `GET /_matrix/client/v3/admin/whois/{userId}`
pub(crate) async fn get_user_info(app: App, client: Client<get_user_info::v3::Request>) -> Result<RawJson> {
    let (caller, user_id) = (client.caller, client.request.user_id);
    if caller.user_id != user_id && !caller.is_admin {
        return Err(Refusal::forbidden("Only admins of this server can look at others.").into());
    }
    let owned = app.clone();
    let list = move || {
        let snapshot = owned.store.snapshot();
        let user = users::require_num(&*snapshot, &user_id)?;
        let mut told = Map::new();
        for device in devices::list(&*snapshot, user)? {
            let seen = devices::find_seen(&*snapshot, user, device.num)?;
            let connections: Vec<Value> = seen.into_iter().map(connection).collect();
            told.insert(device.id.to_string(), json!({ "sessions": [{ "connections": connections }] }));
        }
        Ok(json!({ "user_id": user_id, "devices": told }).to_string().into())
    };
    app.env.blocking(list).await.map(RawJson)
}

/// Writes what is known of the last use of a device.
fn connection(seen: SeenRow) -> Value {
    let mut told = Map::new();
    told.extend(seen.ip.map(|ip| ("ip".to_owned(), ip.into())));
    told.insert("last_seen".to_owned(), seen.ms.into());
    told.extend(seen.agent.map(|agent| ("user_agent".to_owned(), agent.into())));
    told.into()
}

/// Finds the account whose standing an admin asks about or sets. Errors: 400 `M_INVALID_PARAM` for a user of another server, 404
/// `M_NOT_FOUND` for one that is not there or has ended, 403 `M_FORBIDDEN` for another admin.
fn require_subject(app: &App, caller: &Caller, user_id: &UserId) -> Result<(UserNum, UserRow)> {
    if *user_id.server_name() != app.config.server.name {
        return Err(Refusal::invalid_param(format!("{user_id} is no user of this server.")).into());
    }
    let snapshot = app.store.snapshot();
    let user = users::require_num(&*snapshot, user_id)?;
    let row = users::require(&*snapshot, user)?;
    if row.is_deactivated {
        return Err(Refusal::not_found("There is no such user here.").into());
    }
    if row.is_admin && user != caller.user {
        return Err(Refusal::forbidden("The account of another admin cannot be locked or suspended.").into());
    }
    Ok((user, row))
}

/// Finds the account whose standing an admin sets. Errors: as of [`require_subject`], and 403 `M_FORBIDDEN` for their own.
fn require_other(app: &App, caller: &Caller, user_id: &OwnedUserId) -> Result<UserNum> {
    if caller.user_id == *user_id {
        return Err(Refusal::forbidden("You cannot lock or suspend your own account.").into());
    }
    require_subject(app, caller, user_id).map(|(user, _)| user)
}

/// `GET /_matrix/client/v1/admin/lock/{userId}`
pub(crate) async fn is_user_locked(
    app: App,
    admin: Admin<is_user_locked::v1::Request>,
) -> Result<is_user_locked::v1::Response> {
    let (_, row) = require_subject(&app, &admin.caller, &admin.request.user_id)?;
    Ok(is_user_locked::v1::Response::new(row.is_locked))
}

/// `PUT /_matrix/client/v1/admin/lock/{userId}`
pub(crate) async fn lock_user(
    app: App,
    admin: Admin<lock_user::v1::Request>,
) -> Result<lock_user::v1::Response> {
    let (user, locked) = (require_other(&app, &admin.caller, &admin.request.user_id)?, admin.request.locked);
    let row = standing::set(&app, user, Some(locked), None).await?;
    Ok(lock_user::v1::Response::new(row.is_locked))
}

/// `GET /_matrix/client/v1/admin/suspend/{userId}`
pub(crate) async fn is_user_suspended(
    app: App,
    admin: Admin<is_user_suspended::v1::Request>,
) -> Result<is_user_suspended::v1::Response> {
    let (_, row) = require_subject(&app, &admin.caller, &admin.request.user_id)?;
    Ok(is_user_suspended::v1::Response::new(row.is_suspended))
}

/// `PUT /_matrix/client/v1/admin/suspend/{userId}`
pub(crate) async fn suspend_user(
    app: App,
    admin: Admin<suspend_user::v1::Request>,
) -> Result<suspend_user::v1::Response> {
    let (user, suspended) =
        (require_other(&app, &admin.caller, &admin.request.user_id)?, admin.request.suspended);
    let row = standing::set(&app, user, None, Some(suspended)).await?;
    Ok(suspend_user::v1::Response::new(row.is_suspended))
}
