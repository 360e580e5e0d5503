//! The way from a socket to the endpoints: requests in memory, which go through the same door as those over HTTP. So each
//! method has the checks, limits and errors of its endpoint, and no rule stands twice.

use std::{net::IpAddr, sync::Arc, time::Duration};

use axum::{body::Body, extract::Request, response::Response};
use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use http::{HeaderValue, Method, header};
use http_body_util::BodyExt;
use hyper::body::Frame;
use ruma::api::error::ErrorKind;

use crate::{
    accounts::{Caller, tokens, users},
    api::{
        budget::Budget,
        extract::Peer,
        reply::{self, News, Refused},
        socket::{ending::Ending, frames::reader::Counted, places::Sockets},
    },
    env::payer::Payers,
    error::{Error, Refusal, Result},
    flows::App,
};

/// Answers a request of a socket as if it had come over HTTP.
type Serve = dyn Fn(Request) -> BoxFuture<'static, Response> + Send + Sync;

/// The parts of the server that sockets work with. The door of requests puts it into each request that may open one.
#[derive(Clone)]
pub(crate) struct Inward {
    serve: Arc<Serve>,
    budget: Budget,
    /// The sockets that are open.
    pub(super) sockets: Sockets,
}

impl Inward {
    /// The way to what this function serves, with no socket open yet.
    pub(crate) fn new(
        app: &App,
        budget: Budget,
        serve: impl Fn(Request) -> BoxFuture<'static, Response> + Send + Sync + 'static,
    ) -> Self {
        Self { serve: Arc::new(serve), budget, sockets: Sockets::new(app) }
    }
}

/// A client that has a socket, on whose behalf requests are made.
pub(super) struct Session {
    /// The server that the client is connected to.
    pub(super) app: App,
    /// The user who opened the socket.
    pub(super) caller: Caller,
    /// The access token, which is looked at anew for each request.
    token: String,
    peer: IpAddr,
    inward: Inward,
}

/// The answer to a request of a socket.
pub(super) struct Reply {
    /// Whether the request was carried out.
    pub(super) is_ok: bool,
    /// The reason for which the session has ended, as far as the refusal says it.
    pub(super) ending: Option<Ending>,
    /// The time after which a request that came too early may be made again.
    pub(super) retry_after: Option<Duration>,
    /// The facts about an answer of a poll.
    pub(super) news: Option<News>,
    /// The body, which is JSON, in pieces.
    pub(super) body: Vec<Bytes>,
}

impl Session {
    pub(super) fn new(app: App, caller: Caller, token: String, peer: IpAddr, inward: Inward) -> Self {
        Self { app, caller, token, peer, inward }
    }

    /// The budget in which the bytes of the socket count, and for whom.
    pub(super) fn counted(&self) -> Counted {
        let payers = Payers::of_request(Some(self.caller.user), self.peer);
        Counted { budget: self.inward.budget.clone(), payers }
    }

    /// Makes a request to this path, with the token of the session, and reads the whole answer.
    pub(super) fn ask(&self, method: Method, path: &str, body: Bytes) -> BoxFuture<'static, Reply> {
        let app = self.app.clone();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Body::from(body));
        // A path of more bytes than the library reads is refused as one that is longer than the server allows.
        let Ok(mut request) = request else {
            let refused =
                Refusal::too_large("The parameters that stand in the path and the query are too long.");
            return async move { read(&app, reply::refuse(&app, refused.into())).await }.boxed();
        };
        request.extensions_mut().insert(Peer(self.peer));
        if let Ok(mut bearer) = HeaderValue::try_from(["Bearer ", &self.token].concat()) {
            bearer.set_sensitive(true);
            request.headers_mut().insert(header::AUTHORIZATION, bearer);
        }
        let answer = (self.inward.serve)(request);
        async move { read(&app, answer.await).await }.boxed()
    }

    /// The answer to a request that is refused before it reaches an endpoint.
    pub(super) fn refuse(&self, refused: Error) -> BoxFuture<'static, Reply> {
        let app = self.app.clone();
        async move { read(&app, reply::refuse(&app, refused)).await }.boxed()
    }

    /// The reason for which the session has ended. None while the token is good.
    pub(super) fn find_ending(&self) -> Option<Ending> {
        match self.require_good() {
            Ok(()) => None,
            Err(Error::Refused(refusal)) => ending_of(&refusal.kind),
            Err(error) => {
                tracing::error!(%error, "the session of a socket cannot be looked at");
                Some(Ending::Failed)
            }
        }
    }

    /// Refuses a session that has ended, as a request would be refused. A deactivated account is told apart from one that has
    /// logged out, and a token that was refreshed away from one whose device is gone.
    fn require_good(&self) -> Result<()> {
        let snapshot = self.app.store.snapshot();
        let refused = match tokens::find_caller(&*snapshot, self.app.env.now_ms(), &self.token) {
            Ok(caller) if caller.is_locked => return Err(users::locked().into()),
            Ok(_) => return Ok(()),
            Err(refused) => refused,
        };
        let account = users::find(&*snapshot, self.caller.user)?;
        if account.is_none_or(|account| account.is_deactivated) {
            return Err(Refusal::new(ErrorKind::UserDeactivated, "The account was deactivated.").into());
        }
        match refused {
            Error::Refused(mut refusal) => {
                if let ErrorKind::UnknownToken(data) = &mut refusal.kind
                    && tokens::require_session(&*snapshot, &self.caller).is_ok()
                {
                    data.soft_logout = true;
                }
                Err(Error::Refused(refusal))
            }
            other => Err(other),
        }
    }

    /// The time until the access token expires. None for a token that does not.
    pub(super) fn expires_in(&self) -> Result<Option<Duration>> {
        let expires_ms = tokens::find_expiry(&*self.app.store.snapshot(), &self.token)?;
        let now_ms = self.app.env.now_ms();
        Ok(expires_ms.map(|end| Duration::from_millis(end.saturating_sub(now_ms))))
    }
}

/// The end of a session that a refusal speaks of. None for refusals of other things.
fn ending_of(kind: &ErrorKind) -> Option<Ending> {
    match kind {
        ErrorKind::UserLocked => Some(Ending::Locked),
        ErrorKind::UserDeactivated => Some(Ending::Deactivated),
        ErrorKind::UnknownToken(data) if data.soft_logout => Some(Ending::Expired),
        ErrorKind::UnknownToken(_) | ErrorKind::MissingToken => Some(Ending::LoggedOut),
        _ => None,
    }
}

/// Reads the answer to a request. One that breaks off is answered as a fault of the server.
async fn read(app: &App, response: Response) -> Reply {
    let (mut parts, mut body) = response.into_parts();
    let mut pieces = Vec::new();
    while let Some(frame) = body.frame().await {
        match frame.map(Frame::into_data) {
            Ok(Ok(data)) => pieces.push(data),
            Ok(Err(_trailers)) => {}
            Err(_) => {
                let refused = Error::broken("an answer to a socket broke off");
                (parts, body) = reply::refuse(app, refused).into_parts();
                pieces.clear();
            }
        }
    }
    let retry_after = parts.headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let retry_after = retry_after.and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
    Reply {
        is_ok: parts.status.is_success(),
        ending: parts.extensions.remove::<Refused>().and_then(|Refused(kind)| ending_of(&kind)),
        retry_after,
        news: parts.extensions.remove::<News>(),
        body: pieces,
    }
}
