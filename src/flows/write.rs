//! The only way to the locks of users and of the server. A flow builds a batch under the locks of the rows that it writes,
//! enqueues it, and waits for the disk without them.
//!
//! Locks are taken in one order: the room's turn (`flows/commit.rs`), then users, then the server. A batch that writes rows
//! outside its locks is refused (`store/guard.rs`).

use parking_lot::MutexGuard;
use ruma::UserId;

use crate::{
    accounts::{Caller, tokens},
    env::spent::{self, Place},
    error::{Error, Result},
    flows::{App, sharing, typists},
    ids::UserNum,
    store::{Batch, Domain, Enqueued, Guard, NotAccepted, Note, Published, Wake},
};

/// Locks of users and of the server, with the guard that proves to the store that they are held. Dropping this gives up the
/// guard first and then the locks.
pub(crate) struct Locked<'a> {
    pub(crate) guard: Guard,
    _users: Vec<MutexGuard<'a, ()>>,
    _server: Option<MutexGuard<'a, ()>>,
}

/// Takes the locks of these users, and the server's where `server` says so.
fn lock(app: &App, users: Vec<UserNum>, server: bool) -> Locked<'_> {
    Guard::assert_order(if users.is_empty() { Domain::Server } else { Domain::User });
    let of_users = app.accounts.lock_all(users.iter().copied());
    let of_server = server.then(|| app.accounts.lock_server());
    Locked { guard: Guard::of_users(users, server), _users: of_users, _server: of_server }
}

/// Takes the server's lock, for a change to a room that names or lists the room.
pub(crate) fn lock_server(app: &App) -> Locked<'_> {
    lock(app, Vec::new(), true)
}

/// Takes a user's lock, for a change to a room that decides by what the user has in other rooms.
pub(crate) fn lock_user(app: &App, user: UserNum) -> Locked<'_> {
    lock(app, vec![user], false)
}

/// The locks that a batch or a note needs, and the caller whose session must still live once they are held.
struct Wanted {
    users: Vec<UserNum>,
    server: bool,
    caller: Option<Caller>,
}

impl Wanted {
    fn of(users: Vec<UserNum>, server: bool) -> Self {
        Self { users, server, caller: None }
    }

    /// The locks of the caller and of other users, for a request of the caller's.
    fn by(caller: &Caller, mut users: Vec<UserNum>, server: bool) -> Self {
        users.push(caller.user);
        Self { users, server, caller: Some(caller.clone()) }
    }

    /// Takes the locks. Refuses a caller whose device has ended: 401 `M_UNKNOWN_TOKEN`.
    fn lock(self, app: &App) -> Result<Locked<'_>> {
        let locked = lock(app, self.users, self.server);
        if let Some(caller) = &self.caller {
            tokens::require_session(&app.store.view(), caller)?;
        }
        Ok(locked)
    }
}

/// Builds a batch under the lock of the caller of a request, off the async threads, and waits until it is durable and visible.
/// Dropping the future does not undo a batch that was accepted. A batch without rows is not written, but the rows that it saw
/// are durable when this returns.
///
/// Nothing is built for a device that has ended since the request was authenticated: 401 `M_UNKNOWN_TOKEN`.
pub(crate) async fn for_caller<T: Send + 'static>(
    app: &App,
    caller: &Caller,
    build: impl FnOnce(&App, &mut Batch) -> Result<T> + Send + 'static,
) -> Result<T> {
    write(app, Wanted::by(caller, Vec::new(), false), build, Error::from).await
}

/// Like [`for_caller`], but also under the locks of other users.
pub(crate) async fn for_caller_and_users<T: Send + 'static>(
    app: &App,
    caller: &Caller,
    users: Vec<UserNum>,
    build: impl FnOnce(&App, &mut Batch) -> Result<T> + Send + 'static,
) -> Result<T> {
    write(app, Wanted::by(caller, users, false), build, Error::from).await
}

/// Like [`for_caller_and_users`], but also under the server's lock.
pub(crate) async fn for_caller_and_users_and_server<T: Send + 'static>(
    app: &App,
    caller: &Caller,
    users: Vec<UserNum>,
    build: impl FnOnce(&App, &mut Batch) -> Result<T> + Send + 'static,
) -> Result<T> {
    write(app, Wanted::by(caller, users, true), build, Error::from).await
}

/// Like [`for_caller`], for work that is not a request of this user's: under their lock, whichever of their devices live.
pub(crate) async fn for_user<T: Send + 'static>(
    app: &App,
    user: UserNum,
    build: impl FnOnce(&App, &mut Batch) -> Result<T> + Send + 'static,
) -> Result<T> {
    write(app, Wanted::of(vec![user], false), build, Error::from).await
}

/// Like [`for_user`], under the locks of several users.
pub(crate) async fn for_users<T: Send + 'static>(
    app: &App,
    users: Vec<UserNum>,
    build: impl FnOnce(&App, &mut Batch) -> Result<T> + Send + 'static,
) -> Result<T> {
    write(app, Wanted::of(users, false), build, Error::from).await
}

/// Like [`for_user`], for rows about a user of another server. Such a user has no number, so that one of a few numbers that no
/// account has stands for all whose servers have the same digest: what is kept of all users of a server is counted under one lock.
pub(crate) async fn for_other<T: Send + 'static>(
    app: &App,
    user_id: &UserId,
    build: impl FnOnce(&App, &mut Batch) -> Result<T> + Send + 'static,
) -> Result<T> {
    let digest =
        user_id.server_name().as_bytes().iter().fold(0_u8, |digest, byte| digest.wrapping_mul(31) ^ byte);
    let stands_for = UserNum(u64::MAX - u64::from(digest));
    write(app, Wanted::of(vec![stands_for], false), build, Error::from).await
}

/// Like [`for_user`], but also under the server's lock. `refused` turns the reason why a batch was not accepted into an error.
pub(crate) async fn for_user_and_server<T: Send + 'static>(
    app: &App,
    user: UserNum,
    build: impl FnOnce(&App, &mut Batch) -> Result<T> + Send + 'static,
    refused: fn(NotAccepted) -> Error,
) -> Result<T> {
    write(app, Wanted::of(vec![user], true), build, refused).await
}

/// Like [`for_user`], but under the server's lock alone. `refused` turns the reason why a batch was not accepted into an error.
pub(crate) async fn for_server<T: Send + 'static>(
    app: &App,
    build: impl FnOnce(&App, &mut Batch) -> Result<T> + Send + 'static,
    refused: fn(NotAccepted) -> Error,
) -> Result<T> {
    write(app, Wanted::of(Vec::new(), true), build, refused).await
}

async fn write<T: Send + 'static>(
    app: &App,
    wanted: Wanted,
    build: impl FnOnce(&App, &mut Batch) -> Result<T> + Send + 'static,
    refused: fn(NotAccepted) -> Error,
) -> Result<T> {
    let builder = app.clone();
    let built = app.env.blocking(move || {
        let locked = wanted.lock(&builder)?;
        let mut batch = builder.store.batch(&locked.guard);
        let value = build(&builder, &mut batch)?;
        if batch.row_count() == 0 {
            return Ok((value, None));
        }
        let enqueued = builder.store.enqueue(batch).map_err(refused)?;
        Ok((value, Some(enqueued)))
    });
    let (value, enqueued) = built.await?;
    durable(app, enqueued).await?;
    Ok(value)
}

/// Builds a note under the caller's lock, off the async threads. Answers a future that resolves once the note is visible, for
/// callers that want to wait; none if there was nothing to note. As for [`for_caller`], the caller's device must not have ended.
pub(crate) async fn note_for_caller(
    app: &App,
    caller: &Caller,
    build: impl FnOnce(&App, &mut Note) -> Result<()> + Send + 'static,
) -> Result<Option<Published>> {
    note(app, Wanted::by(caller, Vec::new(), false), build).await
}

/// Like [`note_for_caller`], for a note that follows from no request of this user's.
pub(crate) async fn note_for_user(
    app: &App,
    user: UserNum,
    build: impl FnOnce(&App, &mut Note) -> Result<()> + Send + 'static,
) -> Result<Option<Published>> {
    note(app, Wanted::of(vec![user], false), build).await
}

async fn note(
    app: &App,
    wanted: Wanted,
    build: impl FnOnce(&App, &mut Note) -> Result<()> + Send + 'static,
) -> Result<Option<Published>> {
    let builder = app.clone();
    let noted = app.env.blocking(move || {
        let locked = wanted.lock(&builder)?;
        let mut note = builder.store.note(&locked.guard);
        build(&builder, &mut note)?;
        if note.row_count() == 0 {
            return Ok(None);
        }
        Ok(Some(builder.store.enqueue_note(note)?))
    });
    noted.await
}

/// Waits until a batch is durable and visible. Without a batch, it waits until everything that was accepted before is.
pub(crate) async fn durable(app: &App, enqueued: Option<Enqueued>) -> Result<()> {
    let began = app.env.instant();
    let durable = match enqueued {
        Some(enqueued) => enqueued.flushed.await.map_err(|_| app.broke_off("a write")),
        None => {
            app.store.barrier().await;
            Ok(())
        }
    };
    spent::add(Place::Flushing, app.env.instant().saturating_duration_since(began));
    durable
}

/// Carries out a wake that a published batch asks for. It runs on the flusher's thread, so it must be short.
pub(crate) fn on_publish(app: &App, wake: Wake) {
    match wake {
        Wake::Users(users) => app.notifier.gather(users),
        Wake::Sharing { user } => sharing::wake(app, user),
        Wake::InRooms { rooms } => sharing::wake_in_rooms(app, rooms),
        Wake::Joined { room, user } => app.ephemeral.update(|board| board.presence.came_into(user, room)),
        Wake::Left { room, user_id } => {
            app.ephemeral.change(|board, number| (board.typing.set(room, &user_id, None, number), ()));
        }
        Wake::Listed { room } => app.rooms.listing().touch(room),
        Wake::Ended { user, user_id } => {
            end_waits(app, user);
            let owned = app.clone();
            app.env.spawn(async move { typists::stop_ended(&owned, user, &user_id).await });
        }
        Wake::Locked { user } => end_waits(app, user),
        // The store itself wakes the task that fires timers.
        Wake::Timers => {}
    }
}

/// Wakes the sockets and polls of a user, of which those end whose session has ended.
fn end_waits(app: &App, user: UserNum) {
    app.ended_sessions.wake_user(user);
    app.notifier.gather([user].into());
}

/// Wakes the polls of those who share a room with the user, and the user's own, when the batch is visible. This is for changes
/// that others see of a user, such as those of devices. The batch reads no room for it.
pub(crate) fn wake_sharing(batch: &mut Batch, user: UserNum) {
    wake(batch, user);
    batch.wake(Wake::Sharing { user });
}

/// Wakes the user's polls when the batch is visible.
pub(crate) fn wake(batch: &mut Batch, user: UserNum) {
    batch.wake(Wake::users(vec![user]));
}

#[cfg(test)]
mod tests;
