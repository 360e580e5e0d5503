//! News for other servers beside events (EDUs): who types, how far users have read, who is online, and which devices users have.

use bytes::Bytes;
use federation::queue;
use ruma::UserId;
use serde_json::Value;

use crate::{
    encryption::device_lists::{ToldSigningKeys, Update},
    ids::RoomNum,
    json::{JsonRef, JsonText, Object},
    rooms::receipts::NO_THREAD,
    schema::event_types::{PRESENCE, RECEIPT, TYPING},
    schema::receipts::{ReceiptKey, ReceiptRow},
};

/// The kind of the news that a device of a user came, changed or went.
const DEVICE_LIST_UPDATE: &str = "m.device_list_update";
/// The kind of the news that the keys changed with which a user signs.
const SIGNING_KEY_UPDATE: &str = "m.signing_key_update";

/// The key under which newer news takes the place of older.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum EduKey {
    Typing(RoomNum, String),
    Receipt(RoomNum, String, String),
    Presence(String),
}

/// A piece of ephemeral news.
pub(super) type Edu = queue::Edu<EduKey>;

fn edu(key: EduKey, kind: &str, write: impl FnOnce(&mut Object)) -> Edu {
    let mut edu = Object::new();
    edu.object("content", write);
    edu.text("edu_type", kind);
    Edu { key, json: Bytes::from(edu.finish()).to_vec() }
}

/// Tells that a user types in a room, or has stopped.
pub(super) fn typing(room: RoomNum, room_id: &str, user_id: &str, types: bool) -> Edu {
    edu(EduKey::Typing(room, user_id.to_owned()), TYPING, |content| {
        content.text("room_id", room_id);
        content.flag("typing", types);
        content.text("user_id", user_id);
    })
}

/// Tells how far a user has read a room.
pub(super) fn receipt(room: RoomNum, room_id: &str, key: &ReceiptKey, row: &ReceiptRow) -> Edu {
    edu(EduKey::Receipt(room, key.user.to_string(), key.thread.clone()), RECEIPT, |content| {
        content.object(room_id, |kinds| {
            kinds.object(key.kind.as_str(), |users| {
                users.object(key.user.as_str(), |user| {
                    user.object("data", |data| {
                        if key.thread != NO_THREAD {
                            data.text("thread_id", &key.thread);
                        }
                        data.number("ts", row.sent_ms);
                    });
                    user.texts("event_ids", [row.event_id.as_str()]);
                });
            });
        });
    })
}

/// How present a user is, as others are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// The state: `online`, `unavailable` or `offline`.
    pub state: String,
    /// The message that the user gave.
    pub status_msg: Option<String>,
    /// How long ago the user did something, in milliseconds, where that is known.
    pub active_ms_ago: Option<u64>,
    /// Whether the user is doing something now.
    pub is_active: bool,
}

/// Tells how present a user is.
pub(super) fn presence(user_id: &UserId, told: &Told) -> Edu {
    edu(EduKey::Presence(user_id.to_string()), PRESENCE, |content| {
        content.list_with("push", |list| {
            list.object(|one| {
                one.flag("currently_active", told.is_active);
                one.number("last_active_ago", told.active_ms_ago.unwrap_or(0));
                one.text("presence", &told.state);
                if let Some(message) = &told.status_msg {
                    one.text("status_msg", message);
                }
                one.text("user_id", user_id.as_str());
            });
        });
    })
}

/// Tells what a device of a user has become, as JSON; and before it the keys with which the user signs, where they changed.
pub(super) fn of_update(user_id: &UserId, update: &Update) -> Vec<Bytes> {
    let keys = update.signing_keys.as_ref().map(|keys| signing_key_update(user_id, keys));
    keys.into_iter().chain([device_list_update(user_id, update)]).collect()
}

/// Tells the keys with which a user signs, as JSON.
fn signing_key_update(user_id: &UserId, keys: &ToldSigningKeys) -> Bytes {
    let mut edu = Object::new();
    edu.object("content", |content| {
        for (name, key) in [("master_key", &keys.master), ("self_signing_key", &keys.self_signing)] {
            if let Some(key) = key {
                content.json(name, JsonRef::stored(key.as_str().as_bytes()));
            }
        }
        content.text("user_id", user_id.as_str());
    });
    edu.text("edu_type", SIGNING_KEY_UPDATE);
    edu.finish().into()
}

/// Tells what a device of a user has become, as JSON.
fn device_list_update(user_id: &UserId, update: &Update) -> Bytes {
    let mut edu = Object::new();
    edu.object("content", |content| {
        match &update.device {
            Some(device) => {
                if let Some(name) = &device.display_name {
                    content.text("device_display_name", name);
                }
                if let Some(keys) = &device.keys {
                    content.json("keys", &JsonText::from(keys));
                }
            }
            None => content.flag("deleted", true),
        }
        content.text("device_id", update.device_id.as_str());
        let prev_id = update.prev_id.map(|prev| JsonText::from(&Value::from(prev.number())));
        content.list("prev_id", prev_id.iter());
        content.number("stream_id", update.stream_id.number());
        content.text("user_id", user_id.as_str());
    });
    edu.text("edu_type", DEVICE_LIST_UPDATE);
    edu.finish().into()
}

#[cfg(test)]
mod tests {
    use federation::json::Canonical;
    use serde_json::json;

    use super::*;
    use crate::{
        encryption::device_lists::UpdatedDevice,
        ids::{Order, Position},
        schema::receipts::ReceiptKind,
    };

    #[test]
    fn a_device_is_told_with_its_keys_or_as_gone() {
        let at = |number| Position::new(number).unwrap();
        let keys = json!({ "keys": { "ed25519:D": "k" } });
        let device = UpdatedDevice { display_name: Some("\"Ph\"".to_owned()), keys: Some(keys.clone()) };
        let device_id = ruma::OwnedDeviceId::from("D");
        let (stream_id, prev_id) = (at(9), Some(at(5)));
        let update = Update { stream_id, prev_id, device_id, device: Some(device), signing_keys: None };
        let told = |update: &Update| -> Value {
            let told = of_update("@a:x".try_into().unwrap(), update);
            let [told] = told.as_slice() else { panic!("{told:?}") };
            serde_json::from_slice(told).unwrap()
        };
        let content = json!({
            "user_id": "@a:x", "device_id": "D", "device_display_name": "\"Ph\"", "keys": keys, "stream_id": 9,
            "prev_id": [5],
        });
        assert_eq!(told(&update), json!({ "edu_type": "m.device_list_update", "content": content }));
        let content =
            json!({ "user_id": "@a:x", "device_id": "D", "deleted": true, "stream_id": 9, "prev_id": [] });
        let update = Update { prev_id: None, device: None, ..update };
        assert_eq!(told(&update), json!({ "edu_type": "m.device_list_update", "content": content }));
        let master = Some(Canonical::of(br#"{"usage": ["master"]}"#).unwrap());
        let signing_keys = Some(ToldSigningKeys { master, self_signing: None });
        let told = of_update("@a:x".try_into().unwrap(), &Update { signing_keys, ..update });
        let told: Vec<Value> = told.iter().map(|edu| serde_json::from_slice(edu).unwrap()).collect();
        let keys = json!({ "user_id": "@a:x", "master_key": { "usage": ["master"] } });
        let keys = json!({ "edu_type": "m.signing_key_update", "content": keys });
        assert_eq!(told, [keys, json!({ "edu_type": "m.device_list_update", "content": content })]);
    }

    fn read(edu: &Edu) -> Value {
        serde_json::from_slice(&edu.json).unwrap()
    }

    #[test]
    fn news_is_written_as_the_specification_says() {
        let typing = typing(RoomNum(1), "!r:x", "@a:x", true);
        let content = json!({ "room_id": "!r:x", "user_id": "@a:x", "typing": true });
        assert_eq!(read(&typing), json!({ "edu_type": "m.typing", "content": content }));
        let key = ReceiptKey {
            user: "@a:x".try_into().unwrap(),
            kind: ReceiptKind::Public,
            thread: "main".to_owned(),
        };
        let row = ReceiptRow {
            position: Position::ZERO,
            order: Order::MIN,
            sent_ms: 7,
            event_id: "$e:x".try_into().unwrap(),
        };
        let content = json!({ "!r:x": { "m.read": { "@a:x": {
            "data": { "ts": 7, "thread_id": "main" }, "event_ids": ["$e:x"],
        } } } });
        let told = receipt(RoomNum(1), "!r:x", &key, &row);
        assert_eq!(read(&told), json!({ "edu_type": "m.receipt", "content": content }));
        let key = ReceiptKey { thread: String::new(), ..key };
        let told = read(&receipt(RoomNum(1), "!r:x", &key, &row));
        assert_eq!(told["content"]["!r:x"]["m.read"]["@a:x"]["data"], json!({ "ts": 7 }));
        let told = Told {
            state: "online".to_owned(),
            status_msg: Some("\"hm\"".to_owned()),
            active_ms_ago: Some(5),
            is_active: true,
        };
        let content = json!({ "push": [{
            "user_id": "@a:x", "presence": "online", "status_msg": "\"hm\"", "last_active_ago": 5,
            "currently_active": true,
        }] });
        let told = read(&presence("@a:x".try_into().unwrap(), &told));
        assert_eq!(told, json!({ "edu_type": "m.presence", "content": content }));
    }
}
