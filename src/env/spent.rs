//! Counts where the time of a request goes, because the log of slow requests says it.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

tokio::task_local! {
    static SPENT: Arc<Spent>;
}

/// The time that one request spent in each place, in microseconds. The rest of its time went into waiting for news or for
/// other servers.
#[derive(Debug, Default)]
pub struct Spent {
    /// The time that calls off the async threads waited until they could begin.
    queued_us: AtomicU64,
    /// The time in calls off the async threads, which read and decide.
    working_us: AtomicU64,
    /// The time until the whole body of the request was received.
    receiving_us: AtomicU64,
    /// Waiting until a write was durable.
    flushing_us: AtomicU64,
}

/// A place where the time of a request goes.
#[derive(Debug, Clone, Copy)]
pub enum Place {
    /// A call off the async threads waits until it may begin.
    Queued,
    /// A call off the async threads reads and decides.
    Working,
    /// The body is being received.
    Receiving,
    /// Waiting until a write was durable.
    Flushing,
}

impl Spent {
    /// Runs the future; what it spends is added up here.
    pub fn during<F: Future>(self: &Arc<Self>, future: F) -> impl Future<Output = F::Output> + use<F> {
        SPENT.scope(self.clone(), future)
    }

    fn place(&self, place: Place) -> &AtomicU64 {
        match place {
            Place::Queued => &self.queued_us,
            Place::Working => &self.working_us,
            Place::Receiving => &self.receiving_us,
            Place::Flushing => &self.flushing_us,
        }
    }

    /// Adds to the time that was spent in this place.
    pub fn add(&self, place: Place, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.place(place).fetch_add(us, Ordering::Relaxed);
    }

    /// The time spent in this place, in microseconds.
    pub fn us(&self, place: Place) -> u64 {
        self.place(place).load(Ordering::Relaxed)
    }
}

/// Adds to the time that the current request spent in this place. Outside a request nothing happens.
pub fn add(place: Place, took: Duration) {
    if let Some(spent) = current() {
        spent.add(place, took);
    }
}

/// The counter of the current request, to be handed to another task that works for it; none outside a request.
pub fn current() -> Option<Arc<Spent>> {
    SPENT.try_with(Arc::clone).ok()
}
