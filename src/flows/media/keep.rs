//! Puts what was received where it belongs: the blob is announced, then its object is put there, and then the batch of whoever has
//! brought it refers to it (`media/objects.rs`).

use std::time::Duration;

use crate::{
    env::Long,
    error::{Error, Result},
    flows::{
        App,
        media::receive::{Arrived, Kept},
        write,
    },
    media::objects::{self, ObjectName},
};

/// An upload of bytes that are just being removed is to be tried again after this time.
const REMOVED_RETRY: Duration = Duration::from_secs(2);

/// Puts the bytes of a file where they belong, unless they are there. The caller refers to the object next, and drops what is answered
/// besides after that.
pub(crate) async fn put(app: &App, arrived: Arrived) -> Result<(ObjectName, Kept)> {
    let (digest, bytes) = (arrived.received.digest, arrived.received.bytes);
    let claimed = write::for_server(
        app,
        move |app, batch| Ok(objects::claim(batch, &digest, bytes, app.env.now_ms())?),
        Error::from,
    );
    let object = claimed.await?;
    let blobs = app.media.blobs().clone();
    let put = move || {
        let Arrived { received, ticket, kept } = arrived;
        // The part of bytes that are there already is thrown away with its ticket.
        if !blobs.contains(object, bytes)? {
            blobs.put(received, object)?;
            ticket.spend();
        }
        Ok(kept)
    };
    let kept = app.env.blocking_long(Long::Media, put).await?;
    Ok((object, kept))
}

/// The end of keeping something whose batch found that the object is being removed meanwhile, as when the disk took a day: the object
/// that was put there after that is removed, too, and the caller may try again.
pub(crate) async fn overtaken(app: &App, object: ObjectName) -> Error {
    let blobs = app.media.blobs().clone();
    match app.env.blocking_long(Long::Media, move || Ok(blobs.remove(object)?)).await {
        Ok(()) => Error::Busy { retry_after: REMOVED_RETRY },
        Err(error) => error,
    }
}
