//! Answers sliding sync, and keeps what the answer changes of its connection before it is given.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::{
    accounts::Caller,
    error::{Error, Result},
    flows::{App, write},
    sync::{Answered, SlidingAsk, connections},
};

/// An answer is made anew at most this often where other requests of the connection came first.
const TRIES: usize = 4;
/// A client whose requests of one connection overtake each other asks again after this time.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Answers a request to sliding sync: as soon as something is new, or when the time is up.
///
/// The changes that the answer makes to its connection are noted and not waited for: a note that is lost in a crash makes the client begin
/// anew, as `M_UNKNOWN_POS` tells it. Errors: those of [`Polls::slide`](crate::sync::Polls::slide); busy, if requests of the same
/// connection overtake each other.
pub async fn slide(app: &App, caller: &Caller, ask: &SlidingAsk, timeout: Duration) -> Result<Answered> {
    for _ in 0..TRIES {
        let (answer, update) = app.polls.slide(ask.clone(), timeout).await?;
        let Some(update) = update else { return Ok(answer) };
        let is_kept = Arc::new(AtomicBool::new(false));
        let kept = Arc::clone(&is_kept);
        let published = write::note_for_caller(app, caller, move |_, note| {
            kept.store(connections::keep(note, update)?, Ordering::Release);
            Ok(())
        });
        drop(published.await?);
        if is_kept.load(Ordering::Acquire) {
            return Ok(answer);
        }
        tracing::debug!(user = %caller.user, reason = "another request came first", "an answer is made anew");
    }
    Err(Error::Busy { retry_after: RETRY_AFTER })
}
