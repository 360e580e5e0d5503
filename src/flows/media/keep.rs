//! Puts what was received where it belongs: the blob is announced, then its object is put there, and then the batch of whoever has
//! brought it refers to it (`media/objects.rs`).

use std::time::Duration;

use crate::{
    error::{Error, Result},
    flows::{
        App,
        media::{
            receive::{Arrived, Kept},
            stores::Open,
        },
        write,
    },
    media::objects::{self, ObjectName},
};

/// An upload of bytes that are just being removed is to be tried again after this time.
const REMOVED_RETRY: Duration = Duration::from_secs(2);

/// An object that is where it belongs, with the room that it takes. Unless something refers to it by the time when this is dropped, it is
/// removed: whoever is refused after all, or hangs up, leaves nothing that counts for nobody.
pub(crate) struct Put {
    app: App,
    object: ObjectName,
    /// Its bytes, as a file of this machine wherever the object lies.
    open: Open,
    kept: Option<Kept>,
    /// Its place has answered that it is there.
    is_there: bool,
    is_needed: bool,
}

impl Put {
    /// The object, which lies where it belongs.
    pub(crate) fn object(&self) -> ObjectName {
        self.object
    }

    /// The bytes of the object, as a file of this machine: they are read without asking a bucket for them.
    pub(crate) fn open(&self) -> Open {
        self.open.clone()
    }

    /// Something refers to the object now.
    pub(crate) fn settle(mut self) {
        self.is_needed = true;
    }

    /// The error of a batch that found the object being removed meanwhile, as when its place took a day, or that its
    /// blob has moved: the caller may try again.
    pub(crate) fn overtaken(self) -> Error {
        Error::Busy { retry_after: REMOVED_RETRY }
    }
}

impl Drop for Put {
    fn drop(&mut self) {
        if self.is_needed {
            return;
        }
        let (app, object, kept) = (self.app.clone(), self.object, self.kept.take());
        let (bytes, is_there) = (self.open.bytes(), self.is_there);
        self.app.env.spawn(async move {
            let give_up = move |app: &App, batch: &mut _| {
                let due_ms = objects::give_up_due_ms(object.home, is_there, app.env.now_ms());
                Ok(objects::give_up(batch, object, bytes, due_ms)?)
            };
            if let Err(error) = write::for_server(&app, give_up, Error::from).await {
                tracing::info!(%error, digest = %object.digest, "what is left of a file is removed later");
            }
            // Its room is free once the object is about to go.
            drop(kept);
        });
    }
}

/// Puts the bytes of a file where they belong, unless they are there. The caller refers to the object next.
pub(crate) async fn put(app: &App, arrived: Arrived) -> Result<Put> {
    let owned = app.clone();
    // It goes on where nobody waits for it any more: what is given up before it is there would come after it was removed.
    app.to_the_end("keeping a file", async move { put_there(owned, arrived).await }).await
}

async fn put_there(app: App, arrived: Arrived) -> Result<Put> {
    let (digest, bytes) = (arrived.received.digest, arrived.received.bytes);
    let Arrived { received, ticket, kept } = arrived;
    let open = app.media.stores().open_received(&received).await?;
    let claim = move |app: &App, batch: &mut _| {
        let at = (app.env.now_ms(), app.media.stores().home());
        Ok(objects::claim(batch, &digest, bytes, at)?)
    };
    let object = write::for_server(&app, claim, Error::from).await?;
    let mut put = Put { app: app.clone(), object, open, kept: Some(kept), is_there: false, is_needed: false };
    // The part is thrown away with its ticket where it did not become the object.
    if app.media.stores().put(received, &put.open, object).await? {
        ticket.spend();
    }
    put.is_there = true;
    Ok(put)
}
