//! The requests for keys of devices: a device uploads its own, and others, of this server or another, query and claim them.

mod claim;
mod list;
mod query;
mod sign;
mod signing_keys;

use ruma::UserId;

use crate::{
    accounts::Caller,
    encryption::{
        keys,
        uploads::{self, Upload},
    },
    error::{Refusal, Result},
    flows::{App, write},
    schema::encryption::KeyCounts,
};

pub(crate) use claim::{claim, claim_for_server};
pub(crate) use list::list_for_server;
pub(crate) use query::{query, query_for_server};
pub(crate) use sign::{Signed, upload_signatures};
use signing_keys::tell;
pub(crate) use signing_keys::upload_signing_keys;

/// `POST /keys/upload`: stores all of the upload in one batch or nothing, and answers the numbers of keys that are left. Errors: 400
/// `M_INVALID_SIGNATURE` for keys that their device should have signed and has not.
pub(crate) async fn upload(app: &App, caller: &Caller, upload: Upload) -> Result<KeyCounts> {
    let (of, owner) = (caller.clone(), (caller.user, caller.device));
    // A thousand signatures take a while to check, and others wait for the user's lock.
    let (owned, by) = (app.clone(), caller.clone());
    let check = move || {
        let names = (&*by.user_id, &*by.device_id);
        let known = || uploads::find_prover(&owned.store.view(), owner, names);
        let prover = upload.judge(names, known)?;
        Ok((upload, prover))
    };
    let (upload, prover) = app.env.blocking(check).await?;
    write::for_caller(app, caller, move |_, batch| {
        let names = (&*of.user_id, &*of.device_id);
        if upload.is_of_known_device() {
            let known = uploads::find_prover(batch, owner, names)?;
            // Another request may have given the device other keys meanwhile.
            if known != prover {
                upload.judge(names, || Ok(known))?;
            }
        }
        let told = upload.put(batch, owner, names)?;
        tell(batch, &of, told)?;
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
