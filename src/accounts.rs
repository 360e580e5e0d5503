//! Accounts of this server: users, their devices and tokens, and what they keep here.
//!
//! Everything below is plain functions over a snapshot or a batch. [`Accounts`] holds what lives in memory: the locks of
//! users, the counter of user numbers, sessions of user-interactive authentication, and rendezvous.

pub mod account_data;
pub mod check;
pub mod dehydrated;
pub mod devices;
pub mod emails;
pub mod filters;
pub mod ignored;
pub mod interactive;
pub mod invites;
pub mod names;
pub mod openid;
pub mod passwords;
pub mod presence;
pub mod profiles;
pub mod registration;
pub mod rendezvous;
pub mod reports;
pub mod subscriptions;
pub mod tokens;
pub mod users;

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::{Mutex, MutexGuard};
use ruma::{OwnedDeviceId, OwnedServerName, OwnedUserId, ServerName};

use crate::{
    env::Env,
    ids::{DeviceNum, UserNum},
    store::{Fault, Read},
};

/// All users share this many locks, so that the memory for locks does not grow with the number of accounts.
const LOCKS: usize = 256;

/// The caller of a request, as its access token names them.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The number of the account that calls.
    pub user: UserNum,
    /// The full user id of that account.
    pub user_id: OwnedUserId,
    /// The device: the scope of transaction ids, together with the user.
    pub device: DeviceNum,
    /// The id of the device that the access token belongs to.
    pub device_id: OwnedDeviceId,
    /// Whether the account is a guest, who may do less.
    pub is_guest: bool,
    /// Whether the account administers this server.
    pub is_admin: bool,
    /// Whether an admin has locked the account, so that it can only log out.
    pub is_locked: bool,
    /// Whether an admin has suspended the account, so that it does nothing that others see.
    pub is_suspended: bool,
    /// Set if the access token is a refreshed one that was not used before: the pair that it replaces must go now.
    pub(crate) unused: Option<tokens::Unused>,
}

/// The part of accounts that lives in memory. It is cheap to clone, for clones share it.
#[derive(Clone)]
pub struct Accounts(Arc<Inner>);

struct Inner {
    server_name: OwnedServerName,
    /// The highest account number that this process has given out; a stored account may have a higher one.
    last_user: AtomicU64,
    users: Box<[Mutex<()>]>,
    /// The lock of what belongs to the server as a whole: registration tokens and user names.
    server: Mutex<()>,
    sessions: interactive::Sessions,
    first_token: Option<String>,
    seen: devices::Seen,
    nonces: registration::Nonces,
    rendezvous: rendezvous::Board,
}

impl Accounts {
    /// Reads the last user number and whether there is an account. While there is none, a registration token for the first
    /// one is made, which lives until the server stops.
    pub fn open(read: &(impl Read + ?Sized), env: &Env, server_name: OwnedServerName) -> Result<Self, Fault> {
        let last = users::last_num(read)?;
        let first_token = if users::any(read)? { None } else { Some(env.random_string(24)) };
        Ok(Self(Arc::new(Inner {
            server_name,
            last_user: AtomicU64::new(last.map_or(0, |user| user.0)),
            users: (0..LOCKS).map(|_| Mutex::new(())).collect(),
            server: Mutex::new(()),
            sessions: interactive::Sessions::default(),
            first_token,
            seen: devices::Seen::default(),
            nonces: registration::Nonces::default(),
            rendezvous: rendezvous::Board::default(),
        })))
    }

    /// The name of this server.
    pub fn server_name(&self) -> &ServerName {
        &self.0.server_name
    }

    /// The registration token of the first account, made at this start because there was no account.
    pub fn first_token(&self) -> Option<&str> {
        self.0.first_token.as_deref()
    }

    /// Sessions of user-interactive authentication.
    pub fn sessions(&self) -> &interactive::Sessions {
        &self.0.sessions
    }

    /// The places where devices meet while one logs another in.
    pub(crate) fn rendezvous(&self) -> &rendezvous::Board {
        &self.0.rendezvous
    }

    pub(crate) fn seen(&self) -> &devices::Seen {
        &self.0.seen
    }

    pub(crate) fn nonces(&self) -> &registration::Nonces {
        &self.0.nonces
    }

    /// A number that no account has, not even one that another node stored while it led. A number is not given again if its
    /// account was never stored.
    pub(crate) fn next_user(&self, read: &(impl Read + ?Sized)) -> Result<UserNum, Fault> {
        let last = users::last_num(read)?.map_or(0, |user| user.0);
        self.0.last_user.fetch_max(last, Ordering::Relaxed);
        Ok(UserNum(self.0.last_user.fetch_add(1, Ordering::Relaxed) + 1))
    }

    /// The locks of users' domains, after rooms' and before the server's, in an order that cannot end in a deadlock; never held
    /// over an await. Only `flows/write.rs` takes them.
    pub fn lock_all(&self, users: impl IntoIterator<Item = UserNum>) -> Vec<MutexGuard<'_, ()>> {
        let mut slots: Vec<usize> = users.into_iter().map(slot).collect();
        slots.sort_unstable();
        slots.dedup();
        slots.into_iter().filter_map(|slot| self.0.users.get(slot)).map(Mutex::lock).collect()
    }

    /// The lock of the server's domain, which is taken last. Only `flows/write.rs` takes it.
    pub fn lock_server(&self) -> MutexGuard<'_, ()> {
        self.0.server.lock()
    }
}

fn slot(user: UserNum) -> usize {
    let mut hasher = DefaultHasher::new();
    user.hash(&mut hasher);
    (hasher.finish() % LOCKS as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Durability, Engine, Guard, Store, engine::Memory};

    #[test]
    fn a_new_account_has_a_number_above_those_that_came_to_be_below_us() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let server: OwnedServerName = "s".try_into().unwrap();
        let accounts = Accounts::open(&store.view(), &Env::simulated(1, 0), server).unwrap();
        let next = || accounts.next_user(&store.view()).unwrap();
        assert_eq!((next(), next()), (UserNum(1), UserNum(2)));
        // Another node led meanwhile.
        let mut batch = store.batch(&Guard::alone());
        let user_id = "@bob:s".try_into().unwrap();
        let new = users::NewUser { user_id, is_admin: false, is_guest: false, now_ms: 1 };
        users::create(&mut batch, UserNum(7), &new);
        drop(store.enqueue(batch).unwrap());
        assert_eq!((next(), next()), (UserNum(8), UserNum(9)));
    }
}
