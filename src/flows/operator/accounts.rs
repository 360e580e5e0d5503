//! The operator's commands for one account: finding it, its devices, and whether it is locked or suspended.

use ruma::{OwnedDeviceId, OwnedUserId};
use serde::{Deserialize, Serialize};

use crate::{
    accounts::{devices, names, users},
    error::{Refusal, Result},
    flows::{App, account::standing},
    ids::UserNum,
};

/// The devices of an account.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DevicesOf {
    /// The user id of the account.
    pub user_id: OwnedUserId,
    /// The devices, by id.
    pub devices: Vec<DeviceEntry>,
}

/// A device in a list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeviceEntry {
    /// The id of the device.
    pub device_id: OwnedDeviceId,
    /// The name that people see, if one was given.
    pub display_name: Option<String>,
    /// When it logged in, in milliseconds since the epoch.
    pub created_ms: u64,
    /// When it was last seen, in milliseconds since the epoch.
    pub last_seen_ms: Option<u64>,
    /// How many seconds ago that was.
    pub seen_s_ago: Option<u64>,
    /// The address from which it was last seen.
    pub last_seen_ip: Option<String>,
}

/// Lists the devices of an account, by id. Errors: 404 for an account that does not exist.
pub async fn list_devices(app: &App, name: &str) -> Result<DevicesOf> {
    let (user, user_id) = require_user(app, name)?;
    let (snapshot, now_ms) = (app.store.snapshot(), app.env.now_ms());
    let list = move || {
        let mut entries = Vec::new();
        for device in devices::list(&*snapshot, user)? {
            let seen = devices::find_seen(&*snapshot, user, device.num)?;
            entries.push(DeviceEntry {
                device_id: device.id,
                display_name: device.display_name,
                created_ms: device.created_ms,
                last_seen_ms: seen.as_ref().map(|seen| seen.ms),
                seen_s_ago: seen.as_ref().map(|seen| now_ms.saturating_sub(seen.ms) / 1000),
                last_seen_ip: seen.and_then(|seen| seen.ip),
            });
        }
        Ok(entries)
    };
    Ok(DevicesOf { user_id, devices: app.env.blocking(list).await? })
}

/// The account that the operator names by a user id or a localpart, in any case of letters, as in a log-in.
/// Errors: 400 for a name that is no user of this server, 404 for an account that does not exist.
pub(super) fn require_user(app: &App, name: &str) -> Result<(UserNum, OwnedUserId)> {
    let meant = names::meant_user_id(name, app.accounts.server_name())
        .ok_or_else(|| Refusal::invalid_param(format!("{name} is no user of this server.")))?;
    users::find_meant(&*app.store.snapshot(), &meant)?
        .ok_or_else(|| Refusal::not_found(format!("There is no account {meant}.")).into())
}

/// Refuses an account that has ended: 400 `M_INVALID_PARAM`.
pub(super) fn require_live(app: &App, name: &str) -> Result<(UserNum, OwnedUserId)> {
    let (user, user_id) = require_user(app, name)?;
    if users::require(&*app.store.snapshot(), user)?.is_deactivated {
        return Err(Refusal::invalid_param(format!("{user_id} is deactivated.")).into());
    }
    Ok((user, user_id))
}

/// Whether an account is locked, and whether it is suspended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Standing {
    /// The user id of the account.
    pub user_id: OwnedUserId,
    /// Whether nothing can be done with it but to log out.
    pub locked: bool,
    /// Whether it does nothing that others see.
    pub suspended: bool,
}

/// Locks or suspends an account, or ends that; what is none stays as it is.
pub async fn set_standing(
    app: &App,
    name: &str,
    locked: Option<bool>,
    suspended: Option<bool>,
) -> Result<Standing> {
    let (user, user_id) = require_live(app, name)?;
    let row = standing::set(app, user, locked, suspended).await?;
    Ok(Standing { user_id, locked: row.is_locked, suspended: row.is_suspended })
}
