//! Which node leads. Several nodes may hold one history, but only one of them makes keys, fires timers and lets readers of the
//! log tell others; the rest follow and answer.

/// The right to do what one node does for all. Whoever starts the node decides: there is one of these among all nodes that
/// share a history. It cannot be copied.
#[derive(Debug)]
pub struct Lead(());

impl Lead {
    /// For a server that is the only node of its history, as every server is today.
    pub fn of_only_node() -> Self {
        Self(())
    }
}
