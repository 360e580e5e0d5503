//! Waits until the state of a room is whole that was joined without its members (`docs/decisions/partial-state-joins.md`).

use std::time::Duration;

use ruma::{RoomId, UserId};
use tokio::sync::watch;

use crate::{
    accounts::Caller,
    error::{Error, Result},
    flows::{
        App,
        places::{Place, Places},
    },
    ids::RoomNum,
    rooms::{self, change::left_out, members},
    schema::{event_types::MEMBER, rooms::Resident},
    store::Fault,
};

/// A request waits at most this long for the whole state of a room.
const WAITS_MAX: Duration = Duration::from_secs(60);
/// A join waits so long for the whole state, which of a small room is there by then.
const SOON: Duration = Duration::from_secs(1);
/// At most this many requests wait for whole states; others are told to come back.
const WAITING_MAX: usize = 1_000;
/// It takes at least this many users to have as many wait.
const WAITING_PAYERS_MIN: usize = 16;
/// The whole states of at most this many large rooms are learnt at once.
const FILLS_AT_ONCE: usize = 8;
/// It takes at least this many users, and as many servers that gave them, to have as many learnt.
const FILLS_PAYERS_MIN: usize = 4;
/// The state of a large room has more events than this.
const LARGE: usize = 2_000;
/// Those who waited in vain, or could not, come back after this time.
pub(super) const AGAIN: Duration = Duration::from_secs(10);

/// Tells those who wait that the state of some room became whole.
#[derive(Debug)]
pub struct Completing {
    told: watch::Sender<()>,
    waiting: Places,
    fills: Places,
}

impl Default for Completing {
    fn default() -> Self {
        let (waiting, fills) =
            (Places::new(WAITING_MAX, WAITING_PAYERS_MIN), Places::new(FILLS_AT_ONCE, FILLS_PAYERS_MIN));
        Self { told: watch::Sender::new(()), waiting, fills }
    }
}

impl Completing {
    /// Waits for a place for working on a state of so many events that came, for whom the current task works. Those of small rooms
    /// need none. Nobody has one while a state is asked for: a server that answers slowly holds up none that answered.
    pub(crate) async fn place(&self, count: usize) -> Option<Place> {
        if count <= LARGE { None } else { Some(self.fills.wait().await) }
    }

    /// Has those who wait look again.
    pub(crate) fn note(&self) {
        self.told.send_replace(());
    }
}

/// Whether a user is in a room of whose state only a part is known, so that this server is about to learn the rest.
fn is_partial(app: &App, caller: &Caller, room: &RoomId) -> Result<bool, Fault> {
    let snapshot = app.store.snapshot();
    let Some(num) = rooms::find_room(&*snapshot, room)? else { return Ok(false) };
    let is_partial = rooms::find_row(&*snapshot, num)?.is_some_and(|row| row.resident == Resident::Partial);
    Ok(is_partial && members::is_joined(&*snapshot, caller.user, num)?)
}

/// Waits for a moment whether the state of a room becomes whole that a user of ours has just joined.
pub(crate) async fn soon(app: &App, room: RoomNum) -> Result<()> {
    let mut told = app.completing.told.subscribe();
    let until = app.env.uptime().saturating_add(SOON);
    loop {
        let row = rooms::find_row(&*app.store.snapshot(), room)?;
        let left = until.saturating_sub(app.env.uptime());
        if left.is_zero() || row.is_none_or(|row| row.resident != Resident::Partial) {
            return Ok(());
        }
        tokio::select! {
            biased;
            _ = told.changed() => {}
            () = app.env.sleep(left) => {}
        }
    }
}

/// Waits until it is known what a user is to a room that the caller is in: where nothing is, until the state of the room is whole.
/// Errors: as of [`whole`]; [`Error::Busy`], too, where a join left out what the user is there.
pub(crate) async fn known(app: &App, caller: &Caller, room: &RoomId, user: &UserId) -> Result<()> {
    if *user.server_name() == app.config.server.name {
        return Ok(());
    }
    let snapshot = app.store.snapshot();
    let num = rooms::find_room(&*snapshot, room)?;
    if let Some(num) = num
        && left_out::is_open(&*snapshot, num, MEMBER, user.as_str())?
    {
        return Err(Error::Busy { retry_after: AGAIN });
    }
    if !is_partial(app, caller, room)? {
        return Ok(());
    }
    let member = num.map(|num| rooms::find_state(&*snapshot, num, MEMBER, user.as_str())).transpose()?;
    drop(snapshot);
    if member.flatten().is_some() { Ok(()) } else { whole(app, caller, room).await }
}

/// Waits until the state of a room is whole that the caller is in, as mostly it is. Errors: [`Error::Busy`] where that takes too
/// long.
pub(crate) async fn whole(app: &App, caller: &Caller, room: &RoomId) -> Result<()> {
    if !is_partial(app, caller, room)? {
        return Ok(());
    }
    let _waiting = app.completing.waiting.enter().ok_or(Error::Busy { retry_after: AGAIN })?;
    let mut told = app.completing.told.subscribe();
    let until = app.env.uptime().saturating_add(WAITS_MAX);
    while is_partial(app, caller, room)? {
        let left = until.saturating_sub(app.env.uptime());
        if left.is_zero() || app.stopping.is_cancelled() {
            return Err(Error::Busy { retry_after: AGAIN });
        }
        tokio::select! {
            biased;
            _ = told.changed() => {}
            () = app.stopping.cancelled() => {}
            () = app.env.sleep(left) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::{env::payer::Payers, ids::UserNum};

    #[tokio::test]
    async fn a_user_whose_large_states_take_long_leaves_places_to_others() {
        let completing = Completing::default();
        let of = |user: u64, server: &str| Payers::of_work(Some(UserNum(user)), server);
        let mut held = Vec::new();
        for server in ["a.example", "b.example"] {
            let place = of(1, server).during(completing.place(LARGE + 1)).now_or_never();
            held.push(place.flatten().unwrap());
        }
        let mut third = Box::pin(of(1, "c.example").during(completing.place(LARGE + 1)));
        assert!((&mut third).now_or_never().is_none(), "whatever the names of servers");
        assert!(of(2, "a.example").during(completing.place(LARGE + 1)).now_or_never().is_some());
        // Small rooms need no place.
        assert!(of(1, "c.example").during(completing.place(LARGE)).now_or_never().is_some());
        held.pop();
        assert!((&mut third).now_or_never().is_some());
    }
}
