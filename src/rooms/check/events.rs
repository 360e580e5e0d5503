//! Checks the rows of events, and those by which events are found: places, ids, edges, transactions, relations,
//! threads.

use ruma::{
    CanonicalJsonObject, CanonicalJsonValue, EventId, UserId,
    serde::{Base64, base64::Standard},
    signatures::content_hash,
};

use crate::{
    accounts,
    ids::{EventNum, Order, RoomNum},
    rooms::{
        change::{Signed, txn},
        event, redact, relations, rules,
        state::{
            self, StateRef, StateValue,
            check::{of_room, reference},
        },
    },
    schema::event_types::REDACTION,
    schema::{
        self,
        relations::RelationKind,
        rooms::{AsideRow, EventRow, Place, RoomRow},
    },
    store::{
        Direction, Fault, LogEntry, Snapshot,
        check::{Doubts, RowCheck},
        tables, timer,
    },
};

/// The room that the walk is in, because rows come room by room.
#[derive(Default)]
struct Here(Option<(RoomNum, Option<RoomRow>)>);

impl Here {
    fn room(&mut self, read: &Snapshot, room: RoomNum) -> Result<Option<&RoomRow>, Fault> {
        if self.0.as_ref().is_none_or(|(of, _)| *of != room) {
            self.0 = Some((room, schema::ROOM.get(read, room)?));
        }
        Ok(self.0.as_ref().and_then(|(_, row)| row.as_ref()))
    }
}

pub(super) fn checks() -> Vec<RowCheck> {
    let (mut here, mut here_aside) = (Here::default(), Here::default());
    vec![
        of_room(&schema::TIMELINE, move |read, (num, order), row, doubts| {
            doubts.position(read, order.anchor);
            match here.room(read, *num)? {
                Some(room) => in_timeline(read, *num, room, *order, row, doubts),
                None => {
                    doubts.unless(false, "its room is gone");
                    Ok(())
                }
            }
        }),
        of_room(&schema::ASIDE, move |read, (num, number), aside, doubts| {
            doubts.unless(aside.row.header.event == *number, "the event in it has another number");
            let place = schema::PLACE.get(read, (*num, *number))?;
            let is_here = matches!(place, Some(Place::Aside | Place::Outlier));
            doubts.unless(is_here, "`place` says that it is kept elsewhere");
            doubts.unless(schema::ASIDE_COUNT.contains(read, *num)?, "its room counts no events aside");
            match here_aside.room(read, *num)? {
                Some(room) => put_aside(read, *num, room, aside, doubts),
                None => {
                    doubts.unless(false, "its room is gone");
                    Ok(())
                }
            }
        }),
        of_room(&schema::ASIDE_COUNT, |read, room, row, doubts| {
            let rows = schema::ASIDE.prefix::<(RoomNum,)>(read, (*room,), Direction::Up)?;
            let there = rows.count() as u64;
            doubts
                .unless(row.count == there, format!("it counts {} events, and {there} are there", row.count));
            Ok(())
        }),
        of_room(&schema::PLACE, |read, (room, number), place, doubts| {
            let there = match place {
                Place::Timeline(order) => {
                    schema::TIMELINE.get(read, (*room, *order))?.map(|row| row.header.event)
                }
                Place::Aside | Place::Outlier => {
                    schema::ASIDE.get(read, (*room, *number))?.map(|aside| aside.row.header.event)
                }
            };
            doubts.unless(there == Some(*number), "the event is not at that place");
            Ok(())
        }),
        RowCheck::of(&schema::EVENT_ID, |read, key, (room, number), doubts| {
            let stored = event::find_anywhere(read, *room, *number)?;
            let is_it = stored.is_some_and(|stored| stored.row.header.key == *key);
            doubts.unless(is_it, format!("event {number} of room {room} is gone or has another id"));
            Ok(())
        }),
        of_room(&schema::REDACTION_WAITING, |read, (room, _, redaction), _, doubts| {
            let there = schema::PLACE.contains(read, (*room, *redaction))?;
            doubts.unless(there, "the redaction is not there");
            Ok(())
        }),
        of_room(&schema::LEFT_OUT, |_, _, row, doubts| {
            doubts.unless(event::locate(&row.json).is_some(), "it is not an event");
            Ok(())
        }),
        of_room(&schema::REDACTED_ORIGINAL, |read, (room, number), json, doubts| {
            let stored = event::find_anywhere(read, *room, *number)?;
            let is_redacted = stored.is_some_and(|stored| stored.row.is_redacted());
            doubts.unless(is_redacted, "no redacted event is there");
            doubts.unless(event::locate(json).is_some(), "it is not an event");
            Ok(())
        }),
        of_room(&schema::AUTH_CHILD, |read, (room, allowing, number), (), doubts| {
            let stored = event::find_anywhere(read, *room, *number)?;
            let cites = stored.is_some_and(|stored| {
                stored.row.header.state_key.is_some() && stored.row.header.auth.contains(allowing)
            });
            doubts.unless(cites, "the one event does not name the other among its auth events");
            Ok(())
        }),
        RowCheck::of(&schema::SENT, |read, (room, day, user, device, _, txn), number, doubts| {
            let stored = event::find(read, *room, *number)?;
            let sent_by = stored.and_then(|stored| stored.row.header.sent_by);
            let is_it = sent_by.is_some_and(|by| (by.device, by.day) == (*device, *day) && by.txn == *txn);
            doubts.unless(is_it, format!("event {number} is gone, or was sent by another transaction"));
            doubts.unless(schema::USERS.contains(read, *user)?, "its account is gone");
            doubts.unless(timer::is_waiting(read, &txn::forget_on(*room, *day))?, "no timer will forget it");
            Ok(())
        }),
    ]
}

fn in_timeline(
    read: &Snapshot,
    num: RoomNum,
    room: &RoomRow,
    order: Order,
    row: &EventRow,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    let header = &row.header;
    let place = schema::PLACE.get(read, (num, header.event))?;
    doubts.unless(place == Some(Place::Timeline(order)), "`place` says that it is kept elsewhere");
    if order.minor == 0 {
        let entry = tables::LOG.get(read, order.anchor)?;
        let expected = LogEntry::Event { room: num, event: header.event };
        doubts.unless(entry == Some(expected), "the log has another entry at its position");
    }
    doubts.unless(order <= room.tip, "it stands above the tip of its room");
    // An event that turned out to be rejected is part of no state.
    if let Some(key) = header.state_key.filter(|_| !header.rejected) {
        let after = header.after.unwrap_or(StateRef::Main(order));
        let set = state::at(read, num, after, key)?;
        doubts.unless(set == StateValue::Event(header.event), "it is not in the state after it");
    }
    doubts.unless(
        is_known_by_transaction(read, num, room, row)?,
        "its transaction is not remembered, so that a retry would send it again",
    );
    related(read, num, order, row, doubts)?;
    everywhere(read, num, room, row, true, doubts)
}

/// Whether the transaction that made an event is remembered; `true` for an event that no transaction made.
fn is_known_by_transaction(
    read: &Snapshot,
    num: RoomNum,
    room: &RoomRow,
    row: &EventRow,
) -> Result<bool, Fault> {
    let Some(by) = &row.header.sent_by else { return Ok(true) };
    let sender = row.sender();
    let user = <&UserId>::try_from(&*sender).ok().map(|id| accounts::users::find_num(read, id));
    let Some(user) = user.transpose()?.flatten() else { return Ok(false) };
    if !timer::is_waiting(read, &txn::forget_on(num, by.day))? {
        // The transaction's day is over, so that its row may be gone.
        return Ok(true);
    }
    let redacts = rules(room)?;
    let redacts = event::redaction_target(row, &redacts.redaction);
    let endpoints = [
        Some(format!("send/{}", row.event_type())),
        redacts.map(|id| format!("redact/{id}")),
        Some(txn::GUESTS.to_owned()),
        Some(txn::DELAYED.to_owned()),
    ];
    for endpoint in endpoints.into_iter().flatten() {
        let key = (num, by.day, user, by.device, endpoint.as_str(), by.txn.as_str());
        if schema::SENT.get(read, key)? == Some(row.header.event) {
            return Ok(true);
        }
    }
    // A redaction that was redacted itself no longer says which event it redacts, so its endpoint cannot be told.
    Ok(row.is_redacted() && row.event_type() == REDACTION)
}

fn put_aside(
    read: &Snapshot,
    num: RoomNum,
    room: &RoomRow,
    aside: &AsideRow,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    let header = &aside.row.header;
    if let (Some(key), Some(after)) = (header.state_key, header.after) {
        let set = state::at(read, num, after, key)?;
        doubts.unless(set == StateValue::Event(header.event), "it is not in the state after it");
    }
    everywhere(read, num, room, &aside.row, !aside.rejected, doubts)
}

/// Checks what holds of an event wherever it is kept. `may_allow` says whether states can rest on it, so that edges
/// lead to it.
fn everywhere(
    read: &Snapshot,
    num: RoomNum,
    room: &RoomRow,
    row: &EventRow,
    may_allow: bool,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    let header = &row.header;
    doubts.unless(header.event.0 < room.next_event, "its number was never given");
    let found = schema::EVENT_ID.get(read, &header.key)?;
    doubts.unless(found == Some((num, header.event)), "it is not found by its id");
    doubts.unless(
        event::locate(&row.json) == Some(header.spans),
        "its fields are not at the places that its header says",
    );
    signed(room, row, doubts)?;
    let named = header.state_key.map(|key| schema::STATE_KEY.get(read, (num, key))).transpose()?;
    let is_named = match (named, row.state_key()) {
        (None, None) => true,
        // A rejected event sets nothing, so its state key has no number.
        (None, Some(_)) => !may_allow,
        (Some(Some(named)), Some(key)) => named.event_type == row.event_type() && named.state_key == key,
        _ => false,
    };
    doubts.unless(is_named, "its type and state key are not those of its key's number");
    let cited: Vec<EventNum> = header
        .prev
        .iter()
        .chain(&header.auth)
        .copied()
        .chain(header.replaces)
        .chain(header.redacted_by)
        .collect();
    let places = schema::PLACE.get_many(read, cited.iter().map(|event| (num, *event)))?;
    let forgotten = schema::ASIDE_COUNT.get(read, num)?.unwrap_or_default().forgotten;
    let missing = cited.iter().zip(places).filter(|(event, place)| place.is_none() && **event > forgotten);
    for (event, _) in missing {
        doubts.unless(false, format!("event {event} that it names is not there"));
    }
    for state in [header.before, header.after].into_iter().flatten() {
        reference(read, num, state, doubts)?;
    }
    if header.state_key.is_some() && may_allow {
        let edges = header.auth.iter().map(|allowing| (num, *allowing, header.event));
        let edges = schema::AUTH_CHILD.get_many(read, edges)?;
        doubts.unless(edges.iter().all(Option::is_some), "an edge from its auth events is missing");
    }
    Ok(())
}

/// Checks that the bytes are those that were signed, or their redacted form. The event's id proves only what redaction leaves;
/// the rest is proved by the hash that the event holds.
fn signed(room: &RoomRow, row: &EventRow, doubts: &mut Doubts) -> Result<(), Fault> {
    let rules = rules(room)?;
    let Ok(object) = serde_json::from_slice::<CanonicalJsonObject>(&row.json) else {
        // Before version 6 events may hold numbers that canonical JSON does not have, so their hashes are not worked out
        // again.
        let may_be = !rules.authorization.strict_canonical_json;
        doubts.unless(may_be, "it is not canonical JSON");
        return Ok(());
    };
    let id = event::event_id(&row.header.key, room.version);
    let is_it = Signed::find_id(room.version, &row.json).is_some_and(|found| found == id);
    doubts.unless(is_it, "its bytes are not those of the event of its id");
    let is_whole = row.is_redacted()
        || row.header.expired
        || has_its_hash(&object)
        // An event that came in with another content than it was sent with is kept in its redacted form.
        || redact::redacted(&row.json, rules).as_ref() == Some(&row.json);
    doubts.unless(is_whole, "its content is not the one that it was sent with");
    Ok(())
}

/// Whether an event has the content hash that it says.
fn has_its_hash(event: &CanonicalJsonObject) -> bool {
    let Some(CanonicalJsonValue::Object(hashes)) = event.get("hashes") else { return false };
    let Some(CanonicalJsonValue::String(said)) = hashes.get("sha256") else { return false };
    let said = Base64::<Standard, [u8; 32]>::parse(said);
    said.is_ok_and(|said| content_hash(event).is_ok_and(|hash| hash == said))
}

/// Checks that an event which refers to an older one of its room is found from that one.
fn related(
    read: &Snapshot,
    num: RoomNum,
    order: Order,
    row: &EventRow,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    if row.header.unseen {
        return Ok(());
    }
    let Some(relation) = relations::relates_to(row.content()) else { return Ok(()) };
    let parent: &EventId = &relation.event_id;
    // An event that came in later was unknown when this one was indexed.
    let parent = event::find_num(read, num, parent)?.filter(|parent| *parent < row.header.event);
    if let Some(parent) = parent {
        let kind = RelationKind::of(&relation.rel_type);
        let found = schema::RELATION.get(read, (num, parent, kind, order))?;
        let is_it = found.is_some_and(|found| found.event == row.header.event);
        doubts.unless(is_it, format!("it is not found from event {parent}, to which it refers"));
    }
    Ok(())
}
