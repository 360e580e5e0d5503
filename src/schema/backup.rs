//! Rows of server-side key backups: keys of Megolm sessions that clients keep here, encrypted.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::store::{
    Fault,
    key::{Decoder, Encoder, Value, expect_layout},
};

/// A version of a user's backup, without its keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupRow {
    /// The algorithm by which clients encrypt the keys.
    pub algorithm: String,
    /// The JSON of what clients must know to use the backup; it means nothing to the server.
    pub auth_data: String,
}

/// How much a version of a backup holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackupState {
    /// The number of keys.
    pub keys: u64,
    /// The bytes of the keys, with the names of their rooms and sessions.
    pub bytes: u64,
    /// A number that rises with each change of the keys, and that no other content of the version has.
    pub etag: u64,
}

impl Value for BackupState {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        to.varint(self.keys);
        to.varint(self.bytes);
        to.varint(self.etag);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        Ok(Self { keys: from.varint()?, bytes: from.varint()?, etag: from.varint()? })
    }
}

/// How much a version of a backup holds of one room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackupShare {
    /// The number of keys.
    pub keys: u64,
    /// The bytes of the keys, with the names of their rooms and sessions.
    pub bytes: u64,
}

impl Value for BackupShare {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        to.varint(self.keys);
        to.varint(self.bytes);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        Ok(Self { keys: from.varint()?, bytes: from.varint()? })
    }
}

/// The key of a session, as a client has stored it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackedUpKey {
    /// Whether the device that stored it has verified the device that the key is from.
    pub is_verified: bool,
    /// The index of the first message that the key decrypts.
    pub first_message_index: u64,
    /// How often the key was handed on between devices.
    pub forwarded_count: u64,
    /// The JSON of the key, encrypted; it means nothing to the server.
    pub session_data: Bytes,
}

impl Value for BackedUpKey {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1, u8::from(self.is_verified)]);
        to.varint(self.first_message_index);
        to.varint(self.forwarded_count);
        to.raw(&self.session_data);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let is_verified = from.byte()? != 0;
        let (first_message_index, forwarded_count) = (from.varint()?, from.varint()?);
        let session_data = bytes.slice_ref(from.rest());
        Ok(Self { is_verified, first_message_index, forwarded_count, session_data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::round_trip;

    #[test]
    fn rows_come_back() {
        let state = BackupState { keys: 300, bytes: u64::MAX, etag: 7 };
        assert_eq!(round_trip(&state), state);
        let share = BackupShare { keys: 1, bytes: 128 };
        assert_eq!(round_trip(&share), share);
        for is_verified in [false, true] {
            let session_data = Bytes::from_static(br#"{"ciphertext":"x"}"#);
            let key =
                BackedUpKey { is_verified, first_message_index: 1 << 40, forwarded_count: 0, session_data };
            assert_eq!(round_trip(&key), key);
        }
        assert!(BackupState::decode(Bytes::from_static(&[1, 0, 0])).is_err());
        assert!(BackupShare::decode(Bytes::from_static(&[2, 0, 0])).is_err());
        assert!(BackedUpKey::decode(Bytes::from_static(&[1, 1, 0x80])).is_err());
    }
}
