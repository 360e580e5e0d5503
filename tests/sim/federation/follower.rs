//! Follows what a device learns from a chain of syncs, with `use_state_after`, and panics when it is shown something twice.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::accounts::text;

/// The membership of the device's user in a room, as far as the chain says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Standing {
    #[default]
    Out,
    Invited,
    Knocking,
    Joined,
}

/// Everything that the chain has learnt of one room.
#[derive(Clone, Debug, Default)]
pub(crate) struct Learnt {
    pub(crate) standing: Standing,
    /// The events that were shown: a stay in the room begins a list of parts, and a new part begins where a gap was told.
    pub(crate) stays: Vec<Vec<Vec<String>>>,
    /// The state of the room: (type, state key) -> event id.
    pub(crate) state: BTreeMap<(String, String), String>,
}

/// The chain of syncs of one device, each with the token of the one before.
#[derive(Clone, Debug, Default)]
pub(crate) struct Follower {
    user_id: String,
    /// The token of the next sync.
    pub(crate) since: Option<String>,
    pub(crate) rooms: BTreeMap<String, Learnt>,
    /// The numbers of messages from device to device.
    pub(crate) inbox: BTreeSet<u64>,
}

fn list<'a>(json: &'a Value, part: &str) -> impl Iterator<Item = &'a Value> {
    json[part]["events"].as_array().into_iter().flatten()
}

impl Follower {
    /// The chain of a device of this user, before its first sync.
    pub(crate) fn of(user_id: &str) -> Self {
        Self { user_id: user_id.to_owned(), ..Self::default() }
    }

    fn own_membership<'e>(&self, event: &'e Value) -> Option<&'e str> {
        let is_own = event["type"] == "m.room.member" && event["state_key"] == self.user_id.as_str();
        if is_own { event["content"]["membership"].as_str() } else { None }
    }

    /// Takes in the answer of a sync; says whether it brought anything. `redacted`: events of people of this server whose
    /// redaction was acknowledged before the sync was asked for.
    pub(crate) fn learn(&mut self, sync: &Value, redacted: &BTreeSet<String>) -> bool {
        self.since = Some(text(sync, "next_batch"));
        let mut is_news = false;
        for section in ["join", "leave", "invite", "knock"] {
            for (room, news) in sync["rooms"][section].as_object().into_iter().flatten() {
                is_news = true;
                let mut learnt = self.rooms.remove(room).unwrap_or_default();
                match section {
                    "join" => self.learn_joined(room, &mut learnt, news, redacted),
                    "leave" => self.learn_left(room, &mut learnt, news),
                    "invite" => learnt.standing = Standing::Invited,
                    _ => learnt.standing = Standing::Knocking,
                }
                self.rooms.insert(room.clone(), learnt);
            }
        }
        for message in list(sync, "to_device") {
            is_news = true;
            if let Some(number) = message["content"]["number"].as_u64() {
                assert!(self.inbox.insert(number), "{} is given the message {number} again", self.user_id);
            }
        }
        is_news
    }

    fn learn_joined(&self, room: &str, learnt: &mut Learnt, news: &Value, redacted: &BTreeSet<String>) {
        let who = &self.user_id;
        let is_limited = news["timeline"]["limited"] == true;
        let shown = |learnt: &Learnt, event_id: &str| {
            learnt.stays.last().is_some_and(|stay| stay.iter().flatten().any(|shown| shown == event_id))
        };
        let comes = |event: &Value| {
            self.own_membership(event) == Some("join")
                && event["unsigned"]["prev_content"]["membership"] != "join"
                && !shown(learnt, &text(event, "event_id"))
        };
        let is_back = list(news, "timeline").any(comes);
        if learnt.standing != Standing::Joined || is_back {
            // A join of the user that comes in late, by way of another server, is no return: the state goes on.
            let is_whole = list(news, "state_after").any(|event| event["type"] == "m.room.create");
            if learnt.standing != Standing::Joined || is_whole {
                learnt.state.clear();
            }
            learnt.stays.push(vec![Vec::new()]);
            learnt.standing = Standing::Joined;
        } else if is_limited {
            learnt.stays.last_mut().unwrap().push(Vec::new());
        }
        for event in list(news, "timeline") {
            let event_id = text(event, "event_id");
            assert!(!shown(learnt, &event_id), "{who} is shown {event_id} of {room} again");
            let is_hidden = redacted.contains(&event_id);
            assert!(
                !is_hidden || event["content"].get("body").is_none() || !is_own_server(who, event),
                "{who} sees {event_id} unredacted"
            );
            learnt.stays.last_mut().unwrap().last_mut().unwrap().push(event_id);
        }
        for event in list(news, "state_after") {
            let key = (text(event, "type"), text(event, "state_key"));
            learnt.state.insert(key, text(event, "event_id"));
        }
    }

    /// Checks that nothing is shown after the leave.
    fn learn_left(&self, room: &str, learnt: &mut Learnt, news: &Value) {
        let who = &self.user_id;
        let events: Vec<_> = list(news, "timeline").collect();
        if learnt.standing == Standing::Joined {
            let stay = learnt.stays.last_mut().unwrap();
            stay.push(Vec::new());
            for event in &events {
                let event_id = text(event, "event_id");
                let is_again = stay.iter().flatten().any(|shown| *shown == event_id);
                let is_anew = events.iter().any(|event| self.own_membership(event) == Some("join"));
                assert!(!is_again || is_anew, "{who} is shown {event_id} of {room} again");
                stay.last_mut().unwrap().push(event_id);
            }
        }
        learnt.standing = Standing::Out;
        learnt.state.clear();
    }
}

/// Whether the sender of an event is of the same server as this user.
fn is_own_server(user_id: &str, event: &Value) -> bool {
    let server = |user: &str| user.split_once(':').map(|(_, server)| server.to_owned());
    event["sender"].as_str().and_then(server) == server(user_id)
}
