//! Opening a connection: to one of the guarded addresses or through a forward proxy, then TLS under the target's name
//! ([TLS](https://spec.matrix.org/v1.19/server-server-api/#tls)).

use std::{
    collections::VecDeque,
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use ruma::serde::{Base64, base64::Standard};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{self, ClientConfig, pki_types::ServerName as TlsName},
};
use url::Url;

use crate::{
    ports::{NotSent, Place, Target},
    transport::trust::Trust,
};

/// The next address is tried after this time, while the last is still being tried (RFC 8305, section 5).
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(250);
/// All addresses together get this long to take a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The TLS handshake, and the answer of a proxy.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// The head of a proxy's answer.
const PROXY_ANSWER_BYTES_MAX: usize = 8192;

/// An open connection, on which nothing was asked yet.
pub(super) enum Stream {
    Tls(Box<TlsStream<TcpStream>>),
    Plain(TcpStream),
}

impl Stream {
    /// Whether both sides agreed on HTTP/2, which they do within the handshake of TLS alone.
    pub(super) fn is_http2(&self) -> bool {
        match self {
            Self::Tls(stream) => stream.get_ref().1.alpn_protocol() == Some(b"h2"),
            Self::Plain(_) => false,
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// Where a connection leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reached {
    Address(SocketAddr),
    /// A host and port, through the proxy.
    Name(String, u16),
}

/// A forward proxy that takes `CONNECT`.
#[derive(Clone)]
pub struct Proxy {
    host: String,
    port: u16,
    /// The value of `Proxy-Authorization`; a secret.
    authorization: Option<String>,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("host", &self.host).field("port", &self.port).finish_non_exhaustive()
    }
}

/// The URL of a proxy that is none. It does not say what was written, because that may hold a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("federation.proxy: expected a URL such as \"http://proxy.example.org:3128\": {0}")]
pub struct BadProxy(&'static str);

impl Proxy {
    /// Reads a URL such as `http://user:password@proxy.example.org:3128`. Errors: [`BadProxy`].
    pub fn parse(url: &str) -> Result<Self, BadProxy> {
        let url = Url::parse(url).map_err(|_| BadProxy("this is no URL"))?;
        if url.scheme() != "http" {
            return Err(BadProxy("the scheme is not http"));
        }
        if !matches!(url.path(), "" | "/") || url.query().is_some() {
            return Err(BadProxy("something follows the host"));
        }
        let host = url.host_str().ok_or(BadProxy("the host is missing"))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let authorization = if url.username().is_empty() {
            None
        } else {
            let decode = |text: &str| {
                let bytes =
                    percent_decode(text).ok_or(BadProxy("the user or the password has a wrong % sign"))?;
                Ok(bytes)
            };
            let mut credentials = decode(url.username())?;
            credentials.push(b':');
            credentials.extend(decode(url.password().unwrap_or_default())?);
            // The standard alphabet with padding, as the scheme Basic has it.
            let mut encoded = Base64::<Standard, _>::new(credentials).encode();
            while encoded.len() % 4 > 0 {
                encoded.push('=');
            }
            Some(format!("Basic {encoded}"))
        };
        Ok(Self { host, port: url.port().unwrap_or(80), authorization })
    }
}

fn percent_decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::new();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let mut digit = || char::from(bytes.next()?).to_digit(16);
        let (high, low) = (digit()?, digit()?);
        decoded.push(u8::try_from(high * 16 + low).ok()?);
    }
    Some(decoded)
}

/// Opens connections.
pub(super) struct Connector {
    tls: Arc<ClientConfig>,
    proxy: Option<Proxy>,
}

impl Connector {
    pub(super) fn new(trust: &Trust, proxy: Option<Proxy>) -> Self {
        Self { tls: trust.config(), proxy }
    }

    /// Connects to the first place that takes connections and proves its name, where it needs one. Errors: [`NotSent`], of the
    /// last place.
    pub(super) async fn connect(&self, target: &Target) -> Result<(Stream, Reached), NotSent> {
        let tls_name = target.tls_name.clone().map(TlsName::try_from).transpose();
        let tls_name =
            tls_name.map_err(|_| NotSent::Certificate("no certificate can have this name".to_owned()))?;
        let mut places: VecDeque<Reached> = match &target.place {
            Place::Addresses(admitted) => admitted.as_slice().iter().copied().map(Reached::Address).collect(),
            Place::Names(names) => {
                names.iter().cloned().map(|(host, port)| Reached::Name(host, port)).collect()
            }
        };
        let mut last = NotSent::Unreachable("there is no address".to_owned());
        while !places.is_empty() {
            let racing = self.race(&mut places);
            let (tcp, reached) =
                tokio::time::timeout(CONNECT_TIMEOUT, racing).await.map_err(|_| NotSent::TimedOut)??;
            let Some(name) = tls_name.clone() else { return Ok((Stream::Plain(tcp), reached)) };
            match self.prove(tcp, name).await {
                Ok(stream) => return Ok((stream, reached)),
                // Another address may be a server that works.
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Tries places in their order, each a moment after the one before it, and takes the first that answers. Those that
    /// did not fail are left. Errors: none answers.
    async fn race(&self, places: &mut VecDeque<Reached>) -> Result<(TcpStream, Reached), NotSent> {
        let mut trying = FuturesUnordered::new();
        let mut begun = Vec::new();
        let mut last = NotSent::Unreachable("there is no address".to_owned());
        loop {
            if let Some(place) = places.pop_front() {
                begun.push(place.clone());
                trying.push(async move {
                    let opened = self.open(&place).await;
                    (place, opened)
                });
            } else if trying.is_empty() {
                return Err(last);
            }
            let next = trying.next();
            let ended = if places.is_empty() {
                next.await
            } else {
                tokio::time::timeout(NEXT_ADDRESS_AFTER, next).await.unwrap_or(None)
            };
            let Some((place, opened)) = ended else { continue };
            begun.retain(|it| *it != place);
            match opened {
                Ok(tcp) => {
                    // The one that answered may fail to prove its name; then these have another chance.
                    places.extend(begun);
                    return Ok((tcp, place));
                }
                Err(error) => last = error,
            }
        }
    }

    async fn open(&self, place: &Reached) -> Result<TcpStream, NotSent> {
        let tcp = match (&self.proxy, place) {
            (None, Reached::Address(address)) => {
                dial(*address).await.map_err(|error| unreachable(&address.to_string(), &error))?
            }
            (None, Reached::Name(..)) => {
                return Err(NotSent::Unreachable("names are left to a proxy, and there is none".to_owned()));
            }
            (Some(proxy), Reached::Address(address)) => tunnel(proxy, &address.to_string()).await?,
            (Some(proxy), Reached::Name(host, port)) => tunnel(proxy, &format!("{host}:{port}")).await?,
        };
        // Small requests go out at once; where this fails they only go out later.
        let _ = tcp.set_nodelay(true);
        Ok(tcp)
    }

    async fn prove(&self, tcp: TcpStream, name: TlsName<'static>) -> Result<Stream, NotSent> {
        let handshake = TlsConnector::from(Arc::clone(&self.tls)).connect(name, tcp);
        let result =
            tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await.map_err(|_| NotSent::TimedOut)?;
        result.map(|stream| Stream::Tls(Box::new(stream))).map_err(|error| {
            let cause = error.get_ref().and_then(|it| it.downcast_ref::<rustls::Error>());
            match cause {
                Some(rustls::Error::InvalidCertificate(why)) => NotSent::Certificate(why.to_string()),
                Some(other) => NotSent::Unreachable(format!("TLS failed: {other}")),
                None => NotSent::Unreachable(format!("TLS failed: {error}")),
            }
        })
    }
}

#[expect(clippy::disallowed_methods, reason = "this is the door")]
async fn dial(address: SocketAddr) -> io::Result<TcpStream> {
    TcpStream::connect(address).await
}

fn unreachable(place: &str, error: &io::Error) -> NotSent {
    NotSent::Unreachable(format!("{place}: {error}"))
}

/// Asks the proxy for a connection (RFC 9110, section 9.3.6).
#[expect(clippy::disallowed_methods, reason = "this is the door; the operator names the proxy")]
async fn tunnel(proxy: &Proxy, place: &str) -> Result<TcpStream, NotSent> {
    let failed = |error: io::Error| unreachable("the proxy", &error);
    let asking = async {
        let mut tcp = TcpStream::connect((proxy.host.as_str(), proxy.port)).await.map_err(failed)?;
        let mut request = format!("CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n");
        if let Some(authorization) = &proxy.authorization {
            request.push_str("Proxy-Authorization: ");
            request.push_str(authorization);
            request.push_str("\r\n");
        }
        request.push_str("\r\n");
        tcp.write_all(request.as_bytes()).await.map_err(failed)?;
        // Byte by byte, so that nothing is read of what follows the head.
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if head.len() >= PROXY_ANSWER_BYTES_MAX {
                return Err(NotSent::Unreachable("the proxy's answer is too long".to_owned()));
            }
            head.push(tcp.read_u8().await.map_err(failed)?);
        }
        let status = head.split(|it| *it == b' ').nth(1);
        if head.starts_with(b"HTTP/1.") && status.is_some_and(|it| it.len() == 3 && it.starts_with(b"2")) {
            return Ok(tcp);
        }
        let status = status.map(|it| String::from_utf8_lossy(it.get(..3).unwrap_or(it)).into_owned());
        let status = status.filter(|it| it.bytes().all(|it| it.is_ascii_digit())).unwrap_or_default();
        Err(NotSent::Unreachable(format!("the proxy does not connect to {place}: {status}")))
    };
    tokio::time::timeout(HANDSHAKE_TIMEOUT, asking).await.map_err(|_| NotSent::TimedOut)?
}
