//! The end of one device of a notification, in a form that says what the homeserver is told.

use std::time::Duration;

/// The end that one device came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The provider took it.
    Delivered,
    /// Nothing had to be sent: the app wants no such notification, or it had this one already.
    Skipped,
    /// The provider says that the push key is gone; the homeserver is told to forget it.
    Gone,
    /// The provider will never take this notification, and takes others.
    Unfit(&'static str),
    /// This device cannot be reached with what is known of it, or must not be. The reason is told to the homeserver.
    Refused(&'static str),
    /// It may succeed later; the provider may have said when.
    Failed {
        /// The reason, for the log.
        why: &'static str,
        /// The provider asks to be left alone for this long.
        retry_after: Option<Duration>,
    },
}

impl Outcome {
    /// A failure without a time.
    pub(crate) const fn failed(why: &'static str) -> Self {
        Self::Failed { why, retry_after: None }
    }

    /// The word for it in the figures.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Skipped => "skipped",
            Self::Gone => "gone",
            Self::Unfit(_) => "unfit",
            Self::Refused(_) => "refused",
            Self::Failed { .. } => "failed",
        }
    }

    /// The reason, where there is one.
    pub(crate) const fn why(self) -> Option<&'static str> {
        match self {
            Self::Delivered | Self::Skipped | Self::Gone => None,
            Self::Unfit(why) | Self::Refused(why) | Self::Failed { why, .. } => Some(why),
        }
    }
}
