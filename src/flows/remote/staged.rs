//! Events of other servers that could not be judged when they came: their ancestors are missing, the keys of their senders cannot
//! be had, or their room is busy. Whoever sent them was told that they are here, so that they are kept in the store until they
//! are judged, or for a day.
//!
//! An event that is judged at once is never written here. Each room with events that wait has one worker, which tries all of them
//! in the order in which they came, again whenever an event of the room came in, and else ever more seldom. What the room and
//! the servers have here is counted in memory, and bounded: a server that has too much here is told to send again later, and so
//! is one whose events of one room are too many, because others need that room's places, too.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use ruma::{OwnedEventId, OwnedServerName, ServerName};
use tokio::sync::Notify;

use super::{
    gaps,
    judge::{self, Coming, Fate},
};
use crate::{
    error::{Error, Result},
    flows::{App, write},
    ids::RoomNum,
    rooms::{
        self,
        change::{Change, Signed},
    },
    schema::{
        self,
        remote::InboundEventRow,
        rooms::{Resident, RoomRow},
    },
    store::{Direction, Fault, Guard, Read, Snapshot},
};

/// One server has at most this many events here.
const OF_ORIGIN: Bounds = Bounds { events: 2_000, bytes: 32 << 20 };
/// One room has at most this many events here.
const OF_ROOM: Bounds = Bounds { events: 1_000, bytes: 16 << 20 };
/// One server has at most this many events of one room here.
const OF_ORIGIN_IN_ROOM: Bounds = Bounds { events: 500, bytes: 8 << 20 };
/// Servers that have nobody in a room add events of it only while there are fewer than this many here.
const OF_STRANGERS_IN_ROOM: Bounds = Bounds { events: 100, bytes: 2 << 20 };
/// One of them has at most this many, so that one that nobody knows does not keep out others.
const OF_STRANGER_IN_ROOM: Bounds = Bounds { events: 20, bytes: 512 << 10 };
/// All together are at most this many, because their ids are in memory.
const OF_ALL: Bounds = Bounds { events: 50_000, bytes: 512 << 20 };
/// A server that has too much here is told to come back after this time.
const BUSY_FOR: Duration = Duration::from_secs(60);
/// An event that could not be judged for this many milliseconds is given up.
const KEPT_MS: u64 = 24 * 60 * 60 * 1000;
/// A batch is closed once its rows have this many bytes.
const BATCH_BYTES: usize = 512 << 10;
/// This many events are judged together.
const PAGE: usize = 50;
/// The next page begins once the events of one have this many bytes.
const PAGE_BYTES: usize = 1 << 20;
/// A worker tries again after this time, and after twice as long each further time in which nothing went on.
const AGAIN: Duration = Duration::from_secs(5);
/// A worker tries again at least this often.
const AGAIN_MAX: Duration = Duration::from_secs(600);
/// A worker that is hurried pauses for at least this long, and for this many times as long as it worked.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSES: u32 = 10;
/// A worker goes through the events of a room at most this often without a pause.
const PASSES_MAX: usize = 20;

/// A number of events, and of their bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Bounds {
    events: usize,
    bytes: usize,
}

impl Bounds {
    fn has_room_for(self, held: Self, bytes: usize) -> bool {
        held.events < self.events && held.bytes.saturating_add(bytes) <= self.bytes
    }

    fn add(&mut self, bytes: usize) {
        self.events += 1;
        self.bytes += bytes;
    }

    fn take(&mut self, bytes: usize) {
        self.events = self.events.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

/// The events that wait, as they are counted in memory. Clones of this share them.
#[derive(Clone, Default)]
pub struct Staged(Arc<Mutex<Queues>>);

#[derive(Default)]
struct Queues {
    rooms: BTreeMap<RoomNum, Queue>,
    origins: BTreeMap<OwnedServerName, Bounds>,
    all: Bounds,
    /// The number that the next event gets; numbers rise over all rooms.
    next: u64,
}

#[derive(Default)]
struct Queue {
    waiting: BTreeMap<OwnedEventId, Waiting>,
    has_worker: bool,
    /// The worker goes through the events now.
    hurry: Arc<Notify>,
}

struct Waiting {
    number: u64,
    origin: OwnedServerName,
    bytes: usize,
}

impl Queue {
    fn held(&self, of: Option<&ServerName>) -> Bounds {
        let mut held = Bounds::default();
        let counted = self.waiting.values().filter(|it| of.is_none_or(|of| *it.origin == *of));
        counted.for_each(|it| held.add(it.bytes));
        held
    }
}

/// The outcome of adding an event to those that wait.
enum Added {
    /// It is to be written as this row, under this number.
    New(u64, InboundEventRow),
    /// It waits here already.
    IsHere,
    /// There is no room for it.
    NoRoom,
}

impl Queues {
    /// Counts an event, if it is new and there is room for it within these bounds of its room and of its server there.
    fn add(
        &mut self,
        room: RoomNum,
        origin: &ServerName,
        (id, json): (OwnedEventId, Bytes),
        bounds: (Bounds, Bounds),
        received_ms: u64,
    ) -> Added {
        if self.rooms.get(&room).is_some_and(|queue| queue.waiting.contains_key(&id)) {
            return Added::IsHere;
        }
        if !self.has_room_for(room, bounds, origin, json.len()) {
            return Added::NoRoom;
        }
        let number = self.next;
        self.next += 1;
        self.insert(room, id.clone(), Waiting { number, origin: origin.to_owned(), bytes: json.len() });
        Added::New(number, InboundEventRow { origin: origin.to_string(), id, received_ms, json })
    }

    fn insert(&mut self, room: RoomNum, id: OwnedEventId, waiting: Waiting) {
        self.origins.entry(waiting.origin.clone()).or_default().add(waiting.bytes);
        self.all.add(waiting.bytes);
        self.rooms.entry(room).or_default().waiting.insert(id, waiting);
    }

    /// Counts an event no longer.
    fn remove(&mut self, room: RoomNum, id: &OwnedEventId) -> Option<u64> {
        let gone = self.rooms.get_mut(&room)?.waiting.remove(id)?;
        self.all.take(gone.bytes);
        if let Some(held) = self.origins.get_mut(&gone.origin) {
            held.take(gone.bytes);
            if held.events == 0 {
                self.origins.remove(&gone.origin);
            }
        }
        Some(gone.number)
    }

    fn has_room_for(
        &self,
        room: RoomNum,
        (of_room_max, of_origin_max): (Bounds, Bounds),
        origin: &ServerName,
        bytes: usize,
    ) -> bool {
        let (of_room, of_origin) = match self.rooms.get(&room) {
            Some(queue) => (queue.held(None), queue.held(Some(origin))),
            None => (Bounds::default(), Bounds::default()),
        };
        OF_ALL.has_room_for(self.all, bytes)
            && of_room_max.has_room_for(of_room, bytes)
            && of_origin_max.has_room_for(of_origin, bytes)
    }
}

impl Staged {
    /// Counts the events that waited when the last run of the server ended.
    pub fn open(read: &(impl Read + ?Sized)) -> Result<Self, Fault> {
        let mut queues = Queues::default();
        for row in schema::INBOUND_EVENT.prefix::<()>(read, (), Direction::Up)? {
            let ((room, number), row) = row?;
            let origin = OwnedServerName::try_from(row.origin)
                .map_err(|_| Fault::Corrupt("an event that waits comes from no server"))?;
            queues.next = queues.next.max(number + 1);
            queues.insert(room, row.id, Waiting { number, origin, bytes: row.json.len() });
        }
        Ok(Self(Arc::new(Mutex::new(queues))))
    }

    /// Refuses a server that has too many events here already: [`Error::Busy`].
    pub(super) fn require_place(&self, origin: &ServerName) -> Result<()> {
        let held = self.0.lock().origins.get(origin).copied().unwrap_or_default();
        if OF_ORIGIN.has_room_for(held, 0) {
            return Ok(());
        }
        tracing::debug!(%origin, held.events, held.bytes, "a server is refused: too many of its events wait");
        Err(Error::Busy { retry_after: BUSY_FOR })
    }

    /// Has the events of a room tried again, because something of it came in.
    pub(super) fn hurry(&self, room: RoomNum) {
        if let Some(queue) = self.0.lock().rooms.get(&room) {
            queue.hurry.notify_one();
        }
    }

    /// The number of events that wait.
    pub(crate) fn count(&self) -> usize {
        self.0.lock().all.events
    }

    /// Claims the right to be the worker of a room; none if the room has one, or needs none.
    fn begin_work(&self, room: RoomNum) -> Option<Arc<Notify>> {
        let mut queues = self.0.lock();
        let queue = queues.rooms.get_mut(&room)?;
        let is_new = !queue.waiting.is_empty() && !std::mem::replace(&mut queue.has_worker, true);
        is_new.then(|| Arc::clone(&queue.hurry))
    }

    /// Ends the work in a room where nothing waits any more. Answers whether it has ended.
    fn end_work(&self, room: RoomNum) -> bool {
        let mut queues = self.0.lock();
        let is_over = queues.rooms.get(&room).is_none_or(|queue| queue.waiting.is_empty());
        if is_over {
            queues.rooms.remove(&room);
        }
        is_over
    }
}

/// Keeps events of a room for later, and returns when they are durable. Answers for each whether it is kept: there may be no room
/// for it, and one that is here already stays as it is. Each has the name that [`Signed::name`] gives it, because an id may be a forger's:
/// signatures are not checked yet. With `at_once` they are tried at once, otherwise after a while, because
/// they were just tried.
pub(super) async fn stage(
    app: &App,
    room: RoomNum,
    origin: &ServerName,
    events: Vec<(OwnedEventId, Bytes)>,
    at_once: bool,
) -> Result<Vec<bool>> {
    if rooms::find_row(&*app.store.snapshot(), room)?.is_none() {
        return Ok(vec![false; events.len()]);
    }
    let mut kept = Vec::with_capacity(events.len());
    let mut rows = Vec::new();
    let bounds = match gaps::is_stranger(app, room, origin).await? {
        true => (OF_STRANGERS_IN_ROOM, OF_STRANGER_IN_ROOM),
        false => (OF_ROOM, OF_ORIGIN_IN_ROOM),
    };
    {
        let mut queues = app.staged.0.lock();
        for (id, json) in events {
            let added = queues.add(room, origin, (id, json), bounds, app.env.now_ms());
            kept.push(!matches!(added, Added::NoRoom));
            if let Added::New(number, row) = added {
                rows.push((number, row));
            }
        }
    }
    if rows.is_empty() {
        return Ok(kept);
    }
    let ids: Vec<_> = rows.iter().map(|(_, row)| row.id.clone()).collect();
    if let Err(error) = write_rows(app, room, rows).await {
        let mut queues = app.staged.0.lock();
        for id in &ids {
            queues.remove(room, id);
        }
        return Err(error);
    }
    app.metrics.queue_depth("inbound", app.staged.count());
    begin(app, room, at_once);
    Ok(kept)
}

/// Events of a room that the batch of a change stores. When this is dropped, and not before, the batch has been accepted or not: the
/// events are tried then, or count no longer.
pub(super) struct InBatch {
    app: App,
    room: RoomNum,
    events: Vec<(u64, OwnedEventId)>,
}

impl Drop for InBatch {
    fn drop(&mut self) {
        let view = self.app.store.view();
        for (number, name) in &self.events {
            // A row that cannot be read is there: its worker says what is wrong.
            let is_there =
                schema::INBOUND_EVENT.get(&view, (self.room, *number)).map_or(true, |row| row.is_some());
            if !is_there {
                self.app.staged.0.lock().remove(self.room, name);
            }
        }
        begin(&self.app, self.room, true);
    }
}

/// Adds events of a room to the batch of a change to it, so that they wait from when the change counts; there may be no room for some of them.
pub(super) fn stage_in_batch(
    app: &App,
    change: &mut Change,
    events: Vec<(OwnedServerName, Signed)>,
) -> InBatch {
    let room = change.num;
    let mut in_batch = InBatch { app: app.clone(), room, events: Vec::with_capacity(events.len()) };
    let mut queues = app.staged.0.lock();
    for (origin, signed) in events {
        let (id, json) = (signed.name(), signed.json().clone());
        let bounds = (OF_ROOM, OF_ORIGIN_IN_ROOM);
        if let Added::New(number, row) = queues.add(room, &origin, (id, json), bounds, app.env.now_ms()) {
            schema::INBOUND_EVENT.put(&mut change.batch, (room, number), &row);
            in_batch.events.push((number, row.id));
        }
    }
    drop(queues);
    in_batch
}

async fn write_rows(app: &App, room: RoomNum, rows: Vec<(u64, InboundEventRow)>) -> Result<()> {
    let owned = app.clone();
    let write = move || {
        let guard = Guard::own_tables();
        let mut batch = owned.store.batch(&guard);
        for (number, row) in rows {
            schema::INBOUND_EVENT.put(&mut batch, (room, number), &row);
            if batch.byte_count() >= BATCH_BYTES {
                let full = std::mem::replace(&mut batch, owned.store.batch(&guard));
                drop(owned.store.enqueue(full)?);
            }
        }
        // Batches are written in their order, so that all are durable when the last one is.
        if batch.row_count() == 0 { Ok(None) } else { Ok(Some(owned.store.enqueue(batch)?)) }
    };
    let enqueued = app.env.blocking(write).await?;
    write::durable(app, enqueued).await
}

/// Starts the worker of each room in which events waited when the last run of the server ended.
pub(crate) fn begin_all(app: &App) {
    let rooms: Vec<RoomNum> = app.staged.0.lock().rooms.keys().copied().collect();
    rooms.into_iter().for_each(|room| begin(app, room, true));
}

fn begin(app: &App, room: RoomNum, at_once: bool) {
    if let Some(hurry) = app.staged.begin_work(room) {
        let owned = app.clone();
        // The transaction that brought the events does not pay for what follows.
        app.env.spawn(crate::env::payer::Payers::SERVER.during(async move {
            work(&owned, room, &hurry, at_once).await;
        }));
    }
}

/// Tries the events of a room until none is left.
async fn work(app: &App, room: RoomNum, hurry: &Notify, at_once: bool) {
    let mut wait = AGAIN;
    if !at_once {
        pause(app, hurry, PAUSE, AGAIN).await;
    }
    loop {
        let began = app.env.instant();
        let mut went_on = false;
        for _ in 0..PASSES_MAX {
            match pass(app, room).await {
                Ok(true) => went_on = true,
                Ok(false) => break,
                Err(error) => {
                    tracing::warn!(%error, %room, "events that wait could not be tried");
                    break;
                }
            }
        }
        app.metrics.queue_depth("inbound", app.staged.count());
        if app.staged.end_work(room) {
            return;
        }
        let took = app.env.instant().saturating_duration_since(began);
        pause(app, hurry, PAUSE.max(took.saturating_mul(PAUSES)).min(AGAIN_MAX), wait).await;
        wait = if went_on { AGAIN } else { wait.saturating_mul(2).min(AGAIN_MAX) };
    }
}

/// Pauses for some time at least, and then until somebody hurries or `wait` is over.
async fn pause(app: &App, hurry: &Notify, at_least: Duration, wait: Duration) {
    app.env.sleep(at_least).await;
    tokio::select! {
        biased;
        () = hurry.notified() => {}
        () = app.env.sleep(wait) => {}
    }
}

/// A page of events that wait.
struct Page {
    /// The room, if its events can be judged now.
    room: Option<RoomRow>,
    rows: Vec<(u64, InboundEventRow)>,
}

/// Goes once through the events of a room. Answers whether one of them is done, so that others may be, too.
async fn pass(app: &App, room: RoomNum) -> Result<bool> {
    let (mut after, mut went_on) = (None, false);
    loop {
        let store = app.store.clone();
        let page = app.env.blocking(move || Ok(read_page(&store.snapshot(), room, after)?)).await?;
        let Some((last, _)) = page.rows.last() else { return Ok(went_on) };
        after = Some(*last);
        went_on |= try_page(app, room, page).await?;
    }
}

fn read_page(snapshot: &Snapshot, room: RoomNum, after: Option<u64>) -> Result<Page, Fault> {
    let low = after.map_or(Bound::Included((room, 0)), |after| Bound::Excluded((room, after)));
    let high = Bound::Included((room, u64::MAX));
    let mut page = Page { room: rooms::find_row(snapshot, room)?, rows: Vec::new() };
    let mut bytes = 0;
    for row in schema::INBOUND_EVENT.range::<(RoomNum, u64)>(snapshot, low, high, Direction::Up)?.take(PAGE) {
        let ((_, number), row) = row?;
        bytes += row.json.len();
        page.rows.push((number, row));
        if bytes >= PAGE_BYTES {
            break;
        }
    }
    Ok(page)
}

/// Judges the events of a page, and deletes those that are done. Answers whether one was judged.
async fn try_page(app: &App, room: RoomNum, page: Page) -> Result<bool> {
    let now_ms = app.env.now_ms();
    let Some(row) = page.room.filter(|row| takes_events(row.resident)) else {
        let gone = page.rows.iter().map(|(number, row)| (*number, row.id.clone())).collect();
        forget(app, room, gone)?;
        return Ok(false);
    };
    let (mut gone, mut went_on) = (Vec::new(), false);
    let mut by_origin = Vec::<(String, Vec<((u64, OwnedEventId), Coming)>)>::new();
    for (number, staged) in page.rows {
        if staged.received_ms.saturating_add(KEPT_MS) <= now_ms {
            tracing::debug!(%room, event = %staged.id, "an event is given up: it could not be judged for a day");
            app.metrics.inbound_event("given_up");
            gone.push((number, staged.id));
            continue;
        }
        let Ok(signed) = Signed::read(room, &row, &staged.json) else {
            app.metrics.inbound_event("refused");
            gone.push((number, staged.id));
            continue;
        };
        let coming = Coming { id: signed.unverified().id.clone(), signed };
        let named = (number, staged.id);
        match by_origin.last_mut().filter(|(origin, _)| *origin == staged.origin) {
            Some((_, events)) => events.push((named, coming)),
            None => by_origin.push((staged.origin, vec![(named, coming)])),
        }
    }
    for (origin, events) in by_origin {
        let Ok(origin) = OwnedServerName::try_from(origin) else { continue };
        let (names, events): (Vec<(u64, OwnedEventId)>, Vec<Coming>) = events.into_iter().unzip();
        let fates = judge::judge(app, (room, row.version), &origin, &events, None).await;
        for ((named, event), fate) in names.into_iter().zip(events).zip(fates) {
            match fate {
                Fate::Waits | Fate::Unjudged => continue,
                Fate::Done => app.metrics.inbound_event("taken_later"),
                Fate::Refused(why) => {
                    tracing::debug!(%room, event = %event.id, why, "an event that waited is refused");
                    app.metrics.inbound_event("refused");
                }
            }
            went_on = true;
            gone.push(named);
        }
    }
    forget(app, room, gone)?;
    Ok(went_on)
}

/// Whether events of a room are taken: this server is in it, or will be before long, and then they wait.
pub(super) fn takes_events(resident: Resident) -> bool {
    match resident {
        Resident::Yes | Resident::Joining | Resident::Partial => true,
        Resident::No | Resident::Invited | Resident::Knocked | Resident::Left => false,
    }
}

/// Deletes events that need not wait any more. A note is enough: those that come back are known by then.
fn forget(app: &App, room: RoomNum, gone: Vec<(u64, OwnedEventId)>) -> Result<()> {
    if gone.is_empty() {
        return Ok(());
    }
    let mut note = app.store.note(&Guard::own_tables());
    for (number, _) in &gone {
        schema::INBOUND_EVENT.delete(&mut note, (room, *number));
    }
    drop(app.store.enqueue_note(note)?);
    let mut queues = app.staged.0.lock();
    let numbers: BTreeSet<u64> = gone.iter().map(|(number, _)| *number).collect();
    for (_, id) in gone {
        let is_this = queues.rooms.get(&room).and_then(|queue| queue.waiting.get(&id));
        if is_this.is_some_and(|waiting| numbers.contains(&waiting.number)) {
            queues.remove(room, &id);
        }
    }
    Ok(())
}
