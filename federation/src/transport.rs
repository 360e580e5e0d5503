//! The real ports to the network: HTTPS on hyper and rustls, DNS on hickory
//! ([API standards](https://spec.matrix.org/v1.19/server-server-api/#api-standards)).
//!
//! A request has four things that other clients derive from one URL: where to connect to, for which name the certificate must be
//! valid, the `Host` header, and the path. Here each is its own, so that a delegated server is reached under its own name at
//! addresses that were guarded, and a forward proxy is told the host and port that DNS gave.

mod connect;
pub mod dns;
mod pool;
#[cfg(test)]
mod tests;
pub mod trust;

use std::{pin::Pin, sync::Arc, task::Poll, time::Duration};

use bytes::Bytes;
use futures_util::{FutureExt, Stream, future::BoxFuture, ready};
use http::{HeaderValue, Method, Request, Response, Uri, header};
use http_body_util::Full;
use hyper::{
    body::{Body as _, Incoming},
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioIo, TokioTimer};

use crate::{
    ports::{Body, Clock, NotSent, Target, Tasks, Transport},
    transport::{
        connect::{Connector, Stream as Open},
        pool::{Connection, Pool, Pooled},
    },
};

pub use connect::{BadProxy, Proxy};
pub use trust::{BadAuthorities, Trust};

/// Headers of an answer of another server have at most this many bytes together.
const HEADERS_BYTES_MAX: u32 = 8192;
/// The same for pages of the web, whose policies and cookies take more than all that Matrix servers say.
const WEB_HEADERS_BYTES_MAX: u32 = 64 * 1024;
/// A connection that is used for HTTP/2 is asked for a sign of life at this interval while requests run on it.
const ALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// Window of one request of HTTP/2: what may arrive before we read it.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
/// Window of all requests on one connection.
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;
/// Connections of the pool that turn out to be dead before a new one is opened.
const DEAD_MAX: usize = 3;

/// HTTPS over the real network, and HTTP for targets without TLS. Cheap to clone.
#[derive(Clone)]
pub struct Https(Arc<Inner>);

struct Inner {
    connector: Connector,
    pool: Pool,
    tasks: Arc<dyn Tasks>,
    headers_bytes_max: u32,
}

impl Https {
    /// Connects with this trust, through a forward proxy if there is one. Its connections are driven by tasks that it starts
    /// here.
    pub fn new(trust: &Trust, proxy: Option<Proxy>, clock: Arc<dyn Clock>, tasks: Arc<dyn Tasks>) -> Self {
        Self::with_headers(HEADERS_BYTES_MAX, trust, proxy, clock, tasks)
    }

    /// Like [`Https::new`], for pages of the web: their answers may have larger headers. It has connections of its own, so that
    /// those to other servers are not closed for those to pages.
    pub fn for_web(
        trust: &Trust,
        proxy: Option<Proxy>,
        clock: Arc<dyn Clock>,
        tasks: Arc<dyn Tasks>,
    ) -> Self {
        Self::with_headers(WEB_HEADERS_BYTES_MAX, trust, proxy, clock, tasks)
    }

    fn with_headers(
        headers_bytes_max: u32,
        trust: &Trust,
        proxy: Option<Proxy>,
        clock: Arc<dyn Clock>,
        tasks: Arc<dyn Tasks>,
    ) -> Self {
        let (connector, pool) = (Connector::new(trust, proxy), Pool::new(clock));
        Self(Arc::new(Inner { connector, pool, tasks, headers_bytes_max }))
    }

    async fn exchange(&self, target: Target, request: Request<Bytes>) -> Result<Response<Body>, NotSent> {
        let mut request = request.map(Full::new);
        for _ in 0..DEAD_MAX {
            let Some(pooled) = self.0.pool.take(&target).await else { break };
            match self.try_pooled(pooled, &target, request).await {
                Ok(answer) => return answer,
                Err(unsent) => request = *unsent,
            }
        }
        let (stream, reached) = self.0.connector.connect(&target).await?;
        let connection = self.handshake(stream).await?;
        let mut pooled = Pooled { tls_name: target.tls_name.clone(), reached, connection };
        let response = pooled.connection.send(&target.host_header, request).await;
        let response = response.map_err(|error| broken(&error.into_error()))?;
        Ok(self.answer(response, pooled))
    }

    /// Sends over a connection that was used before. The other side may have closed it meanwhile: then the request comes back as
    /// an error, if it was not sent or may be sent twice.
    async fn try_pooled(
        &self,
        mut pooled: Pooled,
        target: &Target,
        request: Request<Full<Bytes>>,
    ) -> Result<Result<Response<Body>, NotSent>, Box<Request<Full<Bytes>>>> {
        // Whatever is sent twice with these methods is done once.
        let is_idempotent =
            matches!(*request.method(), Method::GET | Method::HEAD | Method::PUT | Method::DELETE);
        let spare = is_idempotent.then(|| request.clone());
        match pooled.connection.send(&target.host_header, request).await {
            Ok(response) => Ok(Ok(self.answer(response, pooled))),
            Err(mut error) => {
                if let Some(unsent) = error.take_message() {
                    return Err(Box::new(spare.unwrap_or(unsent)));
                }
                let error = error.into_error();
                match spare {
                    // What is no HTTP would be none on another connection, too.
                    Some(spare) if !error.is_parse() => Err(Box::new(spare)),
                    Some(_) | None => Ok(Err(broken(&error))),
                }
            }
        }
    }

    fn answer(&self, response: Response<Incoming>, pooled: Pooled) -> Response<Body> {
        let back = match &pooled.connection {
            Connection::One(_) => Some((self.clone(), pooled)),
            // Others may use it while this answer still streams in.
            Connection::Many(_) => {
                self.0.pool.put(pooled);
                None
            }
        };
        response.map(|incoming| Body::new(Streaming { incoming, back }))
    }

    async fn handshake(&self, stream: Open) -> Result<Connection, NotSent> {
        let is_http2 = stream.is_http2();
        let io = TokioIo::new(stream);
        if is_http2 {
            let (sender, connection) = http2::Builder::new(Executor(Arc::clone(&self.0.tasks)))
                .timer(TokioTimer::new())
                .max_header_list_size(self.0.headers_bytes_max)
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .keep_alive_interval(ALIVE_INTERVAL)
                .keep_alive_timeout(ALIVE_INTERVAL)
                .handshake(io)
                .await
                .map_err(|error| broken(&error))?;
            self.0.tasks.spawn(connection.map(drop).boxed());
            return Ok(Connection::Many(sender));
        }
        let (sender, connection) = http1::Builder::new()
            .max_header_size(self.0.headers_bytes_max as usize)
            .handshake(io)
            .await
            .map_err(|error| broken(&error))?;
        self.0.tasks.spawn(connection.map(drop).boxed());
        Ok(Connection::One(sender))
    }
}

impl Transport for Https {
    fn send(
        &self,
        target: Target,
        request: Request<Bytes>,
    ) -> BoxFuture<'_, Result<Response<Body>, NotSent>> {
        self.exchange(target, request).boxed()
    }
}

impl Connection {
    async fn send(
        &mut self,
        host_header: &str,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, hyper::client::conn::TrySendError<Request<Full<Bytes>>>> {
        match self {
            Self::One(sender) => sender.try_send_request(for_http1(host_header, request)).await,
            Self::Many(sender) => sender.try_send_request(for_http2(host_header, request)).await,
        }
    }
}

/// In HTTP/1.1 the request line has the path alone, and `Host` is a header.
fn for_http1(host_header: &str, mut request: Request<Full<Bytes>>) -> Request<Full<Bytes>> {
    let path = request.uri().path_and_query().cloned();
    *request.uri_mut() = path.map_or_else(Uri::default, Uri::from);
    if let Ok(host) = HeaderValue::from_str(host_header) {
        request.headers_mut().insert(header::HOST, host);
    }
    request
}

/// In HTTP/2 the host is a part of the URI (`:authority`), and a header that says it again would only be wrong.
fn for_http2(host_header: &str, mut request: Request<Full<Bytes>>) -> Request<Full<Bytes>> {
    let path = request.uri().path_and_query().map_or("/", |it| it.as_str());
    if let Ok(uri) = Uri::builder().scheme("https").authority(host_header).path_and_query(path).build() {
        *request.uri_mut() = uri;
    }
    request.headers_mut().remove(header::HOST);
    request
}

fn broken(error: &hyper::Error) -> NotSent {
    let mut told = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        told = format!("{told}: {cause}");
        source = cause.source();
    }
    NotSent::Broken(told)
}

/// The body of an answer; at its end the connection of HTTP/1.1 goes back to the pool. A body that is not read to its end closes it.
struct Streaming {
    incoming: Incoming,
    back: Option<(Https, Pooled)>,
}

impl Stream for Streaming {
    type Item = Result<Bytes, NotSent>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            match ready!(Pin::new(&mut self.incoming).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    // Trailers mean nothing to us.
                    if let Ok(data) = frame.into_data() {
                        return Poll::Ready(Some(Ok(data)));
                    }
                }
                Some(Err(error)) => {
                    self.back = None;
                    return Poll::Ready(Some(Err(broken(&error))));
                }
                None => {
                    if let Some((https, pooled)) = self.back.take() {
                        https.0.pool.put(pooled);
                    }
                    return Poll::Ready(None);
                }
            }
        }
    }
}

/// Lets hyper start the tasks of HTTP/2 through our port.
#[derive(Clone)]
struct Executor(Arc<dyn Tasks>);

impl<F> hyper::rt::Executor<F> for Executor
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, task: F) {
        self.0.spawn(task.boxed());
    }
}
