//! Finding other servers' keys: from the cache, from the server itself, from notaries
//! ([retrieving server keys](https://spec.matrix.org/v1.19/server-server-api/#retrieving-server-keys)).
//!
//! A server is asked at most a few times a minute, whatever signatures others send us to check: more than once, because it may publish a
//! key just after it was asked. While it does not answer it is asked ever more seldom for events, which others may hand us; but once a
//! minute for requests, since whoever makes one is up. Those who need keys of one server at a time share one request.

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroUsize,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, stream};
use lru::LruCache;
use parking_lot::Mutex;
use ruma::{OwnedServerName, ServerName, ServerSigningKeyId};
use tokio::sync::Semaphore;

use crate::{
    backoff::{Failing, Pace, failed, may_try},
    call::{Caller, Failure, Options},
    joined::Joined,
    json::{Json, Limits},
    keys::{
        OwnKeys, PublicKey, Purpose, Wanted,
        document::{check, signatures_of},
        is_signed,
        kept::{keep_direct, keep_from_notary},
    },
    ports::{StoreFailed, StoredDocument, StoredKey},
};

/// A server is asked so and so often within this time.
const AGAIN_MS: u64 = 60_000;
/// A server that answers is asked at most this many times within [`AGAIN_MS`], and one that does not is asked once. So a key that it has
/// not published costs a few requests.
const ASKED_MAX: usize = 4;
/// Servers whose last request is remembered.
const REMEMBERED_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(9_999);
/// Servers that are asked at once for one list of keys.
const DIRECT_MAX: usize = 64;
/// Servers that are asked at once because others ask us as a notary. Anyone may, so they have few of the places for keys, and
/// nobody waits for one.
const FOR_OTHERS_MAX: usize = 32;
/// Asking servers themselves takes at most this long for one list; those that are left are asked for at notaries.
const DIRECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Servers that one request to a notary names.
const BATCH_MAX: usize = 100;
/// All requests to notaries for one list take at most this long.
const NOTARIES_TIMEOUT: Duration = Duration::from_secs(60);
/// One request to a notary: it may have to ask the servers itself.
const NOTARY: Options = Options {
    begins: Duration::from_secs(30),
    overall: Duration::from_secs(40),
    limits: Limits::JSON,
    lane: crate::call::Lane::Keys,
};

/// A key that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyFailure {
    /// The server does not publish it.
    #[error("{server} publishes no key {key_id}")]
    Unknown {
        /// The server.
        server: OwnedServerName,
        /// The id of the key.
        key_id: String,
    },
    /// It is known, and was not valid at the time.
    #[error("the key {key_id} of {server} was not valid at that time")]
    NotValid {
        /// The server.
        server: OwnedServerName,
        /// The id of the key.
        key_id: String,
    },
    /// Nobody could be asked; this may change.
    #[error("the keys of {server} cannot be had now: {why}")]
    Unavailable {
        /// The server.
        server: OwnedServerName,
        /// What happened when it was asked.
        why: String,
    },
    /// Our own cache failed.
    #[error(transparent)]
    Store(#[from] StoreFailed),
}

/// How asking a server went. Errors say why its document is not here.
type Asked = Result<(), String>;

/// A document that did not come.
struct Missed {
    why: String,
    /// The server was not asked, or is not at fault.
    is_ours: bool,
}

impl Missed {
    fn theirs(why: &impl ToString) -> Self {
        Self { why: why.to_string(), is_ours: false }
    }

    fn ours(why: &impl ToString) -> Self {
        Self { why: why.to_string(), is_ours: true }
    }
}

/// What is remembered of asking one server.
#[derive(Clone, Default)]
struct Attempts {
    /// It was asked at these times, the last time first, whether that has ended or not.
    asked_ms: [Option<u64>; ASKED_MAX],
    /// Set from the beginning to the end of asking; it stays if those who waited hung up.
    is_open: bool,
    /// Set while it does not answer.
    failing: Option<Failing>,
    notaries_ms: Option<u64>,
    why: String,
}

/// Other servers' keys. Cheap to clone.
#[derive(Clone)]
pub struct Ring(Arc<Inner>);

struct Inner {
    caller: Caller,
    own: Arc<OwnKeys>,
    notaries: Vec<OwnedServerName>,
    attempts: Mutex<LruCache<OwnedServerName, Attempts>>,
    asking: Joined<OwnedServerName, Asked>,
    for_others: Semaphore,
}

impl Ring {
    /// Finds keys through this caller; where servers do not answer, through these notaries, in their order.
    pub fn new(caller: Caller, own: Arc<OwnKeys>, notaries: Vec<OwnedServerName>) -> Self {
        let attempts = Mutex::new(LruCache::new(REMEMBERED_MAX));
        let (asking, for_others) = (Joined::default(), Semaphore::new(FOR_OTHERS_MAX));
        Self(Arc::new(Inner { caller, own, notaries, attempts, asking, for_others }))
    }

    /// Our own keys.
    pub fn own(&self) -> &OwnKeys {
        &self.0.own
    }

    /// Whether our settings let us talk with this server.
    pub fn allows(&self, server: &ServerName) -> bool {
        self.0.caller.servers().allows(server)
    }

    /// Finds one key. Errors: [`KeyFailure`].
    pub async fn require(&self, wanted: &Wanted) -> Result<PublicKey, KeyFailure> {
        let mut found = self.list(std::slice::from_ref(wanted)).await;
        found.pop().unwrap_or_else(|| Err(unknown(wanted)))
    }

    /// Finds many keys at once, each with its own outcome, in the order in which they are wanted.
    pub async fn list(&self, wanted: &[Wanted]) -> Vec<Result<PublicKey, KeyFailure>> {
        let mut asked: BTreeMap<OwnedServerName, Asked> = BTreeMap::new();
        let missing = self.missing(wanted).await;
        self.ask_servers(&missing, &mut asked).await;
        let missing = self.missing(wanted).await;
        if !missing.is_empty() && !self.0.notaries.is_empty() {
            let asking = self.ask_notaries(missing, &mut asked);
            // What came in time is in the cache.
            let _ = tokio::time::timeout(NOTARIES_TIMEOUT, asking).await;
        }
        let mut outcomes = Vec::with_capacity(wanted.len());
        for it in wanted {
            outcomes.push(self.outcome(it, asked.get(&it.server)).await);
        }
        outcomes
    }

    /// Finds keys like [`Self::list`] among those that are known, and asks nobody.
    pub async fn list_known(&self, wanted: &[Wanted]) -> Vec<Result<PublicKey, KeyFailure>> {
        let mut outcomes = Vec::with_capacity(wanted.len());
        for it in wanted {
            outcomes.push(self.outcome(it, self.answer_of_before(&it.server, false).as_ref()).await);
        }
        outcomes
    }

    /// Whether a key is known and will do for its purpose, so that nobody need be asked for it.
    pub async fn has(&self, wanted: &Wanted) -> bool {
        self.missing(std::slice::from_ref(wanted)).await.is_empty()
    }

    /// The newest document of a server that suits: it is valid until this time, and in the first half of its life. A server
    /// that does not answer, or cannot be asked now because too many are, has its last one.
    pub(super) async fn find_document(
        &self,
        server: &ServerName,
        until_ms: u64,
    ) -> Result<Option<StoredDocument>, StoreFailed> {
        let keys = &self.ports().keys;
        let now_ms = self.now_ms();
        let stored = keys.find_document(server).await?;
        let suits = |it: &StoredDocument| {
            let half_ms = it.fetched_ms / 2 + it.valid_until_ms / 2;
            it.valid_until_ms >= until_ms && (it.fetched_ms..half_ms).contains(&now_ms)
        };
        if stored.as_ref().is_some_and(suits) {
            return Ok(stored);
        }
        let Ok(_place) = self.0.for_others.try_acquire() else { return Ok(stored) };
        if self.ask(server, false).await.is_err() {
            return Ok(stored);
        }
        keys.find_document(server).await
    }

    fn ports(&self) -> &crate::ports::Ports {
        self.0.caller.ports()
    }

    fn now_ms(&self) -> u64 {
        self.ports().clock.now_ms()
    }

    async fn find(&self, wanted: &Wanted) -> Result<Option<StoredKey>, StoreFailed> {
        self.ports().keys.find_key(&wanted.server, &wanted.key_id).await
    }

    fn find_own(&self, wanted: &Wanted) -> Option<PublicKey> {
        let at_ms = match wanted.purpose {
            Purpose::Request => None,
            Purpose::Event { sent_ms, is_strict } => Some(if is_strict { sent_ms } else { 0 }),
        };
        self.0.own.find(&wanted.key_id, at_ms)
    }

    /// Those that the cache does not have, or not for their purpose.
    async fn missing<'w>(&self, wanted: &'w [Wanted]) -> Vec<&'w Wanted> {
        let now_ms = self.now_ms();
        let mut missing = Vec::new();
        for it in wanted.iter().filter(|it| *it.server != *self.0.own.server()) {
            // A cache that fails has nothing; the outcome says that it failed.
            let found = self.find(it).await.ok().flatten();
            if !found.is_some_and(|key| it.purpose.accepts(&key, now_ms)) {
                missing.push(it);
            }
        }
        missing
    }

    async fn outcome(&self, wanted: &Wanted, asked: Option<&Asked>) -> Result<PublicKey, KeyFailure> {
        let server = wanted.server.clone();
        let not_valid = || KeyFailure::NotValid { server: server.clone(), key_id: wanted.key_id.to_string() };
        if *wanted.server == *self.0.own.server() {
            return self.find_own(wanted).ok_or_else(not_valid);
        }
        let found = self.find(wanted).await?;
        if let Some(key) = &found
            && wanted.purpose.accepts(key, self.now_ms())
        {
            return Ok(key.public_key);
        }
        match asked {
            Some(Ok(())) if found.is_some() => Err(not_valid()),
            Some(Ok(())) => Err(unknown(wanted)),
            Some(Err(why)) => Err(KeyFailure::Unavailable { server, why: why.clone() }),
            None => Err(KeyFailure::Unavailable { server, why: "there was no time to ask it".to_owned() }),
        }
    }

    async fn ask_servers(&self, missing: &[&Wanted], asked: &mut BTreeMap<OwnedServerName, Asked>) {
        let mut servers: BTreeMap<OwnedServerName, bool> = BTreeMap::new();
        for it in missing {
            *servers.entry(it.server.clone()).or_default() |= it.purpose == Purpose::Request;
        }
        let asking = servers.into_iter().map(|(server, is_up)| async move {
            let outcome = self.ask(&server, is_up).await;
            (server, outcome)
        });
        let mut asking = stream::iter(asking).buffer_unordered(DIRECT_MAX);
        let gathering = async {
            while let Some((server, outcome)) = asking.next().await {
                asked.insert(server, outcome);
            }
        };
        let _ = tokio::time::timeout(DIRECT_TIMEOUT, gathering).await;
    }

    /// Asks a server for its document, unless it was asked a short while ago, and stores what is believed. `is_up` says that
    /// somebody speaks in its name just now, so that a longer pause would keep out a server that is back.
    async fn ask(&self, server: &ServerName, is_up: bool) -> Asked {
        if self.answer_of_before(server, is_up).is_some() {
            if let Some(running) = self.0.asking.running(server) {
                return running.await;
            }
            // It may have ended in between, so that the answer is another one.
            if let Some(answer) = self.answer_of_before(server, is_up) {
                return answer;
            }
        }
        let (ring, owned) = (self.clone(), server.to_owned());
        self.0.asking.run(server.to_owned(), move || async move { ring.ask_now(&owned).await }.boxed()).await
    }

    /// How asking went a short while ago; none where the server may be asked.
    fn answer_of_before(&self, server: &ServerName, is_up: bool) -> Option<Asked> {
        let now_ms = self.now_ms();
        let mut attempts = self.0.attempts.lock();
        let known = attempts.get(server)?;
        let [last_ms, ..] = known.asked_ms;
        let is_failing = known.failing.is_some();
        let is_recent = is_recent(last_ms, now_ms);
        if is_failing && (is_recent || !is_up && !may_try(known.failing, Pace::LOOK_UP, now_ms)) {
            return Some(Err(known.why.clone()));
        }
        if is_recent && known.is_open {
            return Some(Err("it was asked a moment ago, and nobody waited for its answer".to_owned()));
        }
        known.asked_ms.iter().all(|at_ms| self::is_recent(*at_ms, now_ms)).then_some(Ok(()))
    }

    async fn ask_now(&self, server: &ServerName) -> Asked {
        let before_ms = self.with_attempts(server, |known| {
            known.is_open = true;
            let before_ms = known.asked_ms;
            known.asked_ms.rotate_right(1);
            known.asked_ms[0] = Some(self.now_ms());
            before_ms
        });
        let fetched = self.fetch(server).await;
        let random = self.ports().randomness.below(u64::MAX);
        let now_ms = self.now_ms();
        self.with_attempts(server, |known| {
            known.is_open = false;
            known.asked_ms[0] = Some(now_ms);
            match fetched {
                Ok(()) => {
                    known.failing = None;
                    Ok(())
                }
                Err(Missed { why, is_ours: true }) => {
                    known.asked_ms = before_ms;
                    Err(why)
                }
                Err(Missed { why, is_ours: false }) => {
                    known.failing = Some(failed(known.failing, Pace::LOOK_UP, now_ms, random));
                    known.why.clone_from(&why);
                    Err(why)
                }
            }
        })
    }

    fn with_attempts<T>(&self, server: &ServerName, change: impl FnOnce(&mut Attempts) -> T) -> T {
        let mut attempts = self.0.attempts.lock();
        change(attempts.get_or_insert_mut(server.to_owned(), Attempts::default))
    }

    async fn fetch(&self, server: &ServerName) -> Result<(), Missed> {
        let request = http::Request::get("/_matrix/key/v2/server").body(Bytes::new());
        let request = request.map_err(|error| Missed::ours(&error))?;
        let reply = self.0.caller.call(server, request, Options::keys()).await;
        let reply = reply.map_err(|failure| match failure {
            Failure::Busy => Missed::ours(&failure),
            _ => Missed::theirs(&failure),
        })?;
        let json = Json::parse(reply.answer.bytes()).map_err(|error| Missed::theirs(&error))?;
        let checked = check(server, &json, self.now_ms()).map_err(|wrong| Missed::theirs(&wrong))?;
        keep_direct(&*self.ports().keys, server, checked).await.map_err(|error| Missed::ours(&error))
    }

    async fn ask_notaries(&self, missing: Vec<&Wanted>, asked: &mut BTreeMap<OwnedServerName, Asked>) {
        let now_ms = self.now_ms();
        let mut left: BTreeMap<&ServerName, Vec<&Wanted>> = BTreeMap::new();
        for it in missing {
            left.entry(&it.server).or_default().push(it);
        }
        {
            let mut attempts = self.0.attempts.lock();
            left.retain(|server, _| {
                let known = attempts.get_or_insert_mut((*server).to_owned(), Attempts::default);
                let is_due = !is_recent(known.notaries_ms, now_ms);
                if is_due {
                    known.notaries_ms = Some(now_ms);
                }
                is_due
            });
        }
        for notary in &self.0.notaries {
            let servers: Vec<&ServerName> = left.keys().filter(|it| ***it != **notary).copied().collect();
            for batch in servers.chunks(BATCH_MAX) {
                let wanted: Vec<_> = batch.iter().filter_map(|it| left.get(it)).flatten().copied().collect();
                match self.ask_notary(notary, &wanted).await {
                    Ok(answered) => asked.extend(answered.into_iter().map(|server| (server, Ok(())))),
                    Err(why) => {
                        tracing::debug!(%notary, why, "a notary gives no keys");
                        break;
                    }
                }
            }
            let mut still = BTreeSet::new();
            for (server, wanted) in &left {
                let wanted: Vec<_> = wanted.iter().map(|it| (*it).clone()).collect();
                if !self.missing(&wanted).await.is_empty() {
                    still.insert(*server);
                }
            }
            left.retain(|server, _| still.contains(server));
        }
    }

    /// Asks one notary. Answers the servers whose documents are believed.
    async fn ask_notary(
        &self,
        notary: &ServerName,
        wanted: &[&Wanted],
    ) -> Result<Vec<OwnedServerName>, String> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let body = String::from(question(wanted, self.now_ms()).canonical());
        let request = http::Request::post("/_matrix/key/v2/query")
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Bytes::from(body))
            .map_err(|error| error.to_string())?;
        let reply = self.0.caller.call(notary, request, NOTARY).await;
        let reply = reply.map_err(|failure| failure.to_string())?;
        let json = Json::parse(reply.answer.bytes()).map_err(|error| error.to_string())?;
        let documents = json.field("server_keys").and_then(Json::as_list).ok_or("server_keys is missing")?;
        let servers: BTreeSet<&ServerName> = wanted.iter().map(|it| &*it.server).collect();
        let mut answered = Vec::new();
        // A notary may send several documents of a server, one a key.
        for document in documents.iter().take(4 * BATCH_MAX) {
            let name = document.field("server_name").and_then(Json::as_text);
            let Some(server) = servers.iter().find(|it| Some(it.as_str()) == name) else { continue };
            let Ok(checked) = check(server, document, self.now_ms()) else { continue };
            if self.is_signed_by_notary(notary, document).await {
                let kept = keep_from_notary(&*self.ports().keys, server, checked).await;
                kept.map_err(|error| error.to_string())?;
                answered.push((*server).to_owned());
            }
        }
        Ok(answered)
    }

    /// Whether the notary vouches for the document with a key that it uses now.
    async fn is_signed_by_notary(&self, notary: &ServerName, document: &Json) -> bool {
        let text = document.signed_part();
        for (key_id, signature) in signatures_of(document, notary).take(8) {
            let Ok(key_id) = <&ServerSigningKeyId>::try_from(key_id) else { continue };
            let now_ms = self.now_ms();
            let store = &self.ports().keys;
            let usable = |key: &StoredKey| Purpose::Request.accepts(key, now_ms);
            let mut key = store.find_key(notary, key_id).await.ok().flatten().filter(usable);
            if key.is_none() && self.ask(notary, false).await.is_ok() {
                key = store.find_key(notary, key_id).await.ok().flatten().filter(usable);
            }
            if key.is_some_and(|key| is_signed(&text, &key.public_key, signature)) {
                return true;
            }
        }
        false
    }
}

fn unknown(wanted: &Wanted) -> KeyFailure {
    KeyFailure::Unknown { server: wanted.server.clone(), key_id: wanted.key_id.to_string() }
}

/// Whether something happened a short while ago; what lies in the future was noted before the clock went back.
fn is_recent(at_ms: Option<u64>, now_ms: u64) -> bool {
    at_ms.is_some_and(|at_ms| at_ms <= now_ms && now_ms - at_ms < AGAIN_MS)
}

/// What a notary is asked.
fn question(wanted: &[&Wanted], now_ms: u64) -> Json {
    let mut servers: BTreeMap<String, BTreeMap<String, Json>> = BTreeMap::new();
    for it in wanted {
        let until_ms = it.purpose.needs_until_ms(now_ms);
        let criteria = Json::object([("minimum_valid_until_ts", Json::number(until_ms))]);
        servers.entry(it.server.to_string()).or_default().insert(it.key_id.to_string(), criteria);
    }
    let servers = servers.into_iter().map(|(server, keys)| (server, Json::Object(keys)));
    Json::object([("server_keys", Json::object(servers))])
}
