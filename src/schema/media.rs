//! Rows of media: the items that have an `mxc://` URI, the blobs that hold their bytes, and the thumbnails that were made of them.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::ids::UserNum;

/// The SHA-256 of some bytes, by which a blob is named.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Reads a digest as [`fmt::Display`] writes it: 64 digits of base 16. None for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.as_bytes().as_chunks::<2>();
        if !digits.1.is_empty() || digits.0.len() != 32 {
            return None;
        }
        let mut bytes = [0; 32];
        for (byte, [high, low]) in bytes.iter_mut().zip(digits.0) {
            let digit = |it: u8| char::from(it).to_digit(16).and_then(|it| u8::try_from(it).ok());
            *byte = digit(*high)? << 4 | digit(*low)?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| de::Error::custom("this is no digest"))
    }
}

/// The state of a blob. `media/objects.rs` says how one follows from the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlobState {
    /// Somebody is about to put the object where it belongs; nothing refers to it yet.
    Pending,
    /// The object is there, and something refers to it.
    Live,
    /// The object is there, and nothing refers to it any more.
    Dying,
    /// The object is being removed, and nobody may count on it again.
    Removing,
}

/// The place where an object lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Home {
    /// The local disk: `[media] directory`.
    #[default]
    Disk,
    /// The bucket of an S3-compatible store: `[media.s3]`.
    S3,
}

impl Home {
    fn is_disk(&self) -> bool {
        *self == Self::Disk
    }
}

/// A blob: bytes that are stored once, however many items have them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobRow {
    /// The state of the blob.
    pub state: BlobState,
    /// The number that tells its object from earlier ones of the same bytes, which are being removed.
    pub generation: u32,
    /// The number of its bytes.
    pub bytes: u64,
    /// When its timer is due, in milliseconds since the epoch; none has one while it is live.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub due_ms: Option<u64>,
    /// The place where its object lies, or is about to.
    #[serde(default, skip_serializing_if = "Home::is_disk")]
    pub home: Home,
    /// The highest generation that was given to a copy in another place; 0 if none was.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub reserved: u32,
    /// Whether an operator has quarantined these bytes, by the name of an item: an item that comes with them is quarantined from its
    /// beginning.
    #[serde(default, skip_serializing_if = "is_false")]
    pub is_quarantined: bool,
}

/// The bytes of an item, and how they are shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContentRow {
    /// The blob that holds the bytes.
    pub digest: Digest,
    /// The number of the bytes.
    pub bytes: u64,
    /// The content type, as whoever uploaded it said.
    pub content_type: String,
    /// The name of the file, if it was given one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// An item of the media repository: what an `mxc://` URI stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ItemRow {
    /// When the URI was made, or when the item was fetched from its server, in milliseconds since the epoch.
    pub at_ms: u64,
    /// The user of this server who made it. None for an item of another server, and for the image of a preview.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<UserNum>,
    /// The bytes. None while nobody has uploaded any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<ContentRow>,
    /// The URI ends then if nobody has uploaded anything, in milliseconds since the epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<u64>,
    /// It is the image of a preview, which nobody has uploaded here and no other server has: it is kept as long as its preview.
    #[serde(default, skip_serializing_if = "is_false")]
    pub is_preview: bool,
    /// The endpoints without authentication give it, because they gave new media when it came.
    #[serde(default, skip_serializing_if = "is_false")]
    pub is_open: bool,
    /// An operator has it given to nobody.
    #[serde(default, skip_serializing_if = "is_false")]
    pub is_quarantined: bool,
    /// An operator has it outlive what would delete it otherwise, and it cannot be quarantined.
    #[serde(default, skip_serializing_if = "is_false")]
    pub is_protected: bool,
}

fn is_false(it: &bool) -> bool {
    !*it
}

fn is_zero(it: &u32) -> bool {
    *it == 0
}

/// A thumbnail that was made of an item.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThumbnailRow {
    /// The blob that holds its bytes.
    pub digest: Digest,
    /// The number of the bytes.
    pub bytes: u64,
    /// The content type of the thumbnail.
    pub content_type: String,
}

/// A temporary link to an item.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkRow {
    /// The id by which its user names it; it opens nothing.
    pub id: String,
    /// The user who made it.
    pub user: UserNum,
    /// The server of the item.
    pub server: String,
    /// The media id of the item.
    pub media_id: String,
    /// When it was made, in milliseconds since the epoch.
    pub at_ms: u64,
    /// When it ends, in milliseconds since the epoch.
    pub expires_ms: u64,
    /// It is for one opening alone.
    #[serde(default, skip_serializing_if = "is_false")]
    pub is_once: bool,
}

/// How much media a user has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsedRow {
    /// The number of items, without those that have no bytes yet.
    pub items: u64,
    /// The number of their bytes, as if each item had its own, and of those of files that were made smaller and are kept.
    pub bytes: u64,
    /// The number of items that have no bytes yet.
    #[serde(default)]
    pub created: u64,
}

/// How much all blobs take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TotalRow {
    /// The number of blobs.
    pub blobs: u64,
    /// The number of their bytes.
    pub bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_read_as_it_is_written_and_nothing_else_is_one() {
        let digest = Digest(std::array::from_fn(|at| at as u8 * 7));
        assert_eq!(Digest::parse(&digest.to_string()), Some(digest));
        for wrong in ["", "00", &"0".repeat(63), &"0".repeat(65), &"g".repeat(64), &"é".repeat(32)] {
            assert_eq!(Digest::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_blob_of_before_there_were_buckets_lies_on_the_disk() {
        let json = r#"{"state":"live","generation":0,"bytes":7}"#;
        let row: BlobRow = serde_json::from_str(json).unwrap();
        assert_eq!((row.home, row.reserved), (Home::Disk, 0));
        assert_eq!(serde_json::to_string(&row).unwrap(), json);
    }

    #[test]
    fn rows_hold_what_is_there_and_nothing_else() {
        let json = r#"{"at_ms":1}"#;
        let row: ItemRow = serde_json::from_str(json).unwrap();
        assert_eq!(serde_json::to_string(&row).unwrap(), json);
        assert!(
            !row.is_preview
                && !row.is_open
                && !row.is_quarantined
                && !row.is_protected
                && row.content.is_none()
        );
    }
}
