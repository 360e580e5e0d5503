//! Servers and counts of random histories with forks, compared with a count over whole maps.

use bytes::Bytes;
use proptest::prelude::*;
use ruma::RoomId;

use super::*;
use crate::{
    env::Env,
    ids::EventNum,
    metrics::Metrics,
    rooms::{
        Rooms,
        change::Change,
        event::{self, StoredEvent},
        resolve::Resolver,
    },
    schema::rooms::{EventHeader, EventRow},
    store::{Counting, Durability, Engine, Store, engine::Memory},
};

const ROOM: RoomNum = RoomNum(1);
const SERVERS: [&str; 3] = ["a.example", "b.example", "c.example"];

/// The membership of each user, by user id.
type Members = BTreeMap<String, Membership>;

struct Fixture {
    store: Store,
    rooms: Rooms,
    /// The states so far, each with the memberships in it.
    states: Vec<(StateRef, Members)>,
    events: u64,
}

fn user(number: usize) -> String {
    format!("@u{number}:{}", SERVERS[number % SERVERS.len()])
}

impl Fixture {
    fn new() -> Self {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Os).unwrap();
        let key = crate::rooms::build::tests::a_key();
        let resolver = Resolver::new(Env::simulated(1, 0), Metrics::new());
        let rooms = Rooms::open(&*store.snapshot(), "a.example".try_into().unwrap(), key, resolver).unwrap();
        let id = RoomId::parse("!room:a.example").unwrap();
        let seat = rooms.sit(ROOM);
        let mut change = Change::begin_room(&store, seat, ROOM, id, 11).unwrap();
        schema::ROOM.put(&mut change.batch, ROOM, &change.row);
        drop(change.enqueue(&store).unwrap());
        store.flush().unwrap();
        Self { store, rooms, states: vec![(StateRef::EMPTY, Members::new())], events: 0 }
    }

    fn change<T>(&mut self, work: impl FnOnce(&mut Change, &mut u64) -> T) -> (T, crate::ids::Position) {
        let seat = self.rooms.sit(ROOM);
        let mut change = Change::begin(&self.store, seat, ROOM).unwrap();
        let answer = work(&mut change, &mut self.events);
        schema::ROOM.put(&mut change.batch, ROOM, &change.row);
        let enqueued = change.enqueue(&self.store).unwrap();
        self.store.flush().unwrap();
        (answer, enqueued.base)
    }

    /// Gives each user's member event with this membership; the key is unset where there is none.
    fn values(
        change: &mut Change,
        events: &mut u64,
        moves: &[(usize, Option<Membership>)],
    ) -> Vec<(StateKeyNum, StateValue)> {
        let mut values = Vec::new();
        for (number, membership) in moves {
            let user_id = user(*number);
            let key = change.intern_key(MEMBER, &user_id).unwrap();
            let Some(membership) = membership else {
                values.push((key, StateValue::Absent));
                continue;
            };
            *events += 1;
            let json = serde_json::json!({
                "type": MEMBER, "sender": user_id, "state_key": user_id, "room_id": "!room:a.example",
                "content": { "membership": membership.as_str() }, "origin_server_ts": *events,
                "prev_events": [], "auth_events": [],
            });
            let json = Bytes::from(json.to_string());
            let (event, order) = change.next_place();
            let mut hash = [1; 32];
            hash[..8].copy_from_slice(&events.to_be_bytes());
            let header = EventHeader {
                event,
                key: hash.into(),
                sent_ms: *events,
                depth: 1,
                auth_depth: 0,
                state_key: Some(key),
                replaces: None,
                redacted_by: None,
                unseen: false,
                before: None,
                after: None,
                prev: Vec::new(),
                auth: Vec::new(),
                sent_by: None,
                let_in: false,
                rejected: false,
                expired: false,
                spans: event::locate(&json).unwrap_or_default(),
            };
            change.put(&StoredEvent { order, row: EventRow { header, json } }).unwrap();
            values.push((key, StateValue::Event(event)));
        }
        values
    }

    /// Takes a step of the main line.
    fn step(&mut self, moves: &[(usize, Option<Membership>)]) {
        let mut members = self.now();
        let (order, base) = self.change(|change, events| {
            let values = Self::values(change, events, moves);
            let (_, order) = change.next_place();
            change.set_state(order, &values, None).unwrap();
            order
        });
        apply(&mut members, moves);
        self.states.push((StateRef::Main(order.settle(base)), members));
    }

    /// Makes a side state that stands on one of the states.
    fn fork(&mut self, from: usize, moves: &[(usize, Option<Membership>)]) {
        let (base, mut members) = self.states[from % self.states.len()].clone();
        let (side, _) = self.change(|change, events| {
            let values = Self::values(change, events, moves);
            let Change { batch, row, .. } = change;
            state::make_side(batch, ROOM, &mut row.next_side, base, &values).unwrap()
        });
        apply(&mut members, moves);
        self.states.push((side, members));
    }

    /// Lets the main line go on from one of the states, as after a resolution.
    fn turn_to(&mut self, to: usize) {
        let (to, members) = self.states[to % self.states.len()].clone();
        let (order, base) = self.change(|change, _| {
            let tip = state::tip(&change.batch, ROOM).unwrap();
            let changes: Vec<_> = state::diff(&change.batch, ROOM, tip, to)
                .unwrap()
                .into_iter()
                .map(|(key, _, val)| (key, val))
                .collect();
            let (_, order) = change.next_place();
            change.set_state(order, &changes, None).unwrap();
            order
        });
        self.states.push((StateRef::Main(order.settle(base)), members));
    }

    fn now(&self) -> Members {
        let on_main = self.states.iter().rev().find(|(at, _)| matches!(at, StateRef::Main(_)));
        // The newest place on the main line is the highest, because a fork may have come back to a lower one.
        let highest =
            self.states.iter().filter(|(at, _)| matches!(at, StateRef::Main(_))).max_by_key(|(at, _)| *at);
        highest.or(on_main).unwrap().1.clone()
    }

    fn check(&self) {
        let snapshot = self.store.snapshot();
        for (at, members) in &self.states {
            let joined = members.iter().filter(|(_, membership)| **membership == Membership::Join);
            let joined: Vec<_> = joined.map(|(user, _)| event::server_of(user).unwrap().to_owned()).collect();
            let servers: BTreeSet<String> = joined.iter().cloned().collect();
            assert_eq!(
                list_servers_at(&*snapshot, ROOM, *at).unwrap(),
                Vec::from_iter(servers.clone()),
                "{at:?}"
            );
            for server in SERVERS.into_iter().chain(["never.example"]) {
                let found = was_server_joined(&*snapshot, ROOM, *at, server).unwrap();
                assert_eq!(found, servers.contains(server), "{at:?} {server}");
            }
            assert_eq!(count_joined_at(&*snapshot, ROOM, *at).unwrap(), joined.len() as u64, "{at:?}");
            // Derived keys are never listed among the state.
            let listed = state::full(&*snapshot, ROOM, *at).unwrap().map(Result::unwrap).count();
            assert_eq!(listed, members.len());
        }
        for (server, count) in SERVERS.iter().map(|server| {
            let now = self.now();
            let of = |user: &&String| event::server_of(user) == Some(*server);
            let joined =
                now.iter().filter(|(_, membership)| **membership == Membership::Join).map(|(user, _)| user);
            (*server, joined.filter(of).count() as u64)
        }) {
            let kept = members_of(&*snapshot, ROOM, server).unwrap();
            assert_eq!(kept, count);
        }
        // The key of a server changes only where its first member comes or its last one goes.
        let rows = schema::STATE_UNDO.prefix::<(RoomNum,)>(&*snapshot, (ROOM,), Direction::Up).unwrap();
        for row in rows {
            let ((_, key, order), prior) = row.unwrap();
            let (kind, _) = state::key_name(&*snapshot, ROOM, key).unwrap().unwrap();
            if kind == SERVER {
                let after = state::at(&*snapshot, ROOM, StateRef::Main(order), key).unwrap();
                assert_ne!(prior == StateValue::Absent, after == StateValue::Absent);
            }
        }
    }
}

fn apply(members: &mut Members, moves: &[(usize, Option<Membership>)]) {
    for (number, membership) in moves {
        match membership {
            Some(membership) => members.insert(user(*number), *membership),
            None => members.remove(&user(*number)),
        };
    }
}

#[derive(Clone, Debug)]
enum Deed {
    Step(Vec<(usize, Option<Membership>)>),
    Fork(usize, Vec<(usize, Option<Membership>)>),
    TurnTo(usize),
}

fn moves() -> impl Strategy<Value = Vec<(usize, Option<Membership>)>> {
    let membership = prop_oneof![
        4 => Just(Some(Membership::Join)),
        3 => Just(Some(Membership::Leave)),
        1 => Just(Some(Membership::Ban)),
        1 => Just(Some(Membership::Invite)),
        1 => Just(None),
    ];
    proptest::collection::btree_map(0_usize..8, membership, 1..4).prop_map(Vec::from_iter)
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        4 => moves().prop_map(Deed::Step),
        3 => (0_usize..64, moves()).prop_map(|(from, moves)| Deed::Fork(from, moves)),
        1 => (0_usize..64).prop_map(Deed::TurnTo),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn servers_and_counts_are_those_of_a_count_over_all_members(
        deeds in proptest::collection::vec(deed(), 1..40),
    ) {
        let mut fixture = Fixture::new();
        for deed in deeds {
            match deed {
                Deed::Step(moves) => fixture.step(&moves),
                Deed::Fork(from, moves) => fixture.fork(from, &moves),
                Deed::TurnTo(to) => fixture.turn_to(to),
            }
        }
        fixture.check();
    }
}

#[test]
fn the_servers_of_ten_thousand_members_are_one_scan_of_three_rows() {
    let mut fixture = Fixture::new();
    for first in (0..10_000).step_by(400) {
        let moves: Vec<_> = (first..first + 400).map(|number| (number, Some(Membership::Join))).collect();
        fixture.step(&moves);
    }
    let snapshot = fixture.store.snapshot();
    let read = Counting::new(&snapshot);
    let now = StateRef::Main(Order::MAX);
    assert_eq!(list_servers_at(&read, ROOM, now).unwrap(), SERVERS);
    // Three keys are read, and the value of each.
    assert!(read.rows() <= 3 + 3, "{}", read.rows());
    assert_eq!(count_joined_at(&read, ROOM, now).unwrap(), 10_000);
}

#[test]
fn the_servers_of_a_fork_cost_one_look_at_what_changed_since_however_many_servers_lost_somebody() {
    let mut fixture = Fixture::new();
    let joins: Vec<_> = (0..30).map(|number| (number, Some(Membership::Join))).collect();
    fixture.step(&joins);
    let from = fixture.states.len() - 1;
    for number in 0..50 {
        let membership = if number % 2 == 0 { Membership::Leave } else { Membership::Join };
        fixture.step(&[(3, Some(membership))]);
    }
    let mut costs = Vec::new();
    for leavers in [1, 3] {
        let moves: Vec<_> = (0..leavers).map(|number| (number, Some(Membership::Leave))).collect();
        fixture.fork(from, &moves);
        let side = fixture.states.last().unwrap().0;
        let snapshot = fixture.store.snapshot();
        let read = Counting::new(&snapshot);
        assert_eq!(list_servers_at(&read, ROOM, side).unwrap(), SERVERS);
        costs.push(read.rows());
    }
    assert!(costs[0] > 50 && costs[1] < costs[0] + 50, "{costs:?}");
}

#[test]
fn a_room_of_before_is_counted_when_its_members_next_change() {
    let mut fixture = Fixture::new();
    fixture.step(&[(0, Some(Membership::Join)), (1, Some(Membership::Join)), (3, Some(Membership::Join))]);
    // The room is made to look as it did before servers were counted.
    fixture.change(|change, _| {
        for server in SERVERS {
            schema::SERVER_MEMBERS.delete(&mut change.batch, (ROOM, server));
            let key = state::find_key(&change.batch, ROOM, SERVER, server).unwrap();
            if let Some(key) = key {
                schema::STATE_KEY_NUM.delete(&mut change.batch, (ROOM, SERVER, server));
                schema::STATE_NOW.delete(&mut change.batch, (ROOM, key));
            }
        }
        schema::STATE_KEY_NUM.delete(&mut change.batch, (ROOM, JOINED, ""));
    });
    fixture.step(&[(0, Some(Membership::Leave))]);
    let snapshot = fixture.store.snapshot();
    let servers = list_servers_at(&*snapshot, ROOM, StateRef::Main(Order::MAX)).unwrap();
    assert_eq!(servers, ["a.example", "b.example"]);
    assert_eq!(event::find(&*snapshot, ROOM, EventNum(0)).unwrap().unwrap().event(), EventNum(0));
}
