//! Typing: that a user types in a room, or has stopped, is told to the room at once and never stored.

use std::time::Duration;

use ruma::{RoomId, UserId};

use crate::{
    accounts::Caller,
    error::Result,
    flows::{App, room::require_joined, typists},
    ids::{DeviceNum, RoomNum},
    rooms::typing::{TYPING_MS_MAX, Word},
};

/// A user of another server counts as having stopped after this many milliseconds without another word: servers say again that
/// somebody types before a minute is over.
const ELSEWHERE_MS: u64 = 60_000;
/// The number that stands for the devices of users of other servers; no device of ours has it.
const ELSEWHERE: DeviceNum = DeviceNum(0);
/// At most this many users of one other server are shown typing in a room.
const OTHERS_MAX: usize = 25;

/// Notes that the user types in a room for `timeout`, or no longer types (`None`). Errors: 403 for a room that they are not in.
pub async fn set_typing(app: &App, caller: &Caller, room: &RoomId, timeout: Option<Duration>) -> Result<()> {
    let num = require_joined(&app.store.snapshot(), caller.user, room)?;
    let timeout_ms =
        timeout.map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).min(TYPING_MS_MAX));
    let until_ms = timeout_ms.map(|timeout_ms| app.env.now_ms().saturating_add(timeout_ms));
    let word = until_ms.map(|until_ms| Word { device: caller.device, until_ms });
    note(app, num, caller.user_id.to_string(), word).await
}

/// Notes that a user of another server types in a room, or no longer does. At most [`OTHERS_MAX`] users of one server are shown
/// typing there, so that no server leaves others no place.
pub(crate) async fn set_typing_elsewhere(
    app: &App,
    num: RoomNum,
    user_id: &UserId,
    types: bool,
) -> Result<()> {
    let is_of_server = |other: &String| {
        other.as_str() != user_id.as_str()
            && <&UserId>::try_from(other.as_str()).is_ok_and(|it| it.server_name() == user_id.server_name())
    };
    let others =
        app.ephemeral.read(|board| board.typing.list(num).iter().filter(|it| is_of_server(it)).count());
    if types && others >= OTHERS_MAX {
        tracing::debug!(room = %num, reason = "many users of one server type", "a typing notification is ignored");
        return Ok(());
    }
    let until_ms = app.env.now_ms().saturating_add(ELSEWHERE_MS);
    let word = types.then_some(Word { device: ELSEWHERE, until_ms });
    note(app, num, user_id.to_string(), word).await
}

async fn note(app: &App, num: RoomNum, user_id: String, word: Option<Word>) -> Result<()> {
    let (changed, began) =
        app.ephemeral.change(|board, number| (board.typing.set(num, &user_id, word, number), number));
    if let Ok(user_id) = <&UserId>::try_from(user_id.as_str()) {
        app.delivery.typing(num, user_id, word.is_some(), changed);
    }
    if changed {
        typists::wake_room(app, num).await?;
        if let Some(Word { until_ms, .. }) = word {
            let app = app.clone();
            let env = app.env.clone();
            env.spawn(async move { expire_typing(&app, num, &user_id, began, until_ms).await });
        }
    }
    Ok(())
}

/// Waits until the time at which a user counts as having stopped, and again as long as they go on typing.
async fn expire_typing(app: &App, num: RoomNum, user_id: &str, began: u64, mut until_ms: u64) {
    loop {
        let left_ms = until_ms.saturating_sub(app.env.now_ms());
        app.env.sleep(Duration::from_millis(left_ms.max(1))).await;
        let now_ms = app.env.now_ms();
        let (changed, (later_ms, gone)) = app.ephemeral.change(|board, number| {
            let mut gone = board.typing.list(num);
            let changed = board.typing.expire(num, now_ms, number);
            let left = board.typing.list(num);
            gone.retain(|user| !left.contains(user));
            (changed, (board.typing.until_ms(num, user_id, began), gone))
        });
        for user in gone.iter().filter_map(|user| <&UserId>::try_from(user.as_str()).ok()) {
            app.delivery.typing(num, user, false, true);
        }
        if changed && let Err(error) = typists::wake_room(app, num).await {
            tracing::warn!(%error, "nobody was told that somebody stopped typing");
        }
        match later_ms {
            Some(later_ms) => until_ms = later_ms,
            None => return,
        }
    }
}
