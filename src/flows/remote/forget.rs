//! Forgets, once in a while, what is remembered of transactions and messages of other servers for a week, and device lists of their
//! users that are not known to be current any more. After a restore it has the lists renewed that were kept before.

use std::time::Duration;

use super::{lists, receive, remembered};
use crate::{error::Result, flows::App};

/// Look for what is too old this often.
const EVERY: Duration = Duration::from_secs(60 * 60);
/// This many rows are looked at together.
const AT_ONCE: usize = 1_000;
/// Other work comes between two such looks.
const PAUSE: Duration = Duration::from_millis(100);

/// Looks over all rows again and again, for ever.
pub(crate) async fn run(app: App) {
    let again_and_again = async {
        loop {
            app.env.sleep(EVERY).await;
            if let Err(error) = look_over(&app).await {
                tracing::warn!(%error, "what is remembered of other servers could not be looked over");
            }
        }
    };
    futures_util::future::join(lists::renew_old(&app), again_and_again).await;
}

async fn look_over(app: &App) -> Result<()> {
    in_parts(app, |after| blocking(app, move |app| receive::forget_old(app, after, AT_ONCE))).await?;
    in_parts(app, |after| blocking(app, move |app| remembered::forget_old(app, after, AT_ONCE))).await?;
    in_parts(app, |after| blocking(app, move |app| remembered::forget_places(app, after, AT_ONCE))).await?;
    in_parts(app, |after| lists::forget_old(app, after, AT_ONCE)).await
}

/// Looks over rows in parts, with a pause between them. Each part begins after the place that the one before it gave, and the last
/// gives none.
async fn in_parts<K, F: Future<Output = Result<Option<K>>>>(
    app: &App,
    look: impl Fn(Option<K>) -> F,
) -> Result<()> {
    let mut after = None;
    loop {
        after = look(after).await?;
        if after.is_none() {
            return Ok(());
        }
        app.env.sleep(PAUSE).await;
    }
}

async fn blocking<T: Send + 'static>(
    app: &App,
    look: impl FnOnce(&App) -> Result<T> + Send + 'static,
) -> Result<T> {
    let owned = app.clone();
    app.env.blocking(move || look(&owned)).await
}
