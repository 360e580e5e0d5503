//! Takes in the transactions of other servers (server-server API, "Transactions").
//!
//! A server sends one transaction at a time, so that those of one server go one after the other here, and a few may wait. The same
//! transaction id gets the same answer again, also after a crash: the answers to the last [`REMEMBERED`] transactions of each
//! server are kept in as many rows, which are used in turn, so that nobody's many transactions push out anybody else's. A
//! transaction of which nothing was taken is not remembered, because it costs nothing to look at it again.
//!
//! It is answered within a few seconds: events that cannot be judged by then wait in the store (`staged.rs`). Events of
//! different rooms are judged beside one another, those of one room in their order. An event is sent by the server of its sender. Others
//! send only what a resident server tells for those who come and go by way of it ([`why_not_sent_by`]): whoever passes on anything else could
//! choose what comes first, and in which form.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::join_all;
use parking_lot::Mutex;
use ruma::{OwnedEventId, OwnedServerName, RoomId, ServerName};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::oneshot;

use super::{
    edus,
    ended::{self, Ended},
    held::{Held, HeldEvent},
    judge::{self, Coming, Fate, within},
    old_rows,
    remembered::{self, Lines},
    staged::{self, takes_events},
};
use crate::{
    error::{Error, Refusal, Result},
    flows::{App, write},
    ids::RoomNum,
    json::{JsonText, Object},
    rooms::{
        self, acl,
        change::{Change, Signed, completes},
        event, members,
    },
    schema::{
        self,
        event_types::{CREATE, MEMBER},
        remote::InboundTransactionRow,
        rooms::{Membership, Place, RoomRow},
    },
    store::{Direction, Fault, Guard, Read, Snapshot, key::Json},
};

/// A transaction has at most this many events.
pub(crate) const EVENTS_MAX: usize = 50;
/// A transaction has at most this many ephemeral messages.
pub(crate) const EDUS_MAX: usize = 100;
/// The id of a transaction has at most this many bytes.
const ID_BYTES_MAX: usize = 255;
/// This many answers to a server are remembered.
const REMEMBERED: u64 = 16;
/// An answer is remembered for this many milliseconds.
const REMEMBERED_MS: u64 = 7 * 24 * 60 * 60 * 1000;
/// A reason in an answer has at most this many characters.
const REASON_CHARS_MAX: usize = 200;
/// The reasons in an answer have at most this many bytes together, because answers are remembered, and may say what the events say.
const REASONS_BYTES_MAX: usize = 2 << 10;
/// An answer says this of events for whose reasons it has no bytes left.
const NO_REASON: &str = "The event is not accepted.";
/// Events that are not judged after this time wait in the store.
const ANSWERED_WITHIN: Duration = Duration::from_secs(5);
/// At most this many transactions of a server are here at once: one that is taken in, and the others wait.
const AT_ONCE: usize = 4;
/// A transaction waits at most this long for those before it.
const WAITS_MAX: Duration = Duration::from_secs(15);
/// A server whose transactions are too many is told to come back after this time.
const BUSY_FOR: Duration = Duration::from_secs(5);

/// A transaction as it came.
pub(crate) struct Transaction {
    /// The id that its server gave it.
    pub(crate) id: String,
    /// The events, each as it came.
    pub(crate) pdus: Vec<Bytes>,
    /// The ephemeral messages, each as it came.
    pub(crate) edus: Vec<Bytes>,
}

/// The turns of servers that send transactions now. Clones of this share them.
#[derive(Clone, Default)]
pub struct Lanes {
    turns: Arc<Mutex<BTreeMap<OwnedServerName, Lane>>>,
    lines: Lines,
}

#[derive(Default)]
struct Lane {
    turn: Arc<tokio::sync::Mutex<()>>,
    /// The number of transactions that are taken in or wait.
    transactions: usize,
}

/// A transaction in the lane of its server. Dropping this takes it out.
struct InLane {
    lanes: Lanes,
    origin: OwnedServerName,
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Lanes {
    /// The lines of what is remembered.
    pub(super) fn lines(&self) -> &Lines {
        &self.lines
    }

    /// Adds a transaction. Errors: [`Error::Busy`] for a server that has too many here.
    fn enter(&self, origin: &ServerName) -> Result<InLane> {
        let mut lanes = self.turns.lock();
        let lane = lanes.entry(origin.to_owned()).or_default();
        if lane.transactions >= AT_ONCE {
            tracing::debug!(%origin, "a transaction is refused: its server sends others meanwhile");
            return Err(Error::Busy { retry_after: BUSY_FOR });
        }
        lane.transactions += 1;
        let turn = Arc::clone(&lane.turn);
        Ok(InLane { lanes: self.clone(), origin: origin.to_owned(), turn })
    }
}

impl Drop for InLane {
    fn drop(&mut self) {
        let mut lanes = self.lanes.turns.lock();
        if let Some(lane) = lanes.get_mut(&self.origin) {
            lane.transactions = lane.transactions.saturating_sub(1);
            if lane.transactions == 0 {
                lanes.remove(&self.origin);
            }
        }
    }
}

/// Takes in a transaction, and gives the answer to it. Errors: 400 `M_INVALID_PARAM` for an id that is too long; [`Error::Busy`]
/// where the server has too much here already, of which nothing was taken then.
pub(crate) async fn receive(
    app: &App,
    origin: OwnedServerName,
    transaction: Transaction,
) -> Result<JsonText> {
    if transaction.id.len() > ID_BYTES_MAX {
        return Err(Refusal::invalid_param("`txnId` has more than 255 bytes.").into());
    }
    let in_lane = app.lanes.enter(&origin)?;
    let (tell, told) = oneshot::channel();
    let owned = app.clone();
    // A server that hangs up does not stop its transaction half way.
    app.env.spawn(async move {
        let answer = in_turn(&owned, &in_lane, transaction).await;
        drop(in_lane);
        drop(tell.send(answer));
    });
    told.await.map_err(|_| app.broke_off("a transaction"))?
}

async fn in_turn(app: &App, in_lane: &InLane, transaction: Transaction) -> Result<JsonText> {
    let origin = &in_lane.origin;
    let until = app.env.uptime() + WAITS_MAX;
    let Some(_turn) = within(app, Some(until), in_lane.turn.lock()).await else {
        return Err(Error::Busy { retry_after: BUSY_FOR });
    };
    let (store, now_ms, of) = (app.store.clone(), app.env.now_ms(), origin.clone());
    let id = transaction.id.clone();
    let look = move || Ok(find_answer(&*store.snapshot(), &of, &id, now_ms)?);
    let number = match app.env.blocking(look).await? {
        Remembered::Answer(answer) => return Ok(answer),
        Remembered::Next(number) => number,
    };
    app.staged.require_place(origin)?;
    let until = app.env.uptime() + ANSWERED_WITHIN;
    let (results, some_events) = take_events(app, origin, transaction.pdus, until).await?;
    let some_edus = edus::take_in(app, origin, transaction.edus, until).await?;
    let answer = write_answer(results);
    if some_events || some_edus {
        let row = InboundTransactionRow {
            number,
            id: transaction.id,
            at_ms: app.env.now_ms(),
            answer: answer.as_str().to_owned(),
        };
        remember(app, origin.clone(), row).await?;
    }
    Ok(answer)
}

/// The outcome of looking for a transaction.
enum Remembered {
    /// It was answered like this.
    Answer(JsonText),
    /// It is new, and has this number among those of its server.
    Next(u64),
}

fn find_answer(
    read: &(impl Read + ?Sized),
    origin: &ServerName,
    id: &str,
    now_ms: u64,
) -> Result<Remembered, Fault> {
    let mut next = 0;
    for row in schema::INBOUND_TRANSACTION.prefix::<(String,)>(read, (origin.as_str(),), Direction::Up)? {
        let (_, Json(row)) = row?;
        if row.id == id && !is_old(&row, now_ms) {
            return Ok(Remembered::Answer(JsonText::stored(row.answer.as_bytes())));
        }
        next = next.max(row.number.saturating_add(1));
    }
    Ok(Remembered::Next(next))
}

fn is_old(row: &InboundTransactionRow, now_ms: u64) -> bool {
    row.at_ms.saturating_add(REMEMBERED_MS) <= now_ms
}

/// The row in which a transaction of this number is remembered.
pub(super) fn slot(number: u64) -> u8 {
    u8::try_from(number % REMEMBERED).unwrap_or_default()
}

async fn remember(app: &App, origin: OwnedServerName, row: InboundTransactionRow) -> Result<()> {
    let owned = app.clone();
    let write = move || {
        let guard = Guard::own_tables();
        let mut batch = owned.store.batch(&guard);
        if row.number == 0 {
            remembered::note_server(&owned, &mut batch, origin.as_str())?;
        }
        schema::INBOUND_TRANSACTION.put(&mut batch, (origin.as_str(), slot(row.number)), &Json(row));
        Ok(owned.store.enqueue(batch)?)
    };
    let enqueued = app.env.blocking(write).await?;
    write::durable(app, Some(enqueued)).await
}

/// Deletes what is remembered of transactions that are too old, some at once; answers where to go on, if there may be more.
pub(super) fn forget_old(
    app: &App,
    after: Option<(String, u8)>,
    count: usize,
) -> Result<Option<(String, u8)>> {
    let (snapshot, now_ms) = (app.store.snapshot(), app.env.now_ms());
    let low =
        after.as_ref().map_or(Bound::Unbounded, |(origin, slot)| Bound::Excluded((origin.as_str(), *slot)));
    let rows = schema::INBOUND_TRANSACTION.range::<(String, u8)>(
        &*snapshot,
        low,
        Bound::Unbounded,
        Direction::Up,
    )?;
    old_rows::look_over(app, rows, count, |note, (origin, slot), Json(row)| {
        if is_old(&row, now_ms) {
            schema::INBOUND_TRANSACTION.delete(note, (origin.as_str(), *slot));
        }
        Ok(())
    })
}

/// The answer about each event: nothing, or why it was not taken.
type Results = BTreeMap<OwnedEventId, Option<String>>;

fn write_answer(results: Results) -> JsonText {
    let (mut answer, mut left) = (Object::new(), REASONS_BYTES_MAX);
    answer.object("pdus", |pdus| {
        for (id, error) in results {
            pdus.object(id.as_str(), |result| {
                if let Some(error) = error {
                    let error = error.chars().filter(|char| !char.is_control()).take(REASON_CHARS_MAX);
                    let error: String = error.collect();
                    let after = left.checked_sub(error.len());
                    left = after.unwrap_or(left);
                    result.text("error", after.map_or(NO_REASON, |_| error.as_str()));
                }
            });
        }
    });
    answer.finish()
}

/// The events of a transaction, as far as a look at each can tell.
#[derive(Default)]
struct Sorted {
    results: Results,
    /// The events that are to be judged, by room.
    rooms: BTreeMap<RoomNum, OfRoom>,
    /// The events by which invitations and knocks end, of rooms that this server is not in.
    ended: Vec<Ended>,
    /// How many were not taken.
    refused: usize,
}

struct OfRoom {
    version: u8,
    events: Vec<Coming>,
}

/// Takes in the events of a transaction; answers what became of each, and whether any was taken.
async fn take_events(
    app: &App,
    origin: &OwnedServerName,
    pdus: Vec<Bytes>,
    until: Duration,
) -> Result<(Results, bool)> {
    if pdus.is_empty() {
        return Ok((Results::new(), false));
    }
    let (owned, of) = (app.clone(), origin.clone());
    let sort = move || {
        let us = &owned.config.server.name;
        sort(&owned.store.snapshot(), us, &of, &pdus, &owned.remote.held)
    };
    let Sorted { mut results, rooms, ended, refused } = app.env.blocking(sort).await?;
    (0..refused).for_each(|_| app.metrics.inbound_event("refused"));
    let judged = join_all(rooms.into_iter().map(|(room, of_room)| async move {
        let fates = judge::judge(app, (room, of_room.version), origin, &of_room.events, Some(until)).await;
        settle(app, room, origin, of_room.events, fates).await
    }));
    for of_room in judged.await {
        results.extend(of_room?);
    }
    for ended in ended {
        let id = ended.signed.unverified().id.clone();
        results.insert(id, ended::tell(app, origin, ended, until).await?);
    }
    let is_any = results.values().any(Option::is_none);
    Ok((results, is_any))
}

/// Looks at each event by itself: whether its room is one of ours and admits the server that sends it, whether it has the form
/// of an event, and whether it is here already. Events of a room that somebody of ours is coming into are held.
fn sort(
    snapshot: &Snapshot,
    us: &ServerName,
    origin: &ServerName,
    pdus: &[Bytes],
    held: &Held,
) -> Result<Sorted> {
    let mut sorted = Sorted::default();
    // In the first versions of rooms servers choose ids, so that an event is named by its room, too.
    let (mut rooms, mut seen) = (BTreeMap::new(), BTreeSet::new());
    for pdu in pdus {
        let claim = Claim::read(pdu);
        let num = claim.room.as_deref().map(|id| rooms::find_room(snapshot, id)).transpose()?.flatten();
        let known = match num {
            Some(num) => match rooms.get(&num) {
                Some(known) => Some(known),
                None => {
                    look_at_room(snapshot, us, num, origin)?.map(|room| &*rooms.entry(num).or_insert(room))
                }
            },
            None => None,
        };
        if let (Some(num), None) = (num, known)
            && let Some(ended) = ended::read(snapshot, us, origin, num, pdu)?
        {
            if seen.insert((Some(num), ended.signed.unverified().id.clone())) {
                sorted.ended.push(ended);
            }
            continue;
        }
        if known.is_none() && claim.room.as_deref().is_some_and(|room| held.hold(room, origin, pdu)) {
            sorted.results.extend(claim.guess_id(pdu).map(|id| (id, None)));
            continue;
        }
        let coming = match (num, known) {
            (Some(num), Some((row, true))) => {
                let signed = Signed::read(num, row, pdu);
                let signed = signed.map_err(|refusal| (Signed::find_id(row.version, pdu), refusal.message));
                signed.and_then(|signed| match why_not_sent_by(&signed, origin) {
                    None => Ok(signed),
                    Some(why) => Err((Some(signed.unverified().id.clone()), why.to_owned())),
                })
            }
            (_, Some((row, false))) => {
                Err((Signed::find_id(row.version, pdu), "The room does not admit your server.".to_owned()))
            }
            _ => Err((claim.guess_id(pdu), "This server is not in the room.".to_owned())),
        };
        match (coming, num, known) {
            (Ok(signed), Some(num), Some((row, _))) => {
                let id = signed.unverified().id.clone();
                if !seen.insert((Some(num), id.clone())) {
                    continue;
                }
                if is_judged(snapshot, num, &id)? && !completes(snapshot, row, num, &signed)? {
                    sorted.results.insert(id, None);
                    continue;
                }
                let of_room = OfRoom { version: row.version, events: Vec::new() };
                sorted.rooms.entry(num).or_insert(of_room).events.push(Coming { id, signed });
            }
            (Ok(_), ..) => {}
            (Err((id, why)), ..) => {
                tracing::debug!(%origin, ?id, why, "an event of another server is not taken");
                sorted.refused += 1;
                // Where an event comes twice, the one that is right counts.
                if let Some(id) = id.filter(|id| !seen.contains(&(num, id.clone()))) {
                    sorted.results.entry(id).or_insert(Some(why));
                }
            }
        }
    }
    for (_, id) in &seen {
        if sorted.results.get(id).is_some_and(Option::is_some) {
            sorted.results.remove(id);
        }
    }
    Ok(sorted)
}

/// The row of a room of ours, and whether it admits the server; none for a room whose events are not taken, because nobody of ours is
/// in it.
fn look_at_room(
    snapshot: &Snapshot,
    us: &ServerName,
    num: RoomNum,
    origin: &ServerName,
) -> Result<Option<(RoomRow, bool)>, Fault> {
    let Some(row) = rooms::find_row(snapshot, num)?.filter(|row| takes_events(row.resident)) else {
        return Ok(None);
    };
    if row.resident.is_in() && !members::is_server_joined(snapshot, num, us.as_str())? {
        return Ok(None);
    }
    let admits = |row| acl::admits(snapshot, num, origin).map(|admits| (row, admits));
    admits(row).map(Some)
}

/// Reads the events that were held while a join of this room was under way, and leaves out those that would have been refused.
pub(super) fn sort_held(
    change: &Change,
    events: Vec<HeldEvent>,
) -> Result<Vec<(OwnedServerName, Signed)>, Fault> {
    let mut sorted = Vec::with_capacity(events.len());
    for HeldEvent { origin, json, .. } in events {
        if !acl::admits(&change.batch, change.num, &origin)? {
            continue;
        }
        let signed = Signed::read(change.num, &change.row, &json).ok();
        let signed = signed.filter(|signed| why_not_sent_by(signed, &origin).is_none());
        sorted.extend(signed.map(|signed| (origin, signed)));
    }
    Ok(sorted)
}

/// Why an event is not this server's to send, where it is not. A server sends the events of its own users. A resident server also tells the
/// room of users of others who join, leave or knock by way of it, and whoever helps with an invitation by an address of that, which the
/// inviter's server need not have signed. Nobody sends what is left of another's event whose hash does not fit: it can be had whole.
fn why_not_sent_by(signed: &Signed, origin: &ServerName) -> Option<&'static str> {
    let event = signed.unverified();
    if event.sender.server_name() == origin {
        return None;
    }
    if signed.is_redacted() {
        return Some("The content is not that of the event's hash.");
    }
    let content = event.content.get();
    let is_member = event.event_type.to_string() == MEMBER;
    let is_own = event.state_key.as_deref() == Some(event.sender.as_str());
    let may_be = is_member
        && match event::membership_of(content) {
            Some(Membership::Join | Membership::Leave | Membership::Knock) => is_own,
            Some(Membership::Invite) => is_by_address(content),
            Some(Membership::Ban) | None => false,
        };
    if may_be { None } else { Some("Events of other servers' users are theirs to send.") }
}

/// Whether the content of a member event is that of an invitation by an address.
fn is_by_address(content: &str) -> bool {
    #[derive(Deserialize)]
    struct Content<'a> {
        #[serde(borrow)]
        third_party_invite: Option<&'a RawValue>,
    }
    serde_json::from_str::<Content<'_>>(content).is_ok_and(|content| content.third_party_invite.is_some())
}

/// Whether an event was judged already. An outlier was not: it has no place in the room's graph yet.
fn is_judged(snapshot: &Snapshot, num: RoomNum, id: &OwnedEventId) -> Result<bool, Fault> {
    let Some(event) = event::find_num(snapshot, num, id)? else { return Ok(false) };
    let place = schema::PLACE.get(snapshot, (num, event))?;
    Ok(matches!(place, Some(Place::Timeline(_) | Place::Aside)))
}

/// An event's word about its room, before its form is checked.
struct Claim {
    room: Option<ruma::OwnedRoomId>,
}

impl Claim {
    fn read(pdu: &[u8]) -> Self {
        #[derive(Deserialize)]
        struct Fields<'a> {
            #[serde(borrow, default)]
            room_id: Option<&'a RawValue>,
            #[serde(borrow, default, rename = "type")]
            event_type: Option<&'a RawValue>,
        }
        let text = |json: Option<&RawValue>| serde_json::from_str::<String>(json?.get()).ok();
        let Ok(Fields { room_id, event_type }) = serde_json::from_slice(pdu) else {
            return Self { room: None };
        };
        let room = match text(room_id) {
            Some(id) => RoomId::parse(id).ok(),
            // The create event of a room of version 12 is what the room is named after.
            None if room_id.is_none() && text(event_type).as_deref() == Some(CREATE) => {
                let id = Signed::find_id(NAMED_BY_HASH, pdu);
                id.and_then(|id| RoomId::parse(id.as_str().replacen('$', "!", 1)).ok())
            }
            None => None,
        };
        Self { room }
    }

    /// The id that an event of an unknown room probably has. Which version the room has is not known, but events say their ids only where
    /// servers choose these, and else versions differ in what hardly any event has.
    fn guess_id(&self, pdu: &[u8]) -> Option<OwnedEventId> {
        let stated = Signed::find_id(IDS_CHOSEN, pdu).filter(|id| id.server_name().is_some());
        if stated.as_ref().is_some_and(|id| id.as_str().len() <= ID_BYTES_MAX) {
            return stated;
        }
        let is_named_by_hash = self.room.as_ref().is_none_or(|room| room.server_name().is_none());
        Signed::find_id(if is_named_by_hash { NAMED_BY_HASH } else { NAMED_BY_HASH - 1 }, pdu)
    }
}

/// A room version in which servers choose the ids of events.
const IDS_CHOSEN: u8 = 2;
/// The first room version whose rooms are named by the hash of their create event.
const NAMED_BY_HASH: u8 = 12;

/// Stores the events of a room that could not be judged, and answers what became of each event.
async fn settle(
    app: &App,
    room: RoomNum,
    origin: &ServerName,
    events: Vec<Coming>,
    fates: Vec<Fate>,
) -> Result<Results> {
    let (mut results, mut waiting, mut ids) = (Results::new(), Vec::new(), Vec::new());
    let (mut some_came_in, mut at_once) = (false, false);
    for (event, fate) in events.into_iter().zip(fates) {
        match fate {
            Fate::Done => {
                app.metrics.inbound_event("taken");
                some_came_in = true;
                results.insert(event.id, None);
            }
            Fate::Refused(why) => {
                tracing::debug!(%origin, %room, event = %event.id, why, "an event of another server is not taken");
                app.metrics.inbound_event("refused");
                results.insert(event.id, Some(why));
            }
            fate @ (Fate::Waits | Fate::Unjudged) => {
                at_once |= fate == Fate::Unjudged;
                waiting.push((event.signed.name(), event.json()));
                ids.push(event.id);
            }
        }
    }
    let kept = staged::stage(app, room, origin, waiting, at_once).await?;
    for (id, is_kept) in ids.into_iter().zip(kept) {
        app.metrics.inbound_event(if is_kept { "waits" } else { "no_room" });
        let why = "Too many events of the room wait for others that are missing.";
        results.insert(id, (!is_kept).then(|| why.to_owned()));
    }
    if some_came_in {
        app.staged.hurry(room);
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_holds_a_bounded_part_of_what_events_say() {
        let of = |number: usize, why: &str| {
            (OwnedEventId::try_from(format!("$event{number:02}")).unwrap(), Some(why.to_owned()))
        };
        let results: Results = (0..EVENTS_MAX).map(|number| of(number, &"\u{0}é".repeat(300))).collect();
        let answer = write_answer(results);
        assert!(answer.as_str().len() <= REASONS_BYTES_MAX + EVENTS_MAX * 64, "{}", answer.as_str().len());
        let answer: serde_json::Value = serde_json::from_str(answer.as_str()).unwrap();
        assert_eq!(answer["pdus"]["$event00"]["error"], "é".repeat(REASON_CHARS_MAX));
        assert_eq!(answer["pdus"]["$event49"]["error"], NO_REASON);
        let short: Results = (0..EVENTS_MAX).map(|number| of(number, "It is not allowed.")).collect();
        assert!(!write_answer(short).as_str().contains(NO_REASON));
    }
}
