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
use ruma::{OwnedEventId, OwnedServerName, room_version_rules::RoomVersionRules};

use crate::{
    error::{Error, Refusal, Result},
    flows::App,
    rooms::{
        change::{
            Received,
            countersigned::{Countersigned, Unsigned},
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
/// At most this many events wait for policy servers. Further ones of the server for which most wait are soft-failed, and for
/// those of others the oldest of that one gives way, so that nobody's policy server costs the events of another.
const HELD_COUNT_MAX: usize = 2_000;
/// The word on an event of another server is remembered for this long, because the event may have to be judged again.
const REMEMBERED_FOR: Duration = Duration::from_secs(600);
/// Remember what was said of at most this many events.
const REMEMBERED_MAX: usize = 2_000;
/// Remember at most this many policy servers that are not to be asked now.
const PAUSED_MAX: usize = 1_000;
/// A reason has at most this many characters.
const REASON_CHARS_MAX: usize = 300;

/// An event, and the server whose word on it counts.
type Case = (OwnedEventId, OwnedServerName);

/// The memory of policy servers, which is lost with the process.
#[derive(Default)]
pub struct PolicyServers(Mutex<Memory>);

#[derive(Default)]
struct Memory {
    paused: BTreeMap<OwnedServerName, Pause>,
    /// The events that wait, whichever policy server their rooms have meanwhile.
    held: BTreeMap<OwnedEventId, Held>,
    /// The uptime since which an event waits for others that wait, because it stands on them.
    behind: BTreeMap<OwnedEventId, Duration>,
    said: BTreeMap<Case, Said>,
}

/// An event that waits.
struct Held {
    /// The uptime since which it does.
    since: Duration,
    /// The policy server for which it began to.
    server: OwnedServerName,
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
    pub(crate) fn is_held(&self, event: &OwnedEventId, now: Duration) -> bool {
        let memory = self.0.lock();
        let is_behind =
            || memory.behind.get(event).is_some_and(|since| now.saturating_sub(*since) < HELD_MAX);
        memory.held.contains_key(event) || is_behind()
    }

    /// Notes that an event waits for what it stands on.
    pub(crate) fn note_behind(&self, event: OwnedEventId, now: Duration) {
        let mut memory = self.0.lock();
        if memory.behind.len() >= HELD_COUNT_MAX {
            memory.behind.retain(|_, since| now.saturating_sub(*since) < HELD_MAX);
        }
        if memory.behind.len() < HELD_COUNT_MAX {
            memory.behind.entry(event).or_insert(now);
        }
    }
}

impl Memory {
    fn pause(&mut self, server: &OwnedServerName, pause: Pause, now: Duration) {
        if self.paused.len() >= PAUSED_MAX {
            self.paused.retain(|_, pause| pause.until > now);
        }
        if self.paused.len() < PAUSED_MAX {
            self.paused.insert(server.clone(), pause);
        }
    }

    /// Finds for how long a server is not to be asked.
    fn find_pause(&self, server: &OwnedServerName, now: Duration) -> Option<(Duration, bool)> {
        let pause = self.paused.get(server)?;
        let left = pause.until.saturating_sub(now);
        (!left.is_zero()).then_some((left, pause.is_limit))
    }

    /// Lets an event wait, unless it has waited for too long.
    fn hold(&mut self, (event, server): &Case, now: Duration) -> Judged {
        let since = match self.held.get(event) {
            Some(held) => held.since,
            None => {
                if self.held.len() >= HELD_COUNT_MAX {
                    self.held.retain(|_, held| now.saturating_sub(held.since) < 2 * HELD_MAX);
                }
                if self.held.len() >= HELD_COUNT_MAX && !self.make_room(server) {
                    return Judged::Against(
                        "the policy server cannot be asked, and too many events wait for it".to_owned(),
                    );
                }
                self.held.insert(event.clone(), Held { since: now, server: server.clone() });
                now
            }
        };
        if now.saturating_sub(since) < HELD_MAX {
            return Judged::Later;
        }
        self.held.remove(event);
        Judged::Against("the policy server could not be asked for ten minutes".to_owned())
    }

    /// Has the oldest event give way that waits for the server for which most wait; `false` where that is this one.
    fn make_room(&mut self, server: &OwnedServerName) -> bool {
        let mut counts = BTreeMap::<&OwnedServerName, usize>::new();
        for held in self.held.values() {
            *counts.entry(&held.server).or_default() += 1;
        }
        let own = counts.get(server).copied().unwrap_or_default();
        let Some((most, count)) = counts.into_iter().max_by_key(|(_, count)| *count) else { return true };
        if own >= count {
            return false;
        }
        let of_most = self.held.iter().filter(|(_, held)| held.server == *most);
        let oldest = of_most.min_by_key(|(_, held)| held.since).map(|(event, _)| event.clone());
        oldest.is_some_and(|event| self.held.remove(&event).is_some())
    }

    fn remember(&mut self, case: Case, server: &PolicyServer, word: Word, now: Duration) {
        self.held.remove(&case.0);
        if self.said.len() >= REMEMBERED_MAX {
            self.said.retain(|_, said| said.until > now);
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
    let (now, mut memory) = (app.env.uptime(), app.policy_servers.0.lock());
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
        let pause = app.policy_servers.0.lock().find_pause(name, now);
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
    let memory = &app.policy_servers.0;
    {
        let (now, mut memory) = (app.env.uptime(), memory.lock());
        if let Some(word) = memory.find_word(&case, server, now) {
            return heed(server, rules, event, word);
        }
        if memory.find_pause(server.name(), now).is_some() {
            return memory.hold(&case, now);
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
        Answer::Limited(_) | Answer::Failed(_) => return memory.lock().hold(&case, now),
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
    fn events_wait_for_a_bounded_time_and_in_bounded_numbers() {
        let mut memory = Memory::default();
        let began = Duration::from_secs(5);
        assert!(matches!(memory.hold(&case(0), began), Judged::Later));
        assert!(matches!(memory.hold(&case(0), began + HELD_MAX - Duration::from_secs(1)), Judged::Later));
        assert!(matches!(memory.hold(&case(0), began + HELD_MAX), Judged::Against(_)));
        for number in 0..HELD_COUNT_MAX {
            assert!(matches!(memory.hold(&case(number), began), Judged::Later));
        }
        assert!(matches!(memory.hold(&case(HELD_COUNT_MAX), began), Judged::Against(_)));
        assert!(matches!(memory.hold(&case(7), began), Judged::Later), "those who wait go on waiting");
        // An event of another policy server takes the place of one of those.
        let other = (case(HELD_COUNT_MAX + 1).0, server_name!("q.example").to_owned());
        assert!(matches!(memory.hold(&other, began), Judged::Later));
        assert_eq!(memory.held.len(), HELD_COUNT_MAX);
        assert!(matches!(memory.hold(&case(HELD_COUNT_MAX), began), Judged::Against(_)));
        // Events that came to nothing otherwise are forgotten.
        assert!(matches!(memory.hold(&case(HELD_COUNT_MAX), began + 2 * HELD_MAX), Judged::Later));
        assert_eq!(memory.held.len(), 1);
        memory.remember(case(HELD_COUNT_MAX), &a_server(), Word::Against(String::new()), began);
        assert!(memory.held.is_empty());
    }

    #[test]
    fn answers_and_pauses_are_bounded_and_end() {
        let mut memory = Memory::default();
        let (now, server) = (Duration::from_secs(5), a_server());
        for number in 0..=REMEMBERED_MAX {
            memory.remember(case(number), &server, Word::Signature(String::new()), now);
        }
        assert_eq!(memory.said.len(), REMEMBERED_MAX);
        assert!(memory.find_word(&case(0), &server, now).is_some());
        let key = "6yhHGKhCiXTSEN2ksjV7kX_N6rBQZ3Xb-M7LlC6NS-s";
        let other = format!(r#"{{"via":"p.example","public_keys":{{"ed25519":"{key}"}}}}"#);
        let other = PolicyServer::of_content(&other).unwrap();
        assert!(memory.find_word(&case(0), &other, now).is_none(), "another key needs another answer");
        let later = now + REMEMBERED_FOR;
        assert!(memory.find_word(&case(0), &server, later).is_none());
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
