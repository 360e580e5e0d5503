//! Counts the bytes of an answer in the budget until the last of them is out of memory. The connection sends them in pieces
//! (`server/connections.rs`), and ends if its client keeps them for too long.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use axum::body::{Body, HttpBody};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};

use crate::{
    api::budget::{Budget, Held},
    env::payer::Payers,
};

/// An answer of fewer bytes is not counted, because it costs less than the request that asked for it.
const COUNTED_BYTES_MIN: u64 = 4 << 10;

/// A body that the budget counts.
pub(crate) struct Answer {
    body: Body,
    budget: Budget,
    payers: Payers,
    /// The count of bytes that are in memory already but were not asked for yet.
    ready: Option<Held>,
}

/// Bytes that the budget counts for as long as anybody has a part of them.
struct Counted {
    bytes: Bytes,
    _held: Held,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Answer {
    /// Wraps a body, so that its bytes are charged to the budget on behalf of whoever asked. A small body
    /// stays as it is.
    pub(crate) fn wrap(body: Body, budget: &Budget, payers: Payers) -> Body {
        if body.size_hint().upper().is_some_and(|bytes| bytes < COUNTED_BYTES_MIN) {
            return body;
        }
        let ready = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
        let ready = (ready > 0).then(|| budget.charge(payers, ready));
        Body::new(Self { body, budget: budget.clone(), payers, ready })
    }

    fn count(&mut self, bytes: Bytes) -> Bytes {
        let ready = self.ready.take().filter(|ready| ready.bytes() == bytes.len());
        let held = ready.unwrap_or_else(|| self.budget.charge(self.payers, bytes.len()));
        Bytes::from_owner(Counted { bytes, _held: held })
    }
}

/// Keeps what is held for the request until its answer has been sent.
pub(crate) fn holding(body: Body, held: Option<Held>) -> Body {
    let Some(held) = held else { return body };
    Body::new(body.map_frame(move |frame| {
        debug_assert!(held.bytes() > 0, "a body that was received has bytes");
        frame
    }))
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        // An answer that comes in pieces goes on with its work now.
        let mut polled = self.payers.for_now(|| Pin::new(&mut self.body).poll_frame(context));
        if let Poll::Ready(Some(Ok(frame))) = &mut polled
            && let Some(data) = frame.data_mut()
        {
            *data = self.count(std::mem::take(data));
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
