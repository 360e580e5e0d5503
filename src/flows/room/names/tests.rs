//! A room with more aliases than one batch takes, as there may be from before their number was bounded.

use std::time::Duration;

use ruma::{OwnedRoomAliasId, OwnedRoomId, api::client::room::create_room};

use super::*;
use crate::{
    accounts::Caller,
    env::Env,
    flows::room::{create, send},
    server::Server,
};

async fn room(app: &App, alice: &Caller) -> (RoomNum, OwnedRoomId) {
    let created = create::create(app, alice, create_room::v3::Request::new()).await.unwrap();
    (created.num, created.room_id)
}

async fn replace(app: &App, alice: &Caller, old: &OwnedRoomId, new: &OwnedRoomId) {
    let content = serde_json::json!({ "body": "gone", "replacement_room": new });
    let content = serde_json::from_value(content).unwrap();
    let (event_type, state_key) = (TOMBSTONE.to_owned(), String::new());
    let piece = send::Piece { event_type, state_key, content, confirmed: Vec::new(), sticky_ms: None };
    send::set_state(app, alice, old, piece).await.unwrap();
}

/// Gives a room so many aliases, whatever the bounds are.
async fn name(app: &App, alice: &Caller, room: RoomNum, count: usize) {
    for from in (0..count).step_by(500) {
        let user_id = alice.user_id.clone();
        let add = move |change: &mut Change| {
            for number in from..count.min(from + 500) {
                let alias = format!("#{room}n{number:05}{}:{}", "x".repeat(200), user_id.server_name());
                let alias = OwnedRoomAliasId::try_from(alias).unwrap();
                aliases::add(&mut change.batch, &alias, change.num, &user_id);
            }
            Ok(())
        };
        commit::in_room_and_server(app, room, add).await.unwrap();
    }
}

fn count(app: &App, room: RoomNum) -> usize {
    aliases::list(&*app.store.snapshot(), room, usize::MAX).unwrap().len()
}

#[tokio::test(start_paused = true)]
async fn very_many_names_move_in_parts_and_after_a_crash_too() {
    let server = Server::in_memory(Env::simulated(1, 0));
    let app = server.app();
    let alice = server.register("alice").await;
    let ((old, old_id), (new, new_id)) = (room(app, &alice).await, room(app, &alice).await);
    let many = MOVED_AT_ONCE * PARTS_MAX + 2 * MOVED_AT_ONCE;
    name(app, &alice, old, many).await;
    replace(app, &alice, &old_id, &new_id).await;
    let owned = app.clone();
    let first =
        commit::in_room_and_server(app, old, move |change| move_to(&owned, change, new, None)).await.unwrap();
    assert!(first.is_some(), "the rest is promised");
    assert_eq!((count(app, old), count(app, new)), (many - MOVED_AT_ONCE, MOVED_AT_ONCE));
    // Nobody keeps the promise, as after a crash.
    app.env.sleep(Duration::from_secs(600)).await;
    assert_eq!((count(app, old), count(app, new)), (0, many));
    assert!(!timer::is_set(&app.store.view(), Job::MoveNames { from: old, to: new }.kind()).unwrap());
}

#[tokio::test(start_paused = true)]
async fn names_do_not_go_to_a_room_that_replaces_theirs_no_more() {
    let server = Server::in_memory(Env::simulated(1, 0));
    let app = server.app();
    let alice = server.register("alice").await;
    let ((old, old_id), (new, new_id)) = (room(app, &alice).await, room(app, &alice).await);
    let (_, newer_id) = room(app, &alice).await;
    name(app, &alice, old, MOVED_AT_ONCE + 1).await;
    replace(app, &alice, &old_id, &new_id).await;
    let owned = app.clone();
    let move_some = move |change: &mut Change| move_to(&owned, change, new, None);
    commit::in_room_and_server(app, old, move_some).await.unwrap();
    replace(app, &alice, &old_id, &newer_id).await;
    app.env.sleep(Duration::from_secs(600)).await;
    assert_eq!((count(app, old), count(app, new)), (1, MOVED_AT_ONCE));
    assert!(!timer::is_set(&app.store.view(), Job::MoveNames { from: old, to: new }.kind()).unwrap());
}
