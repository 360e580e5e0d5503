//! Duties toward encryption after a restore, which begins a new incarnation of the store.
//!
//! The store has gone back in time, so it has one-time keys that were given to somebody already. A key that is given twice
//! cannot be used by one of the two, and weakens both, so none of them is given again. Others hold device lists that are newer
//! than ours, so all are announced again.
//!
//! Other servers may have told of changes of their users' devices that are lost. The lists that are kept of these users count no more and are
//! asked for again in the background ([`super::elsewhere`]), so that clients are told of those that have become others. Clients also have
//! lists that are not kept here. So those in encrypted rooms of whom no list is kept are told to clients as changed, who ask for them.

use std::ops::ControlFlow;

use ruma::{OwnedUserId, ServerName, UserId};

use crate::{
    encryption::{device_lists, elsewhere, keys},
    ids::{RoomNum, StateKeyNum, UserNum},
    rooms::{members, state},
    schema::{self, event_types::ENCRYPTION, rooms::Membership},
    store::{Batch, Direction, Fault, Guard, NotAccepted, Snapshot, Store},
};

/// A batch deals with at most this many users.
const USERS_AT_ONCE: usize = 500;
/// A batch takes no further device once it writes this many rows of keys; a device has at most 1,000.
const ROWS_AT_ONCE: usize = 500;

/// Treats every one-time key as given, marks every fallback key as used, and announces the devices of every local user. Devices upload
/// new keys when they are told that none is left.
pub fn begin(store: &Store) -> Result<(), Fault> {
    let snapshot = store.snapshot();
    let mut owners = keys::list_owners(&*snapshot)?.into_iter().peekable();
    while owners.peek().is_some() {
        commit(store, |batch| {
            let mut rows = 0;
            while let Some((owner, one_time)) = owners.next_if(|_| rows < ROWS_AT_ONCE) {
                keys::treat_all_as_given(batch, owner)?;
                rows += one_time + 2;
            }
            Ok(())
        })?;
    }
    let users: Vec<(UserNum, OwnedUserId)> = schema::USERS
        .prefix::<()>(&*snapshot, (), Direction::Up)?
        .map(|row| {
            let (user, row) = row?;
            Ok((user, row.user_id))
        })
        .collect::<Result<_, Fault>>()?;
    for some in users.chunks(USERS_AT_ONCE) {
        commit(store, |batch| {
            some.iter()
                .try_for_each(|(user, user_id)| device_lists::changed(batch, *user, user_id, &[]).map(drop))
        })?;
    }
    match users.first() {
        Some((_, user_id)) => tell_of_unknown(store, &snapshot, user_id.server_name()),
        None => Ok(()),
    }
}

/// Tells clients that the lists of those users of other servers may have changed who share an encrypted room with somebody of ours, and of
/// whom no list is kept.
fn tell_of_unknown(store: &Store, snapshot: &Snapshot, us: &ServerName) -> Result<(), Fault> {
    for room in schema::ROOM_ID.prefix::<()>(snapshot, (), Direction::Up)? {
        let (_, room) = room?;
        if !is_encrypted(snapshot, room)? || members::joined_local_users(snapshot, room)?.next().is_none() {
            continue;
        }
        members::walk(snapshot, room, (USERS_AT_ONCE, USERS_AT_ONCE), |members| {
            let unknown = list_unknown(snapshot, room, us, members)?;
            if !unknown.is_empty() {
                let now = store.incarnation().into();
                commit(store, |batch| unknown.iter().try_for_each(|user_id| tell(batch, user_id, now)))?;
            }
            Ok(ControlFlow::Continue(()))
        })?;
    }
    Ok(())
}

fn is_encrypted(read: &Snapshot, room: RoomNum) -> Result<bool, Fault> {
    let Some(key) = state::find_key(read, room, ENCRYPTION, "")? else { return Ok(false) };
    Ok(state::current(read, room, key)?.is_some())
}

/// Lists those of some members who are joined, of other servers, and without a list that is kept.
fn list_unknown(
    read: &Snapshot,
    room: RoomNum,
    us: &ServerName,
    members: &[(String, StateKeyNum)],
) -> Result<Vec<OwnedUserId>, Fault> {
    let keys = members.iter().map(|(_, key)| *key).collect();
    let memberships = members::list_memberships(read, room, keys, None)?;
    let mut unknown = Vec::new();
    for (user_id, key) in members {
        let is_joined = memberships.get(key).is_some_and(|(_, membership)| *membership == Membership::Join);
        let user_id = UserId::parse(user_id).ok();
        let Some(user_id) = user_id.filter(|it| is_joined && it.server_name() != us) else { continue };
        if elsewhere::find(read, &user_id)?.is_none() {
            unknown.push(user_id);
        }
    }
    Ok(unknown)
}

fn tell(batch: &mut Batch, user_id: &UserId, incarnation: u64) -> Result<(), Fault> {
    let changed = device_lists::find_changed(batch, user_id)?;
    // A user who is in several rooms is told of once.
    if changed.is_none_or(|at| at.incarnation() < incarnation) {
        device_lists::changed_elsewhere(batch, user_id)?;
    }
    Ok(())
}

fn commit(store: &Store, build: impl FnOnce(&mut Batch) -> Result<(), Fault>) -> Result<(), Fault> {
    // No lock is needed, because nobody else uses a store that is being restored.
    let mut batch = store.batch(&Guard::alone());
    build(&mut batch)?;
    match store.enqueue(batch) {
        Ok(_) => store.flush().map(drop),
        Err(NotAccepted::Fault(fault)) => Err(fault),
        Err(other) => Err(Fault::Io(format!("the restored store did not accept a batch: {other:?}"))),
    }
}
