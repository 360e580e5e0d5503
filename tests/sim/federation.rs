//! Simulates several whole servers in one process, from one seed: each with the real router and flows over a memory engine of
//! its own, random people on each, and between them a network that delays, loses, doubles and reorders what they say, parts them
//! and heals again, while each server may crash between any two steps. One more server follows a script and lies.
//!
//! Then all faults end and time passes; at rest the servers of a room must agree on it, and nobody may have missed anything.
//! `cargo test --test sim federation` runs [`SEEDS`] seeds; `AQUEDUCT_SEED` and `AQUEDUCT_SEEDS` are those of the simulation of one server,
//! and `AQUEDUCT_FIRST_SEED` is where a hunt begins. A
//! failure says what each server has of what they do not agree on, and a replay prints all events of the room besides.

mod checks;
mod encrypted;
mod follower;
mod liar;
mod people;
mod report;
mod wire;
mod world;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use parking_lot::Mutex;

use crate::number;

/// The number of seeds that are run unless `AQUEDUCT_SEEDS` says otherwise.
const SEEDS: u64 = 200;

/// Once this many seeds have failed, no further ones are begun.
const FAILURES_MAX: usize = 5;

/// Counts what a world was driven through.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    /// Requests on the network between servers, and what happened to them.
    pub(crate) carried: wire::Carried,
    /// The number of crashes of servers.
    pub(crate) crashes: u64,
    /// Events that a server holds in the timelines of its rooms, once for each server.
    pub(crate) events: u64,
    /// Events of these that cite more than one event, so that a fork ended there.
    pub(crate) forks: u64,
    /// Events that a server keeps aside, because they were rejected or soft-failed.
    pub(crate) aside: u64,
    /// Messages between devices that arrived.
    pub(crate) to_device: u64,
    /// Rounds of closing messages that were needed until all servers agreed.
    pub(crate) rounds: u64,
    /// Requests of clients that were not answered in time.
    pub(crate) too_long: u64,
    /// Lies that were told.
    pub(crate) lies: u64,
}

impl Counts {
    fn add(&mut self, other: &Self) {
        self.carried.requests += other.carried.requests;
        self.carried.faults += other.carried.faults;
        self.carried.parted += other.carried.parted;
        self.carried.joins += other.carried.joins;
        self.crashes += other.crashes;
        self.events += other.events;
        self.forks += other.forks;
        self.aside += other.aside;
        self.to_device += other.to_device;
        self.rounds += other.rounds;
        self.too_long += other.too_long;
        self.lies += other.lies;
    }
}

/// Runs one seed; answers what was driven through, and a digest of all that happened.
fn run(seed: u64, is_loud: bool) -> (Counts, u64) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, world::live(seed, is_loud))
}

#[test]
fn whatever_happens_between_servers_they_agree_in_the_end_and_nobody_misses_anything() {
    if let Some(seed) = number("AQUEDUCT_SEED") {
        let (counts, _) = run(seed, true);
        println!("seed {seed} is fine: {counts:?}");
        return;
    }
    let seeds = number("AQUEDUCT_SEEDS").unwrap_or(SEEDS);
    let first = number("AQUEDUCT_FIRST_SEED").unwrap_or(0);
    let end = first + seeds;
    let (next, counts) = (AtomicU64::new(first), Mutex::new(Counts::default()));
    let failed = Mutex::new(Vec::new());
    let began = Instant::now();
    let workers = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|threads| {
        for _ in 0..workers {
            threads.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= end {
                        return;
                    }
                    match catch_unwind(AssertUnwindSafe(|| run(seed, false))) {
                        Ok((counted, _)) => counts.lock().add(&counted),
                        Err(_) => {
                            println!("the panic above is that of seed {seed}, or beside it");
                            let mut failed = failed.lock();
                            failed.push(seed);
                            if failed.len() >= FAILURES_MAX {
                                next.store(end, Ordering::SeqCst);
                            }
                        }
                    }
                }
            });
        }
    });
    let counts = *counts.lock();
    println!("{seeds} seeds of several servers, {:.1} s: {counts:?}", began.elapsed().as_secs_f64());
    let mut failed = failed.into_inner();
    failed.sort_unstable();
    assert!(
        failed.is_empty(),
        "seeds {failed:?} failed; replay each: AQUEDUCT_SEED={} cargo test --test sim federation -- --nocapture",
        failed[0]
    );
    assert!(counts.crashes >= seeds && counts.carried.faults >= seeds, "the faults did not happen");
    assert!(
        counts.carried.joins >= seeds && counts.forks >= seeds,
        "the servers had little to do with one another"
    );
}

#[test]
fn a_seed_of_several_servers_replays_the_same() {
    let seed = 1_000_003;
    assert_eq!(run(seed, false).1, run(seed, false).1, "seed {seed}");
}
