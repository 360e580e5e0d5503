//! Finds the file behind an `mxc://` URI, and reads it piece by piece for whoever asked.
//!
//! Specification: client-server API, "Content repository", `GET /media/download`.

use std::{ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{Stream, stream};
use ruma::api::error::ErrorKind;

use crate::{
    env::{Long, payer},
    error::{Refusal, Result},
    flows::{App, media::fetch, write},
    media::{Name, blobs::Object, items, objects},
    schema::media::{ContentRow, Digest, ItemRow},
    store::Read,
};

/// A file is read in pieces of this many bytes, each of which is in memory until its reader has taken it.
const PIECE_BYTES: u64 = 64 << 10;
/// An upload that has not come is waited for at most this long, whatever a request says.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(60);

/// A request for a file.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    /// The item that is asked for.
    pub(crate) name: Name,
    /// An upload to the URI is waited for at most this long.
    pub(crate) waits: Duration,
    /// The file may be fetched from its server, if it is another one's.
    pub(crate) allow_remote: bool,
    /// Only files are given that were never closed to those without an access token.
    pub(crate) is_open_only: bool,
}

/// A file that is open for reading.
#[derive(Clone)]
pub(crate) struct File {
    object: Arc<Object>,
    /// The SHA-256 of its bytes.
    pub(crate) digest: Digest,
    /// The content type of the file.
    pub(crate) content_type: String,
    /// The name that it was given.
    pub(crate) name: Option<String>,
}

impl File {
    /// The file of an open object.
    pub(super) fn of(object: Object, content: ContentRow) -> Self {
        let ContentRow { digest, content_type, name, .. } = content;
        Self { object: Arc::new(object), digest, content_type, name }
    }

    /// The number of its bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.object.bytes()
    }

    /// The object, for those who read it as a whole.
    pub(crate) fn object(&self) -> Arc<Object> {
        Arc::clone(&self.object)
    }

    /// Reads a part of it, a piece at a time as they are asked for.
    pub(crate) fn read(
        &self,
        app: &App,
        part: Range<u64>,
    ) -> impl Stream<Item = Result<Bytes>> + Send + use<> {
        let (env, object) = (app.env.clone(), self.object());
        stream::try_unfold(part, move |left| {
            let (env, object) = (env.clone(), Arc::clone(&object));
            async move {
                let length = left.end.saturating_sub(left.start).min(PIECE_BYTES);
                if length == 0 {
                    return Ok(None);
                }
                let from = left.start;
                let read = move || Ok(object.read(from, usize::try_from(length).unwrap_or_default())?);
                let piece = env.blocking_long(Long::Media, read).await?;
                Ok(Some((piece, from + length..left.end)))
            }
        })
    }
}

/// Finds a file. Errors: 404 `M_NOT_FOUND`, 504 `M_NOT_YET_UPLOADED`.
pub(crate) async fn find(app: &App, wish: &Wish) -> Result<File> {
    let content = find_content(app, wish).await?;
    open(app, &wish.name, content).await
}

/// Finds the content of an item that may be given to whoever asks.
pub(crate) async fn find_content(app: &App, wish: &Wish) -> Result<ContentRow> {
    let is_own = wish.name.server == app.config.server.name.as_str();
    let until = app.env.instant() + wish.waits.min(WAIT_MAX);
    let mut is_fetched = false;
    loop {
        let uploaded = app.media.0.uploaded.notified();
        tokio::pin!(uploaded);
        // An upload between the look and the wait is noticed, too.
        uploaded.as_mut().enable();
        let row = items::find(&*app.store.snapshot(), &wish.name)?;
        // A file that comes now is new, so that those who are given old files alone would not be given it.
        let is_closed = wish.is_open_only && !app.config.media.unauthenticated;
        let Some(row) = row else {
            if is_own || is_fetched || is_closed || !wish.allow_remote {
                return Err(items::no_such_item().into());
            }
            payer::rest();
            fetch::fetch(app, &wish.name, wish.waits.min(WAIT_MAX)).await?;
            is_fetched = true;
            continue;
        };
        if let Some(content) = given(app, &row, wish) {
            return Ok(content.clone());
        }
        let is_pending = row.content.is_none() && row.expires_ms.is_some_and(|it| it > app.env.now_ms());
        if !is_pending || is_closed {
            return Err(items::no_such_item().into());
        }
        let left = until.saturating_duration_since(app.env.instant());
        if left.is_zero() || app.stopping.is_cancelled() {
            let why = "Nothing was uploaded to this URI yet.";
            return Err(Refusal::new(ErrorKind::NotYetUploaded, why).into());
        }
        // The answer counts again when there is one.
        payer::rest();
        tokio::select! {
            biased;
            () = app.stopping.cancelled() => {}
            () = &mut uploaded => {}
            () = app.env.sleep(left) => {}
        }
    }
}

/// The content of an item, if it has some that is given to whoever asks.
fn given<'r>(app: &App, row: &'r ItemRow, wish: &Wish) -> Option<&'r ContentRow> {
    let is_closed = wish.is_open_only && !row.is_open && !app.config.media.unauthenticated;
    row.content.as_ref().filter(|_| !row.is_quarantined && !is_closed)
}

/// Opens the object of an item, and notes that it was asked for.
pub(super) async fn open(app: &App, name: &Name, content: ContentRow) -> Result<File> {
    let (owned, noted) = (app.clone(), name.clone());
    let digest = content.digest;
    let open = move || {
        let snapshot = owned.store.snapshot();
        let now_ms = owned.env.now_ms();
        if items::is_seen_due(&*snapshot, &noted, now_ms)? {
            note_seen(&owned, &noted, now_ms)?;
        }
        open_object(&owned, &*snapshot, &digest)
    };
    let object = app.env.blocking_long(Long::Media, open).await?;
    let object = object.ok_or_else(|| {
        tracing::error!(uri = name.uri(), %digest, "the object of an item is not in the media directory");
        items::no_such_item()
    })?;
    Ok(File::of(object, content))
}

/// Notes that an item was asked for, unless it was deleted meanwhile.
fn note_seen(app: &App, name: &Name, now_ms: u64) -> Result<()> {
    let locked = write::lock_server(app);
    if items::find(&app.store.view(), name)?.is_some() {
        let mut note = app.store.note(&locked.guard);
        items::note_seen(&mut note, name, now_ms);
        drop(app.store.enqueue_note(note)?);
    }
    Ok(())
}

/// Opens the object of a blob. None where it is not there. It is called off the async threads.
pub(crate) fn open_object(app: &App, read: &(impl Read + ?Sized), digest: &Digest) -> Result<Option<Object>> {
    match objects::find_object(read, digest)? {
        Some(object) => Ok(app.media.blobs().open(object)?),
        None => Ok(None),
    }
}
