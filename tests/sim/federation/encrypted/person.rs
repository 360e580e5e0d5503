//! The people of the world with their devices, and all that was answered to them.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::{Counted, device::Device, olm::Olm};
use crate::{
    accounts::text,
    federation::{
        wire::name,
        world::{Answer, SERVERS, World},
    },
};

pub(super) const V3: &str = "/_matrix/client/v3";
/// There is one person on each server, and on the first two of them a second one.
const PEOPLE: usize = SERVERS + 2;

/// A message whose sending was answered.
pub(super) struct Sent {
    pub(super) text: String,
    /// The devices that were sent the key before.
    pub(super) recipients: BTreeSet<String>,
}

pub(super) struct Persons {
    pub(super) olm: Olm,
    /// The first device of each person, and for some a second one.
    pub(super) devices: Vec<Device>,
    /// The room in which all talk.
    pub(super) room: RefCell<Option<String>>,
    pub(super) sent: RefCell<BTreeMap<String, Sent>>,
    /// The numbers of messages whose sending was answered, for each device.
    pub(super) owed: RefCell<BTreeMap<String, BTreeSet<u64>>>,
    /// The one-time keys that somebody was given.
    given: RefCell<BTreeSet<String>>,
    messages: Cell<u64>,
    pub(super) counted: Cell<Counted>,
}

impl Persons {
    /// Lets everybody begin to act.
    pub(super) fn begin(world: &Rc<World>, tasks: &mut JoinSet<()>) -> Rc<Self> {
        let mut devices = Vec::new();
        for person in 0..PEOPLE {
            let user_id = format!("@p{person}:{}", name(person % SERVERS));
            devices.push(Device::new(person, &user_id, &format!("FIRST{person}")));
            if person.is_multiple_of(2) {
                devices.push(Device::new(person, &user_id, &format!("SECOND{person}")));
            }
        }
        let persons = Rc::new(Self {
            olm: Olm::start(),
            devices,
            room: RefCell::default(),
            sent: RefCell::default(),
            owed: RefCell::default(),
            given: RefCell::default(),
            messages: Cell::new(0),
            counted: Cell::default(),
        });
        for at in 0..persons.devices.len() {
            let (world, persons) = (world.clone(), persons.clone());
            tasks.spawn_local(async move {
                let device = &persons.devices[at];
                persons.come(&world, device).await;
                tokio::join!(persons.live(&world, device), persons.follow(&world, device));
            });
        }
        persons
    }

    /// Logs a device in: the first one of a person makes the account.
    async fn come(&self, world: &World, device: &Device) {
        let person = format!("p{}", device.person);
        let is_first = device.id.starts_with("FIRST");
        world.wire.pause(if is_first { 500 } else { 12_000 }).await;
        let register = json!({
            "username": person, "password": person, "device_id": device.id, "auth": { "type": "m.login.dummy" },
        });
        let log_in = json!({
            "type": "m.login.password", "password": person, "device_id": device.id,
            "identifier": { "type": "m.id.user", "user": person },
        });
        let mut exists = !is_first;
        let token = loop {
            let (path, body) = if exists { ("login", &log_in) } else { ("register", &register) };
            let path = format!("{V3}/{path}");
            match world.ask(device.place(), Method::POST, &path, None, body.clone()).await {
                Answer::Given(StatusCode::OK, json) => break text(&json, "access_token"),
                // An attempt that was not answered has made the account.
                Answer::Given(_, json) if json["errcode"] == "M_USER_IN_USE" => exists = true,
                // The account is not there yet.
                Answer::Given(StatusCode::FORBIDDEN, _) if !is_first => {}
                Answer::Given(status, json) => panic!("{}: {status} {json}", device.name),
                Answer::Lost => {}
            }
            world.wire.pause(600).await;
        };
        *device.token.borrow_mut() = token;
        device.introduce(world, self).await;
    }

    async fn follow(&self, world: &World, device: &Device) {
        while !world.is_ending() && !device.is_logged_out.get() {
            device.sync(world, self, 1_000).await;
            world.wire.pause(600).await;
        }
    }

    async fn live(&self, world: &World, device: &Device) {
        if device.name == self.devices[0].name {
            self.make(world, device).await;
        }
        while !world.is_ending() {
            world.wire.pause(2_400).await;
            let Some(room) = self.room.borrow().clone() else { continue };
            device.refill(world, self).await;
            let is_first = device.id.starts_with("FIRST");
            match world.wire.below(100) {
                _ if !device.is_in() && is_first => device.join(world, &room).await,
                0..75 => device.say(world, self).await,
                75..82 if is_first && device.person != 0 => device.leave(world, &room).await,
                82..88 if !is_first => {
                    device.log_out(world).await;
                    self.count(|counted| counted.logged_out += 1);
                    return;
                }
                _ => {}
            }
        }
    }

    /// Makes the room. A room whose making was not answered is nobody's.
    async fn make(&self, world: &World, device: &Device) {
        let version = ["10", "11", "12"][world.wire.below(3) as usize];
        let body = json!({
            "preset": "public_chat", "room_version": version,
            "initial_state": [
                { "type": "m.room.encryption", "content": { "algorithm": "m.megolm.v1.aes-sha2" } },
            ],
        });
        loop {
            let token = device.token.borrow().clone();
            let path = format!("{V3}/createRoom");
            let made = world.ask(device.place(), Method::POST, &path, Some(&token), body.clone()).await;
            if let Answer::Given(status, json) = made {
                assert_eq!(status, StatusCode::OK, "{json}");
                *self.room.borrow_mut() = Some(text(&json, "room_id"));
                return;
            }
            world.wire.pause(600).await;
        }
    }

    /// A number that no message between devices has yet.
    pub(super) fn next_message(&self) -> u64 {
        self.messages.set(self.messages.get() + 1);
        self.messages.get()
    }

    /// Notes messages whose sending was answered.
    pub(super) fn note_owed(&self, told: Vec<(String, u64)>) {
        let mut owed = self.owed.borrow_mut();
        for (device, number) in told {
            owed.entry(device).or_default().insert(number);
        }
    }

    /// Notes that somebody was given a key, which nobody may have been given before unless it is one to fall back on.
    pub(super) fn note_given(&self, which: &str, key: &Value) {
        if key["fallback"] == true {
            self.count(|counted| counted.fallback += 1);
            return;
        }
        self.count(|counted| counted.given += 1);
        let key = text(key, "key");
        assert!(self.given.borrow_mut().insert(key), "{which} is given again");
    }

    pub(super) fn count(&self, count: impl FnOnce(&mut Counted)) {
        let mut counted = self.counted.get();
        count(&mut counted);
        self.counted.set(counted);
    }
}

/// The answer to a request of a device that must succeed.
pub(super) async fn read(world: &World, device: &Device, path: &str) -> Value {
    let (status, json) = device.insist(world, Method::GET, path, Value::Null).await;
    assert_eq!(status, StatusCode::OK, "{}: {path}: {json}", device.name);
    json
}
