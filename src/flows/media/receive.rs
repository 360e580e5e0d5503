//! Receives a file into a part of the media directory, within its bounds. A piece of it is in memory at a time.
//!
//! A file that is arriving counts for the quotas as it grows, so that nobody gets beyond them by sending many files at once. Whoever sends
//! too slowly is given up, as bodies in memory are (`api/receive.rs`).

use std::{mem, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};

use crate::{
    env::Long,
    error::{Error, Refusal, Result},
    flows::{
        App,
        media::{Media, tend},
        places::Place,
        write,
    },
    ids::UserNum,
    media::{
        blobs::{Part, Received},
        items, objects,
    },
};

/// Bytes are written to the disk in pieces of at least this many, so that a call off the async threads is worth it.
const PIECE_BYTES: usize = 256 << 10;
/// Room is reserved in steps of this many bytes.
const STEP_BYTES: u64 = 1 << 20;
/// Two pieces of a file may be at most this far apart.
const PAUSE_MAX: Duration = Duration::from_secs(15);
/// A file may arrive at any speed for this long.
const GRACE: Duration = Duration::from_secs(20);
/// After the grace, a file must have this many bytes for each millisecond since, which is 8 KiB a second.
const BYTES_PER_MS_MIN: u64 = 8;
/// A caller who finds no place for a file is told to try again after this time.
const NO_PLACE_RETRY: Duration = Duration::from_secs(5);
/// The name of a part has this many characters.
const PART_CHARS: usize = 24;

/// A file that did not arrive.
#[derive(Debug)]
pub(crate) enum NotReceived {
    /// It has more bytes than it may have.
    TooLarge,
    /// It came too slowly, or did not go on.
    TooSlow,
    /// It broke off, for a reason that its sender's connection has.
    BrokeOff(String),
    /// The server could not take it, or has no room for it.
    Failed(Error),
}

impl From<Error> for NotReceived {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Room for a file that is arriving, among those of its user and of the server. It is given back when this is dropped.
pub(crate) struct Room {
    media: Media,
    user: Option<UserNum>,
    /// The bytes that count for the user: what is announced counts at once.
    of_user: u64,
    /// The bytes that count for the server, which counts what has come: an announcement costs nothing, and must not keep others out.
    of_server: u64,
}

impl Room {
    /// No room yet, for a file of a user or of another server.
    pub(crate) fn new(media: &Media, user: Option<UserNum>) -> Self {
        Self { media: media.clone(), user, of_user: 0, of_server: 0 }
    }

    /// Begins to make room for a file of so many bytes, as it is announced. Errors: as of [`Self::grow`].
    fn announce(&mut self, app: &App, bytes: u64) -> Result<()> {
        self.make(app, (bytes, 0), bytes)
    }

    /// Makes room for so many bytes, which have come. Errors: 403 `M_FORBIDDEN` where the user or the server has too much with them.
    fn grow(&mut self, app: &App, bytes: u64) -> Result<()> {
        self.make(app, (bytes, bytes), bytes)
    }

    fn make(&mut self, app: &App, (of_user, of_server): (u64, u64), whole: u64) -> Result<()> {
        let more_of_user = of_user.saturating_sub(self.of_user);
        let more_of_server = of_server.saturating_sub(self.of_server);
        // Whatever was kept by now is seen, and gives its room back after that.
        let _lock = self.user.map(|user| write::lock_user(app, user));
        let mut reserved = self.media.0.reserved.lock();
        let view = app.store.view();
        if let Some(user) = self.user {
            let pending = reserved.by_user.get(&user).copied().unwrap_or_default();
            let used = items::used(&view, user)?.bytes.saturating_add(pending);
            items::require_room(used, more_of_user, self.media.bounds())?;
        }
        let bytes_max = self.media.0.server_bytes_max;
        if bytes_max > 0 {
            let all = objects::total(&view)?.bytes.saturating_add(reserved.all);
            let more = whole.saturating_sub(self.of_server);
            if all.saturating_add(more) > bytes_max {
                tracing::warn!(bytes = more, reason = "quota of the server", "a file is refused");
                return Err(Refusal::forbidden("This server has no room for more media.").into());
            }
        }
        if let Some(user) = self.user {
            let pending = reserved.by_user.entry(user).or_default();
            *pending = pending.saturating_add(more_of_user);
        }
        reserved.all = reserved.all.saturating_add(more_of_server);
        self.of_user = self.of_user.saturating_add(more_of_user);
        self.of_server = self.of_server.saturating_add(more_of_server);
        Ok(())
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut reserved = self.media.0.reserved.lock();
        reserved.all = reserved.all.saturating_sub(self.of_server);
        if let Some(user) = self.user
            && let Some(pending) = reserved.by_user.get_mut(&user)
        {
            *pending = pending.saturating_sub(self.of_user);
            if *pending == 0 {
                reserved.by_user.remove(&user);
            }
        }
    }
}

/// The part that a file is received into. It is thrown away when this is dropped, unless it was put where it belongs.
pub(crate) struct Ticket {
    app: App,
    part: String,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let (app, part) = (self.app.clone(), mem::take(&mut self.part));
        if part.is_empty() {
            return;
        }
        self.app.env.spawn(async move {
            let blobs = app.media.blobs().clone();
            let discarded = app.env.blocking_long(Long::Media, move || Ok(blobs.discard(&part)?)).await;
            if let Err(error) = discarded {
                tracing::info!(%error, "what is left of an upload is thrown away later");
            }
        });
    }
}

impl Ticket {
    /// The part was put where it belongs, so that nothing is left to throw away.
    pub(crate) fn spend(mut self) {
        self.part.clear();
    }
}

/// A file that has arrived whole and is safe on the disk.
pub(crate) struct Arrived {
    /// The bytes that have arrived.
    pub(crate) received: Received,
    /// The part that holds them.
    pub(crate) ticket: Ticket,
    /// The room that they take until they are kept.
    pub(crate) kept: Kept,
}

/// The room and the place of a file until it is kept.
pub(crate) struct Kept {
    _room: Room,
    /// None for a file that has a place of another kind, or is made here.
    _place: Option<Place>,
}

/// Takes a place for a file that a user is about to upload. Errors: [`Error::Busy`] where its user has too many under way, or all have.
pub(crate) fn enter(app: &App) -> Result<Place> {
    app.media.0.uploading.enter().ok_or_else(|| {
        tracing::debug!(reason = "too many uploads are under way", "an upload is refused");
        Error::Busy { retry_after: NO_PLACE_RETRY }
    })
}

/// Receives a file of at most so many bytes. `announced` is its length, if its sender has said one. It has a place where it is an upload;
/// whatever else arrives has places of its own kind.
pub(crate) async fn receive<E: std::fmt::Display>(
    app: &App,
    mut body: impl Stream<Item = Result<Bytes, E>> + Unpin,
    (bytes_max, announced): (u64, Option<u64>),
    (place, mut room): (Option<Place>, Room),
) -> Result<Arrived, NotReceived> {
    if announced.is_some_and(|announced| announced > bytes_max) {
        return Err(NotReceived::TooLarge);
    }
    let name = app.env.random_string(PART_CHARS);
    let ticket = Ticket { app: app.clone(), part: name.clone() };
    let owned = app.clone();
    let begin = move || {
        tend::begin(&owned)?;
        room.announce(&owned, announced.unwrap_or_default())?;
        let part = owned.media.blobs().begin(&name)?;
        Ok((part, room))
    };
    let (mut part, mut room) = app.env.blocking_long(Long::Media, begin).await?;
    let began = app.env.instant();
    let (mut bytes, mut working) = (0_u64, Duration::ZERO);
    let mut piece = BytesMut::new();
    loop {
        let took = app.env.instant().saturating_duration_since(began).saturating_sub(working);
        let earned = Duration::from_millis(bytes / BYTES_PER_MS_MIN);
        let next = tokio::select! {
            biased;
            next = body.next() => next,
            () = app.env.sleep((GRACE + earned).saturating_sub(took).min(PAUSE_MAX)) => {
                return Err(NotReceived::TooSlow);
            }
        };
        let is_last = next.is_none();
        if let Some(data) = next {
            let data = data.map_err(|why| NotReceived::BrokeOff(why.to_string()))?;
            bytes = bytes.saturating_add(data.len() as u64);
            if bytes > bytes_max {
                return Err(NotReceived::TooLarge);
            }
            piece.extend_from_slice(&data);
        }
        if piece.len() >= PIECE_BYTES || (is_last && !piece.is_empty()) {
            let since = app.env.instant();
            (part, room, piece) = write_piece(app, part, room, piece, bytes).await?;
            // Time in which the disk was slow is not the sender's fault.
            working += app.env.instant().saturating_duration_since(since);
        }
        if is_last {
            break;
        }
    }
    if announced.is_some_and(|announced| announced != bytes) {
        return Err(NotReceived::BrokeOff("it has another length than was announced".to_owned()));
    }
    let received = app.env.blocking_long(Long::Media, move || Ok(part.finish()?)).await?;
    Ok(Arrived { received, ticket, kept: Kept { _room: room, _place: place } })
}

/// Takes a file that was made here of one that has arrived and holds a place.
pub(crate) async fn take_made(app: &App, bytes: Vec<u8>) -> Result<Arrived> {
    let name = app.env.random_string(PART_CHARS);
    let ticket = Ticket { app: app.clone(), part: name.clone() };
    let (owned, mut room) = (app.clone(), Room::new(&app.media, None));
    let take = move || {
        room.grow(&owned, bytes.len() as u64)?;
        let mut part = owned.media.blobs().begin(&name)?;
        part.write(&bytes)?;
        Ok((part.finish()?, room))
    };
    let (received, room) = app.env.blocking_long(Long::Media, take).await?;
    Ok(Arrived { received, ticket, kept: Kept { _room: room, _place: None } })
}

async fn write_piece(
    app: &App,
    mut part: Part,
    mut room: Room,
    mut piece: BytesMut,
    bytes: u64,
) -> Result<(Part, Room, BytesMut)> {
    let owned = app.clone();
    let write = move || {
        if bytes > room.of_server {
            room.grow(&owned, bytes.next_multiple_of(STEP_BYTES)).or_else(|_| room.grow(&owned, bytes))?;
        }
        part.write(&piece)?;
        piece.clear();
        Ok((part, room, piece))
    };
    app.env.blocking_long(Long::Media, write).await
}
