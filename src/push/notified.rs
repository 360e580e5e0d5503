//! The events of which a user was notified, the newest first.
//!
//! Nothing is stored for it: the events of the user's rooms are gone through, newest first over all rooms, and each is judged as it would
//! be pushed now. So a page never shows what its reader may not see any more, and it costs a bounded number of events.
//!
//! Specification: client-server API, `GET /notifications`.

use std::{
    collections::{BTreeMap, BinaryHeap},
    ops::Bound,
    sync::Arc,
};

use crate::{
    accounts::{Caller, ignored::Ignored},
    ids::{Order, Position, RoomNum},
    json::{JsonText, Object},
    push::{
        Push, Reader,
        reader::{Explained, Notifies},
    },
    rooms::{
        self,
        erased::Erased,
        event::StoredEvent,
        members,
        show::{self, Viewer},
        view::RoomView,
        visibility,
    },
    schema::{
        self,
        rooms::{Membership, RoomRow, UserRoomRow},
    },
    store::{Direction, Fault, Read},
};

/// Look at no more than this many events for one page. A page of a user whose rooms are busy and mostly silent may have less than was asked
/// for, and says where the next one goes on.
const LOOKED_AT_MAX: usize = 1_000;
/// Look at no more than this many rooms of a user.
const ROOMS_MAX: usize = 10_000;

/// The part of the list that is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// Only what is before this position; `None` for the newest.
    pub before: Option<Position>,
    /// At most this many events, at least one.
    pub limit: usize,
    /// Only events that highlight.
    pub only_highlights: bool,
    /// The time now, in milliseconds since the epoch.
    pub now_ms: u64,
}

/// A part of the list.
#[derive(Debug, Default)]
pub struct Page {
    /// The notifications as clients see them, the newest first.
    pub notifications: Vec<JsonText>,
    /// The position before which the next page goes on; none where there is no more.
    pub next: Option<Position>,
}

/// A room in which somebody looks for notifications.
struct Room {
    row: RoomRow,
    own: UserRoomRow,
    reader: visibility::Reader,
}

/// Lists notifications of a caller.
pub fn list(read: &(impl Read + ?Sized), push: &Push, caller: &Caller, ask: Ask) -> Result<Page, Fault> {
    let reader = push.reader(read, caller.user, &caller.user_id)?;
    let ignored = Arc::new(Ignored::of(read, caller.user, &caller.user_id)?);
    let newest = ask.before.map_or(read.upto(), Position::before);
    let mut heap = BinaryHeap::new();
    for room in members::list_user_rooms(read, caller.user)?.take(ROOMS_MAX) {
        let (room, own) = room?;
        match own.membership {
            Membership::Join => heap.push((newest, room)),
            Membership::Invite if own.since <= newest => heap.push((own.since, room)),
            Membership::Invite | Membership::Knock | Membership::Leave | Membership::Ban => {}
        }
    }
    let mut lister = Lister { read, reader, caller, ask, ignored, erased: Erased::default() };
    let (mut page, mut looks) = (Page::default(), LOOKED_AT_MAX);
    let mut known: BTreeMap<RoomNum, Room> = BTreeMap::new();
    while let Some((from, room)) = heap.pop() {
        let found = match known.remove(&room) {
            Some(found) => found,
            None => {
                let Some(found) = lister.open(room)? else { continue };
                found
            }
        };
        let next_room = heap.peek().map_or(Position::ZERO, |(position, _)| *position);
        let left = lister.walk(&mut page, (room, &found), (from, next_room), &mut looks)?;
        if let Some(left) = left {
            heap.push((left, room));
            known.insert(room, found);
        }
        if page.notifications.len() >= ask.limit || looks == 0 || lister.reader.is_spent() {
            page.next = heap.peek().map(|(position, _)| position.plus(1));
            break;
        }
    }
    Ok(page)
}

struct Lister<'a, R: ?Sized> {
    read: &'a R,
    reader: Reader<'a>,
    caller: &'a Caller,
    ask: Ask,
    ignored: Arc<Ignored>,
    erased: Erased,
}

impl<R: Read + ?Sized> Lister<'_, R> {
    fn open(&self, room: RoomNum) -> Result<Option<Room>, Fault> {
        let Some(row) = rooms::find_row(self.read, room)? else { return Ok(None) };
        let Some(own) = members::find(self.read, self.caller.user, room)? else { return Ok(None) };
        let ignored = Arc::clone(&self.ignored);
        let reader = visibility::Reader::with_row(room, &self.caller.user_id, &own, ignored);
        Ok(Some(Room { row, own, reader }))
    }

    /// Walks back in a room from a position, as long as no other room has anything newer. Answers where the room goes on, if it does.
    fn walk(
        &mut self,
        page: &mut Page,
        (num, room): (RoomNum, &Room),
        (from, other): (Position, Position),
        looks: &mut usize,
    ) -> Result<Option<Position>, Fault> {
        if room.own.membership == Membership::Invite {
            *looks = looks.saturating_sub(1);
            self.add_invitation(page, (num, room))?;
            return Ok(None);
        }
        let mut from = from;
        'below: loop {
            let low = Bound::Excluded((num, Order::upto(room.own.since)));
            let high = Bound::Included((num, Order::live(from)));
            let rows = schema::TIMELINE.range::<(RoomNum, Order)>(self.read, low, high, Direction::Down)?;
            for row in rows {
                let ((_, order), row) = row?;
                let is_enough = page.notifications.len() >= self.ask.limit || self.reader.is_spent();
                if order.minor != 0 && !is_enough && *looks > 0 {
                    // Any number of events that filled a hole may stand between two live ones, and none of them notifies.
                    *looks -= 1;
                    from = order.anchor.before();
                    continue 'below;
                }
                if order.anchor < other || is_enough || *looks == 0 {
                    // Below a live event that was told stand those that filled a hole beneath it, which has the same anchor.
                    return Ok(Some(if order.minor == 0 { order.anchor } else { order.anchor.before() }));
                }
                *looks -= 1;
                let stored = StoredEvent { order, row };
                if let Some(notifies) = self.reader.look_again(self.read, (num, &room.row), &stored)?
                    && self.is_asked_for(&notifies.rule)
                {
                    page.notifications.push(self.show((num, room), &stored, &notifies)?);
                }
            }
            return Ok(None);
        }
    }

    /// When an event was sent, as far as its sender can be believed: nothing that is here was sent later than now.
    fn sent_ms(&self, claimed_ms: u64) -> u64 {
        claimed_ms.min(self.ask.now_ms)
    }

    fn is_asked_for(&self, rule: &Explained) -> bool {
        rule.outcome.highlight || !self.ask.only_highlights
    }

    fn show(
        &self,
        (num, room): (RoomNum, &Room),
        stored: &StoredEvent,
        notifies: &Notifies,
    ) -> Result<JsonText, Fault> {
        let viewer = Viewer {
            user: &self.caller.user_id,
            device: Some(self.caller.device),
            now_ms: self.ask.now_ms,
            with_room_id: false,
            reader: &room.reader,
            erased: &self.erased,
        };
        let view = RoomView { read: self.read, num, row: &room.row };
        let event = show::show(view, stored, &viewer, Some(room.own.membership))?;
        Ok(write(
            &room.row,
            &event,
            self.sent_ms(stored.row.header.sent_ms),
            &notifies.rule,
            notifies.is_read,
        ))
    }

    /// Adds the invitation to a room, whether it stands in the room or comes from outside.
    fn add_invitation(&self, page: &mut Page, (num, room): (RoomNum, &Room)) -> Result<(), Fault> {
        if let Some(stored) = rooms::event::find(self.read, num, room.own.event)? {
            if let Some(notifies) = self.reader.look_again(self.read, (num, &room.row), &stored)?
                && self.is_asked_for(&notifies.rule)
            {
                page.notifications.push(self.show((num, room), &stored, &notifies)?);
            }
            return Ok(());
        }
        let found = self.reader.look_outside(self.read, (num, &room.row), room.own.since)?;
        if let Some((invitation, rule)) = found.filter(|(_, rule)| self.is_asked_for(rule)) {
            #[derive(serde::Deserialize)]
            struct Fields {
                origin_server_ts: u64,
            }
            let fields: Option<Fields> = serde_json::from_str(invitation.event.as_str()).ok();
            let sent_ms = fields.map_or(0, |fields| fields.origin_server_ts);
            page.notifications.push(write(&room.row, &invitation.event, self.sent_ms(sent_ms), &rule, false));
        }
        Ok(())
    }
}

fn write(room: &RoomRow, event: &JsonText, sent_ms: u64, rule: &Explained, is_read: bool) -> JsonText {
    let mut notification = Object::with_capacity(event.as_str().len() + 256);
    notification.json("actions", &*rule.actions);
    notification.json("event", event);
    // The rules of this server name no profile; clients expect the field.
    notification.json("profile_tag", &JsonText::from(&serde_json::Value::Null));
    notification.flag("read", is_read);
    notification.text("room_id", room.id.as_str());
    notification.number("ts", sent_ms);
    notification.finish()
}
