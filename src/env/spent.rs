//! The log of slow requests says where the time of a request went: this counts it.

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

/// The time that one request spent in each place, in microseconds. What is in no place was spent waiting: for news, for other
/// servers.
#[derive(Debug, Default)]
pub struct Spent {
    /// Waiting until a call off the async threads may begin.
    queued_us: AtomicU64,
    /// In calls off the async threads: reading and deciding.
    working_us: AtomicU64,
    /// The time until the whole body was there.
    receiving_us: AtomicU64,
    /// Waiting until a write was durable.
    flushing_us: AtomicU64,
}

/// A place where time goes.
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

    /// Adds to what was spent in this place.
    pub fn add(&self, place: Place, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.place(place).fetch_add(us, Ordering::Relaxed);
    }

    /// The time spent in this place, in microseconds.
    pub fn us(&self, place: Place) -> u64 {
        self.place(place).load(Ordering::Relaxed)
    }
}

/// Adds to what the current request spent. Outside a request nothing happens.
pub fn add(place: Place, took: Duration) {
    if let Some(spent) = current() {
        spent.add(place, took);
    }
}

/// What the current request spends, for work that is done for it in another task; none outside a request.
pub fn current() -> Option<Arc<Spent>> {
    SPENT.try_with(Arc::clone).ok()
}
