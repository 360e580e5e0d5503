//! Asking a host for `/.well-known/matrix/server`
//! ([step 3](https://spec.matrix.org/v1.19/server-server-api/#resolving-server-names)).
//!
//! The host may be anyone's, so that the request goes only to addresses that the guard admits, each redirect anew; the answer
//! is small, the number of redirects and the time are bounded.

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;
use futures_util::StreamExt;
use http::{HeaderMap, StatusCode, header};
use url::Url;

use crate::{
    discovery::{Parts, freshness::kept_ms, name::Name},
    json::Json,
    ports::Body,
};

/// The largest body that is read.
const BODY_BYTES_MAX: usize = 50 * 1024;
/// Redirects that are followed; more is a loop, or somebody who wants us to work.
const REDIRECTS_MAX: usize = 5;
/// One request, with connecting and the whole body.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// All requests of one look-up.
const TIMEOUT: Duration = Duration::from_secs(25);
const PATH: &str = "/.well-known/matrix/server";

/// What a host answered.
#[derive(Clone, Debug)]
pub(super) enum Asked {
    /// It delegates to this server.
    Delegates {
        to: Name,
        /// The answer may be kept this long.
        kept_ms: u64,
    },
    /// It does not delegate: it answered, but not with what the specification asks for.
    No {
        why: String,
        /// It may be asked again after this time.
        kept_ms: u64,
    },
    /// It did not answer, or cannot at the moment.
    Failed { why: String },
}

/// Asks a host. Errors are answers, too: discovery goes on without the delegation.
pub(super) async fn ask(parts: &Parts, host: &str) -> Asked {
    let asked = tokio::time::timeout(TIMEOUT, follow(parts, host)).await;
    asked.unwrap_or_else(|_| Asked::Failed { why: "the answer took too long".to_owned() })
}

async fn follow(parts: &Parts, host: &str) -> Asked {
    let no = |why: String| Asked::No { why, kept_ms: kept_ms(&HeaderMap::new(), 0) };
    let Ok(mut url) = Url::parse(&format!("https://{host}{PATH}")) else {
        return no("the host makes no URL".to_owned());
    };
    let mut seen = BTreeSet::new();
    for _ in 0..=REDIRECTS_MAX {
        if !seen.insert(url.to_string()) {
            return no("the redirects go round in circles".to_owned());
        }
        let asked = tokio::time::timeout(REQUEST_TIMEOUT, request(parts, &url)).await;
        let response = match asked {
            Ok(Ok(response)) => response,
            Ok(Err(failed)) => return failed,
            Err(_) => return Asked::Failed { why: "the answer took too long".to_owned() },
        };
        let (status, headers, body) = response;
        if !is_redirect(status) {
            return judge(status, &headers, &body, parts.ports.clock.now_ms());
        }
        url = match redirected(&url, &headers) {
            Ok(url) => url,
            Err(why) => return no(why),
        };
    }
    no(format!("it redirects more than {REDIRECTS_MAX} times"))
}

type Response = (StatusCode, HeaderMap, Bytes);

async fn request(parts: &Parts, url: &Url) -> Result<Response, Asked> {
    let failed = |why: String| Asked::Failed { why };
    let target = parts.hosts.find_url(url).await.map_err(|error| failed(error.to_string()))?;
    let path = url.query().map_or_else(|| url.path().to_owned(), |query| format!("{}?{query}", url.path()));
    let request = http::Request::get(path)
        .header(header::ACCEPT, "application/json")
        .body(Bytes::new())
        .map_err(|_| failed("the redirect leads to no URL that can be asked for".to_owned()))?;
    let response =
        parts.ports.transport.send(target, request).await.map_err(|error| failed(error.to_string()))?;
    let (head, body) = response.into_parts();
    if is_redirect(head.status) {
        return Ok((head.status, head.headers, Bytes::new()));
    }
    let body = read(body).await.map_err(failed)?;
    Ok((head.status, head.headers, body))
}

/// Reads up to one byte more than is allowed, so that a body which is too long can be told from one that is not.
async fn read(mut body: Body) -> Result<Bytes, String> {
    let mut bytes = Vec::new();
    while bytes.len() <= BODY_BYTES_MAX
        && let Some(piece) = body.next().await
    {
        let piece = piece.map_err(|error| error.to_string())?;
        let left = (BODY_BYTES_MAX + 1).saturating_sub(bytes.len());
        bytes.extend(piece.iter().take(left));
    }
    Ok(bytes.into())
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Where a redirect leads. It must stay on HTTPS: over HTTP anyone on the way could name another server.
fn redirected(from: &Url, headers: &HeaderMap) -> Result<Url, String> {
    let location = headers.get(header::LOCATION).ok_or("it redirects to nowhere")?;
    let location = location.to_str().map_err(|_| "it redirects to what is no URL")?;
    let mut url = from.join(location).map_err(|_| "it redirects to what is no URL")?;
    if url.scheme() != "https" {
        return Err("it redirects to a URL without TLS".to_owned());
    }
    url.set_fragment(None);
    Ok(url)
}

/// What the answer says.
fn judge(status: StatusCode, headers: &HeaderMap, body: &[u8], now_ms: u64) -> Asked {
    // A server that is overloaded or broken may delegate all the same, once it can answer.
    if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
        return Asked::Failed { why: format!("it answered {}", status.as_u16()) };
    }
    let kept_ms = kept_ms(headers, now_ms);
    match delegated(status, body) {
        Ok(to) => Asked::Delegates { to, kept_ms },
        Err(why) => Asked::No { why, kept_ms },
    }
}

fn delegated(status: StatusCode, body: &[u8]) -> Result<Name, String> {
    if status != StatusCode::OK {
        return Err(format!("it answered {}", status.as_u16()));
    }
    if body.len() > BODY_BYTES_MAX {
        return Err(format!("the answer has more than {BODY_BYTES_MAX} bytes"));
    }
    let json = Json::parse(body).map_err(|error| error.to_string())?;
    let field = json.field("m.server").ok_or("m.server is missing")?;
    let server = field.as_text().ok_or("m.server is not a string")?;
    Name::parse(server).map_err(|why| format!("m.server is not a server's name: {why}"))
}
