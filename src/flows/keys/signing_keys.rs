//! Takes the keys with which a user signs: the first ones freely, others only once the user has confirmed it.

use std::sync::Arc;

use ruma::api::client::uiaa::AuthData;
use serde_json::json;

use crate::{
    accounts::Caller,
    encryption::{
        cross_signing::{self, Need, SigningKeys, Told},
        device_lists,
    },
    error::{Error, Result},
    flows::{App, account::confirm, write},
    store::Batch,
};

/// `POST /keys/device_signing/upload`: stores keys in place of those that they replace, and has all told who share a room with the user. A key
/// that only its user sees is told to the user alone. Errors: 401 until the user has confirmed it, where there are keys already; those of
/// [`SigningKeys::check`].
pub(crate) async fn upload_signing_keys(
    app: &App,
    caller: &Caller,
    keys: SigningKeys,
    auth: Option<&AuthData>,
) -> Result<()> {
    let (owned, of, keys) = (app.clone(), caller.clone(), Arc::new(keys));
    let given = Arc::clone(&keys);
    let look = move || {
        let read = owned.store.view();
        let before = SigningKeys::find(&read, of.user)?;
        // Keys that cannot be are refused before anybody is asked for a password.
        given.check(&read, (of.user, &of.user_id), &before)?;
        Ok(given.need(&before))
    };
    let mut need = app.env.blocking(look).await?;
    loop {
        if need == Need::Confirmation {
            let named = |key: &Option<cross_signing::SigningKey>| key.as_ref().map(|key| key.public.clone());
            let wanted = json!({
                "master": named(&keys.master), "self_signing": named(&keys.self_signing),
                "user_signing": named(&keys.user_signing),
            });
            let operation = confirm::operation("upload signing keys", Some(caller), &wanted);
            confirm::confirm(app, &operation, &confirm::password_flow(), Some(caller), auth).await?;
        }
        let (of, given, has_confirmed) = (caller.clone(), Arc::clone(&keys), need);
        let store = move |_: &App, batch: &mut Batch| {
            let before = SigningKeys::find(batch, of.user)?;
            given.check(batch, (of.user, &of.user_id), &before)?;
            let need = given.need(&before);
            if need == Need::Confirmation && has_confirmed != Need::Confirmation {
                return Ok(Some(need));
            }
            if need != Need::Nothing {
                let told = cross_signing::put(batch, (of.user, &of.user_id), &given)?;
                tell(batch, &of, told)?;
            }
            Ok(None)
        };
        match write::for_caller(app, caller, store).await? {
            None => return Ok(()),
            // Another device was faster, so that these keys are not the first ones any more.
            Some(again) => need = again,
        }
    }
}

/// Has those told who see that keys or signatures of a user changed.
pub(super) fn tell(batch: &mut Batch, of: &Caller, told: Told) -> Result<(), Error> {
    let Told { signing_keys, mut devices, own } = told;
    if signing_keys && devices.is_empty() {
        devices.push(of.device_id.clone());
    }
    if signing_keys {
        device_lists::signing_keys_changed(batch, of.user, &of.user_id, &devices)?;
    } else if !devices.is_empty() {
        device_lists::changed(batch, of.user, &of.user_id, &devices)?;
    }
    if !devices.is_empty() {
        write::wake_sharing(batch, of.user);
    } else if own {
        write::wake(batch, of.user);
    }
    Ok(())
}
