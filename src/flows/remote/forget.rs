//! Forgets, once in a while, what is remembered of transactions and messages of other servers for a week, and device lists of their
//! users that are not known to be current any more.

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
    loop {
        app.env.sleep(EVERY).await;
        if let Err(error) = look_over(&app).await {
            tracing::warn!(%error, "what is remembered of other servers could not be looked over");
        }
    }
}

async fn look_over(app: &App) -> Result<()> {
    let mut after = None;
    loop {
        let owned = app.clone();
        after = app.env.blocking(move || receive::forget_old(&owned, after, AT_ONCE)).await?;
        if after.is_none() {
            break;
        }
        app.env.sleep(PAUSE).await;
    }
    let mut after = None;
    loop {
        let owned = app.clone();
        after = app.env.blocking(move || remembered::forget_old(&owned, after, AT_ONCE)).await?;
        if after.is_none() {
            break;
        }
        app.env.sleep(PAUSE).await;
    }
    let mut after = None;
    loop {
        let owned = app.clone();
        after = app.env.blocking(move || remembered::forget_places(&owned, after, AT_ONCE)).await?;
        if after.is_none() {
            break;
        }
        app.env.sleep(PAUSE).await;
    }
    let mut after = None;
    loop {
        after = lists::forget_old(app, after, AT_ONCE).await?;
        if after.is_none() {
            return Ok(());
        }
        app.env.sleep(PAUSE).await;
    }
}
