//! The ports through which the crate of federation reaches the machine: they lead to the doors of this server.

use std::sync::Arc;

use federation::{
    guard::{Guard, parse_network},
    ports::{
        Addresses, Body, Clock, NotResolved, NotSent, Payers, Randomness, Resolver, Services, Target, Tasks,
        Transport,
    },
    transport::{Https, Proxy, Trust, dns::SystemDns},
    web::Web,
};
use futures_util::{FutureExt, future::BoxFuture};

use crate::{
    config::Config,
    env::{Env, Network, payer},
    error::{Error, Result},
};

/// The wall clock, the randomness and the tasks of this server.
pub(crate) struct Doors(pub(crate) Env);

impl Clock for Doors {
    fn now_ms(&self) -> u64 {
        self.0.now_ms()
    }
}

impl Randomness for Doors {
    fn below(&self, bound: u64) -> u64 {
        self.0.random_below(bound)
    }
}

impl Payers for Doors {
    fn current(&self) -> Option<u64> {
        payer::current().first().number()
    }
}

impl Tasks for Doors {
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        self.0.spawn(task);
    }
}

/// Opens the network: that of the simulated world, or the real one with these settings. Fails where a setting cannot be used.
pub(crate) fn open(config: &Config, env: &Env) -> Result<Network> {
    if env.is_simulated() {
        let none =
            Network { resolver: Arc::new(Nowhere), transport: Arc::new(Nowhere), web: Arc::new(Nowhere) };
        return Ok(env.simulated_network().unwrap_or(none));
    }
    let broken = |error: &dyn std::fmt::Display| Error::broken(error.to_string());
    let authorities = &config.federation.trusted_ca_file;
    let authorities = (!authorities.as_os_str().is_empty()).then_some(authorities);
    let trust = Trust::load(authorities.as_slice()).map_err(|it| broken(&it))?;
    let proxy = &config.federation.proxy;
    let proxy = (!proxy.is_empty()).then(|| Proxy::parse(proxy)).transpose().map_err(|it| broken(&it))?;
    let doors = Arc::new(Doors(env.clone()));
    let web = Https::for_web(&trust, proxy.clone(), doors.clone(), doors.clone());
    let transport = Https::new(&trust, proxy, doors.clone(), doors);
    let resolver = SystemDns::new().map_err(|it| broken(&it))?;
    Ok(Network { resolver: Arc::new(resolver), transport: Arc::new(transport), web: Arc::new(web) })
}

/// Opens the way to the bucket of `[media.s3]`; none where there is none. The operator has named its host, so that it may be in a network
/// of theirs. Fails where a setting cannot be used.
pub(crate) fn open_to_bucket(config: &Config, env: &Env) -> Result<Option<Web>> {
    let settings = &config.media.s3;
    if !settings.is_used() {
        return Ok(None);
    }
    let broken =
        |error: &dyn std::fmt::Display| Error::broken(format!("the bucket cannot be reached: {error}"));
    let all = ["0.0.0.0/0", "::/0"].into_iter().map(parse_network).collect::<Result<_, _>>();
    let guard = Guard::new(all.map_err(|why| broken(&why))?);
    if env.is_simulated() {
        let network = env.simulated_network().ok_or_else(|| broken(&NOBODY))?;
        return Ok(Some(Web::new(network.resolver, network.web, guard, false)));
    }
    let authorities = &settings.trusted_ca_file;
    let authorities = (!authorities.as_os_str().is_empty()).then_some(authorities);
    let trust = Trust::load(authorities.as_slice()).map_err(|it| broken(&it))?;
    let doors = Arc::new(Doors(env.clone()));
    let transport = Https::for_web(&trust, None, doors.clone(), doors);
    let resolver = SystemDns::new().map_err(|it| broken(&it))?;
    Ok(Some(Web::new(Arc::new(resolver), Arc::new(transport), guard, false)))
}

/// A world without other servers.
struct Nowhere;

const NOBODY: &str = "there is no other server in this world";

impl Resolver for Nowhere {
    fn addresses<'a>(&'a self, _host: &'a str) -> BoxFuture<'a, std::result::Result<Addresses, NotResolved>> {
        async { Err(NotResolved::Failed(NOBODY.to_owned())) }.boxed()
    }

    fn services<'a>(&'a self, _name: &'a str) -> BoxFuture<'a, std::result::Result<Services, NotResolved>> {
        async { Err(NotResolved::Failed(NOBODY.to_owned())) }.boxed()
    }
}

impl Transport for Nowhere {
    fn send(
        &self,
        _target: Target,
        _request: http::Request<bytes::Bytes>,
    ) -> BoxFuture<'_, std::result::Result<http::Response<Body>, NotSent>> {
        async { Err(NotSent::Unreachable(NOBODY.to_owned())) }.boxed()
    }
}
