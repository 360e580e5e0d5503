//! Users who leave a room before its members are known, and come back.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_room_that_is_left_meanwhile_is_asked_about_no_more() {
    let mut scene = Scene::of(a_room(11)).await;
    let leave = format!("/rooms/{}/leave", scene.id());
    scene.bob.ok_post(&leave, json!({})).await;
    scene.server.server().app().env.sleep(Duration::from_secs(200)).await;
    let count = scene.asked.lock().unwrap().len();
    scene.open().await;
    let state = |asked: &[(String, Value)]| asked.iter().filter(|(path, _)| path.contains("/state")).count();
    let asked = scene.asked.lock().unwrap().clone();
    assert_eq!(state(&asked), state(&asked[..count]), "nobody of ours is in the room");
    scene.server.assert_whole();
    // Bob comes back into a room of which a part of the state is known, too.
    scene.is_open.store(false, Ordering::Relaxed);
    let path = format!("/join/{}?via=a.example", scene.id());
    scene.bob.ok_post(&path, json!({})).await;
    scene.note_join().await;
    scene.server.assert_whole();
    assert_eq!(scene.told(&scene.bob.ok_get("/sync").await), &Value::Null);
    let said = scene.room.add_by(DEREK, "m.room.message", None, json!({ "body": "you again" }));
    scene.send(&[&said]).await;
    let sync = scene.lazy(None).await;
    assert!(ids(&scene.told(&sync)["timeline"]).contains(&said.id.as_str()), "{sync}");
    scene.open().await;
    assert_eq!(scene.state().await, scene.expected());
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn coming_back_without_members_changes_nothing_of_an_earlier_stay() {
    let mut scene = Scene::of(a_room(11)).await;
    scene.open().await;
    let members = |at: &str| format!("/rooms/{}/members?at={at}", scene.id());
    let at = scene.lazy(None).await["next_batch"].as_str().unwrap().to_owned();
    let path = members(&at);
    let of_then = |chunk: &Value| {
        let events = chunk["chunk"].as_array().unwrap().iter();
        let mut of_then: Vec<_> = events.map(|it| it["event_id"].as_str().unwrap().to_owned()).collect();
        of_then.sort();
        of_then
    };
    let before = of_then(&scene.bob.ok_get(&path).await);
    assert_eq!(before.len(), 4);
    scene.bob.ok_post(&format!("/rooms/{}/leave", scene.id()), json!({})).await;
    // Derek renames himself and Elsie comes while nobody of ours is there to hear of it.
    let elsie = "@elsie:a.example";
    scene.room.add_by(
        DEREK,
        "m.room.member",
        Some(DEREK),
        json!({ "membership": "join", "displayname": "D" }),
    );
    scene.room.add_by(elsie, "m.room.member", Some(elsie), json!({ "membership": "join" }));
    let open = Arc::clone(&scene.is_open);
    open.store(false, Ordering::Relaxed);
    let is_closed: Tamper = Arc::new(move |asked, honest| {
        if asked.starts_with("state") && !open.load(Ordering::Relaxed) {
            return answer(404, r#"{"errcode":"M_NOT_FOUND","error":"not now"}"#);
        }
        answer(200, honest.to_string())
    });
    scene.asked = scene.room.serve(&scene.net, is_closed);
    scene.bob.ok_post(&format!("/join/{}?via=a.example", scene.id()), json!({})).await;
    scene.note_join().await;
    scene.server.assert_whole();
    scene.open().await;
    assert_eq!(scene.state().await, scene.expected());
    assert_eq!(of_then(&scene.bob.ok_get(&path).await), before, "what was so then");
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn whoever_comes_back_before_the_members_are_known_goes_on_where_they_left() {
    let mut scene = Scene::of(a_room(11)).await;
    // The state before the first join is that after the event which it cites.
    let known = scene.room.events.iter().rev().take(2).map(|event| encoded(event.id.as_str()));
    let known: Vec<String> = known.collect();
    scene.leave().await;
    scene.net.take_arrived();
    let (status, told) = scene.join().await;
    assert_eq!(status, StatusCode::OK, "{told}");
    scene.note_join().await;
    let rows = scene.server.assert_whole();
    assert!(rows.iter().all(|(table, count)| *table != "STAGE" || *count == 0), "{rows:?}");
    assert_eq!(scene.told(&scene.bob.ok_get("/sync").await), &Value::Null);
    let said = scene.room.add_by(DEREK, "m.room.message", None, json!({ "body": "you again" }));
    scene.send(&[&said]).await;
    let sync = scene.lazy(None).await;
    assert_eq!(ids(&scene.told(&sync)["timeline"]).len(), 4, "two joins, a leave and a message: {sync}");
    scene.open().await;
    assert_eq!(scene.state().await, scene.expected());
    let asked = scene.net.take_arrived();
    let asked: Vec<_> = asked.iter().filter(|line| line.contains("/state_ids/")).collect();
    let is_of_known = |line: &str| known.iter().any(|id| line.contains(id));
    assert!(!asked.is_empty() && asked.iter().all(|line| is_of_known(line)), "{asked:?}");
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn two_who_come_into_a_room_of_unknown_members_at_once_go_on_in_the_same() {
    let mut scene = Scene::of(a_room(11)).await;
    let carol = scene.server.register("carol").await;
    scene.leave().await;
    // The second does not wait for the first for long, so that both are let in by the same place in the room.
    scene.net.weather("5.9.0.1:8448", Weather::Fair, Duration::from_secs(12));
    let (one, other) = tokio::join!(scene.join(), scene.join_as(&carol));
    assert_eq!((one.0, other.0), (StatusCode::OK, StatusCode::OK), "{one:?} {other:?}");
    scene.net.weather("5.9.0.1:8448", Weather::Fair, Duration::from_millis(1));
    let sent = scene.asked.lock().unwrap().clone();
    let prev =
        sent.iter().filter(|(path, _)| path.contains("/send_join/")).map(|(_, join)| &join["prev_events"]);
    let prev: Vec<_> = prev.collect();
    assert!(prev.len() == 2 && prev[0] == prev[1], "{prev:?}");
    scene.note_join().await;
    scene.note_join_of(&carol).await;
    assert_eq!(scene.told(&scene.bob.ok_get("/sync").await), &Value::Null, "the members are not known yet");
    let rows = scene.server.assert_whole();
    assert!(rows.iter().all(|(table, count)| *table != "STAGE" || *count == 0), "{rows:?}");
    let said = scene.room.add_by(DEREK, "m.room.message", None, json!({ "body": "both of you" }));
    scene.send(&[&said]).await;
    scene.serve_again();
    scene.open().await;
    assert_eq!(scene.state().await, scene.expected());
    for user in [&scene.bob, &carol] {
        let sync = user.ok_get("/sync").await;
        let told = scene.told(&sync);
        assert_eq!(told["summary"]["m.joined_member_count"], 5, "{told}");
        assert!(ids(&told["timeline"]).contains(&said.id.as_str()), "{told}");
    }
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn the_members_of_an_earlier_stay_are_learnt_after_those_of_the_one_now() {
    let mut scene = Scene::of(a_room(11)).await;
    let token = scene.lazy(None).await["next_batch"].as_str().unwrap().to_owned();
    scene.leave().await;
    scene.room.add("m.room.message", None, json!({ "body": "nobody of theirs hears this" }));
    scene.serve_again();
    let (status, told) = scene.join().await;
    assert_eq!(status, StatusCode::OK, "{told}");
    scene.note_join().await;
    scene.is_open.store(true, Ordering::Relaxed);
    let asks_for_state =
        |asked: &[(String, Value)]| asked.iter().filter(|(path, _)| path.contains("/state_ids/")).count();
    let before = asks_for_state(&scene.asked.lock().unwrap());
    scene.pause(400).await;
    assert_eq!(scene.state().await, scene.expected());
    assert_eq!(asks_for_state(&scene.asked.lock().unwrap()) - before, 2, "once for each stay");
    let path = format!("/rooms/{}/members?at={token}", scene.id());
    let then = scene.bob.ok_get(&path).await;
    let then: Vec<_> =
        then["chunk"].as_array().unwrap().iter().map(|it| it["state_key"].as_str().unwrap()).collect();
    assert!(then.contains(&CHARLIE) && then.contains(&DEREK), "{then:?}");
    let path =
        format!("/_matrix/federation/v1/make_join/{}/{}?ver=11", scene.id(), encoded("@erin:a.example"));
    let (status, told) = scene.peer.ask(&scene.server, Method::GET, &path, None).await;
    assert_eq!(status, StatusCode::OK, "{told}");
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn whoever_was_banned_meanwhile_is_refused_and_nobody_is_asked_to_let_them_in() {
    let mut scene = Scene::of(a_room(11)).await;
    let bob = scene.bob.user_id.clone();
    let ban = scene.room.add("m.room.member", Some(&bob), json!({ "membership": "ban" }));
    scene.send(&[&ban]).await;
    scene.room.events.pop();
    scene.go_on_with(ban);
    let (status, told) = scene.join().await;
    assert_eq!((status, &told["errcode"]), (StatusCode::FORBIDDEN, &json!("M_FORBIDDEN")), "{told}");
    let asked = scene.asked.lock().unwrap().clone();
    assert!(asked.iter().any(|(path, _)| path.contains("/make_join/")), "{asked:?}");
    assert!(!asked.iter().any(|(path, _)| path.contains("/send_join/")), "{asked:?}");
    scene.server.assert_whole();
}
