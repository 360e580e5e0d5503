//! Devices of accounts: one for each log-in.

use std::net::IpAddr;

use quick_cache::sync::Cache;
use ruma::{DeviceId, OwnedDeviceId, api::error::ErrorKind};

use crate::{
    accounts::users,
    env::Env,
    error::{Refusal, Result},
    ids::{DeviceNum, UserNum},
    schema::{
        self,
        accounts::{DeviceRow, SeenRow},
    },
    store::{Batch, Direction, Fault, LogEntry, Read, Write, key::Json},
};

/// The id of a device is no longer, in bytes.
pub const DEVICE_ID_BYTES_MAX: usize = 255;
/// The display name of a device is no longer, in characters.
pub const DISPLAY_NAME_CHARS_MAX: usize = 100;
/// An account has no more devices.
pub const DEVICES_MAX: usize = 5_000;
/// When a device was last seen is noted this seldom, in milliseconds.
const SEEN_EVERY_MS: u64 = 60_000;
/// Devices of which is remembered when they were last noted as seen.
const SEEN_DEVICES_MAX: usize = 20_000;

/// A device, as other parts know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its id, which its owner chose or we made.
    pub id: OwnedDeviceId,
    /// Its number.
    pub num: DeviceNum,
    /// Its name for people.
    pub display_name: Option<String>,
    /// When it first logged in, in milliseconds since the epoch.
    pub created_ms: u64,
}

impl Device {
    fn new(id: OwnedDeviceId, row: DeviceRow) -> Self {
        Self { id, num: row.num, display_name: row.display_name, created_ms: row.created_ms }
    }
}

/// The device of this user with this id.
pub fn find(read: &(impl Read + ?Sized), user: UserNum, id: &DeviceId) -> Result<Option<Device>, Fault> {
    let row = schema::DEVICES.get(read, (user, id.as_str()))?;
    Ok(row.map(|Json(row)| Device::new(id.to_owned(), row)))
}

/// The device of this user with this id. Errors: 404 `M_NOT_FOUND`.
pub fn require(read: &(impl Read + ?Sized), user: UserNum, id: &DeviceId) -> Result<Device> {
    find(read, user, id)?.ok_or_else(|| Refusal::not_found("You have no such device.").into())
}

/// The devices of this user, by id.
pub fn list(read: &(impl Read + ?Sized), user: UserNum) -> Result<Vec<Device>, Fault> {
    schema::DEVICES
        .prefix::<(UserNum,)>(read, (user,), Direction::Up)?
        .map(|row| row.map(|((_, id), Json(row))| Device::new(id.into(), row)))
        .collect()
}

/// When and from where the device was last seen.
pub fn find_seen(
    read: &(impl Read + ?Sized),
    user: UserNum,
    device: DeviceNum,
) -> Result<Option<SeenRow>, Fault> {
    Ok(schema::DEVICE_SEEN.get(read, (user, device))?.map(|Json(row)| row))
}

/// The devices that were seen at most this long before the one that was seen last of all, and when: those that were in use
/// when the server stopped. No more than `max` of them.
pub fn list_seen_last(
    read: &(impl Read + ?Sized),
    within_ms: u64,
    max: usize,
) -> Result<Vec<(UserNum, DeviceNum, u64)>, Fault> {
    let rows = || schema::DEVICE_SEEN.prefix::<()>(read, (), Direction::Up);
    let mut newest_ms = 0;
    for row in rows()? {
        let (_, Json(seen)) = row?;
        newest_ms = newest_ms.max(seen.ms);
    }
    let oldest_ms = newest_ms.saturating_sub(within_ms);
    rows()?
        .map(|row| row.map(|((user, device), Json(seen))| (user, device, seen.ms)))
        .filter(|row| row.as_ref().map_or(true, |(_, _, ms)| *ms >= oldest_ms))
        .take(max)
        .collect()
}

/// Whether one of the account's devices was last seen at an address that is `near`. Looks at as many as an account may have.
pub fn was_seen(
    read: &(impl Read + ?Sized),
    user: UserNum,
    near: impl Fn(&str) -> bool,
) -> Result<bool, Fault> {
    for row in schema::DEVICE_SEEN.prefix::<(UserNum,)>(read, (user,), Direction::Up)?.take(DEVICES_MAX) {
        let (_, Json(seen)) = row?;
        if seen.ip.as_deref().is_some_and(&near) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What somebody who logs in says of their device.
#[derive(Clone, Debug, Default)]
pub struct LogIn {
    /// The id; one is made if there is none.
    pub id: Option<OwnedDeviceId>,
    /// The name for people, if the device is new.
    pub display_name: Option<String>,
    /// From which address.
    pub ip: Option<IpAddr>,
}

/// The device with this id, or a new one, and whether it is new. Errors: 400 for ids that cannot be, 403 for too many.
pub fn log_in(batch: &mut Batch, env: &Env, user: UserNum, log_in: LogIn) -> Result<(Device, bool)> {
    let id = match log_in.id {
        Some(id) => {
            check_id(&id)?;
            if let Some(device) = find(batch, user, &id)? {
                note_seen(batch, user, device.num, env.now_ms(), log_in.ip);
                return Ok((device, false));
            }
            id
        }
        None => env.random_string(10).to_ascii_uppercase().into(),
    };
    if list(batch, user)?.len() >= DEVICES_MAX {
        return Err(Refusal::forbidden("You have too many devices; log some of them out.").into());
    }
    let account = users::change(batch, user, |row| row.last_device = DeviceNum(row.last_device.0 + 1))?;
    let display_name = log_in.display_name.map(|name| name.chars().take(DISPLAY_NAME_CHARS_MAX).collect());
    let row = DeviceRow { num: account.last_device, display_name, created_ms: env.now_ms() };
    put(batch, user, &id, &row);
    note_seen(batch, user, row.num, env.now_ms(), log_in.ip);
    Ok((Device::new(id, row), true))
}

fn check_id(id: &DeviceId) -> Result<()> {
    if id.as_str().is_empty() {
        return Err(Refusal::invalid_param("A device id cannot be empty.").into());
    }
    if id.as_str().len() > DEVICE_ID_BYTES_MAX {
        return Err(Refusal::invalid_param("This device id is too long.").into());
    }
    Ok(())
}

fn put(batch: &mut Batch, user: UserNum, id: &DeviceId, row: &DeviceRow) {
    schema::DEVICES.put(batch, (user, id.as_str()), &Json(row.clone()));
    batch.position(&LogEntry::Device { user });
}

/// Names a device. Errors: 404 if there is none, 413 for a name that is too long.
pub fn rename(batch: &mut Batch, user: UserNum, id: &DeviceId, display_name: Option<String>) -> Result<()> {
    if display_name.as_ref().is_some_and(|name| name.chars().count() > DISPLAY_NAME_CHARS_MAX) {
        let why = format!("The name of a device has at most {DISPLAY_NAME_CHARS_MAX} characters.");
        return Err(Refusal::new(ErrorKind::TooLarge, why).status(http::StatusCode::BAD_REQUEST).into());
    }
    let device = require(batch, user, id)?;
    let row = DeviceRow { num: device.num, display_name, created_ms: device.created_ms };
    put(batch, user, id, &row);
    Ok(())
}

/// Deletes the row of a device. Tokens, keys and inbox are the caller's to delete.
pub fn delete(batch: &mut Batch, user: UserNum, device: &Device) {
    schema::DEVICES.delete(batch, (user, device.id.as_str()));
    schema::DEVICE_SEEN.delete(batch, (user, device.num));
    batch.position(&LogEntry::Device { user });
}

/// Notes that a device was seen.
pub fn note_seen(to: &mut impl Write, user: UserNum, device: DeviceNum, ms: u64, ip: Option<IpAddr>) {
    let ip = ip.map(|ip| ip.to_string());
    schema::DEVICE_SEEN.put(to, (user, device), &Json(SeenRow { ms, ip }));
}

/// Remembers which devices were noted as seen of late, so that most requests write nothing.
pub(crate) struct Seen(Cache<(UserNum, DeviceNum), u64>);

impl Default for Seen {
    fn default() -> Self {
        Self(Cache::new(SEEN_DEVICES_MAX))
    }
}

impl Seen {
    /// Whether it is time to note it again; if so, that counts as done.
    pub(crate) fn is_due(&self, user: UserNum, device: DeviceNum, now_ms: u64) -> bool {
        let last = self.0.get(&(user, device));
        let due = last.is_none_or(|last| now_ms.abs_diff(last) >= SEEN_EVERY_MS);
        if due {
            self.0.insert((user, device), now_ms);
        }
        due
    }
}
