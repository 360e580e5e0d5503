//! Checks of what each device knows, has got and decrypts when all faults have ended and time has passed.

use std::{collections::BTreeSet, time::Duration};

use serde_json::{Value, json};
use tokio::time::sleep;

use super::{
    device::Device,
    person::{Persons, V3, read},
};
use crate::{accounts::text, federation::world::World};

/// Servers have this long to tell each other what they missed, before it is looked again.
const SETTLES_WITHIN: Duration = Duration::from_secs(120);
/// At most this many times is waited and something more said, until everybody knows all devices.
const ROUNDS_MAX: usize = 8;

/// Waits until everybody knows the devices of all who are in the room, and says something more in between, by which servers find out what they lack.
pub(super) async fn settle(world: &World, persons: &Persons) {
    let room = persons.room.borrow().clone().unwrap();
    for round in 0..=ROUNDS_MAX {
        sleep(SETTLES_WITHIN).await;
        for device in persons.devices.iter().filter(|device| device.is_live()) {
            while device.sync(world, persons, 0).await {}
            // A join whose answer was lost may count elsewhere and not here.
            if !device.is_in() {
                device.join(world, &room).await;
                while device.sync(world, persons, 0).await {}
            }
            device.refill(world, persons).await;
            device.refresh(world, persons).await;
        }
        let differ = find_difference(persons);
        world.wire.note(|| format!("after {round} rounds: {differ:?}"));
        // All speak once more after they agree, so that whoever is there must decrypt all of that.
        for device in persons.devices.iter().filter(|device| device.is_live()) {
            device.say(world, persons).await;
        }
        if differ.is_none() {
            break;
        }
        assert!(round < ROUNDS_MAX, "not everybody knows all devices: {}", differ.unwrap());
    }
    sleep(SETTLES_WITHIN).await;
}

/// Finds a device that knows others of somebody in the room than there are.
fn find_difference(persons: &Persons) -> Option<String> {
    for device in persons.devices.iter().filter(|device| device.is_live() && device.is_in()) {
        let learnt = device.learnt.borrow();
        for user in &learnt.joined {
            let there = persons.devices.iter().filter(|it| it.is_live() && it.user_id == *user);
            let there: BTreeSet<&str> = there.map(|it| it.id.as_str()).collect();
            let known = learnt.lists.get(user).map(|list| list.keys().map(String::as_str).collect());
            if known.as_ref() != Some(&there) {
                return Some(format!("{} knows {known:?} of {user}, who has {there:?}", device.name));
            }
        }
    }
    None
}

/// Checks what each device has got, and what it decrypts.
pub(super) async fn all(world: &World, persons: &Persons) {
    for device in persons.devices.iter().filter(|device| device.is_live()) {
        while device.sync(world, persons, 0).await {}
        let learnt = device.learnt.borrow();
        let owed = persons.owed.borrow().get(&device.name).cloned().unwrap_or_default();
        let missing: Vec<_> = owed.difference(&learnt.inbox).collect();
        assert!(missing.is_empty(), "{} misses the messages {missing:?}", device.name);
        persons.count(|counted| counted.arrived += learnt.inbox.len() as u64);
    }
    let room = persons.room.borrow().clone().unwrap();
    for device in persons.devices.iter().filter(|device| device.is_live()) {
        if device.is_in() {
            decrypt_all(world, persons, device, &room).await;
        }
    }
    let said = persons.sent.borrow().len() as u64;
    persons.count(|counted| counted.said += said);
}

/// Decrypts all that a device may see in the room.
async fn decrypt_all(world: &World, persons: &Persons, device: &Device, room: &str) {
    let (mut from, mut seen) = (String::new(), BTreeSet::new());
    loop {
        let path = format!("{V3}/rooms/{room}/messages?dir=b&limit=100{from}");
        let page = read(world, device, &path).await;
        for event in page["chunk"].as_array().unwrap() {
            if event["type"] == "m.room.encrypted" && event["content"]["ciphertext"].is_string() {
                let event_id = text(event, "event_id");
                decrypt(persons, device, &event_id, &event["content"]);
                assert!(seen.insert(event_id), "{} is shown {event} again", device.name);
            }
        }
        match page["end"].as_str() {
            Some(end) => from = format!("&from={end}"),
            None => break,
        }
    }
    // The device is in the room, whose history is shared, so that it sees all of its own server.
    let own = persons.sent.borrow();
    let own = own.iter().filter(|(_, sent)| sent.text.ends_with(&device.name));
    let missing: Vec<_> = own.filter(|(event_id, _)| !seen.contains(*event_id)).collect();
    assert!(missing.is_empty(), "{} does not see what it has said itself", device.name);
}

fn decrypt(persons: &Persons, device: &Device, event_id: &str, content: &Value) {
    let request = json!({ "session_id": content["session_id"], "ciphertext": content["ciphertext"] });
    let opened = persons.olm.try_to(&device.name, "open_event", request);
    let sent = persons.sent.borrow();
    let sent = sent.get(event_id);
    match (opened, sent) {
        (Ok(opened), Some(sent)) => {
            assert_eq!(
                text(&opened, "text"),
                sent.text,
                "{} decrypts {event_id} as another text",
                device.name
            );
            persons.count(|counted| counted.decrypted += 1);
        }
        (Err(why), Some(sent)) => {
            let is_owed = sent.recipients.contains(&device.name);
            assert!(!is_owed, "{} cannot decrypt {event_id} ({}): {why}", device.name, sent.text);
        }
        // The sending was not answered, or was refused in the end.
        (_, None) => {}
    }
}
