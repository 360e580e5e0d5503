//! Moves objects from one place to another while the server runs: one blob after the other is copied, and then its row says where it
//! lies (`media/objects.rs`). A move that breaks off is given again, and goes on with those that are still elsewhere.

use std::time::Duration;

use futures_util::{StreamExt, stream};

use crate::{
    env::Env,
    error::{Error, Refusal, Result},
    flows::{App, write},
    media::objects,
    schema::media::{BlobState, Digest, Home},
    store::backup::Progress,
};

/// At most this many rows of blobs are read in one snapshot.
const BLOBS_AT_ONCE: usize = 1_000;
/// At most this many blobs are copied at once.
const COPIES_MAX: usize = 4;
/// One copy takes at most this long, which is less than the time after which it is given up for certain.
const COPIED_WITHIN: Duration = Duration::from_secs(12 * 60 * 60);

/// Blobs that a move has dealt with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moved {
    /// The number of blobs that were moved.
    pub(crate) blobs: u64,
    /// The number of their bytes.
    pub(crate) bytes: u64,
    /// The number of blobs that lay there already.
    pub(crate) there: u64,
    /// The number of blobs that were about to come or to go, and stay where they are.
    pub(crate) passing: u64,
    /// The number of blobs whose objects are not where they should be.
    pub(crate) lost: u64,
}

/// The outcome for one blob.
enum Step {
    Moved(u64),
    There,
    Passing,
    Lost,
}

/// Moves the objects of all blobs to a place. Errors: 400 `M_INVALID_PARAM` where there is no bucket; [`Error::Remote`] where the bucket
/// does not answer. What was moved by then stays moved.
pub(crate) async fn move_all(
    app: &App,
    to: Home,
    progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<Moved> {
    if !app.media.stores().has_bucket() {
        return Err(Refusal::invalid_param("There is no bucket: set media.s3.bucket.").into());
    }
    let all = objects::total(&*app.store.snapshot())?.blobs;
    let (mut moved, mut after, mut done) = (Moved::default(), None, 0);
    loop {
        let snapshot = app.store.snapshot();
        let list = move || Ok(objects::list_after(&*snapshot, after, BLOBS_AT_ONCE)?);
        let page = app.env.blocking(list).await?;
        let Some((last, _)) = page.last() else { return Ok(moved) };
        after = Some(*last);
        let steps = page.into_iter().map(|(digest, row)| async move {
            if row.home == to {
                return Ok(Step::There);
            }
            match row.state {
                BlobState::Live => move_one(app, digest, to).await,
                BlobState::Pending | BlobState::Dying | BlobState::Removing => Ok(Step::Passing),
            }
        });
        let mut steps = stream::iter(steps).buffer_unordered(COPIES_MAX);
        while let Some(step) = steps.next().await {
            match step? {
                Step::Moved(bytes) => {
                    moved.blobs += 1;
                    moved.bytes = moved.bytes.saturating_add(bytes);
                }
                Step::There => moved.there += 1,
                Step::Passing => moved.passing += 1,
                Step::Lost => moved.lost += 1,
            }
            done += 1;
            progress(Progress { doing: "moving files", done, of: all });
        }
    }
}

/// Moves the object of one blob.
async fn move_one(app: &App, digest: Digest, to: Home) -> Result<Step> {
    let begin =
        move |app: &App, batch: &mut _| Ok(objects::begin_move(batch, &digest, to, app.env.now_ms())?);
    let Some(moving) = write::for_server(app, begin, Error::from).await? else { return Ok(Step::Passing) };
    let stores = app.media.stores();
    let Some(open) = stores.open(moving.from, moving.bytes).await? else {
        tracing::error!(%digest, "the object of a blob is not where it should be, and cannot be moved");
        return Ok(Step::Lost);
    };
    within(&app.env, stores.copy(&open, moving.to)).await?;
    let end = move |app: &App, batch: &mut _| Ok(objects::end_move(batch, &moving, app.env.now_ms())?);
    // Where the blob has died meanwhile, a timer removes the copy.
    let is_moved = write::for_server(app, end, Error::from).await?;
    Ok(if is_moved { Step::Moved(moving.bytes) } else { Step::Passing })
}

async fn within(env: &Env, copying: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::select! {
        biased;
        done = copying => done,
        () = env.sleep(COPIED_WITHIN) => Err(Error::broken("a file could not be copied in time".to_owned())),
    }
}
