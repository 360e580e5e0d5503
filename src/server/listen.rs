//! The listeners: TCP, TLS and Unix sockets, and the one for `/metrics`.

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use axum::{Router, body::Body};
use http::{Request, Response, StatusCode, header};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt;

use crate::{
    api::{
        extract::Peer,
        head::{self, FIELDS_BYTES_MAX, FIELDS_MAX, URI_BYTES_MAX},
    },
    config::{Limits, Listener, Tls},
    env::Env,
    error::{Error, Result},
    metrics::Metrics,
    server::connections::{Connections, HEAD_TIMEOUT, Place, Stream},
};

/// The server pings an HTTP/2 connection this often, to see whether its client is still there.
const PING_EVERY: Duration = Duration::from_secs(30);
/// A client must answer a ping within this time, or its connection ends.
const PONG_TIMEOUT: Duration = Duration::from_secs(20);
/// One HTTP/2 connection may have at most this many requests under way, because each costs memory.
const STREAMS_MAX: u32 = 100;
/// An answer over HTTP/2 may have at most this many bytes waiting for the windows of its client, beside a piece.
const SEND_BUFFER_BYTES: usize = 64 << 10;
/// At most this many header fields of a request are read. It is more than a request may have, so that one which has too many is
/// refused with a reason (`api/head.rs`).
const FIELDS_READ_MAX: usize = 2 * FIELDS_MAX;
/// A head of at most this many bytes is read over HTTP/2, for the same reason. Each field counts for 32 bytes more than it has.
const HEAD_READ_BYTES_MAX: u32 = 64 << 10;
const _: () = assert!(URI_BYTES_MAX + FIELDS_BYTES_MAX + 32 * FIELDS_READ_MAX < HEAD_READ_BYTES_MAX as usize);
/// The listener of `/metrics` has at most this many connections of its own, beside those of clients.
const METRICS_CONNECTIONS_MAX: usize = 64;
/// The status of an answer after which the connection speaks another protocol.
const SWITCHING_PROTOCOLS: u16 = 101;

/// The parts that all listeners share.
#[derive(Clone)]
pub struct Listening {
    env: Env,
    metrics: Metrics,
    router: Router,
    /// Cancelled when the server stops: no connection is accepted then, and open ones end after their current request.
    stopping: CancellationToken,
    tasks: TaskTracker,
    connections: Connections,
}

impl Listening {
    pub(super) fn new(
        env: Env,
        metrics: Metrics,
        router: Router,
        stopping: CancellationToken,
        limits: &Limits,
    ) -> Self {
        let (all, of_address) = (limits.connections_max, limits.connections_by_address_max);
        let connections = Connections::new(env.clone(), metrics.clone(), all as usize, of_address as usize);
        Self { env, metrics, router, stopping, tasks: TaskTracker::new(), connections }
    }

    /// Opens the listener and serves it. Returns the address at which it listens. Fails if the address is taken or the
    /// certificate cannot be read.
    pub async fn open(&self, listener: &Listener) -> Result<String> {
        if let Some(path) = &listener.unix {
            let socket = bind_unix(path, 0o666)?;
            self.accept_unix(socket, listener.behind_proxy);
            return Ok(format!("unix:{}", path.display()));
        }
        let Some(address) = listener.address else {
            return Err(Error::broken("a listener has neither address nor unix"));
        };
        let tls = listener.tls.as_ref().map(acceptor).transpose()?;
        let socket = TcpListener::bind(address)
            .await
            .map_err(|error| Error::broken(format!("cannot listen on {address}: {error}")))?;
        let address = socket.local_addr()?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        self.accept_tcp(socket, tls, listener.behind_proxy);
        Ok(format!("{scheme}://{address}"))
    }

    fn accept_tcp(&self, socket: TcpListener, tls: Option<TlsAcceptor>, behind_proxy: bool) {
        let all = self.clone();
        self.env.spawn(async move {
            loop {
                let accepted = tokio::select! {
                    biased;
                    () = all.stopping.cancelled() => return,
                    accepted = socket.accept() => accepted,
                };
                let Some((stream, address)) = all.accepted(accepted).await else { continue };
                // Answers are small and awaited, so that a delay to fill packets would only cost time.
                let _ = stream.set_nodelay(true);
                let address = address.ip();
                let Some(place) =
                    all.place((!behind_proxy && !address.is_loopback()).then_some(address)).await
                else {
                    continue;
                };
                let (it, tls) = (all.clone(), tls.clone());
                all.spawn(place, |place| async move {
                    let Some(tls) = tls else {
                        return it.serve(stream, place, address, behind_proxy).await;
                    };
                    // A failed handshake is not logged, because it is the client's and nobody is there to be told.
                    if let Ok(Ok(stream)) = tokio::time::timeout(HEAD_TIMEOUT, tls.accept(stream)).await {
                        it.serve(stream, place, address, behind_proxy).await;
                    }
                });
            }
        });
    }

    fn accept_unix(&self, socket: UnixListener, behind_proxy: bool) {
        let all = self.clone();
        self.env.spawn(async move {
            loop {
                let accepted = tokio::select! {
                    biased;
                    () = all.stopping.cancelled() => return,
                    accepted = socket.accept() => accepted,
                };
                let Some((stream, _)) = all.accepted(accepted).await else { continue };
                let Some(place) = all.place(None).await else { continue };
                let it = all.clone();
                all.spawn(place, |place| async move {
                    it.serve(stream, place, IpAddr::V4(Ipv4Addr::LOCALHOST), behind_proxy).await;
                });
            }
        });
    }

    /// Takes a place for one more connection. `None` if the server stops, or if the address has too many.
    async fn place(&self, address: Option<IpAddr>) -> Option<Place> {
        tokio::select! {
            biased;
            () = self.stopping.cancelled() => None,
            place = self.connections.admit(address) => place,
        }
    }

    async fn accepted<T>(&self, accepted: std::io::Result<T>) -> Option<T> {
        match accepted {
            Ok(accepted) => Some(accepted),
            Err(error) => {
                // The cause is usually too many open files. That passes, and the loop must not spin until then.
                tracing::warn!(%error, "a connection could not be accepted");
                self.env.sleep(Duration::from_millis(50)).await;
                None
            }
        }
    }

    /// Runs a connection in its place until it ends or must end.
    fn spawn<F: Future<Output = ()> + Send + 'static>(
        &self,
        place: Place,
        run: impl FnOnce(Arc<Place>) -> F,
    ) {
        let (connection, place) = (place.connection(), Arc::new(place));
        let run = run(place.clone());
        self.env.spawn(self.tasks.track_future(async move {
            tokio::select! {
                biased;
                () = run => {}
                reason = connection.must_end() => tracing::debug!(reason, "connection ended"),
            }
            drop(place);
        }));
    }

    async fn serve(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        place: Arc<Place>,
        address: IpAddr,
        behind_proxy: bool,
    ) {
        let (router, watched, connection) = (self.router.clone(), place.connection(), place.connection());
        let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
            let mut request = request.map(Body::new);
            head::note_host(&mut request);
            let peer = if behind_proxy { forwarded(&request).unwrap_or(address) } else { address };
            request.extensions_mut().insert(Peer(peer));
            let (asked, version) = (watched.begin(), request.version());
            let (answer, watched) = (router.clone().oneshot(request), watched.clone());
            async move {
                let response = answer.await?;
                if response.status().as_u16() == SWITCHING_PROTOCOLS {
                    watched.upgrade();
                }
                Ok::<_, Infallible>(response.map(|body| asked.watch(body, version)))
            }
        });
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            // A client that ends its half of the connection is taken to have gone, so that an abandoned poll gives up its place
            // at once.
            .half_close(false)
            .header_read_timeout(HEAD_TIMEOUT)
            .max_headers(FIELDS_READ_MAX);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS_MAX)
            .max_header_list_size(HEAD_READ_BYTES_MAX)
            .max_send_buf_size(SEND_BUFFER_BYTES)
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PONG_TIMEOUT);
        let stream = TokioIo::new(Stream::new(stream, place, self.tasks.token()));
        let served = builder.serve_connection_with_upgrades(stream, service);
        tokio::pin!(served);
        tokio::select! {
            biased;
            // An error here is the client's doing: it went away, or does not speak HTTP.
            _ = served.as_mut() => return,
            () = self.stopping.cancelled() => served.as_mut().graceful_shutdown(),
            // The request that has come is answered, and nothing after it is read.
            () = connection.asked_to_leave() => served.as_mut().graceful_shutdown(),
        }
        let _ = served.await;
    }

    /// Resolves when every connection has closed.
    pub async fn drained(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Serves `/metrics`, and nothing else, on this address. `look` updates the figures that are only known when
    /// somebody looks.
    pub(super) async fn open_metrics(
        &self,
        address: &str,
        look: impl Fn() + Clone + Send + Sync + 'static,
    ) -> Result<SocketAddr> {
        let metrics = self.metrics.clone();
        let serve = move || {
            let (metrics, look) = (metrics.clone(), look.clone());
            async move {
                look();
                let mut response = Response::new(Body::from(metrics.text()));
                response.headers_mut().insert(
                    header::CONTENT_TYPE,
                    header::HeaderValue::from_static(
                        "application/openmetrics-text; version=1.0.0; charset=utf-8",
                    ),
                );
                response
            }
        };
        let router = Router::new()
            .route("/metrics", axum::routing::get(serve))
            .fallback(|| async { (StatusCode::NOT_FOUND, "This address serves /metrics only.\n") });
        let socket = TcpListener::bind(address)
            .await
            .map_err(|error| Error::broken(format!("cannot listen on {address} for metrics: {error}")))?;
        let address = socket.local_addr()?;
        let (env, metrics) = (self.env.clone(), self.metrics.clone());
        let places = METRICS_CONNECTIONS_MAX;
        let connections = Connections::new(env, metrics, places, places);
        let own = Self { router, connections, ..self.clone() };
        own.accept_tcp(socket, None, false);
        Ok(address)
    }
}

/// Binds a Unix socket with these permissions. A file that a dead server left is replaced; the socket of a living one
/// is not.
pub(super) fn bind_unix(path: &Path, mode: u32) -> Result<UnixListener> {
    use std::os::unix::{fs::PermissionsExt, net::UnixStream};
    let fail = |error: std::io::Error| Error::broken(format!("cannot listen on {}: {error}", path.display()));
    if path.exists() {
        if UnixStream::connect(path).is_ok() {
            return Err(Error::broken(format!("somebody listens on {} already", path.display())));
        }
        std::fs::remove_file(path).map_err(fail)?;
    }
    let socket = UnixListener::bind(path).map_err(fail)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(fail)?;
    Ok(socket)
}

/// The address that the reverse proxy saw: the last one in the list, because the client may have written those before
/// it. They are bytes of any kind, and none of them may hide the last one.
fn forwarded<B>(request: &Request<B>) -> Option<IpAddr> {
    let value = request.headers().get_all("x-forwarded-for").iter().next_back()?.as_bytes();
    let last = value.rsplit(|byte| *byte == b',').next()?;
    let address = parse_address(std::str::from_utf8(last).ok()?.trim());
    if address.is_none() {
        tracing::debug!(reason = "the proxy names no address", "the client counts as the proxy");
    }
    address
}

/// Reads an address that may be in brackets and may have a port after it, as some proxies write it.
fn parse_address(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    bare.parse().ok().or_else(|| text.parse::<SocketAddr>().ok().map(|address| address.ip()))
}

fn acceptor(tls: &Tls) -> Result<TlsAcceptor> {
    let fail = |path: &Path, why: String| Error::broken(format!("{}: {why}", path.display()));
    let certificate = &tls.certificate;
    let chain: Vec<_> = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect)
        .map_err(|error| fail(certificate, error.to_string()))?;
    let key = PrivateKeyDer::from_pem_file(&tls.key).map_err(|error| fail(&tls.key, error.to_string()))?;
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|error| fail(certificate, error.to_string()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

#[cfg(test)]
mod sockets;
#[cfg(test)]
mod tests;
