//! Fetches files of other servers for users of this one, and keeps them.
//!
//! Specification: server-server API, "Content repository".

use std::time::Duration;

use bytes::Bytes;
use federation::{
    call::{Failure, Lane, Options, Streamed},
    json::Limits,
    ports::Body,
};
use futures_util::{FutureExt, Stream, StreamExt, stream};
use http::{HeaderMap, Request, header};
use ruma::{OwnedServerName, ServerName, api::error::ErrorKind};

use crate::{
    error::{Error, Exception, Refusal, Result},
    flows::{
        App,
        media::{
            keep,
            receive::{self, NotReceived, Room},
        },
        write,
    },
    media::{
        Name, items, kinds,
        multipart::{Head, Multipart, Step},
    },
    schema::media::ContentRow,
};

/// Finding another server and the beginning of its answer take at most this long, besides the time for which it waits for an upload.
const BEGINS: Duration = Duration::from_secs(30);
/// A file takes at most this long to come, because somebody waits for it.
const OVERALL: Duration = Duration::from_secs(15 * 60);

/// A file that was not fetched, for all who wait for it.
#[derive(Clone, Debug)]
pub(super) enum NotFetched {
    /// Its server does not give it, or it is none that this server takes.
    Refused(Box<Refusal>),
    /// Its server did not answer, or not with a file.
    Remote { server: String, cause: String },
    /// There is no room for it now.
    Busy { retry_after: Duration },
    /// This server is at fault.
    Broken(String),
}

impl From<Error> for NotFetched {
    fn from(error: Error) -> Self {
        match error {
            Error::Refused(refusal) => Self::Refused(refusal),
            Error::Remote { server, cause } => Self::Remote { server, cause },
            Error::Busy { retry_after } => Self::Busy { retry_after },
            Error::Broken(cause) => Self::Broken(cause.to_string()),
        }
    }
}

impl From<NotFetched> for Error {
    fn from(why: NotFetched) -> Self {
        match why {
            NotFetched::Refused(refusal) => Self::Refused(refusal),
            NotFetched::Remote { server, cause } => Self::Remote { server, cause },
            NotFetched::Busy { retry_after } => Self::Busy { retry_after },
            NotFetched::Broken(cause) => Self::broken(cause),
        }
    }
}

/// A file of another server, as its answer begins.
struct File {
    head: Head,
    bytes_announced: Option<u64>,
    body: Pieces,
}

/// The bytes of a file, as they come.
type Pieces = std::pin::Pin<Box<dyn Stream<Item = std::result::Result<Bytes, String>> + Send>>;

/// Fetches a file and keeps it, once for all who ask at the same time. Errors: 404 `M_NOT_FOUND`, 504 `M_NOT_YET_UPLOADED`, 502
/// `M_TOO_LARGE` for one that is larger than the settings allow; [`Error::Remote`].
pub(super) async fn fetch(app: &App, name: &Name, waits: Duration) -> Result<()> {
    if !app.config.federation.enabled {
        return Err(items::no_such_item().into());
    }
    let (owned, of) = (app.clone(), name.clone());
    // It is a task of its own, so that it counts for one of those who wait, and not for whoever happens to drive it.
    let begin = move || {
        let app = owned.clone();
        let work = async move {
            let fetching = owned.stopping.run_until_cancelled(fetch_once(&owned, &of, waits));
            fetching.await.unwrap_or_else(|| Err(owned.broke_off("a fetch")))
        };
        async move { Ok(app.to_the_end("a fetch", work).await?) }.boxed()
    };
    Ok(app.media.0.fetching.run(name.clone(), begin).await?)
}

async fn fetch_once(app: &App, name: &Name, waits: Duration) -> Result<()> {
    let server = OwnedServerName::try_from(name.server.as_str()).map_err(|_| items::no_such_item())?;
    let held = (receive::enter(app)?, Room::new(&app.media, None));
    let file = open(app, &server, name, waits).await?;
    let bytes_max = app.config.media.remote_bytes_max.bytes();
    let receiving = receive::receive(app, file.body, (bytes_max, file.bytes_announced), held);
    let arrived = tokio::select! {
        biased;
        arrived = receiving => arrived,
        () = app.env.sleep(OVERALL) => Err(NotReceived::TooSlow),
    };
    let arrived = arrived.map_err(|why| not_received(&server, why))?;
    let content = ContentRow {
        digest: arrived.received.digest,
        bytes: arrived.received.bytes,
        content_type: kinds::kept_type(file.head.content_type.as_deref()),
        name: file.head.name,
    };
    let (object, kept) = keep::put(app, arrived).await?;
    let owned = name.clone();
    let keep = move |app: &App, batch: &mut _| {
        let at = (app.env.now_ms(), app.config.media.unauthenticated);
        items::keep_other(batch, &owned, (content, object), at)
    };
    let is_kept = write::for_server(app, keep, Error::from).await?;
    drop(kept);
    if !is_kept {
        return Err(keep::overtaken(app, object).await);
    }
    tracing::debug!(uri = name.uri(), "a file of another server is kept");
    Ok(())
}

/// Asks a server for a file by today's endpoint, or by the one before where it does not know that.
async fn open(app: &App, server: &ServerName, name: &Name, waits: Duration) -> Result<File> {
    let (client, id) = (&app.remote.client, &name.id);
    let waits_ms = waits.as_millis();
    let path = format!("/_matrix/federation/v1/media/download/{id}?timeout_ms={waits_ms}");
    let failed = |why: Failure| not_given(server, &why);
    match client.open_signed(server, get(&path)?, options(waits)).await {
        Ok(answer) => open_parts(app, server, answer).await,
        Err(Failure::Refused { status, errcode, .. })
            if status.as_u16() == 404 && errcode.as_deref() == Some("M_UNRECOGNIZED") =>
        {
            let path =
                format!("/_matrix/media/v3/download/{server}/{id}?allow_remote=false&timeout_ms={waits_ms}");
            let answer = client.caller().open(server, get(&path)?, options(waits)).await.map_err(failed)?;
            Ok(plain(answer))
        }
        Err(why) => Err(failed(why)),
    }
}

fn options(waits: Duration) -> Options {
    let begins = BEGINS + waits;
    Options { begins, overall: begins * 2, limits: Limits::DOCUMENT, lane: Lane::Media }
}

fn get(path: &str) -> Result<Request<Bytes>> {
    Request::get(path)
        .body(Bytes::new())
        .map_err(|error| Error::broken(format!("a request for a file cannot be made: {error}")))
}

/// The file of an answer that is nothing but the file.
fn plain(answer: Streamed) -> File {
    let text = |name| field(&answer.headers, name);
    let disposition = answer.headers.get(header::CONTENT_DISPOSITION);
    let head = Head {
        content_type: text(header::CONTENT_TYPE),
        name: disposition.and_then(|value| kinds::name_in(value.as_bytes())),
        location: None,
    };
    let bytes_announced = text(header::CONTENT_LENGTH).and_then(|length| length.parse().ok());
    let body = answer.body.map(|piece| piece.map_err(|error| error.to_string())).boxed();
    File { head, bytes_announced, body }
}

fn field(fields: &HeaderMap, name: http::HeaderName) -> Option<String> {
    fields.get(name)?.to_str().ok().map(str::to_owned)
}

/// The file of an answer in parts, or of the place that it names.
async fn open_parts(app: &App, server: &ServerName, answer: Streamed) -> Result<File> {
    let content_type = field(&answer.headers, header::CONTENT_TYPE).unwrap_or_default();
    let wrong = |why: &dyn std::fmt::Display| remote(server, why.to_string());
    let mut reader = Multipart::of(&content_type).map_err(|why| wrong(&why))?;
    let mut body = answer.body;
    let reading = async {
        loop {
            match reader.step().map_err(|why| wrong(&why))? {
                Step::Head(head) => return Ok(head),
                Step::More => match body.next().await {
                    Some(Ok(piece)) => reader.feed(&piece),
                    Some(Err(error)) => return Err(wrong(&error)),
                    None => return Err(wrong(&"the answer ends before the file begins")),
                },
                Step::Data(_) | Step::End => return Err(wrong(&"the answer has no file")),
            }
        }
    };
    let head = tokio::select! {
        biased;
        head = reading => head?,
        () = app.env.sleep(BEGINS) => return Err(wrong(&"the file does not begin")),
    };
    if let Some(location) = head.location {
        // Where the file is given from elsewhere, nobody there is told who asks.
        drop(body);
        let opened = app.remote.client.caller().open_url(&location, options(Duration::ZERO)).await;
        return Ok(plain(opened.map_err(|why| not_given(server, &why))?));
    }
    Ok(File { head, bytes_announced: None, body: pieces(reader, body).boxed() })
}

/// The bytes of the file in an answer whose head was read.
fn pieces(reader: Multipart, body: Body) -> impl Stream<Item = std::result::Result<Bytes, String>> + Send {
    stream::try_unfold((reader, body), |(mut reader, mut body)| async move {
        loop {
            match reader.step().map_err(|why| why.to_string())? {
                Step::Data(bytes) => return Ok(Some((bytes, (reader, body)))),
                Step::End => return Ok(None),
                Step::Head(_) => return Err("the answer has more than one file".to_owned()),
                Step::More => match body.next().await {
                    Some(Ok(piece)) => reader.feed(&piece),
                    Some(Err(error)) => return Err(error.to_string()),
                    None => return Err("the answer ends before the file does".to_owned()),
                },
            }
        }
    })
}

fn remote(server: &ServerName, cause: String) -> Error {
    Error::Remote { server: server.to_string(), cause }
}

/// The error for a file that its server does not give.
fn not_given(server: &ServerName, why: &Failure) -> Error {
    let Failure::Refused { status, errcode, .. } = why else {
        return match why {
            Failure::Busy => Error::Busy { retry_after: Duration::from_secs(5) },
            Failure::NotAllowed { .. } => items::no_such_item().into(),
            other => remote(server, other.to_string()),
        };
    };
    match (status.as_u16(), errcode.as_deref()) {
        (_, Some("M_NOT_YET_UPLOADED")) => {
            Refusal::new(ErrorKind::NotYetUploaded, "Nothing was uploaded to this URI yet.").into()
        }
        (_, Some("M_TOO_LARGE")) => too_large().into(),
        (404, _) => items::no_such_item().into(),
        _ => remote(server, why.to_string()),
    }
}

fn not_received(server: &ServerName, why: NotReceived) -> Error {
    match why {
        NotReceived::TooLarge => too_large().into(),
        NotReceived::TooSlow => remote(server, "the file comes too slowly".to_owned()),
        NotReceived::BrokeOff(why) => remote(server, format!("the file breaks off: {why}")),
        NotReceived::Failed(error) => error,
    }
}

fn too_large() -> Refusal {
    Refusal::too_large("The file is larger than this server takes from others.").exception(Exception::Remote)
}
