//! Questions of other servers about our users and aliases (server-server API, "Querying for information").

use ruma::{OwnedServerName, RoomAliasId, UserId};
use serde_json::{Map, Value};

use crate::{
    accounts::profiles,
    error::{Error, Refusal, Result},
    flows::App,
    rooms::{self, aliases, members},
};

/// Tell at most this many servers of those that are in a room.
const SERVERS_MAX: usize = 200;

/// Gives the profile of one of our users, or one field of it. Errors: 404 `M_NOT_FOUND` for a user or field that is not there;
/// 403 `M_FORBIDDEN` for a user of another server.
pub(crate) fn profile(app: &App, user_id: &UserId, field: Option<&str>) -> Result<Map<String, Value>> {
    if *user_id.server_name() != *app.config.server.name {
        return Err(Refusal::forbidden("`user_id` is a user of another server.").into());
    }
    let snapshot = app.store.snapshot();
    let user = profiles::require_user(&*snapshot, user_id)?;
    let mut profile = profiles::read(&*snapshot, user)?;
    if let Some(field) = field {
        profile.retain(|name, _| name == field);
    }
    Ok(profile)
}

/// The room that an alias names, and servers that are in it.
pub(crate) struct Named {
    pub(crate) room_id: ruma::OwnedRoomId,
    pub(crate) servers: Vec<OwnedServerName>,
}

/// Finds the room of one of our aliases. Errors: 404 `M_NOT_FOUND`.
pub(crate) fn alias(app: &App, alias: &RoomAliasId) -> Result<Named> {
    let unknown = || Error::from(Refusal::not_found("This server knows no such alias."));
    if *alias.server_name() != *app.config.server.name {
        return Err(unknown());
    }
    let snapshot = app.store.snapshot();
    let row = aliases::find(&*snapshot, alias)?.ok_or_else(unknown)?;
    let room = rooms::require_row(&*snapshot, row.room)?;
    let mut servers = Vec::new();
    for server in members::list_servers(&*snapshot, row.room)?.take(SERVERS_MAX) {
        servers.extend(OwnedServerName::try_from(server?));
    }
    let us = &app.config.server.name;
    servers.retain(|server| server != us);
    servers.insert(0, us.clone());
    Ok(Named { room_id: room.id, servers })
}
