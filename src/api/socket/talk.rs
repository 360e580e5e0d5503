//! The life of a socket after its opening: it reads, asks, answers and tells news until one side ends it.

use std::time::Duration;

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf},
    time::Instant,
};

use crate::{
    api::socket::{
        ending::Ending,
        feed::{Feed, Progress},
        frames::{
            reader::{Incoming, Reader},
            writer::Writer,
        },
        inward::Session,
        methods::{self, Asked, Wish},
        places::Place,
        requests::{Answered, REQUESTS_MAX, Requests},
        said,
    },
    error::Error,
    flows::limits::{Limit, Source},
    json::JsonText,
    sync::notifier::Subscription,
};

/// The server asks this often whether the client is there.
const PING_EVERY: Duration = Duration::from_secs(30);
/// A client of which nothing came for this long has gone.
const SILENT_MAX: Duration = Duration::from_secs(60);
/// Nothing is read while this many messages wait for the client, so that it cannot ask for more than it reads.
const MESSAGES_MAX: usize = 64;
/// The client has this long to take the reason of the end, and to say that it has.
const END_TAKES_MAX: Duration = Duration::from_secs(5);
/// A server that stops waits this long for requests that are under way. Stopping takes five seconds altogether.
const DRAIN_MAX: Duration = Duration::from_secs(2);
/// A server that stops waits this long until the client has taken the reason.
const STOP_TAKES_MAX: Duration = Duration::from_millis(500);
/// A token whose end is further away than this is looked at again then.
const EXPIRY_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// One socket, while its client talks.
struct Talk<S> {
    session: Session,
    place: Place,
    reader: Reader<ReadHalf<S>>,
    writer: Writer<WriteHalf<S>>,
    requests: Requests,
    feed: Feed,
    /// Resolves when sessions of the user have ended.
    ended: Subscription,
    ping_at: Instant,
    /// When the access token expires, if it does.
    expires_at: Option<Instant>,
}

/// Something that a socket waits for.
enum Event {
    Came(Result<Incoming, Ending>),
    Written(Result<(), Ending>),
    Answered(Answered),
    Feed(Progress),
    SessionsEnded,
    Ends(Ending),
    Time,
}

/// Serves a socket over this stream until it ends.
pub(super) async fn run<S>(session: Session, place: Place, stream: S)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let env = session.app.env.clone();
    let (read, write) = tokio::io::split(stream);
    let ended = session.app.ended_sessions.subscribe(session.caller.user);
    let mut talk = Talk {
        reader: Reader::new(read, env.clone(), session.counted()),
        writer: Writer::new(write, env.clone()),
        session,
        place,
        requests: Requests::default(),
        feed: Feed::default(),
        ended,
        ping_at: env.instant() + PING_EVERY,
        expires_at: None,
    };
    // The session may have ended between the handshake and the subscription.
    let ending = match talk.look_at_session() {
        Some(ending) => ending,
        None => talk.go_on().await,
    };
    let (user, device) = (talk.session.caller.user, talk.session.caller.device);
    tracing::debug!(%user, %device, reason = ?ending, "a socket ends");
    talk.end(ending).await;
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Talk<S> {
    /// Goes on until the socket must end, and says why.
    async fn go_on(&mut self) -> Ending {
        loop {
            let now = self.session.app.env.instant();
            let may_read = self.requests.count() < REQUESTS_MAX && self.writer.message_count() < MESSAGES_MAX;
            if !may_read {
                self.reader.excuse();
            }
            if let Some(ending) = self.look_at_clock(now) {
                return ending;
            }
            let ends = match self.next(now, may_read).await {
                Event::Came(Ok(incoming)) => self.take(incoming),
                Event::Came(Err(ending)) | Event::Written(Err(ending)) | Event::Ends(ending) => Some(ending),
                Event::Written(Ok(())) | Event::Time => None,
                Event::Answered(answered) => self.tell_answer(answered),
                Event::Feed(progress) => self.tell_news(progress),
                Event::SessionsEnded => self.look_at_session(),
            };
            if let Some(ending) = ends {
                return ending;
            }
        }
    }

    /// Waits for the next thing to do.
    async fn next(&mut self, now: Instant, may_read: bool) -> Event {
        let due = self.due().saturating_duration_since(now);
        let Self { session, place, reader, writer, requests, feed, ended, .. } = self;
        let app = &session.app;
        tokio::select! {
            biased;
            () = app.stopping.cancelled() => Event::Ends(Ending::Stopping),
            () = place.lost() => Event::Ends(Ending::Replaced),
            () = ended.woken() => Event::SessionsEnded,
            answered = requests.next() => Event::Answered(answered),
            progress = feed.next() => Event::Feed(progress),
            written = writer.write(), if !writer.is_done() => Event::Written(written),
            incoming = reader.next(), if may_read => Event::Came(incoming),
            () = app.env.sleep(due) => Event::Time,
        }
    }

    /// When something is due that does not come by itself.
    fn due(&self) -> Instant {
        let silent = self.reader.heard_at() + SILENT_MAX;
        let others = [
            self.reader.message_due(),
            self.writer.reading_due(),
            self.feed.waits_until(),
            self.expires_at,
            Some(silent),
        ];
        others.into_iter().flatten().fold(self.ping_at, Instant::min)
    }

    /// Does what is due, and says why the socket must end if it must.
    fn look_at_clock(&mut self, now: Instant) -> Option<Ending> {
        let is_over = |due: Option<Instant>| due.is_some_and(|due| due <= now);
        if is_over(self.writer.reading_due()) || is_over(self.reader.message_due()) {
            return Some(Ending::Slow);
        }
        if is_over(Some(self.reader.heard_at() + SILENT_MAX)) {
            return Some(Ending::Silent);
        }
        if self.ping_at <= now {
            self.writer.ping();
            self.ping_at = now + PING_EVERY;
        }
        if is_over(self.feed.waits_until()) {
            self.feed.go_on(&self.session);
        }
        if is_over(self.expires_at) { self.look_at_session() } else { None }
    }

    /// Says why the session has ended, if it has, and otherwise when to look again.
    fn look_at_session(&mut self) -> Option<Ending> {
        if let Some(ending) = self.session.find_ending() {
            return Some(ending);
        }
        match self.session.expires_in() {
            Ok(left) => {
                // A millisecond more, because a token is good up to its last one.
                let left = left.map(|left| left.min(EXPIRY_MAX) + Duration::from_millis(1));
                self.expires_at = left.map(|left| self.session.app.env.instant() + left);
                None
            }
            Err(error) => {
                tracing::error!(%error, "the session of a socket cannot be looked at");
                Some(Ending::Failed)
            }
        }
    }

    fn take(&mut self, incoming: Incoming) -> Option<Ending> {
        match incoming {
            Incoming::Text(message) => self.take_message(message),
            Incoming::Ping(payload) => self.writer.pong(payload),
            Incoming::Pong => {}
            Incoming::Close => return Some(Ending::Closed),
        }
        None
    }

    fn take_message(&mut self, message: Bytes) {
        let Asked { id, wish } = methods::read(message, &self.session.caller.user_id);
        match wish {
            Ok(Wish::Call(call)) => self.requests.begin(&self.session, id, call),
            Ok(Wish::Sync(wanted)) => match self.count() {
                Ok(()) => {
                    if let Some(before) = self.feed.begin(&self.session, id, wanted) {
                        self.writer.say(said::done(&before));
                    }
                }
                Err(error) => self.requests.refuse(&self.session, id, error),
            },
            Ok(Wish::Ack(ack)) => match self.feed.acknowledge(&self.session, ack) {
                Ok(()) => {
                    if let Some(id) = id {
                        self.writer.say(said::done(&id));
                    }
                }
                Err(refusal) => self.refuse(id, refusal.into()),
            },
            Err(refusal) => self.refuse(id, refusal.into()),
        }
    }

    /// Refuses a message that reaches no endpoint, and counts it.
    fn refuse(&mut self, id: Option<JsonText>, why: Error) {
        let why = self.count().err().unwrap_or(why);
        self.requests.refuse(&self.session, id, why);
    }

    /// Counts a message that no endpoint counts. Errors: 429 `M_LIMIT_EXCEEDED`.
    fn count(&self) -> Result<(), Error> {
        self.session.app.limits.take(Limit::Other, Source::User(self.session.caller.user))
    }

    fn tell_answer(&mut self, answered: Answered) -> Option<Ending> {
        self.requests.go_on(&self.session, &answered);
        let Answered { id, reply, .. } = answered;
        let ending = reply.ending;
        self.writer.say(said::answer(id.as_ref(), reply));
        // The session is looked at for what a refusal of one request does not say.
        ending.map(|ending| self.session.find_ending().unwrap_or(ending))
    }

    fn tell_news(&mut self, progress: Progress) -> Option<Ending> {
        let outcome = self.feed.take(&self.session, progress);
        outcome.said.into_iter().for_each(|said| self.writer.say(said));
        outcome.ending.map(|ending| self.session.find_ending().unwrap_or(ending))
    }

    /// Ends the socket: what is under way is answered if the server stops, and the client is told the reason.
    async fn end(mut self, ending: Ending) {
        self.feed = Feed::default();
        let env = self.session.app.env.clone();
        let takes_max = if ending == Ending::Stopping {
            tokio::select! {
                biased;
                () = self.drain() => {}
                () = env.sleep(DRAIN_MAX) => {}
            }
            STOP_TAKES_MAX
        } else {
            END_TAKES_MAX
        };
        if ending == Ending::Gone {
            return;
        }
        self.requests = Requests::default();
        self.writer.close(ending);
        tokio::select! {
            biased;
            () = self.part(ending) => {}
            () = env.sleep(takes_max) => {}
        }
    }

    /// Answers the requests that are under way.
    async fn drain(&mut self) {
        while self.requests.count() > 0 || !self.writer.is_done() {
            let Self { requests, writer, .. } = self;
            let event = tokio::select! {
                biased;
                answered = requests.next() => Event::Answered(answered),
                written = writer.write(), if !writer.is_done() => Event::Written(written),
            };
            match event {
                Event::Answered(answered) => drop(self.tell_answer(answered)),
                Event::Written(Err(_)) => return,
                _ => {}
            }
        }
    }

    /// Sends the reason, and waits until the client has said that it has it.
    async fn part(&mut self, ending: Ending) {
        if self.writer.write().await.is_err() {
            return;
        }
        if ending != Ending::Closed {
            while let Ok(incoming) = self.reader.next().await {
                if incoming == Incoming::Close {
                    break;
                }
            }
        }
        self.writer.shut_down().await;
    }
}
