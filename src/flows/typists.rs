//! Tells a room that the users who type in it changed.

use crate::{
    accounts::devices,
    error::Result,
    flows::App,
    ids::{RoomNum, UserNum},
    rooms::members,
    sync::ephemeral::Board,
};

/// Has a user stop typing where they type on a device that has ended: nobody is left to say that they stopped.
pub(crate) async fn stop_ended(app: &App, user: UserNum, user_id: &str) {
    if let Err(error) = try_stop_ended(app, user, user_id).await {
        tracing::warn!(%error, %user, "nobody was told that a user who logged out stopped typing");
    }
}

async fn try_stop_ended(app: &App, user: UserNum, user_id: &str) -> Result<()> {
    let typed = app.ephemeral.read(|board| board.typing.rooms_of(user_id));
    if typed.is_empty() {
        return Ok(());
    }
    let owned = app.clone();
    let devices = app.env.blocking(move || Ok(devices::list(&*owned.store.snapshot(), user)?)).await?;
    for (room, device) in typed {
        if devices.iter().any(|live| live.num == device) {
            continue;
        }
        let stop = |board: &mut Board, number| (board.typing.set(room, user_id, None, number), ());
        if app.ephemeral.change(stop).0 {
            wake_room(app, room).await?;
        }
    }
    Ok(())
}

/// Wakes the polls of those in a room, because the users who type there changed.
pub(crate) async fn wake_room(app: &App, num: RoomNum) -> Result<()> {
    let (store, notifier) = (app.store.clone(), app.notifier.clone());
    app.env
        .blocking(move || {
            let waiting = notifier.list_waiting();
            notifier.wake_users(members::find_joined(&*store.snapshot(), num, waiting)?);
            Ok(())
        })
        .await
}
