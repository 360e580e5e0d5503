//! One request to a provider: its host looked up and guarded, sent over HTTPS, and its answer read within bounds.
//!
//! Users choose where Web Push and UnifiedPush lead to, so that nothing here trusts a host: only admitted addresses are connected to and
//! nothing looks a name up again, certificates must be valid, no redirect is followed, and time and bytes are bounded.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use federation::{
    guard::{Admitted, Guard},
    json::{Limits, Memory, stream::collect},
    ports::{Body, NotSent, Place, Target},
};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header, uri::PathAndQuery};
use url::{Host, Position, Url};

use crate::ports::Ports;

/// A URL of a user has at most this many bytes.
pub(crate) const URL_BYTES_MAX: usize = 2048;
/// Looking a name up takes at most this long.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// One request takes at most this long, from connecting to the end of the answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Nothing larger is read of an answer; providers send less than one kilobyte.
const ANSWER_LIMITS: Limits = Limits { bytes_max: 16 << 10, values_max: 1_000 };
/// At most this many bytes of answers are in memory at once.
const ANSWERS_BYTES_MAX: usize = 16 << 20;
/// Nobody waits for longer than this because a provider said so.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);

/// An address of a provider: a URL of the scheme `https`, taken apart. Its path lets anybody send to a device, so that it is never logged.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// The host without brackets, as certificates name it.
    host: String,
    port: u16,
    /// The value of the `Host` header.
    host_header: String,
    path: PathAndQuery,
    /// Scheme, host and port, as VAPID names the receiver.
    origin: String,
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint").field("host", &self.host_header).finish_non_exhaustive()
    }
}

impl Endpoint {
    /// Reads a URL. Errors: a sentence that says what was expected.
    pub(crate) fn parse(text: &str) -> Result<Self, &'static str> {
        const EXPECTED: &str =
            "An endpoint is a URL of the scheme https, of at most 2048 bytes, without user and password.";
        if text.len() > URL_BYTES_MAX {
            return Err(EXPECTED);
        }
        let url = Url::parse(text).map_err(|_| EXPECTED)?;
        let has_user = !url.username().is_empty() || url.password().is_some();
        if url.scheme() != "https" || has_user {
            return Err(EXPECTED);
        }
        let host = match url.host().ok_or(EXPECTED)? {
            // A dot at the end makes a name absolute for DNS; no certificate has it.
            Host::Domain(name) => name.trim_end_matches('.').to_owned(),
            Host::Ipv4(address) => address.to_string(),
            Host::Ipv6(address) => address.to_string(),
        };
        let port = url.port_or_known_default().unwrap_or(443);
        if host.is_empty() || port == 0 {
            return Err(EXPECTED);
        }
        let named = if host.contains(':') { format!("[{host}]") } else { host.clone() };
        let host_header = if port == 443 { named } else { format!("{named}:{port}") };
        let path = &url[Position::BeforePath..Position::AfterQuery];
        let path = PathAndQuery::try_from(path).map_err(|_| EXPECTED)?;
        let origin = format!("https://{host_header}");
        Ok(Self { host, port, host_header, path, origin })
    }

    /// The host, without port and brackets.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    /// The port, which is 443 where the URL names none.
    pub(crate) const fn port(&self) -> u16 {
        self.port
    }

    /// Whether the host is a name that has to be looked up, and not an address.
    pub(crate) fn has_name(&self) -> bool {
        self.host.parse::<std::net::IpAddr>().is_err()
    }

    /// Scheme, host, and port where it is not the usual one (RFC 6454, section 6.2).
    pub(crate) fn origin(&self) -> &str {
        &self.origin
    }

    /// Path and query, which are never logged.
    pub(crate) fn path(&self) -> &str {
        self.path.as_str()
    }

    /// Another path below the one it has.
    pub(crate) fn below(&self, path: &str) -> Result<Self, &'static str> {
        let path = format!("{}{path}", self.path.path().trim_end_matches('/'));
        let path = PathAndQuery::try_from(path).map_err(|_| "the path is not one of a URL")?;
        Ok(Self { path, ..self.clone() })
    }
}

/// An endpoint whose host was looked up.
pub(crate) struct Found {
    target: Target,
}

impl Found {
    /// The address that is tried first, where it is known.
    pub(crate) fn address(&self) -> Option<std::net::IpAddr> {
        match &self.target.place {
            Place::Addresses(admitted) => admitted.as_slice().first().map(SocketAddr::ip),
            Place::Names(_) => None,
        }
    }
}

/// A request that got no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotAnswered {
    /// The endpoint is where the gateway must not connect to.
    Forbidden,
    /// It cannot be reached now; the word says why.
    Failed(&'static str),
}

/// The part of an answer that counts.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) retry_after: Option<Duration>,
    /// The body, where it was asked for and is within bounds; empty otherwise.
    pub(crate) body: Bytes,
}

/// Sends requests to providers.
pub(crate) struct Outbound {
    ports: Ports,
    memory: Memory,
    /// For hosts that users chose.
    guard: Guard,
    /// For hosts that the operator named.
    open: Guard,
}

impl Outbound {
    /// Sends through these ports, to hosts of users where the guard lets it.
    pub(crate) fn new(ports: Ports, guard: Guard) -> Self {
        let everywhere = ["0.0.0.0/0", "::/0"].iter().filter_map(|it| it.parse().ok()).collect();
        Self {
            ports,
            memory: Memory::new(ANSWERS_BYTES_MAX, 1 << 20, 1),
            guard,
            open: Guard::new(everywhere),
        }
    }

    /// Looks up the host of an endpoint that a user chose. Errors: [`NotAnswered`].
    pub(crate) async fn find(&self, endpoint: &Endpoint) -> Result<Found, NotAnswered> {
        self.find_by(endpoint, &self.guard).await
    }

    /// Looks up the host of an endpoint that the operator named, wherever it is.
    pub(crate) async fn find_fixed(&self, endpoint: &Endpoint) -> Result<Found, NotAnswered> {
        self.find_by(endpoint, &self.open).await
    }

    async fn find_by(&self, endpoint: &Endpoint, guard: &Guard) -> Result<Found, NotAnswered> {
        let place = match endpoint.host.parse() {
            Ok(address) => Place::Addresses(self.admit(guard, [SocketAddr::new(address, endpoint.port)])?),
            Err(_) if self.ports.through_proxy => Place::Names(vec![(endpoint.host.clone(), endpoint.port)]),
            Err(_) => {
                let looking = self.ports.resolver.addresses(&endpoint.host);
                let found = tokio::time::timeout(LOOKUP_TIMEOUT, looking).await;
                let found = found.map_err(|_| NotAnswered::Failed("DNS took too long"))?;
                let found = found.map_err(|_| NotAnswered::Failed("the name of the host is not found"))?;
                let addresses = found.addresses.into_iter().map(|it| SocketAddr::new(it, endpoint.port));
                Place::Addresses(self.admit(guard, addresses)?)
            }
        };
        let (tls_name, host_header) = (endpoint.host.clone(), endpoint.host_header.clone());
        Ok(Found { target: Target { place, tls_name: Some(tls_name), host_header } })
    }

    fn admit(
        &self,
        guard: &Guard,
        addresses: impl IntoIterator<Item = SocketAddr>,
    ) -> Result<Admitted, NotAnswered> {
        guard.admit(addresses).map_err(|refused| match refused {
            Some(_) => NotAnswered::Forbidden,
            None => NotAnswered::Failed("the name of the host has no address"),
        })
    }

    /// Posts this, and reads the body of the answer if `wants_body`. Errors: [`NotAnswered`].
    pub(crate) async fn post(
        &self,
        endpoint: &Endpoint,
        found: Found,
        headers: HeaderMap,
        body: Bytes,
        wants_body: bool,
    ) -> Result<Answer, NotAnswered> {
        let mut request = Request::new(body);
        *request.method_mut() = Method::POST;
        *request.uri_mut() = http::Uri::from(endpoint.path.clone());
        *request.headers_mut() = headers;
        let agent = HeaderValue::from_static(concat!("Aqueduct/", env!("CARGO_PKG_VERSION")));
        request.headers_mut().insert(header::USER_AGENT, agent);
        let exchange = async {
            let sent = self.ports.transport.send(found.target, request).await;
            let (head, body) = sent.map_err(|error| NotAnswered::Failed(why(&error)))?.into_parts();
            let retry_after = retry_after(&head.headers, self.ports.clock.now_ms());
            let body = if wants_body { self.read(body).await } else { Bytes::new() };
            Ok(Answer { status: head.status, retry_after, body })
        };
        let answer = tokio::time::timeout(REQUEST_TIMEOUT, exchange).await;
        answer.map_err(|_| NotAnswered::Failed("the provider took too long"))?
    }

    /// The status says more than the body, so that a body which is too large counts as empty.
    async fn read(&self, body: Body) -> Bytes {
        let answer = collect(body, ANSWER_LIMITS, &self.memory).await;
        answer.map(|it| it.bytes().clone()).unwrap_or_default()
    }
}

/// The reason in fixed words: what a library says may hold what others wrote.
const fn why(error: &NotSent) -> &'static str {
    match error {
        NotSent::Unreachable(_) => "the provider cannot be connected to",
        NotSent::Certificate(_) => "the certificate of the provider is not accepted",
        NotSent::TimedOut => "connecting to the provider took too long",
        NotSent::Broken(_) => "the connection to the provider broke",
    }
}

/// `Retry-After`: seconds, or a date (RFC 9110, section 10.2.3).
fn retry_after(headers: &HeaderMap, now_ms: u64) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let date = httpdate::parse_http_date(text).ok()?;
            let since = date.duration_since(std::time::UNIX_EPOCH).ok()?;
            since.saturating_sub(Duration::from_millis(now_ms))
        }
    };
    Some(wait.min(RETRY_AFTER_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_taken_apart() {
        let endpoint = Endpoint::parse("https://Push.Example.:8443/a%20b/ü?q=1#part").unwrap();
        assert_eq!((endpoint.host(), endpoint.port()), ("push.example", 8443));
        assert!(endpoint.has_name());
        assert_eq!(endpoint.origin(), "https://push.example:8443");
        assert_eq!(endpoint.path.as_str(), "/a%20b/%C3%BC?q=1");
        let endpoint = Endpoint::parse("https://[2001:db8::1]").unwrap();
        assert_eq!((endpoint.host(), endpoint.host_header.as_str()), ("2001:db8::1", "[2001:db8::1]"));
        assert_eq!((endpoint.has_name(), endpoint.port()), (false, 443));
        assert_eq!(endpoint.path.as_str(), "/");
        // Odd forms of an address are the address.
        assert_eq!(Endpoint::parse("https://0x7f.1/").unwrap().host(), "127.0.0.1");
        let below = Endpoint::parse("https://fcm.example/base/").unwrap().below("/v1/x").unwrap();
        assert_eq!(below.path.as_str(), "/base/v1/x");
    }

    #[test]
    fn other_schemes_and_secrets_are_no_endpoints_and_are_not_printed() {
        let long = format!("https://a.example/{}", "x".repeat(URL_BYTES_MAX));
        for wrong in [
            "http://a.example/",
            "file:///etc/passwd",
            "gopher://a.example/",
            "https://user:password@a.example/",
            "https://user@a.example/",
            "https:///",
            "https://a.example:0/",
            "a.example",
            "",
            &long,
        ] {
            assert!(Endpoint::parse(wrong).is_err(), "{wrong}");
        }
        let endpoint = Endpoint::parse("https://a.example/SECRET?x=SECRET").unwrap();
        assert!(!format!("{endpoint:?}").contains("SECRET"));
    }

    #[test]
    fn retry_after_is_read_in_both_forms() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RETRY_AFTER, HeaderValue::from_str(text).unwrap());
            retry_after(&headers, 1_700_000_000_000)
        };
        assert_eq!(read("120"), Some(Duration::from_secs(120)));
        assert_eq!(read("Tue, 14 Nov 2023 22:14:20 GMT"), Some(Duration::from_secs(60)));
        assert_eq!(read("Tue, 14 Nov 2023 22:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!(read("99999999999"), Some(RETRY_AFTER_MAX));
        assert_eq!(read("soon"), None);
        assert_eq!(retry_after(&HeaderMap::new(), 0), None);
    }
}
