//! Guards: a lock is a proof.
//!
//! Each table belongs to a [`Domain`], and a builder that reads, decides and writes there holds its lock meanwhile. A batch is
//! made from a [`Guard`], may write only what the guard covers, and is accepted only while the guard lives. So a write to a
//! table of another domain, or to the rows of another room or user, is refused at once and needs no unlucky moment to be found.
//!
//! Guards come from few places: the doors in `flows/write.rs`, a change to a room (which holds the room's turn), and
//! [`Guard::alone`] where nobody else writes. `tests/tidy.rs` knows them.

use std::{
    cell::RefCell,
    marker::PhantomData,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    ids::{RoomNum, UserNum},
    store::Domain,
};

/// The proof that the locks of some domains are held. It stays on the thread that holds them.
#[must_use = "a guard that is dropped covers nothing any more"]
#[derive(Debug)]
pub struct Guard {
    held: Arc<Held>,
    here: PhantomData<*const ()>,
}

/// The cover of a guard, as its batches remember it.
#[derive(Debug, Default)]
pub(crate) struct Held {
    everything: bool,
    room: Option<RoomNum>,
    users: Vec<UserNum>,
    server: bool,
    is_over: AtomicBool,
}

/// The rooms or users whose rows a key, or a range of keys, may touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// Keys of the table do not begin with the number of their domain's room or user.
    Unnamed,
    /// The keys of one room or user.
    One(u64),
    /// The keys of all rooms or users.
    All,
}

thread_local! {
    /// The domains whose locks this thread holds; kept where assertions are on.
    static HELD_HERE: RefCell<Vec<Domain>> = const { RefCell::new(Vec::new()) };
}

impl Guard {
    /// Covers everything, without a lock: for tests and benchmarks, and for a store that nobody else writes yet because it is
    /// being opened or restored.
    pub fn alone() -> Self {
        Self::over(Held { everything: true, ..Held::default() })
    }

    /// Covers the store's own tables only (the log, cursors, timers), which need no lock.
    pub fn own_tables() -> Self {
        Self::over(Held::default())
    }

    /// Covers a room. The caller holds the room's turn.
    pub(crate) fn of_room(room: RoomNum) -> Self {
        Self::over(Held { room: Some(room), ..Held::default() })
    }

    /// Covers these users, and the server where `server` says so. The caller holds all those locks.
    pub(crate) fn of_users(mut users: Vec<UserNum>, server: bool) -> Self {
        users.sort_unstable();
        users.dedup();
        Self::over(Held { users, server, ..Held::default() })
    }

    /// Asserts that this thread may wait for a lock of this domain: rooms come before users and users before the server.
    /// Two locks of one domain are taken in one call, or not at all.
    pub(crate) fn assert_order(domain: Domain) {
        if cfg!(debug_assertions) {
            HELD_HERE.with_borrow(|held| {
                debug_assert!(
                    held.iter().all(|held| *held < domain),
                    "the lock of {domain:?} is taken while {held:?} are held: the order is room, user, server"
                );
            });
        }
    }

    fn over(held: Held) -> Self {
        if cfg!(debug_assertions) {
            HELD_HERE.with_borrow_mut(|here| here.extend(held.domains()));
        }
        Self { held: Arc::new(held), here: PhantomData }
    }

    pub(crate) fn held(&self) -> &Arc<Held> {
        &self.held
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Nothing is given back where no lock was taken.
        if self.held.domains().next().is_some() {
            self.held.is_over.store(true, Ordering::Release);
        }
        if cfg!(debug_assertions) {
            HELD_HERE.with_borrow_mut(|here| {
                for domain in self.held.domains() {
                    if let Some(at) = here.iter().rposition(|held| *held == domain) {
                        here.remove(at);
                    }
                }
            });
        }
    }
}

impl Held {
    fn domains(&self) -> impl Iterator<Item = Domain> + use<> {
        let room = self.room.is_some().then_some(Domain::Room);
        let users = (!self.users.is_empty()).then_some(Domain::User);
        let server = self.server.then_some(Domain::Server);
        [room, users, server].into_iter().flatten()
    }

    /// Whether a row of this domain, with this owner, may be written.
    pub(crate) fn covers(&self, domain: Domain, owner: Owner) -> bool {
        self.everything
            || match (domain, owner) {
                (Domain::Store, _) => true,
                (Domain::Room, Owner::Unnamed) => self.room.is_some(),
                (Domain::Room, Owner::One(room)) => self.room == Some(RoomNum(room)),
                (Domain::User, Owner::Unnamed) => !self.users.is_empty(),
                (Domain::User, Owner::One(user)) => self.users.binary_search(&UserNum(user)).is_ok(),
                (Domain::Room | Domain::User, Owner::All) => false,
                (Domain::Server, _) => self.server,
            }
    }

    /// Whether it covers everything without a lock.
    pub(crate) fn is_alone(&self) -> bool {
        self.everything
    }

    /// Whether the locks were given back.
    pub(crate) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Durability, Engine, Family, NotAccepted, Store, Table, engine::Memory};

    static OF_ROOMS: Table<(RoomNum, u64), u64> =
        Table::new(250, Family::Index, "OF_ROOMS", Domain::Room, "t");
    static OF_USERS: Table<(UserNum, u64), u64> =
        Table::new(251, Family::Index, "OF_USERS", Domain::User, "t");
    static BY_HASH: Table<u64, u64> = Table::new(252, Family::Index, "BY_HASH", Domain::User, "t");
    static OF_SERVER: Table<u64, u64> = Table::new(253, Family::Index, "OF_SERVER", Domain::Server, "t");

    fn store() -> Store {
        Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap()
    }

    #[test]
    fn a_guard_covers_its_own_rooms_users_and_server() {
        let store = store();
        let guard = Guard::of_users(vec![UserNum(1), UserNum(2)], true);
        let mut batch = store.batch(&guard);
        for user in [1, 2] {
            OF_USERS.put(&mut batch, (UserNum(user), 1), &1);
        }
        BY_HASH.put(&mut batch, 9, &1);
        OF_SERVER.expect_absent(&mut batch, 9);
        OF_SERVER.put(&mut batch, 9, &1);
        OF_USERS.delete_prefix::<(UserNum,)>(&mut batch, (UserNum(2),));
        drop(store.enqueue(batch).unwrap());
        drop(guard);
        let guard = Guard::of_room(RoomNum(5));
        let mut batch = store.batch(&guard);
        OF_ROOMS.put(&mut batch, (RoomNum(5), 1), &1);
        drop(store.enqueue(batch).unwrap());
    }

    #[test]
    #[should_panic(expected = "OF_SERVER")]
    fn a_room_writes_no_row_of_the_server() {
        let guard = Guard::of_room(RoomNum(5));
        OF_SERVER.put(&mut store().batch(&guard), 9, &1);
    }

    #[test]
    #[should_panic(expected = "OF_ROOMS")]
    fn a_room_writes_no_row_of_another_room() {
        let guard = Guard::of_room(RoomNum(5));
        OF_ROOMS.delete(&mut store().batch(&guard), (RoomNum(6), 1));
    }

    #[test]
    #[should_panic(expected = "OF_USERS")]
    fn a_user_writes_no_row_of_another_user() {
        let guard = Guard::of_users(vec![UserNum(1)], false);
        OF_USERS.put(&mut store().note(&guard), (UserNum(2), 1), &1);
    }

    #[test]
    #[should_panic(expected = "OF_USERS")]
    fn a_user_deletes_no_rows_of_everybody() {
        let guard = Guard::of_users(vec![UserNum(1)], false);
        OF_USERS.delete_prefix::<()>(&mut store().batch(&guard), ());
    }

    #[test]
    #[should_panic(expected = "OF_SERVER")]
    fn what_is_expected_is_under_the_guard_too() {
        let guard = Guard::own_tables();
        OF_SERVER.expect_absent(&mut store().batch(&guard), 9);
    }

    #[test]
    #[should_panic(expected = "the order is room, user, server")]
    fn a_room_is_not_waited_for_while_a_user_is_held() {
        let _user = Guard::of_users(vec![UserNum(1)], false);
        Guard::assert_order(Domain::Room);
    }

    #[test]
    fn a_batch_that_outlives_its_guard_is_refused() {
        let store = store();
        let guard = Guard::of_users(vec![UserNum(1)], false);
        let (mut batch, mut note) = (store.batch(&guard), store.note(&guard));
        OF_USERS.put(&mut batch, (UserNum(1), 1), &1);
        OF_USERS.put(&mut note, (UserNum(1), 1), &1);
        drop(guard);
        assert!(matches!(store.enqueue(batch), Err(NotAccepted::Unguarded(_))));
        assert!(matches!(store.enqueue_note(note), Err(NotAccepted::Unguarded(_))));
        assert!(OF_USERS.get(&store.view(), (UserNum(1), 1)).unwrap().is_none());
        // The locks were given back, so they can be taken again in any order.
        Guard::assert_order(Domain::Room);
    }
}
