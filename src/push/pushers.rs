//! Pushers, which say where a user is told of notifications. A pusher of kind `http` belongs to the device that set it, and ends with it.
//!
//! One of kind `email` belongs to the account: it tells those who are away of what they have not read, also where no device is left. It ends
//! by its user, by the link in each mail, with its address, or with the account; neither logging out nor another password end it. Nobody can
//! set one up to listen in, because its address must be one of the account. The specification says nothing of either.
//!
//! Specification: client-server API, "Push Notifications", `POST /pushers/set`.

use federation::web;
use ruma::{api::client::push::PusherKind, push::HttpPusherData};
use serde_json::Value;
use url::Url;

use crate::{
    accounts::{devices, emails},
    error::{Error, Refusal, Result},
    ids::{DeviceNum, UserNum},
    push::{mailboxes, places},
    schema::{self, accounts::EndedDevices, email::PreferencesRow, push::PusherRow},
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
/// The pushers of an account have at most this many bytes of JSON together, because all of them are read where one is changed.
const PUSHERS_BYTES_MAX: usize = 256 << 10;
/// The field of a pusher that names the device which set it (MSC3881).
const DEVICE_ID: &str = "org.matrix.msc3881.device_id";
/// The field of a pusher that says whether it is on, which clients may set (MSC3881).
pub const ENABLED: &str = "org.matrix.msc3881.enabled";
/// The app id of every pusher of kind `email`.
pub const EMAIL_APP_ID: &str = "m.email";
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
    /// The secret of the link by which it ends, if it is new and of kind `email`.
    pub secret: String,
}

/// The pushers that this server takes, by its settings.
#[derive(Clone, Copy, Debug)]
pub struct Takes {
    /// Gateways may be named by `http://`.
    pub http_gateways: bool,
    /// Pushers of kind `email` are taken, because there is a mail server.
    pub email: bool,
}

/// Sets a pusher of this device, or replaces the user's one of the same app id and pushkey. Unless `append` is set, other
/// users' pushers of kind `http` with that app id and pushkey are deleted, for the app now belongs to this user. The caller holds the locks
/// of all those users, and the server's. Errors: 400 `M_INVALID_PARAM` for what cannot be a pusher; 413 for too many.
///
/// A pusher that was set before, and was on, keeps its place, because apps set theirs each time they start.
pub fn set(
    batch: &mut Batch,
    (user, device): (UserNum, DeviceNum),
    new: &NewPusher,
    takes: Takes,
) -> Result<()> {
    let NewPusher { pusher, append, is_enabled, now_ms, secret } = new;
    let (app_id, pushkey) = (pusher.ids.app_id.as_str(), pusher.ids.pushkey.as_str());
    check_ids(app_id, pushkey)?;
    match &pusher.kind {
        PusherKind::Http(_) if app_id == EMAIL_APP_ID => {
            let why = format!("`app_id` must not be `{EMAIL_APP_ID}` where `kind` is `http`.");
            return Err(Refusal::invalid_param(why).into());
        }
        PusherKind::Http(data) => check_gateway(data, takes.http_gateways)?,
        PusherKind::Email(_) if !takes.email => {
            let why = "This server sends no e-mail, so that `kind` must be `http`.";
            return Err(Refusal::invalid_param(why).into());
        }
        PusherKind::Email(_) => check_address(batch, user, (app_id, pushkey))?,
        _ => return Err(Refusal::invalid_param("`kind` must be `http` or `email`.").into()),
    }
    let shown = serde_json::to_value(pusher).map_err(|error| Error::broken(error.to_string()))?;
    if shown.to_string().len() > PUSHER_BYTES_MAX {
        return Err(Refusal::invalid_param("A pusher has at most 16 KiB of JSON.").into());
    }
    let known = find(batch, (user, app_id, pushkey))?;
    let others = list(batch, user)?.into_iter().filter(|(key, _)| (&*key.0, &*key.1) != (app_id, pushkey));
    let others: Vec<usize> = others.map(|(_, row)| row.pusher.to_string().len()).collect();
    if known.is_none() && others.len() >= PUSHERS_MAX {
        return Err(Refusal::too_large(format!("An account has at most {PUSHERS_MAX} pushers.")).into());
    }
    if others.iter().sum::<usize>() + shown.to_string().len() > PUSHERS_BYTES_MAX {
        let why =
            format!("The pushers of an account have at most {PUSHERS_BYTES_MAX} bytes of JSON together.");
        return Err(Refusal::too_large(why).into());
    }
    if !*append {
        for other in list_owners(batch, app_id, pushkey)? {
            // The pushkey of a gateway is a secret of one device, whose app belongs to whoever shows it; everybody may know an address.
            let is_of_app = find(batch, (other, app_id, pushkey))?.is_some_and(|row| !row.is_email());
            if other != user && is_of_app {
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
    if matches!(pusher.kind, PusherKind::Email(_)) {
        mailboxes::begin(batch, (user, app_id, pushkey), secret.clone())?;
    } else {
        mailboxes::forget(batch, (user, app_id, pushkey));
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

fn check_address(batch: &Batch, user: UserNum, (app_id, address): (&str, &str)) -> Result<()> {
    if app_id != EMAIL_APP_ID {
        let why = format!("`app_id` must be `{EMAIL_APP_ID}` where `kind` is `email`.");
        return Err(Refusal::invalid_param(why).into());
    }
    if !emails::has(batch, user, address)? {
        let why = "`pushkey` must be an e-mail address of the account, as `GET /account/3pid` lists it.";
        return Err(Refusal::invalid_param(why).into());
    }
    Ok(())
}

fn check_gateway(data: &HttpPusherData, allow_http: bool) -> Result<(), Refusal> {
    let url = Url::parse(&data.url).ok();
    let fits = url.is_some_and(|url| {
        (url.scheme() == "https" || (allow_http && url.scheme() == "http"))
            && web::can_be_asked(&url)
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
        mailboxes::forget(batch, (user, app_id, pushkey));
        batch.position(&LogEntry::Account { user });
    }
    Ok(())
}

/// Deletes a pusher that its gateway knows no more, or whose address takes no mail, unless it was set anew since it was `known`. The caller holds its user's lock.
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
        if ended.contains(row.device) && !row.is_email() {
            delete(batch, user, &app_id, &pushkey)?;
        }
    }
    Ok(())
}

/// Deletes all pushers of a user whose account ends. The caller holds the user's lock.
pub fn delete_all(batch: &mut Batch, user: UserNum) -> Result<(), Fault> {
    for ((app_id, pushkey), _) in list(batch, user)? {
        delete(batch, user, &app_id, &pushkey)?;
    }
    Ok(())
}

/// Finds the pusher of kind `email` that the token of its link names: its user, app id and pushkey.
pub fn find_by_link(
    read: &(impl Read + ?Sized),
    token: &str,
) -> Result<Option<(UserNum, String, String)>, Fault> {
    mailboxes::find_by_token(read, token)
}

/// Keeps what a user wishes of digests. Where they are on again, nothing is told of what came while they were off. The caller holds the
/// user's lock.
pub fn set_preferences(batch: &mut Batch, user: UserNum, wishes: PreferencesRow) -> Result<(), Fault> {
    let was_off = !mailboxes::preferences(batch, user)?.enabled;
    let begins = was_off && wishes.enabled;
    mailboxes::set_preferences(batch, user, wishes);
    let at = batch.position(&LogEntry::Account { user });
    for ((app_id, pushkey), _) in list(batch, user)?.into_iter().filter(|(_, row)| begins && row.is_email()) {
        places::begin(batch, (user, &app_id, &pushkey), at)?;
    }
    Ok(())
}
