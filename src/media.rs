//! The media repository: what an item is, what its bytes are kept in, and how they are shown. These are plain functions over a
//! snapshot or a batch, and over the disk; `flows/media/` waits.
//!
//! An *item* is what an `mxc://` URI stands for (`items.rs`). Its bytes are a *blob*, named by their SHA-256, so that they are stored
//! once, however many items have them (`objects.rs`). The blob's *object* is where the bytes lie (`blobs.rs`).
//!
//! Specification: client-server API, "Content repository".

pub mod blobs;
pub mod check;
pub mod items;
pub mod kinds;
pub mod links;
pub mod multipart;
pub mod objects;
pub mod presign;
pub mod preview;
pub mod range;
pub mod thumbnails;

/// A media id has at most this many characters; those that are made here have fewer.
pub const ID_CHARS_MAX: usize = 255;

/// The name of an item: the two parts of its `mxc://` URI.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    /// The server to which the item was uploaded.
    pub server: String,
    /// The media id, which that server made.
    pub id: String,
}

impl Name {
    /// The name of an item of a server. None where the id has characters that no media id may have, or is too long: such an id could
    /// lead anywhere in a path.
    pub fn of(server: &str, id: &str) -> Option<Self> {
        is_id(id).then(|| Self { server: server.to_owned(), id: id.to_owned() })
    }

    /// The URI of the item.
    pub fn uri(&self) -> String {
        format!("mxc://{}/{}", self.server, self.id)
    }

    /// Reads a URI. None where it is not the URI of an item.
    pub fn of_uri(uri: &str) -> Option<Self> {
        let (server, id) = uri.strip_prefix("mxc://")?.split_once('/')?;
        let server = <&ruma::ServerName>::try_from(server).ok()?;
        Self::of(server.as_str(), id)
    }

    /// The key of its row.
    pub fn key(&self) -> (&str, &str) {
        (&self.server, &self.id)
    }
}

/// Whether a text may be a media id: letters, digits, `_` and `-` alone (client-server API, "Matrix Content URIs").
pub fn is_id(text: &str) -> bool {
    let is_allowed = |it: u8| it.is_ascii_alphanumeric() || it == b'_' || it == b'-';
    (1..=ID_CHARS_MAX).contains(&text.len()) && text.bytes().all(is_allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_leads_nowhere() {
        let long = "a".repeat(ID_CHARS_MAX + 1);
        for wrong in ["", ".", "..", "a/b", "a\\b", "a%2e", "a\0", "é", "a b", "a.b", &long] {
            assert!(Name::of("a.example", wrong).is_none(), "{wrong:?}");
        }
        for right in ["a", "A-_9", &long[1..]] {
            assert!(Name::of("a.example", right).is_some(), "{right:?}");
        }
    }

    #[test]
    fn uris_are_read_as_they_are_written() {
        let name = Name::of("a.example:8448", "Id-_1").unwrap();
        assert_eq!(name.uri(), "mxc://a.example:8448/Id-_1");
        assert_eq!(Name::of_uri(&name.uri()), Some(name));
        for wrong in ["mxc://a.example", "mxc://a.example/", "mxc:///x", "https://a.example/x", "mxc://a/b/c"]
        {
            assert_eq!(Name::of_uri(wrong), None, "{wrong}");
        }
    }
}
