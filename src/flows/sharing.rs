//! Wakes the polls of those who share a room with a user whose devices, keys or presence changed.
//!
//! The search begins with those who wait, because they are mostly few: a user may be in hundreds of rooms with ten thousand
//! members each. It reads a bounded number of rows. What a client is told does not depend on it: a poll that is not woken
//! finds the change when it ends.

use std::{collections::BTreeSet, sync::Arc};

use parking_lot::Mutex;

use crate::{
    error::Result,
    flows::App,
    ids::{RoomNum, UserNum},
    rooms::members,
    store::Snapshot,
};

/// The users whose change others are still to be woken for, which clones of this share. One task works them off, and a user
/// who changes often is in it once.
#[derive(Clone, Default)]
pub struct Sharing(Arc<Mutex<Changed>>);

#[derive(Default)]
struct Changed {
    users: BTreeSet<UserNum>,
    /// Whether a task runs that works them off.
    has_worker: bool,
}

impl Sharing {
    /// Adds a user. Answers whether a task must be started.
    fn add(&self, user: UserNum) -> bool {
        let mut changed = self.0.lock();
        changed.users.insert(user);
        !std::mem::replace(&mut changed.has_worker, true)
    }

    /// Takes the next user. If there is none, the task ends.
    fn take(&self) -> Option<UserNum> {
        let mut changed = self.0.lock();
        let next = changed.users.pop_first();
        changed.has_worker = next.is_some();
        next
    }
}

/// Has those woken who wait and share a room with the user. It runs on the flusher's thread, so that the work is left to a task.
pub(crate) fn wake(app: &App, user: UserNum) {
    if app.notifier.waiting_count() > 0 && app.sharing.add(user) {
        let owned = app.clone();
        app.env.spawn(async move { work_off(&owned).await });
    }
}

/// Has those woken who wait and are joined to any of these rooms. It runs on the flusher's thread, so that the work is left to a
/// task.
pub(crate) fn wake_in_rooms(app: &App, rooms: Arc<[RoomNum]>) {
    if app.notifier.waiting_count() == 0 {
        return;
    }
    let owned = app.clone();
    app.env.spawn(async move {
        let env = owned.env.clone();
        let wake = move || {
            let waiting = owned.notifier.list_waiting();
            let snapshot = owned.store.snapshot();
            owned.notifier.wake_users(members::find_joined_in_any(&*snapshot, &rooms, waiting)?);
            Ok(())
        };
        if let Err(error) = env.blocking(wake).await {
            tracing::warn!(%error, "those who share a room with a user of another server were not woken");
        }
    });
}

async fn work_off(app: &App) {
    while let Some(user) = app.sharing.take() {
        let owned = app.clone();
        let woken = app.env.blocking(move || wake_those_who_wait(&owned, &owned.store.snapshot(), user));
        if let Err(error) = woken.await {
            tracing::warn!(%error, %user, "those who share a room with a user were not woken");
        }
    }
}

/// Wakes those who wait now and share a room with the user in this snapshot. The user's own polls are not woken.
pub(crate) fn wake_those_who_wait(app: &App, snapshot: &Snapshot, user: UserNum) -> Result<()> {
    let sharing = members::find_sharing(snapshot, user, app.notifier.list_waiting())?;
    app.notifier.wake_users(sharing);
    Ok(())
}
