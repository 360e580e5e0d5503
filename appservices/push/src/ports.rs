//! The doors through which everything comes in that is not computed: clock, randomness, DNS, HTTPS, and the figures that go out.

use std::sync::Arc;

use federation::ports::{Clock, Randomness, Resolver, Transport};

/// Randomness that is good enough for keys.
pub trait Secrets: Send + Sync + 'static {
    /// Fills the buffer with bytes that nobody can guess.
    fn fill(&self, buffer: &mut [u8]);
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
    /// Finds the addresses of hosts.
    pub resolver: Arc<dyn Resolver>,
    /// HTTPS, which follows no redirects.
    pub transport: Arc<dyn Transport>,
    /// Whether the transport goes through a forward proxy, which resolves names and guards addresses itself.
    pub through_proxy: bool,
    /// The figures of the process.
    pub figures: Arc<dyn Figures>,
}
