//! Turns HTTP into a typed request. The type says who may call: [`Public`], [`MaybeClient`], [`Client`], [`Admin`],
//! [`Appservice`], [`Server`]. Its parameter says how the request is read: as a request of ruma's, or as [`Raw`].
//!
//! The caller is known before the body is read, so that strangers cannot make the server receive large bodies.

use std::net::{IpAddr, Ipv4Addr};

use axum::{
    body::Body as Unread,
    extract::{FromRequestParts, RawPathParams, Request},
};
use bytes::Bytes;
use federation::xmatrix::Credentials;
use futures_util::FutureExt;
use http::{Method, header, request::Parts};
use http_body_util::Limited;
use ruma::{
    OwnedServerName,
    api::{
        IncomingRequest, IncomingRequestExt, Metadata,
        auth_scheme::{AccessTokenOptional, AuthScheme},
        error::ErrorKind,
        path_builder::PathBuilder,
    },
};

use crate::{
    accounts::{self, Caller, users},
    api::{
        checked::Checked,
        misfit,
        policy::{Body, Guests, Policy, Suspended, Who, Wish},
        raw::{Content, Raw},
        receive::Receiver,
    },
    error::{Error, Refusal, Result},
    flows::{self, App, limits::Limit, limits::Source, remote::identify},
    ids::UserNum,
};

/// A request that anybody may make.
#[derive(Debug)]
pub struct Public<R> {
    /// The request, as the handler reads it.
    pub request: R,
    /// The address that it came from.
    pub peer: IpAddr,
}

/// A request with a valid access token.
#[derive(Debug)]
pub struct Client<R> {
    /// The user who asks.
    pub caller: Caller,
    /// The request, as the handler reads it.
    pub request: R,
    /// The address that it came from.
    pub peer: IpAddr,
}

/// A request with a valid access token or none.
#[derive(Debug)]
pub struct MaybeClient<R> {
    /// The user who asks, if the request has a token.
    pub caller: Option<Caller>,
    /// The request, as the handler reads it.
    pub request: R,
    /// The address that it came from.
    pub peer: IpAddr,
}

/// A request with a valid access token of an account that administers this server.
#[derive(Debug)]
pub struct Admin<R> {
    /// The user who asks.
    pub caller: Caller,
    /// The request, as the handler reads it.
    pub request: R,
    /// The address that it came from.
    pub peer: IpAddr,
}

/// A request of an application service.
#[derive(Debug)]
pub struct Appservice<R> {
    /// The id of the service, from its registration.
    pub service: String,
    /// The user as whom the service asks, if it names one.
    pub masquerades_as: Option<Caller>,
    /// The request, as the handler reads it.
    pub request: R,
    /// The address that it came from.
    pub peer: IpAddr,
}

/// A request that another server has signed.
#[derive(Debug)]
pub struct Server<R> {
    /// The name of the server that has signed the request.
    pub origin: OwnedServerName,
    /// The request, as the handler reads it.
    pub request: R,
    /// The address that it came from.
    pub peer: IpAddr,
}

/// The sender of a request, as its head says.
#[derive(Debug)]
pub enum Asker {
    /// Somebody who has sent neither token nor signature, or who was not asked for one.
    Nobody,
    /// A user, by an access token.
    User(Caller),
    /// An application service by its id, and the user as whom it asks.
    Appservice(String, Option<Caller>),
    /// A server that says it has signed the request; the signature covers the body, so that it is checked once that is read.
    Claimed(Credentials),
    /// Another server, by its signature.
    Server(OwnedServerName),
}

/// A method and its paths, in ruma's form: parameters stand in braces.
pub trait Endpoint {
    /// The method by which it is called.
    fn method() -> Method;
    /// The paths at which it is found.
    fn paths() -> Vec<&'static str>;
}

impl<R: Metadata> Endpoint for R {
    fn method() -> Method {
        R::METHOD
    }

    fn paths() -> Vec<&'static str> {
        R::PATH_BUILDER.all_paths().collect()
    }
}

/// The form in which a handler takes a request, in place of HTTP: a request of ruma's, or [`Raw`].
pub trait Asked: Sized + Send + 'static {
    /// The endpoint whose method and paths the request has.
    type Endpoint: Endpoint;

    /// Reads the request. Refuses a request that does not fit the endpoint.
    fn read(parts: Parts, path: Vec<String>, body: Content) -> Result<Self>;
}

impl<R: IncomingRequest + Send + 'static> Asked for R {
    type Endpoint = R;

    fn read(parts: Parts, path: Vec<String>, body: Content) -> Result<Self> {
        let args: Vec<_> = path.iter().map(String::as_str).collect();
        R::try_from_http_request(http::Request::from_parts(parts, body.json.as_ref()), &args)
            .map_err(|error| misfit::of_request(error).into())
    }
}

impl<E: Endpoint + 'static> Asked for Raw<E> {
    type Endpoint = E;

    fn read(parts: Parts, path: Vec<String>, body: Content) -> Result<Self> {
        Ok(Self::new(path, parts, body))
    }
}

/// The argument of a handler: the caller, together with the request.
pub trait Arrival: Sized + Send + 'static {
    /// The kind of caller that may ask.
    const WHO: Who;
    /// The form in which the handler takes the request.
    type Asked: Asked;

    /// Puts caller and request together. Refuses another kind of caller: 401.
    fn new(asker: Asker, request: Self::Asked, peer: IpAddr) -> Result<Self>;
}

impl<R: Asked> Arrival for Public<R> {
    const WHO: Who = Who::Public;
    type Asked = R;

    fn new(_asker: Asker, request: R, peer: IpAddr) -> Result<Self> {
        Ok(Self { request, peer })
    }
}

impl<R: Asked> Arrival for MaybeClient<R> {
    const WHO: Who = Who::MaybeClient;
    type Asked = R;

    fn new(asker: Asker, request: R, peer: IpAddr) -> Result<Self> {
        let caller = if let Asker::User(caller) = asker { Some(caller) } else { None };
        Ok(Self { caller, request, peer })
    }
}

impl<R: Asked> Arrival for Client<R> {
    const WHO: Who = Who::Client;
    type Asked = R;

    fn new(asker: Asker, request: R, peer: IpAddr) -> Result<Self> {
        let Asker::User(caller) = asker else { return Err(missing_token()) };
        Ok(Self { caller, request, peer })
    }
}

impl<R: Asked> Arrival for Admin<R> {
    const WHO: Who = Who::Admin;
    type Asked = R;

    fn new(asker: Asker, request: R, peer: IpAddr) -> Result<Self> {
        let Asker::User(caller) = asker else { return Err(missing_token()) };
        Ok(Self { caller, request, peer })
    }
}

impl<R: Asked> Arrival for Appservice<R> {
    const WHO: Who = Who::Appservice;
    type Asked = R;

    fn new(asker: Asker, request: R, peer: IpAddr) -> Result<Self> {
        let Asker::Appservice(service, masquerades_as) = asker else { return Err(missing_token()) };
        Ok(Self { service, masquerades_as, request, peer })
    }
}

impl<R: Asked> Arrival for Server<R> {
    const WHO: Who = Who::Server;
    type Asked = R;

    fn new(asker: Asker, request: R, peer: IpAddr) -> Result<Self> {
        let Asker::Server(origin) = asker else { return Err(unsigned()) };
        Ok(Self { origin, request, peer })
    }
}

/// The address that a request came from. The listener puts it into the request's extensions.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub IpAddr);

/// The address that a request came from; `0.0.0.0` if nobody knows.
pub(crate) fn peer(extensions: &http::Extensions) -> IpAddr {
    extensions.get::<Peer>().map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |peer| peer.0)
}

/// A request on its way to its handler: first its caller is identified, then its body is read.
pub(crate) struct Call {
    parts: Parts,
    unread: Unread,
    asker: Asker,
    peer: IpAddr,
    /// The parameters of the path, decoded.
    path: Vec<String>,
    body: Bytes,
    mode: Body,
    suspended: Suspended,
}

/// A body of more bytes than this is checked and read off the async threads, because that takes long enough to delay
/// other requests.
const READ_IN_PLACE_BYTES_MAX: usize = 32 << 10;

impl Call {
    /// Finds out who asks, without a look at the body. Refuses a token or signature that is missing or not valid (401),
    /// and callers who may not call this endpoint (403).
    pub(crate) fn begin(app: &App, policy: &Policy, request: Request) -> Result<Self> {
        let (mut parts, unread) = request.into_parts();
        let peer = peer(&parts.extensions);
        let asker = identify(app, policy.who, &parts)?;
        if let Asker::User(caller) = &asker {
            if caller.is_locked && !policy.is_for_locked {
                return Err(users::locked().into());
            }
            if matches!(policy.suspended, Suspended::No) && caller.is_suspended {
                return Err(users::suspended().into());
            }
            if policy.guests == Guests::No && caller.is_guest {
                return Err(guests_refused().into());
            }
            if policy.who == Who::Admin && !caller.is_admin {
                return Err(Refusal::forbidden("Only admins of this server can do this.").into());
            }
        }
        let path = path_args(&mut parts)?;
        Ok(Self {
            parts,
            unread,
            asker,
            peer,
            path,
            body: Bytes::new(),
            mode: policy.body,
            suspended: policy.suspended,
        })
    }

    /// The user whose request it is, if a token named one.
    pub(crate) fn caller(&self) -> Option<&Caller> {
        match &self.asker {
            Asker::User(caller) | Asker::Appservice(_, Some(caller)) => Some(caller),
            Asker::Nobody | Asker::Appservice(_, None) | Asker::Claimed(_) | Asker::Server(_) => None,
        }
    }

    /// Whether the caller has proven who they are: by a token, or by a signature that was checked.
    pub(crate) fn is_known(&self) -> bool {
        match &self.asker {
            Asker::User(_) | Asker::Appservice(..) | Asker::Server(_) => true,
            Asker::Nobody | Asker::Claimed(_) => false,
        }
    }

    /// The account whose request it is.
    pub(crate) fn user(&self) -> Option<UserNum> {
        self.caller().map(|caller| caller.user)
    }

    /// The parameters of the path, decoded.
    pub(crate) fn path(&self) -> &[String] {
        &self.path
    }

    /// The device, user or address that a rate limit counts this request for.
    pub(crate) fn source(&self, limit: Limit) -> Source {
        match (self.caller(), limit) {
            (Some(caller), Limit::Sync) => Source::Device(caller.user, caller.device),
            (Some(caller), _) => Source::User(caller.user),
            (None, _) => Source::address(self.peer),
        }
    }

    /// Notes when and from where the caller was last seen.
    pub(crate) async fn note_caller(&mut self, app: &App) -> Result<()> {
        match self.caller() {
            Some(caller) => {
                let agent = self.parts.headers.get(header::USER_AGENT).and_then(|agent| agent.to_str().ok());
                flows::account::seen::seen(app, caller, self.peer, agent).await
            }
            None => Ok(()),
        }
    }

    /// Takes the body into memory, if the route reads it that way.
    pub(crate) async fn read_body(&mut self, app: &App, receiver: Receiver<'_>) -> Result<()> {
        let bytes_max = self.mode.in_memory_max();
        if bytes_max > 0 {
            let unread = std::mem::take(&mut self.unread);
            self.body = receiver.receive(app, unread, bytes_max).await?;
        }
        Ok(())
    }

    /// Checks the signature of a request that another server says it has made, once its body is read. Refuses it as
    /// [`identify::prove`] does.
    pub(crate) async fn prove_origin(&mut self, app: &App) -> Result<()> {
        if let Asker::Claimed(credentials) = &self.asker {
            let origin = identify::prove(app, credentials, &self.parts, &self.body).await?;
            app.delivery.heard_from(&origin);
            self.asker = Asker::Server(origin);
        }
        Ok(())
    }

    /// Turns the call into the argument of its handler. A large body is checked and read off the async threads.
    pub(crate) async fn arrive<T: Arrival>(self, app: &App) -> Result<T> {
        if self.body.len() > READ_IN_PLACE_BYTES_MAX {
            app.env.blocking(move || self.read()).await
        } else {
            self.read()
        }
    }

    fn read<T: Arrival>(self) -> Result<T> {
        let mut content = Content { json: Checked::empty(), raw: Bytes::new(), stream: Unread::empty() };
        match self.mode {
            Body::None => {}
            Body::Raw(_) => content.raw = self.body,
            Body::Streamed(bytes_max) => content.stream = Unread::new(Limited::new(self.unread, bytes_max)),
            // An empty body counts as an empty object where every field is optional. A PUT must say what it puts
            // somewhere: the specification asks each of these requests for a body.
            Body::Json(_) if self.body.is_empty() && self.parts.method != Method::PUT => {}
            Body::Json(_) if self.body.is_empty() => {
                return Err(Refusal::new(
                    ErrorKind::NotJson,
                    "The request has no body; this endpoint needs a JSON object.",
                )
                .into());
            }
            Body::Json(_) => content.json = Checked::check(self.body)?,
        }
        if let (Asker::User(caller), Suspended::If(may)) = (&self.asker, self.suspended)
            && caller.is_suspended
        {
            let body = content.json.bytes();
            if !may(&Wish { user_id: &caller.user_id, path: &self.path, body: &body }) {
                return Err(users::suspended().into());
            }
        }
        let request = T::Asked::read(self.parts, self.path, content)?;
        T::new(self.asker, request, self.peer)
    }
}

/// Finds out who asks. Refuses a token or signature that is missing or not valid: 401.
fn identify(app: &App, who: Who, parts: &Parts) -> Result<Asker> {
    match who {
        Who::Public => Ok(Asker::Nobody),
        Who::MaybeClient => Ok(find_caller(app, parts)?.map_or(Asker::Nobody, Asker::User)),
        Who::Client | Who::Admin => find_caller(app, parts)?.map(Asker::User).ok_or_else(missing_token),
        // No service is registered with this server, so that no token belongs to one.
        Who::Appservice => match find_token(parts)? {
            Some(_) => {
                let kind = ErrorKind::UnknownToken(Default::default());
                Err(Refusal::new(kind, "No application service has this token.").into())
            }
            None => Err(missing_token()),
        },
        Who::Server => identify::claimed(app, parts).map(Asker::Claimed),
    }
}

fn find_caller(app: &App, parts: &Parts) -> Result<Option<Caller>> {
    let Some(token) = find_token(parts)? else { return Ok(None) };
    let snapshot = app.store.snapshot();
    accounts::tokens::find_caller(&*snapshot, app.env.now_ms(), &token).map(Some)
}

/// The access token that a request brings. Refuses one that cannot be read: 401 `M_MISSING_TOKEN`.
pub(crate) fn find_token(parts: &Parts) -> Result<Option<String>> {
    let mut request = http::Request::new(());
    *request.uri_mut() = parts.uri.clone();
    if let Some(value) = parts.headers.get(header::AUTHORIZATION) {
        request.headers_mut().insert(header::AUTHORIZATION, value.clone());
    }
    AccessTokenOptional::extract_authentication(&request).map_err(|_| {
        Refusal::new(
            ErrorKind::MissingToken,
            "The header `Authorization` holds no access token that can be read.",
        )
        .into()
    })
}

fn missing_token() -> Error {
    Refusal::new(ErrorKind::MissingToken, "This endpoint needs an access token.").into()
}

fn unsigned() -> Error {
    Refusal::new(ErrorKind::Unauthorized, "This endpoint needs a request that another server has signed.")
        .into()
}

/// Refuses a guest what only users with an account may do: 403 `M_GUEST_ACCESS_FORBIDDEN`.
pub(crate) fn guests_refused() -> Refusal {
    Refusal::new(ErrorKind::GuestAccessForbidden, "Guests cannot do this.")
}

/// The parameters in the path, percent-decoded, in their order.
fn path_args(parts: &mut Parts) -> Result<Vec<String>> {
    // The extractor only looks into the extensions, so that it is ready at once.
    let params = RawPathParams::from_request_parts(parts, &()).now_or_never();
    match params {
        Some(Ok(params)) => Ok(params.iter().map(|(_, value)| value.to_owned()).collect()),
        _ => Err(Refusal::invalid_param("The path is not valid UTF-8.").into()),
    }
}
