//! The open connections: how many there are, where they come from, and which of them must end.
//!
//! A connection ends by itself if its client sends nothing, stops in the middle of a request, or does not read its
//! answer. If no place is free, the connection that has been idle for longest makes room for the newcomer. A request that comes
//! while it is asked to is answered first.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::body::{Body, HttpBody};
use bytes::Bytes;
use http::Version;
use hyper::body::{Frame, SizeHint};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::task_tracker::TaskTrackerToken};

use crate::{
    env::{Env, payer::network},
    metrics::Metrics,
};

/// A new connection must bring the head of its first request within this time, and complete its TLS handshake within as
/// much.
pub(super) const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// A connection without a request under way ends after this time, so that its place is free.
const IDLE_MAX: Duration = Duration::from_secs(300);
/// A connection that is to make room, and has answered what came meanwhile, gets the answer out within this time.
const LEAVING_MAX: Duration = Duration::from_secs(5);
/// A connection ends when its client has read nothing of an answer for this long.
const UNREAD_MAX: Duration = Duration::from_secs(30);
/// A client that reads fewer bytes than this within `UNREAD_MAX` counts as one that reads nothing.
const TRICKLE_BYTES: usize = 16 << 10;
/// A body goes out in pieces of at most this many bytes, so that it is seen how fast its client takes them.
const PIECE_BYTES: usize = 16 << 10;
/// A piece that HTTP/2 has taken must be out of memory within this time. Until then it waits for the windows of its client,
/// who could keep it here for ever with a window of a byte. With the bytes that one answer may have waiting
/// (`server/listen.rs`), this is a rate of some 700 bytes a second.
const PINNED_MAX: Duration = Duration::from_secs(120);

/// The places for the connections of some listeners. A clone is cheap.
#[derive(Clone)]
pub(super) struct Connections(Arc<Places>);

struct Places {
    env: Env,
    metrics: Metrics,
    places_max: usize,
    by_address_max: usize,
    open: Mutex<Open>,
    freed: Notify,
}

#[derive(Default)]
struct Open {
    last: u64,
    connections: BTreeMap<u64, Arc<Connection>>,
    by_address: BTreeMap<u128, usize>,
}

/// One connection, with the facts by which its listener decides when it must end.
pub(super) struct Connection {
    env: Env,
    /// The network that it comes from. None if many clients come from one address, as behind a proxy.
    address: Option<u128>,
    /// Cancelled when the connection must make room for another one.
    leaving: CancellationToken,
    activity: Mutex<Activity>,
}

struct Activity {
    /// The connection has become a WebSocket, which is never idle and has bounds of its own (`api/socket.rs`).
    is_upgraded: bool,
    /// The requests under way, each from its head until the last piece of its answer is taken.
    requests: u32,
    /// The number of requests that have come.
    begun: u64,
    /// How many had come when the connection was asked to make room for another one.
    asked_to_leave: Option<u64>,
    idle_since: Instant,
    last_answer: u64,
    /// When a piece was last taken, for each answer that has a piece left.
    taken: BTreeMap<u64, Instant>,
    last_piece: u64,
    /// When each piece was taken that is still in memory, in the order in which they were. HTTP/1 has none here: it has one
    /// answer at a time, so that the socket itself shows whether the client reads it.
    pinned: BTreeMap<u64, Instant>,
    /// The time since which the socket has taken no more than a trickle.
    blocked_since: Option<Instant>,
    /// The bytes that the socket has taken since `blocked_since`.
    trickled: usize,
}

/// The place of a connection, which is free again when this is dropped.
pub(super) struct Place {
    all: Connections,
    number: u64,
    connection: Arc<Connection>,
}

impl Connections {
    /// Makes the places, with no connection open.
    pub(super) fn new(env: Env, metrics: Metrics, places_max: usize, by_address_max: usize) -> Self {
        let (open, freed) = (Mutex::default(), Notify::new());
        Self(Arc::new(Places { env, metrics, places_max, by_address_max, open, freed }))
    }

    /// Gives a place to a connection from this address; `None` stands for clients that cannot be told apart. Waits
    /// while all places are taken by connections with requests under way. Gives none if the address has as many
    /// connections as it may have, all with requests under way.
    pub(super) async fn admit(&self, address: Option<IpAddr>) -> Option<Place> {
        let address = address.map(network);
        loop {
            let freed = self.0.freed.notified();
            {
                let mut open = self.0.open.lock();
                let of_address =
                    address.and_then(|address| open.by_address.get(&address)).copied().unwrap_or_default();
                if of_address >= self.0.by_address_max {
                    let makes_room = open.ask_idle_to_leave(|it| it.address == address);
                    if !makes_room {
                        tracing::debug!(
                            reason = "the address has too many connections",
                            "connection refused"
                        );
                        return None;
                    }
                } else if open.connections.len() < self.0.places_max {
                    return Some(self.take(&mut open, address));
                } else {
                    open.ask_idle_to_leave(|_| true);
                }
            }
            freed.await;
        }
    }

    fn take(&self, open: &mut Open, address: Option<u128>) -> Place {
        let env = self.0.env.clone();
        let activity = Activity {
            is_upgraded: false,
            requests: 0,
            begun: 0,
            asked_to_leave: None,
            idle_since: env.instant(),
            last_answer: 0,
            taken: BTreeMap::new(),
            last_piece: 0,
            pinned: BTreeMap::new(),
            blocked_since: None,
            trickled: 0,
        };
        let (leaving, activity) = (CancellationToken::new(), Mutex::new(activity));
        let connection = Arc::new(Connection { env, address, leaving, activity });
        open.last += 1;
        let number = open.last;
        open.connections.insert(number, connection.clone());
        if let Some(address) = address {
            *open.by_address.entry(address).or_default() += 1;
        }
        self.0.metrics.connections(1);
        Place { all: self.clone(), number, connection }
    }
}

impl Open {
    /// Asks the connection that has been idle for longest to leave. True if one was asked, now or before.
    fn ask_idle_to_leave(&self, may: impl Fn(&Connection) -> bool) -> bool {
        loop {
            let mut longest: Option<(Instant, &Connection)> = None;
            for connection in self.connections.values().filter(|it| may(it)) {
                let Some(since) = connection.idle_since() else { continue };
                if connection.leaving.is_cancelled() {
                    return true;
                }
                if longest.is_none_or(|(longest, _)| since < longest) {
                    longest = Some((since, connection));
                }
            }
            let Some((_, connection)) = longest else { return false };
            // Where a request has just come, another one is looked for.
            if connection.ask_to_leave() {
                tracing::debug!(reason = "another connection needs the place", "connection ended");
                return true;
            }
        }
    }
}

impl Place {
    /// The connection that holds this place.
    pub(super) fn connection(&self) -> Arc<Connection> {
        self.connection.clone()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let places = &self.all.0;
        let mut open = places.open.lock();
        open.connections.remove(&self.number);
        if let Some(address) = self.connection.address
            && let Some(count) = open.by_address.get_mut(&address)
        {
            debug_assert!(*count > 0, "an address without connections is not listed");
            *count -= 1;
            if *count == 0 {
                open.by_address.remove(&address);
            }
        }
        drop(open);
        places.metrics.connections(-1);
        places.freed.notify_waiters();
    }
}

impl Connection {
    /// The time since which no request is under way. None while one is, and for a WebSocket.
    fn idle_since(&self) -> Option<Instant> {
        let activity = self.activity.lock();
        (activity.requests == 0 && !activity.is_upgraded).then_some(activity.idle_since)
    }

    /// Asks the connection to make room for another one. Gives `false` where a request is under way.
    fn ask_to_leave(&self) -> bool {
        let mut activity = self.activity.lock();
        if activity.requests > 0 || activity.is_upgraded {
            return false;
        }
        activity.asked_to_leave = Some(activity.begun);
        drop(activity);
        self.leaving.cancel();
        true
    }

    /// Resolves when the connection is to make room for another one, so that it takes no further request.
    pub(super) async fn asked_to_leave(&self) {
        self.leaving.cancelled().await;
    }

    /// Resolves when the connection must end, with the reason for the log.
    pub(super) async fn must_end(&self) -> &'static str {
        loop {
            let now = self.env.instant();
            let (deadline, why) = self.activity.lock().deadline(now);
            if deadline <= now {
                return why;
            }
            // The wait is bounded because a request that comes meanwhile may bring a nearer deadline.
            let wait = deadline.saturating_duration_since(now);
            if self.leaving.is_cancelled() {
                self.env.sleep(wait.min(LEAVING_MAX)).await;
                continue;
            }
            tokio::select! {
                biased;
                () = self.leaving.cancelled() => {}
                () = self.env.sleep(wait.min(UNREAD_MAX)) => {}
            }
        }
    }

    /// Notes that a request has come. It is under way until the body of its answer is dropped.
    pub(super) fn begin(self: &Arc<Self>) -> Asked {
        let mut activity = self.activity.lock();
        activity.requests += 1;
        activity.begun += 1;
        Asked(self.clone())
    }

    /// Notes that the connection has become a WebSocket, so that it makes room for no other.
    pub(super) fn upgrade(&self) {
        self.activity.lock().is_upgraded = true;
    }
}

impl Activity {
    /// Notes that the socket takes bytes again.
    fn unblock(&mut self) {
        self.blocked_since = None;
        self.trickled = 0;
    }

    /// When the connection must end if nothing happens until then, and the reason for the log.
    fn deadline(&self, now: Instant) -> (Instant, &'static str) {
        let unread = self.taken.values().chain(&self.blocked_since).min().map(|since| *since + UNREAD_MAX);
        let pinned = self.pinned.first_key_value().map(|(_, since)| *since + PINNED_MAX);
        match unread.into_iter().chain(pinned).min() {
            Some(deadline) => (deadline, "the client does not read its answer"),
            None if self.requests > 0 => (now + UNREAD_MAX, "a request is under way"),
            // An answer to what came after it was asked to leave may still be on its way out.
            None if let Some(begun) = self.asked_to_leave => {
                let last = if begun == self.begun { now } else { self.idle_since + LEAVING_MAX };
                (last, "another connection needs the place")
            }
            None if self.begun > 0 => (self.idle_since + IDLE_MAX, "the connection was idle for too long"),
            None => (self.idle_since + HEAD_TIMEOUT, "no request came"),
        }
    }
}

/// A request that is under way until this is dropped.
pub(super) struct Asked(Arc<Connection>);

impl Asked {
    /// Watches the body of the answer until the client has taken it.
    pub(super) fn watch(self, body: Body, version: Version) -> Body {
        let mut activity = self.0.activity.lock();
        activity.last_answer += 1;
        let number = activity.last_answer;
        activity.taken.insert(number, self.0.env.instant());
        drop(activity);
        let may_be_pinned = version == Version::HTTP_2;
        Body::new(Watched { asked: self, number, may_be_pinned, body, rest: Bytes::new() })
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        let mut activity = self.0.activity.lock();
        debug_assert!(activity.requests > 0, "a request ends once");
        activity.requests = activity.requests.saturating_sub(1);
        activity.idle_since = self.0.env.instant();
    }
}

/// The body of an answer, which goes out in pieces and notes when each of them is taken.
struct Watched {
    asked: Asked,
    number: u64,
    /// Whether pieces that were taken can stay in memory for as long as the client likes.
    may_be_pinned: bool,
    body: Body,
    /// The rest of the last frame, which goes out piece by piece.
    rest: Bytes,
}

/// A piece of an answer, which is pinned until it has been written to the socket.
struct Piece {
    bytes: Bytes,
    connection: Arc<Connection>,
    number: u64,
}

impl Piece {
    fn pin(bytes: Bytes, connection: &Arc<Connection>) -> Bytes {
        let mut activity = connection.activity.lock();
        activity.last_piece += 1;
        let number = activity.last_piece;
        activity.pinned.insert(number, connection.env.instant());
        drop(activity);
        Bytes::from_owner(Self { bytes, connection: connection.clone(), number })
    }
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.connection.activity.lock().pinned.remove(&self.number);
    }
}

impl Watched {
    /// The next piece of the rest.
    fn split(&mut self) -> Bytes {
        let length = self.rest.len().min(PIECE_BYTES);
        let piece = self.rest.split_to(length);
        if self.may_be_pinned { Piece::pin(piece, &self.asked.0) } else { piece }
    }

    /// Takes the next piece, of the rest or else of the next frame of the body.
    fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.rest.is_empty() {
            match ready!(Pin::new(&mut self.body).poll_frame(context)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.rest = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                ended => return Poll::Ready(ended),
            }
        }
        Poll::Ready(Some(Ok(Frame::data(self.split()))))
    }
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = self.poll_piece(context);
        let connection = &self.asked.0;
        let mut activity = connection.activity.lock();
        if matches!(polled, Poll::Ready(Some(Ok(_)))) {
            activity.taken.insert(self.number, connection.env.instant());
        } else {
            // There is no piece to take, either because the server has not made it yet or because the answer ends. The
            // client is not to blame.
            activity.taken.remove(&self.number);
        }
        drop(activity);
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (rest, hint) = (self.rest.len() as u64, self.body.size_hint());
        let mut whole = SizeHint::new();
        if let Some(upper) = hint.upper() {
            whole.set_upper(upper + rest);
        }
        whole.set_lower(hint.lower() + rest);
        whole
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.asked.0.activity.lock().taken.remove(&self.number);
    }
}

/// The stream of a connection, which notes since when its client takes no bytes. It keeps the place of the connection, because a
/// WebSocket goes on when the task has ended that served HTTP.
pub(super) struct Stream<S> {
    stream: S,
    connection: Arc<Connection>,
    _place: Arc<Place>,
    /// A server that stops waits until this is dropped.
    _lives: TaskTrackerToken,
}

impl<S> Stream<S> {
    pub(super) fn new(stream: S, place: Arc<Place>, lives: TaskTrackerToken) -> Self {
        Self { stream, connection: place.connection(), _place: place, _lives: lives }
    }

    fn note(&self, polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        let mut activity = self.connection.activity.lock();
        match polled {
            Poll::Ready(Ok(bytes)) if activity.blocked_since.is_some() => {
                activity.trickled += bytes;
                if activity.trickled >= TRICKLE_BYTES {
                    activity.unblock();
                }
            }
            Poll::Ready(_) => {}
            Poll::Pending => drop(activity.blocked_since.get_or_insert(self.connection.env.instant())),
        }
        drop(activity);
        polled
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Stream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Stream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.note(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.note(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = ready!(Pin::new(&mut self.stream).poll_flush(context));
        self.connection.activity.lock().unblock();
        Poll::Ready(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(all: usize, by_address: usize) -> (Env, Connections) {
        let env = Env::simulated(1, 0);
        (env.clone(), Connections::new(env, Metrics::new(), all, by_address))
    }

    fn address(last: u8) -> Option<IpAddr> {
        Some(IpAddr::from([192, 0, 2, last]))
    }

    /// Holds this place by a connection that does nothing, until it must end.
    fn run(env: &Env, place: Place) -> Arc<Connection> {
        let connection = place.connection();
        let it = connection.clone();
        env.spawn(async move {
            it.must_end().await;
            drop(place);
        });
        connection
    }

    #[tokio::test(start_paused = true)]
    async fn the_connection_that_was_idle_for_longest_makes_room() {
        let (env, places) = places(3, 3);
        let mut open = Vec::new();
        for last in 1..=3 {
            open.push(run(&env, places.admit(address(last)).await.unwrap()));
            env.sleep(Duration::from_secs(1)).await;
        }
        // The first one has a request under way, and the second one had one since; so the third one is idle for
        // longest.
        let asked = open[0].begin();
        drop(open[1].begin());
        places.admit(address(4)).await.unwrap();
        let left: Vec<_> = open.iter().map(|it| it.leaving.is_cancelled()).collect();
        assert_eq!(left, [false, false, true]);
        drop(asked);
    }

    #[tokio::test(start_paused = true)]
    async fn a_newcomer_waits_while_everybody_has_a_request_under_way() {
        let (env, places) = places(1, 1);
        let connection = run(&env, places.admit(address(1)).await.unwrap());
        let asked = connection.begin();
        let newcomer = tokio::time::timeout(Duration::from_secs(60), places.admit(address(2))).await;
        assert!(newcomer.is_err());
        drop(asked);
        places.admit(address(2)).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn one_address_has_no_more_than_its_places() {
        let (env, places) = places(100, 2);
        let open = [
            run(&env, places.admit(address(1)).await.unwrap()),
            run(&env, places.admit(address(1)).await.unwrap()),
        ];
        let asked = [open[0].begin(), open[1].begin()];
        assert!(places.admit(address(1)).await.is_none());
        let other = places.admit(address(2)).await.unwrap();
        let [first, _second] = asked;
        drop(first);
        // The address's own idle connection makes room, and no other.
        let newcomer = places.admit(address(1)).await.unwrap();
        assert!(open[0].leaving.is_cancelled() && !open[1].leaving.is_cancelled());
        drop((other, newcomer));
    }
}
