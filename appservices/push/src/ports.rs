//! The doors through which everything comes in that is not computed: clock, randomness, tasks and threads, DNS, HTTPS, and the figures that go
//! out.

use std::sync::Arc;

use federation::ports::{Clock, Randomness, Resolver, Tasks, Transport};
use futures_util::future::BoxFuture;

/// Randomness that is good enough for keys.
pub trait Secrets: Send + Sync + 'static {
    /// Fills the buffer with bytes that nobody can guess.
    fn fill(&self, buffer: &mut [u8]);
}

/// Takes work that keeps a processor busy off the threads that serve requests.
pub trait Work: Send + Sync + 'static {
    /// Runs this, and ends when it has. It may be given up where the process stops, and panics end the work alone.
    fn run(&self, work: Box<dyn FnOnce() + Send>) -> BoxFuture<'static, ()>;
}

/// Takes the figures of the gateway.
pub trait Figures: Send + Sync + 'static {
    /// One device of a notification was dealt with: the kind of its app (or `none`), and what became of it. Both words come
    /// from fixed sets.
    fn device(&self, kind: &'static str, outcome: &'static str);
}

/// All ports together. Cheap to clone.
#[derive(Clone)]
pub struct Ports {
    /// The wall clock of the process.
    pub clock: Arc<dyn Clock>,
    /// Randomness for choices and jitter.
    pub randomness: Arc<dyn Randomness>,
    /// Randomness for keys and salts.
    pub secrets: Arc<dyn Secrets>,
    /// Starts tasks that go on when the caller hangs up.
    pub tasks: Arc<dyn Tasks>,
    /// Runs what keeps a processor busy. The gateway itself bounds how much runs at once.
    pub work: Arc<dyn Work>,
    /// Finds the addresses of hosts.
    pub resolver: Arc<dyn Resolver>,
    /// HTTPS, which follows no redirects.
    pub transport: Arc<dyn Transport>,
    /// Whether the transport goes through a forward proxy, which resolves names and guards addresses itself.
    pub through_proxy: bool,
    /// The figures of the process.
    pub figures: Arc<dyn Figures>,
}
