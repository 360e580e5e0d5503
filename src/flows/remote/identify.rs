//! Finds out which server has made a request (server-server API, "Request authentication").

use std::time::Duration;

use bytes::Bytes;
use federation::{
    json::{Canonical, NotJson, parts},
    keys::{KeyFailure, Purpose, Wanted},
    xmatrix::{self, Credentials, Signed, header},
};
use http::{HeaderValue, header::AUTHORIZATION, request::Parts};
use ruma::{OwnedServerName, api::error::ErrorKind};

use crate::{
    env::payer,
    error::{Error, Refusal, Result},
    flows::{App, remote::strangers::Stranger},
};

/// A server whose keys cannot be had now is told to try again after this time.
const KEYS_RETRY: Duration = Duration::from_secs(60);
/// A body of more bytes than this is never a tree as a whole, because a tree takes many times the bytes that it was made from.
const READ_WHOLE_BYTES_MAX: usize = 64 << 10;

/// Reads who says that they made a request, before its body is read. Refuses a request that nobody has signed, that is meant
/// for another server, or whose sender this server does not talk with: 401 `M_UNAUTHORIZED`, 403 `M_FORBIDDEN`.
pub(crate) fn claimed(app: &App, parts: &Parts) -> Result<Credentials> {
    require_federation(app)?;
    let values = parts.headers.get_all(AUTHORIZATION).iter().map(HeaderValue::as_bytes);
    let credentials = header::parse(values).map_err(|why| refuse(&why.into()))?;
    let credentials = credentials.ok_or_else(|| refuse(&xmatrix::Refusal::Missing))?;
    let us = &app.config.server.name;
    if let Some(other) = credentials.destination.as_ref().filter(|it| it.as_str() != us.as_str()) {
        return Err(refuse(&xmatrix::Refusal::WrongDestination(other.clone())));
    }
    if !app.remote.client.caller().servers().allows(&credentials.origin) {
        return Err(refuse(&xmatrix::Refusal::NotAllowed(credentials.origin)));
    }
    Ok(credentials)
}

/// Checks the signature of a request over its body, and gives the server that made it. Errors: as for [`claimed`]; 400
/// `M_NOT_JSON` for a body that is not JSON; [`Error::Busy`] where the keys of that server cannot be had now.
pub(crate) async fn prove(
    app: &App,
    credentials: &Credentials,
    parts: &Parts,
    body: &Bytes,
) -> Result<OwnedServerName> {
    let content = content(app, body).await?;
    let uri = parts.uri.path_and_query().map_or("/", |uri| uri.as_str());
    let signed = Signed { method: parts.method.as_str(), uri, content: content.as_ref() };
    let _stranger = let_in(app, credentials).await?;
    let proved = xmatrix::verify(&app.remote.ring, credentials, signed).await;
    proved.map_err(|why| {
        tracing::debug!(origin = %credentials.origin, %why, "a request of another server is refused");
        refuse(&why)
    })
}

/// Takes a place for asking for the keys of the server in whose name a request comes, if none of them is known. Errors:
/// [`Error::Busy`] where the request's address has named too many such servers.
async fn let_in(app: &App, credentials: &Credentials) -> Result<Option<Stranger>> {
    let Credentials { origin, signatures, .. } = credentials;
    for (key_id, _) in signatures {
        let (server, key_id) = (origin.clone(), key_id.clone());
        if app.remote.ring.has(&Wanted { server, key_id, purpose: Purpose::Request }).await {
            return Ok(None);
        }
    }
    let place = app.remote.strangers.let_in(payer::current(), origin);
    Ok(Some(place.ok_or(Error::Busy { retry_after: KEYS_RETRY })?))
}

/// Writes the body as it is signed. Nobody knows yet who sent it, so that a large one is read in parts, off the async threads.
async fn content(app: &App, body: &Bytes) -> Result<Option<Canonical>> {
    if body.len() > READ_WHOLE_BYTES_MAX {
        let body = body.clone();
        return app.env.blocking(move || parts::canonical(&body).map(Some).map_err(not_json)).await;
    }
    let content = (!body.is_empty()).then(|| Canonical::of(body));
    content.transpose().map_err(not_json)
}

/// Refuses whatever concerns other servers where this one shares no rooms with others: 403 `M_FORBIDDEN`.
pub(crate) fn require_federation(app: &App) -> Result<()> {
    if app.config.federation.enabled {
        return Ok(());
    }
    Err(Refusal::forbidden("This server shares no rooms with other servers.").into())
}

fn not_json(why: NotJson) -> Error {
    Refusal::new(ErrorKind::NotJson, format!("The body is {why}.")).into()
}

/// Turns the reason into an answer. Nobody is told what this server found on its way to another one: the name in a request is
/// anybody's word, and the answer would say which names and ports there are in this server's own network.
fn refuse(why: &xmatrix::Refusal) -> Error {
    let kind = match why {
        xmatrix::Refusal::NotAllowed(_) => ErrorKind::Forbidden,
        xmatrix::Refusal::UnknownKey(KeyFailure::Store(failed)) => return Error::broken(failed.to_string()),
        xmatrix::Refusal::UnknownKey(KeyFailure::Unavailable { .. }) => {
            return Error::Busy { retry_after: KEYS_RETRY };
        }
        xmatrix::Refusal::Missing
        | xmatrix::Refusal::Malformed(_)
        | xmatrix::Refusal::WrongDestination(_)
        | xmatrix::Refusal::UnknownKey(KeyFailure::Unknown { .. } | KeyFailure::NotValid { .. })
        | xmatrix::Refusal::BadSignature(_) => ErrorKind::Unauthorized,
    };
    Refusal::new(kind, format!("The request is not accepted: {why}.")).into()
}
