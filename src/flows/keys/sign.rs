//! Takes signatures that a client of a user has made: of their devices, of their master key, of the master keys of others.

use std::collections::BTreeMap;

use ruma::{OwnedUserId, UserId};
use serde_json::value::RawValue;

use super::{require_at_most, signing_keys::tell};
use crate::{
    accounts::{Caller, devices, users},
    encryption::{
        cross_signing::{self, SigningKey, SigningKeys, Told, Usage},
        elsewhere::{self, Asker},
        signatures::Signable,
    },
    error::{Error, Refusal, Result},
    flows::{App, remote::ask_keys, write},
    json::{JsonText, Object},
    store::Batch,
};

/// A request has signatures of at most this many keys.
const SIGNED_MAX: usize = 500;

/// Signed objects, by their user and the id of their device or key.
pub(crate) type Signed = BTreeMap<OwnedUserId, BTreeMap<String, Box<RawValue>>>;

/// The signatures that were not taken, with the reasons, by user and id.
#[derive(Default)]
pub(crate) struct Failures(BTreeMap<OwnedUserId, BTreeMap<String, Refusal>>);

impl Failures {
    fn add(&mut self, user_id: &UserId, id: String, why: Refusal) {
        self.0.entry(user_id.to_owned()).or_default().insert(id, why);
    }

    /// Writes them as clients are told.
    pub(crate) fn show(&self) -> JsonText {
        let mut shown = Object::new();
        for (user_id, of_user) in &self.0 {
            shown.object(user_id.as_str(), |shown| {
                for (id, why) in of_user {
                    shown.object(id, |failure| {
                        failure.text("errcode", &why.errcode());
                        failure.text("error", &why.message);
                    });
                }
            });
        }
        shown.finish()
    }
}

/// The master keys of other users, as far as they are known.
type Masters = BTreeMap<OwnedUserId, SigningKey>;

/// `POST /keys/signatures/upload`: takes each signature that is right, and answers which are not. Errors: 413 `M_TOO_LARGE` for too many.
pub(crate) async fn upload_signatures(app: &App, caller: &Caller, signed: Signed) -> Result<Failures> {
    require_at_most(SIGNED_MAX, signed.values().map(BTreeMap::len).sum(), "signed keys")?;
    let elsewhere = find_elsewhere(app, caller, &signed).await?;
    let of = caller.clone();
    write::for_caller(app, caller, move |_, batch| take(batch, &of, signed, elsewhere)).await
}

/// Finds the master keys of the users of other servers whose keys were signed: in the lists that are kept of them, or by asking.
async fn find_elsewhere(app: &App, caller: &Caller, signed: &Signed) -> Result<Masters> {
    let own = app.accounts.server_name();
    let others: Vec<_> = signed.keys().filter(|user_id| user_id.server_name() != own).cloned().collect();
    if others.is_empty() {
        return Ok(Masters::new());
    }
    let (owned, user) = (app.clone(), caller.user);
    let look = move || {
        let snapshot = owned.store.snapshot();
        let mut asker = Asker::new(&*snapshot, user)?;
        let (mut known, mut unknown) = (Masters::new(), BTreeMap::new());
        for user_id in others {
            if asker.may_use(&snapshot, &user_id)? {
                let master = elsewhere::find(&*snapshot, &user_id)?.and_then(|row| row.master_key);
                known.extend(read_master(&user_id, master).map(|master| (user_id, master)));
            } else {
                unknown.insert(user_id, Vec::new());
            }
        }
        Ok((known, unknown))
    };
    let (mut known, unknown) = app.env.blocking(look).await?;
    let told = ask_keys::query(app, user, unknown, ask_keys::TIMEOUT).await?;
    for (user_id, list) in told.told {
        known.extend(read_master(&user_id, list.master_key).map(|master| (user_id, master)));
    }
    Ok(known)
}

fn read_master(user_id: &UserId, json: Option<String>) -> Option<SigningKey> {
    let json = RawValue::from_string(json?).ok()?;
    SigningKey::read(&json, user_id, Usage::Master).ok()
}

/// Takes all signatures that are right, in one batch.
fn take(batch: &mut Batch, of: &Caller, signed: Signed, elsewhere: Masters) -> Result<Failures> {
    let keys = SigningKeys::find(batch, of.user)?;
    let (mut failures, mut told) = (Failures::default(), Told::default());
    for (user_id, objects) in signed {
        let of_other = if user_id == of.user_id {
            None
        } else {
            let found = match users::find_num(batch, &user_id)? {
                Some(other) => SigningKeys::find(batch, other)?.master,
                None => elsewhere.get(&user_id).cloned(),
            };
            Some(found)
        };
        for (id, object) in objects {
            let taken = match Signable::parse(object.get().as_bytes()) {
                None => Err(Refusal::bad_json("This is not an object that can be signed.").into()),
                Some(object) => match &of_other {
                    None => take_own(batch, of, &keys, &id, &object, &mut told),
                    Some(master) => {
                        let master = master.as_ref().filter(|master| master.public == id);
                        take_of_other(batch, of, &keys, (&user_id, master), &object, &mut told).map(|()| None)
                    }
                },
            };
            match taken {
                Ok(None) => {}
                Ok(Some(why)) => failures.add(&user_id, id, why),
                Err(Error::Refused(why)) => {
                    tracing::debug!(user = %of.user, of = %user_id, %id, %why.message, "a signature is not taken");
                    failures.add(&user_id, id, *why);
                }
                Err(error) => return Err(error),
            }
        }
    }
    tell(batch, of, told)?;
    Ok(failures)
}

/// Takes signatures over a device or the master key of the user themself. Answers why some of them were not taken, if others were.
fn take_own(
    batch: &mut Batch,
    of: &Caller,
    keys: &SigningKeys,
    id: &str,
    object: &Signable,
    told: &mut Told,
) -> Result<Option<Refusal>> {
    if let Some(master) = keys.master.as_ref().filter(|master| master.public == id) {
        let (is_new, why) = cross_signing::sign_master(batch, (of.user, &of.user_id), master, object)?;
        told.signing_keys |= is_new;
        return Ok(why);
    }
    let Some(device) = devices::find(batch, of.user, id.into())? else {
        return Err(Refusal::not_found("You have no device and no master key of this id.").into());
    };
    if cross_signing::sign_device(batch, ((of.user, device.num), &of.user_id), keys, object)? {
        told.devices.push(device.id);
    }
    Ok(None)
}

fn take_of_other(
    batch: &mut Batch,
    of: &Caller,
    keys: &SigningKeys,
    (user_id, master): (&OwnedUserId, Option<&SigningKey>),
    object: &Signable,
    told: &mut Told,
) -> Result<()> {
    let Some(master) = master else {
        return Err(Refusal::not_found("The user has no master key of this id.").into());
    };
    let by = (of.user, &*of.user_id);
    told.own |= cross_signing::sign_user(batch, by, keys, (user_id, master), object)?;
    Ok(())
}
