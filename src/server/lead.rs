//! The right to lead. Several nodes may share one history, but only one of them makes keys, fires timers and acts on
//! the log; the others follow and answer requests.

/// The right to do what one node does for all. The program that starts the nodes makes one of these among all nodes
/// that share a history; it cannot be copied.
#[derive(Debug)]
pub struct Lead(());

impl Lead {
    /// Gives the right to a server that is the only node of its history, as every server is today.
    pub fn of_only_node() -> Self {
        Self(())
    }
}
