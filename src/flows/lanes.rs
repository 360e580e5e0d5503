//! Places for work that waits for other servers. How long they take is theirs to choose, and neither names of servers nor rooms cost
//! them anything, so that places of one kind would all be held by whoever is slow.
//!
//! Work begins in a quick lane, in which those who pay for it come in turn. When it has been there for a while its place is given to
//! the next, and it goes on among the slow. Where these are as many as may be, the payer who has most of them gives up the one that
//! takes longest, if somebody else comes who has fewer. Work that was slow before begins there.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::{
    env::{
        Env,
        payer::{Payer, Payers},
    },
    flows::places::Places,
};

/// Work that has held its place for this long is slow, unless its kind is to be quicker.
pub(crate) const SLOW_AFTER: Duration = Duration::from_secs(10);
/// Work waits at most this long for a place in the quick lane.
const WAITS_MAX: Duration = Duration::from_secs(60);
/// At most this much work waits for a place of one kind, in memory, unless the kind may have more.
const WAITING_MAX: usize = 1_000;
/// It takes at least this many payers to have as much wait.
const WAITING_PAYERS_MIN: usize = 16;

/// The places of one kind of work. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Lanes {
    waiting: Places,
    quick: Places,
    slow: Slow,
    slow_after: Duration,
}

/// Whether work of its kind is known to be slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    Unknown,
    Slow,
}

/// The reason for which work has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoPlace {
    /// It has not begun, because there is no place for it.
    Full,
    /// It was slow, and made room for others.
    GaveWay,
}

impl Lanes {
    /// Lanes with so many places for work that is quick, of which a payer has at most one in `payers_min`, and so many for work that
    /// is slow.
    pub(crate) fn new((quick, payers_min): (usize, usize), slow: usize) -> Self {
        Self {
            waiting: Places::new(WAITING_MAX, WAITING_PAYERS_MIN),
            quick: Places::new(quick, payers_min),
            slow: Slow::new(slow),
            slow_after: SLOW_AFTER,
        }
    }

    /// Lets so much work wait for a place.
    pub(crate) fn with_waiting(self, count: usize) -> Self {
        Self { waiting: Places::new(count, WAITING_PAYERS_MIN), ..self }
    }

    /// Lets a payer have at most so much slow work.
    pub(crate) fn with_slow_of_payer(self, count: usize) -> Self {
        Self { slow: Slow::of_each(self.slow.0.count, count), ..self }
    }

    /// Counts work as slow that has held its place for this long.
    pub(crate) fn slow_after(self, slow_after: Duration) -> Self {
        Self { slow_after, ..self }
    }

    /// Does this work in a place that these payers have. It is dropped where it has to make room.
    pub(crate) async fn run<T>(
        &self,
        env: &Env,
        (payers, pace): (Payers, Pace),
        work: impl Future<Output = T>,
    ) -> Result<T, NoPlace> {
        tokio::pin!(work);
        if pace == Pace::Unknown {
            let waiting = payers.for_now(|| self.waiting.enter()).ok_or(NoPlace::Full)?;
            let place = tokio::select! {
                biased;
                place = payers.during(self.quick.wait()) => place,
                () = env.sleep(WAITS_MAX) => return Err(NoPlace::Full),
            };
            drop(waiting);
            tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                () = env.sleep(self.slow_after) => {}
            }
            drop(place);
        }
        let Some(place) = self.slow.enter(payers) else {
            return Err(if pace == Pace::Slow { NoPlace::Full } else { NoPlace::GaveWay });
        };
        tokio::select! {
            biased;
            done = &mut work => Ok(done),
            () = place.gives_way.cancelled() => Err(NoPlace::GaveWay),
        }
    }
}

/// Places for work that is slow.
#[derive(Clone, Debug)]
struct Slow(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    count: usize,
    of_payer_max: usize,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    /// The places that are held, by a number that rises with the time at which they were taken.
    places: BTreeMap<u64, (Payer, CancellationToken)>,
    last: u64,
}

/// A place among the slow, which is free again when this is dropped.
struct SlowPlace {
    of: Slow,
    number: u64,
    /// Cancelled when the work has to make room.
    gives_way: CancellationToken,
}

impl Slow {
    fn new(count: usize) -> Self {
        Self::of_each(count, count)
    }

    /// Makes so many places, of which a payer has at most so many.
    fn of_each(count: usize, of_payer_max: usize) -> Self {
        Self(Arc::new(Inner { count, of_payer_max, held: Mutex::default() }))
    }

    /// Takes a place for these payers; `None` where all are taken and nobody has many more than they would have. Whoever pays first
    /// counts alone: names of servers are cheap.
    fn enter(&self, payers: Payers) -> Option<SlowPlace> {
        let mut held = self.0.held.lock();
        let own = held.places.values().filter(|(payer, _)| *payer == payers.first()).count();
        if own >= self.0.of_payer_max {
            return None;
        }
        if held.places.len() >= self.0.count {
            let number = held.find_giving_way(payers.first())?;
            let (_, gives_way) = held.places.remove(&number)?;
            gives_way.cancel();
        }
        held.last += 1;
        let (number, gives_way) = (held.last, CancellationToken::new());
        held.places.insert(number, (payers.first(), gives_way.clone()));
        Some(SlowPlace { of: self.clone(), number, gives_way })
    }
}

impl Held {
    /// Finds the place that is given up for one more of this payer: the oldest of the payer who has most, if that has more than
    /// this one then.
    fn find_giving_way(&self, newcomer: Payer) -> Option<u64> {
        // Each payer's number of places, and the oldest of them.
        let mut by_payer = BTreeMap::<Payer, (usize, u64)>::new();
        for (number, (payer, _)) in &self.places {
            by_payer.entry(*payer).or_insert((0, *number)).0 += 1;
        }
        let own = by_payer.remove(&newcomer).map_or(0, |(count, _)| count);
        // Among those who have as many, the one whose place is oldest gives way.
        let largest =
            by_payer.into_values().max_by_key(|(count, oldest)| (*count, std::cmp::Reverse(*oldest)));
        largest.filter(|(count, _)| *count > own + 1).map(|(_, oldest)| oldest)
    }
}

impl Drop for SlowPlace {
    fn drop(&mut self) {
        self.of.0.held.lock().places.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use futures_util::FutureExt;

    use super::*;
    use crate::ids::UserNum;

    fn of(user: u64) -> Payers {
        Payers::of_work(Some(UserNum(user)), &format!("s{user}.example"))
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_is_slow_gives_its_place_to_the_next_and_goes_on() {
        let (lanes, env) = (Lanes::new((2, 1), 1), Env::simulated(1, 0));
        let run = |user, takes| {
            let (lanes, env) = (lanes.clone(), env.clone());
            async move {
                let work = async { env.sleep(Duration::from_secs(takes)).await };
                let ran = lanes.run(&env, (of(user), Pace::Unknown), work).await;
                (ran, env.uptime().as_secs())
            }
        };
        let runs = [run(1, 100), run(1, 1_000), run(2, 1), run(3, 9)];
        let ran = futures_util::future::join_all(runs).await;
        assert_eq!(ran[0], (Ok(()), 100), "it goes on among the slow");
        assert_eq!(ran[1], (Err(NoPlace::GaveWay), 10), "there is no place for the second of one user");
        assert_eq!(ran[2..], [(Ok(()), 11), (Ok(()), 19)], "others wait for the first seconds alone");
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_has_many_slow_ones_gives_way_to_whoever_has_fewer() {
        let (lanes, env) = (Lanes::new((1, 1), 4), Env::simulated(1, 0));
        let begin = |user| {
            let (lanes, env) = (lanes.clone(), env.clone());
            let mut run =
                async move { lanes.run(&env, (of(user), Pace::Slow), pending::<()>()).await }.boxed();
            match run.as_mut().now_or_never() {
                Some(done) => std::future::ready(done).boxed(),
                None => run,
            }
        };
        let ended = |run: &mut futures_util::future::BoxFuture<'static, Result<(), NoPlace>>| {
            run.as_mut().now_or_never()
        };
        let mut greedy: Vec<_> = (0..5).map(|_| begin(1)).collect();
        assert_eq!(ended(&mut greedy[4]), Some(Err(NoPlace::Full)), "nobody gives way to oneself");
        let mut others = [begin(2), begin(3)];
        let gone: Vec<_> = greedy[..4].iter_mut().map(ended).collect();
        let gave_way = Some(Err(NoPlace::GaveWay));
        assert_eq!(gone, [gave_way, gave_way, None, None], "those that take longest");
        assert!(others.iter_mut().all(|other| ended(other).is_none()));
        assert_eq!(ended(&mut begin(3)), Some(Err(NoPlace::Full)), "then they would have as many");
        let mut fourth = begin(4);
        assert!(ended(&mut fourth).is_none() && ended(&mut greedy[2]) == gave_way);
        assert_eq!(ended(&mut begin(5)), Some(Err(NoPlace::Full)), "everybody has one");
        drop((greedy, others, fourth));
        assert!(lanes.slow.0.held.lock().places.is_empty());
    }
}
