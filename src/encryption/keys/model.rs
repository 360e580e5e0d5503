//! One-time and fallback keys against a naive model: each one-time key is given exactly once, in the order of upload, and what
//! is said to be left is left, whatever is uploaded again, replaced or lost in a crash.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;

use super::*;
use crate::store::{Durability, Engine, Guard, Store, engine::Memory};

const OWNER: Owner = (UserNum(1), DeviceNum(1));

#[derive(Clone, Debug)]
enum Op {
    /// New keys of an algorithm; and those that were uploaded before, written otherwise: some are there, some were given.
    Upload { algorithm: usize, count: usize, again: bool },
    /// A fallback key: another one, or the same again.
    Fallback { algorithm: usize, is_new: bool },
    /// Somebody claims a key.
    Claim { algorithm: usize },
    /// The device has new identity keys, or says the old ones again.
    Identity { is_new: bool },
    /// The store is restored, so that what was not given may have been.
    Restore,
    /// The store flushes, so that accepted batches become durable.
    Flush,
    /// The store crashes, and loses what was not durable.
    Crash,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0_usize..2, 0_usize..5, any::<bool>())
            .prop_map(|(algorithm, count, again)| Op::Upload { algorithm, count, again }),
        2 => (0_usize..2, any::<bool>()).prop_map(|(algorithm, is_new)| Op::Fallback { algorithm, is_new }),
        10 => (0_usize..2).prop_map(|algorithm| Op::Claim { algorithm }),
        1 => any::<bool>().prop_map(|is_new| Op::Identity { is_new }),
        1 => Just(Op::Restore),
        4 => Just(Op::Flush),
        1 => Just(Op::Crash),
    ]
}

/// The keys that the store should have, in plain lists.
#[derive(Clone, Debug, Default)]
struct Naive {
    one_time: [VecDeque<u64>; 2],
    /// The keys that were claimed from this device.
    claimed: [Vec<u64>; 2],
    /// The number of the fallback key, and whether it was never given.
    fallback: [Option<(u64, bool)>; 2],
    identity: Option<u64>,
}

const ALGORITHMS: [&str; 2] = ["a", "b"];

fn raw(json: String) -> Box<RawValue> {
    RawValue::from_string(json).unwrap()
}

/// The same key, written in one way or another.
fn key(number: u64, is_other_writing: bool) -> Box<RawValue> {
    raw(if is_other_writing {
        format!(r#"{{"signatures": {{"@a:s": {{"x": "{number}"}}}}, "key": "k{number}"}}"#)
    } else {
        format!(r#"{{"key":"k{number}","signatures":{{}}}}"#)
    })
}

fn identity(number: u64, is_other_writing: bool) -> Box<RawValue> {
    raw(if is_other_writing {
        format!(r#"{{"unsigned": {{"n": 1}}, "keys": {{"ed25519:D": "{number}"}}}}"#)
    } else {
        format!(r#"{{"keys":{{"ed25519:D":"{number}"}}}}"#)
    })
}

struct World {
    store: Store,
    naive: Naive,
    durable: Naive,
    next: u64,
    /// Keys that somebody was told of, for good.
    given: BTreeSet<u64>,
    /// Keys that were claimed, and are told once that is durable.
    claimed: Vec<u64>,
}

impl World {
    fn enqueue<T>(&self, build: impl FnOnce(&mut Batch) -> T) -> T {
        let mut batch = self.store.batch(&Guard::alone());
        let answer = build(&mut batch);
        if batch.row_count() > 0 {
            drop(self.store.enqueue(batch).unwrap());
        }
        answer
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn upload(&mut self, algorithm: usize, count: usize, again: bool) {
        let mut keys = Keys::new();
        if again {
            for number in self.naive.one_time[algorithm].iter().chain(&self.naive.claimed[algorithm]) {
                keys.insert(format!("{}:{number:08}", ALGORITHMS[algorithm]), key(*number, true));
            }
        }
        for _ in 0..count {
            let number = self.number();
            keys.insert(format!("{}:{number:08}", ALGORITHMS[algorithm]), key(number, false));
            self.naive.one_time[algorithm].push_back(number);
        }
        self.enqueue(|batch| put_one_time_keys(batch, OWNER, &keys).unwrap());
    }

    fn put_fallback(&mut self, algorithm: usize, is_new: bool) {
        let number = match self.naive.fallback[algorithm] {
            Some((number, _)) if !is_new => number,
            _ => {
                let number = self.number();
                self.naive.fallback[algorithm] = Some((number, true));
                number
            }
        };
        let id = format!("{}:{number:08}", ALGORITHMS[algorithm]);
        let keys = Keys::from([(id, key(number, number % 2 == 0 && !is_new))]);
        self.enqueue(|batch| put_fallback_keys(batch, OWNER, &keys).unwrap());
    }

    fn claim(&mut self, algorithm: usize) {
        let given = self.enqueue(|batch| claim(batch, OWNER, ALGORITHMS[algorithm]).unwrap());
        let number = given.map(|(id, _)| id.split_once(':').unwrap().1.parse::<u64>().unwrap());
        if let Some(expected) = self.naive.one_time[algorithm].pop_front() {
            assert_eq!(number, Some(expected), "the key that was uploaded first is given first");
            assert!(!self.given.contains(&expected), "key {expected} is given again");
            self.claimed.push(expected);
            self.naive.claimed[algorithm].push(expected);
        } else {
            assert_eq!(number, self.naive.fallback[algorithm].map(|(number, _)| number));
            if let Some((_, is_unused)) = &mut self.naive.fallback[algorithm] {
                *is_unused = false;
            }
        }
    }

    fn put_identity(&mut self, is_new: bool) {
        let (number, is_change) = match self.naive.identity {
            Some(number) if !is_new => (number, false),
            before => {
                if before.is_some() {
                    // A key that was claimed stays so, whoever the device says that it is.
                    self.naive = Naive { claimed: self.naive.claimed.clone(), ..Naive::default() };
                }
                (self.number(), true)
            }
        };
        self.naive.identity = Some(number);
        let keys = identity(number, !is_change);
        assert_eq!(self.enqueue(|batch| put_device_keys(batch, OWNER, &keys).unwrap()), is_change);
    }

    fn restore(&mut self) {
        self.enqueue(|batch| treat_all_as_given(batch, OWNER).unwrap());
        for (claimed, one_time) in self.naive.claimed.iter_mut().zip(&mut self.naive.one_time) {
            claimed.extend(one_time.drain(..));
        }
        self.naive.fallback.iter_mut().flatten().for_each(|(_, is_unused)| *is_unused = false);
    }

    fn flush(&mut self) {
        self.store.flush().unwrap();
        self.durable = self.naive.clone();
        self.given.extend(self.claimed.drain(..));
    }

    fn crash(&mut self) {
        let Engine::Memory(memory) = self.store.engine() else { unreachable!("the world is in memory") };
        let memory = memory.after_crash(0);
        self.store = Store::open(Engine::Memory(memory), Durability::Fsync).unwrap();
        self.naive = self.durable.clone();
        self.claimed.clear();
    }

    fn compare(&self) {
        let counts = counts(&self.store.view(), OWNER).unwrap();
        let left: BTreeMap<&str, u64> = counts
            .one_time
            .iter()
            .filter(|(_, left)| **left > 0)
            .map(|(name, left)| (&**name, *left))
            .collect();
        let expected: BTreeMap<&str, u64> = ALGORITHMS
            .into_iter()
            .zip(&self.naive.one_time)
            .filter(|(_, keys)| !keys.is_empty())
            .map(|(name, keys)| (name, keys.len() as u64))
            .collect();
        assert_eq!(left, expected);
        let unused: BTreeSet<&str> = counts.unused_fallback.iter().map(|name| &**name).collect();
        let expected: BTreeSet<&str> = ALGORITHMS
            .into_iter()
            .zip(self.naive.fallback)
            .filter(|(_, fallback)| fallback.is_some_and(|(_, is_unused)| is_unused))
            .map(|(name, _)| name)
            .collect();
        assert_eq!(unused, expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn each_one_time_key_is_given_once(ops in prop::collection::vec(op(), 1..120)) {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let (naive, durable) = (Naive::default(), Naive::default());
        let (given, claimed) = (BTreeSet::new(), Vec::new());
        let mut world = World { store, naive, durable, next: 0, given, claimed };
        for op in ops {
            match op {
                Op::Upload { algorithm, count, again } => world.upload(algorithm, count, again),
                Op::Fallback { algorithm, is_new } => world.put_fallback(algorithm, is_new),
                Op::Claim { algorithm } => world.claim(algorithm),
                Op::Identity { is_new } => world.put_identity(is_new),
                Op::Restore => world.restore(),
                Op::Flush => world.flush(),
                Op::Crash => world.crash(),
            }
            world.compare();
        }
    }
}
