//! Brings what the log says into the index: new messages, edits, redactions, rooms that become encrypted, users who are erased.
//!
//! An entry of the log says that something happened to an event, and the event is indexed as it is by now. So it does no harm to
//! read an entry twice, or to read it late.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Bound,
};

use serde_json::value::RawValue;

use crate::{
    accounts::users,
    error::Result,
    ids::{EventNum, Order, Position, RoomNum},
    rooms::{
        self,
        change::FILLED_AT_ONCE_MAX,
        event::{self, StoredEvent},
        filter,
        relations::{self, edits},
    },
    schema,
    schema::event_types::{ENCRYPTION, MESSAGE, NAME, REDACTION, REPLACE, TOPIC},
    search::index::{Change, Document, Progress, TextKind, Walk},
    store::{Direction, Fault, LogEntry, Read, tail},
};

/// At most this many entries of the log are read at once, because they are held in memory.
const PAGE_MAX: usize = 2_000;
/// A walk reads at most this many events at once.
const WALKED_AT_ONCE: usize = if cfg!(test) { 5 } else { 2_000 };
/// A message is found by the texts of at most this many of its edits, the newest. Who sees older ones alone does not find it.
const EDITS_MAX: usize = 32;
/// A message is found by the texts of no further edits once those of its newest have this many bytes, because each edit has all of them
/// indexed again.
const EDITS_BYTES_MAX: usize = 64 << 10;
/// The text of a `m.topic` is looked for among at most this many representations.
const REPRESENTATIONS_MAX: usize = 20;

/// The outcome of reading on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Followed {
    /// There is more to read.
    More,
    /// Everything that was written has been read.
    All,
    /// The log was trimmed before it was read, so that the index has to be built anew.
    Missed,
}

/// Reads on: a page of the log, or where that is read, a part of the walk that fills a new index. The changes are not committed
/// yet. `kept_ms` is for how long the words of what is redacted may stay on the disk.
pub fn read_on(
    read: &(impl Read + ?Sized),
    change: &mut Change<'_>,
    progress: &mut Progress,
    now_ms: u64,
    kept_ms: u64,
) -> Result<Followed> {
    let mut page =
        Page { read, change, walk: progress.walk, now_ms, rooms: HashMap::new(), is_deleted: false };
    let upto = read.upto();
    let is_all = progress.position() >= upto;
    if !is_all {
        let position = progress.position();
        let tail::Tail::Entries(entries) = tail::read_after(read, position, PAGE_MAX)? else {
            return Ok(Followed::Missed);
        };
        let is_last = entries.len() < PAGE_MAX;
        let reached = entries.last().map_or(upto, |(last, _)| if is_last { upto } else { *last });
        page.follow(&entries)?;
        progress.position = reached.number();
    } else if let Some(walk) = progress.walk {
        progress.walk = page.walk_on(walk)?;
    }
    if page.is_deleted && progress.scrub_by_ms.is_none() {
        progress.scrub_by_ms = Some(now_ms.saturating_add(kept_ms));
    }
    let is_more = progress.position() < upto || progress.walk.is_some();
    Ok(if is_more { Followed::More } else { Followed::All })
}

/// A page that is being brought into the index.
struct Page<'p, 'c, R: ?Sized> {
    read: &'p R,
    change: &'p mut Change<'c>,
    walk: Option<Walk>,
    now_ms: u64,
    /// Whether each room that was asked about is encrypted.
    rooms: HashMap<RoomNum, bool>,
    /// Whether words were deleted that nobody is to find on the disk.
    is_deleted: bool,
}

impl<R: Read + ?Sized> Page<'_, '_, R> {
    fn follow(&mut self, entries: &[(Position, LogEntry)]) -> Result<()> {
        // Each event is indexed once a page, however often the page speaks of it.
        let mut changed = BTreeSet::new();
        for (_, entry) in entries {
            match *entry {
                LogEntry::Event { room, event } => self.follow_event(room, event, &mut changed)?,
                LogEntry::RoomState { room } => {
                    if self.is_encrypted(room)? {
                        self.delete_room(room)?;
                    }
                }
                LogEntry::Filled { room, top } => {
                    let (low, high) = (Bound::Included((room, Order::MIN)), Bound::Included((room, top)));
                    let rows =
                        schema::TIMELINE.range::<(RoomNum, Order)>(self.read, low, high, Direction::Down)?;
                    let rows: Vec<_> = rows.take(FILLED_AT_ONCE_MAX).collect::<Result<_, _>>()?;
                    for ((_, _), row) in rows {
                        self.follow_event(room, row.header.event, &mut changed)?;
                    }
                }
                LogEntry::Expired { room, event } => {
                    changed.insert((room, event));
                    let edited = self.change.delete_edit(room, event)?;
                    changed.extend(edited.into_iter().map(|event| (room, event)));
                    self.is_deleted = true;
                }
                LogEntry::Account { user } => {
                    if let Some(row) = users::find(self.read, user)?.filter(|row| row.is_erased) {
                        self.change.delete_sender(row.user_id.as_str())?;
                        self.is_deleted = true;
                    }
                }
                LogEntry::Receipts { .. }
                | LogEntry::AccountData { .. }
                | LogEntry::Device { .. }
                | LogEntry::ToDevice { .. }
                | LogEntry::DeviceList { .. }
                | LogEntry::Server
                | LogEntry::OtherDeviceList => {}
            }
        }
        for (room, event) in changed {
            self.index_anew(room, event)?;
        }
        Ok(())
    }

    /// Notes which events have to be indexed because of this one.
    fn follow_event(
        &mut self,
        room: RoomNum,
        event: EventNum,
        changed: &mut BTreeSet<(RoomNum, EventNum)>,
    ) -> Result<()> {
        let Some(stored) = event::find(self.read, room, event)? else {
            // It was purged, or taken out of the timeline.
            changed.insert((room, event));
            return Ok(());
        };
        match &*stored.row.event_type() {
            MESSAGE => {
                let edited = relations::relates_to(stored.row.content())
                    .filter(|relation| relation.rel_type == REPLACE)
                    .map(|relation| event::find_num(self.read, room, &relation.event_id))
                    .transpose()?;
                changed.extend(edited.unwrap_or(Some(event)).map(|event| (room, event)));
            }
            NAME | TOPIC => {
                changed.insert((room, event));
            }
            REDACTION => {
                if let Some(target) = target_of(self.read, room, &stored)? {
                    changed.insert((room, target));
                    let edited = self.change.delete_edit(room, target)?;
                    changed.extend(edited.into_iter().map(|event| (room, event)));
                    self.is_deleted = true;
                }
            }
            ENCRYPTION => {
                self.rooms.remove(&room);
                if self.is_encrypted(room)? {
                    self.delete_room(room)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn delete_room(&mut self, room: RoomNum) -> Result<()> {
        self.is_deleted = true;
        self.change.delete_room(room)
    }

    /// Puts the document of an event, as it is now, in place of the one that the index may have.
    fn index_anew(&mut self, room: RoomNum, event: EventNum) -> Result<()> {
        let stored = event::find(self.read, room, event)?;
        if let (Some(walk), Some(stored)) = (&self.walk, &stored)
            && walk.will_read(room, stored.order)
        {
            return Ok(());
        }
        self.change.delete_event(room, event)?;
        if let Some(stored) = stored {
            self.add(room, &stored)?;
        }
        Ok(())
    }

    /// Reads the next events of a walk, none of which is in the index. Gives the walk where it has not ended.
    fn walk_on(&mut self, walk: Walk) -> Result<Option<Walk>> {
        let low = Bound::Included(RoomNum(walk.room));
        let rooms = schema::ROOM.range::<RoomNum>(self.read, low, Bound::Unbounded, Direction::Up)?;
        let base = Order::upto(Position::new(walk.base).unwrap_or(Position::MAX));
        let (mut left, mut at) = (WALKED_AT_ONCE, walk);
        for room in rooms {
            let (room, _) = room?;
            let after = if room.0 == at.room { at.after() } else { Order::MIN };
            at = walk.at(room, after);
            left = left.saturating_sub(1);
            if after < base && !self.is_encrypted(room)? {
                let (low, high) = (Bound::Excluded((room, after)), Bound::Included((room, base)));
                let rows = schema::TIMELINE.range::<(RoomNum, Order)>(self.read, low, high, Direction::Up)?;
                let rows: Vec<_> = rows.take(left).collect::<Result<_, _>>()?;
                left -= rows.len();
                for ((_, order), row) in rows {
                    at = walk.at(room, order);
                    self.add(room, &StoredEvent { order, row })?;
                }
            }
            if left == 0 {
                return Ok(Some(at));
            }
            // The room is at its end, so that it is not begun again.
            at = walk.at(room, Order::MAX);
        }
        Ok(None)
    }

    fn is_encrypted(&mut self, room: RoomNum) -> Result<bool, Fault> {
        if let Some(known) = self.rooms.get(&room) {
            return Ok(*known);
        }
        let is_encrypted = rooms::find_state(self.read, room, ENCRYPTION, "")?.is_some();
        self.rooms.insert(room, is_encrypted);
        Ok(is_encrypted)
    }

    /// Adds the documents of an event as it is now: none for one that no search finds, and one for each text of a message that was edited,
    /// because who does not see an edit finds it by the text before.
    fn add(&mut self, room: RoomNum, stored: &StoredEvent) -> Result<()> {
        let mut later = Vec::new();
        for edit in list_edits(self.read, room, stored)? {
            if let Some(document) = self.document(room, stored, Some(&edit))? {
                self.change.add(&Document { later: later.clone(), ..document })?;
            }
            later.push((edit.event(), edit.order.anchor));
        }
        if let Some(own) = self.document(room, stored, None)? {
            self.change.add(&Document { later, ..own })?;
        }
        Ok(())
    }

    /// The document of an event with its own text, or with that of this edit; `None` where no search finds it by that.
    fn document(
        &mut self,
        room: RoomNum,
        stored: &StoredEvent,
        edit: Option<&StoredEvent>,
    ) -> Result<Option<Document>> {
        let Some((kind, text)) = text_of(stored, edit) else { return Ok(None) };
        let sender = stored.row.sender().into_owned();
        // The name and the topic of a room are the room's, whoever set them.
        let is_erased = kind == TextKind::Body && users::is_erased(self.read, &sender)?;
        if is_erased || self.is_encrypted(room)? {
            return Ok(None);
        }
        Ok(Some(Document {
            room,
            event: stored.event(),
            edit: edit.map(|edit| (edit.event(), edit.order.anchor)),
            later: Vec::new(),
            order: stored.order,
            sent_ms: stored.row.header.sent_ms.min(self.now_ms),
            kind,
            has_url: filter::has_url(stored.row.content()),
            sender,
            text,
        }))
    }
}

/// Gives the event that a redaction names, if it is here.
fn target_of(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    redaction: &StoredEvent,
) -> Result<Option<EventNum>, Fault> {
    let Some(row) = rooms::find_row(read, room)? else { return Ok(None) };
    match event::redaction_target(&redaction.row, &rooms::rules(&row)?.redaction) {
        Some(target) => event::find_num(read, room, &target),
        None => Ok(None),
    }
}

/// Lists the edits of a message by whose texts it is found, the one that counts first.
fn list_edits(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    stored: &StoredEvent,
) -> Result<Vec<StoredEvent>, Fault> {
    if stored.row.event_type() != MESSAGE || stored.row.header.state_key.is_some() {
        return Ok(Vec::new());
    }
    let mut edits = edits::list_edits(read, room, stored, EDITS_MAX)?;
    let mut bytes = 0;
    let kept = edits.iter().take_while(|edit| {
        let is_kept = bytes < EDITS_BYTES_MAX;
        bytes += edit.row.content().len();
        is_kept
    });
    let kept = kept.count();
    edits.truncate(kept);
    Ok(edits)
}

/// Gives the text by which an event is found: its own, or that of this edit. `None` for an event that has none: that is redacted, unseen,
/// an edit itself, or of another type.
pub fn text_of(stored: &StoredEvent, edit: Option<&StoredEvent>) -> Option<(TextKind, String)> {
    if stored.row.header.unseen || stored.row.is_redacted() {
        return None;
    }
    let content = stored.row.content();
    let state_key = stored.row.state_key();
    match (&*stored.row.event_type(), state_key.as_deref()) {
        (MESSAGE, None) => {
            if relations::relates_to(content).is_some_and(|relation| relation.rel_type == REPLACE) {
                return None;
            }
            let text = match edit {
                Some(edit) => {
                    field(edit.row.content(), "m.new_content").and_then(|new| text_field(new.get(), "body"))
                }
                None => text_field(content, "body"),
            };
            text.map(|text| (TextKind::Body, text))
        }
        (NAME, Some("")) => text_field(content, "name").map(|text| (TextKind::Name, text)),
        (TOPIC, Some("")) => topic(content).map(|text| (TextKind::Topic, text)),
        _ => None,
    }
}

/// Gives both the topic as it has always been written and the plain text of its newer form, where they differ.
fn topic(content: &str) -> Option<String> {
    let old = text_field(content, "topic");
    let list = field(content, "m.topic").and_then(|topic| field(topic.get(), "m.text"));
    let list: Vec<&RawValue> =
        list.and_then(|list| serde_json::from_str(list.get()).ok()).unwrap_or_default();
    let is_plain =
        |it: &&&RawValue| text_field(it.get(), "mimetype").is_none_or(|mimetype| mimetype == "text/plain");
    let plain = list.iter().take(REPRESENTATIONS_MAX).find(is_plain);
    let new = plain.and_then(|plain| text_field(plain.get(), "body"));
    match (old, new) {
        (Some(old), Some(new)) if old != new => Some(format!("{old}\n{new}")),
        (old, new) => old.or(new),
    }
}

fn field<'a>(json: &'a str, name: &str) -> Option<&'a RawValue> {
    let fields: BTreeMap<std::borrow::Cow<'a, str>, &'a RawValue> = serde_json::from_str(json).ok()?;
    fields.get(name).copied()
}

fn text_field(json: &str, name: &str) -> Option<String> {
    serde_json::from_str(field(json, name)?.get()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_is_its_text_in_the_old_and_in_the_new_form() {
        for (content, expected) in [
            (r#"{"topic":"old"}"#, Some("old")),
            (r#"{"topic":"same","m.topic":{"m.text":[{"body":"same"}]}}"#, Some("same")),
            (
                r#"{"topic":"old","m.topic":{"m.text":[{"mimetype":"text/html","body":"<b>"},{"mimetype":"text/plain","body":"new"}]}}"#,
                Some("old\nnew"),
            ),
            (r#"{"m.topic":{"m.text":[{"body":"new"}]}}"#, Some("new")),
            (r#"{"topic":7,"m.topic":{"m.text":{"body":"x"}}}"#, None),
            (r#"{"topic":"old","m.topic":[]}"#, Some("old")),
            ("{}", None),
            ("[]", None),
        ] {
            assert_eq!(topic(content).as_deref(), expected, "{content}");
        }
    }
}
