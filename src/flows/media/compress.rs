//! Images that users upload become smaller files, where the settings say so. The item has the smaller file then, and the one that was
//! uploaded is kept beside it or goes.

use crate::{
    env::Long,
    error::Result,
    flows::{
        App,
        media::{
            keep::{self, Put},
            receive,
            stores::Open,
        },
    },
    media::{
        items, kinds,
        thumbnails::{self, Compression},
    },
    schema::media::ContentRow,
};

/// The types that a client says of images which may become smaller. What is encrypted has another type, whatever is in it.
const TYPES: [&str; 2] = ["image/jpeg", "image/png"];

/// Makes a smaller file of an image that was uploaded, whose bytes are open, and puts it where it belongs. None for what stays as it is. Errors:
/// [`crate::error::Error::Busy`] where too many images wait; 403 `M_FORBIDDEN` where the server has no room.
pub(super) async fn make(app: &App, content: &ContentRow, open: &Open) -> Result<Option<(ContentRow, Put)>> {
    let settings = &app.config.media.compression;
    if !settings.images || !TYPES.contains(&kinds::essence(&content.content_type).as_str()) {
        return Ok(None);
    }
    let how = Compression {
        jpeg_quality: settings.jpeg_quality,
        side_max: settings.side_max,
        pixels_max: app.config.media.thumbnail_pixels_max,
    };
    let local = app.media.stores().local(open).await?.ok_or_else(items::no_such_item)?;
    let compress = move || {
        let object = local.object().ok_or_else(items::no_such_item)?;
        Ok(thumbnails::compress(object, how))
    };
    let (bytes, content_type) = match app.env.blocking_long(Long::Thumbnail, compress).await? {
        Ok(Some(made)) => made,
        Ok(None) => return Ok(None),
        Err(why) => {
            tracing::debug!(?why, "an image stays as it was uploaded");
            return Ok(None);
        }
    };
    let arrived = receive::take_made(app, bytes).await?;
    let content = ContentRow {
        digest: arrived.received.digest,
        bytes: arrived.received.bytes,
        content_type: content_type.to_owned(),
        name: content.name.clone(),
    };
    Ok(Some((content, keep::put(app, arrived).await?)))
}
