//! Typing: that a user types in a room, or has stopped, is told to the room at once and never stored.

use std::time::Duration;

use ruma::RoomId;

use crate::{
    accounts::Caller,
    error::Result,
    flows::{App, room::require_joined, typists},
    ids::RoomNum,
    rooms::typing::{TYPING_MS_MAX, Word},
};

/// Notes that the user types in a room for `timeout`, or no longer types (`None`). Errors: 403 for a room that they are not in.
pub async fn set_typing(app: &App, caller: &Caller, room: &RoomId, timeout: Option<Duration>) -> Result<()> {
    let num = require_joined(&app.store.snapshot(), caller.user, room)?;
    let timeout_ms =
        timeout.map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).min(TYPING_MS_MAX));
    let until_ms = timeout_ms.map(|timeout_ms| app.env.now_ms().saturating_add(timeout_ms));
    let word = until_ms.map(|until_ms| Word { device: caller.device, until_ms });
    let user_id = caller.user_id.to_string();
    let (changed, began) =
        app.ephemeral.change(|board, number| (board.typing.set(num, &user_id, word, number), number));
    if changed {
        typists::wake_room(app, num).await?;
        if let Some(until_ms) = until_ms {
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
        let (changed, later_ms) = app.ephemeral.change(|board, number| {
            let changed = board.typing.expire(num, now_ms, number);
            (changed, board.typing.until_ms(num, user_id, began))
        });
        if changed && let Err(error) = typists::wake_room(app, num).await {
            tracing::warn!(%error, "nobody was told that somebody stopped typing");
        }
        match later_ms {
            Some(later_ms) => until_ms = later_ms,
            None => return,
        }
    }
}
