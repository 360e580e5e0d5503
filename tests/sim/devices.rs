//! Devices that send messages to one another, upload keys and write account data, while the server crashes.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
};

use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{
    accounts::text,
    chain::Chain,
    rooms::{PEOPLE, user_id},
    world::{Answer, World},
};

const V3: &str = "/_matrix/client/v3";

/// Everything about devices that was acknowledged.
#[derive(Default)]
pub(crate) struct Devices {
    /// The people who have a device.
    ready: RefCell<BTreeSet<u64>>,
    /// The messages from device to device whose sending was answered.
    sent: RefCell<BTreeSet<String>>,
    /// The messages whose sending began when this person had a device already.
    owed: RefCell<BTreeMap<u64, BTreeSet<String>>>,
    /// Account data: (person, type) -> the number last written.
    written: RefCell<BTreeMap<(u64, String), u64>>,
    /// Identity keys: the number that each person last uploaded.
    keys: RefCell<BTreeMap<u64, u64>>,
    /// (person, who changed keys) -> the number of syncs that the person's chain had when the last change began.
    changed_from: RefCell<BTreeMap<(u64, u64), u64>>,
    /// One-time keys that somebody was given.
    given: RefCell<BTreeSet<String>>,
    /// The number of syncs that each person has seen answered.
    syncs: RefCell<BTreeMap<u64, u64>>,
    counter: Cell<u64>,
}

impl Devices {
    /// Notes how many syncs a person's chain has come to.
    pub(crate) fn note_sync(&self, person: u64, count: u64) {
        self.syncs.borrow_mut().insert(person, count);
    }

    pub(crate) async fn live(&self, world: &World, person: u64, token: &str) {
        let path = format!("{V3}/account/whoami");
        let (_, json) = world.insist(Method::GET, &path, Some(token), Value::Null).await;
        let device = text(&json, "device_id");
        self.ready.borrow_mut().insert(person);
        while !world.is_ending() {
            world.pause(700).await;
            let number = self.counter.get() + 1;
            self.counter.set(number);
            match world.below(100) {
                0..40 => self.send(world, person, token, number).await,
                40..65 => self.write(world, person, token, number).await,
                65..80 => self.upload(world, person, token, &device, number).await,
                _ => self.claim(world, person, token).await,
            }
        }
    }

    /// Sends to everybody's devices until there is an answer, now and then twice at once: each gets it once.
    async fn send(&self, world: &World, person: u64, token: &str, number: u64) {
        let path = format!("{V3}/sendToDevice/m.sim/{number}");
        let ready = self.ready.borrow().clone();
        let messages: serde_json::Map<_, _> =
            (0..PEOPLE).map(|to| (user_id(to), json!({ "*": { "number": number } }))).collect();
        let body = json!({ "messages": messages });
        let once = || world.insist(Method::PUT, &path, Some(token), body.clone());
        let (status, json) = if world.happens(20) { tokio::join!(once(), once()).0 } else { once().await };
        assert_eq!(status, StatusCode::OK, "{json}");
        world.note(|| format!("talker{person} has sent {number} to everybody's devices"));
        self.sent.borrow_mut().insert(number.to_string());
        for to in ready {
            self.owed.borrow_mut().entry(to).or_default().insert(number.to_string());
        }
    }

    async fn write(&self, world: &World, person: u64, token: &str, number: u64) {
        let kind = format!("sim.kind{}", world.below(3));
        let path = format!("{V3}/user/{}/account_data/{kind}", user_id(person));
        let body = json!({ "number": number });
        let (status, json) = world.insist(Method::PUT, &path, Some(token), body).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        world.note(|| format!("talker{person} has written {number} as {kind}"));
        self.written.borrow_mut().insert((person, kind), number);
    }

    /// Uploads new identity keys, which others must hear of, and one-time keys.
    async fn upload(&self, world: &World, person: u64, token: &str, device: &str, number: u64) {
        let begun: Vec<_> =
            (0..PEOPLE).map(|other| (other, self.syncs.borrow().get(&other).copied().unwrap_or(0))).collect();
        let user = user_id(person);
        let body = json!({
            "device_keys": {
                "user_id": user, "device_id": device, "algorithms": [],
                "keys": { format!("number:{device}"): number.to_string() }, "signatures": {},
            },
            "one_time_keys": {
                format!("curve25519:{person}a{number}"): "key", format!("curve25519:{person}b{number}"): "key",
            },
        });
        // A retry after the key was given uploads it again, as a client would: its ids are then new ones.
        let mut tries = 0;
        let status = loop {
            let mut body = body.clone();
            if tries > 0 {
                body["one_time_keys"] = json!({ format!("curve25519:{person}r{number}x{tries}"): "key" });
            }
            match world.ask(Method::POST, &format!("{V3}/keys/upload"), Some(token), body).await {
                Answer::Given(status, _) => break status,
                Answer::Lost => tries += 1,
            }
            world.pause(300).await;
        };
        assert_eq!(status, StatusCode::OK);
        world.note(|| format!("talker{person} has new keys: {number}"));
        self.keys.borrow_mut().insert(person, number);
        for (other, count) in begun {
            self.changed_from.borrow_mut().insert((other, person), count);
        }
    }

    /// Claims a key. A key that was given is never given again, though an answer may be lost.
    async fn claim(&self, world: &World, person: u64, token: &str) {
        let other = user_id(world.below(PEOPLE));
        let Some(device) = self.device_of(world, token, &other).await else { return };
        let body = json!({ "one_time_keys": { &other: { device: "curve25519" } } });
        let answer = world.ask(Method::POST, &format!("{V3}/keys/claim"), Some(token), body).await;
        let Answer::Given(status, json) = answer else { return };
        assert_eq!(status, StatusCode::OK, "{json}");
        for device in json["one_time_keys"][&other].as_object().into_iter().flat_map(serde_json::Map::values)
        {
            for key in device.as_object().unwrap().keys() {
                world.note(|| format!("talker{person} was given {key}"));
                assert!(self.given.borrow_mut().insert(key.clone()), "{key} was given twice");
            }
        }
    }

    async fn device_of(&self, world: &World, token: &str, user: &str) -> Option<String> {
        let body = json!({ "device_keys": { user: [] } });
        let (_, json) = world.insist(Method::POST, &format!("{V3}/keys/query"), Some(token), body).await;
        json["device_keys"][user].as_object()?.keys().next().cloned()
    }

    /// Checks what must hold at rest, when the chains have caught up. `shared`: whether two people share a room.
    pub(crate) async fn check(
        &self,
        world: &World,
        people: &BTreeMap<u64, String>,
        chains: &BTreeMap<u64, Chain>,
        shared: impl Fn(u64, u64) -> bool,
    ) {
        for (person, token) in people {
            let chain = &chains[person];
            let got: BTreeSet<_> = chain.inbox.iter().map(|content| content["number"].to_string()).collect();
            // All sendings were answered, so there are no other messages.
            assert!(got.is_subset(&self.sent.borrow()), "talker{person} was sent what nobody sent");
            let owed = self.owed.borrow().get(person).cloned().unwrap_or_default();
            let missing: Vec<_> = owed.difference(&got).collect();
            assert!(missing.is_empty(), "talker{person} misses {missing:?}");
            let written = self.written.borrow().clone();
            for ((_, kind), number) in written.iter().filter(|((of, _), _)| of == person) {
                let path = format!("{V3}/user/{}/account_data/{kind}", user_id(*person));
                let (_, json) = world.insist(Method::GET, &path, Some(token), Value::Null).await;
                assert_eq!(json["number"], *number, "talker{person}: {kind} is not what was last written");
                let told = chain.account_data.get(&(String::new(), kind.clone()));
                assert_eq!(told, Some(&json), "talker{person} was not told of {kind}");
            }
            let keys = self.keys.borrow().clone();
            for (other, number) in &keys {
                let user = user_id(*other);
                let body = json!({ "device_keys": { &user: [] } });
                let path = format!("{V3}/keys/query");
                let (_, json) = world.insist(Method::POST, &path, Some(token), body).await;
                let device = json["device_keys"][&user].as_object().unwrap().values().next().unwrap();
                let told = device["keys"].as_object().and_then(|keys| keys.values().next());
                assert_eq!(told, Some(&json!(number.to_string())), "{user} has other keys");
                let from = self.changed_from.borrow()[&(*person, *other)];
                let told = chain.changed.get(&user).copied().unwrap_or(0);
                // A first sync tells of no changes.
                assert!(
                    from == 0 || !shared(*person, *other) || told > from,
                    "talker{person} was not told of new keys of {user}"
                );
            }
        }
    }
}
