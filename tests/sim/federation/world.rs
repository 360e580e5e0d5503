//! The world of one seed: several servers and their crashes, and the clients' way to them.

use std::{cell::RefCell, rc::Rc, sync::Arc, time::Duration};

use aqueduct::{
    api::extract::Peer,
    config::{Config, RegistrationMode},
    env::{Env, Network},
    flows::App,
    server::{Lead, Server},
    store::{Durability, Engine, Store, engine::Memory},
};
use axum::body::Body;
use http::{Method, Request, StatusCode, header};
use http_body_util::BodyExt;
use serde_json::Value;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tracing::{Instrument, subscriber::DefaultGuard};
use tracing_subscriber::{
    EnvFilter,
    fmt::{TestWriter, format::Writer, time::FormatTime},
};

use super::{
    Counts, checks, liar,
    people::People,
    wire::{Door, Reached, Wire, name},
};
use crate::checks as rows;

const BEGAN_MS: u64 = 1_767_225_600_000;
/// The number of whole servers. The server at the place after them is a scripted one that lies.
pub(crate) const SERVERS: usize = 5;
/// Everybody acts for this long; then the faults end, everybody finishes, and the world is checked.
const LIVES: Duration = Duration::from_secs(24);
/// A write of the disk takes at most this long.
const DISK_TAKES_MAX: Duration = Duration::from_millis(20);
/// A client gives up a request after this time.
const CLIENT_WAITS_MAX: Duration = Duration::from_secs(100);

/// The outcome of a request to a server that may crash.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    /// The server answered it with this status and body.
    Given(StatusCode, Value),
    /// There was no answer, so the request took effect or not.
    Lost,
}

/// One life of a server, from a start to a crash.
struct Life {
    server: Server,
    env: Env,
    /// Cancelled when this life ends, so that requests under way end unanswered.
    lost: CancellationToken,
}

/// The world of one seed.
pub(crate) struct World {
    pub(crate) wire: Arc<Wire>,
    lives: RefCell<Vec<Option<Life>>>,
    pub(crate) counts: RefCell<Counts>,
}

/// Runs the world of one seed to its end; answers what was driven through, and a digest of all that happened.
pub(crate) async fn live(seed: u64, is_loud: bool) -> (Counts, u64) {
    let _logging = is_loud.then(log);
    let world = World::begin(seed, is_loud);
    let liar = liar::begin(&world);
    let mut tasks = JoinSet::new();
    let people = People::begin(&world, &mut tasks);
    liar.live(&world, &people, &mut tasks);
    world.clone().disturb(&mut tasks).await;
    world.wire.calm();
    world.wire.note(|| "all faults have ended".to_owned());
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            std::panic::resume_unwind(error.into_panic());
        }
    }
    checks::settle(&world, &people).await;
    // All servers crash once more, so that the checks see what a crash leaves when all is flushed.
    sleep(DISK_TAKES_MAX * 3).await;
    for place in 0..SERVERS {
        world.crash(place, false).await;
    }
    checks::all(&world, &people).await;
    for place in 0..SERVERS {
        rows::store(&world.app(place).unwrap().store);
    }
    world.wire.assert_right();
    world.end().await;
    let mut counts = *world.counts.borrow();
    counts.carried = world.wire.carried();
    (counts, world.wire.digest())
}

/// Logs what the servers say, beside what everybody does. `AQUEDUCT_LOG` says what of it, as `log.level` does.
pub(super) fn log() -> DefaultGuard {
    let wanted =
        std::env::var("AQUEDUCT_LOG").unwrap_or_else(|_| "aqueduct=debug,federation=info".to_owned());
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(wanted))
        .with_timer(Elapsed(Instant::now()))
        .with_ansi(false)
        .with_writer(TestWriter::new())
        .finish();
    tracing::subscriber::set_default(subscriber)
}

/// Writes the time since the world began.
struct Elapsed(Instant);

impl FormatTime for Elapsed {
    fn format_time(&self, to: &mut Writer<'_>) -> std::fmt::Result {
        write!(to, "{:>9.3}", self.0.elapsed().as_secs_f64())
    }
}

impl World {
    /// A world whose servers have just started.
    pub(super) fn begin(seed: u64, is_loud: bool) -> Rc<Self> {
        let world = Rc::new(Self {
            wire: Wire::new(seed, SERVERS + 1, is_loud),
            lives: RefCell::new((0..SERVERS).map(|_| None).collect()),
            counts: RefCell::default(),
        });
        for place in 0..SERVERS {
            world.start(place, Memory::default());
        }
        world
    }

    fn start(&self, place: usize, memory: Memory) {
        let mut config = Config::default();
        config.server.name = name(place).as_str().try_into().unwrap();
        config.registration.mode = RegistrationMode::Open;
        config.passwords.argon2_memory_kib = 8;
        config.passwords.argon2_iterations = 1;
        config.limits.rate_limits = false;
        // An index writes in threads of its own, which no seed repeats.
        config.search.enabled = false;
        let store = Store::open(Engine::Memory(memory), Durability::Fsync).unwrap();
        let door = Arc::new(Door { wire: self.wire.clone(), from: place });
        let env = Env::simulated_with_disk(self.wire.below(u64::MAX), self.now_ms(), DISK_TAKES_MAX)
            .in_network(Network { resolver: door.clone(), transport: door.clone(), web: door });
        // The store is checked here, because a crash must leave it whole before anybody writes on.
        rows::store(&store);
        let server = self
            .wire
            .span(place)
            .in_scope(|| Server::start(config, env.clone(), store, Some(Lead::of_only_node())).unwrap());
        let lost = CancellationToken::new();
        let reached = Reached::Whole { router: server.router(), env: env.clone(), lost: lost.clone() };
        self.wire.reach(place, Some(reached));
        self.lives.borrow_mut()[place] = Some(Life { server, env, lost });
    }

    /// The time of the world, in milliseconds since the epoch.
    pub(crate) fn now_ms(&self) -> u64 {
        BEGAN_MS + u64::try_from(self.wire.elapsed().as_millis()).unwrap()
    }

    /// Whether everybody should come to an end.
    pub(crate) fn is_ending(&self) -> bool {
        self.wire.elapsed() >= LIVES
    }

    /// The parts of a server; none while it is down.
    pub(crate) fn app(&self, place: usize) -> Option<App> {
        self.lives.borrow()[place].as_ref().map(|life| life.server.app().clone())
    }

    /// Makes one request to a server, which is lost when the server is down or goes down first.
    pub(crate) async fn ask(
        &self,
        place: usize,
        method: Method,
        path: &str,
        token: Option<&str>,
        body: Value,
    ) -> Answer {
        let (router, lost, env) = {
            let lives = self.lives.borrow();
            let Some(life) = &lives[place] else { return Answer::Lost };
            (life.server.router(), life.lost.clone(), life.env.clone())
        };
        let mut request = Request::builder().method(&method).uri(path);
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
        let mut request = request.body(body).unwrap();
        request.extensions_mut().insert(Peer([192, 0, 2, 1].into()));
        let answer = async {
            let response = router.oneshot(request).instrument(self.wire.span(place)).await.unwrap();
            let status = response.status();
            let bytes = response.into_body().collect().await.unwrap().to_bytes();
            (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
        };
        let answer = lost.run_until_cancelled(tokio::time::timeout(CLIENT_WAITS_MAX, answer)).await;
        match answer {
            // The disk has failed, after which a real process would be gone already.
            Some(Ok((status, _))) if is_failure(status) && env.is_killed() => Answer::Lost,
            Some(Ok((status, json))) => {
                assert!(
                    status != StatusCode::INTERNAL_SERVER_ERROR,
                    "s{place}: {path} answers {status}: {json}"
                );
                if !self.is_ending() && self.wire.happens(2) {
                    self.wire.note(|| format!("the answer to {path} gets lost on its way"));
                    return Answer::Lost;
                }
                Answer::Given(status, json)
            }
            Some(Err(_)) => {
                self.wire.note(|| format!("s{place}: {method} {path} takes too long"));
                self.counts.borrow_mut().too_long += 1;
                Answer::Lost
            }
            None => Answer::Lost,
        }
    }

    /// Repeats a request until there is an answer.
    pub(crate) async fn insist(
        &self,
        place: usize,
        method: Method,
        path: &str,
        token: Option<&str>,
        body: Value,
    ) -> (StatusCode, Value) {
        loop {
            match self.ask(place, method.clone(), path, token, body.clone()).await {
                Answer::Given(status, json) => return (status, json),
                Answer::Lost => self.wire.pause(300).await,
            }
        }
    }

    /// Has servers crash and parts them, until everybody comes to an end.
    pub(super) async fn disturb(self: Rc<Self>, tasks: &mut JoinSet<()>) {
        while !self.is_ending() {
            self.wire.pause(4_000).await;
            let one = self.wire.below(SERVERS as u64) as usize;
            match self.wire.below(100) {
                0..45 => {
                    let world = self.clone();
                    tasks.spawn_local(async move {
                        if world.lives.borrow()[one].is_some() {
                            world.crash(one, true).await;
                        }
                    });
                }
                45..75 => {
                    let other = (one + 1 + self.wire.below(SERVERS as u64 - 1) as usize) % SERVERS;
                    let time = Duration::from_millis(self.wire.below(15_000));
                    self.wire.note(|| format!("s{one} and s{other} are parted for {time:?}"));
                    self.wire.part(one, other, time);
                }
                _ => {
                    let time = Duration::from_millis(self.wire.below(12_000));
                    self.wire.note(|| format!("s{one} is parted from all for {time:?}"));
                    for other in 0..=SERVERS {
                        self.wire.part(one, other, time);
                    }
                }
            }
        }
    }

    /// Ends a process where it stands, and starts it again over what the disk has. With `may_be_at_the_disk` it may also end
    /// at one of the next writes: before it, or after it and before anybody learns of it.
    pub(super) async fn crash(&self, place: usize, may_be_at_the_disk: bool) {
        let (env, lost, store) = {
            let lives = self.lives.borrow();
            let life = lives[place].as_ref().unwrap();
            (life.env.clone(), life.lost.clone(), life.server.app().store.clone())
        };
        let Engine::Memory(memory) = store.engine() else { unreachable!() };
        if may_be_at_the_disk && self.wire.happens(50) {
            let (writes, leaves_rows) = (self.wire.below(6), self.wire.happens(50));
            memory.fail_after(writes, leaves_rows);
            self.wire.note(|| {
                format!("the disk of s{place} fails after {writes} writes (leaves rows: {leaves_rows})")
            });
            for _ in 0..200 {
                if env.is_killed() {
                    break;
                }
                sleep(Duration::from_millis(5)).await;
            }
        }
        if lost.is_cancelled() {
            // Another crash has ended this life meanwhile.
            return;
        }
        lost.cancel();
        self.wire.reach(place, None);
        let kept = usize::try_from(self.wire.below(memory.unsynced_writes() as u64 + 1)).unwrap();
        self.wire.note(|| {
            format!("s{place} crashes: of {} writes not synced {kept} are kept", memory.unsynced_writes())
        });
        let memory = memory.after_crash(kept);
        drop(self.lives.borrow_mut()[place].take());
        env.kill();
        env.ended().await;
        self.counts.borrow_mut().crashes += 1;
        self.wire.pause(if self.wire.happens(80) { 500 } else { 8_000 }).await;
        self.start(place, memory);
        self.wire.note(|| format!("s{place} is up again"));
    }

    pub(super) async fn end(&self) {
        for place in 0..SERVERS {
            let life = self.lives.borrow_mut()[place].take().unwrap();
            life.lost.cancel();
            self.wire.reach(place, None);
            life.env.kill();
            life.env.ended().await;
        }
        self.wire.quiet().await;
    }
}

/// Whether a request may have failed because the disk has: it is the server's fault, or the server cannot act now.
fn is_failure(status: StatusCode) -> bool {
    status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS
}
