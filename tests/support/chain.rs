//! Follows what a device learns from a chain of syncs, and panics when it missed something, or was shown something twice or
//! something that it should not see.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

/// The membership of the device's user in a room, as far as the chain says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Standing {
    /// The user is not in the room.
    #[default]
    Out,
    /// The user is invited to the room.
    Invited,
    /// The user has knocked at the room.
    Knocking,
    /// The user is in the room.
    Joined,
}

/// A poll that waits is woken at most this long after an event was made, in milliseconds.
const WAKES_MS: u64 = 200;

/// One stay in a room: from a join that the chain was shown to a leave.
#[derive(Clone, Debug, Default)]
struct Stay {
    /// The events that were shown; a new part begins where a gap was told.
    parts: Vec<Vec<String>>,
    /// Whether no gap was told at the beginning of the stay.
    is_whole: bool,
    /// Whether the stay before ended between two syncs, so that the chain did not see the leave.
    goes_on: bool,
}

impl Stay {
    fn has(&self, event_id: &str) -> bool {
        self.parts.iter().flatten().any(|shown| shown == event_id)
    }
}

/// Everything that the chain has learnt of one room.
#[derive(Clone, Debug, Default)]
struct Learnt {
    standing: Standing,
    stays: Vec<Stay>,
    /// The state of the room: (type, state key) -> event id.
    state: BTreeMap<(String, String), String>,
    /// The events of each user's public receipts, in the order in which they were shown.
    receipts: BTreeMap<String, Vec<String>>,
}

/// The chain of syncs of one device, each with the token of the one before.
#[derive(Clone, Debug, Default)]
pub(crate) struct Chain {
    user_id: String,
    /// The token of the next sync.
    pub(crate) since: Option<String>,
    rooms: BTreeMap<String, Learnt>,
    /// The contents of messages from device to device.
    pub(crate) inbox: Vec<Value>,
    /// The account data: room ("" is global) and type -> content.
    pub(crate) account_data: BTreeMap<(String, String), Value>,
    /// The users whose devices have changed, and the sync in which that was told last.
    pub(crate) changed: BTreeMap<String, u64>,
    /// The polls that were answered: their beginning and end, in milliseconds since the epoch.
    pub(crate) polls: Vec<(u64, u64)>,
    /// The number of syncs that were answered.
    pub(crate) count: u64,
}

fn text<'a>(json: &'a Value, key: &str) -> &'a str {
    json[key].as_str().unwrap_or_else(|| panic!("no {key} in {json}"))
}

fn list<'a>(json: &'a Value, part: &str) -> impl Iterator<Item = &'a Value> {
    json[part]["events"].as_array().into_iter().flatten()
}

impl Chain {
    /// The chain of a device of this user, before its first sync.
    pub(crate) fn of(user_id: &str) -> Self {
        Self { user_id: user_id.to_owned(), ..Self::default() }
    }

    fn own_membership<'e>(&self, event: &'e Value) -> Option<&'e str> {
        let is_own = event["type"] == "m.room.member" && event["state_key"] == self.user_id.as_str();
        if is_own { event["content"]["membership"].as_str() } else { None }
    }

    /// Takes in the answer of a sync; says whether it brought anything. `redacted`: events whose redaction was
    /// acknowledged before the sync was asked for. `may_gap`: whether timelines are short.
    pub(crate) fn learn(&mut self, sync: &Value, redacted: &BTreeSet<String>, may_gap: bool) -> bool {
        let who = self.user_id.clone();
        self.since = Some(text(sync, "next_batch").to_owned());
        self.count += 1;
        let mut is_news = false;
        for section in ["join", "leave", "invite", "knock"] {
            for (room, news) in sync["rooms"][section].as_object().into_iter().flatten() {
                is_news = true;
                let mut learnt = self.rooms.remove(room).unwrap_or_default();
                match section {
                    "join" => self.learn_joined(room, &mut learnt, news, redacted, may_gap),
                    "leave" => self.learn_left(room, &mut learnt, news),
                    "invite" => learnt.standing = Standing::Invited,
                    _ => learnt.standing = Standing::Knocking,
                }
                self.rooms.insert(room.clone(), learnt);
            }
        }
        for message in list(sync, "to_device") {
            is_news = true;
            let content = message["content"].clone();
            assert!(!self.inbox.contains(&content), "{who} is given {content} again");
            self.inbox.push(content);
        }
        for data in list(sync, "account_data") {
            is_news = true;
            self.account_data.insert((String::new(), text(data, "type").to_owned()), data["content"].clone());
        }
        for user in sync["device_lists"]["changed"].as_array().into_iter().flatten() {
            is_news = true;
            self.changed.insert(user.as_str().unwrap().to_owned(), self.count);
        }
        is_news
    }

    fn learn_joined(
        &mut self,
        room: &str,
        learnt: &mut Learnt,
        news: &Value,
        redacted: &BTreeSet<String>,
        may_gap: bool,
    ) {
        let who = &self.user_id;
        let is_limited = news["timeline"]["limited"] == true;
        let comes = |event: &Value| {
            self.own_membership(event) == Some("join")
                && event["unsigned"]["prev_content"]["membership"] != "join"
                && learnt.stays.last().is_none_or(|stay| !stay.has(text(event, "event_id")))
        };
        let is_back = list(news, "timeline").any(comes);
        if learnt.standing != Standing::Joined || is_back {
            let goes_on = learnt.standing == Standing::Joined && !is_limited;
            if !goes_on {
                learnt.state.clear();
            }
            learnt.stays.push(Stay { parts: vec![Vec::new()], is_whole: !is_limited, goes_on });
            learnt.standing = Standing::Joined;
        } else {
            for event in list(news, "timeline") {
                let sent_ms = event["origin_server_ts"].as_u64().unwrap();
                let slept = self.polls.iter().find(|(from, to)| *from < sent_ms && sent_ms + WAKES_MS < *to);
                assert!(slept.is_none(), "{who} was not woken for {event}, sent during {slept:?}");
            }
        }
        let is_new = learnt.stays.last().is_none_or(|stay| stay.parts == [[""; 0]]);
        if is_limited && !is_new {
            assert!(may_gap, "{who} is told of a gap in {room} without need");
            learnt.stays.last_mut().unwrap().parts.push(Vec::new());
        }
        for event in list(news, "state") {
            let key = (text(event, "type").to_owned(), text(event, "state_key").to_owned());
            learnt.state.insert(key, text(event, "event_id").to_owned());
        }
        let stay = learnt.stays.last_mut().unwrap();
        for event in list(news, "timeline") {
            let event_id = text(event, "event_id");
            assert!(!stay.has(event_id), "{who} is shown {event_id} of {room} again");
            let is_hidden = redacted.contains(event_id);
            assert!(!is_hidden || event["content"].get("body").is_none(), "{who} sees {event_id} unredacted");
            if let Some(state_key) = event["state_key"].as_str() {
                let key = (text(event, "type").to_owned(), state_key.to_owned());
                learnt.state.insert(key, event_id.to_owned());
            }
            stay.parts.last_mut().unwrap().push(event_id.to_owned());
        }
        for receipts in list(news, "ephemeral").filter(|event| event["type"] == "m.receipt") {
            for (event_id, kinds) in receipts["content"].as_object().unwrap() {
                for user in kinds["m.read"].as_object().into_iter().flat_map(serde_json::Map::keys) {
                    learnt.receipts.entry(user.clone()).or_default().push(event_id.clone());
                }
            }
        }
        for data in list(news, "account_data") {
            self.account_data
                .insert((room.to_owned(), text(data, "type").to_owned()), data["content"].clone());
        }
    }

    /// Checks that nothing is shown after the leave, and to a user who was not in the room nothing but their membership.
    fn learn_left(&self, room: &str, learnt: &mut Learnt, news: &Value) {
        let who = &self.user_id;
        let events: Vec<_> = list(news, "timeline").collect();
        let was_in = learnt.standing == Standing::Joined
            || events.iter().any(|event| self.own_membership(event) == Some("join"));
        if let Some(last) = events.last() {
            let is_end = matches!(self.own_membership(last), Some("leave" | "ban"));
            assert!(is_end, "{who} has left {room}, and is shown {last} after that");
        }
        if was_in && learnt.standing == Standing::Joined {
            let stay = learnt.stays.last_mut().unwrap();
            if news["timeline"]["limited"] == true {
                stay.parts.push(Vec::new());
            }
            for event in &events {
                let event_id = text(event, "event_id").to_owned();
                if stay.has(&event_id) {
                    // The user left, came back and left between two syncs, so the room may be shown anew.
                    assert!(
                        events.iter().any(|event| self.own_membership(event) == Some("join")),
                        "{event_id} again"
                    );
                    stay.parts.push(Vec::new());
                    continue;
                }
                stay.parts.last_mut().unwrap().push(event_id);
            }
        } else if !was_in {
            // An invitation or a knock may have hidden the end of a stay: then the stay is shown anew, after a gap.
            let is_own = |event: &&Value| self.own_membership(event).is_some();
            let is_anew = news["timeline"]["limited"] == true;
            assert!(
                is_anew || events.iter().all(is_own),
                "{who} is not in {room}, and is shown what is said there"
            );
        }
        learnt.standing = Standing::Out;
        learnt.state.clear();
    }

    /// The rooms of which the chain has learnt something.
    pub(crate) fn rooms(&self) -> impl Iterator<Item = &String> {
        self.rooms.keys()
    }

    /// The membership of the user in a room.
    pub(crate) fn standing(&self, room: &str) -> Standing {
        self.rooms.get(room).map(|learnt| learnt.standing).unwrap_or_default()
    }

    /// Compares, once the chain has caught up, what was learnt of a room with all its events, oldest first, and its
    /// current state (event ids).
    pub(crate) fn check(&self, room: &str, all: &[Value], state: &BTreeSet<String>) {
        let Some(learnt) = self.rooms.get(room) else { return };
        let who = &self.user_id;
        let place: BTreeMap<_, _> =
            all.iter().enumerate().map(|(at, event)| (text(event, "event_id"), at)).collect();
        let at = |event_id: &String| {
            *place
                .get(event_id.as_str())
                .unwrap_or_else(|| panic!("{who} was shown {event_id}, which is not in {room}"))
        };
        let joins = |from: usize| {
            all.iter().enumerate().skip(from).find(|(_, event)| self.own_membership(event) == Some("join"))
        };
        let mut before = None;
        for stay in &learnt.stays {
            let places: Vec<Vec<usize>> = stay
                .parts
                .iter()
                .filter(|part| !part.is_empty())
                .map(|part| part.iter().map(at).collect())
                .collect();
            for part in &places {
                let is_dense = part.windows(2).all(|pair| pair[1] == pair[0] + 1);
                assert!(is_dense, "{who} missed something in {room}, or saw it out of order: {part:?}");
            }
            assert!(
                places.is_sorted_by(|one, other| one.last() < other.first()),
                "{who} in {room}: {places:?}"
            );
            let Some(first) = places.first().and_then(|part| part.first()).copied() else { continue };
            if let (true, Some(before)) = (stay.goes_on, before) {
                assert!(first <= before + 1, "{who} missed something in {room} between {before} and {first}");
            }
            if stay.is_whole
                && before.is_none()
                && let Some((join, _)) = joins(0)
            {
                assert!(first <= join, "{who} was not shown the own join to {room}");
            }
            before = places.last().and_then(|part| part.last()).copied();
        }
        if learnt.standing == Standing::Joined {
            assert_eq!(before, all.len().checked_sub(1), "{who} misses the newest of {room}");
            let known: BTreeSet<_> = learnt.state.values().cloned().collect();
            let differ: Vec<_> = known.symmetric_difference(state).collect();
            assert!(differ.is_empty(), "{who} knows another state of {room}: {differ:?}");
        }
        for (user, events) in &learnt.receipts {
            let places: Vec<_> = events.iter().map(at).collect();
            assert!(places.is_sorted(), "{who} sees receipts of {user} in {room} go back: {places:?}");
        }
    }

    /// The newest public receipt of each user in a room.
    pub(crate) fn receipts(&self, room: &str) -> BTreeMap<String, String> {
        let receipts = self.rooms.get(room).map(|learnt| learnt.receipts.clone()).unwrap_or_default();
        receipts.into_iter().filter_map(|(user, mut events)| Some((user, events.pop()?))).collect()
    }
}
