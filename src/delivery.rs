//! Readers of the log that tell others what happens here: other servers. Application services and push gateways will follow.

pub mod check;
pub mod servers;
