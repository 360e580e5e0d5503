//! Neighbours: servers whose names are of one owner, as far as names say that, and that need not be of one mind.
//!
//! Names cost their owner nothing, so that shares of places and memory are an owner's: the last two labels of a name, or the network of an
//! address ([`Source`]). But domains of dynamic addresses, of hosts of pages, and networks of data centres have many tenants. So whatever
//! one of them may do to the others of its owner is bounded, too:
//!
//! - **Places are the owner's, and then the tenant's** (`staged/queues.rs`). Where an owner may have no more, the tenant that has most of them
//!   gives way to one that has less.
//! - **Turns and time are the tenant's** (`gaps/neighbours.rs`, `staged.rs`). What waits has a line and a worker of its own for each tenant, with
//!   pauses of its own, and tenants of one owner have things fetched in turn, each for a few seconds.
//!
//! A tenant is a host: whoever has one port of it has all.

use ruma::ServerName;

use crate::rooms::change::invited::Source;

/// A host among those of its owner. Tenants of one owner stand beside one another in their order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Tenant {
    owner: Source,
    host: String,
}

impl Tenant {
    /// The tenant whose server has this name.
    pub(super) fn of(server: &ServerName) -> Self {
        Self { owner: Source::of(server.as_str()), host: server.host().to_ascii_lowercase() }
    }

    /// The owner of its name, of which there may be other tenants.
    pub(super) fn owner(&self) -> &Source {
        &self.owner
    }

    /// Its host, in small letters.
    pub(super) fn host(&self) -> &str {
        &self.host
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_have_an_owner_in_common_and_ports_are_no_neighbours() {
        let of = |name: &str| Tenant::of(name.try_into().unwrap());
        let (one, other) = (of("one.dyn.example:8448"), of("other.dyn.example"));
        assert!(one != other && one.owner() == other.owner());
        assert_eq!(one, of("ONE.dyn.example:1"));
        let (one, other) = (of("192.0.2.7:8448"), of("192.0.2.8"));
        assert!(one != other && one.owner() == other.owner());
        assert_ne!(of("192.0.3.7").owner(), other.owner());
    }
}
