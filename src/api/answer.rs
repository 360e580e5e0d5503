//! Sends the body of an answer in pieces, so that the connection sees how fast its client takes them. The bytes count
//! in the budget until the last piece is out of memory.

use std::{
    net::IpAddr,
    pin::Pin,
    task::{Context, Poll},
};

use axum::body::{Body, HttpBody};
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};

use crate::api::budget::{Budget, Held};

/// A piece has at most this many bytes, so that a slow client is noticed between two pieces.
const PIECE_BYTES: usize = 64 << 10;

/// An answer of fewer bytes is not counted, because it costs less than the request that asked for it.
const COUNTED_BYTES_MIN: u64 = 4 << 10;

/// A body that goes out in pieces, and that the budget counts.
pub(crate) struct Answer {
    body: Body,
    budget: Budget,
    peer: IpAddr,
    /// The count of bytes that are in memory already but were not asked for yet.
    ready: Option<Held>,
    /// The rest of the last frame, which goes out piece by piece.
    rest: Bytes,
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
    /// Wraps a body, so that its bytes are charged to the budget on behalf of the address that asked. A small body
    /// stays as it is.
    pub(crate) fn wrap(body: Body, budget: &Budget, peer: IpAddr) -> Body {
        if body.size_hint().upper().is_some_and(|bytes| bytes < COUNTED_BYTES_MIN) {
            return body;
        }
        let ready = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
        let ready = (ready > 0).then(|| budget.charge(peer, ready));
        Body::new(Self { body, budget: budget.clone(), peer, ready, rest: Bytes::new() })
    }

    fn count(&mut self, bytes: Bytes) -> Bytes {
        let ready = self.ready.take().filter(|ready| ready.bytes() == bytes.len());
        let held = ready.unwrap_or_else(|| self.budget.charge(self.peer, bytes.len()));
        Bytes::from_owner(Counted { bytes, _held: held })
    }
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.rest.is_empty() {
            match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => self.rest = self.count(data),
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                other => return other,
            }
        }
        let length = self.rest.len().min(PIECE_BYTES);
        let piece = self.rest.split_to(length);
        Poll::Ready(Some(Ok(Frame::data(piece))))
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
