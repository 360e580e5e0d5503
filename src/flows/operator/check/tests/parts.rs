//! Requests that end between their batches: what they leave is whole, and when they come again they go on from there.

use std::sync::Arc;

use parking_lot::Mutex;

use super::*;
use crate::{accounts::devices, encryption::inbox};

/// The engine of a store as a crash would leave it after each batch.
struct Crashes(Arc<Mutex<Vec<Memory>>>);

impl Crashes {
    fn of(fixture: &Fixture) -> Self {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let keeps = Arc::clone(&kept);
        fixture.store().watch(move |store: &Store| {
            store.flush().unwrap();
            if let Engine::Memory(memory) = store.engine() {
                keeps.lock().push(memory.after_crash(usize::MAX));
            }
        });
        Self(kept)
    }

    fn take(self, fixture: &Fixture) -> Vec<Memory> {
        fixture.store().watch(|_| ());
        std::mem::take(&mut *self.0.lock())
    }
}

impl Fixture {
    async fn ready() -> Self {
        let fixture = a_house().await;
        fixture.write(|batch| schema::STAGE.delete(batch, RoomNum(1)));
        fixture
    }

    /// Starts the server over what a crash has left.
    fn restart(&mut self, crash: Memory) {
        let store = Store::open(Engine::Memory(crash), Durability::Fsync).unwrap();
        let config = self.server.app().config.as_ref().clone();
        let env = Env::simulated(2, 1_767_225_700_000);
        self.server = Server::start(config, env, store, Some(Lead::of_only_node())).unwrap();
    }
}

/// A body with this many keys in one room, each of about as many bytes as clients send.
fn keys(count: usize) -> Value {
    let keys = (0..count).map(|number| {
        let key = json!({
            "first_message_index": 1, "forwarded_count": 0, "is_verified": false,
            "session_data": { "ciphertext": format!("{number:0>700}") },
        });
        (format!("session {number}"), key)
    });
    json!({ "sessions": Value::Object(keys.collect()) })
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_is_killed_leaves_a_whole_backup_and_goes_on_when_it_comes_again() {
    let mut fixture = Fixture::ready().await;
    fixture.own("POST", "room_keys/version", json!({ "algorithm": "a", "auth_data": {} })).await;
    let crashes = Crashes::of(&fixture);
    let (path, keys) = ("room_keys/keys/!b:x?version=2", keys(3_000));
    assert_eq!(fixture.own("PUT", path, keys.clone()).await["count"], 3_000);
    let crashes = crashes.take(&fixture);
    assert!(crashes.len() >= 3, "the upload is written in {} batches", crashes.len());
    let mut counts = Vec::new();
    for (number, crash) in crashes.into_iter().enumerate() {
        fixture.restart(crash);
        assert_eq!(fixture.findings(), [""; 0], "after batch {number}");
        let version = fixture.own("GET", "room_keys/version/2", Value::Null).await;
        counts.push(version["count"].as_u64().unwrap());
        assert_eq!(fixture.own("PUT", path, keys.clone()).await["count"], 3_000, "after batch {number}");
        assert_eq!(fixture.own("GET", path, Value::Null).await, keys, "after batch {number}");
        assert_eq!(fixture.findings(), [""; 0], "carried on after batch {number}");
    }
    assert!(counts.is_sorted() && counts.iter().any(|count| (1..3_000).contains(count)), "{counts:?}");
}

#[tokio::test(start_paused = true)]
async fn a_message_to_many_devices_reaches_each_once_and_in_order_wherever_its_request_is_killed() {
    let mut fixture = Fixture::ready().await;
    for number in 0..40 {
        let log_in = json!({
            "type": "m.login.password", "identifier": { "type": "m.id.user", "user": "bob" },
            "password": "a password", "device_id": format!("D{number}"),
        });
        fixture.own("POST", "login", log_in).await;
    }
    let message = |text: &str| {
        let content = json!({ "text": text, "filling": "x".repeat(40_000) });
        json!({ "messages": { "@bob:check.example": { "*": content } } })
    };
    let crashes = Crashes::of(&fixture);
    fixture.own("PUT", "sendToDevice/m.parts/1", message("first")).await;
    let crashes = crashes.take(&fixture);
    assert!(crashes.len() >= 3, "the message is written in {} batches", crashes.len());
    for (number, crash) in crashes.into_iter().enumerate() {
        fixture.restart(crash);
        assert_eq!(fixture.findings(), [""; 0], "after batch {number}");
        for _ in 0..2 {
            fixture.own("PUT", "sendToDevice/m.parts/1", message("first")).await;
        }
        fixture.own("PUT", "sendToDevice/m.parts/2", message("second")).await;
        let (snapshot, bob) = (fixture.store().snapshot(), UserNum(2));
        for device in devices::list(&*snapshot, bob).unwrap() {
            let owner = (bob, device.num);
            let waiting = inbox::list(&*snapshot, owner, Position::ZERO, snapshot.upto(), 99).unwrap();
            let told: Vec<_> = waiting
                .iter()
                .map(|(_, message)| serde_json::from_slice::<Value>(message).unwrap())
                .map(|message| text(&message["content"], "text"))
                .collect();
            assert_eq!(told, ["first", "second"], "{} after batch {number}", device.id);
        }
    }
}
