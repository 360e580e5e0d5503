//! Tells that a batch is published, to a task that waits or by a call.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use parking_lot::Mutex;

/// The store failed, or was closed, before the batch was published: nobody knows whether it will be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lost;

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the store was closed before the write was published")
    }
}

impl std::error::Error for Lost {}

type Call = Box<dyn FnOnce(Result<(), Lost>) + Send>;

enum State {
    /// Nothing is known yet, and this task waits to be woken.
    Waits(Option<Waker>),
    /// Nothing is known yet, and this is called when something is.
    Calls(Call),
    Known(Result<(), Lost>),
}

/// Resolves when a batch is published, which a commit is once it is durable. Dropping it changes nothing for the batch.
pub struct Published(Arc<Mutex<State>>);

/// The other end of a [`Published`], which the queue has. When it is dropped before it is kept, the batch is lost.
pub(crate) struct Promise(Arc<Mutex<State>>);

/// Makes a promise, and the future that waits for it.
pub(crate) fn promise() -> (Promise, Published) {
    let state = Arc::new(Mutex::new(State::Waits(None)));
    (Promise(Arc::clone(&state)), Published(state))
}

impl Published {
    /// Whether it is known yet that the batch is published or lost.
    pub fn is_known(&self) -> bool {
        matches!(*self.0.lock(), State::Known(_))
    }

    /// Calls instead of waiting: at once where it is known, otherwise on the flusher's thread, so the call must be short. An
    /// answer to a waiting client that is given this way saves waking a task in between.
    pub fn then(self, call: impl FnOnce(Result<(), Lost>) + Send + 'static) {
        let mut state = self.0.lock();
        if let State::Known(known) = *state {
            drop(state);
            call(known);
        } else {
            *state = State::Calls(Box::new(call));
        }
    }
}

impl Future for Published {
    type Output = Result<(), Lost>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.0.lock();
        if let State::Known(known) = *state {
            return Poll::Ready(known);
        }
        *state = State::Waits(Some(context.waker().clone()));
        Poll::Pending
    }
}

impl Promise {
    /// Says that the batch is published.
    pub(crate) fn keep(self) {
        self.tell(Ok(()));
    }

    fn tell(&self, known: Result<(), Lost>) {
        let mut state = self.0.lock();
        if matches!(*state, State::Known(_)) {
            return;
        }
        let before = std::mem::replace(&mut *state, State::Known(known));
        drop(state);
        match before {
            State::Waits(Some(waker)) => waker.wake(),
            State::Calls(call) => call(known),
            State::Waits(None) | State::Known(_) => {}
        }
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.tell(Err(Lost));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn whoever_waits_or_is_called_learns_it_once() {
        let (kept, waits) = promise();
        kept.keep();
        assert_eq!(waits.await, Ok(()));
        let (lost, waits) = promise();
        drop(lost);
        assert_eq!(waits.await, Err(Lost));
        let calls = Arc::new(AtomicUsize::new(0));
        let count = |expected| {
            let calls = Arc::clone(&calls);
            move |known| {
                assert_eq!(known, expected);
                calls.fetch_add(1, Ordering::SeqCst);
            }
        };
        let (early, called) = promise();
        called.then(count(Ok(())));
        early.keep();
        let (late, called) = promise();
        drop(late);
        called.then(count(Err(Lost)));
        assert_eq!(calls.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn a_task_that_waits_is_woken() {
        let (kept, mut waits) = promise();
        assert!(futures_util::poll!(&mut waits).is_pending());
        assert!(!waits.is_known());
        std::thread::scope(|threads| drop(threads.spawn(|| kept.keep()).join()));
        assert!(waits.is_known());
        assert_eq!(waits.await, Ok(()));
    }
}
