//! Joins and knocks of users of ours that are under way by way of other servers, which may take minutes to answer. Whoever leaves the
//! room meanwhile ends theirs, however far it came: nobody else is asked, and what a server has taken by then is taken back, or left
//! again where it comes true (`late.rs`).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures_util::future::join_all;
use parking_lot::Mutex;
use ruma::{EventId, OwnedEventId, OwnedRoomId, OwnedServerName, RoomId, ServerName};
use tokio::sync::watch;

use super::kept::Kept;
use crate::{
    error::{Refusal, Result},
    flows::App,
    ids::UserNum,
    store::timer::Timer,
};

/// Somebody who leaves waits at most this long for an attempt that is coming true just now.
const SETTLES_WITHIN: Duration = Duration::from_secs(10);
/// It is remembered for this long that somebody ended what was under way, so that they may leave once more.
const LEFT_FOR: Duration = Duration::from_secs(300);
/// The memory of that has at most this many bytes.
const LEFT_BYTES_MAX: usize = 256 << 10;
/// An id of a room takes this many bytes beside its own there.
const LEFT_OVERHEAD: usize = 64;
/// A join that waits here for other events does so for a day at most.
const WAITS_FOR: Duration = Duration::from_secs(24 * 60 * 60);
/// The memory of such joins has at most this many bytes.
const WAITS_BYTES_MAX: usize = 1 << 20;
/// The jobs that leave rooms again of at most this many are found by their user and room; others are carried out by their timers alone.
const LATE_MAX: usize = 10_000;

/// The room, and the user who is coming into it.
pub(super) type Of = (OwnedRoomId, UserNum);

/// The attempts that are under way. Clones share them.
#[derive(Clone)]
pub(crate) struct Attempts(Arc<Inner>);

struct Inner {
    under_way: Mutex<BTreeMap<Of, Vec<Wish>>>,
    left: Kept<Of, ()>,
    /// The joins that other servers have taken, and that wait here for other events.
    waiting: Kept<Of, Sent>,
    /// The timers of the jobs that leave rooms again which were left while a join was on its way.
    late: Mutex<BTreeMap<Of, Timer>>,
    /// The timers of the jobs that find out what became of joins which are on their way now, should the server end before that.
    cut_off: Mutex<BTreeMap<Of, Timer>>,
}

/// The end of a user's attempts to come into a room.
pub(crate) struct Ended {
    /// Whether there was an attempt, or was lately.
    pub(crate) was_coming: bool,
    /// The joins that other servers have taken or may have, and that may come true yet.
    pub(crate) sent: Sent,
}

/// Joins, each with the server that it was sent to.
pub(crate) type Sent = Vec<(OwnedEventId, OwnedServerName)>;

/// An attempt that is under way, until this is dropped.
pub(crate) struct Attempt {
    attempts: Attempts,
    of: Of,
    wish: Wish,
}

/// The wish of the user of an attempt by now. Clones share it.
#[derive(Clone)]
pub(super) struct Wish(Arc<Wishing>);

#[derive(Default)]
struct Wishing {
    state: watch::Sender<State>,
    /// The joins that were sent to other servers.
    sent: Mutex<Sent>,
}

#[derive(Clone, Copy, Default)]
struct State {
    /// Whether the user has left meanwhile.
    has_left: bool,
    /// The number of parts of the attempt that are making it come true just now.
    settling: usize,
}

/// A part of an attempt that is making it come true, until this is dropped.
pub(super) struct Settling(Wish);

impl Default for Attempts {
    fn default() -> Self {
        Self(Arc::new(Inner {
            under_way: Mutex::default(),
            left: Kept::new(LEFT_BYTES_MAX),
            waiting: Kept::new(WAITS_BYTES_MAX),
            late: Mutex::default(),
            cut_off: Mutex::default(),
        }))
    }
}

impl Attempts {
    /// Notes that a user comes into a room.
    pub(crate) fn begin(&self, room: &RoomId, user: UserNum) -> Attempt {
        let (of, wish) = ((room.to_owned(), user), Wish(Arc::default()));
        let mut under_way = self.0.under_way.lock();
        let of_user = under_way.entry(of.clone()).or_default();
        // A user who comes back wants in by whichever attempt comes true now.
        of_user
            .iter()
            .for_each(|other| other.0.state.send_modify(|state| state.has_left &= state.settling == 0));
        of_user.push(wish.clone());
        drop(under_way);
        Attempt { attempts: self.clone(), of, wish }
    }

    /// Ends the attempts of a user to come into a room, and waits for a moment until what comes true just now has done so.
    pub(crate) async fn end(&self, app: &App, room: &RoomId, user: UserNum) -> Ended {
        let (of, now) = ((room.to_owned(), user), app.env.uptime());
        let wishes = self.0.under_way.lock().get(&of).cloned().unwrap_or_default();
        let mut sent = self.0.waiting.find(&of, now).unwrap_or_default();
        if wishes.is_empty() && sent.is_empty() {
            return Ended { was_coming: self.0.left.find(&of, now).is_some(), sent };
        }
        wishes.iter().for_each(|wish| wish.0.state.send_modify(|state| state.has_left = true));
        let bytes = room.as_str().len() + LEFT_OVERHEAD;
        self.0.left.keep(of, (), bytes, now.saturating_add(LEFT_FOR));
        let settled = wishes.iter().map(|wish| wish.when(|state| state.settling == 0));
        tokio::select! {
            biased;
            _ = join_all(settled) => {}
            () = app.env.sleep(SETTLES_WITHIN) => {}
        }
        wishes.iter().for_each(|wish| sent.extend(wish.0.sent.lock().iter().cloned()));
        Ended { was_coming: true, sent }
    }

    /// Notes that a join which another server has taken waits here for other events.
    pub(super) fn note_waits(
        &self,
        app: &App,
        room: &RoomId,
        user: UserNum,
        (join, server): (&EventId, &ServerName),
    ) {
        let (of, now) = ((room.to_owned(), user), app.env.uptime());
        let mut sent = self.0.waiting.find(&of, now).unwrap_or_default();
        sent.push((join.to_owned(), server.to_owned()));
        let bytes =
            sent.iter().map(|(join, server)| join.as_str().len() + server.as_str().len()).sum::<usize>();
        let bytes = bytes + room.as_str().len() + LEFT_OVERHEAD * (sent.len() + 1);
        self.0.waiting.keep(of, sent, bytes, now.saturating_add(WAITS_FOR));
    }

    /// Lists the rooms that a user is coming into.
    pub(crate) fn list_rooms(&self, user: UserNum) -> Vec<OwnedRoomId> {
        let under_way = self.0.under_way.lock();
        under_way.keys().filter(|(_, of)| *of == user).map(|(room, _)| room.clone()).collect()
    }

    /// Whether an attempt of a user to come into a room has not ended yet, whether or not they still want it.
    pub(super) fn is_any_under_way(&self, room: &RoomId, user: UserNum) -> bool {
        self.0.under_way.lock().contains_key(&(room.to_owned(), user))
    }

    /// Whether an attempt of a user to come into a room is under way that they still want.
    pub(super) fn is_under_way(&self, room: &RoomId, user: UserNum) -> bool {
        let under_way = self.0.under_way.lock();
        under_way
            .get(&(room.to_owned(), user))
            .is_some_and(|wishes| wishes.iter().any(|wish| !wish.has_left()))
    }

    /// Looks at the jobs that find out what became of joins, and changes them. Whoever promises another one or takes one back does so in
    /// here, so that none is lost.
    pub(super) fn with_cut_off<T>(&self, act: impl FnOnce(&mut BTreeMap<Of, Timer>) -> T) -> T {
        act(&mut self.0.cut_off.lock())
    }

    /// Finds the job that leaves a room again for a user.
    pub(crate) fn find_late(&self, room: &RoomId, user: UserNum) -> Option<Timer> {
        self.0.late.lock().get(&(room.to_owned(), user)).cloned()
    }

    /// Keeps the job that leaves a room again for a user, so that it is found when a join comes true.
    pub(super) fn keep_late(&self, room: &RoomId, user: UserNum, timer: Timer) {
        let (mut late, of) = (self.0.late.lock(), (room.to_owned(), user));
        if late.len() < LATE_MAX || late.contains_key(&of) {
            late.insert(of, timer);
        }
    }

    /// Keeps that job no longer.
    pub(super) fn forget_late(&self, room: &RoomId, user: UserNum) -> Option<Timer> {
        self.0.late.lock().remove(&(room.to_owned(), user))
    }
}

impl Attempt {
    /// The wish of the user by now.
    pub(super) fn wish(&self) -> Wish {
        self.wish.clone()
    }

    /// Refuses where the user has left: 403 `M_FORBIDDEN`.
    pub(crate) fn require_wanted(&self) -> Result<()> {
        self.wish.require()
    }

    /// The user who is coming.
    pub(super) fn user(&self) -> UserNum {
        self.of.1
    }

    /// The room, and the user who is coming into it.
    pub(super) fn of(&self) -> &Of {
        &self.of
    }

    /// Whether this is the only attempt of its user to come into its room.
    pub(super) fn is_only(&self) -> bool {
        self.attempts.0.under_way.lock().get(&self.of).is_none_or(|of_user| of_user.len() <= 1)
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let mut under_way = self.attempts.0.under_way.lock();
        if let Some(of_user) = under_way.get_mut(&self.of) {
            of_user.retain(|wish| !Arc::ptr_eq(&wish.0, &self.wish.0));
            if of_user.is_empty() {
                under_way.remove(&self.of);
            }
        }
    }
}

impl Wish {
    /// Whether the user has left meanwhile.
    pub(super) fn has_left(&self) -> bool {
        self.0.state.borrow().has_left
    }

    /// Resolves when the user has left.
    pub(super) async fn left(&self) {
        self.when(|state| state.has_left).await;
    }

    /// Goes on with something until the user leaves; `None` if they do before it is done.
    pub(super) async fn unless_left<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.left() => None,
            done = work => Some(done),
        }
    }

    /// Refuses where the user has left: 403 `M_FORBIDDEN`.
    pub(super) fn require(&self) -> Result<()> {
        if self.has_left() { Err(left_meanwhile().into()) } else { Ok(()) }
    }

    /// Notes that a join is sent to another server, unless the user has left. Errors: as of [`Self::require`].
    pub(super) fn note_sent(&self, join: &EventId, server: &ServerName) -> Result<()> {
        // Somebody who leaves says so first and looks at the joins then, so that one of both sees the other.
        self.0.sent.lock().push((join.to_owned(), server.to_owned()));
        self.require()
    }

    /// Begins to make the attempt come true, unless the user has left. Errors: as of [`Self::require`].
    pub(super) fn settle(&self) -> Result<Settling> {
        let may = self.0.state.send_if_modified(|state| {
            state.settling += usize::from(!state.has_left);
            !state.has_left
        });
        if may { Ok(Settling(self.clone())) } else { Err(left_meanwhile().into()) }
    }

    /// Begins to make the attempt come true, also where the user has left: others believe that it has.
    pub(super) fn settle_anyway(&self) -> Settling {
        self.0.state.send_modify(|state| state.settling += 1);
        Settling(self.clone())
    }

    async fn when(&self, is_so: impl FnMut(&State) -> bool) {
        // The channel lives as long as this.
        let _ = self.0.state.subscribe().wait_for(is_so).await.map(drop);
    }
}

impl Drop for Settling {
    fn drop(&mut self) {
        self.0.0.state.send_modify(|state| state.settling = state.settling.saturating_sub(1));
    }
}

/// The refusal of an attempt whose user has left meanwhile: 403 `M_FORBIDDEN`.
pub(super) fn left_meanwhile() -> Refusal {
    Refusal::forbidden("You left the room, or were removed from it, while you were joining it.")
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOB: UserNum = UserNum(1);

    fn room() -> OwnedRoomId {
        "!room:a.example".try_into().unwrap()
    }

    #[test]
    fn what_is_left_does_not_come_true_unless_the_user_comes_back() {
        let attempts = Attempts::default();
        let leave = || {
            let under_way = attempts.0.under_way.lock();
            let of_bob = under_way.get(&(room(), BOB)).cloned().unwrap_or_default();
            of_bob.iter().for_each(|wish| wish.0.state.send_modify(|state| state.has_left = true));
        };
        let first = attempts.begin(&room(), BOB);
        let settling = first.wish().settle().unwrap();
        leave();
        assert!(first.wish().has_left() && first.wish().settle().is_err());
        let second = attempts.begin(&room(), BOB);
        assert!(!first.wish().has_left(), "it comes true just now, and the user wants that again");
        assert!(!first.is_only() && !second.is_only());
        drop(settling);
        leave();
        let third = attempts.begin(&room(), BOB);
        assert!(first.wish().has_left() && second.wish().has_left(), "these have not begun to come true");
        assert!(third.wish().require().is_ok());
        drop((first, second));
        assert!(third.is_only());
        drop(third);
        assert!(attempts.0.under_way.lock().is_empty());
    }
}
