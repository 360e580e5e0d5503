//! The shape of sliding sync (MSC4186): typed news becomes JSON, one room at a time. What clients called otherwise before the
//! proposal was settled is written under both names.

use bytes::Bytes;
use ruma::RoomId;
use serde_json::Value;

use crate::{
    ids::Position,
    json::{JsonRef, JsonText, List, Object},
    rooms::{
        event::StoredEvent,
        receipts,
        show::{self, Extras},
    },
    schema::{
        encryption::KeyCounts,
        event_types::{PUSH_RULES, RECEIPT, TYPING},
        receipts::{ReceiptKey, ReceiptRow},
        rooms::Membership,
    },
    store::Fault,
    sync::{
        Pos,
        collect::{
            Outside,
            sliding::{Hero, RoomNews},
        },
        shape::v3,
        streams::{account_data::Data, device_lists::DeviceLists, subscriptions::Subscriptions},
        window::{RoomWindow, Window},
    },
};

/// The name of the extension that tells sticky events, until the proposal is settled.
const STICKY_EVENTS: &str = "org.matrix.msc4354.sticky_events";
/// The name of the extension that tells changes of subscriptions to threads, until the proposal is settled.
const THREAD_SUBSCRIPTIONS: &str = "io.element.msc4308.thread_subscriptions";
/// About how many bytes an answer takes beside its rooms.
const SMALL_BYTES: usize = 4 << 10;

/// An answer of sliding sync while it is being written.
pub(crate) struct Answer<'a, 'w> {
    window: &'a Window<'w>,
    lists: Object,
    rooms: Object,
    to_device: Option<JsonText>,
    e2ee: Option<JsonText>,
    global_data: Vec<JsonText>,
    room_data: Object,
    receipts: Object,
    typing: Object,
    sticky: Object,
    sticky_next: Option<String>,
    subscriptions: Option<JsonText>,
}

/// The head of a room, which is told whatever the user is to it.
pub(crate) struct RoomHead<'a> {
    /// The client replaces whatever it knows of the room.
    pub(crate) is_initial: bool,
    /// Whether it is a direct chat, if the client does not know that.
    pub(crate) is_dm: Option<bool>,
    /// The names of the lists that it is in.
    pub(crate) lists: &'a [&'a str],
    /// The membership of the user.
    pub(crate) membership: Membership,
}

impl<'a, 'w> Answer<'a, 'w> {
    /// Begins an answer that says nothing yet, for this window.
    pub(crate) fn new(window: &'a Window<'w>) -> Self {
        Self {
            window,
            lists: Object::new(),
            rooms: Object::new(),
            to_device: None,
            e2ee: None,
            global_data: Vec::new(),
            room_data: Object::new(),
            receipts: Object::new(),
            typing: Object::new(),
            sticky: Object::new(),
            sticky_next: None,
            subscriptions: None,
        }
    }

    /// Whether it tells of any room.
    pub(crate) fn has_rooms(&self) -> bool {
        !self.rooms.is_empty()
    }

    /// The bytes of its rooms.
    pub(crate) fn room_bytes(&self) -> usize {
        self.rooms.byte_count()
    }

    /// Whether an extension tells anything of a room.
    pub(crate) fn has_room_extensions(&self) -> bool {
        !self.room_data.is_empty() || !self.receipts.is_empty() || !self.typing.is_empty()
    }

    /// Sets the number of rooms of each list.
    pub(crate) fn lists<'n>(&mut self, counts: impl Iterator<Item = (&'n str, u64)>) {
        for (name, count) in counts {
            self.lists.object(name, |list| list.number("count", count));
        }
    }

    /// Adds a room that the user is or was in.
    pub(crate) fn room(
        &mut self,
        room: &RoomWindow<'_, '_>,
        head: &RoomHead<'_>,
        news: &RoomNews,
    ) -> Result<(), Fault> {
        self.rooms.object(room.row.id.as_str(), |json| {
            write_head(json, head);
            for (field, text) in [("name", &news.name), ("avatar", &news.avatar)] {
                match text {
                    Some(Some(text)) => json.text(field, text),
                    Some(None) => json.json(field, JsonRef::stored(b"null")),
                    None => {}
                }
            }
            write_summary(json, news);
            if !news.state.events.is_empty() || !news.state.gone.is_empty() {
                json.list_with("required_state", |list| write_state(list, room, news))?;
            }
            write_timeline(json, room, news)?;
            if let Some(counts) = &news.counts {
                json.number("notification_count", counts.total.notifications);
                json.number("highlight_count", counts.total.highlights);
            }
            write_bump(json, news.bump_stamp);
            Ok(())
        })
    }

    /// Adds a room that the user is invited to or knocks at.
    pub(crate) fn outside(
        &mut self,
        room: &RoomWindow<'_, '_>,
        head: &RoomHead<'_>,
        state: &Outside,
    ) -> Result<(), Fault> {
        let shown = v3::show_stripped(room, state)?;
        self.rooms.object(room.row.id.as_str(), |json| {
            write_head(json, head);
            json.list("stripped_state", &shown);
            json.list("invite_state", &shown);
            write_bump(json, Some(room.user_row.since));
        });
        Ok(())
    }

    /// Adds a room of which nothing is told but what its head says.
    pub(crate) fn head(&mut self, room_id: &RoomId, head: &RoomHead<'_>) {
        self.rooms.object(room_id.as_str(), |json| write_head(json, head));
    }

    /// Sets the messages that wait for the device, and the token by which it confirms them.
    pub(crate) fn messages_to_device(&mut self, messages: &[Bytes], next_batch: &str) {
        let mut json = Object::new();
        json.text("next_batch", next_batch);
        json.list("events", messages.iter().map(|message| JsonRef::stored(message)));
        self.to_device = Some(json.finish());
    }

    /// Sets the users whose devices changed, and how many keys the device has left.
    pub(crate) fn e2ee(&mut self, lists: Option<&DeviceLists>, keys: &KeyCounts) {
        let mut json = Object::new();
        if let Some(lists) = lists.filter(|lists| !lists.is_empty()) {
            json.json("device_lists", &v3::show_device_lists(lists));
        }
        v3::write_key_counts(&mut json, keys);
        self.e2ee = Some(json.finish());
    }

    /// Sets the account data that belongs to no room.
    pub(crate) fn global_data(&mut self, data: &Data, push_rules: Option<&Value>) {
        self.global_data = v3::show_data(data, |_| true);
        if let Some(rules) = push_rules {
            self.global_data.push(v3::plain_event(PUSH_RULES, &JsonText::from(rules)));
        }
    }

    /// Adds the account data of a room, if there is any.
    pub(crate) fn room_data(&mut self, room_id: &str, data: &Data) {
        if !data.is_empty() {
            self.room_data.list(room_id, &v3::show_data(data, |_| true));
        }
    }

    /// Adds the receipts of a room, if there are any. A room has one receipt event: where a user has receipts for several threads
    /// at one event, one of them is said.
    pub(crate) fn receipts(&mut self, room_id: &str, told: &[(ReceiptKey, ReceiptRow)]) {
        let mut merged = serde_json::Map::new();
        for content in receipts::contents(told).into_iter().rev() {
            merge(&mut merged, content);
        }
        if !merged.is_empty() {
            let content = JsonText::from(&Value::Object(merged));
            self.receipts.json(room_id, &v3::plain_event(RECEIPT, &content));
        }
    }

    /// Adds the users who type in a room.
    pub(crate) fn typing(&mut self, room_id: &str, typists: &[String]) {
        self.typing.object(room_id, |event| {
            event.text("type", TYPING);
            event.object("content", |content| content.texts("user_ids", typists));
        });
    }

    /// Adds the sticky events of a room that its timeline does not show.
    pub(crate) fn sticky(&mut self, room: &RoomWindow<'_, '_>, events: &[StoredEvent]) -> Result<(), Fault> {
        self.sticky.object(room.row.id.as_str(), |json| {
            json.list_with("events", |list| v3::write_sticky(list, room, events))
        })
    }

    /// Sets the token by which the client confirms the sticky events of this answer.
    pub(crate) fn sticky_next(&mut self, next_batch: String) {
        self.sticky_next = Some(next_batch);
    }

    /// Sets the changes of subscriptions to threads, if there are any.
    pub(crate) fn subscriptions(&mut self, told: &Subscriptions) {
        if !told.is_empty() {
            self.subscriptions = Some(told.json("prev_batch"));
        }
    }

    /// Finishes the answer with the position that goes on from here. It repeats the word that the client gave its request.
    pub(crate) fn finish(self, pos: &Pos, txn_id: Option<&str>) -> Bytes {
        let mut answer = Object::with_capacity(self.rooms.byte_count() + SMALL_BYTES);
        answer.text("pos", &pos.to_string());
        if let Some(txn_id) = txn_id {
            answer.text("txn_id", txn_id);
        }
        answer.json("lists", &self.lists.finish());
        answer.json("rooms", &self.rooms.finish());
        answer.object("extensions", |json| {
            for (name, told) in [("to_device", &self.to_device), ("e2ee", &self.e2ee)] {
                if let Some(told) = told {
                    json.json(name, told);
                }
            }
            if !self.global_data.is_empty() || !self.room_data.is_empty() {
                json.object("account_data", |data| {
                    data.list("global", &self.global_data);
                    data.json("rooms", &self.room_data.finish());
                });
            }
            for (name, rooms) in [("receipts", self.receipts), ("typing", self.typing)] {
                if !rooms.is_empty() {
                    json.object(name, |part| part.json("rooms", &rooms.finish()));
                }
            }
            if let Some(next_batch) = &self.sticky_next {
                json.object(STICKY_EVENTS, |part| {
                    part.text("next_batch", next_batch);
                    part.json("rooms", &self.sticky.finish());
                });
            }
            if let Some(told) = &self.subscriptions {
                json.json(THREAD_SUBSCRIPTIONS, told);
            }
        });
        debug_assert!(self.window.upto == pos.token.position, "the position is that of the answer");
        answer.finish().into()
    }
}

/// Puts the fields of a JSON object into another, level by level. Where both have a value, the one that is put in stays.
fn merge(into: &mut serde_json::Map<String, Value>, from: Value) {
    let Value::Object(from) = from else { return };
    for (name, value) in from {
        match into.get_mut(&name) {
            Some(Value::Object(inner))
                if value.is_object() && !value.get("ts").is_some_and(Value::is_u64) =>
            {
                merge(inner, value);
            }
            _ => _ = into.insert(name, value),
        }
    }
}

fn write_head(json: &mut Object, head: &RoomHead<'_>) {
    if head.is_initial {
        json.flag("initial", true);
    }
    json.text("membership", head.membership.as_str());
    if let Some(is_dm) = head.is_dm {
        json.flag("is_dm", is_dm);
    }
    if !head.lists.is_empty() {
        json.texts("lists", head.lists);
    }
}

fn write_bump(json: &mut Object, bump_stamp: Option<Position>) {
    if let Some(bump_stamp) = bump_stamp {
        json.number("bump_stamp", bump_stamp.number());
    }
}

fn write_summary(json: &mut Object, news: &RoomNews) {
    let Some(summary) = &news.summary else { return };
    if let Some(heroes) = &summary.heroes {
        json.list_with("heroes", |list| {
            for Hero { user_id, display_name, avatar_url } in heroes {
                list.object(|hero| {
                    hero.text("user_id", user_id);
                    for (field, text) in [("displayname", display_name), ("avatar_url", avatar_url)] {
                        if let Some(text) = text {
                            hero.text(field, text);
                        }
                    }
                });
            }
        });
    }
    json.number("joined_count", summary.joined.into());
    json.number("invited_count", summary.invited.into());
}

fn write_state(list: &mut List<'_>, room: &RoomWindow<'_, '_>, news: &RoomNews) -> Result<(), Fault> {
    let (view, viewer) = (room.view(), room.viewer());
    for stored in &news.state.events {
        list.object(|event| {
            // A client that is told the whole state does not ask what was there before.
            if !room.place.is_whole() || stored.row.is_redacted() {
                return show::write_plain(event, view, stored, &viewer);
            }
            show::write(event, room.row, &*viewer.seen(view, stored)?, &viewer, &Extras::default());
            Ok(())
        })?;
    }
    for (event_type, state_key) in &news.state.gone {
        list.object(|stub| {
            stub.text("type", event_type);
            stub.text("state_key", state_key);
        });
    }
    Ok(())
}

fn write_timeline(json: &mut Object, room: &RoomWindow<'_, '_>, news: &RoomNews) -> Result<(), Fault> {
    let timeline = &news.timeline;
    if !timeline.events.is_empty() || news.outside.is_some() {
        json.list_with("timeline", |list| {
            show::write_all(list, room.view(), &timeline.events, &room.viewer())?;
            news.outside.iter().for_each(|event| list.json(event));
            Ok::<_, Fault>(())
        })?;
        json.number("num_live", news.live_count as u64);
    }
    if !timeline.events.is_empty() || timeline.limited {
        json.text("prev_batch", &timeline.prev_batch().to_string());
        json.flag("limited", timeline.limited);
    }
    if news.is_expanded {
        json.flag("expanded_timeline", true);
        json.flag("unstable_expanded_timeline", true);
    }
    Ok(())
}
