//! Devices of accounts: one for each log-in.

use std::{collections::BTreeSet, net::IpAddr, ops::Bound};

use quick_cache::sync::Cache;
use ruma::{DeviceId, OwnedDeviceId, api::error::ErrorKind};

use crate::{
    accounts::{account_data, dehydrated, users},
    env::Env,
    error::{Exception, Refusal, Result},
    ids::{DeviceNum, UserNum},
    schema::{
        self,
        accounts::{DeviceRow, EndedDevices, SeenRow},
    },
    store::{Batch, Direction, Fault, LogEntry, Read, Write, key::Json},
};

/// The id of a device has at most this many bytes, because each of its tokens repeats it.
pub const DEVICE_ID_BYTES_MAX: usize = 255;
/// The display name of a device has at most this many characters.
pub const DISPLAY_NAME_CHARS_MAX: usize = 100;
/// An account has at most this many devices, because lists of devices are read as a whole.
pub const DEVICES_MAX: usize = 5_000;
/// The time at which a device was last seen is written at most once in this many milliseconds, so that requests rarely write.
const SEEN_EVERY_MS: u64 = 60_000;
/// At most this many devices are kept in memory with the time at which they were last noted as seen.
const SEEN_DEVICES_MAX: usize = 20_000;

/// A device of an account that has not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The id of the device, which its client chose or we made.
    pub id: OwnedDeviceId,
    /// Our number of the device, which its account never gives again.
    pub num: DeviceNum,
    /// The name that people see, if one was given.
    pub display_name: Option<String>,
    /// The time of its first log-in, in milliseconds since the epoch.
    pub created_ms: u64,
}

impl Device {
    fn new(id: OwnedDeviceId, row: DeviceRow) -> Self {
        Self { id, num: row.num, display_name: row.display_name, created_ms: row.created_ms }
    }
}

/// The device of this user with this id.
pub fn find(read: &(impl Read + ?Sized), user: UserNum, id: &DeviceId) -> Result<Option<Device>, Fault> {
    find_live(read, user, &find_ended(read, user)?, id)
}

/// Like [`find`], for a caller who has read which devices of the account have ended.
pub(crate) fn find_live(
    read: &(impl Read + ?Sized),
    user: UserNum,
    ended: &EndedDevices,
    id: &DeviceId,
) -> Result<Option<Device>, Fault> {
    let row = schema::DEVICES.get(read, (user, id.as_str()))?.map(|Json(row)| row);
    let live = row.filter(|row| !ended.contains(row.num));
    Ok(live.map(|row| Device::new(id.to_owned(), row)))
}

/// The devices that have ended and still have rows.
pub(crate) fn find_ended(read: &(impl Read + ?Sized), user: UserNum) -> Result<EndedDevices, Fault> {
    Ok(users::find(read, user)?.map(|row| row.ended).unwrap_or_default())
}

/// The device of this user with this id. Errors: 404 `M_NOT_FOUND`.
pub fn require(read: &(impl Read + ?Sized), user: UserNum, id: &DeviceId) -> Result<Device> {
    find(read, user, id)?.ok_or_else(|| Refusal::not_found("You have no such device.").into())
}

/// The devices of this user, by id.
pub fn list(read: &(impl Read + ?Sized), user: UserNum) -> Result<Vec<Device>, Fault> {
    list_after(read, user, None, usize::MAX).map(|page| page.devices)
}

/// A part of a list of devices, which is by id.
pub struct DevicePage {
    /// The devices that have not ended.
    pub devices: Vec<Device>,
    /// The number of devices that were looked at, those included that are not in the list.
    pub looked_at: usize,
    /// The last device that was looked at, if there are more after it.
    pub goes_on_after: Option<OwnedDeviceId>,
}

/// Looks at no more than `devices_max` devices of this user whose ids are greater than `after`.
pub fn list_after(
    read: &(impl Read + ?Sized),
    user: UserNum,
    after: Option<&DeviceId>,
    devices_max: usize,
) -> Result<DevicePage, Fault> {
    let ended = find_ended(read, user)?;
    let low = after.map_or(Bound::Included((user, "")), |after| Bound::Excluded((user, after.as_str())));
    let high = Bound::Excluded((UserNum(user.0.saturating_add(1)), ""));
    let mut rows = schema::DEVICES.range::<(UserNum, String)>(read, low, high, Direction::Up)?;
    let (mut devices, mut looked_at, mut last) = (Vec::new(), 0, None);
    for row in rows.by_ref().take(devices_max) {
        let ((_, id), Json(row)) = row?;
        let id = OwnedDeviceId::from(id);
        looked_at += 1;
        if !ended.contains(row.num) {
            devices.push(Device::new(id.clone(), row));
        }
        last = Some(id);
    }
    let goes_on = rows.next().transpose()?.is_some();
    Ok(DevicePage { devices, looked_at, goes_on_after: last.filter(|_| goes_on) })
}

/// When and from where the device was last seen.
pub fn find_seen(
    read: &(impl Read + ?Sized),
    user: UserNum,
    device: DeviceNum,
) -> Result<Option<SeenRow>, Fault> {
    Ok(schema::DEVICE_SEEN.get(read, (user, device))?.map(|Json(row)| row))
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

/// The device that a log-in asks for, as its client describes it.
#[derive(Clone, Debug, Default)]
pub struct LogIn {
    /// The id that the client asks for; one is made if there is none.
    pub id: Option<OwnedDeviceId>,
    /// The name for people, if the device is new. That of a suspended account has none.
    pub display_name: Option<String>,
    /// The address that the log-in came from, if it is known.
    pub ip: Option<IpAddr>,
}

/// The device with this id, or a new one, and whether it is new. Errors: 400 for ids that cannot be, 403 for too many, and for the
/// id of the dehydrated device.
pub fn log_in(batch: &mut Batch, env: &Env, user: UserNum, log_in: LogIn) -> Result<(Device, bool)> {
    let id = match log_in.id {
        Some(id) => {
            check_id(&id)?;
            if let Some(device) = find(batch, user, &id)? {
                dehydrated::require_not(batch, user, device.num)?;
                note_seen(batch, user, device.num, env.now_ms(), SeenFrom { ip: log_in.ip, agent: None });
                return Ok((device, false));
            }
            id
        }
        None => env.random_string(10).to_ascii_uppercase().into(),
    };
    // Numbers are given once, so an account that was given fewer than the bound needs no count.
    let given = users::require(batch, user)?.last_device.0 as usize;
    if given >= DEVICES_MAX && list(batch, user)?.len() >= DEVICES_MAX {
        return Err(Refusal::forbidden("You have too many devices; log some of them out.").into());
    }
    // An ended device of the same id may not be swept yet; its settings must not pass to the new device.
    account_data::delete(batch, user, &account_data::settings_of_device(&id))?;
    let account = users::change(batch, user, |row| row.last_device = DeviceNum(row.last_device.0 + 1))?;
    // Others are shown the name, and a suspended user tells others nothing.
    let name = log_in.display_name.filter(|_| !account.is_suspended);
    let display_name = name.map(|name| name.chars().take(DISPLAY_NAME_CHARS_MAX).collect());
    let row = DeviceRow { num: account.last_device, display_name, created_ms: env.now_ms() };
    put(batch, user, &id, &row);
    note_seen(batch, user, row.num, env.now_ms(), SeenFrom { ip: log_in.ip, agent: None });
    Ok((Device::new(id, row), true))
}

fn check_id(id: &DeviceId) -> Result<()> {
    if id.as_str().is_empty() {
        return Err(Refusal::invalid_param("`device_id` cannot be empty.").into());
    }
    if id.as_str().len() > DEVICE_ID_BYTES_MAX {
        return Err(Refusal::invalid_param("`device_id` has at most 255 bytes.").into());
    }
    Ok(())
}

fn put(batch: &mut Batch, user: UserNum, id: &DeviceId, row: &DeviceRow) {
    schema::DEVICES.put(batch, (user, id.as_str()), &Json(row.clone()));
    batch.position(&LogEntry::Device { user });
}

/// Changes the display name of a device. Errors: 404 if there is no such device, 400 `M_TOO_LARGE` for a name
/// that is too long.
pub fn rename(batch: &mut Batch, user: UserNum, id: &DeviceId, display_name: Option<String>) -> Result<()> {
    if display_name.as_ref().is_some_and(|name| name.chars().count() > DISPLAY_NAME_CHARS_MAX) {
        let why = format!("The name of a device has at most {DISPLAY_NAME_CHARS_MAX} characters.");
        return Err(Refusal::new(ErrorKind::TooLarge, why).exception(Exception::Parameter).into());
    }
    let device = require(batch, user, id)?;
    let row = DeviceRow { num: device.num, display_name, created_ms: device.created_ms };
    put(batch, user, id, &row);
    Ok(())
}

/// The choice of devices of an account that end together.
#[derive(Clone, Debug)]
pub enum Ending {
    /// Only the device with this number.
    One(DeviceNum),
    /// Every device of the account.
    All,
    /// Every device but the one with this number.
    AllBut(DeviceNum),
    /// Those with these ids; ids that the account has no device for are passed over.
    These(BTreeSet<OwnedDeviceId>),
}

/// Ends devices of an account: their tokens are no longer accepted, and nobody sees the devices any more. This writes one
/// row however many devices end, for their own rows are swept later. Answers the ids of those that ended. The caller holds the
/// user's lock.
pub fn end(batch: &mut Batch, user: UserNum, ending: &Ending) -> Result<Vec<OwnedDeviceId>> {
    let account = users::require(batch, user)?;
    let (first, last) = (DeviceNum(1), account.last_device);
    let live = list(batch, user)?;
    let mut ended = account.ended;
    match ending {
        Ending::One(device) => ended.add(*device, *device),
        Ending::All => ended.add(first, last),
        Ending::AllBut(kept) => {
            ended.add(first, DeviceNum(kept.0.saturating_sub(1)));
            ended.add(DeviceNum(kept.0.saturating_add(1)), last);
        }
        Ending::These(ids) => {
            for device in live.iter().filter(|device| ids.contains(&device.id)) {
                ended.add(device.num, device.num);
            }
        }
    }
    let gone = live.into_iter().filter(|device| ended.contains(device.num));
    let gone: Vec<OwnedDeviceId> = gone.map(|device| device.id).collect();
    if !gone.is_empty() {
        dehydrated::forget_ended(batch, user, |num| ended.contains(num))?;
        users::set_ended(batch, user, ended)?;
        batch.position(&LogEntry::Device { user });
    }
    Ok(gone)
}

/// Deletes the rows of at most `rows_max` devices that have ended, with the account data kept under their ids. Answers
/// whether none is left. The caller holds the user's lock.
pub(crate) fn sweep(batch: &mut Batch, user: UserNum, ended: &EndedDevices, rows_max: usize) -> Result<bool> {
    let mut gone = Vec::new();
    for row in schema::DEVICES.prefix::<(UserNum,)>(batch, (user,), Direction::Up)? {
        let ((_, id), Json(row)) = row?;
        if ended.contains(row.num) {
            gone.push(OwnedDeviceId::from(id));
        }
    }
    for id in gone.iter().take(rows_max) {
        schema::DEVICES.delete(batch, (user, id.as_str()));
        account_data::delete(batch, user, &account_data::settings_of_device(id))?;
    }
    Ok(gone.len() <= rows_max)
}

/// Deletes when the devices from the first to the last number were seen. The caller holds the user's lock.
pub(crate) fn forget_seen(batch: &mut Batch, user: UserNum, (first, last): (DeviceNum, DeviceNum)) {
    let after = DeviceNum(last.0.saturating_add(1));
    schema::DEVICE_SEEN.delete_below::<(UserNum, DeviceNum), (UserNum, DeviceNum)>(
        batch,
        (user, first),
        (user, after),
    );
}

/// The place from which a device was seen.
#[derive(Clone, Debug, Default)]
pub struct SeenFrom {
    /// The address, if it is known.
    pub ip: Option<IpAddr>,
    /// The program that the device says it is, if it does.
    pub agent: Option<String>,
}

/// Notes that a device was seen.
pub fn note_seen(to: &mut impl Write, user: UserNum, device: DeviceNum, ms: u64, from: SeenFrom) {
    let row = SeenRow { ms, ip: from.ip.map(|ip| ip.to_string()), agent: from.agent };
    schema::DEVICE_SEEN.put(to, (user, device), &Json(row));
}

/// Remembers which devices were noted as seen of late, so that most requests write nothing.
pub(crate) struct Seen(Cache<(UserNum, DeviceNum), u64>);

impl Default for Seen {
    fn default() -> Self {
        Self(Cache::new(SEEN_DEVICES_MAX))
    }
}

impl Seen {
    /// Whether it is time to note the device as seen again. If so, it counts as noted now.
    pub(crate) fn is_due(&self, user: UserNum, device: DeviceNum, now_ms: u64) -> bool {
        let last = self.0.get(&(user, device));
        let due = last.is_none_or(|last| now_ms.abs_diff(last) >= SEEN_EVERY_MS);
        if due {
            self.0.insert((user, device), now_ms);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_noted_as_seen_once_a_minute() {
        let (seen, user) = (Seen::default(), UserNum(1));
        let [one, other] = [DeviceNum(1), DeviceNum(2)];
        assert!(seen.is_due(user, one, 1_000));
        assert!(!seen.is_due(user, one, 1_000 + SEEN_EVERY_MS - 1));
        assert!(seen.is_due(user, other, 1_000) && seen.is_due(UserNum(2), one, 1_000));
        assert!(seen.is_due(user, one, 1_000 + SEEN_EVERY_MS));
        // The clock may go back, and the note of a later time must not stand until it comes again.
        assert!(seen.is_due(user, one, 1_000));
    }

    #[test]
    fn a_bounded_number_of_devices_is_remembered_and_a_forgotten_one_is_noted_once_more() {
        let seen = Seen::default();
        for user in 0..2 * SEEN_DEVICES_MAX as u64 {
            assert!(seen.is_due(UserNum(user), DeviceNum(1), 0));
        }
        assert!(seen.0.len() <= SEEN_DEVICES_MAX + SEEN_DEVICES_MAX / 100);
        let due =
            (0..2 * SEEN_DEVICES_MAX as u64).filter(|user| seen.is_due(UserNum(*user), DeviceNum(1), 1));
        assert!(due.count() >= SEEN_DEVICES_MAX / 2);
    }
}
