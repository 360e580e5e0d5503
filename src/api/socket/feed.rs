//! The news that a socket tells by itself. Each is an answer of `/sync` or of sliding sync, to a request in memory that does not
//! wait.
//!
//! A feed subscribes to the wakes of its user before it asks, and asks again when it is woken. While it waits it holds nothing but
//! the subscription, because most sockets wait most of the time.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use tokio::time::Instant;

use crate::{
    api::{
        reply::News,
        socket::{
            ending::Ending,
            inward::{Reply, Session},
            methods::{Ack, Sync},
            said,
        },
    },
    error::Refusal,
    flows::room::presence::{self, PresentPoll},
    json::JsonText,
    sync::{POLL_MAX, notifier::Subscription},
};

/// The feed waits at least this long where a limit is reached.
const REST_MIN: Duration = Duration::from_secs(1);
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
    /// Resolves when there may be news.
    wakes: Subscription,
    /// The user counts as present while the client follows the news, if it says so.
    present: Option<PresentPoll>,
    step: Step,
}

enum Step {
    /// The feed has asked. Where it `is_due`, a position that has moved is told without news, too.
    Asking { answer: BoxFuture<'static, (Reply, Option<PresentPoll>)>, is_due: bool },
    /// News were told up to this position, and are not acknowledged.
    Told { pos: String },
    /// There was nothing new. The feed asks when it is woken, and at the latest at this moment.
    Waiting { until: Instant },
    /// Nothing is asked until this moment.
    Resting { until: Instant },
}

/// Something that a feed has waited for.
pub(super) enum Progress {
    /// There may be news.
    Woken,
    /// There is an answer to what the feed asked.
    Answered(Box<(Reply, Option<PresentPoll>)>),
}

/// The outcome of an answer.
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
        let mut following = Following {
            since: wanted.since.clone(),
            full_state: wanted.full_state,
            unanswered: id,
            wakes: session.app.notifier.subscribe(session.caller.user),
            present: None,
            step: Step::Waiting { until: session.app.env.instant() },
            wanted,
        };
        following.ask(session, false);
        self.0.replace(following).and_then(|before| before.unanswered)
    }

    /// Goes on from the position up to which the client has kept the news. Refuses any other position: 400 `M_INVALID_PARAM`.
    pub(super) fn acknowledge(&mut self, session: &Session, ack: Ack) -> Result<(), Refusal> {
        match &mut self.0 {
            Some(following) if matches!(&following.step, Step::Told { pos } if *pos == ack.pos) => {
                if ack.sliding.is_some() && following.wanted.sliding.is_some() {
                    following.wanted.sliding = ack.sliding;
                }
                following.since = Some(ack.pos);
                following.full_state = false;
                following.ask(session, false);
                Ok(())
            }
            _ => {
                Err(Refusal::invalid_param("`pos` is not the position of a `sync` that waits for its `ack`."))
            }
        }
    }

    /// Waits for what comes next; for ever, if nothing does. It must be taken at once ([`Feed::take`]).
    pub(super) async fn next(&mut self) -> Progress {
        match &mut self.0 {
            Some(Following { step: Step::Asking { answer, .. }, .. }) => {
                Progress::Answered(Box::new(answer.await))
            }
            Some(Following { step: Step::Waiting { .. }, wakes, .. }) => {
                wakes.woken().await;
                Progress::Woken
            }
            _ => std::future::pending().await,
        }
    }

    /// When the feed goes on by itself.
    pub(super) fn waits_until(&self) -> Option<Instant> {
        match &self.0 {
            Some(Following { step: Step::Waiting { until } | Step::Resting { until }, .. }) => Some(*until),
            _ => None,
        }
    }

    /// Goes on after a wait.
    pub(super) fn go_on(&mut self, session: &Session) {
        if let Some(following) = &mut self.0 {
            let is_due = matches!(following.step, Step::Waiting { .. });
            following.ask(session, is_due);
        }
    }

    /// Takes what the feed has waited for, and says what the client is told.
    pub(super) fn take(&mut self, session: &Session, progress: Progress) -> Outcome {
        let mut outcome = Outcome::default();
        let Some(following) = &mut self.0 else { return outcome };
        let goes_on = match progress {
            Progress::Woken => {
                following.ask(session, false);
                true
            }
            Progress::Answered(answered) => {
                let (reply, present) = *answered;
                following.present = present.or(following.present.take());
                if reply.is_ok {
                    following.take_news(session, reply, &mut outcome)
                } else {
                    following.take_failure(session, reply, &mut outcome)
                }
            }
        };
        if !goes_on {
            self.0 = None;
        }
        outcome
    }
}

impl Following {
    /// Asks for news, which does not wait for any.
    fn ask(&mut self, session: &Session, is_due: bool) {
        let (method, path, body) = self.wanted.request(self.since.as_deref(), self.full_state);
        let reply = session.ask(method, &path, body);
        let begins = self.present.is_none().then(|| self.wanted.presence.clone());
        let (app, caller) = (session.app.clone(), session.caller.clone());
        let answer = async move {
            let present = match begins {
                // A state that Matrix does not have is refused by the endpoint.
                Some(state) => presence::begin_poll(&app, &caller, state).await.unwrap_or_default(),
                None => None,
            };
            (reply.await, present)
        };
        self.step = Step::Asking { answer: answer.boxed(), is_due };
    }

    fn take_news(&mut self, session: &Session, mut reply: Reply, outcome: &mut Outcome) -> bool {
        let Some(News { pos, is_news }) = reply.news.take() else {
            debug_assert!(false, "a poll says up to where it has told");
            return false;
        };
        outcome.said.extend(self.unanswered.take().map(|id| said::done(&id)));
        // A position that has moved is told now and then, so that a client that comes back need not catch up for long.
        let is_due = matches!(self.step, Step::Asking { is_due: true, .. });
        if is_news || (is_due && self.since.as_ref() != Some(&pos)) {
            outcome.said.push(said::news(reply));
            self.step = Step::Told { pos };
        } else {
            self.step = Step::Waiting { until: session.app.env.instant() + POLL_MAX };
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
            let until = session.app.env.instant() + wait.clamp(REST_MIN, REST_MAX);
            self.step = Step::Resting { until };
            return true;
        }
        outcome.said.push(said::news(reply));
        false
    }
}
