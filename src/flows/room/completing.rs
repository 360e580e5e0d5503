//! Waits until the state of a room is whole that was joined without its members (`docs/decisions/partial-state-joins.md`).

use std::time::Duration;

use federation::turns::{Turn, Turns};
use ruma::{OwnedServerName, RoomId, ServerName, UserId};
use tokio::sync::{Semaphore, SemaphorePermit, watch};

use crate::{
    accounts::Caller,
    error::{Error, Result},
    flows::App,
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
/// The whole states of at most this many large rooms are learnt at once, each from a server of its own.
const FILLS_AT_ONCE: usize = 8;
/// The state of a large room has more events than this.
const LARGE: usize = 2_000;
/// Those who waited in vain, or could not, come back after this time.
pub(super) const AGAIN: Duration = Duration::from_secs(10);

/// Tells those who wait that the state of some room became whole.
#[derive(Debug)]
pub struct Completing {
    told: watch::Sender<()>,
    waiting: Semaphore,
    fills: Semaphore,
    /// A server whose states cost much holds up its own rooms.
    from: Turns<OwnedServerName>,
}

/// A place for learning a whole state.
pub(crate) struct Place<'a> {
    _place: Option<(SemaphorePermit<'a>, Turn<OwnedServerName>)>,
}

impl Default for Completing {
    fn default() -> Self {
        let (waiting, fills) = (Semaphore::new(WAITING_MAX), Semaphore::new(FILLS_AT_ONCE));
        Self { told: watch::Sender::new(()), waiting, fills, from: Turns::default() }
    }
}

impl Completing {
    /// Waits for a place for learning a state of so many events that this server gave. Those of small rooms need none. Whoever
    /// has a place goes on waiting for that server and for the keys of others, so that a server has one only.
    pub(crate) async fn place(&self, server: &ServerName, count: usize) -> Result<Place<'_>> {
        if count <= LARGE {
            return Ok(Place { _place: None });
        }
        let from = self.from.enter(server.to_owned()).await;
        let place = self.fills.acquire().await.map_err(|_| Error::broken("the server stopped"))?;
        Ok(Place { _place: Some((place, from)) })
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
    let _waiting = app.completing.waiting.try_acquire().map_err(|_| Error::Busy { retry_after: AGAIN })?;
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
