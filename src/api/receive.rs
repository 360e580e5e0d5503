//! Receives bodies within the bound of their route and within the budget of all requests, and gives up on clients that
//! are too slow.

use std::time::Duration;

use axum::body::{Body, HttpBody};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use ruma::api::error::ErrorKind;

use crate::{
    api::{
        budget::{Budget, Held},
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

/// Receives the body of one request.
pub(crate) struct Receiver<'a> {
    /// The budget that counts what is received.
    pub(crate) budget: &'a Budget,
    /// The payers for whom the body counts.
    pub(crate) payers: Payers,
    /// The count of the received bytes, kept here for as long as the request is worked on.
    pub(crate) held: &'a mut Option<Held>,
}

impl Receiver<'_> {
    /// Receives the whole body. Errors: 413 `M_TOO_LARGE`, 400 `M_NOT_JSON` if it breaks off, 408 if it does not go on,
    /// 429 if too many bytes are in memory.
    pub(crate) async fn receive(self, app: &App, body: Body, bytes_max: usize) -> Result<Bytes> {
        let began = app.env.instant();
        // A body of unknown length may become as long as its route allows, so that as much is reserved.
        let bytes = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
        let announced = body.size_hint().exact().is_some();
        if bytes > bytes_max {
            return Err(too_large(bytes_max).into());
        }
        if body.is_end_stream() {
            return Ok(Bytes::new());
        }
        let reserved = if announced { bytes } else { bytes_max };
        let held = self.budget.reserve(self.payers, reserved).await?;
        let collected = tokio::select! {
            biased;
            collected = collect(app, body, bytes_max) => collected,
            () = app.env.sleep(BODY_TIMEOUT) => Err(reply::too_slow().into()),
        };
        spent::add(Place::Receiving, app.env.instant().saturating_duration_since(began));
        *self.held = Some(held);
        collected
    }
}

async fn collect(app: &App, mut body: Body, bytes_max: usize) -> Result<Bytes> {
    let mut parts = BytesMut::new();
    loop {
        let frame = tokio::select! {
            biased;
            frame = body.frame() => frame,
            () = app.env.sleep(PAUSE_MAX) => return Err(reply::too_slow().into()),
        };
        let Some(frame) = frame else { return Ok(parts.freeze()) };
        let frame = frame.map_err(|_| ended_early())?;
        let Ok(data) = frame.into_data() else { continue };
        if parts.len() + data.len() > bytes_max {
            return Err(too_large(bytes_max).into());
        }
        parts.extend_from_slice(&data);
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
