//! The server's side of end-to-end encryption. Plain functions; nothing here can read what it carries.

pub mod check;
pub mod device_lists;
pub mod inbox;
pub mod incarnation;
pub mod keys;
pub mod to_device;
