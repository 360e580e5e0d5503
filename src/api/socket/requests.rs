//! The requests of a socket that are under way. Those to one room are carried out in the order in which they came.

use std::collections::{HashSet, VecDeque};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};

use crate::{
    api::socket::{
        inward::{Reply, Session},
        methods::Call,
    },
    error::Error,
    json::JsonText,
};

/// A socket has at most this many requests under way, because each holds what it was asked and is answered.
pub(super) const REQUESTS_MAX: usize = 16;

/// A request that has been carried out, or refused.
pub(super) struct Answered {
    /// The id with which it is answered.
    pub(super) id: Option<JsonText>,
    /// The answer of its endpoint.
    pub(super) reply: Reply,
    lane: Option<String>,
}

/// The requests of one socket.
#[derive(Default)]
pub(super) struct Requests {
    running: FuturesUnordered<BoxFuture<'static, Answered>>,
    /// The lanes in which a request runs, so that the next one waits.
    busy: HashSet<String>,
    waiting: VecDeque<(Option<JsonText>, Call)>,
}

impl Requests {
    /// The number of requests that are not answered yet.
    pub(super) fn count(&self) -> usize {
        self.running.len().saturating_add(self.waiting.len())
    }

    /// Carries a request out when those before it in its lane have been.
    pub(super) fn begin(&mut self, session: &Session, id: Option<JsonText>, call: Call) {
        if self.busy.contains(&call.lane) {
            self.waiting.push_back((id, call));
        } else {
            self.run(session, id, call);
        }
    }

    /// Answers a request without carrying it out.
    pub(super) fn refuse(&mut self, session: &Session, id: Option<JsonText>, why: Error) {
        let reply = session.refuse(why);
        self.running.push(reply.map(|reply| Answered { id, reply, lane: None }).boxed());
    }

    /// Waits for the next answer; for ever, if nothing is under way.
    pub(super) async fn next(&mut self) -> Answered {
        match self.running.next().await {
            Some(answered) => answered,
            None => std::future::pending().await,
        }
    }

    /// Lets the next request of the same lane begin.
    pub(super) fn go_on(&mut self, session: &Session, answered: &Answered) {
        let Some(lane) = &answered.lane else { return };
        self.busy.remove(lane);
        let next = self.waiting.iter().position(|(_, call)| call.lane == *lane);
        if let Some((id, call)) = next.and_then(|next| self.waiting.remove(next)) {
            self.run(session, id, call);
        }
        if self.waiting.is_empty() {
            self.waiting = VecDeque::new();
        }
    }

    fn run(&mut self, session: &Session, id: Option<JsonText>, call: Call) {
        let Call { lane, method, path, body } = call;
        self.busy.insert(lane.clone());
        let reply = session.ask(method, &path, body);
        self.running.push(reply.map(|reply| Answered { id, reply, lane: Some(lane) }).boxed());
    }
}
