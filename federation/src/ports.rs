//! What this crate needs from outside, as traits: clock, randomness, tasks, DNS, HTTPS and a durable cache of keys.
//!
//! Nothing here reads the clock, draws a number, opens a socket or starts a task by another way. So whole servers run in one
//! process over a simulated network (`testing`), repeatably from a seed. Waiting is tokio's, whose clock can be paused.

use std::{
    fmt,
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, future::BoxFuture, stream::BoxStream};
use ruma::{OwnedServerSigningKeyId, ServerName, ServerSigningKeyId};
use serde::{Deserialize, Serialize};

use crate::guard::Admitted;

/// The wall clock. It may go back.
pub trait Clock: Send + Sync + 'static {
    /// Now, in milliseconds since the epoch.
    fn now_ms(&self) -> u64;
}

/// Randomness for choices and jitter, not for secrets.
pub trait Randomness: Send + Sync + 'static {
    /// A number below the bound; 0 for a bound of 0.
    fn below(&self, bound: u64) -> u64;
}

/// Says for whom the current task works, so that what all share is shared out among them.
pub trait Payers: Send + Sync + 'static {
    /// A number that stands for them; `None` for work of the server itself, which has no share.
    fn current(&self) -> Option<u64>;
}

/// Starts tasks; only the real transport needs some, to drive its connections.
pub trait Tasks: Send + Sync + 'static {
    /// Starts a task that runs until it ends or the server stops.
    fn spawn(&self, task: BoxFuture<'static, ()>);
}

/// The addresses of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Addresses of both families, in the order of the answer. They are not guarded yet.
    pub addresses: Vec<IpAddr>,
    /// The answer may be used for this many seconds.
    pub ttl_s: u32,
    /// Whether the name was an alias (CNAME) of another one.
    pub is_alias: bool,
}

/// One SRV record ([RFC 2782](https://www.rfc-editor.org/rfc/rfc2782.html)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Records with the lowest number are tried first.
    pub priority: u16,
    /// The share among records of one priority.
    pub weight: u16,
    /// The port of the service.
    pub port: u16,
    /// The host without a dot at its end; empty for the root, which says that there is no such service.
    pub host: String,
}

/// The SRV records of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Services {
    /// The records, in the order of the answer.
    pub services: Vec<Service>,
    /// The answer may be used for this many seconds.
    pub ttl_s: u32,
}

/// A name that was not resolved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotResolved {
    /// DNS says that there is no such name, or nothing of this kind under it.
    #[error("there is no such name")]
    Absent {
        /// This may be believed for this many seconds.
        ttl_s: u32,
    },
    /// DNS gave no answer that can be used; it may later.
    #[error("DNS failed: {0}")]
    Failed(String),
}

/// DNS. Names are given without a dot at the end and are absolute: search domains do not count.
pub trait Resolver: Send + Sync + 'static {
    /// The addresses of a host, through CNAME, AAAA and A records.
    fn addresses<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Addresses, NotResolved>>;

    /// The SRV records of a name such as `_matrix-fed._tcp.example.org`.
    fn services<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Services, NotResolved>>;
}

/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// One of these addresses, tried in their order.
    Addresses(Admitted),
    /// One of these hosts and ports, which a forward proxy resolves and guards.
    Names(Vec<(String, u16)>),
}

/// Where a request goes, and as what the other side must prove itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// Where to connect to.
    pub place: Place,
    /// The certificate must be valid for this DNS name or IP address (without brackets). None: the connection has no TLS, which
    /// is for pages of the web alone ([`crate::web`]); servers are always reached with it.
    pub tls_name: Option<String>,
    /// The `Host` header, or `:authority` of HTTP/2: a host, and the port where the server's name has one.
    pub host_header: String,
}

/// A request that got no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotSent {
    /// No address could be connected to.
    #[error("cannot connect: {0}")]
    Unreachable(String),
    /// The other side does not prove that it is who it should be.
    #[error("the certificate is not accepted: {0}")]
    Certificate(String),
    /// Connecting took too long.
    #[error("connecting took too long")]
    TimedOut,
    /// The connection broke, or what came was no HTTP.
    #[error("the connection broke: {0}")]
    Broken(String),
}

/// The body of an answer, as it streams in.
pub struct Body(BoxStream<'static, Result<Bytes, NotSent>>);

impl Body {
    /// A body from its pieces.
    pub fn new(pieces: impl Stream<Item = Result<Bytes, NotSent>> + Send + 'static) -> Self {
        Self(pieces.boxed())
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self::new(futures_util::stream::once(async { Ok(bytes) }))
    }
}

impl Stream for Body {
    type Item = Result<Bytes, NotSent>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(cx)
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Body")
    }
}

/// HTTPS, and HTTP for targets without TLS. It follows no redirects and keeps no cookies; whoever waits bounds the time.
pub trait Transport: Send + Sync + 'static {
    /// Sends one request, whose URI is path and query alone, and gives the head of the answer with a body that streams in.
    /// The `Host` header is the target's. Errors: [`NotSent`].
    fn send(
        &self,
        target: Target,
        request: http::Request<Bytes>,
    ) -> BoxFuture<'_, Result<http::Response<Body>, NotSent>>;
}

/// What is kept of one key of another server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredKey {
    /// The ed25519 key.
    pub public_key: [u8; 32],
    /// The document that names the key is valid until then, and so is a key that has not expired; at most seven
    /// days after it was fetched.
    pub valid_until_ms: u64,
    /// The server stopped using the key at this time. None: it uses it.
    pub expired_ms: Option<u64>,
    /// The document was fetched at this time.
    pub fetched_ms: u64,
}

/// What is kept of the newest document of another server, for those who ask us as a notary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredDocument {
    /// The document in canonical JSON, as its server signed it.
    pub json: String,
    /// The document is valid until then; at most seven days after it was fetched.
    pub valid_until_ms: u64,
    /// It was fetched at this time.
    pub fetched_ms: u64,
}

/// The cache of other servers' keys cannot be read or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the cache of keys failed: {0}")]
pub struct StoreFailed(pub String);

/// The durable cache of other servers' keys. What was put need not survive a crash at once: it can be fetched again.
pub trait KeyStore: Send + Sync + 'static {
    /// One key.
    fn find_key<'a>(
        &'a self,
        server: &'a ServerName,
        key_id: &'a ServerSigningKeyId,
    ) -> BoxFuture<'a, Result<Option<StoredKey>, StoreFailed>>;

    /// Stores keys in place of those that have the same id. Which are better is decided before.
    fn put_keys<'a>(
        &'a self,
        server: &'a ServerName,
        keys: Vec<(OwnedServerSigningKeyId, StoredKey)>,
    ) -> BoxFuture<'a, Result<(), StoreFailed>>;

    /// The newest document.
    fn find_document<'a>(
        &'a self,
        server: &'a ServerName,
    ) -> BoxFuture<'a, Result<Option<StoredDocument>, StoreFailed>>;

    /// Stores a document in place of the last one.
    fn put_document<'a>(
        &'a self,
        server: &'a ServerName,
        document: StoredDocument,
    ) -> BoxFuture<'a, Result<(), StoreFailed>>;
}

/// All ports together. Cheap to clone.
#[derive(Clone)]
pub struct Ports {
    /// The wall clock.
    pub clock: Arc<dyn Clock>,
    /// Choices and jitter.
    pub randomness: Arc<dyn Randomness>,
    /// For whom requests are made.
    pub payers: Arc<dyn Payers>,
    /// DNS.
    pub resolver: Arc<dyn Resolver>,
    /// HTTPS.
    pub transport: Arc<dyn Transport>,
    /// Other servers' keys.
    pub keys: Arc<dyn KeyStore>,
}
