//! A key with which a user signs, as it is uploaded and kept.

use federation::keys::PublicKey;
use ruma::UserId;
use serde_json::value::RawValue;

use crate::{
    encryption::signatures::{Signable, key_id, public_key},
    error::{Refusal, Result},
};

/// A key with which a user signs has at most this many bytes of JSON.
const KEY_BYTES_MAX: usize = 8 << 10;

/// The kind of a key with which a user signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// The key that stands for the user, and signs the other two.
    Master,
    /// The key that signs the user's devices.
    SelfSigning,
    /// The key that signs the master keys of other users, which only its user is shown.
    UserSigning,
}

impl Usage {
    /// All kinds, the one first that signs the others.
    pub const ALL: [Self; 3] = [Self::Master, Self::SelfSigning, Self::UserSigning];

    /// The word for it in the field `usage` of a key.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Master => "master",
            Self::SelfSigning => "self_signing",
            Self::UserSigning => "user_signing",
        }
    }

    /// The name of the field in which such a key is uploaded.
    pub(super) fn field(self) -> &'static str {
        match self {
            Self::Master => "master_key",
            Self::SelfSigning => "self_signing_key",
            Self::UserSigning => "user_signing_key",
        }
    }

    /// The number by which rows name it.
    pub(in crate::encryption) fn number(self) -> u8 {
        match self {
            Self::Master => 1,
            Self::SelfSigning => 2,
            Self::UserSigning => 3,
        }
    }
}

/// A key with which a user signs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SigningKey {
    /// The public half in base64, which is the name of the key, too.
    pub public: String,
    key: PublicKey,
    pub(super) object: Signable,
}

impl SigningKey {
    /// Reads a key of a user as it is uploaded. Errors: 400 `M_BAD_JSON`, `M_INVALID_PARAM` for a key of another user or kind, 413
    /// `M_TOO_LARGE`.
    pub fn read(json: &RawValue, user_id: &UserId, usage: Usage) -> Result<Self> {
        let field = usage.field();
        if json.get().len() > KEY_BYTES_MAX {
            let why = format!("`{field}` has at most {} KiB.", KEY_BYTES_MAX >> 10);
            return Err(Refusal::too_large(why).into());
        }
        let Some(object) = Signable::parse(json.get().as_bytes()) else {
            return Err(Refusal::bad_json(format!("`{field}` must be an object.")).into());
        };
        let refuse = |why: &str| Err(Refusal::invalid_param(format!("`{field}` must {why}.")).into());
        if object.text("user_id") != Some(user_id.as_str()) {
            return refuse("have your user id in `user_id`");
        }
        if !object.texts("usage").any(|it| it == usage.as_str()) {
            return refuse(&format!("have `{}` in `usage`", usage.as_str()));
        }
        match Self::of(object) {
            Some(key) => Ok(key),
            None => refuse("have one ed25519 key in `keys`, which is named by itself"),
        }
    }

    /// The key in an object; none where it has not exactly one, named by itself.
    pub(super) fn of(object: Signable) -> Option<Self> {
        let (public, key) = {
            let mut keys = object.keys();
            let (id, public) = keys.next()?;
            if id != key_id(public) || keys.next().is_some() {
                return None;
            }
            (public.to_owned(), public_key(public)?)
        };
        Some(Self { public, key, object })
    }

    /// The id under which signatures of this key stand.
    pub fn key_id(&self) -> String {
        key_id(&self.public)
    }

    /// Whether the object was signed by this key of this user.
    pub fn has_signed(&self, user_id: &UserId, object: &Signable) -> bool {
        object.is_signed_by(user_id.as_str(), &self.key_id(), &self.key)
    }

    /// Whether the other key is this one, whoever has signed it.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.object.signed_part() == other.object.signed_part()
    }
}
