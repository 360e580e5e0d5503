//! The world of one seed: the server and its crashes, the clients' way to it, what everybody did.

use std::{
    cell::{Cell, RefCell},
    hash::{DefaultHasher, Hash, Hasher},
    rc::Rc,
    time::Duration,
};

use aqueduct::{
    api::extract::Peer,
    config::{Config, RegistrationMode},
    env::Env,
    server::{Lead, Server},
    store::{Durability, Engine, Store, engine::Memory},
};
use axum::body::Body;
use http::{Method, Request, StatusCode, header};
use http_body_util::BodyExt;
use rand::{RngExt, SeedableRng, rngs::ChaCha20Rng};
use serde_json::Value;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::{accounts, builders, checks, rooms};

const BEGAN_MS: u64 = 1_767_225_600_000;
/// Everybody acts for this long; then the crashes end, everybody finishes, and the world is checked.
const LIVES: Duration = Duration::from_secs(5);
/// A write of the disk takes at most this long.
const DISK_TAKES_MAX: Duration = Duration::from_millis(20);

/// The outcome of a request to a server that may crash.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    /// The server answered it with this status and body.
    Given(StatusCode, Value),
    /// The server went down before it answered, so the request took effect or not.
    Lost,
}

/// One life of the server, from a start to a crash.
struct Life {
    server: Server,
    env: Env,
    /// Cancelled when this life ends, so that requests under way end unanswered.
    lost: CancellationToken,
}

/// The world of one seed, which outlives the server's crashes.
pub(crate) struct World {
    rng: RefCell<ChaCha20Rng>,
    life: RefCell<Option<Life>>,
    began: Instant,
    crashes: Cell<u64>,
    digest: RefCell<DefaultHasher>,
    is_loud: bool,
}

/// Runs the world of one seed to its end; answers the number of crashes and a digest of all that happened.
pub(crate) async fn live(seed: u64, is_loud: bool) -> (u64, u64) {
    let world = Rc::new(World {
        rng: RefCell::new(ChaCha20Rng::seed_from_u64(seed)),
        life: RefCell::new(None),
        began: Instant::now(),
        crashes: Cell::new(0),
        digest: RefCell::new(DefaultHasher::new()),
        is_loud,
    });
    world.start(Memory::default());
    let mut people = JoinSet::new();
    let builders = builders::begin(&world, &mut people);
    let accounts = accounts::begin(&world, &mut people);
    let rooms = rooms::begin(&world, &mut people);
    world.clone().crash_now_and_then().await;
    while let Some(ended) = people.join_next().await {
        if let Err(error) = ended {
            std::panic::resume_unwind(error.into_panic());
        }
    }
    // The server crashes once more, so that the checks see what a crash leaves when all is flushed.
    sleep(DISK_TAKES_MAX * 3).await;
    world.crash(false).await;
    builders.check(&world);
    accounts.check(&world).await;
    rooms.check(&world).await;
    checks::store(&world.store().unwrap().0);
    world.end().await;
    (world.crashes.get(), world.digest.borrow().finish())
}

/// Whether a request may have failed because the disk has: it is the server's fault, or the server cannot act now.
fn is_failure(status: StatusCode) -> bool {
    status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS
}

impl World {
    fn start(&self, memory: Memory) {
        let mut config = Config::default();
        config.server.name = "sim.example".try_into().unwrap();
        config.registration.mode = RegistrationMode::Open;
        config.passwords.argon2_memory_kib = 8;
        config.passwords.argon2_iterations = 1;
        config.limits.rate_limits = false;
        // An index writes in threads of its own, which no seed repeats.
        config.search.enabled = false;
        let store = Store::open(Engine::Memory(memory), Durability::Fsync).unwrap();
        let env = Env::simulated_with_disk(self.below(u64::MAX), self.now_ms(), DISK_TAKES_MAX);
        // The store is checked here, because a crash must leave it whole before anybody writes on.
        checks::store(&store);
        let server = Server::start(config, env.clone(), store, Some(Lead::of_only_node())).unwrap();
        *self.life.borrow_mut() = Some(Life { server, env, lost: CancellationToken::new() });
    }

    /// The time of the world, in milliseconds since the epoch.
    pub(crate) fn now_ms(&self) -> u64 {
        BEGAN_MS + u64::try_from(self.began.elapsed().as_millis()).unwrap()
    }

    /// A random number below `bound`.
    pub(crate) fn below(&self, bound: u64) -> u64 {
        self.rng.borrow_mut().random_range(0..bound)
    }

    /// Whether something with this chance (in a hundred) happens.
    pub(crate) fn happens(&self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// Waits a random while, up to `ms_max`.
    pub(crate) async fn pause(&self, ms_max: u64) {
        let us = self.below(ms_max * 1000);
        sleep(Duration::from_micros(us)).await;
    }

    /// Whether everybody should come to an end.
    pub(crate) fn is_ending(&self) -> bool {
        self.began.elapsed() >= LIVES
    }

    /// Notes what happened: it is part of the digest, and printed in a replay.
    pub(crate) fn note(&self, what: impl FnOnce() -> String) {
        let what = what();
        what.hash(&mut *self.digest.borrow_mut());
        if self.is_loud {
            println!("{:>9.3} {what}", self.began.elapsed().as_secs_f64());
        }
    }

    /// The store of the present life; none while the server is down.
    pub(crate) fn store(&self) -> Option<(Store, CancellationToken)> {
        let life = self.life.borrow();
        life.as_ref().map(|life| (life.server.app().store.clone(), life.lost.clone()))
    }

    /// Makes one request, which is lost when the server is down or goes down first.
    pub(crate) async fn ask(&self, method: Method, path: &str, token: Option<&str>, body: Value) -> Answer {
        let (router, lost, env) = {
            let life = self.life.borrow();
            let Some(life) = &*life else { return Answer::Lost };
            (life.server.router(), life.lost.clone(), life.env.clone())
        };
        let mut request = Request::builder().method(method).uri(path);
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
        let mut request = request.body(body).unwrap();
        request.extensions_mut().insert(Peer([192, 0, 2, 1].into()));
        let answer = async {
            let response = router.oneshot(request).await.unwrap();
            let status = response.status();
            let bytes = response.into_body().collect().await.unwrap().to_bytes();
            (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
        };
        match lost.run_until_cancelled(answer).await {
            // The disk has failed, after which a real process would be gone already. Nothing was acknowledged by an answer
            // that tells the client to come back.
            Some((status, _)) if is_failure(status) && env.is_killed() => Answer::Lost,
            Some((status, json)) => {
                assert!(!status.is_server_error(), "{path} answers {status}: {json}");
                if self.happens(2) {
                    self.note(|| format!("the answer to {path} gets lost on its way"));
                    return Answer::Lost;
                }
                Answer::Given(status, json)
            }
            None => Answer::Lost,
        }
    }

    /// Repeats a request until there is an answer.
    pub(crate) async fn insist(
        &self,
        method: Method,
        path: &str,
        token: Option<&str>,
        body: Value,
    ) -> (StatusCode, Value) {
        loop {
            match self.ask(method.clone(), path, token, body.clone()).await {
                Answer::Given(status, json) => return (status, json),
                Answer::Lost => self.pause(300).await,
            }
        }
    }

    async fn crash_now_and_then(self: Rc<Self>) {
        while !self.is_ending() {
            self.pause(1_800).await;
            self.crash(true).await;
        }
    }

    /// Ends the process where it stands, and starts it again over what the disk has. With `may_be_at_the_disk` it may also end
    /// at one of the next writes: before it, or after it and before anybody learns of it.
    async fn crash(&self, may_be_at_the_disk: bool) {
        let (env, lost, store) = {
            let life = self.life.borrow();
            let life = life.as_ref().unwrap();
            (life.env.clone(), life.lost.clone(), life.server.app().store.clone())
        };
        let Engine::Memory(memory) = store.engine() else { unreachable!() };
        if may_be_at_the_disk && self.happens(50) {
            let (writes, leaves_rows) = (self.below(4), self.happens(50));
            memory.fail_after(writes, leaves_rows);
            self.note(|| format!("the disk fails after {writes} writes (leaves rows: {leaves_rows})"));
            for _ in 0..1_000 {
                if env.is_killed() {
                    break;
                }
                sleep(Duration::from_millis(1)).await;
            }
        }
        let kept = usize::try_from(self.below(memory.unsynced_writes() as u64 + 1)).unwrap();
        self.note(|| format!("crash: of {} writes not synced {kept} are kept", memory.unsynced_writes()));
        let memory = memory.after_crash(kept);
        lost.cancel();
        env.kill();
        env.ended().await;
        drop(self.life.borrow_mut().take());
        self.crashes.set(self.crashes.get() + 1);
        self.pause(500).await;
        self.start(memory);
    }

    async fn end(&self) {
        let env = self.life.borrow().as_ref().unwrap().env.clone();
        drop(self.life.borrow_mut().take());
        env.kill();
        env.ended().await;
    }
}
