//! Receipts, which say that a user has read up to an event. They are gathered for a moment and written together, because many
//! come at once and only the newest of each kind matters. Each room has a writer of its own, so that a room whose turn takes
//! long holds up no other.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use ruma::{EventId, OwnedEventId, OwnedRoomId, OwnedUserId, RoomId, events::receipt::ReceiptThread};
use tokio::sync::{Notify, watch};

use crate::{
    accounts::Caller,
    error::{Error, Refusal, Result},
    flows::{App, account::keep, commit, room::require_joined},
    ids::{RoomNum, UserNum},
    rooms::{
        self,
        event::{self, StoredEvent},
        members,
        receipts::{self, MAIN_THREAD, NO_THREAD, Receipt},
        relations,
        view::RoomView,
        visibility::Sight,
    },
    schema,
    schema::event_types::FULLY_READ,
    schema::receipts::{ReceiptKey, ReceiptKind},
    schema::rooms::RoomRow,
    store::{Fault, Snapshot},
};

/// The receipts of a room are written at most once in this time; the first one after a pause is written at once.
const MERGE: Duration = Duration::from_millis(200);
/// A batch has at most this many receipts: each writes and deletes up to four rows, and no batch has more than 5,000.
const BATCH_RECEIPTS: usize = 500;
/// At most this many receipts wait or are being written; further ones are refused with a time to try again.
const UNWRITTEN_MAX: usize = 50_000;
/// A sync waits at most this long for receipts of its user; where a room's turn takes longer, a later sync has them.
const SETTLE_MAX: Duration = Duration::from_secs(1);
/// A server that stops waits at most this long for receipts; those that are left are lost.
const STOP_MAX: Duration = Duration::from_secs(1);

/// The user of a receipt.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Of {
    /// One of our users.
    Ours(UserNum),
    /// A user of another server.
    Other(OwnedUserId),
}

/// The key of a receipt in its room: a newer receipt with the same key replaces an older one.
type Key = (Of, ReceiptKind, String);
/// Whether receipts that are written together are durable; none as long as that is not known.
type Fate = watch::Sender<Option<bool>>;
/// Receipts that are written together, each with its user.
type Batched = Vec<(Of, Receipt)>;

/// The receipts on their way to the store, which clones of this share.
#[derive(Clone, Default)]
pub struct Receipts(Arc<Mutex<Gathered>>);

#[derive(Default)]
struct Gathered {
    /// The rooms that have a writer.
    rooms: BTreeMap<RoomNum, OfRoom>,
    /// The number of receipts that wait or are being written.
    unwritten: usize,
    /// The rooms in which a receipt of a user waits or is being written.
    of_user: BTreeSet<(Of, RoomNum)>,
}

/// The receipts of one room. They are here as long as a task writes them.
#[derive(Default)]
struct OfRoom {
    waiting: BTreeMap<Key, Receipt>,
    /// The users whose receipts are being written and may not be visible yet.
    in_flight: BTreeSet<Of>,
    /// Says, to those who sent what waits, whether it was written.
    fate: Fate,
    signals: Arc<Signals>,
}

#[derive(Default)]
struct Signals {
    /// The writer writes what waits now.
    hurry: Notify,
    /// Receipts of the room became visible.
    written: Notify,
}

impl OfRoom {
    fn has_waiting(&self, user: &Of) -> bool {
        let begin = (user.clone(), ReceiptKind::Public, String::new());
        self.waiting.range(begin..).next().is_some_and(|(key, _)| key.0 == *user)
    }
}

impl Receipts {
    /// Adds a receipt to those that wait. Answers whether a task must be started that writes those of the room, and what
    /// will say whether it was written.
    fn add(
        &self,
        room: RoomNum,
        key: Key,
        receipt: Receipt,
    ) -> Result<(bool, watch::Receiver<Option<bool>>)> {
        let mut gathered = self.0.lock();
        let of_room = gathered.rooms.get(&room);
        match of_room.and_then(|of_room| Some((of_room, of_room.waiting.get(&key)?))) {
            Some((of_room, waiting)) if waiting.order >= receipt.order => {
                return Ok((false, of_room.fate.subscribe()));
            }
            Some(_) => {}
            None if gathered.unwritten >= UNWRITTEN_MAX => {
                tracing::debug!(user = ?key.0, reason = "too many receipts wait", "a receipt is refused");
                return Err(Error::Busy { retry_after: MERGE });
            }
            None => gathered.unwritten += 1,
        }
        gathered.of_user.insert((key.0.clone(), room));
        let needs_writer = !gathered.rooms.contains_key(&room);
        let of_room = gathered.rooms.entry(room).or_default();
        of_room.waiting.insert(key, receipt);
        Ok((needs_writer, of_room.fate.subscribe()))
    }

    /// Takes the receipts of a room that wait. If none waits, answers none, and the room's writer ends.
    fn take(&self, room: RoomNum) -> Option<(Batched, Fate, Arc<Signals>)> {
        let mut gathered = self.0.lock();
        let of_room = gathered.rooms.get_mut(&room)?;
        if of_room.waiting.is_empty() {
            gathered.rooms.remove(&room);
            return None;
        }
        debug_assert!(of_room.in_flight.is_empty(), "a room has one writer");
        let waiting = std::mem::take(&mut of_room.waiting).into_iter();
        let receipts: Batched = waiting.map(|((user, ..), receipt)| (user, receipt)).collect();
        of_room.in_flight = receipts.iter().map(|(user, _)| user.clone()).collect();
        Some((receipts, std::mem::take(&mut of_room.fate), Arc::clone(&of_room.signals)))
    }

    /// Notes that the receipts that were taken are visible, or lost.
    fn are_written(&self, room: RoomNum, count: usize) {
        let mut gathered = self.0.lock();
        debug_assert!(gathered.unwritten >= count, "what is written was counted");
        gathered.unwritten = gathered.unwritten.saturating_sub(count);
        let Gathered { rooms, of_user, .. } = &mut *gathered;
        let Some(of_room) = rooms.get_mut(&room) else { return };
        for user in std::mem::take(&mut of_room.in_flight) {
            if !of_room.has_waiting(&user) {
                of_user.remove(&(user, room));
            }
        }
        of_room.signals.written.notify_waiters();
    }

    /// Lists where receipts of this user, or of anybody, are not visible yet, and hurries the writers of those rooms.
    fn hurry(&self, of: Option<UserNum>) -> Vec<Unwritten> {
        let gathered = self.0.lock();
        let begin = (Of::Ours(of.unwrap_or(UserNum(0))), RoomNum(0));
        let is_of = |user: &Of| of.is_none_or(|of| *user == Of::Ours(of));
        let rooms = gathered.of_user.range(begin..).take_while(|(user, _)| is_of(user));
        let mut unwritten = Vec::new();
        for (user, room) in rooms {
            let Some(of_room) = gathered.rooms.get(room) else { continue };
            if of_room.has_waiting(user) {
                of_room.signals.hurry.notify_one();
            }
            unwritten.push(Unwritten {
                user: user.clone(),
                room: *room,
                signals: Arc::clone(&of_room.signals),
            });
        }
        unwritten
    }

    /// Whether a receipt of this user in this room waits or is being written.
    fn has(&self, user: &Of, room: RoomNum) -> bool {
        self.0.lock().of_user.contains(&(user.clone(), room))
    }

    /// Waits until these receipts are visible.
    async fn wait_for(&self, unwritten: Vec<Unwritten>) {
        for Unwritten { user, room, signals } in unwritten {
            loop {
                let written = signals.written.notified();
                if !self.has(&user, room) {
                    break;
                }
                written.await;
            }
        }
    }
}

/// A user has receipts in a room that are not visible yet.
struct Unwritten {
    user: Of,
    room: RoomNum,
    signals: Arc<Signals>,
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

/// Notes that a user has read up to an event. It is durable when this returns: it is written within [`MERGE`], together with
/// what others send meanwhile.
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
        key: ReceiptKey { user: caller.user_id.clone(), kind, thread: thread.clone() },
        event_id: event,
        order: stored.order,
        sent_ms: app.env.now_ms(),
    };
    let fate = gather(app, num, (Of::Ours(caller.user), kind, thread), receipt)?;
    require_durable(fate).await
}

/// Adds a receipt to those that wait, and answers what will say whether it was written.
fn gather(app: &App, num: RoomNum, key: Key, receipt: Receipt) -> Result<watch::Receiver<Option<bool>>> {
    let (needs_writer, fate) = app.receipts.add(num, key, receipt)?;
    if needs_writer {
        let app = app.clone();
        let env = app.env.clone();
        env.spawn(async move { write_gathered(&app, num).await });
    }
    Ok(fate)
}

async fn require_durable(mut fate: watch::Receiver<Option<bool>>) -> Result<()> {
    let are_durable = fate.wait_for(Option::is_some).await.map(|fate| *fate == Some(true));
    match are_durable {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::Busy { retry_after: MERGE }),
        Err(_) => Err(Error::broken("the server stopped before a receipt was durable")),
    }
}

/// A receipt of a user of another server, as that server tells it.
pub(crate) struct ToldReceipt {
    /// The user who has read.
    pub(crate) user_id: OwnedUserId,
    /// The event up to which they have.
    pub(crate) event: OwnedEventId,
    /// The thread in which, as it is written in the receipt; none for all.
    pub(crate) thread: Option<String>,
    /// The time of reading, in milliseconds since the epoch, as that server says.
    pub(crate) sent_ms: u64,
}

/// Keeps public receipts of users of another server who are in the room, and returns when they are durable. Those of other
/// users, for events that are not here, and for threads in which their event does not stand are passed over. Answers whether any
/// was kept.
pub(crate) async fn keep_told(app: &App, num: RoomNum, told: Vec<ToldReceipt>) -> Result<bool> {
    let owned = app.clone();
    let find = move || {
        let (snapshot, now_ms) = (owned.store.snapshot(), owned.env.now_ms());
        let row = rooms::require_row(&*snapshot, num)?;
        let mut receipts = Vec::new();
        for ToldReceipt { user_id, event: id, thread, sent_ms } in told {
            if !members::may_be_joined(&*snapshot, num, &user_id)? {
                continue;
            }
            let Some(stored) = event::find_by_id(&*snapshot, num, &id)? else { continue };
            let thread = thread.unwrap_or_else(|| NO_THREAD.to_owned());
            if stored.row.header.unseen || !stands_in(&snapshot, num, &row, &stored, &thread)? {
                continue;
            }
            let key = ReceiptKey { user: user_id, kind: ReceiptKind::Public, thread };
            let (order, sent_ms) = (stored.order, sent_ms.min(now_ms));
            receipts.push(Receipt { room: num, key, event_id: id, order, sent_ms });
        }
        Ok(receipts)
    };
    let mut fates = Vec::new();
    for receipt in app.env.blocking(find).await? {
        let ReceiptKey { user, kind, thread } = receipt.key.clone();
        fates.push(gather(app, num, (Of::Other(user), kind, thread), receipt)?);
    }
    let is_any = !fates.is_empty();
    for fate in fates {
        require_durable(fate).await?;
    }
    Ok(is_any)
}

/// Whether an event stands in the thread that a receipt names, or is the one that the thread grows from.
fn stands_in(
    snapshot: &Snapshot,
    num: RoomNum,
    row: &RoomRow,
    stored: &StoredEvent,
    thread: &str,
) -> Result<bool, Fault> {
    if thread == NO_THREAD || stored.id(row).as_str() == thread {
        return Ok(true);
    }
    let Some(in_thread) = schema::IN_THREAD.get(snapshot, (num, stored.event()))? else {
        return Ok(thread == MAIN_THREAD);
    };
    let root = event::find(snapshot, num, in_thread.root)?;
    Ok(root.is_some_and(|root| root.id(row).as_str() == thread))
}

/// Moves the marker up to which the user has read everything: account data `m.fully_read` of the room. It is durable when
/// this returns.
///
/// Errors: 403 for a room that the user is not in, 404 for an unknown event.
pub async fn set_fully_read(app: &App, caller: &Caller, room: OwnedRoomId, event: &EventId) -> Result<()> {
    require_event(&app.store.snapshot(), caller, &room, event)?;
    let content = serde_json::json!({ "event_id": event }).to_string();
    keep::keep_account_data(app, caller, Some(room), FULLY_READ.to_owned(), content.into()).await
}

/// Has the waiting receipts of one user written, and returns when they are visible, so that a client finds its own receipt
/// in its next sync. It waits at most [`SETTLE_MAX`] for the turns of rooms.
pub(crate) async fn settle(app: &App, user: UserNum) {
    let unwritten = app.receipts.hurry(Some(user));
    if !unwritten.is_empty() && !is_done_within(app, SETTLE_MAX, unwritten).await {
        tracing::debug!(%user, reason = "a room's turn takes long", "a sync goes on without receipts of its user");
    }
}

/// Has all waiting receipts written, and returns when they are visible. It is called when the server stops, and waits at most
/// [`STOP_MAX`].
pub(crate) async fn write_out(app: &App) {
    let unwritten = app.receipts.hurry(None);
    if !is_done_within(app, STOP_MAX, unwritten).await {
        tracing::warn!(reason = "a room's turn takes long", "receipts are lost, because the server stops");
    }
}

async fn is_done_within(app: &App, max: Duration, unwritten: Vec<Unwritten>) -> bool {
    tokio::select! {
        biased;
        () = app.receipts.wait_for(unwritten) => true,
        () = app.env.sleep(max) => false,
    }
}

/// Writes the gathered receipts of a room, at most once in each [`MERGE`] unless somebody waits for them, until no more come.
async fn write_gathered(app: &App, room: RoomNum) {
    while let Some((receipts, fate, signals)) = app.receipts.take(room) {
        let count = receipts.len();
        let are_durable = write_in_room(app, room, receipts).await;
        app.receipts.are_written(room, count);
        fate.send_replace(Some(are_durable));
        tokio::select! {
            biased;
            () = app.env.sleep(MERGE) => {}
            () = signals.hurry.notified() => {}
        }
    }
}

/// Writes receipts in turns of their room, at most [`BATCH_RECEIPTS`] in each. A batch of private receipts wakes their users
/// alone, because nobody else is shown them. Answers whether all of them are durable.
async fn write_in_room(app: &App, room: RoomNum, mut receipts: Batched) -> bool {
    let mut are_durable = true;
    // Public ones come first, so that few batches have receipts of both kinds.
    receipts.sort_by_key(|(_, receipt)| receipt.key.kind);
    while !receipts.is_empty() {
        let later = receipts.split_off(receipts.len().min(BATCH_RECEIPTS));
        let some = std::mem::replace(&mut receipts, later);
        let written = commit::in_room(app, room, move |change| {
            let (mut is_shown, mut owners) = (false, Vec::new());
            for (user, receipt) in &some {
                if receipts::keep(&mut change.batch, receipt)? {
                    is_shown |= receipt.key.kind == ReceiptKind::Public;
                    if let Of::Ours(user) = user {
                        owners.push(*user);
                    }
                }
            }
            change.wakes_only = (!is_shown).then_some(owners);
            Ok(())
        });
        if let Err(error) = written.await {
            tracing::warn!(%error, %room, "receipts were lost");
            are_durable = false;
        }
    }
    are_durable
}
