//! A room of another server that exists as a script only: what the server answers may be changed by a test.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use aqueduct::rooms::{
    admit,
    build::{self, Draft, Setting, Signer},
    versions,
};
use federation::testing::{Answered, Net, json, key_pair, own_keys};
use ruma::{CanonicalJsonObject, OwnedEventId, OwnedRoomId, OwnedUserId};
use serde_json::{Value, json};

use super::{BEGAN_MS, some_hashes};

/// An event, with its id.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    pub(crate) id: OwnedEventId,
    pub(crate) json: Value,
}

/// A room of `a.example`, of which `@alice:a.example` is the only member, and its one server.
#[derive(Clone)]
pub(crate) struct Elsewhere {
    pub(crate) room_id: OwnedRoomId,
    pub(crate) version: u8,
    /// All events, oldest first.
    pub(crate) events: Vec<Made>,
    /// The current state of the room.
    pub(crate) state: BTreeMap<(String, String), Made>,
    pub(crate) signer: Signer,
    /// Whether the server leaves out members where it is asked to.
    pub(crate) omits: bool,
}

/// Changes an honest answer of the server: the first part is the name of the endpoint, as `make_join`.
pub(crate) type Tamper = Arc<dyn Fn(&str, Value) -> Answered + Send + Sync>;

/// The user who made the room.
pub(crate) const ALICE: &str = "@alice:a.example";

impl Elsewhere {
    /// A public room of this version.
    pub(crate) fn new(version: u8) -> Self {
        Self::of_id(version, "!room:a.example")
    }

    /// A public room of this version with this id, if versions before 12 have rooms of this id.
    pub(crate) fn of_id(version: u8, id: &str) -> Self {
        let signer = Signer::new("a.example".try_into().unwrap(), key_pair(9, "k").unwrap().into());
        let room_id: OwnedRoomId = id.try_into().unwrap();
        let (events, state, omits) = (Vec::new(), BTreeMap::new(), false);
        let mut room = Self { room_id, version, events, state, signer, omits };
        let mut create = json!({ "room_version": version.to_string() });
        if version < 11 {
            create["creator"] = json!(ALICE);
        }
        let create = room.add("m.room.create", Some(""), create);
        if version >= 12 {
            room.room_id = create.id.as_str().replacen('$', "!", 1).try_into().unwrap();
        }
        room.add("m.room.member", Some(ALICE), json!({ "membership": "join" }));
        let levels = if version < 12 { json!({ "users": { ALICE: 100 } }) } else { json!({}) };
        room.add("m.room.power_levels", Some(""), levels);
        room.add("m.room.join_rules", Some(""), json!({ "join_rule": "public" }));
        room.add("m.room.name", Some(""), json!({ "name": "Elsewhere" }));
        room
    }

    /// The same room under another id.
    pub(crate) fn with_id(&self, id: &str) -> Self {
        Self { room_id: id.try_into().unwrap(), ..self.clone() }
    }

    /// The ids of the state events that allow one like this.
    pub(crate) fn auth(
        &self,
        kind: &str,
        sender: &str,
        key: Option<&str>,
        content: &Value,
    ) -> Vec<OwnedEventId> {
        if kind == "m.room.create" {
            return Vec::new();
        }
        let rules = &versions::find_rules(self.version).unwrap().authorization;
        let sender: OwnedUserId = sender.try_into().unwrap();
        let raw = serde_json::value::to_raw_value(content).unwrap();
        let needed = admit::needed_keys(&kind.into(), &sender, key, &raw, rules).unwrap();
        let needed = needed.into_iter().map(|(kind, key)| (kind.to_string(), key));
        let is_implied = rules.room_create_event_id_as_room_id;
        let needed = needed.filter(|(kind, _)| !(is_implied && kind == "m.room.create"));
        needed.filter_map(|at| self.state.get(&at).map(|event| event.id.clone())).collect()
    }

    /// An event of a user of the server on the newest event, which is not added to the room.
    pub(crate) fn event(&self, sender: &str, kind: &str, key: Option<&str>, content: Value) -> Made {
        let auth = self.auth(kind, sender, key, &content);
        let content: CanonicalJsonObject = serde_json::from_value(content).unwrap();
        let mut draft = Draft::state(sender.try_into().unwrap(), kind, "", content, BEGAN_MS);
        draft.state_key = key.map(str::to_owned);
        let rules = versions::find_rules(self.version).unwrap();
        let prev: Vec<OwnedEventId> = self.events.last().map(|event| event.id.clone()).into_iter().collect();
        let is_hashed = kind == "m.room.create" && self.version >= 12;
        let room_id = (!is_hashed).then_some(&*self.room_id);
        let depth = self.events.len() as u64 + 1;
        let setting = Setting {
            room_id,
            rules,
            prev: &prev,
            auth: &auth,
            hashes: &some_hashes(&[&prev, &auth]),
            depth,
        };
        let built = build::build(&self.signer, &draft, &setting, self.version).unwrap();
        Made { id: built.event.id, json: serde_json::from_slice(&built.json).unwrap() }
    }

    /// Adds an event of Alice to the room.
    pub(crate) fn add(&mut self, kind: &str, key: Option<&str>, content: Value) -> Made {
        self.add_by(ALICE, kind, key, content)
    }

    /// Adds an event of a user of the server to the room.
    pub(crate) fn add_by(&mut self, sender: &str, kind: &str, key: Option<&str>, content: Value) -> Made {
        let event = self.event(sender, kind, key, content);
        self.events.push(event.clone());
        if let Some(key) = key {
            self.state.insert((kind.to_owned(), key.to_owned()), event.clone());
        }
        event
    }

    /// The honest answer to `make_join` and its like.
    pub(crate) fn template(&self, user: &str, membership: &str) -> Value {
        let content = json!({ "membership": membership });
        let auth = self.auth("m.room.member", user, Some(user), &content);
        let prev: Vec<_> = self.events.last().map(|event| event.id.clone()).into_iter().collect();
        let cited = |ids: Vec<OwnedEventId>| -> Vec<Value> {
            let with_hash = self.version < 3;
            ids.iter().map(|id| if with_hash { json!([id, { "sha256": "x" }]) } else { json!(id) }).collect()
        };
        json!({
            "room_version": self.version.to_string(),
            "event": {
                "type": "m.room.member", "sender": user, "state_key": user, "room_id": self.room_id, "origin": "a.example",
                "content": content, "auth_events": cited(auth), "prev_events": cited(prev), "depth": self.events.len() + 1,
                "origin_server_ts": BEGAN_MS,
            },
        })
    }

    /// The honest answer to `send_join`.
    pub(crate) fn answer(&self, event: &Value) -> Value {
        let state: Vec<_> = self.state.values().map(|event| &event.json).collect();
        json!({ "origin": "a.example", "members_omitted": false, "state": state, "auth_chain": state, "event": event })
    }

    /// The events that allow these, and those that allow them.
    fn chain(&self, of: &[&Value]) -> Vec<&Value> {
        self.list_chain(of).into_iter().map(|made| &made.json).collect()
    }

    fn list_chain(&self, of: &[&Value]) -> Vec<&Made> {
        let known: BTreeMap<&str, &Made> = self.events.iter().map(|made| (made.id.as_str(), made)).collect();
        let ids = |event: &Value| -> Vec<String> {
            let ids = event["auth_events"].as_array().into_iter().flatten();
            // In room versions 1 and 2 an id stands in a list with its hash.
            ids.filter_map(|id| id.as_str().or_else(|| id[0].as_str()).map(str::to_owned)).collect()
        };
        let mut open: Vec<String> = of.iter().flat_map(|event| ids(event)).collect();
        let (mut seen, mut chain) = (std::collections::BTreeSet::new(), Vec::new());
        while let Some(id) = open.pop() {
            let Some(made) = known.get(&*id).copied() else { continue };
            if seen.insert(id) {
                open.extend(ids(&made.json));
                chain.push(made);
            }
        }
        chain
    }

    /// The honest answer to `send_join` of a server that leaves out members.
    pub(crate) fn answer_without_members(&self, event: &Value) -> Value {
        let others = self.state.iter().filter(|((kind, _), _)| kind != "m.room.member");
        let state: Vec<&Value> = others.map(|(_, event)| &event.json).collect();
        let mut of = state.clone();
        of.push(event);
        let chain: Vec<_> = self.chain(&of).into_iter().filter(|event| !state.contains(event)).collect();
        json!({
            "origin": "a.example", "members_omitted": true, "servers_in_room": ["a.example"], "state": state,
            "auth_chain": chain, "event": event,
        })
    }

    /// The honest answer to `state_ids`, or to `state`: the state of now.
    fn state_answer(&self, is_whole: bool) -> Value {
        let state: Vec<&Value> = self.state.values().map(|event| &event.json).collect();
        let chain = self.chain(&state);
        if is_whole {
            return json!({ "pdus": state, "auth_chain": chain });
        }
        let state: Vec<_> = self.state.values().map(|made| &made.id).collect();
        let chain: Vec<_> = self.state.values().map(|made| &made.json).collect();
        let chain: Vec<_> = self.list_chain(&chain).into_iter().map(|made| &made.id).collect();
        json!({ "pdu_ids": state, "auth_chain_ids": chain })
    }

    /// Puts the server of the room into the network, at 5.9.0.1. Gives what it was asked: path and body.
    pub(crate) fn serve(&self, net: &Net, tamper: Tamper) -> Arc<Mutex<Vec<(String, Value)>>> {
        Self::serve_all(std::slice::from_ref(self), net, tamper)
    }

    /// Puts the server of these rooms into the network like [`Self::serve`]. What is asked of another room is answered as of the first.
    pub(crate) fn serve_all(rooms: &[Self], net: &Net, tamper: Tamper) -> Arc<Mutex<Vec<(String, Value)>>> {
        Self::serve_as(rooms, net, ("a.example", "5.9.0.1", 9), tamper)
    }

    /// Puts another server that has these rooms into the network, by its name, its address and the number of its key.
    pub(crate) fn serve_as(
        rooms: &[Self],
        net: &Net,
        (name, address, key): (&str, &str, u8),
        tamper: Tamper,
    ) -> Arc<Mutex<Vec<(String, Value)>>> {
        let own = own_keys(name, key, "k").unwrap();
        net.host(name, &[address]);
        let (rooms, asked) = (rooms.to_vec(), Arc::new(Mutex::new(Vec::new())));
        let notes = Arc::clone(&asked);
        net.serve(&format!("{address}:8448"), &[name], move |arrived| {
            let path = arrived.request.uri().path().to_owned();
            let body: Value = serde_json::from_slice(arrived.request.body()).unwrap_or(Value::Null);
            if path.starts_with("/_matrix/federation") {
                notes.lock().unwrap().push((path.clone(), body.clone()));
            }
            let parts: Vec<&str> = path.split('/').collect();
            let endpoint = parts.get(4).copied().unwrap_or_default();
            let room = parts.get(5).map(|room| room.replace("%21", "!").replace("%3A", ":"));
            let named = |it: &&Self| room.as_deref() == Some(it.room_id.as_str());
            let room = rooms.iter().find(named).unwrap_or(&rooms[0]);
            let user = parts.get(6).map(|user| user.replace("%40", "@").replace("%3A", ":"));
            let honest = match endpoint {
                "make_join" | "make_leave" | "make_knock" => {
                    Some(room.template(&user.unwrap_or_default(), &endpoint[5..]))
                }
                "send_join" if arrived.request.uri().query() == Some("omit_members=true") && room.omits => {
                    Some(room.answer_without_members(&body))
                }
                "send_join" => Some(room.answer(&body)),
                "state_ids" | "state" => Some(room.state_answer(endpoint == "state")),
                "event" | "event_auth" => {
                    let id = parts.last().copied().unwrap_or_default().replace("%24", "$");
                    let made = room.events.iter().find(|event| event.id == id);
                    made.map(|made| match endpoint {
                        "event" => {
                            json!({ "origin": "a.example", "origin_server_ts": 1, "pdus": [made.json] })
                        }
                        _ => json!({ "auth_chain": room.chain(&[&made.json]) }),
                    })
                }
                "send" => Some(json!({ "pdus": {} })),
                "send_leave" => Some(json!({})),
                "send_knock" => {
                    let state: Vec<_> = room.state.values().map(|event| &event.json).collect();
                    Some(json!({ "knock_room_state": state }))
                }
                _ => None,
            };
            let answer = match honest {
                Some(honest) => tamper(endpoint, honest),
                None if path == "/_matrix/key/v2/server" => json(200, own.document(BEGAN_MS).to_string()),
                None => json(404, r#"{"errcode":"M_UNRECOGNIZED","error":"?"}"#),
            };
            std::future::ready(answer)
        });
        asked
    }
}

/// Leaves answers as they are.
pub(crate) fn honest() -> Tamper {
    Arc::new(|_, answer| json(200, answer.to_string()))
}
