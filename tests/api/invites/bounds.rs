//! How many invitations a user may have, and how much they tell.

use aqueduct::{schema, store::Direction};

use super::*;

/// Follows the syncs of a client until nothing is left: the rooms of the invitations in each answer, and the bytes of its
/// invitations.
async fn follow(client: &TestClient, since: &str) -> Vec<(Vec<String>, usize)> {
    let mut since = since.to_owned();
    let mut answers = Vec::new();
    loop {
        let from = if since.is_empty() { String::new() } else { format!("&since={since}") };
        let sync = client.ok_get(&format!("/sync?timeout=0{from}")).await;
        since = sync["next_batch"].as_str().unwrap().to_owned();
        let Some(invited) = sync["rooms"]["invite"].as_object() else { return answers };
        let rooms = invited.keys().cloned().collect();
        answers.push((rooms, sync["rooms"]["invite"].to_string().len()));
    }
}

#[tokio::test(start_paused = true)]
async fn many_invitations_are_told_in_several_answers_each_once() {
    let room = Elsewhere::new(11);
    let it = Against::new(&room, honest()).await;
    let before = it.bob.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
    let mut all = Vec::new();
    let invite = async |number: usize| {
        let room = room.with_id(&format!("!r{number:03}:a.example"));
        let (status, answer) = it.invite(&room, &invitation(&room, BOB)).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        room.room_id.to_string()
    };
    for number in 0..150 {
        all.push(invite(number).await);
    }
    for since in ["", before.as_str()] {
        let answers = follow(&it.bob, since).await;
        assert_eq!(answers.iter().map(|(rooms, _)| rooms.len()).collect::<Vec<_>>(), [100, 50]);
        assert_eq!(answers[0].0, all[..100], "the oldest come first");
        assert_eq!(answers[1].0, all[100..]);
    }
    // An invitation that comes while some are left is told after them, also to a client that asks for everything again.
    let sync = it.bob.ok_get("/sync?timeout=0").await;
    let since = sync["next_batch"].as_str().unwrap();
    all.push(invite(150).await);
    let whole = it.bob.ok_get(&format!("/sync?timeout=0&full_state=true&since={since}")).await;
    let told: Vec<_> = whole["rooms"]["invite"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(told, all[100..]);
    let next = whole["next_batch"].as_str().unwrap();
    assert_eq!(follow(&it.bob, next).await, []);
    it.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn what_invitations_tell_is_bounded_in_each_and_in_all() {
    let room = Elsewhere::new(10);
    let it = Against::new(&room, honest()).await;
    for number in 0..60 {
        let room = room.with_id(&format!("!r{number:03}:a.example"));
        let event = room.event(
            ALICE,
            "m.room.member",
            Some(BOB),
            json!({ "membership": "invite", "z": "y".repeat(40_000) }),
        );
        let mut body = body(&room, &event);
        let state = body["invite_room_state"].as_array_mut().unwrap();
        let one = |kind: String, bytes: usize| json!({ "type": kind, "state_key": "", "sender": ALICE, "content": { "x": "y".repeat(bytes) } });
        state.push(one("m.room.topic".to_owned(), 45_000));
        state.extend((0..60).map(|number| one(format!("m.t{number}"), 2_300)));
        let (status, answer) = it.put(&room, &event, &body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
    }
    let answers = follow(&it.bob, "").await;
    assert_eq!(answers.iter().map(|(rooms, _)| rooms.len()).sum::<usize>(), 60);
    assert!(answers.len() > 1, "{} bytes in one answer", answers[0].1);
    for (rooms, bytes) in &answers {
        assert!(*bytes <= (1 << 20) + (65 << 10), "{bytes} bytes of {}", rooms.len());
        assert!(*bytes <= rooms.len() * (66 << 10), "{bytes} bytes of {}", rooms.len());
    }
    it.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn invitations_that_come_together_are_held_to_the_same_number() {
    let room = Elsewhere::new(11);
    let it = Against::new(&room, honest()).await;
    let invite = async |number: usize| {
        let room = room.with_id(&format!("!r{number:03}:a.example"));
        it.invite(&room, &invitation(&room, BOB)).await.0
    };
    let answers = futures_util::future::join_all((0..220).map(&invite)).await;
    let accepted = answers.iter().filter(|status| **status == StatusCode::OK).count();
    assert_eq!(accepted, 200);
    let refused = answers.iter().filter(|status| **status == StatusCode::TOO_MANY_REQUESTS).count();
    assert_eq!(refused, 20, "the others may come back later");
    assert_eq!(invite(500).await, StatusCode::TOO_MANY_REQUESTS);
    let first = answers.iter().position(|status| *status == StatusCode::OK).unwrap();
    assert_eq!(invite(first).await, StatusCode::OK, "it takes the place of the one to that room");
    it.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn servers_that_invite_as_often_as_they_may_shut_nobody_out() {
    let mut room = Elsewhere::new(11);
    let it = Against::new(&room, honest()).await;
    for server in 1..=6_u8 {
        let name = format!("s{server}.example");
        let peer = Peer::new(&it.net, &name, &format!("5.9.1.{server}"), 100 + server);
        room.signer =
            Signer::new(name.as_str().try_into().unwrap(), key_pair(100 + server, "k").unwrap().into());
        let invite = async |number: usize| {
            let room = room.with_id(&format!("!room{number:03}:{name}"));
            let invites = json!({ "membership": "invite" });
            let event = room.event(&format!("@m:{name}"), "m.room.member", Some(BOB), invites);
            let (id, event_id) = (encoded(room.room_id.as_str()), encoded(event.id.as_str()));
            let uri = format!("/_matrix/federation/v2/invite/{id}/{event_id}");
            let body = json!({ "room_version": "11", "event": event.json, "invite_room_state": [] });
            peer.ask(&it.server, Method::PUT, &uri, Some(&body)).await.0
        };
        if server < 6 {
            for number in 0..200 {
                assert_eq!(invite(number).await, StatusCode::OK, "{server} {number}");
            }
            assert_eq!(invite(200).await, StatusCode::TOO_MANY_REQUESTS);
        } else {
            for number in 0..3 {
                assert_eq!(invite(number).await, StatusCode::OK);
            }
            let both = futures_util::future::join_all((3..10).map(&invite)).await;
            assert!(both.iter().filter(|status| **status == StatusCode::OK).count() >= 3, "{both:?}");
        }
    }
    let app = it.server.server().app();
    let user = crate::support::user_num(&app.store, BOB);
    let snapshot = app.store.snapshot();
    let rows = aqueduct::rooms::members::list_user_rooms(&*snapshot, user).unwrap();
    let rows: Vec<_> = rows.map(|row| row.unwrap().1.membership).collect();
    let count = |membership| rows.iter().filter(|it| **it == membership).count();
    assert_eq!(count(Membership::Invite), 1_000);
    assert_eq!(count(Membership::Leave), rows.len() - 1_000, "clients are told that those are gone");
    assert!(rows.len() >= 1_006);
    it.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn invitations_that_others_end_stay_small_and_are_forgotten() {
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    let it = Against::new(&Elsewhere::new(11), honest()).await;
    let app = it.server.server().app();
    let mut rooms: Vec<_> =
        (0..3).map(|number| Elsewhere::of_id(11, &format!("!r{number}:a.example"))).collect();
    for room in &mut rooms {
        let invite = room.add("m.room.member", Some(BOB), json!({ "membership": "invite" }));
        assert_eq!(it.invite(room, &invite).await.0, StatusCode::OK);
    }
    let since = it.bob.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
    for room in &mut rooms {
        let reason = "no".repeat(25_000);
        let end = room.add("m.room.member", Some(BOB), json!({ "membership": "leave", "reason": reason }));
        let (status, told) =
            it.peer.transact(&it.server, room.room_id.as_str(), std::slice::from_ref(&end.json), &[]).await;
        assert_eq!((status, &told["pdus"][end.id.as_str()]), (StatusCode::OK, &json!({})), "{told}");
    }
    let sync = it.bob.ok_get(&format!("/sync?since={since}")).await;
    for room in &rooms {
        let told = &sync["rooms"]["leave"][room.room_id.as_str()]["timeline"]["events"];
        assert_eq!(told[0]["content"], json!({ "membership": "leave" }), "{sync}");
        assert_eq!(told[0]["event_id"], room.events.last().unwrap().id.as_str());
    }
    let user = crate::support::user_num(&app.store, BOB);
    let count = || {
        let snapshot = app.store.snapshot();
        let rows = schema::OUTSIDE.prefix::<()>(&*snapshot, (), Direction::Up).unwrap();
        let rows: Vec<_> = rows.map(|row| row.unwrap().1.0).collect();
        assert!(rows.iter().all(|row| row.shown.event.len() <= 2_048), "{rows:?}");
        let known = aqueduct::rooms::members::list_user_rooms(&*snapshot, user).unwrap().count();
        let ids = schema::ROOM_ID.prefix::<()>(&*snapshot, (), Direction::Up).unwrap().count();
        (rows.len(), known, ids)
    };
    assert_eq!(count(), (3, 3, 3));
    // One of them is invited again meanwhile, and that invitation stays.
    let again = rooms[0].add("m.room.member", Some(BOB), json!({ "membership": "invite" }));
    assert_eq!(it.invite(&rooms[0], &again).await.0, StatusCode::OK);
    app.env.sleep(2 * DAY).await;
    assert_eq!(count(), (3, 3, 3), "clients are told for some days");
    app.env.sleep(3 * DAY).await;
    // The last room keeps its number, so that no other room gets it.
    assert_eq!(count(), (1, 1, 2));
    assert!(invited(&it.bob, rooms[0].room_id.as_str()).await.is_object());
    it.server.assert_whole();
}
