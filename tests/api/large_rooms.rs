//! Rooms that are larger than a batch, made beside one another.

use serde_json::json;

use crate::support::TestServer;

#[tokio::test(start_paused = true)]
async fn large_rooms_that_are_made_at_the_same_time_are_all_told_and_whole() {
    let server = TestServer::new();
    let mut people = Vec::new();
    for number in 0..43 {
        people.push(server.register(&format!("person{number}")).await);
    }
    let mut since = Vec::new();
    for person in &people {
        since.push(person.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned());
    }
    let invite: Vec<_> = people[3..].iter().map(|guest| guest.user_id.clone()).collect();
    let thing =
        |number| json!({ "type": "org.example.thing", "state_key": format!("{number}"), "content": {} });
    // The rooms differ in size, so that they do not end in the order in which they begin.
    let make = |maker: usize, things: usize| {
        let initial_state: Vec<_> = (0..things).map(thing).collect();
        let body = json!({ "invite": invite, "initial_state": initial_state });
        let maker = &people[maker];
        async move { maker.ok_post("/createRoom", body).await["room_id"].as_str().unwrap().to_owned() }
    };
    let rooms = futures_util::future::join_all([make(0, 900), make(1, 200), make(2, 500)]).await;
    for (maker, (room, things)) in rooms.iter().zip([900, 200, 500]).enumerate() {
        let sync = people[maker].ok_get(&format!("/sync?since={}&use_state_after=true", since[maker])).await;
        let state = &sync["rooms"]["join"][room]["state_after"]["events"];
        // Six pieces of state come from the preset, and an invitation of each of the forty.
        assert!(state.as_array().unwrap().len() >= things + 46, "{}", state.as_array().unwrap().len());
        assert!(state.as_array().unwrap().iter().any(|event| event["type"] == "m.room.create"));
    }
    for (guest, since) in people.iter().zip(&since).skip(3) {
        let sync = guest.ok_get(&format!("/sync?since={since}")).await;
        for room in &rooms {
            assert!(sync["rooms"]["invite"][room].is_object(), "{} is not told of {room}", guest.user_id);
        }
    }
    server.assert_whole();
}
