//! Turns in which what events of a room lack is fetched for the tenants of one owner of names (`tenants.rs`).
//!
//! Together they have only so much fetched for a room at once, because names cost nothing. But whoever lets this server wait must not hold
//! up their neighbours. So:
//!
//! 1. Of one tenant one thing at a time is fetched for a room.
//! 2. Tenants of one owner come in turn, each at the end of the line. A turn lasts for [`TURN_MAX`] at most.
//! 3. Whoever has not come to an end by then counts as slow for [`SLOW_FOR`], or until something of theirs comes to an end within its turn. They
//!    go on beside the line, in one of the [`BESIDE_MAX`] places that their owner has there. Where all are taken, one gives way that has been
//!    there for [`KEPT_MIN`], or whoever comes ends; what ends is tried again later.
//! 4. Those who count as slow have a line of their own, and give way at any time to whoever does not. So a tenant who hangs costs neighbours
//!    that are quick one turn, and then none for as long as it counts as slow.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    time::Duration,
};

use federation::turns::{Turn, Turns};
use parking_lot::Mutex;
use ruma::ServerName;
use tokio_util::sync::CancellationToken;

use crate::{
    env::Env,
    flows::remote::{kept::Kept, tenants::Tenant},
    ids::RoomNum,
    rooms::change::invited::Source,
};

/// A turn lasts for this long at most. Other servers mostly answer within a second.
const TURN_MAX: Duration = Duration::from_secs(3);
/// At most this many tenants of one owner go on beside the line in one room.
const BESIDE_MAX: usize = 4;
/// A place beside the line is kept for at least this long where its holder did not count as slow, or whoever comes does: states of large rooms
/// take as long.
const KEPT_MIN: Duration = Duration::from_secs(30);
/// A host that has outlasted its turn counts as slow for this time.
const SLOW_FOR: Duration = Duration::from_secs(60 * 60);
/// The hosts of those have at most this many bytes.
const SLOW_BYTES_MAX: usize = 256 << 10;
/// A host takes this many bytes there beside its own.
const SLOW_OVERHEAD: usize = 64;

/// The tenants for whom something is fetched, or who wait for that.
#[derive(Debug)]
pub(super) struct Neighbours {
    /// The turns of one tenant in a room.
    own: Turns<(RoomNum, Tenant)>,
    /// The turns of the tenants of an owner in a room, apart for those who count as slow.
    lines: Turns<(RoomNum, Source, bool)>,
    beside: Mutex<BTreeMap<(RoomNum, Source), Beside>>,
    /// The hosts that count as slow.
    slow: Kept<String, ()>,
}

impl Default for Neighbours {
    fn default() -> Self {
        let (own, lines) = (Turns::default(), Turns::default());
        Self { own, lines, beside: Mutex::default(), slow: Kept::new(SLOW_BYTES_MAX) }
    }
}

/// Those who go on beside the line of their owner, by numbers that rise.
#[derive(Debug, Default)]
struct Beside {
    places: BTreeMap<u64, Going>,
    last: u64,
}

/// Somebody who goes on beside the line.
#[derive(Debug)]
struct Going {
    /// Whether they counted as slow before.
    was_slow: bool,
    /// The uptime since which they have the place.
    since: Duration,
    /// Cancelled when they have to give way.
    gives_way: CancellationToken,
}

/// The turn of a tenant. It ends when this is dropped.
pub(super) struct Turned<'a> {
    of: &'a Neighbours,
    room: RoomNum,
    tenant: Tenant,
    is_slow: bool,
    _own: Turn<(RoomNum, Tenant)>,
    line: Turn<(RoomNum, Source, bool)>,
}

/// A place beside the line, which is free again when this is dropped.
struct Place<'a> {
    of: &'a Neighbours,
    at: (RoomNum, Source),
    number: u64,
    gives_way: CancellationToken,
}

impl Neighbours {
    /// Waits for the turn of a server in a room.
    pub(super) async fn enter(&self, env: &Env, room: RoomNum, server: &ServerName) -> Turned<'_> {
        let tenant = Tenant::of(server);
        let own = self.own.enter((room, tenant.clone())).await;
        let is_slow = self.slow.find(&tenant.host().to_owned(), env.uptime()).is_some();
        let line = self.lines.enter((room, tenant.owner().clone(), is_slow)).await;
        Turned { of: self, room, tenant, is_slow, _own: own, line }
    }

    /// Takes a place beside the line; `None` where there is none, and nobody gives way.
    fn go_beside(&self, at: (RoomNum, Source), was_slow: bool, now: Duration) -> Option<Place<'_>> {
        let mut all = self.beside.lock();
        let beside = all.entry(at.clone()).or_default();
        if beside.places.len() >= BESIDE_MAX {
            let gives_way =
                |going: &Going| going.was_slow && !was_slow || now.saturating_sub(going.since) >= KEPT_MIN;
            // Those who counted as slow come first, then those who have been there for longest.
            let giving_way = beside.places.iter().filter(|(_, going)| gives_way(going));
            let number = *giving_way.min_by_key(|(number, going)| (!going.was_slow, **number))?.0;
            if let Some(going) = beside.places.remove(&number) {
                going.gives_way.cancel();
            }
        }
        beside.last += 1;
        let (number, gives_way) = (beside.last, CancellationToken::new());
        beside.places.insert(number, Going { was_slow, since: now, gives_way: gives_way.clone() });
        Some(Place { of: self, at, number, gives_way })
    }
}

impl Turned<'_> {
    /// Does this work in the turn, and beside the line where it takes longer; `None` where it had to give way to a neighbour. What is
    /// `held` besides is given back with the turn.
    pub(super) async fn run<T>(
        self,
        env: &Env,
        held: impl Sized,
        work: impl Future<Output = T>,
    ) -> Option<T> {
        let Self { of, room, tenant, is_slow, _own, line } = self;
        let host = tenant.host().to_owned();
        tokio::pin!(work);
        tokio::select! {
            biased;
            done = &mut work => {
                of.slow.forget(&host);
                return Some(done);
            }
            () = env.sleep(TURN_MAX) => {}
        }
        let bytes = host.len() + SLOW_OVERHEAD;
        of.slow.keep(host, (), bytes, env.uptime().saturating_add(SLOW_FOR));
        let place = of.go_beside((room, tenant.owner().clone()), is_slow, env.uptime());
        drop((line, held));
        let place = place?;
        tokio::select! {
            biased;
            done = &mut work => Some(done),
            () = place.gives_way.cancelled() => None,
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut all = self.of.beside.lock();
        if let Entry::Occupied(mut at) = all.entry(self.at.clone()) {
            at.get_mut().places.remove(&self.number);
            if at.get().places.is_empty() {
                at.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use futures_util::{
        FutureExt,
        future::{BoxFuture, Either, join_all, select},
    };

    use super::*;

    const ROOM: RoomNum = RoomNum(1);

    /// Somebody has something fetched that takes this long. Gives whether that came to its end, and when it was over.
    async fn fetch(neighbours: &Neighbours, env: &Env, server: &str, takes: Duration) -> (bool, Duration) {
        let turn = neighbours.enter(env, ROOM, server.try_into().unwrap()).await;
        let done = turn.run(env, (), env.sleep(takes)).await;
        (done.is_some(), env.uptime())
    }

    #[tokio::test(start_paused = true)]
    async fn neighbours_who_hang_cost_one_turn_each_and_none_the_next_time() {
        let (neighbours, env) = (Neighbours::default(), Env::simulated(1, 0));
        let hour = Duration::from_secs(3_600);
        for (round, at_most) in [(0, TURN_MAX * 20), (1, Duration::ZERO)] {
            let began = env.uptime();
            let mut evil: Vec<BoxFuture<'_, _>> = (0..20)
                .map(|number| {
                    let (neighbours, env) = (&neighbours, &env);
                    async move { fetch(neighbours, env, &format!("e{number}.dyn.test"), hour).await }.boxed()
                })
                .collect();
            for hanging in &mut evil {
                assert!(hanging.now_or_never().is_none());
            }
            let quick = Duration::from_millis(100);
            let honest = fetch(&neighbours, &env, "honest.dyn.test", quick);
            let Either::Left(((is_done, at), _)) = select(honest.boxed(), join_all(&mut evil).boxed()).await
            else {
                panic!("those who hang came to an end")
            };
            assert!(is_done);
            assert!(at - began <= at_most + quick, "{round}: {:?}", at - began);
            let beside = neighbours.beside.lock();
            assert!(beside.values().all(|beside| beside.places.len() <= BESIDE_MAX));
            assert!(beside.is_empty() == at_most.is_zero(), "they hang beside the line");
        }
        assert!(neighbours.beside.lock().is_empty(), "nothing is left behind");
    }

    /// Tries again whenever it had to give way, for ever.
    async fn hang(neighbours: &Neighbours, env: &Env, server: String) {
        loop {
            let turn = neighbours.enter(env, ROOM, server.as_str().try_into().unwrap()).await;
            turn.run(env, (), pending::<()>()).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_is_not_known_to_be_slow_has_time_beside_those_who_are() {
        let (neighbours, env) = (Neighbours::default(), Env::simulated(1, 0));
        let long = TURN_MAX * 5;
        let press = join_all((0..20).map(|number| hang(&neighbours, &env, format!("e{number}.dyn.test"))));
        let honest = async {
            env.sleep(TURN_MAX * 40).await;
            let began = env.uptime();
            let (is_done, at) = fetch(&neighbours, &env, "honest.dyn.test", long).await;
            (is_done, at - began)
        };
        let Either::Left(((is_done, took), _)) = select(honest.boxed(), press.boxed()).await else {
            panic!("those who hang came to an end")
        };
        assert!(is_done && took <= long + TURN_MAX, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_came_to_an_end_in_its_turn_is_not_slow_any_more() {
        let (neighbours, env) = (Neighbours::default(), Env::simulated(1, 0));
        let is_slow = |env: &Env| neighbours.slow.find(&"a.dyn.test".to_owned(), env.uptime()).is_some();
        assert!(fetch(&neighbours, &env, "a.dyn.test:1", TURN_MAX * 2).await.0);
        assert!(is_slow(&env));
        assert!(fetch(&neighbours, &env, "a.dyn.test:2", TURN_MAX / 2).await.0);
        assert!(!is_slow(&env));
    }
}
