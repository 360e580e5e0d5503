//! Room state over RocksDB: the figures of `docs/performance.md`, "Room state".
//!
//! `cargo bench --bench state` measures; `-- fork` or `-- history` measures one of the two parts. The history part
//! makes a room of 100,000 members with 1,000,000 changes first, and prints what they take on disk.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::unreachable,
    reason = "a benchmark that fails has nobody to tell but whoever runs it"
)]

use std::{collections::HashMap, hint::black_box, path::Path, sync::Arc, time::Duration};

use aqueduct::{
    ids::{EventNum, Order, Position, RoomNum, StateKeyNum},
    rooms::{
        graph,
        resolve::{self, Header, Source},
        state::{self, Ref, Val},
    },
    store::{Durability, Engine, Fault, LogEntry, Snapshot, Store, engine::Rocks},
};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use ruma::{
    EventId, MilliSecondsSinceUnixEpoch, OwnedEventId, OwnedRoomId, OwnedUserId, RoomId, RoomVersionId, UInt,
    UserId, events::TimelineEventType, room_version_rules::RoomVersionRules, state_res,
};
use serde_json::{json, value::RawValue};

const ROOM: RoomNum = RoomNum(1);

/// Whether this part is asked for: making it ready takes long.
fn is_wanted(part: &str) -> bool {
    let mut filters = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).peekable();
    filters.peek().is_none() || filters.any(|filter| filter.contains(part))
}

/// One flush writes a bounded part of what waits.
fn flush(store: &Store) {
    while store.queue_depth() > 0 {
        store.flush().unwrap();
    }
}

/// An event as the rules see it.
#[derive(Debug)]
struct Pdu {
    id: OwnedEventId,
    room_id: OwnedRoomId,
    sender: OwnedUserId,
    ts: u32,
    kind: TimelineEventType,
    state_key: String,
    content: Box<RawValue>,
    auth: Vec<OwnedEventId>,
    header: Header,
}

impl state_res::Event for Pdu {
    type Id = OwnedEventId;
    fn event_id(&self) -> &OwnedEventId {
        &self.id
    }
    fn room_id(&self) -> Option<&RoomId> {
        Some(&self.room_id)
    }
    fn sender(&self) -> &UserId {
        &self.sender
    }
    fn origin_server_ts(&self) -> MilliSecondsSinceUnixEpoch {
        MilliSecondsSinceUnixEpoch(UInt::from(self.ts))
    }
    fn event_type(&self) -> &TimelineEventType {
        &self.kind
    }
    fn content(&self) -> &RawValue {
        &self.content
    }
    fn state_key(&self) -> Option<&str> {
        Some(&self.state_key)
    }
    fn prev_events(&self) -> Box<dyn DoubleEndedIterator<Item = &OwnedEventId> + '_> {
        Box::new(std::iter::empty())
    }
    fn auth_events(&self) -> Box<dyn DoubleEndedIterator<Item = &OwnedEventId> + '_> {
        Box::new(self.auth.iter())
    }
    fn redacts(&self) -> Option<&OwnedEventId> {
        None
    }
    fn rejected(&self) -> bool {
        false
    }
}

/// The room's events, in memory.
#[derive(Default)]
struct Events(HashMap<EventNum, Arc<Pdu>>);

impl Source for Events {
    type Event = Arc<Pdu>;
    fn find_header(&self, event: EventNum) -> Result<Option<Header>, Fault> {
        Ok(self.0.get(&event).map(|pdu| pdu.header.clone()))
    }
    fn find_event(&self, event: EventNum) -> Result<Option<Arc<Pdu>>, Fault> {
        Ok(self.0.get(&event).cloned())
    }
}

struct Room {
    store: Store,
    events: Events,
    next_key: u32,
    next_side: u32,
    /// What every event of a member names: create, power levels, join rules.
    ground: Vec<EventNum>,
}

fn user(number: u32) -> OwnedUserId {
    UserId::parse(format!("@user{number}:example.org")).unwrap()
}

impl Room {
    fn open(path: &Path) -> Self {
        let engine = Engine::Rocks(Rocks::open(path, 256 << 20).unwrap());
        let store = Store::open(engine, Durability::Os).unwrap();
        Self { store, events: Events::default(), next_key: 0, next_side: 0, ground: Vec::new() }
    }

    fn flush(&self) {
        flush(&self.store);
    }

    fn compact(&self) {
        let Engine::Rocks(rocks) = self.store.engine() else { unreachable!() };
        rocks.compact().unwrap();
    }

    /// A state event on the main line, with its auth edges; in memory too when `is_kept`.
    fn event(
        &mut self,
        batch: &mut aqueduct::store::Batch,
        sender: u32,
        kind: &str,
        state_key: &str,
        content: &serde_json::Value,
        auth: Vec<EventNum>,
    ) -> (EventNum, StateKeyNum) {
        let event = EventNum(self.events.0.len() as u64);
        let key = state::intern_key(batch, ROOM, &mut self.next_key, kind, state_key).unwrap();
        graph::put_auth_edges(batch, ROOM, event, &auth);
        let depth = auth.iter().map(|auth| self.events.0[auth].header.auth_depth + 1).max().unwrap_or(0);
        let pdu = Pdu {
            id: EventId::parse(format!("${:043}", event.0)).unwrap(),
            room_id: RoomId::parse("!room:example.org").unwrap(),
            sender: user(sender),
            ts: event.0 as u32,
            kind: TimelineEventType::from(kind),
            state_key: state_key.to_owned(),
            content: serde_json::value::to_raw_value(content).unwrap(),
            auth: auth.iter().map(|auth| self.events.0[auth].id.clone()).collect(),
            header: Header { key, auth_depth: depth, auth },
        };
        self.events.0.insert(event, Arc::new(pdu));
        (event, key)
    }

    fn on_main(
        &mut self,
        sender: u32,
        kind: &str,
        state_key: &str,
        content: &serde_json::Value,
        auth: Vec<EventNum>,
    ) -> EventNum {
        let mut batch = self.store.batch();
        let (event, key) = self.event(&mut batch, sender, kind, state_key, content, auth);
        let order = Order::live(batch.position(&LogEntry::Event { room: ROOM, event }));
        state::apply(&mut batch, ROOM, order, &[(key, Val::Event(event))]).unwrap();
        drop(self.store.enqueue(batch).unwrap());
        if event.0 % 500 == 0 {
            self.flush();
        }
        event
    }

    /// A public room of this many members.
    fn fill(&mut self, members: u32) -> Vec<EventNum> {
        let create = self.on_main(0, "m.room.create", "", &json!({"room_version": "11"}), vec![]);
        let join = json!({"membership": "join"});
        let creator = self.on_main(0, "m.room.member", user(0).as_str(), &join, vec![create]);
        let levels = json!({"users": {user(0).as_str(): 100}, "events": {"org.example.thing": 0}});
        let levels = self.on_main(0, "m.room.power_levels", "", &levels, vec![create, creator]);
        let rules = json!({"join_rule": "public"});
        let rules = self.on_main(0, "m.room.join_rules", "", &rules, vec![create, levels, creator]);
        self.ground = vec![create, levels, rules];
        let mut joined = vec![creator];
        for number in 1..members {
            joined.push(self.on_main(
                number,
                "m.room.member",
                user(number).as_str(),
                &join,
                self.ground.clone(),
            ));
        }
        self.flush();
        joined
    }
}

fn rules() -> RoomVersionRules {
    RoomVersionId::V11.rules().unwrap()
}

/// Two branches that set the same ten keys: five profiles and five things.
fn fork(room: &mut Room, joined: &[EventNum]) -> [Ref; 2] {
    let base = state::tip(&room.store.view(), ROOM).unwrap();
    let mut branches = Vec::new();
    for branch in ["left", "right"] {
        let mut batch = room.store.batch();
        let mut changes = Vec::new();
        for number in 1..6_u32 {
            let profile = json!({"membership": "join", "displayname": branch});
            let member = joined[number as usize];
            let mut auth = room.ground.clone();
            auth.push(member);
            let (event, key) = room.event(
                &mut batch,
                number,
                "m.room.member",
                user(number).as_str(),
                &profile,
                auth.clone(),
            );
            changes.push((key, Val::Event(event)));
            let thing = json!({"branch": branch});
            let (event, key) =
                room.event(&mut batch, number, "org.example.thing", &number.to_string(), &thing, auth);
            changes.push((key, Val::Event(event)));
        }
        let mut next_side = room.next_side;
        branches.push(state::make_side(&mut batch, ROOM, &mut next_side, base, &changes).unwrap());
        room.next_side = next_side;
        drop(room.store.enqueue(batch).unwrap());
        room.flush();
    }
    [branches[0], branches[1]]
}

fn forks(c: &mut Criterion) {
    if !is_wanted("fork") {
        return;
    }
    let mut group = c.benchmark_group("fork");
    for members in [100_u32, 100_000] {
        let dir = tempfile::tempdir().unwrap();
        let mut room = Room::open(dir.path());
        let joined = room.fill(members);
        let branches = fork(&mut room, &joined);
        room.compact();
        let (snapshot, rules) = (room.store.snapshot(), rules());
        let resolved = resolve::resolve(&*snapshot, ROOM, &rules, &branches, &room.events).unwrap();
        assert!(resolved.changes.len() <= 10, "{resolved:?}");
        group.bench_function(BenchmarkId::new("resolve ten conflicting keys", members), |b| {
            b.iter(|| {
                black_box(resolve::resolve(&*snapshot, ROOM, &rules, &branches, &room.events).unwrap());
            });
        });
        if members > 10_000 {
            // What a message that cites an old event makes of the heads.
            let mut rows = state::changes(&*snapshot, ROOM, Order::MIN, Order::MAX).unwrap();
            let (old, _) = rows.nth(members as usize - 10_000).unwrap().unwrap();
            let states = [Ref::Main(old), state::tip(&*snapshot, ROOM).unwrap()];
            group.sample_size(10);
            group.bench_function("resolve with a state 10,000 changes back", |b| {
                b.iter(|| {
                    black_box(resolve::resolve(&*snapshot, ROOM, &rules, &states, &room.events).unwrap());
                });
            });
        }
    }
    group.finish();
}

const MEMBERS: u32 = 100_000;
const CHANGES: u32 = 1_000_000;

/// Numbers that look random and are the same every time.
fn mixed(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

/// A room of 100,000 members: each joined, then changed something about 9 times, in random order. Each change is a
/// member event with the auth edges that such an event has: create, power levels, join rules, the member before.
fn history(store: &Store) -> Vec<Order> {
    let (mut next_key, mut next_event, mut orders) = (0, 0_u64, Vec::new());
    let mut last: Vec<EventNum> = Vec::new();
    let mut keys: Vec<StateKeyNum> = Vec::new();
    let mut done = 0;
    while done < CHANGES {
        let mut batch = store.batch();
        let mut pending = Vec::new();
        for _ in 0..400 {
            let event = EventNum(next_event);
            // Messages lie between the changes: their numbers and positions are not used here.
            next_event += 1 + mixed(next_event) % 4;
            let number = if done < MEMBERS {
                done as usize
            } else {
                (mixed(done.into()) % u64::from(MEMBERS)) as usize
            };
            let mut auth = vec![EventNum(0), EventNum(2), EventNum(3)];
            if number == keys.len() {
                let name = format!("@user{number}:example.org");
                keys.push(
                    state::intern_key(&mut batch, ROOM, &mut next_key, "m.room.member", &name).unwrap(),
                );
                last.push(event);
            } else {
                auth.push(last[number]);
                last[number] = event;
            }
            graph::put_auth_edges(&mut batch, ROOM, event, &auth);
            let order = Order::live(batch.position(&LogEntry::Event { room: ROOM, event }));
            state::apply(&mut batch, ROOM, order, &[(keys[number], Val::Event(event))]).unwrap();
            pending.push(order);
            done += 1;
        }
        let base = store.enqueue(batch).unwrap().base;
        flush(store);
        orders.extend(pending.into_iter().map(|order| order.settle(base)));
    }
    orders
}

fn disk_bytes(path: &Path) -> u64 {
    let files = std::fs::read_dir(path).unwrap().map(|file| file.unwrap());
    let tables = files.filter(|file| file.path().extension().is_some_and(|it| it == "sst"));
    tables.map(|file| file.metadata().unwrap().len()).sum()
}

fn listed(snapshot: &Snapshot) -> usize {
    state::list_current(snapshot, ROOM).unwrap().map(Result::unwrap).count()
}

fn histories(c: &mut Criterion) {
    if !is_wanted("history") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let room = Room::open(dir.path());
    let orders = history(&room.store);
    room.compact();
    println!("on disk after compaction: {} bytes, log and state keys included", disk_bytes(dir.path()));
    for (table, bytes) in table_bytes(&room.store) {
        let each = bytes as f64 / f64::from(CHANGES);
        println!("  {table}: {bytes} bytes, {each:.1} a change");
    }
    let plain_dir = tempfile::tempdir().unwrap();
    let mut plain = Room::open(plain_dir.path());
    plain.fill(MEMBERS);
    plain.compact();
    let (snapshot, without_history) = (room.store.snapshot(), plain.store.snapshot());
    let middle = orders[orders.len() / 2];

    let mut group = c.benchmark_group("history");
    group.sample_size(10).measurement_time(Duration::from_secs(5));
    let mut number = 0_u64;
    group.bench_function("one key at a position", |b| {
        b.iter(|| {
            number += 1;
            let order = orders[(mixed(number) % orders.len() as u64) as usize];
            let key = StateKeyNum((mixed(number + 1) % u64::from(MEMBERS)) as u32);
            black_box(state::at(&*snapshot, ROOM, Ref::Main(order), key).unwrap());
        });
    });
    group.bench_function("list the current state", |b| b.iter(|| black_box(listed(&snapshot))));
    group.bench_function("list the current state of a room without history", |b| {
        b.iter(|| black_box(listed(&without_history)));
    });
    group.bench_function("full state at the middle", |b| {
        b.iter(|| {
            let full = state::full(&*snapshot, ROOM, Ref::Main(middle)).unwrap();
            black_box(full.map(Result::unwrap).count())
        });
    });
    group.bench_function("difference of two positions ten changes apart", |b| {
        b.iter(|| {
            number += 1;
            let at = (mixed(number) % (orders.len() as u64 - 10)) as usize;
            let (low, high) = (Ref::Main(orders[at]), Ref::Main(orders[at + 10]));
            black_box(state::diff(&*snapshot, ROOM, low, high).unwrap());
        });
    });
    let old = orders[orders.len() - 10_000];
    group.bench_function("difference of two positions 10,000 changes apart", |b| {
        b.iter(|| {
            black_box(
                state::diff(&*snapshot, ROOM, Ref::Main(old), Ref::Main(*orders.last().unwrap())).unwrap(),
            )
        });
    });
    group.finish();
    assert!(snapshot.batch_number() > 0 && Position::ZERO < orders[0].anchor);
}

/// What each table takes on disk, as the engine estimates it.
fn table_bytes(store: &Store) -> Vec<(&'static str, u64)> {
    let Engine::Rocks(rocks) = store.engine() else { unreachable!() };
    aqueduct::store::schema::ALL
        .iter()
        .map(|(id, name, family, _)| (*name, rocks.disk_bytes(*family, &[*id], &[*id + 1]).unwrap()))
        .filter(|(_, bytes)| *bytes > 0)
        .collect()
}

criterion_group!(benches, forks, histories);
criterion_main!(benches);
