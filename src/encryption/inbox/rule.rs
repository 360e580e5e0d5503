//! The rule by which an inbox takes a message or refuses it.

use super::NoRoom;
use crate::schema::encryption::{InboxShare, InboxState};

/// One sender may fill at most one part in this many of what the others have left free. With 8, it takes about 60 senders who
/// all do what they can until there is no place for one more room key.
pub(super) const SENDERS_PART: u64 = 8;
/// The part of an inbox that a server may fill, in a hundred of what others have left free of what it may use at all. Its users
/// have only the parts of senders, of which a server can invent as many as it likes.
const SHARING_SERVERS_PERCENT: u64 = 50;
/// The same for a server of whose users nobody shares a room with the user.
const STRANGE_SERVERS_PERCENT: u64 = 25;

/// How near the server that sends a message is to the user who gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nearness {
    /// A user of this server sends it.
    Own,
    /// The server has users in a room with the user.
    Sharing,
    /// The server shares no room with the user.
    Stranger,
}

impl Nearness {
    /// How full an inbox may become by messages from there, in eighths: strangers shut nobody out who is nearer.
    fn eighths(self) -> u64 {
        match self {
            Self::Own => 8,
            Self::Sharing => 7,
            Self::Stranger => 4,
        }
    }

    /// The part of the rest that one server may fill, in a hundred. This server is held to its senders' parts alone.
    fn servers_percent(self) -> Option<u64> {
        match self {
            Self::Own => None,
            Self::Sharing => Some(SHARING_SERVERS_PERCENT),
            Self::Stranger => Some(STRANGE_SERVERS_PERCENT),
        }
    }
}

/// The most messages and bytes that an inbox, or a part of it, may hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) messages: u64,
    pub(super) bytes: u64,
}

/// The messages that wait in an inbox: all of them, and the parts of the sender of a message and of its server.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Filled {
    pub(super) state: InboxState,
    pub(super) sender: InboxShare,
    pub(super) server: InboxShare,
}

/// The bounds that one message must keep to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    pub(super) bounds: Bounds,
    servers_percent: Option<u64>,
}

impl Bounds {
    pub(super) fn have_room_for(&self, messages: u64, bytes: u64) -> bool {
        messages <= self.messages && bytes <= self.bytes
    }

    /// The part of an inbox that others leave free.
    fn beside(&self, state: &InboxState, share: &InboxShare) -> Self {
        let messages = state.messages.saturating_sub(share.messages);
        let bytes = state.bytes.saturating_sub(share.bytes);
        Self { messages: self.messages.saturating_sub(messages), bytes: self.bytes.saturating_sub(bytes) }
    }

    fn map(self, part: impl Fn(u64) -> u64) -> Self {
        Self { messages: part(self.messages), bytes: part(self.bytes) }
    }

    /// How much of an inbox this part is, in millionths of what fills it first.
    pub(super) fn weight(&self, share: &InboxShare) -> u64 {
        let of = |part: u64, all: u64| part.saturating_mul(1_000_000) / all.max(1);
        of(share.messages, self.messages).max(of(share.bytes, self.bytes))
    }
}

impl Rule {
    pub(super) fn of(bounds: Bounds, nearness: Nearness) -> Self {
        let bounds = bounds.map(|all| all / 8 * nearness.eighths() + all % 8 * nearness.eighths() / 8);
        Self { bounds, servers_percent: nearness.servers_percent() }
    }

    /// Whether one message more, of this size, fits into its sender's part.
    pub(super) fn fits_sender(&self, state: &InboxState, share: &InboxShare, size: u64) -> bool {
        let part = self.bounds.beside(state, share).map(|free| free.div_ceil(SENDERS_PART));
        part.have_room_for(share.messages.saturating_add(1), share.bytes.saturating_add(size))
    }

    /// Whether one message more, of this size, fits into its server's part.
    fn fits_server(&self, filled: &Filled, size: u64) -> bool {
        let Some(percent) = self.servers_percent else { return true };
        let share = &filled.server;
        let part =
            self.bounds.beside(&filled.state, share).map(|free| free.saturating_mul(percent).div_ceil(100));
        part.have_room_for(share.messages.saturating_add(1), share.bytes.saturating_add(size))
    }

    /// The reason why one message more, of this size, is not taken, if there is one.
    pub(super) fn refuse(&self, filled: &Filled, size: u64) -> Option<NoRoom> {
        let Filled { state, sender, .. } = filled;
        let bounds = &self.bounds;
        if !bounds.have_room_for(state.messages.saturating_add(1), state.bytes.saturating_add(size)) {
            Some(NoRoom::InboxFull)
        } else if !self.fits_sender(state, sender, size) {
            Some(NoRoom::SenderQuota)
        } else if !self.fits_server(filled, size) {
            Some(NoRoom::ServerQuota)
        } else {
            None
        }
    }
}

impl Filled {
    /// The rest when a message has gone, which was or was not the sender's, and of its server.
    pub(super) fn without(mut self, size: u64, is_senders: bool, is_servers: bool) -> Self {
        let less = |share: &mut InboxShare| {
            share.messages = share.messages.saturating_sub(1);
            share.bytes = share.bytes.saturating_sub(size);
        };
        self.state.messages = self.state.messages.saturating_sub(1);
        self.state.bytes = self.state.bytes.saturating_sub(size);
        if is_senders {
            less(&mut self.sender);
        }
        if is_servers {
            less(&mut self.server);
        }
        self
    }
}
