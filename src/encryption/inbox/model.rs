//! Inboxes against naive models: what a full one keeps, and that each message reaches its device exactly once and in order,
//! whatever crashes, is retried or lost on its way.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::{rule::SENDERS_PART, *};
use crate::{
    encryption::to_device,
    schema::encryption::SendProgress,
    store::{Durability, Engine, Guard, Store, engine::Memory},
};

const SMALL: Bounds = Bounds { messages: 12, bytes: 4_800 };
const OWNER: Owner = (UserNum(1), DeviceNum(1));

fn open(memory: Memory) -> Store {
    Store::open(Engine::Memory(memory), Durability::Fsync).unwrap()
}

fn message(number: u64, sender: u8, is_request: bool, size: usize) -> Message {
    let content = serde_json::json!({ "n": number, "b": "b".repeat(size) }).to_string();
    let content = RawValue::from_string(content).unwrap();
    let sender = UserId::parse(format!("@sender{sender}:s")).unwrap();
    Message::new(&sender, if is_request { "m.room_key_request" } else { "m.other" }, &content).unwrap()
}

fn number_of(json: &Bytes) -> u64 {
    serde_json::from_slice::<serde_json::Value>(json).unwrap()["content"]["n"].as_u64().unwrap()
}

fn enqueue(store: &Store, build: impl FnOnce(&mut Batch)) {
    let mut batch = store.batch(&Guard::alone());
    build(&mut batch);
    if batch.row_count() > 0 {
        drop(store.enqueue(batch).unwrap());
    }
}

/// A message as the naive inbox remembers it.
#[derive(Clone, Debug, PartialEq)]
struct Kept {
    number: u64,
    sender: u8,
    is_request: bool,
    bytes: u64,
}

/// Whether an inbox that holds these may take one more: it has to fit into the whole, and into its sender's part of what others
/// leave free.
fn takes(inbox: &[Kept], new: &Kept) -> bool {
    let count = |is_counted: &dyn Fn(&Kept) -> bool| {
        let counted = inbox.iter().filter(|kept| is_counted(kept));
        counted.fold((0, 0), |(messages, bytes), kept| (messages + 1, bytes + kept.bytes))
    };
    let (all, own) = (count(&|_| true), count(&|kept| kept.sender == new.sender));
    let free = (SMALL.messages - (all.0 - own.0), SMALL.bytes - (all.1 - own.1));
    all.0 < SMALL.messages
        && all.1 + new.bytes <= SMALL.bytes
        && own.0 < free.0.div_ceil(SENDERS_PART)
        && own.1 + new.bytes <= free.1.div_ceil(SENDERS_PART)
}

/// The rule of a full inbox, over a plain list.
fn naive_put(inbox: &mut Vec<Kept>, new: Kept) -> bool {
    let own: Vec<Kept> = inbox.iter().filter(|kept| kept.sender == new.sender).cloned().collect();
    if !takes(&own, &new) {
        return false;
    }
    let mut left = inbox.clone();
    while !takes(&left, &new) {
        let Some(oldest) = left.iter().position(|kept| kept.is_request) else { return false };
        left.remove(oldest);
    }
    left.push(new);
    *inbox = left;
    true
}

#[derive(Clone, Debug)]
enum Op {
    Put { sender: u8, is_request: bool, size: usize },
    Confirm { count: usize },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (0_u8..6, any::<bool>(), 0_usize..400)
            .prop_map(|(sender, is_request, size)| Op::Put { sender, is_request, size }),
        1 => (1_usize..8).prop_map(|count| Op::Confirm { count }),
    ]
}

fn compare(store: &Store, naive: &[Kept]) {
    let snapshot = store.snapshot();
    let waiting = list(&*snapshot, OWNER, Position::ZERO, Position::MAX, 100).unwrap();
    let numbers: Vec<u64> = waiting.iter().map(|(_, json)| number_of(json)).collect();
    assert_eq!(numbers, naive.iter().map(|kept| kept.number).collect::<Vec<_>>());
    let state = state(&*snapshot, OWNER).unwrap();
    assert_eq!(state.messages, naive.len() as u64);
    assert_eq!(state.bytes, naive.iter().map(|kept| kept.bytes).sum::<u64>());
    for sender in 0..6 {
        let own: Vec<_> = naive.iter().filter(|kept| kept.sender == sender).collect();
        let user_id = format!("@sender{sender}:s");
        let share = schema::INBOX_SHARE.get(&*snapshot, (OWNER.0, OWNER.1, &user_id)).unwrap();
        let expected = (!own.is_empty()).then(|| InboxShare {
            messages: own.len() as u64,
            bytes: own.iter().map(|kept| kept.bytes).sum(),
        });
        assert_eq!(share, expected, "{user_id}");
    }
    let requests = schema::INBOX_KEY_REQUEST.prefix::<Owner>(&*snapshot, OWNER, Direction::Up).unwrap();
    assert_eq!(requests.count(), naive.iter().filter(|kept| kept.is_request).count());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_full_inbox_keeps_what_the_rule_says(ops in prop::collection::vec(op(), 1..80)) {
        let store = open(Memory::default());
        let mut naive = Vec::new();
        for (number, op) in (0..).zip(ops) {
            match op {
                Op::Put { sender, is_request, size } => {
                    let message = message(number, sender, is_request, size);
                    let bytes = message.json.len() as u64;
                    let is_kept = naive_put(&mut naive, Kept { number, sender, is_request, bytes });
                    enqueue(&store, |batch| {
                        let put = put_within(batch, OWNER, &message, SMALL).unwrap();
                        assert_eq!(put.kept.is_ok(), is_kept);
                    });
                }
                Op::Confirm { count } => {
                    let waiting = list(&*store.snapshot(), OWNER, Position::ZERO, Position::MAX, count).unwrap();
                    if let Some((last, _)) = waiting.last() {
                        enqueue(&store, |batch| acknowledge(batch, OWNER, *last).unwrap());
                        naive.drain(..waiting.len());
                    }
                }
            }
            store.flush().unwrap();
            compare(&store, &naive);
        }
    }
}

/// An event in the life of requests and of the devices that they reach.
#[derive(Clone, Debug)]
enum Event {
    /// A client begins a request to these devices.
    Request { devices: Vec<bool> },
    /// One batch more of a request, by a first try or a retry.
    Step { request: prop::sample::Index },
    /// The store flushes, so that accepted batches become durable.
    Flush,
    /// The store crashes, and loses what was not durable.
    Crash,
    /// A device asks, and confirms what it had; the answer may be lost on its way.
    Sync { device: usize, is_lost: bool },
}

const DEVICES: usize = 3;

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => prop::collection::vec(any::<bool>(), DEVICES).prop_map(|devices| Event::Request { devices }),
        8 => any::<prop::sample::Index>().prop_map(|request| Event::Step { request }),
        3 => Just(Event::Flush),
        1 => Just(Event::Crash),
        4 => (0..DEVICES, any::<bool>()).prop_map(|(device, is_lost)| Event::Sync { device, is_lost }),
    ]
}

struct Receiver {
    since: Position,
    received: Vec<u64>,
}

struct World {
    store: Store,
    requests: Vec<Vec<bool>>,
    receivers: Vec<Receiver>,
}

const SENDER: Owner = (UserNum(9), DeviceNum(9));

fn owner(device: usize) -> Owner {
    (UserNum(1), DeviceNum(u32::try_from(device).unwrap() + 1))
}

impl World {
    /// One device of the request after those that were served, in a batch with how far it got. Whether anything was left to do.
    fn step(&self, request: usize) -> bool {
        let mut was_open = false;
        let txn_id = request.to_string();
        enqueue(&self.store, |batch| {
            let before = to_device::progress(batch, SENDER, "m.other", &txn_id).unwrap();
            if before.is_done {
                return;
            }
            was_open = true;
            let at = usize::try_from(before.targets).unwrap();
            if self.requests[request].get(at) == Some(&true) {
                let message = message(request as u64, 1, false, 10);
                put_within(batch, owner(at), &message, BOUNDS).unwrap().kept.unwrap();
            }
            let targets = before.targets + 1;
            let is_done = targets >= DEVICES as u64;
            let after = SendProgress { targets, is_done, ..SendProgress::default() };
            to_device::note_progress(batch, SENDER, "m.other", &txn_id, &after, 1).unwrap();
        });
        was_open
    }

    fn sync(&mut self, device: usize, is_lost: bool) -> bool {
        let receiver = &mut self.receivers[device];
        enqueue(&self.store, |batch| acknowledge(batch, owner(device), receiver.since).unwrap());
        let snapshot = self.store.snapshot();
        let told = list(&*snapshot, owner(device), receiver.since, snapshot.upto(), 2).unwrap();
        let Some((last, _)) = told.last() else { return false };
        if !is_lost {
            receiver.since = *last;
            receiver.received.extend(told.iter().map(|(_, json)| number_of(json)));
        }
        true
    }

    fn crash(&mut self) {
        let Engine::Memory(memory) = self.store.engine() else { unreachable!("the world is in memory") };
        self.store = open(memory.after_crash(0));
    }

    /// Clients retry until they have an answer, and devices ask until nothing waits.
    fn settle(&mut self) {
        self.store.flush().unwrap();
        for request in 0..self.requests.len() {
            while self.step(request) {
                self.store.flush().unwrap();
            }
        }
        for device in 0..DEVICES {
            while self.sync(device, false) {
                self.store.flush().unwrap();
            }
            self.store.flush().unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_message_reaches_its_device_once_and_in_order(events in prop::collection::vec(event(), 1..120)) {
        let receivers = (0..DEVICES).map(|_| Receiver { since: Position::ZERO, received: Vec::new() }).collect();
        let mut world = World { store: open(Memory::default()), requests: Vec::new(), receivers };
        let mut accepted: Vec<Vec<u64>> = vec![Vec::new(); DEVICES];
        for event in events {
            match event {
                Event::Request { devices } => world.requests.push(devices),
                Event::Step { request } if !world.requests.is_empty() => {
                    world.step(request.index(world.requests.len()));
                }
                Event::Step { .. } => {}
                Event::Flush => drop(world.store.flush().unwrap()),
                Event::Crash => world.crash(),
                Event::Sync { device, is_lost } => drop(world.sync(device, is_lost)),
            }
            // Messages that are durable for a device never change their order; new ones only come after them.
            for (device, seen) in accepted.iter_mut().enumerate() {
                let snapshot = world.store.snapshot();
                let waiting = list(&*snapshot, owner(device), Position::ZERO, snapshot.upto(), 1_000).unwrap();
                let new = waiting.iter().map(|(_, json)| number_of(json)).filter(|number| !seen.contains(number));
                let new: Vec<u64> = new.collect();
                seen.extend(new);
            }
        }
        world.settle();
        for (device, receiver) in world.receivers.iter().enumerate() {
            let sent: BTreeSet<u64> =
                (0..).zip(&world.requests).filter(|(_, to)| to[device]).map(|(number, _)| number).collect();
            let once: BTreeSet<u64> = receiver.received.iter().copied().collect();
            prop_assert_eq!(&once, &sent, "something is lost");
            prop_assert_eq!(receiver.received.len(), once.len(), "something is doubled");
            let early = &accepted[device];
            prop_assert_eq!(&receiver.received[..early.len()], &early[..], "the order is another one");
            prop_assert_eq!(state(&*world.store.snapshot(), owner(device)).unwrap().messages, 0);
        }
    }
}
