//! The requests for keys of devices: a device uploads its own, and others query and claim them.

use std::collections::BTreeMap;

use bytes::Bytes;
use ruma::{OwnedDeviceId, OwnedUserId};
use serde_json::{Map, Value, value::RawValue};

use crate::{
    accounts::{Caller, devices, users},
    encryption::{
        device_lists,
        keys::{self, Keys},
    },
    error::{Refusal, Result},
    flows::{App, write},
    ids::{DeviceNum, UserNum},
    schema::encryption::KeyCounts,
};

/// A request for keys names at most this many users, because all their devices are read in one piece of work.
const USERS_MAX: usize = 10_000;
/// One batch claims at most this many keys; the rest follows in the next one.
const CLAIMS_PER_BATCH: usize = 500;

/// The keys that a device uploads together.
pub(crate) struct Upload {
    /// The identity keys of the device, if it sends some.
    pub(crate) device_keys: Option<Box<RawValue>>,
    /// The keys of which each is given to one other device only.
    pub(crate) one_time_keys: Keys,
    /// The keys that are given when no one-time keys are left.
    pub(crate) fallback_keys: Keys,
}

/// `POST /keys/upload`: stores all of the upload in one batch or nothing, and answers the numbers of keys that are left.
pub(crate) async fn upload(app: &App, caller: &Caller, upload: Upload) -> Result<KeyCounts> {
    if let Some(device_keys) = &upload.device_keys {
        keys::check_device_keys(device_keys, &caller.user_id, &caller.device_id)?;
    }
    let (user, user_id, owner) = (caller.user, caller.user_id.clone(), (caller.user, caller.device));
    let device_id = caller.device_id.clone();
    write::for_user(app, user, move |_, batch| {
        // The device may have been logged out while this waited, and nothing may be stored under its number then.
        let device = devices::require(batch, user, &device_id)?;
        if device.num != owner.1 {
            return Err(Refusal::not_found("You have no such device.").into());
        }
        if let Some(device_keys) = &upload.device_keys
            && keys::put_device_keys(batch, owner, device_keys)?
        {
            device_lists::changed(batch, user, &user_id)?;
            write::wake_sharing(batch, user);
        }
        keys::put_one_time_keys(batch, owner, &upload.one_time_keys)?;
        keys::put_fallback_keys(batch, owner, &upload.fallback_keys)?;
        Ok(keys::counts(batch, owner)?)
    })
    .await
}

/// `POST /keys/query`: answers the identity keys of these devices, or of all devices of users for whom none are named.
pub(crate) async fn query(
    app: &App,
    wanted: BTreeMap<OwnedUserId, Vec<OwnedDeviceId>>,
) -> Result<Map<String, Value>> {
    check_users(wanted.len())?;
    let queried = app.clone();
    app.env
        .blocking(move || {
            let snapshot = queried.store.snapshot();
            let mut found = Map::new();
            for (user_id, ids) in wanted {
                let Some(user) = users::find_num(&*snapshot, &user_id)? else { continue };
                let mut of_user = Map::new();
                for device in devices::list(&*snapshot, user)? {
                    if !ids.is_empty() && !ids.contains(&device.id) {
                        continue;
                    }
                    let name = device.display_name.as_deref();
                    if let Some(keys) = keys::find_device_keys(&*snapshot, (user, device.num), name)? {
                        of_user.insert(device.id.to_string(), keys);
                    }
                }
                found.insert(user_id.to_string(), Value::Object(of_user));
            }
            Ok(found)
        })
        .await
}

fn check_users(count: usize) -> Result<()> {
    if count > USERS_MAX {
        return Err(Refusal::too_large("A request for keys names at most 10,000 users.").into());
    }
    Ok(())
}

/// A device and the algorithm of which a key is wanted.
struct Claim {
    user: UserNum,
    device: DeviceNum,
    user_id: OwnedUserId,
    device_id: OwnedDeviceId,
    algorithm: String,
}

/// A claimed key: its user, its device, its id and its JSON.
pub(crate) type Claimed = (OwnedUserId, OwnedDeviceId, String, Bytes);

/// `POST /keys/claim`: answers a key of each of these devices that has one. The deletion of a key is durable before the key is
/// told, so that no key is given twice.
pub(crate) async fn claim(
    app: &App,
    wanted: BTreeMap<OwnedUserId, BTreeMap<OwnedDeviceId, String>>,
) -> Result<Vec<Claimed>> {
    check_users(wanted.len())?;
    let mut claims = Vec::new();
    let snapshot = app.store.snapshot();
    for (user_id, devices) in wanted {
        let Some(user) = users::find_num(&*snapshot, &user_id)? else { continue };
        for (device_id, algorithm) in devices {
            let Some(device) = devices::find(&*snapshot, user, &device_id)? else { continue };
            let user_id = user_id.clone();
            claims.push(Claim { user, device: device.num, user_id, device_id, algorithm });
        }
    }
    drop(snapshot);
    let mut claimed = Vec::new();
    while !claims.is_empty() {
        let later = claims.split_off(claims.len().min(CLAIMS_PER_BATCH));
        let now = std::mem::replace(&mut claims, later);
        let locked = now.iter().map(|claim| claim.user).collect();
        let given = write::for_users(app, locked, move |_, batch| {
            let mut given = Vec::new();
            for claim in now {
                if let Some((id, key)) = keys::claim(batch, (claim.user, claim.device), &claim.algorithm)? {
                    given.push((claim.user_id, claim.device_id, id, key));
                }
            }
            Ok(given)
        });
        claimed.extend(given.await?);
    }
    Ok(claimed)
}
