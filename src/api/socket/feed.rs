//! The news that a socket tells by itself. Each is an answer of `/sync`, which a poll in memory waits for.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::Method;
use tokio::time::Instant;

use crate::{
    api::{
        reply::News,
        socket::{
            ending::Ending,
            inward::{Reply, Session},
            methods::Sync,
            said,
        },
    },
    error::Refusal,
    json::JsonText,
    sync::POLL_MAX,
};

/// A poll that came back without news before this time was sent away by other polls of the device.
const EARLY: Duration = Duration::from_millis(POLL_MAX.as_millis() as u64 / 2);
/// The feed waits this long after such a poll, so that polls of a device do not chase each other.
const REST: Duration = Duration::from_secs(1);
/// The feed waits at most this long where a limit is reached.
const REST_MAX: Duration = Duration::from_secs(60);

/// The news of one socket.
#[derive(Default)]
pub(super) struct Feed(Option<Following>);

/// A client that follows the news.
struct Following {
    wanted: Sync,
    /// The client was told everything up to here.
    since: Option<String>,
    full_state: bool,
    /// The id of the request that is to be answered when its parameters are found to be good.
    unanswered: Option<JsonText>,
    step: Step,
}

enum Step {
    /// A poll waits for news.
    Asking { reply: BoxFuture<'static, Reply>, began: Instant },
    /// News were told up to this position, and are not acknowledged.
    Told { pos: String },
    /// Nothing is asked until this moment.
    Resting { until: Instant },
}

/// The outcome of a poll.
#[derive(Default)]
pub(super) struct Outcome {
    /// The messages for the client.
    pub(super) said: Vec<Vec<Bytes>>,
    /// The reason for which the session has ended, as far as a refusal says it.
    pub(super) ending: Option<Ending>,
}

impl Feed {
    /// Begins to follow the news, in place of what was followed before. Gives back the id of an earlier request that was not
    /// answered.
    pub(super) fn begin(
        &mut self,
        session: &Session,
        id: Option<JsonText>,
        wanted: Sync,
    ) -> Option<JsonText> {
        let (since, full_state) = (wanted.since.clone(), wanted.full_state);
        // The first poll does not wait, so that the client learns soon whether its parameters are good.
        let step = ask(session, &wanted, since.as_deref(), full_state, Duration::ZERO);
        let following = Following { wanted, since, full_state, unanswered: id, step };
        self.0.replace(following).and_then(|before| before.unanswered)
    }

    /// Goes on from the position up to which the client has kept the news. Refuses any other position: 400 `M_INVALID_PARAM`.
    pub(super) fn acknowledge(&mut self, session: &Session, kept: &str) -> Result<(), Refusal> {
        match &mut self.0 {
            Some(following) if matches!(&following.step, Step::Told { pos } if pos == kept) => {
                following.since = Some(kept.to_owned());
                following.full_state = false;
                following.poll(session);
                Ok(())
            }
            _ => {
                Err(Refusal::invalid_param("`pos` is not the position of a `sync` that waits for its `ack`."))
            }
        }
    }

    /// Waits for the next answer to a poll; for ever, if there is none. It must be taken at once ([`Feed::take`]).
    pub(super) async fn next(&mut self) -> Reply {
        match &mut self.0 {
            Some(Following { step: Step::Asking { reply, .. }, .. }) => reply.await,
            _ => std::future::pending().await,
        }
    }

    /// When the feed goes on after a rest.
    pub(super) fn rests_until(&self) -> Option<Instant> {
        match &self.0 {
            Some(Following { step: Step::Resting { until }, .. }) => Some(*until),
            _ => None,
        }
    }

    /// Goes on after a rest.
    pub(super) fn go_on(&mut self, session: &Session) {
        if let Some(following) = &mut self.0 {
            following.poll(session);
        }
    }

    /// Takes the answer to a poll, and says what the client is told.
    pub(super) fn take(&mut self, session: &Session, reply: Reply) -> Outcome {
        let mut outcome = Outcome::default();
        let Some(following) = &mut self.0 else { return outcome };
        let goes_on = if reply.is_ok {
            following.take_news(session, reply, &mut outcome)
        } else {
            following.take_failure(session, reply, &mut outcome)
        };
        if !goes_on {
            self.0 = None;
        }
        outcome
    }
}

impl Following {
    fn poll(&mut self, session: &Session) {
        self.step = ask(session, &self.wanted, self.since.as_deref(), self.full_state, POLL_MAX);
    }

    fn rest(&mut self, session: &Session, time: Duration) {
        self.step = Step::Resting { until: session.app.env.instant() + time };
    }

    fn take_news(&mut self, session: &Session, mut reply: Reply, outcome: &mut Outcome) -> bool {
        let Some(News { pos, is_news }) = reply.news.take() else {
            debug_assert!(false, "a poll says up to where it has told");
            return false;
        };
        let is_first = self.unanswered.is_some();
        outcome.said.extend(self.unanswered.take().map(|id| said::done(&id)));
        let is_early = match &self.step {
            Step::Asking { began, .. } => session.app.env.instant().saturating_duration_since(*began) < EARLY,
            Step::Told { .. } | Step::Resting { .. } => false,
        };
        // A position that has moved is told now and then, so that a client that comes back need not catch up for long.
        let has_moved = !is_early && self.since.as_ref() != Some(&pos);
        if is_news || has_moved {
            outcome.said.push(said::news(reply));
            self.step = Step::Told { pos };
        } else if is_early && !is_first {
            self.rest(session, REST);
        } else {
            self.poll(session);
        }
        true
    }

    fn take_failure(&mut self, session: &Session, reply: Reply, outcome: &mut Outcome) -> bool {
        outcome.ending = reply.ending;
        if let Some(id) = self.unanswered.take() {
            outcome.said.push(said::answer(Some(&id), reply));
            return false;
        }
        if let Some(wait) = reply.retry_after {
            self.rest(session, wait.clamp(REST, REST_MAX));
            return true;
        }
        outcome.said.push(said::news(reply));
        false
    }
}

fn ask(session: &Session, wanted: &Sync, since: Option<&str>, full_state: bool, timeout: Duration) -> Step {
    let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
    let path = wanted.path(since, full_state, timeout_ms);
    let reply = session.ask(Method::GET, &path, Bytes::new());
    Step::Asking { reply, began: session.app.env.instant() }
}
