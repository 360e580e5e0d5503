//! Presence: it follows from what users say and do, and those who share a room with them see it.

use std::{sync::Arc, time::Duration};

use ruma::{OwnedUserId, UserId, presence::PresenceState};

use crate::{
    accounts::{
        self, Caller,
        presence::{self, Outcome, Presence, ROOMS_MAX, STATUS_BYTES_MAX, elsewhere::Told},
    },
    delivery::servers,
    env::Env,
    error::{Refusal, Result},
    flows::{App, sharing, write},
    ids::{DeviceNum, RoomNum, UserNum},
    rooms::members,
    store::{Fault, Snapshot},
    sync::{Ephemeral, ephemeral::Board},
};

/// At most this many users are shown as in the last run when the server starts.
const RESTORED_MAX: usize = 20_000;
/// Look this often for users of other servers of whom nothing is heard any more.
const LOOK_FOR_SILENT: Duration = Duration::from_secs(60);

/// Sets how present the caller is. Nothing is kept if the settings turn presence off. Errors: 400 for a state that Matrix does
/// not have, or a status message that is too long.
pub async fn set_presence(
    app: &App,
    caller: &Caller,
    state: PresenceState,
    status_msg: Option<String>,
) -> Result<()> {
    require_known(&state)?;
    if status_msg.as_ref().is_some_and(|message| message.len() > STATUS_BYTES_MAX) {
        let why = format!("`status_msg` has at most {STATUS_BYTES_MAX} bytes.");
        return Err(Refusal::invalid_param(why).into());
    }
    if app.config.presence.enabled {
        let now_ms = app.env.now_ms();
        let outcome = app
            .ephemeral
            .update(|board| board.presence.set(caller.user, caller.device, state, status_msg, now_ms));
        follow(app, caller.user, outcome).await;
    }
    Ok(())
}

/// Refuses a state that Matrix does not have with 400 `M_INVALID_PARAM`.
fn require_known(state: &PresenceState) -> Result<(), Refusal> {
    match state {
        PresenceState::Online | PresenceState::Unavailable | PresenceState::Offline => Ok(()),
        _ => Err(Refusal::invalid_param("Presence is `online`, `unavailable` or `offline`.")),
    }
}

/// The presence of a user: one's own as it is, and that of others as it was told. Errors: 403 for a caller who shares no room
/// with that user, 404 for an unknown user.
pub async fn find_presence(app: &App, caller: &Caller, user_id: &UserId) -> Result<Presence> {
    let (owned, asks, user_id) = (app.clone(), caller.user, user_id.to_owned());
    let find = move || {
        let snapshot = owned.store.snapshot();
        let Some(user) = accounts::users::find_num(&*snapshot, &user_id)? else {
            return find_elsewhere(&owned, &snapshot, asks, &user_id);
        };
        if user == asks {
            let now_ms = owned.env.now_ms();
            return Ok(owned.ephemeral.read(|board| board.presence.find_own(user, now_ms)));
        }
        if !members::share_room(&*snapshot, asks, user)? {
            return Err(Refusal::forbidden("You share no room with this user.").into());
        }
        Ok(owned.ephemeral.read(|board| board.presence.find(user)))
    };
    Ok(app.env.blocking(find).await?.unwrap_or_else(Presence::unknown))
}

/// The presence of a user of another server, who must be in a room of the caller's. Errors: 404 `M_NOT_FOUND` for one who is not
/// known; 403 `M_FORBIDDEN` for one who is in none of the caller's rooms.
fn find_elsewhere(
    app: &App,
    snapshot: &Snapshot,
    asks: UserNum,
    user_id: &UserId,
) -> Result<Option<Presence>> {
    let told = app.ephemeral.read(|board| board.elsewhere.find(user_id));
    if *user_id.server_name() == *app.config.server.name || told.is_none() {
        return Err(Refusal::not_found("There is no such user here.").into());
    }
    for room in members::list_joined_rooms(snapshot, asks)? {
        if members::is_user_joined(snapshot, room, user_id.as_str())? {
            return Ok(told);
        }
    }
    Err(Refusal::forbidden("You share no room with this user.").into())
}

/// Shows those who share a room with a user of another server what that server says of the user's presence.
pub(crate) async fn tell_elsewhere(app: &App, user_id: OwnedUserId, said: Presence) -> Result<()> {
    if !app.config.presence.enabled {
        return Ok(());
    }
    let owned = app.clone();
    let say = move || {
        let now_ms = owned.env.now_ms();
        let needs_rooms = owned.ephemeral.read(|board| board.elsewhere.needs_rooms(&user_id, now_ms));
        let find = || members::list_rooms_of_other(&*owned.store.snapshot(), user_id.as_str());
        let mut rooms = needs_rooms.then(find).transpose()?;
        rooms.iter_mut().for_each(|rooms| rooms.truncate(ROOMS_MAX));
        let rooms = rooms.map(Arc::from);
        let (_, told) = owned.ephemeral.change(|board, number| {
            let told = board.elsewhere.say(&user_id, said, rooms, now_ms, number);
            (matches!(told, Told::Now(_)), told)
        });
        follow_elsewhere(&owned, user_id, told);
        if owned.ephemeral.update(|board| board.elsewhere.begin_watch()) {
            let watching = owned.clone();
            owned.env.spawn(async move { watch_elsewhere(&watching).await });
        }
        Ok(())
    };
    app.env.blocking(say).await
}

/// Wakes those who see a difference, or lets a task show it when it may be shown.
fn follow_elsewhere(app: &App, user_id: OwnedUserId, told: Told) {
    match told {
        Told::Nothing => {}
        Told::Now(rooms) => sharing::wake_in_rooms(app, rooms),
        Told::Later(due_ms) => {
            let owned = app.clone();
            app.env.spawn(async move {
                let left_ms = due_ms.saturating_sub(owned.env.now_ms());
                owned.env.sleep(Duration::from_millis(left_ms.max(1))).await;
                let now_ms = owned.env.now_ms();
                let (_, told) = owned.ephemeral.change(|board, number| {
                    let told = board.elsewhere.tell_later(&user_id, now_ms, number);
                    (matches!(told, Told::Now(_)), told)
                });
                // A clock that went back has the time come later still.
                follow_elsewhere(&owned, user_id, told);
            });
        }
    }
}

/// Shows users of other servers as offline of whom nothing is heard any more, until none is left who is not.
async fn watch_elsewhere(app: &App) {
    loop {
        app.env.sleep(LOOK_FOR_SILENT).await;
        let now_ms = app.env.now_ms();
        let silent = app.ephemeral.update(|board| board.elsewhere.list_silent(now_ms));
        let Some(silent) = silent else { return };
        for user_id in silent {
            let (_, told) = app.ephemeral.change(|board, number| {
                let gone = board.elsewhere.find(&user_id).unwrap_or_else(Presence::unknown);
                let gone = Presence { state: PresenceState::Offline, ..gone };
                let told = board.elsewhere.say(&user_id, gone, None, now_ms, number);
                (matches!(told, Told::Now(_)), told)
            });
            follow_elsewhere(app, user_id, told);
        }
    }
}

/// Tells those who share a room with a user of the user's new display name or avatar, with the user's presence
/// (<https://spec.matrix.org/v1.19/client-server-api/#events-on-change-of-profile-information>).
pub(crate) async fn tell_profile(app: &App, user: UserNum) -> Result<()> {
    if app.config.presence.enabled {
        let profile = Arc::new(accounts::profiles::read_shown(&*app.store.snapshot(), user)?);
        let now_ms = app.env.now_ms();
        let outcome = app.ephemeral.update(|board| board.presence.rename(user, profile, now_ms));
        follow(app, user, outcome).await;
    }
    Ok(())
}

/// A poll whose user is present while it lasts, and a while longer. Dropping this ends the poll.
pub struct PresentPoll {
    app: App,
    user: UserNum,
    device: DeviceNum,
}

impl Drop for PresentPoll {
    fn drop(&mut self) {
        let now_ms = self.app.env.now_ms();
        let (user, device) = (self.user, self.device);
        self.app.ephemeral.update(|board| board.presence.poll_ends(user, device, now_ms));
    }
}

/// Begins a poll that says how present its user is. Errors: 400 `M_INVALID_PARAM` for a state that Matrix does not have.
pub async fn begin_poll(app: &App, caller: &Caller, state: PresenceState) -> Result<Option<PresentPoll>> {
    require_known(&state)?;
    // The state `offline` means that the poll says nothing about its user, and nobody is shown what a suspended user does.
    if !app.config.presence.enabled || state == PresenceState::Offline || caller.is_suspended {
        return Ok(None);
    }
    let (user, device, now_ms) = (caller.user, caller.device, app.env.now_ms());
    let outcome = app.ephemeral.update(|board| board.presence.poll_begins(user, device, state, now_ms));
    let poll = PresentPoll { app: app.clone(), user, device };
    follow(app, user, outcome).await;
    Ok(Some(poll))
}

/// Notes that the user did something of their own accord, such as sending a message. This costs next to nothing if it changes
/// nothing for others.
pub fn note_active(app: &App, caller: &Caller) {
    if !app.config.presence.enabled || caller.is_suspended {
        return;
    }
    let now_ms = app.env.now_ms();
    let outcome = app.ephemeral.update(|board| board.presence.acts(caller.user, caller.device, now_ms));
    if outcome != Outcome::default() {
        let (app, user) = (app.clone(), caller.user);
        let env = app.env.clone();
        env.spawn(async move { follow(&app, user, outcome).await });
    }
}

/// Tells others if that is due, and watches for changes that come with time. A failure to tell others is no reason to refuse
/// the user's request, so it is only logged.
async fn follow(app: &App, user: UserNum, outcome: Outcome) {
    if let Some(due_ms) = outcome.watch_ms {
        let app = app.clone();
        let env = app.env.clone();
        env.spawn(async move { watch(&app, user, due_ms).await });
    }
    if outcome.is_due
        && let Err(error) = tell(app, user).await
    {
        tracing::warn!(%error, "others were not told how present a user is");
    }
}

/// Looks at a user's presence whenever it may change with time, until no such change is left.
async fn watch(app: &App, user: UserNum, mut due_ms: u64) {
    loop {
        let left_ms = due_ms.saturating_sub(app.env.now_ms());
        app.env.sleep(Duration::from_millis(left_ms.max(1))).await;
        let now_ms = app.env.now_ms();
        let outcome = app.ephemeral.update(|board| board.presence.look_again(user, due_ms, now_ms));
        if outcome.is_due
            && let Err(error) = tell(app, user).await
        {
            tracing::warn!(%error, "others were not told how present a user is");
        }
        match outcome.watch_ms {
            Some(later_ms) => due_ms = later_ms,
            None => return,
        }
    }
}

/// Shows the user's presence to those who share a room with the user, and wakes their polls. The user's own polls are not
/// woken, for they would answer each time that their user polls.
async fn tell(app: &App, user: UserNum) -> Result<()> {
    let owned = app.clone();
    let is_told = app
        .env
        .blocking(move || {
            let snapshot = owned.store.snapshot();
            let rooms = list_rooms(&snapshot, user)?;
            let now_ms = owned.env.now_ms();
            let (is_told, ()) = owned
                .ephemeral
                .change(|board, number| (board.presence.tell(user, rooms, now_ms, number), ()));
            if is_told {
                tell_servers(&owned, &snapshot, user)?;
                sharing::wake_those_who_wait(&owned, &snapshot, user)?;
            }
            Ok(is_told)
        })
        .await?;
    if is_told {
        keep(app, user).await;
    }
    Ok(())
}

/// Shows the user's presence to the servers that share a room with the user, where the settings let them see it.
fn tell_servers(app: &App, read: &Snapshot, user: UserNum) -> Result<()> {
    let told = app.ephemeral.read(|board| board.presence.find(user));
    let (true, Some(told)) = (app.config.federation.presence, told) else { return Ok(()) };
    let told = told_at(told, app.env.now_ms());
    app.delivery.presence(user, accounts::users::require(read, user)?.user_id, told);
    Ok(())
}

/// A user's presence, as other servers are told of it at this time.
fn told_at(told: Presence, now_ms: u64) -> servers::Told {
    servers::Told {
        state: told.state.to_string(),
        is_active: told.is_active(now_ms),
        active_ms_ago: (told.last_active_ms > 0).then(|| now_ms.saturating_sub(told.last_active_ms)),
        status_msg: told.status_msg,
    }
}

/// The presence of users, as the reader finds it that tells other servers of whom they come to share a room with.
pub(crate) struct Shown {
    env: Env,
    ephemeral: Ephemeral,
    are_shown: bool,
}

impl Shown {
    pub(crate) fn of(app: &App) -> Self {
        let are_shown = app.config.presence.enabled && app.config.federation.presence;
        Self { env: app.env.clone(), ephemeral: app.ephemeral.clone(), are_shown }
    }
}

impl servers::People for Shown {
    fn presence(&self, user: UserNum) -> Option<servers::Told> {
        let told = self.ephemeral.read(|board| board.presence.find(user)).filter(|_| self.are_shown)?;
        // Those who are not told of somebody take them to be offline.
        (told.state != PresenceState::Offline).then(|| told_at(told, self.env.now_ms()))
    }

    fn met(&self, other: &UserId, room: RoomNum) {
        self.ephemeral.update(|board| board.elsewhere.came_into(other, room));
    }
}

fn list_rooms(read: &Snapshot, user: UserNum) -> Result<Arc<[RoomNum]>, Fault> {
    let mut rooms = members::list_joined_rooms(read, user)?;
    rooms.truncate(ROOMS_MAX);
    rooms.sort_unstable();
    Ok(rooms.into())
}

/// Keeps what others were just told of a user, for the next run of the server. Nobody waits for it.
async fn keep(app: &App, user: UserNum) {
    let kept = write::note_for_user(app, user, move |app, note| {
        let account = accounts::users::find(&app.store.view(), user)?;
        // Two tasks may keep the presence of one user: the last one keeps the newest.
        let told = app.ephemeral.read(|board| board.presence.find(user));
        match (account, told) {
            (Some(account), Some(told)) if !account.is_deactivated => {
                presence::kept::keep(note, user, &told);
            }
            _ => presence::kept::forget(note, user),
        }
        Ok(())
    });
    if let Err(error) = kept.await {
        tracing::debug!(%error, %user, "the presence of a user is not kept for the next run of the server");
    }
}

/// Puts the users on the board whom others were told of when the last run of the server ended. Those who do not come back go
/// offline for others as at any other time. Without this, other clients would show them online for ever.
pub async fn restore(app: &App) {
    if !app.config.presence.enabled {
        return;
    }
    let owned = app.clone();
    let restored = app.env.blocking(move || {
        let now_ms = owned.env.now_ms();
        let told = presence::kept::list(&*owned.store.snapshot(), RESTORED_MAX)?;
        Ok(told
            .into_iter()
            .map(|(user, told)| {
                let restore = |board: &mut Board| board.presence.restore(user, told, now_ms);
                (user, owned.ephemeral.update(restore))
            })
            .collect::<Vec<_>>())
    });
    match restored.await {
        Ok(restored) => {
            for (user, outcome) in restored {
                follow(app, user, outcome).await;
            }
        }
        Err(error) => tracing::warn!(%error, "the presence of users before the start could not be read"),
    }
}
