//! The doors to the machine: clock, randomness, tasks and blocking work come in here and nowhere else.
//!
//! A real server has [`Env::real`]. A simulated one has [`Env::simulated`]: the clock is tokio's (paused in tests),
//! randomness comes from a seed, blocking work runs in place, so that a whole server is repeatable.

pub mod dial;
pub(crate) mod hold;
pub mod payer;
pub(crate) mod pool;
pub mod spent;

use std::{future::Future, sync::Arc, time::Duration};

use federation::ports::{Resolver, Transport};
use parking_lot::Mutex;
use rand::{Rng, RngExt, SeedableRng, rngs::ChaCha20Rng, rngs::SysRng};
use ruma::MilliSecondsSinceUnixEpoch;
use tokio::time::Instant;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument, Span};

use crate::{
    env::{
        dial::{Dial, Wire},
        payer::Payers,
        pool::{Full, Pool},
    },
    error::{Error, Result},
};

/// A caller who finds a queue full is told to try again after this time.
const BUSY_RETRY: Duration = Duration::from_secs(2);

/// A server that stops looks this often whether calls have ended.
const CALLS_LOOKED_AT_EVERY: Duration = Duration::from_millis(10);

/// At most this many of the calls run at once that read or write the store and end soon.
const SHORT_CALLS_MAX: usize = 32;
/// At most this many calls run at once that write what waits for rooms' turns. They have places of their own, so that one
/// sender into forty rooms takes no place from those who read.
const WRITING_CALLS_MAX: usize = 16;

/// Calls that may take long, by what they do: each kind has threads and a queue of its own, so that none waits for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Long {
    /// The call hashes a password.
    Password,
    /// The call searches text or directories.
    Search,
    /// The call resolves the state of a room.
    Resolution,
    /// The call copies or checks the whole store.
    Maintenance,
    /// The call reads a large part of a room for another server.
    History,
    /// The call writes to the index of search.
    Indexing,
    /// The call reads or writes a piece of a file of media.
    Media,
    /// The call makes a thumbnail.
    Thumbnail,
}

impl Long {
    /// All kinds, in the order in which [`Env`] keeps their pools.
    pub const ALL: [Self; LONG_KINDS] = [
        Self::Password,
        Self::Search,
        Self::Resolution,
        Self::Maintenance,
        Self::History,
        Self::Indexing,
        Self::Media,
        Self::Thumbnail,
    ];

    /// The number of calls of this kind that run at once, and the number of calls that may wait besides.
    pub const fn bounds(self) -> (usize, usize) {
        match self {
            // An address has a quarter of these calls. That is room for as many passwords as it may send at once by the default
            // bursts of `[limits] login` and `register`, as when a class of pupils registers.
            Self::Password => (2, 256),
            Self::Search => (2, 64),
            Self::Resolution | Self::History => (2, 64),
            Self::Maintenance | Self::Indexing => (1, 4),
            // Each transfer that is under way has one call, and a disk that is slow holds up nothing else.
            Self::Media => (16, 4096),
            // A thumbnail may take a hundred megabytes while it is made.
            // A page of a room may ask for a hundred new ones, and one that waits takes hardly any memory.
            Self::Thumbnail => (2, 510),
        }
    }

    /// The name of its queue in `/metrics` and in the log.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Password => "passwords",
            Self::Search => "searches",
            Self::Resolution => "resolutions",
            Self::Maintenance => "maintenance",
            Self::History => "history",
            Self::Indexing => "indexing",
            Self::Media => "media",
            Self::Thumbnail => "thumbnails",
        }
    }
}

/// The number of kinds of long calls.
const LONG_KINDS: usize = 8;

impl Pool {
    fn of_long(kind: Long) -> Self {
        let (running, waiting) = kind.bounds();
        Self::new(running, running + waiting)
    }
}

/// The doors of one server. Cheap to clone.
#[derive(Clone)]
pub struct Env(Arc<Inner>);

/// The way out to other servers and to pages of the web: DNS, HTTPS and HTTP.
#[derive(Clone)]
pub struct Network {
    /// Finds the addresses of names.
    pub resolver: Arc<dyn Resolver>,
    /// Sends requests to servers over HTTPS.
    pub transport: Arc<dyn Transport>,
    /// Sends requests for pages of the web, over connections of its own.
    pub web: Arc<dyn Transport>,
}

struct Inner {
    /// The network of a simulated world; the real one is opened with the settings.
    simulated_network: Option<Network>,
    /// The hosts that the operator names, in a simulated world.
    simulated_hosts: Option<Arc<dyn Dial>>,
    /// A simulated world began at this time, in milliseconds since the epoch; the real one has none.
    simulated_began_ms: Option<u64>,
    /// The longest that a write of a simulated disk takes.
    disk_takes_max: Duration,
    began: Instant,
    rng: Mutex<ChaCha20Rng>,
    tasks: TaskTracker,
    /// Cancelled to drop every task where it stands.
    killed: CancellationToken,
    short: Pool,
    writing: Pool,
    /// The pools of the kinds of long calls, in the order of [`Long::ALL`].
    long: [Pool; LONG_KINDS],
}

impl Env {
    /// The doors of a real server. Fails when the system gives no randomness.
    pub fn real() -> Result<Self> {
        let rng = ChaCha20Rng::try_from_rng(&mut SysRng)
            .map_err(|error| Error::broken(format!("the system gives no randomness: {error}")))?;
        Ok(Self::new(rng, None, Duration::ZERO))
    }

    /// The doors of a server in a simulated world that begins at `began_ms` (milliseconds since the epoch).
    pub fn simulated(seed: u64, began_ms: u64) -> Self {
        Self::new(ChaCha20Rng::seed_from_u64(seed), Some(began_ms), Duration::ZERO)
    }

    /// Like [`Env::simulated`], with a disk whose writes take up to `disk_takes_max` each, as the seed has it.
    pub fn simulated_with_disk(seed: u64, began_ms: u64, disk_takes_max: Duration) -> Self {
        Self::new(ChaCha20Rng::seed_from_u64(seed), Some(began_ms), disk_takes_max)
    }

    /// A simulated server in this network. It must be called before the doors are shared.
    pub fn in_network(self, network: Network) -> Self {
        match Arc::try_unwrap(self.0) {
            Ok(inner) => Self(Arc::new(Inner { simulated_network: Some(network), ..inner })),
            Err(shared) => {
                debug_assert!(false, "the doors are shared already");
                Self(shared)
            }
        }
    }

    /// A simulated server whose operator names these hosts. It must be called before the doors are shared.
    pub fn with_hosts(self, hosts: Arc<dyn Dial>) -> Self {
        match Arc::try_unwrap(self.0) {
            Ok(inner) => Self(Arc::new(Inner { simulated_hosts: Some(hosts), ..inner })),
            Err(shared) => {
                debug_assert!(false, "the doors are shared already");
                Self(shared)
            }
        }
    }

    /// Connects to a host that the operator names, such as a mail server: it may be at any address. Whoever waits bounds the time.
    /// Errors: those of the system; `ConnectionRefused` in a simulated world without such hosts.
    pub async fn dial(&self, host: &str, port: u16) -> std::io::Result<Box<dyn Wire>> {
        match &self.0.simulated_hosts {
            Some(hosts) => hosts.dial(host, port).await,
            None if self.is_simulated() => Err(std::io::ErrorKind::ConnectionRefused.into()),
            None => dial::over_tcp(host, port).await,
        }
    }

    /// The network of a simulated world; `None` for the real one, and for a world that has none.
    pub fn simulated_network(&self) -> Option<Network> {
        self.0.simulated_network.clone()
    }

    #[expect(clippy::disallowed_methods, reason = "this is the door")]
    fn new(rng: ChaCha20Rng, simulated_began_ms: Option<u64>, disk_takes_max: Duration) -> Self {
        Self(Arc::new(Inner {
            simulated_network: None,
            simulated_hosts: None,
            simulated_began_ms,
            disk_takes_max,
            began: Instant::now(),
            rng: Mutex::new(rng),
            tasks: TaskTracker::new(),
            killed: CancellationToken::new(),
            short: Pool::new(SHORT_CALLS_MAX, usize::MAX),
            writing: Pool::new(WRITING_CALLS_MAX, usize::MAX),
            long: Long::ALL.map(Pool::of_long),
        }))
    }

    /// Whether the world is simulated: then nothing may start a thread of its own.
    pub fn is_simulated(&self) -> bool {
        self.0.simulated_began_ms.is_some()
    }

    /// The wall clock. It may go back; nothing may depend on it being monotonic or unique.
    pub fn now(&self) -> MilliSecondsSinceUnixEpoch {
        let ms = self.now_ms();
        MilliSecondsSinceUnixEpoch(ruma::UInt::new_saturating(ms))
    }

    /// The wall clock in milliseconds since the epoch.
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.since_epoch().as_millis()).unwrap_or(u64::MAX)
    }

    /// The time that an event made now carries, in milliseconds since the epoch. It is rounded up, so that a client that looked
    /// at the clock before asking for the event finds the event after that, and not at the same moment.
    pub fn event_ms(&self) -> u64 {
        u64::try_from(self.since_epoch().as_micros().div_ceil(1_000)).unwrap_or(u64::MAX)
    }

    fn since_epoch(&self) -> Duration {
        match self.0.simulated_began_ms {
            Some(began) => Duration::from_millis(began) + self.uptime(),
            #[expect(clippy::disallowed_methods, reason = "this is the door")]
            None => std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default(),
        }
    }

    /// A clock that never goes back, for measuring how long something took.
    #[expect(clippy::disallowed_methods, reason = "this is the door")]
    pub fn instant(&self) -> Instant {
        Instant::now()
    }

    /// How long this server has run.
    pub fn uptime(&self) -> Duration {
        self.instant().saturating_duration_since(self.0.began)
    }

    /// Waits for this long; in a paused test the clock moves on instead.
    #[expect(clippy::disallowed_methods, reason = "this is the door")]
    pub async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    /// Waits as long as a write of the simulated disk takes; for a real disk it does not wait.
    pub async fn disk(&self) {
        let takes_us = u64::try_from(self.0.disk_takes_max.as_micros()).unwrap_or(u64::MAX);
        if takes_us > 0 {
            self.sleep(Duration::from_micros(self.random_below(takes_us))).await;
        }
    }

    /// Fills the buffer with randomness good enough for keys and tokens.
    pub fn fill_random(&self, buffer: &mut [u8]) {
        self.0.rng.lock().fill_bytes(buffer);
    }

    /// A random string of letters and digits: 5.95 bits a character.
    pub fn random_string(&self, characters: usize) -> String {
        const ALPHABET: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
        let mut rng = self.0.rng.lock();
        (0..characters)
            .map(|_| ALPHABET.get(rng.random_range(0..ALPHABET.len())).map_or('A', |byte| char::from(*byte)))
            .collect()
    }

    /// A random number below `bound` (0 for a bound of 0): jitter and choices, not secrets.
    pub fn random_below(&self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.0.rng.lock().random_range(0..bound) }
    }

    /// Starts a task that lives until it ends or the server is killed. Its work counts for the payers of the current one.
    pub fn spawn<F: Future<Output = ()> + Send + 'static>(&self, task: F) {
        let killed = self.0.killed.clone();
        // A future is moved by each that it is wrapped in, and some are large: unless they are on the heap, a build without optimisations
        // runs out of stack.
        let task = payer::current().during(Box::pin(task));
        // In a simulation several servers log to one place, so that their tasks keep the span that names the server.
        let span = if self.is_simulated() { Span::current() } else { Span::none() };
        let task = async move {
            killed.run_until_cancelled(task).await;
        };
        drop(self.0.tasks.spawn(task.instrument(span)));
    }

    /// Starts a thread that drives one future, for work that must not wait behind other tasks. In a simulation it is a task.
    pub fn spawn_thread<F: Future<Output = ()> + Send + 'static>(&self, name: &str, task: F) -> Result<()> {
        if self.is_simulated() {
            self.spawn(task);
            return Ok(());
        }
        let handle = tokio::runtime::Handle::current();
        let killed = self.0.killed.clone();
        let token = self.0.tasks.token();
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let _token = token;
            handle.block_on(killed.run_until_cancelled(task));
        })?;
        Ok(())
    }

    /// Runs a plain function that reads or writes the store, off the async threads.
    /// Errors: what the function answers; [`Error::Broken`] when it panics.
    pub async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.run(&self.0.short, call).await
    }

    /// Starts a plain function off the async threads, and does not wait for it. It writes what has waited for the turn of a room,
    /// and counts for these payers.
    #[expect(clippy::disallowed_methods, reason = "this is the door")]
    pub fn spawn_writing(&self, payers: Payers, call: impl FnOnce() + Send + 'static) {
        if self.is_simulated() {
            return self.spawn(async move { call() });
        }
        match self.0.writing.try_take(payers) {
            // Where a place is free, no task is made to wait for it, because that costs as much as a small call itself.
            Some(permit) if !self.is_killed() => {
                let token = self.0.tasks.token();
                drop(tokio::task::spawn_blocking(move || {
                    call();
                    drop((permit, token));
                }));
            }
            _ => {
                let env = self.clone();
                self.spawn(async move {
                    let done = env.run(&env.0.writing, move || {
                        call();
                        Ok(())
                    });
                    if let Err(error) = payers.during(done).await {
                        tracing::error!(%error, "a call that nobody waits for failed");
                    }
                });
            }
        }
    }

    /// Like [`Env::blocking`], for calls that may take long: they starve neither short calls nor long calls of another kind.
    /// Errors: as there, and [`Error::Busy`] where too many calls of this kind wait already, of all payers or of these.
    pub async fn blocking_long<T: Send + 'static>(
        &self,
        kind: Long,
        call: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.run(self.pool(kind), call).await
    }

    fn pool(&self, kind: Long) -> &Pool {
        let [passwords, searches, resolutions, maintenance, history, indexing, media, thumbnails] =
            &self.0.long;
        match kind {
            Long::Password => passwords,
            Long::Search => searches,
            Long::Resolution => resolutions,
            Long::Maintenance => maintenance,
            Long::History => history,
            Long::Indexing => indexing,
            Long::Media => media,
            Long::Thumbnail => thumbnails,
        }
    }

    /// The number of long calls of each kind that run or wait, by the name of their queue.
    pub fn long_calls(&self) -> [(&'static str, usize); LONG_KINDS] {
        Long::ALL.map(|kind| (kind.name(), self.pool(kind).call_count()))
    }

    /// Runs a call on a thread of its own when the pool has a place for the payers of the current task. The call keeps its
    /// place until it ends, also when nobody waits for it any more: a client that hangs up must not make room for one call more.
    #[expect(clippy::disallowed_methods, reason = "this is the door")]
    async fn run<T: Send + 'static>(
        &self,
        pool: &Pool,
        call: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        if self.is_simulated() {
            let _gate = payer::pass_gate()?;
            return call();
        }
        let queued = self.instant();
        let permit = pool.take(payer::current()).await.map_err(busy)?;
        let gate = payer::pass_gate()?;
        let began = self.instant();
        spent::add(spent::Place::Queued, began.saturating_duration_since(queued));
        // The call logs on behalf of the request that it works for.
        let span = tracing::Span::current();
        let call = move || {
            let _permit = permit;
            span.in_scope(|| payer::with_gate(gate, call))
        };
        let result = tokio::task::spawn_blocking(call).await;
        spent::add(spent::Place::Working, self.instant().saturating_duration_since(began));
        match result {
            Ok(result) => result,
            Err(error) => {
                Err(Error::broken(format!("a call off the async threads panicked or was cancelled: {error}")))
            }
        }
    }

    /// Waits at most this long until no call runs off the async threads, and answers the names of those queues whose calls run
    /// still, with their numbers.
    pub async fn calls_ended(&self, within: Duration) -> Vec<(&'static str, usize)> {
        let until = self.instant() + within;
        loop {
            let long = Long::ALL.map(|kind| (kind.name(), self.pool(kind).running_count()));
            let short = [("reads", self.0.short.running_count()), ("writes", self.0.writing.running_count())];
            let running: Vec<_> = short.into_iter().chain(long).filter(|(_, count)| *count > 0).collect();
            if running.is_empty() || self.instant() >= until {
                return running;
            }
            self.sleep(CALLS_LOOKED_AT_EVERY).await;
        }
    }

    /// Drops every task where it stands: a crash, or the end of a drained server.
    pub fn kill(&self) {
        self.0.killed.cancel();
        self.0.tasks.close();
    }

    /// Whether [`Env::kill`] was called, so that no task goes on.
    pub fn is_killed(&self) -> bool {
        self.0.killed.is_cancelled()
    }

    /// Resolves once every task has ended, after [`Env::kill`].
    pub async fn ended(&self) {
        self.0.tasks.wait().await;
    }
}

/// Tells a caller who finds a queue full when to try again.
fn busy(full: Full) -> Error {
    tracing::debug!(?full, reason = "the queue is full", "a call is refused");
    Error::Busy { retry_after: BUSY_RETRY }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tracing::Instrument;
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;
    use crate::ids::UserNum;

    /// A subscriber that notes the threads on which a span is entered.
    struct Entered(Arc<Mutex<Vec<std::thread::ThreadId>>>);

    impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Entered {
        fn on_enter(&self, _: &tracing::Id, _: tracing_subscriber::layer::Context<'_, S>) {
            self.0.lock().push(std::thread::current().id());
        }
    }

    #[tokio::test]
    async fn a_call_off_the_async_threads_is_within_the_span_of_its_request() {
        let env = Env::real().unwrap();
        let entered = Arc::default();
        let layer = Entered(Arc::clone(&entered));
        let subscriber = tracing_subscriber::registry().with(layer);
        let _logging = tracing::subscriber::set_default(subscriber);
        let calls = async {
            let thread = || Ok(std::thread::current().id());
            [env.blocking(thread).await.unwrap(), env.blocking_long(Long::Search, thread).await.unwrap()]
        };
        let threads = calls.instrument(tracing::info_span!("request")).await;
        for thread in threads {
            assert_ne!(thread, std::thread::current().id());
            assert!(entered.lock().contains(&thread), "the span was not entered there");
        }
    }

    #[test]
    fn an_address_has_room_for_the_passwords_that_its_limits_allow_at_once() {
        let limits = crate::config::Limits::default();
        let (running, waiting) = Long::Password.bounds();
        let mut shares = payer::Shares::new(running + waiting);
        let address = Payers::of_request(None, [192, 0, 2, 1].into());
        shares.take(address, (limits.login.burst + limits.register.burst) as usize);
        assert_eq!(shares.find_without_room(address, 0), None);
    }

    /// A runtime of real threads, which wait for each other and for no clock.
    #[tokio::test]
    async fn long_calls_of_one_kind_wait_for_none_of_another_and_their_queue_has_an_end() {
        let env = Env::real().unwrap();
        let (running, waiting) = Long::Password.bounds();
        let mut releases = Vec::new();
        let mut calls = futures_util::stream::FuturesUnordered::new();
        for _ in 0..running + waiting {
            let (release, released) = mpsc::channel::<()>();
            releases.push(release);
            let env = env.clone();
            calls.push(async move {
                env.blocking_long(Long::Password, move || {
                    let _ = released.recv();
                    Ok(())
                })
                .await
            });
        }
        // Each call takes its place in the queue when it is polled first.
        let poll_all = futures_util::StreamExt::next(&mut calls);
        assert!(futures_util::FutureExt::now_or_never(poll_all).is_none());
        let one_more = env.blocking_long(Long::Password, || Ok(())).await;
        assert!(matches!(one_more, Err(Error::Busy { .. })));
        for kind in [Long::Search, Long::Resolution, Long::Maintenance, Long::History, Long::Indexing] {
            assert_eq!(env.blocking_long(kind, || Ok(7)).await.unwrap(), 7);
        }
        drop(releases);
        while let Some(done) = futures_util::StreamExt::next(&mut calls).await {
            done.unwrap();
        }
    }

    #[tokio::test]
    async fn each_kind_of_long_call_has_the_pool_of_its_place_in_the_list() {
        let env = Env::real().unwrap();
        for (at, kind) in Long::ALL.into_iter().enumerate() {
            let counting = env.clone();
            let counts = env.blocking_long(kind, move || Ok(counting.long_calls())).await.unwrap();
            let expected = std::array::from_fn(|other| (Long::ALL[other].name(), usize::from(other == at)));
            assert_eq!(counts, expected);
            assert!(std::ptr::eq(env.pool(kind), &env.0.long[at]));
        }
    }

    #[tokio::test]
    async fn a_long_call_that_nobody_waits_for_keeps_its_place() {
        let env = Env::real().unwrap();
        let (release, released) = mpsc::channel::<()>();
        let (begin, begun) = tokio::sync::oneshot::channel::<()>();
        let call = env.blocking_long(Long::Maintenance, move || {
            let _ = begin.send(());
            let _ = released.recv();
            Ok(())
        });
        tokio::select! {
            biased;
            _ = call => panic!("nobody has released it"),
            _ = begun => {}
        }
        assert_eq!(env.long_calls()[3], ("maintenance", 1));
        let next = env.blocking_long(Long::Maintenance, || Ok(()));
        let mut next = std::pin::pin!(next);
        assert!(
            futures_util::FutureExt::now_or_never(next.as_mut()).is_none(),
            "there is one place, and it is taken"
        );
        drop(release);
        next.await.unwrap();
        assert_eq!(env.long_calls()[3], ("maintenance", 0));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_user_who_writes_much_leaves_places_to_others_who_write() {
        let env = Env::real().unwrap();
        let user = |number| Payers::of_request(Some(UserNum(number)), [127, 0, 0, 1].into());
        let (stop, stopped) = mpsc::channel::<()>();
        let stopped = Arc::new(Mutex::new(stopped));
        for _ in 0..24 {
            let stopped = Arc::clone(&stopped);
            env.spawn_writing(user(1), move || stopped.lock().recv().unwrap_or(()));
        }
        let (wrote, written) = tokio::sync::oneshot::channel();
        env.spawn_writing(user(2), move || {
            let _ = wrote.send(7);
        });
        let written = tokio::time::timeout(Duration::from_secs(60), written).await;
        drop(stop);
        assert_eq!(written.unwrap().unwrap(), 7);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn whoever_writes_leaves_places_to_those_who_read() {
        let env = Env::real().unwrap();
        let (stop, stopped) = mpsc::channel::<()>();
        let stopped = Arc::new(Mutex::new(stopped));
        for _ in 0..2 * SHORT_CALLS_MAX {
            let stopped = Arc::clone(&stopped);
            // The call ends when `stop` is dropped.
            env.spawn_writing(Payers::SERVER, move || stopped.lock().recv().unwrap_or(()));
        }
        let read = tokio::time::timeout(Duration::from_secs(60), env.blocking(|| Ok(7))).await;
        drop(stop);
        assert_eq!(read.unwrap().unwrap(), 7);
    }
}
