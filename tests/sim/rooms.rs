//! People who make rooms and talk in them, and whose devices follow along with `/sync`, while the server crashes.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::{
    accounts::{register, text},
    chain::{Chain, Standing},
    devices::Devices,
    world::{Answer, World},
};

pub(crate) const PEOPLE: u64 = 3;
/// In no life does a room get more events than this, so no timeline of a sync has a gap.
const EVENTS_MAX: u64 = 1_000;

/// Everything about rooms that was acknowledged.
#[derive(Default)]
pub(crate) struct Rooms {
    people: RefCell<BTreeMap<u64, String>>,
    /// The rooms whose creation was answered.
    made: RefCell<BTreeSet<String>>,
    /// The person who made each room.
    owners: RefCell<BTreeMap<String, u64>>,
    /// The names of all rooms that somebody tried to make, and whether that was answered.
    tried: RefCell<BTreeMap<String, bool>>,
    /// The room and event id of each message, by its body.
    said: RefCell<BTreeMap<String, (String, String)>>,
    /// The number of tries to set each topic, and whether one was answered.
    topics: RefCell<BTreeMap<String, (u64, bool)>>,
    /// The ids of events whose redaction was answered.
    redacted: RefCell<BTreeSet<String>>,
    /// The chain of syncs of each person, with all that it has shown.
    chains: RefCell<BTreeMap<u64, Chain>>,
    /// The other things that their devices do.
    devices: Devices,
}

/// Starts the people, each of whom talks, follows along, and uses a device.
pub(crate) fn begin(world: &Rc<World>, people: &mut JoinSet<()>) -> Rc<Rooms> {
    let rooms = Rc::new(Rooms::default());
    for person in 0..PEOPLE {
        let (world, rooms) = (world.clone(), rooms.clone());
        people.spawn_local(async move {
            world.pause(500).await;
            let token = register(&world, &format!("talker{person}")).await;
            rooms.people.borrow_mut().insert(person, token.clone());
            tokio::join!(
                rooms.talk(&world, person, &token),
                rooms.follow(&world, person, &token),
                rooms.devices.live(&world, person, &token),
            );
        });
    }
    rooms
}

pub(crate) fn user_id(person: u64) -> String {
    format!("@talker{person}:sim.example")
}

fn path(room: &str, rest: &str) -> String {
    format!("/_matrix/client/v3/rooms/{room}/{rest}")
}

impl Rooms {
    async fn talk(&self, world: &World, person: u64, token: &str) {
        let mut count = 0;
        if person == 0 {
            self.make(world, person, token, 0).await;
        }
        while !world.is_ending() {
            world.pause(500).await;
            count += 1;
            let Some(room) = self.choose(world) else { continue };
            match world.below(100) {
                0..45 => self.say(world, person, token, &room, count).await,
                45..52 => self.set_topic(world, person, token, &room, count).await,
                52..60 => self.redact(world, person, token, count).await,
                60..65 => self.make(world, person, token, count).await,
                65..73 => self.read(world, person, token, &room).await,
                _ => self.move_about(world, person, token, &room).await,
            }
        }
    }

    /// Comes, goes, asks others in or puts them out. What the room does not allow is refused.
    async fn move_about(&self, world: &World, person: u64, token: &str, room: &str) {
        let other = user_id(world.below(PEOPLE));
        let is_own = self.owners.borrow().get(room) == Some(&person);
        let (what, body) = match world.below(100) {
            0..45 => ("join", json!({})),
            45..60 if !is_own => ("leave", json!({})),
            45..60 => return,
            60..75 => ("invite", json!({ "user_id": other })),
            75..83 => ("kick", json!({ "user_id": other })),
            83..90 => ("ban", json!({ "user_id": other })),
            90..95 => ("unban", json!({ "user_id": other })),
            _ => ("knock", json!({})),
        };
        if what != "invite" && what != "join" && other == user_id(person) {
            return;
        }
        let at = if what == "knock" { format!("/_matrix/client/v3/knock/{room}") } else { path(room, what) };
        let (status, json) = world.insist(Method::POST, &at, Some(token), body).await;
        // A person without an account cannot be invited yet.
        let is_refused = status == StatusCode::FORBIDDEN
            || (what == "invite" && status == StatusCode::NOT_FOUND)
            || (what == "unban" && status.is_client_error());
        assert!(status == StatusCode::OK || is_refused, "{what}: {status} {json}");
        world.note(|| format!("talker{person}: {what} {other} in {room}: {status}"));
    }

    /// Sends a receipt for some message of the room. Receipts may be lost, but never go back.
    async fn read(&self, world: &World, person: u64, token: &str, room: &str) {
        let said: Vec<_> = {
            let said = self.said.borrow();
            said.values().filter(|(of, _)| of == room).map(|(_, event_id)| event_id.clone()).collect()
        };
        if said.is_empty() {
            return;
        }
        let event_id = &said[world.below(said.len() as u64) as usize];
        let at = path(room, &format!("receipt/m.read/{event_id}"));
        let (status, json) = world.insist(Method::POST, &at, Some(token), json!({})).await;
        let is_refused = matches!(status, StatusCode::FORBIDDEN | StatusCode::NOT_FOUND);
        assert!(status == StatusCode::OK || is_refused, "{status} {json}");
        world.note(|| format!("talker{person} has read {event_id}: {status}"));
    }

    fn choose(&self, world: &World) -> Option<String> {
        let made = self.made.borrow();
        if made.is_empty() { None } else { made.iter().nth(world.below(made.len() as u64) as usize).cloned() }
    }

    /// Makes a room. Creating cannot be retried, so whether the room was made is seen later.
    async fn make(&self, world: &World, person: u64, token: &str, count: u64) {
        let name = format!("room {count} of {person}");
        self.tried.borrow_mut().insert(name.clone(), false);
        let mut body = json!({ "name": name, "topic": "made", "preset": "public_chat" });
        if count > 0 && world.happens(40) {
            // Under this rule a person comes in by an invitation or after a knock.
            let rule = json!({ "type": "m.room.join_rules", "content": { "join_rule": "knock" } });
            body["initial_state"] = json!([rule]);
            let guest = user_id((person + 1) % PEOPLE);
            let profile = format!("/_matrix/client/v3/profile/{guest}");
            let (known, _) = world.insist(Method::GET, &profile, Some(token), json!({})).await;
            if known == StatusCode::OK {
                body["invite"] = json!([guest]);
            }
        }
        match world.ask(Method::POST, "/_matrix/client/v3/createRoom", Some(token), body).await {
            Answer::Given(status, json) => {
                assert_eq!(status, StatusCode::OK, "{json}");
                world.note(|| format!("talker{person} has made {json}"));
                self.owners.borrow_mut().insert(text(&json, "room_id"), person);
                self.made.borrow_mut().insert(text(&json, "room_id"));
                self.tried.borrow_mut().insert(name, true);
            }
            Answer::Lost if count == 0 => Box::pin(self.make(world, person, token, 1_000_000)).await,
            Answer::Lost => {}
        }
    }

    /// Sends a message until there is an answer; now and then twice at once, now and then once more.
    async fn say(&self, world: &World, person: u64, token: &str, room: &str, count: u64) {
        let body = format!("{count} of {person}");
        let send = path(room, &format!("send/m.room.message/txn{count}"));
        let content = json!({ "msgtype": "m.text", "body": body });
        let once = || world.insist(Method::PUT, &send, Some(token), content.clone());
        let (status, json) = if world.happens(20) {
            let (one, other) = tokio::join!(once(), once());
            assert_eq!(one, other, "the same transaction, twice at once");
            one
        } else {
            once().await
        };
        if status == StatusCode::FORBIDDEN {
            // The person is not in the room, or not yet.
            return;
        }
        assert_eq!(status, StatusCode::OK, "{json}");
        let event_id = text(&json, "event_id");
        world.note(|| format!("talker{person} has said {body} in {room} as {event_id}"));
        if world.happens(10) {
            assert_eq!(once().await.1, json, "the same transaction, later");
        }
        let before = self.said.borrow_mut().insert(body, (room.to_owned(), event_id));
        assert!(before.is_none());
    }

    async fn set_topic(&self, world: &World, person: u64, token: &str, room: &str, count: u64) {
        let topic = format!("topic {count} of {person}");
        loop {
            self.topics.borrow_mut().entry(topic.clone()).or_default().0 += 1;
            let content = json!({ "topic": topic });
            match world.ask(Method::PUT, &path(room, "state/m.room.topic"), Some(token), content).await {
                Answer::Given(StatusCode::OK, _) => break,
                Answer::Given(status, json) => {
                    assert_eq!(status, StatusCode::FORBIDDEN, "{json}");
                    self.topics.borrow_mut().remove(&topic);
                    return;
                }
                Answer::Lost => world.pause(300).await,
            }
        }
        self.topics.borrow_mut().get_mut(&topic).unwrap().1 = true;
    }

    /// Redacts a message of one's own, until there is an answer.
    async fn redact(&self, world: &World, person: u64, token: &str, count: u64) {
        let suffix = format!(" of {person}");
        let own: Vec<_> = {
            let said = self.said.borrow();
            said.iter().filter(|(body, _)| body.ends_with(&suffix)).map(|(_, place)| place.clone()).collect()
        };
        if own.is_empty() {
            return;
        }
        let (room, event_id) = &own[world.below(own.len() as u64) as usize];
        let redact = path(room, &format!("redact/{event_id}/redact{count}"));
        let (status, json) = world.insist(Method::PUT, &redact, Some(token), json!({})).await;
        if status == StatusCode::FORBIDDEN {
            // The person is no longer in the room.
            return;
        }
        assert_eq!(status, StatusCode::OK, "{json}");
        world.note(|| format!("talker{person} has redacted {event_id}"));
        self.redacted.borrow_mut().insert(event_id.clone());
    }

    /// Follows the room by syncs, of which each goes on from the answered one before.
    async fn follow(&self, world: &World, person: u64, token: &str) {
        while !world.is_ending() {
            self.sync(world, person, token, 1_000).await;
            world.pause(200).await;
        }
    }

    /// Makes one sync with the person's chain; answers whether it brought anything.
    pub(crate) async fn sync(&self, world: &World, person: u64, token: &str, timeout_ms: u64) -> bool {
        let redacted = self.redacted.borrow().clone();
        let mut chain =
            self.chains.borrow_mut().remove(&person).unwrap_or_else(|| Chain::of(&user_id(person)));
        let filter = format!("%7B%22room%22:%7B%22timeline%22:%7B%22limit%22:{EVENTS_MAX}%7D%7D%7D");
        let mut path = format!("/_matrix/client/v3/sync?timeout={timeout_ms}&filter={filter}");
        if let Some(since) = &chain.since {
            path += &format!("&since={since}");
        }
        let begun_ms = world.now_ms();
        let answer = world.ask(Method::GET, &path, Some(token), Value::Null).await;
        let is_news = match answer {
            Answer::Given(status, json) => {
                assert_eq!(status, StatusCode::OK, "{json}");
                chain.polls.push((begun_ms, world.now_ms()));
                let is_news = chain.learn(&json, &redacted, false);
                self.devices.note_sync(person, chain.count);
                world.note(|| format!("talker{person} has synced to {:?}, news: {is_news}", chain.since));
                is_news
            }
            Answer::Lost => true,
        };
        self.chains.borrow_mut().insert(person, chain);
        is_news
    }

    /// Checks what must hold at rest.
    pub(crate) async fn check(&self, world: &World) {
        let people = self.people.take();
        assert_eq!(people.len() as u64, PEOPLE);
        for (person, token) in &people {
            while self.sync(world, *person, token, 0).await {}
        }
        let mut all = BTreeMap::new();
        let mut names = BTreeSet::new();
        // The maker of a room never leaves it, so they see everything there.
        for (person, token) in &people {
            let (_, json) =
                world.insist(Method::GET, "/_matrix/client/v3/joined_rooms", Some(token), Value::Null).await;
            for room in json["joined_rooms"].as_array().unwrap() {
                let room = room.as_str().unwrap();
                let events = list_events(world, token, room).await;
                if events[0]["sender"] == user_id(*person).as_str() {
                    let (name, state) = self.check_whole(world, token, room).await;
                    assert!(names.insert(name.clone()), "{name} was made twice");
                    self.check_chains(room, &events, &state, &people);
                    all.insert(room.to_owned(), events);
                }
            }
        }
        let chains = self.chains.borrow().clone();
        let shown = chains.values().flat_map(|chain| chain.rooms());
        assert!(shown.into_iter().all(|room| all.contains_key(room)), "a room is shown that is not there");
        self.check_receipts(world, &people).await;
        for (name, was_answered) in self.tried.borrow().iter() {
            assert!(!was_answered || names.contains(name), "{name} is lost");
        }
        let shared = |one: u64, other: u64| {
            all.keys().any(|room| {
                let is_in = |person: u64| chains[&person].standing(room) == Standing::Joined;
                is_in(one) && is_in(other)
            })
        };
        self.devices.check(world, &people, &chains, shared).await;
        self.check_said(&all);
        self.check_topics(&all);
    }

    /// Checks that a room has everything it was made with; answers its name, and the ids of its state.
    async fn check_whole(&self, world: &World, token: &str, room: &str) -> (String, Vec<Value>) {
        let (status, json) = world.insist(Method::GET, &path(room, "state"), Some(token), Value::Null).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        let state = json.as_array().unwrap();
        let of = |kind: &str| state.iter().find(|event| event["type"] == kind);
        for kind in ["create", "power_levels", "join_rules", "history_visibility", "topic", "name"] {
            assert!(of(&format!("m.room.{kind}")).is_some(), "{room} is half there: it has no {kind}");
        }
        let name = text(&of("m.room.name").unwrap()["content"], "name");
        assert!(self.tried.borrow().contains_key(&name));
        (name, state.clone())
    }

    fn check_said(&self, all: &BTreeMap<String, Vec<Value>>) {
        let mut bodies = BTreeMap::<&str, u64>::new();
        for event in all.values().flatten() {
            if let Some(body) = event["content"]["body"].as_str() {
                *bodies.entry(body).or_default() += 1;
            }
        }
        let redacted = self.redacted.borrow();
        for (body, (room, event_id)) in self.said.borrow().iter() {
            let found: Vec<_> =
                all[room].iter().filter(|event| event["event_id"] == event_id.as_str()).collect();
            assert_eq!(found.len(), 1, "{body} is there {} times", found.len());
            let is_redacted = redacted.contains(event_id);
            let times = bodies.get(body.as_str()).copied().unwrap_or(0);
            assert_eq!(times, u64::from(!is_redacted), "{body} (redacted: {is_redacted})");
        }
        // Only sending makes messages, and every sending was answered in the end.
        assert!(bodies.keys().all(|body| self.said.borrow().contains_key(*body)));
    }

    fn check_topics(&self, all: &BTreeMap<String, Vec<Value>>) {
        for (topic, (tries, was_answered)) in self.topics.borrow().iter() {
            let is_it = |event: &&Value| event["content"]["topic"] == topic.as_str();
            let times = all.values().flatten().filter(is_it).count() as u64;
            assert!(times <= *tries && (times > 0 || !was_answered), "{topic}: {times} of {tries}");
        }
    }

    /// Checks that each chain shows what the room has for as long as its user was in it, and knows its state and members.
    fn check_chains(&self, room: &str, all: &[Value], state: &[Value], people: &BTreeMap<u64, String>) {
        let ids = state.iter().map(|event| text(event, "event_id")).collect();
        for person in people.keys() {
            let chains = self.chains.borrow();
            let chain = &chains[person];
            chain.check(room, all, &ids);
            let user = user_id(*person);
            let member = state
                .iter()
                .find(|event| event["type"] == "m.room.member" && event["state_key"] == user.as_str());
            let expected = match member.map(|event| event["content"]["membership"].as_str().unwrap()) {
                Some("join") => Standing::Joined,
                Some("invite") => Standing::Invited,
                Some("knock") => Standing::Knocking,
                _ => Standing::Out,
            };
            assert_eq!(chain.standing(room), expected, "{user} in {room}");
        }
    }

    /// Checks that a chain in the end knows the same receipts as a new device is told.
    async fn check_receipts(&self, world: &World, people: &BTreeMap<u64, String>) {
        for (person, token) in people {
            let path = "/_matrix/client/v3/sync?timeout=0";
            let (status, json) = world.insist(Method::GET, path, Some(token), Value::Null).await;
            assert_eq!(status, StatusCode::OK, "{json}");
            let mut anew = Chain::of(&user_id(*person));
            anew.learn(&json, &BTreeSet::new(), true);
            let chains = self.chains.borrow();
            for room in json["rooms"]["join"].as_object().into_iter().flat_map(serde_json::Map::keys) {
                let (now, known) = (anew.receipts(room), chains[person].receipts(room));
                for (user, event) in now {
                    assert_eq!(
                        known.get(&user),
                        Some(&event),
                        "talker{person}, receipts of {user} in {room}"
                    );
                }
            }
        }
    }
}

/// Lists all events of a room, the oldest first.
async fn list_events(world: &World, token: &str, room: &str) -> Vec<Value> {
    let (mut events, mut from) = (Vec::new(), String::new());
    loop {
        let page = path(room, &format!("messages?dir=f&limit=50{from}"));
        let (status, json) = world.insist(Method::GET, &page, Some(token), Value::Null).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        events.extend(json["chunk"].as_array().unwrap().iter().cloned());
        match json["end"].as_str() {
            Some(end) => from = format!("&from={end}"),
            None => break,
        }
    }
    let ids: BTreeSet<_> = events.iter().map(|event| text(event, "event_id")).collect();
    assert_eq!(ids.len(), events.len(), "{room} shows an event twice");
    events
}
