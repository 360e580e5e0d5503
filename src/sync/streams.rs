//! The streams, with one kind of news in each file. Each gives what is new in its window as typed news; shapes write
//! it.
//!
//! A stream of room news has the signature `collect(room: &RoomWindow<'_, '_>) -> Result<_, Fault>`, a stream of the
//! user's news `collect(window: &Window<'_>, changes: &Changes) -> Result<_, Fault>`.

pub(crate) mod account_data;
pub(crate) mod device_lists;
pub(crate) mod presence;
pub(crate) mod receipts;
pub(crate) mod sticky;
pub(crate) mod subscriptions;
pub(crate) mod timeline;
pub(crate) mod to_device;
pub(crate) mod typing;
pub(crate) mod unread;
