//! The network of the simulation, which knows who asks whom: it delays, loses and doubles requests and answers, and parts
//! servers from one another. It also holds the randomness of the world and the record of all that happened.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use aqueduct::{api::extract::Peer, env::Env};
use axum::{Router, body::Body};
use bytes::Bytes;
use federation::{
    ports::{Addresses, NotResolved, NotSent, Place, Resolver, Services, Target, Transport},
    testing::{Answered, bytes},
};
use futures_util::{FutureExt, future::BoxFuture};
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use parking_lot::Mutex;
use rand::{RngExt, SeedableRng, rngs::ChaCha20Rng};
use tokio::time::{Instant, sleep};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt;
use tracing::{Instrument, Span, info_span};

/// Answers a request to a scripted server: who asks, and what.
pub(crate) type Script =
    Arc<dyn Fn(usize, Request<Bytes>) -> BoxFuture<'static, Response<Bytes>> + Send + Sync>;

/// A server as the network reaches it.
#[derive(Clone)]
pub(crate) enum Reached {
    /// A whole server in one of its lives.
    Whole { router: Router, env: Env, lost: CancellationToken },
    /// A server that follows a script.
    Scripted(Script),
}

/// Counts what was driven through the network.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Carried {
    /// Requests that somebody sent.
    pub(crate) requests: u64,
    /// Requests and answers that something happened to.
    pub(crate) faults: u64,
    /// Requests that met a partition.
    pub(crate) parted: u64,
    /// Joins over another server that were answered.
    pub(crate) joins: u64,
}

struct State {
    rng: ChaCha20Rng,
    reached: Vec<Option<Reached>>,
    /// Pairs of servers, the lower first, that do not reach each other until then.
    parted: BTreeMap<(usize, usize), Instant>,
    is_calm: bool,
    carried: Carried,
    digest: DefaultHasher,
    /// Things that must never happen, and did.
    wrongs: Vec<String>,
}

/// The network. All servers of a world share it.
pub(crate) struct Wire {
    state: Mutex<State>,
    began: Instant,
    is_loud: bool,
    /// The requests that are served now, which go on when nobody waits for the answer.
    serving: TaskTracker,
}

/// The fate of a request on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Arrives,
    Parted,
    LostBefore,
    LostAfter,
    Twice,
    /// A proxy on the way answers in the server's place.
    Misanswered,
}

/// The name of a server, which has a port for every other one: they are found in different ways.
pub(crate) fn name(place: usize) -> String {
    if place.is_multiple_of(2) { format!("s{place}.example") } else { format!("s{place}.example:8448") }
}

impl Wire {
    pub(crate) fn new(seed: u64, servers: usize, is_loud: bool) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                rng: ChaCha20Rng::seed_from_u64(seed),
                reached: vec![None; servers],
                parted: BTreeMap::new(),
                is_calm: false,
                carried: Carried::default(),
                digest: DefaultHasher::new(),
                wrongs: Vec::new(),
            }),
            began: Instant::now(),
            is_loud,
            serving: TaskTracker::new(),
        })
    }

    /// The time since the world began.
    pub(crate) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// A random number below `bound`.
    pub(crate) fn below(&self, bound: u64) -> u64 {
        self.state.lock().rng.random_range(0..bound)
    }

    /// Whether something with this chance (in a hundred) happens.
    pub(crate) fn happens(&self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// Waits a random while, up to `ms_max`.
    pub(crate) async fn pause(&self, ms_max: u64) {
        let us = self.below(ms_max * 1_000);
        sleep(Duration::from_micros(us)).await;
    }

    /// Notes what happened: it is part of the digest, and printed in a replay.
    pub(crate) fn note(&self, what: impl FnOnce() -> String) {
        let what = what();
        what.hash(&mut self.state.lock().digest);
        if self.is_loud {
            println!("{:>9.3} {what}", self.began.elapsed().as_secs_f64());
        }
    }

    /// The span of everything that a server does, so that a replay tells whose log it is.
    pub(crate) fn span(&self, place: usize) -> Span {
        if self.is_loud {
            info_span!(target: "aqueduct", parent: None, "server", place)
        } else {
            Span::none()
        }
    }

    /// The digest of everything that was noted.
    pub(crate) fn digest(&self) -> u64 {
        self.state.lock().digest.finish()
    }

    /// The counts of all that was driven through so far.
    pub(crate) fn carried(&self) -> Carried {
        self.state.lock().carried
    }

    /// Notes something that must never happen.
    pub(crate) fn wrong(&self, what: String) {
        self.state.lock().wrongs.push(what);
    }

    /// Fails when something happened that must never happen.
    pub(crate) fn assert_right(&self) {
        let wrongs = std::mem::take(&mut self.state.lock().wrongs);
        assert!(wrongs.is_empty(), "{wrongs:#?}");
    }

    /// Puts a server into the network, or takes it away.
    pub(crate) fn reach(&self, place: usize, reached: Option<Reached>) {
        self.state.lock().reached[place] = reached;
    }

    /// Parts two servers for this long.
    pub(crate) fn part(&self, one: usize, other: usize, time: Duration) {
        let until = Instant::now() + time;
        self.state.lock().parted.insert((one.min(other), one.max(other)), until);
    }

    /// Whether all faults have ended.
    pub(crate) fn is_calm(&self) -> bool {
        self.state.lock().is_calm
    }

    /// Ends all faults of the network.
    pub(crate) fn calm(&self) {
        let mut state = self.state.lock();
        state.parted.clear();
        state.is_calm = true;
    }

    /// Waits until no request is served any more.
    pub(crate) async fn quiet(&self) {
        self.serving.close();
        self.serving.wait().await;
        self.serving.reopen();
    }

    fn fate(&self, from: usize, to: usize) -> (Fate, Duration, Duration) {
        let mut state = self.state.lock();
        state.carried.requests += 1;
        let pair = (from.min(to), from.max(to));
        let is_parted = state.parted.get(&pair).is_some_and(|until| Instant::now() < *until);
        let is_calm = state.is_calm;
        let fate = match state.rng.random_range(0..100) {
            _ if is_parted => Fate::Parted,
            _ if is_calm => Fate::Arrives,
            0..3 => Fate::LostBefore,
            3..6 => Fate::LostAfter,
            6..9 => Fate::Twice,
            9 => Fate::Misanswered,
            _ => Fate::Arrives,
        };
        match fate {
            Fate::Arrives => {}
            Fate::Parted => state.carried.parted += 1,
            Fate::LostBefore | Fate::LostAfter | Fate::Twice | Fate::Misanswered => state.carried.faults += 1,
        }
        let mut delay = || {
            let slow = if is_calm { 100 } else { 3_000 };
            let ms = if state.rng.random_range(0..10) == 0 { slow } else { 60 };
            Duration::from_micros(state.rng.random_range(1_000..ms * 1_000))
        };
        (fate, delay(), delay())
    }

    async fn carry(
        self: Arc<Self>,
        from: usize,
        target: Target,
        request: Request<Bytes>,
    ) -> Result<Answered, NotSent> {
        let broken = || NotSent::Broken("connection reset".to_owned());
        let Some(to) = place_of(&target) else {
            return Err(NotSent::Unreachable("connection refused".to_owned()));
        };
        let line = format!("{} {} of s{from} to s{to}", request.method(), request.uri());
        let (fate, there, back) = self.fate(from, to);
        sleep(there).await;
        match fate {
            Fate::Parted => {
                self.note(|| format!("{line} meets a partition"));
                // Half of those who are parted learn of it at once, and half wait in vain.
                if self.happens(50) {
                    return Err(NotSent::Unreachable("no route to host".to_owned()));
                }
                sleep(Duration::from_secs(10)).await;
                return Err(broken());
            }
            Fate::LostBefore => {
                self.note(|| format!("{line} is lost"));
                return Err(broken());
            }
            Fate::Misanswered => {
                self.note(|| format!("{line} is answered by a proxy"));
                return Ok(bytes(502, &[("content-type", "text/html")], "<html>Bad gateway</html>"));
            }
            Fate::Arrives | Fate::LostAfter | Fate::Twice => {}
        }
        let is_join = line.contains("/send_join/");
        if fate == Fate::Twice {
            let (wire, again, line) = (self.clone(), request.clone(), line.clone());
            let late = Duration::from_millis(self.below(5_000));
            self.serving.spawn(async move {
                sleep(late).await;
                let answer = wire.serve(from, to, again).await;
                wire.note(|| format!("{line} arrived again: {:?}", answer.map(|it| it.status().as_u16())));
            });
        }
        let Some(answer) = self.serve(from, to, request).await else {
            self.note(|| format!("{line} finds nobody"));
            return Err(broken());
        };
        self.note(|| format!("{line}: {}", answer.status().as_u16()));
        if is_join && answer.status() == StatusCode::OK {
            self.state.lock().carried.joins += 1;
        }
        if answer.status() == StatusCode::INTERNAL_SERVER_ERROR {
            self.wrong(format!("{line} is answered with {:?}", answer.body()));
        }
        sleep(back).await;
        if fate == Fate::LostAfter {
            self.note(|| format!("the answer to {line} is lost"));
            return Err(broken());
        }
        let kind = answer.headers().get(http::header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        let kind = kind.unwrap_or("application/json").to_owned();
        Ok(bytes(answer.status().as_u16(), &[("content-type", &kind)], answer.into_body()))
    }

    /// Sends a request of a scripted server, with all that may happen on the way; `None` when there is no answer.
    pub(crate) async fn post(
        self: &Arc<Self>,
        from: usize,
        to: usize,
        request: Request<Bytes>,
    ) -> Option<Response<Bytes>> {
        let (fate, there, back) = self.fate(from, to);
        sleep(there).await;
        if matches!(fate, Fate::Parted | Fate::LostBefore | Fate::Misanswered) {
            return None;
        }
        let line = format!("{} {}", request.method(), request.uri());
        let answer = self.serve(from, to, request).await?;
        if answer.status() == StatusCode::INTERNAL_SERVER_ERROR {
            self.wrong(format!("{line} is answered with {:?}", answer.body()));
        }
        sleep(back).await;
        (fate != Fate::LostAfter).then_some(answer)
    }

    /// Hands a request to a server, which serves it whether or not anybody waits; `None` when the server goes down first.
    async fn serve(&self, from: usize, to: usize, request: Request<Bytes>) -> Option<Response<Bytes>> {
        let reached = self.state.lock().reached[to].clone()?;
        let served = match reached {
            Reached::Whole { router, env, lost } => {
                let mut request = request.map(Body::from);
                request.extensions_mut().insert(Peer([5, 0, 0, from as u8 + 1].into()));
                let span = self.span(to);
                let answer = async move {
                    let response = router.oneshot(request).instrument(span).await.unwrap();
                    let (head, body) = response.into_parts();
                    Response::from_parts(head, body.collect().await.unwrap().to_bytes())
                };
                self.serving.spawn(async move {
                    let answer = lost.run_until_cancelled(answer).await?;
                    // A process whose disk has failed is gone already.
                    let is_gone = answer.status().is_server_error() && env.is_killed();
                    (!is_gone).then_some(answer)
                })
            }
            Reached::Scripted(script) => {
                let answer = script(from, request);
                self.serving.spawn(async move { Some(answer.await) })
            }
        };
        served.await.unwrap()
    }
}

/// The server at this address; only the port 8448 is served.
fn place_of(target: &Target) -> Option<usize> {
    let Place::Addresses(admitted) = &target.place else { return None };
    let address = admitted.as_slice().iter().find(|address| address.port() == 8448)?;
    let std::net::IpAddr::V4(address) = address.ip() else { return None };
    Some(usize::from(address.octets()[3]) - 1)
}

/// The network as one server sees it.
pub(crate) struct Door {
    pub(crate) wire: Arc<Wire>,
    pub(crate) from: usize,
}

impl Resolver for Door {
    fn addresses<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Addresses, NotResolved>> {
        let place = host.strip_prefix('s').and_then(|rest| rest.strip_suffix(".example"));
        let answer = match place.and_then(|place| place.parse::<u8>().ok()) {
            Some(place) => {
                Ok(Addresses { addresses: vec![[5, 0, 0, place + 1].into()], ttl_s: 300, is_alias: false })
            }
            None => Err(NotResolved::Absent { ttl_s: 300 }),
        };
        futures_util::future::ready(answer).boxed()
    }

    fn services<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Services, NotResolved>> {
        futures_util::future::ready(Err(NotResolved::Absent { ttl_s: 300 })).boxed()
    }
}

impl Transport for Door {
    fn send(&self, target: Target, request: Request<Bytes>) -> BoxFuture<'_, Result<Answered, NotSent>> {
        self.wire.clone().carry(self.from, target, request).boxed()
    }
}
