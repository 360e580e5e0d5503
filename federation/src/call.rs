//! One request to another server: found, sent, and its answer read within bounds.
//!
//! This is the way of every request, signed or not ([API standards](https://spec.matrix.org/v1.19/server-server-api/#api-standards)).
//! A failure says who is at fault, so that callers know whether to try again.

mod places;
mod streamed;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use ruma::ServerName;

use crate::{
    call::places::{Places, Seat},
    discovery::{Discovery, Found, NotFound},
    guard::ServerList,
    json::{Answer, Json, Limits, Memory, NotRead, stream::collect},
    ports::{Body, NotSent, Ports},
};

pub use places::Lane;
pub use streamed::Streamed;

/// At most this many bytes of small answers are in memory at once.
const SMALL_ANSWERS_BYTES_MAX: usize = 32 << 20;
/// At most this many bytes of answers of medium size are in memory at once.
const MEDIUM_ANSWERS_BYTES_MAX: usize = 96 << 20;
/// At most this many bytes of small answers about keys are in memory at once, and as many of medium size; likewise of answers to
/// what is delivered. Nobody's questions take theirs.
const APART_BYTES_MAX: usize = 16 << 20;
/// At most this many large answers are in memory at once; each has at most 100 MB.
const LARGE_ANSWERS_MAX: usize = 2;
/// What another server says about its refusal is cut to this many characters where people read it.
const MESSAGE_CHARACTERS_MAX: usize = 300;
/// A code is cut to this many characters: those of the specification are shorter.
const ERRCODE_CHARACTERS_MAX: usize = 100;
/// Nobody is asked to wait longer than this, whatever the other server says.
const RETRY_AFTER_MS_MAX: u64 = 3_600_000;

/// The name by which other servers know the program that asks.
const AGENT: &str = concat!("Aqueduct/", env!("CARGO_PKG_VERSION"));

/// How long a request may take, and how large its answer may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The answer begins within this time, connecting included.
    pub begins: Duration,
    /// The whole request takes at most this long, with finding the server and waiting for a place; the latter half of it at most.
    pub overall: Duration,
    /// The bounds of the answer.
    pub limits: Limits,
    /// The places it counts for.
    pub lane: Lane,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            begins: Duration::from_secs(30),
            overall: Duration::from_secs(60),
            limits: Limits::JSON,
            lane: Lane::Requests,
        }
    }
}

impl Options {
    /// For an answer with the whole state of a room: the other server may need minutes to gather it.
    pub fn whole_state() -> Self {
        let (begins, overall) = (Duration::from_secs(300), Duration::from_secs(600));
        Self { begins, overall, limits: Limits::WHOLE_STATE, ..Self::default() }
    }

    /// For keys, which others wait for.
    pub(crate) const fn keys() -> Self {
        Self {
            begins: Duration::from_secs(10),
            overall: Duration::from_secs(20),
            limits: Limits::DOCUMENT,
            lane: Lane::Keys,
        }
    }
}

/// A request that did not succeed, by who is at fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Our own settings forbid to talk with this server.
    #[error("federation.allow and federation.deny do not let this server talk with {server}")]
    NotAllowed {
        /// The other server.
        server: String,
    },
    /// The server cannot be found.
    #[error(transparent)]
    NotFound(#[from] NotFound),
    /// It was found, and cannot be reached.
    #[error("{0}")]
    Unreachable(NotSent),
    /// It did not answer in time.
    #[error("the server did not answer in time")]
    TimedOut,
    /// It answered, and refused.
    #[error("the server refused with {status} {}: {message}", errcode.as_deref().unwrap_or("without a code"))]
    Refused {
        /// The status.
        status: StatusCode,
        /// Matrix's code, if there was one.
        errcode: Option<String>,
        /// What it said, cut.
        message: String,
        /// It asks us to wait this long.
        retry_after_ms: Option<u64>,
        /// The body, for codes that come with more; empty if it was too large or no JSON.
        body: Bytes,
    },
    /// What it answered makes no sense, or is larger than it may be.
    #[error("the server answered nonsense: {0}")]
    Nonsense(String),
    /// We are at fault: the request could not be made.
    #[error("the request cannot be made: {0}")]
    BadRequest(String),
    /// We have too much to do: nothing was sent, or there is no memory for the answer.
    #[error("too many requests to other servers wait already")]
    Busy,
}

impl Failure {
    /// Whether the same request may succeed later without anybody changing anything about it.
    pub const fn is_temporary(&self) -> bool {
        match self {
            Self::NotFound(_) | Self::Unreachable(_) | Self::TimedOut | Self::Nonsense(_) | Self::Busy => {
                true
            }
            Self::Refused { status, .. } => {
                matches!(status.as_u16(), 408 | 429 | 500..=599)
            }
            Self::NotAllowed { .. } | Self::BadRequest(_) => false,
        }
    }
}

/// An answer with a status of success.
#[derive(Debug)]
pub struct Reply {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The whole body.
    pub answer: Answer,
}

/// Sends requests to other servers. Cheap to clone.
#[derive(Clone)]
pub struct Caller(Arc<Inner>);

struct Inner {
    ports: Ports,
    discovery: Discovery,
    servers: ServerList,
    memory: Memory,
    memory_of_keys: Memory,
    memory_of_deliveries: Memory,
    places: Arc<Places>,
}

impl Caller {
    /// Sends requests to those servers that the list allows.
    pub fn new(ports: Ports, discovery: Discovery, servers: ServerList) -> Self {
        let memory = Memory::new(SMALL_ANSWERS_BYTES_MAX, MEDIUM_ANSWERS_BYTES_MAX, LARGE_ANSWERS_MAX);
        let apart = || Memory::new(APART_BYTES_MAX, APART_BYTES_MAX, 1);
        Self(Arc::new(Inner {
            ports,
            discovery,
            servers,
            memory,
            memory_of_keys: apart(),
            memory_of_deliveries: apart(),
            places: Arc::new(Places::default()),
        }))
    }

    /// The ports it uses.
    pub fn ports(&self) -> &Ports {
        &self.0.ports
    }

    /// Finds servers.
    pub fn discovery(&self) -> &Discovery {
        &self.0.discovery
    }

    /// The servers we talk with.
    pub fn servers(&self) -> &ServerList {
        &self.0.servers
    }

    /// Sends one request, whose URI is path and query alone, and reads the whole answer. Errors: [`Failure`]; every status
    /// but 2xx is one.
    pub async fn call(
        &self,
        server: &ServerName,
        request: Request<Bytes>,
        options: Options,
    ) -> Result<Reply, Failure> {
        let calling = async {
            let (seat, response) = self.send_seated(server, request, options).await?;
            let reply = self.read(response, options).await;
            drop(seat);
            reply
        };
        tokio::time::timeout(options.overall, calling).await.map_err(|_| Failure::TimedOut)?
    }

    /// Sends one request from a place, once there is one, and gives both.
    async fn send_seated(
        &self,
        server: &ServerName,
        request: Request<Bytes>,
        options: Options,
    ) -> Result<(Seat, Response<Body>), Failure> {
        if !self.0.servers.allows(server) {
            return Err(Failure::NotAllowed { server: server.to_string() });
        }
        // Whoever has a place has half of the time left, so that running out of it says something of the server.
        let payer = self.0.ports.payers.current();
        let seat = self.0.places.take(server, options.lane, payer);
        let seat = tokio::time::timeout(options.overall / 2, seat).await;
        let seat = seat.ok().flatten().ok_or(Failure::Busy)?;
        let found = self.0.discovery.find(server).await?;
        let response = self.send(server, &found, request, options).await?;
        Ok((seat, response))
    }

    async fn send(
        &self,
        server: &ServerName,
        found: &Found,
        mut request: Request<Bytes>,
        options: Options,
    ) -> Result<Response<Body>, Failure> {
        request.headers_mut().entry(header::USER_AGENT).or_insert(HeaderValue::from_static(AGENT));
        let sending = self.0.ports.transport.send(found.target.clone(), request);
        let sent = tokio::time::timeout(options.begins, sending).await;
        sent.map_err(|_| Failure::TimedOut)?.map_err(|error| {
            match error {
                // The server may have moved since it was found.
                NotSent::Unreachable(_) | NotSent::Certificate(_) | NotSent::TimedOut => {
                    self.0.discovery.doubt(server, found);
                }
                NotSent::Broken(_) => {}
            }
            Failure::Unreachable(error)
        })
    }

    async fn read(&self, response: Response<Body>, options: Options) -> Result<Reply, Failure> {
        let (head, body) = response.into_parts();
        let memory = match options.lane {
            Lane::Keys => &self.0.memory_of_keys,
            Lane::Deliveries => &self.0.memory_of_deliveries,
            Lane::Requests | Lane::Devices | Lane::Fetches | Lane::Signatures | Lane::Media => &self.0.memory,
        };
        let memory = &memory.paid_by(self.0.ports.payers.current());
        if head.status.is_success() {
            let answer = collect(body, options.limits, memory).await.map_err(not_read)?;
            return Ok(Reply { status: head.status, headers: head.headers, answer });
        }
        if !head.status.is_client_error() && !head.status.is_server_error() {
            return Err(Failure::Nonsense(format!("status {}", head.status.as_u16())));
        }
        // The status alone says that it refused, whatever comes of the body.
        let body = collect(body, Limits::DOCUMENT, memory).await;
        let body = body.map(|answer| answer.bytes().clone()).unwrap_or_default();
        Err(refused(head.status, &head.headers, body))
    }
}

fn not_read(error: NotRead) -> Failure {
    match error {
        NotRead::TooLarge(exceeded) => Failure::Nonsense(format!("the answer is too large: {exceeded}")),
        NotRead::Broken(error) => Failure::Unreachable(error),
        NotRead::Stalled => Failure::TimedOut,
        NotRead::NoMemory => Failure::Busy,
    }
}

/// What a refusal says. Its text comes from the other server, so it is cut, and cleared of what would disturb a log.
fn refused(status: StatusCode, headers: &HeaderMap, body: Bytes) -> Failure {
    let json = Json::parse(&body).ok();
    let field = |name: &str| json.as_ref().and_then(|it| it.field(name));
    let text = |name: &str, characters_max: usize| {
        let text = field(name)?.as_text()?;
        Some(text.chars().filter(|it| !it.is_control()).take(characters_max).collect::<String>())
    };
    let header_ms = || {
        let seconds: u64 = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
        Some(seconds.saturating_mul(1000))
    };
    let retry_after_ms = header_ms().or_else(|| field("retry_after_ms")?.as_ms());
    let errcode = text("errcode", ERRCODE_CHARACTERS_MAX);
    let message = text("error", MESSAGE_CHARACTERS_MAX).unwrap_or_default();
    let body = if json.is_some() { body } else { Bytes::new() };
    let retry_after_ms = retry_after_ms.map(|it| it.min(RETRY_AFTER_MS_MAX));
    Failure::Refused { status, errcode, message, retry_after_ms, body }
}
