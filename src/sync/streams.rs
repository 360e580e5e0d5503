//! The streams: one kind of news a file. Each says what is new for the window it is given, as typed news; shapes write it.
//!
//! News of a room has the signature `collect(room: &RoomWindow<'_, '_>) -> Result<_, Fault>`, news of the user
//! `collect(window: &Window<'_>, changes: &Changes) -> Result<_, Fault>`.

pub(crate) mod account_data;
pub(crate) mod device_lists;
pub(crate) mod presence;
pub(crate) mod receipts;
pub(crate) mod timeline;
pub(crate) mod to_device;
pub(crate) mod typing;
pub(crate) mod unread;
