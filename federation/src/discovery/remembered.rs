//! Well-known answers that are remembered
//! ([step 3](https://spec.matrix.org/v1.19/server-server-api/#resolving-server-names)).
//!
//! An answer is kept as long as its headers say, within bounds; an error for at most an hour, shorter at first. A host that
//! delegated before and does not answer for a while still delegates, until its last answer is 48 hours old: a web server that is
//! restarted must not cut a Matrix server off.

use crate::{
    backoff::{Failing, Pace, failed},
    discovery::{freshness, name::Name, well_known::Asked},
};

/// What specification recommends for errors, at most.
const ERROR_KEPT_MAX_MS: u64 = 3_600_000;

/// What is known of a host's well-known answer.
#[derive(Clone, Debug)]
pub(super) struct Remembered {
    /// The server it delegates to, or why there is none.
    pub(super) answer: Result<Name, String>,
    /// The answer holds until then, in milliseconds since the epoch.
    pub(super) until_ms: u64,
    /// It was asked for at this time.
    asked_ms: u64,
    /// Set while the host does not answer.
    failing: Option<Failing>,
    /// The last server that it delegated to, and when it said so.
    delegated: Option<(Name, u64)>,
}

impl Remembered {
    /// What is known after one more answer.
    pub(super) fn after(before: Option<&Self>, asked: Asked, now_ms: u64, random: u64) -> Self {
        match asked {
            Asked::Delegates { to, kept_ms } => Self {
                answer: Ok(to.clone()),
                until_ms: now_ms.saturating_add(kept_ms),
                asked_ms: now_ms,
                failing: None,
                delegated: Some((to, now_ms)),
            },
            Asked::No { why, kept_ms } => Self {
                answer: Err(why),
                until_ms: now_ms.saturating_add(kept_ms.min(ERROR_KEPT_MAX_MS)),
                asked_ms: now_ms,
                failing: None,
                delegated: None,
            },
            Asked::Failed { why } => {
                let failing = failed(before.and_then(|it| it.failing), Pace::LOOK_UP, now_ms, random);
                let is_recent = |since_ms: u64| now_ms.saturating_sub(since_ms) < freshness::MOST_MS;
                let delegated =
                    before.and_then(|it| it.delegated.clone()).filter(|(_, since_ms)| is_recent(*since_ms));
                Self {
                    answer: delegated.as_ref().map_or(Err(why), |(name, _)| Ok(name.clone())),
                    until_ms: failing.next_try_ms,
                    asked_ms: now_ms,
                    failing: Some(failing),
                    delegated,
                }
            }
        }
    }

    /// Whether it still holds. An answer from the future was written before the clock went back, and holds no more.
    pub(super) const fn holds(&self, now_ms: u64) -> bool {
        self.asked_ms <= now_ms && now_ms < self.until_ms
    }

    /// Makes it due, if it is older than this: what it led to does not work.
    pub(super) const fn doubt(&mut self, now_ms: u64, older_than_ms: u64) {
        if now_ms.saturating_sub(self.asked_ms) >= older_than_ms {
            self.until_ms = now_ms;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR_MS: u64 = 3_600_000;

    fn delegates(to: &str, kept_ms: u64) -> Asked {
        Asked::Delegates { to: Name::parse(to).unwrap(), kept_ms }
    }

    fn fails() -> Asked {
        Asked::Failed { why: "no answer".to_owned() }
    }

    #[test]
    fn errors_are_kept_for_an_hour_at_most_and_shorter_at_first() {
        let no = Asked::No { why: "404".to_owned(), kept_ms: 24 * HOUR_MS };
        let known = Remembered::after(None, no, 1000, 0);
        assert!(known.answer.is_err() && known.holds(1000 + HOUR_MS - 1) && !known.holds(1000 + HOUR_MS));
        let mut known = None;
        let mut waits = Vec::new();
        let mut now_ms = 1000;
        for _ in 0..8 {
            let next = Remembered::after(known.as_ref(), fails(), now_ms, 0);
            waits.push((next.until_ms - now_ms) / 60_000);
            now_ms = next.until_ms;
            known = Some(next);
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
    }

    #[test]
    fn a_host_that_stops_answering_still_delegates_for_two_days() {
        let mut known = Remembered::after(None, delegates("d.example", HOUR_MS), 0, 0);
        let mut now_ms = HOUR_MS;
        while now_ms < 48 * HOUR_MS {
            known = Remembered::after(Some(&known), fails(), now_ms, 0);
            assert_eq!(known.answer.as_ref().unwrap().written, "d.example");
            now_ms = known.until_ms;
        }
        known = Remembered::after(Some(&known), fails(), now_ms, 0);
        assert!(known.answer.is_err());
        let known = Remembered::after(Some(&known), delegates("e.example", HOUR_MS), now_ms, 0);
        let no = Asked::No { why: "404".to_owned(), kept_ms: HOUR_MS };
        assert!(Remembered::after(Some(&known), no, now_ms, 0).answer.is_err(), "it says that it does not");
    }

    #[test]
    fn doubt_makes_an_old_answer_due() {
        let mut known = Remembered::after(None, delegates("d.example", 24 * HOUR_MS), 0, 0);
        known.doubt(HOUR_MS - 1, HOUR_MS);
        assert!(known.holds(HOUR_MS - 1));
        known.doubt(HOUR_MS, HOUR_MS);
        assert!(!known.holds(HOUR_MS));
    }
}
