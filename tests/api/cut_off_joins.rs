//! Joins by way of other servers that this server does not see the end of, because it ends itself, or because they do not say it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use aqueduct::{
    schema::jobs::Job,
    store::{Durability, Engine, Store, timer},
};
use federation::testing::{Net, json as answer};
use http::StatusCode;
use serde_json::json;

use crate::{
    remote_joins::{against, api, rooms_of, serve_late, try_join, was_asked},
    support::{
        TestServer, encoded,
        network::doors,
        scripted::{Elsewhere, Tamper, honest},
    },
};

/// Ends the server as a power cut does, and starts it again with what was durable.
fn crashed(server: &TestServer, net: &Net) -> TestServer {
    let Engine::Memory(memory) = server.server().app().store.engine() else { panic!("not in memory") };
    let memory = Engine::Memory(memory.after_crash(0));
    server.server().app().env.kill();
    TestServer::start(doors(net), Store::open(memory, Durability::Fsync).unwrap(), |_| {})
}

/// The number of jobs that look what became of a join.
fn promised(server: &TestServer) -> usize {
    let snapshot = server.server().app().store.snapshot();
    timer::list_due(&*snapshot, u64::MAX, 100, |kind| kind == Job::END_JOIN).unwrap().len()
}

#[tokio::test(start_paused = true)]
async fn a_join_that_a_crash_has_cut_off_is_taken_back_unless_the_user_asks_again() {
    for asks_again in [false, true] {
        let room = Elsewhere::new(11);
        let (mut server, mut bob, _asked, net) = against(&room, honest()).await;
        let env = server.server().app().env.clone();
        let (asked, _open) = serve_late(&net, &env, &room, Duration::from_secs(8));
        let id = encoded(room.room_id.as_str());
        let (joins, at) = (bob.clone(), api(&format!("/join/{id}?via=evil.example")));
        let unanswered = server.begin(async move { joins.post(&at, json!({})).await });
        env.sleep(Duration::from_secs(2)).await;
        assert!(was_asked(&asked, "send_join"), "the other server has taken the join");
        assert_eq!(promised(&server), 1);
        server = crashed(&server, &net);
        drop(unanswered);
        bob.server = server.clone();
        assert!(rooms_of(&bob).await.is_empty(), "nothing of the join was stored");
        if asks_again {
            assert_eq!(try_join(&bob, room.room_id.as_str()).await.0, StatusCode::OK);
        }
        let env = server.server().app().env.clone();
        env.sleep(Duration::from_secs(60)).await;
        assert_eq!(was_asked(&asked, "send_leave"), !asks_again);
        // It stays like that for hours.
        env.sleep(Duration::from_secs(3 * 60 * 60)).await;
        assert_eq!(rooms_of(&bob).await.len(), usize::from(asks_again));
        assert_eq!((was_asked(&asked, "send_leave"), promised(&server)), (!asks_again, 0));
        // In both cases the user may come in.
        assert_eq!(try_join(&bob, room.room_id.as_str()).await.0, StatusCode::OK);
        env.sleep(Duration::from_secs(3 * 60 * 60)).await;
        assert_eq!(rooms_of(&bob).await, [room.room_id.as_str()]);
        server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_left_over_of_a_join_that_counts_or_was_refused() {
    let room = Elsewhere::new(11);
    let (server, bob, _asked, net) = against(&room, honest()).await;
    assert_eq!(try_join(&bob, room.room_id.as_str()).await.0, StatusCode::OK);
    assert_eq!(promised(&server), 0);
    // A crash after that changes nothing.
    let server = crashed(&server, &net);
    let mut bob = bob;
    bob.server = server.clone();
    server.server().app().env.sleep(Duration::from_secs(60)).await;
    assert_eq!(rooms_of(&bob).await, [room.room_id.as_str()]);
    server.assert_whole();
    let refuses: Tamper = Arc::new(|asked, honest| match asked {
        "send_join" => answer(403, r#"{"errcode":"M_FORBIDDEN","error":"no"}"#),
        _ => answer(200, honest.to_string()),
    });
    let (server, bob, asked, _) = against(&room, refuses).await;
    assert_eq!(try_join(&bob, room.room_id.as_str()).await.0, StatusCode::FORBIDDEN);
    assert_eq!(promised(&server), 0);
    server.server().app().env.sleep(Duration::from_secs(3 * 60 * 60)).await;
    assert!(!was_asked(&asked, "make_leave"), "it has nothing to take back");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_has_taken_a_join_and_answers_nothing_more_is_told_when_it_is_back() {
    for restarts in [false, true] {
        let room = Elsewhere::new(11);
        let is_down = Arc::new(AtomicBool::new(false));
        let down = Arc::clone(&is_down);
        let tamper: Tamper = Arc::new(move |asked, honest| {
            // It goes down while it takes the join.
            down.fetch_or(asked == "send_join" && honest["event"].is_object(), Ordering::SeqCst);
            match down.load(Ordering::SeqCst) {
                true => answer(503, "{}"),
                false => answer(200, honest.to_string()),
            }
        });
        let (mut server, mut bob, asked, net) = against(&room, tamper).await;
        assert_eq!(try_join(&bob, room.room_id.as_str()).await.0, StatusCode::BAD_GATEWAY);
        assert!(!was_asked(&asked, "send_leave"), "it gives no template");
        if restarts {
            server = crashed(&server, &net);
            bob.server = server.clone();
        }
        let env = server.server().app().env.clone();
        env.sleep(Duration::from_secs(300)).await;
        assert!(!was_asked(&asked, "send_leave"));
        is_down.store(false, Ordering::SeqCst);
        env.sleep(Duration::from_secs(3 * 60 * 60)).await;
        assert!(was_asked(&asked, "send_leave"), "restarts: {restarts}");
        assert!(rooms_of(&bob).await.is_empty());
        server.assert_whole();
    }
}
