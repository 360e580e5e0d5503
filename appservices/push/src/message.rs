//! A message to one device: where it goes, which is known before anything is made of it, and what is sent there.

use bytes::Bytes;
use http::HeaderMap;

use crate::{encryption::Subscriber, outbound::Endpoint, remembered::Mark};

/// The way to a device, as its pusher names it.
pub(crate) struct Job {
    pub(crate) endpoint: Endpoint,
    /// The keys that the message is encrypted for, where there are any.
    pub(crate) subscriber: Option<Subscriber>,
    /// Stands for the device where its provider asks to leave it alone.
    pub(crate) receiver: Mark,
}

/// A message that is ready to be sent, as often as it takes. The provider's header of authorization comes when it is.
pub(crate) struct Message {
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}
