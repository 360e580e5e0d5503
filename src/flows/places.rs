//! Places for what users have this server ask of others. Whoever pays for it holds no more than a share of them, and those who wait
//! for one get it in turn: each payer has a line of its own.

use crate::env::{
    payer,
    pool::{Permit, Pool},
};

/// Places. A clone is another handle to the same ones.
#[derive(Clone)]
pub(crate) struct Places(Pool);

/// A place, which is free again when this is dropped.
pub(crate) struct Place {
    _permit: Permit,
}

impl std::fmt::Debug for Places {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Places").field("taken_or_waited_for", &self.0.call_count()).finish()
    }
}

impl Places {
    /// Makes so many places, of which a payer holds at most one in `payers_min`.
    pub(crate) fn new(count: usize, payers_min: usize) -> Self {
        Self(Pool::of_places(count, (count / payers_min).max(1)))
    }

    /// Takes a place for whom the current task works; `None` where there is none, or where they hold their share.
    pub(crate) fn enter(&self) -> Option<Place> {
        self.0.try_take(payer::current()).map(|permit| Place { _permit: permit })
    }

    /// Takes a place for whom the current task works, in turn, as soon as there is one and they hold less than their share. The
    /// caller bounds how many of it wait, and for how long.
    pub(crate) async fn wait(&self) -> Place {
        match self.0.take(payer::current()).await {
            Ok(permit) => Place { _permit: permit },
            // Any number may wait, so that nobody is turned away.
            Err(_) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::env::payer::Payers;

    #[test]
    fn nobody_holds_more_than_a_share() {
        let places = Places::new(8, 4);
        let of = |last: u8| Payers::of_request(None, [192, 0, 2, last].into());
        let enter = |last| of(last).for_now(|| places.enter());
        let held: Vec<_> = (0..2).map(|_| enter(1).unwrap()).collect();
        assert!(enter(1).is_none());
        let others: Vec<_> = (2..5).flat_map(|last| [enter(last).unwrap(), enter(last).unwrap()]).collect();
        assert!(enter(9).is_none(), "all are taken");
        drop(held);
        assert!(enter(9).is_some() && enter(1).is_some());
        drop(others);
        assert_eq!(places.0.call_count(), 0);
    }

    #[tokio::test]
    async fn whoever_waits_gets_what_is_given_back() {
        let places = Places::new(2, 2);
        let of = |last: u8| Payers::of_request(None, [192, 0, 2, last].into());
        let first = of(1).for_now(|| places.enter()).unwrap();
        let mut second = Box::pin(of(1).during(places.wait()));
        assert!((&mut second).now_or_never().is_none(), "the share is held");
        let other = of(2).during(places.wait()).await;
        drop(other);
        assert!((&mut second).now_or_never().is_none(), "what another gives back is no share of theirs");
        drop(first);
        drop(second.await);
        assert_eq!(places.0.call_count(), 0);
    }

    #[tokio::test]
    async fn whoever_has_many_waiting_comes_in_turn_with_others() {
        let places = Places::new(1, 1);
        let of = |last: u8| Payers::of_request(None, [192, 0, 2, last].into());
        let held = of(9).for_now(|| places.enter()).unwrap();
        let mut many: Vec<_> = (0..3).map(|_| Box::pin(of(1).during(places.wait()))).collect();
        assert!(many.iter_mut().all(|waits| waits.now_or_never().is_none()));
        let mut other = Box::pin(of(2).during(places.wait()));
        assert!((&mut other).now_or_never().is_none());
        drop(held);
        drop((&mut many[0]).now_or_never().expect("it came first"));
        assert!((&mut other).now_or_never().is_some(), "the others of the first come after this one");
    }
}
