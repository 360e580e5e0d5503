//! Events that come after a gap while the members of the room are unknown.

use super::*;

/// The answer to `state_ids` that names these events.
fn state_ids(state: &[String], all: &[Made]) -> Value {
    let chain: Vec<_> = all.iter().map(|made| made.id.as_str()).collect();
    json!({ "pdu_ids": state, "auth_chain_ids": chain })
}

fn sorted_ids(room: &Elsewhere) -> Vec<String> {
    let mut ids: Vec<_> = room.state.values().map(|made| made.id.to_string()).collect();
    ids.sort();
    ids
}

#[tokio::test(start_paused = true)]
async fn who_came_into_the_room_after_an_event_is_no_part_of_the_state_before_it() {
    let mut room = Elsewhere::new(11);
    room.omits = true;
    // Nobody gives us the event on which the one stands that comes late, nor tells of the gap.
    let missing = room.add("m.room.message", None, json!({ "body": "nobody has this one" }));
    let late = room.event(ALICE, "m.room.message", None, json!({ "body": "late" }));
    let before_late = sorted_ids(&room);
    for user in [CHARLIE, DEREK] {
        room.add_by(user, "m.room.member", Some(user), json!({ "membership": "join" }));
    }
    let (now, all) = (sorted_ids(&room), room.events.clone());
    let mut scene = Scene::of(room).await;
    let (keys, is_open) =
        (own_keys("a.example", 9, "k").unwrap().document(BEGAN_MS), Arc::clone(&scene.is_open));
    let (late_id, before, missing_id) = (late.id.clone(), before_late.clone(), missing.id.clone());
    scene.net.serve("5.9.0.1:8448", &["a.example"], move |arrived| {
        let uri = arrived.request.uri();
        let endpoint = uri.path().split('/').nth(4).unwrap_or_default();
        let is_of_late = uri.query().is_some_and(|query| query.contains(&encoded(late_id.as_str())));
        let id = uri.path().rsplit('/').next().unwrap_or_default().replace("%24", "$");
        let told = match endpoint {
            "state_ids" if is_of_late => Some(state_ids(&before, &all)),
            "state_ids" if is_open.load(Ordering::Relaxed) => Some(state_ids(&now, &all)),
            "get_missing_events" => Some(json!({ "events": [] })),
            "event" if id != missing_id => all
                .iter()
                .find(|made| made.id == id)
                .map(|made| json!({ "origin": "a.example", "origin_server_ts": 1, "pdus": [made.json] })),
            "send" => Some(json!({ "pdus": {} })),
            _ if uri.path() == "/_matrix/key/v2/server" => serde_json::from_str(keys.as_ref()).ok(),
            _ => None,
        };
        std::future::ready(match told {
            Some(told) => answer(200, told.to_string()),
            None => answer(404, r#"{"errcode":"M_NOT_FOUND","error":"not here"}"#),
        })
    });
    scene.send(&[&late]).await;
    // The server tries the event again while nothing is known of Charlie and Derek.
    scene.pause(60).await;
    scene.open().await;
    scene.pause(700).await;
    let path = format!("/_matrix/client/v3/rooms/{}/event/{}", scene.id(), encoded(late.id.as_str()));
    let (status, told) = scene.bob.get(&path).await;
    assert_eq!(status, StatusCode::OK, "{told}");
    let uri =
        format!("/_matrix/federation/v1/state_ids/{}?event_id={}", scene.id(), encoded(late.id.as_str()));
    let (status, told) = scene.peer.ask(&scene.server, Method::GET, &uri, None).await;
    assert_eq!(status, StatusCode::OK, "{told}");
    let told = told["pdu_ids"].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned());
    let mut told: Vec<_> = told.collect();
    told.sort();
    assert_eq!(told, before_late, "Charlie and Derek came later");
    assert_eq!(scene.state().await, scene.expected());
    scene.server.assert_whole();
}
