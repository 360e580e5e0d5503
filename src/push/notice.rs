//! The body of a request to a push gateway.
//!
//! Specification: push gateway API, `POST /_matrix/push/v1/notify`. Two fields go beyond it, `id` and `membership`: gateways from before
//! the specification read them, and today's still do.

use std::sync::Arc;

use bytes::Bytes;
use ruma::UserId;
use serde_json::{Map, Value, value::RawValue};

use crate::{
    ids::{Order, RoomNum},
    json::{JsonRef, JsonText, Object},
    push::reader::{Explained, Invitation},
    rooms::{
        self,
        event::{self, StoredEvent},
        state::{self, StateRef},
    },
    schema::{
        event_types::{CANONICAL_ALIAS, ENCRYPTED, MEMBER, NAME},
        push::{PusherRow, Sound},
        rooms::{Membership, RoomRow},
    },
    store::{Fault, Read},
};

/// A name is cut to this many characters, because whoever chose it may have made it as long as an event.
const NAME_CHARACTERS_MAX: usize = 255;
/// The fields of a pusher's data by which it wants no counts (MSC4076): that of the proposal, and those of clients until then.
const WITHOUT_COUNTS: [&str; 3] = [
    "disable_badge_count",
    "io.element.msc4076.disable_badge_count",
    "org.matrix.msc4076.disable_badge_count",
];

/// A pusher as its gateway knows it.
#[derive(Debug)]
pub struct Device<'a> {
    app_id: &'a str,
    pushkey: &'a str,
    set_ms: u64,
    url: String,
    /// The data of the pusher without the URL.
    data: Map<String, Value>,
}

impl<'a> Device<'a> {
    /// Reads what a gateway is told of a pusher. `None` for one that has no gateway.
    pub fn of(app_id: &'a str, pushkey: &'a str, row: &PusherRow) -> Option<Self> {
        let mut data = row.pusher.get("data")?.as_object()?.clone();
        let Some(Value::String(url)) = data.remove("url") else { return None };
        Some(Self { app_id, pushkey, set_ms: row.set_ms, url, data })
    }

    /// The URL of the gateway.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Whether the gateway is told how many messages are unread.
    pub fn wants_counts(&self) -> bool {
        !WITHOUT_COUNTS.iter().any(|field| self.data.get(*field) == Some(&Value::Bool(true)))
    }

    /// Whether the gateway is told which event it is about, and nothing else of the event.
    pub fn wants_ids_only(&self) -> bool {
        self.data.get("format").and_then(Value::as_str) == Some("event_id_only")
    }

    fn write(&self, actions: Option<&JsonText>) -> JsonText {
        let mut device = Object::new();
        device.text("app_id", self.app_id);
        device.text("pushkey", self.pushkey);
        device.number("pushkey_ts", self.set_ms / 1_000);
        device.json("data", &JsonText::from(&Value::Object(self.data.clone())));
        if let Some(actions) = actions {
            device.json("tweaks", &JsonText::from(&Value::Object(tweaks_of(actions))));
        }
        device.finish()
    }
}

/// The tweaks that a list of actions sets, as the user wrote them.
fn tweaks_of(actions: &JsonText) -> Map<String, Value> {
    let actions: Vec<Value> = serde_json::from_str(actions.as_str()).unwrap_or_default();
    let tweak = |mut action: Value| {
        let fields = action.as_object_mut()?;
        let Some(Value::String(name)) = fields.remove("set_tweak") else { return None };
        let value = fields.remove("value").or_else(|| (name == "highlight").then_some(Value::Bool(true)))?;
        Some((name, value))
    };
    actions.into_iter().filter_map(tweak).collect()
}

/// An event as a gateway is told of it.
#[derive(Debug)]
pub struct Told {
    event_id: String,
    pub(super) room_id: String,
    pub(super) event_type: String,
    pub(super) sender: String,
    pub(super) sender_name: Option<String>,
    pub(super) room_name: Option<String>,
    room_alias: Option<String>,
    /// The membership that the event brings, and whether it is that of the user who is told.
    pub(super) member: Option<(&'static str, bool)>,
    pub(super) content: JsonText,
    actions: Arc<JsonText>,
    is_urgent: bool,
    pub(super) highlights: bool,
    /// When the sender says that it was sent, in milliseconds since the epoch; 0 where nothing says it.
    pub(super) sent_ms: u64,
}

impl Told {
    /// An event of a room in which this user is told of it, by the rule that it meets.
    pub fn of_event(
        read: &(impl Read + ?Sized),
        (room, row): (RoomNum, &RoomRow),
        stored: &StoredEvent,
        user_id: &UserId,
        rule: Explained,
    ) -> Result<Self, Fault> {
        let (sender, event_type) = (stored.row.sender().into_owned(), stored.row.event_type().into_owned());
        let is_target = stored.row.state_key().is_some_and(|key| *key == *user_id.as_str());
        // A user who is invited may see the room as it was then, and nothing that it became.
        let is_invited = is_target && stored.membership() == Some(Membership::Invite);
        let field = |event_type: &str, state_key: &str, field: &str| {
            let event = match is_invited {
                true => find_then(read, room, stored.order, (event_type, state_key))?,
                false => rooms::find_state(read, room, event_type, state_key)?,
            };
            Ok::<_, Fault>(event.and_then(|event| text_of(event.row.content(), field)))
        };
        let room_alias = field(CANONICAL_ALIAS, "", "alias")?;
        Ok(Self {
            event_id: stored.id(row).to_string(),
            room_id: row.id.to_string(),
            sender_name: field(MEMBER, &sender, "displayname")?,
            room_name: field(NAME, "", "name")?.or_else(|| room_alias.clone()),
            room_alias,
            member: stored.membership().map(|membership| (membership.as_str(), is_target)),
            content: JsonText::stored(stored.row.content().as_bytes()),
            is_urgent: is_urgent(&event_type, &rule),
            highlights: rule.outcome.highlight,
            sent_ms: stored.row.header.sent_ms,
            actions: rule.actions,
            sender,
            event_type,
        })
    }

    /// Whether it invites the user who is told.
    pub(super) fn is_invitation(&self) -> bool {
        self.member
            .is_some_and(|(membership, is_target)| is_target && membership == Membership::Invite.as_str())
    }

    /// An invitation from outside a room. What is known of the room is what came with it. `None` where it is not as it should be.
    pub fn of_invitation(row: &RoomRow, invitation: &Invitation, rule: Explained) -> Option<Self> {
        #[derive(serde::Deserialize)]
        struct Fields<'a> {
            event_id: String,
            #[serde(default)]
            origin_server_ts: u64,
            #[serde(borrow)]
            content: &'a RawValue,
        }
        #[derive(serde::Deserialize)]
        struct Stripped<'a> {
            #[serde(rename = "type")]
            event_type: String,
            state_key: String,
            #[serde(borrow)]
            content: &'a RawValue,
        }
        let event: Fields<'_> = serde_json::from_str(invitation.event.as_str()).ok()?;
        let told = &invitation.told.shown;
        let state: Vec<Stripped<'_>> =
            told.state.iter().filter_map(|event| serde_json::from_str(event).ok()).collect();
        let field = |event_type: &str, state_key: &str, field: &str| {
            let is_it =
                |event: &&Stripped<'_>| event.event_type == event_type && event.state_key == state_key;
            text_of(state.iter().find(is_it)?.content.get(), field)
        };
        let room_alias = field(CANONICAL_ALIAS, "", "alias");
        Some(Self {
            event_id: event.event_id,
            room_id: row.id.to_string(),
            event_type: MEMBER.to_owned(),
            sender: told.sender.clone(),
            sender_name: field(MEMBER, &told.sender, "displayname"),
            room_name: field(NAME, "", "name").or_else(|| room_alias.clone()),
            room_alias,
            member: Some((Membership::Invite.as_str(), true)),
            content: JsonText::stored(event.content.get().as_bytes()),
            is_urgent: is_urgent(MEMBER, &rule),
            highlights: rule.outcome.highlight,
            sent_ms: event.origin_server_ts,
            actions: rule.actions,
        })
    }
}

/// The state event of a key as it was at an event of the main line.
fn find_then(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    order: Order,
    (event_type, state_key): (&str, &str),
) -> Result<Option<StoredEvent>, Fault> {
    let Some(key) = state::find_key(read, room, event_type, state_key)? else { return Ok(None) };
    match state::at(read, room, StateRef::Main(order), key)?.event() {
        Some(event) => event::find_anywhere(read, room, event),
        None => Ok(None),
    }
}

/// Whether a device is woken for an event at once. Nobody here can tell how much an encrypted event matters, so that each is urgent.
fn is_urgent(event_type: &str, rule: &Explained) -> bool {
    event_type == ENCRYPTED || rule.outcome.highlight || rule.outcome.sound != Sound::None
}

/// A text field of a content, cut where it is long; none where it is empty.
fn text_of(content: &str, field: &str) -> Option<String> {
    let content: Map<String, Value> = serde_json::from_str(content).ok()?;
    let text = content.get(field)?.as_str()?;
    (!text.is_empty()).then(|| text.chars().take(NAME_CHARACTERS_MAX).collect())
}

/// Writes that an event notifies a user, with the number of messages that they have not read where it is counted.
pub fn of_event(device: &Device<'_>, told: &Told, unread: Option<u64>) -> Bytes {
    let mut body = Object::with_capacity(told.content.as_str().len() + 1_024);
    body.object("notification", |notification| {
        notification.text("event_id", &told.event_id);
        notification.text("room_id", &told.room_id);
        notification.text("prio", if told.is_urgent { "high" } else { "low" });
        if let Some(unread) = unread {
            // Counts that are zero should be left out, because the gateway learns more from the event.
            notification.object("counts", |counts| {
                if unread > 0 {
                    counts.number("unread", unread);
                }
            });
        }
        if device.wants_ids_only() {
            notification.list("devices", [&device.write(None)]);
            return;
        }
        notification.text("id", &told.event_id);
        notification.text("type", &told.event_type);
        notification.text("sender", &told.sender);
        let names = [
            ("sender_display_name", &told.sender_name),
            ("room_name", &told.room_name),
            ("room_alias", &told.room_alias),
        ];
        for (name, text) in names {
            if let Some(text) = text {
                notification.text(name, text);
            }
        }
        if let Some((membership, is_target)) = told.member {
            notification.text("membership", membership);
            notification.flag("user_is_target", is_target);
        }
        notification.json("content", JsonRef::from(&told.content));
        notification.list("devices", [&device.write(Some(&told.actions))]);
    });
    body.finish().into()
}

/// Writes how many messages a user has not read, where that is all that changed. Zero is written, too, because it is the news.
pub fn of_counts(device: &Device<'_>, unread: u64) -> Bytes {
    let mut body = Object::with_capacity(512);
    body.object("notification", |notification| {
        notification.object("counts", |counts| counts.number("unread", unread));
        notification.list("devices", [&device.write(None)]);
    });
    body.finish().into()
}

/// Reads the pushkeys that a gateway does not know, from its answer. An answer that is no JSON names none.
pub fn read_rejected(answer: &[u8]) -> Vec<String> {
    let answer: Option<Map<String, Value>> = serde_json::from_slice(answer).ok();
    let rejected = answer.as_ref().and_then(|answer| answer.get("rejected")).and_then(Value::as_array);
    rejected.into_iter().flatten().filter_map(|key| key.as_str().map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use ruma::push::{Action, SoundTweakValue, Tweak};
    use serde_json::json;

    use super::*;
    use crate::{ids::DeviceNum, schema::push::Outcome};

    fn row(data: Value) -> PusherRow {
        let pusher = json!({ "data": data });
        PusherRow { device: DeviceNum(1), pusher, is_enabled: true, set_ms: 12_345_678, has_place: true }
    }

    fn told(actions: Vec<Action>) -> Told {
        let outcome = Outcome { notify: true, highlight: false, sound: Sound::None };
        let actions = Arc::new(JsonText::from(&serde_json::to_value(actions).unwrap()));
        let rule = Explained { rule_id: "r".to_owned(), actions, outcome };
        Told {
            event_id: "$e".to_owned(),
            room_id: "!r:x".to_owned(),
            event_type: "m.room.message".to_owned(),
            sender: "@a:x".to_owned(),
            sender_name: Some("A \"quoted\"".to_owned()),
            room_name: None,
            room_alias: None,
            member: None,
            content: JsonText::stored(br#"{"body":"x"}"#),
            is_urgent: is_urgent("m.room.message", &rule),
            highlights: rule.outcome.highlight,
            sent_ms: 0,
            actions: rule.actions,
        }
    }

    fn read(body: &Bytes) -> Value {
        serde_json::from_slice::<Value>(body).unwrap()["notification"].clone()
    }

    #[test]
    fn an_event_is_told_with_its_fields_tweaks_and_all_data_but_the_url() {
        let row = row(json!({ "url": "https://p.x/", "own": [1] }));
        let device = Device::of("app", "key", &row).unwrap();
        let unknown: Action = serde_json::from_value(json!({ "set_tweak": "light", "value": 3 })).unwrap();
        let valueless: Action = serde_json::from_value(json!({ "set_tweak": "highlight" })).unwrap();
        let sound = Action::SetTweak(Tweak::Sound(SoundTweakValue::Default));
        let told = told(vec![Action::Notify, sound, unknown, valueless]);
        let expected = json!({
            "event_id": "$e", "id": "$e", "room_id": "!r:x", "prio": "low", "type": "m.room.message",
            "sender": "@a:x", "sender_display_name": "A \"quoted\"", "content": { "body": "x" },
            "counts": { "unread": 2 },
            "devices": [{
                "app_id": "app", "pushkey": "key", "pushkey_ts": 12_345, "data": { "own": [1] },
                "tweaks": { "sound": "default", "light": 3, "highlight": true },
            }],
        });
        assert_eq!(read(&of_event(&device, &told, Some(2))), expected);
        assert_eq!(read(&of_event(&device, &told, Some(0)))["counts"], json!({}));
        assert_eq!(read(&of_event(&device, &told, None)).get("counts"), None);
    }

    #[test]
    fn a_pusher_may_want_ids_alone_and_no_counts() {
        let row = row(json!({ "url": "u", "format": "event_id_only" }));
        let device = Device::of("app", "key", &row).unwrap();
        let body = read(&of_event(&device, &told(vec![Action::Notify]), Some(1)));
        let keys: Vec<_> = body.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["counts", "devices", "event_id", "prio", "room_id"]);
        assert_eq!(body["devices"][0]["data"], json!({ "format": "event_id_only" }));
        assert!(device.wants_counts());
        for field in WITHOUT_COUNTS {
            let row = self::row(json!({ "url": "u", field: true }));
            assert!(!Device::of("app", "key", &row).unwrap().wants_counts(), "{field}");
        }
        assert_eq!(read(&of_counts(&device, 0))["counts"], json!({ "unread": 0 }));
        assert!(Device::of("app", "key", &self::row(json!({}))).is_none());
    }

    #[test]
    fn rejected_keys_are_read_from_whatever_a_gateway_answers() {
        assert_eq!(read_rejected(br#"{"rejected":["a",7,"b"]}"#), ["a", "b"]);
        for answer in ["", "[]", "{}", r#"{"rejected":{}}"#, "<html>", r#"{"rejected":null}"#] {
            assert!(read_rejected(answer.as_bytes()).is_empty(), "{answer}");
        }
    }
}
