//! Requests for pages of the web that others name, such as those of which a preview is made.
//!
//! Whoever names a URL may mean the operator's own network by it, so that each request is looked up and guarded like those to
//! other servers ([`crate::guard`]): the addresses that were admitted are the ones that are connected to. Nothing here is signed,
//! and nothing is followed: whoever asks decides on each redirect anew.

mod post;

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use url::Url;

use crate::{
    discovery::{Hosts, NotFound, services},
    guard::Guard,
    json::Memory,
    ports::{Body, NotSent, Resolver, Transport},
};

pub use post::{NotAnswered, Options, Reply};

/// A page that did not answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAsked {
    /// The host has no address that may be connected to.
    #[error(transparent)]
    NotFound(#[from] NotFound),
    /// The host was found, and gave no answer.
    #[error(transparent)]
    NotSent(#[from] NotSent),
    /// The URL holds what no request can say.
    #[error("the URL cannot be asked for")]
    BadUrl,
}

/// Whether a URL names something that can be asked for at all: a host that DNS can know, or an address, and nobody's name or password.
pub fn can_be_asked(url: &Url) -> bool {
    let is_host = url.host().is_some_and(|host| match host {
        url::Host::Domain(name) => {
            let labels = name.strip_suffix('.').unwrap_or(name);
            services::is_host(name) && labels.split('.').all(|label| !label.is_empty())
        }
        url::Host::Ipv4(_) | url::Host::Ipv6(_) => true,
    });
    is_host && url.port() != Some(0) && url.username().is_empty() && url.password().is_none()
}

/// At most this many bytes of answers that are read here are in memory at once.
const ANSWERS_BYTES_MAX: usize = 32 << 20;

/// Asks for pages of the web, and sends to addresses there. Cheap to clone.
#[derive(Clone)]
pub struct Web {
    hosts: Arc<Hosts>,
    transport: Arc<dyn Transport>,
    memory: Memory,
}

impl Web {
    /// Looks hosts up by this resolver and asks those that the guard admits over this transport. With `leaves_names_to_proxy` names
    /// are not resolved here, because all requests go through a forward proxy that does, and that guards them.
    pub fn new(
        resolver: Arc<dyn Resolver>,
        transport: Arc<dyn Transport>,
        guard: Guard,
        leaves_names_to_proxy: bool,
    ) -> Self {
        let memory = Memory::new(ANSWERS_BYTES_MAX, ANSWERS_BYTES_MAX, 1);
        Self { hosts: Arc::new(Hosts::new(resolver, guard, leaves_names_to_proxy)), transport, memory }
    }

    /// Asks for the URL, whose scheme is `https` or `http`, with these headers and `Host`. The answer is the first one: no redirect
    /// is followed. Whoever waits bounds the time and what is read of the body. Errors: [`NotAsked`].
    pub async fn get(&self, url: &Url, headers: HeaderMap) -> Result<Response<Body>, NotAsked> {
        let mut request = Request::new(Bytes::new());
        *request.headers_mut() = headers;
        self.send(url, request).await
    }

    /// Sends any request to the URL, in place of the one that it names: its method, headers and body. Otherwise like [`Web::get`].
    pub async fn send(&self, url: &Url, mut request: Request<Bytes>) -> Result<Response<Body>, NotAsked> {
        let target = self.hosts.find_url(url).await?;
        let path =
            url.query().map_or_else(|| url.path().to_owned(), |query| format!("{}?{query}", url.path()));
        *request.uri_mut() = path.parse().map_err(|_| NotAsked::BadUrl)?;
        Ok(self.transport.send(target, request).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Net, json};

    fn web(net: &Net) -> Web {
        let ports = net.ports();
        Web::new(ports.resolver, ports.transport, Guard::default(), false)
    }

    async fn ask(net: &Net, url: &str) -> Result<u16, NotAsked> {
        let answer = web(net).get(&Url::parse(url).unwrap(), HeaderMap::new()).await?;
        Ok(answer.status().as_u16())
    }

    #[tokio::test(start_paused = true)]
    async fn pages_are_asked_for_with_and_without_tls_at_the_ports_that_they_name() {
        let net = Net::new(1);
        net.host("a.example", &["5.0.0.1"]);
        for port in [80, 443, 8080] {
            net.serve(&format!("5.0.0.1:{port}"), &["a.example"], |_| async { json(200, "{}") });
        }
        for (url, arrived) in [
            ("http://a.example", "(no TLS)@5.0.0.1:80 a.example GET /"),
            ("https://A.example/x?y#z", "a.example@5.0.0.1:443 a.example GET /x?y"),
            ("http://a.example:8080/%20", "(no TLS)@5.0.0.1:8080 a.example:8080 GET /%20"),
        ] {
            assert_eq!(ask(&net, url).await, Ok(200));
            assert_eq!(net.take_arrived(), [arrived]);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_asked_at_an_address_that_is_not_public_however_it_is_written() {
        let net = Net::new(1);
        net.host("inside.example", &["10.0.0.1"]);
        net.host("localhost", &["127.0.0.1"]);
        for address in ["10.0.0.1:80", "127.0.0.1:80", "[::1]:80", "169.254.169.254:80"] {
            net.serve(address, &[], |_| async { json(200, "{}") });
        }
        for url in [
            "http://inside.example/",
            "http://localhost/",
            "http://127.0.0.1/",
            "http://127.1/",
            "http://2130706433/",
            "http://0x7f.0.0.1/",
            "http://0177.0.0.1/",
            "http://[::1]/",
            "http://[::ffff:127.0.0.1]/",
            "http://169.254.169.254/latest/meta-data",
            "http://\u{ff11}\u{ff12}\u{ff17}.0.0.1/",
        ] {
            let refused = ask(&net, url).await;
            let is_guarded = matches!(refused, Err(NotAsked::NotFound(NotFound::Forbidden { .. })));
            assert!(is_guarded, "{url}: {refused:?}");
        }
        assert_eq!(net.take_arrived(), Vec::<String>::new());
    }

    #[tokio::test(start_paused = true)]
    async fn a_proxy_is_given_names_and_no_addresses_that_are_not_public() {
        let net = Net::new(1);
        net.host("a.example", &["5.0.0.1"]);
        net.serve("5.0.0.1:80", &[], |_| async { json(200, "{}") });
        let ports = net.ports();
        let web = Web::new(ports.resolver, ports.transport, Guard::default(), true);
        let ask = |url: &'static str| {
            let web = web.clone();
            async move { web.get(&Url::parse(url).unwrap(), HeaderMap::new()).await }
        };
        assert!(ask("http://a.example/").await.is_ok());
        assert_eq!(net.take_looked_up(), Vec::<String>::new());
        for url in ["http://127.0.0.1/", "http://0x7f.1/", "http://[::1]/"] {
            assert!(matches!(ask(url).await, Err(NotAsked::NotFound(_))), "{url}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_schemes_of_the_web_are_asked_for() {
        for url in
            ["ftp://a.example/", "file:///etc/passwd", "data:,x", "gopher://a.example/", "ws://a.example"]
        {
            let refused = ask(&Net::new(1), url).await;
            let is_refused = matches!(refused, Err(NotAsked::NotFound(NotFound::BadName { .. })));
            assert!(is_refused, "{url}: {refused:?}");
        }
    }
}
