//! Domains: what one lock guards.

/// A domain is what one lock guards: reading, deciding and writing. Locks are taken in this order and never held while
/// waiting for the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Domain {
    /// A room's rows, which the turn of the room guards.
    Room,
    /// A user's rows, which the lock of the user guards.
    User,
    /// Rows of the server as a whole, which the lock of the server guards.
    Server,
    /// The store's own tables, which need no lock: the queue orders the log, a reader alone moves its cursor, and of those who
    /// try to take a timer one finds it as expected.
    Store,
}
