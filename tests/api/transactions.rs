//! Transaction ids of what is sent to rooms: a device makes a thing once, and no other device is answered for it.

use std::time::Duration;

use aqueduct::{
    schema,
    store::{Direction, Read},
};
use serde_json::json;

use crate::{
    rooms::Rooms,
    support::{TestServer, encoded},
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

#[tokio::test(start_paused = true)]
async fn a_device_that_comes_back_under_its_id_begins_with_no_transactions() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    let phone = alice.on_device("PHONE").await;
    let first = phone.say(&room, "1", "first").await;
    // The same device logs in anew and stays the same one, so this is a retry.
    let phone = alice.on_device("PHONE").await;
    assert_eq!(phone.say(&room, "1", "again").await, first);
    phone.ok_post("/logout", json!({})).await;
    let phone = alice.on_device("PHONE").await;
    let second = phone.say(&room, "1", "second").await;
    assert_ne!(second, first);
    let page = alice.ok_get(&format!("/rooms/{room}/messages?dir=b")).await.to_string();
    assert!(page.contains("second") && !page.contains("again"), "{page}");
    // The new device is not told either that events of the old one were its own.
    let told = phone.ok_get(&format!("/rooms/{room}/event/{}", encoded(&first))).await;
    assert_eq!(told["unsigned"].get("transaction_id"), None, "{told}");
    let told = phone.ok_get(&format!("/rooms/{room}/event/{}", encoded(&second))).await;
    assert_eq!(told["unsigned"]["transaction_id"], "1");
}

#[tokio::test(start_paused = true)]
async fn transactions_are_remembered_over_midnight_and_forgotten_after_two() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    let env = server.server().app().env.clone();
    let rows = || {
        let snapshot = server.server().app().store.snapshot();
        let count = schema::SENT.prefix::<()>(&*snapshot, (), Direction::Up).unwrap().count();
        assert!(snapshot.upto().number() > 0);
        count
    };
    // Tests begin at midnight, so this is a minute before the next one.
    tokio::time::advance(DAY - Duration::from_secs(60)).await;
    let said = alice.say(&room, "1", "late in the evening").await;
    tokio::time::advance(Duration::from_secs(120)).await;
    assert_eq!(alice.say(&room, "1", "a retry").await, said);
    alice.say(&room, "2", "another").await;
    assert_eq!(rows(), 2);
    tokio::time::advance(DAY).await;
    env.sleep(Duration::from_secs(120)).await;
    assert_eq!(rows(), 1, "the evening before yesterday's");
    tokio::time::advance(DAY).await;
    env.sleep(Duration::from_secs(120)).await;
    assert_eq!(rows(), 0);
}
