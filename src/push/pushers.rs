//! Pushers, which say where a user is told of notifications. A pusher belongs to the device that set it, and ends with it.
//!
//! Specification: client-server API, "Push Notifications", `POST /pushers/set`.

use http::Uri;
use ruma::{api::client::push::PusherKind, push::HttpPusherData};
use serde_json::Value;

use crate::{
    accounts::devices,
    error::{Error, Refusal, Result},
    ids::{DeviceNum, UserNum},
    push::places,
    schema::{self, accounts::EndedDevices, push::PusherRow},
    store::{Batch, Direction, Fault, LogEntry, Read, key::Json},
};

/// A pushkey has at most this many bytes (the specification's bound).
const PUSHKEY_BYTES_MAX: usize = 512;
/// An app id has at most this many characters (the specification's bound).
const APP_ID_CHARS_MAX: usize = 64;
/// A whole pusher has at most this many bytes of JSON.
const PUSHER_BYTES_MAX: usize = 16 << 10;
/// A user has at most this many pushers, because each of them is told of each notification.
const PUSHERS_MAX: usize = 200;
/// The field of a pusher that names the device which set it (MSC3881).
const DEVICE_ID: &str = "org.matrix.msc3881.device_id";
/// The field of a pusher that says whether it is on, which clients may set (MSC3881).
pub const ENABLED: &str = "org.matrix.msc3881.enabled";
/// The path of every push gateway's URL, which the specification prescribes.
const GATEWAY_PATH: &str = "/_matrix/push/v1/notify";

/// A pusher with its app id and pushkey.
pub type Pusher = ((String, String), PusherRow);

/// Lists the pushers of a user by app id and pushkey.
pub fn list(read: &(impl Read + ?Sized), user: UserNum) -> Result<Vec<Pusher>, Fault> {
    let rows = schema::PUSHERS.prefix::<(UserNum,)>(read, (user,), Direction::Up)?;
    rows.map(|row| row.map(|((_, app_id, pushkey), Json(row))| ((app_id, pushkey), row))).collect()
}

/// Lists the pushers of a user as clients see them, with the device that set each and whether it is on (MSC3881).
pub fn list_shown(read: &(impl Read + ?Sized), user: UserNum) -> Result<Vec<Value>, Fault> {
    let pushers = list(read, user)?;
    let devices = if pushers.is_empty() { Vec::new() } else { devices::list(read, user)? };
    let show = |(_, row): Pusher| {
        let mut shown = row.pusher;
        if let Some(shown) = shown.as_object_mut() {
            let device = devices.iter().find(|device| device.num == row.device);
            if let Some(device) = device {
                shown.insert(DEVICE_ID.to_owned(), device.id.as_str().into());
            }
            shown.insert(ENABLED.to_owned(), row.is_enabled.into());
        }
        shown
    };
    Ok(pushers.into_iter().map(show).collect())
}

/// Finds the users who have pushers: each once.
pub fn list_users(read: &(impl Read + ?Sized)) -> Result<Vec<UserNum>, Fault> {
    let mut users = Vec::new();
    for row in schema::PUSHERS.prefix::<()>(read, (), Direction::Up)? {
        let ((user, ..), _) = row?;
        if users.last() != Some(&user) {
            users.push(user);
        }
    }
    Ok(users)
}

/// Finds one pusher of a user.
pub fn find(read: &(impl Read + ?Sized), key: (UserNum, &str, &str)) -> Result<Option<PusherRow>, Fault> {
    Ok(schema::PUSHERS.get(read, key)?.map(|Json(row)| row))
}

/// The users who have a pusher with this app id and pushkey.
pub fn list_owners(read: &(impl Read + ?Sized), app_id: &str, pushkey: &str) -> Result<Vec<UserNum>, Fault> {
    let rows = schema::PUSHER_OWNERS.prefix::<(String, String)>(read, (app_id, pushkey), Direction::Up)?;
    rows.map(|row| row.map(|((_, _, user), ())| user)).collect()
}

/// A pusher that is to be set.
#[derive(Clone, Debug)]
pub struct NewPusher {
    /// The pusher as the client wrote it.
    pub pusher: ruma::api::client::push::Pusher,
    /// Whether pushers of other users with this app id and pushkey stay.
    pub append: bool,
    /// Whether notifications are sent to it (MSC3881).
    pub is_enabled: bool,
    /// The time now, in milliseconds since the epoch.
    pub now_ms: u64,
}

/// Sets a pusher of this device, or replaces the user's one of the same app id and pushkey. Unless `append` is set, other
/// users' pushers with that app id and pushkey are deleted, for the app now belongs to this user. The caller holds the locks
/// of all those users, and the server's. Errors: 400 `M_INVALID_PARAM` for what cannot be a pusher; 413 for too many.
///
/// A pusher that was set before, and was on, keeps its place, because apps set theirs each time they start.
pub fn set(
    batch: &mut Batch,
    (user, device): (UserNum, DeviceNum),
    new: &NewPusher,
    allow_http: bool,
) -> Result<()> {
    let NewPusher { pusher, append, is_enabled, now_ms } = new;
    let (app_id, pushkey) = (pusher.ids.app_id.as_str(), pusher.ids.pushkey.as_str());
    check_ids(app_id, pushkey)?;
    match &pusher.kind {
        PusherKind::Http(data) => check_gateway(data, allow_http)?,
        PusherKind::Email(_) => return Err(Refusal::invalid_param("This server sends no e-mail.").into()),
        _ => return Err(Refusal::invalid_param("`kind` must be `http`.").into()),
    }
    let shown = serde_json::to_value(pusher).map_err(|error| Error::broken(error.to_string()))?;
    if shown.to_string().len() > PUSHER_BYTES_MAX {
        return Err(Refusal::invalid_param("A pusher has at most 16 KiB of JSON.").into());
    }
    let known = find(batch, (user, app_id, pushkey))?;
    if known.is_none() && list(batch, user)?.len() >= PUSHERS_MAX {
        return Err(Refusal::too_large(format!("An account has at most {PUSHERS_MAX} pushers.")).into());
    }
    if !*append {
        for other in list_owners(batch, app_id, pushkey)? {
            if other != user {
                delete(batch, other, app_id, pushkey)?;
            }
        }
    }
    let row = PusherRow { device, pusher: shown, is_enabled: *is_enabled, set_ms: *now_ms, has_place: true };
    schema::PUSHERS.put(batch, (user, app_id, pushkey), &Json(row));
    schema::PUSHER_OWNERS.put(batch, (app_id, pushkey, user), &());
    let at = batch.position(&LogEntry::Account { user });
    let was_on = known.is_some_and(|known| known.is_enabled);
    if !was_on || places::find(batch, (user, app_id, pushkey))?.is_none() {
        places::begin(batch, (user, app_id, pushkey), at)?;
    }
    Ok(())
}

fn check_ids(app_id: &str, pushkey: &str) -> Result<(), Refusal> {
    if pushkey.is_empty() || pushkey.len() > PUSHKEY_BYTES_MAX {
        return Err(Refusal::invalid_param("A pushkey has 1 to 512 bytes."));
    }
    if app_id.is_empty() || app_id.chars().count() > APP_ID_CHARS_MAX {
        return Err(Refusal::invalid_param("An app id has 1 to 64 characters."));
    }
    Ok(())
}

fn check_gateway(data: &HttpPusherData, allow_http: bool) -> Result<(), Refusal> {
    let url: Option<Uri> = data.url.parse().ok();
    let fits = url.is_some_and(|url| {
        let scheme = url.scheme_str();
        (scheme == Some("https") || (allow_http && scheme == Some("http")))
            && url.host().is_some_and(|host| !host.is_empty())
            && url.path() == GATEWAY_PATH
    });
    if fits {
        return Ok(());
    }
    Err(Refusal::invalid_param(format!("The URL of a push gateway is https://<host>{GATEWAY_PATH}.")))
}

/// Deletes a pusher, if there is one. The caller holds its user's lock.
pub fn delete(batch: &mut Batch, user: UserNum, app_id: &str, pushkey: &str) -> Result<(), Fault> {
    if schema::PUSHERS.contains(batch, (user, app_id, pushkey))? {
        schema::PUSHERS.delete(batch, (user, app_id, pushkey));
        schema::PUSHER_OWNERS.delete(batch, (app_id, pushkey, user));
        places::forget(batch, (user, app_id, pushkey));
        batch.position(&LogEntry::Account { user });
    }
    Ok(())
}

/// Deletes a pusher that its gateway knows no more, unless it was set anew since it was `known`. The caller holds its user's lock.
pub fn delete_rejected(
    batch: &mut Batch,
    (user, app_id, pushkey): (UserNum, &str, &str),
    known: &PusherRow,
) -> Result<bool, Fault> {
    let is_known = find(batch, (user, app_id, pushkey))?.is_some_and(|row| row == *known);
    if is_known {
        delete(batch, user, app_id, pushkey)?;
    }
    Ok(is_known)
}

/// Deletes the pushers that devices set which have ended. The caller holds the user's lock.
pub fn delete_of_ended(batch: &mut Batch, user: UserNum, ended: &EndedDevices) -> Result<(), Fault> {
    let rows = schema::PUSHERS.prefix::<(UserNum,)>(batch, (user,), Direction::Up)?;
    let rows = rows.collect::<Result<Vec<_>, _>>()?;
    for ((_, app_id, pushkey), Json(row)) in rows {
        if ended.contains(row.device) {
            delete(batch, user, &app_id, &pushkey)?;
        }
    }
    Ok(())
}
