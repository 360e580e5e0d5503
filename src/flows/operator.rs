//! What the operator asks of the server.

pub mod check;
pub mod explain;
pub mod operate;
