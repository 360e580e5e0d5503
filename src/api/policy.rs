//! The policy of a route says who may call it, how often, whether guests may, and how its body is read.
//!
//! A policy stands beside the handler: `r.client(create_room).limit(Limit::Membership).body(Body::Json(MIB))`.
//! `docs/endpoints.md` lists all of them.

use std::fmt;

use ruma::UserId;

use crate::flows::limits::Limit;

/// The bytes of a kibibyte: 1,024.
pub const KIB: usize = 1 << 10;
/// The bytes of a mebibyte: 1,048,576.
pub const MIB: usize = 1 << 20;

/// Who may call an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// Everybody may call it, and a token is not looked at.
    Public,
    /// Everybody may call it, but a token that is sent must be valid.
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

/// Whether suspended accounts may call an endpoint (client-server API, "Account suspension").
///
/// A suspended account reads, leaves, takes back what it said and sees to its own devices and settings, and does nothing that others
/// see. So an endpoint whose effect reaches others says [`Suspended::No`], and one that reaches others for some requests alone has them
/// looked at.
#[derive(Debug, Clone, Copy)]
pub enum Suspended {
    /// Suspended accounts may call it.
    Yes,
    /// Suspended accounts get 403 `M_USER_SUSPENDED`.
    No,
    /// Suspended accounts get 403 `M_USER_SUSPENDED` unless this answers `true` for what they ask.
    If(fn(&Wish<'_>) -> bool),
}

/// The wish of a suspended account, once the request is read.
#[derive(Debug, Clone, Copy)]
pub struct Wish<'a> {
    /// The account that asks.
    pub user_id: &'a UserId,
    /// The parameters of the path, decoded.
    pub path: &'a [String],
    /// The body: a JSON object, or nothing.
    pub body: &'a [u8],
}

/// How the body of a request is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// The body is not read; what is sent is thrown away.
    None,
    /// The body is one JSON object of at most this many bytes, checked before the handler sees it.
    Json(usize),
    /// The body is any bytes, at most this many, and is taken into memory whole.
    Raw(usize),
    /// The handler receives the body part by part, at most this many bytes.
    Streamed(usize),
}

impl Body {
    /// The body of a route that says nothing of it.
    pub const JSON: Self = Self::Json(64 * KIB);

    /// The most bytes of the body that are taken into memory at once.
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
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// The kind of caller that may call the route.
    pub who: Who,
    /// The limit that counts each request. A test refuses a route that has none unless it is declared unlimited.
    pub limit: Option<Limit>,
    /// The route is declared to need no limit.
    pub is_unlimited: bool,
    /// Whether guests may call the route.
    pub guests: Guests,
    /// Whether suspended accounts may call the route. Where that depends on rows of the store, its flow decides.
    pub suspended: Suspended,
    /// Whether locked accounts may call the route. They can only log out.
    pub is_for_locked: bool,
    /// How the body of a request is read.
    pub body: Body,
    /// The route waits on purpose, so that only the time in which it works makes it slow.
    pub is_long_poll: bool,
}

impl Policy {
    /// Begins with guests forbidden, with no limit, and with a JSON body of the common bound if the method has a body.
    pub(crate) fn new(who: Who, method: &http::Method) -> Self {
        let has_body = *method != http::Method::GET;
        let body = if has_body { Body::JSON } else { Body::None };
        // A suspended admin moderates nobody.
        let suspended = if who == Who::Admin { Suspended::No } else { Suspended::Yes };
        Self {
            who,
            limit: None,
            is_unlimited: false,
            guests: Guests::No,
            suspended,
            is_for_locked: false,
            body,
            is_long_poll: false,
        }
    }

    /// Counts each request with this limit.
    pub(crate) fn limit(&mut self, limit: Limit) -> &mut Self {
        self.limit = Some(limit);
        self
    }

    /// Declares that no limit is needed, because the answer costs as little as a refusal.
    pub(crate) fn unlimited(&mut self) -> &mut Self {
        self.is_unlimited = true;
        self
    }

    /// Says whether guests may call the route.
    pub(crate) fn guests(&mut self, guests: Guests) -> &mut Self {
        self.guests = guests;
        self
    }

    /// Refuses suspended accounts, because the route does what others see.
    pub(crate) fn not_suspended(&mut self) -> &mut Self {
        self.suspended = Suspended::No;
        self
    }

    /// Refuses suspended accounts unless this answers `true` for what they ask.
    pub(crate) fn suspended_if(&mut self, may: fn(&Wish<'_>) -> bool) -> &mut Self {
        self.suspended = Suspended::If(may);
        self
    }

    /// Lets locked accounts call the route.
    pub(crate) fn also_locked(&mut self) -> &mut Self {
        self.is_for_locked = true;
        self
    }

    /// Says how the body of a request is read.
    pub(crate) fn body(&mut self, body: Body) -> &mut Self {
        self.body = body;
        self
    }

    /// Declares that the route waits on purpose for news.
    pub(crate) fn long_poll(&mut self) -> &mut Self {
        self.is_long_poll = true;
        self
    }
}
