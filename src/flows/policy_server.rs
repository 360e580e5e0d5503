//! Asks policy servers for their signatures (server-server API, "Policy Servers"): for events of our own users before they are part
//! of a room, and for events of others that came without one.
//!
//! Nothing here holds a room. An event of ours that the policy server refuses, or that it cannot be asked about, is not sent. An
//! event of another server that it refuses is soft-failed; one that it cannot be asked about waits, for [`HELD_MAX`] at most.
//! Everything is bounded, because rooms choose policy servers and anybody can send events without a signature: a policy server
//! that does not answer is not asked about events of others for a while, and what it said is remembered.

use std::{collections::BTreeMap, time::Duration};

use federation::{
    call::{Failure, Lane, Options},
    json::Limits,
};
use http::{Method, Request, header};
use parking_lot::Mutex;
use ruma::{EventId, OwnedEventId, OwnedServerName, ServerName, room_version_rules::RoomVersionRules};

use crate::{
    env::payer::{self, Payer, Payers},
    error::{Error, Refusal, Result},
    flows::{
        App, jobs,
        lanes::{Lanes, Pace},
    },
    rooms::{
        change::{
            Received,
            countersigned::{Countersigned, Unsigned},
            invited::Source,
        },
        policy_server::{KEY_ID, PolicyServer},
    },
};

const PATH: &str = "/_matrix/policy/v1/sign";
/// A policy server answers within this time.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);
/// An answer has at most this many bytes: a signature, or why there is none.
const ANSWER_LIMITS: Limits = Limits::bytes(16 << 10);
/// A policy server that says no time after which it may be asked again is asked again after this time.
const LIMITED_FOR: Duration = Duration::from_secs(1);
/// It is asked again after this time at the earliest, whatever it says.
const LIMITED_MIN: Duration = Duration::from_millis(250);
/// It is asked about one event of ours at most this many times.
const TRIES_MAX: usize = 5;
/// A policy server that did not answer is not asked about events of others for this long.
const UNREACHABLE_FOR: Duration = Duration::from_secs(30);
/// An event of another server waits at most this long for a policy server that cannot be asked; then it is soft-failed, so that the
/// room goes on.
pub(crate) const HELD_MAX: Duration = Duration::from_secs(600);
/// Note of at most this many events since when they wait for policy servers, and of as many that stand on those: as many as may wait in
/// the store at all (`flows/remote/staged.rs`). Further ones wait there without that, for as long as any event may. Nobody's events
/// are given up for want of room here.
const HELD_COUNT_MAX: usize = 50_000;
/// At most this many events of one server are noted, as many as it may have in the store.
const HELD_OF_SERVER_MAX: usize = 2_000;
/// Look for notes that have come to nothing at most this often.
const HELD_SWEPT_EVERY: Duration = Duration::from_secs(10);
/// The word on an event of another server is remembered for this long, because the event may have to be judged again.
const REMEMBERED_FOR: Duration = Duration::from_secs(600);
/// Remember what was said of at most this many events.
const REMEMBERED_MAX: usize = 2_000;
/// Remember at most this many policy servers that are not to be asked now.
const PAUSED_MAX: usize = 1_000;
/// A policy server is left alone for at most this long, whatever it asks for.
const PAUSE_MAX: Duration = Duration::from_secs(60 * 60);
/// A reason has at most this many characters.
const REASON_CHARS_MAX: usize = 300;

/// At most this many events that no request waits for wait for policy servers at once, until it is known that these are slow.
const QUICK_UNASKED_MAX: usize = 64;
/// It takes at least this many users, and as many policy servers, to have as many wait.
const UNASKED_PAYERS_MIN: usize = 8;
/// A policy server that has not answered after this time is slow.
const SLOW_AFTER: Duration = Duration::from_secs(2);
/// At most this many such events wait for slow ones, besides.
const SLOW_UNASKED_MAX: usize = 192;

/// An event, and the server whose word on it counts.
type Case = (OwnedEventId, OwnedServerName);

/// The memory of policy servers, which is lost with the process, and the places for waiting for them.
pub struct PolicyServers {
    memory: Mutex<Memory>,
    unasked: Lanes,
}

impl Default for PolicyServers {
    fn default() -> Self {
        let unasked = Lanes::new((QUICK_UNASKED_MAX, UNASKED_PAYERS_MIN), SLOW_UNASKED_MAX);
        Self { memory: Mutex::default(), unasked: unasked.slow_after(SLOW_AFTER) }
    }
}

#[derive(Default)]
struct Memory {
    paused: BTreeMap<OwnedServerName, Pause>,
    /// The events that wait, whichever policy server their rooms have meanwhile.
    held: Waiting,
    /// The events that wait for others that wait, because they stand on them.
    behind: Waiting,
    said: BTreeMap<Case, Said>,
}

/// Events that wait, by the servers of their senders: whoever names policy servers or makes rooms has no more room for that.
#[derive(Default)]
struct Waiting {
    /// The uptime since which each waits, and the server of its sender.
    events: BTreeMap<OwnedEventId, (Duration, OwnedServerName)>,
    of_servers: BTreeMap<OwnedServerName, usize>,
    /// The uptime at which those were swept that have come to nothing.
    swept: Duration,
}

impl Waiting {
    fn since(&self, event: &EventId) -> Option<Duration> {
        self.events.get(event).map(|(since, _)| *since)
    }

    /// Notes that an event waits from now on, as far as there is room for it.
    fn note(&mut self, event: &EventId, server: &ServerName, now: Duration) {
        if self.is_full(server) && now.saturating_sub(self.swept) >= HELD_SWEPT_EVERY {
            self.swept = now;
            self.sweep(now);
        }
        if !self.is_full(server) && !self.events.contains_key(event) {
            self.events.insert(event.to_owned(), (now, server.to_owned()));
            *self.of_servers.entry(server.to_owned()).or_default() += 1;
        }
    }

    fn is_full(&self, server: &ServerName) -> bool {
        let of_server = self.of_servers.get(server).copied().unwrap_or_default();
        self.events.len() >= HELD_COUNT_MAX || of_server >= HELD_OF_SERVER_MAX
    }

    fn remove(&mut self, event: &EventId) {
        let Some((_, server)) = self.events.remove(event) else { return };
        if let Some(count) = self.of_servers.get_mut(&server) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.of_servers.remove(&server);
            }
        }
    }

    fn sweep(&mut self, now: Duration) {
        let is_over = |(since, _): &(Duration, OwnedServerName)| now.saturating_sub(*since) >= 2 * HELD_MAX;
        let over: Vec<OwnedEventId> =
            self.events.iter().filter(|(_, it)| is_over(it)).map(|(event, _)| event.clone()).collect();
        over.iter().for_each(|event| self.remove(event));
    }
}

#[derive(Clone, Copy)]
struct Pause {
    /// The uptime until which it lasts.
    until: Duration,
    /// Whether the server itself asked for it.
    is_limit: bool,
}

/// The word of a policy server on an event.
struct Said {
    /// The server with its key: another key makes the answer worthless.
    server: PolicyServer,
    /// The uptime until which the answer is remembered.
    until: Duration,
    word: Word,
}

#[derive(Clone)]
enum Word {
    Signature(String),
    Against(String),
}

impl PolicyServers {
    /// Whether an event waits until a policy server can be asked about it, or about what it stands on. `now` is the uptime.
    pub(crate) fn is_held(&self, event: &EventId, now: Duration) -> bool {
        let memory = self.memory.lock();
        let is_behind =
            || memory.behind.since(event).is_some_and(|since| now.saturating_sub(since) < HELD_MAX);
        memory.held.since(event).is_some() || is_behind()
    }

    /// Notes that an event waits for what it stands on.
    pub(crate) fn note_behind(&self, event: &Received, now: Duration) {
        self.memory.lock().behind.note(event.id(), event.event().sender.server_name(), now);
    }
}

impl Memory {
    fn pause(&mut self, server: &OwnedServerName, pause: Pause, now: Duration) {
        let until = pause.until.min(now.saturating_add(PAUSE_MAX));
        let pause = Pause { until, ..pause };
        if self.paused.len() >= PAUSED_MAX {
            self.paused.retain(|_, pause| pause.until > now);
        }
        if self.paused.len() >= PAUSED_MAX && !self.paused.contains_key(server) {
            // One of the owner of most names gives way, because names cost nothing.
            let mut by_source = BTreeMap::<Source, (usize, &OwnedServerName)>::new();
            for name in self.paused.keys() {
                by_source.entry(Source::of(name.as_str())).or_insert((0, name)).0 += 1;
            }
            let most = by_source.into_values().max_by_key(|(count, _)| *count);
            let most = most.map(|(_, name)| name.clone());
            most.and_then(|name| self.paused.remove(&name));
        }
        self.paused.insert(server.clone(), pause);
    }

    /// Finds for how long a server is not to be asked.
    fn find_pause(&self, server: &OwnedServerName, now: Duration) -> Option<(Duration, bool)> {
        let pause = self.paused.get(server)?;
        let left = pause.until.saturating_sub(now);
        (!left.is_zero()).then_some((left, pause.is_limit))
    }

    /// Lets an event of a user of this server wait, unless it has waited for too long.
    fn hold(&mut self, event: &EventId, server: &ServerName, now: Duration) -> Judged {
        let Some(since) = self.held.since(event) else {
            self.held.note(event, server, now);
            return Judged::Later;
        };
        if now.saturating_sub(since) < HELD_MAX {
            return Judged::Later;
        }
        self.held.remove(event);
        Judged::Against("the policy server could not be asked for ten minutes".to_owned())
    }

    fn remember(&mut self, case: Case, server: &PolicyServer, word: Word, now: Duration) {
        self.held.remove(&case.0);
        if self.said.len() >= REMEMBERED_MAX {
            self.said.retain(|_, said| said.until > now);
        }
        if self.said.len() >= REMEMBERED_MAX {
            // The oldest gives way.
            let oldest = self.said.iter().min_by_key(|(_, said)| said.until).map(|(case, _)| case.clone());
            oldest.and_then(|case| self.said.remove(&case));
        }
        if self.said.len() < REMEMBERED_MAX {
            self.said.insert(case, Said { server: server.clone(), until: now + REMEMBERED_FOR, word });
        }
    }

    fn find_word(&self, case: &Case, server: &PolicyServer, now: Duration) -> Option<Word> {
        let said = self.said.get(case).filter(|said| said.server == *server && said.until > now)?;
        Some(said.word.clone())
    }
}

/// The outcome of asking for a signature.
enum Answer {
    /// The policy server gave this signature, which was not checked.
    Signature(String),
    /// It refuses, for this reason; its code is that of Matrix.
    Refused { errcode: Option<String>, message: String },
    /// It is to be asked again after this time.
    Limited(Duration),
    /// It could not be asked now, or made no sense.
    Failed(String),
}

/// Asks once, and remembers whether the server is to be asked again soon.
async fn ask(app: &App, server: &PolicyServer, event: &Received, within: Duration) -> Answer {
    let refused = |message: &str| Answer::Refused { errcode: None, message: message.to_owned() };
    if !app.config.federation.enabled {
        return refused("this server talks with no other servers");
    }
    let request = Request::builder().method(Method::POST).uri(PATH);
    let request = request.header(header::CONTENT_TYPE, "application/json").body(event.json().clone());
    let Ok(request) = request else { return Answer::Failed("the request cannot be made".to_owned()) };
    let options = Options { begins: within, overall: within, limits: ANSWER_LIMITS, lane: Lane::Signatures };
    let name = server.name();
    let answer = match app.remote.client.send_signed(name, request, options).await {
        Ok(reply) => match find_signature(reply.answer.bytes(), name.as_str()) {
            Some(signature) => Answer::Signature(signature),
            None => refused("it gave no signature"),
        },
        Err(Failure::Refused { status, errcode, message, retry_after_ms, .. }) => match status.as_u16() {
            429 => {
                let after = retry_after_ms.map_or(LIMITED_FOR, Duration::from_millis);
                Answer::Limited(after.max(LIMITED_MIN))
            }
            // Our keys cannot be had there now, or a proxy lets us wait.
            401 | 408 | 500..=599 => Answer::Failed(format!("it answered {status}: {message}")),
            _ => Answer::Refused { errcode, message },
        },
        Err(Failure::NotAllowed { .. }) => refused("the settings of this server do not let it be asked"),
        Err(
            failure @ (Failure::NotFound(_)
            | Failure::Unreachable(_)
            | Failure::TimedOut
            | Failure::Nonsense(_)
            | Failure::BadRequest(_)
            | Failure::Busy),
        ) => Answer::Failed(failure.to_string()),
    };
    let outcome = match &answer {
        Answer::Signature(_) => "signed",
        Answer::Refused { .. } => "refused",
        Answer::Limited(_) => "limited",
        Answer::Failed(_) => "failed",
    };
    let why = match &answer {
        Answer::Refused { message, .. } | Answer::Failed(message) => &**message,
        Answer::Signature(_) | Answer::Limited(_) => "",
    };
    tracing::debug!(server = %name, event = %event.id(), outcome, why, "a policy server was asked for its signature");
    let (now, mut memory) = (app.env.uptime(), app.policy_servers.memory.lock());
    match &answer {
        Answer::Signature(_) | Answer::Refused { .. } => drop(memory.paused.remove(name)),
        Answer::Limited(after) => {
            memory.pause(name, Pause { until: now.saturating_add(*after), is_limit: true }, now);
        }
        Answer::Failed(_) => {
            memory.pause(name, Pause { until: now + UNREACHABLE_FOR, is_limit: false }, now);
        }
    }
    answer
}

fn find_signature(answer: &[u8], server: &str) -> Option<String> {
    let answer: serde_json::Value = serde_json::from_slice(answer).ok()?;
    answer.get(server)?.get(KEY_ID)?.as_str().map(str::to_owned)
}

/// How long the signature of an event of ours is waited for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// The uptime until which it is.
    pub(crate) until: Duration,
    /// Whether nobody waits for this event, so that a policy server that did not answer a short while ago is left alone.
    pub(crate) minds_silence: bool,
}

/// Asks a policy server to sign an event of one of our users, and waits where it asks for that. Errors: 403 `M_FORBIDDEN` with its reason where it refuses; [`Error::Busy`] where it is to be asked later; [`Error::Remote`] where it
/// cannot be asked.
pub(crate) async fn sign_own(app: &App, unsigned: Unsigned, patience: Patience) -> Result<Countersigned> {
    let until = patience.until;
    let server = unsigned.server.clone();
    let name = server.name();
    for _ in 0..TRIES_MAX {
        let now = app.env.uptime();
        let left = until.saturating_sub(now);
        let pause = app.policy_servers.memory.lock().find_pause(name, now);
        match pause {
            Some((wait, true)) if wait >= left && patience.minds_silence => {
                return Err(remote(name, "it is to be asked later"));
            }
            Some((wait, true)) if wait >= left => return Err(Error::Busy { retry_after: wait }),
            Some((wait, true)) => app.env.sleep(wait).await,
            Some((_, false)) if patience.minds_silence => {
                return Err(remote(name, "it did not answer a short while ago"));
            }
            Some((_, false)) | None => {}
        }
        let left = until.saturating_sub(app.env.uptime());
        if left.is_zero() {
            break;
        }
        match ask(app, &server, &unsigned.event, left.min(ANSWERS_WITHIN)).await {
            Answer::Signature(signature) => {
                let signed = unsigned.event.signed_by(&server, unsigned.rules, &signature);
                return signed.map(|event| unsigned.with(event)).ok_or_else(|| {
                    let why =
                        "its signature is not right for the key in `m.room.policy`, or has no place in the event";
                    not_signed(&server, why).into()
                });
            }
            Answer::Refused { errcode, message } => return Err(refusal(&server, errcode, message).into()),
            Answer::Limited(_) => {}
            Answer::Failed(cause) => return Err(remote(name, cause)),
        }
    }
    Err(Error::Busy { retry_after: LIMITED_FOR })
}

/// Waits for a policy server for an event that no request waits for. A job gives up its place meanwhile, and waits in one that its
/// user and the policy server pay for, so that events of others do not wait for slow policy servers. Errors: [`Error::Remote`]
/// where there is no such place, beside those of the wait.
pub(crate) async fn wait_unasked<T>(
    app: &App,
    server: &PolicyServer,
    wait: impl Future<Output = Result<T>>,
) -> Result<T> {
    let _resting = jobs::rest();
    let user = match payer::current().first() {
        Payer::User(user) => Some(user),
        _ => None,
    };
    let payers = Payers::of_work(user, server.name().as_str());
    let waited = app.policy_servers.unasked.run(&app.env, (payers, Pace::Unknown), payers.during(wait)).await;
    waited.unwrap_or_else(|_| Err(remote(server.name(), "there is no place for waiting for it")))
}

fn remote(server: &OwnedServerName, cause: impl Into<String>) -> Error {
    Error::Remote { server: server.to_string(), cause: cause.into() }
}

/// The refusal of an event, as a policy server words it. Of its codes a client is told only the one for this: others, as that a
/// token is unknown, mean something else to a client.
fn refusal(server: &PolicyServer, errcode: Option<String>, message: String) -> Refusal {
    if errcode.as_deref() == Some("M_FORBIDDEN") && !message.is_empty() {
        return Refusal::forbidden(message);
    }
    let code = errcode.unwrap_or_default();
    not_signed(server, format!("{code} {message}").trim())
}

fn not_signed(server: &PolicyServer, why: &str) -> Refusal {
    let name = server.name();
    Refusal::forbidden(format!("The room's policy server {name} does not sign the event: {why}"))
}

/// The word of a policy server on an event of another server.
pub(crate) enum Judged {
    /// It recommends the event, which has its signature now.
    Signed(Box<Received>),
    /// It does not recommend the event, for this reason.
    Against(String),
    /// It cannot be asked now.
    Later,
}

/// Asks a policy server about an event of another server that came without its signature, or with a wrong one.
pub(crate) async fn judge(
    app: &App,
    server: &PolicyServer,
    rules: &RoomVersionRules,
    event: &Received,
) -> Judged {
    let case = (event.id().to_owned(), server.name().clone());
    let sender = event.event().sender.server_name();
    let memory = &app.policy_servers.memory;
    {
        let (now, mut memory) = (app.env.uptime(), memory.lock());
        if let Some(word) = memory.find_word(&case, server, now) {
            return heed(server, rules, event, word);
        }
        if memory.find_pause(server.name(), now).is_some() {
            return memory.hold(&case.0, sender, now);
        }
    }
    let answer = ask(app, server, event, ANSWERS_WITHIN).await;
    let now = app.env.uptime();
    let word = match answer {
        Answer::Signature(signature) => Word::Signature(signature),
        Answer::Refused { errcode, message } => {
            let why = format!("{} {message}", errcode.unwrap_or_default());
            Word::Against(why.trim().chars().take(REASON_CHARS_MAX).collect())
        }
        Answer::Limited(_) | Answer::Failed(_) => return memory.lock().hold(&case.0, sender, now),
    };
    memory.lock().remember(case, server, word.clone(), now);
    heed(server, rules, event, word)
}

fn heed(server: &PolicyServer, rules: &RoomVersionRules, event: &Received, word: Word) -> Judged {
    match word {
        Word::Signature(signature) => match event.signed_by(server, rules, &signature) {
            Some(event) => Judged::Signed(Box::new(event)),
            None => Judged::Against("the policy server's signature is wrong".to_owned()),
        },
        Word::Against(why) => Judged::Against(format!("the policy server does not recommend it: {why}")),
    }
}

#[cfg(test)]
mod tests {
    use ruma::server_name;

    use super::*;

    fn case(number: usize) -> Case {
        (OwnedEventId::try_from(format!("${number}")).unwrap(), server_name!("p.example").to_owned())
    }

    fn a_server() -> PolicyServer {
        PolicyServer::of_content(r#"{"via":"p.example","public_keys":{"ed25519":""}}"#).unwrap()
    }

    #[test]
    fn events_wait_for_a_bounded_time_and_are_noted_in_bounded_numbers() {
        let mut memory = Memory::default();
        let began = Duration::from_secs(5);
        let sender = server_name!("s.example");
        let mut hold = |number: usize, now| memory.hold(&case(number).0, sender, now);
        assert!(matches!(hold(0, began), Judged::Later));
        assert!(matches!(hold(0, began + HELD_MAX - Duration::from_secs(1)), Judged::Later));
        assert!(matches!(hold(0, began + HELD_MAX), Judged::Against(_)));
        for number in 0..HELD_OF_SERVER_MAX {
            assert!(matches!(hold(number, began), Judged::Later));
        }
        // An event that finds no room waits nevertheless, and without a bound here.
        assert!(matches!(hold(HELD_OF_SERVER_MAX, began), Judged::Later));
        assert!(matches!(hold(HELD_OF_SERVER_MAX, began + HELD_MAX), Judged::Later));
        assert!(
            matches!(hold(7, began + HELD_MAX), Judged::Against(_)),
            "those who have waited for long end"
        );
        assert_eq!(memory.held.events.len(), HELD_OF_SERVER_MAX - 1);
        // Events that came to nothing otherwise are forgotten.
        let later = began + 2 * HELD_MAX;
        memory.held.note(&case(7).0, sender, later);
        assert!(memory.held.events.len() == HELD_OF_SERVER_MAX, "there was room for one");
        memory.held.note(&case(HELD_OF_SERVER_MAX + 1).0, sender, later);
        assert_eq!(memory.held.events.len(), 2);
        for number in [7, HELD_OF_SERVER_MAX + 1] {
            memory.remember(case(number), &a_server(), Word::Against(String::new()), began);
        }
        assert!(memory.held.events.is_empty() && memory.held.of_servers.is_empty());
    }

    #[test]
    fn no_event_is_given_up_because_those_of_other_policy_servers_and_senders_wait() {
        let mut memory = Memory::default();
        let now = Duration::from_secs(5);
        let mut number = 0;
        for server in 0..HELD_COUNT_MAX / 1_000 + 10 {
            let sender = OwnedServerName::try_from(format!("s{server}.example")).unwrap();
            for _ in 0..1_000 {
                number += 1;
                assert!(matches!(memory.hold(&case(number).0, &sender, now), Judged::Later));
            }
        }
        assert_eq!(memory.held.events.len(), HELD_COUNT_MAX);
        let honest = server_name!("honest.example");
        for _ in 0..30 {
            number += 1;
            assert!(matches!(memory.hold(&case(number).0, honest, now), Judged::Later));
        }
    }

    #[test]
    fn answers_and_pauses_are_bounded_and_end() {
        let mut memory = Memory::default();
        let (now, server) = (Duration::from_secs(5), a_server());
        for number in 0..=REMEMBERED_MAX {
            memory.remember(case(number), &server, Word::Signature(String::new()), now);
        }
        assert_eq!(memory.said.len(), REMEMBERED_MAX);
        assert!(memory.find_word(&case(REMEMBERED_MAX), &server, now).is_some(), "an older one gave way");
        let key = "6yhHGKhCiXTSEN2ksjV7kX_N6rBQZ3Xb-M7LlC6NS-s";
        let other = format!(r#"{{"via":"p.example","public_keys":{{"ed25519":"{key}"}}}}"#);
        let other = PolicyServer::of_content(&other).unwrap();
        assert!(
            memory.find_word(&case(REMEMBERED_MAX), &other, now).is_none(),
            "another key needs another answer"
        );
        let later = now + REMEMBERED_FOR;
        assert!(memory.find_word(&case(REMEMBERED_MAX), &server, later).is_none());
        memory.remember(case(REMEMBERED_MAX), &server, Word::Signature(String::new()), later);
        assert_eq!(memory.said.len(), 1);
        for number in 0..=PAUSED_MAX {
            let name = OwnedServerName::try_from(format!("p{number}.example")).unwrap();
            memory.pause(&name, Pause { until: later, is_limit: true }, now);
        }
        assert_eq!(memory.paused.len(), PAUSED_MAX);
        let name = OwnedServerName::try_from("p3.example").unwrap();
        assert_eq!(memory.find_pause(&name, now), Some((REMEMBERED_FOR, true)));
        assert_eq!(memory.find_pause(&name, later), None);
        // Many names of one owner keep out no pause of another, and none lasts for ever.
        let evil = |port: usize| OwnedServerName::try_from(format!("evil.example:{port}")).unwrap();
        let ages = Pause { until: Duration::MAX, is_limit: true };
        (1..=2 * PAUSED_MAX).for_each(|port| memory.pause(&evil(port), ages, now));
        let honest = OwnedServerName::try_from("honest.other").unwrap();
        memory.pause(&honest, Pause { until: later, is_limit: true }, now);
        (1..=PAUSED_MAX).for_each(|port| memory.pause(&evil(port), ages, now));
        assert_eq!(memory.find_pause(&honest, now), Some((REMEMBERED_FOR, true)));
        assert_eq!(memory.paused.len(), PAUSED_MAX);
        assert!(memory.paused.values().all(|pause| pause.until <= now + PAUSE_MAX));
    }

    #[test]
    fn a_client_is_told_no_code_that_means_something_else_to_it() {
        let told = |errcode: Option<&str>, message: &str| {
            let refusal = refusal(&a_server(), errcode.map(str::to_owned), message.to_owned());
            assert_eq!(refusal.kind, ruma::api::error::ErrorKind::Forbidden);
            refusal.message
        };
        assert_eq!(told(Some("M_FORBIDDEN"), "This is spam"), "This is spam");
        assert!(told(Some("M_UNKNOWN_TOKEN"), "log out").contains("p.example does not sign"));
        assert!(told(None, "").contains("p.example does not sign"));
    }
}
