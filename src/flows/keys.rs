//! The requests for keys of devices: a device uploads its own, and others query and claim them.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    vec,
};

use bytes::Bytes;
use ruma::{OneTimeKeyAlgorithm, OwnedDeviceId, OwnedUserId};
use serde_json::{json, value::RawValue};

use crate::{
    accounts::{
        Caller,
        devices::{self, DevicePage},
        tokens, users,
    },
    encryption::{
        device_lists,
        keys::{self, Keys},
    },
    error::{Refusal, Result},
    flows::{App, write},
    ids::{DeviceNum, UserNum},
    json::{JsonRef, JsonText, Object, Pieces},
    schema::encryption::KeyCounts,
    store::{Fault, Read},
};

/// A request for keys names at most this many users.
const USERS_MAX: usize = 10_000;
/// An answer of more than one piece has the keys of at most this many devices, those of ten accounts with as many as may be.
const QUERIED_MAX: usize = 50_000;
/// A piece of the answer to a query ends once it has this many bytes. Answers that are smaller come whole.
const PIECE_BYTES: usize = 1 << 20;
/// A piece of the answer to a query ends once it has looked at this many devices, because devices without keys add no bytes to it.
const PIECE_DEVICES: usize = 5_000;
/// A request claims keys of at most this many devices.
const CLAIMS_MAX: usize = 10_000;
/// A request claims no more keys once those that it has claimed have this many bytes.
const CLAIMED_BYTES_MAX: usize = 4 << 20;
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
    write::for_caller(app, caller, move |_, batch| {
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

/// A query for keys that is answered piece by piece.
pub(crate) struct Query {
    app: App,
    caller: Caller,
    users: vec::IntoIter<Asked>,
    /// The user whose devices are being written, and the last one that was.
    begun: Option<(Asked, Option<OwnedDeviceId>)>,
    pieces: Pieces,
}

/// A user whose keys are asked for.
struct Asked {
    user_id: OwnedUserId,
    /// The devices that are asked for; empty for all of them.
    devices: BTreeSet<OwnedDeviceId>,
}

/// `POST /keys/query`: answers the identity keys of these devices, or of all devices of users for whom none are named. An answer
/// that is large comes in pieces, so that its size costs the server no memory: the first one, as JSON, and the query for the
/// rest, if there is more. Errors: 413 `M_TOO_LARGE` for too many users or devices.
pub(crate) async fn query(
    app: &App,
    caller: &Caller,
    wanted: BTreeMap<OwnedUserId, Vec<OwnedDeviceId>>,
) -> Result<(Bytes, Option<Box<Query>>)> {
    require_at_most(USERS_MAX, wanted.len(), "users")?;
    let (app, owned, caller) = (app.clone(), app.clone(), caller.clone());
    let begin = move || {
        let mut pieces = Pieces::object();
        pieces.field("failures", &list_failures(&app, wanted.keys()));
        pieces.open_object("device_keys");
        let users = wanted.into_iter().map(|(user_id, devices)| {
            let devices = devices.into_iter().collect();
            Asked { user_id, devices }
        });
        let users = users.collect::<Vec<_>>().into_iter();
        let mut query = Query { app, caller, users, begun: None, pieces };
        let (first, is_done) = query.write_piece()?;
        if is_done {
            return Ok((first, None));
        }
        // Nothing was answered yet, so a query that would go on for too long is still refused.
        query.require_few_devices()?;
        Ok((first, Some(Box::new(query))))
    };
    owned.env.blocking(begin).await
}

impl Query {
    /// Writes the next piece, off the async threads, and answers the query for the rest, if there is more. Fails where the caller
    /// has been logged out.
    pub(crate) async fn next(mut self: Box<Self>) -> Result<(Bytes, Option<Box<Self>>)> {
        let env = self.app.env.clone();
        let write = move || {
            let (piece, is_done) = self.write_piece()?;
            Ok((piece, (!is_done).then_some(self)))
        };
        env.blocking(write).await
    }

    /// Writes until there is a piece of [`PIECE_BYTES`] or [`PIECE_DEVICES`]. Answers whether it is the last one.
    fn write_piece(&mut self) -> Result<(Bytes, bool)> {
        let snapshot = self.app.store.snapshot();
        tokens::require_session(&*snapshot, &self.caller)?;
        let mut left = PIECE_DEVICES;
        while let Some((asked, after)) = self.begun.take().or_else(|| Some((self.users.next()?, None))) {
            if left == 0 || self.pieces.byte_count() >= PIECE_BYTES {
                self.begun = Some((asked, after));
                return Ok((self.pieces.take(), false));
            }
            let Some(user) = users::find_num(&*snapshot, &asked.user_id)? else { continue };
            if after.is_none() {
                self.pieces.open_object(asked.user_id.as_str());
            }
            let page = asked.list_devices(&*snapshot, user, after.as_ref(), left)?;
            left = left.saturating_sub(page.looked_at);
            let mut goes_on_after = page.goes_on_after;
            for device in page.devices {
                let name = device.display_name.as_deref();
                if let Some(keys) = keys::find_device_keys(&*snapshot, (user, device.num), name)? {
                    self.pieces.field(device.id.as_str(), &JsonText::from(&keys));
                }
                if self.pieces.byte_count() >= PIECE_BYTES {
                    goes_on_after = Some(device.id);
                    break;
                }
            }
            match goes_on_after {
                Some(device) => self.begun = Some((asked, Some(device))),
                None => self.pieces.close(),
            }
        }
        Ok((self.pieces.finish(), true))
    }

    /// Refuses a query for too many devices: 413 `M_TOO_LARGE`.
    fn require_few_devices(&self) -> Result<()> {
        let snapshot = self.app.store.snapshot();
        let mut count = 0;
        for asked in self.users.as_slice().iter().chain(self.begun.as_ref().map(|(asked, _)| asked)) {
            if let Some(user) = users::find_num(&*snapshot, &asked.user_id)? {
                count += match asked.devices.len() {
                    0 => devices::list(&*snapshot, user)?.len(),
                    named => named,
                };
            }
            require_at_most(QUERIED_MAX, count, "devices")?;
        }
        Ok(())
    }
}

impl Asked {
    /// Looks at no more than `devices_max` of the user's devices that are asked for, by id, from the one after `after` on.
    fn list_devices(
        &self,
        read: &(impl Read + ?Sized),
        user: UserNum,
        after: Option<&OwnedDeviceId>,
        devices_max: usize,
    ) -> Result<DevicePage, Fault> {
        if self.devices.is_empty() {
            return devices::list_after(read, user, after.map(|after| &**after), devices_max);
        }
        let low = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut named = self.devices.range::<OwnedDeviceId, _>((low, Bound::Unbounded));
        let some: Vec<_> = named.by_ref().take(devices_max).collect();
        let goes_on = named.next().is_some();
        let ended = devices::find_ended(read, user)?;
        let found = some.iter().filter_map(|id| devices::find_live(read, user, &ended, id).transpose());
        let devices = found.collect::<Result<_, _>>()?;
        let goes_on_after = some.last().filter(|_| goes_on).map(|last| (**last).clone());
        Ok(DevicePage { devices, looked_at: some.len(), goes_on_after })
    }
}

fn require_at_most(max: usize, count: usize, of_what: &str) -> Result<()> {
    if count <= max {
        return Ok(());
    }
    tracing::debug!(count, max, of_what, "a request for keys is refused");
    let why = format!("A request for keys names at most {max} {of_what}; ask for fewer at once.");
    Err(Refusal::too_large(why).into())
}

/// The servers of these users that cannot be asked, because this server asks none yet.
fn list_failures<'a>(app: &App, user_ids: impl Iterator<Item = &'a OwnedUserId>) -> JsonText {
    let why = JsonText::from(&json!({ "status": 503, "message": "This server cannot ask other servers." }));
    let servers: BTreeSet<_> = user_ids.map(|user_id| user_id.server_name()).collect();
    let mut failures = Object::new();
    for server in servers.into_iter().filter(|server| *server != app.accounts.server_name()) {
        failures.json(server.as_str(), &why);
    }
    failures.finish()
}

/// The devices of which keys are wanted, each with the algorithm of the key.
pub(crate) type Wishes = BTreeMap<OwnedUserId, BTreeMap<OwnedDeviceId, OneTimeKeyAlgorithm>>;

/// A device and the algorithm of which a key is wanted.
struct Claim {
    user: UserNum,
    device: DeviceNum,
    user_id: OwnedUserId,
    device_id: OwnedDeviceId,
    algorithm: String,
}

/// A claimed key: its user, its device, its id and its JSON.
type Claimed = (OwnedUserId, OwnedDeviceId, String, Bytes);

/// `POST /keys/claim`: answers a key of each of these devices that has one, as JSON. The deletion of a key is durable before the
/// key is told, so that no key is given twice. Once the keys are [`CLAIMED_BYTES_MAX`], or a
/// later batch fails, no more are given; the client finds the devices that are left missing, and asks for them again. Errors: 413 `M_TOO_LARGE` for too many devices.
pub(crate) async fn claim(app: &App, caller: &Caller, wanted: Wishes) -> Result<Bytes> {
    require_at_most(CLAIMS_MAX, wanted.values().map(BTreeMap::len).sum(), "devices")?;
    let finder = app.clone();
    let find = move || {
        let failures = list_failures(&finder, wanted.keys());
        Ok((list_claims(&*finder.store.snapshot(), wanted)?, failures))
    };
    let (mut claims, failures) = app.env.blocking(find).await?;
    let (mut claimed, mut byte_count) = (Vec::new(), 0);
    while !claims.is_empty() && byte_count < CLAIMED_BYTES_MAX {
        let later = claims.split_off(claims.len().min(CLAIMS_PER_BATCH));
        let now = std::mem::replace(&mut claims, later);
        let locked = now.iter().map(|claim| claim.user).collect();
        let given = write::for_caller_and_users(app, caller, locked, move |_, batch| {
            let mut given: Vec<Claimed> = Vec::new();
            for claim in now {
                if byte_count >= CLAIMED_BYTES_MAX {
                    tracing::debug!(byte_count, "the rest of a claim is left out: the keys are large");
                    break;
                }
                if let Some((id, key)) = keys::claim(batch, (claim.user, claim.device), &claim.algorithm)? {
                    byte_count += key.len();
                    given.push((claim.user_id, claim.device_id, id, key));
                }
            }
            Ok((given, byte_count))
        });
        match given.await {
            Ok((given, count)) => {
                claimed.extend(given);
                byte_count = count;
            }
            // Those keys are told that were claimed before, because nobody gets them again.
            Err(why) if !claimed.is_empty() => {
                tracing::warn!(%why, claimed = claimed.len(), "the rest of a claim is left out");
                break;
            }
            Err(why) => return Err(why),
        }
    }
    app.env.blocking(move || Ok(show_claimed(&claimed, &failures))).await
}

fn list_claims(read: &(impl Read + ?Sized), wanted: Wishes) -> Result<Vec<Claim>, Fault> {
    let mut claims = Vec::new();
    for (user_id, devices) in wanted {
        let Some(user) = users::find_num(read, &user_id)? else { continue };
        let ended = devices::find_ended(read, user)?;
        for (device_id, algorithm) in devices {
            let Some(device) = devices::find_live(read, user, &ended, &device_id)? else { continue };
            let (user_id, algorithm) = (user_id.clone(), algorithm.to_string());
            claims.push(Claim { user, device: device.num, user_id, device_id, algorithm });
        }
    }
    Ok(claims)
}

/// Writes the answer to a claim. The keys of a user follow each other.
fn show_claimed(claimed: &[Claimed], failures: &JsonText) -> Bytes {
    let mut json = Pieces::object();
    json.field("failures", failures);
    json.open_object("one_time_keys");
    for of_user in claimed.chunk_by(|one, other| one.0 == other.0) {
        let Some((user_id, ..)) = of_user.first() else { continue };
        json.open_object(user_id.as_str());
        for (_, device_id, id, key) in of_user {
            json.open_object(device_id.as_str());
            json.field(id, JsonRef::stored(key));
            json.close();
        }
        json.close();
    }
    json.finish()
}

#[cfg(test)]
mod tests;
