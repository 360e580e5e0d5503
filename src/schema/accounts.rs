//! Rows of accounts: users, devices, tokens, account data.

use bytes::Bytes;
use ruma::{OwnedDeviceId, OwnedUserId};
use serde::{Deserialize, Serialize};

use crate::{
    ids::{DeviceNum, Position, UserNum},
    store::{
        Fault,
        key::{Decoder, Encoder, Key, Value, expect_layout, layout_upto},
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
    /// Whether the account is deactivated: it can never log in again, and its name stays taken.
    pub is_deactivated: bool,
    /// Whether the user asked to be forgotten: who was not in a room sees the user's events there redacted.
    pub is_erased: bool,
    /// Whether an admin has locked the account: nothing can be done with it but to log out.
    pub is_locked: bool,
    /// Whether an admin has suspended the account: it reads and leaves, and does nothing that others see.
    pub is_suspended: bool,
    /// Devices that have ended, whatever rows of theirs are left. A number goes from here once its rows are gone.
    pub ended: EndedDevices,
}

/// Numbers of devices that have ended, as ranges. This one value ends any number of sessions at once, since each request asks
/// for the account's row; what they leave behind is swept later.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndedDevices(Vec<(DeviceNum, DeviceNum)>);

impl EndedDevices {
    /// Whether this device has ended, so that its tokens no longer work.
    pub fn contains(&self, device: DeviceNum) -> bool {
        let after = self.0.partition_point(|(low, _)| *low <= device);
        after.checked_sub(1).and_then(|at| self.0.get(at)).is_some_and(|(_, high)| device <= *high)
    }

    /// The first range of devices whose rows are still to be swept: from the first number to the last one.
    pub fn first(&self) -> Option<(DeviceNum, DeviceNum)> {
        self.0.first().copied()
    }

    /// Ends the devices from `low` to `high`. Nothing happens where `low` is above `high`.
    pub fn add(&mut self, low: DeviceNum, high: DeviceNum) {
        if low > high {
            return;
        }
        let mut all = std::mem::take(&mut self.0);
        all.push((low, high));
        all.sort_unstable();
        for (low, high) in all {
            match self.0.last_mut() {
                Some((_, end)) if low.0 <= end.0.saturating_add(1) => *end = high.max(*end),
                _ => self.0.push((low, high)),
            }
        }
    }

    /// Forgets the first range, whose rows are swept.
    pub fn remove_first(&mut self) {
        if !self.0.is_empty() {
            self.0.remove(0);
        }
    }

    fn encode(&self, to: &mut Encoder) {
        to.varint(self.0.len() as u64);
        let mut before = 0;
        for (low, high) in &self.0 {
            to.varint(u64::from(low.0.saturating_sub(before)));
            to.varint(u64::from(high.0.saturating_sub(low.0)));
            before = high.0;
        }
    }

    fn decode(from: &mut Decoder<'_>) -> Result<Self, Fault> {
        let count = from.varint()?;
        let (mut ranges, mut before) = (Vec::new(), 0_u32);
        for _ in 0..count {
            let too_large = || Fault::Corrupt("a device number is too large");
            let low = before.checked_add(device_num(from)?.0).ok_or_else(too_large)?;
            let high = low.checked_add(device_num(from)?.0).ok_or_else(too_large)?;
            ranges.push((DeviceNum(low), DeviceNum(high)));
            before = high;
        }
        Ok(Self(ranges))
    }
}

const ADMIN: u8 = 1;
const GUEST: u8 = 2;
const DEACTIVATED: u8 = 4;
const ERASED: u8 = 8;
const LOCKED: u8 = 16;
const SUSPENDED: u8 = 32;

impl Value for UserRow {
    fn encode(&self, to: &mut Encoder) {
        let flags = [
            (self.is_admin, ADMIN),
            (self.is_guest, GUEST),
            (self.is_deactivated, DEACTIVATED),
            (self.is_erased, ERASED),
            (self.is_locked, LOCKED),
            (self.is_suspended, SUSPENDED),
        ];
        let flags = flags.into_iter().filter(|(set, _)| *set).fold(0, |flags, (_, flag)| flags | flag);
        to.raw(&[2, flags]);
        to.varint(self.created_ms);
        to.varint(self.last_device.0.into());
        self.ended.encode(to);
        to.raw(self.user_id.as_str().as_bytes());
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        // Layout 1 knew no devices that had ended and still had rows.
        let layout = layout_upto(&mut from, 2)?;
        let flags = from.byte()?;
        let created_ms = from.varint()?;
        let last_device = device_num(&mut from)?;
        let ended = if layout == 1 { EndedDevices::default() } else { EndedDevices::decode(&mut from)? };
        Ok(Self {
            user_id: user_id(from.rest())?,
            created_ms,
            last_device,
            is_admin: flags & ADMIN != 0,
            is_guest: flags & GUEST != 0,
            is_deactivated: flags & DEACTIVATED != 0,
            is_erased: flags & ERASED != 0,
            is_locked: flags & LOCKED != 0,
            is_suspended: flags & SUSPENDED != 0,
            ended,
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

/// A device of an account: a session that logged in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceRow {
    /// The number by which other tables know the device.
    pub num: DeviceNum,
    /// The name that its owner gave it.
    pub display_name: Option<String>,
    /// When it first logged in, in milliseconds since the epoch.
    pub created_ms: u64,
}

/// The dehydrated device of an account (MSC3814).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DehydratedRow {
    /// The number of the device.
    pub num: DeviceNum,
    /// The id of the device.
    pub device_id: String,
    /// The JSON by which a client uses the device; it means nothing to the server.
    pub device_data: String,
}

/// An access token, whose key is its hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessTokenRow {
    /// The user who has the token.
    pub user: UserNum,
    /// The number of the device that has the token.
    pub device: DeviceNum,
    /// The id of that device, so that a request needs no second row to know it.
    pub device_id: OwnedDeviceId,
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
        to.raw(self.device_id.as_str().as_bytes());
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let flags = from.byte()?;
        let user = UserNum::decode_key(&mut from)?;
        let device = device_num(&mut from)?;
        let expires_ms = if flags & EXPIRES == 0 { None } else { Some(from.varint()?) };
        let replaces = if flags & REPLACES == 0 { None } else { Some(<[u8; 32]>::decode_key(&mut from)?) };
        Ok(Self { user, device, device_id: text(from.rest())?.into(), expires_ms, replaces })
    }
}

/// A refresh token, whose key is its hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefreshTokenRow {
    /// The user who has the token.
    pub user: UserNum,
    /// The number of the device that has the token.
    pub device: DeviceNum,
    /// The id of that device, so that a request needs no second row to know it.
    pub device_id: OwnedDeviceId,
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
    /// A random seed, which only the store knows.
    pub seed: [u8; 32],
    /// When the access token of the pair ends, in milliseconds since the epoch.
    pub expires_ms: u64,
}

/// When and from where a device was last seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SeenRow {
    /// The time at which it was seen, in milliseconds since the epoch.
    pub ms: u64,
    /// The address from which it was seen, if that is known.
    pub ip: Option<String>,
    /// The program that it says it is, if it does.
    #[serde(default)]
    pub agent: Option<String>,
}

/// The presence of a user that others were told last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PresenceRow {
    /// The state: `online`, `unavailable` or `offline`.
    pub state: String,
    /// The status message that the user gave.
    pub status_msg: Option<String>,
    /// When the user last did something, in milliseconds since the epoch; zero if that is not known.
    pub last_active_ms: u64,
}

/// A token with which one may register.
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

/// The OpenID tokens that a user has asked for, the newest last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenIdRow {
    /// The tokens; of those that have expired some may still be here.
    pub tokens: Vec<OpenIdToken>,
}

/// A token by which a user shows another service who they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenIdToken {
    /// The SHA-256 of the token.
    pub hash: [u8; 32],
    /// When it ends, in milliseconds since the epoch.
    pub expires_ms: u64,
    /// The id of the device that asked for it, with which it ends. Earlier builds did not write it, and their tokens name no device.
    #[serde(default)]
    pub device_id: String,
    /// The number of that device.
    #[serde(default)]
    pub device: DeviceNum,
}

/// A JSON object of a user's (account data of one type, push rules), with the position at which it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenRow {
    /// The position at which it was written.
    pub position: Position,
    /// The JSON object as it was written.
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
    /// The number of rows, one for each type and room.
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
    use crate::schema::round_trip;

    proptest! {
        #[test]
        fn users_come_back(
            name in "[a-z]{1,9}", created_ms: u64, last: u32, flags: [bool; 6], ended: Vec<(u32, u32)>,
        ) {
            let [is_admin, is_guest, is_deactivated, is_erased, is_locked, is_suspended] = flags;
            let (last_device, ended) = (DeviceNum(last), ended_devices(&ended));
            let user_id = OwnedUserId::try_from(format!("@{name}:s")).unwrap();
            let row = UserRow {
                user_id, created_ms, last_device, is_admin, is_guest, is_deactivated, is_erased, is_locked, is_suspended,
                ended,
            };
            prop_assert_eq!(round_trip(&row), row);
        }

        #[test]
        fn ended_devices_are_those_that_were_added(
            added in prop::collection::vec((0..60_u32, 0..60_u32), 0..12), asked in 0..70_u32,
        ) {
            let ended = ended_devices(&added);
            let expected = added.iter().any(|(low, high)| (low..=high).contains(&&asked));
            prop_assert_eq!(ended.contains(DeviceNum(asked)), expected);
            // Ranges rise and do not touch, so the row stays as small as it can be.
            prop_assert!(ended.0.windows(2).all(|two| two[0].1.0 + 1 < two[1].0.0), "{:?}", ended);
        }

        #[test]
        fn access_tokens_come_back(
            user: u64, device: u32, device_id in ".{0,9}", expires_ms: Option<u64>, replaces: Option<[u8; 32]>,
        ) {
            let (user, device) = (UserNum(user), DeviceNum(device));
            let device_id = device_id.into();
            let row = AccessTokenRow { user, device, device_id, expires_ms, replaces };
            prop_assert_eq!(round_trip(&row), row);
        }

        #[test]
        fn damaged_rows_are_refused_without_a_panic(bytes: Vec<u8>) {
            let _ = UserRow::decode(Bytes::from(bytes.clone()));
            let _ = AccessTokenRow::decode(Bytes::from(bytes.clone()));
            let _ = WrittenRow::decode(Bytes::from(bytes));
        }
    }

    fn ended_devices(added: &[(u32, u32)]) -> EndedDevices {
        let mut ended = EndedDevices::default();
        for (low, high) in added {
            ended.add(DeviceNum(*low), DeviceNum(*high));
        }
        ended
    }

    #[test]
    fn the_first_layout_of_accounts_is_read() {
        let first = [&[1, ADMIN, 5, 7][..], b"@a:s"].concat();
        let row = UserRow::decode(first.into()).unwrap();
        assert_eq!((row.user_id.as_str(), row.created_ms, row.last_device), ("@a:s", 5, DeviceNum(7)));
        assert!(row.is_admin && row.ended == EndedDevices::default());
    }

    #[test]
    fn account_data_comes_back() {
        let row = WrittenRow { position: Position::new(7).unwrap(), content: Bytes::from_static(b"{}") };
        assert_eq!(round_trip(&row), row);
    }
}
