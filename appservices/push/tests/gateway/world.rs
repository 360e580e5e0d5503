//! Providers on loopback with certificates of a test's own authority, keys of apps in files, and the gateway in front of them.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use aes_gcm::{
    Aes128Gcm, Nonce,
    aead::{Aead, KeyInit},
};
use axum::{Router, body::Body};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use federation::{
    ports::{Addresses, Clock, NotResolved, Randomness, Resolver, Services, Tasks},
    testing::Net,
    transport::{Https, Trust},
};
use futures_util::{FutureExt, future::BoxFuture};
use hkdf::Hkdf;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use p256::{PublicKey, SecretKey, elliptic_curve::sec1::ToSec1Point, pkcs8::EncodePrivateKey};
use parking_lot::Mutex;
use push_gateway::{
    Caller, Gateway, NOTIFY_PATH, Settings,
    ports::{Figures, Ports, Secrets, Work},
    settings::{App, Kind},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use sha2::Sha256;
use tokio::net::TcpListener;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{PrivateKeyDer, pem::PemObject},
    },
};
use tower::ServiceExt;

/// The doors of a gateway in the real world. Names end at loopback, but for those that begin with `inner`.
pub(crate) struct Real;

impl Clock for Real {
    fn now_ms(&self) -> u64 {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        since.as_millis().try_into().unwrap()
    }
}

impl Tasks for Real {
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        drop(tokio::spawn(task));
    }
}

impl Randomness for Real {
    fn below(&self, _bound: u64) -> u64 {
        0
    }
}

impl Resolver for Real {
    fn addresses<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Addresses, NotResolved>> {
        let address = if host.starts_with("inner") { [10, 0, 0, 7] } else { [127, 0, 0, 1] };
        let found = Addresses { addresses: vec![IpAddr::from(address)], ttl_s: 60, is_alias: false };
        async move { Ok(found) }.boxed()
    }

    fn services<'a>(&'a self, _name: &'a str) -> BoxFuture<'a, Result<Services, NotResolved>> {
        async { Err(NotResolved::Absent { ttl_s: 60 }) }.boxed()
    }
}

/// Secrets that differ from each other, which is all that tests need.
#[derive(Default)]
pub(crate) struct Numbers(AtomicU64);

impl Secrets for Numbers {
    fn fill(&self, buffer: &mut [u8]) {
        for byte in buffer {
            let number = self.0.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            *byte = number.to_be_bytes()[0];
        }
    }
}

/// Tasks of tokio, and work that is done in place, which is counted.
#[derive(Default)]
struct Here(AtomicU64);

impl Tasks for Here {
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        drop(tokio::spawn(task));
    }
}

impl Work for Here {
    fn run(&self, work: Box<dyn FnOnce() + Send>) -> BoxFuture<'static, ()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        async move { work() }.boxed()
    }
}

/// The figures, counted by kind and outcome.
#[derive(Clone, Default)]
pub(crate) struct Counted(Arc<Mutex<BTreeMap<String, u32>>>);

impl Figures for Counted {
    fn device(&self, kind: &'static str, outcome: &'static str) {
        *self.0.lock().entry(format!("{kind} {outcome}")).or_default() += 1;
    }
}

impl Counted {
    /// How often a device of this kind came to this end, as in `fcm delivered`.
    pub(crate) fn of(&self, what: &str) -> u32 {
        self.0.lock().get(what).copied().unwrap_or(0)
    }
}

/// The log of this thread, all levels, from when it begins until it ends.
pub(crate) struct Log {
    written: Arc<Mutex<Vec<u8>>>,
    logging: tracing::subscriber::DefaultGuard,
}

impl Log {
    pub(crate) fn begin() -> Self {
        let written = Arc::<Mutex<Vec<u8>>>::default();
        let sink = written.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_ansi(false)
            .with_writer(move || Sink(sink.clone()))
            .finish();
        Self { written, logging: tracing::subscriber::set_default(subscriber) }
    }

    pub(crate) fn end(self) -> String {
        drop(self.logging);
        String::from_utf8(self.written.lock().clone()).unwrap()
    }
}

struct Sink(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A gateway, as homeservers see it.
pub(crate) struct Door {
    router: Router,
    pub(crate) figures: Counted,
    doors: Doors,
}

/// The doors of a gateway that count how often something passes.
#[derive(Default)]
struct Doors {
    figures: Counted,
    secrets: Arc<Numbers>,
    here: Arc<Here>,
}

impl Door {
    /// A gateway with these apps in the real world, which trusts this authority.
    pub(crate) fn real(authority: &Authority, apps: Vec<App>) -> Self {
        let real = Arc::new(Real);
        let transport = Https::new(&authority.trust(), None, real.clone(), real.clone());
        Self::over(apps, |counted| Ports {
            clock: real.clone(),
            randomness: real.clone(),
            secrets: counted.secrets.clone(),
            tasks: real.clone(),
            work: counted.here.clone(),
            resolver: real,
            transport: Arc::new(transport),
            through_proxy: false,
            figures: Arc::new(counted.figures.clone()),
        })
    }

    /// A gateway with these apps in a simulated network.
    pub(crate) fn simulated(net: &Net, apps: Vec<App>) -> Self {
        Self::over(apps, |counted| ports_of(net, counted))
    }

    fn over(apps: Vec<App>, ports: impl FnOnce(&Doors) -> Ports) -> Self {
        let doors = Doors::default();
        let settings = Settings { networks_allowed: vec!["127.0.0.0/8".to_owned()], apps };
        let gateway = Gateway::open(&settings, ports(&doors)).unwrap();
        Self { router: gateway.router(), figures: doors.figures.clone(), doors }
    }

    /// How often something was done off the threads that serve requests.
    pub(crate) fn worked(&self) -> u64 {
        self.doors.here.0.load(Ordering::Relaxed)
    }

    /// How many bytes of secrets were drawn.
    pub(crate) fn secrets_drawn(&self) -> u64 {
        self.doors.secrets.0.load(Ordering::Relaxed)
    }

    /// Sends a request of any kind.
    pub(crate) async fn ask(&self, request: Request<Body>) -> (StatusCode, HeaderMap, Value) {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (head, body) = response.into_parts();
        let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        (head.status, head.headers, serde_json::from_slice(&body).unwrap())
    }

    /// Sends a notification, and gives the answer.
    pub(crate) async fn notify(&self, notification: &Value) -> (StatusCode, HeaderMap, Value) {
        self.notify_from([192, 0, 2, 1].into(), notification).await
    }

    /// The same from a homeserver at this address.
    pub(crate) async fn notify_from(
        &self,
        caller: IpAddr,
        notification: &Value,
    ) -> (StatusCode, HeaderMap, Value) {
        let body = json!({ "notification": notification }).to_string();
        let request = Request::post(NOTIFY_PATH).extension(Caller(caller)).body(Body::from(body));
        self.ask(request.unwrap()).await
    }

    /// Sends a notification that must be taken, and gives the push keys that are rejected.
    pub(crate) async fn rejected(&self, notification: &Value) -> Value {
        let (status, _, body) = self.notify(notification).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        body["rejected"].clone()
    }
}

fn ports_of(net: &Net, doors: &Doors) -> Ports {
    let net = Arc::new(net.clone());
    Ports {
        clock: net.clone(),
        randomness: net.clone(),
        secrets: doors.secrets.clone(),
        tasks: doors.here.clone(),
        work: doors.here.clone(),
        resolver: net.clone(),
        transport: net,
        through_proxy: false,
        figures: Arc::new(doors.figures.clone()),
    }
}

/// Opens a gateway in a simulated network.
pub(crate) fn open_in(net: &Net, settings: &Settings) -> Result<Gateway, push_gateway::gateway::NotOpened> {
    Gateway::open(settings, ports_of(net, &Doors::default()))
}

/// A message in a room, for these devices.
pub(crate) fn message(devices: Value) -> Value {
    json!({
        "event_id": "$event", "room_id": "!room:a.example", "type": "m.room.message", "sender": "@ann:a.example",
        "sender_display_name": "Ann", "room_name": "Kitchen", "prio": "high",
        "content": { "msgtype": "m.text", "body": "Dinner is ready", "formatted_body": "<b>Dinner</b>" },
        "counts": { "unread": 2, "missed_calls": 1 }, "devices": devices,
    })
}

/// A certificate authority, with its certificate in a file.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    file: tempfile::NamedTempFile,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let file = file(&certificate.pem());
        Self { issuer: Issuer::new(params, key), file }
    }

    fn trust(&self) -> Trust {
        Trust::only(&[self.file.path()]).unwrap()
    }

    fn acceptor(&self, name: &str, alpn: &[&[u8]]) -> TlsAcceptor {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).unwrap();
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        config.alpn_protocols = alpn.iter().map(|it| it.to_vec()).collect();
        TlsAcceptor::from(Arc::new(config))
    }
}

/// A request as a provider gets it.
#[derive(Clone, Debug)]
pub(crate) struct Arrived {
    pub(crate) version: Version,
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Arrived {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |it| it.to_str().unwrap())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// A provider on loopback, which remembers what it was sent.
pub(crate) struct Provider {
    name: String,
    address: SocketAddr,
    arrived: Arc<Mutex<Vec<Arrived>>>,
}

impl Provider {
    /// A provider of this name that answers so.
    pub(crate) async fn start(
        authority: &Authority,
        name: &str,
        answer: impl Fn(&Arrived) -> (u16, String) + Clone + Send + 'static,
    ) -> Self {
        Self::start_with(authority, name, answer, &[]).await
    }

    /// The same, with these headers in each answer.
    pub(crate) async fn start_with(
        authority: &Authority,
        name: &str,
        answer: impl Fn(&Arrived) -> (u16, String) + Clone + Send + 'static,
        headers: &'static [(&'static str, &'static str)],
    ) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let arrived = Arc::<Mutex<Vec<Arrived>>>::default();
        let provider =
            Self { name: name.to_owned(), address: listener.local_addr().unwrap(), arrived: arrived.clone() };
        let tls = authority.acceptor(name, &[b"h2", b"http/1.1"]);
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (tls, answer, arrived) = (tls.clone(), answer.clone(), arrived.clone());
                tokio::spawn(async move {
                    let Ok(stream) = tls.accept(tcp).await else { return };
                    let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                    let service = service_fn(move |request: Request<Incoming>| {
                        let (answer, arrived) = (answer.clone(), arrived.clone());
                        async move {
                            let (head, body) = request.into_parts();
                            let body = axum::body::to_bytes(Body::new(body), 1 << 20).await.unwrap();
                            let it = Arrived {
                                version: head.version,
                                method: head.method.to_string(),
                                path: head.uri.path_and_query().unwrap().to_string(),
                                headers: head.headers,
                                body,
                            };
                            let (status, text) = answer(&it);
                            arrived.lock().push(it);
                            let mut response = Response::new(Body::from(text));
                            *response.status_mut() = StatusCode::from_u16(status).unwrap();
                            for (name, value) in headers {
                                response.headers_mut().insert(*name, HeaderValue::from_static(value));
                            }
                            Ok::<_, Infallible>(response)
                        }
                    });
                    let io = TokioIo::new(stream);
                    if is_http2 {
                        let executor = hyper_util::rt::TokioExecutor::new();
                        let builder = hyper::server::conn::http2::Builder::new(executor);
                        let _ = builder.serve_connection(io, service).await;
                    } else {
                        let builder = hyper::server::conn::http1::Builder::new();
                        let _ = builder.serve_connection(io, service).await;
                    }
                });
            }
        });
        provider
    }

    /// Its URL with this path.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.origin())
    }

    pub(crate) fn origin(&self) -> String {
        format!("https://{}:{}", self.name, self.address.port())
    }

    /// All that has arrived since the last call.
    pub(crate) fn take(&self) -> Vec<Arrived> {
        std::mem::take(&mut *self.arrived.lock())
    }

    /// The one thing that has arrived since the last call.
    pub(crate) fn one(&self) -> Arrived {
        let mut all = self.take();
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }
}

/// A file that vanishes, with this text.
pub(crate) fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

/// A private key of the curve P-256 in a file, with its public key.
pub(crate) struct KeyFile {
    pub(crate) file: tempfile::NamedTempFile,
    pub(crate) point: Vec<u8>,
}

impl KeyFile {
    pub(crate) fn new(seed: u8) -> Self {
        let secret = SecretKey::from_slice(&[seed; 32]).unwrap();
        let pem = secret.to_pkcs8_pem(p256::pkcs8::LineEnding::LF).unwrap();
        let point = secret.public_key().to_sec1_point(false).as_bytes().to_vec();
        Self { file: file(&pem), point }
    }

    /// The claims of a token that this key must have signed, and the token's header.
    pub(crate) fn verify(&self, token: &str) -> (jsonwebtoken::Header, Value) {
        verify(token, &self.point)
    }
}

fn verify(token: &str, point: &[u8]) -> (jsonwebtoken::Header, Value) {
    let key = jsonwebtoken::DecodingKey::from_ec_der(point);
    let mut validation = jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::ES256);
    validation.required_spec_claims.clear();
    validation.validate_exp = false;
    validation.validate_aud = false;
    let data = jsonwebtoken::decode::<Value>(token, &key, &validation).unwrap();
    (data.header, data.claims)
}

/// A device that has subscribed, with its private key.
pub(crate) struct Subscriber {
    secret: SecretKey,
    auth: [u8; 16],
}

impl Subscriber {
    pub(crate) fn new(seed: u8) -> Self {
        Self { secret: SecretKey::from_slice(&[seed; 32]).unwrap(), auth: [seed; 16] }
    }

    pub(crate) fn p256dh(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.secret.public_key().to_sec1_point(false).as_bytes())
    }

    pub(crate) fn auth(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.auth)
    }

    /// Reads a message as a browser does (RFC 8291, section 3, and RFC 8188, section 2).
    pub(crate) fn decrypt(&self, message: &[u8]) -> Value {
        let (salt, rest) = message.split_at(16);
        let (size, rest) = rest.split_at(4);
        assert_eq!(u32::from_be_bytes(size.try_into().unwrap()), 4096);
        assert_eq!(rest[0], 65);
        let (sender, record) = rest[1..].split_at(65);
        let shared = self.secret.diffie_hellman(&PublicKey::from_sec1_bytes(sender).unwrap());
        let own = self.secret.public_key().to_sec1_point(false);
        let info = [b"WebPush: info\0", own.as_bytes(), sender].concat();
        let mut keying = [0; 32];
        Hkdf::<Sha256>::new(Some(&self.auth), shared.raw_secret_bytes()).expand(&info, &mut keying).unwrap();
        let derived = Hkdf::<Sha256>::new(Some(salt), &keying);
        let (mut key, mut nonce) = ([0; 16], [0; 12]);
        derived.expand(b"Content-Encoding: aes128gcm\0", &mut key).unwrap();
        derived.expand(b"Content-Encoding: nonce\0", &mut nonce).unwrap();
        let plain = Aes128Gcm::new(&key.into()).decrypt(&Nonce::from(nonce), record).unwrap();
        let end = plain.iter().rposition(|byte| *byte != 0).unwrap();
        assert_eq!(plain[end], 2, "the record is the last one");
        serde_json::from_slice(&plain[..end]).unwrap()
    }
}

/// The claims of the VAPID token in this header, which must be signed with the key that the header names.
pub(crate) fn vapid(header: &str) -> (Value, String) {
    let rest = header.strip_prefix("vapid t=").unwrap();
    let (token, key) = rest.split_once(", k=").unwrap();
    let point = URL_SAFE_NO_PAD.decode(key).unwrap();
    assert_eq!(point.len(), 65);
    let (head, claims) = verify(token, &point);
    assert_eq!(head.alg, jsonwebtoken::Algorithm::ES256);
    (claims, key.to_owned())
}

/// An app of Web Push with this key.
pub(crate) fn web_app(id: &str, key: &KeyFile) -> App {
    App {
        vapid_key_file: key.file.path().to_owned(),
        vapid_contact: "mailto:admin@example.org".to_owned(),
        ..App::new(id, Kind::WebPush)
    }
}

/// A device of Web Push.
pub(crate) fn web_device(subscriber: &Subscriber, endpoint: &str) -> Value {
    json!({
        "app_id": "web", "pushkey": subscriber.p256dh(),
        "data": { "endpoint": endpoint, "auth": subscriber.auth(), "default_payload": { "account": "ann" } },
    })
}
