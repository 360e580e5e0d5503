//! Reunites branches that stand apart with the rest of their room.
//!
//! A reunion resolves states that are far apart, so it costs as much as the room has keys, and anybody in the room can make
//! one necessary by a single event. So a room's reunions keep their distance: one that comes soon after another waits, and
//! whatever comes in meanwhile is reunited with it.

use std::{sync::Arc, time::Duration};

use super::{Worked, try_merge, work_out};
use crate::{
    error::Result,
    flows::{App, commit},
    ids::RoomNum,
    rooms::{change::Reunion, graph, resolve::Resolving, turns::Turns},
};

/// At most this many answers are worked out beside a room for one reunion.
const ANSWERS_MAX: usize = 2;

/// Reunites a room's branches now, or lets a task do it later if the last reunion was a short while ago. Faults are logged,
/// because the events are part of the room already; the next event asks for the reunion again.
pub(super) async fn when_due(app: &App, room: RoomNum) {
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

async fn now(app: &App, room: RoomNum, turns: &Turns) {
    // The end is noted even if the requester hangs up, because nobody could begin another reunion otherwise.
    let _running = Running { app, turns, began: app.env.uptime() };
    match reunite(app, room).await {
        Ok(true) => try_merge(app, room).await,
        Ok(false) => {}
        Err(error) => tracing::warn!(%error, %room, "branches of a room could not be reunited with it"),
    }
}

struct Running<'a> {
    app: &'a App,
    turns: &'a Turns,
    began: Duration,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let now = self.app.env.uptime();
        self.turns.reunions.end(now, now.saturating_sub(self.began));
    }
}

/// Reunites the branches that stand apart with the heads. Answers whether the heads are to be merged then.
async fn reunite(app: &App, room: RoomNum) -> Result<bool> {
    let mut worked: Option<Worked<'_>> = None;
    for attempt in 0..=ANSWERS_MAX {
        // A room whose state moves faster than a resolution, of which the events do not fit in memory, waits for one.
        let may_take_long = attempt == ANSWERS_MAX;
        let loaded = worked.as_ref().map(|worked| Arc::clone(&worked.loaded));
        let owned = app.clone();
        let turn = commit::in_room(app, room, move |change| {
            let resolver = owned.rooms.resolver();
            let resolving = Resolving { resolver, loaded: loaded.as_deref(), may_take_long };
            let reunion = change.reunite(resolving, owned.env.now_ms())?;
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
