//! A room of ours as other servers have it: they go on in it while we hear nothing, and answer what they are asked of it.

use std::{collections::BTreeMap, sync::Arc};

use aqueduct::{
    flows::App,
    ids::RoomNum,
    rooms::{
        self, admit,
        build::{self, Draft, Setting, Signer},
        change::Received,
        event, reference, state,
    },
    schema::rooms::RoomRow,
};
use federation::testing::{Answered, Arrived, Net, json, key_pair, own_keys};
use parking_lot::Mutex;
use ruma::{OwnedEventId, OwnedUserId, RoomId};
use serde_json::{Value, json};

use super::BEGAN_MS;

/// A type and a state key.
pub(crate) type Key = (String, String);
type State = BTreeMap<Key, String>;

/// An event, as all servers that have it know it.
#[derive(Clone)]
pub(crate) struct Known {
    pub(crate) json: Value,
    pub(crate) prev: Vec<String>,
    pub(crate) auth: Vec<String>,
    pub(crate) depth: u64,
    pub(crate) before: State,
    pub(crate) after: State,
}

/// Changes an answer before it is given: the kind of the question, what it names, and the answer.
type Twist = Box<dyn Fn(&str, &str, (u16, Value)) -> (u16, Value) + Send>;

#[derive(Default)]
struct World {
    events: BTreeMap<String, Known>,
    twist: Option<Twist>,
}

/// The room, as the servers `b.example` and `c.example` have it.
#[derive(Clone)]
pub(crate) struct Elsewhere {
    world: Arc<Mutex<World>>,
    app: App,
    pub(crate) room: RoomNum,
    row: RoomRow,
    signers: BTreeMap<String, Signer>,
    pub(crate) heads: Vec<String>,
    clock_ms: u64,
}

impl Elsewhere {
    /// The room as it is here now, at servers of these names and addresses.
    pub(crate) fn new(net: &Net, app: &App, room_id: &str, servers: &[(&str, &str)]) -> Self {
        let snapshot = app.store.snapshot();
        let room_id = RoomId::parse(room_id).unwrap();
        let room = rooms::find_room(&*snapshot, &room_id).unwrap().unwrap();
        let row = rooms::require_row(&*snapshot, room).unwrap();
        let mut world = World::default();
        let mut now = State::new();
        let mut add = |num| {
            let stored = event::require(&*snapshot, room, num).unwrap();
            let json: Value = serde_json::from_slice(&stored.row.json).unwrap();
            let ids = |field: &str| -> Vec<String> {
                json[field].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()).collect()
            };
            let (prev, auth, depth) =
                (ids("prev_events"), ids("auth_events"), json["depth"].as_u64().unwrap());
            let (before, after) = (State::new(), State::new());
            let id = stored.id(&row).to_string();
            world.events.insert(id.clone(), Known { json, prev, auth, depth, before, after });
            id
        };
        for current in state::list_current(&*snapshot, room).unwrap() {
            let (key, num) = current.unwrap();
            let name = state::key_name(&*snapshot, room, key).unwrap().unwrap();
            now.insert(name, add(num));
        }
        let heads: Vec<String> = row.heads.iter().map(|head| add(head.event)).collect();
        for head in &heads {
            let known = world.events.get_mut(head).unwrap();
            (known.before, known.after) = (now.clone(), now.clone());
        }
        let world = Arc::new(Mutex::new(world));
        let mut signers = BTreeMap::from([("test.example".to_owned(), app.rooms.signer().clone())]);
        for (number, (name, address)) in servers.iter().enumerate() {
            let seed = 2 + number as u8;
            let key = Arc::new(key_pair(seed, "k").unwrap());
            signers.insert((*name).to_owned(), Signer::new((*name).try_into().unwrap(), key));
            let document = own_keys(name, seed, "k").unwrap().document(BEGAN_MS).to_string();
            let shared = Arc::clone(&world);
            net.host(name, &[*address]);
            net.serve(&format!("{address}:8448"), &[name], move |arrived| {
                let answer = answer(&mut shared.lock(), &document, &arrived);
                std::future::ready(answer)
            });
        }
        Self { world, app: app.clone(), room, row, signers, heads, clock_ms: app.env.now_ms() }
    }

    /// Has what the servers answer changed.
    pub(crate) fn twist(&self, twist: impl Fn(&str, &str, (u16, Value)) -> (u16, Value) + Send + 'static) {
        self.world.lock().twist = Some(Box::new(twist));
    }

    /// The next event happens after this time, in milliseconds since the epoch.
    pub(crate) fn set_clock(&mut self, now_ms: u64) {
        self.clock_ms = now_ms;
    }

    /// The servers answer truly again.
    pub(crate) fn untwist(&self) {
        self.world.lock().twist = None;
    }

    pub(crate) fn known(&self, id: &str) -> Known {
        self.world.lock().events[id].clone()
    }

    /// The servers lose an event.
    pub(crate) fn forget(&self, id: &str) -> Known {
        self.world.lock().events.remove(id).unwrap()
    }

    pub(crate) fn put(&self, id: &str, known: Known) {
        self.world.lock().events.insert(id.to_owned(), known);
    }

    /// A user does something on these events; the state before it is that after the first of them.
    pub(crate) fn add_on(
        &mut self,
        user: &str,
        kind: &str,
        key: Option<&str>,
        content: Value,
        prev: &[String],
    ) -> String {
        self.add_naming((user, kind, key), content, prev, &[])
    }

    /// The same, which names these besides among the events that allow it.
    pub(crate) fn add_naming(
        &mut self,
        (user, kind, key): (&str, &str, Option<&str>),
        content: Value,
        prev: &[String],
        allowing: &[&str],
    ) -> String {
        let before = self.known(&prev[0]).after;
        self.clock_ms += 1;
        let sender: OwnedUserId = user.try_into().unwrap();
        let content = serde_json::from_value(content).unwrap();
        let mut draft = Draft::state(sender.clone(), kind, key.unwrap_or_default(), content, self.clock_ms);
        draft.state_key = key.map(str::to_owned);
        let rules = rooms::rules(&self.row).unwrap();
        let raw = draft.raw_content().unwrap();
        let needed = admit::needed_keys(&kind.into(), &sender, key, &raw, &rules.authorization).unwrap();
        let implied =
            |kind: &str| kind == "m.room.create" && rules.authorization.room_create_event_id_as_room_id;
        let auth: Vec<OwnedEventId> = needed
            .into_iter()
            .filter(|(kind, _)| !implied(&kind.to_string()))
            .filter_map(|(kind, key)| before.get(&(kind.to_string(), key)))
            .map(String::as_str)
            .chain(allowing.iter().copied())
            .map(|id| id.try_into().unwrap())
            .collect();
        let cited: Vec<OwnedEventId> = prev.iter().map(|id| id.as_str().try_into().unwrap()).collect();
        let depth = prev.iter().map(|id| self.known(id).depth).max().unwrap() + 1;
        let setting = Setting {
            room_id: Some(&self.row.id),
            rules,
            prev: &cited,
            auth: &auth,
            hashes: &super::some_hashes(&[&cited, &auth]),
            depth,
        };
        let signer = &self.signers[user.split_once(':').unwrap().1];
        let built = build::build(signer, &draft, &setting, self.row.version).unwrap();
        let id = built.event.id.to_string();
        let mut after = before.clone();
        if let Some(key) = key {
            after.insert((kind.to_owned(), key.to_owned()), id.clone());
        }
        let json = serde_json::from_slice(&built.json).unwrap();
        let auth = auth.iter().map(ToString::to_string).collect();
        self.put(&id, Known { json, prev: prev.to_vec(), auth, depth, before, after });
        id
    }

    /// A user does something on the newest events.
    pub(crate) fn add(&mut self, user: &str, kind: &str, key: Option<&str>, content: Value) -> String {
        let heads = self.heads.clone();
        let id = self.add_on(user, kind, key, content, &heads);
        self.heads = vec![id.clone()];
        id
    }

    pub(crate) fn say(&mut self, user: &str, text: &str) -> String {
        self.add(user, "m.room.message", None, json!({ "msgtype": "m.text", "body": text }))
    }

    pub(crate) fn join(&mut self, user: &str) -> String {
        self.add(user, "m.room.member", Some(user), json!({ "membership": "join" }))
    }

    /// An event as it comes in a transaction; its signatures are not checked here.
    pub(crate) fn received(&self, id: &str) -> Received {
        let json = self.known(id).json.to_string();
        let hash = reference::hash(json.as_bytes(), rooms::rules(&self.row).unwrap()).unwrap();
        Received::check(self.room, &self.row, hash, json.into()).unwrap()
    }

    pub(crate) fn app(&self) -> &App {
        &self.app
    }
}

fn answer(world: &mut World, document: &str, arrived: &Arrived) -> Answered {
    let uri = arrived.request.uri();
    let (path, query) = (decoded(uri.path()), decoded(uri.query().unwrap_or_default()));
    if path.starts_with("/_matrix/key/v2/server") {
        return json(200, document);
    }
    let Some(rest) = path.strip_prefix("/_matrix/federation/v1/") else { return json(404, "{}") };
    let (kind, rest) = rest.split_once('/').unwrap_or((rest, ""));
    let param = |name: &str| {
        let all = query.split('&').filter_map(move |pair| pair.split_once('='));
        all.filter(|(found, _)| *found == name).map(|(_, value)| value.to_owned()).collect::<Vec<_>>()
    };
    let body: Value = serde_json::from_slice(arrived.request.body()).unwrap_or_default();
    let unknown = || (404, json!({ "errcode": "M_NOT_FOUND", "error": "unknown" }));
    let pdu = |id: &str| world.events.get(id).map(|known| known.json.clone());
    let (named, mut given) = match kind {
        "get_missing_events" => {
            let list = |field: &str| -> Vec<String> {
                body[field].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()).collect()
            };
            let (mut seen, latest) = (list("earliest_events"), list("latest_events"));
            let mut open: std::collections::VecDeque<String> = latest.clone().into();
            let mut found = Vec::new();
            while let Some(id) = open.pop_front() {
                let Some(known) = world.events.get(&id) else { continue };
                for prev in &known.prev {
                    let limit = body["limit"].as_u64().unwrap_or(10).min(20) as usize;
                    if found.len() < limit && !seen.contains(prev) && world.events.contains_key(prev) {
                        seen.push(prev.clone());
                        found.insert(0, world.events[prev].json.clone());
                        open.push_back(prev.clone());
                    }
                }
            }
            (latest.join(","), (200, json!({ "events": found })))
        }
        "backfill" => {
            let mut open = std::collections::BinaryHeap::new();
            for id in param("v") {
                open.extend(world.events.get(&id).map(|known| (known.depth, id)));
            }
            let limit: usize = param("limit")[0].parse().unwrap();
            let (mut pdus, mut seen) = (Vec::new(), Vec::new());
            while let Some((_, id)) = open.pop() {
                if pdus.len() >= limit || seen.contains(&id) {
                    continue;
                }
                let known = &world.events[&id];
                pdus.push(known.json.clone());
                for prev in &known.prev {
                    open.extend(world.events.get(prev).map(|known| (known.depth, prev.clone())));
                }
                seen.push(id);
            }
            (
                param("v").join(","),
                (200, json!({ "origin": "b.example", "origin_server_ts": 1, "pdus": pdus })),
            )
        }
        "event" => match pdu(rest) {
            Some(pdu) => (
                rest.to_owned(),
                (200, json!({ "origin": "b.example", "origin_server_ts": 1, "pdus": [pdu] })),
            ),
            None => (rest.to_owned(), unknown()),
        },
        "event_auth" | "state_ids" | "state" => {
            let id = match kind {
                "event_auth" => rest.rsplit_once('/').unwrap().1.to_owned(),
                _ => param("event_id")[0].clone(),
            };
            match world.events.get(&id) {
                None => (id, unknown()),
                Some(known) => {
                    let state: Vec<String> = known.before.values().cloned().collect();
                    let of = if kind == "event_auth" { vec![id.clone()] } else { state.clone() };
                    let chain = chain(world, of);
                    let pdus = |ids: &[String]| ids.iter().filter_map(|id| pdu(id)).collect::<Vec<_>>();
                    let answer = match kind {
                        "event_auth" => json!({ "auth_chain": pdus(&chain) }),
                        "state_ids" => json!({ "pdu_ids": state, "auth_chain_ids": chain }),
                        _ => json!({ "pdus": pdus(&state), "auth_chain": pdus(&chain) }),
                    };
                    (id, (200, answer))
                }
            }
        }
        _ => (rest.to_owned(), unknown()),
    };
    if let Some(twist) = &world.twist {
        given = twist(kind, &named, given);
    }
    json(given.0, given.1.to_string())
}

/// The events that allow these, and those that allow them.
fn chain(world: &World, of: Vec<String>) -> Vec<String> {
    let (mut open, mut seen) = (of, Vec::new());
    while let Some(id) = open.pop() {
        let Some(known) = world.events.get(&id) else { continue };
        for auth in &known.auth {
            if !seen.contains(auth) {
                seen.push(auth.clone());
                open.push(auth.clone());
            }
        }
    }
    seen
}

fn decoded(text: &str) -> String {
    let mut bytes = text.bytes();
    let mut plain = Vec::new();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let digits = [bytes.next().unwrap(), bytes.next().unwrap()];
            let digits = std::str::from_utf8(&digits).unwrap().to_owned();
            plain.push(u8::from_str_radix(&digits, 16).unwrap());
        } else {
            plain.push(byte);
        }
    }
    String::from_utf8(plain).unwrap()
}
