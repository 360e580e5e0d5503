//! Room state over RocksDB: the figures of `docs/performance.md`, "Room state".
//!
//! `cargo bench --bench state` measures; `-- fork`, `-- handling` or `-- history` measures one of the three parts. The
//! history part makes a room of 100,000 members with 1,000,000 changes first, and prints what they take on disk. With
//! `AQUEDUCT_BENCH_DIR=DIR` it is made there and used again by the next run.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::unreachable,
    clippy::disallowed_methods,
    reason = "a benchmark that fails has nobody to tell but whoever runs it, and it reads the clock"
)]
#![allow(dead_code, clippy::allow_attributes, reason = "each benchmark uses a part of the support")]

#[path = "../tests/support/pdu.rs"]
mod pdu;
#[path = "../tests/support/remote.rs"]
mod remote;
#[path = "support/fixture.rs"]
mod support;

use std::{
    collections::HashMap,
    hint::black_box,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use aqueduct::{
    ids::{EventNum, Order, Position, RoomNum, StateKeyNum},
    rooms::{
        self,
        change::Outcome,
        event, graph,
        resolve::{self, Header, Source},
        state::{self, Sketch, StateRef, StateValue},
    },
    schema,
    store::{Durability, Engine, Fault, Guard, LogEntry, Snapshot, Store, engine::Rocks},
};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use http::Method;
use pdu::Pdu;
use remote::Remote;
use ruma::{
    EventId, MilliSecondsSinceUnixEpoch, OwnedEventId, OwnedUserId, RoomId, RoomVersionId, UInt, UserId,
    events::TimelineEventType, room_version_rules::RoomVersionRules,
};
use serde_json::json;
use support::Fixture;
use tokio::{runtime::Runtime, task::JoinSet};

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
            room_id: Some(RoomId::parse("!room:example.org").unwrap()),
            sender: user(sender),
            ts: MilliSecondsSinceUnixEpoch(UInt::from(event.0 as u32)),
            kind: TimelineEventType::from(kind),
            state_key: state_key.to_owned(),
            content: serde_json::value::to_raw_value(content).unwrap(),
            prev: Vec::new(),
            auth: auth.iter().map(|auth| self.events.0[auth].id.clone()).collect(),
            header: Header { key, depth, auth_depth: depth, auth },
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
        let mut batch = self.store.batch(&Guard::alone());
        let (event, key) = self.event(&mut batch, sender, kind, state_key, content, auth);
        let order = Order::live(batch.position(&LogEntry::Event { room: ROOM, event }));
        state::apply(&mut batch, ROOM, order, &[(key, StateValue::Event(event))]).unwrap();
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
fn fork(room: &mut Room, joined: &[EventNum]) -> [StateRef; 2] {
    let base = state::tip(&room.store.view(), ROOM).unwrap();
    let mut branches = Vec::new();
    for branch in ["left", "right"] {
        let mut batch = room.store.batch(&Guard::alone());
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
            changes.push((key, StateValue::Event(event)));
            let thing = json!({"branch": branch});
            let (event, key) =
                room.event(&mut batch, number, "org.example.thing", &number.to_string(), &thing, auth);
            changes.push((key, StateValue::Event(event)));
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
        let solve = |states: &[StateRef]| {
            let states: Vec<Sketch> = states.iter().map(|state| (*state).into()).collect();
            resolve::resolve(
                &*snapshot,
                ROOM,
                &rules,
                &states,
                &room.events,
                resolve::Bounds::of(resolve::EVENTS_MAX),
            )
            .unwrap()
        };
        let resolved = solve(&branches);
        assert!(resolved.state.changes.len() <= 10, "{resolved:?}");
        group.bench_function(BenchmarkId::new("resolve ten conflicting keys", members), |b| {
            b.iter(|| black_box(solve(&branches)));
        });
        if members > 10_000 {
            // What a message that cites an old event makes of the heads.
            let mut rows = state::changes(&*snapshot, ROOM, Order::MIN, Order::MAX).unwrap();
            let (old, _) = rows.nth(members as usize - 10_000).unwrap().unwrap();
            let states = [StateRef::Main(old), state::tip(&*snapshot, ROOM).unwrap()];
            group.sample_size(10);
            group.bench_function("resolve with a state 10,000 changes back", |b| {
                b.iter(|| black_box(solve(&states)));
            });
        }
    }
    group.finish();
}

/// How far back the handled message stands, in state changes.
const FAR: usize = 10_000;
/// As many messages can be measured: each stands on another place.
const PLACES: usize = 2_000;

/// A message that cites an event 10,000 state changes back, from its coming in until it is durable: judged, resolved
/// beside the room, committed, and the heads merged.
fn handling(c: &mut Criterion) {
    if !is_wanted("handling") {
        return;
    }
    let (runtime, dir) = (Runtime::new().unwrap(), tempfile::tempdir().unwrap());
    let fixture = {
        let _context = runtime.enter();
        Fixture::open(dir.path(), Durability::Fsync)
    };
    let bob = runtime.block_on(async {
        let alice = fixture.register("alice").await;
        let room = fixture.make_room(&alice, "long").await;
        // Whoever is judged by an old state was in the room then.
        Remote::new(fixture.app(), &room).join().await;
        let mut tasks = JoinSet::new();
        for number in 0..FAR + PLACES {
            if tasks.len() >= 64 {
                tasks.join_next().await.unwrap().unwrap();
            }
            let (fixture, alice, room) = (fixture.clone(), alice.clone(), room.clone());
            tasks.spawn(async move {
                let path = format!("/_matrix/client/v3/rooms/{room}/state/org.example.thing/{number}");
                fixture.ask(Method::PUT, &path, Some(&alice), json!({})).await;
            });
        }
        while tasks.join_next().await.is_some() {}
        Remote::new(fixture.app(), &room)
    });
    let snapshot = fixture.app().store.snapshot();
    let row = rooms::require_row(&*snapshot, bob.room).unwrap();
    let changes = state::changes(&*snapshot, bob.room, Order::MIN, Order::MAX).unwrap();
    let places: Vec<OwnedEventId> = changes
        .map(|change| {
            let (order, _) = change.unwrap();
            let stored = schema::TIMELINE.get(&*snapshot, (bob.room, order)).unwrap().unwrap();
            event::event_id(&stored.header.key, row.version)
        })
        .collect();
    let newest = places.len() - FAR;
    let mut used = 0;
    let mut group = c.benchmark_group("handling");
    group.sample_size(10).measurement_time(Duration::from_secs(5));
    group.bench_function("a message 10,000 state changes back", |b| {
        b.iter_custom(|times| {
            let mut took = Duration::ZERO;
            for _ in 0..times {
                used += 1;
                assert!(used < PLACES, "there are no more places");
                let message = bob.message("from long ago", &places[newest - used..=newest - used]);
                let began = Instant::now();
                let outcome = runtime.block_on(bob.send(message));
                took += began.elapsed();
                assert!(matches!(outcome, Outcome::Accepted(_)), "{outcome:?}");
                assert_eq!(bob.heads().len(), 1);
            }
            took
        });
    });
    group.finish();
    runtime.block_on(fixture.close());
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
fn history(store: &Store) {
    let (mut next_key, mut next_event) = (0, 0_u64);
    let mut last: Vec<EventNum> = Vec::new();
    let mut keys: Vec<StateKeyNum> = Vec::new();
    let mut done = 0;
    while done < CHANGES {
        let mut batch = store.batch(&Guard::alone());
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
            state::apply(&mut batch, ROOM, order, &[(keys[number], StateValue::Event(event))]).unwrap();
            done += 1;
        }
        drop(store.enqueue(batch).unwrap());
        flush(store);
    }
}

/// Where the changes of the room stand.
fn list_orders(store: &Store) -> Vec<Order> {
    let snapshot = store.snapshot();
    let changes = state::changes(&*snapshot, ROOM, Order::MIN, Order::MAX).unwrap();
    changes.map(|change| change.unwrap().0).collect()
}

/// Where a large room is made: in a directory that vanishes, or in one that is kept for the next run.
struct Place {
    path: PathBuf,
    vanishes: Option<tempfile::TempDir>,
}

impl Place {
    fn of(name: &str) -> Self {
        match std::env::var_os("AQUEDUCT_BENCH_DIR") {
            Some(kept) => {
                let path = Path::new(&kept).join(name);
                if !path.join("made").exists() {
                    // What a run left that was stopped.
                    let _ = std::fs::remove_dir_all(&path);
                    std::fs::create_dir_all(&path).unwrap();
                }
                Self { path, vanishes: None }
            }
            None => {
                let dir = tempfile::tempdir().unwrap();
                Self { path: dir.path().to_owned(), vanishes: Some(dir) }
            }
        }
    }

    fn is_made(&self) -> bool {
        self.vanishes.is_none() && self.path.join("made").exists()
    }

    fn made(&self) {
        std::fs::write(self.path.join("made"), "").unwrap();
    }
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
    let place = Place::of("history");
    let room = Room::open(&place.path);
    if !place.is_made() {
        history(&room.store);
        room.compact();
        place.made();
    }
    let orders = list_orders(&room.store);
    println!("on disk after compaction: {} bytes, log and state keys included", disk_bytes(&place.path));
    for (table, bytes) in table_bytes(&room.store) {
        let each = bytes as f64 / f64::from(CHANGES);
        println!("  {table}: {bytes} bytes, {each:.1} a change");
    }
    let plain_place = Place::of("plain");
    let mut plain = Room::open(&plain_place.path);
    if !plain_place.is_made() {
        plain.fill(MEMBERS);
        plain.compact();
        plain_place.made();
    }
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
            black_box(state::at(&*snapshot, ROOM, StateRef::Main(order), key).unwrap());
        });
    });
    group.bench_function("list the current state", |b| b.iter(|| black_box(listed(&snapshot))));
    group.bench_function("list the current state of a room without history", |b| {
        b.iter(|| black_box(listed(&without_history)));
    });
    group.bench_function("full state at the middle", |b| {
        b.iter(|| {
            let full = state::full(&*snapshot, ROOM, StateRef::Main(middle)).unwrap();
            black_box(full.map(Result::unwrap).count())
        });
    });
    group.bench_function("difference of two positions ten changes apart", |b| {
        b.iter(|| {
            number += 1;
            let at = (mixed(number) % (orders.len() as u64 - 10)) as usize;
            let (low, high) = (StateRef::Main(orders[at]), StateRef::Main(orders[at + 10]));
            black_box(state::diff(&*snapshot, ROOM, low, high).unwrap());
        });
    });
    let old = orders[orders.len() - 10_000];
    group.bench_function("difference of two positions 10,000 changes apart", |b| {
        b.iter(|| {
            black_box(
                state::diff(&*snapshot, ROOM, StateRef::Main(old), StateRef::Main(*orders.last().unwrap()))
                    .unwrap(),
            )
        });
    });
    group.finish();
    assert!(snapshot.batch_number() > 0 && Position::ZERO < orders[0].anchor);
}

/// What each table takes on disk, as the engine estimates it.
fn table_bytes(store: &Store) -> Vec<(&'static str, u64)> {
    let Engine::Rocks(rocks) = store.engine() else { unreachable!() };
    aqueduct::schema::all()
        .map(|table| (table.name, rocks.disk_bytes(table.family, &[table.id], &[table.id + 1]).unwrap()))
        .filter(|(_, bytes)| *bytes > 0)
        .collect()
}

criterion_group!(benches, forks, handling, histories);
criterion_main!(benches);
