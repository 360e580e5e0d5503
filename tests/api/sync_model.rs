//! A random model of sync: whatever happens in a room and whatever a client leaves out, the state that it puts together from
//! its answers is the state that the server has.

use std::collections::{BTreeMap, BTreeSet};

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    forks::Forker,
    support::{TestClient, TestServer, encoded},
    sync::{Chain, Dice, act, create_room},
};

/// A room's state: (type, state key) to event id and content.
type State = BTreeMap<(String, String), (String, Value)>;

/// The way in which a client syncs: its filter, and whether it asks for the state after the timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Plain,
    Lazy,
    OneEvent,
    MessagesOnly,
    WithoutAlice,
    StateAfter,
    LazyStateAfter,
}

const WAYS: [Way; 7] = [
    Way::Plain,
    Way::Lazy,
    Way::OneEvent,
    Way::MessagesOnly,
    Way::WithoutAlice,
    Way::StateAfter,
    Way::LazyStateAfter,
];

impl Way {
    fn filter(self, alice: &str) -> Value {
        match self {
            Self::Plain | Self::StateAfter => json!({}),
            Self::Lazy | Self::LazyStateAfter => {
                json!({ "room": { "state": { "lazy_load_members": true }, "timeline": { "limit": 2 } } })
            }
            Self::OneEvent => json!({ "room": { "timeline": { "limit": 1 } } }),
            Self::MessagesOnly => json!({ "room": { "timeline": { "types": ["m.room.message"] } } }),
            Self::WithoutAlice => json!({ "room": { "timeline": { "not_senders": [alice] } } }),
        }
    }

    fn is_after(self) -> bool {
        matches!(self, Self::StateAfter | Self::LazyStateAfter)
    }

    fn is_lazy(self) -> bool {
        matches!(self, Self::Lazy | Self::LazyStateAfter)
    }
}

/// A client, with what it has put together of each room.
struct Listener {
    chain: Chain,
    way: Way,
    rooms: BTreeMap<String, State>,
    /// The rooms in which its user was at some time since it began.
    was_in: BTreeSet<String>,
    /// Whether resolution may change the rooms.
    is_forked: bool,
    /// The keys of which a timeline has shown an event that never held: a client that takes state from timelines is wrong there until
    /// the key changes.
    lost: BTreeSet<(String, (String, String))>,
}

fn key(event: &Value) -> Option<(String, String)> {
    Some((event["type"].as_str()?.to_owned(), event["state_key"].as_str()?.to_owned()))
}

fn lay(state: &mut State, events: &Value) {
    for event in events.as_array().into_iter().flatten() {
        if let Some(key) = key(event) {
            state.insert(key, (event["event_id"].as_str().unwrap().to_owned(), event["content"].clone()));
        }
    }
}

/// Redacts what a client knows by the redactions that a timeline shows it. Only the types of events that the model redacts have
/// their content redacted.
fn redact(state: &mut State, events: &Value) {
    for event in events.as_array().into_iter().flatten() {
        let Some(target) = event["redacts"].as_str().or_else(|| event["content"]["redacts"].as_str()) else {
            continue;
        };
        for ((event_type, _), (_, content)) in state.iter_mut().filter(|(_, (id, _))| id == target) {
            let membership = content["membership"].clone();
            *content =
                if event_type == "m.room.member" { json!({ "membership": membership }) } else { json!({}) };
        }
    }
}

async fn state_of(client: &TestClient, room: &str) -> Option<State> {
    let (status, json) = client.get(&format!("/_matrix/client/v3/rooms/{room}/state")).await;
    let mut state = State::new();
    lay(&mut state, &json);
    (status == StatusCode::OK).then_some(state)
}

impl Listener {
    fn new(client: &TestClient, way: Way, alice: &str, is_forked: bool) -> Self {
        let mut chain = Chain::filtered(client, way.filter(alice));
        if way.is_after() {
            chain.query = "&use_state_after=true".to_owned();
        }
        Self { chain, way, rooms: BTreeMap::new(), was_in: BTreeSet::new(), is_forked, lost: BTreeSet::new() }
    }

    /// Notes the rooms in which its user is.
    async fn note_stays(&mut self) {
        if self.chain.since.is_some() {
            let (_, json) = self.chain.client.get("/_matrix/client/v3/joined_rooms").await;
            let rooms = json["joined_rooms"].as_array().into_iter().flatten();
            self.was_in.extend(rooms.map(|room| room.as_str().unwrap().to_owned()));
        }
    }

    /// Syncs, and compares what the client knows of each room it is told of with what the server has.
    async fn sync(&mut self, moment: &str) {
        let answer = self.chain.next().await;
        for section in ["join", "leave"] {
            for (room, news) in answer["rooms"][section].as_object().into_iter().flatten() {
                let known = self.rooms.entry(room.clone()).or_default();
                if self.way.is_after() {
                    lay(known, &news["state_after"]["events"]);
                } else {
                    lay(known, &news["state"]["events"]);
                    lay(known, &news["timeline"]["events"]);
                    redact(known, &news["timeline"]["events"]);
                }
                let Some(mut server) = state_of(&self.chain.client, room).await else { continue };
                let mut known = known.clone();
                if section == "leave" {
                    // Changes of the user's own membership after they left are told, and are none of the state they left.
                    let own = ("m.room.member".to_owned(), self.chain.client.user_id.clone());
                    known.remove(&own);
                    server.remove(&own);
                    // Redactions after the user left show in what the server tells of the room, and are not told by sync.
                    known
                        .values_mut()
                        .chain(server.values_mut())
                        .for_each(|(_, content)| *content = Value::Null);
                    // A client whose user was not in the room since it began is told how their membership changes, and nothing
                    // of the room, though the user may look in: where everybody may, or because they were there before.
                    if known.is_empty() && !self.was_in.contains(room) {
                        continue;
                    }
                }
                if self.way.is_lazy() {
                    let senders: BTreeSet<&str> = news["timeline"]["events"]
                        .as_array()
                        .into_iter()
                        .flatten()
                        .filter_map(|event| event["sender"].as_str())
                        .collect();
                    server.retain(|key, _| {
                        key.0 != "m.room.member" || known.contains_key(key) || senders.contains(&*key.1)
                    });
                }
                let mut wrong = Vec::new();
                let mut shown = State::new();
                lay(&mut shown, &news["timeline"]["events"]);
                for key in known.keys().chain(server.keys()) {
                    let in_room = (room.clone(), key.clone());
                    if known.get(key) == server.get(key) {
                        self.lost.remove(&in_room);
                        continue;
                    }
                    // A removed key can be told to no client of `/sync`.
                    let is_removed = self.is_forked && !server.contains_key(key);
                    let is_loser = self.is_forked && !self.way.is_after() && shown.contains_key(key);
                    if is_loser {
                        self.lost.insert(in_room.clone());
                    }
                    if !is_removed && !self.lost.contains(&in_room) {
                        wrong.push((key, known.get(key), server.get(key)));
                    }
                }
                assert!(
                    wrong.is_empty(),
                    "{moment}: {:?} of {} in {section}: client and server differ in {wrong:?}: {news:#}",
                    self.way,
                    self.chain.client.user_id
                );
            }
        }
        self.note_stays().await;
    }
}

/// The same server, stopped and started again.
pub(crate) async fn restarted(server: &TestServer) -> TestServer {
    server.server().stop().await.unwrap();
    server.killed(usize::MAX)
}

/// Requires that a request was done or refused for a reason that its sender must know.
fn settled((status, json): &(StatusCode, Value)) {
    // A room in which nobody of this server is left is entered by way of the other one, which is not there.
    let is_refused = [400, 403, 404, 502].contains(&status.as_u16()) && json["errcode"].is_string();
    assert!(*status == StatusCode::OK || is_refused, "{status}: {json}");
}

async fn put_state(client: &TestClient, room: &str, event_type: &str, key: &str, content: Value) {
    let path = format!("/_matrix/client/v3/rooms/{room}/state/{event_type}/{}", encoded(key));
    settled(&client.put(&path, content).await);
}

/// Somebody redacts a state event of now.
async fn redact_some(dice: &mut Dice, who: &TestClient, room: &str, number: usize) {
    let types = ["m.room.name", "m.room.topic", "org.example.thing", "m.room.member"];
    let mut state = state_of(who, room).await.unwrap_or_default();
    state.retain(|(event_type, _), _| types.contains(&event_type.as_str()));
    if let Some((event, _)) = state.values().nth(dice.below(state.len().max(1))) {
        let path = format!("/_matrix/client/v3/rooms/{room}/redact/{}/{number}", encoded(event));
        settled(&who.put(&path, json!({})).await);
    }
}

/// Somebody does something in the room. Requests may be refused, which is as good as anything else. Gives who it was.
pub(crate) async fn step(dice: &mut Dice, people: &[TestClient], room: &str, number: usize) -> String {
    let (who, whom) = (&people[dice.below(people.len())], &people[dice.below(people.len())]);
    let about = json!({ "user_id": whom.user_id });
    match dice.below(18) {
        0 | 1 => settled(&act(who, room, "join", json!({})).await),
        2 => settled(&act(who, room, "leave", json!({})).await),
        3 => settled(&act(&people[0], room, ["kick", "ban", "unban"][dice.below(3)], about).await),
        4 => settled(&act(who, room, "invite", about).await),
        5 => {
            let words = ["world_readable", "shared", "invited", "joined"];
            let content = json!({ "history_visibility": words[dice.below(4)] });
            put_state(&people[0], room, "m.room.history_visibility", "", content).await;
        }
        6 => put_state(who, room, "m.room.name", "", json!({ "name": number.to_string() })).await,
        7 | 8 => put_state(who, room, "m.room.topic", "", json!({ "topic": number.to_string() })).await,
        9 => {
            let key = dice.below(3).to_string();
            put_state(who, room, "org.example.thing", &key, json!({ "number": number })).await;
        }
        10 => {
            let content = json!({ "membership": "join", "displayname": number.to_string() });
            put_state(who, room, "m.room.member", &who.user_id, content).await;
        }
        11 => {
            let list = if dice.below(2) == 0 { json!({ &whom.user_id: {} }) } else { json!({}) };
            let path = format!("/_matrix/client/v3/user/{}/account_data/m.ignored_user_list", who.user_id);
            who.ok_put(&path, json!({ "ignored_users": list })).await;
        }
        12 | 13 => redact_some(dice, who, room, number).await,
        _ => {
            let path = format!("/_matrix/client/v3/rooms/{room}/send/m.room.message/{number}");
            settled(&who.put(&path, json!({ "msgtype": "m.text", "body": number.to_string() })).await);
        }
    }
    who.user_id.clone()
}

/// One random history. `is_forked`: a user of another server forks the rooms.
async fn run(seed: u64, steps: usize, is_forked: bool) {
    let mut server = TestServer::new();
    let mut dice = Dice(seed);
    let mut people = Vec::new();
    for name in ["alice", "bob", "carol", "dave"] {
        people.push(server.register(name).await);
    }
    let levels = json!({ "users_default": 50 });
    let mut rooms = Vec::new();
    for _ in 0..2 {
        let body = json!({ "preset": "public_chat", "power_level_content_override": levels });
        rooms.push(create_room(&people[0], body).await);
    }
    let mut forkers = Vec::new();
    for room in rooms.iter().filter(|_| is_forked) {
        forkers.push(Forker::join(&server, room).await);
    }
    let alice = people[0].user_id.clone();
    let mut listeners: Vec<Listener> = people
        .iter()
        .enumerate()
        .flat_map(|(at, client)| {
            // The server remembers for each device which members it was told of, so each device has one lazy client.
            let lazy = if at % 2 == 0 { Way::Lazy } else { Way::LazyStateAfter };
            let other = WAYS.into_iter().filter(|way| !way.is_lazy()).cycle().nth(seed as usize + at);
            [Some(lazy), other].into_iter().flatten().map(|way| Listener::new(client, way, &alice, is_forked))
        })
        .collect();
    for number in 0..steps {
        match dice.below(60) {
            0 => {
                server = restarted(&server).await;
                for client in &mut people {
                    client.server = server.clone();
                }
                for listener in &mut listeners {
                    listener.chain.client.server = server.clone();
                }
                forkers.iter_mut().for_each(|forker| forker.restarted(&server));
            }
            15..=30 if is_forked => {
                let at = dice.below(forkers.len());
                forkers[at].act(&mut dice, &people, number).await;
            }
            1..=14 => {
                let at = dice.below(listeners.len());
                listeners[at].sync(&format!("seed {seed} step {number}")).await;
            }
            _ => {
                let room = rooms[dice.below(rooms.len())].clone();
                let who = step(&mut dice, &people, &room, number).await;
                // Nobody but the user enters a room.
                for listener in listeners.iter_mut().filter(|listener| listener.chain.client.user_id == who) {
                    listener.note_stays().await;
                }
            }
        }
    }
    for listener in &mut listeners {
        listener.sync(&format!("seed {seed} end")).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_state_that_a_client_puts_together_is_the_state_of_the_server() {
    for seed in 0..6 {
        run(seed, 250, false).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_follows_the_state_wherever_resolution_leads_it() {
    for seed in 0..6 {
        run(seed, 250, true).await;
    }
}

#[tokio::test(start_paused = true)]
#[ignore = "takes minutes: for whoever changes what sync tells of state"]
async fn the_state_that_many_clients_put_together_is_the_state_of_the_server() {
    for seed in 100..400 {
        run(seed, 400, seed % 2 == 0).await;
    }
}
