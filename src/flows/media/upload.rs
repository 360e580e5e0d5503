//! Uploads of users of this server, at once or to a URI that they made before.
//!
//! Specification: client-server API, "Content repository", `POST /upload`, `POST /create` and `PUT /upload`.

use bytes::Bytes;
use futures_util::Stream;
use ruma::api::error::ErrorKind;

use crate::{
    accounts::Caller,
    env::Long,
    error::{Error, Exception, Refusal, Result},
    flows::{
        App,
        media::{
            compress, keep,
            receive::{self, Arrived, NotReceived, Room},
            stores::Open,
        },
        write,
    },
    media::{Name, items, kinds, thumbnails},
    schema::media::ContentRow,
};

/// A media id that is made here has this many characters, each a letter or a digit: nobody guesses it.
const ID_CHARS: usize = 32;
const HOUR_MS: u64 = 60 * 60 * 1000;

/// The description of a file that is uploaded.
pub(crate) struct Wish {
    /// The content type, as the client says.
    pub(crate) content_type: Option<String>,
    /// The name of the file, as the client says.
    pub(crate) file_name: Option<String>,
    /// The number of its bytes, as the client says.
    pub(crate) announced: Option<u64>,
    /// The client asks for the BlurHash of the image, if it is one (MSC2448).
    pub(crate) wants_blurhash: bool,
}

/// Uploads a file under a new URI. Answers its BlurHash, too, if that was asked for and there can be one. Errors: 413 `M_TOO_LARGE`, 403
/// `M_FORBIDDEN` beyond a quota, 400 `M_INVALID_PARAM`, 408 for a client that is too slow, 429 where too many files are under way.
pub(crate) async fn upload<E: std::fmt::Display>(
    app: &App,
    caller: &Caller,
    wish: Wish,
    body: impl Stream<Item = Result<Bytes, E>> + Unpin,
) -> Result<(Name, Option<String>)> {
    let name = new_name(app);
    let blurhash = take(app, caller, &name, false, wish, body).await?;
    Ok((name, blurhash))
}

/// Uploads a file to a URI that the caller made before. Answers as [`upload`] does. Errors: as there, and of [`items::require_created`].
pub(crate) async fn upload_to<E: std::fmt::Display>(
    app: &App,
    caller: &Caller,
    (server, id): (&str, &str),
    wish: Wish,
    body: impl Stream<Item = Result<Bytes, E>> + Unpin,
) -> Result<Option<String>> {
    let own = app.config.server.name.as_str();
    let name = Name::of(server, id).filter(|name| name.server == own).ok_or_else(items::no_such_item)?;
    let snapshot = app.store.snapshot();
    items::require_created(&*snapshot, caller.user, &name, app.env.now_ms())?;
    take(app, caller, &name, true, wish, body).await
}

/// Makes a URI to which its maker uploads something later. Answers when it expires, in milliseconds since the epoch. Errors: 429
/// `M_LIMIT_EXCEEDED` where the user has too many.
pub(crate) async fn create(app: &App, caller: &Caller) -> Result<(Name, u64)> {
    let (name, now_ms) = (new_name(app), app.env.now_ms());
    let hours = u64::from(app.config.media.pending_upload_hours);
    let expires_ms = now_ms.saturating_add(hours.saturating_mul(HOUR_MS));
    let (user, made) = (caller.user, name.clone());
    write::for_caller_and_users_and_server(app, caller, Vec::new(), move |app, batch| {
        items::create(batch, user, &made, (now_ms, expires_ms), app.media.bounds())
    })
    .await?;
    Ok((name, expires_ms))
}

fn new_name(app: &App) -> Name {
    Name { server: app.config.server.name.to_string(), id: app.env.random_string(ID_CHARS) }
}

async fn take<E: std::fmt::Display>(
    app: &App,
    caller: &Caller,
    name: &Name,
    is_created: bool,
    wish: Wish,
    body: impl Stream<Item = Result<Bytes, E>> + Unpin,
) -> Result<Option<String>> {
    let content_type = kinds::kept_type(wish.content_type.as_deref());
    let file_name = kinds::kept_name(wish.file_name)?;
    let bytes_max = app.config.media.upload_bytes_max.bytes();
    let room = Room::new(&app.media, Some(caller.user));
    let held = (Some(receive::enter(app)?), room);
    let arrived = receive::receive(app, body, (bytes_max, wish.announced), held).await;
    let arrived = arrived.map_err(|why| refused(why, bytes_max))?;
    let content = ContentRow {
        digest: arrived.received.digest,
        bytes: arrived.received.bytes,
        content_type,
        name: file_name,
    };
    let wants_blurhash = wish.wants_blurhash;
    let (owned, caller, name) = (app.clone(), caller.clone(), name.clone());
    // It goes on where the client hangs up, so that those who wait for what is kept are told of it.
    let keeping = async move {
        let open = keep(&owned, &caller, (&name, is_created), content, arrived).await?;
        Ok(if wants_blurhash { blurhash(&owned, &open).await } else { None })
    };
    app.to_the_end("an upload", keeping).await
}

/// Keeps a file that has arrived. Answers its bytes, as a file of this machine.
async fn keep(
    app: &App,
    caller: &Caller,
    (name, is_created): (&Name, bool),
    content: ContentRow,
    arrived: Arrived,
) -> Result<Open> {
    let put = keep::put(app, arrived).await?;
    let (content, put, uploaded) = match compress::make(app, &content, &put.open()).await? {
        Some((smaller, smaller_put)) => (smaller, smaller_put, Some((content, put))),
        None => (content, put, None),
    };
    let (object, open, original) =
        (put.object(), put.open(), uploaded.as_ref().map(|(content, put)| (content.clone(), put.object())));
    let (user, owned) = (caller.user, name.clone());
    let kept = write::for_caller_and_users_and_server(app, caller, Vec::new(), move |app, batch| {
        let now_ms = app.env.now_ms();
        let created = match is_created {
            // Somebody else may have uploaded to it meanwhile.
            true => Some(items::require_created(batch, user, &owned, now_ms)?),
            false => None,
        };
        let (at, bounds) = ((now_ms, app.config.media.unauthenticated), app.media.bounds());
        let is_kept = items::keep_own(batch, user, (&owned, created), (content, object), at, bounds)?;
        let is_original_kept =
            match original.filter(|_| is_kept && app.config.media.compression.keep_original) {
                Some(original) => items::keep_original(batch, user, &owned, original, bounds)?,
                None => false,
            };
        Ok((is_kept, is_original_kept))
    })
    .await?;
    let (is_kept, is_original_kept) = kept;
    if !is_kept {
        return Err(put.overtaken());
    }
    put.settle();
    if let Some((_, put)) = uploaded.filter(|_| is_original_kept) {
        put.settle();
    }
    tracing::debug!(%user, id = name.id, "media is uploaded");
    if is_created {
        app.media.0.awaited.notify(name);
    }
    Ok(open)
}

/// The BlurHash of what was uploaded. None for what is no image, or one that it takes too much to look at. The upload has succeeded by
/// now, so that nothing fails here.
async fn blurhash(app: &App, open: &Open) -> Option<String> {
    let pixels_max = app.config.media.thumbnail_pixels_max;
    let hashed = async {
        let local = app.media.stores().local(open).await?.ok_or_else(items::no_such_item)?;
        let hash = move || {
            let object = local.object().ok_or_else(items::no_such_item)?;
            Ok(thumbnails::blurhash(object, pixels_max))
        };
        app.env.blocking_long(Long::Thumbnail, hash).await
    };
    match hashed.await {
        Ok(hash) => hash.ok(),
        Err(error) => {
            tracing::debug!(%error, "an upload is answered without its BlurHash");
            None
        }
    }
}

fn refused(why: NotReceived, bytes_max: u64) -> Error {
    match why {
        NotReceived::TooLarge => {
            tracing::debug!(bytes_max, reason = "the upload is too large", "refused");
            Refusal::too_large(format!(
                "The file is larger than {bytes_max} bytes, the most that this server takes."
            ))
            .into()
        }
        NotReceived::TooSlow => Refusal::new(ErrorKind::Unknown, "The file did not arrive in time.")
            .exception(Exception::TimedOut)
            .into(),
        NotReceived::BrokeOff(why) => {
            Refusal::new(ErrorKind::Unknown, format!("The file did not arrive whole: {why}.")).into()
        }
        NotReceived::Failed(error) => error,
    }
}
