//! Each route says its policy: who may call it, how often, whether guests may, and how its body is read.
//!
//! It stands beside the handler: `r.client(create_room).limit(Limit::Membership).body(Body::Json(MIB))`. `docs/endpoints.md`
//! prints all of it.

use std::fmt;

use crate::flows::limits::Limit;

/// 1,024 bytes.
pub const KIB: usize = 1 << 10;
/// 1,048,576 bytes.
pub const MIB: usize = 1 << 20;

/// Who may call an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// Everybody; a token is not looked at.
    Public,
    /// Everybody; but a token that is there must be valid.
    MaybeClient,
    /// Clients that bring an access token of an account.
    Client,
    /// A client whose account administers this server.
    Admin,
    /// An application service with its own token.
    Appservice,
    /// Another server, which signs its request.
    Server,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Public => "everybody",
            Self::MaybeClient => "client or nobody",
            Self::Client => "client",
            Self::Admin => "admin",
            Self::Appservice => "application service",
            Self::Server => "server",
        })
    }
}

/// Whether guests may call an endpoint (client-server API, "Guest Access").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guests {
    /// Guests may call it.
    Yes,
    /// Guests get 403 `M_GUEST_ACCESS_FORBIDDEN`.
    No,
}

/// How the body of a request is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// It is not: what is sent is thrown away.
    None,
    /// As one JSON object of at most this many bytes, checked before the handler sees it.
    Json(usize),
    /// As at most this many bytes of any kind, all in memory.
    Raw(usize),
    /// By the handler, part by part; no more bytes than this.
    Streamed(usize),
}

impl Body {
    /// The bound of a route that names none.
    pub const JSON: Self = Self::Json(64 * KIB);

    /// The most bytes that are taken into memory at once.
    pub fn in_memory_max(self) -> usize {
        match self {
            Self::None | Self::Streamed(_) => 0,
            Self::Json(bytes_max) | Self::Raw(bytes_max) => bytes_max,
        }
    }
}

impl fmt::Display for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, bytes_max) = match *self {
            Self::None => return f.write_str("none"),
            Self::Json(bytes_max) => ("JSON", bytes_max),
            Self::Raw(bytes_max) => ("raw", bytes_max),
            Self::Streamed(bytes_max) => ("streamed", bytes_max),
        };
        match bytes_max {
            whole if whole.is_multiple_of(MIB) => write!(f, "{kind}, {} MiB", whole / MIB),
            other => write!(f, "{kind}, {} KiB", other / KIB),
        }
    }
}

/// The rules that hold for one route before its handler is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Who may call it.
    pub who: Who,
    /// Which limit counts it; a test refuses a route that names none and does not say so.
    pub limit: Option<Limit>,
    /// It says that it needs no limit.
    pub is_unlimited: bool,
    /// Whether guests may call it.
    pub guests: Guests,
    /// How its body is read.
    pub body: Body,
    /// It waits on purpose: only the time in which it works makes it slow.
    pub is_long_poll: bool,
}

impl Policy {
    /// For guests forbidden, and with a body of the common bound if the method has one.
    pub(crate) fn new(who: Who, method: &http::Method) -> Self {
        let has_body = *method != http::Method::GET;
        let body = if has_body { Body::JSON } else { Body::None };
        Self { who, limit: None, is_unlimited: false, guests: Guests::No, body, is_long_poll: false }
    }

    /// Counts each request with this limit.
    pub(crate) fn limit(&mut self, limit: Limit) -> &mut Self {
        self.limit = Some(limit);
        self
    }

    /// Counts nothing: the answer costs as little as a refusal.
    pub(crate) fn unlimited(&mut self) -> &mut Self {
        self.is_unlimited = true;
        self
    }

    /// Says whether guests may call it.
    pub(crate) fn guests(&mut self, guests: Guests) -> &mut Self {
        self.guests = guests;
        self
    }

    /// Reads the body in this way.
    pub(crate) fn body(&mut self, body: Body) -> &mut Self {
        self.body = body;
        self
    }

    /// Waits on purpose for news.
    pub(crate) fn long_poll(&mut self) -> &mut Self {
        self.is_long_poll = true;
        self
    }
}
