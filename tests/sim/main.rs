//! Simulates one whole server in one process, from one seed: the real router and flows over the memory engine, a clock that
//! only moves when nothing else does, random clients, a disk that takes its time, and crashes between any two steps that
//! lose any suffix of what was not flushed.
//!
//! `cargo test --test sim` runs [`SEEDS`] seeds; a failure prints its seed. `AQUEDUCT_SEED=8412 cargo test --test sim`
//! replays it, with what everybody did. `AQUEDUCT_SEEDS=100000` hunts.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "what is not as expected fails the test; the simulated world has threads and a clock of its own"
)]

mod accounts;
mod builders;
#[path = "../support/chain.rs"]
mod chain;
mod checks;
mod devices;
mod federation;
mod rooms;
mod world;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

/// The number of seeds that are run unless `AQUEDUCT_SEEDS` says otherwise.
const SEEDS: u64 = 1_000;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Runs one seed; answers how often the server crashed, and a digest of all that happened.
fn run(seed: u64, is_loud: bool) -> (u64, u64) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, world::live(seed, is_loud))
}

#[test]
fn whatever_happens_what_was_acknowledged_is_there_once_and_nobody_misses_anything() {
    if let Some(seed) = number("AQUEDUCT_SEED") {
        let (crashes, _) = run(seed, true);
        println!("seed {seed} is fine, with {crashes} crashes");
        return;
    }
    let seeds = number("AQUEDUCT_SEEDS").unwrap_or(SEEDS);
    let (next, crashes) = (AtomicU64::new(0), AtomicU64::new(0));
    let began = Instant::now();
    let workers = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|threads| {
        for _ in 0..workers {
            threads.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= seeds {
                        return;
                    }
                    match catch_unwind(AssertUnwindSafe(|| run(seed, false))) {
                        Ok((crashed, _)) => drop(crashes.fetch_add(crashed, Ordering::SeqCst)),
                        Err(_) => {
                            next.store(seeds, Ordering::SeqCst);
                            panic!("seed {seed} failed; replay: AQUEDUCT_SEED={seed} cargo test --test sim");
                        }
                    }
                }
            });
        }
    });
    let crashes = crashes.load(Ordering::SeqCst);
    println!("{seeds} seeds, {crashes} crashes, {:.1} s", began.elapsed().as_secs_f64());
    assert!(crashes >= seeds, "the crashes did not happen");
}

#[test]
fn a_seed_replays_the_same() {
    for seed in [3, 1_000_003] {
        assert_eq!(run(seed, false), run(seed, false), "seed {seed}");
    }
}
