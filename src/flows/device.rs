//! Use cases of devices: people name them, leave them behind dehydrated, and they send messages to one another.

pub mod acknowledge;
pub(crate) mod dehydrate;
pub mod rename_device;
pub mod send_to_device;
pub mod slide;
