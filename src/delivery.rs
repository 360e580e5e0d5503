//! Readers of the log that tell others what happens here: other servers and push gateways. Application services will follow.

pub mod check;
pub mod gateways;
pub mod servers;
