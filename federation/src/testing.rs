//! A simulated network for tests: names, servers, delays and failures in memory, on tokio's paused clock.
//!
//! Everything is repeatable: nothing reads a real clock, draws a real number or opens a socket. A test gives names to addresses
//! with [`Net::host`], puts servers there with [`Net::serve`], and takes [`Net::ports`] for the code under test. All servers of
//! a simulation share one [`Net`].

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use parking_lot::Mutex;
use ruma::{
    OwnedServerName, OwnedServerSigningKeyId, ServerName, ServerSigningKeyId, signatures::Ed25519KeyPair,
};
use tokio::time::Instant;

use crate::{
    keys::OwnKeys,
    ports::{
        Addresses, Body, Clock, KeyStore, NotResolved, NotSent, Payers, Place, Ports, Randomness, Resolver,
        Service, Services, StoreFailed, StoredDocument, StoredKey, Target, Transport,
    },
};

/// When the simulated world begins, in milliseconds since the epoch.
pub const BEGAN_MS: u64 = 1_750_000_000_000;

/// A request as a simulated server gets it.
#[derive(Clone, Debug)]
pub struct Arrived {
    /// The address it came to.
    pub address: SocketAddr,
    /// The name that the certificate had to be valid for. None: the request came without TLS.
    pub tls_name: Option<String>,
    /// The `Host` header.
    pub host_header: String,
    /// The request; its URI is path and query.
    pub request: http::Request<Bytes>,
}

/// What a simulated server answers.
pub type Answered = http::Response<Body>;

/// A simulated server.
pub type Handler = Arc<dyn Fn(Arrived) -> BoxFuture<'static, Answered> + Send + Sync>;

/// An answer with this status and JSON.
pub fn json(status: u16, body: impl Into<String>) -> Answered {
    bytes(status, &[("content-type", "application/json")], body.into())
}

/// An answer with this status, headers and body.
pub fn bytes(status: u16, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Answered {
    let mut answer = http::Response::new(Body::from(body.into()));
    *answer.status_mut() = http::StatusCode::from_u16(status).unwrap_or(http::StatusCode::IM_A_TEAPOT);
    for (name, value) in headers {
        let name = http::HeaderName::from_bytes(name.as_bytes());
        if let (Ok(name), Ok(value)) = (name, http::HeaderValue::from_str(value)) {
            answer.headers_mut().append(name, value);
        }
    }
    answer
}

/// How an address behaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Weather {
    /// It answers.
    #[default]
    Fair,
    /// It refuses connections.
    Refuses,
    /// It takes connections and never answers.
    Silent,
    /// It does what is asked, and the answer is lost.
    LosesAnswers,
}

#[derive(Clone)]
struct Machine {
    /// Names and addresses that its certificate is valid for.
    certificate: Vec<String>,
    handler: Handler,
    weather: Weather,
    delay: Duration,
}

#[derive(Default)]
struct World {
    addresses: BTreeMap<String, Result<Addresses, NotResolved>>,
    services: BTreeMap<String, Result<Services, NotResolved>>,
    machines: BTreeMap<SocketAddr, Machine>,
    dns_delay: Duration,
    /// Requests that arrived, as `TLS name@address Host method path`.
    arrived: Vec<String>,
    /// Names that were looked up.
    looked_up: Vec<String>,
    random: u64,
}

/// The simulated network. Cheap to clone.
#[derive(Clone)]
pub struct Net {
    world: Arc<Mutex<World>>,
    began: Instant,
}

impl Net {
    /// An empty network, whose choices come from a seed. It begins now, on tokio's clock.
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the door of the simulation to tokio's paused clock"
    )]
    pub fn new(seed: u64) -> Self {
        let world = World { random: seed, ..World::default() };
        Self { world: Arc::new(Mutex::new(world)), began: Instant::now() }
    }

    /// Gives a name these addresses, for five minutes each time.
    pub fn host(&self, name: &str, addresses: &[&str]) {
        let addresses = addresses.iter().filter_map(|it| it.parse().ok()).collect();
        let answer = Addresses { addresses, ttl_s: 300, is_alias: false };
        self.resolve(name, Ok(answer));
    }

    /// Gives a name this answer.
    pub fn resolve(&self, name: &str, answer: Result<Addresses, NotResolved>) {
        self.world.lock().addresses.insert(name.to_owned(), answer);
    }

    /// Gives a name such as `_matrix-fed._tcp.example.org` SRV records: priority, weight, host and port.
    pub fn services(&self, name: &str, records: &[(u16, u16, &str, u16)]) {
        let service = |(priority, weight, host, port): &(u16, u16, &str, u16)| Service {
            priority: *priority,
            weight: *weight,
            port: *port,
            host: (*host).to_owned(),
        };
        let answer = Services { services: records.iter().map(service).collect(), ttl_s: 300 };
        self.resolve_services(name, Ok(answer));
    }

    /// Gives the SRV records of a name this answer.
    pub fn resolve_services(&self, name: &str, answer: Result<Services, NotResolved>) {
        self.world.lock().services.insert(name.to_owned(), answer);
    }

    /// DNS takes this long from now on.
    pub fn delay_dns(&self, delay: Duration) {
        self.world.lock().dns_delay = delay;
    }

    /// Puts a server at `address:port` whose certificate is valid for these names.
    pub fn serve<F>(
        &self,
        address: &str,
        certificate: &[&str],
        handler: impl Fn(Arrived) -> F + Send + Sync + 'static,
    ) where
        F: Future<Output = Answered> + Send + 'static,
    {
        let Ok(address) = address.parse() else { return };
        let machine = Machine {
            certificate: certificate.iter().map(|it| (*it).to_owned()).collect(),
            handler: Arc::new(move |arrived| handler(arrived).boxed()),
            weather: Weather::Fair,
            delay: Duration::ZERO,
        };
        self.world.lock().machines.insert(address, machine);
    }

    /// Puts a server there that answers everything with this JSON.
    pub fn serve_json(&self, address: &str, certificate: &[&str], body: &str) {
        let body = body.to_owned();
        self.serve(address, certificate, move |_| futures_util::future::ready(json(200, body.clone())));
    }

    /// Changes how an address behaves, and how long it takes.
    pub fn weather(&self, address: &str, weather: Weather, delay: Duration) {
        let mut world = self.world.lock();
        let machine = address.parse().ok().and_then(|address: SocketAddr| world.machines.get_mut(&address));
        if let Some(machine) = machine {
            machine.weather = weather;
            machine.delay = delay;
        }
    }

    /// The requests that arrived since the last call, as `TLS name@address Host method path`.
    pub fn take_arrived(&self) -> Vec<String> {
        std::mem::take(&mut self.world.lock().arrived)
    }

    /// The names that were looked up in DNS since the last call.
    pub fn take_looked_up(&self) -> Vec<String> {
        std::mem::take(&mut self.world.lock().looked_up)
    }

    /// The ports of one server in this network, with a cache of keys of its own.
    pub fn ports(&self) -> Ports {
        let net = Arc::new(self.clone());
        Ports {
            clock: net.clone(),
            randomness: net.clone(),
            payers: net.clone(),
            resolver: net.clone(),
            transport: net,
            keys: Arc::new(MemoryKeys::default()),
        }
    }

    async fn wait(delay: Duration) {
        if !delay.is_zero() {
            // It never comes; only the time passes.
            let _ = tokio::time::timeout(delay, futures_util::future::pending::<()>()).await;
        }
    }

    async fn look_up<T: Clone>(
        &self,
        name: &str,
        find: impl FnOnce(&World) -> Option<Result<T, NotResolved>>,
    ) -> Result<T, NotResolved> {
        let delay = {
            let mut world = self.world.lock();
            world.looked_up.push(name.to_owned());
            world.dns_delay
        };
        Self::wait(delay).await;
        find(&self.world.lock()).unwrap_or(Err(NotResolved::Absent { ttl_s: 300 }))
    }

    /// The machine at one of these places, if it takes connections.
    fn connect(&self, place: &Place) -> Result<(SocketAddr, Machine), NotSent> {
        let world = self.world.lock();
        let addresses: Vec<SocketAddr> = match place {
            Place::Addresses(admitted) => admitted.as_slice().to_vec(),
            // The proxy resolves the name.
            Place::Names(names) => names
                .iter()
                .filter_map(|(host, port)| Some((world.addresses.get(host)?.as_ref().ok()?, *port)))
                .flat_map(|(found, port)| found.addresses.iter().map(move |it| SocketAddr::new(*it, port)))
                .collect(),
        };
        let up = addresses.iter().find_map(|address| {
            let machine = world.machines.get(address).filter(|it| it.weather != Weather::Refuses)?;
            Some((*address, machine.clone()))
        });
        up.ok_or_else(|| NotSent::Unreachable("connection refused".to_owned()))
    }
}

impl Clock for Net {
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the door of the simulation to tokio's paused clock"
    )]
    fn now_ms(&self) -> u64 {
        let passed = Instant::now().saturating_duration_since(self.began);
        BEGAN_MS.saturating_add(u64::try_from(passed.as_millis()).unwrap_or(u64::MAX))
    }
}

impl Payers for Net {
    fn current(&self) -> Option<u64> {
        None
    }
}

impl Randomness for Net {
    fn below(&self, bound: u64) -> u64 {
        // SplitMix64: small, and the same everywhere.
        let mut world = self.world.lock();
        world.random = world.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut it = world.random;
        it = (it ^ (it >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        it = (it ^ (it >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (it ^ (it >> 31)).checked_rem(bound).unwrap_or(0)
    }
}

impl Resolver for Net {
    fn addresses<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Addresses, NotResolved>> {
        self.look_up(host, |world| world.addresses.get(host).cloned()).boxed()
    }

    fn services<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Services, NotResolved>> {
        self.look_up(name, |world| world.services.get(name).cloned()).boxed()
    }
}

impl Transport for Net {
    fn send(
        &self,
        target: Target,
        request: http::Request<Bytes>,
    ) -> BoxFuture<'_, Result<Answered, NotSent>> {
        async move {
            let (address, machine) = self.connect(&target.place)?;
            let Target { tls_name, host_header, .. } = target;
            let proved = tls_name.as_deref().unwrap_or("(no TLS)");
            let line = format!("{proved}@{address} {host_header} {} {}", request.method(), request.uri());
            self.world.lock().arrived.push(line);
            Self::wait(machine.delay).await;
            if let Some(name) = tls_name.as_ref().filter(|name| !machine.certificate.contains(name)) {
                return Err(NotSent::Certificate(format!("it is not valid for {name}")));
            }
            if machine.weather == Weather::Silent {
                return futures_util::future::pending().await;
            }
            let answer = (machine.handler)(Arrived { address, tls_name, host_header, request }).await;
            match machine.weather {
                Weather::LosesAnswers => Err(NotSent::Broken("connection reset".to_owned())),
                Weather::Fair | Weather::Refuses | Weather::Silent => Ok(answer),
            }
        }
        .boxed()
    }
}

/// A cache of keys in memory.
#[derive(Default)]
pub struct MemoryKeys {
    keys: Mutex<BTreeMap<(OwnedServerName, OwnedServerSigningKeyId), StoredKey>>,
    documents: Mutex<BTreeMap<OwnedServerName, StoredDocument>>,
}

impl KeyStore for MemoryKeys {
    fn find_key<'a>(
        &'a self,
        server: &'a ServerName,
        key_id: &'a ServerSigningKeyId,
    ) -> BoxFuture<'a, Result<Option<StoredKey>, StoreFailed>> {
        let key = self.keys.lock().get(&(server.to_owned(), key_id.to_owned())).cloned();
        futures_util::future::ready(Ok(key)).boxed()
    }

    fn put_keys<'a>(
        &'a self,
        server: &'a ServerName,
        keys: Vec<(OwnedServerSigningKeyId, StoredKey)>,
    ) -> BoxFuture<'a, Result<(), StoreFailed>> {
        let keys = keys.into_iter().map(|(key_id, key)| ((server.to_owned(), key_id), key));
        self.keys.lock().extend(keys);
        futures_util::future::ready(Ok(())).boxed()
    }

    fn find_document<'a>(
        &'a self,
        server: &'a ServerName,
    ) -> BoxFuture<'a, Result<Option<StoredDocument>, StoreFailed>> {
        futures_util::future::ready(Ok(self.documents.lock().get(server).cloned())).boxed()
    }

    fn put_document<'a>(
        &'a self,
        server: &'a ServerName,
        document: StoredDocument,
    ) -> BoxFuture<'a, Result<(), StoreFailed>> {
        self.documents.lock().insert(server.to_owned(), document);
        futures_util::future::ready(Ok(())).boxed()
    }
}

/// The addresses of an answer, for [`Net::resolve`].
pub fn addresses(list: &[&str], ttl_s: u32) -> Result<Addresses, NotResolved> {
    let addresses: Vec<IpAddr> = list.iter().filter_map(|it| it.parse().ok()).collect();
    Ok(Addresses { addresses, ttl_s, is_alias: false })
}

/// A signing key made from a number, under an id such as `ed25519:1`.
pub fn key_pair(seed: u8, version: &str) -> Option<Ed25519KeyPair> {
    // A private key as RFC 8410, section 7, writes it.
    let mut document =
        vec![0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
    document.extend([seed; 32]);
    Ed25519KeyPair::from_der(&document, version.to_owned()).ok()
}

/// The keys of a server that signs with [`key_pair`].
pub fn own_keys(server: &str, seed: u8, version: &str) -> Option<Arc<OwnKeys>> {
    let server = OwnedServerName::try_from(server).ok()?;
    OwnKeys::new(server, key_pair(seed, version)?, Vec::new()).ok().map(Arc::new)
}
