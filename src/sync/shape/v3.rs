//! The shape of `/sync` (client-server API, `GET /_matrix/client/v3/sync`): typed news becomes JSON, one room at a time.

use bytes::Bytes;

use crate::{
    json::{JsonRef, JsonText, List, Object},
    push::unread::Unread,
    rooms::{
        event::StoredEvent,
        filter::Steps,
        receipts,
        show::{self, Extras},
    },
    schema::event_types::{PRESENCE, PUSH_RULES, RECEIPT, STICKY, TYPING},
    schema::{accounts::WrittenRow, encryption::KeyCounts},
    store::Fault,
    sync::{
        SyncToken,
        collect::{JoinedNews, LeftNews, Outside, Summary},
        shape::fields,
        streams::{
            account_data::{AccountData, Data},
            device_lists::DeviceLists,
            presence::Told,
            timeline::Timeline,
            unread::Counts,
        },
        window::{RoomWindow, Window},
    },
};

/// About how many bytes an answer takes beside its rooms.
const SMALL_BYTES: usize = 4 << 10;

/// An answer of `/sync` while it is being written.
pub(crate) struct Answer<'a, 'w> {
    window: &'a Window<'w>,
    joined: Object,
    invited: Object,
    knocked: Object,
    left: Object,
    account_data: Vec<JsonText>,
    presence: Vec<JsonText>,
    to_device: Vec<JsonText>,
    device_lists: Option<JsonText>,
}

impl<'a, 'w> Answer<'a, 'w> {
    /// Begins an answer that says nothing yet, for this window.
    pub(crate) fn new(window: &'a Window<'w>) -> Self {
        Self {
            window,
            joined: Object::new(),
            invited: Object::new(),
            knocked: Object::new(),
            left: Object::new(),
            account_data: Vec::new(),
            presence: Vec::new(),
            to_device: Vec::new(),
            device_lists: None,
        }
    }

    /// Adds a room that the user is in.
    pub(crate) fn joined(&mut self, room: &RoomWindow<'_, '_>, news: &JoinedNews) -> Result<(), Fault> {
        let window = self.window;
        self.joined.object(room.row.id.as_str(), |answer| {
            if let Some(summary) = &news.summary {
                answer.object("summary", |json| write_summary(json, summary));
            }
            write_timeline(room, &news.timeline, &news.state, None, answer)?;
            write_events(answer, "ephemeral", |list| {
                for content in receipts::contents(&news.receipts) {
                    list.object(|event| write_plain_event(event, RECEIPT, &JsonText::from(&content)));
                }
                if let Some(typists) = &news.typing {
                    list.object(|event| {
                        event.text("type", TYPING);
                        event.object("content", |content| content.texts("user_ids", typists));
                    });
                }
            });
            write_events(answer, "account_data", |list| write_room_data(list, room, &news.account_data));
            if !news.sticky.is_empty() {
                write_events(answer, STICKY, |list| write_sticky(list, room, &news.sticky))?;
            }
            write_counts(window, &news.counts, answer);
            Ok(())
        })
    }

    /// Adds a room that the user has left.
    pub(crate) fn left(&mut self, room: &RoomWindow<'_, '_>, news: &LeftNews) -> Result<(), Fault> {
        self.left.object(room.row.id.as_str(), |answer| {
            write_timeline(room, &news.timeline, &news.state, news.outside.as_ref(), answer)?;
            write_events(answer, "account_data", |list| write_room_data(list, room, &news.account_data));
            Ok(())
        })
    }

    /// Adds a room that the user is invited to.
    pub(crate) fn invited(&mut self, room: &RoomWindow<'_, '_>, state: &Outside) -> Result<(), Fault> {
        let shown = show_stripped(room, state)?;
        self.invited.object(room.row.id.as_str(), |answer| put_events(answer, "invite_state", &shown));
        Ok(())
    }

    /// Adds a room that the user knocks at.
    pub(crate) fn knocked(&mut self, room: &RoomWindow<'_, '_>, state: &Outside) -> Result<(), Fault> {
        let shown = show_stripped(room, state)?;
        self.knocked.object(room.row.id.as_str(), |answer| put_events(answer, "knock_state", &shown));
        Ok(())
    }

    /// The bytes of the rooms that the user is invited to or knocks at.
    pub(crate) fn invitation_bytes(&self) -> usize {
        self.invited.byte_count() + self.knocked.byte_count()
    }

    /// Sets the account data that belongs to no room.
    pub(crate) fn account_data(&mut self, data: &AccountData) {
        let global = data.by_room.get("").map(Vec::as_slice).unwrap_or_default();
        let filter = &self.window.ask.filter.account_data;
        self.account_data = show_data(global, |event_type| filter.wants_type(event_type));
        if let Some(rules) = &data.push_rules {
            self.account_data.push(plain_event(PUSH_RULES, &JsonText::from(rules)));
        }
    }

    /// Sets the presence of users, each as an `m.presence` event.
    pub(crate) fn presence(&mut self, told: &[Told]) {
        let events = told.iter().map(|told| {
            let content = told.presence.content(self.window.now_ms, told.profile.as_ref());
            let mut event = Object::new();
            event.text("type", PRESENCE);
            event.text("sender", told.user_id.as_str());
            event.json("content", &JsonText::from(&content));
            event.finish()
        });
        self.presence = events.collect();
    }

    /// Sets the messages that wait for the device.
    pub(crate) fn messages(&mut self, messages: &[Bytes]) {
        self.to_device = messages.iter().map(|message| JsonText::stored(message)).collect();
    }

    /// Sets the users whose devices changed, and those whose devices no longer matter.
    pub(crate) fn device_lists(&mut self, lists: &DeviceLists) {
        if lists.is_empty() {
            return;
        }
        // Clients take a list that is there for news, even if it is empty.
        let mut json = Object::new();
        for (name, users) in [("changed", &lists.changed), ("left", &lists.left)] {
            if !users.is_empty() {
                json.texts(name, users);
            }
        }
        self.device_lists = Some(json.finish());
    }

    /// Finishes the answer with the token that goes on from here, and with how many keys the device has left.
    pub(crate) fn finish(self, next: &SyncToken, keys: &KeyCounts) -> Bytes {
        let sections =
            [("join", self.joined), ("invite", self.invited), ("knock", self.knocked), ("leave", self.left)];
        let told: Vec<_> = sections.into_iter().filter(|(_, section)| !section.is_empty()).collect();
        let byte_count: usize = told.iter().map(|(_, section)| section.byte_count()).sum();
        let mut answer = Object::with_capacity(byte_count + SMALL_BYTES);
        answer.text("next_batch", &next.to_string());
        if !told.is_empty() {
            answer.object("rooms", |rooms| {
                for (name, section) in told {
                    rooms.json(name, &section.finish());
                }
            });
        }
        let lists =
            [("account_data", self.account_data), ("presence", self.presence), ("to_device", self.to_device)];
        for (name, events) in lists {
            if !events.is_empty() {
                put_events(&mut answer, name, &events);
            }
        }
        if let Some(lists) = &self.device_lists {
            answer.json("device_lists", lists);
        }
        write_key_counts(&mut answer, keys);
        answer.finish().into()
    }
}

/// Writes sticky events, each with what refers to it.
pub(crate) fn write_sticky(
    list: &mut List<'_>,
    room: &RoomWindow<'_, '_>,
    events: &[StoredEvent],
) -> Result<(), Fault> {
    for stored in events {
        list.json(&show::show(room.view(), stored, &room.viewer(), None)?);
    }
    Ok(())
}

/// Writes how many keys of a device are left.
pub(crate) fn write_key_counts(answer: &mut Object, keys: &KeyCounts) {
    let mut one_time = Object::new();
    // Clients look for this algorithm even when they have no key of it, so that a zero is written.
    if !keys.one_time.contains_key("signed_curve25519") {
        one_time.number("signed_curve25519", 0);
    }
    for (algorithm, left) in &keys.one_time {
        one_time.number(algorithm, *left);
    }
    answer.json("device_one_time_keys_count", &one_time.finish());
    answer.texts("device_unused_fallback_key_types", &keys.unused_fallback);
}

fn write_room_data(list: &mut List<'_>, room: &RoomWindow<'_, '_>, data: &Data) {
    let filter = &room.window.ask.filter.room_account_data;
    if !filter.wants_room(&room.row.id) {
        return;
    }
    for (event_type, row) in data.iter().filter(|(event_type, _)| filter.wants_type(event_type)) {
        list.object(|event| write_plain_event(event, event_type, JsonRef::stored(&row.content)));
    }
}

/// Adds a field `{"events": [..]}`.
fn put_events(answer: &mut Object, name: &str, events: &[JsonText]) {
    answer.object(name, |part| part.list("events", events));
}

/// Adds a field `{"events": [..]}`, whose list `write` writes.
fn write_events<T>(answer: &mut Object, name: &str, write: impl FnOnce(&mut List<'_>) -> T) -> T {
    answer.object(name, |part| part.list_with("events", write))
}

/// Writes an event that has a type and a content, and nothing else.
pub(crate) fn plain_event<'j>(event_type: &str, content: impl Into<JsonRef<'j>>) -> JsonText {
    let mut event = Object::new();
    write_plain_event(&mut event, event_type, content);
    event.finish()
}

/// Writes the fields of an event that has a type and a content, and nothing else.
fn write_plain_event<'j>(event: &mut Object, event_type: &str, content: impl Into<JsonRef<'j>>) {
    event.text("type", event_type);
    event.json("content", content);
}

/// Writes the object `device_lists`, with both of its lists even if they are empty.
pub(crate) fn show_device_lists(lists: &DeviceLists) -> JsonText {
    let mut json = Object::new();
    json.texts("changed", &lists.changed);
    json.texts("left", &lists.left);
    json.finish()
}

/// Shows account data as events, of the types that are wanted.
pub(crate) fn show_data(data: &[(String, WrittenRow)], wants_type: impl Fn(&str) -> bool) -> Vec<JsonText> {
    let wanted = data.iter().filter(|(event_type, _)| wants_type(event_type));
    wanted.map(|(event_type, row)| plain_event(event_type, JsonRef::stored(&row.content))).collect()
}

fn write_summary(json: &mut Object, summary: &Summary) {
    if let Some(heroes) = &summary.heroes {
        json.texts("m.heroes", heroes);
    }
    json.number("m.joined_member_count", summary.joined.into());
    json.number("m.invited_member_count", summary.invited.into());
}

fn write_timeline(
    room: &RoomWindow<'_, '_>,
    timeline: &Timeline,
    state: &[StoredEvent],
    last: Option<&JsonText>,
    answer: &mut Object,
) -> Result<(), Fault> {
    let ask = room.window.ask;
    let name = match (ask.use_state_after, ask.is_unstable_state_after) {
        (true, false) => "state_after",
        (true, true) => "org.matrix.msc4222.state_after",
        (false, _) => "state",
    };
    write_events(answer, name, |list| write_state(list, room, state))?;
    answer.object("timeline", |part| {
        part.list_with("events", |list| {
            write_shown(list, room, timeline)?;
            last.into_iter().for_each(|event| list.json(event));
            Ok::<_, Fault>(())
        })?;
        part.flag("limited", timeline.limited);
        part.text("prev_batch", &timeline.prev_batch().to_string());
        Ok(())
    })
}

fn write_shown(list: &mut List<'_>, room: &RoomWindow<'_, '_>, timeline: &Timeline) -> Result<(), Fault> {
    if !has_other_form(room) {
        return show::write_all(list, room.view(), &timeline.events, &room.viewer());
    }
    let shown = show::show_all(room.view(), &timeline.events, &room.viewer())?;
    for ((stored, _), json) in timeline.events.iter().zip(shown) {
        list.json(&in_form(room, stored, json)?);
    }
    Ok(())
}

/// Writes the events of a room's state as the client sees them, without those that its filter leaves out.
fn write_state(list: &mut List<'_>, room: &RoomWindow<'_, '_>, events: &[StoredEvent]) -> Result<(), Fault> {
    let filter = &room.window.ask.filter.state;
    if !filter.wants_room(&room.row.id) {
        return Ok(());
    }
    let (has_other_form, mut steps) = (has_other_form(room), Steps::of_page());
    let (view, viewer, related) = (room.view(), room.viewer(), &room.window.ask.filter.state_related);
    for stored in events {
        if !filter.wants(view, stored, &viewer)? || !related.allows(view, stored, &viewer, &mut steps)? {
            continue;
        }
        if has_other_form {
            let mut event = Object::with_capacity(stored.row.json.len() + 192);
            write_state_event(&mut event, room, stored)?;
            list.json(&in_form(room, stored, event.finish())?);
        } else {
            list.object(|event| write_state_event(event, room, stored))?;
        }
    }
    Ok(())
}

fn write_state_event(
    event: &mut Object,
    room: &RoomWindow<'_, '_>,
    stored: &StoredEvent,
) -> Result<(), Fault> {
    let (view, viewer) = (room.view(), room.viewer());
    // A client that is told the whole state does not ask what was there before, so that `prev_content` is left out.
    if !room.place.is_whole() || stored.row.is_redacted() {
        return show::write_plain(event, view, stored, &viewer);
    }
    let seen = viewer.seen(view, stored)?;
    show::write(event, room.row, &seen, &viewer, &Extras::default());
    Ok(())
}

/// Whether the client asked for events as servers see them, or for some of their fields only.
fn has_other_form(room: &RoomWindow<'_, '_>) -> bool {
    let filter = &room.window.ask.filter;
    filter.federation_format || filter.fields.is_some()
}

/// Gives the event as servers see it, or with some of its fields only, if the client asked for that.
fn in_form(room: &RoomWindow<'_, '_>, stored: &StoredEvent, json: JsonText) -> Result<JsonText, Fault> {
    let (view, filter) = (room.view(), &room.window.ask.filter);
    if filter.federation_format {
        let viewer = room.viewer();
        let seen = viewer.seen(view, stored)?;
        return Ok(JsonText::stored(&seen.row.json));
    }
    Ok(match &filter.fields {
        Some(fields) => fields::only_fields(json, fields),
        None => json,
    })
}

/// Shows the events that tell somebody outside which room this is.
pub(crate) fn show_stripped(room: &RoomWindow<'_, '_>, events: &Outside) -> Result<Vec<JsonText>, Fault> {
    let events = match events {
        Outside::Ours(events) => events,
        Outside::Told(events) => return Ok(events.clone()),
    };
    let viewer = room.viewer();
    let shown = events.iter().map(|stored| {
        let seen = viewer.seen(room.view(), stored)?;
        Ok(show::stripped_state(&seen))
    });
    shown.collect()
}

/// Writes `unread_notifications`, and `unread_thread_notifications` if the client wants them by thread.
fn write_counts(window: &Window<'_>, counts: &Counts, answer: &mut Object) {
    if !window.ask.filter.thread_counts {
        answer.object("unread_notifications", |json| write_unread(json, counts.total));
        return;
    }
    answer.object("unread_notifications", |json| write_unread(json, counts.main));
    if !counts.threads.is_empty() {
        answer.object("unread_thread_notifications", |threads| {
            for (root, unread) in &counts.threads {
                threads.object(root.as_str(), |json| write_unread(json, *unread));
            }
        });
    }
}

fn write_unread(json: &mut Object, unread: Unread) {
    json.number("notification_count", unread.notifications);
    json.number("highlight_count", unread.highlights);
}
