//! Drives the store's flush: waits until something is accepted, lets what is about to come join it, writes, repeats.

use std::time::Duration;

use crate::{
    env::Env,
    error::Result,
    store::{Flushed, Store},
};

/// Never waits longer than this for more batches to share an fsync.
const GATHER_MAX: Duration = Duration::from_millis(2);
/// Waiting for less than this costs more than it gathers.
const GATHER_MIN: Duration = Duration::from_micros(20);

/// Starts the flusher on a thread of its own (a task, in a simulation). `report` learns of each flush and how long
/// it took; it must be short. Errors: no thread can be started.
pub(crate) fn start(
    store: &Store,
    env: &Env,
    report: impl FnMut(&Flushed, Duration) + Send + 'static,
) -> Result<()> {
    env.spawn_thread("flusher", run(store.clone(), env.clone(), report))
}

/// Flushes for ever. A failed write ends the process: builders have decided on what is now lost.
///
/// Writers that were acknowledged together mostly come back together, so after a slow flush the next one waits a
/// moment (an eighth of the time the last one took) until as many batches have gathered as it carried. A single
/// writer never waits.
pub(crate) async fn run(store: Store, env: Env, mut report: impl FnMut(&Flushed, Duration) + Send) {
    let mut took = Duration::ZERO;
    let mut carried = 0;
    loop {
        store.wanted().await;
        let patience = (took / 8).min(GATHER_MAX);
        if carried > 1 && patience >= GATHER_MIN && !env.is_simulated() {
            store.wait_for(carried, patience);
        }
        let began = env.instant();
        match store.flush() {
            Ok(flushed) => {
                took = env.instant().saturating_duration_since(began);
                carried = flushed.batches;
                report(&flushed, took);
            }
            Err(fault) => {
                tracing::error!(%fault, "a write failed; the server stops, for nothing may be built on what is lost");
                if env.is_simulated() {
                    env.kill();
                    return;
                }
                // Not `exit`: that would run the engine's destructors beside its threads.
                std::process::abort();
            }
        }
    }
}
