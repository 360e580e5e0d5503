//! Receipts, which say that a user has read up to an event. They are gathered for a moment and written together, because many
//! come at once and only the newest of each kind matters.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::ready,
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt, stream};
use parking_lot::Mutex;
use ruma::{EventId, OwnedEventId, OwnedRoomId, RoomId, events::receipt::ReceiptThread};

use crate::{
    accounts::Caller,
    error::{Error, Refusal, Result},
    flows::{App, account::keep, commit, room::require_joined},
    ids::{RoomNum, UserNum},
    rooms::{
        self,
        event::StoredEvent,
        receipts::{self, MAIN_THREAD, NO_THREAD, Receipt},
        relations,
        view::RoomView,
        visibility::Sight,
    },
    schema::receipts::{ReceiptKey, ReceiptKind},
    store::Snapshot,
};

/// Receipts are written at most once in this time; the first one after a pause is written at once.
const MERGE: Duration = Duration::from_millis(200);
/// A batch has at most this many receipts: each writes and deletes up to four rows, and no batch has more than 5,000.
const BATCH_RECEIPTS: usize = 500;
/// The receipts of at most this many rooms are written at the same time.
const ROOMS_AT_ONCE: usize = 64;
/// At most this many receipts wait to be written; further ones are refused with a time to try again.
const WAITING_MAX: usize = 50_000;

/// The key of a receipt: a newer receipt with the same key replaces an older one.
type Key = (UserNum, RoomNum, ReceiptKind, String);
type Waiting = BTreeMap<Key, Receipt>;

/// The receipts on their way to the store, which clones of this share.
#[derive(Clone, Default)]
pub struct Receipts(Arc<Inner>);

#[derive(Default)]
struct Inner {
    gathered: Mutex<Gathered>,
    /// Held by the task that writes, so that a receipt never overtakes an older one.
    writing: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Gathered {
    waiting: Waiting,
    /// Users whose receipts are being written and may not be visible yet.
    in_flight: BTreeSet<UserNum>,
    /// Whether a task runs that writes the waiting receipts.
    has_writer: bool,
}

impl Receipts {
    /// Adds a receipt to those that wait. Answers whether a task must be started that writes them.
    fn add(&self, key: Key, receipt: Receipt) -> Result<bool> {
        let mut gathered = self.0.gathered.lock();
        match gathered.waiting.get(&key) {
            Some(waiting) if waiting.order >= receipt.order => {}
            None if gathered.waiting.len() >= WAITING_MAX => {
                tracing::debug!(user = %key.0, reason = "too many receipts wait", "a receipt is refused");
                return Err(Error::Busy { retry_after: MERGE });
            }
            _ => drop(gathered.waiting.insert(key, receipt)),
        }
        Ok(!std::mem::replace(&mut gathered.has_writer, true))
    }

    /// Takes all receipts that wait. If none waits, answers none, and the writing task ends.
    fn take_all(&self) -> Option<Waiting> {
        let mut gathered = self.0.gathered.lock();
        if gathered.waiting.is_empty() {
            gathered.has_writer = false;
            return None;
        }
        let all = std::mem::take(&mut gathered.waiting);
        gathered.in_flight.extend(all.keys().map(|(user, ..)| *user));
        Some(all)
    }

    /// Takes the receipts of one user that wait.
    fn take_of(&self, user: UserNum) -> Waiting {
        let mut gathered = self.0.gathered.lock();
        let begin = (user, RoomNum(0), ReceiptKind::Public, String::new());
        let keys: Vec<Key> = gathered
            .waiting
            .range(begin..)
            .map(|(key, _)| key.clone())
            .take_while(|key| key.0 == user)
            .collect();
        let own: Waiting = keys.into_iter().filter_map(|key| gathered.waiting.remove_entry(&key)).collect();
        if !own.is_empty() {
            gathered.in_flight.insert(user);
        }
        own
    }

    fn are_visible(&self) {
        self.0.gathered.lock().in_flight.clear();
    }

    /// Whether a receipt of this user waits or is being written.
    fn has_of(&self, user: UserNum) -> bool {
        let gathered = self.0.gathered.lock();
        let begin = (user, RoomNum(0), ReceiptKind::Public, String::new());
        gathered.in_flight.contains(&user)
            || gathered.waiting.range(begin..).next().is_some_and(|(key, _)| key.0 == user)
    }
}

/// An event of a room that the caller is in. Refuses other rooms (403), and with one answer (404) unknown events and
/// those that the caller may not see: nobody learns so whether an event is there.
fn require_event(
    snapshot: &Snapshot,
    caller: &Caller,
    room: &RoomId,
    id: &EventId,
) -> Result<(RoomNum, StoredEvent)> {
    let num = require_joined(snapshot, caller.user, room)?;
    let stored = Sight::of(snapshot, num, caller.user, &caller.user_id)?.find(snapshot, id)?;
    Ok((num, stored.ok_or_else(|| Refusal::not_found("This room has no such event."))?))
}

/// Refuses a receipt for a thread that the event does not stand in: 400 `M_INVALID_PARAM`. A thread's root stands in the
/// main timeline and may be read in its thread as well.
fn require_in_thread(
    snapshot: &Snapshot,
    caller: &Caller,
    num: RoomNum,
    stored: &StoredEvent,
    thread: &ReceiptThread,
) -> Result<()> {
    if !matches!(thread, ReceiptThread::Main | ReceiptThread::Thread(_)) {
        return Ok(());
    }
    let row = rooms::require_row(snapshot, num)?;
    let mut sight = Sight::of(snapshot, num, caller.user, &caller.user_id)?;
    let view = RoomView { read: snapshot, num, row: &row };
    let stands_in = relations::find_thread_seen(view, &mut sight, stored)?;
    let fits = match thread {
        ReceiptThread::Thread(root) => stands_in.as_ref() == Some(root) || stored.id(&row) == *root,
        _ => stands_in.is_none(),
    };
    if fits {
        return Ok(());
    }
    Err(Refusal::invalid_param("The event does not stand in the thread that `thread_id` names.").into())
}

/// Notes that a user has read up to an event. It is written within [`MERGE`], and a crash before that loses it; the user's own
/// next sync sees it in any case.
///
/// Errors: 403 for a room that the user is not in, 404 for an unknown event, 400 for a thread that does not hold the event.
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
    require_in_thread(&snapshot, caller, num, &stored, thread)?;
    let thread = match thread {
        ReceiptThread::Unthreaded => NO_THREAD.to_owned(),
        ReceiptThread::Main => MAIN_THREAD.to_owned(),
        ReceiptThread::Thread(root) => root.to_string(),
        _ => return Err(Refusal::invalid_param("`thread_id` is neither \"main\" nor an event id.").into()),
    };
    let receipt = Receipt {
        room: num,
        key: ReceiptKey { user: caller.user_id.to_string(), kind, thread: thread.clone() },
        event_id: event.into(),
        order: stored.order,
        sent_ms: app.env.now_ms(),
    };
    if app.receipts.add((caller.user, num, kind, thread), receipt)? {
        let app = app.clone();
        let env = app.env.clone();
        env.spawn(async move { write_gathered(&app).await });
    }
    Ok(())
}

/// Moves the marker up to which the user has read everything: account data `m.fully_read` of the room. It is durable when
/// this returns.
///
/// Errors: 403 for a room that the user is not in, 404 for an unknown event.
pub async fn set_fully_read(app: &App, caller: &Caller, room: OwnedRoomId, event: &EventId) -> Result<()> {
    require_event(&app.store.snapshot(), caller, &room, event)?;
    let content = serde_json::json!({ "event_id": event }).to_string();
    keep::keep_account_data(app, caller, Some(room), "m.fully_read".to_owned(), content.into()).await
}

/// Writes the waiting receipts of one user, and returns when they are visible, so that a client finds its own receipt in its
/// next sync.
pub(crate) async fn settle(app: &App, user: UserNum) {
    if app.receipts.has_of(user) {
        let _writing = app.receipts.0.writing.lock().await;
        write(app, app.receipts.take_of(user)).await;
    }
}

/// Writes all waiting receipts, and returns when they are visible. It is called when the server stops.
pub(crate) async fn write_out(app: &App) {
    let _writing = app.receipts.0.writing.lock().await;
    if let Some(all) = app.receipts.take_all() {
        write(app, all).await;
    }
}

/// Writes the gathered receipts, at most once in each [`MERGE`], until no more come.
async fn write_gathered(app: &App) {
    loop {
        {
            let _writing = app.receipts.0.writing.lock().await;
            let Some(waiting) = app.receipts.take_all() else { return };
            write(app, waiting).await;
        }
        app.env.sleep(MERGE).await;
    }
}

async fn write(app: &App, waiting: Waiting) {
    let mut rooms: BTreeMap<RoomNum, Vec<Receipt>> = BTreeMap::new();
    for receipt in waiting.into_values() {
        rooms.entry(receipt.room).or_default().push(receipt);
    }
    let writing = rooms.into_iter().map(|(room, receipts)| write_in_room(app, room, receipts));
    stream::iter(writing).buffer_unordered(ROOMS_AT_ONCE).for_each(|()| ready(())).await;
    app.receipts.are_visible();
}

/// Writes receipts in turns of their room, at most [`BATCH_RECEIPTS`] in each.
async fn write_in_room(app: &App, room: RoomNum, mut receipts: Vec<Receipt>) {
    while !receipts.is_empty() {
        let later = receipts.split_off(receipts.len().min(BATCH_RECEIPTS));
        let some = std::mem::replace(&mut receipts, later);
        let written = commit::in_room(app, room, move |change| {
            for receipt in &some {
                receipts::keep(&mut change.batch, receipt)?;
            }
            Ok(())
        });
        if let Err(error) = written.await {
            tracing::warn!(%error, %room, "receipts were lost");
        }
    }
}
