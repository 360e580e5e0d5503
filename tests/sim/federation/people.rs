//! People on several servers, who make rooms, come to each other's, talk there and follow along.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::{
    follower::Follower,
    wire::name,
    world::{Answer, SERVERS, World},
};
use crate::accounts::text;

const PEOPLE: usize = 2 * SERVERS;
/// No world has more rooms than this.
const ROOMS_MAX: usize = 4;
const V3: &str = "/_matrix/client/v3";

/// A room whose creation was answered.
#[derive(Clone, Debug)]
pub(crate) struct Room {
    pub(crate) id: String,
    /// Its maker, who never leaves it and whom nobody can put out.
    pub(crate) owner: usize,
    /// The `history_visibility`, which never changes.
    pub(crate) visibility: &'static str,
    alias: String,
}

/// A message whose sending was answered.
#[derive(Clone, Debug)]
pub(crate) struct Said {
    pub(crate) room: String,
    pub(crate) sender: usize,
    pub(crate) body: String,
}

/// A person with one device.
pub(crate) struct Person {
    pub(crate) number: usize,
    pub(crate) user_id: String,
    device: String,
    token: RefCell<String>,
    pub(crate) follower: RefCell<Follower>,
    /// The numbers of messages between devices whose sending began when this device was there already.
    pub(crate) owed: RefCell<BTreeSet<u64>>,
    count: Cell<u64>,
}

/// Everybody, and everything that was acknowledged to them.
pub(crate) struct People {
    pub(crate) persons: Vec<Person>,
    pub(crate) rooms: RefCell<Vec<Room>>,
    /// The messages whose sending was answered, by event id.
    pub(crate) said: RefCell<BTreeMap<String, Said>>,
    /// The ids of events whose redaction was answered.
    pub(crate) redacted: RefCell<BTreeSet<String>>,
    /// The access lists that are not as they were at first, so that they are taken back in the end.
    closed: RefCell<BTreeSet<String>>,
    messages: Cell<u64>,
}

/// A path of the client-server API in a room.
pub(crate) fn path(room: &str, rest: &str) -> String {
    format!("{V3}/rooms/{room}/{rest}")
}

impl Person {
    /// The server of this person.
    pub(crate) fn place(&self) -> usize {
        self.number % SERVERS
    }

    /// Makes a request until it is answered.
    pub(crate) async fn insist(
        &self,
        world: &World,
        method: Method,
        path: &str,
        body: Value,
    ) -> (StatusCode, Value) {
        let token = self.token.borrow().clone();
        world.insist(self.place(), method, path, Some(&token), body).await
    }

    async fn ask(&self, world: &World, method: Method, path: &str, body: Value) -> Answer {
        let token = self.token.borrow().clone();
        world.ask(self.place(), method, path, Some(&token), body).await
    }

    async fn register(&self, world: &World) {
        let name = format!("p{}", self.number);
        let mut may_exist = false;
        loop {
            let body = json!({
                "username": name, "password": name, "device_id": self.device, "auth": { "type": "m.login.dummy" },
            });
            match world.ask(self.place(), Method::POST, &format!("{V3}/register"), None, body).await {
                Answer::Given(StatusCode::OK, json) => {
                    *self.token.borrow_mut() = text(&json, "access_token");
                    return;
                }
                Answer::Given(status, json) => {
                    // An attempt that was not answered has taken the name: then its password works.
                    assert!(may_exist && json["errcode"] == "M_USER_IN_USE", "{name}: {status} {json}");
                    break;
                }
                Answer::Lost => may_exist = true,
            }
            world.wire.pause(300).await;
        }
        let body = json!({
            "type": "m.login.password", "password": name, "device_id": self.device,
            "identifier": { "type": "m.id.user", "user": name },
        });
        let (status, json) =
            world.insist(self.place(), Method::POST, &format!("{V3}/login"), None, body).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        *self.token.borrow_mut() = text(&json, "access_token");
    }

    fn is_registered(&self) -> bool {
        !self.token.borrow().is_empty()
    }

    /// A number that this person has not used yet.
    fn next(&self) -> u64 {
        self.count.set(self.count.get() + 1);
        self.count.get()
    }

    /// Makes one sync with the person's chain; answers whether it brought anything.
    pub(crate) async fn sync(&self, world: &World, people: &People, timeout_ms: u64) -> bool {
        let redacted = people.redacted.borrow().clone();
        let filter = "%7B%22room%22:%7B%22timeline%22:%7B%22limit%22:40%7D%7D%7D";
        let mut path = format!("{V3}/sync?use_state_after=true&timeout={timeout_ms}&filter={filter}");
        if let Some(since) = &self.follower.borrow().since {
            path += &format!("&since={since}");
        }
        match self.ask(world, Method::GET, &path, Value::Null).await {
            Answer::Given(status, json) => {
                assert_eq!(status, StatusCode::OK, "{json}");
                let is_news = self.follower.borrow_mut().learn(&json, &redacted);
                if is_news {
                    world.wire.note(|| format!("p{} has synced", self.number));
                }
                is_news
            }
            Answer::Lost => true,
        }
    }
}

impl People {
    /// Lets everybody begin to act.
    pub(crate) fn begin(world: &Rc<World>, tasks: &mut JoinSet<()>) -> Rc<Self> {
        let persons = (0..PEOPLE).map(|number| {
            let user_id = format!("@p{number}:{}", name(number % SERVERS));
            Person {
                number,
                device: format!("DEVICE{number}"),
                token: RefCell::default(),
                follower: RefCell::new(Follower::of(&user_id)),
                owed: RefCell::default(),
                count: Cell::new(0),
                user_id,
            }
        });
        let people = Rc::new(Self {
            persons: persons.collect(),
            rooms: RefCell::default(),
            said: RefCell::default(),
            redacted: RefCell::default(),
            closed: RefCell::default(),
            messages: Cell::new(0),
        });
        for number in 0..PEOPLE {
            let (world, people) = (world.clone(), people.clone());
            tasks.spawn_local(async move {
                let person = &people.persons[number];
                world.wire.pause(500).await;
                person.register(&world).await;
                tokio::join!(people.live(&world, person), people.follow(&world, person));
            });
        }
        people
    }

    async fn follow(&self, world: &World, person: &Person) {
        while !world.is_ending() {
            person.sync(world, self, 2_000).await;
            world.wire.pause(1_000).await;
        }
    }

    async fn live(&self, world: &World, person: &Person) {
        if person.number < 2 {
            self.make(world, person).await;
        }
        while !world.is_ending() {
            world.wire.pause(2_400).await;
            let Some(room) = self.choose(world) else { continue };
            match world.wire.below(100) {
                0..32 => self.say(world, person, &room).await,
                32..37 => self.edit(world, person).await,
                37..42 => self.redact(world, person).await,
                42..52 => self.set_state(world, person, &room).await,
                52..55 => self.make(world, person).await,
                55..62 => self.send_to_device(world, person).await,
                62..66 => self.read_and_type(world, person, &room).await,
                _ => self.move_about(world, person, &room).await,
            }
        }
    }

    fn choose(&self, world: &World) -> Option<Room> {
        let rooms = self.rooms.borrow();
        if rooms.is_empty() {
            None
        } else {
            rooms.get(world.wire.below(rooms.len() as u64) as usize).cloned()
        }
    }

    /// Makes a room. Creating cannot be retried, so a room whose making was not answered is nobody's.
    async fn make(&self, world: &World, person: &Person) {
        if self.rooms.borrow().len() >= ROOMS_MAX {
            return;
        }
        let number = person.next();
        let version = ["10", "11", "12"][world.wire.below(3) as usize];
        let visibility =
            ["shared", "shared", "shared", "joined", "world_readable"][world.wire.below(5) as usize];
        let other = self.rooms.borrow().first().map(|room| room.id.clone());
        let rule = match (world.wire.below(10), other) {
            (0..2, Some(other)) => json!({
                "join_rule": "restricted", "allow": [{ "type": "m.room_membership", "room_id": other }],
            }),
            (2..4, _) => json!({ "join_rule": "knock" }),
            _ => json!({ "join_rule": "public" }),
        };
        let alias = format!("room{number}of{}", person.number);
        let body = json!({
            "name": alias, "room_version": version, "preset": "private_chat", "room_alias_name": alias,
            "power_level_content_override": { "events": {
                "m.room.topic": 0, "m.room.name": 50, "m.room.power_levels": 100, "m.room.server_acl": 100,
                "m.room.join_rules": 100, "m.room.history_visibility": 100,
            } },
            "initial_state": [
                { "type": "m.room.join_rules", "content": rule },
                { "type": "m.room.history_visibility", "content": { "history_visibility": visibility } },
            ],
        });
        if let Answer::Given(status, json) =
            person.ask(world, Method::POST, &format!("{V3}/createRoom"), body).await
        {
            assert_eq!(status, StatusCode::OK, "{json}");
            world.wire.note(|| format!("p{} has made {json}, version {version}, {rule}", person.number));
            let alias = format!("%23{alias}:{}", name(person.place()));
            let room = Room { id: text(&json, "room_id"), owner: person.number, visibility, alias };
            self.rooms.borrow_mut().push(room);
        }
    }

    /// Sends this event until there is an answer; answers its id, or nothing where it is refused.
    async fn send(
        &self,
        world: &World,
        person: &Person,
        room: &str,
        kind: &str,
        content: &Value,
    ) -> Option<String> {
        let send = path(room, &format!("send/{kind}/txn{}", person.next()));
        let once = || person.insist(world, Method::PUT, &send, content.clone());
        let (status, json) = if world.wire.happens(10) {
            // A refusal is not remembered: the room may have changed from one to the other, and a server that is busy judges neither.
            // But once the event is there, whoever sends it again is told of it.
            let again = async |mut answer: (StatusCode, Value), other: StatusCode| {
                let mut is_open = other == StatusCode::OK && answer.0 != other;
                while is_open {
                    world.wire.pause(2_000).await;
                    answer = once().await;
                    is_open = is_busy(&answer);
                }
                answer
            };
            let (one, other) = tokio::join!(once(), once());
            let (one, other) = (again(one.clone(), other.0).await, again(other, one.0).await);
            if one.0 == StatusCode::OK || !is_refusal(other.0) {
                assert_eq!(one, other, "the same transaction, twice at once");
            }
            one
        } else {
            once().await
        };
        if status != StatusCode::OK {
            assert!(is_refusal(status), "{kind} of p{} in {room}: {status} {json}", person.number);
            return None;
        }
        let event_id = text(&json, "event_id");
        world.wire.note(|| format!("p{} has sent {content} to {room} as {event_id}", person.number));
        Some(event_id)
    }

    /// Says something in a room.
    pub(crate) async fn say(&self, world: &World, person: &Person, room: &Room) {
        let body = format!("{} of p{}", person.next(), person.number);
        let content = json!({ "msgtype": "m.text", "body": body });
        if let Some(event_id) = self.send(world, person, &room.id, "m.room.message", &content).await {
            let said = Said { room: room.id.clone(), sender: person.number, body };
            let before = self.said.borrow_mut().insert(event_id, said);
            assert!(before.is_none());
        }
    }

    fn choose_own(&self, world: &World, person: &Person) -> Option<(String, Said)> {
        let said = self.said.borrow();
        let own: Vec<_> = said.iter().filter(|(_, said)| said.sender == person.number).collect();
        let (event_id, said) = own.get(world.wire.below(own.len().max(1) as u64) as usize)?;
        Some(((*event_id).clone(), (*said).clone()))
    }

    async fn edit(&self, world: &World, person: &Person) {
        let Some((event_id, said)) = self.choose_own(world, person) else { return };
        let body = format!("{} of p{}", person.next(), person.number);
        let content = json!({
            "msgtype": "m.text", "body": body, "m.new_content": { "msgtype": "m.text", "body": body },
            "m.relates_to": { "rel_type": "m.replace", "event_id": event_id },
        });
        if let Some(event_id) = self.send(world, person, &said.room, "m.room.message", &content).await {
            self.said.borrow_mut().insert(event_id, Said { body, ..said });
        }
    }

    async fn redact(&self, world: &World, person: &Person) {
        let Some((event_id, said)) = self.choose_own(world, person) else { return };
        let at = path(&said.room, &format!("redact/{event_id}/txn{}", person.next()));
        let (status, json) = person.insist(world, Method::PUT, &at, json!({})).await;
        if status == StatusCode::OK {
            world.wire.note(|| format!("p{} has redacted {event_id}", person.number));
            self.redacted.borrow_mut().insert(event_id);
        } else {
            assert!(is_refusal(status), "{status} {json}");
        }
    }

    /// Changes what the person may, or tries to.
    async fn set_state(&self, world: &World, person: &Person, room: &Room) {
        let number = person.next();
        let is_owner = room.owner == person.number;
        let (kind, content) = match world.wire.below(100) {
            0..50 => ("m.room.topic", json!({ "topic": format!("{number} of p{}", person.number) })),
            50..65 => ("m.room.name", json!({ "name": format!("{number} of p{}", person.number) })),
            65..80 if is_owner => {
                let at = path(&room.id, "state/m.room.power_levels");
                let (status, mut levels) = person.insist(world, Method::GET, &at, Value::Null).await;
                assert_eq!(status, StatusCode::OK, "{levels}");
                let other = &self.persons[world.wire.below(PEOPLE as u64) as usize];
                if other.number == person.number {
                    return;
                }
                levels["users"][&other.user_id] = json!([0, 0, 50, 50, 75][world.wire.below(5) as usize]);
                ("m.room.power_levels", levels)
            }
            80..92 if is_owner => {
                let rule = ["public", "public", "invite", "knock"][world.wire.below(4) as usize];
                ("m.room.join_rules", json!({ "join_rule": rule }))
            }
            92..100 if is_owner => {
                let other = name(world.wire.below(SERVERS as u64) as usize);
                let other = other.strip_suffix(":8448").unwrap_or(&other);
                let denied = if *other == *name(person.place()).trim_end_matches(":8448") {
                    json!([])
                } else {
                    json!([other])
                };
                self.closed.borrow_mut().insert(room.id.clone());
                ("m.room.server_acl", json!({ "allow": ["*"], "deny": denied }))
            }
            _ => return,
        };
        let at = path(&room.id, &format!("state/{kind}"));
        let answer = person.insist(world, Method::PUT, &at, content.clone()).await;
        assert!(is_fine(answer.0), "{kind}: {answer:?}");
        world.wire.note(|| format!("p{} sets {kind} of {} to {content}: {answer:?}", person.number, room.id));
    }

    /// Whether a room shut a server out at some time.
    pub(crate) fn was_closed(&self, room: &Room) -> bool {
        self.closed.borrow().contains(&room.id)
    }

    /// Lets all servers speak in all rooms again.
    pub(crate) async fn open_again(&self, world: &World) {
        let rooms = self.rooms.borrow().clone();
        for room in rooms.iter().filter(|room| self.closed.borrow().contains(&room.id)) {
            let at = path(&room.id, "state/m.room.server_acl");
            let content = json!({ "allow": ["*"], "deny": [] });
            let (status, json) = self.persons[room.owner].insist(world, Method::PUT, &at, content).await;
            assert_eq!(status, StatusCode::OK, "{json}");
        }
    }

    async fn send_to_device(&self, world: &World, person: &Person) {
        let other = &self.persons[world.wire.below(PEOPLE as u64) as usize];
        let number = self.messages.get() + 1;
        self.messages.set(number);
        if other.is_registered() {
            other.owed.borrow_mut().insert(number);
        }
        let device = if world.wire.happens(50) { "*" } else { other.device.as_str() };
        let at = format!("{V3}/sendToDevice/m.sim/txn{}", person.next());
        let body = json!({ "messages": { &other.user_id: { device: { "number": number } } } });
        let (status, json) = person.insist(world, Method::PUT, &at, body).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        world
            .wire
            .note(|| format!("p{} has sent {number} to the devices of p{}", person.number, other.number));
    }

    /// The number of messages between devices that somebody tried to send.
    pub(crate) fn count_messages(&self) -> u64 {
        self.messages.get()
    }

    async fn read_and_type(&self, world: &World, person: &Person, room: &Room) {
        let said = {
            let said = self.said.borrow();
            let here: Vec<_> = said.iter().filter(|(_, said)| said.room == room.id).collect();
            here.get(world.wire.below(here.len().max(1) as u64) as usize)
                .map(|(event_id, _)| (*event_id).clone())
        };
        let (method, at, body) = match said {
            Some(event_id) if world.wire.happens(50) => {
                (Method::POST, path(&room.id, &format!("receipt/m.read/{event_id}")), json!({}))
            }
            _ => {
                let body = json!({ "typing": true, "timeout": 5_000 });
                (Method::PUT, path(&room.id, &format!("typing/{}", person.user_id)), body)
            }
        };
        let (status, json) = person.insist(world, method, &at, body).await;
        assert!(is_fine(status), "{at}: {status} {json}");
    }

    /// Comes, goes, asks others in or puts them out. What the room does not allow is refused.
    async fn move_about(&self, world: &World, person: &Person, room: &Room) {
        let other = &self.persons[world.wire.below(PEOPLE as u64) as usize];
        let via = [name(room.owner % SERVERS), name(world.wire.below(SERVERS as u64) as usize)];
        let via = format!("via={}&via={}", via[0], via[1]);
        let (what, at) = match world.wire.below(100) {
            0..12 => ("join", format!("{V3}/join/{}", room.alias)),
            12..48 => ("join", format!("{V3}/join/{}?{via}", room.id)),
            48..58 => ("leave", path(&room.id, "leave")),
            58..75 => ("invite", path(&room.id, "invite")),
            75..82 => ("kick", path(&room.id, "kick")),
            82..87 => ("ban", path(&room.id, "ban")),
            87..92 => ("unban", path(&room.id, "unban")),
            _ => ("knock", format!("{V3}/knock/{}?{via}", room.id)),
        };
        let is_at_other = matches!(what, "invite" | "kick" | "ban" | "unban");
        let whom = if is_at_other { other } else { person };
        if whom.number == room.owner || (is_at_other && other.number == person.number) {
            return;
        }
        let body = if is_at_other { json!({ "user_id": other.user_id }) } else { json!({}) };
        world.wire.note(|| format!("p{}: {what} p{} in {}", person.number, whom.number, room.id));
        let (status, json) = person.insist(world, Method::POST, &at, body).await;
        assert!(is_fine(status), "{what}: {status} {json}");
        world.wire.note(|| {
            format!("p{}: {what} p{} in {}: {status} {}", person.number, whom.number, room.id, json["error"])
        });
    }
}

/// Whether a request was refused for a reason that people of this world meet: they may not, or another server is away.
fn is_refusal(status: StatusCode) -> bool {
    status.is_client_error()
        || matches!(
            status,
            StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT
        )
}

/// Whether a server had no time for a request, and did not judge it.
fn is_busy(answer: &(StatusCode, Value)) -> bool {
    answer.1["errcode"] == "M_LIMIT_EXCEEDED"
}

fn is_fine(status: StatusCode) -> bool {
    status == StatusCode::OK || is_refusal(status)
}
