//! The keys that a device uploads together: whether they are its own, and whether its key has signed them. A client uploads them for its own
//! device, or with a dehydrated one that it leaves behind; both are judged here.
//!
//! A device that speaks Olm or Megolm has an ed25519 key, which signs its identity keys and its one-time and fallback keys. A signature
//! that the device claims and that is wrong is refused. Identity keys without a signature of their device are kept, because they claim
//! nothing, and nobody who checks them trusts them; why: `docs/decisions/signatures-that-are-claimed.md`.
//!
//! Specification: client-server API, "Uploading keys".

use ruma::{DeviceId, OwnedUserId, UserId};
use serde_json::value::RawValue;

use crate::{
    encryption::{
        cross_signing::{self, Told},
        keys::{self, Keys, ONE_TIME_KEYS_MAX, Owner},
        signatures::{Signable, key_id},
    },
    error::{Refusal, Result},
    schema,
    store::{Batch, Fault, Read},
};
use federation::keys::PublicKey;

/// An upload has at most this many one-time keys: as many as a device keeps here.
const UPLOADED_MAX: usize = ONE_TIME_KEYS_MAX as usize;
/// The algorithms whose devices sign with ed25519. How keys of other algorithms sign, a server cannot know.
const SIGNING_ALGORITHMS: [&str; 2] = ["m.olm.v1.curve25519-aes-sha2", "m.megolm.v1.aes-sha2"];
/// The algorithm of one-time and fallback keys that are signed by their device.
const SIGNED_CURVE25519: &str = "signed_curve25519";

/// The keys that a device uploads together.
#[derive(Clone, Debug, Default)]
pub struct Upload {
    /// The identity keys of the device, if it sends some.
    pub device_keys: Option<Box<RawValue>>,
    /// The keys of which each is given to one other device only.
    pub one_time_keys: Keys,
    /// The keys that are given when no one-time keys are left.
    pub fallback_keys: Keys,
}

impl Upload {
    /// Whether there are keys in it that are judged by the identity keys which the device uploaded before.
    pub fn is_of_known_device(&self) -> bool {
        let is_empty = self.one_time_keys.is_empty() && self.fallback_keys.is_empty();
        self.device_keys.is_none() && !is_empty
    }

    /// Refuses keys that are not the device's, or that it should have signed and has not. Answers the key by which that was judged, which
    /// `find_known` finds where the upload has no identity keys. Errors: 400 `M_BAD_JSON`, `M_INVALID_PARAM`, `M_INVALID_SIGNATURE`; 413
    /// `M_TOO_LARGE`.
    pub fn judge(
        &self,
        (user_id, device_id): (&UserId, &DeviceId),
        find_known: impl FnOnce() -> Result<Option<Prover>, Fault>,
    ) -> Result<Option<Prover>> {
        // A thousand signatures are checked, and no more.
        for (count, of_what) in
            [(self.one_time_keys.len(), "one-time keys"), (self.fallback_keys.len(), "fallback keys")]
        {
            if count > UPLOADED_MAX {
                let why = format!("A request uploads at most {UPLOADED_MAX} {of_what}.");
                return Err(Refusal::too_large(why).into());
            }
        }
        let prover = match &self.device_keys {
            Some(device_keys) => check_device_keys(device_keys, user_id, device_id)?,
            None if self.is_of_known_device() => find_known()?,
            None => None,
        };
        if let Some(prover) = &prover {
            prover.check(&self.one_time_keys)?;
            prover.check(&self.fallback_keys)?;
        }
        Ok(prover)
    }

    /// Stores keys that were judged. Answers who is to be told of it. The caller holds the user's lock.
    ///
    /// A device that begins to sign is held to it from then on, so that keys which came before and lack its signature are given to nobody. A
    /// right signature of the self-signing key that identity keys bring along is taken as if it had come by itself.
    pub fn put(
        &self,
        batch: &mut Batch,
        owner: Owner,
        (user_id, device_id): (&UserId, &DeviceId),
    ) -> Result<Told> {
        let mut told = Told::default();
        if let Some(device_keys) = &self.device_keys {
            let before = find_prover(batch, owner, (user_id, device_id))?;
            let mut is_changed = keys::put_device_keys(batch, owner, device_keys)?;
            if is_changed {
                let now = find_prover(batch, owner, (user_id, device_id))?;
                if let Some(prover) = now.filter(|now| before.as_ref() != Some(now)) {
                    keys::retain(batch, owner, |algorithm, key| prover.accepts(algorithm, key))?;
                }
                told.signing_keys = cross_signing::revise_device(batch, owner, (user_id, device_id))?;
            }
            is_changed |= cross_signing::take_signature(batch, (owner, user_id), device_keys)?;
            if is_changed {
                told.devices.push(device_id.to_owned());
            }
        }
        keys::put_one_time_keys(batch, owner, &self.one_time_keys)?;
        keys::put_fallback_keys(batch, owner, &self.fallback_keys)?;
        Ok(told)
    }
}

/// The ed25519 key of a device, which has signed the identity keys in which it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prover {
    user_id: OwnedUserId,
    key_id: String,
    key: PublicKey,
}

impl Prover {
    /// Refuses one-time or fallback keys of which this device should have signed some and has not: 400 `M_INVALID_SIGNATURE`.
    fn check(&self, keys: &Keys) -> Result<()> {
        for (id, key) in keys {
            let algorithm = id.split_once(':').map_or("", |(algorithm, _)| algorithm);
            if !self.accepts(algorithm, key.get().as_bytes()) {
                let why = format!("`{id}` must have a signature of the device that it is uploaded for.");
                return Err(Refusal::invalid_signature(why).into());
            }
        }
        Ok(())
    }

    /// Whether this device has signed a one-time or fallback key, or need not.
    fn accepts(&self, algorithm: &str, key: &[u8]) -> bool {
        let has_signed = |read: Signable| read.is_signed_by(self.user_id.as_str(), &self.key_id, &self.key);
        algorithm != SIGNED_CURVE25519 || Signable::parse(key).is_some_and(has_signed)
    }
}

/// Refuses identity keys that a device cannot upload. Answers the key with which it has signed them, if it has. Errors: 400
/// `M_BAD_JSON`, `M_INVALID_PARAM` for those of another device, `M_INVALID_SIGNATURE` for a wrong signature of its own; 413 `M_TOO_LARGE`.
fn check_device_keys(keys: &RawValue, user_id: &UserId, device_id: &DeviceId) -> Result<Option<Prover>> {
    keys::check_device_keys(keys, user_id, device_id)?;
    let Some(read) = Signable::parse(keys.get().as_bytes()) else {
        return Err(Refusal::bad_json("`device_keys` holds something that cannot be signed.").into());
    };
    for (id, _) in read.keys() {
        let is_own =
            id.split_once(':').is_some_and(|(algorithm, of)| !algorithm.is_empty() && of == device_id);
        if !is_own {
            let why =
                "The names in `device_keys.keys` are algorithm:device_id, with the id of your own device.";
            return Err(Refusal::invalid_param(why).into());
        }
    }
    match find_claim(&read, user_id, device_id) {
        Claim::None => Ok(None),
        Claim::Right(prover) => Ok(Some(prover)),
        Claim::Wrong => {
            let why = "The signature of the device in `device_keys.signatures` is wrong.";
            Err(Refusal::invalid_signature(why).into())
        }
    }
}

/// Finds the key with which a device has signed the identity keys that are kept of it; none where it has none, or they are not signed.
pub fn find_prover(
    read: &(impl Read + ?Sized),
    owner: Owner,
    (user_id, device_id): (&UserId, &DeviceId),
) -> Result<Option<Prover>, Fault> {
    let Some(keys) = schema::DEVICE_KEYS.get(read, owner)? else { return Ok(None) };
    let claim = Signable::parse(&keys).map(|keys| find_claim(&keys, user_id, device_id));
    Ok(match claim {
        Some(Claim::Right(prover)) => Some(prover),
        // Keys from before signatures were checked stay where they are.
        Some(Claim::Wrong | Claim::None) | None => None,
    })
}

/// A signature of a device over its own identity keys.
enum Claim {
    /// There is none that can be judged.
    None,
    /// It is what it should be.
    Right(Prover),
    /// It is said to be there, and it is wrong.
    Wrong,
}

fn find_claim(keys: &Signable, user_id: &UserId, device_id: &DeviceId) -> Claim {
    let key_id = key_id(device_id.as_str());
    let is_known = keys.texts("algorithms").any(|algorithm| SIGNING_ALGORITHMS.contains(&algorithm));
    if !is_known || keys.find_signature(user_id.as_str(), &key_id).is_none() {
        return Claim::None;
    }
    match keys.find_key(device_id.as_str()) {
        Some(key) if keys.is_signed_by(user_id.as_str(), &key_id, &key) => {
            Claim::Right(Prover { user_id: user_id.to_owned(), key_id, key })
        }
        _ => Claim::Wrong,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::encryption::signatures::testing::Pair;

    const ALICE: &str = "@alice:a.example";

    fn check(keys: &Value) -> Result<Option<Prover>> {
        let keys = serde_json::value::to_raw_value(keys).unwrap();
        check_device_keys(&keys, ALICE.try_into().unwrap(), "D".into())
    }

    fn code(result: Result<Option<Prover>>) -> String {
        result.unwrap_err().refusal().unwrap().errcode()
    }

    #[test]
    fn identity_keys_are_their_devices_own_and_no_signature_is_claimed_that_is_wrong() {
        let keys = Pair::new(1).device_keys(ALICE, "D");
        assert!(check(&keys).unwrap().is_some());
        let with = |change: &dyn Fn(&mut Value)| {
            let mut keys = keys.clone();
            change(&mut keys);
            keys
        };
        let signatures = |to: Value| with(&move |keys| keys["signatures"][ALICE] = to.clone());
        for wrong in [
            with(&|keys| keys["algorithms"] = json!(["m.megolm.v1.aes-sha2"])),
            with(&|keys| keys["keys"]["ed25519:D"] = Pair::new(2).public().into()),
            with(&|keys| keys["keys"]["ed25519:D"] = "short".into()),
            with(&|keys| drop(keys["keys"].as_object_mut().unwrap().remove("ed25519:D"))),
            with(&|keys| keys["more"] = json!(1)),
            signatures(json!({ "ed25519:D": "sig" })),
            signatures(json!({ "ed25519:D": "" })),
        ] {
            assert_eq!(code(check(&wrong)), "M_INVALID_SIGNATURE", "{wrong}");
        }
        for unsigned in [
            with(&|keys| keys["signatures"] = json!({})),
            signatures(json!({})),
            signatures(json!({ "ed25519:E": "of another" })),
            // How keys of these algorithms sign is not known.
            with(&|keys| {
                keys["algorithms"] = json!(["m.olm.curve25519-aes-sha256", "m.megolm.v1.aes-sha"]);
                keys["signatures"][ALICE]["ed25519:D"] = "self+signature".into();
            }),
            with(&|keys| {
                keys["algorithms"] = json!([]);
                keys["keys"] = json!({});
            }),
        ] {
            assert_eq!(check(&unsigned).unwrap(), None, "{unsigned}");
        }
        for (wrong, expected) in [
            (with(&|keys| keys["user_id"] = "@bob:a.example".into()), "M_INVALID_PARAM"),
            (with(&|keys| keys["device_id"] = "E".into()), "M_INVALID_PARAM"),
            (with(&|keys| keys["keys"]["ed25519:E"] = "of another".into()), "M_INVALID_PARAM"),
            (with(&|keys| keys["keys"]["D"] = "no algorithm".into()), "M_INVALID_PARAM"),
            (with(&|keys| keys["keys"][":D"] = "no algorithm".into()), "M_INVALID_PARAM"),
            (with(&|keys| keys["algorithms"] = json!({})), "M_BAD_JSON"),
            (with(&|keys| keys["keys"] = json!([])), "M_BAD_JSON"),
            (signatures(json!(1)), "M_BAD_JSON"),
            (with(&|keys| keys["more"] = "x".repeat(40_000).into()), "M_TOO_LARGE"),
        ] {
            assert_eq!(code(check(&wrong)), expected, "{wrong}");
        }
    }

    #[test]
    fn keys_that_should_be_signed_are_signed_by_their_device() {
        let pair = Pair::new(1);
        let prover = check(&pair.device_keys(ALICE, "D")).unwrap().unwrap();
        let check = |id: &str, key: &Value| {
            let key = serde_json::value::to_raw_value(key).unwrap();
            prover.check(&Keys::from([(id.to_owned(), key)]))
        };
        let mut key = json!({ "key": "k" });
        pair.sign(ALICE, "D", &mut key);
        assert!(check("signed_curve25519:A", &key).is_ok());
        key["fallback"] = true.into();
        assert!(check("signed_curve25519:A", &key).is_err(), "it was signed without this field");
        pair.sign(ALICE, "D", &mut key);
        assert!(check("signed_curve25519:A", &key).is_ok());
        let mut of_another = json!({ "key": "k" });
        Pair::new(2).sign(ALICE, "D", &mut of_another);
        for wrong in [json!({ "key": "k" }), json!("k"), of_another] {
            assert!(check("signed_curve25519:A", &wrong).is_err(), "{wrong}");
            assert!(check("curve25519:A", &wrong).is_ok(), "these are not signed");
        }
    }
}
