//! Reunites branches that stand apart with the rest of their room.
//!
//! A reunion resolves states that are far apart, so it costs as much as the room has keys, and anybody in the room can make
//! one necessary by a single event. So a room's reunions keep their distance: one that comes soon after another waits, and
//! whatever comes in meanwhile is reunited with it.

use std::{sync::Arc, time::Duration};

use super::{Running, Worked, try_merge, work_out};
use crate::{
    error::Result,
    flows::{App, commit},
    ids::RoomNum,
    rooms::{change::Reunion, graph, resolve::Resolving, turns::Turns},
    schema,
};

/// This many answers are worked out beside a room for one reunion while its state goes on.
const ANSWERS_MAX: usize = 2;
/// Afterwards the room's state stands still for at most this long, for one more answer.
const STILL_MAX: Duration = Duration::from_secs(60);

/// Reunites a room's branches now, or lets a task do it later if the last reunion was a short while ago. Faults are logged,
/// because the events are part of the room already; a timer asks for the reunion again.
pub(crate) async fn when_due(app: &App, room: RoomNum) {
    let turns = app.rooms.turns(room);
    if !turns.reunions.claim() {
        // Somebody else has claimed a reunion and not begun it yet, so it will have this event, too.
        return;
    }
    let Err(mut pause) = turns.reunions.begin(app.env.uptime()) else {
        return now(app, room, &turns).await;
    };
    tracing::debug!(%room, ?pause, "branches stand apart for a while, because others were just reunited");
    let owned = app.clone();
    app.env.spawn(async move {
        loop {
            owned.env.sleep(pause).await;
            match turns.reunions.begin(owned.env.uptime()) {
                Ok(()) => return now(&owned, room, &turns).await,
                Err(longer) => pause = longer,
            }
        }
    });
}

/// Whether branches of a room stand apart now.
pub(crate) fn stands_apart(app: &App, room: RoomNum) -> Result<bool> {
    let row = schema::ROOM.get(&*app.store.snapshot(), room)?;
    Ok(row.is_some_and(|row| !row.apart.is_empty()))
}

async fn now(app: &App, room: RoomNum, turns: &Turns) {
    // The end is noted even if the requester hangs up, because nobody could begin another reunion otherwise.
    let (_running, _still) = (Running::new(app, &turns.reunions), Still(turns));
    match reunite(app, room).await {
        Ok(true) => try_merge(app, room).await,
        Ok(false) => {}
        Err(error) => tracing::warn!(%error, %room, "branches of a room could not be reunited with it"),
    }
}

/// A room whose state may be held still. Dropping this lets it go on.
struct Still<'a>(&'a Turns);

impl Drop for Still<'_> {
    fn drop(&mut self) {
        self.0.hold_still(Duration::ZERO);
    }
}

/// Reunites the branches that stand apart with the heads. Answers whether the heads are to be merged then.
///
/// Where the events of the conflict fit in memory, a turn resolves again what moved while an answer was worked out. Where they
/// do not, the answer to what was asked first would be of no use in a room whose state always moves, and a turn that resolved
/// it anew would hold everybody up. So the last answer is worked out while changes of the room's state are refused: messages
/// go on, and as reunions are paced, the room's state stands still for a twentieth of the time at most.
async fn reunite(app: &App, room: RoomNum) -> Result<bool> {
    let mut worked: Option<Worked<'_>> = None;
    for attempt in 0..=ANSWERS_MAX + 1 {
        let loaded = worked.as_ref().map(|worked| Arc::clone(&worked.loaded));
        let owned = app.clone();
        let turn = commit::in_room(app, room, move |change| {
            let resolver = owned.rooms.resolver();
            let resolving = Resolving { resolver, loaded: loaded.as_deref() };
            let turns = owned.rooms.turns(room);
            turns.hold_still(Duration::ZERO);
            let reunion = change.reunite(resolving, owned.env.now_ms())?;
            if attempt == ANSWERS_MAX && matches!(reunion, Reunion::Resolve(_)) {
                let why = "it moves faster than its branches can be resolved";
                tracing::debug!(%room, why, "changes of a room's state are refused for a while");
                turns.hold_still(owned.env.uptime() + STILL_MAX);
            }
            let wants_merge = graph::want_merge(&change.batch, room, &change.row)?;
            Ok((reunion, wants_merge))
        });
        let (reunion, wants_merge) = turn.await?;
        // The events that were read are of use for one turn only, and dropping them lets others work something out.
        drop(worked.take());
        match reunion {
            Reunion::Done => return Ok(wants_merge),
            Reunion::Resolve(question) => worked = work_out(app, room, question).await?,
        }
        if worked.is_none() {
            break;
        }
    }
    tracing::debug!(%room, "branches stay apart for now, because their states could not be resolved");
    Ok(false)
}

#[cfg(test)]
mod tests;
