//! How a flow writes what belongs to a user or the server: build under the lock, enqueue, wait without it.

use tokio::sync::oneshot;

use crate::{
    error::{Error, Result},
    flows::App,
    ids::UserNum,
    rooms::members,
    store::{Batch, NotAccepted, Read},
};

/// Users who are told at once of what somebody did.
const SHARING_MAX: usize = 10_000;

/// Builds a batch under the user's lock, off the async threads, and waits until it is durable and visible. Dropping the
/// future does not undo what was accepted. A batch without rows is not written.
pub(crate) async fn for_user<T: Send + 'static>(
    app: &App,
    user: UserNum,
    build: impl FnOnce(&App, &mut Batch) -> Result<T> + Send + 'static,
) -> Result<T> {
    for_users(app, vec![user], build).await
}

/// Like [`for_user`], under the locks of several users.
pub(crate) async fn for_users<T: Send + 'static>(
    app: &App,
    users: Vec<UserNum>,
    build: impl FnOnce(&App, &mut Batch) -> Result<T> + Send + 'static,
) -> Result<T> {
    let house = app.clone();
    let built = app.env.blocking(move || {
        let _locks = house.accounts.lock_all(users);
        build_and_enqueue(&house, build, Error::from)
    });
    durable(built.await?).await
}

/// Like [`for_user`], under the user's and the server's lock.
pub(crate) async fn for_user_and_server<T: Send + 'static>(
    app: &App,
    user: UserNum,
    build: impl FnOnce(&App, &mut Batch) -> Result<T> + Send + 'static,
) -> Result<T> {
    let house = app.clone();
    let built = app.env.blocking(move || {
        let _user = house.accounts.lock(user);
        let _server = house.accounts.lock_server();
        build_and_enqueue(&house, build, Error::from)
    });
    durable(built.await?).await
}

/// Like [`for_user`], under the server's lock; `refused` says what a batch that was not accepted means.
pub(crate) async fn for_server<T: Send + 'static>(
    app: &App,
    build: impl FnOnce(&App, &mut Batch) -> Result<T> + Send + 'static,
    refused: fn(NotAccepted) -> Error,
) -> Result<T> {
    let house = app.clone();
    let built = app.env.blocking(move || {
        let _lock = house.accounts.lock_server();
        build_and_enqueue(&house, build, refused)
    });
    durable(built.await?).await
}

type Built<T> = (T, Option<oneshot::Receiver<()>>);

fn build_and_enqueue<T>(
    app: &App,
    build: impl FnOnce(&App, &mut Batch) -> Result<T>,
    refused: fn(NotAccepted) -> Error,
) -> Result<Built<T>> {
    let mut batch = app.store.batch();
    let value = build(app, &mut batch)?;
    if batch.row_count() == 0 {
        return Ok((value, None));
    }
    let enqueued = app.store.enqueue(batch).map_err(refused)?;
    Ok((value, Some(enqueued.flushed)))
}

async fn durable<T>((value, flushed): Built<T>) -> Result<T> {
    if let Some(flushed) = flushed {
        flushed.await.map_err(|_| Error::broken("the server stops"))?;
    }
    Ok(value)
}

/// Wakes the polls of all who share a room with the user, and the user's own, when the batch is visible: for what
/// others see of a user, such as devices.
pub(crate) fn wake_sharing(app: &App, batch: &mut Batch, user: UserNum) -> Result<()> {
    let users = list_sharing(batch, user)?;
    let notifier = app.notifier.clone();
    batch.on_publish(move |_| notifier.wake_users(users));
    Ok(())
}

/// The user, and our users who share a room with that user: at most [`SHARING_MAX`] or so; others learn of it when
/// they ask next.
pub(crate) fn list_sharing(read: &(impl Read + ?Sized), user: UserNum) -> Result<Vec<UserNum>> {
    let mut users = vec![user];
    for room in members::list_joined_rooms(read, user)? {
        users.extend(members::list_joined_local_users(read, room)?);
        users.sort_unstable();
        users.dedup();
        if users.len() > SHARING_MAX {
            break;
        }
    }
    Ok(users)
}

/// Wakes the user's polls when the batch is visible.
pub(crate) fn wake(app: &App, batch: &mut Batch, user: UserNum) {
    let notifier = app.notifier.clone();
    batch.on_publish(move |_| notifier.wake_user(user));
}
