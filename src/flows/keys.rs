//! The requests for keys of devices: a device uploads its own, and others, of this server or another, query and claim them.

mod claim;
mod list;
mod query;
mod sign;
mod signing_keys;

use ruma::{DeviceId, UserId};
use serde_json::value::RawValue;

use crate::{
    accounts::Caller,
    encryption::{
        cross_signing, device_lists,
        keys::{self, Keys, ONE_TIME_KEYS_MAX, Owner},
        uploads::{self, Prover},
    },
    error::{Refusal, Result},
    flows::{App, write},
    schema::encryption::KeyCounts,
    store::Read,
};

pub(crate) use claim::{claim, claim_for_server};
pub(crate) use list::list_for_server;
pub(crate) use query::{query, query_for_server};
pub(crate) use sign::{Signed, upload_signatures};
pub(crate) use signing_keys::upload_signing_keys;

/// An upload has at most this many one-time keys: as many as a device keeps here.
const UPLOADED_MAX: usize = ONE_TIME_KEYS_MAX as usize;

/// The keys that a device uploads together.
pub(crate) struct Upload {
    /// The identity keys of the device, if it sends some.
    pub(crate) device_keys: Option<Box<RawValue>>,
    /// The keys of which each is given to one other device only.
    pub(crate) one_time_keys: Keys,
    /// The keys that are given when no one-time keys are left.
    pub(crate) fallback_keys: Keys,
}

impl Upload {
    /// Whether there are keys in it that are judged by the identity keys which the device uploaded before.
    fn is_of_known_device(&self) -> bool {
        let is_empty = self.one_time_keys.is_empty() && self.fallback_keys.is_empty();
        self.device_keys.is_none() && !is_empty
    }
}

/// `POST /keys/upload`: stores all of the upload in one batch or nothing, and answers the numbers of keys that are left. Errors: 400
/// `M_INVALID_SIGNATURE` for keys that their device should have signed and has not.
pub(crate) async fn upload(app: &App, caller: &Caller, upload: Upload) -> Result<KeyCounts> {
    let (user, user_id, owner) = (caller.user, caller.user_id.clone(), (caller.user, caller.device));
    let device_id = caller.device_id.clone();
    // A thousand signatures take a while to check, and others wait for the user's lock.
    let (owned, of, on) = (app.clone(), user_id.clone(), device_id.clone());
    let check = move || {
        let prover = judge(&owned.store.view(), owner, (&of, &on), &upload)?;
        Ok((upload, prover))
    };
    let (upload, prover) = app.env.blocking(check).await?;
    write::for_caller(app, caller, move |_, batch| {
        // Another request may have given the device other keys meanwhile.
        if upload.is_of_known_device()
            && uploads::find_prover(batch, owner, (&user_id, &device_id))? != prover
        {
            judge(batch, owner, (&user_id, &device_id), &upload)?;
        }
        if let Some(device_keys) = &upload.device_keys
            && keys::put_device_keys(batch, owner, device_keys)?
        {
            if cross_signing::revise_device(batch, owner, (&user_id, &device_id))? {
                device_lists::signing_keys_changed(batch, user, &user_id, &[device_id])?;
            } else {
                device_lists::changed(batch, user, &user_id, &[device_id])?;
            }
            write::wake_sharing(batch, user);
        }
        keys::put_one_time_keys(batch, owner, &upload.one_time_keys)?;
        keys::put_fallback_keys(batch, owner, &upload.fallback_keys)?;
        Ok(keys::counts(batch, owner)?)
    })
    .await
}

/// Refuses keys that are not the device's, or that it should have signed and has not. Answers the key by which that was judged.
fn judge(
    read: &(impl Read + ?Sized),
    owner: Owner,
    (user_id, device_id): (&UserId, &DeviceId),
    upload: &Upload,
) -> Result<Option<Prover>> {
    require_at_most(UPLOADED_MAX, upload.one_time_keys.len(), "one-time keys")?;
    require_at_most(UPLOADED_MAX, upload.fallback_keys.len(), "fallback keys")?;
    let prover = match &upload.device_keys {
        Some(device_keys) => uploads::check_device_keys(device_keys, user_id, device_id)?,
        None if upload.is_of_known_device() => uploads::find_prover(read, owner, (user_id, device_id))?,
        None => None,
    };
    if let Some(prover) = &prover {
        prover.check(&upload.one_time_keys)?;
        prover.check(&upload.fallback_keys)?;
    }
    Ok(prover)
}

/// Refuses a request for too much: 413 `M_TOO_LARGE`.
fn require_at_most(max: usize, count: usize, of_what: &str) -> Result<()> {
    if count <= max {
        return Ok(());
    }
    tracing::debug!(count, max, of_what, "a request for keys is refused");
    let why = format!("A request for keys names at most {max} {of_what}; ask for fewer at once.");
    Err(Refusal::too_large(why).into())
}

/// Refuses a question of another server about users who are not of this one: 403 `M_FORBIDDEN`.
fn require_own<'a>(app: &App, mut user_ids: impl Iterator<Item = &'a UserId>) -> Result<()> {
    let own = app.accounts.server_name();
    match user_ids.find(|user_id| user_id.server_name() != own) {
        None => Ok(()),
        Some(_) => {
            Err(Refusal::forbidden("Other servers may ask for keys of users of this server only.").into())
        }
    }
}

#[cfg(test)]
mod tests;
