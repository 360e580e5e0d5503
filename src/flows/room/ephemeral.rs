//! Receipts, typing, presence: what is told often and matters little when it is lost.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use ruma::{
    EventId, OwnedEventId, OwnedRoomId, RoomId, UserId, events::receipt::ReceiptThread,
    presence::PresenceState,
};

use crate::{
    accounts::{
        self, Caller,
        presence::{ONLINE_MS, Presence, STATUS_BYTES_MAX},
    },
    error::{Error, Refusal, Result},
    flows::{App, account::keep, write},
    ids::{RoomNum, UserNum},
    push::unread,
    rooms::{
        self,
        event::{self, Stored},
        members,
        receipts::{self, MAIN_THREAD, Receipt},
        relations,
        typing::TYPING_MS_MAX,
    },
    schema::receipts::{ReceiptKey, ReceiptKind},
    store::{Snapshot, Store},
    sync::Notifier,
};

/// Receipts are gathered for this long, unless none was written for as long.
const MERGE: Duration = Duration::from_millis(200);
/// Receipts in one batch: each may sweep away some hundred rows, and no batch has more than 5,000.
const BATCH_RECEIPTS: usize = 20;
/// Receipts that wait; whoever sends more is told to come back.
const WAITING_MAX: usize = 50_000;

type Waiting = BTreeMap<(RoomNum, String, ReceiptKind, String), Receipt>;

/// Receipts on their way to the store. Cheap to clone.
#[derive(Clone, Default)]
pub struct Receipts(Arc<Mutex<Gathered>>);

#[derive(Default)]
struct Gathered {
    waiting: Waiting,
    /// A task writes them.
    is_writing: bool,
}

/// The number of a room that the caller is in. Refuses any other: 403 `M_FORBIDDEN`.
fn require_joined(read: &Snapshot, user: UserNum, room: &RoomId) -> Result<RoomNum> {
    let not_in_room = || Error::from(Refusal::forbidden("You are not in this room."));
    let num = rooms::find_room(read, room)?.ok_or_else(not_in_room)?;
    if members::is_joined(read, user, num)? { Ok(num) } else { Err(not_in_room()) }
}

/// Refuses rooms that the caller is not in: 403 `M_FORBIDDEN`.
pub fn require_in_room(app: &App, caller: &Caller, room: &RoomId) -> Result<()> {
    require_joined(&app.store.snapshot(), caller.user, room).map(|_| ())
}

/// An event of a room that the caller is in. Refuses other rooms (403) and unknown events (404).
fn require_event(
    snapshot: &Snapshot,
    caller: &Caller,
    room: &RoomId,
    id: &EventId,
) -> Result<(RoomNum, Stored)> {
    let num = require_joined(snapshot, caller.user, room)?;
    let stored = event::find_by_id(snapshot, num, id)?;
    Ok((num, stored.ok_or_else(|| Refusal::not_found("This room has no such event."))?))
}

/// Refuses a receipt for a thread that the event does not stand in: 400 `M_INVALID_PARAM`.
fn require_in_thread(
    snapshot: &Snapshot,
    num: RoomNum,
    id: &EventId,
    stored: &Stored,
    thread: &ReceiptThread,
) -> Result<()> {
    let fits = match thread {
        ReceiptThread::Main => relations::thread_of(snapshot, num, stored)?.is_none(),
        ReceiptThread::Thread(root) => {
            root == id || relations::thread_of(snapshot, num, stored)?.as_ref() == Some(root)
        }
        _ => true,
    };
    if fits { Ok(()) } else { Err(Refusal::invalid_param("The event does not stand in that thread.").into()) }
}

/// A user has read up to an event. It is stored within [`MERGE`]; a crash before that loses it.
///
/// Refuses rooms that the user is not in (403), unknown events (404), and threads that are none (400).
pub async fn send_receipt(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    kind: ReceiptKind,
    event: OwnedEventId,
    thread: &ReceiptThread,
) -> Result<()> {
    let snapshot = app.store.snapshot();
    let (num, stored) = require_event(&snapshot, caller, room, &event)?;
    require_in_thread(&snapshot, num, &event, &stored, thread)?;
    let thread = match thread {
        ReceiptThread::Unthreaded => String::new(),
        ReceiptThread::Main => MAIN_THREAD.to_owned(),
        ReceiptThread::Thread(root) => root.to_string(),
        _ => return Err(Refusal::invalid_param("The thread id is neither \"main\" nor an event id.").into()),
    };
    let order = stored.order;
    let user = caller.user_id.to_string();
    let receipt = Receipt {
        room: num,
        key: ReceiptKey { user: user.clone(), kind, thread: thread.clone() },
        event_id: event.into(),
        order,
        sent_ms: app.env.now_ms(),
    };
    let starts = {
        let mut gathered = app.receipts.0.lock();
        if gathered.waiting.len() >= WAITING_MAX {
            return Err(Error::Busy { retry_after: MERGE });
        }
        let key = (num, user, kind, thread);
        if gathered.waiting.get(&key).is_none_or(|waiting| waiting.order < order) {
            gathered.waiting.insert(key, receipt);
        }
        !std::mem::replace(&mut gathered.is_writing, true)
    };
    if starts {
        let app = app.clone();
        let env = app.env.clone();
        env.spawn(async move { write_receipts(&app).await });
    }
    Ok(())
}

/// Where the user means to go on reading: account data `m.fully_read` of the room. It is durable when this returns.
///
/// Refuses rooms that the user is not in (403) and unknown events (404).
pub async fn set_fully_read(app: &App, caller: &Caller, room: OwnedRoomId, event: &EventId) -> Result<()> {
    require_event(&app.store.snapshot(), caller, &room, event)?;
    let content = serde_json::json!({ "event_id": event }).to_string();
    keep::keep_account_data(app, caller, Some(room), "m.fully_read".to_owned(), content.into()).await
}

/// Writes what has gathered, at most once each [`MERGE`], until nothing more comes.
async fn write_receipts(app: &App) {
    loop {
        let waiting = {
            let mut gathered = app.receipts.0.lock();
            if gathered.waiting.is_empty() {
                gathered.is_writing = false;
                return;
            }
            std::mem::take(&mut gathered.waiting)
        };
        let (store, notifier) = (app.store.clone(), app.notifier.clone());
        let written = app.env.blocking(move || write_batches(&store, &notifier, waiting)).await;
        if let Err(error) = written {
            tracing::warn!(%error, "receipts were lost");
        }
        app.env.sleep(MERGE).await;
    }
}

fn write_batches(store: &Store, notifier: &Notifier, waiting: Waiting) -> Result<()> {
    let mut waiting = waiting.into_values().peekable();
    while waiting.peek().is_some() {
        let mut batch = store.batch();
        let mut rooms = Vec::new();
        for receipt in waiting.by_ref().take(BATCH_RECEIPTS) {
            if receipts::keep(&mut batch, &receipt)? {
                rooms.push(receipt.room);
                if receipt.key.thread.is_empty()
                    && let Ok(user_id) = <&UserId>::try_from(receipt.key.user.as_str())
                    && let Some(user) = accounts::users::find_num(&batch, user_id)?
                {
                    unread::forget_read(&mut batch, receipt.room, user, receipt.order)?;
                }
            }
        }
        if !batch.is_commit() {
            continue;
        }
        rooms.dedup();
        let mut users = Vec::new();
        for room in rooms {
            users.extend(members::list_joined_local_users(&batch, room)?);
        }
        let notifier = notifier.clone();
        batch.on_publish(move |_| notifier.wake_users(users));
        // Nobody waits for the disk: a receipt that is lost is sent again with the next one.
        drop(store.enqueue(batch)?);
    }
    Ok(())
}

/// The user types in a room, for so long; or (`None`) no longer. Refuses rooms that the user is not in: 403.
pub async fn set_typing(app: &App, caller: &Caller, room: &RoomId, timeout: Option<Duration>) -> Result<()> {
    let num = require_joined(&app.store.snapshot(), caller.user, room)?;
    let timeout_ms =
        timeout.map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).min(TYPING_MS_MAX));
    let until_ms = timeout_ms.map(|timeout_ms| app.env.now_ms().saturating_add(timeout_ms));
    let user_id = caller.user_id.to_string();
    let (changed, began) =
        app.ephemeral.change(|board, number| (board.typing.set(num, &user_id, until_ms, number), number));
    if changed {
        wake_room(app, num).await?;
        if let Some(until_ms) = until_ms {
            let app = app.clone();
            let env = app.env.clone();
            env.spawn(async move { expire_typing(&app, num, &user_id, began, until_ms).await });
        }
    }
    Ok(())
}

/// Waits until somebody who began to type would have stopped, and again as long as they go on.
async fn expire_typing(app: &App, num: RoomNum, user_id: &str, began: u64, mut until_ms: u64) {
    loop {
        let left_ms = until_ms.saturating_sub(app.env.now_ms());
        app.env.sleep(Duration::from_millis(left_ms.max(1))).await;
        let now_ms = app.env.now_ms();
        let (changed, later_ms) = app.ephemeral.change(|board, number| {
            let changed = board.typing.expire(num, now_ms, number);
            (changed, board.typing.until_ms(num, user_id, began))
        });
        if changed && let Err(error) = wake_room(app, num).await {
            tracing::warn!(%error, "nobody was told that somebody stopped typing");
        }
        match later_ms {
            Some(later_ms) => until_ms = later_ms,
            None => return,
        }
    }
}

async fn wake_room(app: &App, num: RoomNum) -> Result<()> {
    let (store, notifier) = (app.store.clone(), app.notifier.clone());
    app.env
        .blocking(move || {
            notifier.wake_users(members::list_joined_local_users(&*store.snapshot(), num)?);
            Ok(())
        })
        .await
}

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
