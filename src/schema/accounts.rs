//! Rows of accounts: users, devices, tokens, account data.

use bytes::Bytes;
use ruma::OwnedUserId;
use serde::{Deserialize, Serialize};

use crate::{
    ids::{DeviceNum, Position, UserNum},
    store::{
        Fault,
        key::{Decoder, Encoder, Key, Value, expect_layout},
    },
};

/// An account of this server: what each request asks of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserRow {
    /// The full user id.
    pub user_id: OwnedUserId,
    /// When it was registered, in milliseconds since the epoch.
    pub created_ms: u64,
    /// The number of the last device that it ever had; 0 before the first.
    pub last_device: DeviceNum,
    /// Whether the user administers this server.
    pub is_admin: bool,
    /// Whether the user registered as a guest.
    pub is_guest: bool,
    /// Can never log in again; its name stays taken.
    pub is_deactivated: bool,
    /// Asked to be forgotten: whoever was not in a room sees its events there redacted.
    pub is_erased: bool,
}

const ADMIN: u8 = 1;
const GUEST: u8 = 2;
const DEACTIVATED: u8 = 4;
const ERASED: u8 = 8;

impl Value for UserRow {
    fn encode(&self, to: &mut Encoder) {
        let flags = [
            (self.is_admin, ADMIN),
            (self.is_guest, GUEST),
            (self.is_deactivated, DEACTIVATED),
            (self.is_erased, ERASED),
        ];
        let flags = flags.into_iter().filter(|(set, _)| *set).fold(0, |flags, (_, flag)| flags | flag);
        to.raw(&[1, flags]);
        to.varint(self.created_ms);
        to.varint(self.last_device.0.into());
        to.raw(self.user_id.as_str().as_bytes());
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let flags = from.byte()?;
        let created_ms = from.varint()?;
        let last_device = device_num(&mut from)?;
        Ok(Self {
            user_id: user_id(from.rest())?,
            created_ms,
            last_device,
            is_admin: flags & ADMIN != 0,
            is_guest: flags & GUEST != 0,
            is_deactivated: flags & DEACTIVATED != 0,
            is_erased: flags & ERASED != 0,
        })
    }
}

fn device_num(from: &mut Decoder<'_>) -> Result<DeviceNum, Fault> {
    u32::try_from(from.varint()?).map(DeviceNum).map_err(|_| Fault::Corrupt("a device number is too large"))
}

fn user_id(bytes: &[u8]) -> Result<OwnedUserId, Fault> {
    OwnedUserId::try_from(text(bytes)?).map_err(|_| Fault::Corrupt("an account has no valid user id"))
}

fn text(bytes: &[u8]) -> Result<String, Fault> {
    String::from_utf8(bytes.to_vec()).map_err(|_| Fault::Corrupt("a value is not UTF-8"))
}

/// A device of an account.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceRow {
    /// Its number: what other tables know it by.
    pub num: DeviceNum,
    /// The name that its owner gave it.
    pub display_name: Option<String>,
    /// When it first logged in, in milliseconds since the epoch.
    pub created_ms: u64,
}

/// An access token, whose key is its hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessTokenRow {
    /// The user whose it is.
    pub user: UserNum,
    /// The device that has it.
    pub device: DeviceNum,
    /// The id of that device.
    pub device_id: String,
    /// When it ends, in milliseconds since the epoch; never, if none.
    pub expires_ms: Option<u64>,
    /// The hash of the refresh token that it was got for. That token and its pair live until this one is first used.
    pub replaces: Option<[u8; 32]>,
}

const EXPIRES: u8 = 1;
const REPLACES: u8 = 2;

impl Value for AccessTokenRow {
    fn encode(&self, to: &mut Encoder) {
        let expires = if self.expires_ms.is_some() { EXPIRES } else { 0 };
        let replaces = if self.replaces.is_some() { REPLACES } else { 0 };
        to.raw(&[1, expires | replaces]);
        UserNum::encode_key(self.user, to);
        to.varint(self.device.0.into());
        if let Some(expires_ms) = self.expires_ms {
            to.varint(expires_ms);
        }
        if let Some(hash) = &self.replaces {
            to.raw(hash);
        }
        to.raw(self.device_id.as_bytes());
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let flags = from.byte()?;
        let user = UserNum::decode_key(&mut from)?;
        let device = device_num(&mut from)?;
        let expires_ms = if flags & EXPIRES == 0 { None } else { Some(from.varint()?) };
        let replaces = if flags & REPLACES == 0 { None } else { Some(<[u8; 32]>::decode_key(&mut from)?) };
        Ok(Self { user, device, device_id: text(from.rest())?, expires_ms, replaces })
    }
}

/// A refresh token, whose key is its hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefreshTokenRow {
    /// The user whose it is.
    pub user: UserNum,
    /// The device that has it.
    pub device: DeviceNum,
    /// The id of that device.
    pub device_id: String,
    /// The hash of the access token that was given out with it.
    pub access: [u8; 32],
    /// The hash of the refresh token that it was got for; see [`AccessTokenRow::replaces`].
    #[serde(default)]
    pub replaces: Option<[u8; 32]>,
    /// The pair that it was exchanged for, once it was.
    #[serde(default)]
    pub successor: Option<Successor>,
}

/// The pair of tokens that a refresh token was exchanged for. Both follow from the presented token and this seed, so
/// that the answer can be given again, by nobody but who holds the token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Successor {
    /// A random seed.
    pub seed: [u8; 32],
    /// When the access token of the pair ends, in milliseconds since the epoch.
    pub expires_ms: u64,
}

/// When and from where a device was last seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SeenRow {
    /// In milliseconds since the epoch.
    pub ms: u64,
    /// The address, if it is known.
    pub ip: Option<String>,
}

/// A registration token.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RegistrationTokenRow {
    /// When it was made, in milliseconds since the epoch.
    pub created_ms: u64,
    /// How many accounts may be registered with it; any number, if none.
    pub uses_max: Option<u64>,
    /// How many accounts were registered with it.
    pub uses: u64,
    /// When it ends, in milliseconds since the epoch; never, if none.
    pub expires_ms: Option<u64>,
}

/// A JSON object of a user's (account data of one type, push rules), with the position at which it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenRow {
    /// When it was written.
    pub position: Position,
    /// The JSON object.
    pub content: Bytes,
}

impl Value for WrittenRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        to.position(self.position);
        to.raw(&self.content);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let position = Position::decode_key(&mut from)?;
        let content = bytes.slice_ref(from.rest());
        Ok(Self { position, content })
    }
}

/// How much account data a user has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DataSize {
    /// Rows: one a type and room.
    pub rows: u64,
    /// The bytes of room ids, types and contents.
    pub bytes: u64,
}

impl Value for DataSize {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        to.varint(self.rows);
        to.varint(self.bytes);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        Ok(Self { rows: from.varint()?, bytes: from.varint()? })
    }
}

/// The account data that was written at a position.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccountDataKey {
    /// The room's id; empty for global account data.
    pub room: String,
    /// The type of the account data.
    pub kind: String,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn again<V: Value>(value: &V) -> V {
        let mut to = Encoder::default();
        value.encode(&mut to);
        V::decode(to.bytes.into()).unwrap()
    }

    proptest! {
        #[test]
        fn users_come_back(name in "[a-z]{1,9}", created_ms: u64, last: u32, flags: [bool; 4]) {
            let [is_admin, is_guest, is_deactivated, is_erased] = flags;
            let last_device = DeviceNum(last);
            let user_id = OwnedUserId::try_from(format!("@{name}:s")).unwrap();
            let row = UserRow { user_id, created_ms, last_device, is_admin, is_guest, is_deactivated, is_erased };
            prop_assert_eq!(again(&row), row);
        }

        #[test]
        fn access_tokens_come_back(
            user: u64, device: u32, device_id in ".{0,9}", expires_ms: Option<u64>, replaces: Option<[u8; 32]>,
        ) {
            let (user, device) = (UserNum(user), DeviceNum(device));
            let row = AccessTokenRow { user, device, device_id, expires_ms, replaces };
            prop_assert_eq!(again(&row), row);
        }

        #[test]
        fn damaged_rows_are_refused_without_a_panic(bytes: Vec<u8>) {
            let _ = UserRow::decode(Bytes::from(bytes.clone()));
            let _ = AccessTokenRow::decode(Bytes::from(bytes.clone()));
            let _ = WrittenRow::decode(Bytes::from(bytes));
        }
    }

    #[test]
    fn account_data_comes_back() {
        let row = WrittenRow { position: Position::new(7).unwrap(), content: Bytes::from_static(b"{}") };
        assert_eq!(again(&row), row);
    }
}
