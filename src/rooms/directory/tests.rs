//! Tests of what is remembered of the directory: it is bounded, and follows what is written.

use ruma::{CanonicalJsonObject, RoomAliasId, RoomOrAliasId, api::client::room::create_room};

use super::*;
use crate::{
    accounts::Caller,
    env::Env,
    flows::{
        App, membership,
        room::{aliases, create, send},
    },
    server::Server,
};

/// Makes a public room with an alias of this name, which the directory shows.
async fn create(app: &App, caller: &Caller, alias: &str) -> OwnedRoomId {
    let mut request = create_room::v3::Request::new();
    request.preset = Some(create_room::v3::RoomPreset::PublicChat);
    request.visibility = ruma::api::client::room::Visibility::Public;
    request.room_alias_name = Some(alias.to_owned());
    create::create(app, caller, request).await.unwrap().room_id
}

async fn set_state(
    app: &App,
    caller: &Caller,
    room: &OwnedRoomId,
    event_type: &str,
    content: serde_json::Value,
) {
    let content: CanonicalJsonObject = serde_json::from_value(content).unwrap();
    let event_type = event_type.to_owned();
    let piece =
        send::Piece { event_type, state_key: String::new(), content, confirmed: Vec::new(), sticky_ms: None };
    send::set_state(app, caller, room, piece).await.unwrap();
}

/// The entry of a room as the memory gives it, which must be that of the store.
fn entry(app: &App, room: &OwnedRoomId) -> Arc<PublicRoomsChunk> {
    let snapshot = app.store.snapshot();
    let (num, row) = rooms::require_room(&*snapshot, room).unwrap();
    let given = app.rooms.descriptions().of(&*snapshot, num, &row).unwrap();
    let read = Descriptions::default().of(&*snapshot, num, &row).unwrap();
    assert_eq!(serde_json::to_value(&*given).unwrap(), serde_json::to_value(&*read).unwrap());
    given
}

#[tokio::test(start_paused = true)]
async fn an_entry_follows_the_state_of_its_room_and_the_aliases_of_the_server() {
    let server = Server::in_memory(Env::simulated(1, 0));
    let app = server.app();
    let alice = server.register("alice").await;
    let (first, second) = (create(app, &alice, "first").await, create(app, &alice, "second").await);
    let named = entry(app, &first);
    assert!(Arc::ptr_eq(&named, &entry(app, &first)), "the entry is remembered");
    let alias = named.canonical_alias.clone().unwrap();
    set_state(app, &alice, &first, NAME, serde_json::json!({ "name": "a name" })).await;
    assert_eq!(entry(app, &first).name.as_deref(), Some("a name"));
    // The alias goes to another room, and the event in the first one still names it.
    let remove = |alias: &RoomAliasId| {
        let (app, alias) = (app.clone(), alias.to_owned());
        async move {
            let row = rooms::aliases::find(&*app.store.snapshot(), &alias).unwrap().unwrap();
            let room = row.room;
            let remove = move |change: &mut rooms::change::Change| {
                rooms::aliases::remove(&mut change.batch, &alias, &row);
                Ok(())
            };
            crate::flows::commit::in_room_and_server(&app, room, remove).await.unwrap();
        }
    };
    remove(&alias).await;
    assert_eq!(entry(app, &first).canonical_alias.as_ref(), Some(&alias));
    aliases::add(app, &alice, &alias, &second).await.unwrap();
    assert_eq!(entry(app, &first).canonical_alias, None);
    remove(&alias).await;
    assert_eq!(entry(app, &first).canonical_alias.as_ref(), Some(&alias));
}

#[tokio::test(start_paused = true)]
async fn entries_are_bounded_by_their_texts() {
    let server = Server::in_memory(Env::simulated(1, 0));
    let app = server.app();
    let alice = server.register("alice").await;
    let room = create(app, &alice, "room").await;
    set_state(app, &alice, &room, TOPIC, serde_json::json!({ "topic": "t".repeat(50_000) })).await;
    let (entry, memory) = (entry(app, &room), Descriptions::default());
    for num in 0..2 * KEPT_BYTES_MAX / 50_000 {
        let version = (ids::Order::MIN, ids::Order::MIN, 1);
        memory.0.insert(RoomNum(num), (version, Arc::clone(&entry)));
    }
    assert!(memory.0.len() > 100 && memory.0.weight() <= KEPT_BYTES_MAX, "{}", memory.0.weight());
}

#[tokio::test(start_paused = true)]
async fn the_order_follows_members_and_listings_also_after_more_changes_than_are_remembered() {
    let server = Server::in_memory(Env::simulated(1, 0));
    let app = server.app();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (small, large) = (create(app, &alice, "small").await, create(app, &alice, "large").await);
    let list = || {
        app.rooms.listing().renew(&app.store).unwrap();
        let order = app.rooms.listing().list(None, Direction::Up, 10);
        order.into_iter().map(|(place, _)| (place.room_id().clone(), place.joined())).collect::<Vec<_>>()
    };
    assert_eq!(list().len(), 2);
    let name = <&RoomOrAliasId>::from(&*large);
    membership::join(app, &bob, (name, Vec::new()), None, CanonicalJsonObject::new()).await.unwrap();
    assert_eq!(list(), [(large.clone(), 2), (small.clone(), 1)]);
    aliases::publish(app, &alice, &large, false).await.unwrap();
    assert_eq!(list(), [(small.clone(), 1)]);
    // Beyond the bound, all of the directory is read again.
    for num in 0..=CHANGED_MAX as u64 {
        app.rooms.listing().touch(RoomNum(1_000 + num));
    }
    assert!(matches!(*app.rooms.listing().changed.lock(), Changed::Everything));
    aliases::publish(app, &alice, &large, true).await.unwrap();
    assert_eq!(list(), [(large, 2), (small, 1)]);
}
