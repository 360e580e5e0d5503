//! Sweeps a room: forgets events aside, side states and state keys that nothing needs (`rooms/change/sweep.rs`).
//!
//! The count in the room's rows says that a sweep is due. The flow that took in an event has one begin at once, and a timer does
//! if the server ends before that one is done. A sweep reads all events of the room, so a room's sweeps keep their distance.

use std::time::Duration;

use super::Running;
use crate::{
    env::Long,
    error::{Error, Result},
    flows::{App, commit},
    ids::RoomNum,
    rooms::{
        self,
        change::sweep::{self, Sweep, Swept},
        turns::Turns,
    },
};

/// A sweep for which events are cited this often, one after the other, is left to the next one.
const CITED_TIMES_MAX: usize = 100;

/// Has a room swept by a task, now or a while after the last sweep. Faults are logged; the next event asks for a sweep again.
pub(super) fn when_due(app: &App, room: RoomNum) {
    let turns = app.rooms.turns(room);
    if !turns.sweeps.claim() {
        return;
    }
    let owned = app.clone();
    app.env.spawn(async move {
        while let Err(pause) = turns.sweeps.begin(owned.env.uptime()) {
            tracing::debug!(%room, ?pause, "a sweep waits, because the room was just swept");
            owned.env.sleep(pause).await;
        }
        let (_running, _noting) = (Running::new(&owned, &turns.sweeps), Noting(&turns));
        // Another sweep may have come first.
        let swept = match is_wanted(&owned, room) {
            Ok(true) => sweep(&owned, room).await,
            other => other.map(|_| ()),
        };
        match swept {
            Ok(()) => {}
            Err(Error::Busy { .. }) => {
                tracing::debug!(%room, "a room is not swept while its past is changed");
            }
            Err(error) => tracing::warn!(%error, %room, "a room could not be swept"),
        }
    });
}

/// Sweeps a room if that is wanted. Answers for how long to wait if the room was just swept or is being swept.
pub(crate) async fn now_or_later(app: &App, room: RoomNum) -> Result<Option<Duration>> {
    if !is_wanted(app, room)? {
        return Ok(None);
    }
    let turns = app.rooms.turns(room);
    if let Err(pause) = turns.sweeps.begin(app.env.uptime()) {
        return Ok(Some(pause));
    }
    let (_running, _noting) = (Running::new(app, &turns.sweeps), Noting(&turns));
    match sweep(app, room).await {
        Ok(()) => Ok(None),
        Err(Error::Busy { retry_after }) => Ok(Some(retry_after)),
        Err(other) => Err(other),
    }
}

fn is_wanted(app: &App, room: RoomNum) -> Result<bool> {
    let snapshot = app.store.snapshot();
    let Some(row) = rooms::find_row(&*snapshot, room)? else { return Ok(false) };
    Ok(sweep::is_wanted(&*snapshot, room, &row)?)
}

/// A room whose changes note which events they cite. Dropping this ends that.
struct Noting<'a>(&'a Turns);

impl Drop for Noting<'_> {
    fn drop(&mut self) {
        self.0.end_sweep();
    }
}

/// Sweeps a room, wanted or not.
async fn sweep(app: &App, room: RoomNum) -> Result<()> {
    let owned = app.clone();
    // A turn without rows answers once all earlier changes are published, so that the snapshot has them.
    let began =
        commit::beside_room(app, room, move |change| change.begin_sweep(owned.rooms.resolver())).await?;
    let owned = app.clone();
    let look = move || Ok(Sweep::look(&*owned.store.snapshot(), began)?);
    let mut sweep = app.env.blocking_long(Long::Maintenance, look).await?;
    let mut cited_times = 0;
    loop {
        let turn = commit::beside_room(app, room, move |change| {
            let swept = change.sweep(&mut sweep)?;
            Ok((sweep, swept))
        });
        let (left, swept) = turn.await?;
        sweep = left;
        match swept {
            Swept::All => return Ok(()),
            Swept::Part => {}
            Swept::Cited(_) if cited_times >= CITED_TIMES_MAX => {
                return Err(Error::broken("events were cited faster than could be found out what they need"));
            }
            Swept::Cited(cited) => {
                cited_times += 1;
                let owned = app.clone();
                let need = move || {
                    sweep.need_cited(&*owned.store.snapshot(), &cited)?;
                    Ok(sweep)
                };
                sweep = app.env.blocking_long(Long::Maintenance, need).await?;
            }
        }
    }
}

#[cfg(test)]
mod tests;
