//! Events of other servers that could not be judged when they came: their ancestors are missing, the keys of their senders cannot
//! be had, or their room is busy. Whoever sent them was told that they are here, so that they are kept in the store until they
//! are judged, or for a day; unless their server has most of all, and must give way to others (`queues.rs`).
//!
//! An event that is judged at once is never written here. The events of a room that came from one tenant (`tenants.rs`) have one worker, which
//! tries all of them in the order in which they came, again whenever an event of the room came in, and else ever more seldom; and the longer it
//! had to wait for others, the longer it pauses. So whoever lets this server wait holds up what came from themselves alone. What they lack is
//! fetched for all tenants of an owner in turn (`gaps/neighbours.rs`). What waits is counted in memory, and bounded: a server that has too much
//! here is told to send again later, and so is one whose events of one room are too many, because others need that room's places, too.

mod queues;

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use ruma::{OwnedEventId, OwnedServerName, ServerName};
use tokio::sync::Notify;

use self::queues::{Added, GaveWay, Queues, Sender};
use super::{
    gaps,
    judge::{self, Coming, Fate},
    tenants::Tenant,
};
use crate::{
    env::payer,
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
/// A worker goes through the events of its line at most this often without a pause.
const PASSES_MAX: usize = 20;
/// A worker begins no further page of its events after this time, so that a server which lets it wait does not keep it at work.
const WORKS_MAX: Duration = Duration::from_secs(60);

/// The events that wait, as they are counted in memory. Clones of this share them.
#[derive(Clone, Default)]
pub struct Staged(Arc<Mutex<Queues>>);

impl Staged {
    /// Counts the events that waited when the last run of the server ended.
    pub fn open(read: &(impl Read + ?Sized)) -> Result<Self, Fault> {
        let (mut queues, mut strangers) = (Queues::default(), BTreeMap::new());
        for row in schema::INBOUND_EVENT.prefix::<()>(read, (), Direction::Up)? {
            let ((room, number), row) = row?;
            let origin = OwnedServerName::try_from(row.origin.as_str())
                .map_err(|_| Fault::Corrupt("an event that waits comes from no server"))?;
            let is_stranger = match strangers.entry((room, row.origin.clone())) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(new) => *new.insert(gaps::has_nobody_in(read, room, &origin)?),
            };
            queues.count_stored((room, number), row, (origin, is_stranger));
        }
        Ok(Self(Arc::new(Mutex::new(queues))))
    }

    /// Refuses a server that has too many events here already: [`Error::Busy`].
    pub(super) fn require_place(&self, origin: &ServerName) -> Result<()> {
        if self.0.lock().has_room_for_origin(origin) {
            return Ok(());
        }
        tracing::debug!(%origin, "a server is refused: too many of its events wait");
        Err(Error::Busy { retry_after: BUSY_FOR })
    }

    /// Has the events of a room tried again, because something of it came in.
    pub(super) fn hurry(&self, room: RoomNum) {
        self.0.lock().hurry(room, None);
    }

    /// The number of events that wait.
    pub(crate) fn count(&self) -> usize {
        self.0.lock().count()
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
    let Some(row) = rooms::find_row(&*app.store.snapshot(), room)? else {
        return Ok(vec![false; events.len()]);
    };
    let mut kept = Vec::with_capacity(events.len());
    let mut rows = Vec::new();
    let is_stranger = match row.resident {
        // Nobody is known yet, but those who were asked.
        Resident::Joining => !app.remote.held.is_asked(&row.id, origin),
        _ => gaps::is_stranger(app, room, origin).await?,
    };
    let sender = Sender::new(origin, payer::current(), is_stranger);
    let mut gave_way = GaveWay::new();
    {
        let mut queues = app.staged.0.lock();
        for (id, json) in events {
            let added = queues.add(room, &sender, (id, json), app.env.now_ms(), Some(&mut gave_way));
            kept.push(!matches!(added, Added::NoRoom));
            if let Added::New(number, row) = added {
                rows.push((number, row));
            }
        }
    }
    gave_way.iter().for_each(|_| app.metrics.inbound_event("gave_way"));
    delete(app, &gave_way)?;
    if rows.is_empty() {
        return Ok(kept);
    }
    let numbers: Vec<u64> = rows.iter().map(|(number, _)| *number).collect();
    let written = write_rows(app, room, rows).await;
    {
        let mut queues = app.staged.0.lock();
        for number in numbers {
            match written {
                Ok(()) => queues.note_written(number),
                Err(_) => {
                    queues.remove(number);
                }
            }
        }
    }
    written?;
    app.metrics.queue_depth("inbound", app.staged.count());
    begin(app, room, at_once);
    Ok(kept)
}

/// Events of a room that the batch of a change stores. When this is dropped, and not before, the batch has been accepted or not: the
/// events are tried then, or count no longer.
pub(super) struct InBatch {
    app: App,
    room: RoomNum,
    numbers: Vec<u64>,
}

impl Drop for InBatch {
    fn drop(&mut self) {
        let view = self.app.store.view();
        for number in &self.numbers {
            // A row that cannot be read is there: its worker says what is wrong.
            let is_there =
                schema::INBOUND_EVENT.get(&view, (self.room, *number)).map_or(true, |row| row.is_some());
            let mut queues = self.app.staged.0.lock();
            if is_there {
                queues.note_written(*number);
            } else {
                queues.remove(*number);
            }
        }
        begin(&self.app, self.room, true);
    }
}

/// The bytes of events for which the batch of a change still has room. What follows from the change comes into the batch besides.
pub(super) fn bytes_left(change: &Change) -> usize {
    BATCH_BYTES.saturating_sub(change.batch.byte_count())
}

/// Adds events of a room to the batch of a change to it, so that they wait from when the change counts; there may be no room for some of them.
pub(super) fn stage_in_batch(
    app: &App,
    change: &mut Change,
    events: Vec<(OwnedServerName, Signed)>,
) -> InBatch {
    let room = change.num;
    let mut in_batch = InBatch { app: app.clone(), room, numbers: Vec::with_capacity(events.len()) };
    let mut gave_way = GaveWay::new();
    let mut queues = app.staged.0.lock();
    for (origin, signed) in events {
        let (id, json) = (signed.name(), signed.json().clone());
        let sender = Sender::of(origin);
        match queues.add(room, &sender, (id, json), app.env.now_ms(), Some(&mut gave_way)) {
            Added::New(number, row) => {
                schema::INBOUND_EVENT.put(&mut change.batch, (room, number), &row);
                in_batch.numbers.push(number);
            }
            Added::IsHere => {}
            Added::NoRoom => app.metrics.inbound_event("gave_way"),
        }
    }
    drop(queues);
    gave_way.iter().for_each(|_| app.metrics.inbound_event("gave_way"));
    // Rows that stay behind where the process ends here count again after it.
    if let Err(why) = delete(app, &gave_way) {
        tracing::warn!(%room, %why, "events that gave way could not be deleted");
    }
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

/// Starts the workers of each room in which events waited when the last run of the server ended.
pub(crate) fn begin_all(app: &App) {
    let rooms = app.staged.0.lock().list_rooms();
    rooms.into_iter().for_each(|room| begin(app, room, true));
}

fn begin(app: &App, room: RoomNum, at_once: bool) {
    let begun = app.staged.0.lock().begin_work(room, at_once);
    for (tenant, hurry) in begun {
        let owned = app.clone();
        // The transaction that brought the events does not pay for what follows.
        app.env.spawn(crate::env::payer::Payers::SERVER.during(async move {
            work(&owned, (room, tenant), &hurry, at_once).await;
        }));
    }
}

/// The events of a room that came from one tenant.
type Line = (RoomNum, Tenant);

/// Tries the events of a line until none is left.
async fn work(app: &App, line: Line, hurry: &Notify, at_once: bool) {
    let (room, tenant) = &line;
    let (mut wait, mut from) = (AGAIN, 0);
    if !at_once {
        pause(app, hurry, PAUSE, AGAIN).await;
    }
    loop {
        let began = app.env.instant();
        let until = app.env.uptime().saturating_add(WORKS_MAX);
        let mut went_on = false;
        for _ in 0..PASSES_MAX {
            match pass(app, &line, &mut from, until).await {
                Ok(true) => went_on = true,
                Ok(false) => break,
                Err(error) => {
                    tracing::warn!(%error, %room, "events that wait could not be tried");
                    break;
                }
            }
        }
        app.metrics.queue_depth("inbound", app.staged.count());
        {
            let mut queues = app.staged.0.lock();
            if went_on {
                queues.hurry(*room, Some(tenant));
            }
            if queues.end_work(*room, tenant) {
                return;
            }
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
    /// The next page begins at this number.
    next: u64,
}

/// Goes once through the events of a line from a number on, as long as there is time; the next pass goes on from where this one ended. Answers
/// whether an event is done, so that others may be, too.
async fn pass(app: &App, (room, tenant): &Line, from: &mut u64, until: Duration) -> Result<bool> {
    let (room, mut went_on) = (*room, false);
    while app.env.uptime() < until {
        let numbers = app.staged.0.lock().list(room, tenant, *from, PAGE);
        if numbers.is_empty() {
            *from = 0;
            break;
        }
        let store = app.store.clone();
        let page = app.env.blocking(move || Ok(read_page(&store.snapshot(), room, numbers)?)).await?;
        *from = page.next;
        went_on |= try_page(app, room, page).await?;
    }
    Ok(went_on)
}

fn read_page(snapshot: &Snapshot, room: RoomNum, numbers: Vec<u64>) -> Result<Page, Fault> {
    let mut page = Page { room: rooms::find_row(snapshot, room)?, rows: Vec::new(), next: 0 };
    let mut bytes = 0;
    for number in numbers {
        page.next = number.saturating_add(1);
        // It is not there while it is being written.
        let Some(row) = schema::INBOUND_EVENT.get(snapshot, (room, number))? else { continue };
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
        forget(app, room, page.rows.iter().map(|(number, _)| *number).collect())?;
        return Ok(false);
    };
    let (mut gone, mut went_on) = (Vec::new(), false);
    let mut by_origin = Vec::<(String, Vec<(u64, Coming)>)>::new();
    for (number, staged) in page.rows {
        if staged.received_ms.saturating_add(KEPT_MS) <= now_ms {
            tracing::debug!(%room, event = %staged.id, "an event is given up: it could not be judged for a day");
            app.metrics.inbound_event("given_up");
            gone.push(number);
            continue;
        }
        let Ok(signed) = Signed::read(room, &row, &staged.json) else {
            app.metrics.inbound_event("refused");
            gone.push(number);
            continue;
        };
        let coming = Coming { id: signed.unverified().id.clone(), signed };
        match by_origin.last_mut().filter(|(origin, _)| *origin == staged.origin) {
            Some((_, events)) => events.push((number, coming)),
            None => by_origin.push((staged.origin, vec![(number, coming)])),
        }
    }
    for (origin, events) in by_origin {
        let Ok(origin) = OwnedServerName::try_from(origin) else { continue };
        let (numbers, events): (Vec<u64>, Vec<Coming>) = events.into_iter().unzip();
        let fates = judge::judge(app, (room, row.version), &origin, &events, None).await;
        for ((number, event), fate) in numbers.into_iter().zip(events).zip(fates) {
            match fate {
                Fate::Waits | Fate::Unjudged => continue,
                Fate::Done => app.metrics.inbound_event("taken_later"),
                Fate::Refused(why) => {
                    tracing::debug!(%room, event = %event.id, why, "an event that waited is refused");
                    app.metrics.inbound_event("refused");
                }
            }
            went_on = true;
            gone.push(number);
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

/// Deletes events that need not wait any more.
fn forget(app: &App, room: RoomNum, gone: Vec<u64>) -> Result<()> {
    let rows: Vec<_> = gone.iter().map(|number| (room, *number)).collect();
    delete(app, &rows)?;
    let mut queues = app.staged.0.lock();
    for number in gone {
        queues.remove(number);
    }
    Ok(())
}

/// Deletes rows. A note is enough: events that come back are known by then, or tried once more.
fn delete(app: &App, rows: &[(RoomNum, u64)]) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let mut note = app.store.note(&Guard::own_tables());
    for (room, number) in rows {
        schema::INBOUND_EVENT.delete(&mut note, (*room, *number));
    }
    drop(app.store.enqueue_note(note)?);
    Ok(())
}
