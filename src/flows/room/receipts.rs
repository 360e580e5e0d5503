//! A user has read up to an event. Receipts are gathered for a moment and written together: many come at once, and only the
//! newest of each matters.

use std::{collections::BTreeMap, future::ready, sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use parking_lot::Mutex;
use ruma::{EventId, OwnedEventId, OwnedRoomId, RoomId, UserId, events::receipt::ReceiptThread};

use crate::{
    accounts::{self, Caller},
    error::{Error, Refusal, Result},
    flows::{App, account::keep, commit, room::require_joined},
    ids::RoomNum,
    push::unread,
    rooms::{
        event::{self, Stored},
        receipts::{self, MAIN_THREAD, Receipt},
        relations,
    },
    schema::receipts::{ReceiptKey, ReceiptKind},
    store::{Batch, Fault, Snapshot},
};

/// Receipts are gathered for this long, unless none was written for as long.
const MERGE: Duration = Duration::from_millis(200);
/// Receipts in one batch: each may sweep away some hundred rows, and no batch has more than 5,000.
const BATCH_RECEIPTS: usize = 20;
/// Rooms whose receipts are written at once.
const ROOMS_AT_ONCE: usize = 64;
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
        let mut rooms: BTreeMap<RoomNum, Vec<Receipt>> = BTreeMap::new();
        for receipt in waiting.into_values() {
            rooms.entry(receipt.room).or_default().push(receipt);
        }
        let writing = rooms.into_iter().map(|(room, receipts)| write_in_room(app, room, receipts));
        stream::iter(writing).buffer_unordered(ROOMS_AT_ONCE).for_each(|()| ready(())).await;
        app.env.sleep(MERGE).await;
    }
}

/// Writes receipts in turns of their room, some in each.
async fn write_in_room(app: &App, room: RoomNum, mut receipts: Vec<Receipt>) {
    while !receipts.is_empty() {
        let later = receipts.split_off(receipts.len().min(BATCH_RECEIPTS));
        let some = std::mem::replace(&mut receipts, later);
        let written = commit::in_room(app, room, move |change| {
            some.iter().try_for_each(|receipt| keep_receipt(&mut change.batch, receipt))?;
            Ok(())
        });
        if let Err(error) = written.await {
            tracing::warn!(%error, %room, "receipts were lost");
        }
    }
}

fn keep_receipt(batch: &mut Batch, receipt: &Receipt) -> Result<(), Fault> {
    if receipts::keep(batch, receipt)?
        && receipt.key.thread.is_empty()
        && let Ok(user_id) = <&UserId>::try_from(receipt.key.user.as_str())
        && let Some(user) = accounts::users::find_num(batch, user_id)?
    {
        unread::forget_read(batch, receipt.room, user, receipt.order)?;
    }
    Ok(())
}
