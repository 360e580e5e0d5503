//! Answers that are too large for memory, such as files: whoever asked reads the body as it streams in, and bounds it.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http::{HeaderMap, Request, Response, StatusCode, header};
use ruma::ServerName;
use url::Url;

use crate::{
    call::{Caller, Failure, Options, places::Seat},
    ports::{Body, NotSent},
};

/// Redirects from a URL that are followed; more is a loop, or somebody who wants us to work.
const REDIRECTS_MAX: usize = 3;

/// An answer with a status of success, whose body has not come yet.
#[derive(Debug)]
pub struct Streamed {
    /// The headers.
    pub headers: HeaderMap,
    /// The body. Nothing bounds its length or its time but its reader.
    pub body: Body,
}

/// A body that keeps the place of its request until it is dropped.
struct Seated {
    body: Body,
    _seat: Option<Seat>,
}

impl Stream for Seated {
    type Item = Result<Bytes, NotSent>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.body.poll_next_unpin(cx)
    }
}

impl Caller {
    /// Sends one request, whose URI is path and query alone, and gives its answer as soon as it begins. `options` bounds the time until
    /// then, and what is read of a refusal. Errors: [`Failure`]; every status but 2xx is one.
    pub async fn open(
        &self,
        server: &ServerName,
        request: Request<Bytes>,
        options: Options,
    ) -> Result<Streamed, Failure> {
        let opening = async {
            let (seat, response) = self.send_seated(server, request, options).await?;
            self.begun(response, Some(seat), options).await
        };
        tokio::time::timeout(options.overall, opening).await.map_err(|_| Failure::TimedOut)?
    }

    /// Opens a URL that another server has named, with redirects from there. It must be of https, and each host is looked up and guarded
    /// when it is asked. Nothing says who asks. Errors: [`Failure`].
    pub async fn open_url(&self, url: &str, options: Options) -> Result<Streamed, Failure> {
        let opening = async {
            let mut url = parse(url)?;
            for _ in 0..=REDIRECTS_MAX {
                let response = self.get(&url, options).await?;
                if !response.status().is_redirection() {
                    return self.begun(response, None, options).await;
                }
                let to = response.headers().get(header::LOCATION).and_then(|to| to.to_str().ok());
                let to = to.and_then(|to| url.join(to).ok());
                url = parse(to.ok_or_else(|| nonsense("it redirects to nowhere"))?.as_str())?;
            }
            Err(nonsense("it redirects too often"))
        };
        tokio::time::timeout(options.overall, opening).await.map_err(|_| Failure::TimedOut)?
    }

    async fn get(&self, url: &Url, options: Options) -> Result<Response<Body>, Failure> {
        let target = self.0.discovery.locate_url(url).await.map_err(Failure::Nonsense)?;
        let path =
            url.query().map_or_else(|| url.path().to_owned(), |query| format!("{}?{query}", url.path()));
        let request = Request::get(path).header(header::USER_AGENT, super::AGENT).body(Bytes::new());
        let request = request.map_err(|_| nonsense("the URL is none that can be asked for"))?;
        let sending = self.0.ports.transport.send(target, request);
        let sent = tokio::time::timeout(options.begins, sending).await;
        sent.map_err(|_| Failure::TimedOut)?.map_err(Failure::Unreachable)
    }

    /// Gives the body of an answer with a status of success, and reads that of any other.
    async fn begun(
        &self,
        response: Response<Body>,
        seat: Option<Seat>,
        options: Options,
    ) -> Result<Streamed, Failure> {
        // Other successes, such as a part of what was asked for, are none here.
        if response.status() == StatusCode::OK {
            let (head, body) = response.into_parts();
            return Ok(Streamed { headers: head.headers, body: Body::new(Seated { body, _seat: seat }) });
        }
        match self.read(response, options).await {
            Ok(reply) => Err(Failure::Nonsense(format!("status {}", reply.status.as_u16()))),
            Err(failure) => Err(failure),
        }
    }
}

fn parse(url: &str) -> Result<Url, Failure> {
    let url = Url::parse(url).map_err(|_| nonsense("what it names is no URL"))?;
    if url.scheme() != "https" || !url.username().is_empty() || url.password().is_some() {
        return Err(nonsense("the URL that it names is not of https"));
    }
    Ok(url)
}

fn nonsense(why: &str) -> Failure {
    Failure::Nonsense(why.to_owned())
}
