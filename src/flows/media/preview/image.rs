//! The image of a preview, which becomes an item of media of this server: clients get it from here and not from the page, which would
//! learn of them.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use federation::ports::{Body, NotSent};
use futures_util::{Stream, StreamExt};

use super::fetch::{self, Found};
use crate::{
    error::Result,
    flows::{
        App,
        media::{
            keep::{self, Put},
            receive::{self, Arrived, NotReceived, Room},
        },
    },
    media::preview::{
        address,
        choose::{Candidate, SHOWN_IMAGE_PIXELS_MIN},
        image::{PREFIX_BYTES, Probed, probe},
    },
    schema::{media::ContentRow, previews::ImageRow},
};

/// An image has at most this many bytes: previews are small, and clients ask for thumbnails of it.
const IMAGE_BYTES_MAX: u64 = 10 << 20;
/// An image arrives within this time after its answer has begun.
const ARRIVES_WITHIN: Duration = Duration::from_secs(15);
/// The media id of an image has this many characters, each a letter or a digit: nobody guesses it.
const ID_CHARS: usize = 32;

/// An image whose bytes are where they belong, and to which nothing refers yet.
pub(super) struct Image {
    pub(super) row: ImageRow,
    pub(super) content: ContentRow,
    pub(super) put: Put,
}

/// Fetches an image that may stand for a page. None where it is none; the preview is made without it. Errors: a fault of our own, or
/// [`crate::error::Error::Busy`] where the disk has too much to do.
pub(super) async fn fetch(app: &App, candidate: &Candidate) -> Result<Option<Image>> {
    let host = address::host(&candidate.url);
    match fetch::find(app, &candidate.url, fetch::IMAGES).await {
        Ok(found) => take(app, found, candidate.is_named).await,
        Err(why) => {
            tracing::debug!(host, %why, "the image of a preview is left out");
            Ok(None)
        }
    }
}

/// Takes the image that an answer is. `is_named` says whether the page names it as its own, or is the image itself. Errors: as of [`fetch`].
pub(super) async fn take(app: &App, found: Found, is_named: bool) -> Result<Option<Image>> {
    let host = address::host(&found.url);
    let left_out = |why: &str| {
        tracing::debug!(host, why, "the image of a preview is left out");
        Ok(None)
    };
    let bounds = (IMAGE_BYTES_MAX, found.announced());
    let mut body = Probing { body: found.response.into_body(), prefix: Vec::new() };
    let receiving = receive::receive(app, &mut body, bounds, (None, Room::new(&app.media, None)));
    let arrived = match fetch::within(&app.env, ARRIVES_WITHIN, receiving).await {
        Some(Ok(arrived)) => arrived,
        None | Some(Err(NotReceived::TooSlow)) => return left_out("it took too long"),
        Some(Err(NotReceived::TooLarge)) => return left_out("it is too large"),
        Some(Err(NotReceived::BrokeOff(why))) => return left_out(&why),
        // A server without room for more media makes previews without images.
        Some(Err(NotReceived::Failed(error))) if error.refusal().is_some() => {
            return left_out("this server has no room for it");
        }
        Some(Err(NotReceived::Failed(error))) => return Err(error),
    };
    match probe(&body.prefix) {
        Some(probed) if is_named || is_large(probed) => put(app, arrived, probed).await.map(Some),
        Some(_) => left_out("it is only a sign in the page"),
        None => left_out("it is no image that clients show"),
    }
}

fn is_large(probed: Probed) -> bool {
    probed.size.is_some_and(|(width, height)| width.min(height) >= SHOWN_IMAGE_PIXELS_MIN)
}

async fn put(app: &App, arrived: Arrived, probed: Probed) -> Result<Image> {
    let content = ContentRow {
        digest: arrived.received.digest,
        bytes: arrived.received.bytes,
        content_type: probed.content_type.to_owned(),
        name: None,
    };
    let row = ImageRow {
        id: app.env.random_string(ID_CHARS),
        content_type: content.content_type.clone(),
        bytes: content.bytes,
        size: probed.size,
    };
    Ok(Image { row, content, put: keep::put(app, arrived).await? })
}

/// A body of which the first bytes are kept, to see what it is.
struct Probing {
    body: Body,
    prefix: Vec<u8>,
}

impl Stream for Probing {
    type Item = std::result::Result<Bytes, NotSent>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = ready!(self.body.poll_next_unpin(cx));
        if let Some(Ok(piece)) = &next {
            let left = PREFIX_BYTES.saturating_sub(self.prefix.len());
            self.prefix.extend_from_slice(piece.get(..left).unwrap_or(piece));
        }
        Poll::Ready(next)
    }
}
