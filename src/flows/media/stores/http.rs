//! The HTTP of a bucket: requests of the crate that speaks to it go over this server's own client, so that there is one TLS, one way to
//! name servers, and nothing that waits without a bound.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use federation::{
    ports::{Body, NotSent},
    web::{NotAsked, Web},
};
use futures_util::{
    FutureExt, StreamExt,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use http::Request;
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame};
use object_store::{
    ClientOptions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody,
        HttpService,
    },
};
use parking_lot::Mutex;
use url::Url;

use crate::env::Env;

/// An answer begins within this time after its request was begun, which may have a part of several mebibytes.
const BEGINS: Duration = Duration::from_secs(60);
/// Two pieces of an answer are at most this far apart.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// The client that sends the requests.
#[derive(Clone)]
pub(super) struct Client {
    env: Env,
    web: Web,
}

/// A request that was not answered in time.
#[derive(Debug)]
struct TooSlow;

impl fmt::Display for TooSlow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the store did not answer in time")
    }
}

impl std::error::Error for TooSlow {}

impl Client {
    /// Sends requests by this client.
    pub(super) fn new(env: Env, web: Web) -> Self {
        Self { env, web }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client")
    }
}

impl HttpConnector for Client {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

impl HttpService for Client {
    fn call<'c, 'f>(&'c self, request: HttpRequest) -> BoxFuture<'f, Result<HttpResponse, HttpError>>
    where
        'c: 'f,
        Self: 'f,
    {
        self.exchange(request).boxed()
    }
}

impl Client {
    async fn exchange(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (head, body) = request.into_parts();
        let url = Url::parse(&head.uri.to_string());
        let url = url.map_err(|error| HttpError::new(HttpErrorKind::Unknown, error))?;
        // A body is at most one part of an upload, which is in memory already.
        let mut request = Request::new(body.collect().await?.to_bytes());
        *request.method_mut() = head.method;
        *request.headers_mut() = head.headers;
        let answer = tokio::select! {
            biased;
            answer = self.web.send(&url, request) => answer.map_err(not_asked)?,
            () = self.env.sleep(BEGINS) => return Err(HttpError::new(HttpErrorKind::Timeout, TooSlow)),
        };
        let env = self.env.clone();
        Ok(answer.map(|body| HttpResponseBody::new(Answer(Mutex::new(pieces(env, body))))))
    }
}

/// The body of an answer. The lock is never taken: it lets several threads have the body, one after the other.
struct Answer(Mutex<BoxStream<'static, Result<Bytes, HttpError>>>);

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        self.0.get_mut().poll_next_unpin(cx).map_ok(Frame::data)
    }
}

/// The pieces of an answer, none of which is waited for without a bound.
fn pieces(env: Env, body: Body) -> BoxStream<'static, Result<Bytes, HttpError>> {
    let pieces = stream::try_unfold((env, body), |(env, mut body)| async move {
        let next = tokio::select! {
            biased;
            next = body.next() => next,
            () = env.sleep(PAUSE_MAX) => return Err(HttpError::new(HttpErrorKind::Timeout, TooSlow)),
        };
        match next {
            Some(Ok(piece)) => Ok(Some((piece, (env, body)))),
            Some(Err(error)) => Err(HttpError::new(HttpErrorKind::Interrupted, error)),
            None => Ok(None),
        }
    });
    pieces.boxed()
}

fn not_asked(why: NotAsked) -> HttpError {
    let kind = match &why {
        NotAsked::NotFound(_) => HttpErrorKind::Connect,
        NotAsked::NotSent(NotSent::Unreachable(_) | NotSent::TimedOut) => HttpErrorKind::Connect,
        NotAsked::NotSent(NotSent::Broken(_)) => HttpErrorKind::Interrupted,
        NotAsked::NotSent(NotSent::Certificate(_)) | NotAsked::BadUrl => HttpErrorKind::Unknown,
    };
    HttpError::new(kind, why)
}
