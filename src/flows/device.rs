//! Use cases of devices: people name them, and they send messages to one another.

pub mod acknowledge;
pub mod rename_device;
pub mod send_to_device;
pub mod slide;
