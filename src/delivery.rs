//! Readers of the log that tell others what happens here: other servers, push gateways and, by e-mail, users who are away. Application services will follow.

pub mod check;
pub mod gateways;
pub mod mail;
pub mod servers;
