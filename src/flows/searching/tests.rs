//! How long searches wait for the index, and how often it is committed for them.

use ruma::{OwnedRoomId, api::client::room::create_room::v3::Request};
use serde_json::json;

use super::*;
use crate::{
    accounts::Caller,
    config::Config,
    flows::room::{create, send},
    server::{Lead, Server},
    store::{Durability, Read, engine::Memory},
};

struct House {
    server: Server,
    alice: Caller,
    room: OwnedRoomId,
}

async fn house(delay_ms: u64) -> House {
    let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
    let mut config = Config::default();
    config.search.delay_ms = delay_ms;
    let env = Env::simulated(1, 1_767_225_600_000);
    let server = Server::start(config, env, store, Some(Lead::of_only_node())).unwrap();
    let app = server.app().clone();
    let alice = server.register("alice").await;
    let room = create::create(&app, &alice, Request::new()).await.unwrap().room_id;
    let house = House { server, alice, room };
    house.say("first").await;
    house.settle().await;
    house
}

impl House {
    fn app(&self) -> &App {
        self.server.app()
    }

    async fn say(&self, txn: &str) {
        let message = send::Message {
            room: self.room.clone(),
            event_type: "m.room.message".to_owned(),
            txn: Some(txn.to_owned()),
            content: serde_json::from_value(json!({ "msgtype": "m.text", "body": "needle" })).unwrap(),
            redacts: None,
            sticky_ms: None,
        };
        send::send(self.app(), &self.alice, message).await.unwrap();
    }

    /// Waits as a search does, and answers for how many milliseconds.
    async fn settle(&self) -> u64 {
        let (app, before_ms) = (self.app(), self.app().env.now_ms());
        app.searching.settle(&app.env, app.store.snapshot().upto()).await;
        app.env.now_ms() - before_ms
    }

    fn reached(&self) -> Reached {
        *self.app().searching.0.as_ref().unwrap().reached.borrow()
    }

    fn is_behind(&self) -> bool {
        self.reached().position < self.app().store.snapshot().upto()
    }
}

#[tokio::test(start_paused = true)]
async fn searches_have_what_was_sent_committed_but_never_in_a_storm() {
    let house = house(1_000).await;
    house.app().env.sleep(Duration::from_secs(5)).await;
    let before = house.reached().commits;
    let waits = Arc::new(parking_lot::Mutex::new(Vec::new()));
    // Somebody sends fifty messages a second, and twice as many search, for ten seconds.
    for number in 0..500 {
        house.say(&number.to_string()).await;
        for _ in 0..2 {
            let (app, waits) = (house.app().clone(), Arc::clone(&waits));
            house.app().env.spawn(async move {
                let (upto, before_ms) = (app.store.snapshot().upto(), app.env.now_ms());
                app.searching.settle(&app.env, upto).await;
                let is_there = app.searching.0.as_ref().unwrap().reached.borrow().position >= upto;
                waits.lock().push((app.env.now_ms() - before_ms, is_there));
            });
        }
        house.app().env.sleep(Duration::from_millis(20)).await;
    }
    let commits = house.reached().commits - before;
    assert!((35..=42).contains(&commits), "four a second, however many ask: {commits}");
    house.app().env.sleep(Duration::from_secs(1)).await;
    let waits = std::mem::take(&mut *waits.lock());
    assert_eq!(waits.len(), 1_000);
    assert!(waits.iter().all(|(waited_ms, is_there)| *waited_ms <= 260 && *is_there), "{waits:?}");
    // Nobody asks any more, so that changes are gathered for as long as before.
    house.app().env.sleep(Duration::from_secs(5)).await;
    let before = house.reached().commits;
    for number in 0..500 {
        house.say(&format!("late{number}")).await;
        house.app().env.sleep(Duration::from_millis(20)).await;
    }
    let commits = house.reached().commits - before;
    assert!((9..=12).contains(&commits), "one a second: {commits}");
}

#[tokio::test(start_paused = true)]
async fn a_search_waits_for_what_it_lacks_alone_and_for_a_bounded_time() {
    let house = house(600_000).await;
    house.app().env.sleep(Duration::from_secs(1_200)).await;
    assert_eq!(house.settle().await, 0, "nothing was written since");
    // After a long silence a change is committed at once, and those after it are gathered.
    house.say("second").await;
    house.settle().await;
    house.say("third").await;
    assert!(house.is_behind());
    let waited_ms = house.settle().await;
    assert_eq!(waited_ms, 2_000, "the next commit is minutes away");
    assert!(house.is_behind());
    // An index that is being filled is not waited for.
    let shared = Arc::clone(house.app().searching.0.as_ref().unwrap());
    shared.reached.send_modify(|reached| reached.is_walking = true);
    assert_eq!(house.settle().await, 0);
}
