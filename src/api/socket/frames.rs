//! The frames of a WebSocket ([RFC 6455, section 5](https://www.rfc-editor.org/rfc/rfc6455#section-5)), as a server reads and
//! writes them. `docs/decisions/frames-of-our-own.md` says why they are not left to a library.
//!
//! Nothing is allocated for a socket on which nothing happens: bytes are read by way of the stack, and what was read or
//! written is freed at once.

pub(super) mod reader;
pub(super) mod writer;

/// A message of a client has at most this many bytes over all of its frames, as an event has. The server's frames have at most
/// as many, too.
pub(super) const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// A control frame has at most this many bytes (RFC 6455, section 5.5).
const CONTROL_BYTES_MAX: usize = 125;

/// The kinds of frames that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Opcode {
    /// The frame goes on with the message of the frames before it.
    Continuation,
    /// The frame begins a message of text.
    Text,
    /// The frame begins a message of bytes.
    Binary,
    /// The frame ends the socket, perhaps with a code and a reason.
    Close,
    /// The frame asks for a pong with the same bytes.
    Ping,
    /// The frame answers a ping, or says of itself that its sender is there.
    Pong,
}

impl Opcode {
    /// The kind that this number stands for. None for numbers that stand for nothing.
    fn of(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::Continuation,
            1 => Self::Text,
            2 => Self::Binary,
            8 => Self::Close,
            9 => Self::Ping,
            10 => Self::Pong,
            _ => return None,
        })
    }

    /// The number that stands for the kind.
    fn number(self) -> u8 {
        match self {
            Self::Continuation => 0,
            Self::Text => 1,
            Self::Binary => 2,
            Self::Close => 8,
            Self::Ping => 9,
            Self::Pong => 10,
        }
    }

    fn is_control(self) -> bool {
        match self {
            Self::Close | Self::Ping | Self::Pong => true,
            Self::Continuation | Self::Text | Self::Binary => false,
        }
    }
}
