//! Several whole servers that talk with one another over a network in memory.

use std::sync::Arc;

use aqueduct::{
    config::Config,
    env::{Env, Network},
    store::{Durability, Engine, Store, engine::Memory},
};
use axum::body::Body;
use federation::testing::{Arrived, Net, Weather, bytes};
use http::{Request, header};
use http_body_util::BodyExt;
use std::time::Duration;

use super::{BEGAN_MS, TestServer};

/// Several servers in one network. Use it inside `#[tokio::test(start_paused = true)]`.
pub(crate) struct Federated {
    /// The network, which a test may disturb.
    pub(crate) net: Net,
    servers: Vec<(String, TestServer)>,
}

impl Federated {
    /// Servers of these names, with the settings of [`TestServer::new`].
    pub(crate) fn new(names: &[&str]) -> Self {
        Self::with(names, |_| {})
    }

    /// Like [`Federated::new`], with the settings as this function has changed them.
    pub(crate) fn with(names: &[&str], change: impl Fn(&mut Config)) -> Self {
        let mut federated = Self { net: Net::new(1), servers: Vec::new() };
        for name in names {
            let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
            let server = federated.start(federated.servers.len(), name, store, &change);
            federated.servers.push(((*name).to_owned(), server));
        }
        federated
    }

    /// Starts a server over this store and puts it into the network, at the address that belongs to its place.
    fn start(&self, place: usize, name: &str, store: Store, change: impl Fn(&mut Config)) -> TestServer {
        let door = Arc::new(self.net.clone());
        let network = Network { resolver: door.clone(), transport: door.clone(), web: door };
        let env = Env::simulated(place as u64 + 1, BEGAN_MS).in_network(network);
        let server = TestServer::start(env, store, |config| {
            config.server.name = name.try_into().unwrap();
            change(config);
        });
        let host = address(place);
        self.net.host(name, &[host.trim_end_matches(":8448")]);
        let serving = server.clone();
        self.net.serve(&host, &[name], move |arrived| answer(serving.clone(), arrived));
        server
    }

    /// The server of this place.
    pub(crate) fn server(&self, place: usize) -> &TestServer {
        &self.servers[place].1
    }

    /// The name of the server of this place.
    pub(crate) fn name(&self, place: usize) -> &str {
        &self.servers[place].0
    }

    /// Changes how the server of this place is reached, and how long that takes.
    pub(crate) fn weather(&self, place: usize, weather: Weather, delay: Duration) {
        self.net.weather(&address(place), weather, delay);
    }

    /// Has the server of this place do at once what it is asked, and answer after this time.
    pub(crate) fn answers_after(&self, place: usize, time: Duration) {
        let (name, server) = &self.servers[place];
        let serving = server.clone();
        self.net.serve(&address(place), &[name], move |arrived| {
            let serving = serving.clone();
            async move {
                let env = serving.server().app().env.clone();
                let answered = answer(serving, arrived).await;
                env.sleep(time).await;
                answered
            }
        });
    }

    /// Kills the server of this place and starts it again over what it leaves on its disk, with this many of the writes that
    /// were not synced.
    pub(crate) fn kill(&mut self, place: usize, kept: usize, change: impl Fn(&mut Config)) {
        let (name, server) = &self.servers[place];
        let Engine::Memory(memory) = server.server().app().store.engine() else { panic!("not in memory") };
        let memory = Engine::Memory(memory.after_crash(kept));
        server.server().app().env.kill();
        let store = Store::open(memory, Durability::Fsync).unwrap();
        let name = name.clone();
        self.servers[place].1 = self.start(place, &name, store, change);
    }

    /// Kills the server of this place and starts another one in its place, over this store.
    pub(crate) fn replace(&mut self, place: usize, store: Store) {
        let (name, server) = &self.servers[place];
        server.server().app().env.kill();
        let name = name.clone();
        self.servers[place].1 = self.start(place, &name, store, |_| {});
    }
}

fn address(place: usize) -> String {
    format!("5.0.0.{}:8448", place + 1)
}

/// Hands a request from the network to a server's router.
async fn answer(server: TestServer, arrived: Arrived) -> federation::testing::Answered {
    let response = server.send(arrived.request.map(Body::from) as Request<Body>).await;
    let (head, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let kind = head.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    bytes(head.status.as_u16(), &[("content-type", kind.unwrap_or("application/json"))], body)
}
