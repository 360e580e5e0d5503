//! Drains the part of a request's body that nobody read. A client that sends everything before it listens would see its
//! connection break if it were answered and closed at once, so that the rest is received, within bounds, and thrown
//! away.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, HttpBody},
    extract::Request,
};
use bytes::Bytes;
use http::header;
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};
use parking_lot::Mutex;

/// Drain at most this many bytes; beyond that, the connection is closed.
const DRAINED_BYTES_MAX: u64 = 64 << 20;
/// Drain for at most this long; beyond that, the connection is closed.
const DRAINED_FOR: Duration = Duration::from_secs(5);

/// The body of a request, lent to the handler, so that the unread rest can be drained afterwards.
pub(crate) struct Unread {
    shared: Arc<Shared>,
    /// The client sends the body only when it is asked to (`Expect`), and reads the answer if it is not.
    waits: bool,
}

struct Shared {
    body: Mutex<Body>,
    /// The handler has begun to read the body.
    asked: AtomicBool,
    /// The body broke off, so that no more of it will come.
    failed: AtomicBool,
}

/// The body as the handler reads it.
struct Lent(Arc<Shared>);

impl Unread {
    /// Lends the body of a request out. `None` where there is no body.
    pub(crate) fn lend(request: Request) -> (Request, Option<Self>) {
        if request.body().is_end_stream() {
            return (request, None);
        }
        let (parts, body) = request.into_parts();
        let waits = parts.headers.contains_key(header::EXPECT);
        let (asked, failed) = (AtomicBool::new(false), AtomicBool::new(false));
        let shared = Arc::new(Shared { body: Mutex::new(body), asked, failed });
        let lent = Body::new(Lent(shared.clone()));
        (Request::from_parts(parts, lent), Some(Self { shared, waits }))
    }

    /// Receives the part of the body that nobody has read, within bounds, and throws it away.
    pub(crate) async fn drain(self) {
        let asked = self.shared.asked.load(Ordering::Relaxed);
        let (done, announced) = {
            let body = self.shared.body.lock();
            (body.is_end_stream(), body.size_hint().lower())
        };
        if done
            || announced > DRAINED_BYTES_MAX
            || self.shared.failed.load(Ordering::Relaxed)
            || (self.waits && !asked)
        {
            return;
        }
        let mut rest = Lent(self.shared);
        let drain = async {
            let mut bytes = 0;
            while let Some(Ok(frame)) = rest.frame().await {
                bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
                if bytes > DRAINED_BYTES_MAX {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(DRAINED_FOR, drain).await;
    }
}

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.0.asked.store(true, Ordering::Relaxed);
        let polled = Pin::new(&mut *self.0.body.lock()).poll_frame(context);
        if let Poll::Ready(Some(Err(_))) = &polled {
            self.0.failed.store(true, Ordering::Relaxed);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.0.body.lock().is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.body.lock().size_hint()
    }
}
