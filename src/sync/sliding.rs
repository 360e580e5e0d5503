//! Simplified sliding sync (MSC4186): a client watches lists of its rooms, and is told of those that stand in a range.
//!
//! `ask` is the request, `lists` chooses the rooms of an answer, `look` tells each from a place of its own and `extensions` what
//! stands beside them. What the client was told of each room is kept by `sync/connections.rs`.

pub mod ask;
mod extensions;
pub(crate) mod facts;
mod lists;
pub(crate) mod look;
mod sticky;
