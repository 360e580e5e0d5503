//! Runs the readers of the log that act inside this server. Each follows the log from its durable cursor, is woken when
//! something was written, and tries again later after a failure; none of them waits for another.
//!
//! To add a reader, write a flow that deals with a page of entries and does nothing where that was done before, and add
//! a line in [`all`].

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use crate::{
    error::Result,
    flows::{
        App,
        account::pushers,
        room::{guests, presence},
    },
    ids::Position,
    server::Lead,
    store::{Guard, LogEntry, Read, cursor, tail},
};

/// A reader looks no more often than this, so that under load one look takes in what was written meanwhile.
const LOOKS_AT_MOST_EVERY: Duration = Duration::from_secs(1);
/// A reader that failed tries again after this time, which doubles with each further failure up to
/// `FAILED_AGAIN_AFTER_MAX`.
const FAILED_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// A reader that keeps failing tries again at least this often.
const FAILED_AGAIN_AFTER_MAX: Duration = Duration::from_secs(300);
/// One page has at most this many entries, because it is held in memory.
const PAGE_MAX: usize = 2_000;

/// Deals with a page of the log. After an error the same page comes again.
type Look = fn(App, Vec<(Position, LogEntry)>) -> BoxFuture<'static, Result<()>>;

/// A reader of the log, known by the name of its cursor.
struct Reader {
    /// The name of its cursor, which must never change.
    name: &'static str,
    look: Look,
}

/// Lists all readers of this server.
fn all() -> [Reader; 1] {
    [Reader {
        name: guests::READER,
        look: |app, entries| Box::pin(async move { guests::follow(&app, entries).await }),
    }]
}

/// Tells readers that something was written, so that they look.
pub(super) struct Written(watch::Sender<()>);

impl Written {
    pub(super) fn new() -> Self {
        Self(watch::Sender::new(()))
    }

    pub(super) fn tell(&self) {
        self.0.send_replace(());
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<()> {
        self.0.subscribe()
    }
}

/// Starts all readers on the node that leads, so that only one node acts on the log.
pub(super) fn start(app: &App, _lead: &Lead, written: &watch::Receiver<()>) -> Result<()> {
    for reader in all() {
        app.env.spawn(run(app.clone(), reader, written.clone()));
    }
    let rows = Arc::new(pushers::Rows::of(app));
    app.gateways.start(written.clone(), rows.clone(), rows)?;
    // The reader that tells other servers keeps its own cursor, which moves only when they have taken what it read.
    if !app.config.federation.enabled {
        return Ok(());
    }
    app.delivery.start(written.clone(), Arc::new(presence::Shown::of(app)))
}

async fn run(app: App, reader: Reader, mut written: watch::Receiver<()>) {
    let (mut fails, mut reached) = (0_u32, None);
    loop {
        written.mark_unchanged();
        match look(&app, &reader, &mut reached).await {
            Ok(Looked::More) => fails = 0,
            Ok(Looked::All) => {
                fails = 0;
                app.env.sleep(LOOKS_AT_MOST_EVERY).await;
                if written.changed().await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, reader = reader.name, "a reader of the log failed; it tries again");
                let wait = FAILED_AGAIN_AFTER.saturating_mul(1 << fails.min(16)).min(FAILED_AGAIN_AFTER_MAX);
                fails += 1;
                app.env.sleep(wait).await;
            }
        }
    }
}

/// The outcome of one look at the log.
#[derive(Debug, PartialEq, Eq)]
enum Looked {
    /// The page was full, so that there is more to read.
    More,
    /// Everything that was written has been read.
    All,
}

/// Reads a page after what was `reached` and deals with it; then the cursor moves. The cursor is read at the start
/// only: until the store has written it, it is older than `reached`, and so a look that finds nothing new costs no
/// read.
async fn look(app: &App, reader: &Reader, reached: &mut Option<Position>) -> Result<Looked> {
    let (store, name, known) = (app.store.clone(), reader.name, *reached);
    let page = app.env.blocking(move || {
        let snapshot = store.snapshot();
        let after = match known {
            Some(reached) => reached,
            None => cursor::find(&*snapshot, name)?.unwrap_or(Position::ZERO),
        };
        let upto = snapshot.upto();
        Ok((after < upto).then_some((tail::read_after(&*snapshot, after, PAGE_MAX)?, upto)))
    });
    let Some((tail, upto)) = page.await? else { return Ok(Looked::All) };
    let (came_to, looked) = match tail {
        tail::Tail::Entries(entries) => {
            let last = entries.last().map(|(position, _)| *position);
            let is_whole = entries.len() < PAGE_MAX;
            (reader.look)(app.clone(), entries).await?;
            match last {
                Some(last) if !is_whole => (last, Looked::More),
                _ => (upto, Looked::All),
            }
        }
        tail::Tail::Resync { from } => {
            tracing::warn!(reader = name, %from, "a reader of the log has missed entries that were deleted; it goes on after them");
            (from, Looked::All)
        }
    };
    debug_assert!(known.is_none_or(|before| came_to > before), "a reader moves forward");
    *reached = Some(came_to);
    let mut note = app.store.note(&Guard::own_tables());
    cursor::advance(&mut note, name, came_to);
    // The cursor need not be durable yet: if it is lost, the same entries are read again.
    drop(app.store.enqueue_note(note)?);
    Ok(looked)
}
