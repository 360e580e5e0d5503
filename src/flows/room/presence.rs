//! A user is there, or has gone: told to those who share a room, and never stored.

use std::time::Duration;

use ruma::{UserId, presence::PresenceState};

use crate::{
    accounts::{
        self, Caller,
        presence::{ONLINE_MS, Presence, STATUS_BYTES_MAX},
    },
    error::{Refusal, Result},
    flows::{App, write},
    ids::UserNum,
    rooms::members,
};

/// The user says how present they are. Refuses states that Matrix does not have, and long messages: 400.
pub async fn set_presence(
    app: &App,
    caller: &Caller,
    state: PresenceState,
    status_msg: Option<String>,
) -> Result<()> {
    require_known(&state)?;
    if status_msg.as_ref().is_some_and(|message| message.len() > STATUS_BYTES_MAX) {
        return Err(Refusal::invalid_param("The status message is too long.").into());
    }
    let now_ms = app.env.now_ms();
    let (changed, unwatched) = app.ephemeral.change(|board, number| {
        let changed = board.presence.set(caller.user, state, status_msg, now_ms, number);
        (changed, board.presence.begin_watch(caller.user))
    });
    tell_presence(app, caller.user, changed, unwatched).await
}

/// Refuses states that Matrix does not have: 400 `M_INVALID_PARAM`.
pub fn require_known(state: &PresenceState) -> Result<(), Refusal> {
    match state {
        PresenceState::Online | PresenceState::Unavailable | PresenceState::Offline => Ok(()),
        _ => Err(Refusal::invalid_param("There is no such state of presence.")),
    }
}

/// How present a user is. Refuses (403) to tell those who share no room with that user, and unknown users (404).
pub fn find_presence(app: &App, caller: &Caller, user_id: &UserId) -> Result<Presence> {
    let snapshot = app.store.snapshot();
    let user = accounts::users::find_num(&*snapshot, user_id)?
        .ok_or_else(|| Refusal::not_found("There is no such user here."))?;
    if user != caller.user {
        let own = members::list_joined_rooms(&*snapshot, caller.user)?;
        let theirs = members::list_joined_rooms(&*snapshot, user)?;
        if !own.iter().any(|room| theirs.contains(room)) {
            return Err(Refusal::forbidden("You share no room with this user.").into());
        }
    }
    let gone = || Presence { state: PresenceState::Offline, status_msg: None, last_active_ms: 0 };
    Ok(app.ephemeral.read(|board| board.presence.find(user)).unwrap_or_else(gone))
}

/// A poll of a user who is present while it lasts, and a while longer.
pub struct PresentPoll {
    app: App,
    user: UserNum,
}

impl Drop for PresentPoll {
    fn drop(&mut self) {
        let now_ms = self.app.env.now_ms();
        let user = self.user;
        self.app.ephemeral.change(|board, _| {
            board.presence.poll_ends(user, now_ms);
            (false, ())
        });
    }
}

/// A poll begins that says how present its user is; nothing, if it says offline.
pub async fn begin_poll(app: &App, user: UserNum, state: PresenceState) -> Result<Option<PresentPoll>> {
    require_known(&state)?;
    if state == PresenceState::Offline {
        return Ok(None);
    }
    let now_ms = app.env.now_ms();
    let (changed, unwatched) = app.ephemeral.change(|board, number| {
        let changed = board.presence.poll_begins(user, state, now_ms, number);
        (changed, board.presence.begin_watch(user))
    });
    let poll = PresentPoll { app: app.clone(), user };
    tell_presence(app, user, changed, unwatched).await?;
    Ok(Some(poll))
}

/// Wakes those who share a room with a user whose presence changed; watches for the end of it, if nobody does yet.
async fn tell_presence(app: &App, user: UserNum, changed: bool, unwatched: bool) -> Result<()> {
    if unwatched {
        let app = app.clone();
        let env = app.env.clone();
        env.spawn(async move { watch_presence(&app, user).await });
    }
    if changed { wake_sharing(app, user).await } else { Ok(()) }
}

async fn watch_presence(app: &App, user: UserNum) {
    let mut wait_ms = ONLINE_MS;
    loop {
        app.env.sleep(Duration::from_millis(wait_ms.max(1))).await;
        let now_ms = app.env.now_ms();
        let (changed, due_ms) =
            app.ephemeral.change(|board, number| board.presence.expire(user, now_ms, number));
        if changed && let Err(error) = wake_sharing(app, user).await {
            tracing::warn!(%error, "nobody was told that somebody is gone");
        }
        match due_ms {
            Some(due_ms) => wait_ms = due_ms.saturating_sub(now_ms),
            None => return,
        }
    }
}

async fn wake_sharing(app: &App, user: UserNum) -> Result<()> {
    let (store, notifier) = (app.store.clone(), app.notifier.clone());
    app.env
        .blocking(move || {
            notifier.wake_users(write::list_sharing(&*store.snapshot(), user)?);
            Ok(())
        })
        .await
}
