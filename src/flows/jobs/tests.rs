//! Slow jobs, and very many, beside one that somebody waits for.

use std::time::Duration;

use super::*;
use crate::{
    config::Config,
    env::Env,
    ids::{EventNum, RoomNum, UserNum},
    server::{Lead, Server},
    store::{Durability, Engine, Store, engine::Memory},
};

fn server() -> Server {
    let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
    Server::start(Config::default(), Env::simulated(1, 0), store, Some(Lead::of_only_node())).unwrap()
}

fn set(app: &App, timers: &[Timer]) {
    let mut batch = app.store.batch(&Guard::own_tables());
    timers.iter().for_each(|timer| timer::set(&mut batch, timer));
    drop(app.store.enqueue(batch).unwrap());
}

/// Counts the timers of a kind that are due or were put off, and those of them that were tried.
fn count(app: &App, kind: u8) -> (usize, usize) {
    let all = timer::list_due(&app.store.view(), u64::MAX, 100_000, |of| of == kind).unwrap();
    (all.len(), all.iter().filter(|timer| timer.row.tries > 0).count())
}

/// A job that fails at once, because there is no such user, and shows by that that it had its turn.
fn waited_for() -> Job {
    Job::TellRooms { user: UserNum(7) }
}

#[tokio::test(start_paused = true)]
async fn jobs_that_take_long_hold_up_neither_other_kinds_nor_other_owners() {
    let server = server();
    let app = server.app();
    app.env.sleep(Duration::from_secs(10)).await;
    let now_ms = app.env.now_ms();
    // They are slow: none of them ends before the end of the test.
    let slow: Vec<_> = (1..=200).map(|room| Job::Sweep { room: RoomNum(room) }.timer(now_ms)).collect();
    let runs: Vec<_> = slow.iter().map(|slow| app.running.begin_in_place(slow, Owner::of(slow))).collect();
    assert_eq!(runs.iter().filter(|run| matches!(run, Begun::Run(_))).count(), line::OF_KIND_MAX);
    set(app, &slow);
    set(app, &[waited_for().timer(now_ms + 1)]);
    app.env.sleep(Duration::from_secs(3)).await;
    assert_eq!(count(app, waited_for().kind()), (1, 1), "it had its turn");
    drop(runs);
    app.env.sleep(Duration::from_secs(5)).await;
    let (left, tried) = count(app, slow[0].kind);
    assert_eq!(left, tried, "all of the others had their turn, too");
    // A user whose jobs are slow holds up no other user.
    let carry = |user, room| {
        let moved =
            crate::schema::jobs::Move { from: "!a:s".try_into().unwrap(), to: "!b:s".try_into().unwrap() };
        Job::CarryOver { user: UserNum(user), room: RoomNum(room), moved }.timer(app.env.now_ms())
    };
    let slow: Vec<_> = (1..=200).map(|room| carry(1, room)).collect();
    let runs: Vec<_> = slow.iter().map(|slow| app.running.begin_in_place(slow, Owner::of(slow))).collect();
    assert_eq!(runs.iter().filter(|run| matches!(run, Begun::Run(_))).count(), line::OF_OWNER_MAX);
    let other = carry(2, 1);
    set(app, &slow);
    set(app, std::slice::from_ref(&other));
    app.env.sleep(Duration::from_secs(3)).await;
    assert!(!timer::is_waiting(&app.store.view(), &other).unwrap(), "it had its turn");
    let held_up = slow.iter().filter(|slow| timer::is_waiting(&app.store.view(), slow).unwrap()).count();
    assert_eq!(held_up, slow.len());
    drop(runs);
}

#[tokio::test(start_paused = true)]
async fn very_many_jobs_of_one_room_do_not_come_before_what_others_wait_for() {
    let server = server();
    let app = server.app();
    app.env.sleep(Duration::from_secs(10)).await;
    let now_ms = app.env.now_ms();
    let many: Vec<_> = (0..4_000)
        .map(|event| Job::ForgetOriginal { room: RoomNum(9), event: EventNum(event) }.timer(now_ms - 5))
        .collect();
    set(app, &many);
    set(app, &[waited_for().timer(now_ms)]);
    app.env.sleep(Duration::from_millis(2_500)).await;
    assert_eq!(count(app, waited_for().kind()), (1, 1), "it had its turn though it was due last");
    let (_, tried) = count(app, many[0].kind);
    assert!(tried < 2_000, "a bounded number fires a second: {tried}");
    app.env.sleep(Duration::from_secs(20)).await;
    let (left, tried) = count(app, many[0].kind);
    assert_eq!(left, tried, "all of them had their turn");
}
