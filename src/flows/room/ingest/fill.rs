//! Fills holes in the past of a room with events that another server gave us (`rooms/change/received/fill.rs`), in turns of the
//! room. States that are far apart are resolved beside the turns, as for events that come in.

use super::{ANSWERS_MAX, work_out_for_event};
use crate::{
    error::{Error, Result},
    flows::{App, commit},
    ids::RoomNum,
    rooms::{
        change::{Backfill, Filling},
        resolve::Resolving,
    },
};
use std::{sync::Arc, time::Duration};

/// A fill that was put off is tried again after this time.
const AGAIN: Duration = Duration::from_secs(60);

/// Fills a hole; answers when the events are durable and visible, and tells whether anything was filled. What was filled stays if it fails.
/// Errors: [`Error::Remote`] if an event comes without what it stands on; [`Error::Busy`] if too much is resolved or kept aside;
/// 403 `M_FORBIDDEN` for a room that this server is not in.
pub async fn fill(app: &App, room: RoomNum, mut backfill: Backfill) -> Result<bool> {
    let (mut worked, mut answers) = (None, 0);
    loop {
        let loaded = worked.as_ref().map(|worked: &super::Worked<'_>| Arc::clone(&worked.loaded));
        let owned = app.clone();
        let turn = commit::in_room(app, room, move |change| {
            let resolving = Resolving { loaded: loaded.as_deref(), ..owned.rooms.resolver().into() };
            let filling = change.fill(&mut backfill, resolving)?;
            Ok((backfill, filling))
        });
        let (left, filling) = turn.await?;
        // The events that were read are of use for one turn only, and dropping them lets others work something out.
        (backfill, worked) = (left, None);
        match filling {
            Filling::All => return Ok(backfill.has_filled()),
            Filling::Part => answers = 0,
            Filling::Resolve(question) if answers < ANSWERS_MAX => {
                answers += 1;
                worked = work_out_for_event(app, room, question).await?;
                if worked.is_none() {
                    return Err(Error::Busy { retry_after: AGAIN });
                }
            }
            Filling::Resolve(_) => return Err(Error::Busy { retry_after: AGAIN }),
        }
    }
}

#[cfg(test)]
mod tests;
