//! Receives bodies within the bound of their route and within the budget of all requests, and gives up on clients that
//! are too slow.
//!
//! The budget is charged for what has arrived and not for what is announced, in steps: a sender that announces much and sends
//! little holds little. A body must arrive with a least speed, so that it does not even hold that for long.

use std::time::Duration;

use axum::body::{Body, HttpBody};
use bytes::Bytes;
use http_body_util::BodyExt;
use ruma::api::error::ErrorKind;

use crate::{
    api::{
        budget::{Budget, Held, Line},
        reply,
    },
    env::{
        payer::Payers,
        spent::{self, Place},
    },
    error::{Error, Refusal, Result},
    flows::App,
};

/// A body may take at most this long to arrive, so that slow clients do not hold memory.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// Two parts of a body may be at most this far apart.
const PAUSE_MAX: Duration = Duration::from_secs(15);
/// A body may arrive at any speed for this long.
const GRACE: Duration = Duration::from_secs(10);
/// After the grace, a body must have this many bytes for each millisecond since, which is 4 KiB a second.
const BYTES_PER_MS_MIN: u64 = 4;
/// The first bytes of a body that are charged, before any has arrived.
const FIRST_STEP_BYTES: usize = 4 << 10;
/// A step charges as many bytes as have been charged already, but at most this many, so that steps are few and no step is
/// much larger than what has arrived.
const STEP_BYTES_MAX: usize = 4 << 20;

/// Receives the body of one request.
pub(crate) struct Receiver<'a> {
    /// The budget that counts what is received.
    pub(crate) budget: &'a Budget,
    /// The payers for whom the body counts.
    pub(crate) payers: Payers,
    /// The sender has proven who it is, before the body is read.
    pub(crate) is_known: bool,
    /// The count of the received bytes, kept here for as long as the request is worked on.
    pub(crate) held: &'a mut Option<Held>,
}

impl Receiver<'_> {
    /// Receives the whole body. Errors: 413 `M_TOO_LARGE`, 400 `M_NOT_JSON` if it breaks off, 408 if it does not go on or is
    /// too slow, 429 if too many bytes are in memory.
    pub(crate) async fn receive(self, app: &App, body: Body, bytes_max: usize) -> Result<Bytes> {
        let began = app.env.instant();
        let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
        if announced > bytes_max {
            return Err(too_large(bytes_max).into());
        }
        if body.is_end_stream() {
            return Ok(Bytes::new());
        }
        // A body of unknown length may become as long as its route allows.
        let expected = if body.size_hint().exact().is_some() { announced } else { bytes_max };
        let is_known = self.is_known;
        let receive = async {
            let first = expected.min(FIRST_STEP_BYTES);
            let held =
                self.budget.reserve(self.payers, Line::of(is_known, announced.max(first)), first).await?;
            let waited = app.env.instant().saturating_duration_since(began);
            let parts = Vec::with_capacity(first);
            let arriving = Arriving { app, is_known, announced, expected, bytes_max, parts, held, waited };
            arriving.collect(body).await
        };
        let received = tokio::select! {
            biased;
            received = receive => received,
            () = app.env.sleep(BODY_TIMEOUT) => Err(reply::too_slow().into()),
        };
        spent::add(Place::Receiving, app.env.instant().saturating_duration_since(began));
        let (bytes, held) = received?;
        *self.held = Some(held);
        Ok(bytes)
    }
}

/// A body of which a part has arrived.
struct Arriving<'a> {
    app: &'a App,
    is_known: bool,
    /// The bytes that it has at least, as its head says.
    announced: usize,
    /// The bytes that it may come to have.
    expected: usize,
    bytes_max: usize,
    parts: Vec<u8>,
    /// The count of the bytes for which there is room in `parts`.
    held: Held,
    /// The time for which it waited for room, which is not the sender's fault.
    waited: Duration,
}

impl Arriving<'_> {
    async fn collect(mut self, mut body: Body) -> Result<(Bytes, Held)> {
        let env = &self.app.env;
        let began = env.instant();
        let waited_before = self.waited;
        loop {
            let waited = self.waited.saturating_sub(waited_before);
            let took = env.instant().saturating_duration_since(began).saturating_sub(waited);
            let frame = tokio::select! {
                biased;
                frame = body.frame() => frame,
                () = env.sleep(self.patience(took)) => return Err(reply::too_slow().into()),
            };
            let Some(frame) = frame else { return Ok((self.parts.into(), self.held)) };
            let frame = frame.map_err(|_| ended_early())?;
            let Ok(data) = frame.into_data() else { continue };
            let bytes = self.parts.len().saturating_add(data.len());
            if bytes > self.bytes_max {
                return Err(too_large(self.bytes_max).into());
            }
            self.make_room(bytes).await?;
            self.parts.extend_from_slice(&data);
        }
    }

    /// For how long the next part may be waited for, after the body has taken so long.
    fn patience(&self, took: Duration) -> Duration {
        let earned = Duration::from_millis(self.parts.len() as u64 / BYTES_PER_MS_MIN);
        (GRACE + earned).saturating_sub(took).min(PAUSE_MAX)
    }

    /// Charges the budget and makes room, so that the body can have this many bytes.
    async fn make_room(&mut self, bytes: usize) -> Result<()> {
        let before = self.held.bytes();
        if bytes <= before {
            return Ok(());
        }
        let step = before.min(STEP_BYTES_MAX);
        let room = before.saturating_add(step).min(self.expected).max(bytes);
        let began = self.app.env.instant();
        let line = Line::of(self.is_known, self.announced.max(room));
        self.held.grow(line, room.saturating_sub(before)).await?;
        self.waited += self.app.env.instant().saturating_duration_since(began);
        self.parts.reserve_exact(room.saturating_sub(self.parts.len()));
        Ok(())
    }
}

fn ended_early() -> Error {
    Refusal::new(ErrorKind::NotJson, "The request's body ended before it was complete.").into()
}

fn too_large(bytes_max: usize) -> Refusal {
    tracing::debug!(bytes_max, reason = "the body is larger than its route allows", "refused");
    Refusal::too_large(format!(
        "The request's body is larger than {bytes_max} bytes, the most that this endpoint takes."
    ))
}

#[cfg(test)]
mod tests {
    use std::{
        pin::Pin,
        task::{Context, Poll},
    };

    use futures_util::{FutureExt, Stream, StreamExt, future::join_all, stream};
    use hyper::body::{Frame, SizeHint};

    use super::*;
    use crate::{env::Env, server::Server};

    const MIB: usize = 1 << 20;
    const SEND_BYTES: usize = 13 * MIB;

    /// A body that announces a length, and whose parts come when they come.
    struct Announced(u64, Pin<Box<dyn Stream<Item = Bytes> + Send>>);

    impl HttpBody for Announced {
        type Data = Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            self.1.as_mut().poll_next(context).map(|part| part.map(|part| Ok(Frame::data(part))))
        }

        fn size_hint(&self) -> SizeHint {
            SizeHint::with_exact(self.0)
        }
    }

    /// A body of ten bytes for each of these pauses.
    fn trickle(env: &Env, announced: usize, pause: Duration) -> Body {
        let env = env.clone();
        let parts = stream::unfold(0, move |sent| {
            let env = env.clone();
            async move {
                env.sleep(pause).await;
                (sent < announced).then(|| (Bytes::from_static(&[b' '; 10]), sent + 10))
            }
        });
        Body::new(Announced(announced as u64, parts.boxed()))
    }

    fn stranger(last: u8) -> Payers {
        Payers::of_request(None, [192, 0, 2, last].into())
    }

    async fn receive(
        app: &App,
        budget: &Budget,
        payers: Payers,
        is_known: bool,
        body: Body,
    ) -> Result<usize> {
        let mut held = None;
        let receiver = Receiver { budget, payers, is_known, held: &mut held };
        receiver.receive(app, body, SEND_BYTES).await.map(|bytes| bytes.len())
    }

    #[tokio::test(start_paused = true)]
    async fn slow_bodies_of_strangers_hold_what_came_and_keep_no_other_body_waiting() {
        let server = Server::in_memory(Env::simulated(1, 0));
        let app = server.app();
        let budget = Budget::new(app.env.clone(), app.metrics.clone(), 64 * MIB);
        let slow = |last: u8| {
            let body = trickle(&app.env, SEND_BYTES, Duration::from_secs(5));
            receive(app, &budget, stranger(last), false, body)
        };
        let others = async {
            app.env.sleep(Duration::from_secs(1)).await;
            assert_eq!(budget.held_by(stranger(0)), 4 * FIRST_STEP_BYTES);
            for (is_known, bytes) in [(true, 100), (false, 100), (true, MIB), (false, MIB)] {
                let body = Body::from(vec![b' '; bytes]);
                let received = receive(app, &budget, stranger(99), is_known, body).now_or_never();
                assert_eq!(received.expect("it does not wait").unwrap(), bytes);
            }
        };
        let slow = join_all((0..56).map(|number| slow(number / 4)));
        let (answers, ()) = tokio::join!(slow, others);
        for answer in answers {
            assert!(matches!(answer, Err(Error::Refused(_))), "it is too slow: {answer:?}");
        }
        assert_eq!(budget.held_by(stranger(0)), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_may_begin_slowly_and_then_must_keep_a_least_speed() {
        let server = Server::in_memory(Env::simulated(1, 0));
        let app = server.app();
        let budget = Budget::new(app.env.clone(), app.metrics.clone(), 64 * MIB);
        let ask = |bytes, pause_ms| {
            let body = trickle(&app.env, bytes, Duration::from_millis(pause_ms));
            receive(app, &budget, stranger(1), true, body)
        };
        assert_eq!(ask(80, 1_000).await.unwrap(), 80, "a few bytes within the grace");
        assert!(ask(300, 1_000).await.is_err(), "ten bytes a second after it");
        assert_eq!(ask(200_000, 1).await.unwrap(), 200_000, "ten bytes a millisecond");
        assert_eq!(budget.held_by(stranger(1)), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_is_charged_in_few_steps_for_little_more_than_came() {
        let server = Server::in_memory(Env::simulated(1, 0));
        let app = server.app();
        let budget = Budget::new(app.env.clone(), app.metrics.clone(), 256 * MIB);
        let (send, mut parts) = tokio::sync::mpsc::unbounded_channel();
        let parts = stream::poll_fn(move |context| parts.poll_recv(context));
        let body = Body::new(Announced(SEND_BYTES as u64, parts.boxed()));
        let received = receive(app, &budget, stranger(1), true, body);
        let sent = async {
            let (mut came, mut seen) = (0, Vec::new());
            while came < SEND_BYTES {
                send.send(Bytes::from(vec![b' '; 64 << 10])).unwrap();
                came += 64 << 10;
                app.env.sleep(Duration::from_millis(1)).await;
                let held = budget.held_by(stranger(1));
                let right = came..=(2 * came).min(SEND_BYTES);
                assert!(right.contains(&held), "{held} for {came}");
                seen.push(held);
            }
            drop(send);
            seen.dedup();
            seen
        };
        let (received, seen) = tokio::join!(received, sent);
        assert_eq!(received.unwrap(), SEND_BYTES);
        assert!(seen.len() < 20, "{} steps", seen.len());
    }
}
