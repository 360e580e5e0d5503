//! One typed request of the [server-server API](https://spec.matrix.org/v1.19/server-server-api/), signed where its endpoint
//! asks for that, and its answer.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Request, Response, Uri, header};
use ruma::{
    ServerName,
    api::{
        IncomingResponseExt, OutgoingBody, OutgoingRequest,
        auth_scheme::{AuthScheme, NoAuthentication},
        federation::authentication::ServerSignatures,
        path_builder::PathBuilder,
    },
};

use crate::{
    call::{Caller, Failure, Options, Reply, Streamed},
    json::Canonical,
    keys::OwnKeys,
    xmatrix::{Signed, content, sign},
};

/// What is said of an answer that makes no sense is cut to this many characters, because it quotes the answer.
const NONSENSE_CHARACTERS_MAX: usize = 200;

/// How endpoints of servers are authenticated.
pub trait ServerAuthentication: AuthScheme {
    /// Whether requests are signed.
    const IS_SIGNED: bool;
}

impl ServerAuthentication for ServerSignatures {
    const IS_SIGNED: bool = true;
}

impl ServerAuthentication for NoAuthentication {
    const IS_SIGNED: bool = false;
}

/// Sends requests of ours to other servers. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    caller: Caller,
    own: Arc<OwnKeys>,
}

impl Client {
    /// Sends requests through this caller, signed with our keys.
    pub const fn new(caller: Caller, own: Arc<OwnKeys>) -> Self {
        Self { caller, own }
    }

    /// The way of unsigned requests.
    pub const fn caller(&self) -> &Caller {
        &self.caller
    }

    /// Sends one request and reads its answer. Errors: [`Failure`].
    pub async fn send<R>(
        &self,
        server: &ServerName,
        request: R,
        options: Options,
    ) -> Result<R::IncomingResponse, Failure>
    where
        R: OutgoingRequest,
        R::Authentication: ServerAuthentication,
        for<'a> R::PathBuilder: PathBuilder<Input<'a> = ()>,
    {
        let reply = self.ask(server, request, options).await?;
        let mut response = Response::new(&**reply.answer.bytes());
        *response.status_mut() = reply.status;
        *response.headers_mut() = reply.headers;
        R::IncomingResponse::try_from_http_response(response).map_err(|error| {
            let told = error.to_string();
            let told = told.chars().filter(|it| !it.is_control()).take(NONSENSE_CHARACTERS_MAX);
            Failure::Nonsense(told.collect())
        })
    }

    /// Sends one request and gives the bytes of its answer, for what the request's type would read too narrowly. Errors:
    /// [`Failure`].
    pub async fn ask<R>(&self, server: &ServerName, request: R, options: Options) -> Result<Reply, Failure>
    where
        R: OutgoingRequest,
        R::Authentication: ServerAuthentication,
        for<'a> R::PathBuilder: PathBuilder<Input<'a> = ()>,
    {
        let request = prepare(request)?;
        if R::Authentication::IS_SIGNED {
            self.send_signed(server, request, options).await
        } else {
            self.caller.call(server, request, options).await
        }
    }

    /// Signs one request, whose URI is path and query alone, sends it, and gives the bytes of the answer. Its body goes out as the text
    /// that was signed, so that whoever reads it in another way than we (`1e3` is no whole number everywhere) reads what was signed.
    /// Errors: [`Failure`].
    pub async fn send_signed(
        &self,
        server: &ServerName,
        mut request: Request<Bytes>,
        options: Options,
    ) -> Result<Reply, Failure> {
        let content = content(request.body()).map_err(|error| bad(&error))?;
        let header = self.sign(server, &request, content.as_ref())?;
        request.headers_mut().insert(header::AUTHORIZATION, header);
        if let Some(content) = content {
            *request.body_mut() = String::from(content).into();
        }
        self.caller.call(server, request, options).await
    }

    /// Signs one request without a body, whose URI is path and query alone, and gives its answer as soon as that begins, for its caller
    /// to read and bound. Errors: [`Failure`].
    pub async fn open_signed(
        &self,
        server: &ServerName,
        mut request: Request<Bytes>,
        options: Options,
    ) -> Result<Streamed, Failure> {
        let header = self.sign(server, &request, None)?;
        request.headers_mut().insert(header::AUTHORIZATION, header);
        self.caller.open(server, request, options).await
    }

    fn sign(
        &self,
        server: &ServerName,
        request: &Request<Bytes>,
        content: Option<&Canonical>,
    ) -> Result<HeaderValue, Failure> {
        let uri = request.uri().path_and_query().map_or("/", |it| it.as_str());
        let signed = Signed { method: request.method().as_str(), uri, content };
        let header = sign(&self.own, server, signed);
        let mut header =
            header.ok_or_else(|| bad(&"a server's name has characters that no header can hold"))?;
        // It goes into no log, whoever logs requests.
        header.set_sensitive(true);
        Ok(header)
    }
}

/// The request as it goes out, but for its signature.
fn prepare<R>(request: R) -> Result<Request<Bytes>, Failure>
where
    R: OutgoingRequest,
    for<'a> R::PathBuilder: PathBuilder<Input<'a> = ()>,
{
    let request = request.try_into_http_request_inner("", ()).map_err(|error| bad(&error))?;
    let (mut head, body) = request.into_parts();
    if let Some(content_type) = body.content_type() {
        head.headers.entry(header::CONTENT_TYPE).or_insert(content_type);
    }
    let body: BytesMut = body.try_into_buf().map_err(|error| bad(&error.into()))?;
    let path = head.uri.path_and_query().cloned().ok_or_else(|| bad(&"its path is missing"))?;
    head.uri = Uri::from(path);
    Ok(Request::from_parts(head, body.freeze()))
}

fn bad(error: &dyn std::fmt::Display) -> Failure {
    Failure::BadRequest(error.to_string())
}

#[cfg(test)]
mod tests {
    use futures_util::future::ready;
    use ruma::api::federation::{
        discovery::{get_server_keys, get_server_version},
        query::get_profile_information,
        transactions::send_transaction_message,
    };

    use super::*;
    use crate::{
        discovery::Discovery,
        guard::{Guard, ServerList},
        keys::Ring,
        testing::{Net, json, own_keys},
        xmatrix::{header::parse, verify},
    };

    fn caller(net: &Net) -> Caller {
        let ports = net.ports();
        let discovery = Discovery::new(ports.clone(), Guard::default(), false);
        Caller::new(ports, discovery, ServerList::default())
    }

    /// A server `b.example:1` that verifies what comes, as `a.example:1` is in the same network, and answers this.
    fn network(answer: &'static str) -> (Net, Client) {
        let net = Net::new(1);
        net.host("a.example", &["5.0.0.1"]);
        net.host("b.example", &["5.0.0.2"]);
        let ours = own_keys("a.example:1", 1, "1").unwrap();
        let document = ours.document(crate::testing::BEGAN_MS);
        net.serve_json("5.0.0.1:1", &["a.example"], &document);
        let ring = Ring::new(caller(&net), own_keys("b.example:1", 2, "1").unwrap(), Vec::new());
        net.serve("5.0.0.2:1", &["b.example"], move |arrived| {
            let ring = ring.clone();
            async move {
                let headers = arrived.request.headers().get_all(header::AUTHORIZATION).iter();
                let credentials = parse(headers.map(HeaderValue::as_bytes)).unwrap();
                let content = content(arrived.request.body()).unwrap();
                // Whoever reads numbers in another way signs another text for any other body.
                let body = String::from_utf8(arrived.request.body().to_vec()).unwrap();
                assert_eq!(body, content.as_ref().map_or("", Canonical::as_str));
                let uri = arrived.request.uri().to_string();
                let method = arrived.request.method().as_str();
                let signed = Signed { method, uri: &uri, content: content.as_ref() };
                let Some(credentials) = credentials else { return json(401, "{}") };
                match verify(&ring, &credentials, signed).await {
                    Ok(_) => json(200, answer),
                    Err(_) => json(401, r#"{"errcode":"M_UNAUTHORIZED","error":"no"}"#),
                }
            }
        });
        let client = Client::new(caller(&net), ours);
        (net, client)
    }

    fn b() -> &'static ServerName {
        "b.example:1".try_into().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn what_we_sign_another_server_verifies() {
        let (_, client) = network(r#"{"displayname":"A"}"#);
        let request = get_profile_information::v1::Request::new("@ä b/?&%:b.example".try_into().unwrap());
        let profile = client.send(b(), request, Options::default()).await.unwrap();
        assert_eq!(profile.get("displayname").and_then(|it| it.as_str()), Some("A"));
        let (_, client) = network(r#"{"pdus":{}}"#);
        let now = ruma::MilliSecondsSinceUnixEpoch(ruma::uint!(1));
        let mut request = send_transaction_message::v1::Request::new(
            "x/y z".into(),
            "a.example:1".try_into().unwrap(),
            now,
        );
        // Old rooms hold numbers that canonical JSON does not know.
        let pdu = serde_json::value::RawValue::from_string(
            r#"{"depth":1.50,"n":12345678901234567890123,"e":1e3, "z":-0,"f":10e2}"#.to_owned(),
        );
        request.pdus.push(pdu.unwrap());
        assert!(client.send(b(), request, Options::default()).await.unwrap().pdus.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn an_endpoint_without_authentication_gets_no_signature() {
        let (net, client) = network("{}");
        let answered = client.send(b(), get_server_version::v1::Request::new(), Options::default()).await;
        assert!(matches!(answered, Err(Failure::Refused { status, .. }) if status == 401));
        net.serve("5.0.0.2:1", &["b.example"], |arrived| {
            ready(json(if arrived.request.headers().contains_key("authorization") { 400 } else { 200 }, "{}"))
        });
        assert!(client.send(b(), get_server_keys::v2::Request::new(), Options::default()).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_another_is_nonsense() {
        for answer in ["", "[]", r#"{"pdus":5}"#, "\u{0}", r#"{"pdus":{"x":{}}}"#, "1e400"] {
            let (_, client) = network(answer);
            let now = ruma::MilliSecondsSinceUnixEpoch(ruma::uint!(1));
            let request = send_transaction_message::v1::Request::new(
                "1".into(),
                "a.example:1".try_into().unwrap(),
                now,
            );
            let answered = client.send(b(), request, Options::default()).await;
            let Err(Failure::Nonsense(told)) = answered else { panic!("{answer}: {answered:?}") };
            assert!(told.chars().count() <= NONSENSE_CHARACTERS_MAX);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn raw_bytes_come_as_they_are() {
        let (_, client) = network("\u{1}raw");
        let request =
            Request::get("/_matrix/federation/v1/media/download/x?y=%2f").body(Bytes::new()).unwrap();
        let reply = client.send_signed(b(), request, Options::default()).await.unwrap();
        assert_eq!(reply.answer.bytes(), "\u{1}raw");
        let request = Request::put("/x").body(Bytes::from("{")).unwrap();
        let answered = client.send_signed(b(), request, Options::default()).await;
        assert!(matches!(answered, Err(Failure::BadRequest(_))));
    }
}
