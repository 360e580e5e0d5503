//! The keys with which users of this server sign: the master key, the self-signing key for their own devices, the user-signing key for
//! the master keys of others; and the signatures that these keys and devices have made.
//!
//! Each signature has a row of its own, and is put into a key when the key is shown, so that everybody is shown what they may see:
//! those of devices and of a self-signing key everybody, those of a user-signing key its user alone. Rows go with what they are about:
//! a master key takes the other keys along that it has signed, a key takes along what it has signed, and a device both.
//!
//! Specification: client-server API, "Cross-signing".

mod key;

use std::ops::Bound;

use bytes::Bytes;
use federation::keys::PublicKey;
use ruma::{
    DeviceId, OwnedDeviceId, OwnedUserId, UserId,
    serde::{Base64, base64::Standard},
};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use crate::{
    accounts::devices,
    encryption::{keys::Owner, signatures::Signable},
    error::{Error, Refusal, Result},
    ids::{DeviceNum, Position, UserNum},
    schema::{
        self,
        accounts::WrittenRow,
        encryption::{SignatureRow, SignedUserRow},
    },
    store::{Batch, Direction, Fault, LogEntry, Read, key::Json},
};
pub use key::{SigningKey, Usage};

/// A master key has signatures of at most this many devices.
pub const DEVICES_SIGNING_MAX: usize = 100;
/// A user has signed the master keys of at most this many others.
pub const SIGNED_USERS_MAX: usize = 10_000;

/// The keys with which a user signs, as far as there are some.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SigningKeys {
    /// The key that stands for the user.
    pub master: Option<SigningKey>,
    /// The key that signs the user's devices.
    pub self_signing: Option<SigningKey>,
    /// The key that signs the master keys of others.
    pub user_signing: Option<SigningKey>,
}

impl SigningKeys {
    /// Reads what is kept of a user of ours.
    pub fn find(read: &(impl Read + ?Sized), user: UserNum) -> Result<Self, Fault> {
        Ok(Self {
            master: find_key(read, user, Usage::Master)?,
            self_signing: find_key(read, user, Usage::SelfSigning)?,
            user_signing: find_key(read, user, Usage::UserSigning)?,
        })
    }

    /// The key of a kind, if there is one.
    pub fn of(&self, usage: Usage) -> Option<&SigningKey> {
        match usage {
            Usage::Master => self.master.as_ref(),
            Usage::SelfSigning => self.self_signing.as_ref(),
            Usage::UserSigning => self.user_signing.as_ref(),
        }
    }

    /// Whether the key of a kind is the one of `before`, or there is none.
    fn is_kept(&self, before: &Self, usage: Usage) -> bool {
        match (self.of(usage), before.of(usage)) {
            (Some(now), Some(before)) => now.is_same(before),
            (now, _) => now.is_none(),
        }
    }

    /// The kinds of the keys here that are to be stored: those that are not the same in `before`, and all of them where the master key is
    /// another one, which has to sign them anew.
    fn list_new(&self, before: &Self) -> Vec<Usage> {
        let is_reset = !self.is_kept(before, Usage::Master);
        let is_new = |usage: &Usage| self.of(*usage).is_some() && (is_reset || !self.is_kept(before, *usage));
        Usage::ALL.into_iter().filter(is_new).collect()
    }

    /// Says what it takes for a user who has the keys `before` to have these. A user begins with one set of keys freely, and may say the same
    /// again; whatever else replaces or adds a key must be confirmed.
    pub fn need(&self, before: &Self) -> Need {
        if before.master.is_some() && self.list_new(before).is_empty() {
            Need::Nothing
        } else if before.master.is_none() {
            Need::Writing
        } else {
            Need::Confirmation
        }
    }

    /// Refuses keys that a user who has the keys `before` cannot have: 400 `M_MISSING_PARAM` without any master key, 400
    /// `M_INVALID_SIGNATURE` for a key that the master key has not signed, or a wrong signature of a device over the master key; 403
    /// `M_FORBIDDEN` for a key that is named as a device of the user.
    pub fn check(
        &self,
        read: &(impl Read + ?Sized),
        (user, user_id): (UserNum, &UserId),
        before: &Self,
    ) -> Result<()> {
        let Some(master) = self.master.as_ref().or(before.master.as_ref()) else {
            return Err(
                Refusal::missing_param("You have no master key yet, so `master_key` is needed.").into()
            );
        };
        let new = self.list_new(before);
        for usage in new.iter().copied() {
            let Some(key) = self.of(usage) else { continue };
            if usage != Usage::Master && !master.has_signed(user_id, &key.object) {
                let why = format!("`{}` must be signed by the master key.", usage.field());
                return Err(Refusal::invalid_signature(why).into());
            }
            if devices::find(read, user, key.public.as_str().into())?.is_some() {
                return Err(
                    Refusal::forbidden("A device of yours has the name of this key as its id.").into()
                );
            }
        }
        if let Some(master) = self.master.as_ref().filter(|_| new.contains(&Usage::Master)) {
            list_device_signatures(read, (user, user_id), &master.object)?.require_right()?;
        }
        Ok(())
    }
}

/// The step that is needed before keys with which a user signs are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// They are stored already.
    Nothing,
    /// They may be stored as they are.
    Writing,
    /// The user must confirm it.
    Confirmation,
}

/// Who is to be told that keys or signatures of a user have changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// The keys with which the user signs changed for all who see the user's devices.
    pub signing_keys: bool,
    /// The devices of the user of which the signatures changed.
    pub devices: Vec<OwnedDeviceId>,
    /// Something changed that the user alone sees.
    pub own: bool,
}

/// The key of a kind that is kept of a user of ours.
fn find_key(read: &(impl Read + ?Sized), user: UserNum, usage: Usage) -> Result<Option<SigningKey>, Fault> {
    let Some(json) = schema::CROSS_SIGNING_KEYS.get(read, (user, usage.number()))? else { return Ok(None) };
    let key = Signable::parse(&json).and_then(SigningKey::of);
    Ok(Some(key.ok_or(Fault::Corrupt("a key with which a user signs cannot be read"))?))
}

/// Whether a row holds a key with which one can sign.
pub(super) fn is_readable(row: &[u8]) -> bool {
    Signable::parse(row).and_then(SigningKey::of).is_some()
}

/// The id of a user's key of a kind; none where there is no such key, or one that cannot be read.
pub(super) fn find_key_id(
    read: &(impl Read + ?Sized),
    user: UserNum,
    usage: Usage,
) -> Result<Option<String>, Fault> {
    let json = schema::CROSS_SIGNING_KEYS.get(read, (user, usage.number()))?;
    Ok(json.and_then(|json| Some(SigningKey::of(Signable::parse(&json)?)?.key_id())))
}

/// Whether a key with which the user signs has this name, which then is no id for a device.
pub fn is_key(read: &(impl Read + ?Sized), user: UserNum, name: &DeviceId) -> Result<bool, Fault> {
    let keys = SigningKeys::find(read, user)?;
    Ok(Usage::ALL.into_iter().any(|usage| keys.of(usage).is_some_and(|key| key.public == name.as_str())))
}

/// Stores keys that were checked, in place of those that they replace, and forgets what these had signed. The caller holds the user's lock.
pub fn put(batch: &mut Batch, (user, user_id): (UserNum, &UserId), keys: &SigningKeys) -> Result<Told> {
    let before = SigningKeys::find(batch, user)?;
    let new = keys.list_new(&before);
    let is_reset = new.contains(&Usage::Master);
    for usage in Usage::ALL {
        let is_gone = is_reset && keys.of(usage).is_none();
        if is_gone || !keys.is_kept(&before, usage) {
            forget(batch, user, usage);
        }
    }
    let master = keys.master.as_ref().or(before.master.as_ref());
    for usage in &new {
        let (Some(key), Some(master)) = (keys.of(*usage), master) else { continue };
        let by_master = master.key_id();
        let signature = key.object.find_signature(user_id.as_str(), &by_master);
        let signature = signature.filter(|_| *usage != Usage::Master).map(|it| (by_master.as_str(), it));
        let object = key.object.clone().with_signatures(user_id.as_str(), signature);
        let json = Bytes::from(String::from(object.json()));
        schema::CROSS_SIGNING_KEYS.put(batch, (user, usage.number()), &json);
    }
    if let Some(master) = keys.master.as_ref().filter(|_| is_reset) {
        for (device, row) in list_device_signatures(batch, (user, user_id), &master.object)?.right {
            put_master_signature(batch, (user, device), &row)?;
        }
    }
    let own = !keys.is_kept(&before, Usage::UserSigning);
    if own {
        note_signed(batch, user, user_id, Bytes::from_static(b"{}"))?;
    }
    let signing_keys = is_reset || new.contains(&Usage::SelfSigning);
    Ok(Told { signing_keys, devices: Vec::new(), own })
}

/// Forgets a key of a user, and what it has signed or what has signed it.
fn forget(batch: &mut Batch, user: UserNum, usage: Usage) {
    schema::CROSS_SIGNING_KEYS.delete(batch, (user, usage.number()));
    match usage {
        Usage::Master => schema::MASTER_SIGNED.delete_prefix::<(UserNum,)>(batch, (user,)),
        Usage::SelfSigning => schema::DEVICE_SIGNED.delete_prefix::<(UserNum,)>(batch, (user,)),
        Usage::UserSigning => {
            schema::SIGNED_USERS.delete_prefix::<(UserNum,)>(batch, (user,));
            schema::SIGNED_USERS_LOG.delete_prefix::<(UserNum,)>(batch, (user,));
        }
    }
}

/// Forgets all keys of an account that ends. Answers whether there were some. The caller holds the user's lock.
pub fn delete_all(batch: &mut Batch, user: UserNum) -> Result<bool, Fault> {
    let had_keys = SigningKeys::find(batch, user)? != SigningKeys::default();
    for usage in Usage::ALL {
        forget(batch, user, usage);
    }
    Ok(had_keys)
}

/// The signatures over a master key that devices of its user are said to have made.
#[derive(Default)]
struct DeviceSignatures {
    right: Vec<(DeviceNum, SignatureRow)>,
    is_any_wrong: bool,
}

impl DeviceSignatures {
    fn require_right(&self) -> Result<()> {
        if self.is_any_wrong {
            let why = "A signature of one of your devices over `master_key` is wrong.";
            return Err(Refusal::invalid_signature(why).into());
        }
        Ok(())
    }
}

/// Reads which devices of a user have signed an object. Signatures of devices without keys, and of other keys, say nothing.
fn list_device_signatures(
    read: &(impl Read + ?Sized),
    (user, user_id): (UserNum, &UserId),
    object: &Signable,
) -> Result<DeviceSignatures, Fault> {
    let mut found = DeviceSignatures::default();
    for (key_id, signature) in object.signatures(user_id.as_str()) {
        let Some((_, device_id)) = key_id.split_once(':').filter(|(algorithm, _)| *algorithm == "ed25519")
        else {
            continue;
        };
        let Some(device) = devices::find(read, user, device_id.into())? else { continue };
        let Some(key) = find_device_key(read, (user, device.num), &device.id)? else { continue };
        if object.is_signed_by(user_id.as_str(), key_id, &key) {
            let row = SignatureRow { key_id: key_id.to_owned(), signature: signature.to_owned() };
            found.right.push((device.num, row));
        } else {
            found.is_any_wrong = true;
        }
    }
    Ok(found)
}

/// The ed25519 key that a device has uploaded.
fn find_device_key(
    read: &(impl Read + ?Sized),
    owner: Owner,
    device_id: &DeviceId,
) -> Result<Option<PublicKey>, Fault> {
    let keys = schema::DEVICE_KEYS.get(read, owner)?;
    Ok(keys.and_then(|keys| Signable::parse(&keys)?.find_key(device_id.as_str())))
}

fn put_master_signature(batch: &mut Batch, owner: Owner, row: &SignatureRow) -> Result<()> {
    if !schema::MASTER_SIGNED.contains(batch, owner)? {
        let signed = schema::MASTER_SIGNED.prefix::<(UserNum,)>(batch, (owner.0,), Direction::Up)?;
        if signed.take(DEVICES_SIGNING_MAX).count() >= DEVICES_SIGNING_MAX {
            let why = format!("At most {DEVICES_SIGNING_MAX} devices sign a master key.");
            return Err(Refusal::too_large(why).into());
        }
    }
    schema::MASTER_SIGNED.put(batch, owner, &Json(row.clone()));
    Ok(())
}

/// Writes what a user alone is told of another user, or of themselves, and takes the place of what was written before.
fn note_signed(batch: &mut Batch, user: UserNum, of: &UserId, content: Bytes) -> Result<()> {
    match schema::SIGNED_USERS.get(batch, (user, of.as_str()))? {
        Some(before) => schema::SIGNED_USERS_LOG.delete(batch, (user, before.position)),
        None => {
            let signed = schema::SIGNED_USERS.prefix::<(UserNum,)>(batch, (user,), Direction::Up)?;
            if signed.take(SIGNED_USERS_MAX).count() >= SIGNED_USERS_MAX {
                let why = format!("A user signs the keys of at most {SIGNED_USERS_MAX} others.");
                return Err(Refusal::too_large(why).into());
            }
        }
    }
    let position = batch.position(&LogEntry::Device { user });
    schema::SIGNED_USERS.put(batch, (user, of.as_str()), &WrittenRow { position, content });
    schema::SIGNED_USERS_LOG.put(batch, (user, position), &of.as_str().to_owned());
    Ok(())
}

/// Lists the users of whom a user alone was to be told in (after, upto].
pub fn list_signed(
    read: &(impl Read + ?Sized),
    user: UserNum,
    after: Position,
    upto: Position,
) -> Result<Vec<String>, Fault> {
    if after >= upto {
        return Ok(Vec::new());
    }
    let (low, high) = (Bound::Excluded((user, after)), Bound::Included((user, upto)));
    let rows = schema::SIGNED_USERS_LOG.range::<(UserNum, Position)>(read, low, high, Direction::Up)?;
    rows.map(|row| row.map(|(_, of)| of)).collect()
}

fn not_signed(by_what: &str) -> Refusal {
    Refusal::invalid_signature(format!("There is no right signature of your {by_what}."))
}

fn another_key() -> Refusal {
    Refusal::invalid_param("The key is not the one that is kept here under this id.")
}

/// Takes the signature of the user's self-signing key over the identity keys of a device of theirs. Answers whether it is new. The caller
/// holds the user's lock. Errors: 404 `M_NOT_FOUND` for a device without keys, 400 `M_INVALID_PARAM` for other keys than the device's, 400
/// `M_INVALID_SIGNATURE`.
pub fn sign_device(
    batch: &mut Batch,
    (owner, user_id): (Owner, &UserId),
    keys: &SigningKeys,
    object: &Signable,
) -> Result<bool> {
    let known = schema::DEVICE_KEYS.get(batch, owner)?.and_then(|keys| Signable::parse(&keys));
    let Some(known) = known else {
        return Err(Refusal::not_found("The device has uploaded no keys.").into());
    };
    if known.signed_part() != object.signed_part() {
        return Err(another_key().into());
    }
    let Some(by) = keys.self_signing.as_ref().filter(|by| by.has_signed(user_id, object)) else {
        return Err(not_signed("self-signing key").into());
    };
    let key_id = by.key_id();
    let signature = object.find_signature(user_id.as_str(), &key_id).unwrap_or_default().to_owned();
    let row = SignatureRow { key_id, signature };
    if schema::DEVICE_SIGNED.get(batch, owner)?.is_some_and(|Json(before)| before == row) {
        return Ok(false);
    }
    schema::DEVICE_SIGNED.put(batch, owner, &Json(row));
    Ok(true)
}

/// Takes the signature of the user's self-signing key that the identity keys of a device bring along, if it is right; otherwise it is left out.
/// Answers whether it is new. The caller holds the user's lock, and has stored the identity keys.
pub fn take_signature(
    batch: &mut Batch,
    (owner, user_id): (Owner, &UserId),
    device_keys: &RawValue,
) -> Result<bool> {
    let by = find_key(batch, owner.0, Usage::SelfSigning)?;
    let object = Signable::parse(device_keys.get().as_bytes());
    let (Some(by), Some(object)) = (by, object) else { return Ok(false) };
    if object.find_signature(user_id.as_str(), &by.key_id()).is_none() {
        return Ok(false);
    }
    let keys = SigningKeys { self_signing: Some(by), ..SigningKeys::default() };
    match sign_device(batch, (owner, user_id), &keys, &object) {
        Err(Error::Refused(why)) => {
            tracing::debug!(user = %owner.0, device = %owner.1, %why.message, "a signature over uploaded keys is left out");
            Ok(false)
        }
        taken => taken,
    }
}

/// Takes signatures of the user's devices over their master key. Answers whether one is new; those that are right are taken even where
/// another is wrong, which the second answer says. The caller holds the user's lock. Errors: 400 `M_INVALID_PARAM` for another key than
/// the master key, `M_INVALID_SIGNATURE` where no signature is right, 413 `M_TOO_LARGE` for too many.
pub fn sign_master(
    batch: &mut Batch,
    (user, user_id): (UserNum, &UserId),
    master: &SigningKey,
    object: &Signable,
) -> Result<(bool, Option<Refusal>)> {
    if master.object.signed_part() != object.signed_part() {
        return Err(another_key().into());
    }
    let found = list_device_signatures(batch, (user, user_id), object)?;
    if found.right.is_empty() {
        return Err(not_signed("devices").into());
    }
    let mut is_new = false;
    for (device, row) in &found.right {
        let before = schema::MASTER_SIGNED.get(batch, (user, *device))?;
        if before.is_none_or(|Json(before)| before != *row) {
            put_master_signature(batch, (user, *device), row)?;
            is_new = true;
        }
    }
    Ok((is_new, found.is_any_wrong.then(|| not_signed("devices, but for others that were taken"))))
}

/// Takes the signature of the user's user-signing key over the master key of another user. Answers whether it is new. The caller holds the
/// user's lock. Errors: 400 `M_INVALID_PARAM` for another key than the other's master key, `M_INVALID_SIGNATURE`; 413 `M_TOO_LARGE` for
/// too many.
pub fn sign_user(
    batch: &mut Batch,
    (user, user_id): (UserNum, &UserId),
    keys: &SigningKeys,
    (of, master): (&OwnedUserId, &SigningKey),
    object: &Signable,
) -> Result<bool> {
    if master.object.signed_part() != object.signed_part() {
        return Err(another_key().into());
    }
    let Some(by) = keys.user_signing.as_ref().filter(|by| by.has_signed(user_id, object)) else {
        return Err(not_signed("user-signing key").into());
    };
    let key_id = by.key_id();
    let signature = object.find_signature(user_id.as_str(), &key_id).unwrap_or_default().to_owned();
    let row = SignedUserRow { digest: Some(digest(&master.object)), key_id, signature };
    if find_signed_user(batch, user, of)?.is_some_and(|before| before == row) {
        return Ok(false);
    }
    let content = serde_json::to_vec(&row).map_err(|_| Fault::Corrupt("a signature cannot be written"))?;
    note_signed(batch, user, of, content.into())?;
    Ok(true)
}

/// The signature of a user of ours over the master key of another user.
fn find_signed_user(
    read: &(impl Read + ?Sized),
    user: UserNum,
    of: &UserId,
) -> Result<Option<SignedUserRow>, Fault> {
    let Some(row) = schema::SIGNED_USERS.get(read, (user, of.as_str()))? else { return Ok(None) };
    // The row under the user's own id is an empty object.
    Ok(serde_json::from_slice(&row.content).ok())
}

/// A key of a user of ours as others are shown it, with the signatures that everybody may see.
pub fn find_shown(
    read: &(impl Read + ?Sized),
    (user, user_id): (UserNum, &UserId),
    usage: Usage,
) -> Result<Option<Signable>, Fault> {
    let Some(mut key) = find_key(read, user, usage)?.map(|key| key.object) else { return Ok(None) };
    if usage == Usage::Master {
        let ended = devices::find_ended(read, user)?;
        for row in schema::MASTER_SIGNED.prefix::<(UserNum,)>(read, (user,), Direction::Up)? {
            let ((_, device), Json(row)) = row?;
            if !ended.contains(device) {
                key.add_signature(user_id.as_str(), &row.key_id, &row.signature);
            }
        }
    }
    Ok(Some(key))
}

/// A digest of what a signature of an object covers.
fn digest(object: &Signable) -> String {
    Base64::<Standard, _>::new(Sha256::digest(object.signed_part().as_str())).encode()
}

/// Adds the signature that a user has made of the master key of another one, for this user alone to see. It is about what was signed: a key
/// that its user uploaded with other fields is another thing, under the same public half too.
pub fn add_own_signature(
    read: &(impl Read + ?Sized),
    (user, user_id): (UserNum, &UserId),
    of: &UserId,
    master: &mut Signable,
) -> Result<(), Fault> {
    let Some(row) = find_signed_user(read, user, of)? else { return Ok(()) };
    let signed = || {
        let mut signed = master.clone();
        signed.add_signature(user_id.as_str(), &row.key_id, &row.signature);
        signed
    };
    let is_right = match &row.digest {
        Some(of_signed) => *of_signed == digest(master),
        None => find_key(read, user, Usage::UserSigning)?.is_some_and(|by| by.has_signed(user_id, &signed())),
    };
    if is_right {
        *master = signed();
    }
    Ok(())
}

/// Forgets the signatures of a device and over it that are not right any more, because it has other keys. Answers whether others see that on
/// the user's master key. The caller holds the user's lock.
pub fn revise_device(
    batch: &mut Batch,
    owner: Owner,
    (user_id, device_id): (&UserId, &DeviceId),
) -> Result<bool, Fault> {
    let keys = schema::DEVICE_KEYS.get(batch, owner)?.and_then(|keys| Signable::parse(&keys));
    if let Some(Json(row)) = schema::DEVICE_SIGNED.get(batch, owner)? {
        let by = find_key(batch, owner.0, Usage::SelfSigning)?;
        let is_right = keys.as_ref().zip(by).is_some_and(|(keys, by)| {
            let signed = keys.clone().with_signatures(user_id.as_str(), [(&*row.key_id, &*row.signature)]);
            by.has_signed(user_id, &signed)
        });
        if !is_right {
            schema::DEVICE_SIGNED.delete(batch, owner);
        }
    }
    let Some(Json(row)) = schema::MASTER_SIGNED.get(batch, owner)? else { return Ok(false) };
    let master = find_key(batch, owner.0, Usage::Master)?.map(|master| master.object);
    let key = keys.and_then(|keys| keys.find_key(device_id.as_str()));
    let is_right = master.zip(key).is_some_and(|(master, key)| {
        let signed = master.with_signatures(user_id.as_str(), [(&*row.key_id, &*row.signature)]);
        signed.is_signed_by(user_id.as_str(), &row.key_id, &key)
    });
    if !is_right {
        schema::MASTER_SIGNED.delete(batch, owner);
    }
    Ok(!is_right)
}

/// Whether a device that has ended had signed its user's master key, so that this key looks different now.
pub fn has_lost_signature(read: &(impl Read + ?Sized), user: UserNum) -> Result<bool, Fault> {
    let ended = devices::find_ended(read, user)?;
    for row in schema::MASTER_SIGNED.prefix::<(UserNum,)>(read, (user,), Direction::Up)? {
        let ((_, device), _) = row?;
        if ended.contains(device) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Deletes the signatures of ended devices and over them, from the first to the last number.
pub fn sweep(batch: &mut Batch, user: UserNum, (first, last): (DeviceNum, DeviceNum)) {
    let (low, high) = ((user, first), (user, DeviceNum(last.0.saturating_add(1))));
    schema::DEVICE_SIGNED.delete_below::<Owner, Owner>(batch, low, high);
    schema::MASTER_SIGNED.delete_below::<Owner, Owner>(batch, low, high);
}
