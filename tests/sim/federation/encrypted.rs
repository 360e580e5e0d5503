//! People on several servers who encrypt all that they say, with devices that are vodozemac's: under the faults of the simulation of several
//! servers they upload keys, claim those of others, send each other the keys of the room, log devices in and out, come and go.
//!
//! At the end each device must have been told of the devices that there are, must have each message between devices once, and
//! must decrypt each message whose key was sent to it. `tests/clients/olm/run` builds the program that encrypts, and runs this.
//! A replay is not exact, because vodozemac's keys come from the machine's randomness.

mod checks;
mod device;
mod olm;
mod person;

use std::{rc::Rc, time::Instant};

use tokio::task::JoinSet;

use super::world::{SERVERS, World, log};
use crate::{checks as rows, number};
use person::Persons;

/// The number of seeds that are run unless `AQUEDUCT_SEEDS` says otherwise.
const SEEDS: u64 = 20;

/// Counts what a world was driven through.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counted {
    /// Messages in the room that were answered.
    pub(crate) said: u64,
    /// Messages that somebody decrypted, once for each device.
    pub(crate) decrypted: u64,
    /// Messages between devices that arrived.
    pub(crate) arrived: u64,
    /// One-time keys that were given.
    pub(crate) given: u64,
    /// Fallback keys that were given.
    pub(crate) fallback: u64,
    /// Devices that were logged out.
    pub(crate) logged_out: u64,
}

async fn live(seed: u64, is_loud: bool) -> Counted {
    let _logging = is_loud.then(log);
    let world = World::begin(seed, is_loud);
    let mut tasks = JoinSet::new();
    let persons = Persons::begin(&world, &mut tasks);
    Rc::clone(&world).disturb(&mut tasks).await;
    world.wire.calm();
    world.wire.note(|| "all faults have ended".to_owned());
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            std::panic::resume_unwind(error.into_panic());
        }
    }
    checks::settle(&world, &persons).await;
    for place in 0..SERVERS {
        world.crash(place, false).await;
    }
    checks::all(&world, &persons).await;
    for place in 0..SERVERS {
        rows::store(&world.app(place).unwrap().store);
    }
    world.wire.assert_right();
    world.end().await;
    persons.counted.get()
}

#[test]
#[ignore = "it needs the program that encrypts: run tests/clients/olm/run"]
fn whoever_was_sent_the_key_of_a_message_decrypts_it_whatever_happens_between_servers() {
    let seeds = number("AQUEDUCT_SEEDS").unwrap_or(SEEDS);
    let first = number("AQUEDUCT_FIRST_SEED").unwrap_or(0);
    let (one, began) = (number("AQUEDUCT_SEED"), Instant::now());
    let mut all = Counted::default();
    for seed in one.map_or(first..first + seeds, |seed| seed..seed + 1) {
        println!("seed {seed}");
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let counted = tokio::task::LocalSet::new().block_on(&runtime, live(seed, one.is_some()));
        assert!(counted.said > 0 && counted.decrypted > counted.said, "{counted:?}");
        all.said += counted.said;
        all.decrypted += counted.decrypted;
        all.arrived += counted.arrived;
        all.given += counted.given;
        all.fallback += counted.fallback;
        all.logged_out += counted.logged_out;
    }
    println!("{:.1} s: {all:?}", began.elapsed().as_secs_f64());
    assert!(all.given > 0 && all.logged_out > 0 || one.is_some(), "{all:?}");
}
