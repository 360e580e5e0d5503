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
    world::{Answer, World},
};

const PEOPLE: u64 = 3;
/// In no life does a room get more events than this, so no timeline of a sync has a gap.
const EVENTS_MAX: u64 = 1_000;

/// What was acknowledged.
#[derive(Default)]
pub(crate) struct Rooms {
    people: RefCell<BTreeMap<u64, String>>,
    /// Rooms whose creation was answered.
    made: RefCell<BTreeSet<String>>,
    /// The names of all rooms that somebody tried to make; whether it was answered.
    tried: RefCell<BTreeMap<String, bool>>,
    /// By body: room and event id.
    said: RefCell<BTreeMap<String, (String, String)>>,
    /// By topic: how often it was tried, and whether it was answered.
    topics: RefCell<BTreeMap<String, (u64, bool)>>,
    /// Event ids whose redaction was answered.
    redacted: RefCell<BTreeSet<String>>,
    /// What each person's chain of syncs has shown, by room.
    chains: RefCell<BTreeMap<u64, Chain>>,
}

/// A device's chain of syncs.
#[derive(Default, Clone)]
struct Chain {
    since: Option<String>,
    rooms: BTreeMap<String, Vec<String>>,
}

/// Starts them.
pub(crate) fn begin(world: &Rc<World>, people: &mut JoinSet<()>) -> Rc<Rooms> {
    let rooms = Rc::new(Rooms::default());
    for person in 0..PEOPLE {
        let (world, rooms) = (world.clone(), rooms.clone());
        people.spawn_local(async move {
            world.pause(500).await;
            let token = register(&world, &format!("talker{person}")).await;
            rooms.people.borrow_mut().insert(person, token.clone());
            tokio::join!(rooms.talk(&world, person, &token), rooms.follow(&world, person, &token));
        });
    }
    rooms
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
            world.pause(700).await;
            count += 1;
            let Some(room) = self.choose(world) else { continue };
            match world.below(100) {
                0..55 => self.say(world, person, token, &room, count).await,
                55..65 => self.set_topic(world, person, token, &room, count).await,
                65..75 => self.redact(world, person, token, count).await,
                75..80 => self.make(world, person, token, count).await,
                _ => {
                    let (status, json) =
                        world.insist(Method::POST, &path(&room, "join"), Some(token), json!({})).await;
                    assert_eq!(status, StatusCode::OK, "{json}");
                    world.note(|| format!("talker{person} is in {room}"));
                }
            }
        }
    }

    fn choose(&self, world: &World) -> Option<String> {
        let made = self.made.borrow();
        if made.is_empty() { None } else { made.iter().nth(world.below(made.len() as u64) as usize).cloned() }
    }

    /// Makes a room. It cannot be retried: whether it was made is seen later.
    async fn make(&self, world: &World, person: u64, token: &str, count: u64) {
        let name = format!("room {count} of {person}");
        self.tried.borrow_mut().insert(name.clone(), false);
        let body = json!({ "name": name, "topic": "made", "preset": "public_chat" });
        match world.ask(Method::POST, "/_matrix/client/v3/createRoom", Some(token), body).await {
            Answer::Given(status, json) => {
                assert_eq!(status, StatusCode::OK, "{json}");
                world.note(|| format!("talker{person} has made {json}"));
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
            // Not in the room (yet).
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
        assert_eq!(status, StatusCode::OK, "{json}");
        world.note(|| format!("talker{person} has redacted {event_id}"));
        self.redacted.borrow_mut().insert(event_id.clone());
    }

    /// Follows along: each answered sync goes on from the one before.
    async fn follow(&self, world: &World, person: u64, token: &str) {
        while !world.is_ending() {
            self.sync(world, person, token, 1_000).await;
            world.pause(200).await;
        }
    }

    /// One sync; answers whether it brought anything.
    async fn sync(&self, world: &World, person: u64, token: &str, timeout_ms: u64) -> bool {
        let mut chain = self.chains.borrow_mut().entry(person).or_default().clone();
        let filter = format!("%7B%22room%22:%7B%22timeline%22:%7B%22limit%22:{EVENTS_MAX}%7D%7D%7D");
        let mut path = format!("/_matrix/client/v3/sync?timeout={timeout_ms}&filter={filter}");
        if let Some(since) = &chain.since {
            path += &format!("&since={since}");
        }
        let Answer::Given(status, json) = world.ask(Method::GET, &path, Some(token), Value::Null).await
        else {
            return true;
        };
        assert_eq!(status, StatusCode::OK, "{json}");
        let mut is_news = false;
        for (room, news) in json["rooms"]["join"].as_object().into_iter().flatten() {
            let events = news["timeline"]["events"].as_array().cloned().unwrap_or_default();
            is_news |= !events.is_empty();
            let is_limited = news["timeline"]["limited"] == true;
            let seen = chain.rooms.entry(room.clone()).or_default();
            assert!(seen.is_empty() || !is_limited, "talker{person}: a gap in {room} without need");
            for event in events {
                let event_id = text(&event, "event_id");
                assert!(!seen.contains(&event_id), "talker{person} is shown {event_id} of {room} again");
                seen.push(event_id);
            }
        }
        chain.since = Some(text(&json, "next_batch"));
        world.note(|| format!("talker{person} has synced to {:?}, news: {is_news}", chain.since));
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
        for token in people.values() {
            let (_, json) =
                world.insist(Method::GET, "/_matrix/client/v3/joined_rooms", Some(token), Value::Null).await;
            for room in json["joined_rooms"].as_array().unwrap() {
                let room = room.as_str().unwrap();
                if !all.contains_key(room) {
                    let name = self.check_whole(world, token, room).await;
                    assert!(names.insert(name.clone()), "{name} was made twice");
                    all.insert(room.to_owned(), list_events(world, token, room).await);
                }
            }
        }
        for (name, was_answered) in self.tried.borrow().iter() {
            assert!(!was_answered || names.contains(name), "{name} is lost");
        }
        self.check_said(&all);
        self.check_topics(&all);
        self.check_chains(&all);
    }

    /// A room has everything that it was made with; answers its name.
    async fn check_whole(&self, world: &World, token: &str, room: &str) -> String {
        let (status, json) = world.insist(Method::GET, &path(room, "state"), Some(token), Value::Null).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        let state = json.as_array().unwrap();
        let of = |kind: &str| state.iter().find(|event| event["type"] == kind);
        for kind in ["create", "power_levels", "join_rules", "history_visibility", "topic", "name"] {
            assert!(of(&format!("m.room.{kind}")).is_some(), "{room} is half there: it has no {kind}");
        }
        let name = text(&of("m.room.name").unwrap()["content"], "name");
        assert!(self.tried.borrow().contains_key(&name));
        name
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

    /// A chain shows what the room has from some point on, each event once, in its order.
    fn check_chains(&self, all: &BTreeMap<String, Vec<Value>>) {
        for (person, chain) in self.chains.borrow().iter() {
            for (room, shown) in &chain.rooms {
                let events: Vec<_> = all[room].iter().map(|event| text(event, "event_id")).collect();
                let tail = &events[events.len().saturating_sub(shown.len())..];
                assert_eq!(shown, tail, "talker{person} in {room}");
                let user = format!("@talker{person}:sim.example");
                let own_join = all[room].iter().position(|event| {
                    event["state_key"] == user.as_str() && event["content"]["membership"] == "join"
                });
                assert!(
                    own_join.unwrap() + shown.len() >= events.len(),
                    "talker{person} missed events of {room}"
                );
            }
        }
    }
}

/// All events of a room, oldest first.
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
