//! Requests in the name of servers whose keys are not known yet. The keys have to be asked for before such a request is believed,
//! and whoever made it may have made up the name. So one address holds only a share of the places for asking.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use ruma::{OwnedServerName, ServerName};

use crate::env::payer::{Payer, Payers, Shares};

/// The keys of so many servers are asked for at once, of which one address has a quarter. Servers behind a proxy on this machine
/// cannot be told apart, and have no share.
const PLACES: usize = 256;

/// The servers whose keys are being asked for, by the addresses that named them.
#[derive(Debug)]
pub(crate) struct Strangers(Mutex<Present>);

#[derive(Debug)]
struct Present {
    shares: Shares,
    /// How many requests wait for the keys of a server, by who made them: those of one server take one place.
    waiting: BTreeMap<(Payer, OwnedServerName), usize>,
}

impl Default for Strangers {
    fn default() -> Self {
        Self(Mutex::new(Present { shares: Shares::new(PLACES), waiting: BTreeMap::new() }))
    }
}

/// A place for asking for the keys of one server. It is given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Stranger {
    of: Arc<Strangers>,
    payers: Payers,
    origin: OwnedServerName,
}

impl Strangers {
    /// Takes a place for a request of these payers in the name of this server; `None` if they have as many as one may have.
    pub(crate) fn let_in(self: &Arc<Self>, payers: Payers, origin: &ServerName) -> Option<Stranger> {
        let mut present = self.0.lock();
        let key = (payers.first(), origin.to_owned());
        match present.waiting.get_mut(&key) {
            Some(count) => *count += 1,
            None => {
                if present.shares.find_without_room(payers, 1).is_some() {
                    tracing::debug!(%origin, "a request is put off: its address named too many unknown servers");
                    return None;
                }
                present.shares.take(payers, 1);
                present.waiting.insert(key, 1);
            }
        }
        Some(Stranger { of: Arc::clone(self), payers, origin: origin.to_owned() })
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let mut present = self.of.0.lock();
        let key = (self.payers.first(), self.origin.clone());
        let Some(count) = present.waiting.get_mut(&key) else { return };
        *count = count.saturating_sub(1);
        if *count == 0 {
            present.waiting.remove(&key);
            present.shares.give_back(self.payers, 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_names_only_a_share_of_the_unknown_servers() {
        let strangers = Arc::new(Strangers::default());
        let from = |last: u8| Payers::of_request(None, [192, 0, 2, last].into());
        let server = |number: usize| OwnedServerName::try_from(format!("s{number}.example")).unwrap();
        let mut held: Vec<_> =
            (0..PLACES / 4).map(|it| strangers.let_in(from(1), &server(it)).unwrap()).collect();
        assert!(strangers.let_in(from(1), &server(PLACES)).is_none(), "it has its share");
        // Further requests of a server that is being asked for wait with the first.
        held.push(strangers.let_in(from(1), &server(0)).unwrap());
        assert!(strangers.let_in(from(2), &server(PLACES)).is_some(), "others have theirs");
        drop(held.remove(0));
        assert!(strangers.let_in(from(1), &server(PLACES)).is_none(), "one still waits for that server");
        held.pop();
        assert!(strangers.let_in(from(1), &server(PLACES)).is_some());
        drop(held);
        assert!(strangers.0.lock().shares.is_empty());
    }
}
