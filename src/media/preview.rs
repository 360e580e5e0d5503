//! The preview of a URL: what its page says about itself, as far as it is told to clients
//! ([specification](https://spec.matrix.org/v1.19/client-server-api/#get_matrixclientv1mediapreview_url)).
//!
//! Everything here is plain: bytes that came from a page go in, and a bounded description comes out. Pages are anybody's, so nothing
//! may cost more than its bytes do: HTML is read as a stream of tags and never becomes a tree (`docs/decisions/pages-are-read-as-tags.md`),
//! each text has a bound, and what is kept of a page does not grow with it. Fetching is `flows/media/preview.rs`.

pub mod address;
pub mod charset;
pub mod check;
pub mod choose;
pub mod image;
pub mod kept;
pub mod oembed;
pub mod page;
pub mod rows;
mod tags;
mod text;
