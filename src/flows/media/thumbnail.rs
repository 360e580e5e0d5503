//! Thumbnails: found where they were made before, and made where they were not.
//!
//! Specification: client-server API, "Content repository", `GET /media/thumbnail`.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, stream};

use crate::{
    env::{Long, payer},
    error::{Error, Exception, Refusal, Result},
    flows::{
        App,
        media::{
            download::{self, File, Wish},
            keep,
            receive::{self, NotReceived, Room},
        },
        write,
    },
    media::{
        Name, items,
        objects::{self, ObjectName},
        thumbnails::{self, Made, NotMade, Wanted},
    },
    schema::media::{ContentRow, ThumbnailRow},
};

/// A thumbnail that was deleted while it was made is to be asked for again after this time.
const GONE_RETRY: Duration = Duration::from_secs(1);

/// A thumbnail that is not kept has at most this many bytes, because it is in memory until its reader has taken it. Whoever asks for a
/// larger one is given the image itself.
const UNKEPT_BYTES_MAX: usize = 256 << 10;

/// The outcome of making a thumbnail, for all who wait for it.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    /// It is kept as a thumbnail.
    Kept,
    /// These are its bytes, of this content type, because there is no room to keep it.
    Unkept(Bytes, &'static str),
    /// The image itself is given in its place, as this content type.
    Original(&'static str),
}

/// Finds a thumbnail, and makes it where there is none yet. Errors: those of [`download::find`]; 400 `M_UNKNOWN` where there can be
/// none, 413 `M_TOO_LARGE` for an image that is too large, which is 502 for one of another server.
pub(crate) async fn find(app: &App, wish: &Wish, wanted: Wanted) -> Result<File> {
    let wanted = wanted.rounded();
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
    // Those who pay for themselves wait for themselves: whoever has many waiting must not hold up what others ask for once.
    let key = (wish.name.clone(), wanted.kind(), payer::current().first());
    match app.media.0.drawing.run(key, begin).await.map_err(Error::from)? {
        Outcome::Original(content_type) => {
            let content = ContentRow { content_type: content_type.to_owned(), ..content };
            let mut file = download::open(app, &wish.name, content).await?;
            file.name = Some(thumbnails::file_name(content_type));
            Ok(file)
        }
        Outcome::Unkept(bytes, content_type) => {
            let name = Some(thumbnails::file_name(content_type));
            Ok(File::in_memory(bytes, content_type.to_owned(), name))
        }
        Outcome::Kept => {
            find_kept(app, &wish.name, wanted).await?.ok_or(Error::Busy { retry_after: GONE_RETRY })
        }
    }
}

/// Opens a thumbnail that was made before.
async fn find_kept(app: &App, of: &Name, wanted: Wanted) -> Result<Option<File>> {
    let row = items::find_thumbnail(&*app.store.snapshot(), of, &wanted.kind())?;
    let Some(ThumbnailRow { digest, bytes, content_type }) = row else { return Ok(None) };
    let name = Some(thumbnails::file_name(&content_type));
    let content = ContentRow { digest, bytes, content_type, name };
    // One whose object is lost is made again.
    let open = download::open_seen(app, of, (digest, bytes)).await?;
    Ok(open.map(|open| File::of(open, content)))
}

/// Makes a thumbnail and keeps it.
async fn make(app: &App, name: &Name, content: &ContentRow, wanted: Wanted) -> Result<Outcome> {
    let pixels_max = app.config.media.thumbnail_pixels_max;
    let (lost, of) = (find_named(app, name, wanted)?, name.clone());
    if let Some((kept, object)) = &lost
        && app.media.stores().open(*object, kept.bytes).await?.is_some()
    {
        return Ok(Outcome::Kept);
    }
    let open = download::open_blob(app, content.digest, content.bytes).await?;
    let open = open.ok_or_else(items::no_such_item)?;
    let Some(local) = app.media.stores().local(&open).await? else {
        return Err(too_large(app, name));
    };
    let owned = app.clone();
    let make = move || {
        // Somebody else may have had it made while this one waited for its place.
        let kept = find_named(&owned, &of, wanted)?;
        if kept.is_some() && kept != lost {
            return Ok(None);
        }
        let object = local.object().ok_or_else(items::no_such_item)?;
        Ok(Some(thumbnails::make(object, wanted, pixels_max)))
    };
    let Some(made) = app.env.blocking_long(Long::Thumbnail, make).await? else { return Ok(Outcome::Kept) };
    let (bytes, content_type, image_type) = match made {
        Ok(Made::Thumbnail(bytes, content_type, image_type)) => {
            (Bytes::from(bytes), content_type, image_type)
        }
        Ok(Made::Original(content_type)) => return Ok(Outcome::Original(content_type)),
        Err(NotMade::NoImage) => return Err(thumbnails::no_thumbnail().into()),
        Err(NotMade::Avif) => return Err(thumbnails::no_thumbnail_of_avif().into()),
        Err(NotMade::TooLarge) => return Err(too_large(app, name)),
    };
    let length = bytes.len() as u64;
    if items::has_room_for_thumbnail(&*app.store.snapshot(), name, (length, wanted.is_usual()))? {
        match keep(app, name, wanted, bytes.clone(), content_type).await {
            Ok(()) => return Ok(Outcome::Kept),
            // Where the server has no room for it now, or its bucket does not answer, whoever asks for it is not the one to hear of that.
            Err(Error::Refused(_) | Error::Busy { .. } | Error::Remote { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(match bytes.len() <= UNKEPT_BYTES_MAX {
        true => Outcome::Unkept(bytes, content_type),
        false => Outcome::Original(image_type),
    })
}

/// The thumbnail of an item that the rows name, and its object.
fn find_named(app: &App, of: &Name, wanted: Wanted) -> Result<Option<(ThumbnailRow, ObjectName)>> {
    let snapshot = app.store.snapshot();
    let Some(row) = items::find_thumbnail(&*snapshot, of, &wanted.kind())? else { return Ok(None) };
    Ok(objects::find_object(&*snapshot, &row.digest)?.map(|object| (row, object)))
}

fn too_large(app: &App, name: &Name) -> Error {
    let why = Refusal::too_large("The image is too large for a thumbnail.");
    match name.server == app.config.server.name.as_str() {
        true => why.into(),
        false => why.exception(Exception::Remote).into(),
    }
}

async fn keep(app: &App, name: &Name, wanted: Wanted, bytes: Bytes, content_type: &str) -> Result<()> {
    let length = bytes.len() as u64;
    let held = (None, Room::new(&app.media, None));
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
    let put = keep::put(app, arrived).await?;
    let object = put.object();
    let (name, kind) = (name.clone(), wanted.kind());
    let keep = move |app: &App, batch: &mut _| {
        Ok(items::keep_thumbnail(batch, (&name, &kind), (&row, object), app.env.now_ms())?)
    };
    // Where its item is gone, nothing needs it.
    if write::for_server(app, keep, Error::from).await? {
        put.settle();
    }
    Ok(())
}
