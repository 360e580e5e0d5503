//! What is known of another server's health, as a value that can be stored.
//!
//! A server that does not answer is asked ever more seldom, so that neither we nor it spend much on it, and at once again
//! when it is heard from. The functions are plain: state, time and a random number go in, the new state comes out.

use serde::{Deserialize, Serialize};

const MINUTE_MS: u64 = 60_000;
const HOUR_MS: u64 = 60 * MINUTE_MS;

/// Says how fast waiting grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// The wait after the first failure, in milliseconds.
    pub first_ms: u64,
    /// The longest wait, in milliseconds.
    pub most_ms: u64,
}

impl Pace {
    /// For sending to a server: half a minute, then twice as long each time, up to a day.
    pub const DESTINATION: Self = Self { first_ms: MINUTE_MS / 2, most_ms: 24 * HOUR_MS };

    /// For look-ups that somebody waits for (keys, well-known answers): a minute at first, up to an hour.
    pub const LOOK_UP: Self = Self { first_ms: MINUTE_MS, most_ms: HOUR_MS };

    /// The wait after this many failures, without jitter.
    const fn wait_ms(self, failures: u32) -> u64 {
        let doublings = failures.saturating_sub(1);
        // Above 63 doublings the factor has no place in 64 bits; the bound is reached long before.
        let factor = if doublings < 63 { 1_u64 << doublings } else { 1 << 63 };
        let wait = self.first_ms.saturating_mul(factor);
        if wait < self.most_ms { wait } else { self.most_ms }
    }
}

/// A server that failed lately. A healthy server has no such state: it costs nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failing {
    /// The number of failures in a row, at least 1.
    pub failures: u32,
    /// The first of them, in milliseconds since the epoch.
    pub since_ms: u64,
    /// It is not asked again before this time.
    pub next_try_ms: u64,
}

/// The state after one more failure. `random` is any number: a quarter of the wait goes by it, so that many who failed
/// together do not come back together.
pub const fn failed(before: Option<Failing>, pace: Pace, now_ms: u64, random: u64) -> Failing {
    let (failures, since_ms) = match before {
        Some(before) => (before.failures.saturating_add(1), before.since_ms),
        None => (1, now_ms),
    };
    let wait_ms = pace.wait_ms(failures);
    let jitter_ms = wait_ms / 4;
    let less_ms = if jitter_ms == 0 { 0 } else { random % jitter_ms };
    Failing { failures, since_ms, next_try_ms: now_ms.saturating_add(wait_ms - less_ms) }
}

/// The state once a request succeeded, or the server itself asked something of us: it is up, so nothing is waited for.
pub const fn heard_from() -> Option<Failing> {
    None
}

/// Whether the server may be asked now. A wait that is longer than any can be was written by a clock that went back since.
pub const fn may_try(state: Option<Failing>, pace: Pace, now_ms: u64) -> bool {
    match state {
        Some(failing) => failing.next_try_ms <= now_ms || failing.next_try_ms - now_ms > pace.most_ms,
        None => true,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn waiting_doubles_up_to_a_day_and_ends_at_once() {
        let mut state = None;
        let mut now_ms = 1000;
        let mut waits = Vec::new();
        for _ in 0..14 {
            assert!(may_try(state, Pace::DESTINATION, now_ms));
            let failing = failed(state, Pace::DESTINATION, now_ms, 0);
            waits.push((failing.next_try_ms - now_ms) / 1000);
            assert!(!may_try(Some(failing), Pace::DESTINATION, failing.next_try_ms - 1));
            now_ms = failing.next_try_ms;
            state = Some(failing);
        }
        assert_eq!(waits[..4], [30, 60, 120, 240]);
        assert_eq!(waits[12..], [86_400, 86_400]);
        assert_eq!(state.map(|it| (it.failures, it.since_ms)), Some((14, 1000)));
        assert!(may_try(heard_from(), Pace::DESTINATION, now_ms));
    }

    #[test]
    fn a_clock_that_went_back_holds_nobody_up() {
        let failing = failed(None, Pace::LOOK_UP, 10_000_000_000, 0);
        assert!(may_try(Some(failing), Pace::LOOK_UP, 5));
    }

    proptest! {
        #[test]
        fn every_wait_is_bounded(failures in any::<u32>(), now_ms in any::<u64>(), random in any::<u64>()) {
            let before = Failing { failures, since_ms: 0, next_try_ms: 0 };
            let after = failed(Some(before), Pace::DESTINATION, now_ms, random);
            prop_assert!(after.next_try_ms >= now_ms);
            prop_assert!(after.next_try_ms - now_ms <= Pace::DESTINATION.most_ms);
            prop_assert!(after.failures >= 1);
        }
    }
}
