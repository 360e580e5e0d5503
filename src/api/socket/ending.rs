//! Why a socket ends: the codes of `docs/socket.md`.

/// The reason for which a socket ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// The connection is gone, so that no code can be sent.
    Gone,
    /// The client has closed the socket.
    Closed,
    /// The client broke the protocol of WebSockets.
    Protocol,
    /// A binary message came, and all messages here are text.
    Binary,
    /// A text came that is no UTF-8.
    NotText,
    /// The client sends too many pieces that say nothing.
    Flood,
    /// A message was larger than messages may be.
    TooLarge,
    /// The server has a fault.
    Failed,
    /// The server stops, and clients come back later.
    Stopping,
    /// A newer socket of the device took the place.
    Replaced,
    /// The session has ended.
    LoggedOut,
    /// The access token has expired or was refreshed away.
    Expired,
    /// The account was deactivated.
    Deactivated,
    /// The account is locked.
    Locked,
    /// The client reads or sends too slowly.
    Slow,
    /// The client answers no pings.
    Silent,
}

impl Ending {
    /// The code of the close frame. None where no frame can be sent.
    pub(super) fn code(self) -> Option<u16> {
        Some(match self {
            Self::Gone => return None,
            Self::Closed => 1000,
            Self::Protocol => 1002,
            Self::Binary => 1003,
            Self::NotText => 1007,
            Self::Flood => 1008,
            Self::TooLarge => 1009,
            Self::Failed => 1011,
            Self::Stopping => 1012,
            Self::Replaced => 4000,
            Self::LoggedOut => 4001,
            Self::Expired => 4002,
            Self::Deactivated => 4003,
            Self::Locked => 4004,
            Self::Slow => 4008,
            Self::Silent => 4009,
        })
    }

    /// A sentence for a person, which the close frame carries.
    pub(super) fn why(self) -> &'static str {
        match self {
            Self::Gone => "The connection is gone.",
            Self::Closed => "",
            Self::Protocol => "A frame does not follow the protocol of WebSockets.",
            Self::Binary => "A message must be text.",
            Self::NotText => "A text is not valid UTF-8.",
            Self::Flood => "Too many frames say nothing.",
            Self::TooLarge => "A message has more than 65,536 bytes; send it over HTTP.",
            Self::Failed => "The server failed.",
            Self::Stopping => "The server stops; come back.",
            Self::Replaced => "A newer socket of this device took the place.",
            Self::LoggedOut => "The session has ended.",
            Self::Expired => "The access token has expired; refresh it.",
            Self::Deactivated => "The account was deactivated.",
            Self::Locked => "The account is locked.",
            Self::Slow => "The client is too slow; go on from the last position.",
            Self::Silent => "The client answers no pings.",
        }
    }
}
