//! What people do with a device of theirs, and what devices send one another.

pub mod acknowledge;
pub mod rename_device;
pub mod send_to_device;
