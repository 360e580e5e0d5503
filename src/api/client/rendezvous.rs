//! The rendezvous of two devices while one logs the other in by a QR code: MSC4108 in its form of 2024, and MSC4388.
//!
//! Sessions of MSC4108 are begun by anybody, so that they are there only where the setting says "everybody". Nobody reads a payload by
//! opening its address in a browser, so that nothing harmful is spread under this server's name.

use bytes::Bytes;
use http::{HeaderMap, header};
use serde::Deserialize;
use serde_json::json;

use crate::{
    accounts::{
        Caller,
        rendezvous::{Kind, PAYLOAD_BYTES_MAX, Seen, Written},
    },
    api::{
        Routes,
        extract::{MaybeClient, Public},
        policy::{Body, KIB},
        raw::Raw,
        reply::{self, Meeting, Met, RawJson},
    },
    config::RendezvousMode,
    env::payer::Payers,
    error::{Exception, Refusal, Result},
    flows::{App, limits::Limit},
    json::Object,
};

pub(crate) fn routes(r: &mut Routes) {
    r.public(open_4108).limit(Limit::Register).body(Body::Raw(PAYLOAD_BYTES_MAX));
    r.public(look_4108).limit(Limit::Read);
    r.public(write_4108).limit(Limit::Other).body(Body::Raw(PAYLOAD_BYTES_MAX));
    r.public(end_4108).limit(Limit::Other);
    r.maybe_client(discover).limit(Limit::Read);
    // Each byte of a payload may be an escape of six bytes.
    r.maybe_client(open_4388).limit(Limit::Register).body(Body::Json(32 * KIB));
    r.public(look_4388).limit(Limit::Read);
    r.public(write_4388).limit(Limit::Other).body(Body::Json(32 * KIB));
    r.public(end_4388).limit(Limit::Other);
}

/// The path at which sessions of MSC4108 are begun.
const OF_4108: &str = "/_matrix/client/unstable/org.matrix.msc4108/rendezvous";
/// The path of one of these sessions.
const ONE_OF_4108: &str = "/_matrix/client/unstable/org.matrix.msc4108/rendezvous/{session_id}";
/// The path at which sessions of MSC4388 are begun.
const OF_4388: &str = "/_matrix/client/unstable/io.element.msc4388/rendezvous";
/// The path of one of these sessions.
const ONE_OF_4388: &str = "/_matrix/client/unstable/io.element.msc4388/rendezvous/{rendezvous_id}";

endpoint!(
    /// The endpoint that begins a session of MSC4108.
    Open4108, POST, OF_4108
);
endpoint!(
    /// The endpoint that reads the payload of a session of MSC4108.
    Look4108, GET, ONE_OF_4108
);
endpoint!(
    /// The endpoint that writes the payload of a session of MSC4108.
    Write4108, PUT, ONE_OF_4108
);
endpoint!(
    /// The endpoint that ends a session of MSC4108.
    End4108, DELETE, ONE_OF_4108
);
endpoint!(
    /// The endpoint that says whether the caller may begin a session of MSC4388.
    Discover, GET, OF_4388
);
endpoint!(
    /// The endpoint that begins a session of MSC4388.
    Open4388, POST, OF_4388
);
endpoint!(
    /// The endpoint that reads the payload of a session of MSC4388.
    Look4388, GET, ONE_OF_4388
);
endpoint!(
    /// The endpoint that writes the payload of a session of MSC4388.
    Write4388, PUT, ONE_OF_4388
);
endpoint!(
    /// The endpoint that ends a session of MSC4388.
    End4388, DELETE, ONE_OF_4388
);

/// Refuses requests of a proposal that the setting does not allow, as if there were no such endpoint: 404 `M_UNRECOGNIZED`.
fn require_served(app: &App, kind: Kind) -> Result<()> {
    match (app.config.rendezvous.mode, kind) {
        (RendezvousMode::Everybody, _) | (RendezvousMode::Users, Kind::Msc4388) => Ok(()),
        (RendezvousMode::Off, _) | (RendezvousMode::Users, Kind::Msc4108) => {
            Err(reply::no_such_endpoint().into())
        }
    }
}

/// Refuses a request that a browser makes because somebody opened the address in it: 403 `M_FORBIDDEN`.
fn require_script(headers: &HeaderMap) -> Result<()> {
    let says = |name: &str, value: &str| headers.get(name).is_some_and(|said| said == value);
    let is_page = ["document", "iframe", "frame", "embed", "object"];
    if says("sec-fetch-mode", "navigate") || is_page.iter().any(|page| says("sec-fetch-dest", page)) {
        return Err(
            Refusal::forbidden("The payload of a rendezvous is for programs and not for browsing.").into()
        );
    }
    Ok(())
}

/// Requires a payload that says it is plain text. Errors: 400 `M_MISSING_PARAM`, 400 `M_INVALID_PARAM`.
fn require_plain(headers: &HeaderMap) -> Result<()> {
    let Some(kind) = headers.get(header::CONTENT_TYPE) else {
        return Err(
            Refusal::missing_param("The header `Content-Type` is missing; it must be text/plain.").into()
        );
    };
    let kind = kind.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("text/plain") {
        return Err(Refusal::invalid_param("The header `Content-Type` must be text/plain.").into());
    }
    Ok(())
}

/// The entity tag of a payload, as header fields have it: a token between quotes. A token has letters and digits alone.
fn tag(seen: &Seen) -> String {
    let mut tag = String::from('"');
    tag.push_str(&seen.token);
    tag.push('"');
    tag
}

fn met(met: Met, seen: &Seen) -> Meeting {
    Meeting { met, tag: tag(seen), changed_ms: seen.changed_ms, ends_ms: seen.ends_ms }
}

/// `POST /_matrix/client/unstable/org.matrix.msc4108/rendezvous`
pub(crate) async fn open_4108(app: App, client: Public<Raw<Open4108>>) -> Result<Meeting> {
    require_served(&app, Kind::Msc4108)?;
    require_plain(&client.request.headers)?;
    let payers = Payers::of_request(None, client.peer);
    let board = app.accounts.rendezvous();
    let (id, seen) = board.open(&app.env, Kind::Msc4108, payers, client.request.bytes.clone())?;
    let base = app.config.server.public_base_url.trim_end_matches('/');
    let mut answer = Object::new();
    answer.text("url", &format!("{base}{OF_4108}/{id}"));
    Ok(met(Met::Opened(answer.finish().into()), &seen))
}

/// `GET /_matrix/client/unstable/org.matrix.msc4108/rendezvous/{sessionId}`
pub(crate) async fn look_4108(app: App, client: Public<Raw<Look4108>>) -> Result<Meeting> {
    require_served(&app, Kind::Msc4108)?;
    let headers = &client.request.headers;
    require_script(headers)?;
    let seen = app.accounts.rendezvous().look(&app.env, Kind::Msc4108, client.request.arg(0))?;
    let is_known = headers.get(header::IF_NONE_MATCH).is_some_and(|known| *known == tag(&seen));
    let told = if is_known { Met::Unchanged } else { Met::Told(seen.payload.clone()) };
    Ok(met(told, &seen))
}

/// `PUT /_matrix/client/unstable/org.matrix.msc4108/rendezvous/{sessionId}`
pub(crate) async fn write_4108(app: App, client: Public<Raw<Write4108>>) -> Result<Meeting> {
    require_served(&app, Kind::Msc4108)?;
    let headers = &client.request.headers;
    require_plain(headers)?;
    let known = headers.get(header::IF_MATCH).ok_or_else(|| {
        Refusal::missing_param(
            "The header `If-Match` is missing: the `ETag` of the payload that was read last.",
        )
    })?;
    let token = known.to_str().ok().and_then(|tag| tag.strip_prefix('"')?.strip_suffix('"'));
    let token = token.ok_or_else(|| {
        Refusal::invalid_param("The header `If-Match` must be one `ETag`, as this server has given it.")
    })?;
    let board = app.accounts.rendezvous();
    let (id, payload) = (client.request.arg(0), client.request.bytes.clone());
    match board.write(&app.env, Kind::Msc4108, id, token, payload)? {
        Written::Done(seen) => Ok(met(Met::Written, &seen)),
        Written::Overtaken(seen) => Ok(met(Met::Overtaken, &seen)),
    }
}

/// `DELETE /_matrix/client/unstable/org.matrix.msc4108/rendezvous/{sessionId}`
pub(crate) async fn end_4108(app: App, client: Public<Raw<End4108>>) -> Result<reply::Gone> {
    require_served(&app, Kind::Msc4108)?;
    app.accounts.rendezvous().end(&app.env, Kind::Msc4108, client.request.arg(0))?;
    Ok(reply::Gone)
}

/// Whether this caller may begin a session of MSC4388.
fn may_open(app: &App, caller: Option<&Caller>) -> bool {
    match app.config.rendezvous.mode {
        RendezvousMode::Off => false,
        RendezvousMode::Users => caller.is_some_and(|caller| !caller.is_guest),
        RendezvousMode::Everybody => true,
    }
}

/// `GET /_matrix/client/unstable/io.element.msc4388/rendezvous`
pub(crate) async fn discover(app: App, client: MaybeClient<Raw<Discover>>) -> Result<RawJson> {
    require_served(&app, Kind::Msc4388)?;
    let mut answer = Object::new();
    answer.flag("create_available", may_open(&app, client.caller.as_ref()));
    Ok(RawJson(answer.finish().into()))
}

#[derive(Deserialize)]
struct ToOpen {
    data: String,
}

fn left_ms(app: &App, seen: &Seen) -> u64 {
    seen.ends_ms.saturating_sub(app.env.now_ms())
}

/// `POST /_matrix/client/unstable/io.element.msc4388/rendezvous`
pub(crate) async fn open_4388(app: App, client: MaybeClient<Raw<Open4388>>) -> Result<RawJson> {
    require_served(&app, Kind::Msc4388)?;
    let body: ToOpen = client.request.json()?;
    if !may_open(&app, client.caller.as_ref()) {
        return Err(Refusal::forbidden("Only users of this server may begin a rendezvous here.").into());
    }
    let payers = Payers::of_request(client.caller.as_ref().map(|caller| caller.user), client.peer);
    let board = app.accounts.rendezvous();
    let (id, seen) = board.open(&app.env, Kind::Msc4388, payers, body.data.into())?;
    let mut answer = Object::new();
    answer.text("id", &id);
    answer.text("sequence_token", &seen.token);
    answer.number("expires_in_ms", left_ms(&app, &seen));
    Ok(RawJson(answer.finish().into()))
}

/// `GET /_matrix/client/unstable/io.element.msc4388/rendezvous/{rendezvousId}`
pub(crate) async fn look_4388(app: App, client: Public<Raw<Look4388>>) -> Result<RawJson> {
    require_served(&app, Kind::Msc4388)?;
    require_script(&client.request.headers)?;
    let seen = app.accounts.rendezvous().look(&app.env, Kind::Msc4388, client.request.arg(0))?;
    let mut answer = Object::new();
    answer.text("data", std::str::from_utf8(&seen.payload).unwrap_or_default());
    answer.text("sequence_token", &seen.token);
    answer.number("expires_in_ms", left_ms(&app, &seen));
    Ok(RawJson(answer.finish().into()))
}

#[derive(Deserialize)]
struct ToWrite {
    sequence_token: String,
    data: String,
}

/// The refusal for a payload that somebody else has overtaken: 409.
fn overtaken() -> Refusal {
    let message = "Somebody else has written meanwhile: read that first.";
    let mut refusal = Refusal::new(ruma::api::error::ErrorKind::Unknown, message).exception(Exception::Taken);
    // The proposal names the code like this as long as it is not part of the specification.
    refusal.body = Some(json!({ "errcode": "IO_ELEMENT_MSC4388_CONCURRENT_WRITE", "error": message }));
    refusal
}

/// `PUT /_matrix/client/unstable/io.element.msc4388/rendezvous/{rendezvousId}`
pub(crate) async fn write_4388(app: App, client: Public<Raw<Write4388>>) -> Result<RawJson> {
    require_served(&app, Kind::Msc4388)?;
    let body: ToWrite = client.request.json()?;
    let (board, id) = (app.accounts.rendezvous(), client.request.arg(0));
    let payload = Bytes::from(body.data);
    match board.write(&app.env, Kind::Msc4388, id, &body.sequence_token, payload)? {
        Written::Done(seen) => {
            let mut answer = Object::new();
            answer.text("sequence_token", &seen.token);
            Ok(RawJson(answer.finish().into()))
        }
        Written::Overtaken(_) => Err(overtaken().into()),
    }
}

/// `DELETE /_matrix/client/unstable/io.element.msc4388/rendezvous/{rendezvousId}`
pub(crate) async fn end_4388(app: App, client: Public<Raw<End4388>>) -> Result<RawJson> {
    require_served(&app, Kind::Msc4388)?;
    app.accounts.rendezvous().end(&app.env, Kind::Msc4388, client.request.arg(0))?;
    Ok(RawJson(Object::new().finish().into()))
}
