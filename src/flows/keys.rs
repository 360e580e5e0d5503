//! The requests for keys of devices: a device uploads its own, and others, of this server or another, query and claim them.

mod claim;
mod list;
mod query;

use ruma::UserId;
use serde_json::value::RawValue;

use crate::{
    accounts::Caller,
    encryption::{
        device_lists,
        keys::{self, Keys},
    },
    error::{Refusal, Result},
    flows::{App, write},
    schema::encryption::KeyCounts,
};

pub(crate) use claim::{claim, claim_for_server};
pub(crate) use list::list_for_server;
pub(crate) use query::{query, query_for_server};

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
    write::for_caller(app, caller, move |_, batch| {
        if let Some(device_keys) = &upload.device_keys
            && keys::put_device_keys(batch, owner, device_keys)?
        {
            device_lists::changed(batch, user, &user_id, &[device_id])?;
            write::wake_sharing(batch, user);
        }
        keys::put_one_time_keys(batch, owner, &upload.one_time_keys)?;
        keys::put_fallback_keys(batch, owner, &upload.fallback_keys)?;
        Ok(keys::counts(batch, owner)?)
    })
    .await
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
