//! Random rooms that fork, whose events follow the rules, with the state after each event as ruma has it and as we do.

#[path = "../../../../tests/support/pdu.rs"]
mod pdu;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use proptest::prelude::*;
use ruma::{
    EventId, MilliSecondsSinceUnixEpoch, OwnedEventId, OwnedRoomId, OwnedUserId, RoomId, RoomVersionId, UInt,
    UserId,
    events::{StateEventType, TimelineEventType},
    state_res::{
        StateMap, auth_types_for_event, check_state_dependent_auth_rules, utils::event_id_set::EventIdSet,
    },
};
use serde_json::{json, value::RawValue};

pub(super) use pdu::Pdu;

use super::super::*;
use crate::{
    ids::Order,
    rooms::{event, graph, state::tests::Bench},
    schema,
    schema::rooms::{EventHash, EventHeader, EventKey, EventRow, Place},
    store::{Batch, Guard, LogEntry},
};

/// Resolves these states by our algorithm.
pub(super) fn solved(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    rules: &RoomVersionRules,
    states: &[StateRef],
    source: &impl Source,
) -> Result<Sketch, NotResolved> {
    let states: Vec<Sketch> = states.iter().map(|state| (*state).into()).collect();
    Ok(resolve(read, room, rules, &states, source, Bounds::of(EVENTS_MAX))?.state)
}

pub(super) type Map = StateMap<OwnedEventId>;

/// A room whose events follow the rules, with the state after each event: ruma's and ours.
pub(super) struct Forks {
    pub(super) bench: Bench,
    pub(super) version: u8,
    pub(super) rules: RoomVersionRules,
    pub(super) room_id: OwnedRoomId,
    pub(super) events: Vec<Arc<Pdu>>,
    pub(super) after: Vec<(Map, StateRef)>,
    pub(super) numbers: BTreeMap<OwnedEventId, usize>,
    pub(super) next_key: u32,
    pub(super) next_side: u32,
}

/// The room is itself the source: `events` has all of its events, by number.
impl Source for Forks {
    type Event = Arc<Pdu>;
    fn find_header(&self, event: EventNum) -> Result<Option<Header>, Fault> {
        Ok(self.events.get(event.0 as usize).map(|pdu| pdu.header.clone()))
    }
    fn find_event(&self, event: EventNum) -> Result<Option<Arc<Pdu>>, Fault> {
        Ok(self.events.get(event.0 as usize).cloned())
    }
}

/// An attempt of somebody to change the room; the numbers pick the act, the users, the value and the events it cites.
#[derive(Debug, Clone)]
pub(super) struct Try {
    what: u8,
    who: u8,
    whom: u8,
    value: u8,
    ts: u8,
    prevs: Vec<(bool, prop::sample::Index)>,
}

pub(super) fn tries(most: usize) -> impl Strategy<Value = Vec<Try>> {
    let prev = (prop::bool::weighted(0.85), any::<prop::sample::Index>());
    let prevs =
        prop_oneof![3 => prop::collection::vec(prev.clone(), 1), 1 => prop::collection::vec(prev, 2..4)];
    let one = (0_u8..16, 0_u8..USERS, 0_u8..USERS, any::<u8>(), 0_u8..40, prevs)
        .prop_map(|(what, who, whom, value, ts, prevs)| Try { what, who, whom, value, ts, prevs });
    prop::collection::vec(one, 1..most)
}

pub(super) const USERS: u8 = 5;

pub(super) fn user(number: u8) -> OwnedUserId {
    let name = ["alice", "bob", "carol", "dan", "eve"].get(usize::from(number)).copied();
    UserId::parse(format!("@{}:example.org", name.map_or(number.to_string(), str::to_owned))).unwrap()
}

/// Gives a hash, and so an id, that does not sort as the events do.
pub(super) fn hash(number: usize, salt: u8) -> EventHash {
    let mixed = (number as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ u64::from(salt);
    let mut hash = [7; 32];
    hash[..8].copy_from_slice(&mixed.to_be_bytes());
    hash
}

/// Gives the key of an event: its hash, or in version 2 an id that a server chose.
pub(super) fn key_of(version: u8, room: RoomNum, number: usize, salt: u8) -> EventKey {
    let key = EventKey::from(hash(number, salt));
    if !event::are_ids_chosen(version) {
        return key;
    }
    // The id that other versions write serves as the part before the server's name.
    let id = format!("{}:example.org", event::event_id(&key, 4));
    EventKey::Chosen(room, id.into())
}

/// Makes the row of an event as the timeline would hold it.
pub(super) fn stored(pdu: &Pdu, event: EventNum, key: EventKey, version: u8) -> EventRow {
    let cited = |ids: &[OwnedEventId]| -> serde_json::Value {
        let with_hash = event::are_ids_chosen(version);
        ids.iter().map(|id| if with_hash { json!([id, { "sha256": "x" }]) } else { json!(id) }).collect()
    };
    let mut json = json!({
        "type": pdu.kind, "state_key": pdu.state_key, "sender": pdu.sender, "content": pdu.content,
        "origin_server_ts": pdu.ts, "prev_events": cited(&pdu.prev), "auth_events": cited(&pdu.auth),
    });
    if let Some(room_id) = &pdu.room_id {
        json["room_id"] = json!(room_id);
    }
    let json: Bytes = serde_json::to_vec(&json).unwrap().into();
    let header = EventHeader {
        event,
        key,
        sent_ms: 0,
        depth: pdu.header.depth,
        auth_depth: pdu.header.auth_depth,
        state_key: Some(pdu.header.key),
        replaces: None,
        redacted_by: None,
        unseen: false,
        before: None,
        after: None,
        prev: Vec::new(),
        auth: pdu.header.auth.clone(),
        sent_by: None,
        let_in: false,
        rejected: false,
        expired: false,
        spans: event::locate(&json).unwrap(),
    };
    EventRow { header, json }
}

pub(super) fn raw(value: serde_json::Value) -> Box<RawValue> {
    serde_json::value::to_raw_value(&value).unwrap()
}

impl Forks {
    pub(super) fn new(version: &RoomVersionId) -> Self {
        let rules = version.rules().unwrap();
        let number: u8 = version.as_str().parse().unwrap();
        let bench = Bench::new();
        let create = event::event_id(&key_of(number, bench.room, 0, 0), number);
        // In version 3 an id may have characters that only an opaque room id allows.
        let room_id = RoomId::parse(format!("!{}", &create.as_str()[1..])).unwrap();
        let mut forks = Self {
            bench,
            version: number,
            rules,
            room_id,
            events: Vec::new(),
            after: Vec::new(),
            numbers: BTreeMap::new(),
            next_key: 0,
            next_side: 0,
        };
        let is_12 = forks.rules.authorization.explicitly_privilege_room_creators;
        let creator = if is_12 { json!({"room_version": "12"}) } else { json!({"creator": user(0)}) };
        forks.add(0, "m.room.create", "", creator, 0, &[]);
        forks.add(0, "m.room.member", user(0).as_str(), json!({"membership": "join"}), 1, &[0]);
        let mut users = json!({ user(1).as_str(): 50 });
        if !is_12 {
            users[user(0).as_str()] = json!(100);
        }
        let levels = json!({"users": users, "events": {"m.room.topic": 0}, "state_default": 50});
        forks.add(0, "m.room.power_levels", "", levels, 2, &[1]);
        forks.add(0, "m.room.join_rules", "", json!({"join_rule": "public"}), 3, &[2]);
        for joining in 1..3 {
            let last = forks.events.len() - 1;
            let joins = json!({"membership": "join"});
            forks.add(joining, "m.room.member", user(joining).as_str(), joins, 4, &[last]);
        }
        assert_eq!(forks.events.len(), 6, "everybody is allowed to begin");
        forks
    }

    fn depth_of(&self, prevs: &[usize]) -> u64 {
        1 + prevs.iter().map(|prev| self.events[*prev].header.depth).max().unwrap_or(0)
    }

    pub(super) fn room(&self) -> RoomNum {
        self.bench.room
    }

    pub(super) fn find(&self, id: &EventId) -> Option<Arc<Pdu>> {
        self.numbers.get(id).map(|number| self.events[*number].clone())
    }

    /// Resolves by ruma's algorithm, over whole states and chains.
    pub(super) fn oracle(&self, maps: &[Map]) -> Map {
        let chains = maps
            .iter()
            .map(|map| {
                let mut chain: EventIdSet<OwnedEventId> = EventIdSet::new();
                let mut open: Vec<OwnedEventId> = map.values().cloned().collect();
                while let Some(id) = open.pop() {
                    if chain.insert(id.clone()) {
                        open.extend(self.find(&id).unwrap().auth.clone());
                    }
                }
                chain
            })
            .collect();
        let state_res = self.rules.state_res.v2_rules().unwrap();
        state_res::resolve(
            &self.rules.authorization,
            state_res,
            maps.iter(),
            chains,
            |id| self.find(id),
            |conflicted| Some(self.naive_subgraph(&conflicted.values().flatten().cloned().collect())),
        )
        .unwrap()
    }

    pub(super) fn naive_subgraph(&self, conflicted: &BTreeSet<OwnedEventId>) -> EventIdSet<OwnedEventId> {
        let mut from: BTreeSet<&OwnedEventId> = conflicted.iter().collect();
        for pdu in self.events.iter().rev() {
            if from.contains(&pdu.id) {
                from.extend(&pdu.auth);
            }
        }
        let mut to = conflicted.clone();
        for pdu in &self.events {
            if pdu.auth.iter().any(|auth| to.contains(auth)) {
                to.insert(pdu.id.clone());
            }
        }
        to.iter().filter(|id| from.contains(id)).cloned().collect()
    }

    pub(super) fn both(&mut self, batch: &mut Batch, states: &[(Map, StateRef)]) -> (Map, StateRef) {
        let maps: Vec<Map> = states.iter().map(|(map, _)| map.clone()).collect();
        let refs: Vec<StateRef> = states.iter().map(|(_, state)| *state).collect();
        let expected = self.oracle(&maps);
        let resolution = solved(batch, self.room(), &self.rules, &refs, self).unwrap();
        let stored = StoredEvents::new(batch, self.room(), self.version);
        assert_eq!(solved(batch, self.room(), &self.rules, &refs, &stored).unwrap(), resolution);
        let made =
            state::make_side(batch, self.room(), &mut self.next_side, resolution.base, &resolution.changes);
        let made = made.unwrap();
        self.assert_same(batch, &expected, made);
        for change in &resolution.changes {
            let held = state::at(batch, self.room(), resolution.base, change.0).unwrap();
            assert_ne!(held, change.1, "a change that is none");
        }
        if maps.contains(&expected) {
            assert!(resolution.changes.is_empty(), "the result is one of the states");
        }
        (expected, made)
    }

    pub(super) fn assert_same(&self, batch: &Batch, expected: &Map, made: StateRef) {
        let ours: Map = state::full(batch, self.room(), made)
            .unwrap()
            .map(|row| {
                let (key, event) = row.unwrap();
                let (event_type, state_key) = state::key_name(batch, self.room(), key).unwrap().unwrap();
                ((StateEventType::from(event_type), state_key), self.events[event.0 as usize].id.clone())
            })
            .collect();
        let sorted = |map: &Map| -> BTreeMap<String, OwnedEventId> {
            map.iter().map(|((kind, key), id)| (format!("{kind} {key}"), id.clone())).collect()
        };
        assert_eq!(sorted(&ours), sorted(expected));
    }

    /// Adds an event if the state before it allows it.
    pub(super) fn add(
        &mut self,
        who: u8,
        kind: &str,
        state_key: &str,
        content: serde_json::Value,
        ts: u8,
        prevs: &[usize],
    ) {
        let room = self.room();
        let mut batch = self.bench.store.batch(&Guard::alone());
        let states: Vec<_> = prevs.iter().map(|prev| self.after[*prev].clone()).collect();
        let before = match states.as_slice() {
            [] => (Map::new(), StateRef::EMPTY),
            [one] => one.clone(),
            many => self.both(&mut batch, many),
        };
        let (sender, content) = (user(who), raw(content));
        let event_type = TimelineEventType::from(kind);
        let auth =
            auth_types_for_event(&event_type, &sender, Some(state_key), &content, &self.rules.authorization);
        let mut auth: Vec<OwnedEventId> =
            auth.unwrap().into_iter().filter_map(|key| before.0.get(&key).cloned()).collect();
        if self.rules.authorization.room_create_event_id_as_room_id {
            auth.retain(|id| *id != self.events[0].id);
        }
        let number = self.events.len();
        let auth_nums: Vec<_> = auth.iter().map(|id| EventNum(self.numbers[id] as u64)).collect();
        let depths = auth_nums.iter().map(|auth| self.events[auth.0 as usize].header.auth_depth + 1);
        let mut next_key = self.next_key;
        let key = state::intern_key(&mut batch, room, &mut next_key, kind, state_key).unwrap();
        let is_hashed = self.rules.authorization.room_create_event_id_as_room_id && number == 0;
        let pdu = Arc::new(Pdu {
            id: event::event_id(&key_of(self.version, room, number, ts), self.version),
            room_id: (!is_hashed).then(|| self.room_id.clone()),
            sender,
            ts: MilliSecondsSinceUnixEpoch(UInt::from(ts)),
            kind: event_type,
            state_key: state_key.to_owned(),
            content,
            prev: prevs.iter().map(|prev| self.events[*prev].id.clone()).collect(),
            header: Header {
                key,
                depth: self.depth_of(prevs),
                auth_depth: depths.max().unwrap_or(0),
                auth: auth_nums.clone(),
            },
            auth,
        });
        let verdict =
            check_state_dependent_auth_rules(&self.rules.authorization, &*pdu, |kind, state_key| {
                before.0.get(&(kind.clone(), state_key.to_owned())).and_then(|id| self.find(id))
            });
        if verdict.is_err() {
            return;
        }
        self.next_key = next_key;
        let event = EventNum(number as u64);
        graph::put_auth_edges(&mut batch, room, event, &auth_nums);
        let order = Order::live(batch.position(&LogEntry::Event { room, event }));
        schema::TIMELINE.put(
            &mut batch,
            (room, order),
            &stored(&pdu, event, key_of(self.version, room, number, ts), self.version),
        );
        schema::PLACE.put(&mut batch, (room, event), &Place::Timeline(order));
        let change = [(key, StateValue::Event(event))];
        // An event that continues the main line is on it; other branches are side states.
        let after = if before.1 == state::tip(&batch, room).unwrap() {
            state::apply(&mut batch, room, order, &change).unwrap();
            StateRef::Main(order)
        } else {
            state::make_side(&mut batch, room, &mut self.next_side, before.1, &change).unwrap()
        };
        let mut map = before.0;
        map.insert((StateEventType::from(kind), state_key.to_owned()), pdu.id.clone());
        self.numbers.insert(pdu.id.clone(), number);
        self.events.push(pdu);
        let base = self.bench.store.enqueue(batch).unwrap().base;
        self.bench.store.flush().unwrap();
        self.after.push((map, after.settle(base)));
    }

    pub(super) fn attempt(&mut self, attempt: &Try) {
        let count = self.events.len();
        let mut prevs: Vec<usize> = attempt
            .prevs
            .iter()
            // Most attempts cite the newest few events, so that branches grow; none comes before the room is set up.
            .map(|(is_recent, index)| {
                if *is_recent {
                    count - 1 - index.index(5.min(count - 5))
                } else {
                    5 + index.index(count - 5)
                }
            })
            .collect();
        prevs.sort_unstable();
        prevs.dedup();
        let (who, whom, value) = (attempt.who, user(attempt.whom), attempt.value);
        let member = |membership: &str| json!({"membership": membership, "displayname": value.to_string()});
        let (kind, state_key, content) = match attempt.what {
            0..3 => ("m.room.member", user(who), member("join")),
            3 => ("m.room.member", user(who), member("leave")),
            4 => ("m.room.member", whom, member("invite")),
            5 | 6 => ("m.room.member", whom, member("leave")),
            7 | 8 => ("m.room.member", whom, member("ban")),
            9 | 10 => {
                let mut users = serde_json::Map::new();
                let is_12 = self.rules.authorization.explicitly_privilege_room_creators;
                for (number, level) in
                    [100, 50, i64::from(value % 3) * 50, i64::from(value % 5) * 25].iter().enumerate()
                {
                    if !(is_12 && number == 0) {
                        users.insert(user(number as u8).to_string(), json!(level));
                    }
                }
                let topic = i64::from(value % 2) * 50;
                let content = json!({"users": users, "events": {"m.room.topic": topic}, "state_default": 50});
                return self.add(who, "m.room.power_levels", "", content, attempt.ts, &prevs);
            }
            11 => {
                let rule = if value % 2 == 0 { "public" } else { "invite" };
                return self.add(
                    who,
                    "m.room.join_rules",
                    "",
                    json!({"join_rule": rule}),
                    attempt.ts,
                    &prevs,
                );
            }
            12 | 13 => return self.add(who, "m.room.topic", "", json!({"topic": value}), attempt.ts, &prevs),
            _ => {
                let state_key = (value % 3).to_string();
                return self.add(
                    who,
                    "org.example.thing",
                    &state_key,
                    json!({"is": value}),
                    attempt.ts,
                    &prevs,
                );
            }
        };
        self.add(who, kind, state_key.as_str(), content, attempt.ts, &prevs);
    }

    /// Compares arbitrary states, some of them without some of their keys: states need not follow from a graph, and a
    /// key that no state has may come back from the auth difference.
    pub(super) fn compare(&mut self, which: &[(prop::sample::Index, u16)], gone_everywhere: u16) {
        let mut batch = self.bench.store.batch(&Guard::alone());
        let mut states = Vec::new();
        for (index, gone) in which {
            let (mut map, state) = index.get(&self.after).clone();
            let gone = (0..16).filter(|bit| (gone & (gone >> 3) | gone_everywhere) & (1 << bit) != 0);
            let mut changes = Vec::new();
            for key in gone.map(|bit| StateKeyNum(bit + 1)) {
                if let Some((kind, state_key)) = state::key_name(&batch, self.room(), key).unwrap() {
                    map.remove(&(StateEventType::from(kind), state_key));
                    changes.push((key, StateValue::Absent));
                }
            }
            let made =
                state::make_side(&mut batch, self.room(), &mut self.next_side, state, &changes).unwrap();
            states.push((map, made));
        }
        self.both(&mut batch, &states);
    }
}
