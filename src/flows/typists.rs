//! Tells a room that the users who type in it changed.

use crate::{
    accounts::devices,
    error::Result,
    flows::App,
    ids::{DeviceNum, RoomNum, UserNum},
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
    let ended = list_ended(app, user, user_id).await?;
    stop(app, user_id, ended).await
}

/// Lists the rooms in which a user types on a device that has ended, each with the device.
async fn list_ended(app: &App, user: UserNum, user_id: &str) -> Result<Vec<(RoomNum, DeviceNum)>> {
    let mut typed = app.ephemeral.read(|board| board.typing.rooms_of(user_id));
    if typed.is_empty() {
        return Ok(typed);
    }
    let owned = app.clone();
    let devices = app.env.blocking(move || Ok(devices::list(&*owned.store.snapshot(), user)?)).await?;
    typed.retain(|(_, device)| devices.iter().all(|live| live.num != *device));
    Ok(typed)
}

/// Has a user stop typing in each of these rooms, unless they type there on another device by now.
async fn stop(app: &App, user_id: &str, ended: Vec<(RoomNum, DeviceNum)>) -> Result<()> {
    for (room, device) in ended {
        let stop = |board: &mut Board, number| (board.typing.stop_on(room, user_id, device, number), ());
        if app.ephemeral.change(stop).0 {
            if let Ok(user) = <&ruma::UserId>::try_from(user_id) {
                app.delivery.typing(room, user, false, true);
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{env::Env, rooms::typing::Word, server::Server};

    #[tokio::test(start_paused = true)]
    async fn a_user_who_types_on_another_device_meanwhile_is_not_stopped() {
        let server = Server::in_memory(Env::simulated(1, 0));
        let (app, user, user_id) = (server.app(), UserNum(1), "@alice:x");
        let (ended, live) = (DeviceNum(1), DeviceNum(2));
        let type_on = |room, device| {
            let word = Some(Word { device, until_ms: 10 });
            app.ephemeral.change(|board, number| (board.typing.set(room, user_id, word, number), ()));
        };
        for room in [RoomNum(1), RoomNum(2)] {
            type_on(room, ended);
        }
        let found = list_ended(app, user, user_id).await.unwrap();
        assert_eq!(found, [(RoomNum(1), ended), (RoomNum(2), ended)]);
        type_on(RoomNum(2), live);
        stop(app, user_id, found).await.unwrap();
        let typed = app.ephemeral.read(|board| board.typing.rooms_of(user_id));
        assert_eq!(typed, [(RoomNum(2), live)]);
    }
}
