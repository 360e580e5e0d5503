//! Ephemeral news for other servers (EDUs): who types, how far users have read, and who is online.

use bytes::Bytes;
use federation::queue;
use ruma::UserId;

use crate::{
    ids::RoomNum,
    json::Object,
    rooms::receipts::NO_THREAD,
    schema::event_types::{PRESENCE, RECEIPT, TYPING},
    schema::receipts::{ReceiptKey, ReceiptRow},
};

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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        ids::{Order, Position},
        schema::receipts::ReceiptKind,
    };

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
