//! Devices that change while another server is in a room of which this one does not know that yet.

use std::{sync::Arc, time::Duration};

use federation::testing::{json as answer, own_keys};
use parking_lot::Mutex;
use serde_json::Value;

use crate::{
    gaps::{BOB, CAROL, Scene},
    support::BEGAN_MS,
};

/// Puts Carol's server into the network as one that only listens. Gives what it is told.
fn listen(scene: &Scene) -> Arc<Mutex<Vec<Value>>> {
    let keys = own_keys("c.example", 3, "k").unwrap().document(BEGAN_MS).to_string();
    let told: Arc<Mutex<Vec<Value>>> = Arc::default();
    let notes = Arc::clone(&told);
    scene.net.serve("5.0.0.3:8448", &["c.example"], move |arrived| {
        let body: Value = serde_json::from_slice(arrived.request.body()).unwrap_or_default();
        notes.lock().extend(body["edus"].as_array().cloned().unwrap_or_default());
        let is_key = arrived.request.uri().path().starts_with("/_matrix/key/");
        std::future::ready(answer(200, if is_key { keys.clone() } else { r#"{"pdus":{}}"#.to_owned() }))
    });
    told
}

/// The devices of a user of which a server was told.
fn devices_of(told: &Mutex<Vec<Value>>, user: &str) -> Vec<String> {
    let told = told.lock();
    let updates = told.iter().filter(|edu| edu["edu_type"] == "m.device_list_update");
    let of_user = updates.map(|edu| &edu["content"]).filter(|content| content["user_id"] == user);
    let mut devices: Vec<_> =
        of_user.map(|content| content["device_id"].as_str().unwrap().to_owned()).collect();
    // The same may be told twice.
    devices.dedup();
    devices
}

#[tokio::test(start_paused = true)]
async fn a_server_that_turns_out_to_be_in_a_room_is_told_what_it_may_have_missed() {
    // A short gap is filled with the join; after a long one the join is part of a state that is fetched.
    for missed in [1, 300] {
        let mut scene = Scene::new().await;
        let env = scene.server.server().app().env.clone();
        let told = listen(&scene);
        // She is in the room, and asks for the devices of those there, before this server hears of it.
        scene.there.join(CAROL);
        env.sleep(Duration::from_secs(5)).await;
        scene.alice.on_device("LATER").await;
        env.sleep(Duration::from_secs(5)).await;
        assert!(devices_of(&told, &scene.alice.user_id).is_empty(), "nobody knows of her here");
        let newest = scene.bob_says(missed, "missed").pop().unwrap();
        assert!(matches!(scene.come(&[&newest]).await[..], [aqueduct::rooms::change::Outcome::Accepted(_)]));
        env.sleep(Duration::from_secs(10)).await;
        assert_eq!(devices_of(&told, &scene.alice.user_id), ["LATER"], "missed: {missed}");
        // From then on she is told of each change.
        scene.alice.on_device("NEXT").await;
        env.sleep(Duration::from_secs(10)).await;
        assert_eq!(devices_of(&told, &scene.alice.user_id), ["LATER", "NEXT"]);
        scene.server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_whose_user_comes_just_now_is_told_nothing_of_what_it_will_ask_for() {
    let mut scene = Scene::new().await;
    let env = scene.server.server().app().env.clone();
    let told = listen(&scene);
    scene.alice.on_device("BEFORE").await;
    env.sleep(Duration::from_secs(5)).await;
    // The clock of the other servers stands still while nothing happens there.
    scene.there.set_clock(env.now_ms());
    let join = scene.there.join(CAROL);
    scene.come(&[&join]).await;
    env.sleep(Duration::from_secs(10)).await;
    assert!(devices_of(&told, &scene.alice.user_id).is_empty(), "it asks by itself");
    let said = scene.there.say(BOB, "hello");
    scene.come(&[&said]).await;
    assert_eq!(scene.hole_count(), 0);
}
