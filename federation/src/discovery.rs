//! Finding a server from its name
//! ([server discovery](https://spec.matrix.org/v1.19/server-server-api/#server-discovery)).
//!
//! The result says where to connect to, for which name the certificate must be valid, and what the `Host` header is: three
//! things that differ from each other where a name is delegated. It is remembered as long as DNS and well-known answers allow;
//! callers who wait for the same name share one resolution.

mod freshness;
mod hosts;
mod name;
mod remembered;
pub(crate) mod services;
#[cfg(test)]
mod tests;
mod walk;
mod well_known;

use std::{num::NonZeroUsize, sync::Arc, time::Duration};

use futures_util::FutureExt;
use lru::LruCache;
use parking_lot::Mutex;
use ruma::{OwnedServerName, ServerName};
use url::Url;

pub(crate) use hosts::Hosts;

use crate::{
    discovery::{name::Name, remembered::Remembered, walk::Walk},
    guard::{Forbidden, Guard},
    joined::Joined,
    ports::{Ports, Target},
};

/// Resolutions and well-known answers that are remembered at most: about a kilobyte each.
const REMEMBERED_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(9_999);
/// A resolution is kept at least this long, however short the time to live: a busy server would ask DNS for each request.
const KEPT_LEAST_MS: u64 = 60_000;
/// And at most this long.
const KEPT_MAX_MS: u64 = 24 * 3_600_000;
/// A name that could not be resolved is not resolved again for this long, unless somebody asks why.
const ERROR_KEPT_MS: u64 = 60_000;
/// A well-known answer is asked for again if it led to what does not work, and is older than this.
const DOUBTED_FROM_MS: u64 = 3_600_000;
/// A whole resolution takes at most this long.
const TIMEOUT: Duration = Duration::from_secs(40);

/// The step of the specification that found a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The name is an IP address.
    Literal,
    /// The name has a port.
    Port,
    /// The host's well-known answer.
    WellKnown,
    /// It delegates to an IP address.
    DelegatedLiteral,
    /// It delegates to a name with a port.
    DelegatedPort,
    /// It delegates to a name with an SRV record.
    DelegatedService,
    /// It delegates to a name with an SRV record of the deprecated name.
    DelegatedDeprecatedService,
    /// It delegates to a name, on the default port.
    DelegatedDefaultPort,
    /// The name has an SRV record.
    Service,
    /// The name has an SRV record of the deprecated name.
    DeprecatedService,
    /// The name itself, on the default port.
    DefaultPort,
}

impl Step {
    /// The number that the specification gives the step.
    pub const fn number(self) -> &'static str {
        match self {
            Self::Literal => "1",
            Self::Port => "2",
            Self::WellKnown => "3",
            Self::DelegatedLiteral => "3.1",
            Self::DelegatedPort => "3.2",
            Self::DelegatedService => "3.3",
            Self::DelegatedDeprecatedService => "3.4",
            Self::DelegatedDefaultPort => "3.5",
            Self::Service => "4",
            Self::DeprecatedService => "5",
            Self::DefaultPort => "6",
        }
    }
}

/// A server that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where to connect to, and as what it must prove itself.
    pub target: Target,
    /// The step that found it.
    pub step: Step,
    /// This holds until then, in milliseconds since the epoch.
    pub until_ms: u64,
}

/// A server that was not found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotFound {
    /// The name follows no grammar, or DNS cannot know it.
    #[error("{server} is not a server's name: {why}")]
    BadName {
        /// The name.
        server: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Its SRV record says that there is no Matrix server.
    #[error("the SRV record {name} says that there is no such service")]
    Declined {
        /// The name of the record.
        name: String,
    },
    /// The host has no address.
    #[error("{host} has no address")]
    NoAddress {
        /// The host.
        host: String,
    },
    /// DNS gave no answer; it may later.
    #[error("{host}: {why}")]
    Failed {
        /// The host.
        host: String,
        /// What DNS said.
        why: String,
    },
    /// All its addresses are such that we do not connect to.
    #[error("{host}: {forbidden}")]
    Forbidden {
        /// The host.
        host: String,
        /// The first of the addresses.
        forbidden: Forbidden,
    },
    /// It took too long.
    #[error("finding {server} took too long")]
    TimedOut {
        /// The name.
        server: String,
    },
}

/// What one step found, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The step.
    pub step: Step,
    /// What it found.
    pub told: String,
}

/// How a name is resolved, step by step, for an operator.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// What each step found, in order.
    pub lines: Vec<Line>,
    /// What came of it.
    pub result: Result<Found, NotFound>,
}

/// Finds servers. Cheap to clone.
#[derive(Clone)]
pub struct Discovery(Arc<Parts>);

/// Resolutions that are remembered: how they ended, and until when that holds.
type Resolutions = LruCache<OwnedServerName, (Result<Arc<Found>, NotFound>, u64)>;

struct Parts {
    ports: Ports,
    hosts: Hosts,
    found: Mutex<Resolutions>,
    well_known: Mutex<LruCache<String, Remembered>>,
    resolving: Joined<OwnedServerName, Result<Arc<Found>, NotFound>>,
}

impl Discovery {
    /// Finds servers through these ports, and only those that the guard admits. With `leaves_names_to_proxy` names are not
    /// resolved here, because all requests go through a forward proxy that does.
    pub fn new(ports: Ports, guard: Guard, leaves_names_to_proxy: bool) -> Self {
        let hosts = Hosts::new(Arc::clone(&ports.resolver), guard, leaves_names_to_proxy);
        Self(Arc::new(Parts {
            ports,
            hosts,
            found: Mutex::new(LruCache::new(REMEMBERED_MAX)),
            well_known: Mutex::new(LruCache::new(REMEMBERED_MAX)),
            resolving: Joined::default(),
        }))
    }

    /// Finds a server. Errors: [`NotFound`], which holds for a minute.
    pub async fn find(&self, server: &ServerName) -> Result<Arc<Found>, NotFound> {
        let parts = &self.0;
        let now_ms = parts.ports.clock.now_ms();
        if let Some((result, until_ms)) = parts.found.lock().get(server)
            && now_ms < *until_ms
            && *until_ms <= now_ms.saturating_add(KEPT_MAX_MS)
        {
            return result.clone();
        }
        let owned = server.to_owned();
        let resolve = {
            let (parts, owned) = (Arc::clone(parts), owned.clone());
            move || async move { parts.resolve(owned).await }.boxed()
        };
        parts.resolving.run(owned, resolve).await
    }

    /// Says that the server could not be reached where it was found, so that it is looked up anew. That waits for a minute, in
    /// which it would come out the same.
    pub fn doubt(&self, server: &ServerName, found: &Found) {
        let parts = &self.0;
        let now_ms = parts.ports.clock.now_ms();
        let mut remembered = parts.found.lock();
        let is_this =
            remembered.peek(server).is_some_and(|(result, _)| result.as_ref().is_ok_and(|it| **it == *found));
        if is_this && let Some((_, until_ms)) = remembered.get_mut(server) {
            *until_ms = (*until_ms).min(now_ms.saturating_add(KEPT_LEAST_MS));
        }
        drop(remembered);
        if let Some(known) = parts.well_known.lock().get_mut(&server.host().to_ascii_lowercase()) {
            known.doubt(now_ms, DOUBTED_FROM_MS);
        }
    }

    /// Says that the server has spoken to this one, so that it is there: that it could not be found does not hold any more.
    pub fn heard_from(&self, server: &ServerName) {
        let mut remembered = self.0.found.lock();
        if remembered.peek(server).is_some_and(|(result, _)| result.is_err()) {
            remembered.pop(server);
        }
    }

    /// Says where a URL leads that another server has named: its host is looked up now, and only addresses that the guard admits are
    /// connected to. Errors: why it leads nowhere.
    pub async fn locate_url(&self, url: &Url) -> Result<Target, String> {
        if url.scheme() != "https" {
            return Err("the URL is not of https".to_owned());
        }
        let located = tokio::time::timeout(TIMEOUT, self.0.hosts.find_url(url)).await;
        let located = located.map(|located| located.map_err(|why| why.to_string()));
        located.unwrap_or_else(|_| Err("finding the host took too long".to_owned()))
    }

    /// Resolves a name anew, whatever is remembered, and says what each step found.
    pub async fn explain(&self, server: &ServerName) -> Explanation {
        let name = match Name::of(server) {
            Ok(name) => name,
            Err(why) => return Explanation { lines: Vec::new(), result: Err(bad_name(server, why)) },
        };
        let mut walk = Walk::new(&self.0, true);
        let result = tokio::time::timeout(TIMEOUT, walk.resolve(name)).await;
        let timed_out = Err(NotFound::TimedOut { server: server.to_string() });
        let result = result.unwrap_or(timed_out);
        let lines = walk.lines;
        // Whoever mended something and looks here whether it helped, wants it used at once.
        self.0.remember(server.to_owned(), result.clone().map(Arc::new));
        Explanation { lines, result }
    }
}

/// The steps of a resolution in one line, each with the number that the specification gives it.
fn steps_told(lines: &[Line]) -> String {
    let lines: Vec<_> = lines.iter().map(|line| format!("{}: {}", line.step.number(), line.told)).collect();
    lines.join("; ")
}

fn bad_name(server: &ServerName, why: &'static str) -> NotFound {
    NotFound::BadName { server: server.to_string(), why }
}

impl Parts {
    async fn resolve(&self, server: OwnedServerName) -> Result<Arc<Found>, NotFound> {
        let mut walk = Walk::new(self, false);
        let result = match Name::of(&server) {
            Ok(name) => tokio::time::timeout(TIMEOUT, walk.resolve(name))
                .await
                .unwrap_or_else(|_| Err(NotFound::TimedOut { server: server.to_string() })),
            Err(why) => Err(bad_name(&server, why)),
        };
        let result = result.map(Arc::new);
        let steps = steps_told(&walk.lines);
        match &result {
            Ok(found) => tracing::debug!(%server, step = found.step.number(), steps, "a server is found"),
            Err(why) => tracing::debug!(%server, %why, steps, "a server is not found"),
        }
        self.remember(server, result.clone());
        result
    }

    fn remember(&self, server: OwnedServerName, result: Result<Arc<Found>, NotFound>) {
        let until_ms = match &result {
            Ok(found) => found.until_ms,
            Err(_) => self.ports.clock.now_ms().saturating_add(ERROR_KEPT_MS),
        };
        self.found.lock().put(server, (result, until_ms));
    }

    /// What a host's well-known answer says, and until when that holds.
    async fn well_known(&self, host: &str, is_fresh: bool) -> (Result<Name, String>, u64) {
        let now_ms = self.ports.clock.now_ms();
        let known = self.well_known.lock().get(host).cloned();
        if let Some(known) = &known
            && !is_fresh
            && known.holds(now_ms)
        {
            return (known.answer.clone(), known.until_ms);
        }
        let asked = well_known::ask(self, host).await;
        let now_ms = self.ports.clock.now_ms();
        let random = self.ports.randomness.below(u64::MAX);
        let known = Remembered::after(known.as_ref(), asked, now_ms, random);
        let told = (known.answer.clone(), known.until_ms);
        self.well_known.lock().put(host.to_owned(), known);
        told
    }
}
