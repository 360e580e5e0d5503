//! Asking for pages of the web, in the same words for everybody, and following where they lead.
//!
//! A request says which program asks and in which languages the operator wants pages, and nothing of the user: no cookie, no address of
//! the page where the link was found, no language of theirs. The body is asked for as it is, because what is packed small may be
//! anything unpacked.

use std::{fmt, time::Duration};

use bytes::{Bytes, BytesMut};
use federation::{ports::Body, web::NotAsked};
use futures_util::StreamExt;
use http::{HeaderMap, HeaderValue, Response, header};
use url::Url;

use crate::{
    env::Env,
    flows::App,
    media::preview::{address, oembed},
};

/// Redirects that are followed; more is a loop, or somebody who wants us to work.
const REDIRECTS_MAX: usize = 5;
/// An answer begins within this time, connecting included.
const BEGINS: Duration = Duration::from_secs(10);
/// All redirects together take at most this long, up to the beginning of the last answer.
const FOUND_WITHIN: Duration = Duration::from_secs(15);
/// This much of a page is read: what it says about itself comes first.
const PAGE_BYTES_MAX: usize = 1_024 * 1_024;
/// A page is read for this long, and then what has come of it counts.
const PAGE_READ_FOR: Duration = Duration::from_secs(10);

/// The program that asks. Sites that show robots what a page is about look for the word.
const AGENT: &str = concat!("Aqueduct/", env!("CARGO_PKG_VERSION"), " (bot; +https://matrix.org/)");
/// The kinds of pages of which a preview can be made.
pub(super) const PAGES: &str = "text/html,application/xhtml+xml,image/*;q=0.9,*/*;q=0.1";
/// The kinds of images that are shown.
pub(super) const IMAGES: &str = "image/webp,image/png,image/jpeg,image/gif,image/*;q=0.8,*/*;q=0.1";
/// Descriptions beside a page.
const DESCRIPTIONS: &str = "application/json,*/*;q=0.1";

/// A page that gives nothing of which a preview could be made. The reason is for the log alone.
#[derive(Debug)]
pub(super) enum NotFetched {
    NotAsked(NotAsked),
    TooSlow,
    TooManyRedirects,
    BadRedirect,
    NotAllowed,
    Status(u16),
    Packed,
}

impl fmt::Display for NotFetched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAsked(why) => write!(f, "{why}"),
            Self::TooSlow => f.write_str("it took too long"),
            Self::TooManyRedirects => write!(f, "it redirects more than {REDIRECTS_MAX} times"),
            Self::BadRedirect => f.write_str("it redirects to what is no page of the web"),
            Self::NotAllowed => f.write_str("media.previews forbids to ask the host that it leads to"),
            Self::Status(status) => write!(f, "it answered {status}"),
            Self::Packed => f.write_str("its answer is packed, though it was asked for as it is"),
        }
    }
}

/// An answer whose body has not been read, and where it was found.
pub(super) struct Found {
    pub(super) url: Url,
    pub(super) response: Response<Body>,
}

impl Found {
    /// The content type without its parameters, in small letters.
    pub(super) fn kind(&self) -> String {
        let kind = self.content_type().split(';').next().unwrap_or_default();
        kind.trim().to_ascii_lowercase()
    }

    /// The encoding that the content type names.
    pub(super) fn charset(&self) -> Option<String> {
        self.content_type().split(';').skip(1).find_map(|parameter| {
            let (name, value) = parameter.split_once('=')?;
            let is_it = name.trim().eq_ignore_ascii_case("charset");
            is_it.then(|| value.trim().trim_matches(['"', '\'']).to_owned())
        })
    }

    fn content_type(&self) -> &str {
        self.field(header::CONTENT_TYPE).unwrap_or_default()
    }

    /// The number of bytes that the body is said to have.
    pub(super) fn announced(&self) -> Option<u64> {
        self.field(header::CONTENT_LENGTH)?.trim().parse().ok()
    }

    fn field(&self, name: header::HeaderName) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }
}

/// Asks for a URL, and for those that it leads to. Each is held against the lists of hosts, and looked up and guarded by itself.
pub(super) async fn find(app: &App, url: &Url, accept: &'static str) -> Result<Found, NotFetched> {
    within(&app.env, FOUND_WITHIN, follow(app, url.clone(), accept)).await.ok_or(NotFetched::TooSlow)?
}

async fn follow(app: &App, mut url: Url, accept: &'static str) -> Result<Found, NotFetched> {
    for _ in 0..=REDIRECTS_MAX {
        if !app.previews.allows(&url) {
            return Err(NotFetched::NotAllowed);
        }
        let asking = app.remote.web.get(&url, headers(app, accept));
        let response = within(&app.env, BEGINS, asking).await.ok_or(NotFetched::TooSlow)?;
        let response = response.map_err(NotFetched::NotAsked)?;
        if !is_redirect(response.status().as_u16()) {
            return judge(url, response);
        }
        let location = response.headers().get(header::LOCATION).map(HeaderValue::as_bytes);
        let location = location.and_then(|location| std::str::from_utf8(location).ok());
        url = location.and_then(|it| address::join(&url, it)).ok_or(NotFetched::BadRedirect)?;
    }
    Err(NotFetched::TooManyRedirects)
}

fn is_redirect(status: u16) -> bool {
    matches!(status, 301 | 302 | 303 | 307 | 308)
}

fn judge(url: Url, response: Response<Body>) -> Result<Found, NotFetched> {
    if !response.status().is_success() {
        return Err(NotFetched::Status(response.status().as_u16()));
    }
    let mut codings = response.headers().get_all(header::CONTENT_ENCODING).iter();
    if codings.any(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity")) {
        return Err(NotFetched::Packed);
    }
    Ok(Found { url, response })
}

fn headers(app: &App, accept: &'static str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(header::USER_AGENT, HeaderValue::from_static(AGENT));
    headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    // The setting was checked at the start.
    if let Ok(languages) = HeaderValue::from_str(&app.config.media.previews.accept_language) {
        headers.insert(header::ACCEPT_LANGUAGE, languages);
    }
    headers
}

/// Reads the beginning of a page. What does not come in time, or breaks off, is taken for its end.
pub(super) async fn read_page(env: &Env, body: Body) -> Bytes {
    read(env, body, PAGE_BYTES_MAX, PAGE_READ_FOR).await
}

/// Asks for a description beside a page, and reads it. None where there is none; the preview is made without it.
pub(super) async fn description(app: &App, url: &Url) -> Option<Bytes> {
    match find(app, url, DESCRIPTIONS).await {
        // One byte more than it may have, so that one that is too long is no description.
        Ok(found) => {
            let body = found.response.into_body();
            Some(read(&app.env, body, oembed::BYTES_MAX + 1, PAGE_READ_FOR).await)
        }
        Err(why) => {
            tracing::debug!(host = address::host(url), %why, "a description beside a page is left out");
            None
        }
    }
}

async fn read(env: &Env, mut body: Body, bytes_max: usize, read_for: Duration) -> Bytes {
    let mut bytes = BytesMut::new();
    let reading = async {
        while bytes.len() < bytes_max
            && let Some(Ok(piece)) = body.next().await
        {
            let left = bytes_max - bytes.len();
            bytes.extend_from_slice(piece.get(..left).unwrap_or(&piece));
        }
    };
    let _what_has_come_counts = within(env, read_for, reading).await;
    bytes.freeze()
}

/// Waits for a future for this long at most. None where that was not enough.
pub(super) async fn within<T>(env: &Env, time: Duration, future: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        done = future => Some(done),
        () = env.sleep(time) => None,
    }
}
