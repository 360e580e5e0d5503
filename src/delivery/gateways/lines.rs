//! The lines in which pushers wait for a place to send.
//!
//! One line is quick and one is slow. A gateway that takes long over a request goes on among the slow ones, or beside them where these are
//! many, and a pusher whose gateway did not take the last request begins there. Each gateway's host holds a part of the places of a line: a gateway that hangs holds up neither
//! those who use another one, nor for long those who come to it anew.

use std::collections::{BTreeMap, BTreeSet};

/// The number by which the board knows a pusher.
pub(super) type Id = u64;

/// At most this many requests run among the quick ones.
const QUICK_MAX: usize = 256;
/// At most this many of them go to one host.
const QUICK_OF_HOST_MAX: usize = 128;
/// At most this many requests run among the slow ones.
const SLOW_MAX: usize = 256;
/// At most this many of them go to one host.
const SLOW_OF_HOST_MAX: usize = 16;
/// At most this many requests that turned out to be slow run on beside the slow ones. What was sent may have been taken, so that it is not
/// broken off.
const LATE_MAX: usize = 4_096;
/// At most this many of them go to one host.
const LATE_OF_HOST_MAX: usize = 1_024;

/// The line in which a pusher waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    /// The line of gateways that answer soon.
    Quick,
    /// The line of gateways that take long, or took nothing last time.
    Slow,
    /// Requests that turned out to be slow while too many others were. Nobody waits here.
    Late,
}

/// Pushers that wait, by their hosts, and places that are taken.
#[derive(Debug)]
struct Line {
    hosts: BTreeMap<String, Host>,
    /// The hosts with a free place and somebody who waits, by when the first of these is due (milliseconds since the epoch).
    ready: BTreeSet<(u64, String)>,
    running: usize,
    all_max: usize,
    of_host_max: usize,
}

#[derive(Debug, Default)]
struct Host {
    waiting: BTreeSet<(u64, Id)>,
    running: usize,
    /// The time under which it stands among those that are ready.
    ready_ms: Option<u64>,
}

impl Line {
    fn new(all_max: usize, of_host_max: usize) -> Self {
        Self { hosts: BTreeMap::new(), ready: BTreeSet::new(), running: 0, all_max, of_host_max }
    }

    /// Changes what is known of a host, and where it stands among those that are ready.
    fn change<T>(&mut self, name: &str, change: impl FnOnce(&mut Host) -> T) -> T {
        let host = self.hosts.entry(name.to_owned()).or_default();
        let changed = change(host);
        let first = host.waiting.first().map(|(due_ms, _)| *due_ms);
        let ready_ms = first.filter(|_| host.running < self.of_host_max);
        if ready_ms != host.ready_ms {
            if let Some(before) = host.ready_ms {
                self.ready.remove(&(before, name.to_owned()));
            }
            if let Some(due_ms) = ready_ms {
                self.ready.insert((due_ms, name.to_owned()));
            }
            host.ready_ms = ready_ms;
        }
        if host.waiting.is_empty() && host.running == 0 {
            self.hosts.remove(name);
        }
        changed
    }

    fn take(&mut self, now_ms: u64) -> Option<Id> {
        let (due_ms, name) = self.ready.first()?;
        if self.running >= self.all_max || *due_ms > now_ms {
            return None;
        }
        let name = name.clone();
        self.running += 1;
        self.change(&name, |host| {
            host.running += 1;
            host.waiting.pop_first().map(|(_, id)| id)
        })
    }

    fn enter(&mut self, name: &str) -> bool {
        let of_host = self.hosts.get(name).map_or(0, |host| host.running);
        if self.running >= self.all_max || of_host >= self.of_host_max {
            return false;
        }
        self.running += 1;
        self.change(name, |host| host.running += 1);
        true
    }

    fn leave(&mut self, name: &str) {
        debug_assert!(self.running > 0, "a place is given back that nobody had");
        self.running = self.running.saturating_sub(1);
        self.change(name, |host| host.running = host.running.saturating_sub(1));
    }

    fn next_due_ms(&self) -> Option<u64> {
        let (due_ms, _) = self.ready.first()?;
        (self.running < self.all_max).then_some(*due_ms)
    }
}

/// The quick and the slow line.
#[derive(Debug)]
pub(super) struct Lines {
    quick: Line,
    slow: Line,
    late: Line,
}

impl Default for Lines {
    fn default() -> Self {
        let quick = Line::new(QUICK_MAX, QUICK_OF_HOST_MAX);
        let slow = Line::new(SLOW_MAX, SLOW_OF_HOST_MAX);
        Self { quick, slow, late: Line::new(LATE_MAX, LATE_OF_HOST_MAX) }
    }
}

impl Lines {
    fn line(&mut self, lane: Lane) -> &mut Line {
        match lane {
            Lane::Quick => &mut self.quick,
            Lane::Slow => &mut self.slow,
            Lane::Late => &mut self.late,
        }
    }

    /// Has a pusher wait for a place, which it takes at this time or later.
    pub(super) fn wait(&mut self, lane: Lane, host: &str, due_ms: u64, id: Id) {
        self.line(lane).change(host, |host| host.waiting.insert((due_ms, id)));
    }

    /// Has a pusher wait no more.
    pub(super) fn withdraw(&mut self, lane: Lane, host: &str, due_ms: u64, id: Id) {
        self.line(lane).change(host, |host| host.waiting.remove(&(due_ms, id)));
    }

    /// Gives a place to a pusher that is due, if there is both.
    pub(super) fn take(&mut self, now_ms: u64) -> Option<(Id, Lane)> {
        let quick = self.quick.take(now_ms).map(|id| (id, Lane::Quick));
        quick.or_else(|| self.slow.take(now_ms).map(|id| (id, Lane::Slow)))
    }

    /// Moves a request that turns out to be slow to a place among the slow, or beside them. `None` where there is neither; then it has no
    /// place any more.
    pub(super) fn slow_down(&mut self, host: &str) -> Option<Lane> {
        self.quick.leave(host);
        if self.slow.enter(host) {
            return Some(Lane::Slow);
        }
        self.late.enter(host).then_some(Lane::Late)
    }

    /// Takes a place back.
    pub(super) fn leave(&mut self, lane: Lane, host: &str) {
        self.line(lane).leave(host);
    }

    /// When the next pusher is due for which there is a place, in milliseconds since the epoch.
    pub(super) fn next_due_ms(&self) -> Option<u64> {
        [self.quick.next_due_ms(), self.slow.next_due_ms()].into_iter().flatten().min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_hangs_holds_its_own_places_and_no_other() {
        let mut lines = Lines::default();
        for id in 0..1_000 {
            lines.wait(Lane::Quick, "hangs.example", 1, id);
        }
        lines.wait(Lane::Quick, "quick.example", 2, 5_000);
        let taken: Vec<_> = std::iter::from_fn(|| lines.take(5)).collect();
        assert_eq!(taken.len(), QUICK_OF_HOST_MAX + 1);
        assert_eq!(taken.last(), Some(&(5_000, Lane::Quick)));
        assert_eq!(lines.next_due_ms(), None, "whoever waits finds no place");
        let slowed: Vec<_> =
            (0..QUICK_OF_HOST_MAX).map(|_| lines.slow_down("hangs.example").unwrap()).collect();
        let slow = slowed.iter().filter(|lane| **lane == Lane::Slow).count();
        assert_eq!(slow, SLOW_OF_HOST_MAX, "the others go on, too, because they were sent");
        assert_eq!(lines.next_due_ms(), Some(1));
        lines.leave(Lane::Quick, "quick.example");
        slowed.into_iter().for_each(|lane| lines.leave(lane, "hangs.example"));
        let all = [&lines.quick, &lines.slow, &lines.late];
        assert!(lines.slow.hosts.is_empty() && all.iter().all(|line| line.running == 0));
    }

    #[test]
    fn places_are_given_to_whoever_is_due_first_and_to_nobody_early() {
        let mut lines = Lines::default();
        lines.wait(Lane::Quick, "a", 30, 1);
        lines.wait(Lane::Quick, "b", 20, 2);
        lines.wait(Lane::Slow, "a", 10, 3);
        assert_eq!((lines.next_due_ms(), lines.take(5)), (Some(10), None));
        lines.withdraw(Lane::Slow, "a", 10, 3);
        assert_eq!(lines.take(40), Some((2, Lane::Quick)));
        assert_eq!(lines.take(40), Some((1, Lane::Quick)));
        assert_eq!(lines.take(40), None);
        lines.leave(Lane::Quick, "a");
        lines.leave(Lane::Quick, "b");
        assert!(lines.quick.hosts.is_empty() && lines.slow.hosts.is_empty());
    }

    #[test]
    fn all_hosts_together_have_no_more_places_than_there_are() {
        let mut lines = Lines::default();
        for id in 0..1_000 {
            lines.wait(Lane::Quick, &format!("h{id}"), 1, id);
        }
        assert_eq!(std::iter::from_fn(|| lines.take(5)).count(), QUICK_MAX);
        lines.leave(Lane::Quick, "h0");
        assert!(lines.take(5).is_some() && lines.take(5).is_none());
    }
}
