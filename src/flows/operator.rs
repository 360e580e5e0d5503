//! Use cases of the operator: commands, `db check`, and explanations of events.

pub mod accounts;
pub mod check;
pub mod emails;
pub mod explain;
pub mod federation;
pub mod media;
pub mod operate;
pub mod reports;
pub mod signing_keys;
pub mod tokens;
