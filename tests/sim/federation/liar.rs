//! A server that follows a script and lies: it joins rooms as any other, and then sends forged events, events on events that
//! do not exist, different events to different servers, and answers questions with events of other rooms and half of a state.

use std::{collections::BTreeMap, rc::Rc, sync::Arc};

use bytes::Bytes;
use federation::{
    keys::OwnKeys,
    testing::{key_pair, own_keys},
    xmatrix::{self, Signed},
};
use futures_util::FutureExt;
use http::{Method, Request, Response, StatusCode, header};
use parking_lot::Mutex;
use ruma::{
    CanonicalJsonObject, RoomVersionId, ServerName,
    room_version_rules::RoomVersionRules,
    signatures::{Ed25519KeyPair, hash_and_sign_event, reference_hash},
};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::{
    people::{People, Room},
    wire::{Reached, Wire, name},
    world::{SERVERS, World},
};

/// The place of the liar in the network.
const PLACE: usize = SERVERS;
/// The number of its signing key's seed.
const KEY: u8 = 99;
/// Whatever it forges has this text; nobody may ever be shown it.
pub(crate) const FORGED: &str = "forged by the liar";

/// A room that it is in.
#[derive(Clone, Debug)]
struct Entered {
    version: RoomVersionId,
    /// The ids of events that allow what it says: power levels, its own membership, and before version 12 the create event.
    auth: Vec<String>,
    /// The id of its join, on which its honest events stand.
    newest: String,
    depth: u64,
}

/// All that the liar knows.
#[derive(Default)]
struct Mind {
    entered: BTreeMap<String, Entered>,
    /// Events that it was given or has made, by room and id.
    seen: BTreeMap<String, BTreeMap<String, Value>>,
    count: u64,
}

/// The server that lies.
pub(crate) struct Liar {
    wire: Arc<Wire>,
    own: Arc<OwnKeys>,
    key: Ed25519KeyPair,
    mind: Arc<Mutex<Mind>>,
}

/// Puts the server into the network.
pub(crate) fn begin(world: &Rc<World>) -> Rc<Liar> {
    let server = name(PLACE);
    let liar = Rc::new(Liar {
        wire: world.wire.clone(),
        own: own_keys(&server, KEY, "k").unwrap(),
        key: key_pair(KEY, "k").unwrap(),
        mind: Arc::default(),
    });
    let (wire, own, mind, began_ms) =
        (world.wire.clone(), liar.own.clone(), liar.mind.clone(), world.now_ms());
    let script = Arc::new(move |_: usize, request: Request<Bytes>| {
        let answer = answer(&wire, &own, &mind, began_ms, &request);
        std::future::ready(answer).boxed()
    });
    world.wire.reach(PLACE, Some(Reached::Scripted(script)));
    liar
}

fn reply(status: StatusCode, body: &Value) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(body.to_string()));
    *response.status_mut() = status;
    response
}

/// Answers a question of another server, mostly with lies.
fn answer(
    wire: &Wire,
    own: &OwnKeys,
    mind: &Mutex<Mind>,
    began_ms: u64,
    request: &Request<Bytes>,
) -> Response<Bytes> {
    let path = request.uri().path();
    if path.starts_with("/_matrix/key/v2/server") {
        let now_ms = began_ms + wire.elapsed().as_millis() as u64;
        let mut response = Response::new(Bytes::from(own.document(now_ms).to_string()));
        *response.status_mut() = StatusCode::OK;
        return response;
    }
    if wire.is_calm() {
        // Otherwise others would go on for a day to judge what it said by whatever it says then.
        return reply(StatusCode::NOT_FOUND, &json!({ "errcode": "M_NOT_FOUND" }));
    }
    let mut mind = mind.lock();
    if path.contains("/federation/v1/send/") {
        let body: Value = serde_json::from_slice(request.body()).unwrap();
        for pdu in body["pdus"].as_array().into_iter().flatten() {
            learn(&mut mind, pdu);
        }
        return reply(StatusCode::OK, &json!({ "pdus": {} }));
    }
    let rooms: Vec<String> = mind.seen.keys().cloned().collect();
    let any_room = |wire: &Wire| rooms.get(wire.below(rooms.len().max(1) as u64) as usize).cloned();
    // A true room for some lies, any room for others.
    let asked = rooms.iter().find(|room| path.contains(room.as_str()) || path.contains(&encoded(room)));
    let room = if wire.happens(60) { asked.cloned() } else { any_room(wire) };
    let events: Vec<(String, Value)> =
        room.and_then(|room| mind.seen.get(&room).cloned()).into_iter().flatten().collect();
    let some: Vec<_> = events.iter().filter(|_| wire.happens(50)).collect();
    let pdus: Vec<_> = some.iter().map(|(_, pdu)| pdu).collect();
    let ids: Vec<_> = some.iter().map(|(event_id, _)| event_id).collect();
    wire.note(|| format!("the liar is asked {path}, and has {} events for it", some.len()));
    match () {
        () if wire.happens(20) => reply(StatusCode::NOT_FOUND, &json!({ "errcode": "M_NOT_FOUND" })),
        () if wire.happens(5) => reply(StatusCode::OK, &json!([["nonsense"], 1.5, { "pdus": 7 }])),
        () if path.contains("/state_ids/") => {
            reply(StatusCode::OK, &json!({ "pdu_ids": ids, "auth_chain_ids": ids }))
        }
        () if path.contains("/state/") => reply(StatusCode::OK, &json!({ "pdus": pdus, "auth_chain": pdus })),
        () if path.contains("/event_auth/") => reply(StatusCode::OK, &json!({ "auth_chain": pdus })),
        () if path.contains("/get_missing_events/") => reply(StatusCode::OK, &json!({ "events": pdus })),
        () if path.contains("/backfill/") || path.contains("/event/") => {
            let pdus = if path.contains("/event/") { &pdus[..pdus.len().min(1)] } else { &pdus[..] };
            let body = json!({ "origin": name(PLACE), "origin_server_ts": began_ms, "pdus": pdus });
            reply(StatusCode::OK, &body)
        }
        () => reply(StatusCode::NOT_FOUND, &json!({ "errcode": "M_UNRECOGNIZED" })),
    }
}

fn encoded(room: &str) -> String {
    room.replace('!', "%21").replace(':', "%3A")
}

/// Keeps an event that it was given, under its id by the version of its room.
fn learn(mind: &mut Mind, pdu: &Value) {
    let Some(room) = pdu["room_id"].as_str().map(str::to_owned) else { return };
    let Some(entered) = mind.entered.get(&room) else { return };
    if let Some(event_id) = id_of(pdu, &entered.version) {
        mind.seen.entry(room).or_default().insert(event_id, pdu.clone());
    }
}

fn rules(version: &RoomVersionId) -> RoomVersionRules {
    version.rules().unwrap()
}

fn id_of(pdu: &Value, version: &RoomVersionId) -> Option<String> {
    let object: CanonicalJsonObject = serde_json::from_value(pdu.clone()).ok()?;
    Some(format!("${}", reference_hash(&object, &rules(version)).ok()?))
}

impl Liar {
    fn user_id() -> String {
        format!("@mallory:{}", name(PLACE))
    }

    /// Has it lie in every second world while everybody lives, so that the others are looked at without lies.
    pub(crate) fn live(self: &Rc<Self>, world: &Rc<World>, people: &Rc<People>, tasks: &mut JoinSet<()>) {
        if !world.wire.happens(50) {
            return;
        }
        let (liar, world, people) = (self.clone(), world.clone(), people.clone());
        tasks.spawn_local(async move {
            world.wire.pause(6_000).await;
            while !world.is_ending() {
                world.wire.pause(1_500).await;
                let rooms = people.rooms.borrow().clone();
                let Some(room) = rooms.get(world.wire.below(rooms.len().max(1) as u64) as usize) else {
                    continue;
                };
                if liar.mind.lock().entered.contains_key(&room.id) {
                    liar.lie(&world, &people, room).await;
                } else {
                    liar.join(&world, room).await;
                }
            }
        });
    }

    /// Asks a server, with a signature.
    async fn ask(
        &self,
        to: usize,
        method: Method,
        uri: &str,
        body: Option<&Value>,
    ) -> Option<(StatusCode, Value)> {
        let text = body.map(Value::to_string).unwrap_or_default();
        let content = xmatrix::content(text.as_bytes()).unwrap();
        let signed = Signed { method: method.as_str(), uri, content: content.as_ref() };
        let server = name(to);
        let signature = xmatrix::sign(&self.own, <&ServerName>::try_from(server.as_str()).unwrap(), signed);
        let request = Request::builder()
            .method(method)
            .uri(uri)
            .header(header::AUTHORIZATION, signature.unwrap())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Bytes::from(text))
            .unwrap();
        let response = self.wire.post(PLACE, to, request).await?;
        Some((response.status(), serde_json::from_slice(response.body()).unwrap_or(Value::Null)))
    }

    fn sign(&self, event: &Value, version: &RoomVersionId) -> (String, Value) {
        let mut object: CanonicalJsonObject = serde_json::from_value(event.clone()).unwrap();
        hash_and_sign_event(&name(PLACE), &self.key, &mut object, &rules(version).redaction).unwrap();
        let event = serde_json::to_value(&object).unwrap();
        (id_of(&event, version).unwrap(), event)
    }

    /// Joins a room as an honest server would.
    async fn join(&self, world: &World, room: &Room) {
        let to = room.owner % SERVERS;
        let uri =
            format!("/_matrix/federation/v1/make_join/{}/{}?ver=10&ver=11&ver=12", room.id, Self::user_id());
        let Some((StatusCode::OK, made)) = self.ask(to, Method::GET, &uri, None).await else { return };
        let version = RoomVersionId::try_from(made["room_version"].as_str().unwrap()).unwrap();
        let mut event = made["event"].clone();
        event["origin_server_ts"] = world.now_ms().into();
        event.as_object_mut().unwrap().remove("event_id");
        event.as_object_mut().unwrap().remove("origin");
        let (event_id, event) = self.sign(&event, &version);
        let uri = format!("/_matrix/federation/v2/send_join/{}/{event_id}", room.id);
        let Some((StatusCode::OK, sent)) = self.ask(to, Method::PUT, &uri, Some(&event)).await else {
            return;
        };
        world.wire.note(|| format!("the liar has joined {}", room.id));
        let mut mind = self.mind.lock();
        let mut auth = vec![event_id.clone()];
        for kind in ["m.room.create", "m.room.power_levels"] {
            let is_implied = kind == "m.room.create" && version == RoomVersionId::V12;
            let found = sent["state"].as_array().unwrap().iter().find(|event| event["type"] == kind);
            auth.extend(found.filter(|_| !is_implied).and_then(|event| id_of(event, &version)));
        }
        let depth = event["depth"].as_u64().unwrap_or(1);
        mind.entered.insert(room.id.clone(), Entered { version, auth, newest: event_id, depth });
        learn(&mut mind, &event);
        for part in ["state", "auth_chain"] {
            for event in sent[part].as_array().into_iter().flatten() {
                learn(&mut mind, event);
            }
        }
    }

    /// Sends something to some of the servers: now and then something true.
    async fn lie(&self, world: &World, people: &People, room: &Room) {
        let Entered { version, auth, newest, depth } = self.mind.lock().entered[&room.id].clone();
        let count = {
            let mut mind = self.mind.lock();
            mind.count += 1;
            mind.count
        };
        let nowhere = format!("${count:A<42}A");
        let mut event = json!({
            "type": "m.room.message", "room_id": room.id, "sender": Self::user_id(),
            "content": { "msgtype": "m.text", "body": format!("{count} of the liar") },
            "origin_server_ts": world.now_ms(), "depth": depth + 1,
            "prev_events": [newest], "auth_events": auth,
        });
        let kind = world.wire.below(11);
        let forged = json!({ "msgtype": "m.text", "body": FORGED });
        match kind {
            // This one is the truth.
            0 | 1 => {}
            // One of the events that it stands on does not exist.
            2 | 3 => event["prev_events"] = json!([newest, nowhere]),
            4 => event["prev_events"] = json!([nowhere]),
            // It is said in the name of another.
            5 => {
                event["sender"] = people.persons[room.owner].user_id.clone().into();
                event["content"] = forged.clone();
            }
            // It may not do that.
            6 => {
                event["type"] = "m.room.power_levels".into();
                event["state_key"] = "".into();
                event["content"] = json!({ "users": { (Self::user_id()): 100 }, "body": FORGED });
            }
            // An event that allows it does not exist.
            7 => {
                event["auth_events"] = json!([nowhere]);
                event["content"] = forged.clone();
            }
            // It changes the state, on an old event.
            8 => {
                event["type"] = "m.room.topic".into();
                event["state_key"] = "".into();
                event["content"] = json!({ "topic": format!("{count} of the liar") });
            }
            9 => event["depth"] = 9_007_199_254_740_991_u64.into(),
            _ => event["prev_events"] = json!([]),
        }
        let (event_id, mut event) = self.sign(&event, &version);
        if kind == 10 {
            event["content"] = forged;
        }
        {
            let mut mind = self.mind.lock();
            learn(&mut mind, &event);
            if matches!(kind, 0 | 1 | 8) {
                let entered = mind.entered.get_mut(&room.id).unwrap();
                entered.newest = event_id.clone();
                entered.depth += 1;
            }
        }
        world.wire.note(|| format!("the liar tells {event_id} in {}, a lie of kind {kind}", room.id));
        world.counts.borrow_mut().lies += 1;
        let other = &people.persons[world.wire.below(people.persons.len() as u64) as usize];
        let body = json!({
            "origin": name(PLACE), "origin_server_ts": world.now_ms(), "pdus": [event],
            "edus": [
                { "edu_type": "m.typing", "content":
                    { "room_id": room.id, "user_id": other.user_id, "typing": true } },
                { "edu_type": "m.direct_to_device", "content": {
                    "sender": other.user_id, "type": "m.sim", "message_id": format!("lie{count}"),
                    "messages": { &other.user_id: { "*": { "number": 1_000_000 + count } } } } },
                { "edu_type": "m.receipt", "content": { &room.id: { "m.read": { &other.user_id:
                    { "event_ids": [nowhere], "data": { "ts": 1 } } } } } },
                { "edu_type": "m.presence", "content": { "push": [7] } },
            ],
        });
        for to in 0..SERVERS {
            if world.wire.happens(60) {
                let uri = format!("/_matrix/federation/v1/send/lie{count}");
                let answer = self.ask(to, Method::PUT, &uri, Some(&body)).await;
                world.wire.note(|| format!("s{to} answers the liar: {answer:?}"));
            }
        }
    }
}
