//! When each pusher of kind `email` is looked at next.
//!
//! It is memory alone: after a restart each pusher is looked at, and finds in the store what was not mailed.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use federation::backoff::{self, Failing, Pace};
use ruma::OwnedUserId;

use crate::{
    ids::{Position, UserNum},
    push::gather::Search,
};

/// A mail server that is not there is tried again after ten seconds, then after twice as long each time, up to an hour.
const SERVER_PACE: Pace = Pace { first_ms: 10_000, most_ms: 3_600_000 };
/// A mail that was put off is tried again after five minutes, then after twice as long each time, up to six hours.
const MAIL_PACE: Pace = Pace { first_ms: 300_000, most_ms: 6 * 3_600_000 };

/// The operator is told once this many addresses were refused in a row, and none was taken.
const REFUSED_IN_A_ROW_TOLD: u32 = 3;

/// The user, the app id and the pushkey of a pusher.
pub(super) type Key = (UserNum, String, String);

/// The users who have pushers that are on, with their ids.
pub(super) type Watchers = Arc<BTreeMap<UserNum, OwnedUserId>>;

#[derive(Debug, Default)]
struct Entry {
    /// When it is looked at next, in milliseconds since the epoch.
    due_ms: Option<u64>,
    /// For how long its user has a notification wait.
    delay_ms: u64,
    /// Everything up to here was looked at and held nothing to tell.
    seen: Position,
    /// The search for what is to be told, while it goes on.
    search: Option<Search>,
    /// It is looked at just now, which takes more than one turn while a search goes on.
    is_looked_at: bool,
    /// There may have been news while it was looked at.
    is_offered: bool,
    /// Mails for it that were put off.
    failing: Option<Failing>,
    /// A mail for it is under way. It is not looked at before that ends.
    is_under_way: bool,
    /// When it is looked at once that mail is under way no more.
    due_after_ms: Option<u64>,
    /// The mail server had the mail for it, and did not say whether it takes it.
    is_unsure: bool,
    /// The number of mails that were taken when its address was refused last.
    refused_at: Option<u64>,
}

/// A pusher that is due.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Due {
    /// The pusher, by its user.
    pub(super) key: Key,
    /// The position up to which it was looked at before and had nothing to tell.
    pub(super) seen: Position,
    /// The search for what is to be told, if it has begun.
    pub(super) search: Option<Search>,
}

/// An address was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// The mail server has taken another mail since it refused this address before, so that it is the address which it refuses.
    pub(super) counts: bool,
    /// With this one so many addresses were refused in a row that the mail server itself may be at fault.
    pub(super) is_news: bool,
}

/// All pushers of kind `email` that are on.
#[derive(Debug, Default)]
pub(super) struct Board {
    entries: BTreeMap<Key, Entry>,
    due: BTreeSet<(u64, Key)>,
    watchers: Watchers,
    /// The mail server did not do what every mail needs.
    failing: Option<Failing>,
    /// The number of mails that were taken.
    taken: u64,
    /// The number of addresses that were refused since one was taken.
    refused_in_a_row: u32,
}

impl Board {
    pub(super) fn watchers(&self) -> Watchers {
        Arc::clone(&self.watchers)
    }

    pub(super) fn count(&self) -> usize {
        self.entries.len()
    }

    /// Takes over the pushers of a user. One that is new is looked at now; one that is known keeps its time.
    pub(super) fn reload(
        &mut self,
        (user, user_id): (UserNum, Option<OwnedUserId>),
        keys: Vec<Key>,
        delay_ms: u64,
        now_ms: u64,
    ) {
        let (low, high) = (
            (user, String::new(), String::new()),
            (UserNum(user.0.saturating_add(1)), String::new(), String::new()),
        );
        let gone: Vec<Key> = self
            .entries
            .range(low..high)
            .map(|(key, _)| key.clone())
            .filter(|key| !keys.contains(key))
            .collect();
        gone.iter().for_each(|key| self.forget(key));
        let watchers = Arc::make_mut(&mut self.watchers);
        match user_id.filter(|_| !keys.is_empty()) {
            Some(user_id) => drop(watchers.insert(user, user_id)),
            None => drop(watchers.remove(&user)),
        }
        for key in keys {
            let is_new = !self.entries.contains_key(&key);
            self.entries.entry(key.clone()).or_default().delay_ms = delay_ms;
            if is_new {
                self.look_at(&key, now_ms);
            }
        }
    }

    fn forget(&mut self, key: &Key) {
        if let Some(Entry { due_ms: Some(due_ms), .. }) = self.entries.remove(key) {
            self.due.remove(&(due_ms, key.clone()));
        }
    }

    /// Has a pusher be looked at by this time, or when the mail for it that was put off is due again.
    fn look_at(&mut self, key: &Key, due_ms: u64) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        let due_ms = entry.failing.map_or(due_ms, |failing| failing.next_try_ms.max(due_ms));
        if entry.is_under_way {
            entry.due_after_ms = Some(entry.due_after_ms.map_or(due_ms, |before| before.min(due_ms)));
            return;
        }
        if let Some(before) = entry.due_ms {
            if before <= due_ms {
                return;
            }
            self.due.remove(&(before, key.clone()));
        }
        entry.due_ms = Some(due_ms);
        self.due.insert((due_ms, key.clone()));
    }

    /// There may be news for a user, which wait to be read. Answers whether a pusher is to be looked at sooner than before.
    pub(super) fn offer(&mut self, user: UserNum, now_ms: u64) -> bool {
        let (low, high) = (
            (user, String::new(), String::new()),
            (UserNum(user.0.saturating_add(1)), String::new(), String::new()),
        );
        let waiting =
            |entry: &Entry| entry.due_ms.is_none_or(|due_ms| due_ms > now_ms.saturating_add(entry.delay_ms));
        for (_, entry) in self.entries.range_mut(low.clone()..high.clone()) {
            entry.is_offered |= entry.is_looked_at;
        }
        let keys: Vec<_> = self
            .entries
            .range(low..high)
            .filter(|(_, entry)| waiting(entry))
            .map(|(key, entry)| (key.clone(), now_ms.saturating_add(entry.delay_ms)))
            .collect();
        keys.iter().for_each(|(key, due_ms)| self.look_at(key, *due_ms));
        !keys.is_empty()
    }

    /// Takes the first pusher that is due, with what was seen of its news before. `None` where there is none, or while the mail server is left
    /// alone.
    pub(super) fn take(&mut self, now_ms: u64) -> Option<Due> {
        if !backoff::may_try(self.failing, SERVER_PACE, now_ms) {
            return None;
        }
        let (due_ms, _) = self.due.first()?;
        if *due_ms > now_ms {
            return None;
        }
        let (_, key) = self.due.pop_first()?;
        let entry = self.entries.get_mut(&key)?;
        (entry.due_ms, entry.is_looked_at) = (None, true);
        let (seen, search) = (entry.seen, entry.search.take());
        Some(Due { key, seen, search })
    }

    /// When [`Board::take`] may have something, in milliseconds since the epoch.
    pub(super) fn next_due_ms(&self) -> Option<u64> {
        let (due_ms, _) = self.due.first()?;
        Some(self.failing.map_or(*due_ms, |failing| failing.next_try_ms.max(*due_ms)))
    }

    /// A pusher was looked at and had nothing to tell.
    pub(super) fn saw(&mut self, key: &Key, seen: Position) {
        if let Some(entry) = self.entries.get_mut(key) {
            (entry.seen, entry.failing) = (entry.seen.max(seen), None);
        }
    }

    /// The search for what a pusher has to tell goes on in its next turn.
    pub(super) fn search_on(&mut self, key: &Key, search: Search, now_ms: u64) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.search = Some(search);
        }
        self.look_at(key, now_ms);
    }

    /// A pusher was looked at to the end. What came meanwhile waits to be read, as whatever comes does.
    pub(super) fn looked_at(&mut self, key: &Key, now_ms: u64) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        entry.is_looked_at = false;
        if std::mem::take(&mut entry.is_offered) {
            let due_ms = now_ms.saturating_add(entry.delay_ms);
            self.look_at(key, due_ms);
        }
    }

    /// A mail for a pusher is under way.
    pub(super) fn depart(&mut self, key: &Key) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.is_under_way = true;
        }
    }

    /// The mail for a pusher is under way no more.
    pub(super) fn landed(&mut self, key: &Key) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        entry.is_under_way = false;
        if let Some(due_ms) = entry.due_after_ms.take() {
            self.look_at(key, due_ms);
        }
    }

    /// A pusher is looked at again at this time.
    pub(super) fn look_later(&mut self, key: &Key, due_ms: u64) {
        self.look_at(key, due_ms);
    }

    /// There is no such pusher any more.
    pub(super) fn gone(&mut self, key: &Key) {
        self.forget(key);
        if !self.entries.keys().any(|(user, ..)| *user == key.0) {
            Arc::make_mut(&mut self.watchers).remove(&key.0);
        }
    }

    /// The mail for a pusher was sent, or is not sent any more.
    pub(super) fn sent(&mut self, key: &Key) {
        if let Some(entry) = self.entries.get_mut(key) {
            (entry.failing, entry.is_unsure, entry.refused_at) = (None, false, None);
        }
    }

    /// The mail server has taken a mail. Answers whether it was told that it refuses all.
    pub(super) fn taken(&mut self) -> bool {
        self.taken = self.taken.saturating_add(1);
        std::mem::take(&mut self.refused_in_a_row) >= REFUSED_IN_A_ROW_TOLD
    }

    /// The mail server had the mail for a pusher and did not say whether it takes it. Answers whether that was so before.
    pub(super) fn is_unsure_again(&mut self, key: &Key) -> bool {
        let Some(entry) = self.entries.get_mut(key) else { return true };
        std::mem::replace(&mut entry.is_unsure, true)
    }

    /// The mail server has refused the address of a pusher.
    pub(super) fn refused(&mut self, key: &Key) -> Refusal {
        self.refused_in_a_row = self.refused_in_a_row.saturating_add(1);
        let is_news = self.refused_in_a_row == REFUSED_IN_A_ROW_TOLD;
        let before = self.entries.get_mut(key).and_then(|entry| entry.refused_at.replace(self.taken));
        Refusal { counts: before.is_some_and(|before| before < self.taken), is_news }
    }

    /// The mail for a pusher was put off. Others go on.
    pub(super) fn put_off(&mut self, key: &Key, now_ms: u64, random: u64) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        let failing = backoff::failed(entry.failing, MAIL_PACE, now_ms, random);
        entry.failing = Some(failing);
        self.look_at(key, failing.next_try_ms);
    }

    /// The mail server did not do what every mail needs: nothing is sent for a while, and then this pusher is tried again.
    pub(super) fn server_failed(&mut self, key: &Key, now_ms: u64, random: u64) -> Failing {
        let failing = backoff::failed(self.failing, SERVER_PACE, now_ms, random);
        self.failing = Some(failing);
        self.look_at(key, now_ms);
        failing
    }

    /// The mail server does what every mail needs. Answers whether it did not before.
    pub(super) fn server_works(&mut self) -> bool {
        self.failing.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(user: u64, address: &str) -> Key {
        (UserNum(user), "m.email".to_owned(), address.to_owned())
    }

    fn due(user: u64, seen: Position) -> Due {
        Due { key: key(user, "a@x.example"), seen, search: None }
    }

    fn board(users: &[u64]) -> Board {
        let mut board = Board::default();
        for user in users {
            let user_id = OwnedUserId::try_from(format!("@u{user}:x")).unwrap();
            board.reload((UserNum(*user), Some(user_id)), vec![key(*user, "a@x.example")], 600, 0);
        }
        board
    }

    #[test]
    fn a_pusher_is_looked_at_at_once_and_then_when_there_may_be_news() {
        let mut board = board(&[1, 2]);
        assert_eq!(board.watchers().len(), 2);
        assert_eq!(board.take(0), Some(due(1, Position::ZERO)));
        assert_eq!(board.take(0), Some(due(2, Position::ZERO)));
        let seen = Position::new(7).unwrap();
        board.saw(&key(1, "a@x.example"), seen);
        assert_eq!((board.take(1_000_000), board.next_due_ms()), (None, None));
        assert!(board.offer(UserNum(1), 1_000) && !board.offer(UserNum(1), 1_200), "it waits already");
        assert_eq!((board.next_due_ms(), board.take(1_599)), (Some(1_600), None));
        assert_eq!(board.take(1_600), Some(due(1, seen)));
        board.look_later(&key(1, "a@x.example"), 9_000);
        assert!(board.offer(UserNum(1), 2_000), "news may be told before");
        assert_eq!(board.next_due_ms(), Some(2_600));
    }

    #[test]
    fn pushers_that_go_wait_no_more() {
        let mut board = board(&[1, 2]);
        let user_id = OwnedUserId::try_from("@u1:x").unwrap();
        board.reload((UserNum(1), Some(user_id)), vec![key(1, "b@x.example")], 600, 5);
        assert_eq!(board.take(5).unwrap().key, key(2, "a@x.example"));
        assert_eq!(board.take(5).unwrap().key, key(1, "b@x.example"));
        board.gone(&key(2, "a@x.example"));
        board.reload((UserNum(1), None), Vec::new(), 600, 6);
        assert!(board.entries.is_empty() && board.due.is_empty() && board.watchers.is_empty());
        assert!(!board.offer(UserNum(1), 7));
    }

    #[test]
    fn a_server_that_is_not_there_holds_all_and_an_address_that_is_put_off_itself_alone() {
        let mut board = board(&[1, 2]);
        let first = board.take(0).unwrap().key;
        board.put_off(&first, 0, 0);
        assert!(board.offer(UserNum(1), 1), "it is offered");
        let second = board.take(0).unwrap().key;
        let failing = board.server_failed(&second, 0, 0);
        assert_eq!(
            (board.take(failing.next_try_ms - 1), board.next_due_ms()),
            (None, Some(failing.next_try_ms))
        );
        assert_eq!(board.take(failing.next_try_ms).unwrap().key, second);
        assert!(board.server_works() && !board.server_works());
        board.sent(&second);
        let due_ms = board.next_due_ms().unwrap();
        assert!(due_ms >= MAIL_PACE.first_ms * 3 / 4, "news do not hurry it: {due_ms}");
    }

    #[test]
    fn a_pusher_waits_while_its_mail_is_under_way_and_news_are_not_forgotten() {
        let mut board = board(&[1]);
        let key = board.take(0).unwrap().key;
        board.depart(&key);
        board.offer(UserNum(1), 0);
        assert_eq!((board.next_due_ms(), board.take(10_000)), (None, None));
        board.landed(&key);
        assert_eq!(board.next_due_ms(), Some(600));
        assert!(!board.is_unsure_again(&key) && board.is_unsure_again(&key));
        board.sent(&key);
        assert!(!board.is_unsure_again(&key));
    }

    #[test]
    fn a_refusal_counts_where_another_mail_was_taken_since_the_one_before() {
        let mut board = board(&[1, 2]);
        let key = key(1, "a@x.example");
        assert_eq!(board.refused(&key), Refusal { counts: false, is_news: false });
        assert!(!board.taken());
        assert_eq!(board.refused(&key), Refusal { counts: true, is_news: false });
        assert_eq!(board.refused(&key), Refusal { counts: false, is_news: false });
        assert_eq!(board.refused(&key), Refusal { counts: false, is_news: true });
        assert_eq!(board.refused(&key), Refusal { counts: false, is_news: false }, "it is said once");
        assert!(board.taken() && !board.taken());
    }

    #[test]
    fn news_that_come_while_a_search_goes_on_are_looked_for_after_it() {
        let mut board = board(&[1]);
        let key = board.take(0).unwrap().key;
        let search = Search::begin(Position::new(5).unwrap(), 0, false);
        board.offer(UserNum(1), 0);
        board.search_on(&key, search.clone(), 0);
        assert_eq!(board.take(0), Some(Due { search: Some(search), ..due(1, Position::ZERO) }));
        board.looked_at(&key, 10);
        board.look_later(&key, 9_000);
        assert_eq!(board.next_due_ms(), Some(610));
        assert_eq!(board.take(610), Some(due(1, Position::ZERO)));
        board.looked_at(&key, 610);
        assert_eq!(board.next_due_ms(), None);
    }
}
