//! The dehydrated device of a user (MSC3814): a device that nobody is logged in to, so that keys of rooms reach the user who has no other.
//! It is a device like others, with a row here that says which one it is and holds what a client needs to read its messages.

use ruma::{DeviceId, OwnedDeviceId};

use crate::{
    error::{Refusal, Result},
    ids::{DeviceNum, UserNum},
    schema::{self, accounts::DehydratedRow},
    store::{Batch, Fault, Read, key::Json},
};

/// The `device_data` of a dehydrated device has at most this many bytes of JSON.
pub const DEVICE_DATA_BYTES_MAX: usize = 64 << 10;

/// The dehydrated device of a user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dehydrated {
    /// The number of the device.
    pub num: DeviceNum,
    /// The id of the device.
    pub id: OwnedDeviceId,
    /// The JSON by which a client that has its key uses the device; it means nothing to the server.
    pub device_data: String,
}

/// The dehydrated device of this user, if there is one.
pub fn find(read: &(impl Read + ?Sized), user: UserNum) -> Result<Option<Dehydrated>, Fault> {
    let row = schema::DEHYDRATED.get(read, user)?;
    Ok(row.map(|Json(row)| Dehydrated {
        num: row.num,
        id: row.device_id.into(),
        device_data: row.device_data,
    }))
}

/// The dehydrated device of this user. Errors: 404 `M_NOT_FOUND`.
pub fn require(read: &(impl Read + ?Sized), user: UserNum) -> Result<Dehydrated> {
    find(read, user)?.ok_or_else(|| Refusal::not_found("You have no dehydrated device.").into())
}

/// Refuses data of a dehydrated device that cannot be: 400 for what is no object, 413 for what is too large.
pub fn check_data(device_data: &str) -> Result<()> {
    if device_data.len() > DEVICE_DATA_BYTES_MAX {
        return Err(Refusal::too_large("`device_data` has at most 64 KiB.").into());
    }
    if !device_data.starts_with('{') {
        return Err(Refusal::bad_json("`device_data` must be an object.").into());
    }
    Ok(())
}

/// Makes a device of this user the dehydrated one. The caller holds the user's lock, and has ended the one before.
pub fn set(batch: &mut Batch, user: UserNum, num: DeviceNum, id: &DeviceId, device_data: String) {
    let row = DehydratedRow { num, device_id: id.as_str().to_owned(), device_data };
    schema::DEHYDRATED.put(batch, user, &Json(row));
}

/// Forgets the dehydrated device if it is among those that have ended. The caller holds the user's lock.
pub(crate) fn forget_ended(
    batch: &mut Batch,
    user: UserNum,
    has_ended: impl Fn(DeviceNum) -> bool,
) -> Result<(), Fault> {
    if find(batch, user)?.is_some_and(|device| has_ended(device.num)) {
        schema::DEHYDRATED.delete(batch, user);
    }
    Ok(())
}

/// Refuses to log in to a dehydrated device: 403 `M_FORBIDDEN`.
pub(crate) fn require_not(read: &(impl Read + ?Sized), user: UserNum, num: DeviceNum) -> Result<()> {
    match find(read, user)? {
        Some(device) if device.num == num => {
            let why = "`device_id` is that of your dehydrated device, to which nobody can log in.";
            Err(Refusal::forbidden(why).into())
        }
        _ => Ok(()),
    }
}
