//! Finds the file behind an `mxc://` URI, and reads it piece by piece for whoever asked.
//!
//! Specification: client-server API, "Content repository", `GET /media/download`.

use std::{convert::Infallible, ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{
    Stream, StreamExt, TryStreamExt,
    stream::{self, BoxStream},
};
use ruma::api::error::ErrorKind;
use sha2::{Digest as _, Sha256};

use crate::{
    env::{Long, payer},
    error::{Error, Refusal, Result},
    flows::{
        App,
        media::{
            fetch::{self, Growing, Next},
            stores::Open,
        },
        write,
    },
    media::{
        Name, items,
        objects::{self, ObjectName},
        presign::Shown,
    },
    schema::media::{ContentRow, Digest, Home, ItemRow},
    store::Read,
};

/// An upload that has not come is waited for at most this long, whatever a request says.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(60);
/// An upload that another server awaits is asked for again after this time.
const AGAIN: Duration = Duration::from_secs(1);

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
    source: Source,
    /// The SHA-256 of its bytes.
    pub(crate) digest: Digest,
    /// The content type of the file.
    pub(crate) content_type: String,
    /// The name that it was given.
    pub(crate) name: Option<String>,
}

/// The place of a file's bytes.
#[derive(Clone)]
enum Source {
    Object(Open),
    /// A small file that is not kept.
    Memory(Bytes),
}

impl File {
    /// The file of an open object.
    pub(super) fn of(open: Open, content: ContentRow) -> Self {
        let ContentRow { digest, content_type, name, .. } = content;
        Self { source: Source::Object(open), digest, content_type, name }
    }

    /// A small file that is not kept.
    pub(super) fn in_memory(bytes: Bytes, content_type: String, name: Option<String>) -> Self {
        let digest = Digest(Sha256::digest(&bytes).into());
        Self { source: Source::Memory(bytes), digest, content_type, name }
    }

    /// The number of its bytes.
    pub(crate) fn bytes(&self) -> u64 {
        match &self.source {
            Source::Object(open) => open.bytes(),
            Source::Memory(bytes) => bytes.len() as u64,
        }
    }

    /// Reads a part of it, a piece at a time as they are asked for.
    pub(crate) fn read(&self, app: &App, part: Range<u64>) -> BoxStream<'static, Result<Bytes>> {
        match &self.source {
            Source::Object(open) => open.read(&app.env, part),
            Source::Memory(bytes) => {
                let at = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
                let piece = bytes.slice(at(part.start).min(at(part.end))..at(part.end));
                stream::iter((!piece.is_empty()).then_some(Ok(piece))).boxed()
            }
        }
    }

    /// The URL at which it may be read for a while without asking this server (MSC3860), where it lies in a bucket and the settings want
    /// that. The answer there has these header fields.
    pub(crate) fn location(&self, app: &App, shown: Shown<'_>) -> Option<String> {
        match &self.source {
            Source::Object(open) => app.media.stores().presigned(open, shown),
            Source::Memory(_) => None,
        }
    }
}

/// A file of another server that is being received.
pub(crate) struct Coming(Arc<Growing>);

impl Coming {
    /// The content type of the file.
    pub(crate) fn content_type(&self) -> &str {
        &self.0.content_type
    }

    /// The name that it was given.
    pub(crate) fn name(&self) -> Option<&str> {
        self.0.name.as_deref()
    }

    /// The number of its bytes, if its server has said it. A file that turns out to have another number fails, before so many were given.
    pub(crate) fn bytes_announced(&self) -> Option<u64> {
        self.0.bytes_announced
    }

    /// Reads it as it comes, a piece at a time as they are asked for. Whoever is slower than it comes goes on once it is kept. It ends
    /// only when the file is whole and kept; where that fails, so does this.
    pub(crate) fn read(self, app: &App) -> impl Stream<Item = Result<Bytes>> + Send + use<> {
        let app = app.clone();
        let begun = (app, self.0, 0, None::<BoxStream<'static, Result<Bytes>>>);
        stream::try_unfold(begun, |(app, growing, at, mut kept)| async move {
            if kept.is_none() {
                match growing.next(at).await {
                    Next::Data(piece) => {
                        let next = at + piece.len() as u64;
                        return Ok(Some((piece, (app, growing, next, kept))));
                    }
                    Next::Failed(why) => return Err(Error::from(why)),
                    Next::Kept(content) if content.bytes <= at => return Ok(None),
                    Next::Kept(content) => {
                        let (digest, bytes) = (content.digest, content.bytes);
                        let open = open_blob(&app, digest, bytes).await?.ok_or_else(items::no_such_item)?;
                        kept = Some(open.read(&app.env, at..bytes));
                    }
                }
            }
            let Some(pieces) = &mut kept else { return Ok(None) };
            Ok(pieces.try_next().await?.map(|piece| {
                let next = at + piece.len() as u64;
                (piece, (app, growing, next, kept))
            }))
        })
    }
}

/// A file that was found.
pub(crate) enum Given {
    /// It is here, and open for reading.
    Kept(File),
    /// It is on its way from another server.
    Coming(Coming),
}

/// The content of an item, or a file that is on its way and is to become its content.
enum Found<C> {
    Kept(ContentRow),
    Coming(C),
}

/// Finds a file. Errors: 404 `M_NOT_FOUND`, 504 `M_NOT_YET_UPLOADED`.
pub(crate) async fn find(app: &App, wish: &Wish) -> Result<File> {
    let content = find_content(app, wish).await?;
    open(app, &wish.name, content).await
}

/// Finds a file, which need not be whole yet where it comes from another server. Errors: as of [`find`].
pub(crate) async fn find_or_follow(app: &App, wish: &Wish) -> Result<Given> {
    let follow = |waits| fetch::follow(app, &wish.name, waits);
    match look(app, wish, follow).await? {
        Found::Kept(content) => open(app, &wish.name, content).await.map(Given::Kept),
        Found::Coming(growing) => Ok(Given::Coming(Coming(growing))),
    }
}

/// Finds the content of an item that may be given to whoever asks.
pub(crate) async fn find_content(app: &App, wish: &Wish) -> Result<ContentRow> {
    match look(app, wish, |waits| fetch_whole(app, wish, waits)).await? {
        Found::Kept(content) => Ok(content),
        Found::Coming(never) => match never {},
    }
}

async fn fetch_whole(app: &App, wish: &Wish, waits: Duration) -> Result<Option<Infallible>> {
    fetch::fetch(app, &wish.name, waits).await?;
    Ok(None)
}

/// Looks for the content of an item, and has it fetched where it is another server's and not here. `fetch` answers none once it is kept.
async fn look<C, F: Future<Output = Result<Option<C>>>>(
    app: &App,
    wish: &Wish,
    fetch: impl Fn(Duration) -> F,
) -> Result<Found<C>> {
    let is_own = wish.name.server == app.config.server.name.as_str();
    let until = app.env.instant() + wish.waits.min(WAIT_MAX);
    let left = || until.saturating_duration_since(app.env.instant());
    let mut is_fetched = false;
    loop {
        let waits = app.media.0.awaited.wait(&wish.name);
        let uploaded = waits.uploaded.notified();
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
            match fetch(left()).await {
                // The fetch may have been begun by somebody with less patience.
                Err(Error::Refused(why))
                    if is_awaited(&why) && left() > AGAIN && !app.stopping.is_cancelled() =>
                {
                    app.env.sleep(AGAIN).await;
                }
                fetched => match fetched? {
                    Some(coming) => return Ok(Found::Coming(coming)),
                    None => is_fetched = true,
                },
            }
            continue;
        };
        if let Some(content) = given(app, &row, wish)? {
            return Ok(Found::Kept(content.clone()));
        }
        let is_pending = row.content.is_none() && row.expires_ms.is_some_and(|it| it > app.env.now_ms());
        if !is_pending || is_closed {
            return Err(items::no_such_item().into());
        }
        let left = left();
        if left.is_zero() || app.stopping.is_cancelled() {
            return Err(items::not_yet_uploaded().into());
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

/// Whether a file was refused because its upload has not come.
fn is_awaited(why: &Refusal) -> bool {
    matches!(why.kind, ErrorKind::NotYetUploaded)
}

/// The content of an item, if it has some that is given to whoever asks.
fn given<'r>(app: &App, row: &'r ItemRow, wish: &Wish) -> Result<Option<&'r ContentRow>> {
    let is_closed = wish.is_open_only && !row.is_open && !app.config.media.unauthenticated;
    if is_closed {
        return Ok(None);
    }
    Ok(items::given(row))
}

/// Opens the object of an item, and notes that it was asked for.
pub(super) async fn open(app: &App, name: &Name, content: ContentRow) -> Result<File> {
    let digest = content.digest;
    let open = open_seen(app, name, (digest, content.bytes)).await?.ok_or_else(|| {
        tracing::error!(uri = name.uri(), %digest, "the object of an item is not whole where it should be");
        items::no_such_item()
    })?;
    Ok(File::of(open, content))
}

/// Opens an object of so many bytes that an item has, or a thumbnail of it, and notes that the item was asked for: whoever looks at
/// thumbnails uses the item as much as whoever has it whole. None where it is not there, or not whole.
pub(super) async fn open_seen(
    app: &App,
    name: &Name,
    (digest, bytes): (Digest, u64),
) -> Result<Option<Open>> {
    let (owned, noted) = (app.clone(), name.clone());
    let open = move || {
        let snapshot = owned.store.snapshot();
        let now_ms = owned.env.now_ms();
        if items::is_seen_due(&*snapshot, &noted, now_ms)? {
            note_seen(&owned, &noted, now_ms)?;
        }
        spot(&owned, &*snapshot, &digest)
    };
    let spotted = app.env.blocking_long(Long::Media, open).await?;
    open_spotted(app, spotted, bytes).await
}

/// Opens the object of a blob of so many bytes. None where it is not there, or not whole.
pub(super) async fn open_blob(app: &App, digest: Digest, bytes: u64) -> Result<Option<Open>> {
    let owned = app.clone();
    let open = move || spot(&owned, &*owned.store.snapshot(), &digest);
    let spotted = app.env.blocking_long(Long::Media, open).await?;
    open_spotted(app, spotted, bytes).await
}

/// The object of a blob, as it was found in one call off the async threads.
enum Spotted {
    /// It is a file of the disk, and open.
    Open(Open),
    /// It lies in another place, which is waited for.
    Elsewhere(ObjectName),
    /// There is no object of this blob.
    Nowhere,
}

/// Finds the object of a blob, and opens it where that is a matter of the disk. It is called off the async threads.
fn spot(app: &App, read: &(impl Read + ?Sized), digest: &Digest) -> Result<Spotted> {
    Ok(match objects::find_object(read, digest)? {
        Some(object @ ObjectName { home: Home::Disk, .. }) => {
            let open = app.media.blobs().open(object)?;
            open.map_or(Spotted::Nowhere, |open| Spotted::Open(Open::on_disk(open)))
        }
        Some(object @ ObjectName { home: Home::S3, .. }) => Spotted::Elsewhere(object),
        None => Spotted::Nowhere,
    })
}

async fn open_spotted(app: &App, spotted: Spotted, bytes: u64) -> Result<Option<Open>> {
    match spotted {
        Spotted::Open(open) => Ok(Some(open).filter(|open| open.bytes() == bytes)),
        Spotted::Elsewhere(object) => app.media.stores().open(object, bytes).await,
        Spotted::Nowhere => Ok(None),
    }
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
