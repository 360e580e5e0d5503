//! The requests to server-side backups of room keys that write, and the listing of a backup in pieces.

use std::sync::Arc;

use bytes::Bytes;

use crate::{
    accounts::{Caller, tokens},
    encryption::backup::{self, Upload, Which},
    error::Result,
    flows::{
        App,
        limits::{Limit, Source},
        write,
    },
    json::{JsonRef, JsonText, Object, Pieces},
    schema::backup::{BackedUpKey, BackupRow, BackupState},
    store::Read,
};

/// An upload counts as one act for each of this many keys.
const KEYS_AN_ACT: usize = 100;
/// A piece of a listing ends once it has this many bytes.
const PIECE_BYTES: usize = 256 << 10;

/// The incarnation of the store, in whose range new numbers lie.
fn incarnation(app: &App) -> u64 {
    app.store.snapshot().upto().incarnation()
}

/// `POST /room_keys/version`: makes a version, and answers its number.
pub(crate) async fn create(app: &App, caller: &Caller, row: BackupRow) -> Result<u64> {
    let user = caller.user;
    write::for_caller(app, caller, move |app, batch| backup::create(batch, user, row, incarnation(app))).await
}

/// `PUT /room_keys/version/{version}`: changes the data of a version.
pub(crate) async fn update(app: &App, caller: &Caller, version: String, row: BackupRow) -> Result<()> {
    let user = caller.user;
    write::for_caller(app, caller, move |_, batch| backup::update(batch, user, &version, row)).await
}

/// `DELETE /room_keys/version/{version}`: deletes a version with its keys.
pub(crate) async fn delete(app: &App, caller: &Caller, version: String) -> Result<()> {
    let user = caller.user;
    write::for_caller(app, caller, move |_, batch| backup::delete(batch, user, &version)).await
}

/// `PUT /room_keys/keys` and those below it: stores keys, and answers how much the version holds then.
///
/// Many keys are several batches, each of which leaves the backup whole. An upload that breaks off has stored some of its keys, and when
/// it comes again, these are passed over.
pub(crate) async fn put_keys(
    app: &App,
    caller: &Caller,
    version: String,
    uploads: Vec<Upload>,
) -> Result<BackupState> {
    // The route has counted one act already.
    let acts = uploads.len() / KEYS_AN_ACT;
    app.limits.take_more(Limit::Other, Source::User(caller.user), acts)?;
    let (user, uploads, version) = (caller.user, Arc::new(uploads), Arc::new(version));
    let mut stored = 0;
    loop {
        let (all, version) = (Arc::clone(&uploads), Arc::clone(&version));
        let put = write::for_caller(app, caller, move |app, batch| {
            let version = backup::require_current(batch, user, &version)?;
            let left = all.get(stored..).unwrap_or_default();
            let count = backup::put_some(batch, user, version, left, incarnation(app))?;
            Ok((count, backup::state(batch, user, version)?))
        });
        let (count, state) = put.await?;
        stored += count;
        if stored >= uploads.len() {
            return Ok(state);
        }
    }
}

/// `DELETE /room_keys/keys` and those below it: deletes keys, and answers how much the version holds then.
pub(crate) async fn delete_keys(
    app: &App,
    caller: &Caller,
    version: String,
    which: Which,
) -> Result<BackupState> {
    let user = caller.user;
    write::for_caller(app, caller, move |app, batch| {
        let version = backup::require(batch, user, &version)?;
        Ok(backup::delete_keys(batch, user, version, &which, incarnation(app))?)
    })
    .await
}

/// A key as clients are shown it.
pub(crate) fn show(key: &BackedUpKey) -> JsonText {
    let mut shown = Object::with_capacity(key.session_data.len() + 96);
    shown.number("first_message_index", key.first_message_index);
    shown.number("forwarded_count", key.forwarded_count);
    shown.flag("is_verified", key.is_verified);
    shown.json("session_data", JsonRef::stored(&key.session_data));
    shown.finish()
}

/// The keys of a version or of one of its rooms, as far as they are still to be written.
pub(crate) struct Listing {
    app: App,
    caller: Caller,
    version: String,
    /// The room whose keys alone are listed.
    only: Option<String>,
    /// The room and the session of the key that was written last.
    after: Option<(String, String)>,
    pieces: Pieces,
}

/// Begins to list the keys of a version, or those of one room: the first piece, and the listing for the rest, if there is more.
/// Errors: 404 for a version that there is not.
pub(crate) async fn list(
    app: &App,
    caller: &Caller,
    version: String,
    only: Option<String>,
) -> Result<(Bytes, Option<Box<Listing>>)> {
    let mut pieces = Pieces::object();
    pieces.open_object(if only.is_some() { "sessions" } else { "rooms" });
    let listing =
        Box::new(Listing { app: app.clone(), caller: caller.clone(), version, only, after: None, pieces });
    listing.next().await
}

impl Listing {
    /// Writes the next piece, off the async threads, and answers the listing for the rest, if there is more. A version that was deleted
    /// meanwhile is an error, so that its client does not take a part for the whole, and so is a device that was logged out.
    pub(crate) async fn next(self: Box<Self>) -> Result<(Bytes, Option<Box<Self>>)> {
        let env = self.app.env.clone();
        env.blocking(move || self.write_piece()).await
    }

    fn write_piece(mut self: Box<Self>) -> Result<(Bytes, Option<Box<Self>>)> {
        let snapshot = self.app.store.snapshot();
        tokens::require_session(&*snapshot, &self.caller)?;
        let user = self.caller.user;
        let version = backup::require(&*snapshot, user, &self.version)?;
        let after = self.after.take();
        let begin = after.as_ref().map(|(room, session)| (room.as_str(), session.as_str()));
        let only = self.only.as_deref();
        let page = backup::list_keys(&*snapshot, user, version, only, begin, PIECE_BYTES)?;
        let mut last = after;
        for Upload { room, session, key } in page.keys {
            if self.only.is_none() && last.as_ref().map(|(room, _)| room) != Some(&room) {
                if last.is_some() {
                    // The sessions of the room before, and that room.
                    self.pieces.close();
                    self.pieces.close();
                }
                self.pieces.open_object(&room);
                self.pieces.open_object("sessions");
            }
            self.pieces.field(&session, &show(&key));
            last = Some((room, session));
        }
        if page.has_more {
            self.after = last;
            let piece = self.pieces.take();
            return Ok((piece, Some(self)));
        }
        Ok((self.pieces.finish(), None))
    }
}
