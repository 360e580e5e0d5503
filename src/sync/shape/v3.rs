//! The shape of `/sync` (client-server API, `GET /_matrix/client/v3/sync`): typed news becomes JSON, one room at a time.

use bytes::Bytes;
use ruma::OwnedUserId;

use crate::{
    accounts::presence::Presence,
    json::{JsonRef, JsonText, Object},
    push::unread::Unread,
    rooms::{
        event::StoredEvent,
        receipts,
        show::{self, Extras},
    },
    schema::{accounts::WrittenRow, encryption::KeyCounts},
    store::Fault,
    sync::{
        SyncToken,
        collect::{JoinedNews, LeftNews, Summary},
        shape::fields,
        streams::{
            account_data::{AccountData, Data},
            device_lists::DeviceLists,
            timeline::Timeline,
            unread::Counts,
        },
        window::{RoomWindow, Window},
    },
};

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
        let mut answer = Object::new();
        if let Some(summary) = &news.summary {
            answer.json("summary", &show_summary(summary));
        }
        put_timeline(room, &news.timeline, &news.state, &mut answer)?;
        let receipts = receipts::contents(&news.receipts);
        let mut ephemeral: Vec<JsonText> =
            receipts.iter().map(|content| plain_event("m.receipt", &JsonText::from(content))).collect();
        if let Some(typists) = &news.typing {
            let mut content = Object::new();
            content.texts("user_ids", typists);
            ephemeral.push(plain_event("m.typing", &content.finish()));
        }
        put_events(&mut answer, "ephemeral", &ephemeral);
        put_events(&mut answer, "account_data", &self.show_room_data(room, &news.account_data));
        put_counts(self.window, &news.counts, &mut answer);
        self.joined.json(room.row.id.as_str(), &answer.finish());
        Ok(())
    }

    /// Adds a room that the user has left.
    pub(crate) fn left(&mut self, room: &RoomWindow<'_, '_>, news: &LeftNews) -> Result<(), Fault> {
        let mut answer = Object::new();
        put_timeline(room, &news.timeline, &news.state, &mut answer)?;
        put_events(&mut answer, "account_data", &self.show_room_data(room, &news.account_data));
        self.left.json(room.row.id.as_str(), &answer.finish());
        Ok(())
    }

    /// Adds a room that the user is invited to.
    pub(crate) fn invited(&mut self, room: &RoomWindow<'_, '_>, state: &[StoredEvent]) -> Result<(), Fault> {
        let mut answer = Object::new();
        put_events(&mut answer, "invite_state", &show_stripped(room, state)?);
        self.invited.json(room.row.id.as_str(), &answer.finish());
        Ok(())
    }

    /// Adds a room that the user knocks at.
    pub(crate) fn knocked(&mut self, room: &RoomWindow<'_, '_>, state: &[StoredEvent]) -> Result<(), Fault> {
        let mut answer = Object::new();
        put_events(&mut answer, "knock_state", &show_stripped(room, state)?);
        self.knocked.json(room.row.id.as_str(), &answer.finish());
        Ok(())
    }

    /// Sets the account data that belongs to no room.
    pub(crate) fn account_data(&mut self, data: &AccountData) {
        let global = data.by_room.get("").map(Vec::as_slice).unwrap_or_default();
        let filter = &self.window.ask.filter.account_data;
        self.account_data = show_data(global, |event_type| filter.wants_type(event_type));
        if let Some(rules) = &data.push_rules {
            self.account_data.push(plain_event("m.push_rules", &JsonText::from(rules)));
        }
    }

    /// Sets the presence of users, each as an `m.presence` event.
    pub(crate) fn presence(&mut self, told: &[(OwnedUserId, Presence)]) {
        let events = told.iter().map(|(user_id, presence)| {
            let mut event = Object::new();
            event.text("type", "m.presence");
            event.text("sender", user_id.as_str());
            event.json("content", &JsonText::from(&presence.content(self.window.now_ms)));
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
        self.device_lists = (!lists.is_empty()).then(|| show_device_lists(lists));
    }

    /// Finishes the answer with the token that goes on from here, and with how many keys the device has left.
    pub(crate) fn finish(self, next: &SyncToken, keys: &KeyCounts) -> Bytes {
        let mut answer = Object::new();
        answer.text("next_batch", &next.to_string());
        let mut rooms = Object::new();
        let sections =
            [("join", self.joined), ("invite", self.invited), ("knock", self.knocked), ("leave", self.left)];
        for (name, section) in sections {
            if !section.is_empty() {
                rooms.json(name, &section.finish());
            }
        }
        if !rooms.is_empty() {
            answer.json("rooms", &rooms.finish());
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
        answer.finish().into()
    }

    fn show_room_data(&self, room: &RoomWindow<'_, '_>, data: &Data) -> Vec<JsonText> {
        let filter = &self.window.ask.filter.room_account_data;
        show_data(data, |event_type| filter.wants_room(&room.row.id) && filter.wants_type(event_type))
    }
}

/// Writes a field `{"events": [..]}`.
fn put_events(answer: &mut Object, name: &str, events: &[JsonText]) {
    let mut list = Object::new();
    list.list("events", events);
    answer.json(name, &list.finish());
}

/// Writes an event that has a type and a content, and nothing else.
fn plain_event<'j>(event_type: &str, content: impl Into<JsonRef<'j>>) -> JsonText {
    let mut event = Object::new();
    event.text("type", event_type);
    event.json("content", content);
    event.finish()
}

/// Writes the object `device_lists`, with both of its lists even if they are empty.
pub(crate) fn show_device_lists(lists: &DeviceLists) -> JsonText {
    let mut json = Object::new();
    json.texts("changed", &lists.changed);
    json.texts("left", &lists.left);
    json.finish()
}

fn show_data(data: &[(String, WrittenRow)], wants_type: impl Fn(&str) -> bool) -> Vec<JsonText> {
    let wanted = data.iter().filter(|(event_type, _)| wants_type(event_type));
    wanted.map(|(event_type, row)| plain_event(event_type, JsonRef::stored(&row.content))).collect()
}

fn show_summary(summary: &Summary) -> JsonText {
    let mut json = Object::new();
    if let Some(heroes) = &summary.heroes {
        json.texts("m.heroes", heroes);
    }
    json.number("m.joined_member_count", summary.joined.into());
    json.number("m.invited_member_count", summary.invited.into());
    json.finish()
}

fn put_timeline(
    room: &RoomWindow<'_, '_>,
    timeline: &Timeline,
    state: &[StoredEvent],
    answer: &mut Object,
) -> Result<(), Fault> {
    let name = if room.window.ask.use_state_after { "state_after" } else { "state" };
    put_events(answer, name, &show_state(room, state)?);
    let mut part = Object::new();
    part.list("events", &show_timeline(room, timeline)?);
    part.flag("limited", timeline.limited);
    part.text("prev_batch", &timeline.prev_batch().to_string());
    answer.json("timeline", &part.finish());
    Ok(())
}

fn show_timeline(room: &RoomWindow<'_, '_>, timeline: &Timeline) -> Result<Vec<JsonText>, Fault> {
    let shown = show::show_all(room.view(), &timeline.events, &room.viewer())?;
    let events = timeline.events.iter().zip(shown);
    events.map(|((stored, _), json)| in_form(room, stored, json, false)).collect()
}

/// The events of a room's state as the client sees them, without those that its filter leaves out.
fn show_state(room: &RoomWindow<'_, '_>, events: &[StoredEvent]) -> Result<Vec<JsonText>, Fault> {
    let (view, row, viewer) = (room.view(), room.row, room.viewer());
    let filter = &room.window.ask.filter.state;
    if !filter.wants_room(&row.id) {
        return Ok(Vec::new());
    }
    let mut shown = Vec::with_capacity(events.len());
    for stored in events.iter().filter(|stored| filter.wants(stored)) {
        // A client that is told the whole state does not ask what was there before, so that `prev_content` is left out.
        let json = if !room.place.is_whole() || stored.row.is_redacted() {
            show::show_plain(view, stored, &viewer)?
        } else {
            let seen = viewer.seen_in_state(view, stored)?;
            show::client_json(row, &seen, &viewer, &Extras::default())
        };
        shown.push(in_form(room, stored, json, true)?);
    }
    Ok(shown)
}

/// Gives the event as servers see it, or with some of its fields only, if the client asked for that.
fn in_form(
    room: &RoomWindow<'_, '_>,
    stored: &StoredEvent,
    json: JsonText,
    is_state: bool,
) -> Result<JsonText, Fault> {
    let (view, filter) = (room.view(), &room.window.ask.filter);
    if filter.federation_format {
        let viewer = room.viewer();
        let seen = match is_state {
            true => viewer.seen_in_state(view, stored)?,
            false => viewer.seen(view, stored)?,
        };
        return Ok(JsonText::stored(&seen.row.json));
    }
    Ok(match &filter.fields {
        Some(fields) => fields::only_fields(json, fields),
        None => json,
    })
}

fn show_stripped(room: &RoomWindow<'_, '_>, events: &[StoredEvent]) -> Result<Vec<JsonText>, Fault> {
    let viewer = room.viewer();
    let shown = events.iter().map(|stored| {
        let seen = viewer.seen_in_state(room.view(), stored)?;
        Ok(show::stripped_state(&seen))
    });
    shown.collect()
}

/// Writes `unread_notifications`, and `unread_thread_notifications` if the client wants them by thread.
fn put_counts(window: &Window<'_>, counts: &Counts, answer: &mut Object) {
    if !window.ask.filter.thread_counts {
        answer.json("unread_notifications", &show_unread(counts.total));
        return;
    }
    answer.json("unread_notifications", &show_unread(counts.main));
    let mut threads = Object::new();
    for (root, unread) in &counts.threads {
        threads.json(root.as_str(), &show_unread(*unread));
    }
    if !threads.is_empty() {
        answer.json("unread_thread_notifications", &threads.finish());
    }
}

fn show_unread(unread: Unread) -> JsonText {
    let mut json = Object::new();
    json.number("notification_count", unread.notifications);
    json.number("highlight_count", unread.highlights);
    json.finish()
}
