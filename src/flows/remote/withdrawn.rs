//! Counts the invitations of users of ours that servers withdrew again on a day. Each leaves rows behind for days, because the user was told
//! of it, so that who invites and withdraws without end would make the user's rooms many. The count is in memory: a restart begins it anew.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use ruma::ServerName;

use crate::{ids::UserNum, rooms::change::invited::Source};

/// Servers of one owner may withdraw this many invitations of a user on a day; more are not taken then.
const OF_DAY_MAX: u32 = 100;
/// Count for at most this many pairs of a user and an owner of servers on a day.
const PAIRS_MAX: usize = 50_000;
const DAY_MS: u64 = 24 * 60 * 60 * 1000;

/// The counts of one day. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Withdrawn(Arc<Mutex<OfDay>>);

#[derive(Debug, Default)]
struct OfDay {
    day: u64,
    counts: BTreeMap<(UserNum, Source), u32>,
}

impl OfDay {
    fn turn_to(&mut self, now_ms: u64) {
        let day = now_ms / DAY_MS;
        if day != self.day {
            *self = Self { day, counts: BTreeMap::new() };
        }
    }
}

impl Withdrawn {
    /// Notes that a server withdrew an invitation of a user. Times are milliseconds since the epoch.
    pub(super) fn note(&self, now_ms: u64, user: UserNum, server: &ServerName) {
        let mut of_day = self.0.lock();
        of_day.turn_to(now_ms);
        let (pair, is_full) = ((user, Source::of(server.as_str())), of_day.counts.len() >= PAIRS_MAX);
        if let Some(count) = of_day.counts.get_mut(&pair) {
            *count = count.saturating_add(1);
        } else if !is_full {
            of_day.counts.insert(pair, 1);
        }
    }

    /// Whether a server has withdrawn so many invitations of a user that it invites them no more on that day.
    pub(super) fn is_too_much(&self, now_ms: u64, user: UserNum, server: &ServerName) -> bool {
        let mut of_day = self.0.lock();
        of_day.turn_to(now_ms);
        let count = of_day.counts.get(&(user, Source::of(server.as_str())));
        count.is_some_and(|count| *count >= OF_DAY_MAX)
    }
}

#[cfg(test)]
mod tests {
    use ruma::server_name;

    use super::*;

    #[test]
    fn whoever_withdraws_without_end_invites_no_more_on_that_day() {
        let withdrawn = Withdrawn::default();
        let (evil, other) = (server_name!("a.evil.example:1"), server_name!("home.other"));
        for number in 0..OF_DAY_MAX {
            assert!(!withdrawn.is_too_much(5, UserNum(1), evil), "{number}");
            withdrawn.note(5, UserNum(1), evil);
        }
        assert!(withdrawn.is_too_much(5, UserNum(1), server_name!("b.evil.example")), "names cost nothing");
        assert!(!withdrawn.is_too_much(5, UserNum(2), evil));
        assert!(!withdrawn.is_too_much(5, UserNum(1), other));
        assert!(!withdrawn.is_too_much(5 + DAY_MS, UserNum(1), evil));
        for user in 0..2 * PAIRS_MAX as u64 {
            withdrawn.note(5 + DAY_MS, UserNum(user), evil);
        }
        assert_eq!(withdrawn.0.lock().counts.len(), PAIRS_MAX);
    }
}
