//! What people do in rooms.

pub(crate) mod aliases;
pub(crate) mod create;
pub mod ephemeral;
pub mod ingest;
pub(crate) mod look;
pub(crate) mod membership;
pub(crate) mod send;
