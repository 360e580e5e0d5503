//! A device of a person: what it learns from its chain of syncs, and what it does with keys.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
};

use http::{Method, StatusCode};
use serde_json::{Map, Value, json};

use super::person::{Persons, Sent, V3};
use crate::{
    accounts::text,
    federation::{
        wire::name,
        world::{Answer, SERVERS, World},
    },
};

const OLM: &str = "m.olm.v1.curve25519-aes-sha2";
const MEGOLM: &str = "m.megolm.v1.aes-sha2";
/// A device uploads new one-time keys when fewer than this are left.
const KEYS_FEW: u64 = 4;
/// It uploads this many.
const KEYS_MORE: u64 = 8;
/// A session of the room encrypts at most this many messages.
const MESSAGES_OF_SESSION: u64 = 6;
/// Another server has this long to tell keys.
const KEYS_WAIT_MS: u64 = 4_000;

/// The keys of a device, as another one knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Known {
    curve25519: String,
    ed25519: String,
}

/// The session with which a device encrypts.
struct RoomSession {
    id: String,
    /// The devices that were sent its key.
    shared: BTreeSet<String>,
    messages: u64,
}

#[derive(Default)]
pub(super) struct Learnt {
    since: Option<String>,
    /// Who is in the room, while this device's user is.
    pub(super) joined: BTreeSet<String>,
    /// The devices of people, as far as they were asked for.
    pub(super) lists: BTreeMap<String, BTreeMap<String, Known>>,
    /// The people whose lists are to be asked for again.
    outdated: BTreeSet<String>,
    /// The curve25519 keys of devices with which there is a session.
    sessions: BTreeSet<String>,
    room_session: Option<RoomSession>,
    /// The numbers of the messages that came from devices.
    pub(super) inbox: BTreeSet<u64>,
    /// Whether the server has few one-time keys of this device.
    lacks_keys: bool,
}

/// A device that is logged in, or was.
pub(super) struct Device {
    pub(super) person: usize,
    pub(super) user_id: String,
    pub(super) id: String,
    /// The user and the device, by which it is known in all that this world notes.
    pub(super) name: String,
    pub(super) token: RefCell<String>,
    /// Whether it has uploaded its keys.
    pub(super) is_ready: Cell<bool>,
    pub(super) is_logged_out: Cell<bool>,
    pub(super) learnt: RefCell<Learnt>,
    keys: RefCell<Option<Known>>,
    count: Cell<u64>,
}

impl Device {
    pub(super) fn new(person: usize, user_id: &str, id: &str) -> Self {
        Self {
            person,
            user_id: user_id.to_owned(),
            id: id.to_owned(),
            name: format!("{user_id} {id}"),
            token: RefCell::default(),
            is_ready: Cell::new(false),
            is_logged_out: Cell::new(false),
            learnt: RefCell::default(),
            keys: RefCell::default(),
            count: Cell::new(0),
        }
    }

    pub(super) fn place(&self) -> usize {
        self.person % SERVERS
    }

    fn next(&self) -> u64 {
        self.count.set(self.count.get() + 1);
        self.count.get()
    }

    pub(super) fn is_live(&self) -> bool {
        self.is_ready.get() && !self.is_logged_out.get()
    }

    /// Whether its user is in the room, as far as it was told.
    pub(super) fn is_in(&self) -> bool {
        self.learnt.borrow().joined.contains(&self.user_id)
    }

    /// Makes a request until it is answered.
    pub(super) async fn insist(
        &self,
        world: &World,
        method: Method,
        path: &str,
        body: Value,
    ) -> (StatusCode, Value) {
        let token = self.token.borrow().clone();
        world.insist(self.place(), method, path, Some(&token), body).await
    }

    async fn ok(&self, world: &World, method: Method, path: &str, body: Value) -> Value {
        let (status, json) = self.insist(world, method, path, body).await;
        assert_eq!(status, StatusCode::OK, "{}: {path}: {json}", self.name);
        json
    }

    /// Uploads the first keys.
    pub(super) async fn introduce(&self, world: &World, persons: &Persons) {
        let own = persons.olm.ask(&self.name, "identity", json!({}));
        let known = Known { curve25519: text(&own, "curve25519"), ed25519: text(&own, "ed25519") };
        let keys = json!({
            "user_id": self.user_id, "device_id": self.id, "algorithms": [OLM, MEGOLM],
            "keys": {
                format!("curve25519:{}", self.id): known.curve25519, format!("ed25519:{}", self.id): known.ed25519,
            },
        });
        *self.keys.borrow_mut() = Some(known);
        let keys = persons.olm.signed(&self.name, (&self.user_id, &self.id), keys);
        self.upload(world, persons, Some(keys)).await;
        self.is_ready.set(true);
        world.wire.note(|| format!("{} is there", self.name));
    }

    /// Uploads one-time keys, and with the first ones the identity keys and a key to fall back on.
    async fn upload(&self, world: &World, persons: &Persons, device_keys: Option<Value>) {
        let mut body = json!({});
        let is_first = device_keys.is_some();
        if let Some(keys) = device_keys {
            body["device_keys"] = keys;
        }
        let of = (self.user_id.as_str(), self.id.as_str());
        let mut sign = |field: &str, answer: &Value, is_fallback: bool| {
            let mut signed = Map::new();
            for (id, key) in answer["keys"].as_object().unwrap() {
                let key =
                    if is_fallback { json!({ "key": key, "fallback": true }) } else { json!({ "key": key }) };
                signed.insert(format!("signed_curve25519:{id}"), persons.olm.signed(&self.name, of, key));
            }
            body[field] = Value::Object(signed);
        };
        let keys = persons.olm.ask(&self.name, "one_time_keys", json!({ "count": KEYS_MORE }));
        sign("one_time_keys", &keys, false);
        if is_first {
            sign("fallback_keys", &persons.olm.ask(&self.name, "fallback_key", json!({})), true);
        }
        self.ok(world, Method::POST, &format!("{V3}/keys/upload"), body).await;
        persons.olm.ask(&self.name, "published", json!({}));
    }

    /// Makes one sync; answers whether it brought anything.
    pub(super) async fn sync(&self, world: &World, persons: &Persons, timeout_ms: u64) -> bool {
        let mut path = format!("{V3}/sync?use_state_after=true&timeout={timeout_ms}");
        if let Some(since) = &self.learnt.borrow().since {
            path += &format!("&since={since}");
        }
        let token = self.token.borrow().clone();
        match world.ask(self.place(), Method::GET, &path, Some(&token), Value::Null).await {
            Answer::Given(StatusCode::OK, json) => self.learn(persons, &json),
            Answer::Given(status, json) => {
                assert!(self.is_logged_out.get(), "{}: {status} {json}", self.name);
                false
            }
            Answer::Lost => true,
        }
    }

    fn learn(&self, persons: &Persons, sync: &Value) -> bool {
        let mut is_news = false;
        for message in sync["to_device"]["events"].as_array().into_iter().flatten() {
            is_news = true;
            self.open(persons, message);
        }
        let learnt = &mut *self.learnt.borrow_mut();
        learnt.since = Some(text(sync, "next_batch"));
        let users = |field: &str| {
            let users = sync["device_lists"][field].as_array().cloned().unwrap_or_default();
            users.into_iter().map(|user| user.as_str().unwrap().to_owned())
        };
        learnt.outdated.extend(users("changed"));
        for user in users("left") {
            learnt.lists.remove(&user);
            learnt.outdated.remove(&user);
        }
        if let Some(left) = sync["device_one_time_keys_count"]["signed_curve25519"].as_u64() {
            learnt.lacks_keys = left < KEYS_FEW;
        }
        let Some(room) = persons.room.borrow().clone() else { return is_news };
        let news = &sync["rooms"]["join"][&room];
        if news.is_object() {
            is_news = true;
            let state = || news["state_after"]["events"].as_array().into_iter().flatten();
            if state().any(|event| event["type"] == "m.room.create") {
                learnt.joined.clear();
            }
            let before = learnt.joined.clone();
            for event in state().filter(|event| event["type"] == "m.room.member") {
                let user = text(event, "state_key");
                if event["content"]["membership"] == "join" {
                    learnt.joined.insert(user);
                } else {
                    learnt.joined.remove(&user);
                }
            }
            // Those who have gone must not read what is said from now on.
            if !before.is_subset(&learnt.joined) {
                learnt.room_session = None;
            }
        }
        if sync["rooms"]["leave"][&room].is_object() {
            is_news = true;
            learnt.joined.clear();
            learnt.room_session = None;
        }
        is_news
    }

    /// Decrypts a message of another device, and takes the key of the room in it.
    fn open(&self, persons: &Persons, message: &Value) {
        let (who, content) = (&self.name, &message["content"]);
        let number = content["number"].as_u64().unwrap();
        assert!(self.learnt.borrow_mut().inbox.insert(number), "{who} is given the message {number} again");
        let own = self.keys.borrow().clone().unwrap().curve25519;
        let sealed = &content["ciphertext"][&own];
        assert!(sealed.is_object(), "{who} is given a message of another device: {message}");
        let sender_key = text(content, "sender_key");
        let request = json!({ "their": sender_key, "message": sealed });
        let opened = persons.olm.ask(who, "open", request);
        let inner: Value = serde_json::from_str(&text(&opened, "text")).unwrap();
        assert_eq!((&inner["sender"], &inner["recipient"]), (&message["sender"], &json!(self.user_id)));
        let key = &inner["content"];
        persons.olm.ask(
            who,
            "take_room_key",
            json!({ "session_id": key["session_id"], "session_key": key["session_key"] }),
        );
        self.learnt.borrow_mut().sessions.insert(sender_key);
    }

    /// Uploads one-time keys where the server has few. The key to fall back on stays, because whoever was given it may use it late.
    pub(super) async fn refill(&self, world: &World, persons: &Persons) {
        if std::mem::take(&mut self.learnt.borrow_mut().lacks_keys) {
            self.upload(world, persons, None).await;
        }
    }

    /// Asks for the lists that are not known, or not any more. Those that cannot be had now are asked for the next time.
    pub(super) async fn refresh(&self, world: &World, persons: &Persons) {
        let wanted: BTreeSet<String> = {
            let learnt = &mut *self.learnt.borrow_mut();
            let outdated = std::mem::take(&mut learnt.outdated);
            // People who are not in the room are asked for when they come.
            learnt.lists.retain(|user, _| learnt.joined.contains(user) || !outdated.contains(user));
            let is_wanted = |user: &&String| outdated.contains(*user) || !learnt.lists.contains_key(*user);
            learnt.joined.iter().filter(is_wanted).cloned().collect()
        };
        if wanted.is_empty() {
            return;
        }
        let users: Map<_, _> = wanted.iter().map(|user| (user.clone(), json!([]))).collect();
        let body = json!({ "device_keys": users, "timeout": KEYS_WAIT_MS });
        let answer = self.ok(world, Method::POST, &format!("{V3}/keys/query"), body).await;
        let failed = answer["failures"].as_object().cloned().unwrap_or_default();
        let learnt = &mut *self.learnt.borrow_mut();
        for user in wanted {
            let Some(devices) = answer["device_keys"][&user].as_object() else {
                let server = user.split_once(':').unwrap().1;
                assert!(failed.contains_key(server), "{}: nothing of {user} in {answer}", self.name);
                learnt.outdated.insert(user);
                continue;
            };
            let mut list = BTreeMap::new();
            for (id, keys) in devices {
                let key = |kind: &str| text(&keys["keys"], &format!("{kind}:{id}"));
                let known = Known { curve25519: key("curve25519"), ed25519: key("ed25519") };
                assert!(persons.olm.is_signed((&user, id, &known.ed25519), keys), "{keys}");
                list.insert(id.clone(), known);
            }
            learnt.lists.insert(user, list);
        }
    }

    /// Claims keys of devices with which there is no session, and begins sessions.
    async fn claim(&self, world: &World, persons: &Persons, targets: &[(String, String, Known)]) {
        let mut wanted = BTreeMap::<String, Map<String, Value>>::new();
        for (user, id, known) in targets {
            if !self.learnt.borrow().sessions.contains(&known.curve25519) {
                wanted.entry(user.clone()).or_default().insert(id.clone(), json!("signed_curve25519"));
            }
        }
        if wanted.is_empty() {
            return;
        }
        let body = json!({ "one_time_keys": wanted, "timeout": KEYS_WAIT_MS });
        let answer = self.ok(world, Method::POST, &format!("{V3}/keys/claim"), body).await;
        for (user, id, known) in targets {
            let Some(given) = answer["one_time_keys"][user][id].as_object() else { continue };
            let (key_id, key) = given.iter().next().unwrap();
            assert!(persons.olm.is_signed((user, id, &known.ed25519), key), "{key}");
            persons.note_given(&format!("{user} {id} {key_id}"), key);
            let request = json!({ "their": known.curve25519, "key": key["key"] });
            persons.olm.ask(&self.name, "begin", request);
            self.learnt.borrow_mut().sessions.insert(known.curve25519.clone());
        }
    }

    /// Sends the key of the room to those who are in it and were not sent it. Answers the session, and who has its key.
    async fn share(&self, world: &World, persons: &Persons, room: &str) -> (String, BTreeSet<String>) {
        self.refresh(world, persons).await;
        let id = {
            let learnt = &mut *self.learnt.borrow_mut();
            learnt.room_session.take_if(|session| session.messages >= MESSAGES_OF_SESSION);
            let begin = || RoomSession {
                id: text(&persons.olm.ask(&self.name, "begin_room", json!({})), "session_id"),
                shared: BTreeSet::from([self.name.clone()]),
                messages: 0,
            };
            let session = learnt.room_session.get_or_insert_with(begin);
            session.messages += 1;
            session.id.clone()
        };
        let shared = |learnt: &Learnt| match &learnt.room_session {
            Some(session) if session.id == id => session.shared.clone(),
            _ => BTreeSet::new(),
        };
        let targets: Vec<_> = {
            let learnt = self.learnt.borrow();
            let known = shared(&learnt);
            let lists = learnt.joined.iter().filter_map(|user| Some((user, learnt.lists.get(user)?)));
            let devices = lists.flat_map(|(user, list)| list.iter().map(move |(id, it)| (user, id, it)));
            let devices = devices.filter(|(user, id, _)| !known.contains(&format!("{user} {id}")));
            devices.map(|(user, id, it)| (user.clone(), id.clone(), it.clone())).collect()
        };
        self.claim(world, persons, &targets).await;
        let key = persons.olm.ask(&self.name, "room_key", json!({ "session_id": id }));
        let own = self.keys.borrow().clone().unwrap();
        let (mut messages, mut told) = (BTreeMap::<String, Map<String, Value>>::new(), Vec::new());
        for (user, device, known) in targets {
            if !self.learnt.borrow().sessions.contains(&known.curve25519) {
                continue;
            }
            let number = persons.next_message();
            let inner = json!({
                "type": "m.room_key", "sender": self.user_id, "recipient": user,
                "recipient_keys": { "ed25519": known.ed25519 }, "keys": { "ed25519": own.ed25519 },
                "content": {
                    "algorithm": MEGOLM, "room_id": room, "session_id": id, "session_key": key["session_key"],
                },
            });
            let request = json!({ "their": known.curve25519, "text": inner.to_string() });
            let sealed = persons.olm.ask(&self.name, "seal", request);
            let content = json!({
                "algorithm": OLM, "sender_key": own.curve25519, "number": number,
                "ciphertext": { &known.curve25519: sealed },
            });
            told.push((format!("{user} {device}"), number));
            messages.entry(user).or_default().insert(device, content);
        }
        if !told.is_empty() {
            let path = format!("{V3}/sendToDevice/m.room.encrypted/txn{}", self.next());
            self.ok(world, Method::PUT, &path, json!({ "messages": messages })).await;
            world.wire.note(|| format!("{} has sent the key of {id}: {told:?}", self.name));
        }
        let learnt = &mut *self.learnt.borrow_mut();
        if let Some(session) = learnt.room_session.as_mut().filter(|session| session.id == id) {
            session.shared.extend(told.iter().map(|(device, _)| device.clone()));
        }
        let mut all = shared(learnt);
        all.extend(told.iter().map(|(device, _)| device.clone()));
        all.insert(self.name.clone());
        persons.note_owed(told);
        (id, all)
    }

    /// Says something in the room, encrypted for those of whom this device knows.
    pub(super) async fn say(&self, world: &World, persons: &Persons) {
        let Some(room) = persons.room.borrow().clone().filter(|_| self.is_in()) else { return };
        let (session_id, recipients) = self.share(world, persons, &room).await;
        let said = format!("{} of {}", self.next(), self.name);
        let request = json!({ "session_id": session_id, "text": said });
        let sealed = persons.olm.ask(&self.name, "seal_event", request);
        let content = json!({
            "algorithm": MEGOLM, "session_id": session_id, "ciphertext": sealed["ciphertext"],
            "sender_key": self.keys.borrow().clone().unwrap().curve25519, "device_id": self.id,
        });
        let path = format!("{V3}/rooms/{room}/send/m.room.encrypted/txn{}", self.next());
        let (status, json) = self.insist(world, Method::PUT, &path, content).await;
        if status != StatusCode::OK {
            assert!(status.is_client_error(), "{}: {status} {json}", self.name);
            return;
        }
        world.wire.note(|| format!("{} has said {said} to {recipients:?}: {json}", self.name));
        persons.sent.borrow_mut().insert(text(&json, "event_id"), Sent { text: said, recipients });
    }

    /// Comes into the room, by way of any server.
    pub(super) async fn join(&self, world: &World, room: &str) {
        let any = name(world.wire.below(SERVERS as u64) as usize);
        let path = format!("{V3}/join/{room}?via={}&via={any}", name(0));
        let (status, json) = self.insist(world, Method::POST, &path, json!({})).await;
        world.wire.note(|| format!("{} joins: {status} {json}", self.name));
    }

    pub(super) async fn leave(&self, world: &World, room: &str) {
        let path = format!("{V3}/rooms/{room}/leave");
        let (status, json) = self.insist(world, Method::POST, &path, json!({})).await;
        world.wire.note(|| format!("{} leaves: {status} {json}", self.name));
    }

    /// Ends the device, whose keys nobody must be shown any more.
    pub(super) async fn log_out(&self, world: &World) {
        self.is_logged_out.set(true);
        let path = format!("{V3}/logout");
        let (status, json) = self.insist(world, Method::POST, &path, json!({})).await;
        // The answer to a logout may be lost, and then its token is none any more.
        assert!(matches!(status, StatusCode::OK | StatusCode::UNAUTHORIZED), "{}: {json}", self.name);
        world.wire.note(|| format!("{} is logged out", self.name));
    }
}
