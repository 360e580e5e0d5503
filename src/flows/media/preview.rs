//! Previews of URLs: a user's client asks what a page is about, and this server looks at it for them
//! ([specification](https://spec.matrix.org/v1.19/client-server-api/#get_matrixclientv1mediapreview_url)).
//!
//! A page is anybody's, and so is the wish to look at it. Hosts are guarded as those of other servers are (`federation/src/web.rs`), the
//! operator says which of them may be asked at all, and nothing of the user goes along: one fetch is for all who ask
//! (`join.rs`), in words that are the same for everybody (`fetch.rs`), and what came of it is kept for a while
//! (`media/preview/rows.rs`), failures too.

mod fetch;
mod image;
mod join;
mod make;

use std::{sync::Arc, time::Duration};

use federation::guard::ServerList;
use parking_lot::Mutex;
use url::Url;

use self::join::UnderWay;
use crate::{
    accounts::Caller,
    config::Config,
    env::payer,
    error::{Error, Refusal, Result},
    flows::{App, lanes::Lanes, write},
    ids::UserNum,
    json::JsonText,
    media::preview::{
        address,
        kept::{Bounds, Kept},
        rows::{self, Key},
    },
    schema::previews::PreviewRow,
    store::{Batch, Fault},
};

/// At most this many pages are looked at at once, because each is in memory; slow ones go on besides, up to [`SLOW_MAX`].
const QUICK_MAX: usize = 16;
/// It takes at least this many users, or addresses, to have as many looked at.
const PAYERS_MIN: usize = 4;
/// At most this many pages are looked at besides that take long.
const SLOW_MAX: usize = 32;
/// The previews that are kept, each of a few kilobytes at most, and those that one user had made of them.
const KEPT: Bounds =
    if cfg!(test) { Bounds { all: 40, of_user: 10 } } else { Bounds { all: 10_000, of_user: 1_500 } };
/// One batch forgets at most this many previews.
const FORGOTTEN_AT_ONCE: usize = 100;
/// Look for previews whose time is over this often.
const FORGET_EVERY: Duration = Duration::from_secs(60 * 60);

/// The part of previews that lives in memory. A clone is cheap.
#[derive(Clone)]
pub struct Previews(Arc<Parts>);

struct Parts {
    /// The hosts that the operator lets this server ask.
    hosts: ServerList,
    lanes: Lanes,
    under_way: UnderWay,
    /// The order in which rows are forgotten. None before it is needed first.
    kept: Mutex<Option<Kept>>,
}

impl Previews {
    /// The previews of a server with these settings.
    pub fn new(config: &Config) -> Self {
        let settings = &config.media.previews;
        Self(Arc::new(Parts {
            hosts: ServerList::new(&settings.allow, &settings.deny),
            lanes: Lanes::new((QUICK_MAX, PAYERS_MIN), SLOW_MAX),
            under_way: UnderWay::default(),
            kept: Mutex::new(None),
        }))
    }

    /// Whether the operator lets this server ask the host of a URL.
    fn allows(&self, url: &Url) -> bool {
        self.0.hosts.allows_host(&address::host(url))
    }

    /// Counts the row of this key, which is kept until then, and gives those up that go for it.
    fn make_room(
        &self,
        batch: &mut Batch,
        server: &str,
        (key, row): (Key, &PreviewRow),
        by: Option<UserNum>,
    ) -> Result<(), Fault> {
        self.with_kept(batch, |batch, kept| {
            for old in kept.list_over(by, key.1, KEPT, FORGOTTEN_AT_ONCE) {
                rows::delete(batch, server, old, key.1)?;
                kept.remove(&old);
            }
            for old in rows::put(batch, server, key, row)? {
                kept.remove(&old);
            }
            kept.add(key, rows::kept_until(row), by);
            Ok(())
        })
    }

    /// Changes the order in which rows are forgotten, together with the rows. The caller holds the server's lock.
    fn with_kept<T>(
        &self,
        batch: &mut Batch,
        change: impl FnOnce(&mut Batch, &mut Kept) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let mut order = self.0.kept.lock();
        let kept = match &mut *order {
            Some(kept) => kept,
            none => {
                let mut kept = Kept::default();
                for (key, until_ms) in rows::list_all(batch)? {
                    kept.add(key, until_ms, None);
                }
                none.insert(kept)
            }
        };
        change(batch, kept)
    }

    /// Has the order read anew, because a batch that changed it was not accepted.
    fn doubt_kept(&self) {
        *self.0.kept.lock() = None;
    }
}

/// The preview of a URL, as JSON, as it was at `ts_ms` (milliseconds since the epoch) where that is known. Errors: 403 `M_FORBIDDEN` where
/// previews are off or the operator forbids the host; 400 `M_INVALID_PARAM` for what is no URL of the web; 404 `M_NOT_FOUND` where
/// no preview can be made; [`Error::Busy`] where too many are being made.
pub(crate) async fn preview(app: &App, caller: &Caller, url: &str, ts_ms: Option<u64>) -> Result<JsonText> {
    if !app.config.media.previews.enabled {
        return Err(Refusal::forbidden("This server makes no previews of URLs.").into());
    }
    let url = address::parse(url).ok_or_else(|| {
        let why = "`url` is not the URL of a page of the web: it begins with http:// or https://, names a host and a usual \
                   port, and has at most 2048 bytes.";
        Refusal::invalid_param(why)
    })?;
    if !app.previews.allows(&url) {
        tracing::debug!(host = address::host(&url), reason = "media.previews", "a preview is refused");
        return Err(Refusal::forbidden("This server makes no previews of pages of this host.").into());
    }
    if let Some(answer) = find(app, &url, ts_ms).await? {
        return answer;
    }
    // Nothing is made of the answer meanwhile.
    payer::rest();
    let row = join::make(app, caller.user, &url).await?;
    let owned = app.clone();
    app.env.blocking(move || answer(&owned, &row)).await?
}

/// Finds what is known of a URL: a preview, or that none can be made.
async fn find(app: &App, url: &Url, ts_ms: Option<u64>) -> Result<Option<Result<JsonText>>> {
    let (owned, url) = (app.clone(), url.clone());
    let find = move || {
        let row = rows::find(&owned.store.view(), &url, ts_ms, owned.env.now_ms())?;
        row.map(|row| answer(&owned, &row)).transpose()
    };
    app.env.blocking(find).await
}

/// The answer that a row stands for. Whoever is refused learns nothing of why: the reason may be a host in this server's own network, which
/// nobody outside should know of.
fn answer(app: &App, row: &PreviewRow) -> Result<Result<JsonText>> {
    let answer = rows::answer(&app.store.view(), app.config.server.name.as_str(), row)?;
    let refused = || Refusal::not_found("No preview can be made of this URL.").into();
    Ok(answer.map(|answer| answer.finish()).ok_or_else(refused))
}

/// Forgets previews whose time is over, again and again, for ever.
pub(crate) async fn forget(app: App) {
    loop {
        app.env.sleep(FORGET_EVERY).await;
        loop {
            match forget_some(&app).await {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    tracing::warn!(%error, "previews whose time is over could not be forgotten; it is tried again in an hour");
                    break;
                }
            }
        }
    }
}

/// Forgets some of them, and says whether there may be more.
async fn forget_some(app: &App) -> Result<bool> {
    let forget = |app: &App, batch: &mut Batch| {
        let (server, now_ms) = (app.config.server.name.as_str(), app.env.now_ms());
        let count = app.previews.with_kept(batch, |batch, kept| {
            let over = kept.list_over(None, now_ms, KEPT, FORGOTTEN_AT_ONCE);
            for key in &over {
                rows::delete(batch, server, *key, now_ms)?;
                kept.remove(key);
            }
            Ok(over.len())
        })?;
        Ok(count == FORGOTTEN_AT_ONCE)
    };
    let forgotten = write::for_server(app, forget, Error::from).await;
    forgotten.inspect_err(|_| app.previews.doubt_kept())
}
