//! Uploads of users of this server, at once or to a URI that they made before.
//!
//! Specification: client-server API, "Content repository", `POST /upload`, `POST /create` and `PUT /upload`.

use bytes::Bytes;
use futures_util::Stream;
use ruma::api::error::ErrorKind;

use crate::{
    accounts::Caller,
    error::{Error, Exception, Refusal, Result},
    flows::{
        App,
        media::{
            keep,
            receive::{self, NotReceived, Room},
        },
        write,
    },
    media::{Name, items, kinds},
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
}

/// Uploads a file under a new URI. Errors: 413 `M_TOO_LARGE`, 403 `M_FORBIDDEN` beyond a quota, 400 `M_INVALID_PARAM`, 408 for a client
/// that is too slow, 429 where too many files are under way.
pub(crate) async fn upload<E: std::fmt::Display>(
    app: &App,
    caller: &Caller,
    wish: Wish,
    body: impl Stream<Item = Result<Bytes, E>> + Unpin,
) -> Result<Name> {
    let name = new_name(app);
    take(app, caller, &name, false, wish, body).await?;
    Ok(name)
}

/// Uploads a file to a URI that the caller made before. Errors: as of [`upload`] and [`items::require_created`].
pub(crate) async fn upload_to<E: std::fmt::Display>(
    app: &App,
    caller: &Caller,
    (server, id): (&str, &str),
    wish: Wish,
    body: impl Stream<Item = Result<Bytes, E>> + Unpin,
) -> Result<()> {
    let own = app.config.server.name.as_str();
    let name = Name::of(server, id).filter(|name| name.server == own).ok_or_else(items::no_such_item)?;
    let snapshot = app.store.snapshot();
    items::require_created(&*snapshot, caller.user, &name, app.env.now_ms())?;
    take(app, caller, &name, true, wish, body).await?;
    app.media.0.uploaded.notify_waiters();
    Ok(())
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
) -> Result<()> {
    let content_type = kinds::kept_type(wish.content_type.as_deref());
    let file_name = kinds::kept_name(wish.file_name)?;
    let bytes_max = app.config.media.upload_bytes_max.bytes();
    let room = Room::new(&app.media, Some(caller.user));
    let held = (receive::enter(app)?, room);
    let arrived = receive::receive(app, body, (bytes_max, wish.announced), held).await;
    let arrived = arrived.map_err(|why| refused(why, bytes_max))?;
    let content = ContentRow {
        digest: arrived.received.digest,
        bytes: arrived.received.bytes,
        content_type,
        name: file_name,
    };
    let (object, kept) = keep::put(app, arrived).await?;
    let (user, owned) = (caller.user, name.clone());
    let is_kept = write::for_caller_and_users_and_server(app, caller, Vec::new(), move |app, batch| {
        let now_ms = app.env.now_ms();
        let created = match is_created {
            // Somebody else may have uploaded to it meanwhile.
            true => Some(items::require_created(batch, user, &owned, now_ms)?),
            false => None,
        };
        let (at, bounds) = ((now_ms, app.config.media.unauthenticated), app.media.bounds());
        items::keep_own(batch, user, (&owned, created), (content, object), at, bounds)
    })
    .await?;
    drop(kept);
    if !is_kept {
        return Err(keep::overtaken(app, object).await);
    }
    tracing::debug!(%user, id = name.id, "media is uploaded");
    Ok(())
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
