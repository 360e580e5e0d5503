//! The server's side of end-to-end encryption: keys, device lists and messages between devices. Nothing here can read the
//! messages that it carries.

pub mod backup;
pub mod check;
pub mod cross_signing;
pub mod device_lists;
pub mod elsewhere;
pub mod inbox;
pub mod incarnation;
pub mod keys;
pub mod signatures;
pub mod to_device;
pub mod uploads;
