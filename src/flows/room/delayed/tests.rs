//! A server that is killed while delayed events wait and are sent.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use ruma::api::client::room::create_room::v3::Request;
use serde_json::json;

use super::*;
use crate::{
    config::Config,
    env::Env,
    flows::{operator::check::check, room::create},
    ids::RoomNum,
    rooms, schema,
    server::{Lead, Server},
    store::{Direction, Durability, Engine, Store, engine::Memory},
};

const BEGAN_MS: u64 = 1_767_225_600_000;

fn server(memory: Memory) -> Server {
    let store = Store::open(Engine::Memory(memory), Durability::Fsync).unwrap();
    Server::start(Config::default(), Env::simulated(1, BEGAN_MS), store, Some(Lead::of_only_node())).unwrap()
}

/// The values of the test's events in a room, oldest first.
fn list_sent(app: &App, room: RoomNum) -> Vec<String> {
    let snapshot = app.store.snapshot();
    let rows = schema::TIMELINE.prefix::<(RoomNum,)>(&*snapshot, (room,), Direction::Up).unwrap();
    let rows = rows.map(|row| row.unwrap().1).filter(|row| row.event_type() == "m.test");
    rows.map(|row| {
        let content: serde_json::Value = serde_json::from_str(row.content()).unwrap();
        content["n"].as_str().unwrap().to_owned()
    })
    .collect()
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_killed_after_any_write_sends_what_was_scheduled_and_sends_it_once() {
    let first = server(Memory::default());
    let app = first.app().clone();
    let alice = first.register("alice").await;
    let id = create::create(&app, &alice, Request::new()).await.unwrap().room_id;
    let room = rooms::find_room(&*app.store.snapshot(), &id).unwrap().unwrap();
    let wanted = |n: &str, state_key: Option<&str>, delay_ms: u64| Wanted {
        room: id.clone(),
        event_type: "m.test".to_owned(),
        state_key: state_key.map(str::to_owned),
        txn: None,
        content: serde_json::from_value(json!({ "n": n })).unwrap(),
        delay_ms,
        sticky_ms: None,
    };
    let message = schedule(&app, &alice, wanted("message", None, 3_000)).await.unwrap();
    let state = schedule(&app, &alice, wanted("state", Some(""), 3_500)).await.unwrap();
    // A kill after each write from here on leaves the events scheduled, for they were acknowledged.
    let crashes = Arc::new(Mutex::new(Vec::new()));
    let keeps = Arc::clone(&crashes);
    app.store.watch(move |store| {
        let Engine::Memory(memory) = store.engine() else { panic!("tests run in memory") };
        let kept = [0, 1, usize::MAX].map(|kept| memory.after_crash(kept));
        store.flush().unwrap();
        keeps.lock().extend(kept.into_iter().chain([memory.after_crash(0)]));
    });
    let late = schedule(&app, &alice, wanted("cancelled", None, 2_000)).await.unwrap();
    act(&app, &alice, late.clone(), Action::Cancel).await.unwrap();
    act(&app, &alice, state.clone(), Action::Restart).await.unwrap();
    app.env.sleep(Duration::from_secs(8)).await;
    app.store.watch(|_| ());
    assert_eq!(list_sent(&app, room), ["message", "state"]);
    let crashes = std::mem::take(&mut *crashes.lock());
    let (mut none, mut some, mut all) = (0, 0, 0);
    for crash in crashes {
        let again = server(crash);
        let app = again.app();
        match list_sent(app, room).len() {
            0 => none += 1,
            1 => some += 1,
            _ => all += 1,
        }
        // Its clock begins anew, so that it may have to wait as long once more.
        app.env.sleep(Duration::from_secs(12)).await;
        let mut sent = list_sent(app, room);
        // The server may have been killed before the third one was scheduled, or cancelled, for certain.
        sent.retain(|sent| sent != "cancelled");
        assert_eq!(sent, ["message", "state"]);
        let snapshot = app.store.snapshot();
        for id in [&message, &state] {
            let row = delayed::find(&*snapshot, alice.user, id, app.env.now_ms()).unwrap().unwrap();
            assert!(matches!(row.end.unwrap().outcome, DelayedOutcome::Sent(_)));
            assert!(row.content.is_empty(), "the event holds it");
        }
        assert_eq!(delayed::list_due(&*snapshot, alice.user, u64::MAX, 9).unwrap(), []);
        assert_eq!(check(&app.store, &mut |_| ()).unwrap().findings, [""; 0]);
    }
    assert!(none > 3 && some > 1 && all > 1, "killed before, between and after: {none}, {some}, {all}");
}
