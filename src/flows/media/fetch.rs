//! Fetches files of other servers for users of this one, and keeps them.
//!
//! Specification: server-server API, "Content repository".

mod growing;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use federation::{
    call::{Failure, Lane, Options, Streamed},
    json::Limits,
    ports::Body,
};
use futures_util::{FutureExt, Stream, StreamExt, TryStreamExt, stream};
use http::{HeaderMap, Request, header};
use ruma::{OwnedServerName, ServerName, api::error::ErrorKind};

use self::growing::Entry;
pub(super) use self::growing::{AllGrowing, Growing, Next};
use crate::{
    env::payer::{self, Payers},
    error::{Error, Exception, Refusal, Result},
    flows::{
        App,
        lanes::{NoPlace, Pace},
        media::{
            keep,
            pauses::{Bounds, Pauses},
            receive::{self, NotReceived, Room},
        },
        write,
    },
    media::{
        Name,
        items::{self, Kept},
        kinds,
        multipart::{Head, Multipart, Step},
    },
    schema::media::ContentRow,
};

/// Finding another server and the beginning of its answer take at most this long, besides the time for which it waits for an upload.
const BEGINS: Duration = Duration::from_secs(30);
/// Those for whose fetch there is no place are told to try again after this time.
const AGAIN: Duration = Duration::from_secs(5);
/// Those for whose file this server has no room are told to try again after this time.
const NO_ROOM_RETRY: Duration = Duration::from_secs(60);
/// Another server is asked to wait at most this long for an upload, because the request holds one of the places of that server. Whoever
/// waits longer asks again.
const ASKED_MAX: Duration = Duration::from_secs(10);
/// A file takes at most this long to come, because somebody waits for it.
const OVERALL: Duration = Duration::from_secs(15 * 60);
/// A file that was not given is not asked for again for this long, and after each further failure for twice as long.
const FILES: Bounds =
    Bounds { first: Duration::from_secs(15), longest: Duration::from_secs(10 * 60), count_max: 10_000 };
/// A server that did not answer is asked for no file for this long, and after each further failure for twice as long.
const SERVERS: Bounds =
    Bounds { first: Duration::from_secs(10), longest: Duration::from_secs(5 * 60), count_max: 2_000 };

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

impl NotFetched {
    /// Whether another try now would fail in the same way, so that it is not made for a while. An upload may come at any time, and a
    /// server that is busy itself has learnt nothing of the other one.
    const fn is_lasting(&self) -> bool {
        match self {
            Self::Refused(refusal) => !matches!(refusal.kind, ErrorKind::NotYetUploaded),
            Self::Remote { .. } => true,
            Self::Busy { .. } | Self::Broken(_) => false,
        }
    }
}

/// The fetches that failed lately.
pub(super) struct Missed {
    files: Pauses<Name, NotFetched>,
    servers: Pauses<String, NotFetched>,
}

impl Default for Missed {
    fn default() -> Self {
        Self { files: Pauses::new(FILES), servers: Pauses::new(SERVERS) }
    }
}

impl Missed {
    /// The failure that stands for another fetch of a file now. None where it may be fetched.
    fn find(&self, name: &Name, now: Duration) -> Option<NotFetched> {
        self.files.find(name, now).or_else(|| self.servers.find(name.server.as_str(), now))
    }

    /// Notes the outcome of a fetch that began at a time.
    fn note(&self, name: &Name, outcome: Result<(), &NotFetched>, at: (Duration, Duration)) {
        match outcome {
            Ok(()) => self.files.succeed(name),
            Err(why) if why.is_lasting() => self.files.fail(name.clone(), why.clone(), at),
            Err(_) => {}
        }
    }

    /// Notes whether a server has answered to a request that began at a time.
    fn note_server(&self, server: &ServerName, failed: Option<&Failure>, at: (Duration, Duration)) {
        match failed {
            Some(why @ (Failure::NotFound(_) | Failure::Unreachable(_) | Failure::TimedOut)) => {
                let why = NotFetched::Remote { server: server.to_string(), cause: why.to_string() };
                self.servers.fail(server.to_string(), why, at);
            }
            None | Some(Failure::Refused { .. } | Failure::Nonsense(_)) => {
                self.servers.succeed(server.as_str());
            }
            // Nothing was sent, so that nothing is known.
            Some(Failure::NotAllowed { .. } | Failure::BadRequest(_) | Failure::Busy) => {}
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
    let waits = waits.min(ASKED_MAX);
    // It may be under way though nobody waits for it any more.
    if let Some(growing) = app.media.0.growing.find(name) {
        return Ok(growing.outcome().await?);
    }
    if let Some(why) = app.media.0.missed.find(name, app.env.uptime()) {
        tracing::debug!(uri = name.uri(), reason = "it failed a short time ago", "a file is not fetched");
        return Err(why.into());
    }
    let (owned, of, payers) = (app.clone(), name.clone(), payer::current());
    // It is a task of its own, so that it goes on where the client hangs up, and whoever asks next begins none beside it.
    let begin = move || {
        let app = owned.clone();
        let work = async move {
            let began = owned.env.uptime();
            let in_turn = fetch_in_turn(&owned, &of, waits, payers);
            let fetched = owned.stopping.run_until_cancelled(in_turn).await;
            let fetched = fetched.unwrap_or_else(|| Err(owned.broke_off("a fetch").into()));
            owned.media.0.missed.note(&of, fetched.as_ref().copied(), (began, owned.env.uptime()));
            Ok(fetched)
        };
        async move { app.to_the_end("a fetch", work).await? }.boxed()
    };
    Ok(app.media.0.waiting.run((name.clone(), payers.first()), begin).await?)
}

/// Fetches a file when it is these payers' turn. Those who wait for their turn wait for themselves, and a fetch that runs is shared by all:
/// whoever has many waiting must not hold up what others ask for once.
async fn fetch_in_turn(
    app: &App,
    name: &Name,
    waits: Duration,
    payers: Payers,
) -> std::result::Result<(), NotFetched> {
    let (owned, of) = (app.clone(), name.clone());
    let once = move || async move { fetch_once(&owned, &of, waits).await.map_err(NotFetched::from) }.boxed();
    let shared = app.media.0.fetching.run(name.clone(), once);
    match app.media.0.fetches.run(&app.env, (payers, Pace::Unknown), shared).await {
        Ok(fetched) => fetched,
        Err(NoPlace::Full | NoPlace::GaveWay) => Err(NotFetched::Busy { retry_after: AGAIN }),
    }
}

/// Fetches a file as [`fetch`] does, but does not wait for its end where that takes longer: then it answers the file as it is being
/// received. None for one that is kept. Errors: as of [`fetch`].
pub(super) async fn follow(app: &App, name: &Name, waits: Duration) -> Result<Option<Arc<Growing>>> {
    tokio::select! {
        biased;
        fetched = fetch(app, name, waits) => fetched.map(|()| None),
        growing = app.media.0.growing.begun(&app.env, name) => Ok(Some(growing)),
    }
}

async fn fetch_once(app: &App, name: &Name, waits: Duration) -> Result<()> {
    let server = OwnedServerName::try_from(name.server.as_str()).map_err(|_| items::no_such_item())?;
    // Somebody else may have had it fetched while this one waited for its turn.
    if items::find(&*app.store.snapshot(), name)?.is_some() {
        return Ok(());
    }
    let file = open(app, &server, name, waits).await?;
    let entry = Entry::new(&app.media, &app.env, name, (&file.head, file.bytes_announced));
    let taken = take_in(app, (&server, name), file, entry.growing()).await;
    let taken = taken.map_err(NotFetched::from);
    entry.growing().end(taken.clone());
    Ok(taken.map(drop)?)
}

/// Receives a file whose answer has begun, and keeps it.
async fn take_in(
    app: &App,
    (server, name): (&ServerName, &Name),
    file: File,
    growing: &Arc<Growing>,
) -> Result<ContentRow> {
    let bytes_max = app.config.media.remote_bytes_max.bytes();
    let given = Arc::clone(growing);
    let body = file.body.inspect_ok(move |piece| given.add(piece));
    let held = (None, Room::new(&app.media, None));
    let receiving = receive::receive(app, body, (bytes_max, file.bytes_announced), held);
    let arrived = tokio::select! {
        biased;
        arrived = receiving => arrived,
        () = app.env.sleep(OVERALL) => Err(NotReceived::TooSlow),
    };
    let arrived = arrived.map_err(|why| not_received(server, why))?;
    let content = ContentRow {
        digest: arrived.received.digest,
        bytes: arrived.received.bytes,
        content_type: growing.content_type.clone(),
        name: growing.name.clone(),
    };
    let put = keep::put(app, arrived).await.map_err(|error| match error {
        // Where our own bucket does not answer, that says nothing of the other server.
        Error::Remote { .. } => Error::Busy { retry_after: NO_ROOM_RETRY },
        error => error,
    })?;
    let (object, owned, row) = (put.object(), name.clone(), content.clone());
    let keep = move |app: &App, batch: &mut _| {
        let at = (app.env.now_ms(), app.config.media.unauthenticated);
        items::keep_other(batch, &owned, (row, object), at)
    };
    match write::for_server(app, keep, Error::from).await? {
        Kept::New => put.settle(),
        // Its server may have given other bytes this time, which nothing needs.
        Kept::Before => {}
        Kept::Overtaken => return Err(put.overtaken()),
    }
    // Those who were given it as it came must not take it for whole.
    let row = items::find(&*app.store.snapshot(), name)?;
    let content = row.as_ref().and_then(items::given).ok_or_else(items::no_such_item)?.clone();
    tracing::debug!(uri = name.uri(), "a file of another server is kept");
    Ok(content)
}

/// Asks a server for a file by today's endpoint, or by the one before where it does not know that.
async fn open(app: &App, server: &ServerName, name: &Name, waits: Duration) -> Result<File> {
    let (client, id) = (&app.remote.client, &name.id);
    let waits_ms = waits.as_millis();
    let path = format!("/_matrix/federation/v1/media/download/{id}?timeout_ms={waits_ms}");
    let failed = |why: Failure| not_given(server, &why);
    let began = app.env.uptime();
    let opened = client.open_signed(server, get(&path)?, options(waits)).await;
    app.media.0.missed.note_server(server, opened.as_ref().err(), (began, app.env.uptime()));
    match opened {
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
            Failure::Busy => Error::Busy { retry_after: AGAIN },
            Failure::NotAllowed { .. } => items::no_such_item().into(),
            other => remote(server, other.to_string()),
        };
    };
    match (status.as_u16(), errcode.as_deref()) {
        (_, Some("M_NOT_YET_UPLOADED")) => items::not_yet_uploaded().into(),
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
        // This server has no room for it now, which says nothing of the file.
        NotReceived::Failed(Error::Refused(_)) => Error::Busy { retry_after: NO_ROOM_RETRY },
        NotReceived::Failed(error) => error,
    }
}

fn too_large() -> Refusal {
    Refusal::too_large("The file is larger than this server takes from others.").exception(Exception::Remote)
}
