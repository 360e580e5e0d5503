//! Thumbnails: found where they were made before, and made where they were not.
//!
//! Specification: client-server API, "Content repository", `GET /media/thumbnail`.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, stream};

use crate::{
    env::Long,
    error::{Error, Exception, Refusal, Result},
    flows::{
        App,
        media::{
            download::{self, File, Wish, open_object},
            keep,
            receive::{self, NotReceived, Room},
        },
        write,
    },
    media::{
        Name, items,
        thumbnails::{self, Made, NotMade, Wanted},
    },
    schema::media::{ContentRow, ThumbnailRow},
};

/// A thumbnail that was deleted while it was made is to be asked for again after this time.
const GONE_RETRY: Duration = Duration::from_secs(1);

/// The outcome of making a thumbnail, for all who wait for it.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    /// It is kept as a thumbnail.
    Kept,
    /// The image itself is given in its place, as this content type.
    Original(&'static str),
}

/// Finds a thumbnail, and makes it where there is none yet. Errors: those of [`download::find`]; 400 `M_UNKNOWN` where there can be
/// none, 413 `M_TOO_LARGE` for an image that is too large, which is 502 for one of another server.
pub(crate) async fn find(app: &App, wish: &Wish, wanted: Wanted) -> Result<File> {
    let content = download::find_content(app, wish).await?;
    if let Some(file) = find_kept(app, &wish.name, wanted).await? {
        return Ok(file);
    }
    let (owned, name, source) = (app.clone(), wish.name.clone(), content.clone());
    // It is a task of its own, so that it counts for one of those who wait, and not for whoever happens to drive it.
    let begin = move || {
        let app = owned.clone();
        let work = async move { make(&owned, &name, &source, wanted).await };
        async move { Ok(app.to_the_end("a thumbnail", work).await?) }.boxed()
    };
    let key = (wish.name.clone(), wanted.kind());
    match app.media.0.drawing.run(key, begin).await.map_err(Error::from)? {
        Outcome::Original(content_type) => {
            let content = ContentRow { content_type: content_type.to_owned(), ..content };
            let mut file = download::open(app, &wish.name, content).await?;
            file.name = Some(thumbnails::file_name(content_type));
            Ok(file)
        }
        Outcome::Kept => {
            find_kept(app, &wish.name, wanted).await?.ok_or(Error::Busy { retry_after: GONE_RETRY })
        }
    }
}

/// Opens a thumbnail that was made before.
async fn find_kept(app: &App, name: &Name, wanted: Wanted) -> Result<Option<File>> {
    let row = items::find_thumbnail(&*app.store.snapshot(), name, &wanted.kind())?;
    let Some(ThumbnailRow { digest, bytes, content_type }) = row else { return Ok(None) };
    let name = Some(thumbnails::file_name(&content_type));
    let content = ContentRow { digest, bytes, content_type, name };
    // One whose object is lost is made again.
    let owned = app.clone();
    let open = move || open_object(&owned, &*owned.store.snapshot(), &digest);
    let object = app.env.blocking_long(Long::Media, open).await?;
    Ok(object.map(|object| File::of(object, content)))
}

/// Makes a thumbnail and keeps it.
async fn make(app: &App, name: &Name, content: &ContentRow, wanted: Wanted) -> Result<Outcome> {
    let (owned, digest) = (app.clone(), content.digest);
    let pixels_max = app.config.media.thumbnail_pixels_max;
    let make = move || {
        let object = open_object(&owned, &*owned.store.snapshot(), &digest)?;
        let object = object.ok_or_else(items::no_such_item)?;
        Ok(thumbnails::make(&object, wanted, pixels_max))
    };
    let made = app.env.blocking_long(Long::Thumbnail, make).await?;
    let is_own = name.server == app.config.server.name.as_str();
    let (bytes, content_type) = match made {
        Ok(Made::Thumbnail(bytes, content_type)) => (bytes, content_type),
        Ok(Made::Original(content_type)) => return Ok(Outcome::Original(content_type)),
        Err(NotMade::NoImage) => return Err(thumbnails::no_thumbnail().into()),
        Err(NotMade::TooLarge) => {
            let why = Refusal::too_large("The image is too large for a thumbnail.");
            let why = if is_own { why } else { why.exception(Exception::Remote) };
            return Err(why.into());
        }
    };
    keep(app, name, wanted, Bytes::from(bytes), content_type).await?;
    Ok(Outcome::Kept)
}

async fn keep(app: &App, name: &Name, wanted: Wanted, bytes: Bytes, content_type: &str) -> Result<()> {
    let length = bytes.len() as u64;
    let held = (receive::enter(app)?, Room::new(&app.media, None));
    let body = stream::iter([Ok::<_, std::convert::Infallible>(bytes)]);
    let arrived =
        receive::receive(app, body, (length, Some(length)), held).await.map_err(|why| match why {
            NotReceived::Failed(error) => error,
            other => Error::broken(format!("a thumbnail cannot be stored: {other:?}")),
        })?;
    let row = ThumbnailRow {
        digest: arrived.received.digest,
        bytes: length,
        content_type: content_type.to_owned(),
    };
    let (object, kept) = keep::put(app, arrived).await?;
    let (name, kind) = (name.clone(), wanted.kind());
    let keep = move |app: &App, batch: &mut _| {
        Ok(items::keep_thumbnail(batch, (&name, &kind), (&row, object), app.env.now_ms())?)
    };
    // Where its item is gone, the blob ends by itself.
    write::for_server(app, keep, Error::from).await?;
    drop(kept);
    Ok(())
}
